"""Answers are true, and the words of a question alone say nothing about its answer."""

from collections import Counter, defaultdict

import pytest

from hicom.world.questions import FAMILIES, TEMPLATES, captions, descriptions, fill, join, questions, side
from hicom.world.render import sprite_extents
from hicom.world.scenes import NOUNS, SceneObject, clip_seed, generator, ground_truth, make_scene

NUM_TRAIN, NUM_TEST = 3000, 1000


def ask(split, count):
    for index in range(count):
        key = clip_seed(0, split, index)
        yield from questions(make_scene(key), generator(*key, 9))


@pytest.fixture(scope="module")
def train():
    return list(ask("train", NUM_TRAIN))


@pytest.fixture(scope="module")
def test_split():
    return list(ask("test", NUM_TEST))


@pytest.mark.parametrize("family", FAMILIES)
def test_words_alone_stay_at_chance(train, test_split, family):
    by_family, by_text = Counter(), defaultdict(Counter)
    for question in train:
        if question.family == family:
            by_family[question.answer] += 1
            by_text[question.text][question.answer] += 1
    asked = [question for question in test_split if question.family == family]
    chance = asked[0].chance
    error = (chance * (1 - chance) / len(asked)) ** 0.5
    majority = by_family.most_common(1)[0][0]
    right = sum(question.answer == majority for question in asked) / len(asked)
    assert abs(right - chance) < 4 * error, "always the commonest answer"
    guess = {text: answers.most_common(1)[0][0] for text, answers in by_text.items()}
    right = sum(question.answer == guess.get(question.text, majority) for question in asked) / len(asked)
    assert right < chance + 4 * error, "the commonest answer to the same words"


def test_presence_is_balanced_for_each_noun(train):
    answers = defaultdict(Counter)
    for question in train:
        if question.family == "presence":
            noun = next(word for word in question.text.rstrip("?").split() if word in NOUNS)
            answers["shape" if noun in NOUNS[-5:] else "emoji"][question.answer] += 1
    for kind, counted in answers.items():
        total = sum(counted.values())
        assert abs(counted["yes"] / total - 0.5) < 4 * 0.5 / total**0.5, kind


def test_answers_follow_from_the_boxes():
    for index in range(200):
        key = clip_seed(0, "val", index)
        scene = make_scene(key)
        facts = {item["noun"]: item for item in ground_truth(scene, sprite_extents())["objects"]}
        for question in questions(scene, generator(*key, 9)):
            words = question.text.rstrip("?.").split()
            noun = next((word for word in words if word in NOUNS), "")
            assert question.answer in question.options
            if question.family == "presence":
                assert question.answer == ("yes" if noun in facts else "no")
            elif question.family == "colour":
                assert question.answer == facts[noun]["color"]
            elif question.family == "count":
                assert question.options.index(question.answer) == len(facts) - 1
            elif question.family == "position":
                early = any(
                    f"{noun}" in fill(t, noun) and fill(t, noun) == question.text for t in TEMPLATES["position_start"]
                )
                box = facts[noun]["boxes"][0 if early else -1]
                x, y = (box[0] + box[2]) / 2 - 0.5, (box[1] + box[3]) / 2 - 0.5
                far = {"left": -x, "right": x, "top": -y, "bottom": y}
                assert max(far, key=far.__getitem__) == question.answer
            else:
                item = facts[noun] if question.family == "direction" else facts[question.answer]
                boxes = [box for box in item["boxes"] if box]
                x, y = boxes[-1][0] - boxes[0][0], boxes[-1][1] - boxes[0][1]
                moved = {"left": -x, "right": x, "up": -y, "down": y}
                best = max(moved, key=moved.__getitem__) if max(moved.values()) > 0.1 else "it stays still"
                assert best == (question.answer if question.family == "direction" else words[-1])


def test_every_family_has_paraphrases_that_do_not_collide():
    assert all(len(set(templates)) >= 6 for templates in TEMPLATES.values())
    flat = [fill(text, "dog", "left") for key, templates in TEMPLATES.items() for text in templates]
    assert len(flat) == len(set(flat)), "one text must not be asked with two meanings"


def test_descriptions_and_captions_name_everything():
    for index in range(50):
        key = clip_seed(0, "train", index)
        scene = make_scene(key)
        (caption,) = captions(scene, generator(*key))
        told = descriptions(scene, generator(*key))
        assert caption.chance is None
        for item in scene.objects:
            assert item.name in caption.answer
            assert any(q.family == "describe" and q.answer.startswith(f"the {item.name} ") for q in told)
        (listed,) = (q for q in told if q.family == "list")
        assert all(item.name in listed.answer for item in scene.objects)


def test_ambiguous_places_are_not_asked_for():
    def at(x, y):
        return side(SceneObject("dog", None, "still", 0.2, (x, y), (x, y), 0.0, 1.0), 0.5)

    assert at(0.5, 0.55) is None
    assert at(0.2, 0.2) is None
    assert (at(0.2, 0.5), at(0.5, 0.9)) == ("left", "bottom")
    assert join(["a", "b", "c"]) == "a, b and c"
