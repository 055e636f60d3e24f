"""The benchmark of Video-ChatGPT (Maaz et al., ACL 2024): open questions about 500 videos, judged in five aspects.

Each general answer is judged for correctness, detail and context; temporal answers for temporal understanding; and two
answers to two wordings of a question for consistency. The score of an aspect is the mean of the judge's 0 to 5, the
overall score the mean of the five.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from ..samples import Found, JudgeRequest, Record, Sample, Task, VideoFolder, convert_records

FOLDER = "Video-ChatGPT-eval"
GENERAL = ("correctness", "detail", "context")


def read(root: Path) -> Found[Sample]:
    """Return the samples of all three files; both questions of a consistency record are samples."""
    folder = root / FOLDER
    videos = VideoFolder(folder / "Test_Videos")

    def convert(kind: str, record: Record, number: int) -> list[Sample]:
        video = record.text("video_name")
        keys = ("Q1", "Q2") if kind == "consistency" else ("Q",)
        return [
            Sample(
                id=f"{kind}-{number}" + (f"-{key}" if len(keys) > 1 else ""),
                video=videos.find(video),
                video_id=video,
                question=record.text(key),
                answer=record.text("A"),
                groups={"set": kind},
            )
            for key in keys
        ]

    found: Found[Sample] = Found()
    for kind in ("generic", "temporal", "consistency"):
        rows = convert_records(folder / f"{kind}_qa.json", partial(convert, kind))
        found += Found([sample for some in rows.items for sample in some], rows.bad)
    return found


def prompt(sample: Sample, _: Sequence[str]) -> str:
    """Return what the model reads after the video."""
    return sample.question


def requests(samples: Sequence[Sample], responses: Mapping[str, str]) -> Iterator[JudgeRequest]:
    """Yield three requests a general response, one a temporal one, one a pair for consistency."""
    by_id = {sample.id: sample for sample in samples}
    for sample in samples:
        kind = sample.groups["set"]
        other = by_id.get(sample.id.removesuffix("-Q1") + "-Q2")
        needed = [sample.id, *([other.id] if kind == "consistency" and other is not None else [])]
        if sample.id.endswith("-Q2") or not all(name in responses for name in needed):
            continue
        fields = {"question": sample.question, "answer": str(sample.answer), "prediction": responses[sample.id]}
        if kind == "generic":
            for aspect in GENERAL:
                yield JudgeRequest(sample.id, aspect, sample.video_id, fields)
        elif kind == "temporal":
            yield JudgeRequest(sample.id, "temporal", sample.video_id, fields)
        elif other is not None:
            fields |= {"question2": other.question, "prediction2": responses[other.id]}
            yield JudgeRequest(sample.id.removesuffix("-Q1"), "consistency", sample.video_id, fields)


TASK = Task(
    name="videochatgpt",
    title="Video-ChatGPT",
    files=f"{FOLDER}/generic_qa.json, temporal_qa.json, consistency_qa.json and {FOLDER}/Test_Videos/<video_name>.mp4",
    read=read,
    prompt=prompt,
    max_new_tokens=1024,
    judge=requests,
    aspects=(*GENERAL, "temporal", "consistency"),
)
