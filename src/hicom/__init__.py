"""Answer questions about videos with few visual tokens: compression that the user's instruction steers (HICom).

Names load on first use, so that `import hicom` stays light. Using a model, the processor or `VideoChat` also registers
the Auto classes of transformers; `register()` does it at once, for code that calls only `AutoModel` and the like.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hicom.drop_in import attach
    from hicom.inference import VideoChat
    from hicom.model.compressor import HybridCompressor
    from hicom.model.config import HIComConfig
    from hicom.model.modeling import HIComForConditionalGeneration, HIComModel
    from hicom.model.processing import HIComProcessor
    from hicom.video import probe, read_frames

__version__ = "0.1.0"

__all__ = [
    "HIComConfig",
    "HIComForConditionalGeneration",
    "HIComModel",
    "HIComProcessor",
    "HybridCompressor",
    "VideoChat",
    "__version__",
    "attach",
    "probe",
    "read_frames",
    "register",
]

_HOMES = {
    "HIComConfig": "hicom.model.config",
    "HIComForConditionalGeneration": "hicom.model.modeling",
    "HIComModel": "hicom.model.modeling",
    "HIComProcessor": "hicom.model.processing",
    "HybridCompressor": "hicom.model.compressor",
    "VideoChat": "hicom.inference",
    "attach": "hicom.drop_in",
    "probe": "hicom.video",
    "read_frames": "hicom.video",
}
_NEEDS_NO_TRANSFORMERS = {"HybridCompressor", "probe", "read_frames"}


def register() -> None:
    """Register HICom with the Auto classes of transformers. Calling it again changes nothing."""
    importlib.import_module("hicom.model").register()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _NEEDS_NO_TRANSFORMERS:
        register()
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
