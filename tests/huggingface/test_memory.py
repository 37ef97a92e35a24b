"""An import holds a few files' worth of memory, whatever the size of the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.worlds import run_world

LAYERS, ROWS, HIDDEN = 8, 16384, 256
SHARD = 16 * 2**20


def _write(folder: Path) -> int:
    """An MLP model of 8 layers in files of 16 MiB, one matrix each; returns its bytes."""
    import json

    from hybridprune_megatron.huggingface.files import ShardWriter

    folder.mkdir()
    sizes = {"num_key_value_heads": 1, "head_dim": 1, "hybrid_override_pattern": "-" * LAYERS}
    (folder / "config.json").write_text(json.dumps({"model_type": "nemotron_h", **sizes}))
    writer, total = ShardWriter(folder, SHARD), 0
    shapes: dict[str, tuple[int, ...]] = {"backbone.norm_f.weight": (HIDDEN,)}
    shapes |= {"backbone.embeddings.weight": (8, HIDDEN), "lm_head.weight": (8, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"backbone.layers.{layer}."
        shapes |= {prefix + "norm.weight": (HIDDEN,)}
        shapes |= {prefix + "mixer.up_proj.weight": (ROWS, HIDDEN), prefix + "mixer.down_proj.weight": (HIDDEN, ROWS)}
    for name, shape in shapes.items():
        value = torch.ones(shape)
        total += value.nbytes
        writer.add(name, value)
    writer.close()
    return total


def _memory(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def _peak(source: Path, out: Path) -> int:
    """What the import took at most on top of what the process had."""
    from hybridprune_megatron.huggingface.files import copy_weights
    from hybridprune_megatron.huggingface.source import open_weights

    out.mkdir()
    weights = open_weights(source)
    weights.read(next(iter(weights.names)))
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    copy_weights(weights, out, SHARD)
    return _memory("VmHWM") - before


def test_peak_memory_is_two_files_and_a_layer(tmp_path: Path) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.fail("the peak of a process is read from /proc, which this system has not")
    # Two processes: what the first has freed would hide what the second takes.
    total = run_world(1, _write, tmp_path / "source")[0]
    peak = run_world(1, _peak, tmp_path / "source", tmp_path / "out")[0]
    layer = 2 * ROWS * HIDDEN * 4
    assert total > LAYERS * layer
    assert peak < 2 * SHARD + layer, f"{peak / 2**20:.1f} MiB for files of {SHARD / 2**20:.0f} MiB"
