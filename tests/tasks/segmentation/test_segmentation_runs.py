"""Runs of segmentation models: training, resume, evaluation, files, prediction, export."""

import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
from masked_squares import CLASSES, MODEL, TEACHER, pair, settings, student, write_squares
from PIL import Image
from processes import run_group
from safetensors.torch import load_file
from small_runs import StopAfter, run_card

import mdistiller
from mdistiller.cli.eval import EvalCommand
from mdistiller.cli.main import run as command
from mdistiller.cli.predict import PredictCommand
from mdistiller.data.decoder import read_image
from mdistiller.deploy.export import export_student
from mdistiller.deploy.predict import load_predictor
from mdistiller.errors import CheckpointError, ConfigError, Interrupted, UnknownNameError
from mdistiller.models import ModelConfig
from mdistiller.recipes import get_recipe, list_recipes, set_method
from mdistiller.report import write_report
from mdistiller.runs.checkpoint import load_state, save_student
from mdistiller.runs.folder import read_metrics
from mdistiller.taps import tap
from mdistiller.tasks.segmentation.config import SegmentationConfig
from mdistiller.tasks.segmentation.methods import list_segmentation_methods
from mdistiller.tasks.segmentation.segmenter import create_segmenter
from mdistiller.training.distributed import World
from mdistiller.training.launch import train
from mdistiller.training.task import get_task

CLOCK = {"ms_per_step", "seconds"}


@pytest.fixture(scope="module")
def teacher(squares, tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher") / "run"
    recipe = get_recipe(f"coco-seg.teacher.{TEACHER}")
    changes = settings(squares, epochs=20, eval_every=20, out=out, optim={"lr": 3e-3})
    return train(recipe.replace(**changes, student={"options": {"output_stride": 32}}, log_every=4)).path


@pytest.fixture(scope="module")
def runs(squares, teacher, tmp_path_factory):
    """Runs of the student alone, KD, and a sum of methods."""
    folder = tmp_path_factory.mktemp("runs")
    configs = [student(squares, epochs=3, out=folder / "alone")]
    configs += [pair(squares, m, teacher, epochs=3, out=folder / m) for m in ("kd", "dkd+cwd+skd")]
    for one in configs:
        train(one)
    return folder


def timeless(folder):
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in read_metrics(folder)]


def assert_same(a, b):
    """Bit for bit."""
    a, b = (load_file(path / "student.safetensors") for path in (a, b))
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def test_metrics_and_losses_of_a_run(runs, teacher):
    lines = read_metrics(runs / "dkd+cwd+skd")
    last = [line for line in lines if line["kind"] == "eval"][-1]
    assert {"mIoU", "pixel_accuracy", "mean_accuracy", "best_mIoU"} <= last.keys()
    assert tuple(last["classes"]) == CLASSES
    assert {"task", "dkd", "cwd", "skd", "loss", "pixel_accuracy"} <= last["train"].keys()
    (first, *_, final) = [line["loss"] for line in read_metrics(teacher) if line["kind"] == "train"]
    assert final < 0.8 * first
    assert read_metrics(teacher)[-2]["mIoU"] > 30


def test_a_run_that_was_stopped_within_an_epoch_goes_on_exactly(runs, squares, teacher, tmp_path):
    again = pair(squares, "dkd+cwd+skd", teacher, epochs=3, out=tmp_path / "run")
    with pytest.raises(Interrupted, match=r"SIGTERM after step 3.*--resume"):
        train(again, reporter=StopAfter(3))
    assert load_state(tmp_path / "run" / "resume.pt")["batch"] == 1
    train(again, resume=True)
    assert_same(tmp_path / "run", runs / "dkd+cwd+skd")
    assert timeless(tmp_path / "run") == timeless(runs / "dkd+cwd+skd")


def test_an_auxiliary_classifier_accumulation_and_the_own_average(squares, tmp_path):
    recipe = get_recipe("coco-seg.kd.fcn_self_resnet18")
    changes = settings(squares, epochs=1, optim={"accumulate": 2}, out=tmp_path / "run", eval_every=1)
    options = {"options": {"aux": True, "output_stride": 32}}
    run = train(recipe.replace(**changes, student=options))
    line = read_metrics(run.path)[-2]
    assert {"task", "aux", "kd"} <= line["train"].keys()
    assert "ema" in line
    assert "aux" in mdistiller.load_student(run.path).tap_points


def test_evaluation_of_a_run_and_of_a_checkpoint(runs, capsys):
    EvalCommand.parse([str(runs / "kd"), "--json"]).execute()
    found = json.loads(capsys.readouterr().out)
    last = read_metrics(runs / "kd")[-2]
    assert found["images"] == 4
    assert found["classes"] == last["classes"]
    assert found["mIoU"] == last["mIoU"]
    EvalCommand.parse([str(runs / "kd"), "--batch-size", "3"]).execute()
    text = capsys.readouterr().out
    assert f"mIoU {last['mIoU']:.2f} %" in text
    assert all(name in text for name in CLASSES)


def test_the_student_of_a_run_and_its_predictions(teacher, squares, tmp_path, capsys):
    model = mdistiller.load_student(teacher)
    assert model(torch.zeros(1, 3, 40, 50)).shape == (1, 3, 40, 50)
    image = squares / "JPEGImages" / "val0.png"
    PredictCommand.parse([str(teacher), str(image), "--json", "--draw", str(tmp_path / "masks")]).execute()
    ((entry,),) = (json.loads(capsys.readouterr().out),)
    drawn = Image.open(tmp_path / "masks" / "val0.png")
    assert (drawn.mode, drawn.size) == ("P", (72, 56))
    pixels = (np.array(Image.open(image)) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.no_grad():
        expected = model(torch.tensor(pixels).permute(2, 0, 1)[None].float()).argmax(1)[0].numpy()
    assert (np.array(drawn) == expected).mean() > 0.998  # ties in rounding
    assert len(np.unique(expected)) > 1
    counts = np.bincount(np.array(drawn).flatten(), minlength=3) / expected.size
    assert {p["name"]: pytest.approx(p["share"]) for p in entry["classes"]} == {
        n: c for n, c in zip(CLASSES, counts, strict=True) if c
    }
    PredictCommand.parse([str(teacher), str(image)]).execute()
    assert f" %  {entry['classes'][0]['name']}" in capsys.readouterr().out


@pytest.mark.parametrize("format", ["safetensors", "torch-export", "onnx"])
def test_exports_give_the_students_logits_at_other_sizes(runs, squares, tmp_path, format):
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    folder, card = export_student(runs / "kd", format)
    assert card.measured.value == pytest.approx(card.measured.student, abs=0.05)
    assert card.measured.metric == "mIoU"
    exported = load_predictor(folder)
    image = torch.randn(1, 3, 72, 88)
    with torch.no_grad():
        expected = mdistiller.load_student(runs / "kd")(image)
    assert torch.allclose(exported(image), expected, atol=1e-4)
    (found,) = exported.predict([squares / "JPEGImages" / "val0.png"], top=2)
    assert 1 <= len(found) <= 2
    names, printed, path = run_card(folder, tmp_path, (96, 64))
    (found,) = exported.predict([path])
    if format == "safetensors":
        assert printed == f"{[found]}\n"
        return
    expected = exported.prepare(read_image(path))
    np.testing.assert_allclose(names["image"][0], expected, atol=1e-6)
    shares = {share.name: f"{share.share:.1%}" for share in found}
    assert dict(line.split() for line in printed.splitlines()) == shares


def test_compare(runs, teacher, capsys):
    out, card = export_student(runs / "kd", out=runs / "kd" / "export" / "compared")
    folders = (teacher, runs / "alone", runs / "kd")
    assert command(["compare", *map(str, folders), "--exports", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = found["rows"]
    kd = "KD"
    labels = ["teacher", "student alone", kd, f"{kd}, safetensors"]
    assert [row["label"] for row in rows] == labels
    assert found["image_shape"] == [1, 3, 56, 72]
    recorded = [read_metrics(path)[-1]["last"]["mIoU"] for path in folders]
    assert [row["metric"] for row in rows] == pytest.approx([*recorded, recorded[2]])
    assert [row["over_alone"] is None for row in rows] == [False, True, False, False]
    assert rows[0]["macs"] > rows[1]["macs"] == rows[3]["macs"] == card.macs > 1e6
    assert all(row["ms"]["1"] > 0 for row in rows)
    assert command(["compare", str(runs / "kd"), "--batch", "2"]) == 0
    assert "images of shape [2, 3, 56, 72]" in capsys.readouterr().out
    assert "Table of accuracy and cost" in write_report([runs / "kd"], runs / "page.html").read_text()


def test_the_report_has_colored_masks(runs, squares, tmp_path):
    page = write_report([runs / "alone", runs / "kd"], tmp_path / "report.html", images=1).read_text()
    section = page[page.index('aria-labelledby="masks"') :]
    section = section[: section.index("</section>")]
    pictures = re.findall(r'<img src="data:image/(?:png|jpeg);base64,([^"]+)" alt="([^"]*)"', section)
    assert len(pictures) == 4
    assert all(alt.startswith("val0.png") for _, alt in pictures)
    photograph, true = (np.array(Image.open(io.BytesIO(base64.b64decode(p)))) for p, _ in pictures[:2])
    mask = np.array(Image.open(squares / "SegmentationClass" / "val0.png"))
    change = true.astype(int) - photograph
    assert (change[mask == 2].mean(0)[[0, 2]] < 0).all()  # towards dark green
    assert np.abs(change[mask == 255]).mean() < 25  # left as they are, to the compression
    assert all(name in section for name in CLASSES)


# Two processes


def two_processes(root, teacher, out):
    """Two steps of KD and FitNet, whose regressor trains too."""
    run = train(pair(root, "kd+fitnet", teacher, epochs=1, eval_every=1, save_best=True, out=out))
    if run.path is not None:
        print(json.dumps(run.summary))


def test_two_processes_share_the_images_and_the_metrics(squares, teacher, tmp_path, capsys):
    """They evaluate as one process does with the weights and statistics that they saved."""
    codes, (said, silence), errors = run_group(two_processes, squares, teacher, tmp_path / "run")
    assert (codes, silence) == ([0, 0], ""), errors
    last = json.loads(said)["last"]
    EvalCommand.parse([str(tmp_path / "run"), "--json"]).execute()
    found = json.loads(capsys.readouterr().out)
    assert {name: found[name] for name in SegmentationConfig.metrics} == {
        name: last[name] for name in SegmentationConfig.metrics
    }
    alone = train(pair(squares, "kd+fitnet", teacher, epochs=1, eval_every=1, out=tmp_path / "alone"))
    assert read_metrics(tmp_path / "run")[-1]["step"] == alone.summary["step"] == 2


# Recipes


def test_recipes():
    known = list_recipes()
    assert "voc-seg.cwd.deeplabv3_resnet101_resnet18" in known
    cityscapes = get_recipe("cityscapes-seg.skd.deeplabv3_resnet101_resnet18")
    assert (cityscapes.student.name, cityscapes.teacher.name) == ("deeplabv3_resnet18", "deeplabv3_resnet101")
    assert cityscapes.augment.crop == (512, 1024)
    assert (cityscapes.max_steps, cityscapes.optim.lr, cityscapes.optim.schedule) == (40_000, 0.02, "poly")
    assert cityscapes.epochs * (2975 // 16) >= 40_000
    assert get_recipe("voc-seg.student.fcn_resnet18").epochs * (10_582 // 16) >= 40_000
    mixed = get_recipe("coco-seg.kd.deeplabv3_resnet18_segformer_b0")
    assert (mixed.teacher.name, mixed.student.name) == ("deeplabv3_resnet18", "segformer_b0")
    other = set_method(cityscapes, "dkd")
    assert other.recipe == "cityscapes-seg.dkd.deeplabv3_resnet101_resnet18"
    assert other.method.beta == 2.0
    with pytest.raises(UnknownNameError, match="pair of segmentation models"):
        get_recipe("voc-seg.kd.deeplabv3_resnet101_vgg16")
    with pytest.raises(UnknownNameError, match="deeplabv3_resnet18"):
        get_recipe("voc-seg.student.deeplab_resnet18")


# What is refused


def test_methods_that_cannot_work_are_refused(squares):
    with pytest.raises(
        ConfigError, match=r"'crd' compares whole images and not their pixels; allowed.* cwd, "
    ):
        get_recipe(f"voc-seg.crd.{TEACHER}_{MODEL}")
    with pytest.raises(UnknownNameError, match="nearest: cwd"):
        get_recipe(f"voc-seg.cwdd.{TEACHER}_{MODEL}")
    assert {"kd", "dkd", "cwd", "skd", "cirkd", "fitnet", "at", "reviewkd"} <= {*list_segmentation_methods()}


def test_a_teacher_of_other_classes(squares, teacher, tmp_path):
    write_squares(tmp_path, "train", 4)
    write_squares(tmp_path, "val", 2)
    (tmp_path / "classes.txt").write_text("ground\nred\nblue\ngreen\n")
    with pytest.raises(
        CheckpointError, match=r"has 3 classes, the data 4: train it on this data first .*coco-seg.teacher"
    ):
        train(pair(tmp_path, "kd", teacher, out=tmp_path / "a"))
    (tmp_path / "classes.txt").write_text("ground\nblue\npink\n")
    with pytest.raises(ConfigError, match="data: pink; only in the model: red: train it on this"):
        train(pair(tmp_path, "kd", teacher, out=tmp_path / "b"))


def moved():
    return pytest.warns(UserWarning, match="its classes were put into the data's order, by their names")


@pytest.mark.parametrize(
    "name", ["fcn_resnet18", "deeplabv3_mobilenet_v3_small", "lraspp_mobilenet_v3_small", "segformer_b0"]
)
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_outputs_follow_the_names_of_the_classes(squares, tmp_path, name, role):
    """In each of two teachers, in a student that is trained further, and in auxiliary classifiers."""
    if name == "segformer_b0":
        pytest.importorskip("transformers")
    order, options = [2, 0, 1], {"aux": True} if name.startswith(("fcn", "deep")) else {}
    torch.manual_seed(0)
    model = create_segmenter(name, 3, **options)
    file, classes = tmp_path / "model.safetensors", [CLASSES[i] for i in order]
    about = {"task": "segmentation", "model": name, "options": options, "classes": classes}
    save_student(file, model, about)
    given = {"name": name, "checkpoint": file}
    config = student(squares)
    task, data = get_task("segmentation"), get_task("segmentation").load_data(config)
    image = torch.rand(2, 3, 64, 64)
    if role == "student":
        with moved():
            built = [task.build_student(config.replace(student=given | {"options": options}), data)]
    else:
        config = config.replace(method={"name": "kd"}, teacher=given, more_teachers=[given])
        with moved():
            built = [task.build_teacher(part, data) for part, _ in config.by_teacher()]
        assert len(built) == 2
    for found in (each.eval() for each in built):
        with torch.no_grad():
            expected = model.eval()(image)
            torch.testing.assert_close(found(image)[:, order], expected)
        if options:
            taps = [tap(each, ["aux"])(image).features["aux"] for each in (found, model)]
            torch.testing.assert_close(taps[0][:, order], taps[1])


def test_an_evaluation_follows_the_names_of_the_classes(squares, teacher, tmp_path):
    evaluate, config = get_task("segmentation").evaluate, student(squares)
    given, other = ModelConfig(name=TEACHER, checkpoint=teacher), tmp_path / "other"
    world = World(torch.device("cpu"))
    expected = evaluate(config, given, world)["classes"]
    shutil.copytree(squares, other)
    (other / "classes.txt").write_text("ground\nblue\nred\n")
    for file in (other / "SegmentationClass").iterdir():
        with Image.open(file) as drawn:
            mask, palette = np.array(drawn), drawn.getpalette()
        changed = Image.fromarray(np.where((mask == 1) | (mask == 2), 3 - mask, mask), mode="L")
        changed.putpalette(palette)
        changed.save(file)
    with moved():
        found = evaluate(student(other), given, world)["classes"]
    assert [*found] == ["ground", "blue", "red"]
    assert found == pytest.approx(expected)
    next((other / "JPEGImages").glob("val*")).write_bytes(b"no image")
    with moved(), pytest.warns(UserWarning, match="left out 1 image that cannot be read"):
        assert evaluate(student(other).replace(data={"on_error": "skip"}), given, world)["images"] == 3


def test_a_teacher_of_other_images_gets_its_own(squares, teacher, tmp_path):
    plain = pair(squares, "kd+cwd", teacher, max_steps=1, out=tmp_path / "a")
    changed = plain.replace(data={"mean": (0.5, 0.5, 0.5), "std": (0.3, 0.4, 0.5)})
    task, image = get_task("segmentation"), torch.rand(2, 3, 32, 40)
    data = task.load_data(changed)
    found = []
    for config in (plain, changed):
        mean, std = (torch.tensor(values)[:, None, None] for values in (config.data.mean, config.data.std))
        with torch.no_grad():
            found.append(task.build_teacher(config, data).eval()((image - mean) / std))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    train(changed)
    first = timeless(changed.out)[0]
    assert first["kd"] > 0 < first["cwd"]


def test_other_settings_that_are_refused(squares, tmp_path):
    one = student(squares)
    with pytest.raises(ConfigError, match="teacher_cache: got a folder; a segmentation teacher runs live"):
        one.replace(teacher_cache=tmp_path)
    with pytest.raises(ConfigError, match="rising factors"):
        one.replace(augment={"scale": (2.0, 0.5)})
    with pytest.raises(UnknownNameError, match="option of segmentation model"):
        train(one.replace(student={"options": {"depth": 3}}, out=tmp_path / "a"))
    with pytest.raises(ConfigError, match="drop_last: an epoch's last batch has a single image"):
        train(
            get_recipe("coco-seg.teacher.deeplabv3_resnet18").replace(
                **settings(squares, batch_size=7, out=tmp_path / "b"), drop_last=False
            )
        )
    with pytest.raises(ConfigError, match=r"draw: .*segmentation"):
        PredictCommand.parse(
            [str(_classifier(tmp_path)), str(squares / "JPEGImages" / "val0.png"), "--draw", "x"]
        ).execute()


def _classifier(tmp_path):
    model = mdistiller.create_model("resnet8", 3)
    images = {"image_size": 16, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return mdistiller.save_student(model, tmp_path / "c", name="resnet8", classes=list("abc"), **images)


def test_config_round_trip(squares):
    config = pair(squares, "kd+skd", "x")
    assert SegmentationConfig.model_validate(json.loads(config.model_dump_json())) == config


def test_two_teachers_with_a_method_each(squares, teacher, tmp_path):
    more = {"name": TEACHER, "checkpoint": teacher, "method": "cwd", "weight": 0.25}
    both = pair(squares, "kd", teacher, max_steps=1, out=tmp_path / "both").replace(more_teachers=[more])
    alone = pair(squares, "cwd", teacher, max_steps=1, out=tmp_path / "alone")
    train(both)
    train(alone)
    first, single = (timeless(c.out)[0] for c in (both, alone))
    assert first["kd"] > 0
    assert first["cwd"] == pytest.approx(0.25 * single["cwd"], rel=1e-4)


def test_a_file_by_itself_evaluates_as_its_run(squares, tmp_path, capsys):
    """The images have the run's short side, not the recipe's."""
    config = student(squares, out=tmp_path / "run", max_steps=1)
    run = train(config.replace(augment={"short_side": 40})).path
    moved = shutil.copy(run / "student.safetensors", tmp_path / "moved.safetensors")
    shown = []
    for source in (run, moved):
        assert command(["eval", str(source), "--data.root", str(squares), "--json", "--device", "cpu"]) == 0
        shown.append({k: v for k, v in json.loads(capsys.readouterr().out).items() if k != "checkpoint"})
    assert shown[0] == shown[1]


def test_a_checkpoint_by_name_is_evaluated_with_its_own_images(squares, tmp_path):
    config = student(squares, out=tmp_path / "run", max_steps=1)
    own = {"mean": (0.2, 0.3, 0.4), "std": (0.5, 0.6, 0.7)}
    run = train(config.replace(data=own, augment={"short_side": 40})).path
    moved = shutil.copy(run / "student.safetensors", tmp_path / "moved.safetensors")
    for source in ([str(moved)], [config.student.name, "--checkpoint", str(moved)]):
        found = EvalCommand.parse(source)
        assert (found.data.mean, found.data.std) == (own["mean"], own["std"])
