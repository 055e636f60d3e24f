"""Names of embedded models, wherever transformers, PEFT and this library take a name; the hub is never asked."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModel, LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
)

import hicom
from hicom import HIComConfig, HIComForConditionalGeneration, HIComModel, HIComProcessor, cli
from hicom.inference import VideoChat
from hicom.model.assemble import assemble, plan
from hicom.model.hub import embedded_models, find_model
from hicom.train.assemble import assemble as assemble_parts
from hicom.train.config import Parts

NAME = "hicom-tiny"


@pytest.fixture(autouse=True)
def unplugged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be asked for; the hub's own switch is off, so that it would be."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"the network was asked: {args}")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    hicom.register()
    hicom.register()  # twice changes nothing


@pytest.fixture
def adapter(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """Return an adapter that PEFT wrote, which names its base, and the logits of base and adapter."""
    base = HIComForConditionalGeneration.from_pretrained(NAME, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(target_modules=r".*language_model.*\.q_proj", init_lora_weights=False))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[7, 8, 9]])).logits
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": NAME}))
    return tmp_path / "adapter", logits


@pytest.mark.parametrize(
    ("auto", "kind"),
    [
        (AutoConfig, HIComConfig),
        (AutoProcessor, HIComProcessor),
        (AutoModel, HIComModel),
        (AutoModelForImageTextToText, HIComForConditionalGeneration),
        (AutoModelForMultimodalLM, HIComForConditionalGeneration),
        (HIComConfig, HIComConfig),
        (HIComProcessor, HIComProcessor),
        (HIComModel, HIComModel),
        (HIComForConditionalGeneration, HIComForConditionalGeneration),
    ],
)
def test_classes_find_it(auto: Any, kind: type) -> None:
    assert type(auto.from_pretrained(NAME)) is kind
    assert type(auto.from_pretrained(pretrained_model_name_or_path=NAME)) is kind


def test_its_tokenizer_is_the_language_models() -> None:
    expected = HIComProcessor.from_pretrained(NAME).tokenizer
    assert AutoTokenizer.from_pretrained(NAME).get_vocab() == expected.get_vocab()


def test_other_names_go_their_way(tmp_path: Path) -> None:
    folder = shutil.copytree(find_model(NAME), tmp_path / "copy")
    assert type(AutoConfig.from_pretrained(folder)) is HIComConfig
    with pytest.raises(OSError, match="someone/else"):
        AutoConfig.from_pretrained("someone/else")


def test_an_adapter_names_its_base(adapter: tuple[Path, torch.Tensor]) -> None:
    folder, logits = adapter
    trusted = {"import_allowlist": ["hicom.model.modeling"]}  # PEFT's own guard
    for model in (
        AutoModelForImageTextToText.from_pretrained(folder),
        AutoModelForImageTextToText.from_pretrained(str(folder)),
        AutoPeftModel.from_pretrained(folder, **trusted),
    ):
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=torch.tensor([[7, 8, 9]])).logits, logits)


@pytest.mark.parametrize("name", embedded_models())
def test_parts_are_taken_from_it(name: str) -> None:
    fields: dict[str, Any] = {"window": (2, 4, 4), "num_global_tokens": 4, "dtype": torch.float32}
    donor = HIComForConditionalGeneration.from_pretrained(name, dtype=torch.float32)
    config = plan(name, name, **fields)
    model, _ = assemble(name, name, compressor_from=name, **fields)
    assert config.text_config.hidden_size == model.config.text_config.hidden_size
    parts, _ = assemble_parts(Parts(towers=name, language_model=name))
    for made in (model, parts):
        assert torch.equal(made.lm_head.weight, donor.lm_head.weight)
        ids = torch.tensor([[7, 8, 9]])
        with torch.no_grad():
            torch.testing.assert_close(made(input_ids=ids).logits, donor(input_ids=ids).logits)


def test_commands_take_it(
    adapter: tuple[Path, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--window", "2", "4", "4", "--num-global-tokens", "4"]
    start = str(tmp_path / "start")
    assert cli.main(["convert", "assemble", "--vision", NAME, "--llm", NAME, "--dst", start, *small]) == 0
    assert cli.main(["convert", "export", NAME, str(tmp_path / "export")]) == 0
    assert cli.main(["convert", "assemble", "--vision", "hicom-tny", "--llm", NAME, "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert "there is no model in hicom-tny to take the towers from" in error
    assert NAME in error, "the names that there are"
    assert VideoChat.from_pretrained(start).model.config.window == (2, 4, 4)
