"""`hicom eval`: runs, pages, comparisons, and one clear line for wrong input."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import layouts
from endpoints import serve

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def options(tmp_path: Path) -> list[object]:
    layouts.mlvu(tmp_path / "data")
    layouts.activitynet_qa(tmp_path / "data")
    return ["--data-root", tmp_path / "data", "--out", tmp_path / "out", "--num-frames", 4, "--max-new-tokens", 3]


def test_runs_print_scores_and_write_a_page(hicom: Run, model: Path, options: list[object], tmp_path: Path) -> None:
    code, out, err = hicom(model, "--tasks", "mlvu_dev", "activitynetqa", *options)
    assert code == 0, err
    assert "MLVU-dev  accuracy 0.0 [0.0, 23.2]; by chance 25.0" in out
    assert "14 of 14 answered" in out
    assert "3 of 3 answered, 0 of 3 judged" in out
    page = (tmp_path / "out" / "results.md").read_text("utf-8")
    assert "| HICom-7B | 32 | 680 | 62.8 |" in page
    with serve(lambda _: "{'pred': 'yes', 'score': 3}") as served:
        judge = ["--judge-url", served.url, "--judge-model", "j"]
        code, out, err = hicom(model, "--tasks", "activitynetqa", *options, *judge)
    assert code == 0, err
    assert "accuracy 100.0 [15.8, 100.0]; score 3.00 [" in out
    assert "Judge: `j` at http://127.0.0.1" in (tmp_path / "out" / "results.md").read_text("utf-8")


def test_shards_and_comparisons(hicom: Run, model: Path, options: list[object], tmp_path: Path) -> None:
    for shard in ("1/2", "0/2"):
        code, out, err = hicom(model, "--tasks", "mlvu_dev", *options, "--batch-size", 3, "--shard", shard)
        assert code == 0, err
    assert "14 of 14 answered" in out
    options[3] = tmp_path / "other"
    assert hicom(model, "--tasks", "mlvu_dev", *options, "--window", 1, 1, 1)[0] == 0
    code, out, err = hicom("compare", tmp_path / "out", tmp_path / "other")
    assert code == 0, err
    assert out.startswith("| task | score | first | second | difference |")
    code, out, err = hicom("compare", tmp_path / "out", tmp_path / "other", "--json")
    assert json.loads(out)[0]["difference"]["n"] == 14


def test_failed_samples_are_told_after_the_results(
    hicom: Run, model: Path, options: list[object], tmp_path: Path
) -> None:
    (tmp_path / "data" / "MLVU" / "video" / "4_count" / "count_1.mp4").write_bytes(b"x")
    code, out, err = hicom(model, "--tasks", "mlvu_dev", *options)
    assert code == 2
    assert "13 of 14 answered, 1 failed" in out
    assert "hicom: error: mlvu_dev: 1 samples failed (" in err.splitlines()[-1]
    assert "count_1.mp4" in err.splitlines()[-1]


def test_help_and_tasks(hicom: Run) -> None:
    code, out, _ = hicom()
    assert code == 0
    assert "compare" in out
    code, out, _ = hicom("tasks")
    assert code == 0
    assert "longvideobench_val" in out
    code, out, _ = hicom("--help")
    assert code == 0
    assert "MODEL" in out
    assert "--judge-url" in out


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--tasks", "mvbenhc"], "unknown task 'mvbenhc'; did you mean 'mvbench'?"),
        (["--tasks", "egoschema"], "questions.json: no such file; --data-root is the folder that holds"),
        (["--tasks", "mlvu_dev", "--shard", "2/2"], "--shard 2/2: give I/N with I from 0 to N - 1"),
        (["--tasks", "mlvu_dev", "--batch-size", 0], "batch_size=0: give a positive number"),
        (["--tasks", "mlvu_dev", "--judge-url", "http://a"], "--judge-url and --judge-model go together"),
        (["--tasks", "mlvu_dev", "--devices", "cpu", "--shard", "0/2"], "--devices makes a shard of each device"),
        (["--tasks", "mlvu_dev", "--window", 1, 1, 1, "--max-visual-tokens", 9], "both choose the window"),
    ],
)
def test_wrong_input(wrong: list[object], message: str, hicom: Run, model: Path, options: list[object]) -> None:
    code, _, err = hicom(model, *wrong, *options)
    assert code == 2
    assert err.splitlines()[-1].startswith("hicom: error: ")
    assert message in err


def test_bad_records_are_counted(hicom: Run, model: Path, options: list[object], tmp_path: Path) -> None:
    path = tmp_path / "data" / "MLVU" / "json" / "4_count.json"
    rows = json.loads(path.read_text("utf-8"))
    layouts.write_json(path, [rows[0] | {"answer": "7"}, *rows[1:]])
    code, out, err = hicom(model, "--tasks", "mlvu_dev", *options)
    assert code == 0, err
    assert "hicom: warning: mlvu_dev: 1 records are bad and left out:" in err
    assert "4_count.json: record 1: the answer '7' is 0 of the options" in err
    assert "13 of 13 answered" in out
    assert "1 bad records" in out
    facts = json.loads((tmp_path / "out" / "mlvu_dev" / "results.json").read_text("utf-8"))
    assert facts["bad_records"] == 1
    assert "record 1" in facts["bad_record_examples"][0]
    assert "1 bad records" in (tmp_path / "out" / "results.md").read_text("utf-8")


def test_missing_videos(hicom: Run, model: Path, options: list[object], tmp_path: Path) -> None:
    (tmp_path / "data" / "MLVU" / "video" / "4_count" / "count_1.mp4").unlink()
    code, _, err = hicom(model, "--tasks", "mlvu_dev", *options)
    assert code == 2
    assert "mlvu_dev: 1 of 14 samples have no video" in err
    code, out, err = hicom(model, "--tasks", "mlvu_dev", *options, "--allow-missing")
    assert code == 0, err
    assert "13 of 14 answered, 1 missing" in out
