"""Answers held-out questions with a checkpoint, nothing dropped and reduced, and prints the shares of exact answers.

    hybridprune evaluate checkpoint=runs/demo
    hybridprune evaluate checkpoint=runs/demo data=my/validation samples=64 reduction.budget=0.35
    hybridprune evaluate checkpoint=assets/demo/base.safetensors experiment=demo

The data set says in each sample's meta which answer is right ("answer"), of which "choices", and the "kind" of the
question. Keys of its own:

{keys}

Every other key=value changes the checkpoint's configuration; with bare weights (a .safetensors file, a Hugging Face
folder) they compose it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hybridprune_megatron.bounds import Count, check_bounds
from hybridprune_megatron.config.one_line import one_line_errors
from hybridprune_megatron.config.own_keys import check_paths, read_checkpoint_command
from hybridprune_megatron.engine.quiet import quiet_libraries
from hybridprune_megatron.evaluation.report import percent, text_table

if TYPE_CHECKING:
    from hybridprune_megatron.evaluation.accuracy import Evaluation


@dataclass
class EvaluationSettings:
    """The keys of ``hybridprune evaluate``; the line on each is also what ``--help`` prints.

    Attributes:
        checkpoint: folder of a run (newest checkpoint), of one checkpoint, or a .safetensors file with experiment=...
        data: folder of a data set with known answers; null = data.validation of the run.
        samples: questions, the first ones of the data set.
    """

    checkpoint: str
    data: str | None = None
    samples: Count = 256

    def __post_init__(self) -> None:
        check_bounds("", self)
        check_paths(checkpoint=self.checkpoint, data=self.data)


@one_line_errors("evaluate")
def main(argv: list[str]) -> None:
    """Reads the command line; a wrong setting ends it with one line and code 2."""
    # Before the slow imports, which take half a minute.
    settings, checkpoint, cfg, data = read_checkpoint_command("evaluate", __doc__, EvaluationSettings, argv)
    cfg = replace(cfg, data=replace(cfg.data, validation=str(data)))
    quiet_libraries()
    from hybridprune_megatron.engine.load import load_model
    from hybridprune_megatron.engine.parallel import shut_down
    from hybridprune_megatron.evaluation.accuracy import evaluate_each
    from hybridprune_megatron.evaluation.held_out import chance, load_questions

    model = load_model(checkpoint, cfg)
    questions = load_questions(cfg, settings.samples)
    reductions = {"full": None} | ({"reduced": model.reduction} if model.reduction is not None else {})
    found = evaluate_each(model, questions, reductions, 2 * cfg.data.sequence_length)
    shut_down()
    print(text_table(table_rows(found, chance(questions), cfg.reduction.budget)))


def table_rows(found: Mapping[str, Evaluation], chance: float, budget: float) -> list[tuple[str, ...]]:
    """Accuracy, the same by kind of question, and what was kept.

    Args:
        found: by column, on the same questions; at least one.
        chance: expected accuracy of a guess.
    """
    first, *_ = found.values()
    rows = [("", *found, "")]
    rows += [
        (
            "accuracy",
            *(percent(each.accuracy) for each in found.values()),
            f"{first.num_samples} held-out questions, chance {percent(chance)}",
        )
    ]
    for kind in first.by_kind:
        rows.append((f"  {kind}", *(percent(each.by_kind[kind]) for each in found.values()), ""))
    kept = (percent(each.retention.mean) for each in found.values())
    return [*rows, ("visual tokens kept", *kept, f"mean over layers; budget {budget:g}")]
