"""The cheaper choice under context parallelism: every rank drops among the tokens that it holds, and no row moves.

A packed sequence lies in chunks of one length (``models/context.py``). The chunks stay of one length if each drops as
many tokens as the others, so a chunk with more text keeps fewer visual tokens. How many is arithmetic on the host; only
which ones depends on scores. What is kept is not what one rank alone would keep: tokens compete within their chunk.

Letters: K chunks, S samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from hybridprune_megatron.method.layout import SampleLayout, TokenKind

#: Visual tokens of every sample in every chunk: K rows of S numbers.
Quotas = tuple[tuple[int, ...], ...]


def competing_runs(present: Quotas, kept: Quotas) -> list[tuple[int, int]]:
    """Runs of visual tokens that compete, and how many of each stay, in the order of the packed sequence.

    Args:
        present: visual tokens of every sample in every chunk.
        kept: those that stay.
    """
    # A sample's runs in chunk order; samples and chunks rise together.
    return [run for columns in zip(zip(*present), zip(*kept)) for run in zip(*columns)]


def local_quotas(
    samples: Sequence[SampleLayout], counts_by_layer: Sequence[Sequence[int]], num_chunks: int, multiple_of: int
) -> tuple[Quotas, ...]:
    """Divides the counts of a global choice over chunks.

    Args:
        samples: the packed samples before any reduction.
        counts_by_layer: S numbers of visual tokens that would enter each layer; the first are all.
        num_chunks: K; divides the length.
        multiple_of: of the packed length in every layer; a multiple of K.

    Returns:
        Quotas for every layer, with the same packed lengths, but for layers in which some chunk holds more text than a
        chunk would be long: there all chunks keep more.
    """
    text, present = _composition(samples, num_chunks)
    unit = multiple_of // num_chunks
    longest_text = max(map(sum, text))
    originals = present
    by_layer = [present]
    for before, counts in pairwise(counts_by_layer):
        if tuple(before) != tuple(counts):
            wanted = (sum(map(sum, text)) + sum(counts)) // num_chunks
            length = max(wanted, -(-longest_text // unit) * unit)
            shares = [count / max(sample.num_visual, 1) for count, sample in zip(counts, samples)]
            present = tuple(
                _share_out(length - sum(texts), [share * number for share, number in zip(shares, original)], row)
                for texts, original, row in zip(text, originals, present)
            )
        by_layer.append(present)
    return tuple(by_layer)


def _composition(samples: Sequence[SampleLayout], num_chunks: int) -> tuple[Quotas, Quotas]:
    """Text and visual tokens of every sample in every chunk."""
    total = sum(sample.num_tokens for sample in samples)
    length = total // num_chunks
    text = [[0] * len(samples) for _ in range(num_chunks)]
    visual = [[0] * len(samples) for _ in range(num_chunks)]
    position = 0
    for number, sample in enumerate(samples):
        for span in sample.spans:
            table = visual if span.kind == TokenKind.FRAME else text
            left = span.num_tokens
            while left:
                chunk = position // length
                fits = min(left, (chunk + 1) * length - position)
                table[chunk][number] += fits
                position, left = position + fits, left - fits
    return tuple(map(tuple, text)), tuple(map(tuple, visual))


def _share_out(total: int, wanted: Sequence[float], most: Sequence[int]) -> tuple[int, ...]:
    """Whole numbers up to ``most`` with a given sum, near to ``wanted`` times one factor; earlier samples win ties."""
    total = min(total, sum(most))
    given = [0] * len(most)
    while (left := total - sum(given)) > 0:
        open_ones = [index for index, number in enumerate(given) if number < most[index]]
        weight = sum(wanted[index] for index in open_ones)
        exact = [left * (wanted[index] / weight if weight else 1 / len(open_ones)) for index in open_ones]
        whole = [min(int(each), most[index] - given[index]) for index, each in zip(open_ones, exact)]
        for index, number in zip(open_ones, whole):
            given[index] += number
        if not any(whole):
            # What is left over goes to the largest fractions, one each.
            order = sorted(range(len(open_ones)), key=lambda place: exact[place], reverse=True)
            for place in order[:left]:
                given[open_ones[place]] += 1
    return tuple(given)
