"""Asks a checkpoint or an export the questions of a data set at several budgets, and says how good its answers are.

    hybridprune evaluate checkpoint=runs/demo
    hybridprune evaluate checkpoint=runs/demo budgets=[1,0.5,0.25] out=runs/demo/evaluation
    hybridprune evaluate checkpoint=runs/demo/hf data=my/validation samples=64 reduction.budget=0.35
    hybridprune evaluate checkpoint=assets/demo/base.safetensors experiment=demo
    hybridprune evaluate checkpoint=runs/demo 'methods=[query,evs,random,query reduction.score=mine.Score]'

Of every conversation the last question is asked. Reported are exact match (what greedy decoding writes is the right
answer), multiple choice (the likeliest of the question's choices is) and the loss of the conversation's own answer,
with bootstrap intervals over the samples. Right is what a sample's meta says under "answer", else what its conversation
says; "choices" and the "kind" of the question are in its meta too, where the data set knows them (hybridprune shards
writes them). Samples that cannot be used are left out and counted. Keys of its own:

{keys}

Every other key=value changes the configuration; with bare weights (a .safetensors file, a Hugging Face folder that is
no export) they compose it. No code of an export's folder is run.

With methods, ways to drop tokens are compared on the same questions, each at every budget: files of conf/reduction/
without their ending, then changes if there are any, a score or a front of your own by its dotted path among them. The
table says how far the first is from each other, question by question. It is the study's first table on your own data;
hybridprune finetune -m reduction=query,evs,random ... is its second, after finetuning under each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hybridprune_megatron.bounds import Count, PositiveShare, check_bounds
from hybridprune_megatron.checks import fail
from hybridprune_megatron.config.features import check_folder
from hybridprune_megatron.config.methods import EVERY_TOKEN, with_method
from hybridprune_megatron.config.one_line import one_line_errors
from hybridprune_megatron.config.outputs import check_output, whole_folder
from hybridprune_megatron.config.own_keys import check_paths, checkpoint_or_export, data_path, read_command_line
from hybridprune_megatron.engine.quiet import quiet_libraries
from hybridprune_megatron.evaluation.report import text_table

if TYPE_CHECKING:
    from hybridprune_megatron.config.schema import Config
    from hybridprune_megatron.evaluation.judging import Outcome

COMMAND = "hybridprune evaluate"
#: The column of the model's own budget.
OWN = "reduced"
#: Of methods, where the model drops nothing.
_DEFAULT_BUDGET = 0.25


@dataclass
class EvaluationSettings:
    """The keys of ``hybridprune evaluate``; the line on each is also what ``--help`` prints.

    Attributes:
        checkpoint: a run (newest checkpoint), a checkpoint, an export, or a .safetensors file with experiment=...
        data: folder or blend (.yaml) of samples with their answers; null = data.validation of the run.
        samples: questions, the first ones of the data set.
        budgets: shares of visual tokens, e.g. [1,0.5,0.25]; null = every token and the model's own budget.
        methods: ways to drop tokens that are compared, e.g. [query,evs,random]; null = the model's own alone.
        out: folder for predictions.jsonl, evaluation.json, table.txt, evaluation.png; null = the table is printed.
        batch_size: questions that are asked together.
        max_new_tokens: longest prediction; it may be as long as the right answer in any case.
    """

    checkpoint: str
    data: str | None = None
    samples: Count = 256
    budgets: list[PositiveShare] | None = None
    methods: list[str] | None = None
    out: str | None = None
    batch_size: Count = 8
    max_new_tokens: Count = 32

    def __post_init__(self) -> None:
        check_bounds("", self)
        check_paths(checkpoint=self.checkpoint, data=self.data)
        if self.budgets is not None and (not self.budgets or len(set(self.budgets)) < len(self.budgets)):
            raise fail("budgets", self.budgets, "must be one or more, each once", "set e.g. budgets=[1,0.5,0.25]")
        if self.methods is not None and (not self.methods or len(set(self.methods)) < len(self.methods)):
            raise fail("methods", self.methods, "must be one or more, each once", "set e.g. methods=[query,evs,random]")


@one_line_errors("evaluate")
def main(argv: list[str]) -> None:
    """Reads the command line; a wrong setting ends it with one line and code 2."""
    # Before the slow imports, which take half a minute.
    settings, overrides = read_command_line("evaluate", __doc__, EvaluationSettings, argv)
    source, cfg, is_export = checkpoint_or_export(settings.checkpoint, overrides)
    if settings.methods is None:
        methods, budgets = {}, columns(cfg, settings.budgets)
    else:
        methods = compared(cfg, settings.methods, settings.budgets, overrides)
        budgets = {name: each.budget for name, each in methods.items()} | {EVERY_TOKEN: 1.0}
    data = data_path(settings.data, cfg.data.validation)
    if data.is_dir():
        check_folder(cfg, f"data={data}", data)
    inputs = [source, data]
    if settings.out is not None:
        check_output(settings.out, COMMAND, inputs)
    quiet_libraries()
    from tqdm import tqdm

    from hybridprune_megatron.data.left_out import LeftOut
    from hybridprune_megatron.data.sample_encoder import SampleEncoder
    from hybridprune_megatron.evaluation.answering import answering
    from hybridprune_megatron.evaluation.asked import read_questions
    from hybridprune_megatron.evaluation.evaluation_page import plot_budgets, table_rows, write_evaluation
    from hybridprune_megatron.evaluation.judging import figures, judge, reduction_at
    from hybridprune_megatron.evaluation.methods_page import method_rows, plot_methods

    if methods:
        reductions = {name: reduction_at(each.cfg) for name, each in methods.items()} | {EVERY_TOKEN: None}
    else:
        reductions = {name: reduction_at(cfg, None if name == OWN else budget) for name, budget in budgets.items()}
    encoder, left_out = SampleEncoder(cfg), LeftOut()
    with answering(source, cfg, is_export) as model, tqdm(desc="  asked", unit="sample", leave=False) as bar:
        questions = read_questions(data, encoder, settings.samples, left_out)
        limits = (settings.batch_size, settings.max_new_tokens)
        outcomes = judge(model, questions, reductions, encoder.tokenizer, encoder.end_id, *limits, bar.update)
    if not any(outcomes.values()):
        first = f"; the first one: {left_out.rows[0]}" if left_out.rows else ""
        raise ValueError(f"data={data}: none of its samples can be used, {left_out.words('samples')}{first}")
    found = {name: figures(each) for name, each in outcomes.items()}
    rows, plot = table_rows(found, budgets), partial(plot_budgets, found=found, budgets=budgets)
    if methods:
        by_method: dict[str, dict[float, list[Outcome]]] = {}
        for name, each in methods.items():
            by_method.setdefault(each.method, {})[each.budget] = outcomes[name]
        rows = method_rows(by_method, outcomes[EVERY_TOKEN])
        plot = partial(plot_methods, found=by_method, every_token=outcomes[EVERY_TOKEN])
    print(text_table(rows))
    if left_out.rows:
        print(left_out.words("samples"), *left_out.first(), sep="\n")
    if settings.out is not None:
        about = {"made_by": COMMAND, "settings": asdict(settings), "model": str(source), "data": str(data)}
        about |= {"left_out": dict(left_out.left_out), "left_out_samples": left_out.rows}
        with whole_folder(settings.out, COMMAND, inputs) as folder:
            write_evaluation(folder, outcomes, found, budgets, about, text_table(rows), plot)
        print(f"{Path(settings.out)}: {', '.join(written_files(budgets))}")


@dataclass(frozen=True)
class Compared:
    """A method at a budget.

    Attributes:
        method: as the user gave it.
        budget: mean share of visual tokens over all layers.
        cfg: the model's configuration under it.
    """

    method: str
    budget: float
    cfg: Config


def compared(
    cfg: Config, methods: Sequence[str], budgets: Sequence[float] | None, overrides: Sequence[str]
) -> dict[str, Compared]:
    """Methods at budgets, by the name of what is evaluated.

    Args:
        cfg: of the model.
        methods: see ``config.methods``.
        budgets: as the user gave them, 1 left out; None: the model's own, or 0.25 where it drops nothing.
        overrides: of the command line.

    Raises:
        ConfigError: a method that there is not, a budget that it cannot meet, or none.
    """
    for override in overrides:
        if override.lstrip("+").startswith("reduction"):
            reason = "stands against methods, each of which is a reduction"
            raise fail(override.partition("=")[0], override.partition("=")[2], reason, "put it after a method's name")
    own = cfg.reduction.budget if cfg.drops else _DEFAULT_BUDGET
    wanted = [own] if budgets is None else [float(budget) for budget in budgets if budget < 1]
    if not wanted:
        raise fail("budgets", list(budgets or ()), "methods drop nothing at 1", "set e.g. budgets=[0.5,0.25]")
    return {
        f"{method} {budget:g}": Compared(method, budget, with_method(cfg, method, budget))
        for method in methods
        for budget in wanted
    }


def columns(cfg: Config, budgets: Sequence[float] | None) -> dict[str, float]:
    """The budgets to evaluate at, by the name of their column.

    Args:
        budgets: as the user gave them; None: every token, and the model's own budget where it drops any.

    Raises:
        ConfigError: one of them cannot be met.
    """
    if budgets is None:
        return {"full": 1.0} | ({OWN: cfg.reduction.budget} if cfg.drops else {})
    for budget in budgets:
        if budget < 1:
            cfg.retention_at(budget)
    return {f"{budget:g}": float(budget) for budget in budgets}


def written_files(budgets: dict[str, float]) -> list[str]:
    """What ``out`` holds; a picture only over several budgets."""
    return ["predictions.jsonl", "evaluation.json", "table.txt", *["evaluation.png"] * (len(budgets) > 1)]
