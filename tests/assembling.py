"""Parts that models are put together of, as folders: dual encoders and language models with random weights.

Every dual encoder has the tokenizer that its kind is published with: SentencePiece, Gemma's, CLIP's.
"""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    GemmaTokenizer,
    PreTrainedTokenizerBase,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
)

import siglip_tokenizer
import tiny

PAIRS = {
    "siglip": (SiglipConfig, SiglipModel),
    "siglip2": (Siglip2Config, Siglip2Model),
    "clip": (CLIPConfig, CLIPModel),
}
TOKENIZERS = {"siglip": "SiglipTokenizer", "siglip2": "GemmaTokenizer", "clip": "CLIPTokenizer"}
MAX_LENGTH = 24


def pieces(special: list[str], suffix: str = "") -> tuple[dict[str, int], list[Any]]:
    """Return vocabulary and merges of byte pairs, learnt from a few sentences."""
    base = Tokenizer(models.BPE())
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=special, end_of_word_suffix=suffix, initial_alphabet=["▁"], show_progress=False
    )
    base.train_from_iterator(siglip_tokenizer.TEXTS, trainer)
    model = json.loads(base.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def save_tokenizer(folder: Path, kind: str) -> PreTrainedTokenizerBase:
    """Write a dual encoder's tokenizer as its kind is published, and return it as it loads from there."""
    if kind == "siglip":
        siglip_tokenizer.save(folder, MAX_LENGTH)
    elif kind == "siglip2":
        vocabulary, merges = pieces(["<pad>", "<eos>", "<bos>", "<unk>"])
        GemmaTokenizer(vocabulary, merges, model_max_length=MAX_LENGTH).save_pretrained(folder)
    else:
        vocabulary, merges = pieces(["<|startoftext|>", "<|endoftext|>"], "</w>")
        CLIPTokenizer(vocabulary, merges, model_max_length=MAX_LENGTH).save_pretrained(folder)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return tokenizer


def save_pair(folder: Path, kind: str, **text: Any) -> Path:
    """Save a dual encoder with random weights."""
    torch.manual_seed(1)
    config_class, model_class = PAIRS[kind]
    vision_config, text_config = tiny.towers(kind)
    tokenizer = save_tokenizer(folder, kind)
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": MAX_LENGTH, **ids, **text}
    extra = {"projection_dim": 24} if kind == "clip" else {}
    config = config_class(vision_config=vision_config.to_dict(), text_config=text_config.to_dict() | text, **extra)
    model_class(config).save_pretrained(folder)
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
