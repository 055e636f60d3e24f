"""Look at what a data set will hold: frames with their boxes, and what is asked about them."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hicom.files import check_target, writing
from hicom.video import write_video
from hicom.world.dataset import World, ask, sprites_of, truth
from hicom.world.questions import Question
from hicom.world.render import Pixels, Renderer
from hicom.world.scenes import WorldConfig, frame_times, split_config

SUFFIXES = (".png", ".mp4")
NUM_FRAMES = 6
"""Frames of a clip on the contact sheet."""
PAPER, INK, FAINT, ACCENT, LINE = (255, 255, 255), (25, 25, 30), (125, 125, 135), (0, 105, 90), (222, 222, 228)
BOX_COLORS = ((255, 214, 10), (0, 229, 255), (255, 105, 180), (124, 252, 0), (255, 140, 0), (200, 160, 255))
MARGIN, GAP = 24, 8
CELL_WIDTH, MAX_CELL_HEIGHT = 236, 420
TITLE, SMALL = 17, 14
"""Sizes of text in pixels."""
LINE_HEIGHT = 20
TEXT_COLUMNS = 2
VIDEO_WIDTH = 512
"""Least longer side of a drawn video: names must be readable in clips of 128 pixels."""


def check_output(path: Path) -> Path:
    """Return `path`.

    Raises:
        ValueError: its suffix is neither png nor mp4, or it cannot be written.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} cannot be written: the suffix {path.suffix!r} is none of {' and '.join(SUFFIXES)}")
    check_target(path)
    return path


def save_preview(path: Path, world: World, split: str = "test", index: int = 0, num_clips: int = 6) -> None:
    """Draw clips of a world as they would be written.

    Args:
        path: `.png`: a contact sheet of `num_clips` clips; `.mp4`: all frames of the first clip.
        world: what is drawn.
        split: one of `SPLITS`.
        index: number of the first clip.
        num_clips: clips on the sheet.

    Raises:
        ValueError: the path cannot be written, there is no such split, or a number is impossible.
    """
    check_output(path)
    if index < 0:
        raise ValueError(f"index={index} must not be negative: the first clip of a split is 0")
    if not 1 <= num_clips <= 100:
        raise ValueError(f"num_clips={num_clips} must be from 1 to 100 on one sheet")
    config = split_config(world.config, split)
    if path.suffix.lower() == ".mp4":
        write_video(path, boxed_frames(world, split, index, config), config.fps)
        return
    rows = [draw_row(world, split, index + i, config) for i in range(num_clips)]
    sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), PAPER)
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    with writing(path) as part:
        sheet.save(part, "PNG")


def boxed_frames(world: World, split: str, index: int, config: WorldConfig) -> Iterator[Pixels]:
    """Yield all frames of a clip, uint8[H, W, 3], enlarged if they are small."""
    scale = max(1, -(-VIDEO_WIDTH // max(config.width, config.height)))
    facts = truth(world, split, index)
    renderer = Renderer(world.scene(split, index), sprites_of(world.sprites), config.width, config.height)
    for number, time in enumerate(frame_times(config.num_frames)):
        size = config.width * scale, config.height * scale
        yield np.asarray(draw_frame(renderer.frame(time)[0], facts, number, size))


def draw_frame(frame: Pixels, facts: dict[str, Any], number: int, size: tuple[int, int]) -> Image.Image:
    """One frame as a picture of `size` (width, height), with thin boxes and names.

    Args:
        frame: uint8[H, W, 3].
        facts: ground truth of its clip.
        number: which of the clip's frames it is.
        size: of the picture.
    """
    picture = Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    tags = []
    for i, item in enumerate(facts["objects"]):
        age = number - item["first_frame"]
        box = item["boxes"][age] if 0 <= age < len(item["boxes"]) else None
        if box is None:
            continue
        color = BOX_COLORS[i % len(BOX_COLORS)]
        x0, y0, x1, y1 = (round(v * size[k % 2]) for k, v in enumerate(box))
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=color)
        tags.append((x0, y0, y1, str(item["name"]), color))
    for x0, y0, y1, name, color in tags:  # above all boxes
        width, height = round(font(12).getlength(name)) + 6, 15
        top = y0 - height if y0 >= height else min(y1, size[1] - height)
        left = max(0, min(x0, size[0] - width))
        draw.rectangle((left, top, left + width - 1, top + height - 1), fill=color)
        draw.text((left + 3, top + height / 2), name, fill=INK, font=font(12), anchor="lm")
    return picture


def draw_row(world: World, split: str, index: int, config: WorldConfig) -> Image.Image:
    """A clip on the contact sheet: a title, frames with their times, questions and answers."""
    facts = truth(world, split, index)
    questions = ask(world, split, index, "tune")
    scene = world.scene(split, index)
    scale = min(CELL_WIDTH / config.width, MAX_CELL_HEIGHT / config.height)
    cell = round(config.width * scale), round(config.height * scale)
    lines = -(-len(questions) // TEXT_COLUMNS)
    width = 2 * MARGIN + NUM_FRAMES * CELL_WIDTH + (NUM_FRAMES - 1) * GAP
    frames_top = MARGIN // 2 + TITLE + 12
    text_top = frames_top + cell[1] + 26
    picture = Image.new("RGB", (width, text_top + lines * LINE_HEIGHT + MARGIN), PAPER)
    draw = ImageDraw.Draw(picture)

    draw.line((MARGIN, 0, width - MARGIN, 0), fill=LINE)
    title = f"{split} {index:06d}"
    draw.text((MARGIN, MARGIN // 2), title, fill=INK, font=font(TITLE))
    about = [
        f"{scene.kind} clip",
        f"{scene.background.kind} background" + (" that pans" if any(scene.background.pan) else ""),
        f"{config.width}x{config.height}",
        f"{config.duration_s:g} s at {config.fps:g} fps",
        f"{len(scene.objects)} object{'s' if len(scene.objects) != 1 else ''}",
    ]
    left = MARGIN + round(font(TITLE).getlength(title)) + 16
    draw.text((left, MARGIN // 2 + 2), ", ".join(about), fill=FAINT, font=font(SMALL))

    renderer = Renderer(scene, sprites_of(world.sprites), config.width, config.height)
    times = frame_times(config.num_frames)
    for column, number in enumerate(shown_frames(config)):
        x = MARGIN + column * (CELL_WIDTH + GAP) + (CELL_WIDTH - cell[0]) // 2
        picture.paste(draw_frame(renderer.frame(times[number])[0], facts, number, cell), (x, frames_top))
        when = f"{number / config.fps:.2f} s"
        draw.text((x, frames_top + cell[1] + 4), when, fill=FAINT, font=font(SMALL))

    column_width = (width - 2 * MARGIN) // TEXT_COLUMNS
    for i, question in enumerate(questions):
        x, y = MARGIN + i // lines * column_width, text_top + i % lines * LINE_HEIGHT
        _write_question(draw, x, y, question, column_width - 20)
    return picture


def shown_frames(config: WorldConfig) -> list[int]:
    """Numbers of the frames on the sheet, `NUM_FRAMES` of them or all that there are."""
    last = config.num_frames - 1
    if config.num_episodes > 1:  # nothing is there between episodes, and so in the first and last frame
        places = [(i + 0.5) / NUM_FRAMES for i in range(NUM_FRAMES)]
    else:
        places = [i / (NUM_FRAMES - 1) for i in range(NUM_FRAMES)]
    return sorted({round(place * last) for place in places})


def _write_question(draw: ImageDraw.ImageDraw, x: int, y: int, question: Question, width: int) -> None:
    """One line: family, question (cut to fit) and answer."""
    family_width = 84
    answer = fit(question.answer, width // 2)
    room = width - family_width - round(font(SMALL).getlength(answer)) - 10
    text = fit(" ".join(question.text.split()), room)
    draw.text((x, y), question.family, fill=FAINT, font=font(SMALL))
    draw.text((x + family_width, y), text, fill=INK, font=font(SMALL))
    answer_x = x + family_width + round(font(SMALL).getlength(text)) + 10
    draw.text((answer_x, y), answer, fill=ACCENT, font=font(SMALL))


@lru_cache(maxsize=4)
def font(size: int) -> Any:
    """The font that comes with Pillow."""
    return ImageFont.load_default(size)


def fit(text: str, width: int) -> str:
    """`text`, ending in dots where it is wider than `width` pixels."""
    if font(SMALL).getlength(text) <= width:
        return text
    while text and font(SMALL).getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
