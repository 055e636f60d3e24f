"""Imports go one way: a module may import modules of a lower level and its own part, nothing else."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hicom

LEVELS = {
    "fetch": -1,
    "pyav": -1,
    "square": -1,
    "files": -1,
    "processes": 0,
    "video": 0,
    "locks": -2,
    "optim": 0,
    "provenance": 0,
    "tables": 0,
    "endpoint": 0,
    "model.ops": 0,
    "model": 1,
    "data": 2,
    "world": 2,
    "drop_in": 2,
    "encoding": 3,
    "inference": 4,
    "look": 5,
    "bench": 5,
    "train": 6,
    "eval": 6,
    "serve": 6,
    "recipes": 7,
    "cli": 8,
    "__main__": 9,
}
# train, eval and serve are on one level, so that they cannot import each other; beyond the levels:
FORBIDDEN = {("train", "world"): "recipes tie the world and training together"}
# The compressor is usable without transformers.
PLAIN_TORCH = {"model.ops", "model.options", "model.compressor", "model.baselines", "optim"}
# The package itself imports nothing when it is imported; its lazy names may only be used from outside.
LIGHT_NAMES = {"__version__"}


def part_of(module: str) -> str:
    """Return the entry of `LEVELS` that `module` (without `hicom.`) belongs to."""
    for part in sorted(LEVELS, key=len, reverse=True):
        if module == part or module.startswith(f"{part}."):
            return part
    raise AssertionError(f"hicom.{module} has no level; give it one in tests/test_layers.py")


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Yield the full name of everything a module imports, at any depth; relative imports start from `package`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def violations(root: Path) -> list[str]:
    """Return every import under the package folder `root` that breaks a rule."""
    found = []
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root).with_suffix("").parts
        module = ".".join(path[:-1] if path[-1] == "__init__" else path)
        if not module:
            continue  # hicom/__init__.py: the lazy names of every part
        package = ".".join(["hicom", *(path[:-1])])
        part = part_of(module)
        for name in imports(ast.parse(file.read_text(encoding="utf-8")), package):
            top, _, target = name.partition(".")
            if top != "hicom":
                if module in PLAIN_TORCH and top not in {"torch", "einops"} and top not in sys.stdlib_module_names:
                    found.append(f"{module} imports {top}; it may import torch and einops only")
            elif not target or target.partition(".")[0] not in {each.partition(".")[0] for each in LEVELS}:
                if target not in LIGHT_NAMES:
                    found.append(f"{module} imports {name}; inside the package import from the module itself")
            else:
                other = part_of(target)
                if other != part and LEVELS[other] >= LEVELS[part]:
                    found.append(f"{module} imports {target}, which is not below it")
                elif (part, other) in FORBIDDEN:
                    found.append(f"{module} imports {target}; {FORBIDDEN[part, other]}")
    return found


def test_imports_go_one_way() -> None:
    assert violations(Path(hicom.__file__).parent) == []


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("model/modeling.py", "from hicom.inference import VideoChat", "model.modeling imports inference.VideoChat"),
        ("model/ops.py", "from .compressor import mlp", "model.ops imports model.compressor.mlp"),
        ("model/compressor.py", "import transformers", "model.compressor imports transformers"),
        ("model/baselines.py", "def f():\n    import numpy", "model.baselines imports numpy"),
        ("video.py", "from . import model", "video imports model"),
        ("train/run.py", "from ..eval.tasks import TASKS", "train.run imports eval.tasks.TASKS"),
        ("train/run.py", "from hicom import world", "train.run imports world; recipes tie"),
        ("eval/__init__.py", "import hicom.serve", "eval imports serve"),
        ("inference.py", "from hicom import HIComModel", "inference imports hicom.HIComModel; inside the package"),
        ("inference.py", "import hicom", "inference imports hicom; inside the package"),
        ("recipes.py", "if True:\n    from .cli import main", "recipes imports cli.main"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, source: str, message: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(source)
    (found,) = violations(tmp_path)
    assert message in found


def test_right_imports_are_accepted(tmp_path: Path) -> None:
    files = {
        "__init__.py": "from hicom.cli import main",
        "model/__init__.py": "from .modeling import A",
        "model/compressor.py": "import math\nimport torch\nfrom einops import rearrange\nfrom .ops import num_groups",
        "model/modeling.py": "import transformers\nfrom .compressor import B\nfrom ..video import probe",
        "train/run.py": "from hicom import __version__\nfrom hicom.data.collate import C\nfrom . import stages",
        "recipes.py": "from hicom import train, world",
    }
    for file, source in files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(source)
    assert violations(tmp_path) == []


def test_a_new_module_needs_a_level(tmp_path: Path) -> None:
    (tmp_path / "utils.py").write_text("")
    with pytest.raises(AssertionError, match=r"hicom\.utils has no level"):
        violations(tmp_path)
