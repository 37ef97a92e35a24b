"""One step of the real engine under any layout: what was kept, the loss, and every gradient under its global name."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from tests.models.tiny import tiny_batch, tiny_config

#: Frames of the samples of each packed sequence; 1 sample, several, and one without a video.
BATCHES = ((17, 25), (22, 9, 12), (40,), (15, 0, 23))
#: Every layout here shares a sequence evenly if its length divides by this.
MULTIPLE_OF = 8
PATTERN = "M*M-M*M-"
#: Sizes of ``parallel`` that take no processes of their own.
SHARING = ("virtual_pipeline", "expert")
#: Drops behind layers 0 (M), 1 (*), 2 (M), 4 (M) and 5 (*), on both sides of the stage cut in the middle.
RETENTION = "reduction.schedule={name: listed, retention: [1.0,0.3,0.2,0.15,0.15,0.1,0.05,0.05]}"


def step(
    weights: str, gradients: str, sizes: dict[str, int], overrides: list[str], pattern: str, local_chunks: int = 0
) -> tuple[float, list[tuple[str, int, list[int]]]]:
    """Forward and backward of all packed sequences, no update.

    Args:
        weights: file to start from.
        gradients: folder to write the gradients to, as a checkpoint of the model.
        sizes: of ``parallel``.
        overrides: of the configuration.
        pattern: layers, with a | where a stage ends.
        local_chunks: chunks that a local choice has whatever the layout; 0: those of the layout.

    Returns:
        The loss, and what this rank saw enter its layers: name of the packed sequence, layer, original indices.
    """
    import torch
    from megatron.core import dist_checkpointing

    from hybridprune_megatron.engine.checkpoint import SHARDED_FORMAT
    from hybridprune_megatron.engine.optimization import build_train_state, model_chunks
    from hybridprune_megatron.engine.parallel import data_rank
    from hybridprune_megatron.engine.train_step import Recorder, summed_losses
    from hybridprune_megatron.models.stack import ReductionStack

    cfg = config_of(sizes, overrides, pattern)
    model = built(cfg, weights)
    if local_chunks:
        # One process in the place of ranks that each hold two chunks.
        ReductionStack.local_chunks = local_chunks
    seen = _watch(model_chunks(model))
    device = own_device()
    state = build_train_state(model, cfg.optim, cfg.trainer, cfg.parallel, device)
    where = data_rank()
    batches = [tiny_batch(*frames, pad_to_multiple_of=MULTIPLE_OF) for frames in BATCHES[where.rank :: where.size]]
    for chunk in state.ddp:
        chunk.train()
        chunk.zero_grad_buffer()
    losses = summed_losses(state.ddp, Recorder(iter(batches), device), len(batches), cfg.data.sequence_length, False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.main_grad if parameter.requires_grad else torch.zeros_like(parameter))
    if torch.distributed.get_rank() == 0:
        Path(gradients).mkdir()
    torch.distributed.barrier()
    sharded = model.sharded_state_dict(metadata=dict(SHARDED_FORMAT))
    dist_checkpointing.save(sharded, gradients, content_metadata=dict(SHARDED_FORMAT))
    return losses.total / losses.tokens, seen


def own_device() -> Any:
    """This rank's GPU in a world over nccl, else the CPU."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def built(cfg: Any, weights: str) -> Any:
    """What this rank holds of the model of a configuration, with the weights of a file."""
    from hybridprune_megatron.engine.module import HybridPruneModule
    from hybridprune_megatron.engine.parallel import init_model_parallel
    from hybridprune_megatron.engine.weights import load_initial_weights
    from hybridprune_megatron.models.build import build_model

    parallel = cfg.parallel
    init_model_parallel(
        parallel.tensor,
        parallel.pipeline,
        parallel.context,
        seed=1,
        virtual_pipeline=parallel.virtual_pipeline,
        expert=parallel.expert,
    )
    model = HybridPruneModule(cfg, partial(build_model, cfg), lambda *_: None).build_stage()
    load_initial_weights(model, weights)
    return model


def config_of(sizes: dict[str, int], overrides: list[str], pattern: str) -> Any:
    """The tiny configuration under a layout."""
    devices = 1
    for name, size in sizes.items():
        devices *= size if name not in SHARING else 1
    split = [f"parallel.{name}={size}" for name, size in sizes.items() if name != "data"]
    return tiny_config(
        *split,
        f"trainer.devices={devices}",
        f"parallel.sequence_parallel={sizes.get('tensor', 1) > 1}",
        # Gradients whole on every replica, to look at.
        "parallel.distributed_optimizer=false",
        "trainer.global_batch_size=4",
        "data.sequence_length=1024",
        *([] if any(text.startswith("reduction.schedule=") for text in overrides) else [RETENTION]),
        "reduction.select.frame_share=0.1",
        f"reduction.select.multiple_of={MULTIPLE_OF}",
        *overrides,
        pattern=pattern,
        budget=0.25,
    )


def _watch(chunks: list[Any]) -> list[tuple[str, int, list[int]]]:
    """Fills a list with what enters every layer."""
    from hybridprune_megatron.models import stack

    seen: list[tuple[str, int, list[int]]] = []
    # The layers that the pass under way is still to run, and its packed sequence.
    ahead: list[tuple[str, int]] = []

    def enter(chunk: Any, inputs: Any) -> None:
        layers = chunk.language_model.decoder.layers
        ahead[:] = [(f"{len(inputs[0].pixel_values)} frames", layer.layer_number - 1) for layer in layers]

    for chunk in chunks:
        chunk.register_forward_pre_hook(enter)
    original = stack.pack_for_layer

    def watched(layout: Any, *args: Any) -> Any:
        seen.append((*ahead.pop(0), layout.origin.tolist()))
        return original(layout, *args)

    stack.pack_for_layer = watched
    return seen


def write_weights(path: str, overrides: list[str], pattern: str = PATTERN) -> None:
    """Random weights of the tiny model, correction biases too."""
    import torch

    from hybridprune_megatron.engine.parallel import init_model_parallel
    from hybridprune_megatron.engine.weights import save_weights
    from hybridprune_megatron.models.build import build_model

    init_model_parallel(seed=1)
    model = build_model(tiny_config(*overrides, pattern=pattern))
    for name, value in model.named_buffers():
        if name.endswith("expert_bias"):
            torch.nn.init.normal_(value, std=0.2)
    save_weights(model, path)


def read(folder: str, overrides: list[str], pattern: str = PATTERN) -> dict[str, Any]:
    """Gradients by their global names, whole, as numpy arrays."""
    from hybridprune_megatron.engine.parallel import init_model_parallel
    from hybridprune_megatron.engine.weights import load_initial_weights
    from hybridprune_megatron.models.build import build_model

    init_model_parallel(seed=1)
    model = build_model(config_of({}, overrides, pattern))
    load_initial_weights(model, folder)
    return {name: parameter.detach().cpu().numpy().copy() for name, parameter in model.named_parameters()}
