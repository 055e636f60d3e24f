"""Damage is told when it is there, and only then; every failure names the file and the reason."""

import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from hicom.video import VideoError, VideoWarning, probe, read_frames, uniform_indices
from media import number_frame, read_numbers, truncate, write_video
from video_files import write_stamped

NUM = 64
GROUPS = {"g": "8", "bf": "0"}
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}


def read_quietly(path: Path, **choice: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip = read_frames(path, **choice)
    assert clip.info.damage == ""
    assert probe(path).damage == ""
    return clip


# Sound files


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("bf", ["0", "2"])
def test_a_copy_into_avi_is_sound(tmp_path: Path, slots: int, bf: str) -> None:
    source = write_video(tmp_path / "clip.mp4", NUM, fps=25, codec="mpeg4", codec_options={"g": "8", "bf": bf})
    path = tmp_path / "copy.avi"
    with av.open(str(source)) as reader, av.open(str(path), "w") as writer:
        stream: Any = writer.add_stream_from_template(reader.streams.video[0])
        stream.time_base = Fraction(1, 25 * slots)  # tools that copy streams take two slots for a frame
        for packet in reader.demux(reader.streams.video[0]):
            if packet.size:
                packet.stream = stream
                writer.mux(packet)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames > NUM * slots - slots - 2
    clip = read_quietly(path)
    assert read_numbers(clip.frames) == list(range(NUM))
    np.testing.assert_allclose(clip.timestamps_s, np.arange(NUM) / 25)


def test_empty_slots_at_the_end_of_avi_are_no_damage(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.avi", NUM, codec="mpeg4", codec_options={"g": "8"})
    data = bytearray(path.read_bytes())
    length = data.index(b"strh") + 8 + 32  # of the stream, in slots
    assert int.from_bytes(data[length : length + 4], "little") == NUM
    data[length : length + 4] = (NUM + 90).to_bytes(4, "little")
    path.write_bytes(data)
    assert read_numbers(read_quietly(path).frames) == list(range(NUM))
    with pytest.warns(VideoWarning, match=rf"truncated: \d\d of {NUM + 90} frames decode"):
        read_frames(truncate(path, 0.7))


def test_a_last_frame_may_last_long(tmp_path: Path) -> None:
    path = tmp_path / "slides.mkv"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=30, options=GROUPS)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        packets = []
        for number in range(4):
            frame = av.VideoFrame.from_ndarray(number_frame(number), format="rgb24")
            frame.pts = number
            packets += stream.encode(frame)
        for number, packet in enumerate(packets + stream.encode()):
            packet.pts = packet.dts = number * 40
            packet.duration = 10000 if number == 3 else 40
            packet.time_base = Fraction(1, 1000)
            container.mux(packet)
    with av.open(str(path)) as container:
        assert container.streams.video[0].metadata["DURATION"].startswith("00:00:10")
    assert read_numbers(read_quietly(path).frames) == [0, 1, 2, 3]


@pytest.mark.parametrize("value", ["5000", "0.4 s", "1:2", "a:b:c", "1:2:3:4", "\x131.2", "::"])
def test_a_tag_that_is_no_duration_is_passed_over(tmp_path: Path, value: str) -> None:
    for key in ("DURATION-eng", "DURATION_TEXT"):
        path = tmp_path / f"{key}.mkv"
        source = write_video(tmp_path / "clip.mkv", 6)
        with av.open(str(source)) as reader, av.open(str(path), "w") as writer:
            stream = writer.add_stream_from_template(reader.streams.video[0])
            stream.metadata[key] = value
            for packet in reader.demux(reader.streams.video[0]):
                if packet.size:
                    packet.stream = stream
                    writer.mux(packet)
        assert read_numbers(read_quietly(path).frames) == list(range(6))


def test_stamps_that_are_off_are_no_damage(tmp_path: Path) -> None:
    read_quietly(write_stamped(tmp_path / "twice.mkv", [0, 40, 40, 80, 60, 120]))


@pytest.mark.parametrize("bf", ["0", "2"])
@pytest.mark.parametrize("num", [38, 41, 45])
def test_transport_streams_that_are_joined_are_sound(tmp_path: Path, num: int, bf: str) -> None:
    parts = []
    for number in range(3):
        part = write_video(tmp_path / f"{number}.ts", num, codec_options={"g": "10", "bf": bf})
        parts.append(part.read_bytes())
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(parts))
    clip = read_quietly(path)
    assert read_numbers(clip.frames) == 3 * list(range(num))
    np.testing.assert_allclose(clip.timestamps_s, np.arange(3 * num) / 30, atol=1e-6)
    assert read_numbers(read_quietly(path, num_frames=5).frames) == [
        index % num for index in uniform_indices(3 * num, 5)
    ]


def test_streams_may_turn_up_on_the_way(tmp_path: Path) -> None:
    parts = [
        write_video(tmp_path / f"{number}.ts", 30, audio=number == 1, codec_options={"g": "10"}).read_bytes()
        for number in range(2)
    ]
    path = tmp_path / "both.ts"
    path.write_bytes(b"".join(parts))
    for source in (path, path.read_bytes()):
        clip = read_frames(source)
        assert read_numbers(clip.frames) == [*range(30), *range(30)]


# Cut files


@pytest.mark.parametrize("last", [9, 16, 30, 47, 62])
@pytest.mark.parametrize(
    ("suffix", "codec", "bf", "options"),
    [
        ("mp4", "libx264", "2", {"movflags": "faststart"}),
        ("mkv", "libx264", "0", {}),
        ("mkv", "libx264", "2", {}),
        ("webm", "libvpx", "0", {}),
        ("avi", "libx264", "0", {}),
        ("avi", "libx264", "2", {}),
        ("avi", "mpeg4", "2", {}),
    ],
)
def test_cut_files_say_how_much_is_left(
    tmp_path: Path, suffix: str, codec: str, bf: str, options: dict[str, str], last: int
) -> None:
    codec_options = {"g": "8", "bf": bf} if bf != "0" else {"g": "8"} | ({"bf": "0"} if codec == "libx264" else {})
    path = write_video(
        tmp_path / f"clip.{suffix}", NUM, codec=codec, codec_options=codec_options, muxer_options=options
    )
    whole = read_quietly(path)
    with av.open(str(path)) as container:
        cut = [packet for packet in container.demux(video=0) if packet.size][last]
        path.write_bytes(path.read_bytes()[: cut.pos + cut.size // 2])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        clip = read_frames(path)
    num = clip.info.num_frames
    is_told = any(f"{num} of {NUM} frames decode" in str(each.message) for each in caught)
    # Matroska says how long it is, not how many frames it has, and may be off by half a second.
    assert is_told or num == NUM or (suffix in ("mkv", "webm") and (num > NUM - 17 or clip.info.damage))
    places = np.searchsorted(whole.timestamps_s, clip.timestamps_s - 1e-6)
    np.testing.assert_allclose(clip.timestamps_s, whole.timestamps_s[places])
    assert read_numbers(clip.frames[:-2]) == places[:-2].tolist()


def test_an_end_of_zeros_is_told(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mkv", 90, codec_options=GROUPS)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    with pytest.warns(VideoWarning, match=r"clip\.mkv: \w+: \d\d of 9\d frames decode"):
        read_frames(path)


@pytest.mark.parametrize("place", [40, 60, 90])
def test_packets_lost_on_the_way_are_told_and_left_out(tmp_path: Path, place: int) -> None:
    path = write_video(tmp_path / "clip.ts", 60, codec_options={"g": "10", "bf": "0", "crf": "5"})
    data = path.read_bytes()
    lost = data.index(b"\x47\x41\x00", place * 188)  # where a frame begins
    assert lost % 188 == 0
    path.write_bytes(data[:lost] + data[lost + 188 :])
    with pytest.warns(VideoWarning, match=r"damaged: 5\d of 59 frames decode"):
        clip = read_frames(path)
    numbers = [round(time_s * 30) for time_s in clip.timestamps_s]
    shown = dict(zip(numbers, read_numbers(clip.frames), strict=True))
    missing = min(set(range(60)) - set(numbers))
    # Pictures behind the hole refer to what is lost, up to the next key frame.
    assert all(shown[number] == number for number in numbers if number < missing or number // 10 > missing // 10 + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VideoWarning)
        for count in (1, 3, 9, 58):
            few = read_frames(path, num_frames=count)
            assert few.info.duration_s == clip.info.duration_s
            assert set(few.timestamps_s) <= set(clip.timestamps_s)


# Failures


@pytest.mark.parametrize("matrix", ["YCgCo", "bt2020c", "smpte2085", "chroma-derived-nc", "chroma-derived-c", "ICtCp"])
def test_colours_without_conversion_are_refused_by_name(tmp_path: Path, matrix: str) -> None:
    path = write_video(tmp_path / "clip.mp4", 3, codec_options={"x264-params": f"colormatrix={matrix}"})
    for read in (probe, read_frames):
        with pytest.raises(VideoError, match=r"clip\.mp4: its colours, yuv420p with matrix \d+ .*; convert it"):
            read(path)


@pytest.mark.parametrize("matrix", ["bt709", "fcc", "bt470bg", "smpte170m", "smpte240m", "bt2020nc", "undef"])
def test_colours_with_conversion_are_read(tmp_path: Path, matrix: str) -> None:
    path = write_video(tmp_path / "clip.mp4", 3, codec_options={"x264-params": f"colormatrix={matrix}"})
    assert read_numbers(read_quietly(path).frames) == [0, 1, 2]
