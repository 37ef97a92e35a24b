"""Decoding over the shortened caches."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.export.conftest import row

STEPS = 9


def generate(world, inputs, **settings) -> torch.Tensor:
    """New tokens only; no end token, so that all rows are as long."""
    settings = {"do_sample": False, "max_new_tokens": STEPS, "eos_token_id": None, **settings}
    out = world.hf.generate(**inputs, **settings)
    assert torch.equal(out[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    return out[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("reduction", [{"budget": 0.5}, {"budget": 0.3}, {"budget": 1.0}])
def test_greedy_with_cache_equals_without_and_one_by_one(world, inputs, reduction: dict) -> None:
    saved = world.hf.config.reduction
    world.hf.set_reduction(reduction)
    try:
        cached = generate(world, inputs, use_cache=True)
        assert cached.shape == (3, STEPS)
        assert torch.equal(cached, generate(world, inputs, use_cache=False))
        for index in range(3):
            assert torch.equal(cached[index : index + 1], generate(world, row(inputs, index)))
    finally:
        world.hf.set_reduction(saved)


def test_logits_of_every_step_equal_the_recomputed_ones(world, inputs) -> None:
    settings = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": STEPS, "eos_token_id": None}
    cached = world.hf.generate(**inputs, **settings, use_cache=True, do_sample=False)
    plain = world.hf.generate(**inputs, **settings, use_cache=False, do_sample=False)
    for mine, theirs in zip(cached.logits, plain.logits):
        assert (mine - theirs).abs().max() < 1e-4


def test_caches_hold_what_entered_each_layer(world, inputs) -> None:
    with torch.no_grad():
        out = world.hf(**inputs, use_cache=True, output_reduction=True)
    visual = (inputs["token_kinds"] == 1).sum(1)
    real = inputs["attention_mask"].sum(1)
    lengths = {}
    for index, symbol in enumerate(world.hf.config.hybrid_override_pattern):
        if symbol == "*":
            entered = torch.tensor([len(sample) for sample in out.reduction.positions[index]])
            lengths[index] = out.past_key_values.layers[index].lengths
            assert torch.equal(lengths[index], real - visual + entered)
    first, last = min(lengths), max(lengths)
    assert (lengths[last] < lengths[first]).all(), "deeper layers hold less"
    assert out.past_key_values.get_seq_length() == inputs["input_ids"].shape[1]


def test_several_new_tokens_after_filled_caches(world, inputs) -> None:
    with torch.no_grad():
        cache = world.hf(**inputs, use_cache=True).past_key_values
        more = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
        continued = world.hf(input_ids=more, past_key_values=cache).logits
        ids = torch.cat([inputs["input_ids"], more], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
        whole = world.hf(**{**inputs, "input_ids": ids, "attention_mask": mask}, logits_to_keep=3, use_cache=False)
    assert (continued - whole.logits).abs().max() < 1e-4
    with pytest.raises(ValueError, match="first call only"):
        world.hf(input_ids=more, past_key_values=cache, pixel_values=inputs["pixel_values"])


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_beams_and_samples_with_cache_equal_without(world, inputs, settings: dict) -> None:
    results = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        out = world.hf.generate(**inputs, **settings, max_new_tokens=5, eos_token_id=None, use_cache=use_cache)
        results.append(out)
    assert torch.equal(*results)


def test_what_the_evaluation_harness_passes(world, inputs) -> None:
    # The plain class for Hugging Face models of lmms-eval.
    out = world.hf.generate(
        **inputs, use_cache=True, do_sample=False, temperature=None, top_p=None, num_beams=1, max_new_tokens=3
    )
    texts = world.processor.batch_decode([ids[len(given) :] for given, ids in zip(inputs["input_ids"], out)])
    assert len(texts) == 3


def test_caches_grow_past_their_first_room(world, inputs) -> None:
    single = row(inputs, 0)
    steps = 140
    cached = generate(world, single, max_new_tokens=steps)
    ids = torch.cat([single["input_ids"], cached], 1)
    with torch.no_grad():
        # One pass over everything; generated columns are ANSWER, so they choose nothing.
        whole = world.hf(
            input_ids=ids, token_kinds=single["token_kinds"], pixel_values=single["pixel_values"], use_cache=False
        )
    assert torch.equal(cached, whole.logits[:, -steps - 1 : -1].argmax(-1))


def along(model, inputs, answer: torch.Tensor, use_cache: bool) -> torch.Tensor:
    """Logits [steps, rows, vocabulary] of the columns of an answer, each after those before it."""
    mask, out, steps = inputs["attention_mask"], [], answer.shape[1]
    with torch.no_grad():
        if use_cache:
            first = model(**inputs, use_cache=True, logits_to_keep=1)
            rest = model(input_ids=answer[:, :-1], past_key_values=first.past_key_values)
            return torch.cat([first.logits, rest.logits], 1).transpose(0, 1).float()
        for step in range(steps):
            ids = torch.cat([inputs["input_ids"], answer[:, :step]], 1)
            longer = torch.cat([mask, mask.new_ones(len(mask), step)], 1)
            given = {**inputs, "input_ids": ids, "attention_mask": longer}
            out.append(model(**given, use_cache=False, logits_to_keep=1).logits[:, 0].float())
    return torch.stack(out)


def test_in_bf16_caches_round_otherwise_and_are_as_near_to_the_exact_logits(world, inputs) -> None:
    """So tokens whose logits lie that close may change; docs/models.md says how often."""

    def loaded(dtype: torch.dtype):
        settings = {"trust_remote_code": True, "reduction": None, "dtype": dtype}
        return AutoModelForCausalLM.from_pretrained(world.folder, **settings).eval()

    rounded, exact = loaded(torch.bfloat16), loaded(torch.float32)
    exact.load_state_dict({name: value.float() for name, value in rounded.state_dict().items()})
    answer = generate(world, inputs)
    wanted = along(exact, inputs, answer, False)
    spread = wanted.std()
    assert (along(exact, inputs, answer, True) - wanted).abs().max() / spread < 1e-5
    cached, plain = (along(rounded, inputs, answer, use_cache) for use_cache in (True, False))
    assert torch.equal(cached[0], plain[0]), "both come from the same prefill"
    errors = [((found - wanted)[1:] / spread).square().mean().sqrt() for found in (cached, plain)]
    apart = ((cached - plain)[1:] / spread).square().mean().sqrt()
    assert 0.7 < errors[0] / errors[1] < 1.4
    assert 1e-3 < apart < 1.5 * errors[1] < 0.03
