"""The exported language model written out over the tokens of one sample: no packing, no chunks, no caches.

It is told which tokens enter which layer and computes the rest from the weights. Shape letters: L tokens of the sample,
D hidden size, H heads, P Mamba head width, N state size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hybridprune_megatron.models.encoder import encode_frames


@torch.no_grad()
def naive_logits(model: Any, hidden: Tensor, entering: Sequence[Tensor]) -> Tensor:
    """Logits of every token that enters the last layer.

    Args:
        model: the exported model.
        hidden: [L, D] embeddings of all tokens.
        entering: for every layer, rising positions of the tokens that enter it.

    Returns:
        [tokens of the last layer, vocabulary].
    """
    backbone = model.language_model.backbone
    low, high = (float(bound) for bound in model.config.time_step_limit)
    hidden = hidden.clone()
    for layer, symbol, rows in zip(backbone.layers, model.config.hybrid_override_pattern, entering, strict=True):
        normed = layer.norm(hidden[rows])
        if symbol == "M":
            out = _mamba(layer.mixer, normed, low, high)
        elif symbol == "*":
            out = _attention(layer.mixer, normed)
        else:
            out = layer.mixer.down_proj(torch.relu(layer.mixer.up_proj(normed)).square())
        hidden[rows] += out
    return model.language_model.lm_head(backbone.norm_f(hidden[entering[-1]]))


@torch.no_grad()
def embedded(model: Any, inputs: dict[str, Tensor], input_ids: Tensor) -> Tensor:
    """[L, D] embeddings of one sample's ids, its frames at the image tokens."""
    hidden = model.language_model.backbone.embeddings(input_ids)
    if inputs.get("pixel_values") is not None:
        shuffle = model.config.vision["pixel_shuffle"]
        frames = encode_frames(model.vision_model, model.mlp1, inputs["pixel_values"], shuffle, False)
        hidden[input_ids == model.config.image_token_id] = frames.flatten(0, 1)
    return hidden


def entering_layers(model: Any, input_ids: Tensor, kept: Sequence[Tensor]) -> list[Tensor]:
    """Per layer the kept visual tokens (positions) and every other token of a sample."""
    text = torch.nonzero(input_ids != model.config.image_token_id).flatten()
    return [torch.cat([text, visual]).sort().values for visual in kept]


def _mamba(mixer: Any, rows: Tensor, low: float, high: float) -> Tensor:
    """The recurrence, a token at a time."""
    inner, channels, heads = mixer.projection_sizes
    z, inputs, raw_dt = mixer.in_proj(rows).split([inner, channels, heads], 1)
    taps = mixer.conv1d.weight.squeeze(1)
    groups = (channels - inner) // 2 // mixer.state_size
    state = rows.new_zeros(heads, inner // heads, mixer.state_size)
    A, outputs = -torch.exp(mixer.A_log), []
    for token in range(len(rows)):
        window = [inputs[token - back] if token >= back else torch.zeros_like(inputs[0]) for back in (3, 2, 1, 0)]
        mixed = (torch.stack(window, 1) * taps).sum(1) + mixer.conv1d.bias
        x, B, C = (mixed * torch.sigmoid(mixed)).split([inner, (channels - inner) // 2, (channels - inner) // 2])
        x = x.view(heads, -1)
        B, C = (each.view(groups, -1).repeat_interleave(heads // groups, 0) for each in (B, C))
        dt = torch.log1p(torch.exp(raw_dt[token] + mixer.dt_bias))
        dt = torch.minimum(torch.maximum(dt, torch.tensor(low)), torch.tensor(high))
        state = state * torch.exp(dt * A)[:, None, None] + (dt[:, None] * x)[..., None] * B[:, None]
        y = (state * C[:, None]).sum(-1) + mixer.D[:, None] * x
        gated = y.flatten() * z[token] * torch.sigmoid(z[token])
        by_group = gated.view(groups, -1)
        scale = torch.rsqrt(by_group.square().mean(1, keepdim=True) + 1e-5)
        outputs.append((by_group * scale).flatten() * mixer.norm.weight)
    return mixer.out_proj(torch.stack(outputs))


def _attention(mixer: Any, rows: Tensor) -> Tensor:
    """The whole matrix, masked."""
    query, key, value = (proj(rows).unflatten(1, (-1, mixer.head_dim)) for proj in _projections(mixer))
    key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], 1) for each in (key, value))
    products = torch.einsum("ihe,jhe->hij", query, key) / mixer.head_dim**0.5
    ahead = torch.ones(len(rows), len(rows), dtype=torch.bool).triu(1)
    weights = products.masked_fill(ahead, float("-inf")).softmax(-1)
    return mixer.o_proj(torch.einsum("hij,jhe->ihe", weights, value).flatten(1))


def _projections(mixer: Any) -> tuple[Any, Any, Any]:
    return mixer.q_proj, mixer.k_proj, mixer.v_proj
