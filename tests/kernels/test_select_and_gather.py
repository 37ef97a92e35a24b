"""Native selection and gather: which tokens stay to the bit, gradients, and what is refused."""

from __future__ import annotations

import pytest
import torch

from hybridprune_megatron.method import plan
from hybridprune_megatron.method.operators import highest
from tests.kernels.backends import BACKENDS, device_of, native

RUNS = {
    "one": [(1, 1)],
    "none stay": [(5, 0), (3, 0)],
    "all stay": [(5, 5), (2, 2)],
    "packed": [(70, 7), (0, 0), (1, 0), (300, 299), (64, 32), (1, 1)],
    "long": [(9001, 2250), (4096, 1)],
    "nothing": [],
    "empty run": [(0, 0)],
}


def scores_of(kind: str, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    scores = torch.randn(count, generator=generator)
    if kind == "ties":
        return scores.round()
    if kind == "all equal":
        return torch.zeros(count)
    if kind == "special":
        values = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-40, -1e-40, 1.0])
        return values[torch.randint(8, (count,), generator=generator)]
    return scores


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["normal", "ties", "all equal", "special"])
@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_the_same_tokens_stay_as_in_plain_torch(runs, kind, backend, monkeypatch):
    monkeypatch.setenv("HYBRIDPRUNE_KERNELS", "0")
    scores = scores_of(kind, sum(present for present, _ in runs)).to(device_of(backend))
    expected = plan.chosen_visual(scores, torch.zeros_like(scores).long(), runs, 0)
    assert torch.equal(highest(native(backend), scores, runs), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("shape", [(37, 1, 24), (37, 5), (37,), (37, 0), (1, 3)], ids=str)
def test_gather_takes_rows(shape, dtype, backend):
    device = device_of(backend)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(100, shape, generator=generator).to(dtype).to(device)
    for kept in (torch.randperm(shape[0], generator=generator)[: shape[0] // 3].sort().values, torch.empty(0).long()):
        index = kept.to(device)
        ops = native(backend)
        taken = ops.gather(rows, index)
        assert torch.equal(taken, rows.index_select(0, index))
        expected = torch.zeros_like(rows).index_copy(0, index, taken)
        assert torch.equal(ops.gather_backward(taken, index, shape[0]), expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradients_of_gather(device):
    ops = native(device)
    rows = torch.randn(9, 2, 3, dtype=torch.float64, device=device, requires_grad=True)
    index = torch.tensor([0, 3, 4, 8], device=device)
    assert torch.autograd.gradcheck(lambda values: ops.gather(values, index), (rows,))
    assert torch.autograd.gradgradcheck(lambda values: ops.gather(values, index), (rows,))
    # A gradient that is not contiguous, as of a sum.
    ops.gather(rows, index).sum().backward()
    assert rows.grad[:, 0, 0].tolist() == [1, 0, 0, 1, 1, 0, 0, 0, 1]


def test_rows_that_are_not_contiguous_are_gathered():
    rows, index = torch.randn(6, 8)[:, ::2], torch.tensor([1, 5])
    assert torch.equal(native("cpu").gather(rows, index), rows[index])


def test_what_is_refused_is_one_line():
    ops, scores, rows = native("cpu"), torch.zeros(3), torch.zeros(4, 2)

    def offsets(*values: int) -> torch.Tensor:
        return torch.tensor(values)

    for call, message in (
        (lambda: ops.select(scores.double(), offsets(0, 3), offsets(0, 1), 1), "scores is Double: expected Float"),
        (lambda: ops.select(scores, offsets(0, 2), offsets(0, 1), 1), "offsets goes from 0 to 2: expected 0 to 3"),
        (lambda: ops.select(scores, offsets(0, 3, 1, 3), offsets(0, 0, 0, 0), 0), "offsets falls from 3 to 1"),
        (lambda: ops.select(scores, offsets(0, 1, 3), offsets(0, 2, 2), 2), "run 0 is to keep 2 tokens: it has 1"),
        (lambda: ops.select(scores, offsets(0, 3), offsets(0, 4), 4), "num_kept=4: there are 3 scores"),
        (lambda: ops.gather(rows, offsets(0, 4)), r"index\[1\]=4: there are 4 rows"),
        (lambda: ops.gather(rows, offsets(0).int()), "index is Int: expected Long"),
        (lambda: ops.gather_backward(rows, offsets(0, 1, 1, 2), 5), "expected a rising index"),
    ):
        with pytest.raises(RuntimeError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
