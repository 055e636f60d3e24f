"""A model put together of trained towers, an untrained compressor and a small language model."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config, SiglipModel

from ..inference import embedded_models, find_model
from ..model.config import HIComConfig
from ..model.convert import read_json
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
    vision_tower, instruction_encoder, instruction_tokenizer = load_towers(find(parts.towers))
    donor: HIComForConditionalGeneration | None = None
    if parts.language_model is None:
        tokenizer = copy.deepcopy(instruction_tokenizer)
        add_chat_tokens(tokenizer)
        text_config = new_language_model(parts, tokenizer)
    else:
        folder = find(parts.language_model)
        if not (folder / "config.json").is_file():
            raise ValueError(f"there is no model in {folder} to take the language model from")
        donor = HIComForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        tokenizer = HIComProcessor.from_pretrained(folder).tokenizer
        text_config = donor.config.text_config
    fields = {
        "window": parts.window,
        "num_global_tokens": parts.num_global_tokens,
        "local_logit_scale": parts.local_logit_scale,
        "vision_feature_layer": parts.vision_feature_layer,
    }
    config = HIComConfig(
        vision_config=vision_tower.config,
        instruction_config=instruction_encoder.config,
        text_config=text_config,
        video_token_id=int(tokenizer.convert_tokens_to_ids("<video>")),
        image_token_id=int(tokenizer.convert_tokens_to_ids("<image>")),
        **(fields | parts.config),
    )
    model = HIComForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision_tower.state_dict())
    if model.model.instruction_encoder is not None:  # nothing steers the baselines
        model.model.instruction_encoder.load_state_dict(instruction_encoder.state_dict())
    if donor is not None:
        model.model.language_model.load_state_dict(donor.model.language_model.state_dict())
        model.lm_head.load_state_dict(donor.lm_head.state_dict())
    model.generation_config.eos_token_id = text_config.eos_token_id
    model.generation_config.pad_token_id = text_config.pad_token_id
    processor = HIComProcessor.from_config(config, tokenizer, instruction_tokenizer, num_frames=parts.num_frames)
    return model, processor


def find(name: str) -> Path:
    """Return a folder, which may be given by the name of an embedded model."""
    return find_model(name) if name in embedded_models() else Path(name)


def load_towers(folder: Path) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the vision tower and the text tower of a SigLIP dual encoder or of a HICom model, and their tokenizer.

    Raises:
        ValueError: the folder holds neither.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"there is no SigLIP dual encoder in {folder}; train one, or name its folder")
    if read_json(folder / "config.json").get("model_type") != HIComConfig.model_type:
        towers = SiglipModel.from_pretrained(folder)
        return towers.vision_model, towers.text_model, AutoTokenizer.from_pretrained(folder)
    model = HIComForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).model
    if model.instruction_encoder is None:
        raise ValueError(f"no instruction steers the model in {folder}, so it has no text tower to take")
    return model.vision_tower, model.instruction_encoder, HIComProcessor.from_pretrained(folder).instruction_tokenizer


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
