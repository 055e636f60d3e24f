"""Language model families behind HICom's compressor: `python benchmarks/families.py [KIND ...]`.

For every kind of model that `AutoModelForCausalLM` of the installed transformers knows, a tiny one with random weights
is made and put together with tiny towers, as `hicom convert assemble` does. Of those that are taken it is measured, on
the same weights, how far logits and loss of text are from the language model's own, whether greedy answers and beams to
prompts padded on the left are the same, whether an answer about a video is the same with and without the cache, and how
far logits move when the model is saved and loaded. Of the others it is said why they are refused.

Without names the results go to `docs/results/families.json` and `families.md`. Takes a few minutes on a CPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hicom.model.assemble import LanguageModel, Towers, is_language_model, make_config, put_together
from hicom.model.modeling import HIComForConditionalGeneration
from hicom.model.rehearsal import rehearse
from hicom.model.tail import empty_llm
from hicom.provenance import git_commit, hardware

ROOT = Path(__file__).parents[1]
VOCABULARY, VIDEO, IMAGE = 64, 4, 5
MOST_PARAMETERS = 8_000_000
SMALL: dict[str, Any] = {
    **{"hidden_size": 32, "n_embd": 32, "d_model": 32, "dim": 32},
    **{"intermediate_size": 48, "ffn_dim": 48, "n_inner": 48, "ffn_hidden_size": 48, "moe_intermediate_size": 16},
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 4),
    **{"num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCABULARY, "max_position_embeddings": 128},
    **{"n_positions": 128, "max_seq_len": 128, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1},
    **{"topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "shared_expert_intermediate_size": 16},
    **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    **{"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 2, "mamba_n_groups": 1},
}
"""Sizes of a tiny model, wherever a configuration has a field of that name."""
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
OTHER: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text", "olmo_hybrid"), HYBRID),
    "kimi_linear": {"num_hidden_layers": 4},
    "lfm3": {"num_hidden_layers": 4},
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_ssm": 64, "embedding_multiplier": 5.0, "lm_head_multiplier": 0.5},
    "gemma4_text": {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY},
    "gemma4_text, no per-layer embeddings": {"hidden_size_per_layer_input": 0},
    "gemma2": {"final_logit_softcapping": 1.0},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.2},
    "granitemoe": {"logits_scaling": 6.0, "embedding_multiplier": 12.0},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "logits_scaling": 6.0},
    "hyperclovax": {"logits_scaling": 0.5, "embedding_multiplier": 10.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": VOCABULARY},
    "minicpm3": {"dim_model_base": 8, "scale_emb": 12.0},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "gpt2, untied": {"tie_word_embeddings": False},
    "opt, untied": {"tie_word_embeddings": False},
}
"""What some kinds need instead; a key `kind, note` is one more variant of a kind."""


def tiny_config(name: str) -> PreTrainedConfig:
    """Return the configuration of a tiny model of a kind, or of one of its variants."""
    kind = name.partition(",")[0]
    default = AutoConfig.for_model(kind)
    aliases = getattr(default, "attribute_map", {}) or {}
    fields = {key: value for key, value in SMALL.items() if key in default.to_dict() and key not in aliases}
    if "qk_rope_head_dim" in fields:  # the size of a head is the sum of its parts, and keys belong to one head each
        fields.pop("head_dim", None)
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    config: PreTrainedConfig = AutoConfig.for_model(kind, **fields | OTHER.get(name, {}))
    return config


def enlarged(model: Any, seed: int = 0) -> Any:
    """Return a model whose random weights are large enough that all of them matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def towers() -> Towers:
    """Return a tiny SigLIP with random weights."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": 8, "projection_size": 32, "bos_token_id": 1}
    config = SiglipConfig(
        vision_config=sizes | {"image_size": 16, "patch_size": 4}, text_config=sizes | text | {"eos_token_id": 2}
    )
    pair = SiglipModel(config)
    return Towers(
        vision_config=config.vision_config,
        instruction_config=config.text_config,
        tokenizer=tokenizer(),
        vision=pair.vision_model,
        instruction=pair.text_model,
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "<video>", "<image>", *(f"w{i}" for i in range(6, VOCABULARY))]
    base = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=base, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")


def assembled(llm: Any) -> HIComForConditionalGeneration:
    """Return a HICom model with a language model; weights are shared.

    Raises:
        ValueError: it cannot be HICom's.
    """
    sizes = {"window": (2, 2, 2), "num_global_tokens": 3}
    words = tokenizer()
    language = LanguageModel(
        config=llm.config, tokenizer=words, video_token="<video>", image_token="<image>", model=llm
    )
    parts = towers()
    rehearse(make_config(parts, language, **sizes))
    return put_together(parts, language, dtype=torch.float32, num_frames=4, seed=0, **sizes)[0]


def distance(a: Tensor, b: Tensor) -> float:
    """Return the largest difference."""
    return float((a - b).detach().abs().max())


def measure(llm: Any, model: HIComForConditionalGeneration) -> dict[str, Any]:
    """Return how a HICom model compares with its language model; see the text at the top of the file."""
    ids = torch.tensor([[7, 9, 11, 8, 7, 20, 33], [40, 41, 3, 9, 9, 9, 12]])
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def same_answers(**options: Any) -> bool:
        answers = [x.generate(input_ids=ids, attention_mask=mask, **settings, **options) for x in (llm, model)]
        return torch.equal(*answers)

    with torch.no_grad():
        found: dict[str, Any] = {"logits": distance(llm(input_ids=ids).logits, model(input_ids=ids).logits)}
        found["last_logits"] = distance(
            llm(input_ids=ids, logits_to_keep=1).logits, model(input_ids=ids, logits_to_keep=1).logits
        )
    losses = []
    for each in (llm, model):
        each.train()
        torch.manual_seed(0)
        losses.append(each(input_ids=ids, attention_mask=mask, labels=ids, num_items_in_batch=torch.tensor(9)).loss)
        each.eval()
    losses[1].backward()
    found["loss"] = distance(*losses)
    found |= {"greedy": same_answers(), "beams": same_answers(num_beams=3)}
    return found | measure_video(model, settings)


def measure_video(model: HIComForConditionalGeneration, settings: dict[str, Any]) -> dict[str, Any]:
    """Return whether an answer about a video needs no cache to be the same, and what saving does to logits."""
    media = {
        "pixel_values_videos": torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
        "video_num_frames": torch.tensor([4]),
        "instruction_input_ids": torch.tensor([[7, 8, 9]]),
    }
    prompt = torch.tensor([[7, 9] + [VIDEO] * model.model.token_count(4) + [11, 8]])
    # An answer that holds a placeholder would be a video of its own.
    settings = settings | {"suppress_tokens": [VIDEO, IMAGE]}
    answer, text = model.generate(input_ids=prompt, **media, **settings), prompt
    with torch.no_grad():
        for _ in range(settings["max_new_tokens"]):
            logits = model(input_ids=text, **media, use_cache=False).logits[:, -1]
            logits[:, [VIDEO, IMAGE]] = -torch.inf
            text = torch.cat((text, logits.argmax(-1, keepdim=True)), 1)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            again = HIComForConditionalGeneration.from_pretrained(folder)
        moved = distance(again(input_ids=prompt, **media).logits, model(input_ids=prompt, **media).logits)
    return {"video": torch.equal(answer, text), "saved": moved}


def attempt(step: Callable[[], Any]) -> tuple[Any, str | None]:
    """Return what a step gives and None, or None and why it failed."""
    try:
        return step(), None
    except Exception as error:
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def family(name: str) -> dict[str, Any]:
    """Return what became of one kind: `taken` with its measures, or `refused`, or `not built`, and why."""
    whole, problem = attempt(lambda: AutoConfig.for_model(name.partition(",")[0]))
    if problem is None and not is_language_model(whole):
        return {"kind": name, "outcome": "refused", "reason": "it is more than a language model (text only, a decoder)"}
    config, problem = attempt(lambda: tiny_config(name))
    if problem is None:
        try:
            size = sum(parameter.numel() for parameter in empty_llm(config).parameters())
            problem = f"no tiny one was made: {size:,} parameters" if size > MOST_PARAMETERS else None
        except ValueError as error:
            return {"kind": name, "outcome": "refused", "reason": str(error)}
        except Exception as error:
            return {"kind": name, "outcome": "not built", "reason": f"{type(error).__name__}: {error}"[:300]}
    if problem is not None:
        return {"kind": name, "outcome": "not built", "reason": problem}
    torch.manual_seed(0)
    llm, problem = attempt(lambda: enlarged(AutoModelForCausalLM.from_config(config)))
    if problem is None:
        _, problem = attempt(lambda: llm(input_ids=torch.tensor([[7, 8, 9]])))
    if problem is not None:
        return {"kind": name, "outcome": "not built", "reason": problem}
    try:
        model = assembled(llm)
    except ValueError as error:
        return {"kind": name, "outcome": "refused", "reason": str(error)}
    facts, problem = attempt(lambda: measure(llm, model))
    row = {"kind": name, "class": type(llm).__name__, "outcome": "taken"}
    return row | (facts if problem is None else {"outcome": "failed", "reason": problem})


def is_exact(row: dict[str, Any]) -> bool:
    """Whether a kind that is taken is the language model itself in every measure."""
    is_near = all(row[name] <= 1e-5 for name in ("logits", "last_logits", "loss"))
    # Loaded tensors may lie otherwise in memory, and kernels then add in another order.
    return is_near and row["saved"] <= 1e-4 and row["greedy"] and row["beams"] and row["video"]


def page(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    rows = {outcome: [] for outcome in ("taken", "refused", "not built", "failed")}
    for row in results["families"]:
        rows[row["outcome"]].append(row)
    text = [
        "# Language models behind the compressor",
        "",
        f"{results['date']}, transformers {results['transformers']}, torch {results['torch']}, "
        f"{results['hardware']['cpus']} CPUs ({results['hardware']['machine']}): "
        f"tiny models with random weights in float32, made by `benchmarks/families.py`, which says what is measured. "
        f"{len(rows['taken'])} kinds are taken, {len(rows['refused'])} are refused, "
        f"{len(rows['not built']) + len(rows['failed'])} could not be tried.",
        "",
        "## Taken",
        "",
        "Largest differences to the language model's own class; answers are the same, greedy and with beams.",
        "",
        "| kind | class | logits | loss | saved and loaded | same answers |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows["taken"]:
        same = "yes" if row["greedy"] and row["beams"] and row["video"] else "no"
        numbers = " | ".join(f"{row[name]:.0e}" if row[name] else "0" for name in ("logits", "loss", "saved"))
        text.append(f"| {row['kind']} | {row['class']} | {numbers} | {same} |")
    for outcome, head in (("refused", "Refused"), ("not built", "Not tried"), ("failed", "Failed")):
        if rows[outcome]:
            text += ["", f"## {head}", "", "| kind | reason |", "|---|---|"]
            reasons = [
                (row["kind"], row["reason"].partition("language model: ")[2] or row["reason"]) for row in rows[outcome]
            ]
            text += [f"| {kind} | {reason.replace('|', '/')} |" for kind, reason in reasons]
    return "\n".join(text) + "\n"


def names() -> list[str]:
    """Return all kinds, and the variants in `OTHER`."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *OTHER})


def main() -> None:
    """Try families, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="default: all; then the results are written")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "families.json")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    found = []
    for kind in args.kinds or names():
        found.append(family(kind))
        print(json.dumps(found[-1]), flush=True)
    if args.kinds:
        return
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "hardware": hardware(),
        "commit": git_commit(),
        "families": found,
    }
    args.out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    args.out.with_suffix(".md").write_text(page(results), "utf-8")


if __name__ == "__main__":
    main()
