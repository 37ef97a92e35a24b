"""Keeps the libraries' known noise off the console, so that what a user reads is about the run. Light: no torch."""

from __future__ import annotations

import logging
import sys
import warnings

# Deprecations among the libraries, and "no Transformer Engine, no apex" from five places.
_NOISY_MODULES = (r"megatron\.", r"lightning\.", r"nemo\.", r"torch\.", r"hybridprune_megatron\.engine\.cpu_adapter")

_LEVELS = {
    # Every parameter's bucket, the whole optimizer configuration, "GPU available: False".
    "megatron": logging.WARNING,
    "lightning": logging.WARNING,
    "nemo_logger": logging.WARNING,
    # Below "lightning", whose level its import sets.
    "lightning.pytorch.utilities.rank_zero": logging.WARNING,
    "lightning.fabric.utilities.rank_zero": logging.WARNING,
    # NeMo's telemetry, which is off.
    "nv_one_logger": logging.ERROR,
    "nv_one_logger.api.config": logging.ERROR,
    "nv_one_logger.training_telemetry.api.training_telemetry_provider": logging.ERROR,
    # Advice to megatron's own callers that this project cannot follow on a CPU.
    "megatron.core.distributed.distributed_data_parallel": logging.ERROR,
    "megatron.core.dist_checkpointing.strategies.torch": logging.ERROR,
    "torch.utils.cpp_extension": logging.ERROR,
    # A tokenizer's folder that is an export's, whose configuration is of our own class.
    "transformers.configuration_utils": logging.ERROR,
}


def quiet_libraries() -> None:
    """Call it before the slow imports, and again after libraries that set levels themselves (exp_manager).

    ``python -W default recipes/finetune.py ...`` shows everything; ``PYTHONWARNINGS=ignore`` hides no less than this.
    """
    if any(not option.startswith("ignore") for option in sys.warnoptions):
        return
    for module in _NOISY_MODULES:
        warnings.filterwarnings("ignore", module=module)
    for name, level in _LEVELS.items():
        logging.getLogger(name).setLevel(level)
