"""Takes a twin of every supported model through import, training and export, and writes the table of docs/models.md.

    python scripts/model_table.py            # a minute or two on a CPU
    python scripts/model_table.py --check    # prints the rows, writes nothing

Twins have the published structure, small dimensions and random weights (tests/parity/twins.py); transformers on the
same weights is what logits are compared with. A part that does not work ends the command.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from hybridprune_megatron.config.one_line import one_line_errors

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- made by scripts/model_table.py -->", "<!-- end -->"
COLUMNS = (
    "model",
    "import",
    "finetune, 3 steps",
    "reduced finetune, 3 steps",
    "export as it came",
    "reduced export, logits",
    "logits against transformers",
)
#: Twins of tests/parity/twins.py by the model that they stand for; "video" is the whole V2-VL.
MODELS = {
    "Nemotron-H 8B": "8b",
    "Nemotron Nano 9B v2": "9b",
    "Nemotron Nano 12B v2": "12b",
    "Nemotron 3 Nano (experts)": "experts",
    "Nemotron 3 Super (latent experts)": "latent experts",
    "Nemotron Nano V2 VL 12B with its C-RADIO tower": "video",
    "a language model and a RADIO tower (`--tower`)": "assembled",
}
STEPS, BUDGET = 3, 0.25


@one_line_errors("model_table")
def main(argv: list[str]) -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="print the rows, write nothing")
    options = parser.parse_args(argv)
    sys.path.insert(0, str(ROOT))
    from tqdm import tqdm

    from hybridprune_megatron.engine.launch import Launch
    from hybridprune_megatron.engine.quiet import quiet_libraries

    quiet_libraries()
    from hybridprune_megatron.engine.parallel import init_distributed, init_model_parallel, shut_down

    init_distributed(Launch(0, 1, 0, 1))
    init_model_parallel(seed=1)
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + " --- |" * len(COLUMNS)]
    for name, twin in tqdm(MODELS.items(), desc="models"):
        with tempfile.TemporaryDirectory() as folder:
            lines.append(f"| {' | '.join([name, *row(twin, Path(folder))])} |")
    shut_down()
    table = "\n".join(lines)
    print(table)
    if not options.check:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}", encoding="ascii")


def row(twin: str, folder: Path) -> list[str]:
    """The cells of one model."""
    original, tower = write_original(twin, folder)
    cfg, weights = imported(original, tower, folder)
    parity = "" if twin == "assembled" else f"{logit_difference(twin, cfg, original):.0e}"
    reduced_cfg = with_budget(cfg)
    return [
        f"{weights} weights",
        trained(cfg),
        trained(reduced_cfg) if cfg.model.vision is not None else "text is never dropped",
        exported_plain(cfg, original, folder) if tower is None else "no folder to go back to",
        f"{exported_reduced(reduced_cfg if cfg.model.vision is not None else cfg, folder):.0e}",
        parity,
    ]


def write_original(twin: str, folder: Path) -> tuple[Path, Path | None]:
    """A Hugging Face folder, and that of a tower to put before it."""
    import torch

    from tests.parity.twins import radio_twin, write_language_twin, write_vision_twin

    if twin == "video":
        write_vision_twin(folder / "hf", dtype=torch.float32)
        return folder / "hf", None
    write_language_twin(folder / "hf", "12b" if twin == "assembled" else twin)
    if twin != "assembled":
        return folder / "hf", None
    radio_twin().save_pretrained(folder / "radio")
    return folder / "hf", folder / "radio"


def imported(original: Path, tower: Path | None, folder: Path) -> tuple[Any, int]:
    """The configuration of the imported model, whose weights were compared with the original's, and their number."""
    from omegaconf import OmegaConf

    from hybridprune_megatron.commands.import_hf import convert, parse_arguments
    from hybridprune_megatron.config.schema import ModelConfig
    from hybridprune_megatron.huggingface.source import open_weights, same_bytes
    from tests.parity.ours import config_with

    (folder / "conf" / "model").mkdir(parents=True)
    arguments = [str(original), "--name", "twin", "--out", str(folder / "ours"), "--conf", str(folder / "conf")]
    arguments += ["--tower", str(tower), "--frame-size", "32"] if tower is not None else []
    convert(parse_arguments(arguments))
    found, before = open_weights(folder / "ours"), open_weights(original)
    assert all(same_bytes(found.read(name), before.read(name)) for name in before.names), "an import changed a weight"
    values: Any = OmegaConf.to_container(OmegaConf.load(folder / "conf" / "model" / "twin.yaml"))
    return config_with(ModelConfig.of({**values, "spec": "torch"})), len(found.names)


def with_budget(cfg: Any) -> Any:
    """The same at a budget."""
    from hybridprune_megatron.config import load_config

    if cfg.model.vision is None:
        return cfg
    return replace(cfg, reduction=load_config(["reduction=query", f"reduction.budget={BUDGET}"]).reduction)


def logit_difference(twin: str, cfg: Any, original: Path) -> float:
    """Largest difference of a logit from transformers', on packed texts of odd lengths."""
    import torch

    from tests.parity.ours import model_of, text_batch
    from tests.parity.twins import VOCAB, language_model

    lengths = [37, 1, 17, 16]
    batch, theirs = text_batch(lengths, VOCAB), language_model("12b" if twin == "video" else twin)
    with torch.no_grad():
        ours, _ = model_of(cfg).logits(batch)
        wanted = [theirs(input_ids=ids.unsqueeze(0)).logits[0] for ids in batch.input_ids.split(lengths)]
    return (ours - torch.cat(wanted)).abs().max().item()


def batch_of(cfg: Any) -> Any:
    """Clips where the model sees, else texts."""
    from tests.models.tiny import tiny_batch
    from tests.parity.ours import text_batch

    return tiny_batch(22, 9) if cfg.model.vision is not None else text_batch([36, 28], 90)


def trained(cfg: Any) -> str:
    """Losses before and after some steps of the engine."""
    import torch

    from hybridprune_megatron.engine.optimization import build_train_state
    from hybridprune_megatron.engine.train_step import train_step
    from tests.parity.ours import model_of

    cfg = replace(cfg, optim=replace(cfg.optim, lr=3e-3, warmup_steps=0))
    model = model_of(cfg)
    state = build_train_state(model, cfg.optim, cfg.trainer, cfg.parallel, torch.device("cpu"))
    batches = iter([batch_of(cfg)] * STEPS)
    losses = [train_step(state, batches, 1, cfg.data.sequence_length, step + 1).loss for step in range(STEPS)]
    assert losses[-1] < losses[0], f"training does not learn: {losses}"
    return f"loss {losses[0]:.2f} to {losses[-1]:.2f}"


def exported_plain(cfg: Any, original: Path, folder: Path) -> str:
    """Compares every byte of what comes out with what went in."""
    from hybridprune_megatron.export.plain import export_plain
    from hybridprune_megatron.huggingface.source import TensorFiles, same_bytes
    from tests.parity.ours import model_of

    export_plain(model_of(cfg), cfg, original, folder / "back")
    before, after = TensorFiles(original), TensorFiles(folder / "back")
    assert before.names == after.names, "an export has other tensors"
    assert all(same_bytes(before.read(name), after.read(name)) for name in before.names), "an export changed a weight"
    return "every byte"


def exported_reduced(cfg: Any, folder: Path) -> float:
    """Largest difference of a logit between the training model and its reduced export, read by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    from hybridprune_megatron.export.write import export_model
    from hybridprune_megatron.method.layout import TokenKind
    from studies.demo.parity import max_logit_difference
    from tests.models.tiny import tiny_sample
    from tests.parity.ours import model_of

    model = model_of(cfg)
    export_model(model, cfg, folder / "reduced")
    exported = AutoModelForCausalLM.from_pretrained(folder / "reduced", trust_remote_code=True).eval()
    frames = 22 if cfg.model.vision is not None else 0
    samples = []
    for sample in (tiny_sample(1, frames), tiny_sample(2, frames)):
        shown = torch.tensor(sample.layout.kinds()) == TokenKind.FRAME
        # Text is none of the special tokens.
        ids = torch.where(shown, exported.config.image_token_id, 100 + sample.input_ids)
        samples.append(replace(sample, input_ids=ids))
    return max_logit_difference(model, exported, samples)


if __name__ == "__main__":
    main(sys.argv[1:])
