"""What everything in this package shares: sources, chosen frames, what a video is, and what can go wrong."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Literal, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..square import Square

if TYPE_CHECKING:
    from mmap import mmap

    from av.video.frame import VideoFrame
    from torch import Tensor

Pixels: TypeAlias = NDArray[np.uint8]
Picture: TypeAlias = "str | os.PathLike[str] | Image.Image | VideoFrame | Pixels | Tensor"
T = TypeVar("T")
Snap: TypeAlias = Literal["exact", "keyframe"]
Source: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | mmap | IO[bytes] | Picture | Sequence[Picture] | "
    "Iterator[Picture]"
)


class VideoError(ValueError):
    """A source or a choice of frames that cannot be read; one line that names the source, the reason and the fix."""


class VideoWarning(UserWarning):
    """A source that is read, but not the way it was asked for."""


class FramesChanged(Exception):
    """Some of the chosen frames are damaged, so the reader has chosen again; start anew with its new `timestamps_s`."""


class ChooseAgain(Exception):
    """Frames that the packets promised did not decode; the clip now knows which frames do."""


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a video is.

    Attributes:
        name: the path as it was given, or a description of a source in memory.
        container: short name of the container, such as `mp4`; `folder`, `list` or `array` for pictures.
        codec: name of the video codec, such as `h264`; for pictures that of their file format, or `raw`.
        duration_s: from the start of the first frame to the end of the last one.
        num_frames: frames that can be chosen.
        fps: average number of frames per second.
        width: of the upright picture, in square pixels: as it is shown, not as it is stored.
        height: likewise.
        rotation: degrees counterclockwise that the stored picture is turned by to stand upright; already applied.
        is_mirrored: whether the stored picture is mirrored, left to right, before it is turned; already applied.
        has_audio: whether there is an audio stream.
        streams: one description per stream.
        damage: empty, or what is missing, such as `truncated: 41 of 64 frames decode`.
        notes: what is not shown as the file wants it, such as `high dynamic range (PQ) is not tone-mapped`.
    """

    name: str
    container: str
    codec: str
    duration_s: float
    num_frames: int
    fps: float
    width: int
    height: int
    rotation: int = 0
    has_audio: bool = False
    streams: tuple[str, ...] = ()
    damage: str = ""
    is_mirrored: bool = False
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """Return one line for people."""
        frames = "1 frame" if self.num_frames == 1 else f"{self.num_frames} frames at {self.fps:.4g} fps"
        parts = [f"{self.duration_s:.2f} s", frames, f"{self.width}x{self.height}", f"{self.codec} in {self.container}"]
        if self.is_mirrored:
            parts.append("mirrored")
        if self.rotation:
            parts.append(f"turned by {self.rotation} degrees")
        if self.has_audio:
            parts.append("audio")
        if self.damage:
            parts.append(self.damage)
        parts += self.notes
        return f"{self.name}: {', '.join(parts)}"


@dataclass(frozen=True)
class VideoFrames:
    """Chosen frames.

    Attributes:
        frames: uint8[T, H, W, 3], RGB, upright.
        timestamps_s: float64[T], presentation times relative to the first frame of the video.
        info: the video they come from; its sizes are those before scaling.
    """

    frames: Pixels
    timestamps_s: NDArray[np.float64]
    info: VideoInfo


class Clip(Protocol):
    """An opened source: its frames can be chosen by their times, and read."""

    info: VideoInfo
    times_s: NDArray[np.float64]  # of the frames that can be read, not descending, relative to the video's first frame
    tick_s: float  # to which the times are rounded

    @property
    def keys(self) -> NDArray[np.intp]:
        """Which of the frames are key frames, ascending. Finding that out may change the times: ask for it first."""

    def frames(self, indices: list[int], size: int | Square | None) -> Iterator[tuple[int, Pixels]]:
        """Yield (index, uint8[H, W, 3]) of all `indices`, which are ascending and do not repeat."""
