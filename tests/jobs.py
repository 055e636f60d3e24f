"""What worker processes do in tests; they import it by its name, which test modules have not."""

import time


def nap(seconds: float) -> float:
    """Return `seconds`, after as many."""
    time.sleep(seconds)
    return seconds


def fail(text: str) -> None:
    """Fail.

    Raises:
        ValueError: always.
    """
    raise ValueError(text)
