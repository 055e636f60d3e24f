"""How many bytes of requests are in memory at the same time."""

from __future__ import annotations

import threading
from types import TracebackType

from .requests import RequestError


class Memory:
    """A bound on what all requests hold together: bodies as they arrive, media made from them or fetched.

    Args:
        most: bytes.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.used = 0
        self._lock = threading.Lock()

    def change(self, number: int) -> bool:
        """Count more bytes, or fewer where `number` is negative; False: there is no room, and nothing is counted."""
        with self._lock:
            if number > 0 and self.used + number > self.most:
                return False
            self.used += number
            return True


class Hold:
    """What one request holds, until it is closed.

    Args:
        memory: of all requests.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self._held = 0
        self._is_closed = False
        self._lock = threading.Lock()  # media are fetched side by side

    def take(self, number: int) -> None:
        """Hold more bytes.

        Raises:
            RequestError: this request alone is too large, or there is no room beside the others.
        """
        with self._lock:
            if self._is_closed:  # somebody is still fetching for a request that is over
                raise RequestError("the request is over", None, "overloaded", 503)
            if self._held + number > self.memory.most:
                text = f"the request and its media have more than {self.memory.most:,} bytes"
                raise RequestError(text, None, "request_too_large", 413)
            if not self.memory.change(number):
                raise RequestError("too many media are held at the moment; try again later", None, "overloaded", 503)
            self._held += number

    def close(self) -> None:
        """Let go of everything."""
        with self._lock:
            self._is_closed = True
            self.memory.change(-self._held)
            self._held = 0

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
