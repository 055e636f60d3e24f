"""Steering for trainers that hand a model only the inputs they know by name, and so lose the instruction."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..model.instruction import extract_instruction
from ..model.modeling import HIComModel
from ..model.processing import HIComProcessor


@contextmanager
def steered_by_prompts(model: nn.Module, processor: HIComProcessor) -> Iterator[None]:
    """Have a model read the instruction of images from its prompt where a caller passes none.

    TRL's `GRPOTrainer` computes log-probabilities of what was answered with `input_ids` and `pixel_values` alone. While
    this context lasts, the last user turn in `input_ids` steers, as it did when the answer was made.

    Args:
        model: a HICom model, also wrapped (PEFT, DDP).
        processor: the model's.

    Raises:
        ValueError: there is no HICom model in `model`.
    """
    found = next((module for module in model.modules() if isinstance(module, HIComModel)), None)
    if found is None:
        raise ValueError(f"{type(model).__name__} holds no HICom model, so no prompt can steer it")

    def add_instruction(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        is_lost = kwargs.get("pixel_values") is not None and kwargs.get("image_instruction_input_ids") is None
        if not is_lost or not processor.is_conditional:
            return args, kwargs
        ids, mask = processor.instruction_inputs(
            _instructions(kwargs["input_ids"], kwargs["attention_mask"], processor)
        )
        device = kwargs["input_ids"].device
        added = {"image_instruction_input_ids": ids.to(device)}
        if mask is not None:
            added["image_instruction_attention_mask"] = mask.to(device)
        return args, {**kwargs, **added}

    hook = found.register_forward_pre_hook(add_instruction, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _instructions(input_ids: Tensor, attention_mask: Tensor, processor: HIComProcessor) -> list[str]:
    """Return the instruction of every image of a batch, in reading order."""
    lines = []
    for row, is_token in zip(input_ids, attention_mask, strict=True):
        is_image = row == processor.image_token_id
        words = row[(is_token == 1) & ~is_image & (row != processor.video_token_id)]
        text = processor.tokenizer.decode(words, clean_up_tokenization_spaces=False)
        line = extract_instruction(processor._last_user_turn(text))
        lines += [line] * (int(is_image.sum()) // processor.token_count(1))
    return lines
