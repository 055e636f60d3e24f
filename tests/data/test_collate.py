import dataclasses
import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hicom.data.collate import Collator, GroupedSampler, SampleSet, fill_parts
from hicom.data.features import cache_features, read_ahead
from hicom.data.mixture import everything, read_sources
from hicom.data.records import Sample, read_records
from hicom.model.modeling import HIComForConditionalGeneration
from hicom.model.processing import HIComProcessor
from hicom.train.assemble import assemble
from hicom.video import VideoError
from media import write_video
from toy_training import make_config, make_folder, make_records


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("collate"))


@pytest.fixture(scope="module")
def parts(folder: Path) -> tuple[HIComForConditionalGeneration, HIComProcessor]:
    torch.manual_seed(0)
    config = make_config(folder)
    assert config.parts is not None
    model, processor = assemble(config.parts)
    return model.eval(), processor


def test_labels_cover_exactly_the_answer_and_its_end(
    folder: Path, parts: tuple[HIComForConditionalGeneration, HIComProcessor]
) -> None:
    processor = parts[1]
    samples = [(i, sample) for i, sample in enumerate(read_records(folder / "records.jsonl"))]
    batch = Collator(processor=processor, num_frames=4)(samples[:6])
    for row, (_, sample) in zip(batch["labels"], samples, strict=False):
        assert processor.tokenizer.decode(row[row != -100]).split() == [*sample.answer.split(), "<|im_end|>"]
    learnt = batch["labels"] != -100
    assert (batch["labels"][learnt] == batch["input_ids"][learnt]).all()


def test_only_the_last_answer_of_a_conversation_is_learnt(
    parts: tuple[HIComForConditionalGeneration, HIComProcessor],
) -> None:
    processor = parts[1]
    messages = (
        {"role": "user", "content": "is there a dog ?"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "which way does it go ?"},
    )
    row = Collator(processor=processor)([(0, Sample(messages, "it moves left"))])["labels"][0]
    assert processor.tokenizer.decode(row[row != -100]).split() == ["it", "moves", "left", "<|im_end|>"]


def test_the_prompt_is_that_of_inference(
    folder: Path, parts: tuple[HIComForConditionalGeneration, HIComProcessor]
) -> None:
    processor = parts[1]
    sample = read_records(folder / "records.jsonl")[0]
    batch = Collator(processor=processor, num_frames=4, windows=((1, 2, 2),))([(0, sample)])
    asked = processor.apply_chat_template(
        [
            {
                "role": "user",
                "content": [
                    {"type": "video", "video": sample.videos[0]},
                    {"type": "text", "text": "which way does the cat go ?"},
                ],
            }
        ],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        num_frames=4,
        window=(1, 2, 2),
    )
    length = asked["input_ids"].shape[1]
    assert batch["window"] == (1, 2, 2)
    assert torch.equal(batch["input_ids"][:, :length], asked["input_ids"])
    assert torch.equal(batch["instruction_input_ids"], asked["instruction_input_ids"])
    assert torch.equal(batch["pixel_values_videos"], asked["pixel_values_videos"])


@pytest.mark.parametrize("compression", ["conditional", "unguided", "off"])
def test_kept_features_give_the_loss_of_pixels(
    folder: Path, parts: tuple[HIComForConditionalGeneration, HIComProcessor], compression: str
) -> None:
    model, processor = parts
    records = read_records(folder / "records.jsonl")
    videos = [video for sample in records for video in sample.videos]
    store = cache_features(model, processor, videos, folder / "cache", num_frames=4, batch_frames=8)
    items = [(i, records[i]) for i in range(5)]
    plain = Collator(processor=processor, num_frames=4, compression=compression)  # type: ignore[arg-type]
    kept = dataclasses.replace(plain, store=store)
    with torch.no_grad():
        loss_pixels, loss_kept = (model(**collator(items)).loss for collator in (plain, kept))
    # float16 keeps 11 bits.
    torch.testing.assert_close(loss_kept, loss_pixels, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("compression", ["conditional", "unguided", "off"])
def test_a_video_shared_by_questions_is_passed_once_and_gives_the_same_loss(
    folder: Path, parts: tuple[HIComForConditionalGeneration, HIComProcessor], compression: str
) -> None:
    model, processor = parts
    records = read_records(folder / "records.jsonl")
    samples = [records[0], dataclasses.replace(records[1], videos=records[0].videos), records[2], records[3]]
    store = cache_features(model, processor, [v for s in samples for v in s.videos], folder / "cache", num_frames=4)
    collator = Collator(processor=processor, num_frames=4, store=store, compression=compression)  # type: ignore[arg-type]
    batch = collator(list(enumerate(samples)))
    assert batch["video_index"].tolist() == [0, 0, 1, 2]
    assert len(batch["video_num_frames"]) == 3
    assert len(batch["video_values"]) == batch["video_num_frames"].sum() == 12
    apart = batch | {"video_num_frames": batch["video_num_frames"][batch["video_index"]]}
    del apart["video_index"]
    for name in ("video_values", "video_keys"):
        if name in batch:
            apart[name] = torch.cat([batch[name].split(4)[video] for video in batch["video_index"]])
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).loss, model(**apart).loss)


def test_parts_of_a_video_are_videos_of_their_own(
    folder: Path, parts: tuple[HIComForConditionalGeneration, HIComProcessor], tmp_path: Path
) -> None:
    """From pixels and from kept features; a file that changes is encoded again for all its parts."""
    model, processor = parts
    write_video(tmp_path / "a.mp4", 30, width=32, height=32)
    sample = read_records(folder / "records.jsonl")[0]
    samples = [dataclasses.replace(sample, videos=(tmp_path / f"a.mp4{part}",)) for part in ("#t=0.5,0.8", "#t=0,0.3")]
    plain = Collator(processor=processor, num_frames=4)
    pixels = plain(list(enumerate(samples)))["pixel_values_videos"]
    for number, bounds in enumerate(((0.5, 0.8), (0.0, 0.3))):
        expected = processor.read_video(tmp_path / "a.mp4", num_frames=4, start_s=bounds[0], end_s=bounds[1])
        assert torch.equal(pixels[4 * number : 4 * number + 4], processor.pixel_values(expected.frames))
    videos = [video for each in samples for video in each.videos]
    store = cache_features(model, processor, videos, tmp_path / "cache", num_frames=4)
    batch = list(enumerate(samples))
    with torch.no_grad():
        loss, kept = (model(**each(batch)).loss for each in (plain, dataclasses.replace(plain, store=store)))
    torch.testing.assert_close(kept, loss, rtol=1e-3, atol=1e-3)
    assert all(video in store for video in videos)
    write_video(tmp_path / "a.mp4", 60, width=32, height=32)
    assert not any(video in store for video in videos)


def test_windows_depend_on_the_samples_alone(
    folder: Path, parts: tuple[HIComForConditionalGeneration, HIComProcessor]
) -> None:
    windows = ((1, 2, 2), (2, 2, 2), (4, 4, 4))
    samples = list(enumerate(read_records(folder / "records.jsonl")))

    def draw(seed: int) -> list[object]:
        collator = Collator(processor=parts[1], num_frames=4, windows=windows, seed=seed)
        return [collator([samples[i]])["window"] for i in range(8)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert set(draw(1)) | set(draw(2)) == set(windows)


def test_interrupted_and_changed_features_are_completed(
    folder: Path, parts: tuple[HIComForConditionalGeneration, HIComProcessor], tmp_path: Path
) -> None:
    model, processor = parts
    make_records(tmp_path)
    videos = [tmp_path / f"{i}.mp4" for i in range(6)]
    store = cache_features(model, processor, videos[:4], tmp_path / "cache", num_frames=4)
    # As a kill leaves it: features without a line, and half a line.
    with (store.folder / "values.bin").open("ab") as file:
        file.write(b"half")
    with (store.folder / "index.jsonl").open("a") as file:
        file.write('{"video": "')
    whole = cache_features(model, processor, videos, tmp_path / "cache", num_frames=4)
    fresh = cache_features(model, processor, videos, tmp_path / "other", num_frames=4)
    assert whole.folder == store.folder
    for name in ("values", "keys"):
        torch.testing.assert_close(whole.read(videos, name), fresh.read(videos, name), rtol=0, atol=2e-3)  # type: ignore[arg-type]
    (tmp_path / "0.mp4").write_bytes((tmp_path / "1.mp4").read_bytes())
    again = cache_features(model, processor, videos, tmp_path / "cache", num_frames=4)
    torch.testing.assert_close(again.read(videos[:1], "values"), again.read(videos[1:2], "values"), rtol=0, atol=2e-3)
    assert cache_features(model, processor, videos, tmp_path / "cache", num_frames=2).folder != store.folder


def test_an_unreadable_video_stops_or_is_left_out_by_name(
    folder: Path,
    parts: tuple[HIComForConditionalGeneration, HIComProcessor],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, processor = parts
    records = read_records(make_records(tmp_path, 4))
    (tmp_path / "2.mp4").write_text("no video")
    videos = [video for sample in records for video in sample.videos]
    with pytest.raises(ValueError, match=r"2\.mp4.*on_bad_video='skip'"):
        cache_features(model, processor, videos, tmp_path / "cache", num_frames=4)
    with caplog.at_level(logging.WARNING):
        store = cache_features(model, processor, videos, tmp_path / "cache", num_frames=4, on_bad_video="skip")
    assert "1 of 4 videos cannot be read" in caplog.text
    assert "2.mp4" in caplog.text
    samples = SampleSet([everything(records)], store)
    assert [samples[i][1].metadata["id"] for i in range(len(samples))] == [0, 1, 3]


def test_videos_are_read_ahead_in_order_and_not_all_at_once(
    folder: Path, parts: tuple[HIComForConditionalGeneration, HIComProcessor], tmp_path: Path
) -> None:
    processor = parts[1]
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    good = [video for sample in read_records(folder / "records.jsonl") for video in sample.videos]
    good = list(dict.fromkeys(good))[:4]
    videos = [good[0], broken, *good[1:]] * 3
    started: list[Path] = []

    def count() -> Iterator[Path]:
        for video in videos:
            started.append(video)
            yield video

    for number, (video, pixels) in enumerate(read_ahead(processor, count(), 2, ahead=3)):
        assert video == videos[number]
        assert len(started) <= number + 4
        if video == broken:
            assert isinstance(pixels, VideoError)
        else:
            expected = processor.pixel_values(processor.read_video(video, num_frames=2).frames)
            assert isinstance(pixels, torch.Tensor)
            assert torch.equal(pixels, expected)
    assert number + 1 == len(videos)


def test_loss_of_the_last_places_is_the_whole_loss(tmp_path: Path) -> None:
    """Answers stand at the end, so logits before them are not computed; the loss is the same."""
    folder = make_folder(tmp_path)
    parts = make_config(folder).parts
    assert parts is not None
    model, processor = assemble(parts)
    samples = SampleSet(read_sources([folder / "records.jsonl"]))
    batch = Collator(processor=processor, num_frames=4)([samples[i] for i in range(3)])
    keep = batch.pop("logits_to_keep")
    whole, last = model(**batch), model(**batch, logits_to_keep=keep)
    assert last.logits.shape[1] == keep < whole.logits.shape[1]
    assert not (batch["labels"][:, : 1 - keep] != -100).any()
    torch.testing.assert_close(last.loss, whole.loss)


def test_batches_are_of_about_one_length_and_hold_every_sample_once() -> None:
    lengths = [(7919 * i) % 100 for i in range(1003)]
    sampler = GroupedSampler(lengths, 10, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(1003))
    spreads = [max(x) - min(x) for x in ([lengths[i] for i in order[b : b + 10]] for b in range(0, 1000, 10))]
    assert sum(spreads) / len(spreads) < 10
    assert list(sampler) == order
    sampler.set_epoch(1)
    assert list(sampler) != order


@pytest.mark.parametrize("by_length", [True, False])
def test_samples_of_a_video_come_together(by_length: bool) -> None:
    """All of them, once each; groups of four, but for what a video has left over and what the end of a batch cuts."""
    videos = [i % 150 for i in range(1003)]
    lengths = [(7919 * i) % 100 for i in range(1003)] if by_length else None
    sampler = GroupedSampler(lengths, 16, seed=3, videos=videos, per_video=4)
    order = list(sampler)
    assert len(sampler) == len(order)
    assert sorted(order) == list(range(1003))
    shown = [len({videos[i] for i in order[b : b + 16]}) for b in range(0, 1000, 16)]
    assert sum(shown) / len(shown) < 16 * 0.45
    assert list(sampler) == order
    sampler.set_epoch(1)
    again = list(sampler)
    assert again != order
    if lengths is not None:
        longest = [max(lengths[i] for i in order[b : b + 16]) for b in range(0, 1000, 16)]
        assert min(longest) < 70, "groups of short samples come together"
    # Which four of a video's samples come together changes from epoch to epoch.
    pairs = [{tuple(sorted(x)) for x in itertools.pairwise(o) if videos[x[0]] == videos[x[1]]} for o in (order, again)]
    assert len(pairs[0] & pairs[1]) < 0.8 * len(pairs[0])


def parts_of(order: list[int], size: int) -> list[list[int]]:
    return [order[i : i + size] for i in range(0, len(order), size)]


@pytest.mark.parametrize(("size", "by_length"), [(16, False), (16, True), (8, False), (2, False)])
def test_turns_of_a_record_come_in_one_part(size: int, by_length: bool) -> None:
    """How often a video is read in an epoch: at random nearly once a turn, together little more than once."""
    turns = [record for record in range(400) for _ in range(1 + record % 5)]
    lengths = [(7919 * i) % 100 for i in range(len(turns))] if by_length else None
    options = {"videos": turns, "per_video": size, "part": size}
    sampler = GroupedSampler(lengths, 4 * size, seed=3, **options)  # of four devices
    order = list(sampler)
    assert sorted(order) == list(range(len(turns)))

    def reads(order: list[int]) -> int:
        return sum(len({turns[i] for i in part}) for part in parts_of(order, size))

    least = sum(-(-(1 + record % 5) // size) for record in range(400))
    at_random = reads(torch.randperm(len(turns), generator=torch.Generator().manual_seed(0)).tolist())
    assert at_random > (1.8 if size > 2 else 1.6) * least
    assert reads(order) < {16: 1.06, 8: 1.12, 2: 1.2}[size] * least
    assert list(sampler) == order
    sampler.set_epoch(1)
    assert list(sampler) != order


@pytest.mark.parametrize(("size", "times"), [(16, 1.125), (8, 1.25), (2, 2.0)])
def test_how_often_docs_training_says_a_video_of_three_turns_is_read(size: int, times: float) -> None:
    turns = [record for record in range(640) for _ in range(3)]
    order = list(GroupedSampler(None, 8 * size, seed=0, videos=turns, per_video=size, part=size))
    reads = sum(len({turns[i] for i in part}) for part in parts_of(order, size))
    assert reads / 640 == pytest.approx(times, abs=0.01)


def test_a_group_that_must_be_cut_is_cut_at_the_border() -> None:
    groups = [[0, 1, 2], [3, 4, 5], [6, 7], [8]]
    assert fill_parts(groups, 4, look=32) == [[0, 1, 2], [8], [3, 4, 5], [6], [7]]
    assert fill_parts(groups, 4, look=1) == [[0, 1, 2], [3], [4, 5], [6, 7], [8]]
    assert fill_parts([[0, 1, 2, 3, 4]], 2, look=4) == [[0, 1], [2, 3], [4]]


def test_a_video_of_several_turns_is_read_and_encoded_once(
    folder: Path, parts: tuple[HIComForConditionalGeneration, HIComProcessor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of three turns about one video, one about another: two are decoded, and the loss is that of four."""
    model, processor = parts
    records = read_records(folder / "records.jsonl")
    samples = [records[0], *(dataclasses.replace(records[i], videos=records[0].videos) for i in (1, 2)), records[3]]
    read: list[str] = []
    read_video = HIComProcessor.read_video

    def counted(self: HIComProcessor, source: object, **choice: object) -> object:
        read.append(str(source))
        return read_video(self, source, **choice)

    monkeypatch.setattr(HIComProcessor, "read_video", counted)
    collator = Collator(processor=processor, num_frames=4)
    batch = collator(list(enumerate(samples)))
    assert [Path(path).name for path in read] == ["0.mp4", "3.mp4"]
    assert batch["pixel_values_videos"].shape[0] == 8
    assert batch["video_index"].tolist() == [0, 0, 0, 1]
    encoded: list[int] = []
    encode_frames = type(model.model).encode_frames
    monkeypatch.setattr(
        type(model.model), "encode_frames", lambda self, x: (encoded.append(len(x)), encode_frames(self, x))[1]
    )
    with torch.no_grad():
        together = model(**batch)
        assert encoded == [8]
        alone = [collator([(i, sample)]) for i, sample in enumerate(samples)]
        counts = [int((each["labels"] != -100).sum()) for each in alone]
        losses = [float(model(**each).loss) for each in alone]
    mean = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert float(together.loss) == pytest.approx(mean, rel=1e-4)


def test_a_record_that_is_repeated_is_another_one(folder: Path, tmp_path: Path) -> None:
    turns = [{"from": who, "value": "yes"} for who in ("human", "gpt", "human", "gpt")]
    (tmp_path / "turns.json").write_text(json.dumps([{"conversations": turns}, {"conversations": turns[:2]}]))
    (tmp_path / "mixture.yaml").write_text("datasets:\n  - {path: turns.json, weight: 2}\n  - {path: turns.json}\n")
    found = SampleSet(read_sources([tmp_path / "mixture.yaml"])).turns()
    assert found == [(0, 0, 0), (0, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 1), (0, 1, 1), (1, 0, 0), (1, 0, 0), (1, 1, 0)]
