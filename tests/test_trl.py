"""TRL's trainers take the model, the processor and pictures as they are; docs/callers.md runs as printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny
from hicom.model.modeling import HIComModel
from hicom.model.processing import CHAT_TEMPLATE, HIComProcessor
from hicom.train.prompt_steering import steered_by_prompts

PAGE = (Path(__file__).parents[1] / "docs" / "callers.md").read_text(encoding="utf-8")
BLOCKS = [block for block in re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S) if "trl" in block]
OPTIONS: dict[str, Any] = {
    "report_to": [],
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "learning_rate": 1e-2,
}
QUESTIONS = ("which object moves left ?", "is there a dog ?", "what is red ?")


def letters() -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes: what it decodes is what was encoded, as with those of real LLMs."""
    vocabulary = [*tiny.SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    base = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, [], unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=base,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<video>", "<image>"],
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose LLM reads bytes."""
    config = tiny.config()
    config.text_config.vocab_size = len(letters())
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    tiny.HIComForConditionalGeneration(config).save_pretrained(path)
    HIComProcessor.from_config(config, letters(), tiny.tokenizer(), num_frames=4).save_pretrained(path)
    return path


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8))


def say(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def test_prompts_steer_as_the_processor_does(folder: Path) -> None:
    """Logits with the instruction read from the prompt are those with the processor's, media of several prompts."""
    model = tiny.HIComForConditionalGeneration.from_pretrained(folder).eval()
    processor = HIComProcessor.from_pretrained(folder)
    turns = [
        [
            {
                "role": "user",
                "content": [*({"type": "image", "image": picture(i)} for i in shown), {"type": "text", "text": q}],
            }
        ]
        for shown, q in zip(((0,), (1, 2), ()), QUESTIONS, strict=True)
    ]
    inputs = dict(
        processor.apply_chat_template(
            turns, tokenize=True, return_dict=True, add_generation_prompt=True, **tiny.TENSORS
        )
    )
    expected = model(**inputs).logits
    lost = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with pytest.raises(ValueError, match="steered by the instruction"):
        model(**lost)
    with steered_by_prompts(model, processor):
        torch.testing.assert_close(model(**lost).logits, expected)
        other = {**inputs, "image_instruction_input_ids": inputs["image_instruction_input_ids"].flip(0)}
        assert not torch.allclose(model(**other).logits, expected), "what is passed goes first"
    with pytest.raises(ValueError, match="steered by the instruction"):
        model(**lost)
    with (
        pytest.raises(ValueError, match="Linear holds no HICom model"),
        steered_by_prompts(torch.nn.Linear(1, 1), processor),
    ):
        pass


@pytest.fixture
def steering(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The instructions of all images that reach a model."""
    seen: list[list[int]] = []
    plain = HIComModel.get_image_features

    def watched(model: HIComModel, pixels: Any, instruction_input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        seen.extend(instruction_input_ids.tolist())
        return plain(model, pixels, instruction_input_ids, *args, **kwargs)

    monkeypatch.setattr(HIComModel, "get_image_features", watched)
    return seen


def run_block(number: int, folder: Path, out: Path, **names: Any) -> dict[str, Any]:
    """Run a block of the page, and return its names."""
    given = {"FOLDER": str(folder), "OUT": str(out), "OPTIONS": OPTIONS, **names}
    exec(compile(BLOCKS[number], "docs/callers.md", "exec"), given)
    return given


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def check_steering(steering: list[list[int]], trainer: Any) -> None:
    """The questions steer, nothing else, and all of them do."""
    own = trainer.processing_class.instruction_inputs(QUESTIONS)[0].tolist()
    assert {tuple(ids) for ids in steering} == {tuple(ids) for ids in own}


def datasets(kind: str) -> Any:
    """Return six samples in TRL's columns."""
    from datasets import Dataset

    rows: dict[str, Any] = {
        "messages": lambda q: {"messages": say("user", q) + say("assistant", "a dog")},
        "completion": lambda q: {"prompt": say("user", q), "completion": say("assistant", "a dog")},
        "preference": lambda q: {
            "prompt": say("user", q),
            "chosen": say("assistant", "a dog"),
            "rejected": say("assistant", "no"),
        },
        "prompt": lambda q: {"prompt": say("user", q)},
    }
    return Dataset.from_list([{"images": [picture(i)], **rows[kind](QUESTIONS[i % 3])} for i in range(6)])


@pytest.mark.trl
@pytest.mark.parametrize("kind", ["messages", "completion"])
def test_sft_and_dpo(folder: Path, tmp_path: Path, kind: str, steering: list[list[int]]) -> None:
    names = run_block(0, folder, tmp_path, SFT_DATASET=datasets(kind), DPO_DATASET=datasets("preference"))
    assert len(losses(names["trainer"])) == 3
    assert all(np.isfinite(losses(names["trainer"])))
    assert losses(names["trainer"])[-1] < losses(names["trainer"])[0]
    check_steering(steering, names["trainer"])


@pytest.mark.trl
def test_sft_on_text_alone(folder: Path, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=str(folder),
        train_dataset=datasets("messages").remove_columns("images"),
        args=SFTConfig(output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, **OPTIONS),
    )
    assert isinstance(trainer.processing_class, HIComProcessor), "found by the Auto class"
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


@pytest.mark.trl
def test_grpo(folder: Path, tmp_path: Path, steering: list[list[int]]) -> None:
    def reward(completions: list[Any], **kwargs: Any) -> list[float]:
        return [float(sum(map(ord, completion[0]["content"])) % 7) for completion in completions]

    names = run_block(1, folder, tmp_path, REWARD=reward, GRPO_DATASET=datasets("prompt"))
    found = losses(names["trainer"])
    assert len(found) == 3
    assert all(np.isfinite(found))
    assert any(entry.get("grad_norm", 0) > 0 for entry in names["trainer"].state.log_history)
    check_steering(steering, names["trainer"])  # while answers are made and when they are scored
