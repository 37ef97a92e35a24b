"""Layers of experts: a router, routed and shared experts, each an MLP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybridprune_megatron.layers.kind import Kept, LayerKind, ModelSizes, Parameters, norm_cost, residual_cost
from hybridprune_megatron.layers.mlp import two_linears
from hybridprune_megatron.layers.operations import Cost, elementwise, linear

_FP32 = 4


class Experts(LayerKind):
    """A mixture of experts."""

    symbol, name, label, colour = "E", "experts", "experts", "#009E73"
    huggingface = ("moe",)

    def fp8_widths(self, model: ModelSizes) -> list[tuple[str, int, bool]]:
        experts = _sizes(model)
        # Routed experts are whole on their ranks.
        return [
            ("model.experts.ffn_hidden_size", experts.ffn_hidden_size, False),
            ("model.experts.shared_ffn_hidden_size", experts.shared_ffn_hidden_size, True),
            ("model.experts.latent_size", experts.latent_size or 0, False),
        ]

    def operations(self, model: ModelSizes, lengths: Sequence[int], width: int) -> dict[str, Cost]:
        """Tokens are dropped by no capacity; all experts' weights are read once, as with many tokens."""
        experts, tokens, hidden = _sizes(model), sum(lengths), model.hidden_size
        visits = tokens * experts.experts_per_token
        inner = experts.latent_size or hidden
        latent, shared = {}, {}
        if experts.latent_size is not None:
            latent = {
                "to_latent": linear(tokens, hidden, inner, width),
                "from_latent": linear(tokens, inner, hidden, width),
            }
        if experts.shared_ffn_hidden_size:
            shared = two_linears("shared_", tokens, hidden, experts.shared_ffn_hidden_size, width)
        weights = 2 * inner * experts.ffn_hidden_size
        return {
            "norm": norm_cost(tokens, hidden, width),
            "router": linear(tokens, hidden, experts.num_experts, width),
            **latent,
            **two_linears("routed_", visits, inner, experts.ffn_hidden_size, width),
            "other_experts_weights": elementwise((experts.num_experts - 1) * weights, width),
            # Tokens are copied to their experts and the weighted results added up.
            "dispatch": elementwise(2 * (tokens + visits) * inner, width),
            **shared,
            "residual": residual_cost(tokens, hidden, width),
        }

    def parameters(self, model: ModelSizes) -> Parameters:
        experts, hidden = _sizes(model), model.hidden_size
        inner = experts.latent_size or hidden
        latent = 2 * hidden * inner if experts.latent_size is not None else 0
        return Parameters(
            2 * hidden * experts.shared_ffn_hidden_size,
            # Norm and router, whose correction bias is none of its parameters.
            hidden + experts.num_experts * hidden + latent,
            experts=2 * inner * experts.ffn_hidden_size * experts.num_experts,
        )

    def activations(self, model: ModelSizes, width: int, fused: bool) -> list[Kept]:
        """Even loads: a rank's part of the sequence visits as many experts as other ranks' tokens visit its own."""
        experts = _sizes(model)
        inner, visits = experts.latent_size or model.hidden_size, experts.experts_per_token
        latent = [Kept(name, inner, width, "sequence") for name in ("latent", "latent sum")]
        routed = visits * experts.ffn_hidden_size
        return [
            Kept("router", experts.num_experts, _FP32, "sequence"),
            *(latent if experts.latent_size is not None else []),
            Kept("permuted", visits * inner, width, "sequence"),
            *(Kept(name, routed, width, "sequence") for name in ("relu", "squared", "weighted")),
            Kept("expert outputs", visits * inner, width, "sequence"),
            *(
                Kept(name, experts.shared_ffn_hidden_size, width, "channels")
                for name in ("shared relu", "shared squared")
            ),
        ]


def _sizes(model: ModelSizes) -> Any:
    assert model.experts is not None, "a layer of experts comes with their sizes"
    return model.experts
