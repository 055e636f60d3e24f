"""The video reader: every frame of a test video shows its number, so wrong frames and wrong times cannot hide."""

import contextlib
import dataclasses
import io
import math
import subprocess
import sys
import threading
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import hicom.video
import hicom.video.choose
import hicom.video.decode
from hicom.video import (
    VideoError,
    VideoWarning,
    probe,
    read_frames,
    split_bounds,
    uniform_indices,
    with_bounds,
)
from media import (
    damage,
    number_frame,
    read_number,
    read_numbers,
    remux,
    truncate,
    video_maker,
    write_audio,
    write_cover,
    write_empty,
    write_video,
)

# Names of containers and codecs with the arguments that write them: many ways to order and to refer to frames.
OPEN_GOP = {"x264-params": "keyint=15:bframes=3:open-gop=1:b-adapt=0:scenecut=0", "preset": "veryfast"}
STRUCTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "b-frames": ("mp4", {"codec_options": {"g": "12", "bf": "3"}}),
    "b-pyramid": ("mkv", {"codec_options": {"x264-params": "keyint=30:bframes=8:b-pyramid=normal:b-adapt=0"}}),
    "one long group": ("mp4", {"codec_options": {"g": "600", "bf": "3", "sc_threshold": "0"}}),
    "open groups": ("mp4", {"codec_options": OPEN_GOP}),
    "open groups in a transport stream": ("ts", {"codec_options": OPEN_GOP}),
    "groups shorter than the delay": ("mp4", {"codec_options": {"x264-params": "keyint=3:bframes=2:b-adapt=0"}}),
    "key frames only": ("mp4", {"codec_options": {"g": "1"}}),
    "fragments": ("mp4", {"codec_options": {"g": "12"}, "muxer_options": {"movflags": "frag_keyframe+empty_moov"}}),
    "no duration": ("mkv", {"muxer_options": {"live": "1"}}),
    "flash": ("flv", {}),
    "mpeg2": ("mpg", {"codec": "mpeg2video", "codec_options": {"bf": "2", "g": "12"}}),
    "mpeg4": ("avi", {"codec": "mpeg4"}),
    "vp8": ("webm", {"codec": "libvpx", "codec_options": {"g": "20"}}),
    "vp9": ("webm", {"codec": "libvpx-vp9", "codec_options": {"g": "20", "cpu-used": "8", "deadline": "realtime"}}),
    "motion jpeg": ("avi", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}),
    "hevc": ("mp4", {"codec": "libx265", "codec_options": {"x265-params": "keyint=20:bframes=4:log-level=none"}}),
    "av1": ("mp4", {"codec": "libsvtav1", "codec_options": {"g": "20", "preset": "8", "crf": "10"}}),
    "gif": ("gif", {"codec": "gif", "pix_fmt": "rgb8"}),
}
# Here nothing says which packet is which frame: the reader has to decode everything to find out.
OPAQUE: dict[str, tuple[str, dict[str, Any]]] = {
    "b-frames in avi": ("avi", {"codec_options": {"g": "12", "bf": "3"}}),
    "mpeg4 b-frames in avi": ("avi", {"codec": "mpeg4", "codec_options": {"bf": "2", "g": "12"}}),
    "raw h264": ("264", {"format": "h264"}),
    "no key frames": ("mp4", {"codec_options": {"x264-params": "intra-refresh=1:keyint=30"}}),
}
NUM_FRAMES = 120


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("videos")

    return video_maker(folder, STRUCTURES | OPAQUE, NUM_FRAMES)


@pytest.fixture
def decoding(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the packets that go into the decoder and the frames that come out."""
    counts: Counter[str] = Counter()
    decode = hicom.video.decode.Video._decode
    lock = threading.Lock()  # several threads decode

    def counted(clip: Any, stream: Any, packet: Any) -> Any:
        frames = decode(clip, stream, packet)
        with lock:
            counts.update(packets=packet is not None, frames=len(frames))
        return frames

    monkeypatch.setattr(hicom.video.decode.Video, "_decode", counted)
    return counts


def decode_all(path: Path) -> list[np.ndarray[Any, Any]]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


# Which frames


@given(total=st.integers(1, 5000), num_frames=st.integers(1, 600))
def test_uniform_indices_are_the_middles_of_equal_segments(total: int, num_frames: int) -> None:
    indices = uniform_indices(total, num_frames)
    if total <= num_frames:
        assert indices == list(range(total))
        return
    official = [round((i + 0.5) * (total - 1) / num_frames + 1e-6) for i in range(num_frames)]
    assert indices == official
    assert indices == sorted(set(indices))
    assert indices[0] >= 0
    assert indices[-1] < total
    mirrored = [total - 1 - index for index in reversed(indices)]
    assert max(abs(a - b) for a, b in zip(indices, mirrored, strict=True)) <= 1


@pytest.mark.parametrize(("total", "num_frames"), [(0, 4), (4, 0), (-1, 4), (4, -1)])
def test_uniform_indices_needs_positive_numbers(total: int, num_frames: int) -> None:
    with pytest.raises(VideoError, match="positive"):
        uniform_indices(total, num_frames)


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.usefixtures("no_scan")
def test_all_frames_come_in_order_with_their_times(videos: Callable[[str], Path], name: str) -> None:
    clip = read_frames(videos(name))
    assert read_numbers(clip.frames) == list(range(NUM_FRAMES))
    # Containers round to their clock: GIF to 10 ms, others to 1 ms or better.
    np.testing.assert_allclose(clip.timestamps_s, np.arange(NUM_FRAMES) / 30, atol=0.0051 if name == "gif" else 0.00051)
    assert clip.info.num_frames == NUM_FRAMES
    assert clip.info.duration_s == pytest.approx(NUM_FRAMES / 30, abs=0.01)
    assert clip.info.fps == pytest.approx(30, abs=0.1)
    assert clip.frames.dtype == np.uint8
    assert clip.timestamps_s.dtype == np.float64
    if name != "gif":  # no chroma to interpolate: the same pixels as an independent, sequential decode
        difference = np.abs(clip.frames.astype(int) - np.stack(decode_all(videos(name))))
        assert difference.mean() < 1


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("seek_packets", [1, 10**9])
@pytest.mark.usefixtures("no_scan")
def test_few_frames_equal_those_of_a_full_read(
    videos: Callable[[str], Path], name: str, seek_packets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hicom.video.decode, "_SEEK_PACKETS", seek_packets)
    full = read_frames(videos(name))
    for num_frames in (1, 2, 3, 7, 16, 50):
        chosen = uniform_indices(NUM_FRAMES, num_frames)
        clip = read_frames(videos(name), num_frames=num_frames)
        assert np.array_equal(clip.frames, full.frames[chosen])
        assert np.array_equal(clip.timestamps_s, full.timestamps_s[chosen])
    for index in range(0, NUM_FRAMES, 11):
        times = full.timestamps_s[[index, (index + 61) % NUM_FRAMES]]
        clip = read_frames(videos(name), timestamps_s=times)
        assert read_numbers(clip.frames) == [index, (index + 61) % NUM_FRAMES]


@pytest.mark.parametrize("name", OPAQUE)
def test_frames_are_right_where_time_stamps_do_not_tell(videos: Callable[[str], Path], name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for num_frames in (1, 5, 16, NUM_FRAMES):
            clip = read_frames(videos(name), num_frames=num_frames)
            chosen = uniform_indices(NUM_FRAMES, num_frames)
            assert read_numbers(clip.frames) == chosen
            np.testing.assert_allclose(clip.timestamps_s, np.array(chosen) / 30, atol=0.001)
        for index in (0, 1, 2, 50, 51, 52, 118, 119):
            assert read_numbers(read_frames(videos(name), timestamps_s=[index / 30]).frames) == [index]
        assert clip.info.num_frames == NUM_FRAMES


def test_clocks_that_start_again_do_not_shuffle_the_frames(tmp_path: Path) -> None:
    parts = []
    for part, delay in enumerate((0, 1500)):  # the times of the second part fall between those of the first
        path = tmp_path / f"{part}.ts"
        ticks = [number * 3000 + delay for number in range(30)]
        write_video(path, 30, ticks=ticks, ticks_per_s=90000, codec_options={"g": "10", "bf": "0"})
        parts.append(path.read_bytes())
    clip = read_frames(b"".join(parts))
    assert read_numbers(clip.frames) == [*range(30), *range(30)]
    np.testing.assert_allclose(clip.timestamps_s, np.arange(60) / 30, atol=1e-3)
    few = read_frames(b"".join(parts), num_frames=4)
    assert read_numbers(few.frames) == [index % 30 for index in uniform_indices(60, 4)]


def test_wrong_key_frame_flags_are_noticed(tmp_path: Path) -> None:
    def claim(packet: Any) -> list[Any]:
        packet.is_keyframe = True
        return [packet]

    honest = write_video(tmp_path / "honest.mp4", 60, codec="mpeg4", codec_options={"g": "20"})
    clip = read_frames(remux(honest, tmp_path / "lying.mkv", claim), num_frames=4)
    assert read_numbers(clip.frames) == uniform_indices(60, 4)


@pytest.mark.usefixtures("no_scan")
def test_hidden_reference_pictures_are_not_frames(tmp_path: Path) -> None:
    def add_hidden(packet: Any) -> list[Any]:
        if not packet.is_keyframe or packet.pts == 0:
            return [packet]
        data = bytearray(bytes(packet))
        data[0] &= ~0x10  # show_frame
        hidden = av.Packet(bytes(data))
        hidden.pts = hidden.dts = packet.pts - 5
        hidden.time_base, hidden.is_keyframe = packet.time_base, True
        return [hidden, packet]

    plain = write_video(tmp_path / "plain.webm", 60, codec="libvpx", codec_options={"g": "20"})
    clip = read_frames(remux(plain, tmp_path / "hidden.webm", add_hidden))
    assert read_numbers(clip.frames) == list(range(60))


@pytest.mark.parametrize("suffix", ["mp4", "mov"])
@pytest.mark.usefixtures("no_scan")
def test_frames_that_an_edit_list_cuts_away_are_not_there(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cut.{suffix}"
    ticks = [(i - 10) * 40 for i in range(40)]  # times before 0 are cut by the edit list
    options = {"avoid_negative_ts": "disabled"}
    write_video(path, 40, ticks=ticks, muxer_options=options, codec_options={"g": "8", "bf": "2"})
    clip = read_frames(path)
    assert read_numbers(clip.frames) == list(range(10, 40))
    np.testing.assert_allclose(clip.timestamps_s, np.arange(30) * 0.04)
    assert read_numbers(read_frames(path, num_frames=3).frames) == [10 + i for i in uniform_indices(30, 3)]
    assert clip.info.damage == ""


# When: bounds, rates, times

VARIABLE_TICKS = np.cumsum([0, 40, 40, 7, 400, 33, 33, 1000, 5, 5, 5, 90, 250, 250, 3, 60, 60, 60, 2000, 40])


@pytest.fixture(scope="module", params=["mp4", "mkv"])
def variable(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("variable") / f"variable.{request.param}"
    ticks = [int(tick) + 320 for tick in VARIABLE_TICKS]  # does not start at 0
    write_video(path, len(ticks), ticks=ticks, codec_options={"g": "6", "bf": "2"})
    return path


@pytest.mark.usefixtures("no_scan")
def test_a_variable_frame_rate_keeps_its_times(variable: Path) -> None:
    clip = read_frames(variable)
    assert read_numbers(clip.frames) == list(range(20))
    np.testing.assert_allclose(clip.timestamps_s, VARIABLE_TICKS / 1000, atol=1e-9)
    assert read_numbers(read_frames(variable, num_frames=6).frames) == uniform_indices(20, 6)


@pytest.mark.usefixtures("no_scan")
def test_a_time_gives_the_frame_on_screen(variable: Path) -> None:
    for time_s in (0.0, 0.039, 0.04, 0.086, 0.087, 0.4, 0.487, 1.5, 4.3, 2.0, 0.2):
        clip = read_frames(variable, timestamps_s=[time_s])
        number = int(np.searchsorted(VARIABLE_TICKS / 1000, time_s, side="right")) - 1
        assert read_numbers(clip.frames) == [number], time_s
        assert clip.timestamps_s[0] == pytest.approx(VARIABLE_TICKS[number] / 1000)


@pytest.mark.parametrize(
    ("fps", "start_s", "end_s"),
    [
        (1, None, None),
        (2, 0.5, 3.5),
        (30, None, None),
        (7, 0.1, 0.6),
        (1000, None, None),
        (1e12, 1.0, 2.0),
        (0.1, 2, 4),
    ],
)
@pytest.mark.usefixtures("no_scan")
def test_a_rate_gives_the_frames_on_screen_at_its_ticks(
    variable: Path, fps: float, start_s: float | None, end_s: float | None
) -> None:
    clip = read_frames(variable, fps=fps, start_s=start_s, end_s=end_s)
    begin, end = start_s or 0.0, end_s or clip.info.duration_s
    ticks = np.arange(begin, end - 1e-4, 1 / min(fps, 1e4))
    expected = sorted({int(np.searchsorted(VARIABLE_TICKS / 1000, tick + 1e-7, side="right")) - 1 for tick in ticks})
    assert read_numbers(clip.frames) == expected


@pytest.mark.usefixtures("no_scan")
def test_the_rate_of_the_video_gives_every_frame_despite_rounded_times(videos: Callable[[str], Path]) -> None:
    for name in ("b-frames", "b-pyramid"):  # MP4, and Matroska whose clock ticks once per ms
        assert read_numbers(read_frames(videos(name), fps=30).frames) == list(range(NUM_FRAMES))
        assert read_numbers(read_frames(videos(name), fps=10).frames) == list(range(0, NUM_FRAMES, 3))


@pytest.mark.usefixtures("no_scan")
def test_bounds_keep_the_frames_on_screen_between_them(videos: Callable[[str], Path]) -> None:
    path = videos("b-frames")
    assert read_numbers(read_frames(path, start_s=1, end_s=2).frames) == list(range(30, 60))
    assert read_numbers(read_frames(path, start_s=3.5).frames) == list(range(105, 120))
    assert read_numbers(read_frames(path, end_s=0.1).frames) == [0, 1, 2]
    assert read_numbers(read_frames(path, start_s=1.01, end_s=1.02).frames) == [30]  # between two frames
    assert read_numbers(read_frames(path, start_s=1, end_s=1.0001).frames) == [30]
    clip = read_frames(path, num_frames=4, start_s=1, end_s=3)
    assert read_numbers(clip.frames) == [30 + i for i in uniform_indices(60, 4)]
    assert clip.timestamps_s[0] == pytest.approx((30 + uniform_indices(60, 4)[0]) / 30)


@pytest.mark.usefixtures("no_scan")
def test_max_frames_spreads_what_is_left(videos: Callable[[str], Path]) -> None:
    path = videos("b-frames")
    assert read_numbers(read_frames(path, fps=10, max_frames=8).frames) == uniform_indices(NUM_FRAMES, 8)
    assert read_numbers(read_frames(path, max_frames=8).frames) == uniform_indices(NUM_FRAMES, 8)
    assert read_numbers(read_frames(path, fps=1, max_frames=8).frames) == [0, 30, 60, 90]


@pytest.mark.usefixtures("no_scan")
def test_times_come_in_the_order_asked_for(videos: Callable[[str], Path]) -> None:
    clip = read_frames(videos("b-frames"), timestamps_s=[3.0, 0.0, 3.0, 4.0, 1.55])
    assert read_numbers(clip.frames) == [90, 0, 90, 119, 46]
    np.testing.assert_allclose(clip.timestamps_s, [3.0, 0.0, 3.0, 119 / 30, 46 / 30])


def test_a_shorter_video_gives_all_its_frames_once(tmp_path: Path) -> None:
    path = write_video(tmp_path / "short.mp4", 5)
    assert read_numbers(read_frames(path, num_frames=64).frames) == [0, 1, 2, 3, 4]
    path = write_video(tmp_path / "one.mp4", 1)
    clip = read_frames(path, num_frames=8)
    assert read_numbers(clip.frames) == [0]
    assert clip.info.duration_s == pytest.approx(1 / 30)


def test_an_end_past_the_end_is_said(videos: Callable[[str], Path]) -> None:
    with pytest.warns(VideoWarning, match=r"end_s=9 is past the end; reading to the end at 4 s"):
        clip = read_frames(videos("b-frames"), start_s=3, end_s=9)
    assert read_numbers(clip.frames) == list(range(90, 120))


# What is decoded


@pytest.mark.usefixtures("no_scan")
def test_only_the_groups_with_chosen_frames_are_decoded(tmp_path: Path, decoding: Counter[str]) -> None:
    options = {"g": "30", "bf": "2", "sc_threshold": "0", "preset": "veryfast"}
    path = write_video(tmp_path / "long.mp4", 1500, codec_options=options)
    probe(path)
    num_packets = decoding["packets"]
    assert num_packets < 16  # what it takes to see the first picture
    decoding.clear()
    clip = read_frames(path, timestamps_s=[0.1, 20.0, 40.5])
    assert read_numbers(clip.frames) == [3, 600, 1215]
    assert decoding["packets"] - num_packets <= 6 + 1 + 18  # from the key frames 0, 600 and 1200


@pytest.mark.usefixtures("no_scan")
def test_pictures_that_nothing_needs_are_not_decoded(tmp_path: Path, decoding: Counter[str]) -> None:
    options = {"x264-params": "keyint=200:bframes=2:b-pyramid=none:b-adapt=0:scenecut=0"}
    path = write_video(tmp_path / "long.mp4", 90, codec_options=options)
    clip = read_frames(path, timestamps_s=[88 / 30])
    assert read_numbers(clip.frames) == [88]
    assert decoding["packets"] > 88
    assert decoding["frames"] < 45  # two of three are B-frames


def test_never_more_than_the_chosen_frames_are_held(tmp_path: Path) -> None:
    path = write_video(tmp_path / "large.mp4", 60, width=640, height=480, codec_options={"preset": "ultrafast"})
    frame_bytes = 640 * 480 * 3
    for num_frames in (2, 8):
        tracemalloc.start()
        read_frames(path, num_frames=num_frames)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < (num_frames + 3) * frame_bytes


@pytest.mark.parametrize(
    ("size", "expected"),
    [(96, (96, 64)), (48, (48, 32)), (50, (50, 33)), (1, (1, 1)), (4096, (96, 64)), (None, (96, 64))],
)
def test_size_limits_the_longer_side_and_never_enlarges(
    videos: Callable[[str], Path], size: int | None, expected: tuple[int, int]
) -> None:
    clip = read_frames(videos("b-frames"), num_frames=3, size=size)
    assert clip.frames.shape == (3, expected[1], expected[0], 3)
    assert (clip.info.width, clip.info.height) == (96, 64)
    if size != 1:
        assert read_numbers(clip.frames) == uniform_indices(NUM_FRAMES, 3)
    assert read_frames(number_frame(7)[None], size=size).frames.shape == (1, expected[1], expected[0], 3)


@pytest.mark.parametrize("hflip", [False, True])
@pytest.mark.parametrize("rotation", [90, 180, -90, 0])
def test_pictures_stand_upright(tmp_path: Path, rotation: int, hflip: bool) -> None:
    path = write_video(tmp_path / "turned.mp4", 12, rotation=rotation, hflip=hflip)
    clip = read_frames(path, size=48)
    assert clip.frames.shape == (12, 32, 48, 3)
    assert read_numbers(clip.frames) == list(range(12))
    assert (clip.info.width, clip.info.height) == (96, 64)
    if not hflip:
        assert clip.info.rotation % 360 == rotation % 360
        assert ("turned by" in clip.info.describe()) == (rotation != 0)


def test_a_change_of_size_within_the_video_is_evened_out(tmp_path: Path) -> None:
    parts = [write_video(tmp_path / f"{width}.264", 10, width=width, height=64, format="h264") for width in (96, 192)]
    path = tmp_path / "both.264"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    clip = read_frames(path)
    assert clip.frames.shape == (20, 64, 96, 3)
    assert read_numbers(clip.frames) == [*range(10), *range(10)]


# Sources


@pytest.mark.parametrize(
    "name", ["b-frames", "b-pyramid", "open groups in a transport stream", "b-frames in avi", "gif"]
)
def test_every_kind_of_source_gives_the_same(videos: Callable[[str], Path], name: str) -> None:
    path = videos(name)
    data = path.read_bytes()

    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def seek(self, offset: int, whence: int = 0) -> int:
            raise io.UnsupportedOperation("seek")

    expected = read_frames(path, num_frames=5)
    with path.open("rb") as file:
        file.read(100)  # a file that was read before
        for source in (str(path), data, bytearray(data), io.BytesIO(data), file, Pipe(data)):
            clip = read_frames(source, num_frames=5)  # type: ignore[arg-type]
            assert np.array_equal(clip.frames, expected.frames)
            assert np.array_equal(clip.timestamps_s, expected.timestamps_s)
            assert dataclasses.replace(clip.info, name="", container="") == dataclasses.replace(
                expected.info, name="", container=""
            )
        assert not file.closed


def test_a_folder_is_read_in_natural_order(tmp_path: Path) -> None:
    for number in range(12):
        Image.fromarray(number_frame(number)).save(
            tmp_path / f"Frame{number}.{'png' if number % 2 else 'JPG'}", format="png"
        )
    for other in ("notes.txt", ".Frame3.png", "Frame.mp4"):
        (tmp_path / other).write_text("not a frame")
    clip = read_frames(tmp_path, source_fps=4)
    assert read_numbers(clip.frames) == list(range(12))
    np.testing.assert_allclose(clip.timestamps_s, np.arange(12) / 4)
    assert clip.info.duration_s == 3
    assert read_numbers(read_frames(tmp_path, fps=1, source_fps=4).frames) == [0, 4, 8]
    assert read_numbers(read_frames(tmp_path, num_frames=4).frames) == uniform_indices(12, 4)


@pytest.mark.parametrize("suffix", ["webp", "gif", "png"])
def test_animated_images_keep_their_times(tmp_path: Path, suffix: str) -> None:
    durations = [100, 200, 40, 40, 400]
    images = [Image.fromarray(number_frame(number)) for number in range(5)]
    options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
    path = tmp_path / f"animated.{suffix}"
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, **options)
    clip = read_frames(path)
    assert read_numbers(clip.frames) == list(range(5))
    np.testing.assert_allclose(clip.timestamps_s, [0, 0.1, 0.3, 0.34, 0.38])
    assert clip.info.duration_s == pytest.approx(0.78)
    assert read_numbers(read_frames(path.read_bytes(), timestamps_s=[0.5, 0.31]).frames) == [4, 2]


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff", "ppm"])
def test_a_still_image_is_one_frame(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"still.{suffix}"
    Image.fromarray(number_frame(5)).save(path)
    for source in (path, path.read_bytes(), Image.open(path)):
        clip = read_frames(source, num_frames=8)
        assert read_numbers(clip.frames) == [5]
        assert clip.timestamps_s.tolist() == [0.0]


def test_still_images_are_turned_and_put_on_white(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees counterclockwise
    Image.fromarray(np.ascontiguousarray(np.rot90(number_frame(9)))).save(tmp_path / "turned.jpg", exif=exif)
    for source in (tmp_path / "turned.jpg", (tmp_path / "turned.jpg").read_bytes()):
        clip = read_frames(source)
        assert read_numbers(clip.frames) == [9]
        assert (clip.info.width, clip.info.height) == (96, 64)
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (read_frames(clear).frames == 255).all()
    deep = Image.fromarray(np.full((8, 8), 0x8000, np.uint16))
    assert (read_frames(deep).frames == 0x80).all()


def test_arrays_and_lists(tmp_path: Path) -> None:
    array = np.stack([number_frame(number) for number in range(10)])
    clip = read_frames(array, num_frames=3, source_fps=5)
    assert read_numbers(clip.frames) == uniform_indices(10, 3)
    np.testing.assert_allclose(clip.timestamps_s, np.array(uniform_indices(10, 3)) / 5)
    clip.frames[:] = 0
    assert read_number(array[uniform_indices(10, 3)[0]]) >= 0  # a copy
    Image.fromarray(array[2]).save(tmp_path / "2.png")
    mixed = [array[0], Image.fromarray(array[1]), tmp_path / "2.png", str(tmp_path / "2.png")]
    assert read_numbers(read_frames(mixed).frames) == [0, 1, 2, 2]
    assert read_numbers(read_frames(tuple(array)).frames) == list(range(10))
    assert read_numbers(read_frames(array[4]).frames) == [4]
    assert probe(array).describe() == "uint8[10, 64, 96, 3]: 0.40 s, 10 frames at 25 fps, 96x64, raw in array"


# Truncated and damaged


def test_a_truncated_mp4_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    options = {"g": "8", "bf": "2"}
    path = write_video(tmp_path / "clip.mp4", 64, codec_options=options, muxer_options={"movflags": "faststart"})
    truncate(path, 0.7)
    with pytest.warns(VideoWarning) as caught:
        clip = read_frames(path, num_frames=8)
    num_frames = clip.info.num_frames
    assert 10 < num_frames < 60
    assert [str(each.message) for each in caught] == [
        f"{path}: truncated: {num_frames} of 64 frames decode; using those"
    ]
    numbers = read_numbers(clip.frames)
    assert len(set(numbers)) == 8
    assert numbers == [round(time_s * 30) for time_s in clip.timestamps_s]  # what is there keeps its time
    assert numbers[-1] > 0.8 * num_frames  # spread over all that is left
    assert f"truncated: {num_frames} of 64 frames decode" in probe(path).describe()
    with pytest.warns(VideoWarning):
        assert len(read_frames(path).frames) == num_frames


@pytest.mark.parametrize(
    ("suffix", "keep", "muxer_options"),
    [("mkv", 0.45, {}), ("mp4", 0.45, {"movflags": "frag_keyframe+empty_moov"}), ("avi", 0.7, {})],
)
def test_other_truncated_files_are_read_as_far_as_they_go(
    tmp_path: Path, suffix: str, keep: float, muxer_options: dict[str, str]
) -> None:
    codec_options = {"g": "8", "bf": "0"}
    path = write_video(tmp_path / f"clip.{suffix}", 64, codec_options=codec_options, muxer_options=muxer_options)
    truncate(path, keep)
    # Before 17, PyAV shows no index, and a fragmented mp4 says nowhere else how many frames it has.
    is_unknown = bool(muxer_options) and int(av.__version__.split(".")[0]) < 17
    what = "damaged" if is_unknown else "truncated"
    with pytest.warns(VideoWarning, match=rf"{what}: \d+ of \d\d frames decode; using those"):
        clip = read_frames(path, num_frames=8)
    numbers = read_numbers(clip.frames)
    assert len(set(numbers)) == 8
    assert numbers == [round(time_s * 30) for time_s in clip.timestamps_s]
    assert clip.info.num_frames < 50


def test_a_truncated_transport_stream_is_simply_shorter(tmp_path: Path) -> None:
    path = truncate(write_video(tmp_path / "clip.ts", 64, codec_options={"g": "8"}), 0.5)
    clip = read_frames(path, num_frames=8)
    assert read_numbers(clip.frames) == [round(time_s * 30) for time_s in clip.timestamps_s]


def test_damage_in_the_middle_leaves_the_rest(tmp_path: Path) -> None:
    path = damage(write_video(tmp_path / "clip.mp4", 96, codec_options={"g": "8", "bf": "2"}), 0.4, 0.5)
    with pytest.warns(VideoWarning, match=r"clip\.mp4: damaged: \d\d of 96 frames decode; using those"):
        clip = read_frames(path)
    assert 60 < clip.info.num_frames < 96
    numbers = [round(time_s * 30) for time_s in clip.timestamps_s]
    assert {*range(40), *range(80, 96)} < set(numbers)  # both ends are there
    shown = dict(zip(numbers, read_numbers(clip.frames), strict=True))
    assert all(shown[number] == number for number in (*range(40), *range(80, 96)))
    with pytest.warns(VideoWarning, match="damaged"):
        few = read_frames(path, num_frames=clip.info.num_frames - 1)
    chosen = uniform_indices(clip.info.num_frames, clip.info.num_frames - 1)
    assert np.array_equal(few.timestamps_s, clip.timestamps_s[chosen])
    assert np.array_equal(few.frames, clip.frames[chosen])


def test_pictures_that_the_decoder_only_guesses_are_left_out(tmp_path: Path) -> None:
    path = damage(write_video(tmp_path / "clip.mp4", 96, codec_options={"g": "8", "bf": "2"}), 0.42, 0.425)
    with av.open(str(path)) as container:
        decoded = []
        for packet in container.demux(video=0):
            with contextlib.suppress(av.error.InvalidDataError):
                decoded += [(round(frame.time * 30), frame.is_corrupt) for frame in packet.decode()]
    sound = [number for number, is_corrupt in decoded if not is_corrupt]
    assert len(sound) < len(decoded) < 96
    with pytest.warns(VideoWarning, match=f"{len(sound)} of 96 frames decode"):
        clip = read_frames(path)
    assert [round(time_s * 30) for time_s in clip.timestamps_s] == sorted(sound)


@pytest.mark.parametrize("suffix", ["mkv", "ts"])
@pytest.mark.usefixtures("no_scan")
def test_a_start_in_the_middle_of_a_group_is_left_out(tmp_path: Path, suffix: str) -> None:
    whole = write_video(tmp_path / "whole.mkv", 60, codec_options={"g": "10", "bf": "0"})
    cut = remux(whole, tmp_path / f"cut.{suffix}", lambda packet: [packet] if packet.pts > 120 else [])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VideoWarning)  # some decoders call these frames damaged
        clip = read_frames(cut)
    assert read_numbers(clip.frames) == list(range(10, 60))
    np.testing.assert_allclose(np.diff(clip.timestamps_s), 1 / 30, atol=0.002)


def test_damage_that_no_chosen_frame_meets_is_not_decoded(tmp_path: Path) -> None:
    path = damage(write_video(tmp_path / "clip.mp4", 96, codec_options={"g": "8", "bf": "2"}), 0.4, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip = read_frames(path, timestamps_s=[0.1, 3.0])
    assert read_numbers(clip.frames) == [3, 90]


# Bad input


def broken_files(folder: Path) -> dict[str, tuple[Any, str]]:
    (folder / "nothing.mp4").write_bytes(b"")
    still = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    still.save(folder / "animated.webp", save_all=True, append_images=[still.rotate(90)], lossless=True)
    truncate(folder / "animated.webp", 0.4)
    (folder / "text.mp4").write_text("this is not a video\n" * 100)
    (folder / "folder").mkdir()
    (folder / "folder" / "notes.txt").write_text("no frames here")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    frame = number_frame(0)
    noise = np.random.default_rng(0).integers(0, 256, (128, 128), np.uint8)
    Image.fromarray(noise).save(folder / "cut.jpg")
    truncate(folder / "cut.jpg", 0.6)
    garbled = write_video(folder / "garbled.mp4", 30, muxer_options={"movflags": "faststart"})
    head = garbled.read_bytes()
    start = head.index(b"mdat") + 4
    garbled.write_bytes(head[:start] + noise.tobytes()[: len(head) - start])
    empty = {"movflags": "frag_keyframe+empty_moov"}
    return {
        "missing": (folder / "missing.mp4", "missing.mp4: no such file"),
        "folder without frames": (folder / "folder", "folder: the folder has no frames"),
        "empty": (folder / "nothing.mp4", r"nothing.mp4: the file is empty \(0 bytes\)"),
        "empty bytes": (b"", "the file is empty"),
        "text": (folder / "text.mp4", "text.mp4: no video found in it"),
        "audio": (write_audio(folder / "sound.mp4"), "sound.mp4: it has no video, only audio"),
        "audio with a cover": (write_cover(folder / "cover.mp4"), "cover.mp4: it has no video, only audio"),
        "no frames": (write_empty(folder / "empty.mp4", empty), "empty.mp4: the video stream has no frames"),
        "no index": (truncate(write_video(folder / "tail.mp4", 30), 0.3), "tail.mp4: no video found in it"),
        "nothing decodes": (garbled, "garbled.mp4: none of its 30 frames decodes"),
        "broken image": (folder / "broken.png", "broken.png: "),
        "truncated image": (folder / "cut.jpg", "cut.jpg: frame 0 cannot be decoded"),
        "truncated image in memory": ((folder / "cut.jpg").read_bytes()[:300], "cannot be read"),
        "truncated animation": ((folder / "animated.webp").read_bytes(), "video of .* bytes: "),
        "no images": ([], "list of 0 images: there are no frames"),
        "no array": (frame[:0], "there are no frames|frames must be"),
        "float array": (frame.astype(np.float32), "frame 0 is float32"),
        "gray array": (frame[None, ..., 0], "frames must be"),
        "sizes differ": ([frame, frame[:32]], "frame 1 is 96x32 but those before it are 96x64"),
        "list of text": (["missing.png"], "frame 0, missing.png, cannot be read"),
        "list of numbers": ([1, 2], "frame 0 is a int"),
        "text file": (io.StringIO("text"), "opened in binary mode"),
        "number": (12, "cannot read a video from this type"),
    }


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, str]]:
    return broken_files(tmp_path_factory.mktemp("broken"))


BROKEN = [
    "missing", "folder without frames", "empty", "empty bytes", "text", "audio", "audio with a cover", "no frames",
    "no index", "nothing decodes", "broken image", "truncated image", "truncated image in memory",
    "truncated animation", "no images", "no array",
    "float array", "gray array", "sizes differ", "list of text", "list of numbers", "text file", "number",
]  # fmt: skip


def test_every_broken_file_is_tested(broken: dict[str, tuple[Any, str]]) -> None:
    assert list(broken) == BROKEN


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_said_in_one_line(
    broken: dict[str, tuple[Any, str]], name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    source, message = broken[name]
    with pytest.raises(VideoError, match=message) as caught:
        read_frames(source)
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value) or "cannot be" in str(caught.value)  # says what to do, or what Pillow says
    if isinstance(source, Path):
        assert str(caught.value).startswith(str(source))
    captured = capfd.readouterr()
    assert captured.err == ""
    assert captured.out == ""


def test_a_playlist_opens_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "private.mp4", 5)
    playlist = b"ffconcat version 1.0\nfile 'private.mp4'\n"
    (tmp_path / "list.ffconcat").write_bytes(playlist)
    monkeypatch.chdir(tmp_path)
    for source in ("list.ffconcat", playlist):
        with pytest.raises(VideoError, match="no video found"):
            read_frames(source)


NAN = math.nan


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 0}, "num_frames=0: give a positive whole number"),
        ({"num_frames": -3}, "num_frames=-3"),
        ({"num_frames": 2.5}, "num_frames=2.5"),
        ({"num_frames": True}, "num_frames=True"),
        ({"max_frames": 0}, "max_frames=0"),
        ({"size": 0}, "size=0"),
        ({"fps": 0}, "fps=0: give a positive number"),
        ({"fps": -1.0}, "fps=-1.0"),
        ({"fps": NAN}, "fps=nan"),
        ({"fps": math.inf}, "fps=inf"),
        ({"start_s": -1.0}, "start_s=-1.0"),
        ({"end_s": NAN}, "end_s=nan"),
        ({"start_s": 2.0, "end_s": 2.0}, "start_s=2 is not before end_s=2"),
        ({"start_s": 3.0, "end_s": 2.0}, "start_s=3 is not before end_s=2"),
        ({"end_s": 0.0}, "start_s=0 is not before end_s=0"),
        ({"start_s": 4.0}, "start_s=4 is not before the end of the video at 4 s"),
        ({"timestamps_s": [1.0, 4.1]}, r"timestamp 4.1 s is not between 0 and the duration, 4 s"),
        ({"timestamps_s": [-0.1]}, "timestamp -0.1 s"),
        ({"timestamps_s": [NAN]}, "timestamp nan s"),
        ({"timestamps_s": []}, "timestamps_s is empty"),
        ({"timestamps_s": [1.0], "start_s": 0.0}, "leave start_s and end_s out"),
        ({"num_frames": 3, "fps": 1.0}, "num_frames and fps are different ways"),
        ({"num_frames": 3, "max_frames": 3}, "max_frames=3 goes with fps or alone, not with num_frames"),
        ({"source_fps": 0.0}, "source_fps=0.0"),
    ],
)
def test_choices_that_make_no_sense_are_refused(
    videos: Callable[[str], Path], arguments: dict[str, Any], message: str
) -> None:
    path = videos("b-frames")
    with pytest.raises(VideoError, match=message) as caught:
        read_frames(path, **arguments)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


# What it is


def test_probe_tells_what_a_video_is(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", 50, fps=25, rotation=90, audio=True)
    info = probe(path)
    assert info == read_frames(path, num_frames=1).info
    assert (info.container, info.codec, info.num_frames, info.rotation, info.has_audio) == ("mp4", "h264", 50, 90, True)
    assert (info.width, info.height, info.damage) == (96, 64, "")
    assert info.duration_s == pytest.approx(2)
    assert info.fps == pytest.approx(25)
    assert info.streams == ("video h264 64x96 yuv420p", "audio aac 16000 Hz mono")
    line = "2.00 s, 50 frames at 25 fps, 96x64, h264 in mp4, turned by 90 degrees, audio"
    assert info.describe() == f"{path}: {line}"


def test_the_library_stays_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = damage(write_video(tmp_path / "clip.mp4", 64, codec_options={"g": "8"}), 0.3, 0.6)
    capfd.readouterr()  # the encoder may talk
    with pytest.warns(VideoWarning):
        read_frames(path)
    assert capfd.readouterr() == ("", "")


def test_the_module_loads_no_torch() -> None:
    code = "import sys, hicom.video; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# Parts of files


def test_a_path_may_name_a_part_of_a_file(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", 60, fps=30)
    for part, bounds in {"0.5,1": (0.5, 1.0), "1.5": (1.5, None), ",0.4": (None, 0.4)}.items():
        expected = read_frames(path, num_frames=4, start_s=bounds[0], end_s=bounds[1])
        assert with_bounds(str(path), *bounds) == f"{path}#t={part}"
        for source in (f"{path}#t={part}", Path(f"{path}#t={part}")):
            found = read_frames(source, num_frames=4)
            assert found.timestamps_s.tolist() == expected.timestamps_s.tolist()
            assert read_numbers(found.frames) == read_numbers(expected.frames)
            assert probe(source).num_frames == 60
    assert with_bounds("a.mp4", None, None) == "a.mp4"
    with pytest.raises(VideoError, match=r"clip.mp4#t=1: the path says start_s already"):
        read_frames(f"{path}#t=1", start_s=0.5)
    with pytest.raises(VideoError, match=r"clip.mp4#t=9: start_s=9 is not before the end"):
        read_frames(f"{path}#t=9", num_frames=2)
    with pytest.raises(VideoError, match=r"none\.mp4: no such file"):
        probe(tmp_path / "none.mp4#t=1,2")
    with pytest.raises(VideoError, match="start_s=2 is not before end_s=1"):
        with_bounds("a.mp4", 2, 1)


def test_a_file_that_is_called_like_a_part_is_itself(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "clip.mp4#t=1,2", 6, format="mp4")
    assert len(read_frames(whole).frames) == 6
    assert split_bounds(whole) == (whole, {})
    assert split_bounds(tmp_path / "a.mp4#t=,") == (tmp_path / "a.mp4#t=,", {})
