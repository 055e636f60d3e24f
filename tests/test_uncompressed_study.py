"""The benchmark of what compression costs: what differs between its rows, what is compared, and a run in small."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hicom.world.dataset import World, make_dataset
from studies import forbid_work, load, unload


@pytest.fixture(scope="module")
def study() -> Iterator[ModuleType]:
    yield load("uncompressed")
    unload()


def in_folder(study: ModuleType, out: Path, **fields: Any) -> Any:
    return study.Study(**{"world": out, "cache": out, "out": out, "steps": 3, "num_clips": 4} | fields)


def answers(study: ModuleType, name: str, right: int) -> dict[str, Any]:
    """One question a clip and family: `colour` right in so many of four clips, `count` in all."""
    questions = [[clip, 0, int(clip < right), 1] for clip in range(4)]
    questions += [[clip, 1, 1, 1] for clip in range(4)]
    facts = {"clips": ["a", "b", "c", "d"], "families": ["colour", "count"], "questions": questions}
    made = {"date": "2026-01-02", "commit": "0" * 40, "hardware": {"machine": "m", "threads": 1}}
    how = {"window": [1, 1, 1], "visual_tokens": 9, "steps": 3 if name in study.ROWS else 0, "num_clips": 4}
    return {**how, **made, **facts}


def test_rows_differ_in_their_window_alone(study: ModuleType, tmp_path: Path) -> None:
    ours, theirs = (in_folder(study, tmp_path).training(row) for row in study.ROWS)
    assert (ours.init, ours.steps, ours.stage.windows) == ("hicom-tiny", 3, ((4, 4, 4),))
    assert theirs.stage.windows == ((1, 1, 1),)
    assert dataclasses.replace(ours, name=theirs.name, out=theirs.out, stage=theirs.stage) == theirs
    assert dataclasses.replace(ours.stage, windows=theirs.stage.windows) == theirs.stage


def test_shares_are_of_the_best_without_compression(study: ModuleType, tmp_path: Path) -> None:
    """Means: 7/8 with compression; 5/8 without it as embedded and 1 trained further, which is the one that counts."""
    names = [*map(study.embedded, study.EMBEDDED), *study.ROWS]
    right = {"compressed": 3, "uncompressed": 4, "embedded-1-1-1": 1}
    study.report({name: answers(study, name, right.get(name, 3)) for name in names}, 64, tmp_path)
    found = json.loads((tmp_path / "uncompressed.json").read_text("utf-8"))
    assert found["rows"]["compressed"]["share"]["mean"] == 0.875
    assert found["rows"]["embedded-1-1-1"]["share"]["mean"] == 0.625
    assert found["families"]["colour"]["change"]["mean"] == -0.25
    assert found["families"]["count"]["change"]["low"] == 0
    report = (tmp_path / "uncompressed.md").read_text("utf-8")
    assert "| trained further for 3 steps, window (1,1,1) | 9 | 100.0 | 100.0 to 100.0 |  |" in report
    assert "| colour | 4 | 75.0 | 100.0 | -25.0 |" in report


def test_answers_of_other_steps_or_clips_are_refused(study: ModuleType, tmp_path: Path) -> None:
    here = in_folder(study, tmp_path)
    here.path("compressed").parent.mkdir()
    here.path("compressed").write_text(json.dumps(answers(study, "compressed", 1)), "utf-8")
    assert here.answers("compressed") is not None
    assert here.answers("uncompressed") is None
    with pytest.raises(ValueError, match="steps=3, not 5; choose another --out"):
        in_folder(study, tmp_path, steps=5).answers("compressed")
    with pytest.raises(ValueError, match="num_clips=4, not 8; choose another --out"):
        in_folder(study, tmp_path, num_clips=8).answers("compressed")


def test_what_cannot_work_is_refused_before_anything_is_trained(study: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no world: `hicom world make"):
        study.main(["--world", str(tmp_path / "none")])
    (tmp_path / "world.json").write_text("{}", "utf-8")
    with pytest.raises(ValueError, match="num_clips=0 must be at least 1"):
        study.main(["--world", str(tmp_path), "--num-clips", "0"])


@pytest.mark.slow
def test_a_run_in_small(study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both rows are trained, answered and compared; run again, nothing is done twice."""
    make_dataset(tmp_path / "world", {"train": 16, "test": 2}, World())
    command = ["--steps", "1", "--num-clips", "2"]
    command += [f"--{name}={tmp_path / name}" for name in ("world", "cache", "out", "results")]
    assert study.main([*command, "--rows", "compressed"]) == 0
    assert not (tmp_path / "results").exists(), "one row alone is no comparison"
    assert study.main(command) == 0
    report = (tmp_path / "results" / "uncompressed.md").read_text("utf-8")
    assert "| trained further for 1 steps, window (1,1,1) | 520 |" in report
    forbid_work(study, monkeypatch)
    assert study.main(command) == 0
    assert (tmp_path / "results" / "uncompressed.md").read_text("utf-8") == report
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.setattr(study, "find_model", lambda name: tmp_path)
    with pytest.raises(AssertionError, match="done before"):
        study.main(command)
