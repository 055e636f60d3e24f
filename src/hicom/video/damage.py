"""What a file promises of itself, and whether all of it is there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import IO

from .packets import Packet

# The elements of which a segment of Matroska consists (RFC 9559, 5.1): SeekHead, Info, Tracks, Cluster, Cues,
# Attachments, Chapters, Tags, and Void and CRC-32, which may be anywhere.
_EBML, _SEGMENT = 0x1A45DFA3, 0x18538067
_IN_SEGMENT = {0x114D9B74, 0x1549A966, 0x1654AE6B, 0x1F43B675, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367}
_KNOWN = {_EBML, *_IN_SEGMENT, 0xEC, 0xBF}


def tagged_duration_s(metadata: Mapping[str, str]) -> float:
    """Return how long a stream of Matroska says that it is, by its tag DURATION; 0 where it does not say so."""
    for key, value in metadata.items():
        parts = value.split(":")
        if key.startswith("DURATION") and len(parts) == 3:
            try:
                return int(parts[0]) * 3600 + int(parts[1]) * 60 + float(parts[2])
            except ValueError:  # a tag of someone else
                continue
    return 0.0


def unsound(packets: Sequence[Packet]) -> set[int]:
    """Return which packets the container calls damaged.

    A transport stream made of several calls the end of each so, although nothing is missing: its clock starts again.
    """
    return {
        position
        for position, packet in enumerate(packets)
        if packet.is_corrupt and not _starts_again(packets[position : position + 4])
    }


def _starts_again(packets: Sequence[Packet]) -> bool:
    return any(a > b for a, b in pairwise(packet.dts for packet in packets if packet.dts is not None))


def is_complete(file: IO[bytes]) -> bool:
    """Return whether the parts of an AVI or a Matroska file follow each other up to where the file ends.

    False also where the file does not say how long they are, as live recordings do not.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return _is_complete_avi(file, size) if file.read(4) == b"RIFF" else _is_complete_matroska(file, size)


def _is_complete_avi(file: IO[bytes], size: int) -> bool:
    start = 0
    while start < size:  # a large file has several of these
        file.seek(start)
        head = file.read(8)
        if head[:4] != b"RIFF" or len(head) < 8:
            break  # something else behind them
        length = int.from_bytes(head[4:], "little")
        start += 8 + length + length % 2
        if length == 0 or start - length % 2 > size:
            return False
    return True


def _is_complete_matroska(file: IO[bytes], size: int) -> bool:
    start, end = 0, size
    while start < end:
        file.seek(start)
        name, num_head, length = _element(file.read(12))
        start += num_head
        if length is None or start + length > end:
            return False
        if name == _SEGMENT:
            end = start + length
        elif name in _KNOWN:
            start += length
        else:
            return False
    return True


def _element(head: bytes) -> tuple[int, int, int | None]:
    """Return the name of an element of EBML, how many bytes name and length take, and the length, if it says one."""
    num_name = 9 - head[0].bit_length() if head and head[0] else 9
    num_length = 9 - head[num_name].bit_length() if len(head) > num_name and head[num_name] else 9
    num_head = num_name + num_length
    if num_head > len(head):
        return 0, num_head, None
    most = (1 << 7 * num_length) - 1
    length = int.from_bytes(head[num_name:num_head], "big") & most
    return int.from_bytes(head[:num_name], "big"), num_head, None if length == most else length
