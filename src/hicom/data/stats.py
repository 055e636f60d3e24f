"""What training data is: counts, durations, and how long its samples become for a model."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..model.ops import Window
from ..model.processing import HIComProcessor
from ..video import VideoError, VideoInfo, open_frames, probe, split_bounds
from .collate import Collator
from .mixture import Selection
from .records import Sample

QUANTILES = {"min": 0.0, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "max": 1.0}
PARTS = ("text tokens", "visual tokens", "all tokens", "answer tokens")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return number, sum, mean and quantiles of values; of none, only the number."""
    if not values:
        return {"number": 0}
    array = np.asarray(values, dtype=np.float64)
    found = {"number": len(values), "sum": float(array.sum()), "mean": float(array.mean())}
    return found | {name: float(np.quantile(array, q)) for name, q in QUANTILES.items()}


def data_stats(
    sources: Sequence[Selection],
    processor: HIComProcessor,
    *,
    num_frames: int | None = None,
    window: Window | None = None,
    num_samples: int | None = None,
    seed: int = 0,
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Count samples, seconds and tokens.

    Args:
        sources: of `read_sources`.
        processor: of the model that the tokens are for.
        num_frames: frames of a video, spread evenly; None: those of the processor. A shorter video has its own.
        window: (T, H, W) in place of the model's.
        num_samples: samples that are drawn, and looked at with their videos; None: all.
        seed: of what is drawn.

    Returns:
        Counts and distributions, and the values that they are of (`seconds`, and tokens by `PARTS`).
    """
    places = [(source, index) for source in sources for index in range(len(source))]
    if num_samples is not None and num_samples < len(places):
        chosen = np.random.default_rng(seed).choice(len(places), num_samples, replace=False)
        places = [places[i] for i in sorted(chosen.tolist())]
    groups = dict.fromkeys((source.records, source.records.groups[source.indices[index]]) for source, index in places)
    videos = list(dict.fromkeys(video for records, group in groups for video in records.first_of_group(group).videos))
    infos = probe_all(videos)
    values: dict[str, list[float]] = {"seconds": [info.duration_s for info in infos.values() if info is not None]}
    values |= {part: [] for part in PARTS}
    limit = processor.num_frames if num_frames is None else num_frames
    collator = Collator(processor=processor)
    media: Counter[str] = Counter()
    for source, index in tqdm(places, unit="sample", desc="counting tokens", delay=2):
        sample = source[index]
        media[media_of(sample)] += 1
        counts = sample_tokens(sample, collator, infos, limit, window)
        for part, count in counts.items():
            values[part].append(count)
    facts = {
        "sources": [
            {
                "name": source.records.name,
                "records": len({source.records.numbers[i] for i in source.indices}),
                "samples": len(source),
                "bad records": len(source.records.errors),
            }
            for source in sources
        ],
        "samples looked at": len(places),
        "media": dict(media),
        "videos": len(videos),
        "videos that cannot be read": sum(info is None for info in infos.values()),
        "frames": limit,
        "window": window or processor.window,
        **{name: spread(some) for name, some in values.items()},
    }
    return facts, values


def media_of(sample: Sample) -> str:
    """Return what a sample shows, in words."""
    parts = []
    for name, files in (("video", sample.videos), ("image", sample.images)):
        if files:
            parts.append(name if len(files) == 1 else f"several {name}s")
    return " and ".join(parts) or "text alone"


def probe_all(videos: Sequence[Path]) -> dict[Path, VideoInfo | None]:
    """Return what every video is; None where it cannot be read."""

    def look(video: Path) -> VideoInfo | None:
        try:
            info = probe(video)
            bounds = split_bounds(video)[1]
            if not bounds:
                return info
            # Of a part its own frames and seconds count.
            duration_s = min(bounds.get("end_s", info.duration_s), info.duration_s) - bounds.get("start_s", 0.0)
            return replace(info, num_frames=len(open_frames(video).timestamps_s), duration_s=duration_s)
        except (VideoError, OSError):
            return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(look, videos)
        return dict(zip(videos, tqdm(found, total=len(videos), unit="video", desc="durations", delay=2), strict=True))


def sample_tokens(
    sample: Sample,
    collator: Collator,
    infos: Mapping[Path, VideoInfo | None],
    num_frames: int,
    window: Window | None,
) -> dict[str, int]:
    """Return the tokens of a sample by `PARTS`, as the processor would make them; none where a video cannot be read."""
    processor = collator.processor
    found = [infos[video] for video in sample.videos]
    if None in found:
        return {}
    is_filled = processor.short_videos == "repeat"
    lengths = [num_frames if is_filled else min(num_frames, info.num_frames) for info in found if info is not None]
    visual = sum(processor.token_count(length, window) for length in (*lengths, *[1] * len(sample.images)))
    conversation = collator.conversation(sample)
    whole, prompt = (
        len(
            processor.tokenizer(
                processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_prompt),
                add_special_tokens=False,
            )["input_ids"]
        )
        - len(sample.videos)
        - len(sample.images)
        for messages, is_prompt in ((conversation, False), (conversation[:-1], True))
    )
    return {
        "text tokens": whole,
        "visual tokens": visual,
        "all tokens": whole + visual,
        "answer tokens": whole - prompt,
    }


def save_histograms(values: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draw how seconds of videos and tokens of samples are distributed.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the file's suffix is no picture format that matplotlib knows.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("a picture needs matplotlib: pip install 'hicom[data]'") from None
    shown = {name: some for name, some in values.items() if len(some)}
    figure = Figure((6.4, 2.2 * max(1, len(shown))), layout="constrained")
    for number, (name, some) in enumerate(shown.items(), 1):
        axes = figure.add_subplot(
            len(shown), 1, number, xlabel=name, ylabel="videos" if name == "seconds" else "samples"
        )
        low, high = min(some), max(some)
        # Equal widths on a logarithmic axis where the longest is many times the shortest.
        is_wide = low > 0 and high / low > 50
        bins = np.geomspace(low, high, 41) if is_wide else np.linspace(low, max(high, low + 1), 41)
        axes.hist(some, bins=bins.tolist(), color="#4477aa")
        axes.axvline(float(np.median(some)), color="#cc6677", label=f"median {np.median(some):,.4g}")
        axes.legend(frameon=False)
        if is_wide:
            axes.set_xscale("log")
    figure.savefig(path, dpi=150)
