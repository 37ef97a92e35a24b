"""The published sizes, on the meta device: our weights under transformers' names have transformers' shapes."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import NemotronHForCausalLM

from hybridprune_megatron.config import load_config
from hybridprune_megatron.config.schema import ModelConfig
from hybridprune_megatron.cost.parameters import language_parameters
from hybridprune_megatron.export.transformers_model import transformers_config
from tests.parity.ours import config_with
from tests.worlds import run_world

MODELS = ("nemotron_nano_12b_v2_vl", "nemotron_nano_9b_v2", "nemotron_h_8b", "nemotron_3_nano_30b_a3b")


def _theirs(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of transformers' model as its files have them."""
    with torch.device("meta"):
        found = NemotronHForCausalLM(transformers_config(model))
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in found.state_dict().items():
        name = name.replace("model.", "backbone.", 1)
        layer, stacked, part = name.rpartition(".experts.")
        if stacked:
            shapes |= {f"{layer}.experts.{n}.{part}.weight": tuple(value.shape[1:]) for n in range(len(value))}
        else:
            shapes[name] = tuple(value.shape)
    return shapes


def _ours(names: list[str]) -> dict[str, dict[str, tuple[int, ...]]]:
    from dataclasses import asdict, replace

    from hybridprune_megatron.engine.parallel import init_model_parallel
    from hybridprune_megatron.engine.weights import whole_weights
    from hybridprune_megatron.huggingface.names import ExpertParts, Heads, WeightNames
    from hybridprune_megatron.models.build import build_model

    init_model_parallel()
    found = {}
    for name in names:
        model = replace(load_config([f"experiment={name}"]).model, vision=None, spec="torch")
        cfg = config_with(model)
        weights = whole_weights(build_model(cfg, meta=True))
        parts = ExpertParts.of(asdict(model.experts)) if model.experts is not None else None
        heads = Heads(model.num_query_groups, model.kv_channels)
        table = WeightNames("nemotron_h", model.hybrid_pattern, heads, experts=parts)
        found[name] = {name: tuple(value.shape) for name, value in table.to_theirs(weights).items()}
    return found


@pytest.fixture(scope="module")
def ours() -> dict[str, dict[str, tuple[int, ...]]]:
    return run_world(1, _ours, list(MODELS))[0]


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes(name: str, ours) -> None:
    model = load_config([f"experiment={name}"]).model
    assert ours[name] == _theirs(model)


@pytest.mark.parametrize("name", MODELS)
def test_counted_parameters(name: str, ours) -> None:
    model = load_config([f"experiment={name}"]).model
    learned = [shape for name, shape in ours[name].items() if not name.endswith("correction_bias")]
    assert language_parameters(model).total == sum(math.prod(shape) for shape in learned)
