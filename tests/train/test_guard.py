"""Loss, gradients or weights that are no numbers stop a run before they reach weights or a checkpoint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from hicom.model.modeling import HIComForConditionalGeneration
from hicom.train import run
from hicom.train.guard import Guard, sum_of
from hicom.train.trainer import StageTrainer
from scale_training import train_in_two
from toy_training import make_config, make_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("guard"))


def break_model(monkeypatch: pytest.MonkeyPatch, bad_call: int, what: str) -> None:
    """Make the loss of one forward pass, or the gradients that come from it, no number."""
    calls: list[int] = []
    forward = HIComForConditionalGeneration.forward

    def broken(self: HIComForConditionalGeneration, *args: object, **kwargs: object) -> object:
        output = forward(self, *args, **kwargs)
        if getattr(output, "loss", None) is None:  # the rehearsal of a language model
            return output
        calls.append(1)
        if len(calls) == bad_call:
            if what == "gradient":
                output.loss.register_hook(lambda gradient: gradient * float("nan"))
            else:
                output.loss = output.loss * float(what)
        return output

    monkeypatch.setattr(HIComForConditionalGeneration, "forward", broken)


def assert_stopped_well(out: Path, num_checkpoint: int) -> None:
    stamp = json.loads((out / "run.json").read_text())
    assert stamp["status"] == "running"
    assert "last finite one: step" in stamp["stopped"]
    assert not (out / "model").exists()
    names = {path.name for path in (out / "checkpoints").iterdir()}
    assert f"checkpoint-{num_checkpoint}" in names
    assert max(int(name.rpartition("-")[2]) for name in names) == num_checkpoint
    tensors = load_file(out / "checkpoints" / f"checkpoint-{num_checkpoint}" / "model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


@pytest.mark.parametrize(
    ("what", "message"),
    [("nan", "the loss is nan"), ("inf", "the loss is inf"), ("gradient", "gradients are not finite")],
)
def test_a_step_that_is_no_number_stops_the_run_and_names_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, message: str
) -> None:
    """The second forward pass of step 4, after the checkpoint of step 3; the run then goes on from that."""
    config = make_config(folder, out=str(tmp_path), batch_size=1, accumulate=2, save_every=3)
    with monkeypatch.context() as patch:
        break_model(patch, 8, what)
        with pytest.raises(ValueError, match=rf"^step 4: {message}, on \S*records\.jsonl, line \d") as error:
            run(config)
    text = str(error.value)
    assert "last finite one: step 3: loss " in text
    assert str(error.value).count("records.jsonl, line") == (2 if what == "gradient" else 1), "the samples of the loss"
    assert_stopped_well(tmp_path, 3)
    run(config)
    stamp = json.loads((tmp_path / "run.json").read_text())
    assert stamp["status"] == "finished"
    assert "stopped" not in stamp


def test_weights_that_are_no_numbers_reach_no_checkpoint(folder: Path, tmp_path: Path) -> None:
    """One weight of all becomes infinite in the step before a checkpoint, from finite gradients."""
    steps: list[int] = []

    def overflow(optimizer: torch.optim.Optimizer, *_: object) -> None:
        steps.append(1)
        if len(steps) == 4:
            optimizer.param_groups[-1]["params"][-1].data.view(-1)[-1] = float("inf")

    handle = register_optimizer_step_post_hook(overflow)
    try:
        with pytest.raises(ValueError, match=r"^step 4: weights are not finite after it; last finite one: step 4: "):
            run(make_config(folder, out=str(tmp_path), save_every=2))
    finally:
        handle.remove()
    assert_stopped_well(tmp_path, 2)


@pytest.mark.parametrize("rate_scale", [1e7, 1e33])
def test_rates_that_break_weights_stop_the_run(folder: Path, tmp_path: Path, rate_scale: float) -> None:
    """Steps of 1e4 and 1e30: before, such a run said that it had finished, with a loss of 0.38."""
    config = make_config(folder, out=str(tmp_path), save_every=1, rate_scale=rate_scale, warmup=0.0)
    with pytest.raises(ValueError, match=r"^step \d: "):
        run(config)
    assert not (tmp_path / "model").exists()
    for path in (tmp_path / "checkpoints").glob("*/model.safetensors"):
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(path).values()), path


def test_an_infinite_norm_of_finite_gradients_stops_the_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clipping would make such gradients zero, and the step of nothing."""
    forward = HIComForConditionalGeneration.forward

    def steep(self: HIComForConditionalGeneration, *args: object, **kwargs: object) -> object:
        output = forward(self, *args, **kwargs)
        if getattr(output, "loss", None) is not None:
            output.loss.register_hook(lambda gradient: gradient * 1e30)
        return output

    monkeypatch.setattr(HIComForConditionalGeneration, "forward", steep)
    with pytest.raises(ValueError, match=r"^step 1: the norm of the gradients is inf"):
        run(make_config(folder, out=str(tmp_path)))


def test_infinite_gradients_that_a_scaler_leaves_out_are_no_error() -> None:
    """Scaled losses overflow now and then; the scaler makes no step then, and lowers its scale."""
    weight = nn.Parameter(torch.ones(2))
    optimizer, guard = torch.optim.AdamW([weight]), Guard()
    guard.watch(optimizer)
    guard.is_scaled = True
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    for factor, is_step in ((float("inf"), False), (1.0, True)):
        before = weight.detach().clone()
        loss = weight.sum()
        guard.add(loss, ["a sample"])
        scaler.scale(loss).backward()
        assert weight.grad is not None
        weight.grad.mul_(factor)
        scaler.step(optimizer)
        scaler.update()
        guard.settle()
        optimizer.zero_grad()
        assert bool((weight != before).any()) == is_step
    (weight.sum() * float("nan")).backward()
    with pytest.raises(ValueError, match="gradients are not finite"):
        optimizer.step()


def test_a_step_that_an_engine_leaves_out_in_silence_stops_the_run() -> None:
    """DeepSpeed does that for gradients that are not finite, scaler or none; a loss that is none is an error always."""
    for loss, is_scaled, message in ((1.0, False, "gradients are not finite"), (float("nan"), True, "the loss is nan")):
        guard = Guard()
        guard.is_scaled = is_scaled
        guard.add(torch.tensor(loss), ["a sample"])
        with pytest.raises(ValueError, match=f"{message}, on a sample"):
            guard.settle()
    guard.settle()  # nothing is left to look at


def test_a_sum_tells_whether_all_numbers_are_finite() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        large = torch.full((1000,), 6e4, dtype=dtype)
        assert bool(sum_of([large, -large]).isfinite())
        for bad in (float("nan"), float("inf"), -float("inf")):
            large[7] = bad
            assert not bool(sum_of([torch.ones(3), large]).isfinite())
    both = torch.tensor([float("inf"), -float("inf")])
    assert not bool(sum_of([both]).isfinite())


def test_a_step_is_waited_for_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many forward passes it has: losses stay on the device, and the filter that looks at each is off."""
    reads: list[int] = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (reads.append(len(self)), tolist(self))[1])
    seen: list[bool] = []
    step = StageTrainer.training_step

    def watched(self: StageTrainer, *args: object, **kwargs: object) -> torch.Tensor:
        seen.append(self.args.logging_nan_inf_filter)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", watched)
    run(make_config(folder, out=str(tmp_path), batch_size=1, accumulate=4, steps=2))
    assert seen == [False] * 8
    assert reads.count(4 + 1) == 2, "four losses and the gradients are read together, once a step"


@pytest.mark.dist
@pytest.mark.timeout(300)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_all_processes_stop_where_the_loss_of_one_is_no_number(folder: Path, tmp_path: Path, engine: str) -> None:
    config = make_config(folder, out=str(tmp_path / "run"), batch_size=1, engine=engine, save_every=2)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, cache=None))
    result = train_in_two(config, nan_at=4)
    assert result.returncode != 0
    assert result.stderr.count("ValueError: step 4: the loss is nan, on ") >= 2, result.stderr[-3000:]
    assert "last finite one: step 3" in result.stderr
    # Each process adds its own loss of the step before.
    stopped = [line for line in result.stderr.splitlines() if "ValueError: step 4" in line]
    for line in stopped:
        assert line.count("records.jsonl, line") == 1, "the sample of the other process is not to blame"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-2"]
    assert not (tmp_path / "run" / "model").exists()
