"""The groups of the configuration: one dataclass per Hydra group, which checks its own fields when it is built.

``schema.Config`` checks what several groups must agree on. The line on a field in an ``Attributes`` section is also
what ``--help`` prints. Fields without a default come from a file in ``conf/``.

Nothing heavy is imported, so that a wrong value is reported before megatron or torch is loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from hybridprune_megatron.bounds import (
    Count,
    NotNegative,
    OneOf,
    Positive,
    Range,
    Seed,
    Share,
    ShareBelowOne,
    Steps,
    Text,
    Ways,
    Whole,
    check_bounds,
)
from hybridprune_megatron.checks import fail
from hybridprune_megatron.config.fp8_schema import Fp8Config
from hybridprune_megatron.config.model_schema import ModelConfig
from hybridprune_megatron.config.reduction_schema import ReductionConfig
from hybridprune_megatron.config.texts import check_frame_text
from hybridprune_megatron.config.tuning_schema import TuningConfig


@dataclass
class DataConfig:
    """Where samples come from and how a conversation about videos becomes tokens.

    Attributes:
        train: Energon dataset folder or metadataset .yaml to train on; s3://bucket/path and msc://profile/path too.
        validation: Energon dataset folder or metadataset .yaml with held-out samples, as train; null = no validation.
        tokenizer: folder of a Hugging Face tokenizer.
        sequence_length: tokens that samples are packed to (one micro-batch), counted as length_counts says.
        length_counts: tokens (all of them), or cost (a visual token counts as the largest budget that is trained).
        too_long: a sample that does not fit is left out and counted (skip), or loses frames, then tiles (shrink).
        min_frames: fewest frames that shrink leaves a longer video.
        num_workers: loader processes per packed sequence of a rank's step; 0 loads in the training process.
        shuffle_buffer: samples held in memory to shuffle among, over the whole job.
        packing_buffer: samples that the packing looks at together.
        sampling: frames taken from a video; uniform (num_frames), fps (frames per second), none (text only).
        num_frames: frames per video with uniform sampling.
        fps: frames per second with fps sampling.
        max_frames: most frames of one video with fps sampling.
        max_tiles: most tiles that an image is cut into, plus a thumbnail; 1 = the whole image as one.
        frame_text: text before a frame; {index} counts from 1, {seconds:.2f} is its time.
        conversation: turns that become samples; first_question (it scores for all turns), split_turns, all_turns.
        max_bad_share: share of broken samples (0 to 1) that is skipped and counted before the job fails.
    """

    tokenizer: str
    sequence_length: Count
    train: str | None = None
    validation: str | None = None
    num_workers: Annotated[int, Range(0, 1024)] = 2
    shuffle_buffer: Annotated[int, Range(1, 10**7)] = 1000
    packing_buffer: Annotated[int, Range(1, 10**5)] = 64
    sampling: Annotated[str, OneOf("uniform", "fps", "none")] = "uniform"
    num_frames: Count = 16
    fps: Annotated[float, Range(0, 1000, above=True)] = 2.0
    max_frames: Count = 128
    frame_text: Annotated[str, Text()] = "Frame {index} sampled at {seconds:.2f} seconds: "
    conversation: Annotated[str, OneOf("first_question", "split_turns", "all_turns")] = "first_question"
    max_bad_share: Share = 0.01
    length_counts: Annotated[str, OneOf("tokens", "cost")] = "tokens"
    too_long: Annotated[str, OneOf("skip", "shrink")] = "skip"
    min_frames: Count = 8
    max_tiles: Annotated[int, Range(1, 64)] = 1

    def __post_init__(self) -> None:
        check_bounds("data", self)
        check_frame_text(self.frame_text)

    @property
    def most_frames(self) -> int:
        """Most frames that one video can become."""
        return {"uniform": self.num_frames, "fps": self.max_frames, "none": 0}[self.sampling]

    @property
    def least_frames(self) -> int:
        """Fewest frames that the longest video may be left with."""
        return min(self.min_frames, self.most_frames) if self.too_long == "shrink" else self.most_frames


@dataclass
class LrScaleConfig:
    """What the learning rate is multiplied by in a part of the model, at every step of its schedule.

    Attributes:
        vision: factor for the vision tower.
        projector: factor for the projector.
        language: factor for the language model.
    """

    vision: Positive = 1.0
    projector: Positive = 1.0
    language: Positive = 1.0

    def __post_init__(self) -> None:
        for part, factor in vars(self).items():
            if factor == 0:
                fix = f"freeze the part with model.trainable.{part}=false"
                raise fail(f"optim.lr_scale.{part}", factor, "must be a finite number above 0", fix)
        check_bounds("optim.lr_scale", self)


@dataclass
class OptimConfig:
    """Adam and its learning-rate schedule.

    Attributes:
        lr: peak learning rate.
        min_lr: learning rate at the end of the decay.
        warmup_steps: steps of linear warmup from 0.
        decay_steps: step at which min_lr is reached; null = trainer.max_steps.
        decay_style: constant, linear or cosine.
        weight_decay: decoupled weight decay.
        beta1: decay of Adam's first moment.
        beta2: decay of Adam's second moment.
        eps: epsilon of Adam.
        clip_grad: largest gradient norm; 0 = no clipping.
        lr_scale: factors on the learning rate by part of the model.
    """

    lr: Positive
    min_lr: NotNegative = 0.0
    warmup_steps: Annotated[int, Range(0, 10**9)] = 0
    decay_steps: Steps | None = None
    decay_style: Annotated[str, OneOf("constant", "linear", "cosine")] = "cosine"
    weight_decay: NotNegative = 0.0
    beta1: ShareBelowOne = 0.9
    beta2: ShareBelowOne = 0.999
    eps: Positive = 1e-8
    clip_grad: NotNegative = 1.0
    lr_scale: LrScaleConfig = field(default_factory=LrScaleConfig)

    def __post_init__(self) -> None:
        check_bounds("optim", self)
        if self.min_lr > self.lr:
            raise fail("optim.min_lr", self.min_lr, f"must be from 0 to optim.lr={self.lr}", "lower optim.min_lr")


@dataclass
class TrainerConfig:
    """Length of the run, machines, precision, and what is written when.

    Attributes:
        max_steps: optimizer steps of the run.
        num_nodes: machines.
        devices: processes (GPUs) per machine.
        precision: fp32 or bf16 (weights and activations; optimizer and states stay fp32).
        global_batch_size: packed sequences per optimizer step, over all data-parallel ranks.
        micro_batch_size: packed sequences per forward pass; always 1 (make data.sequence_length longer instead).
        seed: seed of weights, data order and scorers.
        log_every_n_steps: steps between two log lines.
        save_every_n_steps: steps between two checkpoints (the last step is always saved).
        keep_last: newest checkpoints that stay.
        keep_every_n_steps: checkpoints of multiples of it are never removed; 0 = none.
        keep_best: the checkpoint with the best of these figures of a validation stays too; loss, accuracy (with the
            tokens dropped), loss_full, accuracy_full (with every token); null = none.
        copy_checkpoints_to: folder on another disk that gets a copy of every checkpoint in the background; as many stay
            as in output_dir, and a run continues from the newest of both; null = none.
        eval_samples: held-out samples in a validation or evaluation; 0 = none.
        eval_every_n_steps: steps between two validations on data.validation (the last step is always validated);
            0 = never.
        early_stopping: validations in a row without a better figure (that of keep_best, or the loss) after which the
            run ends; 0 = off.
        recompute: activations computed again in the backward pass to save memory; none, selective (convolution, scan
            and attention's core) or full (whole layers).
        async_save: write checkpoints in the background while training continues.
        nonfinite: what a loss or gradient that is not finite does; stop or skip (no update, logged with its samples).
        deterministic: on GPUs the same digits in every run of one layout, at a cost in speed; CPUs have them anyway.
        timeout_minutes: how long a process waits for the others before the job fails.
    """

    max_steps: Steps
    num_nodes: Annotated[int, Range(1, 2**16)] = 1
    devices: Annotated[int, Range(1, 1024)] = 1
    precision: Annotated[str, OneOf("fp32", "bf16")] = "bf16"
    global_batch_size: Annotated[int, Range(1, 2**20)] = 1
    micro_batch_size: Count = 1
    seed: Seed = 1234
    log_every_n_steps: Steps = 10
    save_every_n_steps: Steps = 100
    keep_last: Count = 2
    keep_every_n_steps: Whole = 0
    keep_best: Annotated[str, OneOf("loss", "accuracy", "loss_full", "accuracy_full")] | None = None
    copy_checkpoints_to: str | None = None
    eval_samples: Whole = 0
    eval_every_n_steps: Whole = 100
    early_stopping: Whole = 0
    recompute: Annotated[str, OneOf("none", "selective", "full")] = "none"
    async_save: bool = False
    nonfinite: Annotated[str, OneOf("stop", "skip")] = "stop"
    deterministic: bool = False
    # Up to a year: what is longer overflows in the libraries' counters.
    timeout_minutes: Annotated[float, Range(0, 525600, above=True)] = 30.0

    def __post_init__(self) -> None:
        check_bounds("trainer", self)
        if self.micro_batch_size != 1:
            reason = "must be 1 (a micro-batch is one packed sequence)"
            fix = "make data.sequence_length longer to do more at once"
            raise fail("trainer.micro_batch_size", self.micro_batch_size, reason, fix)


@dataclass
class ParallelConfig:
    """How the model and the batch are split; what is left of the processes is data parallel.

    Attributes:
        tensor: processes that split every layer; divides heads and groups.
        pipeline: processes that split the depth; one more than the | in model.hybrid_pattern.
        virtual_pipeline: chunks of layers that each of these holds, interleaved for a smaller bubble; pipeline times
            virtual_pipeline is then one more than the |.
        context: processes that split a packed sequence.
        expert: processes that share the routed experts of E layers, taken from those of all other kinds but pipeline.
        sequence_parallel: split activations between layers along the sequence (needs tensor > 1).
        distributed_optimizer: split optimizer states over data-parallel ranks.
        overlap_grad_reduce: reduce gradients while the backward pass runs.
        overlap_param_gather: gather parameters while the forward pass runs (needs the distributed optimizer).
    """

    tensor: Ways = 1
    pipeline: Ways = 1
    virtual_pipeline: Ways = 1
    context: Ways = 1
    expert: Ways = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False

    def __post_init__(self) -> None:
        check_bounds("parallel", self)
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            fix = "set parallel.virtual_pipeline=1 or parallel.pipeline=2"
            raise fail("parallel.virtual_pipeline", self.virtual_pipeline, "one process runs all layers anyway", fix)
        if self.sequence_parallel and self.tensor == 1:
            reason = "needs parallel.tensor of 2 or more, and it is 1"
            raise fail("parallel.sequence_parallel", "true", reason, "set parallel.sequence_parallel=false")
        if self.overlap_param_gather and not (self.distributed_optimizer and self.overlap_grad_reduce):
            reason = "needs parallel.distributed_optimizer=true and parallel.overlap_grad_reduce=true"
            raise fail("parallel.overlap_param_gather", "true", reason, "set both, or neither")

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one copy of the model."""
        return self.tensor * self.pipeline * self.context

    @property
    def sequence_shares(self) -> int:
        """Processes of a stage that share a packed sequence between its layers, and on the first stage its frames."""
        return self.context * (self.tensor if self.sequence_parallel else 1)


@dataclass
class RunConfig:
    """A whole run: all groups, before they are compared; ``schema.Config`` is one that has passed.

    Attributes:
        name: name of the run.
        output_dir: folder that the run writes everything to.
        model: shape of the model and the weights it starts from.
        data: where samples come from.
        reduction: how visual tokens are dropped.
        optim: optimizer and learning rate.
        trainer: length of the run, machines, precision.
        parallel: how the model and the batch are split.
        exp_manager: passed to NeMo's exp_manager; checkpoints are the run's own business.
        tuning: how finetuning goes about budgets, targets and weights.
        fp8: which layers run in FP8, and how numbers are scaled.
    """

    name: str
    output_dir: str
    model: ModelConfig
    data: DataConfig
    reduction: ReductionConfig
    optim: OptimConfig
    trainer: TrainerConfig
    parallel: ParallelConfig
    exp_manager: dict[str, Any]
    # With defaults, so that checkpoints from before these groups can be read.
    tuning: TuningConfig = field(default_factory=TuningConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)

    @property
    def data_parallel_size(self) -> int:
        """Copies of the model that work on different packed sequences."""
        return self.trainer.num_nodes * self.trainer.devices // self.parallel.model_parallel_size

    @property
    def num_micro_batches(self) -> int:
        """Packed sequences that one copy of the model runs through per optimizer step."""
        return self.trainer.global_batch_size // (self.data_parallel_size * self.trainer.micro_batch_size)

    @property
    def visual_cost(self) -> float:
        """What a visual token counts for in ``data.sequence_length``."""
        if self.data.length_counts == "tokens":
            return 1.0
        return self.tuning.budget.largest(self.reduction.budget)

    def counted(self, text: int, visual: int) -> int:
        """What tokens of text and visual tokens count for in ``data.sequence_length``."""
        return text + math.ceil(visual * self.visual_cost)

    @property
    def longest_sequence(self) -> int:
        """Most tokens of a packed sequence before any reduction."""
        return math.floor(self.data.sequence_length / self.visual_cost)

    @property
    def validation_steps(self) -> int:
        """Steps between two validations while training; 0: there are none."""
        trainer = self.trainer
        return trainer.eval_every_n_steps if self.data.validation is not None and trainer.eval_samples else 0

    @property
    def drops(self) -> bool:
        """Whether the reduction, at its configured budget, changes what the model computes."""
        return self.reduction.policy(self.model.hybrid_pattern) is not None

    @property
    def length_multiple(self) -> int:
        """What the length of a packed sequence divides by: ranks that share it, FP8's tiles, the reduction's own."""
        # Attention cuts a sequence into two chunks a context-parallel rank; a rank's part has whole tiles.
        unit = math.lcm(2 if self.parallel.context > 1 else 1, self.fp8.tile)
        return math.lcm(self.parallel.sequence_shares * unit, self.reduction.select.multiple_of)

    @property
    def retention_by_layer(self) -> tuple[float, ...]:
        """Share of a sample's visual tokens that enters each layer."""
        return self.reduction.retention(self.model.hybrid_pattern)

    def retention_at(self, budget: float) -> tuple[float, ...]:
        """``retention_by_layer`` at another budget."""
        return replace(self.reduction, budget=budget).retention(self.model.hybrid_pattern)
