"""Hosts that answer badly, slowly or for ever, and addresses that nobody from outside may reach."""

import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import hicom.fetch
from hicom.fetch import MAX_HEADER_BYTES, FetchError, FetchLimits, fetch, fetch_pieces, is_public

LIMITS = FetchLimits(allow_private=True, timeout_s=1.0)
OK = b"HTTP/1.1 200 OK\r\n"
Talk = Callable[[socket.socket], None]


class Host:
    """Answers every connection as `talk` says, from raw bytes."""

    def __init__(self) -> None:
        self.requests: list[bytes] = []
        self.talk: Talk = lambda line: line.sendall(OK + b"\r\n")
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                line, _ = self._socket.accept()
                threading.Thread(target=self._answer, args=(line,), daemon=True).start()

    def _answer(self, line: socket.socket) -> None:
        with line, contextlib.suppress(OSError):
            line.settimeout(20)
            request = b""
            while b"\r\n\r\n" not in request and (piece := line.recv(65536)):
                request += piece
            self.requests.append(request)
            self.talk(line)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def host() -> Iterator[Host]:
    running = Host()
    yield running
    running.close()


def drip(before: bytes, again: bytes = b"x", pause_s: float = 0.1) -> Talk:
    """Return a host that says something, and then a bit more every now and then, for ever."""

    def talk(line: socket.socket) -> None:
        line.sendall(before)
        for _ in range(150):
            time.sleep(pause_s)
            line.sendall(again)

    return talk


def silence(line: socket.socket) -> None:
    line.recv(1)


def refused(url: str, limits: FetchLimits = LIMITS) -> FetchError:
    with pytest.raises(FetchError) as error:
        fetch(url, limits)
    assert "127.0.0" not in str(error.value)
    assert "\n" not in str(error.value)
    return error.value


# How long


@pytest.mark.parametrize(
    "talk",
    [
        silence,
        drip(b""),
        drip(b"HTTP/1.1 200 "),
        drip(OK + b"X-Long: "),
        drip(OK, b"X: y\r\n"),
        drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        drip(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"0"),
        drip(OK + b"Transfer-Encoding: chunked\r\n\r\n1", b";"),
        drip(OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n", b"X: y\r\n"),
        drip(OK + b"Content-Length: 1000\r\n\r\n"),
        drip(OK + b"\r\n"),
    ],
    ids=[
        "silence",
        "status",
        "reason",
        "header",
        "headers",
        "continue",
        "size",
        "extension",
        "trailer",
        "body",
        "open",
    ],
)
def test_one_deadline_for_everything(host: Host, talk: Talk) -> None:
    host.talk = talk
    start = time.monotonic()
    error = refused(f"{host.url}/a.mp4", FetchLimits(allow_private=True, timeout_s=0.5))
    assert error.code == "fetch_failed"
    assert "took more than 0.5 s" in str(error)
    assert time.monotonic() - start < 1.5


def test_the_deadline_holds_over_redirects(host: Host) -> None:
    def talk(line: socket.socket) -> None:
        time.sleep(0.3)
        line.sendall(b"HTTP/1.1 302 Found\r\nLocation: /again\r\n\r\n")

    host.talk = talk
    start = time.monotonic()
    assert "took more than" in str(refused(host.url, FetchLimits(allow_private=True, timeout_s=0.5, max_redirects=50)))
    assert time.monotonic() - start < 1.5


def test_the_deadline_holds_for_tls(host: Host) -> None:
    # What the host gets is no request with an end, so it waits, as the client does.
    start = time.monotonic()
    limits = FetchLimits(allow_private=True, timeout_s=0.5)
    assert "took more than" in str(refused(f"https://127.0.0.1:{host.port}/", limits))
    assert time.monotonic() - start < 1.5


def test_the_deadline_holds_for_looking_up_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(3) or [])
    start = time.monotonic()
    assert "took more than" in str(refused("http://slow.test/", FetchLimits(timeout_s=0.3)))
    assert time.monotonic() - start < 1.5


def test_an_address_that_does_not_answer_leaves_time_for_the_next(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    full = socket.create_server(("127.0.0.2", host.port), backlog=0)  # takes connections, as far as it can, and no more
    waiting = [socket.socket() for _ in range(4)]
    for each in waiting:
        each.setblocking(False)
        each.connect_ex(("127.0.0.2", host.port))
    host.talk = lambda line: line.sendall(OK + b"\r\nhello")
    answers = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, host.port)) for ip in ("127.0.0.2", "127.0.0.1")]
    lookup = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda name, *a, **k: answers if name == "two.test" else lookup(name, *a, **k)
    )
    try:
        assert fetch(f"http://two.test:{host.port}/", LIMITS) == b"hello"
    finally:
        for each in (*waiting, full):
            each.close()


# How much


@pytest.mark.parametrize(
    "talk",
    [
        lambda line: line.sendall(OK + b"X: y\r\n" * 20_000),
        lambda line: line.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 20_000),
        lambda line: line.sendall(OK + b"X: " + bytes(b"y" * 10**6)),
        lambda line: line.sendall(b"x" * 10**6),
        lambda line: line.sendall(OK + b"".join(b"X%d: %s\r\n" % (n, b"y" * 60_000) for n in range(90))),
    ],
    ids=["headers", "continue", "header", "status", "long headers"],
)
def test_headers_are_bounded(host: Host, talk: Talk) -> None:
    host.talk = talk
    assert refused(host.url, FetchLimits(allow_private=True, timeout_s=20)).code == "fetch_failed"


def test_headers_of_usual_size(host: Host) -> None:
    host.talk = lambda line: line.sendall(OK + b"Cookie: " + b"y" * (MAX_HEADER_BYTES // 2) + b"\r\n\r\nhello")
    assert fetch(host.url, LIMITS) == b"hello"


def test_bytes_are_bounded(host: Host) -> None:
    limits = FetchLimits(allow_private=True, max_bytes=1000)
    chunked = OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"100\r\n" + bytes(256) + b"\r\n"
    for answer in (OK + b"Content-Length: 1001\r\n\r\n", OK + b"\r\n" + bytes(1001), chunked + b"2ea\r\n" + bytes(750)):
        host.talk = lambda line, answer=answer: line.sendall(answer)  # type: ignore[misc]
        error = refused(host.url, limits)
        assert error.code == "media_too_large"
        assert "1,000 bytes" in str(error)
    host.talk = lambda line: line.sendall(OK + b"\r\n" + bytes(1000))
    assert fetch(host.url, limits) == bytes(1000)


def test_a_body_that_ends_early_is_no_file(host: Host) -> None:
    host.talk = lambda line: line.sendall(OK + b"Content-Length: 100\r\n\r\n" + bytes(60))
    assert "ended 40 bytes early" in str(refused(host.url))
    host.talk = lambda line: line.sendall(OK + b"Transfer-Encoding: chunked\r\n\r\n64\r\n" + bytes(60))
    assert "could not be fetched" in str(refused(host.url))


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\r\n\r\n",
        b"HTTP/9.9 xyz\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nhello",
        b"HTTP/1.1 302 Found\r\nLocation: http://[x\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: gopher://a/\r\n\r\n",
    ],
)
def test_answers_that_make_no_sense(host: Host, answer: bytes) -> None:
    host.talk = lambda line: line.sendall(answer)
    refused(host.url)


def test_pieces_come_as_they_arrive(host: Host) -> None:
    is_read = threading.Event()

    def talk(line: socket.socket) -> None:
        line.sendall(OK + b"Content-Length: 6\r\n\r\nabc")
        is_read.wait(10)
        line.sendall(b"def")

    host.talk = talk
    pieces = fetch_pieces(host.url, FetchLimits(allow_private=True, timeout_s=20))
    assert next(pieces) == b"abc"
    is_read.set()
    assert b"".join(pieces) == b"def"


# What is asked for


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("/ä.mp4", b"GET /%C3%A4.mp4 "),
        ("/%C3%A4.mp4?q=ü&x=%20", b"GET /%C3%A4.mp4?q=%C3%BC&x=%20 "),
        ("/a b.mp4#t=1", b"GET /a%20b.mp4 "),
        ("?x=1", b"GET /?x=1 "),
        ("/a\x7f\x01", b"GET /a%7F%01 "),
        ('/"<>{}|^`\\', b"GET /%22%3C%3E%7B%7D%7C%5E%60%5C "),
    ],
)
def test_iris(host: Host, url: str, asked: bytes) -> None:
    host.talk = lambda line: line.sendall(OK + b"\r\nhello")
    assert fetch(f"{host.url}{url}", LIMITS) == b"hello"
    assert host.requests[0].startswith(asked)
    assert f"\r\nHost: 127.0.0.1:{host.port}\r\n".encode() in host.requests[0]


def test_iris_of_redirects(host: Host) -> None:
    def talk(line: socket.socket) -> None:
        is_first = len(host.requests) == 1
        line.sendall("HTTP/1.1 302 Found\r\nLocation: /ö?\r\n\r\n".encode() if is_first else OK + b"\r\nhello")

    host.talk = talk
    assert fetch(host.url, LIMITS) == b"hello"
    assert host.requests[1].startswith(b"GET /%C3%B6 ")


def test_names_in_other_letters(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up, lookup = [], socket.getaddrinfo

    def answer(name: str, *args: object, **kwargs: object) -> object:
        looked_up.append(name)
        return lookup("127.0.0.1", *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    host.talk = lambda line: line.sendall(OK + b"\r\nhello")
    limits = FetchLimits(allow_private=True, allowed_hosts=("Bücher.test",))
    for name in ("bücher.test", "BÜCHER.test.", "xn--bcher-kva.test", "a.bücher.test"):
        assert fetch(f"http://{name}:{host.port}/", limits) == b"hello"
    assert looked_up[0] == "xn--bcher-kva.test"
    assert refused("http://bucher.test/", limits).code == "host_not_allowed"


@pytest.mark.parametrize(
    "name",
    [
        f"{'a' * 64}.example",
        "\x7f.example",
        "a..example",
        ".",
        "-",
        "a%00b",
        "a\u2028b",
        "a b",
        "a\udc80b",
        "[::1%25lo]",
    ],
)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_names_that_are_none(name: str, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("it was looked up"))
    assert refused(f"{scheme}://{name}/a.mp4").code == "unsupported_url"


@pytest.mark.parametrize("url", ["http://a/\ud800", "http://a:0/", "http://a:99999/", "http://", "http:/a", "ftp://a/"])
def test_urls_that_are_none(url: str) -> None:
    assert refused(url).code == "unsupported_url"


# Where


NOT_PUBLIC = """
    0.0.0.0 0.1.2.3 10.0.0.1 100.64.0.1 100.100.100.200 127.0.0.1 127.255.255.255 168.63.129.16 169.254.169.254
    172.16.0.1 172.31.255.255 192.0.0.9 192.0.0.192 192.0.2.1 192.31.196.1 192.52.193.1 192.88.99.1 192.168.0.1
    192.175.48.1 198.18.0.1 198.19.255.255 198.51.100.1 203.0.113.1 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255
    :: ::1 ::127.0.0.1 ::8.8.8.8 ::ffff:127.0.0.1 ::ffff:8.8.8.8 ::ffff:0:127.0.0.1 64:ff9b::7f00:1 64:ff9b::8.8.8.8
    64:ff9b:1::7f00:1 64:ff9b:1:ffff::1 100::1 100:0:0:1::1 2001::1 2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:1::1
    2001:1::2 2001:2::1 2001:3::1 2001:4:112::1 2001:10::1 2001:20::1 2001:30::1 2001:db8::1 2002:7f00:1::
    2002:808:808:: 2620:4f:8000::1 3ffe::1 3fff::1 3fff:fff::1 5f00::1 fc00::1 fd00:ec2::254 fe80::1 fe80::1%eth0
    fec0::1 ff02::1 ff0e::1 4000::1 8000::1
"""
PUBLIC = """
    1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.0 93.184.216.34 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.1
    168.63.129.15 169.253.255.255 172.15.255.255 172.32.0.0 191.255.255.255 192.0.1.0 192.167.255.255 192.169.0.0
    198.17.255.255 198.20.0.0 223.255.255.255 2606:2800:220:1:248:1893:25c8:1946 2001:200::1 2001:4860:4860::8888
    2003::1 2a00:1450:4001:80b::200e 3ff0::1
"""


@pytest.mark.parametrize("address", NOT_PUBLIC.split())
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", PUBLIC.split())
def test_public_addresses(address: str) -> None:
    assert is_public(address)


def test_it_asks_no_private_host_of_any_spelling(host: Host) -> None:
    for name in ("127.0.0.1", "localhost", "2130706433", "0x7f.1", "017700000001", "127.1", "0", "[::1]", "[::]"):
        assert refused(f"http://{name}:{host.port}/", FetchLimits()).code in ("host_not_allowed", "fetch_failed")
    assert host.requests == []


# TLS


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_https(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=film.test"
    command += " -addext subjectAltName=DNS:film.test -keyout key.pem -out cert.pem"
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    body = bytes(range(256)) * 1000

    def run() -> None:
        with contextlib.suppress(OSError):
            while True:
                plain, _ = server.accept()
                with contextlib.suppress(OSError), context.wrap_socket(plain, server_side=True) as line:
                    line.recv(65536)
                    line.sendall(OK + b"Content-Length: %d\r\n\r\n" % len(body) + body)

    threading.Thread(target=run, daemon=True).start()
    lookup = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda name, *a, **k: lookup("127.0.0.1", *a, **k))
    assert "could not be fetched" in str(refused(f"https://film.test:{port}/"))  # nobody vouches for it
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    assert fetch(f"https://film.test:{port}/a.mp4", FetchLimits(allow_private=True)) == body
    assert "could not be fetched" in str(refused(f"https://other.test:{port}/"))
    server.close()


def test_it_needs_nothing_but_python() -> None:
    code = "import sys, hicom.fetch; print(*{name.partition('.')[0] for name in sys.modules})"
    source = str(Path(hicom.fetch.__file__).parents[1])
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": source})
    assert set(done.stdout.split()) - sys.stdlib_module_names == {"__main__", "hicom"}
