from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torchvision import transforms

from mdistiller.data import DataConfig, load_data, make_loader
from mdistiller.data.dataset import StreamSet
from mdistiller.data.decoder import read_image
from mdistiller.errors import ConfigError, DataError

# Python 3.12 and later say so whenever a process with threads (torch's) forks a DataLoader's workers.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def write(path, seed=0, size=(40, 30), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


@pytest.fixture
def root(tmp_path):
    for c, name in enumerate(("bird", "ant", "cat")):
        for i in range(4):
            write(tmp_path / "train" / name / f"{i}.jpg", seed=10 * c + i, size=(30 + c, 40 - i))
        for i in range(2):
            write(tmp_path / "val" / name / f"{i}.png", seed=100 + 10 * c + i)
    return tmp_path


def config(root, **settings):
    return DataConfig(**{"kind": "folder", "root": root, "image_size": 24, **settings})


def test_classes_are_sorted_names(root):
    splits = load_data(config(root, memory="resident"))
    assert splits.classes == ("ant", "bird", "cat")
    assert splits.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert splits.train.images.shape == (12, 24, 24, 3)
    assert splits.test.images.shape == (6, 24, 24, 3)
    assert "12 training and 6 test images, 24x24, 3 classes" in splits.description


@pytest.mark.parametrize("resize", [None, 28])
def test_geometry_is_torchvisions_within_a_rounding_and_streaming_agrees(root, resize):
    resident = load_data(config(root, resize=resize, memory="resident"))
    stream = load_data(config(root, resize=resize, memory="stream"))
    assert isinstance(stream.test, StreamSet)
    theirs = transforms.Compose(
        [transforms.Resize(resize or 24), transforms.CenterCrop(24), transforms.PILToTensor()]
    )
    paths = sorted((root / "val").rglob("*.png"))
    for i, path in enumerate(paths):
        expected = theirs(Image.open(path)).permute(1, 2, 0)
        assert (resident.test.images[i].int() - expected.int()).abs().max() <= 1
        assert torch.equal(stream.test.read(i, seed=i), resident.test.images[i])
    batch = next(make_loader(stream.test, 6, device="cpu", shuffle=False, workers=2).epoch(0))
    assert torch.equal(batch.image, resident.test.images)


def test_streamed_training_crops_follow_the_epoch_alone(root):
    train = load_data(config(root, memory="stream")).train
    state = torch.get_rng_state()

    def images(epoch, **settings):
        batches = list(make_loader(train, 4, device="cpu", seed=1, **settings).epoch(epoch))
        index, image = torch.cat([b.index for b in batches]), torch.cat([b.image for b in batches])
        return dict(zip(index.tolist(), image, strict=True))

    alone, two, rank = images(0, workers=0), images(0, workers=2), images(0, workers=0, rank=1, world_size=2)
    other = images(1, workers=0)
    assert torch.equal(state, torch.get_rng_state())
    assert len(rank) == 6
    assert all(torch.equal(alone[i], two[i]) for i in range(12))
    assert all(torch.equal(alone[i], rank[i]) for i in rank)
    assert not any(torch.equal(alone[i], other[i]) for i in range(12))


def test_random_crops_are_distributed_as_torchvisions(root):
    # Each image is one color ramp, so that a crop's mean tells where it was cut.
    ramp = np.broadcast_to(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], (64, 64, 3))
    Image.fromarray(np.ascontiguousarray(ramp)).save(root / "train" / "ant" / "ramp.png")
    train = load_data(config(root, memory="stream")).train
    position = [path.name for path in train.samples].index("ramp.png")
    ours = [float(train.read(position, seed).float().mean()) for seed in range(400)]
    theirs = transforms.Compose([transforms.RandomResizedCrop(24), transforms.PILToTensor()])
    torch.manual_seed(0)
    image = read_image(train.samples[position])
    expected = [float(theirs(image).float().mean()) for _ in range(400)]
    assert ks_2samp(ours, expected).pvalue > 1e-3


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "LA", "1", "CMYK"])
def test_every_color_mode_becomes_rgb(tmp_path, mode):
    path = write(tmp_path / ("a.tiff" if mode == "CMYK" else "a.png"), mode=mode)
    image = read_image(path)
    assert image.mode == "RGB"
    assert image.size == (40, 30)
    if mode in ("L", "LA"):
        gray = np.asarray(Image.open(path).convert("L"))
        assert np.array_equal(np.asarray(image), np.repeat(gray[..., None], 3, 2))


def test_palette_with_transparency(tmp_path):
    path = write(tmp_path / "a.png", mode="P", transparency=bytes([0, 128]))
    assert read_image(path).mode == "RGB"


def test_sixteen_bit_gray_keeps_its_high_byte(tmp_path):
    pixels = np.arange(256 * 256, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png"))[..., 1], (pixels >> 8).astype(np.uint8))


def damage(path):
    """Cut the pixels short and leave the header whole."""
    path.write_bytes(path.read_bytes()[:-200])
    return path


@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_corrupt_image_is_named(root, memory):
    bad = damage(root / "train" / "bird" / "2.jpg")

    def read_all():
        splits = load_data(config(root, memory=memory))
        return list(make_loader(splits.train, 4, device="cpu").epoch(0))

    with pytest.raises(DataError, match=r"bird.2\.jpg cannot be read: OSError: image file is truncated"):
        read_all()
    bad.write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"bird.2\.jpg cannot be read"):
        read_all()


def test_skipping_resident(root):
    damage(root / "train" / "bird" / "2.jpg")
    (root / "train" / "cat" / "0.jpg").write_bytes(b"")
    with pytest.warns(
        UserWarning, match=r"left out: 2 of 12 images cannot be read: .*bird.2.jpg, .*cat.0.jpg"
    ):
        splits = load_data(config(root, on_error="skip", label_noise=0.5, memory="resident"))
    assert len(splits.train) == len(splits.train.images) == 10
    assert "5 training labels (50.0%)" in splits.description


def test_skipping_streamed(root):
    damage(root / "train" / "bird" / "2.jpg")  # seen only when it is read
    (root / "train" / "cat" / "0.jpg").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"left out: 1 of 12 images cannot be read: .*cat.0.jpg"):
        train = load_data(config(root, memory="stream", on_error="skip")).train
    assert len(train) == 11
    with pytest.warns(UserWarning, match="left out 1 image that"):
        batches = list(make_loader(train, 4, device="cpu", shuffle=False).epoch(0))
    assert [len(batch.label) for batch in batches] == [4, 3, 3]


def test_nothing_readable(root):
    for path in (root / "val").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="6 of 6 images cannot be read"):
        load_data(config(root, on_error="skip"))


def test_classes_that_differ_are_named(root):
    (root / "val" / "ant").rename(root / "val" / "ants")
    with pytest.raises(DataError, match=r"only in .*train: ant; only in .*val: ants"):
        load_data(config(root))


def test_class_without_images(root):
    for path in (root / "train" / "cat").iterdir():
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(DataError, match=r"no image in 1 of 3 class folders of .*train: cat"):
        load_data(config(root))


def test_hidden_and_other_files_are_passed_over(root):
    (root / "train" / ".DS_Store").write_bytes(b"x")
    (root / "train" / ".cache").mkdir()
    (root / "train" / "ant" / "._0.jpg").write_bytes(b"x")
    (root / "train" / "ant" / "notes.txt").write_bytes(b"x")
    write(root / "train" / "ant" / "below" / "5.JPEG")
    with pytest.warns(UserWarning, match=r"left out: 1 files in class folders \(1 \.txt\)"):
        assert len(load_data(config(root)).train) == 13


def test_test_folder_serves_when_there_is_no_val(root):
    (root / "val").rename(root / "test")
    assert len(load_data(config(root)).test) == 6


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda root: (root / "train").rename(root / "bird"),
            "class folders but no train/: --data.val-fraction",
        ),
        (
            lambda root: (root / "val").rename(root / "kept"),
            r"has train/ but no val or valid or .* or test: --data\.val-fraction 0\.1 .* \(folders there: k",
        ),
        (
            lambda root: root.rename(root.parent / "gone"),
            "data.root: .*is neither a folder nor a list; expected ROOT/train/CLASS",
        ),
    ],
)
def test_other_layouts_are_explained(root, spoil, message):
    spoil(root)
    with pytest.raises(DataError, match=message):
        load_data(config(root))


def test_empty_folders(tmp_path):
    with pytest.raises(DataError, match=r"has no train/ \(folders there: none\)"):
        load_data(config(tmp_path))
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match="has no class folders"):
        load_data(config(tmp_path))


def test_one_class_is_too_few(tmp_path):
    write(tmp_path / "train" / "only" / "a.png")
    write(tmp_path / "val" / "only" / "a.png")
    with pytest.raises(DataError, match="got one class, 'only'"):
        load_data(config(tmp_path))


def test_resize_below_the_crop_is_refused(root):
    with pytest.raises(ConfigError, match="resize: got 20, need at least image_size 24"):
        load_data(config(root, resize=20))


def test_limit_is_balanced_and_decodes_no_more(root):
    damage(root / "train" / "ant" / "3.jpg")
    damage(root / "train" / "ant" / "1.jpg")
    kept = [s for s in range(20) if not {1, 3} & set(chosen_ants(root, s))]
    assert kept
    splits = load_data(config(root, train_limit=6, seed=kept[0]))
    assert splits.train.labels.bincount().tolist() == [2, 2, 2]


def chosen_ants(root, seed):
    train = load_data(config(root, train_limit=6, seed=seed, memory="stream")).train
    return [int(path.stem) for path in train.samples if path.parent.name == "ant"]


@pytest.fixture
def tiny(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    lines = []
    for c, wnid in enumerate(("n02", "n01")):
        for i in range(3):
            write(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", seed=c, size=(64, 64))
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("x")
        write(root / "val" / "images" / f"val_{c}.JPEG", seed=50 + c, size=(64, 64))
        lines.append(f"val_{c}.JPEG\t{wnid}\t0\t0\t62\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    write(root / "test" / "images" / "test_0.JPEG")
    return tmp_path


def test_tiny_imagenets_public_layout(tiny):
    for root in (tiny, tiny / "tiny-imagenet-200"):
        splits = load_data(DataConfig(kind="tiny-imagenet", root=root))
        assert splits.classes == ("n01", "n02")
        assert splits.train.images.shape == (6, 64, 64, 3)
        expected = np.asarray(Image.open(tiny / "tiny-imagenet-200" / "val" / "images" / "val_1.JPEG"))
        assert np.array_equal(splits.test.images[0].numpy(), expected)
        assert splits.test.labels.tolist() == [0, 1]


def test_tiny_imagenet_in_class_folders(tiny):
    root = tiny / "tiny-imagenet-200"
    (root / "val" / "val_annotations.txt").unlink()
    for c, wnid in enumerate(("n02", "n01")):
        (root / "val" / wnid).mkdir()
        (root / "val" / "images" / f"val_{c}.JPEG").rename(root / "val" / wnid / "a.JPEG")
    (root / "val" / "images").rmdir()
    assert load_data(DataConfig(kind="tiny-imagenet", root=root)).test.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("val_0.JPEG\n", "line 1: got 'val_0.JPEG', need FILE<tab>CLASS"),
        ("val_0.JPEG\tn02\n\nval_9.JPEG\tn01\n", "line 3: .*val_9.JPEG is missing"),
        ("\n", "lists no image"),
        ("val_0.JPEG\tn03\n", "only in .*train: n01, n02; only in .*val: n03"),
    ],
)
def test_tiny_imagenet_annotations_are_checked(tiny, text, message):
    (tiny / "tiny-imagenet-200" / "val" / "val_annotations.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        load_data(DataConfig(kind="tiny-imagenet", root=tiny))


def test_files_of_other_kinds_are_counted_in_one_warning(root):
    for name in ("train/ant/a.gif", "val/cat/b.gif", "val/cat/c.avif", "val/cat/notes", "val/cat/.hidden"):
        (root / name).touch()
    message = r"left out: 4 files in class folders \(2 \.gif, 1 \.avif, 1 without a suffix\); images end in"
    with pytest.warns(UserWarning, match=message) as said:
        load_data(config(root))
    assert len(said) == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names")
@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_a_pipe_is_an_error_or_left_out(root, memory):
    os.mkfifo(root / "train" / "ant" / "pipe.png")
    with pytest.raises(DataError, match=r"pipe\.png cannot be read: .*no plain file"):
        list(make_loader(load_data(config(root, memory=memory)).train, 4, device="cpu", workers=0).epoch(0))
    with pytest.warns(UserWarning, match=r"left out: 1 of .*pipe\.png"):
        load_data(config(root, memory=memory, on_error="skip"))


def squares(root, side, other=None):
    for split in ("train", "val"):
        for i, name in enumerate(("cat", "dog")):
            for k in range(3):
                write(root / split / name / f"{k}.png", seed=6 * i + k, size=(side, side))
    if other is not None:
        write(root / "train" / "cat" / "0.png", size=other)


@pytest.mark.parametrize(
    ("side", "other", "settings", "size"),
    [
        (20, None, {}, 20),
        (20, None, {"image_size": 28}, 28),
        (20, None, {"resize": 230}, 224),
        (240, None, {}, 224),
        (20, (20, 24), {}, 224),
        (20, (24, 24), {}, 224),
    ],
)
def test_equal_small_squares_keep_their_size(tmp_path, side, other, settings, size):
    squares(tmp_path, side, other)
    splits = load_data(config(tmp_path, **{"image_size": None, **settings}))
    assert splits.image_size == size
    assert ("the size of the files (data.image_size changes it)" in splits.description) == (size == 20)
    if size == 20:
        assert splits.train.images.shape == (6, 20, 20, 3)
        pixels = np.asarray(Image.open(tmp_path / "train" / "cat" / "0.png"))
        assert np.array_equal(splits.train.images[0].numpy(), pixels)
