"""Students on the Hugging Face Hub: `hf://USER/REPO` and `hf://USER/REPO@REVISION`."""

import re
import tempfile
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mdistiller.errors import CheckpointError, ConfigError, MissingPackageError, one_line
from mdistiller.training.task import get_task
from mdistiller.types import Line

if TYPE_CHECKING:
    from mdistiller.deploy.predict import Card

_SCHEME = "hf://"
_REPO = r"[\w.-]+/[\w.-]+"
_USE = """
From the Hugging Face Hub:

```python
import mdistiller

student = mdistiller.load_student("hf://{repo}")
```
"""


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


def push_student(
    source: Path, repo: str, *, private: bool | None = None, license: str | None = None, **options: Any
) -> str:
    """Exports a student, as `export_student` with `options`, and uploads it; see `Run.push_to_hub`."""
    from mdistiller.deploy.export import export_student  # it imports this module

    if re.fullmatch(_REPO, repo) is None:
        raise ConfigError(f"repo: got {repo!r}; allowed: USER/REPO")
    hub = _import_hub()
    with tempfile.TemporaryDirectory() as temporary:
        folder, _ = export_student(source, "safetensors", out=Path(temporary) / "export", **options)
        readme = folder / "README.md"
        text = readme.read_text("utf-8") + _USE.format(repo=repo)
        readme.write_text(f"---\nlicense: {license}\n{text[4:]}" if license else text, "utf-8")
        try:
            hub.create_repo(repo, private=private, exist_ok=True)
            if private and not hub.model_info(repo).private:
                raise PermissionError("the repository is public")
            commit: str = hub.upload_folder(repo_id=repo, folder_path=folder).oid
        except Exception as error:  # as for a download
            raise CheckpointError(f"{repo} cannot be written: {one_line(error)}") from error
    return f"{_SCHEME}{repo}@{commit}"


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


def _import_hub() -> Any:
    try:
        return import_module("huggingface_hub")
    except ImportError as error:
        raise MissingPackageError("the Hugging Face Hub", "huggingface_hub", "hub") from error
