"""Exports measured on the test set, and ONNX graphs of eight bits."""

import json
import shutil
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from PIL import Image
from torch import nn

from mdistiller.data import Augment, AugmentConfig, DataConfig, load_data
from mdistiller.deploy.export import export_student
from mdistiller.deploy.int8 import quantize
from mdistiller.deploy.predict import load_export
from mdistiller.deploy.student import load_student
from mdistiller.errors import ConfigError
from mdistiller.models import ModelConfig
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.training.deployment import ModelInput
from mdistiller.training.launch import train
from mdistiller.training.task import get_task

DIGITS = DataConfig(kind="digits", train_limit=300, test_limit=60)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = ClassificationConfig(
        data=DIGITS,
        augment=AugmentConfig(flip=False),
        student=ModelConfig(name="resnet8"),
        epochs=6,
        batch_size=16,
        device="cpu",
        out=tmp_path_factory.mktemp("runs") / "run",
    )
    return train(config).path


@pytest.fixture(scope="module")
def int8(run):
    return export_student(run, "onnx", int8=True)


def prepared_test_images():
    splits = load_data(DIGITS)
    prepare = Augment(AugmentConfig(), splits.mean, splits.std, splits.num_classes).normalize
    return prepare(splits.test.images), splits.test.labels


@pytest.mark.parametrize("format", ["safetensors", "torch-export", "onnx"])
def test_every_format_is_measured(run, tmp_path, format):
    out, card = export_student(run, format, out=tmp_path / "out")
    images, labels = prepared_test_images()
    exported, student = load_export(out, "cpu"), load_student(run)
    with torch.no_grad():
        own = student(images).argmax(1)
    predicted = exported(images).argmax(1)
    found = card.measured
    assert (found.metric, found.images) == ("top1", 60)
    assert found.value == pytest.approx(100 * (predicted == labels).double().mean().item())
    assert found.student == pytest.approx(100 * (own == labels).double().mean().item())
    assert found.agreement == pytest.approx(100 * (predicted == own).double().mean().item())
    assert card.bytes == (out / card.file).stat().st_size
    assert not card.int8
    assert set(card.speed.ms) == {1, 32}
    assert card.speed.float_ms is None
    assert card.speed.machine.threads == torch.get_num_threads()
    text = (out / "README.md").read_text()
    assert f"top1 of this file | {found.value:.2f} % on 60 test images" in text
    assert f"{card.macs / 1e6:,.1f} million for one image" in text


def test_a_wrong_file_would_show(run):
    """The metric is the file's, not the student's: other models give another one."""
    deployment, config = (
        get_task("classification").deployment(),
        ClassificationConfig.model_validate(json.loads((run / "config.json").read_text())),
    )
    data, student = deployment.load_test_set(config), deployment.as_model(load_student(run))
    models = [student, lambda image: (-student(image)[0],)]
    good, bad = deployment.evaluate(models, config, data, torch.device("cpu"))
    assert good["agreement"] == 100
    assert bad["agreement"] == 0
    assert bad["top1"] < 5 < good["top1"]


def test_int8(run, int8):
    out, card = int8
    assert out == run / "export" / "student-onnx-int8"
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "card.json", "model.onnx"]
    assert (card.format, card.int8, card.check.tolerance) == ("onnx", True, None)
    assert card.check.largest_difference > 0
    graph = onnx.load(out / "model.onnx")
    weights = {i.name: onnx.numpy_helper.to_array(i) for i in graph.graph.initializer}
    kernels = [w for w in weights.values() if w.ndim == 4]
    assert len(kernels) == 9  # all of resnet8's
    assert {w.dtype for w in kernels} == {np.dtype(np.int8)}
    # Kernels without VNNI add two products of a uint8 and a weight in 16 bits.
    rounded = [np.abs(w.astype(int)).max() for w in weights.values() if w.dtype == np.int8]
    assert 2 * 255 * max(rounded) < 2**15
    assert {len(v) for k, v in weights.items() if k.endswith("_scale") and v.ndim} == {10, 16, 32, 64}
    assert [i.name for i in [*graph.graph.input, *graph.graph.output]] == ["image", "logits"]
    float_out = export_student(run, "onnx", out=run.parent / "float", evaluate=False)[0]
    assert card.bytes < 0.5 * (float_out / "model.onnx").stat().st_size
    # On real images it agrees with the student. On noise, outputs need not.
    images, labels = prepared_test_images()
    logits = load_export(out)(images)
    with torch.no_grad():
        expected = load_student(run)(images)
    agreement = 100 * (logits.argmax(1) == expected.argmax(1)).double().mean().item()
    assert card.measured.agreement == pytest.approx(agreement)
    assert agreement > 90
    # Rounded logits may tie.
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf)
    wins, ties = (
        100 * x.double().mean().item() for x in (own > others.amax(1, True), own >= others.amax(1, True))
    )
    assert wins - 1e-9 <= card.measured.value <= ties + 1e-9
    assert (logits - expected).abs().mean() < 0.1 * expected.abs().mean()
    text = (out / "README.md").read_text()
    assert "onnx, int8" in text
    assert set(card.speed.float_ms) == {1, 32}
    assert f"(float32 {card.speed.float_ms[1]:.3g}) at batch 1, " in text
    assert str(run) not in str(graph) + (out / "card.json").read_text()


def test_int8_computes_what_onnx_defines(int8):
    """Every tensor of ONNX Runtime's, against a numpy evaluation of the graph in the file."""
    graph = onnx.load(int8[0] / "model.onnx")
    for node in graph.graph.node:
        if node.op_type == "QuantizeLinear":
            graph.graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], 2, None))
    image = {"image": prepared_test_images()[0][:8].numpy()}
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    names = [output.name for output in graph.graph.output]
    found, expected = session.run(names, image), ReferenceEvaluator(graph).run(names, image)
    for name, ours, theirs in zip(names, found, expected, strict=True):
        if ours.dtype == np.uint8:
            levels = np.abs(ours.astype(int) - theirs)
            assert levels.max() <= 4, name  # a rounding passed on
            assert levels.mean() < 0.1, name
    assert len(names) > 10


def test_calibration_reads_the_runs_own_training_images(run):
    config = ClassificationConfig.model_validate(json.loads((run / "config.json").read_text()))
    deployment = get_task("classification").deployment()
    splits = load_data(config.data)
    prepare = Augment(AugmentConfig(), splits.mean, splits.std, 10).normalize
    own = {image.numpy().tobytes() for image in prepare(splits.train.images)}
    images = deployment.calibration_images(config, 50)
    assert images.shape == (50, 3, 16, 16)
    assert all(image.numpy().tobytes() in own for image in images)
    assert len(deployment.calibration_images(config, 1000)) == 300  # all that the run had
    streamed = config.replace(data={"memory": "stream", "workers": 0})
    assert torch.equal(deployment.calibration_images(streamed, 50), images)


@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_calibration_prepares_photographs_as_prediction_does(tmp_path, memory):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                pixels = rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    given = {"kind": "folder", "root": tmp_path, "image_size": 16, "resize": 20, "workers": 0}
    config = ClassificationConfig(data=given | {"memory": memory}, student="resnet8")
    deployment, splits = get_task("classification").deployment(), load_data(config.data)
    facts = {"classes": splits.classes, "image_size": 16, "mean": splits.mean, "std": splits.std}
    fields = ModelInput(**deployment.card_fields(facts, config))
    expected = [
        deployment.prepare(fields, Image.open(tmp_path / "train" / name / f"{i}.png"))
        for name in splits.classes
        for i in range(3)
    ]
    torch.testing.assert_close(deployment.calibration_images(config, 50), torch.stack(expected))


def test_ranges_come_from_the_images(run, tmp_path):
    float_file = export_student(run, "onnx", out=tmp_path / "float", evaluate=False)[0] / "model.onnx"
    images = prepared_test_images()[0]
    for factor in (1, 3):
        quantize(float_file, tmp_path / f"{factor}.onnx", factor * images)

    def input_scale(file):
        found = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(file).graph.initializer}
        return found["image_scale"].item()

    expected = (images.max() - images.min()).item() / 255
    assert input_scale(tmp_path / "1.onnx") == pytest.approx(expected, rel=1e-3)
    assert input_scale(tmp_path / "3.onnx") == pytest.approx(3 * expected, rel=1e-3)


def test_a_loss_is_said(run, tmp_path, monkeypatch):
    """A file that is clearly worse than its student gives a warning."""
    from mdistiller.deploy import export

    noise = torch.randn(25, 3, 16, 16) * 1e4  # ranges in which every digit rounds to a few values
    deployment = type(get_task("classification").deployment())
    monkeypatch.setattr(deployment, "calibration_images", lambda self, config, count: noise)
    with pytest.warns(UserWarning, match=r"model\.onnx loses \d+\.\d+ points of top1"):
        _, card = export.export_student(run, "onnx", int8=True, out=tmp_path / "out")
    assert card.measured.value < card.measured.student - 1


def test_low_agreement_is_said(run, tmp_path, monkeypatch):
    """Even where the metric stays the same."""
    student, file = {"top1": 60.0}, {"top1": 60.0, "agreement": 76.8, "images": 60}
    deployment = type(get_task("classification").deployment())
    monkeypatch.setattr(deployment, "evaluate", lambda *args: [student, file])
    with pytest.warns(UserWarning, match=r"^model\.onnx predicts the student's class for only 76\.80 %"):
        export_student(run, "onnx", int8=True, out=tmp_path / "out")
    file["agreement"] = 90.0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        export_student(run, "safetensors", out=tmp_path / "quiet")


def test_what_int8_needs(run, tmp_path):
    for format in ("safetensors", "torch-export"):
        with pytest.raises(ConfigError, match=f"int8: got format '{format}'; allowed: onnx"):
            export_student(run, format, int8=True, out=tmp_path / "out")
    alone = shutil.copy(run / "student.safetensors", tmp_path)
    with pytest.raises(ConfigError, match=r"int8: .* has no config\.json, which names the images"):
        export_student(tmp_path / "student.safetensors", "onnx", int8=True)
    assert alone
    assert not (tmp_path / "export").exists()


def test_a_test_set_that_is_not_there(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("export"))
    values = json.loads((copy / "config.json").read_text())
    values["data"] |= {"kind": "folder", "root": str(tmp_path / "gone")}
    (copy / "config.json").write_text(json.dumps(values))
    with pytest.warns(UserWarning, match=r"accuracy of model\.safetensors: not measured: .*gone"):
        out, card = export_student(copy)
    assert card.measured is None
    assert load_export(out).card == card
    # Nothing is read, and nothing said, where no evaluation was asked for.
    assert export_student(copy, out=tmp_path / "other", evaluate=False)[1].measured is None


def test_rounding_must_be_finite(run, tmp_path, monkeypatch):
    from mdistiller.deploy import export
    from mdistiller.errors import MDistillerError

    class Broken(nn.Module):
        def forward(self, image):
            return torch.full((len(image), 10), torch.nan)

    monkeypatch.setattr(export, "open_model", lambda *args: lambda image: (Broken()(image),))
    with pytest.raises(MDistillerError, match="allowed: finite outputs"):
        export_student(run, "onnx", int8=True, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
