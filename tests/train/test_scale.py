import dataclasses
import json
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig

from hicom.cli import parse
from hicom.data.collate import GroupedSampler, SampleSet
from hicom.data.features import FeatureStore, cache_features
from hicom.data.mixture import read_sources
from hicom.recipes import RECIPES
from hicom.train import StageConfig, TrainConfig, run
from hicom.train.config import Engine
from hicom.train.data import make_data
from hicom.train.engines import (
    CHECKPOINTING,
    choose_engine,
    engine_arguments,
    launched_engine,
    layer_classes,
    state_bytes,
)
from hicom.train.run import load
from hicom.train.stages import resolve
from hicom.train.trainer import make_trainer
from scale_training import assert_same_run, make_mixed_folder, mixed_config, seen, train_in_two, weights
from toy_training import ALL, make_config

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mixed_folder(tmp_path_factory.mktemp("scale"))


def gradients(config: TrainConfig, numbers: list[int]) -> tuple[float, dict[str, torch.Tensor | None]]:
    """Return the loss of a batch, and the gradients of what trains."""
    model, processor = load(config)
    resolve(model, config.stage.trainable)
    if config.gradient_checkpointing:
        getattr(model, f"{CHECKPOINTING}_enable")(**{f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}})
    samples, collator = make_data(config, model, processor)
    loss = model.train()(**collator([samples[i] for i in numbers])).loss
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("keeps_features", [False, True])
def test_every_module_runs_whatever_a_batch_shows(folder: Path, tmp_path: Path, keeps_features: bool) -> None:
    config = mixed_config(folder, tmp_path)
    if keeps_features:
        data = dataclasses.replace(config.data, cache=str(tmp_path / "cache"))
        config = dataclasses.replace(config, data=data, stage=StageConfig(trainable=ALL))
    kinds = {"video": [0, 1], "text": [3], "image": [4]}
    found = {kind: gradients(config, numbers)[1] for kind, numbers in kinds.items()}
    for kind, each in found.items():
        missing = [name for name, gradient in each.items() if gradient is None]
        assert not missing, f"a batch of {kind} alone leaves out {missing}"
        assert all(bool(gradient.isfinite().all()) for gradient in each.values() if gradient is not None)
    for name, gradient in found["text"].items():
        assert gradient is not None
        assert bool(gradient.any()) == ("language_model" in name), f"{name}: text alone says nothing about media"


def test_every_batch_makes_the_same_calls(folder: Path, tmp_path: Path) -> None:
    config = mixed_config(folder, tmp_path)
    model, processor = load(config)
    samples, collator = make_data(config, model, processor)
    calls: list[str] = []
    for name in ("vision_tower", "instruction_encoder", "compressor"):
        getattr(model.model, name).register_forward_hook(lambda *args, name=name: calls.append(name))
    made = []
    for numbers in ([0, 4], [0], [4], [3]):
        model(**collator([samples[i] for i in numbers]))
        made.append(calls.copy())
        calls.clear()
    assert made == [["vision_tower", "instruction_encoder", "compressor"] * 2] * 4


def test_fsdp_is_refused_where_it_would_be_left_aside(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(folder, out=str(tmp_path))
    model, processor = load(config)
    # As on several processes without GPUs: the engine is asked for, and accelerate does not make it.
    module = sys.modules["hicom.train.trainer"]
    monkeypatch.setattr(module, "choose_engine", lambda *args: "fsdp2")
    monkeypatch.setattr(module, "engine_arguments", lambda *args: {})
    with pytest.raises(ValueError, match="accelerate silently trains whole copies"):
        make_trainer(config, model, processor, tmp_path, {"wall_s": 0.0})


def test_empty_frames_change_no_number(folder: Path, tmp_path: Path) -> None:
    config = mixed_config(folder, tmp_path)
    model, processor = load(config)
    samples, collator = make_data(config, model, processor)
    assert collator.expected_media == ("pixel_values_videos", "pixel_values")
    for numbers in ([0, 4], [0], [4], [3]):
        batch = collator([samples[i] for i in numbers])
        expected = batch.pop("expected_media")
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, model(**batch, expected_media=expected).logits)


def test_a_run_expects_only_the_media_that_its_records_show(folder: Path, tmp_path: Path) -> None:
    config = make_config(folder, out=str(tmp_path))
    samples, collator = make_data(config, *load(config))
    assert samples.kinds == ("video",)
    assert collator([samples[0]])["expected_media"] == ("video_values",)


def test_gradient_checkpointing_changes_no_gradient(folder: Path, tmp_path: Path) -> None:
    config = mixed_config(folder, tmp_path)
    plain, again = (
        gradients(dataclasses.replace(config, gradient_checkpointing=on), [0, 3, 4]) for on in (False, True)
    )
    assert plain[0] == again[0]
    for name, gradient in plain[1].items():
        torch.testing.assert_close(again[1][name], gradient)


def test_gradient_checkpointing_is_switched_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    checkpoint = torch.utils.checkpoint.checkpoint

    def counted(*args: object, **kwargs: object) -> object:
        calls.append(bool(kwargs["use_reentrant"]))
        return checkpoint(*args, **kwargs)

    monkeypatch.setattr("transformers.modeling_utils.checkpoint", counted)
    run(make_config(folder, out=str(tmp_path), steps=1, gradient_checkpointing=True))
    assert calls
    assert not any(calls)


def test_processes_of_one_step_get_samples_of_about_one_length() -> None:
    """Padding within processes, and waiting for the longest, beside batches drawn at random."""
    generator = torch.Generator().manual_seed(0)
    lengths = (20 * torch.randn(4000, generator=generator).exp() + 10).long().tolist()
    size, processes = 4, 8

    def idle(order: list[int]) -> float:
        steps = [order[i : i + size * processes] for i in range(0, len(order) - size * processes + 1, size * processes)]
        real = sum(lengths[i] for step in steps for i in step)
        # All processes take as long as the one with the longest sample.
        return 1 - real / sum(len(step) * max(lengths[i] for i in step) for step in steps)

    grouped = idle(list(GroupedSampler(lengths, size * processes, seed=1)))
    at_random = idle(torch.randperm(4000, generator=generator).tolist())
    assert at_random > 0.6, "otherwise there is nothing to gain"
    assert grouped < 0.5 * at_random


def test_visual_tokens_count_as_length(folder: Path) -> None:
    samples = SampleSet(read_sources([folder / "mixed.jsonl"]))
    plain, _ = samples.lengths_and_videos()
    with_tokens, _ = samples.lengths_and_videos(video=100, image=10)
    shown = ["video"] * 3 + ["text", "image"] * 3
    added = {"video": 400, "image": 40, "text": 0}
    assert [b - a for a, b in zip(plain, with_tokens, strict=True)] == [added[kind] for kind in shown]


def test_what_an_engine_says(folder: Path) -> None:
    model, _ = load(make_config(folder))
    assert layer_classes(model) == ["Qwen2DecoderLayer", "SiglipEncoderLayer"]
    fsdp = engine_arguments("fsdp2", model, True)["fsdp_config"]
    assert fsdp["version"] == 2
    assert fsdp["activation_checkpointing"]
    assert engine_arguments("ddp", model, False) == {}
    for engine, stage in (("zero2", 2), ("zero3", 3)):
        assert engine_arguments(engine, model, False)["deepspeed"]["zero_optimization"]["stage"] == stage


@pytest.mark.parametrize(
    ("engine", "processes", "optimizer", "environment", "message"),
    [
        ("fsdp2", 1, "adamw", {}, "there is one"),
        ("fsdp2", 2, "muon", {}, "optimizer='adamw'"),
        ("ddp", 2, "adamw", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "leave one of them out"),
        (None, 2, "adamw", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version: 1"),
        (None, 2, "adamw", {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "zero_stage"),
    ],
)
def test_impossible_engines(
    engine: Engine | None,
    processes: int,
    optimizer: str,
    environment: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        choose_engine(engine, processes, optimizer)


def test_the_launcher_may_choose_the_engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched_engine({}) is None
    assert launched_engine({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}) == "zero3"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert choose_engine(None, 2, "adamw") == "fsdp2"
    assert engine_arguments("fsdp2", load(make_config(folder))[0], False) == {}, "its file has configured it"


def test_a_run_does_not_go_on_in_another_number_of_processes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(folder, out=str(tmp_path), steps=1)
    run(config)
    stamp = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(stamp | {"status": "running"}))
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="started with 1 processes and cannot go on exactly with 3"):
        run(config)


def test_a_run_of_before_a_switch_existed_goes_on(folder: Path, tmp_path: Path) -> None:
    config = make_config(folder, out=str(tmp_path), steps=1)
    run(config)
    stamp = json.loads((tmp_path / "run.json").read_text())
    for name in ("engine", "gradient_checkpointing"):
        del stamp["configuration"][name]
    (tmp_path / "run.json").write_text(json.dumps(stamp))
    run(config)
    with pytest.raises(ValueError, match=r"\(gradient_checkpointing differ\)"):
        run(dataclasses.replace(config, gradient_checkpointing=True))


# Several processes.


@pytest.fixture(scope="module")
def one_process(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `mixed_config` in one process, with batches as large as those of two together."""
    out = tmp_path_factory.mktemp("one") / "run"
    run(mixed_config(folder, out, batch_size=2))
    return out


@pytest.mark.dist
@pytest.mark.timeout(300)
@pytest.mark.parametrize("launch", ["ddp", "fsdp2", "accelerate"])
def test_mixed_batches_in_two_processes_are_one(folder: Path, tmp_path: Path, one_process: Path, launch: str) -> None:
    """Samples of one video, image or text each, answers of different lengths, nine samples for steps of two."""
    out = tmp_path / "two"
    if launch == "accelerate":
        launcher = ("accelerate.commands.launch", "--config_file", str(EXAMPLES / "accelerate" / "fsdp2.yaml"))
        result = train_in_two(mixed_config(folder, out), launcher=(*launcher, "--num_processes", "2"))
    else:
        result = train_in_two(mixed_config(folder, out, engine=launch, gradient_checkpointing=launch == "ddp"))
    assert result.returncode == 0, result.stderr[-4000:]
    assert json.loads((out / "run.json").read_text())["engine"] == ("ddp" if launch == "ddp" else "fsdp2")
    parts = list((out / "checkpoints" / "checkpoint-6").glob("pytorch_model_fsdp_0/*.distcp"))
    assert len(parts) == (0 if launch == "ddp" else 2), "the engine is not the one that was asked for"
    batches = seen(out)
    assert len(batches[0]) == len(batches[1])
    epoch = [number for pair in list(zip(*batches, strict=True))[:4] for batch in pair for number in batch]
    assert len(set(epoch)) == len(epoch) == 8, "every sample at most once, the ninth left out"
    kinds = ["video"] * 3 + ["text", "image"] * 3
    shown = [(kinds[a[0]], kinds[b[0]]) for a, b in zip(*batches, strict=True)]
    assert any(a != b for a, b in shown), "both processes always show the same kind"
    assert_same_run(out, one_process, atol=5e-5)
    before, trained = load(mixed_config(folder, out))[0], weights(out)
    resolve(before, mixed_config(folder, out).stage.trainable)
    for name, parameter in before.named_parameters():
        is_same = torch.equal(trained[name], parameter)
        assert is_same != parameter.requires_grad, f"{name} is {'trained' if parameter.requires_grad else 'frozen'}"


@pytest.mark.dist
@pytest.mark.timeout(500)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_resumes_exactly_after_one_process_is_killed(folder: Path, tmp_path: Path, engine: str) -> None:
    """Weights, optimizer, order of samples, windows, and the random numbers of both processes."""
    stage = StageConfig(trainable=mixed_config(folder, tmp_path).stage.trainable, windows=((1, 2, 2), (4, 4, 4)))
    changes = {"engine": engine, "stage": stage, "gradient_checkpointing": engine == "fsdp2"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    result = train_in_two(mixed_config(folder, whole, **changes), dropout=0.1)
    assert result.returncode == 0, result.stderr[-4000:]
    # A batch is made while the one before is trained on, so step 4 is done.
    result = train_in_two(mixed_config(folder, killed, **changes), dropout=0.1, kill_at=6)
    assert result.returncode != 0
    assert "Signal 9 (SIGKILL)" in result.stderr
    assert [path.name for path in (killed / "checkpoints").iterdir()] == ["checkpoint-3"]
    result = train_in_two(mixed_config(folder, killed, **changes), dropout=0.1)
    assert result.returncode == 0, result.stderr[-4000:]
    assert [len(batches) for batches in seen(killed)] < [len(batches) for batches in seen(whole)], "went on, not anew"
    assert_same_run(killed, whole, atol=2e-5)


# Files for users.


def test_the_slurm_script_names_what_there_is(tmp_path: Path) -> None:
    script = EXAMPLES / "slurm" / "train.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    words = shlex.split(script.read_text().replace("\\\n", " "), comments=True)
    recipe, *options = words[words.index("train") + 1 :]
    default = RECIPES[recipe]()
    config = parse(type(default), "train", options, default=default)
    assert (config.engine, config.bf16, config.gradient_checkpointing) == ("fsdp2", True, True)
    assert choose_engine(config.engine, 16, config.optimizer) == "fsdp2"


def test_the_files_of_accelerate_are_engines_that_we_know() -> None:
    for name, fields in {
        "fsdp2": {"fsdp_config": {"fsdp_version": 2, "fsdp_state_dict_type": "SHARDED_STATE_DICT"}},
        "zero3-offload": {"deepspeed_config": {"zero_stage": 3, "zero3_save_16bit_model": True}},
    }.items():
        file = yaml.safe_load((EXAMPLES / "accelerate" / f"{name}.yaml").read_text())
        for section, expected in fields.items():
            assert expected.items() <= file[section].items()
        assert set(file) <= set(ClusterConfig.__dataclass_fields__)


def test_bytes_of_an_engine_by_hand() -> None:
    """1000 parameters of which 100 train, on 4 devices, in 16 bit: weights, gradients, states."""
    assert state_bytes("ddp", 1000, 100, 4, bf16=True) == 4000 + 400 + 800
    assert state_bytes("fsdp2", 1000, 100, 4, bf16=True) == (4000 + 400 + 800) // 4
    assert state_bytes("zero2", 1000, 100, 4, bf16=True) == 2000 + (200 + 1200) // 4
    assert state_bytes("zero3", 1000, 100, 4, bf16=True) == (2000 + 200 + 1200) // 4
    assert state_bytes("zero3", 1000, 100, 4, bf16=False) == (4000 + 400 + 1200) // 4


# Features that several processes need.


def test_processes_share_the_computation_of_features(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that start at once compute every video once between them; locks hold between threads as between processes."""
    model, processor = load(make_config(folder))
    videos = [folder / f"{number}.mp4" for number in range(8)]
    start, computed = threading.Barrier(2), []
    encode_frames = type(model).encode_frames

    def slowly(self: object, pixels: torch.Tensor) -> object:
        computed.append(threading.get_ident())
        time.sleep(0.02)
        return encode_frames(self, pixels)

    def cache(_: int) -> FeatureStore:
        start.wait()
        return cache_features(model, processor, videos, tmp_path / "shared", num_frames=4, batch_frames=1)

    monkeypatch.setattr(type(model), "encode_frames", slowly)
    with ThreadPoolExecutor(2) as pool:
        stores = list(pool.map(cache, range(2)))
    assert len(computed) == len(videos)
    assert len(set(computed)) == 2, "one did all the work"
    alone = cache_features(model, processor, videos, tmp_path / "alone", num_frames=4, batch_frames=1)
    for store in stores:
        assert torch.equal(store.read(videos, "values"), alone.read(videos, "values"))
