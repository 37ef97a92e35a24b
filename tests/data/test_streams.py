"""The order of samples belongs to the run, not to its ranks: it survives a change of their number in the middle."""

from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from hybridprune_megatron.config import Config
from hybridprune_megatron.data.shards import ShardWriter
from hybridprune_megatron.data.streams import streams_of
from hybridprune_megatron.data.task_encoder import TrainLoader

MakeConfig = Callable[..., Config]
_STREAMS, _SAMPLES = 4, 16


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts") / "set"
    with ShardWriter(folder, "train", samples_per_shard=5) as writer:
        for index in range(_SAMPLES):
            question = {"role": "user", "content": f"Where is {index}?"}
            writer.add(f"text-{index}", [question, {"role": "assistant", "content": "start"}], [])
    return folder


@pytest.fixture
def make_config(demo_config: MakeConfig, texts: Path) -> MakeConfig:
    """Every packed sequence holds one sample, in no order but the shards', unless told otherwise."""
    plain = (f"data.train={texts}", f"trainer.global_batch_size={_STREAMS}", "data.packing_buffer=1")
    return lambda *overrides: demo_config(*plain, "data.shuffle_buffer=1", *overrides)


def _steps(loaders: list[TrainLoader], count: int) -> list[list[tuple[str, ...]]]:
    """Keys of every micro batch of every step, over all ranks."""
    iterators = [iter(loader) for loader in loaders]
    share = _STREAMS // len(loaders)
    return [[tuple(batch.keys) for iterator in iterators for batch in islice(iterator, share)] for _ in range(count)]


def _open(cfg: Config, ranks: int) -> list[TrainLoader]:
    return [TrainLoader(cfg, rank, ranks) for rank in range(ranks)]


def test_streams_are_shared_evenly_and_in_order() -> None:
    for size in (1, 2, 4):
        assert [stream for rank in range(size) for stream in streams_of(rank, size, 4)] == [0, 1, 2, 3]
    assert len({len(streams_of(rank, 2, 4)) for rank in range(2)}) == 1


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (4, 2), (1, 4)])
def test_every_sample_of_an_epoch_comes_once_when_the_ranks_change(
    make_config: MakeConfig, before: int, after: int
) -> None:
    cfg = make_config()
    first = _open(cfg, before)
    seen = _steps(first, 2)
    states = {stream: state for loader in first for stream, state in loader.save_state().items()}
    second = _open(cfg, after)
    for loader in second:
        loader.load_state(states)
    seen += _steps(second, 2)
    counts = Counter(key for step in seen for keys in step for key in keys)
    assert counts == dict.fromkeys((f"text-{index}" for index in range(_SAMPLES)), 1)


def test_steps_are_those_of_an_undisturbed_run(make_config: MakeConfig) -> None:
    """With buffers that shuffle and pack, and two changes."""
    cfg = make_config("data.shuffle_buffer=12", "data.packing_buffer=3", "data.sequence_length=100")
    whole = _steps(_open(cfg, 1), 9)
    found, states = [], {}
    for ranks in (2, 4, 1):
        loaders = _open(cfg, ranks)
        for loader in loaders:
            if states:
                loader.load_state(states)
        found += _steps(loaders, 3)
        states = {stream: state for loader in loaders for stream, state in loader.save_state().items()}
    assert found == whole
    assert max(len(keys) for step in whole for keys in step) > 1


def test_counts_go_with_the_streams(make_config: MakeConfig) -> None:
    cfg = make_config()
    one = _open(cfg, 1)
    _steps(one, 2)
    two = _open(cfg, 2)
    for loader in two:
        loader.load_state(one[0].save_state())
    assert one[0].counts["seen"] == sum(loader.counts["seen"] for loader in two)


def test_state_of_other_streams_or_workers_is_refused(make_config: MakeConfig) -> None:
    states = _open(make_config(), 1)[0].save_state()
    with pytest.raises(ValueError, match=r"global_batch_size=2: .*saved with trainer.global_batch_size=4; resume"):
        _open(make_config("trainer.global_batch_size=2"), 1)[0].load_state(states)
    with pytest.raises(ValueError, match=r"data.num_workers=1: .*saved with data.num_workers=0; resume"):
        _open(make_config("data.num_workers=1"), 1)[0].load_state(states)
