"""The wheel in an environment of its own, away from the repository, with what it declares and nothing else.

`make test-wheel` runs this. Every test installs the extra that it needs, so that a package which only development
brings is missing here.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.metadata import Metadata

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "direct_coarse"
QUESTION = "What color is the circle?"
pytestmark = pytest.mark.wheel


class Installation:
    """The wheel in an environment of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "env" / "bin"
        source = folder / "source"
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            (source / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, source)
        shutil.copytree(ROOT / "src" / "hicom", source / "src" / "hicom", ignore=shutil.ignore_patterns("__pycache__"))
        build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
        subprocess.run([sys.executable, *build, str(source)], check=True)
        shutil.rmtree(source)
        (self.wheel,) = folder.glob("hicom-*.whl")
        subprocess.run([sys.executable, "-m", "venv", str(folder / "env")], check=True)
        # First and alone: a plain `torch` may be a build that brings gigabytes of CUDA libraries.
        index = ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]
        self.pip("install", "--retries", "0", "--no-deps", f"torch=={version('torch').partition('+')[0]}", *index)
        self.install()

    def pip(self, *arguments: str) -> str:
        return self.run("python", "-m", "pip", "--disable-pip-version-check", *arguments)

    def install(self, extra: str = "") -> None:
        """Install the wheel with its dependencies, and with those of an extra."""
        self.pip("install", "--quiet", f"{self.wheel}[{extra}]" if extra else str(self.wheel))

    def environment(self) -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}

    def run(self, program: str, *arguments: str | Path) -> str:
        """Return what a program of the environment prints."""
        command = [str(self.bin / program), *map(str, arguments)]
        result = subprocess.run(command, cwd=self.folder, env=self.environment(), capture_output=True, text=True)
        assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
        return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    return Installation(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def hicom(installed: Installation) -> Callable[..., str]:
    return lambda *arguments: installed.run("hicom", *arguments)


@pytest.fixture(scope="module")
def demo(installed: Installation) -> Path:
    """The clip of the wheel, found as a user would find it."""
    code = "import hicom; from pathlib import Path; print(Path(hicom.__file__).parent / 'assets' / 'demo.mp4')"
    path = Path(installed.run("python", "-c", code).strip())
    assert path.is_relative_to(installed.folder / "env"), "the wheel is imported, not the repository"
    return path


@pytest.fixture(scope="module")
def records(installed: Installation, demo: Path) -> Path:
    turns = [{"from": "human", "value": f"<video>\n{QUESTION}"}, {"from": "gpt", "value": "red"}]
    path = installed.folder / "records.jsonl"
    path.write_text(f"{json.dumps({'video': str(demo), 'conversations': turns})}\n" * 2)
    return path


def test_packages_agree(installed: Installation) -> None:
    assert "No broken requirements" in installed.pip("check")


def test_metadata_are_whole(installed: Installation) -> None:
    code = "from importlib.metadata import distribution; print(distribution('hicom').read_text('METADATA'))"
    metadata = Metadata.from_email(installed.run("python", "-c", code).rstrip(), validate=True)
    assert metadata.author_email or metadata.author
    assert metadata.license_expression == "Apache-2.0"
    assert metadata.keywords
    assert metadata.classifiers
    assert metadata.project_urls
    assert metadata.description_content_type == "text/markdown"


def test_a_video_is_asked_about(hicom: Callable[..., str], demo: Path) -> None:
    assert hicom("ask", demo, QUESTION) == "red\n"


def test_a_look(hicom: Callable[..., str], demo: Path, installed: Installation) -> None:
    hicom("look", demo, QUESTION, "--output", "look.png")
    assert (installed.folder / "look.png").read_bytes().startswith(b"\x89PNG")


def test_info(hicom: Callable[..., str], demo: Path) -> None:
    assert "48 frames at 16 fps" in hicom("info", demo)
    assert "hicom" in hicom("info", "hicom-tiny")


def test_a_world_and_its_check(hicom: Callable[..., str], installed: Installation) -> None:
    none = [f"--{split}=0" for split in ("test", "test-pairs", "test-scenes", "test-long")]
    hicom("world", "make", "world", *none, "--train", "1", "--val", "1", "--width", "64", "--height", "48")
    hicom("data", "check", "world/train/tune.jsonl", "--root", "world")


def test_an_official_checkpoint_is_converted(hicom: Callable[..., str], installed: Installation) -> None:
    shutil.copytree(GOLDEN, installed.folder / "official")
    hicom("convert", "official", "converted")
    assert "num_global_tokens" in (installed.folder / "converted" / "config.json").read_text()
    hicom("info", "converted")


def test_an_evaluation(hicom: Callable[..., str], installed: Installation, records: Path) -> None:
    installed.install("eval")
    hicom("eval", "hicom-tiny", "--records", records, "--out", "scores")
    (results,) = (installed.folder / "scores").glob("*/results.json")
    assert json.loads(results.read_text())["scores"]["exact_match"]["mean"] == 100


def test_a_server(hicom: Callable[..., str], installed: Installation, demo: Path) -> None:
    installed.install("serve")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(installed.bin / "hicom"), "serve", "hicom-tiny", "--engine", "local", "--port", str(port)]
    command += ["--allow-folder", str(demo.parent)]
    video = {"type": "video_url", "video_url": {"url": demo.as_uri()}}
    message = {"role": "user", "content": [video, {"type": "text", "text": QUESTION}]}
    body = json.dumps({"model": "hicom-tiny", "messages": [message]}).encode()
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    log = installed.folder / "server.log"
    with (
        log.open("w") as file,
        subprocess.Popen(command, cwd=installed.folder, env=installed.environment(), stderr=file) as server,
    ):
        try:
            for _ in range(240):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models").close()
                    break
                except OSError:
                    assert server.poll() is None, log.read_text()[-4000:]
                    time.sleep(0.5)
            request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request) as reply:
                assert json.load(reply)["choices"][0]["message"]["content"] == "red"
        finally:
            server.terminate()


def test_a_training(hicom: Callable[..., str], installed: Installation, demo: Path, records: Path) -> None:
    installed.install("train")
    options = [
        "--data.records",
        records,
        "--out",
        "run",
        "--steps",
        "1",
        "--batch-size",
        "1",
        "--global-batch-size",
        "1",
    ]
    hicom("train", "finetune-lora", "--init", "hicom-tiny", *options)
    assert json.loads((installed.folder / "run" / "run.json").read_text())["status"] == "finished"
    hicom("ask", demo, QUESTION, "--model", "run/model")
