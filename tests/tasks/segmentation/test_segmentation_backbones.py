"""A backbone without masks as the teacher of a segmentation model, and as its distilled start."""

import pytest
import timm
import torch
from masked_squares import MODEL, TEACHER, pair, settings

import mdistiller
from mdistiller.errors import ConfigError
from mdistiller.recipes import get_recipe
from mdistiller.runs.checkpoint import save_student
from mdistiller.runs.folder import read_metrics
from mdistiller.tasks.segmentation.methods import build_method, default_config
from mdistiller.tasks.segmentation.segmenter import create_segmenter
from mdistiller.training.launch import train
from mdistiller.types import DataInfo

VIT = {"img_size": 48, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3}
BACKBONE = {"name": "timm/vit_tiny_patch16_224", "options": VIT, "image_size": 48}
BACKBONE |= dict.fromkeys(("mean", "std"), (0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def foundation(tmp_path_factory):
    path = tmp_path_factory.mktemp("foundation") / "vit.safetensors"
    save_student(path, timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT), {})
    return {**BACKBONE, "checkpoint": path}


def first(out):
    return next(line for line in read_metrics(out) if line["kind"] == "train")


def test_a_foundation_model_teaches_the_backbone(squares, foundation, tmp_path):
    recipe = get_recipe(f"coco-seg.tokens.{MODEL}", teacher=BACKBONE["name"])
    assert recipe.recipe == f"coco-seg.tokens.{BACKBONE['name']}_{MODEL}"
    assert get_recipe(recipe.recipe) == recipe
    assert recipe.method.global_weight == 0
    one = recipe.replace(**settings(squares, teacher=foundation, max_steps=2, out=tmp_path / "one"))
    train(one)
    assert first(one.out)["tokens_patch"] > 0
    save_student(tmp_path / "fcn.safetensors", create_segmenter(TEACHER, 3), {})
    both = pair(squares, "kd", tmp_path / "fcn.safetensors", max_steps=1, out=tmp_path / "both")
    train(both.replace(more_teachers=[{**foundation, "method": "tokens", "weight": 0.5}]))
    line = first(both.out)
    assert line["kd"] > 0 < line["tokens_patch"]
    for changes, message in (
        ({"method": "kd"}, "got 'kd' with the teacher timm/vit_tiny_patch16_224, a backbone without masks"),
        (
            {"teacher": {"mean": None}},
            "teacher.mean: unknown for timm/vit_tiny_patch16_224; give --teacher.mean",
        ),
        ({"method": {"global_weight": 1}}, "global_weight: got 1; .* has no embedding; allowed: 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(one.replace(**changes, out=tmp_path / "wrong"))


@pytest.mark.parametrize(
    ("stride", "patch", "stage"),
    [(32, 16, "stage3"), (32, 32, "stage4"), (16, 16, "stage4"), (8, 16, "stage4")],
)
def test_the_stage_nearest_to_the_teachers_patches(stride, patch, stage):
    student = create_segmenter("fcn_resnet18", 3, output_stride=stride)
    teacher = timm.create_model("vit_tiny_patch16_224", **VIT | {"img_size": 96, "patch_size": patch})
    method = build_method(default_config("tokens"), student, teacher, DataInfo((3, 96, 96)))
    assert (method.student_taps, method.teacher_taps) == ((stage,), ("norm",))


@pytest.mark.parametrize("student", ["torchvision/resnet18", "torchvision/mobilenet_v3_small"])
def test_a_segmentation_model_starts_from_a_distilled_backbone(student, foundation, squares, tmp_path):
    images = {
        "kind": "folder",
        "root": squares / "JPEGImages",
        "image_size": 32,
        "workers": 0,
        "val_fraction": 0.4,
    }
    short = {"epochs": 1, "max_steps": 1, "batch_size": 4, "device": "cpu", "precision": "float32"}
    run = mdistiller.distill(student, foundation, images, task="embed", out=tmp_path / "embed", **short)
    name = "fcn_resnet18" if "resnet" in student else "lraspp_mobilenet_v3_small"
    model = create_segmenter(name, 3, backbone_weights=run.path)
    own, trained = model.backbone.state_dict(), run.student.state_dict()
    assert own
    assert all(
        torch.equal(value, trained[key if "resnet" in name else f"features.{key}"])
        for key, value in own.items()
    )
