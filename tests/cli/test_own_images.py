"""A folder of one's own images: splits, evaluation after training, and pictures that lie on their side."""

import json
import re

import numpy as np
import pytest
from PIL import ExifTags, Image

# Python 3.12 and later say so whenever a process with threads (torch's) forks a DataLoader's workers.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 6), ("Val", 2), ("test", 3)):
        for c, name in enumerate(("ant", "bee")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng([c, i, count]).integers(0, 256, (30, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


FLAGS = ("--data.image-size", 16, "--data.workers", 0, "--batch-size", 4, "--epochs", 1, "--device", "cpu")


@pytest.fixture(scope="module")
def run(cli, images, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    done = cli("train", "folder.student.resnet8", "--data.root", images, *FLAGS, "--out", out)
    assert done.code == 0, done.err
    assert "12 training and 4 test images, 16x16, 2 classes, streamed" in done.message
    return out


def test_the_test_split_is_for_an_evaluation_after_training(cli, run):
    assert cli("eval", run, "--device", "cpu", "--json").json()["images"] == 4
    after = cli("eval", run, "--data.eval-split", "test", "--device", "cpu", "--json").json()
    assert after["images"] == 6


def test_a_run_never_picks_on_the_test_split(cli, images, tmp_path):
    flags = ("--data.root", images, "--data.eval-split", "test", "--out", tmp_path / "run")
    done = cli("train", "folder.student.resnet8", *FLAGS, *flags)
    assert done.code != 0
    assert "data.eval_split: got 'test', but a run picks its best epoch by evaluation" in done.message
    assert "mdistiller eval RUN --data.eval-split test" in done.message


def test_training_images_are_in_the_diagnostics(cli, run):
    line = next(line for line in cli.metrics(run) if line["kind"] == "eval")
    assert line["diagnostics"].keys() == {"test", "train"}


def test_class_folders_alone(cli, images, tmp_path):
    flags = ("--data.root", images / "train", *FLAGS)
    done = cli("train", "folder.student.resnet8", *flags, "--out", tmp_path / "no")
    assert done.code == 1
    assert "--data.val-fraction 0.1" in done.message
    done = cli(
        "train", "folder.student.resnet8", *flags, "--data.val-fraction", 0.3, "--out", tmp_path / "run"
    )
    assert done.code == 0, done.err
    assert "8 training and 4 test images" in done.message
    found = cli("eval", tmp_path / "run", "--device", "cpu", "--json").json()
    line = next(line for line in cli.metrics(tmp_path / "run") if line["kind"] == "eval")
    assert (found["images"], found["top1"]) == (4, line["top1"])


def test_a_prediction_is_of_the_upright_image(cli, images, run, tmp_path):
    with Image.open(images / "Val" / "ant" / "0.png") as upright:
        upright.save(tmp_path / "upright.png")
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6  # stored turned a quarter to the left
        upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "stored.png", exif=exif)
    lines = [
        re.findall(r"[\d.]+ %  \w+", cli("predict", run, tmp_path / f"{name}.png", "--device", "cpu").out)
        for name in ("upright", "stored")
    ]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 2


def test_settings_and_measured_weights_are_shown_and_stored(cli, run, images, tmp_path):
    flags = (
        "--data.root",
        images,
        *FLAGS,
        "--teacher",
        run,
        "--method.dkd.beta",
        2,
        "--out",
        tmp_path / "run",
    )
    plan = cli("train", "folder.dkd+at.resnet8", *flags, "--dry-run")
    assert plan.code == 0, plan.err
    settings = "auto weights are measured before the first step; changed: method.dkd.beta 2"
    assert settings in plan.message
    assert not (tmp_path / "run").exists()
    done = cli("train", "folder.dkd+at.resnet8", *flags)
    assert done.code == 0, done.err
    assert settings in done.message
    method = json.loads((tmp_path / "run" / "config.json").read_text())["method"]
    assert f"method.at.weight {method['at']['weight']:g}: makes at's first gradients" in done.message
    assert (method["dkd"]["beta"], method["dkd"]["temperature"]) == (2, 1)


def test_small_squares_have_a_baseline(cli, tmp_path):
    """A distilled student gets its teacher's size, the student alone that of the files, which is equal."""
    for split in ("train", "val"):
        for c, name in enumerate(("ant", "bee")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = np.random.default_rng([c, i]).integers(0, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    flags = ("--data.root", tmp_path, "--data.workers", 0, "--batch-size", 4, "--epochs", 1)
    teacher, alone, kd = (tmp_path / name for name in ("teacher", "alone", "kd"))
    assert cli("train", "folder.teacher.resnet14", *flags, "--out", teacher).code == 0
    assert cli("train", "folder.student.resnet8", *flags, "--out", alone).code == 0
    assert cli("train", "folder.kd.resnet8", *flags, "--teacher", teacher, "--out", kd).code == 0
    found = cli("compare", alone, kd, "--no-eval", "--batch", 1, "--json").json()["rows"]
    assert (found[-1]["label"], found[-1]["over_alone"] is None) == ("KD", False)
    page = tmp_path / "page.html"
    assert cli("report", alone, kd, "--device", "cpu", "--out", page).code == 0
    assert "cannot run on the images" not in page.read_text()
