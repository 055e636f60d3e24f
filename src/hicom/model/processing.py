"""The processor: prompts, videos and images to the tensors that the model takes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from ..square import Square
from ..video import FrameReader, VideoFrames, open_frames, read_frames
from .baselines import build_compressor
from .call_options import GROUPS, CallOptions, check_total_pixels, known_names
from .compressor import Compression
from .config import HIComConfig
from .conversation import ChatRenderer, as_texts, choose_template, refuse_without_tokens, split_variables
from .dual_encoder import CLIP_NORMALISATION, tokenize_instructions
from .hub import local_name
from .instruction import MAX_INSTRUCTION, check_instruction, extract_instruction
from .media_inputs import Kind, Medium, as_media, check_places, frame_choice, load_source, metadata_of, with_metadata
from .ops import Window, check_window, choose_window, token_count
from .pixels import check_frames, to_pixels
from .token_rows import Layout, tokenize_rows
from .turns import UserTurns, last_turn_or_text

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML, for LLMs whose tokenizer brings no template of its own."""
OWN_ARGUMENTS = (
    "images",
    "text",
    "videos",
    "audio",
    "instruction",
    "video_num_frames",
    "window",
    "compression",
    "answer_starts",
    "assistant_spans",
)
"""Arguments of a call beside the standard ones."""
_GIVEN_BESIDE = {"videos": ("videos", "video_num_frames"), "images": ("images",)}


WAYS = {"pixels": ("exact", "fast"), "image_aspect_ratio": ("pad", "square"), "short_videos": ("once", "repeat")}
"""How a processor makes pixels of videos: what each of these arguments may be."""


class HIComProcessor(ProcessorMixin):
    """Makes model inputs of prompts and media; saved and loaded beside the model.

    Args:
        tokenizer: the LLM's.
        instruction_tokenizer: the instruction encoder's; the LLM's serves for models that no instruction steers.
        image_size: height and width of the frames that the vision tower takes, in pixels.
        grid_size: height and width of the patch grid of one frame.
        image_mean: mean of the pixel values, from 0 to 1, for red, green and blue.
        image_std: their standard deviation.
        num_frames: frames of a video unless a call says otherwise.
        window: (T, H, W) of the local branch; None without one.
        num_global_tokens: tokens of the global branch.
        num_pointers: tokens that say where and when the instruction matches.
        is_conditional: whether an instruction steers the compressor.
        compressor: the model's compressor.
        compressor_options: keyword arguments of a baseline.
        max_instruction_length: longest instruction in tokens; all are padded to it.
        mask_instruction: whether the instruction encoder takes an attention mask (CLIP does, SigLIP does not).
        pixels: `fast` scales frames in the decoder; `exact` makes of every whole frame what Pillow would, as released
            weights had it in training, at a cost (`docs/results/pixels.md`).
        image_aspect_ratio: `pad` puts frames into the middle of a square of the mean colour; `square` squeezes them.
        short_videos: `once` takes every frame of a video with fewer than `num_frames` frames once; `repeat` fills up
            with repeated ones, spread evenly, as released weights had it in training.
        video_token: placeholder of a video in prompts.
        image_token: placeholder of an image.
        chat_template: Jinja template; None: the tokenizer's own, else ChatML.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        instruction_tokenizer: PreTrainedTokenizerBase,
        image_size: int = 384,
        grid_size: int = 27,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        num_frames: int = 32,
        window: Window | None = (4, 3, 3),
        num_global_tokens: int = 32,
        num_pointers: int = 0,
        is_conditional: bool = True,
        compressor: str = "hicom",
        compressor_options: dict[str, Any] | None = None,
        max_instruction_length: int = 64,
        mask_instruction: bool = False,
        pixels: Literal["exact", "fast"] = "fast",
        image_aspect_ratio: Literal["pad", "square"] = "pad",
        short_videos: Literal["once", "repeat"] = "once",
        video_token: str = "<video>",
        image_token: str = "<image>",
        chat_template: str | None = None,
    ) -> None:
        self.image_size = image_size
        self.grid_size = grid_size
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.num_frames = num_frames
        self.window = None if window is None else check_window(window)
        self.num_global_tokens = num_global_tokens
        self.num_pointers = num_pointers
        self.is_conditional = is_conditional
        self.compressor = compressor
        self.compressor_options = compressor_options
        self.max_instruction_length = max_instruction_length
        self.mask_instruction = mask_instruction
        self.pixels = pixels
        self.image_aspect_ratio = image_aspect_ratio
        self.short_videos = short_videos
        for name, known in WAYS.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: give one of {', '.join(known)}")
        self.video_token = video_token
        self.image_token = image_token
        for token in (video_token, image_token):
            if token not in tokenizer.get_vocab():
                raise ValueError(f"the tokenizer does not know the placeholder {token!r}; add it as a special token")
        super().__init__(
            tokenizer,
            instruction_tokenizer,
            chat_template=chat_template or tokenizer.chat_template or CHAT_TEMPLATE,
        )
        self.video_token_id = int(tokenizer.convert_tokens_to_ids(video_token))
        self.image_token_id = int(tokenizer.convert_tokens_to_ids(image_token))
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"  # as generation needs it; files of most LLMs say right
        self._other_templates: list[str] = []

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a processor as `transformers` does; the name of an embedded model will do."""
        # The tokenizers look at the model's configuration, and warn about a type they do not know.
        AutoConfig.register(HIComConfig.model_type, HIComConfig, exist_ok=True)
        return super().from_pretrained(local_name(pretrained_model_name_or_path), *args, **kwargs)

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Read the processor's own file, as `transformers` does; without one, its defaults would be taken in silence.

        Raises:
            ValueError: there is none.
        """
        fields, rest = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if "image_size" not in fields:
            raise ValueError(
                f"{pretrained_model_name_or_path} has no processor_config.json of HICom; a checkpoint of the official "
                f"release is converted first: hicom convert {pretrained_model_name_or_path} DST"
            )
        return fields, rest

    @classmethod
    def from_config(
        cls,
        config: HIComConfig,
        tokenizer: PreTrainedTokenizerBase,
        instruction_tokenizer: PreTrainedTokenizerBase,
        **kwargs: Any,
    ) -> HIComProcessor:
        """Return the processor that fits a model's configuration; `kwargs` are further arguments of the constructor."""
        is_clip = config.vision_config.model_type == "clip_vision_model"
        mean, std = CLIP_NORMALISATION
        clip: dict[str, Any] = {"image_mean": mean, "image_std": std, "mask_instruction": True}
        return cls(
            tokenizer,
            instruction_tokenizer,
            image_size=config.image_size,
            grid_size=config.grid_size,
            window=config.window,
            num_global_tokens=config.num_global_tokens,
            num_pointers=config.num_pointers,
            is_conditional=config.is_conditional,
            compressor=config.compressor,
            compressor_options=config.compressor_options,
            max_instruction_length=config.max_instruction_length,
            **((clip if is_clip else {}) | kwargs),
        )

    # Counting

    @cached_property
    def _baseline(self) -> Any:
        # Baselines count for themselves; their width does not matter for that.
        return build_compressor(self.compressor, dim=128, out_dim=8, **(self.compressor_options or {}))

    def token_count(
        self, num_frames: int, window: Window | None = None, compression: Compression = "conditional"
    ) -> int:
        """Return the visual tokens of a video of `num_frames` frames; an image is one frame."""
        grid = self.grid_size
        if self.compressor != "hicom":
            return int(self._baseline.token_count(num_frames, grid, grid, window))
        if compression == "off":
            return token_count(num_frames, grid, grid, (1, 1, 1), 0)
        return token_count(num_frames, grid, grid, window or self.window, self.num_global_tokens + self.num_pointers)

    def choose_window(self, num_frames: int, max_visual_tokens: int) -> Window:
        """Return the window that spends a budget of visual tokens on a video of `num_frames` frames."""
        if self.compressor != "hicom" or self.window is None:
            raise ValueError("max_visual_tokens chooses the window of the local branch, which this model has not")
        num_others = self.num_global_tokens + self.num_pointers
        return choose_window(num_frames, self.grid_size, self.grid_size, max_visual_tokens, num_others)

    # Media

    def pixel_values(self, frames: np.ndarray) -> Tensor:
        """Turn frames into what the vision tower takes: squares (padded or squeezed), resized, normalised.

        Args:
            frames: `uint8[T, H, W, 3]`.

        Returns:
            `float32[T, 3, S, S]`.
        """
        size = self.reading_size
        if isinstance(size, Square):
            frames = np.stack([size.make(frame) for frame in check_frames(frames)])
        return to_pixels(frames, self.image_size, self.image_mean, self.image_std)

    @property
    def reading_size(self) -> int | Square:
        """Size that `read_frames` gives frames for this model, so that memory never holds them whole.

        Squeezed frames are always made exactly: the decoder would keep too few rows of a wide one.
        """
        if self.image_aspect_ratio == "square":
            return Square(self.image_size, None)
        red, green, blue = (int(mean * 255) for mean in self.image_mean)
        return Square(self.image_size, (red, green, blue)) if self.pixels == "exact" else self.image_size

    @property
    def reading_options(self) -> dict[str, Any]:
        """The same, and whether short videos are filled up, in plain values for another process."""
        size = self.reading_size
        options: dict[str, Any] = {"size": self.image_size}
        if isinstance(size, Square):
            options |= {"is_square": True, "color": size.color}
        if self.short_videos == "repeat":
            options["repeat"] = True
        return options

    @property
    def pixels_key(self) -> dict[str, Any]:
        """All that pixels depend on beside the video and the choice of its frames, for keys of caches."""
        names = ("image_size", "image_mean", "image_std", "pixels", "image_aspect_ratio", "short_videos")
        return {name: getattr(self, name) for name in names}

    def open_video(self, source: Any, **choice: Any) -> FrameReader:
        """Open a video to read its chosen frames in chunks; arguments as in `read_video`."""
        return open_frames(source, size=self.reading_size, **self._choice(choice))

    def _choice(self, choice: dict[str, Any]) -> dict[str, Any]:
        choice = {name: value for name, value in choice.items() if value is not None}
        if not {"num_frames", "fps", "timestamps_s", "max_frames"} & set(choice):
            choice["num_frames"] = self.num_frames
        return {"repeat": self.short_videos == "repeat"} | choice

    def read_video(self, source: Any, **choice: Any) -> VideoFrames:
        """Read the chosen frames of a video, in the size that the vision tower takes.

        Args:
            source: anything `hicom.read_frames` reads, or frames it has read.
            **choice: frame choice as in `hicom.read_frames`; default `num_frames` of this processor.
        """
        if isinstance(source, VideoFrames):
            return source
        return read_frames(source, size=self.reading_size, **self._choice(choice))

    # Text

    def instruction_inputs(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Tokenise instructions: `int[V, L]` padded to full length, and `int[V, L]` attention mask where one is taken.

        Warns:
            InstructionWarning: an instruction was too long and is cut.
        """
        batch = tokenize_instructions(self.instruction_tokenizer, instructions, self.max_instruction_length)
        return batch["input_ids"], batch["attention_mask"] if self.mask_instruction else None

    @property
    def _tokens(self) -> dict[Kind, str]:
        """The placeholders, by kind of media."""
        return {"video": self.video_token, "image": self.image_token}

    def _media_kinds(self, text: str) -> list[Kind]:
        """Return the kinds of the placeholders of a prompt, in reading order."""
        kinds = {token: kind for kind, token in self._tokens.items()}
        return [kinds[token] for token in re.findall("|".join(map(re.escape, kinds)), text)]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        *,
        instruction: str | Sequence[str] | None = None,
        video_num_frames: Sequence[int] | None = None,
        window: Window | None = None,
        compression: Compression = "conditional",
        answer_starts: Sequence[int] | None = None,
        assistant_spans: Sequence[Sequence[tuple[int, int]]] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Make model inputs; order and meaning of the arguments are those of transformers' processors.

        Args:
            images: an image (path, URL, PIL image, array or tensor of height, width and channels in either order), a
                list in reading order over all prompts, or a list of lists, one a prompt.
            text: prompts, with a placeholder for every medium. `apply_chat_template` makes them of conversations.
            videos: likewise: anything `hicom.read_frames` reads, a URL, an array or tensor of frames, a list of
                pictures, `VideoFrames`, or a dictionary like a message's part, with options of this video alone.
            audio: nothing; the model hears nothing.
            instruction: what steers the compressor, for all prompts or one a prompt; None: the prompt's last user turn.
            video_num_frames: frames of every video, for features kept from `encode_frames`, in place of `videos`.
            window: (T, H, W) that the model will be called with, in place of the default.
            compression: mode that the model will be called with.
            answer_starts: where in each text the answer starts, in characters; adds `labels` with the loss on it alone.
            assistant_spans: where in each text answers stand, first and last character; adds `assistant_masks`.
            **kwargs: the standard arguments of processors, by themselves or in `text_kwargs`, `images_kwargs` and
                `videos_kwargs`. Of texts: `padding`, `padding_side` (default: the tokenizer's, made left when a
                processor is made), `pad_to_multiple_of`, `truncation`, `max_length`, `add_special_tokens` (default
                False: chat templates write them), `return_attention_mask`, `return_mm_token_type_ids` and
                `return_tensors` (`pt`, `np`, or None for lists of tokens beside tensors of media). Of videos:
                `num_frames`, `fps`, `timestamps_s`, `start_s`, `end_s`, `max_frames`, `source_fps`, `snap`,
                `do_sample_frames` (False: all frames), `video_metadata` and `return_metadata`. Others are taken where
                they change nothing.

        Returns:
            `input_ids`, `attention_mask` and what there is of `pixel_values_videos`, `video_num_frames`,
            `instruction_input_ids`, `instruction_attention_mask`, `pixel_values`, `image_instruction_input_ids`,
            `image_instruction_attention_mask` and `labels`, under the names of the model's arguments.

        Raises:
            ValueError: media and placeholders differ in number; an argument is unknown, or would change the result and
                cannot.
        """
        options = self._options(kwargs)
        if images is None and text is None and videos is None:
            raise ValueError("there is nothing to process; give text, images or videos")
        if compression not in get_args(Compression):
            raise ValueError(f"compression={compression!r}: give one of {', '.join(get_args(Compression))}")
        if audio is not None and not (isinstance(audio, list | tuple) and not audio):
            raise ValueError("audio is given, but HICom models hear nothing; leave it out")
        layout = Layout.of(options.text, self.tokenizer)
        texts = as_texts(text, images, self._tokens)
        all_videos, videos_per_prompt = as_media("video", videos, self.image_size)
        all_images, images_per_prompt = as_media("image", images, self.image_size)
        if all_videos and video_num_frames is not None:
            raise ValueError("videos and video_num_frames are both given; the second is for features kept of them")
        frames = [] if video_num_frames is None else list(video_num_frames)
        kinds = [self._media_kinds(prompt) for prompt in texts or ()]
        if texts is not None:  # before anything is read
            places = {kind: [prompt.count(kind) for prompt in kinds] for kind in ("video", "image")}
            check_places("video", places["video"], len(all_videos) or len(frames), videos_per_prompt)
            check_places("image", places["image"], len(all_images), images_per_prompt)
        data: dict[str, Any] = {}
        if all_videos:
            frames = self._add_videos(data, all_videos, options)
        if all_images:
            data["pixel_values"] = torch.cat([self._image_pixels(medium, options) for medium in all_images])
        if frames:
            data["video_num_frames"] = torch.tensor(frames)
        if texts is not None:
            counts = {
                self.video_token_id: [self.token_count(n, window, compression) for n in frames],
                self.image_token_id: [self.token_count(1, window, compression)] * len(all_images),
            }
            rows = tokenize_rows(self.tokenizer, texts, counts, options.text, answer_starts, assistant_spans)
            data = layout.batch(rows, counts, self.tokenizer.pad_token_id) | data
            if self.is_conditional and compression == "conditional":
                data |= self._instructions(texts, kinds, instruction)
        if options.text.get("return_tensors") == "np":
            data = {name: x.numpy() if isinstance(x, Tensor) else x for name, x in data.items()}
        return BatchFeature(data)

    def _options(self, given: dict[str, Any]) -> CallOptions:
        """Return the standard arguments of a call, checked."""
        defaults = {group: getattr(self, group, None) or {} for group in GROUPS}
        own = (self.image_mean, self.image_std)
        options = CallOptions.of(given, defaults, self.image_size, own, OWN_ARGUMENTS)
        for device in (options.images.get("device"), options.videos.get("device")):
            try:
                torch.device("cpu" if device is None else device)
            except (RuntimeError, TypeError) as error:
                raise ValueError(f"device={device!r} is none that PyTorch knows") from error
        return options

    def _add_videos(self, data: dict[str, Any], media: list[Medium], options: CallOptions) -> list[int]:
        """Read videos into `data`, and return how many frames each has."""
        read, counts = [], []
        for medium in with_metadata(media, options.videos.get("video_metadata")):
            source, choice = frame_choice(medium, options.videos)
            video = self.read_video(source, **choice)
            total = medium.options.get("total_pixels", options.videos.get("total_pixels"))
            check_total_pixels(total, len(video.frames), self.image_size)
            read.append(video)
            counts.append(len(video.frames))
        pixels = torch.cat([self.pixel_values(video.frames) for video in read])
        data["pixel_values_videos"] = pixels.to(options.videos.get("device"))
        if options.videos.get("return_metadata"):
            data["video_metadata"] = [metadata_of(video) for video in read]
        return counts

    def _image_pixels(self, medium: Medium, options: CallOptions) -> Tensor:
        source = load_source(medium.source, options.images | medium.options)
        return self.pixel_values(read_frames(source, num_frames=1).frames).to(options.images.get("device"))

    def _instructions(
        self, texts: Sequence[str], kinds: Sequence[Sequence[str]], instruction: str | Sequence[str] | None
    ) -> dict[str, Tensor]:
        """Return the tokens of what steers every medium: those of a prompt are compressed under its instruction."""
        if instruction is None:
            # A text without media needs none: callers also pass answers alone, in which no user speaks.
            instruction = [
                extract_instruction(self._last_user_turn(prompt))[:MAX_INSTRUCTION] if media else ""
                for prompt, media in zip(texts, kinds, strict=True)
            ]
        elif not isinstance(instruction, list | tuple):
            instruction = [instruction] * len(texts)  # type: ignore[list-item]
        if not all(isinstance(each, str) for each in instruction):
            raise ValueError(f"instruction={instruction!r}: give text, or one text a prompt")
        for each in filter(str.strip, dict.fromkeys(instruction)):
            check_instruction(each)
        if len(instruction) != len(texts):
            raise ValueError(f"{len(instruction)} instructions for {len(texts)} prompts")
        data: dict[str, Tensor] = {}
        for kind, name in (("video", ""), ("image", "image_")):
            per_medium = [line for line, prompt in zip(instruction, kinds, strict=True) for k in prompt if k == kind]
            if per_medium:
                ids, mask = self.instruction_inputs(per_medium)
                data[f"{name}instruction_input_ids"] = ids
                if mask is not None:
                    data[f"{name}instruction_attention_mask"] = mask
        return data

    def _last_user_turn(self, prompt: str) -> str:
        """Return the last user turn of a rendered prompt; the prompt itself where it is plain text.

        Raises:
            ValueError: a chat template wrote the prompt, and no user turn is found.

        Warns:
            InstructionWarning: what the user says last is not certain.
        """
        # A template that a call of `apply_chat_template` was given may have written it.
        finders = [UserTurns.of(self.tokenizer, each) for each in (self.chat_template, *self._other_templates)]
        for token in (self.video_token, self.image_token):
            prompt = prompt.replace(token, " ")
        return last_turn_or_text(prompt, finders, "state the `instruction`")

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]] | list[list[dict[str, Any]]],
        chat_template: str | None = None,
        tools: list[Any] | None = None,
        documents: list[dict[str, str]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: Any = "auto",
        return_dict: bool = False,
        load_audio_from_video: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        sanitize_control_tokens: bool = False,
        *,
        return_labels: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Render conversations, and with `tokenize=True` make model inputs of them and of the media inside.

        A message's content is a string, or a list of text, video and image parts: `{"type": "video", "video": ...}`,
        with options of this video alone beside the source (`fps`, `num_frames`, `start_s`, `end_s`, ...); `path`,
        `url`, `frames`, `base64`, and OpenAI's `video_url` and `image_url` name sources, too. A medium without a source
        keeps its placeholder, for media passed beside the conversation.

        Args:
            conversation: one conversation or a list of them.
            chat_template: in place of this processor's.
            tools: functions, or their JSON schemas, for a template that writes them.
            documents: for a template that writes them.
            add_generation_prompt: end with the start of an answer.
            continue_final_message: end inside of the last message, to have it continued.
            return_assistant_tokens_mask: add `assistant_masks`, 1 on answers, for a template that marks them.
            tokenize: return model inputs instead of text.
            return_tensors: as in `__call__`; `auto`: as without it.
            return_dict: return all model inputs; False: `input_ids` alone, as in transformers.
            load_audio_from_video: nothing; the model hears nothing.
            processor_kwargs: arguments of `__call__`.
            sanitize_control_tokens: False; see `__call__`.
            return_labels: add `labels` with the loss on the last message, which must be an answer.
            **kwargs: arguments of `__call__`, or variables of the template, such as `enable_thinking`.

        Returns:
            Text like the input, one or several; or model inputs.

        Raises:
            ValueError: a message is malformed, there is no answer to label, or an argument would be without effect.
        """
        chat, call = self._chat(chat_template, processor_kwargs or {}, kwargs)
        if chat_template is not None and chat_template not in self._other_templates:
            self._other_templates.append(chat_template)
        if return_tensors != "auto":
            call["return_tensors"] = return_tensors
        if sanitize_control_tokens:
            call["sanitize_control_tokens"] = True
        self._options({name: value for name, value in call.items() if name not in OWN_ARGUMENTS})
        if not tokenize:
            refuse_without_tokens(call | {"return_labels": return_labels})
        chat.check_written({"tools": tools, "documents": documents})
        if return_assistant_tokens_mask:
            chat.check_answers(tokenize=tokenize)
        if continue_final_message and (add_generation_prompt or return_assistant_tokens_mask):
            other = "add_generation_prompt" if add_generation_prompt else "return_assistant_tokens_mask"
            raise ValueError(f"continue_final_message and {other} cannot be both: one ends inside of an answer")
        is_batch = bool(conversation) and isinstance(conversation[0], list | tuple)
        conversations: Any = conversation if is_batch else [conversation]
        media: dict[str, list[Medium]] = {"videos": [], "images": []}
        plain = [[chat.flatten(message, media) for message in messages] for messages in conversations]
        beside = {"tools": tools or None, "documents": documents or None}
        prompts, spans = chat.render(
            plain,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
            **beside,
        )
        if not tokenize:
            return prompts if is_batch else prompts[0]
        if return_assistant_tokens_mask:
            call["assistant_spans"] = spans
        if return_labels:
            call["answer_starts"] = chat.starts_of_answers(plain, prompts, **beside)
        if call.get("instruction") is None:
            turns = [[m["content"] for m in messages if m["role"] == "user"] for messages in plain]
            for turn, prompt in zip(turns, prompts, strict=True):
                if not turn and self._media_kinds(prompt):
                    raise ValueError("a conversation with media has no turn of the user; state the `instruction`")
            # What is behind the limit would be cut with the tokens, which is told of.
            call["instruction"] = [extract_instruction(turn[-1])[:MAX_INSTRUCTION] if turn else "" for turn in turns]
        for kind, sources in media.items():
            if sources and (twice := [name for name in _GIVEN_BESIDE[kind] if call.get(name) is not None]):
                raise ValueError(f"the conversation holds {kind}, and {twice[0]} is given beside it; give one of them")
            if sources:
                call[kind] = sources
        inputs = self(text=prompts, **call)
        return inputs if return_dict else inputs["input_ids"]

    def _chat(
        self, chat_template: str | None, inside: dict[str, Any], beside: dict[str, Any]
    ) -> tuple[ChatRenderer, dict[str, Any]]:
        """Return what renders a conversation, and the arguments of `__call__` among those of `apply_chat_template`."""
        template = choose_template(self.chat_template, chat_template)
        call, variables = split_variables(inside, beside, template, (*known_names(), *OWN_ARGUMENTS))
        chat = ChatRenderer(
            template=template,
            tokens=self._tokens,
            image_size=self.image_size,
            variables={**self.tokenizer.special_tokens_map, **variables},
        )
        chat.check_written(variables)
        return chat, call

    @property
    def model_input_names(self) -> list[str]:
        """Names of all tensors that a call may return."""
        return [
            "input_ids",
            "attention_mask",
            "pixel_values_videos",
            "video_num_frames",
            "instruction_input_ids",
            "instruction_attention_mask",
            "pixel_values",
            "image_instruction_input_ids",
            "image_instruction_attention_mask",
        ]
