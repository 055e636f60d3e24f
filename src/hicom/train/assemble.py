"""A model put together of trained towers, an untrained compressor and a small language model."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    SiglipModel,
)

from ..inference import embedded_models, find_model
from ..model.config import HIComConfig
from ..model.convert import read_json
from ..model.modeling import HIComForConditionalGeneration
from ..model.processing import HIComProcessor
from ..model.small_llm import add_chat_tokens, small_llm_config
from .config import Parts


def assemble(parts: Parts) -> tuple[HIComForConditionalGeneration, HIComProcessor]:
    """Return a model with trained towers, an untrained compressor and a small language model, and its processor.

    A new language model is an untrained Qwen2; it takes the towers' tokenizer, with ChatML's tokens and the media
    placeholders added.

    Raises:
        ValueError: there is no dual encoder in `parts.towers`, or no model in `parts.language_model`.
    """
    vision_tower, instruction_encoder, instruction_tokenizer = load_towers(find(parts.towers))
    language_model: PreTrainedModel | None = None
    if parts.language_model is None:
        tokenizer = copy.deepcopy(instruction_tokenizer)
        add_chat_tokens(tokenizer)
        text_config = small_llm_config(
            tokenizer,
            hidden_size=parts.hidden_size,
            intermediate_size=parts.intermediate_size,
            num_layers=parts.num_layers,
            num_heads=parts.num_heads,
        )
    else:
        language_model, tokenizer = load_language_model(find(parts.language_model))
        text_config = language_model.config
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
    if language_model is not None:
        model.model.language_model.load_state_dict(language_model.get_decoder().state_dict())
        model.lm_head.load_state_dict(language_model.get_output_embeddings().state_dict())
    model.generation_config.eos_token_id = text_config.eos_token_id
    model.generation_config.pad_token_id = text_config.pad_token_id
    processor = HIComProcessor.from_config(config, tokenizer, instruction_tokenizer, num_frames=parts.num_frames)
    return model, processor


def find(name: str) -> Path:
    """Return a folder, which may be given by the name of an embedded model."""
    return find_model(name) if name in embedded_models() else Path(name)


def load_language_model(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a causal language model, or that of a HICom model, and its tokenizer with the media placeholders.

    Raises:
        ValueError: the folder holds no model.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"there is no model in {folder} to take the language model from")
    if read_json(folder / "config.json").get("model_type") == HIComConfig.model_type:
        donor = HIComForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        whole = AutoModelForCausalLM.from_config(donor.config.text_config)
        whole.get_decoder().load_state_dict(donor.model.language_model.state_dict())
        whole.get_output_embeddings().load_state_dict(donor.lm_head.state_dict())
        return whole, HIComProcessor.from_pretrained(folder).tokenizer
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<video>", "<image>"]}, replace_extra_special_tokens=False
    )
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    return model, tokenizer


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a folder as it was saved.

    `AutoTokenizer` goes by the model's type: beside a Qwen2 it makes a tokenizer of Qwen's kind out of any file,
    without the file's own normaliser.
    """
    path = folder / "tokenizer_config.json"
    saved = read_json(path).get("tokenizer_class") if path.is_file() else None
    plain = saved in ("TokenizersBackend", "PreTrainedTokenizerFast")
    return (PreTrainedTokenizerFast if plain else AutoTokenizer).from_pretrained(folder)


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
