"""What a server lets in: places before bodies, bounded memory for all requests together, and who may look at it."""

import base64
import contextlib
import io
import json
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import hicom
import media
from bombs import CONCAT, DASH, PLAYLIST, SDP
from hicom import VideoChat
from hicom.serve.backends import LocalBackend
from hicom.serve.media import MediaLimits
from hicom.serve.memory import Hold, Memory
from hicom.serve.requests import RequestError
from served import Served

ASSETS = Path(hicom.__file__).parent / "assets"
DEMO = (ASSETS / "demo.mp4").read_bytes()


@pytest.fixture(scope="module")
def chat() -> VideoChat:
    return VideoChat.from_pretrained("hicom-tiny", device="cpu")


@pytest.fixture
def serve(chat: VideoChat) -> Iterator[Callable[..., Served]]:
    running: list[Served] = []

    def start(**settings: Any) -> Served:
        running.append(Served(chat, **settings))
        return running[-1]

    yield start
    for each in running:
        each.stop()


def data_url(data: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def asking(*urls: str, kind: str = "video_url", **fields: Any) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": kind, kind: {"url": url}} for url in urls]
    content.append({"type": "text", "text": "What happens?"})
    return {"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": content}]} | fields


def picture(kind: str, num_frames: int = 1) -> bytes:
    frames = [Image.fromarray(np.full((24, 32, 3), 40 * number, np.uint8)) for number in range(num_frames)]
    file = io.BytesIO()
    frames[0].save(file, kind, **({"save_all": True, "append_images": frames[1:]} if num_frames > 1 else {}))
    return file.getvalue()


def waiting(served: Served) -> float:
    return float(served.get("/metrics")[1].partition("\nhicom_requests_waiting ")[2].partition("\n")[0])


def upload(served: Served, length: int, sent: bytes = b"") -> socket.socket:
    """Begin to send a request."""
    line = socket.create_connection(("127.0.0.1", served.port), timeout=20)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n"
    line.sendall(head.encode() + sent)
    return line


def answer(line: socket.socket) -> tuple[int, dict[str, Any]]:
    received = b""
    while b"\r\n\r\n" not in received or not received.endswith(b"}"):
        piece = line.recv(65536)
        assert piece, received
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


class Slow:
    """Makes a model wait until it is told to go on."""

    def __init__(self, chat: VideoChat, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        reply = chat.reply

        def slowly(*args: Any, **kwargs: Any) -> Any:
            self.go.wait(20)
            return reply(*args, **kwargs)

        monkeypatch.setattr(chat, "reply", slowly)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_body_is_read_only_where_there_is_a_place(serve: Callable[..., Served]) -> None:
    served = serve(max_waiting=2)
    first = [upload(served, 10**6) for _ in range(2)]
    until(lambda: waiting(served) == 2)
    third = upload(served, 300 * 10**6)
    status, body = answer(third)
    assert (status, body["error"]["code"]) == (429, "overloaded")
    for line in (*first, third):
        line.close()
    until(lambda: waiting(served) == 0)
    assert served.post(asking(data_url(DEMO)))[0] == 200


def test_a_body_that_does_not_arrive_gives_its_place_back(serve: Callable[..., Served]) -> None:
    served = serve(max_waiting=1, upload_timeout_s=0.5)
    with upload(served, 10**6, b"{" * 1000) as line:
        status, body = answer(line)
        assert (status, body["error"]["code"]) == (408, "request_timeout")
    until(lambda: waiting(served) == 0)
    assert served.post(asking(data_url(DEMO)))[0] == 200


def test_clients_that_leave_while_they_send(serve: Callable[..., Served], caplog: pytest.LogCaptureFixture) -> None:
    served = serve(max_waiting=8)
    with caplog.at_level(logging.ERROR):
        for sent in (b"", b"{", b"{" * 100_000):
            upload(served, 10**6, sent).close()
        until(lambda: waiting(served) == 0)
        assert served.post(asking(data_url(DEMO)))[0] == 200
    assert caplog.records == []


def test_memory_of_all_requests_is_bounded(
    serve: Callable[..., Served], chat: VideoChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(json.dumps(asking(data_url(DEMO)))) + len(DEMO)
    served = serve(media=MediaLimits(max_held_bytes=size * 3 // 2))
    slow = Slow(chat, monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(served.post, asking(data_url(DEMO)))
        until(lambda: waiting(served) == 1)
        time.sleep(0.3)
        status, body = served.post(asking(data_url(DEMO)))
        assert (status, body["error"]["code"]) == (503, "overloaded")
        assert "try again later" in body["error"]["message"]
        slow.go.set()
        assert first.result()[0] == 200
    assert served.post(asking(data_url(DEMO)))[0] == 200
    assert served.post(asking(data_url(DEMO), stream=True, model="other"))[0] == 404
    assert served.post(asking(data_url(DEMO)))[0] == 200, "refused requests hold on to memory"


def test_a_request_larger_than_the_memory_of_all(serve: Callable[..., Served]) -> None:
    served = serve(media=MediaLimits(max_held_bytes=len(DEMO) * 5 // 2))
    assert served.post(asking(data_url(DEMO)))[0] == 200  # its text and its bytes: 7 / 3
    status, body = served.post(asking(data_url(DEMO), data_url(DEMO)))
    assert (status, body["error"]["code"]) == (413, "request_too_large")


def test_what_is_fetched_counts(serve: Callable[..., Served], tmp_path: Path) -> None:
    import functools
    import http.server

    (tmp_path / "demo.mp4").write_bytes(DEMO)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    site = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{site.server_port}/demo.mp4"
    try:
        served = serve(media=MediaLimits(allow_private=True, max_held_bytes=2 * len(DEMO)))
        assert served.post(asking(url))[0] == 200
        assert served.post(asking(url, url))[0] == 413
        assert served.post(asking(url))[0] == 200
    finally:
        site.shutdown()
        site.server_close()


def test_a_request_that_is_over_takes_nothing_more() -> None:
    memory = Memory(100)
    with Hold(memory) as hold:
        hold.take(60)
        with Hold(memory) as other, pytest.raises(RequestError, match="try again later"):
            other.take(41)
        hold.take(40)
        with pytest.raises(RequestError, match="more than 100 bytes"):
            hold.take(1)
    assert memory.used == 0
    with pytest.raises(RequestError, match="is over"):
        hold.take(1)
    hold.close()
    assert memory.used == 0


def test_what_needs_the_key(serve: Callable[..., Served]) -> None:
    served = serve(api_key="secret")
    assert served.get("/health")[0] == 200
    for path in ("/metrics", "/v1/models", "/", "/metrics/", "//metrics", "/nothing"):
        assert served.get(path)[0] == 401, path
    import http.client

    line = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    line.request("GET", "/metrics", headers={"Authorization": "Bearer secret"})
    response = line.getresponse()
    assert response.status == 200
    assert b"hicom_requests_waiting" in response.read()


@pytest.fixture(scope="module")
def open_server(chat: VideoChat) -> Iterator[Served]:
    running = Served(chat)
    yield running
    running.stop()


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("video/mp4", DEMO),
        ("image/jpeg", DEMO),
        ("image/gif", picture("GIF", 3)),
        ("image/png", picture("PNG", 3)),
        ("image/webp", picture("WEBP", 3)),
    ],
)
def test_a_video_is_no_image(kind: str, data: bytes, open_server: Served) -> None:
    status, body = open_server.post(asking(data_url(data, kind), kind="image_url"))
    assert (status, body["error"]["code"]) == (400, "video_as_image")
    assert "send it as video_url" in body["error"]["message"]
    assert open_server.post(asking(data_url(data, kind)))[0] == 200


@pytest.mark.parametrize(("kind", "num"), [("PNG", 1), ("JPEG", 1), ("GIF", 1), ("WEBP", 1), ("BMP", 1), ("TIFF", 3)])
def test_a_picture_is_an_image_and_a_video_of_one_frame(kind: str, num: int, open_server: Served) -> None:
    url = data_url(picture(kind, num), "image/png")
    for way in ("image_url", "video_url"):
        status, body = open_server.post(asking(url, kind=way))
        assert status == 200, body
    listed = data_url(picture("JPEG"), "video/jpeg")
    assert open_server.post(asking(listed, kind="image_url"))[0] == 200
    assert open_server.post(asking(f"{listed},{listed.partition(',')[2]}", kind="image_url"))[0] == 400


@pytest.mark.parametrize(
    "data",
    [
        b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'><rect width='9' height='9'/></svg>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        SDP.format(15006).encode(),
        PLAYLIST.format("/etc/hostname").encode(),
        CONCAT.format("demo.mp4").encode(),
        DASH.format("demo.mp4").encode(),
        b"hello",
        b"\0" * 1000,
    ],
)
@pytest.mark.parametrize("kind", ["video/mp4", "image/svg+xml", "video/jpeg"])
def test_other_contents_are_refused_at_once(
    kind: str, data: bytes, open_server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ASSETS)
    start = time.monotonic()
    for way in ("image_url", "video_url"):
        status, body = open_server.post(asking(data_url(data, kind), kind=way))
        assert (status, body["error"]["code"]) == (400, "invalid_media"), body
    assert time.monotonic() - start < 5


def test_pages_of_other_sites_may_not_ask(open_server: Served) -> None:
    body = asking(data_url(DEMO))
    here = f"127.0.0.1:{open_server.port}"
    for origin in ("https://evil.example", "http://localhost:1", f"http://evil.{here}", f"https://{here}.evil.example"):
        status, found = open_server.post(body, {"Origin": origin, "Content-Type": "text/plain"})
        assert (status, found["error"]["code"]) == (403, "cross_site"), origin
    for origin in (f"http://{here}", "chrome-extension://abc", "null", "file://", "app://x"):
        assert open_server.post(body, {"Origin": origin})[0] == 200, origin


def test_two_lengths_are_refused(open_server: Served) -> None:
    with socket.create_connection(("127.0.0.1", open_server.port), timeout=20) as line:
        inner = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        line.sendall(head + b"0\r\n\r\n" + inner)
        received = b""
        with contextlib.suppress(TimeoutError):
            line.settimeout(2)
            while piece := line.recv(65536):
                received += piece
    assert received.startswith(b"HTTP/1.1 400")
    assert b"200 OK" not in received, "what came behind was taken for a request"


# Memory


ATTACK = """
import base64, json
from starlette.testclient import TestClient
from bombs import peak_mb, png
from hicom import VideoChat
from hicom.serve.local import ServerSettings, create_app
client = TestClient(create_app(VideoChat.from_pretrained("hicom-tiny", device="cpu"), ServerSettings(name="tiny")))
def post(*frames):
    url = "data:video/jpeg;base64," + ",".join(base64.b64encode(frame).decode() for frame in frames)
    content = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": "What happens?"}]
    body = json.dumps({"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": content}]})
    return len(body), client.post("/v1/chat/completions", content=body).status_code
post(*[png(64, 64)] * 16)
before = peak_mb()
print(*post(*[png(3072, 3072)] * 16), peak_mb() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the memory")
def test_memory_of_a_small_request() -> None:
    """The blank frames of a request of 30 kB took half a gigabyte, those of one of 330 kB 7.4."""
    paths = [str(Path(hicom.__file__).parents[1]), str(Path(__file__).parents[1])]
    code = f"import sys; sys.path[:0] = {paths}{ATTACK}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    num_bytes, status, grown_mb = done.stdout.split()[-3:]
    assert status == "200"
    assert int(num_bytes) < 50_000
    assert float(grown_mb) < 250


# Uploads to the page


@pytest.mark.parametrize("name", ["x.m3u8", "x.ffconcat", "x.mpd", "x.sdp", "x.mp4", "x.mkv"])
@pytest.mark.parametrize("text", [PLAYLIST, CONCAT, DASH], ids=["hls", "concat", "dash"])
def test_an_upload_shows_no_other_file(
    chat: VideoChat, tmp_path: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "private").mkdir()
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    film = tmp_path / "private" / "film.ts"
    media.write_video(film, 12, fps=8)
    (uploads / "near.ts").write_bytes(film.read_bytes())
    monkeypatch.chdir(uploads)
    backend = LocalBackend(chat)
    question = [{"role": "user", "content": "What happens?"}]
    for target in (str(film), f"file://{film}", "../private/film.ts", "near.ts"):
        (uploads / name).write_text(text.format(target))
        with pytest.raises(ValueError, match="no video or picture"):
            next(backend.reply(uploads / name, question, 4, None))
    next(backend.reply(uploads / "near.ts", question, 4, None))


def test_an_upload_opens_no_socket(chat: VideoChat, tmp_path: Path) -> None:
    for name in ("x.sdp", "x.mp4"):
        (tmp_path / name).write_text(SDP.format(15008))
        start = time.monotonic()
        with pytest.raises(ValueError, match="no video or picture"):
            next(LocalBackend(chat).reply(tmp_path / name, [{"role": "user", "content": "What?"}], 4, None))
        assert time.monotonic() - start < 5, "it waited for packets"
