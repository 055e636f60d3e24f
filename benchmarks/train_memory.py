"""Is what `hicom train --estimate` says what training takes? `python benchmarks/train_memory.py`.

Trains a few steps of the recipes `finetune`, `finetune-lora` and `finetune-qlora` in processes of their own, and sets
the largest memory beside the estimate: on a GPU what torch allocated, on a CPU how much the process grew from before
the model was loaded, after it had trained a small one. The model has towers of the size of SigLIP-base (224 pixels)
and a language model of the size of Qwen2.5-0.5B with its vocabulary, all of random weights. QLoRA needs bitsandbytes.
Writes `docs/results/train-memory.json` and `.md`.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import tyro
from feature_cache import make_parts, make_records

from hicom.bench.shapes import QWEN, published_config
from hicom.model.config import HIComConfig
from hicom.model.processing import HIComProcessor
from hicom.provenance import git_commit, hardware, short_commit
from hicom.recipes.finetune import finetune, finetune_lora, finetune_qlora
from hicom.train import TrainConfig
from hicom.train.assemble import assemble
from hicom.train.estimate import TEXT_TOKENS, SampleSize, sample_size, training_memory, ways
from hicom.train.run import load, run
from hicom.train.trainer import make_trainer

ROOT = Path(__file__).parents[1]
VOCABULARY = 151_936
"""Of Qwen2.5."""
STEPS = 3
RECIPES = {"full": finetune, "LoRA": finetune_lora, "QLoRA, 4 bit": finetune_qlora}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "full, activations kept": ("full", {"gradient_checkpointing": False}),
    "full, 4 samples": ("full", {"batch_size": 4}),
    "full, 2 passes": ("full", {"accumulate": 2}),
    "LoRA": ("LoRA", {}),
    "LoRA, activations kept": ("LoRA", {"gradient_checkpointing": False}),
    "LoRA, 4 samples, activations kept": ("LoRA", {"batch_size": 4, "gradient_checkpointing": False}),
    "QLoRA, 4 bit": ("QLoRA, 4 bit", {}),
    "QLoRA, 4 bit, 4 samples": ("QLoRA, 4 bit", {"batch_size": 4}),
}
"""Name -> recipe and what differs from one sample in one pass with activations computed again."""


def make_model(folder: Path) -> Path:
    """Write a model of random weights, and return its folder."""
    model, processor = assemble(make_parts("base", folder / "towers"))
    model.resize_token_embeddings(VOCABULARY)
    model.config.text_config.vocab_size = VOCABULARY
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model"


def make_config(case: str, folder: Path) -> TrainConfig:
    """Return the run of a case."""
    recipe, changes = CASES[case]
    config = RECIPES[recipe](str(folder / "model"), (str(folder / "records.jsonl"),))
    fixed = {"out": str(folder / "run"), "steps": STEPS, "epochs": None, "batch_size": 1, "accumulate": 1}
    fixed |= {"global_batch_size": None, "gradient_checkpointing": True, "save_every": 10**6}
    return dataclasses.replace(config, **(fixed | changes))


def status_bytes(name: str) -> int:
    """Return a number of `/proc/self/status`, such as `VmHWM`, the most memory that this process has had."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def measure(case: str, folder: Path) -> int:
    """Train a few steps, and return the largest memory of these."""
    config = make_config(case, folder)
    # A first run of a small model brings in libraries and threads, which are no matter of the model's size.
    run(dataclasses.replace(config, init="hicom-tiny", out=str(folder / f"warm-{os.getpid()}"), steps=1))
    gc.collect()
    before = status_bytes("VmRSS")
    model, processor = load(config, quantize=True)
    model.config.text_config.use_cache = False
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()  # out of the mapped file, all of which would count as memory
    gc.collect()
    out = folder / "run"
    out.mkdir(exist_ok=True)
    trainer = make_trainer(config, model, processor, out, {"wall_s": 0.0})
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the largest so far is forgotten
    trainer.train()
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else status_bytes("VmHWM") - before


def measure_apart(case: str, folder: Path) -> int:
    """Return what `measure` does, out of a new process whose memory goes back to the system once it is free."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}
    command = [sys.executable, __file__, "--case", case, "--folder", str(folder)]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return int(result.stdout.split()[-1])


def published_rows() -> list[dict[str, Any]]:
    """Return estimates for the published sizes: one sample of 32 frames, in mixed precision."""
    rows: list[dict[str, Any]] = []
    size = SampleSize(num_frames=32)
    for shape in QWEN:
        config = dataclasses.replace(finetune("", ("",)), bf16=True, batch_size=1, global_batch_size=None)
        for name, way in ways(config).items():
            for is_checkpointed in (True, False):
                each = dataclasses.replace(way, gradient_checkpointing=is_checkpointed)
                found = training_memory(each, published_config(shape), size)
                key = {"shape": shape, "way": name, "gradient_checkpointing": is_checkpointed}
                rows.append(key | dataclasses.asdict(found) | {"total": found.total})
                print(rows[-1], flush=True)
    return rows


def published_table(rows: list[dict[str, Any]]) -> str:
    """Return the estimates for the published sizes as Markdown: with activations computed again, and kept."""
    totals = {(row["shape"], row["way"], row["gradient_checkpointing"]): row["total"] / 1e9 for row in rows}
    names = list(dict.fromkeys(row["way"] for row in rows))
    lines = [f"| language model | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for shape in dict.fromkeys(row["shape"] for row in rows):
        cells = (f"{totals[shape, name, True]:.1f} / {totals[shape, name, False]:.1f}" for name in names)
        lines.append(f"| Qwen2.5-{shape.upper()} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(facts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    lines = [
        "| run | weights | gradients | optimizer | work | estimate | measured | estimate / measured |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        parts = " | ".join(f"{row[name] / 1e9:.2f}" for name in ("weights", "gradients", "optimizer", "work"))
        lines.append(
            f"| {row['case']} | {parts} | {row['estimate'] / 1e9:.2f} | {row['measured'] / 1e9:.2f} | "
            f"{row['estimate'] / row['measured']:.2f} |"
        )
    machine = facts["hardware"]
    device = ", ".join(machine["gpus"]) or f"{machine['machine']}, CPU, float32"
    return (
        "# Memory of training: estimated and measured\n\nGB. One step of the recipes on one device, with one sample in "
        "one pass and activations computed again in the backward pass unless a row says otherwise; towers like "
        "SigLIP-base (224 pixels, 8 frames), language model like Qwen2.5-0.5B. Measured: the most that "
        f"{STEPS} steps took; on a CPU, how much the process grew from before the model was loaded, after it "
        "had trained a small one.\n\n"
        f"{chr(10).join(lines)}\n\n{device}, {facts['date']}, commit `{short_commit(str(facts['commit']))}`, n = 1 a "
        "row.\n\n"
        "## Published sizes, estimated only\n\nGB on one GPU in mixed precision, activations computed again / kept: "
        f"SigLIP-so400m, 32 frames, {TEXT_TOKENS} tokens of text, one sample in one pass.\n\n"
        f"{published_table(facts['published'])}\n\nMade by `python benchmarks/train_memory.py`.\n"
    )


def write(out: Path, facts: dict[str, Any]) -> None:
    """Write the results, and their page beside them."""
    out.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    out.with_suffix(".md").write_text(page(facts, facts["rows"]), "utf-8")


def main(
    cases: tuple[str, ...] = tuple(CASES),
    threads: int = 1,
    out: Path = ROOT / "docs" / "results" / "train-memory.json",
    measured: bool = True,
    case: str | None = None,
    folder: Path | None = None,
) -> None:
    """Estimate and measure.

    Args:
        cases: what is run.
        threads: of torch.
        out: JSON file of the results; a table goes beside it.
        measured: measure; otherwise only what is estimated for the published sizes is made anew.
        case: run this one alone and print its bytes, in a folder that is prepared.
        folder: that folder.
    """
    torch.set_num_threads(threads)
    if case is not None:
        assert folder is not None
        print(measure(case, folder))
        return
    if not measured:
        facts = json.loads(out.read_text("utf-8"))
        write(out, facts | {"published": published_rows()})
        return
    facts = {"date": time.strftime("%Y-%m-%d"), "commit": git_commit(), "hardware": hardware(), "steps": STEPS}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make_records(root, 4)
        make_model(root)
        processor = HIComProcessor.from_pretrained(root / "model")
        for each in cases:
            config = make_config(each, root)
            model_config = HIComConfig.from_pretrained(root / "model")
            size = sample_size(config, processor)
            found = training_memory(config, model_config, size, is_gpu=torch.cuda.is_available())
            row = {"case": each, **dataclasses.asdict(found), "estimate": found.total}
            rows.append(row | {"measured": measure_apart(each, root)})
            print(rows[-1], flush=True)
    write(out, facts | {"rows": rows, "published": published_rows()})


if __name__ == "__main__":
    tyro.cli(main)
