"""The training loop of what comes before the three stages: the dual encoder and the language model that reads.

Every step is a function of the seed and its number, so a run that was killed goes on exactly where its last checkpoint
was. `hicom.train` trains everything that looks at videos.
"""

from __future__ import annotations

import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hicom.files import clear_parts, give_permissions, naming, write_json, writing
from hicom.locks import owned
from hicom.optim import find_muon, make_optimizer, parameter_groups
from hicom.processes import SPAWN, follow, uninterrupted

HISTORY_EVERY = 50


def as_command(train: Callable[[], object], threads: int) -> None:
    """Run a training as a command: no progress bars of other libraries, and wrong input is one line."""
    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    try:
        train()
    except ValueError as error:
        sys.exit(f"error: {error}")


@contextmanager
def beside(train: Callable[..., object], *arguments: object) -> Iterator[None]:
    """Train one thing in a process of its own while the body trains another, each with half of the threads.

    Args:
        train: a function of a module.
        arguments: of `train`.

    Raises:
        Exception: what `train` raised, once the body is through.
        RuntimeError: its process was killed.
    """
    before = torch.get_num_threads()
    threads = max(1, before // 2)
    receiver, sender = SPAWN.Pipe(duplex=False)
    followed, leash = SPAWN.Pipe(duplex=False)
    process = SPAWN.Process(target=_train_alone, args=(followed, sender, threads, train, arguments), daemon=True)
    with uninterrupted():
        process.start()
    sender.close()
    followed.close()
    torch.set_num_threads(threads)
    try:
        yield
        try:
            error = receiver.recv()
        except EOFError:
            process.join()
            raise RuntimeError(f"the process that trained beside this one ended with {process.exitcode}") from None
        if error is not None:
            raise error
    finally:
        torch.set_num_threads(before)
        process.terminate()
        leash.close()
        process.join()


def _train_alone(
    followed: Connection, sender: Connection, threads: int, train: Callable[..., object], arguments: tuple[object, ...]
) -> None:
    """Train in this process, which ends with the one that started it; send the error, or None."""
    # Also after `kill -9` of that one: what it would start anew must not be held by this one.
    follow(followed)
    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    error = None
    # One progress bar on the terminal is enough.
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):
        try:
            train(*arguments)
        except Exception as caught:
            caught.add_note(traceback.format_exc())  # which is lost on the way to the other process
            error = caught
    sender.send(error)


@dataclass(frozen=True, kw_only=True)
class StepsConfig:
    """What decides the trained weights beside the loss.

    Attributes:
        steps: optimizer steps.
        seed: of everything random.
        batch: samples of a step.
        lr: peak learning rate; before it a linear warm-up, after it a cosine to zero.
        warmup: warm-up steps.
        weight_decay: of matrices.

    Raises:
        ValueError: there is nothing to do in a step, or no step.
    """

    steps: int
    seed: int = 0
    batch: int
    lr: float
    warmup: int
    weight_decay: float

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "warmup"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


def train_steps(
    module: nn.Module,
    loss_of_step: Callable[[int], Tensor],
    config: StepsConfig,
    out: Path,
    *,
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    measure: Callable[[], dict[str, float]],
    use_muon: bool = False,
    stop_after: int | None = None,
    save_every_s: float = 120.0,
) -> None:
    """Train, or go on with an interrupted run.

    Args:
        module: all its parameters train; only matrices decay.
        loss_of_step: the loss of a step, by its number.
        config: a folder of another one is refused.
        out: run folder: the model, `history.json`, `resume.pt`, and when the run is finished `run.json`.
        name: for the progress bar.
        model: what is saved: `module`, or a part of it.
        tokenizer: is saved with it.
        measure: what `run.json` says of the finished model.
        use_muon: Muon for the weights of linear layers; else AdamW for all.
        stop_after: leave (resumably) after this many steps.
        save_every_s: seconds between checkpoints.

    Raises:
        ValueError: `out` holds a run of another configuration, or another process trains in it; torch has no Muon; or
            loss or weights are no longer finite, which are not written.
    """
    if use_muon:
        find_muon()
    out.mkdir(parents=True, exist_ok=True)
    with owned(out):
        clear_parts(out)
        device = next(module.parameters()).device
        groups = parameter_groups(module, module.parameters(), config.lr, config.weight_decay, use_muon=use_muon)
        optimizer, settings = make_optimizer(groups), asdict(config)
        step, steps, spent = 0, config.steps, 0.0
        history: list[dict[str, float]] = []
        if (out / "resume.pt").exists():
            state = torch.load(out / "resume.pt", weights_only=True, map_location=device)
            if state["config"] != settings:
                raise ValueError(f"{out} holds a run with {state['config']}: use the same settings, or another folder")
            module.load_state_dict(state["module"])
            optimizer.load_state_dict(state["optimizer"])
            step, spent, history = state["step"], state["spent"], state["history"]

        begin = saved = time.monotonic()
        columns = (TextColumn(name), BarColumn(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn())
        with Progress(*columns, disable=not sys.stderr.isatty()) as progress:
            task = progress.add_task("", total=steps, completed=step, loss="")
            while step < steps and step != stop_after:
                for group in optimizer.param_groups:
                    rising, falling = min(1.0, (step + 1) / config.warmup), 0.5 * (1 + math.cos(math.pi * step / steps))
                    group["lr"] = config.lr * rising * falling
                loss = loss_of_step(step)
                value = loss.item()
                if not math.isfinite(value):
                    raise ValueError(f"step {step + 1} in {out}: the loss is {value}; train in another folder, slower")
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(module.parameters(), 1.0)
                optimizer.step()
                step += 1
                now = time.monotonic()
                if step % HISTORY_EVERY == 0:
                    history.append({"step": step, "loss": round(value, 4), "seconds": round(spent + now - begin)})
                    write_json(out / "history.json", history)
                progress.update(task, completed=step, loss=f"loss {value:.3f}")
                if now - saved > save_every_s or step in (stop_after, steps):
                    if not all(bool(p.isfinite().all()) for p in module.parameters()):
                        raise ValueError(
                            f"step {step} in {out}: weights are not finite; train in another folder, slower"
                        )
                    # Weights first, the state that resumes last: a kill in between costs the time since the last one.
                    with naming(out):
                        model.save_pretrained(out)
                        tokenizer.save_pretrained(out)
                        give_permissions(out)
                    state = {"config": settings, "step": step, "spent": spent + now - begin, "history": history}
                    with writing(out / "resume.pt") as part:
                        torch.save(state | {"module": module.state_dict(), "optimizer": optimizer.state_dict()}, part)
                    saved = now
        if step < steps:
            return
        run = {
            "command": " ".join(sys.argv),
            "config": settings,
            "seconds": round(spent + time.monotonic() - begin),
            "threads": torch.get_num_threads(),
            "versions": {package: version(package) for package in ("torch", "transformers", "numpy")},
            "parameters": sum(p.numel() for p in module.parameters()),
            "metrics": measure(),
        }
        write_json(out / "run.json", run)
