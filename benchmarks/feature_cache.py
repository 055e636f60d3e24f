"""How much faster is stage 2 from kept features than from pixels? `python benchmarks/feature_cache.py`.

Trains the same run twice, by the Trainer of `hicom.train`: with the frozen vision tower in every step, and from
kept features. Steps are timed from one end to the next, decoding and collation included.
Two models: that of `hicom-tiny` with its trained towers, and one with towers of the size of SigLIP-base (224 pixels)
and a language model of the size of Qwen2.5-0.5B, both of random weights. Writes `docs/results/feature-cache.json` and
`.md`.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import tyro
from transformers import SiglipConfig, SiglipModel, TrainerCallback

from hicom.bench.run import make_film
from hicom.model.hub import find_model
from hicom.model.processing import HIComProcessor
from hicom.provenance import git_commit, hardware, short_commit
from hicom.recipes.stages import pretrain
from hicom.recipes.tiny import tiny_parts
from hicom.train import DataConfig, Parts, TrainConfig
from hicom.train.data import make_data
from hicom.train.run import load
from hicom.train.trainer import make_trainer

ROOT = Path(__file__).parents[1]
NUM_FRAMES, FPS, DURATION_S = 8, 25, 10
SIGLIP_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
QWEN_HALF = {"hidden_size": 896, "intermediate_size": 4864, "num_layers": 24, "num_heads": 14}
MODELS = {
    "hicom-tiny": "hicom-tiny: its own towers (64 pixels) and language model",
    "base": "towers like SigLIP-base (224 pixels), language model like Qwen2.5-0.5B; random weights",
}


def make_parts(name: str, folder: Path) -> Parts:
    """Return what a model of this name is put together of; random towers are written to `folder`."""
    start = "hicom-tiny-start"
    if name == "hicom-tiny":
        return dataclasses.replace(tiny_parts(), towers=start, language_model=start)
    tokenizer = HIComProcessor.from_pretrained(find_model(start)).instruction_tokenizer
    text = SIGLIP_BASE | {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "projection_size": 768}
    config = SiglipConfig(vision_config=SIGLIP_BASE | {"image_size": 224, "patch_size": 16}, text_config=text)
    torch.manual_seed(0)
    SiglipModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Parts(towers=str(folder), window=(4, 3, 3), num_global_tokens=32, num_frames=NUM_FRAMES, **QWEN_HALF)


def make_records(folder: Path, number: int) -> Path:
    """Write films and a question about each."""
    lines = []
    film = make_film(folder / "0.mp4", FPS * DURATION_S)
    for i in range(number):
        if i:
            shutil.copy(film, folder / f"{i}.mp4")
        turns = [
            {"from": "human", "value": "<video>\nWhat happens in the video?"},
            {"from": "gpt", "value": "A gradient of many colours moves over the picture from the right to the left."},
        ]
        lines.append(json.dumps({"id": i, "video": f"{i}.mp4", "conversations": turns}))
    path = folder / "records.jsonl"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


class StepClock(TrainerCallback):
    """Takes the time at the end of every step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Take the time."""
        self.ends.append(time.perf_counter())

    def times(self) -> list[float]:
        """Return how long every step took, the first left out."""
        return [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]


def measure(config: TrainConfig, num_videos: int) -> dict[str, Any]:
    """Train a few steps, and return how long they took, and how long the features before them."""
    model, processor = load(config)
    model.config.text_config.use_cache = False
    start = time.perf_counter()
    make_data(config, model, processor)
    features_s = time.perf_counter() - start
    clock, out = StepClock(), Path(config.out)
    out.mkdir()
    trainer = make_trainer(config, model, processor, out, {"wall_s": 0.0})
    trainer.add_callback(clock)
    trainer.train()
    found: dict[str, Any] = {"times_s": clock.times(), "step_s": statistics.median(clock.times())}
    return found | ({} if config.data.cache is None else {"features_s_per_video": features_s / num_videos})


def page(facts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    lines = [
        "| model | batch | step from pixels | from kept features | faster | features of a video, once | n |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        pixels, kept = row["pixels"], row["kept"]
        faster = pixels["step_s"] / kept["step_s"]
        lines.append(
            f"| {MODELS[row['model']]} | {row['batch']} | {pixels['step_s']:.2f} s | {kept['step_s']:.2f} s | "
            f"{faster:.1f}x | {kept['features_s_per_video']:.2f} s | {len(kept['times_s'])} |"
        )
    machine = facts["hardware"]
    return (
        "# Training from kept features\n\nStage `pretrain` (only the compressor learns) "
        f"on films of {DURATION_S} seconds and 640 x 360 pixels, {NUM_FRAMES} frames each: median time of a step, "
        "decoding and collation included: with the vision tower in every step, and from its features on disk.\n\n"
        f"{chr(10).join(lines)}\n\n{machine['machine']}, {machine['cpus']} CPUs shared with other work, "
        f"{facts['threads']} thread, float32, {facts['date']}, commit `{short_commit(str(facts['commit']))}`. "
        "Made by `python benchmarks/feature_cache.py`.\n"
    )


def main(
    models: tuple[str, ...] = ("hicom-tiny", "base"),
    steps: int = 9,
    threads: int = 1,
    out: Path = ROOT / "docs" / "results" / "feature-cache.json",
) -> None:
    """Measure steps from pixels and from kept features.

    Args:
        models: `hicom-tiny`, `base`.
        steps: of every run; the first is not counted. The larger model takes half as many.
        threads: of torch.
        out: JSON file of the results; a table goes beside it.
    """
    torch.set_num_threads(threads)
    facts = {"date": time.strftime("%Y-%m-%d"), "commit": git_commit(), "hardware": hardware(), "threads": threads}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_videos = 8
        records = make_records(folder, num_videos)
        for model in models:
            batch, number = (8, steps) if model == "hicom-tiny" else (1, max(3, steps // 2))
            config = TrainConfig(
                name="pretrain",
                out="",
                parts=make_parts(model, folder / "towers"),
                data=DataConfig(records=(str(records),), num_frames=NUM_FRAMES),
                stage=pretrain(),
                steps=number,
                batch_size=batch,
                save_every=10**6,
            )
            row: dict[str, Any] = {"model": model, "batch": batch}
            for kind, cache in (("pixels", None), ("kept", str(folder / f"{model}-cache"))):
                data = dataclasses.replace(config.data, cache=cache)
                run = dataclasses.replace(config, data=data, out=str(folder / f"{model}-{kind}"))
                row[kind] = measure(run, num_videos)
                print(model, kind, row[kind], flush=True)
            rows.append(row)
    out.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n", "utf-8")
    out.with_suffix(".md").write_text(page(facts, rows), "utf-8")


if __name__ == "__main__":
    tyro.cli(main)
