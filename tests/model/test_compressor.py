"""The compressor against the slow reference, and what makes it usable in batches, streams and training."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from comparison import (
    DIM,
    EXACT,
    FLOAT32,
    LENGTH,
    OUT_DIM,
    SHIFTS_OF_LOGITS,
    assert_equals_reference,
    cast,
    gradients,
    make,
    make_inputs,
    run,
    select,
    weighted_loss,
)
from hicom.model.compressor import HybridCompressor
from invariants import (
    assert_all_trainable_get_grad,
    assert_batched_equals_single,
    assert_close,
    assert_counts_agree,
    relative_error,
)

DIALECTS = ("paper", "release")
INJECTIONS = ("direct", "coarse", "fine", "none")


# Values and gradients


@pytest.mark.parametrize("use_logit_scale", [False, True], ids=["", "logit_scale"])
@pytest.mark.parametrize("gates", ["", "qkvg"], ids=["", "gates"])
@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_equals_reference(dialect: str, injection: str, gates: str, use_logit_scale: bool) -> None:
    compressor = make(
        dialect=dialect,
        local_injection=injection,
        global_injection=injection,
        local_gates=gates,
        global_gates="g" if gates else "",
        local_logit_scale=use_logit_scale,
        global_logit_scale=use_logit_scale,
    )
    setting = reference.Setting(dialect, (2, 2, 3), injection, injection, num_global_tokens=2)
    assert_equals_reference(compressor, setting, make_inputs([3, 1]))


@pytest.mark.parametrize("num_frames", [1, 3, 5, 7, 8, 9])
@pytest.mark.parametrize("window", [(4, 3, 3), (2, 2, 2), (3, 4, 2), (20, 10, 10)], ids=str)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_equals_reference_at_sizes_that_windows_do_not_divide(
    dialect: str, window: tuple[int, int, int], num_frames: int
) -> None:
    """The window is a run-time override here: one set of weights serves all of them."""
    compressor = make(dialect=dialect, local_injection="coarse", num_global_tokens=1)
    setting = reference.Setting(dialect, window, "coarse", "coarse", num_global_tokens=1)
    assert_equals_reference(compressor, setting, make_inputs([num_frames], 5, 7), window=window)


@pytest.mark.parametrize("dim", [256, 320, 12], ids=["two heads of 128", "two heads of 160", "one head"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_equals_reference_with_several_heads(dialect: str, dim: int) -> None:
    compressor = make(dialect=dialect, dim=dim, local_injection="fine", global_injection="fine", window=(2, 2, 2))
    setting = reference.Setting(dialect, (2, 2, 2), "fine", "fine", num_global_tokens=2)
    assert_equals_reference(compressor, setting, make_inputs([2], 2, 3, dim=dim))


@pytest.mark.parametrize(("local", "global_"), [("direct", "coarse"), ("coarse", "fine"), ("fine", "direct")])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_equals_reference_where_text_and_vision_widths_differ(dialect: str, local: str, global_: str) -> None:
    compressor = make(dialect=dialect, instruction_dim=10, local_injection=local, global_injection=global_)
    setting = reference.Setting(dialect, (2, 2, 3), local, global_, num_global_tokens=2)
    assert_equals_reference(compressor, setting, make_inputs([3, 2], instruction_dim=10))


@pytest.mark.parametrize("options", [{"window": None}, {"num_global_tokens": 0}], ids=["global only", "local only"])
def test_equals_reference_with_one_branch(options: dict[str, Any]) -> None:
    compressor = make(**options)
    setting = reference.Setting("paper", (2, 2, 3), num_global_tokens=options.get("num_global_tokens", 2))
    assert_equals_reference(compressor, setting, make_inputs([3, 2]))


@pytest.mark.parametrize("use_logit_scale", [False, True], ids=["", "logit_scale"])
@pytest.mark.parametrize("injection", ["direct", "coarse"])
def test_equals_reference_without_keys(injection: str, use_logit_scale: bool) -> None:
    """An encoder without a text space: the values are the keys."""
    compressor = make(local_injection=injection, local_logit_scale=use_logit_scale)
    setting = reference.Setting("paper", (2, 2, 3), injection, num_global_tokens=2)
    assert_equals_reference(compressor, setting, make_inputs([3, 2]) | {"keys": None})


@pytest.mark.parametrize("dialect", DIALECTS)
def test_unguided_compression_is_the_unguided_model(dialect: str) -> None:
    compressor = make(dialect=dialect, local_injection="coarse", local_gates="qkv", local_logit_scale=True)
    setting = reference.Setting(dialect, (2, 2, 3), "none", "none", num_global_tokens=2)
    inputs = make_inputs([3, 1]) | {"keys": None}
    assert_equals_reference(compressor, setting, inputs, compression="unguided")


def test_compression_off_projects_every_patch() -> None:
    compressor = make()
    inputs = make_inputs([2, 1])
    tokens = compressor(**inputs, compression="off").tokens
    parameters = dict(compressor.named_parameters())
    for found, values in zip(tokens, inputs["values"].split([2, 1]), strict=True):
        expected = torch.stack([reference.mlp(parameters, "local.readout", x) for x in values.flatten(0, 2)])
        assert_close(found, expected, FLOAT32, "projected patches")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_matches_finite_differences(dialect: str) -> None:
    """The gradient formulas do not rest on the reference alone."""
    compressor = make(dialect=dialect, num_global_tokens=1).double()
    inputs = cast(make_inputs([3], 2, 2), torch.float64, requires_grad=True)

    def tokens(values: Tensor, keys: Tensor, instruction: Tensor) -> Tensor:
        return compressor(values, keys, [3], instruction).tokens[0]

    assert torch.autograd.gradcheck(tokens, (inputs["values"], inputs["keys"], inputs["instruction"]), fast_mode=True)


# Batches and streams

MODES = list(itertools.product(DIALECTS, INJECTIONS))


@pytest.mark.parametrize(("dialect", "injection"), MODES)
def test_batch_equals_one_by_one(dialect: str, injection: str) -> None:
    compressor = make(dialect=dialect, local_injection=injection, global_injection=injection, window=(4, 2, 3))
    inputs = make_inputs([5, 1, 8, 3], 3, 5)
    output, batched = run(compressor, inputs, torch.float64)
    leaves = cast(inputs, torch.float64, requires_grad=True)
    singles = tuple(compressor(**select(leaves, video)).tokens[0] for video in range(4))
    compressor.zero_grad(set_to_none=True)
    weighted_loss(singles).backward()
    assert_batched_equals_single(output.tokens, singles, EXACT)
    for name, expected in gradients(dict(compressor.named_parameters()) | leaves).items():
        assert_close(batched[name], expected, EXACT, f"gradient of {name} over a batch")


def test_permuting_videos_permutes_tokens() -> None:
    compressor = make()
    inputs = make_inputs([5, 1, 3])
    tokens = compressor(**inputs).tokens
    order = [2, 0, 1]
    parts = [select(inputs, video) for video in order]
    permuted = {name: torch.cat([part[name] for part in parts]) for name in inputs if name != "num_frames"}
    permuted["num_frames"] = [3, 5, 1]
    assert_batched_equals_single(compressor(**permuted).tokens, [tokens[video] for video in order], 1e-6)


def test_a_batch_of_copies_gives_copies() -> None:
    compressor = make()
    one = make_inputs([3])
    three = {name: x * 3 if name == "num_frames" else torch.cat([x] * 3) for name, x in one.items()}
    assert_batched_equals_single(compressor(**three).tokens, [compressor(**one).tokens[0]] * 3, 1e-6)


ALL_OPTIONS = {"match_evidence": True, "motion_features": True, "num_pointers": 2, "num_word_pointers": 1}


@pytest.mark.parametrize("compression", ["conditional", "unguided", "off"])
@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["plain", "all options"])
def test_several_instructions_about_one_video_equal_copies_of_it(options: dict[str, Any], compression: Any) -> None:
    compressor = make(**options)
    inputs, index = make_inputs([5, 1, 3]), [2, 0, 0, 2]
    asked = make_inputs([1] * len(index), seed=7)
    said = {name: asked[name] for name in ("instruction", "instruction_tokens", "instruction_mask")}
    shared = inputs | said | {"video_index": index}
    parts = [select(inputs, video) for video in index]
    copies = {name: torch.cat([part[name] for part in parts]) for name in ("values", "keys")}
    copied = copies | said | {"num_frames": [inputs["num_frames"][video] for video in index]}
    if compression == "off":
        together, apart = (compressor(**x, compression="off").tokens for x in (shared, copied))
        assert_batched_equals_single(together, apart, 1e-6)
        return
    (together, found), (apart, expected) = (
        run(compressor, x, torch.float64, compression=compression) for x in (shared, copied)
    )
    assert_batched_equals_single(together.tokens, apart.tokens, EXACT)
    assert_batched_equals_single(together.local_attention, apart.local_attention, EXACT)
    for name in dict(compressor.named_parameters()):
        if name in expected:
            assert_close(found[name], expected[name], EXACT, f"gradient of {name}")


chunks = st.lists(st.integers(1, 5), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(
    chunks,
    st.sampled_from(MODES),
    st.sampled_from([(4, 3, 3), (2, 2, 2), (3, 4, 2), (1, 1, 1), (5, 2, 9)]),
    st.booleans(),
    st.booleans(),
)
def test_stream_equals_one_shot(
    sizes: list[int], mode: tuple[str, str], window: tuple[int, int, int], knows_length: bool, use_logit_scale: bool
) -> None:
    dialect, injection = mode
    knows_length = knows_length or (dialect == "release" and injection != "direct")
    compressor = make(
        dialect=dialect,
        local_injection=injection,
        global_injection=injection,
        local_gates="qkvg",
        local_logit_scale=use_logit_scale,
        global_logit_scale=use_logit_scale,
    ).double()
    inputs = cast(make_inputs([sum(sizes)], 3, 5), torch.float64)
    with torch.no_grad():
        expected = compressor(**inputs, window=window).tokens[0]
        stream = compressor.stream(
            **{name: x for name, x in inputs.items() if name.startswith("instruction")},
            window=window,
            num_frames=sum(sizes) if knows_length else None,
        )
        for values, keys in zip(inputs["values"].split(sizes), inputs["keys"].split(sizes), strict=True):
            stream.push(values, keys)
        found = stream.finish()
    assert_close(found, expected, EXACT, "tokens of a stream (are windows closed too early, or frames misnumbered?)")


@pytest.mark.parametrize("compression", ["conditional", "unguided"])
def test_stream_gradients_equal_one_shot(compression: str) -> None:
    compressor = make(local_injection="coarse", window=(4, 2, 3))
    inputs = make_inputs([9])
    _, expected = run(compressor, inputs, torch.float64, compression=compression)
    leaves = cast(inputs, torch.float64, requires_grad=True)
    compressor.zero_grad(set_to_none=True)
    stream = compressor.stream(leaves["instruction"], compression=compression)
    for first, last in itertools.pairwise((0, 2, 3, 8, 9)):
        stream.push(leaves["values"][first:last], leaves["keys"][first:last])
    weighted_loss((stream.finish(),)).backward()
    found = gradients(dict(compressor.named_parameters()) | leaves)
    assert found.keys() == expected.keys()
    for name in expected:
        assert_close(found[name], expected[name], EXACT, f"gradient of {name} through a stream")


def test_stream_holds_few_frames() -> None:
    """Memory must not grow with the length: only frames of windows that are still open wait."""
    compressor = make(window=(4, 2, 3))
    inputs = make_inputs([64])
    stream = compressor.stream(inputs["instruction"])
    for values, keys in zip(inputs["values"], inputs["keys"], strict=True):
        stream.push(values[None], keys[None])
        num_waiting = sum(len(waiting) for waiting, _ in stream.waiting)
        assert num_waiting <= 4 * 4, f"{num_waiting} frames wait for windows of 4; are closed ones dropped?"
    assert_close(stream.finish(), compressor(**inputs).tokens[0], FLOAT32, "tokens of 64 single frames")


def test_stream_of_logits_far_apart_stays_finite() -> None:
    """The online softmax rescales by the running maximum."""
    compressor = make(window=None)
    inputs = make_inputs([3])
    inputs["values"] = inputs["values"] * torch.tensor([1.0, 2000.0, 1e-3])[:, None, None, None]
    stream = compressor.stream(inputs["instruction"])
    for values in inputs["values"]:
        stream.push(values[None])
    assert_close(stream.finish(), compressor(**inputs).tokens[0], FLOAT32, "tokens of loud and quiet frames")


def test_stream_rejects_misuse() -> None:
    compressor = make()
    inputs = make_inputs([3])
    values, keys = inputs["values"], inputs["keys"]
    with pytest.raises(ValueError, match="0 frames pushed"):
        compressor.stream(inputs["instruction"]).finish()
    stream = compressor.stream(inputs["instruction"], num_frames=4)
    stream.push(values, keys)
    with pytest.raises(ValueError, match="3 frames pushed, 4 expected"):
        stream.finish()
    with pytest.raises(ValueError, match="6 frames pushed into a stream of num_frames=4"):
        stream.push(values, keys)
    with pytest.raises(ValueError, match="keys"):
        stream.push(values[:1], keys[:1, :2])
    with pytest.raises(ValueError, match="keys"):
        stream.push(values[:1])
    stream.push(values[:1], keys[:1])
    stream.finish()
    with pytest.raises(ValueError, match="finished"):
        stream.push(values, keys)
    with pytest.raises(ValueError, match=r"instruction has the shape \(2, 8\)"):
        make().stream(torch.zeros(2, DIM)).push(values, keys)
    with pytest.raises(ValueError, match="pass num_frames"):
        make(dialect="release", local_injection="coarse").stream(inputs["instruction"])


# What instruction and training need


@pytest.mark.parametrize(("dialect", "injection"), MODES)
def test_global_tokens_differ_and_only_the_instruction_steers(dialect: str, injection: str) -> None:
    """At the starting point of training, not at random parameters."""
    torch.manual_seed(0)
    compressor = HybridCompressor(
        dim=16, out_dim=8, num_global_tokens=3, dialect=dialect, local_injection=injection, global_injection=injection
    )
    inputs = make_inputs([4], 6, 6, dim=16)
    other = make_inputs([4], 6, 6, dim=16, seed=2)
    swapped = inputs | {name: other[name] for name in ("instruction", "instruction_tokens")}
    tokens, steered = (compressor(**x).tokens[0] for x in (inputs, swapped))
    is_replaced = dialect == "release" and injection == "direct"
    for first, second in itertools.combinations(tokens[-3:], 2):
        assert torch.equal(first, second) == is_replaced, "global tokens are the same; do they start at zero?"
    changes = [relative_error(a, b) for a, b in ((tokens[:-3], steered[:-3]), (tokens[-3:], steered[-3:]))]
    if injection == "none":
        assert changes == [0, 0]
    else:
        assert min(changes) > 1e-6, f"the instruction leaves a branch as it was: {changes}"


@pytest.mark.parametrize("use_logit_scale", [False, True], ids=["", "logit_scale"])
@pytest.mark.parametrize(("dialect", "injection"), MODES)
def test_every_trainable_parameter_gets_a_gradient(dialect: str, injection: str, use_logit_scale: bool) -> None:
    compressor = make(
        dialect=dialect,
        local_injection=injection,
        global_injection=injection,
        local_gates="qkvg",
        global_gates="g",
        local_logit_scale=use_logit_scale,
        global_logit_scale=use_logit_scale,
    )
    run(compressor, make_inputs([5, 3]), torch.float64)
    # What normalises keys after their projection makes its bias count.
    zero = {*SHIFTS_OF_LOGITS, "injector.attention.k_proj.bias"} - ({"k_proj.bias"} if use_logit_scale else set())
    assert_all_trainable_get_grad(compressor, zero=zero)


@pytest.mark.parametrize(("dialect", "injection"), MODES)
def test_training_from_the_starting_point_moves_every_parameter(dialect: str, injection: str) -> None:
    """Closed gates and flat starting points must not lock a parameter for good: three steps reach all of them."""
    torch.manual_seed(0)
    compressor = HybridCompressor(
        dim=DIM,
        out_dim=OUT_DIM,
        window=(2, 2, 2),
        num_global_tokens=2,
        dialect=dialect,
        local_injection=injection,
        global_injection=injection,
        local_gates="qkvg",
        global_gates="g",
    ).double()
    inputs = cast(make_inputs([5, 3]), torch.float64)
    optimizer = torch.optim.Adam(compressor.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        weighted_loss(compressor(**inputs).tokens).backward()
        optimizer.step()
    assert_all_trainable_get_grad(compressor, zero=SHIFTS_OF_LOGITS)


def test_direct_injection_of_the_paper_starts_as_the_identity() -> None:
    compressor = HybridCompressor(dim=DIM, out_dim=OUT_DIM)
    instruction = torch.randn(3, DIM)
    torch.testing.assert_close(compressor.local.injector.embed(instruction), instruction)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_attention_maps_sum_to_one_and_come_on_request_only(dialect: str) -> None:
    compressor = make(dialect=dialect, window=(4, 2, 3), dim=256)
    inputs = make_inputs([5, 1, 3], 3, 5, dim=256)
    output = compressor(**inputs, return_attention=True)
    for num_frames, local, global_ in zip([5, 1, 3], output.local_attention, output.global_attention, strict=True):
        groups = (-(-num_frames // 4), 2, 2)
        assert local.shape == (*groups, min(4, num_frames), 2, 3)
        assert global_.shape == (2, 2, num_frames, 3, 5)
        torch.testing.assert_close(local.sum((3, 4, 5)), torch.ones(groups))
        torch.testing.assert_close(global_.sum((2, 3, 4)), torch.ones(2, 2))
        assert local.min() >= 0
        assert global_.min() >= 0
    silent = compressor(**inputs)
    assert silent.local_attention is silent.global_attention is None, "attention maps came without a request"
    assert all(torch.equal(a, b) for a, b in zip(silent.tokens, output.tokens, strict=True))


@pytest.mark.parametrize("window", [None, (4, 3, 3), (1, 1, 1), (3, 2, 5), (99, 99, 99)], ids=str)
@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 7, 7), (2, 3, 4), (5, 5, 7), (8, 6, 6), (13, 2, 3)], ids=str)
def test_token_count_is_what_comes_out(grid: tuple[int, int, int], window: tuple[int, int, int] | None) -> None:
    num_frames, height, width = grid
    compressor = make()
    inputs = make_inputs([num_frames], height, width)
    assert_counts_agree(compressor.token_count, compressor(**inputs, window=window).tokens[0], *grid, window)
    assert_counts_agree(compressor.token_count, compressor(**inputs, compression="off").tokens[0], *grid, None, "off")


def test_bfloat16_is_near_float32() -> None:
    for dialect, injection in MODES:
        compressor = make(dialect=dialect, local_injection=injection, global_injection=injection).bfloat16()
        inputs = cast(make_inputs([3, 5]), torch.bfloat16)
        rough = compressor(**inputs).tokens
        exact = compressor.float()(**cast(inputs, torch.float32)).tokens
        assert all(x.dtype == torch.bfloat16 for x in rough)
        for a, b in zip(rough, exact, strict=True):
            assert relative_error(a, b) < 0.05, f"{dialect} {injection}"


def test_half_precision_survives_large_features() -> None:
    """Encoders have outlier channels; a softmax of half precision logits must not overflow."""
    compressor = make().bfloat16()
    inputs = cast(make_inputs([3]), torch.bfloat16)
    inputs["values"] = inputs["values"] * 200
    assert all(torch.isfinite(x).all() for x in compressor(**inputs).tokens)


def test_state_dict_round_trip() -> None:
    source, target = (
        make(local_gates="qkvg", local_injection="coarse"),
        make(seed=5, local_gates="qkvg", local_injection="coarse"),
    )
    target.load_state_dict(source.state_dict())
    inputs = make_inputs([3])
    assert torch.equal(source(**inputs).tokens[0], target(**inputs).tokens[0])


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_injection": "directly"}, "local_injection='directly' is not one of direct, coarse, fine, none"),
        ({"global_injection": "film"}, "global_injection='film'"),
        ({"dialect": "paper2"}, "dialect='paper2' is not one of paper, release"),
        ({"local_gates": "qx"}, "local_gates='qx'"),
        ({"global_gates": "q"}, "global_gates='q'"),
        ({"window": None, "num_global_tokens": 0}, "no branch"),
        ({"num_global_tokens": -1}, "num_global_tokens=-1"),
        ({"num_pointers": -1}, "num_pointers=-1"),
        ({"window": (4, 3)}, r"window=\(4, 3\)"),
        ({"window": (4, 0, 3)}, r"window=\(4, 0, 3\)"),
    ],
)
def test_rejects_impossible_choices(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(4, 3, 4)}, r"values .*\(4, 3, 4\)"),
        ({"values": torch.zeros(4, 3, 4, 9)}, r"values .*\(4, 3, 4, 9\)"),
        ({"keys": torch.zeros(4, 3, 5, DIM)}, r"keys .*\(4, 3, 5, 8\)"),
        ({"num_frames": [3, 2]}, r"num_frames=\[3, 2\].* 4 frames"),
        ({"num_frames": [4, 0]}, r"num_frames=\[4, 0\]"),
        ({"num_frames": []}, r"num_frames=\[\]"),
        ({"instruction": None}, "direct injection needs instruction"),
        ({"instruction": torch.zeros(1, DIM)}, r"instruction .*\(1, 8\); 2 videos need float\[2, 8\]"),
        ({"instruction": torch.zeros(2, 5)}, r"instruction .*\(2, 5\)"),
        ({"instruction_tokens": torch.zeros(2, DIM)}, r"instruction_tokens .*\(2, 8\)"),
        ({"instruction_tokens": None}, "fine injection needs instruction_tokens"),
        ({"instruction_mask": torch.ones(2, LENGTH + 1)}, r"instruction_mask .*\(2, 5\)"),
        ({"instruction_mask": torch.tensor([[1] * LENGTH, [0] * LENGTH])}, "instruction_mask of video 1 has no real"),
        ({"window": (2, -1, 2)}, r"window=\(2, -1, 2\)"),
        ({"compression": "of"}, "compression='of'"),
        ({"video_index": [0, 2]}, r"video_index=\[0, 2\] must name some of 2 videos"),
        ({"video_index": []}, r"video_index=\[\]"),
        ({"video_index": [0, 1, 1]}, r"instruction .*\(2, 8\); 3 entries of video_index need"),
    ],
)
def test_rejects_inputs_that_disagree(change: dict[str, Any], message: str) -> None:
    compressor = make(global_injection="fine")
    with pytest.raises(ValueError, match=message):
        compressor(**make_inputs([3, 1]) | change)


def test_rejects_values_as_keys_of_another_width() -> None:
    compressor = make(instruction_dim=10)
    with pytest.raises(ValueError, match="keys"):
        compressor(**make_inputs([2], instruction_dim=10) | {"keys": None})


def test_rejects_a_window_without_a_local_branch() -> None:
    compressor = make(window=None)
    with pytest.raises(ValueError, match="need a local branch"):
        compressor(**make_inputs([2]), window=(2, 2, 2))


def test_release_direct_global_cannot_run_unguided() -> None:
    compressor = make(dialect="release", global_injection="direct")
    with pytest.raises(ValueError, match="unguided"):
        compressor(**make_inputs([2]), compression="unguided")


@pytest.mark.parametrize(
    "options", [{}, {"dialect": "release"}, {"global_logit_scale": True}, {"match_evidence": True}]
)
def test_chunks_of_logits_change_nothing(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    compressor, inputs = make(**options).double(), cast(make_inputs([5, 9, 1]), torch.float64)
    with torch.no_grad():
        whole = torch.cat(compressor(**inputs).tokens)
        monkeypatch.setattr("hicom.model.compressor.MAX_LOGITS", 100)
        chunked = torch.cat(compressor(**inputs).tokens)
    assert not torch.equal(chunked, whole)  # other sums, so other last bits: there were chunks
    assert relative_error(chunked, whole) < EXACT
