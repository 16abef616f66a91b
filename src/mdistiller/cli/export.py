"""`mdistiller export RUN`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from mdistiller.cli.options import CommonFlags, parse_command
from mdistiller.deploy.export import export_student, measured_rows
from mdistiller.training.deployment import Format


@dataclass(frozen=True)
class ExportCommand(CommonFlags):
    """Write the student alone into a folder with a model card. Its file is checked against the student."""

    run: tyro.conf.Positional[Path]
    """A run folder, or a student's file in one, such as RUN/student-e60.safetensors."""
    format: Format = "safetensors"
    """safetensors: weights, opened by this package. torch-export (classifiers), onnx: a graph, for batches of
    any size, or for one image of any size (detectors). onnx needs
    `pip install onnx onnxruntime onnxscript`."""
    out: Path | None = None
    """The folder to write, new or empty. None: export/FILE-FORMAT in the run folder."""
    ema: bool = False
    """Export the moving average of the student."""
    int8: bool = False
    """Quantise weights and activations to eight bits, with ranges from 200 training images of the run. Only
    with --format onnx, for classifiers."""
    eval: bool = True
    """Evaluate the exported file, and the student, on the run's test set."""
    device: str = "auto"
    """Device of the evaluation: auto (a GPU if there is one), cpu, cuda or cuda:N. ONNX runs on the CPU."""


def command(args: Sequence[str]) -> None:
    """Runs `mdistiller export`."""
    c = parse_command(ExportCommand, args, prog="mdistiller export")
    out, card = export_student(
        c.run, c.format, out=c.out, ema=c.ema, int8=c.int8, evaluate=c.eval, device=c.device
    )
    if c.json:
        print(json.dumps({"out": str(out), **card.model_dump(mode="json")}))
        return
    check = card.check
    shapes = " and ".join("x".join(map(str, shape)) for shape in check.input_shapes)
    print(out)
    allowed = "int8 rounds"
    if check.tolerance is not None:
        allowed = f"allowed: {check.tolerance * check.largest_output:.1e}"
    print(
        f"largest difference to the student's outputs {check.largest_difference:.1e} on inputs {shapes} "
        f"({allowed})"
    )
    for name, value in measured_rows(card).items():
        print(f"{name}: {value}")
    if card.measured is None:
        why = "--no-eval" if not c.eval else "the run's test set is not at hand"
        print(f"accuracy of this file: not measured ({why})")
