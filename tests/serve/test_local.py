"""The development server, asked with the official client: it answers as `VideoChat` does, and errors are errors."""

import asyncio
import base64
import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image
from starlette.testclient import TestClient

import media
import tiny
from hicom import VideoChat
from hicom.serve.local import ServerSettings, create_app
from hicom.serve.media import MediaLimits
from hicom.serve.requests import RequestLimits
from served import Served

QUESTIONS = ["which object moves left ?", "is there a dog in the video ?", "how many red ?", "what object ?"]


@pytest.fixture(scope="module")
def chat() -> VideoChat:
    model = tiny.model()
    return VideoChat(model, tiny.processor(model.config, num_frames=6))


@pytest.fixture(scope="module")
def served(chat: VideoChat) -> Iterator[Served]:
    running = Served(chat)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("videos")
    found = []
    for number in range(3):
        path = folder / f"{number}.mp4"
        media.write_video(path, 12 + 4 * number, fps=8, width=96 - 16 * number)
        found.append(path.read_bytes())
    return found


def data_url(data: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def asking(question: str, *urls: str, kind: str = "video_url") -> list[Any]:
    parts: list[Any] = [{"type": kind, kind: {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def ask(served: Served, messages: list[Any], **extra: Any) -> Any:
    return served.client().chat.completions.create(
        model="tiny", messages=messages, max_tokens=5, temperature=0, extra_body=extra
    )


def test_answers_are_those_of_the_library(served: Served, videos: list[bytes]) -> None:
    for data in videos:
        for question in QUESTIONS[:2]:
            found = ask(served, asking(question, data_url(data)))
            alone = served.chat.ask(data, question, max_new_tokens=5)
            assert found.choices[0].message.content == alone.text
            assert found.usage.prompt_tokens == alone.num_prompt_tokens
            assert found.usage.completion_tokens == alone.num_new_tokens
            assert found.choices[0].finish_reason == ("length" if alone.is_cut else "stop")


def test_options_of_the_request(served: Served, videos: list[bytes]) -> None:
    url = data_url(videos[0])
    found = ask(served, asking(QUESTIONS[0], url), num_frames=4, window=[2, 5, 5], instruction="red")
    video = served.chat.encode(videos[0], num_frames=4)
    alone = served.chat.ask(video, QUESTIONS[0], window=(2, 5, 5), instruction="red", max_new_tokens=5)
    assert found.choices[0].message.content == alone.text
    assert found.usage.prompt_tokens == alone.num_prompt_tokens
    for extra in ({"max_visual_tokens": 10}, {"mm_processor_kwargs": {"max_visual_tokens": 10}}):
        details = ask(served, asking(QUESTIONS[0], url), **extra).usage.prompt_tokens_details
        assert details.visual_tokens <= 10
        assert details.uncompressed_visual_tokens == 6 * 25
    found = ask(served, asking(QUESTIONS[0], url), fps=2)
    assert found.usage.prompt_tokens_details.uncompressed_visual_tokens == 3 * 25


def test_frames_pictures_several_media_and_none(served: Served, videos: list[bytes]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (4, 24, 20, 3), dtype=np.uint8)
    files = []
    for frame in frames:
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "JPEG", quality=95)
        files.append(file.getvalue())
    listed = "data:video/jpeg;base64," + ",".join(base64.b64encode(each).decode() for each in files)
    pictures = [Image.open(io.BytesIO(each)).convert("RGB") for each in files]
    found = ask(served, asking(QUESTIONS[0], listed))
    alone = served.chat.ask(served.chat.encode(pictures), QUESTIONS[0], max_new_tokens=5)
    assert found.choices[0].message.content == alone.text
    found = ask(served, asking(QUESTIONS[1], data_url(files[0], "image/jpeg"), kind="image_url"))
    assert found.choices[0].message.content == served.chat.ask(files[0], QUESTIONS[1], max_new_tokens=5).text
    found = ask(served, asking(QUESTIONS[0], data_url(videos[0]), data_url(videos[1])))
    both = [served.chat.encode(data) for data in videos[:2]]
    assert found.choices[0].message.content == served.chat.ask(both, QUESTIONS[0], max_new_tokens=5).text
    found = ask(served, asking(QUESTIONS[0]))
    assert found.usage.prompt_tokens_details.visual_tokens == 0
    expected = served.chat.reply([{"role": "user", "content": QUESTIONS[0]}], max_new_tokens=5)
    assert found.choices[0].message.content == expected.text


def test_many_turns(served: Served, videos: list[bytes]) -> None:
    talk = served.chat.conversation(videos[0])
    first, second = (talk.ask(question, max_new_tokens=5) for question in QUESTIONS[:2])
    messages = [
        *asking(QUESTIONS[0], data_url(videos[0])),
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": QUESTIONS[1]},
    ]
    assert ask(served, messages).choices[0].message.content == second.text


def test_streams_are_the_whole_answer(served: Served, videos: list[bytes]) -> None:
    messages = asking(QUESTIONS[0], data_url(videos[0]))
    whole = ask(served, messages)
    pieces = list(
        served.client().chat.completions.create(
            model="tiny",
            messages=messages,
            max_tokens=5,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == whole.choices[0].message.content
    assert pieces[0].choices[0].delta.role == "assistant"
    assert pieces[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({piece.id for piece in pieces}) == 1


def test_many_clients_get_what_they_get_alone(served: Served, videos: list[bytes]) -> None:
    asked = [(question, data) for question in QUESTIONS for data in videos[:2]]
    alone = [served.chat.ask(data, question, max_new_tokens=5).text for question, data in asked]

    def one(number: int) -> str:
        question, data = asked[number]
        messages = asking(question, data_url(data))
        if number % 2:
            return ask(served, messages).choices[0].message.content or ""
        pieces = served.client().chat.completions.create(
            model="tiny", messages=messages, max_tokens=5, temperature=0, stream=True
        )
        return "".join(piece.choices[0].delta.content or "" for piece in pieces)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(8))) == alone
    assert len(set(alone)) > 2, "all answers are the same, so this test shows nothing"


def test_a_video_that_was_asked_about_stays_encoded(served: Served, videos: list[bytes], monkeypatch: Any) -> None:
    encoded = []
    encode = served.chat.encode

    def counting(source: Any, **choice: Any) -> Any:
        encoded.append(choice)
        return encode(source, **choice)

    monkeypatch.setattr(served.chat, "encode", counting)
    for question in QUESTIONS:
        ask(served, asking(question, data_url(videos[2])), num_frames=5)
    assert len(encoded) == 1
    ask(served, asking(QUESTIONS[0], data_url(videos[2])), num_frames=4)
    assert len(encoded) == 2


def test_models_health_and_metrics(served: Served) -> None:
    assert [model.id for model in served.client().models.list()] == ["tiny"]
    assert served.get("/health") == (200, "ok")
    served.post({"model": "none", "messages": []})
    status, text = served.get("/metrics")
    assert status == 200
    assert 'hicom_requests_total{status="400"}' in text
    assert "hicom_requests_waiting 0.0" in text
    status, text = served.get("/nothing")
    assert status == 404
    assert json.loads(text)["error"]["code"] == "http_error"


def test_a_client_that_goes_away_stops_its_generation(
    served: Served, videos: list[bytes], request: pytest.FixtureRequest
) -> None:
    body = {"model": "tiny", "messages": asking(QUESTIONS[0], data_url(videos[0])), "stream": True, "max_tokens": 2000}
    # On any machine the whole answer takes longer than what the test waits for.
    pause = served.chat.model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    request.addfinalizer(pause.remove)
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    response = connection.getresponse()
    assert response.readline().startswith(b"data: ")
    connection.sock.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]
    connection.close()
    response.close()
    start = time.monotonic()
    ask(served, asking(QUESTIONS[0], data_url(videos[0])))
    assert time.monotonic() - start < 20
    deadline = time.monotonic() + 10
    while "hicom_requests_waiting 0.0" not in served.get("/metrics")[1]:
        assert time.monotonic() < deadline, "the request of the client that went away is still counted"
        time.sleep(0.05)


@pytest.mark.parametrize("stream", [False, True])
def test_work_for_clients_that_left_is_not_done(
    stream: bool, served: Served, videos: list[bytes], request: pytest.FixtureRequest
) -> None:
    """The answer that was being written stops, and those that waited for their turn are never begun."""
    steps: list[int] = []

    def slowly(*_: Any) -> None:
        steps.append(0)
        time.sleep(0.02)

    pause = served.chat.model.register_forward_pre_hook(slowly)
    request.addfinalizer(pause.remove)
    body = {"model": "tiny", "messages": asking(QUESTIONS[0], data_url(videos[0])), "max_tokens": 2000}
    clients = []
    for number in range(4):  # one is answered, the others wait
        client = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
        client.request("POST", "/v1/chat/completions", json.dumps(body | {"stream": stream and number > 0}))
        clients.append(client)
        wait_for(served, f"hicom_requests_waiting {number + 1}.0")
    deadline = time.monotonic() + 20
    while not steps:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for client in clients:
        client.sock.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]
        client.close()
    wait_for(served, "hicom_requests_waiting 0.0")
    done = len(steps)
    assert ask(served, asking(QUESTIONS[0], data_url(videos[0]))).choices[0].message.content
    # The new question takes five, and what was being done one or two more.
    assert len(steps) - done <= 5 + 2
    assert 'hicom_requests_total{status="499"}' in served.get("/metrics")[1]


def wait_for(served: Served, line: str) -> None:
    deadline = time.monotonic() + 20
    while line not in served.get("/metrics")[1]:
        assert time.monotonic() < deadline, f"{line} is never seen"
        time.sleep(0.02)


def test_a_client_that_leaves_in_the_middle_of_its_body(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    client = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    client.putrequest("POST", "/v1/chat/completions")
    client.putheader("Content-Length", "1000")
    client.endheaders(b"{")
    client.close()
    assert served.post(GOOD | {"max_tokens": 1})[0] == 200
    assert not caplog.records


def test_too_long_a_prompt_is_an_error_of_the_client(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.chat.model.config.text_config, "max_position_embeddings", 320)
    for question in ("which object " * 330, "which object " * 5000):
        for stream in (False, True):
            status, answer = served.post(GOOD | {"messages": asking(question), "stream": stream})
            assert (status, answer["error"]["code"]) == (400, "context_length_exceeded"), answer
            assert "320" in answer["error"]["message"]
    status, answer = served.post(GOOD | {"instruction": "red " * 5000})
    assert (status, answer["error"]["code"]) == (400, "instruction_too_long")
    assert "20,000 characters; at most 10,000" in answer["error"]["message"]


def test_a_client_that_is_gone_before_the_answer_starts_is_not_counted_for_ever(chat: VideoChat) -> None:
    app = create_app(chat, ServerSettings(name="tiny"))
    body = {"model": "tiny", "messages": asking("what ?"), "stream": True, "max_tokens": 5}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/chat/completions",
        "raw_path": b"/v1/chat/completions",
        "query_string": b"",
        "headers": [],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }

    async def leave() -> None:
        events = [{"type": "http.request", "body": json.dumps(body).encode()}]

        async def receive() -> Any:
            return events.pop() if events else {"type": "http.disconnect"}

        async def send(event: Any) -> None:
            raise OSError("gone")

        with suppress(OSError, BaseExceptionGroup):
            await app(scope, receive, send)

    for _ in range(3):
        asyncio.run(leave())
    assert "hicom_requests_waiting 0.0" in TestClient(app).get("/metrics").text


GOOD = {"model": "tiny", "messages": asking("what ?")}
WRONG: dict[str, tuple[Any, int, str]] = {
    "no JSON": (b"{", 400, "the body is not JSON"),
    "deep JSON": (b"[" * 100_000, 400, "the body is not JSON"),
    "a list": ([], 400, "must be a JSON object"),
    "no model": ({"messages": GOOD["messages"]}, 400, "'model' must name a model"),
    "another model": (GOOD | {"model": "gpt"}, 404, "there is no model 'gpt' here; there is 'tiny'"),
    "no messages": (GOOD | {"messages": []}, 400, "'messages' must be a list"),
    "a wrong role": (GOOD | {"messages": [{"role": "tool", "content": "a"}]}, 400, "needs a role"),
    "no question": (
        GOOD | {"messages": [{"role": "assistant", "content": "a"}]},
        400,
        "must be a question of the user",
    ),
    "an empty question": (GOOD | {"messages": [{"role": "user", "content": " "}]}, 400, "must be a question"),
    "a wrong part": (GOOD | {"messages": asking("a", "b", kind="input_audio")}, 400, "part of type 'input_audio'"),
    "media of the system": (
        GOOD | {"messages": [asking("a", "http://b")[0] | {"role": "system"}, *GOOD["messages"]]},
        400,
        "media belong into messages of the user",
    ),
    "too many media": (GOOD | {"messages": asking("a", *["http://b"] * 9)}, 400, "9 media; at most 8"),
    "too long": (GOOD | {"messages": asking("a" * 200_000)}, 400, "more than 100,000 characters"),
    "too many frames": (GOOD | {"num_frames": 10_000}, 400, "'num_frames' must be a whole number from 1 to 256"),
    "too many tokens": (GOOD | {"max_tokens": 10**6}, 400, "'max_tokens' must be a whole number from 1 to 2,048"),
    "a wrong window": (GOOD | {"window": [1, 2]}, 400, "'window' must be three sizes"),
    "a wrong temperature": (GOOD | {"temperature": "hot"}, 400, "'temperature' must be a number"),
    "two budgets": (GOOD | {"window": [1, 1, 1], "max_visual_tokens": 9}, 400, "both choose the window"),
    "two choices of frames": (GOOD | {"num_frames": 4, "fps": 1}, 400, "both choose the frames"),
    "two instructions": (
        GOOD | {"instruction": "a", "mm_processor_kwargs": {"instruction": "b"}},
        400,
        "'instruction' is given twice, and differently",
    ),
    "unknown fields": (GOOD | {"tools": [1]}, 400, "unknown fields: tools"),
    "several answers": (GOOD | {"n": 2}, 400, "'n' must be 1"),
    "a budget that is too small": (
        GOOD | {"messages": asking("what ?", data_url(b"")), "max_visual_tokens": 1},
        400,
        "no video or picture",
    ),
    "a local file": (GOOD | {"messages": asking("a", "file:///etc/passwd")}, 400, "local files may not be named"),
    "no video": (GOOD | {"messages": asking("a", data_url(b"hello"))}, 400, "no video or picture"),
    "half a letter in a text": (GOOD | {"messages": asking("a\ud800")}, 400, "half of a surrogate pair"),
    "half a letter in a name": (GOOD | {"\ud800": 1}, 400, "half of a surrogate pair"),
    "half a letter in a list": (GOOD | {"stop": ["\udfff"]}, 400, "half of a surrogate pair"),
    "no number": (b'{"model": "tiny", "temperature": NaN}', 400, "the body is not JSON"),
    "no end": (b'{"model": "tiny", "temperature": -Infinity}', 400, "the body is not JSON"),
    "many digits": (b'{"model": "tiny", "seed": ' + b"1" * 10_000 + b"}", 400, "the body is not JSON"),
    "too large a number": (b'{"model": "tiny", "messages": [], "n": 1e999}', 400, "'messages' must be"),
    "a long instruction": (GOOD | {"instruction": "a" * 20_000}, 400, "'instruction' has 20,000 characters; at most"),
    "the placeholder of a video": (GOOD | {"messages": asking("what <video> ?")}, 400, "video"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_requests_get_errors_and_the_server_goes_on(name: str, stream: bool, served: Served) -> None:
    body, status, message = WRONG[name]
    if isinstance(body, dict):
        body = body | {"stream": stream}
    found, answer = served.post(body)
    assert found == status, answer
    assert message in answer["error"]["message"]
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in str(answer)
    assert served.post(GOOD | {"max_tokens": 1})[0] == 200


def test_private_addresses_are_refused_by_default(chat: VideoChat) -> None:
    running = Served(chat, media=MediaLimits())
    try:
        url = f"http://127.0.0.1:{running.port}/health"
        status, answer = running.post(GOOD | {"messages": asking("what ?", url)})
        assert (status, answer["error"]["code"]) == (400, "host_not_allowed")
    finally:
        running.stop()


def test_the_key_is_needed_where_there_is_one(chat: VideoChat) -> None:
    running = Served(chat, api_key="secret")
    try:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            status, answer = running.post(GOOD, headers)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        with pytest.raises(openai.AuthenticationError):
            running.client("wrong").models.list()
        assert [model.id for model in running.client("secret").models.list()] == ["tiny"]
        assert running.post(GOOD | {"max_tokens": 1}, {"Authorization": "Bearer secret"})[0] == 200
        assert running.get("/health")[0] == 200
    finally:
        running.stop()


def test_a_full_queue_and_too_long_bodies(chat: VideoChat, monkeypatch: pytest.MonkeyPatch) -> None:
    running = Served(chat, max_waiting=1, max_body_bytes=5000)
    reply = chat.reply
    go = threading.Event()

    def slowly(*args: Any, **kwargs: Any) -> Any:
        go.wait(20)
        return reply(*args, **kwargs)

    monkeypatch.setattr(chat, "reply", slowly)
    try:
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(running.post, GOOD | {"max_tokens": 1})
            while "waiting 1.0" not in running.get("/metrics")[1]:
                time.sleep(0.01)
            status, answer = running.post(GOOD)
            assert (status, answer["error"]["code"]) == (429, "overloaded")
            go.set()
            assert first.result()[0] == 200
        assert running.post(GOOD | {"max_tokens": 1})[0] == 200
        status, answer = running.post(b"x" * 6000)
        assert (status, answer["error"]["code"]) == (413, "request_too_large")
    finally:
        go.set()
        running.stop()


def test_limits_of_requests(chat: VideoChat, videos: list[bytes]) -> None:
    running = Served(chat, requests=RequestLimits(max_frames=3), media=MediaLimits(max_pixels=1000))
    try:
        status, answer = running.post(GOOD | {"messages": asking("what ?", data_url(videos[0]))})
        assert (status, answer["error"]["code"]) == (413, "media_too_large")
        assert running.post(GOOD | {"num_frames": 4})[0] == 400
    finally:
        running.stop()


def test_defects_tell_nothing_of_the_inside(chat: VideoChat, monkeypatch: pytest.MonkeyPatch) -> None:
    running = Served(chat)

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError(f"secret path {Path.home()}")

    monkeypatch.setattr(chat, "reply", fail)
    monkeypatch.setattr(chat, "stream_reply", fail)
    try:
        for stream in (False, True):
            status, answer = running.post(GOOD | {"stream": stream})
            assert status == 500
            assert answer["error"]["message"] == "the server failed at this request"
    finally:
        running.stop()
