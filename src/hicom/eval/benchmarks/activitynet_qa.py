"""ActivityNet-QA (Yu et al., AAAI 2019): 8,000 open questions of the test split, judged by a language model.

The model is asked the question as it stands. The judge says whether the answer means the right one, and gives a score
of 0 to 5 (the protocol of Video-ChatGPT).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ..samples import Found, JudgeRequest, Record, Sample, Task, VideoFolder, convert_records

FOLDER = "Activitynet_Zero_Shot_QA"
TYPES = ("motion", "spatial", "temporal", "yes/no", "color", "object", "location", "number", "other")
"""Of questions, by their number in the files."""


def read(root: Path) -> Found[Sample]:
    """Return the samples of the test split."""
    folder = root / FOLDER
    videos = VideoFolder(folder / "all_test")
    path = folder / "test_a.json"
    pairs = convert_records(path, lambda record, _: (record.text("question_id"), record))
    answers = dict(pairs.items)
    count = Counter(name for name, _ in pairs.items)

    def convert(record: Record, _: int) -> Sample:
        name, video = record.text("question_id"), record.text("video_name")
        if count[name] != 1:
            raise ValueError(f"{path.name} has {count[name] or 'no'} answers for the question {name!r}")
        kind = answers[name].index("type")
        return Sample(
            id=name,
            video=videos.find(f"v_{video}"),
            video_id=video,
            question=record.text("question"),
            answer=answers[name].text("answer"),
            groups={"type": TYPES[kind] if 0 <= kind < len(TYPES) else str(kind)},
        )

    found = convert_records(folder / "test_q.json", convert)
    return Found(found.items, pairs.bad + found.bad)


def prompt(sample: Sample, _: Sequence[str]) -> str:
    """Return what the model reads after the video."""
    return sample.question


def requests(samples: Sequence[Sample], responses: Mapping[str, str]) -> Iterator[JudgeRequest]:
    """Yield one request a response."""
    for sample in samples:
        if sample.id in responses:
            fields = {
                "question": sample.question,
                "answer": str(sample.answer),
                "prediction": responses[sample.id],
            }
            yield JudgeRequest(sample.id, "accuracy", sample.video_id, fields)


TASK = Task(
    name="activitynetqa",
    title="ActivityNet-QA",
    files=f"{FOLDER}/test_q.json, {FOLDER}/test_a.json and {FOLDER}/all_test/v_<video_name>.mp4",
    read=read,
    prompt=prompt,
    max_new_tokens=64,
    groups=("type",),
    judge=requests,
    aspects=("accuracy",),
)
