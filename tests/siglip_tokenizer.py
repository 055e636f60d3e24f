"""A tiny SentencePiece tokenizer in the files that SigLIP is published with: `SiglipTokenizer` reads these alone."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path

import sentencepiece

TEXTS = (
    "what color is the circle",
    "which object moves to the left of the red square",
    "how many people walk through the door in the video",
    "describe the image in one word",
    "a dog runs after a blue ball while two cats look on",
    "does the train stop before the bridge or after it",
)
VOCABULARY = 60
MAX_LENGTH = 64


@cache
def model_proto() -> bytes:
    """Return a trained SentencePiece model: lower-case letters and the commonest pieces of `TEXTS`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 8),
        model_writer=model,
        vocab_size=VOCABULARY,
        model_type="unigram",
        # The ids of the published model: padding is the end token, unknown pieces come third.
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def save(folder: Path, max_length: int = MAX_LENGTH) -> Path:
    """Write the tokenizer's files into a folder as the published SigLIP has them, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model_proto())
    special = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    fields = {"do_lower_case": True, "model_max_length": max_length, "model_input_names": ["input_ids"]}
    settings = {"tokenizer_class": "SiglipTokenizer", **fields, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    return folder
