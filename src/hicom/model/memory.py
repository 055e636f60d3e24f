"""What a model takes in memory, counted from its sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .config import HIComConfig
from .modeling import HIComForConditionalGeneration

TEXT_TOKENS = 512
"""Of a question with its chat template, and its answer."""
AnyModule = TypeVar("AnyModule", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class AnsweringMemory:
    """What one question about one video takes, in bytes.

    Attributes:
        weights: all parameters.
        features: of all frames, which further questions use again.
        cache: the language model's, of visual tokens, question and answer.
        work: the largest of what the vision tower and the language model have at hand at one time.
    """

    weights: int
    features: int
    cache: int
    work: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.features + self.cache + self.work


def empty_model(config: HIComConfig) -> HIComForConditionalGeneration:
    """Return a model without memory for its weights, to count on."""
    with torch.device("meta"):
        return HIComForConditionalGeneration(config)


def without_numbers(model: AnyModule) -> AnyModule:
    """Put tensors of the mode that is active in the place of a model's parameters and buffers."""
    made: dict[Tensor, Any] = {}

    def like(tensor: Tensor) -> Any:
        if tensor not in made:  # tied ones stay tied
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            made[tensor] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
        return made[tensor]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = like(tensor)
    return model


def answering_memory(
    model: HIComForConditionalGeneration, num_frames: int, itemsize: int, *, chunk_frames: int = 32
) -> AnsweringMemory:
    """Return an estimate of what one question takes.

    Args:
        model: may be without memory.
        num_frames: of the video.
        itemsize: bytes of a number.
        chunk_frames: frames that the vision tower takes at once.
    """
    config = model.config
    vision, text = config.vision_config, config.text_config
    patches = config.grid_size**2
    tokens = model.model.token_count(num_frames) + TEXT_TOKENS
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    # Some have no heads of their own for keys, or no one width inside their MLPs.
    key_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    inside = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    keys = config.instruction_dim if config.is_conditional else 0
    # A layer holds its input, queries, keys and values, and both sides of its MLP's activation.
    tower = min(num_frames, chunk_frames) * patches * (5 * vision.hidden_size + 2 * vision.intermediate_size)
    prefill = tokens * (5 * text.hidden_size + 3 * inside)
    return AnsweringMemory(
        weights=sum(parameter.numel() for parameter in model.parameters()) * itemsize,
        features=num_frames * patches * (vision.hidden_size + keys) * itemsize,
        cache=2 * tokens * text.num_hidden_layers * key_heads * head_dim * itemsize,
        work=max(tower, prefill) * itemsize,
    )
