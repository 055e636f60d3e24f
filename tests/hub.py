"""A hub on loopback: the routes of the Hugging Face hub that downloads use, over real HTTP, from folders."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import close_session, constants

SHA = "1234567890abcdef1234567890abcdef12345678"


class Hub:
    """What is served, and what was asked for.

    Attributes:
        repos: folder of every id.
        revisions: names that `SHA` goes by.
        token: that requests must bring; None: any.
        requests: (method, path, token) of every request.
        served: bytes that went out, by id and file.
    """

    def __init__(self, repos: Mapping[str, Path], revisions: tuple[str, ...], token: str | None) -> None:
        self.repos, self.revisions, self.token = dict(repos), (*revisions, SHA), token
        self.requests: list[tuple[str, str, str | None]] = []
        self.served: dict[str, int] = {}
        self.url = ""

    def num_bytes(self, pattern: str) -> int:
        """Return how many bytes of the files went out whose `id/file` matches."""
        return sum(size for name, size in self.served.items() if re.search(pattern, name))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.requests.append((self.command, path, token))
        if self.hub.token is not None and token != self.hub.token:
            return self._refuse(401, "RepoNotFound")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+).*)?", path):
            return self._describe(*match.groups())
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._send_file(*match.groups())
        return self._refuse(404, "")

    do_HEAD = do_GET

    def _folder(self, repo: str, revision: str | None) -> Path | None:
        folder = self.hub.repos.get(repo)
        if folder is None:
            self._refuse(404, "RepoNotFound")
        elif revision is not None and revision not in self.hub.revisions:
            self._refuse(404, "RevisionNotFound")
            return None
        return folder

    def _describe(self, repo: str, kind: str | None, revision: str | None) -> None:
        folder = self._folder(repo, revision)
        if folder is None:
            return
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in files]
        if kind == "tree":
            facts = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": _digest(path)}
                for name, path in zip(names, files, strict=True)
            ]
            return self._send(json.dumps(facts).encode())
        siblings = [{"rfilename": name} for name in names]
        about: dict[str, object] = {
            "id": repo,
            "modelId": repo,
            "sha": SHA,
            "private": False,
            "tags": [],
            "siblings": siblings,
        }
        return self._send(json.dumps(about | {"downloads": 0, "likes": 0}).encode())

    def _send_file(self, repo: str, revision: str, name: str) -> None:
        folder = self._folder(repo, revision)
        if folder is None:
            return
        path = folder / name
        if not path.is_file():
            return self._refuse(404, "EntryNotFound")
        data = path.read_bytes()
        headers = {"ETag": f'"{_digest(path)}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        status, total = 200, len(data)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(match[1]), min(int(match[2] or total - 1), total - 1)
            data, status = data[first : last + 1], 206
            headers["Content-Range"] = f"bytes {first}-{last}/{total}"
        if self.command == "GET":
            key = f"{repo}/{name}"
            self.hub.served[key] = self.hub.served.get(key, 0) + len(data)
        return self._send(data, status, headers)

    def _refuse(self, status: int, code: str) -> None:
        self._send(b"{}", status, {"X-Error-Code": code})

    def _send(self, data: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Type": "application/json"} | dict(headers or {})).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def serve(
    repos: Mapping[str, Path], *, revisions: tuple[str, ...] = ("main",), token: str | None = None
) -> Iterator[Hub]:
    """Serve folders as models of a hub; `HF_ENDPOINT` is the `url` of what is yielded."""
    hub = Hub(repos, revisions, token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def silent() -> Iterator[str]:
    """Yield the address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def use(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    """Make this process ask the hub at `url`, with downloads in `cache`, as `HF_ENDPOINT` and `HF_HUB_CACHE` would."""
    close_session()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
