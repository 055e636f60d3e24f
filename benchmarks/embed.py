"""Ship trained models inside the package.

`python benchmarks/embed.py model --model runs/tiny/options/model --results FILE` copies the model to
`src/hicom/assets/hicom-tiny/`, renders the demo clip from a seed that no split of the training world uses, and puts the
measured results, the runs and their curves into `docs/hicom-tiny.md` and the model card.

`python benchmarks/embed.py domain` measures anew what the embedded model's training videos look like
(`hicom.data.domain`), on clips of the training world that it renders, where the run that trained it is gone.

`python benchmarks/embed.py start` puts towers and language model, before anything was compressed, into
`src/hicom/assets/hicom-tiny-start/`: what the three stages start from.
"""

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator
from math import prod
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import tyro
from plots import loss_curves
from torch import Tensor
from world_accuracy import table

from hicom import VideoChat
from hicom.data.domain import FILE, fit_domain
from hicom.model.convert import tensor_shapes
from hicom.provenance import short_commit
from hicom.recipes.tiny import ABOUT, tiny_parts
from hicom.train.assemble import assemble
from hicom.video import write_video
from hicom.world.questions import FAMILIES
from hicom.world.render import iter_frames
from hicom.world.scenes import WorldConfig, clip_seed, make_scene

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "src" / "hicom" / "assets"
# Training, validation and test clips come from seed 0.
DEMO_SEED, DEMO_INDEX = 1, 14
KINDS = {"tune": "open", "choice": "with options", "wording": "open, in wordings that training never uses"}
CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: video-text-to-text
---
# hicom-tiny

A {parameters:,}-parameter video question answering model with the compressor of HICom (CVPR 2025), trained from
nothing on procedural clips of moving sprites. It exists so that everything in this package runs on a real trained
model, offline; it knows its own small world and nothing else. Commands, data, compute, results and limits:
`docs/hicom-tiny.md`.

{results}

The sprites come from Noto Color Emoji (OFL-1.1, see `../sprites/OFL.txt`).
"""

START_CARD = """---
license: apache-2.0
library_name: transformers
---
# hicom-tiny-start

What the three stages of `hicom-tiny` start from: a dual encoder that names what single frames show, and a language
model that has read of scenes told in words, in half precision. The compressor between them is untrained, so its answers
mean nothing. With it, the stages run without the hour that made it: `hicom train tiny-align --parts.towers
hicom-tiny-start --parts.language-model hicom-tiny-start`. How it was made: `docs/training.md`.

{towers}

Language model: {reader_steps} steps of {reader_batch} stories with all their questions, in {reader_minutes:.0f}
minutes (CPU threads: {reader_threads}). Right answers about unseen stories, mean over families: {open:.2f} to open
questions, {choice:.2f} to questions with options.

The sprites come from Noto Color Emoji (OFL-1.1, see `../sprites/OFL.txt`).
"""
COUNTS = {
    "naming": "num_patches",
    "pointing": "num_objects",
    "retrieval": "num_single",
    "marks": "num_marks",
    "neighbour_pointing": "num_neighbours",
    "asked": "num_asked",
}


def results_text(results: dict[str, Any]) -> str:
    """Return the measured results as Markdown."""
    hardware = results["hardware"]
    return "\n".join(
        [
            f"Greedy answers on the {results['split']} split, {results['num_frames']} frames a clip, window "
            f"{tuple(results['window'])}: {results['visual_tokens']} visual tokens in place of "
            f"{results['uncompressed_tokens']}.",
            "",
            table(results),
            "",
            f"{results['date']}, {hardware['machine']}, {hardware['threads']} CPU threads, commit "
            f"{short_commit(results['commit'])}, {results['seconds_per_question'] * 1000:.0f} ms a question in batches "
            "of 100 from kept features.",
        ]
    )


def splits_text(results: dict[str, Any]) -> str:
    """Return the mean over families of every split and file that was measured, as a Markdown table."""
    rows = [
        "| split | questions | n | mean accuracy | text only | chance | informed |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in ({**results, "others": ()}, *results.get("others", ())):
        mean = each["families"]["mean"]
        numbers = " | ".join(
            f"{mean[key]:.3f}" if key in mean else "" for key in ("accuracy", "text_only", "chance", "informed_chance")
        )
        rows.append(f"| {each['split']} | {KINDS[each['file']]} | {mean['n']} | {numbers} |")
    return "\n".join(rows)


def runs_text(stages: list[dict[str, Any]]) -> str:
    """Return what every stage was and took, from the `run.json` of each, as a Markdown table."""
    rows = ["| stage | learns from | steps x batch | minutes | mean loss |", "|---|---|---|---|---|"]
    for stage in stages:
        of = stage["configuration"]
        records = ", ".join(Path(name).stem for name in of["data"]["records"])
        rows.append(
            f"| `{of['name']}` | {stage['samples']:,} records ({records}) | {of['steps']} x "
            f"{of['batch_size'] * of['accumulate'] * stage['hardware']['processes']} | "
            f"{stage['wall_s'] / 60:.0f} | {stage['loss']:.2f} |"
        )
    hardware, commits = stages[-1]["hardware"], sorted({str(stage["commit"])[:12] for stage in stages})
    where = f"{hardware['machine']}, {hardware['threads']} CPU threads, commit {', '.join(commits)}"
    return "\n".join([*rows, "", f"{stages[-1]['started'][:10]}, {where}."])


def put_between(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->` in a page."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    head, found, rest = path.read_text("utf-8").partition(start)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{path}: the markers {start.strip()} and {end} are missing")
    path.write_text(f"{head}{start}\n{text}\n\n{end}{tail}", "utf-8")


def frames_text(root: Path, card: str) -> str:
    """Return how the dual encoder learned beside frames: from its `run.json`, or else from the card of the last one."""
    path = root / "frames" / "run.json"
    if not path.exists():
        return card.partition("\nDual encoder: ")[2].partition(" minutes")[0] + " minutes"
    run = json.loads(path.read_text("utf-8"))
    return f"{run['config']['steps']} steps in {run['seconds'] / 60:.0f} minutes"


def towers_text(frames: str, run: dict[str, Any]) -> str:
    """Return how the dual encoder learned and what it can do, from the `run.json` of its text tower's lesson."""
    rows = ["| measure | value | n |", "|---|---|---|"]
    for name, value in run["metrics"].items():
        if name not in COUNTS.values():
            rows.append(f"| {name} | {value:.3f} | {run['metrics'].get(COUNTS.get(name, ''), '')} |")
    lesson = f"{run['config']['steps']} steps of its text tower alone in {run['seconds'] / 60:.0f} minutes"
    begin = (
        f"Dual encoder: {frames} beside frames, then {lesson} (CPU threads: {run['threads']}); on decoded validation"
    )
    return "\n".join([begin, "clips, and on texts:", "", *rows])


def embed_start(root: str = "runs", *, keep_towers: bool = False) -> None:
    """Put towers and language model together and write them in half precision, with a card.

    Args:
        root: folder of the towers and of the language model that reads.
        keep_towers: keep the towers that are embedded already; only the language model is new.
    """
    target = ASSETS / "hicom-tiny-start"
    parts = tiny_parts(root)
    last = (target / "README.md").read_text("utf-8")
    if keep_towers:
        towers = "Dual encoder:" + last.partition("\nDual encoder:")[2].partition("\n\nLanguage model:")[0]
        parts = dataclasses.replace(parts, towers=str(target))
    else:
        run = json.loads((Path(root) / "towers" / "run.json").read_text("utf-8"))
        towers = towers_text(frames_text(Path(root), last), run)
    torch.manual_seed(0)  # of the untrained compressor
    model, processor = assemble(parts)
    reader = json.loads((Path(root) / "reader" / "run.json").read_text("utf-8"))
    shutil.rmtree(target, ignore_errors=True)
    model.to(torch.float16).save_pretrained(target)
    processor.save_pretrained(target)
    card = START_CARD.format(
        towers=towers,
        reader_steps=reader["config"]["steps"],
        reader_batch=reader["config"]["batch"],
        reader_minutes=reader["seconds"] / 60,
        reader_threads=reader["threads"],
        open=mean(value for name, value in reader["metrics"].items() if name in FAMILIES),
        choice=mean(value for name, value in reader["metrics"].items() if name.endswith(", choice")),
    )
    (target / "README.md").write_text(card, "utf-8")
    for file in target.glob("*.safetensors"):
        file.chmod(0o644)


def embed_model(model: Path, results: Path, others: tuple[Path, ...] = ()) -> None:
    """Copy the model, render the demo clip, write the results.

    Args:
        model: folder of the trained model with its processor, in the run folder of its last stage.
        results: what `world_accuracy.py --out` wrote of it.
        others: further results, at other windows, for the table of budgets.
    """
    target = ASSETS / "hicom-tiny"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(
        model, target, ignore=shutil.ignore_patterns("*.bin", "*.pt", "*.pth", "complete", "trainer_state.json")
    )
    stages = [json.loads(path.read_text("utf-8")) for path in model.parents[1].glob("*/run.json")]
    stages.sort(key=lambda stage: stage["started"])
    logs = {name: model.parents[1] / name / "log.json" for name in (stage["configuration"]["name"] for stage in stages)}
    curves = loss_curves({name: json.loads(path.read_text("utf-8")) for name, path in logs.items()})
    (ROOT / "docs" / "results" / "hicom-tiny-curves.svg").write_text(curves, "utf-8")
    put_between(ROOT / "docs" / "hicom-tiny.md", "runs", runs_text(stages))
    measured = json.loads(results.read_text("utf-8"))
    text = results_text(measured)
    put_between(ROOT / "docs" / "hicom-tiny.md", "results", text)
    put_between(ROOT / "docs" / "hicom-tiny.md", "splits", splits_text(measured))
    rows = ["| window | visual tokens | times fewer | mean accuracy |", "|---|---|---|---|"]
    for path in (results, *others):
        each = json.loads(path.read_text("utf-8"))
        ratio = each["uncompressed_tokens"] / each["visual_tokens"]
        mean = each["families"]["mean"]["accuracy"]
        rows.append(f"| {tuple(each['window'])} | {each['visual_tokens']} | {ratio:.1f} | {mean:.3f} |")
    put_between(ROOT / "docs" / "hicom-tiny.md", "budgets", "\n".join(rows))
    parameters = sum(prod(shape) for shape in tensor_shapes(target).values())
    (target / "README.md").write_text(CARD.format(parameters=parameters, results=text), "utf-8")
    for file in target.glob("*.safetensors"):
        file.chmod(0o644)
    config = WorldConfig(width=256, height=256, fps=16, duration_s=3)
    scene = make_scene(clip_seed(DEMO_SEED, "test", DEMO_INDEX), config)
    write_video(ASSETS / "demo.mp4", iter_frames(scene, config), fps=config.fps)


def embed_domain(num_clips: int = 2000) -> None:
    """Measure the domain of the embedded model on clips of its training world, decoded from files as in training.

    Args:
        num_clips: how many.
    """
    chat = VideoChat.from_pretrained("hicom-tiny")
    config = WorldConfig()

    def features(folder: Path) -> Iterator[Tensor]:
        for index in range(num_clips):
            scene = make_scene(clip_seed(0, "train", index), config)
            write_video(folder / "clip.mp4", iter_frames(scene, config), fps=config.fps)
            yield chat.encode(folder / "clip.mp4").kept_features.values

    with tempfile.TemporaryDirectory() as folder:
        fit_domain(features(Path(folder)), ABOUT).save(ASSETS / "hicom-tiny")
    (ASSETS / "hicom-tiny" / FILE).chmod(0o644)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"model": embed_model, "start": embed_start, "domain": embed_domain})
