"""Files behind `http` and `https` URLs, fetched without trusting the URL or its host.

One deadline holds for all of it: looking the name up, connecting, TLS, every header, `100 Continue`, chunk sizes, the
body and its end. A host that drips a byte now and then gains nothing. Names are looked up once for each hop, all of
their addresses are checked, and those are connected to, so that a name that changes its address in between gains
nothing either. What is public is told by a table here, not by Python's, which differs from version to version.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import quote, urljoin, urlsplit

CHUNK = 2**16
REDIRECTS = (301, 302, 303, 307, 308)
MAX_HEADER_BYTES = 2**16  # of a response, with all that comes before its body
_SAFE = "!$%&'()*+,/:;=?@[]~"  # in a path or query; what is escaped already stays
_HOST = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?|[0-9a-f.]*:[0-9a-f:.]*")

# All of IANA's special-purpose registries and multicast: nobody's usual address, whether or not it can be routed.
_SPECIAL_IPV4 = [
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this host
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # of providers
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # in no registry: the host of every machine at Azure
        "169.254.0.0/16",  # link-local; metadata of clouds
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocols; metadata at Oracle
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # AMT
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
]
# Of IPv6 only what is given out to the public: ::/8 (loopback, IPv4 inside, NAT64), 5f00::/16, fc00::/7, fe80::/10,
# fec0::/10, ff00::/8 and what may come are outside of it.
_GLOBAL_IPV6 = ipaddress.IPv6Network("2000::/3")
_SPECIAL_IPV6 = [
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # protocols: Teredo (IPv4 inside), benchmarks, ORCHID, AMT, AS112
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4 (IPv4 inside)
        "2620:4f:8000::/48",  # AS112
        "3ffe::/16",  # given back
        "3fff::/20",  # documentation
    )
]


class FetchError(ValueError):
    """A file cannot be had, or may not. The text names no address; `__cause__`, where there is one, may.

    Args:
        message: what is wrong.
        code: a short name for programs.
    """

    def __init__(self, message: str, code: str = "fetch_failed") -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, kw_only=True)
class FetchLimits:
    """What is fetched.

    Attributes:
        max_bytes: of a file.
        timeout_s: for a whole fetch.
        max_redirects: that are followed.
        allow_private: also fetch from addresses that are not of the public internet.
        allowed_hosts: the only hosts that are fetched from, their subdomains included; empty: any.
    """

    max_bytes: int = 256 * 2**20
    timeout_s: float = 30.0
    max_redirects: int = 3
    allow_private: bool = False
    allowed_hosts: tuple[str, ...] = ()


def fetch(url: str, limits: FetchLimits) -> bytes:
    """Return the content behind a URL.

    Raises:
        FetchError: the URL is malformed or its host not allowed, it does not answer in time, or there is too much.
    """
    content = io.BytesIO()
    for piece in fetch_pieces(url, limits):
        content.write(piece)
    return content.getvalue()


def fetch_pieces(url: str, limits: FetchLimits) -> Iterator[bytes]:
    """Yield the content behind a URL as it comes, for files that go to a disk; the deadline runs on meanwhile.

    Raises:
        FetchError: see `fetch`.
    """
    deadline = time.monotonic() + limits.timeout_s
    for _ in range(limits.max_redirects + 1):
        with _told(limits), ExitStack() as stack:
            target = _target(url, limits)
            line = stack.enter_context(closing(_connect(target, limits, deadline)))
            response = _ask(target, line)
            if response.status not in REDIRECTS:
                stack.pop_all()
                break
            url = urljoin(url, _location(response))
    else:
        raise FetchError(f"the media's host redirected more than {limits.max_redirects} times")
    with closing(line):
        yield from _body(response, limits)


def is_public(address: str) -> bool:
    """Return whether an IP address is one of the public internet, and carries no other one inside."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv4Address):
        return not any(ip in network for network in _SPECIAL_IPV4)
    return ip in _GLOBAL_IPV6 and not any(ip in network for network in _SPECIAL_IPV6)


class _Target(NamedTuple):
    """What is asked of whom."""

    host: str
    port: int
    is_secure: bool
    path: str

    @property
    def name(self) -> str:
        """The header `Host`."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.is_secure else 80) else f"{host}:{self.port}"


class _Line(io.RawIOBase):
    """A connection all of whose steps end at one deadline, in the form in which `http.client` uses a socket."""

    def __init__(self, connected: socket.socket, deadline: float) -> None:
        self._socket, self._deadline = connected, deadline
        self.header_bytes_left: int | None = MAX_HEADER_BYTES  # None: the body has begun

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._socket.settimeout(_left(self._deadline))
        count = self._socket.recv_into(buffer)
        if self.header_bytes_left is not None:
            self.header_bytes_left -= count
            if self.header_bytes_left < 0:
                raise FetchError(f"the media's host sent more than {MAX_HEADER_BYTES:,} bytes of headers")
        return count

    def sendall(self, data: bytes) -> None:
        self._socket.settimeout(_left(self._deadline))
        self._socket.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def close(self) -> None:
        self._socket.close()
        super().close()


@contextmanager
def _told(limits: FetchLimits) -> Iterator[None]:
    """Turn what goes wrong on a network into errors that tell nothing of it."""
    try:
        yield
    except FetchError:
        raise
    except TimeoutError as error:
        raise FetchError(f"the media took more than {limits.timeout_s:g} s to fetch") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise FetchError("the media could not be fetched") from error


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _target(url: str, limits: FetchLimits) -> _Target:
    """Return what a URL asks for, if its host may be asked."""
    malformed = FetchError("the media's URL is malformed", "unsupported_url")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        # What browsers take, too: other letters are escaped, what is escaped stays.
        path = quote(parts.path or "/", _SAFE) + (f"?{quote(parts.query, _SAFE)}" if parts.query else "")
    except ValueError:
        raise malformed from None
    if parts.scheme not in ("http", "https") or not host or parts.username is not None or parts.password is not None:
        raise FetchError("media must be http, https or data URLs, without a user name", "unsupported_url")
    host = _ascii_host(host)
    if host is None or port == 0:
        raise malformed
    allowed = [_ascii_host(each.lower()) for each in limits.allowed_hosts]
    if allowed and not any(each and (host == each or host.endswith(f".{each}")) for each in allowed):
        raise FetchError("media may not be fetched from this host", "host_not_allowed")
    is_secure = parts.scheme == "https"
    return _Target(host, port or (443 if is_secure else 80), is_secure, path)


def _ascii_host(host: str) -> str | None:
    """Return a host's name as the network has it; None: it is none."""
    try:
        name = host.removesuffix(".").encode("idna").decode().lower()  # no label is empty or longer than 63
    except UnicodeError:
        return None
    return name if _HOST.fullmatch(name) else None


def _addresses(target: _Target, limits: FetchLimits, deadline: float) -> list[str]:
    """Look a host up, once, and return its addresses; all of them must be allowed."""
    found: list[str] = []

    def look_up() -> None:
        with suppress(OSError, UnicodeError):
            answers = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
            found.extend(dict.fromkeys(str(each[4][0]) for each in answers))

    # A thread of its own: there is no deadline for this. The resolver gives up some time.
    thread = threading.Thread(target=look_up, name="hicom-lookup", daemon=True)
    thread.start()
    thread.join(_left(deadline))
    if thread.is_alive():
        raise TimeoutError
    if not found:
        raise FetchError("the media's host is not known")
    if not limits.allow_private and not all(map(is_public, found)):
        raise FetchError("media may not be fetched from this host", "host_not_allowed")
    return found


def _connect(target: _Target, limits: FetchLimits, deadline: float) -> _Line:
    """Return a connection to the first of a host's addresses that takes one."""
    addresses = _addresses(target, limits, deadline)
    for number, address in enumerate(addresses):
        try:
            # None takes the time of those after it.
            plain = socket.create_connection((address, target.port), _left(deadline) / (len(addresses) - number))
            break
        except OSError:
            if number == len(addresses) - 1:
                raise
    if not target.is_secure:
        return _Line(plain, deadline)
    try:
        plain.settimeout(_left(deadline))
        # The certificate must be that of the name.
        return _Line(ssl.create_default_context().wrap_socket(plain, server_hostname=target.host), deadline)
    except BaseException:
        plain.close()
        raise


def _ask(target: _Target, line: _Line) -> http.client.HTTPResponse:
    """Return the response, read up to its body."""
    connection = http.client.HTTPConnection(target.host, target.port)
    connection.sock = line
    headers = {"Host": target.name, "Accept-Encoding": "identity", "User-Agent": "hicom", "Connection": "close"}
    connection.request("GET", target.path, headers=headers)
    like_a_socket: Any = line
    response = http.client.HTTPResponse(like_a_socket, method="GET")  # the connection's own closes with the connection
    response.begin()
    line.header_bytes_left = None
    return response


def _location(response: http.client.HTTPResponse) -> str:
    """Return where a redirect leads to."""
    location = response.getheader("Location") or ""
    try:
        return location.encode("latin-1").decode()  # hosts send UTF-8, `http.client` reads Latin-1
    except UnicodeError:
        return location


def _body(response: http.client.HTTPResponse, limits: FetchLimits) -> Iterator[bytes]:
    if response.status != 200:
        raise FetchError(f"the media's host answered with status {response.status}")
    too_large = FetchError(f"the media has more than {limits.max_bytes:,} bytes", "media_too_large")
    if (response.length or 0) > limits.max_bytes:
        raise too_large
    size = 0
    while True:
        with _told(limits):
            piece = response.read1(CHUNK)
            if not piece and response.length:
                raise FetchError(f"the media ended {response.length:,} bytes early")
        if not piece:
            return
        size += len(piece)
        if size > limits.max_bytes:
            raise too_large
        yield piece
