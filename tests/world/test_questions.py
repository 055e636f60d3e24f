"""Answers are true, and the words of a question alone say nothing about its answer."""

from collections import Counter, defaultdict
from functools import lru_cache

import numpy as np
import pytest

from hicom.world.dataset import World, ask, make_world, truth
from hicom.world.questions import (
    FAMILIES,
    LETTERS,
    MOMENTS,
    NUMBERS,
    WAY_ANSWERS,
    Asker,
    article,
    fill,
    join,
    plural,
    side,
)
from hicom.world.scenes import (
    EMOJI,
    NOUNS,
    SHAPES,
    SPLITS,
    Background,
    Scene,
    SceneObject,
    WorldConfig,
    generator,
)
from hicom.world.templates import COMPARING, HELD_OUT_TEMPLATES, PREDICATES, TEMPLATES
from hicom.world.tokenizer import TEXT_LENGTH, build_tokenizer

NUM_TRAIN, NUM_TEST = 3000, 1000
HELD_OUT = SPLITS[1:]
FORMS = ("open", "choice")
WORLD = World()


def stem(question):
    """The question without its options."""
    return question.text.split("\n")[0]


def offered(question):
    """The texts of its options."""
    return [line.split(") ", 1)[1] for line in question.text.split("\n")[1:-1]]


# Words alone


class OneScene(World):
    """A world that makes the same scene only once in a row."""

    scene = lru_cache(maxsize=1)(World.scene)


def asked_by_family(split, count):
    world, found = OneScene(), {form: defaultdict(list) for form in FORMS}
    for index in range(count):
        # A quarter of what training is asked in `tune` has options.
        for file in ("tune",) if split == "train" else ("tune", "choice"):
            for question in ask(world, split, index, file):
                found[question.form][question.family].append(question)
    return found


@pytest.fixture(scope="module")
def train():
    return asked_by_family("train", NUM_TRAIN)


@pytest.fixture(scope="module", params=HELD_OUT)
def held_out(request):
    return asked_by_family(request.param, NUM_TEST)


class NaiveBayes:
    """Answers from the words of a question."""

    def __init__(self, questions):
        words = sorted({word for question in questions for word in question.text.split()})
        self.words = {word: i for i, word in enumerate(words)}
        self.answers = sorted({question.answer for question in questions})
        counts = np.ones((len(self.answers), len(words)))
        prior = np.zeros(len(self.answers))
        for question, row in zip(questions, map(self.count, questions), strict=True):
            number = self.answers.index(question.answer)
            counts[number] += row
            prior[number] += 1
        self.weights = np.log(counts / counts.sum(1, keepdims=True))
        self.prior = np.log(prior / prior.sum())

    def count(self, question):
        row = np.zeros(len(self.words))
        for word in question.text.split():
            if word in self.words:
                row[self.words[word]] += 1
        return row

    def __call__(self, question):
        return self.answers[int((self.weights @ self.count(question) + self.prior).argmax())]


def readers(questions):
    """Baselines that read nothing but the text."""
    majority = Counter(question.answer for question in questions).most_common(1)[0][0]
    by_text = defaultdict(Counter)
    for question in questions:
        by_text[question.text][question.answer] += 1
    guess = {text: answers.most_common(1)[0][0] for text, answers in by_text.items()}
    return {
        "the commonest answer": lambda question: majority,
        "the commonest answer to the same text": lambda question: guess.get(question.text, majority),
        "naive Bayes on the words": NaiveBayes(questions),
    }


def beats_chance(guess, questions):
    """By how many standard errors a baseline is better than chance."""
    chance = np.array([question.chance for question in questions])
    right = np.array([guess(question) == question.answer for question in questions])
    return (right - chance).sum() / (chance * (1 - chance)).sum() ** 0.5


@pytest.fixture(scope="module")
def fitted(train):
    return {form: {family: readers(asked) for family, asked in train[form].items()} for form in FORMS}


@pytest.mark.parametrize("form", FORMS)
def test_words_alone_stay_at_chance(fitted, held_out, form):
    assert held_out[form]
    for family, questions in held_out[form].items():
        for name, guess in fitted[form][family].items():
            excess = beats_chance(guess, questions)
            assert excess < 4, f"{name} beats chance in {family} ({form}) by {excess:.1f} standard errors"


def test_every_family_is_asked(train):
    for form in FORMS:
        assert set(train[form]) == set(FAMILIES)
        assert all(len(questions) > 100 for questions in train[form].values())


def a_shape(question):
    """The first option that is a shape."""
    return LETTERS[next((i for i, option in enumerate(offered(question)) if option in SHAPES), 0)]


def the_shared_name(question):
    """The first option whose object most options are about."""
    names = [option.split(" moves ")[0].removesuffix(" stays still") for option in offered(question)]
    return LETTERS[names.index(Counter(names).most_common(1)[0][0])]


@pytest.mark.parametrize(
    ("families", "guess"), [(("which", "order", "neighbour"), a_shape), (("generic",), the_shared_name)]
)
def test_options_do_not_tell_which_is_right(train, families, guess):
    excess = beats_chance(guess, [question for family in families for question in train["choice"][family]])
    assert excess < 4, f"{guess.__doc__} beats chance by {excess:.1f} standard errors"


# Answers from the ground truth, by other code than that which asks

# 17 frames: the first, the middle and the last one are at the moments that questions ask about.
EXACT = World(config=WorldConfig(fps=8.5))
PLACES = {"position_start": 0.0, "position_middle": 0.5, "position_end": 1.0}
UNCLEAR = object()


@pytest.fixture(scope="module")
def meanings():
    """What every text of the world asks: text -> (key, first noun, second noun, predicate)."""
    found = {}
    for key in (*TEMPLATES, *COMPARING):
        for template in (*TEMPLATES.get(key, ()), *HELD_OUT_TEMPLATES.get(key, ()), *COMPARING.get(key, ())):
            for x in NOUNS if any(part in template for part in ("{x}", "{a}", "{n}")) else ("",):
                for y in NOUNS if "{y}" in template else ("",):
                    if x and x == y:
                        continue
                    for p, words in PREDICATES.items() if "{p}" in template else (("", ("",)),):
                        for word in words:
                            text = fill(template, x, y, word)
                            assert found.get(text, (key, x, y, p)) == (key, x, y, p), f"{text} has two meanings"
                            found[text] = (key, x, y, p)
    return found


def middle(box):
    return np.array([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2])


def is_whole(box):
    return min(box) > 0 and max(box) < 1


def side_of(box):
    """left, right, top or bottom; unclear for a box that the frame's edge cuts: its centre is not the object's."""
    if not is_whole(box):
        return UNCLEAR
    x, y = middle(box) - 0.5
    far = {"left": -x, "right": x, "top": -y, "bottom": y}
    return max(far, key=far.__getitem__)


class Thing:
    """What the boxes of one object say."""

    def __init__(self, facts, num_frames):
        self.noun, self.color, self.mark, self.name = (facts[key] for key in ("noun", "color", "mark", "name"))
        self.boxes = {facts["first_frame"] + i: box for i, box in enumerate(facts["boxes"]) if box}
        self.first = min(self.boxes)
        self.is_brief = len(self.boxes) < 0.25 * num_frames
        self.whole = [box for box in self.boxes.values() if is_whole(box)]

    @property
    def way(self):
        places = np.array([middle(box) for box in self.boxes.values()])
        if np.ptp(places, axis=0).max() < 0.01:
            return "still"
        net = places[-1] - places[0]
        axis = int(abs(net).argmax())
        steps = np.diff(places[:, axis])
        steps = steps[abs(steps) > 1e-4]
        if (steps[1:] * steps[:-1] < 0).any():
            return ("back and forth", "up and down")[axis]
        return (("left", "right"), ("up", "down"))[axis][int(net[axis] > 0)]

    @property
    def growth(self):
        sizes = [max(box[2] - box[0], box[3] - box[1]) for box in self.whole]
        ratio = sizes[-1] / sizes[0]
        return "grows" if ratio > 1.05 else "shrinks" if ratio < 0.95 else None


def right_answers(facts, key, x, y, p):
    """Every true answer to a question, as the ground truth has it; UNCLEAR among them where it does not say."""
    last = facts["num_frames"] - 1
    things = [Thing(item, facts["num_frames"]) for item in facts["objects"]]
    called = [thing for thing in things if thing.noun == x]
    if key == "presence":
        return {"yes" if called else "no"}
    if key == "colour":
        return {thing.color for thing in called}
    if key == "detail":
        return {thing.mark for thing in called}
    if key in PLACES:
        return {side_of(thing.boxes[round(PLACES[key] * last)]) for thing in called}
    if key == "direction":
        return {WAY_ANSWERS[thing.way] for thing in called}
    if key == "which":
        return {thing.noun for thing in things if not thing.is_brief and p in (thing.way, thing.growth)}
    if key in ("first", "last"):
        moment = (min if key == "first" else max)(thing.first for thing in things)
        return {thing.noun for thing in things if thing.first == moment}
    if key in ("before", "after"):
        (one,), (other,) = called, [thing for thing in things if thing.noun == y]
        assert one.first != other.first
        return {"yes" if (one.first < other.first) == (key == "before") else "no"}
    if key == "when":
        (one,) = called
        place = one.first / last
        return {MOMENTS[(place > 0) + (place > 1 / 3) + (place > 0.47)]}
    if key in COMPARING:
        moment = (min if key == "first_of" else max)(thing.first for thing in things if thing.noun in (x, y))
        return {thing.noun for thing in things if thing.first == moment}
    if key == "count":
        return {NUMBERS[len(things) - 1]}
    if key == "count_noun":
        return {NUMBERS[len(called) - 1]}
    if key == "neighbour":
        (one,) = called
        distance = {}
        for other in things:
            if other is not one:
                both = sorted(one.boxes.keys() & other.boxes.keys())
                apart = [np.linalg.norm(middle(one.boxes[i]) - middle(other.boxes[i])) for i in both]
                distance[other.noun] = np.mean(apart)
        return {min(distance, key=distance.__getitem__)}
    if key == "needle_where":
        return {side_of(thing.boxes[thing.first]) for thing in called}
    if key == "needle_what":
        return {thing.noun for thing in things if thing.is_brief}
    assert key == "caption"
    (one,) = things
    return {f"{article(one.name)} {'stays still' if one.way == 'still' else f'moves {one.way}'}"}


@pytest.mark.parametrize("split", SPLITS)
def test_answers_follow_from_the_ground_truth(meanings, split):
    families, unclear, total = Counter(), 0, 0
    for index in range(100):
        facts = truth(EXACT, split, index)
        for file in ("tune", "wording", "choice"):
            for question in ask(EXACT, split, index, file):
                true = right_answers(facts, *meanings[stem(question)])
                families[question.family] += 1
                total += 1
                if UNCLEAR in true:
                    unclear += 1
                elif question.form == "open":
                    assert true == {question.answer}, (split, index, question)
                    assert question.answer in question.options or question.family == "generic"
                else:
                    letters = [LETTERS[i] for i, option in enumerate(offered(question)) if option in true]
                    assert letters == [question.answer], (split, index, question)
    assert unclear < 0.05 * total
    if split == "test_long":
        assert set(families) == {"presence", "before", "colour", "detail", "needle"}
    elif split == "test_pairs":
        assert set(families) == set(FAMILIES) - {"generic"}, "one object is no pair"
    else:
        assert set(families) == set(FAMILIES)


def test_answers_of_clips_with_few_episodes_and_other_shapes_are_true(meanings):
    """8 seconds are two episodes; a wide frame has other sides."""
    for config in (WorldConfig(duration_s=8, fps=8.125), WorldConfig(width=160, height=90, fps=8.5)):
        world = World(config=config)
        for index in range(60):
            facts = truth(world, "test", index)
            for question in ask(world, "test", index, "tune"):
                true = right_answers(facts, *meanings[question.text])
                assert UNCLEAR in true or true == {question.answer}, (index, question)


def test_choices_ask_the_same_with_options():
    for index in range(100):
        open_ones, choices = ask(WORLD, "test", index, "tune"), ask(WORLD, "test", index, "choice")
        for question, choice in zip(open_ones, choices, strict=True):
            options = offered(choice)
            assert stem(choice) == question.text
            assert options[LETTERS.index(choice.answer)] == question.answer
            assert len(set(options)) == len(options) == (2 if len(question.options) == 2 else 4)
            assert choice.options == LETTERS[: len(options)]
            assert choice.chance == 1 / len(options)
            assert choice.text.endswith("\nAnswer with the option's letter.")


def test_presence_is_balanced_for_each_kind_of_noun(train, meanings):
    answers = defaultdict(Counter)
    for question in train["open"]["presence"]:
        answers[meanings[question.text][1] in EMOJI][question.answer] += 1
    for kind, counted in answers.items():
        total = sum(counted.values())
        assert abs(counted["yes"] / total - 0.5) < 4 * 0.5 / total**0.5, kind


# Wordings


def test_every_family_has_paraphrases_with_one_meaning(meanings):
    """Filling `meanings` has compared every text with all others, for all nouns."""
    assert len(meanings) > 100_000
    assert all(len(set(texts)) == len(texts) >= 6 for texts in TEMPLATES.values())
    assert HELD_OUT_TEMPLATES.keys() <= TEMPLATES.keys()
    asked = set(TEMPLATES) - {"describe", "colours", "list", "moving", "dots", "sequence", "together"}
    assert set(HELD_OUT_TEMPLATES) == asked, "every question has wordings that training does not use"
    for key, texts in HELD_OUT_TEMPLATES.items():
        assert len(set(texts)) == len(texts) >= 2
        assert not set(texts) & set(TEMPLATES[key])
        fields = {f for f in ("{x}", "{y}", "{p}") if any(f in t for t in TEMPLATES[key])}
        assert all((f in text) for f in fields for text in texts)


def test_every_text_fits_the_text_tower(meanings):
    tokenizer = build_tokenizer()
    ids = tokenizer(list(meanings)[::7]).input_ids
    assert max(map(len, ids)) <= TEXT_LENGTH
    longest = {}
    for text, (key, *_) in meanings.items():
        longest[key] = max(longest.get(key, ""), text, key=len)
    assert max(map(len, tokenizer(list(longest.values())).input_ids)) <= TEXT_LENGTH


def test_held_out_wordings_are_asked_in_their_file_alone(meanings):
    held_out = {text for texts in HELD_OUT_TEMPLATES.values() for text in texts}
    known = {text for texts in TEMPLATES.values() for text in texts}

    def templates_of(question):
        key, x, y, p = meanings[stem(question)]
        candidates = (*TEMPLATES[key], *HELD_OUT_TEMPLATES.get(key, ()))
        words = PREDICATES[p] if p else ("",)
        return {t for t in candidates for w in words if fill(t, x, y, w) == stem(question)}

    for split in ("train", "test"):
        for index in range(40):
            for file in ("align", "pretrain", "tune", "choice"):
                for question in ask(WORLD, split, index, file):
                    assert templates_of(question) <= known
            for question in ask(WORLD, split, index, "wording"):
                assert templates_of(question) <= held_out


def test_names_are_put_into_words():
    assert [article(name) for name in ("owl", "dog", "orange circle")] == ["an owl", "a dog", "an orange circle"]
    assert [plural(n) for n in ("dog", "fox", "cherry", "fish", "octopus", "key", "cross", "torch")] == [
        "dogs", "foxes", "cherries", "fish", "octopuses", "keys", "crosses", "torches",
    ]  # fmt: skip
    assert len({plural(noun) for noun in NOUNS}) == len(NOUNS)
    assert join(["a"]) == "a"
    assert join(["a", "b", "c"]) == "a, b and c"


def test_ambiguous_places_are_not_asked_for():
    def at(x, y, extent=(1.0, 1.0)):
        path = ((x, y), (x, y), (x, y))
        item = SceneObject("dog", None, None, "still", "still", 0.2, 1.0, path, 0.0, 1.0)
        return side(Scene((0,), "plain", extent, (item,), Background("plain", 0)), item, 0.5)

    assert at(0.5, 0.55) is None, "in the middle"
    assert at(0.2, 0.2) is None, "in a corner"
    assert at(1.1, 0.5) is None, "outside"
    assert (at(0.2, 0.5), at(0.5, 0.9)) == ("left", "bottom")
    assert (at(1.6, 0.5, (2.0, 1.0)), at(1.0, 0.1, (2.0, 1.0))) == ("right", "top")


# Captions and descriptions


def test_captions_and_descriptions_name_everything():
    stories = 0
    for split in ("train", "test"):
        for index in range(60):
            scene = WORLD.scene(split, index)
            (caption,) = ask(WORLD, split, index, "align")[:1]
            told = ask(WORLD, split, index, "pretrain")
            assert caption.chance is None
            assert all(question.chance is None for question in told)
            for item in scene.objects:
                assert article(item.name) in caption.answer
            for item in scene.named():
                assert any(q.family == "describe" and q.answer.startswith(f"the {item.name} ") for q in told)
                stories += 1
            listed = next(q for q in told if q.family == "list")
            assert all(item.name in listed.answer for item in scene.objects)
            dots = [q for q in told if q.family == "dots"]
            assert bool(dots) == any(item.mark for item in scene.named())
    assert stories > 200


def test_captions_never_say_what_nothing_shows():
    for index in range(60):
        scene = WORLD.scene("train", index)
        (question,) = Asker(scene, generator(0, index)).captions()
        said = {noun for noun in NOUNS if f" {noun} " in f" {question.answer} ".replace(",", "")}
        assert said == {item.noun for item in scene.objects}


# Worlds


def test_chosen_families_alone_are_asked():
    world = make_world(families=("colour", "needle"))
    assert {q.family for i in range(60) for q in ask(world, "test", i, "tune")} == {"colour", "needle"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"families": ("which", "wich")}, "unknown question families wich: choose some of which, direction"),
        ({"families": ()}, "no question families are given: choose some of which"),
        ({"seed": -1}, "seed=-1 must not be negative"),
    ],
)
def test_impossible_worlds_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        World(**values)


def test_comparisons_are_true_and_name_every_object_and_every_two_in_both_orders(meanings):
    asked = 0
    for index in range(60):
        facts, found = truth(EXACT, "train", index), ask(EXACT, "train", index, "compare")
        asked += len(found)
        pairs = Counter()
        for question in found:
            key, x, y, p = meanings[question.text]
            assert right_answers(facts, key, x, y, p) == {question.answer}, (index, question)
            assert question.answer in question.options
            pairs[x if key == "when" else (x, y) if question.family == "before" else frozenset((x, y))] += 1
        if facts["kind"] == "sequence":
            named = [noun for noun, n in Counter(item["noun"] for item in facts["objects"]).items() if n == 1]
            n, rounds = len(named), 2
            assert len(pairs) == n * (n - 1) + n * (n - 1) // 2 + n
            assert set(pairs.values()) == {rounds}
        else:
            assert not found
    assert asked > 50, "no clip in which something can be compared"


def test_the_words_of_a_comparison_say_nothing(meanings):
    """Whatever is asked, the first noun is as often the answer as the second, and yes as often as no."""
    world, hits, chances = OneScene(), defaultdict(list), defaultdict(list)
    for index in range(NUM_TRAIN):
        for question in ask(world, "train", index, "compare"):
            # Of two nouns, the options are in the order of the text; of times, most things are there from the start.
            key = meanings[question.text][0]
            hits[key].append(question.answer == question.options[0])
            chances[key].append(question.chance)
    assert set(hits) == {"before", "after", *COMPARING}
    for usual, rare in (("before", "after"), ("first_of", "last_of")):
        share = len(hits[rare]) / len(hits[usual] + hits[rare])
        assert 0.05 < share < 0.15, "asked for both alike, a small model learns neither"
    for key in hits:
        share, chance, n = np.mean(hits[key]), np.mean(chances[key]), len(hits[key])
        # Questions about one clip depend on each other: four standard errors of a third of them.
        assert abs(share - chance) < 4 * 0.5 / np.sqrt(n / 3), (key, share, n)
