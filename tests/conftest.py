"""What every test needs: a fixed seed, no network, and no more threads than this worker's share of the cores."""

import os

# Before torch is imported. Two workers with two threads each are slower than two with one, and ten times slower where
# something else runs. Workers inherit what the process that starts them sets, so that one must set nothing.
if "PYTEST_XDIST_WORKER" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ["OMP_NUM_THREADS"] = str(max(1, share))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from typing import Any

import numpy as np
import pytest
import torch

import hicom.video.decode


@pytest.fixture(autouse=True)
def seed() -> None:
    """Make every test start from the same random numbers, whatever ran before it."""
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def no_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forbid the way out of decoding a whole video, so that it cannot cover up a fault of the fast ways."""

    def refuse(clip: Any) -> None:
        raise AssertionError("the packets should have been enough to find the frames")

    monkeypatch.setattr(hicom.video.decode.Video, "_scan", refuse)
