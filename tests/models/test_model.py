"""The whole model on one process: reduction, packing, recomputation, frozen parts."""

from __future__ import annotations

import pytest
import torch

from hybridprune_megatron.method.counts import kept_counts
from hybridprune_megatron.method.layout import TokenKind, TokenLayout
from hybridprune_megatron.method.reduction_pass import ReductionPass
from tests.models.tiny import check_layouts, tiny_batch, tiny_config, tiny_sample
from tests.worlds import run_world


def _build(*overrides: str, budget: float = 0.5, **kwargs):
    from hybridprune_megatron.engine.parallel import init_model_parallel
    from hybridprune_megatron.models.build import build_model

    init_model_parallel(seed=1)
    return build_model(tiny_config(*overrides, budget=budget, **kwargs)).train()


def _loss_and_gradients(model, batch):
    model.zero_grad()
    loss = model(batch).sum()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _budget_of_one() -> None:
    model = _build(budget=1.0)
    batch = tiny_batch(3, 5, 2)
    assert model.reduction is None
    full = _loss_and_gradients(model, batch)
    # The same weights with the machinery on and nothing to drop.
    from hybridprune_megatron.method.reduction import Reduction
    from hybridprune_megatron.method.score_query import QueryScorer

    model.reduction = Reduction(QueryScorer(), (1.0,) * 6)
    same = _loss_and_gradients(model, batch)
    assert torch.equal(full[0], same[0])
    assert all(torch.equal(full[1][name], same[1][name]) for name in full[1])
    # And a reduction does change the result, or the lines above would say nothing.
    model.reduction = _build().reduction
    assert not torch.equal(full[0], _loss_and_gradients(model, batch)[0])


def test_a_budget_of_one_is_bitwise_the_model_without_reduction():
    run_world(1, _budget_of_one)


def _packing() -> None:
    model = _build()
    # Clips, two videos in one sample, and text alone.
    samples = [tiny_sample(0, 3), tiny_sample(1, 5), tiny_sample(2, 2, videos=2), tiny_sample(3, 0), tiny_sample(4, 4)]
    from hybridprune_megatron.data.batch import pack

    loss, gradients = _loss_and_gradients(model, pack(samples))
    alone = [_loss_and_gradients(model, pack([sample])) for sample in samples]
    torch.testing.assert_close(loss, sum(one for one, _ in alone), rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        # Text alone gives the projector none.
        total = sum(grads.get(name, torch.zeros(())) for _, grads in alone)
        error = (gradient - total).norm()
        assert error <= 1e-5 * total.norm(), (name, float(error), float(total.norm()))


def test_packed_samples_equal_the_same_samples_one_by_one():
    run_world(1, _packing)


def _trace() -> None:
    model = _build()
    batch = tiny_batch(3, 5, 2)
    trace: list[TokenLayout] = []
    with torch.no_grad():
        logits, last = model.logits(batch, trace=trace)
    wanted = ReductionPass.of(model.reduction, trace[0]).counts
    assert [counts[0] for counts in wanted] == list(kept_counts(model.reduction.retention, 12))
    assert tuple(layout.visual_counts for layout in trace) == wanted
    assert logits.shape[0] == last.num_tokens
    check_layouts(batch, [*trace, last])
    # The loss of the training path is the loss of the surviving rows' logits: labels moved with their tokens.
    rows = torch.searchsorted(last.origin, torch.nonzero(batch.loss_mask).flatten())
    labels = batch.labels[batch.loss_mask > 0]
    expected = torch.nn.functional.cross_entropy(logits[rows], labels, reduction="none")
    torch.testing.assert_close(model(batch).detach(), expected)


def test_tokens_labels_and_layout_stay_together():
    run_world(1, _trace)


def _answers_do_not_score() -> None:
    model = _build().eval()
    batch = tiny_batch(5, 4)
    other = tiny_batch(5, 4)
    answer = torch.tensor([kind for layout in batch.layouts for kind in layout.kinds()]) == TokenKind.ANSWER
    other.input_ids[answer] = (other.input_ids[answer] + 7) % 64
    kept = []
    for each in (batch, other):
        trace: list[TokenLayout] = []
        with torch.no_grad():
            model.logits(each, trace=trace)
        kept.append([layout.origin for layout in trace])
    assert all(torch.equal(one, two) for one, two in zip(*kept))


def test_the_answer_never_influences_what_is_kept():
    run_world(1, _answers_do_not_score)


def _recompute() -> None:
    batch = tiny_batch(3, 5)
    plain = _build()
    again = _build("trainer.recompute=full")
    again.load_state_dict(plain.state_dict())
    loss, gradients = _loss_and_gradients(plain, batch)
    loss_again, gradients_again = _loss_and_gradients(again, batch)
    assert torch.equal(loss, loss_again)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, gradients_again[name], msg=lambda text, name=name: f"{name}: {text}")


def test_recomputation_changes_no_gradient():
    run_world(1, _recompute)


def _frozen() -> None:
    model = _build("model.trainable.vision=false", "model.trainable.language=true")
    _, gradients = _loss_and_gradients(model, tiny_batch(3))
    assert not any(name.startswith("vision_model") for name in gradients)
    assert not model.vision_model.training
    assert any(name.startswith("mlp1") for name in gradients)
    model = _build("model.trainable.vision=true")
    _, gradients = _loss_and_gradients(model, tiny_batch(3))
    assert any(name.startswith("vision_model") for name in gradients)


def test_a_frozen_tower_gets_no_gradient_and_stays_in_eval_mode():
    run_world(1, _frozen)


def _text_only() -> None:
    model = _build("data.sampling=none", "model.vision=null", budget=1.0)
    loss, _ = _loss_and_gradients(model, tiny_batch(0))
    assert torch.isfinite(loss)


def test_a_model_without_vision_trains_on_text():
    run_world(1, _text_only)


def test_fp32_on_a_gpu_is_said_once_and_refused_where_logits_would_fill_it() -> None:
    from hybridprune_megatron.config import ConfigError
    from hybridprune_megatron.models.build import fp32_line

    assert fp32_line(tiny_config(), on_gpu=False) is None
    assert fp32_line(tiny_config("trainer.precision=bf16"), on_gpu=True) is None
    assert "bf16" in (fp32_line(tiny_config(), on_gpu=True) or "")
    assert fp32_line(tiny_config(pattern="M-M-"), on_gpu=True) is None
    long = tiny_config("model.max_sequence_length=20000", "data.sequence_length=20000")
    with pytest.raises(ConfigError, match=r"^trainer\.precision=fp32: on a GPU attention holds 20000 x 20000 logits"):
        fp32_line(long, on_gpu=True)
