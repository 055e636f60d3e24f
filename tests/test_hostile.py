"""A part of the hostile corpus, and whether its table finds faults; `python benchmarks/hostile.py` is all of it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

import studies
import tiny
from hicom import VideoChat

SEED = 28
QUICK = ("fragments.mp4", "msmpeg4.avi", "h264.ts", "flv1.flv")
"""Containers that are encoded in no time."""


@pytest.fixture(scope="module")
def hostile() -> Iterator[ModuleType]:
    yield studies.load("hostile")
    studies.unload()


@pytest.fixture(scope="module")
def files(hostile: ModuleType) -> ModuleType:
    found: ModuleType = hostile.hostile_files
    return found


@pytest.fixture(scope="module")
def chat() -> VideoChat:
    model = tiny.model()
    return VideoChat(model, tiny.processor(model.config, num_frames=4))


def test_damaged_files_are_answered_or_refused_clearly(
    hostile: ModuleType, files: ModuleType, chat: VideoChat, tmp_path: Path
) -> None:
    originals = files.containers(QUICK)
    cases = [*originals, *files.mutants(originals, 32, SEED)]

    def ask_all() -> tuple[str, str]:
        """In one process, which is quicker: a crash is seen, but not which file made it."""
        found = {}
        for number, case in enumerate(cases):
            found[case.name] = hostile.ask_about(chat, files.write(case, tmp_path / f"{number}"), case)
        return "answered", json.dumps(found)

    outcome = hostile.in_child(ask_all, "files", "all", hostile.Limits(seconds=60))
    assert outcome.result == "answered", outcome.text
    found = json.loads(outcome.text)
    assert {name: each for name, each in found.items() if each[0] in hostile.BAD} == {}
    assert len(found) == len(cases)
    assert {result for result, _ in found.values()} == set(hostile.GOOD)


def test_the_corpus_is_the_same_from_the_same_seed(hostile: ModuleType, files: ModuleType) -> None:
    originals = files.containers(QUICK[:4])
    first, again, other = (list(files.mutants(originals, 64, seed)) for seed in (SEED, SEED, 29))
    assert hostile.digest(first) == hostile.digest(again) != hostile.digest(other)
    assert {case.name.split("-")[1] for case in first} == {*files.MUTATIONS}
    # One that overwrites zeros with zeros changes nothing.
    assert sum(case.data != originals[n % 4].data for n, case in enumerate(first)) >= 60


def test_every_kind_of_fault_is_found(hostile: ModuleType, files: ModuleType, chat: VideoChat) -> None:
    """What a table of zeros is worth."""
    limits = hostile.Limits(seconds=30.0, megabytes=200)

    def named(text: str) -> tuple[str, str]:
        return hostile.error_kind(text, "clip.mp4"), text

    def allocate() -> tuple[str, str]:
        held = bytearray(os.urandom(1)) * (300 * 2**20)
        return "answered", str(len(held))

    def fail() -> tuple[str, str]:
        raise AssertionError("not handled")

    works = {
        "clear error": lambda: named("clip.mp4: it is damaged"),
        "unclear error": lambda: named("not enough values to unpack (expected 3, got 1)"),
        "traceback": fail,
        "signal": lambda: os.kill(os.getpid(), signal.SIGTERM),
        "memory": allocate,
    }
    found = {name: hostile.in_child(work, "a", "b", limits).result for name, work in works.items()}
    assert found == {name: name for name in works}
    shortly = hostile.Limits(seconds=0.5)
    assert hostile.in_child(lambda: time.sleep(60), "a", "b", shortly).result == "hang"
    assert hostile.error_kind("clip.mp4: one\ntwo", "clip.mp4") == "unclear error"
    assert hostile.error_kind("clip.mp4: " + "x" * 2000, "clip.mp4") == "unclear error"


def test_wrong_answers_are_found(hostile: ModuleType, files: ModuleType, chat: VideoChat, tmp_path: Path) -> None:
    data = files.CONTAINERS["h264.mp4"]()
    case = partial(files.Case, "clip.mp4", data, "made")
    right = dict(num_frames=files.NUM_FRAMES, duration_s=files.NUM_FRAMES / files.FPS, is_silent=True)
    expected = {
        "answered": [case(), case(**right), case(is_refused=False)],
        "wrong answer": [
            case(is_refused=True),
            case(num_frames=files.NUM_FRAMES + 1),
            case(duration_s=1.0),
            case(colours={0.5: (0, 255, 0)}),
            files.Case("cut.mp4", data[:3000], "made", is_refused=False),
            files.Case("hole.mp4", data[:2000] + bytes(1500) + data[3500:], "made", is_silent=True),
        ],
    }
    for result, cases in expected.items():
        for number, each in enumerate(cases):
            path = files.write(each, tmp_path / f"{result}{number}")
            assert hostile.ask_about(chat, path, each)[0] == result, (result, number)


def test_the_page_counts_every_fault(hostile: ModuleType) -> None:
    outcomes = [hostile.Outcome("files", f"{n}.mp4", name, "what", 0.1, 5.0) for n, name in enumerate(hostile.BAD)]
    outcomes.append(hostile.Outcome("files", "good.mp4", "answered"))
    facts = {
        "outcomes": [vars(each) for each in outcomes],
        "limits": vars(hostile.Limits()),
        "hardware": {"machine": "x", "cpus": 2},
        "versions": {"av": "18"},
        "date": "2026-11-29",
        "commit": "abc",
        "seed": SEED,
        "num_mutants": 0,
        "digest": "d",
        "seconds": 1.0,
    }
    page = hostile.page(facts)
    assert f"## Faults: {len(hostile.BAD)}" in page
    assert "| files | 7 | 1 |  |  | 1 | 1 | 1 | 1 | 1 | 1 |" in page
