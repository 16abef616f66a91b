"""A detector of one's own: registered, read by its own adapter, taught by and teaching torchvision's."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_detectors import batch, plugged_in, two_stage, write_set
from torchvision.models.detection.image_list import ImageList

import mdistiller
from mdistiller.cli.main import run
from mdistiller.cli.train import TrainCommand
from mdistiller.errors import ConfigError, UnknownNameError
from mdistiller.methods import Card, FeatureMethod, MethodConfig, Needs, register_method
from mdistiller.methods.features import FeatureConfig
from mdistiller.methods.registry import _METHODS
from mdistiller.models import ModelConfig
from mdistiller.runs.checkpoint import save_student
from mdistiller.tasks.detection import models
from mdistiller.tasks.detection.config import DetectionDataConfig
from mdistiller.tasks.detection.deployment import DetectorDeployment
from mdistiller.tasks.detection.distiller import DetectionDistiller
from mdistiller.tasks.detection.layouts import load_detection
from mdistiller.tasks.detection.weights import build_for_data, select_classes

EXAMPLE = Path(__file__).parents[3] / "examples" / "my_detector.py"


@pytest.fixture(autouse=True, scope="module")
def _registered():
    with plugged_in(EXAMPLE):
        yield


def train(*words):
    return run(["train", *map(str, words)])


def own(seed=0, width=8):
    torch.manual_seed(seed)
    return models.create_detector("my_detector", 4, width=width)


def test_names_and_options():
    assert "my_detector" in models.list_detectors()
    with pytest.raises(ConfigError, match=r"'my_detector': .*its options: width"):
        models.create_detector("my_detector", 4, depth=3)
    with pytest.raises(UnknownNameError, match="nearest: my_detector") as caught:
        models.create_detector("my_detektor", 4)
    assert "--plugin FILE, with @mdistiller.register_detector" in caught.value.for_command()
    with pytest.raises(ConfigError, match="no built-in name"):
        mdistiller.register_detector("fcos_resnet18")(lambda num_classes: None)
    with pytest.raises(ConfigError, match="is taken by"):
        mdistiller.register_detector("my_detector")(lambda num_classes: None)


@pytest.mark.parametrize("method", ["fitnet", "fgfi", "reviewkd", "bckd"])
def test_it_learns_from_its_like(method):
    distiller = DetectionDistiller(own(), own(1, 16), method).train()
    out = distiller(*batch())
    assert {"classes", "boxes", method} <= out.losses.keys()
    assert out.losses[method] > 0
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in distiller.parameters())


def test_the_boxes_of_bckd_are_those_of_its_predictions():
    """Equal detectors have no distance, others do."""
    student = own()
    losses = DetectionDistiller(student, own(), "bckd").train()(*batch()).losses
    assert losses["bckd"] == losses["bckd_boxes"] == 0
    losses = DetectionDistiller(student, own(1), "bckd").train()(*batch()).losses
    assert losses["bckd_boxes"] > 0


@pytest.mark.parametrize("new", [True, False], ids=["student", "teacher"])
def test_a_file_of_the_same_classes_in_another_order(tmp_path, new):
    """Which of its outputs belong to a class is unknown, so they cannot be put into the data's order."""
    write_set(tmp_path, 2)
    write_set(tmp_path, 2, "instances_val.json", seed=1)
    data = load_detection(DetectionDataConfig(root=tmp_path))
    file, model = tmp_path / "own.safetensors", own()
    config = ModelConfig(name="my_detector", options={"width": 8}, checkpoint=file)
    about = {"model": "my_detector", "options": {"width": 8}}
    save_student(file, model, about | {"classes": ["red", "green", "blue"]})
    built = build_for_data(config, data, new=new).state_dict()
    assert all(torch.equal(value, built[key]) for key, value in model.state_dict().items())
    save_student(file, model, about | {"classes": ["green", "red", "blue"]})
    said = r"own\.safetensors has the classes green, red, blue\. Which outputs of MyDetector"
    with pytest.raises(ConfigError, match=said):
        build_for_data(config, data, new=new)
    with pytest.raises(ConfigError, match="so none can move"):
        select_classes(model, 4, [0, 2, 1, 3])


def test_it_teaches_and_learns_from_torchvisions():
    with pytest.warns(
        UserWarning, match=r"fine with 0 \(stride 8\), coarse with 1 \(stride 16\); not compared"
    ):
        distiller = DetectionDistiller(own(), two_stage(seed=1), "fitnet").train()
    assert distiller(*batch()).losses["fitnet"] > 0
    with pytest.warns(UserWarning, match=r"0 with fine \(stride 8\), 1 with coarse"):
        distiller = DetectionDistiller(two_stage(), own(), "reviewkd").train()
    assert distiller(*batch()).losses["reviewkd"] > 0
    with pytest.raises(ConfigError, match="only one of the detectors has proposals; methods that compare"):
        DetectionDistiller(own(), two_stage(seed=1), "dkd")


def test_a_run_on_the_command_line(tmp_path, monkeypatch, capsys):
    write_set(tmp_path, 4)
    write_set(tmp_path, 2, "instances_val.json", seed=1)
    flags = ("--data.root", tmp_path, "--data.workers", 0, "--device", "cpu", "--batch-size", 2)
    flags += (
        "--plugin",
        EXAMPLE,
        "--augment.short-sides",
        64,
        "--augment.long-side",
        96,
        "--max-steps",
        2,
        "--eval-every",
        100,
    )
    teacher = tmp_path / "teacher"
    narrow = ("--student.options", "width", 8)
    assert train("small.teacher.my_detector", *flags, *narrow, "--out", teacher) == 0
    assert {"boxes", "labels", "scores"} == mdistiller.load_student(teacher)([torch.rand(3, 64, 80)])[
        0
    ].keys()
    out = tmp_path / "student"
    assert train("small.bckd.my_detector", *flags, "--teacher", teacher, "--out", out) == 0
    assert json.loads((out / "config.json").read_text())["teacher"]["options"] == {"width": 8}
    pytest.importorskip("onnxruntime")
    exported = tmp_path / "exported"
    words = ("export", out, "--format", "onnx", "--plugin", EXAMPLE, "--no-eval", "--out")
    assert run([*map(str, words), str(exported)]) == 0
    assert mdistiller.load_export(exported).card.check.largest_difference < 1e-4

    def frozen(self, images):
        height, width = (int((max(i.shape[d] for i in images) + 15) // 16 * 16) for d in (1, 2))
        padded = [F.pad(i, (0, width - i.shape[2], 0, height - i.shape[1])) for i in images]
        return ImageList(torch.stack(padded) - 0.5, [tuple(i.shape[1:]) for i in images])

    monkeypatch.setattr(own().detector_adapter, "prepare", frozen)
    capsys.readouterr()
    assert run([*map(str, words), str(tmp_path / "frozen")]) == 1
    said = capsys.readouterr().err
    assert "Likely cause: a number that Python computes from an input's shape" in said
    assert "made from shape [3, 120, 90]" in said
    parsed = TrainCommand.parse(["small.fitnet.fcos_resnet18", "--teacher", str(teacher)])
    assert parsed.config.teacher.name == "my_detector"
    assert parsed.config.recipe == "small.fitnet.my_detector_fcos_resnet18"


class MeanConfig(FeatureConfig):
    """Settings."""


class Means(FeatureMethod):
    """Compares the means of the levels."""

    Config = MeanConfig
    card = Card("None, 2026")

    def forward(self, student, teacher, batch, progress):
        pairs = zip(*self.read(student, teacher), strict=True)
        return {"means": sum((s.mean() - t.mean()).square() for s, t in pairs)}


class Plain(mdistiller.Method):
    """Compares nothing."""

    class Config(MethodConfig):
        """Settings."""


class ByIndex(Means):
    """Has a memory of all images."""

    needs = Needs(index=True)

    class Config(FeatureConfig):
        """Settings."""


@pytest.fixture
def _own_methods():
    before = dict(_METHODS)
    for name, method in (("means", Means), ("plain", Plain), ("by_index", ByIndex)):
        register_method(name)(method)
    yield
    _METHODS.clear()
    _METHODS.update(before)


@pytest.mark.usefixtures("_own_methods")
def test_a_feature_method_of_ones_own_reads_the_levels():
    distiller = DetectionDistiller(two_stage(), two_stage(seed=1), "means+kd").train()
    assert {"means", "kd"} <= distiller(*batch()).losses.keys()
    assert distiller.method.parts["means"].student_taps == ("0", "1", "pool")
    for name in ("plain", "by_index"):
        reason = {"plain": "neither a LogitMethod nor", "by_index": "it needs index"}[name]
        with pytest.raises(UnknownNameError, match=f"method for detectors '{name}'.*{reason}"):
            DetectionDistiller(two_stage(), two_stage(seed=1), name)


def test_the_lists_of_the_command(capsys):
    assert run(["list", "models", "my_", "--task", "detection"]) == 0
    assert capsys.readouterr().out.split()[2] == "my_detector"
    assert run(["list", "models", "--task", "detection", "--json"]) == 0
    names = {row["name"] for row in json.loads(capsys.readouterr().out)}
    assert {"fcos_resnet18", "torchvision/ssd300_vgg16", "my_detector"} <= names
    assert run(["list", "methods", "--task", "detection", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    kinds = {name: rows[name]["detectors"] for name in ("bckd", "dkd", "fgfi")}
    assert kinds == {"bckd": "sigmoid", "dkd": "softmax", "fgfi": "all"}
    assert rows["fgfi"]["compares"] == ["levels"]
    assert run(["list", "methods", "--task", "detektion"]) == 2
    assert "nearest: detection" in capsys.readouterr().err


def test_the_graph_has_the_boxes_of_the_detector_at_every_size(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    model = own(3).eval()
    torch.nn.init.normal_(model.classes.weight)
    path = tmp_path / "model.onnx"
    DetectorDeployment().write_graph(path, "onnx", model, {})
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for size in ((64, 80), (97, 70), (150, 100), (120, 90)):
        image = torch.rand(3, *size, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            (expected,) = model([image])
        boxes, labels, scores = map(torch.from_numpy, session.run(None, {"image": image.numpy()}))
        assert len(scores) > 5
        torch.testing.assert_close(scores, expected["scores"], rtol=0, atol=1e-5)
        assert torch.equal(labels, expected["labels"])
        torch.testing.assert_close(boxes, expected["boxes"], rtol=0, atol=1e-2)
