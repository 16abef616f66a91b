"""`mdistiller config RECIPE`, and `mdistiller train FILE.yaml`."""

import json

import pytest
import yaml

from mdistiller.cli.train import TrainCommand
from mdistiller.errors import ConfigError
from mdistiller.recipes import get_recipe
from mdistiller.settings import flatten
from mdistiller.training.task import load_config

RECIPE = "cifar100.dkd.resnet56_resnet20"
RECIPES = (RECIPE, "small.fgfi.fasterrcnn_resnet50_resnet18", "cifar100.dkd+reviewkd.resnet32x4_resnet8x4")


@pytest.mark.parametrize("every", [(), ("--all",)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_file_has_the_config_of_recipe_and_flags(cli, recipe, every, tmp_path):
    flags = ("--epochs", "3", "--optim.lr", "1e-4", "--log", "tensorboard", "--out", "some/where")
    done = cli("config", recipe, *flags, *every)
    assert (done.code, done.err) == (0, "")
    (tmp_path / "my.yaml").write_text(done.out)
    expected = TrainCommand.parse([recipe, *flags]).config
    assert TrainCommand.parse([str(tmp_path / "my.yaml")]).config == expected
    # Readable by any reader of YAML, and the same as the JSON.
    values = yaml.safe_load(done.out)
    whole = expected.model_dump(mode="json")
    assert values == whole if every else flatten(values).items() <= flatten(whole).items()
    assert cli("config", recipe, *flags, "--json").json() == whole
    changed = TrainCommand.parse([str(tmp_path / "my.yaml"), "--epochs", "5"]).config
    assert (changed.epochs, changed.optim.lr) == (5, 1e-4)


def test_the_file_is_short_and_explained(cli):
    lines = cli("config", RECIPE, "--student.options", "a", "1").out.splitlines()
    assert len(lines) <= 30
    assert "recipe: cifar100.dkd.resnet56_resnet20" in lines
    assert "  beta: 2.0  # Weight of NCKD" in lines
    assert "epochs: 240  # Passes over the training set" in lines
    assert not [line for line in lines if "momentum" in line]
    text = "\n".join(lines)
    assert yaml.safe_load(text)["student"] == {"options": {"a": 1}}
    lines = cli("config", RECIPE, "--all").out.splitlines()
    assert "  momentum: 0.9" in lines


def test_a_short_file_by_hand(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(
        "recipe: cifar100.dkd.resnet56_resnet20\nepochs: 3\noptim: {lr: 0.1}\nmethod: {name: kd}\n"
    )
    config = TrainCommand.parse([str(path)]).config
    recipe = get_recipe("cifar100.dkd.resnet56_resnet20")
    assert config == recipe.replace(epochs=3, optim={"lr": 0.1}, method={"name": "kd"})
    assert config.optim.milestones == recipe.optim.milestones
    path.write_text("recipe: folder.student.timm/resnet18\nstudent: {options: {pretrained: true}}\n")
    tuned = get_recipe("folder.finetune.timm/resnet18")
    assert TrainCommand.parse([str(path)]).config.optim == tuned.optim
    for text, message in (
        ("recipe: cifar100.dkd.resnet57_resnet20", "unknown teacher 'resnet57'"),
        ("recipe: digits.student.resnet8\nepoch: 3", "my.yaml: .*epoch: unknown field; nearest: epochs"),
        ("recipe: digits.student.resnet8\nplugins: [no/such.py]", "my.yaml: plugins: .*--plugin no/such.py"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            TrainCommand.parse([str(path)])


def test_a_file_by_hand(tmp_path):
    path = tmp_path / "my.yml"
    path.write_text(
        "student: {name: resnet8, options: {}}\ncompile: off\nepochs: 3\n"
        "optim:\n  lr: 1e-3  # YAML 1.1 has this as a text\n  nesterov: true\n"
    )
    config = load_config(path)
    assert (config.compile, config.epochs, config.optim.lr, config.optim.nesterov) == (
        "off",
        3,
        1e-3,
        True,
    )
    path.write_text("student: resnet8\nepochs: [3\n")
    with pytest.raises(ConfigError, match=r"cannot read .*my\.yml: while parsing a flow sequence"):
        load_config(path)
    path.write_text("student: resnet8\nepoch: 3\n")
    with pytest.raises(ConfigError, match=r"my\.yml: epoch: .*nearest: 'epochs'|my\.yml: epoch"):
        load_config(path)
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="holds a list"):
        load_config(path)


def test_no_code_is_run(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(f"student: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(path)
    assert not (tmp_path / "made").exists()


def test_train_a_file(cli, teacher_run, tmp_path):
    done = cli("config", "digits.kd.resnet8_resnet8", *cli.FAST, "--epochs", 1, "--teacher", teacher_run)
    (tmp_path / "my.yaml").write_text(done.out)
    done = cli("train", tmp_path / "my.yaml", "--out", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "run" / "config.json").read_text())["epochs"] == 1
    assert done.json()["out"] == str(tmp_path / "run")


def test_usage(cli):
    assert "usage: mdistiller config RECIPE" in cli("config", "--help").out
    done = cli("config")
    assert (done.code, "config needs a recipe first" in done.message) == (2, True)
    assert "--epochs INT" in cli("config", RECIPE, "--help").out
