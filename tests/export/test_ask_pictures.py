"""``hybridprune ask`` draws what an export kept of a video."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import av
import pytest
import torch

from hybridprune_megatron.analysis.exported import kept_of_export, sampling_of
from hybridprune_megatron.commands.ask import main
from hybridprune_megatron.data.video import decode_video
from tests.export.conftest import row


def test_patches_are_those_that_the_export_says_it_kept(
    world: SimpleNamespace, inputs: dict[str, torch.Tensor]
) -> None:
    for index in range(3):
        single = row(inputs, index)
        reduction = world.hf(**single, output_reduction=True).reduction
        clip = kept_of_export(single, reduction.positions, world.hf.config.hybrid_override_pattern, "Why?")
        assert clip.kept.sum(1).tolist() == [layer for (layer,) in reduction.counts()]
        assert clip.num_frames == len(single["pixel_values"])
        tokens = single["token_kinds"][0].nonzero().flatten()
        for layer, (positions,) in enumerate(reduction.positions):
            places = [(tokens == position).nonzero().item() for position in positions]
            assert clip.kept[layer].nonzero().flatten().tolist() == places


def test_the_sampling_is_the_processors(world: SimpleNamespace, clips: list[Path]) -> None:
    text = world.processor.apply_chat_template([{"role": "user", "content": "<video>\nWhat?"}])
    shown = world.processor(text=text, videos=[str(clips[2])])["pixel_values"]
    ours = decode_video(clips[2], sampling_of(world.processor), world.processor.frame_size)
    assert torch.equal(ours.frames, shown)


def test_a_question_with_pictures(world: SimpleNamespace, clips: list[Path], tmp_path: Path, capsys) -> None:
    asked = ["--model", str(world.folder), "--video", str(clips[2]), "--question", "What?", "--max-new-tokens", "4"]
    main(asked)
    said = capsys.readouterr().out
    main([*asked, "--strip", str(tmp_path / "a" / "kept.png"), "--overlay", str(tmp_path / "kept.mp4")])
    assert capsys.readouterr().out == said
    assert (tmp_path / "a" / "kept.png").read_bytes().startswith(b"\x89PNG")
    with av.open(clips[2]) as source, av.open(tmp_path / "kept.mp4") as overlay:
        times = [[frame.time for frame in container.decode(video=0)] for container in (source, overlay)]
    assert times[1] == pytest.approx(times[0])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--strip", "kept.mp4"], "--strip kept.mp4: must be a file that ends in .png"),
        (["--overlay", "kept"], "--overlay kept: must be a file that ends in .mp4"),
        (["--overlay", "{clip}"], "is the video itself"),
        (["--layers", "1"], "give --strip FILE.png or --overlay FILE.mp4 too"),
        (["--strip", "kept.png", "--layers", "3", "1"], "--layers 3 1: must rise, from 0, and be at most 6"),
        (["--strip", "kept.png", "--layers", "-1"], "--layers -1: must rise"),
        (["--strip", "kept.png", "--layers", *map(str, range(7))], "be at most 6"),
        (["--strip", "kept.png", "--layers", "99"], "--layers 99: the model has"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    world: SimpleNamespace, clips: list[Path], options: list[str], reason: str, capsys
) -> None:
    options = [each.format(clip=clips[0]) for each in options]
    with pytest.raises(SystemExit, match="2"):
        main(["--model", str(world.folder), "--video", str(clips[0]), "--question", "What?", *options])
    error = capsys.readouterr().err.splitlines()[-1]
    assert reason in error
