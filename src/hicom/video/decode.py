"""The frames of a video stream: which there are, and the groups of pictures that hold chosen ones, decoded.

The packets are read once without decoding, which gives the one time line of the file, whatever its header says and
whatever is asked; then only the groups of pictures that hold chosen frames are decoded, several at a time, and
pictures that no other one refers to are skipped unless chosen. Where the packets do not say in which order frames are
shown, or chosen ones turn out to be damaged, everything is decoded once to learn that; times that were right stay.
No thread outlives the call that started it, so a process may fork between calls.
"""

from __future__ import annotations

import errno
import io
import os
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
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
from .cursor import Cursor, Cursors, Lost, Table
from .damage import is_complete, tagged_duration_s, unsound
from .index import read_index
from .packets import Packet, States, container_name, describe_packet, describe_stream, numbered
from .timeline import Ranks, Wanted, make_time_line, order_by_decoder, order_by_stamps, stamps_of
from .types import ChooseAgain, Pixels, VideoError, VideoInfo

_MAX_THREADS = 8  # of one call, in total; every decoder holds up to 17 pictures for reference
_MAX_DECODER_THREADS = 4  # of one decoder; more cost memory and decode frames ahead that nobody asked for
_SEEK_PACKETS = 256  # reading past fewer packets than this is cheaper than a seek


class Video:
    """The best video stream of a file.

    A frame is known by its packet: a decoder gets the position of the packet in place of its times, and gives it back
    with the frame. Which packet is which frame, and when it is shown, `timeline` says; AVI and ASF with frames in
    another order than that of the file say only when (`Ranks`).
    """

    def __init__(self, file: Path | IO[bytes], name: str) -> None:
        self._file, self._name = file, name
        self._load(may_index=True)

    def _load(self, may_index: bool) -> None:
        """Find out what there is; `may_index` takes what the packets say from an index, where there is one."""
        name = self._name
        self._num_errors = 0
        self._num_empty = 0
        self._is_whole = False  # whether everything has to be decoded to read anything
        with self._opened() as (container, stream, context):
            codec = stream.codec_context.codec
            frame, is_read = self._read_packets(container, stream, context, may_index)
            self._rate = float(stream.guessed_rate or stream.average_rate or 25)  # 25: as FFmpeg for raw streams
            self.tick_s = float(stream.time_base or 1 / self._rate)
            self._display = Display.of(name, container.format.name, stream, frame)
            self._table = Table(self._packets, codec.canonical_name, is_read=is_read)
            self._num_lost = self._count_lost(container, stream)
            self.info = VideoInfo(
                name=name,
                container=container_name(name, container.format.name),
                codec=codec.canonical_name,
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
            is_reordered = context.has_b_frames
            self._is_slotted = container.format.name in ("avi", "asf")  # they store times of decoding alone
            is_hidden = not pyav.TELLS_STATE and (frame.format.name == "pal8" or container.format.name == "flv")
        self._unsound = unsound(self._packets)
        self._stamps = stamps_of(self._packets, self._is_slotted)
        # Where what packets change in the decoder is not told, none is left out.
        self._key_positions = [0] if is_hidden else [i for i, packet in enumerate(self._packets) if packet.is_key]
        self._order: list[int] | None = None  # the packets in the order of presentation, once that is known
        self._ranks: Ranks | None = None
        self._find_frames(codec.reorder, is_reordered, frame.pts or 0)

    def _read_packets(
        self, container: InputContainer, stream: VideoStream, context: VideoCodecContext, may_index: bool
    ) -> tuple[VideoFrame, bool]:
        """Fill the table of packets; return the first frame that decodes, and whether all packets were read for it."""
        frame: VideoFrame | None = None
        codec = stream.codec_context.codec.canonical_name
        self._packets: list[Packet] = []
        self._states = States()
        is_plain = container.format.name in ("mpegts", "mpeg")  # there all headers stand in the packets themselves
        for packet in self._demux(container, stream):
            if not is_plain:
                self._states.add(len(self._packets), packet)
            self._packets.append(describe_packet(packet, codec))
            if frame is None:
                frame = next(iter(self._decode(context, numbered(packet, len(self._packets) - 1))), None)
                if frame is not None and may_index and self._num_errors == 0:
                    indexed = read_index(self._file, container, stream, self._packets)
                    if indexed is not None:
                        self._packets = indexed
                        return frame, False
        if not self._packets:
            raise VideoError(f"{self._name}: the video stream has no frames; record or download the file again")
        if frame is None:
            frame = next(iter(self._decode(context, None)), None)
        if frame is None:
            raise VideoError(self._none_decodes(codec))
        return frame, True

    def _find_frames(self, can_reorder: bool, is_reordered: bool, first: int) -> None:
        """Find out which frames there are and when they are shown; `first` is the packet of the first that decodes."""
        packets = self._packets
        # What FFmpeg tells of AVI and ASF with frames that are not in the order of the file are guesses.
        is_guessed = self._is_slotted and can_reorder and any(packet.pts != packet.dts for packet in packets)
        if is_guessed and not self._unsound:
            every = list(range(len(packets)))
            self._ranks = Ranks(len(packets), self._key_positions)
            self._set_frames(every, set(every))
            return
        self._order = None if is_guessed else order_by_stamps(packets, can_reorder, is_reordered)
        if self._order is None:
            self._scan()
            return
        # Where the file starts in the middle of a group of pictures, the first ones are there but do not decode.
        self._set_frames(self._order, set(self._order[self._order.index(first) :]))

    def frames(
        self, indices: list[int], size: int | Square | None, cursors: Cursors | None = None
    ) -> Iterator[tuple[int, Pixels]]:
        """Yield the frames `indices`; see `Clip`. `cursors` are open files to go on with."""
        reformatter = VideoReformatter()
        wanted = Wanted(indices, self._frames, self._ranks)
        spans = [(0, len(self._packets) - 1)] if self._is_whole else self._spans(indices)
        with self._losing():
            for frame in self._run(spans, None if self._is_whole else wanted.positions, cursors=cursors):
                index = wanted.take(frame.pts)
                if index is not None:
                    yield index, self._display.pixels(frame, size, reformatter)
                if self._is_whole and wanted.is_done():
                    return
        if not wanted.is_done():
            self._decode_whole()

    def is_sparse(self, indices: list[int]) -> bool:
        """Whether most of `indices` lie in groups of pictures of their own, so that few are decoded twice in pieces."""
        return not self._is_whole and 2 * len(self._spans(sorted(set(indices)))) > len(set(indices))

    def read(
        self,
        indices: list[int],
        size: int | Square | None,
        put: Callable[[int, Pixels], None],
        cursors: Cursors | None = None,
    ) -> None:
        """Give `put` all that `frames` yields, but in any order and from several threads at a time."""
        spans = [] if self._is_whole else self._spans(indices)
        num_workers = min(_num_threads(_MAX_THREADS), len(spans)) if self._can_reopen() else 1
        if num_workers <= 1:
            for index, pixels in self.frames(indices, size, cursors):
                put(index, pixels)
            return
        # All that threads share: each span is of one of them, and what they count besides only matters in a scan.
        wanted = Wanted(indices, self._frames, self._ranks)
        shares = _shares(spans, num_workers)

        def take(own: deque[tuple[int, int]]) -> Iterator[tuple[int, int]]:
            last = -1
            with suppress(IndexError):  # nothing is left
                while True:
                    # Who is done helps where most is left, but goes back in the file for nobody.
                    most = own or max(shares, key=len)
                    if most is not own and most[-1][0] < last:
                        return
                    span = most.popleft() if most is own else most.pop()
                    last = span[1]
                    yield span

        def stop() -> None:
            for share in shares:
                share.clear()

        def work(own: deque[tuple[int, int]]) -> None:
            reformatter = VideoReformatter()
            try:
                # Decoders of one thread each waste the least: nothing is decoded ahead, none waits for another.
                num_threads = _num_threads(_MAX_THREADS) // num_workers
                for frame in self._run(take(own), wanted.positions, num_threads, cursors):
                    index = wanted.take(frame.pts)
                    if index is not None:
                        put(index, self._display.pixels(frame, size, reformatter))
            except BaseException:
                stop()  # the others have nothing left to begin
                raise

        with self._losing(), ThreadPoolExecutor(num_workers, "hicom-video") as pool:  # waits for all of its threads
            try:
                for worker in [pool.submit(work, share) for share in shares]:
                    worker.result()
            finally:
                stop()  # also where the caller is interrupted while it waits
        if not wanted.is_done():
            self._decode_whole()

    @contextmanager
    def _losing(self) -> Iterator[None]:
        """Choose again where what is read is not what was to be there, after looking at the packets themselves."""
        try:
            yield
        except Lost:
            if self._table.is_read:
                self._table.can_seek = False
            else:
                self._load(may_index=False)
            raise ChooseAgain from None

    # The frames there are

    @property
    def keys(self) -> NDArray[np.intp]:
        """Which of the frames are key frames; where only a decoder can tell, everything is decoded once."""
        if self._ranks is not None:
            self._scan()
        return self._keys

    def _decode_whole(self) -> None:
        """Go on with what decodes when all is decoded, because some of the chosen frames did not."""
        if self._is_whole:
            raise VideoError(f"{self._name}: it decodes differently each time; convert it, or download it again")
        self._scan()
        self._is_whole = True
        raise ChooseAgain

    def _scan(self) -> None:
        """Decode everything to learn which frames there are."""
        self._num_errors = 0
        decoded: dict[int, bool] = {}  # packets in the order of their frames, and whether those are key frames
        for frame in self._run([(0, len(self._packets) - 1)]):
            if frame.pts is not None and self._packets[frame.pts].is_frame:
                decoded.setdefault(frame.pts, frame.key_frame)
        if self._order is None:
            self._order = order_by_decoder(len(self._packets), decoded)
        self._ranks = None
        keys = {position for position, is_key in decoded.items() if is_key}
        self._key_positions = [position for position in self._key_positions if position in keys]
        self._set_frames(self._order, set(decoded), keys)

    def _none_decodes(self, codec: str) -> str:
        return f"{self._name}: none of its {len(self._packets)} frames decodes ({codec}); download it again"

    def _set_frames(self, order: list[int], readable: set[int], keys: set[int] | None = None) -> None:
        """Take over which frames there are.

        Args:
            order: all packets, in the order of presentation.
            readable: those of the frames that can be chosen.
            keys: those of key frames; None: the packets say so.
        """
        self._places = {position: place for place, position in enumerate(order)}
        order = [position for position in order if self._packets[position].is_frame]
        readable = readable & set(order) - self._unsound
        if not readable:
            raise VideoError(self._none_decodes(self.info.codec))
        stamps = [self._stamps[position] for position in order]
        if self._is_slotted:
            stamps.sort(key=lambda stamp: -1 if stamp is None else stamp)
        times_s, duration_s = make_time_line(self._packets, order, stamps, self.tick_s, self._rate)
        numbers = [number for number, position in enumerate(order) if position in readable]
        self._frames = [order[number] for number in numbers]
        self.times_s = times_s[numbers]
        is_key = [self._packets[each].is_key if keys is None else each in keys for each in self._frames]
        self._keys = np.flatnonzero(is_key)
        self.info = replace(
            self.info,
            duration_s=duration_s,
            num_frames=len(numbers),
            fps=len(numbers) / duration_s,
            damage=self._damage(len(numbers), len(order)),
        )

    def _damage(self, num_frames: int, num_shown: int) -> str:
        """Return what is missing when so many frames can be read of those that the packets say are shown."""
        is_truncated = self._num_lost > 0
        is_damaged = self._num_errors > 0 or len(self._unsound) > 0
        num_promised = num_shown + self._num_lost
        if num_frames == num_promised or not (is_truncated or is_damaged):
            return ""
        return f"{'truncated' if is_truncated else 'damaged'}: {num_frames} of {num_promised} frames decode"

    def _count_lost(self, container: InputContainer, stream: VideoStream) -> int:
        """Return how many frames the file promises behind its last packet."""
        packets, clock_s = self._packets, float(stream.time_base or 0)
        if container.format.name.startswith("mov,"):
            indexed = pyav.count_indexed(stream)
            return max(0, (self._count_uncut(stream) if indexed is None else indexed) - len(packets))
        if container.format.name.startswith("matroska,"):
            declared_s = tagged_duration_s(stream.metadata)
            read_s = max((packet.pts or 0) + packet.duration for packet in packets) * clock_s
            # Within half a second the tag may count otherwise than we do.
            num_lost = round((declared_s - read_s) * self._rate) if declared_s - read_s > 0.5 else 0
        elif container.format.name == "avi":  # its header counts slots
            num_lost = stream.frames - max((packet.dts or 0) + packet.duration for packet in packets)
        else:
            return max(0, stream.frames - len(packets) - self._num_empty)
        # The last frame may last long, and the last slots of AVI may be empty.
        return max(0, num_lost) if num_lost > 0 and (self._num_errors > 0 or not self._is_complete()) else 0

    def _is_complete(self) -> bool:
        """Return whether the structure of the file ends where the file ends."""
        if isinstance(self._file, Path):
            with self._file.open("rb") as file:
                return is_complete(file)
        self._file.seek(0)
        return is_complete(self._file)

    def _count_uncut(self, stream: VideoStream) -> int:
        """Return how many packets there should be, where the header counts those that an edit list cuts away, too."""
        num_packets = len(self._packets)
        if stream.frames <= num_packets:
            return num_packets
        with self._opened(ignore_editlist="1") as (container, uncut, _):
            return num_packets + stream.frames - sum(1 for _ in self._demux(container, uncut))

    # Decoding

    def _can_reopen(self) -> bool:
        """Return whether several can read at the same time: other files than these have one position for all."""
        return isinstance(self._file, Path) or type(self._file) is io.BytesIO

    @contextmanager
    def _opened(
        self, num_threads: int = 1, **options: str
    ) -> Iterator[tuple[InputContainer, VideoStream, VideoCodecContext]]:
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
            yield container, stream, alpha_decoder(stream, num_threads) or stream.codec_context

    def _demux(self, container: InputContainer, stream: VideoStream) -> Iterator[av.Packet[VideoStream]]:
        self._num_empty = 0
        try:
            for packet in container.demux(stream):
                if packet.size:
                    yield packet
                elif packet.pts is not None:
                    self._num_empty += 1  # AVI repeats a frame this way
        except IndexError:
            pass  # PyAV at the end of a file in which streams were found on the way
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
        spans: list[tuple[int, int]] = []
        for index in indices:
            first, last = self._span(index) if self._ranks is None else self._ranks.span(index)
            if spans and first <= spans[-1][1] + 1:
                spans[-1] = (min(first, spans[-1][0]), max(last, spans[-1][1]))
            else:
                spans.append((first, last))
        return spans

    def _span(self, index: int) -> tuple[int, int]:
        """Return which packets give the frame `index`: from its key frame on."""
        keys, position = self._key_positions, self._frames[index]
        key = bisect_right(keys, position) - 1
        while key >= 0 and self._places[keys[key]] > self._places[position]:
            key -= 1  # a leading picture: shown before the key frame that it follows in the file
        return (keys[key] if key >= 0 else 0), position

    def _run(
        self,
        spans: Iterable[tuple[int, int]],
        wanted: frozenset[int] | None = None,
        num_threads: int = _MAX_THREADS,
        cursors: Cursors | None = None,
    ) -> Iterator[VideoFrame]:
        """Decode spans of packets; with `wanted`, skip what neither the frames of these packets nor others need."""
        opened = partial(self._opened, _num_threads(num_threads))
        # Where it is not told what packets change in the decoder, a seek brings it, and reading past them does not.
        seek_packets = _SEEK_PACKETS if pyav.TELLS_STATE else 1
        cursor = (cursors or Cursors()).take(lambda: Cursor(self._table, opened, self._demux, seek_packets))
        is_done = False
        try:
            for first, last in spans:
                for position, packet in cursor.packets_from(first):
                    if wanted is None and position == 0:
                        cursor.context.thread_type = ThreadType.SLICE  # so that damage does the same harm every time
                    if position == first:
                        self._states.bring(position, packet)
                    # The first packet is needed anyway; some decoders read this setting only when they open.
                    is_needed = wanted is None or position == first or position in wanted
                    cursor.context.skip_frame = "DEFAULT" if is_needed else "NONREF"
                    yield from self._decode(cursor.context, numbered(packet, position))
                    if position >= last:
                        break
                yield from self._decode(cursor.context, None)
                cursor.context.flush_buffers()
            is_done = True
        finally:
            if is_done and cursors is not None:
                cursors.give(cursor)
            else:
                cursor.close()


def _shares(spans: list[tuple[int, int]], num: int) -> list[deque[tuple[int, int]]]:
    """Divide spans of packets so that all shares take about as long; each goes forward through the file."""
    shares: list[list[tuple[int, int]]] = [[] for _ in range(num)]
    loads = [0] * num
    for first, last in sorted(spans, key=lambda span: span[0] - span[1]):
        least = loads.index(min(loads))
        shares[least].append((first, last))
        loads[least] += last - first + 1
    return [deque(sorted(share)) for share in shares]


def _num_threads(most: int) -> int:
    # A container or a scheduler may have given this process fewer processors than the machine has.
    return min(most, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
