"""The plan that `mdistiller train` prints before the first step, and `--dry-run`."""

import re

import pytest
import torch
from torch import nn

from mdistiller.cli.plan import short
from mdistiller.models import create_model

RECIPE = "digits.dkd.resnet8_resnet8"


def macs_by_hand(model, size):
    """Multiply-accumulates of convolutions and the classifier, from the shapes of their outputs."""
    found = []

    def conv(module, inputs, output):
        k = module.weight.shape
        found.append(output.shape[2] * output.shape[3] * k[0] * k[1] * k[2] * k[3])

    def linear(module, inputs, output):
        found.append(module.in_features * module.out_features)

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(conv)
        elif isinstance(module, nn.Linear):
            module.register_forward_hook(linear)
    model.eval()(torch.zeros(1, 3, size, size))
    return sum(found)


@pytest.fixture(scope="module")
def planned(cli, teacher_run, tmp_path_factory):
    """What `--dry-run` gave, and the folder in which it ran."""
    folder = tmp_path_factory.mktemp("dry")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        argv = ("train", RECIPE, *cli.FAST, "--epochs", 2, "--teacher", teacher_run, "--method.beta", 3)
        return cli(*argv, "--teacher-cache", "cache", "--dry-run"), folder


def test_dry_run_prints_the_plan_and_leaves_no_file(cli, planned, teacher_run):
    done, folder = planned
    assert (done.code, done.out) == (0, "")
    assert list(folder.iterdir()) == []
    lines = dict(re.findall(r"^(\w+): +(.*)$", done.err, re.MULTILINE))
    assert list(lines) == ["data", "student", "teacher", "method", "steps", "compute", "cache", "output"]
    model = create_model("resnet8", 4)
    count = sum(p.numel() for p in model.parameters())
    text = f"resnet8, {count / 1e3:.3g} k parameters, {macs_by_hand(model, 16) / 1e6:.3g} M MACs an image"
    assert lines["student"] == f"{text}, random weights"
    assert lines["teacher"] == f"{text}, {teacher_run}"
    assert lines["data"].startswith("synthetic stripes: 64 training and 32 test images, 16x16, 4 classes")
    assert lines["method"].startswith("dkd: ")
    assert "beta 3" in lines["method"]
    assert "changed: method.beta 3 for" in lines["method"]
    assert lines["steps"].startswith("4 of batch 32 in 2 epochs; 2 epochs instead of the recipe's")
    assert lines["compute"] == "cpu, float32"
    assert lines["output"] == "runs/digits.dkd.resnet8_resnet8-s0"


def test_size_of_the_cache_is_that_of_its_files(cli, planned, teacher_run, tmp_path):
    done = cli(
        *("train", RECIPE, *cli.FAST, "--epochs", 2, "--teacher", teacher_run),
        *("--teacher-cache", tmp_path / "cache", "--out", tmp_path / "run"),
    )
    assert done.code == 0, done.err
    size = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.rows"))
    assert re.search(r"^cache: +cache, (.*)B when full$", planned[0].err, re.MULTILINE)[1] == short(size)
    assert size > 10_000
    # A run prints the same plan before its first line of progress.
    lines = done.err.splitlines()
    assert lines[0].startswith("data: ")
    assert "random weights" in lines[1]


def test_dry_run_of_a_student_alone(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = cli("train", "digits.student.resnet8", *cli.FAST, "--dry-run")
    assert done.code == 0, done.err
    assert "method:    none: trained on the labels alone" in done.err
    assert "teacher:" not in done.err
    done = cli("train", "digits.teacher.resnet20", *cli.FAST, "--dry-run")
    assert ("\nmodel:     resnet20" in done.err, "student:" in done.err) == (True, False)


def test_dry_run_has_the_errors_of_the_run(cli, student_run, tmp_path):
    argv = ("train", RECIPE, *cli.FAST, "--dry-run")
    done = cli(*argv, "--teacher.checkpoint", tmp_path / "none.pt")
    assert done.code != 0
    assert "none.pt" in done.message
    done = cli(*argv, "--teacher", student_run, "--out", student_run)
    assert done.code == 2
    assert "holds a run already" in done.message


def test_counts_with_units():
    assert [short(n) for n in (7, 1234, 2_345_678, 4.111e9)] == ["7", "1.23 k", "2.35 M", "4.11 G"]
