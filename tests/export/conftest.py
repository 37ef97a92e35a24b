"""A tiny training model, a tokenizer, a clip, and the export of the model."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoProcessor, PreTrainedTokenizerFast

from hybridprune_megatron.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    ReductionConfig,
    TrainerConfig,
    VisionConfig,
)
from hybridprune_megatron.data.conversation import RESERVED_TOKENS, VIDEO_TOKEN

NUM_FRAMES = 7
BUDGET = 0.5


def other_transformers() -> list[str]:
    """The folders of PYTHONPATH that put another transformers before the installed one, for a process of its own."""
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [folder for folder in folders if Path(folder, "transformers").is_dir()]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bytes as tokens, and the special tokens of the prompt format."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": [*RESERVED_TOKENS, VIDEO_TOKEN]})
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


def make_config(tokenizer: Path, pattern: str = "M*-M*", tie: bool = False, vision: bool = True) -> Config:
    """A model of a few thousand weights."""
    tower = VisionConfig(
        hidden_size=16,
        num_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        patch_size=8,
        frame_size=32,
        position_grid_px=64,
        num_cls_tokens=1,
        num_register_tokens=2,
        projector_hidden_size=24,
    )
    model = ModelConfig(
        name="tiny",
        hybrid_pattern=pattern,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        mamba_num_heads=4,
        mamba_head_dim=8,
        mamba_state_dim=8,
        mamba_num_groups=2,
        mamba_chunk_size=16,
        vocab_size=288,
        max_sequence_length=512,
        init_std=0.2,
        tie_embeddings=tie,
        vision=tower if vision else None,
        spec="torch",
    )
    sampling = "uniform" if vision else "none"
    return Config(
        name="tiny",
        output_dir="unused",
        model=model,
        data=DataConfig(tokenizer=str(tokenizer), sequence_length=512, sampling=sampling, num_frames=NUM_FRAMES),
        reduction=ReductionConfig(score="query", budget=BUDGET if vision else 1.0),
        optim=OptimConfig(lr=1e-3),
        trainer=TrainerConfig(max_steps=1, precision="fp32"),
        parallel=ParallelConfig(),
        exp_manager={},
    )


def make_model(cfg: Config) -> torch.nn.Module:
    """The training model, with no weight left at a value that two of them share."""
    from hybridprune_megatron.engine.launch import read_launch
    from hybridprune_megatron.engine.parallel import init_distributed, init_model_parallel
    from hybridprune_megatron.models.build import build_model

    init_distributed(read_launch())
    init_model_parallel(seed=1)
    model = build_model(cfg).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> SimpleNamespace:
    """The training model (``model``, ``cfg``), its export (``folder``) and what it loads as (``hf``, ``processor``)."""
    from hybridprune_megatron.export.write import export_model

    cfg = make_config(tokenizer_dir)
    model = make_model(cfg)
    folder = export_model(model, cfg, tmp_path_factory.mktemp("export") / "hf", max_shard_size="20KB")
    hf = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    return SimpleNamespace(cfg=cfg, model=model, folder=folder, hf=hf, processor=processor)


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three short videos of moving noise."""
    folder = tmp_path_factory.mktemp("clips")
    numbers = np.random.default_rng(0)
    paths = []
    for index, length in enumerate((5, 9, 12)):
        path = folder / f"{index}.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=5)
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
            for _ in range(length):
                picture = numbers.integers(0, 255, (32, 48, 3), dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        paths.append(path)
    return paths


QUESTIONS = ("What is it?", "Which digit is shown in the upper left corner?", "When?")


@pytest.fixture(scope="session")
def inputs(world: SimpleNamespace, clips: list[Path]) -> dict[str, torch.Tensor]:
    """Three questions about three videos, of odd and different lengths, padded on the left."""
    texts = [
        world.processor.apply_chat_template(message(question), tokenize=False, add_generation_prompt=True)
        for question in QUESTIONS
    ]
    return dict(world.processor(text=texts, images=[], videos=[str(clip) for clip in clips], audios=[], padding=True))


def message(question: str) -> list[dict]:
    """A conversation that asks about one video."""
    return [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]


def row(inputs: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    """One sample of padded inputs, without its padding."""
    mask = inputs["attention_mask"].bool()
    image = inputs["token_kinds"] == 1
    tokens = 4
    before, shown = int(image[:index].sum()) // tokens, int(image[index].sum()) // tokens
    single = {
        name: inputs[name][index : index + 1, mask[index]] for name in ("input_ids", "attention_mask", "token_kinds")
    }
    videos = inputs["frames_per_video"][index : index + 1]
    return {**single, "frames_per_video": videos, "pixel_values": inputs["pixel_values"][before : before + shown]}
