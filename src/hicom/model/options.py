"""Options of the compressor beyond the paper, each off by default: match evidence, motion features, pointers.

Each starts where it changes nothing or little: evidence and motion at exactly the plain compressor, a pointer's query
at the instruction itself. `docs/paper_to_code.md` says what each is for.

Legend: V videos, F packed frames (of all videos, one after the other), T frames of one video, H W patch grid, M
attention rows, P pointers, B time bins, D vision width, K width of keys and instruction, C output width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

OFFSETS = (-2, -1, 1, 2)
"""Frames that motion is seen against, relative to a patch's own."""
REACH = max(OFFSETS)
NUM_CORRELATIONS = len(OFFSETS) * 9
VALUE_FEATURES, MOTION_HIDDEN = 32, 64

CONTRAST = 4.0
"""Places, paths and correlations vary by a fraction of one, features by one or more: this makes them alike. Without it
an optimiser needs several times the steps until motion counts at all."""

NUM_BINS = 8
POINTER_FEATURES = (2 * NUM_BINS + 6 + 2) + NUM_BINS + 3
"""x and y of 8 time bins, `path_features` of them, mean x and y; the bins' scores; time, maximum and log-mean-exp."""


def at_least_float32(x: Tensor) -> Tensor:
    """Return `x` in a precision that a softmax over a long video can bear."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def start_as_identity(inner: nn.Linear, outer: nn.Linear) -> None:
    """Make a two-layer GELU MLP D -> 2D -> D the exact identity: GELU(x) - GELU(-x) = x."""
    dim = outer.out_features
    nn.init.zeros_(inner.bias)
    nn.init.zeros_(outer.bias)
    nn.init.eye_(inner.weight[:dim])
    nn.init.eye_(inner.weight[dim:]).neg_()
    nn.init.eye_(outer.weight[:, :dim])
    nn.init.eye_(outer.weight[:, dim:]).neg_()


def pad_videos(x_FHWD: Tensor, num_frames: Sequence[int]) -> Tensor:
    """Return packed frames as `float[V, T, H, W, D]`, zero beyond a video's end."""
    if min(num_frames) == max(num_frames):
        return rearrange(x_FHWD, "(v t) h w d -> v t h w d", t=num_frames[0])
    return nn.utils.rnn.pad_sequence(list(x_FHWD.split(list(num_frames))), batch_first=True)


def real_frames(num_frames: Sequence[int], device: torch.device) -> Tensor:
    """Return `bool[V, T]`: True on frames of `pad_videos` that a video has."""
    return torch.arange(max(num_frames), device=device) < torch.tensor(num_frames, device=device)[:, None]


def match_features(logits: Tensor, num_patches: int | Tensor) -> Tensor:
    """Return `float[..., 2]`: maximum and log-mean-exp over the last axis, where `num_patches` logits are not -inf."""
    count = torch.as_tensor(num_patches, dtype=logits.dtype, device=logits.device)
    return torch.stack([logits.amax(-1), logits.logsumexp(-1) - count.log()], -1)


class MatchEvidence(nn.Module):
    """How well a query's best patches match it, added to what it attended to.

    A softmax cannot say that nothing matches: it gives weights of sum 1 to whatever is there. The logits before it can.

    Keyword Args:
        dim: vision width D.
        num_heads: heads of a query.
    """

    def __init__(self, *, dim: int, num_heads: int = 1) -> None:
        super().__init__()
        self.proj = nn.Linear(2 * num_heads, dim)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start as nothing."""
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Return the addition `float[..., D]` for `match_features` of every head, `float[..., 2 heads]`."""
        return self.proj(features)


class MotionFeatures(nn.Module):
    """Adds to every patch what its neighbourhood did two frames back and ahead; features of single frames cannot know.

    Keyword Args:
        dim: vision width D.
        key_dim: width K of the keys.
    """

    def __init__(self, *, dim: int, key_dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.appearance = nn.Linear(dim, VALUE_FEATURES)
        self.inner = nn.Linear(NUM_CORRELATIONS + VALUE_FEATURES, MOTION_HIDDEN)
        self.outer = nn.Linear(MOTION_HIDDEN, dim + key_dim)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start as nothing."""
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def correlations(self, x_FHWK: Tensor, num_frames: Sequence[int]) -> Tensor:
        """Return `float[F, H, W, 36]`: cosines of every patch with 3x3 patches of 4 frames, 0 where there is none."""
        frames, height, width, _ = x_FHWK.shape
        length = torch.tensor(num_frames, device=x_FHWK.device)
        first = length.cumsum(0) - length
        place = torch.arange(frames, device=x_FHWK.device) - first.repeat_interleave(length, output_size=frames)
        length = length.repeat_interleave(length, output_size=frames)
        unit = F.normalize(x_FHWK, dim=-1)
        # Neighbours are views of one padded copy.
        padded = F.pad(unit, (0, 0, 1, 1, 1, 1, 0, REACH))
        ahead: dict[tuple[int, int, int], Tensor] = {}
        for offset, row, column in product(OFFSETS[len(OFFSETS) // 2 :], range(3), range(3)):
            neighbour = padded[offset : offset + frames, row : row + height, column : column + width]
            # The frame beside the last one of a packed video belongs to another video.
            exists = rearrange(place + offset < length, "f -> f 1 1")
            ahead[offset, row, column] = (unit * neighbour).sum(-1) * exists
        maps = []
        for offset, row, column in product(OFFSETS, range(3), range(3)):
            if offset > 0:
                maps.append(ahead[offset, row, column])
                continue
            # To look back from here is to look ahead from there: the same cosine, seen from its other end.
            there = F.pad(ahead[-offset, 2 - row, 2 - column], (1, 1, 1, 1, -offset, 0))
            maps.append(there[:frames, row : row + height, column : column + width])
        return torch.stack(maps, -1)

    def forward(
        self, values_FHWD: Tensor, keys_FHWK: Tensor | None, num_frames: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        """Return values and keys with motion. Without keys, motion is that of the values."""
        correlations = self.correlations(values_FHWD if keys_FHWK is None else keys_FHWK, num_frames)
        # Which of nine neighbours is the most alike says how a patch moves; how alike all are says little.
        among_nine = correlations.unflatten(-1, (len(OFFSETS), 9))
        contrasts = CONTRAST * (among_nine - among_nine.mean(-1, keepdim=True)).flatten(-2)
        features = torch.cat([contrasts, self.appearance(values_FHWD)], -1)
        addition = self.outer(F.gelu(self.inner(features)))
        values = values_FHWD + addition[..., : self.dim]
        return values, None if keys_FHWK is None else keys_FHWK + addition[..., self.dim :]


class MotionStream:
    """Motion features of one video in chunks: a frame waits until the two after it are known."""

    def __init__(self, motion: MotionFeatures) -> None:
        self.motion = motion
        self.held: list[tuple[Tensor, Tensor | None]] = []
        # Of the held frames, those at the front that are out and only serve the ones behind them.
        self.num_out = 0

    def push(self, values: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Take the next frames and return those that are ready, maybe none, with their motion."""
        self.held.append((values, keys))
        return self._release(-REACH)

    def finish(self) -> tuple[Tensor, Tensor | None]:
        """Return the frames that were still waiting."""
        return self._release(0)

    def _release(self, end: int) -> tuple[Tensor, Tensor | None]:
        values = torch.cat([v for v, _ in self.held])
        keys = None if self.held[0][1] is None else torch.cat([k for _, k in self.held if k is not None])
        num_ready = max(self.num_out, len(values) + end)
        ready = slice(self.num_out, num_ready)
        if num_ready > self.num_out:
            moved, moved_keys = self.motion(values, keys, [len(values)])
        else:
            moved, moved_keys = values, keys
        keep = max(0, num_ready - REACH)
        self.held = [(values[keep:], None if keys is None else keys[keep:])]
        self.num_out = num_ready - keep
        return moved[ready], None if moved_keys is None else moved_keys[ready]


def frame_times(num_frames: Tensor, first: int, last: int) -> Tensor:
    """Return `float64[V, T]`: centres of the frames `first` to `last` on a time axis from -1 to 1.

    Args:
        num_frames: `int[V]`, length of the videos.
        first: number of the first frame.
        last: number of the frame after the last.
    """
    place = torch.arange(first, last, dtype=torch.float64, device=num_frames.device)
    return (2 * place + 1) / num_frames[:, None] - 1


def bin_weights(num_frames: Tensor, longest: int) -> Tensor:
    """Return `float64[V, B, T]`: the part of every time bin that every frame covers, where both fill the video evenly.

    It averages frames where they are many and repeats them where they are few; frames beyond the end weigh 0.
    """
    length = num_frames[:, None, None]
    places = torch.arange(longest, dtype=torch.float64, device=num_frames.device)
    bins = torch.arange(NUM_BINS, dtype=torch.float64, device=num_frames.device)[:, None]
    left = torch.maximum(bins / NUM_BINS, places / length)
    right = torch.minimum((bins + 1) / NUM_BINS, (places + 1) / length)
    return (right - left).clamp(min=0) * NUM_BINS


def path_features(trajectory_VPB3: Tensor) -> Tensor:
    """Return `float[V, P, 6]`: velocity (x, y), spread (x, y) and speed (x, y) of a trajectory (x, y, score).

    Bins count as much as the softmax of their scores. What moves has a velocity; what goes back and forth has none, but
    a spread; what stays has neither.
    """
    position, score = trajectory_VPB3[..., :2], trajectory_VPB3[..., 2]
    weight, bins = score.softmax(-1)[..., None], score.shape[-1]
    time = ((2 * torch.arange(bins).to(position) + 1) / bins - 1)[:, None]
    time = time - (weight * time).sum(2, keepdim=True)
    offset = position - (weight * position).sum(2, keepdim=True)
    velocity = (weight * time * offset).sum(2) / ((weight * time**2).sum(2) + 1e-3)
    spread = ((weight * offset**2).sum(2) + 1e-6).sqrt()
    # A step counts as the geometric mean of its ends. Bins are 2 / bins of time apart.
    both = ((score[..., 1:] + score[..., :-1]) / 2).softmax(-1)[..., None]
    speed = (both * position.diff(dim=2).abs()).sum(2) * (bins / 2)
    return torch.cat([velocity, spread, speed], -1)


def main_words(pooled_VK: Tensor, tokens_VLK: Tensor, mask_VL: Tensor | None, number: int) -> Tensor:
    """Return what an instruction is mostly about, `float[V, number, K]`: its words nearest to it, in its own order.

    A pooled embedding of two names lies between them and cannot keep them apart; the words can. Only texts decide, so
    that a stream knows what it looks for before the first frame. Where words are too few, the instruction itself stands
    in; so it does for the token that was pooled (CLIP's last one), which is no word.

    Args:
        pooled_VK: the pooled instruction.
        tokens_VLK: an embedding of every token.
        mask_VL: True on real tokens; None: all are.
        number: words to return.
    """
    cosine = F.cosine_similarity(at_least_float32(tokens_VLK), at_least_float32(pooled_VK)[:, None], dim=-1)
    is_word = cosine < 1 - 1e-5
    if mask_VL is not None:
        is_word = is_word & mask_VL.bool()
    length = cosine.shape[1]
    nearest = cosine.masked_fill(~is_word, -math.inf).topk(min(number, length), dim=1)
    # The instruction itself is the last candidate, and takes the places that have no word.
    place = nearest.indices.masked_fill(nearest.values == -math.inf, length).sort(dim=1).values
    place = F.pad(place, (0, max(0, number - length)), value=length)
    candidates = torch.cat([tokens_VLK, pooled_VK[:, None].to(tokens_VLK)], 1)
    return candidates.gather(1, repeat(place, "v w -> v w k", k=candidates.shape[-1]))


class PointerInjector(nn.Module):
    """What one pointer looks for, and when: an MLP as in the paper's direct injection, and a curve over time.

    Keyword Args:
        dim: width K of the instruction.
        noise: standard deviation of what is added to the identity at the start, so that several pointers differ.
    """

    def __init__(self, *, dim: int, noise: float) -> None:
        super().__init__()
        self.noise = noise
        self.inner = nn.Linear(dim, 2 * dim)
        self.outer = nn.Linear(2 * dim, dim)
        self.time = nn.Linear(dim, 2)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start at the instruction, any time alike."""
        start_as_identity(self.inner, self.outer)
        if self.noise:
            self.outer.weight.add_(torch.randn_like(self.outer.weight), alpha=self.noise)
        nn.init.zeros_(self.time.weight)
        nn.init.zeros_(self.time.bias)

    def forward(self, instruction_VK: Tensor) -> tuple[Tensor, Tensor]:
        """Return the query `float[V, K]` and weights `float[V, 2]` of time and its square."""
        return self.outer(F.gelu(self.inner(instruction_VK))), self.time(instruction_VK)


class MatchPointers(nn.Module):
    """Tokens that report where and when the instruction matches: softmax over the video, its path and its strength.

    Keyword Args:
        dim: vision width D.
        key_dim: width K of keys and instruction.
        out_dim: output width C.
        num_pointers: tokens P.
        num_words: how many of them, the last ones, look for one word of the instruction each and not for all of it.
        is_conditional: whether there is an instruction to look for; else, and unguided, the queries are learnt vectors.
    """

    def __init__(
        self, *, dim: int, key_dim: int, out_dim: int, num_pointers: int, is_conditional: bool, num_words: int = 0
    ) -> None:
        super().__init__()
        self.num_words = num_words if is_conditional else 0
        self.query = nn.Parameter(torch.empty(num_pointers, key_dim))
        self.injector = (
            nn.ModuleList(
                PointerInjector(dim=key_dim, noise=0.02 if p else 0.0) for p in range(num_pointers - num_words)
            )
            if is_conditional
            else None
        )
        # One for all words: which place a word has in the instruction does not change how it is looked for.
        self.word_injector = PointerInjector(dim=key_dim, noise=0.0) if self.num_words else None
        self.logit_scale = nn.Parameter(torch.zeros(1))
        self.readout = nn.Sequential(nn.Linear(dim + POINTER_FEATURES, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start at SigLIP's temperature of 10 and with different learnt queries."""
        nn.init.constant_(self.logit_scale, math.log(10))
        nn.init.normal_(self.query, std=0.02)

    def queries(
        self, instruction_VK: Tensor | None, words_VWK: Tensor | None, num_videos: int
    ) -> tuple[Tensor, Tensor]:
        """Return queries `float[V, P, K]` and weights of time and its square, `float[V, P, 2]`.

        Args:
            instruction_VK: the pooled instruction; None: the learnt queries, at all times alike.
            words_VWK: what word pointers look for (`main_words`); None: there are no such pointers.
            num_videos: videos.
        """
        if instruction_VK is None or self.injector is None:
            return self.query.expand(num_videos, -1, -1), self.query.new_zeros(num_videos, len(self.query), 2)
        found = [injector(instruction_VK) for injector in self.injector]
        if self.word_injector is not None:
            assert words_VWK is not None
            found += [self.word_injector(word) for word in words_VWK.unbind(1)]
        queries, times = zip(*found, strict=True)
        return torch.stack(queries, 1), torch.stack(times, 1)

    def logits(
        self, query_VPK: Tensor, time_VP2: Tensor, keys_VTHWK: Tensor, num_frames: Sequence[int], start: int
    ) -> Tensor:
        """Return `float[V, P, T, H, W]`: scaled cosines plus time, over frames from the number `start`.

        Raises:
            ValueError: values stand in for keys and have another width.
        """
        if keys_VTHWK.shape[-1] != query_VPK.shape[-1]:
            raise ValueError(
                f"keys=None, but values of width {keys_VTHWK.shape[-1]} cannot be keys of width {query_VPK.shape[-1]}, "
                "which pointers need; pass keys"
            )
        query, keys = (F.normalize(at_least_float32(x), dim=-1) for x in (query_VPK, keys_VTHWK))
        cosine = torch.einsum("vpk,vthwk->vpthw", query, keys)
        time = frame_times(torch.tensor(num_frames), start, start + keys.shape[1]).to(cosine)
        bias = at_least_float32(time_VP2) @ torch.stack([time, time**2], 1)
        return at_least_float32(self.logit_scale).exp() * cosine + bias[..., None, None]

    def per_frame(self, logits_VPTHW: Tensor) -> Tensor:
        """Return `float[V, P, T, 3]`: where in each frame (x, y from -1 to 1), and how well (log-mean-exp)."""
        height, width = logits_VPTHW.shape[-2:]
        attention = logits_VPTHW.flatten(3).softmax(-1).view(logits_VPTHW.shape)
        x, y = ((2 * torch.arange(n).to(attention) + 1) / n - 1 for n in (width, height))
        score = logits_VPTHW.flatten(3).logsumexp(-1) - math.log(height * width)
        return torch.stack([attention.sum(-2) @ x, attention.sum(-1) @ y, score], -1)

    def read(self, context_VPD: Tensor, maximum_VP: Tensor, frames_VPT3: Tensor, num_frames: Sequence[int]) -> Tensor:
        """Return tokens `float[V, P, C]`.

        Args:
            context_VPD: values averaged under the softmax over the video.
            maximum_VP: the largest logit.
            frames_VPT3: of `per_frame`; finite beyond a video's end.
            num_frames: frames of every video.
        """
        length, longest = torch.tensor(num_frames), frames_VPT3.shape[2]
        trajectory = torch.einsum("vbt,vpte->vpbe", bin_weights(length, longest).to(frames_VPT3), frames_VPT3)
        real = rearrange(real_frames(num_frames, frames_VPT3.device), "v t -> v 1 t")
        position, score = frames_VPT3[..., :2], frames_VPT3[..., 2].masked_fill(~real, -math.inf)
        # The softmax over all patches is one over frames, times the one inside each frame.
        weight = score.softmax(-1)
        mean_time = torch.einsum("vpt,vt->vp", weight, frame_times(length, 0, longest).to(weight))
        mean_position = torch.einsum("vpt,vpte->vpe", weight, position)
        log_mean_exp = score.logsumexp(-1) - length.to(score).log()[:, None]
        summary = torch.stack([mean_time, maximum_VP, log_mean_exp], -1)
        places = torch.cat([trajectory[..., :2].flatten(2), path_features(trajectory), mean_position], -1)
        context = F.layer_norm(context_VPD.to(places), context_VPD.shape[-1:])
        features = torch.cat([context, CONTRAST * places, trajectory[..., 2], summary], -1)
        return self.readout(features.to(self.query.dtype))

    def forward(
        self,
        values_FHWD: Tensor,
        keys_FHWK: Tensor,
        num_frames: Sequence[int],
        instruction_VK: Tensor | None,
        words_VWK: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return tokens `float[V, P, C]` and attention `float[V, P, T, H, W]`, zero beyond a video's end."""
        query, time = self.queries(instruction_VK, words_VWK, len(num_frames))
        values, keys = (pad_videos(x, num_frames) for x in (values_FHWD, keys_FHWK))
        logits = self.logits(query, time, keys, num_frames, 0)
        frames = self.per_frame(logits)
        if min(num_frames) < max(num_frames):
            real = real_frames(num_frames, logits.device)
            logits = logits.masked_fill(~rearrange(real, "v t -> v 1 t 1 1"), -math.inf)
        flat = logits.flatten(2)
        attention = flat.softmax(-1).to(values.dtype)
        context = attention @ rearrange(values, "v t h w d -> v (t h w) d")
        return self.read(context, flat.amax(-1), frames, num_frames), attention.view(logits.shape)
