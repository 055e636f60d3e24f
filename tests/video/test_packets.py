"""What packets change in a decoder, palettes and headers, reaches it before the frames that need it."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

import hicom.video.decode
from hicom.video import read_frames
from media import number_frame, read_numbers, write_video
from video_files import change_mp4

NUM = 30  # frames of each half, in groups of ten


def write_palette(path: Path) -> Path:
    """Write raw pictures of 8 bits, whose colours come with the first packet alone."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("rawvideo", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "pal8"
        for number in range(2 * NUM):
            frame = av.VideoFrame(96, 64, "pal8")
            shades = number_frame(number)[..., 0] > 128
            frame.planes[0].update(np.ascontiguousarray(shades, np.uint8).tobytes().ljust(frame.planes[0].buffer_size))
            colours = np.zeros((256, 4), np.uint8)
            colours[1] = (40, 200, 255, 255)  # blue, green, red, opaque
            frame.planes[1].update(colours.tobytes())
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_halves(folder: Path, suffix: str, codec: str = "libx264") -> list[Path]:
    """Write two videos of the same codec whose headers differ in the quality that all pictures are coded against."""
    options = [{"qp": qp, "g": "10", "bf": "0", "sc_threshold": "0"} for qp in ("30", "24")]
    return [
        write_video(folder / f"{number}.{suffix}", NUM, codec=codec, codec_options=each, muxer_options={})
        for number, each in enumerate(options)
    ]


def write_two_headers(path: Path) -> Path:
    """Join two FLV files, as a live recording does whose encoder was set anew: the second header comes in between."""
    first, second = (each.read_bytes() for each in write_halves(path.parent, "flv"))
    tags, start = b"", 13  # behind the head of the file
    while start < len(second):
        size = int.from_bytes(second[start + 1 : start + 4], "big")
        if second[start] == 9:  # video
            tag = bytearray(second[start : start + 11 + size + 4])
            time = int.from_bytes(tag[4:7], "big") + (NUM * 1000 // 30)
            tag[4:7] = time.to_bytes(3, "big")
            is_end = tag[11] & 0x0F == 7 and tag[12] == 2
            tags += b"" if is_end else bytes(tag)
        start += 11 + size + 4
    end = first.rindex(b"\x17\x02\x00\x00\x00") - 11  # the first one's mark of the end of its sequence
    path.write_bytes(first[:end] + tags)
    return path


def write_two_entries(path: Path) -> Path:
    """Write an MP4 with two sample descriptions: half of the packets belong to each."""
    halves = write_halves(path.parent, "mp4")
    headers = []
    with av.open(str(path), "w", options={"use_editlist": "0"}) as container:
        stream: Any = None
        for number, half in enumerate(halves):
            with av.open(str(half)) as source:
                video = source.streams.video[0]
                headers.append(video.codec_context.extradata)
                stream = stream or container.add_stream_from_template(video)
                for packet in source.demux(video):
                    if packet.size:
                        packet.pts += number * NUM * 512
                        packet.dts += number * NUM * 512
                        packet.stream = stream
                        container.mux(packet)
    sizes: list[int] = []

    def describe(content: bytes) -> bytes:
        (size,) = struct.unpack_from(">I", content, 8)
        other = content[8 : 8 + size].replace(headers[0], headers[1])
        assert len(headers[0]) == len(headers[1])
        return content[:4] + struct.pack(">I", 2) + content[8 : 8 + size] + other

    def note(content: bytes) -> bytes:
        sizes.extend(struct.unpack(f">{2 * NUM}I", content[12:]))
        return content

    def offsets(content: bytes) -> bytes:
        (first,) = struct.unpack_from(">I", content, 8)
        return content[:4] + struct.pack(">III", 2, first, first + sum(sizes[:NUM]))

    changes: dict[bytes, Callable[[bytes], bytes]] = {
        b"stsd": describe,
        b"stsz": note,  # before the offsets in the file
        b"stsc": lambda content: content[:4] + struct.pack(">7I", 2, 1, NUM, 1, 2, NUM, 2),
        b"stco": offsets,
    }
    return change_mp4(path, changes)


FILES: dict[str, Callable[[Path], Path]] = {
    "palette.avi": write_palette,
    "palette.mov": write_palette,
    "headers.flv": write_two_headers,
    "entries.mp4": write_two_entries,
}


def decode_plainly(path: Path) -> list[np.ndarray[Any, Any]]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize("seek_packets", [1, 10**9])
@pytest.mark.parametrize("name", FILES)
def test_every_frame_alone_is_that_of_a_plain_decode(
    tmp_path: Path, name: str, seek_packets: int, monkeypatch: pytest.MonkeyPatch, no_scan: None
) -> None:
    monkeypatch.setattr(hicom.video.decode, "_SEEK_PACKETS", seek_packets)
    path = FILES[name](tmp_path / name)
    plain = decode_plainly(path)
    assert len(plain) == 2 * NUM
    whole = read_frames(path)
    assert read_numbers(whole.frames) == [*range(60)] if "palette" in name else [*range(30), *range(30)]
    assert np.abs(whole.frames.astype(int) - np.stack(plain)).max() <= 40  # colours are interpolated otherwise
    for number in range(0, 2 * NUM, 3):
        alone = read_frames(path, timestamps_s=[whole.timestamps_s[number]])
        assert np.array_equal(alone.frames[0], whole.frames[number]), number
    for count in (2, 3, 7):
        few = read_frames(path, num_frames=count)
        places = np.searchsorted(whole.timestamps_s, few.timestamps_s)
        assert np.array_equal(few.frames, whole.frames[places])
