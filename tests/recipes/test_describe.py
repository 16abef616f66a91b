"""Published runs and recipes in words."""

import json

import pytest

from mdistiller.recipes import get_recipe, list_recipes
from mdistiller.recipes.describe import describe_length, differences, recipe_status, show_recipe


def test_every_listed_recipe_is_shown():
    for name in list_recipes():
        shown = show_recipe(name)
        assert shown["recipe"] == name
        json.dumps(shown)
        assert ("published" in shown) == (shown["status"] != "default, not published"), name


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        ("cifar100.dkd.resnet32x4_resnet8x4", "76.32 (best)"),
        ("cifar100.kd.resnet32x4_resnet8x4", "73.33 (last)"),
        ("cifar100.lskd-kd.vgg13_vgg8", "74.36 (best)"),
        ("cifar100.student.resnet20", "69.06 (last)"),
        ("cifar100.teacher.resnet56", "72.34 (last)"),
        ("cifar100.student.resnet56", "default, not published"),
        ("cifar100.dkd.resnet56_resnet8", "default, not published"),
        ("cifar100.rld.resnet56_resnet20", "schedule, no figure"),
        ("cifar100.sdd.resnet32x4_resnet8x4", "75.45 (best)"),  # mean of 75.59 and 75.31
        ("cifar10.kd.resnet56_resnet20", "default, not published"),
        ("digits.kd.resnet20_resnet8", "default, not published"),
        ("folder.kd.torchvision/resnet34_torchvision/resnet18", "default, not published"),
        ("imagenet.dkd.resnet34_resnet18", "71.70 (best)"),
        ("tiny-imagenet.kd.ResNet18_ShuffleV2", "62.26 (best)"),
        ("cifar100.kd.self_resnet8x4", "default, not published"),
        ("coco.reviewkd.maskrcnn_resnet101_resnet18", "settings, no figure"),
        ("nothing.kd.pair", "default, not published"),
    ],
)
def test_status(recipe, text):
    assert recipe_status(recipe) == text


def test_a_shown_recipe_has_figures_origin_and_its_values():
    shown = show_recipe("cifar100.lskd-mlkd.vgg13_vgg8")
    assert shown["status"] == "75.22 (best)"
    run, *_ = shown["published"]
    assert run["source"].startswith("sunshangquan/logit-standardization-KD@f6e5aa5:configs/cifar100/mlkd/")
    assert (run["log"], run["teacher"], run["epochs"], run["lr"]) == ([74.79, 75.18], 74.64, 480, 0.01)
    assert (run["drops"], run["views"], run["augment"]) == ([150, 180, 210], 2, "fixmatch")
    assert shown["default"]["method"]["base"]["weight"] == 6
    assert shown["default"]["lr"] == 0.01
    both = show_recipe("cifar100.reviewkd.resnet32x4_resnet8x4")["published"]
    assert [run["batch_size"] for run in both] == [128, 64]
    dot = show_recipe("cifar100.kd.vgg13_vgg8")["published"]
    assert any(run.get("optimizer") == "dot" and 73.77 in run["top1"] for run in dot)


@pytest.mark.parametrize(
    ("recipe", "changes", "line"),
    [
        ("cifar100.dkd.vgg13_vgg8", {}, None),
        (
            "cifar100.dkd.vgg13_vgg8",
            {"epochs": 60},
            "60 epochs instead of the recipe's 240 epochs; "
            "the learning rate drops after 37.5, 45, 52.5, not after 150, 180, 210",
        ),
        (
            "cifar100.lskd-mlkd.vgg13_vgg8",
            {"epochs": 240},
            "240 epochs instead of the recipe's 480 epochs; "
            "the learning rate drops after 75, 90, 105, not after 150, 180, 210",
        ),
        (
            "cifar100.dkd.vgg13_vgg8",
            {"max_steps": 800},
            "800 steps instead of the recipe's 240 epochs; "
            "the learning rate drops after 500, 600, 700, not after 150, 180, 210",
        ),
        (
            "cifar100.mlkd.vgg13_vgg8",
            {"epochs": 480, "optim": {"milestones": (150 / 480, 180 / 480, 210 / 480)}},
            "480 epochs instead of the recipe's 240 epochs; "
            "the learning rate drops after 150, 180, 210, as in the recipe",
        ),
        (
            "digits.kd.resnet20_resnet8",
            {"epochs": 2},
            "2 epochs instead of the recipe's 20 epochs, with the cosine schedule scaled to fit",
        ),
    ],
)
def test_a_run_of_another_length_says_what_happens_to_the_drops(recipe, changes, line):
    assert describe_length(get_recipe(recipe).replace(**changes)) == line


def test_a_run_without_a_known_recipe_has_no_line():
    config = get_recipe("digits.kd.resnet20_resnet8").replace(epochs=2)
    assert describe_length(config.replace(recipe="")) is None
    assert describe_length(config.replace(recipe="other.kd.resnet20_resnet8")) is None


def test_differences_from_the_recipe():
    config = get_recipe("cifar100.dkd.vgg13_vgg8")
    assert differences(config, config) == []
    changed = config.replace(epochs=60, method={"beta": 8.0}, seed=3, optim={"lr": 0.1})
    assert differences(changed, config) == [
        "lr 0.1 for 0.05",
        "epochs 60 for 240",
        "drops 37.5, 45, 52.5 for 150, 180, 210",
        "method.beta 8 for 6",
    ]
