"""From samples to the tensors that the model takes, by the processor that also serves inference."""

from __future__ import annotations

import random
from array import array
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..model.compressor import Compression
from ..model.ops import Window
from ..model.processing import HIComProcessor
from .features import FeatureStore
from .mixture import Selection
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


class GroupedSampler(torch.utils.data.Sampler[int]):
    """Random order in which samples come with others of about their length, of their video, or both.

    The first makes less of a batch padding; the second lets a batch encode a video once for several questions.

    Args:
        lengths: of all samples; None: any may come together.
        videos: of all samples, in any form that tells them apart; None: any may come together.
        per_video: samples of a video that come together.
        batch_size: samples of a batch, of all devices together.
        seed: of the order; it also depends on the epoch, and on nothing else.
    """

    POOL = 50
    """Batches that are drawn together and then sorted by length."""

    def __init__(
        self,
        lengths: Sequence[int] | None,
        batch_size: int,
        seed: int,
        *,
        videos: Sequence[Hashable] | None = None,
        per_video: int = 1,
    ) -> None:
        number = len(lengths if lengths is not None else videos or ())
        self.lengths = torch.tensor(lengths if lengths is not None else [0] * number)
        self.videos = list(videos) if videos is not None else list(range(number))
        self.per_video = per_video
        self.batch_size = batch_size
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
            number
            for numbers in torch.arange(len(groups)).split(pool)
            for place in numbers[longest[numbers].argsort()].tolist()
            for number in groups[place]
        ]
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        # The last batch of all may be short, and must stay the last.
        whole = len(self.lengths) // self.batch_size
        shuffled = torch.randperm(whole, generator=draw).tolist()
        for number in (*shuffled, *range(whole, len(batches))):
            yield from batches[number]


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
    """

    processor: HIComProcessor
    store: FeatureStore | None = None
    num_frames: int | None = None
    compression: Compression = "conditional"
    windows: tuple[Window, ...] = ()
    seed: int = 0
    kinds: tuple[str, ...] = ()

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
        """Return tensors under the names of the model's arguments, `labels` among them."""
        samples = [sample for _, sample in items]
        extra: dict[str, Any] = {}
        if self.windows and self.compression != "off":
            numbers = " ".join(str(number) for number, _ in items)
            extra["window"] = random.Random(f"{self.seed} {numbers}").choice(self.windows)
        if self.compression != "conditional":
            extra["compression"] = self.compression
        media: dict[str, Any] = {}
        videos = [video for sample in samples for video in sample.videos]
        images = [image for sample in samples for image in sample.images]
        features: dict[str, Any] = {"expected_media": self.expected_media} if self.kinds else {}
        if images:
            media["images"] = images
        if videos:
            if self.store is None:
                media |= {"videos": videos, "num_frames": self.num_frames}
            else:
                media["video_num_frames"] = self.store.counts(videos)
                shown = list(dict.fromkeys(videos))
                if len(shown) < len(videos):
                    features["video_index"] = torch.tensor([shown.index(video) for video in videos])
                    features["video_num_frames"] = torch.tensor(self.store.counts(shown))
                features["video_values"] = self.store.read(shown, "values").float()
                if self.compression == "conditional" and "keys" in self.store.key:
                    features["video_keys"] = self.store.read(shown, "keys").float()
        conversations: list[list[dict[str, Any]]] = [self.conversation(sample) for sample in samples]
        batch = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_labels=True,
            padding=True,
            padding_side="left",
            **extra,
            **media,
        )
        assert not isinstance(batch, str | list)
        # Prompts are padded on the left, so all answers stand at the end; a loss there needs no other logits.
        first = int((batch["labels"] != IGNORED).any(0).int().argmax())
        return {**batch, **features, **extra, "logits_to_keep": batch["labels"].shape[1] - first + 1}

    def conversation(self, sample: Sample) -> list[dict[str, Any]]:
        """Return the messages of a sample, answer included, with the processor's own placeholders."""
        tokens = {"video": self.processor.video_token, "image": self.processor.image_token}
        messages = [*sample.messages, {"role": "assistant", "content": sample.answer}]
        return [{"role": m["role"], "content": self._place(m["content"], tokens)} for m in messages]

    def _place(self, text: str, tokens: dict[str, str]) -> str:
        for name, placeholder in PLACEHOLDERS.items():
            text = text.replace(placeholder, tokens[name])
        return text
