"""The processor: prompts, videos and images to the tensors that the model takes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from ..square import Square
from ..video import FrameReader, VideoFrames, open_frames, read_frames
from .baselines import build_compressor
from .compressor import Compression
from .config import HIComConfig
from .convert import OfficialCheckpoint
from .dual_encoder import CLIP_NORMALISATION, tokenize_instructions
from .instruction import extract_instruction
from .modeling import HIComForConditionalGeneration
from .ops import Window, check_window, choose_window, token_count
from .tower import TokenizerMissing

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML, for LLMs whose tokenizer brings no template of its own."""


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

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a processor as `transformers` does."""
        # The tokenizers look at the model's configuration, and warn about a type they do not know.
        AutoConfig.register(HIComConfig.model_type, HIComConfig, exist_ok=True)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

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
        if not {"num_frames", "fps", "timestamps_s"} & set(choice):
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

    def _placeholders(self, text: str) -> str:
        """Return a text whose `<video>` and `<image>`, as datasets write them, are this model's placeholders."""
        return text.replace("<video>", self.video_token).replace("<image>", self.image_token)

    def _media_kinds(self, text: str) -> list[str]:
        """Return the kinds of the placeholders of a prompt, in reading order."""
        kinds = {self.video_token: "video", self.image_token: "image"}
        places = [(place, kind) for token, kind in kinds.items() for place in _find_all(text, token)]
        return [kind for _, kind in sorted(places)]

    def __call__(
        self,
        text: str | Sequence[str],
        images: Any = None,
        videos: Any = None,
        instruction: str | Sequence[str] | None = None,
        video_num_frames: Sequence[int] | None = None,
        window: Window | None = None,
        compression: Compression = "conditional",
        answer_starts: Sequence[int] | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        start_s: float | None = None,
        end_s: float | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Make model inputs.

        Args:
            text: prompts, with a placeholder for every medium. `apply_chat_template` makes them of conversations.
            images: an image (path, PIL image or `uint8[H, W, 3]`) or a list, in reading order over all prompts.
            videos: a video (path, bytes, file object, folder, `uint8[T, H, W, 3]`, `VideoFrames`) or a list, likewise.
            instruction: what steers the compressor, for all prompts or one a prompt; None: the prompt's last user turn.
            video_num_frames: frames of every video, for features kept from `encode_frames`, in place of `videos`.
            window: (T, H, W) that the model will be called with, in place of the default.
            compression: mode that the model will be called with.
            answer_starts: where in each text the answer starts, in characters; adds `labels` with the loss on it alone.
            num_frames: frames chosen of every video.
            fps: frames a second in place of `num_frames`.
            start_s: start of the part of every video that counts, in seconds.
            end_s: its end.
            **kwargs: none is known; named in the error.

        Returns:
            `input_ids`, `attention_mask` (left-padded) and what there is of `pixel_values_videos`, `video_num_frames`,
            `instruction_input_ids`, `instruction_attention_mask`, `pixel_values`, `image_instruction_input_ids`,
            `image_instruction_attention_mask` and `labels`, under the names of the model's arguments.

        Raises:
            ValueError: media and placeholders differ in number, or an argument is unknown.
        """
        kwargs.pop("return_tensors", None)
        kwargs.pop("padding", None)
        if kwargs:
            raise ValueError(f"HIComProcessor does not know the arguments {', '.join(kwargs)}")
        texts = [self._placeholders(t) for t in ([text] if isinstance(text, str) else text)]
        data: dict[str, Any] = {}
        if videos is not None:
            read = [
                self.read_video(video, num_frames=num_frames, fps=fps, start_s=start_s, end_s=end_s)
                for video in (videos if isinstance(videos, list | tuple) else [videos])
            ]
            video_num_frames = [len(video.frames) for video in read]
            data["pixel_values_videos"] = torch.cat([self.pixel_values(video.frames) for video in read])
        num_images = 0
        if images is not None:
            stills = [
                read_frames(image, num_frames=1) for image in (images if isinstance(images, list | tuple) else [images])
            ]
            num_images = len(stills)
            data["pixel_values"] = torch.cat([self.pixel_values(still.frames) for still in stills])

        kinds = [self._media_kinds(prompt) for prompt in texts]
        for kind, given in (("video", len(video_num_frames or ())), ("image", num_images)):
            found = sum(prompt.count(kind) for prompt in kinds)
            if found != given:
                raise ValueError(f"the prompts have {found} {kind} placeholders, but {given} {kind}s are given")

        counts = {
            self.video_token_id: iter(
                [self.token_count(frames, window, compression) for frames in video_num_frames or ()]
            ),
            self.image_token_id: iter([self.token_count(1, window, compression)] * num_images),
        }
        rows, labels = [], []
        for number, prompt in enumerate(texts):
            encoding = self.tokenizer(
                prompt, add_special_tokens=False, return_offsets_mapping=answer_starts is not None
            )
            repeats = [next(counts[i]) if i in counts else 1 for i in encoding["input_ids"]]
            rows.append(np.repeat(encoding["input_ids"], repeats))
            if answer_starts is not None:
                labels.append(np.repeat(self._labels(encoding, answer_starts[number]), repeats))
        data["input_ids"], data["attention_mask"] = _pad_left(rows, self.tokenizer.pad_token_id)
        if answer_starts is not None:
            data["labels"], _ = _pad_left(labels, -100)

        if video_num_frames:
            data["video_num_frames"] = torch.tensor(list(video_num_frames))
        if self.is_conditional and compression == "conditional":
            if instruction is None:
                instruction = [extract_instruction(self._last_user_turn(prompt)) for prompt in texts]
            elif isinstance(instruction, str):
                instruction = [instruction] * len(texts)
            if len(instruction) != len(texts):
                raise ValueError(f"{len(instruction)} instructions for {len(texts)} prompts")
            for kind, name in (("video", ""), ("image", "image_")):
                # Every medium of a prompt is compressed under that prompt's instruction.
                per_medium = [
                    line for line, prompt in zip(instruction, kinds, strict=True) for k in prompt if k == kind
                ]
                if per_medium:
                    ids, mask = self.instruction_inputs(per_medium)
                    data[f"{name}instruction_input_ids"] = ids
                    if mask is not None:
                        data[f"{name}instruction_attention_mask"] = mask
        return BatchFeature(data)

    def _labels(self, encoding: Any, start: int) -> np.ndarray:
        """Return the tokens of the answer that starts at character `start`, up to its end token; -100 elsewhere."""
        ids = np.array(encoding["input_ids"])
        is_answer = np.array([offset[0] >= start for offset in encoding["offset_mapping"]])
        ends = np.flatnonzero(is_answer & (ids == self.tokenizer.eos_token_id))
        if len(ends):
            is_answer[ends[0] + 1 :] = False
        return np.where(is_answer, ids, -100)

    def _last_user_turn(self, prompt: str) -> str:
        """Return the last user turn of a rendered prompt; the prompt itself where its markers are unknown."""
        for start, end in (
            ("<|im_start|>user\n", "<|im_end|>"),
            ("<|start_header_id|>user<|end_header_id|>", "<|eot_id|>"),
            ("[INST]", "[/INST]"),
        ):
            if start in prompt:
                return prompt.rpartition(start)[2].partition(end)[0]
        return prompt

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]] | list[list[dict[str, Any]]],
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
        return_labels: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Render conversations, and with `tokenize=True` make model inputs of them and of the media inside.

        A message's content is a string, or a list of `{"type": "text", "text": ...}`, `{"type": "video", "video": ...}`
        and `{"type": "image", "image": ...}` parts. A medium without a source keeps its placeholder, for media passed
        beside the conversation.

        Args:
            conversation: one conversation or a list of them.
            chat_template: in place of this processor's.
            tokenize: return model inputs instead of text.
            add_generation_prompt: end with the start of an answer.
            return_labels: add `labels` with the loss on the last message, which must be an answer.
            **kwargs: arguments of `__call__`.

        Returns:
            Text like the input, one or several; or model inputs.

        Raises:
            ValueError: a message is malformed, or there is no answer to label.
        """
        kwargs.pop("return_dict", None)
        is_batch = bool(conversation) and isinstance(conversation[0], list)
        conversations: list[list[dict[str, Any]]] = conversation if is_batch else [conversation]  # type: ignore[assignment,list-item]
        media: dict[str, list[Any]] = {"videos": [], "images": []}
        plain = [[self._flatten(message, media) for message in messages] for messages in conversations]

        def render(messages: list[dict[str, str]], generation: bool) -> str:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    chat_template=chat_template or self.chat_template,
                    tokenize=False,
                    add_generation_prompt=generation,
                )
            )

        prompts = [render(messages, add_generation_prompt) for messages in plain]
        if not tokenize:
            return prompts if is_batch else prompts[0]
        if return_labels:
            starts = []
            for messages, prompt in zip(plain, prompts, strict=True):
                if len(messages) < 2 or messages[-1]["role"] != "assistant":
                    raise ValueError("return_labels needs conversations that end with an assistant's answer")
                prefix = render(messages[:-1], True)
                if not prompt.startswith(prefix):
                    raise ValueError(
                        "this chat template changes earlier turns when an answer follows; labels need one that does not"
                    )
                starts.append(len(prefix))
            kwargs["answer_starts"] = starts
        if kwargs.get("instruction") is None:
            turns = [[m["content"] for m in messages if m["role"] == "user"] for messages in plain]
            kwargs["instruction"] = [extract_instruction(turn[-1]) if turn else "" for turn in turns]
        for kind, sources in media.items():
            if sources:
                kwargs[kind] = sources
        return self(text=prompts, **kwargs)

    def _flatten(self, message: dict[str, Any], media: dict[str, list[Any]]) -> dict[str, str]:
        """Return a message whose content is text with placeholders; its media are appended to `media`."""
        content = message["content"]
        if isinstance(content, str):
            return {"role": message["role"], "content": self._placeholders(content)}
        pieces = []
        for part in content:
            kind = part.get("type")
            if kind == "text":
                pieces.append(part["text"])
            elif kind in ("video", "image"):
                pieces.append(f"{self.video_token if kind == 'video' else self.image_token}\n")
                source = next((part[key] for key in (kind, "path", "url") if part.get(key) is not None), None)
                if source is not None:
                    media[f"{kind}s"].append(source)
            else:
                raise ValueError(f"a message part has type={kind!r}; text, video and image exist")
        return {"role": message["role"], "content": "".join(pieces)}

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


def _find_all(text: str, token: str) -> list[int]:
    places, place = [], text.find(token)
    while place >= 0:
        places.append(place)
        place = text.find(token, place + len(token))
    return places


def _pad_left(rows: Sequence[np.ndarray], value: int) -> tuple[Tensor, Tensor]:
    """Return rows padded on the left to one length, `int[B, sequence]`, and their attention mask."""
    length = max(len(row) for row in rows)
    padded = np.full((len(rows), length), value, dtype=np.int64)
    mask = np.zeros((len(rows), length), dtype=np.int64)
    for i, row in enumerate(rows):
        padded[i, length - len(row) :] = row
        mask[i, length - len(row) :] = 1
    return torch.from_numpy(padded), torch.from_numpy(mask)


def placeholder_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return the texts of a tokenizer's placeholders of video and image.

    Qwen2.5's and Qwen3's tokenizers have both already; to others they are added.
    """
    vocabulary = tokenizer.get_vocab()
    if "<|video_pad|>" in vocabulary and "<|image_pad|>" in vocabulary:
        return "<|video_pad|>", "<|image_pad|>"
    tokenizer.add_tokens(["<video>", "<image>"], special_tokens=True)
    return "<video>", "<image>"


def add_placeholders(model: HIComForConditionalGeneration, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Give a model and its LLM's tokenizer placeholders of video and image; return their texts.

    The embedding grows where it must.
    """
    video, image = placeholder_tokens(tokenizer)
    if len(tokenizer) > model.config.text_config.vocab_size:
        model.resize_token_embeddings(len(tokenizer))
    model.config.video_token_id = int(tokenizer.convert_tokens_to_ids(video))
    model.config.image_token_id = int(tokenizer.convert_tokens_to_ids(image))
    return video, image


def official_processor(checkpoint: OfficialCheckpoint, model: HIComForConditionalGeneration) -> HIComProcessor:
    """Return the processor of a released checkpoint.

    The model's configuration is given the placeholders that the processor uses.

    Raises:
        TokenizerMissing: a tokenizer is not at hand; the message says where it was looked for.
    """
    tokenizer = _load_tokenizer(checkpoint.folder, f"{checkpoint.name}: the LLM's tokenizer")
    instruction_tokenizer = tokenizer
    if model.config.is_conditional:
        tower = checkpoint.tower
        what = f"{checkpoint.name}: the tokenizer of the vision tower {tower.name!r}, which reads instructions,"
        if tower.tokenizer_folder is None:
            raise TokenizerMissing(f"{what} is not at hand: {tower.search}")
        instruction_tokenizer = _load_tokenizer(tower.tokenizer_folder, what)
        known = int(model.config.instruction_config.vocab_size)
        if len(instruction_tokenizer) > known:
            raise ValueError(
                f"{what} has {len(instruction_tokenizer)} tokens, but the checkpoint's instruction encoder knows "
                f"{known}: {tower.tokenizer_folder} is of another tower"
            )
    video, image = add_placeholders(model, tokenizer)
    frames = checkpoint.fields.get("num_frames")
    # What the weights were trained on: whole frames through Pillow, short clips filled up.
    trained: dict[str, Any] = {"pixels": "exact", "short_videos": "repeat"}
    return HIComProcessor.from_config(
        model.config,
        tokenizer,
        instruction_tokenizer,
        video_token=video,
        image_token=image,
        image_aspect_ratio=checkpoint.aspect_ratio,
        **trained,
        **({"num_frames": frames} if frames else {}),
    )


def _load_tokenizer(folder: Path, what: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TokenizerMissing(f"{what} cannot be loaded from {folder} ({reason})") from error


def check_frames(frames: np.ndarray) -> np.ndarray:
    """Return frames; raise ValueError where they are not `uint8[T, H, W, 3]`."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames must be uint8[T, H, W, 3], got {frames.dtype}{list(frames.shape)}")
    return frames


def to_pixels(frames: np.ndarray, size: int, mean_rgb: Sequence[float], std_rgb: Sequence[float]) -> Tensor:
    """Return `float32[T, 3, size, size]` of `uint8[T, H, W, 3]`: see `HIComProcessor.pixel_values`."""
    check_frames(frames)
    mean, std = torch.tensor(mean_rgb), torch.tensor(std_rgb)
    x = rearrange(torch.from_numpy(np.require(frames, requirements=["C", "W"])), "t h w c -> t c h w")
    height, width = x.shape[-2:]
    side = max(height, width)
    if height != width:
        square = (mean * 255).to(torch.uint8)[None, :, None, None].repeat(len(x), 1, side, side)
        top, left = (side - height) // 2, (side - width) // 2
        square[..., top : top + height, left : left + width] = x
        x = square
    if side != size:
        x = F.interpolate(x, (size, size), mode="bicubic", antialias=True)
    return (x.float() / 255 - mean[:, None, None]) / std[:, None, None]
