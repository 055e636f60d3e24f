"""`torch.compile` takes the whole compressor as one graph, and its numbers stay."""

from typing import Any

import pytest
import torch

from hicom.model.compressor import HybridCompressor
from invariants import relative_error

DIM, OUT_DIM, LENGTH = 32, 24, 5
BEYOND = {
    "match_evidence": True,
    "motion_features": True,
    "num_pointers": 2,
    "num_word_pointers": 1,
    "local_logit_scale": True,
}


def tokens(compressor: Any, num_frames: list[int], **kwargs: Any) -> torch.Tensor:
    """Return all tokens of random videos; the same ones at every call."""
    generator = torch.Generator().manual_seed(0)
    frames, videos = sum(num_frames), len(num_frames)
    values, keys = (torch.randn(frames, 6, 7, DIM, generator=generator) for _ in range(2))
    guide = torch.randn(videos, DIM, generator=generator)
    words = torch.randn(videos, LENGTH, DIM, generator=generator)
    return torch.cat(compressor(values, keys, num_frames, guide, words, **kwargs).tokens)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"local_injection": "coarse", "global_injection": "fine"},
        {"local_injection": "none", "global_injection": "none"},
        BEYOND,
        {"dialect": "release", "local_gates": "kvg", "global_gates": "g", "global_logit_scale": True},
    ],
    ids=["direct/coarse", "coarse/fine", "unconditional", "beyond the paper", "release"],
)
@pytest.mark.parametrize("num_frames", [[8, 8], [5, 9, 1]], ids=["equal", "ragged"])
def test_one_graph_equals_eager(options: dict[str, Any], num_frames: list[int]) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    compressor = HybridCompressor(dim=DIM, out_dim=OUT_DIM, num_global_tokens=3, **options)
    for parameter in compressor.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    compiled = torch.compile(compressor, fullgraph=True, backend="aot_eager")
    eager, fast = tokens(compressor, num_frames), tokens(compiled, num_frames)
    assert relative_error(fast, eager) < 1e-5
    wanted = torch.autograd.grad(eager.square().mean(), list(compressor.parameters()), allow_unused=True)
    found = torch.autograd.grad(fast.square().mean(), list(compressor.parameters()), allow_unused=True)
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None and other.norm() > 1e-6:
            assert relative_error(one, other) < 1e-4


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_compiled_kernels_equal_eager() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    compressor = HybridCompressor(dim=DIM, out_dim=OUT_DIM, num_global_tokens=3)
    compiled = torch.compile(compressor, fullgraph=True)
    with torch.no_grad():
        assert relative_error(tokens(compiled, [8, 8]), tokens(compressor, [8, 8])) < 1e-5
