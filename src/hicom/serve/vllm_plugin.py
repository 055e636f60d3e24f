"""What vLLM loads at its start, in each of its processes (entry point `vllm.general_plugins`).

Other models are served in the same environment, so nothing here may stop vLLM: what is wrong is said when a checkpoint
of this library is asked for.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
from importlib.metadata import requires
from pathlib import Path
from typing import Any, NoReturn

ARCHITECTURE = "HIComForConditionalGeneration"
OVERRIDDEN = {
    "vllm.multimodal.processing.processor": (
        "_call_hf_processor",
        "_get_mm_fields_config",
        "_get_prompt_updates",
        "get_dummy_inputs",
    )
}
"""Methods of vLLM's that ours take the place of."""


def register() -> None:
    """Make vLLM know checkpoints of this library; may be called again."""
    try:
        refusal = wrong_setting() or moved_interface()
        if refusal is None:
            _register()
    except (ImportError, AttributeError, TypeError) as error:
        refusal = _moved(f"{type(error).__name__}: {error}")
    if refusal is not None:
        _refuse(refusal)


def _register() -> None:
    from vllm import ModelRegistry

    from ..model import register as register_classes

    register_classes()
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        # By name: the module is imported in the processes that need it.
        ModelRegistry.register_model(ARCHITECTURE, f"hicom.serve.vllm_model:{ARCHITECTURE}")
    from . import vllm_media  # noqa: F401  (registers what it does with media)


def _refuse(refusal: str) -> None:
    """Let vLLM say why checkpoints of this library cannot be served, when it reads the configuration of one."""
    from transformers import AutoConfig

    from ..model.config import HIComConfig

    class RefusedConfig(HIComConfig):
        """The configuration of a checkpoint that is not served."""

        @classmethod
        def from_dict(cls, *args: Any, **kwargs: Any) -> NoReturn:
            raise ValueError(refusal)

    AutoConfig.register(HIComConfig.model_type, RefusedConfig, exist_ok=True)


# What the environment says


def feature_bytes() -> int:
    """Return what features of videos that were asked about lately may take, beside what vLLM counts.

    Raises:
        ValueError: `HICOM_FEATURE_MB` is no number of at least 0.
    """
    value = os.environ.get("HICOM_FEATURE_MB", "1024")
    if not re.fullmatch(r"\d{1,9}", value.strip(), re.ASCII):
        raise ValueError(f"HICOM_FEATURE_MB={value!r} must be a whole number of megabytes, for example 1024")
    return int(value) * 10**6


def trusts_media_ids() -> bool:
    """Return whether `uuid` of a request may stand for a video. One client could then give another's a false content.

    Raises:
        ValueError: `HICOM_TRUST_MEDIA_IDS` is neither 0 nor 1.
    """
    value = os.environ.get("HICOM_TRUST_MEDIA_IDS", "0").strip()
    if value not in ("", "0", "1"):
        raise ValueError(f"HICOM_TRUST_MEDIA_IDS={value!r} must be 0 or 1")
    return value == "1"


def wrong_setting() -> str | None:
    """Return what is wrong with the environment's settings, or None."""
    try:
        feature_bytes()
        trusts_media_ids()
    except ValueError as error:
        return str(error)
    return None


# vLLM's inner interfaces


def moved_interface(root: Path | None = None) -> str | None:
    """Return what of vLLM's interfaces is not where this package needs it, as one line; or None.

    vLLM's files are read and not imported: that takes no time, and touches no device.

    Args:
        root: folder of the package; None: the installed one's.
    """
    if root is None:
        spec = importlib.util.find_spec("vllm")
        places = getattr(spec, "submodule_search_locations", None)
        if not places:
            return None
        root = Path(next(iter(places)))
    for module, names in _needed().items():
        place = root.joinpath(*module.split(".")[1:])
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        if not file.is_file():
            return _moved(f"there is no {module}")
        missing = sorted(names - _names(ast.parse(file.read_text("utf-8"))))
        if missing:
            return _moved(f"{module} has no {', '.join(missing)}")
    return None


def _moved(what: str) -> str:
    known = next((each.partition(";")[0] for each in requires("hicom") or () if each.startswith("vllm")), "vllm")
    return (
        f"hicom cannot serve its models with this vLLM, whose inner interfaces have moved: {what}; install '{known}' "
        "(other models are not concerned)"
    )


def _names(tree: ast.AST) -> set[str]:
    """Return what a module defines or imports, at any depth."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def _needed() -> dict[str, set[str]]:
    """Return the modules of vLLM, and the names in them, that the modules beside this one use."""
    needed = {module: set(names) for module, names in OVERRIDDEN.items()}
    for file in ("vllm_plugin.py", "vllm_model.py", "vllm_media.py"):
        for node in ast.walk(ast.parse((Path(__file__).parent / file).read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vllm":
                needed.setdefault(node.module, set()).update(alias.name for alias in node.names)
    return needed
