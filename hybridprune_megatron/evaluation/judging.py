"""What a model makes of questions at several budgets: loss, exact answers, the likeliest choice, what it writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import batched
from statistics import fmean
from typing import Any

import numpy as np

from hybridprune_megatron.config.schema import Config
from hybridprune_megatron.evaluation.accuracy import Retention
from hybridprune_megatron.evaluation.answering import AnsweringModel, Prefilled
from hybridprune_megatron.evaluation.asked import About, Asked
from hybridprune_megatron.evaluation.intervals import Interval, bootstrap
from hybridprune_megatron.method.reduction import Reduction


@dataclass(frozen=True)
class Outcome:
    """What a model made of one question at one budget.

    Attributes:
        about: the question.
        prediction: what greedy decoding writes, without white space around it.
        loss: sum over the tokens of the conversation's answer and its end, nats.
        tokens: how many these are.
        choice: the likeliest of the question's choices; None where it has none.
        shares: share of its visual tokens that entered every layer; None where it shows none.
    """

    about: About
    prediction: str
    loss: float
    tokens: int
    choice: str | None
    shares: tuple[float, ...] | None

    @property
    def correct(self) -> bool:
        """The prediction is the right answer and nothing else."""
        return self.prediction == self.about.answer.strip()

    @property
    def choice_correct(self) -> bool | None:
        """The likeliest choice is the right one; None where there are none."""
        return None if self.choice is None else self.choice == self.about.answer

    def row(self, budget: float) -> dict[str, Any]:
        """A line of predictions.jsonl."""
        row = {
            "key": self.about.key,
            "budget": budget,
            "kind": self.about.kind,
            "question": self.about.question,
            "answer": self.about.answer,
            "prediction": self.prediction,
            "correct": self.correct,
            "loss": self.loss / self.tokens,
        }
        chosen = {"choices": list(self.about.choices), "choice": self.choice, "choice_correct": self.choice_correct}
        return row | chosen if self.about.choices else row


@dataclass(frozen=True)
class Share:
    """A share of right answers.

    Attributes:
        all: of all questions that can be judged.
        by_kind: the same of every kind of question.
        samples: how many questions.
    """

    all: Interval
    by_kind: dict[str, Interval]
    samples: int


@dataclass(frozen=True)
class Figures:
    """What a model made of all questions at one budget.

    Attributes:
        loss: mean over the tokens of the answers, nats.
        exact: exact answers.
        choice: questions whose likeliest choice is right; None where none has choices.
        chance: expected ``choice`` of a guess.
        retention: what was kept, as measured.
        samples: questions.
    """

    loss: Interval
    exact: Share
    choice: Share | None
    chance: float | None
    retention: Retention
    samples: int


def reduction_at(cfg: Config, budget: float | None = None) -> Reduction | None:
    """What the configured reduction does at a budget, as an export of it does: to every sample by itself.

    Args:
        budget: 1 is the model without reduction; None: the configured budget, and all that is configured with it.

    Raises:
        ConfigError: the budget cannot be met.
    """
    if budget == 1:
        return None
    select = replace(cfg.reduction.select, multiple_of=1, local_choice=False)
    settings = replace(cfg.reduction, budget=cfg.reduction.budget if budget is None else budget, select=select)
    return settings.policy(cfg.model.hybrid_pattern)


def judge(
    model: AnsweringModel,
    questions: Iterable[Asked],
    reductions: Mapping[str, Reduction | None],
    tokenizer: Any,
    end: int,
    batch_size: int = 8,
    most_tokens: int = 32,
    progress: Callable[[int], object] | None = None,
) -> dict[str, list[Outcome]]:
    """What a model makes of questions under several reductions, by their names, in the order of the questions.

    Args:
        questions: read as they are needed; only what came of them is kept.
        reductions: what to drop; None: nothing. Frames are encoded once for all of them.
        tokenizer: decodes what is written.
        end: token that ends an answer.
        batch_size: questions that are prefilled together.
        most_tokens: tokens of a prediction, where the answer is not longer.
        progress: gets the number of questions of every batch that is done.
    """
    found: dict[str, list[Outcome]] = {name: [] for name in reductions}
    for asked in batched(questions, batch_size):
        batch, hidden = model.embedded([each.prompt for each in asked])
        for name, reduction in reductions.items():
            prefilled = model.prefilled(batch, hidden, reduction)
            found[name] += _outcomes(model, prefilled, asked, tokenizer, end, most_tokens)
        if progress is not None:
            progress(len(asked))
    return found


def _outcomes(
    model: AnsweringModel, prompts: Prefilled, asked: Sequence[Asked], tokenizer: Any, end: int, most_tokens: int
) -> Iterator[Outcome]:
    said = model.likelihoods(prompts, [each.said for each in asked])
    chosen = model.likeliest(prompts, [each.choices for each in asked])
    # What greedy decoding writes is known where it is what the conversation says.
    others = [row for row, each in enumerate(said) if not each.exact]
    written = {row: list(asked[row].said[:-1]) for row in range(len(asked))}
    if others:
        most = max(most_tokens, *(len(asked[row].said) for row in others))
        written |= zip(others, model.written(prompts.rows(others), end, most))
    shares = iter(prompts.shares)
    for row, each in enumerate(asked):
        choice = chosen[row]
        yield Outcome(
            about=each.about,
            prediction=tokenizer.decode(written[row], skip_special_tokens=True).strip(),
            loss=said[row].loss,
            tokens=said[row].tokens,
            choice=None if choice is None else each.about.choices[choice],
            shares=next(shares) if each.prompt.layout.num_visual else None,
        )


def figures(outcomes: Sequence[Outcome]) -> Figures:
    """The figures of one budget, with bootstrap intervals over the samples.

    Args:
        outcomes: at least one.
    """
    with_choices = [each for each in outcomes if each.choice is not None]
    losses, tokens = (np.array([getattr(each, name) for each in outcomes], float) for name in ("loss", "tokens"))
    return Figures(
        loss=bootstrap(losses, tokens),
        exact=_share(outcomes, lambda each: each.correct),
        choice=_share(with_choices, lambda each: bool(each.choice_correct)) if with_choices else None,
        chance=fmean(1 / len(each.about.choices) for each in with_choices) if with_choices else None,
        retention=Retention.of([each.shares for each in outcomes if each.shares is not None]),
        samples=len(outcomes),
    )


def _share(outcomes: Sequence[Outcome], right: Callable[[Outcome], bool]) -> Share:
    kinds = sorted({each.about.kind for each in outcomes if each.about.kind is not None})
    marks = np.array([right(each) for each in outcomes], float)
    by_kind = {
        kind: bootstrap(np.array([right(each) for each in outcomes if each.about.kind == kind], float))
        for kind in kinds
    }
    return Share(bootstrap(marks), by_kind, len(outcomes))
