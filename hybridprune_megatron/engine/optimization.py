"""Wraps a model for training: bf16, megatron's DDP, (distributed) Adam, and the learning rate schedule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module, MegatronModule

if TYPE_CHECKING:
    from hybridprune_megatron.config.schema import OptimConfig, ParallelConfig, TrainerConfig


#: Parts of the model as ``optim.lr_scale`` and ``model.trainable`` name them, and the module that each is.
MODULE_OF_PART = {"vision": "vision_model", "projector": "mlp1", "language": "language_model"}


class PartParamScheduler(OptimizerParamScheduler):
    """Megatron's schedule times the factor of a parameter group (``lr_mult``), in warmup too.

    Megatron's own way, a ``max_lr`` a group, warms every group up from one common rate, which may lie above the peak of
    a slow group.
    """

    def get_lr(self, param_group: dict) -> float:
        """Learning rate of a group at this step."""
        return param_group["lr_mult"] * super().get_lr(param_group)


@dataclass
class TrainState:
    """What a training step changes. A plain holder: Lightning must not find a module in it and move or
    convert it.

    Attributes:
        module: the bare model, as its factory built it (bf16 parameters if the run is bf16).
        ddp: the model wrapped for training, one for every chunk of layers; what the schedule calls.
        optimizer: megatron's optimizer over the parameters that require a gradient.
        scheduler: sets learning rate and weight decay, one count a step.
    """

    module: MegatronModule
    ddp: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


class ModelChunks(MegatronModule):
    """The chunks of layers that one stage of an interleaved pipeline holds; for weights and checkpoints one module.

    Args:
        chunks: in order of depth.
    """

    def __init__(self, chunks: Sequence[MegatronModule]) -> None:
        super().__init__(chunks[0].config)
        self.chunks = torch.nn.ModuleList(chunks)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Of all chunks: entries by their names here, under the keys of the whole model."""
        return {
            f"{prefix}chunks.{number}.{name}": entry
            for number, chunk in enumerate(model_chunks(self))
            for name, entry in chunk.sharded_state_dict("", sharded_offsets, metadata).items()
        }


def model_chunks(module: MegatronModule) -> list[MegatronModule]:
    """What the schedule runs as stages: the chunks of an interleaved stage, or the module itself."""
    return list(module.chunks) if isinstance(module, ModelChunks) else [module]


def wrap_model(
    module: MegatronModule,
    trainer: TrainerConfig,
    parallel: ParallelConfig,
    device: torch.device,
    first_chunk: bool = True,
) -> DistributedDataParallel:
    """Moves a model to its device and precision and wraps it in megatron's DDP.

    Args:
        module: with a transformer config as ``module.config``; frozen parameters have ``requires_grad`` off
            already.
        trainer: ``precision`` is read.
        parallel: ``distributed_optimizer`` and the overlap switches are read.
        first_chunk: whether it is the first chunk of layers on this stage; the gradients of the others are reduced
            in one bucket, as megatron does it.

    Returns:
        The wrapped model. Gradients are sums over tokens: the step divides them by the number of loss tokens
        of the whole job.

    Raises:
        ValueError: if nothing in the model is trainable.
    """
    if not any(p.requires_grad for p in module.parameters()):
        raise ValueError("no parameter is trainable: set one of model.trainable.vision/projector/language to true")
    config = module.config
    # Read by DDP (no scaling by the group's size), the schedule (no scaling by micro batches) and
    # finalize_model_grads.
    config.calculate_per_token_loss = True
    module = module.to(device)
    if trainer.precision == "bf16":
        # Decay rates and skips of Mamba are fp32 in every checkpoint of the family; the wrapper casts all it finds.
        fp32 = {p: p.data.clone() for p in module.parameters() if getattr(p, "keep_fp32", False)}
        module = Float16Module(config, module)
        for parameter, values in fp32.items():
            parameter.data = values
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather and parallel.distributed_optimizer,
        average_in_collective=False,
    )
    ddp = DistributedDataParallel(config, ddp_config, module, disable_bucketing=not first_chunk)
    # Same seed, same weights on every replica; this makes it true also for weights that a rank loaded by
    # itself.
    ddp.broadcast_params()
    return ddp


def build_optimizer(
    ddp: list[DistributedDataParallel], optim: OptimConfig, trainer: TrainerConfig, parallel: ParallelConfig
) -> MegatronOptimizer:
    """Adam with decoupled weight decay; ``parallel.distributed_optimizer`` splits its state over replicas.

    Every part of the model with an ``optim.lr_scale`` of its own gets parameter groups of its own.
    """
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        bf16=trainer.precision == "bf16",
        params_dtype=torch.bfloat16 if trainer.precision == "bf16" else torch.float32,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather and parallel.distributed_optimizer,
    )
    overrides = get_standard_config_overrides(config)
    for part, module in MODULE_OF_PART.items():
        factor = getattr(optim.lr_scale, part)
        if factor != 1.0:
            # Inside the wrapper for DDP, and in bf16 one more.
            names = (f"module.{module}.*", f"module.module.{module}.*")
            overrides[ParamKey(name=names)] = {"lr_mult": factor}
    return get_megatron_optimizer(config, ddp, config_overrides=overrides, use_gloo_process_groups=False)


def build_scheduler(
    optimizer: MegatronOptimizer, optim: OptimConfig, trainer: TrainerConfig
) -> OptimizerParamScheduler:
    """Linear warmup, then decay to ``optim.min_lr`` at ``optim.decay_steps`` (default: the end of the run)."""
    decay_steps = optim.decay_steps or trainer.max_steps
    # Megatron asserts warmup < decay; a short trial run of a long recipe must not die of it.
    warmup_steps = min(optim.warmup_steps, decay_steps - 1)
    return PartParamScheduler(
        optimizer,
        # Not zero: the first step of the run would be wasted.
        init_lr=optim.lr / warmup_steps if warmup_steps else optim.lr,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=decay_steps,
        lr_decay_style=optim.decay_style,
        # The scheduler overwrites the optimizer's weight decay at every step, so it is told the same
        # constant.
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=decay_steps,
        wd_incr_style="constant",
        # A resumed run keeps the schedule of its own configuration, which is the one it was started with.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers that a chained one is made of, or the one itself."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _torch_adams(optimizer: MegatronOptimizer) -> Iterator[torch.optim.Optimizer]:
    """The torch Adams inside megatron's optimizer; none where Transformer Engine or apex bring a fused one."""
    for part in _parts(optimizer):
        if isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW):
            yield part.optimizer


def allocate_state(optimizer: MegatronOptimizer) -> None:
    """Gives an optimizer that has not stepped yet its (zero) state.

    Megatron's distributed optimizer reads the step count of torch's Adam from its state, and fails where
    there is none: on loading a checkpoint, and on saving one before the first step.
    """
    for adam in _torch_adams(optimizer):
        for group in adam.param_groups:
            for parameter in group["params"]:
                if not adam.state[parameter]:
                    adam.state[parameter] = {
                        "step": torch.zeros((), dtype=torch.float32),
                        "exp_avg": torch.zeros_like(parameter.data),
                        "exp_avg_sq": torch.zeros_like(parameter.data),
                    }


def load_optimizer_state(optimizer: MegatronOptimizer, loaded: dict) -> None:
    """Takes over what ``optimizer.sharded_state_dict`` asked for and a checkpoint gave.

    Not ``optimizer.load_state_dict`` alone: megatron's fully reshardable format has no step count a parameter, and its
    reader looks for one wherever torch's Adam keeps one. So the counts are taken out while it reads.

    Args:
        optimizer: with allocated state (:func:`allocate_state`).
        loaded: changed.
    """
    parts = _parts(optimizer)
    states = [loaded] if len(parts) == 1 else [loaded[index] for index in range(len(parts))]
    for part, state in zip(parts, states, strict=True):
        values = state.pop("param_state", None)
        part.load_state_dict(state)
        if values is not None:
            for adam in _torch_adams(part):
                for entry in adam.state.values():
                    entry.pop("step")
            part.load_parameter_state_from_fully_reshardable(values)
    _restore_steps(optimizer)


def _restore_steps(optimizer: MegatronOptimizer) -> None:
    """Puts back every parameter's step count after loading.

    Megatron's distributed optimizer stores the count of torch's Adam with the parameter groups, but on
    loading overwrites it by the count before loading (it treats the state's own "step" as not persistent).
    Adam's bias correction would start anew.
    """
    for adam in _torch_adams(optimizer):
        for group in adam.param_groups:
            # Without the distributed optimizer there is no such entry, and the states are right.
            count = group.pop("step", None)
            for parameter in group["params"]:
                state = adam.state[parameter]
                # A tensor of its own: Adam counts in place, a shared count would grow once per parameter.
                state["step"] = state["step"].clone() if count is None else torch.tensor(float(count))


def connect_schedule(
    ddp: list[DistributedDataParallel], optimizer: MegatronOptimizer, parallel: ParallelConfig
) -> None:
    """Fills in the callables of the transformer config that megatron's pipeline schedules look up."""

    def one_or_all(functions: list[Any]) -> Any:
        return functions[0] if len(functions) == 1 else functions

    # The schedule reads the first chunk's.
    config: Any = ddp[0].config
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if parallel.overlap_grad_reduce:
        config.no_sync_func = one_or_all([chunk.no_sync for chunk in ddp])
    if parallel.overlap_param_gather and parallel.distributed_optimizer:
        config.param_sync_func = one_or_all([chunk.start_param_sync for chunk in ddp])


def build_train_state(
    module: MegatronModule, optim: OptimConfig, trainer: TrainerConfig, parallel: ParallelConfig, device: torch.device
) -> TrainState:
    """Everything that trains ``module``; see :class:`TrainState`."""
    ddp = [
        wrap_model(chunk, trainer, parallel, device, number == 0) for number, chunk in enumerate(model_chunks(module))
    ]
    optimizer = build_optimizer(ddp, optim, trainer, parallel)
    connect_schedule(ddp, optimizer, parallel)
    return TrainState(module, ddp, optimizer, build_scheduler(optimizer, optim, trainer))


def micro_batches_per_step(global_batch_size: int) -> int:
    """Packed sequences that one replica computes in a step; the replicas share the global batch evenly."""
    return global_batch_size // parallel_state.get_data_parallel_world_size()
