"""More frames than in training, on the sprite world's long clips: `python benchmarks/long_context.py`.

The embedded `hicom-tiny` (trained on 8 frames of clips of 2 s) and a copy of it that is trained further on 32 frames of
long clips answer the same questions at 8 to 128 frames. Long are the clips of the world's split `test_long` (16 s, 128
frames), as those that the copy is trained on, and longer ones (64 s, 128 frames). Every frame of a held-out clip is
encoded once; which of them a test sees, the library's own frame choice says.

One command makes what is missing, goes on after `kill -9`, and writes `long-context.json`, `long-context.md` and plots
to `docs/results/` after every test. About a quarter of an hour on one CPU core.

    OUT/train, OUT/long, OUT/longer    clips and questions
    OUT/features                       vision features
    OUT/tuned-32-WEIGHTS               a training run (`hicom.train`) from weights of this name
    OUT/answers/DIGEST.json            right and wrong answers of one model to one test
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
from ablation_report import Hits, difference, number, number_cells, row_of
from ablations import digest_of, load_model, write_whole
from plots import accuracy_plot
from torch import Tensor
from world_accuracy import answer, counted, read_questions, weights_of

from hicom.data.features import FeatureStore, cache_features
from hicom.model import compressor
from hicom.model.hub import find_model
from hicom.model.modeling import HIComForConditionalGeneration
from hicom.model.ops import Window, sinusoidal_table
from hicom.model.processing import HIComProcessor
from hicom.provenance import git_commit, hardware, short_commit
from hicom.recipes.stages import tune
from hicom.recipes.tiny import TINY_WINDOWS
from hicom.train import DataConfig, TrainConfig, run
from hicom.video import read_frames
from hicom.world.dataset import make_dataset, make_world
from hicom.world.scenes import WorldConfig

logger = logging.getLogger("long_context")

ROOT = Path(__file__).parents[1]
START = find_model("hicom-tiny")
NUM_FRAMES = 128
"""Of every held-out clip."""
TRAINED = 32
"""Frames of training that all is compared with, as in the paper."""
BATCH_FRAMES = 2048
"""Frames of the questions of one batch."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How much is made, trained and asked.

    Attributes:
        num_train_clips: clips of 16 s that are trained on.
        steps: optimizer steps of each copy.
        batch: questions of a step.
        num_clips: held-out clips of either length that are asked about.
    """

    num_train_clips: int = 1500
    steps: int = 300
    batch: int = 32
    num_clips: int = 200


PROTOCOLS = {"cpu": Protocol(), "smoke": Protocol(num_train_clips=2, steps=1, batch=2, num_clips=2)}

Clips = Literal["long", "longer"]
WORLDS: dict[Clips, WorldConfig] = {"long": WorldConfig(), "longer": WorldConfig(duration_s=8.0, fps=2.0)}
"""Worlds whose split `test_long`, of clips eight times as long, is asked about: 16 s and 64 s."""
TRAIN_WORLD = WorldConfig(duration_s=16.0)
SOURCE_FPS: dict[Clips, float] = {name: config.fps for name, config in WORLDS.items()}
LENGTHS: dict[Clips, str] = {"long": "16 s", "longer": "64 s"}


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is asked: the embedded model, or a copy trained further on `trained` frames of long clips."""

    name: str
    label: str
    trained: int | None = None


MODELS = (
    Model(name="tuned-32", label="trained further on 32 frames of 16 s", trained=TRAINED),
    Model(name="tiny", label="as embedded, trained on 8 frames of 2 s"),
)


@dataclass(frozen=True, kw_only=True)
class Test:
    """One way to look at the held-out clips.

    Attributes:
        clips: `long` or `longer`.
        num_frames: frames spread evenly; None: by `fps`.
        fps: frames a second.
        window: (T, H, W) in place of the model's.
        max_visual_tokens: budget that picks the window.
        positions: `absolute` numbers the frames for the global branch, as the paper does; `scaled` squeezes more frames
            than 32 into the numbers 0 to 32.
    """

    clips: Clips
    num_frames: int | None = None
    fps: float | None = None
    window: Window | None = None
    max_visual_tokens: int | None = None
    positions: Literal["absolute", "scaled"] = "absolute"

    @property
    def label(self) -> str:
        """What the report calls it."""
        parts = [f"{self.num_frames} frames" if self.fps is None else f"{self.fps:g} fps"]
        parts += [f"window ({','.join(map(str, self.window))})"] if self.window is not None else []
        parts += [f"at most {self.max_visual_tokens} tokens"] if self.max_visual_tokens is not None else []
        parts += ["scaled positions"] if self.positions == "scaled" else []
        return ", ".join(parts)

    @cached_property
    def frames(self) -> list[int]:
        """The frames that are seen: the library's choice, shown a clip whose frames are their own numbers."""
        numbered = np.arange(NUM_FRAMES, dtype=np.uint8).reshape(-1, 1, 1, 1).repeat(3, -1)
        choice: dict[str, Any] = {"num_frames": self.num_frames} if self.fps is None else {"fps": self.fps}
        return read_frames(numbered, source_fps=SOURCE_FPS[self.clips], **choice).frames[:, 0, 0, 0].tolist()


FRAMES = (8, 16, 32, 64, NUM_FRAMES)
BUDGET = 40
"""Visual tokens of 32 frames under the model's window (4,4,4)."""


def tests_of(model: Model) -> Iterator[Test]:
    """Yield what a model is asked; the one trained on 32 frames is asked more."""
    clips: Clips
    for clips in WORLDS:
        yield from (Test(clips=clips, num_frames=n) for n in FRAMES)
    if model.trained != TRAINED:
        return
    for clips in WORLDS:
        whole_fps = SOURCE_FPS[clips]
        yield from (Test(clips=clips, fps=fps) for fps in (whole_fps / 4, whole_fps / 2))
        yield Test(clips=clips, num_frames=NUM_FRAMES, max_visual_tokens=BUDGET)
        yield Test(clips=clips, num_frames=NUM_FRAMES, window=(4 * NUM_FRAMES // TRAINED, 4, 4))
        yield Test(clips=clips, num_frames=NUM_FRAMES, positions="scaled")


class ChosenFrames(FeatureStore):
    """Some frames of every video of a store that holds all of them.

    Args:
        store: holds `NUM_FRAMES` frames of every video.
        frames: numbers of those that are seen.
    """

    def __init__(self, store: FeatureStore, frames: Sequence[int]) -> None:
        super().__init__(store.folder)
        self.frames = list(frames)

    def read(self, videos: Iterable[Path], name: Literal["values", "keys"]) -> Tensor:
        """Return `float16[F, h, w, D]`, the chosen frames of `videos`, one video after the other."""
        return torch.cat([super(ChosenFrames, self).read([video], name)[self.frames] for video in videos])

    def counts(self, videos: Iterable[Path]) -> list[int]:
        """Return the number of chosen frames of every video."""
        return [len(self.frames) for _ in videos]


def scaled_table(longest: int, num_frames: int, length: int, dim: int, start: int = 0) -> Tensor:
    """Stand in for `sinusoidal_table`: an axis as long as the clip is squeezed into the places 0 to `longest`."""
    if length != num_frames or num_frames <= longest:
        return sinusoidal_table(length, dim, start)
    places = torch.arange(length, dtype=torch.float64)[:, None] * longest / num_frames
    channel = torch.arange(dim, dtype=torch.float64)
    angle = places / 10000 ** (2 * (channel // 2) / dim)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos())


@contextmanager
def positions_of(test: Test) -> Iterator[None]:
    """Have the global branch number frames as a test wants it."""
    if test.positions == "absolute":
        yield
        return
    with patch.object(compressor, "sinusoidal_table", partial(scaled_table, TRAINED, len(test.frames))):
        yield


@dataclass(frozen=True)
class Study:
    """Everything in one folder.

    Attributes:
        out: the folder.
        protocol: how much there is.
        start: folder of the model that all begins with.
        workers: processes that render clips.
    """

    out: Path
    protocol: Protocol
    start: Path = START
    workers: int = 1

    @property
    def features(self) -> Path:
        """The folder of vision features."""
        return self.out / "features"

    @property
    def questions(self) -> Path:
        """The open training questions."""
        return self.out / "open.jsonl"

    def make_clips(self) -> None:
        """Write clips and questions; those with options are left out, which the model does not learn to answer."""
        make_dataset(
            self.out / "train",
            {"train": self.protocol.num_train_clips},
            make_world(config=TRAIN_WORLD),
            num_workers=self.workers,
        )
        for clips, config in WORLDS.items():
            splits = {"test_long": self.protocol.num_clips}
            make_dataset(self.out / clips, splits, make_world(config=config), num_workers=self.workers)
        lines = (self.out / "train" / "train" / "tune.jsonl").read_text("utf-8").splitlines()
        write_whole(self.questions, "".join(f"{line}\n" for line in lines if json.loads(line)["form"] == "open"))

    def training(self, model: Model) -> TrainConfig:
        """Return the training run of a copy: stage `tune` once more, at a third of the rate that the model had."""
        assert model.trained is not None
        return TrainConfig(
            name=model.name,
            out=str(self.out / f"{model.name}-{weights_of(self.start)}"),
            init=str(self.start),
            data=DataConfig(
                records=(str(self.questions),),
                root=str(self.out / "train"),
                num_frames=model.trained,
                cache=str(self.features),
            ),
            stage=tune(1e-3, injection_rate=1e-4, windows=TINY_WINDOWS),
            optimizer="muon",
            weight_decay=0.02,
            steps=self.protocol.steps,
            batch_size=self.protocol.batch,
            group_by_length=True,
            per_video=min(8, self.protocol.batch),
        )

    def folder(self, model: Model) -> Path:
        """Return the folder of a model, which is trained if it is not there."""
        return self.start if model.trained is None else run(self.training(model))

    def answers_path(self, folder: Path, test: Test) -> Path:
        """Return the file of a model's answers to a test: another model or test has another file."""
        digest = digest_of(weights_of(folder), dataclasses.asdict(test), self.protocol.num_clips)
        return self.out / "answers" / f"{digest}.json"

    def ask(self, folder: Path, test: Test) -> dict[str, Any]:
        """Return a model's answers to a test, as `ablation_report.Hits` counts them, from the file if it is there."""
        path = self.answers_path(folder, test)
        if path.exists():
            return json.loads(path.read_text("utf-8"))
        model, processor = loaded(folder)
        samples = read_questions(self.out / test.clips, "test_long", num_clips=self.protocol.num_clips)
        videos = [video for sample in samples for video in sample.videos]
        store = cache_features(model, processor, videos, self.features, num_frames=NUM_FRAMES)
        num_frames = len(test.frames)
        window = test.window
        if test.max_visual_tokens is not None:
            window = processor.choose_window(num_frames, test.max_visual_tokens)
        start = time.monotonic()
        with positions_of(test):
            seen = ChosenFrames(store, test.frames)
            size = max(1, BATCH_FRAMES // num_frames)
            given = list(answer(model, processor, seen, samples, window=window, batch_size=size))
        results = {
            "num_frames": num_frames,
            "window": window or processor.window,
            "visual_tokens": processor.token_count(num_frames, window),
            "seconds_per_question": (time.monotonic() - start) / len(samples),
            "date": time.strftime("%Y-%m-%d"),
            "commit": git_commit(),
            "hardware": hardware(),
            "chance": [sample.metadata["chance"] for sample in samples],
            **counted(samples, given),
        }
        write_whole(path, json.dumps(results) + "\n")
        return results


@lru_cache(maxsize=1)
def loaded(folder: Path) -> tuple[HIComForConditionalGeneration, HIComProcessor]:
    """Return a model for answering."""
    model, processor = load_model(folder)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), processor


# Results.


@dataclass(frozen=True)
class Measured:
    """One line of the report."""

    model: Model
    test: Test
    answers: dict[str, Any]

    @cached_property
    def hits(self) -> Hits:
        """Right answers by clip and family."""
        return Hits.of(self.answers)


def facts_of(line: Measured, base: Measured) -> dict[str, Any]:
    """Return the numbers of a line as JSON: accuracy, and the paired difference to `base`."""

    def both(ours: Hits, theirs: Hits) -> dict[str, Any]:
        accuracy, change = number({0: ours}), difference({0: ours}, {0: theirs})
        assert accuracy is not None
        assert change is not None
        return {"n": int(ours.asked.sum()), "accuracy": interval(accuracy), "minus_32_frames": interval(change)}

    kept = ("num_frames", "window", "visual_tokens", "seconds_per_question", "date", "commit", "hardware")
    families = {name: both(line.hits.of_family(name), base.hits.of_family(name)) for name in line.hits.families}
    return {
        "model": line.model.name,
        "test": line.test.label,
        **dataclasses.asdict(line.test),
        **{key: line.answers[key] for key in kept},
        "mean": both(line.hits, base.hits),
        "families": families,
    }


def interval(value: Any) -> dict[str, float]:
    """Return mean and 95 % interval of an `ablation_report.Number`."""
    return {"mean": value.mean, "low": value.low, "high": value.high}


HEAD = """# More frames than in training

Made by `python benchmarks/long_context.py`; what it shows: [long_videos.md](../long_videos.md).

hicom-tiny as embedded (trained on 8 frames of clips of 2 s) and a copy of it that is trained further on 32 frames of
clips of 16 s. Open questions about held-out clips, percent of right answers, `mean` over question families; all clips
have 128 frames. Differences are paired, question by question, with the same model and clips at 32 frames spread evenly.
Intervals are bootstraps over clips, 95 %; the copy is one training run, whose luck they do not know. With scaled
positions the global branch sees 128 frames under the numbers 0 to 32; `at most 40 tokens` is a budget that picks the
window.
"""


def markdown(lines: Sequence[Measured], protocol: Protocol) -> str:
    """Return the report."""
    commits = sorted({short_commit(line.answers["commit"]) for line in lines})
    parts = [
        HEAD,
        f"{protocol.num_train_clips} training clips, {protocol.steps} steps x {protocol.batch} questions; "
        f"{protocol.num_clips} clips of either length. {time.strftime('%Y-%m-%d')}, {hardware()['machine']}, "
        f"{hardware()['threads']} CPU threads, commit {', '.join(commits)}.\n",
    ]
    for clips in WORLDS:
        here = [line for line in lines if line.test.clips == clips]
        if not here:
            continue
        families = here[0].hits.families
        counts = ", ".join(f"{name} {int(here[0].hits.of_family(name).asked.sum())}" for name in families)
        parts.append(f"## Clips of {LENGTHS[clips]}\n\nQuestions: {counts}.\n\n![accuracy](long-context-{clips}.svg)\n")
        for model in dict.fromkeys(line.model for line in here):
            own = [line for line in here if line.model == model]
            base = base_of(own, clips)
            head = ["", "visual tokens", "mean", "95 % interval", *families, "minus 32 frames", "95 % interval, paired"]
            table = [f"### {model.label}\n", row_of(head), "|---" * len(head) + "|"]
            for line in own:
                _, mean, bounds = number_cells(number({0: line.hits}))
                shares = [f"{100 * line.hits.of_family(name).mean():.1f}" for name in families]
                _, *change = number_cells(difference({0: line.hits}, {0: base.hits}), "+")
                change = ["", ""] if line is base else change
                table.append(
                    row_of([line.test.label, str(line.answers["visual_tokens"]), mean, bounds, *shares, *change])
                )
            head = ["minus 32 frames, points", *families]
            table += ["", row_of(head), "|---" * len(head) + "|"]
            for line in own:
                if line is base:
                    continue
                cells = [
                    "{1} ({2})".format(
                        *number_cells(difference({0: line.hits.of_family(f)}, {0: base.hits.of_family(f)}), "+")
                    )
                    for f in families
                ]
                table.append(row_of([line.test.label, *cells]))
            parts.append("\n".join(table) + "\n")
    return "\n".join(parts)


def base_of(lines: Sequence[Measured], clips: Clips) -> Measured:
    """Return the line that a model's others are compared with."""
    return next(line for line in lines if line.test == Test(clips=clips, num_frames=TRAINED))


def write_report(lines: Sequence[Measured], protocol: Protocol, results: Path) -> None:
    """Write JSON, tables and plots of what is measured; a model counts once its 32 frames are."""
    by_model: dict[tuple[str, Clips], list[Measured]] = {}
    for line in lines:
        by_model.setdefault((line.model.name, line.test.clips), []).append(line)
    by_model = {
        key: own
        for key, own in by_model.items()
        if any(line.test == Test(clips=key[1], num_frames=TRAINED) for line in own)
    }
    shown = [line for own in by_model.values() for line in own]
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": git_commit(),
        "hardware": hardware(),
        "protocol": dataclasses.asdict(protocol),
        "lines": [facts_of(line, base_of(own, own[0].test.clips)) for own in by_model.values() for line in own],
    }
    write_whole(results / "long-context.json", json.dumps(facts, indent=1) + "\n")
    write_whole(results / "long-context.md", markdown(shown, protocol))
    for clips in WORLDS:
        curves = {
            model.label: [
                (float(line.answers["num_frames"]), value)
                for line in by_model.get((model.name, clips), [])
                if line.test == Test(clips=clips, num_frames=line.test.num_frames)
                and (value := number({0: line.hits})) is not None
            ]
            for model in MODELS
            if (model.name, clips) in by_model
        }
        plot = accuracy_plot(f"Clips of {LENGTHS[clips]}, window (4,4,4)", "frames", curves)
        write_whole(results / f"long-context-{clips}.svg", plot)


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/long-context"))
    parser.add_argument("--results", type=Path, default=None, help="folder of the report; default: docs/results")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="cpu")
    parser.add_argument("--models", nargs="+", choices=[m.name for m in MODELS], default=[m.name for m in MODELS])
    parser.add_argument("--workers", type=int, default=1, help="processes that render clips")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(args.threads)
    study = Study(args.out, PROTOCOLS[args.protocol], workers=args.workers)
    # A smoke test is no result.
    results = args.results or (args.out / "results" if args.protocol == "smoke" else ROOT / "docs" / "results")
    study.make_clips()
    lines: list[Measured] = []
    for model in MODELS:
        if model.name not in args.models:
            continue
        folder = study.folder(model)
        for test in tests_of(model):
            logger.info("%s: %s of %s", model.name, test.label, test.clips)
            lines.append(Measured(model, test, study.ask(folder, test)))
            write_report(lines, study.protocol, results)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"long_context: error: {error}")
