"""Mixtures: sources of records, of each all or a part, as often as wanted; and lists of what is to be left out."""

from __future__ import annotations

import difflib
import json
import os
import random
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from ..files import parse_json
from ..video import split_bounds
from .records import FileRecords, OnBadRecord, Records, RowRecords, Sample, read_records

SUFFIXES = (".yaml", ".yml")
OLD_NAMES = {"json_path": "path", "data_root": "root", "sampling_strategy": "sampling"}
"""What LLaVA-NeXT and the released HICom call fields of a source."""
SAMPLING = re.compile(r"(?:(?P<which>first|end|random):)?(?P<number>\d+(?:\.\d+)?)(?P<percent>%?)")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One entry of a mixture.

    Attributes:
        path: file of records; or `dataset`.
        dataset: name of a Hugging Face dataset, or a folder that `Dataset.save_to_disk` wrote.
        config: of the dataset.
        split: of the dataset.
        root: folder that media paths start from; None: the records' own folder, or the mixture's.
        sampling: `all`, `first:N`, `end:N`, `random:N` records, with `%` a share of them; `N%` is `random:N%`.
        weight: how often every chosen record is seen in an epoch; a fraction is drawn once.
    """

    path: str | None = None
    dataset: str | None = None
    config: str | None = None
    split: str = "train"
    root: str | None = None
    sampling: str = "all"
    weight: float = 1.0

    @property
    def called(self) -> str:
        """What a Hugging Face dataset is called in errors and skip lists."""
        split = None if self.split == "train" else self.split
        return ":".join(part for part in (self.dataset, self.config, split) if part)


@dataclass(frozen=True)
class Selection(Sequence[Sample]):
    """Samples of a source in the order in which they were chosen; a sample may be there several times.

    Attributes:
        records: the source.
        indices: numbers of the samples.
    """

    records: Records
    indices: array[int]

    @property
    def videos(self) -> list[Path]:
        """Files of these samples, each once."""
        groups = dict.fromkeys(self.records.groups[index] for index in self.indices)
        return list(dict.fromkeys(video for group in groups for video in self.records.first_of_group(group).videos))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.records[self.indices[index]]


@dataclass(frozen=True)
class SkipList:
    """What training leaves out: records by file and line, and media by path.

    Attributes:
        lines: (file, line) of records in files, and (name, row) of those in Hugging Face datasets.
        media: paths of videos and images.
    """

    lines: frozenset[tuple[Path | str, int]] = field(default_factory=frozenset)
    media: frozenset[Path] = field(default_factory=frozenset)

    def __bool__(self) -> bool:
        return bool(self.lines or self.media)

    def numbers(self, source: Path | str) -> frozenset[int]:
        """Return the listed lines of a file, or rows of a dataset, by its name."""
        return self._by_source.get(source.resolve() if isinstance(source, Path) else source, frozenset())

    @cached_property
    def _by_source(self) -> dict[Path | str, frozenset[int]]:
        found: dict[Path | str, set[int]] = {}
        for source, number in self.lines:
            found.setdefault(source, set()).add(number)
        return {source: frozenset(numbers) for source, numbers in found.items()}

    def entries(self) -> list[dict[str, Any]]:
        """Return the lines of a file that `read_skip_list` reads, in order."""
        found: list[dict[str, Any]] = [
            {"dataset": source, "row": number} if isinstance(source, str) else {"file": str(source), "line": number}
            for source, number in sorted(self.lines, key=lambda each: (str(each[0]), each[1]))
        ]
        return found + [{"media": str(file)} for file in sorted(self.media)]

    def shows(self, media: Iterable[Path]) -> bool:
        """Whether one of the files, or the file of a part of a video, is listed."""
        for file in media:
            whole, bounds = split_bounds(file)
            if file.resolve() in self.media or (bounds and whole.resolve() in self.media):
                return True
        return False


NOTHING = SkipList()


def read_sources(
    paths: Iterable[str | Path],
    root: str | Path | None = None,
    on_bad: OnBadRecord = "stop",
    skip: SkipList = NOTHING,
) -> list[Selection]:
    """Open files of records and mixtures.

    Args:
        paths: `.json` and `.jsonl` files of records, and `.yaml` files of mixtures.
        root: folder that media paths of records start from; None: each file's own. A mixture has its own.
        on_bad: what a malformed record does.
        skip: malformed records on this list are left out, and no error. What else is on it `not_skipped` leaves out.

    Raises:
        ValueError: see `read_records` and `read_mixture`.
    """
    found = []
    for path in map(Path, paths):
        if path.suffix.lower() in SUFFIXES:
            found += read_mixture(path, on_bad, skip)
        else:
            found.append(everything(read_records(path, root, on_bad, skip.numbers(path))))
    return found


def everything(records: Records) -> Selection:
    """Return all samples of a source, each once."""
    return Selection(records, array("q", range(len(records))))


def read_mixture(path: str | Path, on_bad: OnBadRecord = "stop", skip: SkipList = NOTHING) -> list[Selection]:
    """Open a mixture: YAML with a list `datasets` of sources, and an optional `seed` of what is drawn.

    ```yaml
    seed: 0
    datasets:
      - path: descriptions.jsonl   # from the mixture's folder; or dataset: of the Hugging Face hub
        root: videos
        sampling: random:1000
        weight: 2
    ```

    Raises:
        ValueError: the file is missing or malformed; the entry is named.
    """
    path = Path(path)
    seed, sources = parse_mixture(path)
    found = []
    for number, (name, source) in enumerate(sources.items(), 1):
        records = open_source(source, path.parent, name, on_bad, skip)
        draw = random.Random(f"{seed}/{number}")
        chosen = choose_records(records.num_records, source.sampling, draw, name)
        found.append(Selection(records, repeat(records, chosen, source.weight, draw)))
    return found


def parse_mixture(path: Path) -> tuple[int, dict[str, Source]]:
    """Return the seed of a mixture and its entries, each under what it is called in errors; no records are read.

    Raises:
        ValueError: as `read_mixture`.
    """
    import yaml

    if not path.is_file():
        raise ValueError(f"there is no mixture {path}; give a YAML file with a list `datasets`")
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not isinstance(content.get("datasets"), list) or not content["datasets"]:
        raise ValueError(f"{path} needs a list `datasets`, one entry a source")
    check_names(content, ("datasets", "seed"), str(path))
    seed = content.get("seed", 0)
    if not isinstance(seed, int):
        raise ValueError(f"{path}: seed: {seed!r} is not a whole number")
    names = [f"{path}, entry {number}" for number in range(1, len(content["datasets"]) + 1)]
    return seed, {name: parse_source(entry, name) for name, entry in zip(names, content["datasets"], strict=True)}


def check_names(found: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    """Raise ValueError where a name is not one of `names`; the nearest one is suggested."""
    for name in found:
        if name not in names:
            nearest = difflib.get_close_matches(str(name), names, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"it may have {', '.join(names)}"
            raise ValueError(f"{where}: unknown field {name!r}; {hint}")


def parse_source(entry: Any, name: str) -> Source:
    """Return an entry of a mixture.

    Raises:
        ValueError: it is malformed; `name` is named.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"{name} must have fields such as `path`, got {entry!r:.200}")
    values: dict[str, Any] = {OLD_NAMES.get(str(key), str(key)): value for key, value in entry.items()}
    check_names(values, [each.name for each in fields(Source)], name)
    if len(values) < len(entry):
        raise ValueError(f"{name}: one field has two names: {', '.join(map(str, entry))}")
    if (values.get("path") is None) == (values.get("dataset") is None):
        raise ValueError(f"{name}: give either `path` (a file of records) or `dataset` (of the Hugging Face hub)")
    weight = values.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0:
        raise ValueError(f"{name}: weight: {weight!r} must be a number above 0")
    texts = {key: value for key, value in values.items() if key != "weight"}
    for key, value in texts.items():
        if not isinstance(value, str):
            raise ValueError(f"{name}: {key}: {value!r} must be a text")
    return Source(**texts, weight=float(weight))


def open_source(source: Source, folder: Path, name: str, on_bad: OnBadRecord, skip: SkipList = NOTHING) -> Records:
    """Return the records of an entry; paths start from `folder`, the mixture's.

    Raises:
        ValueError: see `read_records`; or a variable of a path is not set.
    """
    root = None if source.root is None else folder / expanded(source.root)
    if source.path is not None:
        path = folder / expanded(source.path)
        return read_records(path, root, on_bad, skip.numbers(path))
    called = source.called
    rows = load_rows(source, folder, name)
    return RowRecords(rows, folder if root is None else root, called, on_bad, skip.numbers(called))


def expanded(path: str) -> str:
    """Return a path with `~` and `$NAME` replaced.

    Raises:
        ValueError: such a variable is not set.
    """
    found = os.path.expandvars(os.path.expanduser(path))
    if variable := re.search(r"\$(?:\w+|\{\w+\})", found):
        raise ValueError(f"{path}: {variable[0]} is not set; export it, or write the folder in its place")
    return found


def load_rows(source: Source, folder: Path, name: str) -> Any:
    """Return a Hugging Face dataset, its media not decoded.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: there is no such dataset, configuration or split.
    """
    assert source.dataset is not None
    try:
        import datasets
    except ImportError:
        raise ImportError(f"{name}: `dataset` needs the package datasets: pip install 'hicom[data]'") from None
    here = folder / expanded(source.dataset)
    try:
        if (here / "dataset_info.json").is_file() or (here / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(str(here))
            rows = rows[source.split] if isinstance(rows, datasets.DatasetDict) else rows
        else:
            place = str(here) if here.is_dir() else source.dataset
            rows = datasets.load_dataset(place, source.config, split=source.split)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{name}: dataset {source.dataset}: {' '.join(str(error).split())}") from error
    for column, feature in rows.features.items():
        if isinstance(feature, datasets.Video | datasets.Image):
            rows = rows.cast_column(column, type(feature)(decode=False))
    return rows


def choose_records(number: int, sampling: str, draw: random.Random, name: str) -> list[int]:
    """Return the numbers of the chosen records, in order.

    Raises:
        ValueError: `sampling` is none, or asks for more than 100 %; `name` is named.
    """
    if sampling == "all":
        return list(range(number))
    match = SAMPLING.fullmatch(sampling.replace(" ", ""))
    if match is None or not (match["which"] or match["percent"]):
        raise ValueError(f"{name}: sampling: {sampling!r} is not all, first:N, end:N, random:N or a share such as 10%")
    amount = float(match["number"])
    if match["percent"]:
        if amount > 100:
            raise ValueError(f"{name}: sampling: {sampling!r} is more than 100%; weight repeats records")
        # Rounded up, as LLaVA-NeXT does.
        count = -int(-amount * number // 100)
    elif amount != int(amount):
        raise ValueError(f"{name}: sampling: {sampling!r} must be a whole number of records")
    else:
        count = int(amount)
    if count > number:
        raise ValueError(f"{name}: sampling: {sampling!r} of {number} records; weight repeats records")
    if count == 0:
        raise ValueError(f"{name}: sampling: {sampling!r} of {number} records leaves none")
    which = match["which"] or "random"
    if which == "first":
        return list(range(count))
    return list(range(number - count, number)) if which == "end" else sorted(draw.sample(range(number), count))


def repeat(records: Records, chosen: Sequence[int], weight: float, draw: random.Random) -> array[int]:
    """Return the numbers of the samples of the chosen records, every record `weight` times."""
    copies, rest = divmod(weight, 1)
    wanted = [*chosen] * int(copies)
    # At least one: a source with a weight is never left out in silence.
    number = round(rest * len(chosen)) or (0 if wanted else 1)
    wanted += sorted(draw.sample(chosen, number))
    starts = array("q")
    for sample, record in enumerate(records.numbers):
        if record == len(starts):
            starts.append(sample)
    starts.append(len(records))
    return array("q", (sample for record in wanted for sample in range(starts[record], starts[record + 1])))


def read_skip_list(path: str | Path) -> SkipList:
    """Open a list of what is to be left out: JSONL, as `hicom data check --skip-list` writes it.

    A line has `file` and `line` or `dataset` and `row` (a record), or `media` (a file and all records that show it).
    Relative paths start from the list's folder.

    Raises:
        ValueError: the file is missing or a line is malformed.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no skip list {path}; `hicom data check --skip-list` writes one")
    lines: set[tuple[Path | str, int]] = set()
    media: set[Path] = set()
    for number, text in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not text.strip():
            continue
        try:
            entry = parse_json(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error.msg}") from error
        if isinstance(entry, dict) and isinstance(entry.get("media"), str):
            media.add((path.parent / entry["media"]).resolve())
        elif isinstance(entry, dict) and isinstance(entry.get("file"), str) and isinstance(entry.get("line"), int):
            lines.add(((path.parent / entry["file"]).resolve(), entry["line"]))
        elif isinstance(entry, dict) and isinstance(entry.get("dataset"), str) and isinstance(entry.get("row"), int):
            lines.add((entry["dataset"], entry["row"]))
        else:
            needed = "`media`, or `file` and `line`, or `dataset` and `row`"
            raise ValueError(f"{path}, line {number}: needs {needed}, got {text:.200}")
    return SkipList(frozenset(lines), frozenset(media))


def not_skipped(selection: Selection, skip: SkipList) -> Selection:
    """Return a selection without what is to be left out."""
    records = selection.records
    if not skip:
        return selection
    groups = bytearray(records.num_groups)
    if skip.media:
        for group in range(records.num_groups):
            sample = records.first_of_group(group)
            groups[group] = skip.shows((*sample.videos, *sample.images))
    source, places = _places(records)
    listed = skip.numbers(source)
    skipped = {number for number, place in enumerate(places) if place in listed} if listed else set()
    kept = (i for i in selection.indices if not groups[records.groups[i]] and records.numbers[i] not in skipped)
    return Selection(records, array("q", kept))


def _places(records: Records) -> tuple[Path | str, Sequence[int]]:
    """Return what a skip list calls a source, and the line or row of each of its records."""
    if isinstance(records, FileRecords):
        return records.path, records.lines
    return records.name, records.kept if isinstance(records, RowRecords) else ()
