"""Open a video, choose frames, return them with their times."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import islice, pairwise
from typing import Any

import numpy as np

from ..square import Square
from .choose import Choice, check_count, split_bounds
from .cursor import Cursors
from .decode import Video
from .pictures import Given
from .sources import name_of, open_clip
from .types import (
    ChooseAgain,
    Clip,
    FramesChanged,
    Pixels,
    Snap,
    Source,
    VideoError,
    VideoFrames,
    VideoInfo,
    VideoWarning,
)


def probe(source: Source, *, source_fps: float = 25.0) -> VideoInfo:
    """Return what a video is, without decoding more than its first frame where the file allows it.

    Args:
        source: see `read_frames`.
        source_fps: see `read_frames`.

    Raises:
        VideoError: the source is not a video that can be read.
    """
    return open_clip(split_bounds(source)[0], source_fps).info


def read_frames(
    source: Source | FrameReader,
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
        source: a path or an open binary file of any container that FFmpeg reads, GIF, WebP and AVIF included, or its
            bytes (`memoryview` and `mmap` too); an `http(s)://` URL (fetched whole, at most 1 GiB within 60 s) or a
            `file://` one; `-` for standard input, and pipes (kept until read, at most 4 GiB); a folder of images, read
            in natural order (frame2 before frame10); a still image (HEIC with the extra `heif`); uint8[T, H, W, 3],
            uint8[T, 3, H, W] or one frame of it, as an array or a torch tensor on any device; an iterator or a list of
            images (paths, bytes of files, Pillow images, arrays, tensors, `av.VideoFrame`s, whose times are kept). A
            path or URL may end with `#t=5,12`: seconds 5 to 12, as `start_s` and `end_s` would say. Only text names
            URLs and standard input: a `Path` is always a file of this machine. Or what `open_frames` opened.
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
            (the earlier of two as near), which may lie outside of the bounds. That takes a fraction of the time, and
            the result's `timestamps_s` say what was read. Where two of the frames asked for (by `num_frames`, `fps` or
            `timestamps_s`) would share a key frame, there are too few: the exact frames are read, with a warning.
            Without such a choice all key frames are read. Of pictures every frame is a key frame.
        repeat: `num_frames` frames of a shorter video, too: some come several times, with their times, spread evenly.
            A single picture stays one.

    Raises:
        VideoError: the source is not a video that can be read, or the choice makes no sense for it.

    Warns:
        VideoWarning: the video is truncated or damaged (frames are chosen from what decodes), or shorter than `end_s`;
            it is not shown as it is meant to be (`VideoInfo.notes`); it has too few key frames for `snap`.
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
    source: Source | VideoFrames | FrameReader,
    *,
    size: int | Square | None = None,
    source_fps: float = 25.0,
    **choice: Any,
) -> FrameReader:
    """Open a video to read its chosen frames in chunks, for videos whose chosen frames do not fit into memory.

    Args:
        source: see `read_frames`; or frames that it has read, which all come as they are; or a reader, to choose anew
            from the same video without looking through its file again.
        size: see `read_frames`.
        source_fps: see `read_frames`.
        **choice: further arguments of `read_frames`.

    Raises:
        VideoError: see `read_frames`.
    """
    opened, source = (source, source.source) if isinstance(source, FrameReader) else (None, source)
    if isinstance(source, VideoFrames):
        return FrameReader(source, Given(source), source_fps, None, None)
    name = name_of(source)
    file, bounds = split_bounds(source)
    if twice := [key for key in bounds if choice.get(key) is not None]:
        raise VideoError(f"{name}: the path says {' and '.join(twice)} already; give it once")
    choice |= bounds
    if unknown := set(choice) - {each.name for each in fields(Choice)}:
        raise VideoError(f"{name}: there is no choice of frames by {', '.join(sorted(unknown))}")
    chosen = Choice(name=name, **choice)
    if size is not None:
        check_count(name, "size", size.size if isinstance(size, Square) else size)
    # Only sources without times depend on the rate.
    is_open = opened is not None and (isinstance(opened.clip, Video) or opened.source_fps == source_fps)
    clip = opened.clip if opened is not None and is_open else open_clip(file, source_fps)
    return FrameReader(source, clip, source_fps, chosen, size)


class FrameReader:
    """Chosen frames of a video, read in chunks; `open_frames` makes one.

    Attributes:
        source: what was opened.
        clip: the video, opened.
        source_fps: frames per second of sources that have no times.
        info: the video; its sizes are those before scaling.
        timestamps_s: float64[T], presentation times of the chosen frames.
    """

    def __init__(
        self,
        source: Source | VideoFrames,
        clip: Clip,
        source_fps: float,
        choice: Choice | None,
        size: int | Square | None,
    ) -> None:
        self.source, self.clip, self.source_fps = source, clip, source_fps
        self._choice, self._size = choice, size
        self._choose()

    def _choose(self) -> None:
        clip = self.clip
        self.info = clip.info
        times_s = clip.times_s
        self._indices, self._note = [*range(len(times_s))], ""
        if self._choice is not None:
            self._indices, self._note = self._choice.indices(clip)
        self.timestamps_s = times_s[self._indices]

    def read(self) -> VideoFrames:
        """Return all chosen frames; see `read_frames`."""
        while True:
            try:
                result = _read(self.clip, self._indices, self._size)
                break
            except ChooseAgain:  # at most three times: without an index, without seeking, and once all was decoded
                self._choose()
        self._warn(stacklevel=4)  # of who called `read_frames`
        return result

    def at(self, timestamps_s: Sequence[float], size: int | Square | None = None) -> VideoFrames:
        """Return the frames on screen at these times of the whole video, whatever was chosen; see `read_frames`."""
        choice = Choice(name=self.info.name, timestamps_s=timestamps_s)
        return FrameReader(self.source, self.clip, self.source_fps, choice, size).read()

    def chunks(self, num_frames: int) -> Iterator[Pixels]:
        """Yield the chosen frames in order, `uint8[t, H, W, 3]` with `num_frames` of them; fewer in the last chunk.

        Raises:
            FramesChanged: frames turned out to be damaged, and others are chosen; what came so far is void.
            VideoError: see `read_frames`.

        Warns:
            VideoWarning: see `read_frames`.
        """
        try:
            is_sparse = isinstance(self.clip, Video) and self.clip.is_sparse(self._indices)
            if not is_sparse and all(a < b for a, b in pairwise(self._indices)):
                frames = self.clip.frames(self._indices, self._size)
                while chunk := [pixels for _, pixels in islice(frames, num_frames)]:
                    yield np.stack(chunk)
            else:
                with Cursors() as cursors:
                    for first in range(0, len(self._indices), num_frames):
                        chosen = self._indices[first : first + num_frames]
                        yield _read(self.clip, chosen, self._size, cursors).frames
        except ChooseAgain:
            self._choose()
            raise FramesChanged from None
        self._warn(stacklevel=3)

    def _warn(self, stacklevel: int) -> None:
        # A look at the clip, not at what it was when frames were chosen: reading may have found damage.
        info, end_s = self.clip.info, None if self._choice is None else self._choice.end_s
        if info.damage:
            warnings.warn(f"{info.name}: {info.damage}; using those", VideoWarning, stacklevel)
        for note in (*info.notes, *([self._note] if self._note else [])):
            warnings.warn(f"{info.name}: {note}", VideoWarning, stacklevel)
        if end_s is not None and end_s > info.duration_s:
            text = f"{info.name}: end_s={end_s:g} is past the end; reading to the end at {info.duration_s:g} s"
            warnings.warn(text, VideoWarning, stacklevel)


def _read(clip: Clip, indices: list[int], size: int | Square | None, cursors: Cursors | None = None) -> VideoFrames:
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

    if isinstance(clip, Video):
        clip.read(sorted(places), size, put, cursors)
    else:
        for index, frame in clip.frames(sorted(places), size):
            put(index, frame)
    if frames is None:
        raise VideoError(f"{clip.info.name}: none of the chosen frames can be read; choose others")
    return VideoFrames(frames, clip.times_s[indices], clip.info)
