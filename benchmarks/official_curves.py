"""First epochs of recipes on CIFAR-100, held against the logs that a method's authors published.

    nice -n 19 python benchmarks/official_curves.py --data-root DIR --teachers DIR --out DIR

A run is the recipe as it stands, 240 epochs or more, and is stopped after the first ones, so that its
learning rate and its schedules are those of the whole run. Every start goes on where the last one ended,
within an epoch too, and `--epochs` may grow. The numbers of some logs stand in official_curves.toml; `--logs`
reads them, and those of further pairs, from a clone of sunshangquan/logit-standardization-KD. Of a method
with two views, the logs count the weak view alone and a run counts both, so only test images are compared.
Exit status 1: outside of the band.
"""

import json
import os
import re
import signal
import sys
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from flags import read

from mdistiller import RunConfig, get_recipe, train
from mdistiller.errors import Interrupted, TrainingError
from mdistiller.methods import get_method
from mdistiller.runs.environment import environment
from mdistiller.runs.progress import ProgressDisplay
from mdistiller.settings import Settings

VENDORED = Path(__file__).with_suffix(".toml")
RESULTS = Path(__file__).resolve().parents[1] / "results" / "official_curves"
# Largest differences in points. The training images differ by the seed and the teacher; the test images in
# the first epochs by the last updates too: a log of 240 epochs moves by 7 points from one epoch to the next.
BAND = {"train": 1.5, "test": 5.0}


class Command(Settings):
    """Train the first epochs, or compare those that are there."""

    data_root: Path
    """Folder of CIFAR-100."""
    teachers: Path
    """Folder with NAME.pt of each teacher."""
    out: Path
    """Folder of the runs, outside the repository."""
    recipes: tuple[str, ...] = ("cifar100.lskd.resnet56_resnet20",)
    """Recipes to train, `cifar100.METHOD.PAIR`."""
    epochs: int = 2
    """First epochs to train and compare."""
    logs: Path | None = None
    """Folder `logs` of the authors' repository. None: official_curves.toml."""
    precision: str = "float32"
    """Precision of the runs."""
    results: Path = RESULTS
    """Folder for curves.json and curves.md."""
    run: bool = True
    """Train; otherwise only compare the runs that are there."""


class Curve(NamedTuple):
    """Top-1 in percent after each epoch, of training and of test images."""

    train: list[float]
    test: list[float]


def read_log(path: Path) -> Curve:
    """Reads the accuracies of an official log.

    Raises:
        SystemExit: the file has none.
    """
    text = path.read_text(encoding="utf-8")
    curve = Curve(
        *([float(x) for x in re.findall(rf"^{n}_acc: ([\d.]+)", text, re.M)] for n in Curve._fields)
    )
    if not curve.train or len(curve.train) != len(curve.test):
        raise SystemExit(f"{path}: expected as many train_acc as test_acc; got {[*map(len, curve)]}")
    return curve


def official(recipe: str, logs: Path | None) -> tuple[str, Curve]:
    """Returns the name of a recipe's official log and its accuracies.

    Raises:
        SystemExit: there is no such log, or more than one.
    """
    vendored = tomllib.loads(VENDORED.read_text(encoding="utf-8"))
    if logs is None:
        if recipe not in vendored:
            raise SystemExit(f"recipe {recipe!r}: {VENDORED.name} has {', '.join(vendored)}; or give --logs")
        entry = vendored[recipe]
        return entry["file"], Curve(entry["train"], entry["test"])
    if recipe in vendored:
        found = [logs / vendored[recipe]["file"]]
    else:
        _, method, pair = recipe.split(".", 2)
        base = method.removeprefix("lskd").removeprefix("-") or "kd"
        every = sorted((logs / base.upper()).glob(f"{base},*.txt"))
        found = [path for path in every if "_".join(path.stem.split(",")[1:3]) == pair]
    if len(found) != 1:
        raise SystemExit(f"recipe {recipe!r}: found {len(found)} logs below {logs}; expected one")
    return str(found[0].relative_to(logs)), read_log(found[0])


class StopAfter(ProgressDisplay):
    """Progress display that asks the run to stop after an epoch, as a signal from outside would."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.epoch = epoch

    def evaluated(self, line: dict[str, Any]) -> None:
        super().evaluated(line)
        if line["epoch"] >= self.epoch:
            os.kill(os.getpid(), signal.SIGTERM)


def configure(recipe: str, command: Command) -> RunConfig:
    """Returns the config of a recipe for this machine."""
    config = get_recipe(recipe)
    assert config.teacher is not None
    return config.replace(
        data={"root": command.data_root},
        teacher={"checkpoint": command.teachers / f"{config.teacher.name}.pt"},
        precision=command.precision,
        diagnostics=False,
        out=command.out / recipe,
    )


def measured(folder: Path) -> Curve:
    """Reads the accuracies of a run's epochs so far."""
    curve, path = Curve([], []), folder / "metrics.jsonl"
    for line in map(json.loads, path.read_text(encoding="utf-8").splitlines() if path.exists() else ()):
        if line["kind"] == "eval":
            curve.train.append(line["train"]["top1"])
            curve.test.append(line["top1"])
    return curve


def first_epochs(recipe: str, command: Command) -> Curve:
    """Trains the first epochs of a recipe, or what is missing of them; returns their accuracies.

    Raises:
        SystemExit: the run was stopped from outside, or failed, before its epochs were done.
    """
    config = configure(recipe, command)
    assert config.out is not None
    if command.run and len(measured(config.out).test) < command.epochs:
        try:
            train(config, resume=(config.out / "config.json").exists(), reporter=StopAfter(command.epochs))
        except (Interrupted, TrainingError) as error:
            if len(measured(config.out).test) < command.epochs:
                raise SystemExit(f"{recipe}: {error}") from error
    curve = measured(config.out)
    return Curve(*(values[: command.epochs] for values in curve))


def differences(ours: Curve, theirs: Curve, *, num_views: int) -> dict[str, list[float]]:
    """Computes ours minus theirs in points, for the epochs that both have and the images that compare."""
    names = Curve._fields if num_views == 1 else ("test",)
    pairs = {name: zip(getattr(ours, name), getattr(theirs, name), strict=False) for name in names}
    return {name: [round(a - b, 2) for a, b in found] for name, found in pairs.items()}


def is_close(found: dict[str, list[float]]) -> bool:
    """Whether there are differences, and all lie in their band."""
    return all(values and max(map(abs, values)) <= BAND[name] for name, values in found.items())


def main(command: Command) -> None:
    """Trains, compares, and writes the comparison."""
    lines = ["| recipe | epoch | images | here | official log | difference | band |", "| --- " * 7 + "|"]
    record: dict[str, Any] = {"band": BAND, "runs": {}}
    close = True
    for recipe in command.recipes:
        name, theirs = official(recipe, command.logs)
        ours, config = first_epochs(recipe, command), configure(recipe, command)
        num_views = getattr(config.method, "num_views", get_method(config.method.method_name).needs.views)
        found = differences(ours, theirs, num_views=num_views)
        close &= is_close(found)
        for images, values in found.items():
            for epoch, value in enumerate(values):
                a, b = getattr(ours, images)[epoch], getattr(theirs, images)[epoch]
                cells = (f"`{recipe}`", epoch + 1, images, f"{a:.2f}", f"{b:.2f}", f"{value:+.2f}")
                lines.append(f"| {' | '.join(map(str, cells))} | ±{BAND[images]:g} |")
        record["runs"][recipe] = {
            "log": name,
            "method": config.method.model_dump(mode="json"),
            "precision": command.precision,
            "ours": ours._asdict(),
            "official": {key: values[: len(ours.test)] for key, values in theirs._asdict().items()},
        }
    table = "\n".join(lines) + "\n"
    print(table)
    env = environment(0)
    del env["command"]  # it has paths; the command stands at the top
    command.results.mkdir(parents=True, exist_ok=True)
    (command.results / "curves.json").write_text(json.dumps({"environment": env, **record}, indent=1) + "\n")
    (command.results / "curves.md").write_text(table, encoding="utf-8")
    if not close:
        sys.exit(1)


if __name__ == "__main__":
    main(read(Command))
