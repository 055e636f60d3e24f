"""Windows, token counts and positions against brute force and hand-written formulas."""

import math
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hicom.model import ops

lengths = st.integers(1, 80)
sizes = st.integers(1, 20)


@settings(deadline=None)
@given(lengths, sizes)
def test_groups_cover_the_axis_with_equal_overlapping_windows(length: int, size: int) -> None:
    starts = ops.group_starts(length, size)
    span = min(length, size)
    assert len(starts) == ops.num_groups(length, size) == math.ceil(length / size), "one window too few or too many"
    assert starts[0] == 0
    assert starts[-1] + span == length
    assert {place for start in starts for place in range(start, start + span)} == set(range(length))
    steps = [after - before for before, after in pairwise(starts)]
    assert all(1 <= step <= size for step in steps)
    assert steps == sorted(steps, reverse=True), "the later steps are the shorter ones"
    assert not steps or max(steps) - min(steps) <= 1, "missing places are spread evenly"
    missing = len(starts) * size - length
    if len(starts) > missing:  # where the release works: the LAST `missing` steps are one place shorter
        assert steps == [size] * (len(steps) - missing) + [size - 1] * missing


@pytest.mark.parametrize(
    ("length", "size", "starts"),
    [
        (8, 4, [0, 4]),
        (27, 3, list(range(0, 27, 3))),
        (7, 4, [0, 3]),
        (7, 3, [0, 2, 4]),
        (10, 4, [0, 3, 6]),
        (11, 4, [0, 4, 7]),
        (5, 4, [0, 1]),  # here and below the release crashes
        (6, 4, [0, 2]),
        (9, 4, [0, 3, 5]),
        (13, 6, [0, 4, 7]),
        (3, 4, [0]),
        (1, 1, [0]),
    ],
)
def test_group_starts_by_hand(length: int, size: int, starts: list[int]) -> None:
    assert ops.group_starts(length, size) == starts


@pytest.mark.parametrize(("length", "size"), [(0, 3), (4, 0), (-1, 2)])
def test_group_starts_rejects_empty_axes(length: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"length={length}.*size={size}"):
        ops.group_starts(length, size)


@pytest.mark.parametrize(
    ("grid", "window", "num_global_tokens", "tokens"),
    [
        ((32, 27, 27), (4, 3, 3), 32, 680),
        ((64, 27, 27), (4, 3, 3), 32, 1328),
        ((128, 27, 27), (4, 3, 3), 32, 2624),
        ((1, 27, 27), (4, 3, 3), 32, 113),
        ((32, 27, 27), (1, 3, 3), 0, 2592),
        ((32, 27, 27), (4, 3, 3), 0, 648),
        ((32, 27, 27), (4, 9, 9), 32, 8 * 9 + 32),
        ((32, 27, 27), None, 32, 32),
        ((5, 5, 7), (4, 3, 3), 2, 2 * 2 * 3 + 2),
        ((3, 2, 2), (4, 3, 3), 0, 1),
        ((8, 7, 7), (4, 3, 3), 32, 50),
    ],
)
def test_token_count(
    grid: tuple[int, int, int], window: tuple[int, int, int] | None, num_global_tokens: int, tokens: int
) -> None:
    assert ops.token_count(*grid, window, num_global_tokens) == tokens


@pytest.mark.parametrize(
    ("grid", "window", "message"),
    [
        ((0, 27, 27), (4, 3, 3), "num_frames=0"),
        ((8, 27, -2), (4, 3, 3), "width=-2"),
        ((8, 27, 27), (4, 3), r"window=\(4, 3\)"),
        ((8, 27, 27), (4, 0, 3), r"window=\(4, 0, 3\)"),
        ((8, 27, 27), (4, 3.0, 3), r"window=\(4, 3.0, 3\)"),
    ],
)
def test_token_count_rejects_impossible_sizes(grid: tuple[int, ...], window: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.token_count(*grid, window)


def test_token_count_rejects_negative_global_tokens() -> None:
    with pytest.raises(ValueError, match="num_global_tokens=-1"):
        ops.token_count(8, 27, 27, (4, 3, 3), -1)


@pytest.mark.parametrize("start", [0, 5, 4000])
def test_positions_against_the_formula(start: int) -> None:
    num_frames, height, width, dim = 3, 2, 4, 10
    positions = ops.sinusoidal_positions(num_frames, height, width, dim, start)
    assert positions.shape == (num_frames, height, width, dim)
    for t, h, w, channel in product(range(num_frames), range(height), range(width), range(dim)):
        frequency = 10000 ** (-(2 * (channel // 2)) / dim)
        function = math.sin if channel % 2 == 0 else math.cos
        expected = sum(function(place * frequency) for place in (start + t, h, w))
        assert positions[t, h, w, channel].item() == pytest.approx(expected, abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 300),
    st.sampled_from([0, 4]),
)
def test_choose_window_is_the_richest_that_fits(
    num_frames: int, height: int, width: int, budget: int, num_global_tokens: int
) -> None:
    if budget < num_global_tokens + 1:
        with pytest.raises(ValueError, match=f"max_visual_tokens={budget}"):
            ops.choose_window(num_frames, height, width, budget, num_global_tokens)
        return
    t, s, also_s = ops.choose_window(num_frames, height, width, budget, num_global_tokens)
    assert s == also_s
    chosen = ops.token_count(num_frames, height, width, (t, s, s), num_global_tokens)
    fitting = [
        count
        for t, s in product(range(1, num_frames + 1), range(1, max(height, width) + 1))
        if (count := ops.token_count(num_frames, height, width, (t, s, s), num_global_tokens)) <= budget
    ]
    assert chosen == max(fitting)


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(1, 8))
def test_closed_groups_stay_where_they_are_whatever_follows(seen: int, size: int) -> None:
    """What a live stream has emitted must be right for every length the video can still have."""
    closed = ops.closed_groups(seen, size)
    assert closed * size <= seen
    regular = [start * size for start in range(closed)]
    for length in range(max(seen, 1), seen + 6 * size):
        found = ops.group_starts(length, size)[:closed]
        assert found == regular, f"{closed} windows closed after {seen} frames, but {length} frames would move them"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
def test_gathered_windows_hold_the_right_patches(num_frames: list[int], t: int, h: int, w: int) -> None:
    height, width = 5, 4
    patches = torch.arange(sum(num_frames) * height * width).reshape(-1, height, width)
    plan = ops.time_plan(num_frames, t)
    windows = ops.gather_windows(patches, plan, (t, h, w))
    group, first = 0, 0
    for frames in num_frames:
        for start_t in ops.group_starts(frames, t):
            members = range(first + start_t, first + start_t + min(t, frames))
            for i, start_h in enumerate(ops.group_starts(height, h)):
                for j, start_w in enumerate(ops.group_starts(width, w)):
                    expected = patches[members.start : members.stop, start_h : start_h + h, start_w : start_w + w]
                    found = windows[group, i, j]
                    if plan.mask is not None:
                        found = found[plan.mask[group]]
                    assert torch.equal(found, expected)
            group += 1
        first += frames
    assert group == sum(plan.counts) == len(plan.video)


@pytest.mark.parametrize("num_frames", [[8, 4], [5, 3, 1]])
@pytest.mark.parametrize("window", [(4, 3, 3), (2, 4, 2), (1, 1, 1), (9, 9, 9)])
def test_sums_of_windows_are_those_of_copied_windows(num_frames: list[int], window: ops.Window) -> None:
    plan = ops.time_plan(num_frames, window[0])
    x = torch.randn(sum(num_frames), 6, 5, 7, dtype=torch.float64)
    copied = ops.gather_windows(x, plan, window)
    weights = torch.randn(copied.shape[:-1], dtype=torch.float64)
    expected = torch.einsum("gabthw,gabthwd->gabd", weights, copied)
    torch.testing.assert_close(ops.sum_windows(x, weights, plan, window), expected)
