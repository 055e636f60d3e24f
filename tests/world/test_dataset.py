"""Files on disk: real H.264, records that can be read back, interrupted writes that are completed."""

import json
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from hicom.world.dataset import World, ask, files_of, make_dataset, masks, records, truth
from hicom.world.questions import FAMILIES
from hicom.world.render import render
from hicom.world.scenes import SPLITS, WorldConfig, split_config

COUNTS = {"train": 6, "val": 2, "test": 2, "test_pairs": 1, "test_scenes": 1, "test_long": 1}
WORLD = World(seed=4, config=WorldConfig(width=64, height=48))


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def make(folder, counts=COUNTS, world=WORLD, **options):
    return make_dataset(folder, counts, world, **{"with_masks": True, "num_workers": 1, **options})


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return make(tmp_path_factory.mktemp("world"))


def test_clips_are_h264_and_show_the_scene(written):
    paths = sorted(written.glob("*/videos/*"))
    assert len(paths) == sum(COUNTS.values())
    for path in paths:
        assert path.suffix == ".mp4", "an unfinished file was left"
        split = path.parts[-3]
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert (stream.width, stream.height, stream.average_rate) == (64, 48, Fraction(8))
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        drawn, _ = render(WORLD.scene(split, int(path.stem)), split_config(WORLD.config, split))
        assert frames.shape == drawn.shape == (128 if split == "test_long" else 16, 48, 64, 3)
        assert np.abs(frames.astype(int) - drawn).mean() < 10


def test_records_point_at_clips_and_tell_the_answer(written):
    ids = []
    for split in SPLITS:
        files = files_of(split)
        assert {path.stem for path in (written / split).glob("*.jsonl")} == {*files, "truth", "masks"}
        for name in files:
            rows = read(written / split / f"{name}.jsonl")
            again = [row for i in range(COUNTS[split]) for row in records(WORLD, split, i, name)]
            assert rows == json.loads(json.dumps(again))
            ids += [row["id"] for row in rows]
            for row in rows:
                human, gpt = row["conversations"]
                assert (written / row["video"]).is_file()
                assert row["video"].startswith(f"{split}/")
                assert row["split"] == split
                assert human["from"] == "human"
                assert human["value"].startswith("<video>\n")
                assert gpt == {"from": "gpt", "value": row["answer"]}
                assert (row["chance"] is not None) == (name not in ("align", "pretrain"))
                assert row["form"] == "choice" or name != "choice"
                assert row["chance"] is None or row["family"] in FAMILIES
        for name, facts in (("truth", truth), ("masks", masks)):
            expected = [facts(WORLD, split, i) for i in range(COUNTS[split])]
            assert read(written / split / f"{name}.jsonl") == json.loads(json.dumps(expected))
    assert len(ids) == len(set(ids))


def test_training_and_held_out_splits_have_files_of_their_own():
    assert files_of("train") == ["align", "pretrain", "tune", "choice", "compare"]
    for split in SPLITS[1:]:
        assert files_of(split) == ["align", "pretrain", "tune", "choice", "wording"]


def test_training_asks_with_options_what_it_asks_without():
    """Every question of the first round once more; an answer's letter stands for the open answer."""
    for index in range(20):
        asked, with_options = (ask(WORLD, "train", index, file) for file in ("tune", "choice"))
        assert with_options, "every clip has questions"
        assert all(question.form == "choice" for question in with_options)
        assert [q.family for q in with_options] == [q.family for q in asked[: len(with_options)]]
        for one, other in zip(with_options, asked, strict=False):
            assert one.subject == other.subject
            if other.form == "open":
                assert one.text.startswith(other.text)
                (option,) = (line[4:] for line in one.text.splitlines() if line.startswith(f"({one.answer})"))
                assert option == other.answer


def test_a_finished_data_set_says_what_it_is_and_is_left_alone(written):
    facts = json.loads((written / "world.json").read_text())
    assert facts["settings"]["num_clips"] == COUNTS
    assert facts["settings"]["world"]["seed"] == 4
    assert not (written / "unfinished.json").exists()
    before = {path: path.stat().st_mtime_ns for path in written.rglob("*")}
    make(written)
    assert {path: path.stat().st_mtime_ns for path in written.rglob("*")} == before


@pytest.mark.parametrize(
    "lost",
    [
        "val/videos/000001.mp4",
        "train/tune.jsonl",
        "train/compare.jsonl",
        "train/choice.jsonl",
        "test/choice.jsonl",
        "test_long/truth.jsonl",
        "world.json",
    ],
)
def test_a_lost_file_is_noticed_and_restored(written, lost):
    before = contents(written)
    (written / lost).unlink()
    make(written)
    assert contents(written) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": COUNTS | {"val": 3}}, r"other settings \(num_clips\): choose another folder"),
        ({"world": World(seed=5, config=WORLD.config)}, r"other settings \(world\)"),
        ({"world": World(seed=4)}, r"other settings \(world\)"),
        ({"world": World(seed=4, config=WORLD.config, families=("which",))}, r"other settings \(world\)"),
        ({"with_masks": False}, r"other settings \(masks\)"),
    ],
)
def test_other_settings_are_refused(written, change, message):
    before = contents(written)
    with pytest.raises(ValueError, match=message):
        make(written, **change)
    assert contents(written) == before


def test_killed_writing_is_completed(tmp_path):
    counts = {"train": 60, "val": 2}
    program = "import sys; from hicom.cli import main; sys.exit(main(sys.argv[1:]))"
    options = [f"--{split.replace('_', '-')}={counts.get(split, 0)}" for split in SPLITS]
    options += ["--seed=4", "--width=64", "--height=48", "--num-workers=1"]
    killed = tmp_path / "killed"
    command = [sys.executable, "-c", program, "world", "make", str(killed), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    while len(list(killed.glob("train/videos/*.mp4"))) < 10:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    survivors = {path: path.stat().st_mtime_ns for path in killed.glob("*/videos/*.mp4")}
    assert len(survivors) < 62
    assert not (killed / "world.json").exists(), "an unfinished data set must not look finished"
    (killed / "train/videos/000059.part").write_bytes(b"half a clip")
    (killed / "train/tune.part").write_text("half a table")

    with pytest.raises(ValueError, match="choose another folder"):
        make(killed, counts, World(seed=5, config=WORLD.config), with_masks=False)
    make(killed, counts, with_masks=False)
    assert all(path.stat().st_mtime_ns == then for path, then in survivors.items()), "finished clips are kept"
    whole = make(tmp_path / "whole", counts, with_masks=False)
    assert contents(killed) == contents(whole), "as if never interrupted"


def test_an_error_in_one_table_ends_the_writing(tmp_path):
    """And the data set does not look finished."""
    blocked = tmp_path / "val" / "pretrain.jsonl"
    blocked.parent.mkdir()
    blocked.symlink_to(tmp_path / "missing" / "pretrain.jsonl")
    with pytest.raises(OSError, match="pretrain"):
        make(tmp_path, {"val": 1})
    assert not (tmp_path / "world.json").exists()
    blocked.unlink()
    make(tmp_path, {"val": 1})
    assert (tmp_path / "world.json").exists()


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        ({"dev": 1}, {}, "unknown split 'dev': choose one of train"),
        ({"val": -1}, {}, "-1 clips of split val"),
        ({"val": 0}, {}, "no clips are asked for"),
        ({}, {}, "no clips are asked for"),
        ({"val": 1}, {"num_workers": 0}, "num_workers=0 must be at least 1"),
    ],
)
def test_impossible_data_sets_are_refused(tmp_path, counts, options, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "out", counts, **options)
    assert not Path(tmp_path / "out").exists()
