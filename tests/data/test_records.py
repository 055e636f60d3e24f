import json
import tracemalloc
from pathlib import Path

import pytest

import hicom.data.records
from hicom.data.records import RowRecords, read_records


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
    assert [records.first_of_group(g).videos for g in records.groups] == [sample.videos for sample in records]
    assert records.num_groups == 3
    assert list(records.numbers) == [0, 0, 1, 2, 3, 3, 4, 5]
    assert records.num_records == 6
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
    path.write_text('[\n {"conversations": [\n{"from": "human", "value": "a"}')
    with pytest.raises(ValueError, match=r"r\.json, line 3: not JSON"):
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


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_an_array_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, mark: str) -> None:
    path = write(tmp_path / "r.json", [*RECORDS, {"id": '🐕 \\ " ]', "n": 1.5e3, "ok": True, **RECORDS[2]}])  # type: ignore[dict-item]
    path.write_text(mark + path.read_text("utf-8"), "utf-8")
    whole = list(read_records(path))
    monkeypatch.setattr(hicom.data.records, "CHUNK", chunk)
    assert list(read_records(path)) == whole
    assert whole[-1].metadata == {"id": '🐕 \\ " ]', "n": 1500.0, "ok": True}


@pytest.mark.parametrize("end", ["", ",", "  \n"])
def test_an_array_that_was_cut_off(tmp_path: Path, end: str) -> None:
    path = tmp_path / "r.json"
    path.write_text("[\n" + json.dumps(RECORDS[2]) + end)
    with pytest.raises(ValueError, match=r"r\.json, line [23]: the file ends inside the array; it was cut off"):
        read_records(path)


def test_what_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(b'[{"a": "' + b"x" * 100 + b"\xff" + b"x" * 100)
    with pytest.raises(ValueError, match="not UTF-8"):
        read_records(path)


def test_a_million_records_are_not_held_in_memory(tmp_path: Path) -> None:
    """Of 4,000 records here: a sixth of their bytes."""
    path = tmp_path / "r.jsonl"
    record = {"conversations": [turn("human", "<video> What moves? " + "x" * 500), turn("gpt", "A dog.")]}
    with path.open("w") as file:
        for number in range(4_000):
            file.write(json.dumps({"video": f"folder/of/clips/clip_{number:09}.mp4", **record}) + "\n")
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    records = read_records(path)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(records) == records.num_groups == 4_000
    assert (after - before) / len(records) < 100


@pytest.mark.parametrize("name", ["records.json", "records.jsonl"])
def test_bad_records_are_left_out_where_asked_for(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [RECORDS[2], {"video": "a.mp4"}, RECORDS[1], 3])
    records = read_records(path, on_bad="skip")
    assert [sample.answer for sample in records] == ["4", "Same."]
    assert records[1].images == (tmp_path / "b.png", tmp_path / "c.png")
    assert len(records.errors) == 2
    assert all(f"{path}, line {error.number}: " in error.message for error in records.errors)
    with pytest.raises(ValueError, match=r"no record with an answer \(1 were left out; the first: .* line [12]"):
        read_records(write(tmp_path / f"bad_{name}", [{"video": "a.mp4"}]), on_bad="skip")


def test_videos_that_are_called_images(tmp_path: Path) -> None:
    """LLaVA-NeXT's data for videos has `<image>`."""
    records = [
        {"video": "a.mp4", "conversations": [turn("human", "<image>\nWhat?"), turn("gpt", "Yes.")]},
        {"video": ["a.mp4", "b.mp4"], "conversations": [turn("human", "<image><image>\nWhat?"), turn("gpt", "Yes.")]},
    ]
    one, two = read_records(write(tmp_path / "r.jsonl", records))
    assert (one.messages[0]["content"], len(one.videos)) == ("<video>\nWhat?", 1)
    assert (two.messages[0]["content"], len(two.videos)) == ("<video><video>\nWhat?", 2)
    mixed = {
        "video": "a.mp4",
        "image": "b.png",
        "conversations": [turn("human", "<image><video>"), turn("gpt", "Yes.")],
    }
    (sample,) = read_records(write(tmp_path / "m.jsonl", [mixed]))
    assert (sample.messages[0]["content"], len(sample.images)) == ("<image><video>", 1)


def test_messages_with_parts_and_lists_of_files(tmp_path: Path) -> None:
    def message(role: str, content: object) -> dict[str, object]:
        return {"role": role, "content": content}

    parts = [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "What moves?"}]
    bare = [{"type": "video"}, {"type": "text", "text": "And here?"}]
    answer = message("assistant", [{"type": "text", "text": "A dog."}])
    records = [
        {"messages": [message("user", parts), answer]},
        {"messages": [message("user", bare), answer], "videos": ["b.mp4"]},
        {"messages": [message("user", "<image>What?"), answer], "images": ["c.png"], "videos": []},
    ]
    inline, listed, image = read_records(write(tmp_path / "r.jsonl", records), "media")
    assert (inline.messages[0]["content"], inline.videos) == ("<video>\nWhat moves?", (Path("media/a.mp4"),))
    assert (listed.messages[0]["content"], listed.videos) == ("<video>\nAnd here?", (Path("media/b.mp4"),))
    assert (image.images, image.answer) == ((Path("media/c.png"),), "A dog.")
    twice = {"messages": [message("user", parts), answer], "video": "a.mp4"}
    with pytest.raises(ValueError, match="named in `video` and in its parts; name them once"):
        read_records(write(tmp_path / "t.jsonl", [twice]))
    with pytest.raises(ValueError, match="a part needs a `type`"):
        read_records(write(tmp_path / "p.jsonl", [{"messages": [message("user", [{"type": "audio"}]), answer]}]))


def test_rows_of_a_table() -> None:
    rows = [
        {"video": {"path": "a.mp4", "bytes": None}, "conversations": [turn("human", "What?"), turn("gpt", "A dog.")]},
        {"video": None, "conversations": [turn("human", "2 + 2?"), turn("gpt", "4")]},
        {"video": {"path": None, "bytes": b"..."}, "conversations": [turn("human", "What?"), turn("gpt", "A dog.")]},
    ]
    first, second = RowRecords(rows[:2], Path("media"), "my/data")
    assert (first.videos, first.source, second.videos) == ((Path("media/a.mp4"),), "my/data, row 0", ())
    with pytest.raises(ValueError, match="my/data, row 2: `video` must be a path"):
        RowRecords(rows, Path("media"), "my/data")
    assert len(RowRecords(rows[::-1], Path(), on_bad="skip")[0].videos) == 0


def said(role: str, content: object) -> dict[str, object]:
    return {"role": role, "content": content}


def test_parts_of_videos(tmp_path: Path) -> None:
    part = {"type": "video", "video": "a.mp4", "video_start": 1.5, "video_end": 4, "fps": None}
    records: list[object] = [
        {"video": "a.mp4#t=5,12", "conversations": [turn("human", "<video> What?"), turn("gpt", "A dog.")]},
        {"messages": [said("user", [part, {"type": "text", "text": "What?"}]), said("assistant", "A dog.")]},
        {"video": "a.mp4", "conversations": [turn("human", "<video> What?"), turn("gpt", "A dog.")]},
    ]
    found = read_records(write(tmp_path / "r.jsonl", records), "media")
    assert [sample.videos for sample in found] == [
        (Path("media/a.mp4#t=5,12"),),
        (Path("media/a.mp4#t=1.5,4"),),
        (Path("media/a.mp4"),),
    ]
    # Parts of one file are videos of their own.
    assert found.num_groups == 3


@pytest.mark.parametrize(
    ("part", "fault"),
    [
        ({"video_start": 4, "video_end": 1.5}, "start_s=4 is not before end_s=1.5"),
        ({"video_start": "4"}, "no numbers of seconds"),
        ({"video_start": True}, "no numbers of seconds"),
        ({"video": None, "video_start": 1}, "bounds are those of a path"),
        ({"max_pixels": 3}, "'max_pixels' is no option of a part"),
    ],
)
def test_wrong_options_of_parts(tmp_path: Path, part: dict[str, object], fault: str) -> None:
    wrong = {"type": "video", "video": "a.mp4"} | part
    record = {"messages": [said("user", [wrong, {"type": "text", "text": "?"}]), said("assistant", "A.")]}
    with pytest.raises(ValueError, match=fault):
        read_records(write(tmp_path / "r.jsonl", [record]))
