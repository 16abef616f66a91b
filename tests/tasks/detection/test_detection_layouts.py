"""Layouts of YOLO, VOC and Roboflow: boxes by hand, and those of the same objects as COCO JSON."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_detectors import write_set

from mdistiller.errors import ConfigError, DataError
from mdistiller.tasks.detection.config import DetectionDataConfig
from mdistiller.tasks.detection.layouts import load_detection, load_split

NAMES = ("red", "green", "blue")
SPLITS = {"train": "instances_train.json", "val": "instances_val.json"}


def load(root, **fields):
    return load_detection(DetectionDataConfig(root=root, **fields))


def stored(root, file):
    """Yields (file name, width, height, [(class number from 0, x, y, w, h)]) of each image."""
    content = json.loads((root / file).read_text())
    number = {entry["id"]: NAMES.index(entry["name"]) for entry in content["categories"]}
    for image in content["images"]:
        own = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        boxes = [(number[a["category_id"]], *a["bbox"]) for a in own]
        yield image["file_name"], image["width"], image["height"], boxes


def to_yolo(coco, root, pattern="images/{}", polygons=False):
    for split, file in SPLITS.items():
        images = root / pattern.format(split)
        labels = root / pattern.replace("images", "labels").format(split)
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for name, width, height, boxes in stored(coco, file):
            shutil.copy(coco / "images" / name, images / name)
            lines = []
            for k, x, y, w, h in boxes:
                values = [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height]
                if polygons:
                    corners = ((x, y), (x + w, y), (x + w, y + h), (x, y + h))
                    values = [v for px, py in corners for v in (px / width, py / height)]
                lines.append(" ".join(map(str, (k, *values))))
            (labels / name).with_suffix(".txt").write_text("\n".join(lines) + "\n")


def to_xml(name, width, height, boxes):
    objects = "".join(
        f"<object><name>{NAMES[k]}</name><difficult>0</difficult><bndbox><xmin>{x + 1}</xmin>"
        f"<ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
        for k, x, y, w, h in boxes
    )
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation><filename>{name}</filename>{size}{objects}</annotation>"


def to_voc(coco, root):
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for split, file in SPLITS.items():
        found = list(stored(coco, file))
        stems = [name.removesuffix(".png") for name, *_ in found]
        (root / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(stems))
        for name, *rest in found:
            shutil.copy(coco / "images" / name, root / "JPEGImages" / name)
            (root / "Annotations" / name).with_suffix(".xml").write_text(to_xml(name, *rest))


def to_folders(coco, root):
    """VOC's files as Roboflow lays them out."""
    for split, file in SPLITS.items():
        folder = root / {"train": "train", "val": "valid"}[split]
        folder.mkdir(parents=True)
        for name, *rest in stored(coco, file):
            shutil.copy(coco / "images" / name, folder / name)
            (folder / name).with_suffix(".xml").write_text(to_xml(name, *rest))


def to_roboflow(coco, root):
    for split, file in SPLITS.items():
        folder = root / {"train": "train", "val": "valid"}[split]
        folder.mkdir(parents=True)
        content = json.loads((coco / file).read_text())
        for entry in content["categories"]:
            entry["supercategory"] = "squares"
        content["categories"].insert(0, {"id": 0, "name": "squares", "supercategory": "none"})
        for image in content["images"]:
            shutil.copy(coco / "images" / image["file_name"], folder / image["file_name"])
        (folder / "_annotations.coco.json").write_text(json.dumps(content))


def boxes_by_file(images):
    """Boxes and class names of each image, in any order of the classes."""
    name = {label: text for label, _, text in images.categories}
    found = {}
    for record in images.images:
        names = [name[label] for label in record.labels.tolist()]
        found[record.path.name] = record.size, names, record.boxes
    return found


def assert_equal(found, expected):
    found, expected = boxes_by_file(found), boxes_by_file(expected)
    assert found.keys() == expected.keys()
    assert sum(len(names) for _, names, _ in found.values()) > 6
    for name, (size, names, boxes) in found.items():
        assert (size, names) == expected[name][:2]
        torch.testing.assert_close(boxes, expected[name][2], rtol=0, atol=1e-4)


YAML = "train: images/train\nval: images/val\nnc: 3\nnames: [red, green, blue]\n"
ROBOFLOW_YAML = "train: ../train/images\nval: ../val/images\nnames: {0: red, 1: green, 2: blue}\n"
LAYOUTS = {
    "yolo": (to_yolo, "data.yaml", YAML),
    "yolo, classes.txt": (to_yolo, "classes.txt", "red\ngreen\nblue\n"),
    "yolo, path": (to_yolo, "data.yaml", "path: .\nnames: [red, green, blue]\n" + YAML[:36]),
    "yolo of Roboflow": (lambda a, b: to_yolo(a, b, "{}/images"), "data.yaml", ROBOFLOW_YAML),
    "yolo, classes, folders": (lambda a, b: to_yolo(a, b, "{}/images"), "classes.txt", "red\ngreen\nblue"),
    "voc": (to_voc, None, ""),
    "voc, classes.txt": (to_voc, "classes.txt", "red\ngreen\nblue"),
    "voc of Roboflow": (to_folders, None, ""),
    "coco of Roboflow": (to_roboflow, None, ""),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_boxes_of_the_json(squares, tmp_path, layout):
    write, file, text = LAYOUTS[layout]
    root = tmp_path / "other"
    write(squares, root)
    if file is not None:
        (root / file).write_text(text)
    expected, found = load(squares), load(root)
    assert set(found.train.classes) == set(NAMES)
    if "voc" not in layout or file:
        assert found.train.classes == NAMES
    for split in ("train", "test"):
        assert_equal(getattr(found, split), getattr(expected, split))
    image, target = found.train.read(0)
    assert image.shape[1:] == found.train.images[0].size
    assert len(target["boxes"]) == 2
    # The chosen images, and the kind by name.
    kind = layout.partition(",")[0].partition(" ")[0]
    assert len(load(root, train_limit=3, kind=kind).train) == 3


def one_yolo(tmp_path, lines, size=(200, 100)):
    """One image of 200 by 100 pixels in both splits."""
    for split in ("train", "val"):
        for folder in ("images", "labels"):
            (tmp_path / folder / split).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((*size[::-1], 3), np.uint8)).save(tmp_path / "images" / split / "a.png")
        if lines is not None:
            (tmp_path / "labels" / split / "a.txt").write_text(lines)
    (tmp_path / "data.yaml").write_text("names:\n  0: cat\n  1: dog\ntrain: images/train\nval: images/val\n")
    return tmp_path


def test_a_line_of_yolo_by_hand(tmp_path):
    # The middle at (100, 25), 40 wide, 10 high; a triangle with corners (20, 10), (60, 10), (20, 90).
    root = one_yolo(tmp_path, "1 0.5 0.25 0.2 0.1\n\n0 0.1 0.1 0.3 0.1 0.1 0.9\n")
    splits = load(root)
    record = splits.train.images[0]
    assert splits.train.classes == ("cat", "dog")
    assert record.labels.tolist() == [2, 1]
    assert record.boxes.tolist() == pytest.approx(torch.tensor([[80.0, 20, 120, 30], [20, 10, 60, 90]]))
    truth = splits.test.ground_truth["annotations"]
    assert truth[0]["area"] == pytest.approx(400)
    (tmp_path / "labels/train/a.txt").write_text("0 0.1 0.1 0.3 0.1 0.1 0.9\n")
    (tmp_path / "labels/val/a.txt").write_text("0 0.1 0.1 0.3 0.1 0.1 0.9\n")
    mask = load(root, masks=True).train.read(0)[1]["masks"][0]
    assert mask[20, 25]
    assert not mask[80, 55]
    assert int(mask.sum()) == pytest.approx(40 * 80 / 2, rel=0.05)


def test_an_image_of_yolo_without_labels_has_no_object(tmp_path):
    root = one_yolo(tmp_path, "1 0.5 0.25 0.2 0.1")
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "images/train/b.png")
    assert len(load(root).train) == 1
    assert [len(r.labels) for r in load(root, keep_empty=True).train.images] == [1, 0]


def test_an_image_on_its_side(tmp_path):
    root = one_yolo(tmp_path, "0 0.5 0.5 1 0.5")
    for split in ("train", "val"):
        (root / "images" / split / "a.png").unlink()
        tag = Image.Exif()
        tag[0x0112] = 6  # turned by a quarter: stored 200 by 100, seen 100 by 200
        Image.fromarray(np.zeros((100, 200, 3), np.uint8)).save(
            root / "images" / split / "a.jpg", exif=tag.tobytes()
        )
    images = load(root).train
    assert images.images[0].size == (200, 100)
    assert images.read(0)[0].shape == (3, 200, 100)
    assert images.images[0].boxes.tolist() == [[0, 50, 100, 150]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 0.5 0.5 0.1 0.1", r"a\.txt, line 2: class 2; allowed: 0 to 1 \(0 cat, 1 dog\)"),
        ("0 0.5 0.5 0.1", r"line 2: 4 numbers; allowed: class x y width height"),
        ("0 100 20 40 10", "fractions of the image"),
        ("cat 0.5 0.5 0.1 0.1", "need numbers"),
    ],
)
def test_lines_of_yolo_that_are_refused(tmp_path, line, message):
    root = one_yolo(tmp_path, f"0 0.5 0.5 0.1 0.1\n{line}\n")
    with pytest.raises(DataError, match=message):
        load(root)


def test_descriptions_of_yolo_that_are_refused(tmp_path):
    root = one_yolo(tmp_path, None)
    with pytest.raises(DataError, match=r"has 1 images and no labels: no .*labels/train/a\.txt"):
        load(root)
    for text, message in {
        "names: [cat, cat]": "need a list of different names",
        "names: [cat]\nnc: 2": "nc: got 2; names has 1",
        "names: {1: cat}": "need a list of different names",
        "names: [cat]\ntrain: photographs": "has no images for train: there is no .*photographs",
        "names: [": "cannot be read as YAML",
        "- cat": "got list, need names",
    }.items():
        (root / "data.yaml").write_text(text)
        with pytest.raises(DataError, match=message):
            load(root)


def test_a_list_of_images_and_another_test_set(squares, tmp_path):
    root = tmp_path / "yolo"
    to_yolo(squares, root)
    names = sorted((root / "images/train").iterdir())
    (root / "some.txt").write_text("\n".join(f"images/train/{path.name}" for path in names[:3]))
    (root / "data.yaml").write_text("names: [red, green, blue]\ntrain: some.txt\nval: [images/val]\n")
    assert len(load(root).train) == 3
    assert len(load_split(DetectionDataConfig(root=root, test_images="images/train"), "test")) == 8


# VOC


def one_voc(tmp_path, objects, size="<size><width>20</width><height>10</height></size>"):
    for split in ("train", "val"):
        (tmp_path / split).mkdir(exist_ok=True)
        Image.fromarray(np.zeros((10, 20, 3), np.uint8)).save(tmp_path / split / "a.jpg")
        text = f"<annotation><filename>a.jpg</filename>{size}{objects}</annotation>"
        (tmp_path / split / "a.xml").write_text(text)
    return tmp_path


def voc_object(name, *corners, more=""):
    keys = ("xmin", "ymin", "xmax", "ymax")
    box = "".join(f"<{key}>{value}</{key}>" for key, value in zip(keys, corners, strict=True))
    return f"<object><name>{name}</name>{more}<bndbox>{box}</bndbox></object>"


def test_an_object_of_voc_by_hand(tmp_path):
    """Pixels 3 to 12 of a row are ten; a difficult object is neither learned nor expected."""
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    objects = voc_object("dog", 3, 1, 12, 10, more=part)
    objects += voc_object("cat", 1, 1, 5, 5, more="<difficult>1</difficult>")
    for size in ("<size><width>20</width><height>10</height></size>", "<size><width>0</width></size>"):
        splits = load(one_voc(tmp_path, objects, size))
        record = splits.train.images[0]
        assert splits.train.classes == ("cat", "dog")
        assert record.size == (10, 20)
        assert record.boxes.tolist() == [[2, 0, 12, 10]]
        assert record.labels.tolist() == [2]
        assert [a["iscrowd"] for a in splits.test.ground_truth["annotations"]] == [0, 1]


def test_files_of_voc_that_are_refused(squares, tmp_path):
    root = tmp_path / "one"
    root.mkdir()
    with pytest.raises(DataError, match="object 1 needs a name and a bndbox"):
        load(one_voc(root, voc_object("dog", 1, 1, "x", 4)))
    one_voc(root, voc_object("dog", 1, 1, 9, 9))
    (root / "classes.txt").write_text("cat\n")
    with pytest.raises(DataError, match=r"a\.xml: object 'dog'; allowed: cat"):
        load(root)
    (root / "classes.txt").unlink()
    (root / "train/a.jpg").unlink()
    with pytest.raises(DataError, match=r"no image a\.jpg in train, JPEGImages, images of"):
        load(root)
    (root / "train/a.xml").write_text("<annotation>")
    with pytest.raises(DataError, match="cannot be read as XML"):
        load(root)
    lists = tmp_path / "lists"
    to_voc(squares, lists)
    (lists / "ImageSets/Main/train.txt").write_text("nothing\n")
    with pytest.raises(DataError, match=r"1 of 1 files that .* lists are not in .*: nothing\.xml"):
        load(lists)
    (lists / "ImageSets/Main/train.txt").unlink()
    with pytest.raises(DataError, match=r"no VOC images for train: in ImageSets/Main no train\.txt with val"):
        load(lists)


def test_lists_of_voc_by_name(squares, tmp_path):
    to_voc(squares, tmp_path / "voc")
    lists = tmp_path / "voc/ImageSets/Main"
    (lists / "train.txt").rename(lists / "trainval.txt")
    (lists / "val.txt").rename(lists / "test.txt")
    assert [len(load(tmp_path / "voc").train), len(load(tmp_path / "voc").test)] == [8, 4]
    other = DetectionDataConfig(root=tmp_path / "voc", test_annotations="ImageSets/Main/trainval.txt")
    assert len(load_split(other, "test")) == 8


# All of them


def test_unreadable_images_are_left_out_if_asked(squares, tmp_path):
    to_yolo(squares, tmp_path / "yolo")
    (tmp_path / "yolo/classes.txt").write_text("red\ngreen\nblue\n")
    to_voc(squares, tmp_path / "voc")
    first = sorted((tmp_path / "yolo/images/train").iterdir())[0]
    first.write_bytes(b"no image")
    (tmp_path / "voc/JPEGImages" / first.name).unlink()
    for kind, message in (("yolo", "cannot be read"), ("voc", "no image")):
        with pytest.raises(DataError, match=message):
            load(tmp_path / kind)
        with pytest.warns(UserWarning, match=f"left out 1 images: .*{message}"):
            assert len(load(tmp_path / kind, on_error="skip").train) == 7


def test_roboflow_s_own_test_set(squares, tmp_path):
    to_roboflow(squares, tmp_path / "set")
    shutil.copytree(tmp_path / "set/train", tmp_path / "set/test")
    fields = {"root": tmp_path / "set", "test_annotations": "test/_annotations.coco.json"}
    assert len(load_split(DetectionDataConfig(**fields), "test")) == 8
    assert len(load(tmp_path / "set").test) == 4


def test_a_folder_without_any_layout(tmp_path):
    with pytest.raises(DataError) as caught:
        load(tmp_path)
    for name in (
        "instances_train.json",
        "train/_annotations.coco.json",
        "data.yaml",
        "classes.txt",
        "Annotations",
    ):
        assert name in str(caught.value)
    write_set(tmp_path, 2)
    with pytest.raises(
        DataError, match=r"has no annotations/instances_val2017\.json and no instances_val\.json"
    ):
        load(tmp_path)


def to_json(coco, root):
    shutil.copytree(coco / "images", root / "images")
    for file in SPLITS.values():
        shutil.copy(coco / file, root)


def flat(root, layout, squares):
    """One set without a split, as published on the web: other case, no lists."""
    {"yolo": to_yolo, "voc": to_voc, "json": to_json}[layout](squares, root)
    if layout == "yolo":
        for folder in ("images", "labels"):
            for file in (root / folder).rglob("*.*"):
                file.rename(root / folder / file.name)
            for inner in ("train", "val"):
                (root / folder / inner).rmdir()
        (root / "data.yaml").write_text("names: [red, green, blue]\n")
    elif layout == "voc":
        shutil.rmtree(root / "ImageSets")
        (root / "Annotations").rename(root / "annotations")
        (root / "JPEGImages").rename(root / "Images")
    else:
        (root / "instances_val.json").unlink()
        (root / "Annotations").mkdir()
        (root / "instances_train.json").rename(root / "Annotations" / "instances_default.json")
        (root / "images").rename(root / "IMAGES")


@pytest.mark.parametrize("layout", ["yolo", "voc", "json"])
def test_a_set_without_a_split_is_cut_by_image(squares, tmp_path, layout):
    root = tmp_path / "flat"
    flat(root, layout, squares)
    with pytest.raises(DataError, match=r"--data\.val-fraction 0\.2 splits"):
        load(root)
    splits, whole = load(root, val_fraction=0.25), 8 if layout == "json" else 12
    parts = [{image.path.name for image in images.images} for images in (splits.train, splits.test)]
    assert (len(parts[0] | parts[1]), parts[0] & parts[1]) == (whole, set())
    assert 1 <= len(parts[1]) <= whole // 2
    again = load(root, val_fraction=0.25)
    assert [{image.path.name for image in s.images} for s in (again.train, again.test)] == parts
    others = [load(root, val_fraction=0.25, seed=seed).test for seed in range(5)]
    assert len({frozenset(i.path.name for i in images.images) for images in others}) > 1


@pytest.mark.parametrize("layout", ["yolo", "voc", "json"])
def test_a_set_with_a_split_is_not_cut(squares, tmp_path, layout):
    root = tmp_path / "split"
    {"yolo": to_yolo, "voc": to_voc, "json": to_json}[layout](squares, root)
    (root / "classes.txt").write_text("red\ngreen\nblue\n")
    with pytest.raises(
        ConfigError, match=r"val_fraction: got 0\.25; .*split has \d test images of its own, such as"
    ):
        load(root, val_fraction=0.25)


def test_one_folder_for_both_splits_may_be_cut(squares, tmp_path):
    root = tmp_path / "flat"
    to_yolo(squares, root)
    (root / "data.yaml").write_text("train: images/train\nval: images/train\nnames: [red, green, blue]\n")
    with pytest.raises(DataError, match="test images are training images too"):
        load(root)
    assert [
        len(images) for images in vars(load(root, val_fraction=0.25)).values() if not isinstance(images, str)
    ] == [6, 2]


def test_the_cut_is_stratified_by_the_rarest_category(tmp_path):
    """One image in ten has the rare category, beside the common one."""

    def change(content):
        content["annotations"] = [
            {**a, "category_id": 9 if a["image_id"] % 100 == 0 and a["id"] % 2 else 2}
            for a in content["annotations"]
        ]

    write_set(tmp_path, 40, change=change)
    for seed in range(5):
        splits = load(tmp_path, val_fraction=0.25, seed=seed)
        rare = [sum(3 in image.labels for image in s.images) for s in (splits.train, splits.test)]
        assert (rare, len(splits.train), len(splits.test)) == ([3, 1], 30, 10)


def test_one_folder_for_both_splits_is_refused(squares, tmp_path):
    with pytest.raises(DataError, match=r"8 of 8 test images are training images too, such as instances_tr"):
        load(squares, test_annotations="instances_train.json")
    root = tmp_path / "flat"
    flat(root, "voc", squares)
    with pytest.raises(DataError, match="test images are training images too"):
        load(root, train_annotations="annotations", test_annotations="annotations")


def test_files_with_a_byte_order_mark(squares, tmp_path):
    for layout in (to_yolo, to_voc, to_json):
        root = tmp_path / layout.__name__
        layout(squares, root)
        (root / "classes.txt").write_text("\n".join(NAMES))
        for file in [f for f in root.rglob("*") if f.suffix in (".txt", ".yaml", ".json", ".names")]:
            file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
        assert_equal(load(root).train, load(squares).train)


def test_key_points_of_yolo_are_no_polygon(tmp_path):
    root = one_yolo(tmp_path, "0 0.5 0.5 0.2 0.4 0.1 0.1 0.9 0.9")
    with (root / "data.yaml").open("a") as file:
        file.write("\nkpt_shape: [2, 2]\n")
    assert load(root).train.images[0].boxes.tolist() == [[80, 30, 120, 70]]
