"""A student in each format: the same logits, a card that tells the truth, and evaluation's predictions."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_runs import photo, run_card
from torch import nn

import mdistiller
from mdistiller.data import Augment, AugmentConfig, DataConfig, load_data
from mdistiller.data.decoder import read_image
from mdistiller.data.loader import PlainBatches
from mdistiller.deploy.export import export_student
from mdistiller.deploy.predict import FILES, load_export
from mdistiller.errors import CheckpointError, ConfigError, DataError, MDistillerError
from mdistiller.methods import DKDConfig, NoneConfig, method_config
from mdistiller.models import ModelConfig, create_model, register_model
from mdistiller.models.registry import _MODELS
from mdistiller.runs.checkpoint import save_student
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.classification.deployment import ClassifierDeployment
from mdistiller.tasks.classification.evaluate import evaluate
from mdistiller.tasks.classification.models import build_model
from mdistiller.training.deployment import ModelInput
from mdistiller.training.distributed import World
from mdistiller.training.launch import train

FORMATS = list(FILES)
SYNTHETIC = DataConfig(kind="synthetic", synthetic_samples=32, synthetic_classes=4, image_size=16)
DIGITS = DataConfig(kind="digits", train_limit=128, test_limit=48)


def config(**fields):
    base = {
        "data": SYNTHETIC,
        "student": ModelConfig(name="resnet8"),
        "method": NoneConfig(),
        "epochs": 2,
        "batch_size": 16,
        "device": "cpu",
    }
    return ClassificationConfig(**base | fields)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Three epochs of DKD on digits, with a moving average and kept epochs, of which one was evaluated."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(1)
    torch.save({"model": create_model("resnet14", 10).state_dict()}, folder / "teacher.pth")
    given = {
        "recipe": "digits.dkd.resnet14_resnet8",
        "data": DIGITS,
        "augment": AugmentConfig(flip=False),
        "teacher": ModelConfig(name="resnet14", checkpoint=folder / "teacher.pth"),
        "method": DKDConfig(beta=2.0),
        "epochs": 5,
        "eval_every": 2,
        "save_epochs": (1, 2),
        "ema": 0.9,
    }
    return train(config(**given, out=folder / "run")).path


@pytest.fixture(scope="session")
def exports(run, tmp_path_factory):
    """That run's student in each format: folder and card."""
    folder = tmp_path_factory.mktemp("exports")
    return {format: export_student(run, format, out=folder / format / "deep") for format in FORMATS}


def evals(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["epoch"]: line for line in lines if line["kind"] == "eval"}


def images(count, size=16):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(100 + count))


def logits(name, file, classes, x):
    with torch.no_grad():
        return build_model(ModelConfig(name=name, checkpoint=file), classes).eval()(x)


def assert_close(found, expected):
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_the_students_logits(run, exports, format):
    out, card = exports[format]
    assert (out.parent.name, out.name) == (format, "deep")
    assert sorted(p.name for p in out.iterdir()) == sorted(["README.md", "card.json", FILES[format]])
    assert [p.name for p in out.parent.iterdir()] == ["deep"]  # nothing temporary is left
    exported = load_export(out, "cpu")
    assert exported.card == card
    for count in (1, 2, 5):
        x = images(count)
        expected = logits("resnet8", run / "student.safetensors", 10, x)
        assert_close(exported(x), expected)
        assert_close(exported(x.to(memory_format=torch.channels_last)), expected)
    assert card.check.input_shapes == ((2, 3, 16, 16), (1, 3, 16, 16), (3, 3, 16, 16))
    assert 0 <= card.check.largest_difference <= 1e-4 * card.check.largest_output


def test_graphs_name_their_ends_and_no_place_on_this_machine(exports):
    graph = onnx.load(exports["onnx"][0] / "model.onnx")
    assert [
        [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in graph.graph.input
    ] == [["batch", 3, 16, 16]]
    assert [i.name for i in [*graph.graph.input, *graph.graph.output]] == ["image", "logits"]
    contents = [str(graph).encode()]
    with zipfile.ZipFile(exports["torch-export"][0] / "model.pt2") as archive:
        contents += [archive.read(name) for name in archive.namelist()]
    for place in (Path(torch.__file__).parent, Path(mdistiller.__file__).parent):
        assert not [c for c in contents if str(place).encode() in c]


def test_the_card_tells_of_the_run(run, exports):
    out, _ = exports["onnx"]
    card, lines = json.loads((out / "card.json").read_text()), evals(run)
    last = lines[5]["top1"]
    assert card["accuracy"] == {"metric": "top1", "value": last, "epoch": 5}
    expected = {
        "task": "classification",
        "format": "onnx",
        "file": "model.onnx",
        "model": "resnet8",
        "options": {},
        "parameters": sum(p.numel() for p in create_model("resnet8", 10).parameters()),
        "classes": [str(i) for i in range(10)],
        "image_size": 16,
        "resize": None,
        "mean": [0.3053] * 3,
        "std": [0.3187] * 3,
        "student": "student.safetensors",
        "teacher": "resnet14",
        "recipe": "digits.dkd.resnet14_resnet8",
    }
    assert {key: card[key] for key in expected} == expected
    assert (card["method"]["name"], card["method"]["beta"]) == ("dkd", 2.0)
    assert card["data"] == {
        "kind": "digits",
        "name": "digits",
        "train_limit": 128,
        "test_limit": 48,
        "label_noise": 0.0,
        "seed": 0,
    }
    assert card["versions"]["torch"] == torch.__version__
    assert {"python", "mdistiller", "torchvision", "onnx", "onnxruntime", "onnxscript"} <= set(
        card["versions"]
    )
    text = (out / "README.md").read_text()
    for said in (
        "resnet14",
        "dkd (",
        "beta 2.0",
        "train_limit 128",
        f"{last:.2f} % (epoch 5)",
        "0.3053",
        "central square scaled to 16 (bilinear, antialiased)",
        "0, 1, 2, 3, 4, 5, 6, 7, 8, 9",
    ):
        assert said in text, said
    assert "None" not in text
    assert str(run) not in text + json.dumps(card)  # no path of this machine


@pytest.mark.parametrize("format", FORMATS)
def test_the_code_in_the_card_predicts_a_photo(exports, tmp_path, format):
    out, _ = exports[format]
    names, printed, path = run_card(out, tmp_path, (32, 32))
    exported = load_export(out, "cpu")
    ((best,),) = exported.predict([path], top=1)
    if format == "safetensors":
        assert printed == f"{exported.predict([path])}\n"
        return
    assert printed == f"{best.name}\n"
    image = exported.prepare(read_image(path))
    assert np.abs(names["image"][0] - image.numpy()).max() < 1.01 / 255 / 0.3187  # one step of 8 bits
    assert_close(torch.as_tensor(names["logits"]), exported(torch.from_numpy(names["image"])))


@pytest.mark.parametrize(
    ("resize", "size"), [(16, (37, 53)), (20, (64, 16)), (21, (16, 17)), (None, (40, 40))]
)
def test_the_cards_code_prepares_as_evaluation_does(tmp_path, resize, size):
    fields = ModelInput(classes=(), image_size=16, resize=resize, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    deployment = ClassifierDeployment()
    image = read_image(photo(tmp_path / "image.png", size))
    code, _ = deployment.graph_code(fields)
    names = {"np": np, "Image": Image, "image": image}
    exec(code, names)
    expected = deployment.prepare(fields, image)
    assert (names["image"].dtype, names["image"].shape) == (np.float32, (1, 3, 16, 16))
    assert np.abs(names["image"][0] - expected.numpy()).max() < 1.01 / 255 / 0.4


def test_the_moving_average(run, tmp_path):
    out, card = export_student(run, ema=True, out=tmp_path / "out")
    found, average = load_file(out / "model.safetensors"), load_file(run / "ema_student.safetensors")
    assert all(torch.equal(found[key], value) for key, value in average.items())
    assert not torch.equal(found["fc.weight"], load_file(run / "student.safetensors")["fc.weight"])
    assert card.student == "ema_student.safetensors"
    top1 = [line["ema"]["top1"] for line in evals(run).values()]
    assert top1 != [line["top1"] for line in evals(run).values()]
    assert card.accuracy.value == top1[-1]


def test_a_kept_epoch(run, tmp_path):
    lines = evals(run)
    out, card = export_student(run / "student-e2.safetensors", out=tmp_path / "two")
    kept = load_file(run / "student-e2.safetensors")
    assert all(torch.equal(v, kept[key]) for key, v in load_file(out / "model.safetensors").items())
    assert (card.accuracy.epoch, card.accuracy.value) == (2, lines[2]["top1"])
    # Before the first evaluation.
    assert export_student(run / "student-e1.safetensors", out=tmp_path / "one")[1].accuracy is None


def test_a_kept_epoch_that_was_not_evaluated(run, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    (folder / "student-e3.safetensors").write_bytes((run / "student-e2.safetensors").read_bytes())
    out, card = export_student(folder / "student-e3.safetensors")
    assert card.accuracy is None
    assert "result on its test set | not known" in (out / "README.md").read_text()


def test_a_students_file_alone(run, tmp_path):
    (tmp_path / "mine.safetensors").write_bytes((run / "student.safetensors").read_bytes())
    out, card = export_student(tmp_path / "mine.safetensors")
    assert out == tmp_path / "export" / "mine-safetensors"
    assert (card.accuracy, card.teacher, card.method, card.recipe, card.data) == (None,) * 5
    assert (card.resize, card.image_size, len(card.classes)) == (16, 16, 10)
    assert "not known" in (out / "README.md").read_text()


@pytest.mark.parametrize("format", FORMATS)
def test_a_student_that_its_method_extended(tmp_path, format):
    """SimKD predicts through a projector and the teacher's classifier."""
    torch.manual_seed(0)
    torch.save({"model": create_model("wrn_16_2", 4).state_dict()}, tmp_path / "teacher.pth")
    given = ModelConfig(name="wrn_16_2", checkpoint=tmp_path / "teacher.pth")
    c = config(teacher=given, method=method_config("simkd"), epochs=1, out=tmp_path / "run")
    path = train(c).path
    (tmp_path / "teacher.pth").unlink()
    out, card = export_student(path, format)
    assert out == path / "export" / f"student-{format}"
    assert card.parameters > sum(p.numel() for p in create_model("resnet8", 4).parameters())
    assert_close(load_export(out, "cpu")(images(2)), logits("resnet8", path, 4, images(2)))


EXTERNAL = [
    ("timm/test_vit", {"img_size": 32, "drop_rate": 0.1}, "torch-export"),
    ("timm/test_vit", {"img_size": 32, "drop_rate": 0.1}, "onnx"),
    ("timm/test_convnext", {}, "onnx"),
    ("torchvision/squeezenet1_1", {}, "onnx"),
    ("torchvision/squeezenet1_1", {}, "torch-export"),
    ("vgg8", {}, "onnx"),
]


def save(path, name, options=(), classes=5, size=32):
    """A student's file as a run writes it."""
    model = create_model(name, classes, **dict(options))
    about = {"task": "classification", "model": name, "options": dict(options), "image_size": size}
    about |= {"classes": [f"c{i}" for i in range(classes)], "mean": [0.5] * 3, "std": [0.25] * 3}
    save_student(path, model, about)
    return path


@pytest.mark.parametrize(("name", "options", "format"), EXTERNAL)
def test_models_of_all_kinds(tmp_path, name, options, format):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    file = save(tmp_path / "student.safetensors", name, options)
    out, card = export_student(file, format)
    assert (card.model, card.options) == (name, options)
    x = images(4, 32)
    with torch.no_grad():
        model = build_model(ModelConfig(name=name, checkpoint=file, options=options), 5).eval()
        assert_close(load_export(out, "cpu")(x), model(x))


# What evaluation gives


def means(exported, paths, labels):
    """Top-1 in percent and mean cross-entropy, from predictions alone."""
    names, hits, loss = exported.card.classes, 0, 0.0
    for found, label in zip(exported.predict(paths, top=len(names), batch_size=7), labels, strict=True):
        assert sum(p for _, p in found) == pytest.approx(1, abs=1e-5)
        assert [p for _, p in found] == sorted((p for _, p in found), reverse=True)
        hits += found[0].name == names[label]
        loss -= float(np.log(dict(found)[names[label]]))
    return 100 * hits / len(paths), loss / len(paths)


def evaluated(run, data, classes):
    splits = load_data(data)
    model = build_model(ModelConfig(name="resnet8", checkpoint=run), classes)
    batches = PlainBatches(splits.test, splits, 16, device="cpu", workers=0)
    figures = evaluate(model, batches, World(torch.device("cpu")))
    return figures["top1"], figures["loss"], splits


@pytest.mark.parametrize("format", FORMATS)
def test_digits_as_files_get_evaluations_predictions(run, exports, tmp_path, format):
    """Files of 8x8 pixels are scaled as the data set was."""
    top1, loss, splits = evaluated(run, DIGITS, 10)
    exported = load_export(exports[format][0], "cpu")
    paths = []
    for i, image in enumerate(load_data(DIGITS.model_copy(update={"image_size": 8})).test.images):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(image.numpy()).save(paths[-1])
    prepared = torch.stack([exported.prepare(Image.open(path)) for path in paths])
    normalize = Augment(AugmentConfig(), splits.mean, splits.std, 10).normalize
    assert torch.equal(prepared, normalize(splits.test.images))
    found = means(exported, paths, splits.test.labels.tolist())
    assert found == (pytest.approx(top1), pytest.approx(loss, rel=1e-4))


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Class folders of images of many shapes, and a run on them: short side to 20 pixels, cut to 16."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 6)):
        for c, name in enumerate(("ant", "bee", "cat")):
            for i in range(count):
                path = folder / split / name / f"{i}.{'png' if i % 2 else 'jpg'}"
                path.parent.mkdir(parents=True, exist_ok=True)
                shape = tuple(rng.integers(14, 60, 2))
                pixels = rng.integers(0, 120, (*shape, 3), dtype=np.uint8)
                pixels[..., c] += 100
                Image.fromarray(pixels).convert("L" if i == 3 else "RGB").save(path)
    data = DataConfig(kind="folder", root=folder, image_size=16, resize=20, workers=0)
    return data, train(config(data=data, epochs=3, out=folder / "run")).path


@pytest.mark.parametrize("format", FORMATS)
def test_photos_get_evaluations_predictions(photos, tmp_path, format):
    data, path = photos
    top1, loss, splits = evaluated(path, data, 3)
    exported = load_export(export_student(path, format, out=tmp_path / "out")[0], "cpu")
    assert (exported.card.resize, exported.card.image_size) == (20, 16)
    assert exported.card.data["name"] == data.root.name
    paths = [file for name in splits.classes for file in sorted((data.root / "val" / name).iterdir())]
    found = means(exported, paths, splits.test.labels.tolist())
    assert found == (pytest.approx(top1), pytest.approx(loss, rel=1e-4))
    # Read in parts or at once, it is the same.
    whole = exported.predict(paths, top=2, batch_size=100)
    assert [[p.name for p in row] for row in whole] == [
        [p.name for p in row[:2]] for row in exported.predict(paths, top=3, batch_size=1)
    ]


def test_images_that_cannot_be_read(photos, tmp_path):
    data, path = photos
    exported = load_export(export_student(path, out=tmp_path / "out")[0])
    good = data.root / "val" / "ant" / "0.jpg"
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.jpg").write_bytes(good.read_bytes()[:200])
    for bad in ("text.png", "cut.jpg", "missing.png", "out"):
        with pytest.raises(DataError, match=re.escape(str(tmp_path / bad))):
            exported.predict([good, tmp_path / bad])
    with pytest.raises(ConfigError, match="top: got 0"):
        exported.predict([good], top=0)
    assert len(exported.predict([good], top=50)[0]) == 3


# What goes wrong


@pytest.fixture
def models():
    """Registers model functions for one test."""
    before = dict(_MODELS)
    yield register_model
    _MODELS.clear()
    _MODELS.update(before)


class Tiny(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.fc = nn.Linear(3, num_classes)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("format", FORMATS)
def test_other_logits_fail(tmp_path, models, format):
    """A model whose output depends on how often it ran is not what any file of it holds."""

    class Drifting(Tiny):
        calls = 0

        def forward(self, x):
            Drifting.calls += 1
            return super().forward(x) * Drifting.calls

    def drifting(num_classes):
        return Drifting(num_classes)

    models(drifting)
    file = save(tmp_path / "student.safetensors", "drifting")
    with pytest.raises(
        MDistillerError,
        match=r"other logits than the student: largest difference .* allowed.*cause: .* two calls differ",
    ):
        export_student(file, format)
    assert list((tmp_path / "export").iterdir()) == []


def test_values_beside_the_weights_fail(tmp_path, models):
    class Unsaved(Tiny):
        def __init__(self, num_classes):
            super().__init__(num_classes)
            self.register_buffer("factor", torch.rand(()), persistent=False)

        def forward(self, x):
            return super().forward(x) * self.factor

    def unsaved(num_classes):
        return Unsaved(num_classes)

    models(unsaved)
    file = save(tmp_path / "student.safetensors", "unsaved")
    torch.manual_seed(0)
    with pytest.raises(MDistillerError, match=r"Likely cause: .* neither weights nor options"):
        export_student(file)


@pytest.mark.parametrize("format", ["torch-export", "onnx"])
def test_a_model_of_one_batch_size_fails(tmp_path, models, format):
    class Fixed(Tiny):
        def forward(self, x):
            return super().forward(x.reshape(int(x.shape[0]), 3, 32, 32))

    def fixed(num_classes):
        return Fixed(num_classes)

    models(fixed)
    file = save(tmp_path / "student.safetensors", "fixed")
    with pytest.raises(MDistillerError, match=f"fixed cannot be exported as {format}.*safetensors"):
        export_student(file, format)
    assert list((tmp_path / "export").iterdir()) == []
    export_student(file)  # the weights alone can


@pytest.mark.parametrize("format", FORMATS)
def test_a_damaged_export_is_refused(exports, tmp_path, format):
    whole, card = exports[format]
    out = shutil.copytree(whole, tmp_path / "out")
    file = out / card.file
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged, or replaced"):
        load_export(out)
    # A card that fits a file which is none.
    file.write_bytes(b"nothing")
    text = (out / "card.json").read_text().replace(card.sha256, hashlib.sha256(b"nothing").hexdigest())
    (out / "card.json").write_text(text)
    with pytest.raises(CheckpointError, match=re.escape(str(file))):
        load_export(out)
    file.unlink()
    with pytest.raises(CheckpointError, match=f"no {file.name}"):
        load_export(out)
    (out / "card.json").write_text(text.replace('"image_size": 16', '"image_size": "large"'))
    with pytest.raises(CheckpointError, match=r"card\.json: image_size: .*got 'large'"):
        load_export(out)
    (out / "card.json").write_text(text[:100])
    with pytest.raises(CheckpointError, match=r"card\.json cannot be read"):
        load_export(out)
    (out / "card.json").unlink()
    with pytest.raises(CheckpointError, match="mdistiller export RUN"):
        load_export(out)


def test_what_cannot_be_exported(run, tmp_path):
    with pytest.raises(CheckpointError, match=r"no such run folder"):
        export_student(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no student\.safetensors"):
        export_student(tmp_path)
    bare = tmp_path / "bare.safetensors"
    save_student(bare, create_model("resnet8"), {})
    torch.save(create_model("resnet8").state_dict(), tmp_path / "bare.pth")
    for file in (bare, tmp_path / "bare.pth"):
        with pytest.raises(CheckpointError, match=r"is no student of a run \(no task in"):
            export_student(file)
    with pytest.raises(ConfigError, match="--ema goes with a run folder"):
        export_student(run / "student.safetensors", ema=True)
    (tmp_path / "student.safetensors").write_bytes((run / "student.safetensors").read_bytes())
    with pytest.raises(ConfigError, match="no moving average"):
        export_student(tmp_path, ema=True)
    damaged = {
        "{": "cannot read",
        "[]": "holds a list",
        '{"data": {"kind": "x"}}': r"config\.json: .*data\.kind: ",
    }
    for text, said in damaged.items():
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(MDistillerError, match=said):
            export_student(tmp_path)
    (tmp_path / "config.json").unlink()
    for taken in (tmp_path, bare):
        with pytest.raises(ConfigError, match=r"not an empty folder; choose another$"):
            export_student(run, out=taken)
    with pytest.raises(ConfigError, match="cannot write to"):
        export_student(run, out=bare / "out")
    (tmp_path / "empty").mkdir()
    assert export_student(run, out=tmp_path / "empty")[0] == tmp_path / "empty"


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_says_what_to_install(run, exports, tmp_path, monkeypatch, package):
    out, _ = exports["onnx"]
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(
        ConfigError, match=rf"^format onnx needs {package}: pip install onnx onnxruntime onnxscript$"
    ):
        export_student(run, "onnx", out=tmp_path / "other")
    assert list(tmp_path.iterdir()) == []
    export_student(run, out=tmp_path / "other")  # the other formats do without
    if package == "onnxruntime":
        with pytest.raises(ConfigError, match="needs onnxruntime"):
            load_export(out)
    else:
        assert load_export(out)(images(1)).shape == (1, 10)


def test_devices(exports):
    out, _ = exports["onnx"]
    assert load_export(out).device == torch.device("cpu")
    for device, said in (("gpu", "allowed: auto"), ("cuda:99", "GPUs are visible")):
        with pytest.raises(ConfigError, match=said):
            load_export(out, device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("format", ["safetensors", "torch-export"])
def test_on_a_gpu(run, exports, format):
    exported = load_export(exports[format][0])
    assert exported.device.type == "cuda"
    expected = logits("resnet8", run, 10, images(4))
    torch.testing.assert_close(exported(images(4)), expected, rtol=0.01, atol=0.01)
