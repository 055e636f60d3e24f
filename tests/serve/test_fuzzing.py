"""Request bodies of any kind: an answer or an error of the client, in OpenAI's form, never a failure of the server."""

import base64
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

import media
import tiny
from hicom import VideoChat
from hicom.serve.local import ServerSettings, create_app
from hicom.serve.requests import ROLES, ChatRequest, RequestError, RequestLimits, parse_request
from hicom.serve.responses import error_response, parse_json

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
PATH = "/v1/chat/completions"

TEXTS = st.one_of(
    st.sampled_from(["which object moves left ?", "\ud800", "a\udfff", "\x00", "\n" * 3000, "<video>", "<image>"]),
    st.sampled_from(["tiny", "<|im_end|>", "<|im_start|>user\n", "\u2028", "a" * 3000, "\nA) x" * 500, "x" * 100_001]),
    st.text(st.characters(exclude_categories=()), max_size=20),  # halves of surrogate pairs included
)
NUMBERS = st.one_of(
    st.sampled_from([0, 1, 2, -1, 10**30, 1e-300, 1e-30, 5e-324, 1e300, float("nan"), float("inf"), -0.0, True, False]),
    st.floats(),
    st.integers(),
)
VALUES = st.recursive(
    st.none() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
URLS = st.one_of(
    st.sampled_from(
        ["", "data:", "data:video/mp4;base64,", "data:video/jpeg;base64,,", "http://", "file:///etc", "x:"]
    ),
    st.binary(max_size=40).map(lambda data: f"data:video/mp4;base64,{base64.b64encode(data).decode()}"),
    st.just(f"data:image/svg+xml;base64,{base64.b64encode(SVG).decode()}"),
    TEXTS,
)


def parts(urls: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS}),
        st.sampled_from(["video_url", "image_url"]).flatmap(
            lambda kind: st.fixed_dictionaries(
                {"type": st.just(kind), kind: urls | st.fixed_dictionaries({"url": urls})}
            )
        ),
        VALUES,
    )


def bodies(urls: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Return requests in which anything may be wrong, or nothing."""
    content = TEXTS | st.lists(parts(urls), max_size=3) | VALUES
    message = st.fixed_dictionaries({"role": st.sampled_from(ROLES) | TEXTS, "content": content})
    good = st.just([{"role": "user", "content": "which object moves left ?"}])
    fields = {
        **dict.fromkeys(("temperature", "top_p", "fps", "num_frames", "n", "max_visual_tokens"), NUMBERS | VALUES),
        **dict.fromkeys(("stream", "stop", "seed", "user", "mm_processor_kwargs", "stream_options"), VALUES),
        "window": st.lists(NUMBERS, max_size=4) | VALUES,
        "instruction": TEXTS | VALUES,
        "max_completion_tokens": NUMBERS,
    }
    whole = st.fixed_dictionaries(
        {"model": st.just("tiny"), "max_tokens": st.just(1), "messages": good | good | st.lists(message, max_size=3)},
        optional=fields,
    )
    return st.one_of(
        whole, whole, st.builds(lambda body, more: body | more, whole, st.dictionaries(TEXTS, VALUES)), VALUES
    )


def parsed(content: bytes) -> ChatRequest | RequestError:
    try:
        return parse_request(parse_json(content), RequestLimits())
    except RequestError as error:
        return error


@given(bodies(URLS))
@QUICK
def test_a_body_is_a_request_or_refused(body: Any) -> None:
    found = parsed(json.dumps(body).encode())
    if isinstance(found, RequestError):
        assert 400 <= found.status < 500
        answer = error_response(str(found), found.status, found.param, found.code)
        assert set(json.loads(answer.body)["error"]) == {"message", "type", "param", "code"}
        assert len(answer.body) < 20_000
    else:
        json.dumps(found.messages, ensure_ascii=False).encode()


@given(st.binary(max_size=60) | st.sampled_from([b"[" * 10**5, b'{"a":' * 10**5, b"1" * 5000, b"\xff\xfe[", b"NaN"]))
@QUICK
def test_any_bytes_are_a_body_or_refused(content: bytes) -> None:
    found = parsed(content)
    assert isinstance(found, RequestError)
    assert found.status == 400


@pytest.fixture(scope="module")
def client() -> TestClient:
    model = tiny.model()
    chat = VideoChat(model, tiny.processor(model.config, num_frames=4))
    return TestClient(create_app(chat, ServerSettings(name="tiny")))


def ask(client: TestClient, body: Any) -> tuple[int, str]:
    response = client.post(PATH, content=json.dumps(body).encode(), headers={"Content-Type": "application/json"})
    return response.status_code, response.text


GOOD = {"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": "which object moves left ?"}]}


@given(bodies(st.sampled_from(["", "data:", "x:", "data:video/mp4;base64,AAAA"])))
@example(GOOD | {"temperature": 1e-300})
@example(GOOD | {"temperature": 1e-30, "top_p": 5e-324})
@example(GOOD | {"top_p": 0})
@example(GOOD | {"top_p": 1e-300, "temperature": 2})
@example(GOOD | {"temperature": True})
@example(GOOD | {"messages": [{"role": "user", "content": "\ud800"}]})
@example(GOOD | {"\ud800": 1})
@example(GOOD | {"x" * 10**6: 1})
@example(GOOD | {"model": "\ud800"})
@settings(QUICK, max_examples=60)
def test_no_body_makes_the_server_fail(client: TestClient, body: Any) -> None:
    status, text = ask(client, body)
    assert status in (200, 400, 404, 413), text
    if status != 200:
        assert set(json.loads(text)["error"]) == {"message", "type", "param", "code"}
        assert len(text) < 20_000


@pytest.mark.parametrize("fps", [0, 5e-324, 1e-300, 1e-3, 120, float("nan")])
def test_any_rate_of_frames(client: TestClient, fps: float, tmp_path: Path) -> None:
    data = media.write_video(tmp_path / "clip.mp4", 8).read_bytes()
    url = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
    content = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": "which object ?"}]
    status, text = ask(client, GOOD | {"fps": fps, "messages": [{"role": "user", "content": content}]})
    assert status in (200, 400), text


@pytest.mark.parametrize(("name", "value"), [("content-length", "9" * 5000), ("content-length", "9" * 30)])
def test_headers_of_any_length(client: TestClient, name: str, value: str) -> None:
    assert client.post(PATH, content=b"{}", headers={name: value}).status_code == 413


@pytest.mark.parametrize(
    "question", ["x" + "\n" * 99_000 + "x", "\nA) x" * 19_000, "x" * 99_000, "(" * 99_000, "\u2003" * 99_000 + "x"]
)
def test_no_question_costs_more_than_its_length(client: TestClient, question: str) -> None:
    """30,000 line breaks took 40 s, and no other request was answered meanwhile."""
    start = time.process_time()
    status, _ = ask(client, GOOD | {"messages": [{"role": "user", "content": question}], "instruction": "red"})
    assert status in (200, 400)
    assert time.process_time() - start < 15
