"""Miniature benchmarks in the official layouts of files."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

import media

SRT = (
    "1\n00:00:00,000 --> 00:00:00,900\nHello <i>there</i>,\nyou.\n\n"
    "2\n00:00:00,900 --> 00:00:02,000\nBye.\n\n3\n00:01:00,000 --> 00:01:02,000\nNever seen.\n"
)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), "utf-8")


def clip(path: Path, num_frames: int = 16) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    media.write_video(path, num_frames, fps=8)


def mme_record(video: int, question: int, answer: str) -> dict[str, Any]:
    return {
        "video_id": f"{video:03}",
        "duration": ("short", "medium")[video % 2],
        "domain": "Knowledge",
        "sub_category": "History",
        "url": f"https://www.youtube.com/watch?v=clip{video}",
        "videoID": f"clip{video}",
        "question_id": f"{video:03}-{question}",
        "task_type": ("Counting Problem", "OCR Problems", "Object Recognition")[question % 3],
        "question": f"What is seen in {video}, {question}?",
        "options": ["A. A dog.", "B. A cat.", "C. Two mice.", "D. None."],
        "answer": answer,
    }


def video_mme(root: Path) -> None:
    folder = root / "Video-MME"
    rows = [mme_record(video, question, "ABCD"[(video + question) % 4]) for video in range(3) for question in range(3)]
    (folder / "videomme").mkdir(parents=True)
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, folder / "videomme" / "test-00000-of-00001.parquet")
    for video in range(3):
        clip(folder / "videos" / f"clip{video}.mp4")
    (folder / "subtitle").mkdir()
    (folder / "subtitle" / "clip1.srt").write_text(SRT, "utf-8")


def mvbench(root: Path) -> None:
    from hicom.eval.benchmarks.mvbench import BOUNDED, FRAME_FOLDERS, VIDEO_FOLDERS

    for name, videos in VIDEO_FOLDERS.items():
        folder = root / "MVBench" / "video" / videos
        rows = []
        for number in range(2):
            suffix = "" if name in FRAME_FOLDERS else ".mp4"
            video = f"{name}{number}{suffix}"
            if name in FRAME_FOLDERS:
                (folder / video).mkdir(parents=True)
                for index in range(12):
                    picture = np.full((20, 20, 3), 20 * index, np.uint8)
                    Image.fromarray(picture).save(folder / video / f"{index + 1:05}.jpg")
            else:
                clip(folder / video)
            row = {
                "video": video,
                "question": f"What of {name}?",
                "candidates": ["left", "right", "up"],
                "answer": "right",
            }
            rows.append(row | ({"start": 0.5, "end": 1.5} if name in BOUNDED else {}))
        write_json(root / "MVBench" / "json" / f"{name}.json", rows)


def egoschema(root: Path) -> None:
    folder = root / "EgoSchema"
    rows = []
    for number in range(4):
        options = {f"option {index}": f"C does thing {index}." for index in range(5)}
        rows.append({"q_uid": f"uid-{number}", "google_drive_id": "x", "question": "What does C do?"} | options)
        clip(folder / "good_clips_git" / f"uid-{number}.mp4")
    write_json(folder / "questions.json", rows)
    write_json(folder / "subset_answers.json", {"uid-1": 3, "uid-2": 0})


def activitynet_qa(root: Path) -> None:
    folder = root / "Activitynet_Zero_Shot_QA"
    questions, answers = [], []
    for number in range(3):
        questions.append({"video_name": f"clip{number // 2}", "question": "is it red", "question_id": f"v_{number}"})
        answers.append({"answer": "yes", "type": 3 + number, "question_id": f"v_{number}"})
    write_json(folder / "test_q.json", questions)
    write_json(folder / "test_a.json", answers)
    for name, suffix in (("v_clip0", ".mp4"), ("v_clip1", ".mkv")):
        clip(folder / "all_test" / f"{name}{suffix}")


def video_chatgpt(root: Path) -> None:
    folder = root / "Video-ChatGPT-eval"
    one = [{"video_name": f"clip{number}", "Q": "What happens?", "A": "A dog runs."} for number in range(2)]
    write_json(folder / "generic_qa.json", one)
    write_json(folder / "temporal_qa.json", one[:1])
    write_json(
        folder / "consistency_qa.json",
        [{"video_name": "clip1", "Q1": "Who runs?", "Q2": "Does a dog run?", "A": "A dog."}],
    )
    for number in range(2):
        clip(folder / "Test_Videos" / f"clip{number}.mp4")


def mlvu(root: Path) -> None:
    from hicom.eval.benchmarks.mlvu import FILES

    for name, stem in FILES.items():
        rows = []
        for number in range(2):
            video = f"{name}_{number}.mp4"
            clip(root / "MLVU" / "video" / stem / video)
            row = {"video": video, "duration": 2.0, "question": "How many?", "candidates": ["1", "2", "3", "4"]}
            rows.append(row | {"answer": "3", "question_type": name})
        write_json(root / "MLVU" / "json" / f"{stem}.json", rows)


def longvideobench(root: Path) -> None:
    folder = root / "LongVideoBench"
    rows = []
    for number in range(3):
        clip(folder / "videos" / f"clip{number}.mp4")
        row: dict[str, Any] = {
            "id": f"clip{number}_0",
            "video_id": f"clip{number}",
            "video_path": f"clip{number}.mp4",
            "question": "What is on the table?",
            "correct_choice": number,
            "duration_group": (15, 600)[number % 2],
            "question_category": "S2O",
        }
        options = ["a cup", "a pen", "a hat", "N/A", "N/A"]
        if number:
            row["candidates"] = options[:3]
        else:
            row |= {f"option{index}": option for index, option in enumerate(options)}
        rows.append(row)
    write_json(folder / "lvb_val.json", rows)


def clips(root: Path) -> None:
    from hicom.eval.benchmarks.clips import QUESTIONS

    for name in {json.loads(line)["video"] for line in QUESTIONS.read_text("utf-8").splitlines()}:
        clip(root / "clips" / name)


WRITERS: Mapping[str, Callable[[Path], None]] = {
    "videomme": video_mme,
    "videomme_w_subtitle": video_mme,
    "mvbench": mvbench,
    "egoschema": egoschema,
    "egoschema_subset": egoschema,
    "activitynetqa": activitynet_qa,
    "videochatgpt": video_chatgpt,
    "mlvu_dev": mlvu,
    "longvideobench_val": longvideobench,
    "clips": clips,
    "clips_open": clips,
}
