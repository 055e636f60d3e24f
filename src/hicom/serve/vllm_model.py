"""HICom inside vLLM: its scheduler, caches and LLM around this library's towers and compressor.

Visual tokens depend on the instruction, which vLLM knows nothing of. It is taken from the prompt and made an argument
of the processor before anything is hashed: that one hash is the key of vLLM's processor cache, of its cache of encoder
outputs and of its KV prefix cache, so two questions about one video never share tokens, and a repeated one reuses all.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BatchFeature
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import MultiModalEmbeddings, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems, VideoProcessorItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    InputProcessingContext,
    ProcessorInputs,
    PromptReplacement,
    PromptUpdate,
    TimingContext,
)
from vllm.sequence import IntermediateTensors

from ..model.config import HIComConfig
from ..model.instruction import MAX_INSTRUCTION, check_instruction, extract_instruction
from ..model.modeling import VisionFeatures, VisualParts
from ..model.ops import Window
from ..model.processing import HIComProcessor
from .vllm_plugin import feature_bytes, trusts_media_ids

OPTIONS = {"instruction", "window", "max_visual_tokens", "max_frames"}
FEATURE_BYTES = feature_bytes()
MODALITIES = ("video", "image")
FIELDS = ("pixels", "instruction", "mask", "options", "key")
"""Of each medium, as the model gets it; options are the window, zeros for the model's own, and whether mask counts."""


@cache
def load_processor(model: str) -> HIComProcessor:
    """Return the processor of a checkpoint."""
    return HIComProcessor.from_pretrained(model)


class HIComProcessingInfo(BaseProcessingInfo):
    """What vLLM asks about a checkpoint."""

    def __init__(self, ctx: InputProcessingContext) -> None:
        super().__init__(ctx)
        # Parts of a message keep their order, as in the library; else vLLM puts media first, one kind after the other.
        ctx.model_config.get_multimodal_config().interleave_mm_strings = True

    @property
    def processor(self) -> HIComProcessor:
        """The checkpoint's processor."""
        return load_processor(self.ctx.model_config.model)

    @property
    def max_frames(self) -> int:
        """Most frames of a video: `max_frames` of `--mm-processor-kwargs`, else what the model was trained on."""
        merged = self.ctx.get_merged_mm_kwargs({})
        return int(merged.get("max_frames") or self.processor.num_frames)

    def get_hf_config(self) -> HIComConfig:
        """Return the checkpoint's configuration."""
        return self.ctx.get_hf_config(HIComConfig)

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        """Return nothing: all arguments are for videos and images alike."""
        return {}

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Return that any number of videos and images may stand in a prompt."""
        return dict.fromkeys(MODALITIES)

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Return the visual tokens of the longest video, and of an image."""
        return {"video": self.processor.token_count(self.max_frames), "image": self.processor.token_count(1)}


class HIComDummyInputsBuilder(BaseDummyInputsBuilder[HIComProcessingInfo]):
    """What vLLM measures its memory with."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """Return a prompt with as many placeholders."""
        processor = self.info.processor
        return processor.image_token * mm_counts.get("image", 0) + processor.video_token * mm_counts.get("video", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the longest videos, and images."""
        size = self.info.processor.image_size
        videos = {"width": size, "height": size, "num_frames": self.info.max_frames}
        return {
            "video": self._get_dummy_videos(
                num_videos=mm_counts.get("video", 0), overrides=mm_options.get("video"), **videos
            ),
            "image": self._get_dummy_images(
                num_images=mm_counts.get("image", 0), width=size, height=size, overrides=mm_options.get("image")
            ),
        }


class HIComMultiModalProcessor(BaseMultiModalProcessor[HIComProcessingInfo]):
    """Frames to pixels, instructions to tokens, placeholders to their number."""

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> ProcessorInputs:
        """Return what vLLM measures its memory with: a prompt that asks nothing, under a stated instruction."""
        return replace(super().get_dummy_inputs(*args, **kwargs), hf_processor_mm_kwargs={"instruction": "describe"})

    def recover_instruction(self, prompt: Sequence[int]) -> str:
        """Return what steers the compressor: the last user turn of a prompt, as in training."""
        processor = self.info.processor
        media = {processor.video_token_id, processor.image_token_id}
        text = self.info.get_tokenizer().decode([token for token in prompt if token not in media])
        return extract_instruction(processor._last_user_turn(text))[:MAX_INSTRUCTION]

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> Any:
        """Make the instruction an argument before anything is hashed."""
        if inputs.mm_data_items:
            kwargs = dict(inputs.hf_processor_mm_kwargs)
            unknown = sorted(kwargs.keys() - OPTIONS)
            if unknown:
                raise ValueError(f"mm_processor_kwargs may hold {', '.join(sorted(OPTIONS))}, not {unknown[0]!r}")
            instruction = kwargs.pop("instruction", None)
            if self.info.processor.is_conditional:  # else questions share visual tokens
                if instruction is None:
                    instruction = self.recover_instruction(inputs.prompt)
                elif isinstance(instruction, str) and instruction.strip():
                    check_instruction(instruction)
                if not isinstance(instruction, str) or not instruction.strip():
                    raise ValueError("the instruction must be text; leave it out to use the last question")
                kwargs["instruction"] = instruction
            self._check_frames(inputs.mm_data_items)
            inputs = replace(inputs, hf_processor_mm_kwargs=kwargs)
            if not trusts_media_ids():
                inputs = replace(inputs, mm_uuid_items=None)
                if any(item is None for items in inputs.mm_data_items.values() for item in items.get_all()):
                    raise ValueError("a uuid cannot stand for a video or picture here: send the medium itself")
        return super().apply(inputs, timing_ctx)

    def _check_frames(self, items: MultiModalDataItems) -> None:
        """Refuse videos with more frames than memory was measured for."""
        if "video" in items:
            videos = items.get_items("video", VideoProcessorItems)
            for number in range(len(videos)):
                if videos.get(number) is not None and videos.get_num_frames(number) > self.info.max_frames:
                    raise ValueError(
                        f"a video has {videos.get_num_frames(number)} frames; at most {self.info.max_frames} are taken "
                        "(max_frames of --mm-processor-kwargs, num_frames of --media-io-kwargs)"
                    )

    def _window(self, kwargs: Mapping[str, object], num_frames: int) -> Window | None:
        """Return the window that a request chooses."""
        window, budget = kwargs.get("window"), kwargs.get("max_visual_tokens")
        if window is not None and budget is not None:
            raise ValueError("window and max_visual_tokens both choose the window; pass one of them")
        if budget is not None:
            return self.info.processor.choose_window(num_frames, int(str(budget)))
        if window is None:
            return None
        first, second, third = (int(size) for size in window)  # type: ignore[attr-defined]
        return first, second, third

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        processor = self.info.processor
        ids: Tensor = torch.zeros(1, 1, dtype=torch.long)
        mask: Tensor | None = None
        if processor.is_conditional:
            ids, mask = processor.instruction_inputs([hf_kwargs["instruction"]])
        output: dict[str, Any] = {}
        for modality in MODALITIES:
            sources = hf_data.get(f"{modality}s") or []
            for source in sources:
                frames = _frames(source)
                window = self._window(hf_kwargs, len(frames)) or (0, 0, 0)
                # Features of frames depend on nothing that is asked, so the model finds them by the frames alone.
                key = hashlib.blake2b(frames.tobytes(), digest_size=16).digest()
                fields = (
                    processor.pixel_values(frames),
                    ids[0],
                    ids[0] if mask is None else mask[0],
                    torch.tensor([*window, mask is not None]),
                    torch.tensor(list(key), dtype=torch.uint8),
                )
                for name, value in zip(FIELDS, fields, strict=True):
                    output.setdefault(f"{modality}_{name}", []).append(value)
        return BatchFeature(self.info.ctx._postprocess_output(output))

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {
            f"{modality}_{name}": MultiModalFieldConfig.batched(modality, keep_on_cpu=name in ("key", "options"))
            for modality in MODALITIES
            for name in FIELDS
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        processor = self.info.processor

        def replacement(modality: str, token: int) -> PromptReplacement:
            def tokens(number: int) -> list[int]:
                frames = 1
                if modality == "video":
                    frames = mm_items.get_items("video", VideoProcessorItems).get_num_frames(number)
                window = self._window(hf_processor_mm_kwargs, frames)
                return [token] * processor.token_count(frames, window)

            return PromptReplacement(modality=modality, target=[token], replacement=tokens)

        places = {"video": processor.video_token_id, "image": processor.image_token_id}
        return [replacement(name, token) for name, token in places.items() if name in mm_items and token is not None]


def _frames(source: Any) -> np.ndarray:
    """Return `uint8[T, H, W, 3]` of a video or an image as vLLM hands it over."""
    if isinstance(source, tuple):  # with metadata
        source = source[0]
    frames = np.stack([np.asarray(each) for each in source]) if isinstance(source, list) else np.asarray(source)
    return frames[None] if frames.ndim == 3 else frames


class Visual(VisualParts, nn.Module):
    """The library's towers and compressor.

    Args:
        config: of the checkpoint.
    """

    def __init__(self, config: HIComConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.build_visual(config)


@MULTIMODAL_REGISTRY.register_processor(
    HIComMultiModalProcessor, info=HIComProcessingInfo, dummy_inputs=HIComDummyInputsBuilder
)
class HIComForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsPP):
    """The model, with vLLM's own implementation of the LLM.

    Args:
        vllm_config: of the engine.
        prefix: of parameter names.
    """

    # For type checkers that do not see vLLM.
    language_model: Any
    _mark_tower_model: Any
    _mark_language_model: Any
    # A folder may hold other tensors too (`domain.safetensors`).
    allow_patterns_overrides = ("model*.safetensors",)
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "model.vision_tower.": "visual.vision_tower.",
            "model.instruction_encoder.": "visual.instruction_encoder.",
            "model.compressor.": "visual.compressor.",
            "model.language_model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
        }
    )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """Return the placeholder of a medium in prompts without a chat template."""
        if modality not in MODALITIES:
            raise ValueError(f"videos and images are taken, not {modality}")
        return f"<{modality}>"

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: HIComConfig = vllm_config.model_config.hf_config
        self.config = config
        self._features: OrderedDict[bytes, VisionFeatures] = OrderedDict()
        self.num_encoded = 0  # videos and images that went through the vision tower
        with self._mark_tower_model(vllm_config, set(MODALITIES)):
            self.visual = Visual(config).to(vllm_config.model_config.dtype)
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=config.text_config,
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.text_config.model_type]],
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(self, **kwargs: object) -> MultiModalEmbeddings:
        """Return the visual tokens `float[N, C]` of each medium."""
        found: list[Tensor] = []
        for modality in MODALITIES:
            if kwargs.get(f"{modality}_pixels") is not None:
                fields: list[Any] = [kwargs[f"{modality}_{name}"] for name in FIELDS]
                found += [self._embed(*each) for each in zip(*fields, strict=True)]
        return tuple(found)

    def _embed(self, pixels: Tensor, instruction: Tensor, mask: Tensor, options: Tensor, key: Tensor) -> Tensor:
        features = self._encoded(bytes(key.tolist()), pixels)
        *sizes, has_mask = (int(each) for each in options)
        is_conditional = self.config.is_conditional
        output = self.visual.compress(
            features,
            [len(features.values)],
            instruction[None] if is_conditional else None,
            mask[None] if is_conditional and has_mask else None,
            window=(sizes[0], sizes[1], sizes[2]) if any(sizes) else None,
        )
        tokens: Tensor = output.tokens[0]
        return tokens

    def _encoded(self, key: bytes, pixels: Tensor) -> VisionFeatures:
        """Return the features of a video, kept from an earlier question where they are."""
        features = self._features.pop(key, None)
        if features is None:
            features = self.visual.add_motion(self.visual.encode_frames(pixels), [len(pixels)])
            self.num_encoded += 1
        self._features[key] = features
        while len(self._features) > 1 and sum(map(_num_bytes, self._features.values())) > FEATURE_BYTES:
            self._features.popitem(last=False)
        return features

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor | IntermediateTensors:
        """Return hidden states of the LLM."""
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return logits of the LLM."""
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint of this library; every tensor must have its place."""
        if self.config.tie_word_embeddings:  # a copy of the input embedding, in some files
            weights = ((name, tensor) for name, tensor in weights if not name.startswith("lm_head."))
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)


def _num_bytes(features: VisionFeatures) -> int:
    return sum(x.numel() * x.element_size() for x in (features.values, features.keys) if x is not None)
