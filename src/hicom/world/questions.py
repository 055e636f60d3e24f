"""Questions, captions and descriptions about scenes, with answers balanced so that the words alone say nothing."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from numpy.random import Generator

from hicom.world.scenes import COLORS, DIRECTIONS, MARK_COLORS, NOUNS, SHAPE_SHARE, SHAPES, WAYS, Scene, SceneObject
from hicom.world.templates import COMPARING, HELD_OUT_TEMPLATES, NAMING, PHRASES, PREDICATES, TEMPLATES

T = TypeVar("T")

FAMILIES = (
    "which",
    "direction",
    "presence",
    "position",
    "order",
    "before",
    "count",
    "colour",
    "detail",
    "neighbour",
    "needle",
    "generic",
)
NUMBERS = ("one", "two", "three", "four")
SIDES = ("left", "right", "top", "bottom")
WAY_ANSWERS = {way: "it stays still" if way == "still" else way for way in WAYS}
MOMENTS = ("at the start", "early", "in the middle", "late")
"""When an object appears: with the clip, in its first third, around its middle, after that. Never two alike in a clip
whose objects come one after the other."""
LETTERS = ("A", "B", "C", "D")


@dataclass(frozen=True)
class Question:
    """One instruction with its answer.

    Attributes:
        family: one of `FAMILIES`, or a kind of caption or description (not scored).
        text: what is asked.
        answer: the only right answer.
        options: every answer that the family allows; empty where the answer is free text.
        chance: best expected accuracy without seeing the video (None: not scored).
        informed_chance: the same for one who knows the objects of the clip; None: as `chance`.
        subject: noun of the one object that the question names.
        form: `open`; `choice` where the text lists options and the answer is a letter; `stated` where it does so
            after the right option itself, `drill` where it only lists them (both are texts for the reader only).
    """

    family: str
    text: str
    answer: str
    options: tuple[str, ...] = ()
    chance: float | None = None
    informed_chance: float | None = None
    subject: str | None = None
    form: str = "open"


def article(name: str) -> str:
    """The name with its indefinite article: `an owl`, `a red circle`."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(noun: str) -> str:
    """More than one of it: `dogs`, `foxes`, `cherries`."""
    if noun == "fish":
        return noun
    if noun[-1] in "sx" or noun[-2:] in ("ch", "sh"):
        return f"{noun}es"
    if noun[-1] == "y" and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}s"


def fill(template: str, name: str = "", other: str = "", predicate: str = "") -> str:
    """Put names and a predicate into a template (see `templates`)."""
    return template.format(
        x=name, a=article(name) if name else "", n=plural(name) if name else "", y=other, p=predicate
    )


def side(scene: Scene, item: SceneObject, time: float) -> str | None:
    """Side of the frame it is on at `time`, None when that would be open to argument or it is outside."""
    dx, dy = scene.place(item, time)
    if max(abs(dx), abs(dy)) < 0.12 or abs(abs(dx) - abs(dy)) < 0.08 or max(abs(dx), abs(dy)) > 0.5:
        return None
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "top" if dy < 0 else "bottom"


def moment(item: SceneObject) -> str:
    """When it appears, one of `MOMENTS`."""
    return MOMENTS[(item.enter > 0) + (item.enter > 0.33) + (item.enter > 0.47)]


def join(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def predicates(item: SceneObject) -> list[str]:
    """What is true of an object, in the words of `which` questions (keys of `PREDICATES`)."""
    return [item.way, *(["grows"] if item.growth > 1 else ["shrinks"] if item.growth < 1 else [])]


class Asker:
    """Draws questions about one scene.

    Args:
        scene: the scene.
        rng: draws objects and wordings.
        templates: wordings; None: those of training.
        nouns: names of the world's sprites, shapes excluded.
    """

    def __init__(
        self,
        scene: Scene,
        rng: Generator,
        templates: Mapping[str, Sequence[str]] | None = None,
        nouns: Sequence[str] = NOUNS[: -len(SHAPES)],
    ) -> None:
        self.scene = scene
        self.rng = rng
        self.templates = templates or TEMPLATES
        self.nouns = nouns
        # The best guess at an object is the commonest one: a shape where there are many sprites.
        self.noun_chance = round(max(SHAPE_SHARE / len(SHAPES), (1 - SHAPE_SHARE) / len(nouns)), 4)
        self.named = scene.named()
        # Moments say nothing about what an object does.
        self.lasting = [item for item in self.named if not item.is_brief]
        self.in_order = sorted(scene.objects, key=lambda item: item.path[0][0] + item.path[2][0])

    def pick(self, items: Sequence[T]) -> T:
        """One of `items`."""
        return items[int(self.rng.integers(len(items)))]

    def word(self, key: str, name: str = "", other: str = "", predicate: str = "") -> str:
        """A wording of `key`."""
        return fill(self.pick(self.templates[key]), name, other, predicate)

    def presence(self) -> Question | None:
        """Is there an X?"""
        present = self.scene.counts()
        noun, answer = self.pick(self.scene.objects).noun, "yes"
        # An absent noun takes the place of a present one of the same kind, so a shape is no hint for "yes".
        absent = [n for n in (SHAPES if noun in SHAPES else self.nouns) if n not in present]
        if not absent:
            return None
        if self.rng.random() < 0.5:
            noun, answer = self.pick(absent), "no"
        subject = noun if answer == "yes" else None
        return Question("presence", self.word("presence", noun), answer, ("yes", "no"), 0.5, subject=subject)

    def colour(self) -> Question | None:
        """What colour is the X?"""
        shapes = [item for item in self.named if item.color]
        if not shapes:
            return None
        item = self.pick(shapes)
        text = self.word("colour", item.noun)
        return Question("colour", text, str(item.color), tuple(COLORS), 1 / len(COLORS), subject=item.noun)

    def detail(self) -> Question | None:
        """What colour is the dot on the X?"""
        marked = [item for item in self.named if item.mark]
        if not marked:
            return None
        item = self.pick(marked)
        text = self.word("detail", item.noun)
        return Question("detail", text, str(item.mark), MARK_COLORS, 1 / len(MARK_COLORS), subject=item.noun)

    def position(self) -> Question | None:
        """Where is the X at the start, in the middle, at the end?"""
        cases = []
        for item in self.lasting:
            for key, time in (("position_start", 0.0), ("position_middle", 0.5), ("position_end", 1.0)):
                answer = side(self.scene, item, time) if item.visible(time) else None
                if answer:
                    cases.append((key, item.noun, answer))
        if not cases:
            return None
        key, noun, answer = self.pick(cases)
        return Question("position", self.word(key, noun), answer, SIDES, 1 / len(SIDES), subject=noun)

    def direction(self) -> Question | None:
        """Which way does the X move?"""
        if not self.lasting:
            return None
        item = self.pick(self.lasting)
        text, options = self.word("direction", item.noun), tuple(WAY_ANSWERS.values())
        return Question("direction", text, WAY_ANSWERS[item.way], options, 1 / len(options), subject=item.noun)

    def which(self) -> Question | None:
        """Which object moves, grows or shrinks like that?"""
        if self.scene.kind == "long":
            return None
        holders: dict[str, list[SceneObject]] = {}
        for item in self.scene.objects:
            for predicate in predicates(item):
                holders.setdefault(predicate, []).append(item)
        single = [(p, items[0]) for p, items in sorted(holders.items()) if len(items) == 1 and items[0] in self.lasting]
        if not single:
            return None
        predicate, item = self.pick(single)
        text = self.word("which", predicate=self.pick(PREDICATES[predicate]))
        return self._object("which", text, item, len(self.scene.counts()))

    def order(self) -> Question | None:
        """Which object appears first, or last?"""
        if self.scene.kind != "sequence":
            return None
        found = sorted(self.named, key=lambda item: item.enter)
        key = self.pick(("first", "last"))
        return self._object("order", self.word(key), found[0 if key == "first" else -1], len(found))

    def before(self) -> Question | None:
        """Does the X appear before the Y?"""
        enters = sorted({item.enter for item in self.named})
        if self.scene.kind not in ("sequence", "long") or len(enters) < 2:
            return None
        x = self.pick(self.named)
        y = self.pick([item for item in self.named if abs(item.enter - x.enter) > 1e-9])
        return self._before(x, y, self.pick(("before", "after")))

    def count(self) -> Question | None:
        """How many objects, or how many Xs?"""
        if self.scene.kind == "plain":
            number, text = len(self.scene.objects), self.word("count")
        elif self.scene.kind == "group":
            noun = self.scene.objects[0].noun
            number, text = self.scene.counts()[noun], self.word("count_noun", noun)
        else:
            return None
        return Question("count", text, NUMBERS[number - 1], NUMBERS, 1 / len(NUMBERS))

    def neighbour(self) -> Question | None:
        """What stays next to the X?"""
        if self.scene.kind != "pair":
            return None
        first, second = self.scene.objects[:2]
        x, y = (first, second) if self.rng.random() < 0.5 else (second, first)
        found = self._object("neighbour", self.word("neighbour", x.noun), y, len(self.scene.objects) - 1)
        return dataclasses.replace(found, subject=x.noun)

    def needle(self) -> Question | None:
        """What is there for a moment only, and where?"""
        if self.scene.kind == "long":
            item = self.pick(self.named) if self.named else None
        else:
            item = next((item for item in self.named if item.is_brief), None)
        if item is None:
            return None
        where = side(self.scene, item, item.enter)
        if where and (self.scene.kind == "long" or self.rng.random() < 0.5):
            return Question("needle", self.word("needle_where", item.noun), where, SIDES, 0.25, subject=item.noun)
        if self.scene.kind == "long":
            return None
        return self._object("needle", self.word("needle_what"), item, len(self.scene.objects))

    def generic(self) -> Question | None:
        """What happens? An instruction that names nothing; its answer is unique where there is one object only."""
        if self.scene.kind != "plain" or len(self.scene.objects) > 1:
            return None
        return Question(
            "generic", self.word("caption"), self.caption(), (), self.noun_chance / len(WAYS), 1 / len(WAYS)
        )

    def _before(self, x: SceneObject, y: SceneObject, key: str) -> Question:
        answer = "yes" if (x.enter < y.enter) == (key == "before") else "no"
        return Question("before", self.word(key, x.noun, y.noun), answer, ("yes", "no"), 0.5)

    def _object(self, family: str, text: str, item: SceneObject, among: int) -> Question:
        return Question(family, text, item.noun, (*self.nouns, *SHAPES), self.noun_chance, round(1 / among, 4))

    def caption(self) -> str:
        """One sentence about the whole scene, from left to right."""
        return join([f"{article(item.name)} {motion(item.way)}" for item in self.in_order])

    def as_choice(self, question: Question) -> Question:
        """Return the question with up to four options and a letter as its answer; captions get made-up companions."""
        wrong: list[str] = []
        if question.family == "generic":
            # Two names and two ways in all four combinations: none of them says which is right.
            item, other, way = self.scene.objects[0], self._any_name(), self.pick(WAYS)
            while other == item.name:
                other = self._any_name()
            while way == item.way:
                way = self.pick(WAYS)
            pairs = [(name, w) for name in (item.name, other) for w in (item.way, way)]
            wrong = [f"{article(name)} {motion(w)}" for name, w in pairs][1:]
        elif len(question.options) <= len(LETTERS):
            wrong = [option for option in question.options if option != question.answer]
        else:
            # What is in the clip too makes the hardest wrong options; the others are as frequent as in clips.
            is_noun = question.answer in self.nouns or question.answer in SHAPES
            seen = [item.noun for item in self.named if item.noun not in (question.subject, question.answer)]
            wrong = list(dict.fromkeys(seen))[:3] if is_noun else []
            while len(wrong) < 3:
                option = self._any_noun() if is_noun else self.pick(question.options)
                if option not in wrong and option != question.answer and option != question.subject:
                    wrong.append(option)
        options = [wrong[i] for i in self.rng.permutation(len(wrong))]
        place = int(self.rng.integers(len(options) + 1))
        options.insert(place, question.answer)
        lines = [f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)]
        text = "\n".join([question.text, *lines, "Answer with the option's letter."])
        letters = LETTERS[: len(options)]
        return dataclasses.replace(
            question,
            text=text,
            answer=LETTERS[place],
            options=letters,
            chance=1 / len(letters),
            informed_chance=question.informed_chance and max(1 / len(letters), question.informed_chance),
            form="choice",
        )

    def _any_noun(self) -> str:
        """A noun, as often as in clips."""
        return self.pick(SHAPES if self.rng.random() < SHAPE_SHARE else self.nouns)

    def _any_name(self) -> str:
        """A full name, as often as in clips."""
        noun = self._any_noun()
        return f"{self.pick(tuple(COLORS))} {noun}" if noun in SHAPES else noun

    def questions(self) -> list[Question]:
        """One question of every family that the scene allows."""
        found = [getattr(self, family)() for family in FAMILIES]
        return [question for question in found if question]

    def comparisons(self) -> list[Question]:
        """When every object appears, and every two of them compared in both orders (training only).

        A clip of three gives six questions with yes and no, where `before` draws one, three for a noun and three for a
        time. Nine of ten ask for what is first: asked for both alike, whether one is before the other says nothing of
        the answer until the question is understood too, and nothing is what a small model then learns.
        """
        if self.scene.kind != "sequence":
            return []
        found = [self._before(x, y, self._mostly("before", "after")) for x, y in itertools.permutations(self.named, 2)]
        for pair in itertools.combinations(self.named, 2):
            first, last = sorted(pair, key=lambda item: item.enter)
            x, y = (first, last) if self.rng.random() < 0.5 else (last, first)
            key = self._mostly("first_of", "last_of")
            text = fill(self.pick(COMPARING[key]), x.noun, y.noun)
            answer = (first if key == "first_of" else last).noun
            found.append(Question("order", text, answer, (x.noun, y.noun), 0.5))
        for item in self.named:
            text = fill(self.pick(COMPARING["when"]), item.noun)
            chance = 1 / len(self.named)  # of one who knows how many there are, and that one is there from the start
            found.append(Question("order", text, moment(item), MOMENTS, chance, subject=item.noun))
        return found

    def _mostly(self, usual: str, rare: str) -> str:
        return usual if self.rng.random() < 0.9 else rare

    def captions(self) -> list[Question]:
        """One caption of the whole scene (stage `align`)."""
        return [Question("caption", self.word("caption"), self.caption())]

    def descriptions(self) -> list[Question]:
        """Instructions that say what the description is to be about (stage `pretrain`), as in HICom-248K."""
        found = [
            Question("describe", self.word("describe", item.noun), self.story(item), subject=item.noun)
            for item in self.in_order
            if item in self.named
        ]
        colors = list(dict.fromkeys(item.color for item in self.in_order if item.color))
        if colors:
            found.append(Question("colours", self.word("colours"), join(colors)))
        names = list(dict.fromkeys(article(item.name) for item in self.in_order))
        found.append(Question("list", self.word("list"), join(names)))
        movers = list(dict.fromkeys(f"the {item.name}" for item in self.in_order if item.way != "still"))
        found.append(Question("moving", self.word("moving"), join(movers) if movers else "nothing moves"))
        dots = [f"the {item.noun} has a {item.mark} dot" for item in self.in_order if item.mark and item in self.named]
        if dots:
            found.append(Question("dots", self.word("dots"), join(dots)))
        if self.scene.kind == "sequence":
            order = sorted(self.named, key=lambda item: item.enter)
            found.append(Question("sequence", self.word("sequence"), join([f"the {item.noun}" for item in order])))
        if self.scene.kind == "pair":
            x, y = self.scene.objects[:2]
            found.append(Question("together", self.word("together"), f"the {x.noun} and the {y.noun}"))
        return found

    def story(self, item: SceneObject) -> str:
        """Return everything about one object in one sentence."""
        places = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
        first, last = (side(self.scene, item, time) for time in (item.enter, item.leave))
        begins = "appears late" if item.enter > 0 else "starts"
        parts = [f"{begins} {places[first] if first else 'in the middle'}", motion(item.way)]
        if item.way in DIRECTIONS:
            parts.append(f"ends {places[last] if last else 'in the middle'}")
        if item.growth != 1:
            parts.append("grows" if item.growth > 1 else "shrinks")
        if item.leave < 1:
            parts.append("disappears early")
        if item.mark:
            parts.append(f"has a {item.mark} dot")
        return f"the {item.name} {join(parts)}"


def motion(way: str) -> str:
    """`moves left`, `stays still`."""
    return "stays still" if way == "still" else f"moves {way}"


def corpus(nouns: Sequence[str] = NOUNS[: -len(SHAPES)]) -> Iterator[str]:
    """Every word of the world in its usual surroundings: the text that the tokenizer is trained on."""
    names = [*nouns, *SHAPES, *(f"{color} {shape}" for color in COLORS for shape in SHAPES)]
    wordings = {key: (*TEMPLATES[key], *HELD_OUT_TEMPLATES.get(key, ())) for key in TEMPLATES}
    for name in names:
        yield from (fill(template, name, name) for key in NAMING for template in wordings[key])
        yield from (fill(phrase, name) for phrase in PHRASES)
        yield f"assistant\n{name} ({plural(name)})"
        for way in WAYS:
            yield f"assistant\n{article(name)} moves {way}, stays {way} and {article(name)}"
    said = [word for words in PREDICATES.values() for word in words]
    for key in TEMPLATES.keys() - set(NAMING):
        yield from (fill(template, "dog", "cat", p) for template in wordings[key] for p in said)
    words = (*NUMBERS, *SIDES, *COLORS, *WAYS, *WAY_ANSWERS.values(), "yes", "no", "nothing moves", "middle", "dot")
    for answer in words:
        yield f"user\n{answer} {answer}\nassistant\n{answer}"
    for letter in LETTERS:
        yield f"user\n({letter}) {letter}\nAnswer with the option's letter.\nassistant\n{letter}"
    yield from (
        "system\nyou are a helpful assistant.",
        "answer with one word.",
        "answer yes or no.",
        "a an the . , ? !",
        "late early grows shrinks brief beside",
    )
    for begin in ("appears late", "starts", "ends"):
        for place in ("on the left", "on the right", "at the top", "at the bottom", "in the middle"):
            yield f"assistant\nthe dog {begin} {place}, moves left, grows, shrinks and disappears early and stays still"
    for color in MARK_COLORS:
        yield f"assistant\nthe dog has a {color} dot and the cat has a {color} dot"
