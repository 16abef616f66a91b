"""`mdistiller train RECIPE`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mdistiller.analysis.report import write_report
from mdistiller.cli.options import parse_command
from mdistiller.engine.config import TrainConfig, load_config
from mdistiller.engine.log import ProgressDisplay
from mdistiller.engine.run import train
from mdistiller.errors import ConfigError
from mdistiller.methods import load_plugin
from mdistiller.recipes import get_recipe, set_method, with_method

USAGE = """\
usage: mdistiller train RECIPE [options]

RECIPE is FAMILY.METHOD.TEACHER_STUDENT, FAMILY.teacher.MODEL or FAMILY.student.MODEL (families: cifar100,
digits, folder, imagenet), or the config.json of an earlier run. METHOD is a name from `mdistiller list
methods`, a sum A+B, or A-B for A around B; the teacher `self` is the student's moving average. Examples:

  mdistiller train cifar100.dkd.resnet32x4_resnet8x4 --data.root DIR --teacher.checkpoint FILE
  mdistiller train folder.dkd.timm/resnet50_timm/resnet18 --data.root DIR --teacher.checkpoint FILE
  mdistiller train imagenet.dkd.resnet34_resnet18 --data.root DIR
  mdistiller train runs/RUN/config.json --seed 1

`mdistiller train RECIPE --help` shows every option with the recipe's defaults, `mdistiller list recipes`
the known recipes. Several processes: torchrun --nproc-per-node N -m mdistiller train RECIPE [options]"""


@dataclass(frozen=True)
class TrainCommand:
    """Train or distil a student, and write a run folder."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    method_name: Annotated[str | None, tyro.conf.arg(name="method")] = None
    """Another method than the recipe's, with its default hyper-parameters."""
    plugin: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """A Python file whose @register calls add methods or models (code: it is run). May be given again."""
    resume: bool = False
    """Go on from the last state in the run folder."""
    json: bool = False
    """Print the summary as JSON on stdout."""


def parse(args: Sequence[str]) -> TrainCommand:
    """The command of an argument list; recipe, plug-ins and method are needed before the other fields."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--plugin", action="append", default=[], type=Path)
    early.add_argument("--method")
    recipe = args[0]
    try:
        known, rest = early.parse_known_args(list(args[1:]))
    except argparse.ArgumentError:
        raise ConfigError("--plugin needs a file, --method a name") from None
    for path in known.plugin:
        load_plugin(path)
    if recipe.endswith(".json"):
        config = _from_file(Path(recipe), known.method, resume="--resume" in rest)
    else:
        config = get_recipe(recipe, known.method)
    plugins = (*config.plugins, *(path.resolve() for path in known.plugin))
    config = config.model_copy(update={"plugins": tuple(dict.fromkeys(plugins))})
    return parse_command(TrainCommand, rest, prog=f"mdistiller train {recipe}", default=TrainCommand(config))


def _from_file(path: Path, method: str | None, *, resume: bool) -> TrainConfig:
    """A stored config. Resuming goes on where the file lies; a repeat writes to a folder of its own."""
    config = load_config(path).model_copy(update={"out": path.parent if resume else None})
    if method is None:
        return config
    return set_method(config, method).model_copy(update={"recipe": with_method(config.recipe, method)})


def command(args: Sequence[str]) -> None:
    """Run `mdistiller train`."""
    if not args or args[0].startswith("-"):
        if args and args[0] in ("-h", "--help"):
            print(USAGE)
            return
        raise ConfigError("train needs a recipe first; see mdistiller train --help")
    parsed = parse(args)
    result = train(parsed.config, resume=parsed.resume, reporter=ProgressDisplay())
    if result.path is None:  # not the main process
        return
    report = write_report([result.path], result.path / "report.html")
    summary = result.summary
    if parsed.json:
        print(json.dumps({"out": str(result.path), **summary}))
        return
    last, best = summary["last"], summary["best"]
    print(
        f"test top-1: last epoch {last['top1']:.2f} %, best {best['top1']:.2f} % (epoch {best['epoch']}); "
        f"{summary['seconds']:.0f} s, {summary['ms_per_step']:.1f} ms a step",
        file=sys.stderr,
    )
    print(f"student: {result.path / 'student.safetensors'}\nreport: {report}", file=sys.stderr)
