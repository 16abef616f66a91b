"""`mdistiller doctor`."""

import shutil
import sys
import tomllib
from pathlib import Path

import torch
import yaml

import mdistiller
from mdistiller.cli import doctor
from mdistiller.errors import EXTRAS

ROOT = Path(__file__).parents[2]


def test_facts(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = cli("doctor", "--json")
    assert (done.code, done.err) == (0, "")
    found = done.json()
    assert found["versions"]["mdistiller"] == mdistiller.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    names = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    assert [device["device"] for device in found["devices"]][: len(names)] == names
    assert found["devices"][0]["precisions"][0] == "float32"
    assert 1 <= found["workers"] <= 16
    free = shutil.disk_usage(tmp_path).free
    assert abs(found["free_disk_gb"][str(tmp_path)] - free / 1e9) < 1


def test_extras_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {
        name: tuple(word.partition(">")[0] for word in words)
        for name, words in project["optional-dependencies"].items()
        if name not in ("dev", "docs")
    }
    assert extras == {name: extra.packages for name, extra in EXTRAS.items()}
    assert all(extra.use for extra in EXTRAS.values())


def test_a_missing_package(cli, monkeypatch):
    monkeypatch.setattr(
        doctor, "find_spec", lambda name: None if name in ("onnxscript", "wandb") else object()
    )
    extras = yaml.safe_load(cli("doctor").out)["extras"]
    assert {name for name, extra in extras.items() if "missing" in extra} == {"onnx", "wandb"}
    assert (extras["onnx"]["missing"], extras["wandb"]["missing"]) == (["onnxscript"], ["wandb"])
    assert extras["wandb"] == extras["wandb"] | {"use": "--log wandb", "install": "pip install wandb"}


def test_text_is_what_json_holds(cli):
    assert yaml.safe_load(cli("doctor").out).keys() == cli("doctor", "--json").json().keys()
