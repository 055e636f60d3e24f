"""What a run says: a readable line for every logged step, and the same in numbers in a file."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from hicom.recipes.stages import pretrain
from hicom.train import run
from hicom.train.log import duration, step_line
from toy_training import make_config, make_folder

LINE = re.compile(
    r"step (\d+)/6  loss (\d+\.\d{4})  gradient (\S+)  rate (\S+) (\S+)  (\d+\.\d\d) s/step  (\d+:\d\d:\d\d) left"
)


def test_a_logged_step_is_a_line_and_numbers_in_a_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path)
    run(make_config(folder, stage=pretrain(1e-4), warmup=0.2))
    captured = capfd.readouterr()
    assert "{" not in captured.out + captured.err, "a dictionary is nothing to read"
    assert not captured.out, "that is for the folder of the trained model alone"
    lines = [match for line in captured.err.splitlines() if (match := LINE.fullmatch(line))]
    assert [int(line[1]) for line in lines] == [1, 2, 3, 4, 5, 6]
    log = [row for row in json.loads((folder / "run" / "log.json").read_text()) if "loss" in row]
    assert len(log) == 6
    for line, row in zip(lines, log, strict=True):
        assert float(line[2]) == pytest.approx(row["loss"], abs=1e-4)
        assert float(line[3]) == pytest.approx(row["grad_norm"], rel=1e-2)
        rates = row["learning_rate"], row["learning_rate_0.0001"]
        assert [float(line[4]), float(line[5])] == pytest.approx(rates, rel=1e-2, abs=1e-9)
    # A step of warm-up from 0, then the peaks: injections at ten times the rate.
    assert (log[0]["learning_rate"], log[0]["learning_rate_0.0001"]) == (0, 0)
    assert (log[1]["learning_rate"], log[1]["learning_rate_0.0001"]) == pytest.approx((1e-3, 1e-4))
    assert lines[-1][7] == "0:00:00"


def test_the_time_that_is_left(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert [duration(s) for s in (0.4, 61, 3600 * 30 + 59.6)] == ["0:00:00", "0:01:01", "30:01:00"]
    line = step_line({"loss": 1.25, "learning_rate": 1e-4}, 50, 2886, 14.0)
    assert line == "step 50/2886  loss 1.2500  rate 1.00e-04  14.00 s/step  11:01:44 left"
    folder = make_folder(tmp_path)
    config = make_config(folder, log_every=4)
    run(dataclasses.replace(config, steps=5))
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line.partition("  ")[0] for line in lines] == ["step 4/5"]
