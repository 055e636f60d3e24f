"""PEFT as people use it: adapters on all linear layers, the compressor trained as a whole beside them, merging."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import tiny
from hicom.inference import VideoChat
from hicom.model.compressor import Attention

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "out_proj"]
BEYOND = {"match_evidence": True, "motion_features": True, "num_pointers": 2, "num_word_pointers": 1}
KINDS: dict[str, dict[str, Any]] = {
    "siglip": {},
    "siglip2": {"tower": "siglip2", "local_injection": "coarse", "global_injection": "fine"},
    "clip": {"tower": "clip", "local_injection": "fine", "global_logit_scale": True, "vision_feature_layer": -2},
    "release": {"dialect": "release", "local_gates": "kvg", "global_gates": "g", "local_injection": "fine"},
    "beyond": BEYOND,
    "qformer": {"compressor": "qformer", "compressor_options": {"num_queries": 4, "num_layers": 2}},
}
UNUSED = "vision_tower.head.attention."
"""SigLIP's head pools patches, which no compressor asks for; its MLP makes keys."""


def frames(number: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (number, 20, 24, 3), dtype=np.uint8)


def batch(model: Any) -> dict[str, Tensor]:
    questions = ("which object moves left ?", "what is red ?")
    texts = [f"<|im_start|>user\n<video>\n{text}<|im_end|>" for text in questions]
    inputs = dict(
        tiny.processor(model.config)(text=texts, videos=[frames(4), frames(3)], padding=True, return_tensors="pt")
    )
    return inputs | {"labels": inputs["input_ids"]}


def shake(model: Any) -> None:
    """Give adapters values, as training would."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("targets", [NAMES, "all-linear"], ids=["names", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_act_learn_and_merge_everywhere(kind: str, targets: Any) -> None:
    model = tiny.model(**KINDS[kind])
    inputs = batch(model)
    before = model(**inputs).logits
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets)).eval()
    torch.testing.assert_close(adapted(**inputs).logits, before, rtol=1e-4, atol=1e-4)
    shake(adapted)
    output = adapted(**inputs)
    output.loss.backward()
    idle = [n for n, p in adapted.named_parameters() if "lora_" in n and (p.grad is None or not p.grad.any())]
    # Without keys nothing behind the layer counts that values come from.
    unused = "vision_tower." if kind == "qformer" else UNUSED
    assert not [name for name in idle if unused not in name]
    absorbed = [n for n, _ in adapted.named_parameters() if ".compressor." in n and "k_proj.lora_A" in n]
    assert bool(absorbed) == (kind != "qformer")
    assert (output.logits - before).abs().max() > 0.01
    torch.testing.assert_close(adapted.merge_and_unload()(**inputs).logits, output.logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("settings", [{"init_lora_weights": "pissa"}, {"use_dora": True}, {"lora_dropout": 0.5}])
def test_an_untrained_adapter_changes_nothing(settings: dict[str, Any]) -> None:
    model = tiny.model()
    inputs = batch(model)
    before = model(**inputs).logits.detach()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", **settings)).eval()
    torch.testing.assert_close(adapted(**inputs).logits, before, rtol=1e-4, atol=1e-4)


def test_an_adapter_on_the_absorbed_keys_acts_as_on_keys_that_are_computed() -> None:
    """In float64: logits of queries times W_k of every patch, adapter, dropout and bias included, up to a constant."""
    torch.manual_seed(0)
    attention = Attention(dim=8).double()
    q, x = torch.randn(1, 3, 8).double(), torch.randn(1, 20, 8).double()
    adapted = get_peft_model(attention, LoraConfig(r=2, target_modules=["k_proj", "v_proj"])).double().eval()  # type: ignore[arg-type]
    shake(adapted)
    found = attention.project_queries(q) @ x.mT
    wanted = (attention.q_proj(q) @ attention.k_proj(x).mT) * 8**-0.5
    torch.testing.assert_close(found.diff(dim=-1), wanted.diff(dim=-1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["siglip", "beyond", "qformer"])
def test_the_compressor_trains_as_a_whole_beside_adapters(kind: str, tmp_path: Any) -> None:
    model = tiny.model(**KINDS[kind])
    inputs = batch(model)
    settings = LoraConfig(r=2, target_modules=r".*language_model.*(q|v)_proj", modules_to_save=["compressor"])
    adapted = get_peft_model(model, settings)
    before = adapted(**inputs)
    before.loss.backward()
    trained = [n for n, p in adapted.named_parameters() if p.grad is not None and p.grad.any()]
    assert any("compressor.modules_to_save" in name for name in trained)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.05)
    shake(adapted)
    adapted.eval()
    wanted = adapted(**inputs).logits
    assert (wanted - before.logits).abs().max() > 0.01
    processor = tiny.processor(model.config)
    question, settings_ = "which object moves left ?", {"max_new_tokens": 4}
    chat = VideoChat(adapted.get_base_model(), processor)
    answer = chat.ask(chat.encode(frames(4)), question, **settings_)
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.model(**KINDS[kind]), tmp_path).eval()
    torch.testing.assert_close(again(**inputs).logits, wanted, rtol=1e-5, atol=1e-5)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, wanted, rtol=1e-3, atol=1e-4)
    assert VideoChat(merged, processor).ask(frames(4), question, **settings_) == answer
    if kind == "siglip":  # no motion, no pointers: frame by frame needs no more
        kept = chat.encode(frames(4), keep_features=False, questions=[question])
        assert chat.ask(kept, question, **settings_) == answer
