"""How long does a command take from nothing? `python benchmarks/startup.py`.

Runs `hicom --help` and `hicom ask` with the embedded model on a made clip of 10 seconds, every time in a new process:
`cold`, after the system was told to forget what it had read from disk (Linux, as root; left out elsewhere), and `warm`.
Writes `docs/results/startup.json` and `.md`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

from hicom.bench.run import make_film
from hicom.provenance import git_commit, hardware, short_commit

ROOT = Path(__file__).parents[1]
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
FPS, DURATION_S = 25, 10
TARGETS_S = {"help": 0.6, "ask": 6.0}


def forget_files() -> bool:
    """Make the system forget the files that it holds in memory; return whether it could be told to."""
    if not os.access(DROP_CACHES, os.W_OK):
        return False
    os.sync()
    try:
        DROP_CACHES.write_text("3", "ascii")
    except OSError:
        return False
    return True


def seconds(command: list[str]) -> float:
    """Return the wall time of a command in a new process.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def page(facts: dict[str, object], rows: list[dict[str, object]]) -> str:
    """Return the results as Markdown."""
    lines = ["| command | files | median | slowest | goal |", "|---|---|---:|---:|---:|"]
    for row in rows:
        times = row["times_s"]
        assert isinstance(times, list)
        cells = f"{statistics.median(times):.2f} s | {max(times):.2f} s | {TARGETS_S[str(row['name'])]:g} s"
        lines.append(f"| `{row['command']}` | {row['files']} | {cells} |")
    machine = facts["hardware"]
    assert isinstance(machine, dict)
    return (
        "# From nothing to an answer\n\nWall time of whole commands, each in a new process. *Cold*: the system had "
        f"forgotten all files. The clip has {DURATION_S} seconds of 640 x 360 pixels; the answer is that of "
        f"`hicom-tiny`.\n\n{chr(10).join(lines)}\n\nn = {facts['repeats']} each, {machine['machine']}, "
        f"{machine['cpus']} CPUs, {facts['date']}, commit `{short_commit(str(facts['commit']))}`. "
        "Made by `python benchmarks/startup.py`.\n"
    )


def main(repeats: int = 5, out: Path = ROOT / "docs" / "results" / "startup.json") -> None:
    """Measure start-up.

    Args:
        repeats: new processes of every command, cold and warm each.
        out: JSON file of the results; a table goes beside it.
    """
    hicom = [sys.executable, "-m", "hicom"]
    facts = {"date": time.strftime("%Y-%m-%d"), "commit": git_commit(), "hardware": hardware(), "repeats": repeats}
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        clip = make_film(Path(folder) / "clip.mp4", FPS * DURATION_S)
        commands = {"help": ["--help"], "ask": ["ask", str(clip), "What happens?"]}
        for files in ("cold", "warm"):
            found: dict[str, list[float]] = {name: [] for name in commands}
            for number in range(repeats + (files == "warm")):
                for name, arguments in commands.items():
                    if files == "cold" and not forget_files():
                        continue
                    found[name].append(seconds([*hicom, *arguments]))
                    if files == "warm" and number == 0:
                        found[name].clear()
            for name, times in found.items():
                if not times:
                    print(f"{files}: the system cannot be told to forget files; not measured", file=sys.stderr)
                    continue
                words = " ".join(["hicom", *commands[name]]).replace(str(clip), clip.name)
                rows.append({"name": name, "command": words, "files": files, "times_s": times})
                print(rows[-1], flush=True)
    out.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n", "utf-8")
    out.with_suffix(".md").write_text(page(facts, rows), "utf-8")


if __name__ == "__main__":
    tyro.cli(main)
