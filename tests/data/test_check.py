"""`hicom data check` and `hicom data stats`: bad records and files are found, and tokens are those of training."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import media
import tiny
from hicom import cli
from hicom.data.check import CRASHED, MISSING, check_data, run_apart
from hicom.data.collate import Collator
from hicom.data.mixture import not_skipped, read_skip_list, read_sources
from hicom.data.stats import data_stats
from hicom.model.processing import HIComProcessor


def record(video: str | list[str] | None, question: str = "What?", image: str | None = None) -> dict[str, object]:
    talk = [{"from": "human", "value": question}, {"from": "gpt", "value": "A dog."}]
    return {"conversations": talk} | ({"video": video} if video else {}) | ({"image": image} if image else {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good, missing, broken and cut videos, a good and a broken image, and a malformed record."""
    path = tmp_path_factory.mktemp("data")
    media.write_video(path / "good.mp4", 40)
    media.write_video(path / "short.mp4", 3)
    media.damage(media.write_video(path / "cut.mkv", 60), 0.6, 1.0)
    (path / "broken.mp4").write_text("no video")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path / "good.png")
    (path / "broken.png").write_text("no image")
    records = [
        record("good.mp4"),
        record("good.mp4", "And then?"),
        record("missing.mp4"),
        record("broken.mp4"),
        {"video": "good.mp4"},
        record(None, "2 + 2?"),
        record(["good.mp4", "short.mp4"], "<video> and <video>?"),
        record(None, image="good.png"),
        record(None, image="broken.png"),
        record("cut.mkv"),
    ]
    (path / "r.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    return path


def test_what_is_bad_is_found(folder: Path, tmp_path: Path) -> None:
    sources = read_sources([folder / "r.jsonl"], on_bad="skip")
    report = check_data(sources, num_frames=4, num_workers=2)
    (source,) = report.sources
    assert (source["records"], source["samples"], report.num_bad_records) == (9, 9, 1)
    assert source["bad_records"][0]["number"] == 5
    assert (report.num_media, report.num_checked, report.is_good) == (7, 7, False)
    problems = {Path(bad.path).name: bad.problem for bad in report.bad}
    assert sorted(problems) == ["broken.mp4", "broken.png", "missing.mp4"]
    assert problems["missing.mp4"] == MISSING
    assert next(bad for bad in report.bad if bad.problem == MISSING).source.endswith("r.jsonl, line 3")
    report.write(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["num_media"] == 7

    report.write_skip_list(tmp_path / "skip.jsonl")
    (kept,) = (not_skipped(each, read_skip_list(tmp_path / "skip.jsonl")) for each in sources)
    assert [Path(name).name for sample in kept for name in sample.videos] == ["good.mp4"] * 3 + ["short.mp4", "cut.mkv"]
    assert all("broken" not in str(sample.images) for sample in kept)


def test_part_and_whole(folder: Path) -> None:
    sources = read_sources([folder / "r.jsonl"], on_bad="skip")
    whole = check_data(sources, num_frames=None)
    assert [(Path(each.path).name, bool(each.damage)) for each in whole.damaged] == [("cut.mkv", True)]
    drawn = [check_data(sources, num_media=3, num_frames=4, seed=seed) for seed in (0, 0, 1, 2)]
    assert all((each.num_media, each.num_checked) == (7, 3) for each in drawn)
    assert drawn[0].bad == drawn[1].bad
    assert len({tuple(each.bad) for each in drawn}) > 1


def test_a_file_that_crashes_its_process_is_named_alone() -> None:
    names = [f"{'bad' if number in (3, 4, 17) else 'good'}{number}" for number in range(20)]
    tasks = [(name, "video", None) for name in names]
    results = dict(run_apart(tasks, 2, media.die_of_bad_names, (CRASHED, "")))
    assert sorted(results) == list(range(20))
    assert sorted(n for n in results if results[n] == (CRASHED, "")) == [3, 4, 17]
    assert all(results[n] == ("", f"{names[n]} video None") for n in range(20) if "good" in names[n])


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> HIComProcessor:
    return HIComProcessor.from_pretrained(tiny.save(tmp_path_factory.mktemp("model") / "model"))


@pytest.mark.parametrize("window", [None, (1, 2, 2)])
def test_tokens_are_those_of_training(
    folder: Path, processor: HIComProcessor, window: tuple[int, int, int] | None
) -> None:
    """The batch that training makes of each sample alone is as long as the counts say."""
    lines = (folder / "r.jsonl").read_text().splitlines()
    for line in (0, 5, 6, 7):
        (folder / "one.jsonl").write_text(lines[line])
        (source,) = read_sources([folder / "one.jsonl"])
        facts, values = data_stats([source], processor, num_frames=4, window=window)
        batch = Collator(processor=processor, num_frames=4, windows=(window,) if window else ())([(0, source[0])])
        (length,) = batch["attention_mask"].sum(1).tolist()
        assert values["all tokens"] == [length]
        assert values["answer tokens"] == [int((batch["labels"] != -100).sum())]
        assert values["text tokens"][0] + values["visual tokens"][0] == length
        assert facts["all tokens"]["max"] == length


def test_statistics(folder: Path, processor: HIComProcessor) -> None:
    facts, values = data_stats(read_sources([folder / "r.jsonl"], on_bad="skip"), processor, num_frames=4)
    assert facts["media"] == {"video": 5, "text alone": 1, "several videos": 1, "image": 2}
    assert (facts["videos"], facts["videos that cannot be read"]) == (5, 2)
    assert facts["seconds"]["number"] == 3
    assert facts["seconds"]["max"] == pytest.approx(40 / 30, rel=0.6)
    # Two samples show videos that cannot be read.
    assert facts["all tokens"]["number"] == len(values["all tokens"]) == 7
    few, _ = data_stats(read_sources([folder / "r.jsonl"], on_bad="skip"), processor, num_frames=4, num_samples=3)
    assert few["samples looked at"] == 3


def test_check_on_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, skip = tmp_path / "report.json", tmp_path / "skip.jsonl"
    argv = ["data", "check", str(folder / "r.jsonl"), "--num-frames", "4", "--num-workers", "1"]
    assert cli.main([*argv, "--report", str(report), "--skip-list", str(skip)]) == 2
    out, error = capsys.readouterr()
    assert "9 samples of 9 records, 1 bad" in out
    assert f"{folder / 'missing.mp4'}: {MISSING} (1 samples, first {folder / 'r.jsonl'}, line 3)" in out
    assert "error: 1 bad records, 3 files that cannot be read" in error
    assert len(skip.read_text().splitlines()) == 4
    assert len(json.loads(report.read_text())["bad"]) == 3
    (folder / "good.jsonl").write_text(json.dumps(record("good.mp4")))
    assert cli.main(["data", "check", str(folder / "good.jsonl"), "--whole"]) == 0


def test_stats_on_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, picture = tiny.save(tmp_path / "model"), tmp_path / "stats.png"
    argv = ["data", "stats", str(folder / "r.jsonl"), "--model", str(model), "--num-frames", "4"]
    assert cli.main([*argv, "--picture", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "samples: several videos" in out
    assert "visual tokens" in out
    assert Image.open(picture).size[0] > 600
    assert cli.main([*argv, "--json", "--window", "1", "5", "5"]) == 0
    assert json.loads(capsys.readouterr().out)["window"] == [1, 5, 5]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("data", "hicom data COMMAND"),
        ("data chek", "did you mean 'check'"),
        ("data check", "give .json or .jsonl files"),
        ("data stats", "give .json or .jsonl files"),
        ("data check none.jsonl", "there is no file none.jsonl"),
        ("data check none.yaml", "there is no mixture none.yaml"),
        ("data check r.jsonl --num-workers 0", "--num-workers 0: give a positive number"),
        ("data stats r.jsonl --num-samples 0", "--num-samples 0: give a positive number"),
        ("data stats none.jsonl", "there is no file none.jsonl"),
        ("data stats none.jsonl --model nothing", "nothing"),
    ],
)
def test_wrong_command_lines(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words.split()) == (0 if words == "data" else 2)
    assert message in "".join(capsys.readouterr())


def test_parts_of_videos_are_checked_and_counted(
    tmp_path: Path, processor: HIComProcessor, capsys: pytest.CaptureFixture[str]
) -> None:
    media.write_video(tmp_path / "a.mp4", 90, fps=30)
    parts = ["a.mp4#t=1,2", "a.mp4#t=2.5", "a.mp4#t=9,10", "none.mp4#t=1,2"]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(record(part)) + "\n" for part in parts))
    sources = read_sources([tmp_path / "r.jsonl"])
    report = check_data(sources, num_frames=4)
    problems = {Path(each.path).name: each.problem for each in report.bad}
    assert sorted(problems) == sorted(parts[2:])
    assert "start_s=9 is not before the end" in problems[parts[2]]
    assert problems[parts[3]] == MISSING
    facts, values = data_stats(sources, processor, num_frames=64)
    assert facts["videos that cannot be read"] == 2
    assert values["seconds"] == pytest.approx([1.0, 0.5], abs=0.01)
    # 30 frames of one second are fewer than 64.
    batch = Collator(processor=processor, num_frames=64)([(0, sources[0][0])])
    assert values["all tokens"][0] == batch["input_ids"].shape[1]
    assert len(batch["pixel_values_videos"]) == 30


def test_faults_of_records_are_counted_by_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    media.write_video(tmp_path / "good.mp4", 4)
    bad = [record("good.mp4", f"<video> {'<video>' * number}?") for number in (1, 1, 2)]
    empty = record("good.mp4") | {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": ""}]}
    records = [record("good.mp4"), *bad, empty, {"video": "good.mp4"}]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    assert cli.main(["data", "check", str(tmp_path / "r.jsonl"), "--skip-list", str(tmp_path / "skip.jsonl")]) == 2
    out = " ".join(capsys.readouterr().out.split())
    assert "3 bad records N <video> placeholders for N video files" in out
    assert "1 bad records a turn needs `from`" in out
    # The list is enough to train on the rest.
    skip = read_skip_list(tmp_path / "skip.jsonl")
    (source,) = read_sources([tmp_path / "r.jsonl"], skip=skip)
    assert len(not_skipped(source, skip)) == 1


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"video": "\\ud800.mp4", "conversations": TALK}', "half of a character"),
        ('{"video": "good.mp4", "conversations": TALK, "note": {"x": ["\\udfff"]}}', "half of a character"),
        ('{"video": "good.mp4", "conversations": TALK, "\\uD9ab": 1}', "half of a character"),
        ("[" * 200_000, "nested too deeply"),
        ('{"video": "good.mp4", "conversations": TALK, "note": ' + "[" * 200_000, "nested too deeply"),
    ],
    ids=["path", "field", "name", "deep", "deep field"],
)
def test_odd_json_is_named_by_file_and_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str, bad: str, message: str
) -> None:
    good = json.dumps(record("good.mp4"))
    lines = [good, bad.replace("TALK", json.dumps(record(None)["conversations"])), good]
    path = tmp_path / f"odd{suffix}"
    path.write_text("\n".join(lines) if suffix == ".jsonl" else "[" + ",\n".join(lines) + "]")
    skip = tmp_path / "skip.jsonl"
    code = cli.main(["data", "check", str(path), "--root", str(folder), "--num-workers", "1", "--skip-list", str(skip)])
    out, err = capsys.readouterr()
    assert code == 2
    assert re.search(rf"odd{suffix}, line 2: .*{message}", out + err)
    assert "Traceback" not in out + err
    if suffix == ".jsonl" or "deep" not in message:  # an array that is not JSON has no further records
        assert "2 samples of 2 records, 1 bad" in out
        assert len(read_skip_list(skip).lines) == 1


def test_whole_characters_are_no_halves(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "whole.jsonl"
    path.write_text(json.dumps(record("good.mp4", "Was ist das \U0001f600 \u00e9?")) + "\n")
    assert "\\ud83d\\ude00" in path.read_text()
    (source,) = read_sources([path], folder)
    assert "\U0001f600" in source[0].messages[0]["content"]
