"""Benchmarks run by hand: their imports have to follow the package."""

import ast
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import processes
import pytest
from PIL import Image

from mdistiller.methods import get_method, list_methods

FILES = sorted((Path(__file__).resolve().parents[1] / "benchmarks").glob("*.py"))


def imports(tree):
    """Yields module and name of each import from this package."""
    for node in tree.body:
        # Another package of the same name is imported there, in a process of its own.
        if isinstance(node, ast.FunctionDef) and node.name == "reference_step":
            continue
        for part in ast.walk(node):
            if isinstance(part, ast.ImportFrom) and (part.module or "").split(".")[0] == "mdistiller":
                yield from ((part.module, alias.name) for alias in part.names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_import_of_a_benchmark_exists(file):
    for module, name in imports(ast.parse(file.read_text(encoding="utf-8"))):
        assert hasattr(import_module(module), name), f"{file.name}: {module} has no {name}"


def test_every_method_is_compared_with_its_authors_code_or_has_a_reason(monkeypatch):
    monkeypatch.syspath_prepend(str(FILES[0].parent))
    cases = import_module("official_cases")
    named = {case.method for case in cases.CASES} | set(cases.NOT_COMPARED)
    own = {name for name in list_methods() if get_method(name).__module__.startswith("mdistiller.methods.")}
    assert own - named == {"none"}


def gpu(part, out):
    script = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.sh"
    env = os.environ | {"SMOKE": "1", "OUT": str(out), "PYTHON": sys.executable}
    return subprocess.run([script, part], env=env, capture_output=True, text=True)


def test_the_parts_for_a_gpu_run_with_tiny_steps(tmp_path):
    assert gpu("tests", tmp_path).returncode == 0  # skipped tests
    done = gpu("rows", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "rows" / "cifar100.md").is_file()
    wrong = gpu("row", tmp_path)
    assert (wrong.returncode, "unknown part 'row'" in wrong.stderr) == (2, True)


def test_loaders_take_turns_on_the_same_files(tmp_path):
    for label, name in enumerate(("ant", "bee")):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(7):
            pixels = np.full((40, 60, 3), 100 * label + 10 * i, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "train" / name / f"{i}.jpg")
    script = next(file for file in FILES if file.stem == "data_loaders")
    size = ("--workers", "0", "--batch-size", "4", "--image-size", "24", "--rounds", "2", "--device", "cpu")
    process = processes.Forked(processes.script, script, tmp_path, *size, "--out", tmp_path / "out")
    out, err = process.communicate()
    assert process.returncode == 0, err
    found = json.loads((tmp_path / "out" / "data_loaders.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["mdistiller", "torchvision ImageFolder", "timm"]
    assert all(len(row["images_per_second"]) == 1 for row in found["rows"])  # the first round does not count
    assert found["rows"][1]["of_torchvision"] == 1
    assert found["settings"]["images"] == 12  # of 14
    assert (tmp_path / "out" / "data_loaders.md").read_text() in out


def test_steps_of_runs_with_and_without_a_cache(tmp_path):
    script = next(file for file in FILES if file.stem == "teacher_cache")
    size = ("--pair", "resnet8", "resnet8", "--batch-size", "4", "--rounds", "2", "--steps", "1")
    process = processes.Forked(processes.script, script, *size, "--out", tmp_path)
    _, err = process.communicate()
    assert process.returncode == 0, err
    found = json.loads((tmp_path / "resnet8-float32.json").read_text())
    assert {len(times) for times in found["seconds_a_step"].values()} == {2}
    assert found["cache_bytes"] > 0
