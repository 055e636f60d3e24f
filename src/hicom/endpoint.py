"""Language models behind an OpenAI-compatible endpoint: concurrent, retried, counted, nothing paid for twice."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .files import naming

T = TypeVar("T")
Message = Mapping[str, Any]


MAX_FAILURES = 20
"""Requests in a row that may fail before `Endpoint.map` gives up: then the endpoint is down, or the key is wrong."""


class EndpointError(ValueError):
    """An endpoint did not answer, after all retries."""


@dataclass(frozen=True)
class Reply:
    """What an endpoint said.

    Attributes:
        text: the answer.
        prompt_tokens: tokens read.
        completion_tokens: tokens written.
        is_cached: it was there from before, and cost nothing now.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    is_cached: bool = False


@dataclass
class Usage:
    """What was spent.

    Attributes:
        requests: answered by the endpoint.
        cached: answered from the cache.
        prompt_tokens: read by the endpoint.
        completion_tokens: written by it.
    """

    requests: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Endpoint:
    """A model behind an OpenAI-compatible endpoint (vLLM, llama.cpp, a provider).

    Args:
        url: its base, for example `http://localhost:8000/v1`.
        model: name of the model there.
        api_key: None: the environment's `OPENAI_API_KEY`, which local servers do not need.
        cache: SQLite file of all answers, committed one by one: after a crash nothing is asked again. Processes may
            share it. None: none.
        num_concurrent: requests on their way at once.
        temperature: 0 for the likeliest answer.
        max_tokens: longest answer.
        max_retries: after connection errors, time-outs, 408, 409, 429 and 5xx, with exponential back-off.
        timeout_s: of a request.

    Raises:
        ImportError: the package `openai` is missing.
        ValueError: a number is not positive.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        cache: Path | None = None,
        num_concurrent: int = 8,
        temperature: float = 0.0,
        max_tokens: int = 512,
        max_retries: int = 6,
        timeout_s: float = 120.0,
    ) -> None:
        if num_concurrent < 1 or max_tokens < 1 or timeout_s <= 0:
            raise ValueError(
                f"num_concurrent={num_concurrent}, max_tokens={max_tokens} and timeout_s={timeout_s}: positive"
            )
        try:
            from openai import OpenAI
        except ImportError as error:
            raise ImportError("endpoints need the package openai: pip install 'hicom[eval]'") from error

        self.url, self.model = url, model
        self.num_concurrent = num_concurrent
        self.sampling = {"temperature": temperature, "max_tokens": max_tokens}
        self.usage = Usage()
        self._client = OpenAI(
            base_url=url,
            api_key=api_key or os.environ.get("OPENAI_API_KEY") or "none",
            max_retries=max_retries,
            timeout=timeout_s,
        )
        self._lock = threading.Lock()
        self._cache_file = cache or Path()
        self._cache = None if cache is None else _open_cache(cache)

    def ask(self, messages: Sequence[Message], response_format: Mapping[str, Any] | None = None) -> Reply:
        """Return the answer to a conversation.

        Args:
            messages: the conversation.
            response_format: what the answer must look like, as OpenAI and vLLM take it; None: free text.

        Raises:
            EndpointError: there is none, after all retries.
        """
        request: dict[str, Any] = {"model": self.model, "messages": list(messages), **self.sampling}
        if response_format is not None:
            request["response_format"] = dict(response_format)
        key = hashlib.sha256(json.dumps(request, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
        if (kept := self._read(key)) is not None:
            with self._lock:
                self.usage.cached += 1
            return kept
        from openai import OpenAIError

        try:
            answer = self._client.chat.completions.create(**request)
        except OpenAIError as error:
            raise EndpointError(f"{self.url}, model {self.model!r}: {type(error).__name__}: {error}") from error
        if not answer.choices or answer.choices[0].message.content is None:
            raise EndpointError(f"{self.url}, model {self.model!r}: the answer has no text")
        spent = answer.usage
        reply = Reply(
            answer.choices[0].message.content,
            spent.prompt_tokens if spent else 0,
            spent.completion_tokens if spent else 0,
        )
        with self._lock:
            self.usage.requests += 1
            self.usage.prompt_tokens += reply.prompt_tokens
            self.usage.completion_tokens += reply.completion_tokens
        self._write(key, reply)
        return reply

    def map(self, function: Callable[[T], Any], items: Sequence[T]) -> Iterator[tuple[T, Any]]:
        """Yield items with what `function`, which asks this endpoint, returns or raises; as they come, many at once.

        An EndpointError is yielded in place of a result; all other errors are raised.

        Raises:
            EndpointError: `MAX_FAILURES` requests in a row have failed.
        """
        left = iter(items)
        failures = 0
        with ThreadPoolExecutor(self.num_concurrent, thread_name_prefix="hicom-endpoint") as pool:
            running: dict[Future[Any], T] = {}
            while True:
                for item in left:
                    running[pool.submit(function, item)] = item
                    if len(running) >= 2 * self.num_concurrent:
                        break
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    item = running.pop(future)
                    error = future.exception()
                    is_endpoint = isinstance(error, EndpointError)
                    failures = failures + 1 if is_endpoint else 0
                    if error is not None and (not is_endpoint or failures == MAX_FAILURES):
                        for other in running:
                            other.cancel()
                        raise error
                    yield item, error if error is not None else future.result()

    def _read(self, key: str) -> Reply | None:
        if self._cache is None:
            return None
        with self._lock:
            row = self._cache.execute(
                "SELECT text, prompt_tokens, completion_tokens FROM replies WHERE key = ?", (key,)
            ).fetchone()
        return None if row is None else Reply(str(row[0]), int(row[1]), int(row[2]), is_cached=True)

    def _write(self, key: str, reply: Reply) -> None:
        if self._cache is not None:
            with self._lock, naming(self._cache_file), self._cache:
                self._cache.execute(
                    "INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?, ?)",
                    (key, self.model, reply.text, reply.prompt_tokens, reply.completion_tokens),
                )


def _open_cache(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Threads share the connection under a lock; processes wait for each other.
    with naming(path):
        connection = sqlite3.connect(path, timeout=60, check_same_thread=False)
    try:
        with naming(path):
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(
                "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, model TEXT, text TEXT, "
                "prompt_tokens INTEGER, completion_tokens INTEGER)"
            )
    except OSError:
        connection.close()
        raise
    except sqlite3.DatabaseError as error:
        connection.close()
        raise ValueError(f"{path}: not a cache of replies ({error}); choose another file, or remove it") from None
    return connection
