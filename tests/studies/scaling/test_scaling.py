"""Layouts of many GPUs: what fits, what is refused, what is fastest; and the page that is written."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import pytest

from hybridprune_megatron.config import ConfigError, load_config
from scripts.scaling import BEGIN, END, compare, main, written
from studies.scaling import report as scaling_report
from studies.scaling import scaling
from studies.scaling.assumptions import Assumptions
from studies.scaling.scaling import Layout, Scaling, Workload, balanced
from tests.test_repository import ROOT

CFG = load_config(["experiment=nemotron_nano_12b_v2_vl"])
WORKLOADS = {budget: Workload.of(CFG, budget) for budget in (1.0, 0.5, 0.25)}


def _scaling(budget: float = 1.0, batch: int = 512, **assumptions: float) -> Scaling:
    return Scaling(WORKLOADS[budget], Assumptions(**assumptions), batch)


def test_a_sample_fills_the_sequence():
    prompt = WORKLOADS[0.25].prefill.prompt
    assert (prompt.frames, prompt.visual, prompt.tokens) == (481, 481 * 256, 131_072)
    # One frame with its text more would be too long.
    assert prompt.text - 481 * 16 - 200 < 256 + 16


def test_budget_one_is_no_reduction():
    none = Workload.of(load_config(["experiment=nemotron_nano_12b_v2_vl", "reduction=none"]), 1.0)
    there, here = (Scaling(each, Assumptions(), 64).best(Layout(4, 2), 64) for each in (none, WORKLOADS[1.0]))
    assert there.step == here.step
    assert there.memory == here.memory
    assert not {"scores", "drop"} & {*here.step.near, *here.step.far}
    assert "scoring, dropping" not in here.step.parts


@pytest.mark.parametrize("layout", [Layout(8), Layout(2, 4), Layout(4, 1, 2)])
def test_less_budget_is_less_of_everything(layout: Layout):
    found = [_scaling(budget).best(layout, 64) for budget in (1.0, 0.5, 0.25)]
    for more, less in pairwise(found):
        assert less.step.seconds < more.step.seconds
        assert less.step.near["tensor"] < more.step.near["tensor"]
        # Recomputation may be less, not the memory of one way to run.
        pattern = CFG.model.hybrid_pattern if layout.pipeline == 1 else more.cfg.model.hybrid_pattern
        peaks = [_scaling(budget).estimate(layout, 64, "full", pattern).memory.total for budget in (1.0, 0.25)]
        assert peaks[1] < peaks[0]


def test_more_gpus_and_faster_links_take_less_time():
    steps = [_scaling().best(Layout(8, 2), gpus).step.seconds for gpus in (64, 512, 4096)]
    assert steps[0] > 7.9 * steps[1] > 60 * steps[2]
    slow, fast = (_scaling(wire=wire).best(Layout(8, 2), 64).step.seconds for wire in (0.4, 0.8))
    assert fast < slow


def test_what_does_not_fit_is_said():
    tight = _scaling(usable_memory=0.3).best(Layout(8), 8)
    assert not tight.fits
    # Of several ways that do not fit the smallest is shown.
    assert tight.cfg.trainer.recompute == "full"
    assert _scaling(usable_memory=1.0, memory_gib=141).best(Layout(8), 8).fits
    with pytest.raises(ValueError, match=r"^8 GPUs, 512 sequences a step: no layout fits"):
        _scaling(usable_memory=0.1).fastest(8)


def test_the_fastest_fits_and_no_other_that_fits_is_faster():
    costs = _scaling(0.25)
    found = costs.fastest(8)
    assert found.fits
    for layout in scaling.LAYOUTS:
        if layout.gpus <= 8:
            other = costs.best(layout, 8)
            assert not other.fits or other.step.seconds >= found.step.seconds


def test_more_copies_than_samples_are_refused():
    with pytest.raises(ConfigError, match=r"^trainer\.global_batch_size=512: must be a multiple of the data-parallel"):
        _scaling().best(Layout(4), 4096)


def test_stage_cuts_follow_the_time():
    full, reduced = (_scaling(budget, batch=64).best(Layout(4, 2, 2), 64) for budget in (1.0, 0.25))
    # Early layers see more tokens, and the first stage has the tower.
    assert len(reduced.cfg.model.stages[0]) < len(full.cfg.model.stages[0]) < 31


def test_balanced_is_the_best_of_all_divisions():
    weights = [5.0, 1.0, 4.0, 2.0, 8.0, 3.0, 1.0, 6.0]
    for parts in (1, 2, 3, 5, 8):
        edges = balanced(weights, parts)
        assert edges[0] == 0
        assert edges[-1] == len(weights)
        assert sorted(set(edges)) == edges
        heaviest = max(sum(weights[start:stop]) for start, stop in pairwise(edges))
        every = [[0, *inner, len(weights)] for inner in combinations(range(1, len(weights)), parts - 1)]
        best = min(max(sum(weights[a:b]) for a, b in pairwise(each)) for each in every)
        assert heaviest == best


def test_a_model_without_frames_is_refused():
    blind = replace(CFG, model=replace(CFG.model, vision=None), data=replace(CFG.data, sampling="none"),
                    reduction=replace(CFG.reduction, budget=1.0))  # fmt: skip
    with pytest.raises(ConfigError, match=r"^model\.vision=None: a model without a vision tower"):
        Workload.of(blind, 1.0)


def test_the_page_shows_what_is_counted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scaling_report, "SIZES", (4096,))
    page = (ROOT / "docs" / "scaling.md").read_text()
    *_, line = scaling_report.headline(compare([], 0.25, 512, []))
    assert line in page, "run python scripts/scaling.py --write docs/scaling.md --plot docs/scaling.png"


def test_the_script_writes_the_page_and_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    layouts = (Layout(8), Layout(4, 2), Layout(16))
    monkeypatch.setattr(scaling, "LAYOUTS", layouts[:2])
    monkeypatch.setattr(scaling_report, "LAYOUTS", layouts)
    monkeypatch.setattr(scaling_report, "SIZES", (16,))
    monkeypatch.setattr(scaling_report, "REFERENCE", 16)
    monkeypatch.setattr(scaling_report, "VARIANTS", scaling_report.VARIANTS[:2])
    monkeypatch.setattr("studies.scaling.plot.SIZES", (16,))
    monkeypatch.setattr("studies.scaling.plot.REFERENCE", 16)
    page, picture = tmp_path / "page.md", tmp_path / "new" / "picture.png"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    main(["--budget", "0.5", "--batch", "8", "--set", "hop=0", "--write", str(page), "--plot", str(picture)])
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "\nold\n" not in text
    assert "| tp4 cp2 | 2 |" in text
    # Sixteen ranks do not divide eight groups.
    assert "| tp16 | 1 | refused: model.mamba_num_groups=8" in text
    assert "| only context ranks divide the frames |" in text
    assert "| hop | 0 | seconds of latency" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_wrong_call_is_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--set", "lineer=1"])
    assert capsys.readouterr().err.startswith("hybridprune scaling: lineer=1: unknown assumption")
    with pytest.raises(ValueError, match=r"^no place for the tables"):
        written("no marks", [])
