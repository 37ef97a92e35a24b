"""The model from precomputed features of its tower against the model from pixels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hybridprune_megatron.data.batch import FrameFeatures, no_pixels, pack
from tests.models.tiny import tiny_config, tiny_sample
from tests.worlds import run_world


def _model(*overrides: str):
    from hybridprune_megatron.engine.parallel import init_model_parallel
    from hybridprune_megatron.models.build import build_model

    init_model_parallel(seed=1)
    return build_model(tiny_config(*overrides)).train()


def _with_features(model, sample, dtype=torch.float32):
    """The same sample with what the tower makes of its frames."""
    from hybridprune_megatron.models.encoder import frame_tokens
    from hybridprune_megatron.models.video_language_model import tower_fingerprint

    values = frame_tokens(model.vision_model, sample.pixel_values, model.pixel_shuffle, False).to(dtype)
    features = FrameFeatures(values, tower_fingerprint(model.vision_model))
    return replace(sample, pixel_values=no_pixels(), frame_features=features)


def _loss_and_gradients(model, batch):
    model.zero_grad()
    loss = model(batch)
    loss.sum().backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _same_loss() -> None:
    model = _model()
    samples = [tiny_sample(index, frames) for index, frames in enumerate((3, 5, 0, 2))]
    loss, gradients = _loss_and_gradients(model, pack(samples))
    exact = [_with_features(model, sample) if len(sample.pixel_values) else sample for sample in samples]
    model.vision_model.register_forward_hook(lambda *_: pytest.fail("the tower ran"))
    loss_again, gradients_again = _loss_and_gradients(model, pack(exact))
    torch.testing.assert_close(loss_again, loss, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == gradients_again.keys()
    assert any(name.startswith("mlp1") for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, rtol=1e-6, atol=1e-6)
    # From here on without reduction: rounding moves tokens over the edge of selection.
    model.reduction = None
    loss, gradients = _loss_and_gradients(model, pack(exact))
    short = [
        replace(sample, frame_features=replace(each, values=each.values.bfloat16()))
        if (each := sample.frame_features) is not None
        else sample
        for sample in exact
    ]
    loss_short, gradients_short = _loss_and_gradients(model, pack(short).to("cpu"))
    assert not torch.equal(loss_short, loss)
    torch.testing.assert_close(loss_short, loss, rtol=0.02, atol=0.02)
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert (gradients_short[name] - gradient).abs().max() < 0.03 * largest, name
    # Another tower, or the same one after its weights moved.
    batch = pack(exact)
    with torch.no_grad():
        model.vision_model.load_state_dict({n: w + 0.1 if w.dim() > 1 else w for n, w in _state(model).items()})
    with pytest.raises(ValueError, match=r"features of tower [0-9a-f]{16}, the model's is [0-9a-f]{16}: precompute"):
        model(batch)


def _state(model):
    return {name: weight.clone() for name, weight in model.vision_model.state_dict().items()}


def test_loss_and_gradients_from_features_are_those_from_pixels():
    run_world(1, _same_loss)


def _fingerprint() -> None:
    from hybridprune_megatron.models.video_language_model import tower_fingerprint

    model = _model()
    name = tower_fingerprint(model.vision_model)
    assert name == tower_fingerprint(model.vision_model)
    weight = next(model.vision_model.parameters())
    with torch.no_grad():
        weight.view(-1)[-1] += 1.0
    assert tower_fingerprint(model.vision_model) != name
    with torch.no_grad():
        weight.view(-1)[-1] -= 1.0
    model.vision_model.bfloat16()
    assert tower_fingerprint(model.vision_model) == name
    model.vision_model.config.num_attention_heads *= 2
    assert tower_fingerprint(model.vision_model) != name


def test_a_tower_has_one_name_in_every_precision():
    run_world(1, _fingerprint)


def _evaluation() -> None:
    from hybridprune_megatron.evaluation.accuracy import evaluate
    from hybridprune_megatron.evaluation.held_out import Question
    from studies.demo.prefill import time_prefill

    model = _model()
    samples = [tiny_sample(index, frames) for index, frames in enumerate((3, 5, 2, 4))]
    stored = [_with_features(model, sample) for sample in samples]
    results = [
        evaluate(model, [Question(sample, "kind", "a", ("a", "b")) for sample in each], model.reduction, 60)
        for each in (samples, stored)
    ]
    assert results[0] == results[1]
    model.vision_model.register_forward_hook(lambda *_: pytest.fail("the tower ran"))
    assert "vision" in time_prefill(model, pack(stored), {"full": None}, rounds=1).seconds


def test_an_evaluation_of_features_is_that_of_pixels():
    run_world(1, _evaluation)
