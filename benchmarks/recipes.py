"""What the published recipes come to, counted and not measured: `python benchmarks/recipes.py`.

Writes `docs/results/recipes.json` and `.md`: steps, samples, trainable parameters and hours of computing by stage, and
what the compressor consists of beside the 63M that the paper reports.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from hicom.bench.shapes import published_config
from hicom.model.memory import empty_model
from hicom.provenance import git_commit, short_commit
from hicom.recipes.published import (
    FRAMES,
    GPU_FLOPS_PER_S,
    NUM_GPUS,
    SAMPLES,
    SIZES,
    STAGES,
    TEXT_TOKENS,
    UTILISATION,
    hours,
    paper_stage,
    sample_cost,
)
from hicom.tables import markdown
from hicom.train.stages import resolve

ROOT = Path(__file__).parents[1]


def stage_facts(size: Any, stage: Any) -> dict[str, Any]:
    """Return what one stage of one size comes to."""
    model, config = empty_model(published_config(size)), paper_stage(size, stage)
    rules = resolve(model, config.stage.trainable)
    return {
        "size": size,
        "stage": stage,
        "samples": SAMPLES[stage],
        "global_batch_size": config.global_batch_size,
        "steps": config.count_steps(SAMPLES[stage], NUM_GPUS),
        "num_frames": FRAMES[stage],
        "num_visual_tokens": model.model.token_count(FRAMES[stage]),
        "trainable": sum(rule.summary()["parameters"] for rule in rules if rule.rate > 0),  # type: ignore[misc]
        "rates": sorted({rule.rate for rule in rules if rule.rate > 0}),
        "flops_per_sample": sample_cost(size, stage).flops,
        "hours": hours(size, (stage,)),
    }


def compressor_parts(size: Any) -> dict[str, int]:
    """Return the parameters of the compressor by part."""
    parts: Counter[str] = Counter()
    for name, parameter in empty_model(published_config(size)).model.compressor.named_parameters():
        branch, part = name.split(".")[:2]
        parts[f"{branch.rstrip('_')} {part}"] += parameter.numel()
    return dict(parts)


def report(facts: dict[str, Any]) -> str:
    """Return the tables in Markdown."""
    rows = [
        [
            f"{row['size'].upper()} `{row['stage']}`",
            f"{row['samples']:,}",
            f"{row['steps']:,} x {row['global_batch_size']}",
            str(row["num_frames"]),
            str(row["num_visual_tokens"]),
            f"{row['trainable'] / 1e6:,.1f}M",
            " and ".join(f"{rate:.0e}" for rate in row["rates"]),
            f"{row['flops_per_sample'] / 1e12:.1f}",
            f"{row['hours']:.1f}",
        ]
        for row in facts["stages"]
    ]
    head = ["stage", "samples", "steps", "frames", "visual tokens", "trained", "rates", "TFLOP a sample", "hours"]
    names = list(facts["compressor"]["7b"])
    counts = [
        [size.upper(), *(f"{parts[name] / 1e6:.2f}M" for name in names), f"{sum(parts.values()) / 1e6:.1f}M"]
        for size, parts in facts["compressor"].items()
    ]
    commit, peak = short_commit(facts["commit"]), GPU_FLOPS_PER_S / 1e12
    return f"""# The published recipes, counted

Made by `python benchmarks/recipes.py`, commit {commit}. Counted from sizes, not measured. Hours: matrix products of
forward and backward passes (with gradient checkpointing, {TEXT_TOKENS} tokens of text a sample) on {NUM_GPUS} GPUs at
{UTILISATION:.0%} of {peak:.0f} TFLOP/s, an A800's peak in bfloat16. Decoding is not in it: the paper's ablations of the
0.5B model (558K + 248K + 896K samples) took under 28 hours on 8 A800.

{markdown(head, rows)}

## The compressor

The paper reports 63M for 7B (Table A1) and does not say of what.

{markdown(["size", *names, "all"], counts)}
"""


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "recipes.json")
    args = parser.parse_args()
    facts = {
        "commit": git_commit(),
        "stages": [stage_facts(size, stage) for size in SIZES for stage in STAGES],
        "compressor": {size: compressor_parts(size) for size in SIZES},
    }
    args.out.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    args.out.with_suffix(".md").write_text(report(facts), "utf-8")


if __name__ == "__main__":
    main()
