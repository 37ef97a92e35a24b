"""A second question in the same chat: over the caches of the first, or with the video prefilled again."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from hybridprune_megatron.data.conversation import read_conversation
from hybridprune_megatron.data.prompt import PromptEncoder
from hybridprune_megatron.data.video import FrameSampling, decode_video
from tests.export.conftest import NUM_FRAMES, QUESTIONS, message, row
from tests.export.naive import embedded, entering_layers, naive_logits

STEPS = 6
SECOND = "And then?"
SETTINGS = {
    "do_sample": False,
    "max_new_tokens": STEPS,
    "eos_token_id": None,
    "return_dict_in_generate": True,
    "output_logits": True,
}


@pytest.fixture(scope="module")
def first(world, inputs):
    """The first question of one sample, answered."""
    return world.hf.generate(**row(inputs, 1), **SETTINGS, output_reduction=True)


@pytest.fixture
def turn(world, first):
    """The inputs of the second question, and caches that no other test writes to."""
    return {
        **world.processor.next_turn(first.sequences, SECOND),
        "past_key_values": copy.deepcopy(first.past_key_values),
    }


def test_it_reads_what_the_first_one_kept_layer_by_layer(world, inputs, first, turn) -> None:
    out = world.hf.generate(**turn, **SETTINGS)
    single, ids = row(inputs, 1), out.sequences[0]
    kept = [layer[0] for layer in first.past_key_values.reduction.positions]
    assert len(kept[-1]) < len(kept[1]) < len(kept[0]) == 4 * NUM_FRAMES
    hidden = embedded(world.hf, single, ids)
    wanted = naive_logits(world.hf, hidden, entering_layers(world.hf, ids, kept))[-STEPS - 1 : -1]
    assert (torch.cat(out.logits) - wanted).abs().max() < 1e-4
    assert torch.equal(ids[-STEPS:], wanted.argmax(-1))
    # Had it chosen the tokens itself, it would have answered from others.
    everything = entering_layers(world.hf, ids, [kept[0]] * len(kept))
    assert (torch.cat(out.logits) - naive_logits(world.hf, hidden, everything)[-STEPS - 1 : -1]).abs().max() > 1e-2


def test_statistics_come_with_the_caches(world, inputs, first) -> None:
    with torch.no_grad():
        out = world.hf(**inputs, output_reduction=True)
    found, generated = out.reduction, first.past_key_values.reduction
    assert found.visual_counts == tuple((inputs["token_kinds"] == 1).sum(1).tolist())
    assert found.counts()[0] == list(found.visual_counts)
    for layer, counts in enumerate(found.counts()):
        share = world.hf.config.reduction["retention"][layer]
        assert all(abs(count - share * most) <= 1 for count, most in zip(counts, found.visual_counts))
        assert torch.equal(generated.positions[layer][0], found.positions[layer][1])
    for sample, budget in enumerate(found.budgets()):
        counts = [layer[sample] for layer in found.counts()]
        assert budget == pytest.approx(sum(counts) / (5 * found.visual_counts[sample]))
        assert budget == pytest.approx(0.5, abs=0.03)
    assert world.hf(**row(inputs, 0)).reduction is None


def test_frames_and_kinds_may_be_given_again_and_new_columns_alone(world, inputs, turn) -> None:
    wanted = world.hf.generate(**{**turn, "past_key_values": copy.deepcopy(turn["past_key_values"])}, **SETTINGS)
    single = row(inputs, 1)
    more = {name: single[name] for name in ("pixel_values", "token_kinds", "frames_per_video")}
    cache = copy.deepcopy(turn["past_key_values"])
    again = world.hf.generate(**{**turn, **more, "past_key_values": cache}, **SETTINGS)
    assert torch.equal(again.sequences, wanted.sequences)
    new = turn["input_ids"].shape[1] - turn["past_key_values"].get_seq_length()
    alone = world.hf.generate(**{**turn, "input_ids": turn["input_ids"][:, -new:]}, **SETTINGS)
    assert torch.equal(alone.sequences, wanted.sequences[:, -new - STEPS :])


def test_a_third_question_and_beams_over_caches(world, turn) -> None:
    second = world.hf.generate(**turn, **SETTINGS)
    third = world.processor.next_turn(second.sequences, "Why?")
    asked = {"num_beams": 2, "do_sample": False, "max_new_tokens": 3, "eos_token_id": None}
    with pytest.raises(ValueError, match="2 rows of input_ids and caches of 1"):
        world.hf.generate(**third, past_key_values=second.past_key_values, **asked)
    out = world.hf.generate(**third, past_key_values=second.past_key_values, **SETTINGS)
    assert out.sequences.shape[1] == third["input_ids"].shape[1] + STEPS


def test_the_turn_is_the_one_of_the_chat_template(world, inputs, clips) -> None:
    single = row(inputs, 1)
    tokenizer = world.processor.tokenizer
    answer = tokenizer.encode("seven\n", add_special_tokens=False)
    end = world.hf.config.eos_token_id
    chat = [*message(QUESTIONS[1]), {"role": "assistant", "content": "seven"}, {"role": "user", "content": SECOND}]
    text = world.processor.apply_chat_template(chat, add_generation_prompt=True)
    whole = world.processor(text=text, videos=[str(clips[1])])["input_ids"]
    for given in ([*answer, end], answer[:-1]):
        sequences = torch.cat([single["input_ids"], torch.tensor([given])], 1)
        assert torch.equal(world.processor.next_turn(sequences, SECOND)["input_ids"], whole)


def test_prefilled_again_it_is_a_fresh_run_whose_question_may_choose(world, clips, turn) -> None:
    chat = [*message(QUESTIONS[1]), {"role": "assistant", "content": "seven"}, {"role": "user", "content": SECOND}]
    text = world.processor.apply_chat_template(chat, add_generation_prompt=True)
    world.hf.generate(**turn, **SETTINGS)
    fresh = AutoModelForCausalLM.from_pretrained(world.folder, trust_remote_code=True).eval()
    kept = {}
    for mode in (None, "first_question", "split_turns"):
        asked = world.processor(text=text, videos=[str(clips[1])], conversation_mode=mode)
        here = world.hf.generate(**asked, **SETTINGS, output_reduction=True)
        there = fresh.generate(**asked, **SETTINGS, output_reduction=True)
        assert torch.equal(here.sequences, there.sequences)
        assert all(torch.equal(*pair) for pair in zip(here.logits, there.logits))
        kept[mode] = here.past_key_values.reduction
        assert kept[mode].counts() == there.past_key_values.reduction.counts()
    same = [torch.equal(a[0], b[0]) for a, b in zip(kept[None].positions, kept["first_question"].positions)]
    other = [torch.equal(a[0], b[0]) for a, b in zip(kept["first_question"].positions, kept["split_turns"].positions)]
    assert all(same)
    assert not all(other), "the second question keeps what the first one dropped"


def test_the_question_that_scores_is_the_one_of_training(world, clips) -> None:
    data, vision = world.cfg.data, world.cfg.model.vision
    encoder = PromptEncoder(AutoTokenizer.from_pretrained(data.tokenizer), vision.tokens_per_frame, data.frame_text)
    video = decode_video(clips[1], FrameSampling(num_frames=NUM_FRAMES), vision.frame_size)
    chat = [*message(QUESTIONS[1]), {"role": "assistant", "content": "seven"}, {"role": "user", "content": SECOND}]
    answered = read_conversation([*chat, {"role": "assistant", "content": "eight"}])
    trained = encoder.encode_samples(answered, [video.seconds], "split_turns")[1]
    text = world.processor.apply_chat_template(chat, add_generation_prompt=True)
    asked = world.processor(text=text, videos=[str(clips[1])], conversation_mode="split_turns")
    length = asked["input_ids"].shape[1]
    assert asked["input_ids"][0].tolist() == trained.input_ids[:length]
    assert asked["token_kinds"][0].tolist() == trained.layout.kinds()[:length]
    with pytest.raises(ValueError, match="choose one of first_question, split_turns, all_turns"):
        world.processor(text=text, videos=[str(clips[1])], conversation_mode="last")


def test_what_cannot_be_gone_on_from_is_refused_in_one_line(world, inputs, first, turn) -> None:
    ids, cache = turn["input_ids"], first.past_key_values
    changed = ids.clone()
    changed[0, 3] += 1
    image = torch.cat([ids, torch.tensor([[world.hf.config.image_token_id]])], 1)
    cases = [
        ({"input_ids": changed}, "differ from column 3 on"),
        ({"input_ids": ids[:, : cache.get_seq_length()]}, "give new columns"),
        ({"attention_mask": torch.ones_like(ids)[:, 3:]}, "attention_mask is of another length"),
        ({"attention_mask": (torch.arange(ids.shape[1]) != ids.shape[1] - 9).long()[None]}, "padding inside a row"),
        ({"input_ids": image}, "image tokens after filled caches"),
        ({"past_key_values": DynamicCache()}, "this model makes its own caches"),
    ]
    for change, text in cases:
        given = {"input_ids": ids, "past_key_values": cache, **change}
        with pytest.raises(ValueError, match=text) as error:
            world.hf.generate(**given, max_new_tokens=1)
        assert "\n" not in str(error.value)
    for question, rows, text in (("<video> And?", 1, "prefill the whole chat"), ("And?", 2, "2 chats")):
        with pytest.raises(ValueError, match=text):
            world.processor.next_turn(ids.expand(rows, -1), question)
