"""Tables of mp4 and mov files that say more than they hold.

A table of a few bytes may stand for any number of samples of the same size, and FFmpeg makes a list of them all when it
opens the file: 1,080 bytes take gigabytes. So the numbers are looked at before.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

_NESTED = frozenset({b"moov", b"hoov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf", b"mvex", b"udta", b"edts"})
_MAX_BOXES = 2_000_000  # a fragment for every frame of hours


def has_sound_tables(file: IO[bytes], most: int) -> bool:
    """Return whether no table of a file stands for more than `most` samples; files of other formats have none.

    Uncompressed sound, of which FFmpeg lists whole pieces, may have any number. A compressed header is not sound.
    """
    fragments = number = 0
    track = _Track()
    for number, (kind, start) in enumerate(_boxes(file)):
        if kind == b"cmov" or number >= _MAX_BOXES:
            return False
        if kind == b"trak":  # the boxes of one come in any order, so it is judged at its end
            if track.listed > most:
                return False
            track = _Track()
        elif kind == b"hdlr":
            of = _read(file, start + 8, 4)
            track.is_sound = of == b"soun" or (track.is_sound and of != b"vide")  # another one tells of the data
        elif kind == b"stts":  # one entry, of samples that last a tick
            track.is_even = _word(file, start + 4) == 1 and _word(file, start + 12) == 1
        elif kind in (b"stsz", b"stz2"):
            track.samples = max(track.samples, _word(file, start + 8))
        elif kind == b"trun":
            fragments += _word(file, start + 4)
    return fragments <= most and track.listed <= most


@dataclass
class _Track:
    is_sound: bool = False
    is_even: bool = False
    samples: int = 0

    @property
    def listed(self) -> int:
        return 0 if self.is_sound and self.is_even else self.samples


def _read(file: IO[bytes], start: int, count: int) -> bytes:
    file.seek(start)
    return file.read(count)


def _word(file: IO[bytes], start: int) -> int:
    return int.from_bytes(_read(file, start, 4), "big")


def _boxes(file: IO[bytes]) -> Iterator[tuple[bytes, int]]:
    """Yield kind and start of the content of all boxes, each before those inside of it."""
    left = [(0, file.seek(0, os.SEEK_END))]
    while left:
        start, end = left.pop()
        if start + 8 > end:
            continue
        head = _read(file, start, 16)
        size, content = int.from_bytes(head[:4], "big"), start + 8
        if size == 1:
            size, content = int.from_bytes(head[8:16], "big"), start + 16
        stop = end if size == 0 else min(start + size, end)
        if stop < content:
            continue
        yield head[4:8], content
        left.append((stop, end))
        if head[4:8] in _NESTED:
            left.append((content, stop))
