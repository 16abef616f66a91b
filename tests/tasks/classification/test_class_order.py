"""Classes of a model and of the data are matched by their names."""

import shutil

import pytest
import torch
from PIL import Image

from mdistiller.data import DataConfig, load_data
from mdistiller.errors import CheckpointError
from mdistiller.models import ModelConfig, create_model
from mdistiller.runs.checkpoint import save_student
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.classification.task import ClassificationTask
from mdistiller.training.distributed import World

NAMES = [str(i) for i in range(12)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    for split in ("train", "val"):
        for i, name in enumerate(NAMES):
            (root / split / name).mkdir(parents=True)
            Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(root / split / name / "0.png")
    return root


def settings(folders, checkpoint):
    data = DataConfig(kind="folder", root=folders, image_size=16)
    return ClassificationConfig(
        data=data, student="resnet8", device="cpu",
        method="kd", teacher=ModelConfig(name="resnet8", checkpoint=checkpoint),
    )  # fmt: skip


def save(file, classes):
    torch.manual_seed(0)
    model = create_model("resnet8", 12)
    save_student(file, model, {"model": "resnet8", "options": {}, "classes": classes, "image_size": 16})
    return model.eval()


def test_a_teacher_s_outputs_follow_the_names(folders, tmp_path):
    model = save(tmp_path / "t.safetensors", NAMES)
    config = settings(folders, tmp_path / "t.safetensors")
    data = load_data(config.data)
    assert list(data.classes) == sorted(NAMES) != NAMES
    with pytest.warns(UserWarning, match="its classes were put into the data's order, by their names"):
        teacher = ClassificationTask().build_teacher(config, data).eval()
    images = torch.randn(3, 3, 16, 16)
    expected = model(images)[:, [int(name) for name in data.classes]]
    torch.testing.assert_close(teacher(images), expected)


def test_a_student_that_trains_further_follows_the_names(folders, tmp_path):
    model = save(tmp_path / "s.safetensors", NAMES)
    config = settings(folders, None).replace(
        student={"checkpoint": tmp_path / "s.safetensors"}, method="none"
    )
    data = load_data(config.data)
    with pytest.warns(UserWarning, match="its classes were put into the data's order, by their names"):
        student = ClassificationTask().build_student(config, data).eval()
    images = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(student(images), model(images)[:, [int(name) for name in data.classes]])


def test_an_evaluation_follows_the_names(folders, tmp_path):
    model = save(tmp_path / "t.safetensors", NAMES)
    config = settings(folders, tmp_path / "t.safetensors")
    data = load_data(config.data)
    with torch.no_grad():  # a bias that makes every image class 7
        model.fc.bias[7] += 1000
    save_student(
        tmp_path / "t.safetensors", model,
        {"model": "resnet8", "options": {}, "classes": NAMES, "image_size": 16},
    )  # fmt: skip
    with pytest.warns(UserWarning, match="its classes were put into the data's order"):
        metrics = ClassificationTask().evaluate(config, config.teacher, World(torch.device("cpu")))
    assert {name for name, value in metrics["classes"].items() if value} == {"7"}, data.classes


@pytest.mark.parametrize("use", ["build_teacher", "evaluate"])
def test_other_names_are_an_error(folders, tmp_path, use):
    save(tmp_path / "t.safetensors", [*NAMES[:-1], "cat"])
    config = settings(folders, tmp_path / "t.safetensors")
    if use == "evaluate":
        arguments = (config, config.teacher, World(torch.device("cpu")))
    else:
        arguments = (config, load_data(config.data))
    with pytest.raises(CheckpointError, match="only in the data: 11; only in the model: cat"):
        getattr(ClassificationTask(), use)(*arguments)


@pytest.mark.parametrize("ensemble", ["logits", "losses"])
def test_each_of_several_teachers_follows_the_names(folders, tmp_path, ensemble):
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    models = save(first, NAMES), save(second, NAMES[::-1])
    config = settings(folders, first).replace(
        more_teachers=[{"name": "resnet8", "checkpoint": second}], ensemble=ensemble
    )
    data = load_data(config.data)
    task = ClassificationTask()
    parts = [part for part, _ in config.by_teacher()] if ensemble == "losses" else [config]
    with pytest.warns(UserWarning, match="its classes were put into the data's order"):
        built = [task.build_teacher(part, data).eval() for part in parts]
    images = torch.randn(3, 3, 16, 16)
    orders = [[names.index(name) for name in data.classes] for names in (NAMES, NAMES[::-1])]
    expected = [model(images)[:, order] for model, order in zip(models, orders, strict=True)]
    if ensemble == "logits":
        expected = [torch.stack(expected).mean(0)]
    for teacher, value in zip(built, expected, strict=True):
        torch.testing.assert_close(teacher(images), value)


@pytest.mark.parametrize("known", [True, False], ids=["found when listed", "found when read"])
def test_an_evaluation_counts_the_images_that_it_scored(folders, tmp_path, monkeypatch, known):
    if not known:
        monkeypatch.setattr("mdistiller.data.load.drop_unreadable", lambda images, workers: images)
    root = tmp_path / "data"
    shutil.copytree(folders, root)
    broken = root / "val" / "3" / "0.png"
    broken.write_bytes(broken.read_bytes()[:-30])
    save(tmp_path / "t.safetensors", sorted(NAMES))
    config = settings(root, tmp_path / "t.safetensors")
    config = config.replace(data={"on_error": "skip", "memory": "stream", "workers": 0})
    with pytest.warns(UserWarning, match="left out: 1 of 12" if known else "an epoch left out 1 image"):
        metrics = ClassificationTask().evaluate(config, config.teacher, World(torch.device("cpu")))
    assert metrics["images"] == 11
