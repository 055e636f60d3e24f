"""Ways to generate with media that read a prompt again, in parts or with drafted tokens behind it: all equal greedy."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

import tiny
from hicom.inference import VideoChat
from hicom.model.generation import CacheWarning
from hicom.model.modeling import HIComForConditionalGeneration

LENGTH = 8
MEDIA = ["video", "image", "text"]
PROMPT = ("input_ids", "attention_mask")


def frames(number: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (number, 20, 24, 3), dtype=np.uint8)


def inputs(model: HIComForConditionalGeneration, medium: str, question: str = "which object moves left ?") -> Any:
    place = {"video": "<video>\n", "image": "<image>\n", "text": ""}[medium]
    media: dict[str, Any] = {"video": {"videos": [frames(4)]}, "image": {"images": [frames(1)[0]]}, "text": {}}[medium]
    # An earlier turn, so that what stands behind its marker is looked up as a draft.
    before = "<|im_start|>user\nhow many ?<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
    text = f"{before}<|im_start|>user\n{place}{question}<|im_end|>\n<|im_start|>assistant\n"
    return tiny.processor(model.config)(text=text, return_tensors="pt", **media)


def generate(model: HIComForConditionalGeneration, batch: Any, **kwargs: Any) -> torch.Tensor:
    settings = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH, "do_sample": False}
    return torch.as_tensor(model.generate(**batch, **settings | kwargs))


def plain() -> Any:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(tiny.llm("qwen3")).eval()


def other(**kwargs: Any) -> HIComForConditionalGeneration:
    """Another model: other towers, another compressor and LLM, as many tokens for a video."""
    return tiny.model("clip", "llama", seed=5, global_injection="fine", **kwargs)


@pytest.mark.parametrize("medium", MEDIA)
@pytest.mark.parametrize("who", ["lookup", "itself", "other", "plain"])
def test_drafted_tokens_change_nothing(medium: str, who: str) -> None:
    model = tiny.model()
    batch = inputs(model, medium)
    asked: dict[str, Any] = {"assistant_model": {"itself": model, "other": other(), "plain": plain()}.get(who)}
    if who == "lookup":
        asked = {"prompt_lookup_num_tokens": 3}
    assert torch.equal(generate(model, batch, **asked), generate(model, batch))


@pytest.mark.parametrize("medium", MEDIA)
@pytest.mark.parametrize("asked", [{"prefill_chunk_size": 5}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_prompts_in_chunks_again_or_in_a_fixed_cache_change_nothing(medium: str, asked: dict[str, Any]) -> None:
    model = tiny.model()
    batch = inputs(model, medium)
    assert torch.equal(generate(model, batch, disable_compile=True, **asked), generate(model, batch))


def test_a_model_that_drafts_for_itself_is_always_right() -> None:
    """It reads the same visual tokens, so that every drafted token is taken: few passes, and media encoded once."""
    model = tiny.model()
    batch, calls = inputs(model, "video"), {"tower": 0, "llm": 0}

    def count(name: str) -> Any:
        return lambda *_: calls.__setitem__(name, calls[name] + 1)

    model.model.vision_tower.register_forward_hook(count("tower"))
    model.generation_config.num_assistant_tokens_schedule = "constant"
    model.generation_config.num_assistant_tokens = LENGTH
    model.generation_config.assistant_confidence_threshold = 0.0
    lengths: list[int] = []
    model.model.language_model.register_forward_hook(
        lambda _, args, kwargs, output: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    generate(model, batch, assistant_model=model)
    assert calls["tower"] == 1
    # The draft reads the prompt and writes one by one; then one pass checks them all.
    prompt = batch["input_ids"].shape[1]
    assert lengths == [prompt, *[1] * (LENGTH - 2), prompt + LENGTH - 1]


def test_another_assistant_encodes_once_for_itself() -> None:
    model, assistant = tiny.model(), other()
    calls = []
    assistant.model.vision_tower.register_forward_hook(lambda *_: calls.append("assistant"))
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append("model"))
    generate(model, inputs(model, "video"), assistant_model=assistant)
    assert sorted(calls) == ["assistant", "model"]


def test_what_cannot_work_is_refused_by_name() -> None:
    model = tiny.model()
    batch = inputs(model, "video")
    with pytest.raises(ValueError, match="assistant_early_exit does not work"):
        generate(model, batch, assistant_early_exit=1)
    with pytest.raises(ValueError, match=r"assistant_model does not fit this prompt: .* placeholders"):
        generate(model, batch, assistant_model=other(num_global_tokens=5))
    embeds = model.model.embed(**{k: v for k, v in batch.items() if k != "attention_mask"})
    with pytest.raises(ValueError, match="pass input_ids beside inputs_embeds"):
        model.generate(inputs_embeds=embeds, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="either these or media"):
        generate(model, batch, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="assistant_tokenizer"):
        generate(
            model, batch, assistant_model=other(), tokenizer=tiny.tokenizer(), assistant_tokenizer=tiny.tokenizer()
        )


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_a_chat_drafts_too(penalty: float) -> None:
    """`VideoChat` hands over embeddings; what looks back at tokens, such as the penalty, must see the same ones."""
    model = tiny.model()
    chat = VideoChat(model, tiny.processor(model.config))
    video = chat.encode(frames(4))
    sibling = tiny.model(language="llama", seed=3)
    sibling.model.vision_tower.load_state_dict(model.model.vision_tower.state_dict())
    question, settings = "which object moves left ?", {"max_new_tokens": LENGTH, "repetition_penalty": penalty}
    wanted = chat.ask(video, question, **settings)
    assert wanted.num_new_tokens > 1
    for asked in (
        {"prompt_lookup_num_tokens": 2},
        {"assistant_model": model},
        {"assistant_model": sibling},
        {"assistant_model": plain()},
    ):
        answer = chat.ask(video, question, **settings, **asked)
        assert (answer, answer.num_new_tokens, answer.is_cut) == (wanted, wanted.num_new_tokens, wanted.is_cut)
        assert "".join(chat.stream(video, question, **settings, **asked)) == wanted
    with pytest.raises(ValueError, match="another vision tower"):
        chat.ask(video, question, assistant_model=tiny.model(seed=4))
    with pytest.raises(ValueError, match="no_repeat_ngram_size"):
        chat.ask(video, question, assistant_model=model, no_repeat_ngram_size=2)


@pytest.mark.parametrize("medium", MEDIA)
def test_padding_on_the_right_is_moved(medium: str) -> None:
    model = tiny.model()
    rows = [dict(inputs(model, medium, text)) for text in ("which object moves left ?", "a dog ?")]
    wanted = [generate(model, row)[0, -LENGTH:] for row in rows]
    batch = {name: torch.cat([row[name] for row in rows]) for name in rows[0] if name not in PROMPT}
    batch |= {name: pad_sequence([row[name][0] for row in rows], batch_first=True) for name in PROMPT}
    assert not batch["attention_mask"][:, -1].all()
    assert torch.equal(generate(model, batch)[:, -LENGTH:], torch.stack(wanted))
    with pytest.raises(ValueError, match="position_ids; pad them on the left"):
        generate(model, batch | {"position_ids": torch.zeros_like(batch["input_ids"])})


def test_a_continued_cache_says_that_its_tokens_are_of_another_question() -> None:
    model = tiny.model()
    first = inputs(model, "video")
    output = model.generate(**first, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)
    cache = output["cache"] if "cache" in output else output["past_key_values"]
    more = tiny.tokenizer()("is there a dog ?", return_tensors="pt").input_ids
    ids = torch.cat([output.sequences, more], 1)
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    second = dict(first) | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with pytest.warns(CacheWarning, match="compressed for an earlier question"):
        told = generate(model, second, past_key_values=cache)
    assert not calls  # nothing is encoded whose tokens are there
    assert torch.equal(told, generate(model, second))
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheWarning)
        generate(model, second)
