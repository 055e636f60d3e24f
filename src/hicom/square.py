"""Square frames as released weights were trained on: the same numbers as Pillow's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image


@dataclass(frozen=True)
class Square:
    """How a frame becomes a square: padded in the middle of one, or squeezed, and then scaled, bicubic.

    Args:
        size: height and width, in pixels.
        color: red, green and blue of the padding, 0 to 255; None: the frame is squeezed, without padding.
    """

    size: int
    color: tuple[int, int, int] | None

    def make(self, frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return `uint8[size, size, 3]` of a whole frame, `uint8[H, W, 3]`; one of that size stays as it is."""
        height, width = frame.shape[:2]
        if height == width == self.size:
            return frame
        return np.asarray(self.resize(Image.fromarray(np.ascontiguousarray(frame))))

    def resize(self, image: Image.Image) -> Image.Image:
        """Return the same of a picture in mode RGB."""
        if image.width == image.height == self.size:
            return image
        if self.color is not None and image.height != image.width:
            side = max(image.height, image.width)
            padded = Image.new("RGB", (side, side), self.color)
            padded.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = padded
        return image.resize((self.size, self.size), Image.Resampling.BICUBIC)
