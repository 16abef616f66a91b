"""A task of a plug-in through the command line: regression on vectors, with recipes of its own."""

import json
import re
import signal
import time

import pytest
from processes import Forked, mdistiller as mdistiller_command

import mdistiller
from mdistiller.cli.main import run as command

PLUGIN = '''
from typing import Literal, NamedTuple

import torch
from torch import nn

from mdistiller import Batch, DataInfo, Method, MethodConfig, Metric, RunConfig, Task
from mdistiller import register_method, register_task
from mdistiller.models import ModelConfig, load_weights
from mdistiller.recipes import Family, register_family
from mdistiller.report.sections import Section, TaskSections, register_sections
from mdistiller.training.batches import BatchSource
from mdistiller.training.deployment import Deployment


class RegressionConfig(RunConfig):
    task: Literal["regression"] = "regression"
    metrics = ("negative_mse", "mae")
    samples: int = 64


class Vectors(NamedTuple):
    inputs: torch.Tensor
    targets: torch.Tensor
    description: str = "vectors and their sums"


class Loader:
    def __init__(self, data, batch_size):
        self.data, self.batch_size = data, batch_size

    def __len__(self):
        return len(self.data.inputs) // self.batch_size

    def epoch(self, epoch, first=0):
        order = torch.randperm(len(self.data.inputs), generator=torch.Generator().manual_seed(epoch))
        for index in order.split(self.batch_size)[first : len(self)]:
            yield Batch(self.data.inputs[index], self.data.targets[index], index)


class MSEConfig(MethodConfig):
    name: Literal["vector_mse"] = "vector_mse"
    weight: float = 1.0


@register_method("vector_mse")
class VectorMSE(Method):
    """Mean squared difference of the vectors."""

    Config = MSEConfig

    def forward(self, student, teacher, batch, progress):
        loss = nn.functional.mse_loss(student.logits, teacher.logits)
        return {"vector_mse": self.config.weight * loss}


def errors(model, data):
    with torch.no_grad():
        difference = model(data.inputs) - data.targets
    # Far below -1 for these targets, and a plain number.
    return {"negative_mse": -difference.square().mean().item(), "mae": difference.abs().mean().item()}


class VectorDeployment(Deployment):
    outputs = ("vector",)
    predictions = "vectors"

    def card_fields(self, metadata, config):
        return {"classes": tuple(metadata["classes"]), "data": None}

    def as_model(self, student):
        return lambda inputs: (student(inputs),)

    def example(self, fields, count, data):
        return torch.randn(count, 4, generator=torch.Generator().manual_seed(count))

    def load_test_set(self, config):
        return make_data(config)

    def evaluate(self, models, config, data, device):
        found = [errors(lambda x, m=m: m(x)[0], data) for m in models]
        return [metrics | {"agreement": None, "images": len(data.inputs)} for metrics in found]

    def check_inputs(self, metadata):
        raise NotImplementedError

    write_graph = difference = describe = prepare = predict = format_prediction = check_inputs


def make_data(config):
    inputs = torch.randn(config.samples, 4, generator=torch.Generator().manual_seed(0))
    return Vectors(inputs, 100 * inputs.cumsum(1)[:, 2:])


class RegressionTask(Task):
    name = "regression"
    Config = RegressionConfig
    metadata_keys = ("model", "options", "classes")

    def load_data(self, config):
        return make_data(config)

    def build_model(self, config, model, data):
        width = int(model.name.removeprefix("mlp"))
        built = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))
        if model.checkpoint is not None:
            load_weights(built, model.checkpoint)
        return built

    def data_info(self, config, data):
        return DataInfo((4,), None, config.batch_size)

    def task_loss(self, config, data):
        return lambda outputs, batch: nn.functional.mse_loss(outputs.logits, batch.label)

    def make_batches(self, config, data, world):
        return BatchSource(Loader(data, config.batch_size), world)

    def make_evaluator(self, config, data, source, teacher, world):
        return lambda model, is_student: errors(model, data)

    def evaluate(self, config, model, world, predictions=None):
        data = make_data(config)
        return errors(self.build_model(config, model, data), data) | {"images": len(data.inputs)}

    def metadata(self, config, data, *, is_extended):
        return {"model": config.student.name, "options": {}, "classes": ["third", "fourth"]}

    def load_student(self, file, metadata):
        return self.build_model(None, ModelConfig(name=metadata["model"], checkpoint=file), None).eval()

    def check_model(self, name):
        if not name.startswith("mlp"):
            super().check_model(name)

    def list_models(self):
        return [{"name": "mlp4"}, {"name": "mlp16"}]

    def deployment(self):
        return VectorDeployment()


register_task(RegressionTask())


def baseline(model):
    return RegressionConfig(
        student=ModelConfig(name=model),
        epochs=4,
        batch_size=16,
        device="cpu",
        layout="contiguous",
        optim={"lr": 1e-4, "schedule": "constant"},
    )


class Vectorial(Family):
    def models(self):
        return ["mlp16"], ["mlp4"]

    def methods(self):
        return ["vector_mse"]

    def find_model(self, name):
        return name

    def split_pair(self, pair):
        return tuple(pair.split("_"))


register_family("vectors", Vectorial(baseline, ("mlp16_mlp4",)))


def vectors(rows, images, device, found):
    return [Section("vectors", "Vectors", f"<p>{images} vectors</p>")]


register_sections("regression", TaskSections("the vectors", vectors))
'''


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    file = tmp_path_factory.mktemp("plugin") / "regression.py"
    file.write_text(PLUGIN)
    return file


@pytest.fixture(scope="module")
def runs(plugin, tmp_path_factory):
    """A teacher, a student alone and a distilled student."""
    out = tmp_path_factory.mktemp("runs")
    for recipe, name, *more in (
        ("vectors.teacher.mlp16", "teacher", "--epochs", "30"),
        ("vectors.student.mlp4", "alone"),
        ("vectors.vector_mse.mlp16_mlp4", "distilled", "--teacher.checkpoint", out / "teacher"),
    ):
        words = ["train", recipe, "--plugin", plugin, "--out", out / name, "--save-best", *more]
        assert command([*map(str, words)]) == 0
    return out


def numbers(text):
    """Asserts that text holds results as plain numbers: far below -1, and no percentages."""
    assert re.search(r"negative_mse[^%]*?[-−]\d{3,}|[-−]\d\.\d+e\+0\d", text), text
    assert "%" not in text.replace("95 %", ""), text


def test_it_trains_and_shows_plain_numbers(runs, plugin, tmp_path, capfd):
    words = ["train", "vectors.student.mlp4", "--plugin", plugin, "--out", tmp_path / "run", "--save-best"]
    assert command([*map(str, words)]) == 0
    shown = capfd.readouterr().err
    numbers(shown)
    assert "test negative_mse: last epoch -" in shown
    assert (tmp_path / "run" / "report.html").is_file()
    summary = mdistiller.Run(tmp_path / "run").summary
    assert summary["best"]["epoch"] == 4
    assert summary["best"]["negative_mse"] < -1
    assert (tmp_path / "run" / "student-best.safetensors").is_file()


def test_an_interrupted_run_resumes(runs, plugin, tmp_path):
    out = tmp_path / "run"
    words = ["train", "vectors.vector_mse.mlp16_mlp4", "--plugin", plugin, "--out", out]
    words += ["--teacher.checkpoint", runs / "teacher", "--epochs", "100000", "--eval-every", "50"]
    process = Forked(mdistiller_command, *words)
    until = time.monotonic() + 120
    while not (out / "metrics.jsonl").is_file() or '"eval"' not in (out / "metrics.jsonl").read_text():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode != 0
    assert "the state is saved" in said
    step = max(line["step"] for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()))
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"epochs": step // 4 + 100, "max_steps": None}))
    assert command(["train", str(out), "--resume", "--plugin", str(plugin)]) == 0
    assert mdistiller.Run(out).summary["step"] == 4 * (step // 4 + 100)


def test_eval(runs, plugin, tmp_path, capsys):
    words = ["eval", runs / "distilled", "--plugin", plugin, "--out", tmp_path / "evaluated"]
    assert command([*map(str, words)]) == 0
    shown = capsys.readouterr().out
    numbers(shown)
    assert command(["report", str(tmp_path), "--plugin", str(plugin), "--out", str(tmp_path / "p.html")]) == 0


@pytest.mark.parametrize("format", ["html", "md", "latex", "csv", "json"])
def test_report(runs, plugin, tmp_path, format):
    out = tmp_path / "report"
    words = ["report", runs / "alone", runs / "distilled", "--plugin", plugin, "--out", out]
    assert command([*map(str, words), "--format", format]) == 0
    text = re.sub(r"(?s)<style.*?</style>|<script.*?</script>", "", out.read_text())
    text = re.sub(r'width(="|:)100%', "", text.replace("\u00a0", " "))
    text = re.sub(r"95 %|closes \d+ %", "", text)
    if format == "html":
        assert "2000 vectors" in text
        assert "the test images cannot be read" not in text.lower()
    if format == "latex":
        text = re.sub(r"(?m)^%.*", "", text)
    assert not re.findall(r"[^;\n]{0,40}%[^;\n]{0,20}", text)
    assert "negative_mse" in text.replace("\\", "") or format == "csv"


def test_compare(runs, plugin, capsys):
    words = ["compare", *(runs / name for name in ("teacher", "alone", "distilled")), "--plugin", plugin]
    assert command([*map(str, words), "--batch", "1"]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].split("|")[2].strip() == "negative_mse"
    numbers(shown)


def test_lists_name_its_recipes_and_models(plugin, runs, capsys):
    assert command(["list", "recipes", "vectors", "--plugin", str(plugin)]) == 0
    assert "vectors.vector_mse.mlp16_mlp4" in capsys.readouterr().out
    assert command(["list", "models", "--task", "regression", "--plugin", str(plugin)]) == 0
    assert capsys.readouterr().out.split() == ["name", "mlp4", "mlp16"]


def test_seeds_and_a_dry_run(runs, plugin, tmp_path, capfd):
    words = ["train", "vectors.student.mlp4", "--plugin", plugin, "--out", tmp_path / "seeds"]
    assert command([*map(str, words), "--dry-run"]) == 0
    assert command([*map(str, words), "--seeds", "2"]) == 0
    numbers(capfd.readouterr().err)


def test_sweep(runs, plugin, tmp_path, capsys):
    pytest.importorskip("ray")
    words = ["sweep", "vectors.student.mlp4", "--plugin", plugin, "--out", tmp_path / "sweep"]
    assert command([*map(str, words), "--space", "optim.lr=[1e-4]"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("negative_mse -") == 1
    numbers(shown.out)
    assert (tmp_path / "sweep" / "report.html").is_file()


def test_a_report_that_fails_leaves_the_run_finished(runs, plugin, tmp_path):
    out = tmp_path / "run"
    (out / "report.html").mkdir(parents=True)  # where the page should go
    words = ["train", "vectors.student.mlp4", "--plugin", plugin, "--out", out, "--seed", "3"]
    with pytest.warns(UserWarning, match=f"no report: IsADirectoryError.*mdistiller report {out}$"):
        assert command([*map(str, words)]) == 0
