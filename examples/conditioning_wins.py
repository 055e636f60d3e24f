"""Train two tiny compressors from nothing and see what the instruction buys: `python examples/conditioning_wins.py`.

Both squeeze a clip of 512 patches into ONE visual token. Both take the vision tower, the instruction encoder and the
language model of the embedded `hicom-tiny-start`, see the same clips in the same order, and train for as many steps.
The only difference: one compressor is told the question. About five minutes on two CPU cores.
"""

import argparse
import dataclasses
import random
from pathlib import Path

import torch

from hicom import VideoChat
from hicom.data.records import read_records
from hicom.recipes.stages import COMPRESSOR, IDLE, LANGUAGE_MODEL
from hicom.train import DataConfig, Parts, StageConfig, TrainConfig, run
from hicom.world.dataset import World, make_dataset

NUM_TRAIN, NUM_TEST = 1500, 150
FAMILIES = ("colour", "presence")


def make_config(name: str, out: Path, injection: str, steps: int) -> TrainConfig:
    """One training run: one window over the whole clip, no global tokens."""
    return TrainConfig(
        name=name,
        out=str(out / name),
        parts=Parts(
            towers="hicom-tiny-start",
            language_model="hicom-tiny-start",
            window=(8, 8, 8),
            num_global_tokens=0,
            config={"local_injection": injection},
        ),
        data=DataConfig(
            records=(str(out / "world" / "train" / "tune.jsonl"),),
            root=str(out / "world"),
            num_frames=8,
            cache=str(out / "features"),
        ),
        stage=StageConfig(trainable=((IDLE, 0.0), (COMPRESSOR, 1e-3), (LANGUAGE_MODEL, 5e-4))),
        steps=steps,
        batch_size=64,
    )


def accuracy(model: Path, world: Path) -> dict[str, float]:
    """Share of right answers on clips that training never showed, by family."""
    chat = VideoChat.from_pretrained(model)
    samples = read_records(world / "test" / "tune.jsonl", world)
    right: dict[str, list[bool]] = {family: [] for family in FAMILIES}
    for video in sorted({video for sample in samples for video in sample.videos}):
        encoded = chat.encode(video)
        asked = [sample for sample in samples if video in sample.videos]
        questions = [sample.messages[-1]["content"].replace("<video>", "").strip() for sample in asked]
        for sample, answer in zip(asked, chat.ask(encoded, questions, max_new_tokens=4), strict=True):
            right[sample.metadata["family"]].append(answer.strip().lower() == sample.answer.lower())
    return {family: sum(hits) / len(hits) for family, hits in right.items()}


def main() -> None:
    """Make clips, train both, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/conditioning_wins"))
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    world = World(seed=7, families=FAMILIES)
    make_dataset(args.out / "world", {"train": NUM_TRAIN, "test": NUM_TEST}, world)
    results = {}
    for name, injection in (("unconditional", "none"), ("conditional", "direct")):
        config = make_config(name, args.out, injection, args.steps)
        results[name] = accuracy(run(dataclasses.replace(config)), args.out / "world")
    print(f"\none visual token in place of 512, {args.steps} steps, {NUM_TEST} test clips")
    for name, families in results.items():
        print(f"{name:>14}  " + "  ".join(f"{family} {value:.2f}" for family, value in families.items()))


if __name__ == "__main__":
    main()
