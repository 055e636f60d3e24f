"""Low-rank adapters on the language model (LoRA, QLoRA), through PEFT: what trains, what is saved, how it is merged.

A stage's table of rates stays the one source of rates. An adapter's matrices go by the name of the weight that they
adapt, so that a table says the same with and without adapters; the language model's own weights do not train beside
them, and everything outside of it trains as the table says.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from ..model.modeling import HIComForConditionalGeneration, raise_on_problems
from .config import Engine, LoraOptions, QuantizedName

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
TRAINED = "trained.safetensors"
"""What has trained as a whole beside the adapter: the compressor, as a rule."""
LANGUAGE_MODEL = "model.language_model."
HEAD = "lm_head."
MATRIX = re.compile(r"\.lora_[AB]\.default\.weight$")


def check_lora(options: LoraOptions, engine: Engine, *, has_parts: bool) -> None:
    """Refuse runs with adapters that would not work.

    Raises:
        ValueError: the engine spreads weights over processes, the base cannot be quantised, or a package is missing.
    """
    if engine != "ddp":
        raise ValueError(
            f"engine={engine!r} does not train adapters: their frozen base is not made to be spread; leave the engine "
            "out (ddp), where only the adapters' gradients and states are kept"
        )
    if options.quantize is None:
        return
    if has_parts:
        raise ValueError(
            f"lora.quantize={options.quantize!r} reads a whole model, and parts are given; put it together with hicom "
            "convert assemble, and give the folder as init"
        )
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"lora.quantize={options.quantize!r} needs bitsandbytes: pip install 'hicom[qlora]'")
    if options.quantize == "8bit" and not torch.cuda.is_available():
        raise ValueError("lora.quantize='8bit' needs a GPU; on CPUs use '4bit', or leave it out")


def quantization(kind: QuantizedName, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return how the language model's weights are kept: NF4 with quantised scales (QLoRA, section 3), or LLM.int8()."""
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def load_quantized(folder: Path, kind: QuantizedName, *, bf16: bool) -> HIComForConditionalGeneration:
    """Return a model whose language model has 4-bit or 8-bit linear layers; all else is in float32."""
    has_gpu = torch.cuda.is_available()
    model = HIComForConditionalGeneration.from_pretrained(
        folder,
        dtype=torch.float32,
        quantization_config=quantization(kind, torch.bfloat16 if bf16 else torch.float32),
        # Every process quantises on the device that it trains on.
        device_map={"": int(os.environ.get("LOCAL_RANK", "0")) if has_gpu else "cpu"},
    )
    # The Trainer refuses quantised models unless a PeftModel is around them; here the adapters are inside.
    model.is_quantized = False
    return model


def find_targets(model: nn.Module, pattern: str) -> list[str]:
    """Return the names of the language model's linear modules that a pattern matches as a whole.

    Raises:
        ValueError: it is no regular expression, or matches none.
    """
    try:
        matches = re.compile(pattern).fullmatch
    except re.error as error:
        raise ValueError(f"lora.targets={pattern!r} is no regular expression: {error}") from None
    linears = [
        name
        for name, module in model.named_modules()
        if name.startswith(LANGUAGE_MODEL) and isinstance(module, nn.Linear)
    ]
    found = [name for name in linears if matches(name)]
    if not found:
        raise ValueError(
            f"lora.targets={pattern!r} matches no linear layer of the language model; patterns must match whole names "
            f"such as {linears[0]!r}"
        )
    return found


def add_adapter(
    model: HIComForConditionalGeneration, options: LoraOptions, *, seed: int, bf16: bool, base: str | None
) -> None:
    """Put adapters, which do nothing yet, into a model's language model, and make checkpoints hold what trains alone.

    Args:
        model: changed in place; the language model's own weights stay, in 16 bit where `bf16` is set.
        options: of the adapters.
        seed: of their weights.
        bf16: whether the run computes in bfloat16: weights that do not train need no more digits than it uses.
        base: name or folder of the model, for `adapter_config.json`.

    Raises:
        ValueError: no module is adapted.
    """
    targets = find_targets(model, options.targets)
    if bf16:
        for name, parameter in model.named_parameters():
            if name.startswith((LANGUAGE_MODEL, HEAD)) and parameter.dtype == torch.float32:
                parameter.data = parameter.data.to(torch.bfloat16)
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=targets,
        base_model_name_or_path=base,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if MATRIX.search(name):
            parameter.data = parameter.data.float()
    model.register_state_dict_post_hook(keep_trained)


def keep_trained(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    """Leave out of a model's state what does not train: a resumed run has it from where the run started."""
    trained = {prefix + name for name, parameter in module.named_parameters() if parameter.requires_grad}
    for name in [name for name in state if name not in trained]:
        del state[name]


def table_name(name: str) -> str | None:
    """Return the name under which a table of rates knows a parameter of an adapted model; None: it does not train."""
    if MATRIX.search(name):
        return MATRIX.sub(".weight", name)
    return None if name.startswith((LANGUAGE_MODEL, HEAD)) else name


def save_adapter(model: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write an adapter in PEFT's layout, and beside it what has trained as a whole.

    Args:
        model: with the adapter.
        weights: all that has trained, by name.
        folder: to write.
    """
    folder.mkdir(parents=True, exist_ok=True)
    adapter = get_peft_model_state_dict(model, state_dict={n: w for n, w in weights.items() if MATRIX.search(n)})
    # PeftModel, which others load it with, has the model inside of two more modules.
    named = {f"base_model.model.{name}": tensor.contiguous().cpu() for name, tensor in adapter.items()}
    save_file(named, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    rest = {name: tensor.contiguous().cpu() for name, tensor in weights.items() if not MATRIX.search(name)}
    save_file(rest, folder / TRAINED, metadata={"format": "pt"})
    config = cast("dict[str, LoraConfig]", model.peft_config)["default"]
    config.inference_mode = True
    config.save_pretrained(str(folder))


def merge_adapter(model: HIComForConditionalGeneration, folder: Path) -> HIComForConditionalGeneration:
    """Return a plain model with an adapter added to its weights, and with what else has trained.

    Args:
        model: that the adapter was trained on, not quantised; changed in place.
        folder: what `save_adapter` wrote, or an adapter of PEFT.

    Raises:
        ValueError: there is no adapter, or it is of another model.
    """
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"there is no adapter in {folder}: {name} is missing; a run with LoRA writes OUT/adapter")
    own = model.state_dict()
    rest = load_file(folder / TRAINED) if (folder / TRAINED).is_file() else {}
    problems: dict[str, list[str]] = {
        "that the model lacks": sorted(rest.keys() - own.keys()),
        "of another shape": [
            f"{name} {tuple(tensor.shape)} (the model has {tuple(own[name].shape)})"
            for name, tensor in sorted(rest.items())
            if name in own and own[name].shape != tensor.shape
        ],
    }
    for name, matrix in load_file(folder / ADAPTER_WEIGHTS).items():
        weight, _, side = name.removeprefix("base_model.model.").rpartition(".lora_")
        shape = own[f"{weight}.weight"].shape if f"{weight}.weight" in own else None
        if shape is None:
            problems["that the model lacks"].append(weight)
        elif matrix.ndim != 2 or (matrix.shape[1] != shape[1] if side[0] == "A" else matrix.shape[0] != shape[0]):
            problems["of another shape"].append(f"{name} {tuple(matrix.shape)} (the model's weight: {tuple(shape)})")
    raise_on_problems(str(folder), problems)
    model.load_state_dict(rest, strict=False)
    with warnings.catch_warnings():
        # PEFT asks newer versions of transformers for gradient checkpointing by its old name.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        adapted = PeftModel.from_pretrained(model, str(folder))
    merged: HIComForConditionalGeneration = adapted.merge_and_unload()
    return merged
