"""An analysis from a loaded model to its report."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from statistics import fmean, median
from typing import Any

from tqdm import tqdm

from hybridprune_megatron.analysis.damage import exposures
from hybridprune_megatron.analysis.measures import clip_row, kept_tokens, measure, summarize
from hybridprune_megatron.analysis.observe import observe, observe_full
from hybridprune_megatron.analysis.probe import collect, evaluate_probes
from hybridprune_megatron.analysis.report import JSON_FILE, finite, write_figures, write_html, write_json
from hybridprune_megatron.analysis.samples import AnalysisSample, SampleReader
from hybridprune_megatron.analysis.settings import FEWEST_PROBED, AnalysisSettings
from hybridprune_megatron.analysis.strip import plot_strip
from hybridprune_megatron.config.schema import Config
from hybridprune_megatron.evaluation.machine import describe_machine
from hybridprune_megatron.layers.kinds import KINDS
from hybridprune_megatron.method.schedule import dropping_layers, layer_symbols
from hybridprune_megatron.models.video_language_model import VideoLanguageModel


def analyze(model: VideoLanguageModel, cfg: Config, settings: AnalysisSettings, data: Path, out: Path) -> Path:
    """Measures, probes, and writes ``analysis.json``, the figures and ``report.html``.

    Args:
        model: in one process, with a reduction.

    Returns:
        The HTML report.

    Raises:
        ValueError: nothing is dropped, or the data set holds too little.
    """
    if model.reduction is None:
        raise ValueError("reduction.budget=1: nothing is dropped, so there is nothing to analyse; set e.g. 0.25")
    if model.reduction.scorer is None:
        raise ValueError(
            f"reduction.score={cfg.reduction.score.name}: it ranks what one drop takes and gives layers no scores to "
            "compare; set e.g. reduction.score=query"
        )
    start = time.perf_counter()
    symbols = layer_symbols(cfg.model.hybrid_pattern)
    scoring = dropping_layers(symbols, "all")
    reader = SampleReader(cfg, data)
    out.mkdir(parents=True, exist_ok=True)
    found, clips, strips, visual = [], [], [], []
    exposed: list[dict[int, float]] = []
    for number, sample in enumerate(_progress(reader.samples(), settings.samples, "scores and kept tokens")):
        full = observe_full(model, sample.prompt, model.reduction.scorer)
        reduced = observe(model, sample.prompt, model.reduction)
        found.append(measure(sample, full, reduced, settings.top))
        clips.append(clip_row(sample, found[-1], symbols))
        visual.append(sample.prompt.layout.num_visual)
        if number < settings.exposure_samples and model.reduction.front is None:
            exposed.append(exposures(model, full, model.reduction, scoring))
        if number < settings.strips:
            strips.append(f"strip_{number}.png")
            plot_strip(out / strips[-1], sample.patches(kept_tokens(sample, reduced.entered), symbols))
    if not found:
        raise ValueError(f"data={data}: no sample there shows a video")
    result: dict[str, Any] = {
        "run": {
            "checkpoint": settings.checkpoint,
            "data": str(data),
            "samples": len(found),
            "visual_tokens_per_sample": sum(visual) / len(visual),
            "layers": symbols,
            "scorer": cfg.reduction.score.name,
            "budget": cfg.reduction.budget,
            "retention_by_layer": list(cfg.retention_by_layer),
        },
        **summarize(found, symbols, settings.top),
        "exposure": _exposure(exposed, symbols),
        "probe": _probe(model, reader, settings, symbols) if settings.probe_samples else None,
        "clips": clips,
        "strips": strips,
    }
    machine = describe_machine()
    result["run"] |= {"date": machine["date"], "device": machine["device"], "torch": machine["versions"]["torch"]}
    result["run"]["seconds"] = round(time.perf_counter() - start, 1)
    result = finite(result)
    write_json(out / JSON_FILE, result)
    write_figures(out, result)
    return write_html(out, result)


def _exposure(found: list[dict[int, float]], symbols: str) -> list[dict[str, Any]] | None:
    """A row per layer, means over clips; None without clips."""
    if not found:
        return None
    return [
        {
            "layer": layer,
            "type": KINDS[symbols[layer]].name,
            "kl": fmean(clip[layer] for clip in found),
            "median": median(clip[layer] for clip in found),
        }
        for layer in found[0]
    ]


def _probe(model: VideoLanguageModel, reader: SampleReader, settings: AnalysisSettings, symbols: str) -> dict[str, Any]:
    wanted = reader.probe_samples(settings.label, settings.question)
    samples = list(_progress(wanted, settings.probe_samples, "reading clips to probe"))
    if len(samples) < FEWEST_PROBED:
        raise ValueError(
            f"data={reader.folder}: {len(samples)} clips that can be probed, {FEWEST_PROBED} are the "
            f"fewest (one needle, a question that does not name its {settings.label}); give more, or probe_samples=0"
        )
    with tqdm(total=len(samples), desc="passes with forced drops", unit="clip") as bar:
        data = collect(model, samples, symbols, settings.label, bar.update)
    return {"label": settings.label, "question": settings.question, **evaluate_probes(data, symbols)}


def _progress(samples: Iterable[AnalysisSample], count: int, words: str) -> Iterator[AnalysisSample]:
    return iter(tqdm(islice(samples, count), total=count, desc=words, unit="clip"))
