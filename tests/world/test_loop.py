"""What the trainings before the stages share: two side by side, and a folder that only one of them may have."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hicom.locks import claimed, owned
from hicom.world.loop import StepsConfig, beside, train_steps
from hicom.world.reader import ReaderConfig, main, train

CONFIG = ReaderConfig(steps=2, batch=1, warmup=1, hidden_size=32, intermediate_size=64, num_layers=1)
# Starts a training that takes far longer than this test, waits until it has begun, and is killed.
KILLED = """
import os, signal, sys, time
from pathlib import Path
from hicom.world.loop import StepsConfig, beside, train_steps
from hicom.world.reader import ReaderConfig, train
if __name__ == "__main__":
    out = Path(sys.argv[1])
    config = ReaderConfig(steps=10**6, batch=1, warmup=1, hidden_size=32, intermediate_size=64, num_layers=1)
    with beside(train, config, out):
        while not (out / "lock").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_is_trained_beside_is_the_same(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    with beside(train, CONFIG, tmp_path / "beside"):
        train(CONFIG, tmp_path / "here", num_eval_scenes=1)
        assert torch.get_num_threads() == max(1, threads // 2)
    assert torch.get_num_threads() == threads
    runs = [json.loads((tmp_path / name / "run.json").read_text("utf-8")) for name in ("beside", "here")]
    assert runs[0]["config"] == runs[1]["config"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("beside", "here")]
    assert weights[0] == weights[1], "the process beside trains the same"


def test_an_error_of_either_is_the_error_of_both(tmp_path: Path) -> None:
    train(CONFIG, tmp_path, stop_after=1)
    with (
        pytest.raises(ValueError, match="use the same settings, or another folder"),
        beside(train, dataclasses.replace(CONFIG, batch=2), tmp_path),
    ):
        pass
    endless = dataclasses.replace(CONFIG, steps=10**6)
    # Neither waits for the other: an endless one does not keep the body from its error.
    holder = tmp_path / "endless" / "lock.pid"

    def fail_once_both_train() -> None:
        while not (holder.exists() and holder.read_text("utf-8")):
            time.sleep(0.05)
        raise KeyError("of the body")

    with pytest.raises(KeyError, match="of the body"), beside(train, endless, holder.parent):
        fail_once_both_train()
    with owned(tmp_path / "endless"):
        pass  # the process beside is gone, and so is its lock


def test_it_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    killed = subprocess.run([sys.executable, str(script), str(tmp_path / "out")], check=False)
    assert killed.returncode == -signal.SIGKILL
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with claimed(tmp_path / "out" / "lock", wait=False) as is_free:
            if is_free:
                return
        time.sleep(0.1)
    pytest.fail("the process beside trains on after its parent was killed")


def test_a_folder_in_use_is_one_clear_line(tmp_path: Path) -> None:
    with owned(tmp_path), pytest.raises(SystemExit, match=f"error: .* is in use by process {os.getpid()}; stop it"):
        main(CONFIG, tmp_path, threads=torch.get_num_threads())


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_is_no_number_stops_the_training_and_is_not_written(tmp_path: Path, number: float) -> None:
    module = torch.nn.Linear(2, 2)
    config = StepsConfig(steps=4, batch=1, lr=0.1, warmup=1, weight_decay=0.0)

    def loss(step: int) -> torch.Tensor:
        return module(torch.ones(2)).sum() * (number if step == 2 else 1.0)

    with pytest.raises(ValueError, match=f"step 3 in .*: the loss is -?{number}; train in another folder"):
        train_steps(module, loss, config, tmp_path, name="x", model=None, tokenizer=None, measure=dict)
    assert not (tmp_path / "resume.pt").exists()
