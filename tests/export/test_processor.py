"""The processor makes of a conversation what the training data makes of it."""

from __future__ import annotations

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.video_utils import VideoMetadata

from hybridprune_megatron.data.conversation import read_conversation
from hybridprune_megatron.data.prompt import PromptEncoder
from hybridprune_megatron.data.video import FrameSampling, decode_video
from tests.clips import UPRIGHT, encode, quadrants, seen
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


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("system", [False, True])
def test_the_chat_template_of_the_folder_renders_the_same(world, turns: int, system: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world.folder)
    chat = [{"role": "system", "content": "Be brief. "}] if system else []
    for turn in range(turns):
        parts = [{"type": "video"}, {"type": "image"}, {"type": "text", "text": f" What {turn}?\n"}]
        chat += [{"role": "user", "content": parts if turn != 1 else "And?"}, {"role": "assistant", "content": " 7 "}]
    for messages, prompt in ((chat[:-1], True), (chat[:-1], False), (chat, False)):
        settings = {"tokenize": False, "add_generation_prompt": prompt}
        rendered = tokenizer.apply_chat_template(messages, **settings)
        assert rendered == world.processor.apply_chat_template(messages, **settings)


def test_tokenized_in_one_call(world, clips) -> None:
    messages = message("What?")
    messages[0]["content"][0]["path"] = str(clips[0])
    whole = world.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    text = world.processor.apply_chat_template(messages, add_generation_prompt=True)
    parts = world.processor(text=text, videos=clips[0].read_bytes())
    assert set(whole) == set(parts)
    assert all(torch.equal(whole[name], parts[name]) for name in parts)


def test_frames_stand_for_the_file_that_they_were_decoded_from(world, tmp_path) -> None:
    clip = str(tmp_path / "smooth.mp4")
    with av.open(clip, "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for index in range(12):
            grey = (np.add.outer(np.arange(32), np.arange(48)) * 2 + 5 * index).astype(np.uint8)
            picture = np.stack([grey, grey, grey], -1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    with av.open(clip) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    text = world.processor.apply_chat_template(message("What?"), add_generation_prompt=True)
    of_file = world.processor(text=text, videos=[clip])
    metadata = VideoMetadata(total_num_frames=12, fps=5.0)
    pictures = [Image.fromarray(frame) for frame in frames]
    for given in (frames, torch.from_numpy(frames).permute(0, 3, 1, 2), pictures):
        found = world.processor(text=text, videos=[given], video_metadata=[metadata])
        # The same frames at the same times.
        assert torch.equal(found["input_ids"], of_file["input_ids"])
        assert torch.equal(found["pixel_values"], of_file["pixel_values"])
    # Somebody who has chosen frames already says which: every other one, all of which are taken.
    chosen = world.processor(
        text=text, videos=[frames[::2]], video_metadata=[{"fps": 5.0, "frames_indices": range(0, 12, 2)}]
    )
    written = world.processor.tokenizer.decode(chosen["input_ids"][0])
    assert len(chosen["pixel_values"]) == 6
    assert all(f"at {second:.2f} seconds" in written for second in (0, 0.4, 2))
    of_array, of_picture = (
        world.processor(text=text.replace("<video>", "<image>"), images=image) for image in (frames[0], pictures[0])
    )
    assert torch.equal(of_array["pixel_values"], of_picture["pixel_values"])


def test_an_image_is_upright_whichever_way_it_comes(world, tmp_path) -> None:
    text = world.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
        add_generation_prompt=True,
    )
    upright = Image.fromarray(quadrants(24)[-1])
    transpose = Image.Transpose
    for orientation, way, mode in (
        (2, transpose.FLIP_LEFT_RIGHT, "RGBA"),
        (6, transpose.ROTATE_90, "RGB"),
        (8, transpose.ROTATE_270, "P"),
    ):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / "lying.png"
        upright.transpose(way).convert(mode).save(path, exif=exif)
        with Image.open(path) as opened:
            given = [path, str(path), path.read_bytes(), opened]
            if mode != "P":
                given += [upright, np.asarray(upright), torch.tensor(np.asarray(upright))]
            found = [world.processor(text=text, images=[image])["pixel_values"] for image in given]
        assert all(torch.equal(each, found[0]) for each in found[1:])
        assert seen(found[0][0]) == UPRIGHT
    (tmp_path / "film.mp4").write_bytes(encode("mp4", "libx264"))
    with pytest.raises(ValueError, match=r"film\.mp4 cannot be read: not an image that is read: give JPEG, PNG"):
        world.processor(text=text, images=[tmp_path / "film.mp4"])


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


def test_images_and_videos_between_text(world, clips, tmp_path) -> None:
    colours = {"red": (200, 30, 20), "blue": (10, 40, 220)}
    for name, colour in colours.items():
        Image.new("RGB", (40, 24), colour).save(tmp_path / f"{name}.png")
    content = [
        {"type": "image", "path": str(tmp_path / "red.png")},
        {"type": "text", "text": "or "},
        {"type": "video", "path": str(clips[0])},
        {"type": "image", "image": Image.open(tmp_path / "blue.png")},
        {"type": "text", "text": "which?"},
    ]
    chat = [{"role": "user", "content": content}]
    text = world.processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text == "<SPECIAL_11>User\n<image>or <video><image>which?\n<SPECIAL_11>Assistant\n"
    whole = world.processor.apply_chat_template(chat, tokenize=True, return_dict=True)
    files = [(tmp_path / "red.png").read_bytes(), str(tmp_path / "blue.png")]
    parts = world.processor(text=text, images=files, videos=[str(clips[0])])
    assert all(torch.equal(whole[name], parts[name]) for name in parts)
    assert parts["frames_per_video"].tolist() == [[1, 5, 1]]
    for frame, colour in ((0, "red"), (6, "blue")):
        shown = parts["pixel_values"][frame].float().mean((1, 2))
        assert (shown - torch.tensor(colours[colour])).abs().max() < 3
    # Four tokens a frame; an image has no frame's text.
    written = world.processor.tokenizer.decode(parts["input_ids"][0])
    image = "<img>" + 4 * "<image>" + "</img>"
    assert written.startswith(f"<SPECIAL_11>User\n{image}\nor Frame 1 sampled at 0.00 seconds: {image}\n")
    assert written.endswith(f"seconds: {image}\n{image}\nwhich?\n<SPECIAL_11>Assistant\n")
    with torch.no_grad():
        out = world.hf(**parts, output_reduction=True)
    assert out.reduction.visual_counts == (28,)
    assert out.logits[0, -1].isfinite().all()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"images": ["a.png"], "videos": ["b.mp4"]}, "0 <image> in the text and 1 given"),
        ({"audios": ["a.wav"]}, "audios="),
        ({"videos": []}, "1 <video> in the text and 0 given"),
        ({"videos": [3]}, "video of type int"),
        ({"videos": [np.zeros((2, 8, 8, 3), np.uint8)]}, r"2 frames with fps=None.*video_metadata=\[\{'fps': 2.0\}\]"),
        ({"videos": [np.zeros((2, 8, 8, 3))], "video_metadata": [{"fps": 2}]}, r"video of float64 \[2, 8, 8, 3\]"),
        ({"videos": [np.zeros((0, 8, 8, 3), np.uint8)], "video_metadata": [{"fps": 2}]}, r"uint8 \[0, 8, 8, 3\]"),
        (
            {
                "videos": [np.zeros((2, 8, 8, 3), np.uint8)],
                "video_metadata": [{"fps": 2, "frames_indices": [1, 1]}],
            },
            "2 frames_indices for 2 frames: give one rising index",
        ),
        ({"videos": ["b.mp4"], "video_metadata": []}, "1 videos, 0 in video_metadata"),
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
