"""The real callers of transformers: its pipeline and its server."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoModelForCausalLM, pipeline

import hicom
from hicom.video import write_video

MODEL = Path(hicom.__file__).parent / "assets" / "hicom-tiny"
QUESTION = "which way does the circle go ?"
LAUNCHER = "import hicom; hicom.register(); from transformers.cli.transformers import main; main()"
"""As in docs/callers.md."""


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen frames of a red square that goes right."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    frames = [np.full((64, 64, 3), 60, np.uint8) for _ in range(16)]
    for i, frame in enumerate(frames):
        frame[24:40, 3 * i : 3 * i + 16] = (230, 20, 20)
    write_video(path, frames, fps=8)
    return path


def message(*parts: dict[str, Any], text: str = QUESTION) -> dict[str, Any]:
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def test_pipeline(clip: Path) -> None:
    hicom.register()
    pipe = pipeline("image-text-to-text", model=str(MODEL))
    chat = hicom.VideoChat.from_pretrained("hicom-tiny")

    def answer(inputs: Any = None, **kwargs: Any) -> Any:
        found = pipe(text=inputs, return_full_text=False, max_new_tokens=6, **kwargs)
        return [each["generated_text"] if isinstance(each, dict) else each[0]["generated_text"] for each in found]

    video = {"type": "video", "video": str(clip)}
    expected = chat.ask(clip, QUESTION, max_new_tokens=6).text
    assert answer([message(video)]) == [expected]
    assert answer([message({"type": "video", "url": clip.as_uri()})]) == [expected]
    few = chat.ask(chat.encode(clip, num_frames=4), QUESTION, max_new_tokens=6).text
    assert answer([message({**video, "num_frames": 4})]) == [few]
    assert answer([message(video)], processor_kwargs={"num_frames": 4}) == [few]
    picture = Image.fromarray(hicom.read_frames(clip, num_frames=1).frames[0])
    still = pipe.processor.apply_chat_template(
        [message({"type": "image", "image": picture})],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    ids = pipe.model.generate(**still, max_new_tokens=6)[0, still["input_ids"].shape[1] :]
    seen = pipe.processor.tokenizer.decode(ids, skip_special_tokens=True)
    shown = [message({"type": "image", "image": picture})]
    assert answer(shown) == [seen]
    assert answer([shown, [message(video)]]) == [seen, expected], "several chats, media of both kinds"
    text = pipe.processor.apply_chat_template([message({"type": "image"})], add_generation_prompt=True)
    assert answer([text, text], images=[picture, picture]) == [seen, seen]
    followed = [message(video), {"role": "assistant", "content": expected}, message(text="what is it ?")]
    (full,) = pipe(text=followed, max_new_tokens=6)
    assert [turn["role"] for turn in full["generated_text"]] == ["user", "assistant", "user", "assistant"]
    prefilled = [message(video), {"role": "assistant", "content": expected}]
    (full,) = pipe(text=prefilled, max_new_tokens=3)
    assert [turn["role"] for turn in full["generated_text"]] == ["user", "assistant"]
    assert full["generated_text"][-1]["content"].startswith(expected)


def test_causal_lm_class_is_the_model() -> None:
    """What trainers fall back to that do not know the class."""
    hicom.register()
    assert type(AutoModelForCausalLM.from_pretrained(MODEL)).__name__ == "HIComForConditionalGeneration"


@pytest.mark.slow
def test_transformers_serve(clip: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", LAUNCHER, "serve", str(MODEL), "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    log = tmp_path / "log"
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environment) as server:
        try:
            _wait(f"http://localhost:{port}/health", server, log)
            chat = hicom.VideoChat.from_pretrained("hicom-tiny")
            video = chat.encode(clip, num_frames=32)  # the server asks for as many
            expected = chat.ask(video, QUESTION, max_new_tokens=6).text
            data = base64.b64encode(clip.read_bytes()).decode()
            for url in (f"data:video/mp4;base64,{data}", clip.as_uri()):
                body = {
                    "model": str(MODEL),
                    "max_tokens": 6,
                    "messages": [message({"type": "video_url", "video_url": {"url": url}})],
                }
                assert _post(port, body)["choices"][0]["message"]["content"] == expected
        finally:
            server.terminate()


def _wait(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"the server did not start: {log.read_text()}")


def _post(port: int, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise AssertionError(error.read().decode()) from error
