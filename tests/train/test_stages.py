from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hicom.recipes.stages import align, align_unguided, pretrain, tune
from hicom.train import StageConfig, TrainConfig
from hicom.train.config import Rates
from hicom.train.data import make_data
from hicom.train.run import load, run
from hicom.train.stages import make_optimizer, resolve
from hicom.train.trainer import make_trainer
from toy_training import ALL, make_config, make_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("stages"))


def toy() -> nn.Module:
    return nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(3, 4)})


def test_first_match_wins_and_the_rest_is_frozen() -> None:
    model = toy()
    rules = resolve(model, ((r"a\.bias", 0.0), (r"a\..*", 1e-3), (r".*\.bias", 1e-4)))
    assert [list(rule.parameters) for rule in rules] == [["a.bias"], ["a.weight"], ["b.bias"]]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"a.weight", "b.bias"}
    assert rules[1].summary() == {"pattern": r"a\..*", "tensors": 1, "parameters": 6, "rate": 1e-3}
    groups = make_optimizer(model, rules, optimizer="adamw", weight_decay=0.1, betas=(0.9, 0.99)).param_groups
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(1e-3, 0.1), (1e-4, 0.0)]


@pytest.mark.parametrize(
    ("trainable", "message"),
    [
        (((r"c\..*", 1e-3),), r"'c\\\\\.\.\*' matches no parameter"),
        (((r"a\..*", 1e-3), (r"a\.bias", 1e-4)), "an earlier pattern left"),
        (((r"a", 1e-3),), "whole names"),
        (((r"a\..*", -1e-3),), "must not be negative"),
        (((r"a\..*", 0.0),), "nothing would train"),
    ],
)
def test_impossible_tables(trainable: Rates, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(toy(), trainable)


STAGES = {"align": align(), "align-unguided": align_unguided(), "pretrain": pretrain(), "tune": tune()}


@pytest.mark.parametrize("stage", list(STAGES))
def test_every_trainable_parameter_learns_and_frozen_ones_stay(folder: Path, tmp_path: Path, stage: str) -> None:
    config = make_config(folder, out=str(tmp_path), stage=STAGES[stage], steps=2)
    model, processor = load(config)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = make_trainer(config, model, processor, tmp_path, {"wall_s": 0.0})
    samples, collator = make_data(config, model, processor)
    model(**collator([samples[i] for i in range(8)])).loss.backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    without = [name for name, p in trainable.items() if p.grad is None or not p.grad.any()]
    assert trainable
    assert not without, f"trainable, but no gradient reaches {without}"
    model.zero_grad()
    trainer.train()
    for name, parameter in model.named_parameters():
        changed = not torch.equal(parameter, before[name])
        assert changed == (name in trainable), f"{name} is {'trainable' if name in trainable else 'frozen'}"


def test_the_rates_of_the_stages_differ_tenfold(folder: Path) -> None:
    model, _ = load(make_config(folder))
    rates = {}
    for rule in resolve(model, pretrain().trainable):
        rates |= dict.fromkeys(rule.parameters, rule.rate)
    assert rates["model.compressor.local.injector.mlp.0.weight"] == pytest.approx(
        10 * rates["model.compressor.local.readout.0.weight"]
    )
    assert not any("language_model" in name for name in rates)


def test_learns_one_batch_by_heart(folder: Path, tmp_path: Path) -> None:
    config = make_config(
        folder,
        out=str(tmp_path),
        batch_size=8,
        steps=150,
        save_every=1000,
        stage=StageConfig(trainable=tuple((pattern, rate * 10) for pattern, rate in ALL)),
    )
    run(config)
    model, processor = load(TrainConfig(**{**vars(config), "init": str(tmp_path / "model"), "parts": None}))
    samples, collator = make_data(config, model, processor)
    batch = collator([samples[i] for i in range(8)])
    with torch.no_grad():
        loss: Tensor = model.eval()(**batch).loss
    assert loss < 0.3
