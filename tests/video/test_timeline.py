"""One file has one time line: that of its container, whatever is asked, and odd stamps concern their frame alone."""

import struct
import warnings
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hicom.video import VideoError, VideoWarning, open_frames, read_frames
from hicom.video.packets import Packet
from hicom.video.timeline import make_time_line
from media import damage, read_numbers, write_video
from video_files import change_mp4, numbered_packets, write_stamped

TWICE = [0, 1000, 5000, 5000, 9000, 30000, 60000]
BACK = [round(number * 1000 / 30) - (45 if number >= 40 else 0) for number in range(90)]  # 12 ms back, once


def write_odd(folder: Path, name: str) -> Path:
    path = folder / name
    if name == "twice.mp4":
        write_video(
            path,
            len(TWICE),
            ticks=[*range(0, 7000, 1000)],
            codec_options={"bf": "0"},
            muxer_options={"use_editlist": "0"},
        )
        with av.open(str(path)) as container:
            scale = container.streams.video[0].time_base.denominator // 1000
        steps = [*np.diff(TWICE), 1000]  # how long each frame lasts

        def table(content: bytes) -> bytes:
            return content[:4] + struct.pack(">I", 7) + b"".join(struct.pack(">II", 1, step * scale) for step in steps)

        return change_mp4(path, {b"stts": table})
    if name == "twice.webm":
        return write_stamped(path, TWICE, codec="libvpx", codec_options={})
    if name.startswith("twice"):
        return write_stamped(path, TWICE)
    if name == "back.webm":
        return write_stamped(path, BACK, codec="libvpx", codec_options={})
    if name == "back.mkv":
        return write_stamped(path, BACK)
    if name == "far.mkv":  # one stamp is hours away
        return write_stamped(path, [0, 40, 80, 10**7, 160, 200, 240])
    assert name == "damaged.flv"
    return damage(write_video(path, 110, codec_options={"g": "10", "bf": "2"}), 0.45, 0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("odd")


@pytest.mark.parametrize(
    ("name", "stamps"),
    [
        ("twice.mkv", TWICE),
        ("twice.webm", TWICE),
        ("twice.mp4", TWICE),
        ("back.mkv", np.maximum.accumulate(BACK)),
        ("back.webm", np.maximum.accumulate(BACK)),
        ("far.mkv", [0, 40, 80, 160, 160, 200, 240]),
    ],
)
def test_an_odd_stamp_concerns_its_frame_alone(folder: Path, name: str, stamps: Any) -> None:
    path = write_odd(folder, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip = read_frames(path)
    assert read_numbers(clip.frames) == list(range(len(stamps)))
    np.testing.assert_allclose(clip.timestamps_s, np.array(stamps) / 1000, atol=1e-9)
    assert clip.info.duration_s == pytest.approx(stamps[-1] / 1000, abs=1 if name == "twice.mp4" else 0.05)
    few = read_frames(path, num_frames=3)
    assert np.array_equal(few.frames, clip.frames[read_numbers(few.frames)])


def test_a_time_finds_its_frame_among_equal_stamps(folder: Path) -> None:
    path = write_odd(folder, "twice.mkv")
    assert read_numbers(read_frames(path, timestamps_s=[8.0, 4.9, 0.0, 60.0]).frames) == [3, 1, 0, 6]
    assert read_numbers(read_frames(path, fps=1).frames) == [0, 1, 3, 4, 5, 6]  # 2 is never on screen
    assert read_numbers(read_frames(path, start_s=5).frames) == [2, 3, 4, 5, 6]
    assert read_numbers(read_frames(write_stamped(folder / "at once.mkv", [0, 0, 0, 40])).frames) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["twice.mkv", "twice.mp4", "twice.webm", "back.mkv", "far.mkv", "damaged.flv"])
def test_a_file_has_one_time_line(folder: Path, name: str) -> None:
    path = write_odd(folder, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VideoWarning)
        whole = read_frames(path)
        known = dict(zip(read_numbers(whole.frames), whole.timestamps_s, strict=True))
        choices: list[dict[str, Any]] = [{"num_frames": num} for num in (1, 2, 3, 4, 7, 50)]
        choices += [{"fps": fps} for fps in (0.3, 1, 7.5, 100)]
        choices += [{"timestamps_s": whole.timestamps_s[::3]}, {"start_s": 0.05}, {"snap": "keyframe"}]
        for choice in choices:
            clip = read_frames(path, **choice)
            assert clip.info.duration_s == whole.info.duration_s, choice
            assert set(clip.timestamps_s) <= set(whole.timestamps_s), choice
            if name != "damaged.flv":  # there, pictures of the hole repeat those before it
                assert [known[number] for number in read_numbers(clip.frames)] == list(clip.timestamps_s), choice
            reader = open_frames(path, **choice)
            assert reader.info.duration_s == whole.info.duration_s
        chunks = np.concatenate(list(open_frames(path, num_frames=5).chunks(2)))
        assert np.array_equal(chunks, read_frames(path, num_frames=5).frames)


@given(
    steps=st.lists(st.integers(0, 50), min_size=1, max_size=60),
    changes=st.dictionaries(st.integers(0, 59), st.none() | st.integers(-200, 3000), max_size=6),
)
def test_times_never_descend_and_keep_what_is_in_order(steps: list[int], changes: dict[int, int | None]) -> None:
    true = np.cumsum([0, *steps]).tolist()
    stamps: list[int | None] = list(true)
    for number, stamp in changes.items():
        if number < len(stamps):
            stamps[number] = stamp
    packets = [Packet(stamp, stamp, 40, True, True, False) for stamp in stamps]
    times_s, duration_s = make_time_line(packets, list(range(len(packets))), stamps, 0.001, 25)
    assert len(times_s) == len(stamps)
    assert times_s[0] == 0
    assert (np.diff(times_s) >= 0).all()
    assert duration_s >= times_s[-1]
    known = [stamp for stamp in stamps if stamp is not None]
    if None not in stamps and all(a <= b for a, b in pairwise(known)):
        np.testing.assert_allclose(times_s, (np.array(known) - known[0]) / 1000)
    if not known:
        np.testing.assert_allclose(times_s, np.arange(len(stamps)) / 25)


@pytest.mark.parametrize("number", range(12))
def test_a_missing_stamp_lies_between_its_neighbours(number: int) -> None:
    stamps: list[int | None] = [tick * 40 for tick in range(12)]
    stamps[number] = None
    packets = [Packet(stamp, stamp, 40, True, True, False) for stamp in stamps]
    times_s, duration_s = make_time_line(packets, list(range(12)), stamps, 0.001, 25)
    np.testing.assert_allclose(times_s, np.arange(12) * 0.04)
    assert duration_s == pytest.approx(0.48)


# Tolerances follow the clock


def write_fast(path: Path, num_frames: int, fps: int, scale: int) -> Path:
    return write_video(
        path,
        num_frames,
        fps=fps,
        codec_options={"bf": "0", "g": "12"},
        muxer_options={"video_track_timescale": str(scale)},
    )


@pytest.mark.parametrize(("fps", "scale"), [(1000, 16000), (2000, 16000), (4000, 16000), (4000, 4000), (9000, 90000)])
def test_every_frame_of_a_fast_video_is_read(tmp_path: Path, fps: int, scale: int) -> None:
    path = write_fast(tmp_path / "fast.mp4", 40, fps, scale)
    assert read_numbers(read_frames(path).frames) == list(range(40))
    assert read_numbers(read_frames(path, num_frames=40).frames) == list(range(40))
    assert read_numbers(read_frames(path, fps=fps).frames) == list(range(40))
    for share in (0, 0.4, 0.6):  # of the time that a frame is on screen
        times = [(number + share) / fps for number in (0, 1, 2, 17, 39)]
        assert read_numbers(read_frames(path, timestamps_s=times).frames) == [0, 1, 2, 17, 39]
    assert read_numbers(read_frames(path, start_s=10 / fps, end_s=20 / fps).frames) == list(range(10, 20))


def test_a_last_frame_of_one_tick_is_there(tmp_path: Path) -> None:
    def last_tick(content: bytes) -> bytes:
        return content[:4] + struct.pack(">IIIII", 2, 4, 3000, 1, 1)

    path = change_mp4(write_fast(tmp_path / "tick.mp4", 5, 30, 90000), {b"stts": last_tick})
    clip = read_frames(path)
    assert clip.info.num_frames == 5
    assert read_numbers(clip.frames) == list(range(5))
    assert read_numbers(read_frames(path, num_frames=5).frames) == list(range(5))
    assert read_numbers(read_frames(path, timestamps_s=[clip.timestamps_s[-1]]).frames) == [4]


def test_an_absurd_clock_still_has_all_frames(tmp_path: Path) -> None:
    def scale(content: bytes) -> bytes:  # of mdhd, version 0
        return content[:12] + struct.pack(">I", 0x7FFFFFFF) + content[16:]

    path = change_mp4(write_fast(tmp_path / "absurd.mp4", 50, 30, 90000), {b"mdhd": scale})
    assert read_numbers(read_frames(path, num_frames=8).frames) == [3, 9, 15, 21, 28, 34, 40, 46]
    assert read_numbers(read_frames(path).frames) == list(range(50))


# AVI numbers slots

SLOTS = [0, 1, 2, 3, 4, 40, 41, 42, 110, 111, 112, 113, 200]


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", {"bf": "0", "g": "5"}),
        ("libx264", {"bf": "2", "g": "5"}),
        ("libx264", {"x264-params": "keyint=5:bframes=2:open-gop=1:b-adapt=0:scenecut=0:min-keyint=5"}),
        ("mpeg4", {"g": "5"}),
        ("mpeg4", {"bf": "2", "g": "5"}),
        ("mjpeg", {}),
    ],
)
def test_avi_with_dropped_frames_has_the_times_of_its_slots(
    tmp_path: Path, codec: str, options: dict[str, str], no_scan: None
) -> None:
    path = tmp_path / "gaps.avi"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=20, options=options)
        packets = numbered_packets(stream, len(SLOTS), "yuvj420p" if codec == "mjpeg" else "yuv420p")
        for slot, packet in zip(SLOTS, packets, strict=True):
            packet.pts = packet.dts = slot
            packet.time_base = Fraction(1, 20)
            container.mux(packet)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip = read_frames(path)
        assert read_numbers(clip.frames) == list(range(len(SLOTS)))
        np.testing.assert_allclose(clip.timestamps_s, np.array(SLOTS) / 20)
        assert clip.info.duration_s == pytest.approx(201 / 20)
        assert clip.info.damage == ""
        for number in range(len(SLOTS)):
            alone = read_frames(path, timestamps_s=[SLOTS[number] / 20])
            assert np.array_equal(alone.frames[0], clip.frames[number])
        few = read_frames(path, num_frames=4)
        assert [SLOTS[number] / 20 for number in read_numbers(few.frames)] == few.timestamps_s.tolist()


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
@pytest.mark.usefixtures("no_scan")
def test_asf_shows_frames_in_their_order(tmp_path: Path, codec: str) -> None:
    path = write_video(tmp_path / "clip.wmv", 60, fps=25, codec=codec, codec_options={"bf": "2", "g": "12"})
    clip = read_frames(path)
    assert read_numbers(clip.frames) == list(range(60))
    np.testing.assert_allclose(clip.timestamps_s, np.arange(60) / 25, atol=0.0011)
    for number in (0, 1, 2, 11, 12, 13, 30, 59):
        assert read_numbers(read_frames(path, timestamps_s=[number / 25]).frames) == [number]


# Bounds and rates where the first frames do not decode


def test_a_rate_whose_ticks_meet_no_readable_frame_gives_the_first_one(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", 24, codec_options={"g": "8", "bf": "0", "sc_threshold": "0"})
    with av.open(str(path)) as container:
        first = next(packet for packet in container.demux(video=0))
        position, size = first.pos, first.size
    data = bytearray(path.read_bytes())
    data[position : position + size] = bytes(size)
    path.write_bytes(data)
    with pytest.warns(VideoWarning, match=r"clip\.mp4: damaged: \d+ of 24 frames decode"):
        whole = read_frames(path)
    begin_s = whole.timestamps_s[0]
    assert 0.2 < begin_s < 0.3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VideoWarning)
        for choice in ({"fps": 1}, {"timestamps_s": [0.0]}, {"fps": 1, "end_s": 0.5}):
            assert read_frames(path, **choice).timestamps_s.tolist() == [begin_s]
        with pytest.raises(VideoError, match=r"clip\.mp4: no frame between 0 and 0\.2 s can be read; the first .*"):
            read_frames(path, end_s=0.2)
