"""Frames to what a vision tower takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F


def check_frames(frames: np.ndarray) -> np.ndarray:
    """Return frames; raise ValueError where they are not `uint8[T, H, W, 3]`."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames must be uint8[T, H, W, 3], got {frames.dtype}{list(frames.shape)}")
    return frames


def to_pixels(frames: np.ndarray, size: int, mean_rgb: Sequence[float], std_rgb: Sequence[float]) -> Tensor:
    """Return `float32[T, 3, size, size]` of `uint8[T, H, W, 3]`: see `HIComProcessor.pixel_values`."""
    check_frames(frames)
    mean, std = torch.tensor(mean_rgb), torch.tensor(std_rgb)
    x = rearrange(torch.from_numpy(np.require(frames, requirements=["C", "W"])), "t h w c -> t c h w")
    height, width = x.shape[-2:]
    side = max(height, width)
    if height != width:
        square = (mean * 255).to(torch.uint8)[None, :, None, None].repeat(len(x), 1, side, side)
        top, left = (side - height) // 2, (side - width) // 2
        square[..., top : top + height, left : left + width] = x
        x = square
    if side != size:
        x = F.interpolate(x, (size, size), mode="bicubic", antialias=True)
    return (x.float() / 255 - mean[:, None, None]) / std[:, None, None]
