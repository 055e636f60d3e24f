"""Questions with options, for data sets that have classes or answers and no questions of their own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from string import ascii_uppercase

from .layout import LeftOut


def draw(choices: Sequence[str], number: int, key: str) -> list[str]:
    """Return some of the choices, in random order, which depends on `key` alone."""
    return random.Random(key).sample(choices, min(number, len(choices)))


def lettered(options: Sequence[str]) -> list[str]:
    """Return options behind their letters."""
    return [f"({letter}) {option}" for letter, option in zip(ascii_uppercase, options, strict=False)]


def choose_class(question: str, right: Sequence[str], classes: Sequence[str], number: int, key: str) -> tuple[str, str]:
    """Return a question that offers classes, and its answer.

    Args:
        question: what stands before the options.
        right: classes that are right.
        classes: all of them.
        number: wrong ones that are offered with them, as far as there are letters.
        key: of the draw.

    Raises:
        LeftOut: more classes are right than there are letters.
    """
    if len(right) > len(ascii_uppercase):
        raise LeftOut("more right answers than letters", len(right))
    room = len(ascii_uppercase) - len(right)
    wrong = draw([each for each in classes if each not in right], min(number, room), key)
    options = draw([*right, *wrong], len(right) + len(wrong), f"{key} order")
    named = lettered(options)
    answer = "\n".join(name for name, option in zip(named, options, strict=True) if option in right)
    return "\n".join([question, *named]), answer
