"""The official release by its hub id, as its scripts leave it: a hub on loopback, a real SentencePiece tokenizer."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer

import hub
import official
import siglip_tokenizer
import tiny
from hicom import cli
from hicom.inference import VideoChat
from hicom.model.convert import convert_official, load_official, open_official
from hicom.model.modeling import HIComForConditionalGeneration
from hicom.model.processing import HIComProcessor
from hicom.model.tower import TokenizerMissing, find_tower, hub_ids
from hicom.train.lora import quantization

QUESTION = "which object moves left ?"
PUBLISHED = f"google/{official.TOWER}"
DEMO = Path(cli.__file__).parent / "assets" / "demo.mp4"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return official.save(tmp_path_factory.mktemp("official") / "release")


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return official.save_tower(tmp_path_factory.mktemp("published") / "tower")


@pytest.fixture
def served(checkpoint: Path, tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub.Hub]:
    with hub.serve({official.REPO: checkpoint, PUBLISHED: tower}, revisions=("main", "v2")) as running:
        hub.use(monkeypatch, running.url, tmp_path / "cache")
        yield running


@pytest.fixture
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (8, 60, 98, 3), dtype=np.uint8)


# The tower


def test_hub_id_is_asked_at_the_first_try(served: hub.Hub, frames: np.ndarray) -> None:
    chat = VideoChat.from_pretrained(official.REPO)
    assert type(chat.processor.instruction_tokenizer).__name__ == "SiglipTokenizer"
    assert chat.model.config.vision_config.num_attention_heads == 4  # the tower's, not what shapes would suggest
    assert chat.processor.num_frames == 8
    answer = chat.ask(chat.encode(frames), QUESTION, max_new_tokens=3)
    assert answer.num_visual_tokens == 2 * 3 * 3 + 32
    assert served.num_bytes(rf"^{official.REPO}/model-0000[1-4]") > 0
    # Nobody else is asked, least of all under the path of somebody's disk.
    asked = {"/".join(path.split("/")[3:5]) for _, path, _ in served.requests if path.startswith("/api/models")}
    assert asked == {official.REPO, PUBLISHED}
    assert served.num_bytes(rf"^{PUBLISHED}/.*safetensors") == 0


def test_revision_and_token_reach_every_part(served: hub.Hub, tmp_path: Path) -> None:
    served.token = "hf_secret"
    chat = VideoChat.from_pretrained(
        official.REPO, revision="v2", token="hf_secret", cache_dir=tmp_path / "own", dtype="float16"
    )
    assert chat.model.dtype == torch.float16
    assert f"/api/models/{official.REPO}/revision/v2" in {path for _, path, _ in served.requests}
    assert f"/api/models/{PUBLISHED}" in {path for _, path, _ in served.requests}  # its own revision, not ours
    assert {token for _, _, token in served.requests} == {"hf_secret"}
    assert len([*(tmp_path / "own").glob("models--*")]) == 2


def test_tower_that_is_named_is_taken(served: hub.Hub, checkpoint: Path, tower: Path) -> None:
    served.repos = {official.REPO: checkpoint, "someone/my-siglip": tower}
    with pytest.raises(
        TokenizerMissing,
        match=rf"tried .*playground/models/{official.TOWER} \(no such folder\).*{PUBLISHED}.*vision_tower=",
    ):
        VideoChat.from_pretrained(official.REPO)
    for name in ("someone/my-siglip", tower):
        chat = VideoChat.from_pretrained(official.REPO, vision_tower=name)
        assert type(chat.processor.instruction_tokenizer).__name__ == "SiglipTokenizer"
        model = HIComForConditionalGeneration.from_official(official.REPO, vision_tower=name)
        assert model.config.vision_config.num_attention_heads == 4
    with pytest.raises(ValueError, match="neither a folder nor a model on the hub"):
        VideoChat.from_pretrained(official.REPO, vision_tower="someone/else")
    with pytest.raises(ValueError, match="holds its own"):
        VideoChat.from_pretrained("hicom-tiny", vision_tower=tower)


@pytest.mark.parametrize("place", ["path", "inside", "base inside", "beside"])
def test_tower_is_found_near_a_folder(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub is asked where the tower is at hand (here one that could not even answer)."""
    monkeypatch.chdir(tmp_path)
    folder = official.save(tmp_path / "models" / "release")
    where = {
        "path": tmp_path / official.SCRIPT_TOWER,
        "inside": folder / official.SCRIPT_TOWER,
        "base inside": folder / official.TOWER,
        "beside": folder.parent / official.TOWER,
    }[place]
    official.save_tower(where)
    found = open_official(folder).tower
    assert found.config_folder is not None
    assert found.config_folder.resolve() == found.tokenizer_folder.resolve() == where.resolve()  # type: ignore[union-attr]
    VideoChat.from_pretrained(folder)


def test_what_lies_in_the_cache_beside_a_download_is_not_its_tower(
    served: hub.Hub, tower: Path, tmp_path: Path
) -> None:
    open_official(official.REPO)
    snapshots = next((tmp_path / "cache").glob("models--lntzm*/snapshots"))
    official.save_tower(snapshots / official.TOWER)
    found = open_official(official.REPO).tower
    assert "models--google--" in str(found.config_folder)
    assert not any(str(snapshots / official.TOWER) in place for place in found.tried)


def test_sizes_and_tokenizer_may_come_from_two_places(served: hub.Hub, tmp_path: Path) -> None:
    folder = official.save(tmp_path / "release")
    official.save_tower(folder / official.TOWER)
    for file in (folder / official.TOWER).iterdir():
        if file.name != "config.json":
            file.unlink()
    found = open_official(folder).tower
    assert found.config_folder == folder / official.TOWER
    assert "models--google--" in str(found.tokenizer_folder)
    assert any("without tokenizer" in place for place in found.tried)


def test_model_that_nothing_steers_asks_for_no_tokenizer(served: hub.Hub, tmp_path: Path) -> None:
    folder = official.save(
        tmp_path / "release", case="direct_coarse", use_guide="off", mm_projector_type="local43_global32"
    )
    official.save_tower(folder / official.TOWER)
    (folder / official.TOWER / "spiece.model").unlink()
    (folder / official.TOWER / "tokenizer_config.json").unlink()
    assert open_official(folder).tower.tokenizer_folder is None
    assert served.requests == []


def test_tokenizer_of_another_tower_is_refused(tmp_path: Path) -> None:
    folder = official.save(tmp_path / "release")
    official.save_tower(folder / official.TOWER)
    big = tiny.tokenizer()
    big.add_tokens([f"word{i}" for i in range(100)])
    for file in ("spiece.model", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / official.TOWER / file).unlink()
    big.save_pretrained(folder / official.TOWER)
    with pytest.raises(ValueError, match=r"instruction encoder knows 64: .* is of another tower"):
        VideoChat.from_pretrained(folder)


def test_silent_hub_costs_one_time_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes are inferred; without a tokenizer no question can be asked, and the message says what was tried."""
    folder = official.save(tmp_path / "release", mm_vision_tower=f"models/{official.TOWER}")
    with hub.silent() as url:
        hub.use(monkeypatch, url, tmp_path / "cache")
        start = time.perf_counter()
        with (
            pytest.warns(UserWarning, match=r"sizes were inferred.*beside|sizes were inferred"),
            pytest.raises(TokenizerMissing, match=rf"{url} does not answer"),
        ):
            VideoChat.from_pretrained(folder)
        assert time.perf_counter() - start < 4


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("playground/models/siglip-so400m-patch14-384", ["google/siglip-so400m-patch14-384"]),
        ("/data/siglip2-so400m-patch14-384/", ["google/siglip2-so400m-patch14-384"]),
        ("siglip-so400m-patch14-384", ["google/siglip-so400m-patch14-384"]),
        ("google/siglip-so400m-patch14-384", ["google/siglip-so400m-patch14-384"]),
        ("C:\\models\\clip-vit-large-patch14-336", ["openai/clip-vit-large-patch14-336"]),
        ("someone/siglip-mine", ["someone/siglip-mine", "google/siglip-mine"]),
        ("../towers/mine", []),
    ],
)
def test_names_of_towers_on_the_hub(name: str, ids: list[str]) -> None:
    assert hub_ids(name) == ids


def test_tower_of_no_kind_is_refused_by_name(tmp_path: Path) -> None:
    folder = official.save(tmp_path / "release", mm_vision_tower="../towers/mine")
    found = find_tower("../towers/mine", folder)
    assert found.config_folder is None
    tiny.save(tmp_path / "own")
    with pytest.raises(ValueError, match="is a hicom model; SigLIP or CLIP is expected"):
        open_official(folder, vision_tower=tmp_path / "own").config()


# The tokenizer that SigLIP is published with


def test_instruction_tokenizer_is_the_sentencepiece_one(tower: Path, tmp_path: Path) -> None:
    """It lower-cases and drops punctuation; the fast one that lies beside it on the hub does not, and is not taken."""
    folder = siglip_tokenizer.save(tmp_path / "both")
    tiny.tokenizer().backend_tokenizer.save(str(folder / "tokenizer.json"))
    for place in (tower, folder):
        tokenizer = AutoTokenizer.from_pretrained(place)
        assert type(tokenizer).__name__ == "SiglipTokenizer"
        ids = [tokenizer(text)["input_ids"] for text in ("What color is the Circle?", "what color is the circle")]
        assert ids[0] == ids[1]
        assert ids[0][-1] == tokenizer.pad_token_id == 1


# How it generates


def test_generation_config_is_kept(checkpoint: Path, tower: Path, tmp_path: Path, frames: np.ndarray) -> None:
    """Two end tokens and a repetition penalty change greedy answers; sampling is off unless it is asked for."""
    chat = VideoChat.from_pretrained(checkpoint, vision_tower=tower)
    convert_official(checkpoint, tmp_path / "converted", vision_tower=tower)
    converted = VideoChat.from_pretrained(tmp_path / "converted")
    for kept in (chat.model.generation_config, converted.model.generation_config):
        assert {name: getattr(kept, name) for name in official.GENERATION} == official.GENERATION
    video = chat.encode(frames)
    greedy = [chat.ask(video, QUESTION, max_new_tokens=24) for _ in range(2)]
    assert greedy[0] == greedy[1] == converted.ask(converted.encode(frames), QUESTION, max_new_tokens=24)
    assert greedy[0] != chat.ask(video, QUESTION, max_new_tokens=24, repetition_penalty=1.0)
    sampled = {chat.ask(video, QUESTION, max_new_tokens=24, do_sample=True, temperature=3.0) for _ in range(4)}
    assert len(sampled) > 1


# Memory, devices, precisions


def test_device_map_and_precision(checkpoint: Path, tower: Path, tmp_path: Path, frames: np.ndarray) -> None:
    expected = VideoChat.from_pretrained(checkpoint, vision_tower=tower)
    answer = expected.ask(expected.encode(frames), QUESTION, max_new_tokens=4)
    placed = VideoChat.from_pretrained(checkpoint, vision_tower=tower, device_map="cpu", dtype="float32")
    assert placed.ask(placed.encode(frames), QUESTION, max_new_tokens=4) == answer
    on_disk = dict.fromkeys(("model.vision_tower", "model.instruction_encoder", "model.compressor", "lm_head"), "cpu")
    on_disk |= {"model.language_model.embed_tokens": "cpu", "model.language_model.layers": "disk"}
    on_disk |= {"model.language_model.norm": "cpu", "model.language_model.rotary_emb": "cpu"}
    model = load_official(
        checkpoint, torch.float32, vision_tower=tower, device_map=on_disk, offload_folder=tmp_path / "offload"
    )
    assert {p.device.type for p in model.model.language_model.layers.parameters()} == {"meta"}
    assert torch.equal(model.lm_head.weight, expected.model.lm_head.weight)
    assert load_official(checkpoint, vision_tower=tower).dtype == torch.float16  # as stored
    with pytest.raises(ValueError, match="says its own key_mapping"):
        load_official(checkpoint, vision_tower=tower, key_mapping={})


@pytest.mark.qlora
def test_quantised_while_it_loads(checkpoint: Path, tower: Path, frames: np.ndarray) -> None:
    """The language model in 4 bit, all else as it is; nothing has to be converted before."""
    chat = VideoChat.from_pretrained(
        checkpoint,
        vision_tower=tower,
        quantization_config=quantization("4bit", torch.float32),
        device_map="cpu",
        dtype="float32",
    )
    kinds = {
        name: type(module).__name__ for name, module in chat.model.named_modules() if isinstance(module, nn.Linear)
    }
    in_layers = {name for name in kinds if name.startswith("model.language_model.layers.")}
    assert {name for name, kind in kinds.items() if kind == "Linear4bit"} == in_layers
    assert chat.ask(chat.encode(frames), QUESTION, max_new_tokens=3).num_visual_tokens == 50


def test_loaded_model_is_saved_in_this_layout(checkpoint: Path, tower: Path, tmp_path: Path) -> None:
    model = load_official(checkpoint, vision_tower=tower)
    model.save_pretrained(tmp_path / "saved")
    again = HIComForConditionalGeneration.from_pretrained(tmp_path / "saved", dtype="auto")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def anonymous_bytes() -> int:
    """Return the memory of this process that no file backs."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in text.splitlines() if line.startswith("RssAnon")))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux' /proc")
def test_loading_holds_little_beside_the_model(tower: Path, tmp_path: Path) -> None:
    """Twelve shards in float16 become a model in float32; never are there two, in either precision."""
    folder = official.save(tmp_path / "large", num_shards=1, num_hidden_layers=12, intermediate_size=16_384)
    (first,) = folder.glob("*.safetensors")
    tensors = load_file(first)
    layers = {name: tensors.pop(name) for name in list(tensors) if name.startswith("model.layers.")}
    save_file(tensors, first)
    weight_map = dict.fromkeys(tensors, first.name)
    num_bytes = [sum(tensor.nbytes for tensor in tensors.values())]
    for number in range(12):
        shard = {}
        for name, tensor in layers.items():
            if name.startswith("model.layers.0."):
                shape = [16_384 if size == 128 and ".mlp." in name else size for size in tensor.shape]
                shard[name.replace("layers.0.", f"layers.{number}.")] = tensor.new_zeros(shape)
        save_file(shard, folder / f"layer{number}.safetensors")
        weight_map |= dict.fromkeys(shard, f"layer{number}.safetensors")
        num_bytes.append(sum(tensor.nbytes for tensor in shard.values()))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    del tensors, layers, shard
    load_official(folder, torch.float32, vision_tower=tower)  # what is made once, such as threads, is there from now on
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before, peak, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.0005):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        model = load_official(folder, torch.float32, vision_tower=tower)
    finally:
        done.set()
        watcher.join()
    assert sum(p.nbytes for p in model.parameters()) == 2 * sum(num_bytes) > 150e6
    # The several threads that read may each hold a tensor. A second model would be 75 MB, or 150.
    assert peak[0] - before < 2 * sum(num_bytes) + 4 * max(num_bytes)


# hicom info, and the command line


def test_info_of_a_hub_id_downloads_no_weights(
    served: hub.Hub, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["info", official.REPO, "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert (facts["layout"], facts["problems"], facts["dtype"]) == ("official release", {}, "float16")
    stored = [tensor for file in checkpoint.glob("*.safetensors") for tensor in load_file(file).values()]
    assert (facts["num_tensors"], facts["num_bytes"]) == (len(stored), sum(tensor.nbytes for tensor in stored))
    assert facts["visual_tokens"]["32"] == 8 * 9 + 32
    assert "models--google--" in facts["tower_folder"]
    # The hub's client asks for the first 100 kB of every shard: of shards of gigabytes that is nothing.
    weights = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    assert 0 < served.num_bytes(r"\.safetensors$") <= 4 * 100_001 < weights
    assert not [*(tmp_path / "cache").rglob("*.safetensors")]
    assert cli.main(["info", official.REPO, "--revision", "v2"]) == 0
    out = capfd.readouterr().out
    assert "every tensor fits the model, by name and shape" in out
    assert f"/{official.REPO}/resolve/v2/model-00001-of-00004.safetensors" in {path for _, path, _ in served.requests}


def test_info_names_the_tensors_that_do_not_fit(
    tmp_path: Path, tower: Path, served: hub.Hub, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of a folder, of the hub, and in this library's layout."""
    folder = official.save(tmp_path / "release", num_shards=1)
    (shard,) = folder.glob("*.safetensors")
    tensors = load_file(shard)
    tensors["model.norm.weight"] = torch.zeros(3)
    tensors["model.mm_projector.local_compressor.spare"] = torch.zeros(2)
    del tensors["lm_head.weight"]
    save_file(tensors, shard)
    served.repos["someone/broken"] = folder
    own = tiny.save(tmp_path / "own")
    stored = load_file(own / "model.safetensors")
    save_file({n: t for n, t in stored.items() if n != "lm_head.weight"}, own / "model.safetensors")
    expected = {
        "missing": ["lm_head.weight"],
        "unexpected": ["model.compressor.local.spare"],
        "of another shape": ["model.language_model.norm.weight (3,) (expected (64,))"],
    }
    for name, problems in ((folder, expected), ("someone/broken", expected), (own, {"missing": ["lm_head.weight"]})):
        assert cli.main(["info", str(name), "--json"]) == 0
        assert json.loads(capfd.readouterr().out)["problems"] == problems
    assert cli.main(["info", str(folder)]) == 0
    assert "it does not load: tensors 1 missing: lm_head.weight; 1 unexpected" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["info", "someone/else"], "someone/else: neither a folder nor a model on the hub"),
        (["info", "google/pickles"], "google/pickles has no safetensors files; pickles can run code"),
        (["info", PUBLISHED], f"{PUBLISHED}: not a HICom checkpoint (its model_type is 'siglip')"),
        (["info", official.REPO, "--vision-tower", "google/nothing"], "google/nothing: neither a folder nor a model"),
        (["info", "hicom-tiny", "--vision-tower", PUBLISHED], "hicom-tiny holds its tower itself"),
        (["info", "clips/missing.mp4"], "clips/missing.mp4: no such file or folder"),
        (["info", "clips/missing.mp4", "--revision", "v2"], "--vision-tower and --revision are for checkpoints"),
        (["convert", official.REPO, "{tmp}/x", "--revision", "v9"], "has no revision 'v9'"),
        (["ask", "{clip}", "what ?", "--model", official.REPO, "--vision-tower", "no/where"], "no/where: neither"),
    ],
)
def test_command_line_says_what_is_wrong(
    served: hub.Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    pickles = tmp_path / "pickles"
    pickles.mkdir()
    (pickles / "config.json").write_text('{"model_type": "hicom"}')
    (pickles / "pytorch_model.bin").write_bytes(b"x")
    served.repos["google/pickles"] = pickles
    clip = str(DEMO)
    assert cli.main([each.format(tmp=tmp_path, clip=clip) for each in args]) == 2
    done = capfd.readouterr()
    assert message in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    "args",
    [
        ["convert", "export", "{release}", "{tmp}/x"],
        ["convert", "merge", "{release}", "{tmp}", "{tmp}/x"],
        ["data", "stats", "{tmp}/r.jsonl", "--model", "{release}"],
    ],
)
def test_doors_that_take_only_this_layout_say_so(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], args: list[str]
) -> None:
    """Not with defaults in silence, and not by a field that they do not know."""
    turns = [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": "yes"}]
    (tmp_path / "r.jsonl").write_text(json.dumps({"id": "a", "conversations": turns}) + "\n")
    assert cli.main([each.format(release=checkpoint, tmp=tmp_path) for each in args]) == 2
    assert "hicom convert" in capfd.readouterr().err
    for load in (HIComForConditionalGeneration.from_pretrained, HIComProcessor.from_pretrained):
        with pytest.raises(ValueError, match="official release"):
            load(checkpoint)


def test_command_line_converts_and_asks_by_hub_id(
    served: hub.Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["convert", official.REPO, str(tmp_path / "own"), "--vision-tower", PUBLISHED]) == 0
    question = ["ask", str(DEMO), QUESTION, "--max-new-tokens", "3", "--model"]
    assert cli.main([*question, str(tmp_path / "own")]) == 0
    converted = capfd.readouterr().out.splitlines()[-1]
    assert cli.main([*question, official.REPO, "--vision-tower", PUBLISHED]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == converted


@pytest.mark.slow  # starts Python anew
def test_hf_endpoint_is_all_that_a_process_needs(served: hub.Hub, tmp_path: Path) -> None:
    env = os.environ | {"HF_ENDPOINT": served.url, "HF_HUB_CACHE": str(tmp_path / "k"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "hicom", "info", official.REPO]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "every tensor fits the model" in done.stdout
