"""A small language model with random weights, and what a tokenizer needs to chat about videos."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase, Qwen2Config

SPECIAL_TOKENS = ["<|im_start|>", "<|im_end|>", "<video>", "<image>"]
MAX_LENGTH = 4096
ROLES = ["system", "user", "assistant"]


def add_chat_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer what ChatML and the media placeholders need."""
    # A tokenizer of whole words may not know the names of the roles.
    tokenizer.add_tokens([role for role in ROLES if role not in tokenizer.get_vocab()])
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS, "eos_token": "<|im_end|>"})
    # The text tower's own limit is no limit of the language model's.
    tokenizer.model_max_length = MAX_LENGTH
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


def small_llm_config(
    tokenizer: PreTrainedTokenizerBase,
    *,
    hidden_size: int = 128,
    intermediate_size: int = 256,
    num_layers: int = 4,
    num_heads: int = 4,
    rope_theta: float = 1e4,
) -> Qwen2Config:
    """Return the configuration of a small Qwen2 for a tokenizer.

    Args:
        tokenizer: with its chat tokens (`add_chat_tokens`).
        hidden_size: width.
        intermediate_size: width inside the MLPs.
        num_layers: layers.
        num_heads: attention heads.
        rope_theta: base of the rotary position embedding.
    """
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        tie_word_embeddings=True,
        # Large models' 0.02 leaves attention flat at this width, and heads that look words up take ages to form.
        initializer_range=hidden_size**-0.5,
        bos_token_id=None,
        eos_token_id=int(tokenizer.convert_tokens_to_ids("<|im_end|>")),
        pad_token_id=int(tokenizer.pad_token_id),
    )
