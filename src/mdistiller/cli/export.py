"""`mdistiller export RUN`."""

import json
from pathlib import Path

from mdistiller.cli.flags import Positional
from mdistiller.cli.options import Command
from mdistiller.deploy.card import measured_rows
from mdistiller.deploy.export import export_student
from mdistiller.deploy.outputs import export_outputs
from mdistiller.training.deployment import Format


class ExportCommand(Command):
    """Write the student alone into a folder with a model card. Its file is checked against the student."""

    run: Positional[Path]
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
    """Quantize weights and activations to eight bits, with ranges from 200 training images of the run. Only
    with --format onnx, for classifiers."""
    teacher_outputs: Path | None = None
    """Write the logits and features in the run's teacher cache to FILE.npz, FILE.parquet or FILE.safetensors,
    which `train --teacher-outputs` reads, instead of exporting the student."""
    view: int | None = None
    """With --teacher-outputs: which augmented view of each image to write, from 0, where the cache has
    several."""
    top: int | None = None
    """With --teacher-outputs: write log-probabilities of this many most likely classes only."""
    eval: bool = True
    """Evaluate the exported file, and the student, on the run's test set."""
    device: str = "auto"
    """Device of the evaluation: auto (a GPU if there is one), cpu, cuda or cuda:N. ONNX runs on the CPU."""

    def execute(self) -> None:
        if self.teacher_outputs is not None:
            rows = export_outputs(self.run, self.teacher_outputs, view=self.view, top=self.top)
            line = {"out": str(self.teacher_outputs), "images": rows}
            print(json.dumps(line) if self.as_json else f"{self.teacher_outputs}\n{rows:,} images")
            return
        out, card = export_student(
            self.run,
            self.format,
            out=self.out,
            ema=self.ema,
            int8=self.int8,
            evaluate=self.eval,
            device=self.device,
        )
        if self.as_json:
            print(json.dumps({"out": str(out), **card.model_dump(mode="json")}))
            return
        check = card.check
        shapes = ", ".join("x".join(map(str, shape)) for shape in check.input_shapes)
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
            why = "--no-eval" if not self.eval else "the run's test set is not at hand"
            print(f"accuracy of this file: not measured ({why})")
