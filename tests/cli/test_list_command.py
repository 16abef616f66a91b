"""`mdistiller list`."""

from __future__ import annotations

from pathlib import Path

import pytest

from mdistiller.methods import get_method, list_methods
from mdistiller.models import create_model, list_models
from mdistiller.recipes import list_recipes

PLUGIN = Path(__file__).resolve().parents[2] / "examples" / "my_method.py"


@pytest.fixture(scope="module")
def models(cli):
    return cli("list", "models", "--json")


def test_models(models):
    rows = models.json()
    assert [row["name"] for row in rows] == list_models()
    parameters = {row["name"]: row["parameters"] for row in rows}
    for name in ("resnet8x4", "vgg8", "MobileNetV2"):
        assert parameters[name] == sum(p.numel() for p in create_model(name).parameters())
    assert (models.code, models.err) == (0, "")


def test_methods(cli):
    rows = cli("list", "methods", "--json").json()
    assert [row["name"] for row in rows] == list_methods()
    for row in rows:
        method = get_method(row["name"])
        assert row == {"name": method.name, "kind": method.kind, "year": method.year, "paper": method.paper}
        assert row["paper"]
    assert {"none", "kd", "dkd"} <= {row["name"] for row in rows}


def test_recipes(cli):
    assert [row["name"] for row in cli("list", "recipes", "--json").json()] == list_recipes()


def test_tables(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    done = cli("list", "methods")
    assert (done.code, done.err) == (0, "")
    head, *lines = done.out.splitlines()
    assert head.split() == ["name", "kind", "year", "paper"]
    assert [line.split()[0] for line in lines] == list_methods()
    none = next(line for line in lines if line.startswith("none"))
    assert none.split()[2] == "–"  # no year
    assert [line.strip() for line in cli("list", "recipes").out.splitlines()[1:]] == list_recipes()


@pytest.mark.usefixtures("forget_plugins")
def test_plugins_are_listed(cli):
    rows = cli("list", "methods", "--plugin", PLUGIN, "--json").json()
    assert {"name": "my_cosine", "kind": "logit", "year": 2026, "paper": "an example"} in rows
    names = [row["name"] for row in cli("list", "recipes", "--plugin", PLUGIN, "--json").json()]
    assert "cifar100.my_cosine.resnet32x4_resnet8x4" in names
