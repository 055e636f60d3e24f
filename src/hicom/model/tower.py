"""The dual encoder that a checkpoint of the official release names, but does not hold: its sizes and its tokenizer."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    CLIPConfig,
    PreTrainedConfig,
    SiglipConfig,
    SiglipTextConfig,
    SiglipVisionConfig,
)

from .hub import SETTINGS_FILES, HubUnreachable, find_local, find_model, read_json

# Who publishes the towers that the release's scripts name by a path on their author's disk.
_PUBLISHERS = {"siglip": "google", "clip": "openai"}
_TOKENIZER_FILES = ("spiece.model", "tokenizer.json", "tokenizer_config.json", "vocab.json")


class TokenizerMissing(ValueError):
    """A tokenizer without which a model cannot be asked is not at hand, or does not load."""


@dataclass(frozen=True)
class Tower:
    """Where the files of a dual encoder are.

    Attributes:
        name: as the checkpoint, or the caller, names it.
        config_folder: with its `config.json`; None: not at hand.
        tokenizer_folder: with its tokenizer; None: not at hand.
        tried: the places that were looked at, with what was wrong with them.
    """

    name: str
    config_folder: Path | None
    tokenizer_folder: Path | None
    tried: tuple[str, ...]

    @property
    def search(self) -> str:
        """What was tried, and what to do about it, for messages."""
        return (
            f"tried {'; '.join(self.tried) or 'nothing'}. Name the tower with vision_tower= (--vision-tower), a folder "
            "or a hub id such as google/siglip-so400m-patch14-384"
        )


def find_tower(
    name: str,
    folder: Path,
    *,
    vision_tower: str | Path | None = None,
    is_downloaded: bool = False,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    with_tokenizer: bool = True,
) -> Tower:
    """Return where a checkpoint's dual encoder is.

    The release's scripts write the path that the tower had on their machine. So the path is tried, then a folder of
    that name inside the checkpoint and beside it, then the hub: under the name, where it can be the id of a model, and
    under its publisher's (`playground/models/siglip-so400m-patch14-384` is `google/siglip-so400m-patch14-384`).

    Args:
        name: `mm_vision_tower` of the checkpoint.
        folder: the checkpoint's.
        vision_tower: folder or hub id that is taken in place of all these.
        is_downloaded: whether the checkpoint came from the hub: what lies beside it is then no concern of it.
        token: for the hub.
        cache_dir: for downloads.
        with_tokenizer: False where the tower's tokenizer is not needed, so that nothing is downloaded for it.

    Raises:
        ValueError: `vision_tower` is given and is no dual encoder's folder or hub id.
    """
    if vision_tower is not None:
        chosen = find_model(vision_tower, token=token, cache_dir=cache_dir, files=SETTINGS_FILES)
        if not (chosen / "config.json").is_file():
            raise ValueError(f"vision_tower={str(vision_tower)!r}: {chosen} has no config.json")
        return Tower(str(vision_tower), chosen, chosen if _has_tokenizer(chosen) else None, (str(vision_tower),))
    tried: list[str] = []
    config_folder = tokenizer_folder = None
    for place in _places(name, folder, is_downloaded, token, cache_dir, tried):
        if config_folder is None and (place / "config.json").is_file():
            config_folder = place
        if tokenizer_folder is None and _has_tokenizer(place):
            tokenizer_folder = place
        if config_folder is not None and (tokenizer_folder is not None or not with_tokenizer):
            break
    return Tower(name, config_folder, tokenizer_folder, tuple(tried))


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / file).is_file() for file in _TOKENIZER_FILES)


def _places(
    name: str,
    folder: Path,
    is_downloaded: bool,
    token: str | bool | None,
    cache_dir: str | Path | None,
    tried: list[str],
) -> Iterator[Path]:
    """Yield the folders that may hold the tower, nearest first; the hub is asked only when they are not enough."""
    base = Path(name).name
    near = [Path(name), folder / name, folder / base, *([] if is_downloaded else [folder.parent / base])]
    for place in dict.fromkeys(near):
        if not place.is_dir():
            tried.append(f"{place} (no such folder)")
            continue
        lacks = [] if (place / "config.json").is_file() else ["config.json"]
        lacks += [] if _has_tokenizer(place) else ["tokenizer"]
        tried.append(f"{place}" + (f" (without {' and '.join(lacks)})" if lacks else ""))
        yield place
    for name_on_hub in hub_ids(name):
        try:
            place = find_model(name_on_hub, token=token, cache_dir=cache_dir, files=SETTINGS_FILES)
        except HubUnreachable as error:
            tried.append(f"the hub ({error})")
            return  # it would not answer for the next name either
        except ValueError as error:
            tried.append(f"the hub ({error})")
            continue
        tried.append(f"{name_on_hub} on the hub")
        yield place


def hub_ids(name: str) -> list[str]:
    """Return the ids that a tower may have on the hub, as written first; a path of a disk is none."""
    base = name.replace("\\", "/").rstrip("/").rpartition("/")[2]
    kind = re.match(r"siglip|clip", base.lower())
    published = [f"{_PUBLISHERS[kind.group()]}/{base}"] if kind else []
    try:
        written = [name] if find_local(name) is None else []
    except ValueError:
        written = []
    return list(dict.fromkeys([*written, *published]))


def tower_configs(tower: Tower, shapes: dict[str, tuple[int, ...]]) -> tuple[PreTrainedConfig, PreTrainedConfig]:
    """Return the configurations of the vision tower and the instruction encoder of a released checkpoint.

    Where the tower is not at hand they are inferred from the shapes of the checkpoint's tensors, with a warning that
    says what was assumed.

    Raises:
        ValueError: the tower is no SigLIP or CLIP, or nothing can be inferred.
    """
    if tower.config_folder is None:
        return infer_siglip(tower, shapes)
    fields = read_json(tower.config_folder / "config.json")
    kinds: dict[Any, type[SiglipConfig | CLIPConfig]] = {"siglip": SiglipConfig, "clip": CLIPConfig}
    kind = fields.get("model_type")
    if kind not in kinds:
        raise ValueError(
            f"the vision tower {tower.name!r} ({tower.config_folder}) is a {kind} model; SigLIP or CLIP is expected"
        )
    config = kinds[kind].from_dict(fields)
    if isinstance(config, CLIPConfig):
        # Inside a CLIP pair the projection belongs to neither half.
        config.vision_config.projection_dim = config.text_config.projection_dim = config.projection_dim
    return config.vision_config, config.text_config


def infer_siglip(tower: Tower, shapes: dict[str, tuple[int, ...]]) -> tuple[SiglipVisionConfig, SiglipTextConfig]:
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
            f"the vision tower {tower.name!r} is not at hand and the checkpoint's is no SigLIP whose sizes could be "
            f"inferred: {tower.search}"
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
        f"the vision tower {tower.name!r} is not at hand; its sizes were inferred from the checkpoint's tensors: "
        f"{assumed} ({tower.search})",
        stacklevel=4,
    )
    return vision_config, text_config
