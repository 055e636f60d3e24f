"""Peak memory and time of encoding a long video: `python benchmarks/long_video.py FILM`.

Every case runs in a process of its own, whose highest resident memory the system reports: with all features kept, and
with none (compressed as it comes). What must not grow with the number of frames is the peak beyond the features.
Writes `docs/results/long-video.json` and `.md`.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import tyro

ROOT = Path(__file__).parents[1]
QUESTION = "What happens?"
KEPT, NOT_KEPT = "kept", "not kept"


def measure(film: str, model: str, num_frames: int, keep: str, threads: int) -> dict[str, float]:
    """Encode and ask in this process, and return what it took."""
    import torch

    from hicom import VideoChat
    from hicom.encoding import feature_bytes

    torch.set_num_threads(threads)
    chat = VideoChat.from_pretrained(model, device="cpu")
    chat.ask(chat.encode(film, num_frames=8), QUESTION, max_new_tokens=4)  # libraries are loaded, buffers are there
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.perf_counter()
    options = {} if keep == KEPT else {"keep_features": False, "questions": [QUESTION]}
    video = chat.encode(film, num_frames=num_frames, **options)  # type: ignore[arg-type]
    encoded_s = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    answer = chat.ask(video, QUESTION, max_new_tokens=4)
    return {
        "frames": video.num_frames,
        "start_mb": before / 1e6,
        "peak_mb": peak / 1e6,
        "features_mb": feature_bytes(chat.model) * video.num_frames / 1e6 if keep == KEPT else 0.0,
        "visual_tokens": answer.num_visual_tokens,
        "seconds": encoded_s,
        "decode_s": video.timings["decode"],
    }


def table(results: list[dict[str, float | str]]) -> str:
    """Return the results as Markdown."""
    rows = [
        "| features | frames | peak MB | of which features | the rest | visual tokens | frames a second |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        rest = float(r["peak_mb"]) - float(r["features_mb"])
        rows.append(
            f"| {r['features']} | {r['frames']} | {r['peak_mb']:.0f} | {r['features_mb']:.0f} | {rest:.0f} | "
            f"{r['visual_tokens']:,} | {float(r['frames']) / float(r['seconds']):.0f} |"
        )
    return "\n".join(rows)


def main(
    film: Annotated[str, tyro.conf.Positional],
    model: str = "hicom-tiny",
    num_frames: tuple[int, ...] = (256, 1024, 4096),
    threads: int = 1,
    out: Path = ROOT / "docs" / "results" / "long-video.json",
    case: str | None = None,
) -> None:
    """Measure memory and time of encoding a long video.

    Args:
        film: a video with at least as many frames.
        model: a checkpoint or embedded model.
        num_frames: numbers of frames to encode.
        threads: CPU threads of torch.
        out: JSON file of the results; a table goes beside it.
        case: what this process measures, `kept` or `not kept`; the script calls itself with it.
    """
    if case is not None:
        print(json.dumps(measure(film, model, num_frames[0], case, threads)))
        return
    from hicom.provenance import git_commit, hardware, short_commit

    results: list[dict[str, float | str]] = []
    for keep in (KEPT, NOT_KEPT):
        for number in num_frames:
            command = [sys.executable, __file__, film, "--model", model, "--num-frames", str(number)]
            done = subprocess.run(
                [*command, "--threads", str(threads), "--case", keep], check=True, capture_output=True, text=True
            )
            results.append({"features": keep} | json.loads(done.stdout.splitlines()[-1]))
            print(results[-1], flush=True)
    facts = {
        "film": Path(film).name,
        "model": model,
        "question": QUESTION,
        "date": time.strftime("%Y-%m-%d"),
        "commit": git_commit(),
        "hardware": hardware(),
        "results": results,
    }
    out.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    machine = facts["hardware"]
    head = (
        "# Long videos\n\nMade by `python benchmarks/long_video.py`; every line is a process of its own. The rest of "
        "the peak is the interpreter, libraries, weights and what is at work; it is what must not grow.\n"
    )
    foot = (
        f"{facts['film']}, {model}, {threads} threads on {machine['machine']}, {facts['date']}, commit "
        f"{short_commit(str(facts['commit']))}."
    )
    out.with_suffix(".md").write_text(f"{head}\n{table(results)}\n\n{foot}\n", "utf-8")


if __name__ == "__main__":
    tyro.cli(main)
