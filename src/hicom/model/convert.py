"""Checkpoints of the official release: load them directly, or convert them to this library's layout.

The released layout keeps the LLM's fields flat in `config.json`, describes the compressor in one string
(`mm_projector_type`) and leaves the sizes of the vision tower to the model it names. `docs/checkpoints.md` explains it.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    CLIPConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    SiglipConfig,
    SiglipTextConfig,
    SiglipVisionConfig,
)

from .config import HIComConfig
from .hub import find_model
from .modeling import HIComForConditionalGeneration

OFFICIAL_MODEL_TYPES: dict[str, type[PreTrainedConfig]] = {"hicom_qwen2": Qwen2Config, "hicom_llama": LlamaConfig}

# Fields of a released config.json that do not belong to the LLM.
_MULTIMODAL_KEYS = re.compile(
    r"^(mm_|use_guide$|use_clip_scale$|use_mm_proj$|image_|num_frames$|max_num_frames$|delay_load$|freeze_|tune_|unfreeze_|tokenizer_)"
)

_RENAMES: tuple[tuple[str, str], ...] = (
    (r"^model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
    (r"^model\.vision_tower\.vision_tower\.vision_model\.", "model.vision_tower."),
    (r"^model\.vision_tower\.guide_encoder\.text_model\.", "model.instruction_encoder."),
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
# CLIP towers keep one level more, because their projections stand beside them.
_CLIP_RENAMES: tuple[tuple[str, str], ...] = (
    (r"^model\.vision_tower\.vision_tower\.", "model.vision_tower."),
    (r"^model\.vision_tower\.guide_encoder\.", "model.instruction_encoder."),
)


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
        ValueError: the projector is unknown, or uses newline tokens or tiled images, which no released model does.
    """
    local, global_ = parse_projector_type(config["mm_projector_type"])
    if "anyres" in (config.get("image_aspect_ratio") or ""):
        raise ValueError(
            f"image_aspect_ratio={config['image_aspect_ratio']!r} (tiled images) is not supported, only 'pad'"
        )
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


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file is missing or is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent}: {path.name} is missing, so this is no model folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object is expected")
    return value


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
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    if name.startswith(prefix):
                        yield name, tensors.get_tensor(name)
        except Exception as error:
            if type(error).__name__ != "SafetensorError":
                raise
            raise ValueError(f"{file}: not a valid safetensors file ({error})") from None


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a checkpoint, read from the headers alone."""
    shapes = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                shapes.update({name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()})  # noqa: SIM118
        except Exception as error:
            if type(error).__name__ != "SafetensorError":
                raise
            raise ValueError(f"{file}: not a valid safetensors file ({error})") from None
    return shapes


def tower_configs(
    folder: Path, name: str, shapes: dict[str, tuple[int, ...]]
) -> tuple[PreTrainedConfig, PreTrainedConfig]:
    """Return the configurations of vision tower and instruction encoder that a released checkpoint names.

    They are looked for as a path, inside the checkpoint, beside it, then on the hub. When none of these has them, they
    are inferred from the shapes of the tensors, with a warning that says what was assumed.
    """
    places = [Path(name), folder / name, folder / Path(name).name, folder.parent / Path(name).name]
    for place in places:
        if (place / "config.json").is_file():
            config = AutoConfig.from_pretrained(place)
            break
    else:
        try:
            config = AutoConfig.from_pretrained(name)
        except (OSError, ValueError):
            return infer_siglip(name, shapes)
    if not isinstance(config, SiglipConfig | CLIPConfig):
        raise ValueError(f"mm_vision_tower={name!r} is a {config.model_type} model; SigLIP or CLIP is expected")
    if isinstance(config, CLIPConfig):
        # Inside a CLIP pair the projection belongs to neither half.
        config.vision_config.projection_dim = config.text_config.projection_dim = config.projection_dim
    return config.vision_config, config.text_config


def infer_siglip(name: str, shapes: dict[str, tuple[int, ...]]) -> tuple[SiglipVisionConfig, SiglipTextConfig]:
    """Infer a SigLIP pair from tensor shapes, as `tower_configs` does without the tower's own configuration.

    Raises:
        ValueError: the tensors are not those of a SigLIP tower.
    """
    vision, text = "model.vision_tower.vision_tower.vision_model.", "model.vision_tower.guide_encoder.text_model."

    def layers(prefix: str) -> int:
        found = {
            int(m.group(1)) for key in shapes if (m := re.match(re.escape(prefix) + r"encoder\.layers\.(\d+)\.", key))
        }
        return len(found)

    def heads(width: int) -> int:
        # so400m has heads of 72 channels, all other SigLIP sizes of 64.
        return width // 72 if width % 72 == 0 else width // 64

    patch = shapes.get(vision + "embeddings.patch_embedding.weight")
    positions = shapes.get(vision + "embeddings.position_embedding.weight")
    if patch is None or positions is None or len(patch) != 4 or positions[0] != round(positions[0] ** 0.5) ** 2:
        raise ValueError(
            f"mm_vision_tower={name!r} is not at hand and the checkpoint's tower is no SigLIP whose sizes could be "
            f"inferred; put the tower's folder (its config.json is enough) beside or inside the checkpoint"
        )
    width, patch_size, grid = patch[0], patch[2], round(positions[0] ** 0.5)
    # so400m/384 does not fill its image with patches: 27 * 14 = 378.
    image_size = 384 if (patch_size, grid) == (14, 27) else patch_size * grid
    vision_config = SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=shapes[vision + "encoder.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=layers(vision),
        num_attention_heads=heads(width),
        image_size=image_size,
        patch_size=patch_size,
    )
    assumed = f"image {image_size}, patch {patch_size}, {vision_config.num_attention_heads} vision heads"
    text_config = SiglipTextConfig(bos_token_id=None, eos_token_id=None)
    tokens = shapes.get(text + "embeddings.token_embedding.weight")
    if tokens is not None:
        text_config = SiglipTextConfig(
            vocab_size=tokens[0],
            hidden_size=tokens[1],
            intermediate_size=shapes[text + "encoder.layers.0.mlp.fc1.weight"][0],
            num_hidden_layers=layers(text),
            num_attention_heads=heads(tokens[1]),
            max_position_embeddings=shapes[text + "embeddings.position_embedding.weight"][0],
            projection_size=shapes[text + "head.weight"][0],
        )
        assumed += f", {text_config.num_attention_heads} text heads, text length {text_config.max_position_embeddings}"
    warnings.warn(
        f"the tower {name!r} is not at hand; its sizes were inferred from the checkpoint's tensors: {assumed}",
        stacklevel=3,
    )
    return vision_config, text_config


def official_config(folder: str | Path) -> HIComConfig:
    """Return the configuration of a checkpoint in the layout of the release.

    Raises:
        ValueError: the folder is no such checkpoint, or it uses something that cannot be loaded.
    """
    folder = Path(folder)
    official = read_json(folder / "config.json")
    model_type = official.get("model_type")
    if model_type not in OFFICIAL_MODEL_TYPES:
        raise ValueError(f"{folder}: model_type={model_type!r} is not one of {', '.join(OFFICIAL_MODEL_TYPES)}")
    missing = [key for key in ("mm_vision_tower", "mm_projector_type", "mm_vision_select_layer") if key not in official]
    if missing:
        raise ValueError(f"{folder / 'config.json'}: {', '.join(missing)} missing")
    if official.get("mm_vision_select_feature", "patch") != "patch":
        raise ValueError(
            f"mm_vision_select_feature={official['mm_vision_select_feature']!r} is not supported, only 'patch'"
        )
    text = {key: value for key, value in official.items() if not _MULTIMODAL_KEYS.match(key)}
    for key in ("model_type", "architectures", "transformers_version", "torch_dtype", "dtype"):
        text.pop(key, None)
    vision_config, instruction_config = tower_configs(folder, official["mm_vision_tower"], tensor_shapes(folder))
    return HIComConfig(
        vision_config=vision_config,
        instruction_config=instruction_config,
        text_config=OFFICIAL_MODEL_TYPES[model_type](**text),
        dtype=official.get("torch_dtype"),
        **compressor_fields(official),
    )


def rename(name: str, *, is_clip: bool) -> str:
    """Return this library's name of a released tensor."""
    for pattern, replacement in (*_RENAMES[:1], *_CLIP_RENAMES, *_RENAMES[3:]) if is_clip else _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def load_official(path: str | Path, dtype: torch.dtype | None = None) -> HIComForConditionalGeneration:
    """Load a checkpoint in the layout of the official release (docs/checkpoints.md).

    Args:
        path: a folder or a hub id. Sharded safetensors are fine; pickles are refused.
        dtype: precision to compute in; None keeps the stored one.

    Raises:
        ValueError: files are missing or broken, or tensors are missing, unexpected or of another shape (all are named).
    """
    folder = find_model(path)
    config = official_config(folder)
    is_clip = config.vision_config.model_type == "clip_vision_model"
    state = {rename(name, is_clip=is_clip): tensor for name, tensor in read_tensors(folder)}
    # What the release stores beside weights: constant buffers, the tower's own temperature, and, with direct injection
    # in the global branch, learnable tokens that the instruction replaces.
    unused = [name for name in state if name.endswith(("position_ids", "rotary_emb.inv_freq"))]
    unused.append("model.vision_tower.logit_scale")
    if config.global_injection == "direct":
        unused.append("model.compressor.global_.query")
    for name in unused:
        state.pop(name, None)
    return HIComForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype or next(iter(state.values())).dtype
    )


def convert_official(source: str | Path, destination: str | Path, log: Callable[[str], None] = lambda _: None) -> Path:
    """Convert a released checkpoint to a folder that `from_pretrained` and the Auto classes load.

    Model weights keep their precision. Tokenizers and the processor are written when the checkpoint (and, for the
    instruction, its tower) has them; otherwise a warning says what is missing.

    Args:
        source: folder or hub id in the layout of the release.
        destination: a new or empty folder.
        log: called with a line for every step.

    Returns:
        The destination.

    Raises:
        ValueError: the destination is not empty, or the source cannot be loaded.
    """
    from .processing import official_processor

    destination = Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination} exists and is not empty; choose another destination")
    folder = find_model(source)
    if not is_official(folder):
        raise ValueError(
            f"{folder}: not in the layout of the official release (model_type {', '.join(OFFICIAL_MODEL_TYPES)})"
        )
    model = load_official(folder)
    log(f"loaded {folder}")
    processor = official_processor(folder, model)
    destination.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(destination)
    log(f"wrote the model to {destination}")
    if processor is not None:
        processor.save_pretrained(destination)
        log("wrote tokenizers and processor")
    return destination
