"""`mdistiller export RUN`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from mdistiller.cli.options import CommonFlags, parse_command
from mdistiller.deploy.export import export_student
from mdistiller.training.deployment import Format


@dataclass(frozen=True)
class ExportCommand(CommonFlags):
    """Write the student alone into a folder with a model card. Its file is checked against the student."""

    run: tyro.conf.Positional[Path]
    """A run folder, or a student's file in one, such as RUN/student-e60.safetensors."""
    format: Format = "safetensors"
    """safetensors: weights, opened by this package. torch-export (classifiers), onnx: a graph, for batches of
    any size, or for one image of any size (detectors); onnx needs `pip install 'mdistiller[onnx]'`."""
    out: Path | None = None
    """The folder to write, new or empty. None: export/FILE-FORMAT in the run folder."""
    ema: bool = False
    """Export the moving average of the student."""


def command(args: Sequence[str]) -> None:
    """Runs `mdistiller export`."""
    c = parse_command(ExportCommand, args, prog="mdistiller export")
    out, card = export_student(c.run, c.format, out=c.out, ema=c.ema)
    if c.json:
        print(json.dumps({"out": str(out), **card.model_dump(mode="json")}))
        return
    check = card.check
    shapes = " and ".join("x".join(map(str, shape)) for shape in check.input_shapes)
    print(out)
    print(
        f"largest difference to the student's outputs {check.largest_difference:.1e} on inputs {shapes} "
        f"(allowed: {check.tolerance * check.largest_output:.1e})"
    )
