"""The paper's tables in small, on the sprite world: `python benchmarks/ablations.py`.

Every row is a compressor that is trained from the same dual encoder and the same language model on the same data with
the same steps, rates and seeds, then asked the same questions. What stands for what is written over each table and in
`docs/ablations.md`. One command trains what is missing, goes on after `kill -9`, shares its work with other processes
of the same command (`--workers 2`, or start it twice), and after every finished run writes `ablations.json`,
`ablations.md` and the plots to `docs/results/`. Needs the world (`hicom world make runs/world`); towers and language
model lie beside this file (`ablations_start/`).

    OUT/stages/STAGE-DIGEST/                      a training run (`hicom.train`); rows with the same definition share it
    docs/results/ablations/DIGEST-TEST.json.gz    right and wrong answers of a trained row to one test
    OUT/data/                                     records: open questions, and the mix of Table A5

Answers are part of the repository: a row that was trained on another machine is not trained again.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import hashlib
import json
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from ablation_report import Cell, Comparison, Entry, Report, Table
from plots import accuracy_plot
from world_accuracy import answer, chances, counted, read_questions

from hicom.data.features import FeatureStore, cache_features, feature_key
from hicom.data.records import read_records
from hicom.locks import claimed, locked
from hicom.model.baselines import build_compressor
from hicom.model.modeling import HIComForConditionalGeneration
from hicom.model.ops import Window
from hicom.model.processing import HIComProcessor
from hicom.provenance import git_commit, hardware, short_commit
from hicom.recipes.stages import COMPRESSOR, IDLE, INJECTION, pretrain, tune
from hicom.train import DataConfig, Parts, StageConfig, TrainConfig, run
from hicom.train.assemble import assemble
from hicom.train.config import OptimizerName, Rates

logger = logging.getLogger("ablations")

ROOT = Path(__file__).parents[1]
# All rows start alike, those that were measured first, too: what is embedded as `hicom-tiny-start` may become better.
START = Path(__file__).parent / "ablations_start"
NUM_FRAMES = 8
BUDGET = 16
"""Visual tokens of rows compared at equal tokens: 1 in 32 of 512 patches; the paper has 680 of 23328, 1 in 34."""
WINDOWS: tuple[Window, ...] = ((1, 4, 4), (2, 4, 4), (4, 4, 4), (8, 4, 4), (8, 8, 8))
"""Of Figure 5: drawn from while its rows are trained, and answered with one by one."""
LONG_FRAMES = (4, 8, 16, 32)
SEEDS = (0, 1, 2)
TEXT_TOKENS = 30
"""About as many tokens of text has a question with its answer; for the estimate of `--list` only."""


# What a run costs.


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Steps, batches, rates and questions, the same for all rows.

    Attributes:
        align: steps of stage `align` (captions).
        pretrain: steps of stage `pretrain` (instructions and descriptions), where a row has it.
        tune: steps of stage `tune` (questions and answers).
        align_batch: samples of a step of `align`.
        batch: samples of a step of the other stages.
        align_rate: of the compressor in `align`.
        pretrain_rate: of the compressor in `pretrain`; injections ten times.
        tune_rate: of compressor and language model in `tune`.
        injection_rate: of injections in `tune`. A high one wears the identity that they start as away.
        tune_optimizer: of `tune`; the other stages have AdamW.
        weight_decay: of `tune`.
        num_clips: held-out clips that are asked about.
        num_long_clips: likewise in the split `test_long`.
    """

    align: int = 60
    pretrain: int = 200
    tune: int = 2000
    align_batch: int = 32
    batch: int = 32
    align_rate: float = 2e-3
    pretrain_rate: float = 2e-4
    tune_rate: float = 3e-3
    injection_rate: float = 3e-4
    tune_optimizer: OptimizerName = "muon"
    weight_decay: float = 0.02
    num_clips: int = 1000
    num_long_clips: int = 300


PROTOCOLS = {
    "cpu": Protocol(),
    "gpu": Protocol(align=200, pretrain=1000, tune=8000, align_batch=64, batch=64, num_clips=2000),
    "smoke": Protocol(align=1, pretrain=1, tune=2, align_batch=2, batch=2, num_clips=4, num_long_clips=2),
}


# What is trained and asked.


@dataclass(frozen=True, kw_only=True)
class Test:
    """Questions that a trained row answers.

    Attributes:
        name: of the test.
        split: of the world.
        num_frames: frames of a clip; None: those of training.
        window: (T, H, W) in place of the model's.
    """

    name: str
    split: str = "test"
    num_frames: int | None = None
    window: Window | None = None


OPEN = Test(name="open")
BY_WINDOW = tuple(Test(name=f"window-{'-'.join(map(str, window))}", window=window) for window in WINDOWS)
BY_FRAMES = tuple(Test(name=f"frames-{n}", split="test_long", num_frames=n) for n in LONG_FRAMES)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One compressor and how it is trained.

    Attributes:
        name: of the row.
        label: in tables.
        compressor: `hicom`, or a baseline's name.
        options: keyword arguments of the compressor: fields of `HIComConfig`, or of the baseline.
        num_frames: frames of a clip.
        pretrain: what stage 2 learns from; None: there is no stage 2.
        injection_factor: rate of injections in stage 2, in rates of the compressor; the paper's is ten.
        tune: what stage 3 learns from: `questions`, or these mixed with the descriptions of stage 2 (`mixed`).
        windows: drawn from in the last two stages; empty: the row's own.
        tests: what it is asked.
        accumulate: forward passes of a step, where one does not fit into memory.
    """

    name: str
    label: str
    compressor: str = "hicom"
    options: Mapping[str, Any]
    num_frames: int = NUM_FRAMES
    pretrain: Literal["descriptions", "questions"] | None = "descriptions"
    injection_factor: float = 10.0
    tune: Literal["questions", "mixed"] = "questions"
    windows: tuple[Window, ...] = ()
    tests: tuple[Test, ...] = (OPEN,)
    accumulate: int = 1

    def parts(self, towers: str, language_model: str | None) -> Parts:
        """Return what the row's model is put together of."""
        if self.compressor == "hicom":
            config = dict(self.options)
        else:
            config = {"compressor": self.compressor, "compressor_options": dict(self.options)}
        return Parts(towers=towers, language_model=language_model, num_frames=self.num_frames, config=config)

    @cached_property
    def module(self) -> Any:
        """The row's compressor, narrow: for its parameters' names and for counting."""
        return build_compressor(self.compressor, dim=8, out_dim=8, **self.options)

    def token_count(self, num_frames: int | None = None, window: Window | None = None, grid: int = 8) -> int:
        """Return the visual tokens of a clip."""
        return int(self.module.token_count(num_frames or self.num_frames, grid, grid, window))

    def rates(self, rates: Rates) -> Rates:
        """Leave out patterns that nothing of this row is the first to match."""
        left = [f"model.compressor.{name}" for name, _ in self.module.named_parameters()]
        left += ["model.language_model.layers.0.mlp.up_proj.weight"]
        kept = []
        for pattern, rate in rates:
            if any(re.fullmatch(pattern, name) for name in left):
                kept.append((pattern, rate))
            left = [name for name in left if not re.fullmatch(pattern, name)]
        return tuple(kept)


def hicom(
    name: str,
    label: str,
    local: str = "direct",
    global_: str = "coarse",
    *,
    window: Window | None = (4, 4, 4),
    num_global_tokens: int = 8,
    extra: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Row:
    """Return a row of the paper's compressor; `extra` are further fields of its configuration.

    Local branches compare by cosine with a learnt temperature, as the dual encoder is trained, with or without an
    instruction.
    """
    options = {
        "window": window,
        "num_global_tokens": num_global_tokens,
        "local_injection": local,
        "global_injection": global_,
        "local_logit_scale": True,
    }
    return Row(name=name, label=label, options=options | dict(extra or {}), **fields)


def pooling(name: str, label: str, window: Window, **fields: Any) -> Row:
    """Return a row of average pooling."""
    return Row(name=name, label=label, compressor="space_time_pool", options={"window": window}, **fields)


COND, UNCOND, POOL = "local+global, conditional", "local+global, unconditional", "pooling (2,4,4)"
WINDOW_TESTS = (*BY_WINDOW, *BY_FRAMES)
LOCAL_ONLY: dict[str, Any] = {"window": (2, 4, 4), "num_global_tokens": 0}
GLOBAL_ONLY: dict[str, Any] = {"window": None, "num_global_tokens": BUDGET}

ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        # Table 4, and what other tables compare with.
        hicom("hicom", COND),
        hicom("uncond", UNCOND, "none", "none"),
        pooling("pool", POOL, (2, 4, 4)),
        hicom("local_cond", "local, conditional", **LOCAL_ONLY),
        hicom("local_uncond", "local, unconditional", "none", "none", **LOCAL_ONLY),
        hicom("global_cond", "global, conditional", **GLOBAL_ONLY),
        hicom("global_uncond", "global, unconditional", "none", "none", **GLOBAL_ONLY),
        # Table 5.
        hicom("hicom_two_stages", f"{COND}, no stage 2", pretrain=None),
        hicom("uncond_two_stages", f"{UNCOND}, no stage 2", "none", "none", pretrain=None),
        pooling("pool_two_stages", f"{POOL}, no stage 2", (2, 4, 4), pretrain=None),
        # Not in the paper: whether its tenfold rate is why stage 2 does not pay here.
        hicom("hicom_slow", f"{COND}, stage 2 with injections at the compressor's rate", injection_factor=1.0),
        # Beyond the paper.
        hicom("evidence", "HICom + evidence", extra={"match_evidence": True}),
        hicom("motion", "HICom + motion", extra={"motion_features": True}),
        hicom("pointer", "HICom + 2 pointers in place of 2 global tokens", num_global_tokens=6,
              extra={"num_pointers": 2}),
        hicom("beyond", "HICom + all three", num_global_tokens=6,
              extra={"match_evidence": True, "motion_features": True, "num_pointers": 2}),
        # Figure 5 and Frames: one set of weights for all windows.
        hicom("windows_cond", "conditional", num_global_tokens=4, windows=WINDOWS, tests=WINDOW_TESTS),
        hicom("windows_uncond", "unconditional", "none", "none", num_global_tokens=4, windows=WINDOWS,
              tests=WINDOW_TESTS),
        pooling("windows_pool", "pooling", (4, 4, 4), windows=WINDOWS, tests=WINDOW_TESTS),
        # Table 6.
        *(hicom(f"{local}_{global_}", f"{local}, {global_}", local, global_)
          for local in ("direct", "coarse", "fine") for global_ in ("coarse", "fine")
          if (local, global_) != ("direct", "coarse")),
        # Queries.
        Row(name="qformer", label="Q-Former, 4 layers", compressor="qformer",
            options={"num_queries": BUDGET, "num_layers": 4}),
        Row(name="resampler", label="Resampler, 2 layers", compressor="perceiver",
            options={"num_queries": BUDGET, "num_layers": 2}),
        # Table A5.
        hicom("hicom_mixed", f"{COND}, stage-2 data mixed into stage 3", pretrain=None, tune="mixed"),
        hicom("uncond_mixed", f"{UNCOND}, stage-2 data mixed into stage 3", "none", "none", pretrain=None,
              tune="mixed"),
        hicom("hicom_questions", f"{COND}, stage 2 on questions", pretrain="questions"),
        # Table 4, the rest.
        pooling("pool_more", "pooling (1,4,4), twice the tokens", (1, 4, 4)),
        pooling("pool_frames", "pooling (1,4,4), half the frames", (1, 4, 4), num_frames=NUM_FRAMES // 2),
        Row(name="full", label="uncompressed", compressor="no_compression", options={}, accumulate=4),
    )
}  # fmt: skip
"""In the order in which they are trained, seed after seed."""


def pair(label: str, row: str, other: str, expected: float | None = None) -> Comparison:
    """Return the difference of two rows on open questions."""
    return Comparison(label, Cell(row), Cell(other), expected)


def entry(row: str, *paper: float, label: str | None = None) -> Entry:
    """Return a line with the answers of a row to open questions and the paper's numbers."""
    return Entry(label or ROWS[row].label, Cell(row), paper)


INJECTION_NUMBERS = {
    "hicom": (36.6, 45.0, 43.5),
    "direct_fine": (36.3, 44.1, 43.5),
    "coarse_coarse": (36.5, 44.1, 42.7),
    "coarse_fine": (36.4, 44.3, 43.5),
    "fine_coarse": (36.0, 44.2, 42.7),
    "fine_fine": (36.0, 43.6, 42.0),
}
KINDS = {"windows_cond": "conditional", "windows_uncond": "unconditional", "windows_pool": "pooling"}

TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        Table(
            "4",
            "Table 4: components",
            f"All rows have {BUDGET} tokens unless the label says otherwise. local: window (2,4,4). global: {BUDGET} "
            "tokens. local+global: window (4,4,4) and 8 tokens; the paper adds its global tokens on top (648 + 32) and "
            "gives global alone 32. `half the frames` is the paper's row of 8 instead of 32 frames. The paper has no "
            "uncompressed row.",
            (
                entry("full"),
                entry("pool_more", 35.7, 44.8, 43.2),
                entry("pool_frames", 34.3, 43.6, 42.7),
                entry("pool", 34.0, 43.7, 41.9),
                entry("local_uncond", 34.4, 43.7, 42.7),
                entry("global_uncond", 30.1, 34.6, 33.6),
                entry("uncond", 34.7, 44.1, 42.4),
                entry("local_cond", 36.0, 44.0, 43.2),
                entry("global_cond", 30.3, 35.5, 34.0),
                entry("hicom", 36.6, 45.0, 43.5),
            ),
            (
                pair("local: conditional - unconditional", "local_cond", "local_uncond"),
                pair("global: conditional - unconditional", "global_cond", "global_uncond"),
                pair("local+global: conditional - unconditional", "hicom", "uncond"),
                pair("HICom - pooling", "hicom", "pool"),
                pair("HICom - pooling with more tokens", "hicom", "pool_more"),
                pair("conditional: local+global - local", "hicom", "local_cond"),
                pair("unconditional: local+global - local", "uncond", "local_uncond"),
                pair("unconditional local - pooling", "local_uncond", "pool"),
                pair("uncompressed - HICom", "full", "hicom"),
            ),
        ),
        Table(
            "5",
            "Table 5: conditional pre-training (stage 2)",
            "Without stage 2 the row goes from `align` to `tune`; the steps of `tune` are the same. The last row is "
            "not in the paper: its injections learn at the compressor's rate in stage 2, not at ten times that.",
            (
                entry("pool_two_stages", 34.1, 42.7, 40.6),
                entry("pool", 34.0, 43.7, 41.9, label=f"{POOL}, with stage 2"),
                entry("uncond_two_stages", 35.4, 42.8, 41.64),
                entry("uncond", 34.7, 44.1, 42.4, label=f"{UNCOND}, with stage 2"),
                entry("hicom_two_stages", 36.0, 44.0, 41.6),
                entry("hicom", 36.6, 45.0, 43.5, label=f"{COND}, with stage 2"),
                entry("hicom_slow"),
            ),
            (
                pair("pooling: with - without", "pool", "pool_two_stages"),
                pair("no injection: with - without", "uncond", "uncond_two_stages"),
                pair("injection: with - without", "hicom", "hicom_two_stages"),
                pair("injection: with, slower - without", "hicom_slow", "hicom_two_stages"),
                pair("injection: slower - tenfold", "hicom_slow", "hicom"),
            ),
        ),
        Table(
            "6",
            "Table 6: injections (local, global)",
            "Plain HICom is direct, coarse. Coarse and fine local queries start from the window's mean.",
            tuple(
                entry(row, *numbers, label="direct, coarse" if row == "hicom" else None)
                for row, numbers in INJECTION_NUMBERS.items()
            ),
            tuple(
                pair(f"(direct, coarse) - ({ROWS[row].label})", "hicom", row)
                for row in INJECTION_NUMBERS
                if row != "hicom"
            ),
        ),
        Table(
            "figure5",
            "Figure 5: accuracy against tokens",
            "One model a kind, trained with all five windows in turn, so that a window costs no training. conditional "
            "and unconditional: local+global with 4 global tokens, which count; pooling has windows alone. The paper's "
            "points are in a picture only; it says that conditional compression loses less at high ratios.",
            tuple(
                Entry(f"{label}, window ({','.join(map(str, window))})", Cell(row, test.name))
                for row, label in KINDS.items()
                for window, test in zip(WINDOWS, BY_WINDOW, strict=True)
            ),
            tuple(
                Comparison(
                    f"conditional - unconditional, window ({','.join(map(str, window))})",
                    Cell("windows_cond", test.name),
                    Cell("windows_uncond", test.name),
                )
                for window, test in zip(WINDOWS, BY_WINDOW, strict=True)
            ),
            plot="visual tokens",
        ),
        Table(
            "a3",
            "Table A3: without windows",
            f"Without windows {BUDGET} queries look at the whole video, with windows at their own each: the global "
            "branch alone against the local branch alone. The paper's queries are the windows' means in both cases; "
            "those of the global branch are learnt.",
            (
                entry("global_uncond", 32.5, 42.9, 39.9, label="without windows, unconditional"),
                entry("global_cond", 33.8, 43.6, 41.6, label="without windows, conditional"),
                entry("local_uncond", 34.4, 43.7, 42.7, label="with windows, unconditional"),
                entry("local_cond", 36.0, 44.0, 43.2, label="with windows, conditional"),
            ),
            (
                pair("unconditional: with - without", "local_uncond", "global_uncond"),
                pair("conditional: with - without", "local_cond", "global_cond"),
                pair("without windows: conditional - unconditional", "global_cond", "global_uncond"),
            ),
        ),
        Table(
            "a4",
            "Table A4: naming against generic questions",
            "Naming: questions that name an object, whose noun an instruction can look for (the paper's valid "
            "instructions). Generic: what happens? (invalid). The same answers as in Table 4, sorted; the paper's "
            "questions have options, ours are open.",
            tuple(
                Entry(f"{group}, {kind}", Cell(row, "open", group), (number,))
                for group, numbers in (("naming", (32.9, 35.0)), ("generic", (47.9, 48.1)))
                for (row, kind), number in zip(
                    (("uncond", "unconditional"), ("hicom", "conditional")), numbers, strict=True
                )
            ),
            tuple(
                Comparison(
                    f"{group}: conditional - unconditional",
                    Cell("hicom", "open", group),
                    Cell("uncond", "open", group),
                    expected,
                )
                for group, expected in (("naming", 2.1), ("generic", 0.2))
            ),
            paper=("VMME",),
        ),
        Table(
            "a5",
            "Table A5: data of stage 2",
            "Mixed: no stage 2; its descriptions are mixed into stage 3 in the same number, for as many steps as both. "
            "Questions: stage 2 learns from the questions of stage 3. The paper's base is a model without injection; "
            "unconditional local+global stands for it.",
            (
                entry("uncond_two_stages", 36.1, 42.5),
                entry("hicom_two_stages", 36.0, 41.6),
                entry("uncond_mixed", 36.4, 43.3),
                entry("hicom_mixed", 36.2, 42.4),
                entry("uncond", 36.2, 43.2, label=f"{UNCOND}, three stages"),
                entry("hicom", 36.6, 43.5, label=f"{COND}, three stages"),
                entry("hicom_questions", 34.6, 40.8),
            ),
            (
                pair("conditional: three stages - two", "hicom", "hicom_two_stages"),
                pair("conditional: three stages - mixed", "hicom", "hicom_mixed"),
                pair("conditional: descriptions - questions", "hicom", "hicom_questions"),
                pair("unconditional: three stages - two", "uncond", "uncond_two_stages"),
                pair("unconditional: three stages - mixed", "uncond", "uncond_mixed"),
            ),
            paper=("VMME", "Ego"),
        ),
        Table(
            "frames",
            "Frames: trained at 8, answered at 4, 8, 16 and 32",
            "The models of Figure 5 on clips eight times as long as those of training (split `test_long`), window "
            "(4,4,4). The paper trains at 32 frames and answers at 64 and 128: mean of Video-MME without and with "
            "subtitles, MVBench and EgoSchema 60.7, 62.3, 62.8 (Table 2, 7B).",
            tuple(
                Entry(f"{label}, {n} frames", Cell(row, test.name))
                for row, label in KINDS.items()
                for n, test in zip(LONG_FRAMES, BY_FRAMES, strict=True)
            ),
            (
                *(
                    Comparison(
                        f"conditional: {n} frames - 8",
                        Cell("windows_cond", f"frames-{n}"),
                        Cell("windows_cond", "frames-8"),
                        expected,
                    )
                    for n, expected in ((4, None), (16, 1.6), (32, 2.1))
                ),
                *(
                    Comparison(
                        f"{n} frames: conditional - unconditional",
                        Cell("windows_cond", f"frames-{n}"),
                        Cell("windows_uncond", f"frames-{n}"),
                    )
                    for n in LONG_FRAMES
                ),
            ),
            plot="frames",
        ),
        Table(
            "queries",
            "Queries: Q-Former and Resampler",
            f"All with {BUDGET} tokens from the whole video and no instruction. Not a table of the paper, which argues "
            "against both.",
            (entry("qformer"), entry("resampler"), entry("global_uncond"), entry("uncond"), entry("hicom")),
            (
                pair("HICom - Q-Former", "hicom", "qformer"),
                pair("HICom - Resampler", "hicom", "resampler"),
                pair("unconditional local+global - Q-Former", "uncond", "qformer"),
                pair("unconditional local+global - Resampler", "uncond", "resampler"),
            ),
        ),
        Table(
            "beyond",
            "Beyond the paper: evidence, motion, pointers",
            "Options of the compressor, one by one and all, at the same number of tokens. Not in the paper.",
            (entry("hicom"), entry("evidence"), entry("motion"), entry("pointer"), entry("beyond")),
            (
                pair("evidence - plain", "evidence", "hicom"),
                pair("motion - plain", "motion", "hicom"),
                pair("pointers - plain", "pointer", "hicom"),
                pair("all three - plain", "beyond", "hicom"),
            ),
        ),
    )
}


def rows_of(table: Table) -> set[str]:
    """Return the names of all rows that a table shows."""
    cells = [entry.cell for entry in table.entries]
    return {cell.row for cell in (*cells, *(c for each in table.comparisons for c in (each.cell, each.other)))}


# Training and asking.


PLACES = ("world", "towers", "language_model", "cache", "out")
"""Fields of `Place` that are options of the command."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where everything lies.

    Attributes:
        world: the data set.
        towers: the dual encoder.
        language_model: folder of the model whose language model all rows start from; None: random weights.
        cache: vision features.
        out: runs.
        answers: folder of the answers; None: `answers` in `out`.
    """

    world: Path = Path("runs/world")
    towers: Path = START
    language_model: Path | None = START
    cache: Path = Path("runs/features")
    out: Path = Path("runs/ablations")
    answers: Path | None = None

    @cached_property
    def fingerprint(self) -> str:
        """What tells that runs start from the same world, towers and language model.

        Raises:
            ValueError: one of them is missing.
        """
        digest = hashlib.sha256()
        files = [self.world / "world.json", self.towers / "model.safetensors"]
        files += [] if self.language_model is None else [self.language_model / "model.safetensors"]
        for path in files:
            if not path.is_file():
                raise ValueError(
                    f"{path} is missing: `hicom world make` writes the world, `hicom train tiny` also makes "
                    "towers and a language model"
                )
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()

    def records(self, name: str) -> str:
        """Return a file of training records."""
        return str(self.world / "train" / f"{name}.jsonl")

    @property
    def questions(self) -> Path:
        """The file of open training questions, which `write_questions` writes."""
        return self.out / "data" / "open.jsonl"

    def write_questions(self) -> None:
        """Leave out questions with options: a fourth of all, almost half of the text, and the last to be learnt."""
        with locked(make_parent(self.questions.with_suffix(".lock"))):
            if not self.questions.exists():
                lines = Path(self.records("tune")).read_text("utf-8").splitlines()
                kept = [line for line in lines if json.loads(line)["form"] == "open"]
                write_whole(self.questions, "\n".join(kept) + "\n")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    part.replace(path)


def digest_of(*things: Any) -> str:
    """Return a short name for JSON values; what is None in a dictionary does not count, so it may be added later."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(each) for key, each in sorted(value.items()) if each is not None}
        return [plain(each) for each in value] if isinstance(value, list | tuple) else value

    return hashlib.sha256(json.dumps(plain(things)).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Stage:
    """A training run in its folder."""

    config: TrainConfig
    digest: str

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.out)

    @property
    def stamp(self) -> dict[str, Any]:
        """The run's `run.json`; empty before it is started."""
        path = self.folder / "run.json"
        return json.loads(path.read_text("utf-8")) if path.exists() else {}

    @property
    def is_finished(self) -> bool:
        """Whether its model is there."""
        return self.stamp.get("status") == "finished"


@dataclass(frozen=True)
class Job:
    """One row with one seed."""

    row: Row
    seed: int
    protocol: Protocol
    place: Place

    def __str__(self) -> str:
        return f"{self.row.name}, seed {self.seed}"

    @property
    def mixed(self) -> tuple[Path, int, int]:
        """The file that mixes stage 2 into stage 3, and how many records of either it holds."""
        few, many = self.protocol.pretrain * self.protocol.batch, self.protocol.tune * self.protocol.batch
        return self.place.out / "data" / f"mixed-{few}-{many}.jsonl", few, many

    @cached_property
    def stages(self) -> list[Stage]:
        """The row's training runs, each from the last one's model."""
        row, protocol, place = self.row, self.protocol, self.place
        # Batches of equally long questions, four about a clip: less padding, and a clip is worked on once for all four.
        grouped = {"group_by_length": True, "per_video": max(1, min(4, protocol.batch // row.accumulate))}
        shared: dict[str, Any] = {"seed": self.seed, "accumulate": row.accumulate, **grouped}
        plain = StageConfig(trainable=((IDLE, 0.0), (INJECTION, 0.0), (COMPRESSOR, protocol.align_rate)))
        steps: list[tuple[str, StageConfig, str, int, int, float]] = [
            ("align", plain, place.records("align"), protocol.align, protocol.align_batch, 0.0)
        ]
        if row.pretrain is not None:
            injection = row.injection_factor * protocol.pretrain_rate
            stage = pretrain(protocol.pretrain_rate, injection_rate=injection, windows=row.windows)
            file = place.records("pretrain") if row.pretrain == "descriptions" else str(place.questions)
            steps.append(("pretrain", stage, file, protocol.pretrain, protocol.batch, 0.0))
        stage = tune(protocol.tune_rate, injection_rate=protocol.injection_rate, windows=row.windows)
        file, number = str(place.questions), protocol.tune
        if row.tune == "mixed":
            file, number = str(self.mixed[0]), protocol.pretrain + protocol.tune
        steps.append(("tune", stage, file, number, protocol.batch, protocol.weight_decay))

        language_model = None if place.language_model is None else str(place.language_model)
        stages: list[Stage] = []
        for name, stage, file, number, batch, decay in steps:
            config = TrainConfig(
                name=name,
                out="",
                init=str(stages[-1].folder / "model") if stages else None,
                parts=None if stages else row.parts(str(place.towers), language_model),
                data=DataConfig(
                    records=(file,), root=str(place.world), num_frames=row.num_frames, cache=str(place.cache)
                ),
                stage=dataclasses.replace(stage, trainable=row.rates(stage.trainable)),
                steps=number,
                batch_size=max(1, batch // row.accumulate),
                weight_decay=decay,
                optimizer=protocol.tune_optimizer if name == "tune" else "adamw",
                **shared,
            )
            fields = dataclasses.asdict(config) | {"out": None, "init": None}
            # No path counts, so that the same run has the same name on every machine: the run before stands for its
            # model, and the fingerprint of all that is started from for the rest.
            fields["data"] |= {"records": [Path(file).name], "root": None, "cache": None}
            # Younger than the first answers.
            del fields["data"]["on_bad_record"], fields["gradient_checkpointing"]
            if config.parts is not None:
                fields["parts"] |= {"towers": None, "language_model": None}
            digest = digest_of(fields, stages[-1].digest if stages else place.fingerprint)
            out = str(place.out / "stages" / f"{name}-{digest}")
            stages.append(Stage(dataclasses.replace(config, out=out), digest))
        return stages

    @property
    def model_folder(self) -> Path:
        """Where the trained model lies."""
        return self.stages[-1].folder / "model"

    def answers_path(self, test: Test) -> Path:
        """Return the file of the answers to a test."""
        digest = digest_of(self.stages[-1].digest, dataclasses.asdict(test), self.num_clips(test))
        return (self.place.answers or self.place.out / "answers") / f"{digest}-{test.name}.json.gz"

    def num_clips(self, test: Test) -> int:
        """Return how many clips a test is about."""
        return self.protocol.num_long_clips if test.split == "test_long" else self.protocol.num_clips

    def answers(self, test: Test) -> dict[str, Any] | None:
        """Return the answers to a test, if they are there."""
        path = self.answers_path(test)
        return json.loads(gzip.decompress(path.read_bytes())) if path.exists() else None

    @property
    def is_done(self) -> bool:
        """Whether everything is trained and answered."""
        return all(self.answers_path(test).exists() for test in self.row.tests)

    def advance(self) -> bool:
        """Train and ask what is missing; return False where another process is at it."""
        for stage in self.stages:
            with claimed(make_parent(self.place.out / "locks" / stage.digest), wait=False) as is_free:
                if not is_free:
                    return False
                if not stage.is_finished:
                    self.train(stage)
        lock = make_parent(self.place.out / "locks" / f"{self.stages[-1].digest}-answers")
        with claimed(lock, wait=False) as is_free:
            if not is_free:
                return False
            if not self.is_done:
                self.ask()
        return True

    def train(self, stage: Stage) -> None:
        """Run one stage, or go on with it."""
        logger.info("%s: training %s in %s", self, stage.config.name, stage.folder)
        self.place.write_questions()
        if self.row.tune == "mixed" and stage.config.name == "tune":
            self.write_mixed()
        config = stage.config
        model, processor = load_parts(config) if config.parts is not None else load_model(Path(str(config.init)))
        videos = training_videos(config.data.records[0], str(self.place.world))
        make_features(model, processor, videos, self.place.cache, config.data.num_frames)
        del model
        run(config)
        shutil.rmtree(stage.folder / "checkpoints", ignore_errors=True)

    def write_mixed(self) -> None:
        """Write the records of Table A5's mix: those of stage 2 and stage 3 in the numbers that both stages see."""
        path, few, many = self.mixed
        with locked(make_parent(path.with_suffix(".lock"))):
            if path.exists():
                return
            draw = random.Random(0)
            lines: list[str] = []
            for file, number in ((self.place.records("pretrain"), few), (self.place.questions, many)):
                found = Path(file).read_text("utf-8").splitlines()
                lines += draw.sample(found, min(number, len(found)))
            write_whole(path, "\n".join(lines) + "\n")

    def ask(self) -> None:
        """Answer the tests whose answers are missing."""
        model, processor = load_model(self.model_folder)
        model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        for test in self.row.tests:
            if self.answers_path(test).exists():
                continue
            logger.info("%s: answering %s", self, test.name)
            samples = read_questions(self.place.world, test.split, num_clips=self.num_clips(test))
            num_frames = test.num_frames or self.row.num_frames
            videos = [video for sample in samples for video in sample.videos]
            store = make_features(model, processor, videos, self.place.cache, num_frames)
            start = time.monotonic()
            given = list(answer(model, processor, store, samples, window=test.window))
            seconds = time.monotonic() - start
            results = {
                "row": self.row.name,
                "seed": self.seed,
                **dataclasses.asdict(test),
                "num_frames": num_frames,
                "visual_tokens": processor.token_count(num_frames, test.window),
                "seconds_per_question": seconds / len(samples),
                "date": time.strftime("%Y-%m-%d"),
                "commit": git_commit(),
                "hardware": hardware(),
                "chances": [chances(sample.metadata) for sample in samples],
                **counted(samples, given),
            }
            # Without a time inside, equal answers are equal files.
            packed = gzip.compress((json.dumps(results) + "\n").encode(), mtime=0)
            write_whole(self.answers_path(test), packed)


def make_parent(path: Path) -> Path:
    """Make the folder of a file, and return the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@lru_cache(maxsize=4)
def training_videos(records: str, root: str) -> tuple[Path, ...]:
    """Return the videos of a file of records."""
    return tuple(read_records(records, root).videos)


def load_parts(config: TrainConfig) -> tuple[HIComForConditionalGeneration, HIComProcessor]:
    """Return an untrained model."""
    assert config.parts is not None
    return assemble(config.parts)


def load_model(folder: Path) -> tuple[HIComForConditionalGeneration, HIComProcessor]:
    """Return a trained model."""
    model = HIComForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model, HIComProcessor.from_pretrained(folder)


def make_features(
    model: HIComForConditionalGeneration,
    processor: HIComProcessor,
    videos: Sequence[Path],
    cache: Path,
    num_frames: int,
) -> FeatureStore:
    """Return the store with the features of videos, as `cache_features`.

    Models that no instruction steers have a store without keys. Its values are those of the store with keys, so they
    are copied from there and not computed again.
    """
    if not model.config.is_conditional:
        key, grid = feature_key(model, processor, num_frames), model.config.grid_size
        with_keys = key | {"keys": [grid, grid, model.config.instruction_dim]}
        borrow_values(store_folder(cache, with_keys), store_folder(cache, key), key)
    return cache_features(model, processor, videos, cache, num_frames=num_frames)


def store_folder(cache: Path, key: dict[str, Any]) -> Path:
    """Return the folder that `cache_features` keeps a store in."""
    return cache / hashlib.sha256(json.dumps(key, indent=1).encode()).hexdigest()[:16]


def borrow_values(source: Path, target: Path, key: dict[str, Any]) -> None:
    """Copy the values of a store to one without keys, if it has more videos than are there."""
    if not (source / "index.jsonl").exists():
        return
    target.mkdir(parents=True, exist_ok=True)
    with locked(source / "lock"), locked(target / "lock"):
        there = FeatureStore(target).places.keys() if (target / "key.json").exists() else set()
        if not there < FeatureStore(source).places.keys():
            return
        for name in ("values.bin", "index.jsonl"):
            # The index comes last: what it does not list does not exist.
            shutil.copyfile(source / name, target / f"{name}.part")
            (target / f"{name}.part").replace(target / name)
        (target / "keys.bin").touch()
        write_whole(target / "key.json", json.dumps(key, indent=1))


def prepare(place: Place, protocol: Protocol) -> None:
    """Compute the features with keys first, so that all rows can have them."""
    model, processor = assemble(ROWS["hicom"].parts(str(place.towers), None))
    place.write_questions()
    videos = list(training_videos(str(place.questions), str(place.world)))
    samples = read_questions(place.world, "test", num_clips=protocol.num_clips)
    videos += [video for sample in samples for video in sample.videos]
    make_features(model, processor, videos, place.cache, NUM_FRAMES)


def make_jobs(rows: Sequence[Row], seeds: Sequence[int], protocol: Protocol, place: Place) -> list[Job]:
    """Return what there is to do: all rows with the first seed, then with the next one."""
    return [Job(row, seed, protocol, place) for seed in seeds for row in rows]


def work(jobs: Sequence[Job], report: Callable[[], None], *, wait_s: float = 20.0) -> None:
    """Do all jobs, leaving those aside that other processes are at, and call `report()` after each one."""
    left = [job for job in jobs if not job.is_done]
    while left:
        # From the start each time: what another process held may be free by now.
        job = next((job for job in left if job.is_done or job.advance()), None)
        if job is None:
            time.sleep(wait_s)
            continue
        left.remove(job)
        report()


# Results.


def summary(answers: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return, for every family, how many questions were asked and answered right, and the chances."""
    rows: dict[str, dict[str, Any]] = {}
    for (_, family, is_hit, _), (chance, informed) in zip(answers["questions"], answers["chances"], strict=True):
        row = rows.setdefault(
            answers["families"][family], {"n": 0, "correct": 0, "chance": 0.0, "informed_chance": 0.0}
        )
        row["n"] += 1
        row["correct"] += is_hit
        row["chance"] += chance
        row["informed_chance"] += informed
    for row in rows.values():
        row["chance"], row["informed_chance"] = (round(row[x] / row["n"], 4) for x in ("chance", "informed_chance"))
    return rows


def runs_of(report: Path) -> dict[str, Any]:
    """Return what a report, if there is one, says of finished training runs: folder -> facts."""
    rows = json.loads(report.read_text("utf-8"))["rows"].values() if report.exists() else ()
    stages = [stage for row in rows for seed in row["seeds"].values() for stage in seed["stages"].values()]
    return {stage["folder"]: stage for stage in stages if stage["status"] == "finished"}


def raw_results(jobs: Sequence[Job], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything measured: row -> seed -> runs and answers by family.

    Args:
        jobs: what there was to do.
        known: of training runs whose folders may be on another machine, as `runs_of`.
    """
    rows: dict[str, Any] = {}
    for job in jobs:
        stages = {}
        for stage in job.stages:
            facts = {key: stage.stamp.get(key) for key in ("status", "commit", "wall_s", "loss", "samples")}
            if stage.stamp:
                stages[stage.config.name] = {"folder": stage.folder.name, **facts, "steps": stage.config.steps}
            elif stage.folder.name in known:
                stages[stage.config.name] = known[stage.folder.name]
        tests = {test.name: found for test in job.row.tests if (found := job.answers(test)) is not None}
        kept = ("split", "num_frames", "window", "visual_tokens", "seconds_per_question", "date", "commit")
        row = rows.setdefault(
            job.row.name,
            {
                "label": job.row.label,
                "compressor": job.row.compressor,
                "options": dict(job.row.options),
                "num_frames": job.row.num_frames,
                "pretrain": job.row.pretrain,
                "tune": job.row.tune,
                "visual_tokens": job.row.token_count(),
                "seeds": {},
            },
        )
        if stages or tests:
            row["seeds"][job.seed] = {
                "stages": stages,
                "tests": {
                    name: {key: each[key] for key in kept} | {"families": summary(each)} for name, each in tests.items()
                },
            }
    return rows


def chance_line(jobs: Sequence[Job]) -> str:
    """Return the means over families of both chances on open questions; empty where nothing is answered."""
    for job in jobs:
        found = job.answers(OPEN) if OPEN in job.row.tests else None
        if found is not None:
            families = summary(found).values()
            chance, informed = (
                100 * sum(row[key] for row in families) / len(families) for key in ("chance", "informed_chance")
            )
            return (
                f"By chance {chance:.1f} % of the open questions would be right without the video, {informed:.1f} % "
                "naming a random object of the clip (means over families)."
            )
    return ""


HEAD = """# The paper's tables in small

Made by `python benchmarks/ablations.py`; what stands for what and how to read it: [ablations.md](../ablations.md).
The paper's numbers are percent on Video-MME without subtitles (VMME), MVBench and EgoSchema (Ego), of Qwen2.5-0.5B;
ours are percent of right answers on held-out clips of the sprite world, averaged over question families and seeds.
Levels do not compare, signs of differences do. Intervals are bootstraps over seeds and clips, 95 %; with three seeds
they are somewhat too narrow, with one they know of clips only. `missing`: not measured.
"""


def write_report(jobs: Sequence[Job], results: Path) -> None:
    """Write `ablations.json`, `ablations.md` and the plots: all tables, whether their rows are measured or not."""
    by_row: dict[str, list[Job]] = {}
    for job in jobs:
        by_row.setdefault(job.row.name, []).append(job)
    tests = {(row.name, test.name): test for row in ROWS.values() for test in row.tests}

    @cache
    def answers(row: str, test: str) -> dict[int, dict[str, Any]]:
        found = {job.seed: job.answers(tests[row, test]) for job in by_row.get(row, [])}
        return {seed: each for seed, each in found.items() if each is not None}

    protocol, place = jobs[0].protocol, jobs[0].place
    with locked(make_parent(place.out / "report.lock")):
        report = Report(list(TABLES.values()), answers)
        rows = raw_results(jobs, runs_of(results / "ablations.json"))
        done = sum(job.is_done for job in jobs)
        commits = sorted({short_commit(t["commit"]) for r in rows.values() for s in r["seeds"].values()
                          for t in s["tests"].values()})  # fmt: skip
        facts = {
            "date": time.strftime("%Y-%m-%d"),
            "commit": git_commit(),
            "hardware": hardware(),
            "protocol": dataclasses.asdict(protocol),
            "runs_done": done,
            "runs": len(jobs),
            "tables": report.facts(),
            "rows": rows,
        }
        parts = [
            HEAD,
            f"{done} of {len(jobs)} runs (row and seed) are done. {facts['date']}, commits of the answers: "
            f"{', '.join(commits) or 'none'}. Steps x batch: align {protocol.align} x {protocol.align_batch}, pretrain "
            f"{protocol.pretrain} x {protocol.batch}, tune {protocol.tune} x {protocol.batch}. Clips: "
            f"{protocol.num_clips}, long ones {protocol.num_long_clips}. {chance_line(jobs)}\n",
        ]
        for table in TABLES.values():
            parts.append(report.markdown(table) + "\n")
            if table.plot is not None:
                name = f"ablations-{table.name}.svg"
                write_whole(results / name, accuracy_plot(table.title, table.plot, report.series(table)))
                parts.append(f"![{table.title}]({name})\n")
        shown = {name: ROWS[name].label for name in by_row if OPEN in ROWS[name].tests}
        parts.append("## By family, open questions, mean over seeds, %\n\n" + report.families(shown))
        write_whole(results / "ablations.json", json.dumps(facts, indent=1) + "\n")
        write_whole(results / "ablations.md", "\n".join(parts) + "\n")


def cost(row: Row, protocol: Protocol) -> tuple[int, float]:
    """Return the optimizer steps of a row and about how many million tokens its language model reads for them."""
    stages = [(protocol.align, protocol.align_batch), (protocol.tune, protocol.batch)]
    if row.pretrain is not None or row.tune == "mixed":
        stages.append((protocol.pretrain, protocol.batch))
    windows = row.windows or (None,)
    tokens = sum(row.token_count(window=window) for window in windows) / len(windows)
    return sum(n for n, _ in stages), sum(n * batch for n, batch in stages) * (tokens + TEXT_TOKENS) / 1e6


def listing(rows: Sequence[Row], protocol: Protocol) -> str:
    """Return what `--list` prints."""
    lines = [f"{'row':18} {'tables':18} {'tokens':>6} {'steps':>6} {'M tokens':>9}  what"]
    for row in rows:
        names = ",".join(table.name for table in TABLES.values() if row.name in rows_of(table))
        steps, tokens = cost(row, protocol)
        lines.append(f"{row.name:18} {names:18} {row.token_count():6} {steps:6} {tokens:9.1f}  {row.label}")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's arguments."""
    place = Place()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES), metavar="TABLE",
                        help=f"some of {', '.join(TABLES)}; default: all")  # fmt: skip
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=None, metavar="ROW", help="only these (--list)")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--protocol", choices=PROTOCOLS, default="cpu")
    parser.add_argument("--num-clips", type=int, default=None, help="held-out clips that are asked about")
    for name in PLACES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=Path, default=getattr(place, name))
    parser.add_argument("--results", type=Path, default=None, help="folder of the report; default: docs/results")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the work")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--report-only", action="store_true", help="write the report of what is there")
    parser.add_argument("--list", action="store_true", help="show rows and what they cost, and do nothing")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; return the exit status."""
    args = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(message)s", datefmt="%H:%M:%S")
    protocol = PROTOCOLS[args.protocol]
    if args.num_clips is not None:
        protocol = dataclasses.replace(protocol, num_clips=args.num_clips)
    tables = [TABLES[name] for name in args.tables]
    wanted = set(args.rows or ROWS) & set().union(*(rows_of(table) for table in tables))
    rows = [row for row in ROWS.values() if row.name in wanted]
    if args.list:
        print(listing(rows, protocol))
        return 0
    if args.workers > 1 and not args.report_only:
        given = list(sys.argv[1:] if arguments is None else arguments)
        command = [sys.executable, str(Path(__file__).resolve()), *given, "--workers", "1"]
        workers = [subprocess.Popen(command) for _ in range(args.workers)]
        return max(worker.wait() for worker in workers)
    torch.set_num_threads(args.threads)
    place = Place(**{name: getattr(args, name) for name in PLACES})
    if args.protocol != "smoke":
        place = dataclasses.replace(place, answers=(args.results or ROOT / "docs" / "results") / "ablations")
    jobs = make_jobs(rows, args.seeds, protocol, place)
    # The report is of everything, whatever is asked for now.
    everything = make_jobs(list(ROWS.values()), sorted({*SEEDS, *args.seeds}), protocol, place)
    # A smoke test is no result.
    results = args.results or (place.out / "results" if args.protocol == "smoke" else ROOT / "docs" / "results")
    if not args.report_only:
        if not all(job.is_done for job in jobs):
            prepare(place, protocol)
        work(jobs, lambda: write_report(everything, results))
    write_report(everything, results)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"ablations: error: {error}")
