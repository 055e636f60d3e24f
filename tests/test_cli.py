"""The command line: answers, facts, and one clear line and exit code 2 for every wrong input."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import media
import tiny
from assembling import save_llm, save_pair
from hicom import cli
from hicom.video.decode import Video

QUESTION = "what object moves left ?"


@dataclass(frozen=True)
class Result:
    """What a command line did."""

    code: int
    out: str
    err: str

    def error(self) -> str:
        """Return the one-line error of a wrong input."""
        assert self.code == 2, self
        assert self.out == ""
        assert "Traceback" not in self.err
        *warnings, error = self.err.splitlines()
        assert all(line.startswith("hicom: warning: ") for line in warnings), self.err
        assert error.startswith("hicom: error: ")
        return error.removeprefix("hicom: error: ")

    def success(self) -> str:
        """Return what a command that worked wrote."""
        assert self.code == 0, self.err
        return self.out


Hicom = Callable[..., Result]


@pytest.fixture
def hicom(capfd: pytest.CaptureFixture[str]) -> Hicom:
    """Run a command line in this process."""

    def run(*args: object) -> Result:
        code = cli.main([str(arg) for arg in args])
        return Result(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny random model."""
    return tiny.save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def broken_model(model: Path, tmp_path: Path) -> Path:
    """Return a copy of the model, to be broken."""
    return shutil.copytree(model, tmp_path / "broken")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a video of 16 frames."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    media.write_video(path, 16)
    return path


# Asking


def test_ask_prints_the_answer_alone(hicom: Hicom, model: Path, clip: Path) -> None:
    result = hicom("ask", clip, QUESTION, "--model", model, "--max-new-tokens", 4)
    assert len(result.success().splitlines()) == 1
    assert result.err == ""


@pytest.mark.parametrize("command", ["ask", "ask --low-memory", "chat", "look"])
def test_a_video_is_looked_through_once(
    hicom: Hicom, model: Path, clip: Path, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[bool] = []
    load = Video._load
    monkeypatch.setattr(Video, "_load", lambda video, may_index: (loaded.append(may_index), load(video, may_index)))
    monkeypatch.setattr("sys.stdin", io.StringIO(QUESTION))
    name, *flags = command.split()
    question = [] if name == "chat" else [QUESTION]
    output = ["-o", tmp_path / "look.png"] if name == "look" else []
    hicom(name, clip, *question, *flags, *output, "--model", model, "--max-new-tokens", 4).success()
    assert loaded == [True]


def test_verbose_prints_facts_counts_and_times(hicom: Hicom, model: Path, clip: Path) -> None:
    out = hicom("ask", clip, QUESTION, "--model", model, "--verbose", "--max-new-tokens", 4).success()
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert "clip.mp4" in rows["video"]
    assert "96x64" in rows["video"]
    assert rows["question"] == QUESTION
    # 4 frames of 5x5 patches, windows of (2, 2, 2), 3 global tokens
    assert rows["tokens"].startswith("21 visual tokens in place of 100 (4.8 times fewer)")
    for part in ("decode", "vision encoder", "compressor", "LLM"):
        assert part in rows["seconds"]


def test_json_holds_the_same_and_nothing_else_is_printed(hicom: Hicom, model: Path, clip: Path) -> None:
    options = ["--model", model, "--max-new-tokens", 4]
    facts = json.loads(hicom("ask", clip, QUESTION, *options, "--json", "--num-frames", 8).success())
    assert facts["question"] == facts["instruction"] == QUESTION
    assert facts["num_frames"] == len(facts["timestamps_s"]) == 8
    assert (facts["num_visual_tokens"], facts["num_uncompressed_tokens"]) == (4 * 9 + 3, 200)
    assert facts["window"] == [2, 2, 2]
    assert facts["answer"] == hicom("ask", clip, QUESTION, *options, "--num-frames", 8).success().rstrip("\n")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--window", 4, 5, 5], {"num_visual_tokens": 4, "window": [4, 5, 5]}),
        (["--max-visual-tokens", 10], {"num_visual_tokens": 7}),
        (["--fps", 15], {"num_frames": 8}),
        (["--num-frames", 2, "--start-s", 0.2, "--end-s", 0.4], {"num_frames": 2}),
        (["--instruction", "red circle"], {"instruction": "red circle"}),
        (["--temperature", 0.7, "--top-p", 0.9], {"num_frames": 4}),
        (["--num-beams", 2, "--dtype", "float32", "--device", "cpu"], {"num_frames": 4}),
    ],
)
def test_options_reach_the_model(
    hicom: Hicom, model: Path, clip: Path, options: list[Any], expected: dict[str, Any]
) -> None:
    facts = json.loads(
        hicom("ask", clip, QUESTION, "--model", model, "--json", "--max-new-tokens", 4, *options).success()
    )
    assert {name: facts[name] for name in expected} == expected


def test_a_window_larger_than_the_clip_is_one_group(hicom: Hicom, model: Path, clip: Path) -> None:
    options = ["--model", model, "--max-new-tokens", 2, "--json", "--window", 99, 99, 99]
    assert json.loads(hicom("ask", clip, QUESTION, *options).success())["num_visual_tokens"] == 1 + 3


def test_chat_answers_line_by_line(
    hicom: Hicom, model: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "questions").write_text(f"{QUESTION}\n\nis there a dog ?\n")
    with (tmp_path / "questions").open() as questions:
        monkeypatch.setattr(sys, "stdin", questions)
        answers = hicom("chat", clip, "--model", model, "--max-new-tokens", 3).success().splitlines()
    assert len(answers) == 2
    assert answers[0] == hicom("ask", clip, QUESTION, "--model", model, "--max-new-tokens", 3).success().strip()


# Describing and converting


def test_info_describes_a_video(hicom: Hicom, clip: Path) -> None:
    facts = json.loads(hicom("info", clip, "--json").success())
    assert (facts["width"], facts["height"], facts["num_frames"]) == (96, 64, 16)
    out = hicom("info", clip).success()
    for fact in ("clip.mp4", "96x64", "16 frames", "h264"):
        assert fact in out


def test_info_describes_a_checkpoint(hicom: Hicom, model: Path) -> None:
    facts = json.loads(hicom("info", model, "--json").success())
    stored = load_file(model / "model.safetensors")
    assert sum(facts["parameters"].values()) == sum(tensor.numel() for tensor in stored.values())
    assert set(facts["parameters"]) == {
        "vision_tower",
        "instruction_encoder",
        "compressor",
        "language_model",
        "lm_head",
    }
    assert facts["visual_tokens"] == {"8": 39, "16": 75, "32": 147, "64": 291, "128": 579}
    assert (facts["dialect"], facts["window"], facts["num_global_tokens"]) == ("paper", [2, 2, 2], 3)
    out = hicom("info", model).success()
    for fact in ("compressor", "paper", "siglip_vision_model", "39 for 8"):
        assert fact in out


def test_info_describes_and_convert_converts_an_official_checkpoint(hicom: Hicom, tmp_path: Path) -> None:
    source = Path(__file__).parent / "golden" / "direct_coarse"
    facts = json.loads(hicom("info", source, "--json").success())
    assert (facts["layout"], facts["dialect"]) == ("official release", "release")
    assert (facts["local_injection"], facts["global_injection"]) == ("direct", "coarse")
    hicom("convert", source, tmp_path / "converted").success()
    converted = json.loads(hicom("info", tmp_path / "converted", "--json").success())
    assert converted["layout"] == "transformers"
    assert converted["parameters"] == facts["parameters"]
    assert "not empty" in hicom("convert", source, tmp_path / "converted").error()


@pytest.fixture
def parts(tmp_path: Path) -> list[object]:
    """Return the options that name a dual encoder and a language model."""
    towers = save_pair(tmp_path / "towers", "siglip"), save_llm(tmp_path / "llm", "qwen2")
    return ["--vision", towers[0], "--llm", towers[1], "--window", 2, 2, 2, "--num-global-tokens", 3]


def test_convert_assemble_writes_what_its_dry_run_says(hicom: Hicom, parts: list[object], tmp_path: Path) -> None:
    dry = json.loads(hicom("convert", "assemble", *parts, "--dry-run", "--num-frames", 4, "--json").success())
    table = hicom("convert", "assemble", *parts, "--dry-run", "--num-frames", 4).success()
    for fact in ("siglip_vision_model", "qwen2", "new", "21 in place of 100", "memory to ask"):
        assert fact in table
    assert not (tmp_path / "model").exists()
    args = ["--dst", tmp_path / "model", "--num-frames", 4, "--json"]
    made = json.loads(hicom("convert", "assemble", *parts, *args).success())
    assert made.pop("written") == str(tmp_path / "model")
    assert made == dry
    facts = json.loads(hicom("info", tmp_path / "model", "--json").success())
    assert facts["parameters"] == dry["parameters"]
    assert facts["num_bytes"] == pytest.approx(dry["num_bytes"], rel=0.2), "beside the weights stand their names"
    clip = media.write_video(tmp_path / "clip.mp4", 8)
    answer = hicom("ask", clip, "what ?", "--model", tmp_path / "model", "--max-new-tokens", 2, "--json").success()
    assert json.loads(answer)["num_visual_tokens"] == dry["num_visual_tokens"] == 21
    assert "not empty" in hicom("convert", "assemble", *parts, *args).error()


def test_convert_export_changes_the_precision(hicom: Hicom, tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny.save(source)
    (source / "domain.safetensors").write_bytes(b"what it was trained on")
    hicom("convert", "export", source, tmp_path / "small").success()
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "small"))
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert all(torch.equal(tensor, before[name].bfloat16()) for name, tensor in after.items())
    assert before.keys() == after.keys()
    assert (tmp_path / "small" / "domain.safetensors").read_bytes() == b"what it was trained on"
    assert "not empty" in hicom("convert", "export", source, tmp_path / "small").error()
    assert "no such model folder" in hicom("convert", "export", tmp_path / "gone", tmp_path / "b").error()


def test_convert_assemble_refuses_what_cannot_be(hicom: Hicom, parts: list[object], tmp_path: Path) -> None:
    assert "--dst DIR" in hicom("convert", "assemble", *parts).error()
    assert (
        "did you mean 'qformer'" in hicom("convert", "assemble", *parts, "--dry-run", "--compressor", "qforme").error()
    )
    assert "--num-frames 0" in hicom("convert", "assemble", *parts, "--dry-run", "--num-frames", 0).error()
    nothing = ["--vision", tmp_path / "nothing", "--llm", tmp_path / "llm", "--dst", tmp_path / "model"]
    assert f"there is no model in {tmp_path / 'nothing'}" in hicom("convert", "assemble", *nothing).error()
    assert not (tmp_path / "model").exists()


# Wrong usage


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["aks"], "unknown command 'aks'; did you mean 'ask'?"),
        (["clip.mp4", "what?"], "unknown command 'clip.mp4'; choose one of ask, chat, look, info, convert, train"),
        (["world", "mkae"], "unknown world command 'mkae'; did you mean 'make'?"),
        (["train", "no-such-recipe"], "unknown recipe 'no-such-recipe'; "),
    ],
)
def test_unknown_command_gets_a_suggestion(hicom: Hicom, args: list[str], message: str) -> None:
    assert message in hicom(*args).error()


@pytest.mark.parametrize(
    ("args", "suggestion"),
    [
        (["ask", "c.mp4", "what?", "--widnow", "4", "3", "3"], "--window"),
        (["ask", "c.mp4", "what?", "--num-frame", "4"], "--num-frames"),
        (["info", "c.mp4", "--jsn"], "--json"),
    ],
)
def test_unknown_option_gets_a_suggestion(hicom: Hicom, args: list[str], suggestion: str) -> None:
    result = hicom(*args)
    assert result.code == 2
    assert result.out == ""
    assert suggestion in result.err


@pytest.mark.parametrize("args", [["ask"], ["ask", "c.mp4"], ["ask", "c.mp4", "q", "--window", "4"], ["convert", "a"]])
def test_incomplete_command_line(hicom: Hicom, args: list[str]) -> None:
    result = hicom(*args)
    assert (result.code, result.out) == (2, "")


def test_help_lists_every_command(hicom: Hicom) -> None:
    out = hicom("--help").success()
    assert all(f"\n  {name} " in out for name in cli.COMMANDS)
    assert hicom().success() == out


@pytest.mark.parametrize("name", ["ask", "chat", "look", "info", "convert", "train", "world"])
def test_every_command_has_help(hicom: Hicom, name: str) -> None:
    assert f"usage: hicom {name}" in hicom(name, "--help").success()


# The sprite world

NONE = [f"--{split}=0" for split in ("train", "val", "test", "test-pairs", "test-scenes", "test-long")]
SMALL = ["--width", 64, "--height", 48]


def test_world_make_writes_a_data_set(hicom: Hicom, tmp_path: Path) -> None:
    options = [*NONE[3:], *SMALL, "--train", 2, "--val", 1, "--test", 1, "--seed", 3, "--masks", "--num-workers", 1]
    out = hicom("world", "make", tmp_path / "w", *options, "--families", "presence", "colour").success()
    assert out == f"{tmp_path / 'w'}\n"
    settings = json.loads((tmp_path / "w" / "world.json").read_text())["settings"]
    assert settings["num_clips"] == {"train": 2, "val": 1, "test": 1}
    assert settings["masks"]
    assert settings["world"]["seed"] == 3
    assert settings["world"]["families"] == ["presence", "colour"]
    assert (settings["world"]["config"]["width"], settings["world"]["config"]["height"]) == (64, 48)
    for file in ("train/tune.jsonl", "test/choice.jsonl", "val/masks.jsonl", "train/videos/000001.mp4"):
        assert (tmp_path / "w" / file).is_file()
    info = json.loads(hicom("info", tmp_path / "w/train/videos/000000.mp4", "--json").success())
    assert (info["width"], info["height"], info["num_frames"]) == (64, 48, 16)
    # Again with other settings.
    error = hicom("world", "make", tmp_path / "w", *options).error()
    assert "holds a data set with other settings (world)" in error


def test_world_preview_draws_a_sheet_or_a_clip(hicom: Hicom, tmp_path: Path) -> None:
    options = ["--num-clips", 2, "--split", "test_pairs", "--index", 5, "--fps", 12]
    assert hicom("world", "preview", tmp_path / "a.png", *options).success() == f"{tmp_path / 'a.png'}\n"
    hicom("world", "preview", tmp_path / "a.mp4", *options, *SMALL).success()
    info = json.loads(hicom("info", tmp_path / "a.mp4", "--json").success())
    assert info["num_frames"] == 24
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "a.mp4"}


@pytest.mark.parametrize("command", ["make", "preview"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fps", 0], "fps=0.0 must be above 0"),
        (["--fps", -3], "fps=-3.0"),
        (["--duration-s", 0], "duration_s=0.0 must be above 0"),
        (["--duration-s", 9999], "30 minutes"),
        (["--width", 0], "width=0 must be an even number"),
        (["--seed", -1], "seed=-1 must not be negative"),
        (["--sprites", "no-such-folder"], "there is no folder no-such-folder with sprite images"),
        (["--families", "which", "wich"], "unknown question families wich: choose some of which, direction, presence"),
        (["--families"], "no question families are given: choose some of which"),
    ],
)
def test_impossible_worlds(hicom: Hicom, tmp_path: Path, command: str, options: list[Any], message: str) -> None:
    out = tmp_path / ("out.png" if command == "preview" else "out")
    assert message in hicom("world", command, out, *options).error()
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "message"), [(None, "holds 0 usable images"), (b"no png", "no usable sprite image")]
)
def test_unusable_sprites(hicom: Hicom, tmp_path: Path, content: bytes | None, message: str) -> None:
    folder = tmp_path / "sprites"
    folder.mkdir()
    if content:
        (folder / "dog.png").write_bytes(content)
    error = hicom("world", "make", tmp_path / "out", "--sprites", folder).error()
    assert message in error
    assert "sprites" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--val", -1], "-1 clips of split val: the number must not be negative"),
        (NONE, "no clips are asked for"),
        (["--num-workers", 0], "num_workers=0 must be at least 1"),
    ],
)
def test_wrong_numbers_of_clips(hicom: Hicom, tmp_path: Path, options: list[Any], message: str) -> None:
    assert message in hicom("world", "make", tmp_path / "out", *options).error()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.gif", [], "the suffix '.gif' is none of .png and .mp4"),
        ("none/a.png", [], "there is no folder"),
        ("a.png", ["--num-clips", 0], "num_clips=0"),
        ("a.png", ["--index", -1], "index=-1"),
        ("a.png", ["--split", "dev"], "unknown split 'dev': choose one of train, val"),
    ],
)
def test_wrong_previews(hicom: Hicom, tmp_path: Path, name: str, options: list[Any], message: str) -> None:
    assert message in hicom("world", "preview", tmp_path / name, *options).error()


def test_the_world_group_lists_its_commands(hicom: Hicom) -> None:
    out = hicom("world").success()
    assert "\n  make " in out
    assert "\n  preview " in out
    for name in ("make", "preview"):
        assert f"usage: hicom world {name}" in hicom("world", name, "--help").success()


# Wrong videos


def text_file(folder: Path) -> Path:
    path = folder / "text.mp4"
    path.write_text("this is not a video\n" * 50)
    return path


def empty_file(folder: Path) -> Path:
    path = folder / "empty.mp4"
    path.touch()
    return path


def folder_without_frames(folder: Path) -> Path:
    path = folder / "frames"
    path.mkdir()
    (path / "notes.txt").write_text("no pictures here")
    return path


WRONG_VIDEOS: dict[str, Callable[[Path], Path]] = {
    "missing": lambda folder: folder / "missing.mp4",
    "text": text_file,
    "empty": empty_file,
    "no frames": folder_without_frames,
    "audio only": lambda folder: media.write_audio(folder / "audio.m4a"),
}


@pytest.mark.parametrize("command", ["ask", "chat", "info"])
@pytest.mark.parametrize("kind", WRONG_VIDEOS)
def test_wrong_video(hicom: Hicom, model: Path, tmp_path: Path, command: str, kind: str) -> None:
    path = WRONG_VIDEOS[kind](tmp_path)
    options = {"ask": [QUESTION, "--model", model], "chat": ["--model", model], "info": []}[command]
    assert path.name in hicom(command, path, *options).error()


def test_truncated_video_is_used_as_far_as_it_goes(hicom: Hicom, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.mp4"
    # The index in front, as in a download that broke off.
    media.write_video(path, 64, width=320, height=240, muxer_options={"movflags": "faststart"})
    media.truncate(path, 0.7)
    result = hicom("ask", path, QUESTION, "--model", model, "--max-new-tokens", 2)
    result.success()
    (warning,) = result.err.splitlines()
    assert warning.startswith("hicom: warning: ")
    assert "cut.mp4" in warning


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-frames", 0], "num_frames=0"),
        (["--num-frames", -3], "num_frames=-3"),
        (["--fps", 0], "fps=0"),
        (["--start-s", 5], "start_s=5"),
        (["--num-frames", 4, "--fps", 2], "fps"),
        (["--window", 0, 3, 3], "window=(0, 3, 3)"),
        (["--window", 2, 2, 2, "--max-visual-tokens", 50], "max_visual_tokens"),
        (["--max-visual-tokens", 2], "max_visual_tokens=2"),
        (["--max-new-tokens", 0], "max_new_tokens"),
        (["--temperature", -1], "temperature"),
        (["--instruction", " "], "instruction is empty"),
        (["--device", "warp"], "warp"),
    ],
)
def test_wrong_number(hicom: Hicom, model: Path, clip: Path, options: list[Any], message: str) -> None:
    assert message in hicom("ask", clip, QUESTION, "--model", model, *options).error()


@pytest.mark.parametrize("question", ["", "  \n"])
def test_empty_question(hicom: Hicom, model: Path, clip: Path, question: str) -> None:
    assert "question is empty" in hicom("ask", clip, question, "--model", model).error()


def test_a_question_too_long_for_the_instruction_encoder_is_cut_with_a_warning(
    hicom: Hicom, model: Path, clip: Path
) -> None:
    result = hicom("ask", clip, "what object moves left " * 9, "--model", model, "--max-new-tokens", 2)
    result.success()
    (warning,) = result.err.splitlines()
    assert warning.startswith("hicom: warning: the instruction has 36 tokens, the instruction encoder takes 12")


# Wrong models


@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors", "processor_config.json", "tokenizer_config.json", "tokenizer.json"]
)
def test_model_folder_without_a_file(hicom: Hicom, broken_model: Path, clip: Path, file: str) -> None:
    (broken_model / file).unlink()
    assert (
        file.removesuffix("_config.json").removesuffix(".json")
        in hicom("ask", clip, QUESTION, "--model", broken_model).error()
    )


def test_no_such_model(hicom: Hicom, clip: Path, tmp_path: Path) -> None:
    assert "no-model" in hicom("ask", clip, QUESTION, "--model", tmp_path / "no-model").error()
    assert "hicom-tnyi" in hicom("ask", clip, QUESTION, "--model", "hicom-tnyi").error()


def test_wrong_tensors_are_all_named(hicom: Hicom, broken_model: Path, clip: Path) -> None:
    file = broken_model / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("model.compressor.global_.query")
    tensors["model.compressor.extra"] = torch.zeros(2)
    tensors["model.vision_tower.head.probe"] = torch.zeros(1, 1, 7)
    save_file(tensors, file, metadata={"format": "pt"})
    error = hicom("ask", clip, QUESTION, "--model", broken_model).error()
    for name in ("model.compressor.global_.query", "model.compressor.extra", "model.vision_tower.head.probe"):
        assert name in error


def test_pickled_weights_are_refused(hicom: Hicom, broken_model: Path, clip: Path) -> None:
    torch.save(load_file(broken_model / "model.safetensors"), broken_model / "pytorch_model.bin")
    (broken_model / "model.safetensors").unlink()
    assert "pickle" in hicom("ask", clip, QUESTION, "--model", broken_model).error()


def test_broken_weights(hicom: Hicom, broken_model: Path, clip: Path) -> None:
    media.truncate(broken_model / "model.safetensors", 0.5)
    assert "model.safetensors" in hicom("ask", clip, QUESTION, "--model", broken_model).error()


def test_misspelt_configuration_key(hicom: Hicom, broken_model: Path, clip: Path) -> None:
    config = json.loads((broken_model / "config.json").read_text())
    (broken_model / "config.json").write_text(json.dumps(config | {"num_global_token": 3}))
    for args in (["ask", clip, QUESTION, "--model", broken_model], ["info", broken_model]):
        assert "did you mean 'num_global_tokens'?" in hicom(*args).error()


def test_wrong_value_in_the_configuration(hicom: Hicom, broken_model: Path, clip: Path) -> None:
    config = json.loads((broken_model / "config.json").read_text())
    (broken_model / "config.json").write_text(json.dumps(config | {"dialect": "papyrus"}))
    assert "dialect" in hicom("ask", clip, QUESTION, "--model", broken_model).error()


# How errors come out


def test_debug_shows_the_traceback(hicom: Hicom) -> None:
    result = hicom("info", "missing.mp4", "--debug")
    assert result.code == 2
    assert result.err.startswith("Traceback")
    assert result.err.splitlines()[-1].startswith("hicom: error: ")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyError("x"), 1, "hicom: error: unexpected KeyError: 'x' (--debug shows where)\n"),
        (ValueError("two\nlines"), 2, "hicom: error: two lines\n"),
        (
            FileNotFoundError(2, "No such file or directory", "a.mp4"),
            2,
            "hicom: error: a.mp4: No such file or directory\n",
        ),
        (ModuleNotFoundError("No module named 'peft'", name="peft"), 2, "hicom: error: this needs the package 'peft'"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes(hicom: Hicom, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str) -> None:
    def fail(path: str, /) -> None:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "info", fail)
    result = hicom("info", "a")
    assert result.code == code
    assert result.err.startswith(line)
    assert len(result.err.splitlines()) == bool(line)


# As a process

COMMAND = [sys.executable, "-m", "hicom"]


def test_process_exit_code_and_streams() -> None:
    result = subprocess.run([*COMMAND, "info", "missing.mp4"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("hicom: error: missing.mp4")


def test_a_reader_that_goes_away_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run([*COMMAND, "--help"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert result.stderr == ""
    assert result.returncode == 141


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": tiny.VOCABULARY}
NOT_NAMED = "and that is not called embed_tokens"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4}, NOT_NAMED),
        ({"model_type": "opt", **SIZES, "word_embed_proj_dim": 32}, NOT_NAMED),
        ({"model_type": "falcon", **SIZES}, NOT_NAMED),
        ({"model_type": "bloom", **SIZES}, NOT_NAMED),
        ({"model_type": "mamba", **SIZES}, NOT_NAMED),
        ({"model_type": "phi", **SIZES}, "does not end in a plain output matrix"),
        ({"model_type": "bart", "d_model": 32, "decoder_layers": 1}, "no decoder that AutoModel loads alone"),
        ({"model_type": "t5"}, "a language model (text only, a decoder) is expected"),
        ({"model_type": "gemma3"}, "a language model (text only, a decoder) is expected"),
        (
            {"model_type": "gemma4_text", **SIZES, "head_dim": 8, "hidden_size_per_layer_input": 8},
            "does not run from embeddings alone",
        ),
        ({"model_type": "qwen2", **SIZES, "quantization_config": {"quant_method": "awq", "bits": 4}}, "are quantised"),
        ({"model_type": "made_up", "auto_map": {"AutoConfig": "code.MadeUp"}}, "there is no model in"),
    ],
    ids=lambda value: value.get("model_type") if isinstance(value, dict) else "",
)
def test_convert_assemble_refuses_language_models_before_it_reads_weights(
    hicom: Hicom, parts: list[object], tmp_path: Path, config: dict[str, object], reason: str
) -> None:
    """There are no weights here at all; nothing is written, and no error is unexpected."""
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    (tmp_path / "llm" / "config.json").write_text(json.dumps(config))
    error = hicom("convert", "assemble", *parts, "--dst", tmp_path / "model").error()
    assert reason in error
    assert "unexpected" not in error
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("tower", "reason"),
    [
        ({"model_type": "timm_wrapper", "architecture": "vit_base_patch16_224"}, "take the towers from"),
        ({"model_type": "dinov2"}, "vision towers come from SigLIP, SigLIP2 and CLIP"),
        ({"vision_use_head": False}, "no attention-pool head"),
    ],
    ids=["timm", "dinov2", "headless"],
)
def test_convert_assemble_refuses_towers_before_it_reads_weights(
    hicom: Hicom, parts: list[object], tmp_path: Path, tower: dict[str, object], reason: str
) -> None:
    path = tmp_path / "towers" / "config.json"
    if "vision_use_head" in tower:
        config = json.loads(path.read_text())
        config["vision_config"] |= tower
        tower = config
    path.write_text(json.dumps(tower))
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    for options in (["--dst", tmp_path / "model"], ["--dry-run"]):
        assert reason in hicom("convert", "assemble", *parts, *options).error()
    assert not (tmp_path / "model").exists()
    weightless = hicom("convert", "assemble", *parts[2:], "--vision", "hicom-tiny", "--dst", tmp_path / "model").error()
    assert "the weights in" in weightless
    assert "model.safetensors missing" in weightless
