"""Tensor parallelism equals one process; stock megatron checkpoints load here and ours there; published sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hybridprune_megatron.config import load_config
from tests.models.tiny import tiny_batch, tiny_config
from tests.worlds import run_world


def _train_three_steps(
    weights: str, tensor: int, sequence_parallel: bool, multiple_of: int, pooling: list[str]
) -> tuple[list[float], list[list[int]]]:
    """Losses of three optimizer steps of the real engine, and what each layer kept in the first."""
    from hybridprune_megatron.engine.optimization import build_train_state
    from hybridprune_megatron.engine.parallel import init_model_parallel
    from hybridprune_megatron.engine.train_step import train_step
    from hybridprune_megatron.engine.weights import load_initial_weights
    from hybridprune_megatron.models.build import build_model

    overrides = [
        f"parallel.tensor={tensor}",
        f"trainer.devices={tensor}",
        f"parallel.sequence_parallel={sequence_parallel}",
        "optim.lr=0.01",
        *pooling,
    ]
    cfg = tiny_config(*overrides, "trainer.global_batch_size=2", f"reduction.select.multiple_of={multiple_of}")
    init_model_parallel(tensor=tensor, seed=1)
    model = build_model(cfg)
    load_initial_weights(model, weights)
    batches = [tiny_batch(3, 5, pad_to_multiple_of=2), tiny_batch(4, 2, 1, pad_to_multiple_of=2)]
    trace: list = []
    with torch.no_grad():
        model.logits(batches[0], trace=trace)
    state = build_train_state(model, cfg.optim, cfg.trainer, cfg.parallel, torch.device("cpu"))
    losses = [train_step(state, iter(batches), 2, cfg.data.sequence_length, step).loss for step in (1, 2, 3)]
    return losses, [layout.origin.tolist() for layout in trace]


def _write_weights(path: str) -> None:
    from hybridprune_megatron.engine.parallel import init_model_parallel
    from hybridprune_megatron.engine.weights import save_weights
    from hybridprune_megatron.models.build import build_model

    init_model_parallel(seed=1)
    save_weights(build_model(tiny_config()), path)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("weights") / "model.safetensors")
    run_world(1, _write_weights, path)
    return path


# A rank sees its own heads: their highest over all ranks is another number than the mean over ranks.
HIGHEST = ["reduction.score.attention_pooling=max", "reduction.score.mamba_pooling=max_heads"]


@pytest.mark.parametrize(("sequence_parallel", "pooling"), [(False, []), (True, []), (False, HIGHEST)])
def test_tensor_parallel_training_equals_one_process(weights, sequence_parallel, pooling):
    # A sequence that is shared by two ranks keeps an even length; one process can be told to do the same.
    multiple_of = 2 if sequence_parallel else 1
    losses, kept = run_world(1, _train_three_steps, weights, 1, False, multiple_of, pooling)[0]
    assert losses[0] > losses[-1]
    assert len(kept[-1]) < len(kept[0])
    assert all(len(tokens) % multiple_of == 0 for tokens in kept)
    for rank_losses, rank_kept in run_world(2, _train_three_steps, weights, 2, sequence_parallel, 1, pooling):
        assert rank_kept == kept
        assert rank_losses == pytest.approx(losses, rel=1e-5)


def _train_in(precision: str, weights: str) -> list[float]:
    from hybridprune_megatron.engine.optimization import build_train_state
    from hybridprune_megatron.engine.parallel import init_model_parallel
    from hybridprune_megatron.engine.train_step import train_step
    from hybridprune_megatron.engine.weights import load_initial_weights
    from hybridprune_megatron.models.build import build_model

    cfg = tiny_config(f"trainer.precision={precision}", "optim.lr=0.01", "trainer.global_batch_size=1")
    init_model_parallel(seed=1)
    model = build_model(cfg)
    load_initial_weights(model, weights)
    state = build_train_state(model, cfg.optim, cfg.trainer, cfg.parallel, torch.device("cpu"))
    # Decay rates and skips stay in fp32, everything else is what was asked for.
    fp32 = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert precision == "fp32" or fp32 == {"A_log", "D"}, fp32
    return [train_step(state, iter([tiny_batch(3, 5)]), 1, 64, step).loss for step in range(1, 6)]


def test_bf16_trains_like_fp32(weights):
    full, half = (run_world(1, _train_in, precision, weights)[0] for precision in ("fp32", "bf16"))
    assert full[-1] < 0.9 * full[0]
    # bf16 keeps eight bits of a number; one token kept or dropped otherwise moves the loss by more than rounding does.
    assert half == pytest.approx(full, rel=0.05)


def _stock_model(cfg):
    """Megatron's own HybridModel with its own MambaMixer.

    Stock mixers are built with Transformer Engine's fused norm-linear and mamba_ssm's gated norm, which do not exist on
    a CPU; ours take their place (they carry the same names for exactly this reason), everything else is stock.
    """
    import copy

    from megatron.core.models.hybrid.hybrid_block import HybridStack
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.ssm import mamba_mixer
    from megatron.core.ssm.mamba_mixer import MambaMixer

    from hybridprune_megatron.models.build import transformer_config
    from hybridprune_megatron.models.mamba_ops import TorchMambaOps
    from hybridprune_megatron.models.mixers import GatedRMSNorm
    from hybridprune_megatron.models.specs import stack_spec
    from hybridprune_megatron.models.torch_layers import RMSNorm

    config = transformer_config(cfg)

    def gated_norm(width, group_size, **_):
        return GatedRMSNorm(config, TorchMambaOps(), width, group_size, None)

    class StockStack(HybridStack):
        def __init__(self, config, submodules, final_norm, **kwargs):
            super().__init__(config, submodules, **(kwargs | {"post_layer_norm": False}))
            self.final_norm = RMSNorm(config, config.hidden_size)

    mamba_mixer.HAVE_MAMBA_SSM, mamba_mixer.ExtendedRMSNorm = True, gated_norm
    spec = copy.deepcopy(stack_spec("torch", {"chunk_size": 8}))
    spec.module = StockStack
    mixer = spec.submodules.mamba_layer.submodules.mixer
    mixer.module, mixer.params = MambaMixer, {"chunk_size": 8}
    model = cfg.model
    return HybridModel(
        config,
        spec,
        model.vocab_size,
        model.max_sequence_length,
        hybrid_layer_pattern=model.hybrid_pattern,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )


def _exchange_with_stock(folder: str) -> None:
    from megatron.core import dist_checkpointing

    from hybridprune_megatron.engine.parallel import init_model_parallel
    from hybridprune_megatron.models.build import build_model

    cfg = tiny_config("data.sampling=none", "model.vision=null", budget=1.0)
    init_model_parallel(seed=1)
    ours, stock = build_model(cfg).language_model, _stock_model(cfg)
    names = {key: value.shape for key, value in ours.state_dict().items() if isinstance(value, torch.Tensor)}
    assert names == {key: value.shape for key, value in stock.state_dict().items() if isinstance(value, torch.Tensor)}
    for source, target, name in ((stock, ours, "stock"), (ours, stock, "ours")):
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.uniform_(-1, 1)
        path = Path(folder) / name
        path.mkdir()
        dist_checkpointing.save(source.sharded_state_dict(), str(path))
        loaded = dist_checkpointing.load(target.sharded_state_dict(), str(path))
        target.load_state_dict({key: value for key, value in loaded.items() if isinstance(value, torch.Tensor)})
        mine, theirs = dict(source.named_parameters()), dict(target.named_parameters())
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_stock_checkpoints_load_here_and_ours_load_there(tmp_path):
    run_world(1, _exchange_with_stock, str(tmp_path))


PUBLISHED = {
    "nemotron_nano_12b_v2_vl": 12_310_001_152,
    "nemotron_nano_9b_v2": 8_888_227_328,
    "nemotron_h_8b": 8_100_852_736,
}


def _count_parameters(experiment: str) -> int:
    from hybridprune_megatron.engine.parallel import init_model_parallel
    from hybridprune_megatron.models.build import build_model

    # The published counts are of the language model with 131072 rows, untied, on one rank.
    cfg = load_config(
        [
            f"experiment={experiment}",
            "model.vocab_size=131072",
            "parallel=single",
            "trainer=default",
            "optim.warmup_steps=0",
        ]
    )
    init_model_parallel(seed=1)
    model = build_model(cfg, meta=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    return sum(parameter.numel() for parameter in model.language_model.parameters())


@pytest.mark.parametrize("experiment", sorted(PUBLISHED))
def test_published_models_have_their_published_size(experiment):
    assert run_world(1, _count_parameters, experiment) == [PUBLISHED[experiment]]
