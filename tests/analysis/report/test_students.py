"""What the page says about the runs' students, against the models asked by hand."""

from __future__ import annotations

import base64
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
from sklearn.model_selection import train_test_split

import mdistiller
from mdistiller.analysis.report import write_report
from mdistiller.errors import ConfigError

ROWS = ("baseline: resnet14", "baseline: resnet8", "dkd: resnet14 → resnet8")


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


def trace(text: str, name: str) -> dict:
    start = re.search(rf'Plotly\.newPlot\(\s*"{name}",\s*', text)
    assert start is not None
    return json.JSONDecoder().raw_decode(text, start.end())[0][0]


def test_gains_are_the_mean_over_seeds_less_the_baseline(real_runs, page):
    label = test_images()[1]

    def accuracy(folder: Path) -> np.ndarray:
        matrix = confusion_matrix(label, outputs(folder, "resnet8")[0].argmax(1))
        return 100 * matrix.diagonal() / matrix.sum(1)

    gain = (accuracy(real_runs[2]) + accuracy(real_runs[3])) / 2 - accuracy(real_runs[1])
    found = trace(page, "gains-0")
    assert found["customdata"] == [str(i) for i in np.argsort(-gain, kind="stable")]
    np.testing.assert_allclose(found["x"], np.sort(gain)[::-1], atol=1e-9)
    assert '"gains-1"' not in page
    up, down = (gain > 0).sum(), (gain < 0).sum()
    told = (
        f"{up} {'class gains' if up == 1 else 'classes gain'} and {down} {'loses' if down == 1 else 'lose'}"
    )
    assert f"{told} against {ROWS[1]}" in page


class Confusions(HTMLParser):
    """Texts and images of each item, by row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: dict[str, list[tuple[str, list[tuple[str, str]]]]] = {}
        self.row, self.within = "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        given = dict(attrs)
        if tag == "img":
            self.rows[self.row][-1][1].append((given["alt"], given["src"]))
        elif tag == "li":
            self.rows.setdefault(self.row, []).append(("", []))
        self.within = tag

    def handle_data(self, data) -> None:
        if self.within == "summary":
            self.row = data
        elif self.within == "li":
            self.rows[self.row][-1] = (data, self.rows[self.row][-1][1])
        self.within = ""


def test_confusions_and_their_images(real_runs, page):
    label = test_images()[1]
    section = page.split('<section aria-labelledby="confusions">')[1].split("</section>")[0]
    found = Confusions(section).rows
    assert list(found) == list(ROWS)
    taken = [outputs(folder, "resnet8")[0].argmax(1) for folder in real_runs[2:]]
    errors = sum(confusion_matrix(label, one) for one in taken).astype(float)
    np.fill_diagonal(errors, 0)
    order = sorted((-errors[i, k], i, k) for i in range(10) for k in range(10) if errors[i, k])[:5]
    assert len(found[ROWS[2]]) == len(order)
    for (count, i, k), (text, images) in zip(order, found[ROWS[2]], strict=True):
        assert text == (
            f"{i} predicted as {k}: {-count / 2:.3g} of {(label == i).sum()} images (mean over seeds)"
        )
        wrong = [(one == k) & (label == i) for one in taken]
        assert 1 <= len(images) == min(6, (wrong[0] | wrong[1]).sum())
        by_both = 0
        for alt, source in images:
            index = int(re.fullmatch(rf"{i}, predicted as {k} \(test image (\d+)\)", alt)[1])
            assert wrong[0][index] or wrong[1][index]
            by_both += wrong[0][index] and wrong[1][index]
            kind, _, content = source.partition(",")
            assert kind == "data:image/png;base64"
            picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))
            assert (picture == pixels()[index, 0].numpy()[..., None]).all()
        assert by_both == min(len(images), (wrong[0] & wrong[1]).sum())


def test_features_are_measured(real_runs, page):
    label = test_images()[1]
    for i, (folder, name) in enumerate(zip(real_runs[:3], ("resnet14", "resnet8", "resnet8"), strict=True)):
        silhouette = silhouette_score(outputs(folder, name)[1], label, metric="cosine")
        assert f"<h3>{ROWS[i]}</h3><p class=note>silhouette {silhouette:.3f}, nearest" in page
        points = trace(page, f"tsne-{i}")
        assert len(points["x"]) == len(points["y"]) == 500
        assert points["text"] == [str(k) for k in label]
        assert len(set(points["marker"]["color"])) == 10


def test_correlations_beside_the_teachers(real_runs, page):
    student, teacher = outputs(real_runs[2], "resnet8")[0], outputs(real_runs[0], "resnet14")[0]
    expected = np.abs(np.corrcoef(student.T) - np.corrcoef(teacher.T))
    found = trace(page, "correlation-0")
    np.testing.assert_allclose(found["z"], expected, atol=1e-3)
    assert found["zmax"] == pytest.approx(expected.max(), abs=1e-3)
    assert f"mean {expected.mean():.3f}" in page
    assert '"correlation-1"' not in page
    assert "Missing parts" not in page


def test_fewer_images_and_none(real_runs, tmp_path):
    few = write_report(real_runs, tmp_path / "few.html", images=100, device="cpu").read_text()
    assert "on 100 test images" in few
    assert len(trace(few, "tsne-0")["x"]) == 100
    none = write_report(real_runs, tmp_path / "none.html").read_text()
    assert '<section aria-labelledby="confusions">' not in none
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
    # The other seed is there; and with the student alone gone, the first run is the baseline.
    assert re.search(rf"loses? against {ROWS[0]}", text)  # one class loses, or several lose
    assert f"<h3>{ROWS[1]}</h3><p class=note>silhouette" not in text


def test_data_that_is_gone(copies, tmp_path):
    for folder in copies:
        change(folder, "data", kind="cifar100", root=str(tmp_path / "nowhere"))
    text = write_report(copies, tmp_path / "page.html", images=100, device="cpu").read_text()
    assert "The test images cannot be read: " in missing(text)
    assert str(tmp_path / "nowhere") in missing(text)
    assert '<section aria-labelledby="features">' not in text
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
    assert '<section aria-labelledby="features">' in text


def test_plugins_are_not_run(copies, tmp_path):
    """A page over someone else's folder runs none of the code that its config names."""
    plugin = tmp_path / "plugin.py"
    plugin.write_text("raise SystemExit('was run')")
    config = json.loads((copies[1] / "config.json").read_text())
    (copies[1] / "config.json").write_text(json.dumps(config | {"plugins": [str(plugin)]}))
    write_report(copies[1:2], tmp_path / "page.html", images=100, device="cpu")


def test_one_run_alone(real_runs, tmp_path):
    text = write_report(real_runs[1:2], tmp_path / "page.html", images=100, device="cpu").read_text()
    for absent in ("gains", "correlation", "cost", "settings", "missing"):
        assert f'<section aria-labelledby="{absent}">' not in text
    for present in ("confusions", "features"):
        assert f'<section aria-labelledby="{present}">' in text


def test_the_folder_may_have_moved(real_runs, tmp_path):
    moved = shutil.copytree(real_runs[1], tmp_path / "moved")
    assert "missing" not in write_report([moved], tmp_path / "p.html", images=50).read_text().split("<nav")[1]
