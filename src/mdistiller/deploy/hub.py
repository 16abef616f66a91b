"""Students on the Hugging Face Hub: `hf://USER/REPO` and `hf://USER/REPO@REVISION`."""

import re
from importlib import import_module
from typing import TYPE_CHECKING

import yaml

from mdistiller.errors import CheckpointError, ConfigError, MissingPackageError, one_line
from mdistiller.training.task import get_task
from mdistiller.types import Line

if TYPE_CHECKING:
    from mdistiller.deploy.predict import Card

_SCHEME = "hf://"


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
    match = re.fullmatch(rf"{_SCHEME}([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", source)
    if match is None:
        raise ConfigError(f"got {source!r}; allowed: hf://USER/REPO, hf://USER/REPO@REVISION")
    try:
        hub = import_module("huggingface_hub")
    except ImportError as error:
        raise MissingPackageError("the Hugging Face Hub", "huggingface_hub", "hub") from error
    try:
        path: str = hub.hf_hub_download(match[1], "model.safetensors", revision=match[2])
    except Exception as error:  # the HTTP library's errors have no common base
        raise CheckpointError(f"{source} cannot be read: {one_line(error)}") from error
    return path


def hub_metadata(card: "Card") -> str:
    """Returns a student's metadata for the Hub, in YAML: task, method, and metric on the test set."""
    task, method = get_task(card.task), (card.method or {}).get("name", "none")
    kind, value = task.deployment().hub_task, card.accuracy and card.accuracy.value
    fields: Line = {"library_name": "mdistiller"}
    if method != "none":
        fields["tags"] = ["knowledge-distillation", method]
    if kind:
        fields["pipeline_tag"] = kind
    if kind and card.data and value is not None:
        metric = {"type": task.Config.metrics[0], "name": task.Config.main_metric().title, "value": value}
        data = {"type": card.data["kind"], "name": card.data["name"]}
        result = {"task": {"type": kind}, "dataset": data, "metrics": [metric]}
        fields["model-index"] = [{"name": card.model, "results": [result]}]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n"
