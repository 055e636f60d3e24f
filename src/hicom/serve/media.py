"""Videos and pictures that clients of a server name or send, taken without trusting the client.

What is fetched: only `http` and `https`, only from public addresses (`hicom.fetch`). Sizes, times, pixels and
frames are checked before anything is decoded as a whole. Local files and private addresses need an explicit permission.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import av
import av.error
from PIL import Image, UnidentifiedImageError

from .. import fetch as fetching
from ..pyav import open_input
from ..video import VideoError, probe


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
    max_redirects: int = 3
    timeout_s: float = 30.0
    allowed_hosts: tuple[str, ...] = ()
    allowed_folders: tuple[Path, ...] = ()
    allow_private: bool = False

    @property
    def fetching(self) -> fetching.FetchLimits:
        """Those of a fetch."""
        return fetching.FetchLimits(
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


def load_media(url: str, limits: MediaLimits) -> Any:
    """Return what `VideoChat.encode` takes for a URL: bytes, a path, or a list of pictures.

    Args:
        url: `http(s)://...`, `data:video/mp4;base64,...` (or an image), `data:video/jpeg;base64,FRAME,FRAME,...`, or
            `file:///...` where folders are allowed.
        limits: of the server.

    Raises:
        MediaError: it is refused, cannot be had, or is neither video nor picture.
    """
    source: bytes | Path | list[Image.Image]
    scheme = url[:16].partition(":")[0].lower()
    if scheme == "data":
        source = _from_data(url, limits)
    elif scheme in ("http", "https"):
        source = fetch(url, limits)
    elif scheme == "file":
        source = _from_file(url, limits)
    else:
        raise MediaError("media must be http, https or data URLs", "unsupported_url")
    check_media(source, limits)
    return source


def check_media(source: bytes | Path | Sequence[Image.Image], limits: MediaLimits) -> None:
    """Raise MediaError where a file is not within the limits, as far as can be told without decoding it as a whole."""
    if isinstance(source, Sequence) and not isinstance(source, bytes):
        for picture in source:
            _check_size(picture.width, picture.height, limits)
        return
    data = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with Image.open(data) as picture:
            _check_size(picture.width, picture.height, limits)
            _check_count(getattr(picture, "n_frames", 1), limits)
        return
    except UnidentifiedImageError:
        pass
    except MediaError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise MediaError("the picture cannot be read") from None
    if isinstance(data, io.BytesIO):
        data.seek(0)
    try:
        # Sizes that headers tell come first: opening a decoder for a hostile size is what is to be avoided.
        with open_input(data) as container:
            for stream in container.streams.video:
                if stream.codec_context is None:  # nothing here decodes it, SVG for instance
                    raise MediaError("the file is no video or picture that can be read")
                _check_size(stream.codec_context.width, stream.codec_context.height, limits)
            if container.duration is not None:
                _check_duration(container.duration / av.time_base, limits)
        info = probe(source)
    except (VideoError, av.error.FFmpegError, OSError):
        raise MediaError("the file is no video or picture that can be read") from None
    _check_size(info.width, info.height, limits)
    _check_duration(info.duration_s, limits)
    _check_count(info.num_frames, limits)


def fetch(url: str, limits: MediaLimits) -> bytes:
    """Return the content behind an `http` or `https` URL.

    Raises:
        MediaError: the address is not allowed, it does not answer in time, or there is too much of it.
    """
    try:
        return fetching.fetch(url, limits.fetching)
    except fetching.FetchError as error:
        raise MediaError(str(error), error.code) from None


def _from_data(url: str, limits: MediaLimits) -> bytes | list[Image.Image]:
    head, comma, body = url.partition(",")
    kind = head[5:].lower()
    if not comma or not kind.endswith(";base64"):
        raise MediaError("data URLs must be base64: data:video/mp4;base64,...", "unsupported_url")
    if len(body) > limits.max_bytes * 4 / 3 + 4:
        raise _too_large(limits)
    if kind.startswith("video/jpeg"):
        pictures = [_picture(_decoded(part), limits) for part in body.split(",")]
        _check_count(len(pictures), limits)
        return pictures
    return _decoded(body)


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise MediaError("a data URL is not base64") from None


def _picture(data: bytes, limits: MediaLimits) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(data))
        _check_size(picture.width, picture.height, limits)
        return picture.convert("RGB")
    except MediaError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise MediaError("a frame is no picture that can be read") from None


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
