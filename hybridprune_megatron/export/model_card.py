"""The README of an export."""

from __future__ import annotations

from pathlib import Path

from hybridprune_megatron.config.schema import Config
from hybridprune_megatron.export.run_facts import RunFacts
from hybridprune_megatron.export.transformers_range import TRANSFORMERS_RANGE

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
