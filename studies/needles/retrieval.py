"""Whether any layer knows which needle is asked for: how often its tokens outrank those of other needles.

    python -m studies.needles.retrieval --clips 40

Needs the clips and features of ``studies.needles.crowded``. Nothing is dropped. Every layer that can score ranks the
visual tokens by the default score, by the mean and by the highest of the question's rows, and by the row of the word
that names the needle, its colour; of the last one also head by head. Printed is the share of pairs, a token of what is
asked for and one of another needle, that are ranked right (the area under the ROC curve): 0.5 is chance. The second
number is that against all other tokens, which saliency raises as well.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from hybridprune_megatron.config.compose import load_config
from hybridprune_megatron.config.one_line import one_line_errors, whole
from hybridprune_megatron.config.stored_run import find_checkpoint
from hybridprune_megatron.method.layout import TokenKind, TokenLayout
from hybridprune_megatron.method.scorer import Scorer
from hybridprune_megatron.method.signals import scored_samples
from studies.demo.report import markdown_table
from studies.needles.needles import COLOURS

COLUMNS = ("default", "mean of the rows", "highest row", "row of the colour", "its best head")


@dataclass(frozen=True)
class Recorder(Scorer):
    """Keeps what every question row reads of every visual token, by layer: float [T, V, H]."""

    seen: dict[int, tuple[str, Tensor]] = field(default_factory=dict)

    def score(self, signals: Any, layout: TokenLayout, layer: int) -> Tensor:
        """Of one sample; ranks nothing."""
        (sample,) = scored_samples(layout)
        if signals.kind == "attention":
            q = signals.q[sample.queries].float() * signals.q.shape[-1] ** -0.5
            logits = torch.einsum("tkre,jke->tjkr", q.unflatten(1, (signals.k.shape[1], -1)), signals.k.float())
            later = sample.after(torch.arange(len(signals.k)))
            read = logits.masked_fill(later[:, :, None, None], float("-inf")).softmax(1)[:, sample.visual]
        else:
            B, C = signals.B[sample.visual].float(), signals.C[sample.rows].float()
            steps = signals.dt[sample.visual].float().unflatten(-1, (B.shape[1], -1))
            read = torch.einsum("tgn,jgn->tjg", C, B).unsqueeze(-1) * steps
        self.seen[layer] = (signals.kind, read.flatten(2))
        return torch.zeros(len(sample.visual))


def auc(scores: Tensor, asked: Tensor, others: Tensor) -> float:
    """Share of pairs of an asked and another token that are ranked right; ties count half.

    Args:
        scores: float [V]; higher is more important.
        asked: int64 tokens.
        others: int64 tokens, none of them asked.
    """
    pairs = scores[asked].double().unsqueeze(1) - scores[others].double().unsqueeze(0)
    return float(((pairs > 0).double() + 0.5 * (pairs == 0)).mean())


def candidates(kind: str, read: Tensor, named: Sequence[int]) -> dict[str, Tensor]:
    """float [V] by column; of the heads [V, H].

    Args:
        kind: of the layer.
        read: float [T, V, H].
        named: rows of the word that names what is asked for.
    """
    row = read[list(named)].mean(0)
    if kind == "attention":
        return {
            "default": read.mean((0, 2)),
            "mean of the rows": read.mean((0, 2)),
            "highest row": read.mean(2).amax(0),
            "row of the colour": row.mean(-1),
            "heads": row,
        }
    rows, mean = standardised(read, 1), standardised(read.mean(0), 0)
    return {
        "default": mean.abs().mean(-1),
        "mean of the rows": mean.mean(-1),
        "highest row": rows.abs().mean(2).amax(0),
        "row of the colour": standardised(row, 0).abs().mean(-1),
        "heads": standardised(row, 0),
    }


def standardised(values: Tensor, dim: int) -> Tensor:
    """Distance from the mean in standard deviations."""
    return (values - values.mean(dim, keepdim=True)) / values.std(dim, keepdim=True).clamp_min(1e-9)


@one_line_errors("retrieval")
def main(argv: Sequence[str]) -> None:
    """Reads the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="runs/crowded/features", help="clips (default %(default)s)")
    parser.add_argument("--clips", type=whole(1, 100_000), default=40, help="the first ones (default %(default)s)")
    parser.add_argument("--weights", type=Path, default=Path("assets/bench/base.safetensors"))
    options = parser.parse_args(argv)
    cfg = load_config(["experiment=bench", f"data.validation={options.data}", "reduction=none"])
    from tqdm import tqdm

    from hybridprune_megatron.analysis.observe import observe_full
    from hybridprune_megatron.data.tokenizer import load_tokenizer
    from hybridprune_megatron.engine.load import load_model
    from studies.needles.asked import read_asked

    model = load_model(find_checkpoint(options.weights) if options.weights.is_dir() else options.weights, cfg)
    tokenizer = load_tokenizer(cfg.data.tokenizer)
    texts = [text for colour in COLOURS for text in (colour, f" {colour}")]
    colours = {tokenizer.encode(text, add_special_tokens=False)[-1] for text in texts}
    found: dict[tuple[int, str], list[tuple[float, float]]] = defaultdict(list)
    heads: dict[int, list[list[float]]] = defaultdict(list)
    kinds: dict[int, str] = {}
    for row in tqdm(read_asked(cfg, options.clips), unit="clip"):
        recorder = Recorder()
        observe_full(model, row.sample, recorder)
        rows = [n for n, kind in enumerate(row.sample.layout.kinds()) if kind == TokenKind.QUESTION]
        named = [n for n, place in enumerate(rows) if int(row.sample.input_ids[place]) in colours]
        asked = row.indices(row.meta["evidence"])
        needles = torch.cat([row.indices(needle["tokens"]) for needle in row.meta["needles"]]).unique()
        others, rest = needles[~torch.isin(needles, asked)], torch.arange(row.num_visual)
        rest = rest[~torch.isin(rest, asked)]
        for layer, (kind, read) in recorder.seen.items():
            kinds[layer] = kind
            ranked = candidates(kind, read, named)
            heads[layer].append([auc(head, asked, others) for head in ranked.pop("heads").unbind(-1)])
            for name, scores in ranked.items():
                found[layer, name].append((auc(scores, asked, others), auc(scores, asked, rest)))
    lines: list[tuple[str, ...]] = [("layer", *COLUMNS)]
    for layer, kind in sorted(kinds.items()):
        cells = [" / ".join(f"{fmean(each):.2f}" for each in zip(*found[layer, name])) for name in COLUMNS[:-1]]
        # A head may hold it with either sign.
        means = [fmean(values) for values in zip(*heads[layer])]
        lines.append((f"{layer} {kind}", *cells, f"{max(means, key=lambda value: abs(value - 0.5)):.2f}"))
    print(markdown_table(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
