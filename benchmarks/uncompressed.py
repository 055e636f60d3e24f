"""What compression costs hicom-tiny: `python benchmarks/uncompressed.py`.

A window of (1,1,1) compresses nothing: every patch is a token of its own. The embedded model answers with it, too, but
has never been trained to. So it is trained further twice, equally long on the same questions: with its own window, and
with that one. Both answer the same held-out questions as the model they come from.

One command makes what is missing, goes on after `kill -9`, and writes `uncompressed.json` and `uncompressed.md` to
`docs/results/` once all is answered. `--rows compressed` and `--rows uncompressed` may run side by side. Needs the
world (`hicom world make runs/world`). Less than an hour on one CPU core, nearly all of it without compression.

    OUT/WEIGHTS/ROW                   a training run (`hicom.train`)
    OUT/WEIGHTS/answers/NAME.json     right and wrong answers

WEIGHTS names those of the embedded model, so what came from an older one is left aside.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablation_report import Hits, Number, made_with, number, number_cells, over_seeds, pairs_of, row_of
from ablations import write_whole
from world_accuracy import answers_of, weights_of

from hicom.model.hub import find_model
from hicom.model.ops import Window
from hicom.recipes.stages import tune
from hicom.recipes.tiny import TINY_WINDOWS, tiny_tune
from hicom.train import TrainConfig, run

logger = logging.getLogger("uncompressed")

ROOT = Path(__file__).parents[1]
START = "hicom-tiny"
ROWS: dict[str, Window] = {"compressed": TINY_WINDOWS[0], "uncompressed": (1, 1, 1)}
EMBEDDED: tuple[Window, ...] = (TINY_WINDOWS[0], (2, 2, 2), (1, 2, 2), (1, 1, 1))
"""Windows that the model answers with as it is embedded; it was trained with the first of them only."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Both rows and the model that they come from.

    Attributes:
        world: the data set.
        cache: vision features.
        out: folder of runs and answers.
        steps: that both are trained further.
        num_clips: held-out clips that are asked about.
        seed: of the order of the data.
    """

    world: Path
    cache: Path
    out: Path
    steps: int
    num_clips: int
    seed: int = 0

    def training(self, row: str) -> TrainConfig:
        """Return the training run of a row: stage `tune` once more, at a third of its rates."""
        recipe = tiny_tune()
        records = tuple(str(self.world / "train" / Path(name).name) for name in recipe.data.records)
        return dataclasses.replace(
            recipe,
            name=row,
            out=str(self.out / row),
            init=START,
            data=dataclasses.replace(recipe.data, records=records, root=str(self.world), cache=str(self.cache)),
            stage=tune(1e-3, injection_rate=1e-4, windows=(ROWS[row],)),
            steps=self.steps,
            seed=self.seed,
        )

    def path(self, name: str) -> Path:
        """Return the file of answers."""
        return self.out / "answers" / f"{name}.json"

    def answers(self, name: str) -> dict[str, Any] | None:
        """Return answers, if they are there.

        Raises:
            ValueError: they are about other clips, or of a model that was trained for another time.
        """
        path = self.path(name)
        if not path.exists():
            return None
        found = json.loads(path.read_text("utf-8"))
        for key, asked in (("num_clips", self.num_clips), ("steps", self.steps if name in ROWS else 0)):
            if found[key] != asked:
                raise ValueError(f"{path} was made with {key}={found[key]}, not {asked}; choose another --out")
        return found

    def ask(self, name: str, folder: Path, window: Window) -> None:
        """Answer the questions with one window, unless that is done."""
        if self.answers(name) is None:
            logger.info("%s: answering with window %s", name, window)
            found = answers_of(folder, self.world, self.cache, num_clips=self.num_clips, window=window)
            found |= {"window": window, "steps": self.steps if name in ROWS else 0}
            write_whole(self.path(name), json.dumps(found) + "\n")

    def advance(self, row: str) -> None:
        """Train and ask what is missing of a row."""
        if self.answers(row) is None:
            logger.info("%s: training", row)
            self.ask(row, run(self.training(row)), ROWS[row])

    def ask_embedded(self) -> None:
        """Ask the model that both come from."""
        for window in EMBEDDED:
            self.ask(embedded(window), find_model(START), window)

    def everything(self) -> dict[str, dict[str, Any]] | None:
        """Return all answers by name; None while some are missing."""
        found = {name: self.answers(name) for name in (*map(embedded, EMBEDDED), *ROWS)}
        there = {name: answers for name, answers in found.items() if answers is not None}
        return there if len(there) == len(found) else None


def embedded(window: Window) -> str:
    """Return the name of the embedded model's answers."""
    return f"embedded-{'-'.join(map(str, window))}"


def share(ours: Hits, theirs: Hits) -> Number:
    """Return a mean as a share of another one, with the interval over clips that both were asked about."""
    return over_seeds([ours.mean() / theirs.mean()], [ours.draws / theirs.draws], [0])


HEAD = """# What compression costs

Made by `python benchmarks/uncompressed.py`; what it says of the model: [hicom-tiny.md](../hicom-tiny.md).

hicom-tiny as it is embedded, and trained further for {steps} steps of {batch} questions, with its own window and with
(1,1,1), which makes every patch a token; global tokens and pointers count, too. Open questions about {clips} held-out
clips, percent of right answers, `mean` over question families. Intervals are bootstraps over clips, 95 %, differences
and shares paired; the two trainings are one run each, whose luck they do not know.
{date}, {machine}, {threads} CPU threads, commit {commit}.
"""


def report(found: Mapping[str, Mapping[str, Any]], batch: int, results: Path) -> None:
    """Write tables and numbers.

    Args:
        found: answers by name.
        batch: questions of a step.
        results: folder of the report.
    """
    hits = {name: Hits.of(each) for name, each in found.items()}
    best = max((embedded(ROWS["uncompressed"]), "uncompressed"), key=lambda name: hits[name].mean())
    head = ["", "visual tokens", "mean", "95 % interval", "of the best without compression"]
    lines, facts = [row_of(head), "|---" * len(head) + "|"], {}
    for name, each in found.items():
        mean, part = number({0: hits[name]}), share(hits[name], hits[best])
        assert mean is not None
        training = f"trained further for {each['steps']} steps" if each["steps"] else "as embedded"
        label = f"{training}, window ({','.join(map(str, each['window']))})"
        _, shown, bounds = number_cells(mean)
        cells = [shown, bounds, "" if name == best else "{1} ({2})".format(*number_cells(part))]
        lines.append(row_of([label, str(each["visual_tokens"]), *cells]))
        facts[name] = {key: each[key] for key in ("window", "visual_tokens", "steps", "num_clips", "date", "commit")}
        facts[name] |= {"mean": vars(mean), "share": vars(part)}
    pairs = pairs_of(*({0: hits[name]} for name in ROWS))
    tokens = [f"{found[name]['visual_tokens']} tokens" for name in ROWS]
    head = ["trained further", "n", *tokens, "difference", "95 % interval, paired"]
    lines += ["", row_of(head), "|---" * len(head) + "|", *(row_of(pair.cells()) for pair in pairs)]
    families = {
        pair.name: {"n": pair.n, **{key: vars(getattr(pair, key)) for key in ("ours", "theirs", "change")}}
        for pair in pairs
    }
    last = found["uncompressed"]
    text = HEAD.format(
        steps=last["steps"],
        batch=batch,
        clips=last["num_clips"],
        **made_with(list(found.values())),
    )
    write_whole(results / "uncompressed.md", "\n".join([text, *lines, ""]))
    whole = {"hardware": last["hardware"], "batch": batch, "rows": facts, "families": families}
    write_whole(results / "uncompressed.json", json.dumps(whole, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, default=Path("runs/world"))
    parser.add_argument("--cache", type=Path, default=Path("runs/features"))
    parser.add_argument("--out", type=Path, default=Path("runs/uncompressed"))
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--num-clips", type=int, default=1000)
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if not (args.world / "world.json").exists():
        raise ValueError(f"{args.world} is no world: `hicom world make {args.world}` writes one")
    if args.num_clips < 1:
        raise ValueError(f"num_clips={args.num_clips} must be at least 1")
    out = args.out / weights_of(find_model(START))
    study = Study(world=args.world, cache=args.cache, out=out, steps=args.steps, num_clips=args.num_clips)
    for row in args.rows:
        study.advance(row)
    study.ask_embedded()
    found = study.everything()
    if found is not None:
        report(found, tiny_tune().global_batch_size or 0, args.results)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"uncompressed: error: {error}")
