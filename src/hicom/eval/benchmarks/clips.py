"""Ten natural clips, from 4 s to 10 minutes, with 71 questions of our own: a benchmark that takes a minute.

The questions are in this package; the clips are in packages of others (`benchmarks/fetch_clips.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from ..samples import Record, Sample, Task, convert_records, lettered
from .activitynet_qa import requests

FOLDER = "clips"
QUESTIONS = Path(str(files("hicom"))) / "assets" / "clips" / "questions.jsonl"


def read(root: Path) -> list[Sample]:
    """Return the samples with options."""
    return [sample for sample in _read(root) if sample.options]


def read_open(root: Path) -> list[Sample]:
    """Return the open ones."""
    return [sample for sample in _read(root) if not sample.options]


def _read(root: Path) -> list[Sample]:
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

    return convert_records(QUESTIONS, convert)


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
    read=read_open,
    prompt=prompt_open,
    max_new_tokens=128,
    groups=("kind",),
    judge=requests,
    aspects=("accuracy",),
)
