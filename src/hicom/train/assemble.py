"""A model put together of trained towers, an untrained compressor and a language model that may be small and new."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ..model.assemble import LanguageModel, Towers, plan, put_together, read_language_model, read_towers
from ..model.config import HIComConfig
from ..model.hub import embedded_models, find_model
from ..model.modeling import HIComForConditionalGeneration
from ..model.official import placeholder_tokens
from ..model.processing import HIComProcessor
from ..model.small_llm import add_chat_tokens, small_llm_config
from .config import Parts


def assemble(parts: Parts, seed: int = 0) -> tuple[HIComForConditionalGeneration, HIComProcessor]:
    """Return a model with trained towers, an untrained compressor and a language model, and its processor.

    A new language model is an untrained Qwen2; it takes the towers' tokenizer, with ChatML's tokens and the media
    placeholders added.

    Args:
        parts: what the model is put together of.
        seed: of what is untrained.

    Raises:
        ValueError: there is no dual encoder in `parts.towers`, or no model in `parts.language_model`.
    """
    fields: dict[str, Any] = {
        "window": parts.window,
        "num_global_tokens": parts.num_global_tokens,
        "local_logit_scale": parts.local_logit_scale,
        "vision_feature_layer": parts.vision_feature_layer,
    } | parts.config
    needs_text = bool(HIComConfig(**fields).is_conditional) or parts.language_model is None
    if parts.language_model is not None:
        plan(parts.towers, parts.language_model, dtype=torch.float32, **fields)
    towers = read_towers(parts.towers, torch.float32, is_conditional=needs_text)
    language = (
        new_language_model(parts, towers, seed)
        if parts.language_model is None
        else read_language_model(parts.language_model, torch.float32)
    )
    return put_together(towers, language, dtype=torch.float32, num_frames=parts.num_frames, seed=seed, **fields)


def new_language_model(parts: Parts, towers: Towers, seed: int) -> LanguageModel:
    """Return an untrained Qwen2 with the towers' tokenizer."""
    tokenizer = copy.deepcopy(towers.tokenizer)
    assert tokenizer is not None
    add_chat_tokens(tokenizer)
    config = small_llm_config(
        tokenizer,
        hidden_size=parts.hidden_size,
        intermediate_size=parts.intermediate_size,
        num_layers=parts.num_layers,
        num_heads=parts.num_heads,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    video, image = placeholder_tokens(tokenizer)
    return LanguageModel(config=config, tokenizer=tokenizer, video_token=video, image_token=image, model=model)


def find(name: str) -> Path:
    """Return a folder, which may be given by the name of an embedded model."""
    return find_model(name) if name in embedded_models() else Path(name)
