"""HICom as a model of lmms-eval: `lmms_eval --model hicom --model_args pretrained=...`, found by an entry point.

Prompts are those of lmms-eval's tasks; the instruction is the bare question of the document, without options.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm.auto import tqdm

from ..encoding import EncodedVideo
from ..inference import Answer, VideoChat
from ..model.instruction import extract_instruction

QUESTION_FIELDS = ("question", "Q", "query")
"""Of documents, where tasks keep the bare question."""
SAMPLING = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "num_beams", "repetition_penalty")
"""What tasks may ask of `generate`."""


def manifest() -> ModelManifest:
    """Return what lmms-eval registers."""
    return ModelManifest("hicom", chat_class_path="hicom.eval.lmms_eval.HIComModel")


class HIComModel(lmms):
    """A model of this library, asked by lmms-eval.

    Args:
        pretrained: a checkpoint folder, a hub id, or the name of an embedded model.
        device: of torch; None: a GPU where there is one. With several processes each has its own.
        dtype: precision; None: what suits the device.
        batch_size: questions answered at once.
        num_frames: frames of a video, spread evenly; None: as many as the model was trained on.
        fps: frames a second instead.
        window: of the local branch, as `4x3x3`; None: the model's.
        max_visual_tokens: budget a video that picks the window instead.
        cache: folder for features of videos.

    Raises:
        ValueError: an argument makes no sense.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "hicom-tiny",
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        num_frames: int | None = None,
        fps: float | None = None,
        window: str | None = None,
        max_visual_tokens: int | None = None,
        cache: str | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        others.pop("max_batch_size", None)  # lmms-eval always passes it
        if others:
            raise ValueError(f"unknown model_args {', '.join(others)}")
        if window is not None and max_visual_tokens is not None:
            raise ValueError("window and max_visual_tokens both choose the window; pass one of them")
        from accelerate import Accelerator

        accelerator = Accelerator()
        if accelerator.num_processes > 1:
            self.accelerator = accelerator
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
            device = str(accelerator.device)
        self.chat = VideoChat.from_pretrained(pretrained, device=device, dtype=dtype, cache=cache)
        self.batch_size = max(1, int(batch_size))
        self.choice = {"num_frames": num_frames, "fps": fps}
        self.window = None if window is None else parse_window(window)
        self.max_visual_tokens = max_visual_tokens
        self._last: dict[str, EncodedVideo] = {}

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Return the answers, in the order of the requests."""
        results: dict[int, GenerationResult] = {}
        order = sorted(range(len(requests)), key=lambda number: str(requests[number].args[2]))
        bar = tqdm(total=len(requests), desc="hicom", disable=self.rank != 0)
        for first in range(0, len(order), self.batch_size):
            numbers = order[first : first + self.batch_size]
            # Requests that sample differently cannot share a batch.
            for kwargs in {str(requests[number].args[2]): requests[number].args[2] for number in numbers}.values():
                some = [number for number in numbers if requests[number].args[2] == kwargs]
                for number, answer in zip(some, self._answer([requests[n] for n in some], kwargs), strict=True):
                    counts = TokenCounts(input_tokens=answer.num_visual_tokens)
                    results[number] = GenerationResult(cut(answer.text, kwargs.get("until")), counts)
            bar.update(len(numbers))
        bar.close()
        return [results[number] for number in range(len(requests))]

    def _answer(self, requests: Sequence[Instance], kwargs: Mapping[str, Any]) -> list[Answer]:
        videos, prompts, instructions = [], [], []
        for request in requests:
            _, doc_to_messages, _, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            media, text = read_messages(doc_to_messages(doc))
            videos.append([self._encode(each) for each in media])
            prompts.append(text)
            instructions.append(bare_question(doc, text))
        options = {name: kwargs[name] for name in SAMPLING if kwargs.get(name) is not None}
        if not options.get("temperature", 1):
            options |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        window = self.window
        if self.max_visual_tokens is not None:
            most = max(video.num_frames for row in videos for video in row)
            window = self.chat.processor.choose_window(most, self.max_visual_tokens)
        return self.chat.ask_each(videos, prompts, instructions=instructions, window=window, **options)

    def _encode(self, media: Mapping[str, Any]) -> EncodedVideo:
        """Return a video; the last few are kept, since tasks ask several questions about each."""
        key = str(media)
        if key not in self._last:
            if len(self._last) >= 2 * self.batch_size:
                self._last.pop(next(iter(self._last)))
            choice: dict[str, Any] = self.choice if media["type"] == "video" else {"num_frames": 1}
            bounds: dict[str, Any] = {name: media[name] for name in ("start_s", "end_s")}
            self._last[key] = self.chat.encode(media["source"], **choice, **bounds)
        return self._last[key]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refuse: tasks for chat models generate."""
        raise NotImplementedError("hicom answers by generating; choose a task with output_type: generate_until")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuse: no task about videos has rounds."""
        raise NotImplementedError("hicom answers one question at a time; choose a task without rounds")


def parse_window(text: str) -> tuple[int, int, int]:
    """Return the three sizes of `TxHxW`."""
    sizes = text.lower().split("x")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ValueError(f"window={text}: give three sizes, for example 4x3x3")
    return int(sizes[0]), int(sizes[1]), int(sizes[2])


def cut(text: str, until: str | Sequence[str] | None) -> str:
    """Return a text up to the first of the strings that end it."""
    for end in [until] if isinstance(until, str) else until or ():
        if end:
            text = text.partition(end)[0]
    return text.strip()


def read_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Return the media and the text of a conversation of one turn, media first.

    Raises:
        ValueError: there is no picture, or something that is neither video, picture nor text.
    """
    media: list[dict[str, Any]] = []
    texts = []
    for message in messages:
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            kind = part["type"]
            if kind == "text":
                texts.append(part["text"])
            elif kind in ("image", "video"):
                source = part.get("url", part.get(kind))
                bounds = {"start_s": part.get("start_time"), "end_s": part.get("end_time")}
                if isinstance(source, Mapping):
                    bounds = {"start_s": source.get("video_start"), "end_s": source.get("video_end")}
                    source = source.get("url") or source.get("path") or source.get("video")
                media.append({"type": kind, "source": source} | bounds)
            else:
                raise ValueError(f"hicom takes videos, pictures and text, not {kind}")
    if not media:
        raise ValueError("hicom needs a video or a picture; this task has neither")
    return media, "\n".join(texts).strip()


def bare_question(doc: Mapping[str, Any], text: str) -> str:
    """Return what steers the compressor: the question of a document; without one, what the prompt asks."""
    found = next((doc[name] for name in QUESTION_FIELDS if isinstance(doc.get(name), str) and doc[name].strip()), text)
    return extract_instruction(found)
