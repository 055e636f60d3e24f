"""Does anything that a stranger can send break the reader, the command line, the server or the page?

    python benchmarks/hostile.py                       # all, with a table; exit code 1 where there is a fault
    python benchmarks/hostile.py --parts files --only F4 --keep /tmp/files

Parts: `files` (real containers, mutants of them and files made by hand: each is encoded and asked about, and described
by `hicom info`, in a child process with limits of time and memory), `server` (a live `hicom serve --engine local`),
`fetch` (hosts on loopback that drip, lie and redirect) and `page` (uploads). Writes docs/results/hostile.{json,md}.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import hostile_files
import hostile_hosts
import hostile_server
import numpy as np
import torch
import tyro
from hostile_child import BAD, GOOD, LONGEST_ERROR, Limits, Outcome, in_child
from hostile_files import Case

from hicom import VideoChat, cli
from hicom.model.generation import ToyWarning
from hicom.provenance import git_commit, hardware, short_commit
from hicom.tables import markdown
from hicom.video import read_frames

ROOT = Path(__file__).parents[1]
LIMITS = Limits()
Part = Literal["files", "server", "fetch", "page"]


def error_kind(text: str, name: str) -> str:
    """Return whether an error is clear: one line that is not long and names the file."""
    is_clear = name in text and "\n" not in text.replace(name, "") and len(text) <= LONGEST_ERROR + len(name)
    return "clear error" if is_clear else "unclear error"


def ask_about(chat: VideoChat, path: Path, case: Case) -> tuple[str, str]:
    """Encode a file and ask about it; return the result and what is to be said of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            wrong = check(case, path)
            video = chat.encode(path, **(case.options or {"num_frames": 8}))
            chat.ask(video, "What happens?", max_new_tokens=8)
        except (ValueError, OSError) as error:
            if case.is_refused is False:
                return "wrong answer", f"a sound file is refused: {error}"
            return error_kind(str(error), case.name), f"{type(error).__name__}: {error}"
    told = [str(each.message) for each in caught if each.category is not ToyWarning]
    if case.is_refused:
        return "wrong answer", f"it is taken for a video: {video.info.describe()}"
    if case.is_silent and told:
        return "wrong answer", f"a sound file is called damaged: {told[0]}"
    if wrong:
        return "wrong answer", wrong
    return ("answered with a warning", told[0]) if told else ("answered", "")


def check(case: Case, path: Path) -> str:
    """Return what is wrong with what is read of a file; "" where nothing is, or nothing is known of it."""
    if case.num_frames is None and case.duration_s is None and not case.colours:
        return ""
    times = sorted(case.colours)
    found = read_frames(path, **({"timestamps_s": times} if times else {"num_frames": case.num_frames or 4}))
    if case.num_frames is not None and len(found.frames) != case.num_frames:
        return f"{len(found.frames)} frames of {case.num_frames} are read"
    expected = case.duration_s
    if expected is not None and not math.isclose(found.info.duration_s, expected, rel_tol=0.05, abs_tol=0.06):
        return f"it lasts {found.info.duration_s:.3f} s, not {expected:g} s"
    if case.last_s is not None and not math.isclose(found.timestamps_s[-1], case.last_s, abs_tol=0.06):
        return f"its last frame is at {found.timestamps_s[-1]:.3f} s, not {case.last_s:g} s"
    for time_s, frame in zip(times, found.frames, strict=False):
        mean = frame.reshape(-1, 3).mean(0)
        if np.abs(mean - case.colours[time_s]).max() > hostile_files.TOLERANCE:
            return f"at {time_s:g} s it shows {mean.round().tolist()}, not {case.colours[time_s]}"
    return ""


def describe(path: Path, case: Case) -> tuple[str, str]:
    """Run `hicom info` on a file; return the result and what is to be said of it."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["info", str(path)])
    text = err.getvalue().strip()
    if "Traceback" in text or code == 1:
        return "traceback", text
    if code == 0:
        if case.is_refused:
            return "wrong answer", f"it is taken for a video: {out.getvalue()}"
        return ("answered with a warning", text) if text else ("answered", "")
    if case.is_refused is False:
        return "wrong answer", f"a sound file is refused: {text}"
    last = text.splitlines()[-1] if text else ""
    # Names are printed on one line, whatever is in them.
    return error_kind(last, " ".join(case.name.split())) if code == 2 else "traceback", last


def attack_files(
    chat: VideoChat,
    cases: Iterable[Case],
    limits: Limits,
    only: str = "",
    keep: Path | None = None,
    verbs: Sequence[str] = ("ask", "info"),
) -> Iterable[Outcome]:
    """Yield what becomes of every file, asked about and described."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if keep is None else keep
        for number, case in enumerate(cases):
            if only not in case.name:
                continue
            path = hostile_files.write(case, folder / f"{number}")
            works = {"ask": partial(ask_about, chat, path, case), "info": partial(describe, path, case)}
            for verb in verbs:
                yield in_child(works[verb], f"{verb}: {KINDS[case.kind]}", case.name, limits)


KINDS = {"container": "real containers", "mutant": "mutants", "made": "files made by hand"}


def corpus(num_mutants: int, seed: int) -> list[Case]:
    """Return all files."""
    originals = hostile_files.containers()
    return [*originals, *hostile_files.mutants(originals, num_mutants, seed), *hostile_files.by_hand()]


def server_cases(cases: Sequence[Case]) -> list[Case]:
    """Return the files that the server is sent: what must be refused, and some of the others."""
    return [case for number, case in enumerate(cases) if case.is_refused or number % 12 == 0]


def digest(cases: Sequence[Case]) -> str:
    """Return a digest of all files: the same where the encoders are."""
    found = hashlib.sha256()
    for case in cases:
        found.update(case.name.encode() + hashlib.sha256(case.data).digest())
    return found.hexdigest()[:16]


# The table


def page(facts: dict[str, Any]) -> str:
    """Return the results as a page."""
    outcomes = [Outcome(**each) for each in facts["outcomes"]]
    groups = list(dict.fromkeys(each.group for each in outcomes))
    counts = {group: Counter(each.result for each in outcomes if each.group == group) for group in groups}
    rows = [
        [group, str(counts[group].total()), *(str(counts[group][name] or "") for name in (*GOOD, *BAD))]
        for group in groups
    ]
    machine, limits = facts["hardware"], facts["limits"]
    faults = [each for each in outcomes if each.result in BAD]
    slowest = max(outcomes, key=lambda each: each.seconds)
    largest = max(outcomes, key=lambda each: each.megabytes or 0)
    parts = [
        "# Hostile input",
        "What `python benchmarks/hostile.py` made of files, requests, hosts and uploads that mean harm. Every column "
        "from *wrong answer* on is a fault. A clear error is one line that names the file and the reason; of the "
        "server, one in OpenAI's form with a status of 4xx. A file may take "
        f"{limits['seconds']:g} s and {limits['megabytes']:,} MB beyond what the process holds; "
        "limits of requests stand in `benchmarks/hostile_server.py`.",
        markdown(["attack", "n", *GOOD, *BAD], rows),
    ]
    parts.append(
        f"The slowest took {slowest.seconds:.1f} s ({slowest.group}, {slowest.name}), the largest "
        f"{largest.megabytes or 0:,.0f} MB ({largest.group}, {largest.name})."
    )
    if faults:
        shown = [[each.group, each.name, each.result, " ".join(each.text.split())[:200]] for each in faults]
        parts += [f"## Faults: {len(faults)}", markdown(["attack", "name", "result", "what"], shown)]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    parts.append(
        f"{facts['date']}, {machine['machine']}, {machine['cpus']} CPUs, {versions}; "
        f"commit {short_commit(facts['commit'])}; "
        f"seed {facts['seed']}, {facts['num_mutants']} mutants, digest of the files {facts['digest']}; "
        f"{len(outcomes)} outcomes in {facts['seconds']:.0f} s."
    )
    return "\n\n".join(parts) + "\n"


def main(
    parts: tuple[Part, ...] = ("files", "server", "fetch", "page"),
    *,
    mutants: int = 400,
    seed: int = 28,
    only: str = "",
    keep: Path | None = None,
    limits: Limits = LIMITS,
    out: Path = ROOT / "docs" / "results" / "hostile.json",
) -> int:
    """Attack, print a table, and return 1 where there is a fault.

    Args:
        parts: what is attacked.
        mutants: damaged files.
        seed: of these.
        only: files and attacks whose names hold this text alone; nothing is written then.
        keep: folder where the files stay; None: nowhere.
        limits: of a file.
        out: JSON file of the results, beside which the page is written.
    """
    torch.set_num_threads(1)  # threads of before do not live in forked processes
    start = time.perf_counter()
    cases = corpus(mutants, seed)
    outcomes: list[Outcome] = []

    def take(some: Iterable[Outcome]) -> None:
        for each in some:
            outcomes.append(each)
            if each.result in BAD:
                print(f"{each.result}: {each.group}: {each.name}: {' '.join(each.text.split())[:300]}", file=sys.stderr)

    if "server" in parts:  # before this process holds a model
        take(hostile_server.attack_server(server_cases(cases), only))
    if "fetch" in parts:
        take(hostile_hosts.attack_fetch(only))
    chat = VideoChat.from_pretrained("hicom-tiny", device="cpu")
    if "files" in parts:
        take(attack_files(chat, cases, limits, only, keep))
    if "page" in parts:
        take(hostile_hosts.attack_page(chat, cases, limits, only))
    facts = {
        "outcomes": [asdict(each) for each in outcomes],
        "parts": list(parts),
        "limits": asdict(limits),
        "seed": seed,
        "num_mutants": mutants,
        "digest": digest(cases),
        "seconds": round(time.perf_counter() - start, 1),
        "date": time.strftime("%Y-%m-%d"),
        "commit": git_commit(),
        "hardware": hardware(),
        "versions": {name: version(name) for name in ("av", "pillow", "torch", "transformers")},
    }
    print(page(facts))
    if not only:
        out.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
        out.with_suffix(".md").write_text(page(facts), "utf-8")
    return int(any(each.result in BAD for each in outcomes))


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
