"""Sizes of published models, and models of these sizes with random weights.

A model that is too large for a CPU is built with one layer of each tower and of the LLM; its other layers cost as much.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Qwen2Config, SiglipTextConfig, SiglipVisionConfig

from ..model.baselines import COMPRESSORS, build_compressor
from ..model.compressor import HybridCompressor
from ..model.config import HIComConfig
from ..model.modeling import HIComForConditionalGeneration, HIComModel
from .plain import PlainCompressor

COLUMNS = {
    "hicom": "HICom (ours)",
    "plain": "HICom, plain per-sample form",
    "no_compression": "no compression",
    "llava_video": "LLaVA-Video 2x2 pooling",
    "spatial_pool": "spatial pooling 3x3",
    "qformer": "Q-Former",
    "perceiver": "Resampler",
}
"""What is compared, by the name of the option."""
CONDITIONAL = ("hicom", "plain")
"""Columns that an instruction steers."""

# google/siglip-so400m-patch14-384/config.json
SIGLIP: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
}
# Qwen/Qwen2.5-{7B,1.5B,0.5B}-Instruct/config.json
QWEN: dict[str, dict[str, Any]] = {
    "7b": {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
    },
    "1.5b": {
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "0.5b": {
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
}


def published_config(shape: str) -> HIComConfig:
    """Return the configuration of HICom at a published size: SigLIP-so400m at 384 pixels and a Qwen2.5.

    Raises:
        ValueError: there is no such size.
    """
    if shape not in QWEN:
        raise ValueError(f"shape={shape!r} is not one of {', '.join(QWEN)}")
    text = {"max_position_embeddings": 64, "vocab_size": 32000, "projection_size": 1152}
    return HIComConfig(
        vision_config=SiglipVisionConfig(**SIGLIP, image_size=384, patch_size=14),
        instruction_config=SiglipTextConfig(**SIGLIP, **text, bos_token_id=None, eos_token_id=None),
        text_config=Qwen2Config(**QWEN[shape]),
    )


@dataclass
class Subject:
    """What is measured.

    Attributes:
        config: the sizes that are reported.
        model: towers and LLM, with all layers or with the first of each.
        head: the LLM's output matrix.
        compressors: by column.
        is_whole: all layers are there.
    """

    config: HIComConfig
    model: HIComModel
    head: nn.Module
    compressors: dict[str, nn.Module]
    is_whole: bool


def build_compressors(config: HIComConfig, columns: tuple[str, ...], own: nn.Module | None) -> dict[str, nn.Module]:
    """Return the compressors of the columns; `own` is the model's, the others have random weights.

    The plain form shares the weights of ours where it can: where ours has nothing beyond the paper.
    """
    dims = {"dim": config.vision_config.hidden_size, "out_dim": config.text_config.hidden_size}
    ours = own if isinstance(own, HybridCompressor) else HybridCompressor(**dims)
    found: dict[str, nn.Module] = {}
    for column in columns:
        if column == "hicom":
            found[column] = ours
        elif column == "plain":
            try:
                found[column] = PlainCompressor(ours)
            except ValueError:
                number = ours.num_global_tokens or 32
                published = HybridCompressor(**dims, window=ours.window or (4, 3, 3), num_global_tokens=number)
                found[column] = PlainCompressor(published)
        else:
            assert column in COMPRESSORS
            found[column] = build_compressor(column, **dims)
    return found


def random_subject(
    config: HIComConfig, columns: tuple[str, ...], device: torch.device, dtype: torch.dtype, *, is_whole: bool
) -> Subject:
    """Return a model of random weights; unless it `is_whole`, with one layer of each kind."""
    built = copy.deepcopy(config)
    # Rows of an embedding are looked up, not multiplied: a small one takes the same time.
    built.text_config.vocab_size = 8
    built.text_config.pad_token_id = None
    if not is_whole:
        for part in (built.vision_config, built.instruction_config, built.text_config):
            part.num_hidden_layers = 1
        built.text_config.layer_types = built.text_config.layer_types[:1]
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with device:
            model = HIComModel(built)
            head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
            compressors = build_compressors(config, columns, model.compressor)
    finally:
        torch.set_default_dtype(before)
    modules = {name: module.to(device, dtype).eval() for name, module in compressors.items()}
    return Subject(config, model.to(device, dtype).eval(), head.to(device, dtype), modules, is_whole)


def loaded_subject(model: HIComForConditionalGeneration, columns: tuple[str, ...]) -> Subject:
    """Return a loaded model beside other compressors of its sizes, which have random weights."""
    torch.manual_seed(0)
    compressors = build_compressors(model.config, columns, model.model.compressor)
    modules = {name: module.to(model.device, model.dtype).eval() for name, module in compressors.items()}
    return Subject(model.config, model.model.eval(), model.lm_head, modules, is_whole=True)


def check_columns(columns: Sequence[str]) -> tuple[str, ...]:
    """Return the columns, ours first, each once.

    Raises:
        ValueError: one does not exist.
    """
    for column in columns:
        if column not in COLUMNS:
            raise ValueError(f"column {column!r} is not one of {', '.join(COLUMNS)}")
    return tuple(dict.fromkeys(column for column in COLUMNS if column in {*columns, "hicom"}))
