"""Looks into a checkpoint: how sparse and stable its scores are, what it keeps, and what dropping a token loses.

    hybridprune analyze checkpoint=runs/demo
    hybridprune analyze checkpoint=runs/demo data=my/shards samples=128 reduction.budget=0.35
    hybridprune analyze checkpoint=assets/demo/base.safetensors experiment=demo probe_samples=0

Writes analysis.json, the figures and report.html (one file with everything in it); an earlier analysis is replaced.
Keys of its own:

{keys}

Every other key=value changes the checkpoint's configuration; with bare weights (a .safetensors file, a Hugging Face
folder) they compose it. docs/analysis.md explains the figures.
"""

from __future__ import annotations

from pathlib import Path

from hybridprune_megatron.analysis.settings import AnalysisSettings
from hybridprune_megatron.config.one_line import one_line_errors
from hybridprune_megatron.config.outputs import check_output, whole_folder
from hybridprune_megatron.config.own_keys import read_checkpoint_command
from hybridprune_megatron.engine.quiet import quiet_libraries

COMMAND = "recipes/analyze.py"


@one_line_errors("analyze")
def main(argv: list[str]) -> None:
    """Reads the command line; a wrong setting ends it with one line and code 2."""
    # Before the slow imports, which take half a minute.
    settings, checkpoint, cfg, data = read_checkpoint_command("analyze", __doc__, AnalysisSettings, argv)
    out = Path(settings.out) if settings.out is not None else Path(cfg.output_dir) / "analysis"
    quiet_libraries()
    from hybridprune_megatron.analysis.run import analyze
    from hybridprune_megatron.engine.load import load_model
    from hybridprune_megatron.engine.parallel import shut_down

    check_output(out, COMMAND, [checkpoint, data])
    model = load_model(checkpoint, cfg)
    with whole_folder(out, COMMAND, [checkpoint, data]) as folder:
        report = analyze(model, cfg, settings, data, folder)
    shut_down()
    print(f"{out}: {report.name}, analysis.json and figures")
