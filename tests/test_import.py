"""`import hicom` and `hicom --help` are quick and pull in nothing heavy; names load on first use."""

import json
import subprocess
import sys
import time

import pytest

import hicom

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


def test_reading_a_video_needs_no_torch() -> None:
    assert loaded_after("from hicom import read_frames, probe") & {"torch", "transformers"} == set()


def test_the_compressor_needs_no_transformers() -> None:
    assert "transformers" not in loaded_after("from hicom import HybridCompressor")


@pytest.mark.parametrize("code", ["hicom.HIComConfig", "hicom.register(); hicom.register()"])
def test_first_use_registers_the_auto_classes(code: str) -> None:
    lookup = "from transformers import AutoConfig; print(type(AutoConfig.for_model('hicom')).__name__)"
    assert python(f"import hicom; {code}; {lookup}") == "HIComConfig\n"


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'HicomModel'"):
        _ = hicom.HicomModel
