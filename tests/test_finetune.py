"""The path of docs/finetune.md, from a folder of videos to a served model: every command as it is printed there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from hicom.cli import main

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "finetune.md").read_text(encoding="utf-8")
PATH, _, VARIANTS = PAGE.partition("## Variants")
COMMANDS = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def shell(script: str, folder: Path) -> str:
    """Run commands of the page in a folder, and return what they print."""
    script = "MODEL=hicom-tiny\n" + script.replace("examples/", f"{ROOT}/examples/")
    command = ["bash", "-euo", "pipefail", "-c", script]
    result = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, f"{script}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def serve(command: str, folder: Path) -> None:
    """Run the command of the page that serves, until it says that it is well."""
    port = re.search(r"--port (\d+)", command)
    assert port is not None
    with subprocess.Popen(command.split(), cwd=folder, env=ENVIRONMENT, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(240):
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port[1]}/v1/models") as reply:
                        assert json.load(reply)["data"][0]["id"]
                    return
                except OSError:
                    assert process.poll() is None, "the server has ended"
                    time.sleep(0.5)
            raise AssertionError("the server does not answer")
        finally:
            process.terminate()


def exact_match(folder: Path) -> float:
    (path,) = folder.glob("*/results.json")
    facts = json.loads(path.read_text())
    assert facts["is_complete"]
    return float(facts["scores"]["exact_match"]["mean"])


@pytest.mark.slow
def test_from_a_folder_of_videos_to_a_served_model(tmp_path: Path) -> None:
    blocks = COMMANDS.findall(PATH)
    assert len(blocks) == 9
    for block in blocks:
        if block.startswith("hicom serve"):
            serve(block, tmp_path)
        else:
            shell(block, tmp_path)
    before, after = (exact_match(tmp_path / "results" / name) for name in ("before", "after"))
    assert before < 70
    assert after > 90
    # What was exported and what was merged by hand is the trained model.
    answers = [
        shell(f'hicom ask my_videos/val_0001.mp4 "Does the clip pass the inspection?" --model {name}', tmp_path)
        for name in ("runs/mine/model", "models/mine", "models/merged")
    ]
    assert len(set(answers)) == 1
    for line in COMMANDS.findall(VARIANTS)[0].splitlines():
        assert "this run" in shell(f"{line} --estimate", tmp_path)


def test_the_page_names_what_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", PAGE) if "://" not in link]
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []


@pytest.mark.parametrize("recipe", ["finetune", "finetune-lora", "finetune-qlora"])
def test_what_a_recipe_needs_is_said(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", recipe]) == 2
    said = capsys.readouterr().err
    assert "--init" in said
    assert "--data.records" in said
