"""MVBench (Li et al., CVPR 2024): 20 tasks of 200 questions about short clips; the score is the mean of the tasks.

Five tasks name the part of the video that counts; the videos of one of them are folders of frames at 3 a second. The
prompt is that of HICom's evaluation, which differs from VideoChat2's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ..samples import Found, Record, Sample, Task, answer_index, convert_records, lettered

FOLDER = "MVBench"
FRAMES_FPS = 3.0
"""Of the folders of frames that TVQA comes as."""
BOUNDED = {"action_sequence", "action_prediction", "object_interaction", "action_localization", "episodic_reasoning"}
FRAME_FOLDERS = {"episodic_reasoning"}
VIDEO_FOLDERS = {
    "action_sequence": "star/Charades_v1_480",
    "action_prediction": "star/Charades_v1_480",
    "action_antonym": "ssv2_video",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "unexpected_action": "FunQA_test/test",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_v1_480",
    "object_shuffle": "perception/videos",
    "moving_direction": "clevrer/video_validation",
    "action_localization": "sta/sta_video",
    "scene_transition": "scene_qa/video",
    "action_count": "perception/videos",
    "moving_count": "clevrer/video_validation",
    "moving_attribute": "clevrer/video_validation",
    "state_change": "perception/videos",
    "fine_grained_pose": "nturgbd",
    "character_order": "perception/videos",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/frames_fps3_hq",
    "counterfactual_inference": "clevrer/video_validation",
}


def read(root: Path) -> Found[Sample]:
    """Return the samples of all 20 tasks."""
    found: Found[Sample] = Found()
    for name, videos in VIDEO_FOLDERS.items():
        folder = root / FOLDER / "video" / videos

        def convert(record: Record, number: int, name: str = name, folder: Path = folder) -> Sample:
            video, options = record.text("video"), record.texts("candidates")
            start_s, end_s = part_of(record.number("start"), record.number("end")) if name in BOUNDED else (None, None)
            return Sample(
                id=f"{name}-{number}",
                video=folder / video,
                video_id=f"{VIDEO_FOLDERS[name]}/{video}",
                question=record.text("question"),
                options=options,
                answer=answer_index(options, record.text("answer")),
                start_s=start_s,
                end_s=end_s,
                source_fps=FRAMES_FPS if name in FRAME_FOLDERS else None,
                groups={"task": name},
            )

        found += convert_records(root / FOLDER / "json" / f"{name}.json", convert)
    return found


def part_of(start_s: float, end_s: float) -> tuple[float, float]:
    """Return the part of a video that counts: bounds in the wrong order are swapped, an empty part lasts a second.

    So does the release (`process_video`); a sample that it scores is scored here, too.
    """
    if not (math.isfinite(start_s) and math.isfinite(end_s)):
        raise ValueError(f"the part that counts is {start_s} s to {end_s} s")
    start_s, end_s = sorted((max(start_s, 0.0), max(end_s, 0.0)))
    return start_s, end_s if end_s > start_s else start_s + 1


def prompt(sample: Sample, _: Sequence[str]) -> str:
    """Return what the model reads after the video."""
    return (
        f"Question: {sample.question}\nOptions:\n{lettered(sample.options)}\n"
        f"Answer with the option's letter from the given choices directly and only give the best option."
    )


TASK = Task(
    name="mvbench",
    title="MVBench",
    files=f"{FOLDER}/json/<task>.json of 20 tasks and {FOLDER}/video/<folder of the task>/",
    read=read,
    prompt=prompt,
    groups=("task",),
    macro="task",
)
