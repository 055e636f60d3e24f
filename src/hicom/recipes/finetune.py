"""Tuning a trained model on your own videos: all weights, LoRA or QLoRA (docs/finetune.md)."""

from __future__ import annotations

import dataclasses

import torch
import tyro

from ..train import DataConfig, LoraOptions, StageConfig, TrainConfig
from .stages import tune

ADAPTER_RATE = 2e-4
"""Of adapters, which want ten and more times the rate of whole weights (QLoRA, table 9, has 2e-4 for 7B)."""


def finetune(init: str = tyro.MISSING, records: tuple[str, ...] = tyro.MISSING) -> TrainConfig:
    """Tune a trained model on your own records: compressor and language model, with all weights.

    `hicom train finetune --init MODEL --data.records train.jsonl --out runs/mine`. It is stage 3 of the paper, three
    times over few samples: both learn at 1e-5, towers are frozen. Activations are computed again in the backward pass,
    and on a GPU the run is in mixed precision. --estimate says what it takes, beside LoRA and QLoRA.

    Args:
        init: model to start from: a folder, a hub id or the name of an embedded model.
        records: JSON or JSONL files of records, and YAML mixtures of them.
    """
    return TrainConfig(
        name="finetune",
        out="runs/finetune",
        init=init,
        data=DataConfig(records=records, num_frames=None),
        stage=tune(1e-5),
        epochs=3.0,
        batch_size=2,
        global_batch_size=16,
        betas=(0.9, 0.999),
        save_every=200,
        log_every=10,
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=True,
        group_by_length=True,
    )


def finetune_lora(init: str = tyro.MISSING, records: tuple[str, ...] = tyro.MISSING) -> TrainConfig:
    """Tune a trained model on your own records: compressor, and adapters on the language model (LoRA).

    `hicom train finetune-lora --init MODEL --data.records train.jsonl --out runs/mine`. The adapters learn at 2e-4, the
    compressor, as a whole, at 1e-5. The run writes `adapter/` and a plain `model/` with it added in.

    Args:
        init: model to start from: a folder, a hub id or the name of an embedded model.
        records: JSON or JSONL files of records, and YAML mixtures of them.
    """
    *compressor, (language_model, _) = tune(1e-5).trainable
    stage = StageConfig(trainable=(*compressor, (language_model, ADAPTER_RATE)))
    return dataclasses.replace(
        finetune(init, records), name="finetune-lora", out="runs/finetune-lora", stage=stage, lora=LoraOptions()
    )


def finetune_qlora(init: str = tyro.MISSING, records: tuple[str, ...] = tyro.MISSING) -> TrainConfig:
    """Tune a trained model on your own records: as finetune-lora, with the language model in 4 bit (QLoRA).

    `hicom train finetune-qlora --init MODEL --data.records train.jsonl --out runs/mine`, after `pip install
    'hicom[qlora]'`. `model/` has the adapter added to the weights as they were before they were quantised.

    Args:
        init: model to start from: a folder, a hub id or the name of an embedded model.
        records: JSON or JSONL files of records, and YAML mixtures of them.
    """
    return dataclasses.replace(
        finetune_lora(init, records),
        name="finetune-qlora",
        out="runs/finetune-qlora",
        lora=LoraOptions(quantize="4bit"),
    )
