"""`mdistiller eval RUN` and `mdistiller eval MODEL --checkpoint FILE`."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro
from pydantic import ValidationError

from mdistiller.cli.options import CommonFlags, Options, parse_command, words_after
from mdistiller.config import RunConfig
from mdistiller.deploy.student import find_student, plugins_named, read_student, run_settings
from mdistiller.errors import ConfigError
from mdistiller.methods import load_plugin
from mdistiller.models import ModelConfig
from mdistiller.models.weights import STUDENT_FILE, read_metadata
from mdistiller.runs.folder import CONFIG, RunFolder
from mdistiller.settings import Settings, explain
from mdistiller.training.distributed import process_group
from mdistiller.training.task import DEFAULT_TASK, Task, get_task, task_of_model

PROG = "mdistiller eval"
_PLAIN = {"student": ""}


@dataclass(frozen=True)
class EvalCommand(CommonFlags):
    """Metrics of a model on a test set: accuracies and loss of a classifier, average precision of a detector,
    intersection over union of a segmentation model.

    A run folder is evaluated with the model, data and options of its run; flags change them.
    `mdistiller eval RUN --help` shows the flags of the run's task.
    """

    model: tyro.conf.Positional[str]
    """A run folder, or a student's file, such as RUN/student-e60.safetensors; without its run's config, a
    file needs --data.root, and --data.kind for other data than image folders. Or, with --checkpoint, the name
    of a model: one from `mdistiller list models`, timm/NAME, torchvision/NAME, or that of a
    detector or a segmentation model."""
    checkpoint: Path | None = None
    """Weights of the model: a .safetensors or torch file, or a run folder."""
    data: Settings = field(default_factory=Settings)
    options: Options = field(default_factory=dict)
    """Further arguments of the model function."""
    batch_size: int = 500
    """Images per batch."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Autocast precision. auto: float32."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:N or mps."""
    predictions: Path | None = None
    """JSON file to write with a detector's predictions, in COCO's format for results."""
    out: Path | None = None
    """Folder for the student and its metrics, which `mdistiller report` takes beside run folders. It must not
    hold a run yet."""


def command(args: Sequence[str]) -> None:
    """Runs `mdistiller eval`."""
    for path, *_ in filter(None, words_after(args, "--plugin")):
        load_plugin(path)
    checkpoints = [Path(path) for path, *_ in filter(None, words_after(args, "--checkpoint"))]
    # The model chooses the task, and the task the other flags.
    if args and not args[0].startswith("-"):
        name = args[0]
    else:
        default = _defaults(MISSING, get_task(DEFAULT_TASK).Config.model_validate(_PLAIN), {})
        name = parse_command(EvalCommand, args, prog=PROG, default=default).model
    task, source, config, name, options = _find_model(name, next(reversed(checkpoints), None))
    c = parse_command(EvalCommand, args, prog=PROG, default=_defaults(name, config, options))
    if c.batch_size < 1:
        raise ConfigError(f"batch_size: got {c.batch_size}, need at least 1")
    changes: dict[str, Any] = {"eval_batch_size": c.batch_size, "precision": c.precision}
    if config.data_settings is not None:
        changes["data"] = c.data
    # Not `replace`: what a run requires of its precision does not matter here.
    config = config.model_copy(update=changes)
    try:
        model = ModelConfig(name=name, checkpoint=source, options=c.options)
    except ValidationError as error:
        raise explain(error, "options", "--") from error
    with process_group(c.device) as world, plugins_named(source if os.path.isdir(source) else source.parent):
        metrics = task.evaluate(config, model, world, c.predictions)
        if c.out is not None and world.is_main:
            _write_run(c.out, config, model, metrics)
    if not world.is_main:
        return
    if c.json:
        print(json.dumps({"model": model.name, "checkpoint": str(source), **metrics}))
    else:
        print(*task.format_metrics(metrics), sep="\n")


def _write_run(out: Path, config: RunConfig, model: ModelConfig, metrics: Mapping[str, Any]) -> None:
    """Writes a run folder of no steps: the student, its config, and the metrics of one evaluation."""
    assert model.checkpoint is not None
    file = find_student(model.checkpoint)
    task, metadata = read_student(file)
    size = sum(p.numel() for p in task.load_student(file, metadata).parameters())
    first = config.metrics[0]
    last = {name: metrics[name] for name in config.metrics} | {"epoch": 0}
    fields = {"out": out, "student": model.absolute(), "teacher": None, "recipe": None, "log": ()}
    run = RunFolder.create(config.model_copy(update=fields))
    try:
        with run.writing():
            shutil.copy(file, run.path / STUDENT_FILE)
            line = {"epoch": 0, "step": 0, **metrics, f"best_{first}": metrics[first]}
            run.log({"kind": "eval", **line})
            run.log({"kind": "summary", "step": 0, "last": last, "best": last, "student_parameters": size})
    finally:
        run.close()


def _defaults(model: Any, config: RunConfig, options: dict[str, Any]) -> EvalCommand:
    data, size = config.data_settings or Settings(), config.eval_batch_size
    return EvalCommand(model, data=data, options=options, batch_size=size, precision=config.precision)


def _without_run(task: Task, metadata: Mapping[str, Any]) -> RunConfig:
    """Returns the config for a student's file by itself: its images are prepared as in training."""
    data = {key: metadata[key] for key in ("image_size", "mean", "std") if key in metadata}
    values = {**_PLAIN, "data": {"kind": "folder", **data}} if data else _PLAIN
    return task.Config.model_validate(values)


def _find_model(name: str, checkpoint: Path | None) -> tuple[Task, Path, RunConfig, str, dict[str, Any]]:
    """Finds task, weights and config of a model, and its own name and options."""
    if checkpoint is None:
        if not os.path.exists(name):
            raise ConfigError(
                f"checkpoint: {name!r} is no run folder; a model's name needs --checkpoint FILE"
            )
        source = Path(name)
        file = find_student(source)
        run = run_settings(file.parent)
        if run is None and "task" not in read_metadata(file):
            raise ConfigError(
                f"{file.parent} has no {CONFIG}; give the model's name and --checkpoint {source}"
            )
        task, metadata = read_student(file)
        if run is None:
            run = _without_run(task, metadata)
        return task, source, run, metadata.get("model", ""), metadata.get("options") or {}
    if os.path.isdir(checkpoint) and (run := run_settings(checkpoint)) is not None:
        metadata = read_metadata(checkpoint)
        options = metadata["options"] if metadata.get("model") == name else {}
        return get_task(run.task), checkpoint, run, name, options
    stored = read_metadata(checkpoint).get("task") if os.path.exists(checkpoint) else None
    task = get_task(stored) if isinstance(stored, str) else task_of_model(name)
    return task, checkpoint, task.Config.model_validate(_PLAIN), name, {}
