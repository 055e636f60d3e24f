"""A HICom model put together of what people already have: a dual encoder, a language model, and a new compressor."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from .config import HIComConfig
from .convert import read_tensors, weight_files
from .dual_encoder import DUAL_ENCODERS
from .hub import MODEL_FILES, SETTINGS_FILES, find_model, read_json
from .modeling import TOWERS, HIComForConditionalGeneration, make_compressor, raise_on_problems
from .official import placeholder_tokens
from .processing import CHAT_TEMPLATE, HIComProcessor
from .rehearsal import compare, rehearse
from .tail import decoder_name, empty_llm

PACKAGE = "package:"
"""Before the name of an installed Python package that carries a language model as a GGUF file."""
NO_INSTRUCTION = {"local_injection": "none", "global_injection": "none"}


@dataclass(frozen=True, kw_only=True)
class Towers:
    """The two halves of a dual encoder.

    Attributes:
        vision_config: of the vision tower.
        instruction_config: of the text tower; None without one.
        tokenizer: the text tower's; None without one.
        pixels: `image_mean` and `image_std` where the dual encoder's folder says them.
        vision: the vision tower; None where only sizes are wanted.
        instruction: the text tower, likewise.
        toy: what the toy that they are of was made for (`HIComConfig.toy`).
    """

    vision_config: PreTrainedConfig
    instruction_config: PreTrainedConfig | None
    tokenizer: PreTrainedTokenizerBase | None
    pixels: Mapping[str, Sequence[float]] = field(default_factory=dict)
    vision: PreTrainedModel | None = None
    instruction: PreTrainedModel | None = None
    toy: str = ""


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A language model and a tokenizer that can chat about media.

    Attributes:
        config: of the language model; its vocabulary has a place for every token of the tokenizer.
        tokenizer: with a chat template and the placeholders.
        video_token: placeholder of a video.
        image_token: placeholder of an image.
        model: with its output matrix; None where only sizes are wanted.
        toy: what the toy that it is of was made for (`HIComConfig.toy`).
    """

    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    video_token: str
    image_token: str
    model: PreTrainedModel | None = None
    toy: str = ""


def assemble(
    vision: str | Path,
    llm: str | Path,
    *,
    dtype: torch.dtype | None = None,
    chat_template: str | None = None,
    num_frames: int = 32,
    seed: int = 0,
    compressor_from: str | Path | None = None,
    **fields: Any,
) -> tuple[HIComForConditionalGeneration, HIComProcessor]:
    """Return a model with the weights of its parts and a new compressor, and its processor.

    Args:
        vision: dual encoder of the SigLIP, SigLIP2 or CLIP kind, or a HICom model to take both towers from: a folder,
            a hub id or an embedded name. Without instructions (injections `none`, baselines) its vision half alone will
            do.
        llm: language model: a folder or a hub id, a `.gguf` file or a folder with one, `package:NAME` for an installed
            package that carries one, or a HICom model (also by embedded name) to take the language model from.
        dtype: precision of all weights; None: the language model's own.
        chat_template: for a language model whose tokenizer has none: `chatml`, or a file with a Jinja template.
        num_frames: frames of a video unless a call says otherwise.
        seed: of the compressor's weights, which depend on nothing else but its sizes.
        compressor_from: HICom model whose compressor's weights are taken, where the new one has the same tensors; it
            may have other injections.
        **fields: further fields of `HIComConfig`, such as `window` and `num_global_tokens`.

    Raises:
        ValueError: a part is missing, of another kind, or does not fit the others; or the language model's logits would
            not be its own (`hicom.model.rehearsal`). Nearly all of it is said before weights are read.
    """
    config = plan(vision, llm, dtype=dtype, chat_template=chat_template, **fields)
    compressor = None if compressor_from is None else read_compressor(config, compressor_from)
    for name in (vision, llm):
        check_weights(name)
    # What follows reads gigabytes.
    towers = read_towers(vision, dtype, is_conditional=config.is_conditional)
    language = read_language_model(llm, dtype, chat_template=chat_template)
    assert language.model is not None
    model, processor = put_together(
        towers, language, dtype=dtype or language.model.dtype, num_frames=num_frames, seed=seed, **fields
    )
    if compressor is not None:
        model.model.compressor.load_state_dict(compressor, strict=False)
    return model, processor


def plan(
    vision: str | Path,
    llm: str | Path,
    *,
    dtype: torch.dtype | None = None,
    chat_template: str | None = None,
    **fields: Any,
) -> HIComConfig:
    """Return the configuration of what `assemble` would make, after a run without numbers; no weights are read.

    Raises:
        ValueError: as `assemble`, as far as it shows in configurations and tokenizers.
    """
    towers = read_towers(vision, is_conditional=_is_conditional(fields), with_weights=False)
    language = read_language_model(llm, chat_template=chat_template, with_weights=False)
    config = make_config(towers, language, **fields)
    config.dtype = dtype or language.config.dtype or torch.float32
    rehearse(config)
    return config


def make_config(towers: Towers, language: LanguageModel, **fields: Any) -> HIComConfig:
    """Return the configuration of a model of these parts; `fields` are further ones of `HIComConfig`."""
    parts = {} if towers.instruction_config is None else {"instruction_config": towers.instruction_config}
    return HIComConfig(
        vision_config=towers.vision_config,
        text_config=language.config,
        video_token_id=int(language.tokenizer.convert_tokens_to_ids(language.video_token)),
        image_token_id=int(language.tokenizer.convert_tokens_to_ids(language.image_token)),
        **parts,
        **({"toy": towers.toy or language.toy} | fields),
    )


def put_together(
    towers: Towers, language: LanguageModel, *, dtype: torch.dtype, num_frames: int, seed: int, **fields: Any
) -> tuple[HIComForConditionalGeneration, HIComProcessor]:
    """Return a model that holds these parts themselves, not copies, and its processor; see `assemble`.

    Raises:
        ValueError: the parts do not fit, or the language model cannot be HICom's.
    """
    llm = language.model
    assert towers.vision is not None
    assert llm is not None
    config = make_config(towers, language, **fields)
    for part in (config, config.vision_config, config.instruction_config, config.text_config):
        part.dtype = dtype
    with torch.device("meta"):
        model = HIComForConditionalGeneration(config)
    model.model.replace_vision_tower(towers.vision)
    if model.model.instruction_encoder is not None:  # nothing steers the baselines
        model.model.instruction_encoder = towers.instruction
    model.model.reset_compressor(seed)
    model.model.language_model = getattr(llm, str(decoder_name(llm)))
    model.lm_head = llm.get_output_embeddings()
    model.tie_weights()
    model.to(dtype)
    compare(llm, model)
    model.generation_config.update(**special_ids(llm, language.tokenizer))
    processor = HIComProcessor.from_config(
        config,
        language.tokenizer,
        towers.tokenizer if config.is_conditional and towers.tokenizer is not None else language.tokenizer,
        num_frames=num_frames,
        video_token=language.video_token,
        image_token=language.image_token,
        **towers.pixels,
    )
    return model.eval(), processor


def _is_conditional(fields: Mapping[str, Any]) -> bool:
    """Whether an instruction steers a model of these fields."""
    return bool(HIComConfig(**fields).is_conditional)


def read_compressor(config: HIComConfig, donor: str | Path) -> dict[str, Tensor]:
    """Return weights of another model's compressor, where one of this configuration has the same tensors.

    Raises:
        ValueError: the donor is no HICom model, or tensors of the same name have other shapes.
    """
    with torch.device("meta"):
        own = make_compressor(config).state_dict()
    prefix = "model.compressor."
    found = {name.removeprefix(prefix): tensor for name, tensor in read_tensors(find_model(donor), prefix)}
    shared = {name: tensor for name, tensor in found.items() if name in own}
    if not shared:
        raise ValueError(f"the compressor of {donor} has no tensor in common with the new one")
    mismatched = [
        f"{name} {tuple(tensor.shape)} (expected {tuple(own[name].shape)})"
        for name, tensor in sorted(shared.items())
        if tensor.shape != own[name].shape
    ]
    raise_on_problems(str(donor), {"of another shape": mismatched})
    return shared


def special_ids(llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the ids of the tokens that begin, end and fill up; the end of a turn in the chat template is one."""
    ids = {
        name: next(
            (x for x in (getattr(llm.generation_config, name), getattr(llm.config, name)) if x is not None), None
        )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    ends = ids["eos_token_id"]
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    ids["eos_token_id"] = ends[0] if len(ends) == 1 else ends or None
    if ids["pad_token_id"] is None:
        ids["pad_token_id"] = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return ids


# Reading parts


def read_config(name: str | Path, what: str, *, with_weights: bool, **kwargs: Any) -> tuple[PreTrainedConfig, Path]:
    """Return the configuration of a model, and its folder, which has the weights, too, if wanted.

    Raises:
        ValueError: there is none.
    """
    AutoConfig.register(HIComConfig.model_type, HIComConfig, exist_ok=True)
    try:
        folder = find_model(name, files=MODEL_FILES if with_weights else SETTINGS_FILES)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **kwargs)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"there is no model in {name} to take the {what} from ({reason})") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"the weights in {name} are quantised; give the model in full precision, which can be quantised as it is "
            "loaded later (quantization_config=...)"
        )
    return config, folder


def read_towers(
    name: str | Path, dtype: torch.dtype | None = None, *, is_conditional: bool = True, with_weights: bool = True
) -> Towers:
    """Return the towers of a dual encoder, or of a HICom model.

    Args:
        name: folder, hub id or embedded name.
        dtype: precision of the weights; None: the stored one.
        is_conditional: whether the text tower is needed.
        with_weights: False: configurations and tokenizer only.

    Raises:
        ValueError: there is no such encoder, or it has no text tower and one is needed.
    """
    config, folder = read_config(name, "towers", with_weights=with_weights)
    if isinstance(config, HIComConfig):
        if is_conditional and not config.is_conditional:
            raise ValueError(f"no instruction steers the model in {name}, so it has no text tower to take")
        processor = HIComProcessor.from_pretrained(folder)
        towers = Towers(
            vision_config=config.vision_config,
            instruction_config=config.instruction_config,
            tokenizer=processor.instruction_tokenizer,
            pixels={"image_mean": processor.image_mean, "image_std": processor.image_std},
            toy=config.toy,
        )
        if not with_weights:
            return towers
        model = HIComForConditionalGeneration.from_pretrained(folder, dtype=dtype or "auto").model
        return dataclasses.replace(towers, vision=model.release_vision_tower(), instruction=model.instruction_encoder)
    if type(config) in TOWERS:
        if is_conditional:
            raise ValueError(
                f"{name} is a {config.model_type} without a text encoder, and an instruction has to be embedded in the "
                f"space of its patches; give the whole dual encoder, or do without instructions: {_options()}"
            )
        towers = Towers(vision_config=config, instruction_config=None, tokenizer=None, pixels=read_pixels(folder))
        if not with_weights:
            return towers
        return dataclasses.replace(towers, vision=load(TOWERS[type(config)], folder, dtype, config=config))
    pairs: dict[type, type[PreTrainedModel]] = {each.config_class: each for each in DUAL_ENCODERS}
    if type(config) not in pairs:
        raise ValueError(f"{name} is a {config.model_type} model; vision towers come from SigLIP, SigLIP2 and CLIP")
    if isinstance(config, CLIPConfig):
        # Inside a CLIP pair the projection belongs to neither half.
        config.vision_config.projection_dim = config.text_config.projection_dim = config.projection_dim
    towers = Towers(
        vision_config=config.vision_config,
        instruction_config=config.text_config,
        tokenizer=read_tokenizer(folder, "text encoder") if is_conditional else None,
        pixels=read_pixels(folder),
    )
    if not with_weights:
        return towers
    pair = load(pairs[type(config)], folder, dtype, config=config)
    halves = clip_halves(pair) if isinstance(pair, CLIPModel) else (pair.vision_model, pair.text_model)
    return dataclasses.replace(towers, vision=halves[0], instruction=halves[1])


def _options() -> str:
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in NO_INSTRUCTION.items())


def clip_halves(pair: CLIPModel) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return the halves of a CLIP, each with its projection."""
    with torch.device("meta"):
        vision = CLIPVisionModelWithProjection._from_config(pair.vision_model.config)
        text = CLIPTextModelWithProjection._from_config(pair.text_model.config)
    vision.vision_model, vision.visual_projection = pair.vision_model, pair.visual_projection
    text.text_model, text.text_projection = pair.text_model, pair.text_projection
    return vision, text


def read_pixels(folder: Path) -> dict[str, Sequence[float]]:
    """Return `image_mean` and `image_std` of an image processor, where there is a file of one."""
    path = folder / "preprocessor_config.json"
    fields = read_json(path) if path.is_file() else {}
    return {key: fields[key] for key in ("image_mean", "image_std") if key in fields}


def read_tokenizer(folder: Path, what: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a folder, as it was saved.

    `AutoTokenizer` goes by the model's type: beside a Qwen2 it makes a tokenizer of Qwen's kind out of any file,
    without the file's own normaliser.

    Raises:
        ValueError: there is none, or a package is missing that it needs.
    """
    path = folder / "tokenizer_config.json"
    saved = read_json(path).get("tokenizer_class") if path.is_file() else None
    plain = saved in ("TokenizersBackend", "PreTrainedTokenizerFast")
    try:
        kind = PreTrainedTokenizerFast if plain else AutoTokenizer
        return kind.from_pretrained(folder, trust_remote_code=False, **kwargs)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:  # TypeError: sentencepiece 0.2.1
        reason = " ".join(str(error).split())
        raise ValueError(f"the tokenizer of the {what} in {folder} cannot be loaded: {reason}") from error


def check_weights(name: str | Path) -> None:
    """Raise ValueError where the weights of a model, which are downloaded first, are missing or are pickles."""
    if find_gguf(name) is None:
        try:
            weight_files(find_model(name))
        except ValueError as error:
            raise ValueError(f"the weights in {name} cannot be loaded as safetensors: {error}") from error


def load(kind: type[Any], name: str | Path, dtype: torch.dtype | None, **kwargs: Any) -> PreTrainedModel:
    """Load weights strictly: what is missing or of another shape is an error, and pickles are not opened.

    Raises:
        ValueError: there are no such weights, or they do not fit.
    """
    if "gguf_file" not in kwargs:
        kwargs["use_safetensors"] = True
    try:
        model, info = kind.from_pretrained(
            name, dtype=dtype or "auto", output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    except (OSError, ImportError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the weights in {name} cannot be loaded: {reason}") from error
    mismatched = [f"{key} {tuple(found)} (expected {tuple(wanted)})" for key, found, wanted in info["mismatched_keys"]]
    raise_on_problems(str(name), {"missing": sorted(info["missing_keys"]), "of another shape": sorted(mismatched)})
    return model


def find_gguf(name: str | Path) -> tuple[Path, str] | None:
    """Return folder and name of the GGUF file that `name` means; None where it means something else.

    Raises:
        ValueError: the package is not installed, or there is no one such file.
    """
    path = Path(name)
    if str(name).startswith(PACKAGE):
        package = str(name).removeprefix(PACKAGE)
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"{name}: there is no installed package {package!r}; pip install it first")
        path = Path(spec.submodule_search_locations[0])
    elif path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file")
        return path.parent, path.name
    elif not path.is_dir() or (path / "config.json").is_file():
        return None
    files = sorted(path.rglob("*.gguf"))
    if len(files) == 1:
        return files[0].parent, files[0].name
    if files or str(name).startswith(PACKAGE):
        found = ", ".join(file.name for file in files) or "none"
        raise ValueError(f"{name} must hold one GGUF file, found {found}; name the file itself")
    return None


def read_language_model(
    name: str | Path,
    dtype: torch.dtype | None = None,
    *,
    chat_template: str | None = None,
    with_weights: bool = True,
) -> LanguageModel:
    """Return a causal language model, or that of a HICom model, and its tokenizer with the media placeholders.

    Args:
        name: folder, hub id or embedded name, GGUF file, or `package:NAME`; see `assemble`.
        dtype: precision of the weights; None: the stored one.
        chat_template: `chatml` or a file, where the tokenizer has no template.
        with_weights: False: configuration and tokenizer only.

    Raises:
        ValueError: there is no such model, it is no plain language model, or it has no chat template.
    """
    gguf = find_gguf(name)
    kwargs = {} if gguf is None else {"gguf_file": gguf[1]}
    config, folder = read_config(
        name if gguf is None else gguf[0], "language model", with_weights=with_weights, **kwargs
    )
    if isinstance(config, HIComConfig):
        processor = HIComProcessor.from_pretrained(folder)
        tokens = {"video_token": processor.video_token, "image_token": processor.image_token}
        model = None
        if with_weights:
            donor = HIComForConditionalGeneration.from_pretrained(folder, dtype=dtype or "auto")
            model = language_model_of(donor)
        tokenizer = processor.tokenizer
        tokenizer.chat_template = tokenizer.chat_template or processor.chat_template
        return LanguageModel(config=config.text_config, tokenizer=tokenizer, model=model, toy=config.toy, **tokens)
    if not is_language_model(config):
        raise ValueError(f"{name} is a {config.model_type} model; a language model (text only, a decoder) is expected")
    empty_llm(config)  # refuses what cannot be HICom's
    tokenizer = read_tokenizer(folder, "language model", **kwargs)
    set_chat_template(tokenizer, chat_template, name)
    video, image = placeholder_tokens(tokenizer)
    language = LanguageModel(config=config, tokenizer=tokenizer, video_token=video, image_token=image)
    if not with_weights:
        config.vocab_size = max(config.vocab_size, len(tokenizer))
        return language
    model = load(AutoModelForCausalLM, folder, dtype, **kwargs)
    if len(tokenizer) > config.vocab_size:
        model.resize_token_embeddings(len(tokenizer))
    return dataclasses.replace(language, config=model.config, model=model)


def is_language_model(config: PreTrainedConfig) -> bool:
    """Whether a configuration is one of a causal language model, and of nothing around it."""
    try:
        return config.get_text_config() is config and type(config) in AutoModelForCausalLM._model_mapping
    except ValueError:  # several configurations inside it are one of text
        return False


def language_model_of(donor: HIComForConditionalGeneration) -> PreTrainedModel:
    """Return the language model of a HICom model as one of its own; weights are shared."""
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(donor.config.text_config)
    setattr(whole, str(decoder_name(whole)), donor.model.language_model)
    whole.set_output_embeddings(donor.lm_head)
    whole.generation_config = donor.generation_config
    return whole


def set_chat_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None, name: str | Path) -> None:
    """Give a tokenizer the chat template that it lacks, or another one.

    Raises:
        ValueError: it has none and none is given, or the file is missing.
    """
    if chat_template is None:
        if tokenizer.chat_template is None:
            raise ValueError(
                f"the tokenizer of {name} has no chat template, so turns have no form; give one with --chat-template "
                "(a Jinja file, or chatml for a base model that is going to be trained), or take the instruction-tuned "
                "variant of the model"
            )
    elif chat_template == "chatml":
        tokens = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "eos_token": "<|im_end|>"}
        tokenizer.add_special_tokens(tokens, replace_extra_special_tokens=False)
        tokenizer.chat_template = CHAT_TEMPLATE
    elif Path(chat_template).is_file():
        tokenizer.chat_template = Path(chat_template).read_text("utf-8")
    else:
        raise ValueError(f"chat_template={chat_template!r} is neither chatml nor a file")
