"""What the page says about the runs' students, against the models asked by hand."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.metrics import confusion_matrix, silhouette_score
from sklearn.model_selection import LeaveOneOut, cross_val_score, train_test_split
from sklearn.neighbors import KNeighborsClassifier

import mdistiller
from mdistiller.errors import ConfigError
from mdistiller.report import write_report


def test_images() -> tuple[np.ndarray, np.ndarray]:
    """The digits' 500 test images, as they are, [500, 8, 8], and their classes."""
    digits = load_digits()
    _, test = train_test_split(np.arange(1797), test_size=500, stratify=digits.target, random_state=0)
    return digits.images[test], digits.target[test]


def pixels() -> torch.Tensor:
    """The same at 16 x 16 in 256 shades, as evaluation has them."""
    small = torch.from_numpy(test_images()[0] * (255 / 16)).round()
    big = torch.nn.functional.interpolate(small[:, None].float(), (16, 16), mode="bilinear")
    return big.round().clamp(0, 255)


def outputs(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Logits [500, 10] and pooled features of a run's student."""
    model = mdistiller.create_model(name, num_classes=10)
    model.load_state_dict(load_file(folder / "student.safetensors"))
    x = (pixels().repeat(1, 3, 1, 1) / 255 - 0.3053) / 0.3187
    with torch.no_grad():
        found = mdistiller.tap(model.eval(), ["pooled"])(x)
    return found.logits.numpy(), found.features["pooled"].numpy()


test_images.__test__ = False


@pytest.fixture(scope="module")
def page(real_runs, tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("page") / "page.html"
    return write_report(real_runs, out, images=2000, device="cpu").read_text(encoding="utf-8")


def transferred(text: str) -> str:
    """Returns the page's table of what was transferred."""
    found = re.search(r'id="transfer-table">.*?(<table.*?</table>)', text, re.S)
    assert found is not None
    return found[1]


def numbers(text: str, name: str) -> list[list[str]]:
    """Returns the numbers that a chart's button saves."""
    chart = re.search(
        rf'<div class="chart" id="{name}">.*?<pre class="data" hidden>\n(.*?)</pre>', text, re.S
    )
    assert chart is not None
    return list(csv.reader(html.unescape(chart[1]).splitlines()))


def test_gains_are_the_mean_over_seeds_less_the_baseline(real_runs, page):
    label = test_images()[1]

    def accuracy(folder: Path) -> np.ndarray:
        matrix = confusion_matrix(label, outputs(folder, "resnet8")[0].argmax(1))
        return 100 * matrix.diagonal() / matrix.sum(1)

    gain = (accuracy(real_runs[2]) + accuracy(real_runs[3])) / 2 - accuracy(real_runs[1])
    table = re.search(r'id="class-gains">.*?(<table.*?</table>)', page, re.S)[1]
    head, *_ = Table(table).rows
    assert head == ["class", "DKD", "mean"]
    lines = [re.findall(r'data-value="([^"]*)"', line) for line in table.split("<tr>")[2:]]
    assert [line[0] for line in lines] == [str(i) for i in np.argsort(-gain, kind="stable")]
    np.testing.assert_allclose([float(line[1]) for line in lines], np.sort(gain)[::-1], atol=1e-2)
    assert "minus that of the student alone, in percentage points" in page


def test_the_transfer_is_computed_from_the_models(real_runs, page):
    """Agreement, NCKD and correlation, also of the student alone, whose run knows no teacher."""
    teacher = torch.from_numpy(outputs(real_runs[0], "resnet14")[0]).double()
    label = torch.from_numpy(test_images()[1]).long()
    apart = ~np.eye(10, dtype=bool)
    others = ~torch.nn.functional.one_hot(label, 10).bool()

    def measured(folder: Path) -> tuple[float, float, float]:
        z = torch.from_numpy(outputs(folder, "resnet8")[0]).double()
        agreement = 100 * (z.argmax(1) == teacher.argmax(1)).double().mean().item()
        p, q = (x[others].reshape(-1, 9).div(4).log_softmax(1) for x in (teacher, z))
        nckd = 16 * (p.exp() * (p - q)).sum(1).mean().item()
        return agreement, nckd, np.abs(np.corrcoef(z.T) - np.corrcoef(teacher.T))[apart].mean()

    table = transferred(page)
    rows = [re.findall(r'data-value="([^"]*)"', line) for line in table.split("<tr>")[2:]]
    found = {label: [float(value or "nan") for value in values] for label, *values in rows}
    heads = re.findall(r'<button type="button">(.*?)</button>', table)
    columns = [next(i for i, h in enumerate(heads) if name in h) - 1 for name in ("agree", "NCKD", "Δ corr")]
    for row, folders in (("student alone", real_runs[1:2]), ("DKD", real_runs[2:])):
        expected = np.mean([measured(folder) for folder in folders], axis=0)
        np.testing.assert_allclose([found[row][c] for c in columns], expected, rtol=2e-4)


class Table(HTMLParser):
    """Cells of each line of the table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data) -> None:
        self.rows[-1][-1] += data


def test_features_are_measured(real_runs, page):
    label = test_images()[1]
    head, *rows = Table(transferred(page)).rows
    columns = [head.index("silhouette"), head.index("10 nearest, %")]
    models = {"teacher": ("resnet14", real_runs[:1]), "student alone": ("resnet8", real_runs[1:2])}
    models["DKD"] = ("resnet8", real_runs[2:])
    assert {cells[0] for cells in rows} == models.keys()
    for cells in rows:
        model, folders = models[cells[0]]
        found = [outputs(folder, model)[1] for folder in folders]
        silhouettes = [silhouette_score(features, label, metric="cosine") for features in found]
        nearest = KNeighborsClassifier(10, metric="cosine")
        votes = [100 * cross_val_score(nearest, x, label, cv=LeaveOneOut()).mean() for x in found]
        texts = [cells[column].split(" ± ")[0].replace("−", "-") for column in columns]
        np.testing.assert_allclose(
            [float(t) for t in texts], [np.mean(silhouettes), np.mean(votes)], atol=0.051
        )


def test_correlations_beside_the_teachers(real_runs, page):
    student, teacher = outputs(real_runs[2], "resnet8")[0], outputs(real_runs[0], "resnet14")[0]
    expected = np.abs(np.corrcoef(student.T) - np.corrcoef(teacher.T))
    _, *lines = numbers(page, "correlation-0")
    np.testing.assert_allclose(np.array([line[1:] for line in lines], float), expected, atol=1e-3)
    assert f"mean difference {expected[~np.eye(10, dtype=bool)].mean():.3f}" in page
    # The picture has the same values as opacities, in 31 steps from a tenth up to the largest.
    uri = page.split('id="correlation-0"')[1].split("base64,")[1].split('"')[0]
    cells = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri))).convert("RGBA"))[..., 3] / 255
    shades = 0.1 + 0.9 * expected / expected.max()  # zero is faint, not clear
    np.testing.assert_allclose(cells, shades, atol=0.02)
    assert 'id="correlation-1"' not in page
    assert "Missing parts" not in page


def test_fewer_images_and_none(real_runs, tmp_path):
    few = write_report(real_runs, tmp_path / "few.html", images=100, device="cpu").read_text()
    assert "over 100 test images" in few
    none = write_report(real_runs, tmp_path / "none.html").read_text()
    assert "silhouette" not in none
    assert "<img" not in none


def test_a_device_that_is_not_there(real_runs, tmp_path):
    with pytest.raises(ConfigError, match="device: got 'abacus'"):
        write_report(real_runs, tmp_path / "page.html", images=100, device="abacus")


def change(folder: Path, part: str, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    config[part].update(values)
    (folder / "config.json").write_text(json.dumps(config))


def missing(text: str) -> str:
    return text.split('<section aria-labelledby="missing">')[1].split("</section>")[0]


def test_a_student_that_is_gone(copies, tmp_path):
    (copies[2] / "student.safetensors").unlink()
    (copies[1] / "student.safetensors").write_bytes(b"damaged")
    text = write_report(copies, tmp_path / "page.html", images=100, device="cpu").read_text()
    assert f"The student of {copies[2]} cannot run on the images: no such checkpoint" in missing(text)
    assert f"The student of {copies[1]} cannot run on the images" in missing(text)
    # The other seed is there; with the student alone gone, there are no gains against it.
    assert "Gains and losses by class" not in text
    table = Table(transferred(text))
    silhouette = table.rows[0].index("silhouette")
    known = {row[0]: row[silhouette] != "–" for row in table.rows[1:]}
    assert known == {"teacher": True, "student alone": False, "DKD": True}


def test_data_that_is_gone(copies, tmp_path):
    for folder in copies:
        change(folder, "data", kind="cifar100", root=str(tmp_path / "nowhere"))
    text = write_report(copies, tmp_path / "page.html", images=100, device="cpu").read_text()
    assert "The test images cannot be read: " in missing(text)
    assert str(tmp_path / "nowhere") in missing(text)
    assert "silhouette" not in text
    assert "accuracy-curves" in text


def test_runs_with_other_test_images_are_left_out(copies, tmp_path):
    change(copies[1], "data", seed=7)
    for folder in copies[2:]:
        change(folder, "data", workers=0, root="/elsewhere")  # the same images, read otherwise
    text = write_report(copies, tmp_path / "page.html", images=100, device="cpu").read_text()
    assert missing(text).count("its test images are not those of the first run") == 1
    assert f"The student of {copies[1]}" in missing(text)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"checkpoint": "/nowhere/teacher.pt"}, "no such checkpoint: /nowhere/teacher.pt"),
        ({"checkpoint": None}, "it has no checkpoint file"),
        ({"checkpoint": 5}, "teacher.checkpoint: "),
        ({"name": "resnet15"}, "unknown model &#x27;resnet15&#x27;"),
        ({"options": ["no"]}, "teacher.options: "),
    ],
)
def test_a_teacher_that_is_gone(copies, tmp_path, values, words):
    change(copies[2], "teacher", **values)
    text = write_report(copies[:3], tmp_path / "page.html", images=100, device="cpu").read_text()
    assert "cannot run on the images" in missing(text)
    assert words in missing(text)
    assert '<section aria-labelledby="correlation">' not in text
    assert "silhouette" in text


def test_plugins_are_not_run(copies, tmp_path):
    """A page over someone else's folder runs none of the code that its config names."""
    plugin = tmp_path / "plugin.py"
    plugin.write_text("raise SystemExit('was run')")
    config = json.loads((copies[1] / "config.json").read_text())
    (copies[1] / "config.json").write_text(json.dumps(config | {"plugins": [str(plugin)]}))
    write_report(copies[1:2], tmp_path / "page.html", images=100, device="cpu")


def test_one_run_alone(real_runs, tmp_path):
    text = write_report(real_runs[1:2], tmp_path / "page.html", images=100, device="cpu").read_text()
    for absent in ("gains", "correlation", "settings", "missing"):
        assert f'<section aria-labelledby="{absent}">' not in text
    assert "silhouette" in text


def test_the_folder_may_have_moved(real_runs, tmp_path):
    moved = shutil.copytree(real_runs[1], tmp_path / "moved")
    assert "missing" not in write_report([moved], tmp_path / "p.html", images=50).read_text().split("<nav")[1]
