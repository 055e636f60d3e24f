import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tiny
from hicom.cli import main
from hicom.data.collate import Collator
from hicom.model.modeling import HIComForConditionalGeneration
from hicom.train import DataConfig, LoraOptions, StageConfig, TrainConfig, run
from hicom.train.lora import add_adapter, find_targets, load_quantized, merge_adapter, save_adapter, table_name
from hicom.train.run import last_checkpoint
from hicom.train.stages import resolve
from scale_training import losses, train_in_two
from toy_training import make_config, make_folder

RATES = ((r"model\.compressor\..*(k_proj\.bias|logit_bias)", 0.0), (r"model\.compressor\..*", 1e-3))
LLM = ((r"model\.language_model\..*", 2e-3),)
BASE_WEIGHTS = ("model.language_model.", "lm_head.", "model.vision_tower.", "model.instruction_encoder.")
EMBEDDING = r"model\.language_model\.embed_tokens\..*"
LORA = LoraOptions(rank=4, alpha=8, dropout=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of videos and records, and in `base` a model to start from."""
    made = make_folder(tmp_path_factory.mktemp("lora"))
    run(make_config(made, out=str(made / "base"), steps=1))
    return made


def lora_config(folder: Path, out: Path, **changes: Any) -> TrainConfig:
    fixed = {"parts": None, "init": str(folder / "base" / "model"), "out": str(out), "lora": LORA, "steps": 4}
    return make_config(folder, **(fixed | {"stage": StageConfig(trainable=RATES + LLM)} | changes))


def adapted(**changes: Any) -> HIComForConditionalGeneration:
    """Return a tiny model with adapters that do something."""
    model = tiny.model()
    add_adapter(model, dataclasses.replace(LORA, **changes), seed=1, bf16=False, base=None)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.3)
    resolve(model, RATES + LLM, table_name)
    return model.eval()


def inputs(model: HIComForConditionalGeneration) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    count = model.model.token_count(4)
    video, words = [model.config.video_token_id] * count, [6, 9, 12, 15]
    return {
        "input_ids": torch.tensor([[*video, *words]]),
        "labels": torch.tensor([[-100] * count + words]),
        "pixel_values_videos": torch.randn(4, 3, 20, 20, generator=generator),
        "video_num_frames": torch.tensor([4]),
        "instruction_input_ids": torch.tensor([[7, 8, 9]]),
    }


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_adapters_and_compressor_learn_and_all_else_stays(folder: Path, tmp_path: Path) -> None:
    config = lora_config(folder, tmp_path)
    run(config)
    before, after = weights(folder / "base"), weights(tmp_path)
    assert before.keys() == after.keys()
    learnt = {name for name in before if not torch.equal(before[name], after[name])}
    layers = {name for name in before if re.search(r"language_model\.layers\..*(proj)\.weight$", name)}
    assert {name for name in learnt if name.startswith(BASE_WEIGHTS)} == layers, "other weights of the base have moved"
    assert any(name.startswith("model.compressor.") for name in learnt)
    checkpoint = last_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    kept = load_file(checkpoint / "model.safetensors")
    assert all(table_name(name) is not None and not name.startswith(BASE_WEIGHTS[2:]) for name in kept), (
        "checkpoints hold weights that do not train"
    )
    stamp = json.loads((tmp_path / "run.json").read_text())
    assert [(row["tensors"], row["rate"]) for row in stamp["trainable"]][2] == (2 * len(layers), 2e-3)
    assert stamp["configuration"]["lora"]["rank"] == 4
    # Beside the run, the same model again by hand.
    assert (
        main(["convert", "merge", str(folder / "base" / "model"), str(tmp_path / "adapter"), str(tmp_path / "b")]) == 0
    )
    again = load_file(tmp_path / "b" / "model.safetensors")
    assert all(torch.equal(tensor, after[name]) for name, tensor in again.items())
    half = ["--dtype", "bfloat16"]
    args = [str(folder / "base" / "model"), str(tmp_path / "adapter"), str(tmp_path / "half"), *half]
    assert main(["convert", "merge", *args]) == 0
    cut = load_file(tmp_path / "half" / "model.safetensors")
    assert all(torch.equal(tensor, after[name].bfloat16()) for name, tensor in cut.items())


def test_base_weights_stay_bit_equal_while_adapters_train() -> None:
    model = adapted().train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trainable if name.startswith("model.language_model.")} == {
        name for name in before if ".lora_" in name
    }
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2)
    for _ in range(3):
        model(**inputs(model)).loss.backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trainable.keys()


def test_the_table_gives_adapters_the_rate_of_the_weight_that_they_adapt() -> None:
    model = adapted()
    one = r"model\.language_model\.layers\.0\.self_attn\.q_proj\.weight"
    rules = resolve(model, ((one, 1e-2), *LLM), table_name)
    assert sorted(rules[0].parameters) == [
        f"model.language_model.layers.0.self_attn.q_proj.lora_{side}.default.weight" for side in "AB"
    ]
    assert not any(".q_proj.lora" in name and ".layers.0." in name for name in rules[1].parameters)


def test_merged_is_adapted(tmp_path: Path) -> None:
    model = adapted()
    expected = model(**inputs(model))
    plain = tiny.model()
    assert not torch.allclose(expected.logits, plain(**inputs(plain)).logits, atol=1e-2), "the adapter does nothing"
    save_adapter(model, model.state_dict(), tmp_path / "adapter")
    merge_adapter(plain, tmp_path / "adapter").save_pretrained(tmp_path / "merged")
    merged = HIComForConditionalGeneration.from_pretrained(tmp_path / "merged")  # strict
    torch.testing.assert_close(merged(**inputs(merged)).logits, expected.logits, rtol=1e-4, atol=1e-5)
    # PEFT loads the adapter by itself.
    other = tiny.model()
    loaded = PeftModel.from_pretrained(other, str(tmp_path / "adapter"))
    torch.testing.assert_close(loaded(**inputs(other)).logits, expected.logits, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_not_merged(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no adapter in .*adapter_config\.json is missing"):
        merge_adapter(tiny.model(), tmp_path)
    model = adapted()
    save_adapter(model, model.state_dict(), tmp_path)
    with pytest.raises(ValueError, match=r"that the model lacks: .*layers\.1\."):
        merge_adapter(HIComForConditionalGeneration(one_layer()), tmp_path)
    wider = tiny.config(num_global_tokens=5)
    with pytest.raises(ValueError, match=r"of another shape: .*compressor.* \(the model has \(5, "):
        merge_adapter(HIComForConditionalGeneration(wider), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor[:1, :1].contiguous() for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=r"of another shape: .*lora_A\.weight \(1, 1\)"):
        merge_adapter(tiny.model(), tmp_path)


def one_layer() -> Any:
    config = tiny.config()
    config.text_config.num_hidden_layers = 1
    return config


def test_resumes_exactly(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = lora_config(folder, tmp_path / "stopped", save_every=2, steps=6)
    made: list[int] = []
    make_batch = Collator.__call__

    def failing(self: Collator, items: Any) -> Any:
        made.append(1)
        if len(made) == 5:
            raise RuntimeError("power cut")
        return make_batch(self, items)

    with monkeypatch.context() as patch:
        patch.setattr(Collator, "__call__", failing)
        with pytest.raises(RuntimeError, match="power cut"):
            run(config)
    assert last_checkpoint(tmp_path / "stopped" / "checkpoints") is not None
    with pytest.raises(ValueError, match=r"another configuration \(lora\.rank differ\); it has lora\.rank=4"):
        run(dataclasses.replace(config, lora=dataclasses.replace(LORA, rank=8)))
    run(config)
    run(dataclasses.replace(config, out=str(tmp_path / "whole")))
    assert losses(tmp_path / "stopped") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    for name, tensor in weights(tmp_path / "stopped").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "whole")[name], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lora": {"targets": r".*\.query"}},
            r"lora\.targets='\.\*\\\\\.query' matches no linear layer .* such as 'model",
        ),
        ({"lora": {"targets": "("}}, "no regular expression"),
        (
            {"stage": StageConfig(trainable=(*LLM, (EMBEDDING, 1e-3)))},
            r"embed_tokens.* matches no parameter .*; with LoRA",
        ),
        ({"engine": "fsdp2"}, "engine='fsdp2'"),
    ],
)
def test_impossible_adapters(folder: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    if "lora" in changes:
        changes = {"lora": dataclasses.replace(LORA, **changes["lora"])}
    with pytest.raises(ValueError, match=message):
        run(lora_config(folder, tmp_path, **changes))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rank": 0}, r"lora\.rank=0"), ({"alpha": 0}, r"lora\.alpha=0"), ({"dropout": 1.0}, "1.0")],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraOptions(**options)


def test_targets_are_chosen_by_name() -> None:
    found = find_targets(tiny.model(), r".*\.layers\.1\..*\.(q|v)_proj")
    assert found == [f"model.language_model.layers.1.self_attn.{name}_proj" for name in "qv"]
    assert not any("vision" in name or "lm_head" in name for name in find_targets(tiny.model(), ".*"))


def test_in_bfloat16_only_what_trains_has_all_digits() -> None:
    model = tiny.model()
    add_adapter(model, LORA, seed=0, bf16=True, base=None)
    resolve(model, RATES + LLM, table_name)
    for name, parameter in model.named_parameters():
        is_base = name.startswith(("model.language_model.", "lm_head.")) and ".lora_" not in name
        assert parameter.dtype == (torch.bfloat16 if is_base else torch.float32), name
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs(model)).loss
    loss.backward()
    assert loss.isfinite()
    without = [
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]
    assert not without


@pytest.mark.dist
def test_two_processes_are_one(folder: Path, tmp_path: Path) -> None:
    changes = {
        "lora": dataclasses.replace(LORA, dropout=0.0),
        "data": DataConfig(records=(str(folder / "records.jsonl"),)),
    }
    two = lora_config(folder, tmp_path / "two", batch_size=2, **changes)
    result = train_in_two(two)
    assert result.returncode == 0, result.stderr
    run(lora_config(folder, tmp_path / "one", batch_size=4, **changes))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    for name, tensor in weights(tmp_path / "two").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "one")[name], rtol=1e-4, atol=2e-5, msg=name)


def test_quantising_needs_its_package_and_a_whole_model(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    options = dataclasses.replace(LORA, quantize="4bit")
    with pytest.raises(ValueError, match="hicom convert assemble"):
        run(make_config(folder, out=str(tmp_path / "a"), lora=options))
    monkeypatch.setattr("hicom.train.lora.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"hicom\[qlora\]"):
        run(lora_config(folder, tmp_path / "b", lora=options))


@pytest.mark.qlora
def test_only_the_language_model_is_quantised(folder: Path) -> None:
    model = load_quantized(folder / "base" / "model", "4bit", bf16=False)
    linears = {n: type(m).__name__ for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    in_layers = {name for name in linears if name.startswith("model.language_model.layers.")}
    assert {name for name, kind in linears.items() if kind == "Linear4bit"} == in_layers
    assert in_layers


@pytest.mark.qlora
def test_a_quantised_base_learns_and_is_merged_into_the_plain_one(folder: Path, tmp_path: Path) -> None:
    options = dataclasses.replace(LORA, quantize="4bit", dropout=0.0)
    run(lora_config(folder, tmp_path / "q", lora=options, steps=20))
    curve = losses(tmp_path / "q")
    assert sum(curve[-4:]) < sum(curve[:4])
    before, after = weights(folder / "base"), weights(tmp_path / "q")
    adapter = load_file(tmp_path / "q" / "adapter" / "adapter_model.safetensors")
    name = "model.language_model.layers.0.mlp.up_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    torch.testing.assert_close(after[f"{name}.weight"], before[f"{name}.weight"] + 8 / 4 * b @ a)
    HIComForConditionalGeneration.from_pretrained(tmp_path / "q" / "model")


@pytest.mark.qlora
def test_a_quantised_run_resumes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = lora_config(folder, tmp_path / "a", lora=dataclasses.replace(LORA, quantize="4bit"), save_every=2, steps=5)
    made: list[int] = []
    make_batch = Collator.__call__

    def failing(self: Collator, items: Any) -> Any:
        made.append(1)
        if len(made) == 4:
            raise RuntimeError("power cut")
        return make_batch(self, items)

    with monkeypatch.context() as patch:
        patch.setattr(Collator, "__call__", failing)
        with pytest.raises(RuntimeError, match="power cut"):
            run(config)
    run(config)
    run(dataclasses.replace(config, out=str(tmp_path / "b")))
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-5)
