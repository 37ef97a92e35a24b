"""Exports a checkpoint to a Hugging Face folder that runs without this project.

    hybridprune export --checkpoint runs/demo --out runs/demo/hf
    hybridprune export --checkpoint runs/demo/checkpoints/step_00000050 --out hf reduction.budget=0.35
    hybridprune export --checkpoint assets/demo/base.safetensors --out hf experiment=demo
    hybridprune export --checkpoint runs/mine --out hf --plain path/to/original

Runs in one process, on a CPU; the checkpoint may come from any number of them.
"""

from __future__ import annotations

import argparse
import re

from hybridprune_megatron.config.one_line import one_line_errors


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Command line to options."""
    parser = argparse.ArgumentParser(
        prog="hybridprune export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="folder of a run (newest checkpoint), of one checkpoint, or bare weights: a .safetensors file, a folder "
        "of them, a Hugging Face folder",
    )
    parser.add_argument("--out", required=True, help="folder to write; an earlier export is replaced")
    parser.add_argument(
        "--plain",
        metavar="FOLDER",
        help="Hugging Face folder that the weights came from: write its layout, for engines that load it, unreduced",
    )
    parser.add_argument("--max-shard-size", default="5GB", help="largest weights file (default %(default)s)")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="changes to the checkpoint's configuration; with bare weights, the configuration (experiment=...)",
    )
    options = parser.parse_args(argv)
    size = re.fullmatch(r"(\d+(?:\.\d+)?) ?[KMGT]B", options.max_shard_size)
    if size is None or float(size[1]) == 0:
        parser.error(f"--max-shard-size={options.max_shard_size!a:.60}: a size above 0 in KB, MB, GB or TB, e.g. 5GB")
    for override in options.overrides:
        if "=" not in override:
            parser.error(f"{override!r} is not key=value")
    return options


@one_line_errors("export")
def main(argv: list[str]) -> None:
    """Loads and writes; a wrong argument ends it with one line and code 2."""
    options = parse_arguments(argv)
    from hybridprune_megatron.config.outputs import check_output
    from hybridprune_megatron.engine.quiet import quiet_libraries
    from hybridprune_megatron.export import COMMAND

    inputs = [options.plain] if options.plain is not None else []
    check_output(options.out, COMMAND, inputs)
    quiet_libraries()
    # After the arguments are checked: these take half a minute to import.
    from hybridprune_megatron.config.stored_run import checkpoint_config, find_checkpoint
    from hybridprune_megatron.engine.load import load_model
    from hybridprune_megatron.export.model_card import read_facts
    from hybridprune_megatron.export.plain import export_plain
    from hybridprune_megatron.export.write import export_model

    checkpoint = find_checkpoint(options.checkpoint)
    check_output(options.out, COMMAND, [checkpoint])
    cfg = checkpoint_config(checkpoint, options.overrides)
    model, facts = load_model(checkpoint, cfg), read_facts(checkpoint)
    if options.plain is not None:
        folder = export_plain(model, cfg, options.plain, options.out, facts, [checkpoint])
    else:
        folder = export_model(model, cfg, options.out, options.max_shard_size, facts, [checkpoint])
    how = f"the layout of {options.plain}" if options.plain else f"budget {cfg.reduction.budget}"
    print(f"{checkpoint} exported to {folder} ({how}, score {cfg.reduction.score.name})")
