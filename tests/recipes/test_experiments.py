"""The paper's experiments: which runs they are, and which figures stand beside them."""

import pytest

from mdistiller.errors import UnknownNameError
from mdistiller.recipes import get_recipe
from mdistiller.recipes.experiments import EXPERIMENTS, get_experiment, teacher_config


def cells(name, scale="paper"):
    return {(cell.pair, cell.setting): cell for cell in get_experiment(name).cells(scale)}


def test_published_figures_of_the_cifar100_rows():
    """KD and DKD from the paper's tables 6 and 7; the rest is marked as unchecked."""
    found = cells("cifar100")
    checked = {(pair, setting): cell.published for (pair, setting), cell in found.items() if cell.checked}
    assert checked == {
        ("resnet32x4_resnet8x4", "KD"): 73.33,
        ("resnet32x4_resnet8x4", "DKD"): 76.32,
        ("wrn_40_2_wrn_16_2", "KD"): 74.92,
        ("wrn_40_2_wrn_16_2", "DKD"): 76.24,
        ("wrn_40_2_ShuffleV1", "KD"): 74.83,
        ("wrn_40_2_ShuffleV1", "DKD"): 76.70,
        ("vgg13_vgg8", "KD"): 72.98,
        ("vgg13_vgg8", "DKD"): 74.68,
        ("vgg13_MobileNetV2", "KD"): 67.37,
        ("vgg13_MobileNetV2", "DKD"): 69.71,
        ("resnet56_resnet20", "KD"): 70.66,
        ("resnet56_resnet20", "DKD"): 71.97,
        ("resnet32x4_ShuffleV2", "KD"): 74.45,
        ("resnet32x4_ShuffleV2", "DKD"): 77.07,
    }
    first = "resnet32x4_resnet8x4"
    others = {s: cell.published for (pair, s), cell in found.items() if pair == first and not cell.checked}
    assert others == {
        "alone": 72.50,
        "TCKD alone": 68.63,
        "NCKD alone": 74.26,
        "ReviewKD": 75.63,
        "CRD": 75.51,
        "DIST": 76.31,
        "LSKD+DKD": 77.01,
    }


def test_cells_are_the_recipes():
    found = cells("cifar100")
    assert found["vgg13_vgg8", "DKD"].config == get_recipe("cifar100.dkd.vgg13_vgg8")
    assert found["vgg13_vgg8", "alone"].config == get_recipe("cifar100.student.vgg8")
    assert found["resnet32x4_resnet8x4", "LSKD+DKD"].config == get_recipe(
        "cifar100.lskd-dkd.resnet32x4_resnet8x4"
    )
    assert all(cell.config.epochs == 240 and cell.config.batch_size == 64 for cell in found.values())


def test_table1_splits_kd():
    found = cells("table1")
    pair = "resnet32x4_resnet8x4"
    assert [found[pair, s].published for s in ("alone", "KD (TCKD + NCKD)", "TCKD alone", "NCKD alone")] == [
        72.50,
        73.63,
        68.63,
        74.26,
    ]
    assert len(found) == 16
    target, others = found[pair, "TCKD alone"].config.method, found[pair, "NCKD alone"].config.method
    assert (target.alpha, target.beta, others.alpha, others.beta) == (1, 0, 0, 1)
    whole = found[pair, "KD (TCKD + NCKD)"].config.method
    assert (whole.method_name, whole.weight, whole.task_weight, whole.temperature) == ("kd", 1, 1, 4)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_smaller_scales_have_one_pair_and_no_published_figure(name):
    for scale, images in (("small", 5000), ("smoke", 60)):
        found = get_experiment(name).cells(scale)
        assert len({cell.pair for cell in found}) == 1
        assert {cell.published for cell in found} == {None}
        assert {cell.config.data.train_limit for cell in found} == {images}
        settings = {cell.setting for cell in get_experiment(name).cells("paper")}
        assert {cell.setting for cell in found} == settings
    assert teacher_config("resnet14", "smoke").data.kind == "digits"
    assert teacher_config("resnet56", "paper") == get_recipe("cifar100.teacher.resnet56")


def test_unknown_experiments():
    with pytest.raises(UnknownNameError, match="unknown experiment 'table11'; nearest: table1"):
        get_experiment("table11")
