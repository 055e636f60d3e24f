"""From samples to the tensors that the model takes, by the processor that also serves inference."""

from __future__ import annotations

import random
from array import array
from collections import Counter, deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model.compressor import Compression
from ..model.ops import Window
from ..model.processing import HIComProcessor
from ..video import VideoError, read_frames
from .features import FeatureStore
from .mixture import Selection, SkipList, not_skipped
from .records import PLACEHOLDERS, Sample

IGNORED = -100
"""Label of places without loss."""
CHARACTERS_PER_TOKEN = 4
"""About as many characters of text make one token; a visual token is as long in a batch."""


class SampleSet(torch.utils.data.Dataset[tuple[int, Sample]]):
    """All samples of several sources one after the other, with their numbers, less those of videos without features."""

    def __init__(self, sources: Sequence[Selection], store: FeatureStore | None = None) -> None:
        self.records = [source.records for source in sources]
        self._sources, self._indices = array("l"), array("q")
        for number, source in enumerate(sources):
            records, indices = source.records, source.indices
            if store is not None and store.errors:
                is_there = [
                    all(video in store for video in records.first_of_group(group).videos)
                    for group in range(records.num_groups)
                ]
                indices = array("q", (index for index in indices if is_there[records.groups[index]]))
            self._indices.extend(indices)
            self._sources.extend([number] * len(indices))

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[int, Sample]:
        return index, self.records[self._sources[index]][self._indices[index]]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of media that the records show, also those of which no sample was chosen."""
        return tuple(kind for kind in PLACEHOLDERS if any(any(records.num_media[kind]) for records in self.records))

    def lengths_and_videos(self, *, video: int = 0, image: int = 0) -> tuple[list[int], list[tuple[int, int]]]:
        """Return about how long every sample is, in characters, and numbers that tell its videos from others.

        Args:
            video: visual tokens of a video.
            image: visual tokens of an image.
        """
        places = [(self.records[source], source, i) for source, i in zip(self._sources, self._indices, strict=True)]
        lengths = []
        for records, _, i in places:
            group = records.groups[i]
            tokens = video * records.num_media["video"][group] + image * records.num_media["image"][group]
            lengths.append(records.lengths[i] + CHARACTERS_PER_TOKEN * tokens)
        return lengths, [(source, each.groups[i]) for each, source, i in places]

    def turns(self) -> list[tuple[int, int, int]]:
        """Return numbers that tell the record of every sample from others: its answered turns have equal ones.

        A record that a mixture repeats counts as another one every time.
        """
        seen: Counter[tuple[int, int]] = Counter()
        found = []
        for source, i in zip(self._sources, self._indices, strict=True):
            found.append((source, self.records[source].numbers[i], seen[source, i]))
            seen[source, i] += 1
        return found

    def named_by(self, skip: SkipList) -> frozenset[int]:
        """Return the numbers of the samples that a skip list names."""
        left = [
            set(not_skipped(Selection(records, array("q", range(len(records)))), skip).indices)
            for records in self.records
        ]
        places = zip(self._sources, self._indices, strict=True)
        return frozenset(number for number, (source, i) in enumerate(places) if i not in left[source])


class GroupedSampler(torch.utils.data.Sampler[int]):
    """Random order in which samples come with others of about their length, of their video, or both.

    The first makes less of a batch padding; the second lets a batch encode a video once for several questions.

    Args:
        lengths: of all samples; None: any may come together.
        videos: of all samples, in any form that tells them apart; None: any may come together.
        per_video: samples of a video that come together.
        batch_size: samples of a batch, of all devices together.
        part: samples of a batch that one device takes at once, of which groups of a video are to fill whole ones as far
            as they can; None: no matter.
        seed: of the order; it also depends on the epoch, and on nothing else.
    """

    POOL = 50
    """Batches that are drawn together and then sorted by length."""
    LOOK = 32
    """Groups among which one is looked for that fits into what is left of a part."""

    def __init__(
        self,
        lengths: Sequence[int] | None,
        batch_size: int,
        seed: int,
        *,
        videos: Sequence[Hashable] | None = None,
        per_video: int = 1,
        part: int | None = None,
    ) -> None:
        number = len(lengths if lengths is not None else videos or ())
        self.lengths = torch.tensor(lengths if lengths is not None else [0] * number)
        self.videos = list(videos) if videos is not None else list(range(number))
        self.per_video = per_video
        self.batch_size = batch_size
        self.part = part
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def _groups(self, order: list[int], draw: torch.Generator) -> list[list[int]]:
        """Return up to `per_video` samples of one video each, in random order."""
        if self.per_video == 1:
            return [[number] for number in order]
        waiting: dict[Hashable, list[int]] = {}
        for number in order:
            waiting.setdefault(self.videos[number], []).append(number)
        size = self.per_video
        groups = [each[i : i + size] for each in waiting.values() for i in range(0, len(each), size)]
        return [groups[i] for i in torch.randperm(len(groups), generator=draw).tolist()]

    def set_epoch(self, epoch: int) -> None:
        """Take another order."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        groups = self._groups(torch.randperm(len(self.lengths), generator=draw).tolist(), draw)
        longest = torch.tensor([int(self.lengths[group].max()) for group in groups])
        pool = self.POOL * self.batch_size // self.per_video
        order = [
            groups[place]
            for numbers in torch.arange(len(groups)).split(pool)
            for place in numbers[longest[numbers].argsort(stable=True)].tolist()
        ]
        if self.part is not None:
            order = fill_parts(order, self.part, self.LOOK)
        numbers = [number for group in order for number in group]
        batches = [numbers[i : i + self.batch_size] for i in range(0, len(numbers), self.batch_size)]
        # The last batch of all may be short, and must stay the last.
        whole = len(self.lengths) // self.batch_size
        shuffled = torch.randperm(whole, generator=draw).tolist()
        for number in (*shuffled, *range(whole, len(batches))):
            yield from batches[number]


def fill_parts(groups: Sequence[list[int]], size: int, look: int) -> list[list[int]]:
    """Order groups so that few of them lie across the border of two parts of `size`; those that must are cut there."""
    order: list[list[int]] = []
    waiting = deque(groups)
    room = size
    while waiting:
        fits = (i for i in range(min(look, len(waiting))) if len(waiting[i]) <= room)
        place = next(fits, 0)
        group = waiting[place]
        del waiting[place]
        if len(group) > room:
            waiting.appendleft(group[room:])
        order.append(group[:room])
        room = room - len(order[-1]) or size
    return order


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Makes a model batch of samples.

    Attributes:
        processor: the model's.
        store: kept vision features; None: videos are read and their pixels passed on.
        num_frames: frames of every video, spread evenly.
        compression: the stage's mode.
        windows: sizes (T, H, W) to draw from, one for every batch; empty: the model's own.
        seed: of that draw. It depends on the samples of the batch and on nothing else, so a resumed run draws the same.
        kinds: of media in the whole run, `video` and `image`. Modules that they reach run for every batch, so that
            processes that train together make the same calls whatever their samples show.
        max_text_tokens: longest sample in tokens of text, every medium one, as the release counts; the end of a longer
            one is cut off, and where that leaves nothing of its answer, it is left out. None: no limit.
        skipped: numbers of samples that are left out, while the places of all others stay as they are.
        has_report: add `report` to a batch, which tells what was left out of it and why; a video or image that cannot
            be read then leaves its samples out. Otherwise it is an error.
    """

    processor: HIComProcessor
    store: FeatureStore | None = None
    num_frames: int | None = None
    compression: Compression = "conditional"
    windows: tuple[Window, ...] = ()
    seed: int = 0
    kinds: tuple[str, ...] = ()
    max_text_tokens: int | None = None
    skipped: frozenset[int] = frozenset()
    has_report: bool = False

    @property
    def expected_media(self) -> tuple[str, ...]:
        """Names of the model's arguments that media of the run's kinds go into."""
        names = {"image": "pixel_values", "video": "pixel_values_videos" if self.store is None else "video_values"}
        return tuple(names[kind] for kind in self.kinds)

    def visual_tokens(self) -> dict[str, int]:
        """Return the visual tokens of a video and of an image, each in the model's own window."""
        frames = {"video": self.num_frames or self.processor.num_frames, "image": 1}
        return {kind: self.processor.token_count(number, None, self.compression) for kind, number in frames.items()}

    def __call__(self, items: Sequence[tuple[int, Sample]]) -> dict[str, Any]:
        """Return tensors under the names of the model's arguments, `labels` among them.

        A batch of which nothing is left has one row without labels, so that its loss is a sum over nothing: processes
        that train together take as many steps and make the same calls whatever they have to leave out.

        Raises:
            VideoError: a video or image cannot be read, and nothing would report it.
        """
        report: dict[str, list[dict[str, Any]]] = {"samples": [], "left_out": [], "cut": []}
        media = _Media(self)
        kept: list[tuple[Sample, int]] = []
        for number, sample in items:
            excess, problem = 0, "named by a skip list that came later" if number in self.skipped else ""
            if not problem:
                excess, problem = self._excess(sample)
            path = ""
            if not problem:
                path, problem = media.read(sample)
            entry = {"sample": number, "source": sample.source}
            if problem:
                named = {"media": path} if path else {}
                report["left_out"].append(named | entry | {"reason": problem})
                continue
            report["samples"].append(entry)
            if excess:
                report["cut"].append(entry | {"tokens": excess})
            kept.append((sample, excess))
        extra: dict[str, Any] = {}
        if self.windows and self.compression != "off":
            # Of all samples, so that leaving one out changes nothing for the others.
            numbers = " ".join(str(number) for number, _ in items)
            extra["window"] = random.Random(f"{self.seed} {numbers}").choice(self.windows)
        if self.compression != "conditional":
            extra["compression"] = self.compression
        batch = self._batch(kept, media, extra) if kept else self._nothing()
        # Prompts are padded on the left, so all answers stand at the end; a loss there needs no other logits.
        first = int((batch["labels"] != IGNORED).any(0).int().argmax()) if kept else 1
        batch |= extra | {"logits_to_keep": batch["labels"].shape[1] - first + 1}
        if self.kinds:
            batch["expected_media"] = self.expected_media
        return batch | ({"report": report} if self.has_report else {})

    def _batch(self, kept: Sequence[tuple[Sample, int]], media: _Media, extra: dict[str, Any]) -> dict[str, Any]:
        """Return the batch of samples whose media are read, each with the tokens that are cut off its end."""
        videos = [video for sample, _ in kept for video in sample.videos]
        images = [image for sample, _ in kept for image in sample.images]
        given: dict[str, Any] = {"images": [media.images[image] for image in images]} if images else {}
        features: dict[str, Any] = {}
        if videos:
            shown = list(dict.fromkeys(videos))
            counts = media.counts(shown)
            given["video_num_frames"] = [counts[shown.index(video)] for video in videos]
            if len(shown) < len(videos):
                features["video_index"] = torch.tensor([shown.index(video) for video in videos])
                features["video_num_frames"] = torch.tensor(counts)
            features |= media.features(shown)
        conversations: list[list[dict[str, Any]]] = [self.conversation(sample) for sample, _ in kept]
        batch = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_labels=True,
            padding=True,
            padding_side="left",
            **extra,
            **given,
        )
        assert not isinstance(batch, str | list)
        return cut_ends({**batch}, [excess for _, excess in kept], self.processor.tokenizer.pad_token_id) | features

    def _nothing(self) -> dict[str, Any]:
        """Return a batch of one row of two tokens, neither of which has a label."""
        ids = torch.full((1, 2), self.processor.tokenizer.pad_token_id)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, IGNORED)}

    def conversation(self, sample: Sample) -> list[dict[str, Any]]:
        """Return the messages of a sample, answer included, with the processor's own placeholders."""
        tokens = {"video": self.processor.video_token, "image": self.processor.image_token}
        messages = [*sample.messages, {"role": "assistant", "content": sample.answer}]
        return [{"role": m["role"], "content": self._place(m["content"], tokens)} for m in messages]

    def _place(self, text: str, tokens: dict[str, str]) -> str:
        for name, placeholder in PLACEHOLDERS.items():
            text = text.replace(placeholder, tokens[name])
        return text

    def _excess(self, sample: Sample) -> tuple[int, str]:
        """Return by how many tokens of text a sample is too long, and why nothing of it is left, if so."""
        if self.max_text_tokens is None:
            return 0, ""
        messages = self.conversation(sample)
        text = self.processor.apply_chat_template(messages)
        assert isinstance(text, str)
        # No token is shorter than a byte.
        if len(text.encode()) <= self.max_text_tokens:
            return 0, ""
        prompt = self.processor.apply_chat_template(messages[:-1], add_generation_prompt=True)
        length, asked = (
            len(self.processor.tokenizer(each, add_special_tokens=False)["input_ids"]) for each in (text, prompt)
        )
        if asked >= self.max_text_tokens:
            return 0, f"{asked} tokens of text before its answer, and max_text_tokens={self.max_text_tokens}"
        return max(0, length - self.max_text_tokens), ""


class _Media:
    """The videos and images of one batch, each read once."""

    def __init__(self, collator: Collator) -> None:
        self.collator = collator
        self.videos: dict[Path, Tensor] = {}
        self.images: dict[Path, Any] = {}
        self.problems: dict[Path, str] = {}

    def read(self, sample: Sample) -> tuple[str, str]:
        """Read what a sample shows, and return what of it cannot be read and why; both are empty where all can."""
        collator = self.collator
        videos = sample.videos if collator.store is None else ()
        for kind, files, known in (("video", videos, self.videos), ("image", sample.images, self.images)):
            for file in files:
                if file not in known and file not in self.problems:
                    try:
                        known[file] = self._video(file) if kind == "video" else self._image(file)
                    except VideoError as error:
                        if not collator.has_report:
                            raise
                        self.problems[file] = " ".join(str(error).split())
                if file in self.problems:
                    return str(file.resolve()), self.problems[file]
        return "", ""

    def _video(self, file: Path) -> Tensor:
        processor = self.collator.processor
        return processor.pixel_values(processor.read_video(file, num_frames=self.collator.num_frames).frames)

    def _image(self, file: Path) -> Any:
        return read_frames(file, num_frames=1).frames[0]

    def counts(self, videos: Sequence[Path]) -> list[int]:
        """Return the number of frames of every video."""
        store = self.collator.store
        return [len(self.videos[video]) for video in videos] if store is None else store.counts(videos)

    def features(self, videos: Sequence[Path]) -> dict[str, Tensor]:
        """Return what the model gets of different videos: their pixels, or what is kept of them."""
        store = self.collator.store
        if store is None:
            return {"pixel_values_videos": torch.cat([self.videos[video] for video in videos])}
        found = {"video_values": store.read(videos, "values").float()}
        if self.collator.compression == "conditional" and "keys" in store.key:
            found["video_keys"] = store.read(videos, "keys").float()
        return found


def cut_ends(batch: dict[str, Any], excess: Sequence[int], pad: int) -> dict[str, Any]:
    """Return a batch with so many tokens less at the end of every row, and rows still padded on the left."""
    if not any(excess):
        return batch
    for name, filler in (("input_ids", pad), ("attention_mask", 0), ("labels", IGNORED)):
        rows = [row[: len(row) - number] for row, number in zip(batch[name], excess, strict=True)]
        padded = [torch.cat((row.new_full((number,), filler), row)) for row, number in zip(rows, excess, strict=True)]
        batch[name] = torch.stack(padded)
    first = int(batch["attention_mask"].any(0).int().argmax())
    return batch | {name: batch[name][:, first:] for name in ("input_ids", "attention_mask", "labels")}
