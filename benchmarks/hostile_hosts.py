"""Hosts that mean harm, for what fetches media, and uploads to the page: see `hostile.py`."""

from __future__ import annotations

import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import hostile_files
from hostile_child import LONGEST_ERROR, Limits, Outcome, in_child
from hostile_files import Case

from hicom import VideoChat
from hicom.serve.backends import LocalBackend
from hicom.serve.media import MediaError, MediaLimits, load_media

QUESTION = "What color is the circle?"
FETCH_SECONDS = 2.0
"""That the media of the fetch attacks may take; a host may gain `GRACE_SECONDS` more."""
GRACE_SECONDS = 1.5
INSIDE = (
    "127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0", "0.0.0.0", "localhost", "[::1]", "[::]",
    "10.0.0.1", "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1", "[fe80::1]", "[fc00::1]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]", "[2002:7f00:1::]", "[64:ff9b::7f00:1]", "[2001:0:7f00:1::]", "224.0.0.1", "255.255.255.255",
    "198.18.0.1", "192.0.2.1", "240.0.0.1", "[ff02::1]", "[2001:db8::1]",
    # of B1: Python 3.11 calls these public
    "192.0.0.192", "[64:ff9b:1::7f00:1]", "[::127.0.0.1]", "[::ffff:0:127.0.0.1]", "[fec0::1]",
    "[5f00::1]", "[3fff::1]",
)  # fmt: skip
"""Hosts that are not of the public internet."""


# Hosts

Host = Callable[[socket.socket], None]


def drip(data: bytes, *, head: bytes = b"", wait_s: float = 0.3, again: bool = False) -> Host:
    """Return a host that sends a byte now and then."""

    def send(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            for byte in data:
                connection.sendall(bytes([byte]))
                time.sleep(wait_s)
            if not again:
                return

    return send


def say(data: bytes, *, again: bool = False) -> Host:
    """Return a host that sends something, at once or without an end."""

    def send(connection: socket.socket) -> None:
        connection.sendall(data)
        while again:
            connection.sendall(data)

    return send


OK = b"HTTP/1.1 200 OK\r\n"
HOSTS: dict[str, Host] = {
    "says nothing": lambda _: time.sleep(60),
    "drips its status": drip(OK + bytes(200)),
    "drips a header": drip(b"X: " + b"y" * 500, head=OK),
    "sends headers without end": drip(b"X: y\r\n", head=OK, wait_s=0.02, again=True),
    "sends headers without end, fast": say(OK + b"X: y\r\n" * 50, again=True),
    "drips a chunk's size": drip(b"0", head=OK + b"Transfer-Encoding: chunked\r\n\r\n", again=True),
    "drips a chunk's extension": drip(b";x", head=OK + b"Transfer-Encoding: chunked\r\n\r\n1", again=True),
    "drips trailers": drip(b"X: y\r\n", head=OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", wait_s=0.05, again=True),
    "says 100 without end": drip(b"HTTP/1.1 100 Continue\r\n\r\n", wait_s=0.01, again=True),
    "says 100 without end, fast": say(b"HTTP/1.1 100 Continue\r\n\r\n", again=True),
    "drips its body": drip(bytes(1000), head=OK + b"Content-Length: 1000\r\n\r\n"),
    "drips a body without length": drip(bytes(1000), head=OK + b"\r\n"),
    "sends a body without end": say(OK + b"\r\n" + bytes(10**5), again=True),
    "claims a long body": say(OK + b"Content-Length: 99999999999\r\n\r\nxx"),
    "claims too long a body": say(OK + b"Content-Length: 100\r\n\r\nxx"),
    "claims a negative body": say(OK + b"Content-Length: -1\r\n\r\nxx"),
    "sends a chunk larger than all": say(OK + b"Transfer-Encoding: chunked\r\n\r\nfffffffff\r\nxx"),
    "sends a header of 1 MB": say(OK + b"X: " + bytes(10**6) + b"\r\n\r\n"),
    "sends no HTTP": say(b"220 ftp ready\r\n"),
    "sends a page": say(OK + b"Content-Length: 6\r\n\r\n<html>"),
    "hangs up": lambda connection: connection.close(),
    "is not there": say(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"),
    "fails": say(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n"),
    "redirects to itself": say(b"HTTP/1.1 302 Found\r\nLocation: /again\r\nContent-Length: 0\r\n\r\n"),
    "redirects to a file": say(b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n"),
    "redirects nowhere": say(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n"),
    "redirects with a password": say(b"HTTP/1.1 302 Found\r\nLocation: http://a:b@127.0.0.1/\r\n\r\n"),
    "redirects to no URL": say(b"HTTP/1.1 302 Found\r\nLocation: http://[::1\r\n\r\n"),
    "redirects to gopher": say(b"HTTP/1.1 302 Found\r\nLocation: gopher://127.0.0.1/x\r\n\r\n"),
}


def fetched(host: Host, scheme: str = "http") -> tuple[str, str]:
    """Load media from a host of this process, and return the result."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=answer, args=[connection], daemon=True).start()

    def answer(connection: socket.socket) -> None:
        with suppress(OSError), connection:
            connection.settimeout(30)
            connection.recv(2**16)
            host(connection)

    threading.Thread(target=serve, daemon=True).start()
    limits = MediaLimits(timeout_s=FETCH_SECONDS, max_bytes=10**6, allow_private=True)
    return refused(f"{scheme}://127.0.0.1:{listener.getsockname()[1]}/a.mp4", limits)


def refused(url: str, limits: MediaLimits, code: str = "") -> tuple[str, str]:
    """Load media that must be refused, and return the result."""
    try:
        load_media(url, limits)
    except MediaError as error:
        text = str(error)
        if code and error.code != code:
            return "wrong answer", f"code {error.code!r}, not {code!r}: {text}"
        is_clear = "\n" not in text and len(text) <= LONGEST_ERROR and "127.0.0.1" not in text
        return ("clear error" if is_clear else "unclear error"), text
    return "wrong answer", "it was taken"


def attack_fetch(only: str = "") -> Iterator[Outcome]:
    """Yield what becomes of media on hosts that mean harm."""
    limits = Limits(seconds=FETCH_SECONDS + GRACE_SECONDS, megabytes=100)
    for name, host in HOSTS.items():
        if only in name:
            yield in_child(partial(fetched, host), "fetch: hosts", name, limits)
    if only in "speaks no TLS":
        yield in_child(partial(fetched, say(OK + b"\r\n"), "https"), "fetch: hosts", "speaks no TLS", limits)
    for host in INSIDE:
        if only in host:
            url = f"http://{host}:9/a.mp4"
            work = partial(refused, url, MediaLimits(timeout_s=FETCH_SECONDS), "host_not_allowed")
            yield in_child(work, "fetch: addresses inside", host, limits)


# The page


def uploaded(chat: VideoChat, path: Path, case: Case) -> tuple[str, str]:
    """Ask the page's backend about an upload, and return the result."""
    backend = LocalBackend(chat, max_new_tokens=8)
    try:
        *_, last = backend.reply(path, [{"role": "user", "content": QUESTION}], 8, None)
    except (ValueError, OSError) as error:
        text = str(error)
        is_clear = "\n" not in text and len(text) <= LONGEST_ERROR and str(path.parent) not in text
        return ("clear error" if is_clear else "unclear error"), text
    if case.is_refused:
        return "wrong answer", f"it is answered: {last.text}"
    return "answered", ""


def attack_page(chat: VideoChat, cases: Sequence[Case], limits: Limits, only: str = "") -> Iterator[Outcome]:
    """Yield what becomes of uploads to the page: what is no video, and every tenth of the others."""
    chosen = [case for n, case in enumerate(cases) if (case.is_refused or n % 10 == 0) and only in case.name]
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(chosen):
            path = hostile_files.write(case, Path(folder) / f"{number}")
            yield in_child(partial(uploaded, chat, path, case), "page: uploads", case.name, limits)
