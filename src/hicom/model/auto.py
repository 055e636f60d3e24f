"""The Auto classes of transformers find embedded models by name, as all of this library does."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from .hub import embedded_models, local_name, read_json

ADAPTER = "adapter_config.json"


def find_embedded(auto: Any) -> None:
    """Have `from_pretrained` of an Auto class take names of embedded models; of a class that does, nothing changes.

    Without it a name such as `hicom-tiny` would be asked for on the hub, several times. All other names go their way.
    An adapter may name its base so, too.
    """
    original = auto.from_pretrained.__func__
    if hasattr(original, "finds_embedded"):
        return

    @functools.wraps(original)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        base = embedded_base(pretrained_model_name_or_path)
        if base is None or not hasattr(
            cls, "from_config"
        ):  # of an adapter, other classes read files that it has itself
            return original(cls, local_name(pretrained_model_name_or_path), *args, **kwargs)
        model = original(cls, local_name(base), *args, **kwargs)
        model.load_adapter(str(pretrained_model_name_or_path))
        return model

    from_pretrained.finds_embedded = True  # type: ignore[attr-defined]
    auto.from_pretrained = classmethod(from_pretrained)


def embedded_base(name: Any) -> str | None:
    """Return the embedded model that an adapter in a folder was trained on; None where it is no such folder."""
    path = Path(str(name)) / ADAPTER
    if not path.is_file() or (path.parent / "config.json").is_file():
        return None
    base = read_json(path).get("base_model_name_or_path")
    return base if base in embedded_models() else None
