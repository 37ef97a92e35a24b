"""Counts against what the real small model does: torch's flop counter, and the tensors that autograd keeps."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hybridprune_megatron.cost.prefill import head_cost, layer_operations
from hybridprune_megatron.cost.vision import projector_cost, tower_cost
from hybridprune_megatron.layers.operations import sum_costs
from tests.models.tiny import tiny_batch, tiny_config
from tests.worlds import run_world

FRAMES = (3, 5, 2)


def _model(cfg) -> Any:
    from hybridprune_megatron.engine.parallel import init_model_parallel
    from hybridprune_megatron.models.build import build_model

    init_model_parallel(seed=1)
    return build_model(cfg).train()


def _profiled(run: Callable[[], object]) -> int:
    # The plain backend of torch's attention consists of matrix products, which are all that the counter knows on a CPU.
    # Native operators tell no profiler what they multiply.
    plain = patch.dict(os.environ, {"HYBRIDPRUNE_KERNELS": "0"})
    with plain, FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        run()
    return counter.get_total_flops()


def _layers() -> None:
    from hybridprune_megatron.method.layout import TokenLayout
    from hybridprune_megatron.models.packed import pack_for_layer

    cfg = tiny_config(budget=1.0)
    model, batch = _model(cfg), tiny_batch(*FRAMES)
    layout = TokenLayout.from_samples(batch.layouts, "cpu")
    hidden = torch.randn(layout.num_tokens, 1, cfg.model.hidden_size)
    packing = pack_for_layer(layout, None, None, None)
    for symbol, layer in zip(cfg.model.hybrid_pattern, model.language_model.decoder.layers):
        counted = sum_costs(layer_operations(cfg.model, symbol, layout.sample_lengths, 4).values()).executed
        run = partial(layer, hidden_states=hidden, attention_mask=None, packed_seq_params=packing)
        profiled = _profiled(run)
        assert profiled == counted, (symbol, profiled, counted)


def test_every_layer_multiplies_what_is_counted():
    run_world(1, _layers)


def _whole() -> None:
    cfg = tiny_config(budget=1.0)
    model, batch = _model(cfg), tiny_batch(*FRAMES)
    rows = torch.tensor([layout.num_tokens for layout in batch.layouts]).cumsum(0) - 1
    lengths = [layout.num_tokens for layout in batch.layouts]
    counted = sum_costs(
        [
            *(
                cost
                for symbol in cfg.model.hybrid_pattern
                for cost in layer_operations(cfg.model, symbol, lengths, 4).values()
            ),
            head_cost(cfg.model, sum(lengths), len(rows), 4),
            tower_cost(cfg.model.vision, sum(FRAMES), 4),
            projector_cost(cfg.model.vision, cfg.model.hidden_size, sum(FRAMES), 4),
        ]
    )
    assert _profiled(lambda: model.logits(batch, rows)) == counted.executed


def test_the_whole_model_multiplies_what_is_counted():
    run_world(1, _whole)
