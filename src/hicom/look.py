"""Where both branches look (the paper's Figure 6): attention maps, pictures of them, and how well they point.

Every map is in units of even attention: 1.0 is what a patch gets when all patches are looked at alike. In the local
branch a patch competes with the patches of its own window, in the global branch with all patches of the video.

Legend: T frames, H W patch grid, G A B windows along (T, H, W), t h w sizes of a window, S side of a square picture.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .encoding import EncodedVideo
from .files import check_target, writing
from .inference import Answer, VideoChat
from .model.compressor import CompressorOutput
from .model.ops import Window, group_index
from .square import Square
from .video import FrameReader, VideoFrames, open_frames

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]
Box = Sequence[float]
"""[x0, y0, x1, y1] as fractions of the width and the height of a picture."""


@dataclass(frozen=True)
class Maps:
    """The attention of a compressor over one video, in units of even attention.

    Attributes:
        local: `float32[T, H, W]`; None without a local branch. A patch that several windows cover, as at the end of a
            video whose length is no multiple of the window, has the mean of what they give it.
        global_: `float32[T, H, W]`, the mean over heads and tokens; None without a global branch.
        windows: `float32[G, A, B, t, h, w]`, the weights of the local branch as they are, each window's sum 1.
        pointers: `float32[T, H, W]`, the mean over pointers; None without pointers or an instruction.
    """

    local: Floats | None
    global_: Floats | None
    windows: Floats | None = None
    pointers: Floats | None = None

    @property
    def branches(self) -> dict[str, Floats]:
        """The maps there are, by the name of their branch."""
        maps = {"local": self.local, "global": self.global_, "pointers": self.pointers}
        return {branch: values for branch, values in maps.items() if values is not None}


@dataclass(frozen=True)
class Look:
    """What a model saw when it answered a question.

    Attributes:
        question: what was asked.
        answer: what the model said.
        frames: `uint8[T, S, S, 3]`, the frames the model saw, in a size to look at; padded to a square, as for the
            model, so that patch (i, j) of H x W covers rows i S / H to (i + 1) S / H.
        timestamps_s: `float64[T]`, their times in the video.
        conditional: attention as the question steers it; None for a model that no instruction steers.
        unconditional: attention of the same weights without an instruction; None for released weights that cannot do
            without one.
    """

    question: str
    answer: Answer
    frames: Pixels
    timestamps_s: NDArray[np.float64]
    conditional: Maps | None
    unconditional: Maps | None

    @property
    def views(self) -> dict[str, Floats]:
        """All maps `float32[T, H, W]`, by names like `conditional local`, in the order of the pictures' rows."""
        return named_views(self.conditional, self.unconditional)

    @property
    def window(self) -> list[int] | None:
        """The sizes [t, h, w] of the local windows, none larger than the video; None without a local branch."""
        maps = self.conditional or self.unconditional
        return None if maps is None or maps.windows is None else list(maps.windows.shape[3:])

    def facts(self) -> dict[str, Any]:
        """Return as JSON values where each view looks in each frame.

        For every frame: `time_s`, `share` (of the video's attention in that view), `max` (the strongest patch, in units
        of even attention), `patch` (its [row, column]), `box` (its [x0, y0, x1, y1]) and `centre` (the centre of mass
        [x, y]), both as fractions of the side of the padded square.
        """
        return {
            "question": self.question,
            "answer": str(self.answer),
            "notes": list(self.answer.notes),
            "window": self.window,
            "num_visual_tokens": self.answer.num_visual_tokens,
            "timestamps_s": [float(time_s) for time_s in self.timestamps_s],
            "views": {
                name: [
                    {"time_s": float(time_s), **frame_facts(values, float(heat.sum()))}
                    for time_s, values in zip(self.timestamps_s, heat, strict=True)
                ]
                for name, heat in self.views.items()
            },
        }


def look(
    chat: VideoChat,
    video: Any,
    question: str,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    start_s: float | None = None,
    end_s: float | None = None,
    size: int = 256,
    instruction: str | None = None,
    window: Window | None = None,
    max_visual_tokens: int | None = None,
    **kwargs: Any,
) -> Look:
    """Ask a question about a video and return where the compressor looked.

    Args:
        chat: the model.
        video: anything `hicom.read_frames` reads, opened or not. It is decoded twice, once in the model's small size.
        question: the question.
        num_frames: frames as in `VideoChat.encode`, and so are the three arguments below.
        fps: frames a second instead.
        start_s: start of the part that counts, in seconds.
        end_s: its end.
        size: longest side of the frames in the pictures, in pixels; smaller videos are not scaled up.
        instruction: what steers the compressor in place of the question.
        window: (T, H, W) of the local branch in place of the model's.
        max_visual_tokens: budget of visual tokens that picks the window instead.
        **kwargs: further arguments of `VideoChat.ask`.

    Raises:
        ValueError: the video cannot be read, the question is empty, or the model's compressor has no attention.
    """
    video = open_frames(video)  # its packets are read once for both
    encoded = chat.encode(video, num_frames=num_frames, fps=fps, start_s=start_s, end_s=end_s)
    answer = chat.ask(
        encoded, question, instruction=instruction, window=window, max_visual_tokens=max_visual_tokens, **kwargs
    )
    if max_visual_tokens is not None:
        window = answer.window
    return look_at(chat, video, encoded, question, answer, size=size, instruction=instruction, window=window)


def look_at(
    chat: VideoChat,
    video: Any,
    encoded: EncodedVideo,
    question: str,
    answer: Answer,
    *,
    size: int = 256,
    instruction: str | None = None,
    window: Window | None = None,
) -> Look:
    """Return where the compressor looked for an answer that is there already; arguments as in `look`.

    Args:
        chat: the model.
        video: the video, to be decoded once more for the pictures.
        encoded: the same, encoded.
        question: the question.
        answer: what the model said.
        size: longest side of the frames in the pictures, in pixels.
        instruction: what steered the compressor in place of the question.
        window: (T, H, W) of the local branch in place of the model's.

    Raises:
        ValueError: the model's compressor has no attention.
    """
    conditional, unconditional = attend(chat, encoded, question, instruction=instruction, window=window)
    source = video.source if isinstance(video, FrameReader) else video
    if isinstance(source, VideoFrames):
        video = source
    else:
        video = open_frames(video).at([float(time_s) for time_s in encoded.timestamps_s], size)
    if chat.processor.image_aspect_ratio == "square":
        squeezed = Square(size, None)
        frames = np.stack([squeezed.make(frame) for frame in video.frames])
    else:
        frames = pad_to_square(video.frames, chat.processor.image_mean)
    return Look(question, answer, frames, encoded.timestamps_s, conditional, unconditional)


# Maps


@torch.inference_mode()
def attend(
    chat: VideoChat,
    video: EncodedVideo,
    question: str,
    *,
    instruction: str | None = None,
    window: Window | None = None,
) -> tuple[Maps | None, Maps | None]:
    """Return the attention with and without the instruction; None for what the model does not have (see `Look`).

    Args:
        chat: the model.
        video: the video.
        question: the question.
        instruction: what steers the compressor in place of the question.
        window: (T, H, W) of the local branch in place of the model's.

    Raises:
        ValueError: the model's compressor has no attention.
    """
    compressor = chat.model.model.compressor
    maps = make_maps(chat.attention(video, question, instruction=instruction, window=window), video)
    if not maps.branches:
        raise ValueError(
            f"the compressor {chat.model.config.compressor!r} pools without attention, so there is nothing to look at; "
            f"choose a model with the compressor 'hicom'"
        )
    if not chat.model.config.is_conditional:
        return None, maps
    if compressor.global_ is not None and compressor.global_.replaces_tokens:
        return maps, None
    output = chat.model.model.compress(
        video.kept_features, [video.num_frames], window=window, compression="unguided", return_attention=True
    )
    # Without an instruction pointers look for what no training asks of them.
    return maps, dataclasses.replace(make_maps(output, video), pointers=None)


def make_maps(output: CompressorOutput, video: EncodedVideo) -> Maps:
    """Return the maps of a compressor's output for one video."""
    height, width = video.kept_features.values.shape[1:3]
    windows = None if output.local_attention is None else to_numpy(output.local_attention[0])
    local = None if windows is None else spread_windows(windows, (video.num_frames, height, width))
    global_ = None if output.global_attention is None else global_map(to_numpy(output.global_attention[0]))
    pointers = None if output.pointer_attention is None else global_map(to_numpy(output.pointer_attention[0])[None])
    return Maps(local, global_, windows, pointers)


def to_numpy(x: Tensor) -> Floats:
    """Return a tensor of any precision as a `float32` array."""
    return x.float().cpu().numpy()


def window_index(shape: Sequence[int], grid: tuple[int, int, int]) -> tuple[NDArray[np.int64], ...]:
    """Return the index that gathers `[T, H, W]` patches into windows.

    Args:
        shape: (G, A, B, t, h, w), numbers and sizes of the windows.
        grid: (T, H, W), patches of the video.

    Returns:
        Three arrays that together broadcast to `shape`.
    """
    # A window that exceeds an axis holds all of it, and `shape` has the size that it really has.
    t, h, w = (group_index(length, size).numpy() for length, size in zip(grid, shape[3:], strict=True))
    return t[:, None, None, :, None, None], h[None, :, None, None, :, None], w[None, None, :, None, None, :]


def spread_windows(windows: Floats, grid: tuple[int, int, int]) -> Floats:
    """Return `float32[T, H, W]`: each patch's weight inside its window times the window's patches.

    Args:
        windows: `float32[G, A, B, t, h, w]`, the weights of every window.
        grid: (T, H, W), patches of the video. Where windows overlap a patch gets the mean.
    """
    index = window_index(windows.shape, grid)
    total, count = np.zeros(grid), np.zeros(grid)
    np.add.at(total, index, windows * math.prod(windows.shape[3:]))
    np.add.at(count, index, 1)
    return (total / count).astype(np.float32)


def global_map(attention: Floats) -> Floats:
    """Return `float32[T, H, W]` of `float32[heads, N, T, H, W]`: the sum over heads and tokens times T H W / (heads N).

    Rows sum to 1, so that this is the sum divided by its mean. The quotient is exact where rows were rounded to 16 bit,
    and holds as well for a Q-Former, whose rows sum to 1 in every frame.
    """
    total = attention.sum((0, 1), dtype=np.float64)
    return (total / total.mean()).astype(np.float32)


def named_views(conditional: Maps | None, unconditional: Maps | None) -> dict[str, Floats]:
    """Return the maps there are, by names like `conditional local`."""
    views = {"conditional": conditional, "unconditional": unconditional}
    return {
        f"{view} {branch}": values
        for view, maps in views.items()
        if maps is not None
        for branch, values in maps.branches.items()
    }


def frame_facts(heat: Floats, total: float) -> dict[str, Any]:
    """Return where `float32[H, W]`, the map of one frame, is strong (see `Look.facts`); `total`: sum of all frames."""
    height, width = heat.shape
    row, column = (int(place) for place in np.unravel_index(heat.argmax(), heat.shape))
    mass = float(heat.sum())
    # A frame that softmax left with nothing has no centre.
    x = float((heat.sum(0) * (np.arange(width) + 0.5)).sum() / mass / width) if mass else None
    y = float((heat.sum(1) * (np.arange(height) + 0.5)).sum() / mass / height) if mass else None
    return {
        "share": mass / total,
        "max": float(heat.max()),
        "patch": [row, column],
        "box": [column / width, row / height, (column + 1) / width, (row + 1) / height],
        "centre": [x, y],
    }


def pad_to_square(frames: Pixels, mean: Sequence[float]) -> Pixels:
    """Return `uint8[T, S, S, 3]`: frames in the middle of squares of the mean colour, as the processor pads them."""
    num_frames, height, width = frames.shape[:3]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = np.empty((num_frames, side, side, 3), np.uint8)
    square[:] = (np.array(mean) * 255).astype(np.uint8)
    square[:, top : top + height, left : left + width] = frames
    return square


# Pictures

# The colour map inferno in nine places: its lightness rises evenly, so that it is read in order, in grey print too.
INFERNO = ("000004", "1f0c48", "550f6d", "88226a", "ba3655", "e35933", "f98e09", "f9cb35", "fcffa4")
COLORS = np.array([[int(color[i : i + 2], 16) for i in (0, 2, 4)] for color in INFERNO], np.float64)
OPACITY = 0.6
STRONGEST = 8
"""End of the scale of colours, a power of two, in units of even attention; the other end is its reciprocal."""
PAPER, INK, FAINT = (255, 255, 255), (25, 25, 30), (120, 120, 130)
GAP = 10
MARGIN = 20
MAX_COLUMNS = 8
SUFFIXES = (".png", ".gif", ".mp4")


def heat_colors(heat: Floats) -> NDArray[np.float64]:
    """Return `float64[..., 3]`: the colours of attention, from 0 to 255; beyond the scale those of its ends.

    The scale is logarithmic with even attention (1.0) in the middle: to be looked at a quarter as much is as remarkable
    as four times as much, and a global branch may look a hundred times as much at one patch. It is the same for all
    pictures, so that questions and models can be compared.
    """
    with np.errstate(divide="ignore"):
        place = np.log2(heat) / np.log2(STRONGEST) / 2 + 0.5
    return inferno(np.clip(place, 0, 1))


def inferno(place: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return `float64[..., 3]`: the colours at places from 0 to 1."""
    anchors = np.linspace(0, 1, len(COLORS))
    return np.stack([np.interp(place, anchors, COLORS[:, channel]) for channel in range(3)], -1)


def overlay(frame: Pixels, heat: Floats, side: int) -> Image.Image:
    """Return a square picture: the frame in grey under the colours of its map, its strongest patch outlined.

    Grey, because a red sprite under a heat map would read as heat.

    Args:
        frame: `uint8[S, S, 3]`.
        heat: `float32[H, W]`.
        side: side of the picture in pixels.
    """
    grey = np.asarray(fit(frame, side).convert("L"), np.float64)[..., None]
    colors = heat_colors(heat).astype(np.uint8)
    glow = np.asarray(Image.fromarray(colors).resize((side, side), Image.Resampling.NEAREST), np.float64)
    picture = Image.fromarray(((1 - OPACITY) * grey + OPACITY * glow).astype(np.uint8))
    if heat.max() <= 1:
        return picture  # nothing in this frame stands out
    height, width = heat.shape
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    corners = [column * side / width, row * side / height, (column + 1) * side / width, (row + 1) * side / height]
    x0, y0, x1, y1 = (round(float(corner)) for corner in corners)
    ImageDraw.Draw(picture).rectangle((x0, y0, x1 - 1, y1 - 1), outline=PAPER)
    return picture


def fit(frame: Pixels, side: int) -> Image.Image:
    """Return a square frame as a picture of that side."""
    return Image.fromarray(frame).resize((side, side), Image.Resampling.BICUBIC)


@lru_cache(maxsize=8)
def font(size: int) -> Any:
    """Return the font that comes with Pillow. Characters that it lacks are drawn as boxes."""
    return ImageFont.load_default(size)


def clean(text: str) -> str:
    """Return `text` on one line, without what cannot be encoded (file names of another encoding hold such)."""
    return " ".join(text.encode("utf-8", "replace").decode("utf-8").split())


def wrap(text: str, size: int, width: int, max_lines: int = 3) -> list[str]:
    """Return `text` in lines of at most `width` pixels; what exceeds `max_lines` is cut, with dots in its place."""
    lines = [""]
    for word in clean(text).split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if font(size).getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    lines = [line for line in lines if line]
    is_cut = len(lines) > max_lines
    return [
        shorten(line, size, width, always=is_cut and i == max_lines - 1) for i, line in enumerate(lines[:max_lines])
    ]


def shorten(text: str, size: int, width: int, *, always: bool = False) -> str:
    """Return `text`, ending in dots where it is wider than `width` pixels, or `always`."""
    if not always and font(size).getlength(text) <= width:
        return text
    while text and font(size).getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."


class Canvas:
    """A white picture of one size and the few things that are drawn on it."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width, height), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def text(
        self, x: float, y: float, text: str, size: int, color: tuple[int, int, int] = INK, anchor: str = "la"
    ) -> None:
        """Write one line; `anchor` as in Pillow, by default (x, y) is its left upper corner."""
        self.draw.text((x, y), clean(text), fill=color, font=font(size), anchor=anchor)

    def heading(self, look: Look, width: int) -> int:
        """Write question, answer and costs; return the height that they took."""
        y = MARGIN
        for line in wrap(look.question, 20, width):
            self.text(MARGIN, y, line, 20)
            y += 26
        for line in wrap(str(look.answer) or "(no answer)", 17, width):
            self.text(MARGIN, y, line, 17, color=(175, 50, 80))
            y += 23
        for line in wrap(costs(look), 13, width):
            self.text(MARGIN, y + 3, line, 13, color=FAINT)
            y += 18
        return y + 12

    def scale_bar(self, x: int, y: int, height: int) -> None:
        """Draw the colours with their numbers from (x, y) downwards."""
        values = inferno(np.linspace(1, 0, height))
        bar = Image.fromarray(np.repeat(values[:, None], 14, 1).astype(np.uint8))
        self.image.paste(bar, (x, y))
        octaves = int(math.log2(STRONGEST))
        for power in range(-octaves, octaves + 1):
            level = y + round((octaves - power) / (2 * octaves) * (height - 1))
            number = f"1/{2**-power}" if power < 0 else f"{2**power}"
            remark = {-octaves: " or less", 0: " even", octaves: " or more"}.get(power, "")
            self.draw.line((x + 14, level, x + 18, level), fill=INK)
            self.text(x + 23, level, number + remark, 13, anchor="lm")


SCALE_WIDTH = 90
"""Pixels of a colour scale with its numbers."""


def costs(look: Look) -> str:
    """Return how many visual tokens an answer took, in one line."""
    answer = look.answer
    window = "" if look.window is None else f", window {tuple(look.window)}"
    tokens = f"{answer.num_visual_tokens:,} visual tokens of {answer.num_uncompressed_tokens:,} patches"
    legend = "colours: attention, 1 = even; outlined: the frame's strongest patch"
    return f"{len(look.frames)} frames, {tokens}{window}; {legend}"


def draw_grid(look: Look) -> Image.Image:
    """Return a picture with a row for the video and one for every view, and a column for each of up to 8 frames."""
    views, side = look.views, 144
    num_columns = min(MAX_COLUMNS, len(look.frames))
    # The middles of equal parts, so that neither end of a long video is left out.
    columns = [(2 * i + 1) * len(look.frames) // (2 * num_columns) for i in range(num_columns)]
    labels = max(round(font(15).getlength(word)) for name in ("video", *views) for word in name.split()) + 14
    width = max(MARGIN + labels + num_columns * (side + GAP) + GAP + SCALE_WIDTH + MARGIN, 480)
    text_height = Canvas(1, 1).heading(look, width - 2 * MARGIN)
    top = text_height + 24
    canvas = Canvas(width, top + (1 + len(views)) * (side + GAP) - GAP + MARGIN)
    canvas.heading(look, width - 2 * MARGIN)
    left = MARGIN + labels
    for row, name in enumerate(("video", *views)):
        y = top + row * (side + GAP)
        words = name.split()
        for i, word in enumerate(words):
            canvas.text(MARGIN, y + side / 2 + 20 * (i - (len(words) - 1) / 2), word, 15, anchor="lm")
        for i, number in enumerate(columns):
            frame = look.frames[number]
            is_video = name == "video"
            panel = fit(frame, side) if is_video else overlay(frame, views[name][number], side)
            canvas.image.paste(panel, (left + i * (side + GAP), y))
    for i, number in enumerate(columns):
        x = left + i * (side + GAP) + side / 2
        canvas.text(x, top - 6, f"{look.timestamps_s[number]:.2f} s", 14, color=FAINT, anchor="ms")
    bar = left + num_columns * (side + GAP) + GAP
    canvas.scale_bar(bar, top + side + GAP, len(views) * (side + GAP) - GAP)
    return canvas.image


def draw_moments(look: Look) -> list[Image.Image]:
    """Return a picture of every frame: the video beside panels of its views, of even width and height."""
    views, side = look.views, 224
    rows = [
        [name for name in views if name.startswith(f"{view} ")]
        for view in ("conditional", "unconditional")
        if any(name.startswith(f"{view} ") for name in views)
    ]
    num_columns = 1 + max(len(names) for names in rows)
    width = MARGIN + num_columns * (side + GAP) + GAP + SCALE_WIDTH + MARGIN
    text_height = Canvas(1, 1).heading(look, width - 2 * MARGIN)
    step = side + 26 + GAP
    height = text_height + len(rows) * step - GAP + MARGIN
    width, height = width + width % 2, height + height % 2  # as yuv420p needs
    empty = Canvas(width, height)
    empty.heading(look, width - 2 * MARGIN)
    empty.scale_bar(MARGIN + num_columns * (side + GAP) + GAP, text_height + 26, len(rows) * step - GAP - 26)
    pictures = []
    for number, frame in enumerate(look.frames):
        canvas = Canvas(1, 1)
        canvas.image = empty.image.copy()
        canvas.draw = ImageDraw.Draw(canvas.image)
        for row, names in enumerate(rows):
            for column, name in enumerate(names, 1):
                x, y = MARGIN + column * (side + GAP), text_height + row * step
                canvas.text(x, y + 20, name, 15, anchor="ls")
                canvas.image.paste(overlay(frame, views[name][number], side), (x, y + 26))
        # The video stands in the middle of its column, beside both rows.
        y = text_height + (len(rows) - 1) * step // 2
        canvas.text(MARGIN, y + 20, f"video, {look.timestamps_s[number]:.2f} s", 15, anchor="ls")
        canvas.image.paste(fit(frame, side), (MARGIN, y + 26))
        pictures.append(canvas.image)
    return pictures


def pace(timestamps_s: NDArray[np.float64]) -> Fraction:
    """Return the frames a second of an animation: the video's own pace, but never below 2 nor above 12."""
    steps = [abs(after - before) for before, after in pairwise(timestamps_s.tolist())]
    step = sorted(steps)[len(steps) // 2] if steps else 0.0
    return Fraction(min(12.0, max(2.0, 1 / step)) if step else 2.0).limit_denominator(100)


def check_output(path: str | Path) -> Path:
    """Return `path`.

    Raises:
        ValueError: its suffix is none of png, gif and mp4, or it cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} cannot be written: the suffix {path.suffix!r} is none of .png, .gif and .mp4")
    check_target(path)
    return path


def save_look(look: Look, path: str | Path) -> None:
    """Write a picture or an animation, which appears only when it is complete.

    Args:
        look: what to show.
        path: `.png`: a row for every view, a column for each of up to 8 frames. `.gif`, `.mp4`: all frames in time.

    Raises:
        ValueError: the suffix is another, or the folder does not exist.
    """
    path = check_output(path)
    write: Callable[[Look, Path], None] = {".png": write_png, ".gif": write_gif, ".mp4": write_mp4}[path.suffix.lower()]
    with writing(path) as part:
        write(look, part)


def write_png(look: Look, path: Path) -> None:
    """Write `draw_grid` as PNG."""
    draw_grid(look).save(path, "PNG")


def write_gif(look: Look, path: Path) -> None:
    """Write `draw_moments` as an endless GIF."""
    pictures = draw_moments(look)
    # Every third pixel of a few frames knows all colours that matter.
    sample = np.concatenate(
        [np.asarray(picture)[::3, ::3] for picture in pictures[:: -(-len(pictures) // MAX_COLUMNS)]]
    )
    # One palette for all frames, so that what stands still is stored once. Median cut would spend it on the video's
    # commonest colours and leave bands in the scale.
    palette = Image.fromarray(sample).quantize(method=Image.Quantize.MAXCOVERAGE)
    pictures = [picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for picture in pictures]
    duration_ms = round(1000 / pace(look.timestamps_s))
    pictures[0].save(path, "GIF", save_all=True, append_images=pictures[1:], duration=duration_ms, loop=0)


def write_mp4(look: Look, path: Path) -> None:
    """Write `draw_moments` as H.264."""
    pictures = draw_moments(look)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=pace(look.timestamps_s), options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = *pictures[0].size, "yuv420p"
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


# Pointing game


@dataclass(frozen=True)
class Target:
    """A question that names one object, and where that object is.

    Attributes:
        video: the clip.
        question: the question.
        boxes: for every frame of the clip its box, or None where it is not visible.
        fps: frames of the clip a second.
        others: the same of each other object.
    """

    video: Path
    question: str
    boxes: Sequence[Box | None]
    fps: float
    others: Sequence[Sequence[Box | None]] = ()

    def covers(self, video: EncodedVideo) -> tuple[Floats, Floats]:
        """Return `float32[T, H, W]` twice: the shares of patches that the object covers, and that the others do.

        Raises:
            ValueError: a frame is beyond the boxes, so they belong to another clip.
        """
        numbers = [round(float(time_s) * self.fps) for time_s in video.timestamps_s]
        if max(numbers) >= min(len(boxes) for boxes in (self.boxes, *self.others)):
            raise ValueError(
                f"{self.video} has a frame at {max(video.timestamps_s):g} s, but its {len(self.boxes)} boxes at "
                f"{self.fps:g} a second end before; the truth belongs to another clip"
            )
        grid = (video.kept_features.values.shape[1], video.kept_features.values.shape[2])
        size = (video.info.height, video.info.width)
        asked, *others = (
            np.stack([cover(boxes[number], grid, size) for number in numbers]) for boxes in (self.boxes, *self.others)
        )
        # Objects may overlap; what is asked about is not another one.
        return asked, np.clip(sum(others, np.zeros_like(asked)), 0, 1 - asked)


def named_object(question: str, names: Sequence[str]) -> int | None:
    """Return the number of the object that a question names; None if it names none, or several alike.

    An object is named by its full name (`red circle`) or by the last word of it; the longest match counts.

    Args:
        question: the question.
        names: full names of the clip's objects.
    """
    words = f" {' '.join(''.join(c if c.isalnum() else ' ' for c in question.lower()).split())} "
    lengths = []
    for name in names:
        parts = name.lower().split()
        full, noun = f" {' '.join(parts)} " in words, f" {parts[-1]} " in words
        lengths.append(len(parts) if full else int(noun))
    longest = max(lengths, default=0)
    return lengths.index(longest) if longest and lengths.count(longest) == 1 else None


def cover(box: Box | None, grid: tuple[int, int], size: tuple[int, int] = (1, 1)) -> Floats:
    """Return `float32[H, W]`: the share of every patch that a box covers, zero without a box.

    Args:
        box: the box in the frame.
        grid: (H, W), patches of the square that the frame is padded to.
        size: (height, width) of the frame; only their ratio counts.
    """
    if box is None:
        return np.zeros(grid, np.float32)
    parts = []
    for axis, (low, high) in enumerate(((box[1], box[3]), (box[0], box[2]))):
        share = size[axis] / max(size)
        low, high = (0.5 + (place - 0.5) * share for place in (low, high))
        edges = np.arange(grid[axis] + 1) / grid[axis]
        parts.append(np.clip(np.minimum(high, edges[1:]) - np.maximum(low, edges[:-1]), 0, None) * grid[axis])
    return np.outer(*parts).astype(np.float32)


def point(heat: Floats, covers: Floats) -> dict[str, float]:
    """Return how well a map points at an object. Only frames count in which it is visible.

    - `share`: attention on the object, as a share of the attention in these frames. A patch that the object's box
      covers in part counts in part.
    - `gain`: `share` divided by the box's share of the area. 1.0: no preference.
    - `hit`: share of these frames in which the strongest patch touches the box; patches equally strong count in part.
    - `hit_chance`: share of the patches that touch it, averaged over these frames: `hit` of a random map.

    Args:
        heat: `float32[T, H, W]`, the map in any unit.
        covers: `float32[T, H, W]`, see `cover`.

    Raises:
        ValueError: the object is visible in no frame.
    """
    visible = covers.any((1, 2))
    if not visible.any():
        raise ValueError("the object is visible in none of the frames, so nothing can point at it")
    heat, covers = heat[visible].astype(np.float64), covers[visible].astype(np.float64)
    share = float((heat * covers).sum() / heat.sum())
    touched = covers > 0
    strongest = heat == heat.max((1, 2), keepdims=True)
    hits = (strongest & touched).sum((1, 2)) / strongest.sum((1, 2))
    return {
        "share": share,
        "gain": share / float(covers.mean()),
        "hit": float(hits.mean()),
        "hit_chance": float(touched.mean()),
    }


def point_in_windows(windows: Floats, covers: Floats) -> dict[str, float]:
    """Return how well the local branch points, given that every window has to look somewhere inside itself.

    Only windows count that contain a part of the object, with all of their patches (those of frames, too, in which the
    object is not visible):

    - `window_share`: the windows' attention on the object, as a share of their attention.
    - `window_gain`: that divided by the object's share of their area. 1.0: no preference.

    Args:
        windows: `float32[G, A, B, t, h, w]`, the weights of every window.
        covers: `float32[T, H, W]`, see `cover`.

    Raises:
        ValueError: the object is visible in no frame.
    """
    grid = (covers.shape[0], covers.shape[1], covers.shape[2])
    parts = covers[window_index(windows.shape, grid)].reshape(-1, math.prod(windows.shape[3:])).astype(np.float64)
    weights = windows.reshape(parts.shape).astype(np.float64)
    held = parts.any(1)
    if not held.any():
        raise ValueError("the object is visible in none of the frames, so nothing can point at it")
    share = float((weights[held] * parts[held]).sum() / weights[held].sum())
    return {"window_share": share, "window_gain": share / float(parts[held].mean())}


def point_at(maps: Maps, covers: Floats, others: Floats) -> dict[str, dict[str, float]]:
    """Return the numbers of `point` and `point_in_windows` for the branches there are.

    Also `others_gain`, where the clip has other objects: the `gain` on these. An eye for anything but background has it
    as high as `gain`; an eye for what is asked has it lower.
    """
    found = {branch: point(heat, covers) for branch, heat in maps.branches.items()}
    if maps.windows is not None:
        found["local"] |= point_in_windows(maps.windows, covers)
    if others.any():
        for branch, heat in maps.branches.items():
            found[branch]["others_gain"] = point(heat, others)["gain"]
    return found


def bootstrap(
    values: Sequence[float], groups: Sequence[object], *, seed: int = 0, num_draws: int = 2000
) -> tuple[float, float]:
    """Return the 95 % interval of a mean; whole groups are drawn, because questions about one clip are no two clips.

    Args:
        values: one number a question.
        groups: what each belongs to.
        seed: seed of the draws.
        num_draws: draws.
    """
    places = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    sums, counts = np.zeros(len(places)), np.zeros(len(places))
    for value, group in zip(values, groups, strict=True):
        sums[places[group]] += value
        counts[places[group]] += 1
    drawn = np.random.default_rng(seed).integers(len(places), size=(num_draws, len(places)))
    low, high = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), [0.025, 0.975])
    return float(low), float(high)


def pointing(
    chat: VideoChat, targets: Iterable[Target], *, num_frames: int | None = None, window: Window | None = None
) -> dict[str, Any]:
    """Play the pointing game: does the attention lie on the object that the question names?

    Args:
        chat: the model.
        targets: questions; those about one clip in a row share its encoding. Those whose object is visible in no frame
            that the model sees are left out.
        num_frames: frames of a clip; default the processor's.
        window: (T, H, W) of the local branch in place of the model's.

    Returns:
        JSON values: `num_questions`, `num_clips`, `num_unseen` (left out) and `views`: by view and branch, such as
        `conditional local`, the measures of `point_at`, each with `mean`, `interval` (95 %, see `bootstrap`) and `n`.
        A view named `difference ...` is conditional minus unconditional, question by question.

    Raises:
        ValueError: no target is left, a clip cannot be read, or the compressor has no attention.
    """
    videos: list[Path] = []
    rows: dict[str, dict[str, list[tuple[float, Path]]]] = {}
    num_unseen = 0
    encoded: tuple[Path, EncodedVideo] | None = None
    for target in targets:
        if encoded is None or encoded[0] != target.video:
            encoded = target.video, chat.encode(target.video, num_frames=num_frames)
        video = encoded[1]
        covers, others = target.covers(video)
        if not covers.any():
            num_unseen += 1
            continue
        videos.append(target.video)
        conditional, unconditional = attend(chat, video, target.question, window=window)
        found = {
            f"{view} {branch}": numbers
            for view, maps in (("conditional", conditional), ("unconditional", unconditional))
            if maps is not None
            for branch, numbers in point_at(maps, covers, others).items()
        }
        if conditional is not None and unconditional is not None:
            for branch in unconditional.branches:
                with_, without = found[f"conditional {branch}"], found[f"unconditional {branch}"]
                found[f"difference {branch}"] = {
                    name: with_[name] - without[name] for name in with_ if name != "hit_chance"
                }
        for view, numbers in found.items():
            for name, value in numbers.items():
                rows.setdefault(view, {}).setdefault(name, []).append((value, target.video))
    if not videos:
        raise ValueError("there is no question that names an object visible in the chosen frames")
    return {
        "num_questions": len(videos),
        "num_clips": len(set(videos)),
        "num_unseen": num_unseen,
        "views": {
            view: {
                name: {
                    "mean": sum(value for value, _ in values) / len(values),
                    "interval": bootstrap(*zip(*values, strict=True)),
                    "n": len(values),
                }
                for name, values in measures.items()
            }
            for view, measures in rows.items()
        },
    }
