"""Times every native operator against the plain torch of this project and against the torch a user would write.

python kernels/bench.py [--device cuda] [--quick]     # table, and runs/bench/kernels.json

The sizes are one layer's of the 12B model. What an operator computes is compared with plain torch first; where it
differs, nothing is printed but that. "Bytes" is what must be read and written at least, and the share is of what a copy
of 256 MB reaches on the same device in the same run. Times are medians, the three versions in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from bench_cases import CASES, Case, Sizes

from hybridprune_megatron.evaluation.machine import describe_machine
from hybridprune_megatron.ops.native import native

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "conf" / "model" / "nemotron_nano_12b_v2_vl.yaml"
OUT = ROOT / "runs" / "bench" / "kernels.json"
SWITCH = "HYBRIDPRUNE_KERNELS"
COPIED_BYTES = 256 * 2**20
# On a CPU plain torch takes minutes beyond.
LENGTHS = {"cpu": (2048, 8192), "cuda": (2048, 8192, 32768, 131072)}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Row:
    """One operator at one length; seconds are medians, None where a version does not fit the memory.

    Attributes:
        share: of the copy bandwidth, by ``num_bytes`` and the native time.
        error: largest difference from plain torch, relative to its largest value.
    """

    operator: str
    length: int
    native: float
    plain: float
    unfused: float | None
    num_bytes: int
    share: float
    error: float


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Of one call, what it started on the device included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def medians(runs: dict[str, Callable[[], Any]], device: torch.device, repeats: int) -> dict[str, float]:
    """Every version ``repeats`` times in turn, after one round that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            taken[name].append(seconds(run, device))
    return {name: statistics.median(values[1:]) for name, values in taken.items()}


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes read and written a second by a copy."""
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / medians({"copy": lambda: target.copy_(source)}, device, max(repeats, 5))["copy"]


def with_switch(setting: str, run: Callable[[], Any]) -> Callable[[], Any]:
    """A call with the native operators on ("1") or off ("0")."""

    def call() -> Any:
        os.environ[SWITCH] = setting
        return run()

    return call


def difference(case: Case, native: torch.Tensor, plain: torch.Tensor) -> float:
    """Largest difference relative to the largest value.

    Raises:
        ValueError: it is more than the rounding of float32 sums.
    """
    native, plain = native.double(), plain.double()
    error = ((native - plain).abs().max() / plain.abs().max().clamp(min=1e-30)).item()
    if native.shape != plain.shape or not error <= case.tolerance:
        raise ValueError(f"{case.name}: differs from plain torch by {error:.1e}, allowed is {case.tolerance:.0e}")
    return error


def measured(case: Case, sizes: Sizes, bandwidth: float, repeats: int) -> Row:
    """One row.

    Raises:
        ValueError: see ``difference``.
    """
    inputs = case.inputs(sizes)
    native, plain = (with_switch(setting, lambda: case.run(inputs)) for setting in ("1", "0"))
    error = difference(case, native(), plain())
    runs = {"native": native, "plain": plain}
    fits = case.unfused_bytes(sizes) < 0.5 * free_bytes(sizes.device)
    if fits:
        runs["unfused"] = lambda: case.unfused(inputs)
    times = medians(runs, sizes.device, repeats)
    num_bytes = case.num_bytes(sizes)
    share = num_bytes / times["native"] / bandwidth
    return Row(case.name, sizes.length, times["native"], times["plain"], times.get("unfused"), num_bytes, share, error)


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def table(rows: list[Row], bandwidth: float) -> str:
    """Markdown: milliseconds, and how many times as long the others take."""
    lines = [
        f"Copy bandwidth {bandwidth / 1e9:.1f} GB/s.",
        "",
        "| operator | tokens | native ms | plain / native | unfused / native | MB | share of copy bandwidth |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        unfused = f"{row.unfused / row.native:.1f}" if row.unfused is not None else "no memory"
        lines.append(
            f"| {row.operator} | {row.length:,} | {row.native * 1e3:.3f} | {row.plain / row.native:.1f} | {unfused} "
            f"| {row.num_bytes / 1e6:.1f} | {row.share:.0%} |"
        )
    return "\n".join(lines)


def sizes_of(length: int, question: int, device: torch.device, dtype: torch.dtype) -> Sizes:
    """One layer of the 12B model."""
    model = yaml.safe_load(MODEL.read_text())
    return Sizes(
        length=length,
        question=question,
        hidden=model["hidden_size"],
        heads=model["num_attention_heads"],
        key_heads=model["num_query_groups"],
        width=model["kv_channels"],
        mamba_heads=model["mamba_num_heads"],
        groups=model["mamba_num_groups"],
        state=model["mamba_state_dim"],
        device=device,
        dtype=dtype,
    )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on cuda, float32 on cpu")
    parser.add_argument(
        "--lengths", type=int, nargs="+", help="tokens; default: 2048 to 131072 on cuda, to 8192 on cpu"
    )
    parser.add_argument("--question", type=int, default=32, help="query tokens (default 32)")
    parser.add_argument("--repeats", type=int, default=5, help="calls a median is of (default 5)")
    parser.add_argument("--quick", action="store_true", help="the shortest length, one call each")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON (default runs/bench/kernels.json)")
    return parser.parse_args()


def main() -> int:
    """Prints the table and writes the JSON; 1 where an operator is wrong, 2 where there is none."""
    args = parsed()
    device = torch.device(args.device)
    dtype = DTYPES[args.dtype or ("bfloat16" if args.device == "cuda" else "float32")]
    lengths = args.lengths or LENGTHS[args.device]
    repeats = 1 if args.quick else args.repeats
    os.environ[SWITCH] = "1"
    if find_spec("hybridprune_kernels") is None or native(torch.zeros(1, device=device)) is None:
        print(f"no native operators for {args.device}: pip install --no-build-isolation ./kernels", file=sys.stderr)
        return 2
    bandwidth = copy_bandwidth(device, repeats)
    try:
        rows = [
            measured(case, sizes_of(length, args.question, device, dtype), bandwidth, repeats)
            for length in (lengths[:1] if args.quick else lengths)
            for case in CASES
        ]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    report = {
        "command": " ".join(["python", "kernels/bench.py", *sys.argv[1:]]),
        "dtype": str(dtype),
        "question": args.question,
        "repeats": repeats,
        "copy_bytes_per_second": bandwidth,
        **describe_machine(),
        "rows": [asdict(row) for row in rows],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(rows, bandwidth))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
