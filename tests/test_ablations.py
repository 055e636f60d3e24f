"""The paper's tables in small: definitions, resuming, sharing of work, and the statistics of the report."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from hicom.model.modeling import HIComForConditionalGeneration
from hicom.train.assemble import assemble
from media import write_video
from studies import load, unload
from toy_training import ANSWERS, make_towers


@pytest.fixture(autouse=True, scope="module")
def only_here() -> Iterator[None]:
    """Leave no benchmark behind in other tests' modules, and spare the Trainer's many collections all that is older."""
    gc.freeze()
    yield
    gc.unfreeze()
    unload()


@pytest.fixture(scope="module")
def ablations() -> ModuleType:
    return load("ablations")


@pytest.fixture(scope="module")
def report() -> ModuleType:
    return load("ablation_report")


SHORT: dict[str, Any] = {"pretrain": None}
QUESTIONS = (
    ("presence", "is there a cat ?", "yes", None),
    ("direction", "which way does the dog go ?", "it moves left", "dog"),
    ("generic", "what happens ?", "it moves up", None),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, ablations: ModuleType) -> Any:
    """A world of a few clips whose files look like those of the sprite world."""
    folder = tmp_path_factory.mktemp("world")
    torch.set_num_threads(1)
    make_towers(folder / "towers")
    for split, num_clips in (("train", 4), ("test", 3), ("test_long", 2)):
        (folder / "world" / split).mkdir(parents=True)
        for number in range(num_clips):
            write_video(folder / "world" / split / f"{number}.mp4", 8, width=32, height=32)
        for file in ("align", "pretrain", "tune", "choice"):
            lines = []
            for number in range(num_clips):
                for family, text, answer, subject in QUESTIONS:
                    record = {
                        "video": f"{split}/{number}.mp4",
                        "conversations": [
                            {"from": "human", "value": f"<video>\n{text}"},
                            {"from": "gpt", "value": ANSWERS[number % 2] if file == "align" else answer},
                        ],
                        "family": family,
                        "form": "open",
                        "chance": 0.25,
                    }
                    lines.append(json.dumps(record | ({"subject": subject} if subject else {})) + "\n")
            (folder / "world" / split / f"{file}.jsonl").write_text("".join(lines))
    (folder / "world" / "world.json").write_text("{}")
    return ablations.Place(
        world=folder / "world",
        towers=folder / "towers",
        language_model=None,
        cache=folder / "cache",
        out=folder / "out",
    )


@pytest.fixture
def out(place: Any, tmp_path: Path) -> Any:
    """The same world with an empty folder for runs."""
    return dataclasses.replace(place, out=tmp_path / "out")


def smoke(ablations: ModuleType, row: str, place: Any, **changes: Any) -> Any:
    protocol = dataclasses.replace(ablations.PROTOCOLS["smoke"], num_clips=2)
    tests = changes.pop("tests", ablations.ROWS[row].tests[:1])
    return ablations.Job(dataclasses.replace(ablations.ROWS[row], tests=tests, **changes), 0, protocol, place)


# What is defined.


def test_every_table_has_its_rows_and_every_row_a_table(ablations: ModuleType, place: Any) -> None:
    tests = {(row.name, test.name) for row in ablations.ROWS.values() for test in row.tests}
    used = set()
    for table in ablations.TABLES.values():
        cells = [entry.cell for entry in table.entries]
        assert len(set(cells)) == len(cells) > 1, table.name
        assert len({entry.label for entry in table.entries}) == len(cells), table.name
        for each in table.comparisons:
            assert {each.cell, each.other} <= set(cells), f"{each.label} compares what the table does not show"
        assert {(cell.row, cell.test) for cell in cells} <= tests
        assert all(len(entry.paper) in (0, len(table.paper)) for entry in table.entries), table.name
        used |= {(cell.row, cell.test) for cell in cells}
    assert used == tests, "an answer that no table shows"
    issue = {"4", "5", "6", "figure5", "a3", "a4", "a5", "frames", "queries", "beyond"}
    assert set(ablations.TABLES) == issue
    digests = [
        ablations.Job(row, seed, ablations.PROTOCOLS["cpu"], place).stages[-1].digest
        for row in ablations.ROWS.values()
        for seed in ablations.SEEDS
    ]
    assert len(set(digests)) == len(digests), "two rows or seeds are the same run"


def test_slower_injections_differ_in_their_rate_in_stage_2_alone(ablations: ModuleType, place: Any) -> None:
    usual, slow = (smoke(ablations, row, place).stages for row in ("hicom", "hicom_slow"))
    assert usual[0].digest == slow[0].digest, "stage 1 is shared"
    assert [stage.config.stage == other.config.stage for stage, other in zip(usual, slow, strict=True)] == [
        True,
        False,
        True,
    ]
    rates = {
        pattern: (a, b)
        for (pattern, a), (_, b) in zip(usual[1].config.stage.trainable, slow[1].config.stage.trainable, strict=True)
    }
    assert {pattern: a / b for pattern, (a, b) in rates.items() if a != b} == {ablations.INJECTION: 10.0}


def test_a_run_has_the_same_name_wherever_everything_lies(ablations: ModuleType, place: Any, tmp_path: Path) -> None:
    """Answers in the repository are found again on another machine, and those of another world are not."""

    def names(place: Any, row: str) -> list[str]:
        job = ablations.Job(ablations.ROWS[row], 0, ablations.PROTOCOLS["cpu"], place)
        return [job.stages[-1].digest, *(job.answers_path(test).name for test in job.row.tests)]

    shutil.copytree(place.world, tmp_path / "moved")
    shutil.copytree(place.towers, tmp_path / "towers")
    moved = dataclasses.replace(
        place, world=tmp_path / "moved", towers=tmp_path / "towers", cache=tmp_path / "cache", out=tmp_path / "out"
    )
    for row in ("hicom", "hicom_mixed", "qformer"):
        assert names(place, row) == names(moved, row)
    (tmp_path / "moved" / "world.json").write_text('{"seed": 1}')
    assert names(place, "hicom") != names(dataclasses.replace(moved), "hicom")


def test_rows_are_compared_at_equal_tokens(ablations: ModuleType) -> None:
    rows = ablations.ROWS
    other = {"full": 512, "pool_more": 32, "windows_cond": 12, "windows_uncond": 12, "windows_pool": 8}
    assert {name: row.token_count() for name, row in rows.items()} == dict.fromkeys(rows, ablations.BUDGET) | other
    for window, tokens in zip(ablations.WINDOWS, (32, 16, 8, 4, 1), strict=True):
        assert rows["windows_pool"].token_count(window=window) == tokens
        assert rows["windows_cond"].token_count(window=window) == tokens + 4
        assert rows["windows_uncond"].token_count(window=window) == tokens + 4


def test_rows_differ_in_what_they_are_about_only(ablations: ModuleType, place: Any) -> None:
    jobs = {name: ablations.Job(row, 1, ablations.PROTOCOLS["cpu"], place) for name, row in ablations.ROWS.items()}
    for name, job in jobs.items():
        tune = job.stages[-1].config
        assert (tune.steps, tune.batch_size * tune.accumulate, tune.seed) == (
            2200 if job.row.tune == "mixed" else 2000,
            32,
            1,
        ), name
        rates = dict(tune.stage.trainable)
        assert rates[ablations.COMPRESSOR] == rates[r"(model\.language_model|lm_head)\..*"] == 3e-3
        steered = "injector" in " ".join(n for n, _ in job.row.module.named_parameters())
        assert rates.get(ablations.INJECTION) == (3e-4 if steered else None), name
    # What is the same is trained once.
    same = [jobs[name].stages[0].digest for name in ("hicom", "hicom_two_stages", "hicom_mixed", "hicom_questions")]
    assert len(set(same)) == 1
    assert jobs["pool"].stages[1].digest != jobs["uncond"].stages[1].digest


# Training and asking.


@pytest.mark.parametrize(
    "name", ["beyond", "fine_fine", "global_uncond", "uncond_mixed", "pool_frames", "qformer", "full"]
)
def test_rows_train_and_answer(ablations: ModuleType, out: Any, name: str) -> None:
    job = smoke(ablations, name, out, **({} if name == "beyond" else SHORT))
    assert job.advance()
    assert job.is_done
    found = job.answers(job.row.tests[0])
    assert len(found["questions"]) == 2 * len(QUESTIONS)
    assert found["visual_tokens"] == job.row.token_count(found["num_frames"], found["window"], grid=4)
    assert not (job.stages[-1].folder / "checkpoints").exists()


def test_accuracy_of_several_splits_and_files(ablations: ModuleType, out: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A baseline has no keys and no window of its own; a family that a split lacks is left out."""
    model, processor = assemble(ablations.ROWS["qformer"].parts(str(out.towers), None))
    model.save_pretrained(out.out / "model")
    processor.save_pretrained(out.out / "model")
    arguments = ["world_accuracy", str(out.out / "model"), "--world", str(out.world), "--cache", str(out.cache)]
    arguments += ["--split", "test", "test_long", "--file", "tune", "choice", "--num-clips", "2", "--no-blind"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--out", str(out.out / "accuracy.json")])
    load("world_accuracy").main()
    found = json.loads((out.out / "accuracy.json").read_text())
    assert (found["split"], found["file"], found["visual_tokens"]) == ("test", "tune", ablations.BUDGET)
    assert found["families"]["direction"]["n"] == 2
    others = {(each["split"], each["file"]) for each in found["others"]}
    assert others == {("test", "choice"), ("test_long", "tune"), ("test_long", "choice")}
    assert "test_long, choice" in (out.out / "accuracy.md").read_text()


def test_every_row_can_be_put_together(ablations: ModuleType, place: Any) -> None:
    for row in ablations.ROWS.values():
        model, processor = assemble(row.parts(str(place.towers), None))
        names = {name for name, _ in model.model.compressor.named_parameters()}
        assert names == {name for name, _ in row.module.named_parameters()}, row.name
        assert processor.token_count(row.num_frames) == row.token_count(grid=4)


def test_goes_on_after_an_interruption_between_stages(
    ablations: ModuleType, out: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = smoke(ablations, "uncond", out, tests=(ablations.OPEN, ablations.BY_WINDOW[0]))
    trained: list[str] = []
    run = ablations.run

    def interrupted(config: Any) -> Path:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(config.name)
        return run(config)

    monkeypatch.setattr(ablations, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        job.advance()
    assert trained == ["align", "pretrain"]
    monkeypatch.setattr(ablations, "run", lambda config: (trained.append(config.name), run(config))[1])
    assert smoke(ablations, "uncond", out, tests=(ablations.OPEN, ablations.BY_WINDOW[0])).advance()
    assert trained == ["align", "pretrain", "tune"], "finished stages must not be trained again"
    # One test is lost: only that is answered again.
    kept = job.answers_path(ablations.OPEN).stat().st_mtime_ns
    job.answers_path(ablations.BY_WINDOW[0]).unlink()
    assert job.advance()
    assert job.is_done
    assert job.answers_path(ablations.OPEN).stat().st_mtime_ns == kept
    assert len(trained) == 3


def test_unconditional_rows_borrow_features(
    ablations: ModuleType, out: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = sorted((out.world / "train").glob("*.mp4"))
    for row in ("hicom", "pool"):
        model, processor = assemble(ablations.ROWS[row].parts(str(out.towers), None))
        if row == "pool":
            monkeypatch.setattr(HIComForConditionalGeneration, "encode_frames", None, raising=False)
        store = ablations.make_features(model, processor, videos, tmp_path / "cache", 8)
        values = store.read(videos, "values")
        assert ("keys" in store.key) == (row == "hicom")
        if row == "hicom":
            expected = values
    assert torch.equal(values, expected)


def test_questions_with_options_are_left_out(ablations: ModuleType, out: Any, tmp_path: Path) -> None:
    records = [json.loads(line) for line in Path(out.records("tune")).read_text().splitlines()]
    shutil.copytree(out.world, tmp_path / "world")
    place = dataclasses.replace(out, world=tmp_path / "world")
    with Path(place.records("tune")).open("a") as file:
        file.write(json.dumps(records[0] | {"form": "choice"}) + "\n")
    place.write_questions()
    assert [json.loads(line) for line in place.questions.read_text().splitlines()] == records


def test_two_processes_do_not_do_the_same_run(ablations: ModuleType, out: Any) -> None:
    job, other = (smoke(ablations, name, out, **SHORT) for name in ("pool", "qformer"))
    lock = out.out / "locks" / job.stages[0].digest
    lock.parent.mkdir(parents=True)
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", hold, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert job.advance() is False
        assert not job.stages[0].folder.exists()
        done: list[bool] = []

        def report() -> None:
            done.append(job.is_done)
            holder.kill()
            holder.wait()

        # The free one comes first, and then what the other process has given back.
        ablations.work([job, other], report, wait_s=0.01)
        assert done == [False, True]


# The report.


def planted(report: ModuleType, accuracy: float, rng: np.random.Generator, num_clips: int = 400) -> Any:
    """Answers of one seed to one question of each of two families about every clip."""
    questions = [[clip, family, int(rng.random() < accuracy), 1] for clip in range(num_clips) for family in (0, 1)]
    answers = {"clips": [str(clip) for clip in range(num_clips)], "families": ["a", "b"], "questions": questions}
    return report.Hits.of(answers)


def test_means_are_over_families(report: ModuleType) -> None:
    answers = {
        "clips": ["0", "1"],
        "families": ["presence", "generic", "direction"],
        "questions": [[0, 0, 1, 0], [1, 0, 1, 0], [0, 1, 0, 0], [1, 2, 1, 1], [0, 2, 0, 1]],
    }
    assert report.Hits.of(answers).mean() == pytest.approx((1 + 0 + 0.5) / 3)
    assert report.Hits.of(answers, "naming").mean() == pytest.approx((1 + 0.5) / 2)
    assert report.Hits.of(answers, "generic").mean() == 0
    with pytest.raises(ValueError, match="group='other'"):
        report.Hits.of(answers, "other")


def test_intervals_cover_what_was_planted(report: ModuleType) -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(40):
        found = report.number({0: planted(report, 0.6, rng)})
        covered += found.low <= 0.6 <= found.high
    assert covered >= 34
    width = found.high - found.low
    # The binomial interval of 800 independent answers.
    assert width == pytest.approx(2 * 1.96 * (0.6 * 0.4 / 800) ** 0.5, rel=0.15)
    # Seeds that differ widen it.
    spread = {seed: planted(report, share, rng) for seed, share in enumerate((0.4, 0.6, 0.8))}
    assert report.number(spread).high - report.number(spread).low > 3 * width


def test_differences_are_paired(report: ModuleType) -> None:
    rng = np.random.default_rng(0)
    hits = {seed: planted(report, share, rng) for seed, share in enumerate((0.3, 0.5, 0.7))}
    better = {seed: dataclasses.replace(each, right=each.right.copy()) for seed, each in hits.items()}
    for each in better.values():
        wrong = np.argwhere(each.right == 0)[:40]
        each.right[tuple(wrong.T)] = 1
    found = report.difference(better, hits)
    assert found.mean == pytest.approx(40 / 800)
    # Alone, the interval of each row is far wider than that of the difference.
    assert found.low > 0
    alone = report.number(hits)
    assert found.high - found.low < 0.25 * (alone.high - alone.low)
    # Only common seeds count, and only the same clips.
    assert report.difference(better, {1: hits[1], 7: hits[0]}).seeds == (1,)
    assert report.difference(better, {}) is None
    with pytest.raises(ValueError, match="different clips"):
        report.difference(better, {1: planted(report, 0.5, rng, num_clips=10)})


def test_verdicts(report: ModuleType) -> None:
    up, unsure = report.Number(0.02, 0.01, 0.03, (0, 1)), report.Number(-0.01, -0.03, 0.01, (0, 1))
    assert report.verdict(up, 1.3) == "same sign"
    assert report.verdict(up, -1.3) == "OTHER SIGN"
    assert report.verdict(unsure, 1.3) == "OTHER SIGN, interval spans 0"
    assert report.verdict(unsure, -1.3) == "same sign, interval spans 0"
    assert report.verdict(up, None) == "clear"
    assert report.verdict(up, 0.0) == "no difference in the paper"
    assert report.verdict(report.Number(0.0, 0.0, 0.0, (0,)), 1.3) == "no difference"
    assert report.verdict(None, 1.3) == "missing"


def test_report_of_what_is_there_and_what_is_missing(ablations: ModuleType, out: Any, tmp_path: Path) -> None:
    rows = ablations.ROWS.values()
    jobs = [smoke(ablations, row.name, out, tests=row.tests) for row in rows]
    for job in jobs:
        if job.row.name in ("hicom", "uncond", "windows_pool"):
            assert job.advance()
    ablations.write_report(jobs, tmp_path)
    page = (tmp_path / "ablations.md").read_text()
    assert f"3 of {len(jobs)} runs" in page
    assert "By chance 25.0 %" in page
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in reversed(page.splitlines())}
    assert "| 0 | missing |" in lines["uncompressed"]
    assert "| 1 |" in lines["local+global: conditional - unconditional"]
    # (36.6 + 45.0 + 43.5 - 34.7 - 44.1 - 42.4) / 3.
    assert "| +1.3 |" in lines["local+global: conditional - unconditional"]
    facts = json.loads((tmp_path / "ablations.json").read_text())
    assert facts["runs_done"] == 3
    # On another machine, which has the answers and not the runs, the report still says how they were trained.
    shutil.rmtree(out.out / "stages")
    ablations.write_report(jobs, tmp_path)
    assert json.loads((tmp_path / "ablations.json").read_text())["rows"] == facts["rows"]
    assert set(facts["rows"]["hicom"]["seeds"]["0"]["stages"]) == {"align", "pretrain", "tune"}
    families = facts["rows"]["hicom"]["seeds"]["0"]["tests"]["open"]["families"]
    assert set(families) == {family for family, *_ in QUESTIONS}
    assert all(row["n"] == 2 for row in families.values())
    assert facts["rows"]["qformer"]["seeds"] == {}
    entry = next(t for t in facts["tables"] if t["table"] == "4")["entries"][-1]
    assert (entry["label"], entry["accuracy"]["seeds"], entry["paper"]["VMME"]) == (ablations.COND, [0], 36.6)
    picture = (tmp_path / "ablations-figure5.svg").read_text()
    tokens = {a["visual_tokens"] for a in facts["rows"]["windows_pool"]["seeds"]["0"]["tests"].values()}
    assert len(tokens) > 2
    assert all(f">{number}</text>" in picture for number in tokens)
    assert "missing" not in picture


def test_a_plot_shows_its_lines_and_is_the_same_for_the_same_numbers(report: ModuleType) -> None:
    plots = load("plots")
    lines = {"a line": [(8.0, report.Number(0.5, 0.4, 0.6, (0,))), (32.0, report.Number(0.7, 0.6, 0.8, (0,)))]}
    picture = plots.accuracy_plot("a title", "visual tokens", lines)
    assert all(f">{text}</text>" in picture for text in ("a title", "visual tokens", "a line", "8", "32"))
    assert "missing" not in picture
    assert plots.accuracy_plot("a title", "visual tokens", lines) == picture
    assert "missing" in plots.accuracy_plot("a title", "visual tokens", {})


def test_curves_have_a_panel_for_every_stage() -> None:
    log = [{"step": 10, "loss": 2.0}, {"step": 20, "loss": "1.5"}, {"step": 20, "train_runtime": 3.0}]
    picture = load("plots").loss_curves({"align": log, "tune": log[:1]})
    assert all(f">{text}</text>" in picture for text in ("align", "tune", "loss"))


def test_command_line(ablations: ModuleType, out: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert ablations.main(["--list", "--tables", "5"]) == 0
    shown = capsys.readouterr().out
    assert "hicom_two_stages" in shown
    assert "qformer" not in shown
    folders = [f"--{name}={getattr(out, name)}" for name in ("world", "towers", "cache", "out")]
    language_model = f"--language-model={out.out / 'none'}"
    with pytest.raises(ValueError, match="is missing: `hicom world make` writes the world"):
        ablations.main(["--protocol", "smoke", "--rows", "pool", *folders, language_model])
