"""Students on the Hugging Face Hub: `hf://USER/REPO` and `hf://USER/REPO@REVISION`."""

import re
from importlib import import_module
from typing import Any

from mdistiller.errors import CheckpointError, ConfigError, MissingPackageError, one_line

_SCHEME = "hf://"
_REPO = r"[\w.-]+/[\w.-]+"


def local_path(source: str) -> str:
    """Downloads the student of an hf:// address and returns its file; returns any other text as it is.

    Only `model.safetensors` is downloaded, into huggingface_hub's cache. Call this for words that the user
    typed, never for a value from a file.

    Raises:
        ConfigError: an address of another form, or huggingface_hub is not installed.
        CheckpointError: no such repository, revision or file, no right to read it, or no connection.
    """
    if not source.startswith(_SCHEME):
        return source
    match = re.fullmatch(rf"{_SCHEME}({_REPO})(?:@([\w./-]+))?", source)
    if match is None:
        raise ConfigError(f"got {source!r}; allowed: hf://USER/REPO, hf://USER/REPO@REVISION")
    hub = _import_hub()
    try:
        path: str = hub.hf_hub_download(match[1], "model.safetensors", revision=match[2])
    except Exception as error:  # the HTTP library's errors have no common base
        raise CheckpointError(f"{source} cannot be read: {one_line(error)}") from error
    return path


def _import_hub() -> Any:
    try:
        return import_module("huggingface_hub")
    except ImportError as error:
        raise MissingPackageError("the Hugging Face Hub", "huggingface_hub", "hub") from error
