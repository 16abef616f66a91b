"""Detectors on the command line: train, eval, export, predict, report."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mdistiller import get_recipe, load_export, load_student
from mdistiller.cli.train import TrainCommand
from mdistiller.data.decoder import read_image
from mdistiller.tasks.detection.config import DetectionConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "tasks" / "detection"))
from small_runs import run_card
from test_detection_layouts import to_yolo
from tiny_detectors import two_stage, write_set

RECIPE = "small.dkd.fasterrcnn_resnet50_resnet18"
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def tiny(name, num_classes, *, short_side, long_side, **options):
    """Every detector by name is a tiny one; resnet50's is wider."""
    seed, width = int(torch.randint(1000, ())), 16 if "resnet50" in name else 8
    size = {"min_size": short_side, "max_size": long_side}
    masks = name.startswith("maskrcnn")
    return two_stage(seed, width, masks=masks, classes=num_classes, **size, **options)


@pytest.fixture(autouse=True, scope="module")
def _tiny():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mdistiller.tasks.detection.models.create_detector", tiny)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_set(folder, 6)
    write_set(folder, 4, "instances_val.json", seed=1)
    return folder


@pytest.fixture(scope="module")
def flags(data):
    return (
        *("--data.root", data, "--data.workers", 0, "--device", "cpu", "--batch-size", 2, "--epochs", 2),
        *("--eval-every", 1, "--augment.short-sides", 56, 64, "--augment.long-side", 96, "--log-every", 1),
        *("--student.options", "box_score_thresh", "0.0"),
    )


@pytest.fixture(scope="module")
def teacher(cli, flags, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "teacher"
    done = cli("train", "small.teacher.fasterrcnn_resnet50", *flags, "--out", out)
    assert done.code == 0, done.err
    assert "test AP: last epoch " in done.message
    assert done.out == ""
    return out


@pytest.fixture(scope="module")
def student(cli, flags, teacher):
    out = teacher.parent / "student"
    return out, cli("train", RECIPE, *flags, "--teacher.checkpoint", teacher, "--out", out, "--json")


def test_train(cli, student):
    out, done = student
    assert done.code == 0, done.err
    assert done.json() == {"out": str(out), **cli.metrics(out)[-1]}
    assert {p.name for p in out.iterdir()} >= {
        *("config.json", "env.json", "metrics.jsonl", "student.safetensors", "resume.pt", "report.html")
    }
    assert cli.config(out)["method"]["name"] == "dkd"
    last = cli.metrics(out)[-2]
    assert f"AP {last['AP']:.2f} % best {last['best_AP']:.2f} %" in " ".join(done.err.split())
    assert "Average precision" in (out / "report.html").read_text()


def test_a_config_json_repeats_the_run(cli, student, tmp_path):
    out, _ = student
    done = cli("train", out / "config.json", "--out", tmp_path / "again")
    assert done.code == 0, done.err
    assert cli.timeless(tmp_path / "again") == cli.timeless(out)
    ours, theirs = ((f / "student.safetensors").read_bytes() for f in (tmp_path / "again", out))
    assert ours == theirs
    for path in (out, out / "config.json"):
        assert cli("train", path, "--resume").code == 0  # there is nothing left to do
    done = cli("train", out / "config.json", "--out", out)
    assert done.code == 2
    assert f"go on with `mdistiller train {out / 'config.json'} --resume`" in done.message


def test_eval_gives_the_last_line_of_the_run(cli, student):
    out, _ = student
    last = next(line for line in reversed(cli.metrics(out)) if line["kind"] == "eval")
    done = cli("eval", out, "--device", "cpu", "--json")
    assert done.code == 0, done.err
    found = done.json()
    assert {name: found[name] for name in (*METRICS, "categories")} == {
        name: last[name] for name in (*METRICS, "categories")
    }
    assert (found["model"], found["checkpoint"], found["images"]) == ("fasterrcnn_resnet18", str(out), 4)
    text = cli("eval", out / "student.safetensors", "--device", "cpu")
    first, *categories = text.out.splitlines()
    assert first.startswith(f"boxes: AP {last['AP']:5.2f}  AP50 {last['AP50']:5.2f}")
    assert first.endswith("(4 images)")
    assert [line.split()[0] for line in categories] == ["red", "green", "blue"]


def test_eval_of_a_torch_file_needs_the_detectors_name(cli, student, data, tmp_path):
    from safetensors.torch import load_file

    out, _ = student
    file = tmp_path / "model.pt"
    torch.save({"model": load_file(out / "student.safetensors")}, file)
    where = ("--data.root", data, "--device", "cpu", "--json")
    done = cli("eval", file)
    assert (done.code, f"give the model's name and --checkpoint {file}" in done.message) == (2, True)
    size = ("short_side", "64", "long_side", "96", "box_score_thresh", "0.0")
    done = cli("eval", "fasterrcnn_resnet18", "--checkpoint", file, "--options", *size, *where)
    assert done.code == 0, done.err
    assert done.json()["AP"] == cli("eval", out, *where).json()["AP"]


def test_masks(cli, flags, data, tmp_path):
    out = tmp_path / "run"
    done = cli("train", "small.student.maskrcnn_resnet18", *flags, "--max-steps", 2, "--out", out)
    assert done.code == 0, done.err
    last = next(line for line in reversed(cli.metrics(out)) if line["kind"] == "eval")
    assert set(METRICS) <= last["masks"].keys()
    done = cli("eval", out, "--device", "cpu")
    assert [line.split(":")[0] for line in done.out.splitlines()[:2]] == ["boxes", "masks"]
    assert all("  masks " in line for line in done.out.splitlines()[2:])


def test_report(cli, teacher, student, tmp_path):
    page = tmp_path / "report.html"
    done = cli("report", teacher, student[0], "--out", page, "--images", 2, "--device", "cpu", "--json")
    assert done.code == 0, done.err
    assert [row["metric"] for row in done.json()] == ["AP", "AP"]
    assert "Boxes on test images" in page.read_text()


def test_options():
    parsed = TrainCommand.parse(
        [RECIPE, "--method", "fgfi", "--method.threshold", "0.4", "--augment.no-flip"]
    )
    assert parsed.config.recipe == "small.fgfi.fasterrcnn_resnet50_resnet18"
    assert (parsed.config.method.threshold, parsed.config.augment.flip) == (0.4, False)
    assert parsed.config.student.name == "fasterrcnn_resnet18"
    assert TrainCommand.parse([RECIPE]).config == get_recipe(RECIPE)
    changed = TrainCommand.parse([RECIPE, "--method", "reviewkd+dkd"]).config
    assert (changed.method.dkd.beta, changed.method.reviewkd.weight) == (0.25, 1.0)


def test_every_field_is_a_flag(cli):
    done = cli("train", RECIPE, "--help-all")
    assert (done.code, done.err) == (0, "")
    hidden = {"task", "recipe", "plugins", "teacher_weight"}
    # What a detector refuses has no flag either; a teacher of its backbone has images of its own.
    hidden |= {f"student.{name}" for name in ("mean", "std", "image_size", "images")}
    hidden |= {"probe_epochs", "gradient_checkpointing", "compile"}

    def names(model, prefix=""):
        for name in type(model).model_fields:
            value = getattr(model, name)
            if hasattr(type(value), "model_fields"):
                yield from names(value, f"{prefix}{name}.")
            elif prefix + name not in hidden:
                yield f"--{prefix}{name}".replace("_", "-")

    for flag in names(get_recipe(RECIPE)):
        assert f"{flag} " in done.out or f"{flag}," in done.out, flag
    for flag in hidden:
        name = f"--{flag}".replace("_", "-")
        assert f"{name} " not in done.out
        assert cli("train", RECIPE, name, "1").code == 2


def test_a_stored_config_with_another_method(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(get_recipe(RECIPE).model_dump(mode="json")))
    config = TrainCommand.parse([str(path), "--method", "fitnet"]).config
    assert isinstance(config, DetectionConfig)
    assert config.recipe == "small.fitnet.fasterrcnn_resnet50_resnet18"
    assert (config.method.method_name, config.method.relu) == ("fitnet", False)


def test_help(cli, student):
    done = cli("train", "--help")
    for text in ("coco, small", "coco.dkd.fasterrcnn_resnet101_resnet18", "maskrcnn", "mobilenet_v2"):
        assert text in done.out
    done = cli("eval", student[0], "--help")
    assert (done.code, "--data.root" in done.out, "--data.masks" in done.out) == (0, True, True)
    assert f"(default: {student[0].name}" not in done.out


@pytest.fixture(scope="module")
def exports(cli, student):
    """An exported folder of each format, and what the command gave."""
    formats = ("safetensors", "onnx")
    return {format: cli("export", student[0], "--format", format, "--json") for format in formats}


def test_detectors_have_no_int8(cli, student):
    done = cli("export", student[0], "--format", "onnx", "--int8")
    assert (done.code, "allowed: runs of classification" in done.message) == (2, True)


@pytest.mark.parametrize("format", ["safetensors", "onnx"])
def test_export(cli, student, exports, format):
    done = exports[format]
    assert done.code == 0, done.err
    card = done.json()
    folder = Path(card.pop("out"))
    assert folder == student[0] / "export" / f"student-{format}"
    assert card == json.loads((folder / "card.json").read_text())
    expected = {
        "task": "detection",
        "model": "fasterrcnn_resnet18",
        "classes": ["red", "green", "blue"],
        "teacher": "fasterrcnn_resnet50",
        "recipe": RECIPE,
    }
    assert {key: card[key] for key in expected} == expected
    lines = [line for line in cli.metrics(student[0]) if line["kind"] == "eval"]
    assert card["accuracy"]["metric"] == "AP"
    assert card["accuracy"]["value"] == lines[-1]["AP"]
    measured = card["measured"]  # boxes of the file itself; those of masks are no output
    assert measured["metric"] == "AP"
    assert measured["student"] == pytest.approx(lines[-1]["AP"], abs=0.2)
    assert measured["value"] == pytest.approx(measured["student"], abs=0.2)
    assert (measured["agreement"], len(card["image_shape"]), list(card["speed"]["ms"])) == (None, 3, ["1"])
    assert card["macs"] > 1e5
    assert 0 <= card["check"]["largest_difference"] <= 1e-4
    assert card["check"]["input_shapes"] == [[3, 120, 90], [3, 96, 128], [3, 150, 100]]
    content = (folder / "README.md").read_text() + json.dumps(card)
    for path in (student[0], Path(torch.__file__).parents[1]):
        assert str(path) not in content
        assert str(path).encode() not in (folder / card["file"]).read_bytes()


@pytest.mark.parametrize("format", ["safetensors", "onnx"])
def test_the_code_in_the_card_predicts_a_photo(exports, tmp_path, format):
    folder = exports[format].json()["out"]
    names, printed, path = run_card(folder, tmp_path, (96, 64))
    exported = load_export(folder, "cpu")
    (found,) = exported.predict([path], top=1000)
    if format == "safetensors":
        assert printed == f"{exported.predict([path])}\n"
        return
    np.testing.assert_array_equal(names["image"], exported.prepare(read_image(path)))
    assert names["boxes"].shape == (len(names["scores"]), 4)
    likely = sorted(box.label for box in found if box.score >= 0.3)
    assert sorted(line.split()[0] for line in printed.splitlines() if line[0].isalpha()) == likely


def test_predict(cli, student, data, exports):
    """A run and its exports find the same boxes; the numbers are those of the student itself."""
    paths = sorted((data / "images").iterdir())[:2]
    model = load_student(student[0])
    with torch.no_grad():
        images = [torch.from_numpy(np.array(read_image(path))).permute(2, 0, 1) / 255 for path in paths]
        expected = [model([image])[0] for image in images]
    sources = [student[0], student[0] / "student.safetensors"]
    sources += [exports[format].json()["out"] for format in exports]
    for source in sources:
        rows = cli("predict", source, *paths, "--top", 3, "--json", "--device", "cpu").json()
        assert [row["image"] for row in rows] == [str(path) for path in paths]
        for row, found in zip(rows, expected, strict=True):
            assert len(row["boxes"]) == 3
            for box, score, label, corners in zip(
                row["boxes"], found["scores"], found["labels"], found["boxes"], strict=False
            ):
                assert box["label"] == ("red", "green", "blue")[label - 1]
                assert box["score"] == pytest.approx(score.item(), abs=1e-4)
                place = [box[name] for name in ("x1", "y1", "x2", "y2")]
                assert place == pytest.approx(corners.tolist(), abs=0.02)
    done = cli("predict", student[0], paths[0], "--top", 1, "--device", "cpu")
    (box,) = cli("predict", student[0], paths[0], "--top", 1, "--device", "cpu", "--json").json()[0]["boxes"]
    corners = " ".join(f"{box[name]:.1f}" for name in ("x1", "y1", "x2", "y2"))
    assert done.out == f"{paths[0]}\n  {100 * box['score']:6.2f} %  {box['label']}  {corners}\n"


def test_predictions_of_eval_give_its_metrics(cli, student, data, tmp_path):
    """pycocotools reads the file, and computes the same AP from it."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    file = tmp_path / "new" / "predictions.json"
    done = cli("eval", student[0], "--device", "cpu", "--predictions", file, "--json")
    assert done.code == 0, done.err
    truth = COCO(data / "instances_val.json")
    evaluation = COCOeval(truth, truth.loadRes(str(file)), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert [done.json()[name] for name in METRICS] == [
        None if value < 0 else pytest.approx(100 * value) for value in evaluation.stats[:6]
    ]


def test_predict_draws_the_boxes_of_a_folder(cli, student, data, tmp_path):
    paths = sorted((data / "images").iterdir())
    flags = ("--top", 40, "--device", "cpu", "--json", "--min-score")
    everything = cli("predict", student[0], data / "images", *flags, 0).json()
    assert [row["image"] for row in everything] == list(map(str, paths))
    middle = float(np.median([box["score"] for row in everything for box in row["boxes"]]))
    done = cli("predict", student[0], data / "images", *flags, middle, "--draw", tmp_path / "drawn")
    assert done.code == 0, done.err
    rows = done.json()
    expected = [[box for box in row["boxes"] if box["score"] >= middle] for row in everything]
    assert [row["boxes"] for row in rows] == expected
    for path, row in zip(paths, rows, strict=True):
        before, after = Image.open(path), Image.open(tmp_path / "drawn" / f"{path.stem}.png")
        factor = -(-320 // min(before.size))
        assert after.size == (factor * before.width, factor * before.height)
        same = before.resize(after.size, Image.Resampling.NEAREST)
        assert (np.array(same) != np.array(after)).any() == bool(row["boxes"])
    again = cli("predict", student[0], paths[0], "--draw", tmp_path / "drawn")
    assert (again.code, "is not empty; allowed: a new or empty folder" in again.message) == (2, True)
    (tmp_path / "nothing").mkdir()
    none = cli("predict", student[0], tmp_path / "nothing")
    assert (none.code, "has no images, which end in .jpg" in none.message) == (1, True)


@pytest.mark.parametrize("draw", [False, True])
def test_predict_leaves_out_unreadable_images_if_asked(cli, student, data, tmp_path, monkeypatch, draw):
    sound = sorted((data / "images").iterdir())[:2]
    for path in sound:
        shutil.copy(path, tmp_path)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    flags = ("--device", "cpu", "--json", *(("--draw", tmp_path / "drawn") if draw else ()))
    failed = cli("predict", student[0], tmp_path, *flags)
    assert (failed.code, "broken.jpg cannot be read" in failed.message) == (1, True)
    shutil.rmtree(tmp_path / "drawn", ignore_errors=True)
    opened, pillows = [], Image.open
    monkeypatch.setattr(Image, "open", lambda file: opened.append(Path(file).name) or pillows(file))
    with pytest.warns(UserWarning, match="left out 1 of 3 images: .*broken.jpg cannot be read"):
        done = cli("predict", student[0], tmp_path, *flags, "--on-error", "skip")
    assert sorted(opened) == sorted(["broken.jpg", *(path.name for path in sound)])  # each once
    assert [Path(row["image"]).name for row in done.json()] == [path.name for path in sound]
    only = cli("predict", student[0], tmp_path / "broken.jpg", *flags[:3], "--on-error", "skip")
    assert (only.code, "broken.jpg cannot be read" in only.message) == (1, True)


def test_a_folder_in_yolo_s_layout(cli, flags, teacher, student, data, tmp_path):
    """The same images as text files: the same AP, and a run with a teacher and a student's weights."""
    root = tmp_path / "mine"
    to_yolo(data, root)
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [red, green, blue]\n")
    found, expected = (cli("eval", student[0], "--data.root", folder, "--json") for folder in (root, data))
    assert found.code == 0, found.err
    assert found.json()["categories"] == pytest.approx(expected.json()["categories"], abs=1e-6)
    more = ("--teacher.checkpoint", teacher, "--student.checkpoint", student[0], "--max-steps", 2)
    done = cli("train", RECIPE, *flags, "--data.root", root, *more, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert "mine: 6 training images with 12 objects, 4 test images, 3 categories" in done.err
    assert cli.config(tmp_path / "run")["data"]["kind"] == "auto"


def test_an_export_from_python(exports):
    exported = load_export(exports["onnx"].json()["out"])
    boxes, labels, scores = exported(torch.rand(3, 80, 70))
    assert (boxes.dtype, labels.dtype, scores.dtype) == (torch.float32, torch.int64, torch.float32)
    assert boxes.shape == (len(labels), 4)
    assert boxes[:, 0::2].max() <= 70
    assert boxes[:, 1::2].max() <= 80


def test_a_format_that_detectors_lack(cli, student, tmp_path):
    done = cli("export", student[0], "--format", "torch-export", "--out", tmp_path / "x")
    assert (done.code, done.out) == (1, "")
    words = "fasterrcnn_resnet18 cannot be exported as torch-export (other formats: safetensors, onnx): "
    assert done.message.startswith(f"mdistiller: {words}")
    assert not (tmp_path / "x").exists()


def test_bad_usage(cli, student, data, tmp_path):
    out, _ = student
    other = tmp_path / "other"
    write_set(other, 2, "instances_val.json", change=rename)
    typo = '{"task": "detection", "student": {"name": "x"}, "data": {"rot": "x"}}'
    (tmp_path / "typo.json").write_text(typo)
    cases = [
        (("detect", "train", RECIPE), 2, "unknown command 'detect'"),
        (("train", "small.dkd.fasterrcnn_resnet50_resnet19"), 2, "pair of detectors"),
        (("train", RECIPE, "--method", "crd"), 2, "method for detectors 'crd'"),
        (("train", "small.student.fasterrcnn_resnet18", "--method", "kd"), 2, "trains one model"),
        (("train", RECIPE, "--batch-size", "0"), 2, "--batch-size: Input should be greater"),
        (("train", RECIPE, "--compile"), 2, "--compile"),
        (("train", "small.student.fasterrcnn_resnet18", "--data.root", tmp_path / "no"), 1, "has no"),
        (("train", tmp_path / "typo.json"), 2, "nearest: root"),
        (("eval", "fasterrcnn_resnet18", "--checkpoint", tmp_path / "no"), 1, "no such checkpoint"),
        (("eval", "fasterrcnn_resnet19", "--checkpoint", tmp_path / "no"), 2, "nearest: fasterrcnn_resnet18"),
        (("eval", out, "--data.root", other), 2, "in the data: scarlet; only in the model: red: evaluate it"),
        (("eval", out, "--data.root", data, "--batch-size", "0"), 2, "batch_size: got 0"),
        (("predict", out, tmp_path / "no.png"), 1, "no.png cannot be read"),
    ]
    for argv, code, message in cases:
        done = cli(*argv)
        assert (done.code, done.out) == (code, ""), (argv, done)
        assert message in done.message, (argv, done.message)


def rename(content):
    content["categories"][0]["name"] = "scarlet"
