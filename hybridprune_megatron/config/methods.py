"""A stored configuration under another way to drop visual tokens, for comparisons on one model."""

from __future__ import annotations

from omegaconf import OmegaConf

from hybridprune_megatron.checks import ConfigError, fail
from hybridprune_megatron.config.compose import change_config, compose_config, import_named
from hybridprune_megatron.config.flat import plain_config
from hybridprune_megatron.config.schema import Config

#: The method that drops nothing.
EVERY_TOKEN = "none"


def with_method(cfg: Config, method: str, budget: float) -> Config:
    """The configuration under another reduction.

    Args:
        cfg: of the model.
        method: a file of ``conf/reduction/`` without its ending, then changes to it if there are any, as in
            ``"query reduction.score=my_module.MyScore"``.
        budget: mean share of visual tokens over all layers.

    Raises:
        ConfigError: there is no such file, a change is none of the reduction, or the budget cannot be met.
    """
    name, *changes = method.split() or [""]
    for change in changes:
        if not change.lstrip("+").startswith("reduction."):
            raise fail("methods", method, "changes to a method are keys of reduction", "give e.g. reduction.layers=all")
    try:
        composed = compose_config([f"reduction={name}", *changes, f"reduction.budget={budget}"])
        reduction = OmegaConf.to_container(composed.reduction, resolve=True)
        # A score of the user's own is imported, for this line names it.
        import_named(changes)
        return change_config(plain_config(cfg) | {"reduction": reduction})
    except ConfigError as error:
        raise ConfigError(f"methods={method} at {budget:g}: {error}") from error
