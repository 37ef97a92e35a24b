"""The README of an export."""

from __future__ import annotations

from importlib.metadata import version

from hybridprune_megatron.config.schema import Config

_TEMPLATE = """---
library_name: transformers
pipeline_tag: video-text-to-text
---
# {name}

A hybrid Mamba-2, attention and MLP language model ({pattern}){vision}, exported from hybridprune_megatron.

It drops visual tokens inside its layers, once, in prefill; decoding goes on over the shortened caches.

| reduction | |
| --- | --- |
| budget (mean share of visual tokens over all layers) | {budget} |
| score | {scorer} |
| layers that drop | {layers} |
| share that enters the last layer | {last:.4f} |

```python
from transformers import AutoModelForCausalLM, AutoProcessor

model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
messages = [{{"role": "user", "content": [{{"type": "video"}}, {{"type": "text", "text": "What happens?"}}]}}]
text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
inputs = processor(text=text, videos=["clip.mp4"], return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=32)[:, inputs["input_ids"].shape[1]:]
print(processor.batch_decode(answer, skip_special_tokens=True)[0])
```

`from_pretrained(folder, trust_remote_code=True, reduction=None)` turns the reduction off,
`reduction={{"budget": 0.5}}` solves it again.

The code in this folder needs torch, transformers {transformers} and PyAV (`av`), nothing else.

The step size dt of the Mamba layers is not clamped (`time_step_limit` (0, inf), as in megatron).
"""


def model_card(cfg: Config) -> str:
    """The card of a run's export."""
    vision = cfg.model.vision
    frames = f" with a RADIO vision tower, {vision.tokens_per_frame} tokens a frame" if vision is not None else ""
    return _TEMPLATE.format(
        name=cfg.model.name,
        pattern=cfg.model.hybrid_pattern.replace("|", ""),
        vision=frames,
        budget=cfg.reduction.budget,
        scorer=cfg.reduction.scorer,
        layers=cfg.reduction.layers,
        last=cfg.retention_by_layer[-1],
        transformers=version("transformers"),
    )
