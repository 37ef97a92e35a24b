"""The loaders: packing, what is left out, saved state, shares of ranks."""

import io
import json
import multiprocessing
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

import hybridprune_megatron.data.sample_encoder as sample_encoder_module
from hybridprune_megatron.config import Config
from hybridprune_megatron.data.bad_samples import BadSampleTally
from hybridprune_megatron.data.batch import PADDING_KEY, PackedBatch
from hybridprune_megatron.data.loader_state import from_plain, to_plain
from hybridprune_megatron.data.sample_encoder import BadSampleError, SampleEncoder
from hybridprune_megatron.data.shards import ShardWriter
from hybridprune_megatron.data.task_encoder import TrainLoader, cook_sample
from hybridprune_megatron.method.layout import TokenKind
from tests.data.eval_loader import build_eval_loader

from .conftest import encode_clip, grey_frames

MakeConfig = Callable[..., Config]


def take(loader: Any, count: int) -> list[PackedBatch]:
    return list(islice(loader, count))


def assert_equal_batches(ours: list[PackedBatch], theirs: list[PackedBatch]) -> None:
    assert [batch.keys for batch in ours] == [batch.keys for batch in theirs]
    for one, other in zip(ours, theirs):
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.pixel_values, other.pixel_values)
        assert one.layouts == other.layouts


def test_batches_are_packed_to_the_sequence_length(demo_config: MakeConfig) -> None:
    cfg = demo_config()
    for batch in take(TrainLoader(cfg, 0, 1), 12):
        lengths = [layout.num_tokens for layout in batch.layouts]
        assert sum(lengths) == len(batch.input_ids) <= 320
        frames = sum(span.kind == TokenKind.FRAME for layout in batch.layouts for span in layout.spans)
        assert batch.pixel_values.shape == (frames, 3, 128, 128)
        assert frames == 4 * len(batch.keys)
        assert batch.num_loss_tokens == 3 * len(batch.keys)


def test_first_fit_packs_well_and_keeps_every_sample(demo_config: MakeConfig) -> None:
    # 13 samples of about 95 tokens, three to a sequence.
    batches = take(TrainLoader(demo_config("data.packing_buffer=12"), 0, 1), 4)
    assert [len(batch.keys) for batch in batches] == [3, 3, 3, 3]


def test_an_epoch_shows_every_sample(demo_config: MakeConfig) -> None:
    keys = [key for batch in take(TrainLoader(demo_config(), 0, 1), 60) for key in batch.keys]
    counts = Counter(keys)
    assert len(counts) == 13
    # The shuffle buffer may hold a sample back for a while, never lose it.
    assert max(counts.values()) - min(counts.values()) <= 3


def test_order_depends_on_the_seed(demo_config: MakeConfig) -> None:
    same = [take(TrainLoader(demo_config(), 0, 1), 6) for _ in range(2)]
    assert_equal_batches(*same)
    other = take(TrainLoader(demo_config("trainer.seed=77"), 0, 1), 6)
    assert [batch.keys for batch in other] != [batch.keys for batch in same[0]]


def test_padding_keeps_within_the_sequence_length(demo_config: MakeConfig) -> None:
    for batch in take(TrainLoader(demo_config("data.sequence_length=300"), 0, 1, pad_to_multiple_of=64), 8):
        assert len(batch.input_ids) % 64 == 0
        assert len(batch.input_ids) <= 256
        filling = batch.keys.count(PADDING_KEY)
        assert PADDING_KEY not in batch.keys[: len(batch.keys) - filling]


def continue_elsewhere(cfg: Config, state_path: str, count: int, results: Any) -> None:
    """In a fresh process: batches behind a saved state, as bytes."""
    torch.set_num_threads(1)
    loader = TrainLoader(cfg, 0, 1)
    loader.load_state(torch.load(state_path, weights_only=True))
    buffer = io.BytesIO()
    batches = take(loader, count)
    torch.save([[batch.keys, batch.input_ids, batch.pixel_values] for batch in batches], buffer)
    results.put(buffer.getvalue())


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_a_restored_loader_goes_on_where_it_was(demo_config: MakeConfig, steps: int) -> None:
    cfg = demo_config()
    loader = TrainLoader(cfg, 0, 1)
    iterator = iter(loader)
    for _ in range(steps):
        next(iterator)
    buffer = io.BytesIO()
    torch.save(loader.save_state(), buffer)
    expected = take(iterator, 8)
    restored = TrainLoader(cfg, 0, 1)
    restored.load_state(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    assert_equal_batches(take(restored, 8), expected)


def test_a_new_process_goes_on_where_the_old_one_was(demo_config: MakeConfig, tmp_path: Path) -> None:
    cfg = demo_config()
    loader = TrainLoader(cfg, 0, 1)
    iterator = iter(loader)
    take(iterator, 5)
    torch.save(loader.save_state(), tmp_path / "state.pt")
    expected = take(iterator, 6)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=continue_elsewhere, args=(cfg, str(tmp_path / "state.pt"), 6, results))
    process.start()
    found = torch.load(io.BytesIO(results.get(timeout=120)), weights_only=True)
    process.join()
    for (keys, input_ids, pixels), batch in zip(found, expected, strict=True):
        assert keys == batch.keys
        assert torch.equal(input_ids, batch.input_ids)
        assert torch.equal(pixels, batch.pixel_values)


def test_loader_processes_go_on_too(demo_config: MakeConfig) -> None:
    cfg = demo_config("data.num_workers=2")
    loader = TrainLoader(cfg, 0, 1)
    iterator = iter(loader)
    take(iterator, 3)
    state = loader.save_state()
    expected = take(iterator, 5)
    restored = TrainLoader(cfg, 0, 1)
    restored.load_state(state)
    assert_equal_batches(take(restored, 5), expected)


def test_plain_state_refuses_foreign_classes() -> None:
    with pytest.raises(TypeError, match="holds a PosixPath"):
        to_plain({"a": [Path("x")]})
    with pytest.raises(ValueError, match="'Popen'"):
        from_plain({"__type__": "Popen", "items": {}})
    value = {"t": (1, "a", (2.5, None)), 3: [True, b"", b"abc"]}
    assert from_plain(to_plain(value)) == value


def test_ranks_share_the_samples(demo_config: MakeConfig) -> None:
    cfg = demo_config("trainer.global_batch_size=2")
    keys = [{key for batch in take(TrainLoader(cfg, rank, 2), 20) for key in batch.keys} for rank in (0, 1)]
    assert not keys[0] & keys[1]
    assert len(keys[0] | keys[1]) == 13


def test_eval_loader_reads_every_sample_once_in_order(demo_config: MakeConfig) -> None:
    samples = list(build_eval_loader(demo_config()))
    assert [sample.key for sample in samples] == [f"validation-{index:06d}" for index in range(5)]
    again = list(build_eval_loader(demo_config()))
    assert all(torch.equal(one.pixel_values, other.pixel_values) for one, other in zip(samples, again))


# ---- several turns, text only, odd parts ----------------------------------------------------------------------------


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(texts)]


@pytest.fixture(scope="module")
def clip() -> bytes:
    return encode_clip(grey_frames(6), range(0, 240, 40))


def test_split_turns_and_text_only_samples_pack_together(demo_config: MakeConfig, clip: bytes, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "set", "train") as writer:
        writer.add("two", turns("<video>\nWhere?", "end", "When?", "late"), [("mp4", clip)])
        writer.add("text", turns("Where?", "start"), [])
        writer.add("both", turns("<video> or <video>?", "early"), [("mp4", clip), ("mp4", clip)])
    cfg = demo_config(f"data.train={tmp_path / 'set'}", "data.conversation=split_turns", "data.num_frames=2")
    loader = TrainLoader(cfg, 0, 1)
    batches = take(loader, 8)
    counts = Counter(key for batch in batches for key in batch.keys)
    assert set(counts) == {"two.0", "two.1", "text", "both"}
    for batch in batches:
        expected = sum({"text": 0, "both": 4}.get(key, 2) for key in batch.keys)
        assert len(batch.pixel_values) == expected
    restored = TrainLoader(cfg, 0, 1)
    restored.load_state(loader.save_state())


def test_only_known_parts_are_read() -> None:
    raw = {"__key__": "k", "__restore_key__": ("a", 1), "json": b"{}", "pyd": b"\x80", "pkl": b"\x80"}
    videos = {"10.mp4": b"eleventh", "2.webm": b"third", "0.mp4": b"first", "1.mp4.txt": b"no"}
    sample = cook_sample({**raw, **videos})
    assert sample.videos == (b"first", b"third", b"eleventh")


# ---- bad samples ----------------------------------------------------------------------------------------------------


def write_mixed(folder: Path, clip: bytes) -> None:
    """Six good samples and four bad ones."""
    with ShardWriter(folder, "train") as writer:
        for index in range(6):
            writer.add(f"good-{index}", turns("<video>\nWhere?", "end"), [("mp4", clip)])
        writer.add("broken-video", turns("<video>\nWhere?", "end"), [("mp4", b"broken")])
        writer.add("no-placeholder", turns("Where?", "end"), [("mp4", clip)])
        writer.add("too-long", turns("Where? " * 400, "end"), [])
        writer.add("malformed", [{"role": "user"}], [])


def test_bad_samples_are_skipped_and_counted(demo_config: MakeConfig, clip: bytes, tmp_path: Path) -> None:
    write_mixed(tmp_path / "set", clip)
    loader = TrainLoader(demo_config(f"data.train={tmp_path / 'set'}", "data.max_bad_share=0.5"), 0, 1)
    keys = {key for batch in take(loader, 12) for key in batch.keys}
    assert keys == {f"good-{index}" for index in range(6)}
    counts = loader.counts
    assert set(counts) == {"seen", "video", "malformed", "too_long"}
    assert counts["malformed"] >= 2 * counts["video"] - 2
    assert counts["seen"] > sum(count for name, count in counts.items() if name != "seen")
    restored = TrainLoader(demo_config(f"data.train={tmp_path / 'set'}", "data.max_bad_share=0.5"), 0, 1)
    restored.load_state(loader.save_state())
    assert restored.counts == counts


def test_a_video_that_breaks_only_while_decoding_is_skipped(
    demo_config: MakeConfig, clip: bytes, tmp_path: Path
) -> None:
    damaged = bytearray(clip)
    start = clip.index(b"mdat") + 8
    damaged[start : start + 3000] = bytes(3000)
    with ShardWriter(tmp_path / "set", "train") as writer:
        writer.add("good", turns("<video>\nWhere?", "end"), [("mp4", clip)])
        writer.add("damaged", turns("<video>\nWhere?", "end"), [("mp4", bytes(damaged))])
    loader = TrainLoader(demo_config(f"data.train={tmp_path / 'set'}", "data.max_bad_share=1.0"), 0, 1)
    assert {key for batch in take(loader, 6) for key in batch.keys} == {"good"}
    assert loader.counts["video"] > 0


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_samples_end_the_job_in_one_line(
    demo_config: MakeConfig, clip: bytes, tmp_path: Path, workers: int
) -> None:
    write_mixed(tmp_path / "set", clip)
    cfg = demo_config(f"data.train={tmp_path / 'set'}", "data.max_bad_share=0.0", f"data.num_workers={workers}")
    with pytest.raises(ValueError, match=r"1 of \d+ samples are bad .*data\.max_bad_share=0\.0") as caught:
        take(TrainLoader(cfg, 0, 1), 30)
    assert "\n" not in str(caught.value)


def test_tally_waits_for_enough_samples() -> None:
    tally = BadSampleTally(0.01)
    error = BadSampleError("video", "k", "broken")
    for seen in range(1, 11):
        tally.seen = seen
        tally.skip(error)
    with pytest.raises(Exception, match="11 of 10 samples are bad"):
        tally.skip(error)


def test_a_bug_is_not_taken_for_a_bad_sample(demo_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("bug")

    monkeypatch.setattr(SampleEncoder, "draft", fail)
    with pytest.raises(KeyError, match="bug"):
        take(TrainLoader(demo_config("data.max_bad_share=1.0"), 0, 1), 1)


# ---- configuration --------------------------------------------------------------------------------------------------


def test_missing_data_is_one_line(demo_config: MakeConfig, tmp_path: Path) -> None:
    cfg = demo_config()
    cfg.data.train = None
    with pytest.raises(ValueError, match=r"data\.train=null"):
        TrainLoader(cfg, 0, 1)
    cfg.data.train = str(tmp_path)
    with pytest.raises(ValueError, match=r"not an Energon data set"):
        TrainLoader(cfg, 0, 1)
    cfg.data.tokenizer = str(tmp_path)
    with pytest.raises(ValueError, match=r"data\.tokenizer="):
        SampleEncoder(cfg)


def test_a_metadataset_blends(demo_config: MakeConfig, demo_data: Path, tmp_path: Path) -> None:
    shutil.copytree(demo_data / "train", tmp_path / "one")
    shutil.copytree(demo_data / "train", tmp_path / "two")
    (tmp_path / "blend.yaml").write_text(
        "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n  train:\n    blend:\n"
        "      - weight: 1\n        path: one\n      - weight: 1\n        path: two\n"
    )
    loader = TrainLoader(demo_config(f"data.train={tmp_path / 'blend.yaml'}"), 0, 1)
    assert len(take(loader, 4)) == 4


def test_shards_are_plain_tars(demo_data: Path) -> None:
    with tarfile.open(demo_data / "validation" / "shard-00000.tar") as tar:
        entry = tar.extractfile("validation-000000.json")
        assert entry is not None
        content = json.loads(entry.read())
    assert content["conversation"][0]["role"] == "user"
    assert content["meta"]["answer"] == content["conversation"][1]["content"]


def test_decoded_times_count_where_the_index_of_a_video_is_wrong(
    demo_config: MakeConfig, clip: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = demo_config()
    messages = turns("<video>\nWhere?", "end")
    (right,) = SampleEncoder(cfg).encode("k", messages, [clip])
    monkeypatch.setattr(sample_encoder_module, "list_frames", lambda *_: [0.0, 9.0])
    (draft,) = SampleEncoder(cfg).draft("k", messages, [clip])
    assert draft.layout.num_visual == 32
    sample = SampleEncoder(cfg).finish(draft)
    assert sample.layout == right.layout
    assert torch.equal(sample.input_ids, right.input_ids)
    assert torch.equal(sample.pixel_values, right.pixel_values)
