"""Precision and layout `auto`: measured at the start, stored, and exact on repeat."""

import pytest
import torch

import mdistiller
from mdistiller.config import with_choices
from mdistiller.models.weights import read_weights
from mdistiller.runs.folder import CONFIG
from mdistiller.runs.progress import Reporter
from mdistiller.training import choose
from mdistiller.training.task import load_config

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    """Short runs are measured too, and this CPU computes in bfloat16."""
    monkeypatch.setattr(choose, "_LEAST_STEPS", 1)
    monkeypatch.setattr(choose, "has_fast_bfloat16", lambda device: True)


class Notes(Reporter):
    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)


def config(**changes):
    base = mdistiller.get_recipe("digits.student.resnet8")
    small = {
        "data": {"train_limit": 40, "test_limit": 20},
        "epochs": 2,
        "batch_size": 20,
        "diagnostics": False,
    }
    return base.replace(**({"precision": "auto", "layout": "auto"} | small | changes))


def weights(path):
    return read_weights(path)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ((4.0, 3.0, 2.0, 3.0), ("bfloat16", "contiguous")),
        ((4.0, 3.0, 3.5, 9.0), ("float32", "channels_last")),
        ((4.0, 3.9, 3.95, 4.0), ("float32", "contiguous")),  # a difference that may be noise
    ],
)
def test_the_fastest_candidate_is_stored_and_shown(tmp_path, monkeypatch, times, chosen):
    given = iter(times)
    monkeypatch.setattr(choose, "_measure", lambda *arguments: next(given))
    notes = Notes()
    run = mdistiller.train(config(out=tmp_path / "run"), reporter=notes)
    stored = load_config(run.path / CONFIG)
    assert (stored.precision, stored.layout) == chosen
    (line,) = notes.lines
    assert line.startswith(f"precision {chosen[0]}, layout {chosen[1]}; ms/step: float32 contiguous 4.0, ")


def test_a_measured_run_has_the_bits_of_its_repetition(tmp_path):
    first = mdistiller.train(config(out=tmp_path / "a"))
    stored = load_config(first.path / CONFIG)
    assert "auto" not in (stored.precision, stored.layout)
    again = mdistiller.train(stored.replace(out=tmp_path / "b"))
    assert same(weights(first.path), weights(again.path))


def test_a_resumed_run_keeps_its_choice(tmp_path, monkeypatch):
    asked = config(out=tmp_path / "run", epochs=1)
    monkeypatch.setattr(choose, "_measure", lambda *arguments: 1.0)
    mdistiller.train(asked)
    monkeypatch.setattr(choose, "_measure", lambda *arguments: pytest.fail("measured again"))
    mdistiller.train(asked, resume=True)
    stored = load_config(tmp_path / "run" / CONFIG)
    assert (stored.precision, stored.layout) == ("float32", "contiguous")


def test_only_what_is_open_is_measured(monkeypatch):
    assert len(choose.candidates(config(), CPU)) == 4
    assert {c["layout"] for c in choose.candidates(config(layout="channels_last"), CPU)} == {"channels_last"}
    assert len(choose.candidates(config(precision="float32"), CPU)) == 2
    assert len(choose.candidates(config(precision="float32", layout="contiguous"), CPU)) == 1
    assert choose.candidates(config(compile="default"), CPU) == [
        {"precision": "float32", "layout": "contiguous"}
    ]
    assert choose.candidates(config(), GPU)[0] == {"precision": "bfloat16", "layout": "channels_last"}
    monkeypatch.setattr(choose, "has_fast_bfloat16", lambda device: False)
    assert {c["precision"] for c in choose.candidates(config(), CPU)} == {"float32"}


def test_short_runs_follow_the_rule(tmp_path, monkeypatch):
    monkeypatch.setattr(choose, "_LEAST_STEPS", 400)
    monkeypatch.setattr(choose, "_measure", lambda *arguments: pytest.fail("measured"))
    run = mdistiller.train(config(out=tmp_path / "run", max_steps=1))
    assert load_config(run.path / CONFIG).layout == "contiguous"


def test_choices_replace_auto_alone():
    found = with_choices(config(precision="float32"), {"precision": "bfloat16", "layout": "channels_last"})
    assert (found.precision, found.layout) == ("float32", "channels_last")


def test_a_run_is_built_once(tmp_path, registries):
    built = []

    @mdistiller.register_model
    def counted(num_classes):
        built.append(num_classes)
        return mdistiller.create_model("resnet8", num_classes)

    teacher = mdistiller.train(
        config(out=tmp_path / "teacher", precision="float32", layout="contiguous")
    ).path
    run = mdistiller.get_recipe("digits.at.resnet8_counted").replace(
        **{
            "data": {"train_limit": 40, "test_limit": 20},
            "epochs": 1,
            "batch_size": 20,
            "diagnostics": False,
        },
        **{"precision": "auto", "layout": "auto", "method": {"weight": "auto"}, "out": tmp_path / "run"},
        teacher={"checkpoint": teacher},
    )
    mdistiller.train(run)
    assert built == [10]
