"""Ten natural clips, from 4 s to 10 minutes, with 71 questions of our own: a benchmark that takes a minute.

The questions are in this package; the clips are in packages of others (`benchmarks/fetch_clips.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path

from ..samples import Found, Record, Sample, Task, convert_records, lettered
from .activitynet_qa import requests

FOLDER = "clips"
QUESTIONS = Path(str(files("hicom"))) / "assets" / "clips" / "questions.jsonl"


def read(root: Path, *, is_open: bool = False) -> Found[Sample]:
    """Return the samples with options, or the open ones."""

    def convert(record: Record, _: int) -> Sample:
        video = record.text("video")
        return Sample(
            id=record.text("id"),
            video=root / FOLDER / video,
            video_id=video,
            question=record.text("question"),
            options=record.texts("options") if "options" in record else (),
            answer=record["answer"],
            groups={"kind": record.text("kind"), "video": video},
        )

    found = convert_records(QUESTIONS, convert)
    return Found([sample for sample in found.items if is_open != bool(sample.options)], found.bad)


def prompt(sample: Sample, _: Sequence[str]) -> str:
    """Return what the model reads after the video."""
    return (
        f"{sample.question}\n{lettered(sample.options)}\n"
        f"Answer with the option's letter from the given choices directly."
    )


def prompt_open(sample: Sample, _: Sequence[str]) -> str:
    """Return what the model reads after the video."""
    return sample.question


CHOICE = Task(
    name="clips",
    title="Natural clips, options",
    files=f"{FOLDER}/ as benchmarks/fetch_clips.py fills it",
    read=read,
    prompt=prompt,
    groups=("kind", "video"),
)
OPEN = Task(
    name="clips_open",
    title="Natural clips, open questions",
    files=CHOICE.files,
    read=partial(read, is_open=True),
    prompt=prompt_open,
    max_new_tokens=128,
    groups=("kind",),
    judge=requests,
    aspects=("accuracy",),
)
