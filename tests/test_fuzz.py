"""Random and damaged input at every reader: a clean load or an error that was raised on purpose.

FUZZ_EXAMPLES=N runs N examples a reader instead of the default; --hypothesis-show-statistics then
counts the outcomes.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, example, given, settings, strategies as st
from PIL import Image
from pydantic import BaseModel, ValidationError
from safetensors.torch import save
from torch import nn

from mdistiller import create_model
from mdistiller.config import OptimConfig
from mdistiller.data import DataConfig, cifar, load_data
from mdistiller.data.decoder import center_crop, read_image
from mdistiller.data.unpickle import read_pickle
from mdistiller.deploy.export import export_student
from mdistiller.deploy.predict import load_export, load_predictor
from mdistiller.errors import CheckpointError, ConfigError, DataError
from mdistiller.methods import list_methods
from mdistiller.models import load_weights
from mdistiller.models.weights import read_metadata
from mdistiller.report.runs import load_run, summarize
from mdistiller.runs.checkpoint import load_state, save_student
from mdistiller.runs.environment import environment
from mdistiller.runs.folder import RunFolder
from mdistiller.settings import explain
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.detection.models import create_detector
from mdistiller.training.task import load_config
from mdistiller.training.teacher_cache import Stream, TeacherCache

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "150"))
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder, and the current one: a random name then names no file."""
    path, before = tmp_path_factory.mktemp("fuzz"), Path.cwd()
    os.chdir(path)
    yield path
    os.chdir(before)


def outcome(read: Callable[[], Any], *expected: type[Exception]) -> Any:
    """What `read` gives, or None after one of the expected errors; any other fails the test."""
    try:
        value = read()
    except expected as error:
        event("refused")
        message = str(error)
        assert message
        assert "\n" not in message
        return None
    event("read")
    return value


def cut(blob: bytes) -> st.SearchStrategy[bytes]:
    """A beginning of it."""
    return st.integers(0, len(blob) - 1).map(lambda n: blob[:n])


def flip(blob: bytes) -> st.SearchStrategy[bytes]:
    """It with a few bits flipped, more of them near the ends, where the headers are."""
    n = len(blob)
    near = min(n, 256) - 1
    place = st.integers(0, n - 1) | st.integers(0, near) | st.integers(0, near).map(lambda i: n - 1 - i)

    def apply(flips: list[tuple[int, int]]) -> bytes:
        out = bytearray(blob)
        for where, bit in flips:
            out[where] ^= 1 << bit
        return bytes(out)

    return st.lists(st.tuples(place, st.integers(0, 7)), min_size=1, max_size=4).map(apply)


def damaged(*whole: bytes) -> st.SearchStrategy[bytes]:
    """Random bytes, and whole files cut short or with bits flipped."""
    return st.binary(max_size=300) | st.one_of(*(cut(b) | flip(b) for b in whole))


# Configurations

NAMES = [
    "resnet8",
    "self",
    "kd",
    "dkd+",
    "kd-dkd",
    "lskd-dkd",
    "dkd+reviewkd",
    "step",
    "sgd",
    "digits",
    "auto",
]
plain = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from([*NAMES, *list_methods()])
)
anything = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)


def fields(model: type[BaseModel], **inner: st.SearchStrategy) -> st.SearchStrategy[dict[str, Any]]:
    """Random values for random fields of a config, and now and then for a field that it lacks."""
    known = {name: inner.get(name, anything) | plain for name in model.model_fields}
    stray = st.dictionaries(st.text(max_size=6), anything, max_size=1)
    return st.builds(lambda a, b: a | b, st.fixed_dictionaries({}, optional=known), stray | st.just({}))


model = st.fixed_dictionaries(
    {"name": st.just("resnet8") | plain}, optional={"checkpoint": plain, "options": anything}
)
method = st.builds(
    lambda name, rest: rest | {"name": name},
    st.sampled_from([*NAMES, *list_methods()]) | plain,
    st.dictionaries(st.sampled_from(["beta", "temperature", "base", "dkd", "task_weight"]), anything),
)
configs = st.builds(
    lambda values, student: values | {"student": student},
    fields(
        ClassificationConfig,
        data=fields(DataConfig),
        optim=fields(OptimConfig),
        student=model,
        teacher=model,
        method=method,
    ),
    model,
)


@fuzz
@given(values=configs | anything)
def test_values_of_a_config(folder, values):
    def read():
        try:
            return ClassificationConfig.model_validate(values)
        except ValidationError as error:
            raise explain(error, "values", values=values) from error

    config = outcome(read, ConfigError)
    assert config is None or isinstance(config, ClassificationConfig)


@fuzz
@given(
    content=(configs | anything).map(lambda v: json.dumps(v).encode())
    | damaged(b'{"student": {"name": "x"}}')
)
def test_config_files(folder, content):
    (folder / "config.json").write_bytes(content)
    outcome(lambda: load_config(folder / "config.json"), ConfigError)


# Checkpoints


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Linear(2, 3))


def torch_file(value: object, *, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


STATE = small(1).state_dict()
ABOUT = {"mdistiller": json.dumps({"model": "resnet8", "mean": [0.5], "classes": ["a", "b"]})}
FILES = {
    "w.safetensors": save(STATE, ABOUT),
    "w.pt": torch_file({"model": STATE}),
    "old.pt": torch_file(STATE, zipped=False),
}


@pytest.mark.parametrize("name", FILES)
@fuzz
@given(data=st.data())
def test_weights(folder, name, data):
    path = folder / name
    path.write_bytes(data.draw(damaged(FILES[name])))
    model = small()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    if outcome(lambda: load_weights(model, path) or model, CheckpointError) is None:
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    elif name == "w.pt":  # it has checksums
        assert all(torch.equal(tensor, STATE[key]) for key, tensor in model.state_dict().items())
    else:
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    if name == "w.safetensors":
        about = outcome(lambda: read_metadata(path), CheckpointError)
        assert about is None or isinstance(about, dict)


RESUME = {
    "learner": STATE,
    "optimizer": {"state": {0: {"m": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
    "step": 3,
}


@fuzz
@given(content=damaged(torch_file(RESUME)))
def test_states_to_resume_from(folder, content):
    (folder / "resume.pt").write_bytes(content)
    state = outcome(lambda: load_state(folder / "resume.pt"), CheckpointError)
    if state is not None:  # it has checksums
        assert state["step"] == 3
        assert all(torch.equal(state["learner"][key], STATE[key]) for key in STATE)


LOGITS = np.arange(60, dtype=np.float32).reshape(12, 5)


@pytest.fixture(scope="module")
def cache(folder):
    """The files of a teacher's cache and what opens it."""

    def read():
        return TeacherCache(folder / "cache", [{"logits": Stream({"a": 1}, 5, "fp16", 12)}])

    read().fill(0, np.arange(12), ["logits"], lambda: {"logits": LOGITS})
    return {path: path.read_bytes() for path in (folder / "cache").iterdir()}, read


@fuzz
@given(data=st.data())
def test_caches_of_a_teacher(cache, data):
    files, read = cache
    for path, whole in files.items():
        path.write_bytes(data.draw(damaged(whole)))

    def compute():
        event("computed")
        return {"logits": LOGITS}

    for _ in range(2):
        assert np.array_equal(read().fill(0, np.arange(12), ["logits"], compute)["logits"], LOGITS)


@pytest.fixture(scope="module")
def export(folder):
    """An exported folder, and the two files in it that are read."""
    about = {
        "task": "classification",
        "model": "resnet8",
        "options": {},
        "classes": ["a", "b"],
        "image_size": 8,
    }
    about |= {"mean": [0.5] * 3, "std": [0.5] * 3}
    run = folder / "run"
    run.mkdir()
    save_student(run / "student.safetensors", create_model("resnet8", 2), about)
    out, card = export_student(run / "student.safetensors", "safetensors", out=folder / "export")
    return out, {name: (out / name).read_bytes() for name in ("card.json", card.file)}


@settings(parent=fuzz, max_examples=max(EXAMPLES // 2, 1))
@given(data=st.data())
def test_exports(export, data):
    out, whole = export
    for name, content in whole.items():
        (out / name).write_bytes(content)
    spoilt = data.draw(st.sampled_from(sorted(whole)))
    (out / spoilt).write_bytes(data.draw(damaged(whole[spoilt])))
    outcome(lambda: load_export(out, "cpu"), CheckpointError, ConfigError)


@pytest.fixture(scope="module")
def students(folder):
    """The weights and the metadata of a classifier and of a detector."""
    about = {"task": "classification", "model": "resnet8", "options": {}, "classes": ["a", "b"]}
    about |= {"image_size": 8, "mean": [0.5] * 3, "std": [0.5] * 3}
    sides = {"short_side": 32, "long_side": 48}
    boxes = {"task": "detection", "model": "fcos_resnet18", "options": sides, "classes": ["a", "b"]}
    boxes |= {"labels": [1, 2], "num_classes": 3}
    detector = create_detector("fcos_resnet18", 3, **sides)
    Image.new("RGB", (40, 32)).save(folder / "photo.png")
    return [(create_model("resnet8", 2).state_dict(), about), (detector.state_dict(), boxes)]


ENTRIES = ["task", "model", "options", "classes", "image_size", "mean", "std", "labels", "num_classes"]
OPTIONS = ["short_side", "image_mean", "frozen_stages", "score_thresh", "topk_candidates", "num_classes"]
three = st.lists(st.floats(-0.5, 1.5), min_size=3, max_size=3)


@pytest.mark.parametrize("kind", [0, 1], ids=["classifier", "detector"])
@settings(parent=fuzz, max_examples=max(EXAMPLES // 8, 1))
@given(
    entries=st.dictionaries(st.sampled_from(ENTRIES), anything | three, max_size=1),
    options=st.dictionaries(st.sampled_from(OPTIONS), anything | three, max_size=1),
)
def test_metadata_of_students(folder, students, kind, entries, options):
    weights, about = students[kind]
    about = about | {"options": about["options"] | options} | entries
    (folder / "s.safetensors").write_bytes(save(weights, {"mdistiller": json.dumps(about)}))

    def read():
        predictor = load_predictor(folder / "s.safetensors", "cpu")
        return list(predictor.predict([folder / "photo.png"], 1))

    outcome(read, CheckpointError, ConfigError)


# Data

BATCH = {b"data": np.arange(4 * 3072).astype(np.uint8).reshape(4, 3072), b"fine_labels": [1, 2, 3, 99]}
META = {b"fine_label_names": [b"%d" % i for i in range(100)]}


@fuzz
@given(
    content=st.sampled_from(range(6)).flatmap(
        lambda p: damaged(pickle.dumps(BATCH, protocol=p), pickle.dumps(META, protocol=p))
    )
)
def test_pickles(folder, content):
    (folder / "pickle").write_bytes(content)
    entry = outcome(lambda: read_pickle(folder / "pickle"), DataError)
    assert entry is None or isinstance(entry, dict)


@fuzz
@given(data=st.data())
def test_cifar(folder, data):
    root = folder / "cifar-100-python"
    root.mkdir(exist_ok=True)
    whole = {"train": pickle.dumps(BATCH), "test": pickle.dumps(BATCH), "meta": pickle.dumps(META)}
    for name, content in whole.items():
        (root / name).write_bytes(content)
    spoilt = data.draw(st.sampled_from(sorted(whole)))
    (root / spoilt).write_bytes(data.draw(damaged(whole[spoilt])))
    config = DataConfig(kind="cifar100", root=folder, download=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar, "TRAIN_IMAGES", 4)
        patch.setattr(cifar, "TEST_IMAGES", 4)
        splits = outcome(lambda: load_data(config), DataError)
    if splits is not None:
        for images in (splits.train, splits.test):
            assert images.images.shape == (4, 32, 32, 3)
            assert ((images.labels >= 0) & (images.labels < 100)).all()


def image_file(kind: str, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


IMAGES = {
    "jpeg": image_file("JPEG"),
    "png": image_file("PNG"),
    "palette": image_file("PNG", "P"),
    "bmp": image_file("BMP"),
    "gif": image_file("GIF", "P"),
    "tiff": image_file("TIFF"),
    "webp": image_file("WEBP"),
    "ppm": image_file("PPM"),
}


@pytest.mark.parametrize("kind", IMAGES)
@settings(parent=fuzz, max_examples=max(EXAMPLES // 4, 1))
@given(data=st.data())
def test_images(folder, kind, data):
    path = folder / "image.jpg"  # readers go by the content
    path.write_bytes(data.draw(damaged(IMAGES[kind])))
    image = outcome(lambda: read_image(path), DataError)
    if image is not None:
        assert image.mode == "RGB"
        assert center_crop(image, 8, 6).shape == (6, 6, 3)


ANNOTATIONS = b"a.JPEG\tn01\t0\t0\t62\t62\nb.JPEG\tn02\t0\t0\t62\t62\n"


@pytest.mark.filterwarnings("ignore:.* have no test image")
@settings(parent=fuzz, max_examples=max(EXAMPLES // 2, 1))
@given(content=damaged(ANNOTATIONS))
def test_annotations(folder, content):
    root = folder / "tiny-imagenet-200"
    files = [root / "val" / "images" / name for name in ("a.JPEG", "b.JPEG")]
    for path in (*files, *(root / "train" / wnid / "images" / "c.JPEG" for wnid in ("n01", "n02"))):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(IMAGES["jpeg"])
    (root / "val" / "val_annotations.txt").write_bytes(content)
    config = DataConfig(kind="tiny-imagenet", root=folder, image_size=8)
    splits = outcome(lambda: load_data(config), DataError)
    assert splits is None or splits.classes == ("n01", "n02")


# Runs

RUN = {
    "config.json": ClassificationConfig.model_validate({"student": {"name": "resnet8"}})
    .model_dump_json()
    .encode(),
    "env.json": json.dumps(environment(0)).encode(),
    "metrics.jsonl": b'{"kind": "train", "step": 1, "epoch": 1, "lr": 0.1, "loss": 2.0}\n'
    b'{"kind": "eval", "epoch": 1, "step": 1, "top1": 50.0, "best_top1": 50.0, "seconds": 1.0, '
    b'"ms_per_step": 2.0}\n'
    b'{"kind": "summary", "step": 1, "ms_per_step": 2.0, "student_parameters": 10}\n',
}
FIGURES = ["step", "epoch", "loss", "top1", "best_top1", "seconds", "ms_per_step", "student_parameters"]
FIGURES += ["lr", "ema", "diagnostics"]
lines = st.lists(
    st.fixed_dictionaries(
        {"kind": st.sampled_from(["train", "eval", "summary"]) | plain},
        optional=dict.fromkeys(FIGURES, plain),
    )
    | anything,
    max_size=3,
).map(lambda values: "\n".join(map(json.dumps, values)).encode())


@fuzz
@given(content=damaged(RUN["metrics.jsonl"]) | lines)
@example(content=b'{"kind": "train", "step": 1}\n{"kind": "eval", "step": 1}\n')
@example(content=b'{"kind": "eval", "step": 1, "top1": 1, "ema": 2}')
@example(content=b'{"kind": "eval", "step": 1, "top1": 1, "diagnostics": {"test": [3]}}')
@example(content=b'{"kind": "eval", "step": 1, "top1": 1, "diagnostics": [3]}')
def test_metrics_of_a_run_that_goes_on(folder, content):
    (folder / "metrics.jsonl").write_bytes(content)
    run = RunFolder(folder, ClassificationConfig.model_validate({"student": {"name": "resnet8"}}))
    outcome(lambda: run.rewind(1), DataError)
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["step"] <= 1


@pytest.mark.parametrize("name", RUN)
@fuzz
@given(data=st.data())
def test_files_of_a_run(folder, name, data):
    for file, content in RUN.items():
        (folder / file).write_bytes(content)
    random = lines if name == "metrics.jsonl" else anything.map(lambda v: json.dumps(v).encode())
    (folder / name).write_bytes(data.draw(damaged(RUN[name]) | random))
    run = outcome(lambda: load_run(folder), DataError)
    if run is not None:
        (row,) = summarize([run])
        assert row.seeds == 1
