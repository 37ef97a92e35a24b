"""How the data is shared: in as many streams as a step takes packed sequences, whatever the number of processes."""

from __future__ import annotations


def streams_of(rank: int, size: int, num_streams: int) -> range:
    """Streams that a data-parallel rank reads; its micro batches of a step come from them in this order.

    Stream ``j`` makes micro batch ``j`` of every step. So which samples a step sees, and in which order, does not
    depend on the number of ranks, and a stream's state is of use to whichever rank reads it next.

    Args:
        rank: data-parallel rank.
        size: number of data-parallel ranks.
        num_streams: ``trainer.global_batch_size``, a multiple of ``size``.
    """
    assert num_streams % size == 0, (num_streams, size)
    share = num_streams // size
    return range(rank * share, (rank + 1) * share)
