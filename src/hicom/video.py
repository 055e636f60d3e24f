"""Open a video, choose frames, return them with their times: the only place that decodes.

Videos go through PyAV. The packets are read once without decoding, which gives the exact presentation time of every
frame whatever the container's header says; then only the groups of pictures that hold chosen frames are decoded,
several at a time, and pictures that no other one refers to are skipped unless chosen. Where time stamps cannot be
trusted, or chosen frames turn out to be damaged, everything is decoded once to learn what is there and the frames are
chosen again from that. No thread outlives the call that started it, so a process may fork between calls.

Still images and animated WebP go through Pillow, as do frames given as a folder or a list.
"""

from __future__ import annotations

import io
import math
import os
import re
import threading
import warnings
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, Protocol, TypeAlias, TypeVar, get_args

import av
import av.error
import numpy as np
from av.audio.stream import AudioStream
from av.codec.context import ThreadType
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition, Stream
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.WebPImagePlugin import WebPImageFile

from . import pyav
from .files import writing
from .square import Square

Pixels: TypeAlias = NDArray[np.uint8]
Picture: TypeAlias = "str | os.PathLike[str] | Image.Image | Pixels"
T = TypeVar("T")
Snap: TypeAlias = Literal["exact", "keyframe"]
Source: TypeAlias = "str | os.PathLike[str] | bytes | IO[bytes] | Image.Image | Pixels | Sequence[Picture]"

_IMAGE_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# Seconds of a part: from, up to, or both.
_PART = re.compile(r"(?P<path>.+)#t=(?=[\d,])(?P<start_s>\d+(?:\.\d+)?)?(?:,(?P<end_s>\d+(?:\.\d+)?))?", re.DOTALL)
_MAX_THREADS = 8  # of one call, in total; every decoder holds up to 17 pictures for reference
_MAX_DECODER_THREADS = 4  # of one decoder; more cost memory and decode frames ahead that nobody asked for
_SEEK_PACKETS = 256  # reading past fewer packets than this is cheaper than a seek


class VideoError(ValueError):
    """A source or a choice of frames that cannot be read; one line that names the source, the reason and the fix."""


class VideoWarning(UserWarning):
    """A source that is read, but not the way it was asked for."""


class FramesChanged(Exception):
    """Some of the chosen frames are damaged, so the reader has chosen again; start anew with its new `timestamps_s`."""


class _ChooseAgain(Exception):
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
        width: of the upright picture, in pixels.
        height: of the upright picture, in pixels.
        rotation: degrees counterclockwise that the stored picture is turned by to stand upright; already applied.
        has_audio: whether there is an audio stream.
        streams: one description per stream.
        damage: empty, or what is missing, such as `truncated: 41 of 64 frames decode`.
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

    def describe(self) -> str:
        """Return one line for people."""
        frames = "1 frame" if self.num_frames == 1 else f"{self.num_frames} frames at {self.fps:.4g} fps"
        parts = [f"{self.duration_s:.2f} s", frames, f"{self.width}x{self.height}", f"{self.codec} in {self.container}"]
        if self.rotation:
            parts.append(f"turned by {self.rotation} degrees")
        if self.has_audio:
            parts.append("audio")
        if self.damage:
            parts.append(self.damage)
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


def with_bounds(path: str, start_s: float | None, end_s: float | None) -> str:
    """Return the path of a part of a video: `clip.mp4#t=5,12`, as media fragments of the W3C have it.

    Raises:
        VideoError: the bounds are no part of a video.
    """
    _Choice(name=path, start_s=start_s, end_s=end_s)
    first, last = ("" if value is None else f"{value:.3f}".rstrip("0").rstrip(".") for value in (start_s, end_s))
    if not first and not last:
        return path
    return f"{path}#t={first},{last}" if last else f"{path}#t={first}"


def split_bounds(source: T) -> tuple[T | Path, dict[str, float]]:
    """Return the file of a path such as `clip.mp4#t=5,12`, and its bounds as `start_s` and `end_s`.

    All else comes as it is, without bounds; so does the path of a file that is really called so.
    """
    found = _PART.fullmatch(str(source)) if isinstance(source, str | os.PathLike) else None
    if found is None or Path(found[0]).exists():
        return source, {}
    return Path(found["path"]), {key: float(found[key]) for key in ("start_s", "end_s") if found[key]}


def uniform_indices(total: int, num_frames: int, *, repeat: bool = False) -> list[int]:
    """Return the frames in the middle of `num_frames` equal segments of frames 0 to `total` - 1.

    Index i is round((i + 0.5) * (total - 1) / num_frames), halves rounded up, as in the paper's code (computed here in
    integers). Where there are not more than `num_frames` frames, all of them come once; with `repeat` the same rule
    holds, as in the paper's code, so that some come several times.

    Raises:
        VideoError: a number is not positive.
    """
    if total < 1 or num_frames < 1:
        raise VideoError(f"uniform_indices({total}, {num_frames}): give two positive numbers")
    if total <= num_frames and not repeat:
        return list(range(total))
    return [((2 * i + 1) * (total - 1) + num_frames) // (2 * num_frames) for i in range(num_frames)]


def probe(source: Source, *, source_fps: float = 25.0) -> VideoInfo:
    """Return what a video is, without decoding more than its first frame where the file allows it.

    Args:
        source: see `read_frames`.
        source_fps: see `read_frames`.

    Raises:
        VideoError: the source is not a video that can be read.
    """
    return _open_clip(split_bounds(source)[0], source_fps).info


def read_frames(
    source: Source,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    timestamps_s: Sequence[float] | None = None,
    start_s: float | None = None,
    end_s: float | None = None,
    max_frames: int | None = None,
    size: int | Square | None = None,
    source_fps: float = 25.0,
    snap: Snap = "exact",
    repeat: bool = False,
) -> VideoFrames:
    """Decode chosen frames. Without `num_frames`, `fps` or `timestamps_s` all frames are read.

    Args:
        source: a path or an open binary file of any container that FFmpeg reads, GIF and WebP included, or its bytes; a
            folder of images, read in natural order (frame2 before frame10); a still image; uint8[T, H, W, 3] or
            uint8[H, W, 3]; a list of images (paths, Pillow images or uint8[H, W, 3]). A path may end with `#t=5,12`:
            seconds 5 to 12 of that file, as `start_s` and `end_s` would say.
        num_frames: frames in the middle of that many equal segments; all frames, once, of a shorter video (`repeat`).
        fps: the frames on screen at `start_s`, `start_s` + 1 / fps, ...; each once, even at a rate above the video's.
        timestamps_s: the frames on screen at these times, in this order.
        start_s: choose among the frames on screen from this time on, relative to the first frame.
        end_s: choose among the frames on screen before this time; a time past the end means the end, with a warning.
        max_frames: with `fps` or alone: where there would be more, take this many spread evenly over the same range.
        size: scale down, in the decoder, so that the longer side has at most this many pixels; never up. A `Square`
            makes a square of every frame instead, from all of its pixels, one frame at a time.
        source_fps: frames per second of sources that have no times: folders, lists, arrays.
        snap: `exact` reads the chosen frames; `keyframe` reads in place of each the key frame nearest to it in time
            (the earlier of two as near), which may lie outside of the bounds, and which several frames may share: it
            comes once, but with `timestamps_s` or `repeat` as often as asked for. That takes a fraction of the time,
            and the result's `timestamps_s` say what was read. Of pictures and animated WebP every frame is a key frame.
        repeat: `num_frames` frames of a shorter video, too: some come several times, with their times, spread evenly.
            A single picture stays one.

    Raises:
        VideoError: the source is not a video that can be read, or the choice makes no sense for it.

    Warns:
        VideoWarning: the video is truncated or damaged (frames are chosen from what decodes), or shorter than `end_s`.
    """
    reader = open_frames(
        source,
        size=size,
        source_fps=source_fps,
        num_frames=num_frames,
        fps=fps,
        timestamps_s=timestamps_s,
        start_s=start_s,
        end_s=end_s,
        max_frames=max_frames,
        snap=snap,
        repeat=repeat,
    )
    return reader.read()


def open_frames(
    source: Source | VideoFrames, *, size: int | Square | None = None, source_fps: float = 25.0, **choice: Any
) -> FrameReader:
    """Open a video to read its chosen frames in chunks, for videos whose chosen frames do not fit into memory.

    Args:
        source: see `read_frames`; or frames that it has read, which all come as they are.
        size: see `read_frames`.
        source_fps: see `read_frames`.
        **choice: further arguments of `read_frames`.

    Raises:
        VideoError: see `read_frames`.
    """
    if isinstance(source, VideoFrames):
        return FrameReader(_Given(source), None, None)
    name = _name(source)
    file, bounds = split_bounds(source)
    if twice := [key for key in bounds if choice.get(key) is not None]:
        raise VideoError(f"{name}: the path says {' and '.join(twice)} already; give it once")
    choice |= bounds
    if unknown := set(choice) - {each.name for each in fields(_Choice)}:
        raise VideoError(f"{name}: there is no choice of frames by {', '.join(sorted(unknown))}")
    chosen = _Choice(name=name, **choice)
    if size is not None:
        _check_count(name, "size", size.size if isinstance(size, Square) else size)
    return FrameReader(_open_clip(file, source_fps), chosen, size)


class FrameReader:
    """Chosen frames of a video, read in chunks; `open_frames` makes one.

    Attributes:
        info: the video; its sizes are those before scaling.
        timestamps_s: float64[T], presentation times of the chosen frames.
    """

    def __init__(self, clip: _Clip, choice: _Choice | None, size: int | Square | None) -> None:
        self._clip, self._choice, self._size = clip, choice, size
        self._choose()

    def _choose(self) -> None:
        clip = self._clip
        self.info = clip.info
        times_s = clip.times_s
        self._indices = [*range(len(times_s))] if self._choice is None else self._choice.indices(clip)
        self.timestamps_s = times_s[self._indices]

    def read(self) -> VideoFrames:
        """Return all chosen frames; see `read_frames`."""
        try:
            result = _read(self._clip, self._indices, self._size)
        except _ChooseAgain:
            self._choose()
            result = _read(self._clip, self._indices, self._size)
        self._warn(stacklevel=4)  # of who called `read_frames`
        return result

    def chunks(self, num_frames: int) -> Iterator[Pixels]:
        """Yield the chosen frames in order, `uint8[t, H, W, 3]` with `num_frames` of them; fewer in the last chunk.

        Raises:
            FramesChanged: frames turned out to be damaged, and others are chosen; what came so far is void.
            VideoError: see `read_frames`.

        Warns:
            VideoWarning: see `read_frames`.
        """
        try:
            is_sparse = isinstance(self._clip, _Video) and self._clip.is_sparse(self._indices)
            if not is_sparse and all(a < b for a, b in pairwise(self._indices)):
                frames = self._clip.frames(self._indices, self._size)
                while chunk := [pixels for _, pixels in islice(frames, num_frames)]:
                    yield np.stack(chunk)
            else:
                for first in range(0, len(self._indices), num_frames):
                    yield _read(self._clip, self._indices[first : first + num_frames], self._size).frames
        except _ChooseAgain:
            self._choose()
            raise FramesChanged from None
        self._warn(stacklevel=3)

    def _warn(self, stacklevel: int) -> None:
        # A look at the clip, not at what it was when frames were chosen: reading may have found damage.
        info, end_s = self._clip.info, None if self._choice is None else self._choice.end_s
        if info.damage:
            warnings.warn(f"{info.name}: {info.damage}; using those", VideoWarning, stacklevel)
        if end_s is not None and end_s > info.duration_s:
            text = f"{info.name}: end_s={end_s:g} is past the end; reading to the end at {info.duration_s:g} s"
            warnings.warn(text, VideoWarning, stacklevel)


class _Given:
    """Frames that are there already."""

    def __init__(self, video: VideoFrames) -> None:
        self._frames = video.frames
        self.info, self.times_s = video.info, video.timestamps_s
        self.keys = np.arange(len(self.times_s))

    def frames(self, indices: list[int], size: int | Square | None) -> Iterator[tuple[int, Pixels]]:
        yield from ((index, self._frames[index]) for index in indices)


# What to read: the choice of frames


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """The arguments of `read_frames` that say which frames, checked."""

    name: str
    num_frames: int | None = None
    fps: float | None = None
    timestamps_s: Sequence[float] | None = None
    start_s: float | None = None
    end_s: float | None = None
    max_frames: int | None = None
    snap: Snap = "exact"
    repeat: bool = False

    def __post_init__(self) -> None:
        ways = {"num_frames": self.num_frames, "fps": self.fps, "timestamps_s": self.timestamps_s}
        given = [way for way, value in ways.items() if value is not None]
        if len(given) > 1:
            raise VideoError(
                f"{self.name}: {' and '.join(given)} are different ways to choose frames; give one of them"
            )
        if self.num_frames is not None:
            _check_count(self.name, "num_frames", self.num_frames)
        if self.max_frames is not None:
            _check_count(self.name, "max_frames", self.max_frames)
            if self.num_frames is not None or self.timestamps_s is not None:
                raise VideoError(
                    f"{self.name}: max_frames={self.max_frames} goes with fps or alone, not with {given[0]}"
                )
        if self.fps is not None and not (math.isfinite(self.fps) and self.fps > 0):
            raise VideoError(f"{self.name}: fps={self.fps}: give a positive number")
        for key, value in {"start_s": self.start_s, "end_s": self.end_s}.items():
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise VideoError(f"{self.name}: {key}={value}: give a number of seconds that is not negative")
        if self.end_s is not None and (self.start_s or 0.0) >= self.end_s:
            raise VideoError(f"{self.name}: start_s={self.start_s or 0.0:g} is not before end_s={self.end_s:g}")
        if self.timestamps_s is not None:
            if self.start_s is not None or self.end_s is not None:
                raise VideoError(f"{self.name}: timestamps_s needs no bounds; leave start_s and end_s out")
            if len(self.timestamps_s) == 0:
                raise VideoError(f"{self.name}: timestamps_s is empty; give at least one time")
        if self.snap not in get_args(Snap):
            raise VideoError(f"{self.name}: snap={self.snap!r}: give one of {', '.join(get_args(Snap))}")

    def indices(self, clip: _Clip) -> list[int]:
        """Return the indices, into the clip's times, of the frames to read, in the order to return them."""
        is_picture = isinstance(clip, _Pictures) and len(clip.times_s) == 1
        chosen = self._exact(clip.times_s, clip.info.duration_s, self.repeat and not is_picture)
        if self.snap == "exact":
            return chosen
        if len(clip.keys) == 0:
            raise VideoError(f"{self.name}: it has no key frames; leave snap out, or convert it")
        keys = _nearest(clip.times_s, clip.keys, chosen)
        return keys if self.timestamps_s is not None or self.repeat else sorted(set(keys))

    def _exact(self, times_s: NDArray[np.float64], duration_s: float, repeat: bool) -> list[int]:
        # Containers round times to their clock (Matroska: to 1 ms): a frame counts as on screen half a tick early.
        reached_s = times_s - 0.0005 - 1e-6
        if self.timestamps_s is not None:
            for time_s in self.timestamps_s:
                if not 0 <= time_s <= duration_s:  # also catches NaN
                    raise VideoError(
                        f"{self.name}: timestamp {time_s} s is not between 0 and the duration, {duration_s:g} s"
                    )
            on_screen = np.searchsorted(reached_s, np.asarray(self.timestamps_s, np.float64), side="right") - 1
            return [int(i) for i in on_screen.clip(0)]
        start_s = self.start_s or 0.0
        end_s = duration_s if self.end_s is None else min(self.end_s, duration_s)
        if start_s >= duration_s:
            raise VideoError(f"{self.name}: start_s={start_s:g} is not before the end of the video at {duration_s:g} s")
        first = max(int(np.searchsorted(reached_s, start_s, side="right")) - 1, 0)
        stop = max(int(np.searchsorted(reached_s, end_s - 0.001, side="left")), first + 1)
        chosen = np.arange(first, stop)
        if self.fps is not None:
            # A frame is on screen at some start_s + k / fps exactly if an integer k lies in its [begin, end).
            begins = (reached_s[first:stop] - start_s) * self.fps
            ends = np.append(begins[1:], max(end_s - 0.0005 - start_s, 1e-9) * self.fps)
            chosen = chosen[np.maximum(np.ceil(begins), 0) < ends]
        count = self.num_frames or self.max_frames
        if count is not None and (count < len(chosen) or (repeat and self.num_frames is not None)):
            chosen = np.arange(first, stop)[uniform_indices(stop - first, count, repeat=repeat)]
        return [int(i) for i in chosen]


def _nearest(times_s: NDArray[np.float64], keys: NDArray[np.intp], indices: list[int]) -> list[int]:
    """Return for each of `indices` which of `keys` (ascending, not empty) is nearest in time, of two the earlier."""
    after = np.searchsorted(keys, indices)
    earlier, later = keys[(after - 1).clip(0)], keys[after.clip(None, len(keys) - 1)]
    # As near as makes no difference to a clock, though not to floating-point numbers, is as near.
    is_later = times_s[later] - times_s[indices] < times_s[indices] - times_s[earlier] - 1e-6
    # Before the first key frame both are that one.
    return [int(i) for i in np.where(is_later, later, earlier)]


def _check_count(name: str, key: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise VideoError(f"{name}: {key}={value}: give a positive whole number")


# Reading


class _Clip(Protocol):
    info: VideoInfo
    times_s: NDArray[np.float64]  # ascending, of the frames that can be read, relative to the first frame of the video
    keys: NDArray[np.intp]  # ascending, which of them are key frames

    def frames(self, indices: list[int], size: int | Square | None) -> Iterator[tuple[int, Pixels]]:
        """Yield (index, uint8[H, W, 3]) of all `indices`, which are ascending and do not repeat."""


def _read(clip: _Clip, indices: list[int], size: int | Square | None) -> VideoFrames:
    places: dict[int, list[int]] = {}
    for place, index in enumerate(indices):
        places.setdefault(index, []).append(place)
    frames: Pixels | None = None
    lock = threading.Lock()

    def put(index: int, frame: Pixels) -> None:
        nonlocal frames
        with lock:
            if frames is None:
                frames = np.empty((len(indices), *frame.shape), np.uint8)
        if frame.shape != frames.shape[1:]:
            sizes = [f"{shape[1]}x{shape[0]}" for shape in (frame.shape, frames.shape[1:])]
            text = f"frame {index} is {sizes[0]} but those before it are {sizes[1]}; make them the same size"
            raise VideoError(f"{clip.info.name}: {text}")
        for place in places[index]:
            frames[place] = frame

    if isinstance(clip, _Video):
        clip.read(sorted(places), size, put)
    else:
        for index, frame in clip.frames(sorted(places), size):
            put(index, frame)
    assert frames is not None  # at least one frame is chosen, and a clip yields what it is asked for
    return VideoFrames(frames, clip.times_s[indices], clip.info)


def _fit(width: int, height: int, size: int | Square | None) -> tuple[int, int]:
    scale = 1.0 if size is None or isinstance(size, Square) else min(1.0, size / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


# Opening


def _name(source: Source) -> str:
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


def _open_clip(source: Source, source_fps: float) -> _Clip:
    name = _name(source)
    if not (math.isfinite(source_fps) and source_fps > 0):
        raise VideoError(f"{name}: source_fps={source_fps}: give a positive number")
    try:
        return _open_source(source, name, source_fps)
    except OSError as error:
        raise VideoError(f"{name}: cannot be read: {error.strerror or error}") from error
    except Image.DecompressionBombError as error:
        raise VideoError(f"{name}: {error}") from error


def _open_source(source: Source, name: str, source_fps: float) -> _Clip:
    if isinstance(source, str | os.PathLike):
        return _open_path(Path(source), name, source_fps)
    if isinstance(source, bytes | bytearray):
        return _open_file(io.BytesIO(source), name, source_fps)
    if isinstance(source, Image.Image):
        return _Pictures(name, "image", [source], source_fps)
    if isinstance(source, np.ndarray):
        return _Pictures(name, "array", source[None] if source.ndim == 3 else source, source_fps)
    if isinstance(source, list | tuple):
        return _Pictures(name, "list", source, source_fps)
    if isinstance(source, io.TextIOBase | Sequence) or not hasattr(source, "read"):
        kinds = "a path, bytes, a file opened in binary mode, uint8[T, H, W, 3] or a list of images"
        raise VideoError(f"{name}: cannot read a video from this type; give {kinds}")
    return _open_file(source if source.seekable() else io.BytesIO(source.read()), name, source_fps)


def _open_path(path: Path, name: str, source_fps: float) -> _Clip:
    if path.is_dir():
        files = [
            file for file in path.iterdir() if file.suffix.lower() in _IMAGE_SUFFIXES and not file.name.startswith(".")
        ]
        if not files:
            suffixes = ", ".join(sorted(_IMAGE_SUFFIXES))
            raise VideoError(f"{name}: the folder has no frames; give a video file or a folder of images ({suffixes})")
        files.sort(key=_natural)
        return _Pictures(name, "folder", files, source_fps)
    if not path.exists():
        raise VideoError(f"{name}: no such file or folder; check the path")
    with path.open("rb") as file:
        return _open_file(file, name, source_fps, path.absolute())


def _natural(path: Path) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", path.name.casefold())]


def _open_file(file: IO[bytes], name: str, source_fps: float, path: Path | None = None) -> _Clip:
    if file.seek(0, os.SEEK_END) == 0:
        raise VideoError(f"{name}: the file is empty (0 bytes); copy or download it again")
    try:
        is_video = Image.open(file, formats=_IMAGE_FORMATS).get_format_mimetype() == "image/apng"
    except UnidentifiedImageError:
        is_video = True
    if is_video:
        return _Video(path or file, name)
    file.seek(0)
    image = Image.open(io.BytesIO(file.read()), formats=_IMAGE_FORMATS)
    if isinstance(image, WebPImageFile) and image.n_frames > 1:
        return _Animation(name, image)
    return _Pictures(name, "image", [image], source_fps)


# Pictures: arrays, images, folders


class _Pictures:
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
        for index in indices:
            yield index, self._pixels(index, size)

    def _pixels(self, index: int, size: int | Square | None) -> Pixels:
        picture = self._pictures[index]
        where = f"{self._name}: frame {index}"
        if isinstance(picture, np.ndarray):
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or picture.size == 0:
                raise VideoError(f"{where} is {picture.dtype}{list(picture.shape)}; frames must be uint8[H, W, 3]")
            if _fit(picture.shape[1], picture.shape[0], size) == (picture.shape[1], picture.shape[0]):
                return _squared(picture, size)
            return _image_pixels(Image.fromarray(picture), where, size)
        if isinstance(picture, Image.Image):
            return _image_pixels(picture, where, size)
        if isinstance(picture, str | os.PathLike):
            where = f"{where}, {os.fspath(picture)},"
            try:
                with Image.open(picture) as image:
                    return _image_pixels(image, where, size)
            except (OSError, Image.DecompressionBombError) as error:
                raise VideoError(f"{where} cannot be read: {error}") from error
        raise VideoError(f"{where} is a {type(picture).__name__}; give a path, a Pillow image or uint8[H, W, 3]")


class _Animation:
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
        for index in indices:
            self._image.seek(index)
            yield index, _image_pixels(self._image, f"{self._name}: frame {index}", size)

    def _duration_s(self, index: int) -> float:
        self._image.seek(index)
        self._image.load()  # the duration is known once the frame is decoded
        return (self._image.info["duration"] or 100) / 1000  # browsers show frames without a duration for 100 ms


def _image_pixels(image: Image.Image, where: str, size: int | Square | None) -> Pixels:
    """Return uint8[H, W, 3]: upright, on white where it is transparent."""
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        fitted = image.resize(_fit(image.width, image.height, size), Image.Resampling.BICUBIC)
        return _squared(np.asarray(fitted), size)
    except (OSError, SyntaxError, EOFError) as error:  # Pillow raises SyntaxError for broken PNG chunks
        raise VideoError(f"{where} cannot be decoded: {error}") from error


def _squared(frame: Pixels, size: int | Square | None) -> Pixels:
    return size.make(frame) if isinstance(size, Square) else frame


# Videos: PyAV


class _Packet(NamedTuple):
    pts: int | None
    dts: int | None
    duration: int
    is_key: bool
    is_frame: bool  # one that is shown: not there for reference only and not cut away by an edit list
    is_corrupt: bool


class _Video:
    """The best video stream of a file.

    A frame is recognised by its presentation time stamp or, once everything was decoded because those cannot be relied
    on, by its number among the frames that decode.
    """

    def __init__(self, file: Path | IO[bytes], name: str) -> None:
        self._file, self._name = file, name
        self._num_errors = 0
        self._num_empty = 0
        frame: VideoFrame | None = None
        with self._opened() as (container, stream):
            codec = stream.codec_context.codec.canonical_name
            self._packets: list[_Packet] = []
            for packet in self._demux(container, stream):
                self._packets.append(_describe_packet(packet, codec))
                if frame is None:
                    frame = next(iter(self._decode(stream, packet)), None)
            if frame is None:
                frame = next(iter(self._decode(stream, None)), None)
            if not self._packets:
                raise VideoError(f"{name}: the video stream has no frames; record or download the file again")
            if frame is None:
                raise VideoError(
                    f"{name}: none of its {len(self._packets)} frames decodes ({codec}); download it again"
                )
            self._time_base = float(stream.time_base or 0)
            self._rate = float(stream.guessed_rate or stream.average_rate or 25)  # 25: as FFmpeg for raw streams
            self._orientation = _orientation(frame)
            self._can_seek = container.format.name.startswith(("mov,", "matroska,"))
            self._num_declared = self._count_declared(container, stream)
            turned = self._orientation[0]
            self.info = VideoInfo(
                name=name,
                container=_container_name(name, container.format.name),
                codec=codec,
                duration_s=0.0,
                num_frames=0,
                fps=0.0,
                width=frame.height if turned else frame.width,
                height=frame.width if turned else frame.height,
                rotation=round(frame.rotation),
                has_audio=len(container.streams.audio) > 0,
                streams=tuple(_describe_stream(each) for each in container.streams),
            )
            # AVI stores no presentation times: with reordered frames FFmpeg's guesses are those of other frames.
            is_guessed = container.format.name == "avi" and any(packet.pts != packet.dts for packet in self._packets)
        self._is_timed = not is_guessed and self._has_consistent_times()
        self._decoded: list[int] | None = None  # after a scan: the frames to choose from among those that decode
        self._frames: list[int] = []  # otherwise: their packets, in presentation order
        if self._is_timed:
            # Where the file starts in the middle of a group of pictures, the first ones are there but do not decode.
            first = frame.pts if frame.pts is not None else -math.inf
            sound = [i for i, packet in enumerate(self._packets) if packet.is_frame and not packet.is_corrupt]
            self._frames = sorted((i for i in sound if self._pts(i) >= first), key=self._pts)
        if self._frames:
            self._set_stamps([self._pts(i) for i in self._frames])
            self.keys = np.flatnonzero([self._packets[i].is_key for i in self._frames])
        else:
            self._scan()

    def frames(self, indices: list[int], size: int | Square | None) -> Iterator[tuple[int, Pixels]]:
        reformatter = VideoReformatter()
        if self._decoded is not None:
            numbers = {self._decoded[index]: index for index in indices}
            for number, frame in enumerate(self._run([(0, len(self._packets))])):
                if number in numbers:
                    yield numbers.pop(number), self._pixels(frame, size, reformatter)
                if not numbers:
                    return
            raise VideoError(f"{self._name}: it decodes differently each time; convert it, or download it again")
        missing = {self._pts(self._frames[index]): index for index in indices}
        for frame in self._run(self._spans(indices), frozenset(missing)):
            if frame.pts in missing:
                yield missing.pop(frame.pts), self._pixels(frame, size, reformatter)
        if missing:
            self._scan()
            raise _ChooseAgain

    def is_sparse(self, indices: list[int]) -> bool:
        """Whether most of `indices` lie in groups of pictures of their own, so that few are decoded twice in pieces."""
        return self._decoded is None and 2 * len(self._spans(sorted(set(indices)))) > len(set(indices))

    def read(self, indices: list[int], size: int | Square | None, put: Callable[[int, Pixels], None]) -> None:
        """Give `put` all that `frames` yields, but in any order and from several threads at a time."""
        spans = [] if self._decoded is not None else self._spans(indices)
        num_workers = min(_num_threads(_MAX_THREADS), len(spans)) if self._can_reopen() else 1
        if num_workers <= 1:
            for index, pixels in self.frames(indices, size):
                put(index, pixels)
            return
        # All that threads share: each span is of one of them, and what they count besides only matters in a scan.
        missing = {self._pts(self._frames[index]): index for index in indices}
        wanted = frozenset(missing)
        left = deque(spans)

        def take() -> Iterator[tuple[int, int]]:
            with suppress(IndexError):
                while True:
                    yield left.popleft()

        def work() -> None:
            reformatter = VideoReformatter()
            try:
                # Decoders of one thread each waste the least: nothing is decoded ahead, none waits for another.
                for frame in self._run(take(), wanted, _num_threads(_MAX_THREADS) // num_workers):
                    if frame.pts in missing:
                        put(missing.pop(frame.pts), self._pixels(frame, size, reformatter))
            finally:
                left.clear()  # after a failure the others have nothing left to begin

        with ThreadPoolExecutor(num_workers, "hicom-video") as pool:  # waits for all of its threads
            try:
                for worker in [pool.submit(work) for _ in range(num_workers)]:
                    worker.result()
            finally:
                left.clear()  # also where the caller is interrupted while it waits
        if missing:
            self._scan()
            raise _ChooseAgain

    # The frames there are

    def _pts(self, position: int) -> int:
        pts = self._packets[position].pts
        assert pts is not None
        return pts

    def _has_consistent_times(self) -> bool:
        pts = [packet.pts for packet in self._packets]
        dts = [packet.dts for packet in self._packets if packet.dts is not None]
        return None not in pts and len(set(pts)) == len(pts) and all(a <= b for a, b in pairwise(dts))

    def _scan(self) -> None:
        """Decode everything to learn which frames there are."""
        self._num_errors = 0
        self._decoded = []
        stamps: list[int] = []
        keys: list[int] = []
        total = 0
        for frame in self._run([(0, len(self._packets))]):
            if frame.pts is not None and (not stamps or frame.pts > stamps[-1]):
                self._decoded.append(total)
                stamps.append(frame.pts)
            if frame.key_frame:
                keys.append(total)
            total += 1
        if total == 0:
            raise VideoError(f"{self._name}: none of its {len(self._packets)} frames decodes; download it again")
        # Good times stay: out of order there are only pictures that the decoder gives out again after damage.
        if len(stamps) == total or (self._is_timed and self._num_errors > 0):
            self._set_stamps(stamps)
        else:
            self._decoded = list(range(total))
            self._set_times(np.arange(total) / self._rate, total / self._rate)
        self.keys = np.flatnonzero(np.isin(self._decoded, keys))

    def _set_stamps(self, stamps: list[int]) -> None:
        first, last, last_duration = stamps[0], stamps[-1], 0
        if self._is_timed:  # then damaged frames have their times too
            shown = [position for position, packet in enumerate(self._packets) if packet.is_frame]
            first = self._pts(min(shown, key=self._pts))
            last = self._pts(max(shown, key=self._pts))
            last_duration = self._packets[max(shown, key=self._pts)].duration
        duration_s = (last - first + last_duration) * self._time_base + (0 if last_duration else 1 / self._rate)
        self._set_times((np.array(stamps) - first) * self._time_base, duration_s)

    def _set_times(self, times_s: NDArray[np.float64], duration_s: float) -> None:
        self.times_s = times_s
        num_packets = len(self._packets) + self._num_empty
        num_frames = sum(packet.is_frame for packet in self._packets)
        is_truncated = self._num_declared > num_packets
        if is_truncated:
            num_frames += self._num_declared - num_packets
        is_damaged = self._num_errors > 0 or any(packet.is_corrupt for packet in self._packets)
        damage = ""
        if len(times_s) < num_frames and (is_truncated or is_damaged):
            damage = f"{'truncated' if is_truncated else 'damaged'}: {len(times_s)} of {num_frames} frames decode"
        self.info = replace(
            self.info,
            duration_s=duration_s,
            num_frames=len(times_s),
            fps=len(times_s) / duration_s,
            damage=damage,
        )

    def _count_declared(self, container: InputContainer, stream: VideoStream) -> int:
        """Return how many packets the header promises, 0 where it does not say."""
        if container.format.name.startswith("mov,"):
            indexed = pyav.count_indexed(stream)
            return self._count_uncut(stream) if indexed is None else indexed
        if container.format.name.startswith("matroska,"):
            tags = [value for key, value in stream.metadata.items() if key.startswith("DURATION")]
            if not tags:
                return 0
            hours, minutes, seconds = tags[0].split(":")
            declared_s = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
            read_s = max(packet.pts or 0 for packet in self._packets) * self._time_base
            # Within half a second the tag may count otherwise than we do.
            return round(declared_s * self._rate) if declared_s - read_s > 0.5 else 0
        return stream.frames

    def _count_uncut(self, stream: VideoStream) -> int:
        """Return how many packets there should be, where the header counts those that an edit list cuts away, too."""
        num_packets = len(self._packets)
        if stream.frames <= num_packets:
            return num_packets
        with self._opened(ignore_editlist="1") as (container, uncut):
            return num_packets + stream.frames - sum(1 for _ in self._demux(container, uncut))

    # Decoding

    def _can_reopen(self) -> bool:
        """Return whether several can read at the same time: other files than these have one position for all."""
        return isinstance(self._file, Path) or type(self._file) is io.BytesIO

    @contextmanager
    def _opened(self, num_threads: int = 1, **options: str) -> Iterator[tuple[InputContainer, VideoStream]]:
        file = self._file
        if not isinstance(file, Path):
            if type(file) is io.BytesIO:
                file = io.BytesIO(file.getvalue())  # shares the bytes, has its own position
            file.seek(0)
            # A playlist from who knows where must not open files of this machine.
            options["protocol_whitelist"] = "pipe"
        try:
            container = pyav.open_input(file, options)
        except (av.error.FFmpegError, OSError) as error:
            text = "no video found in it; it is not a video, or cut off before its index: check it or download it again"
            raise VideoError(f"{self._name}: {text} ({error.strerror})") from error
        with container:
            covers = [each for each in container.streams.video if each.disposition & Disposition.attached_pic]
            streams = [each for each in container.streams.video if each not in covers]
            if not streams:
                kinds = sorted({each.type for each in container.streams if each not in covers})
                holds = f"it has no video, only {' and '.join(kinds)}" if kinds else "it has no streams"
                raise VideoError(f"{self._name}: {holds}; give a file with a video stream")
            best = container.streams.best("video")
            stream = best if isinstance(best, VideoStream) and best in streams else streams[0]
            if stream.codec_context is None:
                raise VideoError(f"{self._name}: FFmpeg has no decoder for its video; convert it to h264")
            pyav.read_only(container, stream)
            stream.codec_context.thread_type = ThreadType.FRAME
            stream.codec_context.thread_count = min(_MAX_DECODER_THREADS, num_threads)
            yield container, stream

    def _demux(self, container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream]]:
        self._num_empty = 0
        try:
            for packet in container.demux(stream):
                if packet.size:
                    yield packet
                elif packet.pts is not None:
                    self._num_empty += 1  # AVI repeats a frame this way
        except av.error.FFmpegError:
            self._num_errors += 1  # what comes after cannot be read

    def _decode(self, stream: VideoStream, packet: Packet[VideoStream] | None) -> list[VideoFrame]:
        """Return the undamaged frames that come out after `packet` goes in; None for the last ones."""
        try:
            frames = stream.codec_context.decode(packet)
        except av.error.FFmpegError:
            self._num_errors += 1
            return []
        clean = [frame for frame in frames if not frame.is_corrupt]
        self._num_errors += len(frames) - len(clean)
        return clean

    def _spans(self, indices: list[int]) -> list[tuple[int, int]]:
        """Return which packets, first and last in decoding order, give the frames `indices`."""
        keys = [position for position, packet in enumerate(self._packets) if packet.is_key]
        spans: list[tuple[int, int]] = []
        for index in indices:
            position = self._frames[index]
            key = bisect_right(keys, position) - 1
            while key >= 0 and self._pts(keys[key]) > self._pts(position):
                key -= 1  # a leading picture: shown before the key frame that it follows in the file
            first = keys[key] if key >= 0 else 0
            if spans and first <= spans[-1][1] + 1:
                spans[-1] = (min(first, spans[-1][0]), max(position, spans[-1][1]))
            else:
                spans.append((first, position))
        return spans

    def _run(
        self, spans: Iterable[tuple[int, int]], wanted: frozenset[int] | None = None, num_threads: int = _MAX_THREADS
    ) -> Iterator[VideoFrame]:
        """Decode spans of packets; with `wanted`, skip what neither these time stamps nor other frames need."""
        positions = {packet.pts: position for position, packet in enumerate(self._packets)}
        with self._opened(_num_threads(num_threads)) as (container, stream):
            context = stream.codec_context
            if wanted is None:
                context.thread_type = ThreadType.SLICE  # so that damage does the same harm every time
            packets: Iterator[tuple[int, Packet[VideoStream]]] = enumerate(self._demux(container, stream))
            position = -1
            for first, last in spans:
                if self._can_seek and first - position > _SEEK_PACKETS:
                    container.seek(self._pts(first), stream=stream)
                    packets = ((positions[packet.pts], packet) for packet in self._demux(container, stream))
                is_started = False
                for position, packet in packets:
                    is_started = is_started or position == first
                    if is_started:
                        # The first packet is needed anyway; some decoders read this setting only when they open.
                        is_needed = wanted is None or position == first or packet.pts in wanted
                        context.skip_frame = "DEFAULT" if is_needed else "NONREF"
                        yield from self._decode(stream, packet)
                    if position >= last:
                        break
                yield from self._decode(stream, None)
                context.flush_buffers()

    def _pixels(self, frame: VideoFrame, size: int | Square | None, reformatter: VideoReformatter) -> Pixels:
        is_turned, flip_x, flip_y = self._orientation
        width, height = _fit(self.info.width, self.info.height, size)
        if is_turned:
            width, height = height, width
        pixels = np.asarray(pyav.scale(frame, width, height, reformatter).to_ndarray(), np.uint8)
        if is_turned:
            pixels = pixels.transpose(1, 0, 2)
        return _squared(pixels[:: -1 if flip_y else 1, :: -1 if flip_x else 1], size)


def _num_threads(most: int) -> int:
    # A container or a scheduler may have given this process fewer processors than the machine has.
    return min(most, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _describe_packet(packet: Packet[VideoStream], codec: str) -> _Packet:
    # A VP8 packet may hold a picture for reference only: bit 4 of its header says whether it is shown (RFC 6386, 9.1).
    is_frame = not packet.is_discard and (codec != "vp8" or bool(memoryview(packet)[0] & 0x10))
    return _Packet(packet.pts, packet.dts, packet.duration or 0, packet.is_keyframe, is_frame, packet.is_corrupt)


def _orientation(frame: VideoFrame) -> tuple[bool, bool, bool]:
    """Return whether to swap the axes and then to flip x and y, so that the picture stands upright."""
    side_data: Mapping[Any, Any] = frame.side_data
    if "DISPLAYMATRIX" not in side_data:
        return False, False, False
    # 16.16 fixed point: x' = a x + c y, y' = b x + d y. Angles between right ones go to the nearest.
    a, b, _, c, d = np.frombuffer(bytes(side_data["DISPLAYMATRIX"]), np.int32)[:5]
    return (False, bool(a < 0), bool(d < 0)) if abs(a) >= abs(b) else (True, bool(c < 0), bool(b < 0))


def _container_name(name: str, format_name: str) -> str:
    names, suffix = format_name.split(","), Path(name).suffix.lower().removeprefix(".")
    return suffix if suffix in names else "mp4" if "mp4" in names else names[0]


def _describe_stream(stream: Stream) -> str:
    if not stream.codec_context:  # such as a time code track
        return stream.type
    text = f"{stream.type} {stream.codec_context.codec.canonical_name}"
    if isinstance(stream, VideoStream):
        text += f" {stream.codec_context.width}x{stream.codec_context.height} {stream.codec_context.pix_fmt}"
    if isinstance(stream, AudioStream):
        text += f" {stream.codec_context.sample_rate} Hz {stream.codec_context.layout.name}"
    return text


# Writing


def write_video(path: Path, frames: Iterable[Pixels], fps: float = 8.0, crf: int = 20) -> None:
    """Write uint8[H, W, 3] frames as H.264 (yuv420p) in an mp4; the file appears only when it is complete."""
    rate = Fraction(fps).limit_denominator(1001)
    with writing(path) as part, av.open(str(part), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf), "preset": "ultrafast"})
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # clips are written in parallel; also keeps the bytes reproducible
        for number, frame in enumerate(frames):
            if number == 0:
                stream.height, stream.width = frame.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
