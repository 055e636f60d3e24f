"""Tables of a run: ratios to ours first, absolute times only where a GPU ran them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_text
from ..tables import markdown
from .run import PARTS
from .shapes import COLUMNS

TITLES = COLUMNS | {"local": "HICom, local branch alone"}


def ratio(value: float | None, ours: float | None) -> str:
    """Return `value / ours` with three digits."""
    return "" if value is None or ours is None or ours == 0 else f"{value / ours:.3g}"


def part_tables(rows: Sequence[Mapping[str, Any]], *, has_gpu: bool) -> str:
    """Return the tables of a whole run: for every number of frames ratios, and the distances to the floor."""
    texts, notes = [], set()
    for frames in dict.fromkeys(row["num_frames"] for row in rows):
        some = [row for row in rows if row["num_frames"] == frames]
        ours = next(row for row in some if row["column"] == "hicom")
        ratios, distances, times = [], [], []
        for row in some:
            cells = []
            for part in PARTS:
                found, own = row["parts"].get(part), ours["parts"].get(part)
                mark = "~" if found and found["note"] else ""
                if found and found["note"]:
                    notes.add(f"{part}: {found['note']}")
                cells.append(mark + ratio(found["seconds"], own["seconds"]) if found and own else "none")
            first = ratio(row["first_token_s"], ours["first_token_s"])
            further = f"{row['further_share']:.2%}"
            memory = ratio(row["peak_bytes"], ours["peak_bytes"])
            title = TITLES[row["column"]]
            ratios.append([title, f"{row['num_visual_tokens']:,}", *cells, first, further, memory])
            counted = [row["parts"].get(part) for part in PARTS[1:]]
            distances.append([title, *("" if part is None else f"{part['distance']:.2g}" for part in counted)])
            milliseconds = [row["parts"].get(part, {}).get("seconds") for part in PARTS]
            times.append(
                [title, *("" if s is None else f"{1e3 * s:.1f}" for s in (*milliseconds, row["first_token_s"]))]
            )
        head = ["compressor", "visual tokens", *PARTS, "first token", "further question", "peak memory"]
        texts.append(f"## {frames} frames\n\nRatios to ours (1).\n\n{markdown(head, ratios)}")
        texts.append(f"Times their floor.\n\n{markdown(['compressor', *PARTS[1:]], distances)}")
        if has_gpu:
            texts.append(f"Milliseconds.\n\n{markdown(['compressor', *PARTS, 'first token'], times)}")
    if notes:
        texts.append("`~` was scaled:\n\n" + "\n".join(f"- {note}" for note in sorted(notes)))
    return "\n\n".join(texts)


def compressor_tables(rows: Sequence[Mapping[str, Any]], *, has_gpu: bool) -> str:
    """Return the table of compressors alone."""
    header = ["batch", "frames", "pass", "compressor", "time", "extra memory", "times its floor", "floor"]
    cells = []
    for row in rows:
        same = [r for r in rows if all(r[k] == row[k] for k in ("batch_size", "num_frames", "pass"))]
        ours = next((r for r in same if r["column"] == "hicom"), row)
        distance = "" if row["distance"] is None else f"{row['distance']:.2g}"
        line = [str(row["batch_size"]), str(row["num_frames"]), row["pass"], TITLES[row["column"]]]
        line += [ratio(row["seconds"], ours["seconds"]), ratio(row["extra_bytes"], ours["extra_bytes"])]
        cells.append([*line, distance, row["bound"] or "", *([f"{1e3 * row['seconds']:.2f}"] if has_gpu else [])])
    text = markdown([*header, *(["ms"] if has_gpu else [])], cells)
    return f"## Compressor alone\n\nTime and memory are ratios to ours (1).\n\n{text}"


def document(facts: Mapping[str, Any]) -> str:
    """Return a run as Markdown."""
    has_gpu = facts["device"] != "cpu"
    tables = compressor_tables if facts["kind"] == "compressor" else part_tables
    machine, hardware = facts["machine"], facts["hardware"]
    where = ", ".join(hardware["gpus"]) if has_gpu else f"{hardware['cpu']}, {facts['threads']} thread(s)"
    measured = (
        f"{machine['flops_per_s'] / 1e9:,.0f} GFLOP/s in a matrix product, "
        f"{machine['bytes_per_s'] / 1e9:,.1f} GB/s in a copy"
    )
    foot = (
        f"{facts['subject']}, {facts['dtype']}, n = {facts['repeats']}, medians, on {where} ({measured}); "
        f"{facts['date']}, commit {str(facts['commit'])[:12]}{'-dirty' if 'dirty' in str(facts['commit']) else ''}."
    )
    sizes = (
        f"{row['num_frames']} frames in batches of {row['batch_size']} ({row['needed_bytes'] / 1e9:.0f} GB)"
        for row in facts["left_out"]
    )
    left_out = f"Would not fit into memory: {', '.join(sizes)}.\n\n" if facts["left_out"] else ""
    gpu = "" if has_gpu else "\n\nNo GPU was at hand: ratios only; `python benchmarks/gpu.py` makes the table of a GPU."
    return f"{tables(facts['rows'], has_gpu=has_gpu)}\n\n{left_out}{foot}{gpu}\n\nMade by `{facts['command']}`.\n"


def write(facts: Mapping[str, Any], folder: Path) -> Path:
    """Write `bench-SUBJECT-DATE.json` and `.md` into a folder, and return the latter's path."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = "-compressor" if facts["kind"] == "compressor" else ""
    path = folder / f"bench-{Path(facts['subject']).name}{kind}-{facts['date']}.json"
    write_text(path, json.dumps(facts, indent=1) + "\n")
    write_text(path.with_suffix(".md"), f"# What it costs: {facts['subject']}\n\n{document(facts)}")
    return path.with_suffix(".md")
