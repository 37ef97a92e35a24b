"""What decoding needs of the tokens that are past, layer by layer, after the reduction in prefill.

Shape letters: S samples, T longest sample in an attention layer, K key-value heads, E head width, W taps, H Mamba
heads, P Mamba head width, N state size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hybridprune_megatron.export.outputs import ReductionStatistics

# Room for new tokens is made in steps of this many, so that a decoding step rarely copies the cache.
_GROWTH = 128


class AttentionCache:
    """Keys and values of one attention layer, with a length of its own for every sample.

    Args:
        key: [L, K, E] of the packed tokens that entered the layer.
        value: [L, K, E].
        sample_lengths: S lengths (host).
        sample_index: int [L] sample of every token.
        sample_position: int [L] position of every token within its sample.
    """

    def __init__(
        self, key: Tensor, value: Tensor, sample_lengths: Sequence[int], sample_index: Tensor, sample_position: Tensor
    ) -> None:
        self.longest = max(sample_lengths)
        self.lengths = torch.tensor(sample_lengths, device=key.device)
        where = (sample_index.long(), sample_position)
        shape = (len(sample_lengths), self.longest + _GROWTH, *key.shape[1:])
        # [S, T, K, E] -> [S, K, T, E]
        self.keys = key.new_zeros(shape).index_put(where, key).transpose(1, 2).contiguous()
        self.values = value.new_zeros(shape).index_put(where, value).transpose(1, 2).contiguous()

    def append(self, key: Tensor, value: Tensor) -> None:
        """Adds one token to every sample; both [S, K, E]."""
        if self.longest == self.keys.shape[2]:
            self.keys = nn.functional.pad(self.keys, (0, 0, 0, _GROWTH))
            self.values = nn.functional.pad(self.values, (0, 0, 0, _GROWTH))
        samples = torch.arange(len(key), device=key.device)
        self.keys[samples, :, self.lengths] = key
        self.values[samples, :, self.lengths] = value
        self.lengths = self.lengths + 1
        self.longest += 1

    def attend(self, query: Tensor) -> Tensor:
        """Attention of the newest tokens: query [S, H, E] to [S, H * E]."""
        visible = torch.arange(self.longest, device=query.device) < self.lengths.unsqueeze(1)
        out = nn.functional.scaled_dot_product_attention(
            query.unsqueeze(2),
            self.keys[:, :, : self.longest],
            self.values[:, :, : self.longest],
            attn_mask=visible[:, None, None, :],
            enable_gqa=query.shape[1] != self.keys.shape[1],
        )
        return out.flatten(1)

    def reorder(self, order: Tensor) -> None:
        """Makes sample i a copy of the old sample ``order[i]``."""
        order = order.to(self.keys.device)
        self.keys, self.values, self.lengths = (each[order] for each in (self.keys, self.values, self.lengths))


class MambaCache:
    """Convolution and scan state of one Mamba layer.

    Args:
        inputs: [S, W - 1, channels] last inputs of the convolution, zeros before a sample's start.
        state: float32 [S, H, P, N].
    """

    def __init__(self, inputs: Tensor, state: Tensor) -> None:
        self.inputs, self.state = inputs, state

    def reorder(self, order: Tensor) -> None:
        """Makes sample i a copy of the old sample ``order[i]``."""
        order = order.to(self.state.device)
        self.inputs, self.state = self.inputs[order], self.state[order]


class HybridCache:
    """The caches of a model; what ``generate`` calls ``past_key_values`` or ``cache``.

    Each layer holds the tokens that entered it, and Mamba's states what they wrote. A dropped token stays dropped for
    whatever comes later: layers before the drop remember it, those after it never saw it.

    A cache is written in place. Two questions over one video need ``copy.deepcopy`` of it before the first.

    Attributes:
        layers: by index, of the layers that have a state.
        reduction: what was dropped, if prefill was asked for it (``output_reduction``).
    """

    # Asked for by transformers' generate. is_linear: caches whose layers are all "linear" are taken to hold any number
    # of columns, so that a second question would come with all of them; ours know how many they have seen.
    is_compileable = False
    is_croppable = False
    is_linear = (False,)

    def __init__(self) -> None:
        self.layers: dict[int, AttentionCache | MambaCache] = {}
        self.reduction: ReductionStatistics | None = None
        self._columns: list[Tensor] = []

    def add_columns(self, input_ids: Tensor) -> None:
        """Notes the columns int64 [S, columns] that the layers have seen."""
        self._columns.append(input_ids)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of ``input_ids`` seen, padding and dropped tokens included; the layers may hold fewer tokens."""
        return sum(part.shape[1] for part in self._columns)

    @property
    def num_rows(self) -> int:
        """S of filled caches."""
        return len(self._columns[0])

    def seen(self) -> Tensor:
        """int64 [S, columns] the ``input_ids`` so far."""
        return torch.cat(self._columns, 1)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follows a beam search's choice of beams, which never leave their sample."""
        self._columns = [self.seen()[beam_idx]]
        for layer in self.layers.values():
            layer.reorder(beam_idx)
