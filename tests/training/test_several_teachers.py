"""Several teachers of different kinds in one run, each with its method, weight, images and cache."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from small_runs import SETTINGS, folder_settings, make_teacher
from torch import nn

import mdistiller
from mdistiller.cli.main import run as command
from mdistiller.config import TeacherConfig
from mdistiller.errors import ConfigError, Interrupted
from mdistiller.methods import method_config
from mdistiller.methods.kd import kd_loss
from mdistiller.models.weights import read_weights
from mdistiller.runs.checkpoint import save_student
from mdistiller.runs.folder import read_metrics
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.embed.config import EmbedConfig
from mdistiller.training.launch import train
from mdistiller.training.trainer import Trainer
from mdistiller.types import Batch

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 8), ("val", 4)):
        for name in "abcd":
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / split / name / f"{i}.png")
    return folder


def headless():
    torch.manual_seed(5)
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT)


def store(model, name, folder, **options):
    path = folder / f"{name.replace('/', '-')}.safetensors"
    save_student(path, model, {})
    return {"name": name, "checkpoint": path, "options": options}


@pytest.fixture
def teachers(tmp_path):
    """The fields of a classifier of the data's classes, and of a headless transformer that sees 32 pixels."""
    first = store(make_teacher(16), "resnet14", tmp_path)
    second = store(headless(), "timm/vit_tiny_patch16_224", tmp_path, **VIT)
    return first, {**second, "image_size": 32, "mean": (0.4, 0.4, 0.4), "std": (0.3, 0.3, 0.3)}


TOKENS = {"name": "tokens", "global_weight": 0, "student_taps": ["stage3"], "teacher_taps": ["norm"]}


def config(root, teachers, out, **fields):
    first, second = teachers
    second = {**second, "method": TOKENS, "weight": 0.5} if "method" not in second else second
    base = {**folder_settings(root), "method": "kd", "teacher": first, "more_teachers": [second], "out": out}
    return ClassificationConfig(**base | {"diagnostics": False} | fields)


def images():
    torch.manual_seed(3)
    return torch.randn(6, 3, 16, 16), torch.arange(6) % 4


# In one's own loop


def test_the_losses_are_the_weighted_sum():
    x, y = images()
    torch.manual_seed(1)
    student, a, b = (mdistiller.create_model(name, 4) for name in ("resnet8", "resnet14", "wrn_16_1"))
    distiller = mdistiller.Distiller(
        student,
        [a, b],
        ["kd", {"name": "fitnet", "weight": 2.0}],
        teacher_weights=[0.25, 3.0],
        input_shape=x.shape[1:],
    ).eval()
    out = distiller(x, y)
    fitnet = distiller.method.parts[1]
    ours = mdistiller.tap(student.eval(), fitnet.student_taps)(x)
    with torch.no_grad():
        theirs = mdistiller.tap(b.eval(), fitnet.teacher_taps)(x)
        logits = a.eval()(x)
    hint = 3.0 * fitnet(ours, theirs, Batch(x, y, y), torch.ones(()))["fitnet"]
    kd = 0.25 * 0.9 * kd_loss(ours.logits, logits)
    task = 0.1 * nn.functional.cross_entropy(ours.logits, y)
    torch.testing.assert_close(out.losses, {"task": task, "kd": kd, "fitnet": hint})
    torch.testing.assert_close(out.loss, task + kd + hint)
    assert not [name for name in distiller.state_dict() if "teacher" in name]


def test_each_teacher_sees_its_own_images():
    x, y = images()
    student, a, b = mdistiller.create_model("resnet8", 4), make_teacher(16), make_teacher(16, seed=1)
    own = {"mean": (0.2, 0.2, 0.2), "std": (0.5, 0.5, 0.5), "image_size": 24}
    given = {"mean": (0.4, 0.4, 0.4), "std": (0.25, 0.25, 0.25)}
    both = mdistiller.Distiller(student, [a, b], "kd", student_input=given, teacher_input=[None, own]).eval()
    single = [
        mdistiller.Distiller(student, a, "kd").eval()(x, y).losses["kd"],
        mdistiller.Distiller(student, b, "kd", student_input=given, teacher_input=own)
        .eval()(x, y)
        .losses["kd"],
    ]
    torch.testing.assert_close(both(x, y).losses["kd"], sum(single))


@pytest.mark.parametrize(
    ("teachers", "fields", "message"),
    [
        (2, {"method": ["kd", "kd", "kd"]}, r"method: got 3 for 2 teachers; allowed: one for each"),
        (2, {"teacher_weights": [1.0]}, r"teacher_weights: got \[1.0\] for 2 teachers"),
        (2, {"teacher_weights": [1.0, -1.0]}, r"teacher_weights: got \[1.0, -1.0\]"),
        (2, {"teacher_dropout": 1.0}, r"teacher_dropout: got 1.0; allowed: a probability in \[0, 1\)"),
        (2, {"method": ["kd", "none"]}, "method 'none' takes no teacher"),
        (2, {"method": ["simkd", "kd"]}, "method 'simkd' takes only one teacher"),
        (2, {"teacher_input": [None]}, "teacher_input: got 1 for 2 teachers"),
        (0, {}, "got 1 for 0 teachers|got 0 for 0 teachers"),
        (None, {"teacher_dropout": 0.1}, "they go with a list of teachers"),
    ],
)
def test_wrong_numbers_are_errors(teachers, fields, message):
    student, teacher = mdistiller.create_model("resnet8", 4), make_teacher(16)
    given = teacher if teachers is None else [copy.deepcopy(teacher) for _ in range(teachers)]
    with pytest.raises(ConfigError, match=message):
        mdistiller.Distiller(student, given, **{"method": "kd", "input_shape": (3, 16, 16)} | fields)


def test_another_number_of_classes_names_the_teacher():
    student, other = mdistiller.create_model("resnet8", 4), mdistiller.create_model("resnet8", 7)
    distiller = mdistiller.Distiller(student, [make_teacher(16), other], "kd")
    with pytest.raises(ConfigError, match="teacher 2: "):
        distiller(*images())


def test_dense_logits_are_one_error():
    student, *teachers = (nn.Conv2d(3, 4, 1) for _ in range(3))
    x, y = torch.randn(2, 3, 5, 5), torch.zeros(2, 5, 5, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"several teachers need logits \[B, classes\], or per_position"):
        mdistiller.Distiller(student, teachers, "kd")(x, y)


def test_teachers_are_left_out_but_never_all_of_them():
    x, y = images()
    student, a, b = mdistiller.create_model("resnet8", 4), make_teacher(16), make_teacher(16, seed=1)
    methods = ["kd", "fitnet"]
    distiller = mdistiller.Distiller(student, [a, b], methods, teacher_dropout=0.6, input_shape=x.shape[1:])
    torch.manual_seed(0)
    seen = [distiller(x, y).losses for _ in range(40)]
    left = {(losses["kd"].item() == 0, losses["fitnet"].item() == 0) for losses in seen}
    assert left == {(False, False), (True, False), (False, True)}
    losses = distiller.eval()(x, y).losses
    assert losses["kd"] > 0
    assert losses["fitnet"] > 0


# In runs


def lines(path, kind="train"):
    return [line for line in read_metrics(path) if line["kind"] == kind]


def test_a_classifier_and_a_headless_teacher(root, teachers, tmp_path, capsys):
    c = config(root, teachers, tmp_path / "run", max_steps=3)
    train(c)
    window = lines(c.out)[0]
    assert window["kd"] > 0
    assert window["tokens_patch"] > 0
    alone = config(root, teachers, tmp_path / "alone", max_steps=3, more_teachers=[])
    train(alone)
    assert lines(alone.out)[0]["kd"] == window["kd"]  # the first step has the same student
    first = config(root, teachers, tmp_path / "vit", max_steps=3, more_teachers=[])
    train(first.replace(teacher=teachers[1], method=TOKENS))
    assert window["tokens_patch"] == pytest.approx(0.5 * lines(first.out)[0]["tokens_patch"], rel=0.2)
    stored = json.loads((c.out / "config.json").read_text())
    assert stored["more_teachers"][0]["method"]["name"] == "tokens"
    card = mdistiller.Run(c.out).export(out=tmp_path / "export")
    assert "resnet14 + timm/vit_tiny_patch16_224 (tokens, weight 0.5)" in (card / "README.md").read_text()


def test_stored_outputs_are_one_of_them(root, teachers, tmp_path):
    torch.manual_seed(2)
    np.savez(tmp_path / "outputs.npz", logits=torch.randn(32, 4).numpy())
    stored = {"name": "stored", "checkpoint": tmp_path / "outputs.npz", "method": "kd", "weight": 2.0}
    c = config(root, (teachers[0], stored), tmp_path / "run", max_steps=1)
    train(c)
    parts = []
    for i, teacher in enumerate((teachers[0], {**stored, "method": None, "weight": 1.0})):
        fields = {k: v for k, v in teacher.items() if k not in ("method", "weight")}
        alone = c.replace(teacher=fields, more_teachers=[], out=tmp_path / f"{i}")
        train(alone)
        parts.append(lines(alone.out)[0]["kd"])
    assert lines(c.out)[0]["kd"] == pytest.approx(parts[0] + 2 * parts[1], rel=1e-5)


def same(first, second):
    first, second = read_weights(first), read_weights(second)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_a_killed_run_resumes_with_the_same_bits(root, teachers, tmp_path, monkeypatch):
    c = config(root, teachers, tmp_path / "whole", teacher_dropout=0.5)
    train(c)
    cut = c.replace(out=tmp_path / "cut", save_minutes=1e-9)
    steps = []
    step = Trainer.train_step

    def killed(self, *args):
        if len(steps) == 5:
            raise KeyboardInterrupt
        steps.append(1)
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", killed)
        with pytest.raises((KeyboardInterrupt, Interrupted)):
            train(cut)
    train(cut, resume=True)
    assert same(c.out, cut.out)
    dropped = [line["kd"] == 0 or line["tokens_patch"] == 0 for line in lines(c.out)]
    assert any(dropped)
    assert not all(dropped)


def test_another_second_teacher_is_refused(root, teachers, tmp_path):
    c = config(root, teachers, tmp_path / "run", max_steps=1)
    train(c)
    torch.manual_seed(8)
    save_student(
        teachers[1]["checkpoint"], timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT), {}
    )
    with pytest.raises(ConfigError, match="teacher 2: its weights are not those"):
        train(c, resume=True)


def test_each_teacher_has_a_cache_that_other_runs_share(root, teachers, tmp_path):
    second = {**teachers[1], "method": TOKENS, "cache_taps": ["norm"]}
    cache = tmp_path / "cache"
    c = config(root, (teachers[0], second), tmp_path / "run", teacher_cache=cache, teacher_views=1)
    train(c.replace(more_teachers=[], out=tmp_path / "first"))
    files = {path: path.read_bytes() for path in cache.glob("*.rows")}
    assert len(files) == 1
    train(c)  # reads the first teacher's, records the second's
    assert all(path.read_bytes() == value for path, value in files.items())
    assert len(list(cache.glob("*.rows"))) == 3  # logits, and of the headless teacher embedding and tokens
    train(c.replace(out=tmp_path / "again"))
    assert same(c.out, tmp_path / "again")
    assert [line["tokens_patch"] for line in lines(c.out)] == [
        line["tokens_patch"] for line in lines(tmp_path / "again")
    ]


def test_embeddings_of_two_teachers(root, tmp_path):
    a, b = headless(), timm.create_model("resnet10t", num_classes=0)
    data = {"kind": "folder", "root": root, "image_size": 32, "workers": 0}
    run = mdistiller.distill(
        "resnet8",
        [a, b],
        data,
        ["tokens", "fitnet"],
        task="embed",
        out=tmp_path / "run",
        teacher_weights=[1.0, 2.0],
        **SETTINGS,
    )
    window, last = run.metrics[0], lines(tmp_path / "run", "eval")[-1]
    assert window["fitnet"] > 0 < window["tokens_patch"]
    assert np.isfinite(last["loss"])
    assert 0 <= last["agreement"] <= 100
    assert isinstance(run.config, EmbedConfig)
    assert run.config.more_teachers[0].weight == 2.0
    assert run.config.teacher_weight == 1.0
    assert mdistiller.Run(run.path, teacher=[a, b], data=None).config.more_teachers[0].is_given


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": 2.0, "method": None}, "weight, cache_taps and teacher_weight go with a method"),
        ({"method": {"name": "kd", "task_weight": 0.5}}, "the task loss belongs to the run's method"),
        ({"method": "fitnett"}, "unknown method 'fitnett'"),
        ({"method": {"name": "fitnet", "weight": "auto"}}, "auto is measured for the run's method"),
        ({"checkpoint": None, "method": "kd"}, "each needs a checkpoint"),
    ],
)
def test_settings_that_do_not_fit(root, teachers, tmp_path, fields, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        config(root, (teachers[0], {**teachers[0], **fields}), tmp_path)


def test_dropout_needs_several_losses(root, teachers, tmp_path):
    c = config(root, teachers, tmp_path / "run", more_teachers=[], teacher_dropout=0.5)
    with pytest.raises(ConfigError, match="teacher_dropout: it leaves out one of several"):
        train(c)


def test_a_further_teacher_reads_back_from_its_file():
    teacher = TeacherConfig(
        name="resnet8", checkpoint="x", method=method_config("fitnet", task_weight=0.0), weight=2
    )
    values = teacher.model_dump(mode="json")
    assert values["method"]["name"] == "fitnet"


# Commands and pages

PAGE = (Path(__file__).parents[2] / "docs" / "several-teachers.md").read_text()
SHORT = "--epochs 1 --max-steps 2 --device cpu --precision float32 --layout contiguous"


def test_an_assistant_and_a_generation_by_the_commands_of_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(["train", "digits.teacher.resnet20", *SHORT.split(), "--out", "runs/teacher"]) == 0
    found = re.findall(
        r"^mdistiller train (.*)$", PAGE.partition("## Assistants")[2].replace("\\\n", " "), re.MULTILINE
    )
    assert len(found) == 3
    for line in found:
        assert command(["train", *line.split(), *SHORT.split()]) == 0, capsys.readouterr().err
    assert mdistiller.Run("runs/student").config.teacher.checkpoint.name == "assistant"
    assert mdistiller.Run("runs/generation").config.teacher.checkpoint.name == "student"


def test_a_file_with_the_teachers_of_the_page(root, teachers, tmp_path, capsys):
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    fields = yaml.safe_load(text)
    (more,) = fields["more_teachers"]
    assert more["options"].pop("pretrained") is True
    more.update(teachers[1], checkpoint=str(teachers[1]["checkpoint"]))
    c = config(root, teachers, None, more_teachers=[], max_steps=1, teacher_cache=tmp_path / "cache")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**json.loads(c.model_dump_json()), **fields}))
    args = ["train", str(file), "--out", str(tmp_path / "run")]
    assert command([*args, "--dry-run"]) == 0
    plan = " ".join(capsys.readouterr().err.split())
    assert "teacher 1: resnet14" in plan
    assert "kd times 1" in plan
    assert "teacher 2: timm/vit_tiny_patch16_224" in plan
    assert "tokens times 0.5" in plan
    assert plan.count("cache:") == 2
    assert command(args) == 0
    assert lines(tmp_path / "run")[0]["tokens_patch"] > 0
