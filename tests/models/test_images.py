"""Training on images, videos and text in one packed sequence."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.data.conftest import ROOT, encode_clip, grey_frames
from tests.models.tiny import tiny_config
from tests.worlds import run_world


def _picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def _packed() -> None:
    from hybridprune_megatron.data.batch import pack
    from hybridprune_megatron.data.sample_encoder import SampleEncoder
    from hybridprune_megatron.data.stored_media import StoredImage
    from hybridprune_megatron.engine.parallel import init_model_parallel
    from hybridprune_megatron.models.build import build_model

    init_model_parallel(seed=1)
    tokenizer = Path(ROOT) / "assets/demo/tokenizer"
    cfg = tiny_config(
        f"data.tokenizer={tokenizer}", "model.vocab_size=2048", "data.num_frames=3", "data.sequence_length=512"
    )
    model = build_model(cfg).train()
    encoder = SampleEncoder(cfg)
    images = [StoredImage(_picture(seed)) for seed in range(4)]
    clip = encode_clip(grey_frames(3), range(0, 120, 40))

    def sample(question: str, *media: bytes | StoredImage, answer: str = "dark"):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        (encoded,) = encoder.encode("k", messages, media)
        return encoded

    kinds = {
        "images": [sample("<image>\nWhich?", images[0]), sample("<image> or <image>?", *images[1:3], answer="two")],
        "videos": [sample("<video>\nWhich?", clip), sample("<video>\nWhere is it?", clip, answer="end")],
        "text": [sample("Hello?"), sample("Who?", answer="end")],
        "both": [sample("<video> and <image>?", clip, images[3])],
    }
    kinds["blend"] = [each for samples in kinds.values() for each in samples]
    assert model.reduction is not None
    for name, samples in kinds.items():
        loss = model(pack(samples)).sum()
        alone = sum(model(pack([each])).sum() for each in samples)
        torch.testing.assert_close(loss, alone, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    # The tokens of an image drop as those of a frame do, and the loss depends on its pixels.
    image = kinds["images"][0]
    trace = []
    with torch.no_grad():
        model.logits(pack([image]), trace=trace)
        kept = [int(layout.visual_counts[0]) for layout in trace]
        before = model(pack([image])).sum()
        other = sample("<image>\nWhich?", images[1])
        assert not torch.equal(before, model(pack([other])).sum())
    assert kept[-1] < kept[0] == encoder.prompts.tokens_per_frame, kept


def test_losses_of_images_videos_and_text_are_the_same_packed_and_one_by_one() -> None:
    run_world(1, _packed)
