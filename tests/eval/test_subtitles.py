"""Subtitles and which of them a model reads."""

from pathlib import Path

import pytest

import layouts
from hicom.eval.subtitles import Cue, read_subtitles, subtitles_at

CUES = [Cue(0, 1, "one"), Cue(0.5, 3, "two"), Cue(3, 4, "three"), Cue(10, 11, "ten")]


def test_srt(tmp_path: Path) -> None:
    file = tmp_path / "a.srt"
    file.write_bytes(b"\xef\xbb\xbf" + layouts.SRT.replace("\n", "\r\n").encode())
    assert read_subtitles(file) == [
        Cue(0, 0.9, "Hello there, you."),
        Cue(0.9, 2.0, "Bye."),
        Cue(60, 62, "Never seen."),
    ]


def test_vtt_and_cues_out_of_order(tmp_path: Path) -> None:
    file = tmp_path / "a.vtt"
    file.write_text("WEBVTT\n\n01:02.500 --> 01:03.000 align:start\nlate\n\n00:01.000 --> 00:02.000\n42\n", "utf-8")
    assert read_subtitles(file) == [Cue(1, 2, "42"), Cue(62.5, 63, "late")]


def test_no_subtitles(tmp_path: Path) -> None:
    file = tmp_path / "a.srt"
    file.write_text("nothing", "utf-8")
    with pytest.raises(ValueError, match=r"a\.srt: no subtitles in it"):
        read_subtitles(file)


@pytest.mark.parametrize(
    ("times", "texts"),
    [
        ([0.0], ["one"]),
        ([0.7], ["one"]),  # the first that covers the time
        ([1.0], ["two"]),  # the end does not count
        ([0.1, 0.2, 2.0, 2.5, 3.5], ["one", "two", "three"]),  # once, however many frames show it
        ([5.0, 12.0], []),
        ([], []),
    ],
)
def test_subtitles_at_the_times_of_frames(times: list[float], texts: list[str]) -> None:
    assert subtitles_at(CUES, times) == texts
