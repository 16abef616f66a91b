"""`mdistiller detect train` and `mdistiller detect eval`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from mdistiller.cli.detect import parse_train
from mdistiller.recipes.coco import get_detection_recipe
from mdistiller.tasks.detection.config import DetectionConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "detection"))
from tiny_detectors import two_stage, write_set

RECIPE = "small.dkd.fasterrcnn_resnet50_resnet18"
FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl")


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
    done = cli("detect", "train", "small.teacher.fasterrcnn_resnet50", *flags, "--out", out)
    assert done.code == 0, done.err
    assert "test AP: last epoch " in done.message
    assert done.out == ""
    return out


@pytest.fixture(scope="module")
def student(cli, flags, teacher):
    out = teacher.parent / "student"
    return out, cli(
        "detect", "train", RECIPE, *flags, "--teacher.checkpoint", teacher, "--out", out, "--json"
    )


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
    done = cli("detect", "train", out / "config.json", "--out", tmp_path / "again")
    assert done.code == 0, done.err
    assert cli.timeless(tmp_path / "again") == cli.timeless(out)
    ours, theirs = ((f / "student.safetensors").read_bytes() for f in (tmp_path / "again", out))
    assert ours == theirs
    for path in (out, out / "config.json"):
        assert cli("detect", "train", path, "--resume").code == 0  # there is nothing left to do
    done = cli("detect", "train", out / "config.json", "--out", out)
    assert done.code == 2
    assert f"go on with `mdistiller detect train {out / 'config.json'} --resume`" in done.message


def test_eval_gives_the_last_line_of_the_run(cli, student, data):
    out, _ = student
    last = next(line for line in reversed(cli.metrics(out)) if line["kind"] == "eval")
    done = cli("detect", "eval", out, "--data.root", data, "--device", "cpu", "--json")
    assert done.code == 0, done.err
    told = done.json()
    assert {name: told[name] for name in (*FIGURES, "categories")} == {
        name: last[name] for name in (*FIGURES, "categories")
    }
    assert (told["detector"], told["images"]) == ("fasterrcnn_resnet18", 4)
    text = cli("detect", "eval", out / "student.safetensors", "--data.root", data, "--device", "cpu")
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
    done = cli("detect", "eval", file, *where)
    assert (done.code, "give --detector NAME" in done.message) == (2, True)
    size = ("short_side", "64", "long_side", "96", "box_score_thresh", "0.0")
    done = cli("detect", "eval", file, *where, "--detector", "fasterrcnn_resnet18", "--options", *size)
    assert done.code == 0, done.err
    assert done.json()["AP"] == cli("detect", "eval", out, *where).json()["AP"]


def test_masks(cli, flags, data, tmp_path):
    out = tmp_path / "run"
    done = cli("detect", "train", "small.student.maskrcnn_resnet18", *flags, "--max-steps", 2, "--out", out)
    assert done.code == 0, done.err
    last = next(line for line in reversed(cli.metrics(out)) if line["kind"] == "eval")
    assert set(FIGURES) <= last["masks"].keys()
    done = cli("detect", "eval", out, "--data.root", data, "--data.masks", "--device", "cpu")
    assert [line.split(":")[0] for line in done.out.splitlines()[:2]] == ["boxes", "masks"]
    assert all("  masks " in line for line in done.out.splitlines()[2:])


def test_report(cli, teacher, student, tmp_path):
    page = tmp_path / "report.html"
    done = cli("report", teacher, student[0], "--out", page, "--images", 2, "--device", "cpu", "--json")
    assert done.code == 0, done.err
    assert [row["figure"] for row in done.json()] == ["AP", "AP"]
    assert "Boxes on test images" in page.read_text()


def test_options():
    parsed = parse_train([RECIPE, "--method", "fgfi", "--method.threshold", "0.4", "--augment.no-flip"])
    assert parsed.config.recipe == "small.fgfi.fasterrcnn_resnet50_resnet18"
    assert (parsed.config.method.threshold, parsed.config.augment.flip) == (0.4, False)
    assert parsed.config.student.name == "fasterrcnn_resnet18"
    assert parse_train([RECIPE]).config == get_detection_recipe(RECIPE)
    changed = parse_train([RECIPE, "--method", "reviewkd+dkd"]).config
    assert (changed.method.dkd.beta, changed.method.reviewkd.weight) == (0.25, 1.0)


def test_every_field_is_a_flag(cli):
    done = cli("detect", "train", RECIPE, "--help")
    assert (done.code, done.err) == (0, "")
    hidden = {"recipe", "plugins", "data.kind"}

    def names(model, prefix=""):
        for name in type(model).model_fields:
            value = getattr(model, name)
            if hasattr(type(value), "model_fields"):
                yield from names(value, f"{prefix}{name}.")
            elif prefix + name not in hidden:
                yield f"--{prefix}{name}".replace("_", "-")

    for flag in names(get_detection_recipe(RECIPE)):
        assert f"{flag} " in done.out or f"{flag}," in done.out, flag
    assert "--data.kind" not in done.out


def test_a_stored_config_with_another_method(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(get_detection_recipe(RECIPE).model_dump(mode="json")))
    config = parse_train([str(path), "--method", "fitnet"]).config
    assert isinstance(config, DetectionConfig)
    assert config.recipe == "small.fitnet.fasterrcnn_resnet50_resnet18"
    assert (config.method.method_name, config.method.relu) == ("fitnet", False)


def test_help(cli):
    for words in ((), ("train",)):
        done = cli("detect", *words, "--help")
        assert (done.code, done.err) == (0, "")
        for text in ("usage: mdistiller detect train RECIPE", "detect eval CHECKPOINT", "--json", "torchrun"):
            assert text in done.out
    done = cli("detect", "eval", "--help")
    assert (done.code, "--data.root" in done.out) == (0, True)
    assert "\n  detect " in cli("--help").out


def test_bad_usage(cli, student, data, tmp_path):
    out, _ = student
    other = tmp_path / "other"
    write_set(other, 2, "instances_val.json", change=rename)
    (tmp_path / "typo.json").write_text('{"student": {"name": "x"}, "data": {"rot": "x"}}')
    classifier = tmp_path / "classifier.json"
    classifier.write_text('{"student": {"name": "resnet8"}, "data": {"kind": "digits"}}')
    cases = [
        (("detect",), 2, "needs train or eval first"),
        (("detect", "trian"), 2, "nearest: train"),
        (("detect", "train"), 2, "needs a recipe first"),
        (("detect", "train", "small.dkd.fasterrcnn_resnet50_resnet19"), 2, "pair of detectors"),
        (("detect", "train", RECIPE, "--method", "crd"), 2, "method for detectors 'crd'"),
        (
            ("detect", "train", "small.student.fasterrcnn_resnet18", "--method", "kd"),
            2,
            "trains one detector",
        ),
        (("detect", "train", RECIPE, "--batch-size", "0"), 2, "--batch-size: Input should be greater"),
        (("detect", "train", RECIPE, "--compile"), 2, "compile: not for detectors"),
        (("detect", "train", RECIPE, "--data.root", tmp_path / "no"), 1, "has no"),
        (("detect", "train", tmp_path / "typo.json"), 2, "nearest: root"),
        (("detect", "train", classifier), 2, "so it is for `mdistiller train`"),
        (("train", out / "config.json"), 2, "'coco', so it is for `mdistiller detect train`"),
        (("train", RECIPE), 2, "detectors: mdistiller detect train"),
        (("export", out, "--out", tmp_path / "x"), 1, "allowed: a run folder of `mdistiller train`"),
        (("detect", "eval", tmp_path / "no", "--data.root", data), 1, "no such checkpoint"),
        (
            ("detect", "eval", out, "--data.root", other),
            2,
            "was trained on the 3 categories red, green, blue",
        ),
        (("detect", "eval", out, "--data.root", data, "--batch-size", "0"), 2, "batch_size: got 0"),
    ]
    for argv, code, message in cases:
        done = cli(*argv)
        assert (done.code, done.out) == (code, ""), (argv, done)
        assert message in done.message, (argv, done.message)


def rename(content):
    content["categories"][0]["name"] = "scarlet"
