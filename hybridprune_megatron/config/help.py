"""The text of ``--help``: groups and their options, the most used keys with their values, examples."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hybridprune_megatron.config.explain import GROUPS, group_options
from hybridprune_megatron.config.fields import field_help, key_help, leaf_keys
from hybridprune_megatron.config.reduction_schema import PARTS

COMMON_KEYS = (
    *("name", "output_dir", "model.init_checkpoint", "data.train", "data.validation", "data.tokenizer"),
    *("data.sequence_length", "data.num_frames", "reduction.budget", "reduction.layers", "reduction.score"),
    *("tuning.budget.distribution", "tuning.distillation.weight", "tuning.lora.rank", "optim.lr"),
    *("trainer.max_steps", "trainer.global_batch_size", "trainer.precision", "fp8.recipe", "trainer.num_nodes"),
    *("trainer.devices", "trainer.save_every_n_steps", "trainer.seed", "parallel.tensor", "parallel.pipeline"),
    "parallel.context",
)
EXAMPLES = (
    "hybridprune finetune experiment=demo",
    "hybridprune finetune experiment=demo reduction.budget=0.35 trainer.max_steps=50",
    "hybridprune finetune experiment=demo reduction=random name=demo_random",
    "hybridprune finetune experiment=demo 'reduction.layers=[0,2,5,7]'",
    "hybridprune finetune experiment=demo tuning=lora tuning.budget.distribution=uniform name=demo_lora",
    "hybridprune finetune experiment=nemotron_nano_12b_v2_vl --cfg job",
)
_WIDTH = 120
# Where the explanation of a key starts.
_COLUMN = 44


def usage(composed: DictConfig, conf_dir: Path, everything: bool = False) -> str:
    """The help text.

    Args:
        composed: configuration whose values are shown as the current ones.
        everything: show every key instead of the most used.
    """
    lines = ["usage: hybridprune finetune [group=option] [key=value] ... [-m | --help | --help-all | --cfg job]", ""]
    lines += ["Groups and their options (files in conf/):"]
    for group in GROUPS:
        options = ", ".join(group_options(conf_dir, group))
        lines += textwrap.wrap(f"  {group:<12}{options}", _WIDTH, subsequent_indent=" " * 14)
    keys = leaf_keys() if everything else COMMON_KEYS
    lines += ["", "Every key and its value now:" if everything else "Most used keys and their values now:"]
    lines += list(_key_lines({key: (_words(OmegaConf.select(composed, key)), key_help(key)) for key in keys}))
    if everything:
        lines += _part_lines(composed)
    else:
        lines += ["", "-m sweeps: key=1,2,3 is a run for every value, lists of several keys one for every combination."]
        lines += ["--help-all lists every key, --cfg job prints the resolved configuration; both take overrides."]
    return "\n".join([*lines, "", "Examples:", *(f"  {example}" for example in EXAMPLES)])


def _part_lines(composed: DictConfig) -> Iterator[str]:
    """The keys that each score, schedule and front brings, with the values they have now or would start with."""
    for part, registry in PARTS.items():
        now = OmegaConf.select(composed, f"reduction.{part}")
        chosen = {"name": now} if isinstance(now, str) else now
        for name in registry.names:
            plugin = registry.find(name)
            keys = {}
            for each in fields(plugin):
                value = chosen.get(each.name, each.default) if chosen["name"] == name else each.default
                keys[f"reduction.{part}.{each.name}"] = (_words(value), field_help(plugin, each.name))
            yield from ("", f"With reduction.{part}={name}: {(plugin.__doc__ or '').splitlines()[0]}")
            yield from _key_lines(keys)


def _key_lines(keys: Mapping[str, tuple[str, str]]) -> Iterator[str]:
    """A line per key: name=value and what it is."""
    for key, (value, text_on_it) in keys.items():
        text = f"{key}={value}"
        # The text starts in one column; what is longer than that gets a line of its own.
        start = f"  {text:<{_COLUMN}}"
        if len(text) >= _COLUMN:
            yield f"  {text}"
            start = " " * (_COLUMN + 2)
        yield from textwrap.wrap(start + text_on_it, _WIDTH, subsequent_indent=" " * (_COLUMN + 2))


def _words(value: Any) -> str:
    if isinstance(value, DictConfig):
        # A part shows its name; its keys have lines of their own.
        return str(value.get("name", "..."))
    if value is None:
        return "null"
    if isinstance(value, tuple):
        value = list(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
