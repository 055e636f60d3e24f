"""What stands before vLLM's server, in front of a server that tells what reached it."""

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from hicom.serve.media import MediaLimits
from hicom.serve.requests import RequestLimits
from hicom.serve.vllm_http import CHAT, MODELS, RequestGuard, VLLMSettings

VIDEO = {"type": "video_url", "video_url": {"url": "https://example.com/clip.mp4"}}


def chat(*parts: Any, **fields: Any) -> dict[str, Any]:
    content = [*parts, {"type": "text", "text": "Who?"}]
    return {"model": "m", "messages": [{"role": "user", "content": content}]} | fields


@pytest.fixture
def reached() -> list[bytes]:
    return []


@pytest.fixture
def client(reached: list[bytes], monkeypatch: pytest.MonkeyPatch) -> TestClient:
    monkeypatch.setenv("HICOM_SERVE", "")
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    VLLMSettings(max_body_bytes=10_000, requests=RequestLimits(max_frames=16, max_media=2)).to_environment()
    return TestClient(guarded(reached))


def guarded(reached: list[bytes]) -> RequestGuard:
    async def tell(request: Request) -> Response:
        reached.append(await request.body())
        assert int(request.headers.get("content-length", 0)) == len(reached[-1])
        return JSONResponse({"seen": len(reached[-1])})

    paths = (CHAT, "/v1/completions", "/v1/models", "/sleep")
    return RequestGuard(Starlette(routes=[Route(path, tell, methods=["GET", "POST"]) for path in paths]))


def passed(client: TestClient, reached: list[bytes], body: dict[str, Any], path: str = CHAT) -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    found = json.loads(reached[-1])
    assert isinstance(found, dict)
    return found


def test_settings_reach_other_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HICOM_SERVE", "")
    media = MediaLimits(max_bytes=7, allowed_hosts=("example.com",), allowed_folders=(tmp_path,), allow_private=True)
    settings = VLLMSettings(max_body_bytes=5, media=media, requests=RequestLimits(max_frames=3), toy_note="it is a toy")
    settings.to_environment()
    assert VLLMSettings.from_environment() == settings
    monkeypatch.delenv("HICOM_SERVE")
    assert VLLMSettings.from_environment() == VLLMSettings()


def test_fields_of_vllm_go_through_as_they_are(client: TestClient, reached: list[bytes]) -> None:
    body = chat(VIDEO, logprobs=True, top_k=3, seed=1, tools=[])
    response = client.post(CHAT, content=json.dumps(body, indent=3))
    assert response.status_code == 200
    assert reached == [json.dumps(body, indent=3).encode()]


def test_our_fields_go_where_vllm_has_them(client: TestClient, reached: list[bytes]) -> None:
    found = passed(client, reached, chat(VIDEO, instruction="red", window=[4, 3, 3], num_frames=4, temperature=0))
    assert found["mm_processor_kwargs"] == {"instruction": "red", "window": [4, 3, 3]}
    assert found["media_io_kwargs"] == {"video": {"num_frames": 4}}
    assert found["temperature"] == 0
    assert not {"instruction", "window", "num_frames"} & set(found)
    found = passed(client, reached, chat(VIDEO, fps=2, mm_processor_kwargs={"max_visual_tokens": 9}))
    assert found["mm_processor_kwargs"] == {"max_visual_tokens": 9}
    assert found["media_io_kwargs"] == {"video": {"fps": 2.0, "max_frames": 16}}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (chat(VIDEO, num_frames=17), "'num_frames' must be a whole number from 1 to 16"),
        (chat(VIDEO, num_frames=4, fps=1), "both choose the frames"),
        (chat(VIDEO, window=[4, 3, 3], max_visual_tokens=9), "both choose the window"),
        (chat(VIDEO, window=[4, 3]), "'window' must be three sizes"),
        (chat(VIDEO, instruction=" "), "'instruction' must be text"),
        (chat(VIDEO, instruction="a", mm_processor_kwargs={"instruction": "b"}), "given twice, and differently"),
        (chat(VIDEO, mm_processor_kwargs={"max_frames": 10**6}), "not 'max_frames'"),
        (chat(VIDEO, mm_processor_kwargs=[1]), "'mm_processor_kwargs' must be an object"),
        (chat(VIDEO, media_io_kwargs={"video": {"num_frames": 10**6}}), "'media_io_kwargs' is not taken"),
        (chat(VIDEO, VIDEO, VIDEO), "there are 3 media; at most 2 are taken"),
        (chat() | {"messages": [{}] * 65}, "there are 65 messages; at most 64 are taken"),
        ([1], "the body must be a JSON object"),
    ],
)
def test_what_is_wrong_does_not_reach_vllm(body: Any, message: str, client: TestClient, reached: list[bytes]) -> None:
    response = client.post(CHAT, json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert reached == []


def test_odd_messages_are_for_vllm_to_refuse(client: TestClient, reached: list[bytes]) -> None:
    for messages in (None, "x", [1, None], [{"content": 3}], [{"content": [1, None, {"type": "text"}]}]):
        assert passed(client, reached, {"messages": messages}) == {"messages": messages}


def test_other_endpoints_take_no_arguments_for_media(client: TestClient, reached: list[bytes]) -> None:
    assert passed(client, reached, {"prompt": "x"}, "/v1/completions") == {"prompt": "x"}
    for name in ("mm_processor_kwargs", "media_io_kwargs"):
        response = client.post("/v1/completions", json={"prompt": "x", name: {"video": {"num_frames": 10**6}}})
        assert response.status_code == 400
        assert f"'{name}' is for {CHAT}" in response.json()["error"]["message"]


def test_too_long_and_broken_bodies(client: TestClient, reached: list[bytes]) -> None:
    assert client.post(CHAT, content=b"x" * 10_001).status_code == 413
    # Without a length beforehand.
    assert client.post(CHAT, content=(b"x" * 1000 for _ in range(100))).status_code == 413
    for body in (b"{", b"\xff", b"[" * 5000):
        response = client.post(CHAT, content=body)
        assert response.status_code == 400
        assert response.json()["error"]["message"] == "the body is not JSON"
    assert reached == []


def test_requests_without_a_body_go_through(client: TestClient, reached: list[bytes]) -> None:
    assert client.get("/v1/models").status_code == 200
    assert client.post("/sleep").status_code == 200
    assert reached == [b"", b""]


def test_without_the_key_nothing_goes_through(reached: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    client = TestClient(guarded(reached))
    for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "secret"}):
        response = client.post(CHAT, content=b"{}", headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
    assert client.post(CHAT, content=b"{}", headers={"Authorization": "Bearer secret"}).status_code == 200
    assert reached == [b"{}"]


@pytest.mark.parametrize("note", ["", 'it is a toy, "so to say"'])
def test_a_toy_says_that_it_is_one(note: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whole answers, in streamed ones and in the list of models; errors and other endpoints stay as they are."""
    answer = {"id": "1", "choices": [{"message": {"content": "red"}}]}
    models = {"object": "list", "data": [{"id": "m"}, {"id": "n"}]}
    pieces = [b'data: {"id":"1","choices":[{"delta":{"content":"re"}}]}\n\n', b'data: {"id":"1"}\n\ndata: [DONE]\n\n']

    async def tell(request: Request) -> Response:
        if request.url.path == MODELS:
            return JSONResponse(models)
        asked = await request.json()
        if asked.get("stream"):
            return StreamingResponse(iter(pieces), media_type="text/event-stream")
        return JSONResponse(answer, status_code=asked.get("status", 200))

    monkeypatch.setenv("HICOM_SERVE", "")
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    VLLMSettings(toy_note=note).to_environment()
    paths = (CHAT, "/v1/completions", MODELS)
    client = TestClient(RequestGuard(Starlette(routes=[Route(path, tell, methods=["GET", "POST"]) for path in paths])))
    response = client.post(CHAT, json={})
    assert int(response.headers["content-length"]) == len(response.content)
    assert response.json() == answer | ({"notes": [note]} if note else {})
    response = client.get(MODELS)
    assert int(response.headers["content-length"]) == len(response.content)
    assert response.json()["data"] == [{"id": "m"} | ({"description": note} if note else {}), {"id": "n"}]
    first, second, done, _ = client.post(CHAT, json={"stream": True}).text.split("\n\n")
    assert json.loads(first.removeprefix("data: ")).get("notes", []) == [note] * bool(note)
    assert [second, done] == ['data: {"id":"1"}', "data: [DONE]"]
    assert client.post(CHAT, json={"status": 400}).json() == answer
    assert client.post("/v1/completions", json={}).json() == answer
