"""The last step: clips as files, records in LLaVA's form, and a card that tells what the data is."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm.auto import tqdm

from ... import __version__
from ...files import write_text, writing
from ...provenance import git_commit, short_commit
from ...tables import markdown
from ...video import read_frames
from .config import BuildConfig
from .state import State
from .steps import RANDOM, report
from .work import run_here, run_on_ray

SHEET = (3, 4)
"""Rows and columns of the sheet of clips."""
EXAMPLES = 3
"""Clips whose pairs the card shows."""


def export(state: State, config: BuildConfig, on_ray: bool = False) -> None:
    """Write the clips that have a good pair, `data.jsonl`, a mixture for training, and the card with its pictures."""
    out = Path(config.out)
    rows = state.rows(
        "SELECT clips.id, path, start_s, end_s, number, instruction, description FROM clips "
        "JOIN videos ON videos.id = clips.video JOIN pairs ON pairs.clip = clips.id "
        "WHERE clips.dropped = '' AND pairs.dropped = '' ORDER BY clips.id, number"
    )
    clips = {row[0]: row[1:4] for row in rows}
    write_clips(state, config, clips, on_ray)
    turns: dict[str, list[dict[str, str]]] = {}
    for clip, *_, instruction, description in rows:
        if (out / "clips" / f"{clip}.mp4").is_file():
            some = turns.setdefault(clip, [])
            some.append({"from": "human", "value": ("" if some else "<video>\n") + instruction})
            some.append({"from": "gpt", "value": description})
    records = [
        {"id": clip, "video": f"clips/{clip}.mp4", "conversations": conversation}
        for clip, conversation in turns.items()
    ]
    write_text(out / "data.jsonl", "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    mixture = {"datasets": [{"path": "data.jsonl", "sampling": "all"}]}
    write_text(out / "mixture.yaml", yaml.safe_dump(mixture, sort_keys=False))
    lengths = {clip: clips[clip][2] - clips[clip][1] for clip in turns}
    if records:
        draw(out, lengths, turns)
    write_text(out / "README.md", card(state, config, lengths, turns))


def write_clips(state: State, config: BuildConfig, clips: Mapping[str, Sequence[Any]], on_ray: bool) -> None:
    """Cut the clips that are not there yet out of their videos, and remove those that are of an earlier build."""
    folder = Path(config.out) / "clips"
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"clip_size": config.clip_size}
    for file in folder.glob("*.mp4"):
        if file.stem not in clips:
            file.unlink()
    new = set(state.todo("export", list(clips), settings))
    rows = [
        {"id": clip, "path": path, "start_s": start_s, "end_s": end_s, "out": str(folder / f"{clip}.mp4")}
        for clip, (path, start_s, end_s) in clips.items()
        if clip in new or not (folder / f"{clip}.mp4").is_file()
    ]
    run = run_on_ray if on_ray else run_here
    results = run("cut", rows, {"size": config.clip_size}, config.num_workers)
    for row in tqdm(results, "export", len(rows), unit="clip", disable=not sys.stderr.isatty()):
        with state.transaction():
            state.mark("export", row["id"], settings, row.get("error"))


def draw(out: Path, lengths: Mapping[str, float], turns: Mapping[str, Sequence[Mapping[str, str]]]) -> None:
    """Draw how long clips and texts are, and a sheet of clips.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("the card's pictures need matplotlib: pip install 'hicom[build]'") from None
    spoken = [turn for conversation in turns.values() for turn in conversation]
    values: dict[str, list[float]] = {
        "seconds of a clip": list(lengths.values()),
        "words of an instruction": [len(turn["value"].split()) for turn in spoken if turn["from"] == "human"],
        "words of a description": [len(turn["value"].split()) for turn in spoken if turn["from"] == "gpt"],
    }
    figure = Figure((9.6, 2.6), layout="constrained")
    for axes, (name, some) in zip(figure.subplots(1, 3), values.items(), strict=True):
        axes.hist(some, bins=min(40, max(5, len(set(some)))), color="#4477aa")
        axes.axvline(float(np.median(some)), color="#cc6677", label=f"median {np.median(some):.3g}")
        axes.set_xlabel(name)
        axes.legend(frameon=False)
    with writing(out / "lengths.png") as part:
        figure.savefig(part, dpi=120, format="png")
    number_rows, number_columns = SHEET
    shown = list(turns)[:: max(1, len(turns) // (number_rows * number_columns))][: number_rows * number_columns]
    figure = Figure((3.2 * number_columns, 2.5 * -(-len(shown) // number_columns)), layout="constrained")
    grid = figure.subplots(-(-len(shown) // number_columns), number_columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, clip in zip(grid.flat, shown, strict=False):
        axes.imshow(read_frames(out / "clips" / f"{clip}.mp4", num_frames=1, size=320).frames[0])
        text = turns[clip][0]["value"].removeprefix("<video>\n")
        axes.set_title(text if len(text) < 48 else f"{text[:45]}...", fontsize=8)
    with writing(out / "clips.png") as part:
        figure.savefig(part, dpi=100, format="png")


def card(
    state: State,
    config: BuildConfig,
    lengths: Mapping[str, float],
    turns: Mapping[str, Sequence[Mapping[str, str]]],
) -> str:
    """Return the card in Markdown."""
    facts = report(state, config)
    categories = facts.pop("by category")
    dropped_clips, dropped_pairs = facts.pop("dropped clips"), facts.pop("dropped pairs")
    spent, errors = facts.pop("spent"), facts.pop("errors")
    seconds = list(lengths.values())
    rows = [(name, f"{value:,}") for name, value in facts.items()]
    if seconds:
        rows.append(("seconds of a clip", f"{min(seconds):.1f} to {max(seconds):.1f}, mean {np.mean(seconds):.2f}"))
    commit = git_commit()
    parts = [
        "# Instruction-description data",
        f"{len(turns):,} clips with {sum(map(len, turns.values())) // 2:,} pairs of an instruction that names something"
        " in the clip and a description of that thing, made by `hicom data build` after the recipe of HICom-248K "
        "(arXiv 2503.16036, 3.2 and B.2). Clips keep the licence of the videos that they are cut from; texts were "
        f"written by the model `{config.model}` and not checked by people.",
        "`data.jsonl` has LLaVA's form, and `mixture.yaml` is what `hicom train` takes.",
        "## Counts",
        markdown(["what", "number"], rows),
    ]
    if seconds:
        parts += ["![lengths](lengths.png)", "![clips](clips.png)"]
    for title, counts in (("Dropped clips", dropped_clips), ("Dropped pairs", dropped_pairs), ("Errors", errors)):
        if counts:
            parts += [f"## {title}", markdown(["why", "number"], [(str(k), f"{v:,}") for k, v in counts.items()])]
    if categories:
        named = [("by lot" if name == RANDOM else name, f"{number:,}") for name, number in categories.items()]
        parts += ["## Videos by category", markdown(["category", "videos"], named)]
    if turns:
        parts.append("## Examples")
        for clip in list(turns)[:EXAMPLES]:
            parts.append(f"`clips/{clip}.mp4`")
            parts.append("\n".join(f"- **{turn['from']}**: {_plain(turn['value'])}" for turn in turns[clip]))
    parts += [
        "## Made by",
        f"hicom {__version__}, commit {short_commit(commit) if commit else 'unknown'}, {time.strftime('%Y-%m-%d')}.",
    ]
    if spent:
        columns = ["model", "requests", "prompt_tokens", "completion_tokens", "cost"]
        parts.append(
            markdown([name.replace("_", " ") for name in columns], [[str(s[c]) for c in columns] for s in spent])
        )
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
    for private in ("videos", "out", "url", "device", "num_workers"):
        settings.pop(private)  # they say where it was made, not how
    settings["encoder"] = Path(config.encoder).name if Path(config.encoder).exists() else config.encoder
    parts.append(f"```yaml\n{yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=100)}```")
    return "\n\n".join(parts) + "\n"


def _plain(text: str) -> str:
    return text.replace("<video>\n", "").replace("\n", " ")
