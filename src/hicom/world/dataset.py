"""Write the sprite world as a data set: real H.264 clips, LLaVA-style JSONL and ground truth.

    dst/world.json                  what was written (last of all: without it the data set is unfinished)
    dst/{split}/videos/000123.mp4   128x128, 8 fps, 2 s
    dst/{split}/align.jsonl         captions                     {id, video, conversations, family, answer, split, ...}
    dst/{split}/pretrain.jsonl      instructions and descriptions
    dst/{split}/tune.jsonl          questions with short answers; the test split of this file is the benchmark
    dst/{split}/truth.jsonl         objects, boxes and motion of every clip

`video` is relative to dst. A clip file appears only when it is complete and everything is a function of the seed, so
an interrupted `make_dataset` is finished by calling it again.
"""

import json
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import chain
from pathlib import Path
from typing import Any

import tyro
from numpy.random import Generator
from rich.progress import Progress

from hicom.world.questions import FAMILIES, Question, captions, descriptions, questions
from hicom.world.render import FPS, NUM_FRAMES, SIZE, render, sprite_extents, write_video
from hicom.world.scenes import SPLITS, Scene, clip_seed, generator, ground_truth, make_scene

CHUNK = 25
STAGES: dict[str, Callable[[Scene, Generator], list[Question]]] = {
    "align": captions,
    "pretrain": descriptions,
    "tune": questions,
}
# Training clips are asked twice, with other words and other objects; held-out clips once.
ROUNDS = {"train": 2, "val": 1, "test": 1}


def record(question: Question, record_id: str, video: str, split: str, num_objects: int) -> dict[str, Any]:
    """One LLaVA-style record.

    Args:
        question: what is asked.
        record_id: unique id.
        video: path relative to the data set.
        split: `train`, `val` or `test`.
        num_objects: objects in the clip; chance of a model that names one of them at random.

    Returns:
        `id`, `video`, `conversations`, `family`, `answer`, `split`, `options`, `chance` (without the video; None: not
        scored) and, for family `which`, `informed_chance` (picking one of the objects of the clip).
    """
    result: dict[str, Any] = {
        "id": record_id,
        "video": video,
        "conversations": [
            {"from": "human", "value": f"<video>\n{question.text}"},
            {"from": "gpt", "value": question.answer},
        ],
        "family": question.family,
        "answer": question.answer,
        "split": split,
        "options": list(question.options),
        "chance": question.chance,
    }
    return result | ({"informed_chance": round(1 / num_objects, 4)} if question.family == "which" else {})


def records(seed: int, split: str, index: int, stage: str) -> Iterator[dict[str, Any]]:
    """All records of one clip for one stage (`align`, `pretrain` or `tune`)."""
    key = clip_seed(seed, split, index)
    scene = make_scene(key)
    number = 0
    for turn in range(ROUNDS[split]):
        rng = generator(*key, 1 + list(STAGES).index(stage), turn)
        for question in STAGES[stage](scene, rng):
            name = f"{split}-{index:06d}-{stage}-{number}"
            yield record(question, name, video_name(split, index), split, len(scene.objects))
            number += 1


def video_name(split: str, index: int) -> str:
    """Path of a clip relative to the data set."""
    return f"{split}/videos/{index:06d}.mp4"


def truth(seed: int, split: str, index: int) -> dict[str, Any]:
    """Ground truth of one clip (see `scenes.ground_truth`), with its id, split and video."""
    scene = make_scene(clip_seed(seed, split, index))
    facts = {"id": f"{split}-{index:06d}", "split": split, "video": video_name(split, index)}
    media = {"num_frames": NUM_FRAMES, "fps": FPS, "size": SIZE}
    return facts | media | ground_truth(scene, sprite_extents(), NUM_FRAMES)


def _write_clips(dst: Path, seed: int, split: str, indices: list[int]) -> int:
    for index in indices:
        frames, _ = render(make_scene(clip_seed(seed, split, index)))
        write_video(dst / video_name(split, index), frames)
    return len(indices)


def _write_jsonl(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    partial = path.with_suffix(".part")
    with partial.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    partial.replace(path)


def make_dataset(dst: Path, num_clips: Mapping[str, int], seed: int = 0, num_workers: int = 2) -> Path:
    """Write a data set, or complete one whose writing was interrupted.

    Args:
        dst: folder of the data set.
        num_clips: number of clips of each split, for instance {"train": 12000, "val": 500, "test": 1000}.
        seed: the same seed gives the same scenes, questions and ground truth on every machine.
        num_workers: processes that render and encode.

    Returns:
        `dst`.

    Raises:
        ValueError: unknown split, or `dst` holds a data set with other settings.
    """
    settings = {"num_clips": dict(num_clips), "seed": seed, "size": SIZE, "fps": FPS, "num_frames": NUM_FRAMES}
    started, finished = dst / "unfinished.json", dst / "world.json"
    for path in (started, finished):
        if path.exists() and (found := json.loads(path.read_text())["settings"]) != settings:
            raise ValueError(f"{dst} holds a data set with {found}, not {settings}: choose another folder")
    for split in num_clips:
        clip_seed(seed, split, 0)  # names an unknown split
        (dst / split / "videos").mkdir(parents=True, exist_ok=True)
    wanted = [(split, index) for split, count in num_clips.items() for index in range(count)]
    missing = {
        split: [i for s, i in wanted if s == split and not (dst / video_name(s, i)).exists()] for split in SPLITS
    }
    if finished.exists() and not any(missing.values()):
        return dst
    started.write_text(json.dumps({"settings": settings}) + "\n")

    jobs = [(s, todo[i : i + CHUNK]) for s, todo in missing.items() for i in range(0, len(todo), CHUNK)]
    context = multiprocessing.get_context("spawn")  # forking a process that has used torch threads can hang
    with Progress() as progress, ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        task = progress.add_task("sprite world", total=len(wanted))
        progress.advance(task, len(wanted) - sum(map(len, missing.values())))
        for job in as_completed([pool.submit(_write_clips, dst, seed, split, todo) for split, todo in jobs]):
            progress.advance(task, job.result())
    for split, count in num_clips.items():
        for stage in STAGES:
            rows = chain.from_iterable(records(seed, split, i, stage) for i in range(count))
            _write_jsonl(dst / split / f"{stage}.jsonl", rows)
        _write_jsonl(dst / split / "truth.jsonl", (truth(seed, split, i) for i in range(count)))
    for partial in dst.glob("*/videos/*.part"):
        partial.unlink()
    finished.write_text(json.dumps({"settings": settings, "families": FAMILIES, "splits": list(num_clips)}) + "\n")
    started.unlink()
    return dst


def main(dst: Path, train: int = 12000, val: int = 500, test: int = 1000, seed: int = 0, num_workers: int = 2) -> None:
    """Write the sprite world.

    Args:
        dst: folder of the data set.
        train: clips to train on.
        val: clips to watch while training.
        test: clips to report on.
        seed: seed of everything.
        num_workers: processes that render and encode.
    """
    make_dataset(dst, {"train": train, "val": val, "test": test}, seed, num_workers)


if __name__ == "__main__":
    tyro.cli(main)
