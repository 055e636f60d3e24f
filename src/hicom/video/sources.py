"""From what people give (a path, a URL, bytes, an open file, a folder, arrays, images) to a clip that yields frames."""

from __future__ import annotations

import io
import math
import mmap
import os
import re
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
from av.video.frame import VideoFrame
from PIL import Image

from ..fetch import CHUNK, FetchError, FetchLimits, fetch, fetch_pieces
from .decode import Video
from .pictures import FORMATS, Animation, Pictures, has_hidden_alpha, heif_kind, open_picture
from .types import Clip, Pixels, Source, VideoError

MAX_STREAM_BYTES = 2**32
"""Of a pipe or another source that comes once: it is kept, in memory up to 64 MiB, in a temporary file beyond."""
FETCH_LIMITS = FetchLimits(max_bytes=2**30, timeout_s=60.0, max_redirects=5, allow_private=True)
"""Of a URL: its bytes, the seconds for all of it, and how often its host may send on. Any host will do."""
_IN_MEMORY = 2**26

# fmt: off
IMAGE_SUFFIXES = (
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".hif", ".jfif", ".jp2", ".jpe", ".jpeg",
    ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
)
# fmt: on
"""Of the files that are the frames of a folder."""
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_MAX_NAME = 240  # characters of a name in messages


def name_of(source: Any) -> str:
    """Return what messages call a source."""
    if isinstance(source, str | os.PathLike):
        return _name_of_path(os.fspath(source))
    if isinstance(source, bytes | bytearray):
        return f"video of {len(source)} bytes"
    if isinstance(source, memoryview):
        return f"video of {source.nbytes} bytes"
    if isinstance(source, mmap.mmap):
        return "video in mapped memory"
    if isinstance(source, np.ndarray) or _is_tensor(source):
        return f"{str(source.dtype).removeprefix('torch.')}{list(source.shape)}"
    if isinstance(source, Image.Image | VideoFrame):
        return f"image of {source.width}x{source.height}"
    if isinstance(source, list | tuple):
        return f"list of {len(source)} images"
    file_name = getattr(source, "name", None)
    return _name_of_path(file_name) if isinstance(file_name, str) else f"video from {type(source).__name__}"


def _name_of_path(name: str) -> str:
    if _URL.match(name):
        name = re.sub(r"//[^/@]*@", "//", name.partition("?")[0])  # what follows may hold a key
    return name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME // 2]}...{name[-_MAX_NAME // 2 :]}"


def open_clip(source: Source, source_fps: float) -> Clip:
    """Return the clip of a source, opened.

    Raises:
        VideoError: it is not a video that can be read.
    """
    name = name_of(source)
    if isinstance(source_fps, bool) or not isinstance(source_fps, int | float | np.number):
        raise VideoError(f"{name}: source_fps={source_fps!r}: give a positive number")
    if not (math.isfinite(source_fps) and source_fps > 0):
        raise VideoError(f"{name}: source_fps={source_fps}: give a positive number")
    try:
        return _open_source(source, name, float(source_fps))
    except OSError as error:
        raise VideoError(f"{name}: cannot be read: {error.strerror or error}") from error
    except VideoError:
        raise
    except ValueError as error:  # a closed file
        raise VideoError(f"{name}: cannot be read: {error}") from error


def _open_source(source: Any, name: str, source_fps: float) -> Clip:
    if isinstance(source, str):
        return _open_text(source, name, source_fps)
    if isinstance(source, os.PathLike):
        return _open_path(Path(source), name, source_fps)
    if isinstance(source, bytes | bytearray | memoryview):
        return _open_file(io.BytesIO(source if isinstance(source, bytes) else bytes(source)), name, source_fps)
    if isinstance(source, mmap.mmap):
        mapped: Any = _Mapped(source)
        return _open_file(mapped, name, source_fps)
    if isinstance(source, Image.Image | VideoFrame):
        return Pictures(name, "image", [source], source_fps)
    if isinstance(source, np.ndarray) or _is_tensor(source):
        array = _channels_last(source, name)
        return Pictures(name, "array", array[None] if array.ndim == 3 else array, source_fps)
    if isinstance(source, list | tuple):
        return _open_list(source, name, source_fps)
    if isinstance(source, Iterator) and not hasattr(source, "read"):
        return _open_list(list(source), name, source_fps)
    if isinstance(source, io.TextIOBase | Sequence) or not hasattr(source, "read"):
        kinds = "a path, bytes, a file opened in binary mode, uint8[T, H, W, 3] or a list of images"
        raise VideoError(f"{name}: cannot read a video from this type; give {kinds}")
    if not getattr(source, "seekable", lambda: hasattr(source, "seek"))():
        return _open_pieces(_pieces(source, name), name, source_fps)
    return _open_file(source, name, source_fps)


# Text: paths, URLs, standard input


def _open_text(source: str, name: str, source_fps: float) -> Clip:
    if not source.strip():
        raise VideoError(
            f"{source!r}: the path of the video is empty; give a file or a folder of images ('.' is the current one)"
        )
    if source == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise VideoError("-: standard input is a terminal; pipe a video into it, or give a path")
        return _open_pieces(_pieces(sys.stdin.buffer, name), name, source_fps)
    found = _URL.match(source)
    scheme = found[1].lower() if found else ""
    if scheme in ("http", "https"):
        return _open_url(source, name, source_fps)
    if scheme == "file":
        return _open_path(path_of_url(source), name, source_fps)
    if scheme:
        raise VideoError(f"{name}: there is no way to read {scheme}:// ; give http, https or file, or a path")
    return _open_path(Path(source), name, source_fps)


def _open_url(url: str, name: str, source_fps: float) -> Clip:
    with _fetching(name):
        return _open_pieces(fetch_pieces(url, FETCH_LIMITS), name, source_fps)


def fetch_url(url: str) -> bytes:
    """Return the content behind an `http` or `https` URL that the user names, within `FETCH_LIMITS`.

    Raises:
        VideoError: it cannot be had.
    """
    with _fetching(_name_of_path(url)):
        return fetch(url, FETCH_LIMITS)


@contextmanager
def _fetching(name: str) -> Iterator[None]:
    try:
        yield
    except FetchError as error:
        reason = f" ({error.__cause__})" if error.__cause__ is not None and str(error.__cause__) else ""
        raise VideoError(f"{name}: {error}{reason}; check the URL, or download it and give a path") from error


def path_of_url(url: str) -> Path:
    """Return the path of a `file://` URL.

    Raises:
        VideoError: it is on another host.
    """
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise VideoError(f"{_name_of_path(url)}: the file is on another host; give file:///PATH or a path")
    return Path(url2pathname(parts.path))


# Mapped memory, and sources that come once


class _Mapped(io.RawIOBase):
    """Mapped memory as a file; before Python 3.13 it is not quite one."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self._mapped = mapped

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._mapped.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: Any = os.SEEK_SET) -> int:
        self._mapped.seek(offset, whence)
        return self._mapped.tell()


def _pieces(file: Any, name: str) -> Iterator[bytes]:
    while piece := file.read(CHUNK):
        if not isinstance(piece, bytes | bytearray | memoryview):
            raise VideoError(f"{name}: reading gives {type(piece).__name__}; open it in binary mode")
        yield bytes(piece)


def _open_pieces(pieces: Iterable[bytes], name: str, source_fps: float) -> Clip:
    """Return the clip of what comes once, kept as a file that can be read several times."""
    kept: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115, the clip holds it
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > MAX_STREAM_BYTES:
            raise VideoError(f"{name}: more than {MAX_STREAM_BYTES:,} bytes come; save it to a file, and give its path")
        kept.write(piece)
    kept.seek(0)
    # Of bytes several threads read; a file has one position for all.
    return _open_file(kept if size > _IN_MEMORY else io.BytesIO(kept.read()), name, source_fps)


# Files and folders


def _open_path(path: Path, name: str, source_fps: float) -> Clip:
    if path.is_dir():
        files = [
            file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
        ]
        if not files:
            text = "the folder has no frames; give a video file or a folder of images"
            raise VideoError(f"{name}: {text} ({', '.join(IMAGE_SUFFIXES)})")
        files.sort(key=_natural)
        return Pictures(name, "folder", files, source_fps)
    if not path.exists():
        raise VideoError(f"{name}: no such file or folder; check the path")
    with path.open("rb") as file:
        if stat.S_ISFIFO(path.stat().st_mode):  # `<(command)`, /dev/stdin, a named pipe
            return _open_pieces(_pieces(file, name), name, source_fps)
        return _open_file(file, name, source_fps, path.absolute())


def _natural(path: Path) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", path.name.casefold())]


def _open_file(file: IO[bytes], name: str, source_fps: float, path: Path | None = None) -> Clip:
    file.seek(0, os.SEEK_END)
    if file.tell() == 0:
        raise VideoError(f"{name}: the file is empty (0 bytes); copy or download it again")
    # A TGA has nothing that tells it but its name, so it is one only where it is called so.
    formats = (*FORMATS, "TGA") if path is not None and path.suffix.lower() == ".tga" else FORMATS
    image = open_picture(file, f"{name}:", formats)
    if image is None or image.get_format_mimetype() == "image/apng" or _is_opaque_sequence(file, image):
        video = Video(path or file, name)
        if has_hidden_alpha(file):
            note = (
                "its transparency is not decoded by FFmpeg: shown opaque (Pillow 11.3 for AVIF, hicom[heif] for HEIC)"
            )
            video.info = replace(video.info, notes=(*video.info.notes, note))
        return video
    file.seek(0)
    image = open_picture(io.BytesIO(file.read()), f"{name}:", formats)  # of its own, as files are closed
    assert image is not None
    if image.format in ("AVIF", "WEBP") and getattr(image, "n_frames", 1) > 1:
        return Animation(name, image)
    return Pictures(name, "image", [image], source_fps)


def _is_opaque_sequence(file: IO[bytes], image: Image.Image) -> bool:
    """Return whether a file is an animated AVIF or HEIC, of which FFmpeg has exact times, but not transparency."""
    kind, is_sequence = heif_kind(file)
    return is_sequence and (kind == "heic" or not (image.has_transparency_data and getattr(image, "n_frames", 1) > 1))


# Frames


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")  # where nobody has loaded it, there are no tensors
    return torch is not None and isinstance(value, torch.Tensor)


def _channels_last(frames: Any, name: str) -> Pixels:
    """Return uint8[..., H, W, 3] of an array or a tensor of a frame or several, in either layout."""
    is_tensor = _is_tensor(frames)
    if is_tensor and str(frames.dtype) != "torch.uint8":
        text = "frames must be uint8, from 0 to 255; where 1 is white: (x * 255).round().to(torch.uint8)"
        raise VideoError(f"{name}: {text}")
    array = frames.detach().cpu().numpy() if is_tensor else frames
    if array.ndim not in (3, 4) or array.shape[-3] != 3:
        return array
    if array.shape[-1] != 3:
        return np.moveaxis(array, -3, -1)
    if is_tensor:  # arrays are what the documentation says: channels last
        many = "T, " * (array.ndim - 3)
        raise VideoError(
            f"{name}: this may be [{many}3, H, W] or [{many}H, W, 3]; give an array, x.numpy(), which is the latter"
        )
    return array


def _open_list(frames: Sequence[Any], name: str, source_fps: float) -> Clip:
    pictures: list[Any] = [
        _channels_last(each, f"{name}: frame {number}") if isinstance(each, np.ndarray) or _is_tensor(each) else each
        for number, each in enumerate(frames)
    ]
    if pictures and all(isinstance(each, VideoFrame) for each in pictures):
        times = [None if each.pts is None else float(each.pts * each.time_base) for each in pictures]
        if any(time_s is not None for time_s in times):
            return _open_timed(pictures, times, name, source_fps)
    return Pictures(name, "list", pictures, source_fps)


def _open_timed(pictures: list[VideoFrame], times: list[float | None], name: str, source_fps: float) -> Clip:
    """Return the clip of decoded frames with times of their own."""
    told = [time_s for time_s in times if time_s is not None]
    if len(told) < len(times) or any(a >= b for a, b in pairwise(told)):
        text = "the times (pts) of frames must rise; sort the frames, or set the pts of all to None for an even rate"
        raise VideoError(f"{name}: {text}")
    times_s = np.array(told) - told[0]
    last = pictures[-1]
    last_s = float((getattr(last, "duration", 0) or 0) * (last.time_base or 0))
    if last_s <= 0:
        last_s = float(times_s[-1] - times_s[-2]) if len(times_s) > 1 else 1 / source_fps
    return Pictures(name, "list", pictures, source_fps, times_s, float(times_s[-1]) + last_s)
