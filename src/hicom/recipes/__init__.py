"""Whole training runs: functions that return a configuration. `hicom train RECIPE` runs one."""

from __future__ import annotations

from collections.abc import Callable

from ..train import Chain, TrainConfig
from .finetune import finetune, finetune_lora, finetune_qlora
from .published import published_recipes
from .tiny import tiny, tiny_align, tiny_gpu, tiny_options, tiny_pretrain, tiny_tune

RECIPES: dict[str, Callable[[], TrainConfig | Chain]] = {
    "tiny": tiny,
    "tiny-align": tiny_align,
    "tiny-pretrain": tiny_pretrain,
    "tiny-tune": tiny_tune,
    "tiny-options": tiny_options,
    "tiny-gpu": tiny_gpu,
    "finetune": finetune,
    "finetune-lora": finetune_lora,
    "finetune-qlora": finetune_qlora,
    **published_recipes(),
}
"""Name on the command line -> function that returns the run."""
