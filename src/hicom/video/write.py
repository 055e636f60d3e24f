"""Write a video."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av

from ..files import writing
from .types import Pixels


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
