"""Assertions that many tests share. Each message names the likely cause, so that a failure diagnoses itself."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn


def relative_error(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Largest difference over the largest magnitude of `expected` (or `floor`, where that is larger)."""
    difference = (found.double() - expected.double()).abs().max().item()
    scale = max(expected.double().abs().max().item(), floor)
    return 0.0 if difference == 0 else difference / scale if scale > 0 else float("inf")


def assert_close(found: Tensor, expected: Tensor, tolerance: float, name: str, *, floor: float = 0.0) -> None:
    """`found` equals `expected` within `tolerance` of its largest magnitude."""
    assert found.shape == expected.shape, f"{name}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    assert torch.isfinite(found).all(), f"{name}: not finite; a softmax over no place, or a division by a zero norm?"
    error = relative_error(found, expected, floor)
    assert error <= tolerance, f"{name}: relative error {error:.1e} is above {tolerance:.0e}"


def assert_batched_equals_single(
    batched: Sequence[Tensor], single: Sequence[Tensor], tolerance: float, name: str = "tokens"
) -> None:
    """A video's result does not depend on the videos beside it."""
    assert len(batched) == len(single), f"{len(batched)} results for {len(single)} videos"
    for video, (found, expected) in enumerate(zip(batched, single, strict=True)):
        where = f"{name} of video {video} in a batch (does padding leak, or does it meet another video's instruction?)"
        assert_close(found, expected, tolerance, where)


def assert_all_trainable_get_grad(module: nn.Module, *, zero: Iterable[str] = (), noise: float = 1e-12) -> None:
    """After `backward`, every trainable parameter has a gradient above rounding, `noise` times the largest of all.

    Names that end with one in `zero` have no influence on paper. They are checked too: a gradient there means that the
    reason for the exception is gone. The default `noise` is for float64.
    """
    zero = tuple(zero)
    trainable = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    largest = {name: 0.0 if p.grad is None else p.grad.abs().max().item() for name, p in trainable.items()}
    threshold = noise * max(largest.values())
    for name, gradient in largest.items():
        if name.endswith(zero):
            assert gradient <= threshold, (
                f"{name} gets the gradient {gradient:.1e}; it was expected to have no influence"
            )
        else:
            assert gradient > threshold, (
                f"{name} gets no gradient: it is not used in this mode, or something detaches it"
            )


def assert_counts_agree(count: Callable[..., int], tokens: Tensor, *sizes: object) -> None:
    """What `token_count` promises is what comes out; the processor expands placeholders by the promise."""
    promised = count(*sizes)
    assert promised == len(tokens), f"token_count{sizes} = {promised}, but {len(tokens)} tokens came out"
