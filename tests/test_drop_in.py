"""`hicom.attach`: pooling by the instruction in models of transformers that know nothing of it."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from transformers import LlavaConfig, LlavaForConditionalGeneration

import hicom
import llava
import reference
import tiny
from chat_templates import FAMILIES
from hicom.drop_in import Attachment, pool_windows
from hicom.model.dual_encoder import CLIP_NORMALISATION, SIGLIP_NORMALISATION, DualEncoder

WHICH, WHERE = "which object moves left ?", "is there a red circle ?"
DUAL = {"onevision": "siglip", "llava_video": "siglip", "next_video": "clip"}


def attach(model: Any, family: str, **kwargs: Any) -> Attachment:
    """Attach with the family's processor and dual encoder unless `kwargs` say otherwise."""
    settings: dict[str, Any] = {"processor": llava.processor(family), "window": (2, 3, 2)} | kwargs
    if "dual_encoder" not in settings:
        settings["dual_encoder"] = llava.dual_encoder(DUAL[family], image_size=24 if family == "next_video" else 20)
    if settings["dual_encoder"] is not None:
        settings.setdefault("instruction_tokenizer", llava.tokenizer())
    return hicom.attach(model, **settings)


def spy(attachment: Attachment, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Return a list that fills with the instructions of every call, one a video."""
    seen: list[list[str]] = []
    embed = attachment._embed
    monkeypatch.setattr(attachment, "_embed", lambda texts: seen.append(list(texts)) or embed(texts))
    return seen


def last_logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(**inputs).logits[:, -1])


def visual_tokens(model: Any, attachment: Attachment, family: str, pixels: Tensor) -> Tensor:
    """Return what the language model is given at the placeholders of one prompt a video, `float[V, N, C]`.

    Not what `get_video_features` returns: which of it and `forward` adds the newline depends on transformers.
    """
    ids = llava.tokenizer()(llava.prompt(family, f"<video>\n{WHICH}")).input_ids
    inputs = attachment.expand([ids] * len(pixels), pixels.shape[1])
    given: list[Tensor] = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    last_logits(model, inputs | {"pixel_values_videos": pixels})
    handle.remove()
    found = given[0][inputs["input_ids"] == model.config.video_token_id]
    return found.reshape(len(pixels), -1, found.shape[-1])


# What is computed


def by_loops(values: Tensor, keys: Tensor, query: Tensor, window: tuple[int, int, int], scale: float) -> list[Tensor]:
    """One vector a window, patch by patch in float64: the judge of `pool_windows`."""
    axes = [
        [range(start, min(start + size, length)) for start in reference.group_starts(length, size)]
        for length, size in zip(values.shape[:3], window, strict=True)
    ]
    pooled = []
    for frames in axes[0]:
        for rows in axes[1]:
            for columns in axes[2]:
                places = [(t, h, w) for t in frames for h in rows for w in columns]
                cosines = [(reference.unit(query) * reference.unit(keys[place])).sum() for place in places]
                weights = reference.softmax([scale * cosine for cosine in cosines])
                pooled.append(reference.weighted_sum(weights, [values[place] for place in places]))
    return pooled


def own_keys(dual: Any, pixels: Tensor, grid: int) -> Tensor:
    """Keys straight from the equations: what is left of the pooling when its attention is taken out."""
    last = dual.vision_model(pixels).last_hidden_state
    if "visual_projection" in dict(dual.named_children()):
        keys = dual.visual_projection(dual.vision_model.post_layernorm(last))[:, 1:]
    else:
        head = dual.vision_model.head
        keys = last + head.mlp(head.layernorm(last))
    return keys.reshape(len(pixels), grid, grid, -1).double()


@pytest.mark.parametrize("family", llava.FAMILIES)
@pytest.mark.parametrize(("window", "num_frames"), [((2, 3, 2), 5), ((4, 3, 3), 3), ((1, 9, 9), 2)])
@torch.no_grad()
def test_equals_loops(family: str, window: tuple[int, int, int], num_frames: int) -> None:
    model = llava.model(family)
    dual = llava.dual_encoder(DUAL[family], image_size=24 if family == "next_video" else 20)
    pixels = llava.videos(family, 2, num_frames)
    config, core = model.config, model.model
    grid = config.vision_config.image_size // config.vision_config.patch_size
    layer = config.vision_feature_layer
    texts = llava.tokenizer()([WHICH, WHERE], padding="max_length", max_length=12, return_tensors="pt")
    if family == "next_video":
        queries = dual.get_text_features(**texts).pooler_output
    else:
        queries = dual.get_text_features(texts["input_ids"]).pooler_output
    expected = []
    for video, query in zip(pixels, queries, strict=True):
        values = core.vision_tower(video, output_hidden_states=True).hidden_states[layer]
        values = values[:, -(grid**2) :].reshape(num_frames, grid, grid, -1).double()
        pooled = by_loops(values, own_keys(dual, video, grid), query.double(), window, float(dual.logit_scale.exp()))
        projector = copy.deepcopy(core.multi_modal_projector).double()
        tokens = projector(torch.stack(pooled))
        if family != "next_video":
            tokens = torch.cat([tokens, core.image_newline[None].double()])
        expected.append(tokens)
    with attach(model, family, dual_encoder=dual, window=window) as attachment, attachment.stated([WHICH, WHERE]):
        found = visual_tokens(model, attachment, family, pixels)
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_16_bit_features_get_weights_of_32() -> None:
    values, keys, query = torch.randn(4, 4, 4, 8), torch.randn(4, 4, 4, 8), torch.randn(1, 8)
    halved = [x.half() for x in (values, keys, query)]
    exact = by_loops(*(x.double() for x in halved[:2]), halved[2][0].double(), (2, 2, 2), 100.0)
    found = pool_windows(halved[0], [4], (2, 2, 2), halved[1], halved[2], 100.0)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.flatten(0, 2).double(), torch.stack(exact), rtol=2e-3, atol=2e-3)


@torch.no_grad()
def test_a_scale_of_zero_and_no_dual_encoder_are_plain_means() -> None:
    model, pixels = llava.model("onevision"), llava.videos("onevision", 1, 4)
    values = model.model.vision_tower(pixels[0], output_hidden_states=True).hidden_states[-1].reshape(4, 5, 5, -1)
    mean = model.model.multi_modal_projector(values[:2, :3, :2].mean((0, 1, 2)))
    with attach(model, "onevision", dual_encoder=None):
        plain = model.model.get_video_features(pixels).pooler_output
    with attach(model, "onevision", logit_scale=0.0):
        scaled = model.model.get_video_features(pixels).pooler_output
    assert torch.equal(plain, scaled)
    torch.testing.assert_close(plain[0, 0], mean)


@torch.no_grad()
def test_projected_features_can_be_pooled_instead() -> None:
    model, pixels = llava.model("onevision"), llava.videos("onevision", 1, 4)
    values = model.model.vision_tower(pixels[0], output_hidden_states=True).hidden_states[-1].reshape(4, 5, 5, -1)
    mean = model.model.multi_modal_projector(values)[:2, :3, :2].mean((0, 1, 2))
    with attach(model, "onevision", dual_encoder=None, pool_projected=True):
        torch.testing.assert_close(model.model.get_video_features(pixels).pooler_output[0, 0], mean)


@pytest.mark.parametrize("family", llava.FAMILIES)
def test_the_instruction_changes_the_answer(family: str) -> None:
    model = llava.model(family)
    with attach(model, family) as attachment:
        inputs = _inputs(attachment, family, [f"<video>\n{WHICH}"], llava.videos(family, 1, 4))
        own = last_logits(model, inputs)
        with attachment.stated(WHICH):
            assert torch.equal(last_logits(model, inputs), own)
        with attachment.stated(WHERE):
            assert (last_logits(model, inputs) - own).abs().max() > 1e-3


def _inputs(attachment: Attachment, family: str, turns: list[str], pixels: Tensor | None = None) -> dict[str, Any]:
    """Return what the attached processor makes of one-turn prompts."""
    processor = attachment._patches.owner("replace_video_token")
    processor.tokenizer.padding_side = "left"
    texts = [llava.prompt(family, turn) for turn in turns]
    videos = {} if pixels is None else {"videos": list(pixels)}
    return dict(processor(text=texts, padding=True, return_tensors="pt", **videos))


# Whose instruction it is


@pytest.mark.parametrize("family", llava.FAMILIES)
def test_every_video_gets_the_instruction_of_its_prompt(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llava.model(family)
    turns = [f"<video><video>\n{WHICH}", "describe a cat", f"<video>\n{WHERE} Answer with the option letter ."]
    with attach(model, family) as attachment:
        seen = spy(attachment, monkeypatch)
        inputs = _inputs(attachment, family, turns, llava.videos(family, 3, 4))
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        last_logits(model, inputs)
    assert seen == [[WHICH, WHICH, WHERE]] * 2


def test_the_last_turn_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llava.model("onevision")
    with attach(model, "onevision") as attachment:
        seen = spy(attachment, monkeypatch)
        ids = llava.tokenizer()(llava.prompt("onevision", f"<video>\n{WHICH}", WHERE)).input_ids
        last_logits(model, attachment.expand([ids], 4) | {"pixel_values_videos": llava.videos("onevision", 1, 4)})
    assert seen == [[WHERE]]


@pytest.mark.parametrize("family", llava.FAMILIES)
def test_a_batch_is_its_prompts_one_by_one(family: str) -> None:
    model, pixels = llava.model(family), llava.videos(family, 3, 5)
    turns = [f"<video>\n{WHICH}", "describe a cat", f"<video> and <video>\n{WHERE}"]
    parts = [pixels[:1], None, pixels[1:]]
    with attach(model, family) as attachment:
        batch = _inputs(attachment, family, turns, pixels)
        alone = [_inputs(attachment, family, [turn], part) for turn, part in zip(turns, parts, strict=True)]
        logits = torch.cat([last_logits(model, inputs) for inputs in alone])
        torch.testing.assert_close(last_logits(model, batch), logits, rtol=1e-4, atol=1e-4)
        settings = {"max_new_tokens": 3, "do_sample": False}
        answers = [model.generate(**inputs, **settings)[:, -3:] for inputs in alone]
        assert torch.equal(model.generate(**batch, **settings)[:, -3:], torch.cat(answers))


def test_beams_see_the_video_of_their_prompt() -> None:
    model, pixels = llava.model("onevision"), llava.videos("onevision", 2, 4)
    turns = [f"<video>\n{WHICH}", f"<video>\n{WHERE}"]
    settings = {"max_new_tokens": 3, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    with attach(model, "onevision") as attachment:
        both = model.generate(**_inputs(attachment, "onevision", turns, pixels), **settings)[:, -3:]
        for number, turn in enumerate(turns):
            alone = _inputs(attachment, "onevision", [turn], pixels[number : number + 1])
            assert torch.equal(model.generate(**alone, **settings)[:, -3:], both[2 * number : 2 * number + 2])


# How many tokens there are


@pytest.mark.parametrize("family", llava.FAMILIES)
@pytest.mark.parametrize("num_frames", [1, 3, 8])
@pytest.mark.parametrize("budget", [{"window": (4, 3, 3)}, {"window": None}, {"window": None, "max_visual_tokens": 20}])
def test_placeholders_are_the_tokens(family: str, num_frames: int, budget: dict[str, Any]) -> None:
    model, pixels = llava.model(family), llava.videos(family, 1, num_frames)
    text = llava.prompt(family, f"<video>\n{WHICH}")
    with attach(model, family, **budget) as attachment:
        inputs = _inputs(attachment, family, [f"<video>\n{WHICH}"], pixels)
        expanded = attachment.expand([llava.tokenizer()(text).input_ids], num_frames)
        assert torch.equal(inputs["input_ids"], expanded["input_ids"])
        count = int((inputs["input_ids"] == model.config.video_token_id).sum())
        assert count == attachment.token_count(num_frames)
        if "max_visual_tokens" in budget:
            assert count <= 20
        last_logits(model, inputs)  # transformers refuses any other number


def test_default_window_and_count() -> None:
    with attach(llava.model("onevision"), "onevision", window=None) as attachment:
        assert attachment.window == (4, 3, 3)
        assert attachment.token_count(8) == 2 * 2 * 2 + 1  # 5x5 patches make 2x2 windows; and a newline


def test_expand_pads_on_the_left() -> None:
    with attach(llava.model("next_video"), "next_video", window=(1, 6, 6)) as attachment:
        batch = attachment.expand([[7, 4, 8], [9]], num_frames=2)
    assert batch["input_ids"].tolist() == [[7, 4, 4, 8], [0, 0, 0, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 0, 1]]


# One tower or two


def _with_tower_of(dual: Any, family: str, **fields: Any) -> Any:
    model = llava.model(family, **fields)
    model.model.vision_tower.load_state_dict(dual.vision_model.state_dict(), strict=family != "llava_video")
    return model


@pytest.mark.parametrize("family", llava.FAMILIES)
def test_an_equal_tower_runs_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dual = llava.dual_encoder(DUAL[family], image_size=24 if family == "next_video" else 20)
    model = llava.model(family)
    own = {k: v for k, v in dual.vision_model.state_dict().items() if k in model.model.vision_tower.state_dict()}
    model.model.vision_tower.load_state_dict(own)
    pixels = llava.videos(family, 1, 4)
    with attach(model, family, dual_encoder=dual, share_tower=False) as attachment, attachment.stated(WHICH):
        assert not attachment.shares_tower
        twice = model.model.get_video_features(pixels).pooler_output
    with attach(model, family, dual_encoder=dual) as attachment, attachment.stated(WHICH):
        assert attachment.shares_tower
        monkeypatch.setattr(DualEncoder, "keys", None)  # the second forward pass
        torch.testing.assert_close(model.model.get_video_features(pixels).pooler_output, twice, rtol=1e-4, atol=1e-5)


def test_a_tower_that_was_trained_further_is_not_shared() -> None:
    dual, model = llava.dual_encoder("siglip"), llava.model("onevision")
    model.model.vision_tower.load_state_dict(dual.vision_model.state_dict())
    with torch.no_grad():
        model.model.vision_tower.encoder.layers[-1].mlp.fc2.bias[0] += 1e-6
    with attach(model, "onevision", dual_encoder=dual) as attachment:
        assert not attachment.shares_tower
    with pytest.raises(ValueError, match=r"share_tower=True, but .* leave share_tower out"):
        attach(model, "onevision", dual_encoder=dual, share_tower=True)


@pytest.mark.parametrize("kind", ["siglip", "siglip2", "clip"])
def test_keys_do_not_depend_on_how_the_model_normalises(kind: str) -> None:
    encoder = DualEncoder(llava.dual_encoder(kind), llava.tokenizer())
    images = torch.rand(2, 3, 20, 20)
    keys = []
    for mean, std in (CLIP_NORMALISATION, SIGLIP_NORMALISATION):
        pixels = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        keys.append(encoder.keys(pixels, (mean, std)))
    torch.testing.assert_close(*keys, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["siglip", "siglip2", "clip"])
def test_a_dual_encoder_of_another_kind_and_size(kind: str) -> None:
    sizes = {"num_patches": 9} if kind == "siglip2" else {"image_size": 12}
    dual = llava.dual_encoder(kind, **sizes)
    model = llava.model("onevision")
    with attach(model, "onevision", dual_encoder=dual) as attachment, attachment.stated(WHICH):
        # A video whose right half alone is bright: keys of a 3x3 grid have to end up on the right side of the 5x5 one.
        pixels = torch.full((1, 2, 3, 20, 20), -1.0)
        pixels[..., 10:] = 1.0
        keys = attachment._encode(pixels[0], -1, with_keys=True)[1]
        assert keys is not None
        assert keys.shape[:3] == (2, 5, 5)
        assert (keys[:, :, 0] - keys[:, :, 4]).norm() > 10 * (keys[:, 0] - keys[:, 4]).norm() / 9
        assert model.model.get_video_features(pixels).pooler_output.isfinite().all()


def test_a_folder_is_loaded(tmp_path: Path) -> None:
    dual = llava.dual_encoder("siglip")
    dual.save_pretrained(tmp_path)
    llava.tokenizer().save_pretrained(tmp_path)
    model, pixels = llava.model("onevision"), llava.videos("onevision", 1, 4)
    found = []
    for source, tokenizer in ((str(tmp_path), None), (dual, llava.tokenizer())):
        with (
            attach(model, "onevision", dual_encoder=source, instruction_tokenizer=tokenizer) as attachment,
            attachment.stated(WHICH),
        ):
            found.append(model.model.get_video_features(pixels).pooler_output)
    assert torch.equal(*found)


# What is left alone


def test_images_go_their_own_way() -> None:
    model, processor = llava.model("onevision"), llava.processor("onevision")
    image = Image.fromarray(np.random.randint(0, 255, (20, 40, 3), np.uint8))
    text = llava.prompt("onevision", f"<image>\n{WHICH}")
    plain = processor(text=text, images=image, return_tensors="pt")
    expected = last_logits(model, dict(plain))
    with attach(model, "onevision", processor=processor) as attachment:
        inputs = processor(text=text, images=image, return_tensors="pt")
        assert torch.equal(inputs["input_ids"], plain["input_ids"])
        assert torch.equal(last_logits(model, dict(inputs)), expected)
        both = processor(
            text=llava.prompt("onevision", f"<image> <video>\n{WHICH}"),
            images=image,
            videos=list(llava.videos("onevision", 1, 4)),
            return_tensors="pt",
        )
        assert int((both["input_ids"] == model.config.video_token_id).sum()) == attachment.token_count(4)
        assert not torch.equal(last_logits(model, dict(both)), expected)


@pytest.mark.parametrize("family", llava.FAMILIES)
def test_detach_restores_everything(family: str) -> None:
    model, processor = llava.model(family), llava.processor(family)
    text, pixels = llava.prompt(family, f"<video>\n{WHICH}"), list(llava.videos(family, 1, 4))
    plain = dict(processor(text=text, videos=pixels, return_tensors="pt"))
    settings = {"max_new_tokens": 3, "do_sample": False}
    logits, answer = last_logits(model, plain), model.generate(**plain, **settings)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    objects = [*model.modules(), processor, processor.tokenizer, model.config, model.generation_config]
    before = [dict(vars(each)) for each in objects]

    with attach(model, family, processor=processor) as attachment:
        inputs = processor(text=text, videos=pixels, return_tensors="pt")
        assert inputs["input_ids"].shape[1] < plain["input_ids"].shape[1]
        model.generate(**inputs, **settings)
        assert processor.to_dict().keys() == llava.processor(family).to_dict().keys()  # can be saved meanwhile
        assert model.state_dict().keys() == weights.keys()
    attachment.detach()  # once more does nothing

    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert [list(vars(each)) for each in objects] == [list(each) for each in before]
    for each, attributes in zip(objects, before, strict=True):
        assert all(vars(each)[name] is value for name, value in attributes.items())
    again = dict(processor(text=text, videos=pixels, return_tensors="pt"))
    assert torch.equal(again["input_ids"], plain["input_ids"])
    assert torch.equal(last_logits(model, plain), logits)
    assert torch.equal(model.generate(**plain, **settings), answer)


def test_what_was_set_on_the_instance_comes_back() -> None:
    model = llava.model("onevision")
    forward = model.model.forward
    model.model.forward = hooked = lambda *args, **kwargs: forward(*args, **kwargs)  # as accelerate does
    with attach(model, "onevision"):
        assert model.model.forward is not hooked
    assert vars(model.model)["forward"] is hooked


def test_an_error_inside_detaches() -> None:
    model = llava.model("onevision")
    with pytest.raises(RuntimeError), attach(model, "onevision"):
        raise RuntimeError
    with attach(model, "onevision"):  # it can be attached to again
        pass


# What cannot be


def test_attaching_twice_is_an_error() -> None:
    model, processor = llava.model("onevision"), llava.processor("onevision")
    with attach(model, "onevision", processor=processor):
        with pytest.raises(ValueError, match=r"the model is attached already; call detach"):
            attach(model, "onevision")
        with pytest.raises(ValueError, match=r"the processor is attached already; call detach"):
            attach(llava.model("onevision"), "onevision", processor=processor)


def _headless() -> Any:
    return llava.dual_encoder("siglip", vision_use_head=False)


def _saved_tower(folder: Path) -> str:
    llava.dual_encoder("siglip").vision_model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dual_encoder": lambda _: llava.dual_encoder("siglip").vision_model}, r"is a SiglipVisionModel, which is no"),
        ({"dual_encoder": lambda _: _headless()}, r"no attention-pool head .* give the original SigLIP checkpoint"),
        ({"dual_encoder": _saved_tower}, r"a model of type 'siglip_vision_model', not a dual encoder; give"),
        ({"dual_encoder": lambda folder: str(folder / "none")}, r"none: no such model folder"),
        ({"instruction_tokenizer": None}, r"without its tokenizer; pass instruction_tokenizer"),
        ({"window": (4, 3)}, r"window=\(4, 3\) must be three positive integers"),
        ({"max_visual_tokens": 9}, r"window=\(2, 3, 2\) and max_visual_tokens=9 both choose the window; give one"),
        ({"window": None, "max_visual_tokens": 1}, r"max_visual_tokens=1 holds no token beside the newline; give at"),
        ({"logit_scale": -1.0}, r"logit_scale=-1.0 must be a finite number of at least 0"),
        ({"user_turn": "USER:(.*"}, r"user_turn='USER:\(\.\*' is no regular expression: "),
        ({"user_turn": "USER:.*"}, r"user_turn='USER:\.\*' has no group; put what the user says in brackets"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    chosen = {name: value(tmp_path) if callable(value) else value for name, value in settings.items()}
    with pytest.raises(ValueError, match=message):
        attach(llava.model("onevision"), "onevision", **chosen)


def test_bad_models() -> None:
    parts = {"vision_config": tiny.towers("clip")[0], "text_config": tiny.llm("llama")}
    with pytest.raises(ValueError, match=r"a LlavaForConditionalGeneration cannot be attached to; it must be one of"):
        attach(LlavaForConditionalGeneration(LlavaConfig(**parts)), "next_video")
    with pytest.raises(ValueError, match=r"spatial_pool_mode='conv': .* use a model that pools by 'average' or 'max'"):
        attach(llava.model("next_video", spatial_pool_mode="conv"), "next_video")


def test_inputs_from_before_are_refused() -> None:
    model, processor = llava.model("onevision"), llava.processor("onevision")
    pixels = list(llava.videos("onevision", 1, 4))
    before = dict(processor(text=llava.prompt("onevision", f"<video>\n{WHICH}"), videos=pixels, return_tensors="pt"))
    with (
        attach(model, "onevision", processor=processor),
        pytest.raises(ValueError, match=r"have \[37\] video placeholders; 1 videos of 4 frames need 13 each: make the"),
    ):
        model.generate(**before, max_new_tokens=1)


def test_missing_instructions_are_asked_for() -> None:
    model, pixels = llava.model("onevision"), llava.videos("onevision", 2, 4)
    with attach(model, "onevision", processor=None) as attachment:
        ids = [llava.tokenizer()(llava.prompt("onevision", f"<video>\n{text}")).input_ids for text in (WHICH, WHERE)]
        inputs = attachment.expand(ids, 4) | {"pixel_values_videos": pixels}
        with pytest.raises(ValueError, match=r"no processor or tokenizer was given; state it"):
            last_logits(model, inputs)
        with pytest.raises(ValueError, match=r"no input_ids are given; state it"), _tokenizer(attachment):
            model.model.get_video_features(pixels)
        with (
            pytest.raises(ValueError, match=r"3 instructions are stated for 2 videos; state 1 or 2"),
            attachment.stated([WHICH] * 3),
        ):
            last_logits(model, inputs)
        with attachment.stated([WHICH, WHERE]):
            last_logits(model, inputs)


def _tokenizer(attachment: Attachment) -> Any:
    patch = pytest.MonkeyPatch()
    patch.setattr(attachment, "_tokenizer", llava.tokenizer())
    return patch.context()


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "llava-onevision"])
def test_the_turn_is_found_by_any_template(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the blanks that a word tokenizer puts everywhere."""
    words, known = llava.tokenizer(), FAMILIES[name]
    words.add_special_tokens({"additional_special_tokens": [*known.specials, known.bos, known.eos, "<video>"]})
    words.bos_token, words.eos_token, words.chat_template = known.bos, known.eos, known.template
    messages = [
        {"role": "user", "content": f"<video>\n{WHERE}"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": f"{WHICH} Answer with the option letter ."},
    ]
    text = words.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    for special in (known.bos, known.eos, *known.specials):
        text = text.replace(special, " ")
    words.add_tokens(sorted({*re.findall(r"\w+|[^\w\s]+", text)} - {*words.get_vocab()}))
    ids = words.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    model = llava.model("onevision")
    model.resize_token_embeddings(len(words))
    with attach(model, "onevision", processor=words) as attachment:
        seen = spy(attachment, monkeypatch)
        last_logits(model, attachment.expand([ids], 4) | {"pixel_values_videos": llava.videos("onevision", 1, 4)})
    assert seen == [[WHICH]]


def test_without_a_template_it_is_asked_for() -> None:
    words = llava.tokenizer()
    words.chat_template = None
    model, pixels = llava.model("onevision"), llava.videos("onevision", 1, 4)
    with attach(model, "onevision", processor=words) as attachment:
        inputs = attachment.expand([words(f"<video> {WHICH}").input_ids], 4) | {"pixel_values_videos": pixels}
        with pytest.raises(ValueError, match=r"no chat template to find the user's turn by: set it; pass user_turn"):
            last_logits(model, inputs)


def test_an_unknown_template_is_named() -> None:
    model, pixels = llava.model("onevision"), llava.videos("onevision", 1, 4)
    ids = llava.tokenizer()(f"<video> {WHICH} describe").input_ids
    with attach(model, "onevision", processor=llava.tokenizer()) as attachment:
        inputs = attachment.expand([ids], 4) | {"pixel_values_videos": pixels}
        with pytest.raises(ValueError, match=r"no user turn is found in the prompt 'which .* pass user_turn"):
            last_logits(model, inputs)
    with attach(model, "onevision", processor=llava.tokenizer(), user_turn=r"(.*) describe"):
        last_logits(model, inputs)
    with (
        attach(model, "onevision", processor=llava.tokenizer(), user_turn="USER:(.*)"),
        pytest.raises(ValueError, match=r"no user turn is found in the prompt 'which .* correct it, or state the inst"),
    ):
        last_logits(model, inputs)


# What is written about it

PAGE = (Path(__file__).parents[1] / "docs" / "attach.md").read_text(encoding="utf-8")


def test_the_page_runs() -> None:
    family = "onevision"
    names: dict[str, Any] = {
        "model": llava.model(family),
        "processor": llava.processor(family),
        "tokenizer": llava.tokenizer(),
        "siglip": llava.dual_encoder("siglip"),
        "siglip_tokenizer": llava.tokenizer(),
        "frames": llava.videos(family, 1, 8)[0],
    }
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "docs/attach.md", "exec"), names)
    assert "get_video_features" not in vars(names["model"].model)


@pytest.mark.parametrize("family", llava.FAMILIES)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: AveragedModel(model).module], ids=["deepcopy", "ema"])
def test_a_copy_of_an_attached_model_is_a_model_of_its_own(family: str, copied: Any) -> None:
    model = llava.model(family)
    attachment = attach(model, family)
    inputs = attachment.expand([llava.tokenizer()(llava.prompt(family, f"<video>\n{WHICH}")).input_ids], 4)
    inputs["pixel_values_videos"] = torch.randn(1, 4, 3, *(2 * [24 if family == "next_video" else 20]))
    other = copied(model)
    wanted, ids = last_logits(model, inputs), model.generate(**inputs, max_new_tokens=3)
    assert torch.equal(last_logits(other, inputs), wanted)
    assert torch.equal(other.generate(**inputs, max_new_tokens=3), ids)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not other.model(**inputs).last_hidden_state.any()
    assert not other.generate(**inputs, max_new_tokens=3)[:, -3:].any()
    assert torch.equal(last_logits(model, inputs), wanted)
    assert torch.equal(model.generate(**inputs, max_new_tokens=3), ids)
    # Detaching one leaves the other as it is.
    attachment.detach()
    assert "forward" not in vars(model.model)
    assert "forward" in vars(other.model)
