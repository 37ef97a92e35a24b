"""The export computes what the training model computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hybridprune_megatron.config.schema import ReductionConfig
from hybridprune_megatron.data.batch import IGNORE_LABEL, EncodedSample, pack
from hybridprune_megatron.export.modeling_hybridprune import HybridPruneForCausalLM
from hybridprune_megatron.export.write import hf_config, hf_weights
from hybridprune_megatron.method.layout import SampleLayout
from hybridprune_megatron.models.build import build_reduction
from tests.export.conftest import make_config, make_model, row

TOLERANCE = 1e-4


def packed(inputs: dict[str, torch.Tensor]):
    """The rows of padded inputs as training packs them."""
    samples = []
    for index in range(len(inputs["input_ids"])):
        single = row(inputs, index)
        ids = single["input_ids"][0]
        layout = SampleLayout.from_kinds(single["token_kinds"][0].tolist(), 4, single["frames_per_video"][0].tolist())
        labels = torch.full_like(ids, IGNORE_LABEL)
        samples.append(EncodedSample(str(index), ids, labels, layout, single["pixel_values"]))
    return pack(samples)


def assert_equal_models(model, hf, inputs: dict[str, torch.Tensor]) -> float:
    """Compares the logits of all tokens that are left and the kept indices of every layer; returns the largest gap."""
    trace: list = []
    with torch.no_grad():
        logits, layout = model.logits(packed(inputs), trace=trace)
        out = hf(**inputs, output_reduction=True)
    exported = out.logits[inputs["attention_mask"].bool()]
    left = ~exported.isnan().any(1)
    assert torch.equal(torch.nonzero(left).flatten(), layout.origin)
    gap = (exported[left] - logits).abs().max().item()
    assert gap < TOLERANCE
    assert len(out.reduction.positions) == len(trace)
    for mine, theirs in zip(out.reduction.positions, trace):
        assert [len(sample) for sample in mine] == list(theirs.visual_counts)
        assert torch.equal(torch.cat(mine), theirs.position[theirs.visual_index])
    return gap


@contextmanager
def reduced(world: SimpleNamespace, options: dict) -> Iterator[None]:
    """Both models under the same settings, then as they were."""
    settings = {"score": "query", "budget": 0.35, **options}
    saved, trained = world.hf.config.reduction, world.model.reduction
    world.model.reduction = build_reduction(replace(world.cfg, reduction=ReductionConfig.of(settings)))
    world.hf.set_reduction(settings)
    try:
        yield
    finally:
        world.model.reduction = trained
        world.hf.set_reduction(saved)


OPTIONS = {
    "all tokens": {"budget": 1.0},
    "half": {"budget": 0.5},
    "random": {"score": {"name": "random", "seed": 3}},
    "uniform": {"score": "uniform"},
    "highest head, smoothed, every frame": {
        "score": {"name": "query", "attention_pooling": "max", "mamba_pooling": "max_groups"},
        "select": {"smoothing_frames": 1, "min_tokens_per_frame": 1},
    },
    "with its frame": {"select": {"frame_share": 0.5}},
    "decay": {
        "score": {"name": "query", "mamba_decay": True, "mamba_pooling": "max_heads", "mamba_function": "abs"},
    },
    "last row looks ahead": {
        "score": {
            "name": "query",
            "query_rows": "last",
            "attention_causal": False,
            "mamba_function": "softmax",
            "mamba_dt": False,
        },
    },
    "stages": {"schedule": {"name": "stages", "stages": 4}, "layers": "every_1", "budget": 0.6},
    "linear to a floor": {
        "schedule": {"name": "linear", "floor": 0.2},
        "select": {"min_tokens": 3},
        "budget": 0.5,
    },
    "list": {"retention": [1.0, 0.75, 0.75, 0.75, 0.25], "layers": "mamba", "budget": 0.7},
    "flat keys of version 0.1": {
        "scorer": "query",
        "mamba_pooling": "max_heads",
        "schedule": "linear",
        "floor": 0.2,
        "min_tokens": 3,
        "smoothing_frames": 1,
        "budget": 0.5,
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_logits_and_kept_indices_equal_the_training_models(world, inputs, options: dict, record_property) -> None:
    with reduced(world, options):
        record_property("max_abs_logit_diff", assert_equal_models(world.model, world.hf, inputs))


def test_two_videos_are_not_smoothed_into_each_other(world, clips) -> None:
    content = [{"type": "video"}, {"type": "text", "text": "and "}, {"type": "video"}, {"type": "text", "text": "?"}]
    text = world.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    both = dict(world.processor(text=[text], videos=[str(clips[0]), str(clips[2])]))
    with reduced(world, {"select": {"smoothing_frames": 3}}), torch.no_grad():
        assert_equal_models(world.model, world.hf, both)
        kept = world.hf(**both, output_reduction=True).reduction.positions
        both["frames_per_video"] = both["frames_per_video"].sum(1, keepdim=True)
        as_one = world.hf(**both, output_reduction=True).reduction.positions
    assert any(not torch.equal(mine[0], other[0]) for mine, other in zip(kept, as_one))


def test_the_saved_reduction_is_the_trained_one(world, inputs) -> None:
    assert world.hf.config.reduction["budget"] == world.cfg.reduction.budget
    assert tuple(world.hf.config.reduction["retention"]) == world.model.reduction.retention
    assert_equal_models(world.model, world.hf, inputs)


@pytest.mark.parametrize(("pattern", "tie"), [("*-M", False), ("MM*M-*", True)])
def test_other_patterns_and_tied_embeddings(tokenizer_dir, inputs, pattern: str, tie: bool) -> None:
    cfg = make_config(tokenizer_dir, pattern, tie)
    model = make_model(cfg)
    hf = HybridPruneForCausalLM(hf_config(cfg)).eval()
    missing, unexpected = hf.load_state_dict(hf_weights(model, cfg), strict=False)
    assert not unexpected
    assert missing == (["language_model.lm_head.weight"] if tie else [])
    assert_equal_models(model, hf, inputs)


def test_a_text_only_model(tokenizer_dir) -> None:
    cfg = make_config(tokenizer_dir, "M-*", vision=False)
    model = make_model(cfg)
    hf = HybridPruneForCausalLM(hf_config(cfg)).eval()
    hf.load_state_dict(hf_weights(model, cfg))
    ids = torch.randint(0, 200, (2, 33), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    samples = [ids[index][mask[index].bool()] for index in range(2)]
    batch = pack(
        [
            EncodedSample(
                "x",
                each,
                torch.full_like(each, -100),
                SampleLayout.from_kinds([0] * len(each)),
                torch.empty(0, 3, 0, 0),
            )
            for each in samples
        ]
    )
    with torch.no_grad():
        wanted, _ = model.logits(batch)
        out = hf(input_ids=ids, attention_mask=mask)
        assert (out.logits[mask.bool()] - wanted).abs().max() < TOLERANCE
        assert out.logits[~mask.bool()].isnan().all()
    with pytest.raises(ValueError, match="text-only model"):
        hf(input_ids=ids, pixel_values=torch.zeros(1, 3, 32, 32))


def test_a_padded_batch_equals_its_samples_one_by_one(world, inputs) -> None:
    with torch.no_grad():
        whole = world.hf(**inputs).logits[:, -1]
        for index in range(len(whole)):
            single = world.hf(**row(inputs, index), logits_to_keep=1).logits[0, 0]
            assert (single - whole[index]).abs().max() < 1e-5


def test_loss_is_the_mean_over_labels_of_tokens_that_are_left(world, inputs) -> None:
    labels = torch.where(inputs["token_kinds"] == 2, inputs["input_ids"], IGNORE_LABEL)
    out = world.hf(**inputs, labels=labels)
    log_probs = out.logits.detach().log_softmax(-1)
    wanted = [
        -log_probs[sample, column - 1, labels[sample, column]]
        for sample, column in torch.nonzero(labels != IGNORE_LABEL).tolist()
    ]
    assert torch.allclose(out.loss, torch.stack(wanted).mean())
    assert out.past_key_values is None
    out.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in world.hf.language_model.parameters())
    world.hf.zero_grad()
    # Labels on dropped tokens carry no loss instead of a NaN.
    assert world.hf(**inputs, labels=inputs["input_ids"]).loss.isfinite()


def test_logits_of_chosen_columns(world, inputs) -> None:
    with torch.no_grad():
        whole = world.hf(**inputs).logits
        assert torch.equal(world.hf(**inputs, logits_to_keep=3).logits, whole[:, -3:])
        chosen = torch.tensor([-5, -1]) + whole.shape[1]
        assert torch.equal(world.hf(**inputs, logits_to_keep=chosen).logits, whole[:, chosen])


def test_kinds_derived_from_ids_are_the_processors_but_for_newlines(world, inputs) -> None:
    from hybridprune_megatron.export.padded_batch import derive_token_kinds

    mask = inputs["attention_mask"].bool()
    derived = derive_token_kinds(inputs["input_ids"], mask, world.hf.config).long()
    newline = world.processor.tokenizer.encode("\n", add_special_tokens=False)[0]
    differs = derived != inputs["token_kinds"]
    assert differs.any()
    assert (inputs["input_ids"][differs] == newline).all()


def test_wrong_inputs_are_refused_in_one_line(world: SimpleNamespace, inputs) -> None:
    cases = [
        ({"pixel_values": inputs["pixel_values"][1:]}, "image tokens: pixel_values"),
        ({"token_kinds": torch.zeros_like(inputs["token_kinds"])}, "exactly the image tokens are FRAME"),
        ({"attention_mask": torch.zeros_like(inputs["attention_mask"])}, "all padding"),
    ]
    for change, text in cases:
        with pytest.raises(ValueError, match=text) as error:
            world.hf(**{**inputs, **change})
        assert "\n" not in str(error.value)
    right = {name: value.flip(1) for name, value in inputs.items() if name != "pixel_values"}
    with pytest.raises(ValueError, match="pad on the left"):
        world.hf(**right, pixel_values=inputs["pixel_values"], use_cache=True)
