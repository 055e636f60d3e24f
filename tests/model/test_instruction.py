"""What of a user's turn steers the compressor: one real phrasing of each dataset and benchmark."""

import re
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import growth
import hicom.model.instruction as module
import instruction_reference
from hicom.model.instruction import answer_options, extract_instruction, join_parts

QUESTION = "What does the man in the red shirt do after he opens the door?"
LETTERS = "A. He sits down.\nB. He leaves.\nC. He waves.\nD. He sleeps."
BRACKETS = "(A) He sits down.\n(B) He leaves.\n(C) He waves."

DIRECTLY = "Answer with the option's letter from the given choices directly"
OBSERVED = "Based on your observations, select the best option that accurately addresses the question."
EVENTS = "the cause and sequence of events, the detail and movement of objects, and the action and pose of persons"
SELECT = "Select the best answer to the following multiple-choice question based on the video"
RESPOND = "Respond with only the letter (A, B, C, or D) of the correct option."
SUBTITLES = "This video's subtitles are listed below:\nWhat is this?\nA door."

REAL_PHRASINGS = {
    "placeholder": f"<image>\n{QUESTION}",
    "several media": f"<image>\n<image>\n{QUESTION}",
    "LLaVA-Video-178K, letter": f"<image>\n{QUESTION}\n{LETTERS}\n"
    "Please respond with only the letter of the correct answer.",
    "LLaVA-Video-178K, full option": f"<image>\n{QUESTION}\n{LETTERS}\nE. None of these.\n"
    "Please provide your answer by stating the letter followed by the full option.",
    "LLaVA-Video-178K, header": f"<image>\n{QUESTION}\nOptions:\n{LETTERS}\n"
    "Please respond with only the letter of the correct answer.",
    "LLaVA-Video, times": "<image>The video lasts for 10.00 seconds, and 4 frames are uniformly sampled from it. These "
    f"frames are located at 0.00s,3.33s,6.67s,10.00s.Please answer the following questions related to this video.\n"
    f"{QUESTION}",
    "LLaVA mix, short": f"{QUESTION}\nAnswer the question using a single word or phrase.",
    "LLaVA mix, letter": f"{QUESTION}\n{LETTERS}\n{DIRECTLY}.",
    "VideoChat2-IT, choice": f"<video>\nCarefully watch the video and pay attention to {EVENTS}. {OBSERVED}\n"
    f"Question: {QUESTION}\nOptions:\n{BRACKETS}\nOnly give the best option.",
    "VideoChat2-IT, inline header": f"Question: {QUESTION} Options:\n{BRACKETS}\nOnly give the best option.",
    "Video-MME": f"{SELECT}. {RESPOND}\n{QUESTION}\n{LETTERS}\nThe best answer is:",
    "Video-MME, subtitles": f"{SUBTITLES}\n{SELECT} and the subtitles. {RESPOND}\n{QUESTION}\n{LETTERS}\n"
    "The best answer is:",
    "VLMEvalKit": f"These are the frames of a video. {SELECT}. {RESPOND}\nQuestion: {QUESTION}",
    "MVBench": f"Question: {QUESTION}\nOptions:\n{BRACKETS}\nOnly give the best option.\nBest option:(",
    "MLVU": f"Question: {QUESTION}\nOptions:\n{BRACKETS}\nOnly give the best option.\nBest option: (",
    "HICom": f"Question: {QUESTION}\nOptions:\n{BRACKETS}\n{DIRECTLY} and only give the best option. "
    "The best answer is: ",
    "LVBench": f"Carefully watch this video and pay attention to every detail. {OBSERVED}\n{QUESTION}",
    "ActivityNet-QA": f"{QUESTION} Answer the question using a single word or phrase.",
    "WorldSense": f"{QUESTION} (A) He sits down. (B) He leaves. (C) He waves.\nAnswer with the given letter directly.",
    "inline letters": f"{QUESTION} A. He sits down. B. He leaves.",
    "numbered options": f"{QUESTION}\nOptions:\n1. He sits down.\n2. He leaves.",
    "option letter tags": f"{QUESTION}\n{BRACKETS}\nPlease provide only the single option letter (e.g., A, B, C, "
    "D, etc.) within the <answer> </answer> tags.",
    "TOMATO": f"{QUESTION} You can only response with the answer among A, B, C.",
    "short reply": f"{QUESTION} Offer a very short reply.",
    "briefly": f"{QUESTION} Please answer briefly.",
    "yes or no": f"{QUESTION} Answer yes or no.",
    # The same remarks where the options stand elsewhere, as in a turn before or in the picture.
    "letter directly": f"{QUESTION} Answer with the given letter directly.",
    "letter and option": f"{QUESTION}\nPlease provide your answer by stating the letter followed by the full option.",
    "cue": f"{QUESTION}\nAnswer:",
    "cue without colon": f"{QUESTION}\nThe best answer is",
    "cue with bracket": f"{QUESTION}\nBest option: (",
    "VideoChat2-IT, categories": f"{QUESTION}\nPick the relevant category from the list of options. Options:\n"
    "running\nsitting\neating\nOnly give the best option.",
    "choices in a line": f"{QUESTION} Choices: running, sitting, eating.",
    "options first": f"{LETTERS}\n{QUESTION}\nOnly give the best option.",
}
# How VideoChat2-IT asks for a class of action, before "Options:".
ASKED_CATEGORIES = (
    "Choose the corresponding category that captures this action from the offered options.",
    "Pick the most suitable category that represents the interaction from the provided options.",
    "Select the most accurate category from the available choices.",
    "Identify the most accurate action category from the provided options.",
    "Choose the appropriate action category from the listed choices.",
    "Determine the action category that aligns best with these features from the selection provided.",
    "Pick the relevant category from the list of options.",
    "Determine the best-matching action category from the choices given.",
)
UNTOUCHED = (
    "Why?",
    "Is A. Smith in the video? He is tall.",
    "What is the best option for the player at 1:20?",
    "Look at the sign. Which letter is on it?",
    "He opens the letter. Give the name of its sender.",
    "Watch the referee. Give reasons for his choice.",
    "What are the answers: yes or no?",
    "First read this. Then answer: who wins?",
    "Compare both: the dog is (A) brown or black?",
    "Answer both. 1. What colour is the cup? 2. Who takes it?",
)


@pytest.mark.parametrize("text", REAL_PHRASINGS.values(), ids=REAL_PHRASINGS.keys())
def test_instruction_is_the_bare_question(text: str) -> None:
    assert extract_instruction(text) == QUESTION


@pytest.mark.parametrize("remark", ASKED_CATEGORIES)
def test_asked_categories_are_remarks(remark: str) -> None:
    question = "Watch the clip and name the action in it."
    assert extract_instruction(f"{question} {remark} Options:\n{BRACKETS}\nOnly give the best option.") == question


@pytest.mark.parametrize("text", UNTOUCHED)
def test_questions_that_resemble_remarks_stay(text: str) -> None:
    assert extract_instruction(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What?\nOptions:\n- running\n- sitting", "What?"),
        ("Options:\nrunning\nsitting\nWhat?", "running sitting What?"),
        # A question among or behind them counts more.
        ("He has two. Choices: which one does he take?", "He has two. which one does he take?"),
        ("Look at him. Options:\nrunning\nsitting\nWhat does he do?", "Look at him. running sitting What does he do?"),
    ],
)
def test_options_without_letters(text: str, expected: str) -> None:
    assert extract_instruction(text) == expected


def test_question_prefix_is_removed_as_a_prefix() -> None:
    """The release strips the characters of 'Question: ' instead, and eats the start of this one."""
    assert extract_instruction("Question: questions remain, on what?") == "questions remain, on what?"


@pytest.mark.parametrize("text", ["A. one\nB. two", "Only give the best option.", "<video>\nAnswer briefly."])
def test_where_nothing_would_remain_the_turn_stays(text: str) -> None:
    assert extract_instruction(text) == text.removeprefix("<video>\n")


def options_of(text: str) -> tuple[str, ...]:
    """Return the options of a real phrasing."""
    if LETTERS in text:
        last = ("None of these.",) if "E. " in text else ()
        return ("He sits down.", "He leaves.", "He waves.", "He sleeps.", *last)
    if BRACKETS in text or "(C) He waves." in text:
        return ("He sits down.", "He leaves.", "He waves.")
    return ("He sits down.", "He leaves.") if "He leaves." in text else ()


@pytest.mark.parametrize("text", REAL_PHRASINGS.values(), ids=REAL_PHRASINGS.keys())
def test_options_of_real_phrasings(text: str) -> None:
    assert answer_options(text) == options_of(text)


def test_phrasings_with_options_are_among_them() -> None:
    numbers = [len(answer_options(text)) for text in REAL_PHRASINGS.values()]
    assert {number: numbers.count(number) for number in set(numbers)} == {0: 18, 2: 2, 3: 7, 4: 6, 5: 1}


@pytest.mark.parametrize("text", UNTOUCHED)
def test_questions_that_resemble_options_have_none(text: str) -> None:
    assert answer_options(text) == ()


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("Who?\na) he\nb) she\nc) it", ("he", "she", "it")),
        ("Who?\nA: he\nB: she", ("he", "she")),
        ("Who? Options: (1) he (2) she (3) it", ("he", "she", "it")),
        ("Who?\nA. he\n  and she\nB. it\nWhich one?", ("he and she", "it")),
        ("Who?\nA. he\nB.\nC. it", ("he", "", "it")),  # the letters of the others must not move
        ("Who?\nA. he\nB. she\nC.\nD. it", ("he", "she", "", "it")),
        ("How many?\nOptions:\n1. 3\n2. 4\n4. 5", ("3", "4")),
        ("Who? (A) he (B) she, see C. (C) it", ("he", "she, see C.", "it")),
        ("Who?\nA. he. C. Smith says so\nB. she\nC. it", ("he. C. Smith says so", "she", "it")),
        ("Who? A. he! B. it? C. she. Answer with the letter only. The best answer is:", ("he!", "it?", "she.")),
        (
            "Who?\n(A) I write. Give me a letter.\n(B) Answer briefly.",
            ("I write. Give me a letter.", "Answer briefly."),
        ),
        ("<image>\nWho?\n" + "\n".join(f"{chr(65 + n)}. {n}" for n in range(26)), tuple(map(str, range(26)))),
        ("Who?\nOptions:\n" + "\n".join(f"{n}. no {n}" for n in range(1, 31)), tuple(f"no {n}" for n in range(1, 27))),
    ],
)
def test_options_by_hand(text: str, options: tuple[str, ...]) -> None:
    assert answer_options(text) == options


RECOGNISERS = [("_OPTIONS", index) for index in range(len(module._OPTIONS))] + [
    ("_REMARKS", index) for index in range(len(module._REMARKS))
]
RECOGNISERS += [("_ASKED", index) for index in range(len(module._ASKED))]
RECOGNISERS += [(name, None) for name in ("_TIMES", "_SUBTITLES", "_OPEN_BRACKET", "_QUESTION", "_LIST")]


@pytest.mark.parametrize(("name", "index"), RECOGNISERS)
def test_every_recogniser_is_needed(name: str, index: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, some real phrasing above is no longer reduced to its question."""
    patterns = getattr(module, name)
    never = re.compile(r"(?!)")
    monkeypatch.setattr(module, name, never if index is None else patterns[:index] + patterns[index + 1 :])
    categories = (f"{QUESTION} {remark}" for remark in ASKED_CATEGORIES)
    assert any(extract_instruction(text) != QUESTION for text in (*REAL_PHRASINGS.values(), *categories))


def test_parts_stand_on_lines_of_their_own() -> None:
    assert join_parts(["<video>", "what", "happens?"]) == "<video>\nwhat\nhappens?"


PIECES = (
    *(
        "\n",
        " ",
        "\t",
        "\u2003",
        "\x1c",
        "?",
        ".",
        ":",
        "!",
        ",",
        "(",
        "A",
        "B",
        "a",
        "1",
        "(A)",
        "(B)",
        "(C)",
        "A)",
        "B)",
    ),
    *("A.", "B.", "C.", "A: ", "(1)", "(2)", "1.", "2.", "3.", "x", "why", "the dog", "\u212a", "\u017f"),
    *("Options:", "options", "answer choices :", "answers from the following:", "possible ", "Question:", "question"),
    *("answer", "please ", "respond", "based on ", "based on x, ", "letter", "letters", "option letter", "best option"),
    *("from ", "of the ", "choices", "you can only answer with", "Answer yes or no.", "briefly", "Best option: ("),
    *("this video's subtitles are listed below:", "select the best answer", "these frames are located at 0.1s,0.2s"),
    *("The video lasts for 1.5 seconds, and 4 frames are uniformly sampled from it.", "<video>", "<image>"),
)
"""What the patterns are made of."""


@given(st.lists(st.sampled_from(PIECES), max_size=24).map("".join))
@example("\nA) x\nB\n) y\nC) z")
@settings(max_examples=600, deadline=None)
def test_linear_scanning_finds_what_whole_patterns_find(text: str) -> None:
    assert extract_instruction(text) == instruction_reference.extract_instruction(text)
    assert answer_options(text) == instruction_reference.answer_options(text)


@pytest.mark.parametrize("find", [extract_instruction, answer_options])
def test_no_turn_costs_more_than_its_length(find: Callable[[str], object]) -> None:
    """Today's limit of a request is 100,000 characters; 30,000 line breaks took 40 s."""
    units = (*PIECES, "\n \t", "\nA) x", "? (A) x", "Options: x?\n", "answer letter ", "based on x, answer ", "((")
    growth.check(find, ("x", "answer "), units, ("x", "?\nA) y\nB) z"))


def test_many_options_are_found_at_once() -> None:
    text = "Which?\n" + "\n".join(f"{chr(65 + n % 26)}. {n}" for n in range(20_000))
    assert len(answer_options(text)) == 26
    assert extract_instruction(text) == "Which?"
