"""Memory and time of the losses of a large vocabulary: from all logits, and chunk by chunk.

    OMP_NUM_THREADS=1 python benchmarks/linear_losses.py [--width 256] [--rounds 5]

A step is the loss and its gradients for hidden states and weights of the student. Each variant is a process
of its own; they take turns. Peak memory is the growth of the process's largest resident set by the first
step, all gradients included, in units of one float32 tensor [rows, vocabulary].
"""

import argparse
import json
import resource
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from turns import paired_ratio, serve, take_turns

from mdistiller.functional import dkd_loss, kd_loss

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from large_vocabulary import linear_dkd_loss, linear_kd_loss

VARIANTS = ("dkd_loss", "linear_dkd_loss", "kd_loss", "linear_kd_loss")


def step_of(variant: str, rows: int, vocabulary: int, width: int) -> Callable[[], None]:
    """Builds the step of a variant."""
    torch.manual_seed(0)
    hidden, teacher = torch.randn(rows, width, requires_grad=True), torch.randn(rows, width)
    # In place, because memory of temporaries would be free for the step, which is measured by the peak.
    weight, teacher_weight = (torch.empty(vocabulary, width).normal_(std=width**-0.5) for _ in range(2))
    weight.requires_grad_()
    target = torch.randint(vocabulary, (rows,))

    def loss() -> Tensor:
        given = hidden, weight, teacher, teacher_weight
        if variant == "linear_dkd_loss":
            return linear_dkd_loss(*given, target)
        if variant == "linear_kd_loss":
            return linear_kd_loss(*given)
        with torch.no_grad():
            teacher_logits = F.linear(teacher, teacher_weight)
        logits = F.linear(hidden, weight)
        if variant == "dkd_loss":
            return dkd_loss(logits, teacher_logits, target)
        return kd_loss(logits, teacher_logits)

    def step() -> None:
        hidden.grad = weight.grad = None
        loss().backward()

    return step


def worker(variant: str, rows: int, vocabulary: int, width: int, memory: Path) -> None:
    """Writes the growth in bytes of the first step and then serves further steps."""
    small = step_of(variant, 8, 64, 8)
    small()
    step = step_of(variant, rows, vocabulary, width)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    memory.write_text(str(1024 * growth))
    serve(step)


def main() -> None:
    """Measures all variants and writes `linear_losses.json` and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("results/linear_losses"))
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    given = parser.parse_args()
    sizes = given.rows, given.vocabulary, given.width
    given.out.mkdir(parents=True, exist_ok=True)
    if given.variant:
        worker(given.variant, *sizes, given.out / f"{given.variant}.bytes")
        return
    flags = [f"--{n}={v}" for n, v in zip(("rows", "vocabulary", "width"), sizes, strict=True)]
    words = [sys.executable, __file__, *flags, "--out", str(given.out)]
    times = take_turns({v: [*words, "--variant", v] for v in VARIANTS}, given.rounds, 1)
    unit, rows = 4 * given.rows * given.vocabulary, []
    for variant in VARIANTS:
        file = given.out / f"{variant}.bytes"
        cpu = [turn[0] for turn in times[variant]]
        plain = [turn[0] for turn in times[variant.removeprefix("linear_")]]
        rows.append(
            {
                "variant": variant,
                "peak": int(file.read_text()) / unit,
                "cpu_ms": statistics.median(cpu),
                "ratio": paired_ratio(cpu, plain),
                "turns_cpu_ms": cpu,
            }
        )
        file.unlink()
    facts = {"rows": sizes[0], "vocabulary": sizes[1], "width": sizes[2], "threads": torch.get_num_threads()}
    facts |= {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
    name = f"{sizes[0]}x{sizes[1]}x{sizes[2]}.json"
    (given.out / name).write_text(json.dumps(facts | {"variants": rows}, indent=1) + "\n")
    print("| | peak memory | CPU ms a step | ratio |\n| --- | ---: | ---: | ---: |")
    for row in rows:
        print(f"| `{row['variant']}` | {row['peak']:.2f} | {row['cpu_ms']:.0f} | {row['ratio']:.2f} |")


if __name__ == "__main__":
    main()
