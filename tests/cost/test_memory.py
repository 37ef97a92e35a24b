"""Memory: parameters by building the model, kept tensors by autograd's hooks, peaks by following every allocation."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hybridprune_megatron.config import load_config
from hybridprune_megatron.config.schema import ExpertsConfig
from hybridprune_megatron.cost.activations import (
    block_activations,
    head_activations,
    layer_activations,
    projector_activations,
    total_bytes,
)
from hybridprune_megatron.cost.memory import GIB, Packed, Stage, StaticMemory, prefill_memory, training_memory
from hybridprune_megatron.cost.parameters import (
    adapter_parameters,
    language_parameters,
    layer_parameters,
    projector_adapter_parameters,
    projector_parameters,
    tower_parameters,
)
from hybridprune_megatron.cost.vision import tokens_in_tower
from hybridprune_megatron.layers.mamba import SCAN_BLOCK_ELEMENTS
from hybridprune_megatron.method.counts import kept_counts
from tests.models.tiny import tiny_batch, tiny_config, tiny_sample
from tests.worlds import run_world

FRAMES = (3, 5, 2)


def _model(cfg: Any) -> Any:
    from hybridprune_megatron.engine.parallel import init_model_parallel
    from hybridprune_megatron.models.build import build_model

    init_model_parallel(seed=1)
    return build_model(cfg).train()


def _parameters() -> None:
    cfg = tiny_config()
    model = _model(cfg)
    parts = {
        language_parameters(cfg.model): model.language_model,
        tower_parameters(cfg.model.vision): model.vision_model,
        projector_parameters(cfg.model.vision, cfg.model.hidden_size): model.mlp1,
    }
    for counted, module in parts.items():
        assert counted.total == sum(parameter.numel() for parameter in module.parameters())
    lora = tiny_config("tuning=lora", "tuning.lora.targets=[linear_qkv,linear_fc2,in_proj,out_proj,projector]",
                       "model.trainable.projector=true")  # fmt: skip
    adapters = [adapter_parameters(lora.model, symbol, lora.tuning.lora) for symbol in lora.model.hybrid_pattern]
    adapters.append(projector_adapter_parameters(lora.model.vision, lora.model.hidden_size, lora.tuning.lora))
    learns = sum(p.numel() for p in _model(lora).parameters() if p.requires_grad)
    assert sum(each.total for each in adapters) == learns
    packed = Packed(1, (4,) * 6, 10, 1, 2)
    assert training_memory(lora, packed).static.gradients == 4 * learns
    kept_fp32 = sum(p.numel() for p in model.parameters() if getattr(p, "keep_fp32", False))
    assert language_parameters(cfg.model).fp32 == kept_fp32


def test_parameters_are_those_of_the_model():
    run_world(1, _parameters)


def test_parameters_of_the_published_models():
    published = {"nemotron_nano_12b_v2_vl": 12_310_001_152, "nemotron_h_8b": 8_100_852_736}
    for name, parameters in published.items():
        model = replace(load_config([f"experiment={name}"]).model, vocab_size=131072)
        assert language_parameters(model).total == parameters
    experts = ExpertsConfig(num_experts=3, experts_per_token=2, ffn_hidden_size=5, shared_ffn_hidden_size=7)
    routed = replace(model, hybrid_pattern="E", experts=experts)
    assert layer_parameters(routed, "E").total == 4096 * (1 + 3 + 2 * 3 * 5 + 2 * 7)
    latent = replace(routed, experts=replace(experts, latent_size=11))
    assert layer_parameters(latent, "E").total == 4096 * (1 + 3 + 2 * 7) + 11 * (2 * 4096 + 2 * 3 * 5)


def _kept_bytes(run: Callable[[], Tensor], parameters: set[int]) -> int:
    """Bytes of all storages that autograd keeps for the backward of a function, parameters not counted."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if (storage.data_ptr() not in parameters and tensor.is_floating_point()) or tensor.dtype == torch.bool:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    assert result.requires_grad
    return sum(size for size, _ in storages.values())


def _kept() -> None:
    from hybridprune_megatron.method.layout import TokenLayout
    from hybridprune_megatron.models.packed import pack_for_layer

    cfg = tiny_config(budget=1.0)
    model, batch = _model(cfg), tiny_batch(*FRAMES)
    # Parameters, A = -exp(A_log) and the like are no activations: they do not grow with the tokens.
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    layout = TokenLayout.from_samples(batch.layouts, "cpu")
    tokens, size = layout.num_tokens, cfg.model.hidden_size
    hidden = torch.randn(tokens, 1, size, requires_grad=True)
    packing = pack_for_layer(layout, None, None, None)
    for symbol, layer in zip(cfg.model.hybrid_pattern, model.language_model.decoder.layers):

        def run(layer: nn.Module = layer) -> Tensor:
            out = layer(hidden_states=hidden, attention_mask=None, packed_seq_params=packing)
            return out[0] if isinstance(out, tuple) else out

        counted = total_bytes(layer_activations(cfg.model, symbol, 4, fused=False), tokens)
        kept = _kept_bytes(run, parameters)
        if symbol == "M":
            # Two states of the scan beside those between chunks, a rounded chunk, A and -A of four heads.
            state = 4 * cfg.model.mamba_num_heads * cfg.model.mamba_head_dim * cfg.model.mamba_state_dim
            assert 0 <= kept - counted <= 3 * state + 2 * 4 * 4, (kept, counted)
        else:
            assert kept == counted, (symbol, kept, counted)
    rows = torch.nonzero(batch.loss_mask).flatten()
    labels = batch.labels[rows].unsqueeze(0)
    language = model.language_model
    inputs = hidden.detach().index_select(0, rows).requires_grad_()
    head = _kept_bytes(
        lambda: language.compute_language_model_loss(labels, language.output_layer(inputs)[0]), parameters
    )
    # And the mask of labels on other ranks, a byte a row.
    assert head == total_bytes(head_activations(cfg.model, 4), len(rows)) + len(rows)


def test_layers_keep_what_is_counted():
    run_world(1, _kept)


def _kept_by_the_encoder() -> None:
    cfg = tiny_config("model.trainable.vision=true")
    vision, model = cfg.model.vision, _model(cfg)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    inside = tokens_in_tower(vision)
    block = next(module for module in model.vision_model.modules() if type(module).__name__ == "RadioLayer")
    hidden = torch.randn(5, inside, vision.hidden_size, requires_grad=True)
    kept = _kept_bytes(lambda: block(hidden), parameters)
    assert kept == total_bytes(block_activations(vision, 4), 5 * inside)
    features = torch.randn(5, vision.tokens_per_frame, 4 * vision.hidden_size)
    kept = _kept_bytes(lambda: model.mlp1(features), parameters)
    assert kept == total_bytes(projector_activations(vision, 4), 5 * vision.tokens_per_frame)


def test_tower_and_projector_keep_what_is_counted():
    run_world(1, _kept_by_the_encoder)


class _Live(TorchDispatchMode):
    """Follows every storage that operations allocate, and the most bytes that lived at once."""

    def __init__(self, already_there: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in already_there)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self._known:
                self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        self._known.add(storage)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self.live -= size


def _peak(recompute: str, budget: float) -> tuple[int, int]:
    """Peak of a step of the language model over all that it allocates, and what is counted."""
    from hybridprune_megatron.data.batch import pack
    from hybridprune_megatron.method.layout import TokenLayout

    # Long enough for the scan to work in several blocks.
    cfg = tiny_config(f"trainer.recompute={recompute}", "model.mamba_chunk_size=32", budget=budget)
    model, samples = _model(cfg), 300
    sample = tiny_sample(0, frames=8)
    batch = pack([sample] * samples)
    visual = 8 * cfg.model.vision.tokens_per_frame
    counts = kept_counts(cfg.retention_by_layer, visual)
    counted = training_memory(cfg, Packed(samples, counts, sample.layout.num_tokens - visual, 0, 2))
    rows = torch.nonzero(batch.loss_mask).flatten()
    layout = TokenLayout.from_samples(batch.layouts)
    with _Live(model.parameters()) as live:
        hidden = torch.randn(layout.num_tokens, 1, cfg.model.hidden_size, requires_grad=True)
        dropping = model.language_model.decoder.pass_of(model.reduction, layout)
        model.language_model(hidden, layout, dropping, rows, batch.labels[rows])[0].sum().backward()
    gradients = sum(4 * parameter.numel() for parameter in model.language_model.parameters())
    return live.peak, counted.kept + counted.working + gradients


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("budget", [1.0, 0.5])
def test_peak_of_a_step_is_near_what_is_counted(recompute: str, budget: float):
    ((measured, counted),) = run_world(1, _peak, recompute, budget)
    assert 0.95 < measured / counted < 1.1, (measured, counted)


def test_the_scan_works_in_blocks_of_the_size_that_is_counted():
    from hybridprune_megatron.ops import ssd_blocks

    assert ssd_blocks._BLOCK_ELEMENTS == SCAN_BLOCK_ELEMENTS


def _encoding_peak() -> None:
    from hybridprune_megatron.models.encoder import encode_frames

    # Wide enough for the tower to need more than the pixels.
    wide = ["hidden_size=64", "intermediate_size=256", "projector_hidden_size=96"]
    cfg = tiny_config(*(f"model.vision.{each}" for each in wide))
    model, frames = _model(cfg), 20
    pixels = torch.zeros(frames, 3, 32, 32, dtype=torch.uint8)
    counted = prefill_memory(cfg, Packed(1, (80,) * 6, 20, frames, 1))
    with _Live([*model.parameters(), *model.buffers(), pixels]) as live, torch.no_grad():
        encode_frames(model.vision_model, model.mlp1, pixels, 0.5, False)
    assert counted.moment == "encoding of the frames"
    assert 0.98 < live.peak / counted.working < 1.02, (live.peak, counted)


def test_peak_of_the_encoder_is_near_what_is_counted():
    run_world(1, _encoding_peak)


def _memory_config(*overrides: str) -> Any:
    return load_config(["experiment=nemotron_nano_12b_v2_vl", *overrides])


def test_static_memory_by_hand():
    cfg = _memory_config("trainer.num_nodes=2", "model.trainable.vision=true")
    memory = training_memory(cfg, Packed(1, (256,) * 62, 100, 1, 10)).static
    model = cfg.model
    language = language_parameters(model)
    norms = 63 * 5120
    # Tensor parallel 8: norms whole, the rest in eighths; tower and projector whole. A_log and D stay fp32.
    encoder = tower_parameters(model.vision).total + projector_parameters(model.vision, 5120).total
    fp32 = 28 * 2 * 128 // 8
    total = (language.total - norms) // 8 + norms + encoder
    assert memory.weights == 2 * (total - fp32) + 4 * fp32
    assert memory.gradients == 4 * total
    # Two copies of the model: the optimizer's moments and fp32 weights in halves.
    assert memory.optimizer == (12 * (total - fp32) + 8 * fp32) // 2
    frozen = training_memory(_memory_config("model.trainable.language=false"), Packed(1, (256,) * 62, 100, 1, 10))
    assert frozen.static.gradients == 4 * projector_parameters(model.vision, 5120).total


def test_static_memory_of_fp32_and_of_a_plain_optimizer():
    cfg = load_config(["experiment=demo", "trainer.devices=2"])
    packed = Packed(1, (256,) * 10, 100, 16, 10)
    memory = training_memory(cfg, packed).static
    trained = memory.gradients // 4
    assert memory.optimizer == 4 * trained
    plain = load_config(["experiment=demo", "trainer.devices=2", "parallel.distributed_optimizer=false"])
    assert training_memory(plain, packed).static == replace(memory, optimizer=8 * trained)


def test_stages_hold_their_layers_and_more_micro_batches():
    one = load_config(["experiment=demo", "trainer.global_batch_size=4"])
    two = load_config(
        ["experiment=demo", "trainer.global_batch_size=4", "parallel=pp2", "trainer.devices=2",
         "model.hybrid_pattern='M-M*-|M-M*-'"]
    )  # fmt: skip
    packed = Packed(4, (256,) * 10, 100, 16, 10)
    stages = [Stage(two, index) for index in range(2)]
    whole = Stage(one, 0)
    assert sum((stage.static() for stage in stages), StaticMemory()) == whole.static()
    # The first stage keeps two micro-batches of half of the layers, and of the projector.
    assert stages[0].training(packed).kept > 0.9 * whole.training(packed).kept
    assert training_memory(two, packed) == max(
        (stage.training(packed) for stage in stages), key=lambda memory: memory.total
    )


def test_prefill_keeps_caches_of_what_is_left():
    cfg = _memory_config("parallel=single", "trainer.num_nodes=1", "trainer.devices=1")
    full, few = (prefill_memory(cfg, Packed(1, (count,) * 62, 100, 0, 1)) for count in (8192, 256))
    # 6 attention layers keep 8 heads of 128 keys and values in bf16; the worst moment comes behind them.
    assert full.kept - few.kept == 6 * 2 * 8 * 128 * 2 * (8192 - 256)
    assert few.total < full.total < 40 * GIB


def test_context_parallel_ranks_divide_tokens_and_frames():
    # Tensor parallel 8 leaves a Mamba group a rank, which four context ranks share.
    one, four = (
        Stage(_memory_config("parallel=tp8_cp4", f"parallel.context={context}", "trainer.recompute=none"), 0)
        for context in (1, 4)
    )
    # As many frames as ranks that share them, so that none shares unevenly.
    packed = Packed(1, (2048,) * 62, 2048, 32, 10)
    whole, quarter = one.training(packed), four.training(packed)
    # With every layer's tensors there.
    assert whole.moment == quarter.moment == "loss"
    keys = 6 * 4096 * 2 * 8 * 128 * 2 // 8
    exchanged = 28 * 1024 * 2 * ((128 * 80 + 128) // 8 + 4 * 2 * 128)
    repeated = 28 * 1024 * 2 * 2 * 2 * 128 * 3
    in_quarters = whole.kept / 4 + keys + exchanged + repeated
    assert quarter.kept == pytest.approx(in_quarters, rel=1e-6)
