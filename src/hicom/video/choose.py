"""Which frames: the choices of `read_frames`, checked, and parts of files as paths such as `clip.mp4#t=5,12`."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TypeVar, get_args, overload

import numpy as np
from numpy.typing import NDArray

from .pictures import Pictures
from .types import Clip, Snap, VideoError

T = TypeVar("T")


# Seconds of a part: from, up to, or both.
_PART = re.compile(r"(?P<path>.+)#t=(?=[\d,])(?P<start_s>\d+(?:\.\d+)?)?(?:,(?P<end_s>\d+(?:\.\d+)?))?", re.DOTALL)


def with_bounds(path: str, start_s: float | None, end_s: float | None) -> str:
    """Return the path of a part of a video: `clip.mp4#t=5,12`, as media fragments of the W3C have it.

    Raises:
        VideoError: the bounds are no part of a video.
    """
    Choice(name=path, start_s=start_s, end_s=end_s)
    first, last = ("" if value is None else f"{value:.6f}".rstrip("0").rstrip(".") for value in (start_s, end_s))
    if not first and not last:
        return path
    return f"{path}#t={first},{last}" if last else f"{path}#t={first}"


@overload
def split_bounds(source: Path) -> tuple[Path, dict[str, float]]: ...


@overload
def split_bounds(source: T) -> tuple[T | Path | str, dict[str, float]]: ...


def split_bounds(source: T) -> tuple[T | Path | str, dict[str, float]]:
    """Return the file of a path such as `clip.mp4#t=5,12`, and its bounds as `start_s` and `end_s`.

    All else comes as it is, without bounds; so does the path of a file that is really called so. What is no path, such
    as a URL or `-`, stays text.
    """
    found = _PART.fullmatch(str(source)) if isinstance(source, str | os.PathLike) else None
    if found is None or os.path.exists(found[0]):
        return source, {}
    bounds = {key: float(found[key]) for key in ("start_s", "end_s") if found[key]}
    is_text = isinstance(source, str) and (found["path"] == "-" or "://" in found["path"])
    return found["path"] if is_text else Path(found["path"]), bounds


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


@dataclass(frozen=True, kw_only=True)
class Choice:
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
            check_count(self.name, "num_frames", self.num_frames)
        if self.max_frames is not None:
            check_count(self.name, "max_frames", self.max_frames)
            if self.num_frames is not None or self.timestamps_s is not None:
                raise VideoError(
                    f"{self.name}: max_frames={self.max_frames} goes with fps or alone, not with {given[0]}"
                )
        if self.fps is not None and not (_is_number(self.fps) and self.fps > 0):
            raise VideoError(f"{self.name}: fps={self.fps!r}: give a positive number")
        for key, value in {"start_s": self.start_s, "end_s": self.end_s}.items():
            if value is not None and not (_is_number(value) and value >= 0):
                raise VideoError(f"{self.name}: {key}={value!r}: give a number of seconds that is not negative")
        if self.end_s is not None and (self.start_s or 0.0) >= self.end_s:
            raise VideoError(f"{self.name}: start_s={self.start_s or 0.0:g} is not before end_s={self.end_s:g}")
        if self.timestamps_s is not None:
            if self.start_s is not None or self.end_s is not None:
                raise VideoError(f"{self.name}: timestamps_s needs no bounds; leave start_s and end_s out")
            times = np.asarray(self.timestamps_s)
            if times.ndim != 1 or times.dtype.kind not in "iuf":
                raise VideoError(f"{self.name}: timestamps_s={self.timestamps_s!r}: give a list of seconds, as numbers")
            if len(self.timestamps_s) == 0:
                raise VideoError(f"{self.name}: timestamps_s is empty; give at least one time")
        if self.snap not in get_args(Snap):
            raise VideoError(f"{self.name}: snap={self.snap!r}: give one of {', '.join(get_args(Snap))}")

    def indices(self, clip: Clip) -> tuple[list[int], str]:
        """Return the indices, into the clip's times, of the frames to read, in order, and what is not as asked for."""
        keys = clip.keys if self.snap == "keyframe" else None  # first: finding them may change the times
        is_picture = isinstance(clip, Pictures) and len(clip.times_s) == 1
        chosen = self._exact(clip, self.repeat and not is_picture)
        if keys is None:
            return chosen, ""
        near = nearest(clip.times_s, keys, chosen) if len(keys) else []
        if any(way is not None for way in (self.num_frames, self.fps, self.timestamps_s)):
            asked, found = len(set(chosen)), len(set(near))
            if found < asked:
                text = f"only {found} key frame{'s' * (found != 1)} for {asked} frames (snap='keyframe')"
                return chosen, f"{text}; the exact frames are read, which takes longer"
        if not near:
            raise VideoError(f"{self.name}: it has no key frames; leave snap out, or convert it")
        return near if self.timestamps_s is not None or self.repeat else sorted(set(near)), ""

    def _exact(self, clip: Clip, repeat: bool) -> list[int]:
        times_s, duration_s = clip.times_s, clip.info.duration_s
        early_s = _early_s(times_s, clip.tick_s)
        reached_s = times_s - early_s
        if self.timestamps_s is not None:
            for time_s in self.timestamps_s:
                if not 0 <= time_s <= duration_s:  # also catches NaN
                    raise VideoError(
                        f"{self.name}: timestamp {time_s} s is not between 0 and the duration, {duration_s:g} s"
                    )
            on_screen = np.searchsorted(reached_s, np.asarray(self.timestamps_s, np.float64), side="right") - 1
            return [int(i) for i in on_screen.clip(0)]
        start_s = self.start_s or 0.0
        if start_s >= duration_s:
            raise VideoError(f"{self.name}: start_s={start_s:g} is not before the end of the video at {duration_s:g} s")
        first = max(int(np.searchsorted(reached_s, start_s, side="right")) - 1, 0)
        first = int(np.searchsorted(times_s, times_s[first], side="left"))  # of several with one time the first
        end_s, stop = duration_s, len(times_s)
        if self.end_s is not None and self.end_s < duration_s:
            end_s = self.end_s
            stop = int(np.searchsorted(times_s + early_s, end_s, side="left"))  # what begins there is behind it
            if times_s[first] >= end_s:
                text = f"no frame between {start_s:g} and {end_s:g} s can be read; the first after that is at"
                raise VideoError(f"{self.name}: {text} {times_s[first]:g} s")
            stop = max(stop, first + 1)
        chosen = np.arange(first, stop)
        if self.fps is not None:
            # A frame is on screen at some start_s + k / fps exactly if an integer k lies in its [begin, end); the
            # first one also where those before it cannot be read.
            begins = (reached_s[first:stop] - start_s) * self.fps
            begins[0] = min(begins[0], 0)
            last_s = end_s - min(_rounding_s(clip.tick_s), (end_s - times_s[stop - 1]) / 4)
            ends = np.append(begins[1:], max((last_s - start_s) * self.fps, 1e-9))
            chosen = chosen[np.maximum(np.ceil(begins), 0) < ends]
        count = self.num_frames or self.max_frames
        if count is not None and (count < len(chosen) or (repeat and self.num_frames is not None)):
            chosen = np.arange(first, stop)[uniform_indices(stop - first, count, repeat=repeat)]
        return [int(i) for i in chosen]


def _rounding_s(tick_s: float) -> float:
    # Half a tick of the clock, and what floating-point numbers lose. Clocks coarser than that of Matroska (1 ms) count
    # frames, or were not made for video: they say nothing about how exact the times are.
    return min(tick_s / 2, 0.0005) + 1e-6


def _early_s(times_s: NDArray[np.float64], tick_s: float) -> NDArray[np.float64]:
    """Return how much before its time each frame counts as on screen, because containers round times to their clock.

    Never more than a quarter of how long the frame before it is there.
    """
    most = _rounding_s(tick_s)
    return np.minimum(most, np.diff(times_s, prepend=times_s[0] - 4 * most) / 4)


def nearest(times_s: NDArray[np.float64], keys: NDArray[np.intp], indices: list[int]) -> list[int]:
    """Return for each of `indices` which of `keys` (ascending, not empty) is nearest in time, of two the earlier."""
    after = np.searchsorted(keys, indices)
    earlier, later = keys[(after - 1).clip(0)], keys[after.clip(None, len(keys) - 1)]
    # As near as makes no difference to a clock, though not to floating-point numbers, is as near.
    same_s = 1e-9 * float(times_s[-1])
    is_later = times_s[later] - times_s[indices] < times_s[indices] - times_s[earlier] - same_s
    # Before the first key frame both are that one.
    return [int(i) for i in np.where(is_later, later, earlier)]


def _is_number(value: object) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, Real) and math.isfinite(value)


def check_count(name: str, key: str, value: int) -> None:
    """Raise VideoError where `value` is no positive whole number."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise VideoError(f"{name}: {key}={value}: give a positive whole number")
