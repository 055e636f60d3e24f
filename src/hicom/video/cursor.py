"""Open files that read the packets of a video from any of them on, and know which ones they are.

Every packet that comes after a seek is compared with the one that the table of packets has at its position, so nobody
has to trust a container's seeking: where it does not hold, the file is read from its start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream
from numpy.typing import NDArray

from .packets import Packet, describe_packet

Opened = AbstractContextManager[tuple[InputContainer, VideoStream, VideoCodecContext]]

# How a container is sought: by the times that its own index has, or by the bytes where packets begin.
_BY_PTS, _BY_DTS, _BY_BYTES = "pts", "dts", "bytes"
_WAYS = {
    "mov": _BY_PTS,
    "matroska": _BY_PTS,
    "mpegts": _BY_BYTES,
    "mpeg": _BY_BYTES,
    "flv": _BY_BYTES,
    "ivf": _BY_BYTES,
    "mxf": _BY_BYTES,
    "avi": _BY_DTS,
    "asf": _BY_DTS,
    "ogg": _BY_DTS,
    "nut": _BY_DTS,
}
_EARLIER = (0, 2, 16, 64, 256)  # packets by which a seek begins earlier where the one before landed too late
_NUM_UNKNOWN = 64  # packets after a seek that may be in pieces, before one that is known


class Lost(Exception):
    """What is read is not what the table of packets says."""


class Table:
    """What the packets of a file say.

    Attributes:
        packets: one for each, in the order of the file.
        is_read: whether packets said so; else an index did, and packets are compared with it when they are read.
        can_seek: whether a file can be read from its middle on.
    """

    def __init__(self, packets: Sequence[Packet], codec: str, is_read: bool) -> None:
        self.packets, self._codec, self.is_read, self.can_seek = packets, codec, is_read, True

    def find(self, packet: av.Packet[VideoStream]) -> int | None:
        """Return the position of a packet by where it begins in the file; None: there is none, or several."""
        if packet.pos is None:
            return None
        order, places = self._places
        first, stop = np.searchsorted(places, packet.pos), np.searchsorted(places, packet.pos, side="right")
        found = [each for each in order[first:stop].tolist() if self.packets[each].size == packet.size]
        return found[0] if len(found) == 1 else None

    @cached_property
    def _places(self) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
        places = np.array([-1 if packet.pos is None else packet.pos for packet in self.packets], np.int64)
        order = np.argsort(places, kind="stable")
        return order, places[order]

    def is_at(self, position: int, packet: av.Packet[VideoStream]) -> bool:
        """Whether a packet is the one at `position`."""
        if position >= len(self.packets):
            return False
        due = self.packets[position]
        if self.is_read:  # times may be counted from elsewhere after a seek
            return (packet.pos, packet.size) == (due.pos, due.size)
        return describe_packet(packet, self._codec) == due


class Cursor:
    """Reads packets from any position on.

    Args:
        table: what the packets say.
        opened: opens the file.
        demux: reads on in it.
        seek_packets: reading past fewer packets than this is cheaper than a seek.
    """

    def __init__(
        self,
        table: Table,
        opened: Callable[[], Opened],
        demux: Callable[[InputContainer, VideoStream], Iterator[av.Packet[VideoStream]]],
        seek_packets: int,
    ) -> None:
        self._table, self._opened, self._demux, self._seek_packets = table, opened, demux, seek_packets
        self._stack = ExitStack()
        self._restart()

    def close(self) -> None:
        """Close the file."""
        self._stack.close()

    def _restart(self) -> None:
        self._stack.close()
        self.container, self.stream, self.context = self._stack.enter_context(self._opened())
        self._packets = self._demux(self.container, self.stream)
        self._next, self._is_sought = 0, False

    def packets_from(self, first: int) -> Iterator[tuple[int, av.Packet[VideoStream]]]:
        """Yield the packets from position `first` on, with their positions.

        Raises:
            Lost: they are not those of the table.
        """
        if first < self._next:
            self._restart()  # with a decoder that knows nothing of later packets
        landed = None
        if first - self._next >= self._seek_packets and self._table.can_seek:
            landed = self._seek(first)
            if landed is None and self._is_sought:
                self._restart()
        if landed is not None and self._next > first:
            yield first, landed
        for packet in self._packets:
            position = self._next
            if (self._is_sought or not self._table.is_read) and not self._table.is_at(position, packet):
                raise Lost
            self._next += 1
            if position >= first:
                yield position, packet

    def _seek(self, first: int) -> av.Packet[VideoStream] | None:
        """Go to a packet at or before position `first`, and return it; None: that cannot be had."""
        way = _WAYS.get(self.container.format.name.split(",")[0])
        for earlier in _EARLIER if way is not None else ():
            self._is_sought = True
            target = max(0, first - earlier)
            while way == _BY_BYTES and target > 0 and self._table.packets[target].pos is None:
                target -= 1  # MPEG says where a group of packets begins, not where the others in it do
            if not self._jump(self._table.packets[target], way):
                break
            self._packets = self._demux(self.container, self.stream)
            for _, packet in zip(range(_NUM_UNKNOWN), self._packets, strict=False):
                position = self._table.find(packet)
                if position is not None and position <= first:
                    self._next = position + 1
                    return packet
        self._table.can_seek = False
        return None

    def _jump(self, due: Packet, way: str | None) -> bool:
        """Seek to a packet; return whether that could be tried."""
        stamp = due.pos if way == _BY_BYTES else due.pts if way == _BY_PTS or due.dts is None else due.dts
        if stamp is None:
            return False
        try:
            if way == _BY_BYTES:
                self.container.seek(stamp, unsupported_byte_offset=True)
            else:
                self.container.seek(stamp, stream=self.stream)
        except av.error.FFmpegError:
            return False
        return True


class Cursors:
    """Open cursors that are used again, so that reading in pieces opens each file once."""

    def __init__(self) -> None:
        self._idle: list[Cursor] = []

    def __enter__(self) -> Cursors:
        return self

    def __exit__(self, *_: object) -> None:
        for cursor in self._idle:
            cursor.close()
        self._idle.clear()

    def take(self, make: Callable[[], Cursor]) -> Cursor:
        """Return one that nobody uses, or make one; `give` it back."""
        try:
            return self._idle.pop()
        except IndexError:
            return make()

    def give(self, cursor: Cursor) -> None:
        """Take one back."""
        self._idle.append(cursor)
