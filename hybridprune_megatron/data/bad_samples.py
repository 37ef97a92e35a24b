"""Skips bad samples, counts them by reason, and ends the job when there are too many."""

from __future__ import annotations

import logging
import re
from bisect import bisect_right
from collections import Counter
from itertools import accumulate
from typing import Any, NoReturn

from megatron.energon import SourceInfo
from megatron.energon.errors import FatalSampleError, SkipSample
from megatron.energon.flavors.webdataset.sample_loader import WebdatasetSampleLoaderDataset

from hybridprune_megatron.config.stores import StoreError
from hybridprune_megatron.data.energon_sets import plain_path
from hybridprune_megatron.data.sample_encoder import BadSampleError, MisfitError
from hybridprune_megatron.data.shards import is_sample_part
from hybridprune_megatron.data.tar_samples import Shard

logger = logging.getLogger(__name__)

#: A share of fewer samples than this says little: one bad sample among the first ten must not end a job.
MIN_SEEN = 1000
#: Examples of each reason that are logged; the rest is only counted.
MAX_LOGGED = 5
#: Samples that do not fit the configuration, with none that does: after these the configuration is wrong, not they.
_MISFITS = 3
#: Shards that a reader keeps open.
_MOST_OPEN = 16


#: Around the line of an error that ends the job: Energon and torch's loader processes write more around it.
_MARKS = ("<data error> ", " </data error>")


def fatal(line: str) -> FatalSampleError:
    """An error that Energon lets through, and ``fatal_line`` finds again."""
    return FatalSampleError(line.join(_MARKS))


def fatal_line(error: BaseException) -> str:
    """The line of ``fatal`` out of what was written or raised around it; of another error, all of it on one line."""
    inner: BaseException | None = error
    while inner is not None:
        match = re.search("(.*?)".join(_MARKS), str(inner), flags=re.DOTALL)
        if match:
            return " ".join(match[1].split())
        inner = inner.__cause__ or inner.__context__
    return " ".join(str(error).split())


def changed_data(error: Exception, *_: Any) -> NoReturn:
    """For Energon, where a sample that a saved state names is not what it was.

    Raises:
        FatalSampleError: with what to do. Another error than unreadable samples cause is a bug, and raised as it is.
    """
    # Energon asserts that a sample was read, and takes one that is skipped for a ValueError where it looks.
    if not isinstance(error, AssertionError | ValueError | SkipSample):
        raise error
    reason = fatal_line(error)[:200] or "it is left out now"
    raise fatal(
        f"a sample that the checkpoint names cannot be read again ({reason}): the data have changed; restore "
        "them, or start a new run"
    ) from error


class BadSampleTally:
    """Counts of one loader process.

    Args:
        max_share: of bad samples among all; more end the job.

    Attributes:
        seen: samples read.
        shrunk: those of them that lost frames or tiles to fit.
        bad: samples left out, by reason.
    """

    def __init__(self, max_share: float) -> None:
        self.max_share = max_share
        self.seen = self.shrunk = 0
        self.bad: Counter[str] = Counter()
        self._misfits = 0

    def skip(self, error: BadSampleError) -> SkipSample:
        """Counts a bad sample; raise what is returned.

        Raises:
            FatalSampleError: the share of bad samples is above what is allowed, or no sample fits the configuration.
                Energon lets it through.
        """
        self.bad[error.reason] += 1
        if self.bad[error.reason] <= MAX_LOGGED:
            logger.warning("left out (%s): %s", error.reason, error)
        total = self.bad.total()
        self._misfits += isinstance(error, MisfitError)
        too_many = total > self.max_share * max(self.seen, MIN_SEEN)
        if self._misfits == total == self.seen and (too_many or total == _MISFITS):
            raise fatal(str(error))
        # Where every sample may be bad, a data set without a good one would be read for ever.
        none_good = total >= self.seen >= MIN_SEEN
        if too_many or none_good:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.bad.items()))
            limit = f"above data.max_bad_share={self.max_share}; " if too_many else ""
            raise fatal(
                f"{total} of {self.seen} samples are bad ({reasons}), {limit}"
                f"the last one: {error}; fix the data or raise data.max_bad_share"
            )
        return SkipSample()

    def snapshot(self) -> dict[str, int]:
        """Counts so far: samples seen, shrunk, and left out by reason."""
        return {"seen": self.seen, **({"shrunk": self.shrunk} if self.shrunk else {}), **self.bad}


class ShardReader:
    """Stands for an Energon reader of shards, and gives None, which Energon skips, for a sample that cannot be read.

    Args:
        reader: says which shards there are, and which samples are left out on purpose.
        tally: counts what cannot be read.
    """

    def __init__(self, reader: Any, tally: BadSampleTally) -> None:
        self._folder = reader.base_path
        self._shards = reader.shard_infos
        self._keeps = reader.sample_filter
        self._ends = list(accumulate(shard.count for shard in self._shards))
        self._open: dict[int, Shard] = {}
        self._tally = tally

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        number = bisect_right(self._ends, index)
        info = self._shards[number]
        place = index - (self._ends[number] - info.count)
        try:
            key, parts = self._shard(number).sample(place, is_sample_part)
        except StoreError as error:
            # Not the sample's fault: leaving out what a store did not give would make another run of it.
            raise fatal(str(error)) from error
        except (ValueError, OSError, MemoryError) as error:
            self._tally.seen += 1
            self._tally.skip(BadSampleError("shard", f"number {place} of {info.path}", f"{error}"))
            return None
        where = f"{info.name}/{key}"
        if self._keeps is not None and not self._keeps(where):
            return None
        names = tuple(f"{key}.{part}" for part in parts)
        source = SourceInfo(dataset_path=self._folder, index=index, shard_name=where, file_names=names)
        return {
            **parts,
            "__key__": key,
            "__shard__": info.name,
            "__restore_key__": ("Webdataset", index),
            "__sources__": (source,),
        }

    def _shard(self, number: int) -> Shard:
        shard = self._open.pop(number, None) or Shard(plain_path(self._shards[number].path))
        self._open[number] = shard
        if len(self._open) > _MOST_OPEN:
            self._open.pop(next(iter(self._open))).close()
        return shard


def count_broken_shards(dataset: Any, tally: BadSampleTally) -> None:
    """Lets an Energon dataset skip and count what it cannot read of its shards; changes it in place.

    Without it such a sample ends the job: Energon's error handlers see only what comes after the reader.
    """
    if isinstance(dataset, WebdatasetSampleLoaderDataset):
        dataset.join_readers = [ShardReader(reader, tally) for reader in dataset.join_readers]
    for inner in getattr(dataset, "datasets", ()):
        count_broken_shards(inner, tally)
