"""Instruction-conditioned pooling for models that were never trained for it: `attach` and `detach`.

A LLaVA-OneVision, LLaVA-Video or LLaVA-NeXT-Video of transformers pools the patches of a frame by their place alone.
Attached, the compressor's local branch takes the place of that pooling, without any parameter of its own: in every
window of (T, H, W) patches a softmax over `logit_scale * cos(text, patch)` weighs the model's visual features, where
text and patches are embedded by a dual encoder, the text being the prompt's instruction. The model's own projector does
the rest. With every weight the same it is plain mean pooling, which is what it has to be better than.

Nothing of the model is changed but three methods of the instance, which `detach` gives back.

Legend: V videos, T frames of each, F = V T packed frames, h w patch grid of a frame, S frame size in pixels, D width of
the features, K width of keys and texts, N visual tokens of a video, C LLM width.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import update_wrapper
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from transformers import (
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .model.compressor import mask_repeats, match_windows, normalize
from .model.dual_encoder import CLIP_NORMALISATION, SIGLIP_NORMALISATION, DualEncoder, Normalisation
from .model.instruction import extract_instruction
from .model.ops import Window, check_window, choose_window, mean_of_groups, sum_windows, time_plan, token_count
from .model.turns import UserTurns

FAMILIES = (LlavaOnevisionForConditionalGeneration, LlavaNextVideoForConditionalGeneration)
DEFAULT_WINDOW: Window = (4, 3, 3)
FRAMES_AT_ONCE = 16
"""Frames that the towers take at once: all hidden states of a tower are kept meanwhile."""


@dataclass(frozen=True)
class _Prompts:
    """`input_ids` and `attention_mask` that a running call was given, `int[B, sequence]`."""

    input_ids: Tensor | None
    attention_mask: Tensor | None


_PROMPTS: ContextVar[_Prompts | None] = ContextVar("_PROMPTS", default=None)
_STATED: ContextVar[tuple[str, ...] | None] = ContextVar("_STATED", default=None)


def attach(
    model: PreTrainedModel,
    processor: ProcessorMixin | PreTrainedTokenizerBase | None = None,
    *,
    dual_encoder: str | Path | PreTrainedModel | None,
    instruction_tokenizer: PreTrainedTokenizerBase | None = None,
    window: Window | None = None,
    max_visual_tokens: int | None = None,
    logit_scale: float | None = None,
    share_tower: bool | None = None,
    pool_projected: bool = False,
    user_turn: str | None = None,
) -> Attachment:
    """Give a LLaVA-style model instruction-conditioned local pooling of its videos, with no training.

    From then on the processor writes as many placeholders as there are tokens, and `generate` and `forward` pool every
    video by the instruction of its prompt: the last user turn without options and answer-format remarks. Images and
    texts go their usual way.

    Args:
        model: `LlavaOnevisionForConditionalGeneration` (LLaVA-OneVision, LLaVA-Video) or
            `LlavaNextVideoForConditionalGeneration`.
        processor: the model's, which is changed until `detach`; or its tokenizer, with `Attachment.expand` in place of
            a processor; None: instructions must be stated (`Attachment.stated`).
        dual_encoder: what embeds instructions and patches: a folder, a hub id, or a loaded SigLIP, SigLIP2 or CLIP
            model with both towers; None: plain mean pooling of the same windows.
        instruction_tokenizer: the dual encoder's; None: the one in its folder.
        window: (T, H, W) in frames and patches; None: (4, 3, 3), the paper's.
        max_visual_tokens: picks the window by the number of frames, in place of `window`.
        logit_scale: factor of the cosines; None: the dual encoder's own; 0: plain mean pooling.
        share_tower: whether the model's own tower serves the dual encoder too; True where it may not is an error;
            None: if its weights are equal.
        pool_projected: pool what the projector returns and not what it takes.
        user_turn: regular expression of a user's turn in a prompt, whose first group is what is said; None: turns are
            found by the chat template of the processor or tokenizer, whichever it is.

    Raises:
        ValueError: the model is of another family or already attached, the dual encoder lacks a tower, or settings
            contradict each other.
    """
    if not isinstance(model, FAMILIES):
        raise ValueError(
            f"a {type(model).__name__} cannot be attached to; it must be one of "
            f"{', '.join(each.__name__ for each in FAMILIES)}"
        )
    if window is not None and max_visual_tokens is not None:
        raise ValueError(f"window={window} and max_visual_tokens={max_visual_tokens} both choose the window; give one")
    if logit_scale is not None and not 0 <= logit_scale < float("inf"):
        raise ValueError(f"logit_scale={logit_scale} must be a finite number of at least 0")
    _check_pattern(user_turn)
    _check_features(model)
    _refuse_second(model.model, "model")
    _refuse_second(processor, "processor")
    encoder = _load(dual_encoder, instruction_tokenizer, model)
    return Attachment(
        model,
        processor,
        encoder,
        window=check_window(DEFAULT_WINDOW if window is None else window),
        max_visual_tokens=max_visual_tokens,
        logit_scale=logit_scale,
        share_tower=share_tower,
        pool_projected=pool_projected,
        user_turn=user_turn,
    )


class Attachment:
    """A model whose videos are pooled by the instruction; a context manager that detaches. Made by `attach`.

    Attributes:
        window: (T, H, W); with `max_visual_tokens` that of every video follows from its frames.
        max_visual_tokens: the budget of a video, or None.
        logit_scale: factor of the cosines in force; 0 without a dual encoder.
        shares_tower: whether the dual encoder's keys come from the model's own forward pass.
    """

    def __init__(
        self,
        model: Any,
        processor: ProcessorMixin | PreTrainedTokenizerBase | None,
        encoder: DualEncoder | None,
        *,
        window: Window,
        max_visual_tokens: int | None,
        logit_scale: float | None,
        share_tower: bool | None,
        pool_projected: bool,
        user_turn: str | None,
    ) -> None:
        core = model.model
        self._model, self._core, self._encoder = model, core, encoder
        self._pool_projected, self._user_turn = pool_projected, user_turn
        self.window, self.max_visual_tokens = window, max_visual_tokens
        own_scale = 0.0 if encoder is None else encoder.logit_scale
        self.logit_scale = own_scale if logit_scale is None else logit_scale
        config = model.config.vision_config
        self._grid = int(config.image_size) // int(config.patch_size)
        self._is_processor = isinstance(processor, ProcessorMixin)
        self._tokenizer: Any = processor.tokenizer if self._is_processor else processor  # type: ignore[union-attr]
        self._chat_template = processor.chat_template if self._is_processor else None  # type: ignore[union-attr]
        self._normalisation = _normalisation(model, processor)
        self.shares_tower = self._may_share(share_tower)
        has_newline = isinstance(model, LlavaOnevisionForConditionalGeneration)
        self._num_newlines = int(has_newline)
        # Where encoders run before the first forward pass, their output is whole; before, `forward` adds the newline.
        self._adds_newline = has_newline and "mm_encoder_outputs" in inspect.signature(core.forward).parameters
        if max_visual_tokens is not None and max_visual_tokens <= self._num_newlines:
            raise ValueError(
                f"max_visual_tokens={max_visual_tokens} holds no token beside the newline; give at least "
                f"{self._num_newlines + 1}"
            )
        self._patches = _Patches()
        if self._is_processor:
            self._patches.set(processor, "replace_video_token", self._replace_video_token)
        self._patches.set(core, "get_video_features", self.get_video_features)
        self._patches.set(core, "forward", _WithPrompts(core.forward))
        self._patches.set(model, "generate", _WithPrompts(model.generate))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def detach(self) -> None:
        """Give model and processor their own methods back; calling it again changes nothing."""
        self._patches.undo()

    def window_of(self, num_frames: int) -> Window:
        """Return the window in force for videos of `num_frames` frames.

        Raises:
            ValueError: the budget holds no token.
        """
        if self.max_visual_tokens is None:
            return self.window
        budget = self.max_visual_tokens - self._num_newlines
        return choose_window(num_frames, self._grid, self._grid, budget, num_global_tokens=0)

    def token_count(self, num_frames: int) -> int:
        """Return the placeholders of a video of `num_frames` frames: its tokens, and the newline of some models."""
        window = self.window_of(num_frames)
        return token_count(num_frames, self._grid, self._grid, window, num_global_tokens=0) + self._num_newlines

    def expand(self, prompts: Sequence[Sequence[int]], num_frames: int) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask` of tokenised prompts, padded on the left.

        Takes the place of a processor, for instance where its video half needs a library that is not installed.

        Args:
            prompts: token ids, with one placeholder for every video.
            num_frames: frames of every video.

        Raises:
            ValueError: the configuration knows no padding.
        """
        video, count = self._model.config.video_token_id, self.token_count(num_frames)
        rows = [[x for token in prompt for x in [token] * (count if token == video else 1)] for prompt in prompts]
        padding = getattr(self._tokenizer, "pad_token_id", None)
        if padding is None:
            padding = self._model.generation_config.pad_token_id
        longest = max(map(len, rows))
        if padding is None and any(len(row) < longest for row in rows):
            raise ValueError("the tokenizer has no pad_token, so prompts of different lengths make no batch; set it")
        padding = 0 if padding is None else int(padding)
        return {
            "input_ids": torch.tensor([[padding] * (longest - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        }

    @contextmanager
    def stated(self, instructions: str | Sequence[str]) -> Iterator[None]:
        """Within this context pool by these instructions and not by those of the prompts.

        Args:
            instructions: one for all videos, or one for every video in reading order over the batch.
        """
        state = _STATED.set((instructions,) if isinstance(instructions, str) else tuple(instructions))
        try:
            yield
        finally:
            _STATED.reset(state)

    def get_video_features(
        self,
        pixel_values_videos: Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Return the pooled tokens of videos, `float[V, N, C]`, as `pooler_output`; in place of the model's own.

        Args:
            pixel_values_videos: `float[V, T, 3, S, S]`; some versions of transformers call it `pixel_values`.
            vision_feature_layer: hidden state of the tower, or several side by side; None: the configuration's.
            vision_feature_select_strategy: has no effect: a class token is no patch and is left out.
            **kwargs: `return_dict`.

        Raises:
            ValueError: placeholders and videos do not fit together, or the instruction is missing.
        """
        pixels_VT3SS = kwargs["pixel_values"] if pixel_values_videos is None else pixel_values_videos
        num_videos, num_frames = pixels_VT3SS.shape[:2]
        owners = self._owners(num_videos, num_frames)
        query_VK = None
        if self._encoder is not None and self.logit_scale > 0:
            query_VK = self._embed(self._instructions(owners, num_videos))
        layer = self._model.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        parts = [
            self._encode(frames, layer, with_keys=query_VK is not None)
            for frames in rearrange(pixels_VT3SS, "v t c h w -> (v t) c h w").split(FRAMES_AT_ONCE)
        ]
        values_FhwD = torch.cat([values for values, _ in parts])
        keys_FhwK = torch.cat([keys for _, keys in parts if keys is not None]) if query_VK is not None else None
        project = self._core.multi_modal_projector
        if self._pool_projected:
            values_FhwD = project(values_FhwD)
        pooled = pool_windows(
            values_FhwD, [num_frames] * num_videos, self.window_of(num_frames), keys_FhwK, query_VK, self.logit_scale
        )
        tokens_VNC = rearrange(pooled, "(v g) a b d -> v (g a b) d", v=num_videos)
        if not self._pool_projected:
            tokens_VNC = project(tokens_VNC)
        if self._adds_newline:
            newline = self._core.image_newline.to(tokens_VNC).expand(num_videos, 1, -1)
            tokens_VNC = torch.cat([tokens_VNC, newline], 1)
        output = BaseModelOutputWithPooling(pooler_output=tokens_VNC)
        return output if kwargs.get("return_dict") in (None, True) else output.to_tuple()

    def _encode(self, pixels_F3SS: Tensor, layer: int | list[int], *, with_keys: bool) -> tuple[Tensor, Tensor | None]:
        """Return features `float[F, h, w, D]` and keys `float[F, h, w, K]`."""
        tower = self._core.vision_tower
        states = tower(pixels_F3SS, output_hidden_states=True, return_dict=True).hidden_states
        values = torch.cat([states[number] for number in ([layer] if isinstance(layer, int) else layer)], -1)
        # A class token comes first, where there is one.
        values = rearrange(values[:, -(self._grid**2) :], "f (h w) d -> f h w d", h=self._grid)
        if not with_keys:
            return values, None
        assert self._encoder is not None
        if self.shares_tower:
            keys = self._encoder.keys_of_hidden(states[-1], tower.config.num_hidden_layers)
            return values, keys.to(values.device)
        keys = self._encoder.keys(pixels_F3SS, self._normalisation).to(values.device)
        if keys.shape[1] != self._grid:
            keys = rearrange(keys.float(), "f h w k -> f k h w")
            keys = F.interpolate(keys, size=(self._grid, self._grid), mode="bilinear", antialias=True)
            keys = rearrange(keys, "f k h w -> f h w k")
        return values, keys

    def _owners(self, num_videos: int, num_frames: int) -> list[int] | None:
        """Return the number of the prompt that every video stands in; None where no `input_ids` are known."""
        prompts = _PROMPTS.get()
        if prompts is None or prompts.input_ids is None:
            return None
        needed = self.token_count(num_frames)
        found = [int(count) for count in (prompts.input_ids == self._model.config.video_token_id).sum(1)]
        if any(count % needed for count in found) or sum(found) != needed * num_videos:
            raise ValueError(
                f"the prompts have {found} video placeholders; {num_videos} videos of {num_frames} frames need "
                f"{needed} each: make the inputs after `attach`, with the processor that it was given, or by `expand`"
            )
        return [row for row, count in enumerate(found) for _ in range(count // needed)]

    def _instructions(self, owners: list[int] | None, num_videos: int) -> list[str]:
        """Return the instruction of every video.

        Raises:
            ValueError: none is stated, and none can be read from the prompts.
        """
        stated = _STATED.get()
        if stated is not None:
            if len(stated) not in (1, num_videos):
                raise ValueError(
                    f"{len(stated)} instructions are stated for {num_videos} videos; state 1 or {num_videos}"
                )
            return list(stated) * (num_videos if len(stated) == 1 else 1)
        prompts = _PROMPTS.get()
        if owners is None or prompts is None or prompts.input_ids is None or self._tokenizer is None:
            lacking = "no input_ids are" if self._tokenizer is not None else "no processor or tokenizer was"
            raise ValueError(
                f"the instruction cannot be read from the prompt, since {lacking} given; state it: "
                "`with attachment.stated(...)`"
            )
        texts = {row: self._instruction(prompts, row) for row in sorted(set(owners))}
        return [texts[row] for row in owners]

    def _instruction(self, prompts: _Prompts, row: int) -> str:
        assert prompts.input_ids is not None
        ids, config = prompts.input_ids[row], self._model.config
        is_text = (ids != config.video_token_id) & (ids != config.image_token_id)
        if prompts.attention_mask is not None and prompts.attention_mask.ndim == 2:
            is_text &= prompts.attention_mask[row].to(ids.device).bool()
        prompt = self._tokenizer.decode(ids[is_text].tolist(), skip_special_tokens=False)
        return extract_instruction(self._last_user_turn(prompt))

    def _last_user_turn(self, prompt: str) -> str:
        if self._user_turn is not None:
            turns = [match[1] for match in re.finditer(self._user_turn, prompt, re.DOTALL)]
            if not turns:
                raise ValueError(
                    f"no user turn is found in the prompt {prompt[-200:]!r}: user_turn={self._user_turn!r} does not "
                    "match it; correct it, or state the instruction: `with attachment.stated(...)`"
                )
            return (turns[-1] or "").strip()
        remedy = (
            "pass user_turn, a regular expression whose first group is what the user says, or state the instruction: "
            "`with attachment.stated(...)`"
        )
        if not (self._chat_template or self._tokenizer.chat_template):
            raise ValueError(f"the tokenizer has no chat template to find the user's turn by: set it; {remedy}")
        return UserTurns.of(self._tokenizer, self._chat_template).last(prompt, remedy)

    def _embed(self, instructions: list[str]) -> Tensor:
        """Return `float[V, K]`; equal instructions are embedded once."""
        assert self._encoder is not None
        places = {text: number for number, text in enumerate(dict.fromkeys(instructions))}
        return self._encoder.embed(list(places))[[places[text] for text in instructions]]

    def _replace_video_token(self, video_inputs: dict[str, Any], video_idx: int = 0, **kwargs: Any) -> str:
        """Return the placeholders of a video; in place of the processor's own method."""
        processor = self._patches.owner("replace_video_token")
        return str(processor.video_token) * self.token_count(len(video_inputs["pixel_values_videos"][video_idx]))

    def _may_share(self, wanted: bool | None) -> bool:
        if self._encoder is None or wanted is False:
            return False
        equal = self._normalisation == self._encoder.normalisation and self._encoder.starts_as(self._core.vision_tower)
        if wanted and not equal:
            raise ValueError(
                "share_tower=True, but the model's vision tower and the dual encoder's differ in weights, sizes or the "
                "normalisation of pixels; leave share_tower out, and both run"
            )
        return equal


def pool_windows(
    values_FhwD: Tensor,
    num_frames: Sequence[int],
    window: Window,
    keys_FhwK: Tensor | None = None,
    query_VK: Tensor | None = None,
    logit_scale: float = 0.0,
) -> Tensor:
    """Pool every window to one vector: the mean of its patches under softmax(logit_scale * cos(query, key)).

    Equation 2 of the paper with the text embedding itself as the query, and no parameters.

    Args:
        values_FhwD: features of all videos' frames, one video after the other.
        num_frames: frames of every video.
        window: (T, H, W).
        keys_FhwK: the same patches in the space of texts; None: plain means.
        query_VK: the text embedding of every video's instruction.
        logit_scale: factor of the cosines.

    Returns:
        `float[G, ceil(h / H), ceil(w / W), D]`, the groups G of one video after the other.
    """
    plan = time_plan(num_frames, window[0]).to(values_FhwD.device, values_FhwD.dtype)
    if keys_FhwK is None or query_VK is None:
        return mean_of_groups(values_FhwD, plan, window)
    # In 16 bit, cosines times a scale of a hundred would be off by half a unit.
    keys, query = normalize(keys_FhwK.float()), normalize(query_VK.to(keys_FhwK.device).float())
    logits = mask_repeats(match_windows(keys, query, plan, window) * logit_scale, plan)
    weights = logits.flatten(3).softmax(-1).view(logits.shape).to(values_FhwD)
    return sum_windows(values_FhwD, weights, plan, window)


class _WithPrompts:
    """A method of a model that tells `get_video_features` which prompts its videos stand in.

    An object and no nested function: a deep copy of the model then gets one that calls the copy.

    Args:
        method: of the model.
    """

    def __init__(self, method: Callable[..., Any]) -> None:
        update_wrapper(self, method)
        self._method = method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # `generate` calls its first argument `inputs`, `forward` calls it `input_ids`.
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        state = _PROMPTS.set(_Prompts(ids, kwargs.get("attention_mask")))
        try:
            return self._method(*args, **kwargs)
        finally:
            _PROMPTS.reset(state)


class _Patches:
    """Attributes set on objects, and what was there before."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, tuple[Any, ...]]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of an instance; one that its class has comes back by deleting it."""
        self._before.append((owner, name, (vars(owner)[name],) if name in vars(owner) else ()))
        setattr(owner, name, value)

    def owner(self, name: str) -> Any:
        """Return the object that an attribute was set on."""
        return next(owner for owner, patched, _ in self._before if patched == name)

    def undo(self) -> None:
        """Restore everything, the last first."""
        while self._before:
            owner, name, before = self._before.pop()
            if before:
                setattr(owner, name, before[0])
            else:
                delattr(owner, name)


def _refuse_second(owner: Any, what: str) -> None:
    """Raise ValueError where an attachment has changed `owner` already."""
    methods = vars(owner).values() if owner is not None else ()
    if any(isinstance(getattr(method, "__self__", None), Attachment) for method in methods):
        raise ValueError(f"the {what} is attached already; call detach() on its attachment first")


def _check_pattern(user_turn: str | None) -> None:
    """Raise ValueError where a regular expression of a user's turn cannot be one."""
    if user_turn is None:
        return
    try:
        groups = re.compile(user_turn).groups
    except re.error as error:
        raise ValueError(f"user_turn={user_turn!r} is no regular expression: {error}") from None
    if not groups:
        raise ValueError(f"user_turn={user_turn!r} has no group; put what the user says in brackets: '...(.*?)...'")


def _check_features(model: Any) -> None:
    """Raise ValueError where the model's features make no grid of patches, or its pooling cannot be left out."""
    config = model.config
    tower = config.vision_config
    if tower.model_type not in ("siglip_vision_model", "clip_vision_model"):
        raise ValueError(f"the vision tower is a {tower.model_type!r}; attaching knows those of SigLIP and CLIP")
    if isinstance(model, LlavaNextVideoForConditionalGeneration) and config.spatial_pool_mode == "conv":
        raise ValueError(
            "spatial_pool_mode='conv': this model's projector was trained behind a learnt pooling, which windows would "
            "leave out; use a model that pools by 'average' or 'max'"
        )


def _load(
    dual_encoder: str | Path | PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None, model: Any
) -> DualEncoder | None:
    if dual_encoder is None:
        return None
    tower = model.model.vision_tower
    if isinstance(dual_encoder, str | Path):
        return DualEncoder.load(dual_encoder, tokenizer=tokenizer, dtype=tower.dtype, device=tower.device)
    if tokenizer is None:
        raise ValueError("a loaded dual encoder comes without its tokenizer; pass instruction_tokenizer")
    return DualEncoder(dual_encoder, tokenizer)


def _normalisation(model: Any, processor: Any) -> Normalisation:
    """Return that of the model's pixel values: its processor's; without one the one published for its kind of tower."""
    for name in ("video_processor", "image_processor"):
        part = getattr(processor, name, None)
        if part is not None:
            return tuple(part.image_mean), tuple(part.image_std)
    is_clip = model.config.vision_config.model_type == "clip_vision_model"
    return CLIP_NORMALISATION if is_clip else SIGLIP_NORMALISATION
