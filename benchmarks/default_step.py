"""One training step with the settings that a run chooses for itself, beside contiguous float32.

    OMP_NUM_THREADS=1 python benchmarks/default_step.py [--rounds 12] [--out results/default_step]

The student trains alone. Rows: the run's own choice (`precision` and `layout` auto); float32, contiguous. The
rows take turns, a step each; processor milliseconds, medians without the first two rounds. A ratio is the
median over rounds of the row's time divided by that of contiguous float32 in the same round.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steps import steps_of
from turns import paired_ratio

from mdistiller.data import DataConfig
from mdistiller.models import ModelConfig
from mdistiller.report.markup import markdown_table
from mdistiller.runs.environment import environment
from mdistiller.runs.progress import Reporter
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.training.build import build_run
from mdistiller.training.choose import build_fastest
from mdistiller.training.distributed import process_group
from mdistiller.training.task import get_task

MODELS = (
    *(("resnet8x4", 32, 64), ("MobileNetV2", 32, 64), ("ShuffleV1", 32, 64), ("ShuffleV2", 32, 64)),
    *(("timm/efficientnet_lite0", 96, 32), ("torchvision/efficientnet_b0", 96, 32)),
    ("torchvision/mobilenet_v2", 96, 32),
)
PLAIN = "float32, contiguous"


def measure(name: str, size: int, batch: int, rounds: int) -> dict[str, Any]:
    """Builds both trainers of a model, and times their steps in turn."""
    data = DataConfig(
        kind="synthetic", synthetic_samples=4 * batch, synthetic_classes=100, image_size=size, test_limit=8
    )
    config = ClassificationConfig(
        data=data,
        student=ModelConfig(name=name),
        batch_size=batch,
        epochs=200,
        precision="auto",
        device="cpu",
    )
    task = get_task("classification")
    with process_group("cpu") as world:
        chosen, trainer, source = build_fastest(task, config, world, Reporter())
        rows: dict[str, tuple[Callable[[], None], list[float]]] = {
            "the run's choice": (steps_of(trainer, source), [])
        }
        plain = config.replace(precision="float32", layout="contiguous")
        rows[PLAIN] = (steps_of(*build_run(task, plain, world)), [])
        for _ in range(rounds):
            for step, times in rows.values():
                start = time.process_time()
                step()
                times.append(1000 * (time.process_time() - start))
    counted = {key: found[2:] for key, (_, found) in rows.items()}
    ratio = {key: paired_ratio(found, counted[PLAIN]) for key, found in counted.items()}
    return {
        "model": name,
        "pixels": size,
        "batch": batch,
        "choice": f"{chosen.precision}, {chosen.layout}",
        "ms": {key: statistics.median(found) for key, found in counted.items()},
        "ratio": ratio,
        "times": counted,
    }


def main() -> None:
    """Prints the table, and writes it with the times of all rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = []
    for model in MODELS:
        found.append(measure(*model, args.rounds))
        print({key: found[-1][key] for key in ("model", "choice", "ms", "ratio")}, flush=True)
    head = ["model", "pixels, batch", "choice", *(f"{key}, ms" for key in found[0]["ms"]), "ratio"]
    cells = [
        [
            row["model"],
            f"{row['pixels']}, {row['batch']}",
            row["choice"],
            *(f"{ms:.0f}" for ms in row["ms"].values()),
            f"{row['ratio'][next(iter(row['ratio']))]:.2f}",
        ]
        for row in found
    ]
    table = markdown_table(head, cells)
    print(table)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "default_step.md").write_text(table, encoding="utf-8")
        log = {"environment": environment(0), "rounds": args.rounds, "rows": found}
        (args.out / "default_step.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
