"""One run of `hicom bench`: settings in, facts out, memory checked in between."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..inference import VideoChat
from ..model.config import HIComConfig
from ..model.hub import find_model
from .floor import measure_machine
from .memory import check_memory, compressor_bytes, needed_bytes, split_by_memory
from .run import Bench, bench_compressor
from .shapes import COLUMNS, check_columns, loaded_subject, published_config, random_subject

CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `hicom bench` measures, and how; its options one by one.

    Attributes:
        model: a model with real weights, where there is no `shape`.
        shape: random weights at a published size.
        num_frames: numbers of frames.
        columns: compressors beside ours; None: all of them, or the plain form where compressors are measured alone.
        compressor_only: compressors alone, forward and backward.
        batch_sizes: for that.
        repeats: times that count.
        threads: of a CPU; None: torch's choice.
        device: None: a GPU where there is one.
        dtype: None: bfloat16 on a GPU, float32 on a CPU.
        max_s: longest call, as it is expected.
        film: what is decoded.
        is_whole: build all layers of a published size; None: on a GPU only.
        leave_out: leave out sizes that would not fit into memory, unless none fits.
    """

    model: str = "hicom-tiny"
    shape: str | None = None
    num_frames: tuple[int, ...] = (8, 32, 64)
    columns: tuple[str, ...] | None = None
    compressor_only: bool = False
    batch_sizes: tuple[int, ...] = (1, 4)
    repeats: int = 3
    threads: int | None = None
    device: str | None = None
    dtype: str | None = None
    max_s: float = 20.0
    film: Path | None = None
    is_whole: bool | None = None
    leave_out: bool = False

    @property
    def command(self) -> str:
        """The command line that does this again."""
        what = ["--model", self.model] if self.shape is None else ["--shape", self.shape]
        words = ["hicom", "bench", *what, "--num-frames", *map(str, self.num_frames)]
        words += ["--columns", *self.columns] if self.columns is not None else []
        if self.compressor_only:
            words += ["--compressor-only", "--batch-sizes", *map(str, self.batch_sizes)]
        words += ["--repeats", str(self.repeats), "--max-s", f"{self.max_s:g}"]
        given = {"--threads": self.threads, "--device": self.device, "--dtype": self.dtype}
        for name, value in given.items():
            words += [name, str(value)] if value is not None else []
        words += ["--leave-out"] if self.leave_out else []
        return shlex.join([*words, *(["--film", self.film.name] if self.film is not None else [])])


def run_bench(settings: Settings, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure, and return facts for `hicom.bench.report`.

    Args:
        settings: what to measure.
        say: takes a line about what is measured now.

    Raises:
        ValueError: a setting is impossible, or the run would not fit into memory.
    """
    default = tuple(COLUMNS) if not settings.compressor_only else ("plain",)
    columns = check_columns(default if settings.columns is None else settings.columns)
    device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    precision = settings.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    dtype = getattr(torch, precision)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if settings.shape is None:
        folder = find_model(settings.model)
        config = HIComConfig.from_pretrained(folder)
    else:
        config = published_config(settings.shape)
    is_whole = settings.shape is None or (device.type == "cuda" if settings.is_whole is None else settings.is_whole)
    machine = measure_machine(device, dtype)

    def needs(some: Any, frames: int, batch: int) -> int:
        if settings.compressor_only:
            return compressor_bytes(config, some, frames, batch, dtype.itemsize)
        return needed_bytes(config, some, frames, dtype.itemsize, machine, settings.max_s, is_whole=is_whole)

    batch_sizes = settings.batch_sizes if settings.compressor_only else (1,)
    sizes = [(batch, frames) for batch in batch_sizes for frames in settings.num_frames]
    fitting, left_out = split_by_memory(needs, columns, sizes, device)
    if left_out and not (settings.leave_out and fitting):
        check_memory(needs, columns, settings.num_frames, batch_sizes, device)
    if settings.compressor_only:
        rows = bench_compressor(
            config,
            columns,
            fitting,
            device,
            dtype,
            repeats=settings.repeats,
            say=say,
        )
    else:
        if settings.shape is None:
            chat = VideoChat.from_pretrained(settings.model, device=str(device), dtype=dtype)
            subject = loaded_subject(chat.model, columns)
        else:
            subject = random_subject(config, columns, device, dtype, is_whole=is_whole)
        bench = Bench(
            subject,
            device,
            dtype,
            repeats=settings.repeats,
            max_s=settings.max_s,
            machine=machine,
            film=settings.film,
        )
        rows = bench.run([frames for _, frames in fitting], say)
    machine = machine.better(measure_machine(device, dtype))
    for facts in (part for row in rows for part in (row["parts"].values() if "parts" in row else (row,))):
        machine.judge(facts)
    return {
        "kind": "compressor" if settings.compressor_only else "parts",
        "subject": settings.model if settings.shape is None else settings.shape,
        "command": settings.command,
        "date": time.strftime("%Y-%m-%d"),
        "device": device.type,
        "dtype": precision,
        "threads": torch.get_num_threads(),
        "repeats": settings.repeats,
        "machine": asdict(machine),
        "hardware": {"cpu": cpu_name()},
        "rows": rows,
        "left_out": left_out,
    }


def cpu_name() -> str:
    """Return the processor's name, as far as the system says it."""
    lines = CPU_INFO.read_text("utf-8").splitlines() if CPU_INFO.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
