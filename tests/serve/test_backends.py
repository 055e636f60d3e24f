"""What stands behind the web page: answers, costs and pictures of a model here, and of one behind an endpoint."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import hicom
import media
from hicom import VideoChat
from hicom.serve.backends import Budget, LocalBackend, RemoteBackend, Update
from hicom.serve.media import MediaLimits
from served import Served

DEMO = Path(hicom.__file__).parent / "assets" / "demo.mp4"
QUESTION = "What color is the circle?"


@pytest.fixture(scope="module")
def chat() -> VideoChat:
    return VideoChat.from_pretrained("hicom-tiny", device="cpu")


@pytest.fixture
def local(chat: VideoChat) -> LocalBackend:
    return LocalBackend(chat, name="hicom-tiny")


@pytest.fixture(scope="module")
def served(chat: VideoChat) -> Iterator[Served]:
    running = Served(chat, name="hicom-tiny", api_key="secret")
    yield running
    running.stop()


@pytest.fixture
def remote(served: Served) -> RemoteBackend:
    return RemoteBackend(served.url, api_key="secret")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def last(updates: Iterator[Update]) -> Update:
    *_, found = updates
    return found


def test_pieces_grow_into_the_answer_then_costs_then_a_picture(local: LocalBackend, chat: VideoChat) -> None:
    expected = chat.ask(DEMO, "What happens?")
    updates = list(local.reply(DEMO, [user("What happens?")], 8, None))
    texts = [update.text for update in updates]
    assert texts[-1] == expected.text
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert len(set(texts)) > 3, "it came in one piece"
    assert [update.costs is not None for update in updates[-3:]] == [False, True, True]
    assert [update.picture is not None for update in updates[-3:]] == [False, False, True]
    costs = updates[-1].costs
    assert costs is not None
    assert costs.num_visual_tokens == expected.num_visual_tokens == 16
    assert costs.num_uncompressed_tokens == 512
    assert costs.num_prompt_tokens == expected.num_prompt_tokens
    assert costs.window == expected.window
    assert set(costs.timings) >= {"decode", "vision encoder", "compressor", "LLM"}
    picture = updates[-1].picture
    assert picture is not None
    assert min(picture.size) > 500
    assert np.asarray(picture).std() > 20


def test_the_picture_is_of_the_last_question(local: LocalBackend) -> None:
    turns = [user(QUESTION), {"role": "assistant", "content": "red"}, user("Which way does it move?")]
    first, second = last(local.reply(DEMO, turns[:1], 8, None)), last(local.reply(DEMO, turns, 8, None))
    assert first.picture is not None
    assert second.picture is not None
    assert first.picture.tobytes() != second.picture.tobytes()


def test_turns_before_count(local: LocalBackend, chat: VideoChat) -> None:
    turns = [user(QUESTION), {"role": "assistant", "content": "red"}, user("Which way does it move?")]
    expected = chat.reply(turns, [chat.encode(DEMO)])
    found = last(local.reply(DEMO, turns, 8, None))
    assert found.text == expected.text
    assert found.costs is not None
    assert found.costs.num_prompt_tokens == expected.num_prompt_tokens


@pytest.mark.parametrize("num_frames", [1, 8, 20])
def test_the_budget_is_kept_to_and_can_be_reached(local: LocalBackend, num_frames: int) -> None:
    budget = local.budget(num_frames)
    assert budget is not None
    assert budget.least < budget.most == num_frames * 64
    for most in (budget.least, budget.usual, budget.most):
        costs = last(local.reply(DEMO, [user(QUESTION)], num_frames, most)).costs
        assert costs is not None
        assert costs.num_visual_tokens is not None
        assert costs.num_visual_tokens <= most
    with pytest.raises(ValueError, match="max_visual_tokens"):
        last(local.reply(DEMO, [user(QUESTION)], num_frames, budget.least - 1))


def test_budget_of_the_shipped_model(local: LocalBackend) -> None:
    assert local.budget(8) == Budget(least=9, usual=16, most=512)


def test_a_video_is_encoded_once(chat: VideoChat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, calls = chat.encode, []
    monkeypatch.setattr(chat, "encode", lambda *args, **kwargs: calls.append(args) or encode(*args, **kwargs))
    backend = LocalBackend(chat, kept_videos=1)
    for question in (QUESTION, "What happens?"):
        last(backend.reply(DEMO, [user(question)], 8, None))
    assert len(calls) == 1
    media.write_video(tmp_path / "other.mp4", 12)
    last(backend.reply(tmp_path / "other.mp4", [user(QUESTION)], 8, None))
    last(backend.reply(DEMO, [user(QUESTION)], 8, None))
    assert len(calls) == 3, "one video is kept, so the first had to go"


def test_videos_unlike_training_are_told_of(local: LocalBackend, tmp_path: Path) -> None:
    media.write_video(tmp_path / "other.mp4", 24)
    found = last(local.reply(tmp_path / "other.mp4", [user(QUESTION)], 8, None))
    toy, unlike = found.notes
    assert "unlike what the model was trained on" in unlike
    assert last(local.reply(DEMO, [user(QUESTION)], 8, None)).notes == (toy,)
    assert toy == local.chat.model.config.toy_note
    assert "This model is a toy made for procedural clips of sprites" in local.about


def test_an_endpoint_tells_of_its_toy_too(remote: RemoteBackend, tmp_path: Path) -> None:
    media.write_video(tmp_path / "other.mp4", 24)
    toy, unlike = last(remote.reply(tmp_path / "other.mp4", [user(QUESTION)], 8, None)).notes
    assert toy.startswith("this model is a toy made for procedural clips of sprites")
    assert "unlike what the model was trained on" in unlike
    assert last(remote.reply(DEMO, [user(QUESTION)], 8, None)).notes == (toy,)
    assert "This model is a toy made for procedural clips of sprites" in remote.about


def test_videos_that_are_refused(chat: VideoChat, tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"nothing" * 100)
    backend = LocalBackend(chat, limits=MediaLimits(max_duration_s=1))
    with pytest.raises(ValueError, match="no video or picture"):
        last(backend.reply(tmp_path / "broken.mp4", [user(QUESTION)], 8, None))
    with pytest.raises(ValueError, match="at most 1 s"):
        last(backend.reply(DEMO, [user(QUESTION)], 8, None))
    with pytest.raises(ValueError, match="300 frames are asked for; 1 to 256"):
        last(backend.reply(DEMO, [user(QUESTION)], 300, None))


def test_closing_stops_the_generation(local: LocalBackend) -> None:
    updates = local.reply(DEMO, [user("What happens?")], 8, None)
    next(updates)
    updates.close()  # type: ignore[attr-defined]
    assert last(local.reply(DEMO, [user(QUESTION)], 8, None)).text == "red"


def test_an_endpoint_answers_the_same(local: LocalBackend, remote: RemoteBackend) -> None:
    assert remote.name == "hicom-tiny"
    turns = [user(QUESTION), {"role": "assistant", "content": "red"}, user("What happens?")]
    for messages, most in ((turns[:1], None), (turns, None), (turns, 30)):
        here, there = last(local.reply(DEMO, messages, 8, most)), last(remote.reply(DEMO, messages, 8, most))
        assert there.text == here.text
        assert there.costs is not None
        assert here.costs is not None
        for name in ("num_prompt_tokens", "num_new_tokens", "num_visual_tokens", "num_uncompressed_tokens"):
            assert getattr(there.costs, name) == getattr(here.costs, name), name
        assert set(there.costs.timings) == {"first token", "rest of the answer"}


def test_an_endpoint_gets_the_number_of_frames(remote: RemoteBackend) -> None:
    found = last(remote.reply(DEMO, [user(QUESTION)], 4, None)).costs
    assert found is not None
    assert found.num_uncompressed_tokens == 4 * 64


def test_what_an_endpoint_refuses_is_told(served: Served, remote: RemoteBackend, tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"nothing" * 100)
    with pytest.raises(ValueError, match=r"^the file is no video or picture that can be read$"):
        last(remote.reply(tmp_path / "broken.mp4", [user(QUESTION)], 8, None))
    with pytest.raises(ValueError, match="the API key is missing or wrong"):
        RemoteBackend(served.url, api_key="wrong")
    with pytest.raises(ValueError, match="does not answer as it should"):
        RemoteBackend("http://127.0.0.1:9/v1", timeout_s=2)
    small = RemoteBackend(served.url, api_key="secret", max_bytes=1000)
    with pytest.raises(ValueError, match="at most 1,000 are sent"):
        last(small.reply(DEMO, [user(QUESTION)], 8, None))
    other = RemoteBackend(served.url, api_key="secret", model="other")
    with pytest.raises(ValueError, match="there is no model 'other'"):
        last(other.reply(DEMO, [user(QUESTION)], 8, None))
