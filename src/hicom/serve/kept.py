"""Videos that were asked about lately, kept encoded."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from ..data.cache import content_digest
from ..encoding import EncodedVideo
from ..inference import VideoChat


class KeptVideos:
    """Encodes videos, and keeps the last ones by their content and their choice of frames.

    Args:
        chat: the model.
        number: of videos that are kept.
    """

    def __init__(self, chat: VideoChat, number: int) -> None:
        self.chat, self.number = chat, number
        self._kept: OrderedDict[str, EncodedVideo] = OrderedDict()

    def encode(self, source: Any, **choice: Any) -> EncodedVideo:
        """Return what `VideoChat.encode` does, arguments as there; a source without a digest is not kept."""
        digest = content_digest(source)
        if digest is None:
            return self.chat.encode(source, **choice)
        key = f"{digest} {sorted(choice.items())}"
        video = self._kept.pop(key, None)
        if video is None:
            video = self.chat.encode(source, **choice)
        self._kept[key] = video
        while len(self._kept) > self.number:
            self._kept.popitem(last=False)
        return video
