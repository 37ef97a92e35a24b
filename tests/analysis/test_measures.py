"""Measures of one sample and their means, on scores and layouts made by hand."""

from __future__ import annotations

import math

import pytest
import torch

from hybridprune_megatron.analysis.measures import kept_tokens, measure, summarize
from hybridprune_megatron.analysis.observe import Observation
from hybridprune_megatron.analysis.samples import AnalysisSample
from hybridprune_megatron.data.batch import EncodedSample, no_pixels
from hybridprune_megatron.method.layout import SampleLayout, Span, TokenKind, TokenLayout
from hybridprune_megatron.method.plan import select

PATTERN = "M-*M"


def _sample(evidence: tuple[int, ...] | None = (1,), frames: int = 3) -> AnalysisSample:
    """Frames of two tokens with a text before each, and a question."""
    spans = [Span(TokenKind.TEXT, 2)]
    for frame in range(frames):
        spans += [Span(TokenKind.TEXT, 1), Span(TokenKind.FRAME, 2, 0, frame)]
    layout = SampleLayout((*spans, Span(TokenKind.QUESTION, 3)))
    ids = torch.zeros(layout.num_tokens, dtype=torch.int64)
    return AnalysisSample(EncodedSample("a", ids, ids, layout, no_pixels()), "what?", "", evidence, ())


def _reduced(sample: AnalysisSample) -> list[TokenLayout]:
    """Layouts of four layers: all six tokens, then 2 to 5, then 3 and 5."""
    full = TokenLayout.from_samples([sample.prompt.layout])
    half = select(torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 1.0]), full, (4,)).layout
    return [full, half, half, select(torch.tensor([0.0, 1.0, 0.0, 1.0]), half, (2,)).layout]


def test_kept_tokens_are_told_by_where_they_stood():
    kept = kept_tokens(_sample(), _reduced(_sample())).int().tolist()
    assert kept == [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 0, 1]]


def test_measures_and_their_means():
    sample = _sample((2,))
    mamba = torch.tensor([-8.0, 1.0, 2.0, 0.0, 4.0, 1.0])
    scores = {0: mamba, 2: torch.arange(6.0), 3: torch.arange(6.0).flip(0)}
    found = measure(sample, Observation(scores=scores), Observation(entered=_reduced(sample)), top=0.5)
    # |scores| of layer 0 are 8, 4, 2, 1, 1, 0 of 16: one holds a half, 3 hold 80 % (12.8), 5 hold 95 % (15.2).
    assert found.sparsity[0, :3].tolist() == pytest.approx([1 / 6, 3 / 6, 5 / 6])
    assert found.sparsity[0, 4].item() == pytest.approx(1 / 6)
    assert found.sparsity[1, 4].item() == 0.0
    assert found.stability[0, 1, 2].item() == pytest.approx(-1.0)
    # Tops of three: {1 or 5 with 1.0 (the earlier), 2, 4}, {3, 4, 5}, {0, 1, 2}.
    assert found.stability[1].tolist()[0] == pytest.approx([1.0, 1 / 3, 2 / 3])
    assert found.kept.tolist() == [[1, 1, 1], [0, 1, 1], [0, 1, 1], [0, 0.5, 0.5]]
    # 4 and 1, of the frame that is needed, against -8, 1, 2 and 0: four wins; two and a tie.
    assert found.auc.tolist() == pytest.approx([6.5 / 8, 1.0, 0.0])
    assert found.hit.tolist() == [[1, 1], [1, 0.5], [1, 0.5], [0.5, 0.25]]

    short = measure(
        _sample(None, frames=2),
        Observation(scores={layer: torch.zeros(4) for layer in (0, 2, 3)}),
        Observation(entered=[TokenLayout.from_samples([_sample(frames=2).prompt.layout])] * 4),
        top=0.5,
    )
    assert short.hit is None
    assert short.auc.isnan().all()
    assert short.sparsity[:, :4].isnan().all()
    summary = summarize([found, short], PATTERN, 0.5)
    rows = summary["sparsity"]
    assert [(row["layer"], row["type"]) for row in rows] == [(0, "mamba"), (2, "attention"), (3, "mamba")]
    # Scores that are all alike say nothing and do not count.
    assert rows[0]["tokens_that_hold"] == pytest.approx({"0.5": 1 / 6, "0.8": 3 / 6, "0.95": 5 / 6})
    stability = summary["stability"]
    assert stability["layers"] == [0, 2, 3]
    assert stability["spearman"][1][2] == pytest.approx(-1.0)
    assert {name: pair["pairs"] for name, pair in stability["by_type"].items()} == {
        "attention-mamba": 2, "mamba-mamba": 1,
    }  # fmt: skip
    mixed = [stability["spearman"][0][1], stability["spearman"][1][2]]
    assert stability["by_type"]["attention-mamba"]["spearman"] == pytest.approx(sum(mixed) / 2)
    assert [row["distance"] for row in stability["by_distance"]["attention-mamba"]] == [1, 2]
    assert stability["by_distance"]["attention-mamba"][0]["spearman"] == pytest.approx(mixed[1])
    # The second clip has two frames: the third frame is the first clip's alone.
    assert summary["kept"]["by_layer_and_frame"][3] == pytest.approx([0.5, 0.75, 0.5])
    assert summary["kept"]["needed_frames"] == {
        "samples": 1, "inside": [1, 1, 1, 0.5], "outside": [1, 0.5, 0.5, 0.25],
    }  # fmt: skip


def test_evidence_that_is_everywhere_cannot_be_missed():
    sample = _sample(evidence=(0, 1, 2))
    scores = Observation(scores={layer: torch.rand(6) for layer in (0, 2, 3)})
    found = measure(sample, scores, Observation(entered=_reduced(sample)), top=0.5)
    assert found.hit is None
    assert summarize([found], PATTERN, 0.5)["kept"]["needed_frames"] is None
    assert not any(math.isnan(share) for row in found.kept.tolist() for share in row)
