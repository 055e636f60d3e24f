"""A model put together of trained towers, an untrained compressor and a small language model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Config, SiglipModel

from ..model.config import HIComConfig
from ..model.modeling import HIComForConditionalGeneration
from ..model.processing import HIComProcessor
from .config import Parts

SPECIAL_TOKENS = ["<|im_start|>", "<|im_end|>", "<video>", "<image>"]
MAX_LENGTH = 4096
ROLES = ["system", "user", "assistant"]


def assemble(parts: Parts) -> tuple[HIComForConditionalGeneration, HIComProcessor]:
    """Return a model with trained towers, an untrained compressor and a small language model, and its processor.

    A new language model is an untrained Qwen2; it takes the towers' tokenizer, with ChatML's tokens and the media
    placeholders added.

    Raises:
        ValueError: there is no dual encoder in `parts.towers`, or no model in `parts.language_model`.
    """
    if not (Path(parts.towers) / "config.json").is_file():
        raise ValueError(f"there is no SigLIP dual encoder in {parts.towers}; train one, or name its folder")
    towers = SiglipModel.from_pretrained(parts.towers)
    instruction_tokenizer = AutoTokenizer.from_pretrained(parts.towers)
    donor: HIComForConditionalGeneration | None = None
    if parts.language_model is None:
        tokenizer = AutoTokenizer.from_pretrained(parts.towers)
        add_chat_tokens(tokenizer)
        text_config = new_language_model(parts, tokenizer)
    else:
        if not (Path(parts.language_model) / "config.json").is_file():
            raise ValueError(f"there is no model in {parts.language_model} to take the language model from")
        donor = HIComForConditionalGeneration.from_pretrained(parts.language_model, dtype=torch.float32)
        tokenizer = HIComProcessor.from_pretrained(parts.language_model).tokenizer
        text_config = donor.config.text_config
    fields = {
        "window": parts.window,
        "num_global_tokens": parts.num_global_tokens,
        "local_logit_scale": parts.local_logit_scale,
        "vision_feature_layer": parts.vision_feature_layer,
    }
    config = HIComConfig(
        vision_config=towers.config.vision_config,
        instruction_config=towers.config.text_config,
        text_config=text_config,
        video_token_id=int(tokenizer.convert_tokens_to_ids("<video>")),
        image_token_id=int(tokenizer.convert_tokens_to_ids("<image>")),
        **(fields | parts.config),
    )
    model = HIComForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(towers.vision_model.state_dict())
    if model.model.instruction_encoder is not None:  # nothing steers the baselines
        model.model.instruction_encoder.load_state_dict(towers.text_model.state_dict())
    if donor is not None:
        model.model.language_model.load_state_dict(donor.model.language_model.state_dict())
        model.lm_head.load_state_dict(donor.lm_head.state_dict())
    model.generation_config.eos_token_id = text_config.eos_token_id
    model.generation_config.pad_token_id = text_config.pad_token_id
    processor = HIComProcessor.from_config(config, tokenizer, instruction_tokenizer, num_frames=parts.num_frames)
    return model, processor


def new_language_model(parts: Parts, tokenizer: PreTrainedTokenizerBase) -> Qwen2Config:
    """Return the configuration of a small language model for a tokenizer."""
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=parts.hidden_size,
        intermediate_size=parts.intermediate_size,
        num_hidden_layers=parts.num_layers,
        num_attention_heads=parts.num_heads,
        num_key_value_heads=parts.num_heads,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        # Large models' 0.02 leaves attention flat at this width, and heads that look words up take ages to form.
        initializer_range=parts.hidden_size**-0.5,
        bos_token_id=None,
        eos_token_id=int(tokenizer.convert_tokens_to_ids("<|im_end|>")),
        pad_token_id=int(tokenizer.pad_token_id),
    )


def add_chat_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer what ChatML and the media placeholders need."""
    # A tokenizer of whole words may not know the names of the roles.
    tokenizer.add_tokens([role for role in ROLES if role not in tokenizer.get_vocab()])
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS, "eos_token": "<|im_end|>"})
    # The text tower's own limit is no limit of the language model's.
    tokenizer.model_max_length = MAX_LENGTH
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
