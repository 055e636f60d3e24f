"""EgoSchema (Mangalam et al., NeurIPS 2023): 5,031 clips of 3 minutes, one question of five options each.

The answers of 500 are public: they are a task of their own. The answers of all are known to a server only, so the full
set gives a file for it; an answer that names no option is -1 there, which counts as wrong.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...files import write_text, writing
from ..samples import BenchmarkError, Found, Record, Sample, Task, VideoFolder, convert_records, lettered

FOLDER = "EgoSchema"


def read(root: Path) -> Found[Sample]:
    """Return all samples, without answers."""
    return _read(root, None)


def read_subset(root: Path) -> Found[Sample]:
    """Return the 500 samples whose answers are public."""
    path = root / FOLDER / "subset_answers.json"
    try:
        answers = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"{path}: cannot be read: {error}") from None
    if not isinstance(answers, dict):
        raise BenchmarkError(f"{path}: not an object of answers by q_uid")
    found = _read(root, answers)
    missing = sorted(set(answers) - {sample.id for sample in found.items})
    return Found(found.items, found.bad + [f"{path}: no sample in questions.json for {name!r}" for name in missing])


def _read(root: Path, answers: Mapping[str, Any] | None) -> Found[Sample]:
    videos = VideoFolder(root / FOLDER / "good_clips_git")

    def convert(record: Record, _: int) -> Sample | None:
        name = record.text("q_uid")
        options = tuple(record.text(f"option {number}") for number in range(5))
        if answers is not None and name not in answers:
            return None
        return Sample(
            id=name,
            video=videos.find(name),
            video_id=name,
            question=record.text("question"),
            options=options,
            answer=None if answers is None else Record(answers).index(name),
        )

    found = convert_records(root / FOLDER / "questions.json", convert)
    return Found([sample for sample in found.items if sample is not None], found.bad)


def prompt(sample: Sample, _: Sequence[str]) -> str:
    """Return what the model reads after the video, as in HICom's evaluation."""
    return (
        f"Select the best answer to the following multiple-choice question based on the video.\n{sample.question}\n"
        f"Options:\n{lettered(sample.options)}\nAnswer with the option's letter from the given choices directly and "
        f"only give the best option. The best answer is: "
    )


def write_submission(folder: Path, chosen: Mapping[str, int | None]) -> Path:
    """Write what the server (`submission.json`) and Kaggle (`submission.csv`) take; return the former."""
    answers = {name: -1 if option is None else option for name, option in chosen.items()}
    with writing(folder / "submission.csv") as part, part.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("q_uid", "answer"), *answers.items()])
    path = folder / "submission.json"
    write_text(path, json.dumps(answers) + "\n")
    return path


FULL = Task(
    name="egoschema",
    title="EgoSchema, full set",
    files=f"{FOLDER}/questions.json and {FOLDER}/good_clips_git/<q_uid>.mp4",
    read=read,
    prompt=prompt,
    submission=write_submission,
)
SUBSET = Task(
    name="egoschema_subset",
    title="EgoSchema, subset of 500",
    files=f"{FULL.files} and {FOLDER}/subset_answers.json",
    read=read_subset,
    prompt=prompt,
)
