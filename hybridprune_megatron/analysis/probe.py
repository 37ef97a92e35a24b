"""What a later state still knows of tokens that were dropped: a linear probe of forced drops.

For each sample, the tokens of some frames (those that show the needle; the second quarter of the clip in data without
needles) are dropped right after one layer, and nothing else is dropped anywhere. Which tokens go is decided by the
probe and not by the model's own scores, for what a model chooses to drop is what it needs least.

Read out is, at every Mamba layer, the state after the last token of the prompt (what decoding would continue from), and
at every attention layer the mean over the question's tokens of the hidden states after it, the text that has survived.
A layer up to and including the drop has seen the dropped tokens, a deeper one never does: what it knows of them came
through what the tokens before it had already read. Beside every drop stand two references: nothing dropped, and the
same tokens taken out before the first layer. The second is what the rest of the video says about them anyway.

A ridge regression (``ridge``) predicts from the read-out the mean projected feature of the dropped tokens (its first
principal components), and the needle's label.

Shape letters: L tokens, V visual tokens, n samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from hybridprune_megatron.analysis.observe import Observation, drop_after, observe_embedded, observe_full
from hybridprune_megatron.analysis.ridge import accuracy, explained_variance, principal_components, probe, sketch
from hybridprune_megatron.analysis.samples import AnalysisSample
from hybridprune_megatron.analysis.statistics import evenly_spread
from hybridprune_megatron.layers.kinds import KINDS
from hybridprune_megatron.method.layout import TokenLayout
from hybridprune_megatron.method.plan import select
from hybridprune_megatron.models.video_language_model import VideoLanguageModel

#: Principal components of the dropped tokens' mean feature that are to be recovered.
COMPONENTS = 8
#: Numbers that a read-out is folded to (``ridge.sketch``); wider ones bring nothing for a few hundred samples.
WIDTH = 4096
#: What a layer of a type is read out by.
READOUTS = {"mamba": "final state", "attention": "hidden states of the question"}
# Every drop is a pass of the language model over every sample.
_MOST_DROPS = 5
# Groups of samples by how long before the end of the clip the last dropped frame was shown.
_TIME_BINS = 3
#: ``dropped_after`` of tokens that never entered the model.
IN_FRONT = -1


@dataclass
class ProbeData:
    """What was read out and what is to be recovered, a row a sample.

    Attributes:
        readouts: by the layer after which was dropped (``IN_FRONT``; None: nothing was) and the layer that is read.
        features: float32 [hidden], mean projected feature of the dropped tokens.
        labels: of the needle; empty in data without needles.
        frames_since: frames between the last dropped one and the end of the clip.
    """

    readouts: dict[tuple[int | None, int], list[Tensor]] = field(default_factory=dict)
    features: list[Tensor] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    frames_since: list[int] = field(default_factory=list)

    def add(self, after: int | None, seen: Observation) -> None:
        """Keeps the read-outs of the layers that a drop after ``after`` can have changed."""
        for layer, values in sorted({**seen.states, **seen.questions}.items()):
            if after is None or layer > after:
                self.readouts.setdefault((after, layer), []).append(sketch(values, WIDTH).cpu())


def collect(
    model: VideoLanguageModel,
    samples: Sequence[AnalysisSample],
    symbols: str,
    label: str,
    progress: Callable[[int], object],
) -> ProbeData:
    """Runs every sample once for every drop.

    Args:
        model: on one pipeline stage.
        samples: with one needle each, or all without.
        progress: gets 1 after each sample.
    """
    data = ProbeData()
    for sample in samples:
        full = observe_full(model, sample.prompt, None)
        assert full.embeddings is not None, "a pass that recorded nothing"
        embeddings, layout = full.embeddings, full.layout
        frames = dropped_frames(sample)
        dropped = torch.zeros(layout.num_tokens, dtype=torch.bool, device=embeddings.device)
        chosen = torch.isin(sample.frame_numbers(), torch.tensor(frames)).to(embeddings.device)
        dropped[layout.visual_index[chosen]] = True
        data.features.append(embeddings[dropped].squeeze(1).float().mean(0).cpu())
        data.frames_since.append(int(sample.frame_numbers().max()) - frames[-1])
        if sample.needles:
            data.labels.append(sample.needles[0][label])
        data.add(None, full)
        data.add(IN_FRONT, _without(model, embeddings, layout, dropped))
        for layer in drop_layers(symbols):
            reduction = drop_after(layer, dropped, layout, len(symbols))
            seen = observe_embedded(model, embeddings, layout, reduction)
            left = seen.entered[-1].visual_counts[0]
            assert left == int((~chosen).sum()), f"{left} tokens left after a drop after layer {layer}"
            data.add(layer, seen)
        progress(1)
    return data


def drop_layers(symbols: str) -> list[int]:
    """Layers after which the probe drops: at most five that can score and have a layer to read after them."""
    scoring = [layer for layer, symbol in enumerate(symbols) if KINDS[symbol].scores]
    return evenly_spread(scoring[:-1], _MOST_DROPS)


def dropped_frames(sample: AnalysisSample) -> tuple[int, ...]:
    """Frames whose tokens the probe drops: those of the needle, or the second quarter of the clip.

    Raises:
        ValueError: a clip without needle is too short for a quarter.
    """
    if sample.needles:
        return sample.needles[0]["frames"]
    frames = int(sample.frame_numbers().max()) + 1
    if frames < 4:
        raise ValueError(f"sample {sample.prompt.key} shows {frames} frames: the probe drops a quarter of them")
    return tuple(range(frames // 4, frames // 2))


def _without(model: VideoLanguageModel, embeddings: Tensor, layout: TokenLayout, dropped: Tensor) -> Observation:
    """A pass in which some visual tokens never enter the first layer."""
    kept = (~dropped[layout.visual_index]).float()
    plan = select(kept, layout, (int(kept.sum()),))
    return observe_embedded(model, plan.take(embeddings), plan.layout, None)


def evaluate_probes(data: ProbeData, symbols: str) -> dict[str, Any]:
    """Fits and scores a probe for every read-out, as plain values.

    Args:
        data: from ``collect``.
    """
    contents: dict[str, tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]] = {
        "feature": (principal_components(torch.stack(data.features), COMPONENTS), explained_variance)
    }
    if data.labels:
        classes = sorted(set(data.labels))
        numbers = torch.tensor([classes.index(label) for label in data.labels])
        contents["label"] = (torch.nn.functional.one_hot(numbers, len(classes)).double(), accuracy)
    bins = time_bins(data.frames_since)
    readouts = {place: torch.stack(values) for place, values in data.readouts.items()}
    found = {}
    for name, (targets, score) in contents.items():
        rows = [_row(place, symbols, values, targets, score, bins) for place, values in readouts.items()]
        found[name] = {"rows": rows, "by_drop": by_drop(rows)}
    groups = [[data.frames_since[i] for i in index.tolist()] for index in bins]
    return {
        "samples": len(data.features),
        "classes": sorted(set(data.labels)),
        "time_bins": [{"frames": [min(group), max(group)], "samples": len(group)} for group in groups],
        "contents": found,
    }


def _row(
    place: tuple[int | None, int],
    symbols: str,
    values: Tensor,
    targets: Tensor,
    score: Callable[[Tensor, Tensor], Tensor],
    bins: Sequence[Tensor],
) -> dict[str, Any]:
    after, layer = place
    found = probe(values, targets, score)
    by_time = [score(found.predictions[None, index], targets[None, index]).item() for index in bins]
    return {
        "dropped_after": after,
        "layer": layer,
        "type": KINDS[symbols[layer]].name,
        "score": found.score,
        "shuffled": found.shuffled,
        "shuffled_high": found.shuffled_high,
        "by_time": by_time,
    }


def time_bins(frames_since: Sequence[int]) -> list[Tensor]:
    """Samples in up to three equal groups, from the last shown to the first shown; one group if all are alike.

    Equal times are never divided between groups, so groups may differ in size.
    """
    values = torch.tensor(frames_since)
    edges = values.double().quantile(torch.linspace(0, 1, _TIME_BINS + 1, dtype=torch.float64))[1:-1]
    groups = torch.bucketize(values.double(), edges.unique())
    return [torch.nonzero(groups == group).flatten() for group in groups.unique()]


def by_drop(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """Means over the layers after each drop, by type of the layer that is read.

    Args:
        rows: of one content, from ``evaluate_probes``.

    Returns:
        By type, a list with rising "dropped_after", the mean "score", and the mean scores of the same layers with
        nothing dropped ("held") and with the tokens taken out before the first layer ("absent").
    """
    known = {(row["dropped_after"], row["layer"]): row["score"] for row in rows}
    drops = sorted({after for after, _ in known if after is not None and after != IN_FRONT})
    result: dict[str, list[dict[str, float]]] = {}
    for kind in sorted({row["type"] for row in rows}):
        result[kind] = []
        for after in drops:
            layers = [row["layer"] for row in rows if row["type"] == kind and row["dropped_after"] == after]
            if layers:
                means = {name: fmean([known[drop, layer] for layer in layers])
                         for name, drop in (("score", after), ("held", None), ("absent", IN_FRONT))}  # fmt: skip
                result[kind].append({"dropped_after": after, **means, "layers": len(layers)})
    return result
