"""Attacks on a live server, on what fetches media, and on the page: see `hostile.py`."""

from __future__ import annotations

import base64
import http.client
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import hostile_files
import numpy as np
from hostile_child import LONGEST_ERROR, Outcome, resident_mb
from hostile_files import Case
from hostile_hosts import INSIDE, QUESTION

MODEL = "hicom-tiny"
SECONDS = 10.0
"""That a request may take."""
HEALTH_SECONDS = 2.0
"""That `/health` may take meanwhile: nothing may hold the whole server."""
MEGABYTES = 600
"""That a request may add to the server's memory."""


@dataclass(frozen=True)
class Attack:
    """A request.

    Attributes:
        group: of attacks.
        name: of this one.
        body: of a chat, as JSON or as it is.
        statuses: that are right.
        code: of the error that is right; "": any.
        do: what is done in place of one request; returns status and body.
    """

    group: str
    name: str
    body: Any = None
    statuses: tuple[int, ...] = (400,)
    code: str = ""
    do: Callable[[Server], tuple[int, bytes]] | None = None


@dataclass
class Server:
    """A live server.

    Attributes:
        process: of `hicom serve`.
        port: that it listens at.
        key: that it asks for.
        health_s: longest time that `/health` took since this was set to 0.
    """

    process: subprocess.Popen[bytes]
    port: int
    key: str = ""
    health_s: float = 0.0
    stopped: threading.Event = field(default_factory=threading.Event)

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        """Send a request and return status and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS + 5)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request(method, path, data, headers or {})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def chat(self, body: Any) -> tuple[int, bytes]:
        """Send a chat and return status and body."""
        return self.ask("POST", CHAT, body)

    def raw(self, data: bytes) -> tuple[int, bytes]:
        """Send bytes and return what comes back, as status and all of it."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS) as connection:
            found = b""
            with suppress(ConnectionError):
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                while piece := connection.recv(2**16):
                    found += piece
        words = found.split(maxsplit=2)
        return (int(words[1]) if len(words) > 1 and words[1].isdigit() else 400), found

    def watch(self) -> None:
        """Ask for `/health` again and again."""
        while not self.stopped.wait(0.1):
            start = time.perf_counter()
            with suppress(OSError, http.client.HTTPException):
                self.ask("GET", "/health")
            self.health_s = max(self.health_s, time.perf_counter() - start)


@contextmanager
def serving(*options: str, key: str = "") -> Iterator[Server]:
    """Run `hicom serve --engine local`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-m", "hicom", "serve", MODEL, "--engine", "local", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*command, "--port", str(port), *options], stderr=log, env=environment)
        server = Server(process, port, key)
        watcher = threading.Thread(target=server.watch, daemon=True)
        try:
            for _ in range(600):
                with suppress(OSError, http.client.HTTPException):
                    if server.ask("GET", "/health")[0] == 200:
                        break
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"the server does not start: {log.read().decode()[-500:]}")
                time.sleep(0.1)
            server.chat(chat(QUESTION, data_url(DEMO)))  # what a first request alone takes is not an attack's
            watcher.start()
            yield server
        finally:
            server.stopped.set()
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


CHAT = "/v1/chat/completions"
POST = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\n".encode()
DEMO = (Path(__file__).parents[1] / "src" / "hicom" / "assets" / "demo.mp4").read_bytes()


def data_url(data: bytes, kind: str = "video/mp4") -> str:
    """Return a data URL."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def chat(question: Any, *urls: str, kind: str = "video_url", **fields: Any) -> dict[str, Any]:
    """Return the body of a chat about media."""
    parts: list[Any] = [{"type": kind, kind: {"url": url}} for url in urls]
    content = [*parts, {"type": "text", "text": question}]
    body = {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0}
    return body | fields


def run(server: Server, attack: Attack) -> Outcome:
    """Attack, and return what became of it."""
    with suppress(OSError):
        Path(f"/proc/{server.process.pid}/clear_refs").write_text("5", "ascii")  # the peak is that of now
    before, start = resident_mb(server.process.pid), time.perf_counter()
    server.health_s = 0.0
    group = f"server: {attack.group}"
    try:
        status, body = server.chat(attack.body) if attack.do is None else attack.do(server)
    except TimeoutError:
        status, body = 0, b""
    except (OSError, http.client.HTTPException) as error:
        status, body = -1, repr(error).encode()
    seconds = time.perf_counter() - start
    time.sleep(0.15)  # a health check that waited may end
    megabytes = round(peak_mb(server.process.pid) - before, 1)
    result, text = judged(server, attack, status, body, seconds)
    if result not in ("signal", "hang") and megabytes > MEGABYTES:
        result, text = "memory", f"{megabytes:,.0f} MB; {result}: {text}"
    return Outcome(group, attack.name, result, text, round(seconds, 3), megabytes)


def judged(server: Server, attack: Attack, status: int, body: bytes, seconds: float) -> tuple[str, str]:
    """Return the result of an attack, and what is to be said of it."""
    if server.process.poll() is not None:
        return "signal", f"the server ended with {server.process.returncode}"
    if status == 0 or seconds > SECONDS:
        return "hang", f"no answer within {SECONDS:g} s"
    if server.health_s > HEALTH_SECONDS:
        return "hang", f"/health took {server.health_s:.1f} s meanwhile"
    text = body.decode("utf-8", "replace")
    if status == 500 or "Traceback" in text:
        return "traceback", f"{status}: {text}"
    if status not in attack.statuses:
        return "wrong answer", f"status {status}, not {' or '.join(map(str, attack.statuses))}: {text}"
    if status < 400:
        return "answered", ""
    with suppress(ValueError, KeyError, TypeError):
        error = json.loads(text)["error"]
        if attack.code and error["code"] != attack.code:
            return "wrong answer", f"code {error['code']!r}, not {attack.code!r}: {text}"
        message = error["message"]
        inside = ("/src/", "site-packages", "codec can't", "Error:", "\n", "0x")
        if len(message) <= LONGEST_ERROR and not any(each in message for each in inside):
            return "clear error", message
        return "unclear error", message
    # What is no request of HTTP is answered by the HTTP server itself.
    return ("clear error", text) if attack.group == "http" else ("unclear error", text)


def peak_mb(process: int) -> float:
    """Return the largest memory that a process held, in MB."""
    with suppress(OSError, StopIteration):
        lines = Path(f"/proc/{process}/status").read_text("ascii").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
    return 0.0


# Requests


def bodies() -> Iterator[Attack]:
    """Yield bodies that are no chats, or odd ones."""
    good = chat("Who?", data_url(DEMO))
    raw = {
        "no JSON": b"{",
        "deep JSON": b"[" * 100_000,
        "deep JSON in a message": b'{"model":"hicom-tiny","messages":' + b"[" * 50_000,
        "no UTF-8": b"\xff\xfe",
        "nothing": b"",
        "a number": b"1" * 5000,
        "keys twice": b'{"model":"hicom-tiny","model":"x","messages":[{"role":"user","content":"Who?"}]}',
        "NaN": json.dumps(good | {"temperature": float("nan")}).encode(),
        "an infinity": b'{"model":"hicom-tiny","temperature":1e999,"messages":[{"role":"user","content":"Who?"}]}',
    }
    for name, body in raw.items():
        yield Attack("bodies", name, body, (400, 404))
    either = (200, 400)
    yield Attack("bodies", "a lone surrogate", chat("\ud800"), either)
    yield Attack("bodies", "a lone surrogate as a field", good | {"\ud800": 1})
    yield Attack("bodies", "a lone surrogate as the model", good | {"model": "\ud800"}, (400, 404))
    yield Attack("bodies", "a lone surrogate as the instruction", good | {"instruction": "\ud800"}, either)
    for value in (1e-300, 1e-30, 5e-324, -0.0, 2.0000001, 10**400, True, "1", [], {}):
        yield Attack("bodies", f"temperature {str(value)[:12]}", good | {"temperature": value}, either)
    for value in (0, -1, 1e-300, 1.5, None, "x"):
        yield Attack("bodies", f"top_p {value}", good | {"temperature": 1, "top_p": value}, either)
    for name in ("num_frames", "max_visual_tokens", "max_tokens", "fps"):
        for value in (0, -1, 10**30, 1e308, "8", [8], {"a": 1}):
            yield Attack("bodies", f"{name} {str(value)[:12]}", good | {name: value}, either)
    for value in ([0, 0, 0], [10**9] * 3, [1, 2], "4,4,4", [1e9, 1, 1], [[1], 1, 1]):
        yield Attack("bodies", f"window {value}", good | {"window": value}, either)
    for role in ("tool", "developer", "", None, 7, ["user"]):
        yield Attack("bodies", f"role {role!r}", good | {"messages": [{"role": role, "content": "Who?"}]}, either)
    for content in (None, 3, [], [None], [{}], [{"type": "text"}], [{"type": "video_url"}], {"text": "x"}, ""):
        messages = [{"role": "user", "content": content}]
        yield Attack("bodies", f"content {content!r}", good | {"messages": messages}, either)
    yield Attack(
        "bodies",
        "too long by its length",
        do=partial(Server.raw, data=POST + b"Content-Length: 99999999999\r\n\r\n{}"),
        statuses=(413, 400),
    )
    rng = np.random.default_rng(28)
    odd = (None, 0, -1, 1e300, "", "x", "\u0000", "\ud800", [], {}, [[]], True, 10**100)
    names = (
        "model",
        "messages",
        "max_tokens",
        "temperature",
        "top_p",
        "stream",
        "stream_options",
        "n",
        "stop",
        "seed",
        "instruction",
        "window",
        "num_frames",
        "fps",
        "max_visual_tokens",
        "mm_processor_kwargs",
        "tools",
        "user",
    )
    for number in range(60):
        chosen = {str(name): odd[int(rng.integers(len(odd)))] for name in rng.choice(names, 3, replace=False)}
        yield Attack("bodies", f"random fields {number}: {', '.join(chosen)}", good | chosen, (200, 400, 404))


def texts() -> Iterator[Attack]:
    """Yield texts that expressions or tokenizers may be slow at, and such that no context has room for."""
    either = (200, 400)
    repeated = {
        "newlines": "\n", "blanks": " ", "blank lines": "\n \t", "options": "\nA) x", "brackets": "(A) ",
        "questions": "\nquestion", "colons": "Options:\n", "letters": "A. B. C. D. ",
        "answers": "Answer with the letter", "roles": "<|im_start|>user\n", "placeholders": "<video>",
        "marks": "?!.", "wide": "\u3000", "joined": "e\u0301",
        "zero width": "\u200d", "right to left": "\u202e",
    }  # fmt: skip
    for name, piece in repeated.items():
        text = f"x{(piece * 30_000)[:30_000]}x"
        yield Attack("texts", f"30,000 characters of {name}", chat(text, data_url(DEMO)), either)
    words = "word " * 19_600
    yield Attack("texts", "98,000 characters of words", chat(words, data_url(DEMO)))
    yield Attack("texts", "98,000 characters, streamed", chat(words, data_url(DEMO), stream=True))
    yield Attack("texts", "an instruction of 98,000 characters", chat("Who?", data_url(DEMO), instruction=words))
    yield Attack("texts", "an instruction of 20 MB", chat("Who?", data_url(DEMO), instruction="x " * 10**7))
    yield Attack("texts", "an answer of 2,048 tokens", chat(QUESTION, data_url(DEMO), max_tokens=2048), either)


def media(cases: Sequence[Case]) -> Iterator[Attack]:
    """Yield media that are none, too large, or would let a client reach inside."""
    for case in cases:
        if case.is_refused:
            yield Attack("media", case.name, chat(QUESTION, data_url(case.data)))
        elif case.kind != "made":
            yield Attack("media", case.name, chat(QUESTION, data_url(case.data)), (200, 400))
    blank = hostile_files.png(3072, 3072)
    for number in (40, 200):
        frames = ",".join([base64.b64encode(blank).decode()] * number)
        url = f"data:video/jpeg;base64,{frames}"
        yield Attack("media", f"{number} frames of 3072x3072", chat(QUESTION, url), (200, 400, 413))
    yield Attack("media", "100,000 frames", chat(QUESTION, "data:video/jpeg;base64," + "AAAA," * 100_000), (400, 413))
    for side in (12_000, 60_000):
        picture = hostile_files.png(side, side)
        yield Attack(
            "media",
            f"a picture of {side}x{side}",
            chat(QUESTION, data_url(picture, "image/png"), kind="image_url"),
            (400, 413),
        )
    yield Attack("media", "a video as image_url", chat(QUESTION, data_url(DEMO), kind="image_url"))
    yield Attack("media", "9 media", chat(QUESTION, *[data_url(DEMO)] * 9))
    yield Attack("media", "no base64", chat(QUESTION, "data:video/mp4;base64,####"))
    yield Attack("media", "no data", chat(QUESTION, "data:,"))
    for url in (
        "file:///etc/passwd",
        "file:///proc/self/environ",
        "ftp://example.com/a.mp4",
        "/etc/passwd",
        "concat:a|b",
        "javascript:1",
        "blob:x",
        "http:///a",
        "http://",
        "//example.com",
        "http://[::1",
        "HTTP://\x00/",
    ):
        yield Attack("media", url, chat(QUESTION, url))
    for host in INSIDE:
        yield Attack("media", f"host {host}", chat(QUESTION, f"http://{host}/a.mp4"), code="host_not_allowed")
    for url in (
        "http://127.0.0.1/\u00e4.mp4",
        f"http://{'a' * 64}.example/a.mp4",
        f"https://{'a' * 64}.example/a.mp4",
        "http://\x7f.example/a.mp4",
        "http://a b/",
        "http://\u00e4.example:x/",
        "http://127.0.0.1:99999/a",
    ):
        yield Attack("media", f"url {url[:40]!r}", chat(QUESTION, url))


def protocol() -> Iterator[Attack]:
    """Yield what breaks the rules of HTTP."""
    refused = (400, 404, 405, 413, 414, 431, 501, 505)
    raw = {
        "garbage": b"\x16\x03\x01" + bytes(200),
        "no version": b"GET /health\r\n\r\n",
        "a header of 200 kB": POST + b"X: " + b"x" * 200_000 + b"\r\n\r\n",
        "20,000 headers": POST + b"X: y\r\n" * 20_000 + b"\r\n",
        "a length that is none": POST + b"Content-Length: x\r\n\r\n",
        "a negative length": POST + b"Content-Length: -1\r\n\r\n",
        "two lengths": POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        "a chunk size that is none": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        "a huge chunk": POST + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n{}",
        "a body shorter than its length": POST + b"Content-Length: 99\r\n\r\n{}",
        "a null in the path": b"GET /v1/models\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
    }
    for name, data in raw.items():
        yield Attack("http", name, statuses=refused, do=partial(Server.raw, data=data))
    paths = (
        *("/v1/../../etc/passwd", "/..%2f..%2fetc/passwd", "//etc/passwd", "/v1/chat/completions/", "/docs"),
        *("/openapi.json", "/v1/files", "/" + "a" * 20_000),
    )
    for path in paths:
        asking = partial(Server.ask, method="GET", path=path)
        yield Attack("http", f"path {path[:30]}", statuses=(*refused, 307), do=asking)
    for method in ("PUT", "DELETE", "TRACE", "CONNECT", "XYZ"):
        yield Attack("http", method, statuses=refused, do=partial(Server.ask, method=method, path=CHAT))


# Clients


def leave(server: Server, sent: bytes) -> tuple[int, bytes]:
    """Be twelve clients that send something and are gone, then ask as usual."""
    for _ in range(12):
        with suppress(OSError), socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
            connection.sendall(sent)
            time.sleep(0.05)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return usual(server)


def stay(server: Server, sent: bytes) -> tuple[int, bytes]:
    """Be sixty clients that send something and wait, and ask as usual meanwhile."""
    with ExitStack() as stack:
        for _ in range(60):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=5))
            connection.sendall(sent)
        return usual(server)


def none_waits(server: Server) -> tuple[int, bytes]:
    """Return an error unless the server soon says that it works for nobody."""
    for _ in range(30):
        status, body = server.ask("GET", "/metrics")
        if status == 200 and b"hicom_requests_waiting 0.0" in body:
            return 200, b""
        time.sleep(0.2)
    return 409, body


def usual(server: Server) -> tuple[int, bytes]:
    """Ask as anyone would; a wrong answer is no answer."""
    status, body = server.chat(chat(QUESTION, data_url(DEMO)))
    if status == 200 and json.loads(body)["choices"][0]["message"]["content"] != "red":
        return 409, body
    return status, body


def clients() -> Iterator[Attack]:
    """Yield clients that are slow or leave; a usual one must be served beside and after them."""

    def sent(body: dict[str, Any]) -> bytes:
        data = json.dumps(body).encode()
        return POST + f"Content-Length: {len(data)}\r\n\r\n".encode() + data

    upload = POST + b"Content-Length: 1000000\r\n\r\n{"
    question, long = chat("What happens?", data_url(DEMO)), chat("What happens?", data_url(DEMO), max_tokens=2048)
    leaving = {
        "in the middle of their upload": upload,
        "after asking": sent(question),
        "after asking for much": sent(long),
        "in the middle of a stream": sent(long | {"stream": True}),
        "after 3,000 words": sent(chat("word " * 3_000, data_url(DEMO))),
    }
    for name, data in leaving.items():
        yield Attack("clients", f"12 that leave {name}", statuses=(200,), do=partial(leave, sent=data))
    yield Attack("clients", "60 slow uploads", statuses=(200,), do=partial(stay, sent=upload))
    yield Attack("clients", "60 without a request", statuses=(200,), do=partial(stay, sent=b"POST /v1"))
    yield Attack("clients", "none of them is waited for", statuses=(200,), do=none_waits)


def keys(key: str) -> Iterator[Attack]:
    """Yield requests without the key, or with others."""
    asking = partial(Server.ask, method="POST", path=CHAT, body=chat(QUESTION, data_url(DEMO)))
    wrong = {
        "another": "Bearer no",
        "a part": f"Bearer {key[:-1]}",
        "more": f"Bearer {key}x",
        "bare": key,
        "empty": "Bearer ",
        "basic": "Basic eDp5",
        "no ASCII": "Bearer \xe4",
    }
    yield Attack("keys", "none", statuses=(401,), do=asking)
    for name, value in wrong.items():
        yield Attack("keys", f"key: {name}", statuses=(401,), do=partial(asking, headers={"Authorization": value}))
    for path in ("/v1/models", "/metrics", "/V1/models", "/v1//models", "//v1/models", "/v1/%6dodels"):
        without = partial(Server.ask, method="GET", path=path)
        yield Attack("keys", f"{path} without it", statuses=(401, 404), do=without)
    right = {"Authorization": f"Bearer {key}"}
    yield Attack("keys", "the right one", statuses=(200,), do=partial(asking, headers=right))
    yield Attack("keys", "/health without it", statuses=(200,), do=partial(Server.ask, method="GET", path="/health"))


def attack_server(cases: Sequence[Case], only: str = "") -> Iterator[Outcome]:
    """Yield what becomes of all attacks on a live server; after each group a usual question is asked."""
    groups = [bodies(), media(cases), texts(), protocol(), clients()]
    with serving() as server:
        for group in groups:
            attacks = [each for each in group if only in each.name]
            for attack in attacks:
                if server.process.poll() is None:
                    yield run(server, attack)
            if attacks:
                name = f"a usual question after {len(attacks)}"
                yield run(server, Attack(attacks[0].group, name, statuses=(200,), do=usual))
    key = "a-key-that-nobody-knows"
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(key)
        file.flush()
        attacks = [each for each in keys(key) if only in each.name]
        if attacks:
            with serving("--api-key-file", file.name, key=key) as server:
                for attack in attacks:
                    yield run(server, attack)
