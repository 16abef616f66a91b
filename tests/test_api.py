"""Runs from Python: `distill`, `train` and `Run`."""

import copy
import html
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

import mdistiller
from mdistiller.arguments import config_for, find_data
from mdistiller.cli.main import run as command
from mdistiller.data import DataConfig
from mdistiller.data.given import read_given
from mdistiller.data.synthetic import load_digits
from mdistiller.deploy.student import GivenTeacher
from mdistiller.errors import ConfigError, DataError, MDistillerError, UnknownNameError
from mdistiller.models import ModelConfig
from mdistiller.runs.progress import Reporter

PAGE = Path(__file__).parents[1] / "docs" / "python.md"
FAST = {
    "epochs": 1,
    "batch_size": 16,
    "device": "cpu",
    "layout": "contiguous",
    "precision": "float32",
    "log_every": 1,
    "diagnostics": False,
}


class Net(nn.Module):
    def __init__(self, width=8, classes=4):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, image):
        return self.fc(self.norm(self.conv(image)).relu().mean((2, 3)))


def net(width=8, classes=4, seed=0):
    torch.manual_seed(seed)
    return Net(width, classes)


def arrays(count=32, seed=0):
    """Images uint8 [N, 16, 16, 3] and labels of 4 classes, all of which are there."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 16, 16, 3), generator=generator, dtype=torch.uint8)
    return images, torch.arange(count) % 4


DATA = arrays(), arrays(16, seed=1)


class Images(Dataset):
    """A `Dataset` of PIL images of one or of several sizes."""

    def __init__(self, images, labels, sizes=(16,)):
        self.images, self.labels, self.sizes = images, labels, sizes

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        side = self.sizes[index % len(self.sizes)]
        return Image.fromarray(self.images[index].numpy()).resize((side, 16)), int(self.labels[index])


class Named(Images):
    def __init__(self, classes):
        super().__init__(*DATA[0])
        self.classes = list(classes)


class Floats(Images):
    def __getitem__(self, index):
        return self.images[index].permute(2, 0, 1) / 255, self.labels[index]


def equal(a, b):
    a, b = (load_file(run / "student.safetensors") for run in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def teacher_run(tmp_path_factory):
    """A run of `resnet8` on images in class folders, from the command line."""
    root = tmp_path_factory.mktemp("folder")
    for split, (images, labels) in zip(("train", "val"), DATA, strict=True):
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            (root / split / str(int(label))).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.numpy()).save(root / split / str(int(label)) / f"{i:02}.png")
    out = root / "teacher"
    argv = ["train", "folder.teacher.resnet8", "--data.root", root, "--data.image-size", 16, *flags(FAST)]
    assert command([str(word) for word in [*argv, "--out", out]]) == 0
    return out


def flags(settings):
    found = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        found += [f"--{flag}" if value is True else f"--no-{flag}" if value is False else f"--{flag}"]
        found += [] if isinstance(value, bool) else [str(value)]
    return found


@pytest.fixture(scope="module")
def teacher():
    return net(16, seed=7)


STUDENTS = {
    "module": (lambda run: net(), "given/Net"),
    "name": (lambda run: "resnet8", "resnet8"),
    "run folder": (lambda run: run, "resnet8"),
    "run": (mdistiller.Run, "resnet8"),
    "fields": (lambda run: {"name": "resnet8x4"}, "resnet8x4"),
}


@pytest.mark.parametrize("kind", STUDENTS)
def test_students(tmp_path, teacher, teacher_run, kind):
    make, name = STUDENTS[kind]
    settings = FAST | ({} if kind in ("module", "name", "fields") else {"probe_epochs": 0})
    run = mdistiller.distill(make(teacher_run), teacher, DATA, "kd", out=tmp_path / "run", **settings)
    assert run.config.student.name == name
    assert run.student(torch.zeros(2, 3, 16, 16)).shape == (2, 4)
    assert run.summary["step"] == 2
    is_pretrained = kind in ("run folder", "run")
    assert run.config.student.checkpoint == (teacher_run if is_pretrained else None)
    assert run.config.optim.name == ("adamw" if is_pretrained else "sgd")


TEACHERS = {
    "module": lambda run: net(16),
    "run folder": str,
    "run": mdistiller.Run,
    "file": lambda run: run / "student.safetensors",
    "fields": lambda run: {"name": "resnet8", "checkpoint": run},
    "config": lambda run: ModelConfig(name="resnet8", checkpoint=run),
    "itself": lambda run: "self",
}


@pytest.mark.parametrize("kind", TEACHERS)
def test_teachers(tmp_path, teacher_run, kind):
    teacher = TEACHERS[kind](teacher_run)
    run = mdistiller.distill("resnet8", teacher, DATA, "kd", out=tmp_path / "run", **FAST)
    name = run.config.teacher.name
    assert (
        name.startswith("given/Net-") if kind == "module" else name == {"itself": "self"}.get(kind, "resnet8")
    )
    assert run.config.recipe == f"folder.kd.{name}_resnet8"
    assert run.summary["last"]["epoch"] == 1


def test_a_run_that_trained_a_module_is_a_teacher(tmp_path):
    first = mdistiller.distill(
        net(16),
        None,
        {"train": DATA[0], "test": DATA[1], "mean": (0.5,) * 3},
        "none",
        out=tmp_path / "a",
        **FAST,
    )
    run = mdistiller.distill(net(), first, DATA, "kd", out=tmp_path / "b", **FAST)
    assert run.config.teacher.name.startswith("given/Net-")
    assert run.config.teacher.mean == (0.5, 0.5, 0.5)
    assert run.config.student.name == "given/Net"
    tuned = mdistiller.distill(
        first, net(16), DATA, "kd", out=tmp_path / "c", **FAST, probe_epochs=0, max_steps=1
    )
    assert (tuned.config.student.name, tuned.config.optim.name) == ("given/Net", "adamw")


def folder_of(run):
    return run.parent


SETS = {
    "tensors": lambda run: DATA,
    "channels first": lambda run: tuple((x.permute(0, 3, 1, 2), y) for x, y in DATA),
    "arrays": lambda run: tuple((x.numpy(), y.numpy()) for x, y in DATA),
    "datasets": lambda run: tuple(Images(*part) for part in DATA),
    "subset": lambda run: (Subset(Images(*DATA[0]), range(20)), Images(*DATA[1])),
    "tensor dataset": lambda run: tuple(TensorDataset(x.permute(0, 3, 1, 2), y) for x, y in DATA),
    "floats": lambda run: tuple(Floats(*part) for part in DATA),
    "photographs": lambda run: {
        "train": Images(*DATA[0], (16, 20)),
        "test": Images(*DATA[1], (18, 16)),
        "image_size": 12,
        "workers": 0,
    },
    "a cut": lambda run: {"train": DATA[0], "val_fraction": 0.25},
    "folder": lambda run: {"root": folder_of(run), "image_size": 16, "workers": 0},
    "registered": lambda run: {"kind": "synthetic", "synthetic_classes": 4, "synthetic_samples": 32},
    "config": lambda run: DataConfig(kind="synthetic", synthetic_classes=4, synthetic_samples=32),
}


@pytest.mark.parametrize("kind", SETS)
def test_data(tmp_path, teacher, teacher_run, kind):
    student, before = net(), copy.deepcopy(teacher.state_dict())
    run = mdistiller.distill(student, teacher, SETS[kind](teacher_run), "kd", out=tmp_path / "run", **FAST)
    config = json.loads((run.path / "config.json").read_text())
    stored = {"folder": "folder", "registered": "synthetic", "config": "synthetic"}.get(kind, "given-")
    assert config["data"]["kind"].startswith(stored)
    assert config["augment"]["crop"] == ("resized" if kind == "folder" else "auto")
    assert run.summary["epochs"] == 1
    # Nothing that was handed over is changed.
    assert all(torch.equal(value, net().state_dict()[key]) for key, value in student.state_dict().items())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert student.training


def test_pixels_and_labels_are_those_given():
    for kind in ("tensors", "channels first", "arrays", "datasets", "floats", "tensor dataset"):
        name, reader = read_given(*SETS[kind](None))
        splits = reader(DataConfig(kind=name))
        for found, (images, labels) in zip((splits.train, splits.test), DATA, strict=True):
            assert torch.equal(found.images, images), kind
            assert torch.equal(found.labels, labels), kind
        assert (splits.classes, splits.image_size, splits.crop) == (("0", "1", "2", "3"), 16, "padded")


def test_floats_and_gray_images_are_the_same_pixels():
    images, labels = arrays()
    gray = images[..., 0]

    def read(pixels):
        return read_given((pixels, labels), None)[1](DataConfig(val_fraction=0.5)).train.images

    assert torch.equal(read(images / 255), images)
    assert torch.equal(read(images.permute(0, 3, 1, 2).double() / 255), images)
    assert torch.equal(read(gray), gray[..., None].expand(-1, -1, -1, 3))
    for wrong in (images.float(), (images / 255 - 0.5) / 0.5, images / 255 * float("nan")):
        with pytest.raises(ConfigError, match=r"images of train have values from .*leave out Normalize"):
            read(wrong)
    with pytest.raises(ConfigError, match=r"int64 .*allowed: .* or gray \[N, H, W\], uint8 or float"):
        read(images.long())


def test_hugging_face_sets_are_read_by_column():
    datasets = pytest.importorskip("datasets")
    images, labels = arrays()
    columns = {"image": [Image.fromarray(image.numpy()) for image in images], "label": labels.tolist()}
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee", "cat", "dog"])}
    )
    rows = datasets.Dataset.from_dict(columns, features=features)
    both = datasets.DatasetDict(train=rows, validation=rows.select(range(8)))
    for given in ((rows, both["validation"]), both):
        _, fields, readers = find_data(given)
        splits = readers[fields["kind"]](DataConfig(kind=fields["kind"]))
        assert splits.classes == ("ant", "bee", "cat", "dog")
        assert torch.equal(splits.train.images, images)
        assert torch.equal(splits.test.labels, labels[:8])
    with pytest.raises(ConfigError, match=r"train\[0\] has the columns image, kind; allowed: "):
        find_data((rows.rename_column("label", "kind"), rows))


def test_photographs_are_cropped_as_files_are():
    photographs = SETS["photographs"](None)
    name, reader = read_given(photographs["train"], photographs["test"], ["a", "b", "c", "d"])
    splits = reader(DataConfig(kind=name, image_size=12))
    assert (splits.train.random_crop, splits.test.random_crop, splits.crop) == (True, False, "resized")
    assert reader(DataConfig(kind=name)).image_size == 224
    chosen = splits.test.select(torch.tensor([1, 2]))
    assert torch.equal(chosen.labels, torch.tensor([1, 2]))
    # The first test image, of 18 x 16 pixels: short side to 12, center of 12.
    wide = Image.fromarray(DATA[1][0][0].numpy()).resize((18, 16))
    expected = np.asarray(wide.resize((13, 12), Image.Resampling.BILINEAR))[:, :12]
    found = splits.test.read(0, 0).numpy().astype(int)
    assert np.abs(found - expected).max() <= 2
    one, other = (splits.train.read(1, seed) for seed in (0, 1))
    assert one.shape == (12, 12, 3)
    assert not torch.equal(one, other)
    assert torch.equal(one, splits.train.read(1, 0))


def test_the_name_of_data_follows_from_them():
    names = [read_given(*data)[0] for data in (DATA, DATA, (DATA[0], arrays(16, seed=2)))]
    assert names[0] == names[1] != names[2]
    assert names[0].startswith("given-")


# Equal runs


def test_the_command_gives_the_same_student(tmp_path, teacher_run):
    """Recipe, teacher from a run, folder and settings are the same, so the weights are."""
    argv = ["train", "folder.dkd.resnet8x4", "--teacher", teacher_run, "--data.root", folder_of(teacher_run)]
    argv += ["--data.workers", 0, "--seed", 3, *flags(FAST), "--out", tmp_path / "command"]
    assert command([str(word) for word in argv]) == 0
    data = {"root": folder_of(teacher_run), "workers": 0}
    run = mdistiller.distill("resnet8x4", teacher_run, data, seed=3, out=tmp_path / "python", **FAST)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("command", "python")]
    for config in configs:
        del config["out"]
    assert configs[0] == configs[1]
    assert equal(tmp_path / "command", run.path)


def test_objects_give_the_student_that_names_give(tmp_path, registries):
    splits = load_digits(DataConfig(kind="digits"))
    limit = [splits.train.select(torch.arange(64)), splits.test.select(torch.arange(32))]

    @mdistiller.register_dataset("some_digits")
    def some_digits(config):
        return replace(splits, train=limit[0], test=limit[1])

    settings = FAST | {"seed": 5, "augment": {"flip": False}}
    teacher = mdistiller.train(
        "digits.teacher.resnet14", data={"train_limit": 64}, out=tmp_path / "t", **FAST
    )
    named = mdistiller.distill("resnet8", teacher, "some_digits", out=tmp_path / "named", **settings)
    torch.manual_seed(5)
    student = mdistiller.create_model("resnet8", 10)
    data = dict(zip(("train", "test"), ((part.images, part.labels) for part in limit), strict=True))
    data |= {"mean": splits.mean, "std": splits.std, "image_size": 16}
    given = mdistiller.distill(student, teacher.student, data, out=tmp_path / "given", **settings)
    assert equal(named.path, given.path)
    assert given.config.data.kind.startswith("given-")


def test_train_takes_the_data_that_distill_takes(tmp_path):
    pair = (arrays(), arrays(seed=1))
    recipe = "folder.student.resnet8"
    run = mdistiller.train(recipe, data=pair, out=tmp_path / "a", **FAST)
    same = mdistiller.distill("resnet8", None, pair, method="none", out=tmp_path / "b", **FAST)
    assert run.config.data.kind == same.config.data.kind
    assert equal(run.path, same.path)
    again = mdistiller.train(run.config.replace(epochs=2), data=pair, out=tmp_path / "c")
    assert again.summary["epochs"] == 2
    with pytest.raises(UnknownNameError, match="unknown data set or folder 'digit'"):
        mdistiller.train(recipe, data="digit", **FAST)


class StopError(Exception):
    pass


class StopAt(Reporter):
    def step(self, done):
        if done == 5:
            raise StopError


def test_a_resumed_run_of_objects_equals_one_that_was_not_cut(tmp_path, teacher):
    def start(name, student=None, **more):
        settings = FAST | {"epochs": 4, "out": tmp_path / name, **more}
        return mdistiller.distill(student or net(), teacher, DATA, **settings)

    whole = start("whole")
    for name in ("a", "b"):
        with pytest.raises(StopError):
            start(name, reporter=StopAt())
    a = start("a", net(seed=9), resume=True)  # the state has the student's weights
    b = mdistiller.Run(tmp_path / "b", student=net(seed=9), teacher=teacher, data=DATA)
    with pytest.raises(ConfigError, match=r"^summary: .*b has not ended; resume\(\) continues it$"):
        _ = b.summary
    b = b.resume()
    assert equal(whole.path, a.path)
    assert equal(whole.path, b.path)
    assert b.summary["step"] == whole.summary["step"] == 8
    again = mdistiller.Run(b.path, student=net(seed=9))
    assert torch.equal(again.student.fc.weight, whole.student.fc.weight)


def test_without_its_objects_a_run_names_them(tmp_path, teacher):
    student = net()
    run = mdistiller.distill(student, teacher, DATA, "kd", out=tmp_path / "run", **FAST)
    again = (
        r"give it again, as student or teacher of mdistiller\.Run\(FOLDER, student=…, teacher=…, data=…\)$"
    )
    with pytest.raises(ConfigError, match=again):
        mdistiller.load_student(run.path)
    for given in ({}, {"student": student}, {"teacher": teacher}, {"data": DATA}):
        with pytest.raises(ConfigError, match=again):
            mdistiller.Run(run.path, **given).resume()
    with pytest.raises(
        DataError, match=r"^data.kind: 'given-\w+' was given to the run as objects; give them"
    ):
        mdistiller.Run(run.path, student=student, teacher=teacher).resume()
    with pytest.raises(ConfigError, match=again):
        mdistiller.train(run.path / "config.json")
    assert command(["train", str(run.path), "--resume"]) == 2
    assert mdistiller.Run(run.path).report(images=10).is_file()  # without the student's part
    for given, words in (
        ({"student": nn.Linear(2, 2)}, r"^student: got 'given/Linear'; the student of .*run is 'given/Net'$"),
        (
            {"teacher": net(16, seed=8)},
            r"^teacher: got 'given/Net-\w+'; the teacher of .*run is 'given/Net-\w+'$",
        ),
        ({"data": DATA[::-1]}, r"^data: got 'given-\w+'; the data of .*run are 'given-\w+'$"),
    ):
        with pytest.raises(ConfigError, match=words):
            mdistiller.Run(run.path, **given)
    with pytest.raises(ConfigError, match=r"^cannot resume .* with another recipe, teacher"):
        mdistiller.distill(student, net(16), DATA, "kd", out=run.path, resume=True, **FAST)
    with pytest.raises(ConfigError, match=r"^out: .*run holds a run already; .*in Python resume=True"):
        mdistiller.distill(student, teacher, DATA, "kd", out=run.path, **FAST)


def test_an_extended_student_of_objects(tmp_path):
    student, teacher = (mdistiller.create_model(name, 4) for name in ("resnet8", "resnet14"))
    run = mdistiller.distill(student, teacher, DATA, "simkd", out=tmp_path / "run", **FAST)
    assert run.config.student.name == "given/ResNet"
    assert run.student(torch.zeros(2, 3, 16, 16)).shape == (2, 4)


def test_python_of_the_page(tmp_path, monkeypatch, teacher):
    monkeypatch.chdir(tmp_path)
    given = {"mdistiller": mdistiller, "student": net(), "teacher": teacher}
    given |= {"images": DATA[0][0], "labels": DATA[0][1]}
    given |= {"train_set": Images(*DATA[0]), "test_set": Images(*DATA[1])}
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, given)
    assert given["again"].student(torch.zeros(1, 3, 16, 16)).shape == (1, 4)
    assert given["run"].config.seed == 1


# Settings


def test_settings_are_those_of_the_recipe():
    student, teacher = GivenTeacher("resnet8"), GivenTeacher(ModelConfig(name="resnet14"))
    assert config_for("folder", student, teacher, "at", None).method.weight == "auto"
    assert config_for("cifar100", student, teacher, "dkd", None).optim.lr == 0.05
    assert config_for("folder", student, teacher, {"name": "dkd", "alpha": 2.0}, None).method.alpha == 2.0
    photographs = mdistiller.get_recipe("folder.dkd.resnet14_resnet8").method
    found = config_for("folder", student, teacher, {"name": "dkd", "alpha": 2.0}, None).method
    assert found == photographs.replace(alpha=2.0)
    config = config_for("folder", student, teacher, photographs.replace(beta=3.0), None)
    assert config.method.beta == 3.0
    pretrained = {"name": "torchvision/resnet18", "options": {"pretrained": True}}
    for given, name in ((None, "adamw"), (False, "sgd"), (True, "adamw")):
        found = config_for("folder", GivenTeacher(ModelConfig(**pretrained)), teacher, "kd", given)
        assert (found.optim.name, found.student.options) == (name, {"pretrained": True})


def test_a_teacher_sees_its_own_images(tmp_path):
    class Larger(Net):
        def forward(self, image):
            assert image.shape[2:] == (20, 20)
            return super().forward(image)

    teacher = Larger()
    images = {"mean": (0.4,) * 3, "std": (0.2,) * 3, "image_size": 20}
    run = mdistiller.distill(net(), teacher, DATA, "kd", teacher_input=images, out=tmp_path / "run", **FAST)
    assert run.config.teacher.model_dump(include=set(images)) == images


def test_a_teacher_with_its_librarys_weights(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    original = timm.create_model

    def create(name, pretrained=False, **options):
        assert pretrained == (name == "test_resnet")
        return original(name, **options)

    monkeypatch.setattr(timm, "create_model", create)
    teacher = {"name": "timm/test_resnet", "options": {"pretrained": True}}
    data = {"train": DATA[0], "test": DATA[1], "classes": range(1000)}
    run = mdistiller.distill("resnet8", teacher, data, "kd", out=tmp_path / "run", **FAST)
    assert run.config.teacher.options == {"pretrained": True}
    assert run.student(torch.zeros(1, 3, 16, 16)).shape == (1, 1000)
    with pytest.raises(ConfigError, match="test_resnet is pretrained on 1000 classes, the data 4"):
        mdistiller.distill("resnet8", teacher, DATA, "kd", **FAST)


# Wrong arguments


def wrong(**changes):
    given = {"student": net(), "teacher": net(16), "data": DATA} | changes
    return lambda: mdistiller.distill(**given, **FAST)


x, y = DATA[0]
MODULE = net()
WRONG = {
    "method": (wrong(method="dkdd"), "unknown method 'dkdd'; nearest: dkd"),
    "fields of the method": (wrong(method={"beta": 2}), "method: got fields without a name; allowed"),
    "built method": (
        wrong(method=mdistiller.Distiller(net(), net(), "dkd", total_steps=1).method),
        "method: got a built method; allowed: a method's name, its config",
    ),
    "setting of the method": (
        wrong(method={"name": "dkd", "bet": 2}),
        "method.bet: unknown .* nearest: beta",
    ),
    "setting": (wrong(epoch=2), "epoch: unknown field; nearest: epochs"),
    "setting of a group": (
        wrong(image_size=64),
        r'unknown field; nearest: .*data=\{"image_size": …\}',
    ),
    "setting by another name": (wrong(learning_rate=1), r'unknown field; nearest: optim=\{"lr": …\}'),
    "setting of a method": (wrong(temperature=1), r'unknown field; nearest: method=\{"temperature": …\}'),
    "student": (wrong(student="resnet9"), "unknown model 'resnet9'; nearest: "),
    "student's fields": (
        wrong(student={"nam": "resnet8"}),
        "student: name: Field required; nam: unknown",
    ),
    "student of no kind": (wrong(student=3), "student: got a int; allowed: a module, a model's name"),
    "no teacher": (
        wrong(teacher=None),
        "teacher: got None with method 'dkd'; allowed: a teacher",
    ),
    "no method": (wrong(method="none"), "teacher: got one with method 'none'; allowed"),
    "teacher without weights": (wrong(teacher="resnet8"), "the teacher resnet8 has no weights; give"),
    "teacher's images": (wrong(teacher_input={"side": 3}), "teacher_input: got dict without any value"),
    "both": (wrong(student=MODULE, teacher=MODULE), "teacher: got the student's own module; allowed"),
    "student's classes": (
        wrong(student=net(8, 5)),
        r"student: its output has shape \[B, 5\]; the data",
    ),
    "teacher's classes": (
        wrong(teacher=net(8, 5)),
        r"teacher: it returns no logits of the data's 4 classes, and method 'dkd' reads",
    ),
    "data": (wrong(data="digts"), "unknown data set or folder 'digts'; nearest: digits"),
    "no such run": (wrong(teacher=Path("nope")), "teacher: nope is no run folder or student's file"),
    "labels of words": (wrong(data=((x, ["a"] * 32), DATA[1])), "data: labels of train are no tensor: "),
    "arrays alone": (wrong(data=(x.numpy(), y.numpy())), "data: got a tuple, without a test set; allowed"),
    "no test set": (wrong(data=DATA[0]), "data: got a tuple, without a test set; allowed"),
    "a Dataset alone": (wrong(data=Images(x, y)), "data: got a Images, without a test set; allowed"),
    "train alone": (wrong(data={"train": DATA[0]}), "data: no test set; give"),
    "label": (wrong(data=((x, y), (x, y + 1))), "data: a label of test is 4; allowed: 0 to 3"),
    "negative label": (wrong(data=((x, y - 1), DATA[1])), "data: a label of train is -1; allowed: 0 to 2"),
    "labels": (wrong(data=((x, y[:5]), DATA[1])), r"data: labels of train are torch.int64 \[5\]; allowed"),
    "soft labels": (
        wrong(data=((x, y.float()), DATA[1])),
        r"labels of train are torch.float32 \[32\]; ",
    ),
    "float images": (
        wrong(data=((x.float(), y), DATA[1])),
        "images of train have values from 0 to 255; allowed: .*leave out Normalize",
    ),
    "gray images": (
        wrong(data=(DATA[0], (x[..., :1], y))),
        r"of test are torch.uint8 \[32, 16, 16, 1\]",
    ),
    "text": (wrong(data=("a", "b")), "data: train is a str; allowed: a Dataset with a length, or a pair"),
    "normalized": (
        wrong(data=(Floats(x.float() * 2, y), DATA[1])),
        r"train\[0\] has values .*leave out Normalize",
    ),
    "label of a Dataset": (
        wrong(data=(Images(x, y), Floats(x, y / 2))),
        r"of test\[0\] is .*; allowed: a",
    ),
    "nested labels": (
        wrong(data=([(Image.fromarray(i.numpy()), [[1], [1, 2]]) for i in x], DATA[1])),
        r"the label of train\[0\] is \[\[1\], \[1, 2\]\]; allowed: a class id",
    ),
    "ragged labels": (
        wrong(data=((x, [[1]] + [[1, 0]] * 31), DATA[1])),
        r"labels of train are no tensor: .*; allowed: a class id for each of the 32 images",
    ),
    "classes in another order": (
        wrong(data=(Named("abcd"), Named("abdc"))),
        "data: classes of train are a, b, c, d, of test a, b, d, c; allowed: one order",
    ),
    "items": (wrong(data=([x, x, x], DATA[1])), r"data: train\[0\] is a Tensor; allowed: a pair"),
    "empty": (wrong(data=(Images(x, y[:0]), DATA[1])), "data: train has no images"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_arguments_are_one_sentence(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start, words = WRONG[kind]
    with pytest.raises(MDistillerError, match=words) as caught:
        start()
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("config.json"))


def test_a_list_of_two_items_is_a_dataset():
    items = [(Image.fromarray(image.numpy()), int(label)) for image, label in zip(x[:2], y[:2], strict=True)]
    name, reader = read_given(items, items)
    assert torch.equal(reader(DataConfig(kind=name)).train.images, x[:2])
    assert find_data(DataConfig(image_size=16)) == ("cifar100", {"kind": "cifar100", "image_size": 16}, {})


def test_random_transforms_are_refused():
    class Flipped(Images):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image.rotate(float(torch.rand(()) * 90)), label

    with pytest.raises(ConfigError, match=r"data: train\[0\] is another image each time; allowed"):
        read_given(Flipped(x, y), DATA[1])


# train and Run


def test_train_takes_recipes_configs_and_runs(tmp_path):
    data = {"train_limit": 32, "test_limit": 16}
    first = mdistiller.train("digits.student.resnet8", data=data, out=tmp_path / "a", **FAST)
    assert (first.path, first.summary["step"], first.config.data.train_limit) == (tmp_path / "a", 2, 32)
    others = (first.config, first.path, str(first.path / "config.json"))
    for i, source in enumerate(others):
        again = mdistiller.train(source, out=tmp_path / str(i))
        assert equal(first.path, again.path)
    assert not equal(first.path, mdistiller.train(first.path, seed=1, out=tmp_path / "b").path)
    finished = mdistiller.train(first.path, resume=True)
    assert finished.path == first.path
    with pytest.raises(ConfigError, match="epoch: unknown field; nearest: epochs"):
        mdistiller.train("digits.student.resnet8", epoch=2)
    with pytest.raises(ConfigError, match="epochs: Input should be greater than or equal to 1"):
        mdistiller.train(first.config.model_copy(update={"epochs": 0}))
    with pytest.raises(ConfigError, match="no run folder: it has no config"):
        mdistiller.train(tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory, teacher):
    out = tmp_path_factory.mktemp("run") / "run"
    return mdistiller.distill(net(), teacher, DATA, "kd", out=out, **FAST)


def test_progress_is_shown_unless_it_is_turned_off(tmp_path, capsys):
    mdistiller.distill(net(), net(16), DATA, out=tmp_path / "a", **FAST)
    shown = capsys.readouterr()
    assert (shown.out, "epoch   1" in shown.err) == ("", True)
    mdistiller.distill(net(), net(16), DATA, out=tmp_path / "b", reporter=False, **FAST)
    mdistiller.train("digits.student.resnet8", data=DATA, out=tmp_path / "c", reporter=False, **FAST)
    assert "epoch" not in capsys.readouterr().err


def test_a_notebook_shows_the_answer_and_the_chart(run, tmp_path):
    shown = html.unescape(run._repr_html_())
    assert f"{run.summary['last']['top1']:.1f}" in shown
    assert "<svg" in shown
    link = f'href="{run.path.as_posix()}/report.html"'
    assert link not in shown
    run.report()
    assert link in run._repr_html_()
    (run.path / "report.html").unlink()
    (tmp_path / "new").mkdir()
    for file in ("config.json", "env.json"):
        shutil.copy(run.path / file, tmp_path / "new")
    assert mdistiller.Run(tmp_path / "new")._repr_html_() is None  # nothing to show before an evaluation


def test_results_print_in_a_line(run):
    assert repr(run.metrics) == "Metrics(2 train, 1 eval, 1 summary)"
    distiller = mdistiller.Distiller(net(), net(16), "dkd", total_steps=1)
    out = distiller(torch.rand(2, 3, 16, 16), torch.tensor([0, 1]))
    text = repr(out)
    assert "logits=[2, 4]" in text
    assert re.search(r"loss=tensor\(\d", text)
    assert "\n" not in text
    assert repr(mdistiller.Outputs(torch.ones(8, 10), {"pooled": torch.ones(8, 64)})) == (
        "Outputs(logits=[8, 10], features={'pooled': [8, 64]})"
    )


def test_public_names():
    code = "import mdistiller as m; print(m.functional.dkd_loss.__name__, *dir(m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loss, *names = done.stdout.split()
    assert loss == "dkd_loss"
    assert sorted(names) == sorted([*mdistiller.__all__, "__version__", "functional"])


def test_metrics(run):
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert run.metrics == lines
    assert run.metrics[-1] == run.summary == mdistiller.Run(run.path).summary


def test_report_and_export(run, tmp_path):
    assert run.report() == run.path / "report.html"
    page = run.report(tmp_path / "page.html", images=16)
    assert "cannot" not in page.read_text()[-200:]
    assert "as an object" not in page.read_text()
    out = run.export("torch-export", out=str(tmp_path / "export"))
    card = json.loads((out / "card.json").read_text())
    assert card["measured"]["value"] == pytest.approx(run.summary["last"]["top1"])
    image = Image.fromarray(DATA[1][0][0].numpy())
    image.save(tmp_path / "image.png")
    assert mdistiller.load_export(out).predict([tmp_path / "image.png"])
    assert run.export().name == "student-safetensors"
    table = run.report(format="md")
    assert (table.name, "kd" in table.read_text().lower()) == ("report.md", True)


def test_no_run_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*config.json"):
        mdistiller.Run(tmp_path)
