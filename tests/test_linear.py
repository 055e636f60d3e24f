r"""No regular expression of the library takes longer than the text it reads is long.

Python's `re` goes back and tries again, so a pattern such as `\n\s*x` takes quadratic time on line breaks. Texts are
made of what each pattern is made of: a beginning that it goes along with, and repeats of its pieces.
"""

import re
from types import SimpleNamespace
from typing import Any

import pytest

import growth
import patterns

KNOWN_WHEN_RUN: dict[str, Any] = {
    **{"letters": "ABCDE", "both": "ABCDEabcde", "letter": "C", "name": "C", "marked": "C\\.", "option": "x"},
    **{"pattern": "<video>|<image>", "kinds": {"<video>": 1, "<image>": 2}, "patterns": ["<s>", "</s>"]},
    **{"prefix": "x", "first": "x", "second": "x", "before": "x", "after": "x", "rule": SimpleNamespace(pattern="x")},
    **{"user_turn": "x", "self": SimpleNamespace(_user_turn="x", _around=("<s>", "</s>"), template="x")},
}
"""Examples for parts of patterns that are made when a function runs."""
FOUND = list(patterns.all_patterns(KNOWN_WHEN_RUN))


def test_the_patterns_are_found() -> None:
    assert len(FOUND) > 80
    assert {"model/instruction.py _QUESTION", "eval/subtitles.py _CUE"} < {each.where for each in FOUND}


@pytest.mark.parametrize("text", [r"\n\s*x", r"a\s*\s*b", r"<[^>]*>"])
def test_slow_patterns_are_told(text: str) -> None:
    found = re.compile(text)
    starts, pieces = patterns.attacks(found)
    assert not all(growth.is_linear(found.search, start, piece, "") for start in starts for piece in pieces)


@pytest.mark.parametrize("found", FOUND, ids=[each.where for each in FOUND])
def test_every_pattern_takes_linear_time(found: patterns.Found) -> None:
    def work(text: str) -> object:
        return found.pattern.fullmatch(text) if found.is_anchored else found.pattern.sub("", text)

    starts, pieces = patterns.attacks(found.pattern)
    growth.check(work, starts, pieces, ("", "\x00x?"))
