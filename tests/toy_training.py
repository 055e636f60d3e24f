"""Material for tests of data and training: short videos, records about them, and towers with random weights."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipModel

from hicom.train import DataConfig, Parts, StageConfig, TrainConfig
from media import write_video

TEXT = "which way does the cat dog star go ? is there a it moves left right up down yes no what happens"
ANSWERS = ["it moves left", "it moves right", "it moves up", "it moves down", "yes", "no"]
ALL = (
    (r"model\.compressor\..*(k_proj\.bias|logit_bias)", 0.0),
    (r"model\.compressor\..*", 1e-3),
    (r"model\.language_model\..*", 1e-3),
)


def make_towers(folder: Path) -> Path:
    """Save a SigLIP of width 16 with random weights and a tokenizer of whole words."""
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", *TEXT.split()])}
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": 12, "projection_size": 16}
    ids = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    SiglipModel(
        SiglipConfig(vision_config=tower | {"image_size": 32, "patch_size": 8}, text_config=tower | text | ids)
    ).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", model_input_names=["input_ids"]
    ).save_pretrained(folder)
    return folder


def ask(number: int) -> str:
    """Return a question; the same one for the same answer."""
    noun = ("cat", "dog", "star")[number % 3]
    return f"<video>\n{'is there a' if number % 2 else 'which way does the'} {noun} {'?' if number % 2 else 'go ?'}"


def make_records(folder: Path, num_videos: int = 8) -> Path:
    """Write videos and a JSONL file with one question about each."""
    lines = []
    for number in range(num_videos):
        write_video(folder / f"{number}.mp4", 4 + number % 3, width=32, height=32)
        conversation = [
            {"from": "human", "value": ask(number)},
            {"from": "gpt", "value": ANSWERS[number % len(ANSWERS)]},
        ]
        lines.append(json.dumps({"id": number, "video": f"{number}.mp4", "conversations": conversation}))
    path = folder / "records.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def make_folder(folder: Path) -> Path:
    """Fill `folder` with what `make_config` reads: towers, records and their videos."""
    make_towers(folder / "towers")
    make_records(folder)
    return folder


def make_config(folder: Path, **changes: object) -> TrainConfig:
    """Return a run of a few steps that trains compressor and language model from random towers in `folder`."""
    parts = Parts(
        towers=str(folder / "towers"),
        hidden_size=16,
        intermediate_size=32,
        num_layers=1,
        num_heads=2,
        window=(2, 2, 2),
        num_global_tokens=2,
        num_frames=4,
    )
    config = {
        "name": "toy",
        "out": str(folder / "run"),
        "parts": parts,
        "data": DataConfig(records=(str(folder / "records.jsonl"),), num_frames=4, cache=str(folder / "cache")),
        "stage": StageConfig(trainable=ALL),
        "steps": 6,
        "batch_size": 4,
        "save_every": 2,
        "log_every": 1,
    }
    return TrainConfig(**(config | changes))
