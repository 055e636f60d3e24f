import json
from pathlib import Path

import pytest

from hicom.data.records import read_records


def write(path: Path, records: list[object]) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(records, indent=2, ensure_ascii=False), "utf-8")
    else:
        path.write_text("".join(json.dumps(record) + "\n\n" for record in records), "utf-8")
    return path


def turn(role: str, text: str) -> dict[str, str]:
    return {"from": role, "value": text}


RECORDS: list[object] = [
    {
        "id": "ä",
        "video": "a.mp4",
        "conversations": [
            turn("human", "<video>\nWhat moves?"),
            turn("gpt", "A dog."),
            turn("human", "Where?"),
            turn("gpt", "Left."),
        ],
        "family": "which",
    },
    {"image": ["b.png", "c.png"], "conversations": [turn("human", "Compare."), turn("gpt", "Same.")]},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "2 + 2?"},
            {"role": "assistant", "content": "4"},
        ]
    },
]


@pytest.mark.parametrize("name", ["records.json", "records.jsonl"])
def test_reads_json_and_jsonl(tmp_path: Path, name: str) -> None:
    records = read_records(write(tmp_path / name, RECORDS), "media")
    assert len(records) == 4
    first, second, images, text = records
    assert [m["content"] for m in first.messages] == ["<video>\nWhat moves?"]
    assert (first.answer, first.videos, first.metadata) == (
        "A dog.",
        (Path("media/a.mp4"),),
        {"id": "ä", "family": "which"},
    )
    assert [m["role"] for m in second.messages] == ["user", "assistant", "user"]
    assert (second.answer, second.videos) == ("Left.", first.videos)
    assert images.messages[0]["content"] == "<image><image>\nCompare."
    assert images.images == (Path("media/b.png"), Path("media/c.png"))
    assert text.messages[0] == {"role": "system", "content": "Be brief."}
    assert (text.answer, text.videos) == ("4", ())
    assert records[-1] == text
    assert records[:2] == [first, second]


def test_media_are_relative_to_the_file_by_default(tmp_path: Path) -> None:
    assert read_records(write(tmp_path / "r.jsonl", RECORDS))[0].videos == (tmp_path / "a.mp4",)


def test_a_video_of_a_later_turn_is_not_part_of_the_first_sample(tmp_path: Path) -> None:
    conversation = [turn("human", "Hello"), turn("gpt", "Hi"), turn("human", "<video> And?"), turn("gpt", "A dog.")]
    first, second = read_records(write(tmp_path / "r.jsonl", [{"video": "a.mp4", "conversations": conversation}]))
    assert (first.videos, len(second.videos)) == ((), 1)


def test_what_sorts_samples_is_known_without_reading_them(tmp_path: Path) -> None:
    records = read_records(write(tmp_path / "r.jsonl", [*RECORDS, *RECORDS]), tmp_path)
    assert [records.videos_of(i) for i in range(len(records))] == [sample.videos for sample in records]
    assert list(records.lengths) == [
        len(sample.answer) + sum(len(message["content"]) for message in sample.messages) for sample in records
    ]
    assert records.videos == list(dict.fromkeys(video for sample in records for video in sample.videos))
    assert 0 < len(records.videos) < len(records)


@pytest.mark.parametrize("name", ["records.json", "records.jsonl"])
@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"video": "a.mp4"}, "needs a list `conversations`"),
        ([1], "needs a list `conversations`"),
        ({"conversations": [turn("human", "Hello")]}, "nothing to learn"),
        ({"conversations": [turn("gpt", "Hello")]}, "turn 1 answers no question"),
        ({"conversations": [turn("nobody", "Hello")]}, "needs `from`"),
        ({"conversations": [turn("human", " "), turn("gpt", "Hi")]}, "needs `from`"),
        ({"video": 3, "conversations": [turn("human", "Hello"), turn("gpt", "Hi")]}, "`video` must be a path"),
        ({"conversations": [turn("human", "<video> Hello"), turn("gpt", "Hi")]}, "1 <video> placeholders for 0 video"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, name: str, record: object, message: str) -> None:
    path = write(tmp_path / name, [RECORDS[2], record])
    with pytest.raises(ValueError, match=message) as error:
        read_records(path)
    assert f"{path}, line " in str(error.value)


def test_the_line_is_right(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(RECORDS[2]) + "\n\n{broken\n")
    with pytest.raises(ValueError, match=r"r\.jsonl, line 3: not JSON"):
        read_records(path)
    path = tmp_path / "r.json"
    path.write_text('[\n {"conversations": []}\n]')
    with pytest.raises(ValueError, match=r"r\.json, line 2"):
        read_records(path)
    path.write_text('[\n {"conversations": \n]')
    with pytest.raises(ValueError, match=r"r\.json, line 3: not JSON"):
        read_records(path)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file"):
        read_records(tmp_path / "none.json")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="no record with an answer"):
        read_records(tmp_path / "empty.jsonl")
    (tmp_path / "dict.json").write_text("{}")
    with pytest.raises(ValueError, match="must be a JSON array"):
        read_records(tmp_path / "dict.json")
