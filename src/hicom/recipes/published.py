"""The training of the paper (section 4.1, Tables 4 and A1) for its three sizes, and that of the released code.

Nobody has run these here: they need weights from the hub, the data sets and GPUs. What each parameter does in each
stage is tested against the paper's table (`tests/test_recipes.py`).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tyro

from ..bench.floor import Cost, compressor_cost, instruction_cost, prefill_cost, vision_cost
from ..bench.shapes import published_config
from ..files import writing_folder
from ..model.assemble import NO_INSTRUCTION, assemble
from ..model.modeling import HIComForConditionalGeneration
from ..model.processing import HIComProcessor
from ..train import Chain, DataConfig, StageConfig, TrainConfig
from ..train.config import Engine
from .stages import align, align_release, align_unguided, pretrain, pretrain_release, tune, tune_release

SizeName = Literal["0.5b", "1.5b", "7b"]
StageName = Literal["align", "pretrain", "tune"]
STAGES: tuple[StageName, ...] = ("align", "pretrain", "tune")

VISION = "google/siglip-so400m-patch14-384"
RELEASED_PROCESSING = {"pixels": "exact", "short_videos": "repeat"}
"""How the released code makes pixels; its first stage also squeezes pictures, and the others pad them."""
GUIDED = {"local_injection": "direct", "global_injection": "direct"}
"""Injections of the released model."""
SAMPLES: dict[StageName, int] = {"align": 558_128, "pretrain": 739_000, "tune": 2_680_000}
"""Samples of the paper's mixtures, which `examples/mixtures/` names: answered turns, as the release counts, too.

The 248,328 clips of HICom-248K have 739K pairs of an instruction and its description. Of stage `tune` the paper does
not say whether its 2.68M are records or turns; records of several turns make it longer.
"""
MAX_TEXT_TOKENS = 4096
"""Longest sample of the release's script (`model_max_length`), which counts a video or image as one token."""
BEFORE: dict[StageName, str] = {"align": "start", "pretrain": "align/model", "tune": "pretrain/model"}
"""What a stage starts from; `start` is made by `hicom convert assemble`, and by the chains themselves."""
FRAMES: dict[StageName, int] = {"align": 1, "pretrain": 32, "tune": 32}
TEXT_TOKENS = 100
"""Of a question with its answer, about."""
NUM_GPUS = 8
GPU_FLOPS_PER_S = 312e12
"""Of an A100 or A800 in bfloat16, without sparsity."""
UTILISATION = 0.4
"""Share of it that a well-kept training reaches."""
RESULTS: dict[SizeName, str] = {
    "0.5b": (
        "the paper's ablations (Table 4, tuned on 896K samples of VideoChat2-IT, not on this mixture): Video-MME 36.6, "
        "MVBench 45.0, EgoSchema 43.5"
    ),
    "1.5b": "Table 2, 32 frames: Video-MME 52.3, with subtitles 55.7, MVBench 56.4, EgoSchema 50.1",
    "7b": (
        "Table 2, 32 frames: Video-MME 58.1, with subtitles 60.1, MVBench 64.1, EgoSchema 60.5; 64 frames: 58.9, 63.3, "
        "64.7, 62.2"
    ),
}


@dataclass(frozen=True)
class Size:
    """What differs between the paper's sizes.

    Attributes:
        llm: hub id of the language model.
        global_batch_size: of the stages `pretrain` and `tune` (Table A1: 512 for 0.5B, 256 from 7B on).
        batch_sizes: samples that one GPU of 80 GB is to take at once, by stage.
        tune_engine: what spreads the model over the GPUs in the stage `tune`; None: it fits as a whole.
    """

    llm: str
    global_batch_size: int
    batch_sizes: dict[StageName, int]
    tune_engine: Engine | None = None


SIZES: dict[SizeName, Size] = {
    "0.5b": Size("Qwen/Qwen2.5-0.5B-Instruct", 512, {"align": 64, "pretrain": 16, "tune": 8}),
    # Table A1 does not name this size; it counts as below 7B.
    "1.5b": Size("Qwen/Qwen2.5-1.5B-Instruct", 512, {"align": 64, "pretrain": 16, "tune": 8}),
    "7b": Size("Qwen/Qwen2.5-7B-Instruct", 256, {"align": 32, "pretrain": 8, "tune": 2}, "fsdp2"),
}


def paper_stage(size: SizeName, stage: StageName) -> TrainConfig:
    """Return a stage of the paper for one size: Table A1, and section 4.1 for what it leaves out.

    Every stage is one epoch with AdamW, a cosine after 3 % of warm-up and no weight decay; towers are frozen
    throughout, the language model up to stage 3.

    `align`
        558K captioned images of LLaVA, 81 + 32 tokens each. The compressor learns without instructions at 1e-3.
    `pretrain`
        739K pairs of an instruction and a description, of 248K clips (HICom-248K), 32 frames, 648 + 32 tokens. The
        compressor learns at 1e-4, its injections at 1e-3.
    `tune`
        2.68M samples of seven data sets, 32 frames. Compressor and language model learn at 1e-5.
    """
    stages: dict[StageName, StageConfig] = {
        "align": align_unguided(1e-3),
        "pretrain": pretrain(1e-4),
        "tune": tune(1e-5),
    }
    return make_stage(f"runs/{size}", SIZES[size], stage, stages[stage])


def release_stage(stage: StageName) -> TrainConfig:
    """Return a stage of the released code (`scripts/qwen2.5_7B/release/directg_local43_global32.sh`), 7B.

    It differs from the paper's: `align` has a compressor that nothing steers, whose weights the next stage takes over;
    then both branches are injected directly, in the dialect `release`; `pretrain` has steps of 512 samples; `tune` also
    trains what makes keys and instructions (the vision tower's head and the instruction encoder) at 2e-6, on a
    somewhat different mixture.
    """
    stages: dict[StageName, StageConfig] = {
        "align": align_release(1e-3),
        "pretrain": pretrain_release(1e-4),
        "tune": tune_release(1e-5, 2e-6),
    }
    size = dataclasses.replace(SIZES["7b"], global_batch_size=512 if stage == "pretrain" else 256)
    config = make_stage("runs/release-7b", size, stage, stages[stage])
    if stage == "pretrain":
        return dataclasses.replace(config, init="runs/release-7b/guided")
    if stage == "align":
        return config
    data = dataclasses.replace(config.data, records=("data/hicom/tune-release.yaml",))
    return dataclasses.replace(config, data=data)


def make_stage(root: str, size: Size, stage: StageName, config: StageConfig) -> TrainConfig:
    """Return what all published stages have in common."""
    return TrainConfig(
        name=stage,
        out=f"{root}/{stage}",
        init=f"{root}/{BEFORE[stage]}",
        data=DataConfig(records=(f"data/hicom/{stage}.yaml",), num_frames=32, max_text_tokens=MAX_TEXT_TOKENS),
        stage=config,
        epochs=1.0,
        global_batch_size=512 if stage == "align" else size.global_batch_size,
        batch_size=size.batch_sizes[stage],
        warmup=0.03,
        betas=(0.9, 0.999),
        bf16=True,
        workers=8,
        gradient_checkpointing=True,
        engine=size.tune_engine if stage == "tune" else None,
    )


def align_off(size: SizeName) -> TrainConfig:
    """Return stage 1 as section 3.4 of the paper has it, in place of Table A1's: compression is off.

    The local readout alone learns at 1e-3, on all patches of an image, which make samples as long as those of stage 2.
    """
    batch_size = SIZES[size].batch_sizes["pretrain"]
    return dataclasses.replace(paper_stage(size, "align"), stage=align(1e-3), batch_size=batch_size)


@dataclass(frozen=True, kw_only=True)
class Published(Chain):
    """A published chain, which first puts together what it starts from.

    Attributes:
        vision: dual encoder: a folder or a hub id.
        llm: language model: likewise.
        compressor: fields of `HIComConfig` beyond the defaults.
        processing: fields of the processor beyond the defaults, where the first stage starts.
    """

    vision: str = VISION
    llm: str
    compressor: tyro.conf.Suppress[dict[str, Any]] = dataclasses.field(default_factory=dict)
    processing: tyro.conf.Suppress[dict[str, str]] = dataclasses.field(default_factory=dict)

    def prepare(self) -> Path | None:
        """Write `start`, where it is missing: the towers, the language model and a new compressor."""
        start = Path(self.out) / "start"
        if not (start / "processor_config.json").exists():  # written last
            save(*assemble(self.vision, self.llm, **self.compressor), start, self.processing)
        return start


@dataclass(frozen=True, kw_only=True)
class Released(Published):
    """The chain of the released code, in which instructions come in after the first stage."""

    def hand_over(self, model: Path, stage: TrainConfig) -> Path:
        """Write `guided` before stage `pretrain`, where it is missing: the compressor so far, with its injections."""
        if stage.name != "pretrain":
            return model
        guided = Path(self.out) / "guided"
        if not (guided / "processor_config.json").exists():
            fields = self.compressor | GUIDED
            made = assemble(self.vision, self.llm, compressor_from=model, **fields)
            save(*made, guided, self.processing | {"image_aspect_ratio": "pad"})
        return guided


def save(
    model: HIComForConditionalGeneration, processor: HIComProcessor, folder: Path, processing: dict[str, str]
) -> None:
    """Save a model and its processor with these fields, in place of what is there."""
    for name, value in processing.items():
        setattr(processor, name, value)
    with writing_folder(folder, replace=True) as part:
        model.save_pretrained(part)
        processor.save_pretrained(part)


def paper_chain(size: SizeName) -> Published:
    """Return all stages of the paper for one size."""
    return Published(out=f"runs/{size}", llm=SIZES[size].llm, stages=tuple(paper_stage(size, s) for s in STAGES))


def release_chain() -> Released:
    """Return all stages of the released code."""
    compressor = {"dialect": "release", **NO_INSTRUCTION}
    stages = tuple(release_stage(stage) for stage in STAGES)
    processing = RELEASED_PROCESSING | {"image_aspect_ratio": "square"}
    llm = SIZES["7b"].llm
    return Released(out="runs/release-7b", llm=llm, compressor=compressor, processing=processing, stages=stages)


# What they take


def sample_cost(size: SizeName, stage: StageName, *, is_off: bool = False) -> Cost:
    """Return what one sample costs: forward, backward, and the second forward pass of gradient checkpointing.

    Frozen towers only go forward. A frozen language model still passes gradients on to the compressor, which costs as
    much as its forward pass; where it learns, its weights' gradients cost as much again. With `is_off` nothing is
    compressed.
    """
    config, frames = published_config(size), FRAMES[stage]
    visual = frames * config.grid_size**2 if is_off else -(-frames // 4) * 81 + 32
    tokens = visual + TEXT_TOKENS
    cost = vision_cost(config, frames, 2, has_keys=stage != "align")
    if stage != "align":
        cost += instruction_cost(config, 2)
    cost += compressor_cost(config, "hicom", frames, 2) * 3
    return cost + prefill_cost(config, tokens, 2) * (4 if stage == "tune" else 3)


def hours(size: SizeName, stages: tuple[StageName, ...] = STAGES, *, is_off: bool = False) -> float:
    """Return the hours that 8 GPUs compute, at the usual share of their peak; decoding may take longer."""
    flops = sum(sample_cost(size, stage, is_off=is_off).flops * SAMPLES[stage] for stage in stages)
    return flops / (NUM_GPUS * GPU_FLOPS_PER_S * UTILISATION) / 3600


def recipe(make: Callable[[], TrainConfig | Chain], summary: str, text: str) -> Callable[[], TrainConfig | Chain]:
    """Return `make` as a function whose docstring says what it is."""

    def function() -> TrainConfig | Chain:
        return make()

    function.__doc__ = f"{summary}\n\n{inspect.cleandoc(text)}"
    return function


def describe(name: str, size: SizeName, stages: tuple[StageName, ...], *, is_off: bool = False) -> str:
    """Return command, hardware, expected time and expected result of a recipe, for its docstring."""
    is_last, time_h = stages[-1] == "tune", hours(size, stages, is_off=is_off)
    result = RESULTS[size] if is_last else "the paper gives no figure for a model that stops here"
    return f"""
        Command: `torchrun --nproc-per-node {NUM_GPUS} -m hicom train {name}`.
        Hardware: {NUM_GPUS} GPUs of 80 GB, as the paper had; other numbers need another `--batch-size` at most.
        Expected time: {time_h:.1f} hours of pure computing at {UTILISATION:.0%} of an A800's peak;
        decoding videos, which the stages do as they go, may well take longer.
        Expected result: {result}.
        Not run by us: no such machine was at hand.
    """


def published_recipes() -> dict[str, Callable[[], TrainConfig | Chain]]:
    """Return all recipes by name."""
    found: dict[str, Callable[[], TrainConfig | Chain]] = {}
    for size in SIZES:
        summary = f"HICom-{size.upper()} as in the paper: all three stages, from SigLIP and Qwen2.5."
        found[size] = recipe(partial(paper_chain, size), summary, describe(size, size, STAGES))
        for number, stage in enumerate(STAGES, 1):
            name = f"{size}-{stage}"
            summary = f"Stage {number} of HICom-{size.upper()} as in the paper, from runs/{size}/{BEFORE[stage]}."
            found[name] = recipe(partial(paper_stage, size, stage), summary, describe(name, size, (stage,)))
        name = f"{size}-align-off"
        summary = f"Stage 1 of HICom-{size.upper()} as section 3.4 has it: compression off, the readout learns alone."
        found[name] = recipe(partial(align_off, size), summary, describe(name, size, ("align",), is_off=True))
    name = "release-7b"
    summary = "The released HICom-7B: all three stages of its script."
    found[name] = recipe(release_chain, summary, describe(name, "7b", STAGES))
    for number, stage in enumerate(STAGES, 1):
        summary = f"Stage {number} of the released HICom-7B, from {release_stage(stage).init}."
        name = f"release-7b-{stage}"
        found[name] = recipe(partial(release_stage, stage), summary, describe(name, "7b", (stage,)))
    return found
