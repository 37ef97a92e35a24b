"""Times the language model with and without reduction, and transformers on the same weights.

    hybridprune benchmark                                   # the twin of the 12B model, on this machine
    hybridprune benchmark --visual-tokens 2048 8192 32768 --no-train
    hybridprune benchmark experiment=nemotron_nano_12b_v2_vl parallel=single trainer.devices=1 \\
        'model.hybrid_pattern="M-M-M-M*-M-M-M-M*-"' --visual-tokens 32768 131072 --no-peer

Prefill from embeddings to the last token's logits, the share of it that scoring takes, decoding over the caches that it
leaves (in the code of an export), and a training step (forward and backward, all weights learning) with the activations
that it keeps. Weights are random. Before anything is timed, logits are compared with transformers', the reduced model
with its own layers run one by one, and decoding with a prefill of one token more; if they differ, nothing is printed.
Writes runs/bench/report.json and prefill.png; --keep NAME adds the report to docs/performance.md, where those of
kernels/bench.py --out docs/performance/NAME.json are shown too.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from statistics import median
from typing import Any

from hybridprune_megatron.checks import fail
from hybridprune_megatron.config import Config, checked_config
from hybridprune_megatron.config.one_line import one_line_errors, whole
from hybridprune_megatron.config.outputs import check_file
from hybridprune_megatron.config.shipped import DOCS

COMMAND, FILES = "recipes/benchmark.py", ("report.json", "prefill.png")
DEFAULT = ["experiment=twin", "reduction.budget=0.25"]
TEXT_TOKENS, QUESTION_TOKENS = 200, 30
CHECKED_TOKENS = 700


@one_line_errors("benchmark")
def main(argv: list[str]) -> None:
    """Measures, prints the ratios, writes the report."""
    parser = argparse.ArgumentParser(
        prog="hybridprune benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--visual-tokens", type=whole(1, 2**27), nargs="+", default=[2048, 8192], help="default: 2048 8192"
    )
    parser.add_argument("--rounds", type=whole(1, 10**6), default=5, help="medians of so many (default 5)")
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    parser.add_argument("--no-decode", action="store_true", help="leave decoding out")
    parser.add_argument("--no-train", action="store_true", help="leave the training step out")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder (default runs/bench)")
    parser.add_argument("--keep", metavar="NAME", help="add the report to docs/performance.md under this name")
    parser.add_argument("--page", action="store_true", help="measure nothing, write docs/performance.md again")
    options, overrides = parser.parse_known_args(argv)
    if options.page:
        renew_page()
        return
    cfg = checked_config(overrides if any("experiment=" in each for each in overrides) else DEFAULT + overrides)
    if options.keep:
        performance_pages().mkdir(parents=True, exist_ok=True)
    for name in FILES:
        check_file(options.out / name, COMMAND, "--out")
    finish(benchmark(cfg, options) | {"settings": settings_of(cfg, options, argv)}, options)


def benchmark(cfg: Config, options: argparse.Namespace) -> dict[str, Any]:
    """All measurements.

    Raises:
        ValueError: a model computes something wrong, or the configuration drops nothing.
    """
    from hybridprune_megatron.engine.launch import Launch
    from hybridprune_megatron.engine.quiet import quiet_libraries

    quiet_libraries()
    from hybridprune_megatron.engine.parallel import init_distributed, init_model_parallel, shut_down

    device = init_distributed(Launch(0, 1, 0, 1))
    init_model_parallel(seed=cfg.trainer.seed)
    from hybridprune_megatron.evaluation.benchmark import time_scoring, time_training
    from hybridprune_megatron.evaluation.decoding import exported_model, time_decoding
    from hybridprune_megatron.evaluation.language_prefill import Prompt, time_prefill
    from hybridprune_megatron.evaluation.machine import describe_machine
    from hybridprune_megatron.export.transformers_model import transformers_peer
    from hybridprune_megatron.models.build import build_model, build_reduction

    reduction = build_reduction(cfg)
    if reduction is None or reduction.front is not None:
        raise fail("reduction.budget", cfg.reduction.budget, "nothing is dropped inside the model", "set it below 1")
    model = build_model(cfg).to(device)
    peer = None if options.no_peer else transformers_peer(model, cfg.model)

    # An export has no FP8, so there is nothing to compare with.
    exported = None if options.no_decode or cfg.fp8.recipe is not None else exported_model(model, cfg)
    difference = _check(cfg, model, peer, exported, reduction)
    rows = []
    for visual in options.visual_tokens:
        prompt = Prompt.of(model, _sample(cfg, visual))
        taken = time_prefill(model, prompt, {"full": None, "reduced": reduction}, options.rounds, peer)
        scoring = median(time_scoring(model, prompt, reduction, options.rounds))
        decoding = time_decoding(exported, peer, prompt, reduction, options.rounds) if exported else {}
        rows.append(_prefill_row(cfg, visual, taken, scoring, decoding))
    train = None
    if not options.no_train:
        # The last and greatest length.
        seconds, kept = time_training(model, prompt, reduction, options.rounds)
        middle = {name: median(each) for name, each in seconds.items()}
        train = {"visual_tokens": visual, "seconds": middle, "rounds": seconds, "activation_bytes": kept}
    shut_down()
    return {
        **_ratios(rows[-1], train),
        "prefill": rows,
        "train": train,
        "largest_difference_from_transformers": difference,
        "device": describe_machine(),
    }


def _check(cfg: Config, model: Any, peer: Any, exported: Any, reduction: Any) -> float | None:
    """Compares all models on a short prompt; the difference from transformers' logits, if it is there.

    Raises:
        ValueError: a model computes something wrong.
    """
    from hybridprune_megatron.evaluation.benchmark import check_peer, check_reduction
    from hybridprune_megatron.evaluation.decoding import check_decoding
    from hybridprune_megatron.evaluation.language_prefill import Prompt

    sample = _sample(cfg, CHECKED_TOKENS)
    prompt = Prompt.of(model, sample)
    difference = check_peer(model, peer, prompt) if peer is not None else None
    check_reduction(model, prompt, reduction)
    if exported is not None:
        for each in (None, reduction):
            check_decoding(model, exported, sample, each)
    return difference


def _sample(cfg: Config, visual: int) -> Any:
    """What every token of a prompt is."""
    from hybridprune_megatron.evaluation.language_prefill import one_sample

    return one_sample(visual, text_tokens(cfg, visual), QUESTION_TOKENS)


def text_tokens(cfg: Config, visual: int) -> int:
    """TEXT_TOKENS, and as many more as FP8 wants a sequence to divide by."""
    return TEXT_TOKENS + -(visual + TEXT_TOKENS) % cfg.length_multiple


def _ratios(prefill: dict[str, Any], train: dict[str, Any] | None) -> dict[str, float | None]:
    """What the report begins with, at the greatest length."""
    decoding = prefill["decode_seconds"]
    found = {
        "prefill_speedup": prefill["speedup"],
        "prefill_limit": prefill["limit"],
        "scoring_share": prefill["scoring_share"],
        "prefill_vs_transformers": prefill["vs_transformers"],
        "decode_speedup": decoding["full"] / decoding["reduced"] if decoding else None,
    }
    if train is None:
        return found | dict.fromkeys(("train_step_speedup", "train_limit", "activation_memory_ratio"))
    seconds, kept = train["seconds"], train["activation_bytes"]
    return found | {
        "train_step_speedup": seconds["full"] / seconds["reduced"],
        # Backward multiplies in proportion.
        "train_limit": prefill["limit"],
        "activation_memory_ratio": kept["reduced"] / kept["full"],
    }


def _prefill_row(
    cfg: Config, visual: int, taken: dict[str, list[float]], scoring: float, decoding: dict[str, list[float]]
) -> dict[str, Any]:
    """One length: medians, ratios, and what counting operations allows."""
    from hybridprune_megatron.cost.prefill import Prompt, prefill_cost

    counted = prefill_cost(
        cfg.model,
        cfg.reduction,
        cfg.retention_by_layer,
        Prompt(visual, text_tokens(cfg, visual), QUESTION_TOKENS),
        cfg.trainer.precision,
    )
    seconds = {name: median(each) for name, each in taken.items()}
    peer = seconds.get("transformers")
    return {
        "visual_tokens": visual,
        "seconds": seconds,
        "rounds": taken,
        "speedup": seconds["full"] / seconds["reduced"],
        "limit": counted.speedup,
        "scoring_seconds": scoring,
        "scoring_share": scoring / seconds["full"],
        "vs_transformers": peer / seconds["full"] if peer else None,
        "decode_seconds": {name: median(each) for name, each in decoding.items()},
    }


def settings_of(cfg: Config, options: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """What was run."""
    import torch

    from hybridprune_megatron.cost.parameters import language_parameters
    from hybridprune_megatron.models.specs import resolve_spec

    return {
        "model": cfg.model.name,
        "pattern": cfg.model.hybrid_pattern,
        "hidden_size": cfg.model.hidden_size,
        "parameters": language_parameters(cfg.model).total,
        "precision": cfg.trainer.precision,
        "spec": resolve_spec(cfg.model.spec),
        "scorer": cfg.reduction.score.name,
        "budget": cfg.reduction.budget,
        "text_tokens": TEXT_TOKENS,
        "question_tokens": QUESTION_TOKENS,
        "seed": cfg.trainer.seed,
        "rounds": options.rounds,
        "threads": torch.get_num_threads(),
        "command": shlex.join(["python", "recipes/benchmark.py", *argv]),
    }


def finish(report: dict[str, Any], options: argparse.Namespace) -> None:
    """Prints the ratios and writes the files."""
    from hybridprune_megatron.evaluation.performance_page import headline, plot_prefill

    text = json.dumps(report, indent=1) + "\n"
    written, drawn = (options.out / name for name in FILES)
    options.out.mkdir(parents=True, exist_ok=True)
    # It names this command in its settings.
    written.write_text(text, encoding="ascii")
    plot_prefill(drawn, report)
    print("\n".join([*headline(report), f"{written}, {drawn}"]))
    if options.keep:
        (performance_pages() / f"{options.keep}.json").write_text(text, encoding="ascii")
        renew_page()


def performance_pages() -> Path:
    """The folder of kept reports.

    Raises:
        ValueError: the package was installed without a checkout.
    """
    if DOCS is None:
        raise ValueError("--keep and --page write docs/performance.md of a checkout, and this is not one; use --out")
    return DOCS / "performance"


def renew_page() -> None:
    """Writes docs/performance.md from the kept reports."""
    from hybridprune_megatron.evaluation.performance_page import write_page

    write_page(performance_pages().with_suffix(".md"), performance_pages())
