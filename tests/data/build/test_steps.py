"""Each step of a build, on small films; runs that stop, fail or are configured anew; the same on Ray."""

import base64
import dataclasses
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from endpoints import Served, serve
from hicom import cli
from hicom.data.build import work
from hicom.data.build.config import CATEGORIES, BuildConfig, read_config
from hicom.data.build.export import export
from hicom.data.build.state import State
from hicom.data.build.steps import RANDOM, STEPS, choose, report, video_id
from hicom.data.mixture import read_sources
from hicom.video import VideoError, probe, write_video

COLORS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "white": (230, 230, 230)}
ENCODER = str(Path(cli.__file__).parent / "assets" / "hicom-tiny-start")


def film(path: Path, shots: dict[str, float], fps: int = 8) -> Path:
    """Write a film of one color after the other, with a square that moves, each for some seconds."""
    frames = []
    for color, seconds in shots.items():
        for number in range(round(seconds * fps)):
            frame = np.full((64, 96, 3), COLORS[color], np.uint8)
            frame[20:40, 2 * number % 70 : 2 * number % 70 + 20] = 255 - frame[0, 0]
            frames.append(frame)
    write_video(path, frames, fps)
    return path


def exported(out: Path) -> list[dict[str, Any]]:
    """Return the records that a build wrote."""
    return [json.loads(line) for line in (out / "data.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    film(folder / "one.mp4", {"red": 3, "green": 1, "blue": 4})
    film(folder / "two.mp4", {"white": 5})
    (folder / "broken.mp4").write_bytes(b"not a video")
    return folder


def config_of(films: Path, out: Path, **options: Any) -> BuildConfig:
    defaults: dict[str, Any] = {
        "videos": (str(films),),
        "out": str(out),
        "encoder": ENCODER,
        "device": "cpu",
        "num_workers": 0,
        "shot_threshold": 10.0,
        "min_s": 2.0,
        "max_s": 4.5,
        "caption_frames": 2,
        "model": "captioner",
        "num_concurrent": 2,
    }
    return BuildConfig(**(defaults | options))


def color_of(request: dict[str, Any]) -> str:
    """Return the color of the first picture of a request."""
    url = request["messages"][-1]["content"][0]["image_url"]["url"]
    picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    corner = np.asarray(picture)[1, 1].astype(int)
    return min(COLORS, key=lambda name: int(np.abs(corner - COLORS[name]).sum()))


def captioner(request: dict[str, Any]) -> str:
    color = color_of(request)
    if "Write 3 different pairs" not in request["messages"][-1]["content"][-1]["text"]:
        return f"A {color} wall with a square in front of it."
    things = ("wall", "square", "background")
    return json.dumps(
        [
            {
                "instruction": f"Describe the {color} {thing}.",
                "answer": f"The {thing} is {color} and can be seen from the start to the end of it.",
            }
            for thing in things
        ]
    )


@pytest.fixture
def served() -> Iterator[Served]:
    with serve(captioner) as running:
        yield running


def build(config: BuildConfig, *steps: str, on_ray: bool = False) -> dict[str, Any]:
    known = {**STEPS, "export": export}
    with State(Path(config.out) / "state.sqlite") as state:
        for name in steps or known:
            known[name](state, config, on_ray)
        return report(state, config)


def rows_of(config: BuildConfig, query: str) -> list[tuple[Any, ...]]:
    with State(Path(config.out) / "state.sqlite") as state:
        return state.rows(query)


def test_inventory_finds_what_can_be_read(films: Path, tmp_path: Path) -> None:
    config = config_of(films, tmp_path)
    facts = build(config, "inventory")
    assert (facts["videos"], facts["readable"], facts["errors"]) == (3, 2, {"inventory": 1})
    rows = dict(rows_of(config, "SELECT path, duration_s FROM videos WHERE duration_s IS NOT NULL"))
    assert rows == {str(films / "one.mp4"): 8.0, str(films / "two.mp4"): 5.0}


def test_inventory_notices_what_has_changed_and_what_is_gone(films: Path, tmp_path: Path) -> None:
    source = tmp_path / "films"
    source.mkdir()
    film(source / "a.mp4", {"red": 3})
    film(source / "b.mp4", {"red": 3})
    config = config_of(source, tmp_path / "out")
    build(config, "inventory", "select", "split")
    assert len(rows_of(config, "SELECT * FROM shots")) == 2
    (source / "b.mp4").unlink()
    film(source / "a.mp4", {"green": 4})
    film(source / "c.mp4", {"blue": 2})
    build(config, "inventory")
    assert rows_of(config, "SELECT * FROM shots") == []
    assert sorted(rows_of(config, "SELECT duration_s FROM videos")) == [(2.0,), (4.0,)]


def test_lists_of_videos_and_wrong_places(films: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{films / 'one.mp4'}\n\n{films / 'two.mp4'}\n", "utf-8")
    config = config_of(films, tmp_path / "out", videos=(str(tmp_path / "list.txt"),))
    assert build(config, "inventory")["videos"] == 2
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        build(dataclasses.replace(config, videos=("nowhere",)), "inventory")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="there is no video in"):
        build(dataclasses.replace(config, videos=(str(tmp_path / "empty"),)), "inventory")


def test_selection_takes_turns_and_then_draws_lots() -> None:
    videos = list("abcdefgh")
    ranked = {"x": list("abcdefgh"), "y": list("abhgfedc")}
    chosen = choose(ranked, videos, per_category=2, num_random=2, seed=0)
    assert {name: category for name, category in chosen.items() if category != RANDOM} == {
        "a": "x",
        "b": "y",
        "c": "x",
        "h": "y",
    }
    by_lot = [name for name, category in chosen.items() if category == RANDOM]
    assert len(by_lot) == 2
    assert choose(ranked, videos[::-1], 2, 2, seed=0) == chosen
    assert choose(ranked, videos, 9, 9, seed=0).keys() == set(videos)


def test_selection_by_the_similarity_to_sentences(films: Path, tmp_path: Path) -> None:
    config = config_of(films, tmp_path, categories=("a red circle", "a blue square"), per_category=1, num_random=0)
    facts = build(config, "inventory", "select")
    assert facts["selected"] == 2
    assert set(facts["by category"]) == {"a red circle", "a blue square"}
    values = rows_of(config, "SELECT value FROM similarities")
    assert len(values) == 4
    assert all(-1 <= value <= 1 for (value,) in values)


def test_shots_key_frames_and_clips(films: Path, tmp_path: Path) -> None:
    config = config_of(films, tmp_path)
    facts = build(config, "inventory", "select", "split", "keyframes")
    name = video_id(str(films / "one.mp4"))
    shots = rows_of(config, f"SELECT start_s, end_s FROM shots WHERE video = '{name}' ORDER BY 1")
    assert np.allclose(shots, [(0, 3), (3, 4), (4, 8)], atol=0.13)
    times = [time for (time,) in rows_of(config, f"SELECT time_s FROM keyframes WHERE video = '{name}' ORDER BY 1")]
    assert times[0] == 0
    assert {3, 4} <= set(times)  # where the color changes
    assert (facts["shots"], facts["clips"]) == (4, 2)
    assert facts["dropped clips"] == {"longer than 4.5 s": 1, "shorter than 2 s": 1}


def test_key_frames_are_unlike_the_last_key_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow change makes key frames too, though no frame differs much from the one before it."""

    class Turning:
        size = 64

        def images(self, frames: np.ndarray) -> torch.Tensor:
            angles = torch.arange(len(frames)) * 0.2
            return torch.stack([angles.cos(), angles.sin()], dim=-1)

    monkeypatch.setattr(work, "_encoder", lambda name, device: Turning())
    path = film(tmp_path / "a.mp4", {"red": 4})
    found = work.keyframes({"id": "a", "path": str(path)}, "x", None, fps=4, similarity=math.cos(0.5))
    assert found["times"] == pytest.approx([0, 0.75, 1.5, 2.25, 3.0, 3.75])


def test_finding_shots_leaves_ffmpeg_silent(films: Path, capfd: pytest.CaptureFixture[str]) -> None:
    work.shots({"id": "a", "path": str(films / "two.mp4")}, threshold=10, min_shot_s=0.6)
    capfd.readouterr()
    with pytest.raises(VideoError):
        probe(films / "broken.mp4")
    assert capfd.readouterr().err == ""


def test_clips_without_a_key_frame_are_dropped(films: Path, tmp_path: Path) -> None:
    source = tmp_path / "films"
    source.mkdir()
    film(source / "a.mp4", {"red": 3, "green": 3})
    config = config_of(source, tmp_path / "out", keyframe_similarity=0.01)
    facts = build(config, "inventory", "select", "split", "keyframes")
    assert facts["dropped clips"] == {"no key frame": 1}


def test_a_whole_build(films: Path, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(films, tmp_path, url=served.url, prompt_price=2.0, completion_price=4.0)
    facts = build(config)
    assert (facts["clips"], facts["captions"], facts["pairs"], facts["good pairs"]) == (2, 2, 6, 6)
    assert facts["spent"] == [
        {
            "model": "captioner",
            "requests": 4,
            "prompt_tokens": 28,
            "completion_tokens": 12,
            "cost": round((28 * 2 + 12 * 4) / 1e6, 4),
        }
    ]
    assert len(served.requests) == 4
    pictures = [part for part in served.requests[0]["messages"][0]["content"] if part["type"] == "image_url"]
    assert len(pictures) == 2
    assert any(
        "A red wall with a square" in request["messages"][0]["content"][-1]["text"] for request in served.requests
    )
    # What was made is what training reads, also by the name that the mixture of the published recipes has for it.
    (tmp_path / "HICom-248K").symlink_to(tmp_path)
    monkeypatch.setenv("HICOM_DATA", str(tmp_path))
    (published,) = read_sources([Path(__file__).parents[3] / "examples" / "mixtures" / "pretrain.yaml"])
    (source,) = read_sources([tmp_path / "mixture.yaml"])
    assert [sample.answer for sample in published] == [sample.answer for sample in source]
    assert all(sample.videos[0].is_file() for sample in published)
    samples = list(source)
    assert len(samples) == 6
    assert samples[0].videos[0].is_file()
    records = exported(tmp_path)
    assert [turn["from"] for turn in records[0]["conversations"]] == ["human", "gpt"] * 3
    assert records[0]["conversations"][0]["value"].startswith("<video>\nDescribe the ")
    assert not records[0]["conversations"][2]["value"].startswith("<video>")
    lengths = sorted(probe(tmp_path / record["video"]).duration_s for record in records)
    assert np.allclose(lengths, [3, 4], atol=0.2)
    card = (tmp_path / "README.md").read_text("utf-8")
    assert "2 clips with 6 pairs" in card
    assert "| longer than 4.5 s | 1 |" in card
    assert served.url not in card
    assert str(films) not in card
    assert (tmp_path / "lengths.png").stat().st_size > 1000
    assert (tmp_path / "clips.png").stat().st_size > 1000


def test_nothing_is_done_twice(films: Path, served: Served, tmp_path: Path) -> None:
    config = config_of(films, tmp_path, url=served.url)
    first = build(config)
    clips = {file: file.stat().st_mtime_ns for file in (tmp_path / "clips").iterdir()}
    assert build(config) == first
    assert len(served.requests) == 4
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "clips").iterdir()} == clips
    # Other bounds make other clips; what is known of those that stay is kept.
    wider = dataclasses.replace(config, max_s=9.0)
    assert build(wider)["clips"] == 3
    assert len(served.requests) == 6
    assert len(list((tmp_path / "clips").iterdir())) == 3
    assert build(config)["clips"] == 2
    assert len(served.requests) == 6
    assert len(list((tmp_path / "clips").iterdir())) == 2


def test_failed_requests_are_asked_again_and_replies_without_pairs_are_told(films: Path, tmp_path: Path) -> None:
    broken = True

    def answer(request: dict[str, Any]) -> str | int:
        text = captioner(request)
        return text if text.startswith("A ") or not broken else (400 if color_of(request) == "red" else "I cannot.")

    with serve(answer) as served:
        config = config_of(films, tmp_path, url=served.url)
        facts = build(config)
        assert facts["errors"]["pairs"] == 2
        with State(tmp_path / "state.sqlite") as state:
            errors = [error for _, error in state.errors("pairs")]
        assert any("BadRequestError" in error for error in errors)
        assert any("no pairs in the reply: 'I cannot.'" in error for error in errors)
        assert exported(tmp_path) == []
        broken = False
        facts = build(dataclasses.replace(config, temperature=0.5))  # the reply that was kept would be the same
        assert facts["errors"].keys() == {"inventory"}
        assert facts["good pairs"] == 6


def test_captions_need_an_endpoint(films: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give `url` and `model`"):
        build(config_of(films, tmp_path))


def test_bad_pairs_are_dropped_but_kept_in_the_state(films: Path, tmp_path: Path) -> None:
    def answer(request: dict[str, Any]) -> str:
        if not captioner(request).startswith("["):
            return "A wall."
        good = "The wall is plain, has one color, and stays as it is."
        items = [("Describe the wall.", good), ("Describe the car.", good), ("Describe the wall.", "Not visible.")]
        return json.dumps([{"instruction": a, "answer": b} for a, b in items])

    with serve(answer) as served:
        config = config_of(films, tmp_path, url=served.url)
        facts = build(config)
    assert (facts["pairs"], facts["good pairs"]) == (6, 1)
    assert facts["dropped pairs"] == {
        "description is about something else": 2,
        "refusal: not visible": 2,
        "near-duplicate": 1,
    }
    assert len(exported(tmp_path)) == 1


def test_a_killed_build_goes_on_and_asks_nothing_twice(films: Path, tmp_path: Path) -> None:
    def slowly(request: dict[str, Any]) -> str:
        time.sleep(0.4)
        return captioner(request)

    with serve(slowly) as served:
        config = config_of(films, tmp_path / "out", url=served.url, max_s=9.0, num_concurrent=1)
        build(config, "inventory", "select", "split", "keyframes")
        file = tmp_path / "build.yaml"
        content = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
        file.write_text(yaml.safe_dump(content), "utf-8")
        process = subprocess.Popen(
            [sys.executable, "-m", "hicom", "data", "build", str(file), "--steps", "caption", "pairs"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while len(served.requests) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
        facts = build(config)
        asked = [json.dumps(request, sort_keys=True) for request in served.requests]
    assert facts["good pairs"] == 9
    # The one that was on its way when the process died can have been asked again, and no other.
    assert len(asked) - len(set(asked)) <= 1
    assert len(set(asked)) == 6


@pytest.mark.dist
def test_ray_gives_the_same(films: Path, served: Served, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    here = config_of(films, tmp_path / "here", url=served.url, num_workers=2)
    there = dataclasses.replace(here, out=str(tmp_path / "there"))
    facts = build(here)
    try:
        assert build(there, on_ray=True) == facts
    finally:
        ray.shutdown()
    for table in ("videos", "similarities", "selected", "shots", "keyframes", "clips", "captions", "pairs", "done"):
        query = f"SELECT * FROM {table} ORDER BY 1, 2"
        assert rows_of(here, query) == rows_of(there, query), table
    for name in ("data.jsonl", "mixture.yaml"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


# Configurations and the command

WRONG: dict[str, tuple[str, str]] = {
    "no videos": ("out: a", "videos is missing"),
    "typo": ("videos: [a]\nout: b\nmin_seconds: 3", "no option 'min_seconds'"),
    "nearest": ("videos: [a]\nout: b\nencodr: x", "did you mean 'encoder'"),
    "kind": ("videos: [a]\nout: b\nnum_pairs: three", "num_pairs: 'three' is not a number"),
    "whole number": ("videos: [a]\nout: b\nnum_pairs: 1.5", "num_pairs: 1.5 is not a number"),
    "list": ("videos: {a: b}\nout: b", "is not a list of strings"),
    "flag": ("videos: [a]\nout: b\njson_schema: 1", "neither true nor false"),
    "range": ("videos: [a]\nout: b\nnear_duplicate: 2", "near_duplicate: 2.0: give a number above 0"),
    "negative": ("videos: [a]\nout: b\nnum_workers: -1", "num_workers: -1: give a number from 0 on"),
    "bounds": ("videos: [a]\nout: b\nmin_s: 9\nmax_s: 5", "min_s: 9.0 is more than max_s: 5.0"),
    "no YAML": ("videos: [", "not YAML"),
    "no mapping": ("- a", "needs entries such as"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_configurations(name: str, tmp_path: Path) -> None:
    text, message = WRONG[name]
    file = tmp_path / "build.yaml"
    file.write_text(text, "utf-8")
    with pytest.raises(ValueError, match=r"build\.yaml: ") as error:
        read_config(file)
    assert message in str(error.value)


def test_a_configuration_is_what_was_written(tmp_path: Path) -> None:
    config = config_of(Path("films"), Path("out"), clip_size=300, json_schema=True, url="http://localhost/v1")
    file = tmp_path / "build.yaml"
    content = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
    file.write_text(yaml.safe_dump(content), "utf-8")
    paths = {"videos": (str(tmp_path / "films"),), "out": str(tmp_path / "out")}
    assert read_config(file) == dataclasses.replace(config, **paths)


def test_defaults_are_the_papers(tmp_path: Path) -> None:
    file = tmp_path / "build.yaml"
    file.write_text("videos: films\nout: data", "utf-8")
    config = read_config(file)
    assert config.videos == (str(tmp_path / "films"),)
    assert config.out == str(tmp_path / "data")
    assert len(CATEGORIES) == len(config.categories) == 29
    assert (config.per_category, config.num_random, config.min_s, config.max_s) == (1500, 10_000, 5, 120)


def test_command(films: Path, served: Served, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "build.yaml"
    options = {"videos": [str(films)], "out": "data", "encoder": ENCODER, "device": "cpu", "num_workers": 1}
    options |= {"shot_threshold": 10.0, "min_s": 2.0, "url": served.url, "model": "captioner"}
    file.write_text(yaml.safe_dump(options), "utf-8")
    assert cli.main(["data", "build", str(file), "--steps", "inventory", "select"]) == 0
    out, err = capfd.readouterr()
    assert "selected" in out
    assert "broken.mp4" in err
    assert cli.main(["data", "build", str(file), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["good pairs"] == 9
    assert cli.main(["data", "build", str(file), "--steps", "caption2"]) == 2
    assert "unknown step 'caption2'; did you mean 'caption'?" in capfd.readouterr().err
    assert cli.main(["data", "build", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: cannot be read" in capfd.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "state.sqlite").write_text("no database " * 1000, "utf-8")
    file.write_text(yaml.safe_dump(options | {"out": "other"}), "utf-8")
    assert cli.main(["data", "build", str(file)]) == 2
    assert "not the state of a build" in capfd.readouterr().err
