"""ZeRO on CPUs: `make test-deepspeed` makes an environment with DeepSpeed and runs these."""

import json
from pathlib import Path

import pytest

from hicom.train import run
from scale_training import assert_same_run, make_mixed_folder, mixed_config, train_in_two

pytestmark = pytest.mark.deepspeed
EXAMPLES = Path(__file__).parents[2] / "examples" / "accelerate"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mixed_folder(tmp_path_factory.mktemp("zero"))


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_two_processes_are_one_and_resume_exactly(folder: Path, tmp_path: Path, engine: str) -> None:
    """One of two processes is killed two steps after a checkpoint; the run goes on, and ends as one process does."""
    one, two = tmp_path / "one", tmp_path / "two"
    run(mixed_config(folder, one, batch_size=2))
    config = mixed_config(folder, two, engine=engine, gradient_checkpointing=engine == "zero2")
    result = train_in_two(config, kill_at=6)
    assert "Signal 9 (SIGKILL)" in result.stderr
    assert [path.name for path in (two / "checkpoints").iterdir()] == ["checkpoint-3"]
    result = train_in_two(config)
    assert result.returncode == 0, result.stderr[-4000:]
    assert json.loads((two / "run.json").read_text())["engine"] == engine
    assert_same_run(two, one, atol=5e-5)


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_a_loss_that_is_no_number_stops_all_processes(folder: Path, tmp_path: Path, engine: str) -> None:
    config = mixed_config(folder, tmp_path / "run", engine=engine)
    result = train_in_two(config, nan_at=5)
    assert result.returncode != 0
    assert "ValueError: step 5: the loss is nan, on " in result.stderr, result.stderr[-3000:]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-3"]
    assert not (tmp_path / "run" / "model").exists()
    # The same command goes on, with the rates of its table in the log.
    result = train_in_two(config)
    assert result.returncode == 0, result.stderr[-4000:]
    log = [row for row in json.loads((tmp_path / "run" / "log.json").read_text()) if "loss" in row]
    rates = {name for name in log[-1] if name.startswith("learning_rate")}
    assert rates == {"learning_rate", "learning_rate_0.0003", "learning_rate_0.0001"}
