"""Whether weights are of the configured model, as far as the headers of their files say; nothing slow is imported."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridprune_megatron.checks import fail
from hybridprune_megatron.config.checkpoint_folder import RUN_FILE, latest_checkpoint
from hybridprune_megatron.config.json_text import parse_json, read_json

if TYPE_CHECKING:
    from hybridprune_megatron.config.schema import ModelConfig

_KEY = "model.init_checkpoint"
_INDEX, _WEIGHTS = "model.safetensors.index.json", "model.safetensors"
_LAYER = re.compile(r"language_model\.decoder\.layers\.(\d+)\.")
#: A header lists names and shapes; what is longer is none.
_LONGEST_HEADER = 100 * 2**20
#: Sizes of the language model, which a run's checkpoint knows by the same names.
_SIZES = (
    *("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "vocab_size"),
    *("mamba_num_heads", "mamba_head_dim", "mamba_state_dim", "mamba_num_groups", "tie_embeddings"),
)


def holds_tensors(path: Path) -> bool:
    """Bare weights: a ``.safetensors`` file, or a folder of such files (imported, or Hugging Face's)."""
    return path.is_file() or any((path / name).is_file() for name in ("config.json", _INDEX, _WEIGHTS))


def check_weights(model: ModelConfig) -> None:
    """``model.init_checkpoint`` is a file or folder with weights, and where headers tell, with those of this model.

    Raises:
        ConfigError: it is not.
    """
    if model.init_checkpoint is None:
        return
    path = Path(model.init_checkpoint)
    if path.is_file():
        _check_shapes(model, dict(_header(path)))
    elif (path / "config.json").is_file():
        # A Hugging Face folder: its names are translated later.
        return
    elif (path / _INDEX).is_file() or (path / _WEIGHTS).is_file():
        shapes = (entry for file in _files(path) if file.is_file() for entry in _header(file))
        _check_shapes(model, dict(shapes))
    elif (path / RUN_FILE).is_file():
        _check_run(model, path)
    elif not (path / "metadata.json").is_file():
        newest = latest_checkpoint(path) or latest_checkpoint(path / "checkpoints")
        fix = f"give {newest}" if newest else "give a .safetensors file, a checkpoint's folder or a Hugging Face folder"
        raise fail(_KEY, str(path), "is a folder without weights of its own", fix)


def _files(folder: Path) -> list[Path]:
    if not (folder / _INDEX).is_file():
        return [folder / _WEIGHTS]
    try:
        names = set(read_json(folder / _INDEX)["weight_map"].values())
        return [folder / name for name in sorted(names) if "/" not in name]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise fail(_KEY, str(folder), f"{_INDEX} is not an index of safetensors files", "fetch it again") from None


def _header(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a .safetensors file."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(_LONGEST_HEADER, file.stat().st_size):
                raise ValueError(f"a header of {length} bytes")
            header = parse_json(stream.read(length))
        entries = {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise fail(_KEY, str(file), f"is not a complete safetensors file ({error})", "fetch it again") from None
    yield from entries.items()


def _check_shapes(model: ModelConfig, found: dict[str, tuple[int, ...]]) -> None:
    layers = {int(match[1]) for match in map(_LAYER.match, found) if match}
    if layers and layers != set(range(model.num_layers)):
        raise _other(model, f"{len(layers)} layers", f"model.hybrid_pattern={model.hybrid_pattern}: {model.num_layers}")
    for name, shape in _shapes(model):
        if name in found and found[name] != shape:
            raise _other(model, f"{name} {found[name]}", f"in the model {shape}")


def _shapes(model: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Some weights of every layer and their shapes; what their own module says is right is not written twice."""
    hidden, heads = model.hidden_size, model.num_attention_heads * model.kv_channels
    inner, state = model.mamba_num_heads * model.mamba_head_dim, model.mamba_num_groups * model.mamba_state_dim
    by_symbol = {
        "M": {"mixer.in_proj.weight": (2 * (inner + state) + model.mamba_num_heads, hidden)},
        "*": {"self_attention.linear_qkv.weight": (heads + 2 * model.num_query_groups * model.kv_channels, hidden)},
        "-": {"mlp.linear_fc1.weight": (model.ffn_hidden_size, hidden)},
    }
    yield "language_model.embedding.word_embeddings.weight", (model.vocab_size, hidden)
    for layer, symbol in enumerate("".join(model.stages)):
        for name, shape in by_symbol.get(symbol, {}).items():
            yield f"language_model.decoder.layers.{layer}.{name}", shape
    if model.vision is not None:
        yield "mlp1.3.weight", (hidden, model.vision.projector_hidden_size)


def _check_run(model: ModelConfig, folder: Path) -> None:
    """The checkpoint of a run was of a language model of these sizes."""
    try:
        saved: Any = read_json(folder / RUN_FILE)
    except ValueError as error:
        raise fail(_KEY, str(folder), str(error), "give a whole checkpoint") from None
    config = saved.get("config") if isinstance(saved, dict) else None
    sizes = config.get("model") if isinstance(config, dict) else None
    if not isinstance(sizes, dict):
        return
    pattern = sizes.get("hybrid_pattern")
    if isinstance(pattern, str) and pattern.replace("|", "") != "".join(model.stages):
        raise _other(model, f"layers {pattern}", f"model.hybrid_pattern={model.hybrid_pattern}")
    for name in _SIZES:
        if name in sizes and sizes[name] != getattr(model, name):
            raise _other(model, f"{name}={sizes[name]}", f"model.{name}={getattr(model, name)}")


def _other(model: ModelConfig, theirs: str, ours: str) -> Exception:
    reason = f"holds weights of another model: {theirs}, {ours}"
    return fail(_KEY, model.init_checkpoint, reason, "check model=... and model.init_checkpoint")
