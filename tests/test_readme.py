"""Every fenced block of the README runs as printed, in a folder that holds a clip.mp4.

Blocks that set up the machine (`make ...`) are not run inside the test run that they would start: each of their lines
has to name a target of the Makefile, whose commands `make --dry-run` can list.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hicom
from hicom.model.config import HIComConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
SETUP = [block for language, block in BLOCKS if language == "bash" and block.startswith("make ")]
RUNNABLE = [(language, block) for language, block in BLOCKS if block not in SETUP]


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    assert README.count("```") == 2 * len(BLOCKS)
    assert {language for language, _ in BLOCKS} == {"bash", "python"}
    assert len(SETUP) == 1


@pytest.mark.parametrize(("language", "block"), RUNNABLE)
def test_block_runs(language: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(Path(hicom.__file__).parent / "assets" / "demo.mp4", tmp_path / "clip.mp4")
    monkeypatch.chdir(tmp_path)
    if language == "python":
        exec(compile(block, "README.md", "exec"), {})
        return
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    result = subprocess.run(["bash", "-euo", "pipefail", "-c", block], capture_output=True, text=True)
    # What the embedded model is, is said with every answer; nothing else is.
    note = f"note: {HIComConfig.from_pretrained('hicom-tiny').toy_note}\n"
    assert (result.returncode, result.stderr) == (0, note if "hicom ask" in block else "")


@pytest.mark.parametrize("line", [line for block in SETUP for line in block.splitlines()])
def test_setup_line_is_a_make_target(line: str) -> None:
    make, target = line.partition("#")[0].split()
    assert make == "make"
    result = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_links_and_table_name_what_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_table_names_every_part() -> None:
    package = Path(hicom.__file__).parent
    parts = {path.name for path in package.iterdir() if not path.name.startswith("_") and path.name != "py.typed"}
    listed = {Path(link).name for link in re.findall(r"\]\(src/hicom/([^)]+)\)", README)}
    assert listed == parts


def test_ci_runs_what_the_readme_says() -> None:
    assert "make test\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
