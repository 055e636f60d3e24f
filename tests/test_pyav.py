"""What FFmpeg may open: one file, of a format that holds its pictures itself."""

import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import av.error
import pytest
from av.format import ContainerFormat, formats_available
from PIL import Image

import media
from hicom import read_frames
from hicom.pyav import FORMATS, open_input
from hicom.serve.media import MediaError, MediaLimits, check_media
from hicom.video import VideoError

# Formats of FFmpeg whose files name other files or addresses, and devices.
OUTWARD = """
    alsa avfoundation avisynth concat dash decklink dshow dvdvideo fbdev gdigrab hls image2 imf jack kmsgrab lavfi
    libcdio mlv oss pulse rtp rtsp sap sdp sndio v4l2 vapoursynth vfwcap vobsub webm_dash_manifest x11grab xcbgrab
"""
PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{0}\n#EXT-X-ENDLIST\n"
CONCAT = "ffconcat version 1.0\nfile '{0}'\n"
SDP = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {0} RTP/AVP 96\na=rtpmap:96 H264/90000\n"
DASH = (
    '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT2S" '
    'profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period><AdaptationSet mimeType="video/mp2t">'
    '<Representation id="1" bandwidth="1"><BaseURL>{0}</BaseURL></Representation></AdaptationSet></Period></MPD>'
)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a video that is nobody's business."""
    return media.write_video(tmp_path_factory.mktemp("private") / "film.ts", 16, fps=8)


def readers(path: Path) -> list[Callable[[], object]]:
    """Return all the ways in which a file from a stranger is read."""
    data = path.read_bytes()
    return [
        lambda: read_frames(path, num_frames=2),
        lambda: read_frames(data, num_frames=2),
        lambda: read_frames(path.open("rb"), num_frames=2),
        lambda: check_media(path, MediaLimits()),
        lambda: check_media(data, MediaLimits()),
    ]


def is_refused(path: Path) -> None:
    for read in readers(path):
        with pytest.raises((VideoError, MediaError), match="no video"):
            read()


@pytest.mark.parametrize("suffix", ["m3u8", "ffconcat", "mpd", "mp4", "ts", "txt", "png"])
@pytest.mark.parametrize("text", [PLAYLIST, CONCAT, DASH])
def test_what_names_other_files_is_refused(
    tmp_path: Path, film: Path, text: str, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    (uploads / "near.ts").write_bytes(film.read_bytes())
    monkeypatch.chdir(uploads)
    for name in (str(film), f"file://{film}", os.path.relpath(film, uploads), "near.ts"):
        upload = uploads / f"x.{suffix}"
        upload.write_text(text.format(name))
        is_refused(upload)


def test_a_refused_playlist_says_what_to_give(tmp_path: Path, film: Path) -> None:
    (tmp_path / "x.m3u8").write_text(PLAYLIST.format(film))
    with pytest.raises(VideoError, match=r"x\.m3u8: .*playlists.*HLS.*are not read: give the video itself"):
        read_frames(tmp_path / "x.m3u8")


@pytest.mark.parametrize("suffix", ["sdp", "mp4"])
def test_a_description_of_a_stream_opens_no_socket(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"x.{suffix}").write_text(SDP.format(15004))
    seen, is_done = [], threading.Event()

    def watch() -> None:
        while not is_done.wait(0.02):
            seen.append(any(f":{15004:04X} " in Path(f"/proc/net/{kind}").read_text() for kind in ("udp", "udp6")))

    watcher = threading.Thread(target=watch)
    if Path("/proc/net/udp6").exists():
        watcher.start()
    start = time.monotonic()
    try:
        is_refused(tmp_path / f"x.{suffix}")
    finally:
        is_done.set()
        if watcher.ident:
            watcher.join()
    assert time.monotonic() - start < 5, "it waited for packets"
    assert not any(seen)


def test_neighbours_of_a_picture_are_not_read(tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"p{number:03}.dib")
    (tmp_path / "p%03d.exr").write_bytes(b"none")
    is_refused(tmp_path / "p%03d.exr")
    with pytest.raises(av.error.FFmpegError):
        open_input(tmp_path / "p%03d.jpg")


def test_no_format_of_the_list_opens_anything_else() -> None:
    allowed = FORMATS.split(",")
    assert len(allowed) == len(set(allowed))
    assert not set(allowed) & set(OUTWARD.split())
    for name in set(allowed) & formats_available:
        # NOFILE: the demuxer opens what it likes on its own; so do all devices.
        assert not ContainerFormat(name, "r").flags & 0x0001, name
    newer = {"apv", "jpegxs_pipe"}  # than FFmpeg 7, which PyAV 15 has
    assert set(allowed) - formats_available <= newer, "misspelt"


def test_names_that_look_like_addresses_are_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("http:a.mp4", "file:b.mp4", "concat:c.mp4|d.mp4", "a,b.mp4", "%03d.mp4", "ä ö.mp4"):
        media.write_video(tmp_path / "x.mp4", 4).rename(name)
        with open_input(Path(name)) as container:
            assert sum(1 for packet in container.demux(video=0) if packet.size) == 4
        assert len(read_frames(name).frames) == 4


@pytest.mark.parametrize(
    "suffix", ["bmp", "gif", "ico", "jp2", "jpg", "pcx", "png", "ppm", "sgi", "tga", "tiff", "webp"]
)
def test_pictures_are_read_as_before(tmp_path: Path, suffix: str) -> None:
    Image.new("RGB", (16, 16), "red").save(tmp_path / f"a.{suffix}")
    (frame,) = read_frames(tmp_path / f"a.{suffix}").frames
    assert abs(frame[8, 8].astype(int) - [255, 0, 0]).max() < 4


def test_containers_whose_streams_turn_up_late_leave_memory_alone(tmp_path: Path) -> None:
    """Options of all streams are freed for streams that have none; it kills the process, if not always."""
    names = []
    for name, codec in {"a.swf": "flv", "a.flv": "flv", "a.mpg": "mpeg1video", "a.ts": "mpeg2video"}.items():
        names.append(str(media.write_video(tmp_path / name, 8, fps=25, codec=codec)))
    code = (
        "import io, sys; from hicom.pyav import open_input; from pathlib import Path\n"
        "for name in sys.argv[1:]:\n"
        "    for _ in range(20):\n"
        "        keep = [bytes(n) for n in range(8, 2048, 8)]\n"
        "        open_input(Path(name)).close(); open_input(io.BytesIO(Path(name).read_bytes())).close()"
    )
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_open_file_is_read_under_any_name(film: Path) -> None:
    file = io.BytesIO(film.read_bytes())
    file.name = "film.m3u8"  # FFmpeg sees this name
    with open_input(file) as container:
        assert container.format.name == "mpegts"
