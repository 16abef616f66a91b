"""A backbone without boxes as the teacher of a detector, and as its distilled start."""

import json

import pytest
import timm
import torch
from tiny_detectors import batch, fcos, two_stage, write_set
from tiny_sets import LEVELS, tiny_set
from torch import nn

import mdistiller
from mdistiller.cli.main import run as command
from mdistiller.errors import CheckpointError, ConfigError
from mdistiller.recipes import get_recipe
from mdistiller.runs.checkpoint import save_student
from mdistiller.runs.folder import read_metrics
from mdistiller.tasks.detection.distiller import DetectionDistiller
from mdistiller.tasks.detection.models import create_detector
from mdistiller.training.launch import train
from mdistiller.types import Batch

VIT = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3}
OWN = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "image_size": 64}
NAME = "timm/vit_tiny_patch16_224"


def vit():
    torch.manual_seed(3)
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT)


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "vit.safetensors"
    save_student(path, vit(), {})
    return path


class Means(nn.Module):
    """Means of patches of 8 pixels; `tap_points` names them."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 3, 8, 8, bias=False)
        nn.init.zeros_(self.patches.weight)
        for channel in range(3):
            self.patches.weight.data[channel, channel] = 1 / 64
        self.tap_points = {"stage1": "patches"}

    def forward(self, image):
        return self.patches(image).mean((2, 3))


def ramp(height, width):
    """The channels are x, y and 1, the first two in units of 100 pixels."""
    y, x = torch.meshgrid(*(torch.arange(n) + 0.5 for n in (height, width)), indexing="ij")
    return torch.stack([x / 100, y / 100, torch.ones_like(x)])


def test_the_teachers_patches_are_where_the_students_cells_are():
    student = fcos().train()  # levels of strides 8, 16 and 32
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    own = {"mean": mean, "std": std, "image_size": 96}
    distiller = DetectionDistiller(student, Means(), "tokens", teacher_input=own)
    images, (target, empty) = [ramp(96, 192), ramp(80, 160)], batch()[1]
    done = distiller.adapter.train(images, [target, empty])
    assert distiller.method.student_taps == ("0",)
    assert distiller.method.teacher_taps == ("stage1",)
    found = distiller.asked(Batch(images, None, None), done[1]).features["stage1"]
    assert found.shape == (2, 3, *done[1].features["0"].shape[2:])
    for image, (height, width) in zip(found, ((96, 192), (80, 160)), strict=True):
        image = image * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
        inner = slice(3, height // 8 - 3), slice(3, width // 8 - 3)  # borders are blurred
        y, x = torch.meshgrid(*(torch.arange(n) * 8 + 4.0 for n in image.shape[1:]), indexing="ij")
        expected = torch.stack([x / 100, y / 100, torch.ones_like(x)])
        torch.testing.assert_close(image[:, *inner], expected[:, *inner], atol=2e-3, rtol=0)


@pytest.mark.parametrize("kind", ["fcos", "rcnn", "d_fine", "yolos"])
def test_the_loss_trains_the_students_backbone(kind):
    student = {"fcos": fcos, "rcnn": two_stage}[kind]() if kind in ("fcos", "rcnn") else tiny_set(kind)
    level = {"fcos": "1", "rcnn": "1"}.get(kind) or next(n for n, s in LEVELS[kind].items() if s == 16)
    teacher = vit()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    distiller = DetectionDistiller(student, teacher, "tokens", teacher_input=OWN).train()
    assert (distiller.method.student_taps, distiller.method.teacher_taps) == ((level,), ("norm",))
    out = distiller(*batch())
    assert 0 < out.losses["tokens_patch"] < 2
    out.losses["tokens_patch"].backward()
    moved = {name.split(".")[0] for name, p in distiller.named_parameters() if p.grad is not None}
    assert moved == {"student", "method"}
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_other_taps_of_the_teacher():
    settings = {"student_taps": ("0",), "teacher_taps": ("blocks.0",)}
    distiller = DetectionDistiller(fcos(), vit(), "tokens", teacher_input=OWN, **settings).train()
    assert distiller(*batch()).losses["tokens_patch"] > 0
    own = nn.Sequential(nn.Conv2d(3, 6, 16, 16), nn.Flatten(2))
    settings["teacher_taps"] = ("0@map",)
    distiller = DetectionDistiller(fcos(), own, "fitnet", teacher_input=OWN, **settings).train()
    assert distiller(*batch()).losses["fitnet"] > 0


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("bckd", OWN, "no rows in common with another detector's"),
        (
            {"name": "tokens", "global_weight": 1.0},
            OWN,
            "global_weight: got 1; a detector .* has no embedding",
        ),
        (
            {"name": "tokens", "standardize": True},
            OWN,
            "standardize: it reads the training images of classifiers",
        ),
        ("tokens", {"mean": OWN["mean"], "std": OWN["std"]}, "teacher_input: .* needs image_size"),
        ("tokens", None, "VisionTransformer is no detector that can be distilled"),
    ],
)
def test_what_cannot_work(method, given, message):
    with pytest.raises(ConfigError, match=message):
        DetectionDistiller(fcos(), vit(), method, teacher_input=given)


def test_levels_without_a_matching_stride():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT | {"patch_size": 2})
    with pytest.raises(ConfigError, match=r"no level of one stride: .* the teacher's norm \(stride 2\)"):
        DetectionDistiller(fcos(), model, "tokens", teacher_input=OWN)


# Runs


SHORT = [
    "--max-steps",
    "2",
    "--epochs",
    "1",
    "--batch-size",
    "2",
    "--device",
    "cpu",
    "--precision",
    "float32",
]
SHORT += [
    "--augment.short-sides",
    "64",
    "--augment.long-side",
    "96",
    "--data.workers",
    "0",
    "--log-every",
    "1",
]
GIVEN = [
    "--teacher.mean",
    "0.5",
    "0.5",
    "0.5",
    "--teacher.std",
    "0.5",
    "0.5",
    "0.5",
    "--teacher.image-size",
    "64",
]
OPTIONS = [str(word) for pair in VIT.items() for word in pair]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_set(folder, 6)
    write_set(folder, 4, "instances_val.json", seed=1)
    return folder


def first(out):
    return next(line for line in read_metrics(out) if line["kind"] == "train")


def test_a_foundation_model_by_one_flag(data, stored, tmp_path, capsys):
    args = ["train", "small.tokens.fcos_resnet18", "--data.root", str(data), "--teacher", NAME, *SHORT]
    args += [
        "--teacher.checkpoint",
        str(stored),
        "--teacher.options",
        *OPTIONS,
        "--out",
        str(tmp_path / "run"),
    ]
    assert command(args) == 2
    assert (
        "teacher.mean: unknown for timm/vit_tiny_patch16_224; give --teacher.mean" in capsys.readouterr().err
    )
    assert command([*args, *GIVEN]) == 0, capsys.readouterr().err
    assert first(tmp_path / "run")["tokens_patch"] > 0
    stored_config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored_config["recipe"] == f"small.tokens.{NAME}_fcos_resnet18"
    assert get_recipe(stored_config["recipe"]).teacher.name == NAME
    assert command(["eval", str(tmp_path / "run"), "--device", "cpu"]) == 0
    with pytest.warns(UserWarning, match="teacher left out: unknown detector"):
        assert command(["compare", str(tmp_path / "run"), "--threads", "1"]) == 0


def test_a_detector_and_a_foundation_model(data, stored, tmp_path):
    recipe = get_recipe("small.bckd.fcos_resnet18_fcos_resnet18")
    save_student(tmp_path / "fcos.safetensors", create_detector("fcos_resnet18", 4), {})
    more = {"name": NAME, "checkpoint": stored, "options": VIT, **OWN, "method": "tokens", "weight": 0.5}
    config = recipe.replace(
        teacher={"checkpoint": tmp_path / "fcos.safetensors"},
        more_teachers=[more],
        data={"root": data, "workers": 0},
        augment={"short_sides": (64,), "long_side": 96},
        **{"max_steps": 1, "batch_size": 2, "device": "cpu", "out": tmp_path / "run"},
    )
    train(config)
    line = first(config.out)
    assert line["bckd"] > 0 < line["tokens_patch"]


# The way back


@pytest.mark.parametrize("student", ["torchvision/resnet18", "timm/resnet18"])
def test_a_detector_starts_from_a_distilled_backbone(student, stored, tmp_path):
    run = mdistiller.distill(
        student,
        {"name": NAME, "checkpoint": stored, "options": VIT, **OWN},
        {"kind": "folder", "root": write_set(tmp_path, 40).parent / "images", "image_size": 32, "workers": 0},
        task="embed",
        out=tmp_path / "embed",
        **{"epochs": 1, "max_steps": 1, "batch_size": 4, "device": "cpu", "precision": "float32"},
    )
    detector = create_detector("fcos_resnet18", 4, backbone_weights=run.path).eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        found = detector.backbone.body(image)["2"].mean((2, 3))
        torch.testing.assert_close(found, run.student(image), rtol=1e-3, atol=1e-4)
    with pytest.raises(
        CheckpointError, match=r"Train a checkpoint of torchvision/resnet34 with --student.name"
    ):
        create_detector("fcos_resnet34", 4, backbone_weights=run.path)
