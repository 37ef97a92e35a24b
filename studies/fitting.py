"""How many frames a packed sequence holds by budget, counted by tokens and by cost: docs/fitting.png and a table.

python -m studies.fitting

Clips of 10 to 300 seconds (log-uniform, seed 0) as the 12B model's experiment reads them, two frames a second, here up
to 512, packed to 16,384; nothing is decoded and no model is built. ``data.too_long=shrink`` throughout.
"""

from __future__ import annotations

import io
import math
import random
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from hybridprune_megatron.config import Config, parse_command_line
from hybridprune_megatron.cost.prefill import Prompt, prefill_cost
from hybridprune_megatron.data.sample_encoder import SampleEncoder
from hybridprune_megatron.data.task_encoder import samples_by_pack
from hybridprune_megatron.evaluation.figure import new_figure

ROOT = Path(__file__).resolve().parents[1]
BUDGETS = (1.0, 0.5, 0.35, 0.25, 0.15)
LENGTH, CLIPS, BUFFER = 16_384, 96, 32
_QUESTION = "<video>\nWhat happens first, and what does it lead to?"


@dataclass(frozen=True)
class Filling:
    """What packed sequences hold on average.

    Attributes:
        frames: of one sequence.
        per_clip: of one clip.
        operations: of the language model's prefill of one sequence, its clips one after another.
    """

    frames: float
    per_clip: float
    operations: float


def clip(seconds: float) -> bytes:
    """A small grey video of two frames a second."""
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=2, options={"preset": "ultrafast"})
        stream.height = stream.width = 16
        stream.pix_fmt = "yuv420p"
        for _ in range(round(2 * seconds)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def configured(budget: float, counts: str) -> Config:
    """The 12B model's experiment at a budget."""
    return parse_command_line(
        [
            *("experiment=nemotron_nano_12b_v2_vl", "parallel=single", "trainer.devices=1", "trainer.num_nodes=1"),
            *(f"data.tokenizer={ROOT / 'assets/demo/tokenizer'}", "data.too_long=shrink", "data.max_frames=512"),
            *(f"data.sequence_length={LENGTH}", f"data.length_counts={counts}", "model.max_sequence_length=1048576"),
            *(["reduction=none"] if budget == 1 else [f"reduction.budget={budget}"]),
        ],
        need_files=False,
    )


def filling(cfg: Config, clips: list[bytes]) -> Filling:
    """What the clips' packed sequences hold."""
    encoder = SampleEncoder(cfg)
    messages = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": "A door opens."}]
    layouts = [encoder.draft(str(number), messages, [each])[0].layout for number, each in enumerate(clips)]
    sequences = 0
    for start in range(0, len(layouts), BUFFER):
        waiting = layouts[start : start + BUFFER]
        sequences += len(samples_by_pack([encoder.counted(layout) for layout in waiting], LENGTH))
    frames = [sum(layout.frames_per_video()) for layout in layouts]
    operations = 0.0
    for layout, shown in zip(layouts, frames):
        text = layout.num_tokens - layout.num_visual
        prompt = Prompt(layout.num_visual, text, 30, shown)
        prefill = prefill_cost(cfg.model, cfg.reduction, cfg.retention_by_layer, prompt, cfg.trainer.precision)
        operations += prefill.reduced.flops
    return Filling(sum(frames) / sequences, sum(frames) / len(frames), operations / sequences)


def main() -> None:
    """Prints the table and draws the figure."""
    draw = random.Random(0)
    clips = [clip(math.exp(draw.uniform(math.log(10), math.log(300)))) for _ in range(CLIPS)]
    found = {
        counts: [filling(configured(budget, counts), clips) for budget in BUDGETS] for counts in ("tokens", "cost")
    }
    base = found["tokens"][0]
    print("| budget | by tokens: frames | of a clip | operations | by cost: frames | of a clip | operations |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row, budget in enumerate(BUDGETS):
        cells = [
            f"{each.frames:.0f} | {each.per_clip:.0f} | {each.operations / base.operations:.2f}"
            for each in (found["tokens"][row], found["cost"][row])
        ]
        print(f"| {budget:g} | {' | '.join(cells)} |")
    figure = new_figure(8, 3.2)
    frames, operations = figure.subplots(1, 2)
    for counts, colour in (("tokens", "#999999"), ("cost", "#0072B2")):
        label = f"data.length_counts={counts}"
        frames.plot(BUDGETS, [each.frames for each in found[counts]], "o-", color=colour, label=label)
        shares = [each.operations / base.operations for each in found[counts]]
        operations.plot(BUDGETS, shares, "o-", color=colour, label=label)
    frames.set(title="Frames of a packed sequence", xlabel="budget")
    operations.set(title="Its operations, over those of every token", xlabel="budget")
    for axes in (frames, operations):
        axes.invert_xaxis()
        axes.set_ylim(bottom=0)
    frames.legend(frameon=False)
    figure.savefig(ROOT / "docs" / "fitting.png")
    print("docs/fitting.png")


if __name__ == "__main__":
    main()
