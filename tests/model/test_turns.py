"""The last user turn of prompts of every chat template."""

from __future__ import annotations

import copy
import io
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

import hicom.model.turns as module
import tiny
from chat_templates import FAMILIES, TAKES_NO_SYSTEM, Family
from hicom.model.dual_encoder import InstructionWarning
from hicom.model.instruction import extract_instruction
from hicom.model.processing import HIComProcessor
from hicom.model.turns import UserTurns, last_turn_or_text

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


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_question_is_found(name: str) -> None:
    for question in QUESTIONS.values():
        if FAMILIES[name].hides_system and "\n\n" in question:
            continue  # its first lines look like a system prompt: test_hidden_system_prompts_are_told
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
    with pytest.warns(InstructionWarning, match=r"marks no end of it.*Be kind.*pass instruction"):
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
        {"role": "assistant", "content": "", "tool_calls": [call]}
        if calls
        else {"role": "assistant", "content": "I look"},
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


def test_words_of_the_user_that_look_like_two_turns_are_told() -> None:
    question = "Why [/INST] and [INST] here?"
    with pytest.warns(InstructionWarning, match=r"where it begins is not certain; pass instruction"):
        assert UserTurns.of(TOKENIZERS["mistral-v3"]).last(render("mistral-v3", question), REMEDY) == question


def test_text_before_the_first_turn_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """As dates do: the template was read yesterday."""
    prompt = render("llama3.1", "What is red?")
    today = time.strftime("%d %b %Y")
    assert today in prompt
    assert last("llama3.1", prompt.replace(today, "01 Jan 1999")) == "What is red?"


def test_thinking_turned_off() -> None:
    tokenizer = TOKENIZERS["qwen3"]
    messages = [message("user", "Is <|im_end|>\n<|im_start|>assistant\n a mark?", tokenizer)]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert prompt.endswith("</think>\n\n")
    assert last("qwen3", prompt) == messages[0]["content"]


@pytest.mark.parametrize("name", ["qwen2.5", "mistral-v3", "vicuna", "deepseek-v2"])
def test_a_started_answer(name: str) -> None:
    assert last(name, render(name, "Is it a dog?", "yes", "What is red?") + " The red one") == "What is red?"


def test_two_turns_of_the_user_in_a_row() -> None:
    tokenizer = TOKENIZERS["llama3"]
    messages = [message("user", text, tokenizer) for text in ("Is it a dog?", "What is red?")]
    for generation in (True, False):
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
        assert last("llama3", prompt) == "What is red?"


def test_a_system_turn_in_the_middle() -> None:
    tokenizer = TOKENIZERS["chatml"]
    roles = ("user", "system", "user", "system")
    texts = ("Is it a dog?", "Be kind.", "What is red?", "Be brief.")
    messages = [message(*pair, tokenizer) for pair in zip(roles, texts, strict=True)]
    for number, expected in ((2, texts[0]), (3, texts[2]), (4, texts[2])):
        prompt = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
        assert last("chatml", prompt) == expected


@pytest.mark.parametrize(
    "prompt",
    [
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
        "<|im_start|>assistant\nWhat is red?",
    ],
)
def test_marks_without_a_turn_of_the_user(prompt: str) -> None:
    turns = UserTurns.of(TOKENIZERS["chatml"])
    with pytest.raises(ValueError, match=r"no user turn is found in the prompt .*; pass instruction"):
        turns.last(prompt, REMEDY)
    with pytest.raises(ValueError, match=r"no user turn is found in the prompt .*; pass instruction"):
        last_turn_or_text(prompt, [turns], REMEDY)


def test_marks_that_a_tokenizer_does_not_know() -> None:
    prompt = render("gemma2", "Is it a dog?", "yes", "What is red?").replace("model", "<unk>")
    with pytest.raises(ValueError, match="no user turn is found in the prompt"):
        UserTurns.of(TOKENIZERS["gemma2"]).last(prompt, REMEDY)


@pytest.mark.parametrize("other", [name for name in FAMILIES if name not in ("falcon-chat", "alpaca", "olmo2")])
def test_prompts_of_another_template_are_told(other: str) -> None:
    turns = UserTurns.of(TOKENIZERS["alpaca"])
    prompt = render(other, "What is red?")
    with pytest.warns(InstructionWarning, match="another chat template than the tokenizer's wrote it"):
        assert last_turn_or_text(prompt, [turns], REMEDY) == prompt


def test_templates_that_mark_nothing() -> None:
    tokenizer = copy.copy(TOKENIZERS["alpaca"])
    for template in ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "{{ raise_exception('no') }}", "{{ x"):
        tokenizer.chat_template = template
        turns = UserTurns.of(tokenizer)
        with pytest.raises(ValueError, match="the chat template does not mark them; pass instruction"):
            turns.last("What is red?", REMEDY)
        with pytest.warns(InstructionWarning, match="does not mark the user's turns, so all of the prompt steers"):
            assert last_turn_or_text("What is red?", [turns], REMEDY) == "What is red?"
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        UserTurns.of(tokenizer)


def test_a_template_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer(FAMILIES["chatml"])
    first = UserTurns.of(tokenizer)
    monkeypatch.setattr(module, "_derive", None)
    assert UserTurns.of(tokenizer) is first
    assert UserTurns.of(tokenizer, tokenizer.chat_template) is first


def test_templates_by_name() -> None:
    tokenizer = byte_tokenizer(FAMILIES["chatml"])
    tokenizer.chat_template = {"default": FAMILIES["alpaca"].template, "other": FAMILIES["chatml"].template}
    assert UserTurns.of(tokenizer).last(render("alpaca", "What is red?"), REMEDY) == "What is red?"
    assert UserTurns.of(tokenizer, "other").last(render("chatml", "What is red?"), REMEDY) == "What is red?"


@pytest.mark.parametrize("filler", ["\n", " ", "[INST] ", "<|im_start|>user\n", "USER:", "<"])
def test_long_prompts_take_no_longer_than_their_length(filler: str) -> None:
    for name in ("chatml", "llama2", "vicuna"):
        prompt = render(name, f"What is{filler * 100_000}red?")
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            UserTurns.of(TOKENIZERS[name]).last(prompt, REMEDY)
        assert time.perf_counter() - start < 2, "quadratic: minutes"


# Tokenizers that change blanks


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a SentencePiece model made as Llama's was."""
    words = ["What is red on the left?", "Is it a dog or a cat?", "Be kind to the user.", "USER: ASSISTANT: yes no"]
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words * 20),
        model_writer=file,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    folder = tmp_path_factory.mktemp("llama")
    (folder / "tokenizer.model").write_bytes(file.getvalue())
    return folder


@pytest.mark.parametrize("name", ["llama2", "mistral-v1", "mistral-v3", "gemma2", "gemma3", "vicuna", "zephyr"])
def test_through_sentencepiece(name: str, llama_folder: Path) -> None:
    family = FAMILIES[name]
    tokenizer = LlamaTokenizer.from_pretrained(llama_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [*family.specials, "<video>"]})
    tokenizer.chat_template = family.template
    question = "What is red on the left?\nA. a dog\nB. a cat"
    for turns in ((question,), ("Is it a dog?", "yes", question)):
        messages = [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(turns)]
        if name not in TAKES_NO_SYSTEM and not family.hides_system:
            messages.insert(0, {"role": "system", "content": "Be kind to the user."})
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for add in (True, False):  # some callers add a second beginning
            ids = tokenizer(prompt, add_special_tokens=add).input_ids
            for between in (True, False):
                text = tokenizer.decode(ids, spaces_between_special_tokens=between)
                assert UserTurns.of(tokenizer).last(text, REMEDY) == question


# The processor


def processor(name: str) -> HIComProcessor:
    tokenizer = TOKENIZERS[name]
    return HIComProcessor.from_config(tiny.config(), tokenizer, tiny.tokenizer())


def steered(found: Any, of: HIComProcessor) -> str:
    ids = found["instruction_input_ids"]
    assert len(ids) == 1
    return str(of.instruction_tokenizer.decode(ids[0], skip_special_tokens=True)).strip()


FRAMES = np.zeros((2, 20, 20, 3), dtype=np.uint8)
WHOLE = {"return_dict": True}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "llava-onevision"])
def test_one_step_and_two_steps_agree(name: str) -> None:
    of = processor(name)
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "is there a dog ?"}]},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "which object moves left ? Answer with the letter"},
    ]
    if name not in TAKES_NO_SYSTEM and name != "mistral-v3":
        messages.insert(0, {"role": "system", "content": "describe the video"})
    for number in (len(messages), len(messages) - 2):
        if number < 3 and FAMILIES[name].hides_system:
            continue
        one = of.apply_chat_template(
            messages[:number], tokenize=True, add_generation_prompt=True, videos=[FRAMES], **WHOLE
        )
        text = of.apply_chat_template(messages[:number], add_generation_prompt=True)
        two = of(text=text, videos=[FRAMES])
        assert steered(one, of) == steered(two, of) != ""
        assert one["input_ids"] == two["input_ids"]


def test_a_template_of_the_call_counts() -> None:
    of = processor("chatml")
    messages = [{"role": "system", "content": "no cat"}, {"role": "user", "content": "<video>\nis there a dog ?"}]
    text = of.apply_chat_template(messages, chat_template=FAMILIES["llama2"].template)
    assert "<<SYS>>" in text
    assert steered(of(text=text, videos=[FRAMES]), of) == "is there a dog ?"


def test_plain_text_is_the_turn() -> None:
    of = processor("gemma3")
    assert steered(of(text="<video>\nis there a dog ?", videos=[FRAMES]), of) == "is there a dog ?"
    with pytest.raises(ValueError, match=r"no user turn is found in the prompt .*; state the `instruction`"):
        of(text="<video>is there a dog ?<end_of_turn>\n", videos=[FRAMES])
    stated = of(text="<video>is there a dog ?<end_of_turn>\n", videos=[FRAMES], instruction="dog")
    assert steered(stated, of) == "dog"


def test_an_answer_alone_needs_no_instruction() -> None:
    """Trainers pass prompts and answers apart."""
    of = processor("chatml")
    assert "instruction_input_ids" not in of(text="a dog<|im_end|>\n")
    both = of(text=["a dog<|im_end|>\n", "<|im_start|>user\n<video>\nis there a dog ?<|im_end|>\n"], videos=[FRAMES])
    assert steered(both, of) == "is there a dog ?"


def test_media_without_a_turn_of_the_user() -> None:
    of = processor("chatml")
    messages = [{"role": "system", "content": [{"type": "video"}, {"type": "text", "text": "is there a dog ?"}]}]
    with pytest.raises(ValueError, match="no turn of the user; state the `instruction`"):
        of.apply_chat_template(messages, tokenize=True, videos=[FRAMES], **WHOLE)
    found = of.apply_chat_template(messages, tokenize=True, videos=[FRAMES], instruction="dog", **WHOLE)
    assert steered(found, of) == "dog"


def test_a_message_in_parts() -> None:
    """Each part stands on a line of its own, media in their places, as vLLM writes them."""
    of = processor("chatml")
    parts = [{"type": "text", "text": "what"}, {"type": "text", "text": "happens ?"}]
    video, image = {"type": "video"}, {"type": "image"}
    for content, expected in (
        (parts, "what\nhappens ?"),
        ([video, *parts], "<video>\nwhat\nhappens ?"),
        ([parts[0], video, image, video, parts[1]], "what\n<video>\n<image>\n<video>\nhappens ?"),
        ([video], "<video>"),
    ):
        text = of.apply_chat_template([{"role": "user", "content": content}])
        assert text == f"<|im_start|>user\n{expected}<|im_end|>\n"
    inputs = of.apply_chat_template(
        [{"role": "user", "content": [video, *parts]}], tokenize=True, videos=[FRAMES], **WHOLE
    )
    assert steered(inputs, of) == steered(of(text="<video>", videos=[FRAMES], instruction="what happens ?"), of)
    assert extract_instruction("<video>\nwhat\nhappens ?") == "what happens ?"
