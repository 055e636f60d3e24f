"""How fast are chosen frames read? `python benchmarks/decode.py VIDEO...`.

Reads 8, 32, 64 and 256 uniform frames at full size with `hicom.read_frames` (exact, and the nearest key frames), with a
plain PyAV seek-and-decode, OpenCV and decord: all in one run, in turn, several times. The package needs none of the
rivals; what is not there is left out: `pip install opencv-python-headless decord`, best into an environment of its own.

Before that every frame that hicom returns is compared with a plain PyAV decode of the whole file: the same times, the
same pixels. Rivals may return other frames than those asked for; the column "right" says how many of theirs were.
"""

import argparse
import hashlib
import importlib
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from hicom.provenance import git_commit, hardware, short_commit
from hicom.video import probe, read_frames, uniform_indices

ROOT = Path(__file__).parents[1]
COUNTS = (8, 32, 64, 256)
Reader = Callable[[Path, int], NDArray[np.uint8]]


def with_hicom(path: Path, num_frames: int) -> NDArray[np.uint8]:
    """Read the frames asked for."""
    return read_frames(path, num_frames=num_frames).frames


def with_key_frames(path: Path, num_frames: int) -> NDArray[np.uint8]:
    """Read the key frames nearest to those asked for."""
    return read_frames(path, num_frames=num_frames, snap="keyframe").frames


def with_pyav(path: Path, num_frames: int, thread_type: str = "SLICE") -> NDArray[np.uint8]:
    """Seek to the key frame before each time, and decode up to it: what most projects do."""
    frames = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = thread_type
        assert stream.average_rate is not None
        assert stream.time_base is not None
        for index in uniform_indices(stream.frames, num_frames):
            pts = round(index / stream.average_rate / stream.time_base) + (stream.start_time or 0)
            container.seek(pts, stream=stream)
            for frame in container.decode(stream):
                if frame.pts is not None and frame.pts >= pts:
                    frames.append(frame.to_ndarray(format="rgb24"))
                    break
    return np.stack(frames)


def with_pyav_threads(path: Path, num_frames: int) -> NDArray[np.uint8]:
    """Read as `with_pyav`, but let FFmpeg decode several frames at a time."""
    return with_pyav(path, num_frames, "AUTO")


def with_opencv(path: Path, num_frames: int) -> NDArray[np.uint8]:
    """Seek to each frame by number."""
    import cv2

    capture = cv2.VideoCapture(str(path))
    frames = []
    for index in uniform_indices(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), num_frames):
        capture.set(cv2.CAP_PROP_POS_FRAMES, index)
        frames.append(cv2.cvtColor(capture.read()[1], cv2.COLOR_BGR2RGB))
    return np.stack(frames)


def with_decord(path: Path, num_frames: int) -> NDArray[np.uint8]:
    """Read a batch of frames by number."""
    import decord

    reader = decord.VideoReader(str(path))
    return reader.get_batch(uniform_indices(len(reader), num_frames)).asnumpy()


# Name, function, module that it needs, distribution that the module comes from.
READERS: tuple[tuple[str, Reader, str, str], ...] = (
    ("hicom", with_hicom, "hicom", "hicom"),
    ("hicom, key frames", with_key_frames, "hicom", "hicom"),
    ("PyAV", with_pyav, "av", "av"),
    ("PyAV, frame threads", with_pyav_threads, "av", "av"),
    ("OpenCV", with_opencv, "cv2", "opencv-python-headless"),
    ("decord", with_decord, "decord", "decord"),
)
OURS = ("hicom", "hicom, key frames")


def check(path: Path, counts: list[int]) -> dict[int, NDArray[np.uint8]]:
    """Compare what hicom returns with a decode of the whole file, and return small pictures of the right frames.

    Raises:
        ValueError: a time or a pixel differs.
    """
    due: dict[float, str] = {}
    for count in counts:
        clip = read_frames(path, num_frames=count)
        for time_s, frame in zip(clip.timestamps_s, clip.frames, strict=True):
            due[round(float(time_s), 6)] = hashlib.sha256(frame.tobytes()).hexdigest()
    times_s: list[float] = []
    wanted = {index for count in counts for index in uniform_indices(probe(path).num_frames, count)}
    right: dict[int, NDArray[np.uint8]] = {}
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        for index, frame in enumerate(container.decode(video=0)):
            assert frame.time is not None
            times_s.append(frame.time)
            if index in wanted:
                pixels = frame.reformat(format="rgb24", interpolation="BICUBIC").to_ndarray()
                found = due.pop(round(frame.time - times_s[0], 6), None)
                if found != hashlib.sha256(pixels.tobytes()).hexdigest():
                    raise ValueError(f"{path}: frame {index} at {frame.time} s is not the one that hicom returned")
                right[index] = thumbnail(pixels)
    if due:
        raise ValueError(f"{path}: hicom returned frames at {sorted(due)} s, which a decode of the whole file does not")
    return right


def thumbnail(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return some of the pixels: readers convert colours differently, so frames can be told apart only roughly."""
    return frame[::16, ::16].copy()


def num_right(frames: NDArray[np.uint8], indices: list[int], right: dict[int, NDArray[np.uint8]]) -> int:
    """Return how many frames look like the one asked for, up to what conversions of colours may differ by."""
    pairs = [(thumbnail(frame).astype(int), right[index]) for frame, index in zip(frames, indices, strict=False)]
    return sum(bool(np.abs(ours - theirs).mean() < 2) for ours, theirs in pairs)


def seconds(read: Reader, path: Path, num_frames: int) -> tuple[float, float, NDArray[np.uint8]]:
    """Return how long reading takes, by the clock and of all processors together, and the frames."""
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    frames = read(path, num_frames)
    return time.perf_counter() - start_s, time.process_time() - start_cpu_s, frames


def measure(path: Path, counts: list[int], num_repeats: int) -> dict[str, Any]:
    """Time every reader that is there on one file, in turn."""
    right = check(path, counts)
    info = probe(path)
    readers = [(name, read) for name, read, module, _ in READERS if find_spec(module) is not None]
    runs: list[dict[str, Any]] = []
    for count in counts:
        indices = uniform_indices(info.num_frames, count)
        times_s: dict[str, list[float]] = {name: [] for name, _ in readers}
        cpu_s: dict[str, list[float]] = {name: [] for name, _ in readers}
        returned: dict[str, dict[str, int]] = {}
        for repeat in range(num_repeats):
            # Forwards and backwards, so that none always comes after the same other one.
            for name, read in readers[:: 1 if repeat % 2 == 0 else -1]:
                elapsed_s, elapsed_cpu_s, frames = seconds(read, path, count)
                times_s[name].append(elapsed_s)
                cpu_s[name].append(elapsed_cpu_s)
                returned[name] = {"frames": len(frames), "right": num_right(frames, indices, right)}
                print(f"{path.name}: {count} frames, {name}: {elapsed_s:.2f} s", flush=True)
                del frames
        rivals = {name: statistics.median(times) for name, times in times_s.items() if name not in OURS}
        fastest = min(rivals, key=rivals.__getitem__)
        ours_s = statistics.median(times_s["hicom"])
        runs.append(
            {
                "num_frames": count,
                "n": num_repeats,
                "fastest_rival": fastest,
                "times_faster_than_it": rivals[fastest] / ours_s,
                "readers": {
                    name: {
                        "median_s": statistics.median(times),
                        "times_of_hicom": statistics.median(times) / ours_s,
                        "median_cpu_s": statistics.median(cpu_s[name]),
                        "all_s": times,
                        "all_cpu_s": cpu_s[name],
                        **returned[name],
                    }
                    for name, times in times_s.items()
                },
            }
        )
    return {"video": info.describe().replace(str(path), path.name), "checked_frames": len(right), "runs": runs}


def table(video: dict[str, Any]) -> str:
    """Return the times on one file as a Markdown table."""
    lines = [
        "| frames | reader | median | of hicom's time | processor time | frames returned | right |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for run in video["runs"]:
        for name, reader in run["readers"].items():
            right = "" if name == "hicom, key frames" else reader["right"]
            lines.append(
                f"| {run['num_frames']} | {name} | {reader['median_s']:.2f} s | {reader['times_of_hicom']:.2f} | "
                f"{reader['median_cpu_s']:.2f} s | {reader['frames']} | {right} |"
            )
    return "\n".join(lines)


def page(results: dict[str, Any]) -> str:
    """Return the results as a Markdown page."""
    parts = ["# Reading chosen frames", ""]
    for video in results["videos"]:
        parts += [f"`{video['video']}`", "", table(video), ""]
        parts += [
            f"- {run['num_frames']} frames: {run['times_faster_than_it']:.2f} times as fast as the fastest rival "
            f"({run['fastest_rival']}); median of n = {run['n']}."
            for run in video["runs"]
        ]
        text = "different frames were first compared with a plain decode of the whole file: same times, same pixels"
        parts += ["", f"{video['checked_frames']} {text}.", ""]
    machine = results["hardware"]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    parts.append(
        f"{results['date']}, {machine['machine']}, {machine['cpus']} CPUs, commit `{short_commit(results['commit'])}`, "
        f"{versions}. One run, the readers in turn; `benchmarks/decode.py` makes this page."
    )
    return "\n".join(parts)


def main() -> None:
    """Measure all files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="+", type=Path)
    parser.add_argument("--num-frames", type=int, nargs="+", default=list(COUNTS))
    parser.add_argument("--num-repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "decode.json")
    args = parser.parse_args()

    there = [(module, distribution) for _, _, module, distribution in READERS if find_spec(module) is not None]
    for module, _ in there:
        importlib.import_module(module)  # is not part of reading
    results = {
        "videos": [measure(path, args.num_frames, args.num_repeats) for path in args.videos],
        "date": time.strftime("%Y-%m-%d"),
        "commit": git_commit(),
        "hardware": hardware(),
        "versions": {distribution: version(distribution) for _, distribution in there},
    }
    args.out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    args.out.with_suffix(".md").write_text(page(results) + "\n", "utf-8")
    print(page(results))


if __name__ == "__main__":
    main()
