"""Names of models: embedded ones, folders, and ids of a hub that answers, refuses or is silent (over real HTTP)."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

import hub
import tiny
from hicom.inference import VideoChat
from hicom.model.hub import SETTINGS_FILES, embedded_models, find_model

REPO = "someone/tiny-hicom"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.save(tmp_path_factory.mktemp("hub") / "model")
    (folder / "pytorch_model.bin").write_bytes(b"never asked for")
    (folder / "consolidated.safetensors").write_bytes(b"the same weights, in another layout")
    return folder


@pytest.fixture
def served(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub.Hub]:
    with hub.serve({REPO: saved}, revisions=("main", "v2")) as running:
        hub.use(monkeypatch, running.url, tmp_path / "cache")
        yield running


def test_hub_id_becomes_a_folder(served: hub.Hub, saved: Path) -> None:
    folder = find_model(REPO)
    assert (folder / "config.json").read_text() == (saved / "config.json").read_text()
    assert (folder / "instruction_tokenizer" / "tokenizer.json").is_file()
    assert served.num_bytes(r"\.safetensors$") == (saved / "model.safetensors").stat().st_size
    assert served.num_bytes("pytorch_model|consolidated") == 0
    assert VideoChat.from_pretrained(REPO).model.device.type == "cpu"


def test_settings_alone_are_downloaded_where_they_are_enough(served: hub.Hub) -> None:
    folder = find_model(REPO, files=SETTINGS_FILES)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "hicom"
    assert served.num_bytes(r"\.safetensors") == 0


def test_revision_and_token_reach_the_hub(served: hub.Hub, tmp_path: Path) -> None:
    served.token = "hf_secret"
    with pytest.raises(ValueError, match=r"someone/tiny-hicom: neither a folder nor .*token="):
        find_model(REPO)
    find_model(REPO, revision="v2", token="hf_secret", cache_dir=tmp_path / "elsewhere")
    assert ("GET", f"/api/models/{REPO}/revision/v2", "hf_secret") in served.requests
    assert [*(tmp_path / "elsewhere").glob("models--*/refs/v2")]
    with pytest.raises(ValueError, match="has no revision 'v3'"):
        find_model(REPO, revision="v3", token="hf_secret")


def test_embedded_names_and_folders_never_ask_the_hub(served: hub.Hub, saved: Path) -> None:
    assert embedded_models() == ["hicom-tiny", "hicom-tiny-start"]
    for name in (*embedded_models(), saved, str(saved)):
        assert (find_model(name) / "config.json").is_file()
    VideoChat.from_pretrained("hicom-tiny")
    assert served.requests == []


@pytest.mark.parametrize("name", ["hicom-tinny", "./nowhere", "/no/where", "a/b/c", "some one/model", "", "org/"])
def test_what_is_no_name_of_a_model_never_asks_the_hub(served: hub.Hub, name: str) -> None:
    with pytest.raises(ValueError, match=r"no such model folder.*hicom-tiny"):
        find_model(name)
    assert served.requests == []


def test_revision_of_a_folder_is_refused(saved: Path) -> None:
    for name in (saved, "hicom-tiny"):
        with pytest.raises(ValueError, match="revision='v2' goes with a hub id"):
            find_model(name, revision="v2")


def test_silent_hub_fails_once_and_quickly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub.silent() as url:
        hub.use(monkeypatch, url, tmp_path)
        start = time.perf_counter()
        with pytest.raises(ValueError, match=rf"{REPO}: no such folder here.*{url} does not answer"):
            find_model(REPO)
        assert time.perf_counter() - start < 4  # one time-out of 1 s; a second one, or a wait before it, would show


def test_hub_that_is_down_fails_once_and_quickly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub.silent() as url:
        pass
    hub.use(monkeypatch, url, tmp_path)
    start = time.perf_counter()
    with pytest.raises(ValueError, match="does not answer"):
        VideoChat.from_pretrained(REPO)
    assert time.perf_counter() - start < 3


def test_earlier_download_serves_where_the_hub_does_not(served: hub.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = find_model(REPO)
    with hub.silent() as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        with pytest.warns(UserWarning, match="an earlier download is taken, which may be outdated"):
            assert find_model(REPO) == folder
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert find_model(REPO) == folder
        with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
            find_model("someone/else")


def test_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter \(LoRA\).*hicom convert merge BASE"):
        VideoChat.from_pretrained(tmp_path)
