"""The training loop of what comes before the three stages: the dual encoder and the language model that reads.

Every step is a function of the seed and its number, so a run that was killed goes on exactly where its last checkpoint
was. `hicom.train` trains everything that looks at videos.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from hicom.optim import MuonAdamW, parameter_groups

HISTORY_EVERY = 50


def train_steps(
    module: nn.Module,
    loss_of_step: Callable[[int], Tensor],
    out: Path,
    *,
    name: str,
    config: dict[str, Any],
    steps: int,
    lr: float,
    warmup: int,
    weight_decay: float,
    use_muon: bool = False,
    save: Callable[[], object],
    measure: Callable[[], dict[str, float]],
    stop_after: int | None = None,
    save_every_s: float = 120.0,
) -> None:
    """Train with a linear warm-up and a cosine to zero, or go on with an interrupted run.

    Args:
        module: all its parameters train; only matrices decay.
        loss_of_step: the loss of a step, by its number.
        out: run folder: `history.json`, `resume.pt`, and when the run is finished `run.json`.
        name: for the progress bar.
        config: what was asked for; a folder of another one is refused.
        steps: optimizer steps.
        lr: peak learning rate.
        warmup: steps in which it rises.
        weight_decay: of matrices.
        use_muon: Muon for the weights of linear layers; else AdamW for all.
        save: writes the model into `out`.
        measure: what `run.json` says of the finished model.
        stop_after: leave (resumably) after this many steps.
        save_every_s: seconds between checkpoints.

    Raises:
        ValueError: `out` holds a run of another configuration.
    """
    device = next(module.parameters()).device
    optimizer = MuonAdamW(parameter_groups(module, module.parameters(), lr, weight_decay, use_muon=use_muon))
    step, spent = 0, 0.0
    history: list[dict[str, float]] = []
    if (out / "resume.pt").exists():
        state = torch.load(out / "resume.pt", weights_only=True, map_location=device)
        if state["config"] != config:
            raise ValueError(f"{out} holds a run with {state['config']}: use the same settings, or another folder")
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent, history = state["step"], state["spent"], state["history"]
    out.mkdir(parents=True, exist_ok=True)

    begin = saved = time.monotonic()
    columns = (TextColumn(name), BarColumn(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn())
    with Progress(*columns, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("", total=steps, completed=step, loss="")
        while step < steps and step != stop_after:
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
            loss = loss_of_step(step)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            step += 1
            now = time.monotonic()
            if step % HISTORY_EVERY == 0:
                history.append({"step": step, "loss": round(loss.item(), 4), "seconds": round(spent + now - begin)})
                (out / "history.json").write_text(json.dumps(history, indent=1) + "\n")
            progress.update(task, completed=step, loss=f"loss {loss.item():.3f}")
            if now - saved > save_every_s or step in (stop_after, steps):
                # Weights first, the state that resumes last: a kill in between costs the time since the last one.
                save()
                partial = out / "resume.pt.part"
                torch.save(
                    {
                        "config": config,
                        "step": step,
                        "spent": spent + now - begin,
                        "history": history,
                        "module": module.state_dict(),
                        "optimizer": optimizer.state_dict(),
                    },
                    partial,
                )
                partial.replace(out / "resume.pt")
                saved = now
    if step < steps:
        return
    run = {
        "command": " ".join(sys.argv),
        "config": config,
        "seconds": round(spent + time.monotonic() - begin),
        "threads": torch.get_num_threads(),
        "versions": {package: version(package) for package in ("torch", "transformers", "numpy")},
        "parameters": sum(p.numel() for p in module.parameters()),
        "metrics": measure(),
    }
    (out / "run.json").write_text(json.dumps(run, indent=1) + "\n")
