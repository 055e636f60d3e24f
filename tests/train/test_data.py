"""The data of all stages is looked at before the first one starts."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest

from hicom.recipes import RECIPES
from hicom.train import Chain, DataConfig, TrainConfig, run
from hicom.train.data import FIRST, check_data
from toy_training import ask, make_config, make_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path)


def with_data(folder: Path, **data: Any) -> TrainConfig:
    config = make_config(folder, steps=1)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, cache=None, **data))


def record(video: str = "0.mp4", **fields: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": ask(0)}, {"from": "gpt", "value": "yes"}]
    return {"video": video, "conversations": turns, **fields}


FAULTS = {
    "a missing mixture": ({}, "there is no mixture .*bad.yaml"),
    "a mixture that is no YAML": ({"bad.yaml": "datasets: ["}, "bad.yaml is not YAML"),
    "an unknown field": ({"bad.yaml": "datasets: [{path: bad.json, rot: x}]"}, "entry 1: unknown field 'rot'"),
    "a file that a mixture names": ({"bad.yaml": "datasets: [{path: gone.json}]"}, "there is no file .*gone.json"),
    "a wrong folder of media": ({"bad.yaml": "datasets: [{path: bad.json, root: wrong}]"}, "there is no file .*wrong"),
    "placeholders": (
        {
            "bad.json": [
                record(conversations=[{"from": "human", "value": "<video> <video> ?"}, {"from": "gpt", "value": "yes"}])
            ]
        },
        "2 <video> placeholders",
    ),
    "a malformed record": ({"bad.json": [record(), {"video": "0.mp4"}]}, "bad.json, line 1: a record needs a list"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_chain_looks_at_all_its_data_before_its_first_stage(folder: Path, fault: str) -> None:
    files, message = FAULTS[fault]
    (folder / "bad.json").write_text(json.dumps(files.get("bad.json", [record()])))
    if fault != "a missing mixture":
        (folder / "bad.yaml").write_text(files.get("bad.yaml", "datasets: [{path: bad.json}]"))
    prepared: list[int] = []

    class Prepared(Chain):
        def prepare(self) -> None:
            prepared.append(1)

    first = make_config(folder, name="first", steps=1)
    second = dataclasses.replace(with_data(folder, records=(str(folder / "bad.yaml"),)), name="second")
    with pytest.raises(ValueError, match=f"^stage second: .*{message}"):
        run(Prepared(out=str(folder / "chain"), stages=(first, second)))
    assert not prepared, "before a model is put together, too"
    assert not (folder / "chain" / "first").exists()


def test_a_published_chain_says_first_what_data_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights are loaded before: none can be here."""
    monkeypatch.chdir(tmp_path)
    chain = RECIPES["7b"]()
    with pytest.raises(ValueError, match=r"stage align: there is no mixture data/hicom/align\.yaml"):
        run(chain)
    assert not list((tmp_path / "runs").rglob("*.safetensors"))


def test_a_chain_that_makes_its_data_looks_at_it_then(folder: Path) -> None:
    class Making(Chain):
        makes_data = True

        def prepare(self) -> None:
            (folder / "made.json").write_text(json.dumps([record("gone.mp4")]))

    with pytest.raises(
        ValueError, match=r"stage toy: .*made\.json, line 1: there is no file .*gone\.mp4; 1 of 1 media"
    ):
        run(Making(out=str(folder / "chain"), stages=(with_data(folder, records=(str(folder / "made.json"),)),)))


def test_a_stage_that_is_finished_needs_its_data_no_more(folder: Path) -> None:
    """A chain goes on after the images of its first stage have made room for the videos of the next one."""
    (folder / "first.json").write_text(json.dumps([record()] * 4))
    first = dataclasses.replace(with_data(folder, records=(str(folder / "first.json"),)), name="first")
    second = dataclasses.replace(with_data(folder), name="second", parts=None, init="set by the chain")
    run(Chain(out=str(folder / "chain"), stages=(first,)))
    (folder / "first.json").unlink()
    assert run(Chain(out=str(folder / "chain"), stages=(first, second))) == folder / "chain" / "second" / "model"


def test_what_is_to_be_left_out_is_no_fault(folder: Path) -> None:
    records = [record(), {"video": "0.mp4"}, record("gone.mp4")]
    (folder / "some.json").write_text(json.dumps(records, indent=1))
    files = (str(folder / "some.json"),)
    bad_line = (
        1 + json.dumps(records, indent=1)[: json.dumps(records, indent=1).index('"video": "0.mp4"\n')].count("\n") - 1
    )
    check_data(with_data(folder, records=files, on_bad_record="skip", on_bad_video="skip"))
    with pytest.raises(ValueError, match="a record needs a list"):
        check_data(with_data(folder, records=files, on_bad_video="skip"))
    with pytest.raises(ValueError, match="1 of 2 media"):
        check_data(with_data(folder, records=files, on_bad_record="skip"))
    skip = [{"media": "gone.mp4"}, {"file": "some.json", "line": bad_line}]
    (folder / "skip.jsonl").write_text("\n".join(map(json.dumps, skip)))
    check_data(with_data(folder, records=files, skip_list=str(folder / "skip.jsonl")))
    with pytest.raises(ValueError, match="there is no skip list"):
        check_data(with_data(folder, skip_list="none.jsonl"))
    # None of the media is there: that is a wrong folder, and not a bad video.
    (folder / "some.json").write_text(json.dumps([record("gone.mp4")]))
    with pytest.raises(ValueError, match="1 of 1 media"):
        check_data(with_data(folder, records=files, on_bad_video="skip"))


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_a_large_file_is_not_read_through(folder: Path, suffix: str) -> None:
    lines = [json.dumps(record())] * 40000
    good, end = lines[:FIRST], [*lines[FIRST:], "{"]
    text = "[" + ",".join([*good, *end]) if suffix == "json" else "\n".join([*good, *end])
    path = folder / f"large.{suffix}"
    path.write_text(text)
    start = time.perf_counter()
    check_data(with_data(folder, records=(str(path),)))
    assert time.perf_counter() - start < 0.5, "parsing all of it takes seconds; its end is not even JSON"


def test_rows_of_a_dataset_are_looked_at(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([record("gone.mp4")] * 20).save_to_disk(str(folder / "rows"))
    (folder / "rows.yaml").write_text("datasets: [{dataset: rows}]")
    with pytest.raises(ValueError, match=r"rows, row 0: there is no file .*gone\.mp4"):
        check_data(
            TrainConfig(**{**vars(make_config(folder)), "data": DataConfig(records=(str(folder / "rows.yaml"),))})
        )
