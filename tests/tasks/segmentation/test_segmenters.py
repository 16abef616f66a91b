"""Models: equal to torchvision's with the same weights, dilation, taps, SegFormer, and wrong options."""

import pytest
import torch
from masked_squares import settings
from torchvision.models import segmentation

from mdistiller import get_recipe, load_student
from mdistiller.cli.train import TrainCommand
from mdistiller.errors import CheckpointError, ConfigError, UnknownNameError
from mdistiller.models import ModelConfig, create_model
from mdistiller.runs.checkpoint import save_student
from mdistiller.taps import tap
from mdistiller.tasks.segmentation.segmenter import build_segmenter, create_segmenter, list_segmenters
from mdistiller.training.launch import train
from mdistiller.training.task import get_task, task_of_model

IMAGE = torch.randn(1, 3, 65, 97, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "aux"),
    [
        ("deeplabv3_resnet50", True),
        ("fcn_resnet50", False),
        ("lraspp_mobilenet_v3_large", False),
        ("deeplabv3_mobilenet_v3_large", True),
    ],
)
def test_the_logits_are_torchvisions(name, aux, tmp_path):
    options = {"aux_loss": True} if aux else {}
    build = getattr(segmentation, name)
    theirs = build(weights=None, weights_backbone=None, num_classes=4, **options).eval()
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    options = {"aux": True} if aux else {}
    ours = build_segmenter(ModelConfig(name=name, checkpoint=tmp_path / "w.pth", options=options), 4).eval()
    with torch.no_grad():
        assert torch.equal(ours(IMAGE), theirs(IMAGE)["out"])
    if aux:
        found = tap(ours, ["aux"])(IMAGE).features["aux"]
        scaled = torch.nn.functional.interpolate(found, (65, 97), mode="bilinear", align_corners=False)
        assert torch.equal(scaled, theirs(IMAGE)["aux"])


@pytest.mark.parametrize(("stride", "side"), [(8, 8), (16, 4), (32, 2)])
def test_output_strides_of_resnets(stride, side):
    model = create_segmenter("fcn_resnet18", 3, output_stride=stride).eval()
    with torch.no_grad():
        found = tap(model, ["stage4", "logits"])(torch.zeros(1, 3, 64, 64))
    assert found.logits.shape == (1, 3, 64, 64)
    assert found.features["stage4"].shape == (1, 512, side, side)
    assert found.features["logits"].shape == (1, 3, side, side)


def test_a_backbone_trained_as_a_classifier(tmp_path):
    classifier = create_model("torchvision/mobilenet_v3_small", 7)
    save_student(tmp_path / "student.safetensors", classifier, {})
    model = create_segmenter("lraspp_mobilenet_v3_small", 3, backbone_weights=tmp_path)
    assert torch.equal(model.backbone["4"].block[0][0].weight, classifier.features[4].block[0][0].weight)
    (tmp_path / "other.pth").write_bytes(b"")
    with pytest.raises(CheckpointError):
        create_segmenter("lraspp_mobilenet_v3_small", 3, backbone_weights=tmp_path / "other.pth")


def test_a_student_of_other_classes_gets_a_new_classifier(tmp_path):
    torch.save(create_segmenter("fcn_resnet18", 5, aux=True).state_dict(), tmp_path / "w.pth")
    config = ModelConfig(name="fcn_resnet18", checkpoint=tmp_path / "w.pth", options={"aux": True})
    with pytest.warns(
        UserWarning, match="has 5 classes and is to be trained on 3: its classifier is left out"
    ):
        model = build_segmenter(config, 3, new_classifier=True)
    assert model.aux_classifier[4].out_channels == model.classifier[4].out_channels == 3


def test_segformer(tmp_path):
    pytest.importorskip("transformers")
    model = create_segmenter("segformer_b0", 3).eval()
    found = tap(model, ["stage4", "logits", "embedding"])(torch.zeros(1, 3, 64, 96))
    assert found.logits.shape == (1, 3, 64, 96)
    shapes = {name: tuple(value.shape[1:]) for name, value in found.features.items()}
    assert shapes == {"stage4": (256, 2, 3), "logits": (3, 16, 24), "embedding": (256, 16, 24)}
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(3.7e6, rel=0.02)  # the paper's 3.8 M
    with pytest.raises(CheckpointError, match="of 'segformer_b0' cannot be loaded"):
        create_segmenter("segformer_b0", 3, weights=str(tmp_path / "absent"))
    model.model.save_pretrained(tmp_path)
    again = create_segmenter("segformer_b0", 3, weights=str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.allclose(again(IMAGE), model(IMAGE), atol=1e-5)


def test_segformers_weights_of_another_kind(squares, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = create_segmenter("segformer_b0", 3).model
    model.config.id2label = dict(enumerate(("ground", "blue", "red")))
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(
        CheckpointError, match="of 'segformer_b1' cannot be loaded: it belongs to another size"
    ):
        create_segmenter("segformer_b1", 3, weights=str(tmp_path / "whole"))
    encoder = transformers.SegformerModel(model.config)
    encoder.save_pretrained(tmp_path / "encoder")
    ours = create_segmenter("segformer_b0", 3, weights=str(tmp_path / "encoder")).model.segformer
    assert all(torch.equal(v, encoder.state_dict()[k]) for k, v in ours.state_dict().items())
    recipe = get_recipe("coco-seg.kd.segformer_b0_segformer_b0").replace(**settings(squares))
    model.config.id2label = dict(enumerate(("ground", "blue", "pink")))
    model.save_pretrained(tmp_path / "other")
    for folder, message in (("other", "only in the model: pink"), ("encoder", "no classifier of 3 classes")):
        teacher = {"name": "segformer_b0", "options": {"weights": str(tmp_path / folder)}}
        with pytest.raises(ConfigError, match=message):
            train(recipe.replace(teacher=teacher, out=tmp_path / f"run-{folder}"))


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_segformers_weights_follow_the_names_of_the_classes(squares, tmp_path, role):
    pytest.importorskip("transformers")
    model = create_segmenter("segformer_b0", 3)
    model.model.config.id2label = dict(enumerate(("ground", "blue", "red")))
    model.model.save_pretrained(tmp_path / "whole")
    given = {"name": "segformer_b0", "options": {"weights": str(tmp_path / "whole")}}
    config = get_recipe("coco-seg.kd.segformer_b0_segformer_b0").replace(**settings(squares), **{role: given})
    task = get_task("segmentation")
    with pytest.warns(UserWarning, match="its classes were put into the data's order, by their names"):
        built = getattr(task, f"build_{role}")(config, task.load_data(config))
    with torch.no_grad():
        torch.testing.assert_close(built.eval()(IMAGE)[:, [0, 2, 1]], model.eval()(IMAGE))


def test_segformer_learns_from_a_convolutional_teacher(squares, tmp_path):
    pytest.importorskip("transformers")
    recipe = get_recipe("coco-seg.teacher.fcn_resnet18")
    changes = settings(squares, epochs=1, eval_every=1)
    run = train(recipe.replace(**changes, out=tmp_path / "teacher"))
    pair = get_recipe("coco-seg.cwd+skd.fcn_resnet18_segformer_b0")
    run = train(pair.replace(**changes, teacher={"checkpoint": run.path}, out=tmp_path / "student"))
    assert run.summary["last"]["pixel_accuracy"] > 0
    assert load_student(run.path)(IMAGE).shape == (1, 3, 65, 97)


def test_names_and_options():
    assert {"deeplabv3_resnet101", "fcn_resnet34", "segformer_b5"} <= {*list_segmenters()}
    assert task_of_model("lraspp_mobilenet_v3_large").name == "segmentation"
    assert task_of_model("fcos_resnet18").name == "detection"
    with pytest.raises(UnknownNameError, match="nearest: deeplabv3_resnet18"):
        create_segmenter("deeplab_resnet18", 3)
    with pytest.raises(
        UnknownNameError, match="option of segmentation model 'lraspp_mobilenet_v3_large' 'aux'"
    ):
        create_segmenter("lraspp_mobilenet_v3_large", 3, aux=True)
    with pytest.raises(
        UnknownNameError, match=r"ResNet or MobileNet start from a backbone, such as fcos_resnet18"
    ):
        create_segmenter("segformer_b0", 3, backbone_weights="runs/backbone")
    with pytest.raises(ConfigError, match="output_stride: got 4; allowed: 8, 16, 32"):
        create_segmenter("fcn_resnet18", 3, output_stride=4)


@pytest.mark.parametrize(
    "recipe", ["voc-seg.student.lraspp_mobilenet_v3_small", "coco.student.fcos_resnet18"]
)
def test_a_backbone_from_random_weights(recipe):
    usual, own = (TrainCommand.parse([recipe, *flags]).config for flags in ((), ("--from-scratch",)))
    assert "backbone_weights" in usual.student.options
    assert own.student.options == {k: v for k, v in usual.student.options.items() if k != "backbone_weights"}
    assert own.replace(student=usual.student) == usual
