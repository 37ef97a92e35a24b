"""A row of a batch is answered as it is alone, whatever the other rows are."""

from __future__ import annotations

import pytest
import torch

from tests.export.conftest import QUESTIONS, message

STEPS = 5
SETTINGS = {"do_sample": False, "max_new_tokens": STEPS, "eos_token_id": None, "return_dict_in_generate": True}


@pytest.fixture(scope="module")
def rows(world, clips) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """A batch of texts with no, one and two videos, padded on the left, and the same texts alone."""
    second = [{"type": "video"}, {"type": "text", "text": "then "}, {"type": "video"}, {"type": "text", "text": "?"}]
    chats = [
        ([{"role": "user", "content": "Who?"}], []),
        (message(QUESTIONS[1]), [clips[1]]),
        ([{"role": "user", "content": second}], [clips[2], clips[0]]),
        ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Are there no frames here?"}], []),
        (message(QUESTIONS[0]), [clips[0]]),
    ]
    processor = world.processor
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat, _ in chats]
    batch = processor(text=texts, videos=[[str(clip) for clip in videos] for _, videos in chats], padding=True)
    alone = [processor(text=text, videos=[str(clip) for clip in videos]) for text, (_, videos) in zip(texts, chats)]
    assert len({each["input_ids"].shape[1] for each in alone}) == len(alone)
    return dict(batch), [dict(each) for each in alone]


@pytest.fixture(params=[0.3, 1.0])
def model(world, request):
    """The exported model at a budget."""
    saved = world.hf.config.reduction
    world.hf.set_reduction({"budget": request.param})
    yield world.hf
    world.hf.set_reduction(saved)


def test_logits_kept_tokens_and_answers(model, rows) -> None:
    batch, alone = rows
    with torch.no_grad():
        whole = model(**batch, output_reduction=True)
    cached, plain = (
        model.generate(**batch, **SETTINGS, output_logits=True, use_cache=cache) for cache in (True, False)
    )
    assert torch.equal(cached.sequences, plain.sequences)
    assert whole.reduction.budgets()[0] is None
    for index, single in enumerate(alone):
        with torch.no_grad():
            out = model(**single, output_reduction=True)
        length = single["input_ids"].shape[1]
        assert torch.allclose(whole.logits[index, -length:], out.logits[0], atol=1e-5, equal_nan=True)
        assert whole.logits[index, :-length].isnan().all()
        for mine, theirs in zip(whole.reduction.positions, out.reduction.positions):
            assert torch.equal(mine[index], theirs[0])
        answer = model.generate(**single, **SETTINGS, output_logits=True)
        assert torch.equal(answer.sequences[0, -STEPS:], cached.sequences[index, -STEPS:])
        for mine, theirs in zip(cached.logits, answer.logits):
            assert (mine[index] - theirs[0]).abs().max() < 1e-4


@pytest.mark.parametrize("num_beams", [2, 3])
def test_beams(world, rows, num_beams: int) -> None:
    batch, alone = rows
    settings = {**SETTINGS, "num_beams": num_beams, "num_return_sequences": 2, "output_scores": True}
    out = world.hf.generate(**batch, **settings)
    for index, single in enumerate(alone):
        beams = world.hf.generate(**single, **settings)
        pair = slice(2 * index, 2 * index + 2)
        assert torch.equal(out.sequences[pair, -STEPS:], beams.sequences[:, -STEPS:])
        assert torch.allclose(out.sequences_scores[pair], beams.sequences_scores, atol=1e-5)
        # A beam's score is the mean log probability of its tokens, here computed over with no caches.
        for beam in range(2):
            given = {**single, "input_ids": beams.sequences[beam : beam + 1], "attention_mask": None}
            with torch.no_grad():
                logits = world.hf(**given, use_cache=False).logits[0, -STEPS - 1 : -1]
            chosen = logits.log_softmax(-1).gather(1, beams.sequences[beam, -STEPS:, None])
            assert beams.sequences_scores[beam].item() == pytest.approx(chosen.mean().item(), abs=1e-4)


def test_samples_are_those_of_their_seed(world, rows) -> None:
    settings = {"do_sample": True, "top_p": 0.9, "temperature": 1.5, "max_new_tokens": STEPS, "eos_token_id": None}
    found = []
    for seed, use_cache in ((0, True), (0, False), (1, True)):
        torch.manual_seed(seed)
        found.append(world.hf.generate(**rows[0], **settings, use_cache=use_cache))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
