"""Operations of one layer of each kind against counts written out pair by pair, and bytes against a list by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from hybridprune_megatron.config.schema import ExpertsConfig
from hybridprune_megatron.cost.prefill import head_cost, layer_operations
from hybridprune_megatron.cost.vision import projector_cost, tower_operations
from hybridprune_megatron.layers.operations import Cost, linear, sum_costs

# Small, all different, so that no two sizes can be confused.
MODEL = SimpleNamespace(
    hidden_size=11,
    ffn_hidden_size=13,
    num_attention_heads=6,
    num_query_groups=3,
    kv_channels=5,
    mamba_num_heads=4,
    mamba_head_dim=7,
    mamba_state_dim=3,
    mamba_num_groups=2,
    mamba_chunk_size=4,
    vocab_size=17,
)
LENGTHS = [6, 9]
TOKENS = 15


def layer_cost(model, symbol, lengths, width):
    return sum_costs(layer_operations(model, symbol, lengths, width).values())


def test_linear():
    # 2 rows, 3 inputs, 5 outputs: 30 multiply-adds; 6 + 15 + 10 numbers of 2 bytes.
    assert linear(2, 3, 5, 2) == Cost(60, 60, 62)


def test_attention_by_pairs():
    operations = layer_operations(MODEL, "*", LENGTHS, 4)
    # 6 query heads, 3 key heads and 3 value heads of width 5.
    assert operations["qkv"].flops == TOKENS * 11 * (30 + 15 + 15) * 2
    assert operations["out_proj"].flops == TOKENS * 30 * 11 * 2
    causal = full = 0
    for length in LENGTHS:
        for i in range(length):
            for j in range(length):
                # Each head multiplies and adds 5 channels for q.k and 5 for the weighted sum of v.
                full += 6 * (5 + 5) * 2
                causal += 6 * (5 + 5) * 2 if j <= i else 0
    assert (operations["attention"].flops, operations["attention"].executed) == (causal, full)
    # q and the output have 30 channels, k and v 15 each.
    assert operations["attention"].bytes == 4 * TOKENS * (30 + 15 + 15 + 30)


def test_mamba_by_pairs():
    operations = layer_operations(MODEL, "M", LENGTHS, 4)
    inner, state = 4 * 7, 2 * 3
    # z and x, B and C, dt.
    assert operations["in_proj"].flops == TOKENS * 11 * (2 * inner + 2 * state + 4) * 2
    assert operations["out_proj"].flops == TOKENS * inner * 11 * 2
    # Four taps for every channel of x, B and C.
    assert operations["conv"].flops == TOKENS * (inner + 2 * state) * 4 * 2
    # Plain torch puts three zeros behind both samples.
    assert operations["conv"].executed == (TOKENS + 2 * 3) * (inner + 2 * state) * 4 * 2
    causal = full = 0
    for start in range(0, TOKENS, 4):
        chunk = range(start, min(start + 4, TOKENS))
        for i in chunk:
            for j in chunk:
                # C_i . B_j in 2 groups of 3 states, its product with x_j in 4 heads of 7 channels.
                pair = 2 * (2 * 3) + 2 * (4 * 7)
                full += pair
                causal += pair if j <= i else 0
    # Every token writes dt x B^T to the state of its head (7 x 3) and reads C h from it.
    states = TOKENS * 4 * 2 * (2 * 7 * 3)
    assert (operations["scan"].flops, operations["scan"].executed) == (causal + states, full + states)
    # x, B, C read and y written; dt in fp32; the states (4 x 7 x 3, fp32) of 4 chunks written and read.
    assert operations["scan"].bytes == 4 * TOKENS * (inner + 2 * state + inner) + 4 * TOKENS * 4 + 2 * 4 * 4 * 84
    assert operations["gated_norm"].bytes == 4 * (TOKENS * 3 * inner + inner)


def test_mlp_and_head():
    operations = layer_operations(MODEL, "-", LENGTHS, 2)
    assert operations["fc1"].flops == operations["fc2"].flops == TOKENS * 11 * 13 * 2
    # Norm in and out with its weight; the two linears; the activation in and out; residual: two in, one out.
    norm, residual = TOKENS * 22 + 11, TOKENS * 33
    linears = 2 * (TOKENS * 11 + 11 * 13 + TOKENS * 13)
    assert sum_costs(operations.values()).bytes == 2 * (norm + linears + TOKENS * 26 + residual)
    assert head_cost(MODEL, TOKENS, 2, 4).flops == 2 * 11 * 17 * 2


def test_experts():
    def with_experts(**sizes):
        return SimpleNamespace(**vars(MODEL), experts=ExpertsConfig(**sizes))

    model = with_experts(num_experts=8, experts_per_token=3, ffn_hidden_size=5, shared_ffn_hidden_size=7)
    cost = layer_cost(model, "E", LENGTHS, 2)
    per_token = 11 * 8 + 3 * (2 * 11 * 5) + 2 * 11 * 7
    assert cost.flops == cost.executed == TOKENS * per_token * 2
    # A token that visits every expert costs an MLP as wide as all of them.
    wide = with_experts(num_experts=4, experts_per_token=4, ffn_hidden_size=5)
    mlp = SimpleNamespace(**{**vars(MODEL), "ffn_hidden_size": 20})
    router = TOKENS * 11 * 4 * 2
    assert layer_cost(wide, "E", LENGTHS, 2).flops == layer_cost(mlp, "-", LENGTHS, 2).flops + router
    # Latent experts: two linears round the routed ones, which read and write 3 numbers instead of 11.
    latent = with_experts(num_experts=4, experts_per_token=4, ffn_hidden_size=5, latent_size=3)
    assert layer_cost(latent, "E", LENGTHS, 2).flops == TOKENS * 2 * (11 * 4 + 2 * 11 * 3 + 4 * 2 * 3 * 5)


def test_unknown_symbol():
    with pytest.raises(ValueError, match=r"layer symbol 'X': allowed are M, \*, -, E"):
        layer_cost(MODEL, "X", LENGTHS, 2)


def test_vision_by_hand():
    vision = SimpleNamespace(
        hidden_size=6,
        num_layers=2,
        intermediate_size=10,
        patch_size=2,
        frame_size=8,
        num_cls_tokens=1,
        num_register_tokens=2,
        projector_hidden_size=5,
        projector_input_size=24,
        tokens_per_frame=4,
    )
    operations = tower_operations(vision, frames=3, width=4)
    # 4 x 4 patches of 2 x 2 x 3 numbers; 19 tokens a frame inside the blocks.
    assert operations["patches"].flops == 3 * 16 * 12 * 6 * 2
    assert operations["qkv"].flops == 2 * 3 * 19 * 6 * 18 * 2
    assert operations["attention"].flops == 2 * 3 * 19 * 19 * (6 + 6) * 2
    assert operations["fc1"].flops == 2 * 3 * 19 * 6 * 10 * 2
    # 4 tokens a frame, each 4 patches wide.
    assert projector_cost(vision, 11, frames=3, width=4).flops == 3 * 4 * (24 * 5 + 5 * 11) * 2
