"""A resumed run knows its teacher and its data, which may be elsewhere."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import StopAfter

from mdistiller.data import DataConfig
from mdistiller.errors import ConfigError, Interrupted
from mdistiller.models import ModelConfig, create_model
from mdistiller.runs.checkpoint import save_student
from mdistiller.runs.folder import RunFolder, check_resumable
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.training.launch import train
from mdistiller.training.task import get_task


def settings(tmp_path, **data):
    data = {"kind": "synthetic", "synthetic_samples": 32, "synthetic_classes": 4, "image_size": 16} | data
    return ClassificationConfig(
        data=DataConfig(**data), student="resnet8", method="kd", device="cpu", epochs=1, batch_size=16,
        teacher=ModelConfig(name="resnet8", checkpoint=tmp_path / "t.safetensors"), out=tmp_path / "run",
        diagnostics=False,
    )  # fmt: skip


def save_teacher(tmp_path, seed):
    torch.manual_seed(seed)
    save_student(tmp_path / "t.safetensors", create_model("resnet8", 4), {})


def test_another_teacher_is_refused(tmp_path):
    save_teacher(tmp_path, 0)
    train(settings(tmp_path))
    train(settings(tmp_path), resume=True)
    save_teacher(tmp_path, 1)
    with pytest.raises(
        ConfigError, match="teacher: its weights are not those with which this run was started"
    ):
        train(settings(tmp_path), resume=True)


def test_the_data_may_have_moved(tmp_path):
    save_teacher(tmp_path, 0)
    RunFolder.create(settings(tmp_path, memory="stream")).close()
    check_resumable(settings(tmp_path, memory="stream", workers=1, root=tmp_path / "moved"))
    check_resumable(settings(tmp_path, memory="auto", memory_limit_gb=1.0))
    with pytest.raises(ConfigError, match="with another data"):
        check_resumable(settings(tmp_path, memory="resident"))
    with pytest.raises(ConfigError, match="with another data"):
        check_resumable(settings(tmp_path, memory="stream", train_limit=8))


def write_images(root):
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for name in "abc":
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{i}.bmp")


def swap(one, other):
    between = one.with_name("between")
    one.rename(between)
    other.rename(one)
    between.rename(other)


def brighten(root):
    """Another image of the same name and size."""
    Image.fromarray(np.full((16, 16, 3), 255, np.uint8)).save(root / "train" / "b" / "3.bmp")


CHANGES = {
    "the same elsewhere": (lambda root: None, None),
    "an image": (brighten, "training images"),
    "a test image": (lambda root: shutil.copy(root / "train/a/0.bmp", root / "val/a/0.bmp"), "test images"),
    "files of other names": (
        lambda root: swap(root / "train/a/0.bmp", root / "train/a/1.bmp"),
        "training im",
    ),
    "one image less": (lambda root: (root / "train/c/5.bmp").unlink(), "labels"),
    "two classes": (lambda root: swap(root / "train/a", root / "train/b"), "training images"),
    "a class's name": (
        lambda root: [(root / s / "a").rename(root / s / "A") for s in ("train", "val")],
        "labels",
    ),
}


@pytest.mark.parametrize("memory", ["auto", "stream", "resident"])
@pytest.mark.parametrize("change", CHANGES)
def test_other_data_are_refused(tmp_path, change, memory):
    """A run that resumes reads the images that it began with, wherever they are."""
    write_images(tmp_path / "data")
    config = ClassificationConfig(
        data=DataConfig(kind="folder", root=tmp_path / "data", image_size=16, memory=memory, workers=0),
        student="resnet8", method="none", device="cpu", epochs=2, batch_size=6, out=tmp_path / "run",
        diagnostics=False,
    )  # fmt: skip
    with pytest.raises(Interrupted):
        train(config, reporter=StopAfter(2))
    moved = tmp_path / "moved"
    (tmp_path / "data").rename(moved)
    edit, what = CHANGES[change]
    edit(moved)
    config = config.replace(data={"root": moved})
    if what is None:
        train(config.replace(data={"memory": "stream"} if memory == "auto" else {}), resume=True)
        return
    with pytest.raises(ConfigError, match=f"data: .*{what}.* are not those with which this run was started"):
        train(config, resume=True)


def write_objects(root):
    """COCO's and VOC's files of four images with a box and a mask each."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        pictures, objects = [], []
        for folder in ("images", "JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(2):
            name, number = f"{split}{i}.png", len(pictures) + 1
            image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
            image.save(root / "images" / name)
            image.save(root / "JPEGImages" / name)
            mask = Image.fromarray(rng.integers(0, 2, (16, 16), np.uint8), mode="P")
            mask.putpalette(range(6))
            mask.save(root / "SegmentationClass" / name)
            pictures.append({"id": number, "file_name": name, "height": 16, "width": 16})
            box = {"bbox": [2, 3, 8, 9], "area": 72, "iscrowd": 0}
            objects.append({"id": number, "image_id": number, "category_id": 1, **box})
        content = {"images": pictures, "annotations": objects, "categories": [{"id": 1, "name": "thing"}]}
        (root / f"instances_{split}.json").write_text(json.dumps(content))
        names = "\n".join(f"{split}{i}" for i in range(2))
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(names)
    (root / "classes.txt").write_text("ground\nthing\n")


def move_box(root):
    file = root / "instances_train.json"
    file.write_text(file.read_text().replace("[2, 3, 8, 9]", "[2, 3, 8, 8]", 1))


def rename_class(root):
    for file in (*root.glob("*.json"), root / "classes.txt"):
        file.write_text(file.read_text().replace("thing", "object"))


def copy(folder, one, other):
    return lambda root: shutil.copy(root / folder / one, root / folder / other)


DENSE = {
    "nothing": ("both", lambda root: None, set()),
    "a box": ("detection", move_box, {"labels"}),
    "a class's name": ("both", rename_class, {"labels"}),
    "an image": ("detection", copy("images", "train0.png", "train1.png"), {"training images"}),
    "a test image": ("segmentation", copy("JPEGImages", "val0.png", "val1.png"), {"test images"}),
    "a mask": ("segmentation", copy("SegmentationClass", "train0.png", "train1.png"), {"training images"}),
}


@pytest.mark.parametrize("task", ["detection", "segmentation"])
@pytest.mark.parametrize("change", DENSE)
def test_other_images_with_objects_or_masks_are_told(tmp_path, task, change):
    write_objects(tmp_path / "data")
    student = {"detection": "fcos_resnet18", "segmentation": "lraspp_mobilenet_v3_small"}[task]
    config = get_task(task).Config.model_validate({"student": student, "data": {"root": tmp_path / "data"}})

    def found(config):
        return get_task(task).identify(config, get_task(task).load_data(config))

    before = found(config)
    moved = tmp_path / "moved"
    (tmp_path / "data").rename(moved)
    where, edit, what = DENSE[change]
    edit(moved)
    after = found(config.replace(data={"root": moved}))
    assert before.keys() == after.keys() == {"labels", "training images", "test images"}
    told = {name for name in before if before[name] != after[name]}
    assert told == (what if where in (task, "both") else set())
