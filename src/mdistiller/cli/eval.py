"""`mdistiller eval RUN` and `mdistiller eval MODEL --checkpoint FILE`."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from pydantic import ValidationError

from mdistiller.cli.options import parse_command
from mdistiller.data import Augment, AugmentConfig, DataConfig, load_data, make_loader
from mdistiller.deploy.student import find_student, plugins_named, read_student, run_settings
from mdistiller.errors import ConfigError
from mdistiller.methods import load_plugin
from mdistiller.models import ModelConfig, create_model
from mdistiller.models.registry import Options
from mdistiller.models.weights import find_weights, read_metadata
from mdistiller.runs.folder import CONFIG
from mdistiller.settings import explain
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.classification.evaluate import evaluate
from mdistiller.tasks.classification.models import build_model
from mdistiller.training.distributed import process_group


@dataclass(frozen=True)
class EvalCommand:
    """Top-1 and top-5 accuracy and cross-entropy of a model on a test set.

    A run folder is evaluated as its run did it: model, data and options are the run's, unless they are given.
    """

    model: tyro.conf.Positional[str]
    """A run folder, or a student's file in one, such as RUN/student-e60.safetensors; or, with --checkpoint, a
    name from `mdistiller list models`, or timm/NAME, or torchvision/NAME."""
    checkpoint: Path | None = None
    """The model's weights: a .safetensors or torch file, or a run folder."""
    data: DataConfig = field(default_factory=DataConfig)
    options: Options = field(default_factory=dict)
    """Further arguments of the model function."""
    batch_size: int = 500
    """Images at a time."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Autocast precision."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    plugin: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """Python file that registers methods, models and data sets (code: it is run). May be given again."""
    json: bool = False
    """Print the figures as JSON on stdout."""


def command(args: Sequence[str]) -> None:
    """Run `mdistiller eval`."""
    c = parse_command(EvalCommand, args, prog="mdistiller eval")
    for path in c.plugin:
        load_plugin(path)
    source, run = _find_run(c)
    if run is not None:
        c = _as_the_run(source, run, c.model if c.checkpoint is not None else None, args)
    with process_group(c.device) as here:
        try:
            config = ModelConfig(name=c.model, checkpoint=source, options=c.options)
        except ValidationError as error:
            raise explain(error, "options", "--") from error
        with plugins_named(source if os.path.isdir(source) else source.parent):
            # A typo should not wait for the data, or for its download.
            create_model(
                c.model, **{k: v for k, v in c.options.items() if k not in ("pretrained", "weights")}
            )
            find_weights(source)
            # Of the training images no more is read than has to be.
            splits = load_data(c.data.model_copy(update={"train_limit": 1, "label_noise": 0.0}))
            model = build_model(config, splits.num_classes)
        model.to(here.device)
        if run is None or run.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        size = read_metadata(source).get("image_size", splits.image_size)
        if size != splits.image_size and here.is_main:
            message = f"{source} was trained at {size} pixels and is evaluated at {splits.image_size}"
            warnings.warn(message, stacklevel=1)
        loader = make_loader(
            splits.test,
            c.batch_size,
            device=here.device,
            shuffle=False,
            rank=here.rank,
            world_size=here.size,
            workers=c.data.workers,
        )
        prepare = Augment(AugmentConfig(), splits.mean, splits.std, splits.num_classes).to(here.device).eval()
        figures = evaluate(model, loader.epoch(0), prepare, here, precision=getattr(torch, c.precision))
    if not here.is_main:
        return
    figures["images"] = len(splits.test)
    if c.json:
        print(json.dumps({"model": c.model, "checkpoint": str(source), **figures}))
        return
    print(
        f"top-1 {figures['top1']:.2f} %  top-5 {figures['top5']:.2f} %  loss {figures['loss']:.4f}  "
        f"({figures['images']:,} images)"
    )


def _find_run(c: EvalCommand) -> tuple[Path, ClassificationConfig | None]:
    """The weights, and the settings of the run whose they are; None where they are just a file."""
    if c.checkpoint is not None:
        return c.checkpoint, run_settings(c.checkpoint) if os.path.isdir(c.checkpoint) else None
    if not os.path.exists(c.model):
        raise ConfigError(f"checkpoint: {c.model!r} is no run folder; a model's name needs --checkpoint FILE")
    source = Path(c.model)
    folder = find_student(source).parent
    run = run_settings(folder)
    if run is None:
        raise ConfigError(f"{folder} has no {CONFIG}; give the model's name and --checkpoint {source}")
    return source, run


def _as_the_run(
    source: Path, run: ClassificationConfig, model: str | None, args: Sequence[str]
) -> EvalCommand:
    """The command with the run's settings in place of defaults; `model`: its name, if that was given."""
    file = find_student(source)
    about = read_student(file) if model is None else read_metadata(file)
    name = about["model"] if model is None else model
    default = EvalCommand(
        name,
        data=run.data,
        options=about["options"] if about.get("model") == name else {},
        batch_size=run.eval_batch_size,
        precision=run.precision,
    )
    return replace(parse_command(EvalCommand, args, prog="mdistiller eval", default=default), model=name)
