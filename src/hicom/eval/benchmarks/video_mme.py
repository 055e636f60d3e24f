"""Video-MME (Fu et al., 2024): 900 videos of 11 s to 1 h, three questions of four options each.

The prompt is that of the authors of Video-MME with the ending of HICom's evaluation. With subtitles the model reads
those that are on screen at the times of its own frames, as the authors ask for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ..samples import Found, Record, Sample, Task, VideoFolder, convert_records, letter, lettered

FOLDER = "Video-MME"
QUESTIONS = "videomme/test-00000-of-00001.parquet"


def read(root: Path, *, with_subtitles: bool = False) -> Found[Sample]:
    """Return the samples; with subtitles, also those of the videos that have none."""
    folder = root / FOLDER
    videos = VideoFolder(folder / "videos")

    def convert(record: Record, _: int) -> Sample:
        name, options = record.text("videoID"), record.texts("options")
        subtitles = folder / "subtitle" / f"{name}.srt"
        answer = record.text("answer").strip()
        if answer not in map(letter, range(len(options))):
            raise ValueError(f"'answer' is {answer!r}, not a letter of {len(options)} options")
        return Sample(
            id=record.text("question_id"),
            video=videos.find(name),
            video_id=name,
            question=record.text("question"),
            # The file has the letters in the options' texts.
            options=tuple(re.sub(r"^\s*[A-Z]\.\s*", "", option) for option in options),
            answer=ord(answer) - ord("A"),
            groups={
                "duration": record.text("duration"),
                "domain": record.text("domain"),
                "sub-category": record.text("sub_category"),
                "task": record.text("task_type"),
            },
            subtitles=subtitles if with_subtitles and subtitles.is_file() else None,
        )

    return convert_records(folder / QUESTIONS, convert)


def prompt(sample: Sample, _: Sequence[str]) -> str:
    """Return what the model reads after the video, without subtitles."""
    options = lettered(sample.options, "{}. {}")
    return (
        f"Select the best answer to the following multiple-choice question based on the video. Respond with "
        f"only the letter (A, B, C, or D) of the correct option.\n{sample.question}\n{options}\nAnswer with the "
        f"option's letter from the given choices directly and only give the best option. The best answer is: "
    )


def prompt_with_subtitles(sample: Sample, subtitles: Sequence[str]) -> str:
    """Return what the model reads after the video; its first line does not depend on there being any subtitles."""
    shown = "\n".join(subtitles)
    return f"This video's subtitles are listed below:\n{shown}\n{prompt(sample, subtitles)}"


WITHOUT = Task(
    name="videomme",
    title="Video-MME",
    files=f"{FOLDER}/{QUESTIONS} and {FOLDER}/videos/<videoID>.mp4",
    read=read,
    prompt=prompt,
    groups=("duration", "domain", "task", "sub-category"),
)
WITH = Task(
    name="videomme_w_subtitle",
    title="Video-MME with subtitles",
    files=f"{WITHOUT.files} and {FOLDER}/subtitle/<videoID>.srt",
    read=partial(read, with_subtitles=True),
    prompt=prompt_with_subtitles,
    groups=WITHOUT.groups,
)
