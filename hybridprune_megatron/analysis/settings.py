"""What an analysis is asked to do. Nothing slow is imported, so that a wrong value is reported at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from hybridprune_megatron.bounds import Count, Range, Whole, check_bounds
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
    probe_samples: Whole = 64
    label: str = "colour"
    question: str | None = None

    def __post_init__(self) -> None:
        check_bounds("", self)
        if self.probe_samples != 0 and self.probe_samples < FEWEST_PROBED:
            allowed = f"must be 0 (no probe) or at least {FEWEST_PROBED}"
            raise fail("probe_samples", self.probe_samples, allowed, "set e.g. probe_samples=64")
        check_paths(checkpoint=self.checkpoint, data=self.data)
