"""Makes a deeper model of trained weights that computes the same: new layers start as copies that add nothing yet.

    python studies/base/grow_depth.py --weights assets/demo/base.safetensors --pattern 'M-M*-M-M*-' \\
        --deeper 'M*-M*-M-M*-M-M*-' --positions 0 2 3 4 5 8 10 13 14 15 --out runs/study_base/grown.safetensors

Every new layer copies the nearest old layer of its kind, with its output projection set to zero: a residual block that
adds zero is the identity, and learns from there (depth up-scaling with zero-initialized outputs).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from hybridprune_megatron.config.one_line import one_line_errors

COMMAND = "studies/base/grow_depth.py"
#: The projection that writes a layer's result back to the residual stream.
OUTPUT_PROJECTIONS = {
    "M": "mixer.out_proj.weight",
    "*": "self_attention.linear_proj.weight",
    "-": "mlp.linear_fc2.weight",
}
_LAYER = re.compile(r"(.*\.decoder\.layers\.)(\d+)\.(.*)")


@one_line_errors("grow_depth")
def main(argv: list[str]) -> None:
    """Reads, grows and writes; a wrong argument ends it with one line and code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, type=Path, help="a .safetensors file, see scripts/save_weights.py")
    parser.add_argument("--pattern", required=True, help="its hybrid layer pattern")
    parser.add_argument("--deeper", required=True, help="the pattern to make")
    parser.add_argument(
        "--positions", required=True, type=int, nargs="+", help="0-based places of the old layers in it"
    )
    parser.add_argument(
        "--out", required=True, type=Path, help="file to write; an earlier one of this command is replaced"
    )
    options = parser.parse_args(argv)
    from hybridprune_megatron.config.outputs import whole_file
    from hybridprune_megatron.huggingface.files import check_weights_file, save_tensors
    from hybridprune_megatron.huggingface.source import TensorFiles

    sources = layer_sources(options.pattern, options.deeper, options.positions)
    check_weights_file(options.out, COMMAND, [options.weights])
    files = TensorFiles(options.weights)
    weights = {name: files.read(name) for name in files.names}
    grown = grow(weights, options.deeper, sources, set(options.positions))
    with whole_file(options.out) as scratch:
        save_tensors(grown, scratch, {"made_by": COMMAND})
    print(f"{options.out}: {len(options.pattern)} -> {len(options.deeper)} layers")


def layer_sources(pattern: str, deeper: str, positions: Sequence[int]) -> list[int]:
    """For every layer of the deeper pattern the old layer whose weights it takes.

    Raises:
        ValueError: the positions do not embed the old pattern in the new one, or a new layer has no model.
    """
    rising = all(one < other for one, other in pairwise((-1, *positions, len(deeper))))
    fits = rising and len(positions) == len(pattern)
    if not fits or any(deeper[place] != symbol for place, symbol in zip(positions, pattern)):
        raise ValueError(
            f"--positions {' '.join(map(str, positions))}: give {len(pattern)} rising places at which "
            f"--deeper {deeper} reads {pattern}"
        )
    sources = []
    for place, symbol in enumerate(deeper):
        candidates = [old for old, kind in enumerate(pattern) if kind == symbol]
        if symbol not in OUTPUT_PROJECTIONS or not candidates:
            raise ValueError(
                f"--deeper {deeper}: layer {place} is a {symbol!r}, and --pattern {pattern} has none to copy"
            )
        sources.append(min(candidates, key=lambda old: abs(positions[old] - place)))
    return sources


def grow(weights: Mapping[str, Any], deeper: str, sources: Sequence[int], kept: set[int]) -> dict[str, Any]:
    """The weights of the deeper model; tensors are not shared between layers."""
    grown = {}
    for name, tensor in weights.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            grown[name] = tensor
            continue
        prefix, old, rest = match[1], int(match[2]), match[3]
        for place, source in enumerate(sources):
            if source == old:
                adds_nothing = place not in kept and rest == OUTPUT_PROJECTIONS[deeper[place]]
                grown[f"{prefix}{place}.{rest}"] = tensor.new_zeros(tensor.shape) if adds_nothing else tensor.clone()
    return grown


if __name__ == "__main__":
    main(sys.argv[1:])
