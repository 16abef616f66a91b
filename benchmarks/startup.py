"""Processor seconds (user and system) that commands take before they do their work, beside `import torch`.

    python benchmarks/startup.py [--rounds 5]

The commands take turns; a row is the median of all rounds.
"""

import argparse
import os
import statistics
import subprocess
import sys

PAIR = "cifar100.dkd.resnet32x4_resnet8x4"
DETECTORS = "coco.dkd.fasterrcnn_resnet101_resnet18"
COMMANDS = (
    "--version",
    "--help",
    "list methods",
    "list models",
    "list recipes",
    f"train {PAIR} --help",
    f"train {DETECTORS} --help",
    "train a.recipe.that_is_unknown",
    *(f"{name} --help" for name in ("eval", "export", "predict", "compare", "report", "reproduce", "bench")),
)


def cpu_seconds(command: list[str]) -> float:
    """Runs a command and returns the processor seconds of its process and of those that it started."""
    before = os.times()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    rows = {"import torch": [sys.executable, "-c", "import torch"]}
    rows |= {f"mdistiller {c}": [sys.executable, "-m", "mdistiller", *c.split()] for c in COMMANDS}
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, command in rows.items():
            seconds[name].append(cpu_seconds(command))
    print("| command | CPU s |\n| --- | --- |")
    for name, found in seconds.items():
        print(f"| {name} | {statistics.median(found):.2f} |")


if __name__ == "__main__":
    main()
