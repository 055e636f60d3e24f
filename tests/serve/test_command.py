"""`hicom serve`: starts, answers, stops; wrong options are one clear line."""

import base64
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest

from hicom import VideoChat, cli
from hicom.serve.vllm_http import VLLMSettings

DEMO = Path(cli.__file__).parent / "assets" / "demo.mp4"
QUESTION = "What color is the circle?"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_it_serves_the_embedded_model(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "key").write_text("secret\n", "utf-8")
    command = [
        sys.executable,
        "-m",
        "hicom",
        "serve",
        "hicom-tiny",
        "--engine",
        "local",
        "--device",
        "cpu",
        "--port",
        str(port),
    ]
    process = subprocess.Popen(
        [*command, "--api-key-file", str(tmp_path / "key"), "--allow-folder", str(DEMO.parent)],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0)
        deadline = time.monotonic() + 60
        while True:
            try:
                assert [model.id for model in client.models.list()] == ["hicom-tiny"]
                break
            except openai.APIConnectionError:
                assert process.poll() is None, process.stderr and process.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.1)
        expected = VideoChat.from_pretrained("hicom-tiny", device="cpu").ask(DEMO, QUESTION).text
        for url in (f"data:video/mp4;base64,{base64.b64encode(DEMO.read_bytes()).decode()}", DEMO.as_uri()):
            content = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": QUESTION}]
            answer = client.chat.completions.create(
                model="hicom-tiny",
                messages=[{"role": "user", "content": content}],  # type: ignore[typeddict-item,list-item]
                temperature=0,
            )
            assert answer.choices[0].message.content == expected
        process.send_signal(signal.SIGINT)
        assert process.wait(20) in (0, 130)
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "0"], "--port 0: give a number from 1 to 65535"),
        (["--max-mb", "0"], "--max-mb 0: give a positive number"),
        (["--allow-folder", "nowhere"], "--allow-folder nowhere: no such folder"),
        (["--api-key-file", "nowhere"], "nowhere: No such file"),
        (["no-such-model"], "no-such-model"),
        (["--num-frames", "4"], "--num-frames and options after -- are for --engine vllm"),
    ],
)
def test_wrong_options(options: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--engine", "local", *options]) == 2
    err = capfd.readouterr().err.splitlines()[-1]
    assert err.startswith("hicom: error: ")
    assert message in err


def test_an_empty_key_is_no_key(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "key").write_text("\n", "utf-8")
    assert cli.main(["serve", "--engine", "local", "--api-key-file", str(tmp_path / "key")]) == 2
    assert "it is empty" in capfd.readouterr().err


def test_an_empty_key_of_the_environment(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Or whoever forgets to set a variable serves without a key and does not know."""
    monkeypatch.setenv("HICOM_API_KEY", "")
    for engine in ("local", "vllm"):
        assert cli.main(["serve", "--engine", engine]) == 2
        assert "HICOM_API_KEY is empty" in capfd.readouterr().err


def test_a_port_in_use_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert cli.main(["serve", "--engine", "local", "--device", "cpu", "--port", str(taken.getsockname()[1])]) == 2
        assert "in use" in capfd.readouterr().err
        # vLLM would find out after it has loaded.
        assert cli.main(["serve", "--port", str(taken.getsockname()[1])]) == 2
        assert "hicom: error: cannot listen at 127.0.0.1" in capfd.readouterr().err


def test_without_vllm_the_way_to_get_it_is_told(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["serve"]) == 2
    err = capfd.readouterr().err
    assert "vLLM is not installed: pip install 'hicom[vllm]'" in err
    assert "--engine local" in err


def test_the_command_that_starts_vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(os, "execv", lambda path, command: started.append(command))
    for name in ("HICOM_SERVE", "VLLM_MEDIA_CONNECTOR", "VLLM_API_KEY"):
        monkeypatch.setenv(name, "")
    (tmp_path / "key").write_text("secret\n", "utf-8")
    options = ["--num-frames", "4", "--max-frames", "16", "--max-mb", "3", "--port", "8123"]
    options += ["--api-key-file", str(tmp_path / "key"), "--allow-folder", str(tmp_path)]
    assert cli.main(["serve", "hicom-tiny", *options, "--", "--enforce-eager", "--seed", "1"]) == 0
    (command,) = started
    assert command[-3:] == ["--enforce-eager", "--seed", "1"]

    def value(option: str) -> str:
        return command[command.index(option) + 1]

    assert value("--served-model-name") == "hicom-tiny"
    assert value("--port") == "8123"
    assert json.loads(value("--media-io-kwargs")) == {"video": {"video_backend": "hicom", "num_frames": 4, "size": 64}}
    assert json.loads(value("--mm-processor-kwargs")) == {"max_frames": 16}
    assert value("--middleware") == "hicom.serve.vllm_http.RequestGuard"
    settings = VLLMSettings.from_environment()
    assert settings.requests.max_frames == 16
    assert settings.media.max_bytes == 3 * 10**6
    assert settings.media.allowed_folders == (tmp_path.resolve(),)
    assert os.environ["VLLM_MEDIA_CONNECTOR"] == "hicom"
    assert os.environ["VLLM_API_KEY"] == "secret"
    assert "secret" not in command, "other users of a machine see the arguments of commands"
    started.clear()
    assert cli.main(["serve", "--", "--enforce-eager"]) == 0
    assert started[0][-1] == "--enforce-eager"
    assert "hicom-tiny" in started[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-frames", "4"], "--max-frames 4 is less than the 8 frames"),
        (["--device", "cpu"], "--device and --cache are for --engine local"),
        (["no-such-model"], "no-such-model"),
    ],
)
def test_wrong_options_with_vllm(
    options: list[str], message: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    assert cli.main(["serve", *options]) == 2
    assert message in capfd.readouterr().err


@pytest.mark.parametrize("command", ["serve", "web"])
@pytest.mark.parametrize("port", ["0", "99999"])
def test_ports_that_cannot_be(command: str, port: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--port", port]) == 2
    assert f"--port {port}: give a number from 1 to 65535" in capfd.readouterr().err
