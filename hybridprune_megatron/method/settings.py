"""How tokens are chosen once they are scored; the keys of ``reduction.select``. Imports nothing slow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from hybridprune_megatron.bounds import Count, OneOf, Share, Size, Whole, check_bounds

KEY = "reduction.select"


@dataclass
class Select:
    """Which tokens stay, given scores and how many.

    Attributes:
        min_tokens: fewest visual tokens that stay per sample.
        min_tokens_per_frame: tokens that every frame keeps while the count allows; 0 = frames compete freely.
        smoothing_frames: frames on either side whose same patch a score is averaged with; 0 = off.
        frame_share: share (0 to 1) of the highest score in its frame that every score gains; 0 = off.
        dropped: what becomes of a dropped token; discard, or merge (averaged into its most similar kept one).
        multiple_of: what the packed length divides by after every drop, besides what parallelism and fp8 ask for.
        local_choice: each context-parallel rank drops among the tokens it holds: no row moves, another choice.
    """

    min_tokens: Count = 1
    min_tokens_per_frame: Whole = 0
    smoothing_frames: Whole = 0
    frame_share: Share = 0.0
    dropped: Annotated[str, OneOf("discard", "merge")] = "discard"
    multiple_of: Size = 1
    local_choice: bool = False

    def __post_init__(self) -> None:
        check_bounds(KEY, self)
