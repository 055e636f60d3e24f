"""How fast does a published size train? `python benchmarks/train_speed.py --shape 0.5b` on a GPU.

Trains a few steps of stage `tune` by the Trainer of `hicom.train` on a model of random weights, frames as pixels and
from kept features, and reports samples and tokens a second, the share of the device's matmul rate (MFU: operations of
one forward and backward pass, none of those that are computed again, over what a large matrix product reaches here),
and the largest memory. `--shape hicom-tiny` runs anywhere. Writes a dated JSON file and a table.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from feature_cache import StepClock, make_records

from hicom.bench.floor import (
    Cost,
    compressor_cost,
    instruction_cost,
    linear_cost,
    measure_machine,
    prefill_cost,
    vision_cost,
)
from hicom.bench.shapes import QWEN, published_config
from hicom.model.config import HIComConfig
from hicom.model.hub import find_model
from hicom.model.modeling import HIComForConditionalGeneration
from hicom.model.processing import HIComProcessor
from hicom.provenance import git_commit, hardware, short_commit
from hicom.recipes.stages import tune
from hicom.tables import markdown
from hicom.train import DataConfig, TrainConfig
from hicom.train.data import make_data
from hicom.train.trainer import make_trainer

ROOT = Path(__file__).parents[1]
NUM_VIDEOS = 8


def sample_cost(config: HIComConfig, num_frames: int, num_tokens: int, num_answer: int, *, cached: bool) -> Cost:
    """Return the operations of one sample: frozen towers forward, the rest forward and twice that backward."""
    cost = instruction_cost(config, 2) + compressor_cost(config, "hicom", num_frames, 2) * 3
    # The output matrix is counted for the last place by the prompt, and for the rest of the answer here.
    head = linear_cost(num_answer, config.text_config.hidden_size, config.text_config.vocab_size, 2)
    cost += (prefill_cost(config, num_tokens, 2) + head) * 3
    return cost if cached else cost + vision_cost(config, num_frames, 2, has_keys=True)


def build(shape: str, num_frames: int) -> tuple[HIComForConditionalGeneration, HIComProcessor]:
    """Return a model of a published size with random weights, or the embedded one, and a processor for it."""
    folder = find_model("hicom-tiny")
    own = HIComProcessor.from_pretrained(folder)
    if shape not in QWEN:
        return HIComForConditionalGeneration.from_pretrained(folder), own
    config = published_config(shape)
    # Its words are few: all of them are words of the larger vocabularies, too, and which they are does not matter.
    config.video_token_id, config.image_token_id = own.video_token_id, own.image_token_id
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = HIComForConditionalGeneration(config)
    tokenizers = own.tokenizer, own.instruction_tokenizer
    tokens = {"video_token": own.video_token, "image_token": own.image_token, "chat_template": own.chat_template}
    return model, HIComProcessor.from_config(config, *tokenizers, num_frames=num_frames, **tokens)


def measure(config: TrainConfig, shape: str, num_frames: int, flops_per_s: float) -> dict[str, Any]:
    """Train a few steps, and return how fast they were."""
    model, processor = build(shape, num_frames)
    model.config.text_config.use_cache = False
    samples, collator = make_data(config, model, processor)
    batch = collator([samples[0]])
    num_tokens = batch["input_ids"].shape[1]
    num_answer = int((batch["labels"] != -100).sum())
    out = Path(config.out)
    out.mkdir()
    trainer = make_trainer(config, model, processor, out, {"wall_s": 0.0})
    clock = StepClock()
    trainer.add_callback(clock)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    step_s = statistics.median(clock.times())
    cost = sample_cost(model.config, num_frames, num_tokens, num_answer, cached=config.data.cache is not None)
    return {
        "step_s": step_s,
        "times_s": clock.times(),
        "samples_per_s": config.batch_size / step_s,
        "tokens_per_s": config.batch_size * num_tokens / step_s,
        "tokens_per_sample": num_tokens,
        "flops_per_sample": cost.flops,
        "mfu": cost.flops * config.batch_size / step_s / flops_per_s,
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }


def page(facts: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    rows = [
        [
            row["kind"],
            f"{row['step_s']:.3f}",
            f"{row['samples_per_s']:.1f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['mfu']:.0%}",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.1f}",
            str(len(row["times_s"])),
        ]
        for row in facts["rows"]
    ]
    head = ["frames", "step, s", "samples a second", "LLM tokens a second", "MFU", "memory, GB", "n"]
    machine = facts["hardware"]
    device = ", ".join(machine["gpus"]) or f"{machine['machine']}, CPU"
    precision = "bfloat16 mixed precision" if facts["bf16"] else "float32"
    return (
        f"# Training speed, {facts['shape']}\n\nStage `tune`, {facts['batch_size']} samples of {facts['num_frames']} "
        f"frames in one pass, {precision}; median step, decoding and collation included. MFU is a share of the "
        f"device's matmul rate, {facts['flops_per_s'] / 1e12:.2f} TFLOP/s.\n\n"
        f"{markdown(head, rows)}\n\n{device}, {facts['date']}, commit `{short_commit(str(facts['commit']))}`. Made by "
        f"`python benchmarks/train_speed.py --shape {facts['shape']}`.\n"
    )


def main(
    shape: Literal["hicom-tiny", "0.5b", "1.5b", "7b"] = "0.5b",
    num_frames: int | None = None,
    batch_size: int = 8,
    steps: int = 12,
    gradient_checkpointing: bool = False,
    workers: int = 8,
    out: Path = ROOT / "docs" / "results",
) -> None:
    """Measure training steps from pixels and from kept features.

    Args:
        shape: of the model.
        num_frames: of a video; by default 32, or 8 for hicom-tiny.
        batch_size: samples of a step.
        steps: of every run; the first is not counted.
        gradient_checkpointing: compute activations again.
        workers: processes that decode.
        out: folder for the dated results.
    """
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu else "cpu")
    frames = num_frames or (8 if shape == "hicom-tiny" else 32)
    machine = measure_machine(device, torch.bfloat16 if has_gpu else torch.float32)
    facts: dict[str, Any] = {
        "shape": shape,
        "num_frames": frames,
        "batch_size": batch_size,
        "gradient_checkpointing": gradient_checkpointing,
        "bf16": has_gpu,
        "flops_per_s": machine.flops_per_s,
        "date": time.strftime("%Y-%m-%d"),
        "commit": git_commit(),
        "hardware": hardware(),
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = TrainConfig(
            name="tune",
            out="",
            init="hicom-tiny",
            data=DataConfig(records=(str(make_records(folder, NUM_VIDEOS)),), num_frames=frames),
            stage=tune(),
            steps=steps,
            batch_size=batch_size,
            save_every=10**6,
            bf16=has_gpu,
            workers=workers if has_gpu else 0,
            gradient_checkpointing=gradient_checkpointing,
        )
        for kind, cache in (("from pixels", None), ("kept features", str(folder / "cache"))):
            data = dataclasses.replace(config.data, cache=cache)
            run = dataclasses.replace(config, data=data, out=str(folder / kind.replace(" ", "-")))
            facts["rows"].append({"kind": kind, **measure(run, shape, frames, machine.flops_per_s)})
            print(facts["rows"][-1], flush=True)
    path = out / f"train-speed-{shape}-{facts['date']}.json"
    path.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    path.with_suffix(".md").write_text(page(facts), "utf-8")
    print(path.with_suffix(".md").read_text("utf-8"))


if __name__ == "__main__":
    tyro.cli(main)
