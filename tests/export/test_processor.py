"""The processor makes of a conversation what the training data makes of it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from hybridprune_megatron.data.prompt import PromptEncoder, read_conversation
from hybridprune_megatron.data.video import FrameSampling, decode_video
from tests.export.conftest import NUM_FRAMES, QUESTIONS, message, row


def test_ids_kinds_and_frames_are_the_training_samples(world, inputs, clips) -> None:
    data = world.cfg.data
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer)
    encoder = PromptEncoder(tokenizer, world.cfg.model.vision.tokens_per_frame, data.frame_text)
    for index, (question, clip) in enumerate(zip(QUESTIONS, clips)):
        video = decode_video(clip, FrameSampling(num_frames=NUM_FRAMES), world.cfg.model.vision.frame_size)
        answered = [*message(question), {"role": "assistant", "content": "seven"}]
        (sample,) = encoder.encode_samples(read_conversation(answered), [video.seconds], data.conversation)
        single = row(inputs, index)
        length = single["input_ids"].shape[1]
        # The prompt is the training sample up to its answer.
        assert sample.labels[length - 1] == sample.input_ids[length] != -100
        assert set(sample.labels[: length - 1]) == {-100}
        assert single["input_ids"][0].tolist() == sample.input_ids[:length]
        assert single["token_kinds"][0].tolist() == sample.layout.kinds()[:length]
        assert torch.equal(single["pixel_values"], video.frames)


def test_padding_is_on_the_left(inputs, world) -> None:
    mask = inputs["attention_mask"]
    assert mask[:, -1].all()
    assert not mask.all()
    assert torch.equal(mask.sort(dim=1).values, mask)
    assert (inputs["input_ids"][mask == 0] == world.processor.tokenizer.pad_token_id).all()
    assert (inputs["token_kinds"][mask == 0] == 0).all()


def test_text_without_videos_and_empty_arguments(world) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]
    text = world.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<SPECIAL_10>System\nBe brief.\n<SPECIAL_11>User\nWho are you?\n<SPECIAL_11>Assistant\n"
    empty = world.processor(text=text, images=[], videos=[], audios=[], padding=True, return_tensors="pt")
    absent = world.processor(text=[text], images=None, videos=None, audios=None)
    assert set(empty) == {"input_ids", "attention_mask", "token_kinds"}
    assert torch.equal(empty["input_ids"], absent["input_ids"])
    assert world.hf.generate(**empty, max_new_tokens=2, do_sample=False).shape[1] == empty["input_ids"].shape[1] + 2
    open_text = world.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    assert text == open_text + "<SPECIAL_11>Assistant\n"


def test_tokenized_in_one_call(world, clips) -> None:
    messages = message("What?")
    messages[0]["content"][0]["path"] = str(clips[0])
    whole = world.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    text = world.processor.apply_chat_template(messages, add_generation_prompt=True)
    parts = world.processor(text=text, videos=clips[0].read_bytes())
    assert set(whole) == set(parts)
    assert all(torch.equal(whole[name], parts[name]) for name in parts)


def test_several_videos_between_text(world, clips) -> None:
    content = [
        {"type": "text", "text": "First "},
        {"type": "video"},
        {"type": "text", "text": "then "},
        {"type": "video"},
    ]
    content.append({"type": "text", "text": "which is longer?"})
    text = world.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    both = world.processor(text=[text], videos=[[str(clips[0]), str(clips[2])]])
    assert len(both["pixel_values"]) == 5 + NUM_FRAMES
    assert int((both["token_kinds"] == 1).sum()) == 4 * (5 + NUM_FRAMES)
    assert both["frames_per_video"].tolist() == [[5, NUM_FRAMES]]
    with torch.no_grad():
        assert world.hf(**both, logits_to_keep=1).logits.isfinite().all()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"images": ["a.png"]}, "images="),
        ({"videos": []}, "1 <video> in the text and 0 videos"),
        ({"videos": [3]}, "video of type int"),
        ({"videos": ["missing.mp4"]}, "missing.mp4 cannot be decoded"),
        ({"return_tensors": "np"}, "return_tensors='np'"),
        ({"max_frames": 4}, "max_frames=4"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(world, given: dict, text: str) -> None:
    prompt = world.processor.apply_chat_template(message("What?"), add_generation_prompt=True)
    with pytest.raises(ValueError, match=text) as error:
        world.processor(text=prompt, **given)
    assert "\n" not in str(error.value)
