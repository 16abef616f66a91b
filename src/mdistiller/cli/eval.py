"""`mdistiller eval RUN` and `mdistiller eval MODEL --checkpoint FILE`."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field

from mdistiller.cli.flags import Positional
from mdistiller.cli.options import Command, parse_command
from mdistiller.config import RunConfig
from mdistiller.deploy.student import find_student, open_student, plugins_named, run_settings
from mdistiller.errors import ConfigError
from mdistiller.methods import load_plugins
from mdistiller.models import ModelConfig
from mdistiller.models.weights import STUDENT_FILE, read_metadata
from mdistiller.runs.folder import CONFIG, RunFolder
from mdistiller.settings import Settings, validate
from mdistiller.training.distributed import process_group
from mdistiller.training.task import DEFAULT_TASK, AnyTask, get_task, task_of_model
from mdistiller.types import Line

_PLAIN = {"student": ""}


class EvalCommand(Command):
    """Metrics of a model on a test set: accuracies and loss of a classifier, average precision of a detector,
    intersection over union of a segmentation model.

    A run folder is evaluated with the model, data and options of its run; flags change them.
    `mdistiller eval RUN --help` shows the flags of the run's task.
    """

    model: Positional[str]
    """A run folder, or a student's file, such as RUN/student-e60.safetensors; without its run's config, a
    file needs --data.root, and --data.kind for other data than image folders. Or, with --checkpoint, the name
    of a model: one from `mdistiller list models`, timm/NAME, torchvision/NAME, or that of a
    detector or a segmentation model."""
    checkpoint: Path | None = None
    """Weights of the model: a .safetensors or torch file, or a run folder."""
    data: Settings = Settings()
    options: Line = Field(default_factory=dict)
    """Further arguments of the model function."""
    batch_size: int | None = Field(default=None, ge=1)
    """Images per batch. None: of classifiers those of two million pixels, at most 500."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Autocast precision. auto: float32."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:N or mps."""
    predictions: Path | None = None
    """JSON file to write with a detector's predictions, in COCO's format for results."""
    out: Path | None = None
    """Folder for the student and its metrics, which `mdistiller report` takes beside run folders. It must not
    hold a run yet."""

    @classmethod
    def parse(cls, args: Sequence[str]) -> Self:
        """Parses the model before the other flags: it chooses the task, and the task the flags."""
        first = cls.with_own_flags(args)
        load_plugins(first.plugin)
        name = next(iter(args), "-")
        if name.startswith("-"):
            config = get_task(DEFAULT_TASK).Config.model_validate(_PLAIN)
            default = cls(model="", data=config.data_settings or Settings())
            name = parse_command(cls, args, cls.prog(), default).model
            if not name:
                raise ConfigError(
                    f"eval needs a run folder, or a model and --checkpoint FILE; see {cls.prog()} --help"
                )
        found = _find_model(name, first.checkpoint)
        default = cls(
            model=name,
            data=found.data_settings or Settings(),
            options=found.student.options,
            batch_size=found.eval_batch_size,
            precision=found.precision,
        )
        return parse_command(cls, args, cls.prog(), default)

    def execute(self) -> None:
        found = _find_model(self.model, self.checkpoint)
        task, source = get_task(found.task), found.student.checkpoint
        assert source is not None
        changes: Line = {"eval_batch_size": self.batch_size, "precision": self.precision}
        if found.data_settings is not None:
            changes["data"] = self.data
        # Not `replace`: what a run requires of its precision does not matter here.
        config = found.model_copy(update=changes)
        fields = {"name": found.student.name, "checkpoint": source, "options": self.options}
        model = validate(ModelConfig, fields, "options", "--")
        folder = source if os.path.isdir(source) else source.parent
        with process_group(self.device) as world, plugins_named(folder):
            metrics = task.evaluate(config, model, world, self.predictions)
            if self.out is not None and world.is_main:
                _write_run(self.out, config, model, metrics)
        if not world.is_main:
            return
        if self.as_json:
            print(json.dumps({"model": model.name, "checkpoint": str(source), **metrics}))
        else:
            print(*task.format_metrics(metrics), sep="\n")


def _write_run(out: Path, config: RunConfig, model: ModelConfig, metrics: Line) -> None:
    """Writes a run folder of no steps: the student, its config, and the metrics of one evaluation."""
    assert model.checkpoint is not None
    student = open_student(model.checkpoint)
    size = sum(p.numel() for p in student.load().parameters())
    first = config.metrics[0]
    last = {name: metrics[name] for name in config.metrics} | {"epoch": 0}
    fields = {"out": out, "student": model.absolute(), "teacher": None, "recipe": None, "log": ()}
    run = RunFolder.create(config.model_copy(update=fields))
    try:
        with run.writing():
            shutil.copy(student.path, run.path / STUDENT_FILE)
            line = {"epoch": 0, "step": 0, **metrics, f"best_{first}": metrics[first]}
            run.log({"kind": "eval", **line})
            run.log({"kind": "summary", "step": 0, "last": last, "best": last, "student_parameters": size})
    finally:
        run.close()


def _without_run(task: AnyTask, metadata: Line, **data: str) -> RunConfig:
    """Returns the config for a student's file by itself: its images are prepared as in training."""
    known = {key: metadata[key] for key in task.metadata_keys if key in metadata}
    given: Line = {"data": data | {k: known[k] for k in ("image_size", "mean", "std") if k in known}}
    if "short_side" in known:
        given["augment"] = {"short_side": known["short_side"]}
    return task.Config.model_validate({**_PLAIN, **given})


def _find_model(name: str, checkpoint: Path | None) -> RunConfig:
    """Returns the config of a run folder, a file, or a name with a checkpoint; its student is the model."""
    options: Line = {}
    if checkpoint is None:
        if not os.path.exists(name):
            raise ConfigError(
                f"checkpoint: {name!r} is no run folder; a model's name needs --checkpoint FILE"
            )
        checkpoint = Path(name)
        file = find_student(checkpoint)
        if not (file.parent / CONFIG).is_file() and "task" not in read_metadata(file):
            raise ConfigError(
                f"{file.parent} has no {CONFIG}; give the model's name and --checkpoint {checkpoint}"
            )
        student = open_student(file)
        task, metadata = student.task, student.metadata
        folder = {"kind": "folder"} if "image_size" in task.metadata_keys else {}
        config = student.config or _without_run(task, metadata, **folder)
        name, options = metadata.get("model", ""), metadata.get("options") or {}
    else:
        run = run_settings(checkpoint) if os.path.isdir(checkpoint) else None
        metadata = read_metadata(checkpoint) if os.path.exists(checkpoint) else {}
        if run is not None:
            config, options = run, metadata["options"] if metadata.get("model") == name else {}
        elif metadata.get("task"):
            config = _without_run(get_task(metadata["task"]), metadata)
        else:
            config = task_of_model(name).Config.model_validate(_PLAIN)
    found = ModelConfig.model_construct(name=name, checkpoint=checkpoint, options=options)
    return config.model_copy(update={"student": found})
