"""The parts of a blend, and what they were made for."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hybridprune_megatron.checks import ConfigError
from hybridprune_megatron.config.data_sets import read_data_sets
from tests.hostile.folders import write_set

BLEND = {"__module__": "megatron.energon", "__class__": "MetadatasetV2"}


def test_a_part_that_was_made_for_another_split_is_one_line(tmp_path: Path) -> None:
    write_set(tmp_path / "train", ["a"])
    write_set(tmp_path / "held_out", ["b"], "val")
    entries = [{"path": "train", "weight": 3}, {"path": "held_out", "weight": 1}]
    (tmp_path / "blend.yaml").write_text(yaml.safe_dump({**BLEND, "splits": {"train": {"blend": entries}}}))
    for path in (tmp_path / "blend.yaml", tmp_path / "held_out"):
        with pytest.raises(ConfigError) as caught:
            read_data_sets(path, "train", "data.train")
        assert str(caught.value) == (
            f"data.train={path}: {tmp_path}/held_out has no samples for train, but for val: write it with hybridprune "
            'shards --split train, or name it in a blend with "split_part: val"'
        )
    entries[1]["split_part"] = "val"
    (tmp_path / "blend.yaml").write_text(yaml.safe_dump({**BLEND, "splits": {"train": {"blend": entries}}}))
    assert [each.weight for each in read_data_sets(tmp_path / "blend.yaml", "train", "data.train")] == [0.75, 0.25]
