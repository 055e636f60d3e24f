"""What is done to one video at a time: pure functions of a row, run by processes of this machine or by Ray."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import av.logging
import torch

from ...files import UNWRITABLE
from ...video import FramesChanged, VideoError, open_frames, probe, read_frames, write_video
from ..check import run_apart

Row = dict[str, Any]
CRASHED = "working on it ended the process that did"
FRAMES_AT_ONCE = 32
"""That are held while a clip is written."""
MAX_FRAMES = 20_000
"""That key frames are sought among: more are thinned out evenly."""


def probed(row: Row) -> Row:
    """Return length and size of the video at `path`."""
    info = probe(row["path"])
    return {"duration_s": float(info.duration_s), "width": info.width, "height": info.height}


def similarities(row: Row, encoder: str, device: str | None, num_frames: int, categories: tuple[str, ...]) -> Row:
    """Return the similarity of the video at `path` to each sentence: that of the mean of its frames' embeddings."""
    model = _encoder(encoder, device)
    frames = read_frames(row["path"], num_frames=num_frames, size=model.size).frames
    video = torch.nn.functional.normalize(model.images(frames).mean(0), dim=0)
    return {"values": [round(float(value), 6) for value in _texts(encoder, device, categories) @ video]}


def shots(row: Row, threshold: float, min_shot_s: float) -> Row:
    """Return `[start_s, end_s]` of the shots of the video at `path`, found by PySceneDetect's content detector."""
    try:
        from scenedetect import ContentDetector, detect
    except ImportError as error:
        raise ImportError("splitting into shots needs scenedetect: pip install 'hicom[build]'") from error
    logging.getLogger("pyscenedetect").setLevel(logging.ERROR)
    detector = ContentDetector(threshold=threshold, min_scene_len=min_shot_s)
    try:
        found = detect(row["path"], detector, start_in_scene=True, backend="pyav")
    finally:
        av.logging.set_level(None)  # PySceneDetect makes FFmpeg write to stderr from then on
    return {"shots": [[round(start.seconds, 3), round(end.seconds, 3)] for start, end in found]}


def keyframes(row: Row, encoder: str, device: str | None, fps: float, similarity: float) -> Row:
    """Return the times of the key frames of the video at `path`.

    The first frame is one; after it each of the densely sampled frames that is less similar than `similarity` to the
    last key frame.
    """
    model = _encoder(encoder, device)
    video = read_frames(row["path"], fps=fps, max_frames=MAX_FRAMES, size=model.size)
    embedded = model.images(video.frames)
    times, last = [], None
    for embedding, time_s in zip(embedded, video.timestamps_s, strict=True):
        if last is None or float(embedding @ last) < similarity:
            times.append(round(float(time_s), 3))
            last = embedding
    return {"times": times}


def cut(row: Row, size: int | None) -> Row:
    """Write the part of the video at `path` from `start_s` to `end_s` to the file `out`, without sound.

    Sides are scaled down to at most `size` pixels, and cut to even numbers, which H.264 needs.
    """
    while True:
        reader = open_frames(row["path"], start_s=row["start_s"], end_s=row["end_s"], size=size)
        chunks = reader.chunks(FRAMES_AT_ONCE)
        try:
            frames = (frame[: len(frame) // 2 * 2, : frame.shape[1] // 2 * 2] for chunk in chunks for frame in chunk)
            write_video(Path(row["out"]), frames, reader.info.fps or 25.0)
        except FramesChanged:
            continue  # some are damaged, and the reader has chosen others
        return {"num_frames": len(reader.timestamps_s)}


@cache
def _encoder(name: str, device: str | None) -> Any:
    from .encoder import DualEncoder

    return DualEncoder(name, device)


@cache
def _texts(name: str, device: str | None, texts: tuple[str, ...]) -> torch.Tensor:
    found: torch.Tensor = _encoder(name, device).texts(texts)
    return found


WORK: dict[str, Callable[..., Row]] = {
    function.__name__: function for function in (probed, similarities, shots, keyframes, cut)
}


def done(name: str, row: Row, options: Mapping[str, Any]) -> Row:
    """Return the row's `id` with what the function `name` makes of it, or with `error` where it cannot be read.

    Raises:
        OSError: what is made of it cannot be written, which no other video would be better for.
    """
    torch.set_num_threads(1)  # several of these run side by side
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return {"id": row["id"], **WORK[name](row, **options)}
    except (VideoError, OSError) as error:
        if isinstance(error, OSError) and "out" in row and error.errno in UNWRITABLE and error.filename == row["out"]:
            raise
        return {"id": row["id"], "error": " ".join(str(error).split())}


def run_here(name: str, rows: Sequence[Row], options: Mapping[str, Any], num_workers: int) -> Iterator[Row]:
    """Yield what becomes of the rows, in any order, done by processes of this machine.

    With 0 of them it is done here; else a video that takes its process down with it costs nothing but itself.
    """
    if num_workers == 0:
        yield from (done(name, row, options) for row in rows)
        return
    tasks = [(name, row, dict(options)) for row in rows]
    nothing: Row = {}
    for number, result in run_apart(tasks, num_workers, done, nothing):
        yield result or {"id": rows[number]["id"], "error": CRASHED}


def run_on_ray(name: str, rows: Sequence[Row], options: Mapping[str, Any], num_workers: int) -> Iterator[Row]:
    """Yield what becomes of the rows, done by a map of Ray Data; an own cluster is started where there is none."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError("this needs Ray: pip install 'hicom[ray]'") from error
    if not ray.is_initialized():
        # Workers import this package from where this process has it.
        source = str(Path(__file__).resolve().parents[3])
        ray.init(
            num_cpus=num_workers,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"}},
        )
    ray.data.DataContext.get_current().enable_progress_bars = False
    texts = [{"row": json.dumps(row)} for row in rows]
    if not texts:
        return
    dataset = ray.data.from_items(texts, override_num_blocks=min(len(texts), 4 * num_workers))
    mapped = dataset.map(RayWork, fn_constructor_args=(name, dict(options)), concurrency=num_workers, num_cpus=1)
    for each in mapped.iter_rows():
        yield json.loads(each["row"])


class RayWork:
    """A function of `WORK` as Ray Data takes it: rows as JSON, so that no type is lost on the way.

    Args:
        name: of the function.
        options: its arguments beside the row.
    """

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self.name, self.options = name, options

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the row that became of one."""
        return {"row": json.dumps(done(self.name, json.loads(row["row"]), self.options))}
