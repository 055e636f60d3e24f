"""Draw scenes: named sprites over procedural backgrounds, at any size, frame rate and length."""

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from hicom.world.scenes import (
    COLORS,
    MARK_SIZE,
    MAX_OBJECTS,
    SHAPES,
    SPRITES,
    Scene,
    SceneObject,
    WorldConfig,
    frame_times,
    generator,
)

TILE = 64
"""Longer side of a sprite's picture, in pixels."""
MARK_PLACE = 0.22
"""Where the dot's centre is: this share of the sprite's width and height to the right of and below its middle."""
SUFFIXES = (".png", ".webp", ".gif", ".jpg", ".jpeg", ".bmp")

Pixels = NDArray[np.uint8]
Image32 = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Sprites:
    """Pictures of the world's nouns.

    Attributes:
        pictures: noun -> RGBA picture, cropped to what can be seen of it; its longer side is `TILE`.
    """

    pictures: Mapping[str, Image.Image]

    @property
    def nouns(self) -> tuple[str, ...]:
        """Names of the sprites, shapes excluded."""
        return tuple(noun for noun in self.pictures if noun not in SHAPES)

    @property
    def extents(self) -> dict[str, tuple[float, float]]:
        """Visible (width, height) of each noun's sprite as a fraction of its longer side."""
        return {noun: (p.width / TILE, p.height / TILE) for noun, p in self.pictures.items()}


@lru_cache(maxsize=1)
def bundled_sprites() -> Sprites:
    """Return the sprites that come with the package: Noto Color Emoji and five shapes."""
    layout = json.loads((SPRITES / "atlas.json").read_text())
    columns = layout["columns"]
    with Image.open(SPRITES / "atlas.png") as file:
        atlas = file.convert("RGBA")
    pictures = {}
    for index, (noun, (width, height)) in enumerate(layout["extents"].items()):
        x, y = index % columns * TILE + (TILE - width) // 2, index // columns * TILE + (TILE - height) // 2
        pictures[noun] = atlas.crop((x, y, x + width, y + height))
    return Sprites(pictures)


def fit_tile(picture: Image.Image) -> Image.Image:
    """Crop a picture to what can be seen of it and scale its longer side to `TILE`.

    Raises:
        ValueError: nothing of it can be seen.
    """
    picture = picture.convert("RGBA")
    bounds = Image.fromarray((np.asarray(picture)[..., 3] > 127).astype(np.uint8) * 255).getbbox()
    if bounds is None:
        raise ValueError("it is transparent all over")
    picture = picture.crop(bounds)
    scale = TILE / max(picture.size)
    width, height = (max(2, round(side * scale / 2) * 2) for side in picture.size)
    return picture.convert("RGBa").resize((width, height), Image.Resampling.LANCZOS).convert("RGBA")


def load_sprites(folder: Path) -> Sprites:
    """Read a folder of named images as sprites: `fire_truck.png` becomes the noun `fire truck`; shapes are added.

    Args:
        folder: holds one picture a noun, best with a transparent ground.

    Raises:
        ValueError: the folder does not exist, an image cannot be read, or fewer than eight are usable.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder} with sprite images")
    pictures: dict[str, Image.Image] = {}
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES):
        noun = " ".join(path.stem.lower().replace("_", " ").replace("-", " ").split())
        if noun in pictures or noun in SHAPES:
            raise ValueError(f"{path} gives the noun {noun!r} a second time; rename it")
        try:
            with Image.open(path) as image:
                pictures[noun] = fit_tile(image)
        except (UnidentifiedImageError, OSError, ValueError) as error:
            raise ValueError(f"{path} is no usable sprite image ({error}); repair or remove it") from error
    if len(pictures) < 2 * MAX_OBJECTS:
        endings = ", ".join(SUFFIXES)
        raise ValueError(f"{folder} holds {len(pictures)} usable images ({endings}); at least {2 * MAX_OBJECTS} needed")
    shapes = {noun: picture for noun, picture in bundled_sprites().pictures.items() if noun in SHAPES}
    return Sprites(pictures | shapes)


@lru_cache(maxsize=256)
def _resized(sprites: Sprites, noun: str, color: str | None, width: int, height: int) -> tuple[Image32, Image32]:
    """Premultiplied colour float[h, w, 3] and alpha float[h, w, 1], both in [0, 1]."""
    # "RGBa" is premultiplied: resizing straight alpha would bleed the colour of invisible pixels into the rim.
    small = sprites.pictures[noun].convert("RGBa").resize((width, height), Image.Resampling.LANCZOS)
    rgba = np.asarray(small, np.float32) / np.float32(255)
    alpha = rgba[..., 3:]
    paint = alpha * np.array(COLORS[color], np.float32) / np.float32(255) if color else rgba[..., :3]
    return paint, alpha


@lru_cache(maxsize=1024)
def _silhouette(sprites: Sprites, noun: str) -> NDArray[np.bool_]:
    return np.asarray(sprites.pictures[noun])[..., 3] > 127


def _upscale(grid: Image32, width: int, height: int, method: Image.Resampling) -> Image32:
    image = Image.fromarray((np.clip(grid, 0, 1) * 255).astype(np.uint8))
    return np.asarray(image.resize((width, height), method), np.float32) / np.float32(255)


def background(kind: str, rng: Generator, width: int, height: int) -> Image32:
    """One background; some have grain.

    Args:
        kind: `plain`, `gradient`, `blobs` (soft noise), `weave` (texture), `stripes` or `checker`.
        rng: decides everything but the size.
        width: in pixels.
        height: in pixels.

    Returns:
        float[height, width, 3] in [0, 1].
    """
    base, other = rng.random((2, 3), np.float32)
    slope = rng.random(2, np.float32)
    cells, fine = int(rng.integers(3, 7)), int(rng.integers(12, 33))
    blobs, weave = rng.random((cells, cells, 3), np.float32), rng.random((fine, fine, 1), np.float32)
    grain = rng.random((64, 64, 1), np.float32)
    strength = float(rng.choice(np.array([0, 0, 0.08, 0.16])))
    down, across = np.linspace(0, 1, height, dtype=np.float32)[:, None], np.linspace(0, 1, width, dtype=np.float32)
    if kind == "plain":
        image = np.broadcast_to(base, (height, width, 3)).copy()
    elif kind == "gradient":
        mix = (down * slope[0] + across * slope[1])[..., None] / (slope.sum() + 1e-6)
        image = base * (1 - mix) + other * mix
    elif kind == "blobs":
        image = _upscale(blobs, width, height, Image.Resampling.BICUBIC)
    elif kind == "weave":
        image = 0.7 * base + 0.3 * _upscale(np.repeat(weave, 3, axis=2), width, height, Image.Resampling.BICUBIC)
    elif kind == "stripes":
        band = np.floor((down * slope[0] + across * slope[1]) * (2 * cells)).astype(int) % 2 == 1
        image = np.where(band[..., None], 0.65 * base + 0.35 * other, base)
    elif kind == "checker":
        odd = (np.floor(down * 2 * cells) + np.floor(across * 2 * cells)).astype(int) % 2 == 1
        image = np.where(odd[..., None], 0.65 * base + 0.35 * other, base)
    else:
        raise ValueError(f"unknown background {kind!r}")
    if strength:
        noise = _upscale(np.repeat(grain, 3, axis=2), width, height, Image.Resampling.BILINEAR)
        image = image + strength * (noise - 0.5)
    return np.clip(image, 0, 1).astype(np.float32)


class Renderer:
    """Draws the frames of one scene.

    Args:
        scene: what is drawn.
        sprites: pictures of its nouns; None: the bundled ones.
        width, height: of a frame in pixels.
    """

    def __init__(self, scene: Scene, sprites: Sprites | None = None, width: int = 128, height: int = 128) -> None:
        self.scene = scene
        self.sprites = sprites or bundled_sprites()
        self.width, self.height = width, height
        self.short = min(width, height)
        ground = scene.background
        # A ground that pans is larger than the frame, which moves over it.
        pans = [round(shift * self.short) for shift in ground.pan]
        size = width + abs(pans[0]), height + abs(pans[1])
        self.origin = [max(0, -pan) for pan in pans]
        self.ground = background(ground.kind, generator(ground.seed), *size)
        self.extents = self.sprites.extents

    def frame(self, time: float) -> tuple[Pixels, NDArray[np.uint16]]:
        """One frame at `time` in [0, 1].

        Returns:
            uint8[H, W, 3] pixels, and uint16[H, W] labels: 0 background, i + 1 where object i is seen.
        """
        left, top = (
            origin + round(pan * self.short * time)
            for origin, pan in zip(self.origin, self.scene.background.pan, strict=True)
        )
        canvas = self.ground[top : top + self.height, left : left + self.width].copy()
        labels = np.zeros((self.height, self.width), np.uint16)
        for index, item in enumerate(self.scene.objects):
            if item.visible(time):
                self._paste(canvas, labels, index + 1, item, time)
        return (canvas * 255 + 0.5).astype(np.uint8), labels

    def labels(self, time: float) -> NDArray[np.uint16]:
        """Return the labels of `frame` alone; they are the same on every machine."""
        labels = np.zeros((self.height, self.width), np.uint16)
        for index, item in enumerate(self.scene.objects):
            if item.visible(time):
                self._paste(None, labels, index + 1, item, time)
        return labels

    def _paste(
        self, canvas: Image32 | None, labels: NDArray[np.uint16], label: int, item: SceneObject, time: float
    ) -> None:
        length = item.side_length(time) * self.short
        width, height = (max(2, round(length * part)) for part in self.extents[item.noun])
        x, y = (value * self.short for value in item.center(time))
        left, top = round(x - width / 2), round(y - height / 2)
        # The part of the sprite that lies inside the frame.
        x0, y0 = max(0, -left), max(0, -top)
        x1, y1 = min(width, self.width - left), min(height, self.height - top)
        if x1 <= x0 or y1 <= y0:
            return
        area = (slice(top + y0, top + y1), slice(left + x0, left + x1))
        shape = _silhouette(self.sprites, item.noun)
        rows = (np.arange(y0, y1) * 2 + 1) * shape.shape[0] // (2 * height)
        columns = (np.arange(x0, x1) * 2 + 1) * shape.shape[1] // (2 * width)
        solid = shape[rows[:, None], columns]
        if canvas is not None:
            color, alpha = _resized(self.sprites, item.noun, item.color, width, height)
            canvas[area] = canvas[area] * (1 - alpha[y0:y1, x0:x1]) + color[y0:y1, x0:x1]
        if item.mark:
            cx, cy, radius = width * (0.5 + MARK_PLACE), height * (0.5 + MARK_PLACE), length * MARK_SIZE / 2
            dx, dy = np.arange(x0, x1) + 0.5 - cx, np.arange(y0, y1)[:, None] + 0.5 - cy
            square = dx * dx + dy * dy
            if canvas is not None:
                rim = np.clip(radius + 0.5 - np.sqrt(square), 0, 1)[..., None].astype(np.float32)
                dot = np.clip(0.78 * radius + 0.5 - np.sqrt(square), 0, 1)[..., None].astype(np.float32)
                edge = np.float32(0.1)
                paint = np.array(COLORS[item.mark], np.float32) / np.float32(255)
                canvas[area] = (canvas[area] * (1 - rim) + edge * rim) * (1 - dot) + paint * dot
            solid = solid | (square <= radius * radius)
        labels[area][solid] = label


def mark_center(item: SceneObject, time: float, extent: tuple[float, float]) -> tuple[float, float]:
    """Centre (x, y) of the dot of an object, in shorter sides.

    Args:
        item: an object with a dot.
        time: moment as a fraction of the clip.
        extent: visible (width, height) of its sprite as a fraction of its longer side.
    """
    (x, y), length = item.center(time), item.side_length(time)
    return x + MARK_PLACE * length * extent[0], y + MARK_PLACE * length * extent[1]


def render(
    scene: Scene, config: WorldConfig | None = None, sprites: Sprites | None = None
) -> tuple[Pixels, NDArray[np.uint16]]:
    """All frames of a scene at once; `iter_frames` serves long clips.

    Args:
        scene: the scene.
        config: size and number of frames; None: the default.
        sprites: pictures of the nouns; None: the bundled ones.

    Returns:
        uint8[T, H, W, 3] pixels, and uint16[T, H, W] labels (see `Renderer.frame`).
    """
    config = config or WorldConfig()
    renderer = Renderer(scene, sprites, config.width, config.height)
    frames, labels = zip(*map(renderer.frame, frame_times(config.num_frames)), strict=True)
    return np.stack(frames), np.stack(labels)


def iter_frames(scene: Scene, config: WorldConfig, sprites: Sprites | None = None) -> Iterator[Pixels]:
    """Yield uint8[H, W, 3], one frame after the other."""
    renderer = Renderer(scene, sprites, config.width, config.height)
    for time in frame_times(config.num_frames):
        yield renderer.frame(time)[0]


def run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """Lengths of the runs of equal pixels, column after column, zeros first: COCO's uncompressed encoding of a mask."""
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat)) + 1
    bounds = [0, *edges.tolist(), flat.size]
    lengths = [b - a for a, b in itertools.pairwise(bounds)]
    return [0, *lengths] if flat[0] else lengths
