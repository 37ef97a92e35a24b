"""Weights per head of the score, learned through a soft drop, against equal weights: do they pay?

    python -m studies.needles.learned --out docs/study/learned.json

Weights of the model stay as they are; what is learned is one number per head of every layer that drops. A drop to K
tokens is made soft: with a standardised score z every token gets a gate ``sigmoid((z - theta) / tau)``, theta such that
the gates sum to K. A gate scales the step size dt in Mamba layers (0 skips the token exactly) and is a log-bias on the
key in attention. tau falls until the soft drop is the hard one. Half as many tokens again as the hard drop would keep
stay while learning, so that scores are compared among nearly the tokens that serving compares. The loss is the
divergence (KL) of the answers from those with every token, on training clips; what is reported is the hard drop's on
the study's held-out questions, paired by question.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hybridprune_megatron.config.one_line import one_line_errors
from hybridprune_megatron.method.score_query import QueryScorer

if TYPE_CHECKING:
    from hybridprune_megatron.method.layout import TokenLayout
    from hybridprune_megatron.method.reduction import Reduction

#: Tokens that stay while learning, as a multiple of those that the hard drop keeps.
SPARE = 1.5
LEARNING_RATE = 0.03
#: Temperature of the gates at the first and the last step, in standard deviations of the score.
TEMPERATURES = (0.5, 0.05)


@dataclass(frozen=True)
class WeightedScorer(QueryScorer):
    """The query score whose heads weigh differently.

    Attributes:
        weights: by 0-based layer one number per head; their mean counts as 1.
    """

    name: ClassVar[str] = "weighted"
    weights: dict[int, Tensor] = field(default_factory=dict)

    def values(self, signals: Any, samples: Any, layer: int) -> Iterator[tuple[Tensor | slice, Tensor]]:
        weights = self.weights[layer]
        for place, values in super().values(signals, samples, layer):
            yield place, values.flatten(1) * (weights / weights.mean())

    def native_scores(self, signals: Any, layout: Any, samples: Any) -> Tensor | None:
        return None


@dataclass(frozen=True)
class HeadScorer(QueryScorer):
    """Keeps what every head says: float [V, H] of the layer that scored last."""

    name: ClassVar[str] = "heads"
    last: list[Tensor] = field(default_factory=list)

    def score(self, signals: Any, layout: TokenLayout, layer: int) -> Tensor:
        from hybridprune_megatron.method.signals import scored_samples

        samples = scored_samples(layout, self.rows, self.needs_question)
        empty = signals.empty(layout)
        found: Tensor | None = None
        for place, values in self.values(signals, samples, layer):
            flat = values.flatten(1).float()
            found = empty.new_zeros(len(empty), flat.shape[1]) if found is None else found
            found[place] = flat
        assert found is not None, "every clip shows something"
        self.last[:] = [torch.stack([signals.of_visual(each, layout) for each in found.unbind(1)], 1)]
        return self.last[0].mean(1)


def soft_gates(z: Tensor, before: Tensor, keep: int, temperature: float) -> Tensor:
    """``before * sigmoid((z - theta) / temperature)``, theta such that they sum to ``keep``.

    Gradients pass through theta as well: of the implicit equation, not of the search.

    Args:
        z: float [V] scores.
        before: float [V] gates of earlier drops, of which more than ``keep`` are left.
        keep: tokens that stay.
        temperature: in units of z.
    """
    with torch.no_grad():
        low, high = z.min() - 50 * temperature, z.max() + 50 * temperature
        for _ in range(60):
            middle = (low + high) / 2
            enough = (before * torch.sigmoid((z - middle) / temperature)).sum() > keep
            low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
        theta = (low + high) / 2
        alpha = torch.sigmoid((z - theta) / temperature)
        slope = before * alpha * (1 - alpha)
        total = slope.sum().clamp(min=1e-6)
    moved = (slope * (z - z.detach())).sum() + temperature * (alpha * (before - before.detach())).sum()
    return before * torch.sigmoid((z - theta - moved / total) / temperature)


class _Gates:
    """What the layers read while gates are open: one per token of the packed sequence, or none."""

    def __init__(self) -> None:
        self.tokens: Tensor | None = None

    def steps(self, dt: Tensor) -> Tensor:
        return dt if self.tokens is None else dt * self.tokens.unsqueeze(1)


@contextmanager
def gated(model: Any) -> Iterator[_Gates]:
    """Layers that read gates; put back afterwards."""
    from hybridprune_megatron.models import torch_layers
    from hybridprune_megatron.models.mamba_ops import TorchMambaOps

    gates, plain = _Gates(), torch_layers.packed_attention

    class GatedOps(TorchMambaOps):
        def scan(self, x: Tensor, dt: Tensor, *rest: Any) -> Tensor:
            return super().scan(x, gates.steps(dt), *rest)

    def attention(query: Tensor, key: Tensor, value: Tensor, sample_lengths: Sequence[int]) -> Tensor:
        if gates.tokens is None:
            return plain(query, key, value, sample_lengths)
        (length,) = sample_lengths
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        bias = gates.tokens.clamp(min=1e-9).log().expand(length, length).masked_fill(hidden, float("-inf"))
        q, k, v = (each.transpose(0, 1).unsqueeze(0) for each in (query, key, value))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
        return mixed.squeeze(0).transpose(0, 1).flatten(1)

    mixers = [layer.mixer for layer in model.language_model.decoder.layers if hasattr(layer, "mixer")]
    mixers = [mixer for mixer in mixers if hasattr(mixer, "ops")]
    before = [mixer.ops for mixer in mixers]
    torch_layers.packed_attention = attention
    for mixer in mixers:
        mixer.ops = GatedOps()
    try:
        yield gates
    finally:
        torch_layers.packed_attention = plain
        for mixer, ops in zip(mixers, before, strict=True):
            mixer.ops = ops


def soft_loss(
    model: Any, batch: Any, reduction: Reduction, logs: dict[int, Tensor], gates: _Gates, temperature: float
) -> Tensor:
    """Divergence of one clip's answer under the soft drop from that with every token.

    Args:
        model: in eval mode, its weights without gradients.
        batch: one clip, unpadded.
        reduction: whose retention is made soft.
        logs: by layer the logarithms of its heads' weights.
        gates: read by the model's layers.
        temperature: of the gates.
    """
    from hybridprune_megatron.analysis.damage import answer_logits
    from hybridprune_megatron.data.batch import IGNORE_LABEL
    from hybridprune_megatron.method.smoothing import with_frame

    rows = torch.nonzero(batch.labels != IGNORE_LABEL).flatten()
    gates.tokens = None
    with torch.no_grad():
        model.reduction = None
        reference = answer_logits(model, batch).float().log_softmax(-1)
        hidden, layout = model.embedded(batch)
    decoder, heads = model.language_model.decoder, HeadScorer()
    spare = [1.0 if share == 1 else min(1.0, SPARE * share) for share in reduction.retention]
    dropping = decoder.pass_of(replace(reduction, score=heads, retention=tuple(spare)), layout)
    run, visual = decoder.layer_runner(), sum(layout.original_visual_counts)
    tokens = torch.ones(layout.num_tokens)
    for layer in range(model.config.num_layers):
        scores = layer in logs
        hidden, _ = run(layer, hidden, layout, heads if scores else None)
        if not scores:
            continue
        weights = logs[layer].exp()
        score = heads.last[0] @ (weights / weights.sum())
        score = with_frame(score, layout, reduction.select.frame_share)
        z = (score - score.mean()) / score.std().clamp(min=1e-6)
        keep = max(1, round(reduction.retention[layer + 1] * visual))
        soft = soft_gates(z, tokens[layout.visual_index], keep, temperature)
        tokens = tokens.index_put((layout.visual_index,), soft)
        if dropping.drops_after(layer):
            plan = dropping._plan(layer, score.detach(), layout)
            hidden, tokens, layout = plan.take(hidden), plan.take(tokens.unsqueeze(1)).squeeze(1), plan.layout
        gates.tokens = tokens
    logits = model.language_model.row_logits(decoder.finished(hidden), layout, rows)[0].squeeze(1)
    return (reference.exp() * (reference - logits.float().log_softmax(-1))).sum(-1).mean()


def learn(model: Any, samples: Sequence[Any], reduction: Reduction, steps: int, per_step: int) -> dict[int, Tensor]:
    """By dropping layer the weights of its heads, mean 1."""
    from hybridprune_megatron.data.batch import pack

    layers = [
        layer
        for layer in range(len(reduction.retention) - 1)
        if reduction.retention[layer + 1] < reduction.retention[layer]
    ]
    model.eval().requires_grad_(False)
    heads = HeadScorer()
    batch = pack([samples[0]])
    with torch.no_grad():
        hidden, layout = model.embedded(batch)
        run, logs = model.language_model.decoder.layer_runner(), {}
        for layer in range(model.config.num_layers):
            hidden, _ = run(layer, hidden, layout, heads if layer in layers else None)
            if layer in layers:
                logs[layer] = torch.zeros(heads.last[0].shape[1], requires_grad=True)
    optimizer = torch.optim.Adam(list(logs.values()), lr=LEARNING_RATE, betas=(0.9, 0.95))
    queue, (first, last) = cycle(samples), TEMPERATURES
    progress = tqdm(range(steps), desc="weights of heads", unit="step")
    recent: list[float] = []
    with gated(model) as gates:
        for step in progress:
            temperature = first * (last / first) ** (step / max(1, steps - 1))
            for sample in islice(queue, per_step):
                loss = soft_loss(model, pack([sample]), reduction, logs, gates, temperature)
                # A tenth of the clips carries most of the plain mean: log(1 + KL / 0.01) as the solver's damage.
                (torch.log1p(loss / 0.01) / per_step).backward()
                recent.append(float(loss.detach()))
            optimizer.step()
            optimizer.zero_grad()
            progress.set_postfix(kl=f"{sum(recent[-40:]) / len(recent[-40:]):.3f}")
    return {layer: (each.detach().exp() / each.detach().exp().mean()) for layer, each in logs.items()}


@one_line_errors("learned")
def main(argv: Sequence[str]) -> None:
    """Learns on training clips, measures on held-out questions, writes what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="assets/bench/base.safetensors", help="default %(default)s")
    parser.add_argument("--train", default="runs/bench/features/train", help="default %(default)s")
    parser.add_argument("--data", default="runs/bench/features/validation", help="default %(default)s")
    parser.add_argument("--questions", type=int, default=245, help="default %(default)s")
    parser.add_argument("--clips", type=int, default=320, help="to learn from (default %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="default %(default)s")
    parser.add_argument("--per-step", type=int, default=4, help="clips of a step (default %(default)s)")
    parser.add_argument("--reduction", default="query", help="whose schedule and score (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; replaced if it exists")
    options = parser.parse_args(argv)
    from hybridprune_megatron.engine.quiet import quiet_libraries

    quiet_libraries()
    from hybridprune_megatron.analysis.report import write_json
    from hybridprune_megatron.analysis.samples import SampleReader
    from hybridprune_megatron.config.compose import load_config
    from hybridprune_megatron.engine.load import load_model
    from hybridprune_megatron.evaluation.machine import describe_machine
    from hybridprune_megatron.models.build import build_reduction
    from studies.needles.asked import read_asked
    from studies.needles.intervals import mean_of
    from studies.needles.measure import measure, references

    torch.manual_seed(0)
    cfg = load_config(["experiment=bench", f"data.validation={options.data}", f"reduction={options.reduction}"])
    model, reduction = load_model(Path(options.weights), cfg), build_reduction(cfg)
    assert reduction is not None, "--reduction drops"
    samples = list(islice(SampleReader(cfg, Path(options.train)).first_turns(), options.clips))
    weights = learn(model, samples, reduction, options.steps, options.per_step)
    questions = read_asked(cfg, options.questions)
    every_token = list(references(model, questions))
    right: dict[str, list[float]] = {}
    damages: dict[str, list[float]] = {}
    learned = replace(reduction, score=WeightedScorer(weights=weights))
    for name, each in (("equal weights", reduction), ("learned weights", learned)):
        found = measure(model, questions, each, every_token, control=False)
        right[name], damages[name] = [float(each) for each in found.right], found.kl
    result: dict[str, Any] = {"questions": len(questions), "steps": options.steps, "clips": options.clips}
    for title, table in (("accuracy", right), ("kl", damages)):
        gap = torch.tensor(table["learned weights"]) - torch.tensor(table["equal weights"])
        for name, values in (*table.items(), ("learned minus equal", gap.tolist())):
            mean = mean_of(torch.tensor(values).numpy())
            result[f"{title}, {name}"] = [round(value, 4) for value in (mean.mean, mean.low, mean.high)]
            print(f"{title}, {name}: {mean.mean:.3f} ({mean.low:.3f} to {mean.high:.3f})")
    result["weights"] = {str(layer): [round(float(each), 3) for each in found] for layer, found in weights.items()}
    write_json(options.out, result | {"machine": describe_machine()})


if __name__ == "__main__":
    main(sys.argv[1:])
