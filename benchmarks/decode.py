"""How fast are chosen frames read? `python benchmarks/decode.py VIDEO...`.

Reads 8, 32, 64 and 256 uniform frames at full size with `hicom.read_frames` (exact, and the nearest key frames), with a
plain PyAV seek-and-decode, OpenCV and decord: all in one run, in turn, several times. The package needs none of the
rivals; what is not there is left out: `pip install opencv-python-headless decord`, best into an environment of its own.

Before that every frame that hicom returns is compared with a plain PyAV decode of the whole file: the same times, the
same pixels. Rivals may return other frames than those asked for; the column "right" says how many of theirs were.

Then films of three hours (`--long-hours`), the same pictures in several containers: how long it takes to look at one,
and to read 32 and 256 frames in pieces of 32 as `hicom ask` does, and how much memory that takes.
"""

import argparse
import hashlib
import importlib
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from hicom.provenance import git_commit, hardware, short_commit
from hicom.video import open_frames, probe, read_frames, uniform_indices

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


LONG = ("mp4", "ts", "mkv", "flv", "avi")  # films of hours: with B-frames, in AVI too
LONG_COUNTS = (32, 256)
LONG_FPS = 25


def write_long(folder: Path, suffix: str, num_frames: int) -> Path:
    """Write a film of moving noise, 320x240: 20 seconds that are encoded once and repeated."""
    # AVI holds H.264 as transport streams do, the others as MP4 does.
    seed, path = folder / ("seed.ts" if suffix == "avi" else "seed.mp4"), folder / f"film.{suffix}"
    if not seed.exists():
        pattern = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        with av.open(str(seed), "w") as container:
            options = {"g": "50", "bf": "2", "sc_threshold": "0", "preset": "veryfast", "crf": "30"}
            stream = container.add_stream("libx264", rate=LONG_FPS, options=options)
            stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
            for number in range(20 * LONG_FPS):
                frame = av.VideoFrame.from_ndarray(np.roll(pattern, number, axis=1), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    with av.open(str(seed)) as source, av.open(str(path), "w") as target:
        video = source.streams.video[0]
        assert video.time_base is not None
        packets = [packet for packet in source.demux(video) if packet.size]
        copy = target.add_stream_from_template(video)
        period = round(Fraction(len(packets), LONG_FPS) / video.time_base)
        first = packets[0].dts or 0
        for number in range(num_frames):
            packet = packets[number % len(packets)]
            again, shift = av.Packet(bytes(packet)), period * (number // len(packets)) - first
            assert packet.pts is not None
            assert packet.dts is not None
            again.pts, again.dts, again.duration = packet.pts + shift, packet.dts + shift, packet.duration
            again.time_base, again.is_keyframe, again.stream = video.time_base, packet.is_keyframe, copy
            target.mux(again)
    return path


def look_and_read(path: Path, num_frames: int) -> dict[str, float]:
    """Look at a video and read frames as `hicom ask` does, in a process of its own; memory in MB, times in s."""
    start = time.perf_counter()
    opened = open_frames(path)
    looked = time.perf_counter()
    num_read = sum(len(chunk) for chunk in open_frames(opened, num_frames=num_frames, size=224).chunks(32))
    read = time.perf_counter()
    if num_read != num_frames:
        raise ValueError(f"{path}: {num_read} of {num_frames} frames came")
    # Not ru_maxrss, which a new process takes over from the one that started it.
    status = Path("/proc/self/status").read_text()
    peak = int(status[status.index("VmHWM:") :].split()[1]) / 2**10
    return {"look_s": looked - start, "read_s": read - looked, "peak_mb": peak}


def measure_long(hours: float, num_repeats: int) -> list[dict[str, Any]]:
    """Time films of hours in several containers, in turn."""
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        num_frames = round(hours * 3600 * LONG_FPS)
        files = {suffix: write_long(Path(folder), suffix, num_frames) for suffix in LONG}
        context = multiprocessing.get_context("spawn")  # so that memory is that of one run
        for count in LONG_COUNTS:
            found: dict[str, list[dict[str, float]]] = {name: [] for name in files}
            for _ in range(num_repeats):
                for name, path in files.items():
                    with context.Pool(1) as pool:
                        found[name].append(pool.apply(look_and_read, (path, count)))
                    print(f"{hours:g} h of {name}: {count} frames: {found[name][-1]}", flush=True)
            medians = {
                name: {key: statistics.median(each[key] for each in results) for key in results[0]}
                for name, results in found.items()
            }
            base = medians["mp4"]["look_s"] + medians["mp4"]["read_s"]
            for name, row in medians.items():
                total = row["look_s"] + row["read_s"]
                runs.append({"film": name, "num_frames": count, "n": num_repeats, "times_of_mp4": total / base, **row})
    return runs


def long_table(hours: float, runs: list[dict[str, Any]]) -> str:
    """Return the times on films of hours as a Markdown table."""
    lines = [
        f"Films of {hours:g} hours, 320x240, {LONG_FPS} fps, h264 with B-frames, the same pictures: looking "
        "at one (`probe`), then frames in pieces of 32 as `hicom ask` reads them, in a new process each; "
        f"median of n = {runs[0]['n']}.",
        "",
        "| frames | film | look | read | both, of mp4's time | peak memory |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {run['num_frames']} | {run['film']} | {run['look_s']:.2f} s | {run['read_s']:.2f} s | "
        f"{run['times_of_mp4']:.2f} | {run['peak_mb']:.0f} MB |"
        for run in runs
    ]
    return "\n".join(lines)


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
    if results["long"]:
        parts += [long_table(results["long_hours"], results["long"]), ""]
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
    parser.add_argument("videos", nargs="*", type=Path)
    parser.add_argument("--num-frames", type=int, nargs="+", default=list(COUNTS))
    parser.add_argument("--num-repeats", type=int, default=3)
    parser.add_argument("--long-hours", type=float, default=3.0, help="length of the long films; 0: none")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "decode.json")
    args = parser.parse_args()

    there = [(module, distribution) for _, _, module, distribution in READERS if find_spec(module) is not None]
    for module, _ in there:
        importlib.import_module(module)  # is not part of reading
    results = {
        "videos": [measure(path, args.num_frames, args.num_repeats) for path in args.videos],
        "long_hours": args.long_hours,
        "long": measure_long(args.long_hours, args.num_repeats) if args.long_hours else [],
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
