"""Both layer sets on a GPU, and every FP8 recipe; run as a program by ``test_layer_sets``.

python -m tests.gpu.layer_sets FOLDER [CHECK ...]
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from hybridprune_megatron.config.fp8_schema import TILE
from hybridprune_megatron.method.layout import TokenLayout
from tests.models.tiny import tiny_batch, tiny_config
from tests.programs import run_checks

# Sizes that the kernels of the published models know, and that every recipe's tiles divide.
SIZES = [
    *("model.hidden_size=256", "model.ffn_hidden_size=512", "model.num_attention_heads=4", "model.num_query_groups=2"),
    *("model.kv_channels=64", "model.mamba_num_heads=128", "model.mamba_head_dim=16", "model.mamba_state_dim=64"),
    *("model.mamba_chunk_size=64", "model.init_std=0.05", "data.sequence_length=1024"),
]
# Tokens are chosen without looking at activations, so that all precisions keep the same.
BLIND = "reduction=uniform"
LOWEST = {"tensorwise": (8, 9), "delayed": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
CASES = [
    (["reduction=none"], (33,)),
    (["reduction=none"], (3, 20, 1)),
    ([BLIND, "reduction.budget=0.5"], (3, 20, 14)),
    ([BLIND, "reduction.budget=0.25", "trainer.recompute=full"], (30, 40)),
    ([BLIND, "reduction.budget=0.5", "trainer.recompute=selective", "model.time_step_min=0.01"], (21, 2)),
]


def build(spec: str, precision: str, *overrides: str) -> Any:
    from hybridprune_megatron.models.build import build_model

    cfg = tiny_config(*SIZES, f"model.spec={spec}", f"trainer.precision={precision}", *overrides, budget=1.0)
    return build_model(cfg).cuda().train()


def take_weights(target: Any, source: Any) -> None:
    with torch.no_grad():
        theirs = dict(source.named_parameters())
        for name, parameter in target.named_parameters():
            parameter.copy_(theirs[name])


def disturb(model: Any) -> None:
    """Norms and skips away from one, where a kernel could leave them out unseen; all weights as bf16 has them."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
            parameter.copy_(parameter.bfloat16())


def run(model: Any, batch: Any) -> dict[str, torch.Tensor]:
    """Losses, logits and gradients in float32."""
    model.zero_grad()
    loss = model(batch)
    loss.sum().backward()
    found = {f"gradient of {name}": p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        found["logits"] = model.logits(batch)[0].float()
    return found | {"losses": loss.detach().float()}


def both_sets_agree() -> None:
    """The te set in bf16 is as near to plain torch in fp32 as twice what plain torch in bf16 is."""
    for overrides, frames in CASES:
        exact = build("torch", "fp32", *overrides)
        disturb(exact)
        batch = tiny_batch(*frames).to("cuda")
        wanted = run(exact, batch)
        errors: dict[str, dict[str, float]] = {}
        for spec in ("torch", "te"):
            model = build(spec, "bf16", *overrides)
            take_weights(model, exact)
            found = run(model, batch)
            assert found.keys() == wanted.keys(), sorted(found.keys() ^ wanted.keys())[:4]
            errors[spec] = {name: float((found[name] - wanted[name]).norm()) for name in wanted}
        for name, own in errors["torch"].items():
            # Beside the rounding of the result itself.
            allowed = 2 * own + 2**-8 * float(wanted[name].norm())
            assert errors["te"][name] <= allowed, (overrides, frames, name, errors["te"][name], own)


# All recipes are to keep the tokens that the one with the largest tile keeps.
REDUCED = (BLIND, "reduction.budget=0.5", "reduction.select.multiple_of=128")


def losses_of(recipe: str, start: Any, steps: int = 8) -> list[float]:
    """Losses of a few steps of AdamW on one batch.

    Args:
        recipe: a file of ``conf/fp8``.
        start: a model with the weights to start from.
        steps: how many.
    """
    model = build("te", "bf16", *REDUCED, f"fp8={recipe}")
    take_weights(model, start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    batch = tiny_batch(*(5 + sample for sample in range(12)), pad_to_multiple_of=128).to("cuda")
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(batch).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def every_recipe_trains_like_bf16() -> None:
    start = build("torch", "fp32", *REDUCED)
    disturb(start)
    wanted = losses_of("none", start)
    assert wanted[-1] < wanted[0]
    capability = torch.cuda.get_device_capability()
    for recipe in TILE:
        if capability < LOWEST[recipe]:
            with pytest.raises(ValueError, match="needs compute capability"):
                losses_of(recipe, start)
            continue
        found = losses_of(recipe, start)
        assert all(abs(one / other - 1) < 0.01 for one, other in zip(found, wanted)), (recipe, found, wanted)


def native_operators_keep_the_same_tokens() -> None:
    """Scores of the kernels against plain torch, inside of the te set's model, in bf16."""
    for reduction in ("query", "query_with_decay", "query_softmax", "query_max_groups"):
        model = build("te", "bf16", f"reduction={reduction}", "reduction.budget=0.3")
        batch = tiny_batch(20, 33, 14).to("cuda")
        kept: dict[str, list[TokenLayout]] = {}
        for setting in ("0", "1"):
            os.environ["HYBRIDPRUNE_KERNELS"] = setting
            kept[setting] = []
            with torch.no_grad():
                model.logits(batch, trace=kept[setting])
        for plain, fast in zip(kept["0"], kept["1"], strict=True):
            same = torch.isin(plain.origin, fast.origin).float().mean()
            # Scores that are equal but for the rounding of sums may change places.
            assert plain.num_tokens == fast.num_tokens
            assert same > 0.99, (reduction, float(same))


def a_batch_without_frames_runs() -> None:
    for spec in ("torch", "te"):
        model = build(spec, "bf16", "reduction=query", "reduction.budget=0.5")
        batch = tiny_batch(0, 0).to("cuda")
        assert bool(model(replace(batch)).isfinite().all()), spec


CHECKS: tuple[Callable[[], None], ...] = (
    both_sets_agree,
    every_recipe_trains_like_bf16,
    native_operators_keep_the_same_tokens,
    a_batch_without_frames_runs,
)

if __name__ == "__main__":
    run_checks(CHECKS)
