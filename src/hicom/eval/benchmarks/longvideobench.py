"""LongVideoBench (Wu et al., NeurIPS 2024), validation: 1,337 questions of up to five options, without subtitles.

Its videos last 8 s to an hour, in four groups. HICom's paper does not report it; the prompt is that of lmms-eval.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..samples import Found, Record, Sample, Task, VideoFolder, convert_records, lettered

FOLDER = "LongVideoBench"
NO_OPTION = "N/A"
"""Fills up records with fewer options than five."""


def read(root: Path) -> Found[Sample]:
    """Return the samples of the validation set."""
    folder = root / FOLDER
    videos = VideoFolder(folder / "videos")

    def convert(record: Record, _: int) -> Sample:
        if "candidates" in record:
            options = record.texts("candidates")
        else:
            padded = (record.text(f"option{number}") for number in range(5))
            options = tuple(option for option in padded if option != NO_OPTION)
        return Sample(
            id=record.text("id"),
            video=videos.find(record.text("video_path")),
            video_id=record.text("video_id"),
            question=record.text("question"),
            options=options,
            answer=record.index("correct_choice"),
            groups={"duration": record.text("duration_group"), "category": record.text("question_category")},
        )

    return convert_records(folder / "lvb_val.json", convert)


def prompt(sample: Sample, _: Sequence[str]) -> str:
    """Return what the model reads after the video."""
    return (
        f"{sample.question}\n{lettered(sample.options, '{}. {}')}\n"
        f"Answer with the option's letter from the given choices directly."
    )


TASK = Task(
    name="longvideobench_val",
    title="LongVideoBench, validation",
    files=f"{FOLDER}/lvb_val.json and {FOLDER}/videos/",
    read=read,
    prompt=prompt,
    groups=("duration", "category"),
)
