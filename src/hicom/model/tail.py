"""From hidden states to logits and loss, the LLM's own way.

Many families scale, cap or crop what their output matrix gives (Granite, Cohere, Gemma 2, MiniCPM3 and others), and a
field's name does not say how: `logits_scaling` divides logits in Granite, multiplies them in HyperCLOVA X and divides
hidden states in MiniCPM3. So none of it is written down here again. The LLM's own class does it, around a decoder that
has already run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class Decoded:
    """What a decoder gave, in the place of its output and of the embeddings that it is asked for.

    Args:
        last_hidden_state: `float[B, sequence, C]`.
        router_logits: of LLMs with experts, where they are wanted.
    """

    def __init__(self, last_hidden_state: Tensor, router_logits: Any) -> None:
        self.last_hidden_state = last_hidden_state
        self.router_logits = router_logits

    @property
    def shape(self) -> torch.Size:
        """The shape that the embeddings had."""
        return self.last_hidden_state.shape

    def __getitem__(self, index: int) -> Tensor:
        """Return the hidden state, the first of a decoder's output."""
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        """Return None for all else that a class hands on: the caches, hidden states and attentions of its decoder."""
        if name.startswith("_"):
            raise AttributeError(name)


class Done(nn.Module):
    """Stands where the decoder stood, which has run already."""

    def forward(self, *args: Any, inputs_embeds: Decoded, **kwargs: Any) -> Decoded:
        """Return what the decoder gave."""
        return inputs_embeds


class Tail:
    """An LLM's own class without its decoder and without weights: what it makes of hidden states.

    No module of the model's, so that neither weights nor names come twice; the output matrix is handed in on every
    call.

    Args:
        config: of the LLM.

    Raises:
        ValueError: this kind of language model cannot be HICom's; the message says why.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self.whole = empty_llm(config)
        # The LLM's own configuration, not a copy: its vocabulary may grow.
        self.whole.config = self.config = config
        setattr(self.whole, str(decoder_name(self.whole)), Done())

    def __call__(
        self,
        output: BaseModelOutputWithPast,
        head: nn.Module,
        *,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        keep: slice | Tensor = slice(None),
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits, and the loss where there are labels, of some places.

        Args:
            output: of the decoder.
            head: output matrix.
            attention_mask: `int[B, sequence]` or None, for the loss of LLMs that balance experts.
            labels: `int[B, sequence]` or None.
            keep: which places.
            **kwargs: of the loss.
        """
        whole = self.whole
        if whole.lm_head is not head:  # adapters, quantisation and larger vocabularies put another one in place
            whole.lm_head = head
        whole.vocab_size = self.config.vocab_size
        assert output.last_hidden_state is not None
        decoded = Decoded(output.last_hidden_state[:, keep], getattr(output, "router_logits", None))
        if labels is not None:
            kwargs = {"attention_mask": attention_mask, "labels": labels[:, keep], **kwargs}
        answer: CausalLMOutputWithPast = whole(inputs_embeds=decoded, **kwargs)
        return answer


def empty_llm(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the language model of a configuration, without memory for its weights.

    Raises:
        ValueError: it is not made of a decoder that loads alone and a plain output matrix, and nothing else.
    """
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(f"{config.model_type} is no language model that AutoModelForCausalLM knows")
    with torch.device("meta"):
        whole: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    reason = why_not(whole)
    if reason is not None:
        raise ValueError(f"{config.model_type} cannot be HICom's language model: {reason}")
    return whole


def decoder_name(whole: PreTrainedModel) -> str | None:
    """Return under which name a language model holds the decoder that `AutoModel` loads alone; None without one."""
    known = AutoModel._model_mapping.get(type(whole.config), ())
    known = known if isinstance(known, tuple) else (known,)
    return next((name for name, module in whole.named_children() if type(module) in known), None)


def why_not(whole: PreTrainedModel) -> str | None:
    """Return why a language model cannot be HICom's, as far as its modules tell; None where they do not."""
    name, config = decoder_name(whole), whole.config
    if name is None:
        return "it holds no decoder that AutoModel loads alone"
    decoder, head = getattr(whole, name), getattr(whole, "lm_head", None)
    if type(head) is not nn.Linear or getattr(head, "bias", None) is not None:  # a class made of it may do more
        return "it does not end in a plain output matrix (a linear layer lm_head without bias)"
    embedding = decoder.get_input_embeddings()
    shape = (head.out_features, head.in_features)
    if shape != (config.vocab_size, getattr(config, "hidden_size", None)) or tuple(embedding.weight.shape) != shape:
        return f"its input embedding {tuple(embedding.weight.shape)} and its output matrix {shape} differ in size"
    if getattr(config, "tie_word_embeddings", False) and embedding is not getattr(decoder, "embed_tokens", None):
        return "its output matrix is its input embedding, and that is not called embed_tokens, as HICom expects it"
    if not whole._supports_default_dynamic_cache():
        return "it generates with a cache of its own kind"
    inside = {id(parameter) for part in (decoder, head) for parameter in part.parameters()}
    others = [name for name, parameter in whole.named_parameters() if id(parameter) not in inside]
    if others:
        return f"it has weights outside its decoder and its output matrix ({', '.join(others[:3])})"
    return None
