"""The probe's bookkeeping: which drops, which frames, which clips belong together, which scores are compared."""

from __future__ import annotations

import pytest

from hybridprune_megatron.analysis.probe import IN_FRONT, by_drop, drop_layers, time_bins


def test_drops_are_spread_over_the_layers_that_score():
    assert drop_layers("M-M*M-") == [0, 2, 3]
    assert drop_layers("M*-M*-M-M*-M-M*-") == [0, 3, 6, 9, 13]
    assert drop_layers("M-") == []


def test_clips_are_grouped_by_time_and_equal_times_stay_together():
    groups = [group.tolist() for group in time_bins([9, 1, 5, 2, 8, 6])]
    assert groups == [[1, 3], [2, 5], [0, 4]]
    assert [group.tolist() for group in time_bins([4, 4, 4, 4])] == [[0, 1, 2, 3]]
    assert sorted(i for group in time_bins([3, 3, 3, 7, 7, 0]) for i in group.tolist()) == list(range(6))


def test_a_drop_is_compared_with_the_same_layers():
    scores = {
        (None, 0): 0.9, (None, 2): 0.8, (None, 3): 0.7, (None, 4): 0.6,
        (IN_FRONT, 0): 0.0, (IN_FRONT, 2): 0.1, (IN_FRONT, 3): 0.2, (IN_FRONT, 4): 0.3,
        (0, 2): 0.5, (0, 3): 0.65, (0, 4): 0.35, (3, 4): 0.55,
    }  # fmt: skip
    types = {0: "mamba", 2: "mamba", 3: "attention", 4: "mamba"}
    rows = [
        {"dropped_after": after, "layer": layer, "type": types[layer], "score": score}
        for (after, layer), score in scores.items()
    ]
    found = by_drop(rows)
    assert found["attention"] == [{"dropped_after": 0, "score": 0.65, "held": 0.7, "absent": 0.2, "layers": 1}]
    first, second = found["mamba"]
    assert first == pytest.approx({"dropped_after": 0, "score": 0.425, "held": 0.7, "absent": 0.2, "layers": 2})
    assert second == pytest.approx({"dropped_after": 3, "score": 0.55, "held": 0.6, "absent": 0.3, "layers": 1})
