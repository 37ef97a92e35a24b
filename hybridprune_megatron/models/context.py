"""Context parallelism: a packed sequence shared by ranks, and how its tokens move between them.

A sequence of L tokens is cut into 2c chunks of one length for c ranks; rank r holds chunks r and 2c - 1 - r, so that
causal attention costs every rank about the same. What the ranks send each other:

- attention: keys and values are gathered, every rank attends with its own queries;
- Mamba: tokens are exchanged for heads before the convolution and heads for tokens after the scan;
- a drop: every rank makes the plan that one rank alone would make, and rows move to where they belong then;
- the loss: rows with a label are dealt out evenly.

With one rank everything here returns what it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    all_to_all,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor


class ContextShard:
    """This rank's part of packed sequences.

    Args:
        group: the context-parallel group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size, self.rank = group, group.size(), group.rank()
        chunks = range(2 * self.size)
        # Chunks of the sequence in the order of the ranks that hold them, and where each is in that order.
        self._by_rank = sorted(chunks, key=lambda chunk: (self._holder(chunk), chunk))
        self._in_sequence = sorted(chunks, key=self._by_rank.__getitem__)

    @property
    def multiple_of(self) -> int:
        """What the length of a packed sequence must divide by."""
        return 2 * self.size if self.size > 1 else 1

    def _holder(self, chunk: int) -> int:
        return min(chunk, 2 * self.size - 1 - chunk)

    def _chunk(self, length: int) -> int:
        assert length % self.multiple_of == 0, f"{length} tokens in {self.multiple_of} chunks"
        return length // (2 * self.size)

    def parts(self, length: int) -> list[slice]:
        """Where this rank's tokens stand in a sequence of a length, in their order here."""
        if self.size == 1:
            return [slice(0, length)]
        chunk = self._chunk(length)
        return [slice(number * chunk, (number + 1) * chunk) for number in (self.rank, 2 * self.size - 1 - self.rank)]

    def cut(self, values: Tensor) -> Tensor:
        """[L, ...] -> [L / c, ...], this rank's tokens; differentiable."""
        return values if self.size == 1 else torch.cat([values[part] for part in self.parts(len(values))])

    def joined(self, values: Tensor) -> Tensor:
        """[L / c, ...] of every rank -> [L, ...]; the gradients of all ranks are added."""
        if self.size == 1:
            return values
        gathered = gather_from_sequence_parallel_region(values.contiguous(), group=self.group)
        return self._reorder(gathered, self._in_sequence)

    def to_heads(self, values: Tensor) -> Tensor:
        """[L / c, c * w], w channels for every rank -> [L, w], this rank's channels of all tokens."""
        sent = values.unflatten(1, (self.size, -1)).transpose(0, 1).flatten(0, 1)
        return self._reorder(all_to_all(self.group, sent), self._in_sequence)

    def to_tokens(self, values: Tensor) -> Tensor:
        """The reverse of ``to_heads``: [L, w] -> [L / c, c * w]."""
        received = all_to_all(self.group, self._reorder(values, self._by_rank))
        return received.unflatten(0, (self.size, -1)).transpose(0, 1).flatten(1)

    def _reorder(self, values: Tensor, chunks: list[int]) -> Tensor:
        parts = values.chunk(2 * self.size)
        return torch.cat([parts[chunk] for chunk in chunks])

    def exchange(self, values: Tensor, kept: Tensor, length: int) -> Tensor:
        """Leaves out tokens and moves the others so that every rank holds as many as the others; differentiable.

        Every row travels at most once, from the rank that has it to the one that is to have it. How many go where
        depends on what is kept, so here, and only here, the host waits for the device: for c * c numbers.

        Args:
            values: [L / c, ...], this rank's tokens.
            kept: int64 [L'], rising, what stays of the whole sequence, the same on every rank.
            length: L.

        Returns:
            [L' / c, ...].
        """
        if self.size == 1:
            return values.index_select(0, kept)
        source, rows = self._place(kept, length)
        target, _ = self._place(torch.arange(len(kept), device=kept.device), len(kept))
        # Not torch.bincount, which waits once more, for the highest number.
        moves = torch.zeros(self.size**2, dtype=torch.int64, device=kept.device)
        counts = moves.index_add_(0, source * self.size + target, torch.ones_like(source)).view(self.size, -1).tolist()
        # Tokens that leave from here, by their rank to be and in order; the others after them.
        leaving = torch.where(source == self.rank, target, self.size).argsort(stable=True)[: sum(counts[self.rank])]
        sent = values.index_select(0, rows[leaving])
        received = all_to_all(self.group, sent, [row[self.rank] for row in counts], counts[self.rank])
        # Rows arrive by the rank that had them and in order.
        arrival = self.cut(source).argsort(stable=True)
        place = torch.empty_like(arrival).scatter_(0, arrival, torch.arange(len(arrival), device=arrival.device))
        return received.index_select(0, place)

    def kept_here(self, values: Tensor, kept: Tensor, length: int) -> Tensor:
        """``exchange`` where every rank keeps as many of its tokens as the others, so that none moves."""
        _, rows = self._place(self.cut(kept), length)
        return values.index_select(0, rows)

    def _place(self, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """int64: the rank that holds each token of a sequence of a length, and its row there."""
        chunk = self._chunk(length)
        number = positions // chunk
        second = number >= self.size
        holder = torch.where(second, 2 * self.size - 1 - number, number)
        return holder, positions - number * chunk + torch.where(second, chunk, 0)

    def rows_everywhere(self, values: Tensor, index: Tensor, length: int) -> Tensor:
        """Some tokens' rows, on every rank; no gradient.

        Args:
            values: [L / c, ...], this rank's tokens.
            index: int64 [R] in [0, L).
            length: L.

        Returns:
            [R, ...].
        """
        rows = self._rows_here(values, index, length)
        if self.size > 1:
            dist.all_reduce(rows, group=self.group)
        return rows

    def rows_dealt(self, values: Tensor, index: Tensor, length: int) -> tuple[Tensor, slice]:
        """Some tokens' rows, every rank as many of them as the others, but for the last ranks; differentiable.

        Args: as for ``rows_everywhere``.

        Returns:
            [r, ...] and which of the R rows these are.
        """
        rows = self._rows_here(values, index, length)
        if self.size == 1:
            return rows, slice(0, len(index))
        each = -(-len(index) // self.size)
        filled = torch.cat([rows, rows.new_zeros(each * self.size - len(index), *rows.shape[1:])])
        start = min(self.rank * each, len(index))
        stop = min(start + each, len(index))
        dealt = reduce_scatter_to_sequence_parallel_region(filled, group=self.group)
        return dealt[: stop - start], slice(start, stop)

    def _rows_here(self, values: Tensor, index: Tensor, length: int) -> Tensor:
        """[R, ...]: rows of the tokens that this rank holds, zeros for the others."""
        if self.size == 1:
            return values.index_select(0, index)
        holder, rows = self._place(index, length)
        here = (holder == self.rank).view(-1, *[1] * (values.dim() - 1))
        return torch.where(here, values.index_select(0, rows), 0)

    def keys(self, length: int, device: torch.device) -> ContextKeys | None:
        """Which keys of a sequence of a length are here; None: all."""
        return ContextKeys(self, length, device) if self.size > 1 else None


def dealt_out(work: Callable[[Tensor], Tensor], items: Tensor, groups: Iterable[dist.ProcessGroup]) -> Tensor:
    """Work on independent items, dealt out to ranks; the gradients that the ranks have of the results are added.

    Args:
        work: [n, ...] -> [n, ...].
        items: [N, ...], the same on every rank.
        groups: to deal them out to, by choice: the first that has an item for each of its ranks. If none has, every
            rank does all the work.

    Returns:
        [N, ...], what ``work`` makes of all of them, on every rank.
    """
    group = next((each for each in groups if 1 < each.size() <= len(items)), None)
    if group is None:
        return work(items)
    size, rank = group.size(), group.rank()
    each, more = divmod(len(items), size)
    counts = [each + (other < more) for other in range(size)]
    start = sum(counts[:rank])
    done = work(items[start : start + counts[rank]])
    longest = max(counts)
    filled = torch.cat([done, done.new_zeros(longest - len(done), *done.shape[1:])])
    gathered = gather_from_sequence_parallel_region(filled, group=group).unflatten(0, (size, longest))
    return torch.cat([part[:count] for part, count in zip(gathered, counts)])


class ContextKeys:
    """Keys of one rank, as ``method.signals.HeldKeys`` wants them."""

    def __init__(self, shard: ContextShard, length: int, device: torch.device) -> None:
        self._shard = shard
        self._parts = shard.parts(length)
        self.positions = torch.cat([torch.arange(part.start, part.stop, device=device) for part in self._parts])

    def rows(self, first: int, last: int) -> list[slice]:
        """See ``HeldKeys``."""
        found, row = [], 0
        for part in self._parts:
            start, stop = max(first, part.start), min(last, part.stop)
            if start < stop:
                found.append(slice(row + start - part.start, row + stop - part.start))
            row += part.stop - part.start
        return found

    def total(self, log_sums: Tensor) -> Tensor:
        """See ``HeldKeys``."""
        gathered = gather_from_sequence_parallel_region(log_sums.contiguous(), group=self._shard.group)
        return gathered.unflatten(0, (self._shard.size, -1)).logsumexp(0)

    def everywhere(self, values: Tensor) -> Tensor:
        """See ``HeldKeys``."""
        return self._shard.joined(values)
