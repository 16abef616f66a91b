"""`mdistiller list`."""

from __future__ import annotations

from pathlib import Path

import pytest

from mdistiller.methods import get_method, list_methods
from mdistiller.models import create_model, list_models
from mdistiller.recipes import list_recipes
from mdistiller.recipes.coco import list_detection_recipes

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


@pytest.fixture(scope="module")
def methods(cli):
    return cli("list", "methods", "--json").json()


def test_methods(methods):
    assert [row["name"] for row in methods] == sorted([*list_methods(), "dot"])
    for row in methods:
        assert row["paper"]
        if row["name"] != "dot":
            method = get_method(row["name"])
            assert (row["kind"], row["year"], row["paper"]) == (method.kind, method.year, method.paper)


def test_extra_parameters_are_the_published_ones(methods):
    """The paper's Figure 2, where this counts the same: CRD's 12.3 M there are its memory bank."""
    extra = {row["name"]: row["extra_parameters"] for row in methods}
    assert [extra[name] for name in ("kd", "rkd", "dkd")] == [0, 0, 0]
    assert round(extra["fitnet"] / 1e3, 1) == 16.8
    assert round(extra["ofd"] / 1e3, 1) == 86.9
    assert round(extra["reviewkd"] / 1e6, 1) == 1.8


def test_taps_of_methods(methods):
    taps = {row["name"]: (row["student_taps"], row["teacher_taps"]) for row in methods}
    assert taps["at"] == (["stage1", "stage2", "stage3"],) * 2
    assert taps["crd"] == (["pooled"], ["pooled"])
    assert taps["dkd"] == ([], [])


def test_recipes_name_their_command(cli):
    rows = cli("list", "recipes", "--json").json()
    for command, names in (("train", list_recipes()), ("detect train", list_detection_recipes())):
        assert [row["name"] for row in rows if row["command"] == command] == names
    assert len({row["name"] for row in rows}) == len(rows)


def test_tables(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    done = cli("list", "methods")
    assert (done.code, done.err) == (0, "")
    head, *lines = done.out.splitlines()
    columns = ["name", "kind", "year", "student", "taps", "teacher", "taps", "extra", "parameters", "paper"]
    assert head.split() == columns
    rows = {line.split()[0]: line.split() for line in lines if line and not line.startswith(" ")}
    assert rows["none"][2] == "–"  # no year
    assert rows["ofd"][3:6] == ["stage1-3.preact", "stage1-3.preact", "86,912"]
    lines = [line.split(maxsplit=1) for line in cli("list", "recipes").out.splitlines()[1:]]
    names = [name for name, command in lines if command.strip() == "train"]
    assert names == list_recipes()


@pytest.mark.usefixtures("forget_plugins")
def test_plugins_are_listed(cli):
    rows = cli("list", "methods", "--plugin", PLUGIN, "--json").json()
    mine = next(row for row in rows if row["name"] == "my_cosine")
    assert (mine["kind"], mine["year"], mine["paper"]) == ("logit", 2026, "an example")
    names = [row["name"] for row in cli("list", "recipes", "--plugin", PLUGIN, "--json").json()]
    assert "cifar100.my_cosine.resnet32x4_resnet8x4" in names
