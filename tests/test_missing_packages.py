"""Packages of extras that are not installed: one sentence with a command that works, and needs no index."""

import importlib
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from mdistiller.data import DataConfig, load_data
from mdistiller.deploy.predict import require_onnx
from mdistiller.deploy.student import load_student
from mdistiller.errors import EXTRAS, MissingPackageError, install_command
from mdistiller.models import create_model
from mdistiller.runs.loggers import LOGGERS, Loggers
from mdistiller.stored import write_outputs
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.detection.deployment import DetectorDeployment

ROOT = Path(__file__).parents[1]


def hf(folder):
    load_data(DataConfig(kind="hf", root=folder))


def integration(name):
    sys.modules.pop(f"mdistiller.integrations.{name}", None)
    importlib.import_module(f"mdistiller.integrations.{name}")


# By the module that is missing. An evaluator is built before the first step.
USES = {
    "datasets": hf,
    "transformers[torch]": lambda folder: integration("hf"),
    "onnx": lambda folder: require_onnx("onnx"),
    "onnxruntime": lambda folder: require_onnx("onnx", "onnxruntime"),
    "onnxscript": lambda folder: require_onnx("onnx", "onnxscript"),
    "pyarrow": lambda folder: write_outputs(folder / "outputs.parquet", {}),
    "ray[tune]": lambda folder: integration("ray"),
    "pycocotools": lambda folder: DetectorDeployment().evaluator(None, None, None),
    "timm": lambda folder: create_model("timm/resnet18"),
    "huggingface_hub": lambda folder: load_student("hf://user/student"),
}


@pytest.mark.parametrize("module", USES)
def test_an_error_has_the_command(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module.partition("[")[0], None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    with pytest.raises(MissingPackageError) as caught:
        USES[module](tmp_path)
    said = str(caught.value)
    (extra,) = (name for name, found in EXTRAS.items() if module in found.packages)
    assert said.endswith(f" needs {module}: {install_command(extra)}")
    assert "\n" not in said


@pytest.mark.parametrize("name", LOGGERS)
def test_a_warning_has_the_command(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)
    Loggers(tmp_path, ClassificationConfig(student={"name": "resnet8"}, log=(name,))).start()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"it is not installed: {install_command(name)}")


def test_each_package_of_an_extra_is_tried():
    assert {package for extra in EXTRAS.values() for package in extra.packages} == {
        *USES,
        *(name.replace("mlflow", "mlflow-skinny") for name in LOGGERS),
    }
    assert install_command("onnx") == "pip install onnx onnxruntime onnxscript"


def test_no_text_installs_the_package_from_an_index():
    files = [ROOT / "README.md", *(ROOT / "src").rglob("*.py"), *(ROOT / "docs").rglob("*.md")]
    wrong = re.compile(r"pip install ['\"]?mdistiller")
    assert not [
        str(file) for file in files if "generated" not in file.parts and wrong.search(file.read_text())
    ]
    # Beside the one place: the help of export, pandas, which is in no extra, and the command's own list.
    texts = {
        file.name: re.findall(r"pip install [^`\"]*", file.read_text())
        for file in (ROOT / "src").rglob("*.py")
    }
    found = {name: commands for name, commands in texts.items() if commands}
    assert found.pop("export.py") == [install_command("onnx")]
    assert set(found) <= {"api.py", "doctor.py"}


def test_the_metadata_of_a_release():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["authors"] == [{"name": "mdistiller contributors"}]
    assert {"Homepage", "Repository", "Issues", "Changelog"} <= project["urls"].keys()
    versions = [line.rpartition(" ")[2] for line in project["classifiers"] if ":: 3." in line]
    assert versions == ["3.11", "3.12", "3.13", "3.14"]
    assert f"version: {metadata.version('mdistiller')}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_source_archive_leaves_out_results():
    hatch = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]
    assert hatch["build"]["targets"]["sdist"]["exclude"] == ["/results"]
    assert (ROOT / "results").is_dir()


def test_ci_runs_targets_of_the_makefile():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    workflows = ROOT / ".github" / "workflows"
    ci, release = ((workflows / name).read_text() for name in ("ci.yml", "release.yml"))
    matrix = set(re.findall(r"target: ([\w-]+)", ci))
    assert matrix == {"lint", "types", "docs", "test", "test-floor"}
    used = matrix | set(re.search(r"run: make (.*)", release)[1].split())
    assert used <= targets
