"""Converters of published data sets to the records that training reads: `hicom data convert NAME SRC DST`.

`layout` says what a layout is, `llava`, `videochat` and `actions` hold one class a data set, `clean` and `run` do what
is the same for all.
"""

from __future__ import annotations

from .actions import Charades, MomentsInTime, NtuRgbD, Tvqa
from .layout import Layout
from .llava import Hicom248k, Llava, LlavaInstruct, LlavaPretrain, LlavaVideo, M4Instruct, M4Video
from .videochat import ShareGpt4Video, ShareGpt4VideoMix, VideoChat2, VideoChatGpt

LAYOUTS: dict[str, type[Layout]] = {
    layout.name: layout
    for layout in (
        LlavaPretrain,
        Hicom248k,
        LlavaVideo,
        VideoChat2,
        M4Video,
        M4Instruct,
        Charades,
        NtuRgbD,
        Tvqa,
        MomentsInTime,
        VideoChatGpt,
        ShareGpt4Video,
        ShareGpt4VideoMix,
        LlavaInstruct,
        Llava,
    )
}
"""All layouts by name, those of the paper's stages first."""
