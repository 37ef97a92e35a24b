"""What an analysis says, in words: a sentence for each of its sections, from the values of its JSON."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import numpy as np

from hybridprune_megatron.evaluation.intervals import bootstrap

#: Below this divergence (nats) an answer is taken to be the same.
_SAME = 0.01
#: Overlaps of two layers' tops below and above which these have little and nearly all in common.
_APART, _ALIKE = 0.5, 0.8
#: Half of the score mass lies in this share of the tokens if scores are noise.
_NOISE = 0.24


def conclusions(result: dict[str, Any]) -> list[str]:
    """Sentences, one for each section that was measured.

    Args:
        result: as in ``analysis.json``.
    """
    said = [_mass(result["sparsity"]), _persistence(result["stability"]), _evidence(result)]
    if result["exposure"]:
        said.append(_reading(result["exposure"]))
    if result["probe"]:
        said += _traces(result["probe"])
    return said


def _mass(rows: list[dict[str, Any]]) -> str:
    kinds = sorted({row["type"] for row in rows})
    held = {kind: [row["tokens_that_hold"]["0.5"] for row in rows if row["type"] == kind] for kind in kinds}
    shares = {kind: known_mean(each) for kind, each in held.items()}
    words = " and ".join(f"{_percent(share)} of the visual tokens in {kind} layers" for kind, share in shares.items())
    sparse = " and ".join(kind for kind, share in shares.items() if share is not None and share < _NOISE / 2)
    verdict = f"scores of {sparse} layers are sparse" if sparse else "no kind of layer is twice as sparse as noise"
    return f"Half of the score mass lies in {words}; evenly spread it would be 50 %, noise has 24 %: {verdict}."


def _persistence(stability: dict[str, Any]) -> str:
    pairs = stability["by_type"].values()
    known = [pair for pair in pairs if pair["overlap"] is not None]
    if not known:
        return "Fewer than two layers score, so nothing follows about whether rankings persist."
    overlap = sum(pair["overlap"] * pair["pairs"] for pair in known) / sum(pair["pairs"] for pair in known)
    verdict = "rankings agree in part, and an early decision loses some of what a late one would keep"
    if overlap < _APART:
        verdict = "most of one layer's top is not another's, and an early decision is a bad guess of a late one"
    elif overlap > _ALIKE:
        verdict = "rankings hardly change with depth, and an early decision does nearly as well as a late one"
    top = _percent(stability["top"])
    shared = f"Two layers share {_percent(overlap)} of their top {top} (by chance {top})"
    return f"{shared}: {verdict}."


def _evidence(result: dict[str, Any]) -> str:
    clips = [clip for clip in result["clips"] if clip["inside"] is not None]
    if not clips:
        return (
            "The data set does not say which frames an answer needs, so nothing follows about whether the score finds "
            "them."
        )
    inside, outside = (np.array([clip[name] for clip in clips]) for name in ("inside", "outside"))
    gap = bootstrap(inside - outside)
    verdict = "the score does not tell them apart on these clips"
    if gap.low > 0:
        verdict = "the score prefers what the answer needs"
    elif gap.high < 0:
        verdict = "the score drops what the answer needs first"
    return (
        f"Mean over layers, {_percent(inside.mean())} of the tokens of frames that the answer needs are kept and "
        f"{_percent(outside.mean())} of the others, {100 * gap.mean:+.1f} points ({100 * gap.low:+.1f} to "
        f"{100 * gap.high:+.1f}, {len(clips)} clips): {verdict}."
    )


def _reading(rows: list[dict[str, Any]]) -> str:
    reads = [row["layer"] for row in rows if row["kl"] >= _SAME]
    if not reads:
        return (
            f"Answers change by less than {_SAME} nats if one visual token gets past the first layer: none is needed."
        )
    if reads[-1] == rows[-1]["layer"]:
        return f"Visual tokens are still read after layer {reads[-1]}, the last that scores: a schedule may not end."
    end = next(row["layer"] for row in rows if row["layer"] > reads[-1])
    return (
        f"Visual tokens are still read after layer {reads[-1]}; after layer {end} a schedule may end (KL below {_SAME} "
        "nats)."
    )


def _traces(probe: dict[str, Any]) -> list[str]:
    said = []
    for content, found in probe["contents"].items():
        high = max((row["shuffled_high"] for row in found["rows"] if row["shuffled_high"] is not None), default=0.0)
        for kind, rows in found["by_drop"].items():
            held, dropped, absent = (known_mean([row[name] for row in rows]) for name in ("held", "score", "absent"))
            if held is None or dropped is None or absent is None:
                continue
            figures = f"{dropped:.2f} after a drop, {held:.2f} with nothing dropped, {absent:.2f} if they never entered"
            verdict = "too few clips to read it out"
            if held > high:
                verdict = "a drop leaves much of it" if dropped > (held + absent) / 2 else "a drop loses most of it"
            said.append(f"Probe for the {content} of dropped tokens at {kind} layers: {figures}; {verdict}.")
    return said


def known_mean(values: list[float | None]) -> float | None:
    """Mean of the values that are known; None: none is."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _percent(share: float | None) -> str:
    return "an unknown share" if share is None else f"{100 * share:.3g} %"
