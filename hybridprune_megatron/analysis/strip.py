"""The video strip: which patches of which frames are still there at which depth."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.patches import Rectangle
from torch import Tensor

from hybridprune_megatron.analysis.figures import layer_name
from hybridprune_megatron.analysis.samples import AnalysisSample
from hybridprune_megatron.analysis.statistics import evenly_spread
from hybridprune_megatron.evaluation.figure import new_figure

_COLUMNS = 12
#: Columns for frames that need not keep anything.
_OTHERS = 2
_ROWS = 6
_SIDE = 64
_GAP = 4
_NEEDED_COLOUR = "#D55E00"


def plot_strip(path: Path, sample: AnalysisSample, kept: Tensor, symbols: str) -> None:
    """Writes one PNG: rows are depths, columns frames; a patch whose token was dropped is grey.

    Args:
        sample: with frames; one whose data set stores features has grey squares instead of pictures.
        kept: bool [K, V], see ``measures.kept_tokens``.
    """
    layers = chosen_layers(kept)
    numbers = sample.frame_numbers()
    left = torch.bincount(numbers[kept[layers[-1]].cpu()], minlength=int(numbers.max()) + 1)
    frames = chosen_frames(left.tolist(), sample.evidence or ())
    pictures = [_picture(sample, frame) for frame in frames]
    step = _SIDE + _GAP
    canvas = np.full((len(layers) * step - _GAP, len(frames) * step - _GAP, 3), 255, dtype=np.uint8)
    for row, layer in enumerate(layers):
        for column, frame in enumerate(frames):
            shown = grey_out(pictures[column], kept[layer, numbers == frame].numpy())
            canvas[row * step : row * step + _SIDE, column * step : column * step + _SIDE] = shown
    figure = new_figure(1.3 + len(frames) * 0.85, 1.1 + len(layers) * 0.85)
    axes = figure.subplots()
    axes.imshow(canvas)
    axes.set_xticks([column * step + _SIDE / 2 for column in range(len(frames))], [str(frame) for frame in frames])
    shares = kept.double().mean(1)
    names = [f"{layer_name(layer, symbols)}\n{100 * shares[layer]:.3g} %" for layer in layers]
    axes.set_yticks([row * step + _SIDE / 2 for row in range(len(layers))], names)
    needed = [column for column, frame in enumerate(frames) if frame in (sample.evidence or ())]
    for column in needed:
        outline = Rectangle((column * step - 2, -2), _SIDE + 3, canvas.shape[0] + 3)
        outline.set(fill=False, edgecolor=_NEEDED_COLOUR, linewidth=2, clip_on=False)
        axes.add_patch(outline)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xlabel(shown_words(frames, left.tolist()) + (" (framed: the answer needs it)" if needed else ""))
    axes.set_ylabel("enters layer, share of all visual tokens")
    title = sample.question + (f" ({sample.answer})" if sample.answer else "")
    axes.set_title("\n".join(textwrap.wrap(title, 100)))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


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


def chosen_layers(kept: Tensor) -> list[int]:
    """At most six layers, the first and the last among them, each with fewer tokens than the one before."""
    counts = kept.sum(1).tolist()
    changes = [layer for layer, count in enumerate(counts) if layer == 0 or count != counts[layer - 1]]
    return evenly_spread(changes, _ROWS)


def grey_out(picture: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """A picture whose dropped patches have no colour and little contrast.

    Args:
        picture: uint8 [S, S, 3].
        kept: bool [M], row by row; M is a square number.
    """
    side = math.isqrt(len(kept))
    assert side * side == len(kept), f"{len(kept)} tokens a frame are not a square"
    cell = np.minimum(np.arange(len(picture)) * side // len(picture), side - 1)
    mask = kept.reshape(side, side)[np.ix_(cell, cell)][..., None]
    grey = picture.mean(-1, keepdims=True) * 0.3 + 0.7 * 225
    return np.where(mask, picture, grey.astype(np.uint8))


def _picture(sample: AnalysisSample, frame: int) -> np.ndarray:
    """uint8 [S, S, 3], nearest pixels."""
    pixels = sample.prompt.pixel_values
    if not len(pixels):
        return np.full((_SIDE, _SIDE, 3), 120, dtype=np.uint8)
    picture = pixels[frame].permute(1, 2, 0)
    rows, columns = (torch.arange(_SIDE) * size // _SIDE for size in picture.shape[:2])
    return picture[rows][:, columns].numpy()
