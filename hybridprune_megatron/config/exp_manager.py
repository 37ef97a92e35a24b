"""The ``exp_manager`` group, which NeMo checks when it starts: here what it would refuse late or misread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybridprune_megatron.bounds import Range, Rule, check_value
from hybridprune_megatron.checks import fail

_SWITCH = Rule(bool, optional=True)
#: What ``conf/config.yaml`` sets, and the switches next to it.
_RULES = {
    "explicit_log_dir": Rule(str, optional=True),
    "seconds_to_sleep": Rule(float, bound=Range(0, 3600)),
    "wandb_logger_kwargs": Rule(dict, optional=True),
    **dict.fromkeys(
        (
            "create_tensorboard_logger",
            "create_wandb_logger",
            "create_checkpoint_callback",
            "resume_if_exists",
            "resume_ignore_no_checkpoint",
            "log_step_timing",
            "log_tflops_per_sec_per_gpu",
        ),
        _SWITCH,
    ),
}


def check_exp_manager(settings: Mapping[str, Any]) -> None:
    """What is set has the right type, checkpoints stay the run's own business, and W&B knows its project.

    Raises:
        ConfigError: the first that is wrong.
    """
    for name, rule in _RULES.items():
        if name in settings:
            check_value(f"exp_manager.{name}", settings[name], rule)
    if settings.get("create_checkpoint_callback"):
        reason = "NeMo's callback cannot write checkpoints in one move"
        fix = "leave it false, the run saves every trainer.save_every_n_steps steps by itself"
        raise fail("exp_manager.create_checkpoint_callback", True, reason, fix)
    if settings.get("create_wandb_logger"):
        kwargs = settings.get("wandb_logger_kwargs")
        project = kwargs.get("project") if isinstance(kwargs, Mapping) else kwargs
        if not isinstance(project, str) or not project.strip():
            key = "exp_manager.wandb_logger_kwargs.project"
            raise fail(key, project, "exp_manager.create_wandb_logger=true needs a project", f"give +{key}=<project>")
