"""Whether a run may continue from what its folder holds; nothing slow is imported for it."""

from __future__ import annotations

from hybridprune_megatron.checks import ConfigError
from hybridprune_megatron.config.checkpoint_folder import newest_of_run, saved_config
from hybridprune_megatron.config.flat import config_values, leaves
from hybridprune_megatron.config.schema import Config

# What may change between two starts of one run: how far it goes, how it is spread, how it reports.
_FREE = {
    *("trainer.max_steps", "trainer.num_nodes", "trainer.devices", "trainer.recompute", "trainer.eval_samples"),
    *("trainer.log_every_n_steps", "trainer.save_every_n_steps", "data.validation"),
    *("output_dir", "name", "model.init_checkpoint", "trainer.async_save", "trainer.timeout_minutes"),
    # Nor does validation touch what is trained. Another figure or other samples start the search for the best anew.
    *("trainer.nonfinite", "trainer.eval_every_n_steps", "trainer.early_stopping"),
    *("trainer.keep_last", "trainer.keep_every_n_steps", "trainer.keep_best"),
    "trainer.copy_checkpoints_to",
}
_FREE_GROUPS = ("parallel.", "exp_manager.")
# The two optimizers keep their states under different names.
_FIXED = {"parallel.distributed_optimizer"}


def check_resume(cfg: Config) -> None:
    """Refuses to continue a run of other settings under the name of this one.

    Raises:
        ConfigError: naming the first setting that differs from the run's newest checkpoint.
    """
    newest = newest_of_run(cfg)
    if newest is None:
        return
    distillation = cfg.tuning.distillation
    # The weights of a checkpoint replace the initial ones, unless those teach.
    teaches = distillation.weight > 0 and distillation.teacher == "initial"
    free = _FREE - {"model.init_checkpoint"} if teaches else _FREE
    try:
        saved = dict(leaves(saved_config(newest)))
    except ValueError as error:
        raise ConfigError(f"{error}; give another output_dir") from None
    for key, value in config_values(cfg).items():
        if key in free or (key.startswith(_FREE_GROUPS) and key not in _FIXED):
            continue
        if key not in saved or saved[key] == value:
            continue
        if key == "model.hybrid_pattern" and saved[key].replace("|", "") == value.replace("|", ""):
            # A | only says where pipeline stages are cut.
            continue
        raise ConfigError(
            f"{key}={value}: {cfg.output_dir} holds a run with {key}={saved[key]}; give the same value to continue "
            "it, or name=<name> for a run of its own"
        )
