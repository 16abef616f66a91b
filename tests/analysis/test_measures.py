"""What an experiment measures on its finished runs: against the models themselves, numpy and scikit-learn."""

import csv
import html
import json
import re

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torchvision.datasets import STL10

from mdistiller import create_model
from mdistiller.analysis.experiment import folder_of, run_all
from mdistiller.analysis.measures import (
    MEASURES,
    Material,
    correlation,
    cost,
    features,
    gap,
    teacher_gap,
    transfer,
)
from mdistiller.analysis.transfer import Dataset, open_dataset, probe
from mdistiller.data import Augment, AugmentConfig, DataConfig, ImageSet, load_data
from mdistiller.errors import ConfigError, DataError
from mdistiller.models import load_weights
from mdistiller.runs.progress import Silent
from mdistiller.tasks.classification.experiments import EXPERIMENTS, get_experiment

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """KD and DKD on the digits, two seeds each, and their teacher."""
    out = tmp_path_factory.mktemp("measures")
    cells = get_experiment("figure3").cells("smoke")
    cells = [c._replace(config=c.config.replace(device="cpu")) for c in cells]
    teacher = cells[0].teacher
    run_all([teacher.config.replace(out=out / "teacher")], Silent())
    folders = {}
    for cell in cells:
        taught = cell.config.teacher.replace(checkpoint=out / "teacher")
        for seed in (0, 1):
            folder = folder_of(out, cell, seed)
            update = {"teacher": taught, "out": folder, "seed": seed}
            run_all([cell.config.model_copy(update=update)], Silent())
            folders.setdefault((cell.pair, cell.setting), []).append(folder)
    return Material(cells, folders, {teacher.key: out / "teacher"}, CPU)


def student(folder):
    model = create_model("resnet8", 10)
    load_weights(model, folder)
    return model.eval()


def normalised(material, images):
    splits = material.splits
    x = images.images.permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(splits.mean)[:, None, None]) / torch.tensor(splits.std)[:, None, None]


def logits(model, x):
    with torch.no_grad():
        return model(x).double().numpy()


def text(values, digits):
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def csv_of(picture):
    """Numbers behind a chart of a page."""
    data = re.search(r'<pre class="data" hidden>\n(.*?)</pre>', picture, re.S)[1]
    return list(csv.reader(html.unescape(data).splitlines()))


def test_every_extra_is_measured():
    assert {experiment.extra for experiment in EXPERIMENTS.values()} == {*MEASURES, ""}


def test_cost(material):
    found = cost(material)
    for key, folders in material.folders.items():
        lines = [json.loads((f / "metrics.jsonl").read_text().splitlines()[-1]) for f in folders]
        assert found.values[key] == (f"{np.mean([x['ms_per_step'] for x in lines]):.1f}", "0")
    (picture,) = found.pictures
    head, *lines = csv_of(picture)
    assert head == ["row", "ms_per_step", "mean", "std", "extra_parameters"]
    assert [line[0] for line in lines] == ["KD", "DKD"]
    assert "; DKD: " in picture


def test_correlation(material):
    found = correlation(material)
    x = normalised(material, material.splits.test)
    y = material.splits.test.labels.numpy()
    taught = create_model("resnet14", 10)
    load_weights(taught, material.teachers["resnet14"])
    t = logits(taught.eval(), x)
    apart = ~np.eye(10, dtype=bool)
    for key, folders in material.folders.items():
        seen = [logits(student(folder), x) for folder in folders]
        differences = [np.abs(np.corrcoef(s.T) - np.corrcoef(t.T)) for s in seen]
        means = [np.abs([(s - t)[y == c].mean(0) for c in range(10)])[apart].mean() for s in seen]
        expected = (text([d[apart].mean() for d in differences], 4), text(means, 3))
        assert found.values[key] == expected
    assert len(found.pictures) == 2
    _, *lines = csv_of(found.pictures[1])
    np.testing.assert_allclose(np.array([line[1:] for line in lines], float), differences[0], atol=6e-4)


def test_features(material):
    found = features(material)
    assert len(found.pictures) == 2
    for picture in found.pictures:
        _, *lines = csv_of(picture)
        assert [line[2] for line in lines] == [str(k) for k in material.splits.test.labels.tolist()]
    silhouette, nearest = found.values["resnet14_resnet8", "DKD"]
    assert -1 <= float(silhouette.split(" ± ")[0]) <= 1
    assert 0 <= float(nearest.split(" ± ")[0]) <= 100


def test_a_teacher_has_its_own_images(material):
    cell = material.cells[0]
    config = cell.config.replace(teacher={"image_size": 24, "mean": (0.5, 0.5, 0.5)})
    own = material.teacher(cell._replace(config=config))
    plain = material.teacher(cell)
    given = torch.rand(2, 3, 16, 16)
    splits = material.splits
    raw = given * torch.tensor(splits.std)[:, None, None] + torch.tensor(splits.mean)[:, None, None]
    renormalised = (raw - 0.5) / torch.tensor(splits.std)[:, None, None]
    large = torch.nn.functional.interpolate(renormalised, (24, 24), mode="bilinear")
    with torch.no_grad():
        torch.testing.assert_close(own(given), plain(large), rtol=1e-4, atol=1e-4)


def test_gap(material):
    cells = get_experiment("beta").cells("smoke")
    found = gap(Material(cells, {}, material.teachers, CPU))
    betas = {setting: texts[0] for (_, setting), texts in found.values.items()}
    mean = found.values["resnet14_resnet8", "DKD"][2]
    assert betas == {
        "DKD": "8.0",
        "α 1, β 8": "8.0",
        "α 1, β auto": mean,
        "α 1, β auto-sample": "each sample's gap",
    }


def test_teacher_gap_is_the_definition():
    """On images without augmentation, the teacher's outputs by hand."""
    splits = load_data(DataConfig(kind="digits", train_limit=60, test_limit=20))
    torch.manual_seed(0)
    model = create_model("resnet8", 10).eval()
    augment = Augment(AugmentConfig(flip=False, padding=0), splits.mean, splits.std, 10)
    x = splits.train.images.permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor(splits.mean)[:, None, None]) / torch.tensor(splits.std)[:, None, None]
    z, y = logits(model, x), splits.train.labels.numpy()
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    others = [np.delete(row, t).max() for row, t in zip(z, y, strict=True)]
    gaps = (z[np.arange(60), y] - others).clip(min=0)
    expected = (p[np.arange(60), y].mean(), gaps.mean(), np.sort(gaps)[29])  # torch's median: the lower one
    assert teacher_gap(model, splits, augment, CPU) == pytest.approx(expected, rel=1e-4)


def test_transfer_on_the_data_s_own_images(material):
    found = transfer(material)
    assert found.columns == ("digits, %", "digits published, %")
    x, x_test = (normalised(material, images) for images in (material.splits.train, material.splits.test))
    for key, folders in material.folders.items():
        scores = []
        for folder in folders:
            model = student(folder)
            model.fc = torch.nn.Identity()
            train, test = logits(model, x), logits(model, x_test)
            mean, std = train.mean(0), train.std(0)
            std[std == 0] = 1
            fit = LogisticRegression(C=0.1, max_iter=2000)
            fit.fit((train - mean) / std, material.splits.train.labels)
            scores.append(100 * fit.score((test - mean) / std, material.splits.test.labels))
        assert found.values[key] == (text(scores, 2), "")


def test_transfer_needs_other_data():
    cells = get_experiment("table13").cells("small")
    with pytest.raises(ConfigError, match="transfer: needs the folder"):
        transfer(Material(cells, {}, {}, CPU))


def stl10(folder, labels):
    base = folder / "stl10_binary"
    base.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (len(labels), 3, 96, 96), dtype=np.uint8)
    for split in ("train", "test"):
        images.tofile(base / f"{split}_X.bin")
        np.array(labels, dtype=np.uint8).tofile(base / f"{split}_y.bin")
    (base / "class_names.txt").write_text("\n".join(f"class{i}" for i in range(10)))
    return images


def test_stl10_is_read_and_scaled(tmp_path, monkeypatch):
    monkeypatch.setattr(STL10, "_check_integrity", lambda self: True)
    images = stl10(tmp_path, [1, 10, 3])
    found = open_dataset(tmp_path, 32)
    assert found.name == "STL-10"
    assert found.train.labels.tolist() == [0, 9, 2]
    # The file has columns before rows.
    first = torch.from_numpy(images[0]).permute(2, 1, 0).float()
    got = found.test.images[0].float()
    assert got.shape == (32, 32, 3)
    assert got.mean() == pytest.approx(first.mean().item(), abs=2)
    blocks = first.reshape(32, 3, 32, 3, 3).mean((1, 3))
    right, wrong = (
        torch.corrcoef(torch.stack([x.flatten(), got.flatten()]))[0, 1]
        for x in (blocks, blocks.transpose(0, 1))
    )
    assert right > 0.8
    assert wrong < 0.2


def test_a_folder_that_is_no_data_set(tmp_path):
    with pytest.raises(DataError):
        open_dataset(tmp_path, 32)
    (tmp_path / "stl10_binary").mkdir()
    with pytest.raises(DataError, match="not found"):
        open_dataset(tmp_path, 32)


def test_a_probe_finds_what_is_there():
    """Images of ten greys: a model that passes them on is worth 100 %, one that is blind chance."""
    labels = torch.arange(100) % 10
    greys = torch.linspace(0, 255, 10).byte()
    images = greys[labels][:, None, None, None].expand(100, 8, 8, 3).contiguous()
    data = Dataset("greys", ImageSet(images=images, labels=labels), ImageSet(images=images, labels=labels))
    augment = Augment(AugmentConfig(), (0.5,) * 3, (0.5,) * 3, 10).eval()

    class Grey(torch.nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.scale = scale
            self.pooled = torch.nn.Identity()

        def forward(self, x):
            mean = x.mean((2, 3))[:, :1] * self.scale
            wide = torch.cat([(mean - c).abs() for c in torch.linspace(-1, 1, 10).tolist()], 1)
            return self.pooled(wide if self.scale else wide * 0)

    assert probe(Grey(1.0), data, augment, CPU) == 100
    assert probe(Grey(0.0), data, augment, CPU) == 10
