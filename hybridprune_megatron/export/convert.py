"""Parameter names of the training model (unsplit) and of the export, both ways.

The table below is the whole mapping; only the fused query-key-value projection changes its contents. A name that is in
no table, and one that a table expects and the weights lack, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridprune_megatron.method.schedule import layer_symbols

_MEGATRON, _HF = "language_model.decoder.layers.{}.", "language_model.backbone.layers.{}."
_MODEL_NAMES = {
    "language_model.embedding.word_embeddings.weight": "language_model.backbone.embeddings.weight",
    "language_model.decoder.final_norm.weight": "language_model.backbone.norm_f.weight",
    "language_model.output_layer.weight": "language_model.lm_head.weight",
}
_LAYER_NAMES = {
    "M": {
        "mixer.in_proj.layer_norm_weight": "norm.weight",
        "mixer.in_proj.weight": "mixer.in_proj.weight",
        "mixer.conv1d_weight": "mixer.conv1d.weight",
        "mixer.conv1d_bias": "mixer.conv1d.bias",
        "mixer.A_log": "mixer.A_log",
        "mixer.D": "mixer.D",
        "mixer.dt_bias": "mixer.dt_bias",
        "mixer.norm.weight": "mixer.norm.weight",
        "mixer.out_proj.weight": "mixer.out_proj.weight",
    },
    "*": {
        "self_attention.linear_qkv.layer_norm_weight": "norm.weight",
        "self_attention.linear_proj.weight": "mixer.o_proj.weight",
    },
    "-": {
        "mlp.linear_fc1.layer_norm_weight": "norm.weight",
        "mlp.linear_fc1.weight": "mixer.up_proj.weight",
        "mlp.linear_fc2.weight": "mixer.down_proj.weight",
    },
}
# Three in the export, one in megatron: per key-value head the rows of its query heads, then its key, then its value.
_QKV = ("mixer.q_proj.weight", "mixer.k_proj.weight", "mixer.v_proj.weight")
_FUSED_QKV = "self_attention.linear_qkv.weight"
_SAME_PREFIXES = ("mlp1.", "vision_model.")
_EXTRA_STATE = "_extra_state"


@dataclass(frozen=True)
class NameMap:
    """The mapping of one model.

    Attributes:
        pattern: hybrid layer pattern.
        num_query_groups: key-value heads.
        head_dim: width of an attention head.
        tied: the output layer is the embedding and has no weights of its own.
    """

    pattern: str
    num_query_groups: int
    head_dim: int
    tied: bool = False

    def to_hf(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Megatron's weights under the export's names.

        Raises:
            ValueError: listing names that are unknown or missing.
        """
        state = {name: value for name, value in state.items() if not name.endswith(_EXTRA_STATE)}
        plain, attention = self._plain_names(), self._attention_layers()
        fused = {_MEGATRON.format(layer) + _FUSED_QKV: layer for layer in attention}
        _check(state, {*plain, *fused}, "training model")
        converted = {}
        for name, value in state.items():
            if name in fused:
                for part, piece in zip(_QKV, self._split_qkv(value)):
                    converted[_HF.format(fused[name]) + part] = piece
            else:
                converted[plain.get(name, name)] = value
        return converted

    def to_megatron(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The export's weights under megatron's names.

        Raises:
            ValueError: listing names that are unknown or missing.
        """
        plain = {hf: megatron for megatron, hf in self._plain_names().items()}
        split = {_HF.format(layer) + part: layer for layer in self._attention_layers() for part in _QKV}
        _check(state, {*plain, *split}, "export")
        converted = {plain.get(name, name): value for name, value in state.items() if name not in split}
        for layer in self._attention_layers():
            parts = [state[_HF.format(layer) + part] for part in _QKV]
            converted[_MEGATRON.format(layer) + _FUSED_QKV] = self._fuse_qkv(parts)
        return converted

    def _attention_layers(self) -> list[int]:
        return [index for index, symbol in enumerate(layer_symbols(self.pattern)) if symbol == "*"]

    def _plain_names(self) -> dict[str, str]:
        """Names of the language model that are renamed and nothing else, megatron's to the export's."""
        names = {
            megatron: hf for megatron, hf in _MODEL_NAMES.items() if not (self.tied and "output_layer" in megatron)
        }
        for index, symbol in enumerate(layer_symbols(self.pattern)):
            for megatron, hf in _LAYER_NAMES[symbol].items():
                names[_MEGATRON.format(index) + megatron] = _HF.format(index) + hf
        return names

    def _split_qkv(self, fused: Tensor) -> list[Tensor]:
        per_group = fused.unflatten(0, (self.num_query_groups, -1, self.head_dim))
        heads = per_group.shape[1] - 2
        return [part.flatten(0, 2).contiguous() for part in per_group.split([heads, 1, 1], 1)]

    def _fuse_qkv(self, parts: list[Tensor]) -> Tensor:
        per_group = [part.unflatten(0, (self.num_query_groups, -1, self.head_dim)) for part in parts]
        return torch.cat(per_group, 1).flatten(0, 2)


def _check(state: Mapping[str, Tensor], expected: set[str], where: str) -> None:
    unknown = sorted(name for name in state if name not in expected and not name.startswith(_SAME_PREFIXES))
    missing = sorted(expected - set(state))
    if unknown or missing:
        raise ValueError(
            f"weights of the {where} do not fit model.hybrid_pattern and model.tie_embeddings: "
            f"unknown {unknown or 'none'}, missing {missing or 'none'}"
        )
