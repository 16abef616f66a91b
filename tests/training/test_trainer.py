"""The trainer's step and epochs, on synthetic images with tiny models."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from small_runs import make_trainer, next_batch, step_on
from torch import nn

import mdistiller
from mdistiller.config import OptimConfig
from mdistiller.data import AugmentConfig, DataConfig, load_data
from mdistiller.errors import ConfigError, TapError, TrainingError
from mdistiller.methods import DKDConfig, KDConfig, NoneConfig, load_plugin, method_config
from mdistiller.models import ModelConfig
from mdistiller.runs.folder import read_metrics
from mdistiller.runs.progress import Reporter
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.classification.models import build_model
from mdistiller.training.distributed import World
from mdistiller.training.launch import train

load_plugin(Path(__file__).parents[2] / "examples" / "my_feature_method.py")
CPU = World(torch.device("cpu"))


def config(**changes):
    settings = {
        "data": DataConfig(kind="synthetic", synthetic_samples=96, synthetic_classes=4, image_size=16),
        "augment": AugmentConfig(padding=2),
        "student": ModelConfig(name="resnet8"),
        "method": NoneConfig(),
        "optim": OptimConfig(lr=0.05, schedule="cosine"),
        "epochs": 2,
        "batch_size": 32,
        "log_every": 2,
        "device": "cpu",
    }
    return ClassificationConfig(**(settings | changes))


def trainer(teacher=True, **changes):
    c = config(**changes)
    torch.manual_seed(c.seed)
    student = mdistiller.create_model("resnet8", 4)
    model = mdistiller.create_model("resnet14", 4) if teacher else None
    return make_trainer(c, load_data(c.data), student, model, CPU)


@pytest.fixture(scope="module")
def teacher_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "teacher"
    train(config(student=ModelConfig(name="resnet14"), epochs=4, out=out))
    return out


def steps(t, n):
    t.distiller.train()
    raws = []
    for epoch in range(100):
        for raw in t.source.loader.epoch(epoch):
            raws.append(raw)
            if len(raws) == n:
                return [step_on(t, r) for r in raws]
    raise AssertionError


SOME_DKD = DKDConfig(warmup=0.0, beta=1.0)


@pytest.mark.parametrize(
    ("method", "precision"),
    [
        (NoneConfig(), "float32"),
        (KDConfig(), "float32"),
        (SOME_DKD, "float32"),
        (SOME_DKD, "bfloat16"),
        (SOME_DKD, "float16"),
    ],
)
def test_the_loss_falls(method, precision):
    optim = OptimConfig(lr=0.02, schedule="constant")
    data = DataConfig(kind="synthetic", synthetic_samples=96, synthetic_classes=4, image_size=8)
    t = trainer(method=method, precision=precision, optim=optim, data=data, epochs=10)
    sums = steps(t, 15)
    losses = [float(s["loss"] / s["n"]) for s in sums]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


def test_accumulated_parts_give_the_gradient_of_the_whole():
    grads = []
    for parts in (1, 4):
        optim = OptimConfig(lr=0.1, momentum=0, weight_decay=0, schedule="constant", accumulate=parts)
        t = trainer(method=DKDConfig(warmup=0.0), optim=optim, augment=AugmentConfig(flip=False, padding=0))
        before = [p.detach().clone() for p in t.student.parameters()]
        t.distiller.eval()  # batch statistics would differ between the parts
        step_on(t, next(iter(t.source.loader.epoch(0))))
        grads.append([(b - p.detach()) / 0.1 for b, p in zip(before, t.student.parameters(), strict=True)])
    for whole, parts in zip(*grads, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-3, atol=1e-4)


def test_clipping_bounds_the_update():
    optim = OptimConfig(lr=1.0, momentum=0, weight_decay=0, schedule="constant", clip_norm=0.01)
    t = trainer(method=DKDConfig(warmup=0.0), optim=optim)
    before = torch.cat([p.detach().flatten() for p in t.distiller.parameters()])
    steps(t, 1)
    after = torch.cat([p.detach().flatten() for p in t.distiller.parameters()])
    assert (after - before).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_ema_is_the_average_of_the_weights():
    t = trainer(teacher=False, ema=0.5)
    weight = t.student.fc.weight
    expected = weight.detach().clone()
    for _ in range(3):
        steps(t, 1)
        expected = 0.5 * expected + 0.5 * weight.detach()
    torch.testing.assert_close(t.ema.module.fc.weight, expected)


def test_progress_drives_the_warmup():
    t = trainer(method=DKDConfig(warmup=0.5), epochs=4, teacher=True)
    assert t.total == 12
    seen = [float(s["dkd"]) for s in steps(t, 2)]
    assert seen[0] == 0 < seen[1]


@pytest.mark.parametrize(
    ("progress", "max_steps", "fourths"),
    [
        ("floor", None, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]),
        ("ceil", None, [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]),
        ("ceil", 4, [3, 3, 3, 4]),  # schedules end with the last step
    ],
)
def test_progress_can_move_once_an_epoch(progress, max_steps, fourths):
    method = DKDConfig(warmup=0.5)
    t = trainer(method=method, epochs=4, teacher=True, progress=progress, max_steps=max_steps)
    seen = []
    for _ in fourths:
        steps(t, 1)
        seen.append(float(t.update.progress) * 4)
    assert seen == fourths


def test_mixup_and_label_smoothing_and_adamw_train():
    optim = OptimConfig(name="adamw", lr=2e-3, schedule="constant")
    method = DKDConfig(warmup=0.0, beta=1.0)
    augment = AugmentConfig(mixup_alpha=0.2, cutmix_alpha=1.0)
    t = trainer(method=method, optim=optim, augment=augment, label_smoothing=0.1, epochs=8)
    sums = steps(t, 20)
    losses = [float(s["loss"] / s["n"]) for s in sums]
    assert sum(losses[-4:]) < sum(losses[:4])


def convolutions(width):
    """A classifier with few kernels to compile."""
    torch.manual_seed(width)
    layers = nn.Conv2d(3, width, 3, stride=2), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))


def test_channels_last_and_compile_give_the_same_steps():
    results = []
    for changes in ({"layout": "contiguous"}, {"layout": "channels_last"}, {"compile": "default"}):
        # At higher rates, three steps multiply differences of rounding by more than the bounds below.
        c = config(method=DKDConfig(warmup=0.0), optim=OptimConfig(lr=0.002), ema=0.5, **changes)
        t = make_trainer(c, load_data(c.data), convolutions(8), convolutions(16), CPU)
        start = torch.cat([p.detach().flatten() for p in t.distiller.parameters()])
        losses = [float(s["loss"]) for s in steps(t, 3)]
        ends = [*t.distiller.parameters(), *t.ema.module.parameters()]
        results.append((losses, torch.cat([p.detach().flatten() for p in ends])))
    (plain, weights), *others = results
    moved = (weights[: len(start)] - start).norm()
    for losses, found in others:
        assert losses == pytest.approx(plain, rel=1e-3)
        assert (found - weights).norm() < 0.01 * moved


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path, teacher_run):
    teacher = ModelConfig(name="resnet14", checkpoint=teacher_run)
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        c = config(method=KDConfig(), teacher=teacher, seed=seed, out=tmp_path / name)
        weights.append(load_file(train(c).path / "student.safetensors"))
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert not torch.equal(weights[0]["fc.weight"], weights[2]["fc.weight"])


def test_students_of_all_methods_start_alike(tmp_path, teacher_run, monkeypatch):
    starts = []

    def fit(trainer, *others):
        starts.append({k: v.clone() for k, v in trainer.student.state_dict().items()})
        return {}

    monkeypatch.setattr("mdistiller.training.launch.fit", fit)
    teacher = ModelConfig(name="resnet14", checkpoint=teacher_run)
    train(config(out=tmp_path / "alone"))
    train(config(out=tmp_path / "dkd", method=DKDConfig(), teacher=teacher))
    train(config(out=tmp_path / "other", seed=1))
    assert all(torch.equal(starts[0][k], starts[1][k]) for k in starts[0])
    assert not torch.equal(starts[0]["fc.weight"], starts[2]["fc.weight"])


def test_a_checkpoint_needs_no_pretrained_weights(tmp_path):
    # Fetching them would fail here, without a network, or waste a download elsewhere.
    model = torchvision.models.resnet18(num_classes=4)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    options = {"pretrained": True}
    given = ModelConfig(name="torchvision/resnet18", checkpoint=tmp_path / "weights.pt", options=options)
    built = build_model(given, 4)
    assert torch.equal(built.fc.weight, model.fc.weight)


def test_a_run_s_folder(tmp_path, teacher_run):
    c = config(
        recipe="test",
        method=DKDConfig(),
        teacher=ModelConfig(name="resnet14", checkpoint=teacher_run),
        ema=0.9,
        out=tmp_path / "run",
    )
    result = train(c)
    assert result.path == tmp_path / "run"
    lines = read_metrics(result.path)
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("train", 2),
        ("train", 3),
        ("eval", 3),
        ("train", 5),
        ("train", 6),
        ("eval", 6),
        ("summary", 6),
    ]
    train_line = lines[3]
    assert train_line["loss"] == pytest.approx(train_line["task"] + train_line["dkd"], rel=1e-5)
    final = lines[-2]
    assert {"top1", "top5", "loss", "ema", "train", "ms_per_step", "seconds", "best_top1"} <= set(final)
    assert result.summary == lines[-1]
    assert result.summary["last"]["top1"] == final["top1"]
    assert result.summary["best"]["top1"] == max(line["top1"] for line in lines if line["kind"] == "eval")
    stored = json.loads((result.path / "config.json").read_text())
    here = c.data.model_copy(update={"root": c.data.root.absolute()})  # paths are stored absolute
    expected = c.model_copy(update={"data": here, "layout": "contiguous"})
    assert ClassificationConfig.model_validate(stored) == expected
    assert stored["method"]["name"] == "dkd"
    env = json.loads((result.path / "env.json").read_text())
    assert env["seed"] == 0
    assert env["versions"]["torch"] == torch.__version__
    student = mdistiller.create_model("resnet8", 4)
    student.load_state_dict(load_file(result.path / "student.safetensors"))
    state = torch.load(result.path / "resume.pt", weights_only=True)
    assert not any("teacher" in key for key in state["learner"])


def test_max_steps_ends_within_an_epoch(tmp_path):
    result = train(config(max_steps=4, epochs=50, out=tmp_path / "run"))
    assert result.summary["step"] == 4
    assert [x["step"] for x in read_metrics(result.path) if x["kind"] == "eval"] == [3, 4]


class StopError(Exception):
    pass


class StopAt(Reporter):
    def __init__(self, step):
        self.at = step

    def step(self, done):
        if done == self.at:
            raise StopError


@pytest.fixture(scope="module")
def changes(teacher_run):
    """Settings of a run with much to resume."""
    return {
        "method": DKDConfig(),
        "teacher": ModelConfig(name="resnet14", checkpoint=teacher_run),
        "augment": AugmentConfig(mixup_alpha=0.2),
        "ema": 0.9,
        "epochs": 3,
    }


@pytest.fixture(scope="module")
def whole(changes, tmp_path_factory):
    """The run, never interrupted."""
    return train(config(**changes, out=tmp_path_factory.mktemp("whole") / "run"))


@pytest.mark.parametrize("at", [4, 7])
def test_resumed_equals_never_interrupted(tmp_path, changes, whole, at):
    with pytest.raises(StopError):
        train(config(**changes, out=tmp_path / "cut"), reporter=StopAt(at))
    cut = train(config(**changes, out=tmp_path / "cut"), resume=True)
    for name in ("student.safetensors", "ema_student.safetensors"):
        a, b = load_file(whole.path / name), load_file(cut.path / name)
        assert all(torch.equal(a[k], b[k]) for k in a)

    def lines(path):
        timings = ("seconds", "ms_per_step")
        return [{k: v for k, v in line.items() if k not in timings} for line in read_metrics(path)]

    assert lines(whole.path) == lines(cut.path)


def test_a_stop_after_an_epoch_counts_its_seconds_once():
    settings = config(epochs=2)
    trainer = make_trainer(settings, load_data(settings.data), mdistiller.create_model("resnet8", 4), None)
    trainer.clock = iter(range(100)).__next__
    trainer.start_epoch()
    for step in range(trainer.steps):
        trainer.train_step(*next_batch(trainer, step))
    trainer.end_epoch(Reporter())
    seconds = trainer.seconds
    trainer.interrupt("SIGTERM")
    assert trainer.seconds == seconds


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    c = config(optim=OptimConfig(lr=1e30, schedule="constant"), out=tmp_path / "run")
    with pytest.raises(TrainingError, match="not finite"):
        train(c)


def test_a_folder_with_a_run_is_left_alone(tmp_path):
    train(config(max_steps=1, out=tmp_path / "run"))
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with pytest.raises(ConfigError, match="holds a run already"):
        train(config(max_steps=1, out=tmp_path / "run"))
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


def test_a_teacher_without_weights_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--teacher\.checkpoint FILE"):
        train(config(teacher=ModelConfig(name="resnet14"), method=KDConfig(), out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_resuming_another_run_is_refused(tmp_path):
    c = config(out=tmp_path / "run")
    train(c)
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    other = c.model_copy(update={"epochs": 9, "seed": 1})
    with pytest.raises(ConfigError, match="with another epochs, seed; it was started with epochs = 2"):
        train(other, resume=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before
    with pytest.raises(ConfigError, match="no run folder to resume"):
        train(config(), resume=True)


def test_a_pretrained_teacher_with_other_classes_is_refused(tmp_path, monkeypatch):
    # Without a network the weights cannot be had, so the building is replaced.
    monkeypatch.setattr(
        "mdistiller.tasks.classification.models.build_model",
        lambda c, n, **options: torchvision.models.resnet18(num_classes=n),
    )
    teacher = ModelConfig(name="torchvision/resnet18", options={"pretrained": True})
    with pytest.raises(ConfigError, match="pretrained on 1000 classes, the data 4"):
        train(config(teacher=teacher, method=KDConfig(), out=tmp_path / "run"))


class InPlace(torch.nn.Module):
    """Model that changes a feature in place by no module, so that a tap cannot keep it."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 4)

    def forward(self, image):
        return self.fc(self.conv(image).relu_().mean((2, 3)))


def test_models_are_looked_at_before_the_first_step():
    inplace = InPlace()
    c = config(method=method_config("my_hint", student_tap="conv"), compile="default")
    with pytest.raises(TapError, match="changed in place"):
        make_trainer(c, load_data(c.data), inplace, mdistiller.create_model("resnet14", 4), CPU)
    with pytest.raises(ConfigError, match=r"student: its output has shape \[B, 7\]; the data has 4 classes"):
        make_trainer(config(), load_data(c.data), mdistiller.create_model("resnet8", 7), None, CPU)


def test_drop_last_leaves_out_the_smaller_batch():
    data = DataConfig(kind="synthetic", synthetic_samples=33, synthetic_classes=4, image_size=16)
    assert trainer(teacher=False, data=data).total == 4
    assert trainer(teacher=False, data=data, drop_last=True).total == 2


@pytest.mark.parametrize(
    ("images", "fields", "refused"),
    [
        (33, {}, True),
        (33, {"drop_last": True}, False),
        (33, {"max_steps": 2}, False),  # ends before the single image
        (34, {}, False),
        (35, {"optim": OptimConfig(accumulate=2)}, True),  # three are passed as two and one
        (32, {}, False),
    ],
)
def test_a_single_image_left_over_is_tried_first(images, fields, refused):
    data = DataConfig(kind="synthetic", synthetic_samples=images, synthetic_classes=4, image_size=32)
    c = config(data=data, batch_size=16, epochs=2, method=NoneConfig(), **fields)
    splits = load_data(data)

    def build(student):
        return make_trainer(c, splits, student, None, CPU)

    # Its last feature map is one pixel, so batch norm has nothing to average over.
    one_pixel = torchvision.models.resnet18(num_classes=4)
    before = copy.deepcopy(one_pixel.state_dict())
    if refused:
        with pytest.raises(ConfigError, match=r"^drop_last: .*single image.*--drop-last, or another --batch"):
            build(one_pixel)
    else:
        build(one_pixel)
    assert all(torch.equal(value, before[key]) for key, value in one_pixel.state_dict().items())
    build(mdistiller.create_model("resnet8", 4))  # gets through


def test_a_single_image_that_the_method_cannot_take():
    data = DataConfig(kind="synthetic", synthetic_samples=33, synthetic_classes=4, image_size=16)
    models = [mdistiller.create_model("resnet8", 4) for _ in range(2)]
    teacher = ModelConfig(name="resnet8")
    for method, refused in (("itrd", True), ("fitnet", False)):
        c = config(data=data, batch_size=16, teacher=teacher, method=method_config(method))
        splits = load_data(data)
        if refused:
            with pytest.raises(ConfigError, match="drop_last: "):
                make_trainer(c, splits, *copy.deepcopy(models), CPU)
        else:
            make_trainer(c, splits, *copy.deepcopy(models), CPU)


def test_memory_format_follows_the_setting():
    for layout in ("channels_last", "contiguous"):
        t = trainer(teacher=False, layout=layout)
        seen = []
        t.student.conv1.register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0]))
        steps(t, 1)
        assert seen[0].is_contiguous(memory_format=torch.channels_last) is (layout == "channels_last")
