"""Every long command against every fault of its surroundings: one clear line, nothing corrupt, and it goes on.

The faults: a disk that is full, a folder that is only to be read, two at once, SIGTERM, Ctrl-C, `kill -9`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import disks
import official
from hicom import cli
from hicom.data.cache import FeatureCache
from hicom.files import writing_folder
from hicom.inference import VideoChat
from hicom.locks import owned
from hicom.train import run
from test_processes import alive
from toy_training import make_config, make_folder

DEMO = cli.ASSETS / "demo.mp4"
NO_CLIPS = [f"--{name}=0" for name in ("val", "test", "test-pairs", "test-scenes", "test-long")]
# What holds the time, or names the process, or only who holds a folder.
CHANGES = re.compile(r'"(seconds|seconds_per_sample|wall_s|started|date|command)": [^,}]*|\d+\.\d\d s')
MARKS = ("lock", "lock.pid", "lock-")

Inputs = Path
Command = Callable[[Inputs, Path], list[object]]


def world(inputs: Inputs, out: Path) -> list[object]:
    return ["world", "make", out / "world", "--train=2", *NO_CLIPS, "--num-workers=1", "--width=64", "--height=48"]


def preview(inputs: Inputs, out: Path) -> list[object]:
    return ["world", "preview", out / "sheet.png", "--num-clips=1"]


def check(inputs: Inputs, out: Path) -> list[object]:
    files = ["--report", out / "report.json", "--skip-list", out / "skip.jsonl"]
    return ["data", "check", inputs / "records.jsonl", "--num-workers=1", "--num-frames=2", *files]


def convert_data(inputs: Inputs, out: Path) -> list[object]:
    return ["data", "convert", "llava", inputs / "records.jsonl", out / "data.jsonl"]


def build(inputs: Inputs, out: Path) -> list[object]:
    config = inputs / f"build-{out.parent.name}-{out.name}.yaml"
    facts = {"videos": [str(inputs / "films")], "out": str(out / "build"), "num_workers": 1}
    facts |= {"per_category": 0, "num_random": 1, "encoder": str(cli.ASSETS / "hicom-tiny-start")}
    config.write_text(json.dumps(facts))
    return ["data", "build", config, "--steps", "inventory", "select"]


def export(inputs: Inputs, out: Path) -> list[object]:
    return ["convert", "export", inputs / "model", out / "model"]


def convert(inputs: Inputs, out: Path) -> list[object]:
    return ["convert", inputs / "official", out / "model", "--vision-tower", inputs / "tower"]


def evaluate(inputs: Inputs, out: Path) -> list[object]:
    some = ["--records", inputs / "few.jsonl", "--num-frames=2", "--max-new-tokens=4"]
    return ["eval", "hicom-tiny", "--out", out / "eval", *some]


def look(inputs: Inputs, out: Path) -> list[object]:
    return ["look", DEMO, "What color is the circle?", "-o", out / "look.png", "--num-frames=4"]


COMMANDS: dict[str, tuple[Command, int]] = {
    "world make": (world, 8),
    "world preview": (preview, 4),
    "data check": (check, 0),
    "data convert": (convert_data, 0),
    "data build": (build, 40),
    "convert export": (export, 40),
    "convert": (convert, 40),
    "eval": (evaluate, 4),
    "look": (look, 4),
}
"""By their names: the arguments, and kilobytes of a disk that is too small for it (0: a full one)."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """All that the commands read; the model is a toy."""
    folder = make_folder(tmp_path_factory.mktemp("inputs"))
    run(make_config(folder, out=str(folder / "run"), steps=1))
    (folder / "run" / "model").rename(folder / "model")
    (folder / "films").mkdir()
    shutil.copyfile(folder / "0.mp4", folder / "films" / "0.mp4")
    (folder / "few.jsonl").write_text("".join((folder / "records.jsonl").read_text().splitlines(keepends=True)[:2]))
    official.save(folder / "official")
    official.save_tower(folder / "tower")
    return folder


@pytest.fixture(scope="module")
def undisturbed(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, object]]:
    """What a command writes where nothing goes wrong."""
    known: dict[str, dict[str, object]] = {}

    def make(name: str) -> dict[str, object]:
        if name not in known:
            out = tmp_path_factory.mktemp("whole") / "out"
            out.mkdir()
            assert hicom(COMMANDS[name][0](inputs, out)) == 0
            known[name] = contents(out)
        return known[name]

    return make


def hicom(arguments: list[object]) -> int:
    return cli.main([str(each) for each in arguments])


def contents(out: Path) -> dict[str, object]:
    """Return what a command has written, without what differs from run to run; a database by its tables."""
    found: dict[str, object] = {}
    for path in sorted(out.rglob("*")):
        if not path.is_file() or path.name.startswith(".") or path.name in MARKS or path.suffix == ".lock":
            continue
        name = str(path.relative_to(out))
        if path.suffix == ".sqlite":
            import sqlite3

            with sqlite3.connect(path) as connection:
                found[name] = [line for line in connection.iterdump() if not line.startswith("PRAGMA")]
            connection.close()
        elif path.suffix in (".json", ".jsonl", ".md") or path.name == "unfinished.json":
            found[name] = CHANGES.sub("", path.read_text().replace(str(out), "OUT"))
        elif not path.name.endswith(("-wal", "-shm")):
            found[name] = path.read_bytes()
    return found


TOY = "note: this model is a toy"


def one_line(err: str, path: Path) -> str:
    """Return the line of an error that names a path in or above `path`'s folder, which is the only one."""
    lines = [line for line in re.split(r"[\r\n]+", err) if line and not re.match(r"\S+: +\d+%", line)]
    lines = [line for line in lines if "`rope_scaling` is deprecated" not in line]  # of transformers
    lines = [line for line in lines if not line.startswith(TOY)]
    assert len(lines) == 1, err
    assert lines[0].startswith("hicom: error: ")
    assert str(path) in lines[0]
    return lines[0]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk(
    inputs: Inputs,
    undisturbed: Callable[[str], dict[str, object]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    name: str,
) -> None:
    command, kilobytes = COMMANDS[name]
    disk = tmp_path / "disk"
    whole = undisturbed(name)
    with disks.small(disk, max(4, kilobytes)) as enlarge:
        if not kilobytes:
            if not os.path.ismount(disk):
                pytest.skip("what it writes is too small for a limit")
            with (disk / "filled").open("wb", buffering=0) as filled, suppress(OSError):
                while True:
                    filled.write(bytes(4096))
        capfd.readouterr()
        assert hicom(command(inputs, disk)) == 2
        line = one_line(capfd.readouterr().err, disk)
        assert re.search(f"{disks.FULL}; make room there, and the same command goes on$|Input/output error;", line)
        assert not list(disk.rglob("*.part")), "nothing is left half"
        enlarge()
        assert hicom(command(inputs, disk)) == 0
        (disk / "filled").unlink(missing_ok=True)
        assert contents(disk) == whole


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_that_is_only_to_be_read(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    out = tmp_path / "out"
    with disks.read_only(out):
        arguments = COMMANDS[name][0](inputs, out)
        capfd.readouterr()
        assert hicom(arguments) == 2
        line = one_line(capfd.readouterr().err, out)
        assert re.search(f"({disks.READ_ONLY}|you may not write in {out}); choose another place", line)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_where_a_folder_is_needed(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    arguments = COMMANDS[name][0](inputs, out)
    capfd.readouterr()
    assert hicom(arguments) == 2
    one_line(capfd.readouterr().err, out)
    assert out.read_text() == "mine"


@pytest.mark.parametrize("name", ["world make", "data build", "convert export", "convert"])
def test_two_at_once(
    inputs: Inputs,
    undisturbed: Callable[[str], dict[str, object]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    name: str,
) -> None:
    """The second one is told so, and touches nothing of the first one's."""
    command, whole = COMMANDS[name][0], undisturbed(name)
    folder = tmp_path / {"world make": "world", "data build": "build"}.get(name, "model")
    is_model = folder.name == "model"
    if not is_model:
        folder.mkdir()
    with writing_folder(folder) if is_model else owned(folder):
        part = folder.with_name("model.part") if is_model else folder
        (part / "of the first.part").write_text("half")
        arguments = command(inputs, tmp_path)
        capfd.readouterr()
        assert hicom(arguments) == 2
        line = one_line(capfd.readouterr().err, folder)
        assert "by another process; wait for it" in line if is_model else f"in use by process {os.getpid()}; " in line
        assert (part / "of the first.part").read_text() == "half"
        (part / "of the first.part").unlink()
    shutil.rmtree(folder, ignore_errors=is_model)
    assert hicom(arguments) == 0
    assert contents(tmp_path) == whole


@pytest.mark.slow
def test_evaluations_of_one_shard_take_turns(inputs: Inputs, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hicom", *map(str, evaluate(inputs, tmp_path))]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [each.communicate()[1].count("error") for each in both] == [0, 0]
    assert [each.returncode for each in both] == [0, 0]
    lines = (tmp_path / "eval" / "few" / "samples-0-of-1.jsonl").read_text().splitlines()
    assert len(lines) == 2, "no sample was answered twice"


@pytest.mark.parametrize("is_there", [True, False], ids=["kept", "not kept"])
def test_a_cache_that_is_only_to_be_read(tmp_path: Path, capfd: pytest.CaptureFixture[str], is_there: bool) -> None:
    arguments = ["ask", DEMO, "What color is the circle?", "--cache", tmp_path, "--num-frames=4", "--json"]
    if is_there:
        assert hicom(arguments) == 0
    capfd.readouterr()
    with disks.read_only(tmp_path):
        assert hicom(arguments) == 0
        out, err = capfd.readouterr()
        facts = json.loads(out)
        assert facts["answer"]
        assert ("cache" in facts["timings_s"]) == is_there, "what is kept there is used"
        lines = [line for line in err.splitlines() if not line.startswith(TOY)]
        warnings = [line for line in lines if "cannot be written, so features are not kept" in line]
        assert len(lines) == len(warnings) == (not is_there)
        assert all(str(tmp_path) in line for line in warnings)


def test_what_killed_processes_left_in_a_cache_goes(tmp_path: Path) -> None:
    chat = VideoChat.from_pretrained("hicom-tiny", device="cpu", cache=FeatureCache(tmp_path))
    for name, age_s in (("old.1.part", 7200), (".tmpOLD", 7200), ("new.2.part", 0)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    chat.encode(DEMO, num_frames=2)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".safetensors") == ["locks", "new.2.part"]


@pytest.mark.parametrize("kilobytes", [2, 40, 150, 300])
def test_training_on_a_full_disk(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str], kilobytes: int
) -> None:
    disk = tmp_path / "disk"
    config = make_config(inputs, out=str(disk / "run"), steps=3, save_every=1)
    with disks.small(disk, kilobytes) as enlarge:
        if not os.path.ismount(disk) and kilobytes > 40:
            pytest.skip("a limit on files says nothing about all of them together")
        with pytest.raises(OSError, match=rf"{disks.FULL}|Input/output") as caught:
            run(config)
        assert str(caught.value.filename).startswith(str(disk / "run"))
        assert "Traceback" not in capfd.readouterr().err
        enlarge()
        model = run(config)
        files = {path: stat.S_IMODE(path.stat().st_mode) for path in disk.rglob("*") if path.is_file()}
        assert len(set(files.values())) == 1, "weights may be read by whoever may read all else"
        assert not [path for path in files if path.suffix == ".part"]
        whole = run(make_config(inputs, out=str(tmp_path / "whole"), steps=3, save_every=1))
        assert (model / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


# Signals


def start(arguments: list[object]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "hicom", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture
def many(inputs: Inputs) -> Iterator[Path]:
    """Records of so many videos that to look at all takes a while."""
    folder = inputs / "many"
    folder.mkdir()
    record = json.loads((inputs / "few.jsonl").read_text().splitlines()[0])
    for number in range(3000):
        (folder / f"{number}.mp4").hardlink_to(inputs / "0.mp4")
    lines = (json.dumps(record | {"id": number, "video": f"{number}.mp4"}) for number in range(3000))
    (folder / "records.jsonl").write_text("".join(f"{line}\n" for line in lines))
    yield folder
    shutil.rmtree(folder)


def stop(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Send a signal as systems do: Ctrl-C to all processes of a terminal, others to the one that was started."""
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    _, err = process.communicate(timeout=30)  # a worker that stays would hold its end of the pipe
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[number]
    assert "Traceback" not in err
    if number != signal.SIGKILL:
        assert "rror" not in err
    end = time.monotonic() + 10
    while left := alive(process.pid):
        assert time.monotonic() < end, left
        time.sleep(0.05)


def wait_for(process: subprocess.Popen[str], is_there: Callable[[], object]) -> None:
    while not is_there():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stopped_world_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    def arguments(out: Path) -> list[object]:
        return ["world", "make", out, "--train=60", *NO_CLIPS, "--num-workers=2", "--width=64", "--height=48"]

    process = start(arguments(tmp_path / "world"))
    wait_for(process, lambda: len(list(tmp_path.glob("world/train/videos/*.mp4"))) > 3)
    stop(process, number)
    assert number == signal.SIGKILL or not list(tmp_path.rglob("*.part"))
    assert not (tmp_path / "world" / "world.json").exists()
    assert hicom(arguments(tmp_path / "world")) == 0
    assert not [path.name for path in (tmp_path / "world").rglob("*") if path.suffix == ".part" or "lock" in path.name]
    assert hicom(arguments(tmp_path / "whole")) == 0
    assert contents(tmp_path / "world") == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("name", ["check", "build"])
def test_what_decodes_ends_with_its_command(many: Path, tmp_path: Path, name: str, number: signal.Signals) -> None:
    if name == "check":
        arguments: list[object] = ["data", "check", many / "records.jsonl", "--num-workers=2"]
    else:
        config = tmp_path / "build.yaml"
        config.write_text(json.dumps({"videos": [str(many)], "out": str(tmp_path / "out"), "num_workers": 2}))
        arguments = ["data", "build", config, "--steps", "inventory"]
    process = start(arguments)
    wait_for(process, lambda: len([line for line in alive(process.pid) if "spawn_main" in line]) == 2)
    time.sleep(3)
    stop(process, number)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stopped_export_is_repeated(tmp_path: Path, number: signal.Signals) -> None:
    arguments: list[object] = ["convert", "export", "hicom-tiny", tmp_path / "model", "--dtype", "float32"]
    process = start(arguments)
    wait_for(process, (tmp_path / "model.part").exists)
    stop(process, number)
    left = [path.name for path in tmp_path.iterdir()]
    assert left in ([], ["model"]) if number != signal.SIGKILL else left in (["model.part"], ["model"])
    assert hicom(arguments) == (2 if "model" in left else 0)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert len({stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}) == 1
    assert VideoChat.from_pretrained(str(tmp_path / "model"), device="cpu").ask(DEMO, "What happens?").text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "number"),
    [([], signal.SIGTERM), ([], signal.SIGINT), ([], signal.SIGKILL), (["--devices", "cpu", "cpu"], signal.SIGTERM)],
)
def test_a_stopped_evaluation_goes_on(
    inputs: Inputs, tmp_path: Path, number: signal.Signals, devices: list[str]
) -> None:
    def arguments(out: Path) -> list[object]:
        some = ["--records", inputs / "records.jsonl", "--num-frames=2", "--batch-size=1", *devices]
        return ["eval", "hicom-tiny", "--out", out, *some]

    process = start(arguments(tmp_path / "out"))
    wait_for(process, lambda: any(path.stat().st_size for path in tmp_path.glob("out/*/samples-*.jsonl")))
    stop(process, number)
    assert hicom(arguments(tmp_path / "out")) == 0
    assert hicom(arguments(tmp_path / "whole")) == 0
    results = [json.loads((tmp_path / out / "records" / "results.json").read_text()) for out in ("out", "whole")]
    assert results[0]["scores"] == results[1]["scores"]
    ids = [
        json.loads(line)["id"]
        for path in tmp_path.glob("out/records/samples-*.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert len(ids) == len(set(ids)) == 8
