"""Hostile and other media: what is fetched, from where, and what is refused before it is decoded."""

import base64
import contextlib
import http.server
import io
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image

import hicom.fetch
import media as files
from bombs import table
from hicom.fetch import is_public
from hicom.serve import media
from hicom.serve.boxes import has_sound_tables
from hicom.serve.media import Account, MediaError, MediaLimits, fetch, load_media

OPEN = MediaLimits(allow_private=True)


def picture(width: int = 40, height: int = 30, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(file, kind)
    return file.getvalue()


def data_url(data: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return files.write_video(tmp_path_factory.mktemp("video") / "a.mp4", 16, fps=8).read_bytes()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves what `pages` says: bytes, a redirect, or a function of the handler."""

    pages: ClassVar[dict[str, Any]] = {}
    seen: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.seen.append(f"{self.headers['Host']} {self.path}")
        page = self.pages.get(self.path)
        if callable(page):
            page(self)
        elif isinstance(page, str):
            self.send_response(302)
            self.send_header("Location", page)
            self.end_headers()
        elif page is None:
            self.send_error(404)
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def site() -> Iterator[tuple[str, dict[str, Any], list[str]]]:
    """Return the address of a server, its pages, and what was asked of it."""
    handler = type("Own", (Handler,), {"pages": {}, "seen": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler.pages, handler.seen
    server.shutdown()
    server.server_close()


def refused(url: str, limits: MediaLimits = OPEN) -> MediaError:
    with pytest.raises(MediaError) as error:
        load_media(url, limits)
    assert "127.0.0" not in str(error.value), "an error tells of inner addresses"
    return error.value


# What is taken


def test_videos_and_pictures(video: bytes, site: tuple[str, dict[str, Any], list[str]]) -> None:
    address, pages, seen = site
    pages["/a.mp4?x=1"] = video
    assert load_media(f"{address}/a.mp4?x=1", OPEN) == video
    assert seen == [f"{address.removeprefix('http://')} /a.mp4?x=1"]
    assert load_media(data_url(video), OPEN) == video
    assert load_media(data_url(picture(), "image/png"), OPEN) == picture()
    frames = ",".join(base64.b64encode(picture(kind="JPEG")).decode() for _ in range(3))
    found = load_media(f"data:video/jpeg;base64,{frames}", OPEN)
    assert [Image.open(io.BytesIO(each)).size for each in found] == [(40, 30)] * 3


def test_redirects_are_followed(video: bytes, site: tuple[str, dict[str, Any], list[str]]) -> None:
    address, pages, _ = site
    pages |= {"/a": "/b", "/b": f"{address}/c", "/c": video}
    assert fetch(f"{address}/a", OPEN) == video
    pages["/c"] = "/a"
    assert "redirected more than 3 times" in str(refused(f"{address}/a"))


def test_local_files_where_they_are_allowed(video: bytes, tmp_path: Path) -> None:
    inside = tmp_path / "media"
    inside.mkdir()
    (inside / "a b.mp4").write_bytes(video)
    (tmp_path / "secret.mp4").write_bytes(video)
    (inside / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    limits = MediaLimits(allowed_folders=(inside,))
    assert load_media(f"file://{inside}/a%20b.mp4", limits) == inside / "a b.mp4"
    for path in (f"{inside}/../secret.mp4", f"{inside}/link.mp4", "/etc/passwd", f"{inside}", f"{inside}/none.mp4"):
        assert refused(f"file://{path}", limits).code == "file_not_allowed"
    assert refused(f"file://{inside}/a%20b.mp4", MediaLimits()).code == "file_not_allowed"


# Where from


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "0.0.0.0",
        "100.64.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1%eth0",
        "fc00::1",
        "::ffff:127.0.0.1",
        "::ffff:8.8.8.8",
        "2002:7f00:1::",
        "64:ff9b::7f00:1",
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "2130706433", "0x7f000001", "127.1", "0", "[::ffff:127.0.0.1]"]
)
def test_private_hosts_are_not_asked(host: str, site: tuple[str, dict[str, Any], list[str]], video: bytes) -> None:
    address, pages, seen = site
    pages["/a.mp4"] = video
    port = address.rpartition(":")[2]
    assert refused(f"http://{host}:{port}/a.mp4", MediaLimits()).code in ("host_not_allowed", "fetch_failed")
    assert seen == []


def test_redirects_are_checked_like_the_first_address(
    site: tuple[str, dict[str, Any], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, pages, seen = site
    port = address.rpartition(":")[2]
    pages["/a"] = f"http://127.0.0.2:{port}/secret"
    monkeypatch.setattr(hicom.fetch, "is_public", lambda ip: ip == "127.0.0.1")
    assert refused(f"{address}/a", MediaLimits()).code == "host_not_allowed"
    assert len(seen) == 1
    pages["/a"] = "file:///etc/passwd"
    assert refused(f"{address}/a", MediaLimits()).code == "unsupported_url"


def test_a_name_that_changes_its_address_gains_nothing(
    site: tuple[str, dict[str, Any], list[str]], video: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, pages, seen = site
    port = int(address.rpartition(":")[2])
    pages["/a.mp4"] = video
    looked_up = []
    lookup = socket.getaddrinfo

    def rebinding(host: str, *args: Any, **kwargs: Any) -> Any:
        if host != "rebind.test":
            return lookup(host, *args, **kwargs)
        looked_up.append(host)
        return lookup("127.0.0.1" if len(looked_up) == 1 else "127.0.0.2", *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    monkeypatch.setattr(hicom.fetch, "is_public", lambda ip: ip == "127.0.0.1")
    assert fetch(f"http://rebind.test:{port}/a.mp4", MediaLimits()) == video
    assert looked_up == ["rebind.test"]
    assert seen == [f"rebind.test:{port} /a.mp4"]


def test_a_host_with_one_private_address_among_public_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 80)) for ip in ("8.8.8.8", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answers)
    assert refused("http://mixed.test/a.mp4", MediaLimits()).code == "host_not_allowed"


def test_allowed_hosts(
    site: tuple[str, dict[str, Any], list[str]], video: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, pages, _ = site
    port = address.rpartition(":")[2]
    pages["/a.mp4"] = video
    lookup = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: lookup("127.0.0.1", *a, **k))
    limits = MediaLimits(allow_private=True, allowed_hosts=("example.com",))
    for host in ("example.com", "cdn.example.com"):
        assert load_media(f"http://{host}:{port}/a.mp4", limits) == video
    for host in ("badexample.com", "example.com.evil.test", "other.test"):
        assert refused(f"http://{host}:{port}/a.mp4", limits).code == "host_not_allowed"


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.com/a.mp4",
        "gopher://a",
        "/etc/passwd",
        "a.mp4",
        "",
        "http://",
        "http://user:x@example.com/",
        "http://[a",
    ],
)
def test_other_urls(url: str) -> None:
    assert refused(url).code == "unsupported_url"


# How much


def test_too_many_bytes(site: tuple[str, dict[str, Any], list[str]]) -> None:
    address, pages, _ = site
    limits = MediaLimits(allow_private=True, max_bytes=1000)
    pages["/told"] = bytes(2000)

    def untold(handler: Handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        with io.BytesIO(bytes(5_000_000)) as content, contextlib.suppress(OSError):
            handler.wfile.write(content.read())

    pages["/untold"] = untold
    for path in ("/told", "/untold"):
        assert refused(f"{address}{path}", limits).code == "media_too_large"
    assert refused(data_url(bytes(2000)), limits).code == "media_too_large"


def test_slow_hosts(site: tuple[str, dict[str, Any], list[str]]) -> None:
    address, pages, _ = site

    def drip(handler: Handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(100):
            try:
                handler.wfile.write(b"x")
                handler.wfile.flush()
            except OSError:
                return
            time.sleep(0.05)

    pages["/slow"] = drip
    start = time.monotonic()
    assert refused(f"{address}/slow", MediaLimits(allow_private=True, timeout_s=0.5)).code == "fetch_failed"
    assert time.monotonic() - start < 3


@pytest.mark.parametrize("status", [404, 500])
def test_hosts_that_have_nothing(status: int, site: tuple[str, dict[str, Any], list[str]]) -> None:
    address, pages, _ = site
    pages["/a"] = lambda handler: handler.send_error(status)
    assert f"status {status}" in str(refused(f"{address}/a"))


def test_videos_beyond_the_limits(video: bytes) -> None:
    for limits, word in (
        (MediaLimits(max_pixels=1000), "96x64 pixels"),
        (MediaLimits(max_duration_s=1), "lasts 2 s"),
        (MediaLimits(max_frames=10), "16 frames"),
    ):
        error = refused(data_url(video), limits)
        assert error.code == "media_too_large"
        assert word in str(error)


def bomb(width: int, height: int) -> bytes:
    """Return a PNG of a few kilobytes that claims, and has, a great many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + check

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    rows = zlib.compress(bytes((1 + width // 8) * height), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_pictures_beyond_the_limits() -> None:
    file = io.BytesIO()
    Image.new("RGB", (40, 30)).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    assert load_media(url, MediaLimits(max_pixels=1200)) == file.getvalue()
    with pytest.raises(MediaError, match="40x30 pixels; at most 1,199 are taken") as error:
        load_media(url, MediaLimits(max_pixels=1199))
    assert error.value.code == "media_too_large"


def test_decompression_bombs_are_not_decoded() -> None:
    data = bomb(30_000, 30_000)
    assert len(data) < 200_000
    start = time.monotonic()
    for kind in ("image/png", "video/mp4", "video/jpeg"):
        refused(data_url(data, kind))
    assert time.monotonic() - start < 2


def wrong_contents() -> dict[str, Callable[[bytes], str]]:
    return {
        "not base64": lambda _: "data:video/mp4;base64,####",
        "no base64": lambda _: "data:video/mp4,abc",
        "no comma": lambda _: "data:video/mp4;base64",
        "empty": lambda _: "data:video/mp4;base64,",
        "text": lambda _: data_url(b"hello"),
        "a drawing": lambda _: data_url(
            b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "image/svg+xml"
        ),
        "half a video": lambda video: data_url(video[: len(video) // 3]),
        "half a picture": lambda _: f"data:video/jpeg;base64,{base64.b64encode(picture()[:40]).decode()}",
        "frames of nothing": lambda _: "data:video/jpeg;base64,,",
    }


@pytest.mark.parametrize("name", wrong_contents())
def test_what_cannot_be_read(name: str, video: bytes) -> None:
    refused(wrong_contents()[name](video))


# Together


def listed(*frames: bytes) -> str:
    return "data:video/jpeg;base64," + ",".join(base64.b64encode(frame).decode() for frame in frames)


def animation(kind: str, num_frames: int = 6, width: int = 40, height: int = 30) -> bytes:
    file = io.BytesIO()
    frames = [Image.new("RGB", (width, height), (40 * number, 0, 0)) for number in range(num_frames)]
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    return file.getvalue()


def test_lists_are_counted_before_one_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "_decoded", lambda *_: pytest.fail("a frame was decoded"))
    error = refused("data:video/jpeg;base64," + "AAAA," * 256)
    assert error.code == "media_too_large"
    assert "257 frames; at most 256" in str(error)
    assert "3 frames; at most 2" in str(refused(listed(b"", b"", b""), MediaLimits(max_listed=2)))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "list", "still"])
def test_pixels_are_bounded_together(kind: str) -> None:
    frames = [picture(), picture(50, 40), picture(kind="JPEG")]
    url = {"list": listed(*frames), "still": data_url(picture(60, 40))}.get(kind) or data_url(animation(kind))
    pixels = {"list": 2 * 1200 + 2000, "still": 2400}.get(kind, 6 * 1200)
    load_media(url, MediaLimits(max_total_pixels=pixels))
    error = refused(url, MediaLimits(max_total_pixels=pixels - 1))
    assert error.code == "media_too_large"
    assert f"{pixels:,} pixels together" in str(error)
    limits = MediaLimits(max_total_pixels=2 * pixels)
    account = Account(limits)
    for _ in range(2):
        load_media(url, limits, account=account)
    with pytest.raises(MediaError, match="pixels together"):
        load_media(url, limits, account=account)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_long_animations_are_not_decoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "probe", lambda _: pytest.fail("it was decoded"))
    limits = MediaLimits(max_total_pixels=4 * 500_000)
    assert "2,500,000 pixels together" in str(refused(data_url(animation(kind, 5, 1000, 500)), limits))


def test_packets_are_counted_before_they_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.ts", "a.mkv", "a.mp4", "a.avi"):
        data = files.write_video(tmp_path / name, 30).read_bytes()
        load_media(data_url(data), MediaLimits(max_frames=30))
        with monkeypatch.context() as patch:
            patch.setattr(media, "probe", lambda _: pytest.fail("the packets were listed"))
            assert "frames; at most 29" in str(refused(data_url(data), MediaLimits(max_frames=29)))


def test_bytes_are_held_before_they_are_there(video: bytes, site: tuple[str, dict[str, Any], list[str]]) -> None:
    address, pages, _ = site
    pages["/a.mp4"] = video
    for url, held in ((f"{address}/a.mp4", len(video)), (data_url(video), 4 * -(-len(video) // 3) * 3 // 4)):
        taken: list[int] = []
        load_media(url, OPEN, account=Account(OPEN, taken.append))
        assert sum(taken) == held

        def full(_: int) -> None:
            raise KeyError

        with pytest.raises(KeyError):
            load_media(url, OPEN, account=Account(OPEN, full))


@pytest.mark.parametrize("size", [0, 1, 2, 3, 2**20 * 3 // 4 - 1, 2**20 * 3 // 4, 2**20 * 3 // 4 + 1, 3_000_000])
def test_base64_of_any_length(size: int) -> None:
    content = bytes(range(256)) * (size // 256) + bytes(range(size % 256))
    assert media._from_data(data_url(content), Account(OPEN)) == content


def test_what_is_not_base64() -> None:
    whole = base64.b64encode(bytes(3 * 2**20)).decode()
    for text in (
        "A",
        "AA=",
        "AA==AA==",
        "A A=",
        "AAA\n",
        "AA-_",
        "\u00e4AAA",
        "\ud800AAA",
        f"{whole[: 2**20 - 4]}AA=={whole}",
        f"{whole[: 2**20 - 1]}={whole}",
        f"{whole}=",
        f"{whole} ",
        f"={whole}",
    ):
        assert "not base64" in str(refused(f"data:video/mp4;base64,{text}"))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_what_moves_is_no_image(kind: str, video: bytes) -> None:
    for url in (data_url(animation(kind)), data_url(video), listed(picture(), picture())):
        with pytest.raises(MediaError, match="sent as image_url; send it as video_url") as error:
            load_media(url, OPEN, kind="image")
        assert error.value.code == "video_as_image"
        load_media(url, OPEN)
    for still in (picture(kind=kind), animation("TIFF")):
        assert load_media(data_url(still), OPEN, kind="image") == still


def test_no_other_program_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("a program was started"))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    for kind in ("video/jpeg", "video/mp4", "image/png"):
        refused(data_url(eps, kind))


def test_tables_that_stand_for_more_than_is_there(
    video: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,080 bytes took 1.4 GB for 20 million samples."""
    monkeypatch.setattr(media, "open_input", lambda _: pytest.fail("FFmpeg opened it"))
    (tmp_path / "a.mp4").write_bytes(table(video, 20_000_000))
    for source in (table(video, 20_000_000), table(video, 2**32 - 1), tmp_path / "a.mp4"):
        with pytest.raises(MediaError, match="stands for more") as error:
            media.check_media(source, OPEN)
        assert error.value.code == "media_too_large"


def test_tables_of_fragments_and_nests(video: bytes, tmp_path: Path) -> None:
    options = {"movflags": "frag_keyframe+empty_moov"}
    data = files.write_video(tmp_path / "f.mp4", 16, muxer_options=options, audio=True).read_bytes()
    media.check_media(data, OPEN)
    assert has_sound_tables(io.BytesIO(data), 100)
    start = data.index(b"trun") + 8
    bomb = data[:start] + (2**31).to_bytes(4, "big") + data[start + 4 :]
    assert not has_sound_tables(io.BytesIO(bomb), 10**6)
    nest = b"".join((8 * (5000 - depth)).to_bytes(4, "big") + b"moov" for depth in range(5000))
    assert has_sound_tables(io.BytesIO(nest), 1)
    for junk in (b"", bytes(100), b"\xff" * 100, b"\0\0\0\1mdat" + b"\xff" * 8, b"\0\0\0\x08moov"):
        assert has_sound_tables(io.BytesIO(junk), 1)


def test_uncompressed_sound_has_as_many_samples_as_it_likes(tmp_path: Path) -> None:
    import av
    import numpy as np

    with av.open(str(tmp_path / "a.mov"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.int16), format="s16", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with (tmp_path / "a.mov").open("rb") as file:
        assert has_sound_tables(file, 10)
