"""Logits and loss of an assembled model are those of its language model's own class, whatever that does with them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import tiny
from hicom.model.config import HIComConfig
from hicom.model.modeling import HIComForConditionalGeneration
from hicom.model.tail import Tail
from studies import load, unload

IDS = torch.tensor([[7, 9, 11, 8, 12]])
POSTPROCESSED = {
    "granite": "divides logits, scales embeddings and residuals",
    "hyperclovax": "multiplies logits by a field of the same name",
    "minicpm3": "divides hidden states",
    "cohere": "multiplies logits",
    "gemma2": "caps logits, scales embeddings in the embedding itself",
    "inkling_text": "crops the vocabulary",
}


@pytest.fixture(scope="module")
def families() -> Iterator[ModuleType]:
    yield load("families")
    unload()


def parts(families: ModuleType, kind: str, **fields: Any) -> tuple[Any, HIComForConditionalGeneration]:
    """Return a tiny language model and the HICom model around it; weights are shared."""
    torch.manual_seed(0)
    config = families.tiny_config(kind)
    config.update(fields)
    llm = families.enlarged(AutoModelForCausalLM.from_config(config))
    return llm, families.assembled(llm)


@pytest.mark.parametrize("kind", POSTPROCESSED)
def test_a_family_is_the_language_model_itself(families: ModuleType, kind: str) -> None:
    row = families.family(kind)
    assert row["outcome"] == "taken", row
    assert families.is_exact(row), row


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_family_is_exact_or_refused(families: ModuleType) -> None:
    for name in families.names():
        row = families.family(name)
        assert row["outcome"] != "failed", row
        assert row["outcome"] != "taken" or families.is_exact(row), row


def test_what_is_compared_would_show_a_plain_matrix(families: ModuleType) -> None:
    """The families above do something to logits: without it these would differ."""
    for kind in POSTPROCESSED:
        _, model = parts(families, kind)
        with torch.no_grad():
            plain = model.lm_head(model.model(input_ids=IDS).last_hidden_state)
            found = model(input_ids=IDS).logits
        assert plain.shape != found.shape or not torch.allclose(plain, found, rtol=0.01), kind


def test_the_loss_balances_experts_where_the_configuration_says_so(families: ModuleType) -> None:
    llm, model = parts(families, "mixtral", output_router_logits=True, router_aux_loss_coef=0.5)
    mask = torch.tensor([[0, 1, 1, 1, 1]])
    with torch.no_grad():
        expected = llm(input_ids=IDS, attention_mask=mask, labels=IDS)
        found = model(input_ids=IDS, attention_mask=mask, labels=IDS)
        plain = llm(input_ids=IDS, attention_mask=mask, labels=IDS, output_router_logits=False)
    torch.testing.assert_close(found.loss, expected.loss)
    assert abs(float(expected.loss - plain.loss)) > 0.1


def test_another_output_matrix_is_read_through(families: ModuleType) -> None:
    """Adapters on it, larger vocabularies and matrices put in its place all count, and gradients reach them."""
    _, model = parts(families, "granite", tie_word_embeddings=False)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
    model.resize_token_embeddings(families.VOCABULARY + 3)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits[..., : families.VOCABULARY], before)
    assert model(input_ids=IDS, labels=IDS).loss.isfinite()
    adapted = get_peft_model(model, LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    loss = adapted(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad is not None for name, p in adapted.named_parameters() if "lm_head.lora" in name)
    with torch.no_grad():
        expected = adapted(input_ids=IDS).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_reads_its_own_matrix(families: ModuleType, duplicate: Any) -> None:
    _, model = parts(families, "granite", tie_word_embeddings=False)
    twin = duplicate(model)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        torch.testing.assert_close(twin(input_ids=IDS).logits, before)
        twin.lm_head.weight.zero_()
        assert not twin(input_ids=IDS).logits.any()
        torch.testing.assert_close(model(input_ids=IDS).logits, before)


def test_names_of_weights_are_what_they_were(families: ModuleType) -> None:
    model = tiny.model()
    assert not any("tail" in name for name in model.state_dict())
    assert not any("tail" in name for name, _ in model.named_modules())


def test_a_state_that_cannot_take_tokens_back_is_not_assisted(families: ModuleType) -> None:
    _, model = parts(families, "qwen3_next")
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(input_ids=IDS, prompt_lookup_num_tokens=2, max_new_tokens=3)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("gpt2", "that is not called embed_tokens"),
        ("bloom", "that is not called embed_tokens"),
        ("falcon", "that is not called embed_tokens"),
        ("mamba", "that is not called embed_tokens"),
        ("opt", "that is not called embed_tokens"),
        ("bart", "no decoder that AutoModel loads alone"),
        ("phi", "does not end in a plain output matrix"),
        ("dory", "does not end in a plain output matrix"),  # a class made of the plain one
        ("minimax", "a cache of its own kind"),
    ],
)
def test_what_is_built_otherwise_is_refused(families: ModuleType, kind: str, reason: str) -> None:
    """Also without `assemble`: no model can be made of such a configuration."""
    config = families.tiny_config(kind)
    with pytest.raises(ValueError, match=f"{kind} cannot be HICom's language model: .*{reason}"):
        Tail(config)
    vision, instruction = tiny.towers("siglip")
    hicom = HIComConfig(vision_config=vision, instruction_config=instruction, text_config=config)
    with pytest.raises(ValueError, match=reason):
        HIComForConditionalGeneration(hicom)
