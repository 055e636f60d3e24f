"""What a real run of a recipe does step by step: rates, clipping and AdamW, beside values that are computed here."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from hicom.model.modeling import HIComForConditionalGeneration
from hicom.recipes import RECIPES
from hicom.recipes.tiny import tiny_pretrain
from hicom.train import TrainConfig, run
from hicom.train.run import load
from toy_training import make_config, make_folder

STEPS = 50
WARMUP = 2  # 3 % of 50, rounded
# Each recipe: betas, weight decay of matrices, and the rates of the compressor, its injections and the language model.
PAPER = {
    "0.5b-align": ((0.9, 0.999), 0.0, (1e-3, 0.0, 0.0)),
    "0.5b-pretrain": ((0.9, 0.999), 0.0, (1e-4, 1e-3, 0.0)),
    "7b-tune": ((0.9, 0.999), 0.0, (1e-5, 1e-5, 1e-5)),
    "tiny-pretrain": ((0.9, 0.98), 0.0, (2e-4, 2e-4, 0.0)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records, and a model in small to start from."""
    folder = make_folder(tmp_path_factory.mktemp("schedule"))
    model, processor = load(make_config(folder))
    model.save_pretrained(folder / "start")
    processor.save_pretrained(folder / "start")
    return folder


@dataclasses.dataclass
class Step:
    """What an optimizer was given, and what it made of it."""

    rates: dict[str, float]
    groups: list[dict[str, Any]]
    gradients: dict[str, torch.Tensor]
    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Step]]:
    """Return a list that is filled with every step of the run that follows."""
    found: list[Step] = []
    models: list[HIComForConditionalGeneration] = []

    def loaded(*args: Any, **kwargs: Any) -> Any:
        model, processor = load(*args, **kwargs)
        models.append(model)
        return model, processor

    monkeypatch.setattr(sys.modules["hicom.train.run"], "load", loaded)

    def named() -> dict[torch.nn.Parameter, str]:
        return {parameter: name for name, parameter in models[-1].named_parameters()}

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        names = named()
        values = [(names[p], group, p) for group in optimizer.param_groups for p in group["params"]]
        found.append(
            Step(
                rates={name: group["lr"] for name, group, _ in values},
                groups=[{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
                gradients={name: p.grad.clone() for name, _, p in values},
                before={name: p.detach().clone() for name, _, p in values},
                after={},
            )
        )

    def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        names = named()
        found[-1].after = {names[p]: p.detach().clone() for group in optimizer.param_groups for p in group["params"]}

    handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    yield found
    for handle in handles:
        handle.remove()


def small(name: str, folder: Path, out: Path) -> TrainConfig:
    """Return the run of a recipe with a smaller model, other data and fewer samples a step."""
    config = tiny_pretrain() if name == "tiny-pretrain" else RECIPES[name]()
    assert isinstance(config, TrainConfig)
    data = dataclasses.replace(config.data, records=(str(folder / "records.jsonl"),), root=None, num_frames=4)
    return dataclasses.replace(
        config,
        init=str(folder / "start"),
        out=str(out),
        data=dataclasses.replace(data, cache=str(folder / "features"), about=None),
        stage=dataclasses.replace(config.stage, windows=()),
        **{"steps": STEPS, "epochs": None, "batch_size": 1, "global_batch_size": 2, "save_every": 1000, "log_every": 1},
        **{"bf16": False, "workers": 0, "engine": None, "gradient_checkpointing": False},
    )


def peak(name: str, rates: tuple[float, float, float]) -> float:
    """Return the rate of a parameter that trains."""
    compressor, injection, language_model = rates
    if name.startswith("model.compressor."):
        return injection if ".injector." in name else compressor
    return language_model


def expected_rate(step: int) -> float:
    """Return the share of its peak that a rate has in a step, from 0: a line up to it, and half a cosine down."""
    if step < WARMUP:
        return step / WARMUP
    return (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2


@pytest.mark.parametrize("name", PAPER)
def test_a_run_takes_the_steps_of_its_recipe(folder: Path, tmp_path: Path, steps: list[Step], name: str) -> None:
    betas, decay, peaks = PAPER[name]
    run(small(name, folder, tmp_path))
    assert len(steps) == STEPS
    log = [row for row in json.loads((tmp_path / "log.json").read_text()) if "loss" in row]
    trained = {each for each in steps[0].rates if peak(each, peaks) > 0}
    assert trained == steps[0].rates.keys()
    for number, (step, row) in enumerate(zip(steps, log, strict=True)):
        for each, rate in step.rates.items():
            assert rate == pytest.approx(peak(each, peaks) * expected_rate(number), rel=1e-9, abs=1e-15), (each, number)
        assert {value for key, value in row.items() if key.startswith("learning_rate")} == set(step.rates.values())
        for group in step.groups:
            assert (group["betas"], group["eps"]) == (betas, 1e-8)
            assert group["weight_decay"] == decay
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in step.gradients.values()))
        assert norm == pytest.approx(min(1.0, row["grad_norm"]), rel=1e-3), "gradients are clipped to a norm of 1"
    assert any(row["grad_norm"] > 1.5 for row in log), "otherwise clipping is not seen"
    assert_adamw(steps, betas, decay)


def assert_adamw(steps: list[Step], betas: tuple[float, float], decay: float) -> None:
    """Check steps of some parameters against AdamW as its authors write it (Loshchilov and Hutter, algorithm 2)."""
    for name in list(steps[0].gradients)[::7]:
        first = torch.zeros_like(steps[0].gradients[name], dtype=torch.float64)
        second = first.clone()
        for number, step in enumerate(steps[:12], 1):
            gradient, rate = step.gradients[name].double(), step.rates[name]
            first = betas[0] * first + (1 - betas[0]) * gradient
            second = betas[1] * second + (1 - betas[1]) * gradient.square()
            ratio = (first / (1 - betas[0] ** number)) / ((second / (1 - betas[1] ** number)).sqrt() + 1e-8)
            before = step.before[name].double()
            expected = before - rate * (ratio + decay * before * (before.ndim > 1))
            # What float32 can round of a weight, beside steps of the size of the rate.
            torch.testing.assert_close(step.after[name].double(), expected, rtol=2e-7, atol=1e-3 * rate + 1e-12)


def test_decay_and_the_limit_of_gradients_are_the_runs(folder: Path, tmp_path: Path, steps: list[Step]) -> None:
    config = dataclasses.replace(small("tiny-pretrain", folder, tmp_path), steps=12, weight_decay=0.5)
    run(dataclasses.replace(config, max_grad_norm=0.25, warmup=0.0))
    assert {group["weight_decay"] for group in steps[0].groups} == {0.0, 0.5}
    for step in steps:
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in step.gradients.values()))
        assert norm <= 0.25 * 1.001
    assert_adamw(steps, (0.9, 0.98), 0.5)
