"""Which samples share a packed sequence."""

from __future__ import annotations

from collections.abc import Sequence


def samples_by_pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First fit by falling length: full sequences leave less padding, and ranks less to wait for each other.

    Args:
        lengths: tokens of the samples in order of arrival, none above the capacity.
        capacity: tokens of a packed sequence.

    Returns:
        Numbers of the samples of every pack, rising; packs in the order in which their first sample arrived.
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for sample in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length = lengths[sample]
        place = next((place for place, left in enumerate(room) if left >= length), None)
        if place is None:
            packs.append([sample])
            room.append(capacity - length)
        else:
            packs[place].append(sample)
            room[place] -= length
    return sorted(sorted(pack) for pack in packs)
