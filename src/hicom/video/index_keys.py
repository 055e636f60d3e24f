"""Key frames that a file does not mark: its tables name pictures that begin anew, FFmpeg's parsers find others, too.

Those are pictures after which the decoder recovers (H.264) and ones for random access (HEVC). Their packets say so
before the picture itself: the first bytes of each packet are enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from av.video.codeccontext import VideoCodecContext
from numpy.typing import NDArray

Read = Callable[[int, int], bytes]  # bytes of a file: from which on, how many

_HEAD = 6  # bytes looked at of every packet: the length of its first unit, and the unit's head
_BLOCK = 1 << 20  # bytes read at once
_PACKET = 1 << 14  # bytes on average, up to which reading past packets is cheaper than reading each by itself
_MAX_UNITS = 64  # of one packet, before its picture
_MAX_MESSAGES = 1 << 16  # bytes of a unit of messages


class Doubt(Exception):
    """What is written in a file may not be all there is to know."""


def find_keys(read: Read, context: VideoCodecContext, places: list[tuple[int, int]]) -> NDArray[np.bool_]:
    """Return which packets, given by where they begin and their bytes, hold pictures that a decoder can begin with.

    Raises:
        Doubt: they are not what packets of this codec look like in mp4.
    """
    is_h264 = context.codec.canonical_name == "h264"
    extra = context.extradata or b""
    if len(extra) < 23 - 16 * is_h264 or extra[0] != 1 or extra[4 if is_h264 else 21] & 3 != 3:
        raise Doubt  # a unit begins with its length in 4 bytes, nearly everywhere
    firsts, sizes = np.array(places, np.int64).T
    heads = _heads(read, firsts)
    lengths, kind, layer = heads[:, :4].copy().view(">u4")[:, 0].astype(np.int64), heads[:, 4], heads[:, 5]
    if ((lengths < 2) | (lengths + 4 > sizes)).any():
        raise Doubt  # a unit ends with its packet at the latest
    if is_h264:
        is_picture, is_key = (kind & 31 == 1) | (kind & 31 == 5), kind & 31 == 5
    else:
        is_picture = (kind >> 1 < 10) & (kind & 1 == 0) & (layer >> 3 == 0)
        is_key = np.zeros(len(places), np.bool_)
    begins = _begins_h264 if is_h264 else _begins_hevc
    for number in np.flatnonzero(~is_picture).tolist():
        is_key[number] = begins(read, *places[number])
    return is_key


def _heads(read: Read, firsts: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return the first `_HEAD` bytes of all packets, which begin at these bytes of the file: uint8[packets, _HEAD]."""
    result = np.zeros((len(firsts), _HEAD), np.uint8)
    order = np.argsort(firsts)
    at = 0
    while at < len(order):
        first = int(firsts[order[at]])
        # Of small packets many lie in one block; of others each is read by itself.
        near = order[at : at + int(np.searchsorted(firsts[order[at:]], first + _BLOCK))]
        if len(near) * _PACKET < _BLOCK:
            near = near[:1]
        data = read(first, int(firsts[near[-1]]) + _HEAD - first)
        block = np.zeros(int(firsts[near[-1]]) + _HEAD - first, np.uint8)
        block[: len(data)] = np.frombuffer(data, np.uint8)
        result[near] = block[(firsts[near] - first)[:, None] + np.arange(_HEAD)]
        at += len(near)
    return result


def _units(read: Read, first: int, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield of each unit of a packet its first two bytes, where it begins and its number of bytes."""
    at, stop = first, first + size
    for _ in range(_MAX_UNITS):
        head = read(at, 6)
        length = int.from_bytes(head[:4], "big")
        if len(head) < 6 or length < 2 or at + 4 + length > stop:
            raise Doubt
        yield head[4:], at + 4, length
        at += 4 + length
    raise Doubt


def _begins_h264(read: Read, first: int, size: int) -> bool:
    recovers = False
    for head, begin, length in _units(read, first, size):
        kind = head[0] & 31
        if kind in (1, 5):
            return kind == 5 or recovers
        if kind == 6:
            if length > _MAX_MESSAGES:
                raise Doubt
            recovers = recovers or _recovers(read(begin + 1, length - 1).replace(b"\0\0\3", b"\0\0"))
        elif kind not in (7, 8, 9, 12, 13, 14, 15):  # parameter sets, delimiters, filler: a parser passes over them
            raise Doubt
    raise Doubt


def _recovers(messages: bytes) -> bool:
    """Whether one of the messages (SEI) says from when on pictures are right again after a decoder begins here."""
    at = 0
    while len(messages) - at > 2:
        kind = size = 0
        for _ in range(2):
            kind, size = size, 0
            while at < len(messages) and messages[at] == 255:
                size, at = size + 255, at + 1
            if at >= len(messages):
                raise Doubt
            size, at = size + messages[at], at + 1
        if at + size > len(messages):
            raise Doubt
        if kind == 6:
            if size == 0 or messages[at] < 8:  # 16 frames or more: too long for some streams, and then not taken
                raise Doubt
            return True
        at += size
    return False


def _begins_hevc(read: Read, first: int, size: int) -> bool:
    for head, _, _ in _units(read, first, size):
        kind, layer = head[0] >> 1 & 63, (head[0] & 1) << 5 | head[1] >> 3
        if layer or kind in (32, 33, 34, 35, 38, 39, 40):  # parameter sets, delimiters, filler, messages
            continue
        if kind < 10:
            return False
        if 16 <= kind <= 21:
            return True
        raise Doubt
    raise Doubt
