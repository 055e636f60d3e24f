"""Checkpoints of the official release: golden parity, conversion, and every way such a folder can be wrong.

The goldens were computed by the official implementation (lntzm/HICom at df67ea1) from small random models; see
`tests/golden/README.md`.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import hicom
import tiny
from hicom.model.convert import convert_official, load_official, parse_projector_type, tensor_shapes
from hicom.model.modeling import HIComForConditionalGeneration
from hicom.model.tower import Tower, infer_siglip

GOLDEN = Path(__file__).parents[1] / "golden"
INPUTS = sorted(path.parent for path in GOLDEN.rglob("golden.safetensors"))


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def outputs(model: HIComForConditionalGeneration, case: Path) -> dict[str, torch.Tensor]:
    golden = load_file(case / "golden.safetensors")
    frames, ids = golden["pixel_values"], golden.get("instruction_ids")
    ids = None if ids is None else ids[None]
    with torch.no_grad():
        if case.name == "image":
            tokens = model.get_image_features(pixel_values=frames, instruction_input_ids=ids).pooler_output[0]
        else:
            counts = torch.tensor([len(frames)])
            tokens = model.get_video_features(
                pixel_values_videos=frames, video_num_frames=counts, instruction_input_ids=ids
            ).pooler_output[0]
        embed = model.get_input_embeddings()
        x = torch.cat([embed(golden["prefix_ids"]), tokens, embed(golden["suffix_ids"])])[None]
        mask = torch.ones(x.shape[:2], dtype=torch.long)
        logits = model(inputs_embeds=x, attention_mask=mask).logits[0]
        generated = model.generate(
            inputs_embeds=x,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=12,
            min_new_tokens=12,
            eos_token_id=None,
            pad_token_id=0,
        )[0]
    return {"visual_tokens": tokens, "logits": logits, "generated_ids": generated}


@pytest.mark.parametrize("case", INPUTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_golden_parity(case: Path) -> None:
    """Visual tokens and logits within 1e-4 of their largest magnitude, greedy tokens exactly."""
    golden = load_file(case / "golden.safetensors")
    ours = outputs(HIComForConditionalGeneration.from_official(case.parent, dtype=torch.float32).eval(), case)
    assert error(ours["visual_tokens"], golden["visual_tokens"]) < 1e-4
    assert error(ours["logits"], golden["logits"]) < 1e-4
    assert ours["generated_ids"].tolist() == golden["generated_ids"].tolist()


def test_goldens_are_there() -> None:
    assert len(INPUTS) >= 6


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """A copy of a released checkpoint that a test may break."""
    return Path(shutil.copytree(GOLDEN / "direct_coarse", tmp_path / "official"))


def test_converted_folder_computes_the_same(official: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no processor is made"):
        convert_official(official, tmp_path / "converted")
    hicom.register()
    converted = AutoModelForImageTextToText.from_pretrained(tmp_path / "converted", dtype=torch.float32).eval()
    direct = load_official(official, dtype=torch.float32).eval()
    ours, expected = outputs(converted, official / "video_t7"), outputs(direct, official / "video_t7")
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, msg=name)
    config = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert config["model_type"] == "hicom"
    assert config["dialect"] == "release"


def test_conversion_writes_tokenizers_where_they_are(official: Path, tmp_path: Path) -> None:
    """With both tokenizers at hand the converted folder answers questions by itself."""
    tiny.tokenizer().save_pretrained(official)
    tiny.tokenizer().save_pretrained(official / "siglip-so400m-patch14-384")
    convert_official(official, tmp_path / "converted")
    chat = hicom.VideoChat.from_pretrained(tmp_path / "converted")
    frames = torch.randint(0, 255, (6, 98, 98, 3), dtype=torch.uint8).numpy()
    answer = chat.ask(chat.encode(frames), "which object moves left ?", max_new_tokens=3)
    assert answer.num_visual_tokens == 2 * 3 * 3 + 32
    direct = hicom.VideoChat.from_pretrained(official)
    assert direct.ask(direct.encode(frames), "which object moves left ?", max_new_tokens=3) == answer


def test_existing_destination_is_left_alone(official: Path, tmp_path: Path) -> None:
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / "precious.txt").write_text("keep me")
    with pytest.raises(ValueError, match="not empty"):
        convert_official(official, tmp_path / "converted")
    assert (tmp_path / "converted" / "precious.txt").read_text() == "keep me"


def test_sharded_checkpoint(official: Path) -> None:
    tensors = load_file(official / "model.safetensors")
    expected = outputs(load_official(official, dtype=torch.float32).eval(), official / "video_t8")
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, official / file)
    (official / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (official / "model.safetensors.index.json").write_text(json.dumps(index))
    ours = outputs(load_official(official, dtype=torch.float32).eval(), official / "video_t8")
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name
    (official / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors missing"):
        load_official(official)


def test_tied_output_matrix_is_not_in_the_file(official: Path) -> None:
    """Released models of 0.5B and 1.5B share input and output embeddings and store them once."""
    config = json.loads((official / "config.json").read_text())
    (official / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tensors = load_file(official / "model.safetensors")
    tensors.pop("lm_head.weight")
    save_file(tensors, official / "model.safetensors")
    model = load_official(official, dtype=torch.float32)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight, tensors["model.embed_tokens.weight"].float())


def test_llama_checkpoint(official: Path) -> None:
    """The same layout around a Llama: no biases in its attention."""
    config = json.loads((official / "config.json").read_text())
    for key in ("use_sliding_window", "sliding_window", "max_window_layers"):
        config.pop(key)
    (official / "config.json").write_text(json.dumps(config | {"model_type": "hicom_llama"}))
    tensors = load_file(official / "model.safetensors")
    biases = [name for name in tensors if name.startswith("model.layers.") and name.endswith("proj.bias")]
    assert biases
    save_file({n: t for n, t in tensors.items() if n not in biases}, official / "model.safetensors")
    model = load_official(official, dtype=torch.float32).eval()
    assert type(model.model.language_model).__name__ == "LlamaModel"
    ours = outputs(model, official / "video_t8")
    golden = load_file(official / "video_t8" / "golden.safetensors")
    assert error(ours["visual_tokens"], golden["visual_tokens"]) < 1e-4


def test_tower_sizes_are_inferred_when_it_is_not_at_hand(official: Path) -> None:
    expected = outputs(load_official(official, dtype=torch.float32).eval(), official / "video_t8")
    shutil.rmtree(official / "siglip-so400m-patch14-384")
    with pytest.warns(UserWarning, match=r"inferred.*image 98, patch 14, 4 vision heads"):
        model = load_official(official, dtype=torch.float32).eval()
    ours = outputs(model, official / "video_t8")
    assert error(ours["logits"], expected["logits"]) < 1e-6


def test_published_sizes_are_inferred() -> None:
    """The shapes of SigLIP-so400m/384: 16 heads, image 384, patch 14, text length 64."""
    vision, text = "model.vision_tower.vision_tower.vision_model.", "model.vision_tower.guide_encoder.text_model."
    shapes: dict[str, tuple[int, ...]] = {
        vision + "embeddings.patch_embedding.weight": (1152, 3, 14, 14),
        vision + "embeddings.position_embedding.weight": (729, 1152),
        text + "embeddings.token_embedding.weight": (32000, 1152),
        text + "embeddings.position_embedding.weight": (64, 1152),
        text + "head.weight": (1152, 1152),
    }
    for prefix in (vision, text):
        shapes |= {f"{prefix}encoder.layers.{i}.mlp.fc1.weight": (4304, 1152) for i in range(27)}
    with pytest.warns(UserWarning, match="image 384, patch 14, 16 vision heads, 16 text heads, text length 64"):
        vision_config, text_config = infer_siglip(Tower("siglip-so400m-patch14-384", None, None, ()), shapes)
    assert (vision_config.num_hidden_layers, vision_config.image_size, vision_config.intermediate_size) == (
        27,
        384,
        4304,
    )
    assert text_config.num_hidden_layers == 27


def test_identical_global_tokens_of_the_release_script_are_kept_with_a_warning(official: Path) -> None:
    config = json.loads((official / "config.json").read_text())
    config["mm_projector_type"] = "local43_global32_coarse"
    (official / "config.json").write_text(json.dumps(config))
    tensors = load_file(official / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if "guide_injector" not in name}
    save_file(tensors, official / "model.safetensors")
    with pytest.warns(UserWarning, match="identical"):
        model = load_official(official, dtype=torch.float32).eval()
    tokens = outputs(model, official / "video_t8")["visual_tokens"][-32:]
    assert torch.allclose(tokens, tokens[:1].expand_as(tokens))


@pytest.mark.parametrize(
    ("text", "local", "global_"),
    [
        ("local43_global32", ("43", "", None), ("32", "", None)),
        ("local43_global32_guidecoarse", ("43", "", None), ("32", "", "coarse")),
        ("local43_global32_coarse", ("43", "", None), ("32", "", None)),
        ("local43_adaptqkvg_guidecoarse_global32_adaptg_guidefine", ("43", "qkvg", "coarse"), ("32", "g", "fine")),
        ("local412_adaptkv_global64", ("412", "kv", None), ("64", "", None)),
        ("global16", None, ("16", "", None)),
        ("local29", ("29", "", None), None),
        ("global8_guidefine_local43", ("43", "", None), ("8", "", "fine")),
    ],
)
def test_projector_grammar(text: str, local: tuple | None, global_: tuple | None) -> None:
    parsed = [None if b is None else (b.size, b.gates, b.injection) for b in parse_projector_type(text)]
    assert parsed == [local, global_]


@pytest.mark.parametrize("text", ["mlp2x_gelu", "linear", "local", "global_x", ""])
def test_projector_types_that_cannot_be_loaded(text: str) -> None:
    with pytest.raises(ValueError, match="mm_projector_type"):
        parse_projector_type(text)


def test_pickled_weights_are_refused(official: Path) -> None:
    (official / "model.safetensors").unlink()
    (official / "pytorch_model.bin").write_bytes(b"\x80\x04never opened")
    with pytest.raises(ValueError, match=r"pickles \(pytorch_model\.bin\)"):
        load_official(official)


@pytest.mark.parametrize("problem", ["missing", "unexpected", "shape"])
def test_wrong_tensors_are_named(official: Path, problem: str) -> None:
    tensors = load_file(official / "model.safetensors")
    name = "model.mm_projector.local_compressor.readout.0.weight"
    expected = r"model\.compressor\.local\.readout\.0\.weight"
    if problem == "missing":
        tensors.pop(name)
    elif problem == "unexpected":
        tensors["model.mm_projector.local_compressor.spare"] = torch.zeros(2)
        expected = r"1 unexpected: model\.compressor\.local\.spare"
    else:
        tensors[name] = torch.zeros(5, 7)
        expected += r" \(5, 7\) \(expected \(64, 256\)\)"
    save_file(tensors, official / "model.safetensors")
    with pytest.raises(ValueError, match=expected):
        load_official(official)


def test_broken_files_are_named(official: Path) -> None:
    weights = official / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a valid safetensors file"):
        load_official(official)
    weights.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors missing"):
        load_official(official)
    (official / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_official(official)
    (official / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        load_official(official)


def test_missing_folder_and_wrong_model_type(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such model folder"):
        load_official(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ValueError, match="hicom_qwen2"):
        load_official(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("image_aspect_ratio", "anyres_max_9"), ("use_guide", "soft"), ("mm_vision_select_feature", "cls")],
)
def test_unsupported_settings_are_named(official: Path, key: str, value: str) -> None:
    config = json.loads((official / "config.json").read_text())
    config[key] = value
    (official / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{key}={value!r}"):
        load_official(official)


def test_headers_tell_shapes_without_loading(official: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shapes = tensor_shapes(official)
    assert shapes["lm_head.weight"] == (96, 64)
