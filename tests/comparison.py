"""Small compressors and inputs, and the comparison with the slow reference, for the tests of the compressor."""

from typing import Any

import torch
from torch import Tensor

import reference
from hicom.model.compressor import HybridCompressor
from invariants import assert_close

DIM, OUT_DIM, LENGTH = 8, 6, 4
SHIFTS_OF_LOGITS = ("logit_bias", "k_proj.bias", "key_gate.norm.bias")
EXACT, FLOAT32 = 1e-10, 1e-5


def make(*, seed: int = 0, **options: Any) -> HybridCompressor:
    """A small compressor whose every parameter is away from its starting point (gates start closed, films flat)."""
    options = {"dim": DIM, "out_dim": OUT_DIM, "window": (2, 2, 3), "num_global_tokens": 2} | options
    compressor = HybridCompressor(**options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in compressor.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("alpha"):
                parameter.fill_(0.4)
            elif "norm.weight" in name:
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim == 2 and "query" not in name:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(0.5 * noise)
    return compressor


def make_inputs(
    num_frames: list[int],
    height: int = 3,
    width: int = 4,
    *,
    dim: int = DIM,
    instruction_dim: int | None = None,
    seed: int = 1,
) -> dict[str, Any]:
    """Everything that `forward` takes; half of the videos have padded instructions."""
    generator = torch.Generator().manual_seed(seed)
    key_dim = dim if instruction_dim is None else instruction_dim
    mask = torch.ones(len(num_frames), LENGTH, dtype=torch.bool)
    mask[::2, -1] = False
    return {
        "values": torch.randn(sum(num_frames), height, width, dim, generator=generator),
        "keys": torch.randn(sum(num_frames), height, width, key_dim, generator=generator),
        "num_frames": num_frames,
        "instruction": torch.randn(len(num_frames), key_dim, generator=generator),
        "instruction_tokens": torch.randn(len(num_frames), LENGTH, key_dim, generator=generator),
        "instruction_mask": mask,
    }


def cast(inputs: dict[str, Any], dtype: torch.dtype, *, requires_grad: bool = False) -> dict[str, Any]:
    """Fresh leaves of `dtype` for the floating point inputs."""
    return {
        name: x.detach().to(dtype, copy=True).requires_grad_(requires_grad)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for name, x in inputs.items()
    }


def select(inputs: dict[str, Any], video: int) -> dict[str, Any]:
    """The inputs of one video of a batch."""
    counts = inputs["num_frames"]
    one: dict[str, Any] = {"num_frames": [counts[video]]}
    for name in ("values", "keys"):
        one[name] = None if inputs[name] is None else inputs[name].split(counts)[video]
    for name in ("instruction", "instruction_tokens", "instruction_mask"):
        one[name] = inputs[name][[video]]
    return one


def weighted_loss(tokens: tuple[Tensor, ...]) -> Tensor:
    """A scalar in which every number of every token has its own weight."""
    flat = torch.cat(tokens).flatten()
    return (flat * torch.sin(torch.arange(1, len(flat) + 1, dtype=flat.dtype))).sum()


def gradients(leaves: dict[str, Any]) -> dict[str, Tensor]:
    """Gradient of every leaf that has one."""
    return {
        name: x.grad for name, x in leaves.items() if isinstance(x, Tensor) and x.requires_grad and x.grad is not None
    }


def run_reference(
    compressor: HybridCompressor, setting: reference.Setting, inputs: dict[str, Any]
) -> tuple[list[reference.Reference], dict[str, Tensor]]:
    """Results and all gradients of the reference, video after video."""
    parameters = {name: x.detach().double().requires_grad_() for name, x in compressor.named_parameters()}
    leaves = cast(inputs, torch.float64, requires_grad=True)
    results = []
    for video in range(len(inputs["num_frames"])):
        one = select(leaves, video)
        per_video = {name: one[name][0] for name in one if name.startswith("instruction") and one[name] is not None}
        results.append(reference.compress(parameters, setting, one["values"], one["keys"], **per_video))
    weighted_loss(tuple(result.tokens for result in results)).backward()
    return results, gradients(parameters | leaves)


def run(
    compressor: HybridCompressor, inputs: dict[str, Any], dtype: torch.dtype, **options: Any
) -> tuple[Any, dict[str, Tensor]]:
    """Results and all gradients of the compressor in `dtype`."""
    compressor.to(dtype).zero_grad(set_to_none=True)
    leaves = cast(inputs, dtype, requires_grad=True)
    output = compressor(**leaves, return_attention=True, **options)
    weighted_loss(output.tokens).backward()
    return output, gradients(dict(compressor.named_parameters()) | leaves)


def assert_equals_reference(
    compressor: HybridCompressor, setting: reference.Setting, inputs: dict[str, Any], **options: Any
) -> None:
    """Tokens, attention maps and all gradients equal the reference, in float64 and in float32."""
    results, expected_gradients = run_reference(compressor, setting, inputs)
    # What only shifts the logits of a softmax has no gradient on paper, rounding here; single numbers nearly cancel.
    largest = max(gradient.abs().max().item() for gradient in expected_gradients.values())
    # Small gradients come of larger ones: what float32 rounds there (eps is 1.2e-7 of them) is more than 1e-5 of 1e-2.
    for dtype, tolerance, small in ((torch.float64, EXACT, 1e-2), (torch.float32, FLOAT32, 3e-2)):
        output, found_gradients = run(compressor, inputs, dtype, **options)
        for video, result in enumerate(results):
            assert_close(output.tokens[video], result.tokens, tolerance, f"{dtype} tokens of video {video}")
            if result.local_attention:
                maps = torch.stack(result.local_attention)
                found = output.local_attention[video].detach().flatten(0, 2)
                assert_close(found, maps, tolerance, f"{dtype} local attention of video {video}")
            if result.global_attention:
                maps = torch.stack(result.global_attention, dim=1)
                found = output.global_attention[video].detach()
                assert_close(found, maps, tolerance, f"{dtype} global attention of video {video}")
            if result.pointer_attention:
                maps = torch.stack(result.pointer_attention)
                found = output.pointer_attention[video].detach()
                assert_close(found, maps, tolerance, f"{dtype} pointer attention of video {video}")
        assert found_gradients.keys() <= expected_gradients.keys()
        for name, expected in expected_gradients.items():
            found = found_gradients.get(name, torch.zeros_like(expected))
            floor = largest if name.endswith(SHIFTS_OF_LOGITS) or expected.numel() == 1 else small * largest
            assert_close(found, expected, tolerance, f"{dtype} gradient of {name}", floor=floor)
