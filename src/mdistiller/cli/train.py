"""`mdistiller train RECIPE`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from mdistiller.analysis.report import write_report
from mdistiller.cli.options import parse_command
from mdistiller.config import RunConfig, read_config
from mdistiller.errors import ConfigError
from mdistiller.methods import load_plugin
from mdistiller.recipes import get_recipe, set_method, with_method
from mdistiller.runs.folder import CONFIG
from mdistiller.runs.progress import ProgressDisplay
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.training.launch import RunResult, train

USAGE = """\
usage: mdistiller train RECIPE [options]

RECIPE is FAMILY.METHOD.TEACHER_STUDENT, FAMILY.teacher.MODEL or FAMILY.student.MODEL (families: cifar100,
digits, folder, imagenet), or the folder of an earlier run, or its config.json. METHOD is a name from
`mdistiller list methods`, a sum A+B, or A-B for A around B; the teacher `self` is the student's moving
average. Examples:

  mdistiller train cifar100.dkd.resnet32x4_resnet8x4 --data.root DIR --teacher.checkpoint FILE
  mdistiller train folder.dkd.timm/resnet50_timm/resnet18 --data.root DIR --teacher.checkpoint FILE
  mdistiller train imagenet.dkd.resnet34_resnet18 --data.root DIR
  mdistiller train runs/RUN --seed 1
  mdistiller train runs/RUN --resume

`mdistiller train RECIPE --help` shows every option with the recipe's defaults, `mdistiller list recipes`
the known recipes. Several processes: torchrun --nproc-per-node N -m mdistiller train RECIPE [options]"""


@dataclass(frozen=True)
class TrainCommand:
    """Train or distil a student, and write a run folder."""

    config: Annotated[ClassificationConfig, tyro.conf.arg(name="")]
    method_name: Annotated[str | None, tyro.conf.arg(name="method")] = None
    """Another method than the recipe's, with its default hyper-parameters."""
    plugin: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """Python file that registers methods, models and data sets (code: it is run). May be given again."""
    resume: bool = False
    """Go on from the last state in the run folder."""
    json: bool = False
    """Print the summary as JSON on stdout."""


Config = TypeVar("Config", bound=RunConfig)


def parse(args: Sequence[str]) -> TrainCommand:
    """The command of an argument list."""
    config, rest = choose_config(args, ClassificationConfig, get_recipe, _with_method)
    return parse_command(TrainCommand, rest, prog=f"mdistiller train {args[0]}", default=TrainCommand(config))


def _with_method(config: ClassificationConfig, method: str) -> ClassificationConfig:
    return set_method(config, method).model_copy(update={"recipe": with_method(config.recipe, method)})


def choose_config(
    args: Sequence[str],
    kind: type[Config],
    get_recipe: Callable[[str, str | None], Config],
    with_method: Callable[[Config, str], Config],
) -> tuple[Config, list[str]]:
    """What the flags change, and the flags.

    Recipe, plug-ins and method are needed before the other fields, whose names depend on them.

    Args:
        args: recipe, run folder or config.json, then flags.
        kind: the config's class.
        get_recipe: the config of a recipe's name, with another method in its place if one is given.
        with_method: a stored config with another method.
    """
    if not args or args[0].startswith("-"):
        raise ConfigError("train needs a recipe first; see mdistiller train --help")
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--plugin", action="append", default=[], type=Path)
    early.add_argument("--method")
    try:
        known, rest = early.parse_known_args(list(args[1:]))
    except argparse.ArgumentError:
        raise ConfigError("--plugin needs a file, --method a name") from None
    for path in known.plugin:
        load_plugin(path)
    path = Path(args[0])
    if os.path.isfile(path / CONFIG):
        path /= CONFIG
    if path.suffix == ".json":
        # Resuming goes on where the file lies; a repeat writes to a folder of its own.
        out = path.parent if "--resume" in rest else None
        config = read_config(kind, path).model_copy(update={"out": out})
        if known.method is not None:
            config = with_method(config, known.method)
    elif os.path.isdir(path):
        raise ConfigError(f"{path} is no run folder: it has no {CONFIG}")
    elif os.path.isfile(path):
        raise ConfigError(f"{path} is a file; allowed: a recipe, a run folder or its {CONFIG}")
    else:
        config = get_recipe(args[0], known.method)
    plugins = (*config.plugins, *(path.resolve() for path in known.plugin))
    return config.model_copy(update={"plugins": tuple(dict.fromkeys(plugins))}), rest


def command(args: Sequence[str]) -> None:
    """Run `mdistiller train`."""
    if args and args[0] in ("-h", "--help"):
        print(USAGE)
        return
    parsed = parse(args)
    show(train(parsed.config, resume=parsed.resume, reporter=ProgressDisplay()), parsed.config, parsed.json)


def show(result: RunResult, config: ClassificationConfig, as_json: bool) -> None:
    """Write the report of a run that is over, and tell its figures."""
    if result.path is None:  # not the main process
        return
    report = write_report([result.path], result.path / "report.html")
    summary = result.summary
    if as_json:
        print(json.dumps({"out": str(result.path), **summary}))
        return
    last, best, name = summary["last"], summary["best"], config.metrics[0]
    label = "test top-1" if name == "top1" else f"test {name}"
    print(
        f"{label}: last epoch {last[name]:.2f} %, best {best[name]:.2f} % (epoch {best['epoch']}); "
        f"{summary['seconds']:.0f} s, {summary['ms_per_step']:.1f} ms a step",
        file=sys.stderr,
    )
    print(f"student: {result.path / 'student.safetensors'}\nreport: {report}", file=sys.stderr)
