"""What vLLM loads: never in the way of other models, and one clear line where ours cannot be served."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

import hicom
from hicom import cli
from hicom.model.config import HIComConfig
from hicom.serve import vllm_plugin
from hicom.serve.vllm_plugin import feature_bytes, moved_interface, trusts_media_ids

FOLDER = Path(hicom.__file__).parent / "assets" / "hicom-tiny"


@pytest.fixture
def vllm(tmp_path: Path) -> Path:
    """Return a package with the names of vLLM that ours use, and nothing behind them."""
    root = tmp_path / "site" / "vllm"
    needed = vllm_plugin._needed()
    packages = {module.rpartition(".")[0] for module in needed} - {""}
    for module in {*needed, *packages}:
        place = root.joinpath(*module.split(".")[1:])
        is_package = any(other.startswith(f"{module}.") for other in needed)
        file = place / "__init__.py" if is_package else place.with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"class {name}: ...\n" for name in sorted(needed.get(module, ()))), "utf-8")
    return root


def test_all_names_are_found(vllm: Path) -> None:
    assert moved_interface(vllm) is None
    assert sum(map(len, vllm_plugin._needed().values())) > 20, "so this checks little"


@pytest.mark.parametrize(
    ("file", "name", "told"),
    [
        ("multimodal/processing/__init__.py", "PromptReplacement", "vllm.multimodal.processing has no"),
        ("multimodal/processing/processor.py", "_call_hf_processor", "vllm.multimodal.processing.processor has no"),
        ("multimodal/video.py", "VIDEO_LOADER_REGISTRY", "vllm.multimodal.video has no"),
    ],
)
def test_a_moved_name_is_told(file: str, name: str, told: str, vllm: Path) -> None:
    text = (vllm / file).read_text("utf-8")
    assert f"class {name}:" in text
    # To be mentioned is not to be there.
    (vllm / file).write_text(text.replace(f"class {name}:", f"# {name}\nclass Other:"), "utf-8")
    found = moved_interface(vllm)
    assert found is not None
    assert f"{told} {name}; install 'vllm" in found
    assert "\n" not in found


def test_a_moved_module_is_told(vllm: Path) -> None:
    (vllm / "sequence.py").unlink()
    assert "there is no vllm.sequence" in str(moved_interface(vllm))


LOAD = """
import sys
from transformers import AutoConfig
from hicom.serve.vllm_plugin import register
register()
register()
try:
    AutoConfig.from_pretrained(sys.argv[1])
except ValueError as error:
    print("refused:", error)
else:
    print("taken")
from hicom.model.config import HIComConfig
print(HIComConfig.from_pretrained(sys.argv[1]).model_type)
"""


def load(vllm: Path) -> str:
    """Return what registering and asking for a checkpoint prints, in a process of its own."""
    paths = [str(vllm.parent), str(Path(hicom.__file__).parents[1])]
    run = subprocess.run(
        [sys.executable, "-c", LOAD, str(FOLDER)],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    assert run.returncode == 0, run.stderr
    assert "hicom" not in run.stderr
    return run.stdout


def test_what_is_wrong_is_told_of_our_models_alone(vllm: Path) -> None:
    (vllm / "sequence.py").unlink()
    assert "refused: hicom cannot serve its models with this vLLM" in (told := load(vllm))
    assert "there is no vllm.sequence" in told
    assert told.endswith("hicom\n"), "in the library the class itself is as it was"


def test_what_only_shows_when_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    try:
        vllm_plugin.register()
        with pytest.raises(ValueError, match=r"hicom cannot serve its models .*ModuleNotFoundError"):
            AutoConfig.from_pretrained(FOLDER)
    finally:
        AutoConfig.register(HIComConfig.model_type, HIComConfig, exist_ok=True)
    assert type(AutoConfig.from_pretrained(FOLDER)) is HIComConfig


@pytest.mark.parametrize("value", ["abc", "-5", "1.5", "", "1e3", "٣"])
def test_megabytes_of_features(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HICOM_FEATURE_MB", value)
    with pytest.raises(ValueError, match=f"HICOM_FEATURE_MB='{value}' must be a whole number of megabytes"):
        feature_bytes()
    monkeypatch.setenv("HICOM_FEATURE_MB", "7")
    assert feature_bytes() == 7_000_000
    monkeypatch.delenv("HICOM_FEATURE_MB")
    assert feature_bytes() == 1_024_000_000


def test_ids_of_media(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in ((None, False), ("", False), ("0", False), ("1", True)):
        monkeypatch.delenv("HICOM_TRUST_MEDIA_IDS", raising=False)
        if value is not None:
            monkeypatch.setenv("HICOM_TRUST_MEDIA_IDS", value)
        assert trusts_media_ids() is expected
    monkeypatch.setenv("HICOM_TRUST_MEDIA_IDS", "true")
    with pytest.raises(ValueError, match="HICOM_TRUST_MEDIA_IDS='true' must be 0 or 1"):
        trusts_media_ids()


def test_a_wrong_setting_stops_the_command(
    vllm: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [str(vllm.parent), *sys.path])
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.setenv("HICOM_FEATURE_MB", "abc")
    assert cli.main(["serve", "hicom-tiny", "--port", "8131"]) == 2
    assert "hicom: error: HICOM_FEATURE_MB='abc'" in capfd.readouterr().err
