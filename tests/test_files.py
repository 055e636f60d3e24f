"""Files and folders are whole or not there, have normal permissions, and errors name them."""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import disks
from hicom.files import check_target, naming, parse_json, write_json, write_text, writing, writing_folder
from hicom.video import write_video

NOISE = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("a" * 200_000),
    "safetensors": lambda path: save_file({"x": torch.zeros(50_000)}, path),
    "torch": lambda path: torch.save(torch.zeros(50_000), path),
    "picture": lambda path: Image.fromarray(NOISE).save(path, "PNG"),
}


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_has_normal_permissions(tmp_path: Path, umask: int, writer: str) -> None:
    with writing(tmp_path / "file") as part:
        WRITERS[writer](part)
        assert not (tmp_path / "file").exists(), "it is there only once it is whole"
    assert mode_of(tmp_path / "file") == 0o666 & ~umask
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_has_normal_permissions(tmp_path: Path, umask: int) -> None:
    with writing_folder(tmp_path / "model") as part:
        (part / "inner").mkdir()
        save_file({"x": torch.zeros(3)}, part / "inner" / "model.safetensors")
        (part / "config.json").write_text("{}")
    assert {mode_of(path) for path in (tmp_path / "model").rglob("*") if path.is_file()} == {0o666 & ~umask}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "inner"]


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path: Path, writer: str) -> None:
    path = tmp_path / "disk" / "file"
    with disks.small(tmp_path / "disk", 64) as enlarge:
        path.write_text("before")
        with pytest.raises(OSError, match=rf"{disks.FULL}|Input/output") as caught, writing(path) as part:
            WRITERS[writer](part)
        assert caught.value.filename == str(path)
        # torch does not say why it could not write; where the disk has room, that is all there is to know.
        assert caught.value.errno in (errno.ENOSPC, errno.EFBIG, *([errno.EIO] if writer == "torch" else []))
        assert [path.name for path in path.parent.iterdir()] == ["file"]
        assert path.read_text() == "before"
        enlarge()
        with writing(path) as part:
            WRITERS[writer](part)
        assert path.stat().st_size > 60_000


def test_a_video_on_a_full_disk(tmp_path: Path) -> None:
    with disks.small(tmp_path / "disk", 16) as enlarge:
        path = tmp_path / "disk" / "clip.mp4"
        with pytest.raises(OSError, match=disks.FULL) as caught:
            write_video(path, [NOISE] * 8)
        assert (type(caught.value), caught.value.filename) == (OSError, str(path)), "PyAV's cannot be handed over"
        assert list(path.parent.iterdir()) == []
        enlarge()
        write_video(path, [NOISE] * 8)
        assert path.stat().st_size > 16_000


@pytest.mark.parametrize("writer", WRITERS)
def test_a_place_that_is_only_to_be_read_is_named(tmp_path: Path, writer: str) -> None:
    with disks.read_only(tmp_path / "disk"):
        path = tmp_path / "disk" / "file"
        with pytest.raises(OSError, match=disks.READ_ONLY) as caught, writing(path) as part:
            WRITERS[writer](part)
        assert caught.value.filename == str(path)


def test_an_error_inside_leaves_nothing(tmp_path: Path) -> None:
    def write(how: Callable[[Path], AbstractContextManager[Path]], name: str) -> None:
        with how(tmp_path / "new") as part:
            (part / name).write_text("half")
            raise KeyError

    for how, name in ((writing, ""), (writing_folder, "file")):
        with pytest.raises(KeyError):
            write(how, name)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_file_is_written_as_it_is(tmp_path: Path) -> None:
    code = "from pathlib import Path; from hicom.files import write_json; write_json(Path('/dev/stdout'), [1])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[\n 1\n]\n"
    with pytest.raises(OSError, match="No space left") as caught:
        write_text(Path("/dev/full"), "text")
    assert caught.value.filename == "/dev/full"
    (tmp_path / "real").write_text("before")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_text(tmp_path / "link", "after")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "after"


def test_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    code = "import os, signal, sys; from pathlib import Path; from hicom.files import writing_folder\n"
    code += "with writing_folder(Path(sys.argv[1])) as part: (part / 'old').write_text('x'); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], check=False)
    assert (tmp_path / "model.part" / "old").is_file()
    assert not (tmp_path / "model").exists()
    with writing_folder(tmp_path / "model") as part:
        (part / "new").write_text("y")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["model", "model/new"]


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with writing_folder(folder) as part:
        with pytest.raises(ValueError, match="model is being written by another process; wait"), writing_folder(folder):
            pass
        (part / "file").write_text("the first one's")
    with pytest.raises(ValueError, match="model exists and is not empty"), writing_folder(folder):
        pass
    assert (folder / "file").read_text() == "the first one's"
    with writing_folder(folder, replace=True) as part:
        (part / "other").write_text("")
    assert [path.name for path in folder.iterdir()] == ["other"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with writing_folder(tmp_path / "empty") as part:
        (part / "file").write_text("")
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["file"]


@pytest.mark.parametrize("umask", [0o022], indirect=True)
@pytest.mark.usefixtures("umask")
def test_a_mounted_volume_is_filled_as_it_is(tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    with disks.small(volume, 64):
        if not os.path.ismount(volume):
            pytest.skip("nothing can be mounted here")

        def write(size: int) -> None:
            with writing_folder(volume) as part:
                (part / "small").write_text("a")
                save_file({"x": torch.zeros(size)}, part / "large")

        with pytest.raises(OSError, match="No space left") as caught:
            write(50_000)
        assert caught.value.filename == str(volume)
        assert list(volume.iterdir()) == [], "so the repeat is not refused"
        write(50)
        assert {path.name: mode_of(path) for path in volume.iterdir()} == dict.fromkeys(("small", "large"), 0o644)


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file exists and is not empty"), writing_folder(tmp_path / "file"):
        pass
    for below in ("file/model", "file/deeper/model"):
        with pytest.raises(ValueError, match="file is a file; choose another place"), writing_folder(tmp_path / below):
            pass
    with pytest.raises(OSError, match="Not a directory") as caught:
        write_text(tmp_path / "file" / "text", "")
    assert caught.value.filename == str(tmp_path / "file" / "text")


@pytest.mark.parametrize(
    ("name", "message"), [("", "is a folder; name a file"), ("no/x.json", "cannot be written: there is no folder .*no")]
)
def test_a_target_is_looked_at_before_the_work(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_target(tmp_path / name)
    check_target(tmp_path / "new.json")
    check_target(Path("/dev/stdout"))


def test_errors_that_have_nothing_to_do_with_the_disk_stay(tmp_path: Path) -> None:
    for error in (RuntimeError("of torch"), OSError(errno.ENOENT, "No such file", "/elsewhere"), KeyError("x")):
        with pytest.raises(type(error)) as caught, naming(tmp_path):
            raise error
        assert caught.value is error
    with pytest.raises(sqlite3.OperationalError), naming(tmp_path):
        sqlite3.connect(":memory:").execute("no SQL")


def test_json_that_is_too_deep_or_halved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 200_000)
    write_json(tmp_path / "x.json", {"text": "\ud800 é"})
    assert parse_json((tmp_path / "x.json").read_text("utf-8")) == {"text": "\ud800 é"}
