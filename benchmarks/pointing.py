"""Does the attention lie on what is asked about? `python benchmarks/pointing.py MODEL`.

The pointing game on held-out clips of the sprite world: questions that name one object, the boxes of that object, and
the attention of both branches with and without the instruction. `docs/look.md` defines the numbers; with `--out` they
also go there.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hicom.data.records import Sample, read_records
from hicom.inference import VideoChat
from hicom.look import Box, Target, named_object, pointing
from hicom.provenance import git_commit, hardware

ROOT = Path(__file__).parents[1]
# Families whose questions name an object. "Is there a dog?" names one that is there only where the answer is yes.
FAMILIES = ("presence", "colour", "position", "direction")
MEASURES = {
    "gain": "gain",
    "others_gain": "gain on others",
    "share": "share",
    "window_gain": "gain in windows",
    "window_share": "share in windows",
    "hit": "hits",
    "hit_chance": "by chance",
}


def question_of(sample: Sample) -> str:
    """Return the question of a record without its placeholder."""
    return sample.messages[-1]["content"].replace("<video>", "").strip()


def boxes_of(item: dict[str, Any], num_frames: int) -> list[Box | None]:
    """Return an object's box in every frame; the truth may list only those from its first frame on."""
    boxes = [None] * item.get("first_frame", 0) + item["boxes"]
    return boxes + [None] * (num_frames - len(boxes))


def read_targets(world: Path, split: str, num_clips: int | None = None) -> Iterator[Target]:
    """Yield the questions that name one object, with its boxes; those about one clip in a row.

    Args:
        world: folder of the data set.
        split: `train`, `val` or `test`.
        num_clips: only the first so many clips.
    """
    lines = (world / split / "truth.jsonl").read_text("utf-8").splitlines()[:num_clips]
    truth = {world / clip["video"]: clip for clip in map(json.loads, lines)}
    for sample in read_records(world / split / "tune.jsonl", world):
        family, (video,) = sample.metadata["family"], sample.videos
        if video not in truth or family not in FAMILIES or (family == "presence" and sample.answer != "yes"):
            continue
        objects = truth[video]["objects"]
        number = named_object(question_of(sample), [each["name"] for each in objects])
        if number is None:
            continue
        asked, *others = (
            boxes_of(each, truth[video]["num_frames"])
            for each in (objects[number], *objects[:number], *objects[number + 1 :])
        )
        yield Target(video, question_of(sample), asked, truth[video]["fps"], others)


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table: means with their 95 % intervals."""
    lines = [f"| view | {' | '.join(MEASURES.values())} |", "|---|" + "---|" * len(MEASURES)]
    for view, measures in results["views"].items():
        cells = [
            "{mean:.3f} ({0:.3f} to {1:.3f})".format(*measures[name]["interval"], mean=measures[name]["mean"])
            if name in measures
            else ""
            for name in MEASURES
        ]
        lines.append(f"| {view} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_results(path: Path, results: dict[str, Any], page: Path) -> None:
    """Write the JSON file, and the table into the page between its markers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    path.with_suffix(".md").write_text(table(results) + "\n", "utf-8")
    start, end = "<!-- results -->", "<!-- /results -->"
    head, _, rest = page.read_text("utf-8").partition(start)
    _, found, tail = rest.partition(end)
    if not found:
        raise ValueError(f"{page}: the markers {start} and {end} are missing")
    facts = (
        f"`{results['model']}`, {results['num_questions']} questions about {results['num_clips']} clips of the split "
        f"`{results['split']}`, {results['num_frames']} frames, window {tuple(results['window'] or ())}; "
        f"{results['date']}, commit `{str(results['commit'])[:12]}`. Means with 95 % intervals."
    )
    page.write_text(f"{head}{start}\n\n{facts}\n\n{table(results)}\n\n{end}{tail}", "utf-8")


def main() -> None:
    """Measure one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, or the name of an embedded model")
    parser.add_argument("--world", type=Path, default=Path("runs/world"))
    parser.add_argument("--split", default="test")
    parser.add_argument("--num-clips", type=int, default=200, help="only the first so many clips")
    parser.add_argument("--num-frames", type=int, default=None, help="default: the processor's")
    parser.add_argument("--window", type=int, nargs=3, default=None, help="T H W; default: the model's")
    parser.add_argument("--out", type=Path, default=None, help="JSON file; its table also goes to docs/look.md")
    args = parser.parse_args()

    chat = VideoChat.from_pretrained(args.model)
    targets = list(read_targets(args.world, args.split, args.num_clips))
    window = None if args.window is None else tuple(args.window)
    start = time.monotonic()
    numbers = pointing(chat, tqdm(targets, desc="questions"), num_frames=args.num_frames, window=window)
    results = {
        "model": str(args.model),
        "split": args.split,
        "num_frames": args.num_frames or chat.processor.num_frames,
        "window": window or chat.model.config.window,
        "seconds": time.monotonic() - start,
        "date": time.strftime("%Y-%m-%d"),
        "commit": git_commit(),
        "hardware": hardware(),
        **numbers,
    }
    print(table(results))
    print(f"{results['num_questions']} questions about {results['num_clips']} clips")
    if args.out is not None:
        write_results(args.out, results, ROOT / "docs" / "look.md")


if __name__ == "__main__":
    main()
