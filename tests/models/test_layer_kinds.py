"""A kind of layer that nobody here knows: one that scores is added, and all that reads the table of kinds knows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from hybridprune_megatron.checks import ConfigError
from hybridprune_megatron.cost.parameters import layer_parameters
from hybridprune_megatron.cost.plan import make_plan
from hybridprune_megatron.cost.plot import plot_plan
from hybridprune_megatron.cost.report import plan_lines
from hybridprune_megatron.cost.target import TargetConfig
from hybridprune_megatron.huggingface.fields import Fields, Section
from hybridprune_megatron.huggingface.folder import pattern_of
from hybridprune_megatron.layers.kind import Kept, LayerKind, Linear, ModelSizes, Parameters
from hybridprune_megatron.layers.kinds import KINDS, add_kind
from hybridprune_megatron.layers.operations import Cost, linear
from hybridprune_megatron.method.layout import TokenLayout
from hybridprune_megatron.method.reduction_pass import ReductionPass
from hybridprune_megatron.method.schedule import reducing_layers
from hybridprune_megatron.method.score_query import QueryScorer
from hybridprune_megatron.method.signals import ScoredSample
from hybridprune_megatron.models import specs
from hybridprune_megatron.models.build import build_model
from tests.models.tiny import check_layouts, tiny_batch, tiny_config
from tests.worlds import run_world

PATTERN = "G-M*G-"
SCORE = ["reduction.score=tests.models.test_layer_kinds.Norms"]


class Toy(LayerKind):
    """A linear; megatron-core gives the symbol a place in its stack, and this project nothing."""

    symbol, name, label, colour = "G", "toy", "toy", "#CC79A7"
    huggingface = ("toy_layer",)
    targets = ("toy_linear",)

    def score_sizes(self, model: ModelSizes) -> tuple[int, int, int]:
        return 1, 1, model.hidden_size

    def linears(self, model: ModelSizes) -> list[Linear]:
        return [Linear("toy_linear", model.hidden_size, True)]

    def fp8_widths(self, model: ModelSizes) -> list[tuple[str, int, bool]]:
        return [("model.hidden_size", model.hidden_size + 1, False)]

    def operations(self, model: ModelSizes, lengths: Sequence[int], width: int) -> dict[str, Cost]:
        return {"toy": linear(sum(lengths), model.hidden_size, model.hidden_size, width)}

    def parameters(self, model: ModelSizes) -> Parameters:
        return Parameters(replicated=model.hidden_size**2)

    def activations(self, model: ModelSizes, width: int, fused: bool) -> list[Kept]:
        return [Kept("toy", model.hidden_size, width)]


@dataclass(frozen=True)
class ToyBlock:
    values: Tensor
    place: slice


@dataclass(frozen=True)
class ToySignals:
    """[L, hidden] what the toy layer multiplies."""

    kind: ClassVar[str] = "toy"
    values: Tensor

    def blocks(self, sample: ScoredSample, layer: int) -> Iterator[ToyBlock]:
        del layer
        yield ToyBlock(self.values[sample.visual], sample.place)

    def empty(self, layout: TokenLayout) -> Tensor:
        return self.values.new_zeros(sum(layout.visual_counts))

    def of_visual(self, scores: Tensor, layout: TokenLayout) -> Tensor:
        del layout
        return scores


@dataclass(frozen=True)
class Norms(QueryScorer):
    """The query score of the kinds that it knows, and the norm of a token in a toy layer."""

    name: ClassVar[str] = "tests.models.test_layer_kinds.Norms"

    def can_score(self, kind: str) -> bool:
        return kind == "toy" or super().can_score(kind)

    def values(self, signals: Any, samples: Sequence[ScoredSample], layer: int) -> Iterator[tuple[Any, Tensor]]:
        if signals.kind != "toy":
            yield from super().values(signals, samples, layer)
            return
        for sample in samples:
            for block in signals.blocks(sample, layer):
                yield block.place, block.values.norm(dim=-1)

    def native_scores(self, signals: Any, layout: TokenLayout, samples: Sequence[ScoredSample]) -> Tensor | None:
        return None if signals.kind == "toy" else super().native_scores(signals, layout, samples)


class ToyLayer(nn.Module):
    def __init__(self, config: Any, layer_number: int, **_: Any) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.toy_linear = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, attention_mask: None, packed_seq_params: Any) -> Tensor:
        del attention_mask
        scorer = packed_seq_params.asking
        if scorer is not None:
            packed_seq_params.keep(scorer, ToySignals(hidden_states.detach()[:, 0]), self.layer_number - 1)
        return hidden_states + self.toy_linear(hidden_states)


def register() -> None:
    """All that somebody writes for a kind of layer of their own, besides its classes."""
    add_kind(Toy())
    specs.LAYER_SPECS[Toy.name] = ("gdn_layer", lambda parts: ModuleSpec(module=ToyLayer))


@pytest.fixture
def toy() -> Iterator[None]:
    register()
    yield
    del KINDS[Toy.symbol], specs.LAYER_SPECS[Toy.name]


def _run() -> None:
    from hybridprune_megatron.engine.parallel import init_model_parallel

    register()
    assert reducing_layers(PATTERN, "all") == (0, 2, 3, 4)
    assert reducing_layers(PATTERN, "toy") == (0, 4)
    init_model_parallel(seed=1)
    model = build_model(tiny_config(*SCORE, pattern=PATTERN))
    assert model.reduction is not None
    batch, trace, seen = tiny_batch(3, 5), [], []
    layer = model.language_model.decoder.layers[0]
    layer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["hidden_states"][:, 0]), with_kwargs=True
    )
    with torch.no_grad():
        _, last = model.logits(batch, trace=trace)
    check_layouts(batch, [*trace, last])
    wanted = ReductionPass.of(model.reduction, trace[0]).counts
    assert tuple(layout.visual_counts for layout in trace) == wanted
    assert sum(wanted[1]) < sum(wanted[0])
    # After the first layer those are left whose rows had the largest norms, sample by sample.
    stayed = torch.isin(trace[0].visual_index, trace[1].origin[trace[1].visual_index])
    norms = seen[0][trace[0].visual_index].norm(dim=-1)
    for mine, left in zip(norms.split(list(wanted[0])), stayed.split(list(wanted[0]))):
        assert mine[left].min() > mine[~left].max()
    # And it learns.
    model.train()(batch).sum().backward()
    assert layer.toy_linear.weight.grad.abs().sum() > 0


def test_the_model_runs_drops_and_learns() -> None:
    run_world(1, _run)


def test_settings_costs_and_figures_know_it(toy: None, tmp_path: Path) -> None:
    cfg = tiny_config(*SCORE, "tuning.lora.rank=2", "tuning.lora.targets=[toy_linear]", pattern=PATTERN)
    with pytest.raises(ConfigError, match=r"model.hidden_size=33: must be a multiple of 16"):
        tiny_config(*SCORE, "fp8=tensorwise", "trainer.precision=bf16", "model.spec=te", pattern="G-*G-")
    for overrides, line in (
        ([], "layer 0 is to drop, and reduction.score=query has no formula for toy layers"),
        ([*SCORE, "reduction.layers=tyo"], "did you mean toy"),
    ):
        with pytest.raises(ConfigError, match=line):
            tiny_config(*overrides, pattern=PATTERN)
    assert layer_parameters(cfg.model, Toy.symbol).total == cfg.model.hidden_size**2
    target = TargetConfig(frames=8)
    plan = make_plan(cfg, target)
    assert "2 toy layers" in "\n".join(plan_lines(cfg, target, plan))
    plot_plan(tmp_path / "plan.png", plan.prefill, "toy")
    assert (tmp_path / "plan.png").stat().st_size > 1000


def test_an_import_reads_its_word(toy: None) -> None:
    section = Section(frozenset({"layers_block_type"}), {}, frozenset({"hybrid_override_pattern", "num_hidden_layers"}))
    assert pattern_of(Fields({"layers_block_type": ["toy_layer", "mlp", "attention"]}, section)) == "G-*"


def test_without_it_the_symbol_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"has 'G' \(gated delta net\), which is not supported yet"):
        tiny_config(pattern=PATTERN)
