"""What a run leaves out: videos that cannot be read, lists that come before it or later, samples that are too long."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hicom.cli import main
from hicom.data.collate import Collator
from hicom.data.mixture import read_skip_list
from hicom.train import DataConfig, StageConfig, TrainConfig, run
from hicom.train.data import make_data
from hicom.train.run import load
from hicom.train.stages import resolve
from scale_training import losses, make_mixed_folder, mixed_config, train_in_two
from toy_training import ALL, make_config, make_folder

KEPT = {"steps": 8, "batch_size": 2, "save_every": 3}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path)


def from_pixels(folder: Path, out: str, **changes: Any) -> TrainConfig:
    """Return a run without kept features; changes of its data have `data_` before them."""
    data = {name.removeprefix("data_"): value for name, value in changes.items() if name.startswith("data_")}
    others = {name: value for name, value in changes.items() if not name.startswith("data_")}
    config = make_config(folder, **{**KEPT, "out": str(folder / out), **others})
    return dataclasses.replace(config, data=dataclasses.replace(config.data, cache=None, **data))


def stamp_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "run.json").read_text())


class Seen:
    """The numbers of the samples of every batch that is made, and those that are left of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[list[int]] = []
        self.left: list[list[int]] = []
        make = Collator.__call__

        def watched(collator: Collator, items: Sequence[tuple[int, Any]]) -> dict[str, Any]:
            batch = make(collator, items)
            self.batches.append([number for number, _ in items])
            self.left.append([entry["sample"] for entry in batch["report"]["samples"]])
            return batch

        monkeypatch.setattr(Collator, "__call__", watched)

    def take(self) -> tuple[list[list[int]], list[list[int]]]:
        """Return what was seen so far, and forget it."""
        found = self.batches, self.left
        self.batches, self.left = [], []
        return found


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_video_stops_a_run_by_name_or_leaves_its_batch_smaller(
    folder: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    (folder / "5.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"5\.mp4.*records\.jsonl, line 6.*on_bad_video='skip'") as error:
        run(from_pixels(folder, "stop", workers=workers))
    assert "Traceback" not in str(error.value), "errors of workers come as those of the run"
    with caplog.at_level("WARNING"):
        run(from_pixels(folder, "skip", workers=workers, data_on_bad_video="skip"))
    stamp = stamp_of(folder / "skip")
    # Two epochs of four steps: the sample comes twice, and is told once.
    assert (stamp["samples"], stamp["steps"], stamp["left_out"], stamp["cut"]) == (8, 8, 2, 0)
    (entry,) = map(json.loads, (folder / "skip" / "bad_videos.jsonl").read_text().splitlines())
    assert entry["media"] == str(folder / "5.mp4")
    assert entry["sample"] == 5
    assert entry["source"].endswith("records.jsonl, line 6")
    assert caplog.text.count("5.mp4") == 1
    assert len(losses(folder / "skip")) == 8
    # What a run found is what another one may leave out from its start.
    assert read_skip_list(folder / "skip" / "bad_videos.jsonl").media == {folder / "5.mp4"}


def test_no_other_sample_takes_the_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(monkeypatch)
    run(from_pixels(folder, "whole"))
    whole, _ = seen.take()
    (folder / "5.mp4").write_bytes(b"no video")
    run(from_pixels(folder, "skip", data_on_bad_video="skip"))
    batches, left = seen.take()
    assert batches == whole
    assert left == [[number for number in batch if number != 5] for batch in whole]


def test_a_smaller_batch_is_a_run_without_that_sample(folder: Path) -> None:
    """Its loss is the mean over the tokens that are left, by hand."""
    config = from_pixels(folder, "run")
    model, processor = load(config)
    samples, collator = make_data(config, model, processor)
    reporting = dataclasses.replace(collator, has_report=True)
    whole = {name: value for name, value in collator([samples[0], samples[2]]).items()}
    (folder / "1.mp4").write_bytes(b"no video")
    batch = reporting([samples[0], samples[1], samples[2]])
    report = batch.pop("report")
    assert [entry["sample"] for entry in report["left_out"]] == [1]
    assert batch.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(batch[name], value) if isinstance(value, torch.Tensor) else batch[name] == value
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).loss, model(**whole).loss)


def test_a_smaller_batch_keeps_its_window(folder: Path) -> None:
    """It is drawn for all samples of the batch, so that the others learn what they would have learnt."""
    windows = ((1, 2, 2), (2, 2, 2), (4, 4, 4))
    config = from_pixels(folder, "run")
    samples, collator = make_data(
        dataclasses.replace(config, stage=StageConfig(trainable=ALL, windows=windows)), *load(config)
    )
    less = dataclasses.replace(collator, skipped=frozenset({1}))
    drawn = [(collator([samples[1], samples[i]]), less([samples[1], samples[i]])) for i in (0, 2, 3, 4, 5)]
    assert len({whole["window"] for whole, _ in drawn}) > 1
    for whole, smaller in drawn:
        assert len(smaller["labels"]) == 1 < len(whole["labels"])
        assert smaller["window"] == whole["window"]


def test_a_batch_of_nothing_makes_the_same_calls_and_changes_no_weight(folder: Path) -> None:
    config = from_pixels(folder, "run")
    model, processor = load(config)
    resolve(model, config.rates)
    samples, collator = make_data(config, model, processor)
    (folder / "1.mp4").write_bytes(b"no video")
    batch = dataclasses.replace(collator, has_report=True)([samples[1]])
    del batch["report"]
    loss = model(**batch, num_items_in_batch=torch.tensor(7)).loss
    assert float(loss.detach()) == 0
    loss.backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    for name, parameter in trained.items():
        assert parameter.grad is not None, f"{name}: a process that misses it keeps the others waiting"
        assert not bool(parameter.grad.any()), name


def test_a_step_of_nothing_is_no_error(folder: Path) -> None:
    """Both samples of the only batch are bad: a loss of zero over zero tokens."""
    lines = (folder / "records.jsonl").read_text().splitlines()[:2]
    (folder / "records.jsonl").write_text("\n".join(lines))
    for number in range(2):
        (folder / f"{number}.mp4").write_bytes(b"no video")
    run(from_pixels(folder, "run", steps=2, data_on_bad_video="skip"))
    assert losses(folder / "run") == [0, 0]
    assert stamp_of(folder / "run")["left_out"] == 4


def test_bad_images_are_left_out_too(folder: Path) -> None:
    Image.new("RGB", (32, 32)).save(folder / "good.png")
    (folder / "bad.png").write_bytes(b"no image")
    turns = [{"from": "human", "value": "<image>\nis there a cat ?"}, {"from": "gpt", "value": "yes"}]
    records = [{"image": name, "conversations": turns} for name in ("good.png", "bad.png")]
    (folder / "images.json").write_text(json.dumps(records))
    files = (str(folder / "images.json"),)
    with pytest.raises(ValueError, match=r"bad\.png"):
        run(from_pixels(folder, "stop", steps=1, data_records=files))
    run(from_pixels(folder, "skip", steps=1, data_records=files, data_on_bad_video="skip"))
    assert stamp_of(folder / "skip")["left_out"] == 1


def test_the_command_line_says_what_is_bad_in_one_line(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = load(make_config(folder))
    model.save_pretrained(folder / "start")
    processor.save_pretrained(folder / "start")
    (folder / "5.mp4").write_bytes(b"no video")
    monkeypatch.chdir(folder)
    options = "--init start --data.records records.jsonl --out run --steps 8 --batch-size 2 --global-batch-size None"
    assert main(["train", "finetune", *options.split(), "--workers", "1"]) == 2
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("hicom: error")]
    assert len(error) == 1
    assert "5.mp4" in error[0]
    assert main(["train", "finetune", *options.split(), "--workers", "1", "--data.on-bad-video", "skip"]) == 0


# Lists that come later.


def test_a_run_goes_on_without_what_a_later_list_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It meets a bad video in its second epoch: the order stays, the sample is missing, and that is written down."""
    seen = Seen(monkeypatch)
    run(from_pixels(folder, "whole"))
    whole, _ = seen.take()
    broken, good = folder / "5.mp4", (folder / "5.mp4").read_bytes()
    at = [number for number, batch in enumerate(whole) if 5 in batch][1]
    assert at >= 4, "a video that breaks in the second epoch"

    def break_it(collator: Collator, items: Sequence[tuple[int, Any]], make: Any = Collator.__call__) -> dict[str, Any]:
        if len(seen.batches) == 4:
            broken.write_bytes(b"no video")
        return make(collator, items)

    with monkeypatch.context() as patch:
        patch.setattr(Collator, "__call__", break_it)
        with pytest.raises(ValueError, match=r"5\.mp4.*data\.skip_list"):
            run(from_pixels(folder, "run"))
    seen.take()
    with pytest.raises(ValueError, match=r"\(data\.num_frames differ\)"):
        run(from_pixels(folder, "run", data_num_frames=3))
    skip = folder / "skip.jsonl"
    skip.write_text(json.dumps({"media": "5.mp4"}))
    run(from_pixels(folder, "run", data_skip_list=str(skip)))
    batches, left = seen.take()
    assert batches == whole[3:]
    assert left == [[number for number in batch if number != 5] for batch in whole[3:]]
    stamp = stamp_of(folder / "run")
    assert stamp["changes"] == [{"step": 3, "data.skip_list": [None, str(skip)]}]
    assert stamp["configuration"]["data"]["skip_list"] == str(skip)
    assert stamp["skip_lists"] == [{"step": 3, "list": str(skip), "copy": "skip_lists/1.jsonl"}]
    assert read_skip_list(folder / "run" / "skip_lists" / "1.jsonl") == read_skip_list(skip)
    assert (stamp["samples"], stamp["left_out"]) == (8, 1)
    # The other way to the same weights: the video is bad from the start of these steps, and skipped as it comes.
    broken.write_bytes(good)
    other = from_pixels(folder, "other", data_on_bad_video="skip")
    with monkeypatch.context() as patch:
        patch.setattr(Collator, "__call__", break_it)
        seen.take()
        run(other)
    ours, others = (load_file(folder / name / "model" / "model.safetensors") for name in ("run", "other"))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, others[name], rtol=1e-4, atol=2e-5)


def interrupted(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """Stop a run as it makes a batch."""
    made: list[int] = []

    def stop(collator: Collator, items: Any, make: Any = Collator.__call__) -> dict[str, Any]:
        made.append(1)
        if len(made) == batch:
            raise KeyboardInterrupt
        return make(collator, items)

    with monkeypatch.context() as patch:
        patch.setattr(Collator, "__call__", stop)
        with pytest.raises(KeyboardInterrupt):
            run(config)


def test_lists_of_a_run_add_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One at its start, which also orders it; then its file grows; then another file; what was given stays in force."""
    first, second = folder / "first.jsonl", folder / "second.jsonl"
    first.write_text(json.dumps({"media": "0.mp4"}))
    config = from_pixels(folder, "run", data_skip_list=str(first), steps=9)
    seen = Seen(monkeypatch)
    run(dataclasses.replace(config, out=str(folder / "whole")))
    whole, _ = seen.take()
    assert stamp_of(folder / "whole")["samples"] == 7
    interrupted(config, monkeypatch, 5)
    # Sample 2 of those that are left is record 4, which shows 3.mp4.
    first.write_text("\n".join(json.dumps({"media": f"{number}.mp4"}) for number in (0, 3)))
    seen.take()
    interrupted(config, monkeypatch, 5)
    second.write_text(json.dumps({"file": "records.jsonl", "line": 8}))
    seen.take()
    run(dataclasses.replace(config, data=dataclasses.replace(config.data, skip_list=str(second))))
    batches, left = seen.take()
    assert batches == whole[6:]
    assert left == [[number for number in batch if number not in (2, 6)] for batch in whole[6:]]
    stamp = stamp_of(folder / "run")
    assert [entry["step"] for entry in stamp["skip_lists"]] == [0, 3, 6]
    assert [change["step"] for change in stamp["changes"]] == [6], "the name of the file changed once"


def test_what_a_run_that_goes_on_may_not_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip = folder / "skip.jsonl"
    skip.write_text(json.dumps({"media": "0.mp4"}))
    config = from_pixels(folder, "run", data_skip_list=str(skip))
    interrupted(config, monkeypatch, 6)
    with pytest.raises(ValueError, match=r"\(data\.skip_list differ\); it has data\.skip_list=.*skip\.jsonl"):
        run(from_pixels(folder, "run"))
    lines = (folder / "records.jsonl").read_text().splitlines()
    (folder / "records.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(ValueError, match="started with 7 samples and cannot go on exactly with 6: its records"):
        run(config)
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    run(config)
    with pytest.raises(ValueError, match=r"data\.on_bad_video differ"):
        run(from_pixels(folder, "run", data_skip_list=str(skip), data_on_bad_video="skip"))  # it is finished


def test_a_list_in_force_leaves_no_bad_video_to_read_for_kept_features(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(make_config(folder, **KEPT), out=str(folder / "run"))
    interrupted(config, monkeypatch, 6)
    (folder / "5.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"5\.mp4"):
        run(config)
    (folder / "skip.jsonl").write_text(json.dumps({"media": "5.mp4"}))
    run(dataclasses.replace(config, data=dataclasses.replace(config.data, skip_list=str(folder / "skip.jsonl"))))
    assert stamp_of(folder / "run")["left_out"] == 1


# Long samples.


def test_long_samples_are_cut_as_the_release_cuts_them(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Tokens of text and one for the video; what is over goes from the end, where the answer is."""
    config = from_pixels(folder, "run")
    model, processor = load(config)
    samples, collator = make_data(config, model, processor)
    whole = collator([samples[0]])
    row = whole["input_ids"][0]
    number = int((row != processor.video_token_id).sum()) + 1
    labels = whole["labels"][0]
    num_answer = int((labels != -100).sum())
    after = len(row) - 1 - int((labels != -100).nonzero()[-1])  # what the template puts behind an answer
    for limit in (number, number - 1, number - after - 1):
        cut = dataclasses.replace(collator, max_text_tokens=limit, has_report=True)([samples[0]])
        kept = len(row) - (number - limit)
        assert torch.equal(cut["input_ids"][0], row[:kept])
        assert torch.equal(cut["labels"][0], labels[:kept])
        assert [entry["tokens"] for entry in cut["report"]["cut"]] == [number - limit] * (limit < number)
    asked = number - num_answer - after
    short = dataclasses.replace(collator, max_text_tokens=asked + 1, has_report=True)
    (learnt,) = (short([samples[0]])["labels"] != -100).sum(1).tolist()
    assert learnt == 1
    nothing = dataclasses.replace(short, max_text_tokens=asked)([samples[0]])
    assert not nothing["report"]["samples"]
    assert f"{asked} tokens of text before its answer" in nothing["report"]["left_out"][0]["reason"]
    # In a batch, rows stay padded on the left, and the shorter one is as it was.
    both = dataclasses.replace(collator, max_text_tokens=number - after - 1, has_report=True)([samples[0], samples[4]])
    alone = collator([samples[4]])["input_ids"][0]
    assert torch.equal(both["input_ids"][1][-len(alone) :], alone)
    for mask in both["attention_mask"]:
        assert mask.sort().values.equal(mask)
    assert bool(both["attention_mask"][:, 0].any()), "no column is padding alone"
    with torch.no_grad():
        assert bool(model(**{name: value for name, value in both.items() if name != "report"}).loss.isfinite())
    data = dataclasses.replace(config.data, max_text_tokens=asked)
    with caplog.at_level("WARNING"):
        run(dataclasses.replace(config, steps=4, data=data))
    stamp = stamp_of(folder / "run")
    assert stamp["left_out"] > 0
    assert "tokens of text before its answer" in caplog.text
    with pytest.raises(ValueError, match=r"data\.max_text_tokens=0 must be at least 1"):
        DataConfig(records=(), max_text_tokens=0)


@pytest.mark.dist
@pytest.mark.timeout(300)
def test_two_processes_leave_out_what_one_does(folder: Path) -> None:
    """A process that has nothing left in a step takes part in it all the same; counts are those of both."""
    make_mixed_folder(folder)
    (folder / "1.mp4").write_bytes(b"no video")
    config = mixed_config(folder, folder / "two")
    data = dataclasses.replace(config.data, on_bad_video="skip")
    result = train_in_two(dataclasses.replace(config, data=data))
    assert result.returncode == 0, result.stderr[-4000:]
    run(dataclasses.replace(config, data=data, out=str(folder / "one"), batch_size=2))
    assert losses(folder / "two") == pytest.approx(losses(folder / "one"), rel=1e-5)
    assert stamp_of(folder / "two")["left_out"] == stamp_of(folder / "one")["left_out"] > 0
    assert len((folder / "two" / "bad_videos.jsonl").read_text().splitlines()) == 1
