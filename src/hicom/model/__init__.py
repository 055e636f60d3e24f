"""The model: compressor, Hugging Face classes, processor, conversion of checkpoints."""


def register() -> None:
    """Register the HICom classes with the Auto classes of transformers. Calling it again does nothing new."""
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
        AutoTokenizer,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )

    from .auto import find_embedded
    from .config import HIComConfig
    from .modeling import HIComForConditionalGeneration, HIComModel
    from .processing import HIComProcessor

    AutoConfig.register("hicom", HIComConfig, exist_ok=True)
    AutoModel.register(HIComConfig, HIComModel, exist_ok=True)
    AutoModelForCausalLM.register(HIComConfig, HIComForConditionalGeneration, exist_ok=True)
    AutoModelForImageTextToText.register(HIComConfig, HIComForConditionalGeneration, exist_ok=True)
    AutoModelForMultimodalLM.register(HIComConfig, HIComForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(HIComConfig, HIComProcessor, exist_ok=True)
    # `transformers serve` looks a model's kind up by name, where the Auto classes do not put it.
    for names in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES):
        names.setdefault("hicom", HIComForConditionalGeneration.__name__)
    models = (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
    for auto in (AutoConfig, AutoProcessor, AutoTokenizer, *models):
        find_embedded(auto)
