"""What a model's or a judge's text says, on hand-made cases."""

import random
import re
import string

import pytest

from hicom.eval.answers import chosen_option, exact_match, judged_score, judged_verdict, token_f1

OPTIONS = ["a dog", "a black cat", "a cat", "none of these"]


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("B", 1),
        ("b", 1),
        (" (C) ", 2),
        ("C.", 2),
        ("D. none of these", 3),
        ("A: because it barks", 0),
        ("A, it barks", 0),
        ("(B) a black cat, not (C)", 1),
        ("The best answer is: B", 1),
        ("The correct answer is (C).", 2),
        ("Best option: (A) a dog", 0),
        ("Answer: D", 3),
        ("Option B", 1),
        ("I think the answer is C because of the tail.", 2),
        ("It has a tail, so (C).", 2),
        ("It is option B, as the tail shows; option B.", 1),
        ("a cat", 2),
        ("A black cat.", 1),
        ("It shows a black cat on a chair", 1),  # and "a cat" is no part of that
        ("the animal is a dog", 0),
        # Typography, wrappers and reasoning:
        ("**B**", 1),
        ("__B__", 1),
        ("`B`", 1),
        ("[B]", 1),
        ("<B>", 1),
        ("{B}", 1),
        ('"B"', 1),
        ("“B”", 1),
        ("\uff08\uff22\uff09", 1),  # full width
        ("**B. a black cat**", 1),
        ("**Answer:** [B]", 1),
        ("### Answer\nB", 1),
        ("The answer is: **(B)**", 1),
        (r"\boxed{B}", 1),
        (r"So the final answer is $\boxed{\text{B}}$.", 1),
        (r"First, (A) is unlikely. \boxed{B}", 1),
        (r"\boxed{A} or \boxed{B}", None),
        ("(A) runs, but <answer>B</answer>", 1),
        ("<think>It may be A or (C).</think>\nB", 1),
        ("<think>The answer is (C), or", None),
        # Words around the letter:
        ("I think it is B", 1),
        ("It's B.", 1),
        ("I choose B", 1),
        ("Ans: B", 1),
        ("I would go with option C.", 2),
        ("The correct choice would be B", 1),
        ("Based on the video, D", 3),
        ("B is the correct answer.", 1),
        ("B because it has a tail", 1),
        ("B - a black cat", 1),
        ("B\nExplanation: A is not shown", 1),
        ("Between A and B, the answer is B.", 1),
        ("(A) a dog (B) a black cat (C) a cat (D) none of these. The answer is (B).", 1),
        ("C is wrong, so it must be B", 1),
        ("It is not A, it is B", 1),
        ("It is not (A) but (B)", 1),
        ("I think it is A black cat", 1),  # an article: the option's text counts
        ("Answer: A black cat", 1),
        # Nothing is guessed:
        ("I don't think it is B", None),
        ("The answer is not B.", None),
        ("The answer is A man who runs", None),
        ("The answer is A and B", None),
        ("Option A or B", None),
        ("A\nB", None),
        ("It could be A or C", None),
        ("A. a dog\nB. a black cat\nC. a cat\nD. none of these", None),  # the options once more
        ("", None),
        ("A man runs", None),  # an article, not a letter
        ("A and B", None),
        ("A or C", None),
        ("(A), (B)", None),
        ("either option A or option B", None),
        ("E", None),  # beyond the options
        ("a dog and a cat", None),
        ("I do not know", None),
        ("a bird", None),
        ("Because", None),
    ],
)
def test_chosen_option(text: str, index: int | None) -> None:
    assert chosen_option(text, OPTIONS) == index


def test_six_options_have_six_letters() -> None:
    assert chosen_option("F", list("uvwxyz")) == 5
    assert chosen_option("F", list("uvwxy")) is None


def test_a_letter_that_is_a_word() -> None:
    """Beyond eight options `I` is one."""
    options = [f"thing {number}" for number in range(10)]
    assert chosen_option("I think it is C", options) == 2
    assert chosen_option("I do not know", options) is None
    assert chosen_option("I", options) == 8


def test_an_option_that_is_there_twice_cannot_be_told_by_its_text() -> None:
    assert chosen_option("red", ["red", "red", "blue"]) is None
    assert chosen_option("B", ["red", "red", "blue"]) == 1


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("{'pred': 'yes', 'score': 4}", (True, 4)),
        ('{"pred": "no", "score": 0}', (False, 0)),
        ("Sure: {'pred': 'Yes', 'score': 4.5}.", (True, 4)),
        ("{'pred': 'yes', 'score': '5'}", (True, 5)),
        ("{'pred': 'maybe', 'score': 4}", None),
        ("{'pred': 'yes', 'score': 7}", None),
        ("{'pred': 'yes'}", None),
        ("{'pred': 'yes', 'score': 1} {'pred': 'no', 'score': 1}", None),
        ("yes, 4", None),
        ("", None),
    ],
)
def test_verdict(text: str, verdict: tuple[bool, int] | None) -> None:
    assert judged_verdict(text) == verdict


@pytest.mark.parametrize(
    ("text", "score"),
    [("{'score': 3}", 3), ('```python\n{"score": 2}\n```', 2), ("{'score': -1}", None), ("3", None), ("{}", None)],
)
def test_score(text: str, score: int | None) -> None:
    assert judged_score(text) == score


@pytest.mark.parametrize(
    ("text", "answer", "is_same", "f1"),
    [
        ("The dog.", "a dog", True, 1),
        ("THE  DOG!", "dog", True, 1),
        ("It's a dog", "its dog", True, 1),
        ("then", "n", False, 0),  # an article is a whole word
        ("the black cat sleeps", "a black dog", False, 0.4),  # 1 of 3 and 1 of 2 words
        ("red red blue", "red green", False, 0.4),  # a word counts as often as both have it
        ("red red", "red red blue", False, 0.8),
        ("left", "right", False, 0),
        ("", "left", False, 0),
        ("left", "", False, 0),
        ("the", "...", True, 1),
        ("a", "b", False, 0),
        ("e-mail", "email", True, 1),
        ("Straße", "straße", True, 1),
    ],
)
def test_open_answers_by_hand(text: str, answer: str, is_same: bool, f1: float) -> None:
    assert exact_match(text, answer) is is_same
    assert token_f1(text, answer) == pytest.approx(f1)


def test_open_answers_are_scored_as_the_published_code_does() -> None:
    """The steps of SQuAD's evaluation, with counting by hand."""

    def normalised(text: str) -> str:
        kept = "".join(character for character in text.lower() if character not in set(string.punctuation))
        return " ".join(re.compile(r"\b(a|an|the)\b").sub(" ", kept).split())

    def f1(text: str, answer: str) -> float:
        said, right = normalised(text).split(" "), normalised(answer).split(" ")
        rest, num_same = list(right), 0
        for word in said:
            if word in rest:
                rest.remove(word)
                num_same += 1
        if num_same == 0:
            return 0.0
        precision, recall = num_same / len(said), num_same / len(right)
        return 2 * precision * recall / (precision + recall)

    draw = random.Random(0)
    words = ["a", "the", "An", "dog", "Dog.", "cat", "two", "(two)", "left,", "the-end", "!", "ä"]
    same = 0
    for _ in range(2000):
        text, answer = (" ".join(draw.choices(words, k=draw.randint(1, 4))) for _ in range(2))
        assert exact_match(text, answer) == (normalised(text) == normalised(answer)), (text, answer)
        assert token_f1(text, answer) == pytest.approx(f1(text, answer)), (text, answer)
        same += exact_match(text, answer)
    assert 50 < same < 1000
