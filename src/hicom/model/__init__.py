"""The model: compressor, Hugging Face classes, processor, conversion of checkpoints."""


def register() -> None:
    """Register the HICom classes with the Auto classes of transformers. Calling it again does nothing new."""
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
        AutoTokenizer,
    )

    from .auto import find_embedded
    from .config import HIComConfig
    from .modeling import HIComForConditionalGeneration, HIComModel
    from .processing import HIComProcessor

    AutoConfig.register("hicom", HIComConfig, exist_ok=True)
    AutoModel.register(HIComConfig, HIComModel, exist_ok=True)
    AutoModelForImageTextToText.register(HIComConfig, HIComForConditionalGeneration, exist_ok=True)
    AutoModelForMultimodalLM.register(HIComConfig, HIComForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(HIComConfig, HIComProcessor, exist_ok=True)
    models = (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM)
    for auto in (AutoConfig, AutoProcessor, AutoTokenizer, *models):
        find_embedded(auto)
