"""From answers to tables: intervals over seeds and clips, paired differences, Markdown and plots of `ablations.py`.

A number is the mean over question families of the share of right answers, averaged over seeds. Its 95 % interval is a
bootstrap that draws seeds and clips anew, both with replacement; all questions about a clip stay together, and all
seeds answer about the same drawn clips. A difference of two rows draws the same seeds and clips for both. With three
seeds such an interval is somewhat too narrow, and with one seed it knows of clips only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from hicom.provenance import short_commit

NUM_DRAWS = 1000
# Questions by what they name: the paper's Table A4 has them as valid and invalid instructions.
NAMING_FAMILIES = ("presence", "before")
GENERIC_FAMILY = "generic"
MISSING = "missing"


@dataclass(frozen=True)
class Cell:
    """One number: the answers of one row to one test, of all questions or of a group (`naming`, `generic`)."""

    row: str
    test: str = "open"
    group: str = "all"


@dataclass(frozen=True)
class Entry:
    """A line of a table: a number of ours and the paper's numbers for what it stands for."""

    label: str
    cell: Cell
    paper: tuple[float, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """A difference `cell - other` that the paper claims something about.

    Attributes:
        label: what is compared.
        cell: what is expected to be better.
        other: what it is compared with.
        expected: the paper's difference where the entries' numbers do not give it.
    """

    label: str
    cell: Cell
    other: Cell
    expected: float | None = None


@dataclass(frozen=True)
class Table:
    """A table of the paper in small.

    Attributes:
        name: on the command line.
        title: over it.
        note: what stands for what.
        entries: its lines.
        comparisons: its differences.
        paper: names of the columns of the paper's numbers.
        plot: whether its entries are also plotted: a line for every row, accuracy over visual tokens or frames.
    """

    name: str
    title: str
    note: str
    entries: tuple[Entry, ...]
    comparisons: tuple[Comparison, ...] = ()
    paper: tuple[str, ...] = ("VMME", "MVBench", "Ego")
    plot: str | None = None


@dataclass(frozen=True)
class Hits:
    """Right answers and questions of one seed, `float[clips, families]`, of one test.

    Attributes:
        clips: names of the clips.
        families: names of the families.
        right: right answers.
        asked: questions.
    """

    clips: tuple[str, ...]
    families: tuple[str, ...]
    right: np.ndarray
    asked: np.ndarray

    @staticmethod
    def of(answers: Mapping[str, Any], group: str = "all") -> Hits:
        """Count the answers of one test, as `ablations.py` keeps them."""
        clips, families = tuple(answers["clips"]), tuple(answers["families"])
        counts = np.zeros((2, len(clips), len(families)))
        for clip, family, is_right, has_subject in answers["questions"]:
            if is_in(group, families[family], bool(has_subject)):
                counts[0, clip, family] += is_right
                counts[1, clip, family] += 1
        return Hits(clips, families, counts[0], counts[1])

    def of_family(self, family: str) -> Hits:
        """Return the hits of one family."""
        at = self.families.index(family)
        column = slice(at, at + 1)
        return Hits(self.clips, (family,), self.right[:, column], self.asked[:, column])

    def mean(self) -> float:
        """Return the mean over families of the share of right answers."""
        return float(family_mean(self.right.sum(0), self.asked.sum(0)))

    @cached_property
    def draws(self) -> np.ndarray:
        """`float[NUM_DRAWS]`, that mean for drawn clips: the same clips in every call."""
        weights = clip_draws(len(self.clips))
        return family_mean(weights @ self.right, weights @ self.asked)


def is_in(group: str, family: str, has_subject: bool) -> bool:
    """Whether a question belongs to a group.

    Raises:
        ValueError: there is no such group.
    """
    if group == "all":
        return True
    if group == "generic":
        return family == GENERIC_FAMILY
    if group == "naming":
        return has_subject or family in NAMING_FAMILIES
    raise ValueError(f"group={group!r} is none of all, naming, generic")


def family_mean(right: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Return the mean over the last axis of right / asked, leaving out families that were not asked."""
    share = np.divide(right, asked, out=np.zeros(np.shape(right)), where=asked > 0)
    return share.sum(-1) / np.maximum((asked > 0).sum(-1), 1)


@lru_cache(maxsize=8)
def clip_draws(num_clips: int) -> np.ndarray:
    """Return `float[NUM_DRAWS, num_clips]`: how often every clip is drawn."""
    draws = np.random.default_rng(0).multinomial(num_clips, [1 / num_clips] * num_clips, size=NUM_DRAWS)
    return draws.astype(float)


def seed_draws(num_seeds: int) -> np.ndarray:
    """Return `int[NUM_DRAWS, num_seeds]`: which seeds are drawn."""
    return np.random.default_rng(1).integers(num_seeds, size=(NUM_DRAWS, num_seeds))


@dataclass(frozen=True)
class Number:
    """A mean over seeds with its 95 % interval."""

    mean: float
    low: float
    high: float
    seeds: tuple[int, ...]


def over_seeds(means: Sequence[float], draws: Sequence[np.ndarray], seeds: Sequence[int]) -> Number:
    """Return the mean over seeds, with the interval of draws of seeds and clips.

    Args:
        means: of every seed.
        draws: `float[NUM_DRAWS]` of every seed, for the same drawn clips.
        seeds: their numbers.
    """
    picked = np.take_along_axis(np.stack(draws, 1), seed_draws(len(draws)), axis=1).mean(1)
    low, high = np.quantile(picked, [0.025, 0.975])
    return Number(float(np.mean(means)), float(low), float(high), tuple(seeds))


def number(hits: Mapping[int, Hits]) -> Number | None:
    """Return the number of one cell from the hits of its seeds; None without any question."""
    hits = {seed: each for seed, each in sorted(hits.items()) if each.asked.any()}
    if not hits:
        return None
    return over_seeds([each.mean() for each in hits.values()], [each.draws for each in hits.values()], list(hits))


def difference(hits: Mapping[int, Hits], others: Mapping[int, Hits]) -> Number | None:
    """Return the paired difference of two cells over the seeds that both have; None without one.

    Raises:
        ValueError: they were asked about different clips.
    """
    seeds = [s for s in sorted(hits.keys() & others.keys()) if hits[s].asked.any() and others[s].asked.any()]
    if not seeds:
        return None
    for seed in seeds:
        if hits[seed].clips != others[seed].clips:
            raise ValueError(f"the answers of seed {seed} are about different clips; evaluate both anew")
    means = [hits[seed].mean() - others[seed].mean() for seed in seeds]
    return over_seeds(means, [hits[seed].draws - others[seed].draws for seed in seeds], seeds)


@dataclass(frozen=True)
class Pair:
    """Two cells and their paired difference, of one family or of the mean over families.

    Attributes:
        name: of the family, or `mean`.
        n: questions of one seed.
        ours: the first cell.
        theirs: the other one.
        change: the first minus the other.
    """

    name: str
    n: int
    ours: Number
    theirs: Number
    change: Number

    def cells(self) -> list[str]:
        """Return name, n, both means and the difference with its interval, in percent."""
        shares = [f"{100 * value.mean:.1f}" for value in (self.ours, self.theirs)]
        return [self.name, str(self.n), *shares, *number_cells(self.change, "+")[1:]]


def pairs_of(hits: Mapping[int, Hits], others: Mapping[int, Hits]) -> list[Pair]:
    """Compare two cells family by family, and their means last.

    Raises:
        ValueError: no seed has both, or they were asked about different clips.
    """
    pairs = []
    for name in (*next(iter(hits.values())).families, "mean"):
        both = [{s: h if name == "mean" else h.of_family(name) for s, h in each.items()} for each in (hits, others)]
        ours, theirs = (number(each) for each in both)
        change = difference(*both)
        if ours is None or theirs is None or change is None:
            raise ValueError(f"{name}: there is no seed for which both are measured")
        pairs.append(Pair(name, int(next(iter(both[0].values())).asked.sum()), ours, theirs, change))
    return pairs


def made_with(answers: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return what the head of a report says: `date`, `machine`, `threads` of the last answers, `commit` of all."""
    last = answers[-1]
    return {
        "date": last["date"],
        "machine": last["hardware"]["machine"],
        "threads": str(last["hardware"]["threads"]),
        "commit": ", ".join(sorted({short_commit(each["commit"]) for each in answers})),
    }


def verdict(ours: Number | None, paper: float | None) -> str:
    """Say whether the sign of a difference is the paper's, and whether its interval leaves a doubt."""
    if ours is None:
        return MISSING
    clear = ours.low > 0 or ours.high < 0
    if paper is None:
        return "clear" if clear else "interval spans 0"
    if paper == 0 or ours.mean == 0:
        return "no difference in the paper" if paper == 0 else "no difference"
    same = "same sign" if ours.mean * paper > 0 else "OTHER SIGN"
    return same if clear else f"{same}, interval spans 0"


Answers = Callable[[str, str], Mapping[int, Mapping[str, Any]]]
"""(row, test) -> seed -> answers; empty where nothing is measured yet."""


class Report:
    """Numbers of all tables from the answers there are.

    Args:
        tables: what is shown.
        answers: where the answers come from.
    """

    def __init__(self, tables: Sequence[Table], answers: Answers) -> None:
        self.tables = tables
        self.answers = answers
        self._hits: dict[Cell, dict[int, Hits]] = {}

    def hits(self, cell: Cell) -> dict[int, Hits]:
        """Return the hits of every seed of a cell."""
        if cell not in self._hits:
            found = self.answers(cell.row, cell.test)
            self._hits[cell] = {seed: Hits.of(each, cell.group) for seed, each in found.items()}
        return self._hits[cell]

    def tokens(self, cell: Cell) -> int | None:
        """Return the visual tokens with which a cell was measured."""
        return next((each["visual_tokens"] for each in self.answers(cell.row, cell.test).values()), None)

    def paper_difference(self, table: Table, comparison: Comparison) -> float | None:
        """Return the paper's difference: the one given, or that of the means of the two entries' numbers."""
        if comparison.expected is not None:
            return comparison.expected
        papers = {entry.cell: entry.paper for entry in table.entries}
        a, b = papers.get(comparison.cell, ()), papers.get(comparison.other, ())
        return None if not a or not b else round(sum(a) / len(a) - sum(b) / len(b), 2)

    def facts(self) -> list[dict[str, Any]]:
        """Return all tables as JSON."""
        return [
            {
                "table": table.name,
                "title": table.title,
                "entries": [
                    {
                        "label": entry.label,
                        **vars(entry.cell),
                        "visual_tokens": self.tokens(entry.cell),
                        "accuracy": as_json(number(self.hits(entry.cell))),
                        "paper": dict(zip(table.paper, entry.paper, strict=True)) if entry.paper else None,
                    }
                    for entry in table.entries
                ],
                "comparisons": [
                    {
                        "label": each.label,
                        "cell": vars(each.cell),
                        "other": vars(each.other),
                        "difference": as_json(ours := difference(self.hits(each.cell), self.hits(each.other))),
                        "paper_points": (paper := self.paper_difference(table, each)),
                        "verdict": verdict(ours, paper),
                    }
                    for each in table.comparisons
                ],
            }
            for table in self.tables
        ]

    def markdown(self, table: Table) -> str:
        """Return one table with its differences."""
        has_paper = any(entry.paper for entry in table.entries)
        head = ["", "visual tokens", "seeds", "accuracy, %", "95 % interval"]
        head += [f"paper: {name}" for name in table.paper] + ["paper: mean"] if has_paper else []
        lines = [f"## {table.title}", "", table.note, "", row_of(head), "|---" * len(head) + "|"]
        for entry in table.entries:
            tokens, ours = self.tokens(entry.cell), number(self.hits(entry.cell))
            cells = [entry.label, str(tokens or ""), *number_cells(ours)]
            if has_paper:
                values = [f"{value:.1f}" for value in entry.paper] or [""] * len(table.paper)
                cells += [*values, f"{sum(entry.paper) / len(entry.paper):.1f}" if entry.paper else ""]
            lines.append(row_of(cells))
        if table.comparisons:
            head = ["difference", "seeds", "points", "95 % interval, paired", "paper, points", "sign"]
            lines += ["", row_of(head), "|---" * len(head) + "|"]
        for each in table.comparisons:
            ours = difference(self.hits(each.cell), self.hits(each.other))
            paper = self.paper_difference(table, each)
            stated = "" if paper is None else f"{paper:+.1f}"
            lines.append(row_of([each.label, *number_cells(ours, "+"), stated, verdict(ours, paper)]))
        return "\n".join(lines)

    def families(self, rows: Mapping[str, str], test: str = "open") -> str:
        """Return the accuracy of every family, averaged over seeds, for some rows (name -> label)."""
        shares: dict[str, dict[str, float]] = {}
        names: list[str] = []
        for row in rows:
            found = list(self.hits(Cell(row, test)).values())
            for family in {name: None for each in found for name in each.families}:
                counts = [(h.right.sum(0)[i], h.asked.sum(0)[i]) for h in found for i in [h.families.index(family)]]
                shares.setdefault(row, {})[family] = sum(right / asked for right, asked in counts) / len(counts)
                if family not in names:
                    names.append(family)
        lines = [row_of(["", *names]), "|---" * (len(names) + 1) + "|"]
        for row, label in rows.items():
            measured = [f"{100 * shares[row][name]:.1f}" if name in shares.get(row, {}) else MISSING for name in names]
            lines.append(row_of([label, *measured]))
        return "\n".join(lines)

    def series(self, table: Table) -> dict[str, list[tuple[float, Number]]]:
        """Return what a table's plot shows: label of a row -> (tokens or frames, number)."""
        lines: dict[str, list[tuple[float, Number]]] = {}
        for entry in table.entries:
            found = self.answers(entry.cell.row, entry.cell.test)
            ours = number(self.hits(entry.cell))
            if ours is None:
                continue
            place = next(iter(found.values()))["visual_tokens" if table.plot == "visual tokens" else "num_frames"]
            lines.setdefault(entry.label.partition(",")[0], []).append((float(place), ours))
        return {label: sorted(points, key=lambda point: point[0]) for label, points in lines.items()}


def as_json(value: Number | None) -> dict[str, Any] | None:
    """Return a number as JSON."""
    return None if value is None else vars(value)


def row_of(cells: Sequence[str]) -> str:
    """Return a line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def number_cells(value: Number | None, sign: str = "") -> list[str]:
    """Return the cells seeds, mean and interval, in percent."""
    if value is None:
        return ["0", MISSING, ""]
    mean, low, high = (f"{100 * x:{sign}.1f}" for x in (value.mean, value.low, value.high))
    return [str(len(value.seeds)), mean, f"{low} to {high}"]
