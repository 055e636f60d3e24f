"""Stages of the paper (Table A1), as tables of what trains and how fast."""

from __future__ import annotations

from ..model.ops import Window
from ..train import StageConfig

# Parameters that no gradient can reach: an equal shift of all logits of a softmax changes nothing.
IDLE = r"model\.compressor\..*(logit_bias|k_proj\.bias)"
INJECTION = r"model\.compressor\..*injector\..*"
LOCAL_READOUT = r"model\.compressor\.local\.readout\..*"
COMPRESSOR = r"model\.compressor\..*"
LANGUAGE_MODEL = r"(model\.language_model|lm_head)\..*"
INSTRUCTION_ENCODER = r"model\.instruction_encoder\..*"


def align(rate: float = 1e-3) -> StageConfig:
    """Stage 1 by section 3.4: compression off; the local readout alone learns to speak to the frozen language model."""
    return StageConfig(trainable=((LOCAL_READOUT, rate),), compression="off")


def align_unguided(rate: float = 1e-3) -> StageConfig:
    """Stage 1 by Table A1 (81 + 32 tokens): the compressor learns without instructions, so its injections wait."""
    return StageConfig(trainable=((IDLE, 0.0), (INJECTION, 0.0), (COMPRESSOR, rate)), compression="unguided")


def pretrain(
    rate: float = 1e-4, *, injection_rate: float | None = None, windows: tuple[Window, ...] = ()
) -> StageConfig:
    """Stage 2: the compressor learns from instructions and descriptions, injections by default ten times as fast."""
    injection = 10 * rate if injection_rate is None else injection_rate
    return StageConfig(trainable=((IDLE, 0.0), (INJECTION, injection), (COMPRESSOR, rate)), windows=windows)


def tune(rate: float = 1e-5, *, injection_rate: float | None = None, windows: tuple[Window, ...] = ()) -> StageConfig:
    """Stage 3: compressor and language model learn from questions and answers."""
    injection = rate if injection_rate is None else injection_rate
    trainable = ((IDLE, 0.0), (INJECTION, injection), (COMPRESSOR, rate), (LANGUAGE_MODEL, rate))
    return StageConfig(trainable=trainable, windows=windows)


def align_release(rate: float = 1e-3) -> StageConfig:
    """Stage 1 of the release, in which nothing is injected yet."""
    return StageConfig(trainable=((IDLE, 0.0), (COMPRESSOR, rate)), compression="unguided")


def pretrain_release(rate: float = 1e-4) -> StageConfig:
    """Stage 2 of the release, whose direct injection has no parameters that could learn faster."""
    return StageConfig(trainable=((IDLE, 0.0), (COMPRESSOR, rate)))


def tune_release(rate: float = 1e-5, tower_rate: float = 2e-6) -> StageConfig:
    """Stage 3 of the release: what makes keys and instruction learns too, at a lower rate.

    That is the head of the vision tower, as far as patches go through it, and the instruction encoder.
    """
    tower_head = r"model\.vision_tower\.head\.(layernorm|mlp)\..*"
    towers = ((tower_head, tower_rate), (INSTRUCTION_ENCODER, tower_rate))
    return StageConfig(trainable=((IDLE, 0.0), (COMPRESSOR, rate), (LANGUAGE_MODEL, rate), *towers))
