"""Records of one's own as a benchmark: what becomes of a record, how it is asked and scored, and what is refused."""

import hashlib
import json
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import layouts
import media
from endpoints import serve
from hicom import VideoChat
from hicom.endpoint import Endpoint
from hicom.eval.answers import exact_match, token_f1
from hicom.eval.benchmarks import TASKS
from hicom.eval.judge import PROMPTS
from hicom.eval.records import read_all_records, record_tasks
from hicom.eval.report import comparison_table, results_page, summary_rows
from hicom.eval.results import compare_runs, write_results
from hicom.eval.run import (
    RunOptions,
    answer_on_devices,
    answer_samples,
    choose_samples,
    judge_answers,
    read_answers,
)
from hicom.eval.samples import BenchmarkError, Sample, Task

OPTIONS = RunOptions(num_frames=4, batch_size=2, max_new_tokens=4)
CHOICE = "which object moves ?\n(A) a dog\n(B) a cat\n(C) a red circle\nAnswer with the option's letter."
Run = Callable[..., tuple[int, str, str]]


def record(*turns: str, video: Any = "clips/a.mp4", **fields: Any) -> dict[str, Any]:
    """Return a record of questions and answers in turn; the first one shows the video."""
    texts = [f"<video>\n{turns[0]}", *turns[1:]]
    roles = ("human", "gpt")
    conversation = [{"from": roles[number % 2], "value": text} for number, text in enumerate(texts)]
    return {"video": video, "conversations": conversation} | fields


RECORDS = [
    record("what is there ?", "a dog", category="what"),
    record(CHOICE, "(B) a cat", category="which"),
    record("is there a cat ?", "yes", "how many ?", "two", "which object moves ?\nA. dog\nB. cat", "A", type="long"),
    record(CHOICE, "a red circle .", video="clips/b.mp4"),
    record(CHOICE, "no object", video="clips/b.mp4", category="", family="which"),
    {
        "messages": [
            {"role": "system", "content": "describe the video"},
            {
                "role": "user",
                "content": [{"type": "video", "video": "clips/b.mp4"}, {"type": "text", "text": "what ?"}],
            },
            {"role": "assistant", "content": "The cat."},
        ]
    },
]


def write(path: Path, records: Sequence[Any], with_clips: bool = True) -> Path:
    """Write a file of records, and the clips beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records), "utf-8")
    for name in ("a", "b") if with_clips else ():
        layouts.clip(path.parent / "clips" / f"{name}.mp4", 8 if name == "a" else 12)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "data" / "val.jsonl", RECORDS)


def run(chat: VideoChat, model: Path, task: Task, out: Path, options: RunOptions = OPTIONS, **more: Any) -> Any:
    samples = choose_samples(task, Path(), options.limit).items
    answer_samples(chat, task, samples, out / task.name, options, model=str(model), **more)
    return write_results(task, samples, out / task.name)


def run_all(chat: VideoChat, model: Path, file: Path, out: Path, **more: Any) -> dict[str, Any]:
    return {task.name: run(chat, model, task, out, **more) for task in record_tasks(file)}


def lines_of(out: Path, name: str) -> dict[str, Any]:
    """Return all lines, without what differs from run to run."""
    lines = read_answers(out / name)
    return {key: {k: v for k, v in line.items() if k != "seconds"} for key, line in lines.items()}


def samples_of(path: Path, root: Path | None = None) -> dict[str, Sample]:
    return {sample.id: sample for task in record_tasks(path, root) for sample in task.samples(Path()).items}


# What a record becomes.


def test_every_answered_turn_is_a_sample(file: Path) -> None:
    choice, open_ones = record_tasks(file)
    assert (choice.name, choice.max_new_tokens, choice.text_scores) == ("val", 16, False)
    assert (open_ones.name, open_ones.max_new_tokens, open_ones.text_scores) == ("val_open", 256, True)
    found = samples_of(file)
    assert [sample.id for sample in choice.samples(Path()).items] == ["2", "3-3", "4"]
    assert [sample.id for sample in open_ones.samples(Path()).items] == ["1", "3-1", "3-2", "5", "6"]
    assert (found["2"].options, found["2"].answer) == (("a dog", "a cat", "a red circle"), 1)
    assert (found["3-3"].options, found["3-3"].answer) == (("dog", "cat"), 0)
    assert found["4"].answer == 2  # by its text
    assert (found["5"].options, found["5"].answer) == ((), "no object")  # none of the options
    assert (found["2"].question, found["2"].text) == ("which object moves ?", CHOICE)
    assert (found["5"].question, found["5"].text) == ("which object moves ?", CHOICE)
    assert found["1"].text == "what is there ?"
    assert found["1"].history == ()
    assert found["3-2"].history == (
        {"role": "user", "content": "is there a cat ?"},
        {"role": "assistant", "content": "yes"},
    )
    assert [turn["content"] for turn in found["3-3"].history] == ["is there a cat ?", "yes", "how many ?", "two"]
    assert found["6"].history == ({"role": "system", "content": "describe the video"},)
    assert found["6"].text == "what ?"
    assert {sample.video for sample in found.values()} == {file.parent / "clips" / f"{x}.mp4" for x in "ab"}
    assert [found[name].video_id for name in ("1", "4")] == ["clips/a.mp4", "clips/b.mp4"]
    groups = {name: sample.groups.get("category") for name, sample in found.items()}
    assert groups == {"1": "what", "2": "which", "3-1": "long", "3-2": "long", "3-3": "long"} | {
        "4": None,
        "5": "which",
        "6": None,
    }
    assert (choice.groups, open_ones.groups) == (("category",), ("category",))


@pytest.mark.parametrize(
    ("turn", "text"),
    [
        ("<video>\nwhat ?\n", "what ?\n"),
        ("<video>what ?", "what ?"),
        ("what ?\n<video>", "what ?"),
        ("look at <video> : what ?", "look at : what ?"),
        ("<image>\nwhat ?", "what ?"),  # as LLaVA-NeXT calls videos
        ("what ?", "what ?"),
    ],
)
def test_placeholders_are_no_part_of_the_text(turn: str, text: str, tmp_path: Path) -> None:
    conversation = [{"from": "human", "value": turn}, {"from": "gpt", "value": "a dog"}]
    write(tmp_path / "r.jsonl", [{"video": "a.mp4", "conversations": conversation}], with_clips=False)
    assert samples_of(tmp_path / "r.jsonl")["1"].text == text


@pytest.mark.parametrize(
    ("records", "name"), [(RECORDS[:1], "val"), (RECORDS[1:2], "val"), (RECORDS[:2], "val val_open")]
)
def test_one_kind_of_questions_is_one_task(records: list[Any], name: str, tmp_path: Path) -> None:
    tasks = record_tasks(write(tmp_path / "val.jsonl", records, with_clips=False))
    assert " ".join(task.name for task in tasks) == name


PLAIN = record("what ?", "a dog")
TURNS = record("what ?", "a dog", "what ?", "a cat")


@pytest.mark.parametrize(
    ("records", "ids"),
    [
        ([PLAIN | {"id": "x"}, TURNS | {"id": 7}], "x 7-1 7-2"),
        ([PLAIN | {"question_id": "x"}, PLAIN | {"question_id": "y"}], "x y"),
        ([PLAIN | {"id": "x", "question_id": 1}, PLAIN | {"id": "x", "question_id": 2}], "1 2"),
        ([PLAIN | {"id": "x"}, PLAIN | {"id": "x"}], "1 2"),
        ([PLAIN | {"id": "x"}, PLAIN], "1 2"),
        ([PLAIN | {"id": "x"}, PLAIN | {"id": " "}], "1 2"),
        ([PLAIN | {"id": True}, PLAIN | {"id": "x"}], "1 2"),
        ([PLAIN | {"id": 1}, PLAIN | {"id": "1"}], "1 2"),
        ([PLAIN | {"id": "x-1"}, TURNS | {"id": "x"}], "1 2-1 2-2"),
        ([TURNS, PLAIN], "1-1 1-2 2"),
    ],
)
def test_ids_are_unique(records: list[Any], ids: str, tmp_path: Path) -> None:
    assert " ".join(samples_of(write(tmp_path / "val.jsonl", records, with_clips=False))) == ids


def test_ids_without_names_are_lines_where_these_differ(tmp_path: Path) -> None:
    text = json.dumps(PLAIN)
    (tmp_path / "gaps.jsonl").write_text(f"\n{text}\n\n\n{text}\n", "utf-8")
    assert list(samples_of(tmp_path / "gaps.jsonl")) == ["2", "5"]
    (tmp_path / "array.json").write_text(f"[{text}, {text}]", "utf-8")  # both on the first line
    assert list(samples_of(tmp_path / "array.json")) == ["0", "1"]


def test_media_start_from_the_root(tmp_path: Path) -> None:
    records = [PLAIN, record("what ?", "a dog", video=str(tmp_path / "else" / "c.mp4"))]
    path = write(tmp_path / "val.jsonl", records, with_clips=False)
    found = samples_of(path, tmp_path / "videos")
    assert found["1"].video == tmp_path / "videos" / "clips" / "a.mp4"
    assert found["1"].video_id == "clips/a.mp4"
    assert found["2"].video == tmp_path / "else" / "c.mp4"
    assert found["2"].video_id == str(tmp_path / "else" / "c.mp4")


def test_parts_of_a_video_are_asked_about_that_part(tmp_path: Path) -> None:
    lines = [record("what is there ?", "a dog", video="clips/a.mp4#t=0.5,1"), record("and now ?", "a cat")]
    (task,) = record_tasks(write(tmp_path / "val.jsonl", lines))
    part, whole = task.read(Path()).items
    assert (part.video, part.start_s, part.end_s) == (tmp_path / "clips" / "a.mp4", 0.5, 1.0)
    # Both show the same file, so they are not independent.
    assert part.video_id == whole.video_id == "clips/a.mp4"
    assert (whole.start_s, whole.end_s) == (None, None)


def test_mixtures_count_every_chosen_sample_once(tmp_path: Path) -> None:
    write(tmp_path / "one" / "a.jsonl", [PLAIN, TURNS, PLAIN, PLAIN], with_clips=False)
    write(tmp_path / "two" / "b.jsonl", [PLAIN, PLAIN], with_clips=False)
    entries = "- {path: one/a.jsonl, sampling: first:3, weight: 2.5}\n- {path: two/b.jsonl}\n"
    path = tmp_path / "mine.yaml"
    path.write_text(f"datasets:\n{entries}", "utf-8")
    (task,) = record_tasks(path)
    assert task.name == "mine"
    assert not task.samples(Path()).bad  # the same one twice would be
    found = samples_of(path)
    assert list(found) == ["1:1", "1:2-1", "1:2-2", "1:3", "2:1", "2:2"]
    # Two files of the same name are not the same video.
    assert (found["1:1"].video_id, found["2:1"].video_id) == ("1:clips/a.mp4", "2:clips/a.mp4")
    assert found["2:1"].video == tmp_path / "two" / "clips" / "a.mp4"
    path.write_text("datasets:\n- {path: one/a.jsonl, root: videos}\n", "utf-8")
    assert samples_of(path)["1"].video == tmp_path / "videos" / "clips" / "a.mp4"


# Runs.


def test_options_and_open_questions_are_scored(chat: VideoChat, model: Path, file: Path, tmp_path: Path) -> None:
    """What the model says in a first run are the right answers to some questions of the second."""
    out = tmp_path / "out"
    run_all(chat, model, file, tmp_path / "first")
    said = lines_of(tmp_path / "first", "val_open")
    assert said["1"]["response"]
    named = [
        record("what is there ?", f"The {said['1']['response'].upper()} !", category="what"),
        *RECORDS[1:5],
        RECORDS[5] | {"messages": [*RECORDS[5]["messages"][:2], {"role": "assistant", "content": "zebra"}]},
    ]
    facts = run_all(chat, model, write(file, named), out)
    lines = lines_of(out, "val_open")
    assert {name: line["answer"] for name, line in lines.items()}["6"] == "zebra"
    assert "prediction" not in lines["1"]
    assert [turn["content"] for turn in lines["3-2"]["history"]] == ["is there a cat ?", "yes"]
    assert exact_match(lines["1"]["response"], lines["1"]["answer"])
    scores = facts["val_open"]["scores"]
    matches = [100 * exact_match(line["response"], line["answer"]) for line in lines.values()]
    shares = [100 * token_f1(line["response"], line["answer"]) for line in lines.values()]
    assert 20 <= scores["exact_match"]["mean"] == sum(matches) / 5
    assert scores["f1"]["mean"] == pytest.approx(sum(shares) / 5, abs=1e-5)
    assert (scores["f1"]["n"], scores["f1"]["clusters"]) == (5, 2)
    assert scores["exact_match"]["high"] <= 100
    assert facts["val_open"]["is_complete"], "no judge was asked for"
    assert "judge" not in facts["val_open"]
    assert "unparsable" not in facts["val_open"]
    groups = facts["val_open"]["groups"]["category"]
    assert {label: found["n"] for label, found in groups["exact_match"].items()} == {"what": 1, "long": 2, "which": 1}
    assert groups["exact_match"]["what"]["mean"] == 100
    choice = facts["val"]
    right = [line["prediction"] == line["answer"] for line in lines_of(out, "val").values()]
    assert choice["scores"]["accuracy"]["mean"] == pytest.approx(100 * sum(right) / 3, abs=1e-5)
    assert choice["chance"] == pytest.approx(100 * (1 / 3 + 1 / 2 + 1 / 3) / 3, abs=0.01)
    assert "exact_match" not in choice["scores"]
    page = results_page(out)
    assert "## val, options" in page
    assert "| model | frames | visual tokens | exact_match | f1 |" in page
    assert f"| what | {groups['f1']['what']['mean']:.1f} [" in page
    assert (
        f"exact_match {scores['exact_match']['mean']:.1f} ["
        in dict(summary_rows(facts["val_open"]))["val, open questions"]
    )


def test_each_turn_is_asked_after_those_before_it(chat: VideoChat, model: Path, file: Path, tmp_path: Path) -> None:
    run_all(chat, model, file, tmp_path / "out")
    lines = lines_of(tmp_path / "out", "val") | lines_of(tmp_path / "out", "val_open")
    videos = {name: chat.encode(file.parent / "clips" / f"{name}.mp4", num_frames=4) for name in "ab"}
    differ = 0
    for name, sample in samples_of(file).items():
        messages = [*sample.history, {"role": "user", "content": sample.text}]
        video = videos[sample.video.stem]
        alone = chat.reply(messages, [video], instruction=sample.question, max_new_tokens=4)
        assert lines[name]["response"] == alone.text
        assert lines[name]["prompt"] == sample.text
        assert lines[name]["instruction"] == sample.question
        if sample.history:
            without = chat.reply(messages[-1:], [video], instruction=sample.question, max_new_tokens=4)
            differ += without.text != alone.text
    assert differ, "no answer depends on what was said before it"


@pytest.mark.parametrize("num_lines", [1, 2, 3])
def test_an_interrupted_run_goes_on(num_lines: int, chat: VideoChat, model: Path, file: Path, tmp_path: Path) -> None:
    whole = run_all(chat, model, file, tmp_path / "whole")
    run_all(chat, model, file, tmp_path / "out")
    lines = tmp_path / "out" / "val_open" / "samples-0-of-1.jsonl"
    kept = lines.read_text("utf-8").split("\n")[:num_lines]
    lines.write_text("\n".join(kept) + '\n{"id": "3-2", "resp', "utf-8")
    assert run_all(chat, model, file, tmp_path / "out") == whole
    assert lines_of(tmp_path / "out", "val_open") == lines_of(tmp_path / "whole", "val_open")


def test_shards_make_one_run(chat: VideoChat, model: Path, file: Path, tmp_path: Path) -> None:
    whole = run_all(chat, model, file, tmp_path / "whole")
    first = run_all(chat, model, file, tmp_path / "out", shard=(1, 2))
    assert not first["val_open"]["is_complete"]
    assert run_all(chat, model, file, tmp_path / "out", shard=(0, 2)) == whole


def test_tasks_travel_to_other_processes(file: Path) -> None:
    for task in record_tasks(file):
        again = pickle.loads(pickle.dumps(task))
        assert again.samples(Path()).items == task.samples(Path()).items
        assert again.prompt(again.samples(Path()).items[0], []) == task.samples(Path()).items[0].text


@pytest.mark.dist
def test_devices_share_the_samples(chat: VideoChat, model: Path, file: Path, tmp_path: Path) -> None:
    whole = run_all(chat, model, file, tmp_path / "whole")
    tasks = record_tasks(file)
    todo = [(task, choose_samples(task, Path(), None).items, tmp_path / "out" / task.name) for task in tasks]
    answer_on_devices(["cpu", "cpu"], {}, todo, OPTIONS, model=str(model))
    assert {task.name: write_results(task, samples, out) for task, samples, out in todo} == whole


def test_two_runs_compare_by_their_lines(chat: VideoChat, model: Path, file: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run_all(chat, model, file, first)
    run_all(chat, model, file, second, options=RunOptions(num_frames=2, batch_size=2, max_new_tokens=1))
    lines = second / "val_open" / "samples-0-of-1.jsonl"
    changed = [json.loads(line) for line in lines.read_text("utf-8").splitlines()]
    for line in changed:
        line["response"] = line["answer"] + "!" if line["id"] in ("1", "3-1") else "the zebra"
    lines.write_text("".join(json.dumps(line) + "\n" for line in changed), "utf-8")
    rows = {(row["task"], row["score"]): row for row in compare_runs(first, second)}
    assert list(rows) == [("val", "accuracy"), ("val_open", "exact_match"), ("val_open", "f1")]
    row = rows["val_open", "exact_match"]
    assert row["second"] == 40
    assert row["difference"]["mean"] == pytest.approx(row["second"] - row["first"])
    assert (row["difference"]["n"], row["difference"]["clusters"], row["unpaired"]) == (5, 2, 0)
    assert "| val_open | f1 |" in comparison_table(list(rows.values()))


def test_a_judge_comes_beside_the_text(chat: VideoChat, model: Path, file: Path, tmp_path: Path) -> None:
    run_all(chat, model, file, tmp_path / "out")
    task = record_tasks(file)[1]
    samples, out = choose_samples(task, Path(), None).items, tmp_path / "out" / task.name
    before = write_results(task, samples, out)
    assert list(before["scores"]) == ["exact_match", "f1"]
    assert not write_results(task, samples, out, judge="j")["is_complete"], "a judge was named and did not judge"
    replies: list[str | int] = ["{'pred': 'yes', 'score': 5}", 400, "no idea", 400, "{'pred': 'no', 'score': 1}"]
    with serve(lambda _: replies.pop(0)) as served:
        errors = judge_answers(task, samples, out, Endpoint(served.url, "j", num_concurrent=1), PROMPTS)
    assert len(errors) == 2
    facts = write_results(task, samples, out)
    assert not facts["is_complete"]
    assert (facts["judge"]["requests"], facts["judge"]["judged"], facts["judge"]["unclear"]) == (5, 3, 1)
    assert facts["scores"]["accuracy"]["n"] == 2
    with serve(lambda _: "{'pred': 'yes', 'score': 4}") as served:
        assert judge_answers(task, samples, out, Endpoint(served.url, "j"), PROMPTS) == []
        assert len(served.requests) == 2
        asked = served.requests[0]["messages"][1]["content"]
    assert "Question: " in asked
    facts = write_results(task, samples, out)
    assert facts["is_complete"]
    assert {name: found["n"] for name, found in facts["scores"].items()} == {
        "exact_match": 5,
        "f1": 5,
        "accuracy": 4,
        "score": 4,
    }
    assert facts["scores"]["exact_match"] == before["scores"]["exact_match"]
    assert facts["scores"]["f1"] == before["scores"]["f1"]
    scores = [row["score"] for row in compare_runs(tmp_path / "out", tmp_path / "out") if row["task"] == "val_open"]
    assert scores == ["exact_match", "f1", "accuracy", "score"]


def test_categories_that_no_judgement_reached_are_left_out(chat: VideoChat, model: Path, tmp_path: Path) -> None:
    records = [record("what ?", "a dog", category="a|b"), record("what ?", "a cat", category="c")]
    (task,) = record_tasks(write(tmp_path / "val.jsonl", records))
    samples, out = choose_samples(task, Path(), None).items, tmp_path / "out" / "val"
    run(chat, model, task, tmp_path / "out")
    replies: list[str | int] = ["{'pred': 'yes', 'score': 5}", 400]
    with serve(lambda _: replies.pop(0)) as served:
        judge_answers(task, samples, out, Endpoint(served.url, "j", num_concurrent=1), PROMPTS)
    groups = write_results(task, samples, out)["groups"]["category"]
    assert list(groups["f1"]) == ["a|b", "c"]
    assert list(groups["accuracy"]) == ["a|b"]
    assert "| a\\|b | " in results_page(tmp_path / "out")


def test_the_data_digest_of_other_benchmarks_stays(chat: VideoChat, model: Path, tmp_path: Path) -> None:
    """Folders of results that are there already must go on."""
    layouts.video_mme(tmp_path / "data")
    task = TASKS["videomme"]
    samples = choose_samples(task, tmp_path / "data", None).items
    answer_samples(chat, task, samples[:1], tmp_path / "out", OPTIONS, model=str(model))
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    (sample,) = samples[:1]
    name, options = sample.video.name, list(sample.options)
    entry = [[sample.id, name, sample.question, options, sample.answer, sample.start_s, sample.end_s]]
    assert config["data_digest"] == hashlib.sha256(json.dumps(entry).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    "change",
    [
        {"answer": "a cat"},
        {"question": "What is there ?"},
        {"before": "two"},
        {"system": "describe the image"},
    ],
)
def test_other_records_are_other_data(change: Mapping[str, str], chat: VideoChat, model: Path, tmp_path: Path) -> None:
    def written(values: Mapping[str, str]) -> Path:
        turns = record("is there a cat ?", values["before"], values["question"], values["answer"])
        turns["conversations"].insert(0, {"from": "system", "value": values["system"]})
        return write(tmp_path / "val.jsonl", [turns], with_clips=False)

    values = {"answer": "a dog", "question": "what is there ?", "before": "one", "system": "describe the video"}
    layouts.clip(tmp_path / "clips" / "a.mp4", 4)
    run_all(chat, model, written(values), tmp_path / "out")
    with pytest.raises(BenchmarkError, match=r"holds answers of another run.*data_digest was"):
        run_all(chat, model, written(values | change), tmp_path / "out")


# What is refused.

IMAGE = {"image": "a.png", "conversations": record("what ?", "a dog")["conversations"]}
IMAGE["conversations"][0]["value"] = "<image>\nwhat ?"
TEXT = {"messages": [{"role": "user", "content": "how many ?"}, {"role": "assistant", "content": "two"}]}
TWO = record("<video>what ?", "a dog", video=["a.mp4", "b.mp4"])
LATER = record("what ?", "a dog", "<video>\nand now ?", "a cat", video=["a.mp4", "b.mp4"])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (TWO, "val.jsonl, line 2: shows 2 videos and 0 images"),
        (IMAGE, "line 2: shows 0 videos and 1 images"),
        (TEXT, "line 2: shows 0 videos and 0 images"),
        (LATER, "line 2, answer 2: shows 2 videos and 0 images"),
        (record(" ", "a dog"), "line 2: asks nothing"),
        ("{", "val.jsonl, line 2: not JSON"),
        (record("what ?", " "), "val.jsonl, line 2: a turn needs"),
        (record("what ?"), "val.jsonl, line 2: no turn of the assistant"),
        ({"video": "a.mp4"}, "val.jsonl, line 2: a record needs a list `conversations`"),
    ],
)
def test_bad_records_are_left_out_and_named(bad: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "val.jsonl"
    lines = [each if isinstance(each, str) else json.dumps(each) for each in (PLAIN, bad, PLAIN)]
    path.write_text("\n".join(lines), "utf-8")
    found = [task.samples(Path()) for task in record_tasks(path)]
    assert sum(len(each.items) for each in found) == 2 + (bad is LATER)
    (line,) = [line for each in found for line in each.bad]
    assert re.search(message, line)


def test_a_file_without_a_turn_that_can_be_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "val.jsonl", [IMAGE] * 14, with_clips=False)
    with pytest.raises(BenchmarkError, match=r"none of 14 answered turns can be asked") as caught:
        record_tasks(path)
    assert str(caught.value).count("val.jsonl, line") == 10
    assert "... and 4 more" in str(caught.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "val.jsonl").write_bytes(json.dumps(PLAIN).encode() + b'\n{"video": "\xff\xfe"}\n')
    with pytest.raises(ValueError, match=r"val\.jsonl, line 2: not UTF-8"):
        record_tasks(tmp_path / "val.jsonl")


def test_names_must_differ(tmp_path: Path) -> None:
    one = write(tmp_path / "one" / "val.jsonl", RECORDS[:2], with_clips=False)
    two = write(tmp_path / "two" / "val.jsonl", RECORDS[:1], with_clips=False)
    with pytest.raises(BenchmarkError, match=r"two.val\.jsonl: its results .* 'val', as is that of .*one.*; rename"):
        read_all_records([one, two])
    three = write(tmp_path / "val_open.jsonl", RECORDS[:1], with_clips=False)
    with pytest.raises(BenchmarkError, match="would be called 'val_open', as is that of"):
        read_all_records([one, three])
    four = write(tmp_path / "clips.json", [], with_clips=False)
    four.write_text(json.dumps(RECORDS[:1]), "utf-8")
    with pytest.raises(BenchmarkError, match=r"clips\.json: .* 'clips', as is a task of hicom eval; rename the file"):
        read_all_records([four])
    for name in ("lock", "results.md"):
        with pytest.raises(BenchmarkError, match="as is a file of results"):
            read_all_records([write(tmp_path / f"{name}.jsonl", RECORDS[:1], with_clips=False)])
    assert [task.name for task in read_all_records([one, write(tmp_path / "x.jsonl", RECORDS[:1], False)])] == [
        "val",
        "val_open",
        "x",
    ]


# The command.


def test_the_command_scores_files_beside_benchmarks(hicom: Run, model: Path, file: Path, tmp_path: Path) -> None:
    layouts.mlvu(tmp_path / "mlvu")
    other = write(tmp_path / "other" / "more.jsonl", [record("what ?", "a dog", video="a.mp4")], with_clips=False)
    options = ["--out", tmp_path / "out", "--num-frames", 4, "--max-new-tokens", 3]
    both = ["--tasks", "mlvu_dev", "--data-root", tmp_path / "mlvu", "--records", file]
    code, out, err = hicom(model, *both, *options)
    assert code == 0, err
    assert "val, options  accuracy " in out
    assert "val, open questions  exact_match " in out
    assert "MLVU-dev" in out
    page = (tmp_path / "out" / "results.md").read_text("utf-8")
    assert page.count("\n## ") == 3
    code, out, err = hicom(model, "--records", other, "--root", file.parent / "clips", *options)
    assert code == 0, err
    assert out.startswith("more  exact_match ")
    with serve(lambda _: "{'pred': 'yes', 'score': 3}") as served:
        judge = ["--judge-url", served.url, "--judge-model", "j"]
        code, out, err = hicom(model, "--records", file, *options, *judge)
        assert len(served.requests) == 5
    assert code == 0, err
    assert "accuracy 100.0 [" in out.split("open questions")[1]
    assert "score 3.00 [" in out
    code, out, err = hicom("compare", tmp_path / "out", tmp_path / "out")
    assert code == 0, err
    assert "| val_open | exact_match | " in out


def test_limits_and_missing_videos(hicom: Run, model: Path, file: Path, tmp_path: Path) -> None:
    options = [model, "--records", file, "--num-frames", 4, "--max-new-tokens", 3]
    code, out, err = hicom(*options, "--out", tmp_path / "some", "--limit", 2)
    assert code == 0, err
    assert out.count("2 of 2 answered") == 2
    (file.parent / "clips" / "b.mp4").unlink()
    code, out, err = hicom(*options, "--out", tmp_path / "out")
    assert code == 2
    assert "val: 1 of 3 samples have no video" in err
    code, out, err = hicom(*options, "--out", tmp_path / "out", "--allow-missing")
    assert code == 0, err
    assert "3 of 5 answered, 2 missing" in out
    media.write_video(file.parent / "clips" / "b.mp4", 4)
    code, out, err = hicom(*options, "--out", tmp_path / "out")
    assert code == 0, err
    assert "5 of 5 answered" in out


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], "give --tasks, some of videomme"),
        (["--tasks", "mlvu_dev"], "--tasks needs --data-root"),
        (["--records", "FILE", "--tasks", "mlvu_dev"], "--tasks needs --data-root"),
        (["--records", "FILE", "--data-root", "x"], "--data-root is for --tasks; media paths of --records start"),
        (["--root", "x", "--tasks", "mlvu_dev", "--data-root", "x"], "--root is for --records"),
        (["--root", "x"], "give --tasks"),
        (["--records", "m.yaml", "--root", "x"], "a mixture says `root` for each of its own"),
        (["--records", "none.jsonl"], "there is no file none.jsonl; give a .json or .jsonl file"),
        (["--records", "none.yaml"], "there is no mixture none.yaml"),
        (["--records", "FILE", "FILE"], "rename the file"),
        (["--records", "FILE", "--shard", "2"], "--shard 2: give I/N"),
        (["--records", "FILE", "--judge-model", "j"], "--judge-url and --judge-model go together"),
    ],
)
def test_wrong_input(wrong: list[object], message: str, hicom: Run, model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "val.jsonl", RECORDS, with_clips=False)
    code, _, err = hicom(model, *(file if each == "FILE" else each for each in wrong), "--out", tmp_path / "out")
    assert code == 2
    assert err.splitlines()[-1].startswith("hicom: error: ")
    assert message in err
    assert not (tmp_path / "out").exists()


def test_help_names_the_options(hicom: Run) -> None:
    assert "--records FILE" in hicom()[1]
    code, out, _ = hicom("--help")
    assert code == 0
    for words in ("--records", "--root", "--data-root"):
        assert words in out
