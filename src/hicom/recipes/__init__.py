"""Whole training runs: functions that return a configuration. `hicom train RECIPE` runs one."""

from __future__ import annotations

from collections.abc import Callable

from ..train import Chain, TrainConfig
from .published import published_recipes
from .tiny import tiny, tiny_align, tiny_gpu, tiny_pretrain, tiny_tune

RECIPES: dict[str, Callable[[], TrainConfig | Chain]] = {
    "tiny": tiny,
    "tiny-align": tiny_align,
    "tiny-pretrain": tiny_pretrain,
    "tiny-tune": tiny_tune,
    "tiny-gpu": tiny_gpu,
    **published_recipes(),
}
"""Name on the command line -> function that returns the run."""
