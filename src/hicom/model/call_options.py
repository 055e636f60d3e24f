"""The standard arguments of a processor's call: which are taken, and which only where they change nothing.

Generic callers (pipelines, trainers, servers) pass what `ProcessorMixin.__call__` of transformers knows, flat or sorted
into `text_kwargs`, `images_kwargs`, `videos_kwargs` and `common_kwargs`. An argument is taken and means what it means
there, or is refused by name where it would change a result and cannot.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

GROUPS = ("text_kwargs", "images_kwargs", "videos_kwargs", "audio_kwargs")

ALIASES = {"nframes": "num_frames", "video_start": "start_s", "video_end": "end_s", "sample_fps": "source_fps"}
"""What others call an argument of `hicom.read_frames`."""
FRAME_CHOICE = ("num_frames", "fps", "timestamps_s", "start_s", "end_s", "max_frames", "source_fps", "snap")
PIXEL_SIZES = ("size", "min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width")
READING = ("do_sample_frames", "do_rescale", "input_data_format")

_OFF = (False,)
_ON = (True,)
_FRAMES = "frames are made RGB, padded to a square, resized and normalised as the vision tower was trained with"
_PLAIN = "this processor does not return it"
_OTHER = "one text a prompt is taken"

# What is taken, by group; the others are taken where they change nothing: `None`, or one of these values.
_TAKEN: dict[str, tuple[str, ...]] = {
    "text_kwargs": (
        "add_special_tokens",
        "padding",
        "padding_side",
        "pad_to_multiple_of",
        "truncation",
        "max_length",
        "return_attention_mask",
        "return_mm_token_type_ids",
        "return_tensors",
    ),
    "images_kwargs": ("do_rescale", "input_data_format", "device", "return_tensors", *PIXEL_SIZES),
    "videos_kwargs": (
        *FRAME_CHOICE,
        *ALIASES,
        *READING,
        *PIXEL_SIZES,
        "device",
        "video_metadata",
        "return_metadata",
        "return_tensors",
    ),
    "audio_kwargs": ("return_tensors",),
}
_VISION_FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "do_convert_rgb": (_ON, _FRAMES),
    "do_resize": (_ON, _FRAMES),
    "default_to_square": (_ON, _FRAMES),
    "crop_size": ((), _FRAMES),
    "resample": ((3,), f"{_FRAMES}: bicubic"),
    "rescale_factor": ((1 / 255,), "pixel values from 0 to 255 are made 0 to 1"),
    "do_normalize": (_ON, _FRAMES),
    "do_pad": (_ON, _FRAMES),
    "pad_size": ((), _FRAMES),
    "do_center_crop": (_OFF, _FRAMES),
    "data_format": (("channels_first",), "the model takes pixel values with channels first"),
}
_FIXED: dict[str, dict[str, tuple[tuple[Any, ...], str]]] = {
    "text_kwargs": {
        "text_pair": ((), _OTHER),
        "text_target": ((), _OTHER),
        "text_pair_target": ((), _OTHER),
        "stride": ((0,), "texts are not split into overlapping pieces"),
        "is_split_into_words": (_OFF, "texts are strings"),
        "return_token_type_ids": (_OFF, "the LLMs have no token types"),
        "return_overflowing_tokens": (_OFF, "texts are not split into overlapping pieces"),
        "return_special_tokens_mask": (_OFF, _PLAIN),
        "return_offsets_mapping": (_OFF, f"{_PLAIN}; `return_assistant_tokens_mask` and `return_labels` mark answers"),
        "return_text_replacement_offsets": (_OFF, _PLAIN),
        "return_length": (_OFF, _PLAIN),
        "sanitize_control_tokens": (_OFF, "control tokens inside of texts are read as such; remove them beforehand"),
    },
    "images_kwargs": {**_VISION_FIXED, "image_seq_length": ((), "the compressor says how many tokens an image has")},
    "videos_kwargs": _VISION_FIXED,
    "audio_kwargs": {"raw_speech": ((), "the model hears nothing")},
}
# Of no effect in any case: how to compute, how to report, and what is about audio that is not there.
_FREE: dict[str, tuple[str, ...]] = {
    "text_kwargs": ("verbose",),
    "images_kwargs": ("disable_grouping",),
    "videos_kwargs": (),
    "audio_kwargs": (
        "sampling_rate",
        "padding",
        "max_length",
        "truncation",
        "pad_to_multiple_of",
        "return_attention_mask",
        "device",
        "load_audio_backend",
    ),
}
# Of the whole call: `load_audio_from_video` has no effect where a model has no audio, says transformers.
_CALL_FREE = ("load_audio_from_video", "audio_from_video_indices")


def known_names() -> frozenset[str]:
    """Return all names that a call may have beside the processor's own."""
    names = [*GROUPS, "common_kwargs", *_CALL_FREE]
    for group in GROUPS:
        names += [*_TAKEN[group], *_FIXED[group], *_FREE[group]]
    return frozenset(names)


def is_about_text(name: str) -> bool:
    """Return whether an argument is about the text alone, or of no effect on media."""
    return name in (*_TAKEN["text_kwargs"], *_FIXED["text_kwargs"], *_FREE["text_kwargs"], *_CALL_FREE, "text_kwargs")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a question about the known name nearest to an unknown one, or nothing."""
    found = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


@dataclass(kw_only=True)
class CallOptions:
    """The standard arguments of a call, checked.

    Attributes:
        text: by name, what is about texts and is not None.
        images: likewise about images.
        videos: likewise about videos, under the names of `hicom.read_frames`.
    """

    text: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Any] = field(default_factory=dict)
    videos: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        given: Mapping[str, Any],
        defaults: Mapping[str, Mapping[str, Any]],
        side: int,
        normalisation: tuple[list[float], list[float]],
        own: Iterable[str],
    ) -> CallOptions:
        """Sort and check the arguments of a call.

        Args:
            given: by name, as they came.
            defaults: a processor's own, by group; `given` goes before them.
            side: height and width of the frames that the vision tower takes.
            normalisation: mean and standard deviation of the pixel values.
            own: names of the processor's own arguments, to guess what an unknown name should be.

        Raises:
            ValueError: a name is unknown, is given twice, or would change a result and cannot.
        """
        groups = {group: dict(defaults.get(group) or {}) for group in GROUPS}
        known = {group: {*_TAKEN[group], *_FIXED[group], *_FREE[group], *_MEANS} for group in GROUPS}
        for group in ("text_kwargs", "audio_kwargs"):
            known[group] -= {*_MEANS}
        _spread(given.get("common_kwargs") or {}, known, groups, own, "common_kwargs: ")
        for group in GROUPS:
            _spread(given.get(group) or {}, {group: known[group]}, groups, (), f"{group}: ")
        flat = {name: value for name, value in given.items() if name not in (*GROUPS, "common_kwargs", *_CALL_FREE)}
        for name in flat:
            for group in GROUPS:
                if name in (given.get(group) or {}):
                    raise ValueError(f"{name} is given twice: in {group} and by itself; give it once")
        _spread(flat, known, groups, (*own, *known_names()), "")
        for group, names in groups.items():
            _check_fixed(group, names, side, normalisation)
        return cls(
            text=_kept(groups["text_kwargs"], "text_kwargs"),
            images=_kept(groups["images_kwargs"], "images_kwargs"),
            videos=_renamed(_kept(groups["videos_kwargs"], "videos_kwargs")),
        )


_MEANS = ("image_mean", "image_std")


def _spread(
    values: Mapping[str, Any],
    known: Mapping[str, Iterable[str]],
    groups: dict[str, dict[str, Any]],
    others: Iterable[str],
    where: str,
) -> None:
    """Put every value into all groups that know its name."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}must be a dictionary, not {type(values).__name__}")
    for name, value in values.items():
        homes = [group for group, names in known.items() if name in names]
        if not homes:
            names = {*(each for group in known.values() for each in group), *others}
            raise ValueError(f"{where}HIComProcessor does not know the argument {name!r}{nearest(name, names)}")
        for group in homes:
            groups[group][name] = value


def _kept(values: dict[str, Any], group: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None and name in _TAKEN[group]}


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    """Return options of a video under the names of `hicom.read_frames`."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        own = ALIASES.get(name, name)
        if own in result:
            raise ValueError(f"{name} and {own} are two names of one argument; give one of them")
        result[own] = value
    return result


def _check_fixed(
    group: str, values: Mapping[str, Any], side: int, normalisation: tuple[list[float], list[float]]
) -> None:
    """Raise ValueError where a value is not what this processor does anyway."""
    for name, value in values.items():
        if value is None:
            continue
        if name in PIXEL_SIZES:
            check_pixels(name, value, side)
        elif name in _MEANS:
            own = normalisation[_MEANS.index(name)]
            numbers = [value] * len(own) if isinstance(value, int | float) else list(value)
            if len(numbers) != len(own) or not all(map(math.isclose, numbers, own)):
                raise ValueError(f"{name}={value} cannot be: {_FRAMES}, with {own}; leave it out")
        elif name in _FIXED[group]:
            allowed, reason = _FIXED[group][name]
            if not any(value == each for each in allowed):
                raise ValueError(f"{name}={value!r} cannot be: {reason}; leave it out")


def check_pixels(name: str, value: Any, side: int, where: str = "") -> None:
    """Raise ValueError where a size is asked for that the vision tower does not take.

    Qwen's tools cut a frame into as many tokens as its size gives; here every frame has the tower's size, so a bound on
    it either holds already or cannot.

    Args:
        name: of the argument.
        value: of it.
        side: height and width that the tower takes.
        where: the medium, in front of the message.
    """
    if name == "size":
        sizes = value if isinstance(value, Mapping) else {"height": value, "width": value}
        if isinstance(value, list | tuple) and len(value) == 2:
            sizes = dict(zip(("height", "width"), value, strict=True))
        for key, each in sizes.items():
            if key in ("min_pixels", "max_pixels"):
                check_pixels(key, each, side, where)
            elif each is not None and (key not in ("height", "width", "longest_edge") or each != side):
                raise ValueError(f"{where}size={value} cannot be: the vision tower takes {side}x{side}; leave it out")
        return
    pixels = side * side
    holds = isinstance(value, int | float) and not isinstance(value, bool)
    if holds and name == "min_pixels":
        holds = value <= pixels
    elif holds and name in ("max_pixels", "total_pixels"):
        holds = value >= pixels
    elif holds:  # resized_height, resized_width
        holds = value == side
    if not holds:
        raise ValueError(
            f"{where}{name}={value!r} cannot be: every frame has the {side}x{side} = {pixels} pixels that the vision "
            f"tower takes; leave it out, and spend fewer tokens by num_frames, window or max_visual_tokens"
        )


def check_total_pixels(total: float | None, num_frames: int, side: int) -> None:
    """Raise ValueError where the frames of a video have more pixels than `total` allows."""
    if total is not None and num_frames * side * side > total:
        raise ValueError(
            f"total_pixels={total} is less than {num_frames} frames of {side}x{side} pixels have; choose at most "
            f"{int(total) // (side * side)} by num_frames"
        )
