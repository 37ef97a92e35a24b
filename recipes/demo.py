"""The main job of ``make demo``: finetune a small hybrid video model under token reduction, and show what came of it.

    python recipes/demo.py [--fresh] [key=value ...]

Makes the data, evaluates the base model, runs ``recipes/finetune.py experiment=demo`` with the given overrides,
evaluates and exports the result, and asks the export about a clip. Everything is written below ``output_dir``,
runs/demo. A killed run resumes where it was when the same command is given again; ``--fresh`` starts over.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridprune_megatron.config import Config, checked_config
from hybridprune_megatron.config.flat import plain_config
from hybridprune_megatron.config.one_line import one_line_errors
from hybridprune_megatron.engine.preemption import STOPPED
from hybridprune_megatron.engine.quiet import quiet_libraries
from hybridprune_megatron.engine.run_lock import hold_folder, release_folder
from hybridprune_megatron.evaluation.report import text_table

ROOT = Path(__file__).resolve().parents[1]
# The studies are not installed.
sys.path.insert(0, str(ROOT))

from studies.demo.report import summary_rows  # noqa: E402
from studies.demo.stages import Stages, differences, write_json  # noqa: E402

if TYPE_CHECKING:
    from hybridprune_megatron.evaluation.held_out import Question
    from hybridprune_megatron.models.video_language_model import VideoLanguageModel

# The demo's data: clips of eight seconds. A training clip is asked all five kinds, a held-out one a single question,
# both balanced over kinds and answers.
TRAIN_SAMPLES = 1000
TRAIN_QUESTIONS = 5
DATA_SEED = 1
CLIP = {"frames": 16, "fps": 2}
# What a run leaves in its folder, and --fresh deletes.
_RESULTS = ("report.json", "plot.png", "clip.mp4")
_LOGS = ("logs", "train_log.jsonl", "validation_log.jsonl")
PRODUCTS = ("data", "stages", "checkpoints", "hf", "inputs.json", *_LOGS, *_RESULTS)
PARITY_SAMPLES = 4
TIMING_SAMPLES = 8
TIMING_ROUNDS = 9


class Demo:
    """One run of the demo.

    Args:
        cfg: of the run.
        overrides: what the user gave, for the subprocesses.
        inputs: what the results depend on (``inputs_of``).
    """

    def __init__(self, cfg: Config, overrides: list[str], inputs: dict[str, Any]) -> None:
        self.cfg = cfg
        self.overrides = ["experiment=demo", *overrides]
        self.out = Path(cfg.output_dir)
        self.stages = Stages(self.out / "stages")
        self.inputs = inputs

    def run(self) -> None:
        """All stages in order."""
        run, settings, out = self.stages.run, self.inputs, self.out
        title = f"data: {TRAIN_SAMPLES} clips and {self.cfg.trainer.eval_samples} held out"
        run("data", title, self.make_data, settings["data"], self.data_folders)
        before = run("before", "base model on held-out clips, full and reduced", self.evaluate_base, settings)
        title = f"finetuning under reduction, {self.cfg.trainer.max_steps} steps"
        run("finetune", title, self.finetune, settings, [out / "train_log.jsonl", out / "checkpoints"])
        after = run("after", "finetuned model on held-out clips, reduced and full", self.evaluate_finetuned, settings)
        run("export", "export to Hugging Face format", self.export, settings, [out / "hf" / "config.json"])
        parity = run("parity", f"export against training model, {PARITY_SAMPLES} clips", self.parity, settings)
        timing = run("timing", "prefill, full and reduced in turn", self.time_prefill, settings)
        asked = run("ask", "the export in a fresh process, asked about a clip", self.ask, settings)
        report = self.report(before, after, parity, timing)
        write_json(out / "report.json", {**report, "question": asked})
        self.show(report, asked)

    # ---- data and questions -----------------------------------------------------------------------------------------

    @property
    def data_folders(self) -> list[Path]:
        """Where the shards are."""
        assert self.cfg.data.train is not None, "data.train"
        assert self.cfg.data.validation is not None, "data.validation"
        return [Path(self.cfg.data.train), Path(self.cfg.data.validation)]

    def make_data(self) -> dict[str, Any]:
        """Writes shards of both splits."""
        train, _ = self.data_folders
        clip = [text for name, value in CLIP.items() for text in (f"--{name}", str(value))]
        for train_samples, held_out, questions in (
            (TRAIN_SAMPLES, 0, TRAIN_QUESTIONS),
            (0, self.cfg.trainer.eval_samples, 1),
        ):
            self.command(
                "scripts/make_demo_data.py",
                *("--out", str(train.parent), "--seed", str(DATA_SEED)),
                *("--train", str(train_samples), "--validation", str(held_out)),
                *("--questions-per-video", str(questions), *clip),
            )
        return {}

    @cached_property
    def questions(self) -> list[Question]:
        """The held-out questions, encoded."""
        from hybridprune_megatron.evaluation.held_out import load_questions

        return load_questions(self.cfg, self.cfg.trainer.eval_samples)

    # ---- models -----------------------------------------------------------------------------------------------------

    def model(self, weights: Path) -> VideoLanguageModel:
        """The training model with the weights of a file or checkpoint."""
        from hybridprune_megatron.engine.load import load_model

        return load_model(weights, self.cfg)

    @cached_property
    def finetuned(self) -> VideoLanguageModel:
        """The model of the last checkpoint."""
        from hybridprune_megatron.config.stored_run import find_checkpoint

        return self.model(find_checkpoint(self.out))

    def evaluate_base(self) -> dict[str, Any]:
        """Accuracy of the weights that finetuning starts from."""
        if self.cfg.model.init_checkpoint is None:
            raise ValueError(
                "model.init_checkpoint=null: the demo compares with the base model; leave it at its default"
            )
        return self.evaluate(self.model(Path(self.cfg.model.init_checkpoint)))

    def evaluate_finetuned(self) -> dict[str, Any]:
        """Accuracy of the last checkpoint."""
        return self.evaluate(self.finetuned)

    def evaluate(self, model: VideoLanguageModel) -> dict[str, Any]:
        """Accuracy and retention, reduced and full."""
        from hybridprune_megatron.evaluation.accuracy import evaluate_each
        from hybridprune_megatron.evaluation.held_out import chance

        questions = self.questions
        result: dict[str, Any] = {"chance": chance(questions)}
        result["visual_tokens"] = [question.sample.layout.num_visual for question in questions]
        reductions = {"full": None, "reduced": model.reduction}
        for name, found in evaluate_each(model, questions, reductions, 2 * self.cfg.data.sequence_length).items():
            result[name] = {"accuracy": found.accuracy, "by_kind": found.by_kind, "retention": asdict(found.retention)}
        return result

    def finetune(self) -> dict[str, Any]:
        """The training run as a user would start it, its progress bar showing."""
        self.command("recipes/finetune.py", *self.overrides)
        return {}

    def export(self) -> dict[str, Any]:
        """The last checkpoint as a Hugging Face folder."""
        from hybridprune_megatron.export.write import export_model

        folder = export_model(self.finetuned, self.cfg, self.out / "hf")
        return {"bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())}

    def parity(self) -> dict[str, Any]:
        """The export against the training model, loaded as a user would load it."""
        from transformers import AutoModelForCausalLM

        from hybridprune_megatron.evaluation.forward import device_of
        from studies.demo.parity import max_logit_difference

        exported = AutoModelForCausalLM.from_pretrained(self.out / "hf", trust_remote_code=True).eval()
        exported.to(device_of(self.finetuned))
        samples = [question.sample for question in self.questions[:PARITY_SAMPLES]]
        return {"max_abs_logit_diff": max_logit_difference(self.finetuned, exported, samples)}

    def time_prefill(self) -> dict[str, Any]:
        """Prefill seconds of one packed batch."""
        from hybridprune_megatron.data.batch import pack
        from hybridprune_megatron.evaluation.forward import length_multiple
        from studies.demo.prefill import time_prefill

        model = self.finetuned
        samples = [question.sample for question in self.questions[:TIMING_SAMPLES]]
        batch = pack(samples, length_multiple(model, model.reduction))
        reductions = {"full": None, "reduced": model.reduction}
        return asdict(time_prefill(model, batch, reductions, TIMING_ROUNDS))

    # ---- what comes out ---------------------------------------------------------------------------------------------

    def report(
        self,
        before: dict[str, Any],
        after: dict[str, Any],
        parity: dict[str, Any],
        timing: dict[str, Any],
    ) -> dict[str, Any]:
        """Writes the plot and returns the figures of the run."""
        from hybridprune_megatron.engine.train_log import read_train_log
        from hybridprune_megatron.evaluation.machine import describe_machine
        from studies.demo.plots import plot_run, running_mean

        rows = read_train_log(self.out / "train_log.jsonl")
        losses = [row["loss"] for row in rows]
        cfg, retention = self.cfg, after["reduced"]["retention"]
        target = cfg.retention_by_layer
        pattern = cfg.model.hybrid_pattern
        plot_run(self.out / "plot.png", rows, pattern, target, retention["by_layer"], cfg.reduction.budget)
        visual = after["visual_tokens"]
        parts = {
            "full_before": before["full"],
            "reduced_before": before["reduced"],
            "reduced_after": after["reduced"],
            "full_after": after["full"],
        }
        return {
            "steps": rows[-1]["step"],
            "visual_tokens_per_sample": sum(visual) / len(visual),
            "budget": cfg.reduction.budget,
            "mean_retention": retention["mean"],
            "retention_by_layer": retention["by_layer"],
            "retention_target_by_layer": target,
            "hybrid_pattern": pattern,
            "loss_first": losses[0],
            "loss_last": losses[-1],
            "loss_last_mean_of_10": running_mean(losses, 10)[-1],
            "accuracy": {"chance": after["chance"]} | {name: part["accuracy"] for name, part in parts.items()},
            "accuracy_by_kind": {name: part["by_kind"] for name, part in parts.items()},
            "held_out_samples": len(visual),
            "train_samples": TRAIN_SAMPLES,
            "prefill_seconds": timing["seconds"],
            "timing": timing,
            "export_max_abs_logit_diff": parity["max_abs_logit_diff"],
            "seeds": {"trainer": cfg.trainer.seed, "data": DATA_SEED},
            "seconds": {**self.stages.seconds, "total": round(sum(self.stages.seconds.values()), 1)},
            **describe_machine(),
            "command": " ".join(["python", "recipes/demo.py", *sys.argv[1:]]),
            "overrides": self.overrides,
        }

    def ask(self) -> dict[str, Any]:
        """Asks the export about the first held-out clip, in a process that knows nothing of this one."""
        from hybridprune_megatron.evaluation.held_out import read_clips

        clip = next(read_clips(self.data_folders[1]))
        path = self.out / "clip.mp4"
        assert isinstance(clip.video, bytes), "the demo's data sets hold videos"
        path.write_bytes(clip.video)
        options = ("--model", str(self.out / "hf"), "--video", str(path), "--question", clip.question)
        printed = self.command("scripts/ask.py", *options, capture=True)
        return {"video": str(path), "question": clip.question, "answer": printed.strip(), "truth": clip.answer}

    def show(self, report: dict[str, Any], asked: dict[str, Any]) -> None:
        """The closing table, the question, and where things are."""
        print(f"\n{text_table(summary_rows(report))}\n")
        print(f"{asked['video']}: {asked['question']}")
        print(f"  answer: {asked['answer']}")
        print(f"  truth:  {asked['truth']}\n")
        print(f"{self.out}: report.json, plot.png, checkpoints/, hf/ (total {report['seconds']['total']:.0f} s)")

    def command(self, script: str, *arguments: str, capture: bool = False) -> str:
        """Runs one of the repository's programs with this interpreter.

        Raises:
            SystemExit: with its exit code, if it failed; it has said why.
        """
        environment = {"PYTHONWARNINGS": "ignore", **os.environ, "HF_HUB_OFFLINE": "1"}
        program = subprocess.Popen(
            [sys.executable, str(ROOT / script), *arguments],
            stdout=subprocess.PIPE if capture else None,
            text=True,
            env=environment,
        )
        printed = _output_of(program)
        if program.returncode:
            stopped = program.returncode == STOPPED
            why = "was asked to stop; the same command continues" if stopped else "failed; see above"
            print(f"{script} {why} (exit status {program.returncode})", file=sys.stderr)
            sys.exit(program.returncode)
        return printed


def _output_of(program: subprocess.Popen[str]) -> str:
    """What a program prints, if that is captured; waits for its end.

    Ctrl-C reaches it too: it decides what becomes of its work, and whoever does not wait for it would kill it.
    """
    while True:
        try:
            return program.communicate()[0] or ""
        except KeyboardInterrupt:
            continue


def inputs_of(cfg: Config) -> dict[str, Any]:
    """All that the results depend on, as plain values.

    Raises:
        ValueError: settings that the demo cannot work with.
    """
    if cfg.data.train is None or cfg.data.validation is None or cfg.model.init_checkpoint is None:
        raise ValueError("data.train, data.validation and model.init_checkpoint must be set: leave their defaults")
    if Path(cfg.data.train).parent != Path(cfg.data.validation).parent:
        raise ValueError(f"data.train={cfg.data.train}: must lie beside data.validation={cfg.data.validation}")
    weights = Path(cfg.model.init_checkpoint)
    if not weights.is_file():
        raise ValueError(f"model.init_checkpoint={weights}: is not there (from {Path.cwd()}); leave it at its default")
    if cfg.trainer.eval_samples < 1:
        raise ValueError("trainer.eval_samples=0: the demo compares on held-out samples; set trainer.eval_samples=128")
    return {
        "config": plain_config(cfg),
        "data": {
            "train": TRAIN_SAMPLES,
            "questions": TRAIN_QUESTIONS,
            "validation": cfg.trainer.eval_samples,
            "seed": DATA_SEED,
            **CLIP,
        },
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }


def products(out: Path) -> list[Path]:
    """What an earlier demo wrote into a folder; a ``ValueError`` if the folder is not one of the demo's."""
    there = [out / name for name in PRODUCTS if (out / name).exists()]
    if there and not (out / "inputs.json").is_file():
        raise ValueError(f"--fresh: {out} has no inputs.json, so {there[0].name} is not the demo's; remove it yourself")
    return there


def remove_products(out: Path) -> None:
    """Deletes what an earlier demo wrote into a folder; errors as for ``products``."""
    # inputs.json last: a killed call can be repeated.
    for product in sorted(products(out), key=lambda path: path.name == "inputs.json"):
        shutil.rmtree(product) if product.is_dir() and not product.is_symlink() else product.unlink()


def check_same_run(out: Path, inputs: dict[str, Any]) -> None:
    """Refuses to continue where the folder holds a run of other settings, of this program or ``recipes/finetune.py``.

    Raises:
        ValueError: naming what differs.
    """
    changed: list[str] = []
    mine = [name for name in _RESULTS if (out / name).exists() and not (out / "inputs.json").is_file()]
    if mine:
        raise ValueError(f"{out} has {mine[0]}, but no inputs.json, so it is not the demo's: give another output_dir")
    if (out / "inputs.json").is_file():
        changed = differences(json.loads((out / "inputs.json").read_text()), inputs)
    for record in sorted(out.glob("checkpoints/step_*/run.json")):
        changed += differences(json.loads(record.read_text())["config"], inputs["config"], "config")
    if changed:
        shown = ", ".join(dict.fromkeys(changed[:2]))
        raise ValueError(f"{out} holds a run with other settings: {shown}; add --fresh, or output_dir=runs/<name>")


@one_line_errors("demo")
def main(argv: list[str]) -> None:
    """Reads the command line; a wrong setting ends it with one line and code 2, before anything slow is imported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="delete what is below output_dir and start over")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides, as for recipes/finetune.py")
    # Intermixed: options may stand between overrides.
    options = parser.parse_intermixed_args(argv)
    overrides = ["name=demo", *options.overrides]
    cfg = checked_config(["experiment=demo", *overrides])
    out, inputs = Path(cfg.output_dir), inputs_of(cfg)
    # Before the locks, which are files too: nothing is written into somebody else's folder.
    if options.fresh:
        products(out)
    else:
        check_same_run(out, inputs)
    hold_folder(out, "demo")
    # Nothing is deleted while a finetuning that was started by hand writes the same folder.
    hold_folder(out)
    if options.fresh:
        remove_products(out)
    check_same_run(out, inputs)
    release_folder(out)
    write_json(out / "inputs.json", inputs)
    # Megatron reports what it does without Apex and Transformer Engine, which a demo without a GPU does not have.
    quiet_libraries()
    Demo(cfg, overrides, inputs).run()


# Megatron's checkpoint writer starts processes that import this file.
if __name__ == "__main__":
    main(sys.argv[1:])
