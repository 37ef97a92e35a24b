"""The picture of a run."""

from __future__ import annotations

import pytest

from studies.demo.plots import plot_run, running_mean


def test_the_plot_is_a_png_of_a_sensible_size(tmp_path):
    rows = [{"step": step, "loss": 2.0 / step} for step in range(1, 30)]
    path = tmp_path / "deep" / "plot.png"
    plot_run(path, rows, "M-M*|-", (1.0, 0.5, 0.5, 0.3, 0.2), (1.0, 0.5, 0.5, 0.3, 0.2), 0.5)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    assert width > 1000
    assert height > 400


def test_running_mean_looks_back_only():
    assert running_mean([4.0, 2.0, 0.0, 6.0], 2) == pytest.approx([4.0, 3.0, 1.0, 3.0])
