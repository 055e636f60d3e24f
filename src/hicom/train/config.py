"""What a training run is: frozen dataclasses, resolved into `run.json`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import tyro

from ..data.features import OnBadVideo
from ..data.records import OnBadRecord
from ..model.compressor import Compression
from ..model.ops import Window

OptimizerName = Literal["adamw", "muon"]
Engine = Literal["ddp", "fsdp2", "zero2", "zero3"]
"""How processes share the work: whole copies; PyTorch's fully sharded data parallel; DeepSpeed's ZeRO stages."""
QuantizedName = Literal["4bit", "8bit"]
SavedPrecision = Literal["bfloat16", "float32"]
Rates = tuple[tuple[str, float], ...]
"""Table of (regular expression over a parameter's whole name, learning rate): first match wins, no match = frozen."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is learnt from.

    Attributes:
        records: LLaVA-style JSON or JSONL files and YAML mixtures of them, trained on together.
        root: folder that media paths of records start from; None: each file's own. A mixture has its own.
        num_frames: frames of every video, spread evenly; None: as many as the model was trained on. The trained model
            takes as many unless a call says otherwise.
        cache: folder for the frozen vision tower's features; None: the tower runs in every step.
        on_bad_video: an unreadable video or image stops the run, or its samples are left out (`skip`), counted and
            named. Without `cache` that shows as training goes: a batch is then smaller, and no other sample takes the
            place; with it, videos are all read before.
        on_bad_record: a malformed record stops the run, or is left out (`skip`), counted and named.
        skip_list: what else is left out: a file that `hicom data check --skip-list` wrote. One that is given as a run
            goes on is added to those before, and changes the place of no other sample.
        about: what the videos are, in words that finish "this model was trained on ..."; with `cache`, the trained
            model then knows when a video is unlike them. None: it does not.
        max_text_tokens: longest sample in tokens of text, every video and image one, as the release counts
            (`model_max_length`); the end of a longer one is cut off, and where that leaves nothing of its answer, it is
            left out. Both are counted. None: no limit.
    """

    records: tuple[str, ...]
    root: str | None = None
    num_frames: int | None = 32
    cache: str | None = None
    on_bad_video: OnBadVideo = "stop"
    on_bad_record: OnBadRecord = "stop"
    skip_list: str | None = None
    about: str | None = None
    max_text_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_frames", "max_text_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"data.{name}={value} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What is trained, and how fast.

    Attributes:
        trainable: table of (pattern, learning rate); rate 0 keeps what it matches frozen.
        compression: `conditional`; `off` or `unguided` in stage `align`.
        windows: local windows (T, H, W) drawn from for every batch; empty: the model's own.
    """

    trainable: Rates
    compression: Compression = "conditional"
    windows: tuple[Window, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A model put together of trained towers, an untrained compressor and a small language model.

    Attributes:
        towers: folder of a SigLIP dual encoder and its tokenizer, or of a HICom model (or its embedded name) to take
            both towers from.
        language_model: folder of a causal language model, or folder or embedded name of a HICom model to take it and
            its tokenizer from; None: random weights of the sizes that follow.
        hidden_size: width of the language model.
        intermediate_size: width inside its MLPs.
        num_layers: its layers.
        num_heads: its attention heads.
        window: (T, H, W) of the local branch.
        num_global_tokens: tokens of the global branch.
        vision_feature_layer: hidden state of the vision tower that is compressed.
        local_logit_scale: cosine similarity under a learnt temperature in the local branch, as towers are trained.
        num_frames: frames of a video unless a call says otherwise.
        config: other fields of `HIComConfig`, such as injections, options and baselines.
    """

    towers: str
    language_model: str | None = None
    hidden_size: int = 128
    intermediate_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    window: Window = (2, 4, 4)
    num_global_tokens: int = 8
    vision_feature_layer: int = -1
    local_logit_scale: bool = True
    num_frames: int = 8
    config: tyro.conf.Suppress[dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Low-rank adapters that train in place of the language model's weights (LoRA, arXiv 2106.09685).

    Attributes:
        rank: of the two matrices that are added to a weight.
        alpha: what they come to is multiplied by alpha / rank.
        dropout: share of an adapter's inputs that is left out while training.
        targets: regular expression over whole names of the language model's linear modules; by default all of its
            layers.
        quantize: keep the adapted model's own linear weights in 4 or 8 bit while training (QLoRA, arXiv 2305.14314).
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    targets: str = r"model\.language_model\.layers\..*"
    quantize: QuantizedName | None = None

    def __post_init__(self) -> None:
        for name in ("rank", "alpha"):
            if getattr(self, name) < 1:
                raise ValueError(f"lora.{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout={self.dropout} must be from 0 to less than 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run.

    Attributes:
        name: of the run, and of its folder in a chain.
        out: run folder. Run again, an interrupted run goes on from its last checkpoint.
        init: model to start from: a stage's `<out>/model`, any checkpoint with its processor, or an embedded name.
        parts: put the model together of these in place of `init`.
        data: what is learnt from.
        stage: what is trained.
        steps: optimizer steps; None: as many as `epochs` come to.
        batch_size: samples of one forward pass on one device.
        accumulate: forward passes of one step; follows from `global_batch_size` where that is given.
        warmup: share of the steps in which the learning rate rises; after that it falls as a cosine.
        optimizer: `adamw`, or `muon`: Muon for the weights of linear layers and AdamW for all else.
        weight_decay: on matrices only.
        betas: AdamW's.
        max_grad_norm: gradients are clipped to it.
        save_every: steps from checkpoint to checkpoint.
        log_every: steps from one line of the log to the next.
        workers: processes that make batches; 0: the training process itself.
        group_by_length: whether samples of a batch are about equally long, so that less of it is padding.
        per_video: samples of one video that come in one batch together, which then reads and encodes it once for all of
            them; None: the answered turns of one record, as many as `batch_size` takes.
        bf16: mixed precision on a GPU.
        seed: of everything random.
        engine: how several processes share the work; None: as `accelerate launch` says, or `ddp` (docs/scale_out.md).
        gradient_checkpointing: keep only what goes into a layer, and compute the rest again in the backward pass.
        epochs: passes over all samples, where `steps` does not say how long.
        global_batch_size: samples of one step on all devices together, whatever their number is.
        lora: adapters that train in place of the language model's weights; None: these train themselves.
        rate_scale: factor on all rates of the stage's table; None: 1.
        save_dtype: precision in which the trained model is written; None: the one that the run computes in (bfloat16
            under `bf16`, else float32). Checkpoints keep all digits.
    """

    name: str
    out: str
    init: str | None = None
    parts: Parts | None = None
    data: DataConfig
    stage: StageConfig
    steps: int | None = None
    batch_size: int
    accumulate: int = 1
    warmup: float = 0.03
    optimizer: OptimizerName = "adamw"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float = 1.0
    save_every: int = 500
    log_every: int = 50
    workers: int = 0
    group_by_length: bool = False
    per_video: int | None = None
    bf16: bool = False
    seed: int = 0
    engine: Engine | None = None
    gradient_checkpointing: bool = False
    epochs: float | None = None
    global_batch_size: int | None = None
    lora: LoraOptions | None = None
    rate_scale: float | None = None
    save_dtype: SavedPrecision | None = None

    def __post_init__(self) -> None:
        names = ("steps", "batch_size", "accumulate", "save_every", "log_every", "per_video", "global_batch_size")
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.rate_scale is not None and self.rate_scale <= 0:
            raise ValueError(f"rate_scale={self.rate_scale} must be above 0; a rate of 0 in the table freezes a part")
        if self.steps is None and (self.epochs is None or self.epochs <= 0):
            raise ValueError(f"give steps, or epochs above 0 (epochs={self.epochs})")
        if self.global_batch_size is not None and self.accumulate != 1:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} says how many forward passes a step has; "
                f"leave accumulate={self.accumulate} out"
            )
        if (self.init is None) == (self.parts is None):
            raise ValueError("give either init (the folder of a model) or parts (to put one together)")

    @property
    def rates(self) -> Rates:
        """The stage's table with `rate_scale`."""
        scale = 1.0 if self.rate_scale is None else self.rate_scale
        return tuple((pattern, scale * rate) for pattern, rate in self.stage.trainable)

    @property
    def saved_precision(self) -> SavedPrecision:
        """In which the trained model is written."""
        return self.save_dtype or ("bfloat16" if self.bf16 else "float32")

    def count_passes(self, num_processes: int) -> int:
        """Return the forward passes of one step.

        Raises:
            ValueError: `global_batch_size` is no multiple of what all devices take at once.
        """
        if self.global_batch_size is None:
            return self.accumulate
        passes, rest = divmod(self.global_batch_size, self.batch_size * num_processes)
        if rest or not passes:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is no multiple of batch_size={self.batch_size} on "
                f"{num_processes} devices; choose a batch_size that divides {self.global_batch_size / num_processes:g}"
            )
        return passes

    def count_steps(self, num_samples: int, num_processes: int) -> int:
        """Return the optimizer steps of the run; what is left of the samples does not make a shorter one."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(
            1, int(self.epochs * num_samples / (self.batch_size * num_processes * self.count_passes(num_processes)))
        )


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Runs one after the other, each from the last one's model.

    Attributes:
        out: folder of their run folders, which are named after the stages.
        stages: the runs; `out` of all, and `init` of those that go on from another one, are set by the chain.
    """

    makes_data: ClassVar[bool] = False
    """Whether `prepare` also makes what the stages learn from, which is otherwise looked at before."""

    out: str
    stages: tuple[TrainConfig, ...] = field(default=())

    def prepare(self) -> Path | None:
        """Make what the first stage starts from, where that is missing.

        Returns:
            The model that the first stage starts from; None: it says so itself.
        """
        return None

    def hand_over(self, model: Path, stage: TrainConfig) -> Path:
        """Return what `stage` starts from, where the stage before left `model`."""
        return model
