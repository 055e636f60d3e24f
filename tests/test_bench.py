"""`hicom bench`: what is compared computes the right thing, counts are those made by hand, and a run ends in JSON."""

import json
from pathlib import Path

import pytest
import torch

import tiny
from hicom import cli
from hicom.bench import command, memory
from hicom.bench.floor import Cost, Machine, compressor_cost, measure_machine, prefill_cost, token_cost, vision_cost
from hicom.bench.measure import extra_bytes, measure
from hicom.bench.plain import PlainCompressor
from hicom.bench.run import FIRST_TOKEN, Bench, Part, measure_parts, smaller_size
from hicom.bench.shapes import COLUMNS, published_config, random_subject
from hicom.model.compressor import HybridCompressor
from invariants import relative_error

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [(6, 6), (7, 5)], ids=["divided", "overlapping"])
def test_plain_form_equals_ours(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    ours = HybridCompressor(dim=256, out_dim=24, num_global_tokens=3, window=(4, 3, 3))
    for parameter in ours.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    plain, num_frames = PlainCompressor(ours), [8, 5, 1]
    values, keys = (torch.randn(14, *size, 256) for _ in range(2))
    guide = torch.randn(3, 256)
    expected, found = ours(values, keys, num_frames, guide).tokens, plain(values, keys, num_frames, guide).tokens
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < 1e-5
    parameters = list(ours.parameters())
    wanted, got = (
        torch.autograd.grad(torch.cat(tokens).square().mean(), parameters, allow_unused=True)
        for tokens in (expected, found)
    )
    for (name, _), one, other in zip(ours.named_parameters(), got, wanted, strict=True):
        if name == "global_.attention.k_proj.bias":
            continue  # it cancels in a softmax: none in ours, rounding errors in the plain form
        assert one is not None
        assert other is not None
        assert relative_error(one, other, floor=1e-6) < 1e-3, name


@pytest.mark.parametrize(
    "options", [{"match_evidence": True}, {"dialect": "release"}, {"local_injection": "coarse"}, {"window": None}]
)
def test_plain_form_refuses_what_it_is_not(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="the plain form"):
        PlainCompressor(HybridCompressor(dim=16, out_dim=8, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("column", "num_tokens"),
    [
        ("hicom", 680),
        ("plain", 680),
        ("no_compression", 32 * 729),
        ("llava_video", 32 * 196),
        ("spatial_pool", 32 * 81),
        ("qformer", 32),
        ("perceiver", 64),
    ],
)
def test_visual_tokens_of_32_frames(column: str, num_tokens: int) -> None:
    assert memory.visual_tokens(published_config("7b"), column, 32) == num_tokens
    assert column in COLUMNS


def test_floor_counts_by_hand() -> None:
    config = published_config("0.5b")
    # A layer of Qwen2.5-0.5B: q and o 896 x 896, k and v 896 x 128, three of 896 x 4864.
    layer = 2 * 896 * 896 + 2 * 896 * 128 + 3 * 896 * 4864
    head = 896 * 151936
    assert prefill_cost(config, 10, 2).flops == 24 * (2 * 10 * layer + 2 * 100 * 896) + 2 * head
    # Every weight and the keys and values of ten tokens, 2 bytes each; the logits are not written.
    assert token_cost(config, 10, 2).num_bytes == 2 * (24 * (layer + 2 * 10 * 128) + head)
    # 4 frames, one window in time: 81 tokens; values and keys read once, two layers of the readout for 81 and for 32.
    found = compressor_cost(config, "hicom", 4, 4)
    patches, readout = 4 * 729, 1152 * 896 + 896 * 896
    absorbed = 4 * patches * 32 * 9 * 1152 + 2 * 4 * 32 * 1152 * 1152
    assert found.flops == 2 * patches * 2 * 1152 + absorbed + 2 * (81 + 32) * readout
    assert found.num_bytes == 4 * (patches * 2 * 1152 + 1152 * 1152 + 2 * readout + (81 + 32) * 896)
    assert compressor_cost(config, "plain", 4, 4) == found
    a_layer = 729 * (2 * (4 * 1152**2 + 2 * 1152 * 4304) + 4 * 729 * 1152)
    assert vision_cost(config, 1, 4, has_keys=False).flops == 27 * a_layer + 729 * 2 * 588 * 1152


def test_floor_is_the_longer_of_operations_and_bytes() -> None:
    machine = Machine(flops_per_s=100, bytes_per_s=10)
    assert machine.floor_s(Cost(300, 20)) == 3
    assert machine.floor_s(Cost(100, 20)) == 2
    facts = {"seconds": 6.0, "cost": {"flops": 300, "num_bytes": 20}}
    machine.judge(facts)
    assert (facts["floor_s"], facts["bound"], facts["distance"]) == (3, "operations", 2)
    assert machine.bound(Cost(100, 20)) == "bytes"
    assert machine.better(Machine(flops_per_s=50, bytes_per_s=20)) == Machine(flops_per_s=100, bytes_per_s=20)


def test_a_machine_is_measured() -> None:
    found = measure_machine(CPU, torch.float32)
    # A hundredth and a hundred times of what a core does.
    assert 1e8 < found.flops_per_s < 1e14
    assert 1e8 < found.bytes_per_s < 1e13


def test_extra_memory_is_the_peak_beyond_what_was_there() -> None:
    there = torch.ones(1 << 20)

    def run() -> torch.Tensor:
        first = there + 1
        del first
        second = there * 2
        return second + there

    # Two of 4 MiB at once: `first` is gone when `second` comes.
    assert extra_bytes(run, CPU) == 2 * there.nbytes


def test_measurements_are_interleaved() -> None:
    calls: list[str] = []
    found = measure({name: lambda name=name: calls.append(name) for name in "ABC"}, 2, CPU)
    assert "".join(calls) == "ABC" * 3
    assert [len(measurement.times_s) for measurement in found.values()] == [2, 2, 2]


def test_what_is_too_long_is_measured_smaller_and_scaled() -> None:
    machine, sizes = Machine(flops_per_s=1, bytes_per_s=1), []

    def prepare(size: int) -> object:
        sizes.append(size)
        return lambda: None

    part = Part(100, "frames", prepare, lambda size: Cost(size, 0), layers=2, is_one_layer=True)  # type: ignore[arg-type]
    # Three times the floor, half of it a layer: 100 -> 150 s, 50 -> 75 s, 25 -> 37.5 s.
    assert smaller_size(part, machine, max_s=40) == 25
    result = measure_parts({"x": part}, machine, 1, 40, CPU)["x"]
    assert sizes == [25]
    assert result.note == "one layer x 2; 25 of 100 frames"
    assert result.seconds == pytest.approx(8 * result.times_s[0])


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Return what every machine is taken for, without measuring it."""
    found = Machine(flops_per_s=1e11, bytes_per_s=1e10)
    monkeypatch.setattr(command, "measure_machine", lambda device, dtype: found)
    return found


@pytest.mark.usefixtures("machine")
def test_a_further_question_finds_motion_there(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    folder = tiny.save(tmp_path / "model", motion_features=True)
    argv = ["bench", "--model", folder, "--num-frames", 2, "--columns", "plain", "--repeats", 1, "--json", file]
    assert cli.main([str(word) for word in [*argv, "--device", "cpu"]]) == 0
    ours, plain = json.loads(file.read_text())["rows"]
    seconds = {name: part["seconds"] for name, part in ours["parts"].items()}
    again = seconds["instruction encoder"] + seconds["compressor, further question"]
    first = sum(seconds[name] for name in ("decode", "vision encoder", "instruction encoder", "compressor"))
    assert ours["further_share"] == pytest.approx(again / first)
    assert "compressor, further question" not in plain["parts"]


@pytest.mark.usefixtures("machine")
def test_a_run_ends_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = tiny.save(tmp_path / "model"), tmp_path / "bench.json"
    columns = ["plain", "llava_video"]
    argv = ["bench", "--model", folder, "--num-frames", 2, 4, "--columns", *columns, "--repeats", 1, "--json", file]
    assert cli.main([str(word) for word in [*argv, "--device", "cpu", "--out", tmp_path / "out"]]) == 0
    facts = json.loads(file.read_text())
    assert [(row["num_frames"], row["column"]) for row in facts["rows"]] == [
        (frames, column) for frames in (2, 4) for column in ("hicom", *columns)
    ]
    for row in facts["rows"]:
        has_text = row["column"] != "llava_video"
        assert ("instruction encoder" in row["parts"]) == has_text
        assert len(row["parts"]) == 5 + has_text
        assert all(part["seconds"] > 0 for part in row["parts"].values())
        # A further question finds frames and features there.
        again = sum(
            row["parts"][name]["seconds"] for name in ("instruction encoder", "compressor") if name in row["parts"]
        )
        once = sum(row["parts"][name]["seconds"] for name in ("decode", "vision encoder"))
        assert row["further_share"] == pytest.approx(again / (again + once))
        assert all((part["distance"] is None) == (name == "decode") for name, part in row["parts"].items())
    # 5 x 5 patches: ours has windows of (2, 2, 2) and 3 tokens, LLaVA-Video 3 x 3 a frame.
    assert [row["num_visual_tokens"] for row in facts["rows"]] == [12, 12, 18, 21, 21, 36]
    printed = capsys.readouterr().out
    assert "Ratios to ours (1)." in printed
    assert "Milliseconds" not in printed
    assert str(tmp_path) not in printed.replace(str(folder), "")
    assert len(list((tmp_path / "out").glob("bench-model-*.md"))) == 1


def test_one_layer_counts_for_all() -> None:
    config, machine = tiny.config(), Machine(flops_per_s=1e9, bytes_per_s=1e9)
    config.text_config.vocab_size = 1000
    subject = random_subject(config, ("hicom", "plain", "spatial_pool"), CPU, torch.float32, is_whole=False)
    assert subject.head.weight.shape == (1000, 40)
    assert len(subject.model.language_model.layers) == 1
    assert config.text_config.num_hidden_layers == 2
    bench = Bench(subject, CPU, torch.float32, repeats=1, max_s=1e9, machine=machine)
    ours, plain, pooled = bench.run([4], lambda text: None)
    assert plain["num_visual_tokens"] == ours["num_visual_tokens"] == 18 + 3
    assert pooled["num_visual_tokens"] == 4 * 4
    for part in ("vision encoder", "LLM prefill", "decode per token"):
        assert ours["parts"][part]["note"] == "one layer x 2", part
    assert ours["parts"]["compressor"]["note"] == ""
    # The instruction encoder of this configuration has one layer.
    assert ours["parts"]["instruction encoder"]["note"] == ""
    parts = [ours["parts"][name]["seconds"] for name in FIRST_TOKEN]
    assert ours["first_token_s"] == pytest.approx(sum(parts))


@pytest.mark.usefixtures("machine")
def test_memory_is_checked_before_any_work(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 3_000_000_000)
    argv = "bench --shape 0.5b --compressor-only --num-frames 64 --batch-sizes 1 4 --columns plain --device cpu"
    assert cli.main(argv.split()) == 2
    error = capsys.readouterr().err
    assert "64 frames in batches of 4 of hicom, plain need about 6.9 GB, and 3.0 GB are free on cpu" in error
    assert "--num-frames 16 or --batch-sizes 1" in error
    monkeypatch.setattr(command, "bench_compressor", lambda config, columns, sizes, *more, **options: [])
    assert cli.main([*argv.split(), "--leave-out"]) == 0
    assert "Would not fit into memory: 64 frames in batches of 4 (7 GB)." in capsys.readouterr().out
    assert cli.main([*argv.replace("1 4", "4").split(), "--leave-out"]) == 2
    argv = "bench --shape 0.5b --num-frames 100000 --columns no_compression --device cpu --max-s 1e9"
    assert cli.main(argv.split()) == 2
    assert "--num-frames" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model a --shape 7b", "--model a and --shape 7b both"),
        ("--num-frames 0", "--num-frames 0: give positive"),
        ("--columns pool", "column 'pool' is not one of"),
        ("--compressor-only --model a", "give --shape"),
    ],
)
def test_wrong_options(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *words.split()]) == 2
    assert message in capsys.readouterr().err
