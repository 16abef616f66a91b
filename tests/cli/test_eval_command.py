"""`mdistiller eval`: the metrics of a run again, and the published ones of real teachers."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import pytest
from pydantic import create_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mdistiller import load_student
from mdistiller.errors import ConfigError
from mdistiller.tasks.classification import ClassificationConfig, ClassificationTask
from mdistiller.training.task import _TASKS, Task

SHARED = Path(__file__).resolve().parents[3] / "shared"


def last(cli, run: Path) -> dict:
    return next(line for line in reversed(cli.metrics(run)) if line["kind"] == "eval")


@pytest.mark.parametrize("name", [".", "student.safetensors"])
def test_a_student_has_the_figures_of_its_last_epoch(cli, student_run, name):
    done = cli("eval", "resnet8", "--checkpoint", student_run / name, *cli.DATA, "--json")
    found = done.json()
    expected = last(cli, student_run)
    assert found["top1"] == expected["top1"]
    assert found["top5"] == expected["top5"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert (found["model"], found["images"]) == ("resnet8", 32)
    assert found["checkpoint"] == str(student_run / name)
    metrics = {"top1", "top5", "loss", "balanced_accuracy", "macro_f1", "classes"}
    assert set(found) == {"model", "checkpoint", "images", *metrics}


@pytest.mark.parametrize("batch", [1, 7, 32])
def test_batches_make_no_difference(cli, student_run, batch):
    argv = ("--checkpoint", student_run, *cli.DATA, "--json", "--batch-size", batch)
    found, expected = cli("eval", "resnet8", *argv).json(), last(cli, student_run)
    assert (found["top1"], found["images"]) == (expected["top1"], 32)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)


@pytest.fixture(scope="module")
def odd_run(cli, teacher_run, tmp_path_factory):
    """A run whose settings are none of `eval`'s defaults, and whose student its method extended."""
    out = tmp_path_factory.mktemp("runs") / "odd"
    done = cli(
        *("train", "digits.simkd.resnet8_resnet8", *cli.FAST, "--data.image-size", 24, "--data.seed", 2),
        *(
            "--data.test-limit",
            20,
            "--eval-batch-size",
            7,
            "--precision",
            "bfloat16",
            "--layout",
            "contiguous",
        ),
        *("--teacher.checkpoint", teacher_run, "--epochs", 1, "--out", out),
    )
    assert done.code == 0, done.err
    return out


@pytest.mark.parametrize(
    "argv", [(".",), ("student.safetensors",), ("resnet8", "--checkpoint", ".")], ids=["run", "file", "model"]
)
def test_a_run_is_evaluated_as_it_was(cli, odd_run, argv):
    words = [odd_run / word if word in (".", "student.safetensors") else word for word in argv]
    done = cli("eval", *words, "--device", "cpu", "--json")
    expected = last(cli, odd_run)
    found = done.json()
    assert {name: found[name] for name in ("top1", "top5", "loss")} == {
        name: expected[name] for name in ("top1", "top5", "loss")
    }
    assert (found["model"], found["images"], done.err) == ("resnet8", 20, "")


def test_flags_go_before_the_runs_settings(cli, odd_run):
    argv = ("eval", odd_run, "--device", "cpu", "--json")
    assert cli(*argv, "--data.test-limit", 8).json()["images"] == 8
    with pytest.warns(UserWarning, match="was trained at 24 pixels and is evaluated at 16"):
        other = cli(*argv, "--data.image-size", 16).json()
    assert other["loss"] != last(cli, odd_run)["loss"]
    assert cli(*argv, "--precision", "float32").json()["loss"] != last(cli, odd_run)["loss"]


def test_what_is_no_run_needs_a_checkpoint(cli, student_run, tmp_path):
    done = cli("eval", "resnet8")
    words = "mdistiller: checkpoint: 'resnet8' is no run folder; a model's name needs --checkpoint FILE"
    assert (done.code, done.message) == (2, words)
    file = tmp_path / "student.safetensors"
    save_file(load_file(student_run / file.name), file)  # without metadata
    done = cli("eval", tmp_path)
    assert done.code == 2
    assert f"{tmp_path} has no config.json; give the model's name and --checkpoint {tmp_path}" in done.message
    assert cli("eval", "resnet8", "--checkpoint", tmp_path, *cli.DATA).code == 0
    file.unlink()
    done = cli("eval", tmp_path)
    assert (done.code, "has no student.safetensors: no run folder" in done.message) == (1, True)


def test_the_model_may_stand_behind_flags(cli, student_run):
    argv = ("--checkpoint", student_run, *cli.DATA, "--json")
    assert cli("eval", *argv, "resnet8").json() == cli("eval", "resnet8", *argv).json()


def test_a_task_without_these_hooks_is_2(cli, student_run, tmp_path, monkeypatch):
    """A task need not evaluate, export or predict with its stored students; the message says so."""

    class Toy(ClassificationTask):
        name = "toy_of_eval_test"
        Config = create_model("ToyConfig", __base__=ClassificationConfig, task=(str, name))
        evaluate, check_model, load_student = Task.evaluate, Task.check_model, Task.load_student
        deployment = Task.deployment

    monkeypatch.setitem(_TASKS, Toy.name, Toy())
    run = tmp_path / "run"
    done = cli("train", "digits.student.resnet8", *cli.FAST, "--max-steps", 1, "--out", run)
    assert done.code == 0, done.err
    config = cli.config(run) | {"task": Toy.name}
    (run / "config.json").write_text(json.dumps(config))
    with safe_open(run / "student.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["mdistiller"]) | {"task": Toy.name}
    weights = load_file(run / "student.safetensors")
    save_file(weights, run / "student.safetensors", {"mdistiller": json.dumps(metadata)})
    no_export = "task 'toy_of_eval_test' has neither export nor prediction of its students"
    for argv, said in (
        (("eval", run, "--device", "cpu"), "task 'toy_of_eval_test' does not evaluate stored models"),
        (("export", run), no_export),
        (("predict", run, "image.png"), no_export),
    ):
        done = cli(*argv)
        assert (done.code, done.out, done.message) == (2, "", f"mdistiller: {said}")
    with pytest.raises(ConfigError, match="'toy_of_eval_test' cannot be loaded by itself"):
        load_student(run)


def test_text(cli, student_run):
    done = cli("eval", "resnet8", "--checkpoint", student_run, *cli.DATA)
    line = last(cli, student_run)
    first, second, third = done.out.splitlines()
    assert (
        first
        == f"top-1 {line['top1']:.2f} %  top-5 {line['top5']:.2f} %  loss {line['loss']:.4f}  (32 images)"
    )
    means = f"accuracy {line['balanced_accuracy']:.2f} %  F1 {line['macro_f1']:.2f} %"
    assert second == f"mean over the classes: {means}"
    name, lowest = min(line["classes"].items(), key=lambda item: item[1])
    assert third.startswith(f"lowest accuracies: {name} {lowest:.2f} %, ")


def test_other_data_and_precision(cli, student_run):
    argv = ("eval", "resnet8", "--checkpoint", student_run, *cli.DATA, "--json")
    plain = cli(*argv).json()
    assert cli(*argv, "--data.seed", 5).json()["loss"] != plain["loss"]
    assert cli(*argv, "--data.test-limit", 8).json()["images"] == 8
    half = cli(*argv, "--precision", "bfloat16").json()["loss"]
    assert half != plain["loss"]
    assert half == pytest.approx(plain["loss"], rel=0.05)


def test_a_batch_of_nothing_is_refused(cli, student_run):
    done = cli("eval", "resnet8", "--checkpoint", student_run, *cli.DATA, "--batch-size", 0)
    assert (done.code, done.message) == (2, "mdistiller: batch_size: got 0; allowed: 1 or more")


def test_another_number_of_classes_is_1(cli, student_run):
    argv = ("--data.synthetic-classes", 10, "--device", "cpu")
    done = cli("eval", "resnet8", "--checkpoint", student_run, *argv)
    assert done.code == 1
    assert "was trained on 4 classes, the model has 10" in done.message


# Real teachers on real CIFAR-100


@pytest.fixture(scope="session")
def cifar100_root(tmp_path_factory) -> Path:
    """CIFAR-100 as published, unpacked from what lies beside the checkout."""
    script = SHARED / "data" / "cifar100" / "unpack.py"
    if not script.is_file():
        pytest.skip("no CIFAR-100 in ../shared/data/cifar100")
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec = importlib.util.spec_from_file_location("unpack_cifar100", script)
        unpack = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(unpack)
    finally:
        sys.dont_write_bytecode = written
    root = tmp_path_factory.mktemp("cifar100")
    unpack.main(str(root))
    return root


def published(teachers: Path, model: str) -> tuple[float, float]:
    """Top-1 and top-5 in the table of the teachers' README."""
    row = re.search(rf"^\| `{model}\.pt` \|(.*)\|$", (teachers / "README.md").read_text(), re.MULTILINE)
    assert row is not None
    _, _, top1, top5, _ = (cell.strip() for cell in row[1].split("|"))
    return float(top1), float(top5)


@pytest.mark.slow
def test_a_teacher_on_all_of_cifar100(cli, teachers, cifar100_root):
    done = cli(
        *("eval", "resnet56", "--checkpoint", teachers / "resnet56.pt", "--json", "--device", "cpu"),
        *("--data.root", cifar100_root, "--data.no-download"),
        *("--batch-size", 100),
    )
    found = done.json()
    top1, top5 = published(teachers, "resnet56")
    assert found["images"] == 10_000
    assert found["top1"] == pytest.approx(top1, abs=0.05)
    assert found["top5"] == pytest.approx(top5, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet32x4", "wrn_40_2", "vgg13"])
def test_the_other_teachers_on_a_sample(cli, teachers, cifar100_root, model):
    """200 images, two of each class: within four standard errors of the figures on all."""
    done = cli(
        *("eval", model, "--checkpoint", teachers / f"{model}.pt", "--json", "--device", "cpu"),
        *("--data.root", cifar100_root, "--data.no-download", "--data.test-limit", 200),
        *("--data.train-limit", 1, "--batch-size", 100),
    )
    found = done.json()
    assert found["images"] == 200
    for name, percent in zip(("top1", "top5"), published(teachers, model), strict=True):
        error = 100 * math.sqrt(percent / 100 * (1 - percent / 100) / 200)
        assert abs(found[name] - percent) < 4 * error, name
