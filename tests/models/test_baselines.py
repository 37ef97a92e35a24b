"""Every baseline inside the real model: budget, text, labels, gradients, packing, recomputation, tensor parallelism."""

from __future__ import annotations

import pytest
import torch

from hybridprune_megatron.method.layout import TokenLayout
from tests.models.tiny import check_layouts, tiny_batch, tiny_config, tiny_sample
from tests.worlds import run_world

# An early attention layer, so that those that drop behind attention only can reach the budget.
PATTERN = "M*-M*-M-"
BUDGET = 0.5
BASELINES = {
    "random": ["reduction=random"],
    "uniform": ["reduction=uniform"],
    "fastv": ["reduction=fastv"],
    "pyramiddrop": ["reduction=pyramiddrop"],
    "utrc": ["reduction=utrc"],
    "evs": ["reduction=evs"],
    "evs_pixels": ["reduction=evs_pixels"],
    "tome": ["reduction=tome"],
    "evs_query": ["reduction=evs_query", "reduction.front.retention=0.75"],
    "merging query": ["reduction=query", "reduction.select.dropped=merge"],
    "tome and utrc": ["reduction=utrc", "reduction.front=tome", "reduction.front.retention=0.75"],
    "longmamba": ["reduction=longmamba", "reduction.budget=1.0"],
}


def _config(name: str, *overrides: str):
    return tiny_config(*BASELINES[name], *overrides, pattern=PATTERN, budget=BUDGET)


def _build(*overrides: str, tensor: int = 1):
    """A model; the tests give it one reduction after another."""
    from hybridprune_megatron.engine.parallel import init_model_parallel
    from hybridprune_megatron.models.build import build_model

    init_model_parallel(tensor=tensor, seed=1)
    return build_model(_config("random", *overrides)).train()


def _reduction(name: str, *overrides: str):
    from hybridprune_megatron.models.build import build_reduction

    return build_reduction(_config(name, *overrides))


def _loss_and_gradients(model, batch):
    model.zero_grad()
    loss = model(batch)
    # Different weights, so that rows that changed places would show.
    (loss * torch.arange(1, len(loss) + 1)).sum().backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _check_budget_text_and_labels(model, name: str) -> None:
    batch = tiny_batch(3, 5, 4)
    original = [12, 20, 16]
    trace: list[TokenLayout] = []
    with torch.no_grad():
        logits, last = model.logits(batch, trace=trace)
    share = 1.0 if name == "longmamba" else BUDGET
    for sample, count in enumerate(original):
        mean = sum(layout.visual_counts[sample] for layout in trace) / len(trace)
        assert share * count - 1 < mean <= share * count + 1e-6, (name, sample, mean)
    check_layouts(batch, [*trace, last])
    rows = torch.searchsorted(last.origin, torch.nonzero(batch.loss_mask).flatten())
    expected = torch.nn.functional.cross_entropy(logits[rows], batch.labels[batch.loss_mask > 0], reduction="none")
    reduced = model(batch).detach()
    torch.testing.assert_close(reduced, expected)
    model.reduction, reduction = None, model.reduction
    assert not torch.equal(model(batch).detach(), reduced), f"{name} changes nothing"
    model.reduction = reduction


def _check_packing_and_gradients(model, name: str) -> None:
    from hybridprune_megatron.data.batch import pack

    samples = [tiny_sample(index, frames) for index, frames in enumerate((3, 5))]
    loss, gradients = _loss_and_gradients(model, pack(samples))
    alone = torch.cat([model(pack([sample])).detach() for sample in samples])
    torch.testing.assert_close(loss, alone, rtol=1e-5, atol=1e-5)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert all(gradient.any() for part, gradient in gradients.items() if part.startswith("mlp1")), name
    model.language_model.decoder.config.recompute_granularity = "full"
    loss_again, gradients_again = _loss_and_gradients(model, pack(samples))
    model.language_model.decoder.config.recompute_granularity = None
    assert torch.equal(loss, loss_again), name
    for part, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, gradients_again[part], msg=lambda text, part=part: f"{name} {part}: {text}"
        )


def _all_checks() -> None:
    model = _build()
    for name in BASELINES:
        model.reduction = _reduction(name)
        _check_budget_text_and_labels(model, name)
        _check_packing_and_gradients(model, name)


def test_every_baseline_keeps_budget_text_labels_and_gradients_together():
    run_world(1, _all_checks, timeout=600)


def _tokens_with_gradient() -> dict[str, int]:
    """Of the 32 projected tokens of a clip, how many get a gradient."""
    reached = {}
    model = _build()
    embedded = []
    model.mlp1.register_forward_hook(lambda module, inputs, output: embedded.append(output))
    for name in ("evs", "tome"):
        model.reduction = _reduction(name, "reduction.budget=0.3")
        loss = model(tiny_batch(8)).sum()
        (gradient,) = torch.autograd.grad(loss, embedded.pop())
        reached[name] = int((gradient.abs().sum(-1) > 0).sum())
    return reached


def test_gradients_reach_what_is_handed_on_and_what_is_merged():
    (reached,) = run_world(1, _tokens_with_gradient)
    # 32 tokens: EVS passes on floor(0.3 * 32), ToMe averages all of them into as many.
    assert reached == {"evs": 9, "tome": 32}


def _write_weights(path: str) -> None:
    from hybridprune_megatron.engine.weights import save_weights

    save_weights(_build(), path)


def _run_split(weights: str, tensor: int, sequence_parallel: bool, multiple_of: int) -> dict[str, tuple]:
    """Losses, what each layer kept, and the projector's gradient for every baseline that looks at hidden states."""
    from hybridprune_megatron.engine.weights import load_initial_weights

    results = {}
    overrides = [f"parallel.tensor={tensor}", f"trainer.devices={tensor}", "trainer.global_batch_size=1"]
    model = _build(*overrides, f"parallel.sequence_parallel={sequence_parallel}", tensor=tensor)
    load_initial_weights(model, weights)
    for name in ("utrc", "merging query", "tome and utrc", "evs_query", "longmamba"):
        model.reduction = _reduction(name, f"reduction.select.multiple_of={multiple_of}")
        batch = tiny_batch(3, 5, pad_to_multiple_of=2)
        trace: list[TokenLayout] = []
        with torch.no_grad():
            model.logits(batch, trace=trace)
        loss, gradients = _loss_and_gradients(model, batch)
        kept = [layout.origin.tolist() for layout in trace]
        # Plain numbers: a tensor would outlive the process that it came from.
        results[name] = (loss.tolist(), kept, gradients["mlp1.1.weight"].flatten().tolist())
    return results


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("weights") / "model.safetensors")
    run_world(1, _write_weights, path)
    return path


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallel_equals_one_process(weights, sequence_parallel):
    (expected,) = run_world(1, _run_split, weights, 1, False, 2 if sequence_parallel else 1, timeout=600)
    ranks = run_world(2, _run_split, weights, 2, sequence_parallel, 1, timeout=600)
    for results in ranks:
        for name, (loss, kept, _) in results.items():
            assert kept == expected[name][1], name
            assert loss == pytest.approx(expected[name][0], rel=1e-5), name
    for name, (_, _, whole) in expected.items():
        gradients = [results[name][2] for results in ranks]
        if sequence_parallel:
            # Each has that of its frames; megatron adds them up once a step.
            gradients = [[sum(parts) for parts in zip(*gradients)]]
        for gradient in gradients:
            # Sums of both signs: what rounding may do is measured by the largest of them.
            assert gradient == pytest.approx(whole, abs=1e-5 * max(map(abs, whole))), name
