"""A run whose teacher has images of its own, against the raw images prepared by numpy and Pillow."""

import json
import os
import shutil
import signal
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_runs import CPU, ask_teacher, fit_alone, make_trainer, open_teacher
from torch import nn

import mdistiller
from mdistiller.cli.compare import compare
from mdistiller.config import OptimConfig, RunConfig
from mdistiller.data import AugmentConfig, DataConfig, load_data
from mdistiller.errors import ConfigError, Interrupted
from mdistiller.methods import KDConfig, NoneConfig, method_config
from mdistiller.models import ModelConfig, create_model, registry
from mdistiller.models.own_input import OwnInput
from mdistiller.report.page_rows import PageRows
from mdistiller.report.runs import group, load_run
from mdistiller.runs.checkpoint import save_student
from mdistiller.runs.progress import Reporter
from mdistiller.tasks.classification import models
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.classification.report.outputs import run_models
from mdistiller.teacher import LiveTeacher
from mdistiller.training import batches
from mdistiller.training.launch import train
from mdistiller.training.task import get_task

DATA = DataConfig(kind="synthetic", synthetic_samples=48, synthetic_classes=4, image_size=16)
MEAN, STD, SIZE = (0.3, 0.4, 0.5), (0.5, 0.25, 0.2), 24
GIVEN_MEAN, GIVEN_STD = np.array([0.5] * 3), np.array([0.25] * 3)  # of the synthetic images


def config(**fields):
    base = {
        "data": DATA,
        "student": ModelConfig(name="resnet8"),
        "teacher": ModelConfig(name="resnet14"),
        "method": KDConfig(),
        "optim": OptimConfig(lr=0.01, schedule="constant"),
        "epochs": 2,
        "batch_size": 8,
        "device": "cpu",
        "log_every": 1,
    }
    return ClassificationConfig(**base | fields)


@pytest.fixture(scope="module")
def teacher_run(tmp_path_factory):
    """A run on larger images of another mean and deviation."""
    data = DATA.replace(mean=MEAN, std=STD, image_size=SIZE)
    fields = {"teacher": None, "method": NoneConfig(), "student": ModelConfig(name="resnet14"), "epochs": 3}
    return train(config(data=data, out=tmp_path_factory.mktemp("own") / "teacher", **fields)).path


@pytest.fixture(scope="module")
def student_run(teacher_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("own") / "student"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return train(config(teacher=ModelConfig(name="resnet14", checkpoint=teacher_run), out=out)).path


def own_images(given, mean=MEAN, std=STD, size=SIZE):
    """Images that are normalized for the student, as the teacher should get them."""
    raw = given.detach().double().numpy().transpose(0, 2, 3, 1) * GIVEN_STD + GIVEN_MEAN
    own = ((raw - mean) / std).transpose(0, 3, 1, 2).astype("f4")
    scaled = [[Image.fromarray(c).resize((size, size), Image.BILINEAR) for c in image] for image in own]
    return torch.tensor(np.array([[np.asarray(c) for c in image] for image in scaled]))


def normalized_images():
    """The images of the data by hand."""
    images = load_data(DATA).test.images.double() / 255
    return ((images - torch.tensor(GIVEN_MEAN)) / torch.tensor(GIVEN_STD)).permute(0, 3, 1, 2)


def logits_by_hand(run, **values):
    model = create_model("resnet14", 4)
    model.load_state_dict(load_file(run / "student.safetensors"))
    with torch.no_grad():
        return model.eval()(own_images(normalized_images(), **values))


def accuracy(logits):
    return 100 * (logits.argmax(1) == load_data(DATA).test.labels).double().mean().item()


def test_evaluations_see_the_teacher_through_its_own_images(teacher_run, student_run):
    logits = logits_by_hand(teacher_run)
    last = load_run(student_run).evals[-1].diagnostics["test"]
    assert last["teacher_top1"] == pytest.approx(accuracy(logits))
    label = load_data(DATA).test.labels
    p_t = logits.softmax(1).gather(1, label[:, None]).mean().item()
    assert last["teacher_p_t"] == pytest.approx(p_t, abs=1e-4)


def test_compare_and_report_too(teacher_run, student_run, tmp_path):
    copies = [shutil.copytree(run, tmp_path / run.name) for run in (student_run, teacher_run)]
    logits = logits_by_hand(teacher_run)
    row = compare([copies[0]], batches=(1,)).rows[0]
    assert (row.label, row.metric) == ("teacher", pytest.approx(accuracy(logits)))
    student = compare([copies[1]], batches=(1,)).rows[0]
    assert row.macs == student.macs  # of the teacher's larger images
    runs = group([load_run(copy) for copy in copies])
    (collected,) = run_models(PageRows(runs, ()), 100).teachers.values()
    torch.testing.assert_close(collected.logits, logits, rtol=1e-3, atol=1e-4)


def test_eval_of_the_teachers_run_has_its_runs_images(teacher_run, capsys):
    from mdistiller.cli.eval import EvalCommand

    EvalCommand.parse([str(teacher_run), "--json", "--device", "cpu"]).execute()
    assert json.loads(capsys.readouterr().out)["top1"] == load_run(teacher_run).evals[-1].value


class Seen(nn.Module):
    """A teacher that keeps its images of every pass."""

    def __init__(self):
        super().__init__()
        self.layer, self.passes = nn.Linear(3, 4), []

    def forward(self, image):
        self.passes.append(image.detach().clone())
        return self.layer(image.float().mean((2, 3)))


OWN = {"mean": MEAN, "std": STD, "image_size": SIZE}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"method": method_config("mlkd")},
        {"augment": AugmentConfig(mixup_alpha=0.4, cutmix_alpha=1.0)},
        {"augment": AugmentConfig(crop="resized", policy="trivialaugment", erase=0.5, color_jitter=0.4)},
        {"precision": "bfloat16", "layout": "channels_last"},
        {"layout": "channels_last", "teacher_batch": 24},
        {"method": method_config("mlkd"), "teacher_cache": "cache"},
        {"teacher_cache": "cache"},
    ],
    ids=["plain", "two views", "mixed", "changed", "bfloat16", "ahead", "two views cached", "cached"],
)
def test_the_teacher_gets_the_students_augmented_images(tmp_path, fields):
    if "teacher_cache" in fields:
        fields = fields | {"teacher_cache": tmp_path / "cache"}
    c = config(teacher=ModelConfig(name="resnet14", **OWN), **fields)
    seen, data = Seen(), load_data(DATA)
    teacher = models.prepare_for(c.teacher, seen, data)
    made = make_trainer(c, data, create_model("resnet8", 4), teacher, CPU)
    open_teacher(made)
    seen.passes.clear()  # that of a probe
    prepared = made.source.next_batches(0, 3)
    outputs = ask_teacher(made.distiller, prepared)
    assert len(prepared) == (3 if "teacher_batch" in fields else 1)
    given = torch.cat([batch.image for batch in prepared])
    if c.teacher_cache is not None and made.distiller.method.needs.views == 2:
        assert len(seen.passes) == 2  # one for each view
    found = torch.cat(seen.passes)
    assert found.shape == (len(given), 3, SIZE, SIZE)
    torch.testing.assert_close(found.contiguous(), own_images(given), rtol=0, atol=2e-5)
    if c.layout == "channels_last":
        assert seen.passes[0].is_contiguous(memory_format=torch.channels_last)
    for batch, teacher_outputs in zip(prepared, outputs, strict=True):
        made.train_step(batch, teacher_outputs)


def test_a_run_by_flags_is_the_run_by_metadata(teacher_run, student_run, tmp_path):
    """Weights without metadata, and the values as fields."""
    torch.save(load_file(teacher_run / "student.safetensors"), tmp_path / "t.pt")
    teacher = ModelConfig(name="resnet14", checkpoint=tmp_path / "t.pt", **OWN)
    path = train(config(teacher=teacher, out=tmp_path / "run")).path
    assert (path / "student.safetensors").read_bytes() == (student_run / "student.safetensors").read_bytes()
    plain = train(config(teacher=teacher.replace(**dict.fromkeys(OWN)), out=tmp_path / "plain")).path
    files = [load_file(run / "student.safetensors")["fc.weight"] for run in (path, plain)]
    assert not torch.equal(*files), "a file without metadata brings no values"


def test_fields_precede_the_weights(teacher_run):
    given = ModelConfig(name="resnet14", checkpoint=teacher_run)
    assert models.own_input(given) == (MEAN, STD, SIZE)
    assert models.own_input(given.replace(image_size=20, std=(1, 1, 1))) == (MEAN, (1, 1, 1), 20)
    data = load_data(DATA)
    assert isinstance(models.build_teacher(given, data), OwnInput)
    same = load_data(DATA.replace(mean=MEAN, std=STD, image_size=SIZE))
    assert not isinstance(models.build_teacher(given, same), OwnInput)


def test_pretrained_weights_bring_the_values_of_their_library():
    timm = pytest.importorskip("timm")
    known = timm.get_pretrained_cfg("vit_tiny_patch16_224")
    given = ModelConfig(name="timm/vit_tiny_patch16_224", options={"pretrained": True})
    assert models.own_input(given) == (tuple(known.mean), tuple(known.std), 224)
    assert models.own_input(given.replace(options={})) == (None, None, None)
    b4 = ModelConfig(name="torchvision/efficientnet_b4", options={"weights": "DEFAULT"})
    assert models.own_input(b4).image_size == 380


def test_a_vision_transformer_of_a_fixed_size(tmp_path):
    pytest.importorskip("timm")
    options = {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 3}
    vit = ModelConfig(name="timm/vit_tiny_patch16_224", options=options)
    save_student(tmp_path / "t.safetensors", create_model(vit.name, 4, **options), {})
    teacher = vit.replace(checkpoint=tmp_path / "t.safetensors")
    fields = {"method": method_config("fitnet", weight=1.0), "max_steps": 2}
    with pytest.raises(ConfigError, match="cannot run on images of shape"):
        train(config(teacher=teacher, out=tmp_path / "no", **fields))
    sized = teacher.replace(image_size=32)
    assert train(config(teacher=sized, out=tmp_path / "run", **fields)).summary["step"] == 2


def test_several_teachers_have_images_each(teacher_run, tmp_path):
    save_student(tmp_path / "t.safetensors", create_model("resnet8", 4), {})
    more = (ModelConfig(name="resnet8", checkpoint=tmp_path / "t.safetensors", image_size=8),)
    fields = {"teacher": ModelConfig(name="resnet14", checkpoint=teacher_run), "more_teachers": more}
    data = load_data(DATA)
    teacher = get_task("classification").build_teacher(config(**fields), data).eval()
    first, second = (member.model for member in teacher.members)
    images = normalized_images().float()
    with torch.no_grad():
        small = own_images(images, mean=GIVEN_MEAN, std=GIVEN_STD, size=8)
        expected = (first(own_images(images)) + second(small)) / 2
        torch.testing.assert_close(teacher(images), expected, rtol=1e-3, atol=1e-4)
    method = method_config("fitnet", weight=1.0, student_taps=("stage2",), teacher_taps=("layer2.0",))
    for i, ensemble in enumerate(("logits", "losses")):
        chosen = {"method": KDConfig()} if ensemble == "logits" else {"method": method}
        train(config(ensemble=ensemble, max_steps=2, out=tmp_path / f"run{i}", **chosen, **fields))


@pytest.mark.parametrize(
    ("changes", "files"),
    [
        ({}, 1),
        ({"mean": (0.3, 0.4, 0.6)}, 2),
        ({"mean": (0.3, 0.4, 0.5000001)}, 2),
        ({"std": (0.5, 0.25, 0.3)}, 2),
        ({"image_size": 12}, 2),
        (dict.fromkeys(OWN), 2),
    ],
)
def test_a_cache_is_of_one_preparation(tmp_path, teacher_run, changes, files):
    torch.save(load_file(teacher_run / "student.safetensors"), tmp_path / "t.pt")
    teacher = ModelConfig(name="resnet14", checkpoint=tmp_path / "t.pt", **OWN)
    asked, run = [], LiveTeacher.forward

    def forward(teacher, batch, context=None):
        if len(batch.image) > 1:  # one: the sizes of the outputs
            asked.append(len(batch.image))
        return run(teacher, batch, context)

    fields = {"teacher_cache": tmp_path / "cache", "diagnostics": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiveTeacher, "forward", forward)
        first = train(config(teacher=teacher, out=tmp_path / "first", **fields)).path
        before = len(asked)
        again = train(config(teacher=teacher.replace(**changes), out=tmp_path / "again", **fields)).path
    assert (len(asked) == before) == (files == 1)
    assert len(list((tmp_path / "cache").glob("*.rows"))) == files
    same = (first / "student.safetensors").read_bytes() == (again / "student.safetensors").read_bytes()
    assert same == (files == 1)
    keys = [json.loads(path.read_text())["key"]["teacher"] for path in (tmp_path / "cache").glob("*.json")]
    assert {key["class"] for key in keys} == {"ResNet"}
    assert "24 pixels, mean 0.3 0.4 0.5, std 0.5 0.25 0.2" in {key.get("images") for key in keys}


def test_a_run_resumes_exactly(student_run, teacher_run, tmp_path):
    class At(Reporter):
        def step(self, done):
            if done == 7:
                os.kill(os.getpid(), signal.SIGTERM)

    c = config(teacher=ModelConfig(name="resnet14", checkpoint=teacher_run), out=tmp_path / "run")
    with pytest.raises(Interrupted, match="stopped by SIGTERM after step 7"):
        train(c, reporter=At())
    train(c, resume=True)
    files = [(run / "student.safetensors").read_bytes() for run in (student_run, tmp_path / "run")]
    assert files[0] == files[1]
    with pytest.raises(ConfigError, match="with another teacher"):
        train(c.replace(teacher={"image_size": 20}), resume=True)


@pytest.mark.parametrize("size", [8, 40])
def test_a_student_with_the_teachers_classifier_is_built_again(tmp_path, monkeypatch, size):
    """SimKD compares the sizes of both last maps when it is built; this teacher runs at its size alone."""

    def only(module, arguments):
        if arguments[0].shape[-1] != size:
            raise RuntimeError("another size")

    def sized(num_classes=4):
        model = create_model("resnet14", num_classes)
        model.register_forward_pre_hook(only)
        return model

    monkeypatch.setitem(registry._MODELS, "sized", sized)
    save_student(tmp_path / "t.safetensors", sized(), {})
    teacher = ModelConfig(name="sized", checkpoint=tmp_path / "t.safetensors", image_size=size)
    run = train(config(teacher=teacher, method=method_config("simkd"), out=tmp_path / "run"))
    student = mdistiller.load_student(run.path)
    assert student.size == ((2, 2) if size == 8 else None)
    with torch.no_grad():
        found = accuracy(student(normalized_images().float()))
    assert found == pytest.approx(run.summary["last"]["top1"])


def test_the_teacher_runs_ahead_by_the_pixels_of_its_own_images(monkeypatch):
    monkeypatch.setitem(batches._TEACHER_PIXELS, "cpu", 64 * 16 * 16)
    data = load_data(DATA)
    for size, steps in ((None, 8), (32, 2), (64, 1)):
        c = config(teacher=ModelConfig(name="resnet14", image_size=size))
        teacher = models.prepare_for(c.teacher, create_model("resnet14", 4), data)
        made = make_trainer(c, data, create_model("resnet8", 4), teacher, CPU)
        assert made.source.lookahead == steps


def test_the_first_lines_of_a_run_have_the_values():
    lines = []

    class Notes(Reporter):
        def note(self, text):
            lines.append(text)

    data = load_data(DATA)
    c = config(teacher=ModelConfig(name="resnet14", **OWN), max_steps=1, diagnostics=False)
    teacher = models.prepare_for(c.teacher, create_model("resnet14", 4), data)
    fit_alone(make_trainer(c, data, create_model("resnet8", 4), teacher, CPU), reporter=Notes())
    assert lines == ["teacher ResNet: images of its own, 24 pixels, mean 0.3 0.4 0.5, std 0.5 0.25 0.2"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"teacher": {"mean": (0.5, 0.5)}},
            r"teacher: mean, std: got 2 and 3 numbers .*; allowed: one number for each channel, in both",
        ),
        (
            {"teacher": {"std": (0.5,) * 4}},
            r"teacher: mean, std: got 3 and 4 numbers .*; allowed: one number for each channel",
        ),
        ({"teacher": {"std": (0.5, 0, 0.5)}}, r"teacher.std.1: Input should be greater than 0 \(got 0\)"),
        ({"teacher": {"std": (0.5, -1, 0.5)}}, r"teacher.std.1: Input should be greater than 0 \(got -1\)"),
        ({"teacher": {"mean": (0.5, 2, 0.5)}}, "teacher.mean.1: Input should be less than or equal to 1"),
        ({"teacher": {"image_size": 0}}, r"teacher.image_size: Input should be greater than or equal to 1"),
        ({"teacher": {"image_size": -5}}, r"teacher.image_size: .*\(got -5\)"),
        (
            {"student": {"std": STD}},
            "student.std: a student's images are the data's; allowed: None, and data.std",
        ),
        (
            {"teacher": {"name": "self", "image_size": 8}, "ema": 0.9},
            "teacher.image_size: the teacher is the student's average and sees the student's images",
        ),
    ],
)
def test_wrong_values_are_named(fields, message):
    with pytest.raises(ConfigError, match=f"^ClassificationConfig: {message}"):
        config().replace(**fields)


def test_a_detector_prepares_its_images_itself():
    recipe = mdistiller.get_recipe("coco.kd.fasterrcnn_resnet101_resnet18")
    assert isinstance(recipe, RunConfig)
    with pytest.raises(
        ConfigError, match=r"teacher.mean: a detector normalizes and scales its images itself"
    ):
        recipe.replace(teacher={"mean": MEAN})
