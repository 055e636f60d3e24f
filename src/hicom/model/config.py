"""The configuration of a HICom model: two towers, an LLM and a compressor between them."""

import dataclasses
import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Siglip2VisionConfig,
    SiglipVisionConfig,
)

from .compressor import Dialect, Injection
from .dual_encoder import frame_size
from .hub import local_name
from .ops import check_window

# Parts that a configuration does not describe. SigLIP's own begin and end of text lie outside its vocabulary.
_DEFAULT_PARTS: dict[str, dict[str, Any]] = {
    "vision_config": {"model_type": "siglip_vision_model"},
    "instruction_config": {"model_type": "siglip_text_model", "bos_token_id": None, "eos_token_id": None},
    "text_config": {"model_type": "qwen2"},
}

OFFICIAL_MODEL_TYPES: dict[str, type[PreTrainedConfig]] = {"hicom_qwen2": Qwen2Config, "hicom_llama": LlamaConfig}
"""What checkpoints of the official release call themselves, and their language model."""

# What transformers itself passes to a configuration beside its declared fields.
_HUGGING_FACE_KEYS = {
    "_attn_implementation_internal",
    "_experts_implementation_internal",
    "_commit_hash",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "bos_token_id",  # these three are written by the Trainer of older transformers
    "eos_token_id",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "pad_token_id",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
}


@strict
class HIComConfig(PreTrainedConfig):
    """Configuration of `HIComModel` and `HIComForConditionalGeneration`.

    Args:
        vision_config: vision tower: SigLIP, SigLIP2 or CLIP.
        instruction_config: text tower of the same dual encoder, which embeds the instruction.
        text_config: the LLM; any decoder that `AutoModelForCausalLM` knows.
        compressor: `hicom`, the paper's, or the name of a baseline (`hicom.model.baselines.COMPRESSORS`).
        compressor_options: keyword arguments of a baseline.
        dialect: `paper` or `release` (`docs/paper_to_code.md`).
        window: (T, H, W) of the local branch in frames and patches; None leaves the branch out.
        num_global_tokens: tokens of the global branch; 0 leaves it out.
        local_injection: `direct`, `coarse`, `fine` or `none`.
        global_injection: likewise.
        local_gates: learnt gates of the local branch, a subset of "qkvg"; released checkpoints may have them.
        global_gates: learnt gates of the global branch, "" or "g".
        local_logit_scale: cosine similarity with a learnt temperature in the local branch.
        global_logit_scale: likewise in the global branch.
        match_evidence: tokens also carry how well anything matched.
        motion_features: patches also carry how their neighbourhood moves.
        num_pointers: further tokens that say where and when the instruction matches.
        num_word_pointers: how many of these look for one word of the instruction each.
        vision_feature_layer: hidden state of the vision tower that is compressed.
        image_token_id: placeholder of an image in the LLM's vocabulary.
        video_token_id: placeholder of a video.
        tie_word_embeddings: whether the LLM's output matrix is its input embedding.
        toy: what a model that is only a toy was made for, in words that finish "this model is a toy made for ...". It
            stays with all that is trained further from it, and every answer carries it. "": no toy.

    Raises:
        ValueError: a key is unknown (the nearest known one is named) or a value is impossible.
    """

    model_type = "hicom"
    sub_configs = {  # noqa: RUF012
        "vision_config": AutoConfig,
        "instruction_config": AutoConfig,
        "text_config": AutoConfig,
    }

    # The names of remote code: none. Trainers that do not find the class in transformers itself ask for it.
    auto_map = MappingProxyType[str, str]({})

    # Dictionaries before `__post_init__`, configurations after it.
    vision_config: Any = None
    instruction_config: Any = None
    text_config: Any = None
    compressor: str = "hicom"
    compressor_options: dict[str, Any] | None = None
    dialect: Dialect = "paper"
    window: Any = (4, 3, 3)
    num_global_tokens: int = 32
    local_injection: Injection = "direct"
    global_injection: Injection = "coarse"
    local_gates: str = ""
    global_gates: str = ""
    local_logit_scale: bool = False
    global_logit_scale: bool = False
    match_evidence: bool = False
    motion_features: bool = False
    num_pointers: int = 0
    num_word_pointers: int = 0
    vision_feature_layer: int = -2
    image_token_id: int | None = None
    video_token_id: int | None = None
    tie_word_embeddings: bool = False
    toy: str = ""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load a configuration as `transformers` does; the name of an embedded model will do."""
        return super().from_pretrained(local_name(pretrained_model_name_or_path), **kwargs)

    def __post_init__(self, **kwargs: Any) -> None:
        """Check what the type annotations cannot."""
        known = {field.name for field in dataclasses.fields(self)}
        for key in kwargs:
            if key not in _HUGGING_FACE_KEYS and not key.startswith("_"):
                nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
                hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
                raise ValueError(f"unknown configuration key {key!r} of a HICom model{hint}")
        if self.window is not None:
            self.window = check_window(self.window)
        for name, default in _DEFAULT_PARTS.items():
            part = getattr(self, name)
            if not isinstance(part, PreTrainedConfig):
                fields = dict(part) if part else default
                setattr(self, name, AutoConfig.for_model(**fields))
        super().__post_init__(**kwargs)
        # The LLM's own setting wins: checkpoints of small LLMs say it there only.
        if getattr(self.text_config, "tie_word_embeddings", False):
            self.tie_word_embeddings = True
        if not isinstance(self.vision_config, SiglipVisionConfig | Siglip2VisionConfig | CLIPVisionConfig):
            raise ValueError(
                f"vision_config is a {type(self.vision_config).__name__}; vision towers are SigLIP, SigLIP2 and CLIP"
            )
        if self.is_conditional:
            self._check_pair()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a configuration of a dictionary, as `transformers` does.

        Raises:
            ValueError: as the constructor, or it is that of a checkpoint of the official release.
        """
        kind = config_dict.get("model_type", cls.model_type)
        if kind in OFFICIAL_MODEL_TYPES:
            raise ValueError(
                f"model_type={kind!r} is the layout of the official release: load it with VideoChat.from_pretrained or "
                "HIComForConditionalGeneration.from_official, or convert it: hicom convert SRC DST"
            )
        return super().from_dict(config_dict, **kwargs)

    def _check_pair(self) -> None:
        """Raise ValueError where patches and instruction are not in one space."""
        vision, text = self.vision_config, self.instruction_config
        kinds = [part.model_type.partition("_")[0] for part in (vision, text)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"the vision tower is a {kinds[0]} and the instruction encoder a {kinds[1]}; both have to be halves of "
                "one dual encoder"
            )
        if not getattr(vision, "vision_use_head", True):
            raise ValueError(
                "the vision tower has no attention-pool head (vision_use_head=False), so its patches have no way into "
                "the space of texts; take the original SigLIP, or do without instructions: local_injection='none', "
                "global_injection='none'"
            )
        width = vision.projection_dim if isinstance(vision, CLIPVisionConfig) else vision.hidden_size
        if width != self.instruction_dim:
            raise ValueError(
                f"patches have width {width} in the text space and instructions {self.instruction_dim}; both have to "
                "come from one dual encoder"
            )

    @property
    def toy_note(self) -> str:
        """What a user of a toy is told with every answer, whatever it is about; "" for other models."""
        return f"this model is a toy made for {self.toy}; its answers about anything else mean nothing" * bool(self.toy)

    @property
    def image_size(self) -> int:
        """Height and width of the frames that the vision tower takes, in pixels."""
        return frame_size(self.vision_config)

    @property
    def grid_size(self) -> int:
        """Height and width of the patch grid of one frame."""
        return self.image_size // int(self.vision_config.patch_size)

    @property
    def is_conditional(self) -> bool:
        """Whether an instruction steers the compressor."""
        local = self.window is not None and self.local_injection != "none"
        global_ = self.num_global_tokens > 0 and self.global_injection != "none"
        return self.compressor == "hicom" and (local or global_)

    @property
    def instruction_dim(self) -> int:
        """Width K of keys and instruction."""
        name = "projection_dim" if isinstance(self.vision_config, CLIPVisionConfig) else "projection_size"
        return int(getattr(self.instruction_config, name))

    @property
    def max_instruction_length(self) -> int:
        """Longest instruction that the text tower takes, in its own tokens."""
        return int(self.instruction_config.max_position_embeddings)

    @property
    def context_length(self) -> int | None:
        """Most tokens that the language model takes, prompt and answer together; None where it has no limit."""
        return context_length(self.text_config)


def context_length(config: PreTrainedConfig) -> int | None:
    """Return the most tokens that a language model takes; None for recurrent ones and others that name no limit.

    Rotary embeddings that are scaled take more than the model was first trained with: some configurations name the
    longer length, others the first one beside a factor. The longer reading counts, as in vLLM.

    Args:
        config: of the language model.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # Some models have rotary embeddings of their own for each kind of layer.
    kinds = [each for each in scaling.values() if isinstance(each, Mapping)] or [scaling]
    return max(limit, *(_scaled(limit, each) for each in kinds))


def _scaled(limit: int, scaling: Mapping[str, Any]) -> int:
    """Return the tokens that scaled rotary embeddings reach."""
    kind = scaling.get("rope_type", scaling.get("type"))
    factor = scaling.get("factor") or 1.0
    if kind in (None, "default", "llama3", "longrope", "su"):  # their limit is the scaled one already
        return limit
    first = scaling.get("original_max_position_embeddings") if kind == "yarn" else None
    return int((first or limit) * factor)
