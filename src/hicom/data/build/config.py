"""What is built, out of what, and how."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

# Table A2 of the paper, its near-duplicate about finance included.
CATEGORIES = (
    "A video about cooking activity.",
    "A video about writing activity.",
    "A video about travel.",
    "A video about sight-seeing activity.",
    "A life record video about exercise.",
    "A life record video about daily life.",
    "A life record video about handcraft.",
    "A life record video about food.",
    "A TV news report video.",
    "A video about computer games.",
    "A video about sports.",
    "A video about football.",
    "A video about basketball.",
    "A video about pets and animals.",
    "A video about action movie scene.",
    "A video about comedy movie scene.",
    "A video about sci-fi movie scene.",
    "A video about crime movie scene.",
    "A video about horror movie scene.",
    "A video about magic show.",
    "A video about acrobatics.",
    "A documentary or TV show about humanity and history.",
    "A documentary or TV show about biography.",
    "A documentary or TV show about geography.",
    "A documentary or TV show about finance and commerce.",
    "A documentary or TV show about literature and art.",
    "A documentary or TV show about biology and medicine knowledge.",
    "A documentary or TV show about finance and commerce knowledge.",
    "A documentary or TV show about technology knowledge.",
)
# "not provide" and "not describe" are the paper's examples.
REFUSALS = (
    "not provide",
    "not describe",
    "not mention",
    "not specif",
    "not visible",
    "not shown",
    "no information",
    "cannot",
    "can't",
    "unable to",
    "as an ai",
    "i'm sorry",
)


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """The configuration of `hicom data build`; defaults are the paper's where it tells them.

    Attributes:
        videos: files, folders of them, and .txt files with a path a line.
        out: folder of the state, the clips and the data.
        seed: of the random part of the selection.
        num_workers: processes of the steps that work on videos; 0: none but this one.
        encoder: a dual encoder: a folder or hub id of SigLIP or CLIP, or of a checkpoint of this library.
        device: of the encoder; None: a GPU where there is one.
        categories: sentences that videos are compared with.
        per_category: videos chosen for each.
        num_random: videos drawn out of all others.
        frames_per_video: frames that stand for a video there.
        shot_threshold: PySceneDetect cuts where the content changes by more; its own default is 27, and the paper says
            "looser" than that of Panda-70M.
        min_shot_s: shorter shots are joined with their neighbours.
        keyframe_fps: frames a second that key frames are sought among.
        keyframe_similarity: a frame more similar than this to the last key frame is none (cosine).
        min_s: shortest clip.
        max_s: longest clip.
        url: base of an OpenAI-compatible endpoint that serves a vision-language model.
        model: its name there.
        num_concurrent: requests on their way at once.
        caption_frames: frames that it sees of a clip.
        frame_size: longest side of these, in pixels.
        max_tokens: longest reply.
        temperature: 0 for the likeliest reply.
        json_schema: hold the model to the form of pairs (`response_format` of OpenAI, vLLM, llama.cpp).
        prompt_price: of a million tokens read, in any currency.
        completion_price: of a million tokens written.
        num_pairs: instruction-description pairs asked for a clip.
        refusals: a description that holds one of these is dropped.
        min_words: of a description.
        clip_size: longest side of the clips that are written, in pixels; None: that of the video.
        near_duplicate: pairs whose sets of three-word runs overlap more than this (Jaccard) are one.
    """

    videos: tuple[str, ...]
    out: str
    seed: int = 0
    num_workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    encoder: str = "google/siglip-so400m-patch14-384"
    device: str | None = None
    categories: tuple[str, ...] = CATEGORIES
    per_category: int = 1500
    num_random: int = 10_000
    frames_per_video: int = 8
    shot_threshold: float = 35.0
    min_shot_s: float = 0.6
    keyframe_fps: float = 1.0
    keyframe_similarity: float = 0.85
    min_s: float = 5.0
    max_s: float = 120.0
    url: str | None = None
    model: str | None = None
    num_concurrent: int = 8
    caption_frames: int = 16
    frame_size: int = 448
    max_tokens: int = 1024
    temperature: float = 0.0
    json_schema: bool = False
    prompt_price: float = 0.0
    completion_price: float = 0.0
    num_pairs: int = 3
    refusals: tuple[str, ...] = REFUSALS
    min_words: int = 8
    clip_size: int | None = 768
    near_duplicate: float = 0.8

    def __post_init__(self) -> None:
        positive = (
            *("frames_per_video", "keyframe_fps", "max_s", "num_concurrent", "caption_frames"),
            *("frame_size", "max_tokens", "num_pairs", "shot_threshold"),
        )
        for name in positive:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: {getattr(self, name)}: give a positive number")
        for name in ("num_workers", "per_category", "num_random", "min_shot_s", "min_s", "min_words", "temperature"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)}: give a number from 0 on")
        for name in ("near_duplicate", "keyframe_similarity"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)}: give a number above 0, at most 1")
        if self.min_s > self.max_s:
            raise ValueError(f"min_s: {self.min_s} is more than max_s: {self.max_s}")
        if not self.videos:
            raise ValueError("videos: give files, folders, or .txt files with a path a line")


def read_config(path: Path) -> BuildConfig:
    """Return the configuration of a YAML file; relative paths start from its folder.

    Raises:
        ValueError: the file is missing or wrong; the message names the key.
    """
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: needs entries such as `videos: [folder]` and `out: folder`")
    known = {each.name: each for each in fields(BuildConfig)}
    values: dict[str, Any] = {}
    for name, value in content.items():
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=1)
            raise ValueError(f"{path}: no option {name!r}" + (f"; did you mean {nearest[0]!r}?" if nearest else ""))
        values[name] = _typed(value, str(known[name].type), f"{path}: {name}")
    for name in ("videos", "out"):
        if name not in values:
            raise ValueError(f"{path}: {name} is missing")
    values["videos"] = tuple(str(path.parent / each) for each in values["videos"])
    values["out"] = str(path.parent / values["out"])
    try:
        return BuildConfig(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _typed(value: Any, kind: str, name: str) -> Any:
    """Return a value of YAML as a field of type `kind` takes it."""
    if value is None and kind.endswith(" | None"):
        return None
    kind = kind.removesuffix(" | None")
    if kind.startswith("tuple"):
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
            raise ValueError(f"{name}: {value!r} is not a list of strings")
        return tuple(found)
    if kind == "bool":
        if not isinstance(value, bool):
            raise ValueError(f"{name}: {value!r} is neither true nor false")
        return value
    fits = isinstance(value, int if kind == "int" else int | float if kind == "float" else str)
    if isinstance(value, bool) or not fits:
        raise ValueError(f"{name}: {value!r} is not {'a number' if kind in ('int', 'float') else 'text'}")
    return float(value) if kind == "float" else value
