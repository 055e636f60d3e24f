"""The compressor as the released code runs it: one sample after the other, keys and values of every patch projected.

What `hicom bench` compares `HybridCompressor` with, from the same weights: the numbers are the same, the work is not.

Legend: V videos, F packed frames (of all videos, one after the other), T frames of one video, H W patch grid, G time
groups, N learnable tokens, D vision width, K width of keys and instruction.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from ..model.compressor import CompressorOutput, HybridCompressor, Instruction
from ..model.ops import Window, gather_windows, sinusoidal_positions, time_plan


class PlainCompressor(nn.Module):
    """A loop over the samples of a batch, windows cut as copies, attention with the keys and values of all patches.

    Args:
        compressor: owner of the weights: the paper's dialect and both branches, without options beyond the paper.

    Raises:
        ValueError: the compressor has what the published one has not, or lacks a branch.
    """

    def __init__(self, compressor: HybridCompressor) -> None:
        super().__init__()
        local, global_ = compressor.local, compressor.global_
        if local is None or global_ is None or local.injection != "direct" or global_.injection != "coarse":
            raise ValueError("the plain form has a local branch with direct and a global one with coarse injection")
        beyond = (compressor.motion, compressor.pointers, local.evidence, local.key_gate, local.value_gate)
        if any(part is not None for part in beyond) or local.use_logit_scale or global_.use_logit_scale:
            raise ValueError("the plain form has no options beyond the paper, no gates and no logit scale")
        if local.dialect != "paper":
            raise ValueError("the plain form is that of the paper's dialect")
        self.compressor = compressor

    @property
    def needs_instruction_tokens(self) -> bool:
        """Whether fine injection is used: it is not."""
        return False

    def token_count(self, num_frames: int, height: int, width: int) -> int:
        """Return how many tokens a video of `num_frames` frames of `height` x `width` patches becomes."""
        return self.compressor.token_count(num_frames, height, width)

    def forward(
        self, values: Tensor, keys: Tensor | None, num_frames: Sequence[int], instruction: Tensor
    ) -> CompressorOutput:
        """Compress a batch of videos one by one; arguments as in `HybridCompressor.forward`."""
        assert self.compressor.window is not None
        keys = values if keys is None else keys
        tokens, first = [], 0
        for number, frames in enumerate(num_frames):
            part = slice(first, first + frames)
            guide = instruction[number : number + 1]
            local = self.local_tokens(values[part], keys[part], guide, self.compressor.window)
            tokens.append(torch.cat([local, self.global_tokens(values[part], guide)]))
            first += frames
        return CompressorOutput(tuple(tokens))

    def local_tokens(self, values_THWD: Tensor, keys_THWK: Tensor, guide_1K: Tensor, window: Window) -> Tensor:
        """Return `float[N, C]`: every window's patches under a softmax of their products with one query a window."""
        local = self.compressor.local
        assert local is not None
        assert local.injector is not None
        plan = time_plan([len(values_THWD)], window[0]).to(values_THWD.device, values_THWD.dtype)
        keys, values = (
            rearrange(gather_windows(x, plan, window), "g a b t h w d -> (g a b) (t h w) d").contiguous()
            for x in (keys_THWK, values_THWD)
        )
        query = repeat(local.injector.embed(guide_1K), "1 d -> n 1 d", n=len(keys))
        logits = query @ keys.mT * keys.shape[-1] ** -0.5
        return local.readout((logits.softmax(-1) @ values).squeeze(1))

    def global_tokens(self, values_THWD: Tensor, guide_1K: Tensor) -> Tensor:
        """Return `float[N, C]`: multi-head attention of the learnable tokens over all patches."""
        branch = self.compressor.global_
        assert branch is not None
        attention = branch.attention
        query_ND = branch.queries(Instruction(guide_1K, None, None), 1, "conditional")[0]
        positions = sinusoidal_positions(*values_THWD.shape).to(values_THWD)
        split = "p (m e) -> m p e"
        q = rearrange(attention.q_proj(query_ND), split, m=attention.num_heads)
        k = rearrange(attention.k_proj((values_THWD + positions).flatten(0, 2)), split, m=attention.num_heads)
        v = rearrange(attention.v_proj(values_THWD.flatten(0, 2)), split, m=attention.num_heads)
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        return branch.readout(query_ND + attention.out_proj(rearrange(weights @ v, "m n e -> n (m e)")))
