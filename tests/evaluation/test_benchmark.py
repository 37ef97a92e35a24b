"""What recipes/benchmark.py measures, on a tiny model; and that it measures nothing where something is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from hybridprune_megatron.evaluation.performance_page import headline, plot_prefill, write_page
from tests.worlds import run_world


def _measured() -> dict:
    from hybridprune_megatron.engine.parallel import init_model_parallel
    from hybridprune_megatron.evaluation import benchmark, decoding
    from hybridprune_megatron.evaluation.language_prefill import Prompt, one_sample, time_prefill
    from hybridprune_megatron.export.transformers_model import transformers_peer
    from hybridprune_megatron.method.reduction_pass import ReductionPass
    from hybridprune_megatron.models.build import build_model, build_reduction
    from tests.models.tiny import tiny_config

    init_model_parallel(seed=1)
    cfg = tiny_config(pattern="M-M*M-*M", budget=0.4)
    model, reduction = build_model(cfg), build_reduction(cfg)
    peer = transformers_peer(model, cfg.model)
    sample = one_sample(120, 20, 6, tokens_per_frame=12)
    prompt = Prompt.of(model, sample)
    difference = benchmark.check_peer(model, peer, prompt)
    benchmark.check_reduction(model, prompt, reduction)
    exported = decoding.exported_model(model, cfg)
    decoded = [decoding.check_decoding(model, exported, sample, each) for each in (None, reduction)]
    tokens = decoding.time_decoding(exported, peer, prompt, reduction, rounds=2)
    prefill = time_prefill(model, prompt, {"full": None, "reduced": reduction}, 2, peer)
    scoring = benchmark.time_scoring(model, prompt, reduction, rounds=2)
    seconds, kept = benchmark.time_training(model, prompt, reduction, rounds=1)
    # Faults: a weight of the peer, and a layer that hears of its place in the stack.
    refused = []
    with torch.no_grad():
        weight = peer.model.layers[0].mixer.dt_bias
        weight.add_(0.5)
        refused.append(_line(benchmark.check_peer, model, peer, prompt))
        weight.sub_(0.5)
        # Weights are shared with the model: replaced, not changed.
        mixer = exported.backbone.layers[0].mixer
        mixer.dt_bias = torch.nn.Parameter(mixer.dt_bias + 0.5)
        refused.append(_line(decoding.check_decoding, model, exported, sample, reduction))
    original = ReductionPass.step
    with patch.object(ReductionPass, "step", lambda *arguments: _shifted(original(*arguments))):
        refused.append(_line(benchmark.check_reduction, model, prompt, reduction))
    return {
        "difference": difference,
        "decoded": decoded,
        "tokens": tokens,
        "prefill": prefill,
        "scoring": scoring,
        "seconds": seconds,
        "kept": kept,
        "refused": refused,
    }


def _shifted(result: tuple) -> tuple:
    hidden, layout = result
    return hidden.roll(1, 0), layout


def _line(check, *arguments) -> str:
    with pytest.raises(ValueError, match="nothing was timed") as error:
        check(*arguments)
    return str(error.value)


def test_measurements_and_refusals() -> None:
    found = run_world(1, _measured)[0]
    assert found["difference"] < 2e-4
    assert {name: len(each) for name, each in found["prefill"].items()} == {"full": 2, "reduced": 2, "transformers": 2}
    assert all(0 < taken < min(found["prefill"]["reduced"]) * 10 for taken in found["scoring"])
    assert found["kept"]["reduced"] < 0.8 * found["kept"]["full"]
    assert set(found["seconds"]) == {"full", "reduced"}
    assert "logits differ from transformers'" in found["refused"][0]
    assert "a decoded token's logits differ from a prefill's" in found["refused"][1]
    assert "differ by" in found["refused"][2]
    assert max(found["decoded"]) < 2e-4
    assert {name: len(each) for name, each in found["tokens"].items()} == {"full": 2, "reduced": 2, "transformers": 2}


def test_the_page_shows_every_report(tmp_path: Path) -> None:
    row = {
        "visual_tokens": 8192,
        "seconds": {"full": 4.0, "reduced": 1.0},
        "speedup": 4.0,
        "limit": 4.79,
        "scoring_share": 0.012,
        "vs_transformers": None,
        "decode_seconds": {"full": 0.002, "reduced": 0.001},
    }
    settings = SimpleNamespace(model="twin", pattern="M-M*", hidden_size=256, parameters=10_000_000, precision="fp32")
    more = {
        "budget": 0.25,
        "scorer": "query",
        "text_tokens": 200,
        "threads": 2,
        "command": "python recipes/benchmark.py",
    }
    report = {
        **{"prefill_speedup": 4.0, "prefill_limit": 4.79, "scoring_share": 0.012, "prefill_vs_transformers": None},
        **{"train_step_speedup": None, "train_limit": None, "activation_memory_ratio": None, "train": None},
        "decode_speedup": 2.0,
        "prefill": [row],
        "settings": vars(settings) | more,
        "device": {"device": "2 cores of a processor", "versions": {"torch": "2.13.0"}},
    }
    (tmp_path / "here.json").write_text(json.dumps(report))
    write_page(tmp_path / "page.md", tmp_path)
    page = (tmp_path / "page.md").read_text()
    assert "| 8,192 | 4.000 | 1.000 | **4.00** | 4.79 | 1.20% | not measured | |" in page
    assert "## here" in page
    assert "| 8,192 | 2.00 | 1.00 | 2.00 | not measured |" in page
    assert "not measured" in headline(report)[2]
    assert "Not measured on a GPU" in page
    rows = [{"name": "speed", "status": "failed", "seconds": 61.2, "said": "a|b", "figures": {"report": report}}]
    gpu = {"device": "NVIDIA H100", "versions": {"torch": "2.13.0"}, "command": "it", "date": "today", "steps": rows}
    (tmp_path / "h100.json").write_text(json.dumps(gpu))
    write_page(tmp_path / "page.md", tmp_path)
    page = (tmp_path / "page.md").read_text()
    assert "Not measured on a GPU" not in page
    assert "## h100\n\nNVIDIA H100; torch 2.13.0. `it`, today\n" in page
    assert "| speed | failed | 61 | a/b |" in page
    assert "## h100: prefill" in page
    plot_prefill(tmp_path / "plot.png", report)
    assert (tmp_path / "plot.png").stat().st_size > 10_000
