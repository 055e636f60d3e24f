"""Runs in several processes: a folder of mixed records, and a script that trains on them and says what it has seen."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hicom.train import DataConfig, StageConfig, TrainConfig
from toy_training import ALL, make_config, make_folder

TESTS = Path(__file__).parent
TOWERS = (
    (r"model\.vision_tower\.(embeddings|encoder|post_layernorm|head\.(mlp|layernorm))\..*", 3e-4),
    (r"model\.instruction_encoder\..*", 1e-4),
)
"""What media and instructions reach of the towers: the head's own attention takes no part. Rates differ."""
TEXTS = [("is there a cat ?", "yes"), ("what happens ?", "it moves left it moves right it moves up"), ("is it ?", "no")]


def make_mixed_folder(folder: Path) -> Path:
    """Fill `folder` with towers and nine records: three of videos, three of images, three of text alone."""
    make_folder(folder)
    lines = (folder / "records.jsonl").read_text().splitlines()[:3]
    for number, (question, answer) in enumerate(TEXTS):
        Image.new("RGB", (32, 32), (80 * number, 30, 200)).save(folder / f"{number}.png")
        for media in ({}, {"image": f"{number}.png"}):
            said = "<image>\n" * len(media) + question
            turns = [{"from": "human", "value": said}, {"from": "gpt", "value": answer}]
            lines.append(json.dumps({"id": len(lines), **media, "conversations": turns}))
    (folder / "mixed.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def mixed_config(folder: Path, out: Path, **changes: object) -> TrainConfig:
    """Return a run from pixels on mixed records that also trains the towers: all modules of the model take part."""
    data = DataConfig(records=(str(folder / "mixed.jsonl"),), num_frames=4)
    stage = StageConfig(trainable=(*ALL, *TOWERS))
    fixed = {"data": data, "stage": stage, "batch_size": 1, "steps": 6, "save_every": 3, "out": str(out)}
    return make_config(folder, **(fixed | changes))


def train_in_two(
    config: TrainConfig,
    *,
    kill_at: int | None = None,
    nan_at: int | None = None,
    dropout: float = 0.0,
    launcher: tuple[str, ...] = ("torch.distributed.run", "--standalone", "--nproc-per-node=2"),
    timeout_s: float = 150,
) -> subprocess.CompletedProcess[str]:
    """Run a configuration in two processes on this machine.

    Args:
        config: of the run.
        kill_at: batch in which the second process kills itself.
        nan_at: step in which its loss is no number.
        dropout: of what goes into the language model, so that random numbers of every process matter.
        launcher: module that starts the processes, and its arguments.
        timeout_s: processes that wait for each other longer than this are stopped, and the test fails.
    """
    Path(config.out).mkdir(parents=True, exist_ok=True)
    task = Path(config.out).parent / f"{Path(config.out).name}.pickle"
    task.write_bytes(pickle.dumps((config, kill_at, nan_at, dropout)))
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launcher, str(TESTS / "scale_training.py"), str(task)]
    return subprocess.run(command, env=environment, timeout=timeout_s, capture_output=True, text=True)


def seen(out: Path) -> list[list[list[int]]]:
    """Return the numbers of the samples in every batch of both processes."""
    return [json.loads((out / f"seen-{rank}.json").read_text()) for rank in range(2)]


def losses(out: Path) -> list[float]:
    """Return the losses of all steps."""
    return [row["loss"] for row in json.loads((out / "log.json").read_text()) if "loss" in row]


def weights(out: Path) -> dict[str, torch.Tensor]:
    """Return the trained model's weights."""
    return load_file(out / "model" / "model.safetensors")


def assert_same_run(out: Path, other: Path, *, atol: float) -> None:
    """Check that two runs have the same losses, and weights of the same names and values."""
    assert losses(out) == pytest.approx(losses(other), rel=1e-5)
    ours, others = weights(out), weights(other)
    assert ours.keys() == others.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, others[name], rtol=1e-4, atol=atol, msg=f"{name} differs")


def main() -> None:
    """Run the task that `train_in_two` wrote, in one of its processes."""
    import signal

    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    from hicom.data.collate import Collator
    from hicom.model.modeling import HIComForConditionalGeneration, HIComModel
    from hicom.train import run

    config, kill_at, nan_at, dropout = pickle.loads(Path(sys.argv[1]).read_bytes())
    rank = int(os.environ["RANK"])
    batches: list[list[int]] = []
    make_batch, embed = Collator.__call__, HIComModel.embed

    def watched(self: Collator, items: list) -> dict:
        batches.append([number for number, _ in items])
        if rank == 1 and len(batches) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return make_batch(self, items)

    def dropped(self: HIComModel, *args: object, **kwargs: object) -> torch.Tensor:
        return torch.nn.functional.dropout(embed(self, *args, **kwargs), dropout, training=self.training)

    init = AcceleratorState.__init__

    def with_fsdp(self: AcceleratorState, *args: object, **kwargs: object) -> None:
        init(self, *args, **kwargs)
        # On CPUs accelerate leaves FSDP aside without a word. PyTorch's works there, over gloo.
        if kwargs.get("fsdp_plugin") is not None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = kwargs["fsdp_plugin"]
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    forward, calls = HIComForConditionalGeneration.forward, []

    def no_number(self: HIComForConditionalGeneration, *args: object, **kwargs: object) -> object:
        output = forward(self, *args, **kwargs)
        if getattr(output, "loss", None) is not None:  # the rehearsal of a language model has none
            calls.append(1)
        if len(calls) == nan_at and rank == 1:
            output.loss = output.loss * float("nan")
        return output

    if nan_at is not None:
        HIComForConditionalGeneration.forward = no_number
    AcceleratorState.__init__ = with_fsdp
    Collator.__call__ = watched
    if dropout:
        HIComModel.embed = dropped
    run(config)
    Path(config.out, f"seen-{rank}.json").write_text(json.dumps(batches))


if __name__ == "__main__":
    main()
