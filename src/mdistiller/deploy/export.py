"""Export of a run's student: a folder with the model file, checked, and a card that describes it."""

import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mdistiller.deploy.card import readme
from mdistiller.deploy.int8 import CALIBRATION_IMAGES, quantize
from mdistiller.deploy.measure import Speed, count_macs, milliseconds
from mdistiller.deploy.predict import (
    CARD,
    FILES,
    Accuracy,
    Card,
    Check,
    Measured,
    open_model,
    require_onnx,
    sha256,
)
from mdistiller.deploy.student import StudentFile, open_student, run_config
from mdistiller.errors import CheckpointError, ConfigError, MDistillerError, one_line
from mdistiller.models.weights import STUDENT_FILE
from mdistiller.runs.checkpoint import save_student, write_text
from mdistiller.runs.environment import environment, this_machine
from mdistiller.runs.folder import CONFIG, EMA_FILE, METRICS, read_metrics
from mdistiller.training.deployment import Format, Model, ModelInput
from mdistiller.training.distributed import pick_device
from mdistiller.types import Line

TOLERANCE = 1e-4
_ONNX = ("onnx", "onnxscript", "onnxruntime")
# A file warns that loses more points, or predicts the student's class for a smaller percentage of images.
_MAX_LOSS, _MIN_AGREEMENT = 1.0, 90.0
_FLOAT = "float32.onnx"  # before quantization, in the temporary folder


class ExportError(MDistillerError):
    """A model cannot be exported, or its exported file gives other outputs."""


def export_student(
    source: Path,
    format: Format = "safetensors",
    *,
    out: str | Path | None = None,
    ema: bool = False,
    int8: bool = False,
    evaluate: bool = True,
    device: str = "auto",
) -> tuple[Path, Card]:
    """Writes a student into a folder of its own: model file, `card.json`, `README.md`.

    The file is opened as for prediction and must give the student's outputs on random inputs. The folder
    appears only after that. It is `out`, new or empty, or export/FILE-FORMAT beside the student's file.

    With `evaluate`, file and student run on the run's test set, on a `device` (an ONNX file on the CPU).
    Where the test set cannot be read, the card has no result, and a warning gives the reason. A student's
    file without its run's `config.json` has no test set.

    `safetensors` has the weights (this package builds the architecture), `torch-export` and `onnx` have a
    graph: that of a classifier takes batches of any size; that of a detector, in ONNX only, one image of any
    size. `source` is a run folder, or a student's file in one; `ema` exports a run's moving average. `int8`
    quantizes an ONNX graph on training images of the run; its outputs differ from the student's by rounding.

    Raises:
        ConfigError: a folder in use, a missing package, no moving average, a task without export, or int8 for
            another format or without the run's config.
        DataError: int8, and the training images cannot be read.
        CheckpointError: no student there, or a damaged one.
        ExportError: the model does not fit the format, or the outputs differ.
    """
    if int8 and format != "onnx":
        raise ConfigError(f"int8: got format {format!r}; allowed: onnx")
    if format == "onnx":
        require_onnx(*_ONNX)
    target = pick_device(device)
    file = open_student(source, ema)
    folder, deployment, config = file.path.parent, file.deployment, file.config
    out = Path(out or folder / "export" / f"{file.path.stem}-{format}{'-int8' * int8}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out: {out} is not an empty folder; choose another")
    student, images = file.load(), None
    if int8:
        if config is None:
            raise ConfigError(f"int8: {folder} has no {CONFIG}, which names the images for calibration")
        images = deployment.calibration_images(config, CALIBRATION_IMAGES)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=out.parent) as temporary:
            written = Path(temporary) / "export"
            written.mkdir()
            path = written / FILES[format]
            _write_model(path, format, file, student, images)
            exported = open_model(path, format, deployment, torch.device("cpu"))
            check = _check(path, exported, file, student, rounds=int8)
            fields = dict(file.fields)
            data = None
            if evaluate and config is not None:
                with _unmeasured(path):
                    data = deployment.load_test_set(config)
            fields |= _cost(path, exported, file, student, data)
            if data is not None:
                with _unmeasured(path):
                    fields["measured"] = _measure(path, format, file, student, target, data)
            card = Card(
                **fields,
                **_origin(file, format),
                format=format,
                file=path.name,
                sha256=sha256(path),
                parameters=sum(p.numel() for p in student.parameters()),
                check=check,
                int8=int8,
            )
            write_text(written / CARD, card.model_dump_json(indent=2) + "\n")
            write_text(written / "README.md", readme(card, deployment))
            if out.exists():
                out.rmdir()
            os.replace(written, out)
    except OSError as error:
        raise ConfigError(f"out: cannot write to {out}: {error}") from error
    return out, card


def _write_model(
    path: Path, format: Format, file: StudentFile, student: nn.Module, calibration: Tensor | None
) -> None:
    """Writes the model file; a graph is quantized if there are images for calibration."""
    if format == "safetensors":
        save_student(path, student, file.metadata)
        return
    try:
        with warnings.catch_warnings():
            # torch's exporters call functions that torch itself has deprecated.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            file.deployment.write_graph(path, format, student, file.metadata)
            if calibration is not None:
                quantize(path.rename(path.parent.with_name(_FLOAT)), path, calibration)
    except OSError:
        raise
    except Exception as error:  # any part of the model may be missing from the format
        others = ", ".join(name for name in FILES if name != format)
        what = f"{file.metadata['model']} cannot be exported as {format} (other formats: {others})"
        raise ExportError(f"{what}: {one_line(error)}") from error


@torch.no_grad()
def _check(path: Path, exported: Model, file: StudentFile, student: nn.Module, *, rounds: bool) -> Check:
    """Compares a file's outputs with the student's; one that `rounds` may have other finite outputs."""
    deployment = file.deployment
    original, inputs = deployment.as_model(student), deployment.check_inputs(file.metadata)
    difference = largest = 0.0
    for image in inputs:
        shape, expected = list(image.shape), original(image)
        try:
            found = exported(image)
        except Exception as error:  # the graph refuses this shape; the message is its runtime's
            words = f"cannot run an input of shape {shape}: {one_line(error)}"
        else:
            try:
                off, size = deployment.difference(image, found, expected)
                if off <= (sys.float_info.max if rounds else TOLERANCE * size):  # not NaN
                    difference, largest = max(difference, off), max(largest, size)
                    continue
                words = (
                    f"gives other {', '.join(deployment.outputs)} than the student: largest difference "
                    f"{off:.2e} for an input of shape {shape}; allowed: "
                    + ("finite outputs" if rounds else f"{TOLERANCE:g} of the largest output, {size:.3g}")
                )
            except ValueError as error:
                words = str(error)
        cause = _likely_cause(path, original, image, expected, list(inputs[0].shape))
        raise ExportError(f"the exported {path.name} {words}. Likely cause: {cause}")
    return Check(
        input_shapes=tuple(tuple(image.shape) for image in inputs),
        largest_difference=difference,
        largest_output=largest,
        tolerance=None if rounds else TOLERANCE,
    )


def _likely_cause(
    path: Path, student: Model, image: Tensor, expected: Sequence[Tensor], example: list[int]
) -> str:
    """Returns the likely cause of wrong outputs for an image; `example` is the shape of a graph's example."""
    for one, other in zip(student(image), expected, strict=True):
        if one.shape != other.shape or not torch.allclose(one, other, equal_nan=True):
            return "the student is random in evaluation mode, or keeps a state: two calls differ"
    if path.suffix == ".safetensors":
        return "the student computes with values that are neither weights nor options"
    if list(image.shape) != example:
        return (
            "a number that Python computes from an input's shape, as by int(), round() or a loop, is a "
            f"constant in the graph, which was made from shape {example} and is right for it"
        )
    return "a branch on values (`if`, `.item()`), or an operation that the format rounds otherwise"


@contextmanager
def _unmeasured(path: Path) -> Iterator[None]:
    """Context in which a test set that cannot be read gives a warning."""
    try:
        yield
    except (MDistillerError, OSError) as error:
        warnings.warn(f"accuracy of {path.name}: not measured: {error}", stacklevel=4)


def _cost(path: Path, exported: Model, file: StudentFile, student: nn.Module, data: Any) -> Line:
    """Returns the fields of a card about the cost of its file."""
    deployment, fields = file.deployment, ModelInput(**file.fields)
    models, unquantized = [exported], path.parent.with_name(_FLOAT)
    if unquantized.is_file():
        models.append(open_model(unquantized, "onnx", deployment, torch.device("cpu")))
    cost: Line = {"bytes": path.stat().st_size}
    found = ((n, deployment.example(fields, n, data)) for n in deployment.batches)
    batches = {n: images for n, images in found if images is not None}
    if batches:
        times = [milliseconds([(model, images) for model in models], n) for n, images in batches.items()]
        ms, *float_ms = (dict(zip(batches, row, strict=True)) for row in zip(*times, strict=True))
        speed = Speed(machine=this_machine(), ms=ms, float_ms=float_ms[0] if float_ms else None)
        macs = count_macs(deployment.as_model(student), batches[1])
        cost |= {"macs": macs, "image_shape": tuple(batches[1].shape), "speed": speed}
    return cost


def _measure(
    path: Path, format: Format, file: StudentFile, student: nn.Module, target: torch.device, data: Any
) -> Measured:
    """Evaluates student and file on the run's test set."""
    deployment, config = file.deployment, file.config
    assert config is not None
    used = torch.device("cpu") if format == "onnx" else target
    exported = open_model(path, format, deployment, used)
    models = [deployment.as_model(student.to(target)), lambda image: exported(image.to(used))]
    before, after = deployment.evaluate(models, config, data, target)
    metric = config.metrics[0]
    found = Measured(
        metric=metric,
        value=after[metric],
        student=before[metric],
        agreement=after["agreement"],
        images=after["images"],
    )
    worse = []
    if config.main_metric().unit and found.student - found.value > _MAX_LOSS:
        worse.append(f"loses {found.student - found.value:.2f} points of {metric}")
    if found.agreement is not None and found.agreement < _MIN_AGREEMENT:
        worse.append(f"predicts the student's class for only {found.agreement:.2f} % of the test images")
    if worse:
        warnings.warn(f"{path.name} {' and '.join(worse)}", stacklevel=3)
    return found


def _origin(file: StudentFile, format: Format) -> Line:
    """Returns the fields of a card about the student's model, its run, and the packages in use."""
    run, seen = run_config(file.path.parent), environment(0)
    teachers = (run.get("teacher"), *(run.get("more_teachers") or ()))
    versions = {"python": seen["python"], **seen["versions"]}
    if format == "onnx":
        versions |= {name: packages.version(name) for name in _ONNX}
    return {
        "task": file.task.name,
        "model": file.metadata["model"],
        "options": file.metadata["options"],
        "student": file.path.name,
        "accuracy": _accuracy(file.path, file.task.Config.metrics[0]),
        "recipe": run.get("recipe") or None,
        "teacher": " + ".join(map(_teacher_name, filter(None, teachers))) or None,
        "method": run.get("method"),
        "versions": versions,
    }


def _teacher_name(teacher: Line) -> str:
    """Returns a teacher's name, with its method if that is not the run's."""
    method = teacher.get("method")
    return (
        f"{teacher['name']} ({method['name']}, weight {teacher['weight']:g})" if method else teacher["name"]
    )


def _accuracy(file: Path, metric: str) -> Accuracy | None:
    """Reads the metric of the weights in a student's file; None if their epoch was not evaluated."""
    kept = re.fullmatch(r"student-e(\d+)\.safetensors", file.name)
    if not kept and file.name not in (STUDENT_FILE, EMA_FILE):
        return None
    try:
        lines = {line["epoch"]: line for line in read_metrics(file.parent) if line["kind"] == "eval"}
        epoch = int(kept[1]) if kept else max(lines, default=0)
        if epoch not in lines:
            return None
        line = lines[epoch]["ema"] if file.name == EMA_FILE else lines[epoch]
        return Accuracy(metric=metric, value=line[metric], epoch=epoch)
    except (KeyError, TypeError, ValidationError) as error:
        path = file.parent / METRICS
        raise CheckpointError(f"{path} holds lines that are no run's: {one_line(error)}") from error
