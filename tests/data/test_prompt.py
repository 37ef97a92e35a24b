"""Prompts: exact format, spans, labels, and one code path for training and inference."""

from typing import Any

import pytest

from hybridprune_megatron.data.batch import IGNORE_LABEL
from hybridprune_megatron.data.conversation import Conversation, parse_chat, read_conversation, render_chat
from hybridprune_megatron.data.prompt import EncodedPrompt, PromptEncoder
from hybridprune_megatron.method.layout import TokenKind

TOKENS_PER_FRAME = 3


@pytest.fixture(scope="module")
def encoder(tokenizer: Any) -> PromptEncoder:
    return PromptEncoder(tokenizer, TOKENS_PER_FRAME)


def messages(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(texts)]
    return ([{"role": "system", "content": system}] if system else []) + turns


def texts_of(kind: TokenKind, prompt: EncodedPrompt, tokenizer: Any) -> list[str]:
    """The text of every span of a kind."""
    found, start = [], 0
    for span in prompt.layout.spans:
        if span.kind == kind:
            found.append(tokenizer.decode(prompt.input_ids[start : start + span.num_tokens]))
        start += span.num_tokens
    return found


def loss_text(prompt: EncodedPrompt, tokenizer: Any) -> str:
    return tokenizer.decode([label for label in prompt.labels if label != IGNORE_LABEL])


def test_the_whole_prompt_reads_as_designed(encoder: PromptEncoder, tokenizer: Any) -> None:
    conversation = read_conversation(messages("<video>\nWhat shape is it?", "star", system="Be brief."))
    (sample,) = encoder.encode_samples(conversation, [[0.0, 1.5]])
    image = "<image>" * TOKENS_PER_FRAME
    assert tokenizer.decode(sample.input_ids) == (
        "<SPECIAL_10>System\nBe brief.\n<SPECIAL_11>User\n"
        f"Frame 1 sampled at 0.00 seconds: <img>{image}</img>\n"
        f"Frame 2 sampled at 1.50 seconds: <img>{image}</img>\n"
        "What shape is it?\n<SPECIAL_11>Assistant\nstar\n<SPECIAL_12>"
    )
    assert texts_of(TokenKind.QUESTION, sample, tokenizer) == ["What shape is it?"]
    assert texts_of(TokenKind.ANSWER, sample, tokenizer) == ["star\n<SPECIAL_12>"]
    assert loss_text(sample, tokenizer) == "star\n<SPECIAL_12>"
    frames = [span for span in sample.layout.spans if span.kind == TokenKind.FRAME]
    assert [(span.video, span.frame, span.num_tokens) for span in frames] == [(0, 0, 3), (0, 1, 3)]


def test_labels_are_the_next_tokens(encoder: PromptEncoder) -> None:
    (sample,) = encoder.encode_samples(read_conversation(messages("Which digit?", "7")), [])
    kinds = sample.layout.kinds()
    for index, label in enumerate(sample.labels):
        following = index + 1
        if following < len(kinds) and kinds[following] == TokenKind.ANSWER:
            assert label == sample.input_ids[following]
        else:
            assert label == IGNORE_LABEL


def test_videos_interleave_with_text(encoder: PromptEncoder, tokenizer: Any) -> None:
    content = "Before <video>\nand after <video> which differs?"
    (sample,) = encoder.encode_samples(read_conversation(messages(content, "late")), [[0.0], [0.0, 2.0]])
    assert texts_of(TokenKind.QUESTION, sample, tokenizer) == ["Before ", "and after ", " which differs?"]
    frames = [(span.video, span.frame) for span in sample.layout.spans if span.kind == TokenKind.FRAME]
    assert frames == [(0, 0), (1, 0), (1, 1)]
    assert sample.num_videos == 2


def test_first_question_scores_for_all_turns(encoder: PromptEncoder, tokenizer: Any) -> None:
    conversation = read_conversation(messages("<video>\nWhere?", "end", "When?", "start"))
    (sample,) = encoder.encode_samples(conversation, [[0.0]], "first_question")
    assert texts_of(TokenKind.QUESTION, sample, tokenizer) == ["Where?"]
    assert loss_text(sample, tokenizer) == "end\n<SPECIAL_12>start\n<SPECIAL_12>"


def test_split_turns_makes_a_sample_a_turn(encoder: PromptEncoder, tokenizer: Any) -> None:
    conversation = read_conversation(messages("<video>\nWhere?", "end", "<video>When?", "start"))
    first, second = encoder.encode_samples(conversation, [[0.0], [0.0]], "split_turns")
    assert (first.num_videos, second.num_videos) == (1, 2)
    assert texts_of(TokenKind.QUESTION, first, tokenizer) == ["Where?"]
    assert loss_text(first, tokenizer) == "end\n<SPECIAL_12>"
    assert texts_of(TokenKind.QUESTION, second, tokenizer) == ["When?"]
    assert texts_of(TokenKind.ANSWER, second, tokenizer) == ["start\n<SPECIAL_12>"]
    assert loss_text(second, tokenizer) == "start\n<SPECIAL_12>"


def test_all_turns_score(encoder: PromptEncoder, tokenizer: Any) -> None:
    conversation = read_conversation(messages("<video>\nWhere?", "end", "When?", "start"))
    (sample,) = encoder.encode_samples(conversation, [[0.0]], "all_turns")
    assert texts_of(TokenKind.QUESTION, sample, tokenizer) == ["Where?", "When?"]


@pytest.mark.parametrize("mode", ["first_question", "split_turns", "all_turns"])
def test_no_answer_ever_scores(encoder: PromptEncoder, tokenizer: Any, mode: str) -> None:
    conversation = read_conversation(messages("<video>\nWhere?", "magenta", "When?", "triangle"))
    for sample in encoder.encode_samples(conversation, [[0.0]], mode):
        scoring = "".join(texts_of(TokenKind.QUESTION, sample, tokenizer))
        assert "magenta" not in scoring
        assert "triangle" not in scoring


@pytest.mark.parametrize("mode", ["first_question", "split_turns", "all_turns"])
def test_inference_sees_the_tokens_of_training(encoder: PromptEncoder, mode: str) -> None:
    texts = ("A <video>\nWhere is it?", "end", "When?", "start")
    times = [[0.0, 0.5]]
    trained = encoder.encode_samples(read_conversation(messages(*texts, system="Look.")), times, mode)[-1]
    asked = encoder.encode_prompt(read_conversation(messages(*texts[:-1], system="Look.")), times, mode)
    length = len(asked.input_ids)
    assert asked.input_ids == trained.input_ids[:length]
    assert set(asked.labels) == {IGNORE_LABEL}
    scoring = [kind == TokenKind.QUESTION for kind in asked.layout.kinds()]
    assert scoring == [kind == TokenKind.QUESTION for kind in trained.layout.kinds()[:length]]


@pytest.mark.parametrize(
    "texts",
    [("Hi",), ("<video>\nWhere?",), ("Hi", "yes", "<video>"), ("Hi", "yes"), ("two\nlines\n", "yes\n", "and\n\n")],
)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_rendered_text_parses_back(texts: tuple[str, ...], system: str | None) -> None:
    conversation = read_conversation(messages(*texts, system=system))
    assert parse_chat(render_chat(conversation)) == conversation


def test_chat_template_of_the_tokenizer_renders_the_same(tokenizer: Any) -> None:
    turns = messages("<video>\nWhere?", "end", "When?", system="Be brief.")
    parts = [dict(turn) for turn in turns]
    parts[1]["content"] = [{"type": "video"}, {"type": "text", "text": "\nWhere?"}]  # type: ignore[assignment]
    expected = render_chat(read_conversation(turns))
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == expected
    assert tokenizer.apply_chat_template(parts, tokenize=False, add_generation_prompt=True) == expected
    assert read_conversation(parts) == read_conversation(turns)
    whole = messages("Where?", "end", "When?", "late")
    assert tokenizer.apply_chat_template(whole, tokenize=False) == render_chat(read_conversation(whole))


@pytest.mark.parametrize(
    ("conversation", "expected"),
    [
        ([], "expected a list of messages"),
        ([{"role": "user"}], "role and content"),
        (messages("Hi")[::-1] * 2, "expected user and assistant in turn"),
        ([{"role": "assistant", "content": "Hi"}], "expected user and assistant in turn"),
        (messages("Hi <image>"), "reserved for the prompt format"),
        (messages("Hi", "a <SPECIAL_11>User"), "reserved for the prompt format"),
        (messages("Hi", "<video>"), "reserved for the prompt format"),
        ([{"role": "user", "content": 5}], "expected a string or a list of parts"),
        ([{"role": "user", "content": [{"type": "image"}]}], "content part"),
    ],
)
def test_malformed_conversations_are_named(conversation: list[Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        read_conversation(conversation)


def test_encoding_refuses_what_cannot_be_learned(encoder: PromptEncoder) -> None:
    with pytest.raises(ValueError, match="last answer is missing"):
        encoder.encode_samples(Conversation(None, ("Hi",), ()), [])
    with pytest.raises(ValueError, match="answer is empty"):
        encoder.encode_samples(Conversation(None, ("Hi",), ("",)), [])
    with pytest.raises(ValueError, match="1 <video> placeholders but 0 videos"):
        encoder.encode_samples(Conversation(None, ("<video>Hi",), ("a",)), [])
    with pytest.raises(ValueError, match="nothing to score frames with"):
        encoder.encode_samples(Conversation(None, ("<video>\n",), ("a",)), [[0.0]])
    with pytest.raises(ValueError, match=r"data\.conversation='last'"):
        encoder.encode_samples(Conversation(None, ("Hi",), ("a",)), [], "last")
    with pytest.raises(ValueError, match="a prompt ends with a question"):
        encoder.encode_prompt(Conversation(None, ("Hi",), ("a",)), [])


def test_frame_text_template_is_checked(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"data\.frame_text"):
        PromptEncoder(tokenizer, 1, "Frame {number}")


def test_frame_texts_are_short_and_answers_one_token(tokenizer: Any) -> None:
    assert len(tokenizer) <= 1024
    assert len(tokenizer.encode("Frame 12 sampled at 5.50 seconds: ", add_special_tokens=False)) <= 6
    from studies.needles.needles import CHOICES

    for choices in CHOICES.values():
        ids = [tokenizer.encode(choice, add_special_tokens=False) for choice in choices]
        assert all(len(each) == 1 for each in ids)
        assert len({each[0] for each in ids}) == len(choices)
