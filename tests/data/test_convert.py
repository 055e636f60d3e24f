"""`hicom data convert`: what becomes of miniatures of all published layouts, and the mixtures that name the results."""

import json
import os
import re
import shlex
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

import miniatures
import tiny
from hicom import cli
from hicom.data.collate import IGNORED, Collator
from hicom.data.convert import LAYOUTS, run
from hicom.data.convert.clean import clean
from hicom.data.convert.layout import Draft, LeftOut, Media
from hicom.data.convert.options import choose_class
from hicom.data.convert.run import Report, convert
from hicom.data.mixture import read_sources
from hicom.data.records import parse_record, read_records
from hicom.model.instruction import answer_options, extract_instruction
from hicom.model.processing import HIComProcessor
from hicom.video import read_frames

MIXTURES = Path(__file__).parents[2] / "examples" / "mixtures"
GONE = "a video or image is not there"
MOVED = "placeholders are not as many as files; all stand in front of the first question"
NUMBER = "a number of an answer or question is written as text"

# Records read, written, answered turns; and reasons with their numbers: records and turns left out, changes.
EXPECTED: dict[str, tuple[int, int, int, dict[str, int], dict[str, int], dict[str, int]]] = {
    "llava-pretrain": (5, 3, 3, {GONE: 1, "no answered question: an empty answer": 1}, {}, {}),
    "hicom-248k": (1, 1, 2, {}, {}, {}),
    "llava-video": (
        7,
        6,
        8,
        {GONE: 1},
        {"an answer that is no text": 1, "a question without an answer": 1},
        {MOVED: 1, NUMBER: 1},
    ),
    "videochat2-it": (
        10,
        7,
        9,
        {
            "bounds that are no part of a video": 1,
            "no answered question: an answer that is no text": 1,
            "a record has no list of questions and answers": 1,
        },
        {},
        {"the task instruction of a later question is not used, as in VideoChat2": 1},
    ),
    "m4-instruct": (5, 4, 4, {"a placeholder of a video or image stands in an answer": 1}, {}, {MOVED: 2}),
    "m4-instruct-video": (3, 2, 2, {GONE: 1}, {}, {}),
    "charades": (4, 1, 1, {GONE: 1, "no action is named": 1, "an action is none of the classes": 1}, {}, {}),
    "ntu-rgb-d": (3, 2, 2, {"the name of a clip is not SsssCcccPpppRrrrAaaa": 1}, {}, {}),
    "tvqa": (3, 2, 2, {"the right answer is none of the options": 1}, {}, {}),
    "moments-in-time": (3, 1, 1, {GONE: 1, "a label is none of the classes": 1}, {}, {}),
    "video-chatgpt": (4, 3, 3, {GONE: 1}, {}, {}),
    "sharegpt4video": (2, 1, 1, {"no caption of the whole video": 1}, {}, {}),
    "sharegpt4video-mix": (1, 1, 1, {}, {}, {}),
    "llava-instruct": (3, 2, 3, {"a text says <video>, and no video is shown": 1}, {}, {}),
    "llava": (2, 2, 2, {}, {}, {}),
}


def make(name: str, folder: Path) -> Path:
    src = folder / name
    src.mkdir(parents=True)
    miniatures.MINIATURES[name](src)
    return src


def convert_miniature(name: str, folder: Path, **options: Any) -> tuple[Report, list[dict[str, Any]]]:
    """Make a miniature, convert it, and return the report and the written records."""
    dst = folder / "out" / f"{name}.jsonl"
    report = convert(LAYOUTS[name], make(name, folder), dst, **options)
    return report, [json.loads(line) for line in dst.read_text("utf-8").splitlines()]


def counts(tallies: dict[str, run.Tally]) -> dict[str, int]:
    return {reason: tally.count for reason, tally in tallies.items()}


def test_every_layout_has_a_miniature() -> None:
    assert set(LAYOUTS) == set(miniatures.MINIATURES) == set(EXPECTED)
    assert all(layout.title and layout.__doc__ for layout in LAYOUTS.values())


@pytest.mark.parametrize("name", EXPECTED)
def test_layouts(name: str, tmp_path: Path) -> None:
    report, records = convert_miniature(name, tmp_path)
    found = (report.read, report.written, report.turns)
    assert (*found, *map(counts, (report.left_out, report.turns_left_out, report.changed))) == EXPECTED[name]
    assert sum(report.files.values()) == report.read
    assert len(records) == report.written
    assert report.missing.count == report.left_out.get(GONE, run.Tally()).count
    assert report.repeated == {"llava-pretrain": 1, "llava": 1}.get(name, 0)
    # Training takes all of it, and all media are there.
    samples = read_records(report.dst, report.media)
    assert len(samples) == report.turns
    for sample in samples:
        assert sample.answer
        for file in (*sample.videos, *sample.images):
            assert len(read_frames(file, num_frames=1).frames) == 1
    # What was written and why not can be read later.
    kept = json.loads(report.path.read_text("utf-8"))
    assert (kept["read"], kept["written"]) == (report.read, report.written)
    assert all(tally["examples"] for tally in kept["left_out"].values())
    assert not list(Path(report.dst).parent.glob("*.part"))


def turns(record: dict[str, Any]) -> list[str]:
    return [turn["value"] for turn in record["conversations"]]


def test_captions_keep_their_text_and_their_placeholder(tmp_path: Path) -> None:
    _, records = convert_miniature("llava-pretrain", tmp_path)
    assert turns(records[0]) == ["Describe it.\n<image>", "très joli 日本"]
    assert (records[0]["id"], records[0]["image"]) == ("1", "images/00001/1.jpg")


def test_llava_video(tmp_path: Path) -> None:
    _, records = convert_miniature("llava-video", tmp_path)
    found = {record["id"]: record for record in records}
    assert turns(found["A-2"]) == [f"<video>\n{miniatures.MC}", "A. the wall"]
    assert turns(found["A-0"]) == ["<video>\nWhat?", "A.", "And then?", "B."]
    assert turns(found["A-1"]) == ["<video>\nWhat?", "A.", "How many?", "3"]
    assert found["A"]["video"] == "0_30_s_academic_v0_1/academic_source/Charades/A.mp4"
    assert found["A"]["data_source"] == "0_30_s_academic_v0_1"
    assert found["n"]["video"] == "0_30_s_nextqa/NextQA/1.mp4"
    assert found["h"]["video"] == "llava_hound/train_300k/v_1"


def test_llava_video_as_a_saved_data_set(tmp_path: Path) -> None:
    src = make("llava-video", tmp_path)
    subset = "0_30_s_academic_v0_1"
    rows = json.loads((src / subset / f"{subset}_cap_processed.json").read_text())
    builder = datasets.Dataset.from_list(rows, info=datasets.DatasetInfo(config_name=subset))
    datasets.DatasetDict(caption=builder).save_to_disk(str(src / "saved"))
    report = convert(LAYOUTS["llava-video"], src, tmp_path / "o.jsonl", only=["saved*"])
    (record,) = map(json.loads, (tmp_path / "o.jsonl").read_text().splitlines())
    assert record["video"] == f"{subset}/academic_source/Charades/A.mp4"
    assert turns(record) == ["<video>\nDescribe.", "A wall."]
    assert report.left_out[GONE].examples == [
        f"saved, caption row 1: '{subset}/academic_source/Charades/C.mp4'",
    ]
    # The folder of the data set itself, with the videos elsewhere.
    report = convert(LAYOUTS["llava-video"], src / "saved", tmp_path / "p.jsonl", media=src)
    assert (report.written, (tmp_path / "p.jsonl").read_text()) == (1, (tmp_path / "o.jsonl").read_text())


def test_videochat2(tmp_path: Path) -> None:
    report, records = convert_miniature("videochat2-it", tmp_path)
    assert report.not_read == ["image/caption/coco/train_100k.json"]
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault(record["data_source"], []).append(record)
    (caption,) = found["video/caption/textvr"]
    assert turns(caption) == ["<video>\nDescribe the video.", "A wall.", "Tell it again.", "Red."]
    (choice,) = found["video/reasoning/next_qa"]
    assert [turn["from"] for turn in choice["conversations"]] == ["system", "human", "gpt", "human", "gpt"]
    assert turns(choice)[:3] == [
        "Choose the best option.",
        "<video>\nQuestion: why\nOptions:\n(A) fun\n(B) rain\n(C) sun",
        "Answer: (A) fun",
    ]
    assert extract_instruction(turns(choice)[1]) == "why"
    part, whole = found["video/grounding/didemo"]
    assert (part["video"], whole["video"]) == ("DiDeMo/3.mp4#t=0.1,0.4", "DiDeMo/3.mp4")
    times = read_frames(tmp_path / "videochat2-it" / part["video"]).timestamps_s
    assert 0.06 < times[0] <= 0.1
    assert 0.3 < times[-1] < 0.4
    (image,) = found["image/caption/coco"]
    assert (image["image"], turns(image)) == ("coco_caption/a.jpg", ["<image>\nCaption?", "A."])


def test_a_size_of_a_set_can_be_asked_for(tmp_path: Path) -> None:
    report, records = convert_miniature("videochat2-it", tmp_path, only=["image/*_100k.json"])
    assert (list(report.files), len(records)) == (["image/caption/coco/train_100k.json"], 1)
    with pytest.raises(ValueError, match=r"no file of .* is called nothing; there are video/caption/textvr/train.json"):
        convert(LAYOUTS["videochat2-it"], tmp_path / "videochat2-it", tmp_path / "o.jsonl", only=["nothing"])


def test_placeholders_that_are_not_as_many_as_images(tmp_path: Path) -> None:
    _, records = convert_miniature("m4-instruct", tmp_path)
    texts = {record["sample_id"]: turns(record)[0] for record in records}
    assert texts["equal"] == texts["fewer"] == texts["none"] == "<image><image>\nWhat changed?"
    assert texts["more"].startswith("<image><image>\nImage 1:")
    assert texts["more"].count("<image>") == 2
    assert records[0]["metadata"] == {"dataset": "IEdit", "split": "train"}


@pytest.mark.parametrize(
    ("name", "question"),
    [
        ("charades", "What does the person do in this video?"),
        ("ntu-rgb-d", "Which action does this video show?"),
        ("moments-in-time", "Which action does this video show?"),
        ("tvqa", "Who sits there?"),
    ],
)
def test_questions_of_sets_that_have_labels(name: str, question: str, tmp_path: Path) -> None:
    """The instruction is the bare question; the answer names options by letter and text, and all right ones."""
    _, records = convert_miniature(name, tmp_path)
    for record in records:
        text, answer = turns(record)
        assert extract_instruction(text) == question
        options = answer_options(text)
        assert len(set(options)) == len(options)
        for line in answer.removeprefix("Answer: ").splitlines():
            letter, option = line.split(" ", 1)
            assert options["ABCDEFGHIJ".index(letter[1])] == option
    answers = {record["id"]: turns(record)[1] for record in records}
    if name == "charades":
        assert sorted(line[4:] for line in answers["AAAAA"].splitlines()) == ["Doing thing 3", "Doing thing 7"]
    elif name == "ntu-rgb-d":
        assert answers["S001C001P001R001A010"].endswith(") clapping")
        assert "finger-guessing game" in answers["S001C001P001R001A120"]
    elif name == "tvqa":
        assert answers == {1: "Answer: (C) answer 2", 2: "Answer: (A) answer 0"}
    else:
        assert answers["adult+female+singing/a.mp4"].endswith(") adult female singing")


def test_options_do_not_tell_which_is_right() -> None:
    """The right class stands at every place about as often, and wrong ones are all classes in turn."""
    classes = [f"class {number}" for number in range(20)]
    places, offered = Counter[str](), Counter[str]()
    for number in range(800):
        question, answer = choose_class("What?", ["class 3"], classes, 7, f"clip {number}")
        assert choose_class("What?", ["class 3"], classes, 7, f"clip {number}") == (question, answer)
        places[answer[:3]] += 1
        offered.update(answer_options(question))
    # Each is 100, and 295 of the wrong ones; four standard deviations are 38 and 55.
    assert len(places) == 8
    assert all(62 <= count <= 138 for count in places.values())
    assert offered.pop("class 3") == 800
    assert len(offered) == 19
    assert all(240 <= count <= 350 for count in offered.values())
    # As many right ones as there are letters leave no room for wrong ones; more are no question.
    many = [f"class {number}" for number in range(30)]
    assert choose_class("What?", many[:26], many, 7, "x")[1].count("\n") == 25
    with pytest.raises(LeftOut, match="more right answers than letters"):
        choose_class("What?", many[:27], many, 7, "x")


def test_names_without_suffix(tmp_path: Path) -> None:
    for name, expected in (
        ("m4-instruct-video", ["m4_instruct_videos/v_1.mp4", "train_300k/v_2"]),
        ("video-chatgpt", ["videos/v_1.mp4", "videos/v_1.mp4", "videos/v_2.mkv"]),
    ):
        _, records = convert_miniature(name, tmp_path)
        assert [record["video"] for record in records] == expected


def test_what_is_not_looked_up(tmp_path: Path) -> None:
    report, records = convert_miniature("video-chatgpt", tmp_path, check_media=False)
    assert [record["video"] for record in records] == ["v_1.mp4", "v_1.mp4", "v_2.mp4", "v_3.mp4"]
    assert (report.is_checked, report.missing.count) == (False, 0)


def test_media_elsewhere(tmp_path: Path) -> None:
    src = make("llava-pretrain", tmp_path)
    (src / "images").rename(tmp_path / "pictures")
    with pytest.raises(ValueError, match=r"none of 5 records .* looked for in .*llava-pretrain: name another folder"):
        convert(LAYOUTS["llava-pretrain"], src, tmp_path / "o.jsonl")
    assert not (tmp_path / "o.jsonl").exists()
    report = convert(LAYOUTS["llava-pretrain"], src, tmp_path / "o.jsonl", media=tmp_path / "pictures")
    assert (report.written, report.media) == (3, str(tmp_path / "pictures"))
    assert read_records(tmp_path / "o.jsonl", report.media)[0].images[0].is_file()


def test_the_same_input_makes_the_same_files(tmp_path: Path) -> None:
    report, _ = convert_miniature("charades", tmp_path)
    files = [Path(report.dst), report.path]
    first = [file.read_bytes() for file in files]
    convert(LAYOUTS["charades"], tmp_path / "charades", Path(report.dst))
    assert [file.read_bytes() for file in files] == first


def test_a_file_that_is_cut_off_leaves_the_former_result(tmp_path: Path) -> None:
    report, _ = convert_miniature("llava-video", tmp_path)
    before = Path(report.dst).read_bytes()
    file = tmp_path / "llava-video" / "0_30_s_academic_v0_1" / "0_30_s_academic_v0_1_cap_processed.json"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"cap_processed.json, line 1: "):
        convert(LAYOUTS["llava-video"], tmp_path / "llava-video", Path(report.dst))
    assert Path(report.dst).read_bytes() == before
    assert not list(Path(report.dst).parent.glob("*.part"))


def test_limit(tmp_path: Path) -> None:
    report, records = convert_miniature("llava-video", tmp_path, limit=3)
    assert (report.read, len(records)) == (3, 3)
    whole = convert(LAYOUTS["llava-video"], tmp_path / "llava-video", tmp_path / "all.jsonl")
    assert (tmp_path / "all.jsonl").read_text().startswith(Path(report.dst).read_text())
    assert whole.read == 7


def test_a_file_in_place_of_its_folder(tmp_path: Path) -> None:
    src = make("llava-instruct", tmp_path)
    report = convert(LAYOUTS["llava-instruct"], src / "llava_v1_5_mix665k.json", tmp_path / "o.jsonl")
    assert (report.written, report.media) == (2, str(src))


def test_records_are_not_held_in_memory(tmp_path: Path) -> None:
    """An array of 12 MB in one line."""
    number = 3_000
    with (tmp_path / "mine.json").open("w") as file:
        file.write("[")
        for i in range(number):
            talk = miniatures.talk(f"<video>\nWhat is in video {i}, apart from the wall? {'x' * 4000}", f"A {i}.")
            file.write(("," if i else "") + json.dumps({"id": i, "video": f"{i}.mp4", "conversations": talk}))
        file.write("]")
    assert (tmp_path / "mine.json").stat().st_size > 12_000_000
    convert(LAYOUTS["llava"], tmp_path, tmp_path / "out" / "warm.jsonl", check_media=False, limit=10)
    tracemalloc.start()
    try:
        report = convert(LAYOUTS["llava"], tmp_path, tmp_path / "out" / "o.jsonl", check_media=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (report.written, report.repeated) == (number, 0)
    assert peak < 7_000_000


@pytest.mark.parametrize(("suffix", "is_array"), [(".json", False), (".jsonl", True)])
def test_a_file_is_read_as_what_it_is(suffix: str, is_array: bool, tmp_path: Path) -> None:
    records = [{"conversations": miniatures.talk(f"What is {i}?", "A number.")} for i in range(3)]
    lines = [json.dumps(record, indent=2 if is_array else None) for record in records]
    text = "\ufeff [" + ",\n".join(lines) + "]" if is_array else "\n".join([*lines[:2], "{cut", lines[2]])
    (tmp_path / f"mine{suffix}").write_text(text, "utf-8")
    report = convert(LAYOUTS["llava"], tmp_path, tmp_path / "out" / "o.jsonl")
    assert report.written == 3
    assert [(reason, tally.examples) for reason, tally in report.left_out.items()] == (
        [] if is_array else [("a line is not JSON", ["mine.json, line 3: '{cut'"])]
    )


def test_the_docs_name_every_layout() -> None:
    text = (MIXTURES.parents[1] / "docs" / "data.md").read_text("utf-8")
    for name, layout in LAYOUTS.items():
        assert f"`{name}`" in text
        if name in ("llava-video", "videochat2-it", "sharegpt4video-mix", "ntu-rgb-d", "llava"):
            continue
        assert layout.patterns[0].rpartition("/")[2] in text


VALUES = st.sampled_from(
    ["What?", "<video>\nWhat?", "<image> and <image>", "<video>", "A.", "", " ", "\ud83d", None, 3, 0.5, True, ["A"]]
)
ROLES = st.sampled_from(["human", "gpt", "human", "gpt", "system", "user", "assistant", "tool", None])


@given(
    st.lists(st.tuples(ROLES, VALUES), max_size=6),
    st.lists(st.sampled_from(["video", "image"]), max_size=3),
)
def test_whatever_is_written_can_be_read(talk: list[tuple[Any, Any]], kinds: list[Any]) -> None:
    media = tuple(Media(kind, (f"{number}.x",)) for number, kind in enumerate(kinds))
    try:
        record, found = clean(Draft(talk, media, {"id": 1, "video": "no", "messages": []}), lambda each: each.places[0])
    except LeftOut:
        return
    samples = parse_record(json.dumps(record), Path(), "here")
    said = [value for role, value in talk if role in ("gpt", "assistant")]
    assert 0 < len(samples) <= len(said)
    for sample in samples:
        assert sample.answer in map(str, said)
    # Nothing is lost in silence: every turn is written, or counted.
    pairs = sum(role in ("human", "user", "gpt", "assistant") for role, _ in talk)
    assert 2 * len(samples) + 2 * len(found.dropped) >= pairs
    last = samples[-1]
    assert (len(last.videos), len(last.images)) <= (kinds.count("video"), kinds.count("image"))
    written = sum(text.count(f"<{kind}>") for kind in ("video", "image") for _, text in found.turns)
    assert written == len(kinds)


def hicom(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = cli.main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = make("llava-video", tmp_path)
    code, out, _ = hicom(capsys, "data", "convert", "llava-video", src, tmp_path / "o.jsonl")
    text = " ".join(out.split())
    assert code == 0
    assert "6 of 7 records, 8 answered turns" in text
    assert f"media root: {src}; 1 videos and images are not there" in text
    assert f"left out 1: {GONE} (0_30_s_academic_v0_1/0_30_s_academic_v0_1_cap_processed.json, record 2: " in text
    assert f"changed 1: {NUMBER} (" in text
    assert f"report {tmp_path / 'o.report.json'}" in text
    options = ("--json", "--no-media-check", "--limit", 2)
    code, out, _ = hicom(capsys, "data", "convert", "llava-video", src, tmp_path / "p.jsonl", *options)
    assert (code, json.loads(out)["written"]) == (0, 2)
    code, out, _ = hicom(capsys, "data", "convert", "--list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(LAYOUTS)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("llava-vidoe", "{src}", "o.jsonl"), "unknown data set 'llava-vidoe'; did you mean 'llava-video'?"),
        (("llava-video",), "give NAME SRC DST; `hicom data convert --list` shows the names"),
        ((), "give NAME SRC DST"),
        (("llava-video", "{src}/none", "o.jsonl"), "as downloaded"),
        (("charades", "{src}", "o.jsonl"), "expected Charades_v1_train.csv or Charades/Charades_v1_train.csv in it"),
        (("llava-video", "{src}", "o.json"), "o.json must end with .jsonl"),
        (("llava-video", "{src}", "o.jsonl", "--limit", "0"), "--limit 0: give a positive number"),
        (("llava-video", "{src}", "o.jsonl", "--media", "none"), "there is no folder none with videos and images"),
        (("llava-video", "{src}", "o.jsonl", "--only", "x*"), "is called x*; there are"),
    ],
)
def test_wrong_use(
    args: tuple[str, ...],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    src = make("llava-video", tmp_path)
    monkeypatch.chdir(tmp_path)
    code, _, err = hicom(capsys, "data", "convert", *(arg.format(src=src) for arg in args))
    assert code == 2
    assert message in err
    assert not list(tmp_path.glob("o.*"))


def test_what_is_read_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = make("llava", tmp_path)
    code, _, err = hicom(capsys, "data", "convert", "llava", src, src / "mine.jsonl")
    assert code == 2
    assert "is what is read" in err


def test_what_was_written_beside_the_source_is_not_read(tmp_path: Path) -> None:
    src = make("llava", tmp_path)
    first = convert(LAYOUTS["llava"], src, src / "good.jsonl")
    text = (src / "good.jsonl").read_text()
    again = convert(LAYOUTS["llava"], src, src / "good.jsonl")
    assert (list(again.files), again.written) == (["mine.jsonl"], first.written)
    assert (src / "good.jsonl").read_text() == text


def test_classes_that_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = make("charades", tmp_path)
    (src / "Charades" / "Charades_v1_classes.txt").unlink()
    code, _, err = hicom(capsys, "data", "convert", "charades", src, tmp_path / "o.jsonl")
    assert code == 2
    assert "holds no Charades_v1_classes.txt" in err


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> HIComProcessor:
    return HIComProcessor.from_pretrained(tiny.save(tmp_path_factory.mktemp("model") / "model"))


@pytest.mark.parametrize("name", ["align", "pretrain", "tune", "tune-release"])
def test_example_mixtures_are_made_by_their_own_commands(
    name: str,
    processor: HIComProcessor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The commands in a mixture's comments, run on miniatures, write each file it names, and training takes all."""
    monkeypatch.setenv("HICOM_DATA", str(tmp_path))
    commands = re.findall(r"# hicom (data convert .*)", (MIXTURES / f"{name}.yaml").read_text("utf-8"))
    assert len(commands) == {"align": 1, "pretrain": 1, "tune": 7, "tune-release": 10}[name]
    for command in commands:
        args = shlex.split(os.path.expandvars(command))
        src = Path(args[3])
        if not src.exists():
            src.mkdir(parents=True)
            miniatures.MINIATURES[args[2]](src)
        assert cli.main(args) == 0, capsys.readouterr().err
    sources = read_sources([MIXTURES / f"{name}.yaml"])
    collator = Collator(processor=processor, num_frames=2)
    assert len(sources) == len(commands)
    assert not any(source.records.errors for source in sources)
    for source in sources:
        for sample in source:
            assert sample.answer
            assert extract_instruction(sample.messages[-1]["content"])
            batch = collator([(0, sample)])
            assert (batch["labels"] != IGNORED).any()
            assert len(batch.get("pixel_values_videos", ())) >= len(sample.videos)
            assert len(batch.get("pixel_values", ())) == len(sample.images)
