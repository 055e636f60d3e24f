"""Measures all parts of answering about a video, for every compressor in one run, and the compressor alone.

What would take too long is measured smaller and scaled by its count of operations and bytes; every such number carries
a note. Legend: T frames, H W patch grid, D vision width, K width of keys and instruction.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..encoding import FRAMES_PER_PASS
from ..model.baselines import Baseline
from ..model.compressor import HybridCompressor
from ..model.config import HIComConfig
from ..model.modeling import returned_cache
from ..model.ops import token_count
from ..video import read_frames, write_video
from .floor import (
    Cost,
    Machine,
    compressor_cost,
    instruction_cost,
    kv_bytes,
    local_cost,
    mlp_cost,
    prefill_cost,
    token_cost,
    vision_cost,
)
from .measure import Measurement, measure
from .plain import PlainCompressor
from .shapes import CONDITIONAL, Subject, build_compressors

PROMPT_TOKENS = 64
"""Text tokens of the prompt beside the visual ones."""
USUAL_DISTANCE = 3.0
"""How many times its floor a part is expected to take, when it is decided on how many frames to measure it."""
PARTS = ("decode", "vision encoder", "instruction encoder", "compressor", "LLM prefill", "decode per token")
FIRST_TOKEN = PARTS[1:5]
"""Parts between decoded frames and the first token of the answer."""
BEFORE_LLM = PARTS[:4]
"""What the first question about a video costs before the LLM."""
AGAIN = "compressor, further question"
"""The compressor without motion features, which a video keeps: the part of it that every question costs."""


@dataclass
class Result:
    """One part of one column at one number of frames.

    Attributes:
        seconds: median, for all layers and frames.
        extra_bytes: peak memory beyond inputs and weights.
        cost: operations and bytes of the part; None where they are not counted (decoding).
        note: how it was scaled; "" where it was measured as it is.
        times_s: repeats as they were measured, before scaling.
    """

    seconds: float
    extra_bytes: float
    cost: Cost | None
    note: str
    times_s: list[float]


@dataclass
class Part:
    """How to measure one part at any size (frames, or tokens of a prompt) and count its cost.

    Attributes:
        size: what is asked for.
        unit: `frames` or `tokens`.
        prepare: returns the callable for a size; inputs are made before it is timed.
        cost: of a size, for all layers.
        layers: layers that the model has; the LLM's or a tower's.
        per_layer: callable of one further layer for a size, where only one was built.
        is_one_layer: the callable is one of `layers` equal layers.
    """

    size: int
    unit: str
    prepare: Callable[[int], Callable[[], object]]
    cost: Callable[[int], Cost]
    layers: int = 1
    per_layer: Callable[[int], Callable[[], object]] | None = None
    is_one_layer: bool = False


def smaller_size(part: Part, machine: Machine, max_s: float) -> int:
    """Return the part's size, halved until it can be expected to take at most `max_s`."""
    size, built = part.size, part.layers if part.is_one_layer or part.per_layer is not None else 1
    while size > 1 and USUAL_DISTANCE * machine.floor_s(part.cost(size)) / built > max_s:
        size = (size + 1) // 2
    return size


def measure_parts(
    parts: dict[str, Part], machine: Machine, repeats: int, max_s: float, device: torch.device
) -> dict[str, Result]:
    """Measure parts in turn, and scale what was measured smaller or with one layer."""
    sizes = {name: smaller_size(part, machine, max_s) for name, part in parts.items()}
    runs = {name: part.prepare(sizes[name]) for name, part in parts.items()}
    layers = {f"{name}/layer": p.per_layer(sizes[name]) for name, p in parts.items() if p.per_layer is not None}
    measured = measure(runs | layers, repeats, device)
    return {
        name: scaled(part, sizes[name], measured[name], measured.get(f"{name}/layer"), machine)
        for name, part in parts.items()
    }


def scaled(part: Part, size: int, found: Measurement, layer: Measurement | None, machine: Machine) -> Result:
    """Return the result for all layers and the full size."""
    seconds, notes = found.median_s, []
    if part.is_one_layer and part.layers > 1:
        seconds *= part.layers
        notes.append(f"one layer x {part.layers}")
    if layer is not None and part.layers > 1:
        seconds += (part.layers - 1) * layer.median_s
        notes.append(f"one layer x {part.layers}")
    cost = part.cost(part.size)
    if size < part.size:
        seconds *= machine.floor_s(cost) / machine.floor_s(part.cost(size))
        notes.append(f"{size:,} of {part.size:,} {part.unit}")
    return Result(seconds, found.extra_bytes * part.size / size, cost, "; ".join(notes), found.times_s)


class Inputs:
    """Random inputs of the parts, on the device and in the precision of the subject."""

    def __init__(self, subject: Subject, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.device, self.dtype = subject.config, device, dtype
        self.features: dict[int, tuple[Tensor, Tensor]] = {}

    def random(self, *shape: int) -> Tensor:
        """Return normally distributed numbers."""
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def video(self, num_frames: int) -> tuple[Tensor, Tensor]:
        """Return values and keys, `float[T, H, W, D]` and `float[T, H, W, K]`; shared by all columns."""
        longest = max(self.features, default=0)
        if num_frames > longest:
            self.features.clear()
            grid, dims = self.config.grid_size, (self.config.vision_config.hidden_size, self.config.instruction_dim)
            values, keys = (self.random(num_frames, grid, grid, dim) for dim in dims)
            self.features[num_frames] = values, keys
            longest = num_frames
        values, keys = self.features[longest]
        return values[:num_frames], keys[:num_frames]


def call_compressor(
    compressor: nn.Module, values: Tensor, keys: Tensor, num_frames: list[int], instruction: Tensor, **more: Any
) -> tuple[Tensor, ...]:
    """Return the tokens of a batch of videos from any compressor; `more` are arguments of `HybridCompressor` only."""
    if isinstance(compressor, PlainCompressor | HybridCompressor):
        if isinstance(compressor, HybridCompressor) and compressor.needs_instruction_tokens:
            more["instruction_tokens"] = instruction[:, None]
        return compressor(values, keys, num_frames, instruction, **more).tokens
    return compressor(values, None, num_frames).tokens


def count_tokens(compressor: nn.Module, num_frames: int, grid: int) -> int:
    """Return the visual tokens of a video."""
    assert isinstance(compressor, HybridCompressor | Baseline | PlainCompressor)
    return compressor.token_count(num_frames, grid, grid)


class Bench:
    """One run over columns and numbers of frames.

    Args:
        subject: what is measured.
        device: where.
        dtype: the precision.
        repeats: times of every callable.
        max_s: longest call, as it is expected; longer ones are measured on fewer frames or tokens.
        machine: what the device reaches.
        film: video to decode; None: a made one.
    """

    def __init__(
        self,
        subject: Subject,
        device: torch.device,
        dtype: torch.dtype,
        *,
        repeats: int,
        max_s: float,
        machine: Machine,
        film: Path | None = None,
    ) -> None:
        self.subject, self.config = subject, subject.config
        self.device, self.dtype, self.itemsize = device, dtype, dtype.itemsize
        self.repeats, self.max_s, self.machine, self.film = repeats, max_s, machine, film
        self.inputs = Inputs(subject, device, dtype)

    def run(self, num_frames: Sequence[int], say: Callable[[str], None]) -> list[dict[str, Any]]:
        """Return one row for every number of frames and column."""
        return [row for frames in num_frames for row in self.rows(frames, say)]

    def rows(self, num_frames: int, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
        """Yield a row for every column at one number of frames."""
        grid, columns = self.config.grid_size, list(self.subject.compressors)
        tokens = {name: count_tokens(module, num_frames, grid) for name, module in self.subject.compressors.items()}
        say(f"{num_frames} frames: decode")
        decode = self.decode(num_frames)
        say(f"{num_frames} frames: vision and instruction encoder")
        vision = self.measure(
            {str(keys): self.vision(num_frames, keys) for keys in {c in CONDITIONAL for c in columns}}
        )
        has_text = any(column in CONDITIONAL for column in columns)
        text = self.measure({"": self.instruction()})[""] if has_text else None
        say(f"{num_frames} frames: compressor")
        compressed = self.measure({column: self.compressor(column, num_frames) for column in columns})
        moving = [c for c in columns if getattr(self.subject.compressors[c], "motion", None) is not None]
        again = self.measure({column: self.compressor(column, num_frames, AGAIN) for column in moving})
        self.inputs.features.clear()
        say(f"{num_frames} frames: LLM")
        lengths = sorted({count + PROMPT_TOKENS for count in tokens.values()})
        head = measure({"": self.head()}, self.repeats, self.device)[""]
        prefill = self.measure({str(length): self.prefill(length) for length in lengths})
        step = self.measure({str(length): self.step(length) for length in lengths})
        if not self.subject.is_whole:
            further = self.config.text_config.num_hidden_layers - 1
            for length, result in prefill.items():
                result.extra_bytes += further * kv_bytes(self.config, int(length), self.itemsize)
        for result in (*prefill.values(), *step.values()):
            result.seconds += head.median_s
        for column in columns:
            length = str(tokens[column] + PROMPT_TOKENS)
            found = {"decode": decode, "vision encoder": vision[str(column in CONDITIONAL)]}
            if column in CONDITIONAL and text is not None:
                found["instruction encoder"] = text
            found |= {
                "compressor": compressed[column],
                "LLM prefill": prefill[length],
                "decode per token": step[length],
            }
            if column in moving:
                found[AGAIN] = again[column]
            repeated = ("instruction encoder", AGAIN if column in moving else "compressor")
            yield {
                "num_frames": num_frames,
                "column": column,
                "num_visual_tokens": tokens[column],
                "parts": {name: dataclasses.asdict(part) for name, part in found.items()},
                "further_share": _sum_s(found, repeated) / _sum_s(found, BEFORE_LLM),
                "first_token_s": _sum_s(found, FIRST_TOKEN),
                "peak_bytes": max(found[name].extra_bytes for name in FIRST_TOKEN if name in found),
            }

    def measure(self, parts: dict[str, Part]) -> dict[str, Result]:
        """Measure parts in turn."""
        return measure_parts(parts, self.machine, self.repeats, self.max_s, self.device)

    def decode(self, num_frames: int) -> Result:
        """Measure decoding and scaling of frames."""
        size = self.config.image_size
        with tempfile.TemporaryDirectory() as folder:
            film = self.film or make_film(Path(folder) / "film.mp4", num_frames)
            cpu = torch.device("cpu")
            found = measure({"": lambda: read_frames(film, num_frames=num_frames, size=size)}, self.repeats, cpu)[""]
        # Frames lie outside of torch's memory.
        return Result(found.median_s, num_frames * size**2 * 3, None, "", found.times_s)

    def vision(self, num_frames: int, has_keys: bool) -> Part:
        """Return the vision tower over all frames; with an instruction, it gives keys, too."""
        model, config = self.subject.model, self.config
        tower = model.vision_tower

        def prepare(size: int) -> Callable[[], object]:
            pixels = self.inputs.random(size, 3, config.image_size, config.image_size)
            passes = pixels.split(FRAMES_PER_PASS)
            if has_keys:
                return lambda: [model.encode_frames(some) for some in passes]
            return lambda: [tower(pixel_values=some).last_hidden_state for some in passes]

        def layer(size: int) -> Callable[[], object]:
            x = self.inputs.random(size, config.grid_size**2, config.vision_config.hidden_size)
            return lambda: encoder_layers(tower)[0](x, attention_mask=None)

        return Part(
            num_frames,
            "frames",
            prepare,
            lambda size: vision_cost(config, size, self.itemsize, has_keys=has_keys),
            config.vision_config.num_hidden_layers,
            None if self.subject.is_whole else layer,
        )

    def instruction(self) -> Part:
        """Return the instruction encoder over one instruction at full length."""
        model, config, text = self.subject.model, self.config, self.config.instruction_config
        length = config.max_instruction_length

        def prepare(size: int) -> Callable[[], object]:
            ids = torch.ones(1, length, dtype=torch.long, device=self.device)
            return lambda: model.encode_instruction(ids)

        def layer(size: int) -> Callable[[], object]:
            x = self.inputs.random(1, length, text.hidden_size)
            encoder = model.instruction_encoder
            assert encoder is not None
            return lambda: encoder_layers(encoder)[0](x, attention_mask=None)

        cost = instruction_cost(config, self.itemsize)
        further = None if self.subject.is_whole else layer
        return Part(1, "instructions", prepare, lambda size: cost, text.num_hidden_layers, further)

    def compressor(self, column: str, num_frames: int, part: str = "compressor") -> Part:
        """Return a compressor over one video, or (part `AGAIN`) over one that has its motion features already."""
        module = self.subject.compressors[column]
        instruction = self.inputs.random(1, self.config.instruction_dim)

        def prepare(size: int) -> Callable[[], object]:
            values, keys = self.inputs.video(size)
            more = {"has_motion": True} if part == AGAIN else {}
            return lambda: call_compressor(module, values, keys, [size], instruction, **more)

        return Part(
            num_frames, "frames", prepare, lambda size: compressor_cost(self.config, column, size, self.itemsize)
        )

    def head(self) -> Callable[[], object]:
        """Return the output matrix at one place."""
        x = self.inputs.random(1, self.config.text_config.hidden_size)
        return lambda: self.subject.head(x)

    def prefill(self, length: int) -> Part:
        """Return the LLM over a prompt."""
        llm, config = self.subject.model.language_model, self.config

        def prepare(size: int) -> Callable[[], object]:
            x = self.inputs.random(1, size, config.text_config.hidden_size)
            return lambda: llm(inputs_embeds=x, use_cache=True)

        return self.llm_part(length, prepare, prefill_cost)

    def step(self, length: int) -> Part:
        """Return the LLM at one token after a prompt."""
        llm, text = self.subject.model.language_model, self.config.text_config
        head_dim = text.hidden_size // text.num_attention_heads

        def prepare(size: int) -> Callable[[], object]:
            x = self.inputs.random(1, 1, text.hidden_size)
            # The name of the cache depends on the version of transformers; the model itself says it.
            with torch.inference_mode():
                found = returned_cache(llm(inputs_embeds=x, use_cache=True))
                (cache,) = found.values()
                for number in range(llm.config.num_hidden_layers):
                    shape = 1, text.num_key_value_heads, size - 1, head_dim
                    cache.update(self.inputs.random(*shape), self.inputs.random(*shape), number)

            def run() -> None:
                llm(inputs_embeds=x, use_cache=True, **found)
                cache.crop(-1)

            return run

        return self.llm_part(length, prepare, token_cost)

    def llm_part(
        self, length: int, prepare: Callable[[int], Callable[[], object]], cost: Callable[[HIComConfig, int, int], Cost]
    ) -> Part:
        """Return a part of the LLM."""
        layers, config = self.config.text_config.num_hidden_layers, self.config
        is_one = not self.subject.is_whole
        return Part(length, "tokens", prepare, lambda n: cost(config, n, self.itemsize), layers, is_one_layer=is_one)


def _sum_s(parts: Mapping[str, Result], names: Sequence[str]) -> float:
    return sum(parts[name].seconds for name in names if name in parts)


def encoder_layers(tower: nn.Module) -> nn.ModuleList:
    """Return the layers of a SigLIP tower."""
    layers = next(module for name, module in tower.named_modules() if name.endswith("encoder.layers"))
    assert isinstance(layers, nn.ModuleList)
    return layers


def make_film(path: Path, num_frames: int) -> Path:
    """Write a moving gradient of 640 x 360 pixels, as long as asked for."""
    ramp = np.arange(640, dtype=np.int64)[None, :, None] + np.arange(360)[:, None, None] + np.array([0, 85, 170])
    write_video(path, (((ramp + 3 * number) % 256).astype(np.uint8) for number in range(num_frames)), 25.0)
    return path


def bench_compressor(
    config: HIComConfig,
    columns: tuple[str, ...],
    sizes: Sequence[tuple[int, int]],
    device: torch.device,
    dtype: torch.dtype,
    *,
    repeats: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Measure compressors alone: forward, and forward and backward to their weights (the tower is frozen).

    Returns:
        One row for every batch size, number of frames, column and pass. `local` is the local branch of ours alone.
    """
    torch.manual_seed(0)
    modules = {name: m.to(device, dtype) for name, m in build_compressors(config, columns, None).items()}
    dim, grid, itemsize = config.vision_config.hidden_size, config.grid_size, dtype.itemsize
    if "hicom" in modules:
        local = HybridCompressor(dim=dim, out_dim=config.text_config.hidden_size, num_global_tokens=0)
        modules["local"] = local.to(device, dtype)
    rows = []
    for batch, frames in sizes:
        values = torch.randn(batch * frames, grid, grid, dim, device=device, dtype=dtype)
        keys = torch.randn_like(values)
        instruction = torch.randn(batch, dim, device=device, dtype=dtype)
        lengths = [frames] * batch

        def forward(module: nn.Module, v: Tensor = values, k: Tensor = keys) -> tuple[Tensor, ...]:
            return call_compressor(module, v, k, lengths, instruction)  # noqa: B023

        def both(module: nn.Module) -> None:
            module.zero_grad()
            torch.cat(forward(module)).square().mean().backward()

        for name, call in (("forward", forward), ("forward+backward", both)):
            say(f"compressor: batch {batch}, {frames} frames, {name}")
            runs = {c: (lambda m=m, call=call: call(m)) for c, m in modules.items()}
            measured = measure(runs, repeats, device, has_grad=call is both)
            for column, found in measured.items():
                cost = branch_cost(config, column, batch, frames, itemsize)
                rows.append(
                    {
                        "batch_size": batch,
                        "num_frames": frames,
                        "column": column,
                        "pass": name,
                        "seconds": found.median_s,
                        "extra_bytes": found.extra_bytes,
                        "cost": dataclasses.asdict(cost) if call is forward else None,
                        "times_s": found.times_s,
                    }
                )
    return rows


def branch_cost(config: HIComConfig, column: str, batch: int, num_frames: int, itemsize: int) -> Cost:
    """Return the cost of a batch in a compressor, or in the local branch of ours alone."""
    if column != "local":
        return compressor_cost(config, column, num_frames, itemsize) * batch
    windows = batch * token_count(num_frames, config.grid_size, config.grid_size, (4, 3, 3), 0)
    dim, out_dim = config.vision_config.hidden_size, config.text_config.hidden_size
    return local_cost(config, num_frames, itemsize) * batch + mlp_cost(windows, dim, out_dim, itemsize)
