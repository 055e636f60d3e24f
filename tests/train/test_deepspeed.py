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
