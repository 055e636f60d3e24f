"""The frozen vision tower's features of every training video, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..files import naming, write_text
from ..locks import claimed, locked
from ..model.modeling import HIComForConditionalGeneration
from ..model.processing import HIComProcessor
from ..video import VideoError, split_bounds

logger = logging.getLogger(__name__)

NUM_PARTS = 64
"""Processes that need the same features share the videos out in so many parts."""

OnBadVideo = Literal["stop", "skip"]
"""What an unreadable video does: it stops the run, or all its samples are left out, counted and named in a warning."""


@dataclass(frozen=True)
class Place:
    """Where the frames of one video lie in a store."""

    start: int
    num_frames: int


class FeatureStore:
    """Features of many videos in one growing file, read through a memory map.

    The folder holds `key.json` (what the features depend on), `values.bin` and `keys.bin` (float16, frame after frame)
    and `index.jsonl`, one line a video, written after its features: what an interrupted run left beyond the last line
    is overwritten.

    Attributes:
        errors: videos that could not be read, with the reason.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key: dict[str, Any] = json.loads((folder / "key.json").read_text("utf-8"))
        self.places: dict[str, Place] = {}
        self.errors: dict[str, str] = {}
        self.num_frames = 0
        self._stamps: dict[str, list[int]] = {}
        self._maps: dict[str, np.ndarray] = {}
        self._read = 0
        self.refresh()

    def __contains__(self, video: Path) -> bool:
        name = str(video.resolve())
        return name in self.places and self._stamps[name] == stamp(video)

    def read(self, videos: Iterable[Path], name: Literal["values", "keys"]) -> Tensor:
        """Return `float16[F, h, w, D]`, the features of `videos`, one video after the other."""
        if name not in self._maps:
            shape = (self.num_frames, *self.key[name])
            self._maps[name] = np.memmap(self.folder / f"{name}.bin", np.float16, "r", shape=shape)
        places = [self.places[str(video.resolve())] for video in videos]
        return torch.from_numpy(np.concatenate([self._maps[name][p.start : p.start + p.num_frames] for p in places]))

    def counts(self, videos: Iterable[Path]) -> list[int]:
        """Return the number of frames of every video."""
        return [self.places[str(video.resolve())].num_frames for video in videos]

    def _enter(self, entry: dict[str, Any]) -> None:
        name = entry["video"]
        self._stamps[name] = entry["stamp"]
        if "error" in entry:
            self.errors[name] = entry["error"]
            self.places.pop(name, None)
            return
        self.errors.pop(name, None)
        self.places[name] = Place(entry["start"], entry["num_frames"])
        self.num_frames = entry["start"] + entry["num_frames"]

    def refresh(self) -> None:
        """Take in what other processes have added; a last line that was cut off is removed from the index."""
        path = self.folder / "index.jsonl"
        if not path.exists():
            return
        with path.open("r+b") as file:
            file.seek(self._read)
            data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._read += len(whole)
            if len(whole) < len(data):
                file.truncate(self._read)
        for line in whole.splitlines():
            self._enter(json.loads(line))
        self._maps.clear()

    def append(self, video: Path, features: dict[str, np.ndarray] | str) -> None:
        """Add the features of one video, or the reason why it has none; only while holding the store's lock."""
        self.refresh()
        entry: dict[str, Any] = {"video": str(video.resolve()), "stamp": stamp(video)}
        if isinstance(features, str):
            entry["error"] = features
        else:
            entry |= {"start": self.num_frames, "num_frames": len(features["values"])}
            for name, array in features.items():
                path = self.folder / f"{name}.bin"
                with naming(path), path.open("r+b") as file:
                    file.seek(self.num_frames * int(np.prod(self.key[name])) * 2)
                    file.write(array.tobytes())
        path = self.folder / "index.jsonl"
        with naming(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self.refresh()


def stamp(video: Path) -> list[int]:
    """Return what tells that a file is still the one that was read: its size and time of change."""
    file = Path(split_bounds(video)[0])
    if not file.is_file():
        return [0, 0]
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def part_of(video: Path) -> int:
    """Return the number of the part that a video is in when processes share the work."""
    return hashlib.blake2b(str(video.resolve()).encode(), digest_size=1).digest()[0] % NUM_PARTS


def tower_digest(model: HIComForConditionalGeneration) -> str:
    """Return a digest of the vision tower's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.model.vision_tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def feature_key(model: HIComForConditionalGeneration, processor: HIComProcessor, num_frames: int) -> dict[str, Any]:
    """Return all that the features of a video depend on beside its file."""
    config, grid = model.config, model.config.grid_size
    key = {
        "tower": tower_digest(model),
        "layer": config.vision_feature_layer,
        "num_frames": num_frames,
        "dtype": "float16",
        "values": [grid, grid, config.vision_config.hidden_size],
    } | processor.pixels_key
    return key | ({"keys": [grid, grid, config.instruction_dim]} if config.is_conditional else {})


@torch.no_grad()
def cache_features(
    model: HIComForConditionalGeneration,
    processor: HIComProcessor,
    videos: Iterable[Path],
    folder: Path,
    *,
    num_frames: int,
    on_bad_video: OnBadVideo = "stop",
    batch_frames: int = 64,
) -> FeatureStore:
    """Return a store with the features of `videos`; those that it lacks are computed, also after an interruption.

    Processes that call this at the same time, those of one run or of several, share what there is to compute.

    Args:
        model: its vision tower is used as it is.
        processor: the model's.
        videos: files; each counts once.
        folder: holds one store for every tower and frame choice.
        num_frames: frames of every video, spread evenly.
        on_bad_video: `stop` or `skip`.
        batch_frames: about how many frames the tower takes at once.

    Raises:
        ValueError: a video cannot be read and `on_bad_video` is `stop`, or features exceed float16.
    """
    key = feature_key(model, processor, num_frames)
    text = json.dumps(key, indent=1)
    place = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
    place.mkdir(parents=True, exist_ok=True)
    with locked(place / "lock"):
        if not (place / "key.json").exists():
            for name in ("values", "keys"):
                (place / f"{name}.bin").touch()
            write_text(place / "key.json", text)
        store = FeatureStore(place)
    wanted = list(dict.fromkeys(videos))
    parts: dict[int, list[Path]] = {}
    for video in wanted:
        if video not in store:
            parts.setdefault(part_of(video), []).append(video)
    # Processes share the work: each takes parts that no other is at, and at the end waits for those that others are at,
    # which leaves something to do only where one of them was stopped.
    with tqdm(total=sum(map(len, parts.values())), desc="vision features", unit="video", delay=2) as bar:
        for wait in (False, True):
            for number in list(parts):
                with claimed(place / f"part-{number}.lock", wait=wait) as is_mine:
                    if is_mine:
                        fill(store, model, processor, parts[number], num_frames, on_bad_video, batch_frames)
                        bar.update(len(parts.pop(number)))
    with locked(place / "lock"):
        store.refresh()
    bad = [video for video in wanted if str(video.resolve()) in store.errors]
    if bad:
        reasons = "; ".join(store.errors[str(video.resolve())] for video in bad[:5])
        logger.warning("%d of %d videos cannot be read and are left out: %s", len(bad), len(wanted), reasons)
    return store


def fill(
    store: FeatureStore,
    model: HIComForConditionalGeneration,
    processor: HIComProcessor,
    videos: list[Path],
    num_frames: int,
    on_bad_video: OnBadVideo,
    batch_frames: int,
) -> None:
    """Compute what a store lacks of some videos; arguments as in `cache_features`."""
    with locked(store.folder / "lock"):
        store.refresh()
    missing = [video for video in videos if video not in store]
    waiting: list[tuple[Path, Tensor]] = []
    for video, pixels in read_ahead(processor, missing, num_frames):
        if isinstance(pixels, VideoError):
            if on_bad_video == "stop":
                raise ValueError(f"{pixels}; repair the file, or train with on_bad_video='skip'") from pixels
            with locked(store.folder / "lock"):
                store.append(video, str(pixels))
            continue
        waiting.append((video, pixels))
        if sum(len(pixels) for _, pixels in waiting) >= batch_frames:
            encode(model, store, waiting)
    encode(model, store, waiting)


def read_ahead(
    processor: HIComProcessor, videos: Iterable[Path], num_frames: int, *, workers: int = 2, ahead: int = 8
) -> Iterator[tuple[Path, Tensor | VideoError]]:
    """Yield every video with its frames' pixel values, or why it cannot be read, in order.

    Videos are decoded in threads while the vision tower is at work. No more than `ahead` of them wait, since each may
    be large: 32 frames of 384x384 pixels are 57 MB.
    """

    def read(video: Path) -> Tensor | VideoError:
        try:
            return processor.pixel_values(processor.read_video(video, num_frames=num_frames).frames)
        except VideoError as error:
            return error

    left = iter(videos)
    pool = ThreadPoolExecutor(workers)
    try:
        queue = deque((video, pool.submit(read, video)) for video in islice(left, ahead))
        while queue:
            video, result = queue.popleft()
            yield video, result.result()
            queue.extend((video, pool.submit(read, video)) for video in islice(left, 1))
    finally:
        # A caller that stops at a bad video does not want the rest.
        pool.shutdown(cancel_futures=True)


def encode(model: HIComForConditionalGeneration, store: FeatureStore, waiting: list[tuple[Path, Tensor]]) -> None:
    """Add the features of the waiting videos to the store."""
    if not waiting:
        return
    counts = [len(pixels) for _, pixels in waiting]
    features = model.encode_frames(torch.cat([pixels for _, pixels in waiting]).to(model.device))
    arrays: dict[str, Any] = {"values": features.values}
    if features.keys is not None:
        arrays["keys"] = features.keys
    parts = {name: x.to("cpu", torch.float16).split(counts) for name, x in arrays.items()}
    for i, (video, _) in enumerate(waiting):
        if not all(bool(x[i].isfinite().all()) for x in parts.values()):
            raise ValueError(f"the features of {video} exceed float16; train from pixels (cache=None)")
        with locked(store.folder / "lock"):
            store.append(video, {name: x[i].numpy() for name, x in parts.items()})
    waiting.clear()
