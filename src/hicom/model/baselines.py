"""What the paper's compressor is compared with: unconditional ways to make few tokens of many patches.

All have the interface of `HybridCompressor` (`forward` and `token_count`) and use the values alone; keys and
instruction are accepted so that one can take the place of another, and have no influence. `COMPRESSORS` lists all.

Legend: V videos, F packed frames (of all videos, one after the other), T frames of one video, H W patch grid, G time
groups, A B windows of one group along height and width, P patches, N queries, D vision width, C output width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from .compressor import CompressorOutput, HybridCompressor, mlp
from .ops import Window, check_window, mean_of_groups, num_groups, sinusoidal_table, time_plan, token_count


class Baseline(nn.Module, ABC):
    """The interface of `HybridCompressor` for compressors that see nothing but the values of the patches.

    Keyword Args:
        dim: vision width D.
    """

    has_modes = False
    needs_instruction = False
    needs_instruction_tokens = False

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.dim = dim

    @abstractmethod
    def token_count(self, num_frames: int, height: int, width: int, window: Window | None = None) -> int:
        """Return how many tokens a video of `num_frames` frames of `height` x `width` patches becomes."""

    @abstractmethod
    def compress(
        self, values_FHWD: Tensor, num_frames: list[int], window: Window | None, return_attention: bool
    ) -> CompressorOutput:
        """Compress checked values; `forward` without the arguments that have no influence."""

    def forward(
        self,
        values: Tensor,
        keys: Tensor | None,
        num_frames: Sequence[int],
        instruction: Tensor | None = None,
        instruction_tokens: Tensor | None = None,
        instruction_mask: Tensor | None = None,
        window: Window | None = None,
        return_attention: bool = False,
    ) -> CompressorOutput:
        """Compress a batch of videos.

        Args:
            values: `float[F, H, W, D]`, patch features of all videos' frames, one video after the other.
            keys: without influence.
            num_frames: frames of every video; their sum is F.
            instruction: without influence.
            instruction_tokens: without influence.
            instruction_mask: without influence.
            window: (T, H, W) in place of the default, for pooling over windows.
            return_attention: also return attention maps, where there is attention.

        Raises:
            ValueError: shapes or counts disagree, or a window is asked for where there is none.
        """
        num_frames = [int(frames) for frames in num_frames]
        if values.ndim != 4 or values.shape[-1] != self.dim:
            raise ValueError(f"values must be float[F, H, W, {self.dim}], got the shape {tuple(values.shape)}")
        if not num_frames or min(num_frames) < 1 or sum(num_frames) != len(values):
            raise ValueError(f"num_frames={num_frames} must be positive and sum to the {len(values)} frames of values")
        return self.compress(values, num_frames, window, return_attention)

    def reject_window(self, window: Window | None) -> None:
        """Raise ValueError if a window is asked for: this compressor has none."""
        if window is not None:
            raise ValueError(f"window={window} has no meaning for {type(self).__name__}; leave it out")


def split_grid(tokens_GABC: Tensor, counts: list[int]) -> tuple[Tensor, ...]:
    """Return `float[N_v, C]` for every video from a grid of tokens whose first axis holds `counts` a video."""
    return tuple(part.flatten(0, 2) for part in torch.split(tokens_GABC, counts))


class SpaceTimePooling(Baseline):
    """The mean of every (t, h, w) window, then a two-layer MLP (the rows "avg pool" of the paper's Table 4).

    Windows that do not divide an axis overlap as those of the local branch do, so that counts agree.

    Keyword Args:
        dim: vision width D.
        out_dim: output width C.
        window: (T, H, W), the default of a run-time argument.
    """

    def __init__(self, *, dim: int, out_dim: int, window: Window = (4, 3, 3)) -> None:
        super().__init__(dim=dim)
        self.window = check_window(window)
        self.readout = mlp(dim, out_dim, out_dim)

    def token_count(self, num_frames: int, height: int, width: int, window: Window | None = None) -> int:
        """Return how many tokens a video of `num_frames` frames of `height` x `width` patches becomes."""
        return token_count(num_frames, height, width, window or self.window, num_global_tokens=0)

    def compress(
        self, values_FHWD: Tensor, num_frames: list[int], window: Window | None, return_attention: bool
    ) -> CompressorOutput:
        """Compress checked values. There is no attention."""
        window = self.window if window is None else check_window(window)
        plan = time_plan(num_frames, window[0]).to(values_FHWD.device, values_FHWD.dtype)
        return CompressorOutput(split_grid(self.readout(mean_of_groups(values_FHWD, plan, window)), plan.counts))


class SpatialPooling(SpaceTimePooling):
    """The mean of every `size` x `size` square of every frame, then a two-layer MLP.

    Keyword Args:
        dim: vision width D.
        out_dim: output width C.
        size: side of the square, in patches.
    """

    def __init__(self, *, dim: int, out_dim: int, size: int = 3) -> None:
        super().__init__(dim=dim, out_dim=out_dim, window=(1, size, size))


class NoCompression(Baseline):
    """A two-layer MLP on every patch: T * H * W tokens (LLaVA-1.5's connector on every frame).

    Keyword Args:
        dim: vision width D.
        out_dim: output width C.
    """

    def __init__(self, *, dim: int, out_dim: int) -> None:
        super().__init__(dim=dim)
        self.readout = mlp(dim, out_dim, out_dim)

    def token_count(self, num_frames: int, height: int, width: int, window: Window | None = None) -> int:
        """Return how many tokens a video of `num_frames` frames of `height` x `width` patches becomes."""
        self.reject_window(window)
        return token_count(num_frames, height, width, (1, 1, 1), num_global_tokens=0)

    def compress(
        self, values_FHWD: Tensor, num_frames: list[int], window: Window | None, return_attention: bool
    ) -> CompressorOutput:
        """Compress checked values. There is no attention."""
        self.reject_window(window)
        return CompressorOutput(split_grid(self.readout(values_FHWD), num_frames))


class LLaVAVideoPooling(Baseline):
    """LLaVA-Video's connector: a two-layer GELU MLP on every patch, then bilinear resizing of every frame's grid.

    27 x 27 patches become 14 x 14 = 196 tokens a frame, 6,272 for 32 frames. As published, the MLP comes before the
    pooling and the grid is rounded up. The newline tokens that LLaVA-Video adds to every row are the LLM's side and not
    made here, as in the paper's count.

    Keyword Args:
        dim: vision width D.
        out_dim: output width C.
        stride: by how much height and width shrink.
    """

    def __init__(self, *, dim: int, out_dim: int, stride: int = 2) -> None:
        super().__init__(dim=dim)
        if stride < 1:
            raise ValueError(f"stride={stride} must be at least 1")
        self.stride = stride
        self.readout = mlp(dim, out_dim, out_dim)

    def token_count(self, num_frames: int, height: int, width: int, window: Window | None = None) -> int:
        """Return how many tokens a video of `num_frames` frames of `height` x `width` patches becomes."""
        self.reject_window(window)
        return token_count(num_frames, height, width, (1, self.stride, self.stride), num_global_tokens=0)

    def compress(
        self, values_FHWD: Tensor, num_frames: list[int], window: Window | None, return_attention: bool
    ) -> CompressorOutput:
        """Compress checked values. There is no attention."""
        self.reject_window(window)
        size = [num_groups(length, self.stride) for length in values_FHWD.shape[1:3]]
        grid = interpolate(rearrange(self.readout(values_FHWD), "f h w c -> f c h w"), size=size, mode="bilinear")
        return CompressorOutput(split_grid(rearrange(grid, "f c h w -> f h w c"), num_frames))


def heads_of(dim: int) -> int:
    """Return the largest number of heads of at least 64 channels that divides `dim`."""
    return next(heads for heads in range(max(1, dim // 64), 0, -1) if dim % heads == 0)


class QueryBaseline(Baseline):
    """Learnt queries that look at all patches of a video, or of each frame.

    Frames get sinusoidal time positions when a query sees several of them; within a frame the encoder's own positions
    have to do, as published.

    Keyword Args:
        dim: vision width D.
        out_dim: output width C.
        num_queries: tokens N for each video or each frame.
        per_frame: every frame has N tokens of its own; otherwise N tokens serve the whole video.
    """

    def __init__(self, *, dim: int, out_dim: int, num_queries: int, per_frame: bool) -> None:
        super().__init__(dim=dim)
        if num_queries < 1:
            raise ValueError(f"num_queries={num_queries} must be at least 1")
        self.per_frame = per_frame
        self.query = nn.Parameter(torch.empty(num_queries, dim).normal_(std=0.02))
        self.readout = nn.Linear(dim, out_dim)

    @abstractmethod
    def look(self, x_VPD: Tensor, padding_VP: Tensor | None, need_weights: bool) -> tuple[Tensor, Tensor | None]:
        """Return `float[V, N, D]` and, if needed, the weights on the patches, `float[V, heads, N, P]`.

        Args:
            x_VPD: patches of every video.
            padding_VP: True where there is no patch; None: there are patches everywhere.
            need_weights: whether to return weights.
        """

    def token_count(self, num_frames: int, height: int, width: int, window: Window | None = None) -> int:
        """Return how many tokens a video of `num_frames` frames of `height` x `width` patches becomes."""
        self.reject_window(window)
        return len(self.query) * token_count(num_frames if self.per_frame else 1, height, width, (1, height, width), 0)

    def compress(
        self, values_FHWD: Tensor, num_frames: list[int], window: Window | None, return_attention: bool
    ) -> CompressorOutput:
        """Compress checked values."""
        self.reject_window(window)
        lengths = [1] * len(values_FHWD) if self.per_frame else num_frames
        longest, padding = max(lengths), None
        if min(lengths) == longest:
            x = rearrange(values_FHWD, "(v t) h w d -> v t h w d", t=longest)
        else:
            x = pad_sequence(list(torch.split(values_FHWD, lengths)), batch_first=True)
            frames = torch.arange(longest, device=x.device) >= torch.tensor(lengths, device=x.device)[:, None]
            padding = frames.repeat_interleave(x.shape[2] * x.shape[3], dim=1)
        height, width = x.shape[2:4]
        if not self.per_frame:
            x = x + rearrange(sinusoidal_table(longest, self.dim), "t d -> t 1 1 d").to(x)
        tokens, weights = self.look(rearrange(x, "v t h w d -> v (t h w) d"), padding, return_attention)
        counts = num_frames if self.per_frame else [1] * len(num_frames)
        parts = tuple(part.flatten(0, 1) for part in torch.split(self.readout(tokens), counts))
        if weights is None:
            return CompressorOutput(parts)
        maps = torch.split(rearrange(weights, "v m n (t h w) -> v m n t h w", h=height, w=width), counts)
        of_videos = (rearrange(x, "v m n t h w -> m n (v t) h w") for x in maps)
        cut = tuple(x[:, :, :frames] for x, frames in zip(of_videos, num_frames, strict=True))
        return CompressorOutput(parts, global_attention=cut)


class MultiheadAttention(nn.MultiheadAttention):
    """torch's, except that it calls its output projection, so that adapters and weights on disk work there too."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        *_: Any,
        **__: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return `float[V, N, D]` and, if needed, the weights of every head, `float[V, heads, N, P]`."""
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            rearrange(linear(x, weight, bias), "v n (h e) -> v h n e", h=self.num_heads)
            for x, weight, bias in zip((query, key, value), self.in_proj_weight.chunk(3), biases, strict=True)
        )
        seen = None if key_padding_mask is None else rearrange(~key_padding_mask, "v p -> v 1 1 p")
        weights: Tensor | None = None
        if need_weights:
            logits = q * q.shape[-1] ** -0.5 @ k.mT
            weights = (logits if seen is None else logits.masked_fill(~seen, -math.inf)).softmax(-1)
            context = weights @ v
        else:
            context = scaled_dot_product_attention(q, k, v, seen)
        return self.out_proj(rearrange(context, "v h n e -> v n (h e)")), weights


class QFormerLayer(nn.Module):
    """Self-attention among the queries, every other layer cross-attention to the patches, then a feed-forward net."""

    def __init__(self, *, dim: int, has_cross_attention: bool) -> None:
        super().__init__()
        self.self_attention = MultiheadAttention(dim, heads_of(dim), batch_first=True)
        self.self_norm = nn.LayerNorm(dim)
        self.has_cross_attention = has_cross_attention
        if has_cross_attention:
            self.cross_attention = MultiheadAttention(dim, heads_of(dim), batch_first=True)
            self.cross_norm = nn.LayerNorm(dim)
        self.feed_forward = mlp(dim, 4 * dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, q_VND: Tensor, x_VPD: Tensor, padding_VP: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return queries `float[V, N, D]` and, if needed, the weights of the cross-attention."""
        weights: Tensor | None = None
        q = self.self_norm(q_VND + self.self_attention(q_VND, q_VND, q_VND, need_weights=False)[0])
        if self.has_cross_attention:
            seen, weights = self.cross_attention(
                q, x_VPD, x_VPD, padding_VP, need_weights=need_weights, average_attn_weights=False
            )
            q = self.cross_norm(q + seen)
        return self.norm(q + self.feed_forward(q)), weights


class QFormer(QueryBaseline):
    """BLIP-2's Q-Former without its text: learnt queries through alternating self- and cross-attention layers.

    Self-attention in every layer, cross-attention to the patches in every other one (the first, third, ...), layer
    norms after each residual as in BERT, one linear map to the LLM. By default one set of queries serves a whole video,
    as in VideoChat2; `per_frame=True` is BLIP-2's use, frame by frame.

    Keyword Args:
        dim: vision width D, also the width of the queries.
        out_dim: output width C.
        num_queries: tokens for each video or each frame.
        num_layers: layers.
        per_frame: whether every frame has tokens of its own.
    """

    def __init__(
        self, *, dim: int, out_dim: int, num_queries: int = 32, num_layers: int = 4, per_frame: bool = False
    ) -> None:
        super().__init__(dim=dim, out_dim=out_dim, num_queries=num_queries, per_frame=per_frame)
        if num_layers < 1:
            raise ValueError(f"num_layers={num_layers} must be at least 1")
        self.norm = nn.LayerNorm(dim)
        self.layers = nn.ModuleList(
            QFormerLayer(dim=dim, has_cross_attention=layer % 2 == 0) for layer in range(num_layers)
        )

    def look(self, x_VPD: Tensor, padding_VP: Tensor | None, need_weights: bool) -> tuple[Tensor, Tensor | None]:
        """Return `float[V, N, D]` and, if needed, the last cross-attention's weights `float[V, heads, N, P]`."""
        q = self.norm(self.query).expand(len(x_VPD), -1, -1)
        weights: Tensor | None = None
        for layer in self.layers:
            q, layer_weights = layer(q, x_VPD, padding_VP, need_weights)
            weights = weights if layer_weights is None else layer_weights
        return q, weights


class PerceiverLayer(nn.Module):
    """Latents look at patches and at each other in one attention, then pass a feed-forward net."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.norm_x = nn.LayerNorm(dim)
        self.norm_q = nn.LayerNorm(dim)
        self.attention = MultiheadAttention(dim, heads_of(dim), bias=False, batch_first=True)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 4 * dim, bias=False), nn.GELU(), nn.Linear(4 * dim, dim, bias=False)
        )

    def forward(
        self, q_VND: Tensor, x_VPD: Tensor, padding_VP: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return latents `float[V, N, D]` and, if needed, their weights on the patches."""
        q = self.norm_q(q_VND)
        kv = torch.cat([self.norm_x(x_VPD), q], dim=1)
        if padding_VP is not None:
            padding_VP = nn.functional.pad(padding_VP, (0, q.shape[1]), value=False)
        seen, weights = self.attention(q, kv, kv, padding_VP, need_weights=need_weights, average_attn_weights=False)
        q = q_VND + seen
        return q + self.feed_forward(q), None if weights is None else weights[..., : x_VPD.shape[1]]


class PerceiverResampler(QueryBaseline):
    """Flamingo's Perceiver Resampler: latents attend to patches and latents together, once per video.

    Keys and values are the patches with time positions, followed by the latents themselves (Flamingo, appendix A.1.1).
    Flamingo learns an embedding a frame; sinusoids take its place so that any number of frames works. Attention maps
    show the last layer's weights on the patches; what is missing to one went to the latents.

    Keyword Args:
        dim: vision width D, also the width of the latents.
        out_dim: output width C.
        num_queries: latents, the tokens of a video.
        num_layers: layers.
    """

    def __init__(self, *, dim: int, out_dim: int, num_queries: int = 64, num_layers: int = 6) -> None:
        super().__init__(dim=dim, out_dim=out_dim, num_queries=num_queries, per_frame=False)
        if num_layers < 1:
            raise ValueError(f"num_layers={num_layers} must be at least 1")
        self.layers = nn.ModuleList(PerceiverLayer(dim=dim) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)

    def look(self, x_VPD: Tensor, padding_VP: Tensor | None, need_weights: bool) -> tuple[Tensor, Tensor | None]:
        """Return `float[V, N, D]` and, if needed, the last layer's weights `float[V, heads, N, P]` on the patches."""
        q = self.query.expand(len(x_VPD), -1, -1)
        weights: Tensor | None = None
        for layer in self.layers:
            q, weights = layer(q, x_VPD, padding_VP, need_weights)
        return self.norm(q), weights


def unconditional(
    *, dim: int, out_dim: int, window: Window | None = (4, 3, 3), num_global_tokens: int = 32
) -> HybridCompressor:
    """Return the paper's compressor without an instruction (Table 4, "uncond. local+global")."""
    return HybridCompressor(
        dim=dim,
        out_dim=out_dim,
        window=window,
        num_global_tokens=num_global_tokens,
        local_injection="none",
        global_injection="none",
    )


def unconditional_local(*, dim: int, out_dim: int, window: Window = (4, 3, 3)) -> HybridCompressor:
    """Return the local branch alone, without an instruction (Table 4, "uncond. local")."""
    return unconditional(dim=dim, out_dim=out_dim, window=window, num_global_tokens=0)


def unconditional_global(*, dim: int, out_dim: int, num_global_tokens: int = 32) -> HybridCompressor:
    """Return the global branch alone, without an instruction (Table 4, "uncond. global")."""
    return unconditional(dim=dim, out_dim=out_dim, window=None, num_global_tokens=num_global_tokens)


COMPRESSORS: dict[str, Callable[..., HybridCompressor | Baseline]] = {
    "hicom": HybridCompressor,
    "unconditional": unconditional,
    "unconditional_local": unconditional_local,
    "unconditional_global": unconditional_global,
    "spatial_pool": SpatialPooling,
    "space_time_pool": SpaceTimePooling,
    "llava_video": LLaVAVideoPooling,
    "qformer": QFormer,
    "perceiver": PerceiverResampler,
    "no_compression": NoCompression,
}
"""Compressors by the name that a configuration gives them."""


def build_compressor(name: str, **options: Any) -> HybridCompressor | Baseline:
    """Return the compressor `name` (a key of `COMPRESSORS`), built with keyword arguments `dim`, `out_dim` and its own.

    Raises:
        ValueError: there is no such compressor.
    """
    if name not in COMPRESSORS:
        raise ValueError(f"compressor={name!r} is not one of {', '.join(COMPRESSORS)}")
    return COMPRESSORS[name](**options)
