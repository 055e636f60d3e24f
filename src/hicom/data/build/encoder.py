"""A dual encoder: images and sentences in one space."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, CLIPVisionConfig

from ...model.dual_encoder import frame_inputs
from ...model.hub import find_model, read_json
from ...model.modeling import HIComForConditionalGeneration
from ...model.pixels import to_pixels
from ...model.processing import HIComProcessor

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
"""Of SigLIP, where a folder says nothing."""
AT_ONCE = 32
"""Images or sentences in a pass."""


class DualEncoder:
    """Embeds frames and sentences.

    Args:
        name: a folder or hub id of SigLIP, CLIP or another dual encoder of transformers, or a checkpoint of this
            library, whose vision tower and instruction encoder are one.
        device: where to compute; None: a GPU where there is one.

    Raises:
        ValueError: it is no dual encoder.
    """

    def __init__(self, name: str, device: str | None = None) -> None:
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        folder = find_model(name)
        config = read_json(folder / "config.json")
        self.hicom: HIComForConditionalGeneration | None = None
        if config.get("model_type") == "hicom":
            self.hicom = HIComForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
            self.hicom = self.hicom.to(self.device).eval()
            self.processor = HIComProcessor.from_pretrained(folder)
            if not self.hicom.config.is_conditional:
                raise ValueError(f"{name}: this checkpoint has no instruction encoder, so it compares no texts")
            self.size, self.mean, self.std = (
                self.processor.image_size,
                self.processor.image_mean,
                self.processor.image_std,
            )
            return
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32).to(self.device).eval()
        if not hasattr(self.model, "get_image_features") or not hasattr(self.model, "get_text_features"):
            raise ValueError(f"{name}: {type(self.model).__name__} is no dual encoder such as SigLIP or CLIP")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.size = self.model.config.vision_config.image_size
        file = folder / "preprocessor_config.json"
        facts = json.loads(file.read_text("utf-8")) if Path(file).is_file() else {}
        self.mean, self.std = facts.get("image_mean", MEAN), facts.get("image_std", STD)

    @torch.inference_mode()
    def images(self, frames: np.ndarray) -> Tensor:
        """Return `float32[T, D]` of unit length for `uint8[T, H, W, 3]`, padded to squares."""
        found = []
        for first in range(0, len(frames), AT_ONCE):
            pixels = to_pixels(frames[first : first + AT_ONCE], self.size, self.mean, self.std).to(self.device)
            if self.hicom is not None:
                tower, config = self.hicom.model.vision_tower, self.hicom.config.vision_config
                output = tower(**frame_inputs(config, pixels))
                # A HICom model's SigLIP does not pool by itself: nothing else asks for it.
                is_clip = isinstance(config, CLIPVisionConfig)
                found.append(output.image_embeds if is_clip else tower.head(output.last_hidden_state))
            else:
                found.append(_embedding(self.model.get_image_features(pixel_values=pixels)))
        return torch.nn.functional.normalize(torch.cat(found).float(), dim=-1).cpu()

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return `float32[N, D]` of unit length."""
        if self.hicom is not None:
            ids, mask = self.processor.instruction_inputs(texts)
            mask = None if mask is None else mask.to(self.device)
            pooled, _ = self.hicom.model.encode_instruction(ids.to(self.device), mask)
        else:
            # SigLIP was trained on padding to full length, without a mask.
            is_siglip = "siglip" in self.model.config.model_type
            padding = "max_length" if is_siglip else True
            length = self.model.config.text_config.max_position_embeddings
            batch = self.tokenizer(
                list(texts), padding=padding, truncation=True, max_length=length, return_tensors="pt"
            ).to(self.device)
            inputs = {"input_ids": batch["input_ids"]} if is_siglip else dict(batch)
            pooled = _embedding(self.model.get_text_features(**inputs))
        return torch.nn.functional.normalize(pooled.float(), dim=-1).cpu()


def _embedding(output: object) -> Tensor:
    """Return the embedding out of what `get_..._features` returns: a tensor, or an output that holds it."""
    found = output if isinstance(output, Tensor) else getattr(output, "pooler_output", None)
    assert isinstance(found, Tensor)
    return found
