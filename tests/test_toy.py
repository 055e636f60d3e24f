"""A toy says that it is one, whatever the clip, wherever its answers are read."""

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import hicom
import layouts
import media
import tiny
from hicom import HIComForConditionalGeneration, HIComProcessor, VideoChat, cli
from hicom.model.assemble import plan
from hicom.model.config import HIComConfig
from hicom.model.generation import ToyWarning
from hicom.recipes.tiny import tiny_parts
from hicom.train import run
from hicom.train.assemble import assemble
from served import Served
from toy_training import make_config, make_folder

DEMO = Path(hicom.__file__).parent / "assets" / "demo.mp4"
QUESTION = "What color is the circle?"
NOTE = (
    "this model is a toy made for procedural clips of sprites and coloured shapes; its answers about anything else "
    "mean nothing"
)
UNLIKE = "this video is unlike what the model was trained on"
Command = Callable[..., tuple[str, str]]


@pytest.fixture(scope="module")
def chat() -> VideoChat:
    return VideoChat.from_pretrained("hicom-tiny", device="cpu")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "other.mp4"
    media.write_video(path, 24)
    return path


@pytest.fixture(scope="module")
def plain() -> VideoChat:
    """Return a model that is no toy."""
    model = tiny.model()
    return VideoChat(model, tiny.processor(model.config, num_frames=4))


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    def call(*args: object) -> tuple[str, str]:
        assert cli.main([str(arg) for arg in args]) == 0
        return capfd.readouterr()

    return call


def test_every_answer_of_the_library_brings_it_along(chat: VideoChat, other: Path) -> None:
    for video, more in ((DEMO, []), (other, [UNLIKE])):
        encoded = chat.encode(video)
        answers = [
            chat.ask(encoded, QUESTION),
            *chat.ask(encoded, [QUESTION, "What happens?"]),
            *chat.ask_each([encoded], [QUESTION]),
            *chat.ask(encoded, QUESTION, num_beams=2, num_return_sequences=2),
            chat.reply([{"role": "user", "content": QUESTION}], [encoded]),
            chat.conversation(encoded).ask(QUESTION),
        ]
        pieces = chat.stream_reply([{"role": "user", "content": QUESTION}], [encoded])
        while True:
            try:
                next(pieces)
            except StopIteration as stop:
                answers.append(stop.value)
                break
        for answer in answers:
            assert answer.notes[0] == NOTE
            assert [note.partition(" (")[0] for note in answer.notes[1:]] == more
    assert chat.reply([{"role": "user", "content": "Who?"}]).notes == (NOTE,)  # about no video at all
    notes = chat.ask([chat.encode(DEMO), chat.encode(other), chat.encode(other)], "Who?").notes
    assert len(notes) == 2


def test_python_is_warned_once_a_model() -> None:
    for ask in (ask_chat, ask_transformers):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ask()
        assert [str(each.message) for each in caught if each.category is ToyWarning] == [NOTE]


def ask_chat() -> None:
    chat = VideoChat.from_pretrained("hicom-tiny", device="cpu")
    chat.ask(DEMO, QUESTION)
    chat.ask(DEMO, QUESTION)
    list(chat.stream(DEMO, QUESTION))


def ask_transformers() -> None:
    model = HIComForConditionalGeneration.from_pretrained("hicom-tiny")
    processor = HIComProcessor.from_pretrained("hicom-tiny")
    inputs = processor(text="Who?", return_tensors="pt")
    for _ in range(2):
        model.generate(**inputs, max_new_tokens=2, do_sample=False)


def test_the_command_line_says_it_once_an_answer(command: Command, other: Path, tmp_path: Path) -> None:
    for video, extra, more in ((DEMO, [], 0), (other, ["--low-memory", "--verbose"], 1)):
        _, err = command("ask", video, QUESTION, *extra)
        lines = err.splitlines()
        assert lines[0] == f"note: {NOTE}"
        assert [UNLIKE in line for line in lines[1:]] == [True] * more
    for asked in (("ask", DEMO, QUESTION), ("look", DEMO, QUESTION, "--output", tmp_path / "look.png")):
        out, err = command(*asked, "--json")
        assert json.loads(out)["notes"] == [NOTE]
        assert err == f"note: {NOTE}\n"
    *_, (name, text) = (line.split(maxsplit=1) for line in command("info", "hicom-tiny")[0].splitlines())
    assert (name, text) == ("note", NOTE)


def test_results_of_an_evaluation_hold_it(command: Command, tmp_path: Path) -> None:
    layouts.mlvu(tmp_path / "data")
    options = ["--data-root", tmp_path / "data", "--tasks", "mlvu_dev", "--max-new-tokens", 3]
    out, err = command("eval", "hicom-tiny", *options, "--out", tmp_path / "out")
    assert f"note, 14 of 14 answers: {NOTE}" in out
    assert "warning" not in err
    facts = json.loads((tmp_path / "out" / "mlvu_dev" / "results.json").read_text("utf-8"))
    assert facts["notes"][NOTE] == 14
    assert NOTE[1:] in (tmp_path / "out" / "results.md").read_text("utf-8")
    # Of other models nothing is said.
    out, _ = command("eval", tiny.save(tmp_path / "model"), *options, "--num-frames", 4, "--out", tmp_path / "other")
    assert "note" not in out
    assert json.loads((tmp_path / "other" / "mlvu_dev" / "results.json").read_text("utf-8"))["notes"] == {}


@pytest.fixture(scope="module")
def served(chat: VideoChat) -> Iterator[Served]:
    running = Served(chat, name="hicom-tiny")
    yield running
    running.stop()


def test_answers_of_the_server_hold_it(served: Served, plain: VideoChat) -> None:
    asked = {"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 3, "temperature": 0}
    client = served.client()
    assert client.chat.completions.create(model="hicom-tiny", **asked).notes == [NOTE]
    *_, last = client.chat.completions.create(model="hicom-tiny", stream=True, **asked)
    assert last.notes == [NOTE]
    assert client.models.list().data[0].description == NOTE
    other = Served(plain)
    client = other.client()
    assert "notes" not in client.chat.completions.create(model="tiny", **asked).model_extra
    assert all(
        "notes" not in chunk.model_extra for chunk in client.chat.completions.create(model="tiny", stream=True, **asked)
    )
    assert "description" not in client.models.list().data[0].model_extra
    other.stop()


def test_other_models_say_nothing(plain: VideoChat, other: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ToyWarning)
        assert plain.ask(other, "Who?", max_new_tokens=2).notes == ()
    assert plain.notes() == ()
    assert "toy" not in HIComConfig(toy="").toy_note


def test_it_is_the_checkpoints_own(tmp_path: Path, command: Command) -> None:
    """Recipes write it; further training, exports and parts of a toy keep it."""
    assert HIComConfig(**tiny_parts().config).toy_note == NOTE
    for name in ("hicom-tiny", "hicom-tiny-start"):
        assert HIComConfig.from_pretrained(name).toy_note == NOTE
        assert plan(name, name).toy_note == NOTE
    config = make_config(make_folder(tmp_path / "data"), steps=1)
    assert config.parts is not None
    model, processor = assemble(dataclasses.replace(config.parts, config={"toy": "noise"}))
    first = tmp_path / "first"
    model.save_pretrained(first)
    processor.save_pretrained(first)
    later = run(dataclasses.replace(config, parts=None, init=str(first), out=str(tmp_path / "later")))
    command("convert", "export", later, tmp_path / "export")
    for folder in (first, later, tmp_path / "export"):
        assert "a toy made for noise;" in VideoChat.from_pretrained(folder, device="cpu").notes()[0]
