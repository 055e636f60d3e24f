"""The package: whole when installed, quick to import, nothing heavy until a name is used."""

import json
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from transformers import AutoConfig

import hicom

ROOT = Path(__file__).parent.parent
HEAVY = (
    "torch",
    "transformers",
    "av",
    "numpy",
    "PIL",
    "rich",
    "tyro",
    "safetensors",
    "einops",
    "gradio",
    "vllm",
    "datasets",
)


def python(code: str) -> str:
    """Return what `code` prints in a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def loaded_after(code: str) -> set[str]:
    """Return the heavy packages that are loaded after `code` in a fresh interpreter."""
    return set(
        json.loads(python(f"{code}\nimport json, sys\nprint(json.dumps([m for m in {HEAVY} if m in sys.modules]))"))
    )


def test_import_loads_nothing_heavy() -> None:
    assert loaded_after("import hicom; dir(hicom); hicom.__version__") == set()


def test_import_takes_under_300_ms() -> None:
    code = "import time; start = time.perf_counter(); import hicom; print(time.perf_counter() - start)"
    assert min(float(python(code)) for _ in range(3)) < 0.3


def test_help_takes_under_600_ms_and_loads_no_torch() -> None:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        out = python("import sys, hicom.cli; hicom.cli.main(['--help']); print('torch' in sys.modules)")
        times.append(time.perf_counter() - start)
        assert out.endswith("False\n")
    assert min(times) < 0.6


def test_what_a_command_imports_is_kept_out_of_garbage_collection() -> None:
    code = "import gc; from hicom.cli import PlaceOptions; PlaceOptions().load('hicom-tiny')"
    count, is_enabled = python(f"{code}; print(gc.get_freeze_count(), gc.isenabled())").split()[-2:]
    assert int(count) > 100_000
    assert is_enabled == "True"


def test_reading_a_video_needs_no_torch() -> None:
    assert loaded_after("from hicom import read_frames, probe") & {"torch", "transformers"} == set()


def test_the_compressor_needs_no_transformers() -> None:
    assert "transformers" not in loaded_after("from hicom import HybridCompressor")


def test_first_use_registers_the_auto_classes() -> None:
    lookup = "from transformers import AutoConfig; print(type(AutoConfig.for_model('hicom')).__name__)"
    assert python(f"import hicom; hicom.HIComConfig; {lookup}") == "HIComConfig\n"


def test_register_may_be_called_again() -> None:
    hicom.register()
    hicom.register()
    assert isinstance(AutoConfig.for_model("hicom"), hicom.HIComConfig)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'HicomModel'"):
        _ = hicom.HicomModel


@pytest.mark.slow
def test_the_wheel_holds_every_file(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "src" / "hicom", tmp_path / "src" / "hicom", ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "."], cwd=tmp_path, check=True)
    (wheel,) = (tmp_path / "dist").glob("hicom-*.whl")
    files = {str(path.relative_to(tmp_path / "src")) for path in tmp_path.rglob("src/hicom/**/*") if path.is_file()}
    assert {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("hicom/")} == files
