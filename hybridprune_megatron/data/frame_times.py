"""When the frames of a video are shown.

A decoder gives frames in the order in which they are shown; their times come from the container, which may have none,
give them to the wrong frames (AVI has decoding times only) or start them again (joined files). So the k-th frame gets
the k-th time: no frame is left out, and times rise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise

import av

from hybridprune_megatron.data.media import MediaError, check_size

#: Formats whose files may be joined end to end, clocks and all.
_BROADCAST = ("mpegts", "mpeg")
#: Seconds. Their clocks step every 0.7 s at least: a longer step is a join.
_LONGEST_STEP = 10
#: Their clocks have 33 bits and run over once a day.
_CLOCK = 2**33
#: Formats in which a packet may be marked as broken without a cut: joined transport streams count theirs anew.
_MARKS_JOINS = ("mpegts",)
#: Formats whose headers say how long all streams are.
_SAYS_DURATION = ("matroska,webm", "flv")


def listed_seconds(container: av.container.InputContainer, stream: av.VideoStream) -> list[float]:
    """The times that the container gives the frames of its video, without decoding.

    Returns:
        Rising, the first at 0. Frames that later decode to nothing are among them.

    Raises:
        MediaError: the file is cut, or has more frames than are read.
    """
    ticks: list[int | None] = []
    ends = [0] * len(container.streams)
    for packet in timed_packets(container, stream, container.format.name in _SAYS_DURATION):
        index = packet.stream_index
        if packet.pts is not None:
            ends[index] = max(ends[index], packet.pts + (packet.duration or 0))
        if index != stream.index:
            continue
        if packet.is_corrupt and container.format.name not in _MARKS_JOINS:
            raise MediaError("cut or damaged: part of a frame is missing")
        if packet.size and not packet.is_discard:
            ticks.append(packet.pts)
            check_size(len(ticks), stream.width, stream.height)
    end = max(tick * _fraction(each.time_base) for tick, each in zip(ends, container.streams) if each.time_base)
    _check_whole(container, stream, ticks, end)
    return seconds(ticks, stream)


def timed_packets(
    container: av.container.InputContainer, stream: av.VideoStream, others: bool = False
) -> Iterator[av.Packet]:
    """The packets of a video in order of decoding; where files were joined, the second's times follow the first's.

    The last packet is empty and flushes the decoder.

    Args:
        others: whether to give the packets of other streams too.
    """
    packets = container.demux() if others else container.demux(stream)
    return _one_clock(packets, stream) if container.format.name in _BROADCAST else packets


def _one_clock(packets: Iterator[av.Packet], stream: av.VideoStream) -> Iterator[av.Packet]:
    """Packets of a broadcast format, the clocks of joined files made one."""
    base = _fraction(stream.time_base)
    longest, period = round(_LONGEST_STEP / base), round(_period(stream) / base)
    shift, lead, decoded, newest = 0, 0, None, 0
    for packet in packets:
        if packet.pts is not None and packet.dts is not None:
            ahead = (packet.pts - packet.dts + _CLOCK // 2) % _CLOCK - _CLOCK // 2
            # FFmpeg gives the last frames before a join the times after it.
            lead = ahead if abs(ahead) <= longest else lead
            step = 0 if decoded is None else packet.dts + shift - decoded
            if 0 <= step + _CLOCK <= longest:
                shift += _CLOCK
            elif not 0 <= step <= longest:
                shift += newest + (packet.duration or period) - (packet.dts + shift + lead)
            decoded = packet.dts + shift
            newest = max(newest, decoded + lead)
            packet.pts = decoded + lead
        yield packet


def seconds(ticks: Sequence[int | None], stream: av.VideoStream) -> list[float]:
    """Times of frames in seconds, rising, the first at 0.

    Args:
        ticks: times in the stream's time base, one for each frame in the order in which they are shown.
        stream: gives the time base, and the frame rate for frames without a time of their own.
    """
    known = [tick for tick in ticks if tick is not None]
    if len(known) < len(ticks):
        # Raw streams carry no times; the nominal rate is all there is.
        return [float(index * _period(stream)) for index in range(len(ticks))]
    base = _fraction(stream.time_base)
    rising: Sequence[int | Fraction] = known
    if any(a >= b for a, b in pairwise(known)):
        rising = _repaired(known, _period(stream) / base)
    return [float((tick - rising[0]) * base) for tick in rising]


def _repaired(ticks: Sequence[int], period: Fraction) -> list[Fraction]:
    """In order; frames of the same time share the interval up to the next time."""
    counts = Counter(ticks)
    times = sorted(counts)
    stops = [*map(Fraction, times[1:]), times[-1] + counts[times[-1]] * period]
    return [
        time + (stop - time) * index / counts[time] for time, stop in zip(times, stops) for index in range(counts[time])
    ]


def _check_whole(
    container: av.container.InputContainer, stream: av.VideoStream, ticks: Sequence[int | None], end: Fraction
) -> None:
    """Refuses a file that ends before its index or its header says.

    Args:
        ticks: times of the frames.
        end: when the last packet of all those read ends, in seconds.

    Raises:
        MediaError: it was cut.
    """
    size = container.size or 0
    if any(entry.pos + entry.size > size for entry in stream.index_entries):
        raise MediaError(f"cut: its index names frames beyond its end at {size} bytes")
    promised = Fraction(0)
    if container.format.name in _SAYS_DURATION and container.duration:
        promised = Fraction(container.duration, av.time_base)
    elif container.format.name == "avi":
        promised = stream.frames * _period(stream)
    known = sorted(tick for tick in ticks if tick is not None)
    # Headers round, and how long the last frame is shown is often not said: as long as any before it, or twice that.
    longest = max((b - a for a, b in pairwise(known)), default=0) * _fraction(stream.time_base)
    if longest and promised - end > max(2 * longest, promised / 100):
        raise MediaError(f"cut: its header says {float(promised):.3f} s, its frames end at {float(end):.3f} s")


def _period(stream: av.VideoStream) -> Fraction:
    """Seconds from a frame to the next at the nominal rate."""
    for rate in (stream.average_rate, stream.guessed_rate):
        if rate is not None and rate.numerator > 0 and rate.denominator > 0:
            return 1 / _fraction(rate)
    return Fraction(1, 25)


def _fraction(number: av.AVRational | Fraction) -> Fraction:
    return Fraction(number.numerator, number.denominator)
