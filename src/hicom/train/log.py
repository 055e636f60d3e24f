"""What a run says while it goes on: a line for every logged step, and what was left out of its batches."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from ..locks import locked

logger = logging.getLogger(__name__)

BAD_VIDEOS = "bad_videos.jsonl"
"""File of a run folder: videos and images that could not be read; it is a skip list, too."""
RATE = "learning_rate"
"""Of a step in the log; further rates have the rate that they reach at most behind it."""


class StepLines(TrainerCallback):
    """Writes a line for every logged step to the standard error stream."""

    def __init__(self) -> None:
        self.step, self.time = 0, time.monotonic()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock."""
        self.step, self.time = state.global_step, time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Write the line of a step."""
        if logs is None or "loss" not in logs or not state.is_world_process_zero:
            return
        now = time.monotonic()
        step_s = (now - self.time) / max(1, state.global_step - self.step)
        self.step, self.time = state.global_step, now
        tqdm.write(step_line(logs, state.global_step, state.max_steps, step_s), file=sys.stderr)


class StepBar(ProgressCallback):
    """The bar of transformers, for terminals, without its own lines."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Leave the line to `StepLines`."""


def step_line(logs: Mapping[str, float], step: int, steps: int, step_s: float) -> str:
    """Return what is said of a logged step."""
    rates = " ".join(f"{value:.2e}" for name, value in logs.items() if name.startswith(RATE))
    left = duration(step_s * (steps - step))
    norm = f"  gradient {logs['grad_norm']:.3g}" if "grad_norm" in logs else ""
    return f"step {step}/{steps}  loss {logs['loss']:.4f}{norm}  rate {rates}  {step_s:.2f} s/step  {left} left"


def duration(seconds: float) -> str:
    """Return a time in hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


class LeftOut:
    """Counts and names what was left out of batches, or cut.

    Attributes:
        counts: samples by what became of them, in this process since it started.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.counts: Counter[str] = Counter()
        self._known: set[str] = set()

    def take(self, report: Mapping[str, list[dict[str, Any]]], step: int) -> None:
        """Take in the report of a batch, and write videos that cannot be read into the run folder."""
        bad = [entry for entry in report["left_out"] if "media" in entry]
        self.counts["left_out"] += len(report["left_out"])
        self.counts["cut"] += len(report["cut"])
        for entry in report["left_out"] + report["cut"]:
            if "media" not in entry and not self.counts["told"]:
                logger.warning(
                    "%s is left out or cut: %s; others are counted in run.json",
                    entry["source"],
                    entry.get("reason") or f"{entry['tokens']} tokens more than max_text_tokens",
                )
                self.counts["told"] += 1
        new = [entry for entry in bad if entry["media"] not in self._known]
        if new:
            self._write(new, step)

    def _write(self, entries: list[dict[str, Any]], step: int) -> None:
        """Add media that are new, also to other processes and to an earlier part of the run, and name them."""
        path = self.out / BAD_VIDEOS
        with locked(self.out / f"{BAD_VIDEOS}.lock"):
            if path.exists():
                self._known |= {json.loads(line)["media"] for line in path.read_text("utf-8").splitlines()}
            with path.open("a", encoding="utf-8") as file:
                for entry in entries:
                    if entry["media"] not in self._known:
                        logger.warning("step %d: %s; its samples are left out", step, entry["reason"])
                        file.write(json.dumps(entry | {"step": step}, ensure_ascii=False) + "\n")
                        self._known.add(entry["media"])

    def of_all(self) -> dict[str, int]:
        """Return the counts of all processes together; every one of them is to call this."""
        mine = {name: self.counts[name] for name in ("left_out", "cut")}
        if not torch.distributed.is_initialized():
            return mine
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, mine)
        return {name: sum(each[name] for each in everyone) for name in mine}
