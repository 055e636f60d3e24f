"""What models of transformers do in the small: tuples, misfitting shapes, arguments, attention, copies, numbers."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel
from transformers import AutoModelForImageTextToText

import hicom
import tiny
from hicom.inference import VideoChat
from hicom.model.modeling import HIComForConditionalGeneration

QUESTION = "which object moves left ?"


def frames(number: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (number, 20, 24, 3), dtype=np.uint8)


def batch(model: HIComForConditionalGeneration) -> dict[str, Any]:
    text = f"<|im_start|>user\n<video>\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    return dict(tiny.processor(model.config)(text=text, videos=[frames(4)], **tiny.TENSORS))


@pytest.mark.parametrize("by_config", [False, True])
def test_a_tuple_on_request(by_config: bool) -> None:
    model = tiny.model()
    inputs = batch(model)
    asked: dict[str, Any] = {} if by_config else {"return_dict": False}
    wanted = model(**inputs, labels=inputs["input_ids"])
    video = {name: x for name, x in inputs.items() if name not in ("input_ids", "attention_mask")}
    tokens = model.get_video_features(**video).pooler_output
    if by_config:
        model.config.return_dict = False
    loss, logits, *_ = model(**inputs, labels=inputs["input_ids"], **asked)
    assert torch.equal(loss, wanted.loss)
    assert torch.equal(logits, wanted.logits)
    assert isinstance(model.model(**inputs, **asked), tuple)
    (found,) = model.get_video_features(**video, **asked)
    assert torch.equal(found[0], tokens[0])
    model.generate(**inputs, max_new_tokens=2)


def test_tensors_of_another_shape_are_made_anew_where_that_is_asked_for(tmp_path: Path) -> None:
    hicom.register()
    folder = tiny.save(tmp_path)
    config = tiny.config(num_global_tokens=5)
    load = AutoModelForImageTextToText.from_pretrained
    with pytest.raises(ValueError, match=r"of another shape: model\.compressor\.global_\.query"):
        load(folder, config=config)
    assert load(folder, config=config, ignore_mismatched_sizes=True).model.compressor.global_.query.shape[0] == 5
    assert load(folder, ignore_mismatched_sizes=True).model.compressor.global_.query.shape[0] == 3


def test_a_tokenizer_that_generate_is_given_goes_no_further() -> None:
    """`transformers serve` always passes one."""
    model = tiny.model()
    settings = {"max_new_tokens": 4, "do_sample": False}
    inputs, tokenizer = batch(model), tiny.tokenizer()
    plain = model.generate(**inputs, **settings)
    assert torch.equal(model.generate(**inputs, tokenizer=tokenizer, **settings), plain)


def test_arguments_that_nothing_takes_are_errors() -> None:
    model = tiny.model()
    inputs = batch(model)
    for wrong, nearest in (("pixel_value", "pixel_values"), ("position_id", "position_ids"), ("video_grid_thw", None)):
        hint = f"; did you mean '{nearest}'" if nearest else ""
        with pytest.raises(ValueError, match=f"no argument '{wrong}'{hint}"):
            model(**inputs, **{wrong: torch.ones(1)})
    # What the LLM and the loss take is passed on.
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3
    labels = inputs["input_ids"]
    model(**inputs, labels=labels, num_items_in_batch=torch.tensor(7))
    ignored = model(**inputs, labels=labels, ignore_index=int(labels[0, -1])).loss
    assert ignored != model(**inputs, labels=labels).loss
    with pytest.raises(ValueError, match="either these or media"):
        model(**inputs | {"input_ids": None}, inputs_embeds=model.get_input_embeddings()(labels))


def test_flex_attention_equals_sdpa() -> None:
    model = tiny.model()
    inputs = batch(model)
    wanted = model(**inputs).logits
    model.set_attn_implementation({"text_config": "flex_attention"})
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(model(**inputs).logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: AveragedModel(model).module, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "ema", "pickle"],
)
def test_a_copy_is_a_model_of_its_own(copied: Any, layer: int) -> None:
    """The hidden state of the tower goes to whoever runs the tower, original or copy."""
    model = tiny.model(vision_feature_layer=layer)
    inputs = batch(model)
    other = copied(model)
    wanted = model(**inputs).logits
    assert torch.equal(other(**inputs).logits, wanted)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(other(**inputs).logits, wanted)
    assert not model(**inputs).logits.any()


def test_numbers_that_are_not_finite_are_told() -> None:
    model = tiny.model()
    processor, inputs = tiny.processor(model.config), batch(model)
    with torch.no_grad():
        model.lm_head.weight[0] = torch.nan
    with pytest.raises(ValueError, match="logits behind the prompt are not finite"):
        model.generate(**inputs, max_new_tokens=2)
    with pytest.raises(ValueError, match="logits behind the prompt are not finite"):
        VideoChat(model, processor).ask(frames(4), QUESTION)
    model = tiny.model()
    with torch.no_grad():
        model.model.compressor.local.readout[0].bias[0] = torch.inf
    with pytest.raises(ValueError, match="embeddings of the prompt"):
        model.generate(**inputs, max_new_tokens=2)
    model = tiny.model()
    with torch.no_grad():
        model.model.vision_tower.embeddings.patch_embedding.weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"features of .* not finite"):
        VideoChat(model, processor).encode(frames(4))


def test_several_answers_to_a_question() -> None:
    model = tiny.model()
    chat = VideoChat(model, tiny.processor(model.config))
    video = chat.encode(frames(4))
    asked: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 4}
    answers = chat.ask(video, QUESTION, **asked)
    assert len(answers) == 3
    assert len({str(each) for each in answers}) > 1
    assert answers[0] == chat.ask(video, QUESTION, num_beams=3, max_new_tokens=4)
    both = chat.ask(video, [QUESTION, "what is red ?"], **asked)
    assert [len(found) for found in both] == [3, 3]
    assert both[0] == answers
    assert both[1][0].instruction == "what is red ?"
    assert chat.ask_each([video, video], [QUESTION, "what is red ?"], **asked) == both
    for one in (chat.conversation(video).ask, lambda text, **kwargs: list(chat.stream(video, text, **kwargs))):
        with pytest.raises(ValueError, match="num_return_sequences=3: here one answer is returned"):
            one(QUESTION, **asked)
    for name in ("return_dict_in_generate", "output_scores", "output_hidden_states"):
        with pytest.raises(ValueError, match=f"{name}: an answer holds"):
            chat.ask(video, QUESTION, **{name: True})


def test_a_chat_that_was_used_can_be_pickled() -> None:
    model = tiny.model(vision_feature_layer=-2)
    chat = VideoChat(model, tiny.processor(model.config))
    answer = chat.ask(frames(4), QUESTION, max_new_tokens=4)
    assert pickle.loads(pickle.dumps(chat)).ask(frames(4), QUESTION, max_new_tokens=4) == answer
