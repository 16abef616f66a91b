"""A run's student alone, in a folder that deploys: the model file, checked, and a card that describes it."""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mdistiller.data import DataConfig
from mdistiller.deploy.predict import (
    CARD,
    FILES,
    Accuracy,
    Card,
    Check,
    Format,
    one_line,
    open_model,
    require_onnx,
    sha256,
)
from mdistiller.deploy.student import EMA_FILE, find_student, plugins_named, read_student, run_config
from mdistiller.errors import CheckpointError, ConfigError, MDistillerError
from mdistiller.models import ModelConfig
from mdistiller.models.weights import STUDENT_FILE
from mdistiller.runs.checkpoint import save_student, write_text
from mdistiller.runs.environment import environment
from mdistiller.runs.folder import CONFIG, METRICS, read_metrics
from mdistiller.settings import explain
from mdistiller.taps import logits_of
from mdistiller.tasks.classification.models import build_model

TOLERANCE = 1e-4
BATCH_SIZES = (1, 3)  # neither is that of the example which the graph is made with
_EXAMPLE = 2
_ONNX = ("onnx", "onnxscript", "onnxruntime")


class ExportError(MDistillerError):
    """A model cannot be exported, or its exported file gives other logits."""


def export_student(
    source: Path, format: Format = "safetensors", *, out: Path | None = None, ema: bool = False
) -> tuple[Path, Card]:
    """Write a student into a folder of its own: model file, `card.json`, `README.md`.

    The file is opened again as for prediction and has to give the student's logits on random images. The
    folder appears only after that.

    Args:
        source: a run folder, whose student is meant, or a student's file in one.
        format: `safetensors` (weights; the architecture is built by this package), `torch-export` (a graph
            for torch) or `onnx`; the graphs take batches of any size.
        out: the folder, new or empty. None: export/FILE-FORMAT beside the student's file.
        ema: the run's moving average of the student instead.

    Returns:
        The folder and its card.

    Raises:
        ConfigError: a folder that is in use, a package that is missing, no moving average in the run.
        CheckpointError: no student there, or a damaged one.
        ExportError: the model does not fit the format, or the logits differ.
    """
    if format == "onnx":
        require_onnx(*_ONNX)
    file = find_student(source, ema)
    about = read_student(file)
    out = out if out is not None else file.parent / "export" / f"{file.stem}-{format}"
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"out: {out} is not an empty folder; choose another with --out")
    config = ModelConfig(name=about["model"], checkpoint=file, options=about["options"])
    with plugins_named(file.parent):
        student = build_model(config, len(about["classes"])).eval()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=out.parent) as temporary:
            folder = Path(temporary) / "export"
            folder.mkdir()
            path = folder / FILES[format]
            _write_model(path, format, student, about)
            check = _check(path, format, student, config, about)
            card = _card(path, format, file, about, student, check)
            write_text(folder / CARD, card.model_dump_json(indent=2) + "\n")
            write_text(folder / "README.md", readme(card))
            if out.exists():
                out.rmdir()
            os.replace(folder, out)
    except OSError as error:
        raise ConfigError(f"out: cannot write to {out}: {error}") from error
    return out, card


class _Logits(nn.Module):
    """A model as one graph from `image` to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return logits_of(self.model(image))


def _write_model(path: Path, format: Format, student: nn.Module, about: dict[str, Any]) -> None:
    if format == "safetensors":
        save_student(path, student, about)
        return
    try:
        with warnings.catch_warnings():
            # torch's exporters call what torch itself has deprecated.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            _write_graph(path, format, student, about["image_size"])
    except OSError:
        raise
    except Exception as error:  # whatever part of the model the format lacks
        others = ", ".join(name for name in FILES if name != format)
        raise ExportError(
            f"{about['model']} cannot be exported as {format} (other formats: {others}): {one_line(error)}"
        ) from error


def _write_graph(path: Path, format: Format, student: nn.Module, size: int) -> None:
    shapes = ({0: torch.export.Dim("batch")},)
    example = (_images(_EXAMPLE, size),)
    program = torch.export.export(_Logits(student).eval(), example, dynamic_shapes=shapes, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    if format == "torch-export":
        torch.export.save(program, path)
        return
    graph = torch.onnx.export(
        program,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=shapes,  # names the axis
        dynamo=True,
        verbose=False,
    )
    assert graph is not None
    for node in graph.model.graph:
        node.metadata_props.clear()  # where torch's code made it
    graph.save(path, external_data=False)


def _images(count: int, size: int) -> Tensor:
    """Random input, as if normalised: the same at each call."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


@torch.no_grad()
def _check(
    path: Path, format: Format, student: nn.Module, config: ModelConfig, about: dict[str, Any]
) -> Check:
    """Open the file as for prediction and compare its logits with the student's."""
    model = open_model(path, format, config, len(about["classes"]), torch.device("cpu"))
    difference = largest = 0.0
    for count in BATCH_SIZES:
        images = _images(count, about["image_size"])
        expected = logits_of(student(images))
        try:
            found = model(images)
        except Exception as error:  # the graph refuses this batch size, in the words of its runtime
            raise ExportError(
                f"the exported {path.name} cannot run a batch of {count}: {one_line(error)}"
            ) from error
        if found.shape != expected.shape:
            raise ExportError(
                f"the exported {path.name} gives shape {list(found.shape)} for a batch of {count}; "
                f"the student gives {list(expected.shape)}"
            )
        off = (found - expected).abs().max().item()
        size = expected.abs().max().item()
        if not off <= TOLERANCE * size:  # NaN too
            raise ExportError(
                f"the exported {path.name} gives other logits than the student: largest difference "
                f"{off:.2e} at batch size {count}; allowed: {TOLERANCE:g} of the largest logit, {size:.3g}"
            )
        difference, largest = max(difference, off), max(largest, size)
    return Check(
        batch_sizes=BATCH_SIZES,
        largest_difference=difference,
        largest_logit=largest,
        tolerance=TOLERANCE,
    )


def _card(
    path: Path, format: Format, file: Path, about: dict[str, Any], student: nn.Module, check: Check
) -> Card:
    run = run_config(file.parent)
    try:
        data = DataConfig.model_validate(run["data"]) if "data" in run else None
    except ValidationError as error:
        raise explain(error, str(file.parent / CONFIG)) from error
    size = about["image_size"]
    resize: int | None = size
    facts = None
    if data is not None:
        files = data.kind in ("folder", "tiny-imagenet")
        # As `load_data` does it: files by Pillow, sets that are read as arrays by torch.
        resize = (data.resize or size) if files else None
        facts = data.model_dump(include={"kind", "train_limit", "test_limit", "label_noise", "seed"})
        facts["name"] = data.root.name if data.kind == "folder" else data.kind
    teacher = run.get("teacher")
    teachers = [teacher["name"]] if teacher else []
    teachers += [teacher["name"] for teacher in run.get("more_teachers", ())]
    seen = environment(0)
    versions = {"python": seen["python"], **seen["versions"]}
    if format == "onnx":
        versions |= {name: metadata.version(name) for name in _ONNX}
    return Card(
        format=format,
        file=path.name,
        sha256=sha256(path),
        model=about["model"],
        options=about["options"],
        parameters=sum(p.numel() for p in student.parameters()),
        classes=about["classes"],
        image_size=size,
        resize=resize,
        mean=about["mean"],
        std=about["std"],
        student=file.name,
        accuracy=_accuracy(file),
        recipe=run.get("recipe") or None,
        teacher=" + ".join(teachers) or None,
        method=run.get("method"),
        data=facts,
        versions=versions,
        check=check,
    )


def _accuracy(file: Path) -> Accuracy | None:
    """Of the weights in a student's file, by its name, and of the best epoch up to them."""
    try:
        return _figures(file, [line for line in read_metrics(file.parent) if line["kind"] == "eval"])
    except (KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(
            f"{file.parent / METRICS} holds lines that are no run's: {one_line(error)}"
        ) from error


def _figures(file: Path, lines: list[dict[str, Any]]) -> Accuracy | None:
    kept = re.fullmatch(r"student-e(\d+)\.safetensors", file.name)
    if kept is not None:
        lines = [line for line in lines if line["epoch"] <= int(kept[1])]
    if not lines or not (kept or file.name in (STUDENT_FILE, EMA_FILE)):
        return None
    top1 = {line["epoch"]: (line["ema"] if file.name == EMA_FILE else line)["top1"] for line in lines}
    last = int(kept[1]) if kept else lines[-1]["epoch"]
    best = max(top1, key=lambda epoch: top1[epoch])
    return Accuracy(last_top1=top1.get(last), last_epoch=last, best_top1=top1[best], best_epoch=best)


_USE: dict[Format, str] = {
    "safetensors": """\
import torch
from mdistiller.deploy.predict import load_export

model = load_export(".")
images = torch.zeros(1, 3, {size}, {size})
logits = model(images)""",
    "torch-export": """\
import torch

model = torch.export.load("model.pt2").module()  # unpickles parts of the file: trust its source
images = torch.zeros(1, 3, {size}, {size})
logits = model(images)""",
    "onnx": """\
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
images = np.zeros((1, 3, {size}, {size}), np.float32)
(logits,) = session.run(["logits"], {{"image": images}})""",
}


def readme(card: Card) -> str:
    """The card for people, in Markdown."""
    method = dict(card.method or {})
    name = method.pop("name", None)
    settings = ", ".join(f"{key} {value}" for key, value in method.items() if value is not None)
    accuracy = card.accuracy
    if accuracy is None:
        measured = "not known"
    else:
        last = "not evaluated" if accuracy.last_top1 is None else f"{accuracy.last_top1:.2f} %"
        measured = (
            f"{last} (these weights, epoch {accuracy.last_epoch}); best {accuracy.best_top1:.2f} % "
            f"(epoch {accuracy.best_epoch}, picked on the test set)"
        )
    data = None
    if card.data is not None:
        data = card.data["name"]
        for key in ("train_limit", "test_limit", "label_noise"):
            data += f", {key} {card.data[key]}" if card.data[key] else ""
    geometry = (
        f"central square scaled to {card.image_size}"
        if card.resize is None
        else f"short side scaled to {card.resize}, centre crop of {card.image_size}"
    )
    rows = {
        "model": f"{card.model}, {card.parameters:,} parameters",
        "teacher": card.teacher,
        "method": name and name + (f" ({settings})" if settings else ""),
        "recipe": card.recipe,
        "data": data,
        "top-1 on its test set": measured,
        "input": f"RGB, {geometry}, float32 [B, 3, {card.image_size}, {card.image_size}]",
        "normalisation": f"scaled to [0, 1], less mean {list(card.mean)}, over std {list(card.std)}",
        "output": f"logits [B, {len(card.classes)}]",
        "format": f"{card.format} (`{card.file}`)",
        "largest difference to the student's logits": f"{card.check.largest_difference:.1e} "
        f"(largest logit {card.check.largest_logit:.3g})",
        "versions": ", ".join(f"{key} {value}" for key, value in card.versions.items()),
    }
    table = "\n".join(f"| {key} | {value or '–'} |" for key, value in rows.items())
    return f"""# {card.model}, {len(card.classes)} classes

| | |
| --- | --- |
{table}

The same, for programs: [`{CARD}`]({CARD}).

## Use

```
mdistiller predict FOLDER IMAGE…
```

```python
{_USE[card.format].format(size=card.image_size)}
```

## Classes

{", ".join(card.classes)}
"""
