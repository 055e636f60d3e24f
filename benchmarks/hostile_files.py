"""The hostile corpus of `hostile.py`: real containers, mutants of them, and files made by hand. All from one seed.

Real containers are encoded here (PyAV, Pillow), small and in one thread, so that the same versions make the same bytes.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
WIDTH, HEIGHT, NUM_FRAMES, FPS = 96, 64, 40, 20
BITEXACT = {"fflags": "+bitexact"}


@dataclass(frozen=True)
class Case:
    """A file, and what must become of it beside being handled.

    Attributes:
        name: of the file, with its suffix.
        data: its content.
        kind: `container`, `mutant` or `made`.
        beside: files in the same folder, by name.
        is_refused: it must be an error; None: either.
        is_silent: no warning may come.
        num_frames: that all are read; None: any number.
        duration_s: that it is found to last; None: any.
        last_s: time of its last frame, with `num_frames`; None: any.
        colours: time in seconds -> RGB that the frame on screen then has, on the mean, within `TOLERANCE`.
        options: further arguments of reading.
    """

    name: str
    data: bytes
    kind: Literal["container", "mutant", "made"]
    beside: dict[str, bytes] = field(default_factory=dict)
    is_refused: bool | None = None
    is_silent: bool = False
    num_frames: int | None = None
    duration_s: float | None = None
    last_s: float | None = None
    colours: dict[float, tuple[int, int, int]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


TOLERANCE = 30


# Real containers


def frames(number: int = NUM_FRAMES, width: int = WIDTH, height: int = HEIGHT) -> list[Pixels]:
    """Return pictures of a square that moves over a gradient with some grain, the same ones every time."""
    rng = np.random.default_rng(7)
    grain = rng.integers(0, 12, (height, width, 3))
    rows, columns = np.mgrid[:height, :width]
    pictures = []
    for index in range(number):
        picture = np.stack([rows * 2, columns, 255 - rows - columns], -1) % 256 * 0.9 + grain
        left = (4 + 2 * index) % (width - 20)
        picture[20:40, left : left + 20] = (220, 40, 40)
        pictures.append(picture.clip(0, 255).astype(np.uint8))
    return pictures


def plain(*colours: tuple[int, int, int], width: int = WIDTH, height: int = HEIGHT) -> list[Pixels]:
    """Return a picture of each colour."""
    return [np.full((height, width, 3), colour, np.uint8) for colour in colours]


def encoded(
    pictures: Sequence[Pixels],
    container: str,
    codec: str,
    *,
    pix_fmt: str = "yuv420p",
    ticks: Sequence[int] | None = None,
    ticks_per_s: int = FPS,
    metadata: dict[str, str] | None = None,
    options: dict[str, str] | None = None,
    muxer: dict[str, str] | None = None,
) -> bytes:
    """Return a video file of pictures; `ticks`, in 1 / `ticks_per_s` s, gives their times."""
    file = io.BytesIO()
    with av.open(file, "w", format=container, options=BITEXACT | (muxer or {})) as output:
        stream: Any = output.add_stream(codec, rate=ticks_per_s, options=options or {})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = Fraction(1, ticks_per_s)
        stream.metadata.update(metadata or {})
        for index, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = (index if ticks is None else ticks[index]), Fraction(1, ticks_per_s)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def copied(data: bytes, container: str, pts: dict[int, int] | None = None) -> bytes:
    """Return the packets of a video file in another container; `pts` are other times for some, by their number."""
    file = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(file, "w", format=container, options=BITEXACT) as output:
        original = max(source.streams.video, key=lambda each: each.frames)  # an AVIF has a still picture, too
        stream = output.add_stream_from_template(original, opaque=True)
        number = 0
        for packet in source.demux(original):
            if not packet.size:
                continue
            if pts and number in pts:
                packet.pts = packet.dts = pts[number]
            packet.dts = packet.pts if packet.dts is None else packet.dts
            packet.stream = stream
            output.mux(packet)
            number += 1
    return file.getvalue()


def animation(kind: str, **options: Any) -> bytes:
    """Return pictures as an animated one, written by Pillow."""
    file = io.BytesIO()
    first, *rest = (Image.fromarray(picture) for picture in frames(24))
    first.save(file, kind, save_all=True, append_images=rest, duration=100, **options)
    return file.getvalue()


X264 = {"crf": "23", "g": "12", "x264-params": "threads=1"}
CONTAINERS: dict[str, Callable[[], bytes]] = {
    "h264.mp4": lambda: encoded(frames(), "mp4", "libx264", options=X264 | {"bf": "2"}),
    "baseline.mp4": lambda: encoded(frames(), "mp4", "libx264", options=X264 | {"bf": "0", "g": "40"}),
    "fragments.mp4": lambda: encoded(
        frames(), "mp4", "libx264", options=X264, muxer={"movflags": "+frag_keyframe+empty_moov"}
    ),
    "mjpeg.mov": lambda: encoded(frames(), "mov", "mjpeg", pix_fmt="yuvj420p"),
    "cinepak.avi": lambda: encoded(frames(), "avi", "cinepak", pix_fmt="rgb24"),
    "msmpeg4.avi": lambda: encoded(frames(), "avi", "msmpeg4"),
    "mpeg1.mpg": lambda: encoded(frames(), "mpeg", "mpeg1video", ticks_per_s=25),
    "h264.ts": lambda: encoded(frames(), "mpegts", "libx264", options=X264),
    "vp9.webm": lambda: encoded(frames(), "webm", "libvpx-vp9", options={"b": "200k", "cpu-used": "8"}),
    "hevc.mkv": lambda: encoded(
        frames(), "matroska", "libx265", options={"x265-params": "pools=none:frame-threads=1:log-level=none"}
    ),
    # PyAV's wheels have no encoder of AV1; Pillow's have.
    "av1.mkv": lambda: copied(animation("AVIF", max_threads=1, speed=10), "matroska"),
    "flv1.flv": lambda: encoded(frames(), "flv", "flv", options={"g": "10"}),
    "animation.gif": lambda: animation("GIF"),
    "animation.webp": lambda: animation("WEBP", quality=60),
}


def containers(names: Sequence[str] = tuple(CONTAINERS)) -> list[Case]:
    """Return real files of every container."""
    return [Case(name, CONTAINERS[name](), "container", is_refused=False, is_silent=True) for name in names]


# Mutants


def flip(data: bytearray, rng: np.random.Generator) -> bytearray:
    """Change bits of up to 20 bytes anywhere."""
    for place in rng.integers(0, len(data), rng.integers(1, 21)):
        data[place] ^= 1 << int(rng.integers(8))
    return data


def overwrite(data: bytearray, rng: np.random.Generator, *, noise: bool) -> bytearray:
    """Overwrite up to a tenth with zeros or noise."""
    size = int(rng.integers(1, max(2, len(data) // 10)))
    start = int(rng.integers(0, len(data) - size))
    data[start : start + size] = rng.bytes(size) if noise else bytes(size)
    return data


def truncate(data: bytearray, rng: np.random.Generator) -> bytearray:
    """Cut the end off."""
    return data[: max(1, int(len(data) * float(rng.choice([0.001, 0.05, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999]))))]


def set_field(data: bytearray, rng: np.random.Generator) -> bytearray:
    """Put extreme numbers where headers are: at the beginning or at the end."""
    values = (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFE, 0x01000000)
    for _ in range(int(rng.integers(1, 4))):
        place = int(rng.integers(0, min(1024, len(data) - 4)))
        place = place if rng.random() < 0.7 else len(data) - 4 - place
        struct.pack_into(">I" if rng.random() < 0.5 else "<I", data, max(0, place), int(rng.choice(values)))
    return data


def move(data: bytearray, rng: np.random.Generator, *, how: str) -> bytearray:
    """Repeat, remove or exchange pieces."""
    size = int(rng.integers(1, max(2, len(data) // 8)))
    first, second = sorted(int(x) for x in rng.integers(0, len(data) - size, 2))
    piece = data[first : first + size]
    if how == "repeat":
        return data[:second] + piece + data[second:]
    if how == "remove":
        return data[:first] + data[first + size :]
    other = data[second : second + size]
    data[first : first + size], data[second : second + size] = other, piece
    return data


MUTATIONS: dict[str, Callable[[bytearray, np.random.Generator], bytearray]] = {
    "flip": flip,
    "zeros": partial(overwrite, noise=False),
    "noise": partial(overwrite, noise=True),
    "cut": truncate,
    "field": set_field,
    "repeat": partial(move, how="repeat"),
    "remove": partial(move, how="remove"),
    "swap": partial(move, how="swap"),
}


def mutants(originals: Sequence[Case], number: int, seed: int) -> Iterator[Case]:
    """Yield damaged copies: every mutation of every original in turn, each from a seed of its own."""
    names = list(MUTATIONS)
    for index in range(number):
        original = originals[index % len(originals)]
        mutation = names[index // len(originals) % len(names)]
        data = MUTATIONS[mutation](bytearray(original.data), np.random.default_rng([seed, index]))
        yield Case(f"{index:03d}-{mutation}-{original.name}", bytes(data), "mutant")


# Files made by hand. What they are about: docs/results/hostile.md.


def two_headers() -> bytes:
    """Return an FLV as a live recording has it: a second sequence header, with other parameter sets, in the middle."""
    parts = []
    for qp, colour in ((30, (200, 30, 30)), (24, (30, 30, 200))):
        options = {"qp": str(qp), "g": "10", "bf": "0", "x264-params": "threads=1"}
        parts.append(encoded(plain(*[colour] * 20), "flv", "libx264", options=options))
    first, second = parts
    tags, place = bytearray(), 13
    while place + 11 <= len(second):
        size = int.from_bytes(second[place + 1 : place + 4], "big")
        tag = bytearray(second[place : place + 15 + size])
        time_ms = int.from_bytes(tag[4:7], "big") + 1000 * 20 // FPS
        tag[4:7] = time_ms.to_bytes(3, "big")
        if tag[0] == 9:
            tags += tag
        place += 15 + size
    return first + tags


def palette_avi() -> bytes:
    """Return an AVI of raw pictures with a palette, all of one colour."""
    file = io.BytesIO()
    with av.open(file, "w", format="avi", options=BITEXACT) as output:
        stream: Any = output.add_stream("rawvideo", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "pal8"
        for index in range(8):
            palette = np.tile(np.array((255, 255, 0, 0), np.uint8), (256, 1))  # alpha first: red
            shown = av.VideoFrame.from_ndarray((np.zeros((48, 64), np.uint8), palette), format="pal8")
            shown.pts, shown.time_base = index, Fraction(1, 10)
            output.mux(stream.encode(shown))
        output.mux(stream.encode())
    return file.getvalue()


def png(width: int, height: int) -> bytes:
    """Return a black picture of 1 bit a pixel, which takes next to nothing."""
    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def apng(*, alpha: int = 255, is_broken: bool = False) -> bytes:
    """Return an animated PNG of red pictures, more or less transparent."""
    file = io.BytesIO()
    pictures = [Image.new("RGBA", (64, 48), (255, 0, 0 if index % 2 else 1, alpha)) for index in range(4)]
    pictures[0].save(file, "PNG", save_all=True, append_images=pictures[1:], duration=100, disposal=1)
    data = file.getvalue()
    return data.replace(b"acTL" + data[data.index(b"acTL") + 4 :][:8], b"acTL", 1) if is_broken else data


def patched(data: bytes, mark: bytes, offset: int, value: int) -> bytes:
    """Return a file with a 4-byte number behind a mark changed."""
    changed = bytearray(data)
    struct.pack_into(">I", changed, changed.index(mark) + offset, value)
    return bytes(changed)


def zeroed_first_picture(data: bytes) -> bytes:
    """Return an mp4 whose first key frame is zeros."""
    with av.open(io.BytesIO(data)) as container:
        packet = next(container.demux(video=0))
        place, size = packet.pos, packet.size
    assert place is not None
    return data[:place] + bytes(size) + data[place + size :]


def archive() -> bytes:
    """Return a ZIP file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as output:
        output.writestr("a.mp4", b"nothing")
    return file.getvalue()


def sound() -> bytes:
    """Return a WAV file of silence."""
    data = bytes(16000)
    head = struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(data), b"WAVE", b"fmt ", 16, 1, 1, 8000, 8000, 1, 8, b"data", len(data)
    )
    return head + data


def equal_times_mp4() -> bytes:
    """Return an mp4 of seven frames over a minute, of which the second has the time of the first."""
    ticks = [0, 2, 3, 10, 11, 30, 60]
    data = encoded(frames(7), "mp4", "libx264", ticks=ticks, ticks_per_s=1, options=X264 | {"bf": "0"})
    return patched(data, b"stts", 16, 0)  # the first entry's ticks, behind version, number and count


def timing() -> list[Case]:
    """Return sound files whose times were misread, or that were called damaged."""
    made = partial(Case, kind="made", is_refused=False)
    ticks = [0, 1000, 5000, 5000, 9000, 30000, 60000]
    pictures = frames(7)
    plain264 = {"options": X264 | {"bf": "0"}}
    once = encoded(
        pictures, "matroska", "libx264", ticks=[0, 1000, 5000, 5001, 9000, 30000, 60000], ticks_per_s=1000, **plain264
    )
    fast = encoded(
        frames(12),
        "mp4",
        "libx264",
        ticks_per_s=2000,
        options=X264 | {"bf": "0"},
        muxer={"video_track_timescale": "16000"},
    )
    short = encoded(frames(24), "mp4", "libx264", ticks_per_s=30, options=X264 | {"bf": "0"})
    normal = encoded(frames(), "mp4", "libx264", options=X264 | {"bf": "0"})
    longest = encoded(
        pictures, "matroska", "libx264", ticks=[0, 50, 100, 150, 200, 250, 5000], ticks_per_s=1000, **plain264
    )
    return [
        made("F1-equal-times.mkv", copied(once, "matroska", {3: ticks[3]}), duration_s=60.0),
        made("F1-equal-times.mp4", equal_times_mp4(), num_frames=7, last_s=58.0),
        made("F2-2000-fps.mp4", fast, num_frames=12),
        made("F7-copied-to.avi", copied(CONTAINERS["h264.ts"](), "avi"), is_silent=True, num_frames=NUM_FRAMES),
        made("F7-long-last-frame.mkv", longest, is_silent=True, num_frames=7),
        Case("F9-first-picture-lost.mp4", zeroed_first_picture(short), "made", options={"fps": 1}),
        made("F12-times.flv", encoded(frames(), "flv", "libx264", options=X264), duration_s=NUM_FRAMES / FPS),
        Case("C1-timescale.mp4", patched(normal, b"mdhd", 16, 0x7FFFFFFF), "made"),
        Case("C1-timescale-0.mp4", patched(normal, b"mdhd", 16, 0), "made"),
    ]


def pictures() -> list[Case]:
    """Return files whose pictures were wrong, and such that ended in unclear errors."""
    made = partial(Case, kind="made", is_refused=False)
    matrix = X264 | {"x264-params": "threads=1:colormatrix=YCgCo"}
    red = encoded(plain(*[(200, 30, 30)] * 8), "mp4", "libx264", options=matrix)
    tag = encoded(frames(), "matroska", "libx264", options=X264, metadata={"DURATION-eng": "5000"})
    text = encoded(frames(), "matroska", "libx264", options=X264, metadata={"DURATION_TEXT": "0.4 s"})
    white = (255, 255, 255)
    return [
        made("F3-palette.avi", palette_avi(), colours={0.6: (255, 0, 0)}),
        made("F4-two-headers.flv", two_headers(), colours={1.7: (30, 30, 200)}),
        made("F8-duration-tag.mkv", tag),
        made("F8-duration-text.mkv", text),
        Case("F10-matrix.mp4", red, "made"),
        made("F11-transparent.png", apng(alpha=0), colours={0.0: white, 0.2: white}),
        Case("F13-broken.png", apng(is_broken=True), "made"),
        Case("C2-12000x12000.png", png(12000, 12000), "made"),
        Case("bomb-60000x60000.png", png(60000, 60000), "made", is_refused=True),
    ]


def not_videos(film: bytes) -> list[Case]:
    """Return playlists, texts and the like: all must be refused, and nothing that they name be opened."""
    made = partial(Case, kind="made", is_refused=True)
    beside = {"film.ts": film}
    medium = b"m=video 41234 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
    sdp = b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n" + medium
    mpd = (
        b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        b'mediaPresentationDuration="PT2S"><Period><AdaptationSet mimeType="video/mp2t"><Representation id="1" '
        b'bandwidth="1"><BaseURL>film.ts</BaseURL></Representation></AdaptationSet></Period></MPD>'
    )
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"><rect width="9" height="9"/></svg>'
    laughs = (
        b'<!DOCTYPE s [<!ENTITY a "ha">'
        + b"".join(b'<!ENTITY %c "%s">' % (98 + n, b"&%c;" % (97 + n) * 10) for n in range(9))
        + b']><svg xmlns="http://www.w3.org/2000/svg">&j;</svg>'
    )
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2,\n%s\n#EXT-X-ENDLIST\n"
    return [
        made("A1-relative.m3u8", playlist % b"film.ts", beside=beside),
        made("A1-absolute.m3u8", playlist % b"/proc/self/environ"),
        made("A1-http.m3u8", playlist % b"http://127.0.0.1:9/film.ts"),
        made("A1-hidden-as.mp4", playlist % b"film.ts", beside=beside),
        made("A1-concat.ffconcat", b"ffconcat version 1.0\nfile film.ts\n", beside=beside),
        made("A1-concat-hidden-as.mp4", b"ffconcat version 1.0\nfile film.ts\n", beside=beside),
        made("A1-dash.mpd", mpd, beside=beside),
        made("A4-session.sdp", sdp),
        made("A4-hidden-as.mp4", sdp),
        made("A4-200-lines.sdp", sdp + medium * 200),
        made("B2-picture.svg", svg),
        made("B2-laughs.svg", laughs),
        made("B2-picture-as.png", svg),
        made("text.txt", b"hello world\n" * 2000),
        made("text.mp4", b"hello world\n" * 2000),
        made("page.html", b"<!doctype html><title>404</title>Not found"),
        made("subtitles.srt", b"1\n00:00:00,000 --> 00:00:09,000\nHello\n"),
        made("empty.mp4", b""),
        made("one-byte.mkv", b"\x1a"),
        made("archive.zip", archive()),
        made("archive-as.mp4", archive()),
        made("sound.wav", sound()),
        made("pickle.pt", b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94."),
        made("json.json", b"[" * 200_000),
        made("name with %03d and \n.mp4", b"nothing"),
    ]


def by_hand() -> list[Case]:
    """Return the files made by hand."""
    return [*timing(), *pictures(), *not_videos(CONTAINERS["h264.ts"]())]


def write(case: Case, folder: Path) -> Path:
    """Write a case's files into a folder of its own, and return the path of its main one."""
    folder.mkdir(parents=True)
    for name, data in case.beside.items():
        (folder / name).write_bytes(data)
    path = folder / case.name
    path.write_bytes(case.data)
    return path
