"""Skips bad samples, counts them by reason, and ends the job when there are too many."""

from __future__ import annotations

import logging
import re
import tarfile
from collections import Counter
from typing import Any

from megatron.energon.errors import FatalSampleError, SkipSample
from megatron.energon.flavors.webdataset.sample_loader import WebdatasetSampleLoaderDataset

from hybridprune_megatron.data.sample_encoder import BadSampleError

logger = logging.getLogger(__name__)

#: A share of fewer samples than this says little: one bad sample among the first ten must not end a job.
MIN_SEEN = 1000
#: Examples of each reason that are logged; the rest is only counted.
MAX_LOGGED = 5


#: Around the line of an error that ends the job: Energon and torch's loader processes write more around it.
_MARKS = ("<data error> ", " </data error>")


def fatal(line: str) -> FatalSampleError:
    """An error that Energon lets through, and ``fatal_line`` finds again."""
    return FatalSampleError(line.join(_MARKS))


def fatal_line(error: FatalSampleError) -> str:
    """The line of ``fatal`` out of what was written around it; of another error, all of it on one line."""
    match = re.search("(.*?)".join(_MARKS), str(error), flags=re.DOTALL)
    return match[1] if match else " ".join(str(error).split())


class BadSampleTally:
    """Counts of one loader process.

    Args:
        max_share: of bad samples among all; more end the job.

    Attributes:
        seen: samples read.
        bad: samples left out, by reason.
    """

    def __init__(self, max_share: float) -> None:
        self.max_share = max_share
        self.seen = 0
        self.bad: Counter[str] = Counter()

    def skip(self, error: BadSampleError) -> SkipSample:
        """Counts a bad sample; raise what is returned.

        Raises:
            FatalSampleError: the share of bad samples is above what is allowed. Energon lets it through.
        """
        self.bad[error.reason] += 1
        if self.bad[error.reason] <= MAX_LOGGED:
            logger.warning("left out (%s): %s", error.reason, error)
        total = self.bad.total()
        if total > self.max_share * max(self.seen, MIN_SEEN):
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.bad.items()))
            raise fatal(
                f"{total} of {self.seen} samples are bad ({reasons}), above data.max_bad_share={self.max_share}; "
                f"the last one: {error}; mend the data or raise data.max_bad_share"
            )
        return SkipSample()

    def snapshot(self) -> dict[str, int]:
        """Counts so far: samples seen, and left out by reason."""
        return {"seen": self.seen, **self.bad}


class _TolerantReader:
    """An Energon reader of shards that gives None, which Energon skips, for a sample that it cannot read."""

    def __init__(self, reader: Any, tally: BadSampleTally) -> None:
        self._reader = reader
        self._tally = tally

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> Any:
        try:
            return self._reader[index]
        except (tarfile.TarError, ValueError, OSError) as error:
            self._tally.seen += 1
            what = " ".join(f"{type(error).__name__}: {error}".split())
            self._tally.skip(BadSampleError("shard", f"number {index} of {self._reader.base_path}", what))
            return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)


def count_broken_shards(dataset: Any, tally: BadSampleTally) -> None:
    """Lets an Energon dataset skip and count what it cannot read of cut or overwritten shards; changes it in place.

    Without it such a sample ends the job: Energon's error handlers see only what comes behind the reader.
    """
    if isinstance(dataset, WebdatasetSampleLoaderDataset):
        dataset.join_readers = [_TolerantReader(reader, tally) for reader in dataset.join_readers]
    for inner in getattr(dataset, "datasets", ()):
        count_broken_shards(inner, tally)
