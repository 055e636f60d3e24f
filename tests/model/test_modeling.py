"""The Hugging Face contract of the model, on tiny random towers and LLMs of every supported family."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import generic

import hicom
import tiny
from hicom.model.compressor import HybridCompressor
from hicom.model.modeling import HIComForConditionalGeneration, HIComModel

TOWERS = ["siglip", "siglip2", "clip"]
LANGUAGES = ["qwen2", "qwen3", "llama"]
PAIRS = [("siglip", "qwen2"), ("siglip", "qwen3"), ("siglip", "llama"), ("siglip2", "qwen2"), ("clip", "llama")]


def frames(number: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (number, 20, 24, 3), dtype=np.uint8)


def chat(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def batch(model: HIComForConditionalGeneration, **kwargs):
    """Three prompts of different lengths: one video, two videos, none."""
    texts = [
        chat("<video>\nwhich object moves left ?"),
        chat("<video>\n<video>\nis there a dog in the first video ?"),
        chat("what is red ?"),
    ]
    videos = [frames(4, 1), frames(5, 2), frames(3, 3)]
    return tiny.processor(model.config, num_frames=8)(text=texts, videos=videos, **tiny.TENSORS, **kwargs)


@pytest.mark.parametrize(("tower", "language"), PAIRS)
def test_forward_loss_and_generate(tower: str, language: str) -> None:
    model = tiny.model(tower, language)
    inputs = batch(model)
    labels = inputs["input_ids"].clone()
    output = model(**inputs, labels=labels)
    assert output.logits.shape == (*inputs["input_ids"].shape, tiny.VOCABULARY)
    assert torch.isfinite(output.loss)
    ids = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4)
    assert ids.shape == (3, inputs["input_ids"].shape[1] + 4)
    assert torch.equal(ids[:, :-4], inputs["input_ids"])


@pytest.mark.parametrize("tower", TOWERS)
def test_batch_equals_one_by_one(tower: str) -> None:
    """Left padding and neighbours must not change a prompt's logits."""
    model = tiny.model(tower)
    inputs = batch(model)
    together = model(**inputs).logits[:, -1]
    processor = tiny.processor(model.config, num_frames=8)
    alone = [
        processor(text=chat("<video>\nwhich object moves left ?"), videos=[frames(4, 1)], **tiny.TENSORS),
        processor(
            text=chat("<video>\n<video>\nis there a dog in the first video ?"),
            videos=[frames(5, 2), frames(3, 3)],
            **tiny.TENSORS,
        ),
        processor(text=chat("what is red ?"), **tiny.TENSORS),
    ]
    for row, single in zip(together, alone, strict=True):
        torch.testing.assert_close(row, model(**single).logits[0, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "top_k": 5}])
def test_encoder_runs_once_per_generate(kwargs: dict) -> None:
    model = tiny.model()
    calls = {"vision": 0, "instruction": 0, "compressor": 0}

    def count(name: str):
        def hook(*_: object) -> None:
            calls[name] += 1

        return hook

    model.model.vision_tower.register_forward_hook(count("vision"))
    model.model.instruction_encoder.register_forward_hook(count("instruction"))
    model.model.compressor.register_forward_hook(count("compressor"))
    ids = model.generate(**batch(model), max_new_tokens=5, min_new_tokens=5, **kwargs)
    assert ids.shape[0] == 3 * kwargs.get("num_return_sequences", 1)
    assert calls == {"vision": 1, "instruction": 1, "compressor": 1}


@pytest.mark.parametrize("compressor", ["hicom", "space_time_pool"])
def test_a_video_placed_twice_is_encoded_once(compressor: str) -> None:
    """Two questions about one video and one about another: two videos of frames, three places."""
    fields = {} if compressor == "hicom" else {"compressor": compressor, "compressor_options": {"window": (2, 2, 2)}}
    model = tiny.model(**fields)
    texts = [chat(f"<video>\n{text}") for text in ("which object moves left ?", "is there a dog ?", "what is red ?")]
    first, second = frames(4, 1), frames(5, 2)
    apart = dict(tiny.processor(model.config, num_frames=8)(text=texts, videos=[first, first, second], **tiny.TENSORS))
    assert apart["video_num_frames"].tolist() == [4, 4, 5]
    together = apart | {
        "pixel_values_videos": apart["pixel_values_videos"][4:],
        "video_num_frames": apart["video_num_frames"][1:],
        "video_index": torch.tensor([0, 0, 1]),
    }
    torch.testing.assert_close(model(**together).logits, model(**apart).logits, rtol=1e-4, atol=1e-5)
    ids = [model.generate(**inputs, max_new_tokens=4, min_new_tokens=4) for inputs in (together, apart)]
    assert torch.equal(*ids)
    with pytest.raises(ValueError, match=r"video_index=\[0, 0, 2\] must name some of 2 videos"):
        model(**together | {"video_index": torch.tensor([0, 0, 2])})


def test_one_beam_equals_greedy_and_cache_equals_no_cache() -> None:
    model = tiny.model()
    inputs = batch(model)
    greedy = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(greedy, model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=False))
    assert torch.equal(greedy, model.generate(**inputs, max_new_tokens=6, num_beams=1))
    torch.manual_seed(0)
    sampled = model.generate(**inputs, max_new_tokens=6, do_sample=True, temperature=5.0)
    torch.manual_seed(0)
    assert torch.equal(sampled, model.generate(**inputs, max_new_tokens=6, do_sample=True, temperature=5.0))
    assert not torch.equal(sampled, greedy)


@pytest.mark.parametrize("use_cache", [True, False])
def test_nothing_deprecated_is_used(use_cache: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions of transformers rename things and warn once a process: here every time."""
    warned: list[str] = []
    monkeypatch.setattr(generic.logger, "warning_once", lambda text, *_, **__: warned.append(text))
    model = tiny.model()
    inputs = batch(model)
    assert model(**inputs, use_cache=use_cache).logits.isfinite().all()
    model.generate(**inputs, max_new_tokens=2, use_cache=use_cache)
    assert not warned


def test_beams_score_at_least_greedy() -> None:
    """Two beams over a prompt with a video: their sequence is at least as likely as the greedy one."""
    model = tiny.model()
    inputs = tiny.processor(model.config)(text=chat("<video>\nwhat moves left ?"), videos=[frames(4)], **tiny.TENSORS)
    length = inputs["input_ids"].shape[1]

    def score(ids: torch.Tensor) -> float:
        embeddings = model.model.embed(
            inputs["input_ids"], **{k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
        )
        new = ids[:, length:]
        full = torch.cat([embeddings, model.get_input_embeddings()(new)], 1)
        logits = model(inputs_embeds=full).logits[:, length - 1 : -1].log_softmax(-1)
        return logits.gather(-1, new[..., None]).sum().item()

    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert score(model.generate(**inputs, num_beams=4, **options)) >= score(model.generate(**inputs, **options)) - 1e-4


def test_instruction_changes_visual_tokens_and_answer_logits() -> None:
    model = tiny.model()
    processor = tiny.processor(model.config)
    prompt = chat("<video>\nwhich object moves left ?")
    one = model(**processor(text=prompt, videos=[frames(4)], **tiny.TENSORS)).logits
    other = model(**processor(text=prompt, videos=[frames(4)], instruction="is there a cat", **tiny.TENSORS)).logits
    assert (one - other).abs().max() > 1e-3


def test_images_and_videos_in_one_prompt() -> None:
    model = tiny.model()
    processor = tiny.processor(model.config)
    inputs = processor(
        text=[chat("<image>\n<video>\nis the dog in the image ?"), chat("<image>\nwhat is red ?")],
        **tiny.TENSORS,
        images=[frames(1, 5)[0], frames(1, 6)[0]],
        videos=[frames(4)],
    )
    assert len(inputs["pixel_values"]) == 2
    assert inputs["image_instruction_input_ids"].shape == (2, 12)
    both = model(**inputs).logits
    swapped = dict(inputs) | {"pixel_values": inputs["pixel_values"].flip(0)}
    assert (both - model(**swapped).logits).abs().max() > 1e-3
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 2


def test_kept_features_equal_frames() -> None:
    model = tiny.model()
    inputs = dict(batch(model))
    expected = model(**inputs).logits
    features = model.encode_frames(inputs.pop("pixel_values_videos"))
    kept = inputs | {"video_values": features.values, "video_keys": features.keys}
    torch.testing.assert_close(model(**kept).logits, expected)
    assert torch.equal(model.generate(**kept, max_new_tokens=3), model.generate(**dict(batch(model)), max_new_tokens=3))


def test_motion_added_beforehand_changes_nothing() -> None:
    model = tiny.model(motion_features=True).model
    torch.nn.init.normal_(model.compressor.motion.outer.weight)
    inputs = dict(batch(tiny.model()))
    counts = inputs["video_num_frames"].tolist()
    features = model.encode_frames(inputs["pixel_values_videos"])
    ids = inputs["instruction_input_ids"], inputs.get("instruction_attention_mask")
    moving = model.add_motion(features, counts)
    assert moving.has_motion
    assert not torch.allclose(moving.values, features.values)
    assert model.add_motion(moving, counts) is moving
    for compression in ("conditional", "unguided"):
        expected = model.compress(features, counts, *ids, compression=compression).tokens
        for found, tokens in zip(
            model.compress(moving, counts, *ids, compression=compression).tokens, expected, strict=True
        ):
            assert torch.equal(found, tokens)
    with pytest.raises(ValueError, match=r"compression='off'.*without motion"):
        model.compress(moving, counts, compression="off")
    plain = tiny.model().model
    assert plain.add_motion(features, counts) is features


def test_run_time_window_and_compression_modes() -> None:
    model = tiny.model()
    for options in ({"window": (1, 5, 5)}, {"window": (9, 9, 9)}, {"compression": "off"}, {"compression": "unguided"}):
        inputs = batch(model, **options)
        counts = [model.model.token_count(n, **options) for n in (4, 5, 3)]
        assert int((inputs["input_ids"] == model.config.video_token_id).sum()) == sum(counts)
        assert torch.isfinite(model(**inputs, **options).logits).all()


def test_placeholder_mismatch_names_both_numbers() -> None:
    model = tiny.model()
    inputs = batch(model)
    found = int((inputs["input_ids"] == model.config.video_token_id).sum())
    with pytest.raises(ValueError, match=rf"{found} video placeholders.*visual tokens"):
        model(**inputs, window=(1, 1, 1))


def test_missing_instruction_is_an_error() -> None:
    model = tiny.model()
    inputs = dict(batch(model))
    inputs.pop("instruction_input_ids")
    with pytest.raises(ValueError, match="instruction_input_ids"):
        model(**inputs)


def test_wrong_frame_size_is_an_error() -> None:
    model = tiny.model()
    with pytest.raises(ValueError, match=r"3, 20, 20"):
        model.encode_frames(torch.zeros(2, 3, 24, 24))


@pytest.mark.parametrize(("tower", "language"), PAIRS)
def test_save_and_load(tower: str, language: str, tmp_path) -> None:
    model = tiny.model(tower, language)
    processor = tiny.processor(model.config, num_frames=8)
    inputs = batch(model)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()

    hicom.register()
    assert type(AutoConfig.from_pretrained(tmp_path)).__name__ == "HIComConfig"
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, HIComForConditionalGeneration)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name
    reloaded = AutoProcessor.from_pretrained(tmp_path)
    texts = [chat("<video>\nwhich object moves left ?")]
    again = reloaded(text=texts, videos=[frames(4, 1)], **tiny.TENSORS)
    torch.testing.assert_close(model(**again).logits, loaded(**again).logits)
    torch.testing.assert_close(loaded(**inputs).logits, expected)
    assert (
        again["input_ids"].tolist()
        == processor(text=texts, videos=[frames(4, 1)], **tiny.TENSORS)["input_ids"].tolist()
    )


def test_base_model_loads_from_the_same_folder(tmp_path) -> None:
    model = tiny.model()
    model.save_pretrained(tmp_path)
    hicom.register()
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, HIComModel)
    assert torch.equal(base.compressor.global_.query, model.model.compressor.global_.query)


@pytest.mark.parametrize("problem", ["missing", "unexpected", "shape"])
def test_checkpoint_with_wrong_tensors_is_refused_by_name(problem: str, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    model = tiny.model()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.compressor.local.readout.0.weight"
    if problem == "missing":
        tensors.pop(name)
    elif problem == "unexpected":
        tensors[name := "model.compressor.local.spare"] = torch.zeros(2)
    else:
        tensors[name] = torch.zeros(3, 3)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        HIComForConditionalGeneration.from_pretrained(tmp_path)


def test_tied_embeddings(tmp_path) -> None:
    config = tiny.config()
    config.text_config.tie_word_embeddings = True
    config.tie_word_embeddings = True
    model = HIComForConditionalGeneration(config).eval()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = HIComForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


def test_gradient_checkpointing_changes_nothing_but_memory() -> None:
    model = tiny.model().train()
    inputs = batch(model)
    labels = inputs["input_ids"]

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable()
    assert model.model.language_model.layers[0].gradient_checkpointing
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-6, msg=name)


def test_gradient_checkpointing_leaves_frozen_towers_alone() -> None:
    """With transformers' own hooks they would be computed twice, and backward."""
    model = tiny.model().train()
    for part in (model.model.vision_tower, model.model.instruction_encoder):
        part.requires_grad_(False)
    model.gradient_checkpointing_enable()
    inputs = batch(model)
    features = model.encode_frames(inputs["pixel_values_videos"])
    assert not features.values.requires_grad
    assert features.keys is not None
    assert not features.keys.requires_grad
    pooled, _ = model.model.encode_instruction(inputs["instruction_input_ids"])
    assert not pooled.requires_grad
    assert model.get_input_embeddings()(inputs["input_ids"]).requires_grad
    passes = []
    model.model.vision_tower.register_forward_hook(lambda *_: passes.append(1))
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert len(passes) == 1
    model.disable_input_require_grads()
    model.get_input_embeddings().requires_grad_(False)
    assert not model.get_input_embeddings()(inputs["input_ids"]).requires_grad


def test_logits_to_keep() -> None:
    model = tiny.model()
    inputs = batch(model)
    torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, model(**inputs).logits[:, -2:])


def test_embeddings_in_place_of_ids() -> None:
    model = tiny.model()
    embeddings = model.get_input_embeddings()(torch.tensor([[7, 8, 9]]))
    torch.testing.assert_close(
        model(inputs_embeds=embeddings).logits, model(input_ids=torch.tensor([[7, 8, 9]])).logits
    )
    assert model.generate(inputs_embeds=embeddings, max_new_tokens=3, min_new_tokens=3).shape == (1, 3)


def test_fresh_compressor_starts_as_published() -> None:
    """Loading must not, and building must, initialise the compressor: identity MLP, distinct global tokens."""
    torch.manual_seed(0)
    compressor = HIComForConditionalGeneration(tiny.config()).model.compressor
    assert isinstance(compressor, HybridCompressor)
    x = torch.randn(4, tiny.WIDTH)
    torch.testing.assert_close(compressor.local.injector.embed(x), x, rtol=1e-4, atol=1e-5)
    query = compressor.global_.query
    assert 0.01 < query.std().item() < 0.03
    assert not torch.equal(query[0], query[1])


@pytest.mark.parametrize("name", ["spatial_pool", "no_compression"])
def test_baseline_compressors_behind_the_same_model(name: str, tmp_path) -> None:
    model = tiny.model(compressor=name)
    assert model.model.instruction_encoder is None
    inputs = batch(model)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    tiny.processor(model.config).save_pretrained(tmp_path)
    loaded = HIComForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**inputs).logits, expected)


@pytest.mark.parametrize("tower", ["siglip", "siglip2", "clip"])
@pytest.mark.parametrize("layer", [-1, -2, -3, 0, 1])
def test_values_are_the_hidden_state_that_the_configuration_names(tower: str, layer: int) -> None:
    """All hidden states together are never held, except where only the tower itself can give the last one."""
    model = tiny.model(tower, vision_feature_layer=layer).model
    pixels = torch.randn(3, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    expected: list[torch.Tensor] = []
    asked: list[bool] = []

    def keep_all(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        asked.append(bool(kwargs.get("output_hidden_states")))
        if not expected:
            expected.append(torch.empty(0))  # the call below comes here too
            expected[0] = module(**kwargs | {"output_hidden_states": True}).hidden_states[layer]

    with torch.no_grad():
        handle = model.vision_tower.register_forward_hook(keep_all, with_kwargs=True)
        values = model.encode_frames(pixels).values
        handle.remove()
    wanted = expected[0][:, 1:] if tower == "clip" else expected[0]
    assert torch.equal(values.flatten(1, 2), wanted)
    assert asked[0] == (layer == -1)
