"""A model from its configuration."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from megatron.core.activations import squared_relu
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import RadioModel

from hybridprune_megatron.checks import fail
from hybridprune_megatron.config.schema import Config
from hybridprune_megatron.config.tuning_schema import PROJECTOR_TARGET
from hybridprune_megatron.method.reduction import Reduction
from hybridprune_megatron.method.schedule import layer_symbols
from hybridprune_megatron.models.distillation import DistillingModel
from hybridprune_megatron.models.encoder import build_projector, radio_config
from hybridprune_megatron.models.experts import expert_settings, prepare_experts
from hybridprune_megatron.models.fp8 import fp8_settings
from hybridprune_megatron.models.language_model import ReductionHybridModel
from hybridprune_megatron.models.lora import adapt_projector, is_adapter, train_adapters_only
from hybridprune_megatron.models.specs import resolve_spec, stack_spec
from hybridprune_megatron.models.torch_layers import relu_squared
from hybridprune_megatron.models.video_language_model import VideoLanguageModel

#: Tokens of a sequence whose attention logits in fp32, of 32 heads, take 32 GiB.
LONGEST_FP32 = 16_384


def fp32_line(cfg: Config, on_gpu: bool) -> str | None:
    """What to say where attention will hold L x L logits: in fp32 no kernel of a GPU does without. None: nothing.

    Raises:
        ConfigError: sequences are too long for it.
    """
    if not on_gpu or cfg.trainer.precision != "fp32" or not cfg.model.has_layers("attention"):
        return None
    length = cfg.longest_sequence
    if length > LONGEST_FP32:
        reason = f"attention holds {length} x {length} logits per head, for sequences above {LONGEST_FP32} too many"
        raise fail("trainer.precision", "fp32", f"on a GPU {reason}", "set bf16, or lower data.sequence_length")
    return "trainer.precision=fp32 on a GPU: slow, attention holds L x L logits per head; bf16 is what kernels are for"


def build_model(
    cfg: Config,
    pre_process: bool = True,
    post_process: bool = True,
    chunk: int | None = None,
    *,
    meta: bool = False,
    fused_gradients: bool = False,
) -> VideoLanguageModel:
    """The model of a configuration on this rank, parameters of frozen parts without gradients.

    Args:
        cfg: the whole configuration; uses model, reduction, parallel, tuning, fp8, trainer.precision and .recompute.
        pre_process: first pipeline stage.
        post_process: last pipeline stage.
        chunk: which of its chunks, on a stage of an interleaved pipeline.
        meta: build on the meta device, without memory for weights.
        fused_gradients: for a model that megatron's DDP will wrap: the kernels add weights' gradients to its buffers
            themselves, where they can (see ``transformer_config``).

    Raises:
        ValueError: a scorer, layer or budget that does not exist, or a spec or FP8 that is not available here.
    """
    config = transformer_config(cfg, meta=meta, fused_gradients=fused_gradients)
    with torch.device("meta") if meta else nullcontext():
        return _build(cfg, pre_process, post_process, chunk, config)


def _build(
    cfg: Config, pre_process: bool, post_process: bool, chunk: int | None, config: TransformerConfig
) -> VideoLanguageModel:
    model = cfg.model
    meta = config.init_model_with_meta_device
    spec, lora = resolve_spec(model.spec), cfg.tuning.lora
    mamba = {"chunk_size": model.mamba_chunk_size, "time_step_min": model.time_step_min}
    language_model = ReductionHybridModel(
        config,
        hybrid_stack_spec=stack_spec(spec, mamba, lora if lora.rank else None, cfg.parallel.context),
        vocab_size=model.vocab_size,
        max_sequence_length=model.max_sequence_length,
        hybrid_layer_pattern=model.hybrid_pattern,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="none",
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        vp_stage=chunk,
    )
    tower = projector = None
    if model.vision is not None and pre_process:
        vision = model.vision
        with torch.device("meta" if meta else _device(config)):
            tower = RadioModel(radio_config(asdict(vision)))
            projector = build_projector(
                vision.hidden_size, vision.pixel_shuffle, vision.projector_hidden_size, model.hidden_size
            )
        tower, projector = tower.to(config.params_dtype), projector.to(config.params_dtype)
        if lora.rank and PROJECTOR_TARGET in lora.targets:
            adapt_projector(projector, lora)
    distillation = cfg.tuning.distillation
    model_class: Callable[..., VideoLanguageModel] = VideoLanguageModel
    if distillation.weight:
        model_class = partial(DistillingModel, weight=distillation.weight, temperature=distillation.temperature)
    result = model_class(
        config,
        language_model,
        tower,
        projector,
        model.vision.pixel_shuffle if model.vision is not None else 1.0,
        model.trainable.vision,
        build_reduction(cfg),
    )
    if model.experts is not None:
        prepare_experts(result, update_bias=model.experts.bias_update_rate > 0)
    _choose_trained(result, cfg)
    return result


def _choose_trained(model: VideoLanguageModel, cfg: Config) -> None:
    """Leaves gradients to the parts that learn: whole, or by their adapters alone where they have some."""
    trainable = cfg.model.trainable
    for part, learns in (
        (model.vision_model, trainable.vision),
        (model.mlp1, trainable.projector),
        (model.language_model, trainable.language),
    ):
        if part is None:
            continue
        part.requires_grad_(learns)
        if learns and any(is_adapter(name) for name, _ in part.named_parameters()):
            train_adapters_only(part)


def build_reduction(cfg: Config) -> Reduction | None:
    """The reduction of a configuration; None where nothing is ever dropped, which is bitwise the model without it."""
    return cfg.reduction.policy(cfg.model.hybrid_pattern, drawn=cfg.tuning.budget.distribution != "fixed")


def transformer_config(cfg: Config, *, meta: bool = False, fused_gradients: bool = False) -> TransformerConfig:
    """Megatron's configuration of the language model.

    Args:
        fused_gradients: as for ``build_model``. Megatron's own linears (the output layer) take the kernel from apex,
            and one switch holds for all, so without apex nothing is fused.

    Raises:
        ValueError: a spec or FP8 that is not available here.
    """
    model, parallel = cfg.model, cfg.parallel
    spec = resolve_spec(model.spec)
    has_apex = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    on_gpu = torch.cuda.is_available()
    bf16 = cfg.trainer.precision == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    recompute: dict[str, dict[str, Any]] = {
        "none": {},
        # Attention's core; our Mamba mixer reads the granularity itself.
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }
    return TransformerConfig(
        num_layers=len(layer_symbols(model.hybrid_pattern)),
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        mamba_num_heads=model.mamba_num_heads,
        mamba_head_dim=model.mamba_head_dim,
        mamba_state_dim=model.mamba_state_dim,
        mamba_num_groups=model.mamba_num_groups,
        is_hybrid_model=True,
        # Transformer Engine knows its own by megatron's function.
        activation_func=squared_relu if spec == "te" else relu_squared,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_std,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=bf16,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        **expert_settings(model.experts, parallel.expert),
        sequence_parallel=parallel.sequence_parallel,
        # A packed batch is as long as its samples, and shorter with depth; this setting demands the dispatcher's even
        # without experts.
        variable_seq_lengths=parallel.pipeline > 1,
        # An interleaved schedule is only worth its messages if layers run meanwhile.
        overlap_p2p_comm=parallel.virtual_pipeline > 1,
        batch_p2p_comm=parallel.virtual_pipeline == 1,
        # A wait of the host after every message, for a fault of torch that is long mended.
        batch_p2p_sync=False,
        moe_token_dispatcher_type="alltoall",
        calculate_per_token_loss=True,
        # On a CPU there is nothing to choose.
        deterministic_mode=cfg.trainer.deterministic and on_gpu,
        use_cpu_initialization=not on_gpu,
        init_model_with_meta_device=meta,
        perform_initialization=not meta,
        gradient_accumulation_fusion=fused_gradients and spec == "te" and has_apex,
        # There is neither bias nor dropout to fuse, and norm and softmax are others.
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        **recompute[cfg.trainer.recompute],
        **fp8_settings(cfg.fp8, spec, model.experts is not None),
    )


def _device(config: TransformerConfig) -> torch.device:
    return torch.device("cpu" if config.use_cpu_initialization else "cuda")
