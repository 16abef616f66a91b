"""Images of five channels, of one, and of four: from files and objects to an exported student."""

import shlex
import struct

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from small_runs import SETTINGS, VIT

import mdistiller
from mdistiller.cli.main import run as command
from mdistiller.data import Augment, AugmentConfig, DataConfig, load_data
from mdistiller.data.decoder import read_image
from mdistiller.errors import ConfigError, DataError
from mdistiller.models import create_model
from mdistiller.tasks.embed.config import EmbedData

BANDS = 5
STATISTICS = {"mean": (0.1, 0.2, 0.3, 0.4, 0.5), "std": (0.2, 0.2, 0.3, 0.3, 0.3)}
FLAGS = "--data.mean 0.1 0.2 0.3 0.4 0.5 --data.std 0.2 0.2 0.3 0.3 0.3"


def pixels(i, side=32, dtype=np.uint16, bands=BANDS):
    high = 1.0 if np.dtype(dtype).kind == "f" else np.iinfo(dtype).max + 1.0
    return (np.random.default_rng(i).random((side, side, bands)) * high).astype(dtype)


def save_arrays(folder, count, seed=0, **fields):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        np.save(folder / f"{i:02}.npy", pixels(100 * seed + i, **fields))
    return folder


def read(root, kind=EmbedData, **fields):
    fields = {"kind": "folder", "root": root, "workers": 0, "image_size": 32, **STATISTICS, **fields}
    return load_data(kind(**fields))


# Sources


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_arrays_keep_their_precision_and_either_layout(tmp_path, dtype, memory):
    for i in range(10):
        image = pixels(i, dtype=dtype)
        np.save(tmp_path / f"{i:02}.npy", image if i % 2 else image.transpose(2, 0, 1))
    splits = read(tmp_path, memory=memory, val_fraction=0.1)
    assert splits.shape == (BANDS, 32, 32)
    assert "of 5 channels" in splits.description
    found = {}
    for part in (splits.train, splits.test):
        for position in range(len(part)):
            image = part.images[position] if memory == "resident" else part.read(position, 0)
            assert image.dtype == torch.float32
            found[tuple(image[0, 0].tolist())] = image
    scale = 1 if np.dtype(dtype).kind == "f" else np.iinfo(dtype).max
    for i in range(10):
        image = 255 * pixels(i, dtype=dtype).astype(np.float64) / scale
        nearest = min(found, key=lambda key: np.abs(np.array(key) - image[0, 0]).max())
        assert np.abs(found[nearest].numpy() - image).max() < 1e-4


def test_arrays_of_other_sizes_are_cropped_as_files_are(tmp_path):
    save_arrays(tmp_path, 10, side=40)
    splits = read(tmp_path)
    assert splits.train.random_crop
    assert splits.train.read(0, 0).shape == (32, 32, BANDS)
    assert splits.test.images.shape[1:] == (32, 32, BANDS)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((5, 32, 5), np.uint8), r"\[5, 32, 5\].*one of \[H, W, 5\] and \[5, H, W\]"),
        (np.zeros((32, 32, 4), np.uint8), r"\[32, 32, 4\].*one of \[H, W, 5\]"),
        (np.zeros((32, 32), np.uint8), r"\[32, 32\].*one of \[H, W, 5\]"),
        (np.full((32, 32, 5), -1, np.int16), "int16 values from -1 to -1; allowed: uint8, uint16, or float"),
        (np.full((32, 32, 5), 2.0), r"float64 values from 2.0 to 2.0; allowed: .* float in \[0, 1\]"),
        (np.full((32, 32, 5), np.nan), "float64 values from nan"),
        (np.array([{}], dtype=object), "allow_pickle=False"),
    ],
)
def test_an_array_of_another_form_is_one_error(tmp_path, image, words):
    save_arrays(tmp_path, 10)
    np.save(tmp_path / "05.npy", image)
    with pytest.raises(DataError, match=r"05.npy cannot be read: .*" + words):
        read(tmp_path, memory="resident")
    with pytest.warns(UserWarning, match="1 of .* images cannot be read"):
        assert len(read(tmp_path, on_error="skip", val_fraction=0.5, memory="resident").train) in (4, 5)


def test_arrays_beside_images_are_left_alone(tmp_path, images):
    save_arrays(tmp_path, 3)
    for i in range(5):
        Image.fromarray(pixels(i, dtype=np.uint8, bands=3)).save(tmp_path / f"{i}.png")
    splits = load_data(EmbedData(kind="folder", root=tmp_path, image_size=32, workers=0))
    assert len(splits.train) + len(splits.test) == 5
    for i in range(5):
        (tmp_path / f"{i}.png").unlink()
    with pytest.raises(DataError, match=r"has no images, which end in .*\.npy.* one number .*channel"):
        load_data(EmbedData(kind="folder", root=tmp_path, image_size=32, workers=0))


def test_gray_files_stay_gray(tmp_path):
    for i in range(10):
        image = pixels(i, bands=1)[..., 0]
        Image.fromarray(image if i % 2 else (image >> 8).astype(np.uint8)).save(tmp_path / f"{i:02}.png")
    splits = read(tmp_path, mean=(0.5,), std=(0.25,), memory="stream")
    assert splits.shape == (1, 32, 32)
    assert np.abs(splits.train.read(1, 0).numpy() * 257 - pixels(1, bands=1)).max() < 0.01
    assert np.abs(splits.train.read(0, 0).numpy() - (pixels(0, bands=1) >> 8)).max() == 0


def tiff(samples, photometric, extra=(), bits=8, side=32):
    """A TIFF file of interleaved zeros, as GDAL writes bands."""
    entries = [(256, 3, [side]), (257, 3, [side]), (258, 3, [bits] * samples), (259, 3, [1])]
    entries += [(262, 3, [photometric]), (273, 4, [0]), (277, 3, [samples]), (278, 3, [side])]
    entries += [(279, 4, [side * side * samples * bits // 8]), (284, 3, [1])]
    entries += [(338, 3, list(extra))] if extra else []
    later, start = b"", 8 + 2 + 12 * len(entries) + 4
    data = start + sum(2 * len(v) if k == 3 else 4 * len(v) for _, k, v in entries if len(v) * k > 6)
    head = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    for tag, kind, values in entries:
        values = [data] if tag == 273 else values
        packed = struct.pack("<" + ("H" if kind == 3 else "I") * len(values), *values)
        if len(packed) > 4:
            place, later = struct.pack("<I", start + len(later)), later + packed
        else:
            place = packed.ljust(4, b"\0")
        head += struct.pack("<HHI", tag, kind, len(values)) + place
    return head + struct.pack("<I", 0) + later + bytes(side * side * samples * bits // 8)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (tiff(5, 2, (0, 0)), "5 channels, of which Pillow reads 3"),
        (tiff(6, 2, (0, 0, 0)), "6 channels, of which Pillow reads|cannot identify"),
        (tiff(4, 2, (0,)), "4 channels, of which Pillow reads 3"),
        (tiff(5, 1, (0,) * 4), "cannot identify"),
        (tiff(5, 1, (0,) * 4, bits=16), "cannot identify"),
    ],
)
def test_a_tiff_that_pillow_cannot_read_whole_is_an_error(tmp_path, file, words):
    path = tmp_path / "0.tif"
    path.write_bytes(file)
    with pytest.raises(DataError, match=f"0.tif cannot be read: .*({words}).*npy"):
        read_image(path)
    for i in range(1, 6):
        (tmp_path / f"{i}.tif").write_bytes(file)
    for statistics in (STATISTICS, {"mean": (0.5,) * 4, "std": (0.5,) * 4}, {"mean": None, "std": None}):
        with pytest.raises(DataError, match=f"cannot be read: .*({words}).*npy"):
            read(tmp_path, memory="resident", **statistics)


def test_four_bands_of_a_tiff_or_png_are_read(tmp_path):
    for i in range(10):
        image = pixels(i, dtype=np.uint8, bands=4)
        Image.fromarray(image).save(tmp_path / f"{i:02}.{'tif' if i % 2 else 'png'}")
    splits = read(tmp_path, mean=(0.5,) * 4, std=(0.5,) * 4, memory="stream", val_fraction=0.2)
    images = {i: pixels(i, dtype=np.uint8, bands=4) for i in range(10)}
    for part in (splits.train, splits.test):
        for position in range(len(part)):
            found = part.read(position, 0)
            assert any(np.array_equal(found, image) for image in images.values())
    Image.fromarray(pixels(0, dtype=np.uint8, bands=3)).save(tmp_path / "03.tif")
    with pytest.raises(DataError, match=r"03.tif cannot be read: .*RGB.*4 channels"):
        read(tmp_path, mean=(0.5,) * 4, std=(0.5,) * 4, memory="resident")


def test_mean_and_std_say_the_number_of_channels():
    for fields in ({"mean": (0.5,) * 5}, {"std": (0.5,) * 5}, {"mean": (0.5,) * 5, "std": (0.5,) * 4}):
        with pytest.raises(ValueError, match=r"mean, std: .*one number .*channel"):
            DataConfig(**fields)
    for fields in ({"kind": "synthetic"}, {"kind": "digits"}):
        with pytest.raises(ConfigError, match="mean: got 5 numbers; the images have 3 channels"):
            load_data(DataConfig(**fields, **STATISTICS))


# Objects


class Items(torch.utils.data.Dataset):
    def __init__(self, images, labels=None):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i] if self.labels is None else (self.images[i], self.labels[i])


ARRAYS = np.stack([pixels(i) for i in range(32)])
LABELS = np.arange(32) % 4
OBJECTS = {
    "arrays": lambda x, y: (x, y),
    "channels first": lambda x, y: (x.transpose(0, 3, 1, 2), y),
    "tensors": lambda x, y: (torch.from_numpy(x), torch.from_numpy(y)),
    "floats": lambda x, y: (torch.from_numpy(x / 65535), torch.from_numpy(y)),
    "dataset of arrays": lambda x, y: Items(x, y),
    "dataset of tensors": lambda x, y: Items(torch.from_numpy(x).permute(0, 3, 1, 2), y),
    "oblong": lambda x, y: Items([image[:, :28] for image in x], y),
}


def classify(data, out, student=None, teacher=None, method="kd", **settings):
    options = {"in_chans": BANDS, **VIT}
    student = student or {"name": "timm/vit_tiny_patch16_224", "options": options}
    if teacher is None:
        torch.manual_seed(1)
        teacher = timm.create_model("resnet10t", num_classes=4, in_chans=BANDS)
    settings = {**SETTINGS, "augment": {"padding": 2}, **settings}
    return mdistiller.distill(student, teacher, data, method, out=out, **settings)


def objects(kind, **fields):
    return {
        "train": OBJECTS[kind](ARRAYS, LABELS),
        "test": OBJECTS[kind](ARRAYS[:8], LABELS[:8]),
        "workers": 0,
        **STATISTICS,
        **fields,
    }


def test_objects_of_every_form_are_the_same_images(tmp_path):
    weights = []
    for kind in OBJECTS:
        run = classify(objects(kind, **({"image_size": 32} if kind == "oblong" else {})), tmp_path / kind)
        weights.append(load_file(run.path / "student.safetensors"))
        assert run.summary["last"]["loss"] > 0
    for i, other in enumerate(weights[1:-1], 1):
        for key, value in other.items():
            assert torch.allclose(value, weights[0][key], atol=2e-3 if i == 3 else 0), (i, key)


def test_items_of_undeclared_channels_are_an_error_that_says_how(tmp_path):
    for kind in ("dataset of tensors", "dataset of arrays", "tensors"):
        with pytest.raises(
            ConfigError, match=r"allowed: .*give mean and std with one number per channel, as in"
        ):
            classify(objects(kind, mean=None, std=None), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"train\[0\] is a tensor \[5, 32, 32\].*allowed"):
        classify(objects("dataset of tensors", mean=(0.5,) * 4, std=(0.5,) * 4), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"images of train.* \[32, 32, 32, 5\].*\[N, H, W, 4\]"):
        classify(objects("arrays", mean=(0.5,) * 4, std=(0.5,) * 4), tmp_path / "run")


def test_a_run_of_objects_opens_again(tmp_path):
    data = objects("dataset of arrays")
    run = classify(data, tmp_path / "run")
    again = mdistiller.Run(run.path, data=data)
    assert again.config.data.channels == BANDS
    assert again.student(torch.zeros(2, BANDS, 32, 32)).shape == (2, 4)


# Augmentation


def test_augmentation_of_any_channels_is_that_of_three():
    """Each channel gets the changes that the same pixels get among three."""
    image = torch.randint(256, (8, 16, 16, 1), dtype=torch.uint8)
    config = AugmentConfig(rotation=30, vertical_flip=True, erase=0.5, crop="resized")
    batch = mdistiller.Batch(image.expand(-1, -1, -1, 3), torch.zeros(8).long(), torch.arange(8))
    other = batch._replace(image=image.expand(-1, -1, -1, 5).float())
    draws = [mdistiller.data.augment.Draws(3, batch.index) for _ in range(2)]
    few = Augment(config, (0.5,) * 3, (0.25,) * 3, 2)(batch, draws[0]).image
    before = other.image.clone()
    many = Augment(config, (0.5,) * 5, (0.25,) * 5, 2)(other, draws[1]).image
    assert torch.equal(other.image, before)
    assert many.shape == (8, 5, 16, 16)
    assert (many[:, :1] == many).all()
    assert (few[:, 0] - many[:, 0]).abs().max() < 1 / 255 / 0.25  # bytes are rounded


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_normalization_leaves_the_images_as_they_are(layout):
    image = 255 * torch.rand(2, 4, 4, 5)
    before = image.clone()
    found = Augment(AugmentConfig(), (0.5,) * 5, (0.25,) * 5, 2, layout).normalize(image)
    assert torch.equal(image, before)
    assert torch.allclose(found, ((image / 255 - 0.5) / 0.25).movedim(-1, 1), atol=1e-6)


@pytest.mark.parametrize("setting", [{"color_jitter": 0.4}, {"policy": "randaugment"}])
def test_changes_of_color_are_for_rgb(tmp_path, setting):
    (name,) = setting
    with pytest.raises(ConfigError, match=rf"augment\.{name}: .*RGB.*5 channels"):
        classify(objects("arrays"), tmp_path / "run", augment=setting)


def test_a_strong_view_is_for_rgb(tmp_path):
    with pytest.raises(ConfigError, match=r"augment\.strong_policy: .*RGB.*5 channels"):
        classify(objects("arrays"), tmp_path / "run", method="mlkd")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    run = classify(objects("arrays"), tmp_path / "run", method="mlkd", augment={"strong_policy": "none"})
    assert run.summary["epochs"] == 1


# Models


@pytest.mark.parametrize("student", ["torchvision/resnet18", {"name": "timm/resnet10t"}])
def test_a_student_of_three_channels_is_an_error_that_names_timm(tmp_path, student):
    with pytest.raises(ConfigError, match=r"images of shape \(5, 32, 32\).*timm.*in_chans 5"):
        classify(objects("arrays"), tmp_path / "run", student=student)


def test_the_networks_for_cifar_take_any_channels(tmp_path):
    for name in ("resnet8", "vgg8", "ShuffleV1", "ShuffleV2", "MobileNetV2", "wrn_16_1", "ResNet50"):
        model = create_model(name, num_classes=4, in_chans=BANDS)
        assert model.eval()(torch.zeros(1, BANDS, 32, 32)).shape == (1, 4)
    run = classify(objects("arrays"), tmp_path / "run", {"name": "resnet8", "options": {"in_chans": BANDS}})
    assert run.student(torch.zeros(2, BANDS, 32, 32)).shape == (2, 4)


def test_a_teacher_of_three_channels_is_an_error(tmp_path):
    model = timm.create_model("resnet10t", num_classes=4)
    torch.save(model.state_dict(), tmp_path / "teacher.pth")
    named = {"name": "timm/resnet10t", "checkpoint": tmp_path / "teacher.pth"}
    for teacher in (model, named, named | {"mean": (0.5,) * 3, "std": (0.2,) * 3}):
        with pytest.raises(ConfigError, match=r"in_chans 5"):
            classify(objects("arrays"), tmp_path / "run", teacher=teacher)


class Picks(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = timm.create_model("resnet10t", num_classes=4)

    def forward(self, image):
        return self.model(image[:, [3, 2, 1]])


def test_a_teacher_may_pick_its_channels_and_have_statistics_of_its_own(tmp_path):
    run = classify(objects("arrays"), tmp_path / "picks", teacher=Picks())
    assert run.summary["last"]["loss"] > 0
    teacher = timm.create_model("resnet10t", num_classes=4, in_chans=BANDS)
    own = {"mean": (0.4,) * 5, "std": (0.3,) * 5}
    run = classify(objects("arrays"), tmp_path / "own", teacher=teacher, teacher_input=own)
    assert run.config.teacher.mean == (0.4,) * 5
    tuned = classify(objects("arrays"), tmp_path / "from-run", teacher=run.path)
    assert tuned.config.data.channels == BANDS


# The whole way


OPTIONS = "img_size 32 patch_size 8 embed_dim 48 depth 3 num_heads 3 in_chans 5"
SMALL = "--epochs 1 --max-steps 2 --batch-size 8 --data.workers 0 --precision float32 --device cpu"


def call(line):
    assert command(shlex.split(line)) == 0, line


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_five_channels_from_files_to_an_export(tmp_path, monkeypatch, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    save_arrays(tmp_path / "photos" / "deep", 40)
    for split in ("train", "val"):
        for i, name in enumerate(("dark", "light")):
            save_arrays(tmp_path / "labeled" / split / name, 8, seed=10 * i + len(split))
    torch.manual_seed(0)
    teacher = timm.create_model("vit_tiny_patch16_224", num_classes=0, in_chans=BANDS, **VIT)
    torch.save(teacher.state_dict(), "teacher.pth")
    train = (
        f"train embed.tokens.timm/resnet10t --student.options in_chans 5 --data.root photos {FLAGS} {SMALL} "
        f"--data.probe labeled --teacher timm/vit_tiny_patch16_224 --teacher.options {OPTIONS} "
        "--teacher.checkpoint teacher.pth --data.image-size 32"
    )
    call(f"{train} --dry-run")
    assert "32x32 of 5 channels" in (plan := "".join(capsys.readouterr()))
    assert plan.count("MACs an image") == 2
    call(f"{train} --out runs/live")
    cached = f"{train} --teacher-cache cache --teacher-cache-taps norm --out runs"
    for name in ("written", "read"):
        call(f"{cached}/{name}")
    one, other = (load_file(f"runs/{name}/student.safetensors") for name in ("written", "read"))
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    call("predict runs/live photos --out embeddings.npy")
    rows = np.load("embeddings.npy")
    student = mdistiller.load_student("runs/live")
    image = torch.from_numpy(np.load("photos/deep/03.npy") / 65535).float()
    image = ((image - torch.tensor(STATISTICS["mean"])) / torch.tensor(STATISTICS["std"])).permute(2, 0, 1)
    assert rows.shape == (40, 512)
    assert np.allclose(rows[3], student(image[None]).detach().numpy()[0], atol=1e-4)
    call(
        "train folder.finetune.timm/resnet10t --student.checkpoint runs/live --student.options in_chans 5 "
        f"--data.root labeled {SMALL} --data.image-size 32 --probe-epochs 0 --out runs/tuned"
    )
    call("eval runs/tuned")
    call("export runs/tuned --format onnx --out exported")
    session = onnxruntime.InferenceSession("exported/model.onnx")
    assert session.get_inputs()[0].shape[1:] == [BANDS, 32, 32]
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "5 channels" in card
    assert "RGB" not in card
    call("predict exported photos/deep/00.npy")
    assert "%" in capsys.readouterr().out
    call(f"train {tmp_path / 'runs' / 'tuned' / 'config.json'} --out runs/again")
    again, tuned = (load_file(f"runs/{name}/student.safetensors") for name in ("again", "tuned"))
    assert all(torch.equal(value, again[key]) for key, value in tuned.items())
