"""Videos and pictures on their way into vLLM: fetched without trust, and sampled as training had them."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from vllm.multimodal.media.connector import global_thread_pool
from vllm.multimodal.media.image import ImageMediaIO
from vllm.multimodal.media.video import VideoMediaIO
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, VideoLoader

from ..square import Square
from ..video import VideoError, read_frames
from ..video.pictures import FORMATS, open_picture
from .media import Account, MediaError, load_media
from .memory import Hold
from .vllm_http import VLLMSettings, shared_memory

MAX_WHOLE_PIXELS = 2**26
"""Of a list of frames that vLLM gets as they are; it holds them all at three bytes each."""


@VIDEO_LOADER_REGISTRY.register("hicom")
class HIComVideoLoader(VideoLoader):
    """Reads videos as `hicom.read_frames` does: `--media-io-kwargs '{"video": {"video_backend": "hicom"}}'`."""

    @classmethod
    def load_bytes(
        cls,
        data: bytes,
        num_frames: int = -1,
        fps: float = -1,
        max_frames: int | None = None,
        size: int | None = None,
        is_square: bool = False,
        color: Sequence[int] | None = None,
        repeat: bool = False,
        **_: Any,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Return `uint8[T, H, W, 3]` and what is known of the frames.

        Args:
            data: the file.
            num_frames: frames, spread evenly.
            fps: frames a second, where it is given; it comes before `num_frames`, which vLLM always gives.
            max_frames: most frames, with `fps`.
            size: longest side of the frames; with that of the vision tower they are scaled in the decoder, as the
                library does, and need less memory.
            is_square: whether whole frames become squares of that size instead (`HIComProcessor.reading_options`).
            color: of their padding; None: they are squeezed.
            repeat: whether videos with fewer than `num_frames` frames are filled up with repeated ones.
        """
        form = _form(size, is_square, color)
        if num_frames > 0 and fps <= 0:
            video = read_frames(data, size=form, num_frames=num_frames, repeat=repeat)
        else:
            video = read_frames(data, size=form, fps=fps if fps > 0 else 1.0, max_frames=max_frames)
        rate = video.info.fps or 1.0
        metadata = {
            "total_num_frames": video.info.num_frames,
            "fps": rate,
            "duration": video.info.duration_s,
            "video_backend": "hicom",
            "frames_indices": [round(float(time_s) * rate) for time_s in video.timestamps_s],
            "timestamps_s": [float(time_s) for time_s in video.timestamps_s],
            "do_sample_frames": False,
        }
        return video.frames, metadata


@MEDIA_CONNECTOR_REGISTRY.register("hicom")
class HIComMediaConnector(MediaConnector):
    """Takes media from clients as `hicom.serve.media` does: no private addresses, limits before decoding.

    vLLM uses it under `VLLM_MEDIA_CONNECTOR=hicom`, which `hicom serve` sets; `VLLMSettings` holds the limits.
    """

    def __init__(self, *args: Any, allowed_local_media_path: str = "", **kwargs: Any) -> None:
        super().__init__(*args, allowed_local_media_path=allowed_local_media_path, **kwargs)
        folders = (Path(allowed_local_media_path),) if allowed_local_media_path else ()
        settings = VLLMSettings.from_environment()
        limits = settings.media.with_allowed(tuple(self.allowed_media_domains), folders)
        self.limits = replace(limits, max_listed=settings.requests.max_frames)

    def load_from_url(self, url: str, media_io: Any, *, fetch_timeout: int | None = None) -> Any:
        """Return what `media_io` makes of the media at a URL.

        Raises:
            MediaError: it is refused, cannot be had, or is neither video nor picture.
        """
        kind = "image" if isinstance(media_io, ImageMediaIO) else "video"
        with Hold(shared_memory(self.limits.max_held_bytes)) as hold:
            source = load_media(url, self.limits, kind=kind, account=Account(self.limits, hold.take))
            try:
                if isinstance(source, bytes):
                    return media_io.load_bytes(source)
                if isinstance(source, Path):
                    return media_io.load_file(source)
                if isinstance(media_io, VideoMediaIO):  # or it takes the first ones and says nothing
                    media_io.num_frames = len(source)
                return media_io.load_base64("video/jpeg", _at_size(source, media_io))
            except (VideoError, OSError):
                raise MediaError("a video cannot be read as it is asked for") from None

    async def load_from_url_async(self, url: str, media_io: Any, *, fetch_timeout: int | None = None) -> Any:
        """Return the same, without keeping the server from other work."""
        work = partial(self.load_from_url, url, media_io, fetch_timeout=fetch_timeout)
        return await asyncio.get_running_loop().run_in_executor(global_thread_pool, work)


def _at_size(frames: list[bytes], media_io: Any) -> str:
    """Return frames as vLLM takes them; as it holds them all, large ones are scaled down, where a size is known.

    Raises:
        MediaError: they are too large, and no size is known.
        VideoError: one cannot be read.
    """
    pixels = 0
    for frame in frames:
        picture = open_picture(io.BytesIO(frame), "a frame", FORMATS)
        pixels += 0 if picture is None else picture.width * picture.height  # what is none was refused before
    if pixels > MAX_WHOLE_PIXELS:
        form = _form(**getattr(media_io, "kwargs", {}))
        if form is None:
            text = f"the frames have {pixels:,} pixels together; at most {MAX_WHOLE_PIXELS:,} are taken"
            raise MediaError(text, "media_too_large")
        frames = [_png(read_frames([frame], size=form).frames[0]) for frame in frames]
    return ",".join(base64.b64encode(frame).decode() for frame in frames)


def _png(frame: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _form(
    size: int | None = None, is_square: bool = False, color: Sequence[int] | None = None, **_: Any
) -> int | Square | None:
    """Return the size at which frames are read, from the options of a server."""
    if size is None or not is_square:
        return size
    red, green, blue = color or (0, 0, 0)
    return Square(size, None if color is None else (red, green, blue))
