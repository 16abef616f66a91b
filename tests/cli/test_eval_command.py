"""`mdistiller eval`: a run's own figures again, and the published ones of real teachers."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from pathlib import Path

import pytest

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
    assert set(found) == {"model", "checkpoint", "top1", "top5", "loss", "images"}


@pytest.mark.parametrize("batch", [1, 7, 32])
def test_batches_make_no_difference(cli, student_run, batch):
    argv = ("--checkpoint", student_run, *cli.DATA, "--json", "--batch-size", batch)
    found, expected = cli("eval", "resnet8", *argv).json(), last(cli, student_run)
    assert (found["top1"], found["images"]) == (expected["top1"], 32)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_text(cli, student_run):
    done = cli("eval", "resnet8", "--checkpoint", student_run, *cli.DATA)
    line = last(cli, student_run)
    assert (
        done.out
        == f"top-1 {line['top1']:.2f} %  top-5 {line['top5']:.2f} %  loss {line['loss']:.4f}  (32 images)\n"
    )


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
    assert (done.code, done.message) == (2, "mdistiller: batch_size: got 0, need at least 1")


def test_another_number_of_classes_is_1(cli, student_run):
    argv = ("--data.kind", "synthetic", "--data.image-size", "16", "--device", "cpu")
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
