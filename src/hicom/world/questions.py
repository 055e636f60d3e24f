"""Questions, captions and descriptions about scenes, with answers balanced so that the words alone say nothing."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from numpy.random import Generator

from hicom.world.scenes import COLORS, DIRECTIONS, EMOJI, NOUNS, SHAPES, Scene, SceneObject

T = TypeVar("T")

FAMILIES = ("presence", "colour", "position", "direction", "count", "which")
NUMBERS = ("one", "two", "three", "four")
SIDES = ("left", "right", "top", "bottom")
MOTION_ANSWERS = {name: "it stays still" if name == "still" else name for name in DIRECTIONS}

# {x}: a noun, {a}: the noun with its article, {d}: a direction.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "presence": (
        "Is there {a} in the video?",
        "Can you see {a}?",
        "Does {a} appear in the video?",
        "Is {a} visible at any time?",
        "Do you see {a} in this clip?",
        "Does the video show {a}?",
        "Is {a} shown?",
    ),
    "colour": (
        "What color is the {x}?",
        "What colour is the {x}?",
        "Which color does the {x} have?",
        "What is the color of the {x}?",
        "Tell me the colour of the {x}.",
        "The {x} has which color?",
    ),
    "position_start": (
        "Where is the {x} at the start?",
        "Where is the {x} at the beginning?",
        "On which side is the {x} at the start?",
        "Where does the {x} start?",
        "On which side does the {x} begin?",
        "In which part of the frame does the {x} start?",
    ),
    "position_end": (
        "Where is the {x} at the end?",
        "Where is the {x} in the last frame?",
        "On which side is the {x} at the end?",
        "Where does the {x} end up?",
        "On which side does the {x} finish?",
        "In which part of the frame does the {x} end?",
    ),
    "direction": (
        "Which way does the {x} move?",
        "In which direction does the {x} move?",
        "Where is the {x} going?",
        "In what direction does the {x} go?",
        "How does the {x} move?",
        "What is the direction of the {x}?",
        "Which way is the {x} moving?",
    ),
    "count": (
        "How many objects appear in the video?",
        "How many objects are there?",
        "How many things can you see?",
        "Count the objects.",
        "What is the number of objects in the video?",
        "How many different objects are shown?",
    ),
    "which": (
        "Which object moves {d}?",
        "What is moving {d}?",
        "What moves {d}?",
        "Name the object that moves {d}.",
        "Which thing is going {d}?",
        "What is the object that goes {d}?",
    ),
    "caption": (
        "Describe the video.",
        "What happens in the video?",
        "Give a short caption of the clip.",
        "What can you see?",
        "Summarize the video in one sentence.",
        "What is going on in this video?",
    ),
    "describe": (
        "Describe the {x}.",
        "What happens to the {x}?",
        "What does the {x} do?",
        "Tell me about the {x}.",
        "Follow the {x} through the video.",
        "What can you say about the {x}?",
    ),
    "colours": (
        "What colors are there?",
        "Which colours do the shapes have?",
        "Name the colors of the shapes.",
        "What are the colours of the shapes?",
        "List the colors of the shapes.",
        "Which colors can you see on the shapes?",
    ),
    "list": (
        "What objects are there?",
        "List the objects.",
        "Name everything that appears.",
        "Which objects are in the video?",
        "What things can you see?",
        "Which things appear in the clip?",
    ),
    "moving": (
        "What is moving?",
        "Which objects move?",
        "What moves in the video?",
        "Name everything that moves.",
        "Which things are in motion?",
        "What is not standing still?",
    ),
}
# Templates whose instruction names one thing: these texts must point at it in the frame.
NAMING = ("presence", "colour", "position_start", "position_end", "direction", "describe")
PHRASES = ("{x}", "{a}", "the {x}", "{a} in the video", "there is {a}", "a picture of {a}", "look at the {x}")


@dataclass(frozen=True)
class Question:
    """One instruction with its answer.

    Attributes:
        family: one of `FAMILIES`, or `caption`, `describe`, `colours`, `list`, `moving` (not scored).
        text: what is asked.
        answer: the only right answer.
        options: every answer that the family allows; empty where the answer is free text.
        chance: best expected accuracy without seeing the video (None: not scored).
    """

    family: str
    text: str
    answer: str
    options: tuple[str, ...] = ()
    chance: float | None = None


def article(name: str) -> str:
    """The name with its indefinite article: `an owl`, `a red circle`."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def fill(template: str, name: str = "", direction: str = "") -> str:
    """Put a name and a direction into a template."""
    return template.format(x=name, a=article(name) if name else "", d=direction)


def side(item: SceneObject, time: float) -> str | None:
    """Side of the frame it is on at `time`, None when that would be open to argument."""
    dx, dy = (value - 0.5 for value in item.center(time))
    if max(abs(dx), abs(dy)) < 0.12 or abs(abs(dx) - abs(dy)) < 0.08:
        return None
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "top" if dy < 0 else "bottom"


def join(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _ask(rng: Generator, key: str, name: str = "", direction: str = "") -> str:
    return fill(TEMPLATES[key][rng.integers(len(TEMPLATES[key]))], name, direction)


def _pick(rng: Generator, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]


def _left_to_right(scene: Scene) -> list[SceneObject]:
    return sorted(scene.objects, key=lambda item: item.start[0] + item.end[0])


def _presence(scene: Scene, rng: Generator) -> Question:
    noun = _pick(rng, scene.objects).noun
    answer = "yes"
    if rng.random() < 0.5:
        # An absent noun takes the place of a present one of the same kind, so a shape is no hint for "yes".
        present = {item.noun for item in scene.objects}
        noun = _pick(rng, [other for other in (SHAPES if noun in SHAPES else EMOJI) if other not in present])
        answer = "no"
    return Question("presence", _ask(rng, "presence", noun), answer, ("yes", "no"), 0.5)


def _colour(scene: Scene, rng: Generator) -> Question | None:
    shapes = [item for item in scene.objects if item.color]
    if not shapes:
        return None
    item = _pick(rng, shapes)
    return Question("colour", _ask(rng, "colour", item.noun), str(item.color), tuple(COLORS), 1 / len(COLORS))


def _position(scene: Scene, rng: Generator) -> Question | None:
    cases = []
    for item in scene.objects:
        for key, time in (("position_start", 0.0), ("position_end", 1.0)):
            answer = side(item, time) if item.visible(time) else None
            if answer:
                cases.append((key, item.noun, answer))
    if not cases:
        return None
    key, noun, answer = _pick(rng, cases)
    return Question("position", _ask(rng, key, noun), answer, SIDES, 1 / len(SIDES))


def _direction(scene: Scene, rng: Generator) -> Question:
    item = _pick(rng, scene.objects)
    options = tuple(MOTION_ANSWERS.values())
    text = _ask(rng, "direction", item.noun)
    return Question("direction", text, MOTION_ANSWERS[item.direction], options, 1 / len(options))


def _count(scene: Scene, rng: Generator) -> Question:
    return Question("count", _ask(rng, "count"), NUMBERS[len(scene.objects) - 1], NUMBERS, 1 / len(NUMBERS))


def _which(scene: Scene, rng: Generator) -> Question | None:
    movers = {name: [o for o in scene.objects if o.direction == name] for name in DIRECTIONS if name != "still"}
    single = [(name, items[0]) for name, items in movers.items() if len(items) == 1]
    if not single:
        return None
    direction, item = _pick(rng, single)
    # Shapes are the commonest answers: SHAPE_SHARE / 5 of all objects each.
    return Question("which", _ask(rng, "which", direction=direction), item.noun, NOUNS, 0.06)


_FAMILY: dict[str, Callable[[Scene, Generator], Question | None]] = {
    "presence": _presence,
    "colour": _colour,
    "position": _position,
    "direction": _direction,
    "count": _count,
    "which": _which,
}


def questions(scene: Scene, rng: Generator) -> list[Question]:
    """One question of every family that the scene allows (stage `tune`, evaluation)."""
    drawn = (_FAMILY[family](scene, rng) for family in FAMILIES)
    return [question for question in drawn if question]


def _motion(item: SceneObject) -> str:
    return "stays still" if item.direction == "still" else f"moves {item.direction}"


def captions(scene: Scene, rng: Generator) -> list[Question]:
    """One caption of the whole scene, left to right (stage `align`)."""
    text = join([f"{article(item.name)} {_motion(item)}" for item in _left_to_right(scene)])
    return [Question("caption", _ask(rng, "caption"), text)]


def _story(item: SceneObject) -> str:
    places = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
    place = side(item, item.enter)
    where = places[place] if place else "in the middle"
    parts = [f"{'appears late' if item.enter > 0 else 'starts'} {where}", _motion(item)]
    if item.leave < 1:
        parts.append("disappears early")
    return f"the {item.name} {join(parts)}"


def descriptions(scene: Scene, rng: Generator) -> list[Question]:
    """Instructions that name what the description is about (stage `pretrain`)."""
    objects = _left_to_right(scene)
    found = [Question("describe", _ask(rng, "describe", item.noun), _story(item)) for item in objects]
    colors = list(dict.fromkeys(item.color for item in objects if item.color))
    if colors:
        found.append(Question("colours", _ask(rng, "colours"), join(colors)))
    found.append(Question("list", _ask(rng, "list"), join([article(item.name) for item in objects])))
    movers = [f"the {item.name}" for item in objects if item.direction != "still"]
    found.append(Question("moving", _ask(rng, "moving"), join(movers) if movers else "nothing moves"))
    return found


def corpus() -> Iterator[str]:
    """Every word of the world in its usual surroundings: the text that the tokenizer is trained on."""
    names = [*NOUNS, *(f"{color} {shape}" for color in COLORS for shape in SHAPES)]
    for name in names:
        yield from (f"{fill(template, name)}" for key in NAMING for template in TEMPLATES[key])
        yield from (fill(phrase, name) for phrase in PHRASES)
        yield f"assistant\n{name}"
        for direction in DIRECTIONS:
            yield f"assistant\n{article(name)} moves {direction}, stays {direction} and {article(name)}"
    for key in ("count", "caption", "colours", "list", "moving", "which"):
        yield from (fill(template, direction=d) for template in TEMPLATES[key] for d in DIRECTIONS)
    for answer in (*NUMBERS, *SIDES, *COLORS, *DIRECTIONS, *MOTION_ANSWERS.values(), "yes", "no", "nothing moves"):
        yield f"user\n{answer} {answer}\nassistant\n{answer}"
    yield from (
        "system\nyou are a helpful assistant.",
        "answer with one word.",
        "answer yes or no.",
        "a an the . , ? !",
    )
    for begin in ("appears late", "starts"):
        for place in ("on the left", "on the right", "at the top", "at the bottom", "in the middle"):
            yield f"assistant\nthe dog {begin} {place}, moves left and disappears early and stays still"
