"""A shard may be anything: a sample of it that cannot be read costs itself, and too many end a job in one line."""

from __future__ import annotations

import itertools
import json
import re
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hybridprune_megatron.checks import ConfigError
from hybridprune_megatron.config import Config
from hybridprune_megatron.data.shards import read_shard
from hybridprune_megatron.data.stored_samples import read_samples
from hybridprune_megatron.data.task_encoder import TrainLoader
from tests.data.eval_loader import build_eval_loader
from tests.hostile.folders import config, json_member, member, turns, write_set, write_shard

GOOD = json.dumps({"conversation": turns()})
BAD = json.dumps({"conversation": turns([{"type": ["text"], "text": "Where?"}])})

# ---- what a shard may be ---------------------------------------------------------------------------------------------

#: A sample of a shard that cannot be read, by what is wrong with it.
MEMBERS: dict[str, bytes] = {
    "a link": member("k.json", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "a link as video": json_member("k", GOOD) + member("k.mp4", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "a hard link as video": json_member("k", GOOD) + member("k.mp4", type=tarfile.LNKTYPE, linkname="good-0.json"),
    "a device": json_member("k", GOOD) + member("k.mp4", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
    "a pipe": json_member("k", GOOD) + member("k.mp4", type=tarfile.FIFOTYPE),
    "a sparse terabyte": json_member("k", GOOD) + member("k.mp4", type=tarfile.GNUTYPE_SPARSE),
    "a petabyte": json_member("k", GOOD) + member("k.mp4", size=10**15),
    "a petabyte in a header of its own": json_member("k", GOOD) + member("k.mp4", form=tarfile.PAX_FORMAT, size=10**15),
    "a sparse file in a header of its own": json_member("k", GOOD)
    + member("k.mp4", form=tarfile.PAX_FORMAT, pax_headers={"GNU.sparse.major": "1", "GNU.sparse.realsize": "9" * 15}),
    "a negative size": json_member("k", GOOD) + member("k.mp4", size=-(10**9)),
    "no name": member("", GOOD.encode()),
    "a point as name": member(".json", GOOD.encode()),
    "no ending": member("k", GOOD.encode()),
    "a folder": member("k.json", type=tarfile.DIRTYPE),
    "another sample's parts": json_member("k", GOOD) + json_member("l", GOOD),
    "a long key": member("k" * 5000 + ".json", GOOD.encode()),
    "a key of two lines": member("k\nl.json", GOOD.encode()),
    "a key of an escape": member("k\x1b[2J.json", GOOD.encode()),
    "a long key in a header of its own": member("k" * 5000 + ".json", GOOD.encode(), tarfile.PAX_FORMAT),
    "a key of half a character": member("k\udc80.json", GOOD.encode()),
    "noise": bytes(range(256)) * 8,
    "zeros": bytes(2048),
    "a name of 10 MB": member("k", b"n" * 10**7, type=tarfile.GNUTYPE_LONGNAME) + json_member("k", GOOD),
    "a header of 10 MB": member("k", b"6 path" * 10**6, type=tarfile.XHDTYPE) + json_member("k", GOOD),
    "a header in a header": member("k", type=tarfile.XHDTYPE) * 5000 + json_member("k", GOOD),
    "20,000 members": json_member("k", GOOD) + member("k.txt") * 20_000,
}
#: Indices of a shard of twelve samples, by what is wrong with them; and which samples they leave.
INDICES: dict[str, Callable[[list[int]], list[int]]] = {
    "zeros": lambda offsets: [0] * len(offsets),
    "short": lambda offsets: offsets[:4],
    "empty": lambda offsets: [],
    "huge": lambda offsets: [2**63] * len(offsets),
    "backwards": lambda offsets: offsets[::-1],
    "all": lambda offsets: [0, *[offsets[-1]] * (len(offsets) - 1)],
    "off by one": lambda offsets: [offset + 1 for offset in offsets],
}


def loaded(cfg: Config, batches: int) -> tuple[set[str], dict[str, int]]:
    loader = TrainLoader(cfg, 0, 1)
    keys = {key for batch in itertools.islice(loader, batches) for key in batch.keys if key}
    return keys, loader.counts


def test_bad_members_cost_their_sample_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = {f"good-{number}" for number in range(len(MEMBERS) + 1)}
    folder = write_set(tmp_path / "set", sorted(good))
    samples = [json_member(key, GOOD) for key in sorted(good)]
    mixed = [each for pair in itertools.zip_longest(samples, MEMBERS.values()) for each in pair if each is not None]
    write_shard(folder / "shard-00000.tar", mixed)
    info = folder / ".nv-meta" / ".info.json"
    info.write_text(json.dumps({"shard_counts": {"shard-00000.tar": len(mixed)}}))
    start = time.process_time()
    left_out: list[str] = []
    read = dict(read_shard(folder / "shard-00000.tar", left_out.append))
    assert set(read) == good
    assert len(left_out) == len(MEMBERS)
    assert time.process_time() - start < 5
    one = config(folder, "data.max_bad_share=0.9", "data.packing_buffer=1", "data.shuffle_buffer=1")
    keys, counts = loaded(one, 3 * len(good))
    assert keys == good
    assert set(counts) == {"seen", "shard"}
    assert counts["shard"] >= 2 * len(MEMBERS)
    named = [record.getMessage() for record in caplog.records if "left out (shard)" in record.getMessage()]
    assert len(named) == 5
    assert all("shard-00000.tar" in line and "number " in line and len(line) < 700 for line in named)


@pytest.mark.parametrize("kind", INDICES)
def test_a_bad_index_costs_its_shard_alone(tmp_path: Path, kind: str) -> None:
    keys = [f"text-{number:02d}" for number in range(24)]
    folder = write_set(tmp_path / "set", keys, samples_per_shard=12)
    samples = [json_member(key, GOOD) for key in keys[12:]]
    offsets = [0, *itertools.accumulate(map(len, samples))]
    write_shard(folder / "shard-00001.tar", samples, INDICES[kind](offsets))
    found, counts = loaded(config(folder, "data.max_bad_share=0.9"), 24)
    assert set(keys[:12]) <= found <= set(keys)
    assert counts["shard"] > 0
    assert set(counts) == {"seen", "shard"}


def test_a_lost_index_costs_its_shard_alone(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", [f"text-{number}" for number in range(4)], samples_per_shard=2)
    (folder / "shard-00001.tar.idx").unlink()
    found, counts = loaded(config(folder, "data.max_bad_share=0.9"), 8)
    assert found == {"text-0", "text-1"}
    assert counts["shard"] > 0


def test_long_names_of_all_kinds_are_read(tmp_path: Path) -> None:
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        with tarfile.open(tmp_path / "shard.tar", "w", format=kind) as tar:
            for key in ("folder.v2/" + "n" * 90 + "1", "m" * 90, "3_02\u202fPM \u732b"):
                entry = tarfile.TarInfo(f"{key}.json")
                entry.size = 0
                tar.addfile(entry)
        assert [len(key) for key, _ in read_shard(tmp_path / "shard.tar")] == [101, 90, 9]


# ---- the end of a job ------------------------------------------------------------------------------------------------


def bad_set(folder: Path, split: str = "train") -> Path:
    keys = [f"text-{number}" for number in range(6)]
    write_set(folder, keys, split)
    samples = [json_member(key, BAD if key == "text-3" else GOOD) for key in keys]
    write_shard(folder / "shard-00000.tar", samples)
    return folder


def test_too_many_end_the_job_in_one_line_and_nothing_else(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = bad_set(tmp_path / "set")
    with pytest.raises(ConfigError) as caught:
        loaded(config(folder, "data.max_bad_share=0.0"), 30)
    line = str(caught.value)
    assert re.match(r"1 of [1-6] samples are bad \(1 malformed\), above data\.max_bad_share=0\.0; ", line)
    assert "the last one: sample text-3: content part {'text': 'Where?', 'type': ['text']}" in line
    assert line.endswith("; fix the data or raise data.max_bad_share")
    assert "\n" not in line
    # Nothing of what Energon and torch wrote around it is printed with it.
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    out, err = capfd.readouterr()
    printed = [each for each in (out + err).replace("\r", "\n").splitlines() if each and "Filling" not in each]
    assert len(printed) <= 1, printed


def test_a_resumed_run_says_that_its_data_have_changed(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", [f"text-{number}" for number in range(12)])
    cfg = config(folder, "data.max_bad_share=0.9")
    loader = TrainLoader(cfg, 0, 1)
    list(itertools.islice(loader, 2))
    state = loader.save_state()
    for content in (b"", (folder / "shard-00000.tar").read_bytes().replace(b'"content"', b'"CONTENT"')):
        (folder / "shard-00000.tar").write_bytes(content or bytes(100_000))
        restored = TrainLoader(cfg, 0, 1)
        restored.load_state(state)
        with pytest.raises(
            ConfigError, match=r"a sample that the checkpoint names cannot be read again .* have changed;"
        ) as e:
            list(itertools.islice(restored, 2))
        assert "\n" not in str(e.value)
        assert len(str(e.value)) < 500
        write_shard(folder / "shard-00000.tar", [json_member(f"text-{number}", GOOD) for number in range(12)])


def test_a_held_out_sample_costs_itself(tmp_path: Path) -> None:
    folder = bad_set(tmp_path / "set", "val")
    cfg = config(folder, "data.max_bad_share=0.9")
    cfg.data.validation = str(folder)
    assert [sample.key for sample in build_eval_loader(cfg)] == [f"text-{number}" for number in (0, 1, 2, 4, 5)]
    assert [sample.key for sample in read_samples(folder)] == [f"text-{number}" for number in (0, 1, 2, 4, 5)]
    cfg.data.max_bad_share = 0.0
    with pytest.raises(ConfigError, match="1 of 4 samples are bad"):
        list(build_eval_loader(cfg))
    write_shard(folder / "shard-00000.tar", [json_member("a", "{}")])
    with pytest.raises(ValueError, match="none of its samples can be read"):
        list(read_samples(folder))
    (folder / "linked.tar").symlink_to(folder / "shard-00000.tar")
    with pytest.raises(ValueError, match=r"linked\.tar is not a file but a link"):
        list(read_samples(folder))


def test_precomputing_looks_at_the_description_first(tmp_path: Path) -> None:
    from hybridprune_megatron.commands.features import source_shards

    folder = write_set(tmp_path / "set", ["a"])
    assert source_shards(folder) == {"shard-00000.tar": 1}
    (folder / ".nv-meta" / ".info.json").write_text('{"shard_counts": {"../../secret.tar": 1}}')
    with pytest.raises(ConfigError, match=r"--data=.* is not an Energon data set that can be read .*secret\.tar"):
        source_shards(folder)
