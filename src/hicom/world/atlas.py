"""Build the bundled sprite atlas from Noto Color Emoji (OFL-1.1): `python -m hicom.world.atlas`.

Only this script needs the font and the `emoji` package; everything else reads the finished atlas.
"""

import json
from pathlib import Path

import emoji
import tyro
from PIL import Image, ImageDraw, ImageFont

from hicom.world.render import TILE, fit_tile
from hicom.world.scenes import NOUNS, SHAPES, SPRITES

COLUMNS = 12
EMOJI_NAMES = {
    "apple": "red_apple",
    "car": "automobile",
    "bee": "honeybee",
    "burger": "hamburger",
    "book": "closed_book",
    "grape": "grapes",
    "cherry": "cherries",
}
POLYGONS = {
    "square": ((0, 0), (1, 0), (1, 1), (0, 1)),
    "triangle": ((0.5, 0), (1, 1), (0, 1)),
    "diamond": ((0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)),
    "cross": tuple(
        (x / 3, y / 3)
        for x, y in ((1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1))
    ),
}


def draw_emoji(noun: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One emoji glyph."""
    glyph = emoji.emojize(f":{EMOJI_NAMES.get(noun, noun)}:", language="en")
    if not emoji.is_emoji(glyph):
        raise ValueError(f"no emoji is called {noun!r}; add its name to EMOJI_NAMES")
    image = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(image).text((4, 4), glyph, font=font, embedded_color=True)
    return image


def draw_shape(noun: str) -> Image.Image:
    """One white shape on a transparent ground (coloured when it is rendered)."""
    side = TILE * 8
    mask = Image.new("L", (side, side))
    if noun == "circle":
        ImageDraw.Draw(mask).ellipse((0, 0, side - 1, side - 1), fill=255)
    else:
        ImageDraw.Draw(mask).polygon([(x * (side - 1), y * (side - 1)) for x, y in POLYGONS[noun]], fill=255)
    image = Image.new("RGBA", (side, side), "white")
    image.putalpha(mask)
    return image


def build(font_path: Path, out: Path) -> None:
    """Write `atlas.png` (tiles of 64 px) and `atlas.json` (names and the visible extent of each tile) to `out`."""
    font = ImageFont.truetype(str(font_path), 109)
    rows = -(-len(NOUNS) // COLUMNS)
    atlas = Image.new("RGBA", (COLUMNS * TILE, rows * TILE))
    extents = {}
    for index, noun in enumerate(NOUNS):
        picture = fit_tile(draw_shape(noun) if noun in SHAPES else draw_emoji(noun, font))
        width, height = picture.size
        corner = (index % COLUMNS * TILE + (TILE - width) // 2, index // COLUMNS * TILE + (TILE - height) // 2)
        atlas.paste(picture, corner)
        extents[noun] = [width, height]
    out.mkdir(parents=True, exist_ok=True)
    atlas.save(out / "atlas.png", optimize=True)
    layout = {"tile": TILE, "columns": COLUMNS, "source": "Noto Color Emoji (OFL-1.1)", "extents": extents}
    (out / "atlas.json").write_text(json.dumps(layout, indent=1) + "\n")


def main(font: Path = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"), out: Path = SPRITES) -> None:
    """Rebuild the sprite atlas.

    Args:
        font: Noto Color Emoji (Debian: fonts-noto-color-emoji).
        out: folder that receives atlas.png and atlas.json.
    """
    build(font, out)


if __name__ == "__main__":
    tyro.cli(main)
