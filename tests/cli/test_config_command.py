"""`mdistiller config RECIPE`, and `mdistiller train FILE.yaml`."""

import json

import pytest
import yaml

from mdistiller.cli.train import TrainCommand
from mdistiller.errors import ConfigError
from mdistiller.training.task import load_config

RECIPE = "cifar100.dkd.resnet56_resnet20"
RECIPES = (RECIPE, "small.fgfi.fasterrcnn_resnet50_resnet18", "cifar100.dkd+reviewkd.resnet32x4_resnet8x4")


@pytest.mark.parametrize("recipe", RECIPES)
def test_file_has_the_config_of_recipe_and_flags(cli, recipe, tmp_path):
    flags = ("--epochs", "3", "--optim.lr", "1e-4", "--log", "tensorboard", "--out", "some/where")
    done = cli("config", recipe, *flags)
    assert (done.code, done.err) == (0, "")
    (tmp_path / "my.yaml").write_text(done.out)
    expected = TrainCommand.parse([recipe, *flags]).config
    assert TrainCommand.parse([str(tmp_path / "my.yaml")]).config == expected
    # Readable by any reader of YAML, and the same as the JSON.
    values = yaml.safe_load(done.out)
    assert values == expected.model_dump(mode="json")
    assert cli("config", recipe, *flags, "--json").json() == values
    changed = TrainCommand.parse([str(tmp_path / "my.yaml"), "--epochs", "5"]).config
    assert (changed.epochs, changed.optim.lr) == (5, 1e-4)


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
