"""The page's questions, asked as a browser or any other client of its address asks them."""

import json
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest

import hicom
from hicom import VideoChat
from hicom.serve.backends import LocalBackend

pytest.importorskip("gradio")
pytestmark = pytest.mark.browser
DEMO = Path(hicom.__file__).parent / "assets" / "demo.mp4"
QUESTION = "What color is the circle?"


class Client:
    """Someone who has the page open.

    Args:
        url: of the page.
        function: number of the function that answers.
    """

    def __init__(self, url: str, function: int) -> None:
        self.http = httpx.Client(base_url=url, timeout=60)
        self.function, self.session = function, uuid.uuid4().hex
        with DEMO.open("rb") as file:
            (self.path,) = self.http.post("/gradio_api/upload", files={"files": file}).json()

    def ask(self, question: str, num_frames: Any = 8, budget: Any = 0) -> Iterator[dict[str, Any]]:
        """Ask, and yield the messages of the queue."""
        video = {"path": self.path, "meta": {"_type": "gradio.FileData"}}
        data = [video, question, None, None, num_frames, budget]
        body = json.dumps({"data": data, "fn_index": self.function, "session_hash": self.session})
        self.http.post(
            "/gradio_api/queue/join", content=body, headers={"Content-Type": "application/json"}
        ).raise_for_status()
        with self.http.stream("GET", f"/gradio_api/queue/data?session_hash={self.session}") as lines:
            for line in lines.iter_lines():
                if line.startswith("data:"):
                    message = json.loads(line[5:])
                    yield message
                    if message["msg"] in ("process_completed", "close_stream"):
                        return

    def answer(self, question: str, **how: Any) -> str:
        """Return all that the page says to a question."""
        return json.dumps(list(self.ask(question, **how)))


@pytest.fixture(scope="module")
def chat() -> VideoChat:
    return VideoChat.from_pretrained("hicom-tiny", device="cpu")


@pytest.fixture(scope="module")
def page(chat: VideoChat) -> Iterator[tuple[str, int]]:
    from hicom.serve.web import create_page, launch

    found = create_page(LocalBackend(chat, name="hicom-tiny"))
    (function,) = (number for number, each in enumerate(found.config["dependencies"]) if len(each["inputs"]) == 6)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    _, url, _ = launch(found, host="127.0.0.1", port=port, max_bytes=10**7, wait=False)
    yield url, function
    found.close()


def test_a_question_is_answered(page: tuple[str, int]) -> None:
    assert "red" in Client(*page).answer(QUESTION)


@pytest.mark.parametrize("value", [-1, 0, 10**9, float("nan"), float("inf"), 2.5, "many", None, True, [3]])
def test_numbers_that_no_slider_gives(page: tuple[str, int], value: Any, capfd: pytest.CaptureFixture[str]) -> None:
    said = Client(*page).answer(QUESTION, num_frames=value)
    assert "Choose 1 to 256 frames" in said
    if value != 0:
        assert "positive number of visual tokens" in Client(*page).answer(QUESTION, budget=value)
    found = capfd.readouterr()
    assert "Traceback" not in found.out + found.err


def test_long_questions_are_refused_at_once(page: tuple[str, int]) -> None:
    start = time.monotonic()
    assert "1,000,000 characters; at most 100,000" in Client(*page).answer("x" * 10**6)
    assert "4,096" in Client(*page).answer("which way " * 9000)
    assert time.monotonic() - start < 20
    assert "red" in Client(*page).answer(QUESTION)


def test_others_see_their_place_and_a_person_who_left_frees_it(
    page: tuple[str, int], chat: VideoChat, request: pytest.FixtureRequest
) -> None:
    pause = chat.model.register_forward_pre_hook(lambda *_: time.sleep(0.5))
    request.addfinalizer(pause.remove)
    first = Client(*page).ask("What happens?")
    while next(first)["msg"] != "process_generating":
        pass
    seen: list[dict[str, Any]] = []
    second = Thread(target=lambda: seen.extend(Client(*page).ask(QUESTION)))
    second.start()
    deadline = time.monotonic() + 20
    time.sleep(1)
    first.close()  # the tab is closed; its answer would take longer
    pause.remove()
    second.join(deadline - time.monotonic())
    assert not second.is_alive()
    assert any(message["msg"] == "estimation" and message["rank"] == 0 for message in seen)
    assert "red" in json.dumps(seen)


def test_an_answer_takes_no_longer_than_it_may(chat: VideoChat, request: pytest.FixtureRequest) -> None:
    pause = chat.model.register_forward_pre_hook(lambda *_: time.sleep(0.3))
    request.addfinalizer(pause.remove)
    backend = LocalBackend(chat, max_answer_s=0.5)
    *_, last = backend.reply(DEMO, [{"role": "user", "content": "What happens?"}], 8, None)
    assert last.costs is not None
    assert last.costs.num_new_tokens < 5
    assert "the answer ends here" in str(last.notes)
