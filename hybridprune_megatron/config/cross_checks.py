"""What several values must agree on: pattern and stages, heads and processes, schedule and layers."""

from __future__ import annotations

import math

from hybridprune_megatron.checks import divides, fail
from hybridprune_megatron.config.groups import ParallelConfig, RunConfig
from hybridprune_megatron.config.model_schema import ModelConfig
from hybridprune_megatron.layers.kinds import KINDS
from hybridprune_megatron.method.counts import kept_counts
from hybridprune_megatron.method.schedule import BUDGET_TOLERANCE, cut_pattern, even_edges

#: Loader processes, or loaders without processes, of one training process.
MOST_LOADERS = 1024


def check_config(cfg: RunConfig) -> None:
    """All checks across groups; raises ``ConfigError`` at the first that fails."""
    check_vision(cfg)
    check_stages(cfg.model, cfg.parallel)
    check_split(cfg)
    check_combinations(cfg)
    check_batch(cfg)
    check_length(cfg)
    check_offsets(cfg)
    # Solving the schedule finds layers that cannot drop and budgets that cannot be reached.
    check_kept(cfg, cfg.reduction.budget, cfg.reduction.retention(cfg.model.hybrid_pattern))
    check_steps(cfg)


def check_vision(cfg: RunConfig) -> None:
    """A model with a vision tower gets frames that fit, one without gets none and drops none."""
    vision, data = cfg.model.vision, cfg.data
    if vision is None:
        if data.sampling != "none":
            reason = f"model {cfg.model.name} has no vision tower (model.vision=null)"
            raise fail("data.sampling", data.sampling, reason, "set data.sampling=none, or take a model with a tower")
        if cfg.reduction.budget < 1:
            reason = f"model {cfg.model.name} has no vision tower (model.vision=null), so there is nothing to drop"
            raise fail("reduction.budget", cfg.reduction.budget, reason, "set reduction=none")
        return
    if data.sampling == "none":
        reason = f"model {cfg.model.name} has a vision tower and needs frames"
        raise fail("data.sampling", data.sampling, reason, "set data.sampling=uniform or fps")
    visual = least_video(cfg)
    if visual >= data.sequence_length:
        frames_key = "data.num_frames" if data.sampling == "uniform" else "data.max_frames"
        reason = (
            f"at {vision.tokens_per_frame * cfg.visual_cost:g} tokens a frame one video fills {visual} tokens and "
            f"data.sequence_length={data.sequence_length} leaves no room for text"
        )
        if data.too_long == "shrink" and data.min_frames < data.most_frames:
            frames_key = "data.min_frames"
        raise fail(frames_key, data.least_frames, reason, f"lower {frames_key} or raise data.sequence_length")


def check_stages(model: ModelConfig, parallel: ParallelConfig) -> None:
    """The pattern is cut into as many stages as there are pipeline processes."""
    chunks = parallel.virtual_pipeline
    stages, wanted = len(model.stages), parallel.pipeline * chunks
    if wanted > model.num_layers:
        fix = "lower parallel.pipeline or parallel.virtual_pipeline"
        raise fail("parallel.pipeline", parallel.pipeline, f"the model has only {model.num_layers} layers", fix)
    if stages != wanted:
        layers = "".join(model.stages)
        cut = cut_pattern(layers, even_edges(len(layers), wanted))
        reason = f"model.hybrid_pattern={model.hybrid_pattern} is cut into {stages} stage(s)" + (
            f" and parallel.virtual_pipeline={chunks} asks for {wanted}" if chunks > 1 else ""
        )
        fix = f"set model.hybrid_pattern='{cut}' or parallel.pipeline={max(stages // chunks, 1)}"
        raise fail("parallel.pipeline", parallel.pipeline, reason, fix)


def check_split(cfg: RunConfig) -> None:
    """Tensor and context parallelism divide what they split."""
    model, parallel = cfg.model, cfg.parallel
    tensor, context = parallel.tensor, parallel.context
    for kind in KINDS.values():
        for key, value in kind.split_sizes(model):
            divides(key, value, "parallel.tensor", tensor)
    divides("model.vocab_size", model.vocab_size, "parallel.tensor", tensor)
    if context > 1:
        # A Mamba layer swaps its share of the sequence for a share of the heads; attention takes the sequence in
        # 2 * context chunks.
        divides("model.mamba_num_heads", model.mamba_num_heads, "parallel.tensor*parallel.context", tensor * context)
        groups = model.mamba_num_groups // tensor
        if groups % context and context % groups:
            reason = f"must divide or be a multiple of the {groups} Mamba group(s) of a rank"
            raise fail("parallel.context", context, reason, "change parallel.context or parallel.tensor")
        divides("data.sequence_length", cfg.data.sequence_length, "2*parallel.context", 2 * context)
    if parallel.sequence_parallel:
        divides("data.sequence_length", cfg.data.sequence_length, "parallel.tensor", tensor)
    check_experts(cfg)


def check_experts(cfg: RunConfig) -> None:
    """Expert parallelism has experts to split and processes to split them over."""
    experts, parallel = cfg.model.experts, cfg.parallel
    if experts is None:
        if parallel.expert > 1:
            what = f"model {cfg.model.name} has no experts (model.experts=null)"
            raise fail("parallel.expert", parallel.expert, what, "set parallel.expert=1")
        return
    divides("model.experts.num_experts", experts.num_experts, "parallel.expert", parallel.expert)
    divides("model.experts.shared_ffn_hidden_size", experts.shared_ffn_hidden_size, "parallel.tensor", parallel.tensor)
    if parallel.tensor > 1 and not parallel.sequence_parallel:
        raise fail(
            "parallel.sequence_parallel",
            "false",
            f"every tensor-parallel rank would send the same tokens to the experts (parallel.tensor={parallel.tensor})",
            "set parallel.sequence_parallel=true",
        )
    processes = cfg.trainer.num_nodes * cfg.trainer.devices // parallel.pipeline
    if processes % parallel.expert:
        reason = f"must divide the {processes} processes of a pipeline stage"
        raise fail("parallel.expert", parallel.expert, reason, "lower parallel.expert")


def check_combinations(cfg: RunConfig) -> None:
    """What cannot be combined with stages or shards."""
    parallel = cfg.parallel
    for name in ("pipeline", "context"):
        size = getattr(parallel, name)
        if size > 1 and cfg.tuning.distillation.weight:
            reason = (
                f"must be 1 with tuning.distillation.weight={cfg.tuning.distillation.weight}: the teacher's pass knows "
                "neither stages nor shards"
            )
            raise fail(f"parallel.{name}", size, reason, f"set parallel.{name}=1 or tuning.distillation.weight=0")
    if parallel.pipeline > 1 and not cfg.model.trainable.language:
        reason = f"leaves stages after the first without anything to learn, and parallel.pipeline={parallel.pipeline}"
        fix = "set model.trainable.language=true, tuning.lora.rank, or parallel.pipeline=1"
        raise fail("model.trainable.language", False, reason, fix)
    cfg.reduction.score.check_heads("mamba", cfg.model.mamba_num_groups // parallel.tensor, parallel.context)


def check_batch(cfg: RunConfig) -> None:
    """The processes make whole copies of the model, and the global batch is shared evenly among the copies."""
    trainer, size = cfg.trainer, cfg.parallel.model_parallel_size
    world = trainer.num_nodes * trainer.devices
    if world % size:
        reason = f"must be a multiple of parallel.tensor*parallel.pipeline*parallel.context={size}"
        fix = f"set e.g. trainer.num_nodes=1 trainer.devices={size}"
        raise fail("trainer.num_nodes*trainer.devices", world, reason, fix)
    if trainer.global_batch_size % cfg.data_parallel_size:
        nearest = -(-trainer.global_batch_size // cfg.data_parallel_size) * cfg.data_parallel_size
        raise fail(
            "trainer.global_batch_size",
            trainer.global_batch_size,
            f"must be a multiple of the data-parallel size {cfg.data_parallel_size} ({world} ranks / {size} a model)",
            f"set e.g. trainer.global_batch_size={nearest}",
        )
    if cfg.parallel.virtual_pipeline > 1 and cfg.num_micro_batches % cfg.parallel.pipeline:
        reason = (
            f"gives a replica {cfg.num_micro_batches} packed sequences, and parallel.virtual_pipeline="
            f"{cfg.parallel.virtual_pipeline} needs a multiple of parallel.pipeline={cfg.parallel.pipeline}"
        )
        fix = f"set e.g. trainer.global_batch_size={cfg.data_parallel_size * cfg.parallel.pipeline}"
        raise fail("trainer.global_batch_size", trainer.global_batch_size, reason, fix)
    check_loaders(cfg)
    if cfg.longest_sequence > cfg.model.max_sequence_length:
        reason = f"must not exceed model.max_sequence_length={cfg.model.max_sequence_length}"
        if cfg.visual_cost < 1:
            reason = f"holds {cfg.longest_sequence} tokens (data.length_counts=cost), which {reason}"
        fix = "lower data.sequence_length or raise model.max_sequence_length"
        raise fail("data.sequence_length", cfg.data.sequence_length, reason, fix)


def check_loaders(cfg: RunConfig) -> None:
    """A process has no more loaders than it can run: one for each of its packed sequences in a step."""
    sequences, workers = cfg.num_micro_batches, cfg.data.num_workers
    if sequences * max(workers, 1) > MOST_LOADERS:
        batch = cfg.trainer.global_batch_size
        reason = (
            f"gives a process {sequences} packed sequences a step, each with a loader of its own and "
            f"data.num_workers={workers}, and it runs at most {MOST_LOADERS}"
        )
        fix = "lower it or data.num_workers, or share it among more processes (trainer.devices, trainer.num_nodes)"
        raise fail("trainer.global_batch_size", batch, reason, fix)


def check_length(cfg: RunConfig) -> None:
    """A packed sequence, of a length that divides, has room for a video and text."""
    multiple, length, visual = cfg.length_multiple, cfg.data.sequence_length, least_video(cfg)
    room = length // multiple * multiple
    if room > visual:
        return
    fix = f"raise data.sequence_length to at least {(visual // multiple + 1) * multiple}"
    reason = (
        f"a packed sequence divides by {multiple} (reduction.select.multiple_of, fp8.recipe, ranks that share it), "
        f"which leaves {room} of {length} tokens, and one video fills {visual}"
    )
    if cfg.reduction.select.multiple_of > 1:
        raise fail("reduction.select.multiple_of", cfg.reduction.select.multiple_of, reason, f"lower it, or {fix}")
    raise fail("data.sequence_length", length, reason, fix)


def check_offsets(cfg: RunConfig) -> None:
    """mamba_ssm's kernels address what a rank's Mamba layer computes with 32 bits."""
    model, parallel = cfg.model, cfg.parallel
    if model.spec == "torch" or not model.has_layers("mamba"):
        return
    length = cfg.longest_sequence
    width = model.mamba_num_heads * model.mamba_head_dim // (parallel.tensor * parallel.context)
    if length * width >= 2**31:
        reason = f"{width} channels of a Mamba layer on a rank times {length} tokens are 2^31 numbers or more"
        most = math.floor(2**31 // width * cfg.visual_cost)
        fix = f"lower it below {most}, or raise parallel.tensor or parallel.context"
        raise fail("data.sequence_length", cfg.data.sequence_length, reason, fix)


def most_visual_tokens(cfg: RunConfig) -> int:
    """Visual tokens of the longest video; 0 without a vision tower."""
    return cfg.data.most_frames * cfg.model.vision.tokens_per_frame if cfg.model.vision is not None else 0


def least_video(cfg: RunConfig) -> int:
    """What the visual tokens of the longest video count for in ``data.sequence_length`` at least; 0 without a tower."""
    vision = cfg.model.vision
    if vision is None:
        return 0
    return cfg.counted(0, cfg.data.least_frames * vision.tokens_per_frame)


def check_kept(cfg: RunConfig, budget: float, retention: tuple[float, ...]) -> None:
    """What stays of the longest video whatever the schedule says leaves room for the budget.

    Args:
        budget: mean share of the visual tokens over all layers.
        retention: share that enters every layer, which meets it.
    """
    select, visual = cfg.reduction.select, most_visual_tokens(cfg)
    if budget == 1 or not visual:
        return
    counts = kept_counts(retention, visual, select.min_tokens)
    kept = sum(counts) / (visual * len(counts))
    # One token stays in any case.
    if select.min_tokens > 1 and kept > budget + BUDGET_TOLERANCE:
        reason = f"keeps {kept:.3f} of the {visual} visual tokens of the longest video, and the budget is {budget:g}"
        raise fail("reduction.select.min_tokens", select.min_tokens, reason, "lower it or raise the budget")
    assert cfg.model.vision is not None, "visual tokens come from a tower"
    share = budget * cfg.model.vision.tokens_per_frame
    if select.min_tokens_per_frame > share:
        reason = f"must be at most {share:g}, what a budget of {budget:g} leaves of a frame on average"
        fix = "lower it or raise the budget"
        raise fail("reduction.select.min_tokens_per_frame", select.min_tokens_per_frame, reason, fix)


def check_steps(cfg: RunConfig) -> None:
    """The warmup ends before the decay does, where both are given; the run's own end only cuts it (a short trial)."""
    end = cfg.optim.decay_steps
    if end is not None and cfg.optim.warmup_steps >= end:
        fix = "lower optim.warmup_steps (0 = none) or raise optim.decay_steps"
        raise fail("optim.warmup_steps", cfg.optim.warmup_steps, f"must be below optim.decay_steps={end}", fix)
