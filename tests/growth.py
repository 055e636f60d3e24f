"""Whether work grows with the length of a text, and no faster."""

import time
from collections.abc import Callable, Iterable
from itertools import product

SIZES = (250, 1_000, 4_000)
"""Characters, of which the first size that takes long counts: quadratic work of one step for each pair takes 8 ms and
more for the last one, cubic work for the first; linear work some hundred us."""
QUICK_S = 0.004
"""Work that takes less at a size is not slow there."""
MOST = 8.0
"""Times as long for four times the length: 4 where work is linear, 16 where it is quadratic."""


def cpu_s(work: Callable[[str], object], text: str, number: int) -> float:
    """Return the least CPU time of some runs, in seconds, which other programs hardly change."""
    found = []
    for _ in range(number):
        start = time.process_time()
        work(text)
        found.append(time.process_time() - start)
    return min(found)


def is_linear(work: Callable[[str], object], start: str, unit: str, end: str) -> bool:
    """Return whether work on a text grows with the number of the unit's repeats, between a start and an end.

    Only what takes long is measured again, at another size.
    """

    def text(size: int) -> str:
        return start + unit * (size // len(unit)) + end

    size = next((size for size in SIZES if cpu_s(work, text(size), 1) > QUICK_S), None)
    if size is None:
        return True
    short, long = (cpu_s(work, text(each), 3) for each in (size, 4 * size))
    return long < 2 * QUICK_S or long / short < MOST


def check(
    work: Callable[[str], object], starts: Iterable[str], units: Iterable[str], ends: Iterable[str] = ("", "x")
) -> None:
    """Assert that work is linear in every such text."""
    texts = list(product(starts, filter(None, units), ends))
    slow = [text for text in texts if not is_linear(work, *text)]
    assert not slow, f"work grows faster than the text: {slow[:5]}"
