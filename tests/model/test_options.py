"""Match evidence, motion features and pointers: against the slow reference, and what each of them is for."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
import tiny
from comparison import (
    DIM,
    EXACT,
    FLOAT32,
    OUT_DIM,
    assert_equals_reference,
    cast,
    gradients,
    make,
    make_inputs,
    run,
    select,
    weighted_loss,
)
from hicom.model.compressor import HybridCompressor, Instruction
from hicom.model.modeling import HIComForConditionalGeneration
from hicom.model.options import CONTRAST, MatchPointers, bin_weights, main_words, path_features
from invariants import (
    assert_all_trainable_get_grad,
    assert_batched_equals_single,
    assert_close,
    assert_counts_agree,
    relative_error,
)

EVIDENCE: dict[str, Any] = {"match_evidence": True}
MOTION: dict[str, Any] = {"motion_features": True}
POINTERS: dict[str, Any] = {"num_pointers": 2}
WORDS: dict[str, Any] = {"num_pointers": 3, "num_word_pointers": 2}
ALL = EVIDENCE | MOTION | WORDS
EACH = pytest.mark.parametrize(
    "options", [EVIDENCE, MOTION, POINTERS, WORDS, ALL], ids=["evidence", "motion", "pointers", "words", "all"]
)


def fresh(seed: int = 0, **options: Any) -> HybridCompressor:
    """A small compressor at its starting point."""
    torch.manual_seed(seed)
    return HybridCompressor(dim=DIM, out_dim=OUT_DIM, **({"window": (2, 2, 3), "num_global_tokens": 2} | options))


# Values and gradients


@EACH
@pytest.mark.parametrize("injection", ["direct", "fine", "none"])
def test_equals_reference(injection: str, options: dict[str, Any]) -> None:
    compressor = make(local_injection=injection, global_injection=injection, **options)
    setting = reference.Setting("paper", (2, 2, 3), injection, injection, num_global_tokens=2)
    assert_equals_reference(compressor, setting, make_inputs([3, 1, 4], 3, 4))


@pytest.mark.parametrize("use_logit_scale", [False, True], ids=["", "logit_scale"])
def test_equals_reference_in_the_release_dialect(use_logit_scale: bool) -> None:
    scales = {"local_logit_scale": use_logit_scale, "global_logit_scale": use_logit_scale}
    compressor = make(dialect="release", local_injection="coarse", local_gates="qkvg", **scales, **ALL)
    setting = reference.Setting("release", (2, 2, 3), "coarse", num_global_tokens=2)
    assert_equals_reference(compressor, setting, make_inputs([3, 1]))


@pytest.mark.parametrize(("window", "num_frames"), [((4, 3, 3), 5), ((2, 2, 2), 9), ((20, 10, 10), 3), ((1, 1, 1), 8)])
def test_equals_reference_at_sizes_that_windows_do_not_divide(window: tuple[int, int, int], num_frames: int) -> None:
    setting = reference.Setting("paper", window, "direct", "coarse", num_global_tokens=1)
    compressor = make(num_global_tokens=1, **ALL)
    assert_equals_reference(compressor, setting, make_inputs([num_frames, 2], 4, 5), window=window)


def test_equals_reference_with_several_heads_and_other_text_width() -> None:
    compressor = make(dim=256, instruction_dim=10, window=(2, 2, 2), **ALL)
    setting = reference.Setting("paper", (2, 2, 2), num_global_tokens=2)
    assert_equals_reference(compressor, setting, make_inputs([2], 2, 3, dim=256, instruction_dim=10))


@pytest.mark.parametrize("branch", [{"window": None}, {"num_global_tokens": 0}], ids=["global only", "local only"])
def test_equals_reference_with_one_branch(branch: dict[str, Any]) -> None:
    compressor = make(**branch, **ALL)
    setting = reference.Setting("paper", (2, 2, 3), num_global_tokens=branch.get("num_global_tokens", 2))
    assert_equals_reference(compressor, setting, make_inputs([3, 2]))


@pytest.mark.parametrize("injection", ["direct", "none"])
def test_equals_reference_without_keys(injection: str) -> None:
    compressor = make(local_injection=injection, global_injection=injection, **ALL)
    setting = reference.Setting("paper", (2, 2, 3), injection, injection, num_global_tokens=2)
    assert_equals_reference(compressor, setting, make_inputs([3, 2]) | {"keys": None})


def test_unguided_compression_is_the_unguided_model() -> None:
    setting = reference.Setting("paper", (2, 2, 3), "none", "none", num_global_tokens=2)
    assert_equals_reference(make(**ALL), setting, make_inputs([3, 1]), compression="unguided")


def test_matches_finite_differences() -> None:
    """The gradient formulas do not rest on the reference alone."""
    compressor = make(num_global_tokens=1, **ALL).double()
    inputs = cast(make_inputs([3], 2, 2), torch.float64, requires_grad=True)

    def tokens(values: Tensor, keys: Tensor, instruction: Tensor, words: Tensor) -> Tensor:
        return compressor(values, keys, [3], instruction, words).tokens[0]

    leaves = [inputs[name] for name in ("values", "keys", "instruction", "instruction_tokens")]
    assert torch.autograd.gradcheck(tokens, leaves, fast_mode=True)


# Off, and at the start


def test_off_leaves_the_compressor_as_it_was() -> None:
    """The default is off, and a checkpoint from before the options fits it."""
    plain = fresh()
    layers = {"local.injector.mlp", "local.readout", "global_.injector.film", "global_.readout"}
    names = {f"{layer}.{number}.{kind}" for layer in layers for number in (0, 2) for kind in ("weight", "bias")}
    projections = [f"global_.attention.{letter}_proj" for letter in ("q", "k", "v", "out")]
    norms = ["global_.injector.norm"]
    names |= {f"{layer}.{kind}" for layer in [*projections, *norms] for kind in ("weight", "bias")}
    assert set(plain.state_dict()) == names | {"global_.query"}
    off = fresh(match_evidence=False, motion_features=False, num_pointers=0)
    for name, parameter in plain.state_dict().items():
        assert torch.equal(parameter, off.state_dict()[name]), name
    assert off(**make_inputs([3, 1]), return_attention=True).pointer_attention is None


@pytest.mark.parametrize("options", [EVIDENCE, MOTION, EVIDENCE | MOTION], ids=["evidence", "motion", "both"])
def test_starts_as_the_plain_compressor(options: dict[str, Any]) -> None:
    plain, compressor = fresh(), fresh(**options)
    missing, unexpected = compressor.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(".evidence." in name or name.startswith("motion.") for name in missing)
    inputs = make_inputs([5, 3])
    for found, expected in zip(compressor(**inputs).tokens, plain(**inputs).tokens, strict=True):
        assert torch.equal(found, expected)


def test_a_pointer_starts_at_the_instruction() -> None:
    compressor = fresh(num_pointers=3)
    instruction = torch.randn(2, DIM)
    query, time = compressor.pointers.queries(instruction, None, 2)
    torch.testing.assert_close(query[:, 0], instruction)
    assert torch.equal(time, torch.zeros(2, 3, 2))
    for a, b in itertools.combinations(query.unbind(1), 2):
        assert 1e-4 < relative_error(a, b) < 1, "pointers start the same, or not near the instruction"


def test_a_word_pointer_starts_at_its_word() -> None:
    compressor = fresh(**WORDS)
    instruction, tokens = torch.randn(1, DIM), torch.randn(1, 5, DIM)
    tokens[:, 3], tokens[:, 1] = instruction + 0.1, instruction - 0.2
    looked_for = compressor.pointer_instruction(Instruction(instruction, tokens, None), "conditional")
    query, time = compressor.pointers.queries(*looked_for, 1)
    torch.testing.assert_close(query[0], torch.stack([instruction[0], tokens[0, 1], tokens[0, 3]]))
    assert torch.equal(time, torch.zeros(1, 3, 2))


def test_main_words_are_the_nearest_ones_in_the_order_of_the_text() -> None:
    pooled = torch.tensor([[1.0, 0.0]])
    angles = torch.tensor([0.9, 0.3, 1.5, 0.1, 0.6])
    tokens = torch.stack([angles.cos(), angles.sin()], -1)[None]

    def chosen(number: int, mask: Tensor | None = None, tokens: Tensor = tokens) -> list[int | None]:
        """Numbers of the tokens; None where the instruction itself stands in."""
        words = main_words(pooled, tokens, mask, number)[0]
        assert words.shape == (number, 2)
        found = [(tokens[0] == word).all(-1).nonzero().flatten().tolist() for word in words]
        assert all(where or torch.equal(word, pooled[0]) for where, word in zip(found, words, strict=True))
        return [where[0] if where else None for where in found]

    assert chosen(1) == [3]
    assert chosen(2) == [1, 3]
    assert chosen(3) == [1, 3, 4]
    assert chosen(7) == [0, 1, 2, 3, 4, None, None], "more are asked for than there are"
    assert chosen(2, torch.tensor([[1, 1, 1, 0, 1]])) == [1, 4], "padding is no word"
    assert chosen(3, torch.tensor([[0, 0, 1, 0, 0]])) == [2, None, None]
    pooled_token = torch.cat([tokens, 3 * pooled[:, None]], 1)
    assert chosen(2, tokens=pooled_token) == [1, 3], "the token that was pooled is no word, whatever its length"
    assert chosen(2, torch.tensor([[0, 0, 0, 0, 0, 1]]), pooled_token) == [None, None]


def test_word_pointers_need_tokens_and_enough_pointers() -> None:
    inputs = make_inputs([2])
    with pytest.raises(ValueError, match="word pointers need instruction_tokens; pass them, or ask for"):
        fresh(**WORDS)(**inputs | {"instruction_tokens": None, "instruction_mask": None})
    with pytest.raises(ValueError, match="num_word_pointers=2 of num_pointers=1 pointers look for a word"):
        fresh(num_pointers=1, num_word_pointers=2)
    with pytest.raises(ValueError, match="num_word_pointers=-1 must not be negative"):
        fresh(num_pointers=1, num_word_pointers=-1)
    assert fresh(**WORDS).needs_instruction_tokens
    assert not fresh(**WORDS, local_injection="none", global_injection="none").needs_instruction_tokens


def test_two_names_in_one_instruction_are_pointed_at_one_by_one() -> None:
    """A pooled embedding between two names points at both at once; words keep them apart, in the order of the text."""
    compressor = fresh(**WORDS)
    with torch.no_grad():
        compressor.pointers.logit_scale.fill_(4.0)
    one, other, rest = torch.eye(DIM)[:3]
    keys = rest.expand(4, 3, 3, DIM).clone()
    keys[0, 0, 0], keys[3, 2, 2] = one, other
    for first, second, where in ((one, other, [(0, 0, 0), (3, 2, 2)]), (other, one, [(3, 2, 2), (0, 0, 0)])):
        tokens = torch.stack([torch.eye(DIM)[5], first, torch.eye(DIM)[6], second])[None]
        output = compressor(torch.randn(4, 3, 3, DIM), keys, [4], (one + other)[None], tokens, return_attention=True)
        whole, *words = output.pointer_attention[0]
        assert max(whole[0, 0, 0], whole[3, 2, 2]) < 0.6
        assert [float(attention[place]) > 0.99 for attention, place in zip(words, where, strict=True)] == [True, True]


def test_compression_off_uses_no_option() -> None:
    compressor = make(**ALL)
    inputs = make_inputs([2, 1])
    for found, values in zip(
        compressor(**inputs, compression="off").tokens, inputs["values"].split([2, 1]), strict=True
    ):
        assert torch.equal(found, compressor.local.readout(values).flatten(0, 2))


# Batches, streams, counts, training


@EACH
@pytest.mark.parametrize("compression", ["conditional", "unguided"])
def test_batch_equals_one_by_one(options: dict[str, Any], compression: str) -> None:
    """Also the gradients: no motion, match or pointer may see the videos beside its own."""
    compressor = make(window=(4, 2, 3), **options)
    inputs = make_inputs([5, 1, 9, 3], 3, 5)
    output, batched = run(compressor, inputs, torch.float64, compression=compression)
    leaves = cast(inputs, torch.float64, requires_grad=True)
    compressor.zero_grad(set_to_none=True)
    singles = tuple(compressor(**select(leaves, video), compression=compression).tokens[0] for video in range(4))
    assert_batched_equals_single(output.tokens, singles, EXACT)
    weighted_loss(singles).backward()
    for name, expected in gradients(dict(compressor.named_parameters()) | leaves).items():
        assert_close(batched[name], expected, EXACT, f"gradient of {name} over a batch")


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=6),
    st.sampled_from([EVIDENCE, MOTION, POINTERS, WORDS, ALL]),
    st.sampled_from([("paper", "direct"), ("paper", "none"), ("release", "coarse"), ("paper", "fine")]),
    st.sampled_from([(4, 3, 3), (1, 1, 1), (5, 2, 9), None]),
    st.booleans(),
    st.sampled_from(["conditional", "unguided"]),
)
def test_stream_equals_one_shot(
    sizes: list[int],
    options: dict[str, Any],
    mode: tuple[str, str],
    window: tuple[int, int, int] | None,
    knows_length: bool,
    compression: str,
) -> None:
    dialect, injection = mode
    knows_length = knows_length or dialect == "release" or "num_pointers" in options
    injections = {"local_injection": injection, "global_injection": injection}
    compressor = make(dialect=dialect, window=window, **injections, **options).double()
    inputs = cast(make_inputs([sum(sizes)], 3, 4), torch.float64)
    with torch.no_grad():
        expected = compressor(**inputs, compression=compression).tokens[0]
        stream = compressor.stream(
            **{name: x for name, x in inputs.items() if name.startswith("instruction")},
            compression=compression,
            num_frames=sum(sizes) if knows_length else None,
        )
        for values, keys in zip(inputs["values"].split(sizes), inputs["keys"].split(sizes), strict=True):
            stream.push(values, keys)
        found = stream.finish()
    assert_close(found, expected, EXACT, "tokens of a stream (does motion see all of its neighbours?)")


def test_stream_gradients_equal_one_shot() -> None:
    compressor = make(window=(4, 2, 3), **ALL)
    inputs = make_inputs([9])
    _, expected = run(compressor, inputs, torch.float64)
    leaves = cast(inputs, torch.float64, requires_grad=True)
    compressor.zero_grad(set_to_none=True)
    guide = {name: x for name, x in leaves.items() if name.startswith("instruction")}
    stream = compressor.stream(**guide, num_frames=9)
    for first, last in itertools.pairwise((0, 2, 3, 8, 9)):
        stream.push(leaves["values"][first:last], leaves["keys"][first:last])
    weighted_loss((stream.finish(),)).backward()
    found = gradients(dict(compressor.named_parameters()) | leaves)
    assert found.keys() == expected.keys()
    for name in expected:
        assert_close(found[name], expected[name], EXACT, f"gradient of {name} through a stream")


def test_stream_holds_few_frames() -> None:
    compressor = make(window=(4, 2, 3), **EVIDENCE, **MOTION)
    inputs = make_inputs([40])
    stream = compressor.stream(inputs["instruction"])
    for values, keys in zip(inputs["values"], inputs["keys"], strict=True):
        stream.push(values[None], keys[None])
        assert sum(len(held) for held, _ in stream.motion.held) <= 4
        assert sum(len(waiting) for waiting, _ in stream.waiting) <= 4 * 4
    assert_close(stream.finish(), compressor(**inputs).tokens[0], FLOAT32, "tokens of 40 single frames")


def test_stream_rejects_misuse() -> None:
    inputs = make_inputs([3])
    with pytest.raises(ValueError, match=r"pointers .* pass num_frames"):
        make(**POINTERS).stream(inputs["instruction"])
    stream = make(**MOTION).stream(inputs["instruction"], num_frames=4)
    stream.push(inputs["values"], inputs["keys"])
    with pytest.raises(ValueError, match="3 frames pushed, 4 expected"):
        stream.finish()
    with pytest.raises(ValueError, match="6 frames pushed into a stream of num_frames=4"):
        stream.push(inputs["values"], inputs["keys"])
    with pytest.raises(ValueError, match="keys"):
        stream.push(inputs["values"][:1])
    stream.push(inputs["values"][:1], inputs["keys"][:1])
    stream.finish()


@pytest.mark.parametrize("window", [None, (4, 3, 3), (3, 2, 5)], ids=str)
@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 3, 4), (13, 2, 3)], ids=str)
def test_token_count_is_what_comes_out(grid: tuple[int, int, int], window: tuple[int, int, int] | None) -> None:
    compressor = make(**ALL)
    inputs = make_inputs([grid[0]], *grid[1:])
    assert_counts_agree(compressor.token_count, compressor(**inputs, window=window).tokens[0], *grid, window)
    assert_counts_agree(compressor.token_count, compressor(**inputs, compression="off").tokens[0], *grid, None, "off")


@EACH
@pytest.mark.parametrize("injection", ["direct", "none"])
def test_training_from_the_starting_point_moves_every_parameter(injection: str, options: dict[str, Any]) -> None:
    """Zeros at the start must not lock a parameter for good: three steps reach all of them."""
    compressor = fresh(local_injection=injection, global_injection=injection, **options).double()
    inputs = cast(make_inputs([5, 3]), torch.float64)
    optimizer = torch.optim.Adam(compressor.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        weighted_loss(compressor(**inputs).tokens).backward()
        optimizer.step()
    idle = ["k_proj.bias"] + (["pointers.query"] if injection == "direct" else [])
    assert_all_trainable_get_grad(compressor, zero=idle)


def test_unguided_training_reaches_the_learnt_pointers() -> None:
    compressor = make(**ALL)
    run(compressor, make_inputs([5, 3]), torch.float64, compression="unguided")
    assert compressor.pointers.query.grad.abs().min() > 0
    assert all(p.grad is None for p in compressor.pointers.injector.parameters())


def test_bfloat16_is_near_float32() -> None:
    compressor = make(**ALL).bfloat16()
    inputs = cast(make_inputs([3, 5]), torch.bfloat16)
    rough = compressor(**inputs).tokens
    exact = compressor.float()(**cast(inputs, torch.float32)).tokens
    for a, b in zip(rough, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert relative_error(a, b) < 0.05


# What each option is for


def planted(num_frames: int, height: int, width: int, path: dict[int, tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Keys `float[T, H, W, D]` in which the instruction `float[1, D]` stands at a place of some frames, alone."""
    instruction = torch.zeros(1, DIM)
    instruction[0, 0] = 1
    keys = torch.zeros(num_frames, height, width, DIM)
    keys[..., 1] = 1
    for t, (h, w) in path.items():
        keys[t, h, w] = instruction[0]
    return keys, instruction


def test_evidence_tells_a_window_with_a_match_from_one_without() -> None:
    """The values are the same everywhere: what a softmax averages is, too, wherever it looks."""
    options = {"window": (2, 3, 3), "num_global_tokens": 0}
    keys, instruction = planted(2, 3, 6, {0: (1, 1)})
    values = torch.ones(2, 3, 6, DIM)
    for compressor, is_told in ((make(**options), False), (make(**options, **EVIDENCE), True)):
        match, none = compressor(values, keys, [2], instruction).tokens[0]
        assert (relative_error(match, none) > 1e-3) == is_told


def test_evidence_ignores_padding() -> None:
    """A short video in a batch with a long one: neither its windows nor its global rows count frames it lacks."""
    compressor = make(window=(4, 2, 3), **EVIDENCE).double()
    inputs = cast(make_inputs([2, 9]), torch.float64)
    assert_close(compressor(**inputs).tokens[0], compressor(**select(inputs, 0)).tokens[0], EXACT, "tokens")


def motion_part(compressor: HybridCompressor, values: Tensor) -> Tensor:
    return compressor.motion(values, None, [len(values)])[0] - values


def test_motion_sees_the_direction_of_time() -> None:
    compressor = make(**MOTION)
    values = make_inputs([7])["values"]
    forward, backward = motion_part(compressor, values), motion_part(compressor, values.flip(0)).flip(0)
    assert relative_error(forward, backward) > 1e-2, "a clip and its reverse have the same motion"
    correlations = compressor.motion.correlations(values, [7]).unflatten(-1, (4, 3, 3))
    reversed_ = compressor.motion.correlations(values.flip(0), [7]).flip(0).unflatten(-1, (4, 3, 3))
    assert_close(correlations.flip(3), reversed_, FLOAT32, "correlations of the reverse, with offsets swapped")


def test_a_still_clip_has_the_same_motion_at_all_times() -> None:
    compressor = make(**MOTION)
    still = make_inputs([1])["values"].expand(8, -1, -1, -1)
    part = motion_part(compressor, still)
    assert_close(part[2:5], part[3:6], FLOAT32, "motion of a still clip")


def test_motion_finds_where_a_patch_came_from() -> None:
    """A pattern that moves one patch to the right a frame correlates fully with its old and new places."""
    pattern = torch.randn(3, 9, DIM, generator=torch.Generator().manual_seed(0))
    clip = torch.stack([pattern.roll(t, 1) for t in range(3)])
    maps = make(**MOTION).motion.correlations(clip, [3]).unflatten(-1, (4, 3, 3))
    middle = maps[1, 1, 4]
    torch.testing.assert_close(middle[1, 1, 0], torch.tensor(1.0))
    torch.testing.assert_close(middle[2, 1, 2], torch.tensor(1.0))
    assert middle[1, 1, 1] < 0.99
    assert torch.equal(middle[[0, 3]], torch.zeros(2, 3, 3)), "frames that do not exist correlate"


def test_motion_does_not_leak_between_packed_videos() -> None:
    compressor = make(**MOTION)
    inputs = make_inputs([3, 1, 4])
    values, keys = inputs["values"].requires_grad_(), inputs["keys"].requires_grad_()
    moved, moved_keys = compressor.motion(values, keys, [3, 1, 4])
    (moved[3].sum() + moved_keys[3].sum()).backward()
    for x in (values, keys):
        touched = x.grad.abs().amax((1, 2, 3)) > 0
        assert touched.tolist() == [False] * 3 + [True] + [False] * 4


def read_features(pointers: MatchPointers, keys: Tensor, instruction: Tensor) -> Tensor:
    """The numbers before a pointer's readout, `float[P, D + 35]`."""
    seen: list[Tensor] = []
    handle = pointers.readout.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    pointers(keys, keys, [len(keys)], instruction)
    handle.remove()
    return seen[0][0]


@pytest.mark.parametrize("num_frames", [4, 8, 16])
def test_pointer_reports_the_path_of_what_matches(num_frames: int) -> None:
    """From the top left to the bottom right of a 5x9 grid, over the first half of the video."""
    pointers = fresh(num_pointers=1).pointers
    with torch.no_grad():
        pointers.logit_scale.fill_(4.0)
    half = num_frames // 2
    path = {t: (round(4 * t / max(half - 1, 1)), round(8 * t / max(half - 1, 1))) for t in range(half)}
    features = read_features(pointers, *planted(num_frames, 5, 9, path))[0, DIM:].detach()
    positions, path, mean = (x / CONTRAST for x in features[:24].split([16, 6, 2]))
    trajectory, scores, time = positions.view(8, 2), features[24:32], features[32]
    assert torch.all(scores[:4] > scores[4:].max() + 10), "half of the video has no match"
    assert torch.all(trajectory[:4].diff(dim=0) >= -1e-4), "the path goes right and down"
    for index in range(2):
        if num_frames <= 8:
            size = (9, 5)[index]
            torch.testing.assert_close(trajectory[0, index].item(), 1 / size - 1, atol=1e-3, rtol=0)
            torch.testing.assert_close(trajectory[3, index].item(), 1 - 1 / size, atol=1e-3, rtol=0)
    torch.testing.assert_close(torch.stack([time, *mean]), torch.tensor([-0.5, 0.0, 0.0]), atol=2e-2, rtol=0)
    assert torch.all(path[:2] > 1.5), "it crosses the picture in half of the time"


def test_path_features_tell_ways_apart() -> None:
    """Time runs from -1 to 1 and so do places: who crosses the picture has velocity 1 along that axis."""
    line = (2 * torch.arange(8) + 1) / 8 - 1
    zeros, there_and_back = torch.zeros(8), line.abs() * 2 - 1
    absent_late = torch.tensor([0.0] * 4 + [-40.0] * 4)
    x = torch.stack([line, -line, zeros, there_and_back, torch.where(absent_late < 0, 9.0, line)])
    y = torch.stack([zeros, line, zeros, zeros, zeros])
    score = torch.stack([zeros, zeros, zeros, zeros, absent_late])
    velocity, spread, speed = path_features(torch.stack([x, y, score], -1)[:, None])[:, 0].split(2, -1)
    close = {"atol": 0.02, "rtol": 0}
    expected = torch.tensor([[1, 0], [-1, 1], [0, 0], [0, 0], [1, 0]]).float()
    torch.testing.assert_close(velocity, expected, **close)
    assert torch.all((spread > 0.1) == torch.tensor([[1, 0], [1, 1], [0, 0], [1, 0], [1, 0]]).bool())
    torch.testing.assert_close(speed[:4], torch.tensor([[1.0, 0], [1, 1], [0, 0], [12 / 7, 0]]), **close)


def test_pointer_attention_finds_the_match_and_sums_to_one() -> None:
    compressor = fresh(**POINTERS)
    with torch.no_grad():
        compressor.pointers.logit_scale.fill_(4.0)
    keys, instruction = planted(5, 3, 4, {3: (2, 1)})
    values = torch.randn(8, 3, 4, DIM)
    output = compressor(
        values, torch.cat([keys, keys[:3]]), [5, 3], torch.cat([instruction] * 2), return_attention=True
    )
    first, second = output.pointer_attention
    assert first.shape == (2, 5, 3, 4)
    assert second.shape == (2, 3, 3, 4)
    torch.testing.assert_close(first.sum((1, 2, 3)), torch.ones(2))
    torch.testing.assert_close(second.sum((1, 2, 3)), torch.ones(2))
    assert first[0, 3, 2, 1] > 0.99


def test_pointer_prefers_a_time_when_asked() -> None:
    """Two equal matches: the slope of time decides between the first and the last."""
    pointers = fresh(num_pointers=1).pointers
    keys, instruction = planted(6, 3, 3, {0: (0, 0), 5: (2, 2)})
    for slope, tau in ((-20.0, -5 / 6), (20.0, 5 / 6)):
        with torch.no_grad():
            pointers.logit_scale.fill_(3.0)
            pointers.injector[0].time.bias[0] = slope
        summary = read_features(pointers, keys, instruction)[0, -3:]
        torch.testing.assert_close(summary[0].item(), tau, atol=1e-3, rtol=0)


@pytest.mark.parametrize("num_frames", [1, 3, 8, 13, 32])
def test_bins_average_frames(num_frames: int) -> None:
    weights = bin_weights(torch.tensor([num_frames, 40]), 40)[0]
    torch.testing.assert_close(weights.sum(1), torch.ones(8, dtype=torch.float64))
    assert not weights[:, num_frames:].any()
    if num_frames == 8:
        torch.testing.assert_close(weights[:, :8], torch.eye(8, dtype=torch.float64))
    if num_frames == 32:
        torch.testing.assert_close(weights[1, 4:8], torch.full((4,), 0.25, dtype=torch.float64))


def test_rejects_impossible_inputs() -> None:
    inputs = make_inputs([2], instruction_dim=10) | {"keys": None}
    with pytest.raises(ValueError, match=r"keys=None, but values of width 8 .* width 10"):
        make(instruction_dim=10, window=None, **POINTERS)(**inputs)
    # Branches that look at tokens still leave the pooled instruction to the pointers.
    compressor = make(local_injection="fine", global_injection="fine", **POINTERS)
    with pytest.raises(ValueError, match="pointers need instruction"):
        compressor(**make_inputs([2]) | {"instruction": None})


# The whole model


@pytest.mark.parametrize("options", [{}, {"local_injection": "none", "global_injection": "none"}], ids=["", "none"])
def test_save_and_load(options: dict[str, Any], tmp_path: Any) -> None:
    model = tiny.model(**ALL, **options)
    compressor = model.model.compressor
    assert compressor.needs_instruction == model.config.is_conditional == (not options)
    processor = tiny.processor(model.config)
    frames = np.random.default_rng(0).integers(0, 256, (4, 20, 24, 3), dtype=np.uint8)
    inputs = processor(text="<video>\nwhich object moves left ?", videos=[frames], return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.video_token_id).sum()) == model.model.token_count(4)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = HIComForConditionalGeneration.from_pretrained(tmp_path)
    assert (loaded.config.num_pointers, loaded.config.num_word_pointers) == (3, 2)
    torch.testing.assert_close(loaded(**inputs).logits, expected)
    reloaded = type(processor).from_pretrained(tmp_path)
    again = reloaded(text="<video>\nwhich object moves left ?", videos=[frames], return_tensors="pt")
    assert torch.equal(again["input_ids"], inputs["input_ids"])


def test_fresh_model_starts_as_the_compressor_does() -> None:
    """transformers initialises layer by layer; the zeros and the identity must survive that."""
    torch.manual_seed(0)
    compressor = HIComForConditionalGeneration(tiny.config(**ALL)).model.compressor
    for linear in (compressor.local.evidence.proj, compressor.global_.evidence.proj, compressor.motion.outer):
        assert not linear.weight.any()
    instruction, words = torch.randn(3, tiny.WIDTH), torch.randn(3, 2, tiny.WIDTH)
    query, _ = compressor.pointers.queries(instruction, words, 3)
    torch.testing.assert_close(query[:, 0], instruction, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(query[:, 1:], words, rtol=1e-4, atol=1e-5)


def test_padding_is_no_word_to_point_at() -> None:
    """SigLIP's encoder takes no mask; word pointers need to know what is text, everything else does not."""
    model = tiny.model(**WORDS).model
    pad = model.config.instruction_config.pad_token_id
    ids = torch.tensor([[pad + 1, pad + 2, pad, pad], [pad] * 4])
    assert model.instruction_mask(ids, None).tolist() == [[1, 1, 0, 0], [1] * 4], "an empty instruction is all there is"
    given = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]])
    assert torch.equal(model.instruction_mask(ids, given), given)
    assert tiny.model(**POINTERS).model.instruction_mask(ids, None) is None


def test_budget_leaves_room_for_pointers() -> None:
    processor = tiny.processor(tiny.config(num_pointers=2))
    assert processor.token_count(4, processor.choose_window(4, 13)) <= 13
    with pytest.raises(ValueError, match="below the 6 tokens"):
        processor.choose_window(4, 5)
