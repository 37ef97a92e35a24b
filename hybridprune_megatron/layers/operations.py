"""The unit of the cost model: operations and bytes of one piece of work, and the matrix product that most work is.

Conventions, everywhere in this package:

- ``flops``: 2 per multiply-add of matrix products, convolutions, scans and attention, as far as the mathematics needs
  them: a causal product counts the pairs j <= i only. Elementwise work counts bytes, no operations.
- ``executed``: what the plain torch implementation multiplies: full squares of the causal attention and of the chunks
  of the scan, zeros between the samples of a convolution. It is what ``torch.utils.flop_counter`` reports (tests hold
  the two equal).
- ``bytes``: weights and every named operation's inputs and outputs once, in the run's precision, as if each operation
  were one fused kernel; nothing of caches between operations.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# Bytes of one number by trainer.precision.
WIDTH = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Cost:
    """Work of one piece; adds up with ``+`` and ``sum_costs``.

    Attributes:
        flops: operations that the mathematics needs.
        executed: operations of the plain torch implementation, as a profiler counts them.
        bytes: memory traffic.
    """

    flops: int = 0
    executed: int = 0
    bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.executed + other.executed, self.bytes + other.bytes)

    def times(self, count: int) -> Cost:
        """The same piece ``count`` times."""
        return Cost(self.flops * count, self.executed * count, self.bytes * count)


def sum_costs(costs: Iterable[Cost]) -> Cost:
    """The sum; nothing costs nothing."""
    return sum(costs, Cost())


def linear(rows: int, inputs: int, outputs: int, width: int) -> Cost:
    """[rows, inputs] times [inputs, outputs], without a bias or with one (whose addition is elementwise).

    Args:
        rows: tokens.
        inputs: width of the input.
        outputs: width of the output.
        width: bytes of a number.
    """
    flops = 2 * rows * inputs * outputs
    return Cost(flops, flops, width * (rows * inputs + inputs * outputs + rows * outputs))


def elementwise(numbers: int, width: int) -> Cost:
    """Numbers that are read or written outside of a product.

    Args:
        numbers: how many, reads and writes together.
        width: bytes of a number.
    """
    return Cost(bytes=numbers * width)


def causal_pairs(length: int) -> int:
    """Pairs (i, j) of a sequence with j <= i."""
    return length * (length + 1) // 2


def most_similar_cost(rows: int, candidates: int, hidden: int, width: int) -> Cost:
    """Cosines of all rows with all candidates; blocks of them, in fp32, are written and read once.

    Args:
        rows: vectors that are matched.
        candidates: vectors that they are matched to.
        hidden: their width.
        width: bytes of a number of theirs.
    """
    flops = 2 * rows * candidates * hidden
    return Cost(flops, flops, width * (rows + candidates) * hidden + 2 * WIDTH["fp32"] * rows * candidates)
