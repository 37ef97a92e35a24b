"""What a cut or overwritten shard leaves of a data set: the rest of it is read, the loss is counted."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from hybridprune_megatron.config import Config
from hybridprune_megatron.data.shards import ShardWriter
from hybridprune_megatron.data.task_encoder import TrainLoader

MakeConfig = Callable[..., Config]


def _write(folder: Path) -> list[Path]:
    """Two shards with six samples each."""
    with ShardWriter(folder, "train", samples_per_shard=6) as writer:
        for index in range(12):
            question = {"role": "user", "content": f"Where is {index}?"}
            writer.add(f"text-{index}", [question, {"role": "assistant", "content": "start"}], [])
    return sorted(folder.glob("*.tar"))


def _cut(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


def _overwrite(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[: len(content) // 2] = b"\xa5" * (len(content) // 2)
    shard.write_bytes(content)


@pytest.mark.parametrize("harm", [_cut, _overwrite, Path.unlink])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_shard_is_skipped_and_counted(
    demo_config: MakeConfig, tmp_path: Path, harm: Callable[[Path], None], workers: int
) -> None:
    _, second = _write(tmp_path / "set")
    harm(second)
    cfg = demo_config(f"data.train={tmp_path / 'set'}", "data.max_bad_share=0.9", f"data.num_workers={workers}")
    loader = TrainLoader(cfg, 0, 1)
    batches = iter(loader)
    keys = {key for batch in islice(batches, 12) for key in batch.keys}
    # All of the whole shard, and of the other at most what the harm left.
    assert {f"text-{index}" for index in range(6)} <= keys
    assert len(keys) < 12
    assert loader.counts["shard"] > 0
    assert loader.counts["seen"] > loader.counts["shard"]
    restored = TrainLoader(cfg, 0, 1)
    restored.load_state(loader.save_state())
    assert [batch.keys for batch in islice(restored, 3)] == [batch.keys for batch in islice(batches, 3)]


def test_a_corrupt_shard_ends_the_job_past_the_share(demo_config: MakeConfig, tmp_path: Path) -> None:
    _, second = _write(tmp_path / "set")
    _cut(second)
    cfg = demo_config(f"data.train={tmp_path / 'set'}", "data.max_bad_share=0.003")
    message = r"4 of \d+ samples are bad \(4 shard\), above data.max_bad_share=0.003; the last one: sample number"
    with pytest.raises(ValueError, match=message) as caught:
        list(islice(TrainLoader(cfg, 0, 1), 100))
    assert "\n" not in str(caught.value)
