"""The layers over Transformer Engine, and which of them run in FP8."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from tests.models.te_path import CHECKS
from tests.models.tiny import tiny_config
from tests.programs import results_of
from tests.worlds import run_world


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """Of every check of ``te_path``, in a process that imports megatron beside (stand-ins of) its GPU packages."""
    return results_of("tests.models.te_path", tmp_path_factory.mktemp("te_path"))


@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_the_layers_over_transformer_engine(results: dict[str, str | None], name: str) -> None:
    assert results[name] is None, results[name]


def _contexts(recipe: str, recompute: str) -> list[tuple[int, bool]]:
    """Every layer of this stage in every pass: its index, and whether it ran in an FP8 context."""
    from megatron.core.fp8_utils import is_first_last_bf16_layer

    from hybridprune_megatron.engine.parallel import init_model_parallel
    from hybridprune_megatron.models import fp8
    from hybridprune_megatron.models.build import build_model

    opened: list[int] = []

    @contextmanager
    def recording(config, layer_no=-1):
        count = len(opened)
        if not is_first_last_bf16_layer(config, layer_no):
            opened.append(layer_no)
        yield
        del opened[count:]

    def te_checkpoint(function, distribute, tracker, group, *inputs):
        return torch.utils.checkpoint.checkpoint(function, *inputs, use_reentrant=True)

    fp8.get_fp8_context, fp8.te_checkpoint = recording, te_checkpoint
    init_model_parallel(pipeline=2, seed=1)
    rank = torch.distributed.get_rank()
    overrides = ("parallel.pipeline=2", "trainer.devices=2", f"trainer.recompute={recompute}")
    cfg = tiny_config(*overrides, pattern="M-M|*M-M")
    decoder = build_model(cfg, pre_process=rank == 0, post_process=rank == 1).train().language_model.decoder
    config = decoder.config
    config.fp8, config.fp8_recipe, config.first_last_layers_bf16 = "hybrid", recipe, recipe != "delayed"
    config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16 = 2, 1
    hidden = torch.zeros(4, 1, 8, requires_grad=True)
    found: list[tuple[int, bool]] = []
    with fp8.pass_context(config):
        for layer in decoder.layers:
            # A stand-in with the number of the real one: what runs in it does not matter here.
            decoder._run_layer(_Recorder(layer.layer_number, found, opened), hidden, None).sum().backward()
    return found


class _Recorder:
    """A layer that notes its number and whether a context is open, and doubles its input."""

    def __init__(self, layer_number: int, found: list[tuple[int, bool]], opened: list[int]) -> None:
        self.layer_number, self.found, self.opened = layer_number, found, opened

    def __call__(self, hidden_states: torch.Tensor, **_: object) -> torch.Tensor:
        self.found.append((self.layer_number - 1, bool(self.opened)))
        return hidden_states * 2


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_contexts_know_the_layer_of_the_whole_model(recompute: str) -> None:
    again = 2 if recompute == "full" else 1
    first, second = run_world(2, _contexts, "tensorwise", recompute)
    assert first == [pair for index in range(3) for pair in [(index, index >= 2)] * again]
    assert second == [pair for index in range(3, 7) for pair in [(index, index < 6)] * again]
    for stage, layers in zip(run_world(2, _contexts, "delayed", recompute), (range(3), range(3, 7))):
        assert stage == [pair for index in layers for pair in [(index, True)] * again]


def _without_a_gpu() -> str:
    from hybridprune_megatron.models.build import build_model

    cfg = tiny_config("trainer.precision=bf16", "fp8=tensorwise", "model.spec=auto", "model.mamba_num_heads=16")
    with pytest.raises(ValueError, match="needs Transformer Engine") as error:
        build_model(cfg)
    return str(error.value)


def test_fp8_without_a_gpu_is_one_line() -> None:
    (line,) = run_world(1, _without_a_gpu)
    assert "\n" not in line
    assert line.endswith("install the gpu extra on a GPU machine or set fp8=none")
