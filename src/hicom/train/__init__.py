"""Training: stages, parameter groups and the run stamp, around the Trainer of transformers."""

from .config import Chain, DataConfig, LoraOptions, Parts, StageConfig, TrainConfig
from .run import run

__all__ = ["Chain", "DataConfig", "LoraOptions", "Parts", "StageConfig", "TrainConfig", "run"]
