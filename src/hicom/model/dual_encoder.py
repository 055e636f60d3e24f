"""A dual encoder (SigLIP, SigLIP2, CLIP): patches in the space of its texts, texts in the same space.

Dual encoders are trained to match whole images and texts. Their patches reach the space of texts through what is left
of the image's pooling when its attention is taken out: the residual MLP of SigLIP's attention-pool head, or CLIP's norm
and projection (section 3.2 of the paper: keys of the direct injection).

Legend: F frames, h w patch grid of a frame, S frame size in pixels, D vision width, K width of keys and texts, V texts.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from transformers import (
    AutoModel,
    AutoTokenizer,
    BatchEncoding,
    CLIPModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Siglip2Model,
    Siglip2VisionConfig,
    SiglipModel,
)

from .hub import find_model, read_json

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of pixel values from 0 to 1, for red, green and blue."""

SIGLIP_NORMALISATION: Normalisation = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP_NORMALISATION: Normalisation = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""As published."""

FACTS = ("image_size", "patch_size", "hidden_act", "layer_norm_eps", "num_attention_heads", "hidden_size")
"""What decides a tower's features beside its weights."""

DUAL_ENCODERS = (SiglipModel, Siglip2Model, CLIPModel)


class InstructionWarning(UserWarning):
    """An instruction is longer than the text tower takes and is cut, or is not found for certain in a prompt."""


def frame_size(config: PreTrainedConfig) -> int:
    """Return the height and width of the frames that a vision tower takes, in pixels."""
    if isinstance(config, Siglip2VisionConfig):
        return int(config.num_patches**0.5) * int(config.patch_size)
    return int(config.image_size)


def frame_inputs(config: PreTrainedConfig, pixel_values: Tensor) -> dict[str, Tensor]:
    """Return what a vision tower takes for frames `float[F, 3, S, S]`: SigLIP2 wants them cut into patches."""
    if not isinstance(config, Siglip2VisionConfig):
        return {"pixel_values": pixel_values}
    grid = frame_size(config) // int(config.patch_size)
    patches = rearrange(pixel_values, "f c (h p) (w q) -> f (h w) (p q c)", h=grid, w=grid)
    mask = torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device)
    shapes = torch.full((len(patches), 2), grid, device=patches.device)
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def tokenize_instructions(tokenizer: PreTrainedTokenizerBase, instructions: Sequence[str], limit: int) -> BatchEncoding:
    """Return `input_ids` and `attention_mask`, `int[V, limit]`: SigLIP was trained on texts padded to full length.

    Warns:
        InstructionWarning: an instruction is too long and is cut.
    """
    for text in dict.fromkeys(instructions):
        length = len(tokenizer(text, verbose=False)["input_ids"])  # transformers' own warning is untrue: it is cut
        if length > limit:
            warnings.warn(
                f"the instruction has {length} tokens, the instruction encoder takes {limit}; the rest does not "
                f"steer the compressor (the LLM still reads it all): {text[:60]!r}...",
                InstructionWarning,
                stacklevel=3,
            )
    return tokenizer(
        list(instructions),
        padding="max_length",
        padding_side="right",
        max_length=limit,
        truncation=True,
        return_tensors="pt",
    )


def siglip_keys(last_FND: Tensor, head: Any) -> Tensor:
    """Return SigLIP's last hidden state, after its norm, in the text space: `float[F, h w, K]`."""
    return last_FND + head.mlp(head.layernorm(last_FND)).to(last_FND.device)


class DualEncoder:
    """The two towers of a loaded dual encoder, and what they need to know of pixels and texts.

    Args:
        model: a `SiglipModel`, `Siglip2Model` or `CLIPModel`.
        tokenizer: the text tower's.
        normalisation: mean and standard deviation of the pixel values; None: as published for its kind.

    Raises:
        ValueError: the model has no text tower, or no pooling head to take keys through.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        normalisation: Normalisation | None = None,
    ) -> None:
        if not isinstance(model, DUAL_ENCODERS):
            raise ValueError(
                f"the dual encoder is a {type(model).__name__}, which is no pair of vision and text tower; give a "
                f"{', '.join(each.__name__ for each in DUAL_ENCODERS)}, such as google/siglip-so400m-patch14-384 or "
                "openai/clip-vit-large-patch14-336"
            )
        self.model = model
        self.is_clip = isinstance(model, CLIPModel)
        self.vision: Any = model.vision_model
        self.tokenizer = tokenizer
        if not self.is_clip and "head" not in dict(self.vision.named_children()):
            raise ValueError(
                "the dual encoder's vision tower has no attention-pool head (vision_use_head=False), so its patches "
                "have no way into the space of texts; give the original SigLIP checkpoint"
            )
        published = CLIP_NORMALISATION if self.is_clip else SIGLIP_NORMALISATION
        self.normalisation = published if normalisation is None else normalisation
        config = self.vision.config
        self.image_size = frame_size(config)
        self.grid_size = self.image_size // int(config.patch_size)

    @classmethod
    def load(
        cls, path: str | Path, *, tokenizer: PreTrainedTokenizerBase | None = None, dtype: torch.dtype, device: Any
    ) -> DualEncoder:
        """Load a folder or a hub id.

        Raises:
            ValueError: there is no such folder, or no dual encoder in it.
        """
        folder = find_model(path)
        kind = read_json(folder / "config.json").get("model_type")
        if kind not in {each.config_class.model_type for each in DUAL_ENCODERS}:
            raise ValueError(
                f"{path} holds a model of type {kind!r}, not a dual encoder; give the folder or hub id of a SigLIP, "
                "SigLIP2 or CLIP model with both of its towers"
            )
        model = AutoModel.from_pretrained(folder, dtype=dtype, use_safetensors=True).to(device)
        pixels = folder / "preprocessor_config.json"
        known = read_json(pixels) if pixels.is_file() else {}
        normalisation = (tuple(known["image_mean"]), tuple(known["image_std"])) if "image_mean" in known else None
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        return cls(model, tokenizer, normalisation)

    @property
    def logit_scale(self) -> float:
        """The factor that the encoder learnt for its cosines (the inverse temperature)."""
        return float(self.model.logit_scale.detach().exp())

    @property
    def text_dim(self) -> int:
        """Width K of keys and texts."""
        return int(self.model.config.projection_dim if self.is_clip else self.vision.config.hidden_size)

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Return the embedding of every text, `float[V, K]`.

        Warns:
            InstructionWarning: a text is too long and is cut.
        """
        limit = int(self.model.config.text_config.max_position_embeddings)
        batch = tokenize_instructions(self.tokenizer, texts, limit).to(self.model.device)
        if self.is_clip:
            pooled = self.model.text_model(batch["input_ids"], batch["attention_mask"]).pooler_output
            return torch.as_tensor(self.model.text_projection(pooled))
        # Without a mask, as it was trained.
        return torch.as_tensor(self.model.text_model(batch["input_ids"]).pooler_output)

    @torch.no_grad()
    def keys(self, pixel_values: Tensor, normalisation: Normalisation) -> Tensor:
        """Return the patches of frames in the space of texts, `float[F, h, w, K]`.

        Args:
            pixel_values: `float[F, 3, S, S]` of any size S; resized to this encoder's.
            normalisation: mean and standard deviation of these pixel values; changed to this encoder's.
        """
        if normalisation != self.normalisation:
            (mean, std), (own_mean, own_std) = (
                [torch.tensor(x, dtype=torch.float32, device=pixel_values.device)[:, None, None] for x in pair]
                for pair in (normalisation, self.normalisation)
            )
            pixel_values = (pixel_values.float() * std + mean - own_mean) / own_std
        if pixel_values.shape[-1] != self.image_size:
            pixel_values = F.interpolate(
                pixel_values.float(), size=(self.image_size, self.image_size), mode="bicubic", antialias=True
            )
        pixel_values = pixel_values.to(self.model.device, self.model.dtype)
        last = self.vision(**frame_inputs(self.vision.config, pixel_values)).last_hidden_state
        return self._to_text_space(self.vision.post_layernorm(last) if self.is_clip else last)

    @torch.no_grad()
    def keys_of_hidden(self, hidden_FND: Tensor, num_layers: int) -> Tensor:
        """Return the keys `float[F, h, w, K]` of frames that another tower has begun to encode.

        Args:
            hidden_FND: what the last layer of a tower returns that this one starts as (`starts_as`).
            num_layers: layers that it has; this tower goes on with its own after as many.
        """
        hidden_FND = hidden_FND.to(self.model.device)
        for layer in self.vision.encoder.layers[num_layers:]:
            hidden_FND = layer(hidden_FND, attention_mask=None)
        return self._to_text_space(self.vision.post_layernorm(hidden_FND))

    def starts_as(self, tower: PreTrainedModel) -> bool:
        """Whether another vision tower's weights equal this one's, up to the last layer that it has.

        Vision-language models often drop the last layer and the head. Weights are compared exactly; the first
        difference ends it, so that a tower that was trained further is told apart at once.
        """
        if type(tower) is not type(self.vision) or isinstance(self.vision.config, Siglip2VisionConfig):
            return False
        own, other = self.vision.state_dict(), tower.state_dict()
        facts, other_facts = self.vision.config.to_dict(), tower.config.to_dict()
        if any(facts[name] != other_facts[name] for name in FACTS):
            return False
        # The norm and the head after the layers are this tower's own business.
        names = [name for name in other if not name.startswith(("post_layernorm.", "head."))]
        return all(
            name in own and own[name].dtype == other[name].dtype and torch.equal(own[name], other[name].to(own[name]))
            for name in names
        )

    def _to_text_space(self, last_FND: Tensor) -> Tensor:
        keys = (
            self.model.visual_projection(last_FND[:, 1:]) if self.is_clip else siglip_keys(last_FND, self.vision.head)
        )
        return rearrange(keys, "f (h w) k -> f h w k", h=self.grid_size)
