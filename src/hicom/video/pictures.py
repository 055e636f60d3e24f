"""Frames that are pictures: arrays, images, folders, animated WebP. Pillow reads them, and its plugin reads HEIC."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from av.video.frame import VideoFrame
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from ..square import Square
from .colour import fit, frame_pixels, on_white, squared
from .large import shrink
from .types import Picture, Pixels, VideoError, VideoFrames, VideoInfo

if TYPE_CHECKING:
    from collections.abc import Collection

# What Pillow's readers raise at broken files, besides its own errors: whatever their parsing meets.
_BROKEN = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
)
_AVIF, _HEIC = frozenset({b"avif", b"avis"}), frozenset({b"heic", b"heix", b"heim", b"heis", b"mif1"})
_SEQUENCES = frozenset({b"avis", b"msf1", b"hevc", b"hevx"})
# Of these a file may hold a whole clip. Others hold several for other reasons, such as a JPEG and its depth.
_ANIMATED = frozenset({"AVIF", "GIF", "PNG", "WEBP"})

FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Of Pillow, with AVIF and HEIC, those for files from anybody: it knows some that start other programs."""


class Given:
    """Frames that are there already."""

    def __init__(self, video: VideoFrames) -> None:
        self._frames = video.frames
        self.info, self.times_s, self.tick_s = video.info, video.timestamps_s, 0.0
        self.keys = np.arange(len(self.times_s))

    def frames(self, indices: list[int], size: int | Square | None) -> Iterator[tuple[int, Pixels]]:
        """Yield the frames `indices`; see `Clip`."""
        yield from ((index, self._frames[index]) for index in indices)


@contextmanager
def reading(where: str, verb: str = "decoded") -> Iterator[None]:
    """Turn whatever Pillow raises at a broken picture into a VideoError that begins with `where`."""
    try:
        yield
    except VideoError:
        raise
    except Image.DecompressionBombError as error:
        raise VideoError(f"{where.rstrip(':')}: {error}") from error
    except MemoryError as error:
        raise VideoError(f"{where} cannot be {verb}: there is not enough memory for it") from error
    except _BROKEN as error:
        raise VideoError(f"{where} cannot be {verb}: {error or type(error).__name__}") from error


# Opening files


def heif_kind(file: IO[bytes]) -> tuple[str, bool]:
    """Return `avif`, `heic` or nothing for other files, and whether it is a sequence rather than a still picture."""
    file.seek(0)
    head = file.read(64)
    file.seek(0)
    end = min(int.from_bytes(head[:4], "big"), len(head))
    if head[4:8] != b"ftyp" or head[8:12] not in _AVIF | _HEIC | _SEQUENCES:
        return "", False
    brands = {head[8:12], *(head[i : i + 4] for i in range(16, end - 3, 4))}
    return "avif" if brands & _AVIF else "heic", bool(brands & _SEQUENCES)


def has_hidden_alpha(file: IO[bytes]) -> bool:
    """Return whether an AVIF or HEIC has transparency, which it stores as a picture of its own."""
    if not heif_kind(file)[0]:
        return False
    head = file.read(2**16)
    return b"systems:auxiliary:alpha" in head or b"hevc:2015:auxid:1" in head


def open_picture(file: IO[bytes], where: str, formats: Collection[str] | None = None) -> ImageFile.ImageFile | None:
    """Return an opened picture, or None where neither Pillow nor its plugin for HEIC know the format.

    Args:
        file: at any position.
        where: the beginning of messages.
        formats: of Pillow, the only ones to try; AVIF and HEIC are tried anyhow.

    Raises:
        VideoError: the picture is broken.
    """
    kind = heif_kind(file)[0]
    with reading(where, "read"):
        if kind == "heic":
            return _open_heic(file)
        if kind == "avif":
            Image.init()
            formats = ("AVIF",)
            if "AVIF" not in Image.OPEN:  # Pillow before 11.3
                return None
        file.seek(0)
        try:
            return Image.open(file, formats=None if formats is None else list(formats))
        except UnidentifiedImageError:
            return None


def _open_heic(file: IO[bytes]) -> ImageFile.ImageFile | None:
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        return None
    # Not registered with Pillow: that would change what `Image.open` does for others, too.
    try:
        opener: Any = HeifImageFile
        image: ImageFile.ImageFile = opener(file)
    except SyntaxError:  # not of a kind that it knows; FFmpeg may
        return None
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > 2 * limit:
        raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels are more than {2 * limit}")
    return image


# Clips


class Pictures:
    """Frames that are separate pictures, loaded when they are chosen.

    Args:
        name: of the source, for messages.
        container: what they come in.
        pictures: see `Picture`.
        fps: frames per second, where no times are given.
        times_s: float64[T], ascending from 0; None: at an even rate.
        duration_s: of all, with `times_s`.
    """

    def __init__(
        self,
        name: str,
        container: str,
        pictures: Sequence[Picture] | Pixels,
        fps: float,
        times_s: NDArray[np.float64] | None = None,
        duration_s: float | None = None,
    ) -> None:
        if len(pictures) == 0:
            raise VideoError(f"{name}: there are no frames in it; give at least one")
        self._name, self._pictures = name, pictures
        first = pictures[0]
        codec = "raw"
        if isinstance(first, str | os.PathLike):
            codec = Path(first).suffix.lower().removeprefix(".")
        elif isinstance(first, Image.Image) and first.format is not None:
            codec = first.format.lower()
        elif isinstance(first, bytes):
            with self._loaded(0) as (image, _):
                codec = str(getattr(image, "format", codec)).lower()
        self.times_s = np.arange(len(pictures)) / fps if times_s is None else times_s
        self.tick_s = 1 / fps
        self.keys = np.arange(len(pictures))
        duration_s = len(pictures) / fps if duration_s is None else duration_s
        width, height = self._size(0)
        self.info = VideoInfo(
            name=name,
            container=container,
            codec=codec,
            duration_s=duration_s,
            num_frames=len(pictures),
            fps=len(pictures) / duration_s,
            width=width,
            height=height,
        )

    def frames(self, indices: list[int], size: int | Square | None) -> Iterator[tuple[int, Pixels]]:
        """Yield the frames `indices`; see `Clip`."""
        for index in indices:
            yield index, self._pixels(index, size)

    def _pixels(self, index: int, size: int | Square | None) -> Pixels:
        with self._loaded(index) as (picture, where):
            if isinstance(picture, VideoFrame):
                return frame_pixels(picture, where, size)
            if isinstance(picture, Image.Image):
                return image_pixels(picture, where, size)
            if fit(picture.shape[1], picture.shape[0], size) == (picture.shape[1], picture.shape[0]):
                return squared(picture, size)
            return image_pixels(Image.fromarray(picture), where, size)

    def _size(self, index: int) -> tuple[int, int]:
        """Return the width and height of a picture as it is shown; it is decoded, and so known to be sound."""
        with self._loaded(index) as (picture, where):
            if isinstance(picture, Image.Image):
                with reading(where):
                    picture.load()
                    size = picture.width, picture.height
                    return (size[1], size[0]) if _orientation(picture) in (5, 6, 7, 8) else size
            shape = (frame_pixels(picture, where, None) if isinstance(picture, VideoFrame) else picture).shape
            return shape[1], shape[0]

    @contextmanager
    def _loaded(self, index: int) -> Iterator[tuple[Image.Image | Pixels | VideoFrame, str]]:
        """Give a picture, opened where it is a file and closed afterwards, and what messages call it."""
        picture = self._pictures[index]
        where = f"{self._name}: frame {index}"
        if isinstance(picture, np.ndarray):
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or picture.size == 0:
                fix = "; where 1 is white: (x * 255).round().astype('uint8')" if picture.dtype.kind == "f" else ""
                kind = f"{picture.dtype}{list(picture.shape)}"
                raise VideoError(f"{where} is {kind}; frames must be uint8[H, W, 3], from 0 to 255{fix}")
            yield picture, where
        elif isinstance(picture, Image.Image | VideoFrame):
            yield picture, where
        elif isinstance(picture, bytes):
            opened = open_picture(io.BytesIO(picture), where, FORMATS)
            if opened is None:
                raise VideoError(f"{where} cannot be read: {_unknown(io.BytesIO(picture))}")
            with opened:
                yield opened, where
        elif isinstance(picture, str | os.PathLike):
            with self._opened(Path(picture), f"{where}, {os.fspath(picture)},") as image:
                yield image, f"{where}, {os.fspath(picture)},"
        else:
            text = "give a path, a Pillow image, an av.VideoFrame or uint8[H, W, 3]"
            raise VideoError(f"{where} is a {type(picture).__name__}; {text}")

    @contextmanager
    def _opened(self, path: Path, where: str) -> Iterator[Image.Image]:
        with reading(where, "read"):
            file = path.open("rb")
        with file:
            image = open_picture(file, where)
            if image is None:
                raise VideoError(f"{where} cannot be read: {_unknown(file)}")
            with image:
                with reading(where):
                    num_frames = getattr(image, "n_frames", 1) if image.format in _ANIMATED else 1
                if num_frames > 1:
                    raise VideoError(f"{where} holds {num_frames} frames; give it alone, as a video")
                yield image


def _unknown(file: IO[bytes]) -> str:
    kind = heif_kind(file)[0]
    if kind == "heic":
        return "it is HEIC; pip install 'hicom[heif]'"
    if kind == "avif":
        return "it is AVIF, which Pillow 11.3 or newer reads; or convert it to PNG"
    return "it is no picture that Pillow knows"


class Animation:
    """An animated WebP, of which FFmpeg reads only the first frame, or AVIF whose transparency FFmpeg passes over."""

    def __init__(self, name: str, image: Image.Image) -> None:
        self._name, self._image = name, image
        self._codec = str(image.format).lower()
        with reading(f"{name}:"):
            durations_s = [self._duration_s(index) for index in range(getattr(image, "n_frames", 1))]
        ends_s = np.cumsum(durations_s)
        self.times_s, self.tick_s = ends_s - durations_s, 0.001
        self.keys = np.arange(len(durations_s))
        self.info = VideoInfo(
            name=name,
            container=self._codec,
            codec=self._codec,
            duration_s=float(ends_s[-1]),
            num_frames=len(durations_s),
            fps=len(durations_s) / float(ends_s[-1]),
            width=image.width,
            height=image.height,
        )

    def frames(self, indices: list[int], size: int | Square | None) -> Iterator[tuple[int, Pixels]]:
        """Yield the frames `indices`; see `Clip`."""
        for index in indices:
            where = f"{self._name}: frame {index}"
            with reading(where):
                self._image.seek(index)
            yield index, image_pixels(self._image, where, size)

    def _duration_s(self, index: int) -> float:
        self._image.seek(index)
        self._image.load()  # the duration is known once the frame is decoded
        return (self._image.info["duration"] or 100) / 1000  # browsers show frames without a duration for 100 ms


def _orientation(image: Image.Image) -> Any:
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def image_pixels(image: Image.Image, where: str, size: int | Square | None) -> Pixels:
    """Return uint8[H, W, 3]: upright, on white where it is transparent. The picture is copied no more than needed."""
    with reading(where):
        image = shrink(image, size)
        if _orientation(image) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = on_white(image)
        if isinstance(size, Square):
            return np.asarray(size.resize(image))
        width, height = fit(image.width, image.height, size)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(image)
