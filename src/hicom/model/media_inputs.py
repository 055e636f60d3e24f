"""Media as callers give them: in parts of a message or as arguments, one, many or nested; what is read of each.

Callers of a library are trusted, unlike clients of a server: files are opened wherever they are, and URLs are fetched
from any host, within bounds of time and size.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from av.video.frame import VideoFrame
from PIL import Image
from torch import Tensor
from transformers.video_utils import VideoMetadata

from ..video import VideoError, VideoFrames, VideoInfo
from ..video.sources import fetch_url, path_of_url
from .call_options import ALIASES, FRAME_CHOICE, PIXEL_SIZES, READING, check_pixels, nearest

Kind = Literal["video", "image"]

_TYPES: dict[str, Kind] = {
    "video": "video",
    "video_url": "video",
    "input_video": "video",
    "image": "image",
    "image_url": "image",
    "input_image": "image",
}
_TEXT_TYPES = ("text", "input_text", "output_text")
_SOURCES: dict[Kind, tuple[str, ...]] = {
    "video": ("video", "video_url", "frames", "path", "url", "base64"),
    "image": ("image", "image_url", "path", "url", "base64"),
}
_OPTIONS: dict[Kind, tuple[str, ...]] = {
    "video": (*FRAME_CHOICE, *ALIASES, *READING, "video_metadata", *PIXEL_SIZES),
    # `detail` is OpenAI's: a hint on the size of a picture, of which there is one here.
    "image": ("do_rescale", "input_data_format", *PIXEL_SIZES, "detail"),
}
_WAYS = ("num_frames", "fps", "timestamps_s", "do_sample_frames")
_PICTURE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Medium:
    """A video or an image of a call.

    Attributes:
        kind: `video` or `image`.
        source: anything `load_source` takes; None: its place is in the prompt, it comes beside the conversation.
        options: what is asked for it alone, under the names of `CallOptions`; goes before what the call asks for all.
    """

    kind: Kind
    source: Any = None
    options: dict[str, Any] = field(default_factory=dict)


# Parts of messages


def parse_part(part: Any, image_size: int) -> Medium | str:
    """Return the medium, or the text, that a part of a message holds.

    Args:
        part: text; or a dictionary with `type`, the text or the source, and options. Values that are None count as not
            there, as rows of data sets have them.
        image_size: height and width of the frames that the vision tower takes.

    Raises:
        ValueError: the type or a key is unknown, there are several sources, or an option cannot be.
    """
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise ValueError(f"a message part is a {type(part).__name__}; give text or a dictionary with a 'type'")
    given = {name: value for name, value in part.items() if value is not None}
    kind = given.pop("type", None)
    if kind is None:  # {"text": ...} and {"image": ...}, as some write them
        named = [name for name in ("text", "video", "image") if name in given]
        kind = named[0] if len(named) == 1 else None
    if kind in _TEXT_TYPES:
        text = given.pop("text", None)
        if not isinstance(text, str):
            raise ValueError(f"a message part of type={kind!r} needs 'text', a string; it is {text!r}")
        _refuse_unknown(given, ("text",), f"a message part of type={kind!r}")
        return text
    if kind not in _TYPES:
        raise ValueError(f"a message part has type={kind!r}; text, video and image exist")
    return _medium(_TYPES[kind], given, f"a message part of type={kind!r}", image_size)


def _medium(kind: Kind, given: dict[str, Any], where: str, image_size: int) -> Medium:
    """Return a medium of a part's keys without `type`."""
    _refuse_unknown(given, (*_SOURCES[kind], *_OPTIONS[kind]), where)
    sources = [name for name in _SOURCES[kind] if name in given]
    if len(sources) > 1:
        raise ValueError(f"{where} has {len(sources)} sources: {', '.join(sources)}; give one of them")
    source = given.pop(sources[0]) if sources else None
    if sources and sources[0] in ("video_url", "image_url") and isinstance(source, Mapping):
        inner = {name: value for name, value in source.items() if value is not None}
        _refuse_unknown(inner, ("url", *_OPTIONS[kind]), f"{where}: {sources[0]}")
        source = inner.pop("url", None)
        given = inner | given
        if source is None:
            raise ValueError(f"{where} needs a 'url' in {sources[0]!r}")
    if sources == ["base64"]:
        source = _decode(source, where)
    options: dict[str, Any] = {}
    for name, value in given.items():
        if name == "detail":
            continue
        if name in PIXEL_SIZES:
            check_pixels(name, value, image_size, f"{where}: ")
        own = ALIASES.get(name, name)
        if own in options:
            raise ValueError(f"{where}: {name} and {own} are two names of one option; give one of them")
        options[own] = value
    if options and source is None:
        raise ValueError(f"{where} has {', '.join(options)}, but no {kind}; put its source beside them")
    return Medium(kind, source, options)


def _refuse_unknown(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"{where} has an unknown key {name!r}{nearest(str(name), known)}")


# Arguments of a call


def as_media(kind: Kind, given: Any, image_size: int) -> tuple[list[Medium], list[int] | None]:
    """Return the media that an argument `videos` or `images` holds, and how many each prompt has where it says so.

    As in transformers, one medium, a list of them, and a list of such lists are taken. A list of pictures as `videos`
    is one video. Paths in a list are a video each; in a list inside of it, paths of pictures are the frames of one.

    Args:
        kind: `video` or `image`.
        given: sources as `load_source` takes them, `Medium`s, or dictionaries like a message's parts.
        image_size: height and width of the frames that the vision tower takes.
    """
    if given is None:
        return [], None
    if not _is_many(kind, given, is_inner=False):
        return [_one(kind, given, image_size)], None
    per_place = [[] if each is None else each for each in given]  # None: a prompt without media
    is_nested = [_is_many(kind, each, is_inner=True) for each in per_place]
    media = [
        [_one(kind, one, image_size) for one in _flat(kind, each)] if nested else [_one(kind, each, image_size)]
        for each, nested in zip(per_place, is_nested, strict=True)
    ]
    counts = [len(each) for each in media] if is_nested and all(is_nested) else None
    return [one for each in media for one in each], counts


def _flat(kind: Kind, given: Sequence[Any]) -> list[Any]:
    """Return the media of a list inside of a list, at any depth."""
    result: list[Any] = []
    for each in given:
        result += _flat(kind, each) if _is_many(kind, each, is_inner=True) else [each]
    return result


def _is_many(kind: Kind, given: Any, *, is_inner: bool) -> bool:
    """Return whether an argument holds media, rather than being one."""
    if isinstance(given, np.ndarray | Tensor):
        return given.ndim == (5 if kind == "video" else 4)
    if not isinstance(given, list | tuple):
        return False
    if kind == "image":
        return True
    return not given or not all(_is_picture(each, is_inner) for each in given)


def _is_picture(source: Any, is_inner: bool) -> bool:
    if isinstance(source, np.ndarray | Tensor):
        return source.ndim == 3
    if isinstance(source, str | os.PathLike):
        return is_inner and os.fspath(source).lower().endswith(_PICTURE_SUFFIXES)
    return isinstance(source, Image.Image | VideoFrame)


def _one(kind: Kind, source: Any, image_size: int) -> Medium:
    if isinstance(source, Medium):
        return source
    if isinstance(source, Mapping):
        part = parse_part({"type": kind, **source}, image_size)
        if not isinstance(part, Medium) or part.kind != kind or part.source is None:
            raise ValueError(f"{kind}s has {dict(source)}, which is no {kind} with a source")
        return part
    return Medium(kind, source)


def with_metadata(media: list[Medium], metadata: Any) -> list[Medium]:
    """Return videos with the metadata that a call gives for each, `None` for those that have none."""
    if metadata is None:
        return media
    entries = list(metadata) if isinstance(metadata, list | tuple) else [metadata]
    entries = [each for entry in entries for each in (entry if isinstance(entry, list | tuple) else [entry])]
    if len(entries) != len(media):
        raise ValueError(f"video_metadata describes {len(entries)} videos, but {len(media)} are given")
    return [
        each if entry is None else replace(each, options=each.options | {"video_metadata": entry})
        for each, entry in zip(media, entries, strict=True)
    ]


def check_places(kind: str, places: list[int], given: int, per_prompt: list[int] | None) -> None:
    """Raise ValueError where prompts have not as many placeholders as there are media."""
    if sum(places) != given:
        raise ValueError(
            f"the prompts have {sum(places)} {kind} placeholders, but {given} {kind}s are given; a literal <{kind}> in "
            f"a text stands for one, too"
        )
    if per_prompt is not None and len(places) > 1 and per_prompt != places:
        raise ValueError(f"the prompts have {places} {kind} placeholders, but their lists have {per_prompt} {kind}s")


def metadata_of(video: VideoFrames) -> VideoMetadata:
    """Return what transformers' video processors tell of a video; the numbers of frames are those at even times."""
    info = video.info
    return VideoMetadata(
        total_num_frames=info.num_frames,
        fps=info.fps,
        width=info.width,
        height=info.height,
        duration=info.duration_s,
        video_backend="pyav",
        frames_indices=[round(float(time_s) * info.fps) for time_s in video.timestamps_s],
    )


# Sources


def frame_choice(medium: Medium, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return what to read of a video: a source for `HIComProcessor.read_video`, and the choice of its frames.

    Args:
        medium: the video.
        options: of all videos of the call (`CallOptions.videos`); a way to choose frames that the video itself names
            takes the place of theirs.

    Raises:
        ValueError: options contradict each other or the source.
        VideoError: the source cannot be had.
    """
    own = medium.options
    if any(name in own for name in (*_WAYS, "max_frames")):
        options = {name: value for name, value in options.items() if name not in _WAYS}
    merged = {**options, **own}
    choice = {name: merged[name] for name in FRAME_CHOICE if name in merged}
    for name, value in choice.items():
        if name not in ("timestamps_s", "snap") and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(
                f"{name}={value!r}: give one number; videos that differ have options of their own in parts"
            )
    if merged.get("do_sample_frames") is False:
        asked: list[str] = [name for name in ("num_frames", "fps", "timestamps_s") if name in choice]
        if asked:
            raise ValueError(f"do_sample_frames=False takes all frames, but {asked[0]} is given; leave one of them out")
        choice.setdefault("max_frames", sys.maxsize)
    source = load_source(medium.source, merged)
    if isinstance(source, VideoFrames) and (asked := [name for name in FRAME_CHOICE if name in own]):
        raise ValueError(f"{asked[0]} chooses frames, but this video's frames are chosen already; leave it out")
    if (metadata := merged.get("video_metadata")) is not None:
        return _described(source, metadata, choice, merged.get("do_sample_frames"))
    return source, choice


def _described(source: Any, metadata: Any, choice: dict[str, Any], samples: bool | None) -> tuple[Any, dict[str, Any]]:
    """Return given frames with the times that their metadata tells, and what is left to choose of them."""
    if not isinstance(metadata, Mapping):
        raise ValueError(f"video_metadata is {metadata!r}; give a dictionary or a VideoMetadata")
    if not isinstance(source, np.ndarray | list | tuple):
        raise ValueError("video_metadata describes frames that are given; a file tells its own: give None for it")
    facts = dict(metadata)
    fps, indices, total = facts.get("fps"), facts.get("frames_indices"), facts.get("total_num_frames")
    if indices is None:
        if total is not None and total != len(source):
            raise ValueError(
                f"video_metadata tells of {total} frames, but {len(source)} are given; tell which by frames_indices"
            )
        if fps is not None:
            choice = {"source_fps": float(fps)} | choice
        return source, choice
    if len(indices) != len(source):
        raise ValueError(f"video_metadata has {len(indices)} frames_indices, but {len(source)} frames are given")
    asked = [name for name in choice if name != "max_frames" or choice[name] != sys.maxsize]
    if asked or samples:
        name = asked[0] if asked else "do_sample_frames"
        raise ValueError(f"{name} chooses frames, but frames_indices says that it is done; leave one of them out")
    frames = np.stack([np.asarray(each) for each in source]) if isinstance(source, list | tuple) else source
    if fps is None:
        raise ValueError("video_metadata has frames_indices, but no fps; frames have no times without it")
    height, width = frames.shape[1:3]
    info = VideoInfo(
        name=f"{len(frames)} frames",
        container="array",
        codec="raw",
        duration_s=float(facts.get("duration") or (total or indices[-1] + 1) / fps),
        num_frames=int(total or indices[-1] + 1),
        fps=float(fps),
        width=int(facts.get("width") or width),
        height=int(facts.get("height") or height),
    )
    return VideoFrames(frames, np.asarray(indices, dtype=np.float64) / float(fps), info), {}


def load_source(source: Any, options: Mapping[str, Any]) -> Any:
    """Return what `hicom.read_frames` takes for a source.

    Args:
        source: what it takes; also a URL (http, https, file, data), and frames as tensors, with channels before height
            and width, or as floats: from 0 to 255, or from 0 to 1 with `do_rescale=False`, as transformers has it.
        options: `input_data_format` (`channels_first` or `channels_last`, else told from the shape) and `do_rescale`.

    Raises:
        ValueError: numbers are neither.
        VideoError: a URL is of another kind, cannot be fetched, or takes too long or too much.
    """
    if isinstance(source, np.ndarray | Tensor):
        return _pixels(source, options)
    is_numbers = isinstance(source, list | tuple) and all(isinstance(each, np.ndarray | Tensor) for each in source)
    if options.get("do_rescale") is False and not is_numbers:
        raise ValueError("do_rescale=False is for arrays and tensors of numbers from 0 to 1; leave it out for files")
    if isinstance(source, str):
        return _open_text(source)
    if isinstance(source, list | tuple):
        frames = [_pixels(each, options) if isinstance(each, np.ndarray | Tensor) else each for each in source]
        return [_open_picture(each) if isinstance(each, str) else each for each in frames]
    return source


def _pixels(frames: np.ndarray | Tensor, options: Mapping[str, Any]) -> np.ndarray:
    """Return `uint8[..., H, W, 3]` of pixels in any layout and number format."""
    x = frames.detach().cpu().numpy() if isinstance(frames, Tensor) else frames
    layout = options.get("input_data_format")
    if layout not in (None, "channels_first", "channels_last"):
        raise ValueError(f"input_data_format={layout!r}: give 'channels_first' or 'channels_last'")
    is_first = x.ndim >= 3 and x.shape[-3] == 3 and x.shape[-1] != 3 if layout is None else layout == "channels_first"
    if is_first and x.ndim >= 3:
        x = np.moveaxis(x, -3, -1)
    scaled = options.get("do_rescale") is False
    if not np.issubdtype(x.dtype, np.floating):
        if scaled:
            raise ValueError(f"do_rescale=False is for frames from 0 to 1, but these are {x.dtype}; leave it out")
        return x
    low, high = (float(x.min()), float(x.max())) if x.size else (0.0, 0.0)
    top = 1.0 if scaled else 255.0
    if not (low >= 0 and high <= top):
        raise ValueError(f"frames of {x.dtype} have values from {low:g} to {high:g}; they must be from 0 to {top:g}")
    if not scaled and 0 < high <= 1:
        raise ValueError(
            f"frames of {x.dtype} have values from {low:g} to {high:g}: from 0 to 255 is expected; where 1 is white, "
            f"pass do_rescale=False"
        )
    return np.rint(x * (255.0 / top)).astype(np.uint8)


def _open_picture(text: str) -> Any:
    """Return a picture of a list of frames that is named by a path or a URL."""
    scheme = text[:16].partition("://")[0].lower()
    if scheme in ("http", "https"):
        return Image.open(io.BytesIO(fetch_url(text)))
    if scheme == "file":
        return path_of_url(text)
    source = _open_text(text)
    return Image.open(io.BytesIO(source)) if isinstance(source, bytes) else source


def _open_text(text: str) -> Any:
    """Return the bytes of a `data:` URL; other URLs and paths are as `hicom.read_frames` takes them."""
    return _open_data(text) if text[:5].lower() == "data:" else text


def _open_data(url: str) -> Any:
    head, comma, body = url.partition(",")
    where = f"{url[:40]}..."
    if not comma or not head.lower().endswith(";base64"):
        raise VideoError(f"{where}: data URLs must be base64: data:video/mp4;base64,...")
    if "," in body:  # data:video/jpeg;base64,FRAME,FRAME,... of vLLM
        return [Image.open(io.BytesIO(_decode(each, where))) for each in body.split(",")]
    return _decode(body, where)


def _decode(text: Any, where: str) -> bytes:
    if isinstance(text, bytes):
        text = text.decode("ascii", "replace")
    if isinstance(text, str) and text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode("".join(str(text).split()), validate=True)
    except (binascii.Error, ValueError):
        raise VideoError(f"{where}: it is not base64") from None
