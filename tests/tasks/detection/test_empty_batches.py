"""Two processes, of which at least one has a batch without an object at every step."""

import os
import shutil

import pytest
import torch
from processes import run_group
from tiny_detectors import fcos, group_norm, one_stage, ssd, two_stage, write_set
from tiny_sets import TINY, tiny_set

from mdistiller.runs.folder import read_metrics
from mdistiller.tasks.detection import models
from mdistiller.tasks.detection.adapters import adapter_of
from mdistiller.tasks.detection.config import DetectionConfig
from mdistiller.training import choose
from mdistiller.training.launch import train

CASES = {
    "two_stage": (two_stage, "dkd+reviewkd"),
    "anchors": (one_stage, "bckd"),
    "points": (fcos, "crosskd+fgd"),
    "ssd": (ssd, "kd"),
    "d_fine": (None, "detrdistill+ld"),
    "unlabeled": (one_stage, "pkd"),
}


def only_the_first_has_objects(content):
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 0]


def config(kind, data, out, **changes):
    make, method = CASES[kind]
    model = {"name": "small"} if make else {"name": "transformers/d_fine", "options": TINY["d_fine"]}
    settings = {
        "data": {"root": data, "workers": 0, "keep_empty": True},
        "augment": {"short_sides": [64], "long_side": 96},
        "student": model,
        "teacher": {**model, "checkpoint": f"{out}-teacher"},
        "method": {"name": method},
        "optim": {"lr": 0.005, "clip_norm": 1.0},
        "batch_size": 2,
        "epochs": 1,
        "log_every": 1,
        "device": "cpu",
        "out": out,
    }
    if kind == "unlabeled" and "method" not in changes:
        settings["data"] |= {"keep_empty": False, "unlabeled": data / "images"}
    return DetectionConfig.model_validate(settings | changes)


def use(kind):
    make, _ = CASES[kind]

    def tiny(name, num_classes, *, short_side, long_side, **options):
        return group_norm(make(int(torch.randint(1000, ())), classes=num_classes))

    if make:
        models.create_detector = tiny


def process(kind, data, out):
    """Trains; the weights of every process go into a file."""
    use(kind)
    kept = {}
    original = choose.build_run

    def build(*args):
        kept["trainer"], source = original(*args)
        return kept["trainer"], source

    choose.build_run = build
    train(config(kind, data, out))
    torch.save(kept["trainer"].distiller.state_dict(), f"{out}-rank{os.environ['RANK']}.pt")


@pytest.mark.parametrize("kind", CASES)
def test_processes_without_an_object_keep_up(tmp_path, monkeypatch, kind):
    if kind == "d_fine":
        pytest.importorskip("transformers", minversion="5")
    monkeypatch.setattr(models, "create_detector", models.create_detector)
    use(kind)
    data, out = tmp_path / "data", tmp_path / "run"
    write_set(data, 6, change=only_the_first_has_objects)
    write_set(tmp_path / "other", 2, "instances_val.json", seed=1)
    shutil.move(tmp_path / "other" / "instances_val.json", data)
    (data / "images").rename(data / "train2017")
    shutil.move(tmp_path / "other" / "images", data / "val2017")
    (data / "images").symlink_to("train2017")
    alone = {"teacher": None, "method": {"name": "none"}, "max_steps": 1}
    train(config(kind, data, tmp_path / "run-teacher", **alone))
    codes, _, errors = run_group(process, kind, data, out)
    assert codes == [0, 0], errors
    steps = [line for line in read_metrics(out) if line["kind"] == "train"]
    assert len(steps) == 3
    assert all(torch.tensor(line["loss"]).isfinite() for line in steps)
    first, second = (torch.load(f"{out}-rank{rank}.pt") for rank in range(2))
    assert [key for key in first if "running" not in key and not torch.equal(first[key], second[key])] == []


@pytest.mark.parametrize("kind", TINY)
def test_every_parameter_of_a_set_detector_has_a_gradient(kind):
    pytest.importorskip("transformers", minversion="5")
    model = tiny_set(kind).train()
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    losses, _ = adapter_of(model).train([torch.rand(3, 64, 64)], [nothing])
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
