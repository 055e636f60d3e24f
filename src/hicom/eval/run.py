"""Running a benchmark: answers go to a file line by line, so that a run can stop, go on and be shared out.

A task's folder holds `config.json` (what answers depend on), `samples-I-of-N.jsonl` (a line a sample),
`judgements.jsonl` and `results.json`. The last is computed from the others alone, so that it does not matter in how
many pieces the answers came.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm

from .. import __version__
from ..data.cache import content_digest
from ..encoding import EncodedVideo
from ..endpoint import Endpoint, EndpointError
from ..files import naming, write_json
from ..inference import VideoChat
from ..locks import locked
from ..model.hub import find_model
from ..model.ops import Window
from ..processes import Workers
from ..provenance import git_commit, short_commit
from ..video import VideoError
from .answers import chosen_option, read_json_line
from .judge import JudgePrompt
from .samples import BenchmarkError, Found, JudgeRequest, Sample, Task
from .subtitles import read_subtitles, subtitles_at

MAX_NAMED = 5
"""Of missing files that an error names."""
Line = dict[str, Any]
Clip = tuple[Path, float | None, float | None, float | None]
"""What is encoded once for all its questions: the video and the part of it that counts."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What answers depend on beside the model.

    Attributes:
        num_frames: frames, spread evenly; None: as many as the model was trained on.
        fps: frames a second instead.
        max_frames: most frames, with `fps`.
        snap: `keyframe`: the key frames nearest to the chosen ones.
        window: (T, H, W) of the local branch; None: the model's.
        max_visual_tokens: budget a video that picks the window instead.
        max_new_tokens: longest answer; None: as the task has it.
        batch_size: questions that are answered at once.
        limit: this many samples, spread evenly over the benchmark; None: all.
    """

    num_frames: int | None = None
    fps: float | None = None
    max_frames: int | None = None
    snap: str | None = None
    window: Window | None = None
    max_visual_tokens: int | None = None
    max_new_tokens: int | None = None
    batch_size: int = 8
    limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_frames", "max_frames", "max_visual_tokens", "max_new_tokens", "batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: give a positive number")
        if self.window is not None and self.max_visual_tokens is not None:
            raise ValueError("window and max_visual_tokens both choose the window; pass one of them")


def choose_samples(task: Task, root: Path, limit: int | None) -> Found[Sample]:
    """Return the samples of a run, those about the same part of a video one after the other, and the bad records."""
    found = task.samples(root)
    samples = found.items
    if limit is not None and limit < len(samples):
        samples = [samples[number * len(samples) // limit] for number in range(limit)]
    first: dict[Clip, int] = {}
    for number, sample in enumerate(samples):
        first.setdefault(clip_of(sample), number)
    return Found(sorted(samples, key=lambda sample: first[clip_of(sample)]), found.bad)


def check_videos(task: Task, samples: Sequence[Sample], allow_missing: bool = False) -> None:
    """Raise BenchmarkError where videos are missing and that is not allowed."""
    missing = [sample for sample in samples if not sample.video.exists()]
    if missing and not allow_missing:
        named = "".join(f"\n  {path}" for path in list(dict.fromkeys(s.video for s in missing))[:MAX_NAMED])
        raise BenchmarkError(
            f"{task.name}: {len(missing)} of {len(samples)} samples have no video, the first of these:{named}\n"
            f"allow_missing (--allow-missing) scores the others and says how many they are"
        )


def clip_of(sample: Sample) -> Clip:
    """Return the part of a video that a sample is about."""
    return sample.video, sample.start_s, sample.end_s, sample.source_fps


def answer_samples(
    chat: VideoChat,
    task: Task,
    samples: Sequence[Sample],
    out: Path,
    options: RunOptions,
    *,
    model: str,
    shard: tuple[int, int] = (0, 1),
    allow_missing: bool = False,
) -> None:
    """Answer the samples of a shard that have no answer yet; failed ones are tried again.

    Batches are cut before they are dealt out to shards, and a batch that was interrupted is answered again as a whole,
    so that each answer comes out of the same batch whatever happened.

    Args:
        chat: the model.
        task: the benchmark.
        samples: from `choose_samples`.
        out: the task's folder.
        options: of the run.
        model: the name that it was loaded by.
        shard: which part of how many.
        allow_missing: leave out samples whose videos are not there.

    Raises:
        BenchmarkError: videos are missing, or the folder holds answers of another model, data or options.
    """
    index, count = shard
    if not 0 <= index < count:
        raise ValueError(f"shard {index} of {count}: shards are counted from 0")
    check_videos(task, samples, allow_missing)
    out.mkdir(parents=True, exist_ok=True)
    _check_config(out / "config.json", _config(chat, task, samples, options, model))
    file = out / f"samples-{index}-of-{count}.jsonl"
    # A second process with the same shard waits, and finds it answered.
    with locked(file.with_suffix(".lock")):
        _answer_all(chat, task, samples, file, options, shard)


def _answer_all(
    chat: VideoChat, task: Task, samples: Sequence[Sample], file: Path, options: RunOptions, shard: tuple[int, int]
) -> None:
    """Append the answers of a shard that are not in its file yet."""
    index, count = shard
    out = file.parent
    done = {name for name, line in read_answers(out).items() if "error" not in line}
    there = [sample for sample in samples if sample.video.exists()]
    batches = list(_cut(there, options.batch_size))
    mine = batches[index * len(batches) // count : (index + 1) * len(batches) // count]
    todo = [batch for batch in mine if not all(sample.id in done for sample in batch)]
    commit = short_commit(git_commit()) if git_commit() else __version__
    with naming(file):
        _end_last_line(file)
    with naming(file), file.open("a", encoding="utf-8") as stream:
        for lines in tqdm(
            _answers(chat, task, todo, options), task.name, len(todo), unit="batch", disable=not sys.stderr.isatty()
        ):
            stream.write("".join(json.dumps(line | {"commit": commit}, ensure_ascii=False) + "\n" for line in lines))
            stream.flush()
            os.fsync(stream.fileno())


Todo = tuple[Task, list[Sample], Path]
"""A task, its samples and its folder of results."""


def answer_on_devices(
    devices: Sequence[str],
    place: Mapping[str, Any],
    todo: Sequence[Todo],
    options: RunOptions,
    *,
    model: str,
    allow_missing: bool = False,
) -> None:
    """Answer samples in one process a device, each with its shard.

    Args:
        devices: of torch; one may come several times.
        place: other arguments of `VideoChat.from_pretrained`.
        todo: tasks.
        options: of the run.
        model: its name.
        allow_missing: leave out samples whose videos are not there.

    Raises:
        ValueError: a process ended before it was done; or what `answer_samples` raises in one.
    """
    with Workers(len(devices)) as pool:
        jobs = [
            pool.submit(
                _answer_shard, device, dict(place), list(todo), options, model, (number, len(devices)), allow_missing
            )
            for number, device in enumerate(devices)
        ]
        for job in jobs:
            job.result()


def _answer_shard(
    device: str,
    place: Mapping[str, Any],
    todo: Sequence[Todo],
    options: RunOptions,
    model: str,
    shard: tuple[int, int],
    allow_missing: bool,
) -> None:
    if device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // shard[1]))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    chat = VideoChat.from_pretrained(model, device=device, **place)
    chat.model.is_toy_told = True  # the results say it
    for task, samples, out in todo:
        answer_samples(chat, task, samples, out, options, model=model, shard=shard, allow_missing=allow_missing)


def read_answers(out: Path) -> dict[str, Line]:
    """Return the lines of all shards by sample id; the last of several, but answers before errors."""
    lines: dict[str, Line] = {}
    for file in sorted(out.glob("samples-*-of-*.jsonl")):
        for text in file.read_text("utf-8").split("\n"):
            line = read_json_line(text)
            if line is not None and ("error" not in line or str(line["id"]) not in lines):
                lines[str(line["id"])] = line
    return lines


def is_answered(samples: Sequence[Sample], out: Path) -> bool:
    """Return whether all samples that have videos were tried."""
    lines = read_answers(out)
    return all(sample.id in lines or not sample.video.exists() for sample in samples)


def judge_answers(
    task: Task,
    samples: Sequence[Sample],
    out: Path,
    endpoint: Endpoint,
    prompts: Mapping[str, JudgePrompt],
) -> list[str]:
    """Ask the judge about all answers that it was not asked about yet; return the errors.

    What was judged stays in `judgements.jsonl`; a changed answer, prompt or judge is judged anew.
    """
    assert task.judge is not None
    responses = {name: line["response"] for name, line in read_answers(out).items() if "error" not in line}
    kept = read_judgements(out)
    requests = [
        request
        for request in task.judge(samples, responses)
        if judgement_key(endpoint.model, prompts[request.aspect], request) not in kept
    ]
    errors = []
    file = out / "judgements.jsonl"
    _end_last_line(file)

    def ask(request: JudgeRequest) -> str:
        return endpoint.ask(prompts[request.aspect].messages(request)).text

    with naming(file), file.open("a", encoding="utf-8") as stream:
        replies = endpoint.map(ask, requests)
        for request, reply in tqdm(
            replies, f"{task.name}, judge", len(requests), unit="answer", disable=not sys.stderr.isatty()
        ):
            if isinstance(reply, EndpointError):
                errors.append(str(reply))
                continue
            line = {
                "key": judgement_key(endpoint.model, prompts[request.aspect], request),
                "id": request.id,
                "aspect": request.aspect,
                "video_id": request.video_id,
                "reply": reply,
                "judge": endpoint.model,
                "url": endpoint.url,
                "date": time.strftime("%Y-%m-%d"),
            }
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
            stream.flush()
    return errors


def read_judgements(out: Path) -> dict[str, Line]:
    """Return what the judge said, by the key of what it was asked."""
    file = out / "judgements.jsonl"
    lines = map(read_json_line, file.read_text("utf-8").split("\n")) if file.is_file() else ()
    return {str(line["key"]): line for line in lines if line is not None}


def judgement_key(judge: str, prompt: JudgePrompt, request: JudgeRequest) -> str:
    """Return a digest of all that a judgement depends on."""
    asked = [judge, request.aspect, request.id, prompt.messages(request)]
    return hashlib.sha256(json.dumps(asked, ensure_ascii=False).encode()).hexdigest()[:24]


def _cut(samples: Sequence[Sample], size: int) -> Iterator[list[Sample]]:
    for first in range(0, len(samples), size):
        yield list(samples[first : first + size])


def _end_last_line(file: Path) -> None:
    """End the line that a killed process left unfinished, or the next one would be glued to it."""
    if file.is_file() and file.stat().st_size:
        with file.open("rb+") as stream:
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                stream.write(b"\n")


def _config(chat: VideoChat, task: Task, samples: Sequence[Sample], options: RunOptions, model: str) -> dict[str, Any]:
    """Return what the answers depend on."""
    data = [
        # What only some samples have stands in their entries alone: digests of others stay what they were before it.
        [s.id, str(s.video.name), s.question, s.options, s.answer, s.start_s, s.end_s]
        + ([s.text, s.history] if s.text or s.history else [])
        for s in samples
    ]
    return {
        "task": task.name,
        "macro": task.macro,
        "model": model,
        "model_digest": model_digest(find_model(model)),
        "data_digest": hashlib.sha256(json.dumps(data, ensure_ascii=False).encode()).hexdigest()[:16],
        "num_samples": len(samples),
        "prompt": task.prompt(samples[0], ["(subtitles)"] if samples[0].subtitles else []),
        "num_frames": chat.processor.num_frames if options.fps is None else None,
        "max_new_tokens": task.max_new_tokens,
        "dtype": str(chat.model.dtype).removeprefix("torch."),
    } | {name: value for name, value in asdict(options).items() if value is not None}


def model_digest(folder: Path) -> str:
    """Return a digest of the weights and configuration in a model's folder."""
    files = [file for file in sorted(folder.iterdir()) if file.suffix in (".safetensors", ".bin", ".json", ".jinja")]
    digests = "".join(f"{file.name} {content_digest(file)}\n" for file in files)
    return hashlib.sha256(digests.encode()).hexdigest()[:16]


def _check_config(path: Path, config: dict[str, Any]) -> None:
    """Write the configuration of a new folder; of one with answers it must be the same."""
    with locked(path.with_name("lock")):
        plain = json.loads(json.dumps(config))
        if not path.is_file():
            write_json(path, plain)
            return
        known = json.loads(path.read_text("utf-8"))
        names = (plain.keys() | known.keys()) - {"model"}  # may have another path elsewhere; the digest tells
        differ = sorted(name for name in names if plain.get(name) != known.get(name))
        if differ:
            told = "; ".join(f"{name} was {known.get(name)!r}, is {plain.get(name)!r}" for name in differ)
            raise BenchmarkError(
                f"{path.parent} holds answers of another run ({told}); choose another folder, or remove it"
            )


def _answers(chat: VideoChat, task: Task, batches: Sequence[list[Sample]], options: RunOptions) -> Iterator[list[Line]]:
    """Yield the lines of each batch; the videos of the next one are encoded meanwhile."""
    known: dict[Clip, EncodedVideo | str] = {}
    # One thread that lives as long as the run: see `hicom.inference.writers`.
    with ThreadPoolExecutor(1, thread_name_prefix="hicom-eval") as pool:
        ahead = pool.submit(_encode, chat, batches[0], options, known) if batches else None
        for number, batch in enumerate(batches):
            assert ahead is not None
            known = ahead.result()
            if number + 1 < len(batches):
                ahead = pool.submit(_encode, chat, batches[number + 1], options, known)
            yield _answer_batch(chat, task, batch, known, options)


def _encode(
    chat: VideoChat, batch: Sequence[Sample], options: RunOptions, known: Mapping[Clip, EncodedVideo | str]
) -> dict[Clip, EncodedVideo | str]:
    """Return the videos of a batch, or why they cannot be read; those of the batch before are not encoded again."""
    encoded: dict[Clip, EncodedVideo | str] = {}
    for clip in map(clip_of, batch):
        if clip in encoded:
            continue
        if clip in known:
            encoded[clip] = known[clip]
            continue
        video, start_s, end_s, source_fps = clip
        choice: dict[str, Any] = {
            "num_frames": options.num_frames,
            "fps": options.fps,
            "max_frames": options.max_frames,
            "snap": options.snap,
        }
        try:
            encoded[clip] = chat.encode(video, start_s=start_s, end_s=end_s, source_fps=source_fps, **choice)
        except (VideoError, OSError) as error:
            encoded[clip] = str(error)
    return encoded


def _answer_batch(
    chat: VideoChat,
    task: Task,
    batch: Sequence[Sample],
    videos: Mapping[Clip, EncodedVideo | str],
    options: RunOptions,
) -> list[Line]:
    lines: dict[str, Line] = {}
    by_window: dict[Window | None, list[tuple[Sample, EncodedVideo, str]]] = {}
    for sample in batch:
        video = videos[clip_of(sample)]
        try:
            if isinstance(video, str):
                raise ValueError(video)
            shown = subtitles_at(read_subtitles(sample.subtitles), list(video.timestamps_s)) if sample.subtitles else []
        except (ValueError, OSError) as error:
            lines[sample.id] = {"id": sample.id, "error": str(error)}
            continue
        window = options.window
        if options.max_visual_tokens is not None:
            window = chat.processor.choose_window(video.num_frames, options.max_visual_tokens)
        by_window.setdefault(window, []).append((sample, video, task.prompt(sample, shown)))
    for window, some in by_window.items():
        start = time.perf_counter()
        answers = chat.ask_each(
            [video for _, video, _ in some],
            [prompt for _, _, prompt in some],
            instructions=[sample.question for sample, _, _ in some],
            histories=[sample.history for sample, _, _ in some],
            window=window,
            max_new_tokens=options.max_new_tokens or task.max_new_tokens,
        )
        seconds = round((time.perf_counter() - start) / len(some), 4)
        for (sample, video, prompt), answer in zip(some, answers, strict=True):
            line: Line = {"id": sample.id, "video_id": sample.video_id, "groups": dict(sample.groups)}
            line |= {"prompt": prompt, "instruction": answer.instruction, "response": answer.text}
            if sample.history:
                line["history"] = [dict(turn) for turn in sample.history]
            if sample.options:
                line["prediction"] = chosen_option(answer.text, sample.options)
                line["answer"] = sample.answer
                line["num_options"] = len(sample.options)
            elif task.text_scores:
                line["answer"] = sample.answer
            line |= {"num_frames": video.num_frames, "num_visual_tokens": answer.num_visual_tokens}
            line |= {"is_cut": answer.is_cut} | ({"notes": list(answer.notes)} if answer.notes else {})
            lines[sample.id] = line | {"window": answer.window, "seconds": seconds}
    return [lines[sample.id] for sample in batch]
