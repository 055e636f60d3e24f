"""Judged benchmarks, with a real HTTP server as the judge."""

from pathlib import Path
from typing import Any

import pytest

import layouts
import tiny
from endpoints import serve
from hicom import VideoChat
from hicom.endpoint import Endpoint
from hicom.eval.benchmarks import TASKS
from hicom.eval.judge import PROMPTS, read_prompts
from hicom.eval.results import write_results
from hicom.eval.run import RunOptions, answer_samples, choose_samples, judge_answers, read_judgements
from hicom.eval.samples import JudgeRequest, Sample

REQUEST = JudgeRequest("1", "accuracy", "v", {"question": "Who?", "answer": "he", "prediction": "{she}"})
SCORES = {
    "factually": 3,  # correctness
    "detailed": 1,
    "context": 4,
    "order of events": 2,
    "consistently": 5,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model"))


def answered(name: str, model: Path, tmp_path: Path) -> tuple[list[Sample], Path]:
    layouts.WRITERS[name](tmp_path / "data")
    samples = choose_samples(TASKS[name], tmp_path / "data", None).items
    out = tmp_path / "out" / name
    chat = VideoChat.from_pretrained(model, device="cpu")
    options = RunOptions(num_frames=4, max_new_tokens=3)
    answer_samples(chat, TASKS[name], samples, out, options, model=str(model))
    return samples, out


def judge(request: dict[str, Any]) -> str:
    system = request["messages"][0]["content"]
    if "mean the same" in system:
        return "{'pred': 'yes', 'score': 4}"
    score = next(score for words, score in SCORES.items() if words in system)
    return str({"score": score})


def test_activitynet_qa(model: Path, tmp_path: Path) -> None:
    task = TASKS["activitynetqa"]
    samples, out = answered(task.name, model, tmp_path)
    facts = write_results(task, samples, out)
    assert facts["scores"] == {}
    assert not facts["is_complete"]
    assert facts["judge"]["judged"] == 0
    with serve(judge) as served:
        endpoint = Endpoint(served.url, "judge-1")
        assert judge_answers(task, samples, out, endpoint, PROMPTS) == []
        assert len(served.requests) == 3
        assert "Question: is it red\nCorrect answer: yes\n" in served.requests[0]["messages"][1]["content"]
        judge_answers(task, samples, out, endpoint, PROMPTS)
        assert len(served.requests) == 3, "something was judged twice"
    facts = write_results(task, samples, out)  # the judge that judged last
    assert facts["is_complete"]
    assert facts["scores"]["accuracy"]["mean"] == 100
    assert facts["scores"]["score"]["mean"] == 4
    assert facts["judge"]["model"] == "judge-1"
    assert facts["judge"]["url"] == served.url
    assert len(facts["judge"]["dates"]) == 2
    assert set(facts["judge"]["prompts"]) == {"accuracy"}
    assert facts["groups"]["type"]["accuracy"]["color"]["n"] == 1


def test_video_chatgpt(model: Path, tmp_path: Path) -> None:
    task = TASKS["videochatgpt"]
    samples, out = answered(task.name, model, tmp_path)
    with serve(judge) as served:
        judge_answers(task, samples, out, Endpoint(served.url, "judge-1"), PROMPTS)
    facts = write_results(task, samples, out)
    assert {name: found["mean"] for name, found in facts["scores"].items()} == {
        "correctness": 3,
        "detail": 1,
        "context": 4,
        "temporal": 2,
        "consistency": 5,
        "average": 3,
    }
    assert facts["is_complete"]


def test_unclear_and_failed_judgements_are_counted(model: Path, tmp_path: Path) -> None:
    task = TASKS["activitynetqa"]
    samples, out = answered(task.name, model, tmp_path)
    replies: list[str | int] = ["I cannot say", "{'pred': 'no', 'score': 1}", 400]
    with serve(lambda _: replies.pop(0)) as served:
        errors = judge_answers(task, samples, out, Endpoint(served.url, "j", num_concurrent=1), PROMPTS)
    assert len(errors) == 1
    facts = write_results(task, samples, out)
    assert (facts["judge"]["requests"], facts["judge"]["judged"], facts["judge"]["unclear"]) == (3, 2, 1)
    assert (facts["scores"]["accuracy"]["mean"], facts["scores"]["accuracy"]["n"]) == (0, 1)
    assert not facts["is_complete"]
    with serve(judge) as served:  # only what failed is asked again
        judge_answers(task, samples, out, Endpoint(served.url, "j"), PROMPTS)
        assert len(served.requests) == 1


def test_another_judge_or_prompt_judges_anew(model: Path, tmp_path: Path) -> None:
    task = TASKS["activitynetqa"]
    samples, out = answered(task.name, model, tmp_path)
    file = tmp_path / "prompts.yaml"
    file.write_text("accuracy: {system: mean the same, user: '{question} {answer} {prediction}'}", "utf-8")
    with serve(judge) as served:
        judge_answers(task, samples, out, Endpoint(served.url, "a"), PROMPTS)
        judge_answers(task, samples, out, Endpoint(served.url, "b"), PROMPTS)
        judge_answers(task, samples, out, Endpoint(served.url, "b"), read_prompts(file))
        assert len(served.requests) == 9
    assert len(read_judgements(out)) == 9
    assert write_results(task, samples, out, judge="a")["judge"]["judged"] == 3
    assert write_results(task, samples, out, prompts=read_prompts(file))["judge"]["model"] == "b"


@pytest.mark.parametrize("aspect", PROMPTS)
def test_prompts_hold_what_is_judged(aspect: str) -> None:
    fields = {**REQUEST.fields, "question2": "Whom?", "prediction2": "him"}
    system, user = PROMPTS[aspect].messages(JudgeRequest("1", aspect, "v", fields))
    assert system["role"] == "system"
    for value in fields.values() if aspect == "consistency" else REQUEST.fields.values():
        assert value in user["content"]
    assert "{'score': 3}" in user["content"] or "{'pred': 'yes', 'score': 4}" in user["content"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "not a mapping"),
        ("a: [", "not YAML"),
        ("tone: {system: a, user: b}", "no aspect 'tone'; choose from accuracy"),
        ("detail: {system: a}", "detail needs 'system' and 'user'"),
    ],
)
def test_wrong_prompts(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.yaml"
    file.write_text(text, "utf-8")
    with pytest.raises(ValueError, match=message):
        read_prompts(file)
    file.write_text("accuracy: {system: a, user: '{whatever}'}", "utf-8")
    with pytest.raises(ValueError, match="needs 'whatever'; known are question, answer, prediction"):
        read_prompts(file)["accuracy"].messages(REQUEST)
