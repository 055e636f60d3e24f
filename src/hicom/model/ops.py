"""Pure tensor functions of the compressor: windows, positions and token counts.

Everything that counts visual tokens or says which patch belongs to which window lives here, so that the processor,
the model, the server and the documentation cannot disagree.

Legend: B batch, V videos, F packed frames (of all videos, one after the other), T frames of one video,
H W patch grid, G time groups, N tokens, D vision width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from einops import rearrange
from torch import Tensor

Window = tuple[int, int, int]
"""Sizes (T, H, W) of a local window, in frames and patches."""


def check_window(window: Sequence[int]) -> Window:
    """Return `window` as a (T, H, W) tuple.

    Raises:
        ValueError: it is not three positive integers.
    """
    sizes = tuple(window)
    if len(sizes) != 3 or not all(isinstance(size, int) and size >= 1 for size in sizes):
        raise ValueError(f"window={tuple(window)!r} must be three positive integers (T, H, W), for example (4, 3, 3)")
    return sizes


def num_groups(length: int, size: int) -> int:
    """Return how many windows of `size` cover an axis of `length` places: the ceiling of their quotient."""
    return -(-length // size)


def group_starts(length: int, size: int) -> list[int]:
    """Return the first place of every window of `size` along an axis of `length` places.

    There are `g = ceil(length / size)` windows of equal size. When they do not divide the axis they overlap: `o = g *
    size - length` places are missing, and of the `g - 1` steps from one start to the next the last `o` are one place
    shorter. The released code stops there and fails for `o >= g`; the rule is extended by shortening every step by
    `o // (g - 1)` first, which changes nothing where the released code works. An axis shorter than one window makes
    one window of all its places.

    Raises:
        ValueError: `length` or `size` is below 1.
    """
    if length < 1 or size < 1:
        raise ValueError(f"length={length} and size={size} must both be at least 1")
    groups = num_groups(length, size)
    if groups == 1:
        return [0]
    missing = groups * size - length
    shorter, extra = divmod(missing, groups - 1)
    starts = [0]
    for step in range(groups - 1):
        starts.append(starts[-1] + size - shorter - (step >= groups - 1 - extra))
    return starts


def group_index(length: int, size: int) -> Tensor:
    """Return the places of every window: `int64[groups, min(size, length)]` (see `group_starts`)."""
    return torch.tensor(group_starts(length, size))[:, None] + torch.arange(min(size, length))


def grid_shape(num_frames: int, height: int, width: int, window: Window) -> tuple[int, int, int]:
    """Return the grid (T, H, W) of local tokens of one video. A single frame has a time window of 1."""
    return num_groups(num_frames, window[0]), num_groups(height, window[1]), num_groups(width, window[2])


def token_count(
    num_frames: int,
    height: int,
    width: int,
    window: Window | None,
    num_global_tokens: int = 32,
) -> int:
    """Return the number of visual tokens of one video: ceil(T/t) ceil(H/h) ceil(W/w) local ones plus the global ones.

    This is the only place that counts. Section 3 of the paper: 32 frames of 27x27 patches give 648 + 32 = 680.

    Args:
        num_frames: frames of the video; 1 for an image.
        height: rows of the patch grid.
        width: columns of the patch grid.
        window: (T, H, W) of the local branch; None without a local branch.
        num_global_tokens: tokens of the global branch; 0 without one.

    Raises:
        ValueError: a size is below 1 or the count of global tokens is negative.
    """
    if min(num_frames, height, width) < 1 or num_global_tokens < 0:
        raise ValueError(
            f"num_frames={num_frames}, height={height} and width={width} must be at least 1 and "
            f"num_global_tokens={num_global_tokens} must not be negative"
        )
    local = math.prod(grid_shape(num_frames, height, width, check_window(window))) if window is not None else 0
    return local + num_global_tokens


def choose_window(
    num_frames: int, height: int, width: int, max_visual_tokens: int, num_global_tokens: int = 32
) -> Window:
    """Return the window that spends as much of a token budget as possible.

    Among all windows (t, s, s) whose token count fits the budget, the one with the most
    tokens is taken; ties go to the window nearest to the paper's shape, whose spatial side is 3/4 of its length in
    time, because time is the more redundant axis.

    Raises:
        ValueError: the budget does not even hold one local token beside the global ones.
    """
    best: tuple[int, float, Window] | None = None
    for t, s in product(range(1, num_frames + 1), range(1, max(height, width) + 1)):
        count = token_count(num_frames, height, width, (t, s, s), num_global_tokens)
        if count <= max_visual_tokens:
            shape = -abs(math.log(s / (0.75 * t)))
            if best is None or (count, shape) > best[:2]:
                best = (count, shape, (t, s, s))
    if best is None:
        raise ValueError(
            f"max_visual_tokens={max_visual_tokens} is below the {num_global_tokens + 1} tokens that this model needs "
            "at least (its global tokens and one local token); raise the budget"
        )
    return best[2]


def sinusoidal_table(length: int, dim: int, start: int = 0) -> Tensor:
    """Return `float64[length, dim]`: sine on even, cosine on odd channels, base 10000, for places `start` onwards."""
    # float64: at place 4096 float32 angles are off by 2e-4 radians.
    channel = torch.arange(dim, dtype=torch.float64)
    angle = torch.arange(start, start + length, dtype=torch.float64)[:, None] / 10000 ** (2 * (channel // 2) / dim)
    return torch.where(torch.arange(dim) % 2 == 0, angle.sin(), angle.cos())


def sinusoidal_positions(num_frames: int, height: int, width: int, dim: int, start: int = 0) -> Tensor:
    """Return the 3-D positions of the global branch, `float64[T, H, W, D]`: the sum of one table an axis (section 3.3).

    Args:
        num_frames: frames.
        height: rows.
        width: columns.
        dim: width D; every axis uses all of it.
        start: number of the first frame, for a chunk of a longer video.
    """
    return (
        sinusoidal_table(num_frames, dim, start)[:, None, None]
        + sinusoidal_table(height, dim)[None, :, None]
        + sinusoidal_table(width, dim)[None, None]
    )


@dataclass(frozen=True)
class TimePlan:
    """Which packed frames form which time group, for a batch of videos of any lengths.

    Attributes:
        index: `int64[G, t]`, numbers of packed frames; a video shorter than the window repeats its last frame.
        mask: `bool[G, t]`, False on such repeats; None when there are none.
        low: `int64[G]`, the frame before the group's centre on the video's time axis.
        high: `int64[G]`, the frame after it.
        fraction: `float[G]`, where between them the centre lies (linear interpolation, pixel-centre convention).
        video: `int64[G]`, number of the video.
        counts: groups of every video.
        is_view: the groups are consecutive frames, so that a reshape can take the place of a gather.
    """

    index: Tensor
    mask: Tensor | None
    low: Tensor
    high: Tensor
    fraction: Tensor
    video: Tensor
    counts: list[int]
    is_view: bool

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> TimePlan:
        """Return the plan on a device, its fractions in a type; called as a tensor's `to`, since accelerate does."""
        tensors = (self.index, self.low, self.high, self.video)
        index, low, high, video = (places.to(device, non_blocking=True) for places in tensors)
        mask = None if self.mask is None else self.mask.to(device, non_blocking=True)
        fraction = self.fraction.to(device, dtype, non_blocking=True)
        return TimePlan(index, mask, low, high, fraction, video, self.counts, self.is_view)

    def slice(self, first: int, last: int, offset: int) -> TimePlan:
        """Return the groups `first` to `last` of a one-video plan, with frames renumbered from `offset`."""
        part = slice(first, last)
        return TimePlan(
            self.index[part] - offset,
            None if self.mask is None else self.mask[part],
            self.low[part] - offset,
            self.high[part] - offset,
            self.fraction[part],
            self.video[part],
            [last - first],
            False,
        )


def axis_interpolation(length: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (low, high, fraction) that resample an axis of `length` places to `groups` by linear interpolation.

    The convention is that of pixel centres (`align_corners=False`), without a low-pass filter.
    """
    centre = ((torch.arange(groups, dtype=torch.float64) + 0.5) * length / groups - 0.5).clamp(min=0)
    low = centre.long().clamp(max=length - 1)
    return low, (low + 1).clamp(max=length - 1), centre - low


def time_plan(num_frames: Sequence[int], size: int) -> TimePlan:
    """Return the time groups of videos of `num_frames` frames each under a time window of `size` frames."""
    span = min(size, max(num_frames))
    index, mask, low, high, fraction, video, counts = [], [], [], [], [], [], []
    first = 0
    for number, frames in enumerate(num_frames):
        groups = num_groups(frames, size)
        places = torch.arange(span).clamp(max=min(size, frames) - 1)
        index.append(first + torch.tensor(group_starts(frames, size))[:, None] + places)
        mask.append((torch.arange(span) < min(size, frames)).expand(groups, -1))
        axis_low, axis_high, axis_fraction = axis_interpolation(frames, groups)
        low.append(first + axis_low)
        high.append(first + axis_high)
        fraction.append(axis_fraction)
        video.append(torch.full((groups,), number))
        counts.append(groups)
        first += frames
    is_full = all(frames >= span for frames in num_frames)
    return TimePlan(
        torch.cat(index),
        None if is_full else torch.cat(mask),
        torch.cat(low),
        torch.cat(high),
        torch.cat(fraction),
        torch.cat(video),
        counts,
        is_view=all(frames % span == 0 for frames in num_frames),
    )


def closed_groups(seen: int, size: int) -> int:
    """Return how many leading time groups are the same for every video of at least `seen` frames.

    A live stream does not know its length, and the last windows of a video overlap when its length is no multiple of
    the window. A group may be emitted once no possible length can move it. Lengths beyond `seen + size` add regular
    groups only, so that checking one period is enough.
    """
    closed = seen // size
    for length in range(max(seen, 1), seen + size):
        starts = group_starts(length, size)
        regular = next((i for i, start in enumerate(starts) if start != i * size), len(starts))
        closed = min(closed, regular)
    return closed


def gather_windows(x: Tensor, plan: TimePlan, window: Window) -> Tensor:
    """Cut packed frames into windows.

    Args:
        x: `[F, H, W, ...]`.
        plan: time groups of the frames.
        window: (T, H, W); T is the plan's.

    Returns:
        `[G, H / h, W / w, t, h, w, ...]`, windows of one size that overlap where they do not divide an axis.
    """
    height, width = x.shape[1:3]
    h, w = min(window[1], height), min(window[2], width)
    t = plan.index.shape[1]
    if plan.is_view and height % h == 0 and width % w == 0:
        return rearrange(x, "(g t) (a h) (b w) ... -> g a b t h w ...", t=t, h=h, w=w)
    rows, columns = group_index(height, window[1]).to(x.device), group_index(width, window[2]).to(x.device)
    return x[
        rearrange(plan.index, "g t -> g 1 1 t 1 1"),
        rearrange(rows, "a h -> 1 a 1 1 h 1"),
        rearrange(columns, "b w -> 1 1 b 1 1 w"),
    ]


def sum_windows(x: Tensor, weights: Tensor, plan: TimePlan, window: Window) -> Tensor:
    """Sum the features of every window under its weights.

    No window is copied where windows divide the axes: one matrix product takes a strip of `h` rows of a frame, and the
    weights of a window are zero outside of its columns. That is `W / w` times the multiplications of a copied window,
    which are few beside reading the features once.

    Args:
        x: `float[F, H, W, D]`.
        weights: `float[G, H / h, W / w, t, h, w]`.
        plan: time groups of the frames.
        window: (T, H, W).

    Returns:
        `float[G, H / h, W / w, D]`.
    """
    height, width = x.shape[1:3]
    groups, a, b, t, h, w = weights.shape
    if plan.is_view and height % h == 0:
        strips = rearrange(x, "(g t) (a h) w d -> (g t a) (h w) d", t=t, h=h)
    else:
        rows = group_index(height, window[1]).to(x.device)
        strips = x[rearrange(plan.index, "g t -> g t 1 1"), rows]
        strips = rearrange(strips, "g t a h w d -> (g t a) (h w) d")
    columns = group_index(width, window[2]).to(x.device)
    columns = rearrange(columns, "b w -> 1 1 1 b 1 w").expand(groups, t, a, b, h, w)
    spread = weights.new_zeros(groups, t, a, b, h, width)
    spread = spread.scatter(-1, columns, rearrange(weights, "g a b t h w -> g t a b h w"))
    sums = rearrange(spread, "g t a b h w -> (g t a) b (h w)") @ strips
    return rearrange(sums, "(g t a) b d -> g t a b d", t=t, a=a).sum(1)


def mean_of_groups(x: Tensor, plan: TimePlan, window: Window) -> Tensor:
    """Average packed frames over every window (the paper's pooled query).

    Args:
        x: `float[F, H, W, D]`.
        plan: time groups of the frames.
        window: (T, H, W).

    Returns:
        `float[G, ceil(H / h), ceil(W / w), D]`.
    """
    windows = gather_windows(x, plan, window)
    if plan.mask is None:
        return windows.mean((3, 4, 5))
    weight = plan.mask.to(x) / plan.mask.sum(1, keepdim=True)
    return (windows.mean((4, 5)) * rearrange(weight, "g t -> g 1 1 t 1")).sum(3)


def resample_to_groups(x: Tensor, plan: TimePlan, window: Window) -> Tensor:
    """Resample packed frames to one vector a window by trilinear interpolation (the release's pooled query).

    Args:
        x: `float[F, H, W, D]`.
        plan: time groups of the frames.
        window: (T, H, W).

    Returns:
        `float[G, ceil(H / h), ceil(W / w), D]`.
    """
    x = torch.lerp(x[plan.low], x[plan.high], rearrange(plan.fraction, "g -> g 1 1 1"))
    for axis, size in ((1, window[1]), (2, window[2])):
        low, high, fraction = axis_interpolation(x.shape[axis], num_groups(x.shape[axis], size))
        shape = [-1 if i == axis else 1 for i in range(x.ndim)]
        weight = fraction.to(x).view(shape)
        x = torch.lerp(x.index_select(axis, low.to(x.device)), x.index_select(axis, high.to(x.device)), weight)
    return x


def check_video_index(video_index: Sequence[int] | None, num_videos: int) -> None:
    """Raise ValueError where an index names a video that is not there."""
    wrong = [] if video_index is None else [video for video in video_index if not 0 <= video < num_videos]
    if wrong or (video_index is not None and len(video_index) == 0):
        raise ValueError(
            f"video_index={list(video_index or ())} must name some of {num_videos} videos by their numbers from 0"
        )


def repeat_videos(x_FHWD: Tensor, num_frames: Sequence[int], video_index: Sequence[int]) -> Tensor:
    """Return the packed frames of the videos that `video_index` names, one after the other, as often as it does."""
    parts = x_FHWD.split(list(num_frames))
    return torch.cat([parts[video] for video in video_index])
