"""Makes a Hugging Face checkpoint one that training starts from: its weights under our names, and its ``model`` group.

    python scripts/import_hf.py path/to/Nemotron-Nano-12B-v2-VL --name my_vl
    python recipes/finetune.py experiment=nemotron_nano_12b_v2_vl model=my_vl data.train=...

With --tower a RADIO folder and a projector that begins at random make a video model of a language model.
Reads the folder tensor by tensor and holds no more than one file of its own beside them, whatever the model's size.
Writes ``<out>/*.safetensors`` and ``conf/model/<name>.yaml``, which names them as ``model.init_checkpoint``; any
parallel layout loads them. A tensor that is unknown, missing or of another shape ends it before anything is written.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridprune_megatron.config.one_line import one_line_errors

if TYPE_CHECKING:
    from hybridprune_megatron.huggingface.assemble import AssembledWeights
    from hybridprune_megatron.huggingface.source import TranslatedWeights

    Source = TranslatedWeights | AssembledWeights

ROOT = Path(__file__).resolve().parents[1]


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Command line to options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="FOLDER", help="a Hugging Face model: config.json and its .safetensors files")
    parser.add_argument("--tower", metavar="FOLDER", help="a RADIO vision tower to put in front of a language model")
    parser.add_argument("--frame-size", type=int, default=512, help="px, of frames for --tower (default %(default)s)")
    parser.add_argument("--name", required=True, help="of the model group to write: conf/model/<name>.yaml")
    parser.add_argument("--out", help="folder for the weights (default runs/imported/<name>); replaced if it exists")
    parser.add_argument("--conf", default=str(ROOT / "conf"), help="folder of the configuration (default %(default)s)")
    parser.add_argument("--max-shard-gib", type=float, default=4.0, help="largest weights file (default %(default)s)")
    parser.add_argument("--check", action="store_true", help="read headers only, write nothing")
    options = parser.parse_args(argv)
    if options.max_shard_gib <= 0:
        parser.error(f"--max-shard-gib={options.max_shard_gib}: must be above 0")
    return options


@one_line_errors("import failed")
def main(argv: list[str]) -> None:
    """Checks and converts; what is wrong ends it with one line and code 2."""
    options = parse_arguments(argv)
    try:
        print(convert(options))
    except ValueError as error:
        print(f"import failed: {error}", file=sys.stderr)
        sys.exit(2)


def convert(options: argparse.Namespace) -> str:
    """Does it and says what next.

    Raises:
        ValueError: the folder cannot be imported, or the group is there with other values.
    """
    # After the arguments are read: torch takes seconds to import.
    from tqdm import tqdm

    from hybridprune_megatron.huggingface.assemble import AssembledWeights, open_tower, vision_values
    from hybridprune_megatron.huggingface.files import TOKENIZER_FILES, copy_weights, whole_folder
    from hybridprune_megatron.huggingface.folder import model_values, read_config
    from hybridprune_megatron.huggingface.source import TranslatedWeights, open_weights

    source = Path(options.source)
    config = read_config(source)
    model = open_weights(source)
    assert isinstance(model, TranslatedWeights), type(model)
    if not model.table.pattern:
        raise ValueError(f"{source} is a vision tower alone: give it as --tower beside the folder of a language model")
    out = Path(options.out or ROOT / "runs" / "imported" / options.name)
    values = dict(model_values(options.name, config, model.files.shape, model.table)) | {"init_checkpoint": str(out)}
    weights: Source = model
    if options.tower:
        values["vision"] = vision_values(Path(options.tower), options.frame_size, values["hidden_size"])
        weights = AssembledWeights(model, open_tower(Path(options.tower)), values["vision"])
    check_shapes(values, weights)
    group = Path(options.conf) / "model" / f"{options.name}.yaml"
    text = group_text(source, values)
    if group.is_file() and group.read_text() != text:
        raise ValueError(f"{group} is there with other values: give another --name, or remove it")
    if options.check:
        return f"{source}: {len(weights.names)} weights fit; nothing was written (--check)"
    with whole_folder(out) as folder:
        copy_weights(weights, folder, round(options.max_shard_gib * 2**30), partial(tqdm, desc="weights", disable=None))
        for file in TOKENIZER_FILES:
            if (source / file).is_file():
                shutil.copyfile(source / file, folder / file)
    group.write_text(text)
    tokenizer = f" data.tokenizer={out}" if (out / "tokenizer.json").is_file() else ""
    command = f"python recipes/finetune.py model={options.name}{tokenizer}"
    return f"{source} is model={options.name} now ({group}); e.g. {command}"


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
    expected = whole_weights(build_model(replace(base, model=model, data=data), meta=True))
    for name, shape in weights.shapes().items():
        if name not in expected or tuple(expected[name].shape) != shape:
            known = tuple(expected[name].shape) if name in expected else "not there"
            raise ValueError(f"{name} is {shape} in the folder and {known} in the model that config.json describes")


def group_text(source: Path, values: dict[str, Any]) -> str:
    """The file of the ``model`` group."""
    from omegaconf import OmegaConf

    return f"# Made by scripts/import_hf.py from {source.name}.\n{OmegaConf.to_yaml(values)}"


if __name__ == "__main__":
    main(sys.argv[1:])
