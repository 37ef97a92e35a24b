"""A retention per layer solved from measured damages, and whether it beats the schedule that was configured."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hybridprune_megatron.analysis.damage import answer_logits, divergence, drop_damages
from hybridprune_megatron.analysis.report import write_json
from hybridprune_megatron.analysis.samples import SampleReader
from hybridprune_megatron.analysis.settings import DAMAGES_FILE, SOLVED_BY, SOLVED_FILE, SolveSettings
from hybridprune_megatron.config.json_text import parse_json, read_json
from hybridprune_megatron.config.schema import Config
from hybridprune_megatron.cost.prefill import layer_operations
from hybridprune_megatron.data.batch import EncodedSample, pack
from hybridprune_megatron.evaluation.forward import device_of, length_multiple, measuring
from hybridprune_megatron.evaluation.machine import describe_machine
from hybridprune_megatron.layers.operations import WIDTH, sum_costs
from hybridprune_megatron.method.reduction import Reduction
from hybridprune_megatron.method.schedule import dropping_layers, layer_symbols
from hybridprune_megatron.method.solver import Solution, least_damage
from hybridprune_megatron.models.video_language_model import VideoLanguageModel

#: Divergence at which the logarithmic damage bends: below it, damage counts as it is.
BEND = 0.01
RESAMPLES = 200

Row = dict[int, list[float]]


@dataclass(frozen=True)
class Check:
    """Mean divergences on clips that nothing was solved from.

    Attributes:
        fixed: under the schedule that was configured.
        solved: under the solved list.
        saving: fixed minus solved, and its 95 % interval (bootstrap over clips).
    """

    fixed: float
    solved: float
    saving: tuple[float, float, float]

    @property
    def sure(self) -> bool:
        """Whether the solved list is better beyond the interval."""
        return self.saving[1] > 0


def solve(
    model: VideoLanguageModel, cfg: Config, settings: SolveSettings, data: Path, facts: dict[str, Any]
) -> dict[str, Any]:
    """Measures damages (resumed from ``damages.jsonl``), solves, checks, and writes ``solved.json``.

    Args:
        model: in one process, with a reduction.
        cfg: of the model.
        data: folder of a data set.
        facts: of weights and data, which earlier rows must share.

    Raises:
        ValueError: nothing is dropped, too few clips, or rows of something else in the folder.
    """
    reduction = model.reduction
    if reduction is None:
        raise ValueError("reduction.budget=1: nothing is dropped, so there is nothing to solve; set e.g. 0.25")
    symbols, out = layer_symbols(cfg.model.hybrid_pattern), Path(settings.out)
    layers = dropping_layers(symbols, cfg.reduction.layers)
    samples = list(islice(SampleReader(cfg, data).first_turns(), settings.clips))
    if len(samples) < settings.clips:
        raise ValueError(f"data={data}: {len(samples)} usable clips; give more, or clips={len(samples)}")
    half = len(samples) // 2
    facts = facts | {"layers": list(layers), "levels": list(settings.levels), "score": cfg.reduction.plain()["score"]}
    rows = _measured(model, reduction, samples[:half], layers, settings, out / DAMAGES_FILE, facts)
    costs, limit = _costs(cfg, settings, samples[:half])
    bend = _logarithmic if settings.damage == "log" else np.asarray
    found = _solved(rows, layers, settings, costs, limit, bend)
    generator = np.random.default_rng(0)
    spread = [
        _solved([rows[i] for i in generator.integers(half, size=half)], layers, settings, costs, limit, bend).retention
        for _ in range(RESAMPLES)
    ]
    check = _checked(model, reduction, found.retention, samples[half:])
    result = {
        "made_by": SOLVED_BY,
        **facts,
        "pattern": symbols,
        "budget": cfg.reduction.budget,
        "speedup": settings.speedup,
        "damage": settings.damage,
        "clips": {"solved_from": half, "checked_on": len(samples) - half},
        "retention": list(found.retention),
        "mean_retention": float(np.mean(found.retention)),
        "spread": np.quantile(spread, [0.05, 0.5, 0.95], axis=0).round(4).tolist(),
        "fixed_retention": list(reduction.retention),
        "predicted_damage": found.damage,
        "table": {str(layer): np.mean([row[layer] for row in rows], 0).round(5).tolist() for layer in layers},
        "check": asdict(check) | {"sure": check.sure},
        "machine": describe_machine(),
    }
    write_json(out / SOLVED_FILE, result)
    return read_json(out / SOLVED_FILE)


def report(result: dict[str, Any]) -> str:
    """What a person reads: the list beside the configured one, its spread, and whether to take it."""
    (low, _, high), symbols = result["spread"], result["pattern"]
    lines = ["layer    solved   5 to 95 % of resampled clips   configured"]
    for layer, share in enumerate(result["retention"]):
        lines.append(
            f"{layer:>3} {symbols[layer]}   {share:7.3f}   {low[layer]:7.3f} to {high[layer]:<7.3f}"
            f"               {result['fixed_retention'][layer]:7.3f}"
        )
    check = result["check"]
    saving, *interval = check["saving"]
    lines += [
        "",
        f"KL on {result['clips']['checked_on']} other clips: configured {check['fixed']:.3f}, solved "
        f"{check['solved']:.3f}; saving {saving:.3f} ({interval[0]:.3f} to {interval[1]:.3f})",
    ]
    if not check["sure"]:
        lines.append("The interval includes 0: keep the configured schedule, or solve from more clips.")
        return "\n".join(lines)
    shares = ", ".join(f"{share:g}" for share in result["retention"])
    return "\n".join(
        [
            *lines,
            f"Take it with: reduction.budget={result['mean_retention']:.4f} "
            f"'reduction.schedule={{name: listed, retention: [{shares}]}}'",
        ]
    )


def _measured(
    model: VideoLanguageModel,
    reduction: Reduction,
    samples: Sequence[EncodedSample],
    layers: Sequence[int],
    settings: SolveSettings,
    path: Path,
    facts: dict[str, Any],
) -> list[Row]:
    """A row per clip, those of an earlier call first."""
    known = _read_rows(path, facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        if path.stat().st_size == 0:
            file.write(json.dumps({"made_by": SOLVED_BY, "facts": facts}) + "\n")
        for sample in tqdm(samples, desc="one drop, everywhere", unit="clip"):
            if sample.key in known:
                continue
            known[sample.key] = drop_damages(model, sample, reduction, layers, settings.levels)
            file.write(json.dumps({"key": sample.key, "damages": known[sample.key]}) + "\n")
            file.flush()
    return [known[sample.key] for sample in samples]


def _read_rows(path: Path, facts: dict[str, Any]) -> dict[str, Row]:
    content = path.read_bytes() if path.is_file() else b""
    if not content:
        return {}
    # A row that a killed call left half-written has no end of line: it goes, and is measured again.
    whole = content[: content.rfind(b"\n") + 1]
    head, *rows = [parse_json(line) for line in whole.splitlines()] or [None]
    if not isinstance(head, dict) or head.get("facts") != json.loads(json.dumps(facts)):
        raise ValueError(f"{path} holds damages of other weights, clips, layers, levels or scores: give another out=")
    os.truncate(path, len(whole))
    return {row["key"]: {int(layer): values for layer, values in row["damages"].items()} for row in rows}


def _logarithmic(damages: Any) -> np.ndarray:
    """``log(1 + KL / 0.01)``: a tenth of the clips carries most of the plain mean."""
    return np.log1p(np.asarray(damages) / BEND)


def _solved(
    rows: Sequence[Row],
    layers: Sequence[int],
    settings: SolveSettings,
    costs: list[list[float]],
    limit: float,
    bend: Callable[[Any], np.ndarray],
) -> Solution:
    mean = {layer: bend([row[layer] for row in rows]).mean(0).tolist() for layer in layers}
    return least_damage(mean, settings.levels, costs, limit)


def _costs(cfg: Config, settings: SolveSettings, samples: Sequence[EncodedSample]) -> tuple[list[list[float]], float]:
    """What every layer costs at every level, and the limit: shares under a budget, operations for a speedup."""
    shares, symbols = (1.0, *settings.levels), layer_symbols(cfg.model.hybrid_pattern)
    if settings.speedup is None:
        return [list(shares) for _ in symbols], cfg.reduction.budget * len(symbols)
    visual = [sample.layout.num_visual for sample in samples]
    text = [sample.layout.num_tokens - sample.layout.num_visual for sample in samples]
    width = WIDTH[cfg.trainer.precision]
    lengths = [round(np.mean(text) + share * np.mean(visual)) for share in shares]
    costs = [
        [float(sum_costs(layer_operations(cfg.model, symbol, [length], width).values()).flops) for length in lengths]
        for symbol in symbols
    ]
    return costs, sum(row[0] for row in costs) / settings.speedup


def _checked(
    model: VideoLanguageModel, reduction: Reduction, retention: tuple[float, ...], samples: Sequence[EncodedSample]
) -> Check:
    candidates = [None, reduction, replace(reduction, retention=retention)]
    found = []
    for sample in tqdm(samples, desc="checking on other clips", unit="clip"):
        batch = pack([sample], length_multiple(model, reduction)).to(device_of(model))
        logits = []
        for candidate in candidates:
            with measuring(model, candidate):
                logits.append(answer_logits(model, batch))
        found.append([divergence(logits[0], each) for each in logits[1:]])
    values = np.asarray(found)
    savings = values[:, 0] - values[:, 1]
    generator = np.random.default_rng(0)
    means = savings[generator.integers(len(savings), size=(10_000, len(savings)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    fixed, solved = values.mean(0)
    return Check(float(fixed), float(solved), (float(savings.mean()), float(low), float(high)))
