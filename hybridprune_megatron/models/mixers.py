"""Reduction-aware mixers: attention and Mamba-2 that score their visual tokens with what they compute anyway.

Shape letters: L tokens, H heads of this rank, P head width, G groups of this rank, N state size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from hybridprune_megatron.method.dt_filter import filtered_steps
from hybridprune_megatron.method.signals import AttentionSignals, MambaSignals
from hybridprune_megatron.models.mamba_ops import MambaOps
from hybridprune_megatron.models.packed import LayerPacking
from hybridprune_megatron.models.torch_layers import parameter_device


def scoring_attention(core_attention: type[nn.Module]) -> type[nn.Module]:
    """A core attention that also scores: the given one with a look at q and k before it runs."""

    class ScoringAttention(core_attention):  # type: ignore[misc, valid-type]
        def forward(
            self, query: Tensor, key: Tensor, *args: Any, packed_seq_params: LayerPacking, **kwargs: Any
        ) -> Tensor:
            packing = packed_seq_params
            scorer = packing.asking
            if scorer is not None:
                with torch.no_grad():
                    signals = _attention_signals(query.detach(), key.detach(), packing)
                    packing.keep(scorer, signals, self.layer_number - 1)
            return super().forward(query, key, *args, packed_seq_params=packed_seq_params, **kwargs)

    ScoringAttention.__name__ = f"Scoring{core_attention.__name__}"
    return ScoringAttention


def _attention_signals(query: Tensor, key: Tensor, packing: LayerPacking) -> AttentionSignals:
    """From this rank's tokens: the query tokens' rows of all ranks, and the keys that are here."""
    layout, shard = packing.layout, packing.shard
    if shard is None:
        return AttentionSignals.of(query, key, layout)
    rows = shard.rows_everywhere(query, layout.query_index, layout.num_tokens)
    return AttentionSignals(rows, key, shard.keys(layout.num_tokens, key.device))


class GatedRMSNorm(nn.Module):
    """``rms_norm(y * silu(z))`` over groups of channels.

    Args:
        config: parameter dtype and device.
        ops: computes it.
        width: channels of this rank.
        group_width: channels normalised together.
        tp_group: ranks over which the channels are sharded.
    """

    def __init__(self, config: TransformerConfig, ops: MambaOps, width: int, group_width: int, tp_group: Any) -> None:
        super().__init__()
        self.ops = ops
        self.group_width = group_width
        self.tp_group = tp_group
        self.weight = nn.Parameter(torch.ones(width, dtype=config.params_dtype, device=parameter_device(config)))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        return self.ops.gated_norm(y, z, self.weight, self.group_width)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Weight sharded over channels."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class ReductionMambaMixer(MambaMixer):
    """Mamba-2 mixer that computes convolution and scan itself, so that B, C and dt are there to score with.

    Parameter names, sharding and checkpoint keys are the stock mixer's (whose ``sharded_state_dict`` is inherited); its
    constructor and forward are not used, for they need CUDA and hide B, C and dt inside one kernel.

    Args:
        config: model configuration (mamba_num_heads, mamba_head_dim, mamba_state_dim, mamba_num_groups).
        submodules: in_proj (with the layer's norm) and out_proj.
        d_model: hidden size.
        ops: convolution and scan.
        d_conv: taps of the convolution.
        chunk_size: tokens a chunk of the scan.
        time_step_min: lowest step size dt after the softplus; 0: no clamp.
        layer_number: 1-based.
        pg_collection: process groups.
        pp_layer_offset: unused; part of the builder's interface.
        name: unused; part of the builder's interface.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaMixerSubmodules,
        d_model: int,
        ops: MambaOps,
        d_conv: int = 4,
        chunk_size: int = 128,
        time_step_min: float = 0.0,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
        pp_layer_offset: int = 0,
        name: str | None = None,
    ) -> None:
        MegatronModule.__init__(self, config)
        assert pg_collection is not None, "pg_collection must be provided"
        self.config, self.ops = config, ops
        self.d_model, self.d_conv, self.chunk_size = d_model, d_conv, chunk_size
        self.time_step_min = time_step_min
        self.layer_number = layer_number
        self.pg_collection, self.tp_group = pg_collection, pg_collection.tp
        self.d_state, self.headdim = config.mamba_state_dim, config.mamba_head_dim
        self.ngroups, self.nheads = config.mamba_num_groups, config.mamba_num_heads
        self.d_inner = self.nheads * self.headdim
        tp = self.tp_group.size()
        self.nheads_local_tp, self.ngroups_local_tp = self.nheads // tp, self.ngroups // tp
        self.d_inner_local_tp = self.d_inner // tp
        linear = {"config": config, "bias": False, "is_expert": False, "tp_group": self.tp_group}
        self.in_proj = build_module(
            submodules.in_proj,
            d_model,
            2 * self.d_inner + 2 * self.ngroups * self.d_state + self.nheads,
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="fc1",
            **linear,
        )
        self.in_proj.weight.partition_sizes = self.in_proj_sizes
        self._build_state_parameters()
        self.context = pg_collection.cp.size()
        if self.context > 1:
            self._share_heads(pg_collection.cp.rank())
        self.norm = GatedRMSNorm(
            config, ops, self.d_inner_local_tp, self.d_inner_local_tp // self.ngroups_local_tp, self.tp_group
        )
        self.out_proj = build_module(
            submodules.out_proj,
            self.d_inner,
            d_model,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="fc2",
            **linear,
        )

    @property
    def in_proj_sizes(self) -> list[int]:
        """Rows of z, x, B, C, dt in this rank's input projection."""
        state = self.ngroups_local_tp * self.d_state
        return [self.d_inner_local_tp, self.d_inner_local_tp, state, state, self.nheads_local_tp]

    def _build_state_parameters(self) -> None:
        """Convolution, step bias, decay and skip, with the initial values of the Mamba-2 paper's code."""
        config, sizes = self.config, self.in_proj_sizes
        device, dtype = parameter_device(config), config.params_dtype
        channels = sum(sizes[1:4])
        heads = self.nheads_local_tp
        with get_cuda_rng_tracker().fork():
            bound = self.d_conv**-0.5
            self.conv1d_weight = nn.Parameter(torch.empty(channels, 1, self.d_conv, device=device, dtype=dtype))
            self.conv1d_bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
            nn.init.uniform_(self.conv1d_weight, -bound, bound)
            nn.init.uniform_(self.conv1d_bias, -bound, bound)
            # Steps between 0.001 and 0.1, spread evenly in the logarithm; the bias is their inverse softplus.
            steps = torch.exp(torch.rand(heads, device=device) * math.log(100.0) + math.log(1e-3)).clamp(min=1e-4)
            self.dt_bias = nn.Parameter((steps + torch.log(-torch.expm1(-steps))).to(dtype))
            self.A_log = nn.Parameter(torch.log(torch.empty(heads, device=device).uniform_(1, 16)))
        # A_log and D stay in fp32 whatever the parameter dtype.
        self.D = nn.Parameter(torch.ones(heads, device=device))
        for parameter in (self.A_log, self.D):
            # Read where a model is cast to bf16.
            parameter.keep_fp32 = True  # type: ignore[attr-defined]
        for parameter in (self.conv1d_weight, self.conv1d_bias, self.dt_bias, self.A_log, self.D):
            set_tensor_model_parallel_attributes(parameter, True, 0, 1)
        self.conv1d_weight.partition_sizes = self.conv1d_bias.partition_sizes = sizes[1:4]  # type: ignore[attr-defined]

    def _share_heads(self, rank: int) -> None:
        """Which channels each context-parallel rank convolves and scans: its heads, and the groups that they read."""
        ranks, heads, groups = self.context, self.nheads_local_tp, self.ngroups_local_tp
        inner, state = self.d_inner_local_tp, self.ngroups_local_tp * self.d_state
        # Of x, B, C, dt side by side; two ranks may read the same group.
        starts = (0, inner, inner + state, inner + 2 * state)
        each_groups = max(groups // ranks, 1)
        columns = []
        for each in range(ranks):
            group = each * groups // ranks
            for start, unit, first, count in (
                (starts[0], self.headdim, each * heads // ranks, heads // ranks),
                (starts[1], self.d_state, group, each_groups),
                (starts[2], self.d_state, group, each_groups),
                (starts[3], 1, each * heads // ranks, heads // ranks),
            ):
                columns.append(torch.arange(start + first * unit, start + (first + count) * unit))
        device = parameter_device(self.config)
        self.register_buffer("exchanged", torch.cat(columns).to(device), persistent=False)
        # Of this rank: channels of the convolution, and heads.
        own = torch.cat(columns[4 * rank : 4 * rank + 3]).to(device)
        self.register_buffer("own_channels", own, persistent=False)
        self.own_heads = slice(rank * heads // ranks, (rank + 1) * heads // ranks)
        width = self.headdim * heads // ranks
        self.own_sizes = [width, each_groups * self.d_state, each_groups * self.d_state, heads // ranks]

    def train(self, mode: bool = True) -> MegatronModule:
        """Skips the stock mixer's decode cache, which does not exist here."""
        return nn.Module.train(self, mode)

    def forward(
        self, hidden_states: Tensor, inference_context: Any = None, *, packed_seq_params: LayerPacking
    ) -> tuple[Tensor, Tensor | None]:
        """Mixes a packed sequence and scores it if asked to.

        Args:
            hidden_states: [L, 1, d_model], or this rank's part of L under sequence parallelism.
            inference_context: not supported.
            packed_seq_params: the packing; gets the scores.

        Returns:
            [L, 1, d_model] like the input, and no bias.
        """
        assert inference_context is None, "generation runs in the exported model"
        packing = packed_seq_params
        projected, _ = self.in_proj(hidden_states)
        sizes = self.in_proj_sizes
        z, x_B_C_dt = projected.squeeze(1).split([sizes[0], sum(sizes[1:])], dim=-1)
        if self.context == 1:
            y = self._mixed(x_B_C_dt, sizes[1:], slice(None), slice(None), packing)
        else:
            assert packing.shard is not None, "context parallelism comes with shards"
            packing.heads_group = self.pg_collection.tp_cp
            whole = packing.shard.to_heads(x_B_C_dt.index_select(1, self.exchanged))
            y = self._mixed(whole, self.own_sizes, self.own_channels, self.own_heads, packing)
            y = packing.shard.to_tokens(y)
        return self.out_proj(self.norm(y, z).unsqueeze(1))

    def _mixed(self, x_B_C_dt: Tensor, *how: Any) -> Tensor:
        """``_mix``, of which backward keeps the input only where recomputation is selective."""
        if self.config.recompute_granularity == "selective" and self.training:
            return tensor_parallel.checkpoint(lambda inputs: self._mix(inputs, *how), False, x_B_C_dt)
        return self._mix(x_B_C_dt, *how)

    def _mix(
        self, x_B_C_dt: Tensor, sizes: list[int], channels: slice | Tensor, heads: slice, packing: LayerPacking
    ) -> Tensor:
        """Convolution, scores and scan of all tokens.

        Args:
            x_B_C_dt: [L, sum of sizes].
            sizes: channels of x, B, C and dt.
            channels: which of the convolution's channels these are.
            heads: which heads these are.
            packing: the packing; gets the scores.

        Returns:
            [L, channels of x].
        """
        x_B_C, raw_dt = x_B_C_dt.split([sum(sizes[:3]), sizes[3]], dim=-1)
        conv_weight, conv_bias = self.conv1d_weight.squeeze(1)[channels], self.conv1d_bias[channels]
        x, B, C = self.ops.conv(x_B_C, conv_weight, conv_bias, packing).split(sizes[:3], dim=-1)
        x = x.unflatten(-1, (-1, self.headdim))
        B, C = B.unflatten(-1, (-1, self.d_state)), C.unflatten(-1, (-1, self.d_state))
        dt = nn.functional.softplus(raw_dt.float() + self.dt_bias[heads].float())
        if self.time_step_min:
            dt = dt.clamp(min=self.time_step_min)
        A = -torch.exp(self.A_log[heads].float())
        if packing.dt_filter is not None:
            dt = filtered_steps(dt, A, packing.layout, packing.dt_filter)
        scorer = packing.asking
        if scorer is not None:
            with torch.no_grad():
                signals = MambaSignals(B.detach(), C.detach(), dt.detach(), A.detach())
                packing.keep(scorer, signals, self.layer_number - 1)
        return self.ops.scan(x, dt, A, B, C, self.D[heads], packing, self.chunk_size).flatten(1)
