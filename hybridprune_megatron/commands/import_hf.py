"""Makes a Hugging Face checkpoint one that training starts from: its weights under our names, and its ``model`` group.

    hybridprune import path/to/Nemotron-Nano-12B-v2-VL --name my_vl
    hybridprune finetune experiment=nemotron_nano_12b_v2_vl model=my_vl data.train=...

With --tower a RADIO folder and a projector that begins at random make a video model of a language model.
Reads the folder tensor by tensor and holds no more than one file of its own besides them, whatever the model's size.
Writes ``<out>/*.safetensors`` and ``conf/model/<name>.yaml``, which names them as ``model.init_checkpoint``; any
parallel layout loads them. A tensor that is unknown, missing or of another shape ends it before anything is written.
"""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridprune_megatron.config.one_line import one_line_errors
from hybridprune_megatron.config.shipped import CONF_DIR

if TYPE_CHECKING:
    from hybridprune_megatron.huggingface.assemble import AssembledWeights
    from hybridprune_megatron.huggingface.source import TranslatedWeights

    Source = TranslatedWeights | AssembledWeights

COMMAND = "scripts/import_hf.py"
# What every published folder has, whichever program trained it.
USUAL_STEP_MIN = 1e-3
_YAML_WORDS = ("null", "none", "true", "false", "yes", "no", "on", "off", "inf", "nan")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Command line to options."""
    parser = argparse.ArgumentParser(
        prog="hybridprune import", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="FOLDER", help="a Hugging Face model: config.json and its .safetensors files")
    parser.add_argument("--tower", metavar="FOLDER", help="a RADIO vision tower to put before a language model")
    parser.add_argument("--frame-size", type=int, default=512, help="px, of frames for --tower (default %(default)s)")
    parser.add_argument("--name", required=True, help="of the model group to write: conf/model/<name>.yaml")
    parser.add_argument(
        "--out", help="folder for the weights (default runs/imported/<name>); an earlier import is replaced"
    )
    parser.add_argument("--conf", default=str(CONF_DIR), help="folder of the configuration (default %(default)s)")
    parser.add_argument("--max-shard-gib", type=float, default=4.0, help="largest weights file (default %(default)s)")
    parser.add_argument("--check", action="store_true", help="read headers only, write nothing")
    options = parser.parse_args(argv)
    if not 0 < options.max_shard_gib < math.inf:
        parser.error(f"--max-shard-gib={options.max_shard_gib}: must be a finite number above 0")
    # It names files and a group of the configuration; `model=null` and the like mean something else there.
    if not re.fullmatch(r"[A-Za-z][\w.-]*", options.name, re.ASCII) or options.name.lower() in _YAML_WORDS:
        parser.error(f"--name={options.name!a}: letters, digits, '_', '-' and '.' are allowed, the first a letter")
    return options


@one_line_errors("import")
def main(argv: list[str]) -> None:
    """Checks and converts; what is wrong ends it with one line and code 2."""
    options = parse_arguments(argv)
    print(convert(options))


def convert(options: argparse.Namespace) -> str:
    """Does it and says what next.

    Raises:
        ValueError: the folder cannot be imported, or the group exists with other values.
    """
    # After the arguments are read: torch takes seconds to import.
    from tqdm import tqdm

    from hybridprune_megatron.config.outputs import check_output, whole_file, whole_folder
    from hybridprune_megatron.engine.quiet import quiet_libraries
    from hybridprune_megatron.huggingface.files import copy_tokenizer, copy_weights

    quiet_libraries()
    source = Path(options.source)
    out = Path(options.out) if options.out is not None else Path.cwd() / "runs" / "imported" / options.name
    inputs = [source, *([options.tower] if options.tower else [])]
    group = Path(options.conf) / "model" / f"{options.name}.yaml"
    if not options.check:
        check_output(out, COMMAND, inputs)
        if not group.parent.is_dir():
            raise ValueError(f"--conf={options.conf} has no folder model: give the folder of the configuration")
    values, weights = read_model(options, source, out)
    check_shapes(values, weights)
    text = group_text(source, values)
    if group.is_symlink() or (group.exists() and group.read_bytes() != text.encode()):
        raise ValueError(f"{group} exists with other values: give another --name, or remove it")
    if options.check:
        return f"{source}: {len(weights.names)} weights fit; nothing was written (--check)"
    with whole_folder(out, COMMAND, inputs) as folder:
        copy_weights(weights, folder, round(options.max_shard_gib * 2**30), partial(tqdm, desc="weights", disable=None))
        copy_tokenizer(source, folder)
    with whole_file(group) as scratch:
        scratch.write_text(text)
    tokenizer = f" data.tokenizer={out}" if (out / "tokenizer.json").is_file() else ""
    command = f"hybridprune finetune model={options.name}{tokenizer}"
    return f"{source} is model={options.name} now ({group}); e.g. {command}{clamp_note(source)}"


def clamp_note(source: Path) -> str:
    """What to do about a clamp of Mamba steps that transformers alone computes; empty where it is the usual one."""
    from hybridprune_megatron.huggingface.folder import language_fields, read_config

    lowest = language_fields(read_config(source)).get("time_step_min")
    if lowest in (None, USUAL_STEP_MIN):
        return ""
    return (
        f"\ntransformers clamps steps of Mamba layers at time_step_min={lowest}, megatron and this project do not: set "
        "model.time_step_min to it if transformers trained these weights (docs/models.md)"
    )


def read_model(options: argparse.Namespace, source: Path, out: Path) -> tuple[dict[str, Any], Source]:
    """The ``model`` group of a folder and its weights, of which headers are read.

    Raises:
        ValueError: the folder cannot be imported.
    """
    from hybridprune_megatron.huggingface.assemble import AssembledWeights, open_tower, vision_values
    from hybridprune_megatron.huggingface.folder import model_values, read_config
    from hybridprune_megatron.huggingface.source import TranslatedWeights, open_weights

    config = read_config(source)
    model = open_weights(source)
    assert isinstance(model, TranslatedWeights), type(model)
    if not model.table.pattern:
        raise ValueError(f"{source} is a vision tower alone: give it as --tower with the folder of a language model")
    values = model_values(options.name, config, model.files.shape, model.table) | {"init_checkpoint": str(out)}
    if not options.tower:
        return values, model
    tower = open_tower(Path(options.tower))
    values["vision"] = vision_values(tower, options.frame_size, values["hidden_size"])
    return values, AssembledWeights(model, tower, values["vision"])


def check_shapes(values: dict[str, Any], weights: Source) -> None:
    """Compares every shape with that of the model which the values describe; neither takes memory.

    Raises:
        ValueError: naming the first weight that differs.
    """
    from hybridprune_megatron.config import load_config
    from hybridprune_megatron.config.model_schema import ModelConfig
    from hybridprune_megatron.engine.launch import Launch
    from hybridprune_megatron.engine.parallel import init_distributed, init_model_parallel
    from hybridprune_megatron.engine.weights import whole_weights
    from hybridprune_megatron.models.build import build_model

    model = ModelConfig.of(values | {"spec": "torch"})
    base = load_config(["experiment=demo", "reduction=none"])
    sampling = "uniform" if model.vision else "none"
    data = replace(base.data, sequence_length=model.max_sequence_length, sampling=sampling, num_frames=1)
    init_distributed(Launch())
    init_model_parallel()
    try:
        expected = whole_weights(build_model(replace(base, model=model, data=data), meta=True))
    except (RuntimeError, OverflowError, AssertionError) as error:
        # Sizes that no tensor can have, or that torch or megatron cannot build with.
        raise ValueError(
            f"config.json describes a model that cannot be built: {' '.join(str(error).split())}"
        ) from None
    for name, shape in weights.shapes().items():
        if name not in expected or tuple(expected[name].shape) != shape:
            known = tuple(expected[name].shape) if name in expected else "not there"
            raise ValueError(f"{name} is {shape} in the folder and {known} in the model that config.json describes")


def group_text(source: Path, values: dict[str, Any]) -> str:
    """The file of the ``model`` group."""
    from omegaconf import OmegaConf

    # The name in ASCII and on one line: what follows is read again.
    return f"# Made by {COMMAND} from {ascii(source.name)[1:-1]}.\n{OmegaConf.to_yaml(values)}"
