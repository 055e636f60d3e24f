"""Every container is sought, and what is read after a seek is what reading everything gives."""

import io
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

import hicom.video.cursor
import hicom.video.decode
from hicom import pyav
from hicom.video import FramesChanged, open_frames, probe, read_frames
from media import read_numbers, video_maker, write_video

CLOSED = {"g": "12", "bf": "2", "sc_threshold": "0", "preset": "ultrafast"}
OPEN = {"x264-params": "keyint=12:bframes=3:open-gop=1:b-adapt=0:scenecut=0", "preset": "veryfast"}
NUM_FRAMES = 96
needs_index = pytest.mark.skipif(not hasattr(av, "index"), reason="this PyAV hides the index")
# Pictures large enough that each begins in a packet of the program stream of its own.
LARGE = {"width": 640, "height": 480}
CONTAINERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mp4": ("mp4", {"codec_options": CLOSED}),
    "fragments": ("mp4", {"codec_options": CLOSED, "muxer_options": {"movflags": "frag_keyframe+empty_moov"}}),
    "mkv": ("mkv", {"codec_options": CLOSED}),
    "ts": ("ts", {"codec_options": CLOSED, "audio": True}),
    "open groups in ts": ("ts", {"codec_options": OPEN}),
    "mpeg2 in ts": ("ts", {"codec": "mpeg2video", "codec_options": {"bf": "2", "g": "12"}}),
    "m2ts": ("m2ts", {"codec_options": CLOSED}),
    "mpg": ("mpg", {"codec": "mpeg2video", "codec_options": {"bf": "2", "g": "12", "qmin": "1", "qmax": "1"}} | LARGE),
    "small pictures in mpg": ("mpg", {"codec": "mpeg2video", "codec_options": {"bf": "2", "g": "12"}}),
    "vob": ("vob", {"codec": "mpeg2video", "codec_options": {"g": "12", "qmin": "1", "qmax": "1"}} | LARGE),
    "avi": ("avi", {"codec": "mpeg4", "codec_options": {"g": "12"}}),
    "b-frames in avi": ("avi", {"codec_options": CLOSED}),
    "jpeg in avi": ("avi", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}),
    "flv": ("flv", {"codec_options": CLOSED}),
    "sorenson": ("flv", {"codec": "flv", "codec_options": {"g": "12"}}),
    "wmv": ("wmv", {"codec": "wmv2", "codec_options": {"g": "12"}}),
    "ogg": ("ogg", {"codec": "libvpx", "codec_options": {"g": "12", "deadline": "realtime", "cpu-used": "8"}}),
    "nut": ("nut", {"codec": "mpeg4", "codec_options": {"g": "12"}}),
    "ivf": ("ivf", {"codec": "libvpx", "codec_options": {"g": "12", "deadline": "realtime", "cpu-used": "8"}}),
    "mxf": ("mxf", {"codec": "mpeg2video", "codec_options": {"g": "12"}}),
    "3gp": ("3gp", {"codec": "mpeg4", "codec_options": {"g": "12"}}),
}


def is_one_span(name: str) -> bool:
    """Whether a file is read as a whole: new headers in it are not told."""
    return name in ("flv", "sorenson") and not pyav.TELLS_STATE


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return video_maker(tmp_path_factory.mktemp("videos"), CONTAINERS, NUM_FRAMES)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the files opened and the packets read and decoded."""
    found: Counter[str] = Counter()
    opened, demux, decode = pyav.open_input, hicom.video.decode.Video._demux, hicom.video.decode.Video._decode

    def open_input(*arguments: Any, **options: Any) -> Any:
        found["opened"] += 1
        return opened(*arguments, **options)

    def read(*arguments: Any) -> Iterator[Any]:
        for packet in demux(*arguments):
            found["read"] += 1
            yield packet

    def decoded(clip: Any, stream: Any, packet: Any) -> Any:
        found["decoded"] += packet is not None
        return decode(clip, stream, packet)

    monkeypatch.setattr(pyav, "open_input", open_input)
    monkeypatch.setattr(hicom.video.decode.Video, "_demux", read)
    monkeypatch.setattr(hicom.video.decode.Video, "_decode", decoded)
    return found


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.usefixtures("no_scan")
def test_frames_after_a_seek_are_those_of_a_full_read(
    videos: Callable[[str], Path], name: str, num_threads: int, counts: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hicom.video.decode, "_SEEK_PACKETS", 1)
    monkeypatch.setattr(hicom.video.decode, "_num_threads", lambda most: min(most, num_threads))
    whole = read_frames(videos(name))
    assert read_numbers(whole.frames) == list(range(NUM_FRAMES))
    opened = open_frames(videos(name))
    for first in (0, 5, 11):
        times_s = [float(whole.timestamps_s[place]) for place in (first, first + 40, first + 80)]
        clip = read_frames(opened, timestamps_s=times_s)
        assert np.array_equal(clip.frames, whole.frames[[first, first + 40, first + 80]])
    # Four times three frames of a group each, in and against the order of the file.
    places = [3, 15, 28, 40, 52, 64, 75, 93, 92, 50, 0, 31]
    reader = open_frames(opened, timestamps_s=[float(whole.timestamps_s[place]) for place in places])
    assert np.array_equal(np.concatenate([*reader.chunks(3)]), whole.frames[places])
    # Nothing was given up: the last frames are sought, not read up to. (Windows Media has an index of seconds.)
    counts.clear()
    read_frames(opened, timestamps_s=[float(whole.timestamps_s[-1])])
    assert opened.clip._table.can_seek  # type: ignore[attr-defined]
    assert counts["read"] < NUM_FRAMES // 2 or name == "wmv" or is_one_span(name)


@pytest.mark.parametrize("name", ["ts", "m2ts", "avi", "flv", "ogg", "mkv", "mp4"])
@pytest.mark.usefixtures("no_scan")
def test_chunks_open_a_file_once_and_pass_over_the_rest(
    videos: Callable[[str], Path], name: str, counts: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hicom.video.decode, "_SEEK_PACKETS", 1)
    monkeypatch.setattr(hicom.video.decode, "_num_threads", lambda most: 1)
    reader = open_frames(videos(name), num_frames=4)
    counts.clear()
    chunks = [*reader.chunks(1)]
    assert counts["opened"] == 1
    assert counts["decoded"] <= 4 * 12 or is_one_span(name)  # their groups
    assert counts["read"] < 80 or is_one_span(name)
    assert np.array_equal(np.concatenate(chunks), read_frames(videos(name), num_frames=4).frames)


@pytest.mark.usefixtures("no_scan")
def test_chunks_go_on_where_nothing_can_be_sought(
    videos: Callable[[str], Path], counts: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hicom.video.cursor, "_WAYS", {})
    monkeypatch.setattr(hicom.video.decode, "_SEEK_PACKETS", 1)
    monkeypatch.setattr(hicom.video.decode, "_num_threads", lambda most: 1)
    reader = open_frames(videos("ts"), num_frames=4)
    counts.clear()
    assert np.array_equal(np.concatenate([*reader.chunks(1)]), read_frames(videos("ts"), num_frames=4).frames)
    # Once for all chunks, then once to see what there is and once for the four frames together.
    assert counts["read"] <= 3 * NUM_FRAMES
    assert counts["opened"] == 3


@pytest.mark.parametrize("name", ["ts", "mkv", "avi", "flv", "b-frames in avi"])
@pytest.mark.parametrize("lie", [-30, -1, 1, 30])
@pytest.mark.usefixtures("no_scan")
def test_a_seek_that_lands_elsewhere_is_noticed(
    videos: Callable[[str], Path], name: str, lie: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_frames(videos(name))
    jump = hicom.video.cursor.Cursor._jump

    def jump_elsewhere(cursor: Any, due: Any, way: Any) -> bool:
        table = cursor._table.packets
        return jump(cursor, table[min(max(table.index(due) + lie, 0), len(table) - 1)], way)

    monkeypatch.setattr(hicom.video.cursor.Cursor, "_jump", jump_elsewhere)
    monkeypatch.setattr(hicom.video.decode, "_SEEK_PACKETS", 1)
    clip = read_frames(videos(name), num_frames=5)
    assert np.array_equal(clip.frames, whole.frames[read_numbers(clip.frames)])
    assert read_numbers(clip.frames) == [round(time_s * 30) for time_s in clip.timestamps_s]


def test_packets_that_are_not_those_of_the_table_are_read_again(
    videos: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hicom.video.decode, "_SEEK_PACKETS", 1)
    whole = read_frames(videos("ts"), num_frames=5)
    is_at = hicom.video.cursor.Table.is_at
    monkeypatch.setattr(
        hicom.video.cursor.Table, "is_at", lambda table, place, packet: place < 40 and is_at(table, place, packet)
    )
    reader = open_frames(videos("ts"), num_frames=5)
    with pytest.raises(FramesChanged):
        list(reader.chunks(2))
    assert np.array_equal(np.concatenate([*reader.chunks(2)]), whole.frames)
    assert np.array_equal(read_frames(videos("ts"), num_frames=5).frames, whole.frames)


# An index in place of the packets


@needs_index
@pytest.mark.usefixtures("no_scan")
def test_an_index_stands_in_for_the_packets(
    videos: Callable[[str], Path], counts: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = probe(videos("mp4"))
    assert counts["read"] < 8  # up to the first frame
    with monkeypatch.context() as patch:
        patch.setattr(hicom.video.decode, "read_index", lambda *_: None)
        counts.clear()
        assert probe(videos("mp4")) == fast
        assert counts["read"] == NUM_FRAMES
        whole = read_frames(videos("mp4"))
    assert np.array_equal(read_frames(videos("mp4")).frames, whole.frames)
    assert np.array_equal(read_frames(videos("mp4")).timestamps_s, whole.timestamps_s)


@needs_index
def test_few_bytes_of_a_file_are_read(tmp_path: Path) -> None:
    class Counting(io.BytesIO):
        num_bytes = 0

        def read(self, size: int | None = -1, /) -> bytes:
            data = super().read(size)
            Counting.num_bytes += len(data)
            return data

    path = write_video(tmp_path / "clip.mp4", 60, width=640, height=480, codec_options={"qp": "0", "g": "10"})
    data = path.read_bytes()
    padded = data + (10**7).to_bytes(4, "big") + b"free" + bytes(10**7 - 8)  # what is no picture
    info = probe(Counting(padded))
    assert info.num_frames == 60
    assert Counting.num_bytes < len(data) + 2 * 10**6


@needs_index
@pytest.mark.parametrize("num_frames", [5, NUM_FRAMES])
def test_a_file_that_becomes_another_one_is_looked_at_again(tmp_path: Path, num_frames: int) -> None:
    path = write_video(tmp_path / "clip.mp4", NUM_FRAMES, codec_options=CLOSED)
    reader = open_frames(path, num_frames=num_frames)
    write_video(path, 50, codec_options={"g": "7", "bf": "0"})
    clip = reader.read()
    assert clip.info.num_frames == 50
    assert read_numbers(clip.frames) == [round(time_s * 30) for time_s in clip.timestamps_s]
    assert len(clip.frames) == min(num_frames, 50)


# AVI with frames out of order


@pytest.mark.usefixtures("no_scan")
def test_avi_with_b_frames_is_decoded_once(videos: Callable[[str], Path], counts: Counter[str]) -> None:
    reader = open_frames(videos("b-frames in avi"), num_frames=NUM_FRAMES)
    assert counts["decoded"] < 8
    assert read_numbers(reader.read().frames) == list(range(NUM_FRAMES))
    assert counts["decoded"] < NUM_FRAMES + 8
