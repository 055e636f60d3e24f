"""Tiny random LLaVA models of transformers, their processors, and dual encoders to attach to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    LlavaNextImageProcessorPil,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
)
from transformers.video_processing_utils import BaseVideoProcessor

import tiny
from hicom.model.dual_encoder import CLIP_NORMALISATION, SIGLIP_NORMALISATION

FAMILIES = ("onevision", "llava_video", "next_video")
VICUNA = (
    "{% for message in messages %}{{ 'USER: ' if message['role'] == 'user' else ' ASSISTANT: ' }}"
    "{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
IDS = {"video_token_index": tiny.SPECIAL.index("<video>"), "image_token_index": tiny.SPECIAL.index("<image>")}

# What chat templates and answer formats need beyond the words of `tiny`.
WORDS = ["USER", "ASSISTANT", "option"]


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a word tokenizer."""
    words = tiny.tokenizer()
    words.add_tokens(WORDS)
    return words


def llm(kind: str) -> dict[str, Any]:
    """Return the configuration of a language model for `tokenizer`."""
    return tiny.llm(kind).to_dict() | {"vocab_size": tiny.VOCABULARY + len(WORDS)}


def shake(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Give a model weights that are large enough to tell inputs apart."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.nan_to_num() + 0.15 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def dual_encoder(kind: str, seed: int = 1, **vision: Any) -> Any:
    """Return a random dual encoder; `vision` are fields of its vision tower."""
    vision_config, text_config = tiny.towers(kind)
    parts = {
        "vision_config": vision_config.to_dict() | vision,
        "text_config": text_config.to_dict() | {"vocab_size": tiny.VOCABULARY + len(WORDS)},
    }
    if kind == "clip":
        model: Any = CLIPModel(CLIPConfig(**parts, projection_dim=24))
    else:
        model = SiglipModel(SiglipConfig(**parts)) if kind == "siglip" else Siglip2Model(Siglip2Config(**parts))
    shake(model, seed)
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
    return model


def model(family: str, seed: int = 0, **fields: Any) -> Any:
    """Return a random model of a family: grids of 5x5 patches (SigLIP) or 6x6 (CLIP)."""
    torch.manual_seed(seed)
    if family == "next_video":
        vision = tiny.towers("clip")[0].to_dict() | {"image_size": 24}
        settings = {"vision_config": vision, "text_config": llm("llama")} | IDS | fields
        random: Any = LlavaNextVideoForConditionalGeneration(LlavaNextVideoConfig(**settings))
    else:
        vision = tiny.towers("siglip")[0].to_dict()
        if family == "llava_video":  # as published ones: without the last layer and without the head
            vision |= {"vision_use_head": False, "num_hidden_layers": 1}
        settings = {"vision_config": vision, "text_config": llm("qwen2")} | IDS
        settings |= {"image_grid_pinpoints": [[20, 20], [20, 40], [40, 20], [40, 40]]} | fields
        random = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(**settings))
    shake(random, seed)
    random.generation_config.eos_token_id = None
    random.generation_config.pad_token_id = 0
    return random


class PlainVideoProcessor(BaseVideoProcessor):
    """Stands in for the video processors of transformers, all of which need torchvision: takes pixels as they are."""

    def __init__(self, family: str) -> None:
        self.image_mean, self.image_std = CLIP_NORMALISATION if family == "next_video" else SIGLIP_NORMALISATION

    def __call__(self, videos: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Stack videos `float[T, 3, S, S]`."""
        return {"pixel_values_videos": torch.stack(list(videos))}


class _AnyVideoProcessor(ProcessorMixin):
    """Lets a processor be made where transformers cannot even look up the class that a video processor must have."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        return type(argument)


class OnevisionProcessor(_AnyVideoProcessor, LlavaOnevisionProcessor):
    """As published in all else."""


class NextVideoProcessor(_AnyVideoProcessor, LlavaNextVideoProcessor):
    """As published in all else."""


def processor(family: str) -> ProcessorMixin:
    """Return the family's own processor, except for its video half."""
    words, videos = tokenizer(), PlainVideoProcessor(family)
    if family == "next_video":
        return NextVideoProcessor(
            video_processor=videos,
            image_processor=LlavaNextImageProcessorPil(size={"shortest_edge": 24}, crop_size=24),
            tokenizer=words,
            patch_size=4,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=VICUNA,
        )
    return OnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessorPil(
            size={"height": 20, "width": 20}, image_grid_pinpoints=[[20, 20], [20, 40], [40, 20], [40, 40]]
        ),
        tokenizer=words,
        video_processor=videos,
        num_image_tokens=25,
        vision_feature_select_strategy="full",
        chat_template=words.chat_template,
    )


def videos(family: str, number: int, num_frames: int, seed: int = 0) -> Tensor:
    """Return random normalised pixels, `float[V, T, 3, S, S]`."""
    size = 24 if family == "next_video" else 20
    return torch.randn(number, num_frames, 3, size, size, generator=torch.Generator().manual_seed(seed))


def prompt(family: str, *turns: str) -> str:
    """Return a prompt of user turns, with "yes" as the answer to all but the last."""
    messages = []
    for turn in turns:
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": "yes"}]
    return str(processor(family).apply_chat_template(messages[:-1], add_generation_prompt=True))
