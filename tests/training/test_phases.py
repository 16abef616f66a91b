"""Probe, frozen parts and early stopping: what moves and what does not, and resuming with the same bits."""

from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from small_runs import fit_alone, make_trainer, step_on

import mdistiller
from mdistiller.config import OptimConfig
from mdistiller.data import AugmentConfig, DataConfig, load_data
from mdistiller.errors import ConfigError, Interrupted, UnknownNameError
from mdistiller.methods import KDConfig, NoneConfig, method_config
from mdistiller.models import ModelConfig
from mdistiller.runs.checkpoint import load_state
from mdistiller.runs.folder import read_metrics
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.training import trainer as loop
from mdistiller.training.launch import train

DATA = DataConfig(kind="synthetic", synthetic_samples=48, synthetic_classes=4, image_size=8)
TUNE = OptimConfig(
    name="adamw", lr=1e-3, schedule="cosine", lr_warmup=0.1, layer_decay=0.8, head_lr=5.0, norm_decay=False
)


def config(**changes):
    settings = {
        "data": DATA,
        "augment": AugmentConfig(padding=1),
        "student": ModelConfig(name="resnet8"),
        "method": NoneConfig(),
        "optim": TUNE,
        "epochs": 4,
        "batch_size": 16,
        "log_every": 2,
        "device": "cpu",
        "diagnostics": False,
    }
    return ClassificationConfig(**(settings | changes))


def trainer(method=None, **changes):
    if method is not None:
        changes |= {"method": method, "teacher": ModelConfig(name="resnet14")}
    c = config(**changes)
    torch.manual_seed(c.seed)
    student = mdistiller.create_model("resnet8", 4)
    teacher = mdistiller.create_model("resnet14", 4) if method is not None else None
    return make_trainer(c, load_data(c.data), student, teacher)


def epoch_of(t, number=0):
    """Trains an epoch; the state before and after."""
    t.epoch = number
    t.start_epoch()
    before = {k: v.clone() for k, v in t.student.state_dict().items()}
    for raw in t.source.loader.epoch(number):
        step_on(t, raw)
    return before, t.student.state_dict()


def changed(before, after):
    return {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}


@pytest.mark.parametrize("method", [None, KDConfig(), method_config("fitnet"), method_config("simkd")])
def test_a_probe_trains_the_classifier_alone_then_everything(method):
    t = trainer(method, probe_epochs=1)
    before, after = epoch_of(t)
    parts = changed(before, after)
    if method is not None and method.method_name == "simkd":  # its student has the teacher's classifier
        assert not {key for key in before if "bn1" in key and not torch.equal(before[key], after[key])}
        assert parts
    else:
        assert parts == {"fc"}
    if t.distiller.method.state_dict():
        assert all(p.grad is None for p in t.distiller.method.parameters())  # used, then cleared
    before, after = epoch_of(t, 1)
    assert {"conv1", "bn1", "layer1", "layer3"} <= changed(before, after) or method is not None


def test_a_probe_sees_the_features_of_evaluation():
    """A classifier on frozen features is the same computation as logistic regression on them."""
    optim = OptimConfig(lr=0.1, momentum=0.0, weight_decay=0.0, schedule="constant")
    t = trainer(probe_epochs=1, optim=optim, augment=AugmentConfig(flip=False, padding=0))
    t.start_epoch()
    raw = next(iter(t.source.loader.epoch(0)))
    image = t.source.augment.eval()(raw).image
    body = mdistiller.tap(t.student, ["pooled"])
    with torch.no_grad():
        features = body(image).features["pooled"]
    body.untap()
    assert not t.student.training
    fc = torch.nn.Linear(features.shape[1], 4)
    fc.load_state_dict(t.student.fc.state_dict())
    torch.nn.functional.cross_entropy(fc(features), raw.label).backward()
    expected = fc.weight.detach() - 0.1 * fc.weight.grad
    step_on(t, raw)
    torch.testing.assert_close(t.student.fc.weight.detach(), expected)


def test_probe_and_tuning_have_a_whole_schedule_each():
    t = trainer(probe_epochs=1, optim=TUNE.replace(lr_warmup=0.0))
    rates = [t.learning_rate(step) for step in range(t.total)]
    whole = trainer(epochs=3, optim=TUNE.replace(lr_warmup=0.0))
    assert rates[3:] == [whole.learning_rate(step) for step in range(whole.total)]
    assert rates[0] == rates[3] == 1e-3
    assert rates[2] < rates[1] < rates[0]


def test_the_classifier_has_a_rate_of_its_own_in_the_probe():
    t = trainer(probe_epochs=1, optim=TUNE.replace(lr_warmup=0.0, probe_lr=0.02))
    t.start_epoch()
    step_on(t, next(iter(t.source.loader.epoch(0))))
    rates = {group["lr_scale"]: group["lr"] for group in t.update.optimizer.param_groups}
    assert rates[TUNE.head_lr] == pytest.approx(0.02)
    assert t.learning_rate(3) == TUNE.lr


def test_frozen_parts_keep_weights_and_running_statistics():
    t = trainer(freeze=["stem,stage1"], optim=OptimConfig(lr=0.1))
    before, after = epoch_of(t)
    assert changed(before, after) == {"layer2", "layer3", "fc"}
    assert not t.student.bn1.training
    assert t.student.layer2[0].bn1.training


def test_batch_norms_in_evaluation_keep_their_statistics_and_train():
    t = trainer(norm_eval=True, optim=OptimConfig(lr=0.1))
    before, after = epoch_of(t)
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert not any("running" in key or "tracked" in key for key in moved)
    assert {"bn1.weight", "bn1.bias", "layer2.0.bn1.weight", "conv1.weight"} <= moved
    assert t.student.layer2.training


def test_names_of_frozen_parts():
    assert config(freeze=("stem,stage1", "fc")).freeze == ("stem", "stage1", "fc")
    with pytest.raises(UnknownNameError, match="stage1"):
        trainer(freeze=("stage9",))
    with pytest.raises(ConfigError, match="leave nothing"):
        trainer(freeze=("stem", "stage1", "stage2", "stage3", "fc"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probe_epochs": 4}, "probe_epochs: got 4; allowed with epochs 4: fewer"),
        ({"probe_epochs": 1, "optim": OptimConfig(name="dot", delta=0.05)}, "probe_epochs: optim.name 'dot'"),
    ],
)
def test_settings_that_contradict(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_the_average_follows_early_with_a_warm_up():
    t = trainer(ema=0.999, ema_warmup=True)
    t.start_epoch()
    weight = t.student.fc.weight
    expected = weight.detach().clone()
    for n, raw in enumerate(t.source.loader.epoch(0)):
        step_on(t, raw)
        decay = min(0.999, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weight.detach()
    torch.testing.assert_close(t.ema.module.fc.weight, expected)


# Early stopping

CURVE = [50.0, 60.0, 55.0, 60.0, 70.0, 80.0]


def follow(monkeypatch, curve=CURVE):
    """Makes evaluations return a given curve."""
    original = loop.Trainer.evaluate

    def evaluate(self):
        inner = self.evaluator
        self.evaluator = lambda *a: inner(*a) | {"top1": curve[self.epoch - 1]}
        try:
            return original(self)
        finally:
            self.evaluator = inner

    monkeypatch.setattr(loop.Trainer, "evaluate", evaluate)


def test_it_stops_without_a_better_evaluation(monkeypatch, tmp_path):
    follow(monkeypatch)
    result = train(config(epochs=6, patience=2, out=tmp_path / "run"))
    summary = result.summary
    assert (summary["epochs"], summary["stopped_early"], summary["best"]["epoch"]) == (4, True, 2)
    assert (tmp_path / "run" / "student-best.safetensors").is_file()
    longer = train(config(epochs=6, patience=3, out=tmp_path / "longer"))
    assert longer.summary["epochs"] == 6
    assert "stopped_early" not in longer.summary


def test_a_better_average_keeps_the_run_going(monkeypatch, tmp_path):
    student = [60.0, 50.0, 50.0, 50.0, 50.0, 50.0]
    average = [40.0, 45.0, 55.0, 55.0, 55.0, 55.0]
    original = loop.Trainer.evaluate

    def evaluate(self):
        curves, others = iter((student, average)), dict.fromkeys(self.config.metrics, 0.0)
        self.evaluator = lambda *a: others | {"top1": next(curves)[self.epoch - 1]}
        return original(self)

    monkeypatch.setattr(loop.Trainer, "evaluate", evaluate)
    result = train(config(epochs=6, patience=2, ema=0.9, out=tmp_path / "run"))
    assert (result.summary["epochs"], result.summary["best"]["epoch"]) == (5, 1)
    again = train(config(epochs=6, patience=2, ema=0.9, out=tmp_path / "run"), resume=True)
    assert again.summary == result.summary


def test_the_probe_s_epochs_do_not_count(monkeypatch, tmp_path):
    follow(monkeypatch, [60.0, 50.0, 50.0, 50.0, 50.0, 50.0])
    result = train(config(epochs=6, probe_epochs=3, patience=2, out=tmp_path / "run"))
    assert result.summary["epochs"] == 5
    assert result.summary["probe"]["epoch"] == 3


def test_a_run_that_has_stopped_is_not_trained_further(monkeypatch, tmp_path):
    follow(monkeypatch)
    c = config(epochs=6, patience=2, out=tmp_path / "run")
    first = train(c).summary
    again = train(c, resume=True).summary
    assert again == first
    assert [line["kind"] for line in read_metrics(tmp_path / "run")].count("summary") == 1


# Resuming


def assert_same(a, b):
    times = ("seconds", "ms_per_step")
    lines, others = (
        [{k: v for k, v in line.items() if k not in times} for line in read_metrics(folder)]
        for folder in (a, b)
    )
    assert lines == others
    for file in ("student.safetensors", "ema_student.safetensors"):
        if (a / file).is_file():
            left, right = load_file(a / file), load_file(b / file)
            assert all(torch.equal(value, right[name]) for name, value in left.items()), file
    left, right = (load_state(folder / "resume.pt") for folder in (a, b))
    assert left["optimizer"]["state"].keys() == right["optimizer"]["state"].keys()
    for key, values in left["optimizer"]["state"].items():
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(right["optimizer"]["state"][key][n]))
            for n, v in values.items()
        )


@pytest.mark.parametrize("stop_after", [1, 4, 6, 7, 9])
def test_a_run_resumes_with_the_same_bits(monkeypatch, tmp_path, stop_after):
    """Within probe and tuning and between: with average, rates by layer, frozen parts, patience."""
    settings = {
        "probe_epochs": 2,
        "ema": 0.9,
        "ema_warmup": True,
        "freeze": ("stem",),
        "patience": 1,
        "epochs": 5,
    }
    follow(monkeypatch, [50.0, 60.0, 70.0, 65.0, 90.0])
    whole = train(config(**settings, out=tmp_path / "whole"))
    assert whole.summary["epochs"] == 4  # stopped early
    cut = config(**settings, out=tmp_path / "cut")
    requested = loop.Stop.requested

    def request(self, step, done):
        if step + done == stop_after:
            self.signal = "a test"
            return True
        return False

    monkeypatch.setattr(loop.Stop, "requested", request)
    with pytest.raises(Interrupted, match="stopped by a test"):
        train(cut)
    monkeypatch.setattr(loop.Stop, "requested", requested)
    train(cut, resume=True)
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_a_run_alone_trains_to_its_end_with_a_probe():
    t = trainer(probe_epochs=1, ema=0.9)
    summary = fit_alone(t)
    assert summary["probe"]["epoch"] == 1
    assert summary["epochs"] == 4


# Gradient checkpointing


@pytest.mark.parametrize("method", [None, method_config("fitnet"), method_config("ofd")])
@pytest.mark.parametrize("model", ["resnet8", "wrn_16_1", "MobileNetV2"])
def test_checkpointing_gives_the_same_bits(model, method, monkeypatch):
    """Weights and running statistics, also with features from within blocks."""
    monkeypatch.setattr(mdistiller, "create_model", create_any(model))
    a, b = (trainer(method, gradient_checkpointing=on, optim=OptimConfig(lr=0.05)) for on in (False, True))
    passes = count_passes(b)
    for t in (a, b):
        epoch_of(t)
    assert passes() == 2
    left, right = a.student.state_dict(), b.student.state_dict()
    assert all(torch.equal(value, right[name]) for name, value in left.items())


def create_any(model):
    original = mdistiller.create_model
    return lambda name, classes: original(model if name == "resnet8" else name, classes)


def count_passes(t):
    """Counts the runs of the batch norm that runs most, relative to those of the first convolution."""
    runs = Counter()
    stem = next(m for m in t.student.modules() if isinstance(m, torch.nn.Conv2d))
    norms = [m for m in t.student.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for module in (stem, *norms):
        module.register_forward_hook(lambda module, *_: runs.update([module]))
    return lambda: max(runs.values()) / runs[stem]


def test_checkpointing_takes_a_model_with_blocks():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4))
    c = config(gradient_checkpointing=True)
    with pytest.raises(ConfigError, match="gradient_checkpointing: Sequential has no known blocks"):
        make_trainer(c, load_data(c.data), model, None)
    with pytest.raises(ConfigError, match="does not go with compile"):
        trainer(gradient_checkpointing=True, compile="default")
