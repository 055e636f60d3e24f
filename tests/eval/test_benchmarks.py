"""Each benchmark's files, prompts and rules, on miniature copies of the official layout, and on broken ones."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

import layouts
from hicom.eval.benchmarks import TASKS
from hicom.eval.paper import PUBLISHED
from hicom.eval.samples import BenchmarkError, Sample, convert_records

NAMES = tuple(layouts.WRITERS)


def load(name: str, root: Path) -> list[Sample]:
    layouts.WRITERS[name](root)
    found = TASKS[name].samples(root)
    assert not found.bad
    return found.items


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
    # Those without subtitles have the line, too, as in the released script.
    prompt = TASKS["videomme_w_subtitle"].prompt(samples[0], [])
    assert prompt == "This video's subtitles are listed below:\n\n" + TASKS["videomme"].prompt(samples[0], [])


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
    assert {sample.id: sample.answer for sample in subset.items} == {"uid-1": 3, "uid-2": 0}
    submission = TASKS["egoschema"].submission
    assert submission is not None
    path = submission(tmp_path, {"uid-0": 2, "uid-1": None})
    assert json.loads(path.read_text("utf-8")) == {"uid-0": 2, "uid-1": -1}
    with (tmp_path / "submission.csv").open(encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["q_uid", "answer"], ["uid-0", "2"], ["uid-1", "-1"]]
    layouts.write_json(tmp_path / "EgoSchema" / "subset_answers.json", {"other": 3, "uid-1": 3, "uid-2": 2.5})
    subset = TASKS["egoschema_subset"].samples(tmp_path)
    assert [sample.id for sample in subset.items] == ["uid-1"]
    assert len(subset.bad) == 3  # uid-2 once for its answer, once more because it is no sample
    assert "record 3: 'uid-2' is 2.5, not a whole number" in subset.bad[0]
    assert "no sample in questions.json for 'other'" in subset.bad[1]
    layouts.write_json(tmp_path / "EgoSchema" / "subset_answers.json", {"other": 3})
    with pytest.raises(BenchmarkError, match="no samples"):
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
    answers = json.loads(path.read_text("utf-8"))
    layouts.write_json(path, [answers[1], answers[2], answers[2]])
    found = TASKS["activitynetqa"].samples(tmp_path)
    assert [sample.id for sample in found.items] == ["v_1"]
    assert "record 1: test_a.json has no answers for the question 'v_0'" in found.bad[0]
    assert "record 3: test_a.json has 2 answers for the question 'v_2'" in found.bad[1]


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
    assert TASKS["mlvu_dev"].samples(tmp_path).items[0].video.is_file()


def test_longvideobench(tmp_path: Path) -> None:
    samples = load("longvideobench_val", tmp_path)
    assert [sample.options for sample in samples] == [("a cup", "a pen", "a hat")] * 3
    assert [sample.answer for sample in samples] == [0, 1, 2]
    assert [sample.groups["duration"] for sample in samples] == ["15", "600", "15"]


def test_clips(tmp_path: Path) -> None:
    samples = load("clips", tmp_path)
    opened = TASKS["clips_open"].samples(tmp_path).items
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
    "duplicate id": (lambda rows: rows[3].update(q_uid="uid-1"), "sample 4 has the id 'uid-1' of sample 2"),
    "not an object": (lambda rows: rows.append(5), "a record is 5, not an object"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_bad_record_is_left_out_and_named(name: str, tmp_path: Path) -> None:
    change, message = BROKEN[name]
    layouts.egoschema(tmp_path)
    change_records(tmp_path / "EgoSchema" / "questions.json", change)
    found = TASKS["egoschema"].samples(tmp_path)
    assert len(found.items) == 4 - (name != "not an object")
    (line,) = found.bad
    assert re.search(message, line)


@pytest.mark.parametrize(
    ("name", "file", "change", "message"),
    [
        ("mvbench", "MVBench/json/action_count.json", {"answer": "seven"}, "the answer 'seven' is 0 of the options"),
        ("mvbench", "MVBench/json/action_count.json", {"candidates": ["right", "right"]}, "is 2 of the options"),
        ("mvbench", "MVBench/json/action_sequence.json", {"start": "?"}, r"'start' is '\?', not a number"),
        (
            "mvbench",
            "MVBench/json/action_sequence.json",
            {"end": float("nan")},
            "0.5 s to nan s",
        ),
        ("mlvu_dev", "MLVU/json/4_count.json", {"answer": "7"}, "the answer '7' is 0 of the options"),
        ("activitynetqa", "Activitynet_Zero_Shot_QA/test_q.json", {"question": ""}, "the question is empty"),
        ("videochatgpt", "Video-ChatGPT-eval/generic_qa.json", {"A": None}, "'A' is None, not text"),
        ("longvideobench_val", "LongVideoBench/lvb_val.json", {"correct_choice": 3}, "the answer is option 3 of 3"),
        ("longvideobench_val", "LongVideoBench/lvb_val.json", {"correct_choice": 1e999}, "not a whole number"),
    ],
)
def test_one_bad_record_is_not_the_end_of_a_task(
    name: str, file: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    layouts.WRITERS[name](tmp_path)
    whole = TASKS[name].samples(tmp_path)
    change_records(tmp_path / file, lambda rows: rows[0].update(change))
    found = TASKS[name].samples(tmp_path)
    assert len(found.items) == len(whole.items) - 1
    (line,) = found.bad
    assert re.search(rf"{Path(file).name}: record 1: .*{message}", line)


def test_a_file_of_bad_records_is_in_another_layout(tmp_path: Path) -> None:
    layouts.mlvu(tmp_path)
    path = tmp_path / "MLVU" / "json" / "4_count.json"
    change_records(path, lambda rows: [row.update(answer="7") for row in rows])
    with pytest.raises(BenchmarkError, match="the answer '7' is 0 of the options") as error:
        TASKS["mlvu_dev"].samples(tmp_path)
    assert [line.partition(": record ")[2][0] for line in str(error.value).splitlines()] == ["1", "2"]
    layouts.egoschema(tmp_path)
    change_records(tmp_path / "EgoSchema" / "questions.json", list.clear)
    with pytest.raises(BenchmarkError, match="egoschema: no samples"):
        TASKS["egoschema"].samples(tmp_path)


def test_a_line_that_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": \n\n{"a": 3}\n', "utf-8")
    found = convert_records(path, lambda record, _: record["a"])
    assert found.items == [1, 3]
    assert "rows.jsonl: record 2: " in found.bad[0]


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


@pytest.mark.parametrize(
    ("bounds", "part"),
    [((5.0, 1.5), (1.5, 5.0)), ((2.0, 2.0), (2.0, 3.0)), ((-1.0, 4.0), (0.0, 4.0)), ((-2, -1), (0.0, 1.0))],
)
def test_odd_bounds_are_read_as_the_release_does(
    bounds: tuple[float, float], part: tuple[float, float], tmp_path: Path
) -> None:
    layouts.mvbench(tmp_path)
    path = tmp_path / "MVBench" / "json" / "action_sequence.json"
    change_records(path, lambda rows: rows[0].update(start=bounds[0], end=bounds[1]))
    found = TASKS["mvbench"].samples(tmp_path)
    assert (found.items[0].start_s, found.items[0].end_s) == part
    assert not found.bad
