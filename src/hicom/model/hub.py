"""Names of models: the one way from an embedded name, a folder or a hub id to a folder on this machine."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..files import parse_json

SETTINGS_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
"""Configurations and tokenizers: all of a model but its weights."""
MODEL_FILES = (*SETTINGS_FILES, "*.safetensors")
"""All of a model; pickles are never downloaded."""
_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*")
# Some repositories hold their weights a second time, in a layout that transformers does not read.
_OTHER_LAYOUTS = ("consolidated*", "original/*")
# The HTTP library's own error (the library differs between versions of the hub's client) and OSError.
HUB_ERRORS: tuple[type[Exception], ...] = tuple(HfHubHTTPError.__bases__)


class HubUnreachable(ValueError):
    """The hub does not answer, and no earlier download is here."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file is missing or is no JSON object.
    """
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent}: {path.name} is missing, so this is no model folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object is expected")
    return value


def embedded_folder() -> Path:
    """Return the folder of what is embedded in this package."""
    return Path(str(package_files("hicom"))) / "assets"


def embedded_models() -> list[str]:
    """Return the names of the models inside this package."""
    return sorted(path.parent.name for path in embedded_folder().glob("*/config.json"))


def local_name(name: Any) -> Any:
    """Return the folder of an embedded model for its name, and anything else as it is."""
    return embedded_folder() / str(name) if str(name) in embedded_models() else name


def find_local(name: str | Path) -> Path | None:
    """Return the folder of an embedded model or of a path; None for the id of a model on the hub.

    Raises:
        ValueError: there is no such folder and it is no hub id either, or the folder holds an adapter.
    """
    folder = Path(local_name(name))
    if str(name) and folder.is_dir():
        if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
            raise ValueError(
                f"{name} holds an adapter (LoRA), which is no model by itself; add it to the one that it was trained "
                f"on: hicom convert merge BASE {name} DST"
            )
        return folder
    if folder.exists() or not _HUB_ID.fullmatch(str(name)):
        embedded = ", ".join(embedded_models())
        raise ValueError(f"{name}: no such model folder, and no hub id (org/name); embedded models: {embedded}")
    return None


def find_model(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    files: Sequence[str] = MODEL_FILES,
) -> Path:
    """Return the folder of a model: an embedded one by name, a local folder, or a download from the hub.

    The hub is asked once: where it does not answer within `HF_HUB_ETAG_TIMEOUT` seconds (10), what an earlier download
    left is taken, else this fails.

    Args:
        name: embedded name (`hicom-tiny`), folder, or hub id (`org/name`).
        revision: branch, tag or commit of a hub id.
        token: for private and gated models; None: the one of `hf auth login`, False: none.
        cache_dir: folder for downloads; None: the hub's own cache.
        files: patterns of the files that are needed of a hub id.

    Raises:
        HubUnreachable: the hub does not answer, and no earlier download is here.
        ValueError: there is no such model, the hub refuses it, or `revision` is given for a folder.
    """
    folder = find_local(name)
    if folder is not None:
        if revision is not None:
            raise ValueError(f"revision={revision!r} goes with a hub id, but {name} is a folder; leave it out")
        return folder
    problem = _problem_of_hub(str(name), revision, token)
    try:
        downloaded = snapshot_download(
            str(name),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            allow_patterns=list(files),
            ignore_patterns=list(_OTHER_LAYOUTS),
            local_files_only=problem is not None,
        )
    except LocalEntryNotFoundError as error:
        reason = problem or _line(error)
        raise HubUnreachable(f"{name}: no such folder here, and no download from the hub ({reason})") from error
    except HUB_ERRORS as error:
        raise ValueError(f"{name}: the download from the hub failed ({_line(error)}); try again") from error
    if problem is not None and not constants.HF_HUB_OFFLINE:
        warnings.warn(f"{name}: an earlier download is taken, which may be outdated ({problem})", stacklevel=2)
    return Path(downloaded)


def _problem_of_hub(name: str, revision: str | None, token: str | bool | None) -> str | None:
    """Return why the hub does not answer for a model; None where it does.

    `snapshot_download` asks without a time limit, and repeats what fails; so this question comes first.

    Raises:
        ValueError: the hub answers that there is no such model or revision, or that this user may not have it.
    """
    try:
        HfApi().model_info(name, revision=revision, token=token, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except GatedRepoError as error:
        raise ValueError(
            f"{name} is gated: ask for access on its page of the hub, then pass token= or run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{name}: neither a folder nor a model on the hub; if it is private, pass token= or run `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{name} has no revision {revision!r} on the hub") from error
    except OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set"
    except HUB_ERRORS as error:
        return f"{constants.ENDPOINT} does not answer: {_line(error)}"
    return None


def _line(error: BaseException) -> str:
    """Return an error in one line."""
    return " ".join(str(error).split()) or type(error).__name__
