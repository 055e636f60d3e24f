"""The data of a run: looked at before it starts, then made into samples and batches."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..data.collate import Collator, SampleSet
from ..data.features import FeatureStore, cache_features
from ..data.mixture import (
    NOTHING,
    SUFFIXES,
    SkipList,
    Source,
    expanded,
    load_rows,
    not_skipped,
    parse_mixture,
    read_skip_list,
    read_sources,
)
from ..data.records import Sample, is_jsonl, iterate_array, iterate_lines, parse_record
from ..model.modeling import HIComForConditionalGeneration
from ..model.processing import HIComProcessor
from ..video import split_bounds
from .config import Chain, TrainConfig
from .stamp import Skips, is_finished, num_processes, union

logger = logging.getLogger(__name__)

FIRST = 8
"""Records of every source that are looked at before a run starts."""


def check_chain(chain: Chain) -> None:
    """Look at the data of all stages to come, so that none fails for it after hours of an earlier one.

    Raises:
        ValueError: as `check_data`; the stage is named.
    """
    for stage in chain.stages:
        if is_finished(Path(chain.out) / stage.name):
            continue
        try:
            check_data(stage)
        except ValueError as error:
            raise ValueError(f"stage {stage.name}: {error}") from error


def check_data(config: TrainConfig) -> None:
    """Look at the files, mixtures and first records that a run names; it takes seconds whatever their size.

    Raises:
        ValueError: a file is missing, a mixture or one of the first records of a source is malformed, or media of these
            are not there.
    """
    data = config.data
    skip = NOTHING if data.skip_list is None else read_skip_list(data.skip_list)
    for name, records, root in first_records(config):
        samples, problems = [], []
        for line, record, source in records:
            if line in skip.lines:
                continue
            try:
                samples += parse_record(record, root, source)
            except ValueError as error:
                problems.append(error)
        if problems and (data.on_bad_record == "stop" or not samples):
            raise problems[0]
        check_media(name, samples, skip, is_strict=data.on_bad_video == "stop")


def check_media(name: str, samples: Sequence[Sample], skip: SkipList, *, is_strict: bool) -> None:
    """Raise ValueError where files that samples show are not there; unless `is_strict`, where none of them is."""
    shown = [(file, sample.source) for sample in samples for file in (*sample.videos, *sample.images)]
    wanted = {file: source for file, source in reversed(shown) if not skip.shows([file])}  # first ones stay
    missing = [file for file in reversed(wanted) if not Path(split_bounds(file)[0]).exists()]
    if missing and (is_strict or len(missing) == len(wanted)):
        raise ValueError(
            f"{wanted[missing[0]]}: there is no file {missing[0]}; {len(missing)} of {len(wanted)} media of the first "
            f"records of {name} are missing; correct `root`, or leave them out (`hicom data check --skip-list`)"
        )


Lines = Iterable[tuple[tuple[Path | str, int], Any, str]]
"""File and line, or dataset and row, content and name of records."""


def first_records(config: TrainConfig) -> Iterator[tuple[str, Lines, Path]]:
    """Yield the name of every source of a run, its first records, and the folder that its media are in."""
    root = config.data.root
    for path in map(Path, config.data.records):
        if path.suffix.lower() not in SUFFIXES:
            yield str(path), first_lines(path), path.parent if root is None else Path(root)
            continue
        for name, source in parse_mixture(path)[1].items():
            yield (name, *first_of_source(source, path.parent, name))


def first_of_source(source: Source, folder: Path, name: str) -> tuple[Lines, Path]:
    """Return the first records of an entry of a mixture in `folder`, and the folder that its media are in."""
    root = None if source.root is None else folder / expanded(source.root)
    if source.path is not None:
        path = folder / expanded(source.path)
        return first_lines(path), path.parent if root is None else root
    rows = itertools.islice(load_rows(source, folder, name), FIRST)
    called = source.called
    named = (((called, number), dict(row), f"{called}, row {number}") for number, row in enumerate(rows))
    return named, folder if root is None else root


def first_lines(path: Path) -> Lines:
    """Yield the first records of a file."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}; give a .json or .jsonl file of LLaVA-style records")
    places: Iterable[tuple[int, int, int, Any]] = iterate_lines(path) if is_jsonl(path) else iterate_array(path)
    for _, _, line, record in itertools.islice(places, FIRST):
        yield (path.resolve(), line), record, f"{path}, line {line}"


def make_data(
    config: TrainConfig, model: HIComForConditionalGeneration, processor: HIComProcessor, skips: Skips | None = None
) -> tuple[SampleSet, Collator]:
    """Return the samples of a run and what makes batches of them; vision features are computed where they are missing.

    Args:
        config: of the run.
        model: its vision tower makes features.
        processor: the model's.
        skips: what is left out; None: what the configuration names.

    Raises:
        ValueError: records are malformed, or too few for one step.
    """
    data, stage = config.data, config.stage
    if skips is None:
        skips = Skips() if data.skip_list is None else Skips(read_skip_list(data.skip_list))
    num_frames = processor.num_frames if data.num_frames is None else data.num_frames
    sources = read_sources(data.records, data.root, data.on_bad_record, union([skips.start, skips.later]))
    for source in sources:
        if source.records.errors:
            errors = source.records.errors
            logger.warning("%d bad records are left out; the first: %s", len(errors), errors[0].message)
    if skips.start:
        before = sum(map(len, sources))
        sources = [not_skipped(source, skips.start) for source in sources]
        logger.warning("%d samples are left out, as skip lists say", before - sum(map(len, sources)))
    store: FeatureStore | None = None
    if data.cache is not None:
        videos = [video for source in sources for video in not_skipped(source, skips.later).videos]
        store = cache_features(
            model,
            processor,
            videos,
            Path(data.cache),
            num_frames=num_frames,
            on_bad_video=data.on_bad_video,
        )
    samples = SampleSet(sources, store)
    needed = config.batch_size * config.count_passes(num_processes()) * num_processes()
    if len(samples) < needed:
        name = "batch_size" if config.global_batch_size is None else "global_batch_size"
        raise ValueError(
            f"{len(samples)} samples are fewer than the {needed} of one step; lower {name} ({getattr(config, name)})"
        )
    skipped = samples.named_by(skips.later) if skips.later else frozenset()
    if skipped:
        logger.warning("%d samples are left out of their batches, as skip lists say that came later", len(skipped))
    collator = Collator(
        processor=processor,
        store=store,
        num_frames=num_frames,
        compression=stage.compression,
        windows=stage.windows,
        seed=config.seed,
        kinds=samples.kinds,
        max_text_tokens=data.max_text_tokens,
        skipped=skipped,
    )
    return samples, collator
