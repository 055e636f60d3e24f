"""Write small test media whose frames carry their number as a grid of black and white blocks."""

import io
import math
import os
import signal
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from einops import repeat
from numpy.typing import NDArray

# 4 x 4 blocks: 14 bits of number; the first block is white and the last one black, so that a turned frame reads as -1.
_GRID = 4


def number_frame(number: int, width: int = 96, height: int = 64) -> NDArray[np.uint8]:
    """Return uint8[height, width, 3] that shows `number` (0 to 16383) in blocks that survive lossy coding."""
    bits = [1, *((number >> i) & 1 for i in range(_GRID * _GRID - 2)), 0]
    blocks = np.array(bits, np.uint8).reshape(_GRID, _GRID) * 200 + 25
    return repeat(blocks, "h w -> (h bh) (w bw) c", bh=height // _GRID, bw=width // _GRID, c=3)


def read_number(frame: NDArray[np.uint8]) -> int:
    """Return the number that `number_frame` wrote, or -1 where the frame does not stand upright."""
    height, width = frame.shape[:2]
    rows = [(2 * i + 1) * height // (2 * _GRID) for i in range(_GRID)]
    columns = [(2 * i + 1) * width // (2 * _GRID) for i in range(_GRID)]
    bits = (frame[np.ix_(rows, columns)].mean(-1) > 128).ravel()
    if not bits[0] or bits[-1]:
        return -1
    return int(sum(int(bit) << i for i, bit in enumerate(bits[1:-1])))


def read_numbers(frames: Iterable[NDArray[np.uint8]]) -> list[int]:
    """Return `read_number` of every frame."""
    return [read_number(frame) for frame in frames]


def write_video(
    path: Path,
    num_frames: int = 64,
    *,
    fps: Fraction | int = 30,
    ticks: Sequence[int] | None = None,
    ticks_per_s: int = 1000,
    width: int = 96,
    height: int = 64,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    rotation: int = 0,
    hflip: bool = False,
    audio: bool = False,
    format: str | None = None,
    codec_options: dict[str, str] | None = None,
    muxer_options: dict[str, str] | None = None,
) -> Path:
    """Encode numbered frames 0, 1, 2, ...; `ticks` (in 1 / `ticks_per_s` s) gives a variable frame rate.

    `rotation` (degrees counterclockwise) and `hflip` go into the display matrix and the pictures are stored turned the
    other way: a reader that applies the matrix sees them upright, `width` x `height`.
    """
    with av.open(str(path), "w", format=format, options=muxer_options or {}) as container:
        stream: Any = container.add_stream(codec, rate=fps, options=codec_options or {})
        turned = rotation % 180 != 0
        stream.width, stream.height = (height, width) if turned else (width, height)
        stream.pix_fmt = pix_fmt
        time_base = Fraction(1, ticks_per_s) if ticks is not None else 1 / Fraction(fps)
        stream.codec_context.time_base = time_base
        sound: Any = container.add_stream("aac", rate=16000, layout="mono") if audio else None
        if sound is not None:
            _write_silence(container, sound, num_frames / Fraction(fps))
        for number in range(num_frames):
            picture = number_frame(number, width, height)
            if hflip:
                picture = picture[:, ::-1]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.rot90(picture, -rotation // 90)), format="rgb24")
            frame.time_base = time_base
            frame.pts = ticks[number] if ticks is not None else number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if rotation or hflip:
        turn(path, rotation, hflip)
    return path


def turn(path: Path, rotation: int, hflip: bool) -> None:
    """Write the display matrix of an mp4, as every version of PyAV reads it and only new ones write it."""
    cos, sin = round(math.cos(math.radians(rotation))), round(math.sin(math.radians(rotation)))
    x = -1 if hflip else 1
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44  # of the first track: behind its times and its number
    struct.pack_into(">9i", data, matrix, *(65536 * n for n in (x * cos, -sin, 0, x * sin, cos, 0, 0, 0)), 1 << 30)
    path.write_bytes(data)


def _write_silence(container: Any, stream: Any, duration_s: Fraction) -> None:
    for start in range(0, int(duration_s * 16000), 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16000, start, Fraction(1, 16000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def write_audio(path: Path, duration_s: int = 1) -> Path:
    """Write a file with one silent audio stream and no video."""
    with av.open(str(path), "w") as container:
        _write_silence(container, container.add_stream("aac", rate=16000, layout="mono"), Fraction(duration_s))
    return path


def truncate(path: Path, keep: float) -> Path:
    """Cut the file after the share `keep` of its bytes."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    return path


def die_of_bad_names(path: str, kind: str, num_frames: int | None) -> tuple[str, str]:
    """Stand for a decoder that some files crash: the process is gone, as after a segmentation fault."""
    if "bad" in path:
        os.kill(os.getpid(), signal.SIGKILL)
    return "", f"{path} {kind} {num_frames}"


def damage(path: Path, start: float, stop: float) -> Path:
    """Overwrite the bytes between the shares `start` and `stop` of the file."""
    data = bytearray(path.read_bytes())
    first, last = int(len(data) * start), int(len(data) * stop)
    data[first:last] = np.random.default_rng(0).integers(0, 256, last - first, np.uint8).tobytes()
    path.write_bytes(data)
    return path


def write_empty(path: Path, muxer_options: dict[str, str]) -> Path:
    """Write a container with a video stream and no frames."""
    with av.open(str(path), "w", options=muxer_options) as container:
        stream: Any = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        container.start_encoding()
    return path


def write_cover(path: Path) -> Path:
    """Write a sound file with a picture of its cover, which containers store as a video stream."""
    with av.open(str(path), "w") as container:
        sound: Any = container.add_stream("aac", rate=16000, layout="mono")
        cover: Any = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 96, 64, "yuvj420p"
        cover.disposition = Disposition.attached_pic.value
        container.mux(
            cover.encode(av.VideoFrame.from_ndarray(number_frame(0), format="rgb24").reformat(format="yuvj420p"))
        )
        container.mux(cover.encode())
        _write_silence(container, sound, Fraction(1))
    return path


def remux(source: Path, target: Path, change: Callable[[Any], Iterable[Any]]) -> Path:
    """Copy the video packets, each replaced by what `change` returns for it."""
    with av.open(str(source)) as reader, av.open(str(target), "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for packet in reader.demux(reader.streams.video[0]):
            if packet.size:
                for changed in change(packet):
                    changed.stream = stream
                    writer.mux(changed)
    return target


def video_maker(
    folder: Path, structures: Mapping[str, tuple[str, Mapping[str, Any]]], num_frames: int
) -> Callable[[str], Path]:
    """Return a function that writes a video by name when it is first asked for.

    Args:
        folder: where it is written.
        structures: suffix of the file and options of `write_video`, by name.
        num_frames: of every video.
    """

    def video(name: str) -> Path:
        suffix, options = structures[name]
        path = folder / f"{name}.{suffix}"
        if not path.exists():
            write_video(path, num_frames, **options)
        return path

    return video


def big_buck_bunny(folder: Path) -> Path | None:
    """Return a film of ten minutes, fetched into `folder` with a package that holds it; None where it cannot be had."""
    here = Path(__file__).parents[1] / "runs" / "media" / "bbb.mp4"
    if here.is_file():
        return here
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation"]
    package = "moviepy==2.2.1"
    done = subprocess.run([*command, "--no-binary", "moviepy", "-d", str(folder), package], capture_output=True)
    found = list(folder.glob("moviepy-*.tar.gz"))
    if done.returncode != 0 and not found:
        return None
    with tarfile.open(found[0]) as archive:
        name = next(member for member in archive.getnames() if member.endswith("moviepy_10_minutes.zip"))
        inner = archive.extractfile(name)
        assert inner is not None
        with zipfile.ZipFile(io.BytesIO(inner.read())) as packed:
            (folder / "bbb.mp4").write_bytes(packed.read(next(x for x in packed.namelist() if x.endswith("bbb.mp4"))))
    return folder / "bbb.mp4"
