"""Videos as the compressor needs them: decoded, encoded and, where nothing is to be kept, compressed in chunks.

Frames come chunk by chunk from `hicom.video`, the next ones while the vision tower is at work on the last ones, so
memory holds a few chunks of pixels whatever the length of the video. Features of all frames are kept, because every
question compresses them in its own way; `keep_features=False` compresses for questions known beforehand and keeps
their visual tokens alone.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .data.cache import Entry, FeatureCache, content_digest
from .data.domain import summarize
from .data.features import tower_digest
from .model.compressor import CompressorStream, HybridCompressor
from .model.generation import check_finite
from .model.instruction import extract_instruction
from .model.modeling import HIComForConditionalGeneration, VisionFeatures
from .model.ops import Window
from .model.processing import HIComProcessor
from .video import FrameReader, FramesChanged, VideoInfo, read_frames

FRAMES_PER_PASS = 32
"""Frames that the vision tower takes at once: bounds its memory, and is large enough to keep it busy."""
CHUNKS_AHEAD = 2
"""Chunks of frames that may wait for the vision tower."""
MEMORY_SHARE = 0.8
"""Of the free memory, what features may take: the rest is for pixels, the tower's own work and the LLM."""
MAX_SUMMARIES = 128
"""Frames that a video's summary is made of, at most twice as many while it grows."""


class Steering(NamedTuple):
    """What visual tokens depend on beside the video: the instruction ("" where none steers) and the window."""

    instruction: str
    window: Window | None


@dataclass
class EncodedVideo:
    """A video as the compressor needs it.

    Attributes:
        features: patch features of the chosen frames, for whatever will be asked; None where they are not kept.
        timestamps_s: presentation times of the frames in seconds, `float64[T]`.
        info: what the file says of itself.
        grid_size: height and width of the patch grid of a frame.
        summary: `float[S, 2D]`, statistics of the features of each frame (`hicom.data.domain.summarize`), or of
            some that are spread evenly over them where there are many.
        timings: seconds by part: `decode`, which the vision encoder waited for frames, and `vision encoder`.
        tokens: visual tokens `float[N, C]` that are there already.
    """

    features: VisionFeatures | None
    timestamps_s: np.ndarray
    info: VideoInfo
    grid_size: int
    summary: Tensor
    timings: dict[str, float] = field(default_factory=dict)
    tokens: dict[Steering, Tensor] = field(default_factory=dict)
    _moving: _Moving | None = field(default=None, repr=False, compare=False)

    @property
    def num_frames(self) -> int:
        """Frames that were encoded."""
        return len(self.timestamps_s)

    @property
    def num_patches(self) -> int:
        """Patches of all frames: the visual tokens that a model without compression would spend."""
        return self.num_frames * self.grid_size**2

    @property
    def kept_features(self) -> VisionFeatures:
        """The features.

        Raises:
            ValueError: they were not kept.
        """
        if self.features is None:
            asked = "; ".join(f"{s.instruction!r} (window {s.window})" for s in self.tokens) or "none"
            raise ValueError(
                f"{self.info.name}: its features were not kept; it answers only what it was compressed for: {asked}; "
                "encode it for these questions, or with keep_features=True"
            )
        return self.features

    @torch.inference_mode()
    def features_for(self, model: HIComForConditionalGeneration) -> VisionFeatures:
        """Return the features as a model's compressor takes them; its motion is worked out once for all questions.

        Raises:
            ValueError: features were not kept.
        """
        features = self.kept_features
        motion = getattr(model.model.compressor, "motion", None)
        if motion is None:
            return features
        # Weights count their changes: a model that trains on finds no features of its former self here.
        state = tuple(0 if p.is_inference() else p._version for p in motion.parameters())
        if self._moving is None or self._moving.motion is not motion or self._moving.state != state:
            self._moving = _Moving(motion, state, model.model.add_motion(features, [self.num_frames]))
        return self._moving.features


class _Moving(NamedTuple):
    """Features with the motion features of one compressor, and which one in which state."""

    motion: nn.Module
    state: tuple[int, ...]
    features: VisionFeatures


class LiveVideo:
    """A video whose frames arrive over time; `VideoChat.live` makes one, and `VideoChat.ask` takes it at any moment.

    Args:
        model: encodes and compresses.
        processor: the model's.
        questions: what will be asked, where features are not kept.
        keep_features: whether features of all frames are kept, so that anything can be asked.
        window: (T, H, W) that the questions will be compressed with; None: the model's.
        num_frames: number of frames where it is known; saves memory, and pointers need it without features.
        name: of the video, in messages.
        fps: frames a second, for frames without times.

    Raises:
        ValueError: nothing is kept and nothing asked, or the model's compressor cannot work in chunks.
    """

    def __init__(
        self,
        model: HIComForConditionalGeneration,
        processor: HIComProcessor,
        *,
        questions: Sequence[str] = (),
        keep_features: bool = True,
        window: Window | None = None,
        num_frames: int | None = None,
        name: str = "live video",
        fps: float = 1.0,
    ) -> None:
        self.model, self.processor = model, processor
        self.name, self.fps = name, fps
        self.timings: dict[str, float] = {}
        self._times: list[float] = []
        self._size = (0, 0)
        self._values = _Rows(num_frames) if keep_features else None
        self._keys = _Rows(num_frames) if keep_features else None
        self._summaries: list[Tensor] = []
        self._summary_step = 1  # of so many frames one is summarized
        self._streams: dict[Steering, CompressorStream] = {}
        if keep_features:
            return
        if not questions:
            raise ValueError(
                f"{name}: keep_features=False needs the questions that will be asked; pass questions=[...]"
            )
        if not model.model.compressor.has_modes:
            raise ValueError(
                f"{name}: keep_features=False needs the compressor hicom, which works in chunks; this model has "
                f"{model.config.compressor}"
            )
        if any(parameter.is_meta for parameter in model.model.compressor.parameters()):
            raise ValueError(
                f"{name}: keep_features=False needs a compressor in memory; give model.compressor a device in "
                "device_map, or keep features"
            )
        for question in questions:
            steering = steering_of(model, extract_instruction(question), window)
            self._streams[steering] = self._start_stream(model.model.compressor, steering, num_frames)

    def _start_stream(
        self, compressor: HybridCompressor, steering: Steering, num_frames: int | None
    ) -> CompressorStream:
        pooled = tokens = mask = None
        if self.model.config.is_conditional:
            ids, mask = instruction_inputs(self.model, self.processor, [steering.instruction])
            assert ids is not None
            with torch.inference_mode():
                pooled, tokens = self.model.model.encode_instruction(ids, mask)
            mask = self.model.model.instruction_mask(ids, mask)
        return compressor.stream(pooled, tokens, mask, window=steering.window, num_frames=num_frames)

    @property
    def num_frames(self) -> int:
        """Frames that have arrived."""
        return len(self._times)

    def push(self, frames: np.ndarray, timestamps_s: Sequence[float] | None = None) -> None:
        """Take the next frames.

        Args:
            frames: `uint8[t, H, W, 3]`, RGB.
            timestamps_s: their times in seconds; None: they go on at `fps`.

        Raises:
            ValueError: frames or times have a wrong form, or times do not grow.
        """
        if frames.ndim != 4 or len(frames) == 0:
            raise ValueError(f"{self.name}: push frames as uint8[t, H, W, 3], got {frames.dtype}{list(frames.shape)}")
        # As a file's frames, so that it makes no difference how they come.
        pixels = self.processor.pixel_values(read_frames(frames, size=self.processor.reading_size).frames)
        if timestamps_s is None:
            start = self._times[-1] + 1 / self.fps if self._times else 0.0
            timestamps_s = [start + i / self.fps for i in range(len(frames))]
        times = [float(second) for second in timestamps_s]
        if len(times) != len(frames):
            raise ValueError(f"{self.name}: {len(times)} timestamps_s for {len(frames)} frames; give one each")
        known = [*self._times[-1:], *times]
        if any(not a < b for a, b in pairwise(known)):
            raise ValueError(f"{self.name}: timestamps_s must grow from frame to frame; got {known[:8]}")
        self._size = (frames.shape[2], frames.shape[1])
        for first in range(0, len(pixels), FRAMES_PER_PASS):
            part = slice(first, first + FRAMES_PER_PASS)
            self._take(pixels[part], times[part])

    @torch.inference_mode()
    def _take(self, pixels: Tensor, times: Sequence[float]) -> None:
        """Encode frames that are ready for the vision tower, and compress or keep them."""
        device = self.model.device
        with timed(self.timings, "vision encoder", device):
            features = self.model.encode_frames(pixels.to(device))
            check_finite(features.values, f"features of {self.name}")
        if self._streams:
            with timed(self.timings, "compressor", device):
                for stream in self._streams.values():
                    stream.push(features.values, features.keys)
        if self._values is not None and self._keys is not None:
            self._values.append(features.values)
            if features.keys is not None:
                self._keys.append(features.keys)
        due = [i for i in range(len(pixels)) if (len(self._times) + i) % self._summary_step == 0]
        self._summaries.extend(summarize(features.values[due]))
        while len(self._summaries) > 2 * MAX_SUMMARIES:
            self._summaries, self._summary_step = self._summaries[::2], 2 * self._summary_step
        self._times.extend(times)

    @property
    def video(self) -> EncodedVideo:
        """The video so far. Frames that arrive later do not change it.

        Raises:
            ValueError: no frame has arrived.
        """
        if not self._times:
            raise ValueError(f"{self.name}: no frame has arrived; push some before asking")
        duration_s = self._times[-1] - self._times[0] + 1 / self.fps
        info = VideoInfo(
            name=self.name,
            container="live",
            codec="raw",
            duration_s=duration_s,
            num_frames=self.num_frames,
            fps=self.num_frames / duration_s,
            width=self._size[0],
            height=self._size[1],
        )
        return self._encoded(np.array(self._times), info)

    @torch.inference_mode()
    def _encoded(self, timestamps_s: np.ndarray, info: VideoInfo) -> EncodedVideo:
        features = None
        if self._values is not None and self._keys is not None:
            features = VisionFeatures(self._values.read(), self._keys.read() if self._keys.size else None)
        with timed(self.timings, "compressor", self.model.device) if self._streams else nullcontext():
            tokens = {steering: stream.peek() for steering, stream in self._streams.items()}
        grid = self.model.config.grid_size
        summary = torch.stack(self._summaries)
        return EncodedVideo(features, timestamps_s, info, grid, summary, dict(self.timings), tokens)


class _Rows:
    """Tensors joined along their first axis, without a second copy of what is there once the length is known."""

    def __init__(self, length: int | None) -> None:
        self.size = 0
        self._length = length
        self._rows: Tensor | None = None

    def append(self, part: Tensor) -> None:
        needed = self.size + len(part)
        if self._rows is None or needed > len(self._rows):
            larger = part.new_empty(max(needed, self._length or 0, self.size + self.size // 2), *part.shape[1:])
            if self._rows is not None:
                larger[: self.size] = self.read()
            self._rows = larger
        self._rows[self.size : needed] = part
        self.size = needed

    def read(self) -> Tensor:
        """Return a view; what is appended later lies behind it."""
        assert self._rows is not None
        return self._rows[: self.size]


def encode_video(
    model: HIComForConditionalGeneration,
    processor: HIComProcessor,
    source: Any,
    choice: Mapping[str, Any],
    *,
    cache: FeatureCache | None = None,
    questions: Sequence[str] = (),
    keep_features: bool = True,
    window: Window | None = None,
    max_visual_tokens: int | None = None,
) -> EncodedVideo:
    """Decode and encode a video in chunks; see `VideoChat.encode`."""
    if questions and keep_features:
        raise ValueError("questions are compressed for while encoding with keep_features=False only; else ask later")
    if keep_features and (window is not None or max_visual_tokens is not None):
        raise ValueError("window and max_visual_tokens are chosen when asking; with keep_features=False here")
    key, given = None, source.source if isinstance(source, FrameReader) else source
    if cache is not None and keep_features:
        key = cache_key(model, processor, given, choice)
    if key is None or cache is None:
        return _encode(model, processor, source, choice, questions, keep_features, window, max_visual_tokens)
    with cache.building(key):
        start = time.perf_counter()
        entry = cache.read(key, model.device)
        if entry is not None:
            timings = {"decode": 0.0, "vision encoder": 0.0, "cache": time.perf_counter() - start}
            return _from_entry(entry, model, timings, str(given) if not isinstance(given, bytes) else None)
        video = _encode(model, processor, source, choice, questions, keep_features, window, max_visual_tokens)
        cache.write(key, _to_entry(video))
    return video


def _encode(
    model: HIComForConditionalGeneration,
    processor: HIComProcessor,
    source: Any,
    choice: Mapping[str, Any],
    questions: Sequence[str],
    keep_features: bool,
    window: Window | None,
    max_visual_tokens: int | None,
) -> EncodedVideo:
    timings: dict[str, float] = {}
    with timed(timings, "decode"):
        reader = processor.open_video(source, **choice)
    while True:
        number = len(reader.timestamps_s)
        if keep_features:
            check_memory(reader.info.name, number, feature_bytes(model), model.device)
        if max_visual_tokens is not None:
            if window is not None:
                raise ValueError("window and max_visual_tokens both choose the window; pass one of them")
            window = processor.choose_window(number, max_visual_tokens)
        live = LiveVideo(
            model,
            processor,
            questions=questions,
            keep_features=keep_features,
            window=window,
            num_frames=number,
            name=reader.info.name,
        )
        try:
            times = iter(reader.timestamps_s)
            for pixels in _ahead(reader.chunks(FRAMES_PER_PASS), processor.pixel_values, timings):
                live._take(pixels, [float(next(times)) for _ in range(len(pixels))])
        except FramesChanged:
            continue  # some of the frames are damaged, and the reader has chosen others
        break
    encoded = live._encoded(reader.timestamps_s, reader.info)
    encoded.timings = timings | live.timings
    return encoded


def _ahead(
    chunks: Iterator[np.ndarray], prepare: Callable[[np.ndarray], Tensor], timings: dict[str, float]
) -> Iterator[Tensor]:
    """Yield chunks, prepared, while a thread is at the next ones; count the seconds that the caller waits."""

    def take() -> Tensor | None:
        frames = next(chunks, None)
        return None if frames is None else prepare(frames)

    pool = ThreadPoolExecutor(1)
    try:
        waiting = deque(pool.submit(take) for _ in range(CHUNKS_AHEAD))
        while True:
            with timed(timings, "decode"):
                pixels = waiting.popleft().result()
            if pixels is None:
                return
            waiting.append(pool.submit(take))
            yield pixels
    finally:
        pool.shutdown(cancel_futures=True)


# What is kept on disk


def cache_key(
    model: HIComForConditionalGeneration, processor: HIComProcessor, source: Any, choice: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return all that features depend on; None for sources that are not cached (folders, arrays, open files)."""
    content = content_digest(source)
    if content is None:
        return None
    config = model.config
    return {
        "version": 2,  # 1: with one summary of all frames
        "content": content,
        "choice": {name: _plain(value) for name, value in sorted(choice.items()) if value is not None},
        "num_frames": processor.num_frames,
        "tower": tower_digest(model),
        "layer": config.vision_feature_layer,
        "dialect": config.dialect,
        "has_keys": config.is_conditional,
        "dtype": str(model.dtype),
        "device": model.device.type,
    } | processor.pixels_key


def _plain(value: Any) -> Any:
    return (
        [float(x) for x in value] if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str) else value
    )


def _to_entry(video: EncodedVideo) -> Entry:
    features = video.kept_features
    tensors = {"values": features.values, "summary": video.summary}
    tensors["timestamps_s"] = torch.from_numpy(np.ascontiguousarray(video.timestamps_s))
    if features.keys is not None:
        tensors["keys"] = features.keys
    return Entry(tensors, {"info": asdict(video.info)})


def _from_entry(
    entry: Entry, model: HIComForConditionalGeneration, timings: dict[str, float], name: str | None
) -> EncodedVideo:
    facts = dict(entry.facts["info"])
    info = VideoInfo(**facts | {"streams": tuple(facts["streams"]), "name": name or facts["name"]})
    features = VisionFeatures(entry.tensors["values"], entry.tensors.get("keys"))
    times = entry.tensors["timestamps_s"].cpu().numpy()
    return EncodedVideo(features, times, info, model.config.grid_size, entry.tensors["summary"], timings)


# Memory


def feature_bytes(model: HIComForConditionalGeneration) -> int:
    """Return the bytes that the features of one frame take, with and without motion where the compressor has it."""
    config = model.config
    width = config.vision_config.hidden_size + (config.instruction_dim if config.is_conditional else 0)
    return int(config.grid_size**2 * width * model.dtype.itemsize) * (2 if config.motion_features else 1)


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that are free on a device; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines)
    free = int(fields["MemAvailable"].split()[0]) * 1024
    limits = [_read_number(Path(f"/sys/fs/cgroup/memory.{name}")) for name in ("max", "current")]
    return free if None in limits else min(free, max(0, limits[0] - limits[1]))  # type: ignore[operator]


def _read_number(path: Path) -> int | None:
    try:
        text = path.read_text("utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def check_memory(name: str, num_frames: int, bytes_per_frame: int, device: torch.device) -> None:
    """Raise ValueError where the features of a video would not fit, before any work is done."""
    free = free_memory(device)
    if free is None or num_frames * bytes_per_frame <= MEMORY_SHARE * free:
        return
    fits = int(MEMORY_SHARE * free / bytes_per_frame)
    choose = f"at most {fits} frames (--num-frames {fits}), or " if fits else ""
    raise ValueError(
        f"{name}: the features of {num_frames} frames need {num_frames * bytes_per_frame / 1e9:.1f} GB, and "
        f"{free / 1e9:.1f} GB are free on {device}; choose {choose}a lower --fps, or keep no features (--low-memory; "
        "in Python keep_features=False)"
    )


# Shared with `hicom.inference`


def steering_of(model: HIComForConditionalGeneration, instruction: str, window: Window | None) -> Steering:
    """Return what visual tokens depend on, the model's own window written out."""
    own = getattr(model.model.compressor, "window", None)
    chosen = own if window is None else window
    return Steering(instruction if model.config.is_conditional else "", None if chosen is None else tuple(chosen))


def instruction_inputs(
    model: HIComForConditionalGeneration, processor: HIComProcessor, instructions: Sequence[str]
) -> tuple[Tensor | None, Tensor | None]:
    """Return `int[V, L]` ids and mask on the model's device; None where the model takes none."""
    if not model.config.is_conditional:
        return None, None
    ids, mask = processor.instruction_inputs(instructions)
    return ids.to(model.device), None if mask is None else mask.to(model.device)


@contextmanager
def timed(timings: dict[str, float], part: str, device: torch.device | None = None) -> Iterator[None]:
    """Add the seconds that a block takes to `timings[part]`, waiting for a GPU to finish it."""
    start = time.perf_counter()
    yield
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    timings[part] = timings.get(part, 0.0) + time.perf_counter() - start
