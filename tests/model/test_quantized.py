"""Quantised models: by default the language model alone is, whatever does it; other layers work, too."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, TorchAoConfig

import tiny
from hicom import VideoChat
from hicom.model.compressor import HybridCompressor
from hicom.model.modeling import HIComForConditionalGeneration, HIComModel


def batch(model: HIComForConditionalGeneration) -> dict[str, Any]:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 20, 24, 3), dtype=np.uint8)
    return dict(
        tiny.processor(model.config)(text="<video>\nwhich object moves left ?", videos=[pixels], **tiny.TENSORS)
    )


def test_eight_bit_layers_of_torch_work_everywhere() -> None:
    """Their `weight` is a method: nothing may read it."""
    model = tiny.model(match_evidence=True, motion_features=True, num_pointers=2)
    inputs = batch(model)
    wanted = model(**inputs).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        few = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert type(few.model.compressor.global_.attention.k_proj) is not nn.Linear
    found = few(**inputs).logits
    assert 0 < (found - wanted).norm() < 0.2 * wanted.norm()


def is_subclass(layer: nn.Linear) -> bool:
    """Whether a layer's weight is a tensor of torchao's own."""
    return type(layer.weight) is not nn.Parameter


def quantization(kind: str) -> Any:
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if kind == "4bit, as a dictionary":
        return {"load_in_4bit": True}
    return BitsAndBytesConfig(load_in_4bit=kind == "4bit", load_in_8bit=kind == "8bit")


@pytest.mark.qlora
@pytest.mark.parametrize("kind", ["torchao", "4bit", "4bit, as a dictionary", "8bit"])
@pytest.mark.parametrize("base", [False, True])
def test_towers_and_compressor_stay_by_default(kind: str, base: bool, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path, match_evidence=True, motion_features=True)
    cls: Any = HIComModel if base else HIComForConditionalGeneration
    whole = cls.from_pretrained(folder)
    few = cls.from_pretrained(folder, quantization_config=quantization(kind), device_map="cpu")
    inner, plain = (few, whole) if base else (few.model, whole.model)
    linears = [(name, module) for name, module in inner.named_modules() if isinstance(module, nn.Linear)]
    changed = [name for name, module in linears if not module.weight.is_floating_point() or is_subclass(module)]
    assert changed
    assert all(name.startswith("language_model.") for name in changed)
    inputs = batch(whole)
    video = {name: x for name, x in inputs.items() if name not in ("input_ids", "attention_mask")}
    tokens = [each.get_video_features(**video).pooler_output[0] for each in (inner, plain)]
    torch.testing.assert_close(*tokens, rtol=1e-5, atol=1e-5)
    assert few(**inputs)[0].isfinite().all()


@pytest.mark.qlora
@pytest.mark.parametrize("kind", ["torchao", "4bit", "8bit"])
def test_a_chat_is_quantised_where_it_computes(kind: str, tmp_path: Path) -> None:
    """Without a `device_map`, on a device that is named: weights of 8 bit cannot be moved there later."""
    folder = tiny.save(tmp_path)
    chat = VideoChat.from_pretrained(folder, device="cpu", quantization_config=quantization(kind))
    assert chat.ask(np.zeros((4, 20, 24, 3), dtype=np.uint8), "what is red ?", max_new_tokens=2).num_new_tokens > 0


@pytest.mark.qlora
@pytest.mark.parametrize("kind", ["torchao", "4bit"])
def test_a_quantised_compressor_works_where_it_is_asked_for(kind: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path)
    whole = HIComForConditionalGeneration.from_pretrained(folder)
    config = quantization(kind)
    setattr(config, "modules_to_not_convert" if kind == "torchao" else "llm_int8_skip_modules", ["lm_head"])
    few = HIComForConditionalGeneration.from_pretrained(folder, quantization_config=config, device_map="cpu")
    compressor = few.model.compressor
    assert isinstance(compressor, HybridCompressor)
    layer = compressor.global_.attention.k_proj
    assert not layer.weight.is_floating_point() or is_subclass(layer)
    inputs = batch(whole)
    wanted, found = whole(**inputs).logits, few(**inputs).logits
    assert 0 < (found - wanted).norm() < 0.5 * wanted.norm()
