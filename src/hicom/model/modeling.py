"""The Hugging Face model around the compressor: vision tower, instruction encoder, compressor, LLM.

Legend: B prompts, V videos, I images, F packed frames (of all videos, one after the other), h w patch grid of a frame,
S frame size in pixels, D vision width, K width of keys and instruction, L instruction length, N visual tokens of one
video or image, C LLM width.
"""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    AutoModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
    Siglip2TextConfig,
    Siglip2TextModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipTextConfig,
    SiglipTextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils.generic import TransformersKwargs, can_return_tuple

from .compressor import Compression, CompressorOutput, HybridCompressor
from .config import HIComConfig
from .dual_encoder import frame_inputs, siglip_keys
from .generation import MediaGenerationMixin
from .hub import local_name
from .ops import Window, check_video_index, repeat_videos
from .tail import Tail

TOWERS: dict[type, type[PreTrainedModel]] = {
    SiglipVisionConfig: SiglipVisionModel,
    SiglipTextConfig: SiglipTextModel,
    Siglip2VisionConfig: Siglip2VisionModel,
    Siglip2TextConfig: Siglip2TextModel,
    CLIPVisionConfig: CLIPVisionModelWithProjection,
    CLIPTextConfig: CLIPTextModelWithProjection,
}

CACHE_NAMES = ("cache", "past_key_values")
"""What the LLM's cache is called from transformers 5.24 on, and before."""


LOSS_ARGUMENTS = ("num_items_in_batch", "ignore_index", "shift_labels")
"""What `forward` hands to the loss beside logits and labels."""


def tuple_on_request(method: Callable[..., Any]) -> Callable[..., Any]:
    """Have a method take `return_dict`, as transformers does."""
    return can_return_tuple(method)


def given_cache(past_key_values: Any) -> dict[str, Any]:
    """Return the old argument where it is given: the LLM of a newer transformers warns of it even when it is None."""
    return {} if past_key_values is None else {"past_key_values": past_key_values}


def returned_cache(output: BaseModelOutputWithPast) -> dict[str, Any]:
    """Return the LLM's cache under the name that it has; newer versions of transformers know both names."""
    # Not `name in output`: newer versions warn of being asked for the old name.
    return {name: value for name, value in output.items() if name in CACHE_NAMES}


@dataclass
class VisionFeatures:
    """Patch features of frames, all that the compressor needs of them for any question.

    Attributes:
        values: `float[F, h, w, D]`, the hidden state that becomes visual tokens.
        keys: `float[F, h, w, K]`, the same patches in the text space of the dual encoder; None without a need.
        has_motion: whether a compressor's motion features are part of them (`VisualParts.add_motion`).
    """

    values: Tensor
    keys: Tensor | None
    has_motion: bool = False


class HIComPreTrainedModel(PreTrainedModel):
    """What both HICom models share with the Hugging Face library."""

    config: HIComConfig
    config_class = HIComConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False
    _outer_prefix = ""
    _no_split_modules = ["HybridCompressor", "SiglipEncoderLayer", "Siglip2EncoderLayer", "CLIPEncoderLayer"]  # noqa: RUF012
    # What released checkpoints hold beside weights: constant buffers, the dual encoder's own temperature, and learnable
    # tokens that an instruction replaces.
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"(^|\.)position_ids$",
        r"rotary_emb\.inv_freq$",
        r"^model\.vision_tower\.logit_scale$",
        r"^model\.compressor\.global_\.query$",
    ]
    _skip_keys_device_placement = list(CACHE_NAMES)  # noqa: RUF012

    def enable_input_require_grads(self) -> None:
        """Have gradients reach the language model's input, as some ways to compute activations again need.

        transformers has the embeddings of all parts require gradients; frozen towers would then be computed twice, and
        backward, for gradients that nobody uses.
        """
        hook = self.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_(True))
        self._require_grads_hooks = [hook]
        self._require_grads_hook = hook

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint as `transformers` does, but strictly; the name of an embedded model will do.

        With `quantization_config` the towers, the compressor and the output matrix stay as they are, unless the
        configuration itself says what stays. With `ignore_mismatched_sizes` tensors of another shape are made anew.

        Raises:
            ValueError: tensors are missing, unexpected or of another shape; all are named. Or `device_map` puts a part
                off the devices that cannot be there.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        ignores_shapes = kwargs.pop("ignore_mismatched_sizes", False)
        kwargs.setdefault("use_safetensors", True)
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = cls._sparing(kwargs["quantization_config"])
        model, info = super().from_pretrained(
            local_name(pretrained_model_name_or_path),
            *args,
            output_loading_info=True,
            # Otherwise transformers raises at the first kind of problem; this way all are named at once.
            ignore_mismatched_sizes=True,
            **kwargs,
        )
        problems = {
            "missing": sorted(info["missing_keys"]),
            "unexpected": sorted(info["unexpected_keys"]),
            "of another shape": [
                f"{key} {tuple(found)} (expected {tuple(wanted)})"
                for key, found, wanted in sorted(info["mismatched_keys"])
                if not ignores_shapes
            ],
        }
        raise_on_problems(str(pretrained_model_name_or_path), problems)
        check_offload(model)
        return (model, info) if wants_info else model

    @classmethod
    def _sparing(cls, quantization: Any) -> Any:
        """Return a quantisation that leaves `NOT_QUANTIZED` alone, unless it says itself what it leaves alone."""
        if isinstance(quantization, dict):
            quantization = AutoQuantizationConfig.from_dict(quantization)
        quantization = copy.copy(quantization)
        for name in ("llm_int8_skip_modules", "modules_to_not_convert"):
            if getattr(quantization, name, ()) is None:
                setattr(quantization, name, [module.removeprefix(cls._outer_prefix) for module in NOT_QUANTIZED])
        return quantization

    @property
    def device(self) -> torch.device:
        """The device that inputs belong on; of a model with parts on disk the one that computes."""
        found: torch.device = super().device
        hook = getattr(self, "_hf_hook", None)
        return found if found.type != "meta" or hook is None else torch.device(hook.execution_device)


def check_offload(model: nn.Module) -> None:
    """Raise ValueError where `device_map` keeps a module off its device that reads a weight of a part of itself."""
    for name, module in model.named_modules():
        weight = getattr(getattr(module, "position_embedding", None), "weight", None)
        if isinstance(module, Siglip2VisionEmbeddings) and weight is not None and weight.device.type == "meta":
            raise ValueError(
                f"device_map offloads {name}, which SigLIP 2 cannot compute from there; give {name} a device of its own"
            )


class TensorMismatch(ValueError):
    """Tensors of a checkpoint do not fit the model.

    Args:
        name: of the checkpoint.
        problems: kind of problem -> names of the tensors that have it.
    """

    def __init__(self, name: str, problems: dict[str, list[str]]) -> None:
        self.problems = problems
        parts = [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in problems.items()]
        super().__init__(f"the checkpoint {name} does not fit the model: tensors {'; '.join(parts)}")


def raise_on_problems(name: str, problems: dict[str, list[str]]) -> None:
    """Raise a TensorMismatch that names every tensor of `problems` (kind -> names), if there is any."""
    found = {kind: names for kind, names in problems.items() if names}
    if found:
        raise TensorMismatch(name, found)


NOT_QUANTIZED = ("model.vision_tower", "model.instruction_encoder", "model.compressor", "lm_head")
"""Modules that stay as they are where a model is quantised: what trains as a whole, is small or would lose most."""

TAPPED: ContextVar[list[Tensor] | None] = ContextVar("TAPPED", default=None)
"""Where the hidden state of the vision tower goes that is wanted: every thread has its own."""


def tap(tower: nn.Module, number: int) -> RemovableHandle | None:
    """Have a hidden state of a vision tower put into `TAPPED`; return None where only the tower can give it.

    `output_hidden_states` would keep those of all layers until the last one is done: 3 GB in place of 0.1 GB for 32
    frames of SigLIP-so400m in float32.

    Args:
        tower: its layers are called `encoder.layers`.
        number: of the hidden state, counted as in `hidden_states`: 0 goes into the first layer, -1 is the last one,
            to which some towers apply a norm, so that it is left to them.
    """
    layers = next(module for name, module in tower.named_modules() if name.endswith("encoder.layers"))
    assert isinstance(layers, nn.ModuleList)
    number += (len(layers) + 1) * (number < 0)
    if not 0 <= number < len(layers):
        return None

    return layers[number].register_forward_pre_hook(keep)


def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Put what goes into a layer into `TAPPED`, where it is wanted; knows no model, so that copies may have it."""
    box = TAPPED.get()
    if box is not None:
        box.append(args[0])


def make_compressor(config: HIComConfig) -> nn.Module:
    """Return the compressor that a configuration describes, with random weights."""
    dims = {"dim": config.vision_config.hidden_size, "out_dim": config.text_config.hidden_size}
    if config.compressor == "hicom":
        return HybridCompressor(
            **dims,
            instruction_dim=config.instruction_dim if config.is_conditional else None,
            window=config.window,
            num_global_tokens=config.num_global_tokens,
            local_injection=config.local_injection,
            global_injection=config.global_injection,
            dialect=config.dialect,
            local_gates=config.local_gates,
            global_gates=config.global_gates,
            local_logit_scale=config.local_logit_scale,
            global_logit_scale=config.global_logit_scale,
            match_evidence=config.match_evidence,
            motion_features=config.motion_features,
            num_pointers=config.num_pointers,
            num_word_pointers=config.num_word_pointers,
        )
    from .baselines import build_compressor

    return build_compressor(config.compressor, **dims, **(config.compressor_options or {}))


class VisualParts:
    """Vision tower, instruction encoder and compressor: all between frames and visual tokens.

    A part of modules that hold an LLM beside it, here and in servers' engines.
    """

    config: HIComConfig
    vision_tower: Any
    instruction_encoder: Any
    compressor: Any
    tapped: RemovableHandle | None

    def build_visual(self, config: HIComConfig) -> None:
        """Make the parts, with random weights."""
        self.vision_tower = TOWERS[type(config.vision_config)]._from_config(config.vision_config)
        # Without an instruction to embed there is no instruction encoder: unguided checkpoints have none.
        self.instruction_encoder = (
            TOWERS[type(config.instruction_config)]._from_config(config.instruction_config)
            if config.is_conditional
            else None
        )
        self.compressor = make_compressor(config)
        self.replace_vision_tower(self.vision_tower)

    def replace_vision_tower(self, tower: Any) -> None:
        """Use another tower of the same kind and sizes."""
        self.vision_tower = tower
        # SigLIP's head would pool the patches, for nobody, and by an attention that reads weights of a layer that it
        # does not call, which have to be in memory then. Its MLP makes keys (`siglip_keys`).
        if hasattr(tower, "use_head"):
            tower.use_head = False
        self.tapped = tap(tower, self.config.vision_feature_layer)

    def release_vision_tower(self) -> nn.Module:
        """Return the tower for use elsewhere: nothing here hears of its hidden states any more."""
        if self.tapped is not None:
            self.tapped.remove()
        if hasattr(self.vision_tower, "use_head"):
            self.vision_tower.use_head = self.config.vision_config.vision_use_head
        return self.vision_tower

    def token_count(
        self, num_frames: int, window: Window | None = None, compression: Compression = "conditional"
    ) -> int:
        """Return the visual tokens of a video of `num_frames` frames (an image is one frame)."""
        grid = self.config.grid_size
        kwargs = {"compression": compression} if self.compressor.has_modes else {}
        return int(self.compressor.token_count(num_frames, grid, grid, window, **kwargs))

    def encode_frames(self, pixel_values: Tensor) -> VisionFeatures:
        """Run the vision tower over frames; the result serves every question about them.

        Values are a hidden state of the tower, keys its last hidden state in the text space: through the residual MLP
        of SigLIP's attention-pool head (without the attention), or through CLIP's projection.

        Args:
            pixel_values: `float[F, 3, S, S]`, normalised.

        Raises:
            ValueError: the frames do not have the size that the tower takes.
        """
        config, tower = self.config.vision_config, self.vision_tower
        size = self.config.image_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[-2:]) != (size, size):
            raise ValueError(f"frames must be float[F, 3, {size}, {size}], got {tuple(pixel_values.shape)}")
        pixel_values = pixel_values.to(tower.dtype)
        inputs = frame_inputs(config, pixel_values)
        keys = None
        if self.tapped is not None:
            box: list[Tensor] = []
            token = TAPPED.set(box)
            try:
                output = tower(**inputs)
            finally:
                TAPPED.reset(token)
            values = box[0]
        else:
            output = tower(**inputs, output_hidden_states=True)
            values = output.hidden_states[self.config.vision_feature_layer]
        if isinstance(config, CLIPVisionConfig):
            values = values[:, 1:]
        if self.config.is_conditional:
            last = output.last_hidden_state
            if isinstance(config, CLIPVisionConfig):
                # The release projects patches without the layer norm that CLIP puts before its projection.
                last = last if self.config.dialect == "release" else tower.vision_model.post_layernorm(last)
                keys = tower.visual_projection(last[:, 1:])
            else:
                keys = siglip_keys(last, tower.head)
        height = self.config.grid_size
        return VisionFeatures(
            rearrange(values, "f (h w) d -> f h w d", h=height),
            None if keys is None else rearrange(keys, "f (h w) d -> f h w d", h=height),
        )

    def encode_instruction(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Embed instructions.

        Args:
            input_ids: `int[V, L]`, tokens of the instruction encoder's own tokenizer.
            attention_mask: `int[V, L]` or None. SigLIP was trained without a mask, on padding to full length.

        Returns:
            The pooled embedding `float[V, K]`, and `float[V, L, K]` of every token where fine injection needs it.
        """
        limit = self.config.max_instruction_length
        if input_ids.shape[-1] > limit:
            raise ValueError(
                f"instructions of {input_ids.shape[-1]} tokens exceed the {limit} of the instruction encoder; truncate"
            )
        encoder = self.instruction_encoder
        if encoder is None:
            raise ValueError("no instruction steers this model's compressor, so it has no instruction encoder")
        output = encoder(input_ids=input_ids, attention_mask=attention_mask)
        is_clip = isinstance(self.config.instruction_config, CLIPTextConfig)
        tokens = None
        if self.compressor.needs_instruction_tokens:
            tokens = (encoder.text_projection if is_clip else encoder.head)(output.last_hidden_state)
        return (output.text_embeds if is_clip else output.pooler_output), tokens

    def instruction_mask(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """Return which tokens of instructions the compressor may look at, `int[V, L]`; None: all.

        SigLIP's encoder takes no mask and its padding is text to it, but padding is no word to point at.

        Args:
            input_ids: `int[V, L]`, as in `encode_instruction`.
            attention_mask: `int[V, L]` or None, likewise.
        """
        if attention_mask is None and self.compressor.points_at_words:
            real = input_ids != self.config.instruction_config.pad_token_id
            return (real | ~real.any(1, keepdim=True)).long()  # of an empty instruction all, as without a mask
        return attention_mask

    def add_motion(self, features: VisionFeatures, num_frames: Sequence[int]) -> VisionFeatures:
        """Return features with this compressor's motion features, which no instruction changes; others as they are.

        `compress` does so itself; whoever asks about the same videos again saves it most of its work.

        Args:
            features: of all frames, one video after the other.
            num_frames: frames of every video.
        """
        motion = getattr(self.compressor, "motion", None)
        if motion is None or features.has_motion:
            return features
        values, keys = motion(features.values, features.keys, num_frames)
        return VisionFeatures(values, keys, has_motion=True)

    def compress(
        self,
        features: VisionFeatures,
        num_frames: Sequence[int],
        instruction_input_ids: Tensor | None = None,
        instruction_attention_mask: Tensor | None = None,
        window: Window | None = None,
        compression: Compression = "conditional",
        return_attention: bool = False,
        video_index: Sequence[int] | None = None,
    ) -> CompressorOutput:
        """Turn the features of videos into visual tokens, steered by one instruction a video.

        Args:
            features: of all frames, one video after the other.
            num_frames: frames of every video.
            instruction_input_ids: `int[V, L]`; None for models and modes that need none.
            instruction_attention_mask: `int[V, L]` or None.
            window: (T, H, W) in place of the model's.
            compression: `conditional`, `unguided` or `off`.
            return_attention: also return attention maps.
            video_index: numbers of the videos that the instructions are about; None: each its own, in order.

        Raises:
            ValueError: the instruction is missing, or a mode does not exist for this compressor.
        """
        if not self.compressor.has_modes:
            if compression != "conditional":
                raise ValueError(f"compression={compression!r} exists for the hicom compressor only; leave it out")
            values = features.values
            if video_index is not None:
                check_video_index(video_index, len(num_frames))
                values = repeat_videos(values, num_frames, video_index)
                num_frames = [num_frames[video] for video in video_index]
            return self.compressor(values, None, num_frames, window=window, return_attention=return_attention)
        pooled = tokens = mask = None
        if self.config.is_conditional and compression == "conditional":
            if instruction_input_ids is None:
                raise ValueError(
                    "this model's compressor is steered by the instruction: pass instruction_input_ids "
                    "(HIComProcessor makes them from the question), or compression='unguided'"
                )
            number = len(num_frames if video_index is None else video_index)
            if len(instruction_input_ids) != number:
                raise ValueError(f"{len(instruction_input_ids)} instructions for {number} videos or images")
            pooled, tokens = self.encode_instruction(instruction_input_ids, instruction_attention_mask)
            mask = self.instruction_mask(instruction_input_ids, instruction_attention_mask)
        return self.compressor(
            features.values,
            features.keys,
            num_frames,
            pooled,
            tokens,
            mask,
            window=window,
            compression=compression,
            return_attention=return_attention,
            video_index=video_index,
            has_motion=features.has_motion,
        )

    @tuple_on_request
    def get_video_features(
        self,
        pixel_values_videos: Tensor | None = None,
        video_num_frames: Tensor | None = None,
        instruction_input_ids: Tensor | None = None,
        instruction_attention_mask: Tensor | None = None,
        video_values: Tensor | None = None,
        video_keys: Tensor | None = None,
        window: Window | None = None,
        compression: Compression = "conditional",
        video_index: Tensor | None = None,
    ) -> BaseModelOutputWithPooling:
        """Return the visual tokens of videos.

        Args:
            pixel_values_videos: `float[F, 3, S, S]`, frames of all videos, one video after the other.
            video_num_frames: `int[V]`, frames of every video; None: all frames are one video.
            instruction_input_ids: `int[V, L]`.
            instruction_attention_mask: `int[V, L]` or None.
            video_values: `float[F, h, w, D]`, features kept from `encode_frames`, in place of frames.
            video_keys: `float[F, h, w, K]`, likewise.
            window: (T, H, W) in place of the model's.
            compression: `conditional`, `unguided` or `off`.
            video_index: `int[Q]`, the video that each of Q instructions is about, so that a video that is asked about
                often is encoded once; None: each its own, in order.

        Returns:
            An output whose `pooler_output` is a tuple of `float[N_v, C]`, one a video or entry of `video_index`; with
            `return_dict=False` a tuple of it.

        Raises:
            ValueError: neither or both of frames and features are given, or counts disagree.
        """
        if (pixel_values_videos is None) == (video_values is None):
            raise ValueError("pass either pixel_values_videos (frames) or video_values (kept features)")
        if pixel_values_videos is not None:
            features = self.encode_frames(pixel_values_videos)
        else:
            assert video_values is not None
            features = VisionFeatures(video_values, video_keys)
        counts = [len(features.values)] if video_num_frames is None else [int(n) for n in video_num_frames]
        output = self.compress(
            features,
            counts,
            instruction_input_ids,
            instruction_attention_mask,
            window,
            compression,
            video_index=None if video_index is None else [int(video) for video in video_index],
        )
        return BaseModelOutputWithPooling(pooler_output=output.tokens)

    @tuple_on_request
    def get_image_features(
        self,
        pixel_values: Tensor,
        instruction_input_ids: Tensor | None = None,
        instruction_attention_mask: Tensor | None = None,
        window: Window | None = None,
        compression: Compression = "conditional",
    ) -> BaseModelOutputWithPooling:
        """Return the visual tokens of images, each a video of one frame.

        Args:
            pixel_values: `float[I, 3, S, S]`.
            instruction_input_ids: `int[I, L]`.
            instruction_attention_mask: `int[I, L]` or None.
            window: (T, H, W) in place of the model's.
            compression: `conditional`, `unguided` or `off`.

        Returns:
            An output whose `pooler_output` is a tuple of `float[N_i, C]`, one an image; as for videos.
        """
        return self.get_video_features(
            return_dict=True,
            pixel_values_videos=pixel_values,
            video_num_frames=torch.ones(len(pixel_values), dtype=torch.long),
            instruction_input_ids=instruction_input_ids,
            instruction_attention_mask=instruction_attention_mask,
            window=window,
            compression=compression,
        )


class HIComModel(VisualParts, HIComPreTrainedModel):
    """Vision tower, instruction encoder, compressor and LLM without its output matrix."""

    # A folder of the whole model has one more module around this one, and also holds the output matrix.
    _outer_prefix = "model."
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # noqa: RUF012

    def __init__(self, config: HIComConfig) -> None:
        super().__init__(config)
        self.build_visual(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()
        # transformers initialises layer by layer; the compressor knows better, as a whole. While a checkpoint loads,
        # this touches nothing: parameters then have no storage yet.
        if isinstance(self.compressor, HybridCompressor):
            self.compressor.reset_parameters()

    def reset_compressor(self, seed: int) -> None:
        """Make the compressor anew, with weights that depend on `seed` and its sizes alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.compressor = make_compressor(self.config)
            self.compressor.apply(self._init_weights)
            if isinstance(self.compressor, HybridCompressor):
                self.compressor.reset_parameters()

    def get_input_embeddings(self) -> nn.Module:
        """Return the LLM's embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the LLM's embedding."""
        self.language_model.set_input_embeddings(value)

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_instruction_input_ids: Tensor | None = None,
        image_instruction_attention_mask: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_num_frames: Tensor | None = None,
        instruction_input_ids: Tensor | None = None,
        instruction_attention_mask: Tensor | None = None,
        video_values: Tensor | None = None,
        video_keys: Tensor | None = None,
        window: Window | None = None,
        compression: Compression | None = None,
        video_index: Tensor | None = None,
        expected_media: Sequence[str] = (),
    ) -> Tensor:
        """Return `float[B, sequence, C]`: text embeddings with visual tokens in the place of placeholders.

        Raises:
            ValueError: placeholders and visual tokens differ in number.
        """
        embeddings = self.get_input_embeddings()(input_ids)
        mode = compression or "conditional"
        if pixel_values is not None:
            images = self.get_image_features(
                pixel_values,
                image_instruction_input_ids,
                image_instruction_attention_mask,
                window,
                mode,
                return_dict=True,
            )
            embeddings = place_tokens(embeddings, input_ids, self.config.image_token_id, images.pooler_output, "image")
        elif "pixel_values" in expected_media:
            embeddings = embeddings + self.run_empty("pixel_values", embeddings, window, mode)
        if pixel_values_videos is not None or video_values is not None:
            videos = self.get_video_features(
                pixel_values_videos,
                video_num_frames,
                instruction_input_ids,
                instruction_attention_mask,
                video_values,
                video_keys,
                window,
                mode,
                video_index,
                return_dict=True,
            )
            embeddings = place_tokens(embeddings, input_ids, self.config.video_token_id, videos.pooler_output, "video")
        else:
            for name in ("pixel_values_videos", "video_values"):
                if name in expected_media:
                    embeddings = embeddings + self.run_empty(name, embeddings, window, mode)
        return embeddings

    def run_empty(self, name: str, like: Tensor, window: Window | None, compression: Compression) -> Tensor:
        """Run all that an argument reaches on one empty frame, and return 0.

        The zero hangs on the frame's tokens, so that every parameter gets a gradient of zeros: where several processes
        train together, one without media then still takes part in all that the others exchange.

        Args:
            name: of the argument, `video_values` for kept features.
            like: tensor whose type and device the frame gets.
            window: (T, H, W) in place of the model's.
            compression: `conditional`, `unguided` or `off`.
        """
        config, grid = self.config, self.config.grid_size
        is_steered = config.is_conditional and compression == "conditional"
        if name == "video_values":
            # Ones, because features of length zero have no direction, and the gradient of that is not a number.
            values = like.new_ones(1, grid, grid, config.vision_config.hidden_size)
            keys = like.new_ones(1, grid, grid, config.instruction_dim) if is_steered else None
            features = VisionFeatures(values, keys)
        else:
            features = self.encode_frames(like.new_zeros(1, 3, config.image_size, config.image_size))
        instruction = torch.zeros(1, 1, dtype=torch.long, device=like.device) if is_steered else None
        (tokens,) = self.compress(features, [1], instruction, None, window, compression).tokens
        # A sum over none of the tokens, not zero times one over all: that would not be zero if they overflowed.
        return tokens[:0].sum()

    def check_arguments(self, kwargs: dict[str, Any]) -> None:
        """Raise ValueError where the LLM takes none of an argument that is passed on to it."""
        unknown = kwargs.keys() - TransformersKwargs.__optional_keys__ - set(CACHE_NAMES)
        if not unknown:
            return
        parameters = inspect.signature(self.language_model.forward).parameters
        unknown -= parameters.keys()
        if unknown:
            known = sorted({*inspect.signature(HIComForConditionalGeneration.forward).parameters, *parameters})
            name = min(unknown)
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"forward takes no argument {name!r}{hint}")

    @tuple_on_request
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_instruction_input_ids: Tensor | None = None,
        image_instruction_attention_mask: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_num_frames: Tensor | None = None,
        instruction_input_ids: Tensor | None = None,
        instruction_attention_mask: Tensor | None = None,
        video_values: Tensor | None = None,
        video_keys: Tensor | None = None,
        window: Window | None = None,
        compression: Compression | None = None,
        video_index: Tensor | None = None,
        expected_media: Sequence[str] = (),
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the LLM over text and visual tokens; arguments as in `HIComForConditionalGeneration.forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        if inputs_embeds is not None and any(x is not None for x in (pixel_values, pixel_values_videos, video_values)):
            raise ValueError("inputs_embeds hold the whole prompt; pass either these or media")
        self.check_arguments(kwargs)
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed(
                input_ids,
                pixel_values,
                image_instruction_input_ids,
                image_instruction_attention_mask,
                pixel_values_videos,
                video_num_frames,
                instruction_input_ids,
                instruction_attention_mask,
                video_values,
                video_keys,
                window,
                compression,
                video_index,
                expected_media,
            )
        return self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **given_cache(past_key_values),
            **kwargs,
        )


def place_tokens(
    embeddings: Tensor, input_ids: Tensor, token_id: int | None, tokens: tuple[Tensor, ...], kind: str
) -> Tensor:
    """Put visual tokens in the place of their placeholders, in reading order over the batch."""
    if token_id is None:
        raise ValueError(f"the configuration names no {kind}_token_id, so a {kind} has no place in a prompt")
    mask = input_ids == token_id
    found, needed = int(mask.sum()), sum(len(x) for x in tokens)
    if found != needed:
        raise ValueError(
            f"the prompt has {found} {kind} placeholders, the {len(tokens)} {kind}s became {needed} visual tokens; "
            "use HIComProcessor with the same frames and window, or expand placeholders by token_count"
        )
    packed = torch.cat(tokens).to(embeddings)
    return embeddings.masked_scatter(mask.to(embeddings.device)[..., None].expand_as(embeddings), packed)


class HIComForConditionalGeneration(HIComPreTrainedModel, MediaGenerationMixin):
    """HICom with the LLM's output matrix: answers questions about videos, and is trained to."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: HIComConfig) -> None:
        super().__init__(config)
        self.tail = Tail(config.text_config)
        self._is_stateful = self.tail.whole._is_stateful  # a state cannot take back tokens that were only proposed
        self.model = HIComModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_official(
        cls,
        path: str | Path,
        dtype: torch.dtype | None = None,
        *,
        vision_tower: str | Path | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a checkpoint in the layout of the official release; see `hicom.model.convert.load_official`."""
        from .convert import load_official

        return load_official(path, dtype=dtype, vision_tower=vision_tower, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """Return the LLM's embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the LLM's embedding."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the LLM's output matrix."""
        return self.lm_head

    def get_video_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Return visual tokens of videos; see `HIComModel.get_video_features`."""
        return self.model.get_video_features(*args, **kwargs)

    def get_image_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Return visual tokens of images; see `HIComModel.get_image_features`."""
        return self.model.get_image_features(*args, **kwargs)

    def encode_frames(self, pixel_values: Tensor) -> VisionFeatures:
        """Run the vision tower; see `HIComModel.encode_frames`."""
        return self.model.encode_frames(pixel_values)

    @tuple_on_request
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_instruction_input_ids: Tensor | None = None,
        image_instruction_attention_mask: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_num_frames: Tensor | None = None,
        instruction_input_ids: Tensor | None = None,
        instruction_attention_mask: Tensor | None = None,
        video_values: Tensor | None = None,
        video_keys: Tensor | None = None,
        window: Window | None = None,
        compression: Compression | None = None,
        video_index: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        expected_media: Sequence[str] = (),
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predict the next tokens.

        Args:
            input_ids: `int[B, sequence]`, with one placeholder for every visual token.
            attention_mask: `int[B, sequence]`; pad on the left to generate.
            position_ids: `int[B, sequence]` or None.
            past_key_values: the LLM's cache.
            inputs_embeds: `float[B, sequence, C]` in place of `input_ids` and media.
            labels: `int[B, sequence]`, -100 where there is no loss.
            pixel_values: `float[I, 3, S, S]`, images in reading order over the batch.
            image_instruction_input_ids: `int[I, L]`, the instruction of every image.
            image_instruction_attention_mask: `int[I, L]` or None.
            pixel_values_videos: `float[F, 3, S, S]`, frames of all videos in reading order over the batch.
            video_num_frames: `int[V]`, frames of every video.
            instruction_input_ids: `int[V, L]`, the instruction of every video.
            instruction_attention_mask: `int[V, L]` or None.
            video_values: `float[F, h, w, D]`, kept features (`encode_frames`) in place of `pixel_values_videos`.
            video_keys: `float[F, h, w, K]`, likewise.
            window: (T, H, W) of the local branch in place of the model's.
            compression: `conditional` (None), `unguided` or `off`.
            video_index: `int[Q]`, the number of the video that each placed video shows, where some are placed more than
                once: these are passed and encoded once. None: each its own, in order.
            use_cache: whether to return the LLM's cache.
            logits_to_keep: compute logits, and the loss, of the last so many places only; 0: of all.
            expected_media: names of media arguments whose modules run in any case, on an empty frame where this batch
                has none: processes that train together must all make the same calls.
            **kwargs: passed on to the LLM and the loss; `return_dict=False` returns a tuple.

        Raises:
            ValueError: media, instructions and placeholders disagree; both numbers are named. Or an argument is none of
                the model's, the LLM's or the loss's.
        """
        loss_kwargs = {key: kwargs.pop(key) for key in LOSS_ARGUMENTS if key in kwargs}
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_instruction_input_ids=image_instruction_input_ids,
            image_instruction_attention_mask=image_instruction_attention_mask,
            pixel_values_videos=pixel_values_videos,
            video_num_frames=video_num_frames,
            instruction_input_ids=instruction_input_ids,
            instruction_attention_mask=instruction_attention_mask,
            video_values=video_values,
            video_keys=video_keys,
            window=window,
            compression=compression,
            video_index=video_index,
            expected_media=expected_media,
            use_cache=use_cache,
            return_dict=True,
            **given_cache(past_key_values),
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        answer = self.tail(output, self.lm_head, attention_mask=attention_mask, labels=labels, keep=keep, **loss_kwargs)
        return CausalLMOutputWithPast(
            loss=answer.loss,
            logits=answer.logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            **returned_cache(output),
        )
