"""Each benchmark's files, prompts and rules, on miniature copies of the official layout, and on broken ones."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

import layouts
from hicom.eval.benchmarks import TASKS
from hicom.eval.paper import PUBLISHED
from hicom.eval.samples import BenchmarkError, Sample

NAMES = tuple(layouts.WRITERS)


def load(name: str, root: Path) -> list[Sample]:
    layouts.WRITERS[name](root)
    return TASKS[name].samples(root)


def test_all_tasks_are_tested() -> None:
    assert set(TASKS) == set(NAMES)
    assert set(PUBLISHED) <= set(TASKS)


@pytest.mark.parametrize("name", NAMES)
def test_all_samples_have_videos_and_sensible_fields(name: str, tmp_path: Path) -> None:
    samples = load(name, tmp_path)
    task = TASKS[name]
    for sample in samples:
        assert sample.video.exists(), sample
        assert set(sample.groups) >= set(task.groups)
        assert not task.macro or task.macro in sample.groups
        assert (len(sample.options) > 1) == (task.judge is None)
        assert sample.question in task.prompt(sample, [])


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("clips")])
def test_missing_files_are_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"no such file|cannot be read") as error:
        TASKS[name].samples(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_video_mme(tmp_path: Path) -> None:
    samples = load("videomme", tmp_path)
    assert len(samples) == 9
    first = samples[0]
    assert first.id == "000-0"
    assert first.video == tmp_path / "Video-MME" / "videos" / "clip0.mp4"
    assert first.options == ("A dog.", "A cat.", "Two mice.", "None.")
    assert first.answer == 0
    assert first.groups["duration"] == "short"
    assert first.subtitles is None
    assert TASKS["videomme"].prompt(first, []) == (
        "Select the best answer to the following multiple-choice question based on the video. Respond with only the "
        "letter (A, B, C, or D) of the correct option.\nWhat is seen in 0, 0?\nA. A dog.\nB. A cat.\nC. Two mice.\n"
        "D. None.\nAnswer with the option's letter from the given choices directly and only give the best option. "
        "The best answer is: "
    )


def test_video_mme_with_subtitles(tmp_path: Path) -> None:
    samples = load("videomme_w_subtitle", tmp_path)
    assert [sample.subtitles is not None for sample in samples] == [False] * 3 + [True] * 3 + [False] * 3
    prompt = TASKS["videomme_w_subtitle"].prompt(samples[3], ["One.", "Two."])
    assert prompt.startswith("This video's subtitles are listed below:\nOne.\nTwo.\nSelect the best answer")


def test_mvbench(tmp_path: Path) -> None:
    samples = load("mvbench", tmp_path)
    assert len(samples) == 40
    assert len({sample.groups["task"] for sample in samples}) == 20
    bounded = {sample.groups["task"] for sample in samples if (sample.start_s, sample.end_s) == (0.5, 1.5)}
    assert bounded == {
        "action_sequence",
        "action_prediction",
        "object_interaction",
        "action_localization",
        "episodic_reasoning",
    }
    assert all(sample.start_s is None for sample in samples if sample.groups["task"] not in bounded)
    folders = [sample for sample in samples if sample.video.is_dir()]
    assert {sample.groups["task"] for sample in folders} == {"episodic_reasoning"}
    assert {sample.source_fps for sample in folders} == {3.0}
    assert {sample.answer for sample in samples} == {1}
    assert TASKS["mvbench"].prompt(samples[0], []) == (
        "Question: What of action_sequence?\nOptions:\n(A) left\n(B) right\n(C) up\nAnswer with the option's letter "
        "from the given choices directly and only give the best option."
    )


def test_egoschema(tmp_path: Path) -> None:
    samples = load("egoschema", tmp_path)
    assert [sample.answer for sample in samples] == [None] * 4
    subset = TASKS["egoschema_subset"].samples(tmp_path)
    assert {sample.id: sample.answer for sample in subset} == {"uid-1": 3, "uid-2": 0}
    submission = TASKS["egoschema"].submission
    assert submission is not None
    path = submission(tmp_path, {"uid-0": 2, "uid-1": None})
    assert json.loads(path.read_text("utf-8")) == {"uid-0": 2, "uid-1": -1}
    with (tmp_path / "submission.csv").open(encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["q_uid", "answer"], ["uid-0", "2"], ["uid-1", "-1"]]
    layouts.write_json(tmp_path / "EgoSchema" / "subset_answers.json", {"other": 3})
    with pytest.raises(BenchmarkError, match="such as other"):
        TASKS["egoschema_subset"].samples(tmp_path)


def test_activitynet_qa(tmp_path: Path) -> None:
    samples = load("activitynetqa", tmp_path)
    assert [sample.groups["type"] for sample in samples] == ["yes/no", "color", "object"]
    assert samples[2].video.name == "v_clip1.mkv"
    judge = TASKS["activitynetqa"].judge
    assert judge is not None
    (request,) = judge(samples, {"v_1": "it is red"})
    assert (request.id, request.video_id, request.aspect) == ("v_1", "clip0", "accuracy")
    assert request.fields == {"question": "is it red", "answer": "yes", "prediction": "it is red"}
    path = tmp_path / "Activitynet_Zero_Shot_QA" / "test_a.json"
    layouts.write_json(path, json.loads(path.read_text("utf-8"))[1:])
    with pytest.raises(BenchmarkError, match=r"record 1: test_a\.json has no answer for the question 'v_0'"):
        TASKS["activitynetqa"].samples(tmp_path)


def test_video_chatgpt(tmp_path: Path) -> None:
    samples = load("videochatgpt", tmp_path)
    assert [sample.id for sample in samples] == [
        "generic-0",
        "generic-1",
        "temporal-0",
        "consistency-0-Q1",
        "consistency-0-Q2",
    ]
    judge = TASKS["videochatgpt"].judge
    assert judge is not None
    requests = list(judge(samples, {sample.id: f"answer to {sample.id}" for sample in samples}))
    assert [(request.aspect, request.id) for request in requests] == [
        ("correctness", "generic-0"),
        ("detail", "generic-0"),
        ("context", "generic-0"),
        ("correctness", "generic-1"),
        ("detail", "generic-1"),
        ("context", "generic-1"),
        ("temporal", "temporal-0"),
        ("consistency", "consistency-0"),
    ]
    assert requests[-1].fields["prediction2"] == "answer to consistency-0-Q2"
    # A pair is judged once both answers are there.
    assert not list(judge(samples, {"consistency-0-Q1": "yes"}))


def test_mlvu(tmp_path: Path) -> None:
    samples = load("mlvu_dev", tmp_path)
    assert len(samples) == 14
    assert samples[0].video == tmp_path / "MLVU" / "video" / "1_plotQA" / "plotQA_0.mp4"
    assert {sample.answer for sample in samples} == {2}
    # Folders of videos beside the questions are found too.
    (tmp_path / "MLVU" / "video" / "1_plotQA").rename(tmp_path / "MLVU" / "1_plotQA")
    assert TASKS["mlvu_dev"].samples(tmp_path)[0].video.is_file()


def test_longvideobench(tmp_path: Path) -> None:
    samples = load("longvideobench_val", tmp_path)
    assert [sample.options for sample in samples] == [("a cup", "a pen", "a hat")] * 3
    assert [sample.answer for sample in samples] == [0, 1, 2]
    assert [sample.groups["duration"] for sample in samples] == ["15", "600", "15"]


def test_clips(tmp_path: Path) -> None:
    samples = load("clips", tmp_path)
    opened = TASKS["clips_open"].samples(tmp_path)
    assert len(samples) + len(opened) == 71
    assert len({sample.video for sample in samples}) == 10
    assert all(len(set(sample.options)) == 4 for sample in samples)
    # No letter is right much more often than the others.
    counts = [sum(sample.answer == index for sample in samples) for index in range(4)]
    assert max(counts) - min(counts) <= 6
    # The longest option is right about as often as by chance, so length tells little.
    longest = sum(max(range(4), key=lambda i, s=sample: len(s.options[i])) == sample.answer for sample in samples)
    assert 0.1 <= longest / len(samples) <= 0.4
    # Every clip that the fetching script knows has questions, and no other.
    script = (Path(__file__).parents[2] / "benchmarks" / "fetch_clips.py").read_text("utf-8")
    assert all(f'"{sample.video.name}"' in script for sample in samples + opened)


def change_records(path: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    rows = json.loads(path.read_text("utf-8"))
    change(rows)
    layouts.write_json(path, rows)


BROKEN = {
    "missing key": (lambda rows: rows[1].pop("question"), r"record 2: no 'question'; it has q_uid, google_drive_id"),
    "empty question": (lambda rows: rows[0].update(question=" "), "record 1: the question is empty"),
    "not text": (lambda rows: rows[0].update(question=["a"]), r"record 1: 'question' is \['a'\], not text"),
    "duplicate id": (lambda rows: rows[3].update(q_uid="uid-1"), "the id 'uid-1' is that of samples 2 and 4"),
    "no records": (lambda rows: rows.clear(), "egoschema: no samples"),
    "not an object": (lambda rows: rows.append(5), "a record is 5, not an object"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_records_are_named(name: str, tmp_path: Path) -> None:
    change, message = BROKEN[name]
    layouts.egoschema(tmp_path)
    change_records(tmp_path / "EgoSchema" / "questions.json", change)
    with pytest.raises(BenchmarkError, match=message):
        TASKS["egoschema"].samples(tmp_path)


def test_all_broken_records_are_told_at_once(tmp_path: Path) -> None:
    layouts.mlvu(tmp_path)
    path = tmp_path / "MLVU" / "json" / "4_count.json"
    change_records(path, lambda rows: [row.update(answer="7") for row in rows])
    with pytest.raises(BenchmarkError, match="the answer '7' is 0 of the options") as error:
        TASKS["mlvu_dev"].samples(tmp_path)
    assert [line.partition(": record ")[2][0] for line in str(error.value).splitlines()] == ["1", "2"]


def test_broken_files_are_named(tmp_path: Path) -> None:
    layouts.egoschema(tmp_path)
    path = tmp_path / "EgoSchema" / "questions.json"
    path.write_text(path.read_text("utf-8")[:-20], "utf-8")
    with pytest.raises(BenchmarkError, match=r"questions\.json: cannot be read"):
        TASKS["egoschema"].samples(tmp_path)
    layouts.video_mme(tmp_path)
    path = tmp_path / "Video-MME" / "videomme" / "test-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BenchmarkError, match=r"parquet: cannot be read"):
        TASKS["videomme"].samples(tmp_path)


def test_an_answer_that_is_no_letter(tmp_path: Path) -> None:
    layouts.video_mme(tmp_path)
    path = tmp_path / "Video-MME" / "videomme" / "test-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([layouts.mme_record(0, 0, "E")]), path)
    with pytest.raises(BenchmarkError, match="'answer' is 'E', not a letter of 4 options"):
        TASKS["videomme"].samples(tmp_path)


def test_bounds_must_be_a_part(tmp_path: Path) -> None:
    layouts.mvbench(tmp_path)
    path = tmp_path / "MVBench" / "json" / "action_sequence.json"
    change_records(path, lambda rows: rows[0].update(start=5.0))
    with pytest.raises(BenchmarkError, match=r"the part that counts is 5\.0 s to 1\.5 s"):
        TASKS["mvbench"].samples(tmp_path)
