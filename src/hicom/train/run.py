"""The one training entry point: stages over the Trainer of transformers, through its public hooks only."""

from __future__ import annotations

import atexit
import dataclasses
import json
import logging
import os
import platform
import sys
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import TensorBoardCallback

from ..data.collate import Collator, GroupedSampler, SampleSet
from ..data.domain import fit_domain
from ..data.features import FeatureStore, cache_features
from ..data.mixture import not_skipped, read_skip_list, read_sources
from ..locks import locked, owned
from ..model.convert import is_official, resolve_folder
from ..model.modeling import HIComForConditionalGeneration
from ..model.processing import HIComProcessor
from ..optim import find_muon
from ..provenance import git_commit, hardware
from .assemble import assemble, find
from .config import Chain, TrainConfig
from .engines import choose_engine, engine_arguments
from .lora import add_adapter, check_lora, load_quantized, merge_adapter, save_adapter, table_name
from .stages import Rule, make_optimizer, resolve

logger = logging.getLogger(__name__)

COMPLETE = "complete"
"""Empty file that a checkpoint gets last: without it the write was interrupted."""
DOMAIN_VIDEOS = 2000
"""About as many samples say what the model was trained on."""
PACKAGES = ("accelerate", "av", "hicom", "numpy", "peft", "torch", "transformers")


def run(config: TrainConfig | Chain) -> Path:
    """Train, or go on with an interrupted run, and return the folder of the trained model with its processor.

    The run folder holds `run.json` (what was run, on what, for how long), `log.json` (the curves), `tensorboard/`,
    `checkpoints/` and, when the run is finished, `model/`, with LoRA also `adapter/`. A finished run is not repeated.

    Raises:
        ValueError: the run folder is of another configuration or in use, or the configuration is impossible.
    """
    if isinstance(config, Chain):
        return run_chain(config)
    if config.optimizer == "muon":
        find_muon()
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    with owned(out) if is_main() else nullcontext():
        stamp = open_stamp(out, config)
        model_folder = out / "model"
        if stamp["status"] != "finished":
            train(config, out, stamp)
        return model_folder


def run_chain(chain: Chain) -> Path:
    """Run every stage from the last one's model."""
    if not chain.stages:
        raise ValueError("a chain needs at least one stage")
    out = Path(chain.out)
    out.mkdir(parents=True, exist_ok=True)
    # Processes that train together take turns: the first one makes what is missing, the others find it there.
    with locked(out / "prepare.lock"):
        model = chain.prepare()
    for number, stage in enumerate(chain.stages):
        stage = dataclasses.replace(stage, out=str(out / stage.name))
        if number:
            assert model is not None
            with locked(out / "prepare.lock"):
                model = chain.hand_over(model, stage)
        if model is not None:
            stage = dataclasses.replace(stage, init=str(model), parts=None)
        model = run(stage)
    assert model is not None
    return model


def is_main() -> bool:
    """Whether this process writes the files of the run."""
    return int(os.environ.get("RANK", "0")) == 0


def num_processes() -> int:
    """Return how many processes train together (torchrun sets it)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def open_stamp(out: Path, config: TrainConfig) -> dict[str, Any]:
    """Return the run's `run.json`, made now or by the interrupted run that goes on.

    Raises:
        ValueError: the folder is of another configuration.
    """
    configuration = json.loads(json.dumps(dataclasses.asdict(config)))
    path = out / "run.json"
    if path.exists():
        stamp: dict[str, Any] = json.loads(path.read_text("utf-8"))
        # A run may be moved, and go on from where it lies.
        old, new = ({**c, "out": None} for c in (stamp["configuration"], configuration))
        changed = sorted(k for k in old.keys() | new.keys() if is_set(old.get(k)) != is_set(new.get(k)))
        if changed:
            raise ValueError(
                f"{out} holds a run of another configuration ({', '.join(changed)} differ); choose another out, or "
                "remove the folder"
            )
        before = stamp["hardware"]["processes"]
        if stamp["status"] != "finished" and before != num_processes():
            raise ValueError(
                f"the run in {out} was started with {before} processes and cannot go on exactly with "
                f"{num_processes()}, which would take other batches; start as many, or choose another out"
            )
        return stamp
    return {
        "configuration": configuration,
        "status": "running",
        "command": sys.argv,
        "seed": config.seed,
        "commit": git_commit(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "hardware": hardware() | {"processes": num_processes()},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "wall_s": 0.0,
    }


def is_set(value: Any) -> Any:
    """Return what is set of a part of a configuration: an older `run.json` lacks switches that came later."""
    if isinstance(value, dict):
        return {key: is_set(each) for key, each in value.items() if each is not None and each is not False}
    return None if value is False else value


def write_stamp(out: Path, stamp: dict[str, Any]) -> None:
    """Write `run.json` as a whole or not at all."""
    if is_main():
        part = out / "run.json.part"
        part.write_text(json.dumps(stamp, indent=1) + "\n", "utf-8")
        part.replace(out / "run.json")


class StageTrainer(Trainer):
    """A Trainer with the rates of a stage, and batches of about equally long samples, of the same videos, or both."""

    config: TrainConfig
    rules: list[Rule]
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
        return self.optimizer

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the batches of one epoch after the other."""
        if not self.config.group_by_length and self.config.per_video == 1:
            return super().get_train_dataloader()
        assert isinstance(self.train_dataset, SampleSet)
        assert isinstance(self.data_collator, Collator)
        size = self.args.train_batch_size
        lengths, videos = self.train_dataset.lengths_and_videos(**self.data_collator.visual_tokens())
        # The samples of all processes in a step are drawn together, so that no process waits for another's long ones.
        sampler = GroupedSampler(
            lengths if self.config.group_by_length else None,
            size * num_processes(),
            self.args.seed,
            videos=videos,
            per_video=self.config.per_video,
        )
        loader: DataLoader[Any] = DataLoader(
            self.train_dataset,
            batch_size=size,
            sampler=sampler,
            collate_fn=self.data_collator,
            drop_last=True,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)


class RunCallback(TrainerCallback):
    """Marks whole checkpoints, and keeps the wall time across interruptions."""

    def __init__(self, out: Path, stamp: dict[str, Any]) -> None:
        self.out = out
        self.stamp = stamp
        self.before = stamp["wall_s"]
        self.start = time.monotonic()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Mark the checkpoint that has just been written."""
        # Every process writes a part of it: its random numbers, and under most engines weights and optimizer too.
        wait_for_all()
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()
            self.keep_time()

    def keep_time(self) -> None:
        """Write the wall time so far."""
        self.stamp["wall_s"] = round(self.before + time.monotonic() - self.start, 1)
        write_stamp(self.out, self.stamp)


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def load(config: TrainConfig, *, quantize: bool = False) -> tuple[HIComForConditionalGeneration, HIComProcessor]:
    """Return the model and processor that the run starts from; `quantize`: as its adapters are trained on."""
    if config.parts is not None:
        set_seed(config.seed)
        return assemble(config.parts, config.seed)
    folder = starting_model(config)
    processor = HIComProcessor.from_pretrained(folder)
    if quantize and config.lora is not None and config.lora.quantize is not None:
        return load_quantized(folder, config.lora.quantize, bf16=config.bf16), processor
    return HIComForConditionalGeneration.from_pretrained(folder, dtype=torch.float32), processor


def starting_model(config: TrainConfig) -> Path:
    """Return the folder of the model that a run starts from; one of the hub is downloaded.

    Raises:
        ValueError: there is none, or it is in the layout of the official code.
    """
    assert config.init is not None
    folder = find(config.init)
    # A name such as org/model is one of the hub, unless there is a folder org that just lacks it.
    if not folder.exists() and len(folder.parts) == 2 and not folder.parent.exists():
        folder = resolve_folder(config.init)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"there is no model in {folder} to start {config.name} from; run the stage before first, "
            "or put one together with `hicom convert assemble`"
        )
    if is_official(folder):
        raise ValueError(
            f"{folder} is a checkpoint of the official code; `hicom convert {config.init} DST` comes first"
        )
    return folder


def make_data(
    config: TrainConfig, model: HIComForConditionalGeneration, processor: HIComProcessor
) -> tuple[SampleSet, Collator]:
    """Return the samples of a run and what makes batches of them; vision features are computed where they are missing.

    Raises:
        ValueError: records are malformed, or too few for one step.
    """
    data, stage = config.data, config.stage
    num_frames = processor.num_frames if data.num_frames is None else data.num_frames
    sources = read_sources(data.records, data.root, data.on_bad_record)
    for source in sources:
        if source.records.errors:
            errors = source.records.errors
            logger.warning("%d bad records are left out; the first: %s", len(errors), errors[0].message)
    if data.skip_list is not None:
        skip, before = read_skip_list(data.skip_list), sum(map(len, sources))
        sources = [not_skipped(source, skip) for source in sources]
        logger.warning("%d samples are left out, as %s says", before - sum(map(len, sources)), data.skip_list)
    store: FeatureStore | None = None
    if data.cache is not None:
        videos = [video for source in sources for video in source.videos]
        store = cache_features(
            model,
            processor,
            videos,
            Path(data.cache),
            num_frames=num_frames,
            on_bad_video=data.on_bad_video,
        )
    samples = SampleSet(sources, store)
    needed = config.batch_size * config.count_passes(num_processes()) * num_processes()
    if len(samples) < needed:
        name = "batch_size" if config.global_batch_size is None else "global_batch_size"
        raise ValueError(
            f"{len(samples)} samples are fewer than the {needed} of one step; lower {name} ({getattr(config, name)})"
        )
    collator = Collator(
        processor=processor,
        store=store,
        num_frames=num_frames,
        compression=stage.compression,
        windows=stage.windows,
        seed=config.seed,
        kinds=samples.kinds,
    )
    return samples, collator


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
    samples, collator = make_data(config, model, processor)
    steps = config.count_steps(len(samples), num_processes())
    stamp |= {"samples": len(samples), "steps": steps, "accumulate": config.count_passes(num_processes())}
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=stamp["accumulate"],
        lr_scheduler_type="cosine",
        warmup_steps=round(config.warmup * steps),
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
        report_to=[],
        disable_tqdm=not sys.stderr.isatty(),
        **engine_arguments(engine, model, config.gradient_checkpointing),
    )
    callbacks: list[TrainerCallback] = [RunCallback(out, stamp)]
    if num_processes() > 1:
        atexit.register(leave_process_group)
    if is_main():
        from torch.utils.tensorboard.writer import SummaryWriter

        callbacks.append(TensorBoardCallback(SummaryWriter(str(out / "tensorboard"))))
    trainer = StageTrainer(
        model=model,
        args=arguments,
        data_collator=collator,
        train_dataset=samples,
        processing_class=processor,
        callbacks=callbacks,
    )
    trainer.config, trainer.rules = config, rules
    if engine == "fsdp2" and not trainer.is_fsdp_enabled:
        raise ValueError("engine='fsdp2' needs GPUs: without them accelerate silently trains whole copies; use 'ddp'")
    # The Trainer sets a key that a HICom configuration does not have; the LLM's own is the one in force.
    del model.config.use_cache
    return trainer


def train(config: TrainConfig, out: Path, stamp: dict[str, Any]) -> None:
    """Train to the end and save the model."""
    if config.lora is not None:
        engine = choose_engine(config.engine, num_processes(), config.optimizer)
        check_lora(config.lora, engine, has_parts=config.parts is not None)
    model, processor = load(config, quantize=True)
    model.config.text_config.use_cache = False
    trainer = make_trainer(config, model, processor, out, stamp)
    write_stamp(out, stamp)
    checkpoint = last_checkpoint(out / "checkpoints")
    result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    model.config.text_config.use_cache = True
    # Every process takes part in putting spread weights together; some engines count those under two names twice.
    whole = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    weights = {name: tensor for name, tensor in (whole or {}).items() if name not in model.all_tied_weights_keys}
    if is_main():
        if config.lora is None:
            model.save_pretrained(out / "model", state_dict=weights)
        else:
            save_adapter(model, weights, out / "adapter")
            # Added to the weights as they were before they were quantised or cut to 16 bit.
            merge_adapter(load(config)[0], out / "adapter").save_pretrained(out / "model")
        assert isinstance(trainer.train_dataset, SampleSet)
        assert isinstance(trainer.data_collator, Collator)
        if "video" in trainer.data_collator.kinds and trainer.data_collator.num_frames is not None:
            processor.num_frames = trainer.data_collator.num_frames
        processor.save_pretrained(out / "model")
        save_domain(config, trainer.train_dataset, trainer.data_collator.store, out / "model")
        (out / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1) + "\n", "utf-8")
        stamp["status"], stamp["loss"] = "finished", result.training_loss
        callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, RunCallback))
        callback.keep_time()
    # Every process of a chain loads the model that the main one writes.
    trainer.accelerator.wait_for_everyone()


def save_domain(config: TrainConfig, samples: SampleSet, store: FeatureStore | None, folder: Path) -> None:
    """Tell the model what it was trained on, if the run says so and its features are kept."""
    if config.data.about is None or store is None:
        return
    some = [samples[i][1] for i in range(0, len(samples), max(1, len(samples) // DOMAIN_VIDEOS))]
    videos = sorted({video for sample in some for video in sample.videos})
    fit_domain((store.read([video], "values") for video in videos), config.data.about).save(folder)


def wait_for_all() -> None:
    """Wait until all processes are here."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def leave_process_group() -> None:
    """Leave the group of processes, if this one is in it: its threads abort an interpreter that ends before them."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
