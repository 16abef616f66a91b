"""Trains small runs of every kind and hashes what they leave, to compare the bits before and after a change.

    python benchmarks/bits.py --write before.json   # on the code before the change
    python benchmarks/bits.py --check before.json   # on the code after it; lists the runs that differ

A hash covers the student's weights, its moving average and all metrics but the times. It depends on the
processor and on torch, so compare on one machine. The runs use two threads and take about a minute.
"""

import argparse
import hashlib
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import mdistiller

TESTS = Path(__file__).resolve().parents[1] / "tests" / "tasks"
sys.path[:0] = [str(TESTS / "detection"), str(TESTS / "segmentation")]
CLOCK = ("seconds", "ms_per_step")
DIGITS = {
    "data": {"train_limit": 320, "test_limit": 100},
    "epochs": 2,
    "device": "cpu",
    "layout": "contiguous",
}


def main() -> None:
    """Writes the hashes to a file, or compares them with a file's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--check", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        found = hashes(Path(folder))
    if arguments.write is not None:
        arguments.write.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if arguments.check is None:
        print(json.dumps(found, indent=1))
        return
    known = json.loads(arguments.check.read_text(encoding="utf-8"))
    wrong = [name for name in known if found.get(name) != known[name]]
    print(
        f"{len(known) - len(wrong)} of {len(known)} runs are equal" + (f"; differ: {wrong}" if wrong else "")
    )
    sys.exit(bool(wrong))


def hashes(folder: Path) -> dict[str, str]:
    """Trains all runs in a folder; returns their hashes by name."""
    found = {}
    for group in (classification, detection, segmentation):
        for name, run in group(folder):
            path = run(folder / name)
            found[name] = digest(path)
            print(name, found[name][:12], file=sys.stderr)
    return found


def digest(run: Path) -> str:
    """Computes the hash of a run folder."""
    result = hashlib.sha256()
    for file in sorted(run.glob("*.safetensors")):
        for name, value in sorted(load_file(file).items()):
            result.update(f"{file.name} {name} {value.dtype} {list(value.shape)}".encode())
            result.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        result.update(json.dumps(timeless(json.loads(line)), sort_keys=True).encode())
    return result.hexdigest()


def timeless(value: Any) -> Any:
    """Removes the entries that depend on the clock."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in CLOCK}
    return value


Runs = list[tuple[str, Callable[[Path], Path]]]


def train(recipe: str, **changes: Any) -> Callable[[Path], Path]:
    """Returns a function that trains a recipe in a folder, and returns the folder."""
    return lambda out: (
        mdistiller.train(mdistiller.get_recipe(recipe).replace(**changes, out=out), reporter=False).folder
    )


def interrupted(recipe: str, step: int, **changes: Any) -> Callable[[Path], Path]:
    """Returns a function that trains a recipe, is interrupted after some steps, and resumes."""

    def run(out: Path) -> Path:
        config = mdistiller.get_recipe(recipe).replace(**changes, out=out, log_every=1)

        def interrupt() -> None:
            file = out / "metrics.jsonl"
            while not (file.is_file() and len(file.read_text(encoding="utf-8").splitlines()) > step):
                done.wait(0.002)
            os.kill(os.getpid(), signal.SIGINT)

        done = threading.Event()
        thread = threading.Thread(target=interrupt)
        thread.start()
        try:
            mdistiller.train(config, reporter=False)
        except (mdistiller.errors.MDistillerError, KeyboardInterrupt):
            pass
        else:
            raise SystemExit("the run ended before it was interrupted")
        finally:
            done.set()
            thread.join()
        mdistiller.train(config, resume=True, reporter=False)
        return out

    return run


def classification(folder: Path) -> Runs:
    """Returns the runs on scikit-learn's digits."""
    teacher = folder / "teacher"
    pair = {**DIGITS, "teacher": {"checkpoint": teacher}}
    cache = {"teacher_cache": folder / "cache"}
    second = {"more_teachers": ({"name": "resnet8", "checkpoint": folder / "live"},)}
    name = "digits.{}.resnet20_resnet8".format
    return [
        ("teacher", train("digits.teacher.resnet20", **DIGITS)),
        ("live", train(name("dkd"), **pair)),
        ("recorded", train(name("kd"), **pair, **cache)),
        ("cached", train(name("dkd"), **pair, **cache)),
        ("pooled", train(name("fitnet+kd"), **pair)),
        ("two-views", train(name("mlkd"), **pair)),
        ("two-views-recorded", train(name("mlkd"), **pair, teacher_cache=folder / "views")),
        ("two-views-cached", train(name("mlkd"), **pair, teacher_cache=folder / "views", seed=1)),
        ("auto", train(name("at"), **pair, method={"weight": "auto"})),
        ("wrapped", train(name("lskd-dkd+reviewkd"), **pair)),
        ("memory-bank", train(name("crd"), **pair)),
        ("new-student", train(name("simkd"), **pair)),
        ("average", train(name("dkd"), **pair, ema=0.9)),
        ("own-average", train("digits.kd.self_resnet8", **DIGITS, ema=0.9)),
        ("accumulated", train(name("dkd"), **pair, optim={"accumulate": 2})),
        ("dot", train(name("dkd"), **pair, optim={"name": "dot"})),
        ("half", train(name("dkd"), **pair, precision="bfloat16")),
        ("mixed", train(name("kd"), **pair, augment={"mixup_alpha": 0.4})),
        *(
            (f"teachers-{how}", train(name("dkd"), **pair, **second, ensemble=how))
            for how in ("logits", "losses")
        ),
        ("resumed", interrupted(name("dkd"), 7, **pair, ema=0.9, **cache)),
        ("probe", train(name("kd"), **pair, probe_epochs=1, save_best=True)),
    ]


def detection(folder: Path) -> Runs:
    """Returns the runs of tiny detectors on drawn squares."""
    from tiny_detectors import one_stage, two_stage, write_set

    root = folder / "boxes"
    root.mkdir()
    write_set(root, 8)
    write_set(root, 4, "instances_val.json", seed=1)

    @mdistiller.register_detector
    def bits_two_stage(num_classes: int, width: int = 8) -> torch.nn.Module:
        return two_stage(int(torch.randint(1000, ())), width=width, classes=num_classes)

    @mdistiller.register_detector
    def bits_one_stage(num_classes: int, width: int = 8) -> torch.nn.Module:
        return one_stage(int(torch.randint(1000, ())), width=width, classes=num_classes)

    common: dict[str, Any] = {
        "data": {"root": root, "workers": 0},
        "augment": {"short_sides": [56, 64], "long_side": 96},
        "optim": {"lr": 0.02, "clip_norm": 5.0, "lr_warmup": 0.0, "lr_warmup_steps": None},
        **{"epochs": 2, "batch_size": 2, "max_steps": None, "device": "cpu", "layout": "contiguous"},
    }
    runs: Runs = []
    for kind, methods in (
        ("two_stage", ("dkd+reviewkd", "fitnet", "pkd")),
        ("one_stage", ("bckd", "fgd", "crosskd")),
    ):
        model, teacher = f"bits_{kind}", f"boxes-{kind}"
        runs.append((teacher, train(f"small.teacher.{model}", **common)))
        for method in methods:
            changes = {**common, "teacher": {"checkpoint": folder / teacher}, "ema": 0.5}
            if method in ("fitnet", "pkd"):
                changes["method"] = {"weight": "auto" if method == "fitnet" else 1.0}
            runs.append((f"{teacher}-{method}", train(f"small.{method}.{model}_{model}", **changes)))
    return runs


def segmentation(folder: Path) -> Runs:
    """Returns the runs of segmentation models on drawn squares."""
    from masked_squares import MODEL, TEACHER, settings, write_squares

    root = folder / "masks"
    root.mkdir()
    write_squares(root, "train", 8)
    write_squares(root, "val", 4, seed=1)
    common, teacher = settings(root), folder / "masks-teacher"
    options = {"options": {"output_stride": 32}}
    runs: Runs = [("masks-teacher", train(f"coco-seg.teacher.{TEACHER}", **common, student=options))]
    for method in ("kd", "dkd+cwd+skd"):
        changes = {**common, "teacher": {"checkpoint": teacher}}
        runs.append((f"masks-{method}", train(f"coco-seg.{method}.{TEACHER}_{MODEL}", **changes)))
    return runs


if __name__ == "__main__":
    main()
