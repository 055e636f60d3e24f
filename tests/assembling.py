"""Parts that models are put together of, as folders: dual encoders and language models with random weights."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
)

import tiny

PAIRS = {
    "siglip": (SiglipConfig, SiglipModel),
    "siglip2": (Siglip2Config, Siglip2Model),
    "clip": (CLIPConfig, CLIPModel),
}


def save_pair(folder: Path, kind: str, **text: Any) -> Path:
    """Save a dual encoder with random weights."""
    torch.manual_seed(1)
    config_class, model_class = PAIRS[kind]
    vision_config, text_config = tiny.towers(kind)
    extra = {"projection_dim": 24} if kind == "clip" else {}
    config = config_class(vision_config=vision_config.to_dict(), text_config=text_config.to_dict() | text, **extra)
    model_class(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def save_llm(folder: Path, kind: str, *, template: bool = True, seed: int = 2, **fields: Any) -> Path:
    """Save a language model with random weights."""
    torch.manual_seed(seed)
    config = tiny.llm(kind)
    config.update(fields)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = tiny.tokenizer()
    if not template:
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder
