"""Models of timm and torchvision on a folder of images, through the command line alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import mdistiller
from mdistiller.cli.main import run
from mdistiller.runs.folder import read_metrics

FEATURES = Path(__file__).parents[1] / "examples" / "my_feature_method.py"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three classes of colored noise, as PNG files of several sizes."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, n in (("train", 16), ("val", 6)):
        for c, name in enumerate(("red", "green", "blue")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 120, (40 + i, 60, 3), dtype=np.uint8)
                pixels[..., c] += 100
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


PAIRS = [
    (
        "timm/vit_tiny_patch16_224",
        "timm/resnet10t",
        ["--teacher.options", "img_size", "32"],
        "stage6",
        "stage4",
    ),
    ("torchvision/resnet18", "torchvision/mobilenet_v3_small", [], "stage4", "stage3"),
]


@pytest.mark.parametrize(("teacher", "student", "options", "teacher_tap", "student_tap"), PAIRS)
def test_a_pair_end_to_end(tmp_path, capsys, images, teacher, student, options, teacher_tap, student_tap):
    common = ["--data.root", str(images), "--data.image-size", "32", "--batch-size", "16"]
    common += [
        "--precision",
        "float32",
        "--optim.name",
        "adamw",
        "--optim.lr",
        "0.002",
        "--device",
        "cpu",
        "--json",
    ]
    as_student = [option.replace("--teacher", "--student") for option in options]
    out = tmp_path / "teacher"
    assert (
        run(["train", f"folder.teacher.{teacher}", *common, *as_student, "--epochs", "3", "--out", str(out)])
        == 0
    )
    given = ["--teacher.checkpoint", str(out), *options]

    recipes = [f"folder.{method}.{teacher}_{student}" for method in ("dkd", "my_hint")]
    taps = [
        "--plugin",
        str(FEATURES),
        "--method.teacher-tap",
        teacher_tap,
        "--method.student-tap",
        student_tap,
    ]
    for recipe, extra in zip(recipes, (["--method.warmup", "0"], taps), strict=True):
        out = tmp_path / recipe.split(".")[1]
        flags = [*common, *given, *extra, "--epochs", "6", "--log-every", "1", "--out", str(out)]
        assert run(["train", recipe, *flags]) == 0
        lines = [line for line in read_metrics(out) if line["kind"] == "train"]
        term = "hint" if extra is taps else "dkd"
        assert lines[-1][term] < lines[0][term]
    capsys.readouterr()
    flags = ["--data.kind", "folder", "--data.root", str(images), "--data.image-size", "32", "--json"]
    assert run(["eval", student, "--checkpoint", str(out), *flags, "--device", "cpu"]) == 0
    figures = json.loads(capsys.readouterr().out)
    final = [line for line in read_metrics(out) if line["kind"] == "eval"][-1]
    assert figures["top1"] == final["top1"]
    assert figures["loss"] == pytest.approx(final["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("model", "file"), [("torchvision/resnet18", "w.pth"), ("timm/resnet10t", "w.safetensors")]
)
def test_fine_tuning_from_a_file_of_pretrained_weights(tmp_path, capsys, images, model, file):
    if model.startswith("timm/"):
        pytest.importorskip("timm")
    torch.manual_seed(5)
    published = mdistiller.create_model(model, 1000).state_dict()
    (save_file if file.endswith("safetensors") else torch.save)(published, tmp_path / file)
    out = tmp_path / "run"
    common = ["--data.root", str(images), "--data.image-size", "32", "--device", "cpu"]
    common += ["--data.mean", "0.5", "0.25", "0.5", "--data.std", "0.25", "0.5", "1"]
    common += ["--data.workers", "0"]  # Python 3.12 and later warn of forks, and pytest.warns raises them
    # So small a rate that the weights are the file's up to rounding.
    few = [
        "--precision",
        "float32",
        "--max-steps",
        "1",
        "--optim.lr",
        "1e-12",
        "--out",
        str(out),
        "--student.checkpoint",
        str(tmp_path / file),
    ]
    with pytest.warns(UserWarning, match="has 1000 classes and is to be trained on 3: its classifier"):
        assert run(["train", f"folder.teacher.{model}", *common, *few]) == 0
    trained = load_file(out / "student.safetensors")
    fresh = [key for key, value in trained.items() if value.shape != published[key].shape]
    assert [len(trained[key]) for key in fresh] == [3, 3]
    for key, _ in mdistiller.create_model(model, 1000).named_parameters():
        if key not in fresh:
            torch.testing.assert_close(trained[key], published[key], msg=key)
    capsys.readouterr()
    assert run(["export", str(out), "--json"]) == 0
    card = json.loads(capsys.readouterr().out)
    assert (card["mean"], card["std"]) == ([0.5, 0.25, 0.5], [0.25, 0.5, 1.0])
    figures = []
    others = ["--data.mean", "0", "0", "0"]
    for flags in ([], others):  # the run's own where no others are given
        assert run(["eval", str(out), *flags, "--json"]) == 0
        figures.append(json.loads(capsys.readouterr().out)["loss"])
    final = [line for line in read_metrics(out) if line["kind"] == "eval"][-1]
    assert figures[0] == pytest.approx(final["loss"], rel=1e-4)
    assert figures[1] != pytest.approx(final["loss"], rel=1e-4)
