"""`mdistiller doctor`."""

import shutil
import sys
import tomllib
from pathlib import Path

import torch

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
    assert abs(found["free_disk"][str(tmp_path)] - free) < 1e9


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
    done = cli("doctor")
    lines = [line.split() for line in done.out.splitlines()]
    assert ["onnx", "missing", "onnxscript"] in [line[:3] for line in lines]
    assert ["wandb", "missing", "wandb", "--log", "wandb"] in lines
    assert lines[-1][-4:] == ["pip", "install", "onnxscript", "wandb"]
    assert max(map(len, done.out.splitlines())) < 110


def test_words_on_a_machine_without_a_gpu():
    found = doctor.examine() | {
        "devices": [{"device": "cpu", "name": "Chip", "precisions": ["float32"]}],
        "cuda": None,
    }
    text = "\n".join(doctor.lines(found))
    assert "  cpu      Chip: float32\n" in text
    assert "no GPU: torch is built for CPUs only" in text
    gpu = {"device": "cuda:0", "name": "H", "precisions": ["float32", "bfloat16", "float16"]}
    found["devices"].append(gpu | {"free_memory": 70e9, "memory": 80e9})
    assert "  cuda:0   H, 70.0 of 80.0 GB free: float32, bfloat16, float16\n" in "\n".join(
        doctor.lines(found)
    )
