"""Make a folder to fine-tune on: `python examples/finetune_data.py my_videos`.

Stands in for videos and questions of your own: procedural clips of a single object, and a question that `hicom-tiny`
was never asked. A clip passes the inspection where its object goes up or down, and fails where it goes left or right.
Writes `NAME/*.mp4`, `NAME/train.jsonl` and `NAME/val.jsonl`; no clip is in both.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from hicom.video import write_video
from hicom.world.dataset import sprites_of
from hicom.world.render import iter_frames
from hicom.world.scenes import DIRECTIONS, Scene, WorldConfig, make_scene

CONFIG = WorldConfig()
QUESTION = "<video>\nDoes the clip pass the inspection?"
VERDICTS = {"up": "yes", "down": "yes", "left": "no", "right": "no"}


def scenes(seed: int) -> Iterator[Scene]:
    """Yield scenes with one object that goes one way."""
    number = 0
    while True:
        scene = make_scene((seed, number), CONFIG)
        number += 1
        if len(scene.objects) == 1 and scene.objects[0].way in DIRECTIONS:
            yield scene


def write(folder: Path, name: str, count: int, seed: int) -> None:
    """Write clips and a file of records about them."""
    lines = []
    for number, scene in zip(range(count), scenes(seed), strict=False):
        video = f"{name}_{number:04d}.mp4"
        write_video(folder / video, iter_frames(scene, CONFIG, sprites_of(None)), CONFIG.fps)
        turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": VERDICTS[scene.objects[0].way]}]
        lines.append(json.dumps({"id": video, "video": video, "conversations": turns}) + "\n")
    (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")


def main() -> None:
    """Write both parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=400, help="clips to train on")
    parser.add_argument("--val", type=int, default=100, help="clips to evaluate on")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    write(options.folder, "train", options.train, seed=1)
    write(options.folder, "val", options.val, seed=2)
    print(options.folder)


if __name__ == "__main__":
    main()
