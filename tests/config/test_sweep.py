"""A sweep's runs: all combinations, a folder for each, checked before the first begins."""

from __future__ import annotations

import pytest

from hybridprune_megatron.checks import ConfigError
from hybridprune_megatron.config import compose, sweep
from hybridprune_megatron.config.sweep import chosen, run_name, sweep_runs


@pytest.fixture(autouse=True)
def without_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """The data of these runs are not there."""
    monkeypatch.setattr(
        sweep, "checked_config", lambda overrides, need_files=False: compose.checked_config(overrides, need_files=False)
    )


def test_every_combination_has_its_values_and_a_folder() -> None:
    runs = sweep_runs(["experiment=demo", "reduction.budget=0.5,0.25", "name=two", "optim.lr=1e-4,3e-4"])
    values = [(run.cfg.reduction.budget, run.cfg.optim.lr, run.cfg.output_dir) for run in runs]
    assert values == [
        (0.5, 1e-4, "runs/two/reduction.budget_0.5__optim.lr_0.0001"),
        (0.5, 3e-4, "runs/two/reduction.budget_0.5__optim.lr_0.0003"),
        (0.25, 1e-4, "runs/two/reduction.budget_0.25__optim.lr_0.0001"),
        (0.25, 3e-4, "runs/two/reduction.budget_0.25__optim.lr_0.0003"),
    ]
    assert chosen(runs, 2) is runs[2]


def test_groups_ranges_and_parts_are_swept_too() -> None:
    runs = sweep_runs(
        ["experiment=demo", "reduction.budget=0.5", "reduction=query,attention_only", "trainer.seed=range(3,5)"]
    )
    assert [(run.cfg.reduction.layers, run.cfg.trainer.seed) for run in runs] == [
        ("all", 3),
        ("all", 4),
        ("attention", 3),
        ("attention", 4),
    ]
    runs = sweep_runs(["experiment=demo", "reduction.schedule=sigmoid,plateau", "output_dir=runs/shapes"])
    assert [run.cfg.reduction.plain()["schedule"]["name"] for run in runs] == ["sigmoid", "plateau"]
    assert runs[0].cfg.output_dir == "runs/shapes/reduction.schedule_sigmoid"


def test_names_are_safe_and_of_a_readable_length() -> None:
    assert run_name(["data.train"], ["/my data/a.yaml"], 0) == "data.train_my_data_a.yaml"
    assert run_name(["name"], ["x" * 200], 7) == "run_007"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["experiment=demo"], "-m without a key of several values: "),
        (["experiment=demo", "reduction.budget=0.5,2"], "reduction.budget=2.0: must be above 0"),
        (["experiment=demo", "reduction.budgt=0.5,0.25"], "reduction.budgt"),
        (["experiment=glob(*)"], "experiment=glob\\(\\*\\): cannot be swept"),
    ],
)
def test_what_is_wrong_is_one_line(overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError, match=line) as raised:
        sweep_runs(overrides)
    assert "\n" not in str(raised.value)


def test_an_array_larger_than_the_sweep_is_one_line() -> None:
    runs = sweep_runs(["experiment=demo", "reduction.budget=0.5,0.25"])
    with pytest.raises(ConfigError, match="SLURM_ARRAY_TASK_ID=2: this sweep has 2 runs; submit it with --array=0-1"):
        chosen(runs, 2)
