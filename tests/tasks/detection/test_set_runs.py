"""Runs of transformers' detectors: AP rises, states resume, five commands end in a D-FINE as ONNX."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_runs import StopAfter
from tiny_detectors import write_set
from tiny_sets import SIDE, TINY, tiny_set

import mdistiller
from mdistiller.cli.main import run
from mdistiller.errors import Interrupted
from mdistiller.recipes import get_recipe
from mdistiller.runs.folder import read_metrics
from mdistiller.training.launch import train

transformers = pytest.importorskip("transformers", minversion="5")
PAGE = Path(__file__).parents[3] / "docs" / "detection.md"


def config(root, out, recipe="small.teacher.transformers/rt_detr", kind="rt_detr", **changes):
    settings = {
        "data": {"root": root, "workers": 0},
        "augment": {"short_sides": (SIDE,), "long_side": 80},
        "student": {"options": TINY[kind]},
        "optim": {"lr": 2e-3, "lr_warmup_steps": 5},
        "batch_size": 4,
        "eval_batch_size": 8,
        "device": "cpu",
        "out": out,
    }
    return get_recipe(recipe).replace(**settings | changes)


def test_recipes():
    for kind in TINY:
        found = get_recipe(f"coco.detrdistill.transformers/{kind}_transformers/d_fine")
        assert (found.teacher.name, found.teacher.options) == (f"transformers/{kind}", {})
        assert (found.optim.name, found.optim.clip_norm, found.method.method_name) == (
            "adamw",
            0.1,
            "detrdistill",
        )
    assert get_recipe("small.student.transformers/d_fine").student.options == {"size": 320}


def test_average_precision_rises_on_drawn_squares(tmp_path):
    write_set(tmp_path, 48)
    write_set(tmp_path, 16, "instances_val.json", seed=1)
    train(config(tmp_path, tmp_path / "run", epochs=40, eval_every=2, max_steps=240))
    found = [line["AP50"] for line in read_metrics(tmp_path / "run") if line["kind"] == "eval"]
    assert found[-1] > 15
    assert found[-1] > 3 * found[0], found


def test_a_run_that_was_stopped_goes_on_exactly(squares, tmp_path):
    teacher = tmp_path / "teacher"
    train(config(squares, teacher, "small.teacher.transformers/d_fine", "d_fine", epochs=1))
    for method in ("detrdistill", "ld"):
        changes = {
            "kind": "d_fine",
            "epochs": 3,
            "teacher": {"name": "transformers/d_fine", "checkpoint": teacher},
        }
        recipe = f"small.{method}.transformers/d_fine_transformers/d_fine"
        whole, parts = (
            config(squares, tmp_path / f"{name}-{method}", recipe, **changes) for name in ("whole", "parts")
        )
        train(whole)
        with pytest.raises(Interrupted, match="SIGTERM after step 3"):
            train(parts, reporter=StopAfter(3))
        train(parts, resume=True)
        a, b = (load_file(c.out / "student.safetensors") for c in (whole, parts))
        assert a.keys() == b.keys()
        assert [key for key in a if not torch.equal(a[key], b[key])] == []


def roboflow(folder):
    """A folder as Roboflow exports it: train/ and valid/, each with images and _annotations.coco.json."""
    for split, name, seed in (("train", "instances_train.json", 0), ("valid", "instances_val.json", 1)):
        write_set(folder / "own", 8, name, seed=seed)
        (folder / split).mkdir(parents=True)
        whole = json.loads((folder / "own" / name).read_text())
        whole["categories"] = [{"id": 0, "name": "squares", "supercategory": "none"}] + [
            {**category, "supercategory": "squares"} for category in whole["categories"]
        ]
        (folder / split / "_annotations.coco.json").write_text(json.dumps(whole))
        for image in whole["images"]:
            with Image.open(folder / "own" / "images" / image["file_name"]) as picture:
                picture.save(folder / split / image["file_name"])
    return folder


def test_five_commands_from_a_folder_to_a_distilled_d_fine_in_onnx(tmp_path, monkeypatch, capsys):
    """The commands of the page, with tiny detectors in place of the page's."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    monkeypatch.chdir(tmp_path)
    roboflow(tmp_path / "my-data")
    for name, options in (("d_fine_s", {}), ("d_fine_n", {"num_queries": 10})):
        folder = tmp_path / "examples" / name
        tiny_set("d_fine", **options).detr.config.save_pretrained(folder)
    text = PAGE.read_text().partition("### Five commands")[2]
    commands = re.search(r"```\n(.*?)```", text, re.DOTALL)[1].replace("\\\n", " ").splitlines()
    assert len(commands) == 5
    tiny = (
        f"--augment.short-sides {SIDE} --augment.long-side 80 --max-steps 2 --batch-size 2 --data.workers 0"
    )
    for line in commands:
        words = shlex.split(line)[1:]
        if words[0] == "train":
            at = words.index("size")
            words = [*words[: at + 1], str(SIDE), *words[at + 2 :], *tiny.split(), "--device", "cpu"]
        if words[0] == "predict":
            (tmp_path / "photographs").mkdir()
            (tmp_path / "my-data" / "valid" / "instances_va0.png").rename(
                tmp_path / "photographs" / "one.png"
            )
        assert run(words) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "largest difference to the student's outputs" in said
    assert (
        json.loads((tmp_path / "runs" / "student" / "config.json").read_text())["method"]["name"] == "fitnet"
    )
    assert mdistiller.load_student("runs/student").detr.config.num_queries == 10
    assert (tmp_path / "my-detector" / "model.onnx").is_file()


def test_folders_on_the_command_line(squares, tmp_path, monkeypatch, capsys):
    """The teacher's weights and the student's are folders, which the run's student does not need again."""
    folders = []
    for name, classes in (("teacher", ("blue", "green", "red")), ("student", ("red", "cat", "dog"))):
        model = tiny_set("rt_detr")
        model.detr.config.id2label = dict(enumerate(classes))
        model.detr.save_pretrained(tmp_path / name)
        size = {"size": {"height": SIDE, "width": SIDE}, "do_normalize": False}
        (tmp_path / name / "preprocessor_config.json").write_text(json.dumps(size))
        folders.append(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    command = "train small.detrdistill.transformers/rt_detr_transformers/rt_detr --device cpu --out run "
    command += "--teacher.options weights teacher --student.options weights student num_queries 9 "
    command += f"--data.root {squares} --max-steps 2 --batch-size 2 --data.workers 0 --augment.short-sides 64"
    with (
        pytest.warns(UserWarning, match="student has no class 'green', 'blue': their outputs start"),
        pytest.warns(UserWarning, match="teacher: its classes were put into the data's order"),
    ):
        assert run(command.split()) == 0, capsys.readouterr().err
    for folder in folders:
        folder.rename(tmp_path / f"{folder.name}-moved")
    monkeypatch.chdir("/")
    assert run(["eval", str(tmp_path / "run")]) == 0
    assert "(4 images)" in capsys.readouterr().out
    student = mdistiller.load_student(tmp_path / "run")
    assert (student.detr.config.num_queries, student.size) == (9, SIDE)
    # A run's student as the start of another: classes are matched by their names too.
    for split in ("train", "val"):
        file = squares / f"instances_{split}.json"
        whole = json.loads(file.read_text())
        whole["categories"].insert(0, {"id": 1, "name": "black"})
        file.write_text(json.dumps(whole))
    again = config(
        squares, tmp_path / "again", student={"checkpoint": tmp_path / "run"}, max_steps=1, epochs=1
    )
    with pytest.warns(UserWarning, match="has no class 'black': their outputs start"):
        train(again)
    assert mdistiller.load_student(tmp_path / "again").detr.config.num_labels == 4
