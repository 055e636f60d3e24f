"""The embedded model `hicom-tiny`: everything from nothing on a CPU, in the sprite world."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import tyro

from ..model.ops import Window
from ..train import Chain, DataConfig, Parts, TrainConfig
from .stages import align, pretrain, tune

TINY_WINDOWS: tuple[Window, ...] = ((4, 4, 4), (2, 4, 4), (8, 4, 4), (4, 8, 8))
"""Drawn from in stage `tune`, so one set of weights serves many budgets; the model's own comes first."""


TOY = "procedural clips of sprites and coloured shapes"
ABOUT = f"{TOY}; `hicom world preview` shows some"


def tiny_data(root: str, *names: str) -> DataConfig:
    """Return records of the sprite world, which `hicom world make runs/world` writes."""
    world = f"{root}/world"
    records = tuple(f"{world}/train/{name}.jsonl" for name in names)
    return DataConfig(records=records, root=world, num_frames=8, cache=f"{root}/features", about=ABOUT)


def tiny_parts(root: str = "runs") -> Parts:
    """What `hicom-tiny` is put together of: the paper's compressor with all options beyond the paper."""
    return Parts(
        towers=f"{root}/towers",
        language_model=f"{root}/reader",
        window=TINY_WINDOWS[0],
        num_global_tokens=4,
        config={"match_evidence": True, "motion_features": True, "num_pointers": 4, "num_word_pointers": 2, "toy": TOY},
    )


def tiny_align(root: str = "runs") -> TrainConfig:
    """Stage 1 of `hicom-tiny`: captions, compression off. Command: `hicom train tiny-align`."""
    return TrainConfig(
        name="align",
        out=f"{root}/tiny/align",
        parts=tiny_parts(root),
        data=tiny_data(root, "align"),
        stage=align(2e-3),
        steps=250,
        batch_size=8,
        global_batch_size=16,
        log_every=20,
    )


def tiny_pretrain(root: str = "runs") -> TrainConfig:
    """Stage 2 of `hicom-tiny`: instructions and descriptions. Command: `hicom train tiny-pretrain`."""
    return TrainConfig(
        name="pretrain",
        out=f"{root}/tiny/pretrain",
        init=f"{root}/tiny/align/model",
        data=tiny_data(root, "pretrain"),
        # Ten times the rate, as the paper has it, costs the answers here (docs/ablations.md, Table 5).
        stage=pretrain(2e-4, injection_rate=2e-4, windows=TINY_WINDOWS[:2]),
        steps=800,
        batch_size=32,
        global_batch_size=64,
        group_by_length=True,
        per_video=4,
    )


def tiny_tune(root: str = "runs") -> TrainConfig:
    """Stage 3 of `hicom-tiny`: questions and answers, windows drawn at random. Command: `hicom train tiny-tune`."""
    return TrainConfig(
        name="tune",
        out=f"{root}/tiny/tune",
        init=f"{root}/tiny/pretrain/model",
        data=tiny_data(root, "tune", "compare"),
        # The direct injection starts as the identity; a high rate wears that away, and instructions point nowhere.
        stage=tune(3e-3, injection_rate=3e-4, windows=TINY_WINDOWS),
        optimizer="muon",
        steps=10000,
        batch_size=32,
        global_batch_size=64,
        group_by_length=True,
        per_video=4,
        weight_decay=0.02,
    )


def tiny_options(root: str = "runs") -> TrainConfig:
    """Stage 3 once more, with options to pick from in four of ten questions. Command: `hicom train tiny-options`."""
    return dataclasses.replace(
        tiny_tune(root),
        name="options",
        out=f"{root}/tiny/options",
        init=f"{root}/tiny/tune/model",
        data=tiny_data(root, "tune", "compare", "choice"),
        stage=tune(1e-3, injection_rate=1e-4, windows=TINY_WINDOWS),
        steps=2500,
    )


@dataclass(frozen=True, kw_only=True)
class ReaderSize:
    """The language model that reads (`hicom.world.reader`).

    Attributes:
        steps: training steps.
        hidden_size: width.
        intermediate_size: width inside its MLPs.
        num_layers: layers.
        num_heads: attention heads.
    """

    steps: int = 3000
    hidden_size: int = 128
    intermediate_size: int = 256
    num_layers: int = 4
    num_heads: int = 4


@dataclass(frozen=True, kw_only=True)
class FromNothing(Chain):
    """A chain that first makes its own data, towers and language model.

    Attributes:
        root: folder of all these, which the stages name too.
        num_clips: clips to train on.
        tower_steps: training steps of the dual encoder, beside frames.
        text_steps: further steps of its text tower, from texts that name several things.
        reader: the language model that reads, and how it learns to.
        seed: of the world, the dual encoder and the language model.
    """

    makes_data: ClassVar[bool] = True

    root: tyro.conf.Suppress[str] = "runs"
    num_clips: int = 40000
    tower_steps: int = 5000
    text_steps: int = 1000
    reader: ReaderSize = ReaderSize()
    seed: int = 0

    def prepare(self) -> Path | None:
        """Write clips, train the dual encoder, teach the language model to read; what is there already is kept."""
        from ..world import reader, text_tower, towers
        from ..world.dataset import make_dataset, make_world
        from ..world.loop import beside

        root = Path(self.root)
        make_dataset(root / "world", HELD_OUT_CLIPS | {"train": self.num_clips}, make_world(self.seed))

        def train_towers() -> None:
            towers.train(towers.TowerConfig(steps=self.tower_steps, seed=self.seed), root / "frames")
            lesson = text_tower.TextTowerConfig(steps=self.text_steps, seed=self.seed)
            text_tower.train(lesson, root / "frames", root / "towers")

        reading = reader.ReaderConfig(**dataclasses.asdict(self.reader), seed=self.seed), root / "reader"
        is_missing = {name: not (root / name / "run.json").exists() for name in ("towers", "reader")}
        if all(is_missing.values()):
            # Either takes long on one core, gains little from a second one, and neither needs the other.
            with beside(reader.train, *reading):
                train_towers()
        elif is_missing["towers"]:
            train_towers()
        elif is_missing["reader"]:
            reader.train(*reading)
        return None


HELD_OUT_CLIPS = {"val": 500, "test": 2000, "test_pairs": 1000, "test_scenes": 1000, "test_long": 300}


def tiny() -> FromNothing:
    """`hicom-tiny` from nothing: the world, the dual encoder and all stages. Command: `hicom train tiny`."""
    return FromNothing(out="runs/tiny", stages=(tiny_align(), tiny_pretrain(), tiny_tune(), tiny_options()))


def tiny_gpu() -> FromNothing:
    """A larger `hicom-tiny` for one GPU: more clips, a wider language model, longer stages; not run by us yet."""
    root = "runs/gpu"
    stages = (
        (tiny_align(root), 500),
        (tiny_pretrain(root), 2000),
        (tiny_tune(root), 40000),
        (tiny_options(root), 10000),
    )
    gpu: dict[str, Any] = {"batch_size": 256, "global_batch_size": None, "bf16": True, "workers": 8}
    larger = (dataclasses.replace(stage, steps=steps, **gpu) for stage, steps in stages)
    wider = ReaderSize(steps=20000, hidden_size=256, intermediate_size=768, num_layers=6, num_heads=8)
    out = f"{root}/tiny"
    return FromNothing(out=out, root=root, stages=tuple(larger), num_clips=100000, tower_steps=20000, reader=wider)
