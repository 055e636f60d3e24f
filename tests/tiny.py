"""Tiny random models and tokenizers: every tower and LLM family, small enough for a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Siglip2TextConfig,
    Siglip2VisionConfig,
    SiglipTextConfig,
    SiglipVisionConfig,
)

from hicom.model.config import HIComConfig
from hicom.model.modeling import HIComForConditionalGeneration
from hicom.model.processing import CHAT_TEMPLATE, HIComProcessor

SPECIAL = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<video>", "<image>"]
WORDS = (  # noqa: SIM905
    "user assistant system what which object moves left right up down is there a dog cat red blue circle in the video "
    "image describe yes no one two three how many first second and ? . , : ( ) A B C D Options Answer with letter"
).split()
WIDTH = 32
TENSORS: dict[str, Any] = {"return_tensors": "pt", "padding": True}
"""Arguments of a processor's call for inputs that a model takes."""
VOCABULARY = len(SPECIAL) + len(WORDS)


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a word tokenizer with ChatML markers."""
    base = Tokenizer(WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>"))
    base.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=base,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<video>", "<image>"],
        chat_template=CHAT_TEMPLATE,
    )


def towers(kind: str) -> tuple[PreTrainedConfig, PreTrainedConfig]:
    """Return configurations of a dual encoder with a 5x5 patch grid."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_attention_heads": 2}
    text = sizes | {"num_hidden_layers": 1, "vocab_size": VOCABULARY, "max_position_embeddings": 12}
    text |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    if kind == "siglip":
        return (
            SiglipVisionConfig(**sizes, num_hidden_layers=2, image_size=20, patch_size=4),
            SiglipTextConfig(**text, projection_size=WIDTH),
        )
    if kind == "siglip2":
        return (
            Siglip2VisionConfig(**sizes, num_hidden_layers=2, num_patches=25, patch_size=4),
            Siglip2TextConfig(**text, projection_size=WIDTH),
        )
    assert kind == "clip"
    # CLIP's text space is narrower than its vision tower.
    return (
        CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=20, patch_size=4, projection_dim=24),
        CLIPTextConfig(**text, projection_dim=24),
    )


def llm(kind: str) -> PreTrainedConfig:
    """Return the configuration of a two-layer LLM."""
    sizes: dict[str, Any] = {
        "hidden_size": 40,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    if kind == "qwen2":
        return Qwen2Config(**sizes)
    return {"qwen3": Qwen3Config, "llama": LlamaConfig}[kind](**sizes, head_dim=10)


def config(tower: str = "siglip", language: str = "qwen2", **kwargs: Any) -> HIComConfig:
    """Return a tiny configuration; `kwargs` are fields of the compressor."""
    vision_config, instruction_config = towers(tower)
    fields = {"window": (2, 2, 2), "num_global_tokens": 3} | kwargs
    return HIComConfig(
        vision_config=vision_config,
        instruction_config=instruction_config,
        text_config=llm(language),
        video_token_id=SPECIAL.index("<video>"),
        image_token_id=SPECIAL.index("<image>"),
        **fields,
    )


def model(
    tower: str = "siglip", language: str = "qwen2", seed: int = 0, **kwargs: Any
) -> HIComForConditionalGeneration:
    """Return a tiny random model in evaluation mode, with weights large enough to tell inputs apart."""
    torch.manual_seed(seed)
    result = HIComForConditionalGeneration(config(tower, language, **kwargs))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return result.eval()


def processor(hicom_config: HIComConfig, **kwargs: Any) -> HIComProcessor:
    """Return the processor of a tiny model."""
    return HIComProcessor.from_config(hicom_config, tokenizer(), tokenizer(), **({"num_frames": 4} | kwargs))


def save(folder: Path, **kwargs: Any) -> Path:
    """Save a random model with its processor, and return the folder; arguments as those of `model`."""
    random = model(**kwargs)
    random.save_pretrained(folder)
    processor(random.config).save_pretrained(folder)
    return folder
