"""What the processor is shown: files and their URLs, frames in lists, parts of a chat that say more than is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hybridprune_megatron.export.media_arguments import flat_images, flat_videos
from tests.export.conftest import message

FRAMES = np.random.default_rng(0).integers(0, 255, (5, 24, 32, 3), dtype=np.uint8)


def prompt(world, parts: int = 1) -> str:
    chat = message("What?")
    chat[0]["content"] = chat[0]["content"][:1] * parts + chat[0]["content"][1:]
    return world.processor.apply_chat_template(chat, add_generation_prompt=True)


def chat_of(kind: str, **keys) -> list[dict]:
    return [{"role": "user", "content": [{"type": kind, **keys}, {"type": "text", "text": "What?"}]}]


@pytest.mark.parametrize("form", ["file://{}", "file://localhost{}", "file:{}", "FILE://{}"])
def test_a_file_url_is_the_file(world, clips, tmp_path: Path, form: str) -> None:
    named = tmp_path / "a clip #1 100%.mp4"
    named.write_bytes(clips[0].read_bytes())
    wanted = world.processor(text=prompt(world), videos=[str(named)])
    escaped = named.as_uri().removeprefix("file://")
    for path in (escaped, escaped.replace("%23", "#").replace("%20", " ")):
        url = form.format(path)
        found = world.processor(text=prompt(world), videos=url)
        assert torch.equal(found["pixel_values"], wanted["pixel_values"])
        for key in ("video", "path", "url"):
            inputs = world.processor.apply_chat_template(
                chat_of("video", **{key: url}), tokenize=True, return_dict=True
            )
            assert torch.equal(inputs["pixel_values"], wanted["pixel_values"])


def test_images_by_url(world, tmp_path: Path) -> None:
    path = tmp_path / "b c.png"
    Image.fromarray(FRAMES[0]).save(path)
    wanted, found = (
        world.processor.apply_chat_template(chat_of("image", url=source), tokenize=True, return_dict=True)
        for source in (path, path.as_uri())
    )
    assert torch.equal(found["pixel_values"], wanted["pixel_values"])


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("http://host/clip.mp4", "'http://host/clip.mp4' is an address and nothing is fetched; download it"),
        ("HTTPS://host/clip.mp4", "is an address and nothing is fetched"),
        ("s3://bucket/clip.mp4", "is an address and nothing is fetched"),
        ("rtsp://host:554/a", "is an address and nothing is fetched"),
        ("data:video/mp4;base64," + "A" * 9999, "'data:video/mp4;base64,.*: the file itself as text; decode it"),
        ("Data:,x", "the file itself as text"),
        ("file://server/clip.mp4", "a file of the machine 'server': write file:///path/of/it"),
        ("file://clip.mp4", "a file of the machine 'clip.mp4'"),
        ("file:///not/there.mp4", "/not/there.mp4 cannot be (decoded|read)"),
        ("file:///not%00there.mp4", "cannot be"),
        ("file://", "cannot be"),
    ],
)
@pytest.mark.parametrize("kind", ["video", "image"])
def test_other_urls_are_refused_as_what_they_are(world, kind: str, url: str, text: str) -> None:
    for given in ({kind: url}, {"path": url}, {"url": url}):
        with pytest.raises(ValueError, match=text) as error:
            world.processor.apply_chat_template(chat_of(kind, **given), tokenize=True)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 300


def test_a_path_with_a_colon_is_a_path() -> None:
    for path in ("clip:1.mp4", "a/b:c.mp4", "C:\\clip.mp4", "datafile.mp4", Path("http:/x")):
        assert flat_videos(path) == flat_images(path) == [path]


def test_frames_in_a_list_are_one_video(world) -> None:
    wanted = world.processor(text=prompt(world), videos=[FRAMES], video_metadata=[{"fps": 2.0}])
    first_channel = torch.from_numpy(FRAMES).permute(0, 3, 1, 2)
    lists = [list(FRAMES), tuple(FRAMES), list(torch.from_numpy(FRAMES)), list(first_channel)]
    lists.append([Image.fromarray(frame) for frame in FRAMES])
    for frames in lists:
        for videos in (frames, [frames], [[frames]]):
            found = world.processor(text=prompt(world), videos=videos, video_metadata=[{"fps": 2.0}])
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        found = world.processor.apply_chat_template(
            chat_of("video", video=frames), tokenize=True, return_dict=True, video_metadata=[{"fps": 2.0}]
        )
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    both = world.processor(
        text=prompt(world, 2), videos=[list(FRAMES[:3]), list(FRAMES)], video_metadata=[{"fps": 2.0}, {"fps": 2.0}]
    )
    assert both["frames_per_video"].tolist() == [[3, 5]]
    assert len(flat_videos([FRAMES, list(FRAMES), [str(1), [b"2"]]])) == 4


@pytest.mark.parametrize(
    ("frames", "text"),
    [
        ([FRAMES[0], FRAMES[1, :8]], r"frames that differ, uint8 \[24, 32, 3\] and uint8 \[8, 32, 3\]"),
        ([FRAMES[0], FRAMES[1].astype(np.float32)], "frames that differ, float32"),
        ([FRAMES[0], Image.fromarray(FRAMES[1])], r"frames that differ, PIL \[32, 24\] and uint8"),
        ([Image.fromarray(FRAMES[0]), Image.fromarray(FRAMES[1, :8])], r"differ, PIL \[32, 24\] and PIL \[32, 8\]"),
        ([FRAMES[0], torch.from_numpy(FRAMES[1])], "frames that differ, torch.uint8"),
        (list(FRAMES[..., 0]), r"video of uint8 \[5, 24, 32\]: give uint8 RGB"),
        (list(FRAMES.astype(np.float64)), r"video of float64 \[5, 24, 32, 3\]"),
        (list(torch.zeros(2, 3, 8, 8, requires_grad=True)), r"video of float32 \[2, 3, 8, 8\]"),
    ],
)
def test_frames_that_do_not_go_together_are_refused(world, frames: list, text: str) -> None:
    for videos in (frames, [frames]):
        with pytest.raises(ValueError, match=text) as error:
            world.processor(text=prompt(world), videos=videos, video_metadata=[{"fps": 2.0}])
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("tokenize", [True, False])
@pytest.mark.parametrize(
    ("part", "text"),
    [
        ({"type": "video", "path": "a.mp4", "fps": 2}, "video part with 'fps': it may have 'video', 'path', 'url'"),
        ({"type": "video", "video": "a.mp4", "video_start": 1.0}, "video part with 'video_start'"),
        ({"type": "video", "paht": "a.mp4"}, "did you mean 'path'"),
        ({"type": "video", "base64": "AAAA"}, "video part with 'base64'"),
        ({"type": "image", "image": "a.png", "max_pixels": 9}, "image part with 'max_pixels'"),
        ({"type": "image", "video": "a.mp4"}, "image part with 'video'"),
        ({"type": "text", "text": "x", "path": "a.mp4"}, "text part with 'path': it may have 'text'"),
        ({"type": "text", "text": "x", 3: 4}, "text part with 3"),
        ({"type": "video", "path": "a.mp4", "url": "b.mp4"}, "video part with 'path' and 'url': both name its file"),
    ],
)
def test_a_part_that_says_more_than_is_read_is_refused(world, part: dict, text: str, tokenize: bool) -> None:
    chat = [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]
    for given in (chat, [chat, chat]):
        with pytest.raises(ValueError, match=text) as error:
            world.processor.apply_chat_template(given, tokenize=tokenize)
        assert "\n" not in str(error.value)


def test_keys_that_hold_none_say_nothing(world) -> None:
    """A table whose rows are parts of several kinds has all of their keys."""
    empty = {"fps": None, "text": None, "path": None, "image": None}
    content = [{**empty, "type": "video"}, {**empty, "type": "text", "text": "What?"}]
    assert world.processor.apply_chat_template([{"role": "user", "content": content}]) == prompt(world).removesuffix(
        "<SPECIAL_11>Assistant\n"
    )


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ({"type": "video"}, "video part without a file"),
        ({"type": "video", "video": ["a.png", "b.png"]}, "video part with a list of str: give one file, or the frames"),
        ({"type": "video", "video": []}, "video part with a list of nothing"),
        ({"type": "video", "video": FRAMES[0]}, "video part with one image"),
        ({"type": "image", "image": list(FRAMES)}, "image part with a list of ndarray: give one image"),
    ],
)
def test_a_part_names_one_video_or_image(world, part: dict, text: str) -> None:
    chat = [{"role": "user", "content": [part]}]
    with pytest.raises(ValueError, match=text) as error:
        world.processor.apply_chat_template(chat, tokenize=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"tools": [{"name": "search"}]}, "tools=.*leave tools out"),
        ({"continue_final_message": True}, "continue_final_message=True"),
        ({"audio": np.zeros((2, 2))}, "audio=array"),
        ({"tokenize": True, "videos": ["a.mp4"]}, "videos given besides the chat"),
        ({"tokenize": True, "processor_kwargs": {"images": []}}, "images given besides the chat"),
    ],
)
def test_arguments_of_the_template_that_nobody_reads_are_refused(world, clips, given: dict, text: str) -> None:
    chat = chat_of("video", path=str(clips[0]))
    with pytest.raises(ValueError, match=text) as error:
        world.processor.apply_chat_template(chat, **given)
    assert "\n" not in str(error.value)
    same = {"tools": None, "continue_final_message": False, "return_tensors": "pt", "padding": True}
    assert world.processor.apply_chat_template(chat, **same) == world.processor.apply_chat_template(chat)
