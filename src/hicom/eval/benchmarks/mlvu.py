"""MLVU (Zhou et al., CVPR 2025), the multiple-choice tasks of its dev set: videos of 3 minutes to 2 hours.

The score (M-Avg) is the unweighted mean of the accuracies of seven tasks; the prompt is that of HICom's evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..samples import Found, Record, Sample, Task, answer_index, convert_records, lettered

FOLDER = "MLVU"
FILES = {
    "plotQA": "1_plotQA",
    "needle": "2_needle",
    "ego": "3_ego",
    "count": "4_count",
    "order": "5_order",
    "anomaly_reco": "6_anomaly_reco",
    "topic_reasoning": "7_topic_reasoning",
}


def read(root: Path) -> Found[Sample]:
    """Return the samples of the seven tasks."""
    found: Found[Sample] = Found()
    for name, stem in FILES.items():
        # The release has the folders of videos in `video/`; HICom's scripts expect them beside `json/`.
        folder = next(
            (each for each in (root / FOLDER / "video" / stem, root / FOLDER / stem) if each.is_dir()),
            root / FOLDER / "video" / stem,
        )

        def convert(record: Record, number: int, name: str = name, folder: Path = folder) -> Sample:
            video, options = record.text("video"), record.texts("candidates")
            return Sample(
                id=f"{name}-{number}",
                video=folder / video,
                video_id=f"{folder.name}/{video}",
                question=record.text("question"),
                options=options,
                answer=answer_index(options, record.text("answer")),
                groups={"task": name},
            )

        found += convert_records(root / FOLDER / "json" / f"{stem}.json", convert)
    return found


def prompt(sample: Sample, _: Sequence[str]) -> str:
    """Return what the model reads after the video."""
    return (
        f"Question: {sample.question}\nOptions: \n{lettered(sample.options)}\n\n"
        f"Answer with the option's letter from the given choices directly and only give the best option."
    )


TASK = Task(
    name="mlvu_dev",
    title="MLVU-dev",
    files=f"{FOLDER}/json/1_plotQA.json to 7_topic_reasoning.json and {FOLDER}/video/1_plotQA/ to 7_topic_reasoning/",
    read=read,
    prompt=prompt,
    groups=("task",),
    macro="task",
)
