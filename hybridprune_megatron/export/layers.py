"""Layers of the exported language model: prefill over a packed sequence, decoding over caches.

Shape letters: L packed tokens, S samples, D hidden size, H heads, K key-value heads, E head width, P Mamba head width,
G groups, N state size, V visual tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.integrations.accelerate import force_accelerate_hooks

from hybridprune_megatron.export.cache import AttentionCache, HybridCache, MambaCache
from hybridprune_megatron.export.configuration_hybridprune import HybridPruneConfig
from hybridprune_megatron.export.experts_layer import Expert, ExpertsMixture
from hybridprune_megatron.layers.kinds import KINDS
from hybridprune_megatron.method.dt_filter import filtered_steps
from hybridprune_megatron.method.layout import TokenLayout
from hybridprune_megatron.method.scorer import Scorer
from hybridprune_megatron.method.signals import AttentionSignals, MambaSignals
from hybridprune_megatron.ops.conv import causal_conv_silu
from hybridprune_megatron.ops.norm import gated_rms_norm
from hybridprune_megatron.ops.packed_attention import packed_attention
from hybridprune_megatron.ops.ssd import ssd_final_states, ssd_scan, ssd_step


@dataclass(frozen=True)
class Packing:
    """The packed sequence that enters a layer, with the indices that its operations want."""

    layout: TokenLayout
    sample_index: Tensor
    sample_position: Tensor
    dt_filter: float | None

    @staticmethod
    def of(layout: TokenLayout, dt_filter: float | None) -> Packing:
        """Finds the indices of a layout."""
        sample_index = layout.sample_index()
        return Packing(layout, sample_index, layout.sample_position(sample_index), dt_filter)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Packing:
        """The same on another device; asked for by accelerate, where layers lie on several."""
        return Packing.of(self.layout.to(device), self.dt_filter)


class GatedRMSNorm(nn.Module):
    """``rms_norm(y * silu(z))`` over groups of channels."""

    def __init__(self, width: int, group_width: int) -> None:
        super().__init__()
        self.group_width = group_width
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        return gated_rms_norm(y, z, self.weight, self.group_width)


class MambaMixer(nn.Module):
    """Mamba-2. In-projection rows are [z | x | B | C | dt]."""

    def __init__(self, config: HybridPruneConfig, index: int) -> None:
        super().__init__()
        self.index, self.chunk_size = index, config.chunk_size
        self.head_dim, self.state_size = config.mamba_head_dim, config.ssm_state_size
        self.time_step_limit = tuple(float(bound) for bound in config.time_step_limit)
        inner, state = config.mamba_num_heads * config.mamba_head_dim, config.n_groups * config.ssm_state_size
        channels = inner + 2 * state
        self.projection_sizes = [inner, channels, config.mamba_num_heads]
        self.channel_sizes = [inner, state, state]
        self.in_proj = nn.Linear(config.hidden_size, sum(self.projection_sizes), bias=False)
        self.conv1d = nn.Conv1d(channels, channels, config.conv_kernel, groups=channels)
        self.dt_bias = nn.Parameter(torch.zeros(config.mamba_num_heads))
        # A_log and D stay in fp32 whatever the model's dtype.
        self.A_log = nn.Parameter(torch.zeros(config.mamba_num_heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.ones(config.mamba_num_heads, dtype=torch.float32))
        self.norm = GatedRMSNorm(inner, inner // config.n_groups)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)

    @force_accelerate_hooks("conv1d")
    def forward(
        self, hidden: Tensor, packing: Packing | None, scorer: Scorer | None, cache: HybridCache | None
    ) -> tuple[Tensor, Tensor | None]:
        """As ``HybridLayer.forward``."""
        if packing is None:
            assert cache is not None, "one more token needs caches"
            return self._step(hidden, cache), None
        z, inputs, raw_dt = self.in_proj(hidden).split(self.projection_sizes, dim=-1)
        weight, bias = self._taps()
        x, B, C = self._heads(causal_conv_silu(inputs, weight, bias, packing.layout.sample_lengths))
        dt, A = self._steps(raw_dt)
        if packing.dt_filter is not None:
            dt = filtered_steps(dt, A, packing.layout, packing.dt_filter)
        scores = None
        if scorer is not None:
            with torch.no_grad():
                scores = scorer.score(MambaSignals(B, C, dt, A), packing.layout, self.index)
        if cache is not None:
            state = ssd_final_states(x, dt, A, B, packing.layout.cu_seqlens, packing.sample_index)
            cache.layers[self.index] = MambaCache(_last_rows(inputs, packing, weight.shape[1] - 1), state)
        y = ssd_scan(x, dt, A, B, C, self.D, packing.sample_index, self.chunk_size)
        return self.out_proj(self.norm(y.flatten(1), z)), scores

    def _step(self, hidden: Tensor, cache: HybridCache) -> Tensor:
        """One more token of every sample: [S, D] to [S, D]."""
        layer = cache.layers[self.index]
        assert isinstance(layer, MambaCache), type(layer)
        z, inputs, raw_dt = self.in_proj(hidden).split(self.projection_sizes, dim=-1)
        window = torch.cat([layer.inputs, inputs.unsqueeze(1)], 1)
        weight, bias = self._taps()
        mixed = (window * weight.T).sum(1) + bias
        x, B, C = self._heads(nn.functional.silu(mixed))
        dt, A = self._steps(raw_dt)
        y, layer.state = ssd_step(x, dt, A, B, C, self.D, layer.state)
        layer.inputs = window[:, 1:]
        return self.out_proj(self.norm(y.flatten(1), z))

    def _taps(self) -> tuple[Tensor, Tensor]:
        """Weights [channels, W] and bias [channels] of the convolution."""
        assert self.conv1d.bias is not None, "the convolution has a bias"
        return self.conv1d.weight.squeeze(1), self.conv1d.bias

    def _heads(self, convolved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [L, H, P], B and C [L, G, N]."""
        x, B, C = convolved.split(self.channel_sizes, dim=-1)
        groups = (-1, self.state_size)
        return x.unflatten(-1, (-1, self.head_dim)), B.unflatten(-1, groups), C.unflatten(-1, groups)

    def _steps(self, raw_dt: Tensor) -> tuple[Tensor, Tensor]:
        """Step sizes float32 [L, H] and decay rates float32 [H]."""
        dt = nn.functional.softplus(raw_dt.float() + self.dt_bias.float())
        return dt.clamp(*self.time_step_limit), -torch.exp(self.A_log.float())


class AttentionMixer(nn.Module):
    """Causal attention without position embedding."""

    def __init__(self, config: HybridPruneConfig, index: int) -> None:
        super().__init__()
        self.index, self.head_dim = index, config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(
        self, hidden: Tensor, packing: Packing | None, scorer: Scorer | None, cache: HybridCache | None
    ) -> tuple[Tensor, Tensor | None]:
        """As ``HybridLayer.forward``."""
        if packing is None:
            assert cache is not None, "one more token needs caches"
            return self._step(hidden, cache), None
        query, key, value = self._heads(hidden)
        lengths = packing.layout.sample_lengths
        scores = None
        if scorer is not None:
            with torch.no_grad():
                scores = scorer.score(AttentionSignals.of(query, key, packing.layout), packing.layout, self.index)
        if cache is not None:
            cache.layers[self.index] = AttentionCache(
                key, value, lengths, packing.sample_index, packing.sample_position
            )
        return self.o_proj(packed_attention(query, key, value, lengths)), scores

    def _step(self, hidden: Tensor, cache: HybridCache) -> Tensor:
        """One more token of every sample: [S, D] to [S, D]."""
        layer = cache.layers[self.index]
        assert isinstance(layer, AttentionCache), type(layer)
        query, key, value = self._heads(hidden)
        layer.append(key, value)
        return self.o_proj(layer.attend(query))

    def _heads(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [L, H, E], k and v [L, K, E]."""
        query, key, value = (
            proj(hidden).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return query, key, value


class MLPMixer(Expert):
    """Linear, squared ReLU, linear; keeps no state and scores nothing."""

    def __init__(self, config: HybridPruneConfig, index: int) -> None:
        super().__init__(config.hidden_size, config.intermediate_size)

    def forward(  # type: ignore[override]
        self, hidden: Tensor, packing: Packing | None, scorer: Scorer | None, cache: HybridCache | None
    ) -> tuple[Tensor, Tensor | None]:
        """As ``HybridLayer.forward``."""
        return super().forward(hidden), None


class ExpertsMixer(ExpertsMixture):
    """A mixture of experts; keeps no state and scores nothing."""

    def __init__(self, config: HybridPruneConfig, index: int) -> None:
        super().__init__(config)

    def forward(  # type: ignore[override]
        self, hidden: Tensor, packing: Packing | None, scorer: Scorer | None, cache: HybridCache | None
    ) -> tuple[Tensor, Tensor | None]:
        """As ``HybridLayer.forward``."""
        return super().forward(hidden), None


#: By kind of layer.
MIXERS: dict[str, type[nn.Module]] = {
    "mamba": MambaMixer,
    "attention": AttentionMixer,
    "mlp": MLPMixer,
    "experts": ExpertsMixer,
}


class HybridLayer(nn.Module):
    """``h + mixer(norm(h))``."""

    def __init__(self, config: HybridPruneConfig, symbol: str, index: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = MIXERS[KINDS[symbol].name](config, index)

    def forward(
        self, hidden: Tensor, packing: Packing | None, scorer: Scorer | None, cache: HybridCache | None
    ) -> tuple[Tensor, Tensor | None]:
        """A packed sequence, or one more token of every sample after the caches.

        Both go through ``forward``, where accelerate moves inputs and weights if layers lie on several devices.

        Args:
            hidden: [L, D]; without a packing [S, D], a token a sample.
            packing: of the sequence; None: one more token of every sample.
            scorer: scores the visual tokens; None: no scores.
            cache: gets the layer's state, or has it; None: nothing is kept.

        Returns:
            As ``hidden``, and the scores float32 [V] if asked for.
        """
        out, scores = self.mixer(self.norm(hidden), packing, scorer, cache)
        return hidden + out, scores


def _last_rows(values: Tensor, packing: Packing, count: int) -> Tensor:
    """[S, count, channels] the last rows of every sample, zeros before its start."""
    starts, ends = packing.layout.cu_seqlens[:-1].long(), packing.layout.cu_seqlens[1:].long()
    rows = ends.unsqueeze(1) - count + torch.arange(count, device=values.device)
    present = rows >= starts.unsqueeze(1)
    return values[rows.clamp(min=0)] * present.unsqueeze(-1)
