"""Generation with media: encoded once before the first token, for every way that transformers has to generate.

Legend: B prompts, P places of a prompt, C LLM width.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList

from .config import context_length

MEDIA_ARGUMENTS = (
    "pixel_values",
    "image_instruction_input_ids",
    "image_instruction_attention_mask",
    "pixel_values_videos",
    "video_num_frames",
    "instruction_input_ids",
    "instruction_attention_mask",
    "video_values",
    "video_keys",
    "window",
    "compression",
    "video_index",
)
POSITIONAL = tuple(inspect.signature(GenerationMixin.generate).parameters)[2:]
"""Arguments of transformers' `generate` behind `inputs`, in order."""
MEDIA = ("pixel_values", "pixel_values_videos", "video_values")
"""Of these, the media themselves."""


class PromptWarning(UserWarning):
    """A prompt is longer than the LLM was made for."""


class PromptError(ValueError):
    """A prompt is longer than the LLM's context, so that there is no room for an answer."""


class CacheWarning(UserWarning):
    """A cache holds visual tokens that were compressed for an earlier question."""


class Drafter:
    """An assistant of speculative decoding, which reads a prompt with its own visual tokens.

    transformers hands an assistant what the model itself reads, whose width may be another one.

    Args:
        model: the assistant.
        inputs_embeds: `float[B, P, C]`, the prompt as the assistant embeds it; None: it sees tokens alone.
    """

    def __init__(self, model: Any, inputs_embeds: Tensor | None) -> None:
        self._model, self._inputs_embeds = model, inputs_embeds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, **kwargs: Any) -> Any:
        """Draft the next tokens."""
        return self._model.generate(**kwargs | {"inputs_embeds": self._inputs_embeds})


class ToyWarning(UserWarning):
    """A model that answers is a toy; its configuration says what it was made for (`HIComConfig.toy`)."""


class FiniteLogits(LogitsProcessor):
    """Raises where the logits behind the prompt are not finite, rather than go on with whatever token that gives.

    Args:
        length: tokens of the prompt; later ones are not looked at, since that would wait for the device at every token.
    """

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return the scores as they are."""
        if input_ids.shape[1] == self.length:
            check_finite(scores.amax(-1), "logits behind the prompt")
        return scores


def check_finite(x: Tensor, what: str) -> None:
    """Raise ValueError unless all numbers are finite. Waits for the device."""
    if not torch.isfinite(x).all():
        raise ValueError(
            f"the {what} are not finite (NaN or infinite), so no answer could be trusted: weights are damaged, or "
            f"{str(x.dtype).removeprefix('torch.')} is too small for them; float16 overflows where bfloat16 does not"
        )


def cache_of(kwargs: dict[str, Any]) -> Any:
    """Return the cache among arguments, under its new name or its old one."""
    return kwargs.get("cache") if kwargs.get("cache") is not None else kwargs.get("past_key_values")


def num_cached(kwargs: dict[str, Any]) -> int:
    """Return how many places the cache among arguments holds."""
    cache = cache_of(kwargs)
    return 0 if cache is None else int(cache.get_seq_length())


class MediaGenerationMixin(GenerationMixin):
    """`generate` for a model whose `model.embed` puts visual tokens into a prompt."""

    config: Any
    generation_config: Any
    model: Any
    is_toy_told: bool = False
    """Whether the user knows that the model is a toy, where it is one: whoever tells it by other means sets this."""

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generate as `transformers` does; media are encoded and compressed exactly once, before the first token.

        Takes all arguments of `forward` that carry media or instruction beside those of `GenerationMixin.generate`.
        An `assistant_model` that is a HICom model encodes them once for itself; another one sees the text alone.
        Prompts that are padded on the right are padded on the left first.

        Returns prompt and answer, `int[B, P]`, as decoders do.

        Raises:
            ValueError: arguments contradict each other or do not work with media, or numbers are not finite.

        Warns:
            PromptWarning: a prompt is longer than the LLM was made for; many frames make long prompts.
            CacheWarning: the cache that is continued was made for another question.
            ToyWarning: the model is a toy; once.
        """
        if self.config.toy and not self.is_toy_told:
            self.is_toy_told = True
            warnings.warn(self.config.toy_note, ToyWarning, stacklevel=3)
        media = {name: kwargs.pop(name) for name in MEDIA_ARGUMENTS if name in kwargs}
        input_ids = kwargs.pop("input_ids", inputs)
        kwargs |= dict(zip(POSITIONAL, args, strict=False))
        if self.chosen("assistant_early_exit", kwargs) is not None:
            raise ValueError(
                "assistant_early_exit does not work with this model, whose layers are those of the language model "
                "inside of it; pass assistant_model or prompt_lookup_num_tokens"
            )
        has_media = any(media.get(name) is not None for name in MEDIA)
        if has_media and input_ids is None:
            raise ValueError("media need input_ids with their placeholders")
        if has_media and kwargs.get("inputs_embeds") is not None:
            raise ValueError("inputs_embeds hold the whole prompt; pass either these or media")
        assistant = kwargs.get("assistant_model")
        if self.is_assisted(kwargs) and input_ids is None and kwargs.get("inputs_embeds") is not None:
            raise ValueError("speculative decoding compares tokens: pass input_ids beside inputs_embeds")
        if has_media and not self._is_cached(input_ids, media, kwargs):
            # Embeddings of the whole prompt: beams and returned sequences then repeat them, not the encoder's work.
            kwargs["inputs_embeds"] = self.model.embed(input_ids, **media)
        if assistant is not None:
            kwargs["assistant_model"] = self._drafter(assistant, input_ids, media if has_media else {}, kwargs)
        if input_ids is not None:
            kwargs["input_ids"] = input_ids
        pad_left(kwargs)
        embeds = kwargs.get("inputs_embeds")
        prompt = kwargs.get("input_ids") if embeds is None else embeds
        if prompt is not None:
            self._check_length(prompt, kwargs.get("attention_mask"))
        if not self.chosen("is_assistant", kwargs):
            if embeds is not None:
                check_finite(embeds, "embeddings of the prompt (text and visual tokens)")
            length = 0 if input_ids is None else input_ids.shape[1]
            kwargs["logits_processor"] = LogitsProcessorList(
                [*(kwargs.get("logits_processor") or ()), FiniteLogits(length)]
            )
        return super().generate(**kwargs)

    def chosen(self, name: str, kwargs: dict[str, Any]) -> Any:
        """Return a setting of `generate`: an argument, a field of the configuration given, or the model's own."""
        if kwargs.get(name) is not None:
            return kwargs[name]
        config = kwargs.get("generation_config")
        return getattr(self.generation_config if config is None else config, name, None)

    def is_assisted(self, kwargs: dict[str, Any]) -> bool:
        """Whether arguments of `generate` ask for speculative decoding."""
        return kwargs.get("assistant_model") is not None or bool(self.chosen("prompt_lookup_num_tokens", kwargs))

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        cache: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return what `forward` takes next: embeddings of the places that `inputs_embeds` covers, tokens behind them.

        transformers feeds embeddings in the first step and only there. Steps may hold more (drafted tokens behind the
        prompt), less (a prompt in chunks), or the prompt again (no cache; an assistant that is called anew).
        """
        # transformers hands on what `generate` itself has used for `stop_strings`; `forward` knows no such thing.
        for name in ("tokenizer", "assistant_tokenizer"):
            kwargs.pop(name, None)
        # Under either name; transformers looks here for the arguments that `generate` may have.
        kwargs |= {} if cache is None else {"cache": cache}
        kwargs |= {} if past_key_values is None else {"past_key_values": past_key_values}
        if inputs_embeds is not None:
            start, covered, num_ids = num_cached(kwargs), inputs_embeds.shape[1], input_ids.shape[1]
            if next_sequence_length is not None:
                end = start + next_sequence_length
            elif cache_of(kwargs) is not None and num_ids:
                end = start + num_ids
            else:
                end = kwargs["position_ids"].shape[-1]
            if start < covered:
                embeds = inputs_embeds[:, start:end]
                if end > covered:
                    drafted = self.get_input_embeddings()(input_ids[:, num_ids - (end - covered) :])
                    embeds = torch.cat([embeds, drafted.to(embeds)], 1)
                inputs_embeds, next_sequence_length, is_first_iteration = embeds, None, True
            else:
                inputs_embeds = None
        prepared: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        return prepared

    def _is_cached(self, input_ids: Tensor, media: dict[str, Any], kwargs: dict[str, Any]) -> bool:
        """Whether a cache holds the visual tokens of all media already, which then need not be made anew."""
        length = num_cached(kwargs)
        if length == 0:
            return False
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.shape[1] != input_ids.shape[1]:
            raise ValueError(
                f"input_ids have {input_ids.shape[1]} places and attention_mask {mask.shape[1]}: pass the input_ids of "
                "the whole conversation together with its cache"
            )
        places = [x for x in (self.config.video_token_id, self.config.image_token_id) if x is not None]
        is_place = torch.isin(input_ids, torch.tensor(places, device=input_ids.device))
        in_cache = bool(is_place[:, :length].any())
        if in_cache and self.config.is_conditional and media.get("compression") in (None, "conditional"):
            warnings.warn(
                "the cache holds visual tokens that were compressed for an earlier question; the new one does not "
                "steer them. Leave the cache out to have the videos compressed for this question",
                CacheWarning,
                stacklevel=4,
            )
        return in_cache and not bool(is_place[:, length:].any())

    def _drafter(self, assistant: Any, input_ids: Tensor, media: dict[str, Any], kwargs: dict[str, Any]) -> Drafter:
        """Return the assistant with the prompt as it embeds it."""
        if isinstance(assistant, Drafter):
            return assistant
        if assistant is self:
            return Drafter(assistant, kwargs.get("inputs_embeds"))
        if not media or not isinstance(assistant, MediaGenerationMixin):
            return Drafter(assistant, None)
        if kwargs.get("assistant_tokenizer") is not None:
            raise ValueError(
                "an assistant_model that sees media must have the model's own tokenizer; leave assistant_tokenizer out"
            )
        try:
            return Drafter(assistant, assistant.model.embed(input_ids, **media))
        except ValueError as error:
            raise ValueError(f"the assistant_model does not fit this prompt: {error}") from error

    def _check_length(self, prompt: Tensor, attention_mask: Tensor | None) -> None:
        """Warn where the longest of some prompts, `[B, P, ...]`, is longer than the LLM was made for."""
        # transformers looks for the limit in the outer configuration, which has none, and so would say nothing.
        limit = context_length(self.config.text_config)
        if limit is None:  # recurrent ones have none
            return
        length = prompt.shape[1]
        if length > limit and attention_mask is not None:
            length = int(attention_mask.sum(1).max())
        if length > limit:
            warnings.warn(
                f"the prompt has {length:,} tokens, the language model was made for {limit:,} "
                "(max_position_embeddings): expect worse answers; choose fewer frames, or a budget of visual tokens",
                PromptWarning,
                stacklevel=4,
            )


def pad_left(kwargs: dict[str, Any]) -> None:
    """Move the padding of prompts among `generate`'s arguments to the left: a decoder goes on behind the last place.

    Raises:
        ValueError: they come with `position_ids`.
    """
    mask, ids, embeds = (kwargs.get(name) for name in ("attention_mask", "input_ids", "inputs_embeds"))
    if mask is None or mask.ndim != 2 or bool(mask[:, -1].all()) or num_cached(kwargs):
        return
    if kwargs.get("position_ids") is not None:
        raise ValueError("prompts are padded on the right and come with position_ids; pad them on the left to generate")
    order = mask.bool().int().argsort(dim=1, stable=True)
    kwargs["attention_mask"] = mask.gather(1, order)
    if ids is not None:
        kwargs["input_ids"] = ids.gather(1, order.to(ids.device))
    if embeds is not None:
        kwargs["inputs_embeds"] = embeds.gather(1, order.to(embeds.device)[..., None].expand_as(embeds))
