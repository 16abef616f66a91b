"""A third task in few lines: it trains, resumes, and writes its files."""

from typing import Literal, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mdistiller
from mdistiller.config import RunConfig
from mdistiller.errors import ConfigError
from mdistiller.models import load_weights
from mdistiller.runs.folder import read_metrics
from mdistiller.training.batches import BatchSource
from mdistiller.training.task import Task, register_task
from mdistiller.types import Batch, DataInfo

CLASSES = 3


class ToyConfig(RunConfig):
    task: Literal["points"] = "points"
    metrics = ("accuracy",)
    samples: int = 48


class Points(NamedTuple):
    inputs: torch.Tensor
    labels: torch.Tensor
    description: str = "points in the plane"


class PointLoader:
    def __init__(self, data, batch_size):
        self.data, self.batch_size = data, batch_size

    def __len__(self):
        return len(self.data.labels) // self.batch_size

    def epoch(self, epoch, first=0):
        order = torch.randperm(len(self.data.labels), generator=torch.Generator().manual_seed(epoch))
        for index in order.split(self.batch_size)[first : len(self)]:
            yield Batch(self.data.inputs[index], self.data.labels[index], index)


class PointTask(Task):
    name = "points"
    Config = ToyConfig

    def load_data(self, config):
        inputs = torch.randn(config.samples, 2, generator=torch.Generator().manual_seed(0))
        return Points(inputs, (inputs.sum(1) > 0).long() + (inputs[:, 0] > 1).long())

    def build_model(self, config, model, data):
        width = int(model.name.removeprefix("mlp"))
        built = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, CLASSES))
        if model.checkpoint is not None:
            load_weights(built, model.checkpoint)
        return built

    def data_info(self, config, data):
        return DataInfo((2,), data.labels, config.batch_size)

    def task_loss(self, config, data):
        return lambda outputs, batch: nn.functional.cross_entropy(outputs.logits, batch.label)

    def make_batches(self, config, data, world):
        return BatchSource(PointLoader(data, config.batch_size), world)

    def make_evaluator(self, config, data, source, teacher, world):
        def evaluate(model, is_student):
            with torch.no_grad():
                hits = model(data.inputs).argmax(1) == data.labels
            return {"accuracy": 100 * hits.float().mean().item()}

        return evaluate

    def metadata(self, config, data, *, is_extended):
        return {"model": config.student.name}


register_task(PointTask())


def config(**changes):
    settings = {"student": "mlp4", "epochs": 6, "batch_size": 8, "device": "cpu", "layout": "contiguous"}
    return ToyConfig.model_validate(settings | {"optim": {"schedule": "constant"}} | changes)


# From here on: the task in use.


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    run = mdistiller.train(config(student="mlp32", epochs=40, out=tmp_path_factory.mktemp("run") / "teacher"))
    assert run.summary["last"]["accuracy"] > 90
    return {"name": "mlp32", "checkpoint": run.path}


def test_it_trains_and_resumes(tmp_path, teacher):
    def named(out):
        return config(teacher=teacher, method={"name": "dkd", "warmup": 0.5}, out=tmp_path / out)

    first, second = (mdistiller.train(named(out)).path for out in ("first", "second"))
    assert [line["kind"] for line in read_metrics(first)].count("eval") == 6
    assert {"dkd", "task", "loss"} <= read_metrics(first)[0].keys()
    a, b = (load_file(path / "student.safetensors") for path in (first, second))
    assert all(torch.equal(a[key], b[key]) for key in a)
    again = mdistiller.train(named("first"), resume=True)
    assert again.summary["step"] == 36


def test_what_it_does_not_offer_is_said(tmp_path, teacher):
    with pytest.raises(ConfigError, match="task 'points'"):
        mdistiller.load_student(teacher["checkpoint"])
