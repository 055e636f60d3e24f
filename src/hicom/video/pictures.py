"""Frames that are pictures: arrays, images, folders and animated WebP. They go through Pillow."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from PIL.WebPImagePlugin import WebPImageFile

from ..square import Square
from .colour import fit, on_white, squared
from .types import Picture, Pixels, VideoError, VideoFrames, VideoInfo


class Given:
    """Frames that are there already."""

    def __init__(self, video: VideoFrames) -> None:
        self._frames = video.frames
        self.info, self.times_s = video.info, video.timestamps_s
        self.keys = np.arange(len(self.times_s))

    def frames(self, indices: list[int], size: int | Square | None) -> Iterator[tuple[int, Pixels]]:
        """Yield the frames `indices`; see `Clip`."""
        yield from ((index, self._frames[index]) for index in indices)


class Pictures:
    """Frames that are separate pictures, loaded when they are chosen."""

    def __init__(self, name: str, container: str, pictures: Sequence[Picture] | Pixels, fps: float) -> None:
        if len(pictures) == 0:
            raise VideoError(f"{name}: there are no frames in it; give at least one")
        self._name, self._pictures = name, pictures
        first = pictures[0]
        codec = "raw"
        if isinstance(first, str | os.PathLike):
            codec = Path(first).suffix.lower().removeprefix(".")
        elif isinstance(first, Image.Image) and first.format is not None:
            codec = first.format.lower()
        self.times_s = np.arange(len(pictures)) / fps
        self.keys = np.arange(len(pictures))
        height, width = self._pixels(0, None).shape[:2]
        self.info = VideoInfo(
            name=name,
            container=container,
            codec=codec,
            duration_s=len(pictures) / fps,
            num_frames=len(pictures),
            fps=fps,
            width=width,
            height=height,
        )

    def frames(self, indices: list[int], size: int | Square | None) -> Iterator[tuple[int, Pixels]]:
        """Yield the frames `indices`; see `Clip`."""
        for index in indices:
            yield index, self._pixels(index, size)

    def _pixels(self, index: int, size: int | Square | None) -> Pixels:
        picture = self._pictures[index]
        where = f"{self._name}: frame {index}"
        if isinstance(picture, np.ndarray):
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or picture.size == 0:
                raise VideoError(f"{where} is {picture.dtype}{list(picture.shape)}; frames must be uint8[H, W, 3]")
            if fit(picture.shape[1], picture.shape[0], size) == (picture.shape[1], picture.shape[0]):
                return squared(picture, size)
            return image_pixels(Image.fromarray(picture), where, size)
        if isinstance(picture, Image.Image):
            return image_pixels(picture, where, size)
        if isinstance(picture, str | os.PathLike):
            where = f"{where}, {os.fspath(picture)},"
            try:
                with Image.open(picture) as image:
                    return image_pixels(image, where, size)
            except (OSError, Image.DecompressionBombError) as error:
                raise VideoError(f"{where} cannot be read: {error}") from error
        raise VideoError(f"{where} is a {type(picture).__name__}; give a path, a Pillow image or uint8[H, W, 3]")


class Animation:
    """An animated WebP; FFmpeg reads only the first frame of those."""

    def __init__(self, name: str, image: WebPImageFile) -> None:
        self._name, self._image = name, image
        durations_s = [self._duration_s(index) for index in range(image.n_frames)]
        ends_s = np.cumsum(durations_s)
        self.times_s = ends_s - durations_s
        self.keys = np.arange(len(durations_s))
        self.info = VideoInfo(
            name=name,
            container="webp",
            codec="webp",
            duration_s=float(ends_s[-1]),
            num_frames=len(durations_s),
            fps=len(durations_s) / float(ends_s[-1]),
            width=image.width,
            height=image.height,
        )

    def frames(self, indices: list[int], size: int | Square | None) -> Iterator[tuple[int, Pixels]]:
        """Yield the frames `indices`; see `Clip`."""
        for index in indices:
            self._image.seek(index)
            yield index, image_pixels(self._image, f"{self._name}: frame {index}", size)

    def _duration_s(self, index: int) -> float:
        self._image.seek(index)
        self._image.load()  # the duration is known once the frame is decoded
        return (self._image.info["duration"] or 100) / 1000  # browsers show frames without a duration for 100 ms


def image_pixels(image: Image.Image, where: str, size: int | Square | None) -> Pixels:
    """Return uint8[H, W, 3]: upright, on white where it is transparent."""
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = on_white(image)
        fitted = image.resize(fit(image.width, image.height, size), Image.Resampling.BICUBIC)
        return squared(np.asarray(fitted), size)
    except (OSError, SyntaxError, EOFError) as error:  # Pillow raises SyntaxError for broken PNG chunks
        raise VideoError(f"{where} cannot be decoded: {error}") from error
