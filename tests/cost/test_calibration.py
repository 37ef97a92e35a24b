"""Times predicted from pieces, and the pieces themselves on the small model."""

from __future__ import annotations

import pytest

from hybridprune_megatron.config import load_config
from hybridprune_megatron.cost.calibration import Calibration, calibration_lengths, predict, sample_sizes
from hybridprune_megatron.cost.prefill import Prompt, prefill_cost
from hybridprune_megatron.method.schedule import layer_symbols
from tests.models.tiny import PATTERN, tiny_config
from tests.worlds import run_world

CFG = load_config(["experiment=demo"])


def test_powers_of_the_length_are_met_exactly():
    lengths = (100, 400, 1600)
    laws = {"-": lambda n: 3e-6 * n, "*": lambda n: 2e-9 * n**2, "M": lambda n: 5e-3}
    calibration = Calibration({name: {n: law(n) for n in lengths} for name, law in laws.items()})
    for tokens in (50, 100, 250, 400, 1000, 1600, 5000):
        for name, law in laws.items():
            assert calibration.at(name, tokens) == pytest.approx(law(tokens))
    assert calibration.at("score M", 100) == 0


def test_a_prefill_is_the_sum_of_its_pieces():
    # Every token costs a second in a layer of its kind, ten in a score, a hundred in a drop, a thousand at the end.
    weights = {"M": 1.0, "*": 2.0, "-": 3.0, "score M": 10.0, "score *": 20.0, "drop": 100.0, "ends": 1000.0}
    calibration = Calibration({name: {1: each, 1000: each * 1000} for name, each in weights.items()})
    prompt = Prompt(256, 40, 10)
    prefill = prefill_cost(CFG.model, CFG.reduction, CFG.retention_by_layer, prompt, "fp32")
    predicted = predict(prefill, calibration)
    symbols = layer_symbols(CFG.model.hybrid_pattern)
    assert predicted.full == pytest.approx(296 * (sum(weights[symbol] for symbol in symbols) + 1000))
    reduced = scoring = 0.0
    for layer, symbol in enumerate(symbols):
        tokens = prefill.rows[layer].visual + 40
        reduced += weights[symbol] * tokens
        if layer + 1 < len(symbols) and prefill.rows[layer + 1].visual < prefill.rows[layer].visual:
            scoring += (weights[f"score {symbol}"] + 100) * tokens
    assert predicted.scoring == pytest.approx(scoring)
    assert predicted.reduced == pytest.approx(reduced + scoring + 1000 * (prefill.rows[-1].visual + 40))
    assert predicted.ratio == predicted.full / predicted.reduced


def test_no_piece_is_measured_at_the_length_that_is_predicted():
    for tokens in (100, 2248, 8392, 33000):
        lengths = calibration_lengths(tokens)
        assert tokens not in lengths
        assert min(lengths) < tokens < max(lengths)
        for length in lengths:
            visual, text, question = sample_sizes(length, 200, 30)
            assert visual + text == length
            assert 0 < question <= text


def _pieces(scorer: str) -> tuple[set[str], list[str]]:
    from hybridprune_megatron.engine.parallel import init_model_parallel
    from hybridprune_megatron.evaluation.language_prefill import Prompt, one_sample, time_pieces, time_prefill
    from hybridprune_megatron.models.build import build_model

    init_model_parallel(seed=1)
    cfg = tiny_config(f"reduction={scorer}")
    model = build_model(cfg)
    sample = one_sample(visual=40, text=9, question=4, tokens_per_frame=16)
    assert (sample.num_visual, sample.num_tokens) == (40, 49)
    reduction = cfg.reduction.policy(cfg.model.hybrid_pattern)
    seconds = time_pieces(model, PATTERN, sample, reduction, rounds=2)
    whole = time_prefill(model, Prompt.of(model, sample), {"full": None, "reduced": reduction}, rounds=2)
    assert all(len(each) == 2 and min(each) > 0 for each in whole.values())
    assert model.reduction is not None
    assert min(seconds.values()) > 0
    return set(seconds), list(whole)


def test_every_piece_is_timed():
    (found,) = run_world(1, _pieces, "query")
    assert found == ({"M", "*", "-", "score M", "score *", "drop", "ends"}, ["full", "reduced"])
    # A scorer that ranks by a layer's output asks no mixer; its ranking is part of the drop.
    (found,) = run_world(1, _pieces, "utrc")
    assert found[0] == {"M", "*", "-", "drop", "ends"}
