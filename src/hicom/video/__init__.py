"""Open a video, choose frames, return them with their times: the only place that decodes.

Videos go through PyAV (`decode`), still images and animated WebP through Pillow (`pictures`), as do frames given as a
folder or a list. `sources` tells them apart, `choose` says which frames are read, `reader` reads them.
"""

from .choose import split_bounds, uniform_indices, with_bounds
from .reader import FrameReader, open_frames, probe, read_frames
from .types import (
    FramesChanged,
    Picture,
    Pixels,
    Snap,
    Source,
    VideoError,
    VideoFrames,
    VideoInfo,
    VideoWarning,
)
from .write import write_video

__all__ = [
    "FrameReader",
    "FramesChanged",
    "Picture",
    "Pixels",
    "Snap",
    "Source",
    "VideoError",
    "VideoFrames",
    "VideoInfo",
    "VideoWarning",
    "open_frames",
    "probe",
    "read_frames",
    "split_bounds",
    "uniform_indices",
    "with_bounds",
    "write_video",
]
