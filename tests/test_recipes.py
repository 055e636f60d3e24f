"""The published recipes against what the paper and the released script say, parameter by parameter."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from assembling import save_llm, save_pair
from hicom.bench.shapes import published_config
from hicom.data.collate import SampleSet
from hicom.data.mixture import parse_source, read_sources
from hicom.model.config import HIComConfig
from hicom.model.memory import empty_model
from hicom.model.modeling import HIComForConditionalGeneration
from hicom.model.processing import HIComProcessor
from hicom.recipes import RECIPES
from hicom.recipes.published import SAMPLES, STAGES, Published, hours, release_chain
from hicom.train import Chain, TrainConfig, run
from hicom.train.stages import resolve
from toy_training import make_records

EXAMPLES = Path(__file__).parents[1] / "examples" / "mixtures"
SIZES = ("0.5b", "1.5b", "7b")
# An equal shift of all logits of a softmax changes nothing: no gradient can reach it.
UNREACHABLE = {"model.compressor.global_.attention.k_proj.bias"}


@cache
def model_of(size: str, release: str | None = None) -> HIComForConditionalGeneration:
    """Return a model without memory; that of the release with its injections, if any, of one kind."""
    config = published_config(size)
    if release is not None:
        fields = {"dialect": "release", "local_injection": release, "global_injection": release}
        parts = {name: getattr(config, name) for name in ("vision_config", "instruction_config", "text_config")}
        config = HIComConfig(**parts, **fields)
    return empty_model(config)


def config_of(name: str) -> TrainConfig:
    config = RECIPES[name]()
    assert isinstance(config, TrainConfig)
    return config


def rates_of(model: HIComForConditionalGeneration, config: TrainConfig) -> dict[str, float]:
    rules = resolve(model, config.stage.trainable)
    rates = {name: rule.rate for rule in rules for name in rule.parameters}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, rate in rates.items() if rate > 0}
    return rates


def paper_rate(name: str, stage: str) -> float:
    """Return the learning rate of a parameter by Table A1 and section 4.1."""
    is_compressor = name.startswith("model.compressor.")
    is_injection = is_compressor and ".injector." in name
    if name in UNREACHABLE or name.startswith(("model.vision_tower.", "model.instruction_encoder.")):
        return 0.0  # both towers are frozen
    if stage == "align":  # without instructions, injections have nothing to learn from
        return 1e-3 if is_compressor and not is_injection else 0.0
    if stage == "pretrain":
        return (1e-3 if is_injection else 1e-4) if is_compressor else 0.0
    return 1e-5  # compressor and language model


def release_rate(name: str, stage: str) -> float:
    """Return the learning rate of a parameter by the release's script."""
    is_compressor = name.startswith("model.compressor.")
    if name in UNREACHABLE:
        return 0.0
    if stage != "tune":
        return (1e-3 if stage == "align" else 1e-4) if is_compressor else 0.0
    if name.startswith("model.vision_tower."):
        # Of the attention pool in the head, patches pass the MLP only.
        return 2e-6 if name.startswith(("model.vision_tower.head.mlp.", "model.vision_tower.head.layernorm.")) else 0.0
    return 2e-6 if name.startswith("model.instruction_encoder.") else 1e-5


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", SIZES)
def test_every_parameter_has_the_rate_of_the_paper(size: str, stage: str) -> None:
    model = model_of(size)
    rates = rates_of(model, config_of(f"{size}-{stage}"))
    for name, _ in model.named_parameters():
        assert rates.get(name, 0.0) == pytest.approx(paper_rate(name, stage), rel=1e-9), name


@pytest.mark.parametrize("stage", STAGES)
def test_every_parameter_has_the_rate_of_the_release(stage: str) -> None:
    model = model_of("7b", "none" if stage == "align" else "direct")
    rates = rates_of(model, config_of(f"release-7b-{stage}"))
    for name, _ in model.named_parameters():
        assert rates.get(name, 0.0) == pytest.approx(release_rate(name, stage), rel=1e-9), name


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", [*SIZES, "release-7b"])
def test_batches_frames_and_epochs_are_published(name: str, stage: str) -> None:
    config = config_of(f"{name}-{stage}")
    batches = {"align": (512,) * 4, "pretrain": (512, 512, 256, 512), "tune": (512, 512, 256, 256)}[stage]
    batch = dict(zip([*SIZES, "release-7b"], batches, strict=True))[name]
    assert config.global_batch_size == batch
    assert config.batch_size * config.count_passes(8) * 8 == batch
    assert (config.epochs, config.steps, config.warmup, config.weight_decay) == (1.0, None, 0.03, 0.0)
    assert (config.optimizer, config.betas, config.data.num_frames) == ("adamw", (0.9, 0.999), 32)
    assert config.count_steps(SAMPLES[stage], 8) == SAMPLES[stage] // batch
    assert config.stage.compression == ("unguided" if stage == "align" else "conditional")
    model = model_of("7b").model
    assert model.token_count(1) == 81 + 32
    assert model.token_count(32) == 648 + 32


# Section 3.2 and Tables 1 and A1 of the paper, and the released list of image-text pairs.
CLIPS, PAIRS, PAIRS_PER_CLIP = 248_328, 739e3, 2.98
IMAGES = 558_128
TUNED = {"LLaVA-Video": 1.6e6, "VideoChat2-IT": 292e3, "M4": 255e3, "Charades": 11e3, "NTU": 114e3, "TVQA": 122e3}
MIT = 290e3


def test_stages_are_as_long_as_the_paper_says(tmp_path: Path) -> None:
    """An answered turn is a sample: of the 248K clips of stage 2 there are three times as many pairs."""
    assert SAMPLES["align"] == IMAGES
    assert SAMPLES["pretrain"] == PAIRS == pytest.approx(CLIPS * PAIRS_PER_CLIP, rel=2e-3)
    assert SAMPLES["tune"] == pytest.approx(sum(TUNED.values()) + MIT, rel=2e-3)
    assert config_of("7b-pretrain").count_steps(SAMPLES["pretrain"], 8) == 2886
    facts = json.loads((Path(__file__).parents[1] / "docs" / "results" / "recipes.json").read_text())
    stages = {(row["size"], row["stage"]): row for row in facts["stages"]}
    assert stages["7b", "pretrain"]["steps"] == int(PAIRS // 256)
    assert stages["0.5b", "pretrain"]["steps"] == int(PAIRS // 512)
    assert stages["7b", "pretrain"]["hours"] == pytest.approx(11, abs=0.5)
    # The same by the reader of records: a clip with its three pairs in the release's layout.
    turns = [{"from": who, "value": "text"} for _ in range(3) for who in ("human", "gpt")]
    (tmp_path / "pairs.json").write_text(json.dumps([{"video": "0.mp4", "conversations": turns}] * 4))
    assert len(SampleSet(read_sources([tmp_path / "pairs.json"]))) == 12


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", [*SIZES, "release-7b"])
def test_order_and_lengths_are_those_of_the_script(name: str, stage: str) -> None:
    """`directg_local43_global32.sh` groups by nothing, clips to 1 (the default) and takes 4096 tokens of text."""
    config = config_of(f"{name}-{stage}")
    assert not config.group_by_length
    assert (config.data.max_text_tokens, config.max_grad_norm) == (4096, 1.0)
    assert config.saved_precision == "bfloat16"


@pytest.mark.parametrize("size", SIZES)
def test_stage_1_with_compression_off_has_a_name(size: str) -> None:
    config = config_of(f"{size}-align-off")
    assert config.stage.compression == "off"
    rates = rates_of(model_of(size), config)
    trained = {name for name, rate in rates.items() if rate > 0}
    assert trained == {name for name in rates if name.startswith("model.compressor.local.readout.")}
    assert {rates[name] for name in trained} == {1e-3}
    assert config.count_passes(8) * config.batch_size * 8 == 512
    assert config_of(f"{size}-pretrain").init == f"{config.out}/model", "stage 2 goes on from it"


@pytest.mark.parametrize(("size", "millions"), [("0.5b", 22.3), ("1.5b", 26.9), ("7b", 52.6)])
def test_the_compressor_beside_the_63_million_of_the_paper(size: str, millions: float) -> None:
    """Table A1 says 63M for 7B, not of what; docs/results/recipes.md says what ours consists of."""
    count = sum(parameter.numel() for parameter in model_of(size).model.compressor.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


def test_docstrings_say_command_hardware_time_and_result() -> None:
    published = [name for name in RECIPES if not name.startswith(("tiny", "finetune"))]
    assert len(published) == 4 * 4 + 3
    for name in published:
        text = inspect.getdoc(RECIPES[name]) or ""
        for part in (
            f"-m hicom train {name}`",
            "Hardware: 8 GPUs",
            "Expected time: ",
            "Expected result: ",
            "Not run by us",
        ):
            assert part in text, (name, part)
    assert f"{hours('7b'):.1f} hours" in (inspect.getdoc(RECIPES["7b"]) or "")
    assert hours("7b") == pytest.approx(sum(hours("7b", (stage,)) for stage in STAGES))
    assert hours("0.5b") < hours("1.5b") < hours("7b")


@pytest.mark.parametrize("name", ["align", "pretrain", "tune", "tune-release"])
def test_example_mixtures_are_those_of_the_recipes(name: str) -> None:
    entries = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())["datasets"]
    sources = [parse_source(entry, name) for entry in entries]
    assert all(source.path and source.path.startswith("$HICOM_DATA/") and source.root for source in sources)
    assert len(sources) == {"align": 1, "pretrain": 1, "tune": 7, "tune-release": 10}[name]
    used = {record for each, recipe in RECIPES.items() if "finetune" not in each for record in records_of(recipe())}
    assert f"data/hicom/{name}.yaml" in used


def records_of(config: TrainConfig | Chain) -> list[str]:
    stages = config.stages if isinstance(config, Chain) else (config,)
    return [record for stage in stages for record in stage.data.records]


@pytest.mark.parametrize("kind", ["paper", "release"])
def test_a_published_chain_runs_in_small(tmp_path: Path, kind: str) -> None:
    """The same code from hub-like parts to a tuned model: smaller parts, other data, fewer steps."""
    make_records(tmp_path)
    chain = RECIPES["0.5b"]() if kind == "paper" else release_chain()
    assert isinstance(chain, Published)
    smaller: dict[str, Any] = {"global_batch_size": 4, "batch_size": 2, "steps": 2}
    smaller |= {"workers": 0, "bf16": False, "engine": None}
    stages = []
    for stage in chain.stages:
        data = dataclasses.replace(stage.data, records=(str(tmp_path / "records.jsonl"),), num_frames=4)
        stages.append(dataclasses.replace(stage, data=data, **smaller))
    parts = {"vision": str(save_pair(tmp_path / "pair", "siglip")), "llm": str(save_llm(tmp_path / "llm", "qwen2"))}
    compressor = chain.compressor | {"window": (2, 2, 2), "num_global_tokens": 2}
    out = tmp_path / "out"
    model_folder = run(dataclasses.replace(chain, out=str(out), stages=tuple(stages), compressor=compressor, **parts))
    assert model_folder == out / "tune" / "model"
    model = HIComForConditionalGeneration.from_pretrained(model_folder)
    assert model.config.dialect == kind
    stamp = json.loads((out / "align" / "run.json").read_text())
    assert stamp["configuration"]["init"] == str(out / "start")
    assert (stamp["steps"], stamp["accumulate"]) == (2, 2)
    # The script gives no `image_aspect_ratio` to its first stage, whose default squeezes; the others pad.
    ratios = {"paper": ("pad", "pad", "pad"), "release": ("square", "pad", "pad")}[kind]
    made = ("exact", "repeat") if kind == "release" else ("fast", "once")
    for stage, ratio in zip(STAGES, ratios, strict=True):
        processor = HIComProcessor.from_pretrained(out / stage / "model")
        assert (processor.image_aspect_ratio, processor.pixels, processor.short_videos) == (ratio, *made)
    start = HIComForConditionalGeneration.from_pretrained(out / "start").state_dict()
    if kind == "release":  # there the instruction encoder comes in later
        start = HIComForConditionalGeneration.from_pretrained(out / "guided").state_dict() | start
    changed = {name for name, tensor in model.state_dict().items() if not tensor.equal(start[name])}
    rate = paper_rate if kind == "paper" else release_rate
    moved = {n for n, _ in model.named_parameters() if any(rate(n, stage) > 0 for stage in STAGES)}
    assert changed == moved


# `hicom train tiny` in small: the same code, fewer clips and steps.
TINY_SCRIPT = """
import dataclasses, importlib
from hicom.train import run
if __name__ == "__main__":
    recipe = importlib.import_module("hicom.recipes.tiny")
    recipe.HELD_OUT_CLIPS = {"val": 2, "test": 2}
    chain = recipe.tiny()
    small = {"steps": 1, "batch_size": 2, "global_batch_size": 4, "per_video": 2}
    stages = tuple(dataclasses.replace(stage, **small) for stage in chain.stages)
    sizes = {"num_clips": 24, "tower_steps": 1, "text_steps": 1, "reader": recipe.ReaderSize(steps=1)}
    run(dataclasses.replace(chain, stages=stages, **sizes))
"""


@pytest.mark.dist
def test_hicom_tiny_from_nothing_in_small(tmp_path: Path) -> None:
    """Two processes make clips, towers, a language model that reads, and train all stages; again, nothing is done."""
    script = tmp_path / "script.py"
    script.write_text(TINY_SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    runs = tmp_path / "runs"
    stages = {name: runs / "tiny" / name / "run.json" for name in ("align", "pretrain", "tune", "options")}
    stamps = {name: json.loads(path.read_text("utf-8")) for name, path in stages.items()}
    for stamp in stamps.values():
        assert (stamp["status"], stamp["accumulate"], stamp["hardware"]["processes"]) == ("finished", 1, 2)
    assert all((runs / name / "run.json").is_file() for name in ("towers", "reader"))
    model = HIComForConditionalGeneration.from_pretrained(runs / "tiny" / "options" / "model")
    assert (model.config.num_pointers, model.config.num_word_pointers) == (4, 2)
    times = {path: path.stat().st_mtime_ns for path in runs.rglob("*.safetensors")}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*.safetensors")} == times
