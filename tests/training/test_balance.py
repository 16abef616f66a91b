"""Weights `auto` of feature methods: measured from gradients, stored, exact on repeat; losses far apart."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from small_runs import ask_teacher, stored_teacher

import mdistiller
from mdistiller.config import SELF, OptimConfig, with_choices
from mdistiller.data import AugmentConfig, DataConfig
from mdistiller.errors import ConfigError, Interrupted
from mdistiller.methods import list_methods, method_config
from mdistiller.methods.changes import takes_auto
from mdistiller.models import ModelConfig
from mdistiller.models.weights import read_weights
from mdistiller.runs.folder import CONFIG
from mdistiller.runs.progress import Reporter
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.training import balance, choose
from mdistiller.training.build import build_run
from mdistiller.training.distributed import World
from mdistiller.training.task import get_task, load_config

CPU = World(torch.device("cpu"))
AUTO = [name for name in list_methods() if takes_auto(method_config(name))]


class Notes(Reporter):
    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return stored_teacher(tmp_path_factory.mktemp("teacher"), 16)


@pytest.fixture
def config(teacher, tmp_path):
    def make(method, weights=("weight",), **changes):
        values = {}
        for name in weights:
            part, _, field = name.rpartition(".")
            values[part or field] = {field: "auto"} if part else "auto"
        settings = {
            "data": DataConfig(kind="synthetic", synthetic_samples=44, synthetic_classes=4, image_size=16),
            "augment": AugmentConfig(padding=1),
            "student": ModelConfig(name="resnet8"),
            "teacher": teacher,
            "method": method_config(method).replace(**values),
            "optim": OptimConfig(lr=0.02),
            "batch_size": 16,
            "epochs": 1,
            "layout": "contiguous",
            "device": "cpu",
            "diagnostics": False,
            "out": tmp_path / "run",
        }
        return ClassificationConfig(**(settings | changes))

    return make


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def own_ratio(found, weights, task_weight=1.0):
    """The geometric mean over three batches of 16, 16 and 12 images of |gradient of task| / |of method|.

    The weights are those of the method and of its sum; both gradients are taken with `backward`.
    """
    unit = with_choices(found, dict.fromkeys(weights, 1.0))
    trainer, source = build_run(get_task("classification"), unit, CPU)
    distiller = trainer.distiller.train()
    method, student = distiller.method, mdistiller.tap(distiller.student, distiller.method.student_taps)
    logs = {name: [] for name in weights}
    for step, raw in enumerate(source.loader.epoch(0)):
        (batch,) = source.prepare([raw], step)
        (outputs,) = ask_teacher(distiller, [batch])

        def gradients(loss):
            distiller.zero_grad(set_to_none=True)
            loss.backward()
            return [p.grad for p in student.parameters()]

        for name in weights:
            part = method if name == "method.weight" else method.parts[name.split(".")[1]]
            trainer.seed_step(step)
            read = student(batch.image)
            task = gradients(task_weight * F.cross_entropy(read.logits, batch.label))
            trainer.seed_step(step)
            losses = part(student(batch.image), outputs, batch, torch.ones(()))
            distil = gradients(sum(losses.values()))
            both = [(a, b) for a, b in zip(task, distil, strict=True) if a is not None and b is not None]
            top, bottom = (
                math.fsum(float(x.double().square().sum()) for x in g) for g in zip(*both, strict=True)
            )
            logs[name].append(0.5 * math.log(top / bottom))
    return {name: math.exp(math.fsum(values) / len(values)) for name, values in logs.items()}


@pytest.mark.parametrize("method", ["at", "fitnet", "reviewkd", "sp"])
def test_the_gradients_are_equal_as_autograd_by_hand_finds_them(config, method):
    found = config(method)
    notes = Notes()
    run = mdistiller.train(found, reporter=notes)
    stored = load_config(run.path / CONFIG).method.weight
    assert stored == pytest.approx(own_ratio(found, ["method.weight"])["method.weight"], rel=0.051)
    assert float(f"{stored:.2g}") == stored
    words = f"method.weight {stored:g}: makes {method}'s first gradients as large as the task's"
    assert notes.lines == [words]


def test_the_task_is_taken_with_its_weight(config):
    found = config("at").replace(method={"task_weight": 0.1})
    run = mdistiller.train(found)
    expected = own_ratio(found, ["method.weight"], task_weight=0.1)["method.weight"]
    assert load_config(run.path / CONFIG).method.weight == pytest.approx(expected, rel=0.051)


def test_each_part_of_a_sum_has_its_own_weight(config):
    names = ["method.at.weight", "method.fitnet.weight"]
    found = config("dkd+at+fitnet", [name.removeprefix("method.") for name in names])
    notes = Notes()
    stored = load_config(mdistiller.train(found, reporter=notes).path / CONFIG).method
    expected = own_ratio(found, names)
    assert stored.at.weight == pytest.approx(expected[names[0]], rel=0.051)
    assert stored.fitnet.weight == pytest.approx(expected[names[1]], rel=0.051)
    assert stored.dkd == found.method.dkd
    assert [line.partition(" ")[0] for line in notes.lines] == names


@pytest.mark.parametrize("method", AUTO)
def test_every_method_with_one_weight_of_features_can_be_measured(config, method):
    assert len(AUTO) == 13
    trainer, source = build_run(
        get_task("classification"), with_choices(config(method), {"method.weight": 1.0}), CPU
    )
    weights = balance.measure_weights(trainer, source, ["method.weight"])
    assert 0 < weights["method.weight"] < math.inf


@pytest.mark.parametrize("method", ["kd", "vid", "semckd", "simkd", "ofa"])
def test_other_methods_take_numbers_alone(method):
    with pytest.raises(ConfigError, match=f"method '{method}': weight: .*number.*got 'auto'"):
        method_config(method).replace(weight="auto")
    with pytest.raises(ConfigError, match="greater than or equal to 0"):
        method_config("at").replace(weight=-1.0)


def test_the_parts_of_a_batch_count_as_the_whole(config):
    whole = with_choices(config("fitnet"), {"method.weight": 1.0})
    found = [still_ratio(whole.replace(optim={"accumulate": count}), CPU) for count in (1, 2)]
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_frozen_parts_and_norms_count_as_in_the_tuning(config):
    changes = {"freeze": ("stem", "stage1"), "norm_eval": True, "epochs": 2, "probe_epochs": 1}
    run = with_choices(config("fitnet", **changes), {"method.weight": 1.0})
    trainer, source = build_run(get_task("classification"), run, CPU)
    (batch,) = source.prepare([next(iter(source.loader.epoch(0)))], 0)
    (outputs,) = ask_teacher(trainer.distiller, [batch])
    found = balance.gradient_ratios(trainer, batch, outputs, ["method.weight"])["method.weight"]
    method = trainer.distiller.method
    read = mdistiller.tap(trainer.student.eval(), method.student_taps)(batch.image)
    hint = method(read, outputs, batch, torch.ones(()))["fitnet"]
    losses = hint, F.cross_entropy(read.logits, batch.label)
    tuned = list(trainer.student.layer2.parameters())  # of both losses
    norms = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, tuned, retain_graph=True)]).norm()
        for loss in losses
    ]
    assert found == pytest.approx(float(norms[0] / norms[1]), rel=1e-4)


def test_several_teachers_share_one_weight(config, teacher):
    one = config("at")
    two = one.replace(more_teachers=(teacher,), ensemble="losses")
    found = [
        load_config(mdistiller.train(c.replace(out=c.out / str(i))).path / CONFIG)
        for i, c in enumerate((one, two))
    ]
    assert found[0].method.weight == found[1].method.weight  # the same teacher twice


def test_a_measured_run_has_the_bits_of_its_repetition(config, tmp_path):
    first = mdistiller.train(config("at+fitnet", ["at.weight", "fitnet.weight"]))
    stored = load_config(first.path / CONFIG)
    again = mdistiller.train(stored.replace(out=tmp_path / "again"))
    assert same(read_weights(first.path), read_weights(again.path))
    assert load_config(again.path / CONFIG).method == stored.method


def test_precision_and_layout_are_measured_beside_it(config, monkeypatch):
    monkeypatch.setattr(choose, "_LEAST_STEPS", 1)
    notes = Notes()
    run = mdistiller.train(config("at", layout="auto"), reporter=notes)
    stored = load_config(run.path / CONFIG)
    assert stored.layout != "auto"
    assert stored.method.weight > 0
    assert [line.split()[0] for line in notes.lines] == ["precision", "method.weight"]


def test_a_resumed_run_takes_the_stored_weight(config, monkeypatch):
    asked = config("at", epochs=2, max_steps=4)
    stop = monkeypatch.context()
    with stop as patch:
        patch.setattr("mdistiller.training.signals.Stop.requested", lambda *a: True)
        patch.setattr("mdistiller.training.signals.Stop.reason", "test", raising=False)
        with pytest.raises(Interrupted, match="--resume"):
            mdistiller.train(asked)
    weight = load_config(asked.out / CONFIG).method.weight
    monkeypatch.setattr(choose, "measure_weights", lambda *a: pytest.fail("measured again"))
    resumed = mdistiller.train(asked, resume=True)
    assert load_config(asked.out / CONFIG).method.weight == weight
    whole = mdistiller.train(load_config(asked.out / CONFIG).replace(out=asked.out / "whole"))
    assert same(read_weights(resumed.path), read_weights(whole.path))
    with pytest.raises(ConfigError, match=r"cannot resume .* with another method"):
        mdistiller.train(asked.replace(method={"weight": 2 * weight}), resume=True)


def test_a_loop_of_ones_own_needs_a_number():
    student, teacher = (mdistiller.create_model(name, 4) for name in ("resnet8", "resnet14"))
    with pytest.raises(ConfigError, match=r"weight: method 'fitnet' got 'auto', which mdistiller.train"):
        mdistiller.Distiller(student, teacher, "fitnet", weight="auto")


def test_auto_needs_a_task_and_a_fixed_teacher(config):
    with pytest.raises(ConfigError, match=r"method.weight: auto needs a task_weight above 0"):
        config("at").replace(method={"task_weight": 0.0})
    with pytest.raises(ConfigError, match=r"method.weight: auto needs a teacher other than itself"):
        config("at").replace(teacher=ModelConfig(name=SELF), ema=0.9)


def test_a_loss_without_a_gradient_is_an_error(config, monkeypatch):
    monkeypatch.setattr(balance, "gradient_ratios", lambda *a: {"method.weight": 0.0})
    with pytest.raises(ConfigError, match=r"method.weight: auto needs gradients"):
        mdistiller.train(config("at"))
    assert not config("at").out.exists()


def test_batches_without_a_gradient_are_left_out(config, monkeypatch):
    found = iter([0.0, 0.02, 0.5, *[0.1] * 6])
    monkeypatch.setattr(balance, "gradient_ratios", lambda *a: {"method.weight": next(found)})
    run = mdistiller.train(config("at"))
    assert load_config(run.path / CONFIG).method.weight == 10.0  # 0.1 is the geometric mean of the others


def in_two_processes(rank, folder, run):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(still_ratio(run, World(torch.device("cpu"), rank, 2)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def still_ratio(run, world):
    """The ratio of the first batch in evaluation mode: no statistics of a part of the batch."""
    trainer, source = build_run(get_task("classification"), run, world)
    distiller = trainer.distiller
    distiller.train = lambda mode=True: type(distiller).train(distiller, False)
    (batch,) = source.prepare([next(iter(source.loader.epoch(0)))], 0)
    (outputs,) = ask_teacher(distiller, [batch])
    return balance.gradient_ratios(trainer, batch, outputs, ["method.weight"])["method.weight"]


def test_two_processes_find_the_ratio_of_one(config, tmp_path):
    run = with_choices(config("sp"), {"method.weight": 1.0})  # its loss compares the images of all processes
    run = run.replace(augment={"padding": 0, "flip": False})
    mp.spawn(in_two_processes, (tmp_path, run), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first == second
    assert first == pytest.approx(still_ratio(run, CPU), rel=1e-4)
