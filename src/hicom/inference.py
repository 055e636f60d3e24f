"""Ask questions about videos: encode a video once, ask many times (the one path to `generate`)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from threading import Event
from typing import Any, Literal, Self, overload

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from .data.cache import FeatureCache
from .data.domain import Domain, load_domain
from .encoding import EncodedVideo, LiveVideo, encode_video, instruction_inputs, steering_of, timed
from .model.compressor import CompressorOutput
from .model.convert import describe_official, is_official, tensor_headers
from .model.generation import Drafter, PromptError
from .model.hub import find_model, read_json
from .model.instruction import check_instruction, extract_instruction
from .model.modeling import HIComForConditionalGeneration, VisionFeatures, place_tokens
from .model.official import official_processor
from .model.ops import Window
from .model.processing import HIComProcessor

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
        notes: what to know before it is believed, a sentence each: that the model is a toy (`HIComConfig.toy`), that a
            video is unlike what it was trained on (`VideoChat.caution`). Empty where there is nothing to say.
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
    notes: tuple[str, ...]
    timings: dict[str, float]

    @property
    def text(self) -> str:
        """The answer as a plain string."""
        return str.__str__(self)


@dataclass
class _Prompt:
    """Prompts ready for the LLM, and what they cost."""

    input_ids: Tensor
    inputs_embeds: Tensor
    attention_mask: Tensor
    instructions: list[str]
    num_visual_tokens: list[int]
    num_prompt_tokens: list[int]
    num_uncompressed_tokens: list[int]
    window: Window | None
    notes: list[tuple[str, ...]]
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
        # True, as it is of the release, and nothing that a user could act upon.
        warnings.filterwarnings("ignore", message="Passing `repetition_penalty` with `inputs_embeds`")
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
        vision_tower: str | Path | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
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
            vision_tower: folder or hub id of the dual encoder that a checkpoint of the official release was trained
                with; None: where the checkpoint says, or who publishes it.
            revision: branch, tag or commit of a hub id.
            token: for private and gated models of the hub.
            cache_dir: folder for downloads; None: the hub's own cache.
            **kwargs: passed on to `from_pretrained` of transformers, for example `device_map` or `quantization_config`.

        Raises:
            ValueError: the folder is no model, lacks files, or its tensors do not fit; the message names them.
        """
        folder = find_model(name, revision=revision, token=token, cache_dir=cache_dir)
        headers = tensor_headers(folder)  # what is wrong with the files is said by name before anything is loaded
        if device is None and "device_map" not in kwargs:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        precision = _precision(dtype)
        if precision is None:
            precision = _default_precision(folder, device)
        if device is not None and kwargs.get("quantization_config") is not None:
            # Quantised weights are put where they belong as they load, and some cannot be moved later.
            kwargs.setdefault("device_map", device)
            device = None
        if is_official(folder):
            checkpoint = describe_official(
                name, folder, headers, vision_tower=vision_tower, token=token, cache_dir=cache_dir
            )
            model = checkpoint.load(precision, **kwargs)
            processor = official_processor(checkpoint, model)
        else:
            _check_files(name, folder, vision_tower)
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
            source: anything `hicom.read_frames` reads, or what `hicom.video.open_frames` opened.
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

    def notes(self, videos: Sequence[EncodedVideo] = ()) -> tuple[str, ...]:
        """Return what to know before answers about these videos are believed; every `Answer` brings it along."""
        cautions = [self.caution(video) for video in videos]
        return tuple(dict.fromkeys(note for note in (self.model.config.toy_note, *cautions) if note))

    @overload
    def ask(self, video: Any, question: str, *, num_return_sequences: int, **kwargs: Any) -> list[Answer]: ...
    @overload
    def ask(
        self, video: Any, question: Sequence[str], *, num_return_sequences: int, **kwargs: Any
    ) -> list[list[Answer]]: ...
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
    ) -> Any:
        """Answer one question, or many in one batch.

        With `num_return_sequences` above 1 every question has a list of answers.

        Args:
            video: an `EncodedVideo`, a `LiveVideo` as it is now, a list of encoded ones (all go into the prompt, in
                order), or a source to encode first.
            question: one question or several; each steers the compression of its own prompt.
            instruction: what steers the compressor in place of the question.
            window: (T, H, W) of the local branch in place of the model's.
            max_visual_tokens: budget a video that picks the window instead.
            max_new_tokens: longest answer; it also ends where the LLM's context does (`Answer.is_cut`), in a batch that
                of the longest prompt.
            **kwargs: arguments of `generate`, for example `do_sample=True, temperature=0.7` or `num_beams=3`. An
                `assistant_model` is the model itself, a HICom model with the same vision tower, or a language model.

        Raises:
            PromptError: the prompt is longer than the LLM's context; it is refused before the work, and texts that are
                too long alone before a video is read.
            ValueError: a question is empty or has `<video>` in it, the budget is too small, the video cannot be read,
                or an argument asks for what an answer does not hold (scores and the like).
        """
        questions = [question] if isinstance(question, str) else list(question)
        conversations = [[{"role": "user", "content": text}] for text in questions]
        self.check_texts(conversations)
        videos = [self._encoded(video)] * len(questions)
        instructions = [instruction] * len(questions)
        answers = _flat(
            self._answer(
                conversations, videos, instructions, window, max_visual_tokens, max_new_tokens=max_new_tokens, **kwargs
            )
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
    ) -> list[Any]:
        """Answer every question about its own video, all in one batch: an `Answer` each, or a list of them as in `ask`.

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
        self.check_texts(conversations)
        rows = [self._encoded(video) for video in videos]
        return _flat(self._answer(conversations, rows, given, window, None, max_new_tokens=max_new_tokens, **kwargs))

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
        self.check_texts([conversation])
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
        self.check_texts([conversation])
        self._check_single(kwargs)
        ((answer,),) = self._answer(
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
        conversation = _checked(messages)
        self.check_texts([conversation])
        return (
            yield from self._stream(
                conversation,
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

    def check_texts(self, conversations: Sequence[Sequence[Mapping[str, str]]]) -> None:
        """Refuse texts that cannot be answered whatever the videos are, before one is read.

        Raises:
            PromptError: they are longer than the LLM's context.
            ValueError: a question is empty, or has a placeholder of media in it.
        """
        limit = self.model.config.context_length
        for conversation in conversations:
            texts = [message["content"] for message in conversation]
            size = sum(map(len, texts))
            if limit is not None and size > limit * self._longest_token:  # even counting tokens takes time
                raise PromptError(
                    f"the prompt has {size:,} characters, far more than the {limit:,} tokens that the language model "
                    "was made for (max_position_embeddings): shorten it"
                )
            users = [message["content"] for message in conversation if message["role"] == "user"]
            if not extract_instruction(users[-1]):
                raise ValueError("the question is empty; ask something about the video")
            self._check_placeholders(conversation, users[0])
            if limit is not None and size > limit:
                ids = self.processor.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
                self._check_lengths([sum(map(len, ids))], [0])

    def _check_placeholders(self, conversation: Sequence[Mapping[str, str]], first: str) -> None:
        """Raise ValueError where a text has placeholders of media, but for those that datasets write in front."""
        tokens = {"<video>", "<image>", self.processor.video_token, self.processor.image_token}
        begin = first.lstrip()
        while found := next((token for token in tokens if begin.startswith(token)), None):
            begin = begin[len(found) :].lstrip()
        texts = [begin if message["content"] is first else message["content"] for message in conversation]
        if found := next((token for token in tokens for text in texts if token in text), None):
            raise ValueError(
                f"{found} stands for a video or picture wherever it is written, and those given have their places: "
                "leave it out, or say it in other words"
            )

    def _check_lengths(self, lengths: Sequence[int], num_visual: Sequence[int]) -> None:
        """Raise PromptError where a prompt leaves no room for an answer in the LLM's context.

        Args:
            lengths: tokens of each prompt.
            num_visual: visual ones of them.
        """
        limit = self.model.config.context_length
        longest, visual = max(zip(lengths, num_visual, strict=True))
        if limit is not None and longest >= limit:
            remedy = "choose fewer frames, or a budget of visual tokens" if visual else "shorten it"
            raise PromptError(
                f"the prompt has {longest:,} tokens, {visual:,} of them visual, and with an answer they are more than "
                f"the {limit:,} that the language model was made for (max_position_embeddings): {remedy}"
            )

    @cached_property
    def _longest_token(self) -> int:
        """Characters of the longest token."""
        return max(map(len, self.processor.tokenizer.get_vocab()))

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
        rendered: list[list[dict[str, Any]]] = []
        for conversation, videos in zip(conversations, rows, strict=True):
            place = next(n for n, message in enumerate(conversation) if message["role"] == "user")
            content = [*({"type": "video"} for _ in videos), {"type": "text", "text": conversation[place]["content"]}]
            rendered.append([*conversation[:place], {"role": "user", "content": content}, *conversation[place + 1 :]])
        batch = self.processor.apply_chat_template(
            rendered,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_generation_prompt=True,
            video_num_frames=[video.num_frames for videos in rows for video in videos],
            window=window,
            compression="unguided",  # as many tokens; the instruction is in those above already
        )
        lengths = batch["attention_mask"].sum(-1).tolist()
        counts = [sum(self.processor.token_count(video.num_frames, window) for video in videos) for videos in rows]
        self._check_lengths(lengths, counts)
        model, device = self.model.model, self.model.device
        with timed(timings, "compressor", device):
            compressed = self._visual_tokens(rows, texts, window)
        tokens = [x for row in compressed for x in row]
        input_ids = batch["input_ids"].to(device)
        embeddings = model.get_input_embeddings()(input_ids)
        if tokens:
            embeddings = place_tokens(embeddings, input_ids, model.config.video_token_id, tuple(tokens), "video")
        return _Prompt(
            input_ids,
            embeddings,
            batch["attention_mask"].to(device),
            texts,
            [sum(len(x) for x in row) for row in compressed],
            lengths,
            [sum(video.num_patches for video in videos) for videos in rows],
            getattr(model.compressor, "window", None) if window is None else window,
            [self.notes(videos) for videos in rows],
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
    ) -> list[list[Answer]]:
        """Return the answers to every conversation, as many as are asked for."""
        self._check_arguments(kwargs)
        steering = (conversations, rows, instructions, window, max_visual_tokens)
        prompt = self._prompt(*steering)
        self._bring_assistant(kwargs, *steering)
        with timed(prompt.timings, "LLM", self.model.device):
            ids = self._generate(prompt, kwargs)
        number = len(ids) // len(conversations)
        return [
            [self._make_answer(row, prompt, place) for row in found] for place, found in enumerate(ids.split(number))
        ]

    def _generate(self, prompt: _Prompt, kwargs: dict[str, Any]) -> Tensor:
        """Return the tokens that the model writes, `int[B, N]`."""
        model, length = self.model, 0
        if (limit := model.config.context_length) is not None:  # the answer ends where the context does
            kwargs = kwargs | {"max_new_tokens": min(kwargs["max_new_tokens"], limit - max(prompt.num_prompt_tokens))}
        inputs = {"inputs_embeds": prompt.inputs_embeds, "attention_mask": prompt.attention_mask}
        # Greedy unless asked otherwise, whatever a checkpoint's defaults are: so the release asks its models, whose
        # `generation_config.json`, Qwen2.5's, samples; the rest of it counts, such as a penalty and several end tokens.
        settings = {"do_sample": False, "return_dict_in_generate": False} | kwargs
        if model.is_assisted(settings):
            # Drafted tokens stand behind those of the prompt, which what looks back at tokens does not see otherwise.
            inputs["input_ids"], length = prompt.input_ids, prompt.input_ids.shape[1]
            if model.chosen("no_repeat_ngram_size", settings):
                raise ValueError("no_repeat_ngram_size does not work with speculative decoding; leave one of them out")
        penalty = model.chosen("repetition_penalty", settings) or 1.0
        if penalty != 1.0:
            penalise = RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=length)
            given = LogitsProcessorList([*(settings.get("logits_processor") or ()), penalise])
            settings |= {"repetition_penalty": 1.0, "logits_processor": given}
        return torch.as_tensor(model.generate(**inputs, **settings))[:, length:]

    def _check_arguments(self, kwargs: Mapping[str, Any]) -> None:
        """Raise ValueError where arguments ask for more than an answer holds."""
        names = ("scores", "logits", "attentions", "hidden_states")
        for name in ("return_dict_in_generate", *(f"output_{each}" for each in names)):
            if kwargs.get(name):
                raise ValueError(f"{name}: an answer holds its text and what it cost; for more call model.generate")

    def _check_single(self, kwargs: dict[str, Any]) -> None:
        """Raise ValueError where several answers are asked for and one is returned."""
        number = self.model.chosen("num_return_sequences", kwargs)
        if number is not None and number > 1:
            raise ValueError(f"num_return_sequences={number}: here one answer is returned; `ask` returns several")

    def _bring_assistant(self, kwargs: dict[str, Any], *steering: Any) -> None:
        """Have another HICom model that drafts see the videos with its own compressor and language model."""
        assistant = kwargs.get("assistant_model")
        if assistant is self.model or not isinstance(assistant, HIComForConditionalGeneration):
            return
        if not _same_tower(assistant, self.model):
            raise ValueError(
                "the assistant_model has another vision tower than the model, and the video was encoded with the "
                "model's: call model.generate with the frames, or leave it out"
            )
        try:
            drafted = VideoChat(assistant, self.processor)._prompt(*steering)
        except ValueError as error:
            raise ValueError(f"the assistant_model does not fit this prompt: {error}") from error
        kwargs["assistant_model"] = Drafter(assistant, drafted.inputs_embeds)

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
        answer.notes = prompt.notes[number]
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
        self._check_single(kwargs)
        self._check_arguments(kwargs)
        steering = ([conversation], [videos], [instruction], window, max_visual_tokens)
        with torch.inference_mode():
            prompt = self._prompt(*steering)
            self._bring_assistant(kwargs, *steering)
        # The first tokens that it is given are those of the prompt, or none.
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        closed = Event()
        kwargs["stopping_criteria"] = StoppingCriteriaList([*kwargs.get("stopping_criteria", ()), StopsWhenSet(closed)])

        @torch.inference_mode()
        def generate() -> Tensor:
            try:
                with timed(prompt.timings, "LLM", self.model.device):
                    return self._generate(prompt, kwargs | {"streamer": streamer})
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


class StopsWhenSet(StoppingCriteria):
    """Stops a generation when an event is set, for `stopping_criteria` of `ask` and the like.

    Args:
        event: to be set from another thread.
    """

    def __init__(self, event: Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.Tensor:
        """Return whether each answer is to stop, `bool[B]`."""
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


@cache
def writers() -> ThreadPoolExecutor:
    """Return the threads in which streamed answers are generated.

    They are kept: where a thread that has multiplied matrices ends while another one multiplies, MKL (the CPU's BLAS of
    most builds of torch) may hang both, in the clean-up of its buffers.
    """
    return ThreadPoolExecutor(thread_name_prefix="hicom-writer")


# Threads do not survive a fork, so that a child needs its own. Windows has no fork.
if hasattr(os, "register_at_fork"):
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
        self.chat.check_texts([messages])
        self.chat._check_single(kwargs)
        ((answer,),) = self.chat._answer(
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
        self.chat.check_texts([messages])
        pieces = []
        for piece in self.chat._stream(
            messages, self.videos, instruction, window, max_visual_tokens, max_new_tokens=max_new_tokens, **kwargs
        ):
            pieces.append(piece)
            yield piece
        self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]


def _check_files(name: str | Path, folder: Path, vision_tower: str | Path | None) -> None:
    """Raise ValueError where a folder is no model in this library's layout, or lacks files."""
    if read_json(folder / "config.json").get("model_type") != "hicom":
        raise ValueError(f"{name}: not a HICom checkpoint (model_type in config.json is not 'hicom')")
    if vision_tower is not None:
        raise ValueError(
            f"vision_tower={str(vision_tower)!r} goes with a checkpoint of the official release; {name} holds its own"
        )
    files = ("processor_config.json", "tokenizer_config.json", "tokenizer.json")
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise ValueError(f"{name}: {', '.join(missing)} missing; save the processor into the model's folder")


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
    return extract_instruction(question) if instruction is None else check_instruction(instruction)


def _checked(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Return the messages of a conversation that can be answered."""
    conversation = [{"role": str(each["role"]), "content": str(each["content"])} for each in messages]
    if not conversation or conversation[-1]["role"] != "user":
        raise ValueError("the last message must be of the user")
    return conversation


def _flat(answers: list[list[Answer]]) -> list[Any]:
    """Return one answer a question where there is one, else a list of them."""
    return [found[0] if len(found) == 1 else found for found in answers]


def _same_tower(one: HIComForConditionalGeneration, other: HIComForConditionalGeneration) -> bool:
    """Whether two models make the same features of a frame."""
    if one.config.vision_feature_layer != other.config.vision_feature_layer:
        return False
    weights, others = (model.model.vision_tower.state_dict() for model in (one, other))
    return weights.keys() == others.keys() and all(
        weights[name].shape == others[name].shape and torch.equal(weights[name].to(others[name]), others[name])
        for name in weights
    )
