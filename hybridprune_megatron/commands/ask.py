"""Asks an exported model a question about a video file.

    hybridprune ask --model runs/demo/hf --video clip.mp4 --question "What colour is the needle?"
    hybridprune ask --model runs/demo/hf --video clip.mp4 --question "..." --budget 1   # nothing is dropped
    hybridprune ask --model runs/demo/hf --video clip.mp4 --question "..." --strip kept.png --overlay kept.mp4

Needs only what the export needs: torch, transformers and PyAV; pictures need matplotlib and Pillow too. The model's
folder brings its own code: point it at folders you trust.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

#: Panels of an overlay.
_MOST_LAYERS = 6


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Command line to options."""
    parser = argparse.ArgumentParser(
        prog="hybridprune ask", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder that hybridprune export wrote")
    parser.add_argument("--video", required=True, help="a video file")
    parser.add_argument("--question", required=True, help="the question; it also decides which visual tokens stay")
    parser.add_argument(
        "--budget", type=float, help="mean share of visual tokens over all layers (default: the model's)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest answer (default %(default)s)")
    parser.add_argument("--strip", metavar="PNG", help="writes what was kept: frames across, depth down")
    parser.add_argument("--overlay", metavar="MP4", help="writes the video with what was dropped in grey, by depth")
    parser.add_argument(
        "--layers", type=int, nargs="+", help="layers that pictures show, from 0 (default: some that lost tokens)"
    )
    options = parser.parse_args(argv)
    if not (Path(options.model) / "config.json").is_file():
        parser.error(f"--model {options.model}: is not a folder with a config.json, as hybridprune export writes it")
    if not Path(options.video).is_file():
        parser.error(f"--video {options.video}: is not a file")
    if not options.question.strip():
        parser.error("--question is empty: ask something, it decides which visual tokens stay")
    if not 1 <= options.max_new_tokens <= 2**20:
        parser.error(f"--max-new-tokens {options.max_new_tokens}: from 1 to {2**20}")
    if options.budget is not None and not 0 < options.budget <= 1:
        parser.error(f"--budget {options.budget}: must be above 0 and at most 1 (1: nothing is dropped)")
    _check_pictures(parser, options)
    return options


def _check_pictures(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuses what cannot be drawn, before a model is loaded."""
    for name, ending in (("strip", ".png"), ("overlay", ".mp4")):
        path = getattr(options, name)
        if path is not None and (Path(path).suffix.lower() != ending or Path(path).is_dir()):
            parser.error(f"--{name} {path}: must be a file that ends in {ending}")
        if path is not None and Path(path).exists() and Path(path).samefile(options.video):
            parser.error(f"--{name} {path}: is the video itself; give another file")
    if options.layers is None:
        return
    if not (options.strip or options.overlay):
        parser.error("--layers says what pictures show: give --strip FILE.png or --overlay FILE.mp4 too")
    if sorted(set(options.layers)) != options.layers or options.layers[0] < 0 or len(options.layers) > _MOST_LAYERS:
        shown = " ".join(map(str, options.layers))
        parser.error(f"--layers {shown:.200}: must rise, from 0, and be at most {_MOST_LAYERS}, e.g. --layers 0 3 8")


def answer(options: argparse.Namespace) -> str:
    """What the model says, without special tokens; draws what it kept where that is asked for.

    Raises:
        ValueError: ``--layers`` names one that the model does not have.
    """
    # After the arguments are read: this takes some seconds to import.
    from transformers import AutoModelForCausalLM, AutoProcessor

    changes = {} if options.budget is None else {"reduction": {"budget": options.budget}}
    # First what reads the question and the video: it is quick to say what is wrong with them.
    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": options.question}]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=text, videos=[options.video], return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(options.model, trust_remote_code=True, **changes).eval()
    layers = model.config.num_hidden_layers
    if options.layers and options.layers[-1] >= layers:
        raise ValueError(f"--layers {options.layers[-1]}: the model has {layers}, from 0 to {layers - 1}")
    asked: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "do_sample": False}
    generated = model.generate(**inputs, **asked, output_reduction=True, return_dict_in_generate=True)
    written = generated.sequences[:, inputs["input_ids"].shape[1] :]
    said = str(processor.batch_decode(written, skip_special_tokens=True)[0]).strip()
    if options.strip or options.overlay:
        title = f"{options.question} (the model says: {said})"
        symbols = model.config.hybrid_override_pattern
        _draw(options, title, processor, inputs, symbols, generated.past_key_values.reduction)
    return said


def _draw(options: argparse.Namespace, title: str, processor: Any, inputs: Any, symbols: str, reduction: Any) -> None:
    """Writes the pictures.

    Args:
        title: question and answer.
        processor: of the export.
        inputs: of its model, one sample.
        symbols: of its layers.
        reduction: its ``ReductionStatistics``.
    """
    try:
        from hybridprune_megatron.analysis.exported import kept_of_export, sampling_of
        from hybridprune_megatron.analysis.overlay import write_overlay
        from hybridprune_megatron.analysis.strip import plot_strip
    except ModuleNotFoundError as error:
        raise ValueError(f"pictures need {error.name}: pip install matplotlib pillow") from error
    clip = kept_of_export(inputs, reduction.positions, symbols, title)
    if options.strip:
        plot_strip(Path(options.strip), clip, options.layers)
    if options.overlay:
        write_overlay(Path(options.overlay), Path(options.video), sampling_of(processor), clip, options.layers)


def main(argv: list[str]) -> None:
    """Asks; what is wrong with the video, the question or the model ends it with one line and code 2."""
    options = parse_arguments(argv)
    # As in the package, whose code this program does without: the export's own and its libraries' errors are one line.
    try:
        print(answer(options))
    except (Exception, KeyboardInterrupt) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        print(f"hybridprune ask: {said[:1000]}", file=sys.stderr)
        sys.exit(2)
