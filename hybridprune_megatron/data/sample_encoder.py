"""From a stored sample, a conversation and video files, to encoded samples; in two steps, so that packing stays cheap.

A draft knows its tokens but holds the video as it was stored; only what was chosen for a pack is decoded. Frames are
many times larger than the file they come from, and a packing buffer holds many samples.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from hybridprune_megatron.checks import ConfigError
from hybridprune_megatron.config.schema import Config
from hybridprune_megatron.data.batch import EncodedSample, FrameFeatures, join_features, no_pixels
from hybridprune_megatron.data.conversation import Conversation, check_media, media_types, read_conversation
from hybridprune_megatron.data.features import StoredFeatures
from hybridprune_megatron.data.images import image_size, num_tiles, read_image, tile_grid, to_tiles
from hybridprune_megatron.data.prompt import EncodedPrompt, PromptEncoder, Shown
from hybridprune_megatron.data.stored_media import StoredImage, StoredMedium, kinds_of
from hybridprune_megatron.data.tokenizer import load_tokenizer
from hybridprune_megatron.data.video import FrameSampling, decode_video, list_frames
from hybridprune_megatron.method.layout import SampleLayout, TokenKind

#: Why a sample may be left out.
BAD_REASONS = ("malformed", "video", "too_long", "shard")
#: Characters of a text for one token that it becomes at least; more are refused before the tokenizer, which takes
#: seconds for a megabyte, has seen them.
_MOST_CHARACTERS = 16
_MOST_MESSAGE = 500
#: Tiles that an image may be left with.
_TILES = (12, 8, 6, 4, 2, 1)


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
class Detail:
    """How much of its media a sample may show.

    Attributes:
        frames: most frames of a video.
        tiles: most tiles of an image.
    """

    frames: int
    tiles: int


#: What of a medium is shown at a detail.
_Medium = Callable[[Detail], Shown]


@dataclass(frozen=True)
class Fitted:
    """A sample's tokens at the detail that fits.

    Attributes:
        detail: how much of its media it shows.
        shown: what of every medium of the conversation is expected to be shown.
        prompt: the tokens.
    """

    detail: Detail
    shown: list[Shown]
    prompt: EncodedPrompt


@dataclass(frozen=True)
class SampleDraft:
    """A sample whose videos are not decoded yet.

    Attributes:
        key: of the sample it becomes.
        conversation: all of it.
        part: which of the samples of this conversation it is (0 but with ``split_turns``).
        fitted: its tokens, as far as videos and images are what their headers say.
        videos: the video and image files, or stored features of frames.
    """

    key: str
    conversation: Conversation
    part: int
    fitted: Fitted
    videos: tuple[StoredMedium, ...]

    @property
    def layout(self) -> SampleLayout:
        return self.fitted.prompt.layout


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
        self.sequence_length, self.visual_cost, self._counted = data.sequence_length, cfg.visual_cost, cfg.counted
        self.shrinks, self.least_frames = data.too_long == "shrink", data.least_frames
        self.full_detail = Detail(data.most_frames, data.max_tiles)
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
            # With split_turns the last part is the whole conversation; the others are made only if that fits.
            split = self.mode == "split_turns"
            whole = "first_question" if split else self.mode
            media = self._media(key, conversation, videos)
            fitted = self._fit(media, lambda shown: self.prompts.encode_samples(conversation, shown, whole)[0])
            self._check_length(key, self.counted(fitted.prompt.layout))
            prompts = [fitted.prompt]
            if split:
                prompts = self.prompts.encode_samples(conversation, fitted.shown, self.mode)
        return [
            SampleDraft(
                key if len(prompts) == 1 else f"{key}.{part}",
                conversation,
                part,
                replace(fitted, prompt=prompt),
                tuple(videos),
            )
            for part, prompt in enumerate(prompts)
        ]

    def prompt(self, key: str, conversation: Conversation, videos: Sequence[StoredMedium]) -> EncodedSample:
        """A conversation that waits for its last answer, as training shows it; without labels.

        Args:
            conversation: has one more question than answers.

        Raises:
            BadSampleError: as ``draft`` and ``finish`` do.
        """
        with _malformed(key):
            media = self._media(key, conversation, videos)
            fitted = self._fit(media, lambda shown: self.prompts.encode_prompt(conversation, shown, self.mode))
            if videos and not fitted.prompt.layout.count(TokenKind.QUESTION):
                raise ValueError("it shows a video but its question has no text: nothing to score frames with")
        self._check_length(key, self.counted(fitted.prompt.layout))
        return self.finish(SampleDraft(key, conversation, 0, fitted, tuple(videos)))

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
        prompt, detail, shown = draft.fitted.prompt, draft.fitted.detail, list(draft.fitted.shown)
        frames, features = [], []
        try:
            for index in range(prompt.num_videos):
                assert self.sampling is not None, "videos without a sampling are refused by draft()"
                video = draft.videos[index]
                if isinstance(video, StoredFeatures):
                    features.append(self._features(video, self.sampling))
                elif isinstance(video, StoredImage):
                    frames.append(to_tiles(read_image(video.data, f"image {index}"), self.frame_size, detail.tiles))
                    shown[index] = len(frames[-1])
                else:
                    sampling = self.sampling.at_most(detail.frames)
                    decoded = decode_video(video, sampling, self.frame_size, f"video {index}")
                    frames.append(decoded.frames)
                    shown[index] = decoded.seconds
            frame_features = join_features(features)
        except (ValueError, MemoryError) as error:
            raise BadSampleError("video", draft.key, str(error)) from error
        if shown != draft.fitted.shown:
            # The container's index was wrong; what was decoded counts.
            prompt = self._prompts(draft.conversation, shown)[draft.part]
        sample = EncodedSample(
            key=draft.key,
            input_ids=torch.tensor(prompt.input_ids, dtype=torch.int64),
            labels=torch.tensor(prompt.labels, dtype=torch.int64),
            layout=prompt.layout,
            pixel_values=torch.cat(frames) if frames else no_pixels(),
            frame_features=frame_features,
        )
        self._check_length(sample.key, self.counted(sample.layout))
        return sample

    def encode(
        self, key: str, messages: Sequence[dict[str, Any]], videos: Sequence[StoredMedium]
    ) -> list[EncodedSample]:
        """Both steps at once.

        Raises:
            BadSampleError: as ``draft`` and ``finish`` do.
        """
        return [self.finish(draft) for draft in self.draft(key, messages, videos)]

    def counted(self, layout: SampleLayout) -> int:
        """What a sample counts for in ``data.sequence_length``."""
        return self._counted(layout.num_tokens - layout.num_visual, layout.num_visual)

    def _prompts(self, conversation: Conversation, shown: list[Shown]) -> list[EncodedPrompt]:
        """The prompts of a draft's conversation, which waits for its answer or has it."""
        if len(conversation.answers) < len(conversation.questions):
            return [self.prompts.encode_prompt(conversation, shown, self.mode)]
        return self.prompts.encode_samples(conversation, shown, self.mode)

    def _fit(self, media: Sequence[_Medium], encode: Callable[[list[Shown]], EncodedPrompt]) -> Fitted:
        """The most of its media that a sample can show in a sequence, if it may shrink; else all of them.

        As Eagle 2.5 does it (arXiv 2504.15271): frames get what the text and images of one tile leave, tiles what is
        left then. Text is never cut. What does not even fit with the fewest frames is returned so.
        """

        def at(frames: int, tiles: int) -> Fitted:
            detail = Detail(frames, tiles)
            shown = [medium(detail) for medium in media]
            return Fitted(detail, shown, encode(shown))

        def fits(found: Fitted) -> bool:
            return self.counted(found.prompt.layout) <= self.sequence_length

        full = at(self.full_detail.frames, self.full_detail.tiles)
        if not self.shrinks or fits(full):
            return full
        lengths = [len(each) for each in full.shown if not isinstance(each, int)]
        possible = range(self.least_frames, max(lengths, default=self.least_frames) + 1)
        # The first number of frames that is too many; the prompt grows with them.
        too_many = bisect_left(possible, True, key=lambda frames: not fits(at(frames, 1)))
        frames = possible[max(too_many - 1, 0)]
        for tiles in [number for number in _TILES if number <= self.full_detail.tiles]:
            found = at(frames, tiles)
            if fits(found):
                break
        return found

    def _media(self, key: str, conversation: Conversation, videos: Sequence[StoredMedium]) -> list[_Medium]:
        """The media of a conversation that may fit a sequence and shows all of them, by their headers."""
        self._check_size(key, conversation, len(videos))
        check_media(conversation, kinds_of(videos))
        if videos and self.sampling is None:
            raise BadSampleError(
                "malformed", key, f"{len(videos)} videos for a model or setting (data.sampling) without"
            )
        try:
            return [self._medium(video, self.sampling, index) for index, video in enumerate(videos) if self.sampling]
        except ConfigError as error:
            raise MisfitError("video", key, str(error)) from error
        except (ValueError, MemoryError) as error:
            raise BadSampleError("video", key, str(error)) from error

    def _medium(self, medium: StoredMedium, sampling: FrameSampling, index: int) -> _Medium:
        if isinstance(medium, StoredImage):
            size = image_size(medium.data, f"image {index}")
            return lambda detail: num_tiles(tile_grid(*size, self.frame_size, detail.tiles))
        if isinstance(medium, StoredFeatures):
            medium.info.check(self.model, f"video {index}")
            # Those of fewer frames are not stored.
            stored = medium.seconds(sampling)
            return lambda detail: stored
        times = list_frames(medium, f"video {index}")
        return lambda detail: sampling.at_most(detail.frames).taken(times)

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
        self._check_length(key, self._counted(0, num_videos * self.prompts.tokens_per_frame))

    def _check_characters(self, key: str, texts: Sequence[str]) -> None:
        characters, most = sum(map(len, texts)), _MOST_CHARACTERS * self.sequence_length
        if characters > most:
            raise BadSampleError(
                "too_long",
                key,
                f"{characters} characters; {_MOST_CHARACTERS} times data.sequence_length={self.sequence_length} is the "
                "most",
            )

    def _check_length(self, key: str, counted: int) -> None:
        if counted > self.sequence_length:
            each = f" (a visual one counts {self.visual_cost:g})" if self.visual_cost < 1 else ""
            raise BadSampleError(
                "too_long", key, f"{counted} tokens{each}; data.sequence_length={self.sequence_length} is the most"
            )
