"""Samples of an analysis: no answer, frames by number, and only needles that nothing but pixels gives away."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hybridprune_megatron.analysis.samples import SampleReader, cut_answer, fill, frames_within
from hybridprune_megatron.data.stored_samples import read_samples
from hybridprune_megatron.method.layout import TokenKind
from tests.analysis.videos import clip_config, write_clips
from tests.models.tiny import tiny_sample


def test_a_prompt_ends_before_the_first_answer():
    sample = tiny_sample(1)
    prompt = cut_answer(sample)
    assert prompt.layout.num_tokens == sample.layout.num_tokens - 2
    assert prompt.layout.count(TokenKind.ANSWER) == 0
    assert torch.equal(prompt.input_ids, sample.input_ids[:-2])
    # What answers a first question is not shown to a second one either.
    spans = (*sample.layout.spans, *sample.layout.spans[-3:])
    ids = torch.cat([sample.input_ids, sample.input_ids[-8:]])
    twice = replace(sample, layout=replace(sample.layout, spans=spans), input_ids=ids, labels=ids)
    assert cut_answer(twice).layout == prompt.layout


def test_frames_of_the_file_are_found_among_those_shown():
    assert frames_within([0, 3, 6, 9], [[3, 7]]) == (1, 2)
    assert frames_within([0, 3, 6, 9], [[0, 1], [9, 12]]) == (0, 3)
    assert frames_within([0, 3, 6, 9], [[4, 6]]) == ()


def test_samples_know_their_frames_and_their_needle(tmp_path):
    reader = SampleReader(clip_config("data.num_frames=4"), write_clips(tmp_path / "clips", 4))
    for stored, sample in zip(read_samples(tmp_path / "clips"), reader.samples()):
        first = stored.meta["needles"][0]["first_frame"]
        # Frames 0, 2, 5 and 7 of eight are shown.
        shown = tuple(number for number, frame in enumerate((0, 2, 5, 7)) if first <= frame < first + 2)
        assert sample.evidence == sample.needles[0]["frames"] == shown
        assert sample.frame_numbers().tolist() == [frame for frame in range(4) for _ in range(4)]
        numbers = sample.visual_numbers()
        assert numbers[numbers >= 0].tolist() == list(range(16))
        kinds = torch.tensor(sample.prompt.layout.kinds())
        assert torch.equal(numbers >= 0, kinds == TokenKind.FRAME)
        assert sample.question == "What colour is the needle?"
        assert sample.answer == stored.meta["answer"]


def test_a_question_that_names_the_label_is_not_probed(tmp_path):
    reader = SampleReader(clip_config(), write_clips(tmp_path / "clips", 6))
    assert len(list(reader.probe_samples("colour", None))) == 6
    assert not list(reader.probe_samples("colour", "Where is the {colour} needle?"))
    asked = list(reader.probe_samples("colour", "What is in frame {first_frame}?"))
    assert len(asked) == 6
    assert asked[0].question.startswith("What is in frame ")
    assert asked[0].prompt.layout.count(TokenKind.ANSWER) == 0
    with pytest.raises(ValueError, match=r"label=shape: needles of .* have colour; choose one"):
        next(reader.probe_samples("shape", None))
    with pytest.raises(ValueError, match="attributes are colour, first_frame, num_frames"):
        fill("Where is the {place}?", {"colour": "red", "first_frame": 1, "num_frames": 2})


def test_data_without_needles_is_probed_as_it_is(tmp_path):
    reader = SampleReader(clip_config(), write_clips(tmp_path / "clips", 3, needles=False))
    samples = list(reader.probe_samples("colour", None))
    assert [sample.needles for sample in samples] == [(), (), ()]
    assert samples[0].evidence is None
