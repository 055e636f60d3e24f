"""A tiny checkpoint as the release's scripts leave one, and its tower as its publisher has it.

It has shards, a tower named by a path of another machine, and a way to generate of its own.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

import siglip_tokenizer
import tiny

GOLDEN = Path(__file__).parent / "golden"
REPO = "lntzm/HICom_7B_qwen25_directg_local43_global32"
TOWER = "siglip-so400m-patch14-384"
SCRIPT_TOWER = f"playground/models/{TOWER}"
GENERATION = {
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
    "repetition_penalty": 1.05,
    "eos_token_id": [tiny.SPECIAL.index("<|im_end|>"), tiny.SPECIAL.index("<pad>")],
    "pad_token_id": 0,
}


def save(folder: Path, *, num_shards: int = 4, case: str = "direct_coarse", **fields: Any) -> Path:
    """Write such a checkpoint; `fields` go into its `config.json`."""
    folder.mkdir(parents=True)
    config = json.loads((GOLDEN / case / "config.json").read_text())
    config |= {"mm_vision_tower": SCRIPT_TOWER, "image_aspect_ratio": "pad", "num_frames": 8} | fields
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    tensors = load_file(GOLDEN / case / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number in range(num_shards):
        file = f"model-{number + 1:05}-of-{num_shards:05}.safetensors"
        part = {name: tensors[name] for name in names[number::num_shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    tiny.tokenizer().save_pretrained(folder)
    return folder


def save_tower(folder: Path, case: str = "direct_coarse") -> Path:
    """Write the tower's configuration and SentencePiece tokenizer, as `google/siglip-so400m-patch14-384` has them."""
    siglip_tokenizer.save(folder, max_length=16)
    shutil.copyfile(GOLDEN / case / TOWER / "config.json", folder / "config.json")
    return folder
