"""What an analysis is asked to do. Nothing slow is imported, so that a wrong value is reported at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated

from hybridprune_megatron.bounds import Count, Range, Whole, check_bounds, read_value
from hybridprune_megatron.checks import fail

#: Fewer clips are too few for a probe's folds.
FEWEST_PROBED = 20


@dataclass
class AnalysisSettings:
    """The keys of ``recipes/analyze.py``; the line on each is also what ``--help`` prints.

    Attributes:
        checkpoint: folder of a run (newest checkpoint), of one checkpoint, or a .safetensors file with experiment=...
        data: folder of a data set (scripts/make_shards.py or a make_*_data.py); null = data.validation of the run.
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
        for name in ("checkpoint", "data"):
            path = getattr(self, name)
            if path is not None and not Path(path).exists():
                raise fail(name, path, f"is not there (looked from {Path.cwd()})", f"set {name} to a file or folder")


def read_settings(overrides: Sequence[str]) -> tuple[AnalysisSettings, list[str]]:
    """Own keys from the command line, and what is left for the checkpoint's configuration.

    Args:
        overrides: ``key=value`` texts.

    Raises:
        ConfigError: one line on what is wrong.
    """
    names = {field.name for field in fields(AnalysisSettings)}
    own = [override for override in overrides if override.partition("=")[0] in names]
    rest = [override for override in overrides if override not in own]
    given = {override.partition("=")[0] for override in own}
    for field in fields(AnalysisSettings):
        if field.default is MISSING and field.name not in given:
            raise fail(field.name, None, "must be set", f"give {field.name}=<path>")
    texts = (override.partition("=") for override in own)
    return AnalysisSettings(**{name: read_value(name, text, AnalysisSettings, name) for name, _, text in texts}), rest


def settings_help() -> str:
    """A line a key."""
    lines = (AnalysisSettings.__doc__ or "").partition("Attributes:")[2].strip().splitlines()
    known = ((field.name, field.default) for field in fields(AnalysisSettings))
    defaults = {name: "" if value is MISSING or value is None else f" [{value}]" for name, value in known}
    shown = (line.strip().partition(": ") for line in lines)
    return "\n".join(f"  {name:<14}{text}{defaults[name]}" for name, _, text in shown)
