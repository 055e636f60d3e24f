"""Write the sprite world as a data set: real H.264 clips, LLaVA-style JSONL and ground truth.

    dst/world.json                  what was written (last of all: without it the data set is unfinished)
    dst/{split}/videos/000123.mp4
    dst/{split}/align.jsonl         captions                     {id, video, conversations, family, answer, split, ...}
    dst/{split}/pretrain.jsonl      instructions and descriptions
    dst/{split}/tune.jsonl          questions; open ones in held-out splits (the benchmark), some with options in train
    dst/{split}/compare.jsonl       train: when every object appears, and every two of them compared
    dst/{split}/choice.jsonl        the same questions, all with options
    dst/{split}/wording.jsonl       held-out splits: questions in wordings that training never uses
    dst/{split}/truth.jsonl         objects, boxes, ways and events of every clip
    dst/{split}/masks.jsonl         on request: the mask of every object in every frame

`video` is relative to dst. A clip file appears only when it is complete and everything is a function of the seed, so
an interrupted `make_dataset` is finished by calling it again.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import as_completed
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from hicom.files import clear_parts, write_text, writing
from hicom.locks import owned
from hicom.processes import Workers
from hicom.video import write_video
from hicom.world.questions import FAMILIES, Asker, Question
from hicom.world.render import Renderer, Sprites, bundled_sprites, iter_frames, load_sprites, run_lengths
from hicom.world.scenes import (
    Scene,
    WorldConfig,
    clip_seed,
    frame_times,
    generator,
    ground_truth,
    make_scene,
    split_config,
)
from hicom.world.templates import HELD_OUT_TEMPLATES, TEMPLATES

CHUNK = 25
FILES = ("align", "pretrain", "tune", "choice", "wording", "compare")
"""What is written of a split; the place of a name decides what it draws, so new ones come last."""
HELD_OUT_FILES, TRAINING_FILES = ("wording",), ("compare",)
"""Those of held-out splits only, and of training only."""
CHOICE_SHARE = 0.25
"""Share of the training questions in `tune.jsonl` that list options."""
ROUNDS = 2
"""Training clips are asked twice, with other words and other objects; with options and in held-out splits once."""
RARE, EXTRA_ROUNDS = ("order", "before", "count", "neighbour", "needle", "generic"), 2
"""Families that few clips allow are asked more often in training."""


@dataclasses.dataclass(frozen=True)
class World:
    """What a data set is a function of.

    Attributes:
        seed: of everything.
        config: of the scenes and clips; a split may change it (`split_config`).
        sprites: folder of named images in place of the bundled sprites.
        families: question families that are asked; those of `FAMILIES`.

    Raises:
        ValueError: a family does not exist, or the seed is negative.
    """

    seed: int = 0
    config: WorldConfig = dataclasses.field(default_factory=WorldConfig)
    sprites: str | None = None
    families: tuple[str, ...] = FAMILIES

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative")
        unknown = [family for family in self.families if family not in FAMILIES]
        if unknown:
            raise ValueError(f"unknown question families {', '.join(unknown)}: choose some of {', '.join(FAMILIES)}")
        if not self.families:
            raise ValueError(f"no question families are given: choose some of {', '.join(FAMILIES)}")

    def scene(self, split: str, index: int) -> Scene:
        """The scene of one clip."""
        return make_scene(clip_seed(self.seed, split, index), split_config(self.config, split))


@lru_cache(maxsize=2)
def sprites_of(folder: str | None) -> Sprites:
    """The sprites of a folder, or the bundled ones."""
    return bundled_sprites() if folder is None else load_sprites(Path(folder))


def make_world(
    seed: int = 0,
    config: WorldConfig | None = None,
    sprites: Path | None = None,
    families: tuple[str, ...] = FAMILIES,
) -> World:
    """Return a world whose nouns are those of a folder of images (None: the bundled ones).

    Raises:
        ValueError: the folder holds no usable sprites, or a value is impossible.
    """
    config = config or WorldConfig()
    if sprites is None:
        return World(seed, config, None, families)
    nouns = load_sprites(sprites).nouns
    return World(seed, dataclasses.replace(config, nouns=nouns), str(sprites.resolve()), families)


def record(question: Question, record_id: str, video: str, split: str) -> dict[str, Any]:
    """One LLaVA-style record.

    Args:
        question: what is asked.
        record_id: unique id.
        video: path relative to the data set.
        split: one of `SPLITS`.

    Returns:
        `id`, `video`, `conversations`, `family`, `form`, `answer`, `split`, `options`, `chance` (without the video;
        None: not scored) and, where they exist, `informed_chance` (naming one of the clip's objects) and `subject` (the
        noun that the question names).
    """
    result: dict[str, Any] = {
        "id": record_id,
        "video": video,
        "conversations": [
            {"from": "human", "value": f"<video>\n{question.text}"},
            {"from": "gpt", "value": question.answer},
        ],
        "family": question.family,
        "form": question.form,
        "answer": question.answer,
        "split": split,
        "options": list(question.options) if len(question.options) <= 8 else [],
        "chance": question.chance,
    }
    extra = {"informed_chance": question.informed_chance, "subject": question.subject}
    return result | {key: value for key, value in extra.items() if value is not None}


def ask(world: World, split: str, index: int, file: str) -> list[Question]:
    """What one file of a split asks about one clip."""
    scene = world.scene(split, index)
    found: list[Question] = []
    for turn in range(ROUNDS if split == "train" and file != "choice" else 1):
        # The same questions with and without options.
        rng = generator(*scene.seed, 1 + FILES.index("tune" if file == "choice" else file), turn)
        templates = TEMPLATES | HELD_OUT_TEMPLATES if file == "wording" else TEMPLATES
        asker = Asker(scene, rng, templates, world.config.nouns)
        if file == "align":
            found += asker.captions()
        elif file == "pretrain":
            found += asker.descriptions()
        elif file == "compare":
            found += [question for question in asker.comparisons() if question.family in world.families]
        else:
            asked = asker.questions()
            for _ in range(EXTRA_ROUNDS if split == "train" else 0):
                asked += [question for question in asker.questions() if question.family in RARE]
            for question in asked:
                if question.family not in world.families:
                    continue
                as_choice = file == "choice" or (split == "train" and rng.random() < CHOICE_SHARE)
                found.append(asker.as_choice(question) if as_choice else question)
    return found


def records(world: World, split: str, index: int, file: str) -> Iterator[dict[str, Any]]:
    """All records of one clip in one of `FILES`."""
    for number, question in enumerate(ask(world, split, index, file)):
        yield record(question, f"{split}-{index:06d}-{file}-{number}", video_name(split, index), split)


def video_name(split: str, index: int) -> str:
    """Path of a clip relative to the data set."""
    return f"{split}/videos/{index:06d}.mp4"


def truth(world: World, split: str, index: int) -> dict[str, Any]:
    """Ground truth of one clip (see `scenes.ground_truth`), with its id, split and video."""
    config = split_config(world.config, split)
    facts = {"id": f"{split}-{index:06d}", "split": split, "video": video_name(split, index)}
    media = {"num_frames": config.num_frames, "fps": config.fps, "width": config.width, "height": config.height}
    return facts | media | ground_truth(world.scene(split, index), sprites_of(world.sprites).extents, config.num_frames)


def masks(world: World, split: str, index: int) -> dict[str, Any]:
    """Masks of one clip: `frames`, for each frame {number of an object: run lengths of what is seen of it}.

    The encoding is COCO's, uncompressed: column after column, background first.
    """
    config = split_config(world.config, split)
    scene = world.scene(split, index)
    renderer = Renderer(scene, sprites_of(world.sprites), config.width, config.height)
    frames = []
    for time in frame_times(config.num_frames):
        labels = renderer.labels(time)
        frames.append(
            {str(i): run_lengths(labels == i + 1) for i in range(len(scene.objects)) if (labels == i + 1).any()}
        )
    size = [config.height, config.width]
    return {"id": f"{split}-{index:06d}", "video": video_name(split, index), "size": size, "frames": frames}


def _write_clips(dst: Path, world: World, split: str, indices: list[int]) -> int:
    config = split_config(world.config, split)
    for index in indices:
        frames = iter_frames(world.scene(split, index), config, sprites_of(world.sprites))
        write_video(dst / video_name(split, index), frames, config.fps)
    return len(indices)


def _write_table(path: Path, world: World, count: int) -> int:
    split, name = path.parent.name, path.stem
    if name == "truth":
        _write_jsonl(path, (truth(world, split, i) for i in range(count)))
    elif name == "masks":
        _write_jsonl(path, (masks(world, split, i) for i in range(count)))
    else:
        _write_jsonl(path, chain.from_iterable(records(world, split, i, name) for i in range(count)))
    return count


def _write_jsonl(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    with writing(path) as part, part.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def make_dataset(
    dst: Path,
    num_clips: Mapping[str, int],
    world: World | None = None,
    *,
    with_masks: bool = False,
    num_workers: int = 2,
) -> Path:
    """Write a data set, or complete one whose writing was interrupted.

    Args:
        dst: folder of the data set.
        num_clips: number of clips of each split, for instance {"train": 12000, "val": 500, "test": 1000}.
        world: what to write; the same world gives the same scenes, questions and ground truth on every machine.
        with_masks: also write masks of all frames.
        num_workers: processes that render and encode.

    Returns:
        `dst`.

    Raises:
        ValueError: unknown split, an impossible number, no clips at all, `dst` holds a data set with other settings, or
            another process writes it.
    """
    world = world or World()
    for split, count in num_clips.items():
        clip_seed(world.seed, split, 0)  # names an unknown split
        if count < 0:
            raise ValueError(f"{count} clips of split {split}: the number must not be negative")
    if num_workers < 1:
        raise ValueError(f"num_workers={num_workers} must be at least 1")
    num_clips = {split: count for split, count in num_clips.items() if count}
    if not num_clips:
        raise ValueError("no clips are asked for: give at least one split a number above 0")
    settings = json.loads(json.dumps({"num_clips": num_clips, "world": dataclasses.asdict(world), "masks": with_masks}))
    for path in (dst / "unfinished.json", dst / "world.json"):
        if path.exists() and (found := json.loads(path.read_text())["settings"]) != settings:
            changed = [key for key in settings if found.get(key) != settings[key]]
            raise ValueError(
                f"{dst} holds a data set with other settings ({', '.join(changed)}): choose another folder"
            )
    if not _is_finished(dst, settings):
        dst.mkdir(parents=True, exist_ok=True)
        with owned(dst, leaves_files=False):
            if not _is_finished(dst, settings):  # by the process that held it just now
                _complete(dst, world, settings, num_workers)
    return dst


def _complete(dst: Path, world: World, settings: Mapping[str, Any], num_workers: int) -> None:
    """Write what a data set lacks; only while holding its folder."""
    num_clips: dict[str, int] = settings["num_clips"]
    for split in num_clips:
        (dst / split / "videos").mkdir(parents=True, exist_ok=True)
    _clear_parts(dst)
    (dst / "world.json").unlink(missing_ok=True)
    write_text(dst / "unfinished.json", json.dumps({"settings": settings}) + "\n")
    missing = _missing_clips(dst, num_clips)
    jobs = [(s, todo[i : i + CHUNK]) for s, todo in missing.items() for i in range(0, len(todo), CHUNK)]
    tables = [path for path in _tables(dst, settings) if not path.exists()]  # they appear only when complete
    bar = Progress(console=Console(stderr=True), disable=not sys.stderr.isatty())
    with _left_clean(dst), bar as progress, Workers(num_workers) as pool:
        task = progress.add_task("sprite world", total=sum(num_clips.values()))
        progress.advance(task, sum(num_clips.values()) - sum(map(len, missing.values())))
        for job in as_completed([pool.submit(_write_clips, dst, world, split, todo) for split, todo in jobs]):
            progress.advance(task, job.result())
        for job in as_completed([pool.submit(_write_table, p, world, num_clips[p.parent.name]) for p in tables]):
            job.result()
    facts = {"settings": settings, "families": world.families, "splits": list(num_clips)}
    write_text(dst / "world.json", json.dumps(facts) + "\n")
    (dst / "unfinished.json").unlink()


@contextmanager
def _left_clean(dst: Path) -> Iterator[None]:
    """Remove what workers that were ended had not finished; those of a killed process go with the next call."""
    try:
        yield
    except BaseException:
        _clear_parts(dst)
        raise


def _clear_parts(dst: Path) -> None:
    for folder in (dst, *dst.glob("*/"), *dst.glob("*/videos")):
        clear_parts(folder)


def _missing_clips(dst: Path, num_clips: Mapping[str, int]) -> dict[str, list[int]]:
    """The clips that are not there yet, by split."""
    return {
        split: [i for i in range(count) if not (dst / video_name(split, i)).exists()]
        for split, count in num_clips.items()
    }


def _is_finished(dst: Path, settings: Mapping[str, Any]) -> bool:
    return (
        (dst / "world.json").exists()
        and not any(_missing_clips(dst, settings["num_clips"]).values())
        and all(path.exists() for path in _tables(dst, settings))
    )


def files_of(split: str) -> list[str]:
    """Those of `FILES` that a split has."""
    others = HELD_OUT_FILES if split == "train" else TRAINING_FILES
    return [file for file in FILES if file not in others]


def _tables(dst: Path, settings: Mapping[str, Any]) -> list[Path]:
    """The JSONL files of a data set."""
    names = {split: files_of(split) for split in settings["num_clips"]}
    extra = ["truth", *(["masks"] if settings["masks"] else [])]
    return [dst / split / f"{name}.jsonl" for split in names for name in (*names[split], *extra)]
