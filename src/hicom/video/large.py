"""Pictures with so many pixels that a second and third copy of them hurts: made smaller band by band."""

from __future__ import annotations

import numpy as np
from PIL import Image
from PIL.ExifTags import Base

from ..square import Square

LARGE = 2**25  # pixels; a picture of fewer is scaled in one step
_MARGIN = 3  # as many times as large as needed it stays, so that the last step decides how it looks
_ROWS = 2**8  # of a band, at least


def shrink(image: Image.Image, size: int | Square | None) -> Image.Image:
    """Return a picture that is not `LARGE`, if this one is to be scaled down far; else the picture itself.

    Pixels are averaged over whole blocks. What is to be done with transparency and orientation is still to be done.
    """
    if image.width * image.height <= LARGE or size is None:
        return image
    side = _MARGIN * (size.size if isinstance(size, Square) else size)
    factor = max(image.size) // side
    if factor < 2:
        return image
    turned = image.getexif().get(Base.Orientation, 1)
    smaller = _reduced(image, factor)
    smaller.getexif()[Base.Orientation] = turned
    return smaller


def _reduced(image: Image.Image, factor: int) -> Image.Image:
    rows = max(1, _ROWS // factor) * factor
    whole: Image.Image | None = None
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        if band.mode.startswith("I;16"):
            band = Image.fromarray((np.asarray(band) >> 8).astype(np.uint8))
        part = band.convert("RGBA" if band.has_transparency_data else "RGB").reduce(factor)
        if whole is None:
            whole = Image.new(part.mode, (part.width, -(-image.height // factor)))
        whole.paste(part, (0, top // factor))
    assert whole is not None
    return whole
