"""The page, used in a headless Chromium as a person would."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

import hicom
import media
from hicom import VideoChat

pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")

pytestmark = pytest.mark.browser
DEMO = Path(hicom.__file__).parent / "assets" / "demo.mp4"
QUESTION = "What color is the circle?"
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"]
SHOTS = os.environ.get("HICOM_SCREENSHOTS")
"""Folder for pictures to look at."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(*command: str, port: int, **environment: str) -> Iterator[None]:
    """Run a `hicom` command that listens, until it listens."""
    process = subprocess.Popen(
        [sys.executable, "-m", "hicom", *command, "--port", str(port)], env=os.environ | environment
    )
    try:
        deadline = time.monotonic() + 90
        while True:
            assert process.poll() is None
            assert time.monotonic() < deadline
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def chat() -> VideoChat:
    return VideoChat.from_pretrained("hicom-tiny", device="cpu")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    port = free_port()
    with running("web", "--device", "cpu", "--max-mb", "2", port=port):
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield found
        found.close()


class Page:
    """The page in a browser.

    Args:
        tab: of the browser.
        address: of the page.
    """

    def __init__(self, tab: Any, address: str) -> None:
        self.tab = tab
        self.errors: list[str] = []
        self.hosts: set[str] = set()
        tab.on("pageerror", lambda error: self.errors.append(str(error)))
        # Blobs and data have no host.
        tab.on("request", lambda request: self.hosts.add(urlsplit(request.url).hostname or "127.0.0.1"))
        tab.goto(address)
        tab.wait_for_selector("#question textarea")

    def upload(self, path: Path, *, is_playable: bool = True) -> None:
        if self.tab.locator("#video video").count():
            self.tab.click("#video button[aria-label=Clear]")
        self.tab.set_input_files("#video input[type=file]", str(path))
        self.tab.wait_for_selector("#video video")
        if is_playable:
            self.tab.wait_for_function("document.querySelector('#video video').readyState >= 2")

    def ask(self, question: str) -> str:
        """Ask, wait for the answer and what belongs to it, and return it."""
        number = self.tab.locator("#talk .bot").count()
        before = self.tab.locator("#picture img").get_attribute("src") if self.has_picture() else None
        self.tab.fill("#question textarea", question)
        self.tab.keyboard.press("Enter")
        self.tab.wait_for_function("n => document.querySelectorAll('#talk .bot').length > n", arg=number)
        self.tab.wait_for_function("document.querySelector('#meter').innerText.includes('prompt')")
        if self.tab.locator("#picture").count():
            self.tab.wait_for_function(
                "s => { const i = document.querySelector('#picture img'); return i && i.complete && i.src !== s }",
                arg=before,
            )
        return str(self.tab.locator("#talk .bot").last.inner_text()).strip()

    def has_picture(self) -> bool:
        return bool(self.tab.locator("#picture img").count())

    def text(self, name: str) -> str:
        return str(self.tab.inner_text(f"#{name}"))

    def set_slider(self, name: str, value: int) -> None:
        field = self.tab.locator(f"#{name} input[type=number]")
        field.fill(str(value))
        field.press("Enter")
        field.blur()

    def shot(self, name: str) -> Any:
        folder = Path(SHOTS) if SHOTS else None
        data = self.tab.screenshot(full_page=True, path=folder and folder / f"{name}.png")
        return data


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Page]:
    tab = browser.new_page(viewport={"width": 1280, "height": 1000})
    tab.set_default_timeout(30_000)
    found = Page(tab, address)
    yield found
    tab.close()
    assert found.errors == []
    assert found.hosts == {"127.0.0.1"}, "it asked elsewhere"


def test_a_question_is_answered_with_its_costs_and_a_picture(page: Page, chat: VideoChat, tmp_path: Path) -> None:
    page.shot("empty")
    assert page.text("plan") == "8 frames, 16 visual tokens of 512"
    page.upload(DEMO)
    expected = chat.ask(DEMO, QUESTION)
    assert page.ask(QUESTION) == expected.text
    assert "16 visual tokens of 512 without compression (32.0 times fewer)" in page.text("meter")
    assert f"prompt {expected.num_prompt_tokens} tokens · answer {expected.num_new_tokens}" in page.text("meter")
    for part in ("decode", "vision encoder", "compressor", "LLM"):
        assert re.search(rf"{part}\s+[\d,]+ ms", page.text("times")), part
    (tmp_path / "picture.png").write_bytes(page.tab.locator("#picture img").screenshot())
    assert np.asarray(Image.open(tmp_path / "picture.png").convert("RGB")).std() > 20
    page.shot("answer")


def test_turns_follow_each_other_until_a_new_conversation(page: Page, chat: VideoChat) -> None:
    page.upload(DEMO)
    page.ask(QUESTION)
    turns = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "Which way does it move?"},
    ]
    expected = chat.reply(turns, [chat.encode(DEMO)])
    assert page.ask("Which way does it move?") == expected.text
    assert f"prompt {expected.num_prompt_tokens} tokens" in page.text("meter")
    assert page.tab.locator("#talk .bot").count() == 2
    page.tab.click("#clear")
    page.tab.wait_for_function("document.querySelectorAll('#talk .bot').length == 0")
    page.tab.wait_for_function("document.querySelector('#meter').innerText.trim() == ''")
    page.ask(QUESTION)
    assert f"prompt {chat.ask(DEMO, QUESTION).num_prompt_tokens} tokens" in page.text("meter")


def test_frames_and_budget(page: Page) -> None:
    page.upload(DEMO)
    page.set_slider("frames", 4)
    page.tab.wait_for_function("document.querySelector('#plan').innerText.includes('of 256')")
    page.set_slider("budget", 40)
    page.tab.wait_for_function("document.querySelector('#plan').innerText.includes('at most 40')")
    page.ask(QUESTION)
    found = re.search(r"(\d+) visual tokens of 256", page.text("meter"))
    assert found is not None
    assert 20 < int(found[1]) <= 40
    page.shot("budget")
    page.set_slider("budget", 3)
    page.tab.wait_for_function("document.querySelector('#plan').innerText.includes('need at least 9')")


def test_what_is_wrong_is_told_and_the_question_stays(page: Page, tmp_path: Path) -> None:
    page.tab.fill("#question textarea", QUESTION)
    page.tab.keyboard.press("Enter")
    page.tab.wait_for_selector("text=Choose a video first.")
    assert page.tab.input_value("#question textarea") == QUESTION
    (tmp_path / "broken.mp4").write_bytes(b"nothing" * 100)
    page.upload(tmp_path / "broken.mp4", is_playable=False)
    page.tab.fill("#question textarea", QUESTION)
    page.tab.keyboard.press("Enter")
    page.tab.wait_for_selector("text=The file is no video or picture that can be read.")
    assert page.tab.input_value("#question textarea") == QUESTION
    assert page.tab.locator("#talk .bot").count() == 0
    page.shot("broken")
    page.upload(DEMO)
    assert page.ask(QUESTION) == "red"


def test_too_large_a_file_is_refused(page: Page, tmp_path: Path) -> None:
    (tmp_path / "large.mp4").write_bytes(DEMO.read_bytes() + bytes(3 * 10**6))
    page.tab.set_input_files("#video input[type=file]", str(tmp_path / "large.mp4"))
    page.tab.wait_for_selector("text=/exceed|too large|maximum/i")


def test_a_video_unlike_training_is_told_of(page: Page, tmp_path: Path) -> None:
    media.write_video(tmp_path / "other.mp4", 24)
    page.upload(tmp_path / "other.mp4")
    page.ask(QUESTION)
    assert "unlike what the model was trained on" in page.text("meter")
    page.shot("caution")


def test_questions_are_text_not_code(page: Page) -> None:
    page.upload(DEMO)
    page.ask("<img src=x onerror=\"document.title='taken'\"> What happens?")
    time.sleep(0.5)
    assert page.tab.title() != "taken"


def test_two_people_have_their_own_conversations(page: Page, browser: Any, address: str) -> None:
    tab = browser.new_page()
    tab.set_default_timeout(30_000)
    other = Page(tab, address)
    page.upload(DEMO)
    other.upload(DEMO)
    page.ask(QUESTION)
    other.ask("What happens?")
    assert page.tab.locator("#talk .bot").count() == other.tab.locator("#talk .bot").count() == 1
    tab.close()


def test_a_narrow_window(browser: Any, address: str) -> None:
    tab = browser.new_page(viewport={"width": 400, "height": 800})
    tab.set_default_timeout(30_000)
    page = Page(tab, address)
    page.upload(DEMO)
    page.ask(QUESTION)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 400
    page.shot("narrow")
    tab.close()


def test_a_model_behind_an_endpoint(browser: Any) -> None:
    first, second = free_port(), free_port()
    served = running("serve", "hicom-tiny", "--engine", "local", "--device", "cpu", port=first, HICOM_API_KEY="secret")
    shown = running("web", "--endpoint", f"http://127.0.0.1:{first}/v1", port=second, HICOM_API_KEY="secret")
    with served, shown:
        tab = browser.new_page(viewport={"width": 1280, "height": 1000})
        tab.set_default_timeout(30_000)
        page = Page(tab, f"http://127.0.0.1:{second}/")
        page.upload(DEMO)
        assert page.ask(QUESTION) == "red"
        assert "16 visual tokens of 512" in page.text("meter")
        assert re.search(r"first token\s+[\d,]+ ms", page.text("times"))
        assert not page.has_picture()
        page.shot("endpoint")
        tab.close()


def test_wrong_options(capfd: pytest.CaptureFixture[str]) -> None:
    from hicom import cli

    for options, message in (
        (["--endpoint", "http://127.0.0.1:9/v1"], "does not answer as it should"),
        (["--api-key-file", "x"], "--api-key-file is for --endpoint"),
        (["--endpoint", "http://127.0.0.1:9/v1", "--device", "cpu"], "are for models of this machine"),
        (["no-such-model"], "no-such-model"),
        (["--max-mb", "0"], "--max-mb"),
    ):
        assert cli.main(["web", "--port", str(free_port()), *options]) == 2
        assert message in capfd.readouterr().err
