"""Scenes of the sprite world: what is there, where and when, exactly; no pixels.

Lengths are in units of the frame's shorter side, times are fractions of the clip, so a scene can be rendered at any
size and frame rate. Only correctly rounded IEEE operations and `Generator(PCG64)` are used: a seed gives the same
scene on every machine.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from numpy.random import PCG64, Generator, SeedSequence

SPRITES = Path(__file__).parent.parent / "assets" / "sprites"

_NAMES = """
    dog cat elephant penguin frog fish crab octopus butterfly snail duck owl pig whale turtle bee cow horse lion zebra
    giraffe camel fox rabbit bear gorilla hedgehog kangaroo crocodile dragon dolphin shark lobster jellyfish ant spider
    scorpion snake flamingo rooster apple banana strawberry pineapple carrot mushroom pizza burger watermelon grape
    cherry lemon coconut avocado pear envelope doughnut cookie egg cactus rose tulip sun cloud snowman fire volcano
    rainbow car bus bicycle airplane rocket sailboat tractor helicopter motorcycle umbrella guitar violin trumpet drum
    house key bell robot ghost crown balloon candle book axe hammer ladder magnet microphone bucket broom chair backpack
    anchor trophy
"""
EMOJI = tuple(_NAMES.split())
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
MARK_COLORS = ("red", "yellow", "green", "blue", "white")
"""Colours of the small dot that an object may carry: a detail that pooling loses."""

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
WAYS = (*DIRECTIONS, "still", "back and forth", "up and down")
"""How an object moves over all; every way is equally frequent."""
MOTIONS = ("still", "linear", "curved", "bouncing")
HELD_OUT_MOTIONS = ("accelerating", "zigzag")
BACKGROUNDS = ("plain", "gradient", "blobs", "weave")
HELD_OUT_BACKGROUNDS = ("stripes", "checker")

SPLITS = ("train", "val", "test", "test_pairs", "test_scenes", "test_long")
KINDS = ("plain", "plain", "sequence", "pair", "group", "needle")
"""Kinds of clips, as often as they are listed: nothing special; objects appear one after the other; two stay side by
side; several of one noun; one is there for a moment only."""
MAX_OBJECTS = 4
SHAPE_SHARE = 0.3
MARK_SIZE = 0.34
"""Diameter of the dot relative to the object's longer side."""
EPISODE_S = 4.0
"""Long clips are cut into episodes of about this length, each with objects of its own."""
MIN_FRAMES = 9
"""With fewer, what is there for a moment only could fall between two frames."""
PASSES = 3
"""How often a bouncing object crosses its path."""

_CHECKS = tuple(i / 8 for i in range(9))  # moments at which objects must be apart


@dataclass(frozen=True)
class WorldConfig:
    """What decides the scenes beside the seed.

    Attributes:
        width, height: of a frame in pixels.
        fps: frames per second.
        duration_s: length of a clip in seconds.
        nouns: names of the sprites, shapes excluded; `render.load_sprites` reads those of a folder.
        backgrounds: kinds to draw from, of `BACKGROUNDS` and `HELD_OUT_BACKGROUNDS`.
        motions: kinds of paths of objects that go left, right, up or down.
        held_out_pairs: whether every clip shows two nouns that no training clip shows together.

    Raises:
        ValueError: a size, rate or length that gives no frame, or an unknown kind.
    """

    width: int = 128
    height: int = 128
    fps: float = 8.0
    duration_s: float = 2.0
    nouns: tuple[str, ...] = EMOJI
    backgrounds: tuple[str, ...] = BACKGROUNDS
    motions: tuple[str, ...] = ("linear", "curved")
    held_out_pairs: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (("width", 32, 4096), ("height", 32, 4096)):
            value = getattr(self, name)
            if not low <= value <= high or value % 2:
                raise ValueError(f"{name}={value} must be an even number of pixels from {low} to {high}")
        if not (math.isfinite(self.fps) and 0 < self.fps <= 120):
            raise ValueError(f"fps={self.fps} must be above 0 and at most 120 frames per second")
        if not (math.isfinite(self.duration_s) and 0 < self.duration_s <= 1800):
            raise ValueError(f"duration_s={self.duration_s} must be above 0 and at most 1800 seconds (30 minutes)")
        needed = max(MIN_FRAMES, 2 * self.num_episodes)
        if self.num_frames < needed:
            raise ValueError(
                f"{self.duration_s} s at {self.fps} frames per second are {self.num_frames} frames; {needed} needed"
            )
        for name, choices in (
            ("backgrounds", BACKGROUNDS + HELD_OUT_BACKGROUNDS),
            ("motions", MOTIONS + HELD_OUT_MOTIONS),
        ):
            unknown = sorted(set(getattr(self, name)) - set(choices))
            if unknown or not getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)} must be some of {', '.join(choices)}")
        if len(self.nouns) < 2 * MAX_OBJECTS or len(set(self.nouns)) < len(self.nouns):
            raise ValueError(
                f"{len(self.nouns)} nouns are too few or repeat; at least {2 * MAX_OBJECTS} different ones"
            )
        if set(self.nouns) & set(SHAPES):
            raise ValueError(f"the nouns {', '.join(sorted(set(self.nouns) & set(SHAPES)))} are names of shapes")

    @property
    def num_frames(self) -> int:
        """Frames of a clip, T."""
        return round(self.duration_s * self.fps)

    @property
    def num_episodes(self) -> int:
        """Parts of a clip with objects of their own."""
        return max(1, round(self.duration_s / EPISODE_S))

    @property
    def extent(self) -> tuple[float, float]:
        """Width and height of the frame in units of its shorter side."""
        short = min(self.width, self.height)
        return self.width / short, self.height / short


def split_config(config: WorldConfig, split: str) -> WorldConfig:
    """The configuration of a split: what its name says is changed, all else is as in training.

    Raises:
        ValueError: there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    if split == "test_pairs":
        return dataclasses.replace(config, held_out_pairs=True)
    if split == "test_scenes":
        return dataclasses.replace(config, backgrounds=HELD_OUT_BACKGROUNDS, motions=HELD_OUT_MOTIONS)
    if split == "test_long":
        return dataclasses.replace(config, duration_s=min(1800.0, 8 * config.duration_s))
    return config


@dataclass(frozen=True)
class SceneObject:
    """One named thing.

    Attributes:
        noun: what it is called.
        color: one of `COLORS` for a shape, `None` for a sprite.
        mark: colour of its dot, one of `MARK_COLORS`, or `None`.
        way: one of `WAYS`.
        motion: kind of its path, one of `MOTIONS` or `HELD_OUT_MOTIONS`.
        size: longer side when it appears; `growth` times that when it disappears.
        growth: 1 for most.
        path: centre (x, y) at the start, a point that bends the path, and centre at the end.
        enter, leave: first and last moment it is there, as fractions of the clip.
    """

    noun: str
    color: str | None
    mark: str | None
    way: str
    motion: str
    size: float
    growth: float
    path: tuple[tuple[float, float], tuple[float, float], tuple[float, float]]
    enter: float
    leave: float

    @property
    def name(self) -> str:
        """What it is called in full: `dog`, `red circle`."""
        return f"{self.color} {self.noun}" if self.color else self.noun

    @property
    def is_brief(self) -> bool:
        """Whether it is there for a moment only."""
        return self.leave - self.enter < 0.25

    def visible(self, time: float) -> bool:
        """Whether it is there at `time` (0 = first frame, 1 = last frame)."""
        return self.enter <= time <= self.leave

    def done(self, time: float) -> float:
        """Share of its stay that has passed at `time`."""
        return (time - self.enter) / (self.leave - self.enter)

    def side_length(self, time: float) -> float:
        """Longer side at `time`."""
        return self.size * (1 + (self.growth - 1) * self.done(time))

    def center(self, time: float) -> tuple[float, float]:
        """Centre (x, y) at `time`."""
        u = self.done(time)
        (ax, ay), (bx, by), (cx, cy) = self.path
        if self.motion == "curved":
            p, q, r = (1 - u) * (1 - u), 2 * u * (1 - u), u * u
            return p * ax + q * bx + r * cx, p * ay + q * by + r * cy
        if self.motion == "bouncing":
            crossing = min(int(u * PASSES), PASSES - 1)
            u = u * PASSES - crossing
            u = u if crossing % 2 == 0 else 1 - u
        elif self.motion == "accelerating":
            u = u * u
        x, y = ax + (cx - ax) * u, ay + (cy - ay) * u
        if self.motion == "zigzag":  # the middle point says how far it strays to both sides
            wave = 4 * u - int(4 * u)
            swing = (wave if int(4 * u) % 2 == 0 else 1 - wave) - 0.5
            x, y = x + (bx - (ax + cx) / 2) * swing, y + (by - (ay + cy) / 2) * swing
        return x, y


@dataclass(frozen=True)
class Background:
    """What is behind the objects: a kind, a seed, and how far it pans over the clip (in shorter sides)."""

    kind: str
    seed: int
    pan: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Scene:
    """A whole clip.

    Attributes:
        seed: where it comes from.
        kind: one of `KINDS`, or `long` for clips of several episodes.
        extent: width and height of the frame in shorter sides.
        objects: later ones are drawn on top.
        background: see `Background`.
    """

    seed: tuple[int, ...]
    kind: str
    extent: tuple[float, float]
    objects: tuple[SceneObject, ...]
    background: Background

    def counts(self) -> Counter[str]:
        """How many objects of every noun there are; questions name an object by its noun where there is one only."""
        return Counter(item.noun for item in self.objects)

    def named(self) -> list[SceneObject]:
        """Objects whose noun says which one is meant."""
        counts = self.counts()
        return [item for item in self.objects if counts[item.noun] == 1]

    def place(self, item: SceneObject, time: float) -> tuple[float, float]:
        """Centre of an object at `time` relative to the frame's middle: -0.5 to 0.5 in both directions."""
        x, y = item.center(time)
        return x / self.extent[0] - 0.5, y / self.extent[1] - 0.5


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


def is_held_out(first: str, second: str, nouns: Sequence[str]) -> bool:
    """Whether two nouns are one of the pairs (a tenth of all) that training clips never show together."""
    a, b = sorted(([*nouns, *SHAPES].index(first), [*nouns, *SHAPES].index(second)))
    return (7919 * a + 104729 * b) % 10 == 0


@lru_cache(maxsize=4)
def _paired_nouns(nouns: tuple[str, ...]) -> frozenset[str]:
    """Nouns that belong to at least one held-out pair."""
    names = (*nouns, *SHAPES)
    return frozenset(a for a in names if any(a != b and is_held_out(a, b, nouns) for b in names))


def _uniform(rng: Generator, low: float, high: float) -> float:
    return low + (high - low) * float(rng.random())


def _choice(rng: Generator, items: Sequence[str]) -> str:
    return items[int(rng.integers(len(items)))]


def _draw_nouns(
    rng: Generator, count: int, config: WorldConfig, taken: Sequence[str] = (), given: Sequence[str] = ()
) -> list[str]:
    """`given` and `count` more different nouns, none of `taken`; no held-out pair, except where the clip shows one."""
    nouns = list(given)
    while len(nouns) < count + len(given):
        noun = _choice(rng, SHAPES if rng.random() < SHAPE_SHARE else config.nouns)
        if noun in nouns or noun in taken:
            continue
        if config.held_out_pairs and not nouns and noun not in _paired_nouns(config.nouns):
            continue  # among few sprites some nouns have no held-out partner
        held_out = [is_held_out(noun, other, config.nouns) for other in nouns]
        if config.held_out_pairs:
            if len(nouns) == 1 and not any(held_out) and nouns[0] in _paired_nouns(config.nouns):
                continue
        elif any(held_out):
            continue
        nouns.append(noun)
    return nouns


@dataclass(frozen=True)
class _Traits:
    """What is drawn before an object is placed, and never drawn again, so that placing cannot unbalance answers."""

    noun: str
    color: str | None
    mark: str | None
    way: str
    motion: str
    growth: float
    enter: float = 0.0
    leave: float = 1.0
    sizes: tuple[float, float] = (0.2, 0.36)
    slide: str | None = None


def _draw_traits(rng: Generator, noun: str, config: WorldConfig) -> _Traits:
    color = _choice(rng, tuple(COLORS)) if noun in SHAPES else None
    mark = _choice(rng, MARK_COLORS) if rng.random() < 0.4 else None
    way = _choice(rng, WAYS)
    motion = _choice(rng, config.motions) if way in DIRECTIONS else "still" if way == "still" else "bouncing"
    growth = 1.0
    if way in DIRECTIONS or way == "still":
        chance = rng.random()
        growth = 1.7 if chance < 0.12 else 0.6 if chance < 0.24 else 1.0
    slide = None
    if way in DIRECTIONS and rng.random() < 0.2:  # it comes in over the edge, or goes out over it
        slide = "in" if rng.random() < 0.5 else "out"
    return _Traits(noun, color, mark, way, motion, growth, slide=slide)


def _place(
    rng: Generator, traits: _Traits, extent: tuple[float, float], length: tuple[float, float]
) -> SceneObject | None:
    """Try one size and path."""
    low, high = traits.sizes
    # What grows starts small and what shrinks starts large.
    size = _uniform(rng, low, high) if traits.growth == 1 else low if traits.growth > 1 else high
    half = 0.5 * size * max(1.0, traits.growth)
    axis = DIRECTIONS.get(traits.way, (0, 0))
    distance = _uniform(rng, *length) if traits.way != "still" else 0.0
    if traits.motion == "bouncing":
        axis = (1, 0) if traits.way == "back and forth" else (0, 1)
        if rng.random() < 0.5:
            axis = (-axis[0], -axis[1])
    start = []
    for step, wide in zip(axis, extent, strict=True):
        first, last = half + max(0.0, -step * distance), wide - half - max(0.0, step * distance)
        if first > last:
            return None
        start.append(_uniform(rng, first, last))
    end = [s + step * distance for s, step in zip(start, axis, strict=True)]
    if traits.slide:
        # Over the edge that it moves away from, or towards: outside by all of its own size.
        for i, step in enumerate(axis):
            if step:
                low_edge, high_edge = -half, extent[i] + half
                if traits.slide == "in":
                    start[i] = low_edge if step > 0 else high_edge
                else:
                    end[i] = high_edge if step > 0 else low_edge
    bend = [(a + b) / 2 for a, b in zip(start, end, strict=True)]
    if traits.motion in ("curved", "zigzag"):
        side = 1 if axis[0] == 0 else -1
        i = 0 if axis[0] == 0 else 1
        room = min(bend[i] - half, extent[i] - half - bend[i])
        amount = min(0.3, room) * (1 if rng.random() < 0.5 else -1) * side
        # A quadratic curve reaches half way to its control point.
        bend[i] += 2 * amount if traits.motion == "curved" else amount
    path = ((start[0], start[1]), (bend[0], bend[1]), (end[0], end[1]))
    return SceneObject(
        traits.noun,
        traits.color,
        traits.mark,
        traits.way,
        traits.motion,
        size,
        traits.growth,
        path,
        traits.enter,
        traits.leave,
    )


def _distance_ok(a: SceneObject, b: SceneObject, gap: float, *, may_cross: bool = False) -> bool:
    """Whether centres keep `gap` times the sum of their sizes apart, at all moments or (crossing) at most of them."""
    close = shared = 0
    for time in _CHECKS:
        if a.visible(time) and b.visible(time):
            (ax, ay), (bx, by) = a.center(time), b.center(time)
            least = gap * (a.side_length(time) + b.side_length(time))
            shared += 1
            if (ax - bx) * (ax - bx) + (ay - by) * (ay - by) < least * least:
                close += 1
                if time in (0.0, 0.5, 1.0) or not may_cross:  # the moments that questions ask about
                    return False
    return close == 0 or close * 3 <= shared


def _place_all(
    rng: Generator, traits: Sequence[_Traits], extent: tuple[float, float], gap: float, *, may_cross: bool
) -> list[SceneObject]:
    """Place all objects, as often as it takes."""
    length = (0.3, 0.6)
    for attempt in range(10**6):
        objects: list[SceneObject] = []
        for item in traits:
            for _ in range(12):
                candidate = _place(rng, item, extent, length)
                if candidate and all(_distance_ok(candidate, o, gap, may_cross=may_cross) for o in objects):
                    objects.append(candidate)
                    break
            else:
                break  # no room beside the others: place all of them again
        if len(objects) == len(traits):
            return objects
        if attempt % 20 == 19:  # a crowd needs shorter paths and smaller objects
            length = (length[0] * 0.9, length[1] * 0.9)
            low = max(0.14, traits[0].sizes[0] * 0.95)
            traits = [dataclasses.replace(t, sizes=(low, max(low * 1.3, t.sizes[1] * 0.95))) for t in traits]
    raise RuntimeError("no room for the objects of a scene")


def _companion(rng: Generator, item: SceneObject, traits: _Traits, extent: tuple[float, float]) -> SceneObject | None:
    """Something that stays beside `item` all the time: the same path, one size away."""
    size = item.size * _uniform(rng, 0.85, 1.15)
    gap = 0.52 * (item.size + size) * max(1.0, item.growth)
    dx, dy = list(DIRECTIONS.values())[int(rng.integers(4))]
    (a, b, c) = ((x + dx * gap, y + dy * gap) for x, y in item.path)
    half = 0.5 * size * max(1.0, item.growth)
    if any(not (half <= v <= wide - half) for point in (a, c) for v, wide in zip(point, extent, strict=True)):
        return None
    return dataclasses.replace(item, noun=traits.noun, color=traits.color, mark=traits.mark, size=size, path=(a, b, c))


def _background(rng: Generator, config: WorldConfig) -> Background:
    kind = _choice(rng, config.backgrounds)
    seed = int(rng.integers(2**31))
    pan = (0.0, 0.0)
    if rng.random() < 0.25:
        pan = (_uniform(rng, -0.2, 0.2), _uniform(rng, -0.2, 0.2))
    return Background(kind, seed, pan)


def _stay(rng: Generator, traits: _Traits) -> _Traits:
    """Now and then something appears late or disappears early."""
    enter = _uniform(rng, 0.2, 0.4) if rng.random() < 0.15 and traits.slide != "in" else 0.0
    leave = _uniform(rng, 0.6, 0.8) if rng.random() < 0.15 and enter == 0 and traits.slide != "out" else 1.0
    return dataclasses.replace(traits, enter=enter, leave=leave)


def _episode(rng: Generator, kind: str, config: WorldConfig) -> list[SceneObject]:
    """The objects of a clip of one kind, in drawing order."""
    few = int(rng.integers(1, MAX_OBJECTS + 1))
    may_cross = rng.random() < 0.25
    gap, extent = 0.42, config.extent
    count = {
        "plain": few,
        "sequence": 2 + int(rng.integers(3)),
        "pair": 3 + int(rng.integers(2)),
        "group": 2 + int(rng.integers(2)),
        "needle": 2 + int(rng.integers(3)),
    }[kind]
    nouns = _draw_nouns(rng, count, config)
    traits = [_draw_traits(rng, noun, config) for noun in nouns]
    if kind == "plain":
        traits = [_stay(rng, t) for t in traits]
    elif kind == "sequence":
        order = rng.permutation(count)
        step = 0.8 / count
        enters = [float(place) * step + (_uniform(rng, -0.02, 0.02) if place else 0.0) for place in order.tolist()]
        traits = [dataclasses.replace(t, enter=e, slide=None) for t, e in zip(traits, enters, strict=True)]
    elif kind == "needle":
        enter = _uniform(rng, 0.05, 0.75)
        brief = {"way": "still", "motion": "still", "growth": 1.0, "slide": None}
        traits[-1] = dataclasses.replace(traits[-1], enter=enter, leave=enter + _uniform(rng, 0.14, 0.2), **brief)  # type: ignore[arg-type]
    elif kind == "group":
        # `few` objects of the first noun; nothing but their number is ever asked about them.
        copies = [_draw_traits(rng, nouns[0], config) for _ in range(few)]
        traits = [dataclasses.replace(t, sizes=(0.18, 0.28), slide=None) for t in [*copies, *traits[1:]]]
        may_cross = False
    elif kind == "pair":
        return _place_pair(rng, traits, extent)
    return _place_all(rng, traits, extent, gap, may_cross=may_cross)


def _place_pair(rng: Generator, traits: list[_Traits], extent: tuple[float, float]) -> list[SceneObject]:
    """The first two side by side, all others clearly farther away."""
    traits = [dataclasses.replace(t, sizes=(0.17, 0.26), slide=None) for t in traits]
    while True:
        first = _place(rng, traits[0], extent, (0.25, 0.45))
        second = _companion(rng, first, traits[1], extent) if first else None
        if first is None or second is None:
            continue
        objects = [first, second]
        for item in traits[2:]:
            for _ in range(12):
                candidate = _place(rng, item, extent, (0.15, 0.4))
                if candidate and all(_distance_ok(candidate, other, 0.75) for other in objects):
                    objects.append(candidate)
                    break
            else:
                break
        if len(objects) == len(traits):
            return objects


def make_scene(seed: Sequence[int], config: WorldConfig | None = None) -> Scene:
    """The scene that belongs to `seed`.

    Number, nouns, colours, dots and ways of the objects are drawn first and never redrawn, so that placing them (which
    may fail and start again) cannot unbalance the answers.

    Args:
        seed: see `clip_seed`.
        config: see `split_config`; None: the default.
    """
    config = config or WorldConfig()
    rng = generator(*seed)
    background = _background(rng, config)
    # One object alone is no pair.
    kind = _choice(rng, [kind for kind in KINDS if kind != "plain"] if config.held_out_pairs else KINDS)
    key = tuple(int(s) for s in seed)
    if config.num_episodes == 1:
        return Scene(key, kind, config.extent, tuple(_episode(rng, kind, config)), background)
    return Scene(key, "long", config.extent, tuple(_long(rng, config)), background)


def _long(rng: Generator, config: WorldConfig) -> list[SceneObject]:
    """The objects of a long clip: some nouns are seen in one episode only, the others may come again or not at all."""
    total = config.num_episodes
    unique = _draw_nouns(rng, min(MAX_OBJECTS, total), config)
    # However long the clip is, some nouns never come.
    taken = [*unique, *_draw_nouns(rng, MAX_OBJECTS, config, unique)]
    places = dict(zip(rng.permutation(total)[: len(unique)].tolist(), unique, strict=True))
    objects: list[SceneObject] = []
    for episode in range(total):
        nouns = _draw_nouns(rng, int(rng.integers(0, 3)), config, taken, [places[episode]] if episode in places else [])
        traits = [_draw_traits(rng, noun, config) for noun in nouns]
        # Gaps between the episodes keep what follows each other from being seen together.
        first, last = (episode + 0.02) / total, (episode + 0.98) / total
        for item in _place_all(rng, traits, config.extent, 0.42, may_cross=False) if traits else []:
            objects.append(dataclasses.replace(item, enter=first, leave=last))
    return objects


def make_snapshot(rng: Generator, max_objects: int, config: WorldConfig | None = None) -> Scene:
    """A crowd of still objects, at most `max_objects`, for training on single frames (not part of any split).

    Now and then one stands beside another one, as in clips of the kind `pair`.
    """
    config = config or WorldConfig()
    background = _background(rng, config)
    objects: list[SceneObject] = []
    for noun in _draw_nouns(rng, int(rng.integers(2, max_objects + 1)), config):
        traits = _draw_traits(rng, noun, config)
        still = dataclasses.replace(traits, way="still", motion="still", growth=1.0, slide=None, sizes=(0.15, 0.36))
        candidate, others = _place(rng, still, config.extent, (0.0, 0.0)), objects
        if objects and rng.random() < 0.3:
            host = objects[int(rng.integers(len(objects)))]
            candidate = _companion(rng, host, still, config.extent)
            others = [item for item in objects if item is not host]
        if candidate and all(_distance_ok(candidate, other, 0.42) for other in others):
            objects.append(candidate)
    return Scene((), "plain", config.extent, tuple(objects), background)


def box(scene: Scene, item: SceneObject, time: float, extent: tuple[float, float]) -> list[float] | None:
    """[x0, y0, x1, y1] as fractions of the frame's width and height, cut at its edges; None where it is not to be seen.

    Args:
        scene: the scene.
        item: one of its objects.
        time: moment as a fraction of the clip.
        extent: visible (width, height) of the sprite as a fraction of its longer side.
    """
    if not item.visible(time):
        return None
    (x, y), length = item.center(time), item.side_length(time)
    half = [0.5 * length * part for part in extent]
    corners = [x - half[0], y - half[1], x + half[0], y + half[1]]
    x0, y0, x1, y1 = (min(1.0, max(0.0, v / scene.extent[i % 2])) for i, v in enumerate(corners))
    return [round(v, 5) for v in (x0, y0, x1, y1)] if x1 > x0 and y1 > y0 else None


def ground_truth(scene: Scene, extents: dict[str, tuple[float, float]], num_frames: int) -> dict[str, Any]:
    """Everything that is true of a scene, as JSON values.

    Args:
        scene: the scene.
        extents: visible (width, height) of each noun's sprite as a fraction of its size (`Sprites.extents`).
        num_frames: number of frames, T.

    Returns:
        `seed`, `kind`, `background`; `objects`, each with its fields, its `name`, `first_frame` and `boxes` (see `box`)
        of that frame and those that follow, as long as it is there; and `events` in time order: {`frame`, `event`:
        `appears` or `disappears`, `object`: its number}. Objects that are there from the first to the last frame have
        no event.
    """
    times = frame_times(num_frames)
    objects, events = [], []
    for number, item in enumerate(scene.objects):
        frames = [i for i, time in enumerate(times) if item.visible(time)]
        boxes = [box(scene, item, times[i], extents[item.noun]) for i in frames]
        seen = [i for i, b in zip(frames, boxes, strict=True) if b]
        if seen and seen[0] > 0:
            events.append({"frame": seen[0], "event": "appears", "object": number})
        if seen and seen[-1] < num_frames - 1:
            events.append({"frame": seen[-1] + 1, "event": "disappears", "object": number})
        first = frames[0] if frames else 0
        objects.append({**dataclasses.asdict(item), "name": item.name, "first_frame": first, "boxes": boxes})
    return {
        "seed": list(scene.seed),
        "kind": scene.kind,
        "background": dataclasses.asdict(scene.background),
        "objects": objects,
        "events": sorted(events, key=lambda event: (event["frame"], event["object"])),
    }
