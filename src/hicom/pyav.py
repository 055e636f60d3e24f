"""What differs between the versions of PyAV, 15 to 19, in one place: what follows means the same with all of them."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import av
import av.stream
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream

_VERSION = int(av.__version__.split(".")[0])
TELLS_STATE = _VERSION >= 16  # whether the side data of packets can be seen
# What a packet may bring for all that follow it: colours, or a new header, which changes the size or how to decode.
_STATE: tuple[Any, ...] = ("palette", "new_extradata", "param_change")


def open_input(file: Path | IO[bytes], options: dict[str, str]) -> InputContainer:
    """Open a file to read; metadata that is no UTF-8 is no error."""
    how: dict[str, Any] = {"metadata_errors": "replace"} if _VERSION < 19 else {}  # 19 never fails on it
    return av.open(file, mode="r", options=options, **how)


def read_only(container: InputContainer, stream: VideoStream) -> None:
    """Let FFmpeg pass over the packets of all other streams, where PyAV can ask for that; it is faster."""
    if _VERSION >= 18:
        for other in container.streams:
            if other is not stream:
                other.discard = av.stream.Discard.all


def scale(frame: VideoFrame, width: int, height: int, reformatter: VideoReformatter) -> VideoFrame:
    """Return a frame as RGB of another size, in this thread alone where PyAV can start others."""
    how: dict[str, Any] = {"threads": 1} if _VERSION >= 17 else {}
    return reformatter.reformat(frame, width, height, "rgb24", interpolation=Interpolation.BICUBIC, **how)


def count_indexed(stream: VideoStream) -> int | None:
    """Return how many packets a file's index holds, without those that an edit list cuts away; None: PyAV hides it."""
    return len(stream.index_entries) if _VERSION >= 17 else None


def index_entries(stream: VideoStream) -> list[tuple[int, int, int, int]]:
    """Return decoding time, position, size and flags of every packet in a file's index; none where PyAV hides them."""
    if _VERSION < 17:
        return []
    return [(entry.timestamp, entry.pos, entry.size, entry.flags) for entry in stream.index_entries]


def decoder_state(packet: av.Packet[VideoStream]) -> dict[str, Any]:
    """Return what a packet changes in a decoder for the packets after it, by kind; empty where PyAV hides it."""
    if not TELLS_STATE:
        return {}
    # Most packets have none: this is faster than asking for each kind.
    return {
        each.data_type: packet.get_sidedata(each.data_type)
        for each in packet.iter_sidedata()
        if each.data_type in _STATE
    }


def bring_state(packet: av.Packet[VideoStream], state: Any) -> None:
    """Let a packet bring what `decoder_state` returned for another one, so that the decoder has it for this one."""
    packet.set_sidedata(state)
