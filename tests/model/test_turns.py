"""The last user turn of prompts of every chat template."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from transformers import PreTrainedTokenizerFast

from chat_templates import FAMILIES, TAKES_NO_SYSTEM, Family
from hicom.model.turns import TurnWarning, UserTurns, warn_of_foreign_marks

REMEDY = "pass instruction"


def byte_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """Return a tokenizer that keeps every text letter by letter."""
    alphabet = sorted(ByteLevel.alphabet())
    base = Tokenizer(BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    base.pre_tokenizer = ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    specials = [AddedToken(each, special=True, normalized=False) for each in ("<video>", "<image>", *family.specials)]
    return PreTrainedTokenizerFast(
        tokenizer_object=base,
        bos_token=family.bos,
        eos_token=family.eos,
        additional_special_tokens=specials,
        chat_template=family.template,
        clean_up_tokenization_spaces=False,
    )


TOKENIZERS = {name: byte_tokenizer(family) for name, family in FAMILIES.items()}


def message(role: str, content: str, tokenizer: Any) -> dict[str, Any]:
    parts = "selectattr" in tokenizer.chat_template
    return {"role": role, "content": [{"type": "text", "text": content}] if parts else content}


def render(name: str, *turns: str, system: str | None = None, answered: bool = False) -> str:
    """Return a prompt of turns of user and assistant."""
    tokenizer = TOKENIZERS[name]
    messages = [] if system is None else [message("system", system, tokenizer)]
    messages += [message("assistant" if n % 2 else "user", text, tokenizer) for n, text in enumerate(turns)]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not answered))


def last(name: str, prompt: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return UserTurns.of(TOKENIZERS[name]).last(prompt, REMEDY)


def through(name: str, prompt: str) -> str:
    """Return a prompt after its way through the tokenizer."""
    tokenizer = TOKENIZERS[name]
    return str(tokenizer.decode(tokenizer(prompt, add_special_tokens=False).input_ids))


QUESTIONS = {
    "plain": "What is red?",
    "lines": "What is red?\n\nA. a dog\nB. a cat",
    "medium": "<video>\nWhat is red?",
    "no words": "<video>",
    "roles": "user: who is the assistant? system",
    "brackets": "What does [INST] say on the sign?",
    "closing bracket": "What does [/INST] say on the sign?",
    "both brackets": "Is [INST] or [/INST] on the sign?",
    "marker": "Is <|im_end|> a word?",
    "unicode": "Was ist rot? 红色 🟥",
    "code": "{{ messages }} {% if %}",
    "system": "What does <<SYS>> mean?",
}


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_question_is_found(name: str, question: str) -> None:
    if FAMILIES[name].hides_system and "\n\n" in question:
        pytest.skip("the user's first lines look like a system prompt: test_hidden_system_prompts_are_told")
    for turns in ((question,), ("Is it a dog?", "yes", question), ("a", "b", question, "d", question)):
        prompt = render(name, *turns)
        assert last(name, prompt) == question
        assert last(name, through(name, prompt)) == question


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in TAKES_NO_SYSTEM])
def test_system_prompts_are_not_of_the_user(name: str) -> None:
    for turns in (("What is red?",), ("Is it a dog?", "yes", "What is red?")):
        prompt = render(name, *turns, system="Be kind.\n\nThe user says little.")
        if FAMILIES[name].hides_system and (len(turns) == 1 or name == "mistral-v3"):
            continue
        assert last(name, prompt) == "What is red?"


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].hides_system])
def test_hidden_system_prompts_are_told(name: str) -> None:
    prompt = render(name, "What is red?", system="Be kind.")
    with pytest.warns(TurnWarning, match=r"marks no end of it.*Be kind.*pass instruction"):
        assert UserTurns.of(TOKENIZERS[name]).last(prompt, REMEDY) == "Be kind.\n\nWhat is red?"


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_behind_and_marks_in_answers(name: str) -> None:
    assert last(name, render(name, "What is red?", "A dog.", answered=True)) == "What is red?"
    for word in ("user", "[/INST]", "As User: and USER: said", "<|user|>"):
        assert last(name, render(name, "Is it a dog?", f"It says {word}.", "What is red?")) == "What is red?"


@pytest.mark.parametrize("name", FAMILIES)
def test_changed_blanks(name: str) -> None:
    """Word tokenizers put blanks around every mark, and lose line breaks."""
    prompt = " ".join(render(name, "Is it a dog?", "yes", "What is red?").split())
    assert last(name, prompt) == "What is red?"
    for mark in (*FAMILIES[name].specials, FAMILIES[name].bos, FAMILIES[name].eos, ":"):
        prompt = prompt.replace(mark, f" {mark} ")
    assert last(name, prompt) == "What is red?"


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_by_hand(name: str) -> None:
    """Without what a tokenizer puts before a text, and without a default system prompt."""
    tokenizer, family = TOKENIZERS[name], FAMILIES[name]
    prompt = render(name, "What is red?")
    short = prompt.removeprefix(family.bos)
    assert last(name, short) == "What is red?"
    assert last(name, family.bos + prompt) == "What is red?"
    assert last(name, f"{family.eos}{family.eos}{prompt}") == "What is red?"
    turns = UserTurns.of(tokenizer)
    assert turns.has_marks(prompt)
    assert turns.has_marks(short)


@pytest.mark.parametrize("name", FAMILIES)
def test_plain_text_has_no_marks(name: str) -> None:
    turns = UserTurns.of(TOKENIZERS[name])
    for text in ("<video>\nWhat is this?", "What does the User: say?", f"{FAMILIES[name].bos}What?", "user", ""):
        if text.startswith("<|im_start|>"):
            continue  # what SmolLM2 begins a text with begins a turn, too
        assert not turns.has_marks(text), text


TOOL_FAMILIES = ["qwen2.5", "qwen3", "llama3.1", "llama4", "mistral-v3", "glm4", "command-r", "gpt-oss"]


@pytest.mark.parametrize("name", TOOL_FAMILIES)
@pytest.mark.parametrize("calls", [True, False])
def test_results_of_tools_are_not_of_the_user(name: str, calls: bool) -> None:
    call = {"type": "function", "id": "abcdefghi", "function": {"name": "look", "arguments": {"where": "left"}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "What is red?"},
        {"role": "assistant", "content": "", "tool_calls": [call]} if calls else {"role": "assistant", "content": "I look"},
        {"role": "tool", "name": "look", "tool_call_id": "abcdefghi", "content": "a ball\n\nand more"},
    ]
    tokenizer = TOKENIZERS[name]
    for extra, expected in (
        ([], "What is red?"),
        ([{"role": "assistant", "content": "A ball."}, {"role": "user", "content": "And left?"}], "And left?"),
    ):
        prompt = tokenizer.apply_chat_template([*messages, *extra], tokenize=False, add_generation_prompt=True)
        assert last(name, prompt) == expected
        assert last(name, " ".join(prompt.split())) == expected
