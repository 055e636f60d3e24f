"""A run whose loss, gradients or weights are no longer numbers stops, before they reach weights or a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

SHOWN = 8
"""Samples that an error names."""


class Guard:
    """Watches one run.

    Losses stay on the device until the optimizer steps, where they are read together with the gradients: one wait for
    the device in a step, however many forward passes it has. Where a scaler of float16 finds infinite gradients, it
    leaves the step out and lowers its scale, which is as it should be, and nothing is looked at.

    Attributes:
        step: number of the step that is being made.
        good: step and loss of the last step with a finite one.
        rates: learning rate of the last step by the rate that its parameters reach at most, in the table's order.
        is_scaled: whether a scaler of float16 leaves steps out.
    """

    def __init__(self) -> None:
        self.step = 1
        self.good: tuple[int, float] | None = None
        self.rates: dict[float, float] = {}
        self.is_scaled = False
        self._losses: list[Tensor] = []
        self._samples: list[list[str]] = []
        self._optimizer: Optimizer | None = None

    def watch(self, optimizer: Optimizer) -> None:
        """Look at what every step of an optimizer gets."""
        self._optimizer = optimizer
        optimizer.register_step_pre_hook(self.before_step)

    def add(self, loss: Tensor, samples: list[str]) -> None:
        """Take in the loss of a forward pass on samples of these names."""
        self._losses.append(loss.detach().float())
        self._samples.append(samples)

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Raise ValueError where the losses or gradients of this step are not finite; all processes do so together."""
        # DeepSpeed takes a step group by group.
        self.rates |= {group.get("initial_lr", group["lr"]): group["lr"] for group in optimizer.param_groups}
        total = sum_of(p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
        self._judge(total)

    def settle(self) -> None:
        """Raise ValueError where a step was left out for its gradients, as DeepSpeed does in silence.

        That is an error, unless a scaler does it and the losses are finite.
        """
        if self._losses:
            self._judge(torch.full_like(self._losses[0], 0.0 if self.is_scaled else math.nan))

    def _judge(self, total: Tensor) -> None:
        """Raise ValueError where the losses of a step or the sum of its gradients are not finite, in any process."""
        *losses, gradients = torch.stack([*self._losses, total.to(self._losses[0]) if self._losses else total]).tolist()
        samples = self._samples
        self._losses, self._samples = [], []
        bad = [each for each, loss in zip(samples, losses, strict=True) if not math.isfinite(loss)]
        if any_process(bool(bad) or not math.isfinite(gradients), total.device):
            worst = next((loss for loss in losses if not math.isfinite(loss)), None)
            what = "gradients are not finite" if worst is None else f"the loss is {worst}"
            self.stop(what, [name for each in bad or samples for name in each])
        if losses:
            self.good = self.step, math.fsum(losses)

    def check_weights(self) -> None:
        """Raise ValueError where trained weights are not finite, before they are written; all processes together."""
        if self._optimizer is None:
            return
        total = sum_of(p for group in self._optimizer.param_groups for p in group["params"])
        if any_process(not math.isfinite(float(total)), total.device):
            self.stop("weights are not finite after it", [])

    def stop(self, what: str, samples: list[str]) -> None:
        """Raise ValueError that says what has happened in this step, and on which samples of all processes."""
        if torch.distributed.is_initialized():
            everyone: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everyone, (what, samples))
            # Where the losses of some are to blame, the samples of the others are not.
            blamed = [each for each in everyone if each[0].startswith("the loss")] or everyone
            what, samples = blamed[0][0], [name for _, names in blamed for name in names]
        shown = "; ".join(samples[:SHOWN]) + (f" and {len(samples) - SHOWN} more" if len(samples) > SHOWN else "")
        last = "no step before had a finite loss" if self.good is None else "step {}: loss {:.4g}".format(*self.good)
        raise ValueError(
            f"step {self.step}: {what}{f', on {shown}' if samples else ''}; last finite one: {last}. The checkpoints "
            "before are kept: the same command goes on from the last one, and takes data.skip_list with what it is to "
            "leave out; or train in another folder with lower rates (rate_scale)"
        )


def sum_of(tensors: Iterable[Tensor]) -> Tensor:
    """Return the sum of all numbers, which is finite only if these are; of spread tensors, of the part that is here."""
    local = [each.to_local() if hasattr(each, "to_local") else each for each in tensors]
    sums = [each.detach().sum(dtype=torch.float32) for each in local]
    return torch.stack(sums).sum() if sums else torch.zeros(())


def any_process(is_bad: bool, device: torch.device) -> bool:
    """Whether something is so in one of the processes that train together."""
    if not torch.distributed.is_initialized():
        return is_bad
    flag = torch.tensor([int(is_bad)], device=device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag.item())
