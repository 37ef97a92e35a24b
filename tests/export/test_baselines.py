"""Every baseline computes in the export what it computes in training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hybridprune_megatron.config import load_config
from hybridprune_megatron.export.configuration_hybridprune import exported_settings
from hybridprune_megatron.models.build import build_reduction
from tests.export.test_parity import assert_equal_models

SETTINGS = {
    "fastv": ["reduction=fastv", "reduction.budget=0.6"],
    "pyramiddrop": ["reduction=pyramiddrop", "reduction.budget=0.7"],
    "utrc": ["reduction=utrc", "reduction.budget=0.5"],
    "utrc, pruning": ["reduction=utrc", "reduction.budget=0.5", "reduction.select.dropped=discard"],
    "merging query": ["reduction=query", "reduction.budget=0.5", "reduction.select.dropped=merge"],
    "longmamba": ["reduction=longmamba"],
    "evs": ["reduction=evs", "reduction.budget=0.4"],
    "evs_pixels": ["reduction=evs_pixels", "reduction.budget=0.4"],
    "tome": ["reduction=tome", "reduction.budget=0.4"],
    "evs_query": ["reduction=evs_query", "reduction.budget=0.3"],
    "random front": [
        "reduction=query",
        "reduction.budget=0.3",
        "reduction.front=random",
        "reduction.front.retention=0.6",
    ],
    "uniform front, utrc": [
        "reduction=utrc",
        "reduction.budget=0.3",
        "reduction.front=uniform",
        "reduction.front.retention=0.6",
    ],
}


@pytest.fixture(params=sorted(SETTINGS))
def reduced(request, world):
    """The world with both models set to a baseline."""
    settings = load_config(["experiment=demo", *SETTINGS[request.param]]).reduction
    saved, trained = world.hf.config.reduction, world.model.reduction
    world.model.reduction = build_reduction(replace(world.cfg, reduction=settings))
    world.hf.set_reduction(exported_settings(settings))
    yield world
    world.model.reduction = trained
    world.hf.set_reduction(saved)


def test_the_export_equals_the_training_model(reduced, inputs) -> None:
    assert_equal_models(reduced.model, reduced.hf, inputs)
    settings = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None}
    cached, plain = (reduced.hf.generate(**inputs, **settings, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, plain)
