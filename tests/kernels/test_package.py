"""The package around the operators: registration, the switch, errors, memory."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import types

import hybridprune_kernels
import pytest
import torch

from hybridprune_megatron.method.plan import select
from hybridprune_megatron.method.scorers import SCORERS
from hybridprune_megatron.ops import native as switch
from tests.kernels.backends import attention_of, layout_of, mamba_of
from tests.kernels.emulation import ROOT
from tests.method import test_score_memory as memory

CPU = torch.device("cpu")


def attention_arguments(dtype: torch.dtype = torch.float32) -> list:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 4, 6, generator=generator).to(dtype)
    k = torch.randn(9, 2, 6, generator=generator).to(dtype)
    always_seen = torch.arange(9) % 2 == 0
    return [
        q,
        k,
        torch.tensor([3, 4, 8]),
        torch.arange(9),
        always_seen,
        torch.tensor([0, 2, 3]),
        torch.tensor([0, 5, 9]),
    ]


def mamba_arguments(dtype: torch.dtype = torch.float32) -> list:
    generator = torch.Generator().manual_seed(0)
    B, C = (torch.randn(9, 2, 6, generator=generator).to(dtype) for _ in range(2))
    dt = torch.rand(9, 4, generator=generator)
    log_decay = -dt.double().cumsum(0)
    indices = [torch.tensor([0, 1, 6]), torch.tensor([0, 2, 3]), torch.tensor([4, 8]), torch.tensor([0, 1, 2])]
    return [B, C, dt, log_decay, *indices, "softmax", False, "max_heads"]


def calls(dtype: torch.dtype = torch.float32) -> dict[str, list]:
    attention, rows = attention_arguments(dtype), torch.randn(5, 3).to(dtype).requires_grad_()
    return {
        "attention_log_sum": attention,
        "attention_mass": [*attention[:2], torch.zeros(3, 4), *attention[2:], "mean"],
        "attention_score": [*attention, "max"],
        "mamba_score": mamba_arguments(dtype),
        "select": [torch.rand(5), torch.tensor([0, 2, 5]), torch.tensor([0, 1, 3]), 3],
        "gather": [rows, torch.tensor([0, 4])],
        "gather_backward": [rows[:2].detach().requires_grad_(), torch.tensor([0, 4]), 5],
    }


@pytest.mark.parametrize("name", calls())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, name):
    torch.library.opcheck(getattr(torch.ops.hybridprune, name).default, tuple(calls(dtype)[name]))


def replaced(arguments: list, place: int, value: object) -> list:
    return [*arguments[:place], value, *arguments[place + 1 :]]


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("attention_log_sum", 0, torch.zeros(3, 4, 6).half(), "q is Half: expected float32 or bfloat16"),
        ("attention_log_sum", 1, torch.zeros(9, 2, 5), "q and k have heads of width 6 and 5"),
        ("attention_log_sum", 1, torch.zeros(9, 3, 6), "q has 4 heads and k 3"),
        ("attention_log_sum", 2, torch.zeros(2).long(), "query_positions has 2 entries: expected 3"),
        ("attention_log_sum", 3, torch.arange(9).flip(0), "key_positions falls within sample 0"),
        ("attention_log_sum", 5, torch.tensor([0, 2, 4]), "query_offsets goes from 0 to 4: expected 0 to 3"),
        ("attention_mass", 2, torch.zeros(3, 2), r"log_sum is \[3, 2\]: expected \[3, 4\]"),
        ("attention_mass", 8, "median", "pooling='median': allowed are mean, max"),
        ("mamba_score", 1, torch.zeros(9, 2, 5), r"B is \[9, 2, 6\] and C \[9, 2, 5\]"),
        ("mamba_score", 2, torch.zeros(9, 3), "a multiple of 2 heads"),
        ("mamba_score", 3, torch.zeros(9, 4), "log_decay is Float: expected Double"),
        ("mamba_score", 4, torch.tensor([0, 1, 9]), r"visual_index\[2\]=9: there are 9 rows"),
        ("mamba_score", 7, torch.tensor([0, 2, 2]), "sample 1 has visual tokens and no query"),
        ("mamba_score", 8, "tanh", "function='tanh': allowed are identity, abs, relu, softmax"),
        ("mamba_score", 9, True, "contrast with function='softmax' and log_decay: expected identity without log_decay"),
        ("mamba_score", 10, "max", "pooling='max': allowed are mean, max_groups, max_heads"),
    ],
)
def test_what_is_refused_is_one_line(name, place, value, message):
    arguments = replaced(calls()[name], place, value)
    with pytest.raises(RuntimeError, match=message) as error:
        getattr(torch.ops.hybridprune, name)(*arguments)
    assert "\n" not in str(error.value)


def test_the_model_scores_selects_and_gathers_with_them(monkeypatch):
    """Counted where the calls arrive: with the switch on all four, with it off none."""
    called: list[str] = []
    real = torch.ops.hybridprune

    class Counting:
        def __getattr__(self, name):
            called.append(name)
            return getattr(real, name)

    # For the switch alone: torch itself looks operators up by their names where a mode for functions is on.
    seen = types.SimpleNamespace(**{**vars(torch), "ops": types.SimpleNamespace(hybridprune=Counting())})
    monkeypatch.setattr(switch, "torch", seen)
    layout = layout_of("packed", CPU)
    scorer = SCORERS.build({"name": "query"})

    def run():
        scores = scorer.score(attention_of(layout, 4, 2, 8), layout, 0)
        scorer.score(mamba_of(layout, 2, 4, 8), layout, 0)
        chosen = select(scores, layout, [count // 2 for count in layout.visual_counts])
        return chosen.take(torch.ones(layout.num_tokens, 3))

    for setting, expected in (("1", ["attention_score", "mamba_score", "select", "gather"]), ("0", [])):
        monkeypatch.setenv("HYBRIDPRUNE_KERNELS", setting)
        called.clear()
        run()
        assert called == expected


def test_the_switch_names_what_it_knows(monkeypatch):
    monkeypatch.setenv("HYBRIDPRUNE_KERNELS", "off")
    with pytest.raises(ValueError, match=r"HYBRIDPRUNE_KERNELS='off': allowed are 1 .* and 0"):
        switch.native(torch.zeros(1))


def test_dtypes_that_they_do_not_know_stay_with_plain_torch(monkeypatch):
    monkeypatch.setenv("HYBRIDPRUNE_KERNELS", "1")
    assert switch.native(torch.zeros(1)) is torch.ops.hybridprune
    assert switch.native(torch.zeros(1), torch.zeros(1).half()) is None


def test_operators_of_another_interface_are_refused(monkeypatch):
    monkeypatch.setattr(hybridprune_kernels, "INTERFACE", 99)
    switch._package.cache_clear()
    with pytest.raises(ImportError, match=r"interface 99, this code calls 3: .*HYBRIDPRUNE_KERNELS=0"):
        switch.native(torch.zeros(1))


def test_without_the_package_it_is_plain_torch(monkeypatch):
    monkeypatch.setattr(switch.importlib.util, "find_spec", lambda name: None)
    switch._package.cache_clear()
    assert switch.native(torch.zeros(1)) is None


@pytest.fixture(autouse=True)
def fresh_package():
    yield
    switch._package.cache_clear()


def test_another_torch_is_refused_at_import():
    hybridprune_kernels.check_torch("2.13.0+cpu", "2.13.1")
    with pytest.raises(
        ImportError, match=r"built against torch 2\.13\.0, torch 2\.14\.0 is installed: pip install"
    ) as error:
        hybridprune_kernels.check_torch("2.13.0", "2.14.0")
    assert "\n" not in str(error.value)


def test_a_build_without_code_for_the_gpu_says_so_once(monkeypatch):
    monkeypatch.setattr(switch, "_package", lambda: types.SimpleNamespace(CUDA_ARCHS=("90",)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    switch._has_code_for.cache_clear()
    with pytest.warns(UserWarning, match=r"built for CUDA \['90'\], the GPU has 8.0"):
        assert not switch._has_code_for(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert switch._has_code_for(torch.device("cuda", 1))
    switch._has_code_for.cache_clear()


@pytest.mark.parametrize("settings", [{"attention_causal": False, "attention_pooling": "max"}, {}], ids=str)
def test_memory_of_attention_scores_is_linear(settings, monkeypatch):
    monkeypatch.setenv("HYBRIDPRUNE_KERNELS", "1")
    scorer = SCORERS.build({"name": "query", **settings})
    growth = memory.bytes_per_token(lambda layout, signals, _: scorer.score(signals, layout, 0))
    assert growth < memory.BYTES_PER_TOKEN


@pytest.mark.parametrize(
    ("contrast", "decay", "function"),
    [(True, False, "identity"), *itertools.product([False], [True, False], ["identity", "abs", "relu", "softmax"])],
)
def test_memory_of_mamba_scores_is_linear(contrast, decay, function, monkeypatch):
    monkeypatch.setenv("HYBRIDPRUNE_KERNELS", "1")
    how = {"mamba_contrast": contrast, "mamba_decay": decay, "mamba_function": function}
    scorer = SCORERS.build({"name": "query", **how})
    growth = memory.bytes_per_token(lambda layout, _, signals: scorer.score(signals, layout, 0))
    assert growth < memory.BYTES_PER_TOKEN


def test_the_benchmark_of_operators_runs(tmp_path):
    """Every case native and plain, at sizes of a layer of the 12B model."""
    out = tmp_path / "kernels.json"
    command = [sys.executable, "kernels/bench.py", "--device", "cpu", "--quick", "--lengths", "96", "--out", str(out)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = json.loads(out.read_text())["rows"]
    assert {"attention score", "Mamba score", "Mamba score, signed"} <= {row["operator"] for row in rows}
