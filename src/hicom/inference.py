"""Ask questions about videos: encode a video once, ask many times (the one path to `generate`)."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from threading import Event
from typing import Any, Literal, Self, overload

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from .data.cache import FeatureCache
from .data.domain import Domain, load_domain
from .encoding import EncodedVideo, LiveVideo, encode_video, instruction_inputs, steering_of, timed
from .model.compressor import CompressorOutput
from .model.convert import is_official, load_official, read_json, resolve_folder, tensor_shapes
from .model.instruction import extract_instruction
from .model.modeling import HIComForConditionalGeneration, VisionFeatures, place_tokens
from .model.ops import Window
from .model.processing import HIComProcessor, official_processor

MAX_COPIED = 2**25
"""Features, in numbers, that a batch of questions about a video may copy: with larger ones questions go one by one."""


class Answer(str):
    """An answer: a string that also knows what it cost.

    Attributes:
        num_visual_tokens: visual tokens that the LLM read.
        num_prompt_tokens: all tokens that it read, visual ones included.
        num_new_tokens: tokens that it wrote, the end mark included.
        is_cut: it reached `max_new_tokens` before it ended.
        num_uncompressed_tokens: what it would have read without compression.
        instruction: what steered the compressor.
        window: (T, H, W) of the local branch in force; None without one.
        timings: seconds by part: `decode` (that the vision encoder waited for frames), `vision encoder`, `compressor`
            (with the instruction encoder) and `LLM`. The last two are the whole batch's where several questions are
            asked at once. `cache` where features came from there.
    """

    num_visual_tokens: int
    num_prompt_tokens: int
    num_new_tokens: int
    is_cut: bool
    num_uncompressed_tokens: int
    instruction: str
    window: Window | None
    timings: dict[str, float]

    @property
    def text(self) -> str:
        """The answer as a plain string."""
        return str.__str__(self)


@dataclass
class _Prompt:
    """Prompts ready for the LLM, and what they cost."""

    inputs_embeds: Tensor
    attention_mask: Tensor
    instructions: list[str]
    num_visual_tokens: list[int]
    num_prompt_tokens: list[int]
    num_uncompressed_tokens: list[int]
    window: Window | None
    timings: dict[str, float]


class VideoChat:
    """A model and its processor, ready to be asked.

    Args:
        model: the model; it is put into evaluation mode.
        processor: its processor.
        domain: what the model was trained on, where its folder says so.
        cache: where features of video files are kept on disk, or the folder for them; None: nowhere.
    """

    def __init__(
        self,
        model: HIComForConditionalGeneration,
        processor: HIComProcessor,
        domain: Domain | None = None,
        cache: FeatureCache | str | Path | None = None,
    ) -> None:
        self.model = model.eval()
        self.processor = processor
        self.domain = domain
        self.cache = FeatureCache(cache) if isinstance(cache, str | Path) else cache
        if model.generation_config.eos_token_id is None:
            model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
        if model.generation_config.pad_token_id is None:
            model.generation_config.pad_token_id = processor.tokenizer.pad_token_id

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = "hicom-tiny",
        *,
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        cache: FeatureCache | str | Path | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a model.

        Args:
            name: a folder, a hub id, or the name of an embedded model (`hicom-tiny`). Checkpoints in the layout of the
                official release load directly.
            device: where to compute; None: a GPU if there is one, else the CPU.
            dtype: precision to compute in; None: on a GPU as stored, but bfloat16 where that is float32; float32 on a
                CPU, where 16 bit is slow.
            cache: where features of video files are kept on disk, or the folder for them; None: nowhere.
            **kwargs: passed on to `from_pretrained` of transformers, for example `device_map` or `quantization_config`;
                only for this library's layout.

        Raises:
            ValueError: the folder is no model, lacks files, or its tensors do not fit; the message names them. Or
                `kwargs` are given for the layout of the official release.
        """
        folder = find_model(name)
        tensor_shapes(folder)  # what is wrong with the files should be said by name, before anything is loaded
        if device is None and "device_map" not in kwargs:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        precision = _precision(dtype)
        if precision is None:
            precision = _default_precision(folder, device)
        if is_official(folder):
            if kwargs:
                raise ValueError(
                    f"{name} is in the layout of the official release, which does not load with "
                    f"{', '.join(sorted(kwargs))}; convert it first: hicom convert {name} DST"
                )
            model = load_official(folder, dtype=precision)
            processor = official_processor(folder, model)
            if processor is None:
                raise ValueError(
                    f"{name}: tokenizers are missing, so no question can be asked; put the LLM's tokenizer into the "
                    f"folder and the vision tower's folder, with its tokenizer, beside it"
                )
        else:
            if read_json(folder / "config.json").get("model_type") != "hicom":
                raise ValueError(f"{name}: not a HICom checkpoint (model_type in config.json is not 'hicom')")
            missing = [
                f
                for f in ("processor_config.json", "tokenizer_config.json", "tokenizer.json")
                if not (folder / f).is_file()
            ]
            if missing:
                raise ValueError(f"{name}: {', '.join(missing)} missing; save the processor into the model's folder")
            model = HIComForConditionalGeneration.from_pretrained(folder, dtype=precision or "auto", **kwargs)
            processor = HIComProcessor.from_pretrained(folder)
        if device is not None:
            model = model.to(device)
        return cls(model, processor, load_domain(folder), cache)

    def encode(
        self,
        source: Any,
        *,
        num_frames: int | None = None,
        fps: float | None = None,
        timestamps_s: Sequence[float] | None = None,
        start_s: float | None = None,
        end_s: float | None = None,
        max_frames: int | None = None,
        snap: Literal["exact", "keyframe"] | None = None,
        source_fps: float | None = None,
        keep_features: bool = True,
        questions: Sequence[str] = (),
        window: Window | None = None,
        max_visual_tokens: int | None = None,
    ) -> EncodedVideo:
        """Decode a video and run the vision encoder over it, once for all questions.

        Both go on at once, in chunks, so that hours of video need no more memory than their features.

        Args:
            source: anything `hicom.read_frames` reads.
            num_frames: frames chosen uniformly; default the processor's. The other arguments as in `read_frames`.
            fps: frames a second instead.
            timestamps_s: explicit times instead, in seconds.
            start_s: start of the part that counts, in seconds.
            end_s: its end.
            max_frames: upper limit with `fps`.
            snap: `keyframe` takes the key frame nearest to every chosen frame, which decodes much faster.
            source_fps: frames a second of sources that have no times, such as folders; None: 25.
            keep_features: False keeps nothing for every frame, so memory does not grow with the video; it is compressed
                as it comes, for `questions` alone.
            questions: what will be asked, with `keep_features=False`.
            window: (T, H, W) that they will be asked with; None: the model's own.
            max_visual_tokens: budget that picks the window instead.

        Raises:
            ValueError: the video cannot be read (`VideoError`), a choice is impossible, or the features would not fit
                into memory.
        """
        choice = {
            "num_frames": num_frames,
            "fps": fps,
            "timestamps_s": timestamps_s,
            "start_s": start_s,
            "end_s": end_s,
            "max_frames": max_frames,
            "snap": snap,
            "source_fps": source_fps,
        }
        return encode_video(
            self.model,
            self.processor,
            source,
            choice,
            cache=self.cache,
            questions=questions,
            keep_features=keep_features,
            window=window,
            max_visual_tokens=max_visual_tokens,
        )

    def live(
        self,
        *,
        keep_features: bool = True,
        questions: Sequence[str] = (),
        window: Window | None = None,
        num_frames: int | None = None,
        fps: float = 1.0,
        name: str = "live video",
    ) -> LiveVideo:
        """Return a video that frames are pushed into as they arrive, and that `ask` takes at any moment.

        Args:
            keep_features: False keeps nothing for every frame; then only `questions` can be asked.
            questions: what will be asked, with `keep_features=False`.
            window: (T, H, W) that they will be asked with; None: the model's own.
            num_frames: number of frames, where it is known.
            fps: frames a second, for frames that are pushed without times.
            name: of the video, in messages.

        Raises:
            ValueError: nothing is kept and nothing asked, or the model's compressor cannot work in chunks.
        """
        return LiveVideo(
            self.model,
            self.processor,
            questions=questions,
            keep_features=keep_features,
            window=window,
            num_frames=num_frames,
            name=name,
            fps=fps,
        )

    def caution(self, video: EncodedVideo) -> str | None:
        """Return what to tell the user if the video is unlike all that the model was trained on, else None."""
        if self.domain is None or self.domain.is_like(video.summary):
            return None
        known = self.domain.description
        return f"this video is unlike what the model was trained on ({known}); do not trust its answers"

    @overload
    def ask(self, video: Any, question: str, **kwargs: Any) -> Answer: ...
    @overload
    def ask(self, video: Any, question: Sequence[str], **kwargs: Any) -> list[Answer]: ...
    def ask(
        self,
        video: Any,
        question: str | Sequence[str],
        *,
        instruction: str | None = None,
        window: Window | None = None,
        max_visual_tokens: int | None = None,
        max_new_tokens: int = 256,
        **kwargs: Any,
    ) -> Answer | list[Answer]:
        """Answer one question, or many in one batch.

        Args:
            video: an `EncodedVideo`, a `LiveVideo` as it is now, a list of encoded ones (all go into the prompt, in
                order), or a source to encode first.
            question: one question or several; each steers the compression of its own prompt.
            instruction: what steers the compressor in place of the question.
            window: (T, H, W) of the local branch in place of the model's.
            max_visual_tokens: budget a video that picks the window instead.
            max_new_tokens: longest answer.
            **kwargs: arguments of `generate`, for example `do_sample=True, temperature=0.7` or `num_beams=3`.

        Raises:
            ValueError: a question is empty, the budget is too small, or the video cannot be read.
        """
        questions = [question] if isinstance(question, str) else list(question)
        conversations = [[{"role": "user", "content": text}] for text in questions]
        videos = [self._encoded(video)] * len(questions)
        instructions = [instruction] * len(questions)
        answers = self._answer(
            conversations, videos, instructions, window, max_visual_tokens, max_new_tokens=max_new_tokens, **kwargs
        )
        return answers[0] if isinstance(question, str) else answers

    def ask_each(
        self,
        videos: Sequence[Any],
        questions: Sequence[str],
        *,
        instructions: Sequence[str | None] | None = None,
        histories: Sequence[Sequence[Mapping[str, str]]] | None = None,
        window: Window | None = None,
        max_new_tokens: int = 256,
        **kwargs: Any,
    ) -> list[Answer]:
        """Answer every question about its own video, all in one batch.

        Args:
            videos: one for every question, as in `ask`; the same object several times is compressed for each.
            questions: one for every video.
            instructions: what steers the compressor in place of each question; None, also in the list: the question.
            histories: turns before each question, as `reply` takes them; its video stands before the first user turn.
            window: (T, H, W) of the local branch in place of the model's.
            max_new_tokens: longest answer.
            **kwargs: arguments of `generate`.

        Raises:
            ValueError: the lists differ in length, a question is empty, or a video cannot be read.
        """
        given = [None] * len(questions) if instructions is None else list(instructions)
        if not len(videos) == len(questions) == len(given):
            raise ValueError(f"{len(videos)} videos, {len(questions)} questions and {len(given)} instructions")
        before = [()] * len(questions) if histories is None else list(histories)
        if len(before) != len(questions):
            raise ValueError(f"{len(before)} histories for {len(questions)} questions")
        conversations = [
            _checked([*turns, {"role": "user", "content": text}]) for turns, text in zip(before, questions, strict=True)
        ]
        rows = [self._encoded(video) for video in videos]
        return self._answer(conversations, rows, given, window, None, max_new_tokens=max_new_tokens, **kwargs)

    def stream(
        self,
        video: Any,
        question: str,
        *,
        instruction: str | None = None,
        window: Window | None = None,
        max_visual_tokens: int | None = None,
        max_new_tokens: int = 256,
        **kwargs: Any,
    ) -> Iterator[str]:
        """Yield the answer piece by piece; together the pieces are what `ask` returns. Arguments as in `ask`.

        Closing the iterator stops the generation.
        """
        conversation = [{"role": "user", "content": question}]
        yield from self._stream(
            conversation,
            self._encoded(video),
            instruction,
            window,
            max_visual_tokens,
            max_new_tokens=max_new_tokens,
            **kwargs,
        )

    def reply(
        self,
        messages: Sequence[Mapping[str, str]],
        videos: Sequence[Any] = (),
        *,
        instruction: str | None = None,
        window: Window | None = None,
        max_visual_tokens: int | None = None,
        max_new_tokens: int = 256,
        **kwargs: Any,
    ) -> Answer:
        """Answer the last turn of a conversation.

        Args:
            messages: `{"role": "system" | "user" | "assistant", "content": text}`, the last one of the user.
            videos: that it is about, in order, as in `ask`; they stand before the first user turn. None at all is fine.
            instruction: what steers the compressor in place of the last user turn.
            window: (T, H, W) of the local branch in place of the model's.
            max_visual_tokens: budget a video that picks the window instead.
            max_new_tokens: longest answer.
            **kwargs: arguments of `generate`.

        Raises:
            ValueError: the messages do not end with a user turn, or what `ask` raises.
        """
        conversation = _checked(messages)
        (answer,) = self._answer(
            [conversation],
            [self._encoded_all(videos)],
            [instruction],
            window,
            max_visual_tokens,
            max_new_tokens=max_new_tokens,
            **kwargs,
        )
        return answer

    def stream_reply(
        self,
        messages: Sequence[Mapping[str, str]],
        videos: Sequence[Any] = (),
        *,
        instruction: str | None = None,
        window: Window | None = None,
        max_visual_tokens: int | None = None,
        max_new_tokens: int = 256,
        **kwargs: Any,
    ) -> Generator[str, None, Answer]:
        """Yield what `reply` returns piece by piece, then return it as a whole. Arguments as in `reply`."""
        return (
            yield from self._stream(
                _checked(messages),
                self._encoded_all(videos),
                instruction,
                window,
                max_visual_tokens,
                max_new_tokens=max_new_tokens,
                **kwargs,
            )
        )

    def conversation(self, video: Any) -> Conversation:
        """Start a conversation of many turns about a video; arguments as in `ask`."""
        return Conversation(self, self._encoded(video))

    @torch.inference_mode()
    def attention(
        self, video: EncodedVideo, question: str, *, instruction: str | None = None, window: Window | None = None
    ) -> CompressorOutput:
        """Return the visual tokens for a question together with the attention maps of both branches."""
        text = _instruction([{"role": "user", "content": question}], instruction)
        return self.model.model.compress(
            video.features_for(self.model),
            [video.num_frames],
            *instruction_inputs(self.model, self.processor, [text]),
            window=window,
            return_attention=True,
        )

    # The one generate path

    def _encoded(self, video: Any) -> list[EncodedVideo]:
        if isinstance(video, EncodedVideo):
            return [video]
        if isinstance(video, LiveVideo):
            return [video.video]
        if isinstance(video, list) and video and all(isinstance(v, EncodedVideo) for v in video):
            return video
        return [self.encode(video)]

    def _encoded_all(self, videos: Sequence[Any]) -> list[EncodedVideo]:
        return [each for video in videos for each in self._encoded(video)]

    def _visual_tokens(
        self, rows: list[list[EncodedVideo]], instructions: list[str], window: Window | None
    ) -> list[list[Tensor]]:
        """Return for every row the tokens `float[N, C]` of its videos, compressed for the row's instruction."""
        ready = [
            [video.tokens.get(steering_of(self.model, text, window)) for video in videos]
            for videos, text in zip(rows, instructions, strict=True)
        ]
        found = [[x for x in row if x is not None] for row in ready]
        if all(len(row) == len(videos) for row, videos in zip(found, rows, strict=True)):
            return found
        keys = [self._row_key(*pair) for pair in zip(rows, instructions, strict=True)]
        pairs = {key: pair for key, pair in zip(keys, zip(rows, instructions, strict=True), strict=True) if pair[0]}
        tokens: list[list[Tensor]] = []
        for some in _groups(list(pairs.values())):
            tokens += self._compress(some, window)
        of_key = dict(zip(pairs, tokens, strict=True))
        return [of_key.get(key, []) for key in keys]

    def _row_key(self, videos: list[EncodedVideo], text: str) -> tuple[Any, ...]:
        """Return what the tokens of a row depend on: rows that share it are compressed once."""
        return (*map(id, videos), text if self.model.config.is_conditional else "")

    def _compress(self, pairs: list[tuple[list[EncodedVideo], str]], window: Window | None) -> list[list[Tensor]]:
        """Return the tokens of the videos of every pair of videos and instruction, from one call of the compressor."""
        videos = list({id(video): video for row, _ in pairs for video in row}.values())
        place = {id(video): number for number, video in enumerate(videos)}
        parts = [video.features_for(self.model) for video in videos]
        keys = [part.keys for part in parts if part.keys is not None]
        # A single video is by far the usual case, and joining it with nothing would copy it.
        features = (
            parts[0]
            if len(parts) == 1
            else VisionFeatures(
                torch.cat([part.values for part in parts]), torch.cat(keys) if keys else None, parts[0].has_motion
            )
        )
        index = [place[id(video)] for row, _ in pairs for video in row]
        inputs = instruction_inputs(self.model, self.processor, [text for row, text in pairs for _ in row])
        once = index == list(range(len(videos)))
        num_frames = [video.num_frames for video in videos]
        tokens = iter(
            self.model.model.compress(
                features, num_frames, *inputs, window=window, video_index=None if once else index
            ).tokens
        )
        return [[next(tokens) for _ in row] for row, _ in pairs]

    def _prompt(
        self,
        conversations: list[list[dict[str, str]]],
        rows: list[list[EncodedVideo]],
        instructions: Sequence[str | None],
        window: Window | None,
        max_visual_tokens: int | None,
    ) -> _Prompt:
        """Compress the videos of every conversation and put their visual tokens into its prompt."""
        texts = [_instruction(*pair) for pair in zip(conversations, instructions, strict=True)]
        timings: dict[str, float] = {}
        for encoded in {id(video): video for videos in rows for video in videos}.values():
            for part, seconds in encoded.timings.items():
                timings[part] = timings.get(part, 0.0) + seconds
        if max_visual_tokens is not None:
            if window is not None:
                raise ValueError("window and max_visual_tokens both choose the window; pass one of them")
            most = max((video.num_frames for videos in rows for video in videos), default=1)
            window = self.processor.choose_window(most, max_visual_tokens)
        model, device = self.model.model, self.model.device
        with timed(timings, "compressor", device):
            compressed = self._visual_tokens(rows, texts, window)
        tokens = [x for row in compressed for x in row]
        rendered: list[list[dict[str, Any]]] = []
        for conversation, videos in zip(conversations, rows, strict=True):
            place = next(n for n, message in enumerate(conversation) if message["role"] == "user")
            content = [*({"type": "video"} for _ in videos), {"type": "text", "text": conversation[place]["content"]}]
            rendered.append([*conversation[:place], {"role": "user", "content": content}, *conversation[place + 1 :]])
        batch = self.processor.apply_chat_template(
            rendered,
            tokenize=True,
            add_generation_prompt=True,
            instruction=texts,
            video_num_frames=[video.num_frames for videos in rows for video in videos],
            window=window,
        )
        input_ids = batch["input_ids"].to(device)
        embeddings = model.get_input_embeddings()(input_ids)
        if tokens:
            embeddings = place_tokens(embeddings, input_ids, model.config.video_token_id, tuple(tokens), "video")
        return _Prompt(
            embeddings,
            batch["attention_mask"].to(device),
            texts,
            [sum(len(x) for x in row) for row in compressed],
            batch["attention_mask"].sum(-1).tolist(),
            [sum(video.num_patches for video in videos) for videos in rows],
            getattr(model.compressor, "window", None) if window is None else window,
            timings,
        )

    @torch.inference_mode()
    def _answer(
        self,
        conversations: list[list[dict[str, str]]],
        rows: list[list[EncodedVideo]],
        instructions: Sequence[str | None],
        window: Window | None,
        max_visual_tokens: int | None,
        **kwargs: Any,
    ) -> list[Answer]:
        prompt = self._prompt(conversations, rows, instructions, window, max_visual_tokens)
        with timed(prompt.timings, "LLM", self.model.device):
            ids = self.model.generate(
                inputs_embeds=prompt.inputs_embeds, attention_mask=prompt.attention_mask, **_sampling(kwargs)
            )
        best = ids[:: max(1, len(ids) // len(conversations))]
        return [self._make_answer(row, prompt, number) for number, row in enumerate(best)]

    def _make_answer(self, ids: Tensor, prompt: _Prompt, number: int) -> Answer:
        """Return the answer that generated tokens make, with what it cost."""
        answer = Answer(self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip())
        ends = torch.as_tensor(self.model.generation_config.eos_token_id, device=ids.device)
        found = torch.isin(ids, ends).nonzero()
        answer.is_cut = len(found) == 0
        answer.num_new_tokens = len(ids) if answer.is_cut else int(found[0]) + 1
        answer.num_visual_tokens = prompt.num_visual_tokens[number]
        answer.num_prompt_tokens = prompt.num_prompt_tokens[number]
        answer.num_uncompressed_tokens = prompt.num_uncompressed_tokens[number]
        answer.instruction = prompt.instructions[number]
        answer.window = prompt.window
        answer.timings = dict(prompt.timings)
        return answer

    def _stream(
        self,
        conversation: list[dict[str, str]],
        videos: list[EncodedVideo],
        instruction: str | None,
        window: Window | None,
        max_visual_tokens: int | None,
        **kwargs: Any,
    ) -> Generator[str, None, Answer]:
        with torch.inference_mode():
            prompt = self._prompt([conversation], [videos], [instruction], window, max_visual_tokens)
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_special_tokens=True)
        closed = Event()
        kwargs["stopping_criteria"] = StoppingCriteriaList([*kwargs.get("stopping_criteria", ()), _IsSet(closed)])

        @torch.inference_mode()
        def generate() -> Tensor:
            try:
                with timed(prompt.timings, "LLM", self.model.device):
                    return self.model.generate(
                        inputs_embeds=prompt.inputs_embeds,
                        attention_mask=prompt.attention_mask,
                        streamer=streamer,
                        **_sampling(kwargs),
                    )
            except BaseException:
                streamer.end()  # the caller waits for it, then meets the error in `result`
                raise

        generation = writers().submit(generate)
        # `ask` strips white space around the answer, so pieces hold white space back until text follows it.
        started, held = False, ""
        try:
            for piece in streamer:
                piece = held + piece if started else piece.lstrip()
                held = piece[len(piece.rstrip()) :]
                piece = piece.rstrip()
                if piece:
                    started = True
                    yield piece
        finally:
            closed.set()
            wait([generation])
        ids = generation.result()
        return self._make_answer(ids[0], prompt, 0)


def _groups(pairs: Sequence[tuple[list[EncodedVideo], str]]) -> Iterator[list[tuple[list[EncodedVideo], str]]]:
    """Yield the pairs in turn, as many at once as copy at most `MAX_COPIED` features; at least one."""
    group: list[tuple[list[EncodedVideo], str]] = []
    copied = 0
    for videos, text in pairs:
        size = sum(video.kept_features.values.numel() for video in videos)
        if group and copied + size > MAX_COPIED:
            yield group
            group, copied = [], 0
        group.append((videos, text))
        copied += size
    yield group


class _IsSet(StoppingCriteria):
    """Stops when an event is set."""

    def __init__(self, event: Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


@cache
def writers() -> ThreadPoolExecutor:
    """Return the threads in which streamed answers are generated.

    They are kept: where a thread that has multiplied matrices ends while another one multiplies, MKL (the CPU's BLAS of
    most builds of torch) may hang both, in the clean-up of its buffers.
    """
    return ThreadPoolExecutor(thread_name_prefix="hicom-writer")


# Threads do not survive a fork, so that a child needs its own.
os.register_at_fork(after_in_child=writers.cache_clear)


class Conversation:
    """Many turns about the same videos. Every new question compresses them anew, from the features kept.

    Attributes:
        messages: the turns so far, `{"role": "user" | "assistant", "content": text}`.
    """

    def __init__(self, chat: VideoChat, videos: list[EncodedVideo]) -> None:
        self.chat = chat
        self.videos = videos
        self.messages: list[dict[str, str]] = []

    def ask(
        self,
        question: str,
        *,
        instruction: str | None = None,
        window: Window | None = None,
        max_visual_tokens: int | None = None,
        max_new_tokens: int = 256,
        **kwargs: Any,
    ) -> Answer:
        """Answer the next question; arguments as in `VideoChat.ask`. A question that fails leaves no trace."""
        turn = {"role": "user", "content": question}
        messages = [*self.messages, turn]
        (answer,) = self.chat._answer(
            [messages], [self.videos], [instruction], window, max_visual_tokens, max_new_tokens=max_new_tokens, **kwargs
        )
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        return answer

    def stream(
        self,
        question: str,
        *,
        instruction: str | None = None,
        window: Window | None = None,
        max_visual_tokens: int | None = None,
        max_new_tokens: int = 256,
        **kwargs: Any,
    ) -> Iterator[str]:
        """Yield the next answer piece by piece; it joins the conversation once it is complete."""
        messages = [*self.messages, {"role": "user", "content": question}]
        pieces = []
        for piece in self.chat._stream(
            messages, self.videos, instruction, window, max_visual_tokens, max_new_tokens=max_new_tokens, **kwargs
        ):
            pieces.append(piece)
            yield piece
        self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]


def find_model(name: str | Path) -> Path:
    """Return the folder of a model: an embedded one by name, a local folder, or a download from the hub.

    Raises:
        ValueError: there is none.
    """
    embedded = Path(str(files("hicom"))) / "assets"
    if str(name) in embedded_models():
        return embedded / str(name)
    try:
        return resolve_folder(name)
    except ValueError as error:
        raise ValueError(f"{error}; embedded models: {', '.join(embedded_models()) or 'none'}") from None


def embedded_models() -> list[str]:
    """Return the names of the models inside this package."""
    folder = Path(str(files("hicom"))) / "assets"
    return sorted(path.parent.name for path in folder.glob("*/config.json"))


def _precision(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return a precision given by itself or by name."""
    if isinstance(dtype, str):
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"dtype={dtype!r} is not a precision of torch; try float32, bfloat16 or float16")
        return found
    return dtype


def _default_precision(folder: Path, device: str | None) -> torch.dtype | None:
    """Return the precision that a model computes in where none is asked for; None: the one that it is stored in."""
    if device == "cpu":
        return torch.float32
    is_gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    is_float32 = config.get("dtype", config.get("torch_dtype")) == "float32"
    # Twice the memory and several times the time, for digits that such a model was not trained to need.
    return torch.bfloat16 if is_gpu and is_float32 else None


def _instruction(conversation: list[dict[str, str]], instruction: str | None) -> str:
    """Return what steers the compressor: `instruction`, or that of the last user turn."""
    question = next(m["content"] for m in reversed(conversation) if m["role"] == "user")
    if not question.strip():
        raise ValueError("the question is empty; ask something about the video")
    if instruction is not None and not instruction.strip():
        raise ValueError("the instruction is empty; leave it out to use the question")
    return extract_instruction(question) if instruction is None else instruction


def _checked(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Return the messages of a conversation that can be answered."""
    conversation = [{"role": str(each["role"]), "content": str(each["content"])} for each in messages]
    if not conversation or conversation[-1]["role"] != "user":
        raise ValueError("the last message must be of the user")
    return conversation


def _sampling(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of `generate`; greedy unless asked otherwise, whatever a checkpoint's defaults are."""
    return {"do_sample": False} | kwargs
