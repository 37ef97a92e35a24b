"""Writes the weights of a checkpoint as one .safetensors file for ``model.init_checkpoint``.

python scripts/save_weights.py --checkpoint runs/demo_base_clips --out assets/demo/base.safetensors --dtype bf16
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hybridprune_megatron.config.one_line import one_line_errors
from hybridprune_megatron.config.stored_run import checkpoint_config, find_checkpoint


@one_line_errors("save_weights")
def main(argv: list[str]) -> None:
    """Loads and writes; a wrong argument ends it with one line and code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder of a run (newest checkpoint) or of one checkpoint")
    parser.add_argument(
        "--out", required=True, type=Path, help="file to write; an earlier one of this command is replaced"
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of what has two dimensions or more")
    options = parser.parse_args(argv)
    checkpoint = find_checkpoint(options.checkpoint)
    cfg = checkpoint_config(checkpoint, ())
    from hybridprune_megatron.engine.quiet import quiet_libraries

    quiet_libraries()
    # After the arguments are read: these take half a minute to import.
    import torch

    from hybridprune_megatron.engine.load import load_model
    from hybridprune_megatron.engine.weights import MADE_BY, save_weights
    from hybridprune_megatron.huggingface.files import check_weights_file

    check_weights_file(options.out, MADE_BY, [checkpoint])
    model = load_model(checkpoint, cfg)
    save_weights(model, options.out, {"fp32": None, "bf16": torch.bfloat16}[options.dtype])
    print(f"{checkpoint} -> {options.out} ({options.out.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main(sys.argv[1:])
