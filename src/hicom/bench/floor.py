"""The least that each part has to do: operations and bytes, counted from sizes, over what this machine can do.

Operations are those of the matrix products, two for a multiply and add; bytes are inputs and weights read once and
outputs written once. A part's floor is the longer of operations over the matmul rate and bytes over the copy bandwidth.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..model.config import HIComConfig
from ..model.ops import token_count


@dataclass(frozen=True)
class Cost:
    """Operations and bytes.

    Attributes:
        flops: floating-point operations of matrix products.
        num_bytes: bytes read and written.
    """

    flops: float
    num_bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.num_bytes + other.num_bytes)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.flops * times, self.num_bytes * times)


@dataclass(frozen=True)
class Machine:
    """What a device reaches in one precision.

    Attributes:
        flops_per_s: of a large matrix product.
        bytes_per_s: read and written by a large copy.
    """

    flops_per_s: float
    bytes_per_s: float

    def floor_s(self, cost: Cost) -> float:
        """Return the seconds below which nothing with this cost can be."""
        return max(cost.flops / self.flops_per_s, cost.num_bytes / self.bytes_per_s)

    def bound(self, cost: Cost) -> str:
        """Return which of the two the floor is: `operations` or `bytes`."""
        is_bytes = cost.num_bytes / self.bytes_per_s > cost.flops / self.flops_per_s
        return "bytes" if is_bytes else "operations"

    def judge(self, facts: dict[str, Any]) -> None:
        """Add to measured `seconds` and `cost` the floor, what it is bound by, and how many times it was taken."""
        cost = None if facts["cost"] is None else Cost(**facts["cost"])
        floor_s = None if cost is None else self.floor_s(cost)
        facts["floor_s"] = floor_s
        facts["bound"] = None if cost is None else self.bound(cost)
        facts["distance"] = None if floor_s is None else facts["seconds"] / floor_s

    def better(self, other: Machine) -> Machine:
        """Return the best of both: what else a machine does can only slow it down."""
        rates = max(self.flops_per_s, other.flops_per_s), max(self.bytes_per_s, other.bytes_per_s)
        return Machine(*rates)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU to finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def shortest_s(run: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Return the shortest of several times, after a first one that does not count."""
    run()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


@torch.inference_mode()
def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Measure the matmul rate and the copy bandwidth of a device, in about a second."""
    size, length = (8192, 2**30) if device.type == "cuda" else (1536, 2**27)
    a = torch.randn(size, size, device=device, dtype=dtype)
    source = torch.ones(length // dtype.itemsize, device=device, dtype=dtype)
    target = torch.empty_like(source)
    matmul_s = shortest_s(lambda: a @ a, device)
    copy_s = shortest_s(lambda: target.copy_(source), device)
    return Machine(2 * size**3 / matmul_s, 2 * length / copy_s)


def linear_cost(
    rows: float, dim: int, out_dim: int, itemsize: int, *, reads: bool = False, writes: bool = False
) -> Cost:
    """Return the cost of one linear layer: its weights are read, and input or output on request."""
    num_bytes = dim * out_dim + rows * (dim * reads + out_dim * writes)
    return Cost(2 * rows * dim * out_dim, num_bytes * itemsize)


def encoder_cost(rows: float, length: int, dim: int, hidden: int, num_layers: int, itemsize: int) -> Cost:
    """Return the cost of a transformer encoder over `rows` tokens in sequences of `length`; weights are read once."""
    weights = 4 * dim * dim + 2 * dim * hidden
    return Cost(rows * (2 * weights + 4 * length * dim), weights * itemsize) * num_layers


def vision_cost(config: HIComConfig, num_frames: int, itemsize: int, *, has_keys: bool) -> Cost:
    """Return the cost of the vision tower: frames in, values and, with an instruction, keys out."""
    vision = config.vision_config
    dim, hidden, patches = vision.hidden_size, vision.intermediate_size, config.grid_size**2
    rows = num_frames * patches
    pixels = 3 * vision.patch_size**2
    cost = linear_cost(rows, pixels, dim, itemsize, reads=True, writes=True)
    cost += encoder_cost(rows, patches, dim, hidden, vision.num_hidden_layers, itemsize)
    if has_keys:
        cost += linear_cost(rows, dim, hidden, itemsize) + linear_cost(rows, hidden, dim, itemsize, writes=True)
    return cost


def instruction_cost(config: HIComConfig, itemsize: int) -> Cost:
    """Return the cost of embedding one instruction, padded to full length as SigLIP was trained."""
    text, length = config.instruction_config, config.max_instruction_length
    return encoder_cost(length, length, text.hidden_size, text.intermediate_size, text.num_hidden_layers, itemsize)


def mlp_cost(rows: float, dim: int, out_dim: int, itemsize: int) -> Cost:
    """Return the cost of a readout: two layers, the tokens written."""
    return linear_cost(rows, dim, out_dim, itemsize) + linear_cost(rows, out_dim, out_dim, itemsize, writes=True)


def local_cost(config: HIComConfig, num_frames: int, itemsize: int) -> Cost:
    """Return the cost of the local branch without its readout: two products a patch, values and keys read once."""
    rows = num_frames * config.grid_size**2
    width = config.vision_config.hidden_size + config.instruction_dim
    return Cost(2 * rows * width, rows * width * itemsize)


def compressor_cost(config: HIComConfig, column: str, num_frames: int, itemsize: int) -> Cost:
    """Return the cost of a compressor for one video.

    The plain form has the cost of ours, because it computes the same numbers: what more it does is its distance.

    Args:
        config: sizes of the model.
        column: name of the compressor.
        num_frames: frames of the video.
        itemsize: bytes of a number.

    Raises:
        ValueError: there is no such column.
    """
    dim, out_dim, grid = config.vision_config.hidden_size, config.text_config.hidden_size, config.grid_size
    rows = num_frames * grid**2
    read = Cost(0, rows * dim * itemsize)
    if column in ("hicom", "plain"):
        window = config.window
        num_local = token_count(num_frames, grid, grid, window, 0) if window is not None else 0
        # With an absorbed projection every head's queries meet the features as they are.
        num_queries = config.num_global_tokens
        num_rows = num_queries * max(1, dim // 128)
        cost = local_cost(config, num_frames, itemsize) if window is not None else read
        cost += Cost(4 * rows * num_rows * dim, 0) + linear_cost(4 * num_queries, dim, dim, itemsize)
        return cost + mlp_cost(num_local, dim, out_dim, itemsize) + mlp_cost(num_queries, dim, out_dim, itemsize)
    if column == "no_compression":
        return read + mlp_cost(rows, dim, out_dim, itemsize)
    if column == "llava_video":
        # The MLP comes before the pooling, as published; a quarter of what it computes is written.
        pooled = token_count(num_frames, grid, grid, (1, 2, 2), 0)
        return read + mlp_cost(rows, dim, out_dim, itemsize) + Cost(0, (pooled - rows) * out_dim * itemsize)
    if column == "spatial_pool":
        return read + mlp_cost(token_count(num_frames, grid, grid, (1, 3, 3), 0), dim, out_dim, itemsize)
    if column in ("qformer", "perceiver"):
        num_queries, num_layers, num_cross = (32, 4, 2) if column == "qformer" else (64, 6, 6)
        cross = linear_cost(rows, dim, 2 * dim, itemsize) + Cost(4 * rows * num_queries * dim, 0)
        own = linear_cost(num_queries, dim, 12 * dim, itemsize)
        return read + cross * num_cross + own * num_layers + linear_cost(num_queries, dim, out_dim, itemsize)
    raise ValueError(f"no count for the column {column!r}")


def llm_layer_weights(config: HIComConfig) -> int:
    """Return the weights of one layer of the LLM."""
    text = config.text_config
    hidden, heads = text.hidden_size, text.num_attention_heads
    head_dim = hidden // heads
    return int(hidden * head_dim * 2 * (heads + text.num_key_value_heads) + 3 * hidden * text.intermediate_size)


def kv_bytes(config: HIComConfig, num_tokens: int, itemsize: int) -> int:
    """Return the bytes of one layer's keys and values."""
    text = config.text_config
    return int(2 * num_tokens * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads) * itemsize)


def prefill_cost(config: HIComConfig, num_tokens: int, itemsize: int) -> Cost:
    """Return the cost of reading a prompt, up to the logits of its last place."""
    text, weights = config.text_config, llm_layer_weights(config)
    # Causal attention: half of all pairs.
    flops = 2 * num_tokens * weights + 2 * num_tokens**2 * text.hidden_size
    layer = Cost(flops, weights * itemsize + kv_bytes(config, num_tokens, itemsize))
    return layer * text.num_hidden_layers + linear_cost(1, text.hidden_size, text.vocab_size, itemsize)


def token_cost(config: HIComConfig, num_tokens: int, itemsize: int) -> Cost:
    """Return the cost of writing one token after `num_tokens`: every weight and all keys and values are read."""
    text, weights = config.text_config, llm_layer_weights(config)
    flops = 2 * weights + 4 * num_tokens * text.hidden_size
    layer = Cost(flops, weights * itemsize + kv_bytes(config, num_tokens, itemsize))
    return layer * text.num_hidden_layers + linear_cost(1, text.hidden_size, text.vocab_size, itemsize)
