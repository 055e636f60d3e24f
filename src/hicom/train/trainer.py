"""The Trainer of transformers with what a run adds to it, through its public hooks only."""

from __future__ import annotations

import atexit
import dataclasses
import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ProgressCallback

from ..data.collate import Collator, GroupedSampler, SampleSet
from ..files import give_permissions
from ..model.modeling import HIComForConditionalGeneration
from ..model.processing import HIComProcessor
from .config import TrainConfig
from .data import make_data
from .engines import choose_engine, engine_arguments
from .guard import Guard
from .log import RATE, LeftOut, StepBar, StepLines
from .lora import add_adapter, table_name
from .stages import Rule, make_optimizer, resolve
from .stamp import COMPLETE, is_main, num_processes, steps_done, take_skips, write_stamp

logger = logging.getLogger(__name__)


class StageTrainer(Trainer):
    """A Trainer with the rates of a stage, and batches of about equally long samples, of the same videos, or both."""

    config: TrainConfig
    rules: list[Rule]
    guard: Guard
    left_out: LeftOut
    optimizer: Any

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimizer; engines call this where its parameters are to be made theirs."""
        if self.optimizer is None:
            config = self.config
            self.optimizer = make_optimizer(
                self.model,
                self.rules,
                optimizer=config.optimizer,
                weight_decay=config.weight_decay,
                betas=config.betas,
            )
            self.guard.watch(self.optimizer)
        return self.optimizer

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the loss of a batch, after what its report says has been taken in."""
        report = inputs.pop("report")
        self.guard.step = self.state.global_step + 1
        bad = next((entry for entry in report["left_out"] if "media" in entry), None)
        if bad is not None and self.config.data.on_bad_video == "stop":
            raise ValueError(
                f"{bad['reason']} ({bad['source']}); repair the file, or start the same command again with "
                "data.on_bad_video='skip', or with a data.skip_list that names it (hicom data check --skip-list)"
            )
        self.left_out.take(report, self.guard.step)
        number = kwargs.get("num_items_in_batch")
        if isinstance(number, torch.Tensor):  # none, where a step has nothing left to learn from
            kwargs["num_items_in_batch"] = number.clamp(min=1)
        result = super().compute_loss(model, inputs, *args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        self.guard.add(loss, [entry["source"] for entry in report["samples"]])
        return result

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log a step with the rates of all parameters; gradients whose norm is infinite stop the run."""
        if "loss" in logs:
            norm = logs.get("grad_norm", 0.0)
            if not math.isfinite(norm) and not self.guard.is_scaled:
                self.guard.step = self.state.global_step
                self.guard.stop(f"the norm of the gradients is {norm}", [])
            for number, (peak, rate) in enumerate(self.guard.rates.items()):
                logs[f"{RATE}_{peak:g}" if number else RATE] = rate
        super().log(logs, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the batches of one epoch after the other."""
        config, samples, size = self.config, self.train_dataset, self.args.train_batch_size
        assert isinstance(samples, SampleSet)
        assert isinstance(self.data_collator, Collator)
        per_video, part = config.per_video, None
        turns = samples.turns() if per_video is None else []
        if per_video is None:
            has_several = size > 1 and len(set(turns)) < len(turns)
            per_video, part = (size, size) if has_several else (1, None)
        if not config.group_by_length and per_video == 1:
            return super().get_train_dataloader()
        lengths, videos = samples.lengths_and_videos(**self.data_collator.visual_tokens())
        # The samples of all processes in a step are drawn together, so that no process waits for another's long ones.
        sampler = GroupedSampler(
            lengths if config.group_by_length else None,
            size * num_processes(),
            self.args.seed,
            videos=turns or videos,
            per_video=per_video,
            part=part,
        )
        loader: DataLoader[Any] = DataLoader(
            samples,
            batch_size=size,
            sampler=sampler,
            collate_fn=self.data_collator,
            drop_last=True,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)


class RunCallback(TrainerCallback):
    """Marks whole checkpoints, and keeps the wall time and what was left out across interruptions."""

    def __init__(self, out: Path, stamp: dict[str, Any], guard: Guard, left_out: LeftOut) -> None:
        self.out = out
        self.stamp = stamp
        self.guard = guard
        self.left_out = left_out
        self.before = {name: stamp.get(name, 0) for name in ("wall_s", "left_out", "cut")}
        self.start = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Notice a step that was left out, and keep weights that are no numbers from being written."""
        self.guard.step = state.global_step
        self.guard.settle()
        if control.should_save:
            self.guard.check_weights()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Mark the checkpoint that has just been written."""
        # Every process writes a part of it: its random numbers, and under most engines weights and optimizer too.
        wait_for_all()
        self.stamp |= {name: self.before[name] + number for name, number in self.left_out.of_all().items()}
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            give_permissions(checkpoint)
            (checkpoint / COMPLETE).touch()
            self.keep_time()

    def keep_time(self) -> None:
        """Write the wall time so far."""
        self.stamp["wall_s"] = round(self.before["wall_s"] + time.monotonic() - self.start, 1)
        write_stamp(self.out, self.stamp)


def make_trainer(
    config: TrainConfig,
    model: HIComForConditionalGeneration,
    processor: HIComProcessor,
    out: Path,
    stamp: dict[str, Any],
) -> Trainer:
    """Return the Trainer of a run, and write its resolved table of stages to the log and to `stamp`."""
    if config.bf16 and not torch.cuda.is_available():
        raise ValueError("bf16=True needs a GPU; leave it out on CPUs")
    engine = choose_engine(config.engine, num_processes(), config.optimizer)
    stamp["engine"] = engine
    if config.lora is None:
        rules = resolve(model, config.rates)
    else:
        add_adapter(model, config.lora, seed=config.seed, bf16=config.bf16, base=config.init)
        rules = resolve(model, config.rates, table_name)
    stamp["trainable"] = [rule.summary() for rule in rules]
    for row in stamp["trainable"]:
        logger.info("%(rate)8.1e  %(tensors)4d tensors  %(parameters)11d parameters  %(pattern)s", row)
    samples, collator = make_data(config, model, processor, take_skips(out, config, stamp))
    before = stamp.get("samples", len(samples))
    if before != len(samples) and steps_done(out):
        raise ValueError(
            f"the run in {out} was started with {before} samples and cannot go on exactly with {len(samples)}: its "
            "records have changed; bring them back, or choose another out"
        )
    steps = config.count_steps(len(samples), num_processes())
    stamp |= {"samples": len(samples), "steps": steps, "accumulate": config.count_passes(num_processes())}
    guard, left_out = Guard(), LeftOut(out)
    arguments = training_arguments(config, out, stamp, engine_arguments(engine, model, config.gradient_checkpointing))
    callbacks: list[TrainerCallback] = [RunCallback(out, stamp, guard, left_out), StepLines()]
    if num_processes() > 1:
        atexit.register(leave_process_group)
    if is_main():
        from torch.utils.tensorboard.writer import SummaryWriter

        callbacks.append(TensorBoardCallback(SummaryWriter(str(out / "tensorboard"))))
    trainer = StageTrainer(
        model=model,
        args=arguments,
        data_collator=dataclasses.replace(collator, has_report=True),
        train_dataset=samples,
        processing_class=processor,
        callbacks=callbacks,
    )
    trainer.config, trainer.rules, trainer.guard, trainer.left_out = config, rules, guard, left_out
    guard.is_scaled = trainer.accelerator.mixed_precision == "fp16"
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(StepBar())
    if engine == "fsdp2" and not trainer.is_fsdp_enabled:
        raise ValueError("engine='fsdp2' needs GPUs: without them accelerate silently trains whole copies; use 'ddp'")
    # The Trainer sets a key that a HICom configuration does not have; the LLM's own is the one in force.
    del model.config.use_cache
    return trainer


def training_arguments(
    config: TrainConfig, out: Path, stamp: dict[str, Any], engine: dict[str, Any]
) -> TrainingArguments:
    """Return what the Trainer of transformers is told of a run; `engine`: what makes its engine."""
    return TrainingArguments(
        output_dir=str(out / "checkpoints"),
        max_steps=stamp["steps"],
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=stamp["accumulate"],
        lr_scheduler_type="cosine",
        warmup_steps=round(config.warmup * stamp["steps"]),
        max_grad_norm=config.max_grad_norm,
        bf16=config.bf16,
        seed=config.seed,
        use_cpu=not torch.cuda.is_available(),
        ddp_backend="gloo" if num_processes() > 1 and not torch.cuda.is_available() else None,
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        dataloader_num_workers=config.workers,
        remove_unused_columns=False,
        save_steps=config.save_every,
        # The older one stays until the newer one is marked whole.
        save_total_limit=2,
        logging_steps=config.log_every,
        # It would put the mean of the losses before in the place of one that is not a number, in silence.
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=not sys.stderr.isatty(),
        **engine,
    )


def wait_for_all() -> None:
    """Wait until all processes are here."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def leave_process_group() -> None:
    """Leave the group of processes, if this one is in it: its threads abort an interpreter that ends before them."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
