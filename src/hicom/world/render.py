"""Draw scenes: sprites from the bundled atlas over procedural backgrounds, at any size and number of frames."""

import json
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from hicom.world.scenes import COLORS, NOUNS, SPRITES, Scene, SceneObject, frame_times, generator

FPS = 8
NUM_FRAMES = 16
SIZE = 128

Pixels = NDArray[np.uint8]
Image32 = NDArray[np.float32]


@lru_cache(maxsize=1)
def _layout() -> tuple[int, int, dict[str, tuple[int, int]]]:
    layout = json.loads((SPRITES / "atlas.json").read_text())
    if tuple(layout["extents"]) != NOUNS:
        raise ValueError(f"{SPRITES / 'atlas.json'} does not list the world's nouns: run `python -m hicom.world.atlas`")
    return layout["tile"], layout["columns"], {noun: (w, h) for noun, (w, h) in layout["extents"].items()}


@lru_cache(maxsize=1)
def sprite_extents() -> dict[str, tuple[float, float]]:
    """Visible (width, height) of each noun's sprite as a fraction of its longer side."""
    tile, _, extents = _layout()
    return {noun: (width / tile, height / tile) for noun, (width, height) in extents.items()}


@lru_cache(maxsize=1)
def _tiles() -> dict[str, Image.Image]:
    tile, columns, extents = _layout()
    atlas = Image.open(SPRITES / "atlas.png").convert("RGBA")
    tiles = {}
    for index, (noun, (width, height)) in enumerate(extents.items()):
        x, y = index % columns * tile + (tile - width) // 2, index // columns * tile + (tile - height) // 2
        tiles[noun] = atlas.crop((x, y, x + width, y + height))
    return tiles


@lru_cache(maxsize=4096)
def _sprite(noun: str, color: str | None, width: int, height: int) -> tuple[Image32, Image32]:
    """Premultiplied colour float[h, w, 3] and alpha float[h, w, 1], both in [0, 1]."""
    # "RGBa" is premultiplied: resizing straight alpha would bleed the colour of invisible pixels into the rim.
    small = _tiles()[noun].convert("RGBa").resize((width, height), Image.Resampling.LANCZOS)
    rgba = np.asarray(small, np.float32) / np.float32(255)
    alpha = rgba[..., 3:]
    paint = alpha * np.array(COLORS[color], np.float32) / np.float32(255) if color else rgba[..., :3]
    return paint, alpha


def _upscale(grid: Image32, size: int, method: Image.Resampling) -> Image32:
    image = Image.fromarray((np.clip(grid, 0, 1) * 255).astype(np.uint8))
    return np.asarray(image.resize((size, size), method), np.float32) / np.float32(255)


def background(rng: Generator, size: int) -> Image32:
    """One of four kinds of background: plain, gradient, soft blobs, woven texture; some with grain.

    Args:
        rng: decides everything but the size.
        size: side in pixels.

    Returns:
        float[size, size, 3] in [0, 1].
    """
    kind = rng.integers(4)
    base, other = rng.random((2, 3), np.float32)
    ramp = np.linspace(0, 1, size, dtype=np.float32)
    slope = rng.random(2, np.float32)
    cells, fine = int(rng.integers(3, 7)), int(rng.integers(12, 33))
    blobs, weave = rng.random((cells, cells, 3), np.float32), rng.random((fine, fine, 1), np.float32)
    grain = rng.random((64, 64, 1), np.float32) - 0.5
    strength = float(rng.choice(np.array([0, 0, 0.08, 0.16])))
    if kind == 0:
        image = np.broadcast_to(base, (size, size, 3)).copy()
    elif kind == 1:
        mix = (ramp[:, None] * slope[0] + ramp[None] * slope[1])[..., None] / (slope.sum() + 1e-6)
        image = base * (1 - mix) + other * mix
    elif kind == 2:
        image = _upscale(blobs, size, Image.Resampling.BICUBIC)
    else:
        texture = _upscale(np.repeat(weave, 3, axis=2), size, Image.Resampling.BICUBIC)
        image = 0.7 * base + 0.3 * texture
    if strength:
        image = image + strength * (_upscale(np.repeat(grain + 0.5, 3, axis=2), size, Image.Resampling.BILINEAR) - 0.5)
    return np.clip(image, 0, 1)


def _paste(canvas: Image32, labels: Pixels, label: int, item: SceneObject, time: float) -> None:
    size = canvas.shape[0]
    width, height = (max(1, round(item.size * extent * size)) for extent in sprite_extents()[item.noun])
    color, alpha = _sprite(item.noun, item.color, width, height)
    x, y = item.center(time)
    left, top = round(x * size - width / 2), round(y * size - height / 2)
    left, top = min(max(left, 0), size - width), min(max(top, 0), size - height)  # rounding may leave by one pixel
    area = (slice(top, top + height), slice(left, left + width))
    canvas[area] = canvas[area] * (1 - alpha) + color
    labels[area][alpha[..., 0] > 0.5] = label


def render_frame(scene: Scene, time: float, size: int = SIZE, ground: Image32 | None = None) -> tuple[Pixels, Pixels]:
    """One frame at `time` in [0, 1].

    Args:
        scene: the scene.
        time: moment as a fraction of the clip.
        size: side in pixels.
        ground: the background, float[size, size, 3], if it is already drawn.

    Returns:
        uint8[size, size, 3] pixels, and uint8[size, size] labels: 0 background, i + 1 where object i is seen.
    """
    canvas = (background(generator(scene.background_seed), size) if ground is None else ground).copy()
    labels = np.zeros((size, size), np.uint8)
    for index, item in enumerate(scene.objects):
        if item.visible(time):
            _paste(canvas, labels, index + 1, item, time)
    return (canvas * 255 + 0.5).astype(np.uint8), labels


def render(scene: Scene, size: int = SIZE, num_frames: int = NUM_FRAMES) -> tuple[Pixels, Pixels]:
    """All frames of a scene.

    Args:
        scene: the scene.
        size: side in pixels.
        num_frames: number of frames, T.

    Returns:
        uint8[T, size, size, 3] pixels, and uint8[T, size, size] labels (see `render_frame`).
    """
    ground = background(generator(scene.background_seed), size)
    frames, labels = zip(*(render_frame(scene, time, size, ground) for time in frame_times(num_frames)), strict=True)
    return np.stack(frames), np.stack(labels)


def write_video(path: Path, frames: Pixels, fps: int = FPS, crf: int = 20) -> None:
    """Write uint8[T, H, W, 3] frames as H.264 (yuv420p) in an mp4; the file appears only when it is complete."""
    partial = path.with_suffix(".part")
    with av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": str(crf), "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.thread_count = 1  # clips are written in parallel; also keeps the bytes reproducible
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    partial.replace(path)
