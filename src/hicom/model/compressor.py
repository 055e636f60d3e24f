"""The compressor of the paper: a local and a global branch, both steered by the instruction (section 3, Figure 3).

Plain torch modules with keyword arguments; they work on the patch features of any encoder.

Two dialects exist. `paper` is what the paper writes and the default; `release` is what the released code computes: it
differs in the injections, the pooled query and the values of the global branch, and is needed for released weights.
`docs/paper_to_code.md` lists the differences beside the equations. What goes beyond the paper is in `options.py`.

Legend: V videos, F packed frames (of all videos, one after the other), T frames of one video, H W patch grid, G time
groups, N learnable tokens, M attention rows (heads x N), D vision width, K width of keys and instruction (D in SigLIP),
C output width, L instruction length.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from .ops import (
    TimePlan,
    Window,
    check_video_index,
    check_window,
    closed_groups,
    gather_windows,
    mean_of_groups,
    repeat_videos,
    resample_to_groups,
    sinusoidal_positions,
    sinusoidal_table,
    sum_windows,
    time_plan,
    token_count,
)
from .options import (
    MatchEvidence,
    MatchPointers,
    MotionFeatures,
    MotionStream,
    PointerInjector,
    at_least_float32,
    main_words,
    match_features,
    pad_videos,
    real_frames,
    start_as_identity,
)

Injection = Literal["direct", "coarse", "fine", "none"]
Dialect = Literal["paper", "release"]
Compression = Literal["conditional", "unguided", "off"]
"""Compress by instruction; compress without one; or only project every patch (both in stage `align`)."""

NORM_EPS = 1e-6
MAX_LOGITS = 2**24
"""Logits of the global branch that are in memory at once where nothing needs them all."""


@dataclass
class CompressorOutput:
    """What a compressor returns.

    Attributes:
        tokens: a `float[N_v, C]` for every video: local tokens in (t, h, w) order, global tokens, pointers.
        local_attention: on request, a `float[T/t, H/h, W/w, t, h, w]` for every video: each window's weights.
        global_attention: on request, a `float[heads, N, T, H, W]` for every video.
        pointer_attention: on request, a `float[P, T, H, W]` for every video.
    """

    tokens: tuple[Tensor, ...]
    local_attention: tuple[Tensor, ...] | None = None
    global_attention: tuple[Tensor, ...] | None = None
    pointer_attention: tuple[Tensor, ...] | None = None


def mlp(dim: int, hidden: int, out_dim: int) -> nn.Sequential:
    """Return Linear, GELU (erf), Linear."""
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, out_dim))


def linear(layers: nn.Sequential, number: int) -> nn.Linear:
    """Return a linear layer of an `mlp`."""
    layer = layers[number]
    assert isinstance(layer, nn.Linear)
    return layer


def normalize(x: Tensor) -> Tensor:
    """Scale the last axis to unit length."""
    return x / x.norm(dim=-1, keepdim=True)


def match_windows(keys_FHWK: Tensor, query_VK: Tensor, plan: TimePlan, window: Window) -> Tensor:
    """Return `float[G, H/h, W/w, t, h, w]`: every patch's key times the one query of its video, cut into windows."""
    # One query a video: the logits are cheaper per patch than per window, and need no copy of the keys.
    frame_video = plan.video.new_zeros(len(keys_FHWK))
    frame_video[plan.index] = plan.video[:, None]
    # Not query_VK[frame_video]: that sums gradients in an order of its own at every run.
    query_FK = query_VK.index_select(0, frame_video)
    logits = torch.einsum("fhwd,fd->fhw", keys_FHWK, query_FK)
    return gather_windows(logits, plan, window)


def mask_repeats(logits: Tensor, plan: TimePlan) -> Tensor:
    """Return window logits that are -inf where a video shorter than the window repeats its last frame."""
    if plan.mask is None:
        return logits
    return logits.masked_fill(~rearrange(plan.mask, "g t -> g 1 1 t 1 1"), -math.inf)


class Gate(nn.Module):
    """A learnt blend that starts as the identity: (1 - alpha) x + alpha LN(proj(x)), with the scalar alpha = 0."""

    def __init__(self, proj: nn.Module, *, dim: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(1))
        self.proj = proj
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Blend `float[..., D]`."""
        return (1 - self.alpha) * x + self.alpha * self.norm(self.proj(x))


def matrix(layer: nn.Module, like: Tensor) -> Tensor:
    """Return the matrix `float[out, in]` that a linear layer multiplies by, whatever has become of the layer.

    A layer with an adapter, in few bits, on disk or under a hook has no such matrix to read, and must be called to work
    and to learn: what it makes of the unit vectors is the matrix, without the bias, which it makes of zero.

    Args:
        layer: `nn.Linear`, or what has taken its place.
        like: of the width that the layer takes, and of the type and device that it works in.
    """
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    is_plain = type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and "forward" not in vars(layer)
    if is_plain and not any(hooks):
        assert isinstance(layer, nn.Linear)
        return layer.weight
    # A power of two changes no digit of the matrix, and takes some from the bias, which is rounded together with it.
    scale, zero = 4.0, like.new_zeros(1, like.shape[-1])
    output = layer(torch.cat([zero, scale * torch.eye(like.shape[-1]).to(like)]))
    return ((output[1:] - output[:1]) / scale).mT


class Attention(nn.Module):
    """Multi-head attention; that of few queries over many raw features has its key and value projections absorbed.

    Softmax(q W_k x) W_v x needs neither W_k x nor W_v x of every feature: W_k moves to the queries, W_v to the averaged
    features. The numbers are the same (the key bias shifts all logits of a row alike and cancels); with 32 queries the
    operations are about 4 times fewer, and no key or value of a patch is ever stored.
    """

    def __init__(self, *, dim: int, use_logit_scale: bool = False) -> None:
        super().__init__()
        # Heads of 128 channels, as published; the nearest divisor for other widths.
        self.num_heads = next(heads for heads in range(max(1, dim // 128), 0, -1) if dim % heads == 0)
        self.use_logit_scale = use_logit_scale
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def project_queries(self, q_VND: Tensor, scale: Tensor | None = None) -> Tensor:
        """Return `float[V, M, D]`: queries moved into the space of raw features, logit scale included.

        With a logit scale the result is in key space instead, since keys must be normalised after their projection.
        """
        q = self.q_proj(q_VND)
        if scale is not None:
            return rearrange(normalize(q) * scale.exp(), "v n (h e) -> v h n e", h=self.num_heads)
        q = rearrange(q, "v n (h e) -> v h n e", h=self.num_heads) * (q.shape[-1] // self.num_heads) ** -0.5
        weight = rearrange(matrix(self.k_proj, q_VND), "(h e) d -> h e d", h=self.num_heads)
        return rearrange(torch.einsum("vhne,hed->vhnd", q, weight), "v h n d -> v (h n) d")

    def project_context(self, context_VMD: Tensor) -> Tensor:
        """Return `float[V, N, D]`: averaged raw features through W_v and the output projection."""
        # Of each row the channels of its own head; weights of sum 1 leave the bias as it is.
        values = rearrange(self.v_proj(context_VMD), "v (h n) (k e) -> v n e h k", h=self.num_heads, k=self.num_heads)
        return self.out_proj(rearrange(values.diagonal(dim1=3, dim2=4), "v n e h -> v n (h e)"))

    def forward(self, q_VND: Tensor, x_VLD: Tensor, mask_VL: Tensor | None = None) -> Tensor:
        """Attend from `float[V, N, D]` over the few places of `float[V, L, D]`; `mask_VL` is True on real ones."""
        logits = self.project_queries(q_VND) @ x_VLD.mT
        if mask_VL is not None:
            logits = logits.masked_fill(~mask_VL[:, None].bool(), -math.inf)
        weights = rearrange(at_least_float32(logits).softmax(-1), "v (h n) l -> v h n l", h=self.num_heads)
        values = rearrange(self.v_proj(x_VLD), "v l (h e) -> v h l e", h=self.num_heads)
        return self.out_proj(rearrange(weights.to(values.dtype) @ values, "v h n e -> v n (h e)"))


class Injector(nn.Module):
    """Injects the instruction into queries (section 3.2, Figure 4): direct, coarse or fine, in either dialect."""

    def __init__(self, *, dim: int, instruction_dim: int, injection: Injection, dialect: Dialect, gate: bool) -> None:
        super().__init__()
        self.injection = injection
        self.dialect = dialect
        self.dim = dim
        # Only where text and vision widths differ (CLIP's global branch).
        self.resize = mlp(instruction_dim, dim, dim) if instruction_dim != dim else None
        self.gate = Gate(mlp(dim, dim, dim), dim=dim) if gate else None
        if injection == "direct" and dialect == "paper":
            self.mlp: nn.Sequential = mlp(dim, 2 * dim, dim)
        elif injection == "coarse":
            self.film: nn.Sequential = mlp(dim, 2 * dim, 2 * dim)
        elif injection == "fine":
            self.attention = Attention(dim=dim)
        if injection != "direct":
            self.norm = nn.LayerNorm(dim, eps=NORM_EPS)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start where an untrained injection does no harm.

        The paper's direct MLP starts as the exact identity, because the dual encoder's text embedding already is a good
        query; the paper's coarse scale starts around 1.
        """
        if self.injection == "direct" and self.dialect == "paper":
            start_as_identity(linear(self.mlp, 0), linear(self.mlp, 2))
        elif self.injection == "coarse" and self.dialect == "paper":
            nn.init.ones_(linear(self.film, 2).bias[: self.dim])

    def embed(self, instruction: Tensor) -> Tensor:
        """Return the instruction as this injection uses it, `float[V, D]` or `float[V, L, D]` (fine)."""
        if self.resize is not None:
            instruction = self.resize(instruction)
        if self.gate is not None:
            instruction = self.gate(instruction)
        if self.injection == "direct" and self.dialect == "paper":
            instruction = self.mlp(instruction)
        return instruction

    def forward(self, x_VND: Tensor, instruction: Tensor, mask_VL: Tensor | None) -> Tensor:
        """Inject into queries `float[V, N, D]` (coarse and fine)."""
        instruction = self.embed(instruction)
        if self.injection == "fine":
            if self.dialect == "paper":
                return self.attention(self.norm(x_VND), instruction, mask_VL)
            return self.norm(x_VND + self.attention(x_VND, instruction, mask_VL))
        scale, shift = self.film(instruction)[:, None].chunk(2, dim=-1)
        if self.dialect == "paper":
            return self.norm(x_VND) * scale + shift
        return self.norm(x_VND * (1 + scale) + shift)


@dataclass
class Instruction:
    """The instruction: `pooled` float[V, D]; `tokens` float[V, L, D]; `mask` bool[V, L], True on real tokens."""

    pooled: Tensor | None
    tokens: Tensor | None
    mask: Tensor | None

    def embedding(self, injection: Injection) -> Tensor:
        """Return what `injection` needs.

        Raises:
            ValueError: it is missing.
        """
        value, name = (self.tokens, "instruction_tokens") if injection == "fine" else (self.pooled, "instruction")
        if value is None:
            raise ValueError(f"{injection} injection needs {name}; pass it, or ask for compression='unguided'")
        return value


class LocalCompressor(nn.Module):
    """One token a window: single-head attention of the window's query over its patches (section 3.2).

    Keyword Args:
        dim: vision width D.
        key_dim: width K of keys and instruction; D, except where the dual encoder projects to another width (CLIP).
        out_dim: output width C.
        injection: how the instruction reaches the query. `none` leaves the pooled query.
        dialect: see the module's docstring.
        gates: letters of learnt gates, as released checkpoints have them: q(uery), k(ey), v(alue), g(uide).
        use_logit_scale: cosine similarity under a learnt temperature, as in the dual encoder, not dot products.
        match_evidence: tokens also carry how well their window matches (`MatchEvidence`).
    """

    def __init__(
        self,
        *,
        dim: int,
        key_dim: int,
        out_dim: int,
        injection: Injection,
        dialect: Dialect,
        gates: str = "",
        use_logit_scale: bool = False,
        match_evidence: bool = False,
    ) -> None:
        super().__init__()
        self.injection = injection
        self.dialect = dialect
        # The query of the direct injection is the instruction itself, so a query gate would have no input.
        has_query_gate = "q" in gates and injection != "direct"
        self.query_gate = Gate(nn.Linear(key_dim, key_dim, bias=False), dim=key_dim) if has_query_gate else None
        self.key_gate = Gate(mlp(key_dim, key_dim, key_dim), dim=key_dim) if "k" in gates else None
        self.value_gate = Gate(mlp(dim, dim, dim), dim=dim) if "v" in gates else None
        self.injector = (
            Injector(dim=key_dim, instruction_dim=key_dim, injection=injection, dialect=dialect, gate="g" in gates)
            if injection != "none"
            else None
        )
        self.use_logit_scale = use_logit_scale
        if use_logit_scale:
            self.logit_scale = nn.Parameter(torch.zeros(1))
            self.logit_bias = nn.Parameter(torch.zeros(1))
        self.evidence = MatchEvidence(dim=dim) if match_evidence else None
        self.readout = mlp(dim, out_dim, out_dim)

    def forward(
        self,
        values_FHWD: Tensor,
        keys_FHWK: Tensor | None,
        plan: TimePlan,
        window: Window,
        instruction: Instruction,
        compression: Compression,
    ) -> tuple[Tensor, Tensor]:
        """Return tokens `float[G, H/h, W/w, C]` and attention `float[G, H/h, W/w, t, h, w]`."""
        unguided = compression == "unguided"
        injector = None if unguided else self.injector
        is_given = keys_FHWK is not None and not unguided and (injector is not None or self.dialect == "release")
        keys = raw_keys = keys_FHWK if keys_FHWK is not None and is_given else values_FHWD
        if injector is not None and keys.shape[-1] != injector.dim:
            raise ValueError(f"keys=None, but values of width {keys.shape[-1]} cannot be keys of width {injector.dim}")
        # The release leaves keys as they are where no instruction meets them. Raw features under a temperature make a
        # softmax that sees one patch; so the paper's dialect, which says nothing of this, takes cosines throughout.
        takes_cosines = self.use_logit_scale and self.dialect == "paper"
        if takes_cosines or (self.use_logit_scale and (is_given or injector is not None)):
            keys = normalize(keys)
        if self.key_gate is not None:
            keys = self.key_gate(keys)
        values = values_FHWD if self.value_gate is None else self.value_gate(values_FHWD)

        if injector is not None and injector.injection == "direct":
            logits = match_windows(keys, injector.embed(self.guide(instruction)), plan, window)
        else:
            # Queries must have the width of the keys. As published they are pooled from the values where those have it.
            pooled = values_FHWD if values_FHWD.shape[-1] == keys.shape[-1] else raw_keys
            query = self.pooled_query(pooled, plan, window)
            if self.query_gate is not None:
                query = self.query_gate(query)
            if injector is not None:
                query = self.inject(injector, query, plan, instruction)
            if takes_cosines:
                query = normalize(query)
            logits = torch.einsum("gabthwd,gabd->gabthw", gather_windows(keys, plan, window), query)
        if self.use_logit_scale:
            logits = logits * self.logit_scale.exp() + self.logit_bias
        else:
            logits = logits * keys.shape[-1] ** -0.5
        logits = mask_repeats(logits, plan)
        shape = logits.shape
        flat = at_least_float32(logits.flatten(3))
        attention = flat.softmax(-1).to(values.dtype).view(shape)
        tokens = sum_windows(values, attention, plan, window)
        if self.evidence is not None:
            num_frames = shape[3] if plan.mask is None else rearrange(plan.mask.sum(1), "g -> g 1 1")
            match = match_features(flat, num_frames * shape[4] * shape[5])
            tokens = tokens + self.evidence(match.to(tokens.dtype))
        return self.readout(tokens), attention

    def guide(self, instruction: Instruction) -> Tensor:
        """Return the instruction's embedding as it meets the keys: at unit length under a logit scale."""
        embedding = instruction.embedding(self.injection)
        return normalize(embedding) if self.use_logit_scale else embedding

    def pooled_query(self, x_FHWD: Tensor, plan: TimePlan, window: Window) -> Tensor:
        """Return `float[G, H/h, W/w, D]`: trilinear interpolation in the release, the window's mean in the paper."""
        if self.dialect == "release":
            return resample_to_groups(x_FHWD, plan, window)
        return mean_of_groups(x_FHWD, plan, window)

    def inject(self, injector: Injector, query: Tensor, plan: TimePlan, instruction: Instruction) -> Tensor:
        """Inject into pooled queries `float[G, H/h, W/w, D]`, each with its own video's instruction."""
        guide, mask = self.guide(instruction).index_select(0, plan.video), instruction.mask
        flat = injector(rearrange(query, "g a b d -> g (a b) d"), guide, None if mask is None else mask[plan.video])
        return rearrange(flat, "g (a b) d -> g a b d", a=query.shape[1])


class GlobalCompressor(nn.Module):
    """N tokens that look over the whole video: learnable queries, 3-D positions, multi-head attention (section 3.3).

    Keyword Args:
        dim: vision width D.
        instruction_dim: width K of the instruction.
        out_dim: output width C.
        num_tokens: learnable tokens N.
        injection: how the instruction reaches the tokens.
        dialect: `paper` adds positions to the keys only, `release` to keys and values.
        gate_instruction: the released gate on the instruction.
        use_logit_scale: cosine similarity under a learnt temperature.
        match_evidence: tokens also carry how well the video matches (`MatchEvidence`).
    """

    def __init__(
        self,
        *,
        dim: int,
        instruction_dim: int,
        out_dim: int,
        num_tokens: int,
        injection: Injection,
        dialect: Dialect,
        gate_instruction: bool = False,
        use_logit_scale: bool = False,
        match_evidence: bool = False,
    ) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.injection = injection
        self.dialect = dialect
        # The release replaces its tokens by the instruction under direct injection: then nothing is left to learn, and
        # all tokens are the same. The paper's dialect adds the instruction to them instead.
        self.query = None if self.replaces_tokens else nn.Parameter(torch.empty(num_tokens, dim))
        self.injector = (
            Injector(
                dim=dim,
                instruction_dim=instruction_dim,
                injection=injection,
                dialect=dialect,
                gate=gate_instruction,
            )
            if injection != "none"
            else None
        )
        self.attention = Attention(dim=dim, use_logit_scale=use_logit_scale)
        self.use_logit_scale = use_logit_scale
        if use_logit_scale:
            self.logit_scale = nn.Parameter(torch.zeros(1))
            self.logit_bias = nn.Parameter(torch.zeros(1))
        self.evidence = MatchEvidence(dim=dim, num_heads=self.attention.num_heads) if match_evidence else None
        self.readout = mlp(dim, out_dim, out_dim)

    @property
    def replaces_tokens(self) -> bool:
        """Whether the instruction takes the place of the learnable tokens."""
        return self.injection == "direct" and self.dialect == "release"

    def queries(self, instruction: Instruction, num_videos: int, compression: Compression) -> Tensor:
        """Return the injected tokens, `float[V, N, D]`."""
        if compression == "unguided" or self.injector is None:
            if self.query is None:
                raise ValueError(
                    "direct injection in the global branch of a release checkpoint has no learnable tokens, so it "
                    "cannot run with compression='unguided'; give an instruction"
                )
            return self.query.expand(num_videos, -1, -1)
        guide = instruction.embedding(self.injection)
        if self.injection == "direct":
            guide = repeat(self.injector.embed(guide), "v d -> v n d", n=self.num_tokens)
            return guide if self.query is None else self.query + guide
        assert self.query is not None
        return self.injector(self.query.expand(num_videos, -1, -1), guide, instruction.mask)

    def logits(self, query_VND: Tensor, x_VTHWD: Tensor, start: int) -> Tensor:
        """Return `float[V, M, T, H, W]`: attention logits over a chunk whose first frame has the number `start`."""
        num_frames, height, width, dim = x_VTHWD.shape[1:]
        if self.use_logit_scale:
            positions = sinusoidal_positions(num_frames, height, width, dim, start)
            keys = normalize(self.attention.k_proj(x_VTHWD + positions.to(x_VTHWD)))
            keys = rearrange(keys, "v t h w (m e) -> v m (t h w) e", m=self.attention.num_heads)
            logits = self.attention.project_queries(query_VND, self.logit_scale) @ keys.mT + self.logit_bias
            return rearrange(logits, "v m n (t h w) -> v (m n) t h w", t=num_frames, h=height)
        rows = self.attention.project_queries(query_VND)
        logits = (rows @ rearrange(x_VTHWD, "v t h w d -> v d (t h w)")).unflatten(-1, (num_frames, height, width))
        # A position is a sum of three tables, so its logits are too: no key of patch plus position is ever stored.
        axes = ((num_frames, start), (height, 0), (width, 0))
        t, h, w = (rows @ sinusoidal_table(length, dim, first).to(rows).mT for length, first in axes)
        # In place: there is no larger tensor in the whole compressor.
        return logits.add_(t[..., :, None, None]).add_(h[..., None, :, None]).add_(w[..., None, None, :])

    def context(self, weights_VMTHW: Tensor, x_VTHWD: Tensor, start: int) -> Tensor:
        """Return `float[V, M, D]`: features (in the release with positions) summed under `weights`."""
        num_frames, height, width, dim = x_VTHWD.shape[1:]
        weights_VMTHW = weights_VMTHW.to(x_VTHWD.dtype)
        context = weights_VMTHW.flatten(2) @ rearrange(x_VTHWD, "v t h w d -> v (t h w) d")
        if self.dialect == "release":
            context = context + weights_VMTHW.sum((3, 4)) @ sinusoidal_table(num_frames, dim, start).to(context)
            context = context + weights_VMTHW.sum((2, 4)) @ sinusoidal_table(height, dim).to(context)
            context = context + weights_VMTHW.sum((2, 3)) @ sinusoidal_table(width, dim).to(context)
        return context

    def read(self, query_VND: Tensor, context_VMD: Tensor, match_VM2: Tensor | None) -> Tensor:
        """Return tokens `float[V, N, C]` from averaged features and, for evidence, the rows' `match_features`."""
        x = query_VND + self.attention.project_context(context_VMD)
        if self.evidence is not None:
            assert match_VM2 is not None
            match = rearrange(match_VM2, "v (h n) e -> v n (h e)", h=self.attention.num_heads)
            x = x + self.evidence(match.to(x.dtype))
        return self.readout(x)

    def forward(
        self,
        values_FHWD: Tensor,
        num_frames: Sequence[int],
        instruction: Instruction,
        compression: Compression,
        return_attention: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return tokens `float[V, N, C]`; on request attention `float[V, M, T, H, W]`, zero beyond a video's end."""
        query = self.queries(instruction, len(num_frames), compression)
        x = pad_videos(values_FHWD, num_frames)
        real = real_frames(num_frames, x.device) if min(num_frames) < max(num_frames) else None
        num_patches = torch.tensor(num_frames)[:, None] * x.shape[2] * x.shape[3]
        match: Tensor | None = None
        num_logits = math.prod(x.shape[:-1]) * self.num_tokens * self.attention.num_heads
        if num_logits > MAX_LOGITS and not return_attention and not torch.is_grad_enabled():
            # Nothing needs all logits at once: the sums of a softmax can be taken chunk by chunk.
            attended, size = RunningSoftmax(), max(1, x.shape[1] * MAX_LOGITS // num_logits)
            for first in range(0, x.shape[1], size):
                part = slice(first, first + size)
                logits = self.masked_logits(query, x[:, part], first, None if real is None else real[:, part])
                attended.add(logits, partial(self.context, x_VTHWD=x[:, part], start=first))
            context, match = attended.read(num_patches.to(x.device))
            return self.read(query, context.to(query.dtype), match), None
        logits = self.masked_logits(query, x, 0, real)
        flat = at_least_float32(logits.flatten(2))
        attention = flat.softmax(-1).to(x.dtype).view(logits.shape)
        if self.evidence is not None:
            match = match_features(flat, num_patches)
        return self.read(query, self.context(attention, x, 0), match), attention if return_attention else None

    def masked_logits(self, query_VND: Tensor, x_VTHWD: Tensor, start: int, real_VT: Tensor | None) -> Tensor:
        """Return `logits` that are -inf on frames that a video does not have; `real_VT` None: it has all."""
        logits = self.logits(query_VND, x_VTHWD, start)
        return logits if real_VT is None else logits.masked_fill_(~rearrange(real_VT, "v t -> v 1 t 1 1"), -math.inf)


class HybridCompressor(nn.Module):
    """The paper's compressor: instruction-conditioned local and global branches side by side (Figure 3).

    Keyword Args:
        dim: width D of the vision features.
        instruction_dim: width K of the keys and of the instruction embedding; None: D.
        out_dim: width C of the tokens, the LLM's.
        window: (T, H, W) of the local branch, the default of a run-time argument; None leaves the branch out.
        num_global_tokens: tokens of the global branch; 0 leaves it out.
        local_injection: `direct` (the paper's choice), `coarse`, `fine` or `none`.
        global_injection: likewise; the paper's choice is `coarse`.
        dialect: `paper`, or `release` for released weights.
        local_gates: learnt gates of the local branch, a subset of "qkvg".
        global_gates: learnt gates of the global branch, "" or "g".
        local_logit_scale: cosine similarity with a learnt temperature in the local branch.
        global_logit_scale: likewise in the global branch.
        match_evidence: tokens also carry how well anything matched, which a softmax hides (`MatchEvidence`).
        motion_features: patches also carry how their neighbourhood moves (`MotionFeatures`).
        num_pointers: further tokens that say where and when the instruction matches (`MatchPointers`).
        num_word_pointers: how many of these look for one word of the instruction each (`main_words`).

    Raises:
        ValueError: a choice does not exist, a number is negative or too large, or both branches are left out.
    """

    has_modes = True
    """Whether `compression`, `video_index` and an instruction are taken: baselines pool one way only."""

    def __init__(
        self,
        *,
        dim: int,
        out_dim: int,
        instruction_dim: int | None = None,
        window: Window | None = (4, 3, 3),
        num_global_tokens: int = 32,
        local_injection: Injection = "direct",
        global_injection: Injection = "coarse",
        dialect: Dialect = "paper",
        local_gates: str = "",
        global_gates: str = "",
        local_logit_scale: bool = False,
        global_logit_scale: bool = False,
        match_evidence: bool = False,
        motion_features: bool = False,
        num_pointers: int = 0,
        num_word_pointers: int = 0,
    ) -> None:
        super().__init__()
        value: str
        for name, value, choices in (
            ("local_injection", local_injection, get_args(Injection)),
            ("global_injection", global_injection, get_args(Injection)),
            ("dialect", dialect, get_args(Dialect)),
        ):
            if value not in choices:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}")
        for name, value, allowed in (("local_gates", local_gates, "qkvg"), ("global_gates", global_gates, "g")):
            if not set(value) <= set(allowed):
                raise ValueError(f"{name}={value!r} may only hold letters of {allowed!r}")
        if window is None and num_global_tokens == 0:
            raise ValueError("window=None and num_global_tokens=0 leave no branch; give at least one")
        for name, number in (
            ("num_global_tokens", num_global_tokens),
            ("num_pointers", num_pointers),
            ("num_word_pointers", num_word_pointers),
        ):
            if number < 0:
                raise ValueError(f"{name}={number} must not be negative; 0 leaves these tokens out")
        if num_word_pointers > num_pointers:
            raise ValueError(
                f"num_word_pointers={num_word_pointers} of num_pointers={num_pointers} pointers look for a word: give "
                "at least as many pointers"
            )
        self.dim = dim
        self.instruction_dim = instruction_dim = dim if instruction_dim is None else instruction_dim
        self.window = None if window is None else check_window(window)
        self.num_global_tokens = num_global_tokens
        self.num_pointers = num_pointers
        self.num_word_pointers = num_word_pointers
        self.local = (
            LocalCompressor(
                dim=dim,
                key_dim=instruction_dim,
                out_dim=out_dim,
                injection=local_injection,
                dialect=dialect,
                gates=local_gates,
                use_logit_scale=local_logit_scale,
                match_evidence=match_evidence,
            )
            if window is not None
            else None
        )
        self.global_ = (
            GlobalCompressor(
                dim=dim,
                instruction_dim=instruction_dim,
                out_dim=out_dim,
                num_tokens=num_global_tokens,
                injection=global_injection,
                dialect=dialect,
                gate_instruction="g" in global_gates,
                use_logit_scale=global_logit_scale,
                match_evidence=match_evidence,
            )
            if num_global_tokens
            else None
        )
        self.motion = MotionFeatures(dim=dim, key_dim=instruction_dim) if motion_features else None
        self.pointers = (
            MatchPointers(
                dim=dim,
                key_dim=instruction_dim,
                out_dim=out_dim,
                num_pointers=num_pointers,
                num_words=num_word_pointers,
                is_conditional=self.needs_instruction,
            )
            if num_pointers
            else None
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as published (normal, std 0.02), except that learnable tokens start random, not at zero.

        At zero the release's global tokens start identical, and identical tokens get identical gradients.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, Gate):
                nn.init.zeros_(module.alpha)
            elif isinstance(module, LocalCompressor | GlobalCompressor) and module.use_logit_scale:
                # SigLIP's own starting point: a temperature of 10. A bias cannot change a softmax.
                nn.init.constant_(module.logit_scale, math.log(10))
                nn.init.zeros_(module.logit_bias)
        if self.global_ is not None and self.global_.query is not None:
            nn.init.normal_(self.global_.query, std=0.02)
        for module in self.modules():
            if isinstance(module, Injector | MatchEvidence | MotionFeatures | MatchPointers | PointerInjector):
                module.reset_parameters()

    @property
    def needs_instruction_tokens(self) -> bool:
        """Whether anything looks at the tokens of the instruction: a branch (fine injection), or word pointers."""
        is_fine = any(branch is not None and branch.injection == "fine" for branch in (self.local, self.global_))
        return is_fine or self.points_at_words

    @property
    def points_at_words(self) -> bool:
        """Whether pointers look for words of the instruction, and must know which of its tokens are padding."""
        return self.num_word_pointers > 0 and self.needs_instruction

    @property
    def needs_instruction(self) -> bool:
        """Whether any branch is steered by the instruction."""
        return any(branch is not None and branch.injection != "none" for branch in (self.local, self.global_))

    def resolve_window(self, window: Window | None, compression: Compression) -> Window | None:
        """Return the window in force: the run-time one, else the default; (1, 1, 1) with compression off.

        Raises:
            ValueError: the compression does not exist, or it is off or a window is asked for without a local branch.
        """
        if compression not in get_args(Compression):
            raise ValueError(f"compression={compression!r} is not one of {', '.join(get_args(Compression))}")
        if self.local is None:
            if window is not None or compression == "off":
                raise ValueError(f"window={window} and compression={compression!r} need a local branch; this has none")
            return None
        if compression == "off":
            if window is not None:
                raise ValueError(f"window={window} has no meaning with compression='off'; leave it out")
            return (1, 1, 1)
        return self.window if window is None else check_window(window)

    def token_count(
        self,
        num_frames: int,
        height: int,
        width: int,
        window: Window | None = None,
        compression: Compression = "conditional",
    ) -> int:
        """Return how many tokens a video of `num_frames` frames of `height` x `width` patches becomes."""
        num_others = 0 if compression == "off" else self.num_global_tokens + self.num_pointers
        return token_count(num_frames, height, width, self.resolve_window(window, compression), num_others)

    def pointer_instruction(
        self, instruction: Instruction, compression: Compression
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return what pointers look for: the instruction `float[V, K]`, and words of it `float[V, W, K]`.

        Each is None where nothing looks for it: pointers then look for what they have learnt.

        Raises:
            ValueError: it is missing.
        """
        if compression == "unguided" or not self.needs_instruction:
            return None, None
        if instruction.pooled is None:
            raise ValueError("pointers need instruction; pass it, or ask for compression='unguided'")
        if not self.points_at_words:
            return instruction.pooled, None
        if instruction.tokens is None:
            raise ValueError("word pointers need instruction_tokens; pass them, or ask for compression='unguided'")
        words = main_words(instruction.pooled, instruction.tokens, instruction.mask, self.num_word_pointers)
        return instruction.pooled, words

    def forward(
        self,
        values: Tensor,
        keys: Tensor | None,
        num_frames: Sequence[int],
        instruction: Tensor | None = None,
        instruction_tokens: Tensor | None = None,
        instruction_mask: Tensor | None = None,
        window: Window | None = None,
        compression: Compression = "conditional",
        return_attention: bool = False,
        video_index: Sequence[int] | None = None,
        has_motion: bool = False,
    ) -> CompressorOutput:
        """Compress a batch of videos.

        Args:
            values: `float[F, H, W, D]`, patch features of all videos' frames, one video after the other.
            keys: `float[F, H, W, K]`, the same patches in the text space of the dual encoder; None: the values.
            num_frames: frames of every video; their sum is F. An image is a video of one frame.
            instruction: `float[V, K]`, pooled text embedding (direct and coarse injection, pointers).
            instruction_tokens: `float[V, L, K]`, an embedding of every text token (fine injection, word pointers).
            instruction_mask: `bool[V, L]`, True on real tokens; None: all are.
            window: (T, H, W) in place of the default, at run time.
            compression: `conditional`, `unguided` (stage `align` of the release) or `off` (of the paper).
            return_attention: also return the attention maps of both branches and of pointers.
            video_index: numbers of the videos that V results are of, where several instructions are about one video;
                `num_frames` then counts videos, and what does not depend on the instruction is done once for each.
                None: one result a video, in order.
            has_motion: whether values and keys come from this compressor's `motion` and need not go through it again.

        Raises:
            ValueError: shapes or counts disagree, the instruction is missing, or compression is off and has motion.
        """
        num_frames = [int(frames) for frames in num_frames]
        self.check_inputs(values, keys, num_frames, instruction, instruction_tokens, instruction_mask, video_index)
        window = self.resolve_window(window, compression)
        if compression == "off":
            assert self.local is not None
            if has_motion:
                raise ValueError("compression='off' passes on features as they are; pass them without motion")
            found = [x.flatten(0, 2) for x in self.local.readout(values).split(num_frames)]
            return CompressorOutput(tuple(found if video_index is None else (found[video] for video in video_index)))
        guide = Instruction(instruction, instruction_tokens, instruction_mask)
        if self.motion is not None and not has_motion:
            values, keys = self.motion(values, keys, num_frames)
        if video_index is not None:
            values = repeat_videos(values, num_frames, video_index)
            keys = None if keys is None else repeat_videos(keys, num_frames, video_index)
            num_frames = [num_frames[video] for video in video_index]
        parts: list[list[Tensor]] = [[] for _ in num_frames]
        local_attention = global_attention = pointer_attention = None
        if self.local is not None:
            assert window is not None
            plan = time_plan(num_frames, window[0]).to(values.device, values.dtype)
            tokens_GABC, attention = self.local(values, keys, plan, window, guide, compression)
            for part, tokens in zip(parts, tokens_GABC.split(plan.counts), strict=True):
                part.append(tokens.flatten(0, 2))
            if return_attention:
                lengths = [min(window[0], frames) for frames in num_frames]
                maps = attention.split(plan.counts)
                local_attention = tuple(x[:, :, :, :length] for x, length in zip(maps, lengths, strict=True))
        if self.global_ is not None:
            tokens_VNC, weights = self.global_(values, num_frames, guide, compression, return_attention)
            for part, tokens in zip(parts, tokens_VNC, strict=True):
                part.append(tokens)
            if weights is not None:
                heads = self.global_.attention.num_heads
                global_attention = tuple(
                    rearrange(x[:, :frames], "(m n) t h w -> m n t h w", m=heads)
                    for x, frames in zip(weights, num_frames, strict=True)
                )
        if self.pointers is not None:
            looked_for = self.pointer_instruction(guide, compression)
            tokens_VPC, attention = self.pointers(values, values if keys is None else keys, num_frames, *looked_for)
            for part, tokens in zip(parts, tokens_VPC, strict=True):
                part.append(tokens)
            if return_attention:
                pointer_attention = tuple(x[:, :frames] for x, frames in zip(attention, num_frames, strict=True))
        tokens = tuple(torch.cat(part) for part in parts)
        return CompressorOutput(tokens, local_attention, global_attention, pointer_attention)

    def check_inputs(
        self,
        values: Tensor,
        keys: Tensor | None,
        num_frames: list[int],
        instruction: Tensor | None = None,
        instruction_tokens: Tensor | None = None,
        instruction_mask: Tensor | None = None,
        video_index: Sequence[int] | None = None,
    ) -> None:
        """Raise ValueError where shapes disagree with each other or with the widths of this compressor."""
        if values.ndim != 4 or values.shape[-1] != self.dim:
            raise ValueError(f"values must be float[F, H, W, {self.dim}], got the shape {tuple(values.shape)}")
        if keys is not None and keys.shape != (*values.shape[:3], self.instruction_dim):
            expected = (*values.shape[:3], self.instruction_dim)
            raise ValueError(f"keys have the shape {tuple(keys.shape)}, expected {expected}, as the values")
        if not num_frames or min(num_frames) < 1 or sum(num_frames) != len(values):
            raise ValueError(f"num_frames={num_frames} must be positive and sum to the {len(values)} frames of values")
        check_video_index(video_index, len(num_frames))
        dim, number = self.instruction_dim, len(num_frames) if video_index is None else len(video_index)
        for name, x, ndim in (("instruction", instruction, 2), ("instruction_tokens", instruction_tokens, 3)):
            if x is not None and (x.ndim != ndim or len(x) != number or x.shape[-1] != dim):
                shape = f"float[{number}, {'' if ndim == 2 else 'L, '}{dim}]"
                what = "videos" if video_index is None else "entries of video_index"
                raise ValueError(f"{name} has the shape {tuple(x.shape)}; {number} {what} need {shape}")
        if instruction_mask is not None and instruction_tokens is not None:
            expected = instruction_tokens.shape[:2]
            if instruction_mask.shape != expected:
                shapes = f"{tuple(instruction_mask.shape)}, the tokens {tuple(expected)}"
                raise ValueError(f"instruction_mask has the shape {shapes}; they must be equal")
            # A stand-in that has no values (an estimate of memory) has nothing to check.
            has_values = type(instruction_mask) is Tensor
            empty = (~instruction_mask.bool().any(1)).nonzero().flatten().tolist() if has_values else []
            if empty:
                raise ValueError(
                    f"the instruction_mask of video {', '.join(map(str, empty))} has no real token; give it one, or "
                    "ask for compression='unguided'"
                )

    def stream(
        self,
        instruction: Tensor | None = None,
        instruction_tokens: Tensor | None = None,
        instruction_mask: Tensor | None = None,
        window: Window | None = None,
        compression: Literal["conditional", "unguided"] = "conditional",
        num_frames: int | None = None,
    ) -> CompressorStream:
        """Return an object that takes one video chunk by chunk and gives exactly the tokens of `forward`.

        Args:
            instruction: `float[1, K]`, as in `forward`.
            instruction_tokens: `float[1, L, K]`, as in `forward`.
            instruction_mask: `bool[1, L]`, as in `forward`.
            window: (T, H, W) in place of the default.
            compression: `conditional` or `unguided`.
            num_frames: the video's length where it is known. Released weights whose local queries are pooled need it,
                because their interpolation depends on the length, and so do pointers, which report parts of it.

        Raises:
            ValueError: the length is needed and missing.
        """
        return CompressorStream(
            self,
            Instruction(instruction, instruction_tokens, instruction_mask),
            self.resolve_window(window, compression),
            compression,
            num_frames,
        )


class RunningSoftmax:
    """Features averaged under a softmax whose logits come in chunks: a maximum, a total and a sum for every row."""

    def __init__(self) -> None:
        self.num_patches = 0
        self.maximum: Tensor | None = None
        self.total: Tensor | None = None
        self.context: Tensor | None = None

    def add(self, logits_VMTHW: Tensor, sum_under: Callable[[Tensor], Tensor]) -> None:
        """Take the logits of a chunk, whose features `sum_under` sums under weights `float[V, M, T, H, W]`."""
        logits = at_least_float32(logits_VMTHW)
        maximum = logits.amax((2, 3, 4))
        if self.maximum is not None:
            maximum = torch.maximum(maximum, self.maximum)
        weights = (logits - maximum[..., None, None, None]).exp_()
        total = weights.sum((2, 3, 4))
        context = at_least_float32(sum_under(weights))
        if self.maximum is not None and self.total is not None and self.context is not None:
            decay = (self.maximum - maximum).exp()
            total = total + decay * self.total
            context = context + decay[..., None] * self.context
        self.maximum, self.total, self.context = maximum, total, context
        self.num_patches += logits[0, 0].numel()

    def read(self, num_patches: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the average `float[V, M, D]` and the rows' `match_features`, `float[V, M, 2]`.

        Args:
            num_patches: `int[V, 1]`, patches of every video where some logits were -inf; None: as many as logits came.
        """
        assert self.maximum is not None
        assert self.total is not None
        assert self.context is not None
        log_count = math.log(self.num_patches) if num_patches is None else num_patches.to(self.total).log()
        log_mean_exp = self.maximum + self.total.log() - log_count
        return self.context / self.total[..., None], torch.stack([self.maximum, log_mean_exp], -1)


class CompressorStream:
    """One video in chunks: local windows close in time order, the global branch keeps an online softmax.

    Memory does not grow with the length: some windows of frames wait for the local branch (as many as a window has
    frames, if the length is not known), and the global branch keeps one running maximum, sum and average a query.
    Motion holds on to four frames. Pointers keep three numbers a frame. Made by `HybridCompressor.stream`.
    """

    def __init__(
        self,
        compressor: HybridCompressor,
        instruction: Instruction,
        window: Window | None,
        compression: Compression,
        num_frames: int | None,
    ) -> None:
        local = compressor.local
        pooled = local is not None and (compression == "unguided" or local.injection != "direct")
        if num_frames is None and pooled and local is not None and local.dialect == "release":
            raise ValueError(
                "this checkpoint's local queries are interpolated over the whole video, so a stream must know its "
                "length: pass num_frames"
            )
        if num_frames is None and compressor.pointers is not None:
            raise ValueError(
                "pointers report times as parts of the whole video, so a stream must know its length: pass num_frames"
            )
        self.compressor = compressor
        self.instruction = instruction
        self.window = window
        self.compression = compression
        self.num_frames = num_frames
        self.motion = None if compressor.motion is None else MotionStream(compressor.motion)
        self.has_keys = False
        self.pushed = 0
        # Frames that have reached the branches; motion holds some back.
        self.seen = 0
        self.local_tokens: list[Tensor] = []
        self.closed = 0
        self.offset = 0
        self.waiting: list[tuple[Tensor, Tensor | None]] = []
        self.query: Tensor | None = None
        self.attended = RunningSoftmax()
        self.pointer_queries: tuple[Tensor, Tensor] | None = None
        self.pointed = RunningSoftmax()
        self.pointer_frames: list[Tensor] = []
        self.finished = False

    def push(self, values: Tensor, keys: Tensor | None = None) -> None:
        """Take the next frames.

        Args:
            values: `float[t, H, W, D]`.
            keys: `float[t, H, W, K]` or None, as in `HybridCompressor.forward`.

        Raises:
            ValueError: shapes disagree, the stream is finished, or frames exceed the announced number.
        """
        if self.finished:
            raise ValueError("this stream is finished; start another one")
        instruction = self.instruction
        self.compressor.check_inputs(
            values, keys, [len(values)], instruction.pooled, instruction.tokens, instruction.mask
        )
        if self.pushed and (keys is not None) != self.has_keys:
            raise ValueError("keys were given for some frames of this stream and not for others; give all or none")
        if self.num_frames is not None and self.pushed + len(values) > self.num_frames:
            raise ValueError(f"{self.pushed + len(values)} frames pushed into a stream of num_frames={self.num_frames}")
        self.has_keys = keys is not None
        self.pushed += len(values)
        self._take(*((values, keys) if self.motion is None else self.motion.push(values, keys)))

    def finish(self) -> Tensor:
        """Return the video's tokens, `float[N, C]`.

        Raises:
            ValueError: no frame, or not the announced number, has been pushed.
        """
        if self.pushed == 0 or (self.num_frames is not None and self.pushed != self.num_frames):
            raise ValueError(f"{self.pushed} frames pushed, {self.num_frames or 'at least 1'} expected")
        self.finished = True
        if self.motion is not None:
            self._take(*self.motion.finish())
        if self.compressor.local is not None:
            self._close(is_last=True)
        tokens = list(self.local_tokens)
        if self.compressor.global_ is not None:
            assert self.query is not None
            average, match = self.attended.read()
            tokens.append(self.compressor.global_.read(self.query, average.to(self.query.dtype), match)[0])
        if self.compressor.pointers is not None:
            average, match = self.pointed.read()
            frames = torch.cat(self.pointer_frames, 2)
            tokens.append(self.compressor.pointers.read(average, match[..., 0], frames, [self.seen])[0])
        return torch.cat(tokens)

    def peek(self) -> Tensor:
        """Return the tokens `float[N, C]` of the frames so far, as if the video ended here; more may be pushed.

        Raises:
            ValueError: as `finish`.
        """
        other = copy.copy(self)
        # Tensors are replaced and never written to, so only what holds them is copied.
        other.local_tokens, other.waiting = list(self.local_tokens), list(self.waiting)
        other.pointer_frames = list(self.pointer_frames)
        other.attended, other.pointed = copy.copy(self.attended), copy.copy(self.pointed)
        if self.motion is not None:
            other.motion = copy.copy(self.motion)
            other.motion.held = list(self.motion.held)
        return other.finish()

    def _take(self, values: Tensor, keys: Tensor | None) -> None:
        if len(values) == 0:
            return
        if self.compressor.global_ is not None:
            self._accumulate(self.compressor.global_, values)
        if self.compressor.pointers is not None:
            self._point(self.compressor.pointers, values, values if keys is None else keys)
        self.seen += len(values)
        if self.compressor.local is not None:
            self.waiting.append((values, keys))
            self._close(is_last=False)

    def _accumulate(self, branch: GlobalCompressor, values: Tensor) -> None:
        if self.query is None:
            self.query = branch.queries(self.instruction, 1, self.compression)
        logits = branch.logits(self.query, values[None], self.seen)
        self.attended.add(logits, partial(branch.context, x_VTHWD=values[None], start=self.seen))

    def _point(self, pointers: MatchPointers, values: Tensor, keys: Tensor) -> None:
        assert self.num_frames is not None
        if self.pointer_queries is None:
            looked_for = self.compressor.pointer_instruction(self.instruction, self.compression)
            self.pointer_queries = pointers.queries(*looked_for, 1)
        logits = pointers.logits(*self.pointer_queries, keys[None], [self.num_frames], self.seen)
        self.pointer_frames.append(pointers.per_frame(logits))
        self.pointed.add(logits, lambda weights: weights.to(values.dtype).flatten(2) @ values.flatten(0, 2))

    def _close(self, *, is_last: bool) -> None:
        branch, window = self.compressor.local, self.window
        assert branch is not None
        assert window is not None
        size = window[0]
        plan = time_plan([self.num_frames or self.seen], size)
        if is_last:
            closed = plan.counts[0]
        elif self.num_frames is None:
            closed = closed_groups(self.seen, size)
        else:
            # A group is closed once its frames, and those its query is interpolated from, have arrived.
            last_needed = torch.maximum(plan.index[:, -1], plan.high)
            closed = int((last_needed < self.seen).sum())
        if closed > self.closed:
            values = torch.cat([v for v, _ in self.waiting])
            keys = None if self.waiting[0][1] is None else torch.cat([k for _, k in self.waiting if k is not None])
            part = plan.slice(self.closed, closed, self.offset).to(values.device, values.dtype)
            first, last = int(part.index.min()), int(part.index.max()) + 1
            if branch.dialect == "release":
                first, last = min(first, int(part.low.min())), max(last, int(part.high.max()) + 1)
            part = plan.slice(self.closed, closed, self.offset + first).to(values.device, values.dtype)
            tokens, _ = branch(
                values[first:last],
                None if keys is None else keys[first:last],
                part,
                window,
                self.instruction,
                self.compression,
            )
            self.local_tokens.append(tokens.flatten(0, 2))
            self.closed = closed
            # The windows to come may reach back by less than one window, where the last ones overlap.
            keep = max(0, (closed - 1) * size - self.offset) if not is_last else len(values)
            self.waiting = [(values[keep:], None if keys is None else keys[keep:])]
            self.offset += keep
