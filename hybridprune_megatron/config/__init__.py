"""Typed configuration: schema, checks, and composition of ``conf/`` with Hydra. Imports neither torch nor megatron."""

from hybridprune_megatron.checks import ConfigError
from hybridprune_megatron.config.compose import checked_config, load_config, parse_command_line
from hybridprune_megatron.config.schema import Config

__all__ = ["Config", "ConfigError", "checked_config", "load_config", "parse_command_line"]
