"""How processes share the work: tested configurations of what Trainer and accelerate bring along.

Whatever the engine, every process calls the same modules equally often (`expected_media` of the model): FSDP2 and
ZeRO-3 gather the parameters of a module from all processes as it is called, so one process that leaves a module out
would leave the others waiting for ever.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from torch import nn
from transformers import TrainingArguments

from .config import Engine

NAMES = ("activation_checkpointing", "gradient_checkpointing")
CHECKPOINTING = next(name for name in NAMES if name in TrainingArguments.__dataclass_fields__)
"""What it is called in new and old versions of transformers."""

ZERO: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    # Our optimizer comes with its groups; DeepSpeed would put its own in its place where states lie in host memory.
    "zero_force_ds_cpu_optimizer": False,
    "zero_allow_untested_optimizer": True,
}
"""What both stages of ZeRO say; `auto` is filled in from the run's configuration by Trainer."""


def zero_config(engine: Engine) -> dict[str, Any]:
    """Return a DeepSpeed configuration."""
    if engine == "zero2":
        return ZERO | {"zero_optimization": {"stage": 2, "contiguous_gradients": True, "overlap_comm": True}}
    # The trained model is saved as one plain checkpoint, so the main process needs whole weights at the end.
    return ZERO | {
        "zero_optimization": {
            "stage": 3,
            "contiguous_gradients": True,
            "overlap_comm": True,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    }


def layer_classes(model: nn.Module) -> list[str]:
    """Return the classes of the layers of towers and language model, which are gathered one at a time.

    The compressor is small beside them, and parts of the towers' heads are called one by one: these stay together.
    """
    lists = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "layers"]
    return sorted({type(layer).__name__ for layers in lists for layer in layers.children()})


def fsdp2_config(model: nn.Module, gradient_checkpointing: bool) -> dict[str, Any]:
    """Return a configuration of FSDP2: parameters, gradients and optimizer states of every layer are spread."""
    return {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": layer_classes(model),
        "reshard_after_forward": True,
        # Checkpoints of a run: every process writes its part.
        "state_dict_type": "SHARDED_STATE_DICT",
        # FSDP's own: that of transformers would gather every layer once more.
        "activation_checkpointing": gradient_checkpointing,
    }


def launched_engine(environment: Mapping[str, str] = os.environ) -> Engine | None:
    """Return the engine that `accelerate launch` was configured for, which is then configured by its file.

    Raises:
        ValueError: it is none that we know to work.
    """
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1"):
        version = environment.get("FSDP_VERSION", "1")
        if version != "2":
            raise ValueError(f"the accelerate configuration says fsdp_version: {version}; hicom trains with 2")
        return "fsdp2"
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1"):
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        stages: dict[str, Engine] = {"2": "zero2", "3": "zero3"}
        if stage not in stages:
            raise ValueError(f"the accelerate configuration says zero_stage: {stage}; hicom trains with 2 or 3")
        return stages[stage]
    return None


def choose_engine(engine: Engine | None, num_processes: int, optimizer: str) -> Engine:
    """Return the engine of a run: its own, or the launcher's, or `ddp`.

    Raises:
        ValueError: the choice is impossible, made twice, or lacks its package.
    """
    launched = launched_engine()
    if engine is not None and launched is not None:
        raise ValueError(
            f"engine={engine!r} is given and the accelerate configuration chooses {launched!r}; leave one of them out"
        )
    chosen = engine or launched or "ddp"
    if chosen == "ddp":
        return chosen
    if chosen == "fsdp2" and num_processes == 1:
        raise ValueError("engine='fsdp2' spreads a model over processes, and there is one; start more with torchrun")
    if optimizer == "muon":
        raise ValueError(
            f"optimizer='muon' needs whole matrices, which engine={chosen!r} does not keep; train with "
            "optimizer='adamw', or with engine='ddp'"
        )
    if chosen in ("zero2", "zero3") and find_spec("deepspeed") is None:
        raise ValueError(f"engine={chosen!r} needs DeepSpeed: pip install 'hicom[deepspeed]'")
    return chosen


def engine_arguments(engine: Engine, model: nn.Module, gradient_checkpointing: bool) -> dict[str, Any]:
    """Return the fields of `TrainingArguments` that make an engine, and have activations computed again."""
    is_launched = launched_engine() is not None
    if engine == "fsdp2" and not is_launched:
        return {"fsdp": True, "fsdp_config": fsdp2_config(model, gradient_checkpointing)}
    arguments: dict[str, Any] = {}
    if gradient_checkpointing:
        arguments |= {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}}
    if engine in ("zero2", "zero3") and not is_launched:
        arguments["deepspeed"] = zero_config(engine)
    return arguments


def state_parts(
    engine: Engine, num_parameters: int, num_trained: int, num_processes: int, *, bf16: bool
) -> tuple[int, int, int]:
    """Return the bytes that weights, gradients and AdamW's states take on one device, activations left out.

    DDP and FSDP2 keep weights in 32 bit and compute in 16 under `bf16`; DeepSpeed keeps weights and gradients in 16
    bit, and a copy in 32 bit of what it trains, here one of the states (ZeRO, Rajbhandari et al., 2020, section 3).

    Args:
        engine: how they are spread.
        num_parameters: of the model, those included that are frozen.
        num_trained: of these.
        num_processes: devices that share.
        bf16: whether training is in mixed precision.
    """
    weight = 2 if bf16 and engine in ("zero2", "zero3") else 4
    state = 12 if engine in ("zero2", "zero3") else 8
    whole = (weight * num_parameters, weight * num_trained, state * num_trained)
    num_kept = {"ddp": 3, "fsdp2": 0, "zero2": 1, "zero3": 0}[engine]
    weights, gradients, states = whole[:num_kept] + tuple(-(-part // num_processes) for part in whole[num_kept:])
    return weights, gradients, states


def state_bytes(engine: Engine, num_parameters: int, num_trained: int, num_processes: int, *, bf16: bool) -> int:
    """Return the sum of `state_parts`, whose arguments it takes."""
    return sum(state_parts(engine, num_parameters, num_trained, num_processes, bf16=bf16))
