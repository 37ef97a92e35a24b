"""Query-agnostic reduction in front of the language model: who enters layer 0.

A front sees the projected frames (and their pixels), no question and no layer. What it hands on counts against the same
budget as what is dropped inside.

Shape letters: V visual tokens, D width of the language model, F frames, P tokens a frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import isqrt
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hybridprune_megatron.method.layout import TokenLayout
from hybridprune_megatron.method.merge import Ranking, group_means, most_similar
from hybridprune_megatron.method.score_agnostic import RandomScorer, UniformScorer

# Tokens and frames compared at once, so that no second copy of all of them is made.
_BLOCK, _FRAME_BLOCK = 4096, 16


class Front(Protocol):
    """Ranks the visual tokens of a packed sequence before any reduction; deterministic and free of state."""

    def rank(self, features: Tensor, pixels: Tensor | None, layout: TokenLayout, counts: Sequence[int]) -> Ranking:
        """Who is handed on; with partners, the others are averaged into them.

        Args:
            features: [V, D] embeddings of the visual tokens.
            pixels: [F, 3, height, width] from 0 to 255, frames in the order in which the layout shows them; None:
                the frames came as features of the vision tower.
            layout: the packed sequence.
            counts: S numbers of visual tokens to hand on (host).
        """
        ...

    def fewest(self, layout: TokenLayout) -> list[int]:
        """S smallest numbers of visual tokens to hand on (host)."""
        ...


@dataclass(frozen=True)
class RandomFront:
    """A random choice.

    Attributes:
        seed: changes the draw.
    """

    seed: int = 0

    def rank(self, features: Tensor, pixels: Tensor | None, layout: TokenLayout, counts: Sequence[int]) -> Ranking:
        """As ``RandomScorer`` draws in a layer in front of the first."""
        return Ranking(RandomScorer(self.seed).draw(layout, -1))

    def fewest(self, layout: TokenLayout) -> list[int]:
        """None."""
        return [0] * len(layout.visual_counts)


@dataclass(frozen=True)
class UniformFront:
    """A uniform stride over the visual tokens of a sample."""

    def rank(self, features: Tensor, pixels: Tensor | None, layout: TokenLayout, counts: Sequence[int]) -> Ranking:
        """As ``UniformScorer`` spreads."""
        return Ranking(UniformScorer().spread(layout))

    def fewest(self, layout: TokenLayout) -> list[int]:
        """None."""
        return [0] * len(layout.visual_counts)


@dataclass(frozen=True)
class EvsFront:
    """Efficient Video Sampling (Bagrov et al. 2025): patches that changed since the frame before.

    ``delta_tp = 1 - cos(E_tp, E_(t-1)p)`` on the projected frames; the first frame of every video comes before all
    others, and of equal ones the earlier.
    """

    def rank(self, features: Tensor, pixels: Tensor | None, layout: TokenLayout, counts: Sequence[int]) -> Ranking:
        """By the cosine to the same patch one frame before."""
        before = patch_before(layout)
        change = [
            1 - nn.functional.cosine_similarity(features[block].float(), features[before[block]].float(), dim=-1)
            for block in torch.arange(len(features), device=features.device).split(_BLOCK)
        ]
        return Ranking(torch.cat(change).masked_fill(before < 0, float("inf")))

    def fewest(self, layout: TokenLayout) -> list[int]:
        """The first frame of every video."""
        return _first_frames(layout)


@dataclass(frozen=True)
class PixelEvsFront:
    """As ``EvsFront``, by ``|x_tp - x_(t-1)p|_1`` over a patch's pixels: the paper's own form."""

    def rank(self, features: Tensor, pixels: Tensor | None, layout: TokenLayout, counts: Sequence[int]) -> Ranking:
        """By the mean absolute difference to the same patch one frame before.

        Raises:
            ValueError: there are no pixels.
        """
        if pixels is None:
            raise ValueError(
                "reduction.front=evs_pixels compares frames, and the data hold features of the vision tower: set "
                "reduction.front=evs, or data.train and data.validation to the videos"
            )
        tokens = layout.patches_per_frame
        before = patch_before(layout)
        # Tokens come frame by frame in the order of the pixels, all frames being of one size.
        frame_before = before.view(-1, tokens)[:, 0] // tokens
        change = [
            _patch_difference(pixels[block], pixels[frame_before[block]], isqrt(tokens))
            for block in torch.arange(len(pixels), device=pixels.device).split(_FRAME_BLOCK)
        ]
        return Ranking(torch.cat(change).flatten().masked_fill(before < 0, float("inf")))

    def fewest(self, layout: TokenLayout) -> list[int]:
        """The first frame of every video."""
        return _first_frames(layout)


@dataclass(frozen=True)
class TomeFront:
    """ToMe's bipartite soft matching (Bolya et al., ICLR 2023) over all visual tokens of a sample, across frames.

    Every other token is matched to its most similar one among the rest by cosine of the embeddings (the paper: of
    attention keys), and the best pairs are merged, averages weighted by size. A round merges half of the tokens at
    most, so there are rounds until the count is met.
    """

    def rank(self, features: Tensor, pixels: Tensor | None, layout: TokenLayout, counts: Sequence[int]) -> Ranking:
        """By who is left after the last round."""
        scores = torch.zeros(len(features), device=features.device)
        partner = torch.arange(len(features), device=features.device)
        for start, present, count in zip(layout.visual_starts(), layout.visual_counts, counts):
            alive, root = _soft_matching(features[start : start + present], count)
            scores[start + alive] = 1.0
            partner[start : start + present] = start + root
        return Ranking(scores, partner)

    def fewest(self, layout: TokenLayout) -> list[int]:
        """One, for the others to be averaged into."""
        return [min(count, 1) for count in layout.visual_counts]


FRONTS: dict[str, type[Front]] = {
    "random": RandomFront,
    "uniform": UniformFront,
    "evs": EvsFront,
    "evs_pixels": PixelEvsFront,
    "tome": TomeFront,
}


def build_front(settings: Mapping[str, Any]) -> Front | None:
    """The front that settings name, its fields taken from the settings of the same name; None for "none".

    Args:
        settings: the keys of the reduction group; a key that is missing has its default.

    Raises:
        ValueError: an unknown name.
    """
    name = settings.get("front", "none")
    if name == "none":
        return None
    if name not in FRONTS:
        raise ValueError(f"reduction.front={name!r}: allowed are none, {', '.join(sorted(FRONTS))}")
    front: Any = FRONTS[name]
    return front(**{field.name: settings[field.name] for field in fields(front) if field.name in settings})


def patch_before(layout: TokenLayout) -> Tensor:
    """int64 [V]: the same patch in the frame before of the same video, as an index into ``visual_index``; -1: none."""
    device = layout.visual_index.device
    shape = (len(layout.frame_videos), layout.patches_per_frame)
    grid = torch.full(shape, -1, device=device)
    grid[layout.visual_frame, layout.visual_patch] = torch.arange(len(layout.visual_index), device=device)
    video = torch.tensor(layout.frame_videos).to(device, non_blocking=True)
    grid[1:] = torch.where((video[1:] == video[:-1]).unsqueeze(1), grid[:-1], -1)
    grid[:1] = -1
    return grid[layout.visual_frame, layout.visual_patch]


def _first_frames(layout: TokenLayout) -> list[int]:
    """S numbers of tokens in the first frames of a sample's videos."""
    tokens, counts, first = layout.patches_per_frame, [], 0
    for count in layout.original_visual_counts:
        last = first + count // max(tokens, 1)
        counts.append(min(count, tokens * len(set(layout.frame_videos[first:last]))))
        first = last
    return counts


def _patch_difference(frames: Tensor, others: Tensor, side: int) -> Tensor:
    """[F, side * side] mean absolute difference over the patches of side x side, row by row."""
    difference = (frames.float() - others.float()).abs().mean(1)
    return difference.unflatten(2, (side, -1)).unflatten(1, (side, -1)).mean((2, 4)).flatten(1)


def _soft_matching(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Merges the tokens of one sample down to a count.

    Args:
        features: [V, D].
        count: tokens to be left, at least 1 if there are any.

    Returns:
        int64 [count] the tokens that are left, rising; int64 [V] the one that each token has been merged into.
    """
    present = len(features)
    alive = root = torch.arange(present, device=features.device)
    merged = features.float()
    while len(alive) > count:
        sources, targets = alive[0::2], alive[1::2]
        num_merged = min(len(alive) - count, len(targets))
        match, cosine = most_similar(merged[0::2], merged[1::2])
        best = torch.sort(cosine, descending=True, stable=True).indices[:num_merged]
        step = torch.arange(present, device=features.device)
        step[sources[best]] = targets[match[best]]
        root = step[root]
        is_left = (step == torch.arange(present, device=features.device))[alive]
        alive = alive[torch.nonzero_static(is_left, size=len(alive) - num_merged).flatten()]
        # The mean of a whole group is what weighting the means of its parts by their sizes gives.
        merged = group_means(features.float(), torch.searchsorted(alive, root), len(alive))
    return alive, root
