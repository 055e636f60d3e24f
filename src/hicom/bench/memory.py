"""What a run would take, so that one that does not fit is refused before any work is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..encoding import free_memory
from ..model.compressor import MAX_LOGITS
from ..model.config import HIComConfig
from .floor import Machine, compressor_cost, kv_bytes, llm_layer_weights, prefill_cost
from .run import PROMPT_TOKENS, Part, count_tokens, smaller_size
from .shapes import build_compressors

MEMORY_SHARE = 0.9
"""Of the free memory, what a run may take."""


def needed_bytes(
    config: HIComConfig,
    columns: Sequence[str],
    num_frames: int,
    itemsize: int,
    machine: Machine,
    max_s: float,
    *,
    is_whole: bool,
) -> int:
    """Return an estimate of the memory that a run takes: weights, features, and the largest part at work."""
    vision, text = config.vision_config, config.text_config
    dim, out_dim, patches = vision.hidden_size, text.hidden_size, config.grid_size**2
    layers = text.num_hidden_layers if is_whole else 1
    tower = (4 * dim * dim + 2 * dim * vision.intermediate_size) * 2
    weights = text.vocab_size * out_dim + layers * llm_layer_weights(config)
    weights += tower * (vision.num_hidden_layers if is_whole else 1)
    largest = 0
    for column in columns:
        frames = smaller_size(compressor_part(config, column, num_frames, itemsize), machine, max_s)
        # A number of tensors of the size of the values, or of the hidden layer of an MLP on every patch.
        copies = {"hicom": 0.4, "plain": 5, "spatial_pool": 1, "qformer": 5, "perceiver": 5}.get(column, 0)
        wide = 3 if column in ("no_compression", "llava_video") else 0
        work = frames * patches * (dim * copies + out_dim * wide) + 3 * MAX_LOGITS * (column == "hicom")
        count = visual_tokens(config, column, num_frames) + PROMPT_TOKENS
        length = smaller_size(prefill_part(config, count, itemsize, is_whole=is_whole), machine, max_s)
        read = length * (6 * out_dim + 3 * text.intermediate_size) * itemsize + layers * kv_bytes(
            config, length, itemsize
        )
        features = frames * patches * 2 * dim
        largest = max(largest, int((features + work) * itemsize), read)
    return int(weights * itemsize) + largest


def compressor_part(config: HIComConfig, column: str, num_frames: int, itemsize: int) -> Part:
    """Return a compressor's size and cost alone."""
    return Part(num_frames, "frames", _nothing, lambda n: compressor_cost(config, column, n, itemsize))


def prefill_part(config: HIComConfig, length: int, itemsize: int, *, is_whole: bool) -> Part:
    """Return a prompt's size and cost alone."""
    layers = config.text_config.num_hidden_layers
    return Part(
        length, "tokens", _nothing, lambda n: prefill_cost(config, n, itemsize), layers, is_one_layer=not is_whole
    )


def _nothing(size: int) -> Callable[[], object]:
    raise AssertionError("this part is counted, not measured")


def visual_tokens(config: HIComConfig, column: str, num_frames: int) -> int:
    """Return how many visual tokens a column makes of a video, without building it."""
    with torch.device("meta"):
        (module,) = build_compressors(config, (column,), None).values()
    return count_tokens(module, num_frames, config.grid_size)


def compressor_bytes(
    config: HIComConfig, columns: Sequence[str], num_frames: int, batch_size: int, itemsize: int
) -> int:
    """Return an estimate of the memory of a compressor's forward and backward pass."""
    dim, out_dim = config.vision_config.hidden_size, config.text_config.hidden_size
    patches = batch_size * num_frames * config.grid_size**2
    copies = max(
        {"hicom": 1.5, "plain": 6, "spatial_pool": 1, "qformer": 8, "perceiver": 20}.get(c, 0) for c in columns
    )
    wide = 4 * out_dim if {"no_compression", "llava_video"} & set(columns) else 0
    return int(patches * (dim * (2 + copies) + wide) * itemsize)


def split_by_memory(
    needs: Callable[[Sequence[str], int, int], int],
    columns: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    device: torch.device,
) -> tuple[list[tuple[int, int]], list[dict[str, int]]]:
    """Return the sizes (batch size, frames) that fit into memory, and for the others what they would need."""
    free = free_memory(device)
    fitting, left_out = [], []
    for batch, frames in sizes:
        needed = needs(columns, frames, batch)
        if free is None or needed <= MEMORY_SHARE * free:
            fitting.append((batch, frames))
        else:
            left_out.append({"batch_size": batch, "num_frames": frames, "needed_bytes": needed})
    return fitting, left_out


def check_memory(
    needs: Callable[[Sequence[str], int, int], int],
    columns: Sequence[str],
    num_frames: Sequence[int],
    batch_sizes: Sequence[int],
    device: torch.device,
) -> None:
    """Raise ValueError, before any work, where a run would not fit, naming the estimate and what would fit.

    Args:
        needs: estimated bytes of columns, a number of frames and a batch size.
        columns: that are asked for.
        num_frames: likewise.
        batch_sizes: likewise; `(1,)` where there is no choice of them.
        device: where the run would be.
    """
    free = free_memory(device)
    frames, batch = max(num_frames), max(batch_sizes)
    needed = needs(columns, frames, batch)
    if free is None or needed <= MEMORY_SHARE * free:
        return
    limit, flags = MEMORY_SHARE * free, []
    fewer = frames
    while fewer > 1 and needs(columns, fewer, batch) > limit:
        fewer //= 2
    if needs(columns, fewer, batch) <= limit:
        flags.append(f"--num-frames {fewer}")
    if batch > 1 and needs(columns, frames, 1) <= limit:
        smaller = next(size for size in range(batch, 0, -1) if needs(columns, frames, size) <= limit)
        flags.append(f"--batch-sizes {smaller}")
    fitting = [column for column in columns if needs([column], frames, batch) <= limit]
    if fitting and len(fitting) < len(columns):
        flags.append(f"--columns {' '.join(fitting)}")
    advice = f"these would fit: {' or '.join(flags)}" if flags else "a smaller --shape or --dtype bfloat16 is needed"
    size = f"{frames} frames" + (f" in batches of {batch}" if batch > 1 else "")
    raise ValueError(
        f"{size} of {', '.join(columns)} need about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on "
        f"{device}; {advice}"
    )
