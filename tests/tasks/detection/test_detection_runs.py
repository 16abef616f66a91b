"""Detection runs: the run folder, exact resume, two processes, the report."""

import html
import json
import math
import os
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from processes import Forked, run_group
from safetensors.torch import load_file
from small_runs import StopAfter, ask_teacher
from tiny_detectors import group_norm, two_stage, write_set

from mdistiller.cli.main import run
from mdistiller.cli.plan import plan_lines
from mdistiller.deploy.export import export_student
from mdistiller.deploy.student import load_student
from mdistiller.errors import ConfigError, DataError, Interrupted
from mdistiller.recipes.describe import differences
from mdistiller.report import write_report
from mdistiller.report.markup import markdown_text
from mdistiller.report.runs import load_run, summarize
from mdistiller.runs.checkpoint import load_state
from mdistiller.runs.folder import read_metrics
from mdistiller.runs.loggers import hyper_parameters
from mdistiller.runs.progress import Reporter
from mdistiller.tasks.detection.coco import DetectionBatch
from mdistiller.tasks.detection.config import DetectionConfig
from mdistiller.tasks.detection.deployment import Box, class_color
from mdistiller.tasks.detection.distiller import DetectionTeacher
from mdistiller.tasks.detection.methods import default_config
from mdistiller.training import choose
from mdistiller.training.build import build_run
from mdistiller.training.distributed import World
from mdistiller.training.launch import train
from mdistiller.training.task import get_task, load_config

CLOCK = ("seconds", "ms_per_step")
METRICS = ["AP", "AP50", "AP75"]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    """Every detector by name is a tiny one; the teacher is wider."""
    monkeypatch.setattr("mdistiller.tasks.detection.models.create_detector", tiny)


def tiny(name, num_classes, *, short_side, long_side, **options):
    seed = int(torch.randint(1000, ()))
    size = {"min_size": short_side, "max_size": long_side}
    return two_stage(seed, width=16 if name == "wide" else 8, classes=num_classes, **size, **options)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_set(folder, 8)
    write_set(folder, 4, "instances_val.json", seed=1)
    return folder


def config(data, out, **changes):
    settings = {
        "data": {"root": str(data), "workers": 0},
        "augment": {"short_sides": [56, 64], "long_side": 96},
        "student": {"name": "small", "options": {"box_score_thresh": 0.0}},
        "optim": {"lr": 0.02, "clip_norm": 5.0, "weight_decay": 1e-4},
        "epochs": 3,
        "batch_size": 2,
        "log_every": 1,
        "ema": 0.5,
        "device": "cpu",
        "out": str(out),
    }
    return DetectionConfig.model_validate(settings | changes)


def distilled(teacher, method="dkd+reviewkd"):
    return {"teacher": {"name": "wide", "checkpoint": str(teacher)}, "method": {"name": method}}


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A teacher's run, and one of a student that it teaches."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mdistiller.tasks.detection.models.create_detector", tiny)
        train(config(data, folder / "teacher", student={"name": "wide"}, ema=None))
        before = load_file(folder / "teacher" / "student.safetensors")
        train(config(data, folder / "student", **distilled(folder / "teacher")))
    return folder, before


def timeless(folder):
    lines = read_metrics(folder)
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


def assert_same(a, b):
    """Bit for bit."""
    a, b = load_file(a), load_file(b)
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def test_the_run_folder(runs):
    folder, _ = runs
    names = {p.name for p in (folder / "student").iterdir()}
    assert names == {
        *("config.json", "env.json", "metrics.jsonl", "resume.pt"),
        *("student.safetensors", "ema_student.safetensors"),
    }
    lines = read_metrics(folder / "student")
    kinds = [line["kind"] for line in lines]
    assert kinds == ["train"] * 4 + ["eval"] + ["train"] * 4 + ["eval"] + ["train"] * 4 + ["eval", "summary"]
    assert {"dkd", "reviewkd", "loss_classifier", "loss_objectness", "loss"} <= lines[0].keys()
    parts = [v for k, v in lines[0].items() if k in ("dkd", "reviewkd") or k.startswith("loss_")]
    assert lines[0]["loss"] == pytest.approx(sum(parts), rel=1e-5)
    first, *_, last, summary = (line for line in lines if line["kind"] != "train")
    assert first["train"]["loss_classifier"] > last["train"]["loss_classifier"]
    assert {"AP", "AP50", "AP75", "APs", "APm", "APl", "categories", "best_AP", "ema"} <= last.keys()
    assert list(last["categories"]) == ["red", "green", "blue"]
    assert summary["last"] == {name: last[name] for name in [*METRICS, "epoch"]} | {
        "ema_AP": last["ema"]["AP"]
    }
    assert summary["best"]["AP"] == max(line["AP"] for line in lines if line["kind"] == "eval")
    own = sum(p.numel() for p in two_stage().parameters())
    assert summary["student_parameters"] == own
    state = load_state(folder / "student" / "resume.pt")["learner"]
    adapters = sum(v.numel() for k, v in state.items() if k.startswith("method.") and "running" not in k)
    assert 0 < summary["method_parameters"] <= adapters
    assert {k.removeprefix("student.") for k in state if k.startswith("student.")} == set(
        load_file(folder / "student" / "student.safetensors")
    )


def test_the_teacher_stays_as_it_is(runs, data):
    folder, before = runs
    trainer, source = build(config(data, folder / "new", **distilled(folder / "teacher")))
    teacher = trainer.distiller.asked
    assert isinstance(teacher, DetectionTeacher)
    trainer.distiller.train()
    for step in range(2):
        (batch,) = source.next_batches(step, 1)
        assert ask_teacher(trainer.distiller, [batch]) == [None]  # it reads the student's proposals
        trainer.train_step(batch, None)
    after = teacher.model.state_dict()
    assert [key for key, value in before.items() if not torch.equal(value, after[key])] == []


def build(configuration):
    return build_run(get_task("detection"), configuration, World(torch.device("cpu")))


def test_a_run_that_was_stopped_within_an_epoch_goes_on_exactly(runs, data, tmp_path):
    folder, _ = runs
    again = config(data, tmp_path / "run", **distilled(folder / "teacher"))
    with pytest.raises(Interrupted, match=r"SIGTERM after step 6.*mdistiller train .* --resume"):
        train(again, reporter=StopAfter(6))
    assert load_state(tmp_path / "run" / "resume.pt")["batch"] == 2
    train(again, resume=True)
    for name in ("student.safetensors", "ema_student.safetensors"):
        assert_same(tmp_path / "run" / name, folder / "student" / name)
    assert timeless(tmp_path / "run") == timeless(folder / "student")
    with pytest.raises(ConfigError, match=r"cannot resume .* with another seed"):
        train(again.replace(seed=1), resume=True)


@pytest.mark.parametrize("weight", ["auto", None])
def test_settings_by_the_students_kind_are_in_the_config(runs, data, tmp_path, monkeypatch, weight):
    """A version with other values for the kind then repeats the run."""
    given = config(data, tmp_path / "run", epochs=1, **distilled(runs[0] / "teacher", "fgd+mgd"))
    given = given.replace(method={"mgd": {"weight": weight}, "fgd": {"context_weight": 0.25}})
    with pytest.raises(Interrupted):
        train(given, reporter=StopAfter(2))
    stored = load_config(tmp_path / "run" / "config.json")
    fgd, mgd = stored.method.fgd, stored.method.mgd
    assert (fgd.object_weight, fgd.context_weight, fgd.temperature, mgd.masked) == (5e-5, 0.25, 0.5, 0.45)
    assert mgd.weight == 5e-7 if weight is None else mgd.weight > 0
    assert differences(stored, given) == []
    assert not any(name.startswith("method") for name in hyper_parameters(stored, given))
    train(given, resume=True)
    again = stored.replace(out=tmp_path / "again")
    for kind in (type(fgd), type(mgd)):
        monkeypatch.setitem(kind.by_kind, "proposals", dict.fromkeys(kind.by_kind["proposals"], 0.125))
    train(again)
    assert_same(tmp_path / "again" / "student.safetensors", tmp_path / "run" / "student.safetensors")
    train(given.replace(out=tmp_path / "later"))
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "later" / "student.safetensors", tmp_path / "run" / "student.safetensors")


def train_stored(values):
    """A run in a process of its own, where the detectors are not tiny yet."""
    from mdistiller.tasks.detection import models

    models.create_detector = tiny
    train(DetectionConfig.model_validate(values))


def test_a_killed_run_goes_on_from_its_last_save_within_the_epoch(runs, data, tmp_path):
    folder, _ = runs
    again = config(data, tmp_path / "run", save_minutes=1e-9, **distilled(folder / "teacher"))
    process = Forked(train_stored, again.model_dump(mode="json"))
    state = tmp_path / "run" / "resume.pt"
    end = time.monotonic() + 90
    while not (state.exists() and len(read_metrics(tmp_path / "run")) > 1):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 0 < load_state(state)["step"] < 12
    train(again.replace(save_minutes=None), resume=True)
    for name in ("student.safetensors", "ema_student.safetensors"):
        assert_same(tmp_path / "run" / name, folder / "student" / name)
    assert timeless(tmp_path / "run") == timeless(folder / "student")


def test_every_epoch_has_all_images_and_any_step_can_be_the_first(data, tmp_path):
    _, source = build(config(data, tmp_path / "run"))
    straight = [source.next_batches(step, 9)[0] for step in range(8)]
    for epoch in (straight[:4], straight[4:]):
        seen = sorted(i for batch in epoch for i in batch.index.tolist())
        assert seen == list(range(8))
    for step in (6, 1, 3, 4):
        batch = source.next_batches(step, 9)[0]
        assert torch.equal(batch.index, straight[step].index)
        assert all(torch.equal(a, b) for a, b in zip(batch.image, straight[step].image, strict=True))


def test_bfloat16_and_kept_epochs(runs, data, tmp_path):
    folder, _ = runs
    changes = {"precision": "bfloat16", "save_epochs": [1], "max_steps": 5, "ema": None}
    result = train(config(data, tmp_path / "run", **distilled(folder / "teacher"), **changes))
    assert result.summary["step"] == 5
    assert (tmp_path / "run" / "student-e1.safetensors").is_file()
    weights = load_file(tmp_path / "run" / "student.safetensors")
    assert weights["roi_heads.box_predictor.cls_score.weight"].dtype == torch.float32


def test_what_is_refused(data, tmp_path):
    with pytest.raises(ConfigError, match=r"teacher\.checkpoint: the teacher wide has no weights"):
        train(config(data, tmp_path / "a", teacher={"name": "wide"}, method={"name": "dkd"}))
    assert not (tmp_path / "a").exists()
    for change in ({"diagnostics": True}, {"teacher_batch": 8}):
        with pytest.raises(ValueError, match="Extra inputs are not permitted"):  # fields of classifiers
            config(data, tmp_path / "b", **change)
    for change in ({"probe_epochs": 1}, {"gradient_checkpointing": True}, {"compile": "default"}):
        with pytest.raises(ValueError, match=r"(probe_epochs|gradient_checkpointing|compile): .*allowed"):
            config(data, tmp_path / "b", **change)
    write_set(tmp_path / "crowd", 4)

    def only_crowds(content):
        for annotation in content["annotations"]:
            annotation["iscrowd"] = 1

    write_set(tmp_path / "crowd", 2, "instances_val.json", change=only_crowds)
    with pytest.raises(ConfigError, match=r"the test images of .* have no object"):
        train(config(tmp_path / "crowd", tmp_path / "c"))


def test_paths_in_the_config_are_absolute(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "backbone.safetensors").touch()
    options = {"backbone_weights": "backbone.safetensors"}
    one = config("data", "run", student={"name": "small", "options": options}).absolute()
    assert one.student.options == {"backbone_weights": str(tmp_path / "backbone.safetensors")}
    assert (one.data.root, one.out) == (tmp_path / "data", tmp_path / "run")
    relative = config("data", "run").replace(data={"test_images": "photographs"}).absolute()
    assert str(relative.data.test_images) == "photographs"  # relative to root
    for weights in ("DEFAULT", None):
        named = config("data", "run", student={"name": "small", "options": {"backbone_weights": weights}})
        assert named.absolute().student == named.student


# The student again


def test_load_student_gives_the_detector_of_a_run(runs):
    folder, _ = runs
    student = load_student(folder / "student")
    weights = load_file(folder / "student" / "student.safetensors")
    assert all(torch.equal(value, weights[key]) for key, value in student.state_dict().items())
    assert not student.training
    assert (student.transform.min_size, student.transform.max_size) == ((64,), 96)
    assert student.roi_heads.score_thresh == 0.0  # the config's own option
    (found,) = student([torch.rand(3, 64, 80)])
    assert found.keys() == {"boxes", "labels", "scores"}


# Other settings of the loop


def test_accumulated_parts_give_the_gradient_of_the_whole(runs, data, tmp_path):
    """Two equal images, without sampling and batch statistics: each part then has the loss of the whole."""
    folder, _ = runs
    moved = []
    for parts in (1, 2):
        optim = {"lr": 0.1, "momentum": 0, "weight_decay": 0, "schedule": "constant", "accumulate": parts}
        taught = distilled(folder / "teacher", "kd")
        trainer, source = build(config(data, tmp_path / "run", optim=optim, ema=None, **taught))
        for module in trainer.student.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        trainer.student.roi_heads.fg_bg_sampler.batch_size_per_image = 10**6
        trainer.student.rpn.fg_bg_sampler.batch_size_per_image = 10**6
        before = {name: p.detach().clone() for name, p in trainer.distiller.named_parameters()}
        (batch,) = source.next_batches(0, 1)
        twice = DetectionBatch(batch.image[:1] * 2, batch.target[:1] * 2, batch.index)
        trainer.train_step(twice, None)
        moved.append({name: before[name] - p.detach() for name, p in trainer.distiller.named_parameters()})
    for name, value in moved[0].items():
        assert value.any(), name
        torch.testing.assert_close(value, moved[1][name], rtol=1e-3, atol=1e-5, msg=name)


def test_dot_and_a_teacher_of_its_own_average(runs, data, tmp_path):
    folder, _ = runs
    dot = {"name": "dot", "lr": 0.002, "weight_decay": 1e-4}
    train(config(data, tmp_path / "dot", optim=dot, **distilled(folder / "teacher", "dkd")))
    own = {"teacher": {"name": "self"}, "method": {"name": "dkd"}}
    train(config(data, tmp_path / "self", ema=0.9, **own))
    for name in ("dot", "self"):
        lines = [line for line in read_metrics(tmp_path / name) if line["kind"] == "train"]
        assert lines[-1]["loss_classifier"] < lines[0]["loss_classifier"]
        assert lines[-1]["dkd"] > 0
    with pytest.raises(ConfigError, match="DOT needs a distillation loss"):
        train(config(data, tmp_path / "none", optim=dot))


# Measured weights


class Notes(Reporter):
    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)


def gradient_norms(trainer, batch, step):
    """Norms of the gradients of the task's losses and of the method's, at parameters that both reach."""
    student = list(trainer.student.parameters())
    gradients = []
    for of_task in (True, False):
        trainer.seed_step(step)
        trainer.distiller.zero_grad(set_to_none=True)
        out = trainer.distiller.train()(*batch, torch.ones(()))
        sum(value for name, value in out.losses.items() if (name in out.task) == of_task).backward()
        gradients.append([p.grad for p in student])
    both = [(a, b) for a, b in zip(*gradients, strict=True) if a is not None and b is not None]
    assert 0 < len(both) < len(student)
    return [math.sqrt(sum(float(g.double().square().sum()) for g in own)) for own in zip(*both, strict=True)]


@pytest.mark.parametrize("method", ["cwd", "fgd", "fgfi", "fitnet", "mgd", "pkd", "reviewkd"])
def test_a_measured_weight_makes_the_methods_gradient_a_fixed_part_of_the_tasks(runs, data, tmp_path, method):
    """The geometric mean of the ratio over the four batches of two images, by `backward`."""
    (folder, _), ratio = runs, get_task("detection").auto_ratio
    taught = distilled(folder / "teacher") | {"method": default_config(method).replace(weight="auto")}
    asked, notes = config(data, tmp_path / "run", epochs=1, max_steps=3, ema=None, **taught), Notes()
    result = train(asked, reporter=notes)
    stored = load_config(result.path / "config.json")
    weight = stored.method.weight
    assert float(f"{weight:.2g}") == weight
    size = f"{ratio:g} times the task's"
    assert notes.lines == [f"method.weight {weight:g}: makes {method}'s first gradients {size}"]
    trainer, source = build(stored)
    logs = []
    for step, raw in enumerate(source.loader.epoch(0)):
        (batch,) = source.prepare([raw], step)
        task, own = gradient_norms(trainer, batch, step)
        logs.append(math.log(own / task))
    assert len(logs) == 4
    assert math.exp(sum(logs) / 4) == pytest.approx(ratio, rel=0.051)
    losses = [line for line in read_metrics(result.path) if line["kind"] == "train"]
    assert all(math.isfinite(value) for line in losses for value in line.values() if isinstance(value, float))


def test_the_plan_compares_the_gradients_of_methods_and_task(runs, data, tmp_path):
    """By `backward` on the first batch; the run is as it was before."""
    folder, _ = runs
    warning = "(warning: outside the usual 0.1 to 10; try another weight)"
    for weight, mark in ((1.0, ""), (1000.0, f" {warning}")):
        taught = distilled(folder / "teacher") | {"method": default_config("pkd").replace(weight=weight)}
        trainer, source = build(config(data, tmp_path / "run", **taught))
        before = {name: value.clone() for name, value in trainer.distiller.state_dict().items()}
        (line,) = (line for line in plan_lines(trainer, source) if line.startswith("method:"))
        assert all(map(torch.equal, before.values(), trainer.distiller.state_dict().values()))
        (batch,) = source.prepare([next(iter(source.loader.epoch(0)))], 0)
        task, own = gradient_norms(trainer, batch, 0)
        size = f"pkd's gradient is {float(f'{own / task:.2g}'):g} times the task's"
        assert line.endswith(size + mark)
    assert 0.1 < own / task / 1000 < 10
    taught = distilled(folder / "teacher", "dkd+pkd")
    taught["method"]["pkd_weight"] = 1000.0
    trainer, source = build(config(data, tmp_path / "run", **taught))
    (line,) = (line for line in plan_lines(trainer, source) if line.startswith("method:"))
    assert "dkd's gradient is" in line
    assert line.endswith(f"{size} {warning}")


# Two processes


def without_statistics(name, num_classes, **options):
    torch.manual_seed(5)
    return group_norm(tiny(name, num_classes, **options))


def two_processes(data, out):
    """Three steps; the weights of every process go into a file."""
    from mdistiller.tasks.detection import models

    models.create_detector = without_statistics
    kept = {}
    changes = {"epochs": 1, "max_steps": 3, "ema": None, "batch_size": 2, **distilled(f"{out}-teacher")}
    original = choose.build_run

    def build(*args):
        kept["trainer"], source = original(*args)
        return kept["trainer"], source

    choose.build_run = build
    result = train(config(data, out, **changes))
    rank = os.environ.get("RANK", "0")
    torch.save(kept["trainer"].distiller.state_dict(), f"{out}-rank{rank}.pt")
    if result.path is not None:
        print(json.dumps(result.summary))


def test_two_processes_train_one_detector(data, tmp_path, monkeypatch):
    """Both end with the same weights, adapters too, and evaluate like one process with these weights."""
    monkeypatch.setattr("mdistiller.tasks.detection.models.create_detector", without_statistics)
    train(config(data, tmp_path / "run-teacher", student={"name": "wide"}, max_steps=1, ema=None))
    codes, (said, silence), errors = run_group(two_processes, data, tmp_path / "run")
    assert (codes, silence) == ([0, 0], ""), errors
    summary = json.loads(said)
    first, second = (torch.load(tmp_path / f"run-rank{rank}.pt") for rank in range(2))
    assert any("adapters" in key or "fusions" in key for key in first)
    # Batch norm's statistics, here those of adapters, are each process's own.
    differing = [key for key in first if not torch.equal(first[key], second[key])]
    assert [key for key in differing if "running" not in key] == []
    start = config(data, tmp_path / "alone", **distilled(tmp_path / "run-teacher") | {"ema": None})
    trainer, _ = build(start)
    moved = [
        key for key, value in trainer.distiller.state_dict().items() if not torch.equal(value, first[key])
    ]
    assert len(moved) > len(first) / 2
    trainer.distiller.load_state_dict(first)
    metrics = trainer.evaluator(trainer.student, True)
    assert {name: metrics[name] for name in METRICS} == {name: summary["last"][name] for name in METRICS}


FIRST_NORM = "backbone.body.0.1"


class SmallClassifier(torch.nn.Module):
    """Five stages of one convolution and one norm, in the place of MobileNetV2."""

    def __init__(self):
        super().__init__()
        layers = [
            (torch.nn.Conv2d(width, 8, 3, 2, 1), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
            for width in (3, 8, 8, 8, 8)
        ]
        self.features = torch.nn.Sequential(*(torch.nn.Sequential(*stage) for stage in layers))

    def forward(self, images):
        return self.features(images)


def two_processes_with_norms(data, out, batch_norm):
    """Two steps of a small RetinaNet; each process stores what its first norm gets, and all buffers."""
    from mdistiller.tasks.detection import models

    models.create_backbone = lambda *_: SmallClassifier()
    models.BACKBONES["mobilenet_v2"] = models._Backbone("features", tuple((n,) for n in "01234"), 0)
    models._CHANNELS = 16
    kept = {"inputs": []}
    original = choose.build_run

    def build(*args):
        kept["trainer"], source = original(*args)
        student = kept["trainer"].student
        kept["before"] = {name: buffer.clone() for name, buffer in student.named_buffers()}
        norm = student.get_submodule(FIRST_NORM)

        def keep(module, inputs):
            if student.training:
                kept["inputs"].append(inputs[0].detach().clone())

        norm.register_forward_pre_hook(keep)
        return kept["trainer"], source

    choose.build_run = build
    student = {"name": "retinanet_mobilenet_v2", "options": {"batch_norm": batch_norm}}
    train(config(data, out, student=student, batch_size=4, epochs=1, max_steps=2, ema=None))
    kept["after"] = dict(kept.pop("trainer").student.named_buffers())
    torch.save(kept, f"{out}-rank{os.environ['RANK']}.pt")


@pytest.mark.parametrize("batch_norm", ["frozen", "plain"])
def test_norms_of_two_processes(data, tmp_path, batch_norm):
    """Frozen ones keep their buffers; of plain ones, those of the main process's images are saved."""
    out = tmp_path / "run"
    codes, _, errors = run_group(two_processes_with_norms, data, out, batch_norm)
    assert codes == [0, 0], errors
    ranks = [torch.load(f"{out}-rank{rank}.pt") for rank in range(2)]
    saved = load_file(out / "student.safetensors")
    names = [name for name in ranks[0]["before"] if "running" in name]
    assert len(names) == 10
    assert [len(rank["inputs"]) for rank in ranks] == [2, 2]
    if batch_norm == "frozen":
        for rank in ranks:
            assert rank["before"].keys() == rank["after"].keys()
            for name, buffer in rank["before"].items():
                assert torch.equal(buffer, rank["after"][name])
                assert torch.equal(buffer, saved[name])
        return
    own, other = (statistics(rank["inputs"]) for rank in ranks)
    for kind, expected in own.items():
        np.testing.assert_allclose(saved[f"{FIRST_NORM}.{kind}"].numpy(), expected, rtol=1e-4, atol=1e-6)
        assert np.abs(expected - other[kind]).max() > 1e-3
    for name in names:  # the other process has them too, for the evaluation
        assert torch.equal(saved[name], ranks[1]["after"][name])


def statistics(inputs, momentum=0.1):
    """Running mean and variance of batches of maps, from a mean of 0 and a variance of 1."""
    mean, variance = np.zeros(inputs[0].shape[1]), np.ones(inputs[0].shape[1])
    for batch in inputs:
        values = batch.double().numpy().transpose(1, 0, 2, 3).reshape(len(mean), -1)
        mean += momentum * (values.mean(1) - mean)
        variance += momentum * (values.var(1, ddof=1) - variance)
    return {"running_mean": mean, "running_var": variance}


# Cost and accuracy


def test_compare(runs, data, tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(DetectionConfig, "check_name", staticmethod(lambda name: None))
    folder, _ = runs
    student, alone = tmp_path / "student", tmp_path / "alone"
    shutil.copytree(folder / "student", student)
    train(config(data, alone))
    out, card = export_student(student, "onnx")
    words = [*map(str, ["compare", folder / "teacher", alone, student, "--exports", out])]
    assert run([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = found["rows"]
    distilled_label = "DKD+ReviewKD"
    labels = ["teacher", "student alone", distilled_label, f"{distilled_label}, onnx"]
    assert [row["label"] for row in rows] == labels
    assert (found["metric"], found["test_set"], found["image_shape"]) == ("AP", data.name, [3, 80, 64])
    recorded = [read_metrics(path)[-1]["last"]["AP"] for path in (folder / "teacher", alone, student)]
    assert [row["metric"] for row in rows[:3]] == pytest.approx(recorded)
    assert rows[3]["metric"] == pytest.approx(card.measured.value)
    for row in rows:
        gain = None if row is rows[1] else pytest.approx(row["metric"] - rows[1]["metric"])
        assert row["over_alone"] == gain
        assert list(row["ms"]) == ["1"]
        assert row["ms"]["1"] > 0
        wide = row is rows[0]
        assert row["parameters"] == sum(p.numel() for p in two_stage(width=16 if wide else 8).parameters())
    assert rows[0]["macs"] > rows[1]["macs"] == rows[3]["macs"] == card.macs > 1e5
    assert rows[2]["bytes"] == (student / "student.safetensors").stat().st_size
    readme = (out / "README.md").read_text()
    assert markdown_text(f"{card.macs / 1e6:,.1f} million for one image of shape [3, 80, 64]") in readme
    assert "| milliseconds an image | " in readme
    assert f"| size of the file | {rows[3]['bytes'] / 1e6:,.2f} MB |" in readme
    page = write_report([folder / "teacher", alone, student], tmp_path / "report.html").read_text()
    assert "Table of accuracy and cost" in page
    assert all(html.escape(label) in page for label in labels)
    assert run([*words, "--batch", "2"]) == 2
    assert "batch: got 2; allowed for a run of detection: 1" in capsys.readouterr().err
    assert run([*words, "--no-eval"]) == 0
    shown = capsys.readouterr().out
    assert f"| teacher | {recorded[0]:.2f} |" in shown
    assert shown.rstrip().endswith(", images of shape [3, 80, 64]")


# The report


def test_the_report(runs, tmp_path):
    folder, _ = runs
    folders = [folder / "teacher", folder / "student"]
    rows = summarize([load_run(run) for run in folders])
    assert [row.metric for row in rows] == ["AP", "AP"]
    assert [row.label for row in rows] == ["teacher", "DKD+ReviewKD"]
    assert rows[1].last.mean == read_metrics(folder / "student")[-1]["last"]["AP"]
    own = read_metrics(folder / "teacher")[-1]["last"]["AP"]
    assert (rows[0].over_teacher, rows[1].teacher) == (None, own)
    assert rows[1].over_teacher == pytest.approx(rows[1].last.mean - own)
    page = html.unescape(write_report(folders, tmp_path / "report.html", images=3).read_text())
    for text in ("Average precision", "test AP, %", "Boxes on test images", "AP by class"):
        assert text in page
    assert f"<h1>{folder_name(folder)}: 2 runs</h1>" in page
    assert f"mdistiller train {folder / 'student' / 'config.json'}" in page
    assert page.count("<img ") == page.count("true objects: ") == 6  # three photographs for each row
    assert "<img " not in write_report(folders, tmp_path / "without.html").read_text()


def folder_name(folder):
    return load_run(folder / "student").config["data"]["root"].rpartition("/")[2]


def test_boxes_are_drawn_where_they_are(runs, tmp_path, monkeypatch):
    """A detector that answers with the truth: the outline of each object has the color of its class."""
    folder, _ = runs
    from mdistiller.tasks.detection import report as part

    def perfect(run, images, device):
        rows = [zip(image.labels.tolist(), image.boxes.tolist(), strict=True) for image in images.images]
        return [[Box(images.classes[label - 1], 0.75, *box) for label, box in row] for row in rows]

    pictures = []
    monkeypatch.setattr(part, "_predict", perfect)
    monkeypatch.setattr(part.html, "picture", lambda image, side, alt: pictures.append((image, alt)) or "")
    page = write_report([folder / "student"], tmp_path / "report.html", images=2).read_text()
    last = [line for line in read_metrics(folder / "student") if line["kind"] == "eval"][-1]
    values = [*last["categories"].values(), last["AP"]]
    found = re.findall(r">(\d+\.\d|–)</td>", page.partition('id="class-ap"')[2])
    assert found[: len(values)] == ["–" if v is None else f"{v:.1f}" for v in values]
    shown = part.load_split(part._test_images(load_run(folder / "student"), 2), "test")
    for k, (image, alt) in enumerate(pictures):
        assert alt.count(" 0.75") == len(shown.images[k].labels) > 0
        pixels = image.numpy().astype(int)
        plain = np.array(part._photograph(shown, k)).astype(int)
        scale = plain.shape[1] / shown.images[k].size[1]
        for (x1, _, _, y2), label in zip(
            shown.images[k].boxes.tolist(), shown.images[k].labels.tolist(), strict=True
        ):
            at = round(scale * y2), round(scale * x1)  # a corner without a label
            assert tuple(pixels[at]) == class_color(label - 1)
            assert tuple(plain[at]) == (255, 255, 255)
    assert len(pictures) == 2


def test_data_that_has_gone_and_runs_of_two_kinds(runs, tmp_path, data):
    folder, _ = runs
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in (folder / "student").iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    stored = json.loads((moved / "config.json").read_text())
    other = stored | {"data": stored["data"] | {"root": str(tmp_path / "nowhere")}}
    (moved / "config.json").write_text(json.dumps(other))
    page = write_report([moved], tmp_path / "report.html", images=2).read_text()
    assert "Missing parts" in page
    assert "nowhere has no" in html.unescape(page)
    other = stored | {"task": "classification", "data": {"kind": "digits"}}
    (moved / "config.json").write_text(json.dumps(other))
    text = (moved / "metrics.jsonl").read_text().replace('"AP"', '"top1"').replace('"best_AP"', '"best_top1"')
    (moved / "metrics.jsonl").write_text(text)
    with pytest.raises(DataError, match="a page for each kind"):
        write_report([moved, folder / "student"], tmp_path / "both.html")


def test_two_teachers_with_a_method_each(runs, data, tmp_path):
    teacher = runs[0] / "teacher"
    more = {"name": "wide", "checkpoint": str(teacher), "method": {"name": "pkd"}, "weight": 0.5}
    both = config(data, tmp_path / "both", **distilled(teacher, "fitnet"), more_teachers=[more], max_steps=2)
    train(both)
    alone = both.replace(method={"name": "pkd"}, more_teachers=[], out=tmp_path / "alone")
    train(alone)
    first, single = (timeless(c.out)[0] for c in (both, alone))
    assert first["fitnet"] > 0
    assert first["pkd"] == pytest.approx(0.5 * single["pkd"], rel=1e-4)  # pkd has no layers
    with pytest.raises(ValueError, match=r"teacher.image_size: a detector normalizes and scales its images"):
        config(data, tmp_path, **distilled(teacher), more_teachers=[{**more, "image_size": 32}])
    with pytest.raises(ValueError, match="more_teachers: cache_taps: this task caches no teacher"):
        config(data, tmp_path, **distilled(teacher), more_teachers=[{**more, "cache_taps": ["stage1"]}])
