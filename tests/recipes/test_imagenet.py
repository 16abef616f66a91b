"""The ImageNet recipes: the published settings, and a small run on a tree like ImageNet's."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mdistiller import Distiller
from mdistiller.cli.main import run as command
from mdistiller.data import load_data
from mdistiller.data.dataset import StreamSet
from mdistiller.models import create_model
from mdistiller.recipes import get_recipe, list_recipes
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.training.update import learning_rate

# configs/imagenet/{r34_r18,r50_mv1}/dkd.yaml of the reference code base: names, models, DKD.BETA.
PUBLISHED = [
    ("resnet34_resnet18", "torchvision/resnet34", "torchvision/resnet18", 0.5),
    ("resnet50_mobilenetv1", "torchvision/resnet50", "MobileNetV1", 2.0),
]
PAIRS = [pair for pair, *_ in PUBLISHED]
STEPS = 2503  # an epoch: 1,281,167 images in batches of 512, the last one smaller


def assert_published_setting(config: ClassificationConfig) -> None:
    """SOLVER of dkd.yaml, kd.yaml, at.yaml and dot.yaml there, and the transforms of its data set."""
    data, optim = config.data, config.optim
    assert (data.kind, data.image_size, data.resize, data.memory) == ("folder", 224, 256, "stream")
    assert data.train_limit is data.test_limit is config.max_steps is None
    augment = config.augment
    assert (augment.flip, augment.padding, augment.policy) == (True, None, "none")
    assert augment.mixup_alpha == augment.cutmix_alpha == 0
    assert (config.epochs, config.batch_size, config.precision, config.ema) == (100, 512, "float32", None)
    assert (optim.name, optim.momentum, optim.nesterov, optim.weight_decay) == ("sgd", 0.9, False, 1e-4)
    assert optim.clip_norm is None
    assert optim.accumulate == 1
    factors = {0: 1, 29: 1, 30: 0.1, 59: 0.1, 60: 0.01, 89: 0.01, 90: 0.001, 99: 0.001}
    for epoch, factor in factors.items():
        for step in (epoch * STEPS, epoch * STEPS + STEPS - 1):
            assert learning_rate(optim, step, 100 * STEPS) == pytest.approx(0.2 * factor, rel=1e-9), epoch


@pytest.mark.parametrize(("pair", "teacher", "student", "beta"), PUBLISHED)
def test_dkd(pair, teacher, student, beta):
    config = get_recipe(f"imagenet.dkd.{pair}")
    assert_published_setting(config)
    assert (config.teacher.name, config.student.name) == (teacher, student)
    assert config.teacher.options == {"weights": "IMAGENET1K_V1"}
    assert config.student.options == {}
    method = config.method
    assert (method.task_weight, method.alpha, method.beta, method.temperature) == (1, 1, beta, 1)
    assert method.warmup == 0  # one epoch there, whose factor is 1 from the first step
    assert ClassificationConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("pair", PAIRS)
def test_kd_and_dot(pair):
    config = get_recipe(f"imagenet.kd.{pair}")
    assert_published_setting(config)
    assert (config.method.task_weight, config.method.weight, config.method.temperature) == (0.5, 0.5, 1)
    dot = config.replace(optim=config.optim.replace(name="dot"))
    assert (dot.optim.name, dot.optim.delta) == ("dot", 0.09)
    assert dot.optim.replace(name="sgd") == config.optim


def test_one_model_alone():
    for role, name, model in (
        ("teacher", "resnet34", "torchvision/resnet34"),
        ("student", "resnet18", "torchvision/resnet18"),
        ("student", "mobilenetv1", "MobileNetV1"),
        ("student", "wrn_16_1", "wrn_16_1"),
    ):
        config = get_recipe(f"imagenet.{role}.{name}")
        assert_published_setting(config)
        assert (config.student.name, config.student.options, config.teacher) == (model, {}, None)
        assert config.method.method_name == "none"


def test_other_methods_published_settings():
    """The reference code base's reviewkd.yaml and ofd.yaml, and other authors' code by the methods' cards."""
    r34, r50 = (get_recipe(f"imagenet.reviewkd.{pair}").method for pair in PAIRS)
    assert (r34.weight, r34.max_mid_channel, r50.weight, r50.max_mid_channel) == (1, 512, 8, 256)
    assert r34.student_taps == ("stage1.preact", "stage2.preact", "stage3.preact", "stage4.preact", "pooled")
    assert r34.warmup == r50.warmup == 0
    assert get_recipe("imagenet.ofd.resnet50_mobilenetv1").method.weight == 1e-4
    assert get_recipe("imagenet.at.resnet34_resnet18").method.weight == 1000
    crd = get_recipe("imagenet.crd.resnet34_resnet18").method
    assert (crd.weight, crd.feature_dim, crd.negatives, crd.temperature) == (0.8, 128, 16384, 0.07)
    gdkd = get_recipe("imagenet.gdkd.resnet50_mobilenetv1").method
    assert (gdkd.w0, gdkd.w1, gdkd.w2, gdkd.temperature, gdkd.warmup) == (0.5, 2, 2, 1, 0)
    rld = get_recipe("imagenet.rld.resnet34_resnet18").method
    assert (rld.alpha, rld.beta, rld.temperature, rld.confidence_temperature) == (1, 0.5, 1, 1)
    nkd = get_recipe("imagenet.nkd.resnet34_resnet18").method
    assert (nkd.gamma, nkd.temperature) == (1.5, 1)


def test_a_part_keeps_what_the_whole_set():
    lskd = get_recipe("imagenet.lskd-dkd.resnet34_resnet18").method.base
    assert (lskd.task_weight, lskd.alpha, lskd.beta, lskd.temperature) == (0, 9, 4.5, 2)  # 9 times 1 and 0.5
    both = get_recipe("imagenet.kd+reviewkd.resnet34_resnet18").method
    assert (both.kd.task_weight, both.kd.weight, both.kd.temperature) == (0, 0.5, 1)
    assert both.reviewkd.task_weight == 0


def test_an_unpublished_pair():
    config = get_recipe("imagenet.dkd.timm/resnet101_mobilenetv1")
    assert (config.teacher.name, config.teacher.options) == ("timm/resnet101", {})
    assert config.method.beta == 1
    assert get_recipe("imagenet.dkd.self_resnet18").teacher.options == {}


def test_the_published_pairs_are_listed():
    found = [name for name in list_recipes() if name.startswith("imagenet.dkd.")]
    assert found == [f"imagenet.dkd.{pair}" for pair in PAIRS]


@pytest.mark.parametrize("pair", PAIRS)
def test_the_papers_methods_fit_both_pairs(pair):
    torch.manual_seed(0)
    models = get_recipe(f"imagenet.kd.{pair}")
    student, teacher = (create_model(config.name, 5) for config in (models.student, models.teacher))
    image, label = torch.randn(2, 3, 64, 64), torch.tensor([0, 3])
    for name in ("kd", "dkd", "at", "ofd", "reviewkd", "crd"):
        method = get_recipe(f"imagenet.{name}.{pair}").method
        if name == "crd":
            method = method.replace(negatives=8)
        distiller = Distiller(
            student, teacher, method, input_shape=(3, 64, 64), labels=torch.arange(40) % 5, batch_size=2
        )
        losses = distiller(image, label, progress=0.5, index=torch.tensor([0, 3])).losses
        assert set(losses) == {"task", name}
        assert all(0 < loss.item() < float("inf") for loss in losses.values()), losses


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A folder of four wnids."""
    root = tmp_path_factory.mktemp("imagenet")
    for split, count in (("train", 6), ("val", 2)):
        for label, wnid in enumerate(("n01440764", "n01443537", "n01484850", "n01491361")):
            (root / split / wnid).mkdir(parents=True)
            for i in range(count):
                rng = np.random.default_rng([label, i, count])
                pixels = rng.integers(0, 256, (8, 10, 3), dtype=np.uint8) // 2 + 30 * label
                path = root / split / wnid / f"{wnid}_{i}.JPEG"
                Image.fromarray(pixels.astype(np.uint8)).resize((50, 40)).save(path, "jpeg")
    return root


SMALL = "--data.image-size 32 --data.resize 36 --data.workers 0 --batch-size 8 --epochs 2 --device cpu --json"


def run(capsys, recipe, root, out, *flags):
    code = command(["train", recipe, "--data.root", str(root), "--out", str(out), *SMALL.split(), *flags])
    output = capsys.readouterr()
    assert code == 0, output.err
    return json.loads(output.out)


def test_a_small_run(tree, tmp_path, capsys):
    run(capsys, "imagenet.teacher.resnet8", tree, tmp_path / "teacher")
    flags = ("--teacher.checkpoint", str(tmp_path / "teacher"))
    summary = run(capsys, "imagenet.dkd.resnet8_resnet8", tree, tmp_path / "run", *flags)
    assert summary["step"] == 6
    config = ClassificationConfig.model_validate_json((tmp_path / "run" / "config.json").read_text())
    splits = load_data(config.data)
    assert isinstance(splits.train, StreamSet)
    assert splits.train.random_crop
    assert not splits.test.random_crop


def test_the_papers_student_takes_a_step(tree, tmp_path, capsys):
    torch.save(create_model("resnet8", 4).state_dict(), tmp_path / "teacher.pt")
    flags = ("--teacher.checkpoint", str(tmp_path / "teacher.pt"), "--max-steps", "1")
    summary = run(capsys, "imagenet.dkd.resnet8_mobilenetv1", tree, tmp_path / "run", *flags)
    assert summary["student_parameters"] == 4231976 - 996 * 1025  # four classes, not 1,000


def test_a_teacher_of_other_classes_is_refused(tree, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "torchvision.models.resnet.ResNet34_Weights.get_state_dict",
        lambda *_, **__: create_model("torchvision/resnet34", 1000).state_dict(),
    )
    words = ["train", "imagenet.dkd.resnet34_resnet18", "--data.root", str(tree), *SMALL.split()]
    assert command([*words, "--out", str(tmp_path / "run")]) == 2
    assert "pretrained on 1000 classes, the data 4" in capsys.readouterr().err
