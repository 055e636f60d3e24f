"""Scores from the lines of a run, tables of them, and the paired comparison of two runs."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..files import write_json
from ..provenance import hardware
from .answers import exact_match, judged_score, judged_verdict, token_f1
from .judge import PROMPTS, JudgePrompt, used_prompts
from .run import Line, judgement_key, read_answers, read_judgements
from .samples import BenchmarkError, Sample, Task
from .statistics import Estimate, clustered_mean

MAX_SHOWN = 5
"""Of errors, and of answers that name no option."""
TOP_SCORE = 5
"""The best that a judge gives."""
PERCENT = ("accuracy", "exact_match", "f1")
"""Scores from 0 to 100."""


@dataclass(frozen=True)
class Value:
    """What one sample counts for in one score."""

    score: str
    id: str
    video_id: str
    value: float
    groups: Mapping[str, str]

    @property
    def bounds(self) -> tuple[float, float]:
        """Least and largest possible value."""
        return (0.0, 100.0) if self.score in PERCENT else (0.0, float(TOP_SCORE))


def write_results(
    task: Task,
    samples: Sequence[Sample],
    out: Path,
    *,
    bad: Sequence[str] = (),
    prompts: Mapping[str, JudgePrompt] = PROMPTS,
    judge: str | None = None,
) -> dict[str, Any]:
    """Compute scores from the lines in a task's folder, and write `results.json`.

    Options: the accuracy in percent, over all samples that were answered; an answer that names no option is wrong.
    Answers that are compared by their text: the share of exact matches and the mean of the words' F1, in percent.
    Judged answers: the share of yes in percent, and the mean of the scores from 0 to 5. Where texts are compared, too,
    results are complete without a judge until one has been asked.

    Args:
        task: the benchmark.
        samples: from `choose_samples`.
        out: the task's folder.
        bad: what is wrong with records that are no samples, a line each.
        prompts: of the judge.
        judge: its model; None: the one that judged last.
    """
    lines = read_answers(out)
    done = [lines[sample.id] for sample in samples if sample.id in lines and "error" not in lines[sample.id]]
    failed = [lines[sample.id] for sample in samples if "error" in lines.get(sample.id, {})]
    missing = sum(not sample.video.exists() for sample in samples if sample.id not in lines)
    config = json.loads((out / "config.json").read_text("utf-8"))
    facts: dict[str, Any] = {
        "task": task.name,
        "title": task.title,
        "is_complete": len(done) == len(samples),
        "num_samples": len(samples),
        "answered": len(done),
        "failed": len(failed),
        "missing": missing,
        "errors": sorted({line["error"] for line in failed})[:MAX_SHOWN],
        "not_run": len(samples) - len(done) - len(failed) - missing,
        "bad_records": len(bad),
        "bad_record_examples": list(bad[:MAX_SHOWN]),
        "cut": sum(bool(line.get("is_cut")) for line in done),
        "notes": dict(Counter(note for line in done for note in line.get("notes", ()))),
    }
    judgements = read_judgements(out)
    judge = judge or next((line["judge"] for line in reversed(judgements.values())), None)
    values: list[Value] = []
    if task.text_scores:
        values += text_values(done)
    elif task.judge is None:
        values += option_values(done)
        unclear = [line["response"] for line in done if line["prediction"] is None]
        facts |= {"unparsable": len(unclear), "unparsable_examples": unclear[:MAX_SHOWN]}
        if values:
            facts["chance"] = round(sum(100 / line["num_options"] for line in done) / len(done), 2)
            clear = [v for v, line in zip(values, done, strict=True) if line["prediction"] is not None]
            if clear and len(clear) < len(values):
                facts["accuracy_of_parsable"] = estimate(clear, task.macro).as_json()
    if task.judge is not None and (judge is not None or not task.text_scores):
        responses = {line["id"]: line["response"] for line in done}
        asked = list(task.judge(samples, responses))
        keys = [judgement_key(judge or "", prompts[request.aspect], request) for request in asked]
        found = [judgements[key] for key in keys if key in judgements]
        groups = {sample.id: sample.groups for sample in samples}
        judged = list(judged_values(found, groups))
        values += judged
        facts["judge"] = {
            "model": judge,
            "url": found[0]["url"] if found else None,
            "dates": [min(x["date"] for x in found), max(x["date"] for x in found)] if found else [],
            "prompts": used_prompts(prompts, task.aspects),
            "requests": len(asked),
            "judged": len(found),
            "unclear": len(found) - len({(value.id, value.score) for value in judged if value.score != "score"}),
        }
        facts["is_complete"] = facts["is_complete"] and len(found) == len(asked)
    names = list(dict.fromkeys(value.score for value in values))
    facts["scores"] = {name: estimate([v for v in values if v.score == name], task.macro).as_json() for name in names}
    if len(task.aspects) > 1 and set(names) == set(task.aspects):
        facts["scores"]["average"] = clustered_mean(
            [v.value for v in values], [v.video_id for v in values], [v.score for v in values], (0, TOP_SCORE)
        ).as_json()
    facts["groups"] = {
        group: {
            name: {
                label: estimate([v for v in values if v.score == name and v.groups.get(group) == label]).as_json()
                for label in dict.fromkeys(v.groups[group] for v in values if v.score == name and group in v.groups)
            }
            for name in names
        }
        for group in task.groups
    }
    if task.submission is not None and len(done) == len(samples):
        facts["submission"] = task.submission(out, {line["id"]: line["prediction"] for line in done}).name
    tokens = [line["num_visual_tokens"] for line in done]
    facts["visual_tokens"] = round(sum(tokens) / len(tokens)) if tokens else 0
    machine = hardware()
    facts |= {
        "config": config,
        "commits": sorted({line["commit"] for line in done}),
        "version": __version__,
        "hardware": {"machine": machine["machine"], "gpus": machine["gpus"]},
        "date": time.strftime("%Y-%m-%d"),
    }
    write_json(out / "results.json", facts)
    return facts


def read_results(path: Path) -> dict[str, Any]:
    """Return the results of a task.

    Raises:
        BenchmarkError: the file is none.
    """
    try:
        facts = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"{path}: cannot be read: {error}") from None
    if not isinstance(facts, dict) or "scores" not in facts:
        raise BenchmarkError(f"{path}: not the results of a task")
    return facts


def option_values(lines: Sequence[Line]) -> Iterator[Value]:
    """Yield what each answer whose right option is known counts for: 100 or 0."""
    for line in lines:
        if line["answer"] is not None:
            right = line["prediction"] == line["answer"]
            yield Value("accuracy", line["id"], line["video_id"], 100.0 * right, line["groups"])


def text_values(lines: Sequence[Line]) -> Iterator[Value]:
    """Yield what each open answer counts for beside the right one, from 0 to 100: an exact match, and its words."""
    for line in lines:
        said, right = line["response"], line["answer"]
        for score, value in (("exact_match", float(exact_match(said, right))), ("f1", token_f1(said, right))):
            yield Value(score, line["id"], line["video_id"], 100 * value, line["groups"])


def judged_values(judgements: Sequence[Line], groups: Mapping[str, Mapping[str, str]]) -> Iterator[Value]:
    """Yield what each clear judgement counts for."""
    for line in judgements:
        of = groups.get(line["id"], {})
        if line["aspect"] == "accuracy":
            verdict = judged_verdict(line["reply"])
            if verdict is not None:
                yield Value("accuracy", line["id"], line["video_id"], 100.0 * verdict[0], of)
                yield Value("score", line["id"], line["video_id"], float(verdict[1]), of)
        else:
            score = judged_score(line["reply"])
            if score is not None:
                yield Value(line["aspect"], line["id"], line["video_id"], float(score), of)


def estimate(values: Sequence[Value], macro: str = "") -> Estimate:
    """Return the mean of values of one score, over samples or over the values of the group `macro`."""
    strata = [value.groups[macro] for value in values] if macro else None
    return clustered_mean([v.value for v in values], [v.video_id for v in values], strata, values[0].bounds)


def compare_runs(first: Path, second: Path) -> list[dict[str, Any]]:
    """Return the paired differences (second minus first) of every task that two folders of results share.

    Raises:
        BenchmarkError: they share none, or a task's data differ.
    """
    for folder in (first, second):
        if not folder.is_dir():
            raise BenchmarkError(f"{folder}: no such folder; give what hicom eval wrote with --out")
    tasks = sorted(file.parent.name for file in first.glob("*/config.json"))
    shared = [name for name in tasks if (second / name / "config.json").is_file()]
    if not shared:
        raise BenchmarkError(f"{first} and {second} share no task")
    rows = []
    for name in shared:
        configs = [json.loads((folder / name / "config.json").read_text("utf-8")) for folder in (first, second)]
        if configs[0]["data_digest"] != configs[1]["data_digest"]:
            raise BenchmarkError(f"{name}: the two runs were over different samples (data_digest), so they do not pair")
        a, b = (_values_of(folder / name) for folder in (first, second))
        macro = configs[0]["macro"]
        for score in dict.fromkeys(key[0] for key in a if key in b):
            keys = [key for key in a if key[0] == score and key in b]
            difference = clustered_mean(
                [b[key].value - a[key].value for key in keys],
                [a[key].video_id for key in keys],
                [a[key].groups[macro] for key in keys] if macro else None,
            )
            rows.append(
                {
                    "task": name,
                    "score": score,
                    "first": estimate([a[key] for key in keys], macro).mean,
                    "second": estimate([b[key] for key in keys], macro).mean,
                    "difference": difference.as_json(),
                    "better": sum(b[key].value > a[key].value for key in keys),
                    "worse": sum(b[key].value < a[key].value for key in keys),
                    "unpaired": len({k for k in a if k[0] == score} ^ {k for k in b if k[0] == score}),
                }
            )
    return rows


def _values_of(folder: Path) -> dict[tuple[str, str], Value]:
    """Return all values of a task's folder by score and sample."""
    done = [line for line in read_answers(folder).values() if "error" not in line]
    chosen = [line for line in done if "prediction" in line]
    written = [line for line in done if "prediction" not in line and "answer" in line]
    judgements = list(read_judgements(folder).values())
    groups = {line["id"]: line["groups"] for line in done}
    judged = [line for line in judgements if line["judge"] == judgements[-1]["judge"]]
    values = [*option_values(chosen), *text_values(written), *judged_values(judged, groups)]
    return {(value.score, value.id): value for value in values}
