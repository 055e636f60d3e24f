"""The benchmark of pointers at single words: what differs between its rows, what is compared, and a run in small."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from hicom.world.dataset import World, make_dataset
from studies import forbid_work, load, unload


@pytest.fixture(scope="module")
def study() -> Iterator[ModuleType]:
    yield load("word_pointers")
    unload()


def trained(study: ModuleType, row: str, out: Path, seed: int = 0) -> object:
    of = {"steps": study.Steps(align=1, pretrain=2, tune=3), "world": out, "cache": out, "out": out, "num_clips": 2}
    return study.Trained(row=row, seed=seed, **of)


def test_rows_differ_in_nothing_but_what_two_pointers_look_for(study: ModuleType, tmp_path: Path) -> None:
    words, whole = (list(trained(study, row, tmp_path, seed=3).stages()) for row in study.ROWS)
    assert [stage.steps for stage in words] == [1, 2, 3]
    assert {stage.seed for stage in (*words, *whole)} == {3}
    assert words[0].parts.config["num_word_pointers"] == 2
    assert whole[0].parts.config == {**words[0].parts.config, "num_word_pointers": 0}
    for ours, theirs in zip(words, whole, strict=True):
        same = {"out": theirs.out, "init": theirs.init, "parts": theirs.parts}
        assert dataclasses.replace(ours, **same) == theirs
    assert [stage.init for stage in words] == [None, f"{words[0].out}/model", f"{words[1].out}/model"]


def test_the_report_compares_pairs(study: ModuleType, tmp_path: Path) -> None:
    """One question a clip and family: `before` right in 4 of 4 and 1 of 4, `colour` in 2 of 4 both times."""

    def answers(before: int) -> dict[str, object]:
        questions = [[clip, 0, int(clip < before), 0] for clip in range(4)]
        questions += [[clip, 1, int(clip % 2), 1] for clip in range(4)]
        facts = {"clips": ["a", "b", "c", "d"], "families": ["before", "colour"], "questions": questions}
        made = {"date": "2026-01-02", "commit": "0" * 40, "hardware": {"machine": "m", "threads": 1}}
        return {"steps": dataclasses.asdict(study.Steps()), "num_clips": 4, "visual_tokens": 16, **made, **facts}

    study.report({0: (answers(4), answers(1))}, tmp_path)
    found = json.loads((tmp_path / "word-pointers.json").read_text("utf-8"))["families"]
    assert (found["before"]["words"], found["before"]["whole"]) == (1.0, 0.25)
    assert found["before"]["difference"]["mean"] == 0.75
    assert found["colour"]["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert found["mean"]["words"] == 0.75
    report = (tmp_path / "word-pointers.md").read_text("utf-8")
    assert "| before | 4 | 100.0 | 25.0 | +75.0 |" in report
    assert "250 x 16, 200 x 64, 2000 x 64" in report


def test_no_world_is_one_line(study: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main(["--world", str(tmp_path / "none")]) == 2
    assert "is no world: `hicom world make" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_in_small(study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both rows are trained, answered and compared; run again, nothing is done twice."""
    make_dataset(tmp_path / "world", {"train": 16, "test": 4}, World())
    command = ["--align-steps", "1", "--pretrain-steps", "1", "--tune-steps", "1", "--num-clips", "4"]
    command += [f"--{name}={tmp_path / name}" for name in ("world", "cache", "out", "results")]
    assert study.main([*command, "--rows", "words"]) == 0
    assert not (tmp_path / "results").exists(), "one row alone is no comparison"
    assert study.main([*command, "--rows", "whole"]) == 0
    report = (tmp_path / "results" / "word-pointers.md").read_text("utf-8")
    assert "16 visual tokens" in report
    forbid_work(study, monkeypatch)
    assert study.main(command) == 0
    assert (tmp_path / "results" / "word-pointers.md").read_text("utf-8") == report
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.setattr(study, "find_model", lambda name: tmp_path)
    with pytest.raises(AssertionError, match="done before"):
        study.main(command)
