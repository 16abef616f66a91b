"""`mdistiller show`, and the line about the length of a run."""

import json

import pytest

from mdistiller.recipes import get_recipe


def test_a_published_recipe(cli):
    done = cli("show", "cifar100.mlkd.vgg13_vgg8")
    assert (done.code, done.err) == (0, "")
    first, *lines = done.out.splitlines()
    assert first == "cifar100.mlkd.vgg13_vgg8: 75.18 (best)"
    # The authors' schedule, and that of LSKD's code.
    assert [line for line in lines if line.startswith(("published", "our default"))] == [
        "published: 75.18 (best)",
        "published: no figure",
        "our default: Jin-Ying/Multi-Level-Logit-Distillation@5ee473f:configs/cifar100/ours/",
    ]
    assert lines.count("  drops 150, 180, 210") == 3
    assert "  epochs 480" in lines
    assert "  lr 0.025" in lines


def test_a_recipe_that_nobody_published(cli):
    done = cli("show", "cifar100.lskd-dkd.vgg13_resnet8x4")
    assert done.out.startswith("cifar100.lskd-dkd.vgg13_resnet8x4: default, not published\n")
    assert (
        "our default: default, not published; values of other pairs or data, from sunshangquan/" in done.out
    )
    assert "  method.base.beta 54" in done.out


def test_json(cli):
    shown = cli("show", "cifar100.reviewkd.resnet32x4_resnet8x4", "--json").json()
    assert [run["batch_size"] for run in shown["published"]] == [128, 64]
    assert shown["published"][0]["top1"] == [75.63]
    config = get_recipe("cifar100.reviewkd.resnet32x4_resnet8x4")
    assert shown["default"]["method"] == json.loads(config.method.model_dump_json())
    assert (shown["default"]["lr"], shown["default"]["epochs"]) == (config.optim.lr, config.epochs)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("cifar100.dkdd.vgg13_vgg8", "nearest: dkd"),
        ("cifar100", "a recipe is"),
        ("cifar100.kd.vgg14_vgg8", "vgg13"),
    ],
)
def test_unknown_recipes(cli, recipe, said):
    done = cli("show", recipe)
    assert done.code == 2
    assert said in done.message


def test_a_run_says_what_happened_to_the_drops(cli, tmp_path):
    flags = ("--max-steps", 2, "--epochs", 60, "--out", tmp_path / "run", *cli.FAST)
    done = cli("train", "cifar100.student.resnet8", *flags)
    assert done.code == 0, done.err
    assert "2 steps for the recipe's 240 epochs: the rate drops after" in done.message
    usual = cli("train", "digits.student.resnet8", "--epochs", 1, "--out", tmp_path / "digits", *cli.FAST)
    assert "1 epoch for the recipe's 20 epochs: the cosine schedule stretches with them" in usual.message


def test_a_run_of_an_earlier_version_keeps_its_values(cli, tmp_path):
    """The recipes of MLKD had CIFAR-100's usual rate."""
    values = get_recipe("cifar100.mlkd.resnet56_resnet20").model_dump(mode="json")
    values["optim"] |= {"lr": 0.05, "milestones": [0.625, 0.75, 0.875]}
    values |= {"student": {"name": "resnet8"}, "teacher": None, "method": {"name": "none"}, "max_steps": 2}
    values["data"] |= {"kind": "synthetic", "synthetic_samples": 32, "image_size": 16}
    values |= {"batch_size": 16, "device": "cpu"}
    path = tmp_path / "old.json"
    path.write_text(json.dumps(values))
    done = cli("train", path, "--out", tmp_path / "again")
    assert done.code == 0, done.err
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["optim"]["lr"] == 0.05
    assert again["recipe"] == "cifar100.mlkd.resnet56_resnet20"
