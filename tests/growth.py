"""Whether work grows with the length of a text, and no faster."""

import time
from collections.abc import Callable, Iterable

SIZE = 4_000
"""Characters. Quadratic work of one step for each pair of them takes 50 ms and more, linear work some hundred us."""
QUICK_S = 0.02
"""Below it, work at this size is not quadratic."""
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


def is_linear(work: Callable[[str], object], frame: str, unit: str) -> bool:
    """Return whether work on `frame`, its `{}` filled with repeats of `unit`, grows with their number.

    Only what takes long is measured again, at another size.
    """

    def text(size: int) -> str:
        return frame.replace("{}", unit * (size // len(unit)), 1)

    if cpu_s(work, text(SIZE), 1) < QUICK_S:
        return True
    short, long = (cpu_s(work, text(size), 3) for size in (SIZE, 4 * SIZE))
    return long < 2 * QUICK_S or long / short < MOST


def check(work: Callable[[str], object], frames: Iterable[str], units: Iterable[str]) -> None:
    """Assert that work is linear in every frame with every unit."""
    units = tuple(units)
    slow = [(frame, unit) for frame in frames for unit in units if not is_linear(work, frame, unit)]
    assert not slow, f"work grows faster than the text: {slow}"
