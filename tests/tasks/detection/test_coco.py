"""COCO-format data: what is read, what is left out, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from pycocotools.coco import COCO
from tiny_detectors import CPU, loader, read_coco, write_set
from torchvision import tv_tensors
from torchvision.transforms import v2

from mdistiller.errors import DataError
from mdistiller.tasks.detection.coco import train_transform
from mdistiller.tasks.detection.config import DetectionAugmentConfig, DetectionDataConfig
from mdistiller.tasks.detection.layouts import load_detection
from mdistiller.training.distributed import World

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"


def real(name):
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"no data set in ../shared/data/{name}")
    return folder


def augment(short_sides, long_side, **options):
    return DetectionAugmentConfig(short_sides=short_sides, long_side=long_side, **options)


def read(tmp_path, change, **options):
    file = write_set(tmp_path, 3, change=change)
    return read_coco(file, tmp_path / "images", **options)


def test_boxes_labels_and_masks(tmp_path):
    images = read(tmp_path, None, masks=True)
    image, target = images.read(0)
    raw = json.loads((tmp_path / "instances_train.json").read_text())["annotations"][:2]
    assert images.num_classes == 4
    assert images.categories == ((1, 2, "red"), (2, 5, "green"), (3, 9, "blue"))
    assert target["labels"].tolist() == [{2: 1, 5: 2, 9: 3}[a["category_id"]] for a in raw]
    for box, mask, annotation in zip(target["boxes"].tolist(), target["masks"], raw, strict=True):
        x, y, w, h = annotation["bbox"]
        assert box == [x, y, x + w, y + h]
        assert mask[y : y + h, x : x + w].all()
        assert mask.sum() == w * h
        if annotation is raw[1]:  # the other may lie under it
            color = {2: [220, 30, 30], 5: [30, 220, 30], 9: [30, 30, 220]}[annotation["category_id"]]
            assert image[:, y + h // 2, x + w // 2].tolist() == color


def test_masks_of_polygons_and_both_kinds_of_rle(tmp_path):
    def change(content):
        # 64 columns of 80 pixels, in column order: the first 10 columns.
        content["annotations"][0]["segmentation"] = {"size": [80, 64], "counts": [0, 800, 4320]}
        coco = COCO()
        coco.dataset = {"images": content["images"], "annotations": content["annotations"], "categories": []}
        coco.createIndex()
        rle = coco.annToRLE(content["annotations"][1])
        content["annotations"][1]["segmentation"] = {"size": [80, 64], "counts": rle["counts"].decode()}

    polygons = read(tmp_path, None, masks=True).read(0)[1]["masks"]
    masks = read(tmp_path, change, masks=True).read(0)[1]["masks"]
    assert masks[0, :, :10].all()
    assert masks[0].sum() == 800
    assert torch.equal(masks[1], polygons[1])


def test_crowds_are_no_objects_to_learn_but_stay_in_the_ground_truth(tmp_path):
    images = read(tmp_path, lambda c: c["annotations"][0].update(iscrowd=1))
    assert len(images.images[0].labels) == 1
    assert len(images.ground_truth["annotations"]) == 6


@pytest.mark.parametrize("box", [[5, 5, 0, 9], [5, 5, 9, -1], [500, 5, 9, 9], [-20, 5, 20, 9]])
def test_boxes_without_an_area_in_the_image_are_left_out_and_counted(tmp_path, box):
    with pytest.warns(UserWarning, match="left out 1 boxes without an area"):
        images = read(tmp_path, lambda c: c["annotations"][0].update(bbox=box))
    assert len(images.images[0].labels) == 1
    assert len(images.ground_truth["annotations"]) == 5


def test_boxes_are_clipped_to_the_image(tmp_path):
    images = read(tmp_path, lambda c: c["annotations"][0].update(bbox=[-5, -5, 500, 20]))
    assert images.images[0].boxes[0].tolist() == [0, 0, 64, 15]


def test_images_without_objects(tmp_path):
    def change(content):
        content["annotations"] = [a for a in content["annotations"] if a["image_id"]]

    images = read(tmp_path, change, masks=True)
    assert len(images) == 3
    _, target = images.read(0)
    assert target["boxes"].shape == (0, 4)
    assert target["masks"].shape == (0, 80, 64)
    assert len(read(tmp_path, change, keep_empty=False)) == 2
    with pytest.raises(DataError, match="no image with an object"):
        read(tmp_path, lambda c: c.update(annotations=[]), keep_empty=False)


def test_images_with_objects_without_a_mask(tmp_path):
    with pytest.warns(UserWarning, match="left out 1 images with objects without a mask"):
        images = read(tmp_path, lambda c: c["annotations"][0].pop("segmentation"), masks=True)
    assert [image.id for image in images.images] == [10, 20]
    every = read(tmp_path, lambda c: c["annotations"][0].pop("segmentation"), masks=True, keep_unmasked=True)
    assert [image.id for image in every.images] == [0, 10, 20]
    assert "masks" not in every.read(0)[1]
    assert len(every.read(1)[1]["masks"]) == 2


def test_missing_files(tmp_path):
    file = write_set(tmp_path, 3)
    (tmp_path / "images" / "instances_tr1.png").unlink()
    with pytest.raises(DataError, match=r"1 of 3 images are not in .*images: instances_tr1.png"):
        read_coco(file, tmp_path / "images")
    with pytest.warns(UserWarning, match="1 of 3 images"):
        assert len(read_coco(file, tmp_path / "images", on_error="skip")) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"][0].update(category_id=7), r"annotation 1 has category 7.*2 red"),
        (lambda c: c["annotations"][0].update(image_id=7), "annotation 1 is of image 7"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), "need four finite numbers"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3, float("nan")]), "need four finite numbers"),
        (lambda c: c["annotations"][0].update(bbox="all"), r"annotations\[0\].bbox: got 'all'"),
        (lambda c: c["images"][1].pop("width"), r"images\[1\].width: got None"),
        (lambda c: c["images"][1].update(id=0), "two images have one id"),
        (lambda c: c["categories"][1].update(id=2), "two categories have one id"),
        (lambda c: c.pop("categories"), 'no list "categories"'),
    ],
)
def test_what_is_refused(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, change)


def test_a_file_that_is_no_json(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(DataError, match=r"a\.json cannot be read as JSON"):
        read_coco(tmp_path / "a.json", tmp_path)


def test_an_image_of_another_size_than_its_annotations_say(tmp_path):
    images = read(tmp_path, lambda c: c["images"][0].update(width=99))
    with pytest.raises(DataError, match="64 x 80 pixels; its annotations have 99 x 80"):
        images.read(0)


def test_resize_and_flip_move_boxes_and_masks_with_the_image():
    # A white rectangle on black: wherever it goes, box, mask and pixels must agree.
    image = torch.zeros(3, 60, 90, dtype=torch.uint8)
    image[:, 10:40, 20:50] = 255
    flipped = 0
    for seed in range(8):
        torch.manual_seed(seed)
        target = {
            "boxes": tv_tensors.BoundingBoxes([[20.0, 10, 50, 40]], format="XYXY", canvas_size=(60, 90)),
            "labels": torch.tensor([1]),
            "masks": tv_tensors.Mask(image[:1] // 255),
        }
        out, moved = train_transform(augment((40, 120), 150))(tv_tensors.Image(image), target)
        height, width = out.shape[1:]
        assert (height, width) in ((40, 60), (100, 150))  # the long side caps 120 x 180
        scale = height / 60
        x1, y1, x2, y2 = moved["boxes"][0].tolist()
        assert (y1, y2) == pytest.approx((10 * scale, 40 * scale))
        assert x1 == pytest.approx(20 * scale) or x1 == pytest.approx(40 * scale)
        flipped += x1 == pytest.approx(40 * scale)
        inside = torch.zeros(height, width, dtype=torch.bool)
        inside[round(y1) : round(y2), round(x1) : round(x2)] = True
        assert ((out[0] > 127) ^ inside).float().mean() < 0.02
        assert ((moved["masks"][0] > 0) ^ inside).float().mean() < 0.02
    assert 0 < flipped < 8


def test_objects_of_less_than_a_pixel_are_left_out_after_scaling():
    image = tv_tensors.Image(torch.zeros(3, 100, 100, dtype=torch.uint8))
    boxes = tv_tensors.BoundingBoxes(
        [[0.0, 0, 5, 5], [10, 10, 90, 90]], format="XYXY", canvas_size=(100, 100)
    )
    target = {"boxes": boxes, "labels": torch.tensor([1, 2])}
    _, moved = train_transform(augment((10,), 10, flip=False))(image, target)
    assert moved["labels"].tolist() == [2]
    assert isinstance(moved["boxes"], tv_tensors.BoundingBoxes)
    assert v2.functional.get_size(moved["boxes"]) == [10, 10]


def epochs(splits, workers=0, seed=3, numbers=(0,), **options):
    sizes = {"short_sides": (48, 64, 80), "long_side": 200}
    own = loader(splits.train, 3, training=True, seed=seed, workers=workers, **sizes, **options)
    return [(b.index.tolist(), b.image, b.target) for n in numbers for b in own.epoch(n)]


def same(first, second):
    return all(
        i == k
        and all(map(torch.equal, a, b))
        and all(torch.equal(x["boxes"], y["boxes"]) for x, y in zip(t, u, strict=True))
        for (i, a, t), (k, b, u) in zip(first, second, strict=True)
        if [x.shape for x in a] == [x.shape for x in b] or pytest.fail("shapes differ")
    )


def test_batches_depend_on_seed_and_epoch_alone(squares):
    splits = load_detection(DetectionDataConfig(root=squares))
    first = epochs(splits, numbers=(0, 1))
    torch.rand(7)
    assert same(first, epochs(splits, workers=1, numbers=(0, 1)))
    assert [i for i, *_ in first[:3]] != [i for i, *_ in first[3:]]
    index, images, targets = first[0]
    assert len(index) == len(images) == len(targets) == 3
    assert all(image.dtype == torch.float32 and image.min() >= 0 and image.max() <= 1 for image in images)
    assert type(images[0]) is torch.Tensor
    assert type(targets[0]["boxes"]) is torch.Tensor
    assert sum(len(i) for i, *_ in first[:3]) == 8


def test_a_batch_splits_into_parts_of_its_images(squares):
    splits = load_detection(DetectionDataConfig(root=squares))
    batch = next(loader(splits.train, 5, training=True).epoch(0))
    for count, sizes in ((1, [5]), (2, [3, 2]), (4, [2, 2, 1]), (9, [1] * 5)):
        parts = batch.split(count)
        assert [len(part.index) for part in parts] == sizes
        assert torch.equal(torch.cat([part.index for part in parts]), batch.index)
        for field in ("image", "target"):
            joined = [value for part in parts for value in getattr(part, field)]
            assert all(a is b for a, b in zip(joined, getattr(batch, field), strict=True))


def test_drawing_a_batch_leaves_the_global_generator_alone(squares):
    splits = load_detection(DetectionDataConfig(root=squares))
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    epochs(splits)
    assert torch.equal(torch.rand(1), expected)


def test_two_processes_share_an_epoch(squares):
    splits = load_detection(DetectionDataConfig(root=squares))
    seen = [
        [i for index, *_ in epochs(splits, world=World(CPU.device, rank, 2)) for i in index]
        for rank in range(2)
    ]
    assert sorted(seen[0] + seen[1]) == list(range(8))


def test_an_unreadable_image(squares):
    bad = squares / "images" / "instances_tr2.png"
    bad.write_bytes(b"no image")
    splits = load_detection(DetectionDataConfig(root=squares))
    with pytest.raises(DataError, match=r"instances_tr2\.png cannot be read"):
        epochs(splits)
    splits = load_detection(DetectionDataConfig(root=squares, on_error="skip"))
    with pytest.warns(UserWarning, match="an epoch left out 1 image that cannot be read"):
        assert sum(len(i) for i, *_ in epochs(splits)) == 7


def test_splits_of_one_folder(squares):
    splits = load_detection(DetectionDataConfig(root=squares, train_limit=3))
    assert (len(splits.train), len(splits.test)) == (3, 4)
    assert splits.train.classes == ("red", "green", "blue")
    assert "3 training images with 6 objects, 4 test images, 3 categories" in splits.description

    def rename(content):
        content["categories"][0]["name"] = "rouge"

    write_set(squares, 4, "instances_val.json", change=rename)
    with pytest.raises(DataError, match="differ: only training has 2 red; only test has 2 rouge"):
        load_detection(DetectionDataConfig(root=squares))
    with pytest.raises(DataError, match=r"has no other\.json"):
        load_detection(DetectionDataConfig(root=squares, train_annotations="other.json"))
    with pytest.raises(
        DataError, match=r"has no annotations/instances_train2017\.json and no instances_train\.json"
    ):
        load_detection(DetectionDataConfig(root=squares / "images"))


def test_voc07_mini():
    splits = load_detection(DetectionDataConfig(root=real("voc07-mini")))
    assert (len(splits.train), len(splits.test), splits.train.num_classes) == (1600, 400, 21)
    for index in (0, 700):
        image, target = splits.train.read(index)
        assert max(image.shape[1:]) == 320
        assert len(target["boxes"]) == len(target["labels"]) > 0
        assert target["labels"].min() >= 1
        assert target["labels"].max() <= 20


def test_coco_mini_is_evaluated_whole_whichever_images_have_masks():
    splits = load_detection(DetectionDataConfig(root=real("coco-mini"), masks=True))
    assert len(splits.test) == 310
    assert sum(image.segmentations is None for image in splits.test.images) == 122
    assert not any(image.segmentations is None for image in splits.train.images)


def test_coco_mini_with_masks_against_pycocotools():
    folder = real("coco-mini")
    coco = COCO(str(folder / "instances_train.json"))
    images = read_coco(folder / "instances_train.json", folder / "images", masks=True)
    assert len(images.categories) == 80
    for index in range(0, len(images), 60):
        record = images.images[index]
        _, target = images.read(index)
        annotations = [a for a in coco.imgToAnns[record.id] if not a["iscrowd"]]
        assert len(target["masks"]) == len(annotations)
        for mask, annotation in zip(target["masks"], annotations, strict=True):
            assert np.array_equal(mask.numpy(), coco.annToMask(annotation))


@pytest.mark.parametrize("annotated", ["upright", "as stored"])
def test_images_are_turned_as_their_annotations_are(tmp_path, annotated):
    def turn(content):
        if annotated == "upright":
            content["images"][0].update(width=80, height=64)

    file = write_set(tmp_path, 3, change=turn)
    path = tmp_path / "images" / json.loads(file.read_text())["images"][0]["file_name"]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    with Image.open(path) as plain:
        plain.save(path, exif=exif)
    with Image.open(path) as stored:
        pixels = np.asarray(stored.convert("RGB"))
    image, _ = read_coco(file, tmp_path / "images").read(0)
    expected = np.rot90(pixels, -1) if annotated == "upright" else pixels
    assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_scale_jitter_moves_boxes_with_their_pixels():
    """A white rectangle on gray: the box is that of its pixels, and its side follows the factor."""
    image = torch.full((3, 60, 100), 128, dtype=torch.uint8)
    image[:, 20:40, 30:70] = 255
    change = train_transform(augment((32, 80), 200, scale_jitter=(0.5, 2.0)))
    widths = []
    torch.manual_seed(0)
    for _ in range(40):
        boxes = tv_tensors.BoundingBoxes([[30.0, 20, 70, 40]], format="XYXY", canvas_size=(60, 100))
        target = {"boxes": boxes, "labels": torch.tensor([1])}
        changed, found = change(tv_tensors.Image(image), target)
        assert changed.shape == (3, 80, 80)
        rows, columns = (changed[0] > 191).nonzero(as_tuple=True)
        if not len(found["boxes"]):
            assert len(rows) < 80
            continue
        drawn = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert found["boxes"][0].tolist() == pytest.approx([float(v) for v in drawn], abs=1.6)
        widths.append(float(found["boxes"][0, 2] - found["boxes"][0, 0]))
    # 40 of 100 pixels of a square of 80 are 32, times 0.5 to 2, cut at 80.
    assert 15 <= min(widths) < 20
    assert 50 < max(widths) <= 65


def test_factors_of_scale_jitter():
    assert DetectionAugmentConfig(scale_jitter=(0.5, 2)).scale_jitter == (0.5, 2.0)
    with pytest.raises(ValueError, match="two rising factors"):
        DetectionAugmentConfig(scale_jitter=(2, 0.5))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"size": [80, 64], "counts": [0, 20]}, "runs of 20 pixels; the image has 5120"),
        ({"size": [64, 80], "counts": [0, 5120]}, r"64 x 80 pixels.* 80 x 64"),
        ({"size": [80, 64], "counts": "zz%"}, "Invalid RLE"),
        ([["a"] * 6], "could not convert"),
    ],
)
def test_masks_that_cannot_be_decoded(tmp_path, mask, message):
    images = read(tmp_path, lambda c: c["annotations"][0].update(segmentation=mask), masks=True)
    with pytest.raises(DataError, match=message):
        images.read(0)


def test_fields_that_are_null_count_as_missing(tmp_path):
    images = read(tmp_path, lambda c: c["annotations"][0].update(iscrowd=None, area=None))
    found = images.ground_truth["annotations"][0]
    assert (found["iscrowd"], found["area"]) == (0, found["bbox"][2] * found["bbox"][3])
