"""What can be known of a checkpoint without its weights: sizes, memory, and whether every tensor fits the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

from .config import OFFICIAL_MODEL_TYPES, HIComConfig
from .convert import (
    DTYPES,
    TensorHeader,
    describe_official,
    key_mapping,
    stored_dtype,
    tensor_headers,
)
from .hub import HUB_ERRORS, SETTINGS_FILES, find_local, find_model, read_json
from .memory import empty_model
from .modeling import HIComForConditionalGeneration, TensorMismatch
from .tower import Tower

_UNREADABLE: tuple[type[Exception], ...] = (SafetensorsParsingError, *HUB_ERRORS)


@dataclass(frozen=True)
class Inspection:
    """A checkpoint, looked at without its weights.

    Attributes:
        name: as it was asked for.
        folder: with its `config.json`.
        is_official: whether it is in the layout of the release.
        config: of the model that it makes.
        model: the same, without memory for its weights.
        headers: what its files say of its tensors.
        num_frames: frames of a video unless a call says otherwise.
        tower: of a checkpoint in the layout of the release: where its dual encoder was found.
        problems: kind of problem -> tensors that have it; empty where all fit. None: quantised, which is not checked.
    """

    name: str
    folder: Path
    is_official: bool
    config: HIComConfig
    model: HIComForConditionalGeneration
    headers: dict[str, TensorHeader]
    num_frames: int
    tower: Tower | None
    problems: dict[str, list[str]] | None

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(header.num_bytes for header in self.headers.values())

    @property
    def dtype(self) -> torch.dtype:
        """Precision that most of the numbers are stored in."""
        return stored_dtype(self.headers)


def inspect_checkpoint(
    name: str | Path,
    *,
    vision_tower: str | Path | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Inspection:
    """Look at a checkpoint: of the hub, only configurations and the headers of the safetensors files are read.

    Args:
        name: folder, hub id, or name of an embedded model.
        vision_tower: dual encoder of a checkpoint of the official release, as in `load_official`.
        revision: branch, tag or commit of a hub id.
        token: for private and gated models.
        cache_dir: folder for downloads.

    Raises:
        ValueError: there is no such checkpoint, or it is none of HICom.
    """
    folder = find_model(name, revision=revision, token=token, cache_dir=cache_dir, files=SETTINGS_FILES)
    fields = read_json(folder / "config.json")
    if fields.get("model_type") not in (HIComConfig.model_type, *OFFICIAL_MODEL_TYPES):
        raise ValueError(f"{name}: not a HICom checkpoint (its model_type is {fields.get('model_type')!r})")
    headers = tensor_headers(folder) if find_local(name) is not None else hub_headers(str(name), revision, token)
    if fields["model_type"] in OFFICIAL_MODEL_TYPES:
        checkpoint = describe_official(
            name, folder, headers, vision_tower=vision_tower, token=token, cache_dir=cache_dir
        )
        config, tower = checkpoint.config(), checkpoint.tower
        mapping = key_mapping(headers, is_clip=config.vision_config.model_type == "clip_vision_model")
        num_frames = fields.get("num_frames")
    else:
        if vision_tower is not None:
            raise ValueError(f"vision_tower={str(vision_tower)!r}: {name} holds its tower itself; leave it out")
        config, tower, mapping = HIComConfig.from_pretrained(folder), None, {}
        processor = folder / "processor_config.json"
        num_frames = read_json(processor).get("num_frames") if processor.is_file() else None
    return Inspection(
        name=str(name),
        folder=folder,
        is_official=tower is not None,
        config=config,
        model=empty_model(config),
        headers=headers,
        num_frames=num_frames or 32,
        tower=tower,
        problems=misfits(config, headers, mapping),
    )


def hub_headers(name: str, revision: str | None, token: str | bool | None) -> dict[str, TensorHeader]:
    """Return what the files of a model on the hub say of its tensors, of which only the first bytes are read.

    Raises:
        ValueError: it has no safetensors files, or they cannot be read.
    """
    try:
        found = HfApi().get_safetensors_metadata(name, revision=revision, token=token)
    except NotASafetensorsRepoError as error:
        raise ValueError(
            f"{name} has no safetensors files; pickles can run code when opened, so they are never loaded"
        ) from error
    except _UNREADABLE as error:
        raise ValueError(f"{name}: the headers of its files cannot be read ({' '.join(str(error).split())})") from error
    return {
        tensor: TensorHeader(tuple(about.shape), str(about.dtype))
        for file in found.files_metadata.values()
        for tensor, about in file.tensors.items()
    }


def misfits(
    config: HIComConfig, headers: dict[str, TensorHeader], mapping: dict[str, str]
) -> dict[str, list[str]] | None:
    """Load a checkpoint without numbers, as `from_pretrained` loads one, and return the tensors that do not fit.

    Args:
        config: of the model.
        headers: of the checkpoint's tensors.
        mapping: `key_mapping` of a checkpoint in the layout of the release; else empty.

    Returns:
        Kind of problem -> names; None for a quantised checkpoint, whose tensors are not those of the model.
    """
    if getattr(config, "quantization_config", None) is not None:
        return None
    state = {
        name: torch.empty(header.shape, dtype=DTYPES.get(header.dtype, torch.float32), device="meta")
        for name, header in headers.items()
    }
    try:
        HIComForConditionalGeneration.from_pretrained(
            None, config=config, state_dict=state, key_mapping=mapping or None, device_map="meta"
        )
    except TensorMismatch as error:
        return error.problems
    return {}
