"""Muon for weight matrices and AdamW for all else, as one optimizer.

Muon (Jordan et al., 2024) orthogonalises the momentum of a matrix before it is applied, so that rare directions are
learnt about as fast as frequent ones. What it did here: decision 26 in `docs/decisions.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer


def find_muon() -> Callable[..., Optimizer]:
    """Return torch's Muon.

    Raises:
        ValueError: torch is older than 2.9 and has none.
    """
    muon: Callable[..., Optimizer] | None = getattr(torch.optim, "Muon", None)
    if muon is None:
        raise ValueError(f"Muon needs torch 2.9 or newer, and this is {torch.__version__}: update torch, or use AdamW")
    return muon


def muon_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return the weights of linear layers, the output matrix of a language model left out: what Muon is made for."""
    # Models of transformers say which matrix is their output.
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    return {parameter for m in linears for parameter in m.parameters() if parameter.ndim == 2}


def parameter_groups(
    model: nn.Module, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, *, use_muon: bool
) -> list[dict[str, Any]]:
    """Return groups of one rate for `MuonAdamW`; only matrices decay.

    Args:
        model: tells which parameters are weights of linear layers.
        parameters: some of its parameters.
        lr: their learning rate.
        weight_decay: of matrices.
        use_muon: whether Muon takes the weights of linear layers.
    """
    by_muon = muon_parameters(model) if use_muon else set()
    members: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in parameters:
        members.setdefault((parameter in by_muon, parameter.ndim >= 2), []).append(parameter)
    return [
        {"params": params, "lr": lr, "weight_decay": weight_decay if is_matrix else 0.0, "muon": muon}
        for (muon, is_matrix), params in members.items()
    ]


def make_optimizer(groups: list[dict[str, Any]], *, betas: tuple[float, float] = (0.9, 0.98)) -> Optimizer:
    """Return plain AdamW, which every engine knows, or `MuonAdamW` if a group says `muon=True`."""
    if any(group["muon"] for group in groups):
        return MuonAdamW(groups, betas=betas)
    return AdamW(groups, betas=betas, fused=is_fused())


def is_fused() -> bool | None:
    """Whether AdamW steps in one kernel a tensor: on GPUs, where it otherwise holds 4 bytes a weight for a moment."""
    return True if torch.cuda.is_available() else None


class MuonAdamW(Optimizer):
    """Muon where a group says `muon=True`, AdamW elsewhere.

    A step of Muon has 0.2 times its learning rate in each number (root mean square), about what a trained network's
    AdamW step comes to; early in a training AdamW's are larger, so Muon wants a higher rate there.

    Args:
        groups: parameter groups with `params`, `lr`, `weight_decay` and `muon`.
        betas: AdamW's; Muon's momentum is 0.95, with Nesterov's look ahead.

    Raises:
        ValueError: torch is older than 2.9 and has no Muon.
    """

    def __init__(self, groups: list[dict[str, Any]], *, betas: tuple[float, float] = (0.9, 0.98)) -> None:
        super().__init__(groups, {})
        by_muon = [group for group in self.param_groups if group["muon"]]
        by_adam = [group for group in self.param_groups if not group["muon"]]
        # Groups are shared, so that a scheduler that sets rates here sets them there.
        self.parts: list[Optimizer] = []
        if by_muon:
            self.parts.append(find_muon()(by_muon, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"))
        if by_adam:
            self.parts.append(AdamW(by_adam, betas=betas, fused=is_fused()))
        self._share()

    def _share(self) -> None:
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the state of both."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share()
