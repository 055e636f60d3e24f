"""What stands behind the web page: a model in this process, or an endpoint somewhere else."""

from __future__ import annotations

import base64
import math
import mimetypes
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from ..encoding import EncodedVideo
from ..inference import Answer, VideoChat
from ..look import draw_grid, look_at
from ..model.ops import Window
from .kept import KeptVideos
from .media import MediaLimits, check_media

Message = Mapping[str, str]


@dataclass(frozen=True)
class Costs:
    """What an answer took.

    Attributes:
        num_prompt_tokens: tokens that the LLM read.
        num_new_tokens: tokens that it wrote.
        num_visual_tokens: visual ones of those read; None where it is not told.
        num_uncompressed_tokens: what those would be without compression; None where it is not told.
        window: (T, H, W) of the local branch; None without one, or where it is not told.
        timings: seconds by part.
    """

    num_prompt_tokens: int
    num_new_tokens: int
    num_visual_tokens: int | None = None
    num_uncompressed_tokens: int | None = None
    window: Window | None = None
    timings: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Update:
    """The state of an answer.

    Attributes:
        text: so far.
        costs: with the last text.
        picture: where both branches looked, after the last text.
        notes: what to know before the text is believed, a sentence each.
    """

    text: str
    costs: Costs | None = None
    picture: Image.Image | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Budget:
    """Visual tokens that a video may take.

    Attributes:
        least: by the coarsest window.
        usual: by the window of training.
        most: without compression.
    """

    least: int
    usual: int
    most: int


class Backend(Protocol):
    """What the page asks.

    Attributes:
        name: of the model.
        about: a sentence on it, in Markdown.
        num_frames: that a video has by default.
        max_frames: that it may have.
        has_pictures: where the model looked can be shown.
        num_parallel: questions that it answers side by side; more wait in a queue.
    """

    name: str
    about: str
    num_frames: int
    max_frames: int
    has_pictures: bool
    num_parallel: int

    def budget(self, num_frames: int) -> Budget | None:
        """Return what a video of `num_frames` frames may take; None where it cannot be chosen or is not known."""

    def reply(
        self, video: Path, messages: Sequence[Message], num_frames: int, max_visual_tokens: int | None
    ) -> Iterator[Update]:
        """Answer the last turn of a conversation about a video, piece by piece; closing the iterator stops it.

        Raises:
            ValueError: what is wrong with the video or the question.
        """


class LocalBackend:
    """A model in this process.

    Args:
        chat: the model.
        name: of it, for people.
        limits: for videos.
        max_frames: that a video may have.
        max_new_tokens: longest answer.
        max_answer_s: time for writing an answer, since others wait for it; what is written by then is shown.
        kept_videos: encoded videos that are kept.
    """

    def __init__(
        self,
        chat: VideoChat,
        *,
        name: str = "hicom",
        limits: MediaLimits | None = None,
        max_frames: int = 256,
        max_new_tokens: int = 256,
        max_answer_s: float = 60.0,
        kept_videos: int = 8,
    ) -> None:
        self.num_parallel = 1  # one model: its work is done one question after the other
        self.chat, self.name = chat, name
        self.limits = limits or MediaLimits()
        self.num_frames, self.max_frames = chat.processor.num_frames, max(max_frames, chat.processor.num_frames)
        self.max_new_tokens, self.max_answer_s = max_new_tokens, max_answer_s
        trained = "" if chat.domain is None else f"Trained on {chat.domain.description}."
        self.about = "  \n".join([trained, *map(sentence, chat.notes())]).strip()
        chat.model.is_toy_told = True
        self.has_pictures = chat.model.config.compressor == "hicom"
        self._kept = KeptVideos(chat, kept_videos)

    def budget(self, num_frames: int) -> Budget | None:
        """Return what a video of `num_frames` frames may take; None for compressors without windows."""
        processor = self.chat.processor
        if processor.compressor != "hicom" or processor.window is None:
            return None
        grid = processor.grid_size
        return Budget(
            processor.token_count(num_frames, (num_frames, grid, grid)),
            processor.token_count(num_frames),
            processor.token_count(num_frames, compression="off"),
        )

    def reply(
        self, video: Path, messages: Sequence[Message], num_frames: int, max_visual_tokens: int | None
    ) -> Iterator[Update]:
        """Answer the last turn of a conversation about a video, piece by piece, then show where the model looked.

        Raises:
            ValueError: what is wrong with the video or the question.
        """
        self.chat.check_texts([messages])  # before the video is read
        encoded = self._encoded(video, num_frames)
        notes = self.chat.notes([encoded])
        pieces = self.chat.stream_reply(
            messages,
            [encoded],
            max_visual_tokens=max_visual_tokens,
            max_new_tokens=self.max_new_tokens,
            max_time=self.max_answer_s,
        )
        text = ""
        try:
            while True:
                try:
                    text += next(pieces)
                except StopIteration as stop:
                    answer: Answer = stop.value
                    break
                yield Update(text, notes=notes)
        finally:
            pieces.close()
        if answer.is_cut and answer.num_new_tokens < self.max_new_tokens:
            cut = "the answer ends here, at the limit of its time or of the model's context"
            notes = (*notes, cut)
        costs = Costs(
            answer.num_prompt_tokens,
            answer.num_new_tokens,
            answer.num_visual_tokens,
            answer.num_uncompressed_tokens,
            answer.window,
            answer.timings,
        )
        yield Update(answer.text, costs, notes=notes)
        if self.has_pictures:
            seen = look_at(self.chat, video, encoded, messages[-1]["content"], answer, window=answer.window)
            yield Update(answer.text, costs, draw_grid(seen), notes)

    def _encoded(self, video: Path, num_frames: int) -> EncodedVideo:
        if not 1 <= num_frames <= self.max_frames:
            raise ValueError(f"{num_frames} frames are asked for; 1 to {self.max_frames} are possible")
        check_media(video, self.limits)
        return self._kept.encode(video, num_frames=num_frames)


class RemoteBackend:
    """A model behind an endpoint with the chat completions API, as `hicom serve` has it.

    Args:
        url: its base, for example `http://localhost:8000/v1`.
        model: name of the model there; None: the first that it tells of.
        api_key: that it asks for.
        num_frames: that a video has by default.
        max_frames: that it may have.
        max_bytes: of a video that is sent.
        timeout_s: of a request.
        num_parallel: questions that are sent side by side.

    Raises:
        ImportError: the package `openai` is missing.
        ValueError: the endpoint does not answer.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        num_frames: int = 8,
        max_frames: int = 64,
        max_bytes: int = 256 * 10**6,
        timeout_s: float = 600.0,
        num_parallel: int = 8,
    ) -> None:
        self.num_parallel = num_parallel
        try:
            import openai
        except ModuleNotFoundError:
            raise ImportError("openai is missing: pip install 'hicom[web]'") from None
        self._errors: Any = openai
        self._client = openai.OpenAI(base_url=url, api_key=api_key or "none", timeout=timeout_s, max_retries=1)
        note = ""
        if model is None:
            try:
                served = list(self._client.models.list())
            except openai.OpenAIError as error:
                raise ValueError(f"{url}: {_reason(error)}") from None
            if not served:
                raise ValueError(f"{url}: it serves no model")
            model, told = served[0].id, (served[0].model_extra or {}).get("description")
            note = f"  \n{sentence(told)}" if told else ""
        self.name, self.about = model, f"Served at {url}.{note}"
        self.num_frames, self.max_frames, self.max_bytes = num_frames, max_frames, max_bytes
        self.has_pictures = False

    def budget(self, num_frames: int) -> Budget | None:
        """Return None: an endpoint does not tell."""
        return None

    def reply(
        self, video: Path, messages: Sequence[Message], num_frames: int, max_visual_tokens: int | None
    ) -> Iterator[Update]:
        """Answer the last turn of a conversation about a video, piece by piece.

        Raises:
            ValueError: what is wrong with the video or the question, or with the endpoint.
        """
        size = video.stat().st_size
        if size > self.max_bytes:
            raise ValueError(f"the video has {size:,} bytes; at most {self.max_bytes:,} are sent")
        kind = mimetypes.guess_type(video.name)[0] or "video/mp4"
        url = f"data:{kind};base64,{base64.b64encode(video.read_bytes()).decode()}"
        turns: list[Any] = [dict(message) for message in messages]
        first = next(turn for turn in turns if turn["role"] == "user")
        first["content"] = [
            {"type": "video_url", "video_url": {"url": url}},
            {"type": "text", "text": first["content"]},
        ]
        extra: dict[str, Any] = {"num_frames": num_frames}
        if max_visual_tokens is not None:
            extra["max_visual_tokens"] = max_visual_tokens
        start = time.perf_counter()
        text, first_s, usage = "", math.nan, None
        notes: tuple[str, ...] = ()
        try:
            with self._client.chat.completions.create(
                model=self.name,
                messages=turns,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body=extra,
            ) as chunks:
                for chunk in chunks:
                    usage = chunk.usage or usage
                    notes = tuple((chunk.model_extra or {}).get("notes") or notes)
                    piece = chunk.choices[0].delta.content if chunk.choices else None
                    if piece:
                        first_s = time.perf_counter() - start if math.isnan(first_s) else first_s
                        text += piece
                        yield Update(text, notes=notes)
        except self._errors.OpenAIError as error:
            raise ValueError(_reason(error)) from None
        end_s = time.perf_counter() - start
        details = dict(usage.prompt_tokens_details or {}) if usage is not None else {}
        yield Update(
            text.strip(),
            Costs(
                usage.prompt_tokens if usage is not None else 0,
                usage.completion_tokens if usage is not None else 0,
                details.get("visual_tokens"),
                details.get("uncompressed_visual_tokens"),
                timings={"first token": first_s, "rest of the answer": end_s - first_s} if first_s < end_s else {},
            ),
            notes=notes,
        )


def sentence(text: object) -> str:
    """Return a message as a sentence."""
    words = str(text).strip()
    return f"{words[:1].upper()}{words[1:]}{'' if words.endswith(('.', '!', '?')) else '.'}"


def _reason(error: Any) -> str:
    """Return what an endpoint says is wrong."""
    body = getattr(error, "body", None)
    if isinstance(body, dict) and isinstance(body.get("message"), str):
        return str(body["message"])
    return f"the endpoint does not answer as it should: {error}"
