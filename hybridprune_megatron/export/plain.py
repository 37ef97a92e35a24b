"""Writes a trained model back as the Hugging Face folder that it came from: keys, dtypes, files; nothing reduced."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn

from hybridprune_megatron.config.inside import file_inside
from hybridprune_megatron.config.outputs import MARKER, check_output, whole_folder
from hybridprune_megatron.config.schema import Config
from hybridprune_megatron.engine.weights import whole_weights
from hybridprune_megatron.export import COMMAND
from hybridprune_megatron.export.model_card import RunFacts, model_card
from hybridprune_megatron.huggingface.files import save_tensors
from hybridprune_megatron.huggingface.source import TranslatedWeights, open_weights

_CARD = "README.md"


def export_plain(
    model: nn.Module,
    cfg: Config,
    original: str | Path,
    out_dir: str | Path,
    facts: RunFacts | None = None,
    inputs: Iterable[str | Path] = (),
) -> Path:
    """Writes the weights of a model in the layout of the folder whose weights it was trained from.

    Every tensor keeps the original's name, dtype and file; what no model here has (constants of the tower) and every
    other file are the original's. Serving engines that load the original load this.

    Args:
        model: the unsplit training model.
        cfg: its configuration, for the model card.
        original: a Hugging Face folder of a family that ``huggingface.names`` knows.
        out_dir: where to write; an earlier export that is there is replaced.
        facts: of the run, for the card (``run_facts.read_facts``).
        inputs: files and folders that the model came from.

    Returns:
        The folder.

    Raises:
        ValueError: the original is of another model, or cannot be read, or ``out_dir`` holds something else.
    """
    original, out_dir = Path(original), Path(out_dir)
    inputs = (*inputs, original)
    check_output(out_dir, COMMAND, inputs)
    source = open_weights(original)
    if not isinstance(source, TranslatedWeights):
        raise ValueError(f"--plain={original} has no config.json: give the Hugging Face folder of the weights")
    files = source.files
    weights = source.table.to_theirs(whole_weights(model))
    with whole_folder(out_dir, COMMAND, inputs) as folder:
        for entry in original.iterdir():
            if entry.is_file() and entry.suffix != ".safetensors" and entry.name not in (_CARD, MARKER):
                shutil.copyfile(file_inside(original, entry.name), folder / entry.name)
        for file in sorted(set(files.files.values())):
            names = [name for name, where in files.files.items() if where == file]
            tensors = {name: _as_before(files.read(name), name, weights) for name in names}
            save_tensors(tensors, folder / file.name, {"format": "pt"})
        lowest = cfg.model.time_step_min
        clamp = f"clamped to {lowest} and more" if lowest else "as it comes, not clamped"
        card = model_card(cfg, facts or RunFacts(), clamp, reduced=False)
        (folder / _CARD).write_text(card, encoding="utf-8")
    return out_dir


def _as_before(before: Tensor, name: str, weights: dict[str, Tensor]) -> Tensor:
    """One tensor of theirs in the original's dtype; the original's own where no model here has it."""
    if name not in weights:
        return before
    value = weights[name].detach().cpu()
    if value.shape != before.shape:
        raise ValueError(
            f"{name} is {tuple(before.shape)} in the original and {tuple(value.shape)} in the model: give the folder "
            "that the model was trained from"
        )
    return value.to(before.dtype).contiguous().clone()
