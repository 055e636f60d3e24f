"""The published sizes on a GPU: `python benchmarks/gpu.py` measures, checks the paper's times and prints one table.

SigLIP-so400m and Qwen2.5-7B with random weights in bfloat16. Ours at 32, 64 and 128 frames against LLaVA-Video pooling
at 32: time to the first token (paper: 137.7 ms against 567.1 ms), instruction encoder and compressor (paper: 23.9 ms).
"""

from __future__ import annotations

import sys
from pathlib import Path

import tyro

ROOT = Path(__file__).parents[1]
PAPER_S = {"hicom": 0.1377, "llava_video": 0.5671}
"""Time to the first token at 32 frames (the paper's table of efficiency)."""
TARGET_S = 0.005
"""Instruction encoder and compressor, at 32 frames."""


def main(repeats: int = 10, out: Path = ROOT / "docs" / "results") -> None:
    """Measure the published size on a GPU.

    Args:
        repeats: times that count.
        out: folder for dated JSON and Markdown.
    """
    import torch

    if not torch.cuda.is_available():
        print("benchmarks/gpu.py: no CUDA device; nothing was measured", file=sys.stderr)
        sys.exit(2)
    from hicom.bench.command import Settings, run_bench
    from hicom.bench.report import document, markdown, write
    from hicom.provenance import git_commit, hardware

    settings = Settings(
        shape="7b",
        num_frames=(32, 64, 128),
        columns=("hicom", "plain", "llava_video"),
        repeats=repeats,
        device="cuda",
        dtype="bfloat16",
        max_s=60.0,
    )
    facts = run_bench(settings, lambda text: print(text, file=sys.stderr))
    facts |= {
        "command": f"python benchmarks/gpu.py --repeats {repeats}",
        "commit": git_commit(),
        "hardware": facts["hardware"] | hardware(),
    }
    print(document(facts))
    rows = []
    for row in facts["rows"]:
        parts = row["parts"]
        steering_s = sum(parts[name]["seconds"] for name in ("instruction encoder", "compressor") if name in parts)
        paper_s = PAPER_S.get(row["column"]) if row["num_frames"] == 32 else None
        line = [row["column"], str(row["num_frames"]), f"{row['num_visual_tokens']:,}"]
        line += [f"{1e3 * row['first_token_s']:.1f}", "" if paper_s is None else f"{1e3 * paper_s:.1f}"]
        is_met = "" if row["column"] != "hicom" or row["num_frames"] != 32 else str(steering_s <= TARGET_S)
        rows.append([*line, f"{1e3 * steering_s:.2f}", is_met])
    head = [
        "column",
        "frames",
        "visual tokens",
        "first token ms",
        "paper ms",
        "instruction + compressor ms",
        "at most 5 ms",
    ]
    print(markdown(head, rows))
    print(f"written: {write(facts, out)}", file=sys.stderr)


if __name__ == "__main__":
    tyro.cli(main)
