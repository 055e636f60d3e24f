"""The frames of a video stream: which there are, and the groups of pictures that hold chosen ones, decoded.

The packets are read once without decoding, which gives the exact presentation time of every frame whatever the
container's header says; then only the groups of pictures that hold chosen frames are decoded, several at a time, and
pictures that no other one refers to are skipped unless chosen. Where time stamps cannot be trusted, or chosen frames
turn out to be damaged, everything is decoded once to learn what is there and the frames are chosen again from that.
No thread outlives the call that started it, so a process may fork between calls.
"""

from __future__ import annotations

import errno
import io
import math
import os
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import IO

import av
import av.error
import numpy as np
from av.codec.context import ThreadType
from av.container import InputContainer
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from .. import pyav
from ..square import Square
from .colour import Display, alpha_decoder
from .packets import Packet, container_name, describe_packet, describe_stream
from .types import ChooseAgain, Pixels, VideoError, VideoInfo

_MAX_THREADS = 8  # of one call, in total; every decoder holds up to 17 pictures for reference
_MAX_DECODER_THREADS = 4  # of one decoder; more cost memory and decode frames ahead that nobody asked for
_SEEK_PACKETS = 256  # reading past fewer packets than this is cheaper than a seek


class Video:
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
            context = alpha_decoder(stream, 1) or stream.codec_context
            self._packets: list[Packet] = []
            for packet in self._demux(container, stream):
                self._packets.append(describe_packet(packet, codec))
                if frame is None:
                    frame = next(iter(self._decode(context, packet)), None)
            if frame is None:
                frame = next(iter(self._decode(context, None)), None)
            if not self._packets:
                raise VideoError(f"{name}: the video stream has no frames; record or download the file again")
            if frame is None:
                raise VideoError(
                    f"{name}: none of its {len(self._packets)} frames decodes ({codec}); download it again"
                )
            self._time_base = float(stream.time_base or 0)
            self._rate = float(stream.guessed_rate or stream.average_rate or 25)  # 25: as FFmpeg for raw streams
            self._display = Display.of(name, container.format.name, stream, frame)
            self._can_seek = container.format.name.startswith(("mov,", "matroska,"))
            self._num_declared = self._count_declared(container, stream)
            self.info = VideoInfo(
                name=name,
                container=container_name(name, container.format.name),
                codec=codec,
                duration_s=0.0,
                num_frames=0,
                fps=0.0,
                width=self._display.width,
                height=self._display.height,
                rotation=self._display.rotation,
                is_mirrored=self._display.is_mirrored,
                has_audio=len(container.streams.audio) > 0,
                streams=tuple(describe_stream(each) for each in container.streams),
                notes=self._display.notes,
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
        """Yield the frames `indices`; see `Clip`."""
        reformatter = VideoReformatter()
        if self._decoded is not None:
            numbers = {self._decoded[index]: index for index in indices}
            for number, frame in enumerate(self._run([(0, len(self._packets))])):
                if number in numbers:
                    yield numbers.pop(number), self._display.pixels(frame, size, reformatter)
                if not numbers:
                    return
            raise VideoError(f"{self._name}: it decodes differently each time; convert it, or download it again")
        missing = {self._pts(self._frames[index]): index for index in indices}
        for frame in self._run(self._spans(indices), frozenset(missing)):
            if frame.pts in missing:
                yield missing.pop(frame.pts), self._display.pixels(frame, size, reformatter)
        if missing:
            self._scan()
            raise ChooseAgain

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
                        put(missing.pop(frame.pts), self._display.pixels(frame, size, reformatter))
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
            raise ChooseAgain

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
        try:
            container = pyav.open_input(file, options)
        except (av.error.FFmpegError, OSError) as error:
            text = "no video found in it; it is not a video, or cut off before its index: check it or download it again"
            if error.errno == errno.EINVAL:  # what FFmpeg says of a format that is not allowed
                others = "playlists and descriptions (HLS, DASH, concat, SDP), text and subtitles"
                text = f"no video found in it; {others} are not read: give the video itself"
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

    def _demux(self, container: InputContainer, stream: VideoStream) -> Iterator[av.Packet[VideoStream]]:
        self._num_empty = 0
        try:
            for packet in container.demux(stream):
                if packet.size:
                    yield packet
                elif packet.pts is not None:
                    self._num_empty += 1  # AVI repeats a frame this way
        except av.error.FFmpegError:
            self._num_errors += 1  # what comes after cannot be read

    def _decode(self, context: VideoCodecContext, packet: av.Packet[VideoStream] | None) -> list[VideoFrame]:
        """Return the undamaged frames that come out after `packet` goes in; None for the last ones."""
        try:
            frames = context.decode(packet)
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
            context = alpha_decoder(stream, stream.codec_context.thread_count) or stream.codec_context
            if wanted is None:
                context.thread_type = ThreadType.SLICE  # so that damage does the same harm every time
            packets: Iterator[tuple[int, av.Packet[VideoStream]]] = enumerate(self._demux(container, stream))
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
                        yield from self._decode(context, packet)
                    if position >= last:
                        break
                yield from self._decode(context, None)
                context.flush_buffers()


def _num_threads(most: int) -> int:
    # A container or a scheduler may have given this process fewer processors than the machine has.
    return min(most, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
