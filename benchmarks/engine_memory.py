"""Which engine does a model need? `python benchmarks/engine_memory.py`.

Counts the parameters of published sizes and what the stages train of them, and computes what weights, gradients and
AdamW's states take on every device. Nothing is measured. Writes `docs/results/engine-memory.md`.
"""

from __future__ import annotations

from pathlib import Path

import torch
import tyro

from hicom.bench.shapes import QWEN, published_config
from hicom.model.modeling import HIComForConditionalGeneration
from hicom.recipes.stages import pretrain, tune
from hicom.train.config import Engine
from hicom.train.engines import state_bytes
from hicom.train.stages import resolve

ROOT = Path(__file__).parents[1]
STAGES = {"pretrain": pretrain(), "tune": tune()}
COLUMNS: tuple[tuple[Engine, int], ...] = (("ddp", 1), ("zero2", 8), ("fsdp2", 8), ("zero3", 8), ("fsdp2", 32))
GIB = 2**30


def count(shape: str, stage: str) -> tuple[int, int]:
    """Return the parameters of a model of a published size, and those that a stage trains."""
    with torch.device("meta"):
        model = HIComForConditionalGeneration(published_config(shape))
    resolve(model, STAGES[stage].trainable)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)


def main(out: Path = ROOT / "docs" / "results" / "engine-memory.md") -> None:
    """Write the table.

    Args:
        out: Markdown file.
    """
    names = [f"`{engine}`, {number} GPU{'s' * (number > 1)}" for engine, number in COLUMNS]
    lines = [
        f"| language model | stage | parameters | trained | {' | '.join(names)} |",
        f"|---|---|{'---:|' * (2 + len(names))}",
    ]
    for shape in QWEN:
        for stage in STAGES:
            parameters, trained = count(shape, stage)
            cells = [state_bytes(engine, parameters, trained, n, bf16=True) / GIB for engine, n in COLUMNS]
            numbers = f"{parameters / 1e9:.2f} G | {trained / 1e9:.2f} G"
            lines.append(
                f"| Qwen2.5-{shape.upper()} | `{stage}` | {numbers} | {' | '.join(f'{x:.1f}' for x in cells)} |"
            )
    out.write_text(
        "# Memory of weights, gradients and optimizer\n\nGiB on every GPU in mixed precision (`--bf16`), computed from "
        "the sizes of SigLIP-so400m and Qwen2.5; activations come on top, and a layer that is being gathered. "
        "The output matrix counts beside the embedding, though the smaller two share it.\n\n"
        + "\n".join(lines)
        + "\n\nMade by `python benchmarks/engine_memory.py`.\n",
        "utf-8",
    )


if __name__ == "__main__":
    tyro.cli(main)
