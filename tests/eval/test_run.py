"""Runs that stop, go on and are shared out give the results of a single one; nothing that fails is lost or hidden."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import layouts
import media
from hicom import VideoChat
from hicom.eval.benchmarks import TASKS
from hicom.eval.report import comparison_table, results_page, summary_rows
from hicom.eval.results import Value, compare_runs, estimate, read_results, write_results
from hicom.eval.run import RunOptions, answer_on_devices, answer_samples, choose_samples, read_answers
from hicom.eval.samples import BenchmarkError

OPTIONS = RunOptions(num_frames=4, batch_size=2, max_new_tokens=3)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    layouts.video_mme(tmp_path / "data")
    layouts.mvbench(tmp_path / "data")
    return tmp_path / "data"


def run(
    chat: VideoChat,
    model: Path,
    root: Path,
    out: Path,
    name: str = "videomme",
    options: RunOptions = OPTIONS,
    **more: Any,
) -> dict[str, Any]:
    task = TASKS[name]
    samples = choose_samples(task, root, options.limit).items
    answer_samples(chat, task, samples, out / name, options, model=str(model), **more)
    return write_results(task, samples, out / name)


def lines_of(out: Path, name: str = "videomme") -> dict[str, Any]:
    """Return all lines, without what differs from run to run."""
    lines = read_answers(out / name)
    return {key: {k: v for k, v in line.items() if k != "seconds"} for key, line in lines.items()}


def test_a_run_is_complete(chat: VideoChat, model: Path, root: Path, tmp_path: Path) -> None:
    facts = run(chat, model, root, tmp_path / "out")
    assert facts["is_complete"]
    assert (facts["answered"], facts["failed"], facts["missing"], facts["not_run"]) == (9, 0, 0, 0)
    assert (
        facts["unparsable"] + sum(line["prediction"] is not None for line in lines_of(tmp_path / "out").values()) == 9
    )
    assert facts["cut"] == sum(line["is_cut"] for line in lines_of(tmp_path / "out").values()) > 0  # of 3 tokens
    assert facts["chance"] == 25
    assert facts["scores"]["accuracy"]["clusters"] == 3
    assert set(facts["groups"]["duration"]["accuracy"]) == {"short", "medium"}
    assert len(facts["config"]["model_digest"]) == 16
    assert facts["config"]["prompt"].startswith("Select the best answer")
    assert facts["commits"]
    assert read_results(tmp_path / "out" / "videomme" / "results.json") == facts


def test_answers_are_those_of_the_model_asked_alone(chat: VideoChat, model: Path, root: Path, tmp_path: Path) -> None:
    run(chat, model, root, tmp_path / "out")
    task = TASKS["videomme"]
    for sample in choose_samples(task, root, None).items:
        line = lines_of(tmp_path / "out")[sample.id]
        video = chat.encode(sample.video, num_frames=4)
        alone = chat.ask(video, task.prompt(sample, []), instruction=sample.question, max_new_tokens=3)
        assert line["response"] == alone.text
        assert line["instruction"] == sample.question  # the bare question steers, not the prompt
        assert line["num_visual_tokens"] == alone.num_visual_tokens


def test_subtitles_are_those_of_the_frames(chat: VideoChat, model: Path, root: Path, tmp_path: Path) -> None:
    run(chat, model, root, tmp_path / "out", "videomme_w_subtitle")
    lines = lines_of(tmp_path / "out", "videomme_w_subtitle")
    # Of 16 frames at 8 a second the model sees those at 0.25, 0.75, 1.25 and 1.625 s; the third cue comes later.
    assert lines["001-0"]["prompt"].startswith(
        "This video's subtitles are listed below:\nHello there, you.\nBye.\nSelect the best answer"
    )
    assert lines["000-0"]["prompt"].startswith("This video's subtitles are listed below:\n\nSelect the best answer")


def test_bounds_and_folders_of_frames(chat: VideoChat, model: Path, root: Path, tmp_path: Path) -> None:
    seen = {}
    encode = chat.encode

    def spy(source: Any, **choice: Any) -> Any:
        video = encode(source, **choice)
        seen[Path(source).name] = video.timestamps_s
        return video

    chat.encode = spy  # type: ignore[method-assign]
    try:
        facts = run(chat, model, root, tmp_path / "out", "mvbench")
    finally:
        del chat.encode
    assert facts["answered"] == 40
    assert facts["scores"]["accuracy"]["n"] == 40
    assert len(facts["groups"]["task"]["accuracy"]) == 20
    assert min(seen["action_sequence0.mp4"]) >= 0.5
    assert max(seen["action_sequence0.mp4"]) < 1.5
    assert max(seen["action_antonym0.mp4"]) > 1.5
    # At 3 frames a second these are on screen between 0.5 and 1.5 s.
    assert seen["episodic_reasoning0"] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3])


def test_shards_make_one_run(chat: VideoChat, model: Path, root: Path, tmp_path: Path) -> None:
    whole = run(chat, model, root, tmp_path / "whole")
    first = run(chat, model, root, tmp_path / "parts", shard=(0, 2))
    assert not first["is_complete"]
    assert 0 < first["answered"] < 9
    second = run(chat, model, root, tmp_path / "parts", shard=(1, 2))
    assert lines_of(tmp_path / "whole") == lines_of(tmp_path / "parts")
    assert second == whole


@pytest.mark.parametrize("num_lines", [2, 3])
def test_an_interrupted_run_goes_on(num_lines: int, chat: VideoChat, model: Path, root: Path, tmp_path: Path) -> None:
    whole = run(chat, model, root, tmp_path / "whole")
    # A killed process leaves whole lines and at most one half.
    run(chat, model, root, tmp_path / "out")
    file = tmp_path / "out" / "videomme" / "samples-0-of-1.jsonl"
    text = file.read_text("utf-8")
    kept = text.split("\n")[:num_lines]
    file.write_text("\n".join(kept) + '\n{"id": "001-2", "resp', "utf-8")
    again = run(chat, model, root, tmp_path / "out")
    assert again == whole
    assert lines_of(tmp_path / "out") == lines_of(tmp_path / "whole")
    assert file.read_text("utf-8").startswith("\n".join(kept[:2]))
    number = len(file.read_text("utf-8").splitlines())
    assert run(chat, model, root, tmp_path / "out") == whole
    assert len(file.read_text("utf-8").splitlines()) == number, "what was there was answered again"


SLOW_RUN = """
import sys, time
from pathlib import Path
from hicom import VideoChat
from hicom.eval.benchmarks import TASKS
from hicom.eval.run import RunOptions, answer_samples, choose_samples

model, root, out = sys.argv[1:]
chat = VideoChat.from_pretrained(model, device="cpu")
encode = chat.encode

def slowly(*args, **kwargs):
    time.sleep(0.3)
    return encode(*args, **kwargs)

chat.encode = slowly
task = TASKS["mvbench"]
samples = choose_samples(task, Path(root), None).items
options = RunOptions(num_frames=4, batch_size=2, max_new_tokens=3)
answer_samples(chat, task, samples, Path(out) / "mvbench", options, model=model)
"""


@pytest.mark.dist
def test_a_killed_process_loses_nothing(chat: VideoChat, model: Path, root: Path, tmp_path: Path) -> None:
    whole = run(chat, model, root, tmp_path / "whole", "mvbench")
    process = subprocess.Popen([sys.executable, "-c", SLOW_RUN, str(model), str(root), str(tmp_path / "out")])
    file = tmp_path / "out" / "mvbench" / "samples-0-of-1.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (file.is_file() and file.read_text("utf-8").count("\n") >= 16):
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    assert 16 <= len(read_answers(tmp_path / "out" / "mvbench")) < 40
    assert run(chat, model, root, tmp_path / "out", "mvbench") == whole


@pytest.mark.dist
def test_devices_share_the_samples(chat: VideoChat, model: Path, root: Path, tmp_path: Path) -> None:
    whole = run(chat, model, root, tmp_path / "whole")
    task = TASKS["videomme"]
    samples = choose_samples(task, root, None).items
    out = tmp_path / "out" / "videomme"
    answer_on_devices(["cpu", "cpu"], {}, [(task, samples, out)], OPTIONS, model=str(model))
    assert len(list(out.glob("samples-*-of-2.jsonl"))) == 2
    assert write_results(task, samples, out) == whole


def test_missing_videos_stop_the_run_or_are_counted(chat: VideoChat, model: Path, root: Path, tmp_path: Path) -> None:
    (root / "Video-MME" / "videos" / "clip1.mp4").unlink()
    with pytest.raises(BenchmarkError, match=r"videomme: 3 of 9 samples have no video.*\n  .*clip1\.mp4\n.*missing"):
        run(chat, model, root, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    facts = run(chat, model, root, tmp_path / "out", allow_missing=True)
    assert (facts["answered"], facts["missing"], facts["is_complete"]) == (6, 3, False)
    assert facts["scores"]["accuracy"]["n"] == 6
    assert "3 missing" in dict(summary_rows(facts))[""]


def test_broken_videos_fail_alone_and_are_tried_again(chat: VideoChat, model: Path, root: Path, tmp_path: Path) -> None:
    whole = run(chat, model, root, tmp_path / "whole")
    video = root / "Video-MME" / "videos" / "clip1.mp4"
    content = video.read_bytes()
    video.write_bytes(b"not a video")
    (root / "Video-MME" / "videos" / "clip2.mp4").rename(tmp_path / "moved.mp4")
    media.write_video(root / "Video-MME" / "videos" / "clip2.mp4", 16, fps=8)
    facts = run(chat, model, root, tmp_path / "out")
    assert (facts["answered"], facts["failed"], facts["is_complete"]) == (6, 3, False)
    assert "clip1.mp4" in facts["errors"][0]
    video.write_bytes(content)
    again = run(chat, model, root, tmp_path / "out")
    assert again == whole


def test_broken_subtitles_fail_alone(chat: VideoChat, model: Path, root: Path, tmp_path: Path) -> None:
    (root / "Video-MME" / "subtitle" / "clip1.srt").write_text("nothing", "utf-8")
    facts = run(chat, model, root, tmp_path / "out", "videomme_w_subtitle")
    assert (facts["answered"], facts["failed"]) == (6, 3)
    assert "clip1.srt: no subtitles in it" in facts["errors"][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (RunOptions(num_frames=5, batch_size=2, max_new_tokens=3), "num_frames was 4, is 5"),
        (RunOptions(num_frames=4, batch_size=2, max_new_tokens=3, limit=4), "num_samples was 9, is 4"),
        (RunOptions(num_frames=4, batch_size=2, max_new_tokens=3, window=(1, 5, 5)), "window was None"),
    ],
)
def test_answers_of_another_run_are_not_mixed_in(
    options: RunOptions, message: str, chat: VideoChat, model: Path, root: Path, tmp_path: Path
) -> None:
    run(chat, model, root, tmp_path / "out")
    with pytest.raises(BenchmarkError, match=f"holds answers of another run.*{message}"):
        run(chat, model, root, tmp_path / "out", options=options)


def test_a_budget_picks_the_window_of_each_video(chat: VideoChat, model: Path, root: Path, tmp_path: Path) -> None:
    media.write_video(root / "Video-MME" / "videos" / "clip0.mp4", 2, fps=8)
    options = RunOptions(num_frames=4, batch_size=9, max_new_tokens=3, max_visual_tokens=10)
    run(chat, model, root, tmp_path / "out", options=options)
    lines = lines_of(tmp_path / "out")
    assert all(line["num_visual_tokens"] <= 10 for line in lines.values())
    assert lines["000-0"]["window"] != lines["001-0"]["window"]


def test_a_limit_spreads_over_the_benchmark(root: Path) -> None:
    samples = choose_samples(TASKS["mvbench"], root, 20).items
    assert len({sample.groups["task"] for sample in samples}) == 20


@pytest.mark.parametrize(
    "wrong",
    [{"batch_size": 0}, {"num_frames": -1}, {"limit": 0}, {"window": (1, 1, 1), "max_visual_tokens": 5}],
)
def test_wrong_options(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"positive|pass one of them"):
        RunOptions(**wrong)


def hand_made(out: Path, predictions: dict[str, int | None], digest: str = "d") -> Path:
    """Write the lines of a run whose right answer is always 0, two questions a video."""
    folder = out / "videomme"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"data_digest": digest, "macro": ""}), "utf-8")
    with (folder / "samples-0-of-1.jsonl").open("w", encoding="utf-8") as file:
        for number, (name, prediction) in enumerate(predictions.items()):
            line = {"id": name, "video_id": number // 2, "groups": {}, "prediction": prediction, "answer": 0}
            file.write(json.dumps(line | {"num_options": 4, "commit": "c"}) + "\n")
    return out


def test_scores_of_a_macro_mean_weigh_its_groups_equally() -> None:
    values = [Value("accuracy", str(n), str(n), 100.0 * (n < 3), {"task": "a" if n < 3 else "b"}) for n in range(4)]
    assert estimate(values).mean == 75
    assert estimate(values, "task").mean == 50


def test_paired_differences(tmp_path: Path) -> None:
    names = [f"q{number}" for number in range(8)]
    first = hand_made(tmp_path / "a", dict(zip(names, [0, 1, 1, None, 0, 0, 2, 3], strict=True)))
    second = hand_made(tmp_path / "b", dict(zip(names[:7], [0, 0, 0, 0, 1, 0, 2], strict=True)))
    (row,) = compare_runs(first, second)
    assert (row["task"], row["score"]) == ("videomme", "accuracy")
    assert (row["better"], row["worse"], row["unpaired"]) == (3, 1, 1)
    assert row["first"] == pytest.approx(100 * 3 / 7)
    assert row["second"] == pytest.approx(100 * 5 / 7)
    assert row["difference"]["mean"] == pytest.approx(200 / 7, abs=1e-5)
    assert (row["difference"]["n"], row["difference"]["clusters"]) == (7, 4)
    assert "| videomme | accuracy | 42.86 | 71.43 | +28.57 [" in comparison_table([row])


def test_runs_that_do_not_pair(tmp_path: Path) -> None:
    first = hand_made(tmp_path / "a", {"q0": 0})
    other = hand_made(tmp_path / "b", {"q0": 0}, digest="e")
    with pytest.raises(BenchmarkError, match="over different samples"):
        compare_runs(first, other)
    with pytest.raises(BenchmarkError, match="no such folder"):
        compare_runs(first, tmp_path / "c")
    (tmp_path / "c").mkdir()
    with pytest.raises(BenchmarkError, match="share no task"):
        compare_runs(first, tmp_path / "c")


def test_the_page_sets_the_run_beside_the_paper(chat: VideoChat, model: Path, root: Path, tmp_path: Path) -> None:
    run(chat, model, root, tmp_path / "out")
    run(chat, model, root, tmp_path / "out", "mvbench")
    page = results_page(tmp_path / "out")
    assert "## Video-MME" in page
    assert "| HICom-7B, 64 frames | 64 | 1,328 | 67.6 | 58.0 | 51.2 | 58.9 |" in page
    assert "| HICom-7B | 32 | 680 | 64.1 |" in page
    assert "Chance is 25.0." in page
    assert page.count("action_sequence") == 1


def test_unknown_results_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("[]", "utf-8")
    with pytest.raises(BenchmarkError, match="not the results of a task"):
        read_results(tmp_path / "results.json")
