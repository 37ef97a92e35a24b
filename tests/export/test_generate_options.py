"""Options of ``generate`` and arguments of ``forward`` that not every model takes: they work or are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.export.conftest import row

SETTINGS = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}


@pytest.fixture(scope="module")
def letters(world):
    """Lets generate write the letters a to p alone, so that what it writes is text."""
    allowed = world.processor.tokenizer.convert_tokens_to_ids(list("abcdefghijklmnop"))
    return {"do_sample": False, "max_new_tokens": 8, "prefix_allowed_tokens_fn": lambda batch, ids: allowed}


def texts(world, inputs, sequences) -> list[str]:
    """What each row says, up to its padding."""
    new = sequences[:, inputs["input_ids"].shape[1] :]
    return world.processor.batch_decode(new, skip_special_tokens=True)


def stopped(text: str, stops: list[str]) -> str:
    """The text up to the end of the stop string that comes first."""
    return text[: min((text.find(stop) + len(stop) for stop in stops if stop in text), default=len(text))]


@pytest.mark.parametrize("use_cache", [True, False])
def test_stop_strings_end_each_row_after_them(world, inputs, letters, use_cache: bool) -> None:
    free = texts(world, inputs, world.hf.generate(**inputs, **letters))
    stops = [free[0][2:4], free[1][1:4]]
    given = {"stop_strings": stops, "tokenizer": world.processor.tokenizer}
    found = texts(world, inputs, world.hf.generate(**inputs, **letters, use_cache=use_cache, **given))
    assert found == [stopped(each, stops) for each in free]
    assert found != free


def test_stop_strings_of_beams_and_of_the_generation_configuration(world, inputs, letters) -> None:
    single, tokenizer = row(inputs, 0), world.processor.tokenizer
    (free,) = texts(world, single, world.hf.generate(**single, **letters))
    stops = [free[2:4]]
    (found,) = texts(
        world, single, world.hf.generate(**single, **letters, num_beams=2, stop_strings=stops, tokenizer=tokenizer)
    )
    assert stops[0] not in found or found.endswith(stops[0])
    only = {"prefix_allowed_tokens_fn": letters["prefix_allowed_tokens_fn"], "tokenizer": tokenizer}
    settings = GenerationConfig(do_sample=False, max_new_tokens=8, stop_strings=stops)
    (found,) = texts(world, single, world.hf.generate(**single, generation_config=settings, **only))
    assert found == stopped(free, stops) != free


def test_what_goes_with_a_tokenizer_and_does_nothing_changes_nothing(world, inputs) -> None:
    wanted = world.hf.generate(**inputs, **SETTINGS)
    given = {"tokenizer": world.processor.tokenizer, "return_dict": False, "labels": inputs["input_ids"]}
    given |= {"output_attentions": False, "output_hidden_states": None, "position_ids": None, "logits_to_keep": 3}
    assert torch.equal(world.hf.generate(**inputs, **SETTINGS, **given), wanted)


def test_scores_and_logits_are_those_of_forward(world, inputs) -> None:
    asked = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    out = world.hf.generate(**inputs, **SETTINGS, **asked)
    with torch.no_grad():
        first = world.hf(**inputs, logits_to_keep=1).logits[:, 0]
    assert torch.equal(out.logits[0], first)
    assert len(out.scores) == len(out.logits) == 8
    assert all(torch.equal(*pair) for pair in zip(out.scores, out.logits))
    beams = world.hf.generate(**inputs, **SETTINGS, **asked, num_beams=2)
    assert beams.sequences_scores.shape == (3,)
    without = world.hf.generate(**inputs, **SETTINGS, **asked, num_beams=2, use_cache=False)
    assert torch.equal(without.sequences, beams.sequences)
    assert without.past_key_values is None


def test_guidance_by_a_prompt_without_the_video(world, inputs) -> None:
    single = row(inputs, 0)
    negative = single["input_ids"][:, -7:]
    out, plain = (
        world.hf.generate(**single, **SETTINGS, guidance_scale=1.5, negative_prompt_ids=negative, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert torch.equal(out, plain)
    assert not torch.equal(out, world.hf.generate(**single, **SETTINGS))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"output_hidden_states": True}, "output_hidden_states=True: layers hold different tokens"),
        ({"output_attentions": True}, "output_attentions=True: attention is computed without its weights"),
        ({"output_router_logits": True}, "output_router_logits=True: this model does not take it"),
        ({"position_ids": torch.zeros(1, 3)}, "position_ids: this model does not take it"),
        ({"cu_seq_lens_q": torch.zeros(3)}, "cu_seq_lens_q: this model does not take it"),
        ({"num_items_in_batch": 3}, "num_items_in_batch=3: this model does not take it"),
        ({"logits_to_keep": -1}, r"logits_to_keep=-1 for \d+ columns"),
        ({"logits_to_keep": torch.tensor([0, 9999])}, r"logits_to_keep=tensor\(\[ 0, 9999\]\) for \d+ columns"),
    ],
)
def test_forward_and_generate_refuse_what_they_do_not_take(world, inputs, given: dict, text: str) -> None:
    single = row(inputs, 0)
    for call in (world.hf, world.hf.generate):
        with pytest.raises(ValueError, match=text) as error:
            call(**single, **given)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"assistant_model": "itself"}, "assisted generation is not supported with stateful models"),
        ({"prompt_lookup_num_tokens": 3}, "assisted generation is not supported with stateful models"),
        ({"cache_implementation": "paged"}, "continuous batching .* use generate"),
        ({"token_healing": True}, "token_healing=True: a prompt without its special tokens has no frames"),
        ({"prefill_chunk_size": 4}, "chunking without a cache"),
        ({"inputs_embeds": torch.zeros(1, 3, 32)}, "not used by the model: .'inputs_embeds'"),
        ({"stop_strings": "a"}, "pass the model's tokenizer"),
        ({"generation_config": GenerationConfig(output_hidden_states=True)}, "output_hidden_states=True"),
    ],
)
def test_modes_of_generate_that_this_model_has_not_are_refused(world, inputs, given: dict, text: str) -> None:
    given = {name: world.hf if value == "itself" else value for name, value in given.items()}
    with pytest.raises(ValueError, match=text) as error:
        world.hf.generate(**row(inputs, 0), **given)
    assert "\n" not in str(error.value)


def test_continuous_batching_is_refused_instead_of_answering_nothing(world) -> None:
    with pytest.raises(ValueError, match="continuous batching") as error:
        world.hf.generate_batch([[5, 6, 7]], max_new_tokens=2)
    assert "\n" not in str(error.value)


def test_outputs_that_a_configuration_asks_for_are_refused(world, inputs) -> None:
    model = AutoModelForCausalLM.from_pretrained(world.folder, trust_remote_code=True, output_hidden_states=True)
    with pytest.raises(ValueError, match="output_hidden_states=True: layers"):
        model(**row(inputs, 0))
    assert model(**row(inputs, 0), output_hidden_states=False).logits is not None


def test_filled_caches_are_not_continued_without_caches(world) -> None:
    """Every step would read all columns again, over the caches that hold them."""
    text = world.processor.apply_chat_template([{"role": "user", "content": "Who?"}], add_generation_prompt=True)
    asked = dict(world.processor(text=text))
    first = world.hf.generate(**asked, **SETTINGS, return_dict_in_generate=True)
    more = world.processor.next_turn(first.sequences, "And?")
    with pytest.raises(ValueError, match="use_cache=False with past_key_values") as error:
        world.hf.generate(**more, past_key_values=copy.deepcopy(first.past_key_values), use_cache=False)
    assert "\n" not in str(error.value)
