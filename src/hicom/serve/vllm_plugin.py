"""What vLLM loads at its start, in each of its processes (entry point `vllm.general_plugins`)."""

ARCHITECTURE = "HIComForConditionalGeneration"


def register() -> None:
    """Make vLLM know checkpoints of this library; may be called again."""
    from vllm import ModelRegistry

    from ..model import register as register_classes

    register_classes()
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        # By name: the module is imported in the processes that need it.
        ModelRegistry.register_model(ARCHITECTURE, f"hicom.serve.vllm_model:{ARCHITECTURE}")
    from . import vllm_media  # noqa: F401  (registers what it does with media)
