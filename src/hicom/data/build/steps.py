"""The steps of a build, in order. Each can be run again: it does what is new, failed, or was configured anew."""

from __future__ import annotations

import base64
import hashlib
import io
import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from ...endpoint import Endpoint, EndpointError
from ...video import VideoError, read_frames
from .config import BuildConfig
from .state import State
from .texts import CAPTION, PAIRS, PAIRS_FORMAT, Pair, near_duplicates, parse_pairs, why_dropped
from .work import Row, run_here, run_on_ray

SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".mpg", ".mpeg", ".m4v", ".flv", ".wmv", ".ts")
RANDOM = ""
"""The category of videos that were drawn by lot."""


def inventory(state: State, config: BuildConfig, on_ray: bool = False) -> None:
    """Find the videos and open each; those whose file has changed start anew, and those that are gone are removed."""
    known = {
        path: (name, size, changed)
        for name, path, size, changed in state.rows("SELECT id, path, bytes, changed_ns FROM videos")
    }
    files = {str(file): file.stat() for file in find_videos(config.videos)}
    with state.transaction():
        for path, (name, size, changed) in known.items():
            if path not in files or (files[path].st_size, files[path].st_mtime_ns) != (size, changed):
                state.forget_video(name)
        state.run_many(
            "INSERT OR IGNORE INTO videos (id, path, bytes, changed_ns) VALUES (?, ?, ?, ?)",
            [(video_id(path), path, stat.st_size, stat.st_mtime_ns) for path, stat in files.items()],
        )

    def store(row: Row) -> None:
        state.run(
            "UPDATE videos SET duration_s = ?, width = ?, height = ? WHERE id = ?",
            (row["duration_s"], row["width"], row["height"], row["id"]),
        )

    _for_videos(state, config, "inventory", "probed", {}, _all_videos(state), store, on_ray)


def select(state: State, config: BuildConfig, on_ray: bool = False) -> None:
    """Choose videos: the most similar ones of each category, in turns so that none comes twice, then some by lot."""
    options = {
        "encoder": config.encoder,
        "device": config.device,
        "num_frames": config.frames_per_video,
        "categories": config.categories,
    }

    def store(row: Row) -> None:
        state.run("DELETE FROM similarities WHERE video = ?", (row["id"],))
        state.run_many(
            "INSERT INTO similarities VALUES (?, ?, ?)",
            [(row["id"], name, value) for name, value in zip(config.categories, row["values"], strict=True)],
        )

    readable = [video for (video,) in state.rows("SELECT id FROM videos WHERE duration_s IS NOT NULL ORDER BY id")]
    if config.per_category and config.categories:
        _for_videos(state, config, "select", "similarities", options, readable, store, on_ray)
    ranked = {
        name: [
            video
            for (video,) in state.rows(
                "SELECT video FROM similarities WHERE category = ? ORDER BY value DESC, video", (name,)
            )
        ]
        for name in config.categories
    }
    chosen = choose(ranked, readable, config.per_category, config.num_random, config.seed)
    with state.transaction():
        state.run("DELETE FROM selected")
        state.run_many("INSERT INTO selected VALUES (?, ?)", list(chosen.items()))


def choose(
    ranked: Mapping[str, Sequence[str]], videos: Sequence[str], per_category: int, num_random: int, seed: int
) -> dict[str, str]:
    """Return the category by which each chosen video came in; `RANDOM` for those by lot.

    Args:
        ranked: videos of each category, the most similar one first.
        videos: all videos.
        per_category: videos of each category.
        num_random: videos by lot, out of what is left.
        seed: of the lot.
    """
    chosen: dict[str, str] = {}
    left = {name: iter(some) for name, some in ranked.items()}
    for _ in range(per_category):
        for name, some in left.items():
            video = next((each for each in some if each not in chosen), None)
            if video is not None:
                chosen[video] = name
    others = sorted(set(videos) - set(chosen))
    for video in random.Random(seed).sample(others, min(num_random, len(others))):
        chosen[video] = RANDOM
    return chosen


def split(state: State, config: BuildConfig, on_ray: bool = False) -> None:
    """Cut the chosen videos into shots."""

    def store(row: Row) -> None:
        state.run("DELETE FROM shots WHERE video = ?", (row["id"],))
        state.run_many("INSERT INTO shots VALUES (?, ?, ?)", [(row["id"], *shot) for shot in row["shots"]])

    options = {"threshold": config.shot_threshold, "min_shot_s": config.min_shot_s}
    _for_videos(state, config, "split", "shots", options, _selected(state), store, on_ray)


def keyframes(state: State, config: BuildConfig, on_ray: bool = False) -> None:
    """Find the key frames of the chosen videos, and keep the shots of the right length that hold one as clips."""
    options = {
        "encoder": config.encoder,
        "device": config.device,
        "fps": config.keyframe_fps,
        "similarity": config.keyframe_similarity,
    }

    def store(row: Row) -> None:
        state.run("DELETE FROM keyframes WHERE video = ?", (row["id"],))
        state.run_many("INSERT INTO keyframes VALUES (?, ?)", [(row["id"], time_s) for time_s in row["times"]])

    _for_videos(state, config, "keyframes", "keyframes", options, _selected(state), store, on_ray)
    clips = []
    for video, start_s, end_s in state.rows(
        "SELECT shots.video, start_s, end_s FROM shots JOIN selected ON selected.video = shots.video ORDER BY 1, 2"
    ):
        number = state.number(
            "SELECT COUNT(*) FROM keyframes WHERE video = ? AND time_s >= ? AND time_s < ?", (video, start_s, end_s)
        )
        length = end_s - start_s
        dropped = ""
        if length < config.min_s:
            dropped = f"shorter than {config.min_s:g} s"
        elif length > config.max_s:
            dropped = f"longer than {config.max_s:g} s"
        elif number == 0:
            dropped = "no key frame"
        name = f"{video}-{round(1000 * start_s):07}-{round(1000 * end_s):07}"
        clips.append((name, video, start_s, end_s, number, dropped))
    with state.transaction():
        state.run("DELETE FROM clips")
        state.run_many("INSERT INTO clips VALUES (?, ?, ?, ?, ?, ?)", clips)


def caption(state: State, config: BuildConfig, on_ray: bool = False) -> None:
    """Have every clip described in detail."""
    settings = {**_captioner(config), "prompt": CAPTION}

    def ask(endpoint: Endpoint, clip: str) -> str:
        return endpoint.ask(_messages(state_clips[clip], CAPTION, config)).text.strip()

    def store(clip: str, text: str) -> str | None:
        if not text:
            return "the reply is empty"
        state.run("INSERT OR REPLACE INTO captions VALUES (?, ?)", (clip, text))
        return None

    state_clips = _clips(state)
    _ask_for(state, config, "caption", settings, list(state_clips), ask, store)


def pairs(state: State, config: BuildConfig, on_ray: bool = False) -> None:
    """Have instruction-description pairs written for every clip, with its description at hand."""
    captions = dict(state.rows("SELECT clip, text FROM captions"))
    clips = {clip: row for clip, row in _clips(state).items() if clip in captions}
    settings = {**_captioner(config), "prompt": PAIRS, "number": config.num_pairs, "json_schema": config.json_schema}

    def ask(endpoint: Endpoint, clip: str) -> str:
        text = PAIRS.format(caption=captions[clip], number=config.num_pairs)
        form = PAIRS_FORMAT if config.json_schema else None
        return endpoint.ask(_messages(clips[clip], text, config), form).text

    def store(clip: str, text: str) -> str | None:
        found = parse_pairs(text, config.num_pairs)
        state.run("DELETE FROM pairs WHERE clip = ?", (clip,))
        state.run_many(
            "INSERT INTO pairs (clip, number, instruction, description) VALUES (?, ?, ?, ?)",
            [(clip, number, *pair) for number, pair in enumerate(found)],
        )
        return None if found else f"no pairs in the reply: {text[:200]!r}"

    _ask_for(state, config, "pairs", settings, list(clips), ask, store)


def clean(state: State, config: BuildConfig, on_ray: bool = False) -> None:
    """Drop pairs that refuse, say little, ask for something else, or nearly equal another one; the state keeps all."""
    rows = [
        (f"{clip}/{number}", Pair(instruction, description))
        for clip, number, instruction, description in state.rows(
            "SELECT clip, number, instruction, description FROM pairs WHERE clip IN "
            "(SELECT id FROM clips WHERE dropped = '') ORDER BY clip, number"
        )
    ]
    dropped = {key: why_dropped(pair, config.refusals, config.min_words) for key, pair in rows}
    good = [(key, pair) for key, pair in rows if not dropped[key]]
    for key, same in near_duplicates(good, config.near_duplicate):
        dropped[key] = f"near-duplicate of {same}"
    with state.transaction():
        state.run("UPDATE pairs SET dropped = ''")
        state.run_many(
            "UPDATE pairs SET dropped = ? WHERE clip = ? AND number = ?",
            [(reason, *key.split("/")) for key, reason in dropped.items()],
        )


def video_id(path: str) -> str:
    """Return the name of a video in the state: a digest of its path."""
    return hashlib.sha256(path.encode()).hexdigest()[:12]


def find_videos(places: Sequence[str]) -> list[Path]:
    """Return the videos of files, folders and lists.

    Raises:
        ValueError: a place is missing, or there is no video at all.
    """
    found: list[Path] = []
    for place in map(Path, places):
        if place.suffix == ".txt" and place.is_file():
            lines = [line.strip() for line in place.read_text("utf-8").splitlines() if line.strip()]
            found += find_videos([str(place.parent / line) for line in lines])
        elif place.is_dir():
            found += sorted(file for file in place.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        elif place.is_file():
            found.append(place)
        else:
            raise ValueError(f"{place}: no such file or folder")
    found = [file.resolve() for file in found]
    if not found:
        raise ValueError(f"there is no video in {', '.join(places)} (looked for {', '.join(SUFFIXES)})")
    return list(dict.fromkeys(found))


def _all_videos(state: State) -> list[str]:
    return [video for (video,) in state.rows("SELECT id FROM videos ORDER BY id")]


def _selected(state: State) -> list[str]:
    return [video for (video,) in state.rows("SELECT video FROM selected ORDER BY video")]


def _clips(state: State) -> dict[str, tuple[str, float, float]]:
    """Return path and bounds of the clips that are kept."""
    return {
        clip: (path, start_s, end_s)
        for clip, path, start_s, end_s in state.rows(
            "SELECT clips.id, path, start_s, end_s FROM clips JOIN videos ON videos.id = clips.video "
            "WHERE dropped = '' ORDER BY clips.id"
        )
    }


def _for_videos(
    state: State,
    config: BuildConfig,
    step: str,
    work: str,
    options: Mapping[str, Any],
    videos: Sequence[str],
    store: Callable[[Row], None],
    on_ray: bool,
) -> None:
    """Run `work` over the videos that a step has not done yet, and keep each result as it comes."""
    settings = {name: value for name, value in options.items() if name != "device"}
    todo = state.todo(step, videos, settings)
    paths = dict(state.rows("SELECT id, path FROM videos"))
    rows = [{"id": video, "path": paths[video]} for video in todo]
    run = run_on_ray if on_ray else run_here
    results = run(work, rows, options, config.num_workers)
    for row in tqdm(results, step, len(rows), unit="video", disable=not sys.stderr.isatty()):
        with state.transaction():
            if "error" not in row:
                store(row)
            state.mark(step, row["id"], settings, row.get("error"))


def _captioner(config: BuildConfig) -> dict[str, Any]:
    """Return what replies depend on."""
    names = ("model", "caption_frames", "frame_size", "max_tokens", "temperature")
    return {name: getattr(config, name) for name in names}


def _ask_for(
    state: State,
    config: BuildConfig,
    step: str,
    settings: Mapping[str, Any],
    clips: Sequence[str],
    ask: Callable[[Endpoint, str], str],
    store: Callable[[str, str], str | None],
) -> None:
    """Ask the endpoint about the clips that a step has not done yet; replies are kept before anything else is done."""
    todo = state.todo(step, clips, settings)
    if not todo:
        return
    if config.url is None or config.model is None:
        raise ValueError("captions need an OpenAI-compatible endpoint: give `url` and `model` in the configuration")
    endpoint = Endpoint(
        config.url,
        config.model,
        cache=state.path,
        num_concurrent=config.num_concurrent,
        temperature=config.temperature,
        max_tokens=config.max_tokens,
    )

    def work(clip: str) -> str | VideoError:
        try:
            return ask(endpoint, clip)
        except VideoError as error:
            return error

    results = endpoint.map(work, todo)
    for clip, reply in tqdm(results, step, len(todo), unit="clip", disable=not sys.stderr.isatty()):
        with state.transaction():
            error = str(reply) if isinstance(reply, EndpointError | VideoError) else store(clip, reply)
            state.mark(step, clip, settings, error)
    usage = endpoint.usage
    with state.transaction():
        state.run("INSERT OR IGNORE INTO spent VALUES (?, 0, 0, 0)", (config.model,))
        state.run(
            "UPDATE spent SET requests = requests + ?, prompt_tokens = prompt_tokens + ?, "
            "completion_tokens = completion_tokens + ? WHERE model = ?",
            (usage.requests, usage.prompt_tokens, usage.completion_tokens, config.model),
        )


def _messages(clip: tuple[str, float, float], text: str, config: BuildConfig) -> list[dict[str, Any]]:
    """Return the request about a clip: its frames as pictures, then the text."""
    path, start_s, end_s = clip
    video = read_frames(path, num_frames=config.caption_frames, start_s=start_s, end_s=end_s, size=config.frame_size)
    content: list[dict[str, Any]] = []
    for frame in video.frames:
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "JPEG", quality=85)
        url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        content.append({"type": "image_url", "image_url": {"url": url}})
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def report(state: State, config: BuildConfig) -> dict[str, Any]:
    """Return what there is: videos, clips, pairs, what was dropped and why, errors, and what was spent."""
    reasons = Counter(
        reason.partition(" of ")[0] if reason.startswith("near") else reason
        for (reason,) in state.rows("SELECT dropped FROM pairs WHERE dropped != ''")
    )
    spent = [
        {
            "model": model,
            "requests": requests,
            "prompt_tokens": read,
            "completion_tokens": written,
            "cost": round((read * config.prompt_price + written * config.completion_price) / 1e6, 4),
        }
        for model, requests, read, written in state.rows("SELECT * FROM spent")
    ]
    return {
        "videos": state.number("SELECT COUNT(*) FROM videos"),
        "readable": state.number("SELECT COUNT(*) FROM videos WHERE duration_s IS NOT NULL"),
        "selected": state.number("SELECT COUNT(*) FROM selected"),
        "by category": dict(state.rows("SELECT category, COUNT(*) FROM selected GROUP BY category ORDER BY 2 DESC, 1")),
        "shots": state.number("SELECT COUNT(*) FROM clips"),
        "clips": state.number("SELECT COUNT(*) FROM clips WHERE dropped = ''"),
        "dropped clips": dict(
            state.rows("SELECT dropped, COUNT(*) FROM clips WHERE dropped != '' GROUP BY 1 ORDER BY 2 DESC, 1")
        ),
        "captions": state.number(
            "SELECT COUNT(*) FROM captions JOIN clips ON clips.id = captions.clip WHERE dropped = ''"
        ),
        "pairs": state.number("SELECT COUNT(*) FROM pairs"),
        "good pairs": state.number("SELECT COUNT(*) FROM pairs WHERE dropped = ''"),
        "dropped pairs": dict(reasons.most_common()),
        "errors": {step: len(found) for step in STEPS if (found := state.errors(step))},
        "spent": spent,
    }


Step = Callable[[State, BuildConfig, bool], None]
STEPS: dict[str, Step] = {
    "inventory": inventory,
    "select": select,
    "split": split,
    "keyframes": keyframes,
    "caption": caption,
    "pairs": pairs,
    "clean": clean,
}
