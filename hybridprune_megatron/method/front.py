"""Query-agnostic reduction before the language model: who enters layer 0.

A front sees the projected frames (and their pixels), no question and no layer. What it passes on counts against the
same budget as what is dropped inside. The formulas are in ``front_ranking``; torch is imported only there, as in
``scorer``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from hybridprune_megatron.bounds import PositiveShare, Seed
from hybridprune_megatron.layers.operations import WIDTH, Cost, elementwise, most_similar_cost
from hybridprune_megatron.method.score_agnostic import RandomScorer, UniformScorer
from hybridprune_megatron.plugins import Plugin, Registry

if TYPE_CHECKING:
    from torch import Tensor

    from hybridprune_megatron.method.layout import TokenLayout
    from hybridprune_megatron.method.merge import Ranking

KEY = "reduction.front"


@dataclass(frozen=True)
class Front(Plugin):
    """Ranks the visual tokens of a packed sequence before any reduction; deterministic and free of state.

    Attributes:
        retention: share of visual tokens that is passed on; the budget stays the total over all layers.
    """

    needs_pixels: ClassVar[bool] = False
    keeps_first_frames: ClassVar[bool] = False
    retention: PositiveShare = 1.0

    def rank(self, features: Tensor, pixels: Tensor | None, layout: TokenLayout, counts: Sequence[int]) -> Ranking:
        """Who is passed on; with partners, the others are averaged into them.

        Args:
            features: [V, D] embeddings of the visual tokens.
            pixels: [F, 3, height, width] from 0 to 255, frames in the order in which the layout shows them; None:
                the frames came as features of the vision tower.
            layout: the packed sequence.
            counts: S numbers of visual tokens to pass on (host).
        """
        raise NotImplementedError

    def fewest(self, layout: TokenLayout) -> list[int]:
        """S smallest numbers of visual tokens to pass on (host)."""
        return first_frames(layout) if self.keeps_first_frames else [0] * len(layout.visual_counts)

    def costs(self, visual: int, left: int, hidden: int, width: int, pixels: int) -> Mapping[str, Cost]:
        """Operations and bytes of the ranking.

        Args:
            visual: visual tokens of the sample.
            left: those that are passed on.
            hidden: width of the language model.
            width: bytes of an activation.
            pixels: numbers of one token's pixels.
        """
        return {}


@dataclass(frozen=True)
class RandomFront(Front):
    """A random choice, as ``RandomScorer`` draws in a layer before the first.

    Attributes:
        seed: changes the draw.
    """

    name: ClassVar[str] = "random"
    seed: Seed = 0

    def rank(self, features: Tensor, pixels: Tensor | None, layout: TokenLayout, counts: Sequence[int]) -> Ranking:
        from hybridprune_megatron.method.merge import Ranking

        return Ranking(RandomScorer(self.seed).draw(layout, -1))


@dataclass(frozen=True)
class UniformFront(Front):
    """A uniform stride over the visual tokens of a sample, as ``UniformScorer`` spreads."""

    name: ClassVar[str] = "uniform"

    def rank(self, features: Tensor, pixels: Tensor | None, layout: TokenLayout, counts: Sequence[int]) -> Ranking:
        from hybridprune_megatron.method.merge import Ranking

        return Ranking(UniformScorer().draw(layout, -1))


@dataclass(frozen=True)
class EvsFront(Front):
    """Efficient Video Sampling (Bagrov et al. 2025): patches that changed since the frame before.

    ``delta_tp = 1 - cos(E_tp, E_(t-1)p)`` on the projected frames; the first frame of every video comes before all
    others, and of equal ones the earlier.
    """

    name: ClassVar[str] = "evs"
    keeps_first_frames: ClassVar[bool] = True

    def rank(self, features: Tensor, pixels: Tensor | None, layout: TokenLayout, counts: Sequence[int]) -> Ranking:
        from hybridprune_megatron.method.front_ranking import feature_change
        from hybridprune_megatron.method.merge import Ranking

        return Ranking(feature_change(features, layout))

    def costs(self, visual: int, left: int, hidden: int, width: int, pixels: int) -> Mapping[str, Cost]:
        # x . y, x . x and y . y with the patch one frame before; elementwise in plain torch.
        return {"change": Cost(6 * visual * hidden, 0, 2 * visual * hidden * width)}


@dataclass(frozen=True)
class PixelEvsFront(Front):
    """As ``EvsFront``, by ``|x_tp - x_(t-1)p|_1`` over a patch's pixels: the paper's own form."""

    name: ClassVar[str] = "evs_pixels"
    needs_pixels: ClassVar[bool] = True
    keeps_first_frames: ClassVar[bool] = True

    def rank(self, features: Tensor, pixels: Tensor | None, layout: TokenLayout, counts: Sequence[int]) -> Ranking:
        """As ``Front``.

        Raises:
            ValueError: there are no pixels.
        """
        from hybridprune_megatron.method.front_ranking import pixel_change
        from hybridprune_megatron.method.merge import Ranking

        if pixels is None:
            raise ValueError(
                f"{KEY}={self.name} compares frames, and the data hold features of the vision tower: set {KEY}=evs, or "
                "data.train and data.validation to the videos"
            )
        return Ranking(pixel_change(pixels, layout))

    def costs(self, visual: int, left: int, hidden: int, width: int, pixels: int) -> Mapping[str, Cost]:
        return {"change": elementwise(2 * visual * pixels, 1)} if pixels else {}


@dataclass(frozen=True)
class TomeFront(Front):
    """ToMe's bipartite soft matching (Bolya et al., ICLR 2023) over all visual tokens of a sample, across frames.

    Every other token is matched to its most similar one among the rest by cosine of the embeddings (the paper: of
    attention keys), and the best pairs are merged, averages weighted by size. A round merges half of the tokens at
    most, so there are rounds until the count is met.
    """

    name: ClassVar[str] = "tome"

    def rank(self, features: Tensor, pixels: Tensor | None, layout: TokenLayout, counts: Sequence[int]) -> Ranking:
        from hybridprune_megatron.method.front_ranking import soft_matching

        return soft_matching(features, layout, counts)

    def fewest(self, layout: TokenLayout) -> list[int]:
        """One, for the others to be averaged into."""
        return [min(count, 1) for count in layout.visual_counts]

    def costs(self, visual: int, left: int, hidden: int, width: int, pixels: int) -> Mapping[str, Cost]:
        alive, match = visual, Cost()
        while alive > left:
            # A round matches every other token to the rest and may merge all of those.
            sources, targets = (alive + 1) // 2, alive // 2
            match += most_similar_cost(sources, targets, hidden, WIDTH["fp32"])
            alive -= targets
        return {"match": match}


@dataclass(frozen=True)
class NoFront(Front):
    """All visual tokens enter the language model."""

    name: ClassVar[str] = "none"


FRONTS = Registry(KEY, Front, (NoFront, RandomFront, UniformFront, EvsFront, PixelEvsFront, TomeFront))


def first_frames(layout: TokenLayout) -> list[int]:
    """S numbers of tokens in the first frames of a sample's videos."""
    tokens, counts, first = layout.patches_per_frame, [], 0
    for count in layout.original_visual_counts:
        last = first + count // max(tokens, 1)
        counts.append(min(count, tokens * len(set(layout.frame_videos[first:last]))))
        first = last
    return counts
