"""`mdistiller show`, and the line about the length of a run."""

import json

import pytest
import yaml

from mdistiller.recipes import get_recipe


def test_a_published_recipe(cli):
    done = cli("show", "cifar100.mlkd.vgg13_vgg8")
    assert (done.code, done.err) == (0, "")
    shown = yaml.safe_load(done.out)
    assert list(shown)[:2] == ["recipe", "status"]
    assert shown["status"] == "75.18 (best)"
    # The authors' schedule, and that of LSKD's code.
    first, second = shown["published"]
    assert first["source"] == shown["default_source"]
    assert first["source"] == "Jin-Ying/Multi-Level-Logit-Distillation@5ee473f:configs/cifar100/ours/"
    assert "top1" not in second
    assert {tuple(values["drops"]) for values in (first, second, shown["default"])} == {(150, 180, 210)}
    assert second["epochs"] == 480
    assert shown == cli("show", "cifar100.mlkd.vgg13_vgg8", "--json").json()


def test_a_recipe_that_nobody_published(cli):
    done = cli("show", "cifar100.lskd-dkd.vgg13_resnet8x4")
    shown = yaml.safe_load(done.out)
    assert list(shown) == ["recipe", "status", "default_source", "default"]  # nothing that is empty
    assert shown["status"] == "default, not published"
    origin = "default, not published; values of other pairs or data, from sunshangquan/"
    assert shown["default_source"].startswith(origin)
    assert shown["default"]["method"]["base"]["beta"] == 54


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
    assert "2 steps instead of the recipe's 240 epochs; the learning rate drops after" in done.message
    usual = cli("train", "digits.student.resnet8", "--epochs", 1, "--out", tmp_path / "digits", *cli.FAST)
    assert (
        "1 epoch instead of the recipe's 20 epochs, with the cosine schedule scaled to fit" in usual.message
    )


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
