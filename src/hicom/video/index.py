"""The times of all frames from the tables at the head of an mp4 or mov file, without reading its packets.

FFmpeg keeps the decoding times, sizes and key frames of such a file, but shows no presentation times. Those follow from
the file's own table of offsets (`ctts`, ISO/IEC 14496-12). What comes from here is exactly what reading all packets
gives: at the least doubt there is no index, and the packets are read.
"""

from __future__ import annotations

import io
import os
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream
from numpy.typing import NDArray

from .. import pyav
from .index_keys import Doubt, Read, find_keys
from .packets import Packet

# The sample entries of codecs of which we know how FFmpeg's parsers find further key frames.
_CODECS = {"h264": (b"avc1", b"avc3"), "hevc": (b"hvc1", b"hev1")}
# What may stand beside `moov` without there being samples that its tables leave out.
_BESIDE = {b"ftyp", b"mdat", b"free", b"skip", b"wide", b"udta", b"pdin"}
_MAX_BOXES = 4096  # at one level; a file of more is odd enough to be read packet by packet
_MAX_TICKS = 1 << 28  # FFmpeg drops a table of offsets that holds a larger one


class Index(NamedTuple):
    """What the packets of a stream will say, in the order of decoding; times in ticks of the stream's clock."""

    pts: NDArray[np.int64]
    dts: NDArray[np.int64]
    duration: NDArray[np.int64]
    is_key: NDArray[np.bool_]
    pos: NDArray[np.int64]  # of the packet's first byte in the file
    size: NDArray[np.int64]  # in bytes

    def packets(self) -> list[Packet]:
        """Return what each packet says."""
        pts, dts, duration, is_key, pos, size = (column.tolist() for column in self)
        return [
            Packet(*row)
            for row in zip(pts, dts, duration, is_key, repeat(True), repeat(False), pos, size, strict=False)
        ]


def read_index(
    file: Path | IO[bytes], container: InputContainer, stream: VideoStream, seen: list[Packet]
) -> list[Packet] | None:
    """Return what the packets of `stream` will say, or None where only reading them tells.

    Args:
        file: where they are.
        container: the same, opened.
        stream: of which the packets are.
        seen: what the first packets said, at least one.
    """
    if not container.format.name.startswith("mov,") or stream.codec_context.codec.canonical_name not in _CODECS:
        return None
    known = pyav.index_entries(stream)
    if not known:
        return None
    try:
        with _reading(file) as (read, num_bytes):
            packets = _checked(read, num_bytes, stream, np.array(known, np.int64)).packets()
    except (Doubt, OSError, struct.error):
        return None
    return packets if packets[: len(seen)] == seen else None


def _checked(read: Read, num_bytes: int, stream: VideoStream, entries: NDArray[np.int64]) -> Index:
    """Return the index of a stream from FFmpeg's own and from the file's tables, if they agree."""
    dts, pos, size, flags = (np.ascontiguousarray(column) for column in entries.T)
    tables = _tables(read, num_bytes, stream)
    durations = _runs(tables[b"stts"], len(dts), ">u4")
    offsets = _runs(tables[b"ctts"], len(dts), ">i4") if b"ctts" in tables else np.zeros(len(dts), np.int64)
    sizes = _sizes(tables[b"stsz"], len(dts))
    is_sound = (
        bool((flags & ~1 == 0).all())  # no other flags than that of key frames: none is cut away by an edit list
        and bool((np.abs(offsets) <= _MAX_TICKS).all())
        and bool((durations > 0).all() and (durations <= _MAX_TICKS).all())
        and np.array_equal(np.diff(dts), durations[:-1])
        and np.array_equal(sizes, size)
        and bool((size > 0).all() and (pos >= 0).all() and (pos + size <= num_bytes).all())
    )
    # FFmpeg delays a stream with offsets below 0 by the largest of them, so that no frame is shown before it decodes.
    pts = dts + offsets + max(0, int(-offsets.min()))
    # It takes the decoding time away from a frame that looks as if it were shown too early.
    is_early = (pts == dts) & (pts >= np.maximum.accumulate(pts))
    if not is_sound or (stream.codec_context.has_b_frames and is_early.any()):
        raise Doubt
    is_key = find_keys(read, stream.codec_context, list(zip(pos.tolist(), size.tolist(), strict=True)))
    is_marked = flags & 1 == 1
    # FFmpeg takes it from the packets of H.264 and from the marks of HEVC; where those say more we know too little.
    if (is_marked & ~is_key).any() or (stream.codec_context.name == "hevc" and (is_key & ~is_marked).any()):
        raise Doubt
    return Index(pts, dts, durations, is_key, pos, size)


@contextmanager
def _reading(file: Path | IO[bytes]) -> Iterator[tuple[Read, int]]:
    """Yield how to read bytes of a file, and how many there are; for others that read it, its position stays."""
    if isinstance(file, Path):
        with file.open("rb", buffering=0) as opened:
            yield _reader(opened), os.fstat(opened.fileno()).st_size
        return
    place = file.tell()
    try:
        yield _reader(file), file.seek(0, os.SEEK_END)
    finally:
        file.seek(place)


def _reader(file: IO[bytes]) -> Read:
    if isinstance(file, io.FileIO) and hasattr(os, "pread"):
        number = file.fileno()
        return lambda first, num_bytes: os.pread(number, num_bytes, first)

    def read(first: int, num_bytes: int) -> bytes:
        file.seek(first)
        return file.read(num_bytes)

    return read


def _tables(read: Read, num_bytes: int, stream: VideoStream) -> dict[bytes, bytes]:
    """Return the sample tables of a stream by their names, without versions and flags."""
    top = list(_boxes(read, 0, num_bytes))
    kinds = Counter(kind for kind, _, _ in top)
    if kinds[b"moov"] != 1 or not kinds.keys() <= _BESIDE | {b"moov"}:
        raise Doubt
    movie = list(_boxes(read, *_only(top, b"moov")))
    if any(kind in (b"mvex", b"cmov") for kind, _, _ in movie):
        raise Doubt
    tracks = [list(_boxes(read, first, stop)) for kind, first, stop in movie if kind == b"trak"]
    track = _only(
        [(str(_track_id(read, each)).encode(), n, n) for n, each in enumerate(tracks)], str(stream.id).encode()
    )
    boxes = tracks[track[0]]
    for kind in (b"mdia", b"minf", b"stbl"):
        boxes = list(_boxes(read, *_only(boxes, kind)))
    names = {kind for kind, _, _ in boxes}
    if b"stz2" in names:
        raise Doubt
    wanted = (b"stsd", b"stts", b"stsz", *((b"ctts",) if b"ctts" in names else ()))
    tables = {kind: _payload(read, *_only(boxes, kind)) for kind in wanted}
    (num_entries,) = struct.unpack_from(">I", tables[b"stsd"])
    if num_entries != 1 or tables[b"stsd"][8:12] not in _CODECS[stream.codec_context.codec.canonical_name]:
        raise Doubt  # several descriptions change the decoder on the way; others are encrypted
    return tables


def _boxes(read: Read, first: int, stop: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield the kind of each box between two bytes of the file, and where what is in it begins and ends."""
    for _ in range(_MAX_BOXES):
        if first == stop:
            return
        head = read(first, min(16, stop - first))
        length, kind = struct.unpack_from(">I4s", head)
        begin = 8
        if length == 1:
            (length,), begin = struct.unpack_from(">Q", head, 8), 16
        elif length == 0:
            length = stop - first
        if length < begin or first + length > stop:
            raise Doubt
        yield kind, first + begin, first + length
        first += length
    raise Doubt


def _only(boxes: list[tuple[bytes, int, int]], kind: bytes) -> tuple[int, int]:
    found = [(first, stop) for each, first, stop in boxes if each == kind]
    if len(found) != 1:
        raise Doubt
    return found[0]


def _track_id(read: Read, track: list[tuple[bytes, int, int]]) -> int:
    first, stop = _only(track, b"tkhd")
    head = read(first, min(24, stop - first))
    (number,) = struct.unpack_from(">I", head, 20 if head[:1] == b"\1" else 12)
    return int(number)


def _payload(read: Read, first: int, stop: int) -> bytes:
    data = read(first, stop - first)  # a box lies within the file, so this is not more than its bytes
    if len(data) != stop - first or len(data) < 8:
        raise Doubt
    return data[4:]


def _runs(table: bytes, num_samples: int, kind: str) -> NDArray[np.int64]:
    """Return one value a sample from a table of (how many samples, value)."""
    (num_runs,) = struct.unpack_from(">I", table)
    if len(table) != 4 + 8 * num_runs or num_runs == 0:
        raise Doubt
    counts = np.frombuffer(table, ">u4", offset=4)[::2].astype(np.int64)
    if (counts == 0).any() or counts.sum() != num_samples:
        raise Doubt
    return np.repeat(np.frombuffer(table, kind, offset=4)[1::2].astype(np.int64), counts)


def _sizes(table: bytes, num_samples: int) -> NDArray[np.int64]:
    size, count = struct.unpack_from(">II", table)
    if count != num_samples or len(table) != 8 + (0 if size else 4 * count):
        raise Doubt
    return np.full(count, size, np.int64) if size else np.frombuffer(table, ">u4", offset=8).astype(np.int64)
