"""Scenes of the sprite world: what is there, where and when, exactly; no pixels.

Lengths are fractions of the (square) frame's side, times are fractions of the clip, so a scene can be rendered at any
size and frame rate. Only correctly rounded IEEE operations and `Generator(PCG64)` are used: a seed gives the same
scene on every machine.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.random import PCG64, Generator, SeedSequence

SPRITES = Path(__file__).parent.parent / "assets" / "sprites"

EMOJI = tuple(
    [
        "dog",
        "cat",
        "elephant",
        "penguin",
        "frog",
        "fish",
        "crab",
        "octopus",
        "butterfly",
        "snail",
        "duck",
        "owl",
        "pig",
        "whale",
        "turtle",
        "bee",
        "apple",
        "banana",
        "strawberry",
        "pineapple",
        "carrot",
        "mushroom",
        "pizza",
        "burger",
        "cactus",
        "rose",
        "sun",
        "snowman",
        "car",
        "bus",
        "bicycle",
        "airplane",
        "rocket",
        "sailboat",
        "umbrella",
        "guitar",
        "house",
        "key",
        "robot",
        "ghost",
    ]
)
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
NOUNS = EMOJI + SHAPES
COLORS = {
    "red": (220, 25, 30),
    "orange": (255, 140, 10),
    "yellow": (250, 230, 40),
    "green": (35, 165, 55),
    "blue": (35, 75, 230),
    "purple": (145, 45, 185),
    "white": (248, 248, 248),
    "black": (15, 15, 15),
}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
SPLITS = ("train", "val", "test")
MAX_OBJECTS = 4
SHAPE_SHARE = 0.3

_CHECKS = tuple(i / 8 for i in range(9))  # moments at which objects must be apart


@dataclass(frozen=True)
class SceneObject:
    """One named thing that stays still or moves along a straight line while it is visible.

    Attributes:
        noun: one of `NOUNS`.
        color: one of `COLORS` for a shape, `None` for an emoji.
        direction: one of `DIRECTIONS`.
        size: longer side of the sprite, as a fraction of the frame's side.
        start, end: centre (x, y) when it enters and when it leaves.
        enter, leave: first and last moment it is visible, as fractions of the clip.
    """

    noun: str
    color: str | None
    direction: str
    size: float
    start: tuple[float, float]
    end: tuple[float, float]
    enter: float
    leave: float

    @property
    def name(self) -> str:
        """What it is called in full: `dog`, `red circle`."""
        return f"{self.color} {self.noun}" if self.color else self.noun

    def visible(self, time: float) -> bool:
        """Whether it can be seen at `time` (0 = first frame, 1 = last frame)."""
        return self.enter <= time <= self.leave

    def center(self, time: float) -> tuple[float, float]:
        """Centre (x, y) at `time`."""
        done = (time - self.enter) / (self.leave - self.enter)
        return tuple(a + (b - a) * done for a, b in zip(self.start, self.end, strict=True))  # type: ignore[return-value]


@dataclass(frozen=True)
class Scene:
    """A whole clip: the objects (later ones are drawn on top) and the seed of the background."""

    seed: tuple[int, ...]
    objects: tuple[SceneObject, ...]
    background_seed: int


def generator(*seed: int) -> Generator:
    """The one kind of random generator used in the world."""
    return Generator(PCG64(SeedSequence(seed)))


def clip_seed(seed: int, split: str, index: int) -> tuple[int, ...]:
    """Seed of clip `index` of a split; different splits can never share one."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    return (seed, SPLITS.index(split), index)


def frame_times(num_frames: int) -> list[float]:
    """Time of every frame as a fraction of the clip: the first frame is 0, the last is 1."""
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    return [i / max(num_frames - 1, 1) for i in range(num_frames)]


def _uniform(rng: Generator, low: float, high: float) -> float:
    return low + (high - low) * float(rng.random())


def _draw_nouns(rng: Generator, count: int) -> list[str]:
    nouns: list[str] = []
    while len(nouns) < count:
        kind = SHAPES if rng.random() < SHAPE_SHARE else EMOJI
        noun = kind[rng.integers(len(kind))]
        if noun not in nouns:  # questions name an object by its noun, so a noun occurs once
            nouns.append(noun)
    return nouns


def _place(rng: Generator, noun: str, color: str | None, direction: str) -> SceneObject | None:
    size = _uniform(rng, 0.2, 0.36)
    step = DIRECTIONS[direction]
    length = _uniform(rng, 0.3, 0.6) if any(step) else 0.0
    start = []
    for axis in step:
        low, high = size / 2 + max(0.0, -axis * length), 1 - size / 2 - max(0.0, axis * length)
        if low > high:
            return None
        start.append(_uniform(rng, low, high))
    enter = _uniform(rng, 0.1, 0.4) if rng.random() < 0.2 else 0.0
    leave = _uniform(rng, 0.6, 0.9) if rng.random() < 0.2 and enter == 0 else 1.0
    end = tuple(s + axis * length for s, axis in zip(start, step, strict=True))
    return SceneObject(noun, color, direction, size, (start[0], start[1]), (end[0], end[1]), enter, leave)


def _apart(a: SceneObject, b: SceneObject) -> bool:
    gap = 0.42 * (a.size + b.size)
    for time in _CHECKS:
        if a.visible(time) and b.visible(time):
            (ax, ay), (bx, by) = a.center(time), b.center(time)
            if (ax - bx) ** 2 + (ay - by) ** 2 < gap * gap:
                return False
    return True


def make_scene(seed: Sequence[int]) -> Scene:
    """The scene that belongs to `seed`: 1 to 4 objects, none hiding another.

    The number of objects, their nouns, colours and directions are drawn first and never redrawn, so that placing them
    (which may fail and start again) cannot unbalance the answers.
    """
    rng = generator(*seed)
    count = int(rng.integers(1, MAX_OBJECTS + 1))
    nouns = _draw_nouns(rng, count)
    colors = [list(COLORS)[rng.integers(len(COLORS))] if noun in SHAPES else None for noun in nouns]
    directions = [list(DIRECTIONS)[rng.integers(len(DIRECTIONS))] for _ in nouns]
    while True:
        objects: list[SceneObject] = []
        for traits in zip(nouns, colors, directions, strict=True):
            for _ in range(12):
                candidate = _place(rng, *traits)
                if candidate and all(_apart(candidate, other) for other in objects):
                    objects.append(candidate)
                    break
            else:
                break  # no room beside the others: place all of them again
        if len(objects) == count:
            return Scene(tuple(int(s) for s in seed), tuple(objects), int(rng.integers(2**31)))


def make_snapshot(rng: Generator, max_objects: int) -> Scene:
    """A crowd of still objects, at most `max_objects`, for training on single frames (not part of any split)."""
    objects: list[SceneObject] = []
    for noun in _draw_nouns(rng, int(rng.integers(2, max_objects + 1))):
        color = list(COLORS)[rng.integers(len(COLORS))] if noun in SHAPES else None
        candidate = _place(rng, noun, color, "still")
        if candidate and all(_apart(candidate, other) for other in objects):
            objects.append(dataclasses.replace(candidate, enter=0.0, leave=1.0))
    return Scene((), tuple(objects), int(rng.integers(2**31)))


def ground_truth(scene: Scene, extents: dict[str, tuple[float, float]], num_frames: int = 16) -> dict[str, Any]:
    """Everything that is true of a scene, as JSON values.

    Args:
        scene: the scene.
        extents: visible (width, height) of each noun's sprite as a fraction of its size (`render.sprite_extents()`).
        num_frames: number of frames, T.

    Returns:
        `seed`, `background_seed` and `objects`, each object with its fields, its `name` and `boxes`: T times
        [x0, y0, x1, y1] as fractions of the side, or None where it is not visible.
    """
    objects = []
    for item in scene.objects:
        half = [0.5 * item.size * extent for extent in extents[item.noun]]
        boxes: list[list[float] | None] = []
        for time in frame_times(num_frames):
            (x, y) = item.center(time)
            box = [x - half[0], y - half[1], x + half[0], y + half[1]]
            boxes.append([round(value, 5) for value in box] if item.visible(time) else None)
        objects.append({**dataclasses.asdict(item), "name": item.name, "boxes": boxes})
    return {"seed": list(scene.seed), "background_seed": scene.background_seed, "objects": objects}
