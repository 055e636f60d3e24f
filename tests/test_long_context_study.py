"""The benchmark of more frames than in training: what is seen, what is compared, and a run in small."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hicom.data.features import FeatureStore
from hicom.model.ops import sinusoidal_table
from studies import load, unload


@pytest.fixture(scope="module")
def study() -> Iterator[ModuleType]:
    yield load("long_context")
    unload()


def test_frames_are_the_librarys_choice(study: ModuleType) -> None:
    """Evenly: middles of segments, as in the paper. By rate: from the first frame on."""
    frames = {n: study.Test(clips="long", num_frames=n).frames for n in study.FRAMES}
    assert [len(each) for each in frames.values()] == list(study.FRAMES)
    assert frames[128] == list(range(128))
    assert frames[8] == [8, 24, 40, 56, 71, 87, 103, 119]
    assert study.Test(clips="long", fps=2.0).frames == list(range(0, 128, 4))
    assert study.Test(clips="longer", fps=0.5).frames == list(range(0, 128, 4))
    assert study.Test(clips="longer", fps=2.0).frames == list(range(128))


def test_every_test_has_its_name_and_a_base(study: ModuleType) -> None:
    for model in study.MODELS:
        tests = list(study.tests_of(model))
        assert len({(test.clips, test.label) for test in tests}) == len(tests)
        for clips in study.WORLDS:
            assert study.Test(clips=clips, num_frames=study.TRAINED) in tests, "the base of all differences"
    assert study.WORLDS["long"].num_frames * 8 == study.WORLDS["longer"].num_frames * 8 == study.NUM_FRAMES
    assert study.TRAIN_WORLD.duration_s == 8 * study.WORLDS["long"].duration_s


def test_chosen_frames_of_a_store(study: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "key.json").write_text(json.dumps({"values": [1, 1, 2], "keys": [1, 1, 2]}))
    for name in ("values", "keys"):
        (tmp_path / f"{name}.bin").touch()
    store = FeatureStore(tmp_path)
    videos = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    x = torch.arange(32, dtype=torch.float16).view(2, 8, 1, 1, 2).numpy()
    for video, features in zip(videos, x, strict=True):
        video.write_bytes(b"")
        store.append(video, {"values": features, "keys": features + 1})
    chosen = study.ChosenFrames(store, [1, 6])
    assert chosen.counts(videos) == [2, 2]
    assert chosen.read(videos, "values")[:, 0, 0, 0].tolist() == [2, 12, 18, 28]
    assert chosen.read(videos[1:], "keys")[:, 0, 0, 0].tolist() == [19, 29]


def test_scaled_positions_stay_in_the_trained_range(study: ModuleType) -> None:
    scaled = study.scaled_table(32, 128, 128, 16)
    table = sinusoidal_table(33, 16)
    torch.testing.assert_close(scaled[::4], table[:32])
    assert torch.equal(study.scaled_table(32, 128, 8, 16), sinusoidal_table(8, 16)), "rows and columns stay"
    assert torch.equal(study.scaled_table(32, 16, 16, 16), sinusoidal_table(16, 16)), "shorter clips stay"


def test_positions_are_scaled_inside_and_only_there(study: ModuleType) -> None:
    test = study.Test(clips="long", num_frames=128, positions="scaled")
    compressor = sys.modules["hicom.model.compressor"]
    with study.positions_of(test):
        table = compressor.sinusoidal_table(128, 16, 0)
    assert torch.equal(table, study.scaled_table(32, 128, 128, 16))
    assert compressor.sinusoidal_table is sinusoidal_table


def test_other_weights_are_trained_elsewhere(study: ModuleType, tmp_path: Path) -> None:
    starts = [tmp_path / name for name in ("first", "same", "other")]
    for start in starts:
        start.mkdir()
        (start / "model.safetensors").write_bytes(b"0" if start.name != "other" else b"1")
    folders = [study.Study(tmp_path, study.PROTOCOLS["smoke"], start).training(study.MODELS[0]).out for start in starts]
    assert folders[0] == folders[1] != folders[2]


@pytest.mark.slow
def test_a_run_in_small(study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips, training, answers and report; run again, nothing is done twice."""
    command = ["--protocol", "smoke", "--out", str(tmp_path / "out"), "--threads", "1"]
    assert study.main(command) == 0
    results = tmp_path / "out" / "results"
    facts = json.loads((results / "long-context.json").read_text("utf-8"))
    measured = {(line["model"], line["clips"], line["test"]): line for line in facts["lines"]}
    assert len(measured) == sum(len(list(study.tests_of(model))) for model in study.MODELS)
    assert measured["tiny", "long", "128 frames"]["visual_tokens"] == 128 // 4 * 4 + 8
    assert measured["tuned-32", "longer", "128 frames, at most 40 tokens"]["visual_tokens"] <= study.BUDGET
    assert measured["tiny", "long", "32 frames"]["mean"]["minus_32_frames"]["mean"] == 0
    report = (results / "long-context.md").read_text("utf-8")
    assert "| 64 frames | 72 |" in report
    assert (results / "long-context-longer.svg").read_text("utf-8").startswith("<?xml")

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("this was answered before")

    monkeypatch.setattr(study, "answer", refuse)
    assert study.main(command) == 0
    assert (results / "long-context.md").read_text("utf-8") == report
