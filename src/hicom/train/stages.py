"""Stages as tables: which parameters train at which rate."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn
from torch.optim import Optimizer

from .. import optim
from .config import OptimizerName, Rates


@dataclass
class Rule:
    """One row of a resolved table: the parameters that a pattern was the first to match."""

    pattern: str
    rate: float
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)

    def summary(self) -> dict[str, str | float | int]:
        """Return what the log and `run.json` say of it."""
        numbers = sum(parameter.numel() for parameter in self.parameters.values())
        return {"pattern": self.pattern, "tensors": len(self.parameters), "parameters": numbers, "rate": self.rate}


def resolve(
    model: nn.Module, trainable: Rates, table_name: Callable[[str], str | None] = lambda name: name
) -> list[Rule]:
    """Freeze what no pattern names, unfreeze the rest, and return the resolved table.

    Args:
        model: `requires_grad` of all its parameters is set.
        trainable: (pattern, learning rate), where the pattern is a regular expression over a parameter's whole name.
        table_name: returns the name that patterns are to match in place of a parameter's own; None: it stays frozen.

    Raises:
        ValueError: a pattern matches no parameter that an earlier one left, a rate is negative, or nothing trains.
    """
    rules = [Rule(pattern, rate) for pattern, rate in trainable]
    held: list[str] = []
    for name, parameter in model.named_parameters():
        known = table_name(name)
        if known is None:
            held.append(name)
        rule = next((rule for rule in rules if known is not None and re.fullmatch(rule.pattern, known)), None)
        parameter.requires_grad_(rule is not None and rule.rate > 0)
        if rule is not None:
            rule.parameters[name] = parameter
    for rule in rules:
        if rule.rate < 0:
            raise ValueError(f"the learning rate {rule.rate} of {rule.pattern!r} must not be negative")
        if not rule.parameters:
            is_held = any(re.fullmatch(rule.pattern, name) for name in held)
            raise ValueError(
                f"the pattern {rule.pattern!r} matches no parameter that an earlier pattern left; patterns must match "
                "whole names such as 'model.compressor.local.readout.0.weight'"
                + "; with LoRA, weights of the language model that lora.targets leaves out do not train"
                * is_held
            )
    if not any(rule.rate > 0 for rule in rules):
        raise ValueError("no pattern has a learning rate above 0, so nothing would train")
    return rules


def make_optimizer(
    model: nn.Module, rules: list[Rule], *, optimizer: OptimizerName, weight_decay: float, betas: tuple[float, float]
) -> Optimizer:
    """Return an optimizer with the rates of a resolved table; only matrices decay.

    Args:
        model: that the table is of.
        rules: see `resolve`.
        optimizer: `adamw`, or `muon` for the weights of linear layers with AdamW for all else.
        weight_decay: of matrices.
        betas: AdamW's.
    """
    groups = [
        group
        for rule in rules
        if rule.rate > 0
        for group in optim.parameter_groups(
            model, rule.parameters.values(), rule.rate, weight_decay, use_muon=optimizer == "muon"
        )
    ]
    return optim.make_optimizer(groups, betas=betas)
