"""`mdistiller detect train RECIPE` and `mdistiller detect eval CHECKPOINT`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from mdistiller.cli.options import parse_command
from mdistiller.cli.train import choose_config, show
from mdistiller.errors import ConfigError, UnknownNameError
from mdistiller.models import ModelConfig
from mdistiller.models.registry import Options
from mdistiller.models.weights import read_metadata
from mdistiller.recipes.coco import get_detection_recipe, set_detection_method
from mdistiller.runs.progress import ProgressDisplay
from mdistiller.tasks.detection.config import DetectionConfig, DetectionDataConfig
from mdistiller.tasks.detection.loader import load_split
from mdistiller.tasks.detection.models import build_detector
from mdistiller.tasks.detection.run import DetectionEvaluator, train_detector
from mdistiller.training.distributed import process_group

USAGE = """\
usage: mdistiller detect train RECIPE [options]
       mdistiller detect eval CHECKPOINT [options]

train: RECIPE is FAMILY.METHOD.ARCHITECTURE_TEACHER_STUDENT, FAMILY.teacher.DETECTOR or
FAMILY.student.DETECTOR (families: coco, small), or the folder of an earlier run, or its config.json.
ARCHITECTURE is fasterrcnn, maskrcnn, retinanet or fcos; TEACHER and STUDENT are resnet18, resnet34, resnet50,
resnet101 or mobilenet_v2; DETECTOR is ARCHITECTURE_BACKBONE; METHOD is kd, dkd, fitnet, fgfi, reviewkd, bckd,
another one on logits, or a sum A+B.

  mdistiller detect train small.teacher.fasterrcnn_resnet50 --data.root DIR --out runs/teacher
  mdistiller detect train small.dkd+reviewkd.fasterrcnn_resnet50_resnet18 --data.root DIR \\
    --teacher.checkpoint runs/teacher
  mdistiller detect train runs/RUN --resume

eval: AP, AP50, AP75, APs, APm and APl of a run folder or a checkpoint on a test set, and AP by category.

  mdistiller detect eval runs/RUN --data.root DIR

`mdistiller detect train RECIPE --help` and `mdistiller detect eval --help` show every option. With --json the
result goes to stdout. Several processes: torchrun --nproc-per-node N -m mdistiller detect train RECIPE …"""

FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@dataclass(frozen=True)
class DetectTrainCommand:
    """Train or distil a detector, and write a run folder."""

    config: Annotated[DetectionConfig, tyro.conf.arg(name="")]
    method_name: Annotated[str | None, tyro.conf.arg(name="method")] = None
    """Another method than the recipe's, with its default hyper-parameters for detectors."""
    plugin: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """Python file that registers methods, models and data sets (code: it is run). May be given again."""
    resume: bool = False
    """Go on from the last state in the run folder."""
    json: bool = False
    """Print the summary as JSON on stdout."""


@dataclass(frozen=True)
class DetectEvalCommand:
    """Average precision of a detector on a test set, in percent."""

    checkpoint: tyro.conf.Positional[Path]
    """Its weights: a run folder, or a .safetensors or torch file."""
    data: DetectionDataConfig = field(default_factory=DetectionDataConfig)
    detector: str | None = None
    """Its name, ARCHITECTURE_BACKBONE or torchvision/NAME. None: the one that the checkpoint names, with its
    options."""
    options: Options = field(default_factory=dict)
    """Further arguments of `create_detector`, such as `short_side 240`; they go before the checkpoint's."""
    batch_size: int = 1
    """Images at a time. They are padded to one size, which changes predictions a little."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Autocast precision."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    json: bool = False
    """Print the figures as JSON on stdout."""


def command(args: Sequence[str]) -> None:
    """Run `mdistiller detect`."""
    if args and args[0] in ("-h", "--help"):
        print(USAGE)
        return
    if not args:
        raise ConfigError("detect needs train or eval first; see mdistiller detect --help")
    if args[0] not in ("train", "eval"):
        raise UnknownNameError(
            "command of detect", args[0], ("train", "eval"), "See mdistiller detect --help"
        )
    if args[0] == "eval":
        _evaluate(args[1:])
    elif len(args) > 1 and args[1] in ("-h", "--help"):
        print(USAGE)
    else:
        parsed = parse_train(args[1:])
        result = train_detector(parsed.config, resume=parsed.resume, reporter=ProgressDisplay())
        show(result, parsed.config, parsed.json)


def parse_train(args: Sequence[str]) -> DetectTrainCommand:
    """The command of an argument list."""
    config, rest = choose_config(args, DetectionConfig, get_detection_recipe, set_detection_method)
    prog = f"mdistiller detect train {args[0]}"
    return parse_command(DetectTrainCommand, rest, prog=prog, default=DetectTrainCommand(config))


def _evaluate(args: Sequence[str]) -> None:
    c = parse_command(DetectEvalCommand, args, prog="mdistiller detect eval")
    if c.batch_size < 1:
        raise ConfigError(f"batch_size: got {c.batch_size}; allowed: 1 or more")
    with process_group(c.device) as here:
        about = read_metadata(c.checkpoint)
        name = c.detector or about.get("detector")
        if name is None:
            raise ConfigError(f"detector: {c.checkpoint} does not name its detector; give --detector NAME")
        images = load_split(c.data, "test")
        classes = [category for _, _, category in images.categories]
        if "classes" in about and about["classes"] != classes:
            raise ConfigError(
                f"data: {c.checkpoint} was trained on the {len(about['classes'])} categories "
                f"{_some(about['classes'])}; the data has {len(classes)}: {_some(classes)}"
            )
        config = ModelConfig(name=name, checkpoint=c.checkpoint, options=c.options)
        model = build_detector(config, images.num_classes).to(here.device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        precision = getattr(torch, c.precision)
        evaluator = DetectionEvaluator(
            images, c.batch_size, here, precision=precision, workers=c.data.workers
        )
        figures = evaluator({"": model})
    if not here.is_main:
        return
    if c.json:
        told = {"detector": name, "checkpoint": str(c.checkpoint), "images": len(images), **figures}
        print(json.dumps(told))
        return
    print(_line("boxes", figures) + f"  ({len(images):,} images)")
    if "masks" in figures:
        print(_line("masks", figures["masks"]))
    width = max(map(len, figures["categories"]))
    for category, value in figures["categories"].items():
        masks = f"  masks {_percent(figures['masks']['categories'][category])}" if "masks" in figures else ""
        print(f"  {category:{width}}  AP {_percent(value)}{masks}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def _line(what: str, figures: dict[str, Any]) -> str:
    return f"{what}: " + "  ".join(f"{name} {_percent(figures[name])}" for name in FIGURES)


def _percent(value: float | None) -> str:
    return "    –" if value is None else f"{value:5.2f}"
