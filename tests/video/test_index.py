"""The index of an mp4 says what reading all of its packets says, or there is none."""

import io
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hicom import pyav
from hicom.video.index import read_index
from hicom.video.packets import Packet, describe_packet
from media import truncate, write_video

NUM_FRAMES = 60
CLOSED = {"g": "12", "bf": "3", "sc_threshold": "0"}
PYRAMID = {"x264-params": "keyint=20:bframes=5:b-pyramid=normal:b-adapt=0"}
OPEN = {"x264-params": "keyint=10:bframes=3:open-gop=1:b-adapt=0:scenecut=0"}
HEVC = {"x265-params": "keyint=10:bframes=4:open-gop=1:log-level=none"}
UNEVEN = [0, 40, 80, 87, 487, 520, 553, 1553, 1558, 1563, 1568, 1658, 1908, 2158, 2161, 2221, 2281, 2341, 4341, 4381]
# What the file is, how it is written, and whether its tables say all.
KINDS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "b-frames": ("mp4", {"codec_options": CLOSED}, True),
    "pyramid": ("mp4", {"codec_options": PYRAMID}, True),
    "no b-frames": ("mov", {"codec_options": {"g": "12", "bf": "0"}}, True),
    "key frames only": ("mp4", {"codec_options": {"g": "1"}}, True),
    "open groups": ("mp4", {"codec_options": OPEN}, True),
    "open groups of hevc": ("mp4", {"codec": "libx265", "codec_options": HEVC}, True),
    "refreshed bit by bit": ("mp4", {"codec_options": {"x264-params": "intra-refresh=1:keyint=12"}}, True),
    "delimiters": ("mp4", {"codec_options": {"x264-params": "keyint=12:aud=1"}}, True),
    "messages": (
        "mp4",
        {"codec_options": {"x264-params": "keyint=12:nal-hrd=vbr:vbv-maxrate=999:vbv-bufsize=999"}},
        True,
    ),
    "uneven": ("mp4", {"ticks": UNEVEN, "codec_options": {"g": "6", "bf": "2"}}, True),
    "late": ("mov", {"ticks": [tick + 320 for tick in UNEVEN], "codec_options": {"bf": "2"}}, True),
    "fast clock": ("mp4", {"ticks": [n * 333_333_333 for n in range(60)], "ticks_per_s": 10**9}, False),
    "sound": ("mp4", {"audio": True, "codec_options": CLOSED}, True),
    "head first": ("mp4", {"codec_options": CLOSED, "muxer_options": {"movflags": "faststart"}}, True),
    "no edit list": ("mp4", {"codec_options": CLOSED, "muxer_options": {"use_editlist": "0"}}, True),
    "offsets below 0": ("mp4", {"codec_options": CLOSED, "muxer_options": {"movflags": "negative_cts_offsets"}}, True),
    "cut": (
        "mp4",
        {
            "ticks": [(n - 10) * 40 for n in range(40)],
            "muxer_options": {"avoid_negative_ts": "disabled"},
            "codec_options": {"g": "8", "bf": "2"},
        },
        False,
    ),
    "fragments": ("mp4", {"codec_options": CLOSED, "muxer_options": {"movflags": "frag_keyframe+empty_moov"}}, False),
    "fragments behind": ("mp4", {"codec_options": CLOSED, "muxer_options": {"movflags": "frag_keyframe"}}, False),
    "encrypted": (
        "mp4",
        {
            "codec_options": CLOSED,
            "muxer_options": {
                "encryption_scheme": "cenc-aes-ctr",
                "encryption_key": "76a6c65c5ea762046bd749a2e632ccbb",
                "encryption_kid": "a7e61c373e219033c21091fa607bf3b8",
            },
        },
        False,
    ),
    "another codec": ("mp4", {"codec": "mpeg4"}, False),
    "another container": ("mkv", {"codec_options": CLOSED}, False),
}


needs_index = pytest.mark.skipif(not hasattr(av, "index"), reason="this PyAV hides the index")


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("index")

    def written(name: str) -> Path:
        suffix, options, _ = KINDS[name]
        path = folder / f"{name}.{suffix}"
        if not path.exists():
            write_video(path, len(options.get("ticks", range(NUM_FRAMES))), **options)
        return path

    return written


def rows(container: Any, stream: Any) -> Iterator[Packet]:
    """Yield what all packets say."""
    pyav.read_only(container, stream)
    for packet in container.demux(stream):
        if packet.size:
            yield describe_packet(packet, stream.codec_context.codec.canonical_name)


def both(file: Any) -> tuple[list[Packet] | None, list[Packet]]:
    """Return the index of a video, and what reading all of its packets says."""
    with pyav.open_input(file, {}) as container:
        stream = container.streams.video[0]
        if stream.codec_context is None:
            return None, []
        slow = list(rows(container, stream))
    if not isinstance(file, Path):
        file.seek(0)
    with pyav.open_input(file, {}) as container:
        stream = container.streams.video[0]
        fast = read_index(file, container, stream, slow[:2]) if slow else None
        # Others read the same file: they go on where they were.
        assert [row[:3] for row in rows(container, stream)] == [row[:3] for row in slow]
    return fast, slow


@needs_index
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("open_file", [Path, lambda path: io.BytesIO(path.read_bytes()), lambda path: path.open("rb")])
def test_an_index_says_what_the_packets_say(write: Callable[[str], Path], name: str, open_file: Any) -> None:
    fast, slow = both(open_file(write(name)))
    assert (fast is not None) == KINDS[name][2]
    assert fast is None or fast == slow


# Tables that lie

TABLES = (b"stts", b"ctts", b"stss", b"stsz", b"stsc", b"stco", b"stsd", b"elst", b"tkhd", b"mdhd", b"mvhd")


def same_or_none(data: bytes) -> bool:
    """Compare the index of a file with its packets, where it can be opened; return whether there is an index."""
    try:
        fast, slow = both(io.BytesIO(data))
    except (av.error.FFmpegError, IndexError):  # it cannot be opened, or has no video
        return False
    assert fast is None or fast == slow
    return fast is not None


@pytest.mark.parametrize("name", ["b-frames", "offsets below 0", "open groups", "open groups of hevc", "sound"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_no_table_is_believed_unseen(write: Callable[[str], Path], name: str, data: st.DataObject) -> None:
    content = bytearray(write(name).read_bytes())
    for _ in range(data.draw(st.integers(1, 2))):
        table = data.draw(st.sampled_from([each for each in TABLES if each in content]))
        place = content.index(table)
        length = int.from_bytes(content[place - 4 : place], "big")
        word = place - 4 + 4 * data.draw(st.integers(0, min(length // 4, 80)))
        old = int.from_bytes(content[word : word + 4], "big")
        odd = st.sampled_from([0, 1, 2, 255, 2**16, 2**28, 2**31 - 1, 2**31, 2**32 - 512, 2**32 - 1])
        near = st.sampled_from([(old + step) % 2**32 for step in (-2, -1, 1, 2)])
        value = data.draw(odd | near | st.integers(0, 2**32 - 1))
        content[word : word + 4] = value.to_bytes(4, "big")[: max(0, len(content) - word)]
    same_or_none(bytes(content))


@given(where=st.floats(0, 1), what=st.binary(min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_any_byte_of_the_head_may_be_wrong(write: Callable[[str], Path], where: float, what: bytes) -> None:
    content = bytearray(write("b-frames").read_bytes())
    first = content.index(b"moov") - 4
    place = first + int(where * (len(content) - first - len(what)))
    content[place : place + len(what)] = what
    same_or_none(bytes(content))


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.99])
def test_a_file_cut_off_has_no_index(write: Callable[[str], Path], tmp_path: Path, keep: float) -> None:
    path = tmp_path / "cut.mp4"
    path.write_bytes(write("head first").read_bytes())
    assert not same_or_none(truncate(path, keep).read_bytes())


@needs_index
def test_two_descriptions_have_no_index(write: Callable[[str], Path]) -> None:
    content = write("b-frames").read_bytes()
    assert same_or_none(content)
    at = content.index(b"stsd") + 12  # behind the number of entries: the head of the file stands at its end
    (length,) = struct.unpack_from(">I", content, at)
    twice = bytearray(content[: at + length] + content[at:])
    twice[at - 1] = 2
    for box in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd"):
        place = twice.index(box) - 4
        struct.pack_into(">I", twice, place, struct.unpack_from(">I", twice, place)[0] + length)
    _, slow = both(io.BytesIO(twice))
    assert len(slow) == NUM_FRAMES  # it is a sound file
    assert not same_or_none(bytes(twice))


@needs_index
def test_a_time_that_stands_still_has_no_index(write: Callable[[str], Path]) -> None:
    content = bytearray(write("uneven").read_bytes())
    place = content.index(b"stts") + 12 + 8 * 3 + 4
    assert same_or_none(bytes(content))
    struct.pack_into(">I", content, place, 0)
    assert not same_or_none(bytes(content))


@needs_index
def test_a_second_head_has_no_index(write: Callable[[str], Path]) -> None:
    content = write("b-frames").read_bytes()
    head = content[content.index(b"moov") - 4 :]
    assert not same_or_none(content + head)
    assert not same_or_none(content + b"\0\0\0\x08moof")
    assert same_or_none(content + b"\0\0\0\x0cfree1234")
    assert not same_or_none(content + b"\0\0")
