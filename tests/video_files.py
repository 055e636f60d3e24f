"""Write videos whose containers say something odd: stamps, tables and headers that an encoder alone never writes."""

import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from media import number_frame

# Boxes of MP4 that hold boxes.
_TREES = {b"moov", b"trak", b"mdia", b"minf", b"stbl"}


def numbered_packets(stream: Any, count: int, pix_fmt: str = "yuv420p") -> list[Any]:
    """Return the packets of frames that show their numbers, in the order of the file."""
    stream.width, stream.height, stream.pix_fmt = 96, 64, pix_fmt
    packets = []
    for number in range(count):
        frame = av.VideoFrame.from_ndarray(number_frame(number), format="rgb24")
        frame.pts = number
        packets += stream.encode(frame)
    return packets + stream.encode()


def write_stamped(
    path: Path,
    stamps: Sequence[int],
    *,
    ticks_per_s: int = 1000,
    codec: str = "libx264",
    codec_options: dict[str, str] | None = None,
) -> Path:
    """Encode numbered frames in the order of the file, with any presentation times: equal ones, and ones that go back.

    Containers that store times of decoding refuse most of them; Matroska takes all.
    """
    options = {"bf": "0", "g": "10"} if codec_options is None else codec_options
    with av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as container:
        stream: Any = container.add_stream(codec, rate=30, options=options)
        for packet in numbered_packets(stream, len(stamps)):
            # The encoder's stamps are numbers of frames.
            packet.pts, packet.dts = stamps[round(packet.pts * packet.time_base * 30)], packet.dts - 10**6
            packet.time_base = Fraction(1, ticks_per_s)
            container.mux(packet)
    return path


def change_mp4(path: Path, changes: dict[bytes, Callable[[bytes], bytes]]) -> Path:
    """Change the contents of boxes, by name, of an MP4 whose index is at its end."""

    def changed(data: bytes) -> bytes:
        result, start = b"", 0
        while start < len(data):
            size, name = struct.unpack_from(">I4s", data, start)
            content = data[start + 8 : start + size]
            if name in _TREES:
                content = changed(content)
            elif name in changes:
                content = changes[name](content)
            result += struct.pack(">I4s", len(content) + 8, name) + content
            start += size
        return result

    path.write_bytes(changed(path.read_bytes()))
    return path
