"""The processor: prompts, instructions, placeholders, frames and labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from hicom.model.dual_encoder import InstructionWarning
from hicom.model.processing import HIComProcessor


@pytest.fixture(scope="module")
def processor() -> HIComProcessor:
    return tiny.processor(tiny.config())


def frames(number: int, height: int = 20, width: int = 20) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (number, height, width, 3), dtype=np.uint8)


def test_placeholders_are_expanded_by_token_count(processor: HIComProcessor) -> None:
    for number, window in ((1, None), (4, None), (7, (3, 2, 4)), (9, (1, 1, 1))):
        inputs = processor(text="<video> what ?", videos=[frames(number)], window=window, num_frames=9, **tiny.TENSORS)
        assert int((inputs["input_ids"] == processor.video_token_id).sum()) == processor.token_count(number, window)


def test_left_padding(processor: HIComProcessor) -> None:
    inputs = processor(text=["what is red ?", "what ?"], **tiny.TENSORS)
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert inputs["input_ids"][1, :2].tolist() == [0, 0]


def test_frames_are_padded_with_the_mean_colour_and_centred(processor: HIComProcessor) -> None:
    pixels = processor.pixel_values(np.full((1, 10, 20, 3), 255, dtype=np.uint8))
    assert pixels.shape == (1, 3, 20, 20)
    assert torch.allclose(pixels[:, :, 5:15], torch.ones(()))
    # 127 / 255 is as near to the mean as 8 bits come.
    assert pixels[:, :, :5].abs().max() < 0.005
    assert pixels[:, :, 15:].abs().max() < 0.005


def test_resizing_matches_pillow(processor: HIComProcessor) -> None:
    """Bicubic with a low-pass filter, as the towers were trained with."""
    image = Image.effect_mandelbrot((60, 60), (-2, -1.5, 1, 1.5), 60).convert("RGB")
    ours = processor.pixel_values(np.asarray(image)[None])[0]
    expected = np.asarray(image.resize((20, 20), Image.Resampling.BICUBIC), dtype=np.float32) / 127.5 - 1
    assert np.abs(ours.permute(1, 2, 0).numpy() - expected).max() < 0.02


def test_instruction_of_each_prompt_steers_its_own_videos(processor: HIComProcessor) -> None:
    prompts = [
        "<|im_start|>user\n<video>\nwhat moves ?<|im_end|>\n<|im_start|>assistant\nleft<|im_end|>\n"
        "<|im_start|>user\nis there a dog ?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\n<video><video>\nhow many ?<|im_end|>\n",
    ]
    inputs = processor(text=prompts, videos=[frames(2), frames(3), frames(2)], **tiny.TENSORS)
    texts = processor.instruction_tokenizer.batch_decode(inputs["instruction_input_ids"], skip_special_tokens=True)
    assert [text.strip() for text in texts] == ["is there a dog ?", "how many ?", "how many ?"]
    assert inputs["instruction_input_ids"].shape == (3, 12)
    assert "instruction_attention_mask" not in inputs, "SigLIP's text tower is trained without a mask"


def test_clip_takes_a_mask() -> None:
    processor = tiny.processor(tiny.config("clip"))
    inputs = processor(text="<video> what ?", videos=[frames(2)], **tiny.TENSORS)
    assert inputs["instruction_attention_mask"].sum() == 2


def test_long_instruction_is_cut_with_a_warning(processor: HIComProcessor) -> None:
    with pytest.warns(InstructionWarning, match="20 tokens, the instruction encoder takes 12"):
        inputs = processor(text="<video> what ?", videos=[frames(2)], instruction="dog " * 20, **tiny.TENSORS)
    assert inputs["instruction_input_ids"].shape == (1, 12)


def test_labels_cover_the_last_answer_and_its_end(processor: HIComProcessor) -> None:
    turns = [
        {"role": "user", "content": "<video>\nwhat moves left ?"},
        {"role": "assistant", "content": "a dog"},
        {"role": "user", "content": "is there a cat ?"},
        {"role": "assistant", "content": "no"},
    ]
    inputs = processor.apply_chat_template(
        [turns, turns[:2]], tokenize=True, return_dict=True, return_labels=True, video_num_frames=[3, 4], **tiny.TENSORS
    )
    decoded = [processor.tokenizer.decode(row[row != -100]).replace(" ", "") for row in inputs["labels"]]
    assert decoded == ["no<|im_end|>", "adog<|im_end|>"]
    labelled = inputs["labels"] != -100
    assert torch.equal(inputs["labels"][labelled], inputs["input_ids"][labelled])


def test_labels_need_an_answer(processor: HIComProcessor) -> None:
    with pytest.raises(ValueError, match="end with an assistant's answer"):
        processor.apply_chat_template([{"role": "user", "content": "what ?"}], tokenize=True, return_labels=True)


def test_media_and_placeholders_must_agree(processor: HIComProcessor) -> None:
    with pytest.raises(ValueError, match="2 video placeholders, but 1 videos"):
        processor(text="<video><video> what ?", videos=[frames(2)], **tiny.TENSORS)
    with pytest.raises(ValueError, match="0 image placeholders, but 1 images"):
        processor(text="what ?", images=[frames(1)[0]], **tiny.TENSORS)


def test_unknown_arguments_are_errors(processor: HIComProcessor) -> None:
    with pytest.raises(ValueError, match="instructions"):
        processor(text="what ?", instructions="what ?", **tiny.TENSORS)


def test_malformed_message(processor: HIComProcessor) -> None:
    with pytest.raises(ValueError, match="type='audio'"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "audio"}]}])


def test_save_and_load(processor: HIComProcessor, tmp_path) -> None:
    custom = tiny.processor(tiny.config(), num_frames=7, image_mean=(0.1, 0.2, 0.3))
    custom.save_pretrained(tmp_path)
    loaded = HIComProcessor.from_pretrained(tmp_path)
    assert loaded.num_frames == 7
    assert loaded.image_mean == [0.1, 0.2, 0.3]
    assert loaded.window == custom.window
    assert loaded.chat_template == custom.chat_template
    a, b = (p(text="<video> what ?", videos=[frames(9)], **tiny.TENSORS) for p in (custom, loaded))
    for name in a:
        assert torch.equal(a[name], b[name]), name
