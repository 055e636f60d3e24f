"""From what people give (a path, bytes, an open file, a folder, arrays, images) to a clip that yields frames."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.WebPImagePlugin import WebPImageFile

from .decode import Video
from .pictures import Animation, Pictures
from .types import Clip, Source, VideoError

_IMAGE_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def name_of(source: Source) -> str:
    """Return what messages call a source."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    if isinstance(source, bytes | bytearray):
        return f"video of {len(source)} bytes"
    if isinstance(source, np.ndarray):
        return f"{source.dtype}{list(source.shape)}"
    if isinstance(source, Image.Image):
        return f"image of {source.width}x{source.height}"
    if isinstance(source, list | tuple):
        return f"list of {len(source)} images"
    file_name = getattr(source, "name", None)
    return file_name if isinstance(file_name, str) else f"video from {type(source).__name__}"


def open_clip(source: Source, source_fps: float) -> Clip:
    """Return the clip of a source, opened.

    Raises:
        VideoError: it is not a video that can be read.
    """
    name = name_of(source)
    if not (math.isfinite(source_fps) and source_fps > 0):
        raise VideoError(f"{name}: source_fps={source_fps}: give a positive number")
    try:
        return _open_source(source, name, source_fps)
    except OSError as error:
        raise VideoError(f"{name}: cannot be read: {error.strerror or error}") from error
    except Image.DecompressionBombError as error:
        raise VideoError(f"{name}: {error}") from error


def _open_source(source: Source, name: str, source_fps: float) -> Clip:
    if isinstance(source, str | os.PathLike):
        return _open_path(Path(source), name, source_fps)
    if isinstance(source, bytes | bytearray):
        return _open_file(io.BytesIO(source), name, source_fps)
    if isinstance(source, Image.Image):
        return Pictures(name, "image", [source], source_fps)
    if isinstance(source, np.ndarray):
        return Pictures(name, "array", source[None] if source.ndim == 3 else source, source_fps)
    if isinstance(source, list | tuple):
        return Pictures(name, "list", source, source_fps)
    if isinstance(source, io.TextIOBase | Sequence) or not hasattr(source, "read"):
        kinds = "a path, bytes, a file opened in binary mode, uint8[T, H, W, 3] or a list of images"
        raise VideoError(f"{name}: cannot read a video from this type; give {kinds}")
    return _open_file(source if source.seekable() else io.BytesIO(source.read()), name, source_fps)


def _open_path(path: Path, name: str, source_fps: float) -> Clip:
    if path.is_dir():
        files = [
            file for file in path.iterdir() if file.suffix.lower() in _IMAGE_SUFFIXES and not file.name.startswith(".")
        ]
        if not files:
            suffixes = ", ".join(sorted(_IMAGE_SUFFIXES))
            raise VideoError(f"{name}: the folder has no frames; give a video file or a folder of images ({suffixes})")
        files.sort(key=_natural)
        return Pictures(name, "folder", files, source_fps)
    if not path.exists():
        raise VideoError(f"{name}: no such file or folder; check the path")
    with path.open("rb") as file:
        return _open_file(file, name, source_fps, path.absolute())


def _natural(path: Path) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", path.name.casefold())]


def _open_file(file: IO[bytes], name: str, source_fps: float, path: Path | None = None) -> Clip:
    if file.seek(0, os.SEEK_END) == 0:
        raise VideoError(f"{name}: the file is empty (0 bytes); copy or download it again")
    # A TGA has nothing that tells it but its name, so it is one only where it is called so.
    formats = (*_IMAGE_FORMATS, "TGA") if path is not None and path.suffix.lower() == ".tga" else _IMAGE_FORMATS
    try:
        is_video = Image.open(file, formats=formats).get_format_mimetype() == "image/apng"
    except UnidentifiedImageError:
        is_video = True
    if is_video:
        return Video(path or file, name)
    file.seek(0)
    image = Image.open(io.BytesIO(file.read()), formats=formats)
    if isinstance(image, WebPImageFile) and image.n_frames > 1:
        return Animation(name, image)
    return Pictures(name, "image", [image], source_fps)
