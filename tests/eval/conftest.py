"""What tests of evaluation share: a tiny model, and the command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import tiny
from hicom import VideoChat, cli


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def chat(model: Path) -> VideoChat:
    return VideoChat.from_pretrained(model, device="cpu")


@pytest.fixture
def hicom(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`hicom eval ...`: the exit code, and what it prints to stdout and stderr."""

    def run(*args: object) -> tuple[int, str, str]:
        code = cli.main(["eval", *map(str, args)])
        return code, *capfd.readouterr()

    return run
