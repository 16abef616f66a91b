"""Settings of methods of 2023 to 2025 against the configs of their authors' repositories."""

import pytest

from mdistiller.config import find_field
from mdistiller.recipes import get_recipe

# JiamingLv/WKD@214cf88 configs/cifar100/wkd_{l,f,lf}: WKD_LOGIT_WEIGHT, TEMPERATURE, WKD_FEAT_WEIGHT,
# MEAN_COV_RATIO, SPATIAL_GRID of the single runs, then of the sum.
WKD = {
    "resnet32x4_resnet8x4": ((600, 8, 0.08, 4, 1), (200, 8, 0.08, 8, 1)),
    "wrn_40_2_ShuffleV1": ((200, 6, 0.3, 3, 4), (60, 4, 0.5, 3, 4)),
}
# WangYZ1608/Knowledge-Distillation-via-ND@fc6f3f9 CIFAR/train_cifar.sh, DIST++/train_dist.sh: KD and ND;
# TCKD, NCKD and ND; DIST and ND.
ND = {
    "resnet56_resnet20": ((1, 2), (2.5, 4, 3.5), (2, 1)),
    "resnet32x4_resnet8x4": ((3.5, 2), (2, 8, 0.5), (1.5, 4)),
    "wrn_40_2_wrn_40_1": ((1, 1.5), (1, 6, 1), (2.5, 3)),
    "ResNet50_MobileNetV2": ((3, 0.5), (0.5, 8, 1), (7, 1)),
    "resnet32x4_ShuffleV1": ((2.5, 1.5), (0.5, 8, 4), (2.5, 3)),
    "resnet32x4_ShuffleV2": ((4, 0.5), (0.5, 6, 0.5), (3, 4)),
}
# jiequancui/DKL@c5e8ad2 DKLv1/KD-dkl/configs/cifar100/ikl_kd: ALPHA, BETA.
IKL = {
    "resnet110_resnet32": (1, 12),
    "resnet32x4_resnet8x4": (1, 8),
    "resnet32x4_ShuffleV1": (1, 8),
    "resnet32x4_ShuffleV2": (3, 12),
    "ResNet50_MobileNetV2": (1, 12),
    "resnet56_resnet20": (1, 4),
    "vgg13_MobileNetV2": (4, 12),
    "vgg13_vgg8": (1, 12),
    "wrn_40_2_ShuffleV1": (1, 4),
    "wrn_40_2_wrn_16_2": (3, 12),
    "wrn_40_2_wrn_40_1": (1, 8),
}
# ismail31416/LumiNet@8cf749b configs/cifar100/luminet: CE_WEIGHT, ALPHA, T.
LUMINET = {
    "resnet32x4_resnet8x4": (2, 33, 4),
    "ResNet50_MobileNetV2": (2, 70, 8),
    "vgg13_MobileNetV2": (2, 70, 8),
    "vgg13_vgg8": (1, 70, 8),
    "wrn_40_2_ShuffleV1": (1, 35, 4),
    "wrn_40_2_wrn_40_1": (1, 75, 8),
}


def fields(recipe, *names):
    method = get_recipe(recipe).method
    return tuple(find_field(method, name) for name in names)


@pytest.mark.parametrize("pair", WKD)
def test_wkd(pair):
    logits, maps = ("weight", "temperature"), ("weight", "mean_weight", "grid")
    alone, both = WKD[pair]
    assert fields(f"cifar100.wkd_l.{pair}", *logits) == alone[:2]
    assert fields(f"cifar100.wkd_f.{pair}", *maps) == alone[2:]
    names = [f"wkd_l.{name}" for name in logits] + [f"wkd_f.{name}" for name in maps]
    assert fields(f"cifar100.wkd_l+wkd_f.{pair}", *names) == both
    fixed = ("task_weight", "sharpness", "regularization", "iterations", "decay_start")
    assert fields(f"cifar100.wkd_l.{pair}", *fixed) == (1, 1, 0.05, 10, 150 / 240)
    assert fields(f"cifar100.wkd_f.{pair}", "task_weight", "bottleneck", "decay_start") == (1, 0, 150 / 240)


def test_wkd_on_imagenet():
    names = ("weight", "temperature", "sharpness", "decay_start")
    assert fields("imagenet.wkd_l.resnet34_resnet18", *names) == (30, 2, 1, 0)
    assert fields("imagenet.wkd_l.resnet50_mobilenetv1", *names) == (25, 2, 2, 0)
    names = ("weight", "mean_weight", "grid", "bottleneck", "decay_start")
    assert fields("imagenet.wkd_f.resnet34_resnet18", *names) == (0.02, 2, 4, 256, 0)
    assert fields("imagenet.wkd_f.resnet50_mobilenetv1", *names) == (0.005, 2, 4, 256, 30 / 100)


@pytest.mark.parametrize("pair", ND)
def test_nd(pair):
    kd, dkd, dist = ND[pair]
    assert fields(f"cifar100.nd.{pair}", "base.weight", "weight") == kd
    assert fields(f"cifar100.nd-dkd.{pair}", "base.alpha", "base.beta", "weight") == dkd
    assert fields(f"cifar100.nd-dist.{pair}", "base.beta", "base.gamma", "weight") == (dist[0], *dist)
    student = pair.rpartition("_")[2] if "wrn" not in pair else "wrn_40_1"
    dropout = 0.0 if student.startswith("resnet") else 0.5
    for name in ("nd", "nd-dkd", "nd-dist"):
        found = fields(f"cifar100.{name}.{pair}", "task_weight", "warmup", "dropout", "base.temperature")
        assert found == (1, 20 / 240, dropout, 4)


@pytest.mark.parametrize("pair", IKL)
def test_ikl(pair):
    found = fields(f"cifar100.ikl.{pair}", "alpha", "beta", "temperature", "weights", "weight_temperature")
    assert found == (*IKL[pair], 4, "sample", 100)
    assert fields(f"cifar100.ikl.{pair}", "warmup") == (20 / 240,)


def test_ikl_on_imagenet():
    names = ("alpha", "beta", "temperature", "weights", "weight_temperature", "warmup")
    assert fields("imagenet.ikl.resnet34_resnet18", *names) == (1, 0.5, 1, "class", 1, 0)
    assert fields("imagenet.ikl.resnet50_mobilenetv1", *names) == (4, 1, 1, "class", 1, 0)


@pytest.mark.parametrize("pair", LUMINET)
def test_luminet(pair):
    names = ("task_weight", "alpha", "temperature", "warmup")
    assert fields(f"cifar100.luminet.{pair}", *names) == (*LUMINET[pair], 20 / 240)
    assert fields("imagenet.luminet.resnet34_resnet18", *names) == (1, 2, 0.7, 0)


def test_a_part_of_a_sum_keeps_the_task_weight_0():
    assert fields("cifar100.dkd+luminet.vgg13_vgg8", "task_weight", "luminet.task_weight") == (1, 0)
