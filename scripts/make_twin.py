"""Writes a small checkpoint in the format of Nemotron Nano V2 VL (``NemotronH_Nano_VL_V2``), to try what follows on.

    python scripts/make_twin.py --out runs/twin_vl
    python scripts/import_hf.py runs/twin_vl --name twin_vl

It has the published checkpoint's tensor names, dtypes (bf16, decays fp32), constants, shards with an index and nested
configuration, and the weights, sizes and tokenizer of the demo's base model. It is not anyone else's model: it stands
in for the real one where that does not fit or cannot be fetched.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridprune_megatron.config import Config, checked_config
from hybridprune_megatron.config.one_line import one_line_errors

if TYPE_CHECKING:
    from torch import Tensor

COMMAND = "scripts/make_twin.py"
# Several files, as a large model has them.
MAX_SHARD_BYTES = 2**20
TOWER = "vision_model.radio_model."


@one_line_errors("make_twin")
def main(argv: list[str]) -> None:
    """Reads the command line and writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    options = parser.parse_args(argv)
    if options.out.exists():
        parser.error(f"--out {options.out}: exists; choose another folder, or remove it first")
    write_twin(options.out, checked_config(["experiment=demo"]))
    print(f"{options.out}: the demo's base model as NemotronH_Nano_VL_V2")


def write_twin(out: Path, cfg: Config) -> None:
    """Writes weights, configuration and tokenizer, all of them or nothing.

    Args:
        out: the folder.
        cfg: uses ``model`` (with vision and ``init_checkpoint``, a .safetensors file) and ``data.tokenizer``.

    Raises:
        ValueError: the folder holds something else.
    """
    # After the arguments are read: torch takes seconds to import.
    from safetensors.torch import load_file

    from hybridprune_megatron.config.outputs import check_output, whole_folder
    from hybridprune_megatron.huggingface.files import ShardWriter, copy_tokenizer

    assert cfg.model.init_checkpoint is not None, "model.init_checkpoint is not set"
    inputs = [cfg.model.init_checkpoint, cfg.data.tokenizer]
    check_output(out, COMMAND, inputs)
    tensors = published_weights(cfg, load_file(cfg.model.init_checkpoint))
    with whole_folder(out, COMMAND, inputs) as folder:
        writer = ShardWriter(folder, MAX_SHARD_BYTES)
        for name in sorted(tensors):
            writer.add(name, tensors[name])
        writer.close()
        (folder / "config.json").write_text(json.dumps(published_config(cfg), indent=2) + "\n", encoding="ascii")
        copy_tokenizer(Path(cfg.data.tokenizer), folder)


def published_weights(cfg: Config, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's weights under the names and in the dtypes of the published checkpoint, constants included."""
    import torch

    from hybridprune_megatron.huggingface.names import Heads, WeightNames

    model, vision = cfg.model, cfg.model.vision
    assert vision is not None, "the twin is a video model"
    heads = Heads(model.num_query_groups, model.kv_channels)
    names = WeightNames("nemotron_vl", model.hybrid_pattern, heads, blocks=vision.num_layers)
    # Products are rounded once: the published tower has no layer scales, they go into the linears.
    exact = names.to_theirs({name: value.float() for name, value in ours.items()})
    tensors = {name: value if name.endswith((".A_log", ".D")) else value.bfloat16() for name, value in exact.items()}
    tensors[f"{TOWER}summary_idxs"] = torch.arange(vision.num_cls_tokens)
    tensors[f"{TOWER}input_conditioner.norm_mean"] = torch.tensor(vision.image_mean).view(3, 1, 1)
    tensors[f"{TOWER}input_conditioner.norm_std"] = torch.tensor(vision.image_std).view(3, 1, 1)
    return tensors


def published_config(cfg: Config) -> dict[str, Any]:
    """config.json with the keys of the published one that say something about sizes."""
    from hybridprune_megatron.export.write import language_sizes

    model, vision = cfg.model, cfg.model.vision
    assert vision is not None, "the twin is a video model"
    language = {
        "model_type": "nemotron_h",
        "architectures": ["NemotronHForCausalLM"],
        **language_sizes(model),
        "num_hidden_layers": len(model.hybrid_pattern),
        "conv_kernel": 4,
        "max_position_embeddings": model.max_sequence_length,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    return {
        "model_type": "NemotronH_Nano_VL_V2",
        "architectures": ["NemotronH_Nano_VL_V2"],
        "torch_dtype": "bfloat16",
        "force_image_size": vision.frame_size,
        "patch_size": vision.patch_size,
        "downsample_ratio": vision.pixel_shuffle,
        "ps_version": "v2",
        "vit_hidden_size": vision.hidden_size,
        "projector_hidden_size": vision.projector_hidden_size,
        "norm_mean": list(vision.image_mean),
        "norm_std": list(vision.image_std),
        "vision_config": {"num_attention_heads": vision.num_attention_heads, "patch_size": vision.patch_size},
        "llm_config": language,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
