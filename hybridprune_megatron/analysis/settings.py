"""What an analysis is asked to do. Nothing slow is imported, so that a wrong value is reported at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from hybridprune_megatron.bounds import Count, OneOf, Range, Whole, check_bounds
from hybridprune_megatron.checks import fail
from hybridprune_megatron.config.own_keys import check_paths

#: Fewer clips are too few for a probe's folds.
FEWEST_PROBED = 20


@dataclass
class AnalysisSettings:
    """The keys of ``hybridprune analyze``; the line on each is also what ``--help`` prints.

    Attributes:
        checkpoint: folder of a run (newest checkpoint), of one checkpoint, or a .safetensors file with experiment=...
        data: folder of a data set (hybridprune shards or a make_*_data.py); null = data.validation of the run.
        out: folder for analysis.json, report.html and the figures; null = analysis/ in the run's output_dir.
        samples: videos that scores and kept tokens are averaged over.
        top: share of the visual tokens that counts as the top when two layers are compared, above 0 and below 1.
        strips: videos that are shown patch by patch.
        exposure_samples: videos over which each layer is closed to visual tokens in turn; 0 = not.
        probe_samples: videos that the probe is fitted and tested on; 0 = no probe.
        label: attribute of the needle that the probe looks for in data with needles: colour, shape, place, ...
        question: asked about every probed needle, its attributes in braces; null = the sample's own question.
    """

    checkpoint: str
    data: str | None = None
    out: str | None = None
    samples: Count = 64
    top: Annotated[float, Range(0, 1, above=True, below=True)] = 0.25
    strips: Whole = 3
    exposure_samples: Whole = 32
    probe_samples: Whole = 64
    label: str = "colour"
    question: str | None = None

    def __post_init__(self) -> None:
        check_bounds("", self)
        if self.probe_samples != 0 and self.probe_samples < FEWEST_PROBED:
            allowed = f"must be 0 (no probe) or at least {FEWEST_PROBED}"
            raise fail("probe_samples", self.probe_samples, allowed, "set e.g. probe_samples=64")
        check_paths(checkpoint=self.checkpoint, data=self.data)


SOLVED_BY = "hybridprune solve"
#: What it writes: a row per clip, and the result.
DAMAGES_FILE, SOLVED_FILE = "damages.jsonl", "solved.json"
#: Fewer clips: the solved list depends on which, for the damage has a heavy tail.
FEWEST_CLIPS = 128


@dataclass
class SolveSettings:
    """The keys of ``hybridprune solve``; the line on each is also what ``--help`` prints.

    Attributes:
        checkpoint: folder of a run (newest checkpoint), of one checkpoint, or a .safetensors file with experiment=...
        out: folder for damages.jsonl (one line per clip, resumed) and solved.json.
        data: folder of a data set that the answers are not judged on; null = data.train of the run.
        clips: half of them are solved from, half are checked on; at least 128.
        levels: shares that a layer may drop to, falling; 0 = as few tokens as the reduction allows.
        damage: log (log(1 + KL / 0.01) of a clip, steadier) or raw (KL).
        speedup: what the layers' operations are divided by, instead of reduction.budget; null = the budget.
    """

    checkpoint: str
    out: str
    data: str | None = None
    clips: Count = 2 * FEWEST_CLIPS
    levels: tuple[Annotated[float, Range(0, 1, below=True)], ...] = (0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05, 0.0)
    damage: Annotated[str, OneOf("log", "raw")] = "log"
    speedup: Annotated[float, Range(1, 1000, above=True, example=4)] | None = None

    def __post_init__(self) -> None:
        check_bounds("", self)
        if self.clips < FEWEST_CLIPS:
            raise fail("clips", self.clips, f"must be at least {FEWEST_CLIPS}", f"set clips={FEWEST_CLIPS} or more")
        if list(self.levels) != sorted(set(self.levels), reverse=True) or not self.levels:
            raise fail("levels", list(self.levels), "must fall", "set e.g. levels=[0.5,0.25,0.1,0]")
        check_paths(checkpoint=self.checkpoint, data=self.data)
