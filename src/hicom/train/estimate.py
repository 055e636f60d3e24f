"""What a run takes in memory, before anything is loaded: one training step on tensors that have sizes but no numbers.

The model is built without weights and runs forward and backward as it will in training, with its adapters, mixed
precision and recomputed activations. What every operation brings and what is let go again is counted, so that no
formula has to know how a language model is built inside.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import optim
from ..data.collate import SampleSet
from ..data.mixture import NOTHING, read_skip_list, read_sources
from ..data.records import PLACEHOLDERS
from ..encoding import free_memory
from ..model.config import HIComConfig
from ..model.memory import empty_model, without_numbers
from ..model.modeling import HIComForConditionalGeneration, VisionFeatures
from ..model.ops import Window
from ..model.processing import HIComProcessor
from .assemble import assemble
from .config import LoraOptions, TrainConfig
from .engines import CHECKPOINTING, choose_engine, state_parts
from .lora import add_adapter, find_targets, table_name
from .run import starting_model
from .stages import Rule, resolve

TEXT_TOKENS, ANSWER_TOKENS = 256, 64
"""Of a sample, and of these its answer, where no records say how long they are."""
TEMPLATE_TOKENS = 32
"""Of a chat template around a question and its answer, about."""
BYTES_4BIT = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a weight in NF4: 4 bits, for 64 weights a scale in 8 bits, for 256 of these one in 32 (QLoRA, section 3)."""


@dataclass(frozen=True, kw_only=True)
class SampleSize:
    """How large the largest sample of a run is.

    Attributes:
        num_frames: of its video; an image is one frame.
        text_tokens: of its conversation with the answer, without visual tokens.
        answer_tokens: of these its answer, whose logits are computed.
    """

    num_frames: int
    text_tokens: int = TEXT_TOKENS
    answer_tokens: int = ANSWER_TOKENS


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """What training takes on one device, in bytes.

    Attributes:
        weights: all parameters, in the precision in which they are kept.
        gradients: of what trains.
        optimizer: its states.
        work: what comes on top at the largest moment: activations, inputs and logits, or what a step of the optimizer
            needs.
    """

    weights: int
    gradients: int
    optimizer: int
    work: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.work


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, for as long as these are alive.

    Attributes:
        now: bytes at this moment.
        peak: most bytes so far.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known = {storage_id(tensor) for tensor in known}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, and count what is new in what it returns."""
        output = func(*args, **(kwargs or {}))
        for each in tree_leaves(output):
            if isinstance(each, Tensor) and storage_id(each) not in self._known:
                storage = each.untyped_storage()
                self._known.add(storage_id(each))
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._forget, storage_id(each), storage.nbytes())
        return output

    def _forget(self, number: int, num_bytes: int) -> None:
        self._known.discard(number)
        self.now -= num_bytes


def storage_id(tensor: Tensor) -> int:
    """Return what tells a tensor's storage from others that are alive; views share it."""
    return int(tensor.untyped_storage()._cdata)


def training_memory(
    config: TrainConfig,
    model_config: HIComConfig,
    size: SampleSize,
    *,
    num_processes: int = 1,
    is_gpu: bool = True,
) -> TrainingMemory:
    """Return an estimate of what a run takes on one device, for a batch of its largest samples.

    What a GPU's driver takes (about 0.5 GB) and what is lost between blocks of memory comes on top.

    Args:
        config: of the run.
        model_config: of the model that it starts from.
        size: of its largest sample.
        num_processes: devices that train together.
        is_gpu: whether the optimizer steps as on GPUs, in one kernel.

    Raises:
        ValueError: the table of rates or the adapters do not fit the model, or the engine is impossible.
    """
    simulation = simulate(config, model_config, size, num_processes)
    return memory_of(simulation, config, num_processes=num_processes, is_gpu=is_gpu)


@dataclass(frozen=True)
class Simulation:
    """A model after a step without numbers.

    Attributes:
        model: with its adapters.
        rules: its resolved table.
        targets: names of the linear weights of the language model's layers, which QLoRA quantises.
        peak: most bytes beside the weights, gradients among them.
    """

    model: HIComForConditionalGeneration
    rules: list[Rule]
    targets: frozenset[str]
    peak: int


def simulate(config: TrainConfig, model_config: HIComConfig, size: SampleSize, num_processes: int = 1) -> Simulation:
    """Run one step; arguments as of `training_memory`. How the base of adapters is quantised makes no difference."""
    model = empty_model(copy.deepcopy(model_config))
    model.config.text_config.use_cache = False
    targets = frozenset(f"{name}.weight" for name in find_targets(model, LoraOptions.targets))
    if config.lora is not None:
        add_adapter(model, config.lora, seed=config.seed, bf16=config.bf16, base=None)
    with FakeTensorMode():
        without_numbers(model)
        rules = resolve(model, config.rates, (lambda name: name) if config.lora is None else table_name)
        model.train()
        if config.gradient_checkpointing:
            getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": False})
        peak = step_bytes(model, config, size, config.count_passes(num_processes))
    return Simulation(model, rules, targets, peak)


def memory_of(simulation: Simulation, config: TrainConfig, *, num_processes: int, is_gpu: bool) -> TrainingMemory:
    """Return what a simulated run takes; arguments as of `training_memory`."""
    engine = choose_engine(config.engine, num_processes, config.optimizer)
    model = simulation.model
    quantized = simulation.targets if config.lora is not None and config.lora.quantize is not None else frozenset()
    trained = [p for rule in simulation.rules if rule.rate > 0 for p in rule.parameters.values()]
    groups = [
        group
        for rule in simulation.rules
        if rule.rate > 0
        for group in optim.parameter_groups(
            model, rule.parameters.values(), rule.rate, 0.0, use_muon=config.optimizer == "muon"
        )
    ]
    states = sum(p.numel() * (4 if group["muon"] else 8) for group in groups for p in group["params"])
    num_trained = sum(p.numel() for p in trained)
    if config.lora is not None:
        weights = weight_bytes(model, quantized, config)
        gradients = 4 * num_trained
    else:
        total = sum(p.numel() for p in model.parameters())
        weights, gradients, shared = state_parts(engine, total, num_trained, num_processes, bf16=config.bf16)
        states = shared if config.optimizer == "adamw" else states
    # Where it is not fused, AdamW holds the roots of one tensor's second moments.
    stepping = 0 if is_gpu else max(4 * p.numel() for p in trained)
    if engine == "ddp" and num_processes > 1:
        gradients *= 2  # they are exchanged in buckets, which are copies
    largest = max(simulation.peak - 4 * num_trained, stepping // (num_processes if engine != "ddp" else 1), 0)
    if quantized:
        # One weight at a time is put back into the precision of the computation.
        itemsize = 2 if config.bf16 else 4
        largest += itemsize * max(p.numel() for name, p in model.named_parameters() if is_one_of(name, quantized))
    return TrainingMemory(weights=weights, gradients=gradients, optimizer=states, work=largest)


def step_bytes(model: HIComForConditionalGeneration, config: TrainConfig, size: SampleSize, num_passes: int) -> int:
    """Return the most bytes beside the weights that the passes of a step hold, gradients among them."""
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        for _ in range(min(2, num_passes)):  # the second one finds the gradients of the first, as do all later ones
            one_pass(model, config, size)
    return live.peak


def one_pass(model: HIComForConditionalGeneration, config: TrainConfig, size: SampleSize) -> None:
    """Run one batch of videos of the largest size forward and backward."""
    outer, inner = model.config, model.model
    number, grid = config.batch_size, outer.grid_size
    frames, text = number * size.num_frames, size.text_tokens
    context = torch.autocast("cpu", torch.bfloat16) if config.bf16 else nullcontext()
    with context:
        if config.data.cache is None:
            features = inner.encode_frames(torch.empty(frames, 3, outer.image_size, outer.image_size))
        else:
            keys = torch.empty(frames, grid, grid, outer.instruction_dim) if outer.is_conditional else None
            features = VisionFeatures(torch.empty(frames, grid, grid, outer.vision_config.hidden_size), keys)
        is_steered = outer.is_conditional and config.stage.compression == "conditional"
        instruction = torch.zeros(number, outer.max_instruction_length, dtype=torch.long) if is_steered else None
        window = largest_window(model, config, size)
        counts = [size.num_frames] * number
        visual = inner.compress(features, counts, instruction, None, window, config.stage.compression).tokens
        del features
        words = model.get_input_embeddings()(torch.zeros(number, text, dtype=torch.long))
        embeddings = torch.cat((torch.stack(visual).to(words), words), 1)
        del visual, words
        mask, labels = (torch.ones(embeddings.shape[:2], dtype=torch.long) for _ in range(2))
        mask[:, 0] = 0  # padding, as in batches of unequal samples: without any, some masks are not made
        keep = min(size.answer_tokens + 1, embeddings.shape[1])
        loss = model(inputs_embeds=embeddings, attention_mask=mask, labels=labels, logits_to_keep=keep).loss
        del embeddings
    loss.backward()


def largest_window(model: HIComForConditionalGeneration, config: TrainConfig, size: SampleSize) -> Window | None:
    """Return which of the run's windows makes most tokens; None: the model's own."""
    if config.stage.compression == "off":
        return None
    return max(
        config.stage.windows,
        key=lambda window: model.model.token_count(size.num_frames, window, config.stage.compression),
        default=None,
    )


def is_one_of(name: str, quantized: frozenset[str]) -> bool:
    """Whether a parameter of an adapted model is one of the weights that are quantised."""
    return name.replace(".base_layer.", ".") in quantized


def weight_bytes(model: nn.Module, quantized: frozenset[str], config: TrainConfig) -> int:
    """Return the bytes of a model's weights, some of them in 4 or 8 bits."""
    assert config.lora is not None
    small = BYTES_4BIT if config.lora.quantize == "4bit" else 1.0
    return int(
        sum(
            p.numel() * (small if is_one_of(name, quantized) else p.element_size())
            for name, p in model.named_parameters()
        )
    )


# What a user is told


def ways(config: TrainConfig) -> dict[str, TrainConfig]:
    """Return the run with all weights, with LoRA and with QLoRA; as it is where adapters have no place in it.

    Those are runs whose stage leaves the language model alone, or whose engine spreads weights.
    """
    trains_llm = any(rate > 0 and "language_model" in pattern for pattern, rate in config.rates)
    if not trains_llm or config.engine not in (None, "ddp"):
        return {"as it is": config}
    lora = config.lora or LoraOptions()
    options = {
        "full": None,
        "LoRA": dataclasses.replace(lora, quantize=None),
        "QLoRA, 8 bit": dataclasses.replace(lora, quantize="8bit"),
        "QLoRA, 4 bit": dataclasses.replace(lora, quantize="4bit"),
    }
    return {name: dataclasses.replace(config, lora=each) for name, each in options.items()}


def sample_size(config: TrainConfig, processor: HIComProcessor) -> SampleSize:
    """Return the size of the largest sample of a run's records, by their characters.

    Where a file of records is missing, the text is taken to have `TEXT_TOKENS`.

    Raises:
        ValueError: the records cannot be read.
    """
    data = config.data
    frames = processor.num_frames if data.num_frames is None else data.num_frames
    if missing_records(config):
        return SampleSize(num_frames=frames)
    skip = NOTHING if data.skip_list is None else read_skip_list(data.skip_list)
    samples = SampleSet(read_sources(data.records, data.root, data.on_bad_record, skip))
    lengths, _ = samples.lengths_and_videos()
    _, longest = samples[max(range(len(samples)), key=lengths.__getitem__)]
    text = "\n".join(message["content"] for message in longest.messages)
    for placeholder in PLACEHOLDERS.values():
        text = text.replace(placeholder, "")
    limit = data.max_text_tokens or sys.maxsize
    asked, answer = (len(processor.tokenizer(x, add_special_tokens=False).input_ids) for x in (text, longest.answer))
    return SampleSize(
        num_frames=frames if "video" in samples.kinds else 1,
        text_tokens=min(asked + answer + TEMPLATE_TOKENS, limit),
        answer_tokens=min(answer + 1, limit),
    )


def missing_records(config: TrainConfig) -> list[str]:
    """Return the files of records that are not there."""
    return [path for path in config.data.records if not Path(path).is_file()]


def estimate_run(config: TrainConfig, *, num_processes: int = 1) -> dict[str, Any]:
    """Return what a run and its alternatives would take on each device, without loading the model's weights.

    Args:
        config: of the run.
        num_processes: devices that train together.

    Returns:
        `sample`: the largest one (`SampleSize`, and its `visual_tokens`); `missing_records`: files that are not there,
        so that the length of texts is a guess; `batch_size`, `num_processes`; `device`: this machine's first, and its
        `free_bytes`; `rows`: bytes of every way to train, with and without gradient checkpointing, and which of them
        the run is.

    Raises:
        ValueError: there is no model to start from, or what `training_memory` and `sample_size` raise.
    """
    if config.engine == "fsdp2" and num_processes == 1:
        raise ValueError(
            "engine='fsdp2' spreads a model over several devices; say how many train together, as in --devices 8"
        )
    if config.parts is not None:
        model, processor = assemble(config.parts, config.seed)
        model_config = model.config
    else:
        folder = starting_model(config)
        model_config, processor = HIComConfig.from_pretrained(folder), HIComProcessor.from_pretrained(folder)
    size = sample_size(config, processor)
    has_gpu = torch.cuda.is_available()
    simulations: dict[tuple[bool, bool], Simulation] = {}
    rows: list[dict[str, Any]] = []
    for name, way in ways(config).items():
        for is_checkpointed in (True, False):
            run = dataclasses.replace(way, gradient_checkpointing=is_checkpointed)
            key = (run.lora is not None, is_checkpointed)
            if key not in simulations:
                simulations[key] = simulate(run, model_config, size, num_processes)
            memory = memory_of(simulations[key], run, num_processes=num_processes, is_gpu=has_gpu or config.bf16)
            row = {"way": name, "gradient_checkpointing": is_checkpointed, "is_this_run": run == config}
            rows.append(row | dataclasses.asdict(memory) | {"total": memory.total})
    window = largest_window(next(iter(simulations.values())).model, config, size)
    device = torch.device("cuda:0" if has_gpu else "cpu")
    return {
        "sample": dataclasses.asdict(size)
        | {"visual_tokens": processor.token_count(size.num_frames, window, config.stage.compression)},
        "missing_records": missing_records(config),
        "batch_size": config.batch_size,
        "num_processes": num_processes,
        "device": torch.cuda.get_device_name(device) if has_gpu else "CPU",
        "free_bytes": free_memory(device),
        "rows": rows,
    }
