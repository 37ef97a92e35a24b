"""Asks an exported model a question about a video file.

    hybridprune ask --model runs/demo/hf --video clip.mp4 --question "What colour is the needle?"
    hybridprune ask --model runs/demo/hf --video clip.mp4 --question "..." --budget 1   # nothing is dropped

Needs only what the export needs: torch, transformers and PyAV. The model's folder brings its own code: point it at
folders you trust.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


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
    return options


def answer(options: argparse.Namespace) -> str:
    """What the model says, without special tokens."""
    # After the arguments are read: this takes some seconds to import.
    from transformers import AutoModelForCausalLM, AutoProcessor

    changes = {} if options.budget is None else {"reduction": {"budget": options.budget}}
    # First what reads the question and the video: it is quick to say what is wrong with them.
    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": options.question}]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=text, videos=[options.video], return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(options.model, trust_remote_code=True, **changes).eval()
    tokens = model.generate(**inputs, max_new_tokens=options.max_new_tokens, do_sample=False)
    written = tokens[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(written, skip_special_tokens=True)[0].strip()


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
