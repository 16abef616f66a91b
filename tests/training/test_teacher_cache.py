"""The teacher's outputs from a cache: what a run records, another reads, and never a wrong one."""

import json
import os
import shutil
import signal
import sys
import warnings
from functools import partial
from pathlib import Path
from types import MethodType

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Forked, mdistiller as mdistiller_command, run_group
from small_runs import CPU, fit_alone, make_teacher, make_trainer, next_batch, open_teacher
from torch import nn

import mdistiller
from mdistiller.config import OptimConfig
from mdistiller.data import AugmentConfig, DataConfig, load_data
from mdistiller.data.identity import identity
from mdistiller.errors import ConfigError
from mdistiller.methods import DKDConfig, KDConfig, load_plugin, method_config
from mdistiller.models import ModelConfig, registry as model_registry
from mdistiller.runs.checkpoint import save_student
from mdistiller.runs.progress import Reporter
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.teacher import LiveTeacher
from mdistiller.training import row_store
from mdistiller.training.cached_teacher import CachedTeacher
from mdistiller.training.launch import train
from mdistiller.training.teacher_cache import LOGITS, Stream, TeacherCache, teacher_key

DATA = DataConfig(kind="synthetic", synthetic_samples=40, synthetic_classes=4, image_size=8)
COUNTED = AugmentConfig(padding=1)  # 18 crops and flips
DRAWN = AugmentConfig(crop="resized", policy="autoaugment")


def config(folder, **changes):
    settings = {
        "data": DATA,
        "augment": COUNTED,
        "student": ModelConfig(name="resnet8"),
        "teacher": ModelConfig(name="resnet14"),
        "method": DKDConfig(warmup=0.0, beta=1.0),
        "optim": OptimConfig(lr=0.01, schedule="constant"),
        "batch_size": 8,
        "epochs": 2,
        "device": "cpu",
        "diagnostics": False,
        "teacher_cache": folder,
        "teacher_cache_format": "fp16",
    }
    return ClassificationConfig(**(settings | changes))


def trainer(folder, teacher=None, **changes):
    """A trainer whose `asked` lists the images of each pass of the teacher after the cache is open."""
    c = config(folder, **changes)
    torch.manual_seed(7)
    student = mdistiller.create_model(c.student.name, 4)
    made = make_trainer(c, load_data(c.data), student, teacher or make_teacher(), CPU)
    made.asked, teacher = [], made.distiller.asked

    def count(module, arguments):
        if not isinstance(teacher, CachedTeacher) or teacher.cache is not None:
            made.asked.append(len(arguments[0].image))

    teacher.live.register_forward_pre_hook(count)
    return made


def fit(folder, teacher=None, **changes):
    t = trainer(folder, teacher, **changes)
    fit_alone(t)
    return t


def outputs(t, epoch=0):
    """Logits, features and the student's images of an epoch by image, as the run gets them."""
    source, asked = t.source, t.distiller.asked
    if isinstance(asked, CachedTeacher) and asked.cache is None:
        open_teacher(t)
    found = {}
    for step in range(epoch * len(source.loader), (epoch + 1) * len(source.loader)):
        batch, teacher = next_batch(t, step)
        for i, index in enumerate(batch.index.tolist()):
            features = {k: v[i] for k, v in teacher.features.items()} | {"image": batch.image[i]}
            found.setdefault(index, []).append((teacher.logits[i], features))
    return found


def same(a, b):
    assert a.keys() == b.keys()
    return all(
        torch.equal(x[0], y[0]) and all(torch.equal(x[1][k], y[1][k]) for k in x[1])
        for key in a
        for x, y in zip(a[key], b[key], strict=True)
    )


# Runs that record and runs that read


@pytest.mark.parametrize("augment", [COUNTED, DRAWN], ids=["counted", "drawn"])
@pytest.mark.parametrize("kind", ["int8", "fp16"])
def test_the_second_run_makes_no_pass_and_has_the_same_bits(tmp_path, augment, kind):
    changes = {"augment": augment, "teacher_cache_format": kind}
    first = fit(tmp_path, **changes)
    assert sum(first.asked) > 40
    second = fit(tmp_path, **changes)
    assert second.asked == []
    ends = first.distiller.state_dict(), second.distiller.state_dict()
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_with_half_precision_is_the_run_with_the_teacher(tmp_path, precision):
    live = fit(None, augment=AugmentConfig(padding=1, seed=0), precision=precision)
    cached = fit(tmp_path, precision=precision)
    start = trainer(None).distiller.state_dict()
    ends = live.distiller.state_dict(), cached.distiller.state_dict()
    moved = max((ends[0][key] - start[key]).abs().max().item() for key in start)
    apart = max((ends[0][key] - ends[1][key]).abs().max().item() for key in start)
    if precision == "bfloat16":  # half precision holds these logits exactly
        assert apart == 0
    else:
        assert 0 < apart < 1e-2 * moved


def test_losses_with_half_precision_are_those_of_the_teacher(tmp_path):
    """Step by step on the same weights, computed and read; half precision has 11 bits."""
    live = trainer(None, augment=AugmentConfig(padding=1, seed=0))
    pairs = [trainer(tmp_path), trainer(tmp_path)]
    for t in (live, *pairs):
        open_teacher(t)
    for step in range(5):
        expected = next_batch(live, step)
        for t in pairs:
            batch, teacher = next_batch(t, step)
            assert torch.equal(batch.image, expected[0].image)
            torch.testing.assert_close(teacher.logits, expected[1].logits, rtol=2**-11, atol=2**-24)
            losses = [
                live.distiller(*batch[:3], torch.ones(()), given).losses["dkd"].item()
                for given in (teacher, expected[1])
            ]
            assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert pairs[1].asked == []


@pytest.mark.parametrize("augment", [COUNTED, DRAWN], ids=["counted", "drawn"])
@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 5},
        {"method": KDConfig()},
        {"method": method_config("dist")},
        {"student": ModelConfig(name="resnet20")},
        {"batch_size": 5},
        {"data": DATA.model_copy(update={"label_noise": 0.5})},
        {"epochs": 1},
        {"max_steps": 3},
    ],
    ids=str,
)
def test_other_runs_read_what_the_first_recorded(tmp_path, augment, changes):
    first = outputs(trainer(tmp_path, augment=augment))
    again = trainer(tmp_path, augment=augment, **changes)
    found = outputs(again)
    assert again.asked == []
    assert same(first, found)


def test_strong_views_are_recorded_too(tmp_path):
    changes = {"method": method_config("mlkd"), "augment": DRAWN}
    first = outputs(trainer(tmp_path, **changes))
    again = trainer(tmp_path, **changes)
    assert same(first, outputs(again))
    assert again.asked == []
    assert all(not torch.equal(weak[0], strong[0]) for weak, strong in first.values())
    weak = trainer(tmp_path, augment=DRAWN)  # a method of one view reads the weak ones
    assert all(torch.equal(one[0], first[i][0][0]) for i, (one,) in outputs(weak).items())
    assert weak.asked == []
    for policy in ("trivialaugment", "randaugment"):  # the default is fixmatch
        other = trainer(tmp_path, **changes | {"augment": DRAWN.replace(strong_policy=policy)})
        found = outputs(other)
        assert sum(other.asked) == 40, "the weak views are there"
        assert all(torch.equal(found[i][0][0], first[i][0][0]) for i in found)


def test_a_batch_with_missing_images_passes_whole_and_those_that_are_there_stay(tmp_path):
    first, kept = trainer(tmp_path, augment=DRAWN), {}
    open_teacher(first)
    for step in range(3):
        batch, teacher = next_batch(first, step)
        kept |= dict(zip(batch.index.tolist(), teacher.logits, strict=True))
    assert first.asked == [8, 8, 8]
    again = trainer(tmp_path, augment=DRAWN, seed=1, batch_size=20)  # another order
    found = outputs(again)
    assert again.asked == [20, 20]
    assert all(torch.equal(found[i][0][0], logits) for i, logits in kept.items())
    third = trainer(tmp_path, augment=DRAWN)
    assert same(found, outputs(third))
    assert third.asked == []
    live = outputs(trainer(None, augment=DRAWN.replace(seed=0), batch_size=20))
    for i, ((logits, _),) in found.items():
        torch.testing.assert_close(logits, live[i][0][0], rtol=2**-10, atol=1e-5)


def test_a_compiled_teacher_gets_one_size(tmp_path, monkeypatch):
    """Each new size would be compiled."""
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    seen, results = [], {}
    for count in (1, 3, 7, 11):
        folder = tmp_path / str(count)
        first = trainer(folder, augment=DRAWN, batch_size=count, max_steps=1, drop_last=True)
        open_teacher(first)
        next_batch(first, 0)
        again = trainer(folder, augment=DRAWN, batch_size=20, compile="default", seed=count)
        results[count] = outputs(again)
        seen += again.asked
    assert seen == [20] * 8
    live = outputs(trainer(None, augment=DRAWN.replace(seed=0), batch_size=20))
    for found in results.values():
        for i, ((logits, _),) in found.items():
            torch.testing.assert_close(logits, live[i][0][0], rtol=2**-10, atol=1e-5)


def test_views_of_counted_images_fall_together(tmp_path):
    """Only a batch with a new crop or flip passes through the teacher."""
    changes = {"augment": AugmentConfig(padding=0), "epochs": 6}  # two variants of each image
    t = fit(tmp_path, **changes)
    (rows,) = tmp_path.glob("*.rows")
    assert rows.stat().st_size == (80 + 1) * (4 * 2 + 12)
    known, passes, again = set(), 0, trainer(tmp_path / "other", **changes)
    for step in range(30):
        (batch,) = again.source.next_batches(step, 1)
        passes += not known.issuperset(batch.rows.tolist())
        known |= set(batch.rows.tolist())
    assert known <= set(range(1, 81))
    assert t.asked == [8] * passes
    assert passes < 30


@pytest.mark.parametrize("views", [1, 3])
def test_views_are_used_in_turn(tmp_path, views):
    t = fit(tmp_path, augment=DRAWN, teacher_views=views, epochs=4)
    assert sum(t.asked) == 40 * views
    (rows,) = tmp_path.glob("*.rows")
    assert rows.stat().st_size == (40 * views + 1) * (4 * 2 + 12)
    images = []
    for epoch in range(4):
        (batch,) = t.source.next_batches(5 * epoch, 1)
        seen = dict(zip(batch.index.tolist(), batch.image, strict=True))
        images.append(seen)
    t = trainer(tmp_path, augment=DRAWN, teacher_views=views + 2, epochs=6)
    outputs(t, epoch=views - 1)
    assert t.asked == [], "more views than recorded read these"
    outputs(t, epoch=views)
    assert sum(t.asked) == 40, "and record the others"


@pytest.mark.parametrize("epochs", [(1, 2), (2, 1)])
def test_runs_of_other_lengths_share_a_file(tmp_path, epochs):
    """No image has the row by which a file knows its teacher, however many epochs a run has."""
    fit(tmp_path, augment=DRAWN, epochs=epochs[0])
    fit(tmp_path, augment=DRAWN, epochs=epochs[1])
    found = outputs(trainer(tmp_path, augment=DRAWN, epochs=2), epoch=1)
    live = outputs(trainer(None, augment=DRAWN.replace(seed=0), epochs=2), epoch=1)
    for i, ((logits, _),) in found.items():
        torch.testing.assert_close(logits, live[i][0][0], rtol=2**-10, atol=1e-5)


def test_few_views_of_counted_images_are_kept_by_view(tmp_path):
    """Four views take less room than 18 crops and flips; the images are those of the run without."""
    few, all_views = trainer(tmp_path, teacher_views=4, epochs=4), trainer(tmp_path)
    first, second = outputs(few, epoch=3), outputs(all_views, epoch=3)
    for i, ((logits, _),) in first.items():
        torch.testing.assert_close(logits, second[i][0][0], rtol=2**-9, atol=1e-5)
    sizes = sorted(path.stat().st_size for path in tmp_path.glob("*.rows"))
    assert sizes == [(40 * 4 + 1) * 20, (40 * 18 + 1) * 20]


# Features


def test_cached_vectors_serve_methods_that_read_them(tmp_path):
    taps = {"teacher_cache_taps": ("pooled",)}
    first = trainer(tmp_path, **taps)  # dkd records them, too
    outputs(first)
    pooled = method_config("srrl")
    second = trainer(tmp_path, method=pooled, **taps)
    found = outputs(second)
    assert second.asked == []
    live = outputs(trainer(None, method=pooled, augment=AugmentConfig(padding=1, seed=0)))
    for i, ((_, features),) in found.items():
        torch.testing.assert_close(features["pooled"], live[i][0][1]["pooled"], rtol=2**-10, atol=1e-4)
    assert fit(tmp_path, method=pooled, epochs=1, **taps).asked == []


def test_logits_that_are_there_stay_when_vectors_are_added(tmp_path):
    first = outputs(trainer(tmp_path))
    second = trainer(
        tmp_path,
        method=method_config("srrl"),
        teacher_cache_taps=("pooled",),
        batch_size=5,  # other sums
    )
    found = outputs(second)
    assert sum(second.asked) == 40
    assert all(torch.equal(found[i][0][0], first[i][0][0]) for i in first)
    third = trainer(tmp_path, method=method_config("srrl"), teacher_cache_taps=("pooled",))
    assert same(found, outputs(third))
    assert third.asked == []


@pytest.mark.parametrize("method", ["fitnet", "dkd+at"])
def test_methods_that_read_other_features_keep_the_teacher(tmp_path, method):
    t = trainer(tmp_path / "none", method=method_config(method))
    lines = open_teacher(t)
    assert not isinstance(t.distiller.asked, CachedTeacher)
    assert not (tmp_path / "none").exists()
    assert lines == ["teacher cache: not used, since the method reads features that it does not hold"]


def test_a_map_has_a_row_of_all_its_numbers(tmp_path):
    fields = {"method": method_config("fitnet", teacher_taps=("last_map",), student_taps=("last_map",))}
    t = trainer(tmp_path, teacher_cache_taps=("last_map",), **fields)
    first = outputs(t)
    assert t.distiller.asked.shapes == {"last_map": (64, 2, 2)}
    again = trainer(tmp_path, teacher_cache_taps=("last_map",), **fields)
    assert same(first, outputs(again))
    assert again.asked == []


# Other content


@pytest.mark.parametrize(
    "changes",
    [
        {"augment": AugmentConfig(padding=2)},
        {"augment": AugmentConfig(padding=1, flip=False)},
        {"augment": AugmentConfig(padding=1, policy="randaugment")},
        {"precision": "bfloat16"},
        {"data": DATA.model_copy(update={"seed": 1})},
        {"data": DATA.model_copy(update={"mean": (0.4, 0.4, 0.4)})},
        {"teacher_cache_format": "int8"},
    ],
    ids=str,
)
def test_other_data_augmentation_precision_or_format_have_another_file(tmp_path, changes):
    outputs(trainer(tmp_path))
    t = trainer(tmp_path, **changes)
    outputs(t)
    assert sum(t.asked) == 40
    assert len(list(tmp_path.glob("*.rows"))) == 2


def test_drawn_images_of_another_augmentation_seed_have_another_file(tmp_path):
    for seed in (0, 1):
        for augment in (COUNTED, DRAWN):
            outputs(trainer(tmp_path, augment=augment.replace(seed=seed)))
    assert len(list(tmp_path.glob("*.rows"))) == 3, "crops and flips are the same whatever drew them"


def test_a_changed_teacher_is_another_teacher(tmp_path):
    model = make_teacher()
    keys = [teacher_key(LiveTeacher(model))]
    assert teacher_key(LiveTeacher(make_teacher())) == keys[0]
    with torch.no_grad():
        model.fc.bias[0] += 1e-3
        keys.append(teacher_key(LiveTeacher(model)))
        model.bn1.running_mean += 1e-3  # buffers count too
        keys.append(teacher_key(LiveTeacher(model)))
        model.fc.bias[0] -= 1e-3
    assert len({json.dumps(key) for key in keys}) == 3


PLUGIN = """
from torch import nn
from mdistiller.models import register_model

class Scaled(nn.Module):
    def __init__(self, num_classes, scale):
        super().__init__()
        self.fc, self.scale = nn.Linear(3, num_classes), scale

    def forward(self, x):
        return self.fc(x.mean((2, 3))) * self.scale

@register_model("scaled_for_cache")
def scaled(num_classes=4, scale=1.0):
    return Scaled(num_classes, scale)
"""


def test_a_teacher_of_other_options_or_code_is_another_teacher(tmp_path, monkeypatch):
    file, keys = tmp_path / "plugin_of_cache.py", []

    def key(code, scale):
        file.write_text(code)
        monkeypatch.setattr(model_registry, "_MODELS", {**model_registry._MODELS})
        for name in [name for name in sys.modules if name.startswith("mdistiller_plugin_plugin_of_cache")]:
            del sys.modules[name]
        model_registry._MODELS.pop("scaled_for_cache", None)
        load_plugin(file)
        torch.manual_seed(0)
        config = ModelConfig(name="scaled_for_cache", options={"scale": scale})
        model = mdistiller.create_model(config.name, 4, **config.options)
        return json.dumps(teacher_key(LiveTeacher(model), [config]))

    keys = [key(PLUGIN, 1.0), key(PLUGIN, 10.0), key(PLUGIN.replace("x.mean", "2 * x.mean"), 1.0)]
    assert len({*keys}) == 3
    assert key(PLUGIN, 1.0) == keys[0]


def test_a_given_teacher_s_code_and_attributes_count():
    one, two = make_teacher(), make_teacher()
    two.temperature = 3
    assert teacher_key(LiveTeacher(one)) != teacher_key(LiveTeacher(two))


class Scale:
    def __init__(self, by):
        self.by = by

    def __call__(self, module, args, out):
        return out * self.by


def patched(how, scale):
    """A teacher whose outputs code outside its classes scales."""
    model = make_teacher()

    def scaled(*given):
        return given[-1] * scale

    if how == "hook":
        model.fc.register_forward_hook(scaled)
    elif how == "pre-hook":
        model.fc.register_forward_pre_hook(lambda module, args: (args[0] * scale,))
    elif how == "partial":
        model.fc.register_forward_hook(partial(lambda by, module, args, out: out * by, scale))
    elif how == "object":
        model.fc.register_forward_hook(Scale(scale))
    elif how == "forward":
        plain = model.forward
        model.forward = lambda x: plain(x) * scale
    elif how == "method":
        model.fc.forward = MethodType(
            lambda fc, x: nn.functional.linear(x, fc.weight * scale, fc.bias), model.fc
        )
    else:
        model.settings = {"scale": scale}
    return model


@pytest.mark.parametrize("how", ["hook", "pre-hook", "partial", "object", "forward", "method", "dict"])
def test_hooks_and_patches_of_a_teacher_count(how):
    models = make_teacher(), patched(how, 1.01), patched(how, 1.02)
    keys = [json.dumps(teacher_key(LiveTeacher(model))) for model in models]
    assert len({*keys}) == 3
    assert json.dumps(teacher_key(LiveTeacher(patched(how, 1.02), ["stage2"]))) == keys[2]


def test_code_that_a_hook_moved_to_is_another_teacher():
    keys = []
    for name in ("layer2", "layer3"):
        model = make_teacher()
        model.get_submodule(name).register_forward_hook(patched)  # never called
        keys.append(teacher_key(LiveTeacher(model)))
    assert keys[0] != keys[1]


@pytest.mark.parametrize("taps", [(), ("pooled",)])
def test_a_teacher_that_answers_otherwise_is_refused(tmp_path, monkeypatch, taps):
    """Its key is that of the recorded one: the code of a library's layer is not read."""
    changes = {"teacher_cache_taps": taps, "method": method_config("srrl" if taps else "kd")}
    first = outputs(trainer(tmp_path, **changes))
    run = nn.Linear.forward
    noise = 1e-3 if taps else 5e-3  # rounding of another CPU
    monkeypatch.setattr(nn.Linear, "forward", lambda layer, x: run(layer, x) * (1 + noise))
    again = trainer(tmp_path, **changes)
    assert same(first, outputs(again))
    assert again.asked == []
    monkeypatch.setattr(nn.Linear, "forward", lambda layer, x: run(layer, x) + x[:, :1])
    for _ in range(2):  # a refusal leaves the rows as they are
        with pytest.raises(
            ConfigError, match=r"teacher_cache: .*\.rows holds outputs of another teacher, though "
        ):
            outputs(trainer(tmp_path, **changes))
    outputs(trainer(tmp_path / "other", **changes))


def test_a_teacher_s_file_that_changed_under_its_name(tmp_path, monkeypatch):
    file = tmp_path / "t.safetensors"
    c = config(tmp_path / "cache", teacher=ModelConfig(name="resnet14", checkpoint=file), epochs=1)
    asked, run = [], LiveTeacher.forward

    def forward(teacher, batch, context=None):
        asked.append(len(batch.image) if len(batch.image) > 1 else 0)  # one: the sizes of the outputs
        return run(teacher, batch, context)

    monkeypatch.setattr(LiveTeacher, "forward", forward)
    totals = []
    for seed in (0, 1, 1):
        save_student(file, make_teacher(seed=seed), {})
        train(c.model_copy(update={"out": tmp_path / f"run{len(totals)}"}))
        totals.append(sum(asked))
    assert totals == [40, 80, 80]


def test_the_description_names_the_content(tmp_path):
    outputs(trainer(tmp_path))
    (rows,), (card,) = tmp_path.glob("*.rows"), tmp_path.glob("*.json")
    content = json.loads(card.read_text())
    assert rows.stem == card.stem == content["sha256"][:16]
    assert content["key"]["augment"]["padding"] == 1
    assert content["key"]["teacher"]["class"] == type(make_teacher()).__name__
    assert (content["size"], content["format"]) == (4, "fp16")


def stream(**key):
    return {LOGITS: Stream({"a": 1, **key}, 4, "fp16", 10)}


def values(start=0):
    return {LOGITS: np.arange(start, start + 40, dtype=np.float32).reshape(10, 4)}


def refuse():
    raise AssertionError("nothing is missing")


def test_a_foreign_file_under_the_name_is_written_again(tmp_path):
    other, own = TeacherCache(tmp_path, [stream(b=1)]), TeacherCache(tmp_path, [stream()])
    other.fill(0, np.arange(10), [LOGITS], lambda: values(100))
    paths = [cache._views[0][LOGITS].store.path for cache in (other, own)]
    shutil.copy(*paths)
    shutil.copy(*(path.with_suffix(".json") for path in paths))
    own = TeacherCache(tmp_path, [stream()])
    found = own.fill(0, np.arange(10), [LOGITS], values)
    assert np.array_equal(found[LOGITS], values()[LOGITS])
    assert json.loads(paths[1].with_suffix(".json").read_text())["key"] == {"a": 1}
    found = TeacherCache(tmp_path, [stream()]).fill(0, np.arange(10), [LOGITS], refuse)
    assert np.array_equal(found[LOGITS], values()[LOGITS])


@pytest.mark.parametrize("order", [([LOGITS], [LOGITS, "pooled"]), ([LOGITS, "pooled"], [LOGITS])])
def test_rows_that_are_there_stay_whatever_is_computed(tmp_path, order):
    """The teacher runs for a missing vector; the logits that another run has read do not change."""
    six = {LOGITS: values()[LOGITS][:6]}
    TeacherCache(tmp_path, [stream()]).fill(0, np.arange(6), [LOGITS], lambda: six)
    both = {**stream(), "pooled": Stream({"a": 1, "tap": "pooled"}, 3, "fp16", 10)}
    pooled = np.arange(30, dtype=np.float32).reshape(10, 3)
    asked = []

    def compute():
        asked.append(kinds)
        return {LOGITS: values(100)[LOGITS], "pooled": pooled}

    expected = np.concatenate([values()[LOGITS][:6], values(100)[LOGITS][6:]])
    for kinds in order:
        for _ in range(2):
            found = TeacherCache(tmp_path, [both]).fill(0, np.arange(10), kinds, compute)
            assert found.keys() == {*kinds}
            assert np.array_equal(found[LOGITS], expected)
            assert "pooled" not in kinds or np.array_equal(found["pooled"], pooled)
    assert asked == [order[0]], "one pass records all kinds"


# Damage, full disks, folders that cannot be written


@pytest.mark.parametrize("seed", range(5))
def test_a_damaged_file_is_repaired(tmp_path, seed):
    first = outputs(trainer(tmp_path, augment=DRAWN))
    (path,) = tmp_path.glob("*.rows")
    content = np.frombuffer(path.read_bytes(), np.uint8).copy()
    random = np.random.default_rng(seed)
    where = random.integers(len(content), size=10)
    content[where] ^= random.integers(1, 256, size=10).astype(np.uint8)
    path.write_bytes(content[: len(content) - 33 * (seed % 2)])
    (path.with_suffix(".json")).write_text("{")
    again = trainer(tmp_path, augment=DRAWN)
    found = outputs(again)
    assert 0 < len(again.asked) <= 5
    assert set(again.asked) == {8}
    assert same(first, found)
    third = trainer(tmp_path, augment=DRAWN)
    assert same(found, outputs(third))
    assert third.asked == []
    json.loads(path.with_suffix(".json").read_text())


@pytest.mark.parametrize("augment", [COUNTED, DRAWN], ids=["counted", "drawn"])
@pytest.mark.parametrize("kind", ["int8", "fp16"])
def test_lost_rows_change_no_bit(tmp_path, augment, kind):
    """A missing row is computed with its whole batch, so that it is rounded as before."""
    changes = {"augment": augment, "teacher_cache_format": kind}
    first = fit(tmp_path, **changes).distiller.state_dict()
    (path,) = tmp_path.glob("*.rows")
    content = np.frombuffer(path.read_bytes(), np.uint8).copy()
    rows = content.reshape(40 * (18 if augment is COUNTED else 2) + 1, -1)
    recorded = np.flatnonzero(rows.any(1))
    rows[recorded[::7]] = 0
    path.write_bytes(content)
    again = fit(tmp_path, **changes)
    assert 0 < len(again.asked) < 10
    assert set(again.asked) == {8}
    assert all(torch.equal(value, first[key]) for key, value in again.distiller.state_dict().items())
    assert fit(tmp_path, **changes).asked == []


def test_a_full_disk_turns_recording_off_and_the_run_goes_on(tmp_path, monkeypatch):
    whole = fit(tmp_path / "whole").distiller.state_dict()
    write, left = os.pwrite, [20]

    def full(*args):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return write(*args)

    monkeypatch.setattr(row_store.os, "pwrite", full)
    with pytest.warns(UserWarning, match="nothing more is recorded .*No space left") as said:
        t = fit(tmp_path / "full")
    assert len([w for w in said if "recorded" in str(w.message)]) == 1
    assert all(torch.equal(value, whole[key]) for key, value in t.distiller.state_dict().items())
    assert left[0] == -1, "there was one failure"


def test_a_disk_that_is_too_small_is_said_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(
        ConfigError, match=r"teacher_cache: .* needs 0\.01 MB more .* 0\.00 MB left; .*--teacher-views"
    ):
        outputs(trainer(tmp_path))


def test_the_size_is_noted_before_the_first_step(tmp_path):
    c = {"data": DATA.model_copy(update={"synthetic_samples": 50_000})}
    t = trainer(tmp_path, **c)
    lines = open_teacher(t)
    (path,) = tmp_path.glob("*.rows")
    (line,) = lines
    assert line.startswith(f"teacher cache: {path}, 18.00 MB when full, 0.0"), "two blocks of the disk"


def read_only(monkeypatch):
    """The system refuses to write, also to an administrator."""
    opened, made = os.open, Path.mkdir

    def refuse(path, flags, *args, **kw):
        if flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT) and "cache" in str(path):
            raise PermissionError(13, "Permission denied")
        return opened(path, flags, *args, **kw)

    def refuse_folder(self, *args, **kw):
        if not self.is_dir():
            raise PermissionError(13, "Permission denied")
        return made(self, *args, **kw)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse_folder)


def test_a_folder_that_cannot_be_written_is_read(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    first = trainer(folder)
    before = outputs(first)
    read_only(monkeypatch)
    again = trainer(folder)
    with pytest.warns(UserWarning, match=r"nothing more is recorded .*denied") as said:
        open_teacher(again)
    assert len(said) == 1
    assert same(before, outputs(again))
    assert again.asked == []
    outputs(again, epoch=1)
    assert sum(again.asked) > 0


def test_no_folder_and_no_right_to_make_one(tmp_path, monkeypatch):
    read_only(monkeypatch)
    t = trainer(tmp_path / "cache")
    with pytest.warns(UserWarning, match=r"nothing more is recorded .*denied"):
        outputs(t)
    assert sum(t.asked) == 40
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(ConfigError, match=r"teacher_cache: .*file.* is not a folder"):
            outputs(trainer(folder))


def test_logits_beyond_half_precision_are_not_stored(tmp_path):
    model = make_teacher()
    with torch.no_grad():
        model.fc.bias[0] = 1e5
    live = outputs(trainer(None, model, augment=AugmentConfig(padding=1, seed=0)))
    for _ in range(2):
        t = trainer(tmp_path, model)
        with pytest.warns(UserWarning, match=r"beyond half precision .*are not stored") as said:
            found = outputs(t)
        assert len(said) == 1
        assert same(live, found)
        assert sum(t.asked) == 40


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf"), 1e5])
def test_only_the_odd_rows_are_not_stored(tmp_path, odd):
    cache, given = TeacherCache(tmp_path, [stream()]), values()
    given[LOGITS][3, 1] = odd
    with pytest.warns(UserWarning, match="not stored"):
        found = cache.fill(0, np.arange(10), [LOGITS], lambda: given)[LOGITS]
    assert np.array_equal(found, given[LOGITS], equal_nan=True)
    again, others = TeacherCache(tmp_path, [stream()]), np.delete(np.arange(10), 3)
    read = again.fill(0, others, [LOGITS], refuse)[LOGITS]
    assert np.array_equal(read, given[LOGITS][others])
    asked = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again.fill(0, np.array([3]), [LOGITS], lambda: asked.append(3) or {LOGITS: given[LOGITS][3:4]})
    assert asked == [3]


@pytest.mark.parametrize("alpha", ["mixup_alpha", "cutmix_alpha"])
def test_mixed_images_are_refused(tmp_path, alpha):
    augment = AugmentConfig(**{alpha: 0.2})
    said = f"teacher_cache: augment.{alpha} blends each image with another of its batch"
    missing = ModelConfig(name="resnet14", checkpoint=tmp_path / "t.safetensors")
    with pytest.raises(ConfigError, match=said):  # before models and data are read
        train(config(tmp_path, augment=augment, teacher=missing, out=tmp_path / "run"))
    with pytest.raises(ConfigError, match=said):
        trainer(tmp_path, augment=augment)
    config(tmp_path, augment=augment, method="none", teacher=None).check_cache()


# Streamed images


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 2)):
        for label in range(4):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(256, size=(7, 5, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((40, 56)).save(folder / f"{i}.png")
    return root


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_streamed_files_with_random_crops_and_a_policy(tmp_path, photos):
    augment = AugmentConfig(policy="autoaugment")
    first = None
    for memory, workers, seed, batch in (("stream", 2, 0, 8), ("stream", 0, 3, 5), ("auto", 0, 4, 8)):
        data = DataConfig(kind="folder", root=photos, image_size=8, memory=memory, workers=workers)
        t = trainer(tmp_path, data=data, augment=augment, seed=seed, batch_size=batch, teacher_views=2)
        found = outputs(t, epoch=1)
        assert sum(t.asked) == (40 if first is None else 0)
        first = first or found
        assert same(first, found)
    live = outputs(trainer(None, data=data, augment=AugmentConfig(policy="autoaugment", seed=0)), epoch=1)
    for i in first:
        torch.testing.assert_close(first[i][0][0], live[i][0][0], rtol=2**-10, atol=1e-5)
        assert torch.equal(first[i][0][1]["image"], live[i][0][1]["image"])
    t = trainer(tmp_path, data=data, augment=augment, teacher_views=2, epochs=4)
    assert same(first, outputs(t, epoch=3)), "two views in turn"
    assert t.asked == []
    # Crops of the file are drawn for each epoch, though the device only flips; padded crops are counted.
    for i, (crop, rows) in enumerate((("auto", 3), ("padded", 162)), 2):
        outputs(trainer(tmp_path, data=data, augment=AugmentConfig(crop=crop), epochs=3))
        sizes = [path.stat().st_size for path in tmp_path.glob("*.rows")]
        assert len(sizes) == i
        assert (40 * rows + 1) * 20 in sizes
    assert sorted(sizes) == [(40 * rows + 1) * 20 for rows in (2, 3, 162)]


def test_the_identity_of_files(photos, tmp_path):
    def found(root, **settings):
        settings = {"image_size": 8, "memory": "stream", "workers": 0} | settings
        return identity(load_data(DataConfig(kind="folder", root=root, **settings)).train)

    moved = shutil.copytree(photos, tmp_path / "moved")
    first = found(photos)
    assert found(moved) == first == found(photos, memory="auto")
    assert found(photos, resize=9) != first
    assert found(photos, train_limit=20) != first
    file = moved / "train" / "class2" / "3.png"
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    assert found(moved) != first
    assert "crop" in first
    assert "crop" not in found(photos, memory="resident")


# Kills, several processes


def command(tmp_path, *more):
    save_student(tmp_path / "t.safetensors", make_teacher(), {})
    return [
        *("train", "digits.dkd.resnet14_resnet8", "--data.kind", "synthetic"),
        *("--data.synthetic-classes", "4", "--data.synthetic-samples", "40", "--data.image-size", "8"),
        *("--teacher.checkpoint", "t.safetensors", "--teacher-cache", "cache", "--batch-size", "8"),
        *("--epochs", "2", "--augment.policy", "trivialaugment", "--no-diagnostics", "--json", *more),
    ]


def test_of_two_processes_each_records_its_part_and_two_runs_share_a_folder(tmp_path):
    argv = command(tmp_path)
    one = Forked(mdistiller_command, *argv, "--out", "one", cwd=tmp_path)
    codes, (said, silence), errors = run_group(mdistiller_command, *argv, "--out", "two", cwd=tmp_path)
    assert (codes, silence) == ([0, 0], ""), errors
    out, err = one.communicate()
    assert one.returncode == 0, err
    assert json.loads(said)["step"] == json.loads(out)["step"] == 10
    (rows,) = (tmp_path / "cache").glob("*.rows")
    store = row_store.RowStore(
        rows, 20 + 4, 80, int(json.loads(rows.with_suffix(".json").read_text())["sha256"][16:32], 16)
    )
    assert store.read(np.arange(80))[1].all()


def test_a_run_resumes_exactly_with_a_cache(tmp_path):
    """Recorded up to the signal, read and recorded after it; with an empty cache and with a full one."""
    save_student(tmp_path / "t.safetensors", make_teacher(), {})

    class At(Reporter):
        def step(self, done):
            if done == 7:
                os.kill(os.getpid(), signal.SIGTERM)

    def run(name, folder, **options):
        made = config(
            tmp_path / folder,
            augment=DRAWN,
            epochs=3,
            teacher=ModelConfig(name="resnet14", checkpoint=tmp_path / "t.safetensors"),
            teacher_cache_format="int8",
            out=tmp_path / name,
        )
        return train(made, **options)

    whole = run("whole", "a").summary
    for folder in ("b", "a"):
        with pytest.raises(mdistiller.errors.Interrupted, match="stopped by SIGTERM after step 7"):
            run(f"run-{folder}", folder, reporter=At())
        resumed = run(f"run-{folder}", folder, resume=True).summary
        assert resumed["last"] == whole["last"]
        files = [
            (tmp_path / name / "student.safetensors").read_bytes() for name in ("whole", f"run-{folder}")
        ]
        assert files[0] == files[1]
