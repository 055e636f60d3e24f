import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hicom.data.collate import Collator
from hicom.model.modeling import HIComForConditionalGeneration
from hicom.model.processing import HIComProcessor
from hicom.train import Chain, DataConfig, LoraOptions, StageConfig, TrainConfig, run
from hicom.train.data import make_data
from hicom.train.run import last_checkpoint, load, starting_model
from toy_training import ALL, make_config, make_folder

TESTS = Path(__file__).parents[1]
PYTHONPATH = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])

# Trains the run of `make_config(FOLDER, out=OUT, CHANGES)`, and kills itself while it makes batch KILL_AT.
SCRIPT = """
import os, signal, sys
from pathlib import Path
from toy_training import make_config
from hicom.data.collate import Collator
from hicom.train import run
folder, out, kill_at, changes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), eval(sys.argv[4])
make_batch, made = Collator.__call__, []
def counted(self, items):
    made.append(1)
    if len(made) == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return make_batch(self, items)
Collator.__call__ = counted
run(make_config(folder, out=out, **changes))
"""
# Trains a chain of two stages of one step in OUT, which makes its own data in FOLDER.
CHAIN_SCRIPT = """
import sys
from pathlib import Path
from toy_training import make_config, make_folder
from hicom.train import Chain, run
folder, out = Path(sys.argv[1]), sys.argv[2]
class FromNothing(Chain):
    makes_data = True
    def prepare(self):
        if not folder.exists():
            folder.mkdir()
            make_folder(folder)
stages = (make_config(folder, name=name, batch_size=2, steps=1) for name in ("first", "second"))
run(FromNothing(out=out, stages=tuple(stages)))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("run"))


def run_in_two_processes(script: str, folder: Path, *arguments: str) -> None:
    path = folder / "script.py"
    path.write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(path)]
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *arguments], env=environment, check=True)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def assert_same_weights(a: Path, b: Path, *, atol: float = 2e-5) -> None:
    # Not bit for bit: once in 17 runs a CPU kernel rounded the last bit otherwise, and Adam carries that on. State that
    # is lost moves weights by a learning rate, 1e-3, or more.
    for name, tensor in weights(a).items():
        torch.testing.assert_close(
            tensor, weights(b)[name], rtol=1e-4, atol=atol, msg=f"{name} differs: part of the state is not restored"
        )


def windows(*sizes: tuple[int, int, int]) -> StageConfig:
    return StageConfig(trainable=ALL, windows=sizes)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumes_exactly_after_a_kill(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    # 7 samples of 2 make an epoch of 3 steps: the kill is in the second one, two steps after a checkpoint.
    stage = windows((1, 2, 2), (2, 2, 2), (4, 4, 4))
    changes = {"steps": 8, "save_every": 3, "batch_size": 1, "accumulate": 2, "stage": stage, "optimizer": optimizer}
    text = f"dict(steps=8, save_every=3, batch_size=1, accumulate=2, optimizer={optimizer!r}, "
    text += "stage=__import__('hicom.train').train.StageConfig("
    text += "trainable=__import__('toy_training').ALL, windows=((1, 2, 2), (2, 2, 2), (4, 4, 4))))"
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-c", SCRIPT, str(folder), str(killed), "11", text]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": PYTHONPATH}, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert not (killed / "model").exists()
    assert last_checkpoint(killed / "checkpoints") == killed / "checkpoints" / "checkpoint-3"
    # A kill in the middle of writing leaves a checkpoint without its mark.
    (killed / "checkpoints" / "checkpoint-5").mkdir()
    batches: list[int] = []
    make_batch = Collator.__call__
    monkeypatch.setattr(Collator, "__call__", lambda *args: (batches.append(1), make_batch(*args))[1])
    run(make_config(folder, out=str(killed), **changes))
    assert len(batches) == (8 - 3) * 2, "the run did not go on from its checkpoint"
    run(make_config(folder, out=str(whole), **changes))
    # Muon orthogonalises what gradients leave empty too, in bfloat16: a last bit in the weights of step 3 moves those
    # of step 8 by up to 1.2e-4 (six tries), lost state by 2.5e-3. That its state comes back bit for bit: test_optim.py.
    assert_same_weights(killed, whole, atol=2e-5 if optimizer == "adamw" else 4e-4)
    logs = [json.loads((out / "log.json").read_text()) for out in (killed, whole)]
    losses = [[row["loss"] for row in log[:8]] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_run_folder_says_what_was_run(folder: Path, tmp_path: Path) -> None:
    config = make_config(folder, out=str(tmp_path))
    model_folder = run(config)
    stamp = json.loads((tmp_path / "run.json").read_text())
    assert stamp["configuration"] == json.loads(json.dumps(dataclasses.asdict(config)))
    assert stamp["status"] == "finished"
    assert {"torch", "transformers", "hicom", "python"} <= stamp["versions"].keys()
    assert {"command", "commit", "seed", "hardware", "started", "samples"} <= stamp.keys()
    assert stamp["wall_s"] > 0
    assert sum(row["parameters"] for row in stamp["trainable"]) > 0
    assert len([row for row in json.loads((tmp_path / "log.json").read_text()) if "loss" in row]) == config.steps
    assert list((tmp_path / "tensorboard").iterdir())
    # Finished: nothing is trained again.
    modified = (model_folder / "model.safetensors").stat().st_mtime_ns
    assert run(config) == model_folder
    assert (model_folder / "model.safetensors").stat().st_mtime_ns == modified


def test_refuses_a_folder_of_another_run(folder: Path, tmp_path: Path) -> None:
    run(make_config(folder, out=str(tmp_path), steps=1))
    with pytest.raises(ValueError, match=r"another configuration \(seed, steps differ\)"):
        run(make_config(folder, out=str(tmp_path), steps=2, seed=1))


def test_refuses_a_folder_in_use(folder: Path, tmp_path: Path) -> None:
    code = "import os, sys; from pathlib import Path; from hicom.locks import owned\nwith owned(Path(sys.argv[1])): "
    code += "print(os.getpid(), flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        holder = other.stdout.readline().strip()
        with pytest.raises(ValueError, match=f"in use by process {holder};"):
            run(make_config(folder, out=str(tmp_path)))
        other.kill()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"parts": None}, "either init"),
        ({"parts": None, "init": "nowhere"}, "there is no model in nowhere"),
        ({"batch_size": 9}, r"8 samples are fewer than the 9 of one step; lower batch_size \(9\)"),
        ({"global_batch_size": 12}, r"fewer than the 12 of one step; lower global_batch_size \(12\)"),
        ({"bf16": True}, "needs a GPU"),
        ({"data": DataConfig(records=("none.jsonl",))}, r"there is no file none\.jsonl"),
    ],
)
def test_impossible_runs(folder: Path, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(make_config(folder, out=str(tmp_path), **changes))


def test_a_model_takes_the_frames_that_it_was_trained_on(folder: Path, tmp_path: Path) -> None:
    def frames(data: DataConfig) -> tuple[int, int]:
        config = make_config(folder, out=str(tmp_path / str(data.num_frames)), steps=1, data=data)
        _, collator = make_data(config, *load(config))
        return collator.num_frames or 0, HIComProcessor.from_pretrained(run(config)).num_frames

    with pytest.raises(ValueError, match=r"data\.num_frames=0 must be at least 1"):
        DataConfig(records=("records.jsonl",), num_frames=0)
    data = dataclasses.replace(make_config(folder).data, cache=None)
    assert frames(dataclasses.replace(data, num_frames=3)) == (3, 3)
    assert frames(dataclasses.replace(data, num_frames=None)) == (4, 4)  # those of the model


def test_a_start_may_be_a_model_of_the_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(folder, parts=None, init="org/model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="org/model: no such folder here, and no download from the hub"):
        starting_model(config)
    # A folder that is there and lacks the model is no hub id.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    with pytest.raises(ValueError, match="there is no model in org/model"):
        starting_model(config)


def test_a_start_in_the_official_layout_is_named(folder: Path, tmp_path: Path) -> None:
    golden = next(path.parent for path in sorted((TESTS / "golden").rglob("config.json")))
    with pytest.raises(ValueError, match=r"is a checkpoint of the official code; `hicom convert .* DST` comes first"):
        starting_model(make_config(folder, parts=None, init=str(golden)))


def test_a_chain_passes_the_model_on(folder: Path, tmp_path: Path) -> None:
    first = make_config(folder, name="first", stage=StageConfig(trainable=ALL[1:2]))
    second = make_config(folder, name="second", parts=None, init="set by the chain")
    model_folder = run(Chain(out=str(tmp_path), stages=(first, second)))
    assert model_folder == tmp_path / "second" / "model"
    assert json.loads((tmp_path / "second" / "run.json").read_text())["configuration"]["init"] == str(
        tmp_path / "first" / "model"
    )
    before, after = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert {name for name in before if not torch.equal(before[name], after[name])}
    # What a stage leaves can be asked at once.
    model = HIComForConditionalGeneration.from_pretrained(model_folder)
    processor = HIComProcessor.from_pretrained(model_folder)
    content = [{"type": "video", "video": folder / "0.mp4"}, {"type": "text", "text": "which way does the cat go ?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1


def test_accumulation_changes_nothing(folder: Path, tmp_path: Path) -> None:
    outs = []
    for batch_size, accumulate in ((4, 1), (2, 2), (1, 4)):
        outs.append(tmp_path / str(accumulate))
        run(make_config(folder, out=str(outs[-1]), batch_size=batch_size, accumulate=accumulate, steps=2))
    for other in outs[1:]:
        for name, tensor in weights(outs[0]).items():
            torch.testing.assert_close(weights(other)[name], tensor, rtol=1e-4, atol=2e-5)


@pytest.mark.dist
def test_two_processes_are_one(folder: Path, tmp_path: Path) -> None:
    changes = "dict(batch_size=2, steps=2)"
    run_in_two_processes(SCRIPT, tmp_path, str(folder), str(tmp_path / "two"), "0", changes)
    run(make_config(folder, out=str(tmp_path / "one"), batch_size=4, steps=2))
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], tensor, rtol=1e-4, atol=2e-5)


@pytest.mark.dist
def test_a_chain_in_two_processes(tmp_path: Path) -> None:
    run_in_two_processes(CHAIN_SCRIPT, tmp_path, str(tmp_path / "data"), str(tmp_path / "chain"))
    for name in ("first", "second"):
        assert json.loads((tmp_path / "chain" / name / "run.json").read_text())["status"] == "finished"


def test_pixels_train_as_kept_features_do(folder: Path, tmp_path: Path) -> None:
    config = make_config(folder, out=str(tmp_path / "kept"), steps=2)
    run(config)
    data = dataclasses.replace(config.data, cache=None)
    run(TrainConfig(**{**vars(config), "out": str(tmp_path / "pixels"), "data": data}))
    for name, tensor in weights(tmp_path / "kept").items():
        torch.testing.assert_close(weights(tmp_path / "pixels")[name], tensor, rtol=1e-2, atol=2e-3)


def test_a_skip_list_is_enough_for_malformed_records(folder: Path, tmp_path: Path) -> None:
    lines = (folder / "records.jsonl").read_text().splitlines()
    (tmp_path / "bad.jsonl").write_text("\n".join([*lines[:4], '{"video": "0.mp4"}']))
    (tmp_path / "skip.jsonl").write_text('{"file": "bad.jsonl", "line": 5}\n{"file": "bad.jsonl", "line": 1}')
    data = DataConfig(
        records=(str(tmp_path / "bad.jsonl"),),
        root=str(folder),
        num_frames=4,
        cache=str(folder / "cache"),
        skip_list=str(tmp_path / "skip.jsonl"),
    )
    run(make_config(folder, out=str(tmp_path / "run"), steps=1, data=data, batch_size=1))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["samples"] == 3


def test_a_mixture_and_what_is_left_out(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = (folder / "records.jsonl").read_text().splitlines()
    (tmp_path / "bad.jsonl").write_text("\n".join([lines[0], '{"video": "0.mp4"}', *lines[1:4]]))
    (tmp_path / "mixture.yaml").write_text(
        f"datasets:\n  - {{path: bad.jsonl, root: {folder}}}\n"
        f"  - {{path: {folder / 'records.jsonl'}, sampling: 'end:3', weight: 2}}\n"
    )
    (tmp_path / "skip.jsonl").write_text(json.dumps({"media": str(folder / "7.mp4")}))
    config = make_config(folder, out=str(tmp_path / "run"), steps=1)
    files = {"records": (str(tmp_path / "mixture.yaml"),), "skip_list": str(tmp_path / "skip.jsonl")}
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2"):
        run(dataclasses.replace(config, data=dataclasses.replace(config.data, **files)))
    data = dataclasses.replace(config.data, **files, on_bad_record="skip")
    with caplog.at_level("WARNING"):
        run(dataclasses.replace(config, out=str(tmp_path / "again"), data=data))
    # Four good records of the first file, twice two of the second.
    assert json.loads((tmp_path / "again" / "run.json").read_text())["samples"] == 8
    assert "1 bad records are left out; the first: " in caplog.text
    assert "2 samples are left out" in caplog.text


@pytest.mark.parametrize("adapts", [False, True])
def test_a_trained_model_is_written_in_the_precision_that_is_asked_for(
    folder: Path, tmp_path: Path, adapts: bool
) -> None:
    """All of it, with a configuration that says so; checkpoints keep all digits, and another stage starts from it."""
    config = make_config(folder, out=str(tmp_path / "whole"), steps=2, lora=LoraOptions(rank=2) if adapts else None)
    run(config)
    half = dataclasses.replace(config, out=str(tmp_path / "half"), save_dtype="bfloat16")
    model_folder = run(half)
    whole, ours = weights(tmp_path / "whole"), weights(tmp_path / "half")
    assert whole.keys() == ours.keys()
    for name, tensor in ours.items():
        assert (tensor.dtype, whole[name].dtype) == (torch.bfloat16, torch.float32)
        torch.testing.assert_close(tensor, whole[name].to(torch.bfloat16), msg=name)
    said = json.loads((model_folder / "config.json").read_text())
    assert said["dtype"] == said["text_config"]["dtype"] == said["vision_config"]["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "whole" / "model" / "config.json").read_text())["dtype"] == "float32"
    model = HIComForConditionalGeneration.from_pretrained(model_folder, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    kept = load_file(next((tmp_path / "half" / "checkpoints").glob("*/model.safetensors")))
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
    run(make_config(folder, out=str(tmp_path / "next"), steps=1, parts=None, init=str(model_folder)))
    assert {tensor.dtype for tensor in weights(tmp_path / "next").values()} == {torch.float32}


def test_runs_in_bfloat16_write_bfloat16(folder: Path) -> None:
    assert make_config(folder).saved_precision == "float32"
    assert make_config(folder, bf16=True).saved_precision == "bfloat16"
    assert make_config(folder, bf16=True, save_dtype="float32").saved_precision == "float32"


def test_a_run_decodes_the_turns_of_a_record_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four records of three turns each, in batches of three: an epoch reads every video once, and learns every turn."""
    records = []
    for number in range(4):
        turns = [{"from": "human", "value": "is there a cat ?"}, {"from": "gpt", "value": "yes"}] * 3
        records.append({"video": str(folder / f"{number}.mp4"), "conversations": turns})
    (tmp_path / "turns.json").write_text(json.dumps(records))
    read, learnt = [], []
    read_video, make_batch = HIComProcessor.read_video, Collator.__call__
    monkeypatch.setattr(
        HIComProcessor, "read_video", lambda self, x, **choice: (read.append(x), read_video(self, x, **choice))[1]
    )
    monkeypatch.setattr(
        Collator, "__call__", lambda self, items: (learnt.extend(i for i, _ in items), make_batch(self, items))[1]
    )
    config = make_config(folder, out=str(tmp_path / "run"), steps=None, epochs=1.0, batch_size=3)
    data = dataclasses.replace(config.data, records=(str(tmp_path / "turns.json"),), cache=None)
    run(dataclasses.replace(config, data=data))
    assert sorted(learnt) == list(range(12))
    assert len(read) == len(set(read)) == 4
    assert json.loads((tmp_path / "run" / "run.json").read_text())["steps"] == 4
