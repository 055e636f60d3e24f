"""The time line of a file: which packet is which frame, and when it is shown, from the packets alone.

A file has one time line, whatever is asked of it. A frame has the time that the container gives it. Where a stamp is
missing or breaks the order of the frames, that frame alone gets another time, between those of its neighbours; only
where no frame has a stamp do the times come from the frame rate.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .packets import Packet

_NUM_AGREE = 8  # frames before and behind a step back of the clock that tell a new start from a stamp that is off


def stamps_of(packets: Sequence[Packet], is_slotted: bool) -> list[int | None]:
    """Return the stamp of each packet, None where it has none.

    With `is_slotted` (AVI, ASF) the container does not say when its frames are shown, only that one is in each of the
    slots that it numbers or times, in the order of the file: what FFmpeg tells beyond that are guesses.
    """
    return [packet.dts if is_slotted else packet.pts for packet in packets]


def order_by_stamps(packets: Sequence[Packet], can_reorder: bool, is_reordered: bool) -> list[int] | None:
    """Return the packets in the order of presentation; None: only a decoder can tell.

    Args:
        packets: of the stream, in the order of the file.
        can_reorder: whether the codec may show frames in another order than that of the file.
        is_reordered: whether the stream says that it does.
    """
    in_file = list(range(len(packets)))
    if not can_reorder:
        is_reordered = False
    stamps = [packet.pts for packet in packets]
    dts = [packet.dts for packet in packets if packet.dts is not None]
    if None not in stamps and len(set(stamps)) == len(stamps) and all(a <= b for a, b in pairwise(dts)):
        order = sorted(in_file, key=lambda position: stamps[position] or 0)
        if is_reordered or order == in_file:
            return order
    return None if can_reorder else in_file


def order_by_decoder(num_packets: int, decoded: Iterable[int]) -> list[int]:
    """Return all packets in the order in which their frames came out of the decoder.

    Those that did not come out follow the frame whose packet is the last one before theirs in the file.
    """
    followers: dict[int, list[int]] = {-1: [], **{position: [] for position in decoded}}
    leader = -1
    for position in range(num_packets):
        if position in followers:
            leader = position
        else:
            followers[leader].append(position)
    return [each for leader, others in followers.items() for each in ([leader, *others] if leader >= 0 else others)]


def make_time_line(
    packets: Sequence[Packet], order: list[int], stamps: Sequence[int | None], clock_s: float, rate: float
) -> tuple[NDArray[np.float64], float]:
    """Return when frames are shown, and how long the video lasts.

    Args:
        packets: of the stream, in the order of the file.
        order: the packet of each frame, in the order of presentation.
        stamps: of the frames in that order.
        clock_s: a tick of the stamps.
        rate: frames per second, for what has no stamp.

    Returns:
        float64[frames], not descending, in seconds from the first frame, which is at 0; and the seconds from the start
        of the first frame to the end of the last one.
    """
    frame_ticks = 1 / (rate * clock_s)
    durations = [float(max(packets[position].duration, 0) or frame_ticks) for position in order]
    ticks = np.array(_ticks(list(stamps), durations, frame_ticks), np.float64)
    ticks -= ticks[0]
    return ticks * clock_s, float(ticks[-1] + durations[-1]) * clock_s


def _ticks(stamps: list[int | None], durations: list[float], frame_ticks: float) -> NDArray[np.float64]:
    known = [number for number, stamp in enumerate(stamps) if stamp is not None]
    if not known:
        return np.arange(len(stamps), dtype=np.float64) * frame_ticks
    values = [stamp for stamp in stamps if stamp is not None]
    is_in_order = all(a <= b for a, b in pairwise(values))
    numbers = np.arange(len(stamps))
    fixed = values if is_in_order else _in_order(_joined(values, [durations[number] for number in known]))
    ticks = np.interp(numbers, known, fixed).astype(np.float64)
    ticks[: known[0]] -= (known[0] - numbers[: known[0]]) * frame_ticks
    ticks[known[-1] + 1 :] += (numbers[known[-1] + 1 :] - known[-1]) * frame_ticks
    return ticks


def _joined(stamps: list[int], durations: list[float]) -> list[float]:
    """Let each part of a clock that starts again follow the part before it."""
    result: list[float] = []
    offset, highest = 0.0, float(stamps[0])
    start = 0  # of the part
    for number, stamp in enumerate(stamps):
        before = stamps[max(start, number - _NUM_AGREE) : number]
        if before and stamp < min(before) and max(stamps[number : number + _NUM_AGREE]) < highest:
            offset, start = result[-1] + durations[number - 1] - stamp, number
            highest = float(stamp)
        highest = max(highest, stamp)
        result.append(stamp + offset)
    return result


def _in_order(values: list[float]) -> list[float]:
    """Change as few values as can be so that none descends: each to the nearest of the kept ones around it."""
    # The longest run that does not descend, from behind, so that of a pair in the wrong order the earlier one is kept.
    tails: list[float] = []
    ends: list[int] = []
    previous: dict[int, int | None] = {}
    for number in reversed(range(len(values))):
        length = bisect_right(tails, -values[number])
        previous[number] = ends[length - 1] if length else None
        tails[length : length + 1] = [-values[number]]
        ends[length : length + 1] = [number]
    kept: set[int] = set()
    at: int | None = ends[-1]
    while at is not None:
        kept.add(at)
        at = previous[at]
    floor, floors = -np.inf, []
    for number, value in enumerate(values):
        floor = value if number in kept else floor
        floors.append(floor)
    ceiling, result = np.inf, list(values)
    for number in reversed(range(len(values))):
        ceiling = values[number] if number in kept else ceiling
        result[number] = min(max(values[number], floors[number]), ceiling)
    # Between two kept values those that are off may still be in the wrong order.
    return [float(value) for value in np.maximum.accumulate(result)]


class Ranks:
    """Frames by their rank among those of their group of pictures, where only a decoder knows their order.

    AVI and ASF say when something is shown, not what: frame k of the video is shown in slot k. Groups of pictures come
    out one after the other, so its number is that of the group's first one, and how many of the group came before it.
    """

    def __init__(self, num_packets: int, keys: Sequence[int]) -> None:
        self._num_packets, self._starts = num_packets, [0, *(key for key in keys if key > 0)]

    def group(self, number: int) -> range:
        """Return the group of a frame, or of a packet: the numbers of its frames are those of its packets."""
        place = bisect_right(self._starts, number)
        return range(self._starts[place - 1], [*self._starts[place : place + 1], self._num_packets][0])

    def span(self, index: int) -> tuple[int, int]:
        """Return which packets give the frame: those of its group, behind the group that leading pictures refer to."""
        group = self.group(index)
        return self.group(max(0, group[0] - 1))[0], group[-1]


class Wanted:
    """The chosen frames that have not come out yet; several threads may ask, each about packets of its own."""

    def __init__(self, indices: Iterable[int], packets: Sequence[int], ranks: Ranks | None) -> None:
        self._ranks = ranks
        self._indices = set(indices)
        self._by_position: dict[int, int] = {}
        self._by_group: dict[int, list[int]] = {}  # by first packet: the frames of the group that are still to come
        for index in self._indices:
            if ranks is None:
                self._by_position[packets[index]] = index
            else:
                group = ranks.group(index)
                if group[0] not in self._by_group:
                    self._by_group[group[0]] = list(group)
                    self._by_position |= dict.fromkeys(group, group[0])
        self.positions = frozenset(self._by_position)

    def take(self, position: int | None) -> int | None:
        """Return which chosen frame came out of the packet at `position`, None if it is no chosen one."""
        found = None if position is None else self._by_position.pop(position, None)
        if found is None or self._ranks is None:
            return found
        left = self._by_group[found]
        index = left.pop(0) if left else None
        return index if index in self._indices else None

    def is_done(self) -> bool:
        """Return whether all have come out."""
        return not self._by_position if self._ranks is None else not any(self._by_group.values())
