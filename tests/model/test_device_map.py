"""`device_map`: each part of a model may be away from the device that computes, and answers stay the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from hicom.inference import VideoChat
from hicom.model.modeling import HIComForConditionalGeneration

PARTS = ("model.vision_tower", "model.instruction_encoder", "model.compressor", "model.language_model", "lm_head")
BEYOND = {"match_evidence": True, "motion_features": True, "num_pointers": 2, "local_logit_scale": True}
KINDS: dict[str, dict[str, Any]] = {
    "siglip": {},
    "clip": {"tower": "clip", "local_injection": "fine", "global_logit_scale": True, "vision_feature_layer": -2},
    "beyond": BEYOND,
    "qformer": {"compressor": "qformer", "compressor_options": {"num_queries": 4, "num_layers": 2}},
}
QUESTION = "which object moves left ?"


def frames(number: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (number, 20, 24, 3), dtype=np.uint8)


def load(folder: Path, away: tuple[str, ...] = (), **kwargs: Any) -> HIComForConditionalGeneration:
    places = {part: "disk" if part in away else "cpu" for part in PARTS}
    settings = {"device_map": places, "offload_folder": str(folder / "away")} | kwargs
    return HIComForConditionalGeneration.from_pretrained(folder, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_on_disk_answer_as_in_memory(kind: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", **KINDS[kind])
    whole = HIComForConditionalGeneration.from_pretrained(folder)
    processor = tiny.processor(whole.config)
    text = f"<|im_start|>user\n<video>\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    batch = processor(text=text, videos=[frames(4)], padding=True, return_tensors="pt")
    wanted = whole(**batch).logits
    for away in [(part,) for part in PARTS if part != "model.instruction_encoder" or whole.config.is_conditional] + [
        PARTS
    ]:
        model = load(folder, away)
        name, parameter = next((n, p) for n, p in model.named_parameters() if n.startswith(away[0]))
        assert parameter.device.type == "meta", name
        assert model.device.type == "cpu"
        torch.testing.assert_close(model(**batch).logits, wanted, rtol=1e-5, atol=1e-5)
        assert torch.equal(model.generate(**batch, max_new_tokens=3), whole.generate(**batch, max_new_tokens=3))
    answers = [VideoChat(each, processor).ask(frames(4), QUESTION, max_new_tokens=4) for each in (model, whole)]
    assert answers[0] == answers[1]


def test_what_does_not_fit_is_placed_by_itself(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model")
    whole = HIComForConditionalGeneration.from_pretrained(folder)
    batch = tiny.processor(whole.config)(text="<video>\nwhat is red ?", videos=[frames(4)], return_tensors="pt")
    size = sum(p.numel() * p.element_size() for p in whole.parameters())
    model = load(folder, device_map="auto", max_memory={"cpu": size // 2})
    assert {"cpu", "disk"} == {str(place) for place in model.hf_device_map.values()}
    torch.testing.assert_close(model(**batch).logits, whole(**batch).logits, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_away_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"offloads model\.vision_tower\.embeddings"):
        load(tiny.save(tmp_path / "siglip2", tower="siglip2"), ("model.vision_tower",))
    folder = tiny.save(tmp_path / "siglip")
    model = load(folder, ("model.compressor",))
    chat = VideoChat(model, tiny.processor(model.config))
    with pytest.raises(ValueError, match=r"model\.compressor .*device_map"):
        chat.encode(frames(4), keep_features=False, questions=[QUESTION])
