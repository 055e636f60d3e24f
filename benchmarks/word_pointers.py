"""What pointers at single words buy: `python benchmarks/word_pointers.py`.

`hicom-tiny` has four pointers, two of which look for one word of the instruction each (`num_word_pointers`). Here its
recipe is run twice for every seed, as it is and with four pointers that look for the whole instruction, with fewer
steps; then both answer the same held-out questions. Both start from the embedded `hicom-tiny-start`, whose text tower
keeps names apart, and both learn from comparisons (`compare.jsonl`).

One command makes what is missing and goes on after `kill -9`; `--rows words` and `--rows whole` started side by side
share the work of a seed. Writes `word-pointers.json` and `word-pointers.md` to `docs/results/` once both rows of a seed
are answered. Needs the world (`hicom world make runs/world --train 40000`). About 40 minutes of a CPU core for a row
and seed.

    OUT/WEIGHTS/ROW-SEED/align, pretrain, tune    training runs (`hicom.train`)
    OUT/WEIGHTS/ROW-SEED/answers.json             right and wrong answers

WEIGHTS names those of `hicom-tiny-start`, so what came from an older one is left aside.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablation_report import Hits, made_with, pairs_of, row_of
from ablations import write_whole
from world_accuracy import answers_of, weights_of

from hicom.model.hub import find_model
from hicom.recipes.tiny import tiny_align, tiny_parts, tiny_pretrain, tiny_tune
from hicom.train import TrainConfig, run

logger = logging.getLogger("word_pointers")

ROOT = Path(__file__).parents[1]
START = "hicom-tiny-start"
ROWS = {"words": "two of four pointers at words", "whole": "all four at the whole instruction"}


@dataclass(frozen=True, kw_only=True)
class Steps:
    """How long the stages are; batches and rates are the recipe's.

    Attributes:
        align: steps of stage 1.
        pretrain: steps of stage 2.
        tune: steps of stage 3.
    """

    align: int = 250
    pretrain: int = 200
    tune: int = 2000


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One row with one seed.

    Attributes:
        row: `words` or `whole`.
        seed: of the compressor's first weights and of the order of the data.
        steps: of its stages.
        world: the data set.
        cache: vision features.
        out: folder of all rows.
        num_clips: held-out clips that it is asked about.
    """

    row: str
    seed: int
    steps: Steps
    world: Path
    cache: Path
    out: Path
    num_clips: int

    @property
    def folder(self) -> Path:
        """Where its runs lie."""
        return self.out / f"{self.row}-{self.seed}"

    def stages(self) -> Iterator[TrainConfig]:
        """Yield the recipe's stages, each from the last one's model."""
        parts = dataclasses.replace(tiny_parts(), towers=START, language_model=START)
        if self.row == "whole":
            parts = dataclasses.replace(parts, config={**parts.config, "num_word_pointers": 0})
        init: str | None = None
        for recipe, steps in (
            (tiny_align(), self.steps.align),
            (tiny_pretrain(), self.steps.pretrain),
            (tiny_tune(), self.steps.tune),
        ):
            records = tuple(str(self.world / "train" / Path(name).name) for name in recipe.data.records)
            data = dataclasses.replace(recipe.data, records=records, root=str(self.world), cache=str(self.cache))
            out = str(self.folder / recipe.name)
            start = {"init": init} if init else {"init": None, "parts": parts}
            yield dataclasses.replace(recipe, out=out, data=data, steps=steps, seed=self.seed, **start)
            init = str(Path(out) / "model")

    @property
    def answers_path(self) -> Path:
        """The file of its answers."""
        return self.folder / "answers.json"

    def answers(self) -> dict[str, Any] | None:
        """Return its answers, if they are there."""
        return json.loads(self.answers_path.read_text("utf-8")) if self.answers_path.exists() else None

    def advance(self) -> None:
        """Train and ask what is missing."""
        if self.answers_path.exists():
            return
        for config in list(self.stages()):  # wrong steps of the last one are said before the first one trains
            logger.info("%s, seed %d: %s", self.row, self.seed, config.name)
            folder = run(config)
        found = answers_of(folder, self.world, self.cache, num_clips=self.num_clips)
        found = {"steps": dataclasses.asdict(self.steps), **found}
        write_whole(self.answers_path, json.dumps(found) + "\n")


HEAD = """# Pointers at single words

Made by `python benchmarks/word_pointers.py`; what they are: [decisions.md](../decisions.md), 57 to 59.

The recipe of hicom-tiny with fewer steps ({align} x 16, {pretrain} x 64, {tune} x 64), as it is and with four pointers
that all look for the whole instruction; {tokens} visual tokens of 512. Open questions about {clips} held-out clips,
percent of right answers; `mean` is over families. Intervals are bootstraps over seeds and clips, 95 %, differences
paired. Seeds: {seeds}.
{date}, {machine}, {threads} CPU threads, commit {commit}.
"""


def report(pairs: dict[int, tuple[dict[str, Any], dict[str, Any]]], results: Path) -> None:
    """Write table and numbers of the seeds of which both rows are answered.

    Args:
        pairs: answers of `words` and `whole` by seed.
        results: folder of the report.
    """
    hits = [{seed: Hits.of(pair[i]) for seed, pair in pairs.items()} for i in range(2)]
    compared = pairs_of(*hits)
    facts = {
        pair.name: {
            "n": pair.n,
            "words": pair.ours.mean,
            "whole": pair.theirs.mean,
            "difference": {"mean": pair.change.mean, "low": pair.change.low, "high": pair.change.high},
        }
        for pair in compared
    }
    head = ["", "n", *ROWS.values(), "difference", "95 % interval, paired"]
    lines = [row_of(pair.cells()) for pair in compared]
    every = [answers for pair in pairs.values() for answers in pair]
    first = every[0]
    text = HEAD.format(
        **first["steps"],
        tokens=first["visual_tokens"],
        clips=first["num_clips"],
        seeds=", ".join(map(str, pairs)),
        **made_with(every),
    )
    write_whole(results / "word-pointers.md", "\n".join([text, row_of(head), "|---" * len(head) + "|", *lines, ""]))
    kept = ("steps", "num_clips", "visual_tokens", "date", "commit", "hardware")
    whole = {key: first[key] for key in kept} | {"seeds": list(pairs), "families": facts}
    write_whole(results / "word-pointers.json", json.dumps(whole, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, default=Path("runs/world"))
    parser.add_argument("--cache", type=Path, default=Path("runs/features"))
    parser.add_argument("--out", type=Path, default=Path("runs/word-pointers"))
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--num-clips", type=int, default=2000)
    for field in dataclasses.fields(Steps):
        parser.add_argument(f"--{field.name}-steps", type=int, default=field.default)
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if not (args.world / "world.json").exists():
        print(f"error: {args.world} is no world: `hicom world make {args.world}` writes one", file=sys.stderr)
        return 2
    steps = Steps(align=args.align_steps, pretrain=args.pretrain_steps, tune=args.tune_steps)
    out = args.out / weights_of(find_model(START))
    of = {"steps": steps, "world": args.world, "cache": args.cache, "out": out, "num_clips": args.num_clips}
    for seed in args.seeds:
        for row in args.rows:
            Trained(row=row, seed=seed, **of).advance()
    pairs = {}
    for seed in args.seeds:
        ours, theirs = (Trained(row=row, seed=seed, **of).answers() for row in ROWS)
        if ours is not None and theirs is not None:
            pairs[seed] = (ours, theirs)
    if pairs:
        report(pairs, args.results)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"word_pointers: error: {error}")
