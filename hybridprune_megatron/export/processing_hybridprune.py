"""The export's processor: conversations and video files to the tokens and frames that training made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from hybridprune_megatron.data.conversation import (
    END_TOKEN,
    IMAGE_TOKEN,
    MEDIA_PATTERN,
    MEDIA_TOKENS,
    TURN_TOKEN,
    VIDEO_TOKEN,
    parse_chat,
    read_conversation,
    render_chat,
)
from hybridprune_megatron.data.images import read_image, to_tiles
from hybridprune_megatron.data.prompt import DEFAULT_FRAME_TEXT, EncodedPrompt, PromptEncoder, Shown, special_token_id
from hybridprune_megatron.data.video import DecodedVideo, FrameSampling, decode_video, sample_frames
from hybridprune_megatron.export.media_arguments import check_parts, flat_images, flat_videos, named_media
from hybridprune_megatron.method.layout import TokenKind

_ASSISTANT = f"{TURN_TOKEN}Assistant\n"
# Arguments of ``apply_chat_template`` that have nothing to do while it returns text.
_OF_TOKENS = ("padding", "return_tensors", "conversation_mode", "video_metadata")


class HybridPruneProcessor(ProcessorMixin):
    """Renders conversations, samples videos and tokenizes both as in training.

    Args:
        tokens_per_frame: visual tokens of a frame.
        frame_size: side of a frame in pixels.
        sampling: "uniform" or "fps"; "none" for a text-only model.
        num_frames: frames of a video with "uniform".
        fps: frames a second with "fps".
        max_frames: most frames of a video with "fps".
        max_tiles: most tiles of an image, plus a thumbnail.
        frame_text: template before every frame.
        conversation: which question scores visual tokens, as in training.
        chat_template: unused; the format is fixed.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        tokens_per_frame: int = 1,
        frame_size: int = 512,
        sampling: str = "uniform",
        num_frames: int = 16,
        fps: float = 2.0,
        max_frames: int = 128,
        max_tiles: int = 1,
        frame_text: str = DEFAULT_FRAME_TEXT,
        conversation: str = "first_question",
        chat_template: str | None = None,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template)
        self.tokens_per_frame, self.frame_size, self.sampling = tokens_per_frame, frame_size, sampling
        self.num_frames, self.fps, self.max_frames = num_frames, fps, max_frames
        self.max_tiles = max_tiles
        self.frame_text, self.conversation = frame_text, conversation
        tokenizer.padding_side = "left"
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no padding token: set pad_token in tokenizer_config.json")

    @property
    def model_input_names(self) -> list[str]:
        """What ``__call__`` returns."""
        return ["input_ids", "attention_mask", "token_kinds", "frames_per_video", "pixel_values"]

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Renders conversations; ``<video>`` stands for a video, ``<image>`` for an image.

        Args:
            conversation: messages with role and content (text, or parts of type "text", "video" and "image"), or a
                list of conversations. A part that says more than its type and its text or source is refused.
            add_generation_prompt: whether a last user message is followed by the assistant's marker.
            tokenize: False returns text; True also reads what the parts name (under "video" or "image", "path" or
                "url"): a path, a file:// URL, or what ``__call__`` takes for one video or image.
            return_dict: with ``tokenize``: whether to return all inputs instead of ``input_ids``.
            processor_kwargs, kwargs: with ``tokenize``: passed to ``__call__``.

        Raises:
            ValueError: messages, parts or arguments that this format does not have.
        """
        batched = bool(conversation) and not isinstance(conversation[0], dict)
        conversations = list(conversation) if batched else [conversation]
        texts = [render_chat(read_conversation(messages, tuple(MEDIA_TOKENS))) for messages in conversations]
        check_parts(conversations)
        if not add_generation_prompt and not tokenize:
            texts = [text.removesuffix(_ASSISTANT) for text in texts]
        if not tokenize:
            _refuse_other_arguments({name: value for name, value in kwargs.items() if name not in _OF_TOKENS})
            return texts if batched else texts[0]
        named: dict[str, Any] = {f"{kind}s": named_media(conversations, kind) for kind in MEDIA_TOKENS}
        named["text"] = texts
        settings = {**kwargs, **(processor_kwargs or {})}
        if twice := sorted(set(named) & set(settings)):
            raise ValueError(f"{twice[0]} given besides the chat, whose parts name what it shows: leave {twice[0]} out")
        inputs = self(**named, **settings)
        return inputs if return_dict else inputs["input_ids"]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        audios: Any = None,
        padding: bool | str = True,
        return_tensors: str | None = "pt",
        conversation_mode: str | None = None,
        video_metadata: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Tokenizes rendered conversations and decodes their videos.

        Args:
            images: paths, file:// URLs, bytes, PIL images or uint8 [H, W, 3] (RGB, upright), in the order of the
                ``<image>`` placeholders; each becomes one frame per tile.
            text: one or several texts from ``apply_chat_template``.
            videos: paths, file:// URLs, bytes, ``DecodedVideo`` or frames (uint8 [F, H, W, 3] or [F, 3, H, W], RGB,
                upright, or a list of such frames or of PIL images), in the order of the ``<video>`` placeholders of all
                texts; lists of lists are joined.
            audio, audios: must be empty.
            padding: False refuses texts of different lengths; else they are padded on the left.
            return_tensors: only "pt".
            conversation_mode: which questions of a chat score, instead of the trained ``conversation``:
                "first_question", "split_turns" (the last one) or "all_turns".
            video_metadata: one entry a video, read for those given as frames: ``fps``, and ``frames_indices`` if these
                are not all frames of the video. Of them the frames are taken that would be taken of a file.
            kwargs: must be empty, None or False.

        Returns:
            input_ids, attention_mask, token_kinds: int64 [B, L]; if there are videos, pixel_values uint8 [F, 3, S, S]
            and frames_per_video int64 [B, most videos of a text], 0 after a text's last.

        Raises:
            ValueError: inputs this model does not take, unreadable videos, or a text in another format.
        """
        _refuse_other_arguments({"audio": audio, "audios": audios, **kwargs})
        if text is None or return_tensors not in (None, "pt"):
            raise ValueError(f"text={text!r:.20}, return_tensors={return_tensors!r}: give text; only 'pt' is returned")
        texts = [text] if isinstance(text, str) else list(text)
        waiting = self._decoded(texts, videos, images, video_metadata)
        encoder = PromptEncoder(self.tokenizer, self.tokens_per_frame, self.frame_text)
        prompts: list[EncodedPrompt] = []
        frames: list[Tensor] = []
        for each in texts:
            shown: list[Shown] = []
            for token in MEDIA_PATTERN.findall(each):
                medium = next(waiting[token])
                frames.append(medium.frames if isinstance(medium, DecodedVideo) else medium)
                shown.append(medium.seconds if isinstance(medium, DecodedVideo) else len(medium))
            prompts.append(encoder.encode_prompt(parse_chat(each), shown, conversation_mode or self.conversation))
        features = self._pad(prompts, bool(padding))
        if frames:
            features["pixel_values"] = torch.cat(frames)
            per_text = [torch.tensor(prompt.layout.frames_per_video(), dtype=torch.int64) for prompt in prompts]
            features["frames_per_video"] = torch.nn.utils.rnn.pad_sequence(per_text, batch_first=True)
        return BatchFeature(features)

    def next_turn(self, sequences: Tensor, question: str) -> BatchFeature:
        """The inputs of a second question that continues over the caches of the first.

        Args:
            sequences: int64 [1, L] the chat as ``generate`` returned it; an answer that was cut gets its end.
            question: text without a video.

        Returns:
            input_ids and attention_mask, int64 [1, L + new tokens]; ``generate`` takes them with ``past_key_values``.

        Raises:
            ValueError: several chats, or a question that holds a video.
        """
        if len(sequences) != 1:
            raise ValueError(f"{len(sequences)} chats: answers end apart, so each continues by itself; give one row")
        encoder = PromptEncoder(self.tokenizer, self.tokens_per_frame, self.frame_text)
        closed = int(sequences[0, -1]) == special_token_id(self.tokenizer, END_TOKEN)
        new = torch.tensor([encoder.encode_next_turn(question, closed)]).to(sequences)
        input_ids = torch.cat([sequences, new], 1)
        return BatchFeature({"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)})

    def _decoded(
        self, texts: Sequence[str], videos: Any, images: Any, video_metadata: Any
    ) -> dict[str, Iterator[DecodedVideo | Tensor]]:
        """What stands for the placeholders of all texts, decoded one by one as they come.

        Raises:
            ValueError: other numbers of videos or images than placeholders, or of metadata than videos.
        """
        given = {VIDEO_TOKEN: flat_videos(videos), IMAGE_TOKEN: flat_images(images)}
        for token, files in given.items():
            shown = sum(each.count(token) for each in texts)
            if shown != len(files):
                raise ValueError(f"{shown} {token} in the text and {len(files)} given: give one for each, in order")
        metadata = [None] * len(given[VIDEO_TOKEN])
        if video_metadata is not None:
            metadata = [each for part in video_metadata for each in (part if isinstance(part, list) else [part])]
        if len(metadata) != len(given[VIDEO_TOKEN]):
            raise ValueError(f"{len(given[VIDEO_TOKEN])} videos, {len(metadata)} in video_metadata: give one for each")
        return {
            VIDEO_TOKEN: map(self._video, given[VIDEO_TOKEN], metadata),
            IMAGE_TOKEN: map(self._image, given[IMAGE_TOKEN]),
        }

    def _video(self, source: Any, metadata: Any) -> DecodedVideo:
        """Reads a video: a file, or frames that were decoded elsewhere."""
        if isinstance(source, DecodedVideo):
            return source
        self._need_tower("video")
        sampling = FrameSampling(self.sampling, self.num_frames, self.fps, self.max_frames)
        if isinstance(source, str | bytes | Path):
            return decode_video(source, sampling, self.frame_size)
        frames = _frames(source, "video", "a path, the bytes of a file, frames, or a DecodedVideo")
        return sample_frames(frames, _frame_times(len(frames), metadata), sampling, self.frame_size)

    def _image(self, source: Any) -> Tensor:
        """Reads an image: uint8 [T, 3, S, S], its tiles."""
        self._need_tower("image")
        if isinstance(source, str | bytes | Path) or hasattr(source, "getexif"):
            pixels = read_image(source)
        else:
            (pixels,) = _frames(source, "image", "a path, the bytes of a file, a PIL image or one of uint8 [H, W, 3]")
        return to_tiles(pixels, self.frame_size, self.max_tiles)

    def _need_tower(self, kind: str) -> None:
        if self.sampling == "none":
            raise ValueError(f"this model takes text only: leave {kind}s out")

    def _pad(self, prompts: Sequence[EncodedPrompt], padding: bool) -> dict[str, Tensor]:
        lengths = [len(prompt.input_ids) for prompt in prompts]
        if not padding and min(lengths) != max(lengths):
            raise ValueError(f"padding=False with texts of {min(lengths)} to {max(lengths)} tokens: set padding=True")
        columns = max(lengths)
        input_ids = torch.full((len(prompts), columns), self.tokenizer.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        token_kinds = torch.full_like(input_ids, int(TokenKind.TEXT))
        for row, (prompt, length) in enumerate(zip(prompts, lengths)):
            input_ids[row, columns - length :] = torch.tensor(prompt.input_ids)
            attention_mask[row, columns - length :] = 1
            token_kinds[row, columns - length :] = torch.tensor(prompt.layout.kinds())
        return {"input_ids": input_ids, "attention_mask": attention_mask, "token_kinds": token_kinds}


def _frames(source: Any, kind: str, allowed: str) -> Sequence[np.ndarray]:
    """Decoded frames, each uint8 [H, W, 3].

    Raises:
        ValueError: they are none.
    """
    if isinstance(source, list):
        return [
            read_image(frame, f"frame {index}") if hasattr(frame, "getexif") else _frames(frame, "image", allowed)[0]
            for index, frame in enumerate(source)
        ]
    if not isinstance(source, np.ndarray | Tensor):
        raise ValueError(f"{kind} of type {type(source).__name__}: give {allowed}")
    frames = source.detach().cpu().numpy() if isinstance(source, Tensor) else source
    if kind == "image":
        frames = frames[None]
    if frames.ndim == 4 and frames.shape[-1] != 3 and frames.shape[1] == 3:
        frames = frames.transpose(0, 2, 3, 1)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
        raise ValueError(
            f"{kind} of {frames.dtype} {list(source.shape)}: give uint8 RGB, [F, H, W, 3] or [F, 3, H, W], without F "
            "for an image, none of them 0"
        )
    return list(frames)


def _frame_times(count: int, metadata: Any) -> list[float]:
    """Seconds of the frames of a video that is not a file.

    Raises:
        ValueError: they do not follow from its metadata.
    """
    read = metadata.get if isinstance(metadata, Mapping) else lambda key: getattr(metadata, key, None)
    fps, indices = read("fps"), read("frames_indices")
    indices = list(range(count)) if indices is None else [int(index) for index in indices]
    if not isinstance(fps, int | float | np.number) or not 0 < fps < float("inf"):
        raise ValueError(
            f"video of {count} frames with fps={fps!r}: their times are unknown; give video_metadata=[{{'fps': 2.0}}]"
        )
    if len(indices) != count or sorted(set(indices)) != indices:
        raise ValueError(f"{len(indices)} frames_indices for {count} frames: give one rising index for each frame")
    return [index / fps for index in indices]


def _refuse_other_arguments(others: Mapping[str, Any]) -> None:
    """Callers that serve many processors name what they do not want, too: as None, False or an empty list.

    Raises:
        ValueError: one of them asks for something.
    """
    for name, value in others.items():
        if value is not None and value is not False and not (isinstance(value, list | tuple) and not value):
            shown = " ".join(repr(value).split())
            raise ValueError(f"{name}={shown:.60}: this processor takes text, videos, images; leave {name} out")
