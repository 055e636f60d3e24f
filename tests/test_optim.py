"""Muon and AdamW as one optimizer: who gets what, one schedule, exact resumption."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import tiny
from hicom.optim import MuonAdamW, make_optimizer, muon_parameters, parameter_groups


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))


def loss(model: nn.Module) -> torch.Tensor:
    return (model(torch.arange(7)) - torch.eye(7, 4)).square().mean()


def groups_of(model: nn.Module, lr: float = 0.01, *, use_muon: bool) -> list[dict[str, object]]:
    return parameter_groups(model, model.parameters(), lr, 0.1, use_muon=use_muon)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    for _ in range(number):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()


@pytest.mark.parametrize("use_muon", [False, True])
def test_as_on_gpus_the_steps_are_the_same(use_muon: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """There AdamW is fused, a kernel that CPUs have too."""
    plain, fused = network(), network()
    steps(plain, make_optimizer(groups_of(plain, use_muon=use_muon)), 5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    optimizer = make_optimizer(groups_of(fused, use_muon=use_muon))
    assert [group.get("fused") for group in optimizer.param_groups if not group["muon"]].count(True) > 0
    steps(fused, optimizer, 5)
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_without_muon_it_is_adamw() -> None:
    ours, theirs = network(), network()
    steps(ours, MuonAdamW(groups_of(ours, use_muon=False)), 5)
    matrices = [p for p in theirs.parameters() if p.ndim > 1]
    others = [p for p in theirs.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    steps(theirs, torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.98)), 5)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_muon_takes_the_weights_of_linear_layers_alone() -> None:
    model = network()
    groups = groups_of(model, use_muon=True)
    taken = [p for group in groups if group["muon"] for p in group["params"]]
    assert {id(p) for p in taken} == {id(model[1].weight), id(model[3].weight)}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    steps(model, MuonAdamW(groups), 1)
    # One step of Muon is an orthogonal matrix: all singular values are alike, and as large as AdamW's steps.
    change = (network()[3].weight * (1 - 0.01 * 0.1) - model[3].weight) / 0.01
    values = torch.linalg.svdvals(change)
    assert values.max() < 1.8 * values.min()
    assert change.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.3)


def test_the_output_matrix_of_a_language_model_is_no_matter_of_muon() -> None:
    model = tiny.model()
    taken = muon_parameters(model)
    assert model.lm_head.weight not in taken
    assert model.model.language_model.layers[0].mlp.up_proj.weight in taken
    assert model.model.compressor.local.readout[0].weight in taken


def test_one_schedule_rules_both_and_a_run_goes_on_exactly() -> None:
    def make(model: nn.Module) -> tuple[MuonAdamW, LambdaLR]:
        optimizer = MuonAdamW(groups_of(model, use_muon=True))
        return optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))

    whole, halves = network(), network()
    optimizer, schedule = make(whole)
    for _ in range(6):
        steps(whole, optimizer, 1)
        schedule.step()
    assert {group["lr"] for part in optimizer.parts for group in part.param_groups} == {0.01 / 7}
    first, schedule = make(halves)
    for _ in range(3):
        steps(halves, first, 1)
        schedule.step()
    state = copy.deepcopy((first.state_dict(), schedule.state_dict()))
    second, schedule = make(halves)
    second.load_state_dict(state[0])
    schedule.load_state_dict(state[1])
    for _ in range(3):
        steps(halves, second, 1)
        schedule.step()
    for a, b in zip(whole.parameters(), halves.parameters(), strict=True):
        assert torch.equal(a, b)
