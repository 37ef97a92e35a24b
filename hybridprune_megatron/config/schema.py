"""The typed configuration of a run, checked when it is built.

Nothing heavy is imported, so that a wrong value is reported before megatron or torch is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

from hybridprune_megatron.bounds import check_bounds
from hybridprune_megatron.config.cross_checks import check_config
from hybridprune_megatron.config.fp8_schema import Fp8Config
from hybridprune_megatron.config.groups import (
    DataConfig,
    LrScaleConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainerConfig,
)
from hybridprune_megatron.config.model_schema import ExpertsConfig, ModelConfig, TrainableConfig, VisionConfig
from hybridprune_megatron.config.reduction_schema import ReductionConfig
from hybridprune_megatron.config.run_checks import (
    check_copies,
    check_exp_manager,
    check_fp8,
    check_tuning,
    check_validation,
)
from hybridprune_megatron.config.texts import check_run_name
from hybridprune_megatron.config.tuning_schema import TuningConfig

__all__ = [
    "Config",
    "DataConfig",
    "ExpertsConfig",
    "Fp8Config",
    "LrScaleConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "ReductionConfig",
    "TrainableConfig",
    "TrainerConfig",
    "TuningConfig",
    "VisionConfig",
]


@dataclass
class Config(RunConfig):
    """A whole run whose groups agree; its keys are those of ``RunConfig``."""

    def __post_init__(self) -> None:
        check_bounds("", self)
        check_run_name(self.name)
        check_exp_manager(self.exp_manager)
        check_copies(self)
        check_config(self)
        check_tuning(self)
        check_fp8(self)
        check_validation(self)
