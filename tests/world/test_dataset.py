"""Files on disk: real H.264, records that can be read back, interrupted writes that are completed."""

import json
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction

import av
import numpy as np
import pytest

from hicom.world.dataset import STAGES, main, make_dataset, truth
from hicom.world.render import render
from hicom.world.scenes import clip_seed, make_scene

COUNTS = {"train": 6, "val": 2, "test": 2}


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("world"), COUNTS, seed=4, num_workers=1)


def test_clips_are_h264_and_show_the_scene(written):
    for path in sorted(written.glob("*/videos/*")):
        assert path.suffix == ".mp4", "an unfinished file was left"
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert (stream.width, stream.height, stream.average_rate) == (128, 128, Fraction(8))
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        drawn, _ = render(make_scene(clip_seed(4, path.parts[-3], int(path.stem))))
        assert frames.shape == drawn.shape == (16, 128, 128, 3)
        assert np.abs(frames.astype(int) - drawn).mean() < 8


def test_records_point_at_clips_and_tell_the_answer(written):
    ids = []
    for split in COUNTS:
        for stage in STAGES:
            rows = read(written / split / f"{stage}.jsonl")
            ids += [row["id"] for row in rows]
            for row in rows:
                human, gpt = row["conversations"]
                assert (written / row["video"]).is_file()
                assert row["video"].startswith(f"{split}/")
                assert row["split"] == split
                assert human["from"] == "human"
                assert human["value"].startswith("<video>\n")
                assert gpt == {"from": "gpt", "value": row["answer"]}
                assert (row["chance"] is not None) == (stage == "tune")
        assert read(written / split / "truth.jsonl") == json.loads(
            json.dumps([truth(4, split, i) for i in range(COUNTS[split])])
        )
    assert len(ids) == len(set(ids))


def test_killed_writing_is_completed(tmp_path, written):
    command = [sys.executable, "-m", "hicom.world.dataset", "--dst", str(tmp_path), "--train", "60", "--val", "2"]
    command += ["--test", "2", "--seed", "4", "--num-workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    while len(list(tmp_path.glob("train/videos/*.mp4"))) < 10:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    survivors = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/videos/*.mp4")}
    assert len(survivors) < 64
    assert not (tmp_path / "world.json").exists(), "an unfinished data set must not look finished"
    (tmp_path / "train/videos/000059.part").write_bytes(b"half a clip")

    with pytest.raises(ValueError, match="choose another folder"):
        make_dataset(tmp_path, COUNTS, seed=5)
    main(tmp_path, train=60, val=2, test=2, seed=4, num_workers=1)
    assert (tmp_path / "world.json").exists()
    assert len(list(tmp_path.glob("*/videos/*.mp4"))) == 64
    assert not list(tmp_path.rglob("*.part"))
    assert all(path.stat().st_mtime_ns == then for path, then in survivors.items()), "finished clips are kept"
    for name in ("val/truth.jsonl", "test/tune.jsonl", "val/videos/000001.mp4"):
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes(), "as if never interrupted"


def test_missing_clip_is_noticed(written):
    path = written / "val/videos/000001.mp4"
    before = path.read_bytes()
    path.unlink()
    make_dataset(written, COUNTS, seed=4, num_workers=1)
    assert path.read_bytes() == before


def test_unknown_split_is_named(tmp_path):
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        make_dataset(tmp_path, {"dev": 1})
