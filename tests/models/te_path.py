"""The layers over Transformer Engine, executed on a CPU (``tests.gpu_packages``); run as a program by ``test_te_path``.

python -m tests.models.te_path FOLDER [CHECK ...]

"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.gpu_packages import STATE, Product, install

if __name__ == "__main__":
    install()

import torch

from hybridprune_megatron.config.fp8_schema import TILE
from hybridprune_megatron.engine.weights import load_initial_weights, save_weights
from tests.models.tiny import tiny_batch, tiny_config
from tests.programs import run_checks

# Widths that all recipes can take: every linear's sides divide by 128.
WIDE = [
    *("model.hidden_size=128", "model.ffn_hidden_size=128", "model.num_attention_heads=4", "model.num_query_groups=2"),
    *("model.kv_channels=32", "model.mamba_num_heads=128", "model.mamba_head_dim=1", "model.mamba_state_dim=32"),
]
RECIPE_CLASS = {
    "tensorwise": "Float8CurrentScaling",
    "delayed": "DelayedScaling",
    "mxfp8": "MXFP8BlockScaling",
    "blockwise": "Float8BlockScaling",
}


def build(*overrides: str, spec: str = "te", **kwargs: Any) -> Any:
    from hybridprune_megatron.models import build as builder

    # There is no GPU to look for.
    builder.resolve_spec = lambda name: name
    torch.cuda.get_device_capability = lambda *_: (10, 0)
    return builder.build_model(tiny_config(f"model.spec={spec}", *overrides, **kwargs)).train()


def take_weights(target: Any, source: Any) -> None:
    ours, theirs = dict(target.named_parameters()), dict(source.named_parameters())
    assert {name: p.shape for name, p in ours.items()} == {name: p.shape for name, p in theirs.items()}
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(theirs[name])


def run(model: Any, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[Product]]:
    """Losses, gradients, and the products of the pass."""
    STATE.products.clear()
    model.zero_grad()
    loss = model(batch)
    loss.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, list(STATE.products)


def assert_same_gradients(
    found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = 1e-5
) -> None:
    assert found.keys() == wanted.keys(), sorted(found.keys() ^ wanted.keys())[:4]
    for name, gradient in wanted.items():
        error, size = float((found[name] - gradient).norm()), float(gradient.norm())
        assert error <= tolerance * size + 1e-4 * tolerance, (name, error, size)


#: Overrides, budget, frames of the packed samples.
CASES: tuple[tuple[list[str], float, tuple[int, ...]], ...] = (
    ([], 1.0, (4,)),
    ([], 0.5, (3, 5, 2)),
    (["trainer.recompute=full", "model.time_step_min=0.01"], 0.4, (3, 5)),
    (["trainer.recompute=selective", "reduction=longmamba"], 0.5, (3, 0, 2)),
    (["tuning=lora", "tuning.lora.rank=4"], 0.5, (3, 5, 2)),
)


def same_as_torch(cases: Sequence[tuple[list[str], float, tuple[int, ...]]] = CASES, tolerance: float = 1e-5) -> None:
    for overrides, budget, frames in cases:
        plain = build(*overrides, spec="torch", budget=budget)
        with torch.no_grad():
            # Adapters start at zero, norms at one: neither would show whether it is used.
            for parameter in plain.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        model = build(*overrides, budget=budget)
        take_weights(model, plain)
        loss, gradients, products = run(model, tiny_batch(*frames))
        loss_plain, gradients_plain, none = run(plain, tiny_batch(*frames))
        assert not none, "the torch layers ran Transformer Engine's"
        assert products, "the te layers did not"
        torch.testing.assert_close(loss, loss_plain, rtol=tolerance, atol=tolerance / 10)
        assert_same_gradients(gradients, gradients_plain, tolerance)


def layers_in_fp8() -> None:
    for recipe in TILE:
        _one_recipe(recipe, "none", 1, 1)
        _one_recipe(recipe, "full", 0, 2)
    _one_recipe("tensorwise", "selective", 2, 0)


def _one_recipe(recipe: str, recompute: str, start: int, end: int) -> None:
    overrides = [*WIDE, f"fp8={recipe}", "trainer.precision=bf16", f"trainer.recompute={recompute}"]
    overrides += [f"fp8.num_layers_at_start_in_bf16={start}", f"fp8.num_layers_at_end_in_bf16={end}"]
    overrides += ["data.sequence_length=512", "tuning=lora", "tuning.lora.rank=4"]
    model = build(*overrides, budget=0.5)
    decoder = model.language_model.decoder
    assert decoder.multiple_of == TILE[recipe]
    closed = STATE.closed
    # Rows of every layer divide by the tile, behind drops too: the linears here look.
    loss, gradients, products = run(model, tiny_batch(30, 40, 26, pad_to_multiple_of=decoder.multiple_of))
    assert bool(loss.isfinite().all())
    assert all("lora" in name or "mlp1" in name for name in gradients)
    last = len(decoder.layers) - end
    quantized = range(len(decoder.layers)) if recipe == "delayed" else range(start, last)
    layer_of = {module: index for index, layer in enumerate(decoder.layers) for module in layer.modules()}
    passes = {False} | ({True} if recompute == "full" else set())
    seen = {(layer_of[p.module], p.recomputing, p.recipe) for p in products}
    wanted = {
        (index, again, RECIPE_CLASS[recipe] if index in quantized else None)
        for index in range(len(decoder.layers))
        for again in passes
    }
    assert seen == wanted, (recipe, recompute, sorted(map(str, seen ^ wanted)))
    # One context for all layers, or one a layer and pass.
    assert STATE.closed - closed == (1 if recipe == "delayed" else len(quantized) * len(passes))
    assert STATE.recipe is None


def experts_are_the_same() -> None:
    """Experts in one grouped product equal one expert after the other; with FP8 their rows are whole tiles."""
    overrides = [*WIDE, "model=demo_experts", "model.experts.ffn_hidden_size=128", "model.experts.latent_size=128"]
    cfg: dict[str, Any] = {"pattern": "ME*EM", "budget": 0.5}
    plain, model = build(*overrides, spec="torch", **cfg), build(*overrides, **cfg)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    path = Path(sys.argv[1]) / "experts.safetensors"
    save_weights(plain, path)
    load_initial_weights(model, path)
    loss, gradients, _ = run(model, tiny_batch(3, 5, 2))
    loss_plain, gradients_plain, _ = run(plain, tiny_batch(3, 5, 2))
    torch.testing.assert_close(loss, loss_plain, rtol=1e-5, atol=1e-6)
    renamed = {
        re.sub(r"experts\.(linear_fc\d)\.weight(\d+)", r"experts.local_experts.\2.\1.weight", name): g
        for name, g in gradients.items()
    }
    assert_same_gradients(renamed, gradients_plain)
    # No rounding to FP8 here: what differs from bf16 would be rows that were filled up and counted.
    losses = []
    for fp8 in ("none", *TILE):
        half = build(
            *overrides, "trainer.precision=bf16", f"fp8={fp8}", "data.sequence_length=512", pattern="ME*EM", budget=1.0
        )
        load_initial_weights(half, path)
        loss, _, products = run(half, tiny_batch(3, 5, 2, pad_to_multiple_of=128))
        losses.append(loss)
        if fp8 in ("tensorwise", "mxfp8"):
            grouped = [p for p in products if type(p.module).__name__.endswith("GroupedLinear")]
            assert grouped
            assert {p.recipe for p in grouped} == {RECIPE_CLASS[fp8]}
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=0.02, atol=0.02)


def settings_of_a_recipe() -> None:
    config = build(*WIDE, "fp8=delayed", "trainer.precision=bf16", "fp8.amax_history_len=7").config
    assert (config.fp8, config.fp8_recipe, config.first_last_layers_bf16) == ("hybrid", "delayed", False)
    assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo, config.fp8_param) == (7, "max", False)
    # Or evaluation between two steps would multiply by the weights of the step before.
    assert config.disable_parameter_transpose_cache
    assert build(*WIDE, "fp8=mxfp8", "trainer.precision=bf16").config.fp8 == "e4m3"
    assert not build(*WIDE).config.fp8


def filling_does_not_move_scales() -> None:
    overrides = [*WIDE, "trainer.precision=bf16", "data.sequence_length=512"]
    plain = build(*overrides, budget=1.0)
    model = build(*overrides, "fp8=blockwise", budget=1.0)
    with torch.no_grad():
        for parameter in plain.language_model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        # A token that no text has: one channel, and nothing else.
        row = plain.language_model.embedding.word_embeddings.weight[0]
        row.zero_()[0] = 30.0
    take_weights(model, plain)
    bare, filled = tiny_batch(3, 5, 2), tiny_batch(3, 5, 2, pad_to_multiple_of=128)
    missing = len(filled.input_ids) - len(bare.input_ids)
    assert missing > 16, "nothing to see"
    for batch in (bare, filled):
        batch.input_ids.clamp_(min=1)
    wanted = [p.largest for p in run(plain, bare)[2]]
    found = [p.largest for p in run(model, filled)[2]]
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted):
        assert abs(one - other) <= 0.02 * other, (one, other)
    # Padding with that token is what moves them.
    filled.input_ids[-missing:] = 0
    padded = [p.largest for p in run(model, filled)[2]]
    assert max(one / other for one, other in zip(padded, wanted)) > 1.5, (padded, wanted)


def attention_under_context_parallelism_is_ours() -> None:
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    from hybridprune_megatron.models.specs import stack_spec
    from hybridprune_megatron.models.torch_layers import PackedAttention

    for context, kind in ((1, TEDotProductAttention), (2, PackedAttention)):
        layer = stack_spec("te", {}, None, context).submodules.attention_layer
        assert issubclass(layer.submodules.self_attention.submodules.core_attention, kind)


def weights_go_either_way() -> None:
    folder = Path(sys.argv[1])
    models = {spec: build(spec=spec) for spec in ("torch", "te")}
    for source, target in (("torch", "te"), ("te", "torch")):
        with torch.no_grad():
            for parameter in models[source].parameters():
                parameter.uniform_(-1, 1)
        path = folder / f"{source}.safetensors"
        save_weights(models[source], path)
        load_initial_weights(models[target], path)
        theirs = dict(models[target].named_parameters())
        for name, parameter in models[source].named_parameters():
            assert torch.equal(parameter, theirs[name]), (source, name)


CHECKS: tuple[Callable[[], None], ...] = (
    same_as_torch,
    layers_in_fp8,
    experts_are_the_same,
    settings_of_a_recipe,
    filling_does_not_move_scales,
    attention_under_context_parallelism_is_ours,
    weights_go_either_way,
)


if __name__ == "__main__":
    run_checks(CHECKS)
