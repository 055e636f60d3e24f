"""What proves that a language model can be HICom's: a run without numbers before it is loaded, one with them after.

The first takes no memory at any size, so what fails is said before gigabytes are read. The second compares logits of
the language model's own class with those of the model that was made of it.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from .config import HIComConfig
from .memory import empty_model, without_numbers
from .modeling import HIComForConditionalGeneration, VisionFeatures
from .tail import empty_llm

NUM_TOKENS, NUM_FRAMES = 4, 2
REHEARSED: set[str] = set()
"""Configurations that passed in this process."""


class Operations(TorchDispatchMode):
    """Counts operations on tensors, each with the plain numbers that it is given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[Any] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count it."""
        if func.namespace == "aten":  # others only ask for a device and the like
            self.counts[func, tuple(each for each in args if isinstance(each, int | float))] += 1
        return func(*args, **(kwargs or {}))


def rehearse(config: HIComConfig) -> None:
    """Run a model of these sizes without numbers: text, then a training step on a video.

    Raises:
        ValueError: the LLM does not treat the embeddings of tokens as it treats the tokens, or the model does not run.
    """
    key = config.to_json_string()
    if key in REHEARSED:
        return
    config = copy.deepcopy(config)
    # The other ways to compute experts need numbers.
    config.text_config._experts_implementation = "batched_mm"
    name = config.text_config.model_type
    llm = empty_llm(config.text_config).eval()
    with FakeTensorMode():
        without_numbers(llm)
        ids = torch.zeros(1, NUM_TOKENS, dtype=torch.long)
        try:
            by_tokens = operations(lambda: llm(input_ids=ids, use_cache=False))
        except Exception:
            # This one needs numbers to run at all, or does not run by itself: `compare` finds out.
            return
        try:
            lookup = llm.get_input_embeddings()
            by_embeddings = operations(lambda: llm(inputs_embeds=lookup(ids), use_cache=False))
        except Exception as error:
            raise ValueError(f"{refused(name)} it does not run from embeddings alone: {describe(error)}") from error
    if by_tokens != by_embeddings:
        raise ValueError(
            f"{refused(name)} it computes otherwise from tokens than from their embeddings, and visual tokens have "
            "embeddings only"
        )
    model = empty_model(config)
    with FakeTensorMode():
        try:
            train_step(without_numbers(model))
        except Exception as error:
            raise ValueError(f"{refused(name)} a training step with it fails: {describe(error)}") from error
    REHEARSED.add(key)


def operations(run: Callable[[], object]) -> Counter[Any]:
    """Return what a call computes."""
    with torch.no_grad(), Operations() as mode:
        run()
    return mode.counts


def train_step(model: HIComForConditionalGeneration) -> None:
    """Run the features of a video and a few tokens forward and backward."""
    config, grid = model.config, model.config.grid_size
    model.train()
    # Not the tower itself: SigLIP2 asks for numbers of its frames' sizes.
    values = torch.empty(NUM_FRAMES, grid, grid, config.vision_config.hidden_size)
    keys = torch.empty(NUM_FRAMES, grid, grid, config.instruction_dim) if config.is_conditional else None
    instruction = torch.zeros(1, NUM_TOKENS, dtype=torch.long) if config.is_conditional else None
    (visual,) = model.model.compress(VisionFeatures(values, keys), [NUM_FRAMES], instruction).tokens
    words = model.get_input_embeddings()(torch.zeros(1, NUM_TOKENS, dtype=torch.long))
    embeddings = torch.cat((visual[None].to(words), words), 1)
    mask, labels = (torch.ones(embeddings.shape[:2], dtype=torch.long) for _ in range(2))
    mask[:, 0] = 0  # padding: without any, some masks are not made
    model(inputs_embeds=embeddings, attention_mask=mask, labels=labels, use_cache=False).loss.backward()


@torch.no_grad()
def compare(llm: PreTrainedModel, model: HIComForConditionalGeneration) -> None:
    """Compare the logits of a language model's own class with those of the model that was made of it.

    Args:
        llm: the language model; weights are shared with `model`.
        model: of the same precision.

    Raises:
        ValueError: they differ, or the language model does not run.
    """
    name = model.config.text_config.model_type
    ids = torch.linspace(0, llm.config.vocab_size - 1, NUM_TOKENS, device=llm.device).long()[None]
    try:
        expected = llm.eval()(input_ids=ids, use_cache=False).logits
    except Exception as error:
        raise ValueError(f"the language model ({name}) does not run: {describe(error)}") from error
    try:
        found = model.eval()(input_ids=ids, use_cache=False).logits
    except Exception as error:
        raise ValueError(f"{refused(name)} it does not run from embeddings alone: {describe(error)}") from error
    # The same operations on the same numbers; a little is left to kernels that may choose.
    tolerance = 1e-5 if expected.dtype == torch.float32 else 1e-2
    scale = max(1.0, float(expected.abs().max()))
    if found.shape != expected.shape or not torch.allclose(
        found, expected, rtol=tolerance, atol=tolerance * scale, equal_nan=True
    ):
        raise ValueError(f"{refused(name)} logits of the same tokens differ from those of its own class")


def refused(name: str) -> str:
    """Return the beginning of a message."""
    return f"{name} cannot be HICom's language model:"


def describe(error: Exception) -> str:
    """Return an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
