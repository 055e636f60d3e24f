"""Checkpoints of the official release: load them directly, or convert them to this library's layout.

The released layout keeps the LLM's fields flat in `config.json`, describes the compressor in one string
(`mm_projector_type`) and leaves the sizes of the vision tower to the model it names. `docs/checkpoints.md` explains it.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from ..files import check_new, writing_folder
from .config import OFFICIAL_MODEL_TYPES, HIComConfig
from .hub import find_local, find_model, read_json
from .modeling import HIComForConditionalGeneration
from .tower import TokenizerMissing, Tower, find_tower, tower_configs

# Fields of a released config.json that do not belong to the LLM.
_MULTIMODAL_KEYS = re.compile(
    r"^(mm_|use_guide$|use_clip_scale$|use_mm_proj$|image_|num_frames$|max_num_frames$|delay_load$|freeze_|tune_|unfreeze_|tokenizer_)"
)

# Parts of a released checkpoint, by the start of their tensors' names, and what they are called here.
_LANGUAGE_MODEL = {
    "model.embed_tokens.": "model.language_model.embed_tokens.",
    "model.layers.": "model.language_model.layers.",
    "model.norm.": "model.language_model.norm.",
}
_SIGLIP_PARTS = {
    "model.vision_tower.vision_tower.vision_model.": "model.vision_tower.",
    "model.vision_tower.guide_encoder.text_model.": "model.instruction_encoder.",
}
# CLIP towers keep one level more, because their projections stand beside them.
_CLIP_PARTS = {
    "model.vision_tower.vision_tower.": "model.vision_tower.",
    "model.vision_tower.guide_encoder.": "model.instruction_encoder.",
}
_PROJECTOR = "model.mm_projector."
_PROJECTOR_RENAMES: tuple[tuple[str, str], ...] = (
    (r"^model\.mm_projector\.local_(logit_scale|logit_bias)$", r"model.compressor.local.\1"),
    (r"^model\.mm_projector\.global_(logit_scale|logit_bias)$", r"model.compressor.global_.\1"),
    (r"^model\.mm_projector\.local_compressor\.", "model.compressor.local."),
    (r"^model\.mm_projector\.global_compressor\.", "model.compressor.global_."),
    (r"\.attn_layer\.", ".attention."),
    (r"\.guide_injector\.guide_alpha$", ".injector.gate.alpha"),
    (r"\.guide_injector\.guide_(norm|proj)\.", r".injector.gate.\1."),
    (r"\.guide_injector\.(coarse|fine)_norm\.", ".injector.norm."),
    (r"\.guide_injector\.coarse_proj\.", ".injector.film."),
    (r"\.guide_injector\.fine_proj\.", ".injector.attention."),
    (r"\.guide_injector\.text2qk_proj\.", ".injector.resize."),
    (r"\.q_alpha$", ".query_gate.alpha"),
    (r"\.k_alpha$", ".key_gate.alpha"),
    (r"\.v_alpha$", ".value_gate.alpha"),
    (r"(\.local)\.q_(norm|proj)\.", r"\1.query_gate.\2."),
    (r"(\.local)\.k_(norm|proj)\.", r"\1.key_gate.\2."),
    (r"(\.local)\.v_(norm|proj)\.", r"\1.value_gate.\2."),
)

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What safetensors calls the precisions of weights."""
# What a caller of `load_official` would take away from it.
_TAKEN = ("config", "key_mapping", "state_dict", "subfolder", "variant", "gguf_file")


@dataclass(frozen=True)
class Branch:
    """One branch of `mm_projector_type`: its numbers, its gates, and the injection that its text forces, if any."""

    size: str
    gates: str
    injection: str | None


def parse_projector_type(text: str) -> tuple[Branch | None, Branch | None]:
    """Parse the release's description of a compressor into its local and its global branch.

    The grammar is `local<T><S>[_adapt<letters of q,k,v,g>][_guide<kind>]` and `global<N>[_adaptg][_guide<kind>]`,
    joined by `_`; T is one digit, S one or two. What the release's own parser ignores is ignored here: in
    `local43_global32_coarse` the word `coarse` without `guide` before it changes nothing.

    Raises:
        ValueError: neither branch is described, or a branch lacks its numbers.
    """

    def branch(name: str, other: str, pattern: str) -> Branch | None:
        if name not in text:
            return None
        phase = text.rpartition(name)[2].partition(other)[0]
        size = re.match(pattern, phase)
        if size is None:
            raise ValueError(
                f"mm_projector_type={text!r}: {name!r} must be followed by its sizes, as in local43_global32"
            )
        gates = re.match(r"[qkvg]*", phase.rpartition("adapt")[2]) if "adapt" in phase else None
        guide = phase.rpartition("guide")[2].partition("_")[0] if "guide" in phase else None
        return Branch(size.group(), gates.group() if gates else "", guide)

    local, global_ = branch("local", "global", r"\d{2,3}"), branch("global", "local", r"\d+")
    if local is None and global_ is None:
        raise ValueError(
            f"mm_projector_type={text!r} describes no HICom compressor (local<T><S>, global<N>); only these load"
        )
    return local, global_


def compressor_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Return the compressor's fields of `HIComConfig` for a released config.

    Raises:
        ValueError: the projector or its injection is unknown.
    """
    local, global_ = parse_projector_type(config["mm_projector_type"])
    default = config.get("use_guide") or "off"

    def injection(branch: Branch | None) -> str:
        kind = default if branch is None or branch.injection is None else branch.injection
        if kind not in ("off", "direct", "coarse", "fine"):
            raise ValueError(f"use_guide={kind!r} is not one of off, direct, coarse, fine")
        return "none" if kind == "off" else kind

    scales = (config.get("use_clip_scale") or "").split(",")
    fields = {
        "dialect": "release",
        "window": None if local is None else (int(local.size[0]), int(local.size[1:]), int(local.size[1:])),
        "num_global_tokens": 0 if global_ is None else int(global_.size),
        "local_injection": injection(local),
        "global_injection": injection(global_),
        "local_gates": "" if local is None else local.gates,
        # The release's global branch knows one gate, and looks for its name anywhere in the text.
        "global_gates": "g" if global_ is not None and global_.gates.startswith("g") else "",
        "local_logit_scale": local is not None and "local" in scales,
        "global_logit_scale": global_ is not None and "global" in scales,
        "vision_feature_layer": config["mm_vision_select_layer"],
    }
    if global_ is not None and fields["global_injection"] == "direct":
        warnings.warn(
            f"mm_projector_type={config['mm_projector_type']!r} with use_guide={default!r} injects directly into the "
            f"global branch, which makes its {global_.size} tokens identical; kept, as the checkpoint computes so",
            stacklevel=2,
        )
    return fields


def is_official(folder: str | Path) -> bool:
    """Return whether a folder holds a checkpoint in the layout of the release."""
    path = Path(folder) / "config.json"
    return path.is_file() and read_json(path).get("model_type") in OFFICIAL_MODEL_TYPES


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint, sharded or not.

    Raises:
        ValueError: there are none, a shard is missing, or the weights are pickles, which are never opened.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise ValueError(f"{index}: weight_map is missing")
        files = [folder / name for name in sorted(set(shards.values()))]
    else:
        files = [folder / "model.safetensors"]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl"))
        if pickles:
            raise ValueError(
                f"{folder}: the weights are pickles ({', '.join(pickles)}), which can run code when opened; "
                "convert them to safetensors first (safetensors.torch.save_file)"
            )
        raise ValueError(f"{folder}: {', '.join(missing)} missing")
    return files


def read_tensors(folder: Path, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a checkpoint whose name begins with `prefix`."""
    for file in weight_files(folder):
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if name.startswith(prefix):
                    yield name, tensors.get_tensor(name)


class TensorHeader(NamedTuple):
    """What a safetensors file says of a tensor before its numbers.

    Attributes:
        shape: its sizes.
        dtype: as safetensors calls it: F32, F16, BF16, ...
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Bytes of its numbers."""
        bits = int(re.sub(r"^\D+|(?<=\d)\D.*$", "", self.dtype) or 8)  # BOOL has a byte, F8_E4M3 eight bits
        return prod(self.shape) * bits // 8


def stored_dtype(headers: Mapping[str, TensorHeader]) -> torch.dtype:
    """Return the precision that most of the numbers of a checkpoint are stored in."""
    sizes: Counter[str] = Counter()
    for header in headers.values():
        sizes[header.dtype] += prod(header.shape)
    return DTYPES.get(sizes.most_common(1)[0][0], torch.float32)


def tensor_headers(folder: Path) -> dict[str, TensorHeader]:
    """Return what the files of a checkpoint say of its tensors; the numbers are not read."""
    headers = {}
    for file in weight_files(folder):
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118
                part = tensors.get_slice(name)
                headers[name] = TensorHeader(tuple(part.get_shape()), str(part.get_dtype()))
    return headers


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a checkpoint, read from the headers alone."""
    return {name: header.shape for name, header in tensor_headers(folder).items()}


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open a safetensors file.

    Raises:
        ValueError: it is none.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise ValueError(f"{file}: not a valid safetensors file ({error})") from None


@dataclass(frozen=True)
class OfficialCheckpoint:
    """A checkpoint in the layout of the release: all that is known of it before its weights are read.

    Attributes:
        name: as it was asked for.
        folder: with its files.
        fields: its `config.json`.
        compressor: the fields of `HIComConfig` that say the same of its compressor.
        headers: what its files say of its tensors.
        tower: where the files of its dual encoder are.
    """

    name: str
    folder: Path
    fields: dict[str, Any]
    compressor: dict[str, Any]
    headers: dict[str, TensorHeader]
    tower: Tower

    @property
    def aspect_ratio(self) -> Literal["pad", "square"]:
        """How its frames become squares; the release squeezes them where its configuration says nothing."""
        return "pad" if self.fields.get("image_aspect_ratio") == "pad" else "square"

    def config(self) -> HIComConfig:
        """Return the configuration of the model.

        Raises:
            ValueError: the tower is not at hand, and its sizes cannot be inferred.
        """
        text = {key: value for key, value in self.fields.items() if not _MULTIMODAL_KEYS.match(key)}
        for key in ("model_type", "architectures", "transformers_version", "torch_dtype", "dtype"):
            text.pop(key, None)
        if text.get("rope_scaling") is None:
            text.pop("rope_scaling", None)  # the old name of a field that has a default
        shapes = {name: header.shape for name, header in self.headers.items()}
        vision_config, instruction_config = tower_configs(self.tower, shapes)
        if self.aspect_ratio != "pad" and vision_config.model_type == "clip_vision_model":
            raise ValueError(
                f"image_aspect_ratio={self.fields.get('image_aspect_ratio')!r} with a CLIP tower, which crops, is not "
                "supported, only 'pad'"
            )
        return HIComConfig(
            vision_config=vision_config,
            instruction_config=instruction_config,
            text_config=OFFICIAL_MODEL_TYPES[self.fields["model_type"]](**text),
            dtype=self.fields.get("torch_dtype"),
            **self.compressor,
        )

    def load(self, dtype: torch.dtype | None = None, **kwargs: Any) -> HIComForConditionalGeneration:
        """Return the model; see `load_official`."""
        taken = sorted(kwargs.keys() & set(_TAKEN))
        if taken:
            raise ValueError(f"{self.name}: a checkpoint of the official release says its own {', '.join(taken)}")
        config = self.config()
        is_clip = config.vision_config.model_type == "clip_vision_model"
        model = HIComForConditionalGeneration.from_pretrained(
            self.folder,
            config=config,
            key_mapping=key_mapping(self.headers, is_clip=is_clip),
            dtype=dtype or stored_dtype(self.headers),
            **kwargs,
        )
        # Or it would be saved under the names that it was loaded from.
        vars(model).pop("_weight_conversions", None)
        return model


def open_official(
    name: str | Path,
    *,
    vision_tower: str | Path | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> OfficialCheckpoint:
    """Open a checkpoint in the layout of the release; arguments as in `load_official`.

    Raises:
        ValueError: it is no such checkpoint, files are missing or broken, or it uses something that cannot be loaded.
    """
    folder = find_model(name, revision=revision, token=token, cache_dir=cache_dir)
    return describe_official(name, folder, None, vision_tower=vision_tower, token=token, cache_dir=cache_dir)


def describe_official(
    name: str | Path,
    folder: Path,
    headers: dict[str, TensorHeader] | None,
    *,
    vision_tower: str | Path | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
) -> OfficialCheckpoint:
    """Return the same of a folder that is there already, whose weights may be elsewhere.

    Args:
        name: that the folder was asked for by.
        folder: with at least the `config.json`.
        headers: of the weights; None: read from the folder.
        vision_tower: as in `load_official`, and so are `token` and `cache_dir`.
        token: for the hub.
        cache_dir: for downloads.

    Raises:
        ValueError: as `open_official`.
    """
    fields = read_json(folder / "config.json")
    if fields.get("model_type") not in OFFICIAL_MODEL_TYPES:
        raise ValueError(
            f"{name}: not in the layout of the official release: model_type {fields.get('model_type')!r} is not one of "
            f"{', '.join(OFFICIAL_MODEL_TYPES)}"
        )
    missing = [key for key in ("mm_vision_tower", "mm_projector_type", "mm_vision_select_layer") if key not in fields]
    if missing:
        raise ValueError(f"{folder / 'config.json'}: {', '.join(missing)} missing")
    if fields.get("mm_vision_select_feature", "patch") != "patch":
        raise ValueError(
            f"mm_vision_select_feature={fields['mm_vision_select_feature']!r} is not supported, only 'patch'"
        )
    aspect_ratio = fields.get("image_aspect_ratio")
    if aspect_ratio not in ("pad", "square", None):
        raise ValueError(
            f"image_aspect_ratio={aspect_ratio!r} (tiles of images) is not supported, only 'pad' and 'square'"
        )
    compressor = compressor_fields(fields)
    if headers is None:
        headers = tensor_headers(folder)
    tower = find_tower(
        fields["mm_vision_tower"],
        folder,
        vision_tower=vision_tower,
        is_downloaded=find_local(name) is None,
        token=token,
        cache_dir=cache_dir,
        with_tokenizer={compressor["local_injection"], compressor["global_injection"]} != {"none"},
    )
    return OfficialCheckpoint(str(name), folder, fields, compressor, headers, tower)


def key_mapping(names: Iterable[str], *, is_clip: bool) -> dict[str, str]:
    """Return this library's names of released tensors as `from_pretrained` of transformers takes them.

    Args:
        names: of all tensors of a checkpoint.
        is_clip: whether its towers are a CLIP's.

    Returns:
        Pattern of a name, or of its start, and what it becomes.
    """
    parts = _LANGUAGE_MODEL | (_CLIP_PARTS if is_clip else _SIGLIP_PARTS)
    mapping = {f"^{re.escape(start)}": target for start, target in parts.items()}
    for name in names:
        if name.startswith(_PROJECTOR):
            target = name
            for pattern, replacement in _PROJECTOR_RENAMES:
                target = re.sub(pattern, replacement, target)
            mapping[f"^{re.escape(name)}$"] = target
    return mapping


def load_official(
    path: str | Path,
    dtype: torch.dtype | None = None,
    *,
    vision_tower: str | Path | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    **kwargs: Any,
) -> HIComForConditionalGeneration:
    """Load a checkpoint in the layout of the official release (docs/checkpoints.md).

    Tensors are read one at a time, so that beside the model memory holds little; with `device_map` each goes to its
    device at once, and with `quantization_config` it is quantised as it comes.

    Args:
        path: a folder or a hub id. Sharded safetensors are fine; pickles are refused.
        dtype: precision to compute in; None keeps the stored one.
        vision_tower: folder or hub id of the dual encoder, in place of the one that the checkpoint names.
        revision: branch, tag or commit of a hub id.
        token: for private and gated models.
        cache_dir: folder for downloads; None: the hub's own cache.
        **kwargs: passed on to `from_pretrained` of transformers, for example `device_map` or `quantization_config`.

    Raises:
        ValueError: files are missing or broken, or tensors are missing, unexpected or of another shape (all are named).
    """
    checkpoint = open_official(path, vision_tower=vision_tower, revision=revision, token=token, cache_dir=cache_dir)
    return checkpoint.load(dtype, **kwargs)


def convert_official(
    source: str | Path,
    destination: str | Path,
    log: Callable[[str], None] = lambda _: None,
    *,
    vision_tower: str | Path | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """Convert a released checkpoint to a folder that `from_pretrained` and the Auto classes load.

    Weights keep their precision, and `generation_config.json` goes along. Tokenizers and the processor are written when
    the checkpoint (and, for the instruction, its tower) has them; otherwise a warning says what is missing.

    Args:
        source: folder or hub id in the layout of the release.
        destination: a new or empty folder.
        log: called with a line for every step.
        vision_tower: as in `load_official`, and so are the others.
        revision: branch, tag or commit of a hub id.
        token: for private and gated models.
        cache_dir: folder for downloads.

    Returns:
        The destination.

    Raises:
        ValueError: the destination is not empty, or the source cannot be loaded.
    """
    from .official import official_processor

    destination = Path(destination)
    check_new(destination)
    checkpoint = open_official(source, vision_tower=vision_tower, revision=revision, token=token, cache_dir=cache_dir)
    model = checkpoint.load()
    log(f"loaded {checkpoint.folder}")
    processor = None
    try:
        processor = official_processor(checkpoint, model)
    except TokenizerMissing as error:
        warnings.warn(f"no processor is made: {error}", stacklevel=2)
    with writing_folder(destination) as part:
        model.save_pretrained(part)
        if processor is not None:
            processor.save_pretrained(part)
    log(f"wrote the model to {destination}")
    if processor is not None:
        log("wrote tokenizers and processor")
    return destination
