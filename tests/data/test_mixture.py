"""Mixtures, skip lists, and what training makes of them."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import datasets
import pytest

from hicom.data.check import check_data
from hicom.data.collate import SampleSet
from hicom.data.mixture import SkipList, Source, not_skipped, read_mixture, read_skip_list, read_sources


def write_records(path: Path, names: Sequence[str], turns: int = 1) -> Path:
    """Write a record for every name, with as many questions as `turns`."""
    lines = []
    for name in names:
        talk = [{"from": who, "value": f"{name} {i}"} for i in range(turns) for who in ("human", "gpt")]
        lines.append(json.dumps({"video": f"{name}.mp4", "conversations": talk}))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_mixture(folder: Path, text: str) -> Path:
    path = folder / "mixture.yaml"
    path.write_text(text)
    return path


def answers(selection: Sequence[object]) -> list[str]:
    return [sample.answer for sample in selection]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ("all", "abcdefghij"),
        ("first:3", "abc"),
        ("end:2", "ij"),
        ("first:25%", "abc"),
        ("end:10%", "j"),
        ("first:100%", "abcdefghij"),
    ],
)
def test_sampling(tmp_path: Path, sampling: str, expected: str) -> None:
    write_records(tmp_path / "r.jsonl", "abcdefghij", turns=2)
    (selection,) = read_mixture(write_mixture(tmp_path, f"datasets: [{{path: r.jsonl, sampling: '{sampling}'}}]"))
    assert answers(selection) == [f"{name} {i}" for name in expected for i in range(2)]
    assert [video.stem for video in selection.videos] == list(expected)


@pytest.mark.parametrize("sampling", ["random:4", "random:40%", "40%", "random: 4"])
def test_random_sampling_depends_on_the_seed_alone(tmp_path: Path, sampling: str) -> None:
    write_records(tmp_path / "r.jsonl", "abcdefghij")
    drawn = []
    for seed in (0, 0, 1, 2, 3):
        path = write_mixture(tmp_path, f"seed: {seed}\ndatasets: [{{path: r.jsonl, sampling: '{sampling}'}}]")
        (selection,) = read_mixture(path)
        assert len(set(answers(selection))) == len(selection) == 4
        drawn.append(tuple(answers(selection)))
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1


@pytest.mark.parametrize(("weight", "most", "number"), [(2, 2, 8), (2.5, 3, 10), (0.5, 1, 2), (0.01, 1, 1)])
def test_weights_repeat_whole_records(tmp_path: Path, weight: float, most: int, number: int) -> None:
    write_records(tmp_path / "r.jsonl", "abcd", turns=2)
    (selection,) = read_mixture(write_mixture(tmp_path, f"datasets: [{{path: r.jsonl, weight: {weight}}}]"))
    counts = Counter(answers(selection))
    assert counts.total() == 2 * number
    assert max(counts.values()) == most
    assert all(counts[f"{name} 0"] == counts[f"{name} 1"] for name in "abcd")


def test_paths_roots_and_old_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    write_records(tmp_path / "sub" / "r.jsonl", "ab")
    write_records(tmp_path / "s.jsonl", "c")
    monkeypatch.setenv("CLIPS", str(tmp_path / "clips"))
    first, second = read_mixture(
        write_mixture(
            tmp_path,
            "datasets:\n"
            "  - {json_path: sub/r.jsonl, data_root: videos, sampling_strategy: 'first:1'}\n"
            "  - {path: s.jsonl, root: $CLIPS}\n",
        )
    )
    assert first[0].videos == (tmp_path / "videos" / "a.mp4",)
    assert second[0].videos == (tmp_path / "clips" / "c.mp4",)
    both = read_sources([tmp_path / "mixture.yaml", tmp_path / "s.jsonl"], root="elsewhere")
    assert [len(each) for each in both] == [1, 1, 1]
    assert both[2][0].videos == (Path("elsewhere/c.mp4"),)
    samples = SampleSet(both)
    assert [samples[i][1].answer for i in range(3)] == ["a 0", "c 0", "c 0"]
    lengths, videos = samples.lengths_and_videos()
    assert lengths == [len("<video>\nc 0c 0")] * 3
    assert len(set(videos)) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("datasets: []", "needs a list `datasets`"),
        ("- a", "needs a list `datasets`"),
        ("datasets: [", "is not YAML"),
        ("datasets: [a.jsonl]", "entry 1 must have fields such as `path`"),
        ("datasets: [{pth: r.jsonl}]", "unknown field 'pth'; did you mean 'path'"),
        ("dataset: [{path: r.jsonl}]", "needs a list `datasets`"),
        ("datasets: [{path: r.jsonl}]\nsede: 1", "unknown field 'sede'; did you mean 'seed'"),
        ("datasets: [{path: r.jsonl}]\nseed: x", "seed: 'x' is not a whole number"),
        ("datasets: [{path: r.jsonl, json_path: r.jsonl}]", "one field has two names"),
        ("datasets: [{root: a}]", "give either `path`"),
        ("datasets: [{path: r.jsonl, dataset: a/b}]", "give either `path`"),
        ("datasets: [{path: none.jsonl}]", "there is no file"),
        ("datasets: [{path: r.jsonl, root: 3}]", "root: 3 must be a text"),
        ("datasets: [{path: r.jsonl, weight: 0}]", "weight: 0 must be a number above 0"),
        ("datasets: [{path: r.jsonl, weight: -1}]", "weight: -1 must be"),
        ("datasets: [{path: r.jsonl, weight: .nan}]", "weight: nan must be"),
        ("datasets: [{path: r.jsonl, weight: many}]", "weight: 'many' must be"),
        ("datasets: [{path: r.jsonl, sampling: some}]", "entry 1: sampling: 'some' is not all, first:N"),
        ("datasets: [{path: r.jsonl, sampling: '5'}]", "sampling: '5' is not all"),
        ("datasets: [{path: r.jsonl, sampling: 'first:1.5'}]", "must be a whole number"),
        ("datasets: [{path: r.jsonl, sampling: 'first:5'}]", "'first:5' of 4 records; weight repeats"),
        ("datasets: [{path: r.jsonl, sampling: '150%'}]", "more than 100%"),
        ("datasets: [{path: r.jsonl, sampling: 'first:0'}]", "leaves none"),
    ],
)
def test_wrong_mixtures(tmp_path: Path, text: str, message: str) -> None:
    write_records(tmp_path / "r.jsonl", "abcd")
    with pytest.raises(ValueError, match=message):
        read_mixture(write_mixture(tmp_path, text))


def test_a_mixture_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no mixture"):
        read_mixture(tmp_path / "none.yaml")


@pytest.mark.parametrize("form", ["saved", "parquet", "jsonl"])
def test_hugging_face_datasets(tmp_path: Path, form: str) -> None:
    talk = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A dog."}]
    rows = datasets.Dataset.from_list([{"video": f"{i}.mp4", "conversations": talk, "id": i} for i in range(6)])
    place = tmp_path / "data"
    if form == "saved":
        rows.save_to_disk(str(place))
    elif form == "parquet":
        rows.to_parquet(place / "train.parquet")
    else:
        rows.to_json(place / "train.jsonl")
    (selection,) = read_mixture(write_mixture(tmp_path, "datasets: [{dataset: data, root: clips, sampling: 'end:2'}]"))
    assert [sample.metadata["id"] for sample in selection] == [4, 5]
    assert selection[0].videos == (tmp_path / "clips" / "4.mp4",)
    if form != "saved":
        with pytest.raises(ValueError, match="entry 1: dataset data"):
            read_mixture(write_mixture(tmp_path, "datasets: [{dataset: data, split: nothing}]"))


def test_skip_lists(tmp_path: Path) -> None:
    path = write_records(tmp_path / "r.jsonl", "abcd", turns=2)
    sources = read_sources([path])
    listed = tmp_path / "skip.jsonl"
    listed.write_text('{"file": "r.jsonl", "line": 2, "reason": "why not"}\n\n{"media": "d.mp4"}\n')
    (kept,) = (not_skipped(each, read_skip_list(listed)) for each in sources)
    assert answers(kept) == ["a 0", "a 1", "c 0", "c 1"]
    listed.write_text("")
    assert not_skipped(sources[0], read_skip_list(listed)) is sources[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "line 1: not JSON"), ("3", "needs `media`"), ('{"file": "r.jsonl"}', "needs `media`, or `file` and `line`")],
)
def test_wrong_skip_lists(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "skip.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_skip_list(tmp_path / "skip.jsonl")
    with pytest.raises(ValueError, match="there is no skip list"):
        read_skip_list(tmp_path / "none.jsonl")


def test_a_listed_record_that_is_malformed_is_no_error(tmp_path: Path) -> None:
    """A skip list is enough to train on a file with malformed records; those that it does not name stay errors."""
    path = write_records(tmp_path / "r.jsonl", "abc")
    with path.open("a") as file:
        file.write('{"video": "d.mp4"}\n{"video": "e.mp4"}\n')
    (tmp_path / "skip.jsonl").write_text('{"file": "r.jsonl", "line": 4}\n{"file": "r.jsonl", "line": 2}\n')
    skip = read_skip_list(tmp_path / "skip.jsonl")
    with pytest.raises(ValueError, match=r"r\.jsonl, line 5"):
        read_sources([path], skip=skip)
    with (tmp_path / "skip.jsonl").open("a") as file:
        file.write('{"file": "r.jsonl", "line": 5}\n')
    skip = read_skip_list(tmp_path / "skip.jsonl")
    mixture = write_mixture(tmp_path, "datasets: [{path: r.jsonl}]")
    for sources in (read_sources([path], skip=skip), read_sources([mixture], skip=skip)):
        assert [error.number for error in sources[0].records.errors] == [4, 5]
        assert answers(not_skipped(sources[0], skip)) == ["a 0", "c 0"]


def test_rows_of_datasets_can_be_listed(tmp_path: Path) -> None:
    good = {"video": "a.mp4", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    bad = good | {"conversations": good["conversations"][:1]}
    for folder in ("one", "two"):
        datasets.Dataset.from_list([good, bad, good]).save_to_disk(str(tmp_path / folder))
    mixture = write_mixture(tmp_path, "datasets: [{dataset: one}, {dataset: two}]")
    check_data(read_sources([mixture], on_bad="skip")).write_skip_list(tmp_path / "skip.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "skip.jsonl").read_text().splitlines()]
    assert [(line["dataset"], line["row"]) for line in lines if "row" in line] == [("one", 1), ("two", 1)]
    (tmp_path / "skip.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [*lines, {"dataset": "two", "row": 2}] if "row" in line)
    )
    skip = read_skip_list(tmp_path / "skip.jsonl")
    mixed = SkipList(skip.lines | {(tmp_path / "r.jsonl", 3)}, frozenset({tmp_path / "a.mp4"}))
    (tmp_path / "again.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in mixed.entries()))
    assert read_skip_list(tmp_path / "again.jsonl") == mixed
    one, two = (not_skipped(source, skip) for source in read_sources([mixture], skip=skip))
    assert (len(one), len(two)) == (2, 1)


def test_configurations_and_splits_of_a_dataset_are_told_apart() -> None:
    called = [Source(dataset="a/b", **more).called for more in ({}, {"config": "c"}, {"config": "c", "split": "d"})]
    assert called == ["a/b", "a/b:c", "a/b:c:d"]


def test_a_variable_that_is_not_set_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HICOM_DATA", raising=False)
    with pytest.raises(ValueError, match=r"\$HICOM_DATA/r\.jsonl: \$HICOM_DATA is not set"):
        read_mixture(write_mixture(tmp_path, "datasets: [{path: $HICOM_DATA/r.jsonl}]"))


def test_a_listed_file_is_listed_with_all_its_parts(tmp_path: Path) -> None:
    write_records(tmp_path / "r.jsonl", ["a"])
    text = (tmp_path / "r.jsonl").read_text()
    (tmp_path / "r.jsonl").write_text(text + text.replace("a.mp4", "a.mp4#t=1,2") + text.replace("a.mp4", "a.mp4#t=3"))
    sources = read_sources([tmp_path / "r.jsonl"])
    for listed, left in (("a.mp4", 0), ("a.mp4#t=1,2", 2)):
        (tmp_path / "skip.jsonl").write_text(json.dumps({"media": listed}))
        assert len(not_skipped(sources[0], read_skip_list(tmp_path / "skip.jsonl"))) == left
