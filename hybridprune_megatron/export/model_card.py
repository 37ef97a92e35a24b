"""The README of an export."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridprune_megatron.config.checkpoint_folder import RUN_FILE, read_run_file
from hybridprune_megatron.config.json_text import read_json
from hybridprune_megatron.config.schema import Config
from hybridprune_megatron.engine.train_log import TRAIN_LOG, read_train_log
from hybridprune_megatron.export.transformers_range import TRANSFORMERS_RANGE

_LOSSES = 10


@dataclass(frozen=True)
class RunFacts:
    """Facts of a run; what is not known is None or empty.

    Attributes:
        step: optimizer steps.
        samples: packed sequences that these steps consumed.
        commit: of this project's code when the checkpoint was saved.
        versions: of packages, by name.
        loss: mean over the last ten steps up to the checkpoint, or over all if they are fewer.
        accuracy: share of right answers (0 to 1), by what was measured.
    """

    step: int | None = None
    samples: int | None = None
    commit: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    loss: float | None = None
    accuracy: Mapping[str, float] = field(default_factory=dict)


def read_facts(checkpoint: Path) -> RunFacts:
    """Reads ``run.json``, and the run's ``train_log.jsonl`` and ``report.json`` (of `make demo`) where they are.

    Args:
        checkpoint: a ``step_<n>`` folder of a run; for bare weights nothing is known.
    """
    if not (checkpoint / RUN_FILE).is_file():
        return RunFacts()
    header, run = read_run_file(checkpoint), checkpoint.parent.parent
    step = header.get("step")
    log, report = run / TRAIN_LOG, run / "report.json"
    rows = read_train_log(log) if log.is_file() and _is_number(step) else []
    losses = [row["loss"] for row in rows if _is_number(row.get("loss")) and row.get("step", math.inf) <= step]
    found = read_json(report) if report.is_file() else {}
    # A report of other steps is of another checkpoint.
    same = isinstance(found, dict) and step is not None and found.get("steps") == step
    return RunFacts(
        step=step if _is_number(step) else None,
        samples=header["consumed_samples"] if _is_number(header.get("consumed_samples")) else None,
        commit=header["commit"] if isinstance(header.get("commit"), str) else None,
        versions={name: str(version) for name, version in _group(header, "versions")},
        loss=sum(losses[-_LOSSES:]) / len(losses[-_LOSSES:]) if losses else None,
        accuracy={name: share for name, share in _group(found if same else {}, "accuracy") if _is_number(share)},
    )


def _group(values: Mapping[str, Any], name: str) -> Iterable[tuple[str, Any]]:
    """The entries of a group; none where it is something else: a card says what is known."""
    group = values.get(name)
    return group.items() if isinstance(group, dict) else ()


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


_HEAD = """---
library_name: transformers
pipeline_tag: video-text-to-text
license: other
---
# {name}

A hybrid Mamba-2, attention and MLP language model ({pattern}){vision}, exported from hybridprune_megatron.

"""

_REDUCED = """It drops visual tokens inside its layers, once, in prefill; decoding continues over the shortened caches.
"""

_PLAIN = """The layout is the one that the weights came in: engines that load that run this, and nothing is dropped.
It was finetuned under the reduction below.
"""

_LICENCE = """
Licence: the code of hybridprune_megatron is Apache-2.0. The weights have the licence of the model that they were
trained from, and of the data.
"""

_REDUCED_USE = """
```python
from transformers import AutoModelForCausalLM, AutoProcessor

model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What happens?"}]}]
text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
inputs = processor(text=text, videos=["clip.mp4"], return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=32, return_dict_in_generate=True, output_reduction=True)
print(processor.batch_decode(out.sequences[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)[0])
print(out.past_key_values.reduction.budgets())

# A second question over the shortened caches: it sees what the first one kept.
inputs = processor.next_turn(out.sequences, "And then?")
more = model.generate(**inputs, max_new_tokens=32, past_key_values=out.past_key_values)
```

`from_pretrained(folder, trust_remote_code=True, reduction=None)` turns the reduction off,
`reduction={"budget": 0.5}` solves it again.

"""


def model_card(cfg: Config, facts: RunFacts, dt_limit: str, reduced: bool = True) -> str:
    """The card of a run's export.

    Args:
        cfg: configuration of the run.
        facts: what else is known of it.
        dt_limit: range of the Mamba layers' step size that the weights expect, in words.
        reduced: whether the folder has the reduced model's code; False: the layout that the weights came in.
    """
    vision = cfg.model.vision
    frames = f" with a RADIO vision tower, {vision.tokens_per_frame} tokens a frame" if vision is not None else ""
    pattern = cfg.model.hybrid_pattern.replace("|", "")
    card = _HEAD.format(name=_cell(cfg.model.name), pattern=pattern, vision=frames)
    card += _REDUCED if reduced else _PLAIN
    reduction = {
        "budget (mean share of visual tokens over all layers)": f"{cfg.reduction.budget}",
        "score": cfg.reduction.score.name,
        "layers that drop": f"{cfg.reduction.layers}",
        "share that enters the last layer": f"{cfg.retention_by_layer[-1]:.4f}",
    }
    card += f"\n{_table('reduction', reduction)}\n{_table('training', _training(cfg, facts))}"
    if reduced:
        card += _REDUCED_USE
        card += f"The code in this folder needs torch, `transformers{TRANSFORMERS_RANGE}` and PyAV (`av`), "
        card += "and Pillow for images.\n"
    card += (
        f"\nStep size dt of the Mamba layers: {dt_limit}. transformers' own `nemotron_h` clamps it to 0.001 and more.\n"
    )
    return card + _LICENCE


def _training(cfg: Config, facts: RunFacts) -> dict[str, str]:
    """Rows about the run; no path of the machine that it ran on."""
    known = {
        "trained from": Path(cfg.model.init_checkpoint).name if cfg.model.init_checkpoint else "random weights",
        "data": Path(cfg.data.train).name if cfg.data.train else None,
        "steps": facts.step,
        "packed sequences": facts.samples,
        "loss, mean of the last steps": None if facts.loss is None else f"{facts.loss:.4f}",
        **{f"accuracy, {name.replace('_', ' ')}": f"{100 * share:.1f} %" for name, share in facts.accuracy.items()},
        "commit of hybridprune_megatron": facts.commit,
        "versions": ", ".join(f"{name} {number}" for name, number in facts.versions.items()) or None,
    }
    return {name: str(value) for name, value in known.items() if value is not None}


def _table(title: str, rows: dict[str, str]) -> str:
    lines = [f"| {_cell(name)} | {_cell(value)} |\n" for name, value in rows.items()]
    return "".join([f"| {title} | |\n| --- | --- |\n", *lines])


def _cell(text: str) -> str:
    """A text that stays in its place: names come from folders and from other people's runs."""
    return "".join(each if each.isprintable() and each != "|" else " " for each in text)[:200]
