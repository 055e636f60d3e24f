"""Replies of captioners, which pairs are good enough, and near-duplicates."""

import json
import time

import pytest

from hicom.data.build.config import REFUSALS
from hicom.data.build.texts import Pair, content_words, near_duplicates, parse_pairs, why_dropped

ITEMS = [{"instruction": f"Describe thing {n}.", "answer": f"It is thing {n}."} for n in range(4)]
PAIRS = [Pair(item["instruction"], item["answer"]) for item in ITEMS]
LONG = "The brown dog lies on the red sofa and looks at the window all the time."


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ITEMS),
        f"Here they are:\n```json\n{json.dumps(ITEMS, indent=1)}\n```\nAnything else?",
        json.dumps({"pairs": ITEMS}),
        f"Pairs [three of them]: {json.dumps(ITEMS)}",
        json.dumps([{"Question": item["instruction"], "Description": item["answer"]} for item in ITEMS]),
        "\n\n".join(f"Instruction {n}: {p.instruction}\nAnswer {n}: {p.description}" for n, p in enumerate(PAIRS, 1)),
        "\n".join(f"**Q{n}:** {p.instruction}\n**A{n}:** {p.description}" for n, p in enumerate(PAIRS, 1)),
    ],
)
def test_pairs_of_a_reply(text: str) -> None:
    assert parse_pairs(text, 3) == PAIRS[:3]


def test_answers_of_several_lines() -> None:
    text = "Sure!\n1. Question: What is\nthere?\nAnswer:\n\nA dog.\nA. B. sees it.\n\nBye.\nQ2. And?\nA2. None.\nQ: ?"
    assert parse_pairs(text, 9) == [Pair("What is there?", "A dog. A. B. sees it."), Pair("And?", "None.")]


@pytest.mark.parametrize("piece", ["[", "[{", "q:\n", "a:\n", "q:x\na:y\n", "\n ", "* ", "1 ", "q 1 "])
def test_no_reply_costs_more_than_its_length(piece: str) -> None:
    start = time.process_time()
    parse_pairs(piece * (20_000 // len(piece)), 3)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("text", ["", "I cannot.", "[]", "[1, 2]", '[{"instruction": "a"}]', json.dumps(ITEMS)[:40]])
def test_replies_without_pairs(text: str) -> None:
    assert parse_pairs(text, 3) == []


def test_pairs_that_are_cut_off_are_left_out() -> None:
    broken = [*ITEMS[:1], {"instruction": "Describe it.", "answer": " "}, "x"]
    assert parse_pairs(json.dumps(broken), 3) == PAIRS[:1]


@pytest.mark.parametrize(
    ("instruction", "description", "reason"),
    [
        ("Describe the dog on the sofa.", LONG, ""),
        ("What do the dogs do?", LONG, ""),  # plural
        (
            "What does the dog do?",
            "The video does not provide what the dog does in any detail here.",
            "refusal: not provide",
        ),
        ("Describe the dog.", "The text does not describe the dog in this clip at all.", "refusal: not describe"),
        ("Describe the dog.", "A brown dog.", "description too short"),
        ("How many dogs are there on the sofa?", LONG, "asks for a number or a reason"),
        ("Why does the dog lie on the sofa?", LONG, "asks for a number or a reason"),
        ("Describe what happens in this video.", LONG, "instruction names nothing"),
        ("Describe the cat.", LONG, "description is about something else"),
    ],
)
def test_why_pairs_are_dropped(instruction: str, description: str, reason: str) -> None:
    assert why_dropped(Pair(instruction, description), REFUSALS, 8) == reason


def test_content_words() -> None:
    assert content_words("Please describe the two Dogs in this video, and the sofa!") == {"two", "dog", "sofa"}


def test_near_duplicates_are_those_whose_runs_overlap() -> None:
    first = Pair("Describe the dog on the sofa.", LONG)
    pairs = [
        ("a", first),
        ("b", Pair("Describe the dog on the sofa", LONG.upper())),
        ("c", Pair("Describe the dog on the sofa.", LONG.replace("all the time", "for a while"))),
        ("d", Pair("Describe the red car.", "A red car passes by the house and turns left at the corner.")),
    ]
    assert list(near_duplicates(pairs, 0.9)) == [("b", "a")]
    assert list(near_duplicates(pairs, 0.6)) == [("b", "a"), ("c", "a")]


def test_near_duplicates_among_many() -> None:
    pairs = [
        (str(n), Pair(f"Describe object {n}.", f"Object {n} stands at place {7 * n} in room {3 * n}."))
        for n in range(500)
    ]
    pairs.append(("copy", pairs[123][1]))
    assert list(near_duplicates(pairs, 0.9)) == [("copy", "123")]
