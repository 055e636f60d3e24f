"""Reading in parallel changes nothing but the time it takes, and leaves nothing behind; `snap` says what it read."""

import io
import multiprocessing
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

import hicom.video
import hicom.video.choose
import hicom.video.colour
import hicom.video.decode
from hicom import pyav
from hicom.video import VideoError, VideoFrames, VideoWarning, open_frames, read_frames, uniform_indices
from media import damage, number_frame, read_numbers, remux, video_maker, write_video

OPEN_GOP = {"x264-params": "keyint=10:bframes=3:open-gop=1:b-adapt=0:scenecut=0", "preset": "veryfast"}
CLOSED_GOP = {"g": "10", "bf": "2", "sc_threshold": "0", "preset": "veryfast"}
STRUCTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "b-frames": ("mp4", {"codec_options": CLOSED_GOP}),
    "b-pyramid": ("mkv", {"codec_options": {"x264-params": "keyint=12:bframes=5:b-pyramid=normal:b-adapt=0"}}),
    "open groups": ("mp4", {"codec_options": OPEN_GOP}),
    "open groups in a transport stream": ("ts", {"codec_options": OPEN_GOP}),
    "turned": ("mp4", {"codec_options": CLOSED_GOP, "rotation": 90}),
    "hevc": ("mkv", {"codec": "libx265", "codec_options": {"x265-params": "keyint=10:bframes=4:log-level=none"}}),
    "vp9": ("webm", {"codec": "libvpx-vp9", "codec_options": {"g": "10", "cpu-used": "8", "deadline": "realtime"}}),
    "av1": ("mp4", {"codec": "libsvtav1", "codec_options": {"g": "10", "preset": "10"}}),
    "mpeg2": ("mpg", {"codec": "mpeg2video", "codec_options": {"bf": "2", "g": "10"}}),
    "mpeg4": ("avi", {"codec": "mpeg4", "codec_options": {"g": "10"}}),
    "flash": ("flv", {"codec_options": CLOSED_GOP}),
}
NUM_FRAMES = 120


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("videos")

    return video_maker(folder, STRUCTURES, NUM_FRAMES)


@contextmanager
def processors(num: int) -> Iterator[set[int]]:
    """Read as on a machine with so many processors; the set gets the threads that decode."""
    decode, threads = hicom.video.decode.Video._decode, set[int]()
    main, several, lock = threading.get_ident(), threading.Event(), threading.Lock()

    def noted(clip: Any, stream: Any, packet: Any) -> Any:
        with lock:
            threads.add(threading.get_ident())
            if len(threads - {main}) >= min(num, 3):
                several.set()
        if threading.get_ident() != main:
            several.wait(5)  # or the first of them has read a short clip before the others are there
        return decode(clip, stream, packet)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hicom.video.decode, "_num_threads", lambda most: min(most, num))
        patch.setattr(hicom.video.decode.Video, "_decode", noted)
        yield threads


def num_tasks() -> int:
    """Return how many threads this process has, those of FFmpeg included."""
    return len(list(Path("/proc/self/task").iterdir()))


def assert_same(a: VideoFrames, b: VideoFrames) -> None:
    assert np.array_equal(a.frames, b.frames)
    assert np.array_equal(a.timestamps_s, b.timestamps_s)
    assert a.info == b.info


# The same frames


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("seek_packets", [1, 10**9])
@pytest.mark.usefixtures("no_scan")
def test_parallel_equals_sequential(
    videos: Callable[[str], Path], name: str, seek_packets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hicom.video.decode, "_SEEK_PACKETS", seek_packets)
    times_s = [3.5, 0.1, 2.0, 3.5, 1.31, 0.7]
    choices: list[dict[str, Any]] = [{"num_frames": 5}, {"num_frames": 9, "size": 48}, {"timestamps_s": times_s}, {}]
    for choice in choices:
        with processors(1) as threads:
            expected = read_frames(videos(name), **choice)
        assert threads == {threading.get_ident()}
        with processors(4) as threads:
            clip = read_frames(videos(name), **choice)
        # The main thread opens the file. All frames are one run of packets, and so is FLV where old versions of PyAV
        # do not tell which packets bring a new header.
        is_one_run = not choice or (name == "flash" and not pyav.TELLS_STATE)
        assert (len(threads) > 2) == (not is_one_run)
        assert_same(clip, expected)


def test_damage_is_found_by_every_number_of_threads(tmp_path: Path) -> None:
    path = damage(write_video(tmp_path / "clip.mp4", 96, codec_options={"g": "8", "bf": "2"}), 0.4, 0.5)
    results = []
    for num in (1, 4):
        with processors(num), pytest.warns(VideoWarning, match=r"damaged: \d\d of 96 frames decode"):
            results.append(read_frames(path, num_frames=12))
    assert_same(*results)
    assert read_numbers(results[1].frames[:3]) == [round(time_s * 30) for time_s in results[1].timestamps_s[:3]]


@pytest.mark.usefixtures("no_scan")
def test_bytes_are_read_in_parallel_and_files_by_one(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mkv", NUM_FRAMES, codec="rawvideo", width=192, height=128)
    data = path.read_bytes()
    assert len(data) > 10**6  # more than FFmpeg reads ahead: threads that share a position would meet
    expected = read_frames(path, num_frames=40)
    assert read_numbers(expected.frames) == uniform_indices(NUM_FRAMES, 40)
    memory = io.BytesIO(data)
    memory.seek(7)
    with path.open("rb") as file:
        for source, is_parallel in ((data, True), (memory, True), (file, False)):
            with processors(4) as threads:
                clip = read_frames(source, num_frames=40)  # type: ignore[arg-type]
            assert (len(threads) > 2) == is_parallel
            assert np.array_equal(clip.frames, expected.frames)
            assert np.array_equal(clip.timestamps_s, expected.timestamps_s)


# What threads leave behind


def test_threads_are_few_and_gone_after_the_call(
    videos: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = videos("b-frames")
    read_frames(path, num_frames=12)
    most, pixels = [0], hicom.video.colour.Display.pixels

    def counted(clip: Any, *arguments: Any) -> Any:
        time.sleep(0.01)  # so that all of them are busy
        most[0] = max(most[0], num_tasks())
        return pixels(clip, *arguments)

    monkeypatch.setattr(hicom.video.colour.Display, "pixels", counted)
    before = num_tasks()
    for num in (1, 2, 3):
        most[0] = 0
        with processors(num):
            read_frames(path, num_frames=12)
        assert most[0] - before == (num if num > 1 else 0)
        assert num_tasks() == before


def test_an_error_in_one_thread_is_the_error_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "clip.mp4"
    spans, before = hicom.video.decode.Video._spans, num_tasks()

    def vanish(clip: Any, indices: list[int]) -> Any:
        path.unlink(missing_ok=True)
        return spans(clip, indices)

    monkeypatch.setattr(hicom.video.decode.Video, "_spans", vanish)
    messages = []
    for num in (1, 4):
        write_video(path, 60, codec_options=CLOSED_GOP)
        with processors(num), pytest.raises(VideoError) as caught:
            read_frames(path, num_frames=5)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"{path}: no video found in it")
    assert num_tasks() == before


def test_the_others_stop_after_an_error(videos: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    started, failed = [], threading.Event()

    def fail_in_one(clip: Any, *arguments: Any) -> Any:
        started.append(threading.get_ident())
        if threading.current_thread().name.endswith("_2"):  # the last one that the caller waits for
            failed.set()
            raise VideoError("one of them fails")
        assert failed.wait(10)
        time.sleep(0.2)  # by now the failure is known to the others
        return np.zeros((64, 96, 3), np.uint8)

    monkeypatch.setattr(hicom.video.colour.Display, "pixels", fail_in_one)
    with processors(3), pytest.raises(VideoError, match="one of them fails"):
        read_frames(videos("b-frames"), num_frames=12)
    assert len(started) <= 3  # of 12


class Clips(Dataset[Any]):
    def __init__(self, path: Path) -> None:
        self._path = path

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        with processors(3):
            return read_frames(self._path, num_frames=4 + index).frames.sum().item()


def read_in_child(path: Path, results: Any) -> None:
    with processors(3) as threads:
        frames = read_frames(path, num_frames=9).frames
    results.send((frames, len(threads)))


def test_a_forked_child_reads_after_its_parent(videos: Callable[[str], Path]) -> None:
    with processors(3):
        expected = read_frames(videos("b-frames"), num_frames=9).frames
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=read_in_child, args=(videos("b-frames"), theirs))
    child.start()
    assert ours.poll(60), "the child hangs"
    frames, num_threads = ours.recv()
    child.join(60)
    assert child.exitcode == 0
    assert np.array_equal(frames, expected)
    assert num_threads > 1


def test_forked_workers_of_a_data_loader_read_after_their_parent(videos: Callable[[str], Path]) -> None:
    clips = Clips(videos("b-frames"))
    expected = [clips[index] for index in range(len(clips))]
    loader = DataLoader(clips, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert list(loader) == expected


# Key frames


@given(
    steps=st.lists(st.integers(1, 50), min_size=1, max_size=40), data=st.data(), scale=st.sampled_from([1 / 30, 0.04])
)
def test_the_nearest_key_frame_is_that_of_a_plain_search(steps: list[int], data: st.DataObject, scale: float) -> None:
    ticks = np.cumsum(steps)
    keys = sorted(data.draw(st.sets(st.integers(0, len(steps) - 1), min_size=1)))
    nearest = [min(keys, key=lambda key: (abs(int(ticks[key] - tick)), key)) for tick in ticks]
    assert hicom.video.choose.nearest(ticks * scale, np.array(keys), list(range(len(ticks)))) == nearest


@pytest.mark.parametrize("num", [1, 3])
def test_key_frames_stand_in_for_the_frames_near_them(videos: Callable[[str], Path], num: int) -> None:
    def near(number: int) -> int:
        return min(range(0, NUM_FRAMES, 10), key=lambda key: (abs(key - number), key))

    path = videos("b-frames")
    whole = read_frames(path)
    choices: list[tuple[dict[str, Any], list[int]]] = [
        ({"num_frames": 5}, [near(number) for number in uniform_indices(NUM_FRAMES, 5)]),
        ({"num_frames": 64}, list(range(0, NUM_FRAMES, 10))),  # each once
        ({"fps": 15}, list(range(0, NUM_FRAMES, 10))),
        ({}, list(range(0, NUM_FRAMES, 10))),
        ({"start_s": 7 / 30, "end_s": 9 / 30}, [10]),  # outside of the bounds
        ({"timestamps_s": [15 / 30, 119 / 30, 5 / 30, 6 / 30, 0.0, 16 / 30]}, [10, 110, 0, 10, 0, 20]),
    ]
    for choice, numbers in choices:
        with processors(num):
            clip = read_frames(path, **choice, snap="keyframe")
        assert read_numbers(clip.frames) == numbers
        assert np.array_equal(clip.timestamps_s, whole.timestamps_s[numbers])
        assert np.array_equal(clip.frames, whole.frames[numbers])
        assert clip.info == whole.info
        assert np.array_equal(open_frames(path, **choice, snap="keyframe").timestamps_s, clip.timestamps_s)


@pytest.mark.parametrize("name", STRUCTURES)
def test_key_frames_are_frames_of_the_video(videos: Callable[[str], Path], name: str) -> None:
    whole = read_frames(videos(name))
    clip = read_frames(videos(name), snap="keyframe")
    numbers = read_numbers(clip.frames)
    assert NUM_FRAMES // 12 <= len(numbers) < NUM_FRAMES // 5
    assert np.array_equal(clip.frames, whole.frames[numbers])
    assert np.array_equal(clip.timestamps_s, whole.timestamps_s[numbers])


def test_only_key_frames_are_decoded(videos: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    packets, decode = [], hicom.video.decode.Video._decode

    def counted(clip: Any, stream: Any, packet: Any) -> Any:
        packets.extend([] if packet is None else [packet.is_keyframe])
        return decode(clip, stream, packet)

    path = videos("b-frames")
    monkeypatch.setattr(hicom.video.decode.Video, "_decode", counted)
    hicom.video.probe(path)
    num_first = len(packets)  # what it takes to see the first picture
    packets.clear()
    read_frames(path, snap="keyframe")
    assert packets[num_first:] == [True] * (NUM_FRAMES // 10)


def test_the_decoder_tells_key_frames_where_packets_cannot(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.avi", 60, codec_options={"g": "12", "bf": "3", "sc_threshold": "0"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip = read_frames(path, num_frames=4, snap="keyframe")
    assert read_numbers(clip.frames) == [12, 24, 36, 48]
    np.testing.assert_allclose(clip.timestamps_s, np.array([12, 24, 36, 48]) / 30, atol=0.001)


def test_damaged_key_frames_are_passed_over(tmp_path: Path) -> None:
    def spoil(packet: Any) -> list[Any]:
        if packet.pts * packet.time_base != 1:
            return [packet]
        data = bytes(packet)
        spoilt = av.Packet(data[:8] + np.random.default_rng(0).bytes(len(data) - 8))
        spoilt.pts, spoilt.dts, spoilt.time_base = packet.pts, packet.dts, packet.time_base
        spoilt.is_keyframe = True
        return [spoilt]

    whole = write_video(tmp_path / "whole.mkv", 60, codec_options={**CLOSED_GOP, "bf": "0"})
    path = remux(whole, tmp_path / "clip.mkv", spoil)
    for num in (1, 2):
        with processors(num), pytest.warns(VideoWarning, match="damaged: 5. of 60 frames decode"):
            clip = read_frames(path, timestamps_s=[1.0, 1.1, 0.3], snap="keyframe")
        assert read_numbers(clip.frames) == [20, 40, 10]
        assert np.array_equal(clip.frames, read_frames(whole, timestamps_s=clip.timestamps_s).frames)


def test_every_picture_is_a_key_frame(tmp_path: Path) -> None:
    array = np.stack([number_frame(number) for number in range(10)])
    for choice in ({}, {"num_frames": 3}, {"timestamps_s": [0.3, 0.0, 0.3]}):
        assert_same(read_frames(array, **choice, snap="keyframe"), read_frames(array, **choice))


def test_other_ways_to_snap_are_refused(videos: Callable[[str], Path]) -> None:
    with pytest.raises(VideoError, match="snap='nearest': give one of exact, keyframe"):
        read_frames(videos("b-frames"), snap="nearest")  # type: ignore[arg-type]
