"""Videos and pictures that clients of a server name or send, taken without trusting the client.

What is fetched: only `http` and `https`, only from public addresses (`hicom.fetch`). Sizes, times, pixels and
frames are checked before anything is decoded as a whole. Local files and private addresses need an explicit permission.
"""

from __future__ import annotations

import binascii
import io
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import av
import av.error
from av.container import InputContainer
from PIL import Image

from ..fetch import FetchError, FetchLimits, fetch_pieces
from ..pyav import open_input
from ..video import VideoError, probe
from ..video.pictures import FORMATS, open_picture, reading
from .boxes import has_sound_tables

MOVING = ("AVIF", "PNG", "WEBP")  # formats of pictures that may be videos
ANIMATIONS = ("apng", "gif")  # its containers that are decoded from their start to any frame
TABLE = 8  # entries of a table for each frame that a file may hold: there is sound, too
BASE64_PIECE = 2**20  # characters; four of them are three bytes


class MediaError(ValueError):
    """A video or picture is refused; the text may go to the client.

    Args:
        message: what is wrong.
        code: a short name for programs.
    """

    def __init__(self, message: str, code: str = "invalid_media") -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, kw_only=True)
class MediaLimits:
    """What a server takes from clients.

    Attributes:
        max_bytes: of a file, fetched or sent.
        max_duration_s: of a video.
        max_pixels: of a frame or picture.
        max_frames: that a file may hold.
        max_listed: pictures of a video that is sent as a list of them.
        max_total_pixels: of all frames of a request's animations and lists; 512 frames of 1920x1080 are fewer.
        max_held_bytes: of all requests at the same time, their media included.
        max_redirects: that are followed.
        timeout_s: for a whole fetch.
        allowed_hosts: the only hosts that are fetched from, their subdomains included; empty: any.
        allowed_folders: local files under these may be named; empty: none.
        allow_private: also fetch from private addresses.
    """

    max_bytes: int = 256 * 2**20
    max_duration_s: float = 2 * 3600.0
    max_pixels: int = 4096 * 2304
    max_frames: int = 500_000
    max_listed: int = 256
    max_total_pixels: int = 2**30
    max_held_bytes: int = 2**30
    max_redirects: int = 3
    timeout_s: float = 30.0
    allowed_hosts: tuple[str, ...] = ()
    allowed_folders: tuple[Path, ...] = ()
    allow_private: bool = False

    @property
    def fetching(self) -> FetchLimits:
        """Those of a fetch."""
        return FetchLimits(
            max_bytes=self.max_bytes,
            timeout_s=self.timeout_s,
            max_redirects=self.max_redirects,
            allow_private=self.allow_private,
            allowed_hosts=self.allowed_hosts,
        )

    def with_allowed(self, hosts: tuple[str, ...], folders: tuple[Path, ...]) -> MediaLimits:
        """Return these with more allowed hosts and folders."""
        allowed_hosts, allowed_folders = self.allowed_hosts + hosts, self.allowed_folders + folders
        return replace(self, allowed_hosts=allowed_hosts, allowed_folders=allowed_folders)


class Account:
    """What the media of one request cost together; every part is counted before it is paid for.

    Args:
        limits: of the server.
        hold: called with a number of bytes that will be kept in memory; it may refuse them.
    """

    def __init__(self, limits: MediaLimits, hold: Callable[[int], None] = lambda _: None) -> None:
        self.limits, self.hold = limits, hold
        self._pixels = 0
        self._lock = threading.Lock()

    def decode(self, pixels: int) -> None:
        """Count pixels that will be decoded.

        Raises:
            MediaError: they are too many, with all before.
        """
        with self._lock:
            self._pixels += pixels
            total = self._pixels
        if total > self.limits.max_total_pixels:
            most = f"{self.limits.max_total_pixels:,}"
            raise MediaError(f"the frames have {total:,} pixels together; at most {most} are taken", "media_too_large")


def load_media(url: str, limits: MediaLimits, *, kind: str = "video", account: Account | None = None) -> Any:
    """Return what `VideoChat.encode` takes for a URL: bytes, a path, or a list of pictures as bytes.

    Args:
        url: `http(s)://...`, `data:video/mp4;base64,...` (or an image), `data:video/jpeg;base64,FRAME,FRAME,...`, or
            `file:///...` where folders are allowed.
        limits: of the server.
        kind: `image` where one picture is to come; a still picture may be sent as a video, too: it is one of one frame.
        account: of the request.

    Raises:
        MediaError: it is refused, cannot be had, or is neither video nor picture.
    """
    account = account or Account(limits)
    source: bytes | Path | list[bytes]
    scheme = url[:16].partition(":")[0].lower()
    if scheme == "data":
        source = _from_data(url, account)
    elif scheme in ("http", "https"):
        source = fetch(url, limits, account.hold)
    elif scheme == "file":
        source = _from_file(url, limits)
    else:
        raise MediaError("media must be http, https or data URLs", "unsupported_url")
    check_media(source, limits, kind=kind, account=account)
    return source


def check_media(
    source: bytes | Path | Sequence[bytes], limits: MediaLimits, *, kind: str = "video", account: Account | None = None
) -> None:
    """Raise MediaError where a file is not within the limits, as far as can be told without decoding it as a whole.

    Args:
        source: a file, or pictures that are the frames of a video.
        limits: of the server.
        kind: see `load_media`.
        account: see `load_media`.
    """
    account = account or Account(limits)
    if isinstance(source, Sequence) and not isinstance(source, bytes):
        num_frames = len(source)
        for data in source:
            _check_listed(data, account)
    else:
        num_frames = _check_picture(source, account) or _check_video(source, account)
    if kind == "image" and num_frames > 1:
        raise MediaError("a video is sent as image_url; send it as video_url", "video_as_image")


def _check_listed(data: bytes, account: Account) -> None:
    with _picture(data, "a frame is no picture that can be read") as picture:
        if picture is None:
            raise MediaError("a frame is no picture that can be read")
        _check_size(picture.width, picture.height, account.limits)
        account.decode(picture.width * picture.height)


def _check_picture(source: bytes | Path, account: Account) -> int:
    """Check a file that Pillow reads, and return its number of frames; 0: FFmpeg reads it."""
    with _picture(source, "the picture cannot be read") as picture:
        if picture is None:
            return 0
        _check_size(picture.width, picture.height, account.limits)
        # Pages, and further pictures of a camera, are no frames.
        with reading("it"):
            num_frames = getattr(picture, "n_frames", 1) if picture.format in MOVING else 1
        if num_frames > 1 and picture.format == "PNG":
            return 0
        _check_count(num_frames, account.limits)
        account.decode(picture.width * picture.height * num_frames)
        return num_frames


@contextmanager
def _picture(source: bytes | Path, refusal: str) -> Iterator[Image.Image | None]:
    """Give an opened picture, of which nothing is decoded; None: the file is none."""
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            yield open_picture(file, "it", FORMATS)
    except MediaError:
        raise
    except (VideoError, OSError):
        raise MediaError(refusal) from None


def _check_video(source: bytes | Path, account: Account) -> int:
    """Check a file that moves, and return its number of frames."""
    limits = account.limits
    data = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            if not has_sound_tables(file, TABLE * limits.max_frames):
                raise MediaError("the file's header stands for more than is taken", "media_too_large")
        # Sizes that headers tell come first: opening a decoder for a hostile size is what is to be avoided.
        with open_input(data) as container:
            for stream in container.streams.video:
                if stream.codec_context is None:  # nothing here decodes it
                    raise MediaError("the file is no video or picture that can be read")
                _check_size(stream.codec_context.width, stream.codec_context.height, limits)
            if container.duration is not None:
                _check_duration(container.duration / av.time_base, limits)
            num_packets = _count_packets(container, limits)
            if container.format.name in ANIMATIONS:
                pixels = max(each.codec_context.width * each.codec_context.height for each in container.streams.video)
                account.decode(pixels * num_packets)
        info = probe(source)
    except (VideoError, av.error.FFmpegError, OSError):
        raise MediaError("the file is no video or picture that can be read") from None
    _check_size(info.width, info.height, limits)
    _check_duration(info.duration_s, limits)
    _check_count(info.num_frames, limits)
    return info.num_frames


def _count_packets(container: InputContainer, limits: MediaLimits) -> int:
    """Return how many frames a file may have; too many are refused before anybody lists them."""
    streams = container.streams.video
    number = 0
    if container.format.name.startswith("mov,") and all(stream.frames for stream in streams):
        number = max((stream.frames for stream in streams), default=0)  # here no promise but the length of a table
        _check_count(number, limits)
        return number
    for packet in container.demux(streams):
        number += packet.size > 0
        _check_count(number, limits)
    return number


def fetch(url: str, limits: MediaLimits, hold: Callable[[int], None] = lambda _: None) -> bytes:
    """Return the content behind an `http` or `https` URL.

    Args:
        url: of it.
        limits: of the server.
        hold: see `Account`.

    Raises:
        MediaError: the address is not allowed, it does not answer in time, or there is too much of it.
    """
    content = io.BytesIO()
    try:
        for piece in fetch_pieces(url, limits.fetching):
            hold(len(piece))
            content.write(piece)
    except FetchError as error:
        raise MediaError(str(error), error.code) from None
    return content.getvalue()


def _from_data(url: str, account: Account) -> bytes | list[bytes]:
    start = url.find(",") + 1
    kind = url[5 : start - 1].lower()
    if not start or not kind.endswith(";base64"):
        raise MediaError("data URLs must be base64: data:video/mp4;base64,...", "unsupported_url")
    length = len(url) - start
    if length > account.limits.max_bytes * 4 / 3 + 4:
        raise _too_large(account.limits)
    if not kind.startswith("video/jpeg"):
        account.hold(length * 3 // 4)
        return _decoded(url, start, len(url))
    number, most = url.count(",", start) + 1, account.limits.max_listed
    if number > most:  # before anything is done for one of them
        raise MediaError(f"the video has {number:,} frames; at most {most:,} are taken", "media_too_large")
    account.hold(length * 3 // 4)
    frames = []
    for _ in range(number):
        stop = url.find(",", start)
        stop = len(url) if stop < 0 else stop
        frames.append(_decoded(url, start, stop))
        start = stop + 1
    return frames


def _decoded(text: str, start: int, stop: int) -> bytes:
    """Return what a part of a text is in base64, without a copy of it."""
    content = io.BytesIO()
    try:
        for first in range(start, stop, BASE64_PIECE):
            piece = text[first : min(first + BASE64_PIECE, stop)]
            data = binascii.a2b_base64(piece, strict_mode=True)
            if first + BASE64_PIECE < stop and len(data) * 4 != BASE64_PIECE * 3:
                raise ValueError  # it ends before its end
            content.write(data)
    except ValueError:
        raise MediaError("a data URL is not base64") from None
    return content.getvalue()


def _from_file(url: str, limits: MediaLimits) -> Path:
    path = Path(unquote(urlsplit(url).path))
    refused = MediaError("local files may not be named here", "file_not_allowed")
    if not limits.allowed_folders:
        raise refused
    try:
        real = path.resolve(strict=True)  # links and .. are followed first
    except OSError:
        raise refused from None
    if not any(real.is_relative_to(folder.resolve()) for folder in limits.allowed_folders) or not real.is_file():
        raise refused
    if real.stat().st_size > limits.max_bytes:
        raise _too_large(limits)
    return real


def _too_large(limits: MediaLimits) -> MediaError:
    return MediaError(f"the media has more than {limits.max_bytes:,} bytes", "media_too_large")


def _check_size(width: int, height: int, limits: MediaLimits) -> None:
    if width * height > limits.max_pixels:
        text = f"frames have {width}x{height} pixels; at most {limits.max_pixels:,} are taken"
        raise MediaError(text, "media_too_large")


def _check_duration(seconds: float, limits: MediaLimits) -> None:
    if seconds > limits.max_duration_s:
        text = f"the video lasts {seconds:.0f} s; at most {limits.max_duration_s:g} s are taken"
        raise MediaError(text, "media_too_large")


def _check_count(frames: int, limits: MediaLimits) -> None:
    if frames > limits.max_frames:
        text = f"the file holds {frames:,} frames; at most {limits.max_frames:,} are taken"
        raise MediaError(text, "media_too_large")
