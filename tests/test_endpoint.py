"""Endpoints: retried, counted, concurrent, and nothing asked twice."""

import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from endpoints import serve
from hicom.endpoint import MAX_FAILURES, Endpoint, EndpointError, Usage

pytest.importorskip("openai")


def ask(endpoint: Endpoint, text: str) -> str:
    return endpoint.ask([{"role": "user", "content": text}]).text


def echo(request: dict[str, Any]) -> str:
    return f"<{request['messages'][-1]['content']}>"


def test_answers_and_what_they_cost() -> None:
    with serve(echo) as served:
        endpoint = Endpoint(served.url, "m", temperature=0.5, max_tokens=9)
        assert ask(endpoint, "a") == "<a>"
        (request,) = served.requests
        assert (request["model"], request["temperature"], request["max_tokens"]) == ("m", 0.5, 9)
        assert endpoint.usage == Usage(1, 0, 7, 3)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_errors_that_may_pass_are_tried_again(status: int) -> None:
    left = [status, status]
    with serve(lambda request: left.pop() if left else echo(request)) as served:
        assert ask(Endpoint(served.url, "m"), "a") == "<a>"
        assert len(served.requests) == 3


def test_other_errors_are_told() -> None:
    with serve(lambda _: 400) as served:
        with pytest.raises(EndpointError, match=r"127.0.0.1.*model 'm': BadRequestError"):
            ask(Endpoint(served.url, "m"), "a")
        assert len(served.requests) == 1
    with pytest.raises(EndpointError, match="APIConnectionError"):
        ask(Endpoint("http://127.0.0.1:9/v1", "m", max_retries=0), "a")


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    with serve(echo) as served:
        cache = tmp_path / "new" / "replies.sqlite"
        assert ask(Endpoint(served.url, "m", cache=cache), "a") == "<a>"
        again = Endpoint(served.url, "m", cache=cache)
        assert ask(again, "a") == "<a>"
        assert again.usage == Usage(0, 1, 0, 0)
        assert len(served.requests) == 1
        # Another question, model or sampling is another request.
        ask(again, "b")
        ask(Endpoint(served.url, "n", cache=cache), "a")
        ask(Endpoint(served.url, "m", cache=cache, temperature=1.0), "a")
        assert len(served.requests) == 4


def test_a_cache_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "replies.sqlite"
    file.write_text("not a database, but long enough to be taken for one" * 100, "utf-8")
    with pytest.raises(ValueError, match=r"replies\.sqlite: not a cache of replies"):
        Endpoint("http://localhost", "m", cache=file)
    assert sqlite3.sqlite_version


def test_many_at_once_and_each_answer_with_its_item() -> None:
    def slow(request: dict[str, Any]) -> str | int:
        time.sleep(0.05)
        return 400 if request["messages"][-1]["content"] == "7" else echo(request)

    with serve(slow) as served:
        endpoint = Endpoint(served.url, "m", num_concurrent=4)
        found = dict(endpoint.map(lambda item: ask(endpoint, str(item)), range(12)))
        assert 2 <= served.most_at_once <= 4
    assert isinstance(found.pop(7), EndpointError)
    assert found == {item: f"<{item}>" for item in range(12) if item != 7}


def test_an_endpoint_that_is_down_is_given_up() -> None:
    with serve(lambda _: 401) as served:
        endpoint = Endpoint(served.url, "m", num_concurrent=2)
        with pytest.raises(EndpointError, match="AuthenticationError"):
            list(endpoint.map(lambda item: ask(endpoint, str(item)), range(1000)))
        assert MAX_FAILURES <= len(served.requests) <= MAX_FAILURES + 6


def test_other_errors_of_the_function_are_raised() -> None:
    endpoint = Endpoint("http://localhost", "m", num_concurrent=2)

    def fail(item: int) -> str:
        raise KeyError(item)

    with pytest.raises(KeyError):
        list(endpoint.map(fail, [1, 2, 3]))


def test_wrong_numbers() -> None:
    with pytest.raises(ValueError, match="num_concurrent=0"):
        Endpoint("http://localhost", "m", num_concurrent=0)
