"""What the packets and streams of a file say, without decoding."""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path
from typing import Any, NamedTuple

import av
from av.audio.stream import AudioStream
from av.stream import Stream
from av.video.stream import VideoStream

from .. import pyav


class Packet(NamedTuple):
    """What a packet says about the frame in it; times in ticks of the stream's clock.

    A packet is known by its position among the packets of its stream, in the order of the file. A decoder gets that
    number in place of the time, and gives it out again with the frame: whatever the times say, a frame is known by its
    packet.
    """

    pts: int | None
    dts: int | None
    duration: int
    is_key: bool
    is_frame: bool  # one that is shown: not there for reference only and not cut away by an edit list
    is_corrupt: bool
    pos: int | None = None  # byte of the file with which it begins, where the container tells
    size: int = 0  # bytes


def describe_packet(packet: av.Packet[VideoStream], codec: str) -> Packet:
    """Return what a packet says."""
    # A VP8 packet may hold a picture for reference only: bit 4 of its header says whether it is shown (RFC 6386, 9.1).
    is_frame = not packet.is_discard and (codec != "vp8" or bool(memoryview(packet)[0] & 0x10))
    return Packet(
        packet.pts,
        packet.dts,
        packet.duration or 0,
        packet.is_keyframe,
        is_frame,
        packet.is_corrupt,
        packet.pos,
        packet.size,
    )


def numbered(packet: av.Packet[VideoStream], position: int) -> av.Packet[VideoStream]:
    """Give a packet its position in place of its times, on the way into a decoder: it is the `pts` of its frame."""
    packet.pts, packet.dts = position, None
    return packet


class States:
    """What packets change in a decoder for those after them: palettes, new headers.

    A decoder that starts at a later packet needs the last of each kind before it.
    """

    def __init__(self) -> None:
        self._changes: dict[str, list[tuple[int, Any]]] = {}  # by kind: from which packet on

    def add(self, position: int, packet: av.Packet[VideoStream]) -> None:
        """Note what the next packet of the file changes."""
        for kind, state in pyav.decoder_state(packet).items():
            changes = self._changes.setdefault(kind, [])
            if not changes or bytes(changes[-1][1]) != bytes(state):  # some containers repeat it
                changes.append((position, state))

    def bring(self, position: int, packet: av.Packet[VideoStream]) -> None:
        """Let a packet bring what it and those before it changed, for a decoder that may have left them out.

        FLV has changes in tags of their own: a packet that is sought does not even bring its own.
        """
        for changes in self._changes.values():
            number = bisect_right(changes, position, key=lambda change: change[0]) - 1
            if number >= 0:
                pyav.bring_state(packet, changes[number][1])


def container_name(name: str, format_name: str) -> str:
    """Return the short name of a container: that of the file's suffix, where FFmpeg has several for one format."""
    names, suffix = format_name.split(","), Path(name).suffix.lower().removeprefix(".")
    return suffix if suffix in names else "mp4" if "mp4" in names else names[0]


def describe_stream(stream: Stream) -> str:
    """Return a stream in a few words, such as `video h264 320x240 yuv420p`."""
    if not stream.codec_context:  # such as a time code track
        return stream.type
    text = f"{stream.type} {stream.codec_context.codec.canonical_name}"
    if isinstance(stream, VideoStream):
        text += f" {stream.codec_context.width}x{stream.codec_context.height} {stream.codec_context.pix_fmt}"
    if isinstance(stream, AudioStream):
        text += f" {stream.codec_context.sample_rate} Hz {stream.codec_context.layout.name}"
    return text
