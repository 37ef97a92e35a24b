"""What scores and kept tokens say, per sample, and the mean over samples: sparsity, stability, kept over time.

Shape letters: V visual tokens, F frames, K layers, R layers that score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from hybridprune_megatron.analysis.observe import Observation
from hybridprune_megatron.analysis.samples import AnalysisSample
from hybridprune_megatron.analysis.statistics import auc, gini, spearman, tokens_that_hold, top_overlap
from hybridprune_megatron.layers.kinds import KINDS
from hybridprune_megatron.method.layout import TokenLayout

#: Shares of the score mass that are looked for.
MASS_SHARES = (0.5, 0.8, 0.95)


@dataclass(frozen=True)
class SampleMeasures:
    """Of one sample.

    Attributes:
        sparsity: float64 [R, 5]: share of tokens that hold each of ``MASS_SHARES``, Gini, share of negative scores.
        stability: float64 [2, R, R]: Spearman's correlation and overlap of the top, each layer with each.
        auc: float64 [R], how often a token of a frame that the answer needs outranks another one; nan if not known.
        kept: float64 [K, F] share of each frame's tokens that enter each layer.
        hit: float64 [K, 2] the same over the frames that the answer needs, and over all others; None if they are not
            known or are all frames.
    """

    sparsity: Tensor
    stability: Tensor
    auc: Tensor
    kept: Tensor
    hit: Tensor | None


def measure(sample: AnalysisSample, full: Observation, reduced: Observation, top: float) -> SampleMeasures:
    """Measures of one sample.

    Args:
        full: its pass without reduction, with scores.
        reduced: its pass under reduction.
        top: share of tokens that counts as the top.
    """
    scores = torch.stack([full.scores[layer] for layer in sorted(full.scores)]).cpu()
    kept = kept_tokens(sample, reduced.entered).double()
    frames = sample.frame_numbers()
    needed = torch.isin(frames, torch.tensor(sample.evidence or (), dtype=torch.int64))
    # Where all frames are needed, as where none is known to be, nothing can be told apart.
    known = bool(needed.any() and not needed.all())
    return SampleMeasures(
        sparsity=torch.tensor([_sparsity(row) for row in scores], dtype=torch.float64),
        stability=torch.stack([spearman(scores), top_overlap(scores, max(1, round(top * scores.shape[1])))]),
        auc=auc(scores, needed) if known else torch.full((len(scores),), torch.nan, dtype=torch.float64),
        kept=torch.stack([kept[:, frames == frame].mean(1) for frame in range(int(frames.max()) + 1)], 1),
        hit=torch.stack([kept[:, needed].mean(1), kept[:, ~needed].mean(1)], 1) if known else None,
    )


def clip_row(sample: AnalysisSample, found: SampleMeasures, symbols: str) -> dict[str, Any]:
    """What two analyses of the same clip are compared by: means over layers, None where not known.

    Returns:
        key of the clip; by type of layer, share of tokens that holds half of the mass (half) and ``auc``; shares of the
        tokens of needed frames (inside), of all others (outside) and of all (kept).
    """
    kinds = [KINDS[symbol].name for symbol in symbols if KINDS[symbol].scores]
    inside, outside = (None, None) if found.hit is None else found.hit.mean(0).tolist()

    def by_kind(values: Tensor) -> dict[str, float | None]:
        means = {kind: values[[each == kind for each in kinds]].mean().item() for kind in sorted(set(kinds))}
        return {kind: None if math.isnan(mean) else mean for kind, mean in means.items()}

    return {
        "key": sample.prompt.key,
        "half": by_kind(found.sparsity[:, 0]),
        "auc": by_kind(found.auc),
        "inside": inside,
        "outside": outside,
        "kept": found.kept.mean().item(),
    }


def kept_tokens(sample: AnalysisSample, entered: Sequence[TokenLayout]) -> Tensor:
    """bool [K, V]: which of the sample's visual tokens entered each layer."""
    number = sample.visual_numbers()
    kept = torch.zeros(len(entered), sample.prompt.layout.num_visual, dtype=torch.bool)
    for layer, layout in enumerate(entered):
        kept[layer, number[layout.position[layout.visual_index].cpu()]] = True
    return kept


def _sparsity(scores: Tensor) -> list[float]:
    mass = scores.abs()
    return [*tokens_that_hold(mass, MASS_SHARES), gini(mass), (scores < 0).double().mean().item()]


def summarize(found: Sequence[SampleMeasures], symbols: str, top: float) -> dict[str, Any]:
    """Means over samples as plain values, for JSON.

    Args:
        found: at least one.
        top: as in ``measure``.
    """
    layers = [layer for layer, symbol in enumerate(symbols) if KINDS[symbol].scores]
    return {
        "sparsity": _summarize_sparsity(found, layers, symbols),
        "stability": _summarize_stability(found, layers, symbols, top),
        "kept": _summarize_kept(found),
    }


def _summarize_sparsity(found: Sequence[SampleMeasures], layers: list[int], symbols: str) -> list[dict[str, Any]]:
    means = torch.stack([each.sparsity for each in found]).nanmean(0).tolist()
    aucs = torch.stack([each.auc for each in found]).nanmean(0).tolist()
    return [
        {
            "layer": layer,
            "type": KINDS[symbols[layer]].name,
            "tokens_that_hold": {f"{share:g}": value for share, value in zip(MASS_SHARES, row)},
            "gini": row[-2],
            "negative": row[-1],
            "auc": area,
        }
        for layer, row, area in zip(layers, means, aucs)
    ]


def _summarize_stability(
    found: Sequence[SampleMeasures], layers: list[int], symbols: str, top: float
) -> dict[str, Any]:
    correlation, overlap = torch.stack([each.stability for each in found]).nanmean(0)
    pairs: dict[str, list[tuple[int, float, float]]] = {}
    for i, j in combinations(range(len(layers)), 2):
        name = "-".join(sorted(KINDS[symbols[layers[k]]].name for k in (i, j)))
        pairs.setdefault(name, []).append((layers[j] - layers[i], correlation[i, j].item(), overlap[i, j].item()))
    return {
        "layers": layers,
        "top": top,
        "spearman": correlation.tolist(),
        "overlap": overlap.tolist(),
        "by_type": {name: _mean_pair(values) for name, values in sorted(pairs.items())},
        "by_distance": {
            name: [
                {"distance": distance, **_mean_pair([value for value in values if value[0] == distance])}
                for distance in sorted({value[0] for value in values})
            ]
            for name, values in sorted(pairs.items())
        },
    }


def _mean_pair(values: Sequence[tuple[int, float, float]]) -> dict[str, float]:
    _, correlation, overlap = torch.tensor(values, dtype=torch.float64).nanmean(0).tolist()
    return {"spearman": correlation, "overlap": overlap, "pairs": len(values)}


def _summarize_kept(found: Sequence[SampleMeasures]) -> dict[str, Any]:
    most = max(each.kept.shape[1] for each in found)
    padded = [torch.nn.functional.pad(each.kept, (0, most - each.kept.shape[1]), value=torch.nan) for each in found]
    hits = [each.hit for each in found if each.hit is not None]
    needed = None
    if hits:
        inside, outside = torch.stack(hits).mean(0).T.tolist()
        needed = {"samples": len(hits), "inside": inside, "outside": outside}
    return {"by_layer_and_frame": torch.stack(padded).nanmean(0).tolist(), "needed_frames": needed}
