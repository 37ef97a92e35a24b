"""Our model of a Hugging Face folder, as a run would build and load it. To be called in a world of processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch


def config_of(folder: Path, *overrides: str, **values_of_model: Any) -> Any:
    """The demo's configuration with the model of a folder, in fp32 and without reduction."""
    from hybridprune_megatron.config.schema import ModelConfig
    from hybridprune_megatron.huggingface.folder import model_values, read_config
    from hybridprune_megatron.huggingface.source import open_weights

    weights: Any = open_weights(folder)
    values = model_values("twin", read_config(folder), weights.files.shape, weights.table)
    model = ModelConfig.of({**values, "init_checkpoint": str(folder), "spec": "torch", **values_of_model})
    return config_with(model, *overrides)


def config_with(model: Any, *overrides: str) -> Any:
    """The demo's configuration with another model."""
    from hybridprune_megatron.config import load_config

    cfg = load_config(["experiment=demo", "reduction=none", "trainer.precision=fp32", *overrides])
    return replace(cfg, model=model, data=cfg.data if model.vision else replace(cfg.data, sampling="none"))


def model_of(cfg: Any) -> Any:
    """The model with its weights."""
    from megatron.core import parallel_state

    from hybridprune_megatron.engine.parallel import init_model_parallel
    from hybridprune_megatron.engine.weights import load_initial_weights
    from hybridprune_megatron.models.build import build_model

    parallel = cfg.parallel
    parallel_state.destroy_model_parallel()
    init_model_parallel(parallel.tensor, parallel.pipeline, parallel.context, seed=3)
    model = build_model(cfg, parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage())
    load_initial_weights(model, cfg.model.init_checkpoint)
    return model.eval()


def text_batch(lengths: list[int], vocabulary: int, seed: int = 0) -> Any:
    """One packed sequence of texts of random tokens; every token but the first of a text is a label."""
    from hybridprune_megatron.data.batch import EncodedSample, pack
    from hybridprune_megatron.method.layout import SampleLayout

    generator = torch.Generator().manual_seed(seed)
    samples = []
    for number, length in enumerate(lengths):
        ids = torch.randint(0, vocabulary, (length,), generator=generator)
        labels = torch.cat([ids[1:], torch.tensor([-100])])
        layout = SampleLayout.from_kinds([0] * length)
        samples.append(EncodedSample(f"text-{number}", ids, labels, layout, torch.empty(0, 3, 0, 0)))
    return pack(samples)
