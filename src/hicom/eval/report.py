"""Tables of results: a run beside what the paper reports, scores by group, and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..tables import markdown
from .paper import PUBLISHED
from .results import PERCENT, read_results

Facts = Mapping[str, Any]


def interval(name: str, found: Facts) -> str:
    """Return a score with its interval: one digit of percentages, two of what judges give."""
    digits = 1 if name in PERCENT or ":" in name else 2
    return f"{found['mean']:.{digits}f} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"


def counts(facts: Facts) -> str:
    """Return how many samples were answered, and what became of the others."""
    names = ("failed", "missing", "not_run", "unparsable", "bad_records")
    others = [f"{facts[name]} {name.replace('_', ' ')}" for name in names if facts.get(name)]
    if "judge" in facts:
        judge = facts["judge"]
        others += [f"{judge['judged']} of {judge['requests']} judged"] if judge["judged"] < judge["requests"] else []
        others += [f"{judge['unclear']} judgements unclear"] if judge["unclear"] else []
    others += [f"{facts['cut']} cut at their longest length"] if facts.get("cut") else []
    return ", ".join([f"{facts['answered']:,} of {facts['num_samples']:,} answered", *others])


def notes(facts: Facts) -> list[str]:
    """Return what the answers came with: that the model is a toy, or videos unlike those of its training."""
    return [f"note, {number:,} of {facts['answered']:,} answers: {n}" for n, number in facts.get("notes", {}).items()]


def summary_rows(facts: Facts) -> list[tuple[str, str]]:
    """Return what a run of a task came to, for the terminal."""
    scores = [f"{name} {interval(name, found)}" for name, found in facts["scores"].items()]
    scores += [f"by chance {facts['chance']:.1f}"] if "chance" in facts and facts["scores"] else []
    if "submission" in facts:
        scores.append(f"answers are not public: {facts['submission']} is for the server")
    return [(facts["title"], "; ".join(scores) or "no score"), ("", counts(facts)), *(("", n) for n in notes(facts))]


def results_page(out: Path) -> str:
    """Return a page about all tasks in a folder of results."""
    parts = ["# Results"]
    for file in sorted(out.glob("*/results.json")):
        parts += _task_part(read_results(file))
    parts.append(
        "Brackets are 95 % intervals, clustered by video. Accuracies, exact matches and F1 of words are in percent "
        "of the answered samples; an answer that names no option is wrong, never guessed. Rows of the paper marked `*` "
        "were measured by its authors."
    )
    return "\n\n".join(parts) + "\n"


def _task_part(facts: Facts) -> list[str]:
    config = facts["config"]
    published = PUBLISHED.get(facts["task"], [])
    names = list(dict.fromkeys(name for row in published for name in row.scores)) or list(facts["scores"])
    groups = {
        f"{group}: {label}": found
        for group, scores in facts["groups"].items()
        for label, found in scores.get("accuracy", {}).items()
    }
    known = groups | facts["scores"]
    frames = config.get("num_frames") or f"{config.get('fps')} fps"
    tokens = facts["visual_tokens"]
    ours = [f"**{config['model']}**", str(frames), f"{tokens:,}" if tokens else ""]
    rows = [[*ours, *(interval(name, known[name]) if name in known else "" for name in names)]]
    rows += [
        [each.model, str(each.num_frames), f"{each.num_tokens:,}", *(str(each.scores.get(name, "")) for name in names)]
        for each in published
    ]
    parts = [f"## {facts['title']}"]
    if names:
        parts.append(markdown(["model", "frames", "visual tokens", *names], rows))
    origin = f"commit {', '.join(facts['commits'])}, model {config['model_digest']}, {facts['date']}"
    chance = f" Chance is {facts['chance']:.1f}." if "chance" in facts else ""
    parts.append(f"{counts(facts)}.{chance} {origin}.")
    parts += [f"{note[0].upper()}{note[1:]}." for note in notes(facts)]
    if "judge" in facts and facts["judge"]["model"]:
        judge = facts["judge"]
        parts.append(f"Judge: `{judge['model']}` at {judge['url']}, {' to '.join(dict.fromkeys(judge['dates']))}.")
    for group, scores in facts["groups"].items():
        for name, labels in scores.items():
            if len(labels) > 1:
                title = group if name == "accuracy" else f"{group} ({name})"
                lines = [[label, interval(name, found), f"{found['n']:,}"] for label, found in labels.items()]
                parts.append(markdown([title, name, "n"], lines))
    return parts


def comparison_table(rows: Sequence[Facts]) -> str:
    """Return the table of `hicom.eval.results.compare_runs`."""
    return markdown(
        ["task", "score", "first", "second", "difference", "better", "worse", "n", "clusters", "unpaired"],
        [
            [
                row["task"],
                row["score"],
                f"{row['first']:.2f}",
                f"{row['second']:.2f}",
                "{mean:+.2f} [{low:+.2f}, {high:+.2f}]".format(**row["difference"]),
                str(row["better"]),
                str(row["worse"]),
                str(row["difference"]["n"]),
                str(row["difference"]["clusters"]),
                str(row["unpaired"]),
            ]
            for row in rows
        ],
    )
