"""Whole training runs: functions that return a configuration. `hicom train RECIPE` runs one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .model.ops import Window
from .train import Chain, DataConfig, Parts, StageConfig, TrainConfig
from .train.config import Rates

# What no gradient can reach: an equal shift of all logits of a softmax changes nothing.
IDLE = r"model\.compressor\..*(logit_bias|k_proj\.bias)"
INJECTION = r"model\.compressor\..*injector\..*"
COMPRESSOR = r"model\.compressor\..*"
LANGUAGE_MODEL = r"(model\.language_model|lm_head)\..*"

# Table A1 of the paper, for 7B parameters.
ALIGN: Rates = ((r"model\.compressor\.local\.readout\..*", 1e-3),)
ALIGN_RELEASE: Rates = ((IDLE, 0.0), (INJECTION, 0.0), (r".*compressor\.local\.logit_scale", 1e-3), (COMPRESSOR, 1e-3))
PRETRAIN: Rates = ((IDLE, 0.0), (INJECTION, 1e-3), (COMPRESSOR, 1e-4))
TUNE: Rates = ((IDLE, 0.0), (COMPRESSOR, 1e-5), (LANGUAGE_MODEL, 1e-5))
