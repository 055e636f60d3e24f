"""Accuracy on the sprite world's held-out clips, by question family: `python benchmarks/world_accuracy.py MODEL`.

Every question is answered greedily, with the model's own processor. Beside the accuracy stand the number of questions,
the 95 % Wilson interval, the same model with all vision features set to zero (text only), chance without the video, and
chance of one who names a random object of the clip (informed).
"""

import argparse
import collections
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from hicom.data.features import FeatureStore, cache_features
from hicom.data.records import Sample, read_records
from hicom.model.modeling import HIComForConditionalGeneration
from hicom.model.ops import Window
from hicom.model.processing import HIComProcessor
from hicom.train.run import git_commit, hardware

KEYS = ("accuracy", "chance", "informed_chance")


def wilson(correct: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return the Wilson score interval of a share."""
    share, spread = correct / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return middle - half, middle + half


@torch.inference_mode()
def answer(
    model: HIComForConditionalGeneration,
    processor: HIComProcessor,
    store: FeatureStore,
    samples: Sequence[Sample],
    *,
    window: Window | None = None,
    blind: bool = False,
    batch_size: int = 100,
) -> Iterator[str]:
    """Yield the greedy answer of every sample; `blind` sets the vision features to zero."""
    for first in range(0, len(samples), batch_size):
        batch = samples[first : first + batch_size]
        videos = [video for sample in batch for video in sample.videos]
        conversations = [[dict(message) for message in sample.messages] for sample in batch]
        for message in (message for messages in conversations for message in messages):
            message["content"] = message["content"].replace("<video>", processor.video_token)
        inputs = processor.apply_chat_template(
            conversations,
            tokenize=True,
            add_generation_prompt=True,
            video_num_frames=store.counts(videos),
            window=window,
        )
        features = {f"video_{name}": store.read(videos, name).float() for name in ("values", "keys")}
        if blind:
            # Not exactly zero: the cosine of a zero vector has no direction.
            features = {name: torch.full_like(x, 1e-6) for name, x in features.items()}
        output = model.generate(
            **inputs,
            **features,
            max_new_tokens=12,
            do_sample=False,
            **({} if window is None else {"window": window}),
        )
        tokens = output[:, inputs["input_ids"].shape[1] :]
        yield from (text.strip().lower() for text in processor.tokenizer.batch_decode(tokens, skip_special_tokens=True))


def score(samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return what is known of every family, and the mean over families."""
    right: dict[str, list[bool]] = collections.defaultdict(list)
    chance: dict[str, list[float]] = collections.defaultdict(list)
    informed: dict[str, list[float]] = collections.defaultdict(list)
    for sample, given in zip(samples, answers, strict=True):
        family = str(sample.metadata["family"])
        right[family].append(given == sample.answer.strip().lower())
        chance[family].append(sample.metadata["chance"])
        informed[family].append(sample.metadata.get("informed_chance", sample.metadata["chance"]))
    rows: dict[str, dict[str, Any]] = {}
    for family, hits in right.items():
        low, high = wilson(sum(hits), len(hits))
        rows[family] = {
            "n": len(hits),
            "accuracy": sum(hits) / len(hits),
            "interval": [low, high],
            "chance": sum(chance[family]) / len(hits),
            "informed_chance": sum(informed[family]) / len(hits),
        }
    mean = {key: sum(row[key] for row in rows.values()) / len(rows) for key in KEYS}
    return {**rows, "mean": {"n": len(samples), **mean}}


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| family | n | accuracy | 95 % interval | text only | chance | informed |",
        "|---|---|---|---|---|---|---|",
    ]
    for family, row in results["families"].items():
        interval = "{:.3f} to {:.3f}".format(*row["interval"]) if "interval" in row else ""
        blind = f"{row['text_only']:.3f}" if "text_only" in row else ""
        chance = f"{row['chance']:.3f} | {row['informed_chance']:.3f}"
        lines.append(f"| {family} | {row['n']} | {row['accuracy']:.3f} | {interval} | {blind} | {chance} |")
    return "\n".join(lines)


def main() -> None:
    """Evaluate one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--world", type=Path, default=Path("runs/world"))
    parser.add_argument("--split", default="test")
    parser.add_argument("--cache", type=Path, default=Path("runs/features"))
    parser.add_argument("--num-frames", type=int, default=None, help="default: the processor's")
    parser.add_argument("--window", type=int, nargs=3, default=None, help="T H W; default: the model's")
    parser.add_argument("--limit", type=int, default=None, help="only the first so many questions")
    parser.add_argument("--no-blind", action="store_true", help="leave the text-only baseline out")
    parser.add_argument("--out", type=Path, default=None, help="JSON file; its table goes beside it as .md")
    args = parser.parse_args()

    model = HIComForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).eval()
    processor = HIComProcessor.from_pretrained(args.model)
    samples = read_records(args.world / args.split / "tune.jsonl", args.world)[: args.limit]
    num_frames = args.num_frames or processor.num_frames
    videos = [video for sample in samples for video in sample.videos]
    store = cache_features(model, processor, videos, args.cache, num_frames=num_frames)
    window = None if args.window is None else tuple(args.window)
    start = time.monotonic()
    families = score(samples, list(answer(model, processor, store, samples, window=window)))
    seconds = time.monotonic() - start
    if not args.no_blind:
        blind = score(samples, list(answer(model, processor, store, samples, window=window, blind=True)))
        for family, row in families.items():
            row["text_only"] = blind[family]["accuracy"]
    grid = processor.grid_size
    results = {
        "model": str(args.model),
        "split": args.split,
        "num_frames": num_frames,
        "window": window or processor.window,
        "visual_tokens": processor.token_count(num_frames, window),
        "uncompressed_tokens": num_frames * grid * grid,
        "seconds_per_question": seconds / len(samples),
        "date": time.strftime("%Y-%m-%d"),
        "commit": git_commit(),
        "hardware": hardware(),
        "families": families,
    }
    print(table(results))
    print(f"{results['visual_tokens']} visual tokens of {results['uncompressed_tokens']}")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        args.out.with_suffix(".md").write_text(table(results) + "\n", "utf-8")


if __name__ == "__main__":
    main()
