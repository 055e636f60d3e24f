"""The processor of a released checkpoint, and placeholders for language models that know none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .convert import OfficialCheckpoint
from .modeling import HIComForConditionalGeneration
from .processing import HIComProcessor
from .tower import TokenizerMissing


def placeholder_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return the texts of a tokenizer's placeholders of video and image.

    Qwen2.5's and Qwen3's tokenizers have both already; to others they are added.
    """
    vocabulary = tokenizer.get_vocab()
    if "<|video_pad|>" in vocabulary and "<|image_pad|>" in vocabulary:
        return "<|video_pad|>", "<|image_pad|>"
    tokenizer.add_tokens(["<video>", "<image>"], special_tokens=True)
    return "<video>", "<image>"


def add_placeholders(model: HIComForConditionalGeneration, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Give a model and its LLM's tokenizer placeholders of video and image; return their texts.

    The embedding grows where it must.
    """
    video, image = placeholder_tokens(tokenizer)
    if len(tokenizer) > model.config.text_config.vocab_size:
        model.resize_token_embeddings(len(tokenizer))
    model.config.video_token_id = int(tokenizer.convert_tokens_to_ids(video))
    model.config.image_token_id = int(tokenizer.convert_tokens_to_ids(image))
    return video, image


def official_processor(checkpoint: OfficialCheckpoint, model: HIComForConditionalGeneration) -> HIComProcessor:
    """Return the processor of a released checkpoint.

    The model's configuration is given the placeholders that the processor uses.

    Raises:
        TokenizerMissing: a tokenizer is not at hand; the message says where it was looked for.
    """
    tokenizer = _load_tokenizer(checkpoint.folder, f"{checkpoint.name}: the LLM's tokenizer")
    instruction_tokenizer = tokenizer
    if model.config.is_conditional:
        tower = checkpoint.tower
        what = f"{checkpoint.name}: the tokenizer of the vision tower {tower.name!r}, which reads instructions,"
        if tower.tokenizer_folder is None:
            raise TokenizerMissing(f"{what} is not at hand: {tower.search}")
        instruction_tokenizer = _load_tokenizer(tower.tokenizer_folder, what)
        known = int(model.config.instruction_config.vocab_size)
        if len(instruction_tokenizer) > known:
            raise ValueError(
                f"{what} has {len(instruction_tokenizer)} tokens, but the checkpoint's instruction encoder knows "
                f"{known}: {tower.tokenizer_folder} is of another tower"
            )
    video, image = add_placeholders(model, tokenizer)
    frames = checkpoint.fields.get("num_frames")
    # What the weights were trained on: whole frames through Pillow, short clips filled up.
    trained: dict[str, Any] = {"pixels": "exact", "short_videos": "repeat"}
    return HIComProcessor.from_config(
        model.config,
        tokenizer,
        instruction_tokenizer,
        video_token=video,
        image_token=image,
        image_aspect_ratio=checkpoint.aspect_ratio,
        **trained,
        **({"num_frames": frames} if frames else {}),
    )


def _load_tokenizer(folder: Path, what: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:  # TypeError: sentencepiece 0.2.1
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TokenizerMissing(f"{what} cannot be loaded from {folder} ({reason})") from error
