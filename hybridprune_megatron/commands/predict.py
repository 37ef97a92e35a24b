"""Asks a checkpoint or an export about videos, and writes its answers to a JSONL file.

    hybridprune predict checkpoint=runs/demo/hf videos=clips question="What colour is the needle?" out=answers.jsonl
    hybridprune predict checkpoint=runs/demo rows=questions.jsonl videos=clips out=answers.jsonl reduction.budget=0.5

Either every video below a folder is asked one question, or every row of a file its own: rows as hybridprune shards
reads them, e.g. {{"video": "cat.mp4", "question": "What is it?"}}, of whose conversations the last question is asked.
A line of the answers has the row's key, its videos, question, right answer (if the row says it) and the prediction.

Answers are written batch by batch. If the command is killed, the same one resumes where it was: what has an answer is
not asked again. Videos and rows that cannot be used are left out and counted. Keys of its own:

{keys}

Every other key=value changes the configuration; with bare weights (a .safetensors file, a Hugging Face folder that is
no export) they compose it. No code of an export's folder is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hybridprune_megatron.bounds import Count, check_bounds
from hybridprune_megatron.checks import ConfigError, fail
from hybridprune_megatron.config.one_line import one_line_errors
from hybridprune_megatron.config.own_keys import check_paths, checkpoint_or_export, read_command_line
from hybridprune_megatron.engine.quiet import quiet_libraries
from hybridprune_megatron.evaluation.answers_file import AnswersFile, read_answers


@dataclass
class PredictionSettings:
    """The keys of ``hybridprune predict``; the line on each is also what ``--help`` prints.

    Attributes:
        checkpoint: a run (newest checkpoint), a checkpoint, an export, or a .safetensors file with experiment=...
        out: JSONL file of answers; one that the same command began is continued.
        videos: folder of videos; null = the folder of rows.
        question: asked about every video below that folder; it also decides which visual tokens stay.
        rows: JSONL or JSON array of questions, or of conversations, with the paths of their videos.
        batch_size: questions that are asked together.
        max_new_tokens: longest answer.
    """

    checkpoint: str
    out: str
    videos: str | None = None
    question: str | None = None
    rows: str | None = None
    batch_size: Count = 8
    max_new_tokens: Count = 32

    def __post_init__(self) -> None:
        check_bounds("", self)
        check_paths(checkpoint=self.checkpoint, videos=self.videos, rows=self.rows)
        if (self.question is None) == (self.rows is None):
            given = "both are given" if self.rows is not None else "neither is given"
            raise ConfigError(f'question, rows: {given}; give question="..." with videos=<folder>, or rows=<file>')
        if self.rows is None and self.videos is None:
            raise fail("videos", None, "must be set", "give videos=<folder of videos>")
        if self.rows is not None and not Path(self.rows).is_file():
            raise fail("rows", self.rows, "is not a file", "give a JSONL file, or a JSON array")
        if not self.folder.is_dir():
            raise fail("videos", self.videos, "is not a folder", "give the folder that the videos are in")

    @property
    def folder(self) -> Path:
        """Where videos are."""
        if self.videos is not None:
            return Path(self.videos)
        assert self.rows is not None, "neither rows nor videos"
        return Path(self.rows).parent


@one_line_errors("predict")
def main(argv: list[str]) -> None:
    """Reads the command line; a wrong setting ends it with one line and code 2."""
    # Before the slow imports, which take half a minute.
    settings, overrides = read_command_line("predict", __doc__, PredictionSettings, argv)
    source, cfg, is_export = checkpoint_or_export(settings.checkpoint, overrides)
    out, budget = Path(settings.out), cfg.reduction.budget if cfg.drops else 1.0
    how = {"model": str(source), "overrides": " ".join(sorted(overrides)), "budget": budget}
    how["max_new_tokens"] = settings.max_new_tokens
    read_answers(out, how)
    quiet_libraries()
    from tqdm import tqdm

    from hybridprune_megatron.data.left_out import LeftOut
    from hybridprune_megatron.data.sample_encoder import SampleEncoder
    from hybridprune_megatron.evaluation.answering import answering
    from hybridprune_megatron.evaluation.judging import reduction_at
    from hybridprune_megatron.evaluation.predicting import Questions, predict, rows_of_file, rows_of_videos

    if settings.question is not None:
        rows = rows_of_videos(settings.folder, settings.question)
    else:
        assert settings.rows is not None, "neither question nor rows"
        rows = list(rows_of_file(Path(settings.rows)))
    encoder, left_out, reduction = SampleEncoder(cfg), LeftOut(), reduction_at(cfg)
    questions = Questions(settings.folder, encoder, left_out)
    with AnswersFile(out, how) as file, answering(source, cfg, is_export) as model:
        before = len(file.asked)
        with tqdm(total=len(rows), desc="  asked", unit="sample") as bar:
            count = predict(model, iter(rows), questions, reduction, file, how, encoder, settings.batch_size, bar)
    if not count + before:
        first = f"; the first one: {left_out.rows[0]}" if left_out.rows else ""
        raise ValueError(f"no row can be used, {left_out.words('rows')}{first}")
    resumed = f" ({before} of them from before)" if before else ""
    print(f"{out}: {count + before} answers{resumed}, {left_out.words('rows')}", *left_out.first(), sep="\n")
