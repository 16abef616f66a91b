"""Runs side by side end with the bits of runs by themselves."""

import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from small_runs import stored_teacher

from mdistiller.config import OptimConfig
from mdistiller.data import AugmentConfig, DataConfig
from mdistiller.errors import ConfigError, TrainingError
from mdistiller.methods import CRDConfig, DKDConfig, KDConfig, NoneConfig, get_method
from mdistiller.models import ModelConfig
from mdistiller.runs.checkpoint import load_state
from mdistiller.runs.folder import read_metrics
from mdistiller.runs.progress import Reporter
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.training.batches import ImageBatches
from mdistiller.training.launch import difference, grouped, train, train_together

DATA = DataConfig(kind="synthetic", synthetic_samples=44, synthetic_classes=4, image_size=8)
DROPOUT = ModelConfig(name="wrn_16_1", options={"dropout": 0.5})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return stored_teacher(tmp_path_factory.mktemp("teacher"), 8)


@pytest.fixture
def config(teacher):
    def make(**changes):
        settings = {
            "data": DATA,
            "augment": AugmentConfig(padding=1),
            "student": ModelConfig(name="resnet8"),
            "teacher": None if isinstance(changes.get("method"), NoneConfig) else teacher,
            "method": DKDConfig(warmup=0.5, beta=1.0),
            "optim": OptimConfig(lr=0.02),
            "batch_size": 8,
            "epochs": 2,
            "log_every": 4,
            "device": "cpu",
        }
        return ClassificationConfig(**(settings | changes))

    return make


def named(folder, runs):
    return [run.model_copy(update={"out": folder / name}) for name, run in runs.items()]


def contents(folder):
    """All that a run leaves, less its times."""
    lines = [
        {k: v for k, v in line.items() if k not in ("seconds", "ms_per_step")}
        for line in read_metrics(folder)
    ]
    state = load_state(folder / "resume.pt")
    return lines, load_file(folder / "student.safetensors"), state


def flat(value, name=""):
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in flat(inner, f"{name}.{key}")]
    if isinstance(value, list | tuple):
        return [pair for i, inner in enumerate(value) for pair in flat(inner, f"{name}.{i}")]
    return [(name, value)]


def assert_equal(a, b):
    lines, weights, state = contents(a)
    other_lines, other_weights, other_state = contents(b)
    assert lines == other_lines
    assert len(lines) > 3
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(value, other_weights[name]) for name, value in weights.items())
    for (name, value), (_, other) in zip(flat(state), flat(other_state), strict=True):
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other), name
        elif name not in (".seconds",) and not name.startswith(".epoch_ms"):
            assert value == other, name


GROUPS = {
    # From the cache, live, without a teacher; other students, optimizers and draws.
    "cache": (
        {"teacher_cache": "cache"},
        {
            "alone": {"method": NoneConfig()},
            "dkd": {},
            "dkd2": {"method": DKDConfig(warmup=0.0, beta=2.0), "optim": OptimConfig(lr=0.01)},
            "fitnet": {"method": get_method("fitnet").Config()},
            "crd": {"method": CRDConfig(negatives=4), "ema": 0.9},
            "wide": {"student": DROPOUT, "optim": OptimConfig(name="adamw", lr=1e-3)},
        },
    ),
    # Two views and one; a policy and dropout draw from the same generator; the teacher runs ahead.
    "policy": (
        {"augment": AugmentConfig(padding=1, policy="randaugment"), "teacher_batch": 16},
        {
            "dropout": {"student": DROPOUT, "method": KDConfig()},
            "mlkd": {"method": get_method("mlkd").Config()},
            "plain": {"method": KDConfig(), "optim": OptimConfig(lr=0.02, accumulate=2)},
            "dot": {"optim": OptimConfig(lr=0.02, name="dot", delta=0.05)},
        },
    ),
    "mixup": (
        {"augment": AugmentConfig(padding=1, mixup_alpha=0.3, cutmix_alpha=1.0), "precision": "bfloat16"},
        {
            "at": {"method": get_method("at").Config(), "eval_every": 2},
            "ctkd": {"method": get_method("ctkd-kd").Config(), "diagnostics": False},
        },
    ),
}


@pytest.mark.parametrize("group", GROUPS)
def test_side_by_side_or_not_the_bits_are_the_same(config, tmp_path, group, monkeypatch):
    common, runs = GROUPS[group]
    if "teacher_cache" in common:
        common = {"teacher_cache": tmp_path / "cache"}
    made = {}
    for name, changes in runs.items():
        made[name] = config(**(common | changes))
    alone, together = tmp_path / "alone", tmp_path / "together"
    for run in named(alone, made):
        train(run)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)  # recorded side by side, too
    asked = []
    ask = ImageBatches.ask_teacher
    monkeypatch.setattr(
        ImageBatches, "ask_teacher", lambda self, batches: asked.append(1) or ask(self, batches)
    )
    results = train_together(named(together, made))
    for name, result in zip(made, results, strict=True):
        assert result.path == together / name
        assert_equal(alone / name, together / name)
    # Shared: a pass of the teacher for each group of batches, whoever reads it.
    passes = {"cache": 12, "policy": 6 * 2, "mixup": 12}
    assert len(asked) == passes[group]


def stop_after(monkeypatch, calls, by=lambda: os.kill(os.getpid(), signal.SIGTERM)):
    """Something happens while batch number `calls` is being prepared."""
    prepare, seen = ImageBatches.prepare, []

    def prepared(self, raws, step):
        seen.append(step)
        if len(seen) == calls:
            by()
        return prepare(self, raws, step)

    monkeypatch.setattr(ImageBatches, "prepare", prepared)
    return seen


def test_a_signal_stops_all_after_the_same_step_and_all_go_on(config, tmp_path, monkeypatch):
    made = {"dkd": config(), "wide": config(student=DROPOUT), "alone": config(method=NoneConfig())}
    for run in named(tmp_path / "whole", made):
        train(run)
    runs = named(tmp_path / "stopped", made)
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        with pytest.raises(
            TrainingError, match=r"3 of 3 runs ended early: .*by SIGTERM after step 9"
        ) as error:
            train_together(runs)
    assert str(error.value).count("--resume") == 3
    assert {load_state(run.out / "resume.pt")["step"] for run in runs} == {9}
    # One of them goes on by itself, the others side by side.
    train(runs[0], resume=True)
    train_together(runs[1:], resume=[True, True])
    for name in made:
        assert_equal(tmp_path / "whole" / name, tmp_path / "stopped" / name)


def test_runs_at_different_steps_wait_for_those_behind(config, tmp_path, monkeypatch):
    made = {"a": config(), "b": config(method=KDConfig()), "c": config(student=DROPOUT)}
    for run in named(tmp_path / "whole", made):
        train(run)
    runs = named(tmp_path / "mixed", made)
    for run, calls in zip(runs[:2], (4, 9), strict=True):
        with monkeypatch.context() as patch:
            stop_after(patch, calls)
            with pytest.raises(TrainingError):
                train(run)
    seen = stop_after(monkeypatch, 10**9)
    train_together(runs, resume=[True, True, False])
    assert seen == list(range(12))  # each step once: all have met
    for name in made:
        assert_equal(tmp_path / "whole" / name, tmp_path / "mixed" / name)


def test_a_run_that_fails_leaves_the_others_at_work(config, tmp_path):
    wild = config(optim=OptimConfig(lr=1e30))
    made = {"good": config(), "wild": wild, "kd": config(method=KDConfig())}
    with pytest.raises(TrainingError, match=r"1 of 3 runs ended early: .*wild: .*not finite"):
        train_together(named(tmp_path / "together", made))
    for name in ("good", "kd"):
        (run,) = named(tmp_path / "alone", {name: made[name]})
        train(run)
        assert_equal(tmp_path / "alone" / name, tmp_path / "together" / name)


def test_what_breaks_the_data_ends_all_and_lets_the_folders_go(config, tmp_path, monkeypatch):
    def broken():
        raise OSError("disk")

    runs = named(tmp_path, {"a": config(), "b": config(method=KDConfig())})
    with monkeypatch.context() as patch:
        stop_after(patch, 3, broken)
        with pytest.raises(OSError, match="disk"):
            train_together(runs)
    assert not [path for run in runs for path in run.out.glob(".lock")]
    train_together(runs, resume=[True, True])


def test_seconds_are_shares(config, tmp_path, monkeypatch):
    now = [0.0]

    def tick():
        now[0] += 1.0
        return now[0]

    class Time:
        perf_counter = staticmethod(tick)

    monkeypatch.setattr("mdistiller.training.launch.time", Time)
    made = {"a": config(epochs=1), "b": config(epochs=1, method=KDConfig())}
    results = train_together(named(tmp_path, made))
    # Eight looks at a clock, four for each run; from first to last seven ticks, half of them each.
    assert now[0] == 8
    assert sum(result.summary["seconds"] for result in results) <= 7


class Reports(Reporter):
    def __init__(self):
        self.calls = []

    def start(self, title, total, done, **more):
        self.calls.append(("start", title, total, done))

    def step(self, done):
        self.calls.append(("step", done))

    def evaluated(self, line):
        self.calls.append(("evaluated", line["name"], line["epoch"]))

    def stop(self):
        self.calls.append(("stop",))


def test_progress_is_that_of_all(config, tmp_path):
    reports = Reports()
    made = {"a": config(), "b": config(method=KDConfig())}
    train_together(named(tmp_path, made), reporter=reports)
    first, *calls, last = reports.calls
    assert first[0] == "start"
    assert first[1].startswith("2 runs side by side: ")
    assert first[2:] == (12, 0)
    assert last == ("stop",)
    assert [call[1] for call in calls if call[0] == "step"] == list(range(1, 13))
    assert [call[1:] for call in calls if call[0] == "evaluated"] == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]


# What may be side by side


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"seed": 1}, "seed"),
        ({"batch_size": 4}, "batch_size"),
        ({"epochs": 3}, "epochs"),
        ({"max_steps": 3}, "max_steps"),
        ({"augment": AugmentConfig(padding=2)}, "augment"),
        ({"data": DATA.model_copy(update={"seed": 4})}, "data"),
        ({"precision": "bfloat16"}, "precision"),
        ({"teacher_cache": "elsewhere"}, "teacher_cache"),
        ({"method": NoneConfig(), "teacher_cache": "elsewhere"}, "teacher_cache"),  # other images
        ({"teacher": ModelConfig(name="resnet8", checkpoint="t.safetensors")}, "teacher"),
        ({"teacher": ModelConfig(name="self"), "ema": 0.9}, "teacher"),
    ],
)
def test_runs_that_cannot_share_are_refused(config, tmp_path, changes, field):
    runs = named(tmp_path, {"a": config(), "b": config(**changes)})
    assert difference(*runs) == field
    with pytest.raises(ConfigError, match=f"^{field}: runs side by side share it; .*a and .*b can't"):
        train_together(runs)
    assert not list(tmp_path.iterdir())


def test_what_differs_freely(config):
    other = config(
        method=KDConfig(),
        student=DROPOUT,
        optim=OptimConfig(name="adamw", lr=1e-3, clip_norm=1.0),
        ema=0.9,
        eval_every=2,
        log_every=1,
        save_epochs=(1,),
    )
    assert difference(config(), other) is None
    assert difference(config(), config(method=NoneConfig())) is None
    cached = [config(teacher_cache="a", method=method) for method in (KDConfig(), NoneConfig())]
    assert difference(*cached) is None
    other = config(teacher_cache="a", teacher_cache_format="fp16")
    assert difference(cached[0], other) == "teacher_cache_format"


def test_folders_are_named(config, tmp_path):
    for outs in ((None, tmp_path / "a"), (tmp_path / "a", tmp_path / "a")):
        runs = [config().model_copy(update={"out": out}) for out in outs]
        with pytest.raises(ConfigError, match="need a folder each"):
            train_together(runs)
    assert train_together([]) == []


def test_groups_are_as_full_as_can_be(config):
    a, b, alone = config(), config(seed=1), config(method=NoneConfig())
    runs = [a, b, a, alone, a, b]
    assert grouped(runs, 1) == [[0], [1], [2], [3], [4], [5]]
    assert grouped(runs, 2) == [[0, 2], [1, 5], [3, 4]]
    assert grouped(runs, 9) == [[0, 2, 3, 4], [1, 5]]
    # A run without a teacher joins one teacher's runs; others still can't.
    other = config(teacher=ModelConfig(name="resnet8", checkpoint="x"))
    assert grouped([alone, a, other], 3) == [[0, 1], [2]]
