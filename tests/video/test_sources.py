"""Sources: whatever holds a video is read, and what does not is refused by name."""

import io
import mmap
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

import hicom.video.sources as sources
from hicom.video import VideoError, probe, read_frames
from media import number_frame, read_numbers, write_video

NUM_FRAMES = 30


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("sources") / "clip.mp4", NUM_FRAMES)


@pytest.fixture(scope="module")
def site(clip: Path) -> Iterator[str]:
    class Site(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "/clip.mp4?key=secret")
                self.end_headers()
                return
            found = self.path.startswith("/clip.mp4")
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(clip.read_bytes() if found else b"")

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def numbers(source: Any, **choice: Any) -> list[int]:
    return read_numbers(read_frames(source, **choice).frames)


# Memory


def test_what_holds_the_bytes(clip: Path) -> None:
    data = clip.read_bytes()
    with clip.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for source in (data, bytearray(data), memoryview(data), memoryview(data + data)[: len(data)], mapped):
        assert numbers(source) == list(range(NUM_FRAMES))
        assert numbers(source, num_frames=3) == [5, 15, 24]
    still = io.BytesIO()
    Image.fromarray(number_frame(7)).save(still, "PNG")
    assert numbers(memoryview(still.getvalue())) == [7]
    mapped.close()
    with pytest.raises(VideoError, match="video in mapped memory: cannot be read: "):
        read_frames(mapped)


def test_a_closed_file_is_told(clip: Path) -> None:
    file = clip.open("rb")
    file.close()
    with pytest.raises(VideoError, match=r"clip.mp4: cannot be read: .*closed file"):
        read_frames(file)


# Tensors and arrays


def test_tensors_and_arrays_in_both_layouts() -> None:
    array = np.stack([number_frame(number) for number in range(5)])
    tensor = torch.from_numpy(array)
    first = tensor.permute(0, 3, 1, 2)
    for source in (tensor, first, first.contiguous(), first.numpy(), list(tensor), list(first), tuple(first.numpy())):
        clip = read_frames(source, source_fps=10)
        assert np.array_equal(clip.frames, array)
        assert clip.timestamps_s.tolist() == [0, 0.1, 0.2, 0.3, 0.4]
    assert numbers(first[3]) == numbers(tensor[3]) == numbers([first[3]]) == [3]
    assert read_frames(first.requires_grad_(False), size=48).frames.shape == (5, 32, 48, 3)
    assert probe(tensor).name == "uint8[5, 64, 96, 3]"


def test_a_tensor_that_may_be_either_layout_is_refused() -> None:
    with pytest.raises(VideoError, match=r"uint8\[4, 3, 20, 3\]: this may be \[T, 3, H, W\] or \[T, H, W, 3\]"):
        read_frames(torch.zeros(4, 3, 20, 3, dtype=torch.uint8))
    with pytest.raises(VideoError, match=r"frame 0: this may be \[3, H, W\] or \[H, W, 3\]"):
        read_frames([torch.zeros(3, 20, 3, dtype=torch.uint8)])
    # An array is what the documentation says.
    assert read_frames(np.zeros((4, 3, 20, 3), np.uint8)).frames.shape == (4, 3, 20, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_other_numbers_are_refused_with_the_fix(dtype: torch.dtype) -> None:
    with pytest.raises(VideoError, match=r"frames must be uint8, .*\(x \* 255\).round\(\).to\(torch.uint8\)"):
        read_frames(torch.zeros(2, 3, 8, 8).to(dtype))
    with pytest.raises(VideoError, match=r"frame 0 is float32.*\(x \* 255\).round\(\).astype\('uint8'\)"):
        read_frames(np.zeros((2, 8, 8, 3), np.float32))


@pytest.mark.parametrize("shape", [(4, 8, 8), (8, 8), (4, 1, 8, 8), (4, 8, 8, 4), (1, 4, 8, 8, 3), (0, 3, 8, 8)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    for source in (torch.zeros(shape, dtype=torch.uint8), np.zeros(shape, np.uint8)):
        with pytest.raises(VideoError, match=r"frames must be uint8\[H, W, 3\]|there are no frames"):
            read_frames(source)


def test_reading_loads_no_torch(clip: Path) -> None:
    code = "import sys; from hicom.video import read_frames; read_frames(sys.argv[1]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(clip)], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# Decoded frames, iterators


def test_decoded_frames_keep_their_times(tmp_path: Path) -> None:
    path = write_video(tmp_path / "vfr.mkv", 5, ticks=[1000, 1100, 1500, 3000, 3100])
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    expected = read_frames(path)
    for source in (frames, tuple(frames), iter(frames)):
        clip = read_frames(source)
        assert read_numbers(clip.frames) == [0, 1, 2, 3, 4]
        assert np.allclose(clip.timestamps_s, expected.timestamps_s)
        assert clip.info.duration_s == pytest.approx(expected.info.duration_s, abs=0.05)
    assert numbers(frames, timestamps_s=[1.0, 2.05, 2.1]) == [2, 3, 4]
    assert numbers(frames[2]) == [2]
    assert np.array_equal(read_frames(frames, size=48).frames, read_frames(path, size=48).frames)
    with pytest.raises(VideoError, match=r"the times \(pts\) of frames must rise"):
        read_frames(frames[::-1])
    for frame in frames:
        frame.pts = None
    assert read_frames(frames[::-1], source_fps=2).timestamps_s.tolist() == [0, 0.5, 1, 1.5, 2]


def test_decoded_frames_are_on_white() -> None:
    clear = av.VideoFrame.from_ndarray(np.zeros((8, 8, 4), np.uint8), format="rgba")
    assert read_frames(clear).frames.min() == 255


def test_iterators_are_read_to_their_end() -> None:
    assert numbers(number_frame(number) for number in range(4)) == [0, 1, 2, 3]
    assert numbers(map(Image.fromarray, [number_frame(number) for number in (1, 2, 3)]), num_frames=1) == [2]
    with pytest.raises(VideoError, match="there are no frames in it"):
        read_frames(iter([]))


# Pipes and standard input


def test_pipes_are_kept(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for memory in (2**26, 1000):  # in memory, and on a disk
        monkeypatch.setattr(sources, "_IN_MEMORY", memory)
        for source in (fifo, str(fifo)):
            writer = threading.Thread(target=lambda: fifo.write_bytes(clip.read_bytes()), daemon=True)
            writer.start()
            assert numbers(source, num_frames=3) == [5, 15, 24]
            writer.join()
        with subprocess.Popen(["cat", str(clip)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert numbers(process.stdout) == list(range(NUM_FRAMES))
    monkeypatch.setattr(sources, "MAX_STREAM_BYTES", 2000)
    with subprocess.Popen(["cat", str(clip)], stdout=subprocess.PIPE) as process:
        with pytest.raises(VideoError, match="more than 2,000 bytes come; save it to a file, and give its path"):
            read_frames(process.stdout)
        assert process.stdout is not None
        process.stdout.read()


@pytest.mark.parametrize("name", ["-", "/dev/stdin", "-#t=0.5"])
def test_standard_input(clip: Path, name: str) -> None:
    code = "import sys; from hicom.video import read_frames; print(read_frames(sys.argv[1]).frames.shape[0])"
    command = f"cat {clip} | {sys.executable} -c '{code}' {name}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout == ("15\n" if "#" in name else "30\n"), done.stderr


def test_the_command_line_takes_pipes_and_urls(clip: Path, site: str) -> None:
    for shell in (f"cat {clip} | HICOM info -", f"HICOM info {site}/clip.mp4"):
        command = shell.replace("HICOM", f"{sys.executable} -m hicom")
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        assert "30 frames at 30 fps" in done.stdout, done.stderr


def test_a_terminal_is_no_video() -> None:
    ours, theirs = pty.openpty()
    code = "from hicom.video import read_frames; read_frames('-')"
    done = subprocess.run([sys.executable, "-c", code], stdin=theirs, capture_output=True, text=True, timeout=60)
    os.close(ours)
    os.close(theirs)
    assert "VideoError: -: standard input is a terminal; pipe a video into it" in done.stderr


# URLs


def test_urls(clip: Path, site: str) -> None:
    for url in (f"{site}/clip.mp4", f"{site}/moved", f"{site}/clip.mp4?key=secret", clip.as_uri()):
        assert numbers(url, num_frames=3) == [5, 15, 24]
        assert numbers(f"{url}#t=0.5,0.6") == [15, 16, 17]
    assert probe(f"{site}/clip.mp4?key=secret").name == f"{site}/clip.mp4"


def test_what_cannot_be_fetched_is_told(site: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limits = sources.FETCH_LIMITS
    monkeypatch.setattr(sources, "FETCH_LIMITS", type(limits)(max_bytes=2000, timeout_s=5, allow_private=True))
    for url, told in (
        (f"{site}/missing", "/missing: .* answered with status 404"),
        (f"{site}/clip.mp4", "clip.mp4: .* more than 2,000 bytes"),
        ("http://127.0.0.1:1/clip.mp4", "could not be fetched .*refused"),
        ("http://", "malformed|without a user name"),
        ("ftp://example.org/clip.mp4", "there is no way to read ftp://"),
        ("rtsp://example.org/clip", "there is no way to read rtsp://"),
        ("file://elsewhere/clip.mp4", "the file is on another host"),
        ((tmp_path / "no.mp4").as_uri(), "no.mp4: no such file"),
        ("http://user:secret@127.0.0.1:1/clip.mp4?key=secret", "http://127.0.0.1:1/clip.mp4: "),
    ):
        with pytest.raises(VideoError, match=told) as caught:
            read_frames(url)
        assert "secret" not in str(caught.value)


def test_a_path_object_is_a_file_of_this_machine(site: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for source in (Path(f"{site}/clip.mp4"), Path("-"), Path(f"file://{tmp_path}")):
        with pytest.raises(VideoError, match="no such file or folder"):
            read_frames(source)
    Image.fromarray(number_frame(4)).save("-", "PNG")
    assert numbers(Path("-")) == [4]
    assert numbers("./-") == [4]


# Text that is no path


def test_an_empty_path_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(number_frame(4)).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    for text in ("", "  "):
        with pytest.raises(VideoError, match="the path of the video is empty"):
            read_frames(text)
    assert numbers(".") == [4]


@pytest.mark.parametrize("text", ["x" * 5000, "x/" * 2500, "http://127.0.0.1:1/" + "x" * 5000, "a\0b" * 2000])
def test_long_names_are_shortened(text: str) -> None:
    for source in (text, f"{text}#t=1,2"):
        with pytest.raises(VideoError) as caught:
            read_frames(source)
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "choice",
    [{"fps": "2"}, {"start_s": "1"}, {"end_s": [1]}, {"timestamps_s": "12"}, {"timestamps_s": ["1"]}, {"fps": True}],
)
def test_text_is_no_number(clip: Path, choice: dict[str, Any]) -> None:
    with pytest.raises(VideoError, match=rf"clip.mp4: {next(iter(choice))}="):
        read_frames(clip, **choice)
    with pytest.raises(VideoError, match="source_fps='2': give a positive number"):
        read_frames(clip, source_fps="2")  # type: ignore[arg-type]
