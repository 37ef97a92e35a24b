"""The video strip: which patches of which frames are still there at which depth."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.patches import Rectangle
from torch import Tensor

from hybridprune_megatron.analysis.statistics import evenly_spread
from hybridprune_megatron.evaluation.figure import NEEDED_COLOUR, layer_name, new_figure

_COLUMNS = 12
#: Columns for frames that need not keep anything.
_OTHERS = 2
_ROWS = 6
_SIDE = 64
_GAP = 4


@dataclass(frozen=True)
class KeptPatches:
    """What a model kept of a clip, depth by depth.

    Attributes:
        pixels: uint8 [F, 3, S, S], the frames as the model was shown them; no rows where only features are stored.
        frames: int64 [V], the frame of each visual token, from 0.
        kept: bool [K, V], which visual tokens entered each layer.
        symbols: of the layers.
        title: what was asked, and perhaps the answer.
        evidence: frames that the answer needs, where these are known.
    """

    pixels: Tensor
    frames: Tensor
    kept: Tensor
    symbols: str
    title: str
    evidence: tuple[int, ...] = ()

    @property
    def num_frames(self) -> int:
        """Frames that the model was shown."""
        return int(self.frames.max()) + 1

    def of(self, layer: int, frame: int) -> np.ndarray:
        """Bool [M]: which tokens of a frame entered a layer, row by row."""
        return self.kept[layer, self.frames == frame].numpy()

    def name(self, layer: int, between: str = "\n") -> str:
        """A layer and the share of all visual tokens that entered it."""
        return f"{layer_name(layer, self.symbols)}{between}{100 * self.kept[layer].double().mean():.3g} %"


def plot_strip(path: Path, clip: KeptPatches, layers: Sequence[int] | None = None) -> None:
    """Writes one PNG: rows are depths, columns frames; a patch whose token was dropped is grey.

    Args:
        clip: grey squares stand for its pictures where there are none.
        layers: to show, rising; None: those of ``chosen_layers``.
    """
    layers = chosen_layers(clip.kept) if layers is None else layers
    left = torch.bincount(clip.frames[clip.kept[layers[-1]]], minlength=clip.num_frames)
    frames = chosen_frames(left.tolist(), clip.evidence)
    pictures = [_picture(clip.pixels, frame) for frame in frames]
    step = _SIDE + _GAP
    canvas = np.full((len(layers) * step - _GAP, len(frames) * step - _GAP, 3), 255, dtype=np.uint8)
    for row, layer in enumerate(layers):
        for column, frame in enumerate(frames):
            shown = grey_out(pictures[column], clip.of(layer, frame))
            canvas[row * step : row * step + _SIDE, column * step : column * step + _SIDE] = shown
    figure = new_figure(1.3 + len(frames) * 0.85, 1.1 + len(layers) * 0.85)
    axes = figure.subplots()
    axes.imshow(canvas)
    axes.set_xticks([column * step + _SIDE / 2 for column in range(len(frames))], [str(frame) for frame in frames])
    axes.set_yticks([row * step + _SIDE / 2 for row in range(len(layers))], [clip.name(layer) for layer in layers])
    needed = [column for column, frame in enumerate(frames) if frame in clip.evidence]
    for column in needed:
        outline = Rectangle((column * step - 2, -2), _SIDE + 3, canvas.shape[0] + 3)
        outline.set(fill=False, edgecolor=NEEDED_COLOUR, linewidth=2, clip_on=False)
        axes.add_patch(outline)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xlabel(shown_words(frames, left.tolist()) + (" (framed: the answer needs it)" if needed else ""))
    axes.set_ylabel("enters layer, share of all visual tokens")
    axes.set_title(wrapped(clip.title, 100))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def wrapped(text: str, width: int) -> str:
    """A text in lines of at most that many characters, without what matplotlib would read as a formula."""
    return "\n".join(textwrap.wrap(text, width)).replace("$", r"\$")


def chosen_frames(left: Sequence[int], needed: Sequence[int]) -> list[int]:
    """At most twelve frames: half of those that the answer needs, then those that keep most, two evenly spread others.

    Args:
        left: by frame, tokens that are left at the last depth shown.
        needed: frames that the answer needs, where these are known.
    """
    shown = evenly_spread(list(needed), _COLUMNS // 2)
    others = [frame for frame in range(len(left)) if frame not in needed]
    keeping = sorted((frame for frame in others if left[frame]), key=lambda frame: left[frame], reverse=True)
    keeping = keeping[: max(_COLUMNS - len(shown) - _OTHERS, 0)]
    rest = [frame for frame in others if frame not in keeping]
    return sorted([*shown, *keeping, *evenly_spread(rest, _COLUMNS - len(shown) - len(keeping))])


def shown_words(frames: Sequence[int], left: Sequence[int]) -> str:
    """What the axis says of frames that are not shown."""
    if len(frames) == len(left):
        return "frame"
    share = sum(left[frame] for frame in frames) / max(sum(left), 1)
    return f"frame; {len(frames)} of {len(left)}, with {share:.0%} of what is left at the end"


def chosen_layers(kept: Tensor, most: int = _ROWS) -> list[int]:
    """At most ``most`` layers, the first and the last among them, each with fewer tokens than the one before."""
    counts = kept.sum(1).tolist()
    changes = [layer for layer, count in enumerate(counts) if layer == 0 or count != counts[layer - 1]]
    return evenly_spread(changes, most)


def grey_out(picture: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """A picture whose dropped patches have no colour and little contrast.

    Args:
        picture: uint8 [H, W, 3], of any aspect ratio: models see frames as squares.
        kept: bool [M], row by row; M is a square number.
    """
    side = math.isqrt(len(kept))
    assert side * side == len(kept), f"{len(kept)} tokens a frame are not a square"
    rows, columns = (np.arange(size) * side // size for size in picture.shape[:2])
    mask = kept.reshape(side, side)[np.ix_(rows, columns)][..., None]
    grey = picture.mean(-1, keepdims=True) * 0.3 + 0.7 * 225
    return np.where(mask, picture, grey.astype(np.uint8))


def _picture(pixels: Tensor, frame: int) -> np.ndarray:
    """uint8 [S, S, 3], nearest pixels."""
    if not len(pixels):
        return np.full((_SIDE, _SIDE, 3), 120, dtype=np.uint8)
    picture = pixels[frame].permute(1, 2, 0)
    rows, columns = (torch.arange(_SIDE) * size // _SIDE for size in picture.shape[:2])
    return picture[rows][:, columns].numpy()
