"""The one training entry point: runs and chains of them, each from its start to the folder of a trained model."""

from __future__ import annotations

import copy
import dataclasses
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from ..data.collate import Collator, SampleSet
from ..data.domain import fit_domain
from ..data.features import FeatureStore
from ..files import UNWRITABLE, clear_parts, naming, write_text, writing_folder
from ..locks import locked, owned
from ..model.convert import is_official
from ..model.hub import find_model
from ..model.modeling import HIComForConditionalGeneration
from ..model.processing import HIComProcessor
from ..optim import find_muon
from .assemble import assemble, find
from .config import Chain, TrainConfig
from .data import check_chain, check_data
from .engines import choose_engine
from .lora import check_lora, load_quantized, merge_adapter, save_adapter
from .stamp import is_main, last_checkpoint, num_processes, open_stamp, write_stamp
from .trainer import RunCallback, make_trainer

DOMAIN_VIDEOS = 2000
"""About as many samples say what the model was trained on."""


def run(config: TrainConfig | Chain) -> Path:
    """Train, or go on with an interrupted run, and return the folder of the trained model with its processor.

    The run folder holds `run.json` (what was run, on what, for how long), `log.json` (the curves), `tensorboard/`,
    `checkpoints/` and, when the run is finished, `model/`, with LoRA also `adapter/`. A finished run is not repeated.

    Raises:
        ValueError: the run folder is of another configuration or in use, or the configuration is impossible.
        OSError: the run folder cannot be written.
    """
    if isinstance(config, Chain):
        return run_chain(config)
    if config.optimizer == "muon":
        find_muon()
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    with owned(out) if is_main() else nullcontext():
        stamp = open_stamp(out, config)
        if stamp["status"] != "finished":
            if is_main():
                clear_parts(out)
            with naming(out), quiet_threads():
                train(config, out, stamp)
        return out / "model"


@contextmanager
def quiet_threads() -> Iterator[None]:
    """Keep tracebacks of TensorBoard's thread off stderr where the disk is full: its next call here raises the same."""
    before = threading.excepthook

    def show(thrown: threading.ExceptHookArgs) -> None:
        if not (isinstance(thrown.exc_value, OSError) and thrown.exc_value.errno in UNWRITABLE):
            before(thrown)

    threading.excepthook = show
    try:
        yield
    finally:
        threading.excepthook = before


def run_chain(chain: Chain) -> Path:
    """Run every stage from the last one's model."""
    if not chain.stages:
        raise ValueError("a chain needs at least one stage")
    out = Path(chain.out)
    out.mkdir(parents=True, exist_ok=True)
    if not chain.makes_data:
        check_chain(chain)
    # Processes that train together take turns: the first one makes what is missing, the others find it there.
    with locked(out / "prepare.lock"):
        model = chain.prepare()
    if chain.makes_data:
        check_chain(chain)
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
        folder = find_model(config.init)
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


def train(config: TrainConfig, out: Path, stamp: dict[str, Any]) -> None:
    """Train to the end and save the model.

    Raises:
        ValueError: the data or the configuration are impossible, or loss, gradients or weights are not finite.
    """
    check_data(config)
    if config.lora is not None:
        engine = choose_engine(config.engine, num_processes(), config.optimizer)
        check_lora(config.lora, engine, has_parts=config.parts is not None)
    model, processor = load(config, quantize=True)
    model.config.text_config.use_cache = False
    trainer = make_trainer(config, model, processor, out, stamp)
    write_stamp(out, stamp)
    checkpoint = last_checkpoint(out / "checkpoints")
    try:
        result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except ValueError as error:
        write_stamp(out, stamp | {"stopped": str(error)})
        raise
    model.config.text_config.use_cache = True
    # Every process takes part in putting spread weights together.
    whole = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    weights: dict[str, Tensor] = whole or {}
    if is_main():
        precision: torch.dtype = getattr(torch, config.saved_precision)
        if config.lora is not None:
            with writing_folder(out / "adapter", replace=True) as part:
                save_adapter(model, weights, part)
            # Added to the weights as they were before they were quantised or cut to 16 bit.
            model = merge_adapter(load(config)[0], out / "adapter")
            weights = model.state_dict()
        assert isinstance(trainer.train_dataset, SampleSet)
        assert isinstance(trainer.data_collator, Collator)
        if "video" in trainer.data_collator.kinds and trainer.data_collator.num_frames is not None:
            processor.num_frames = trainer.data_collator.num_frames
        with writing_folder(out / "model", replace=True) as part:
            save_model(model, weights, precision, part)
            processor.save_pretrained(part)
            save_domain(config, trainer.train_dataset, trainer.data_collator.store, part)
        write_text(out / "log.json", json.dumps(trainer.state.log_history, indent=1) + "\n")
        stamp["status"], stamp["loss"] = "finished", result.training_loss
        callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, RunCallback))
        callback.keep_time()
    # Every process of a chain loads the model that the main one writes.
    trainer.accelerator.wait_for_everyone()


def save_model(
    model: HIComForConditionalGeneration, weights: dict[str, Tensor], precision: torch.dtype, folder: Path
) -> None:
    """Write a trained model in a precision.

    Args:
        model: that the weights are of; where an engine spreads it, it holds a part of them.
        weights: all of them, by name.
        precision: floating-point type of what is written.
        folder: to write.
    """
    # Some engines count weights under two names twice.
    once = {name: tensor for name, tensor in weights.items() if name not in model.all_tied_weights_keys}
    cast = {name: w.to(precision) if w.is_floating_point() else w for name, w in once.items()}
    model.save_pretrained(folder, state_dict=cast)
    # It says the precision of the model in memory; what is loaded "as stored" goes by this.
    config = copy.deepcopy(model.config)
    for each in (config, *(getattr(config, name) for name in config.sub_configs)):
        each.dtype = precision
    config.save_pretrained(folder)


def save_domain(config: TrainConfig, samples: SampleSet, store: FeatureStore | None, folder: Path) -> None:
    """Tell the model what it was trained on, if the run says so and its features are kept."""
    if config.data.about is None or store is None:
        return
    some = [samples[i][1] for i in range(0, len(samples), max(1, len(samples) // DOMAIN_VIDEOS))]
    videos = sorted({video for sample in some for video in sample.videos})
    fit_domain((store.read([video], "values") for video in videos), config.data.about).save(folder)
