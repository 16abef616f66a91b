"""Masks of VOC, Cityscapes and COCO, random changes of image and mask, batches, and wrong data."""

import json
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from masked_squares import CLASSES, write_squares
from PIL import Image

from mdistiller.data.draws import Draws
from mdistiller.errors import ConfigError, DataError, UnknownNameError
from mdistiller.tasks.segmentation.config import (
    SegmentationAugmentConfig,
    SegmentationConfig,
    SegmentationDataConfig,
)
from mdistiller.tasks.segmentation.data import (
    CITYSCAPES_CLASSES,
    VOC_CLASSES,
    load_segmentation,
    load_split,
    palette,
)
from mdistiller.tasks.segmentation.loader import SegmentationLoader, change, class_ids, scaled
from mdistiller.training.distributed import World
from mdistiller.types import Batch

WHOLE = SegmentationAugmentConfig(crop=(40, 60), scale=(1.0, 1.0), flip=False)
GRAY = (124, 116, 104)


def config(root, **fields):
    return SegmentationDataConfig(root=root, **{"workers": 0} | fields)


def draws(index, seed=0):
    return Draws(seed, torch.tensor([index]))


# Layouts


def test_voc(squares):
    splits = load_segmentation(config(squares))
    assert splits.train.classes == CLASSES
    assert splits.description.endswith("8 training images, 4 test images, 3 classes")
    image, mask = splits.train.read(0)
    assert image.size == (72, 56)
    stored = np.array(Image.open(squares / "SegmentationClass" / "train0.png"))
    assert np.array_equal(mask, stored)
    assert set(np.unique(mask)) <= {0, 1, 2, 255}
    few = load_split(config(squares, train_limit=3), "train")
    assert len(few) == 3


def test_vocs_own_classes_and_another_list(tmp_path):
    write_squares(tmp_path, "trainaug", 2)
    (tmp_path / "classes.txt").unlink()
    found = load_split(config(tmp_path, train_split="trainaug"), "train")
    assert found.classes == VOC_CLASSES
    assert len(VOC_CLASSES) == 21
    with pytest.raises(DataError, match=r"no readable train.txt.*it has trainaug: .*--data.train-split"):
        load_split(config(tmp_path), "train")


@pytest.mark.parametrize("kind", ["labelIds", "labelTrainIds"])
def test_cityscapes(tmp_path, kind):
    folders = [tmp_path / part / "train" / "ulm" for part in ("leftImg8bit", "gtFine")]
    for folder in folders:
        folder.mkdir(parents=True)
    values = [7, 8, 33, 6, 255] if kind == "labelIds" else [0, 1, 18, 255, 255]
    Image.new("RGB", (5, 2)).save(folders[0] / "ulm_1_leftImg8bit.png")
    Image.fromarray(np.array([values, values], np.uint8)).save(folders[1] / f"ulm_1_gtFine_{kind}.png")
    found = load_split(config(tmp_path, kind="cityscapes"), "train")
    assert found.classes == CITYSCAPES_CLASSES
    assert found.read(0)[1][0].tolist() == [0, 1, 18, 255, 255]


def coco_set(folder):
    """Writes one image with a dog over a man, a crowd of men, and a car."""

    def box(x, y, w, h):
        return {"bbox": [x, y, w, h], "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]}

    mask = np.zeros((20, 30), np.uint8)
    mask[15:, 20:] = 1
    flat = mask.T.flatten()  # column by column, lengths of runs of 0 and 1 in turn
    starts = [0, *(np.flatnonzero(np.diff(flat)) + 1).tolist(), len(flat)]
    crowd = {"counts": [b - a for a, b in pairwise(starts)], "size": [20, 30]}
    objects = [
        {"id": 1, "image_id": 1, "category_id": 1, **box(2, 2, 8, 10)},
        {"id": 2, "image_id": 1, "category_id": 18, **box(6, 6, 8, 8)},
        {"id": 3, "image_id": 1, "category_id": 3, **box(20, 0, 6, 6)},
        {
            "id": 4,
            "image_id": 1,
            "category_id": 1,
            "iscrowd": 1,
            "bbox": [20, 15, 10, 5],
            "segmentation": crowd,
        },
    ]
    names = {1: ("person", "person"), 3: ("car", "vehicle"), 18: ("dog", "animal")}
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 30, "height": 20}],
        "annotations": objects,
        "categories": [{"id": i, "name": n, "supercategory": s} for i, (n, s) in names.items()],
    }
    (folder / "images").mkdir()
    Image.new("RGB", (30, 20)).save(folder / "images" / "a.png")
    for split in ("train", "val"):
        (folder / f"instances_{split}.json").write_text(json.dumps(content))


def test_coco_objects_are_drawn(tmp_path):
    coco_set(tmp_path)
    found = load_split(config(tmp_path, kind="coco", classes=("person", "animal")), "train")
    assert found.classes == ("background", "person", "animal")
    _, mask = found.read(0)
    expected = np.zeros((20, 30), np.uint8)
    expected[2:12, 2:10] = 1
    expected[6:14, 6:14] = 2
    expected[6:12, 6:10] = 255  # a person and an animal
    expected[15:, 20:] = 255  # the crowd
    assert np.array_equal(mask, expected)
    every = load_split(config(tmp_path, kind="coco"), "test")
    assert every.classes == ("background", "person", "car", "dog")
    assert (every.read(0)[1][:6, 20:26] == 2).all()
    with pytest.raises(UnknownNameError, match="'animals'; nearest: animal"):
        load_split(config(tmp_path, kind="coco", classes=("animals",)), "train")


def test_real_objects(shared):
    root = shared / "data" / "coco-mini"
    if not root.is_dir():
        pytest.skip("no data set in ../shared/data/coco-mini")
    with pytest.warns(UserWarning, match="left out .* test images with objects without a mask"):
        found = load_split(config(root, kind="coco", classes=("person",), test_limit=12), "test")
    counts = [np.bincount(found.read(i)[1].flatten(), minlength=256) for i in range(len(found))]
    total = np.sum(counts, 0)
    assert total[1] > 0
    assert total[2:255].sum() == 0


def test_classes_that_do_not_fit(squares, tmp_path):
    with pytest.raises(ConfigError, match="two classes have the name 'red'"):
        load_split(config(squares, classes=("red", "red", "blue")), "train")
    with pytest.raises(ConfigError, match="got 1 classes; allowed are 2 to 255"):
        load_split(config(squares, classes=("red",)), "train")
    with pytest.raises(ValueError, match="Cityscapes has its own 19"):
        config(tmp_path, kind="cityscapes", classes=("road",))


# Random changes


def test_a_crop_of_the_whole_scale_is_a_part_of_the_image(squares):
    image, mask = load_split(config(squares), "train").read(1)
    pixels, labels = change(image, mask, WHOLE, draws(3), GRAY)
    whole = np.array(image)
    places = [
        (y, x)
        for y in range(17)
        for x in range(13)
        if np.array_equal(whole[y : y + 40, x : x + 60], pixels.permute(1, 2, 0).numpy())
    ]
    assert len(places) == 1
    y, x = places[0]
    assert np.array_equal(mask[y : y + 40, x : x + 60], labels.numpy())
    mirrored = WHOLE.replace(flip=True)
    both = [change(image, mask, mirrored, draws(3, seed), GRAY)[1] for seed in range(12)]
    plain = [change(image, mask, WHOLE, draws(3, seed), GRAY)[1] for seed in range(12)]
    is_flipped = [not torch.equal(a, b) for a, b in zip(both, plain, strict=True)]
    assert 0 < sum(is_flipped) < 12
    assert all(torch.equal(a.flip(1), b) for a, b, f in zip(both, plain, is_flipped, strict=True) if f)


def test_image_and_mask_stay_together_at_any_scale():
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 24:40] = 1
    image = Image.fromarray(np.repeat(mask[:, :, None] * 255, 3, 2))
    setting = SegmentationAugmentConfig(crop=(48, 48), scale=(0.5, 2.0))
    for index in range(20):
        pixels, labels = change(image, mask, setting, draws(index), (0, 0, 0))
        known = labels != 255
        agree = (pixels[0] > 127) == (labels == 1)
        assert agree[known].float().mean() > 0.97


def test_a_smaller_image_is_padded_with_ignored_pixels():
    image, mask = Image.new("RGB", (10, 8), (9, 9, 9)), np.ones((8, 10), np.uint8)
    pixels, labels = change(image, mask, WHOLE, draws(0), GRAY)
    assert labels[:8, :10].eq(1).all()
    assert labels.eq(255).sum() == 40 * 60 - 80
    assert pixels[:, 20, 20].tolist() == list(GRAY)
    assert scaled(image, 4).size == (5, 4)
    assert class_ids(labels)[-1, -1] == -100


def test_batches_are_the_same_from_any_step_and_for_any_workers(squares):
    images = load_split(config(squares), "train")
    setting = SegmentationAugmentConfig(crop=(32, 40))

    def batches(epoch, first=0, workers=0, rank=0, world_size=1):
        own = SegmentationConfig(
            student="fcn_resnet18",
            method="none",
            data=config(squares, workers=workers),
            augment=setting,
            seed=5,
            batch_size=4 * world_size,
        )
        world = World(torch.device("cpu"), rank, world_size)
        loader = SegmentationLoader(images, own, world, training=True)
        return list(loader.epoch(epoch, first))

    one, two = batches(1)
    assert one.image.shape == (4, 3, 32, 40)
    assert one.label.dtype == torch.int64
    (again,) = batches(1, first=1)
    assert all(map(torch.equal, two[:3], again[:3]))
    for a, b in zip((one, two), batches(1, workers=1), strict=True):
        assert all(map(torch.equal, a[:3], b[:3]))
    assert not torch.equal(one.image, batches(2)[0].image)
    # An image has its own draws, whatever its batch: also among several processes.
    halves = [batches(1, rank=rank, world_size=2)[0] for rank in (0, 1)]
    whole = {int(i): (x, y) for x, y, i in zip(*Batch.join([one, two])[:3], strict=True)}
    for half in halves:
        for x, y, i in zip(*half[:3], strict=True):
            assert torch.equal(x, whole[int(i)][0])
            assert torch.equal(y, whole[int(i)][1])


def test_colors_are_vocs():
    assert palette(4).tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert palette(22)[[20, 21]].tolist() == [[0, 64, 128], [128, 64, 128]]
    assert len({tuple(c) for c in palette(256)}) == 256


# Wrong data


def test_an_image_without_a_mask(tmp_path):
    write_squares(tmp_path, "train", 3)
    (tmp_path / "SegmentationClass" / "train1.png").unlink()
    with pytest.raises(
        DataError, match=r"1 of 3 images have no mask in .*: train1.png.*--data.on-error skip"
    ):
        load_split(config(tmp_path), "train")
    with pytest.warns(UserWarning, match="left out: 1 of 3 images have no mask"):
        assert len(load_split(config(tmp_path, on_error="skip"), "train")) == 2


def test_a_missing_image_and_a_missing_list(tmp_path):
    write_squares(tmp_path, "train", 2)
    (tmp_path / "JPEGImages" / "train0.png").unlink()
    with pytest.raises(DataError, match=r"1 of 2 images are not in .*JPEGImages: train0.jpg"):
        load_split(config(tmp_path), "train")
    with pytest.raises(DataError, match=r"no image CITY/\*_leftImg8bit.png"):
        load_split(config(tmp_path, kind="cityscapes"), "train")


def rewrite(path, change):
    mask = np.array(Image.open(path))
    Image.fromarray(change(mask)).save(path)


def test_masks_that_are_wrong(tmp_path):
    write_squares(tmp_path, "train", 4)
    folder = tmp_path / "SegmentationClass"
    rewrite(folder / "train0.png", lambda mask: np.where(mask == 1, 9, mask).astype(np.uint8))
    rewrite(folder / "train1.png", lambda mask: mask[1:])
    rewrite(folder / "train2.png", lambda mask: np.repeat(mask[:, :, None], 3, 2))
    (folder / "train3.png").write_bytes(b"no image")
    found = load_split(config(tmp_path), "train")
    errors = (
        r"train0.png: a pixel has the value 9; allowed are the classes 0 to 2, and 255.*classes.txt",
        "train1.png has 72 x 55 pixels; its image has 72 x 56",
        r"train2.png has the mode RGB; allowed are palette \(P\) and 8-bit gray",
        "train3.png cannot be read",
    )
    for i, text in enumerate(errors):
        with pytest.raises(DataError, match=text):
            found.read(i)
    rewrite(folder / "train0.png", lambda mask: np.where(mask == 255, 2, mask).astype(np.uint8))
    ignored = load_split(config(tmp_path, ignore_index=9), "train").read(0)[1]
    assert set(np.unique(ignored)) == {0, 2, 255}


def paired(squares, root, *inner):
    for old, new in (("JPEGImages", "images"), ("SegmentationClass", "Masks")):
        for file in (squares / old).iterdir():
            part = ("val" if file.name.startswith("val") else "train") if inner else ""
            (root / new / part).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, root / new / part / file.name)
    shutil.copy(squares / "classes.txt", root)


def test_masks_are_found_by_the_names_of_files(squares, tmp_path):
    given = load_segmentation(SegmentationDataConfig(root=squares))
    paired(squares, tmp_path / "split", "train", "val")
    found = load_segmentation(SegmentationDataConfig(root=tmp_path / "split"))
    for ours, theirs in ((found.train, given.train), (found.test, given.test)):
        masks = {theirs.images[i].name: theirs.read(i)[1] for i in range(len(theirs))}
        assert sorted(ours.images[i].name for i in range(len(ours))) == sorted(masks)
        assert all(np.array_equal(ours.read(i)[1], masks[ours.images[i].name]) for i in range(len(ours)))
    root = tmp_path / "flat"
    paired(squares, root)
    with pytest.raises(DataError, match=r"no folder train for train; --data\.val-fraction 0\.2"):
        load_segmentation(SegmentationDataConfig(root=root))
    with pytest.raises(
        ConfigError, match=r"val_fraction: got 0\.25; .*split has 4 test images of its own, such as"
    ):
        load_segmentation(SegmentationDataConfig(root=tmp_path / "split", val_fraction=0.25))
    cut = load_segmentation(SegmentationDataConfig(root=root, val_fraction=0.25))
    names = [{images.images[i].name for i in range(len(images))} for images in (cut.train, cut.test)]
    assert (len(names[0]), len(names[1]), names[0] & names[1]) == (9, 3, set())
    masks = {file.stem: cut.train.read(i)[1] for i, file in enumerate(cut.train.images)}
    for file in (root / "Masks").iterdir():
        file.rename(file.with_name(f"{file.stem}_L.png"))
    again = load_segmentation(SegmentationDataConfig(root=root, val_fraction=0.25)).train
    assert all(np.array_equal(again.read(i)[1], masks[again.images[i].stem]) for i in range(9))
    file = min((root / "Masks").iterdir())
    file.rename(file.with_name("other.png"))
    with pytest.raises(
        DataError, match=r"1 of 12 images have no mask in .*, where these are missing: train0.png"
    ):
        load_segmentation(SegmentationDataConfig(root=root, val_fraction=0.25))
    with pytest.raises(DataError, match="8 of 8 test images are training images too"):
        load_segmentation(SegmentationDataConfig(root=squares, test_split="train"))


def test_masks_of_one_name_in_several_folders(tmp_path):
    for number, place in enumerate(("train/a", "train/b", "val/c")):
        for part, mode in (("images", "RGB"), ("masks", "L")):
            (tmp_path / part / place).mkdir(parents=True)
            pixels = np.full((8, 8) if mode == "L" else (8, 8, 3), number, np.uint8)
            Image.fromarray(pixels).save(tmp_path / part / place / "1.png")
    found = load_segmentation(SegmentationDataConfig(root=tmp_path))
    own = [found.train.read(i) for i in range(2)]
    assert [(np.max(image), np.max(mask)) for image, mask in own] == [(0, 0), (1, 1)]


@pytest.mark.parametrize("size", [(8, 8), (8, 12)])
def test_a_photograph_is_turned_as_its_mask(tmp_path, size):
    """A camera stores it on its side; its mask is upright or, if only that fits, as stored."""
    exif = Image.Exif()
    exif[0x0112] = 6  # seen after a quarter turn to the right
    seen = np.zeros((*size, 3), np.uint8)
    seen[0] = 255
    mask = (seen[..., 0] > 0).astype(np.uint8)
    stored = np.rot90(seen)
    for split, drawn in (("train", mask), ("val", mask if size[0] == size[1] else np.rot90(mask))):
        for part, pixels in (("images", stored), ("masks", drawn)):
            (tmp_path / part / split).mkdir(parents=True)
            file = tmp_path / part / split / "a.png"
            Image.fromarray(np.ascontiguousarray(pixels)).save(file, exif=exif if part == "images" else None)
    found = load_segmentation(SegmentationDataConfig(root=tmp_path))
    for images in (found.train, found.test):
        image, drawn = images.read(0)
        np.testing.assert_array_equal(np.asarray(image)[..., 0] > 0, drawn == 1)


@pytest.mark.parametrize(("split", "value"), [("train", 255), ("train", 1), ("val", 255)])
def test_masks_without_classes_to_tell_apart(tmp_path, split, value):
    """As of drawings in black and white, whose 255 is the ignored value."""
    write_squares(tmp_path, "train", 2)
    write_squares(tmp_path, "val", 2, seed=1)
    for file in (tmp_path / "SegmentationClass").glob(f"{split}*"):
        rewrite(file, lambda mask: np.full_like(mask, value))
    has = "red alone" if value == 1 else "no class"
    with pytest.raises(
        DataError, match=rf"the (training|test) images have {has}; .* 255 is ignored: --data.ignore"
    ):
        load_segmentation(config(tmp_path))
