"""What cannot be HICom's language model is found without weights, or at the latest by comparing logits."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen2Model

import tiny
from hicom.model.config import HIComConfig
from hicom.model.rehearsal import rehearse
from studies import load, unload


@pytest.fixture(scope="module")
def families() -> Iterator[ModuleType]:
    yield load("families")
    unload()


class OddConfig(Qwen2Config):
    model_type = "odd_qwen2"


class OddModel(Qwen2Model):
    config_class = OddConfig


class OddLLM(Qwen2ForCausalLM):
    """A family that nobody knows: what it does is set by its test."""

    config_class = OddConfig
    odd: Any = None

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.model = OddModel(config)
        self.post_init()

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)
        output.logits = type(self).odd(output.logits, input_ids)
        return output


@pytest.fixture
def odd(families: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that assembles a model whose own class does something to logits."""
    AutoConfig.register("odd_qwen2", OddConfig, exist_ok=True)
    AutoModel.register(OddConfig, OddModel, exist_ok=True)
    AutoModelForCausalLM.register(OddConfig, OddLLM, exist_ok=True)

    def make(change: Any) -> tuple[Any, Any]:
        monkeypatch.setattr(OddLLM, "odd", staticmethod(change))
        monkeypatch.setattr("hicom.model.rehearsal.REHEARSED", set())
        sizes = tiny.llm("qwen2").to_dict() | {"vocab_size": 64}
        sizes.pop("model_type")
        llm = families.enlarged(OddLLM(OddConfig(**sizes)))
        return llm, families.assembled(llm)

    return make


def test_an_unknown_family_is_taken_with_what_it_does(odd: Any) -> None:
    llm, model = odd(lambda logits, ids: torch.sin(3 * logits))
    ids = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, llm(input_ids=ids).logits)


def test_an_unknown_family_that_looks_at_tokens_is_refused(odd: Any) -> None:
    with pytest.raises(ValueError, match=r"odd_qwen2 .* computes otherwise from tokens than from their embeddings"):
        odd(lambda logits, ids: logits if ids is None else logits + ids[..., None])
    with pytest.raises(ValueError, match=r"odd_qwen2 .* computes otherwise from tokens"):
        odd(lambda logits, ids: logits * (2.0 if ids is None else 3.0))
    with pytest.raises(ValueError, match=r"odd_qwen2 .* does not run from embeddings alone: AttributeError"):
        odd(lambda logits, ids: logits * ids.ndim)


def test_what_a_run_without_numbers_cannot_say_is_found_by_comparing(odd: Any) -> None:
    with pytest.raises(ValueError, match=r"odd_qwen2 .* logits of the same tokens differ"):
        odd(lambda logits, ids: logits if ids is None else logits * (2 + int(ids.max() >= 0)))
    llm, model = odd(lambda logits, ids: logits * (2 + int(logits.isfinite().all())))
    ids = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, llm(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("gemma4_text", "does not run from embeddings alone"),  # per-layer embeddings
        ("falcon_h1", "computes otherwise from tokens"),  # scales embeddings that it looks up itself
        ("deepseek_v4", "does not run from embeddings alone"),  # chooses experts by token
        ("gpt2, untied", "computes otherwise from tokens"),
    ],
)
def test_families_that_need_tokens_are_refused_before_weights(families: ModuleType, kind: str, reason: str) -> None:
    vision, instruction = tiny.towers("siglip")
    config = families.tiny_config(kind)
    with pytest.raises(ValueError, match=reason):
        rehearse(HIComConfig(vision_config=vision, instruction_config=instruction, text_config=config))


def test_every_compressor_is_rehearsed(families: ModuleType) -> None:
    for fields in (
        {"compressor": "spatial_pool", "window": None},
        {"local_injection": "fine", "global_injection": "fine", "dialect": "release"},
        {"motion_features": True, "match_evidence": True, "num_pointers": 2, "num_word_pointers": 1},
    ):
        rehearse(tiny.config(**fields))
