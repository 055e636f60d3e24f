"""What `--estimate` says against steps that are really taken."""

from __future__ import annotations

import dataclasses
import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from hicom.bench.shapes import published_config
from hicom.cli import main
from hicom.recipes.finetune import finetune, finetune_lora, finetune_qlora
from hicom.recipes.published import paper_stage
from hicom.train import LoraOptions, StageConfig, TrainConfig
from hicom.train.engines import CHECKPOINTING, state_bytes
from hicom.train.estimate import (
    LiveBytes,
    SampleSize,
    one_pass,
    sample_size,
    simulate,
    training_memory,
    ways,
)
from hicom.train.lora import add_adapter, table_name
from hicom.train.run import load
from hicom.train.stages import make_optimizer, resolve
from toy_training import make_config, make_folder, make_records

SIZE = SampleSize(num_frames=4, text_tokens=24, answer_tokens=8)
LLM = ((r"model\.compressor\.local\.readout\..*", 1e-3), (r"model\.language_model\..*", 1e-3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of videos and records, and in `model` a model to start from."""
    made = make_folder(tmp_path_factory.mktemp("estimate"))
    model, processor = load(make_config(made))
    model.save_pretrained(made / "model")
    processor.save_pretrained(made / "model")
    return made


def tuned(**changes: Any) -> TrainConfig:
    fixed = {"stage": StageConfig(trainable=LLM), "batch_size": 2, "global_batch_size": None, "bf16": False}
    return dataclasses.replace(finetune("model", ("records.jsonl",)), **(fixed | changes))


CASES = {
    "activations kept": {"gradient_checkpointing": False},
    "computed again": {},
    "two passes": {"accumulate": 2},
    "LoRA": {"lora": LoraOptions(rank=4)},
    "bfloat16": {"bf16": True, "gradient_checkpointing": False},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_a_step_without_numbers_holds_what_a_real_one_holds(changes: dict[str, Any]) -> None:
    """The same passes with real tensors, whose storages are counted one by one as they come and go."""
    config = tuned(**changes)
    model = tiny.model().train()
    model.config.text_config.use_cache = False
    if config.lora is not None:
        add_adapter(model, config.lora, seed=0, bf16=config.bf16, base=None)
    resolve(model, config.rates, (lambda name: name) if config.lora is None else table_name)
    if config.gradient_checkpointing:
        getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": False})
    gc.collect()
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        for _ in range(config.accumulate):
            one_pass(model, config, SIZE)
    simulated = simulate(config, tiny.config(), SIZE).peak
    assert simulated == pytest.approx(live.peak, rel=0.02)


def test_live_bytes_are_those_of_tensors_that_are_alive() -> None:
    kept = torch.zeros(100)
    with LiveBytes([kept]) as live:
        first = torch.zeros(1000)
        assert live.now == 4000
        half = first[:500]  # a view has no bytes of its own
        second = kept + 1
        assert live.now == 4400
        del first
        assert live.now == 4400
        del half, second
        assert live.now == 0
        kept.add_(1)
    assert (live.now, live.peak) == (0, 4400)


def test_activations_that_are_computed_again_are_not_kept() -> None:
    size = dataclasses.replace(SIZE, text_tokens=400)
    kept, again = (training_memory(tuned(gradient_checkpointing=x), tiny.config(), size) for x in (False, True))
    assert (kept.weights, kept.gradients, kept.optimizer) == (again.weights, again.gradients, again.optimizer)
    assert kept.work > 1.3 * again.work


def test_published_precision_is_counted() -> None:
    """Mixed precision keeps matrices and what goes into them in 16 bit, and what is added up in 32."""
    size = dataclasses.replace(SIZE, text_tokens=400)
    config = tuned(gradient_checkpointing=False)
    whole, mixed = (training_memory(dataclasses.replace(config, bf16=x), tiny.config(), size) for x in (False, True))
    assert 0.4 * whole.work < mixed.work < 0.9 * whole.work
    assert (mixed.weights, mixed.gradients, mixed.optimizer) == (whole.weights, whole.gradients, whole.optimizer)


def after_a_step(config: TrainConfig) -> tuple[nn.Module, int]:
    """Return a model whose optimizer has stepped, and the bytes of the states that it then has."""
    model = tiny.model()
    rules = resolve(model, config.rates)
    optimizer = make_optimizer(model, rules, optimizer=config.optimizer, weight_decay=0.0, betas=(0.9, 0.99))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [state for part in getattr(optimizer, "parts", [optimizer]) for state in part.state.values()]
    return model, sum(t.nbytes for state in states for name, t in state.items() if name != "step")


def test_weights_gradients_and_states_are_those_of_a_real_run() -> None:
    model, states = after_a_step(tuned())
    found = training_memory(tuned(), tiny.config(), SIZE)
    assert found.weights == sum(p.nbytes for p in model.parameters())
    assert found.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert found.optimizer == states
    assert found.total == found.weights + found.gradients + found.optimizer + found.work


def test_muon_has_one_state_for_a_matrix() -> None:
    config = tuned(optimizer="muon")
    _, states = after_a_step(config)
    assert states < after_a_step(tuned())[1]
    assert training_memory(config, tiny.config(), SIZE).optimizer == states


def test_quantised_weights_are_small() -> None:
    config = tuned(lora=LoraOptions(rank=4))
    found = {
        kind: training_memory(
            dataclasses.replace(config, lora=LoraOptions(rank=4, quantize=kind)), tiny.config(), SIZE
        ).weights
        for kind in (None, "8bit", "4bit")
    }
    model = tiny.model()
    layers = sum(
        m.weight.numel()
        for name, m in model.named_modules()
        if name.startswith("model.language_model.layers.") and isinstance(m, nn.Linear)
    )
    assert found[None] - found["8bit"] == 3 * layers
    assert found[None] - found["4bit"] == pytest.approx((4 - 0.516) * layers, rel=1e-3)


def test_engines_share_what_they_spread() -> None:
    one = training_memory(tuned(), tiny.config(), SIZE)
    many = training_memory(tuned(engine="fsdp2"), tiny.config(), SIZE, num_processes=8)
    expected = state_bytes("fsdp2", one.weights // 4, one.gradients // 4, 8, bf16=False)
    assert many.weights + many.gradients + many.optimizer == expected
    copies = training_memory(tuned(), tiny.config(), SIZE, num_processes=2)
    assert copies.gradients == 2 * one.gradients  # they are exchanged in buckets
    assert (copies.weights, copies.optimizer) == (one.weights, one.optimizer)


@pytest.mark.slow
def test_published_sizes_take_what_their_parameters_do() -> None:
    """Qwen2.5-7B with SigLIP: 16 bytes for each weight that trains, 4 for each of the towers."""
    config = dataclasses.replace(paper_stage("7b", "tune"), engine=None, batch_size=1, global_batch_size=1)
    full = training_memory(config, published_config("7b"), SampleSize(num_frames=32))
    qlora = training_memory(
        dataclasses.replace(config, lora=LoraOptions(quantize="4bit")),
        published_config("7b"),
        SampleSize(num_frames=32),
    )
    assert 115e9 < full.weights + full.gradients + full.optimizer < 130e9
    assert qlora.total < 20e9
    assert 0 < full.work < 5e9  # most of the activations are gone when the last gradients come


def test_only_runs_that_train_the_language_model_have_other_ways() -> None:
    assert list(ways(tuned())) == ["full", "LoRA", "QLoRA, 8 bit", "QLoRA, 4 bit"]
    assert ways(tuned(lora=LoraOptions(rank=8)))["QLoRA, 4 bit"].lora == LoraOptions(rank=8, quantize="4bit")
    assert list(ways(paper_stage("7b", "pretrain"))) == ["as it is"]
    assert list(ways(paper_stage("7b", "tune"))) == ["as it is"]  # fsdp2


def test_the_largest_sample_is_found(folder: Path, tmp_path: Path) -> None:
    records = make_records(tmp_path)
    long = json.loads(records.read_text().splitlines()[0])
    long["conversations"][0]["value"] = "<video>\n" + "cat " * 50
    long["conversations"][1]["value"] = "yes " * 7
    records.write_text(records.read_text() + json.dumps(long) + "\n")
    _, processor = load(make_config(folder))
    config = tuned(data=dataclasses.replace(tuned().data, records=(str(records),)))
    found = sample_size(config, processor)
    assert (found.num_frames, found.answer_tokens) == (processor.num_frames, 8)
    assert 57 <= found.text_tokens <= 57 + 40
    elsewhere = dataclasses.replace(config, data=dataclasses.replace(config.data, records=("gone.jsonl",)))
    assert sample_size(elsewhere, processor) == SampleSize(num_frames=processor.num_frames)


def command(folder: Path, *more: str, recipe: str = "finetune-lora") -> list[str]:
    fixed = ["--init", str(folder / "model"), "--data.records", str(folder / "records.jsonl")]
    return ["train", recipe, *fixed, "--lora.rank" if "lora" in recipe else "--batch-size", "4", *more]


def test_the_command_prints_every_way(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(folder, "--estimate", "--json")) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [row["way"] for row in facts["rows"] if row["gradient_checkpointing"]] == list(ways(tuned()))
    (own,) = (row for row in facts["rows"] if row["is_this_run"])
    assert (own["way"], own["gradient_checkpointing"]) == ("LoRA", True)
    assert own["total"] == sum(own[part] for part in ("weights", "gradients", "optimizer", "work"))
    assert facts["sample"]["visual_tokens"] > 0
    assert main(command(folder, "--estimate")) == 0
    said = capsys.readouterr().out
    assert "LoRA <- this run" in said
    assert f"{own['total'] / 1e6:.2f}" in said


def test_a_model_with_every_option_can_be_estimated(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As `hicom-tiny` is, with evidence, motion and pointers at words; no option needs the numbers in a tensor."""
    records = str(folder / "records.jsonl")
    assert main(["train", "finetune", "--init", "hicom-tiny", "--data.records", records, "--estimate", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sample"]["visual_tokens"] == 16


def test_missing_records_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["train", "tiny-pretrain", "--init", str(folder / "model"), "--data.records", "gone.jsonl", "--estimate"]
    assert main(args) == 0
    said = capsys.readouterr()
    assert "note: gone.jsonl is not there" in said.err
    assert "256 of text" in said.out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "tiny", "--estimate"], "for one stage"),
        (["train", "7b-tune", "--estimate"], "say how many train together, as in --devices 8"),
        (["train", "tiny-tune", "--init", "nowhere", "--estimate"], "there is no model in nowhere"),
        (["train", "tiny-tune", "--json"], "--json is for --estimate"),
        (["train", "tiny-tune", "--devices", "0", "--estimate"], "--devices 0"),
    ],
)
def test_what_cannot_be_estimated_is_said(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    assert message in capsys.readouterr().err


def test_recipes_differ_in_adapters_alone() -> None:
    full, lora, qlora = (recipe("model", ("r.jsonl",)) for recipe in (finetune, finetune_lora, finetune_qlora))
    assert (full.lora, lora.lora, qlora.lora) == (None, LoraOptions(), LoraOptions(quantize="4bit"))
    assert lora.rates[:-1] == full.rates[:-1]
    assert (full.rates[-1][1], lora.rates[-1][1]) == (1e-5, 2e-4)
    named = {"name": "", "out": "", "lora": None}
    assert dataclasses.replace(qlora, **named) == dataclasses.replace(lora, **named)
    assert all(
        rate == pytest.approx(20 * old)
        for (_, rate), (_, old) in zip(dataclasses.replace(full, rate_scale=20.0).rates, full.rates, strict=True)
    )
    with pytest.raises(ValueError, match=r"rate_scale=0\.0"):
        dataclasses.replace(full, rate_scale=0.0)
