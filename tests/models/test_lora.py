"""Adapters: what they compute, what learns, how they are split, stored and merged."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from tests.models.tiny import tiny_batch, tiny_config
from tests.worlds import run_world

_TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "in_proj", "out_proj", "projector")
_LORA = ("tuning=lora", "tuning.lora.rank=3", "tuning.lora.alpha=5", "optim.lr=0.01", "optim.warmup_steps=0")
_EVERYWHERE = (*_LORA, "model.trainable.projector=true", f"tuning.lora.targets=[{','.join(_TARGETS)}]")


def _build(*overrides: str, tensor: int = 1, noise: bool = True):
    """A model in eval mode; with ``noise`` its adapters are not at their start, where they add nothing."""
    from hybridprune_megatron.engine.parallel import init_model_parallel
    from hybridprune_megatron.models.build import build_model

    init_model_parallel(tensor=tensor, seed=1)
    model = build_model(tiny_config(*overrides, *(f"parallel.tensor={tensor}", f"trainer.devices={tensor}"))).eval()
    if noise:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("lora_b"):
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def _logits(model):
    # Nothing dropped: rounding must not decide about kept tokens.
    model.reduction = None
    with torch.no_grad():
        return model.logits(tiny_batch(3, 5))[0]


def _one_linear() -> None:
    """Both kinds of linears against ``norm(x) W^T + alpha / r norm(x) A^T B^T``."""
    model = _build(*_EVERYWHERE)
    layers = model.language_model.decoder.layers
    x = torch.randn(6, 1, 32)
    for linear, norm in ((layers[0].mixer.in_proj, True), (layers[1].mlp.linear_fc1, True), (model.mlp1[3], False)):
        seen = x[..., : linear.weight.shape[1]]
        if norm:
            weight = linear.layer_norm_weight.detach().mul_(0.7)
            normed = seen * torch.rsqrt(seen.square().mean(-1, keepdim=True) + 1e-5) * weight
        else:
            normed = seen
        expected = normed @ linear.weight.T + 5 / 3 * (normed @ linear.lora_a.T @ linear.lora_b.T)
        output = linear(seen)
        torch.testing.assert_close(output[0] if isinstance(output, tuple) else output, expected, rtol=1e-4, atol=1e-5)
    out_proj = layers[0].mixer.out_proj
    expected = x @ out_proj.weight.T + 5 / 3 * (x @ out_proj.lora_a.T @ out_proj.lora_b.T)
    torch.testing.assert_close(out_proj(x)[0], expected, rtol=1e-4, atol=1e-5)


def test_an_adapted_linear_is_the_formula():
    run_world(1, _one_linear)


def _start_and_merge() -> None:
    from hybridprune_megatron.models.lora import is_adapter, merge_adapters

    model = _build(*_EVERYWHERE, noise=False)
    plain = _build(noise=False)
    base = {name: value for name, value in model.state_dict().items() if not is_adapter(name)}
    assert base.keys() == plain.state_dict().keys()
    plain.load_state_dict(base)
    assert torch.equal(_logits(model), _logits(plain)), "a new adapter changes something"
    model = _build(*_EVERYWHERE)
    found = {name.split(".")[-2] for name, _ in model.named_parameters() if is_adapter(name)}
    assert found == {*_TARGETS[:-1], "1", "3"}
    adapted = _logits(model)
    assert (adapted - _logits(plain)).abs().max() > 0.1
    merge_adapters(model)
    torch.testing.assert_close(_logits(model), adapted, rtol=1e-4, atol=1e-4)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(_logits(plain), _logits(model))


def test_merged_weights_give_the_adapted_models_logits():
    run_world(1, _start_and_merge)


def _only_adapters_learn(*overrides: str) -> tuple[set[str], dict[str, torch.Tensor]]:
    from hybridprune_megatron.engine.optimization import build_train_state
    from hybridprune_megatron.engine.train_step import train_step

    cfg = tiny_config(*overrides)
    state = build_train_state(_build(*overrides), cfg.optim, cfg.trainer, cfg.parallel, torch.device("cpu"))
    before = {name: p.detach().clone() for name, p in state.module.named_parameters()}
    train_step(state, iter([tiny_batch(3, 5), tiny_batch(2)]), 2, 64, 1)
    after = dict(state.module.named_parameters())
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    return changed, {name: after[name].detach() for name in changed}


def _recomputed() -> None:
    from hybridprune_megatron.models.lora import is_adapter

    changed, plain = _only_adapters_learn(*_LORA)
    assert changed == {name for name, _ in _build(*_LORA).named_parameters() if is_adapter(name)}
    again, values = _only_adapters_learn(*_LORA, "trainer.recompute=full")
    # The first layer's input asks for no gradient here, and recomputation must record the layer all the same.
    assert again == changed
    for name, value in plain.items():
        torch.testing.assert_close(values[name], value, msg=partial("{}: {}".format, name))


def test_all_adapters_learn_and_nothing_else_recomputed_or_not():
    run_world(1, _recomputed)


def _train(weights: str, tensor: int, sequence_parallel: bool, dropout: float, folder: str) -> tuple[list[float], dict]:
    """Losses of four steps, a checkpoint in ``folder``, and this rank's replicated adapters."""
    from hybridprune_megatron.engine.checkpoint import CheckpointSaver
    from hybridprune_megatron.engine.optimization import build_train_state
    from hybridprune_megatron.engine.train_step import train_step
    from hybridprune_megatron.engine.weights import load_initial_weights

    overrides = (
        *(*_EVERYWHERE, f"tuning.lora.dropout={dropout}", f"parallel.sequence_parallel={sequence_parallel}"),
        *("trainer.global_batch_size=2", "reduction.select.multiple_of=2"),
    )
    cfg = tiny_config(*overrides, f"parallel.tensor={tensor}", f"trainer.devices={tensor}")
    model = _build(*overrides, tensor=tensor, noise=False)
    load_initial_weights(model, weights)
    state = build_train_state(model, cfg.optim, cfg.trainer, cfg.parallel, torch.device("cpu"))
    batches = [tiny_batch(3, 5, pad_to_multiple_of=2), tiny_batch(4, 2, 1, pad_to_multiple_of=2)]
    losses = [train_step(state, iter(batches), 2, 64, step).loss for step in range(1, 5)]
    CheckpointSaver(Path(folder)).save(4, state, {}, {}, {})
    replicated = {
        name: p.detach().tolist()
        for name, p in model.named_parameters()
        if "lora" in name and not getattr(p, "tensor_model_parallel", False)
    }
    return losses, replicated


def _write_weights(path: str) -> None:
    from hybridprune_megatron.engine.weights import save_weights

    save_weights(_build(*_EVERYWHERE), path)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """Adapters on every linear, as a file."""
    path = str(tmp_path_factory.mktemp("weights") / "adapted.safetensors")
    run_world(1, _write_weights, path)
    return path


def _compare(one: str, other: str) -> None:
    from hybridprune_megatron.engine.weights import load_initial_weights

    models = [_build(*_EVERYWHERE, noise=False) for _ in range(2)]
    for model, path in zip(models, (one, other)):
        load_initial_weights(model, f"{path}/step_00000004")
    others = dict(models[1].named_parameters())
    for name, parameter in models[0].named_parameters():
        torch.testing.assert_close(others[name], parameter, rtol=1e-3, atol=2e-5, msg=partial("{}: {}".format, name))


@pytest.fixture(scope="module")
def alone(weights, tmp_path_factory) -> tuple[list[float], str]:
    """Losses of one process, and where its checkpoint lies."""
    folder = str(tmp_path_factory.mktemp("alone"))
    return run_world(1, _train, weights, 1, False, 0.0, folder)[0][0], folder


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_two_ranks_train_and_store_adapters_as_one_process(weights, alone, sequence_parallel, tmp_path):
    expected, folder = alone
    assert expected[-1] < expected[0]
    for losses, _ in run_world(2, _train, weights, 2, sequence_parallel, 0.0, str(tmp_path)):
        assert losses == pytest.approx(expected, rel=2e-5)
    run_world(1, _compare, folder, str(tmp_path))


def test_replicated_adapters_stay_equal_under_dropout(weights, tmp_path):
    (losses, one), (others, two) = run_world(2, _train, weights, 2, False, 0.3, str(tmp_path))
    assert losses == others
    assert one == two
    assert one


def _base_and_back(folder: str) -> None:
    from hybridprune_megatron.engine.checkpoint import CheckpointSaver
    from hybridprune_megatron.engine.optimization import allocate_state, build_train_state
    from hybridprune_megatron.engine.weights import load_initial_weights, save_weights

    def write(model, name: str, cfg) -> list[Path]:
        save_weights(model, f"{folder}/{name}.safetensors")
        state = build_train_state(model, cfg.optim, cfg.trainer, cfg.parallel, torch.device("cpu"))
        allocate_state(state.optimizer)
        return [Path(folder) / f"{name}.safetensors", CheckpointSaver(Path(folder) / name).save(0, state, {}, {}, {})]

    base = _build(noise=False)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(1.1)
    logits = _logits(base)
    for path in write(base, "base", tiny_config()):
        adapted = _build(*_EVERYWHERE, noise=False)
        assert not torch.equal(_logits(adapted), logits)
        load_initial_weights(adapted, path)
        assert torch.equal(_logits(adapted), logits)
    for path in write(_build(*_EVERYWHERE), "adapted", tiny_config(*_EVERYWHERE)):
        with pytest.raises(ValueError, match=r"holds adapters that the model lacks: .*save_weights"):
            load_initial_weights(_build(noise=False), path)
        # Some adapters missing is another model, not a base.
        with pytest.raises(ValueError, match=r"of another model|in the model \(4"):
            load_initial_weights(_build(*_LORA[:1], "tuning.lora.rank=4", noise=False), path)


def test_a_base_checkpoint_loads_below_new_adapters_and_adapters_are_never_lost_silently(tmp_path):
    run_world(1, _base_and_back, str(tmp_path))
