"""Every method trains on real masks, its loss falls, and it takes the taps that it names."""

import warnings

import pytest
import torch
from masked_squares import MODEL
from PIL import Image

from mdistiller.errors import ConfigError
from mdistiller.recipes import get_recipe
from mdistiller.runs.folder import read_metrics
from mdistiller.tasks.segmentation.config import SegmentationDataConfig
from mdistiller.tasks.segmentation.data import load_split
from mdistiller.tasks.segmentation.loader import scaled
from mdistiller.tasks.segmentation.methods import build_method, default_config, list_segmentation_methods
from mdistiller.tasks.segmentation.segmenter import create_segmenter
from mdistiller.training.launch import train
from mdistiller.types import DataInfo

METHODS = ("kd", "dkd", "cwd", "skd", "cirkd", "fitnet", "at", "reviewkd")
DATA = DataInfo((3, 48, 48), torch.tensor([-100]))


def draw(coco, folder):
    """Writes a few images of real objects, with a short side of 56 pixels, in VOC's layout."""
    classes = ("person", "furniture", "food")
    limits = {"train_limit": 16, "test_limit": 2}
    config = SegmentationDataConfig(kind="coco", root=coco, classes=classes, **limits)
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / part).mkdir(parents=True)
    (folder / "classes.txt").write_text("\n".join(("background", *classes)))
    for split, name in (("train", "train"), ("test", "val")):
        found, names = load_split(config, split), []
        for i in range(len(found)):
            image, mask = found.read(i)
            size = scaled(image, 56).size
            names.append(f"{name}{i}")
            scaled(image, 56).save(folder / "JPEGImages" / f"{names[-1]}.png")
            nearest = Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)
            nearest.save(folder / "SegmentationClass" / f"{names[-1]}.png")
        (folder / "ImageSets" / "Segmentation" / f"{name}.txt").write_text("\n".join(names))


@pytest.fixture(scope="module")
def curves(shared, tmp_path_factory):
    """Losses by name of each method's runs over 24 steps."""
    root, folder = shared / "data" / "coco-mini", tmp_path_factory.mktemp("coco")
    if not root.is_dir():
        pytest.skip("no data set in ../shared/data/coco-mini")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "/.*left out")
        draw(root, folder)
    changes = {
        "data": {"kind": "voc", "root": folder, "workers": 0},
        "augment": {"crop": (48, 48), "short_side": None},
        "optim": {"lr": 3e-3, "schedule": "constant"},
        **{"epochs": 12, "batch_size": 8, "eval_every": 12, "log_every": 4, "device": "cpu"},
        "layout": "contiguous",
    }
    teacher = get_recipe("coco-seg.teacher.fcn_resnet18").replace(**changes, out=folder / "teacher")
    run = train(teacher.replace(student={"options": {"output_stride": 32}}))
    changes["teacher"] = {"checkpoint": run.path}
    configs = [
        get_recipe(f"coco-seg.{m}.fcn_resnet18_{MODEL}").replace(**changes, out=folder / m) for m in METHODS
    ]
    runs = [train(one) for one in configs]
    lines = [[line for line in read_metrics(r.path) if line["kind"] == "train"] for r in runs]
    return dict(zip(METHODS, lines, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_the_losses_fall(curves, method):
    first, last = curves[method][0], curves[method][-1]
    assert last["task"] < first["task"]
    assert 0 < last[method] < first[method]


# Methods and taps


@pytest.fixture(scope="module")
def models():
    return create_segmenter(MODEL, 3), create_segmenter("fcn_resnet18", 3, output_stride=32)


@pytest.mark.parametrize(
    ("method", "student", "teacher"),
    [
        ("kd", ["logits"], ["logits"]),
        ("cwd", ["logits"], ["logits"]),
        ("skd", ["embedding"], ["embedding"]),
        ("fitnet", ["stage5"], ["stage4"]),
        ("at", ["stage2", "stage3", "stage4", "stage5"], ["stage1", "stage2", "stage3", "stage4"]),
    ],
)
def test_default_taps(models, method, student, teacher):
    built = build_method(default_config(method), *models, DATA)
    assert [*built.student_taps] == student
    assert [*built.teacher_taps] == teacher


def test_cwd_on_features_has_an_adapter(models):
    taps = {"student_taps": ("stage5",), "teacher_taps": ("stage4",), "weight": 50.0}
    built = build_method(default_config("cwd").replace(**taps), *models, DATA)
    assert [p.shape for p in built.parameters()] == [(512, 576, 1, 1)]
    assert not [*build_method(default_config("cwd"), *models, DATA).parameters()]


def test_every_method_of_logits_reads_pixels(models):
    for name in list_segmentation_methods():
        method = build_method(default_config(name), *models, DATA)
        assert method.needs.views == 1
        assert not method.needs.index
    with pytest.raises(ConfigError, match="needs a teacher, and none was given"):
        build_method(default_config("kd"), models[0], None, DATA)
    with pytest.raises(ConfigError, match=r"beta='auto'.*without a class, allowed are beta a number"):
        build_method(default_config("dkd").replace(beta="auto"), *models, DATA)
