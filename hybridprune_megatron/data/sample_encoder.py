"""From a stored sample, a conversation and video files, to encoded samples; in two steps, so that packing stays cheap.

A draft knows its tokens but holds the video as it was stored; only what was chosen for a pack is decoded. Frames are
many times larger than the file they come from, and a packing buffer holds many samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from hybridprune_megatron.checks import ConfigError
from hybridprune_megatron.config.schema import Config
from hybridprune_megatron.data.batch import EncodedSample, FrameFeatures, join_features, no_pixels
from hybridprune_megatron.data.conversation import Conversation, check_media, media_types, read_conversation
from hybridprune_megatron.data.features import StoredFeatures
from hybridprune_megatron.data.prompt import EncodedPrompt, PromptEncoder
from hybridprune_megatron.data.stored_media import StoredImage, StoredMedium, kinds_of
from hybridprune_megatron.data.tokenizer import load_tokenizer
from hybridprune_megatron.data.video import FrameSampling, decode_image, decode_video, probe_video
from hybridprune_megatron.method.layout import TokenKind

#: Why a sample may be left out.
BAD_REASONS = ("malformed", "video", "too_long", "shard")
#: Characters of a text for one token that it becomes at least; more are refused before the tokenizer, which takes
#: seconds for a megabyte, has seen them.
_MOST_CHARACTERS = 16
_MOST_MESSAGE = 500


class BadSampleError(ValueError):
    """A sample that cannot be used.

    Attributes:
        reason: one of ``BAD_REASONS``.
    """

    def __init__(self, reason: str, key: str, message: str) -> None:
        assert reason in BAD_REASONS, reason
        super().__init__(f"sample {key}: {' '.join(message.split())[:_MOST_MESSAGE]}")
        self.reason = reason


class MisfitError(BadSampleError, ConfigError):
    """A sample of features that is whole, for another model or sampling than the configured ones."""


@contextmanager
def _malformed(key: str) -> Iterator[None]:
    """What is wrong inside, and not told apart, is wrong with the conversation."""
    try:
        yield
    except BadSampleError:
        raise
    except ValueError as error:
        raise BadSampleError("malformed", key, str(error)) from error


@dataclass(frozen=True)
class SampleDraft:
    """A sample whose videos are not decoded yet.

    Attributes:
        key: of the sample it becomes.
        conversation: all of it.
        part: which of the samples of this conversation it is (0 but with ``split_turns``).
        prompt: its tokens, for the expected frame times.
        seconds: for every video of the conversation its expected frame times, for an image None.
        videos: the video and image files, or stored features of frames.
    """

    key: str
    conversation: Conversation
    part: int
    prompt: EncodedPrompt
    seconds: list[list[float] | None]
    videos: tuple[StoredMedium, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt.input_ids)


class SampleEncoder:
    """Encodes conversations about videos as the configuration says.

    Args:
        cfg: uses ``data`` and ``model``, what it says about vision.

    Raises:
        ValueError: the tokenizer cannot be read or lacks special tokens.
    """

    def __init__(self, cfg: Config) -> None:
        data, vision = cfg.data, cfg.model.vision
        self.tokenizer = load_tokenizer(data.tokenizer)
        self.model = cfg.model
        self.mode = data.conversation
        self.sequence_length = data.sequence_length
        self.sampling: FrameSampling | None = None
        self.frame_size = 0
        if data.sampling != "none" and vision is not None:
            self.sampling = FrameSampling(data.sampling, data.num_frames, data.fps, data.max_frames)
            self.frame_size = vision.frame_size
        tokens_per_frame = vision.tokens_per_frame if vision is not None else 1
        self.prompts = PromptEncoder(self.tokenizer, tokens_per_frame, data.frame_text)

    @property
    def pad_id(self) -> int:
        """Token of padding, which no loss and no other sample ever sees."""
        return int(self.tokenizer.pad_token_id or 0)

    @property
    def end_id(self) -> int:
        """Token that ends an answer."""
        return self.prompts.end_id

    def draft(self, key: str, messages: Sequence[dict[str, Any]], videos: Sequence[StoredMedium]) -> list[SampleDraft]:
        """The samples that a conversation becomes: one, or one per turn with ``split_turns``.

        Raises:
            MisfitError: features are for another model, or lack frames that the sampling takes.
            BadSampleError: the conversation is malformed, a video unreadable, or a sample longer than a sequence.
        """
        with _malformed(key):
            conversation = read_conversation(messages, media_types(kinds_of(videos)))
            seconds = self._seconds(key, conversation, videos)
            if self.mode == "split_turns":
                # The last part is the whole conversation; the others are made only if that is short enough.
                self._check_length(key, len(self.prompts.encode_samples(conversation, seconds)[0].input_ids))
            prompts = self.prompts.encode_samples(conversation, seconds, self.mode)
        drafts = []
        for part, prompt in enumerate(prompts):
            part_key = key if len(prompts) == 1 else f"{key}.{part}"
            self._check_length(part_key, len(prompt.input_ids))
            drafts.append(SampleDraft(part_key, conversation, part, prompt, seconds, tuple(videos)))
        return drafts

    def prompt(self, key: str, conversation: Conversation, videos: Sequence[StoredMedium]) -> EncodedSample:
        """A conversation that waits for its last answer, as training shows it; without labels.

        Args:
            conversation: has one more question than answers.

        Raises:
            BadSampleError: as ``draft`` and ``finish`` do.
        """
        with _malformed(key):
            seconds = self._seconds(key, conversation, videos)
            prompt = self.prompts.encode_prompt(conversation, seconds, self.mode)
            if videos and not prompt.layout.count(TokenKind.QUESTION):
                raise ValueError("it shows a video but its question has no text: nothing to score frames with")
        self._check_length(key, len(prompt.input_ids))
        return self.finish(SampleDraft(key, conversation, 0, prompt, seconds, tuple(videos)))

    def answer_ids(self, key: str, text: str) -> tuple[int, ...]:
        """The tokens of an answer to a prompt, its end included.

        Raises:
            BadSampleError: the text holds what the prompt format reserves, or is longer than a sequence.
        """
        with _malformed(key):
            self._check_characters(key, [text])
            ids = self.prompts.answer_ids(text)
        self._check_length(key, len(ids))
        return ids

    def finish(self, draft: SampleDraft) -> EncodedSample:
        """Decodes the videos of a draft, or takes the features stored in their place.

        Raises:
            BadSampleError: a video cannot be decoded, or decodes to more frames than a sequence has room for.
        """
        prompt = draft.prompt
        frames, features, seconds = [], [], list(draft.seconds)
        try:
            for index in range(prompt.num_videos):
                assert self.sampling is not None, "videos without a sampling are refused by draft()"
                video = draft.videos[index]
                if isinstance(video, StoredFeatures):
                    features.append(self._features(video, self.sampling))
                    continue
                if isinstance(video, StoredImage):
                    frames.append(decode_image(video.data, self.frame_size, f"image {index}").frames)
                    continue
                decoded = decode_video(video, self.sampling, self.frame_size, f"video {index}")
                frames.append(decoded.frames)
                seconds[index] = decoded.seconds
            frame_features = join_features(features)
        except (ValueError, MemoryError) as error:
            raise BadSampleError("video", draft.key, str(error)) from error
        if seconds != draft.seconds:
            # The container's index was wrong; what was decoded counts.
            prompt = self._prompts(draft.conversation, seconds)[draft.part]
        sample = EncodedSample(
            key=draft.key,
            input_ids=torch.tensor(prompt.input_ids, dtype=torch.int64),
            labels=torch.tensor(prompt.labels, dtype=torch.int64),
            layout=prompt.layout,
            pixel_values=torch.cat(frames) if frames else no_pixels(),
            frame_features=frame_features,
        )
        self._check_length(sample.key, sample.layout.num_tokens)
        return sample

    def encode(
        self, key: str, messages: Sequence[dict[str, Any]], videos: Sequence[StoredMedium]
    ) -> list[EncodedSample]:
        """Both steps at once.

        Raises:
            BadSampleError: as ``draft`` and ``finish`` do.
        """
        return [self.finish(draft) for draft in self.draft(key, messages, videos)]

    def _prompts(self, conversation: Conversation, seconds: list[list[float] | None]) -> list[EncodedPrompt]:
        """The prompts of a draft's conversation, which waits for its answer or has it."""
        if len(conversation.answers) < len(conversation.questions):
            return [self.prompts.encode_prompt(conversation, seconds, self.mode)]
        return self.prompts.encode_samples(conversation, seconds, self.mode)

    def _seconds(
        self, key: str, conversation: Conversation, videos: Sequence[StoredMedium]
    ) -> list[list[float] | None]:
        """Expected frame times of the videos of a conversation that may fit a sequence and shows all of them."""
        self._check_size(key, conversation, len(videos))
        check_media(conversation, kinds_of(videos))
        return self._probe(key, videos)

    def _probe(self, key: str, videos: Sequence[StoredMedium]) -> list[list[float] | None]:
        if videos and self.sampling is None:
            raise BadSampleError(
                "malformed", key, f"{len(videos)} videos for a model or setting (data.sampling) without"
            )
        try:
            return [self._times(video, self.sampling, f"video {i}") for i, video in enumerate(videos) if self.sampling]
        except ConfigError as error:
            raise MisfitError("video", key, str(error)) from error
        except (ValueError, MemoryError) as error:
            raise BadSampleError("video", key, str(error)) from error

    def _times(self, video: StoredMedium, sampling: FrameSampling, name: str) -> list[float] | None:
        """Expected frame times of a video, or those of its features; an image has none."""
        if isinstance(video, StoredImage):
            return None
        if not isinstance(video, StoredFeatures):
            return probe_video(video, sampling, name)
        video.info.check(self.model, name)
        return video.seconds(sampling)

    def _features(self, stored: StoredFeatures, sampling: FrameSampling) -> FrameFeatures:
        """The features that a sampling takes, as the projector takes them."""
        features = stored.read(sampling)[0]
        shape, expected = list(features.values.shape[1:]), [stored.info.tokens_per_frame, stored.info.channels]
        if shape != expected:
            raise ValueError(f"features of {shape} a frame, their header says {expected}")
        if not features.values.isfinite().all():
            raise ValueError("features that are not finite numbers")
        return features

    def _check_size(self, key: str, conversation: Conversation, num_videos: int) -> None:
        """Refuses what cannot fit, before it is tokenized and its videos are opened."""
        self._check_characters(key, (conversation.system or "", *conversation.questions, *conversation.answers))
        # A video has a frame at least.
        self._check_length(key, num_videos * self.prompts.tokens_per_frame)

    def _check_characters(self, key: str, texts: Sequence[str]) -> None:
        characters, most = sum(map(len, texts)), _MOST_CHARACTERS * self.sequence_length
        if characters > most:
            raise BadSampleError(
                "too_long",
                key,
                f"{characters} characters; {_MOST_CHARACTERS} times data.sequence_length={self.sequence_length} is the "
                "most",
            )

    def _check_length(self, key: str, length: int) -> None:
        if length > self.sequence_length:
            raise BadSampleError(
                "too_long", key, f"{length} tokens; data.sequence_length={self.sequence_length} is the most"
            )
