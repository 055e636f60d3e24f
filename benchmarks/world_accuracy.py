"""Accuracy on the sprite world's held-out clips, by question family: `python benchmarks/world_accuracy.py MODEL`.

Every question is answered greedily, with the model's own processor. Beside the accuracy stand the number of questions,
the 95 % Wilson interval, the same model with all vision features set to zero (text only), chance without the video, and
chance of one who names a random object of the clip (informed).

Several splits and files are measured one after the other: `--split test test_pairs --file tune choice wording`. The
first split and file are the main result, the others follow in the JSON file under `others`; text only is measured on
the first split.
"""

import argparse
import collections
import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch

from hicom.data.features import FeatureStore, cache_features
from hicom.data.records import Sample, read_records
from hicom.model.hub import find_model
from hicom.model.modeling import HIComForConditionalGeneration
from hicom.model.ops import Window
from hicom.model.processing import HIComProcessor
from hicom.provenance import git_commit, hardware

KEYS = ("accuracy", "chance", "informed_chance")
MAX_NEW_TOKENS = 16


def wilson(correct: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return the Wilson score interval of a share."""
    share, spread = correct / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return middle - half, middle + half


def read_questions(
    world: Path, split: str, file: str = "tune", *, num_clips: int | None = None, limit: int | None = None
) -> list[Sample]:
    """Return the scored questions of one file of a split.

    Args:
        world: folder of the data set.
        split: folder of the split.
        file: `tune` (open questions), `choice` or `wording`.
        num_clips: only those about the first so many clips.
        limit: only the first so many questions.

    Raises:
        ValueError: there are none.
    """
    clips: set[Path] = set()
    samples: list[Sample] = []
    for sample in read_records(world / split / f"{file}.jsonl", world):
        clips.update(sample.videos)
        if num_clips is not None and len(clips) > num_clips:
            break
        if sample.metadata["chance"] is not None:
            samples.append(sample)
    if not samples[:limit]:
        raise ValueError(f"{world / split / file}.jsonl holds no scored question about the first {num_clips} clips")
    return samples[:limit]


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
    # A store made for a model that an instruction steers has keys, which others must not see.
    names: tuple[Literal["values", "keys"], ...] = ("values", "keys") if model.config.is_conditional else ("values",)
    choice: dict[str, Any] = {} if window is None else {"window": window}
    for first in range(0, len(samples), batch_size):
        batch = samples[first : first + batch_size]
        videos = [video for sample in batch for video in sample.videos]
        conversations = [[dict(message) for message in sample.messages] for sample in batch]
        for message in (message for messages in conversations for message in messages):
            message["content"] = message["content"].replace("<video>", processor.video_token)
        inputs = processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
            add_generation_prompt=True,
            video_num_frames=store.counts(videos),
            **choice,
        )
        # Several questions about a clip share what does not depend on them.
        shown = list(dict.fromkeys(videos))
        features = {f"video_{name}": store.read(shown, name).float() for name in names}
        if blind:
            # Not exactly zero: the cosine of a zero vector has no direction.
            features = {name: torch.full_like(x, 1e-6) for name, x in features.items()}
        features["video_num_frames"] = torch.tensor(store.counts(shown))
        features["video_index"] = torch.tensor([shown.index(video) for video in videos])
        tensors = {name: x.to(model.device) if torch.is_tensor(x) else x for name, x in ({**inputs} | features).items()}
        output = model.generate(**tensors, **choice, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        tokens = output[:, inputs["input_ids"].shape[1] :]
        yield from (text.strip().lower() for text in processor.tokenizer.batch_decode(tokens, skip_special_tokens=True))


def is_right(sample: Sample, given: str) -> bool:
    """Whether an answer is the right one."""
    return given == sample.answer.strip().lower()


def chances(metadata: Mapping[str, Any]) -> tuple[float, float]:
    """Return the chance of a right answer without the video, and of one who knows the clip's objects."""
    informed = metadata.get("informed_chance")
    return metadata["chance"], metadata["chance"] if informed is None else informed


def counted(samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, Any]:
    """Return `clips`, `families` and `questions`, which `ablation_report.Hits` counts.

    A question is its clip, its family, whether the answer is right, and whether the question has a subject.
    """
    clips = {name: i for i, name in enumerate(dict.fromkeys(sample.videos[0].name for sample in samples))}
    families = {name: i for i, name in enumerate(dict.fromkeys(str(s.metadata["family"]) for s in samples))}
    questions = [
        [
            clips[sample.videos[0].name],
            families[str(sample.metadata["family"])],
            int(is_right(sample, given)),
            int("subject" in sample.metadata),
        ]
        for sample, given in zip(samples, answers, strict=True)
    ]
    return {"clips": list(clips), "families": list(families), "questions": questions}


def score(samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return what is known of every family that was asked, and the mean over these families."""
    right: dict[str, list[bool]] = collections.defaultdict(list)
    chance: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
    for sample, given in zip(samples, answers, strict=True):
        family = str(sample.metadata["family"])
        right[family].append(is_right(sample, given))
        chance[family].append(chances(sample.metadata))
    rows: dict[str, dict[str, Any]] = {}
    for family, hits in right.items():
        low, high = wilson(sum(hits), len(hits))
        uninformed, informed = zip(*chance[family], strict=True)
        rows[family] = {
            "n": len(hits),
            "accuracy": sum(hits) / len(hits),
            "interval": [low, high],
            "chance": sum(uninformed) / len(hits),
            "informed_chance": sum(informed) / len(hits),
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


def tables(results: dict[str, Any]) -> str:
    """Return the tables of the main result and of the others."""
    parts = [table(results)]
    parts += [f"{each['split']}, {each['file']}\n\n{table(each)}" for each in results.get("others", [])]
    return "\n\n".join(parts)


def evaluate(
    model: HIComForConditionalGeneration,
    processor: HIComProcessor,
    samples: Sequence[Sample],
    cache: Path,
    *,
    num_frames: int,
    window: Window | None = None,
    blind: bool = True,
) -> dict[str, Any]:
    """Answer questions; return `families` (of `score`) and `seconds_per_question`.

    Args:
        model: in evaluation mode.
        processor: the model's.
        samples: the questions.
        cache: folder of vision features.
        num_frames: frames of every clip.
        window: (T, H, W) in place of the model's.
        blind: also answer without seeing anything.
    """
    videos = [video for sample in samples for video in sample.videos]
    store = cache_features(model, processor, videos, cache, num_frames=num_frames)
    start = time.monotonic()
    families = score(samples, list(answer(model, processor, store, samples, window=window)))
    seconds = time.monotonic() - start
    if blind:
        unseen = score(samples, list(answer(model, processor, store, samples, window=window, blind=True)))
        for family, row in families.items():
            row["text_only"] = unseen[family]["accuracy"]
    return {"seconds_per_question": seconds / len(samples), "families": families}


def weights_of(folder: Path) -> str:
    """Return a short name for a model's weights: what is made from other ones belongs in another folder."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12]


def answers_of(
    folder: Path, world: Path, cache: Path, *, num_clips: int | None = None, window: Window | None = None
) -> dict[str, Any]:
    """Return a trained model's answers to the open questions of split `test`, and what they were made with.

    Args:
        folder: of the model.
        world: folder of the data set.
        cache: folder of vision features.
        num_clips: only questions about the first so many clips.
        window: (T, H, W) in place of the model's.

    Returns:
        `num_clips`, `visual_tokens`, `date`, `commit`, `hardware`, and what `counted` returns.
    """
    model = HIComForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    processor = HIComProcessor.from_pretrained(folder)
    samples = read_questions(world, "test", num_clips=num_clips)
    videos = [video for sample in samples for video in sample.videos]
    store = cache_features(model, processor, videos, cache, num_frames=processor.num_frames)
    given = list(answer(model, processor, store, samples, window=window))
    return {
        "num_clips": num_clips,
        "visual_tokens": processor.token_count(processor.num_frames, window),
        "date": time.strftime("%Y-%m-%d"),
        "commit": git_commit(),
        "hardware": hardware(),
        **counted(samples, given),
    }


def main() -> None:
    """Evaluate one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, or the name of an embedded model")
    parser.add_argument("--world", type=Path, default=Path("runs/world"))
    parser.add_argument("--split", nargs="+", default=["test"], help="test, test_pairs, test_scenes, test_long")
    parser.add_argument("--file", nargs="+", default=["tune"], help="tune (open questions), choice, wording")
    parser.add_argument("--cache", type=Path, default=Path("runs/features"))
    parser.add_argument("--num-frames", type=int, default=None, help="default: the processor's")
    parser.add_argument("--window", type=int, nargs=3, default=None, help="T H W; default: the model's")
    parser.add_argument("--num-clips", type=int, default=None, help="only the first so many clips of every split")
    parser.add_argument("--limit", type=int, default=None, help="only the first so many questions")
    parser.add_argument("--no-blind", action="store_true", help="leave the text-only baseline out")
    parser.add_argument("--out", type=Path, default=None, help="JSON file; its table goes beside it as .md")
    args = parser.parse_args()

    try:
        folder = find_model(args.model)
    except ValueError as error:
        parser.error(str(error))
    model = HIComForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    processor = HIComProcessor.from_pretrained(folder)
    num_frames = args.num_frames or processor.num_frames
    window = None if args.window is None else tuple(args.window)
    measured = []
    for split, file in product(args.split, args.file):
        samples = read_questions(args.world, split, file, num_clips=args.num_clips, limit=args.limit)
        # Words say as little in one split as in another: text only is asked about the first one.
        blind = not args.no_blind and split == args.split[0]
        found = evaluate(model, processor, samples, args.cache, num_frames=num_frames, window=window, blind=blind)
        measured.append({"split": split, "file": file, **found})
    first, *others = measured
    grid = processor.grid_size
    results = {
        "model": args.model,
        "split": first["split"],
        "file": first["file"],
        "num_frames": num_frames,
        "window": window or processor.window,
        "visual_tokens": processor.token_count(num_frames, window),
        "uncompressed_tokens": num_frames * grid * grid,
        "seconds_per_question": first["seconds_per_question"],
        "date": time.strftime("%Y-%m-%d"),
        "commit": git_commit(),
        "hardware": hardware(),
        "families": first["families"],
        "others": others,
    }
    print(tables(results))
    print(f"{results['visual_tokens']} visual tokens of {results['uncompressed_tokens']}")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        args.out.with_suffix(".md").write_text(tables(results) + "\n", "utf-8")


if __name__ == "__main__":
    main()
