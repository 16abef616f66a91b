"""`mdistiller list`."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mdistiller.cli.main import run
from mdistiller.methods import FitNet, LogitMethod, Method, get_method, list_methods, method_config, registry
from mdistiller.methods.base import Example, MethodConfig, own_example
from mdistiller.methods.compose import build_method
from mdistiller.models import create_model, list_models
from mdistiller.recipes import list_recipes
from mdistiller.taps import tap
from mdistiller.tasks.classification.listing import describe_method
from mdistiller.types import Batch, DataInfo, Outputs

PLUGIN = Path(__file__).resolve().parents[2] / "examples" / "my_method.py"


@pytest.fixture(scope="module")
def models(cli):
    return cli("list", "models", "--json")


def test_models(models):
    rows = models.json()
    assert [row["name"] for row in rows] == list_models()
    parameters = {row["name"]: row["parameters"] for row in rows}
    for name in ("resnet8x4", "vgg8", "MobileNetV2"):
        assert parameters[name] == sum(p.numel() for p in create_model(name).parameters())
    assert (models.code, models.err) == (0, "")


@pytest.fixture(scope="module")
def methods(cli):
    return cli("list", "methods", "--json").json()


def test_methods(methods):
    assert [row["name"] for row in methods] == list_methods()
    for row in methods:
        assert row["paper"]
        method = get_method(row["name"])
        assert (row["year"], row["paper"]) == (method.card.year, method.card.paper)


def built_in(rows):
    """The rows of this package's methods: tests' modules register others, which declare no facts."""
    return [row for row in rows if get_method(row["name"]).__module__.startswith("mdistiller.")]


def test_what_methods_read(methods):
    methods = built_in(methods)
    reads = {row["name"]: row["reads"] for row in methods}
    for row in methods:
        taps = row["student_taps"] + row["teacher_taps"]
        assert reads[row["name"]] in ({"features", "both"} if taps else {"logits", None})
    assert [name for name in reads if reads[name] is None] == ["none"]
    assert [name for name in reads if reads[name] == "both"] == ["diffkd", "nd", "ofa", "semckd"]


def test_extra_parameters_are_the_published_ones(methods):
    """The paper's Figure 2, where this counts the same: CRD's 12.3 M there are its memory bank."""
    extra = {row["name"]: row["extra_parameters"] for row in methods}
    assert [extra[name] for name in ("kd", "rkd", "dkd")] == [0, 0, 0]
    assert round(extra["fitnet"] / 1e3, 1) == 16.8
    assert round(extra["ofd"] / 1e3, 1) == 86.9
    assert round(extra["reviewkd"] / 1e6, 1) == 1.8


def test_taps_of_methods(methods):
    taps = {row["name"]: (row["student_taps"], row["teacher_taps"]) for row in methods}
    assert taps["at"] == (["stage1", "stage2", "stage3"],) * 2
    assert taps["crd"] == (["pooled"], ["pooled"])
    assert taps["dkd"] == ([], [])


def test_recipes(cli):
    rows = cli("list", "recipes", "--json").json()
    assert [row["name"] for row in rows] == list_recipes()
    found = {row["name"]: row["published, %"] for row in rows}
    assert found["cifar100.dkd.resnet32x4_resnet8x4"] == "76.32 (best)"
    assert found["cifar100.kd.resnet32x4_resnet8x4"] == "73.33 (last)"
    assert found["cifar10.dkd.resnet32x4_resnet8x4"] == "default, not published"
    assert found["digits.kd.resnet20_resnet8"] == "default, not published"
    assert len({row["name"] for row in rows}) == len(rows)


def names(what):
    """What is known now: other tests' modules add to it when they are imported."""
    return {
        "methods": list_methods,
        "models": list_models,
        "recipes": list_recipes,
    }[what]()


@pytest.mark.parametrize("what", ["methods", "models", "recipes"])
def test_without_a_terminal_each_is_one_whole_line(cli, monkeypatch, what):
    monkeypatch.setenv("COLUMNS", "80")
    done = cli("list", what)
    assert (done.code, done.err) == (0, "")
    head, *lines = done.out.split("\n\n")[0].splitlines()
    assert head.split()[0] == "name"
    assert [line.split()[0] for line in lines] == names(what)
    assert not [line for line in done.out.splitlines() if line != line.rstrip()]
    assert "…" not in done.out


def test_a_method_and_its_facts_are_one_line(cli, methods, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = {line.split()[0]: line for line in cli("list", "methods").out.splitlines() if line}
    assert lines["none"].split()[2] == "–"  # no year
    assert lines["ofd"].split()[3:6] == ["stage1-3.preact", "stage1-3.preact", "86,912"]
    for row in methods:
        assert f"  {row['paper']}  " in f"{lines[row['name']]}  "
        assert lines[row["name"]].index(row["reads"] or "–") == lines["name"].index("reads")


class Terminal(io.TextIOWrapper):
    """What is written to it, as to a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_narrow_terminal_has_when_to_use_each_method(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = Terminal(io.BytesIO(), "utf-8", write_through=True)
    with contextlib.redirect_stdout(out):
        assert run(["list", "methods"]) == 0
    text = out.buffer.getvalue().decode()
    assert max(map(len, text.splitlines())) <= 80
    table, _ = text.split("\n\n")
    assert [line.split()[0] for line in table.splitlines()[1:] if line[0] != " "] == names("methods")
    for name in list_methods():
        assert " ".join(get_method(name).card.use.split()) in " ".join(table.split())


def test_a_terminal_has_the_families_of_recipes(monkeypatch):
    out = Terminal(io.BytesIO(), "utf-8", write_through=True)
    with contextlib.redirect_stdout(out):
        assert run(["list", "recipes"]) == 0
    lines = out.buffer.getvalue().decode().split("\n\n")[0].splitlines()[1:]
    families = [name.partition(".")[0] for name in names("recipes")]
    assert dict(line.split() for line in lines) == {f: str(families.count(f)) for f in families}


def test_models_of_libraries_are_named(cli):
    done = cli("list", "models", "timm/resnet18")
    assert (done.code, "nearest: " in done.message, "Also timm/NAME" in done.message) == (2, True, True)
    note = cli("list", "models").out.split("\n\n")[1]
    assert all(word in note for word in ("timm/NAME", "torchvision/NAME", "transformers"))


@pytest.mark.parametrize(
    ("what", "pattern"), [("methods", "dkd"), ("models", "resnet32x4"), ("recipes", "ResNet32x4")]
)
def test_a_pattern_picks_names(cli, what, pattern):
    expected = [name for name in names(what) if pattern.lower() in name.lower()]
    assert 0 < len(expected) < len(names(what))
    assert [row["name"] for row in cli("list", what, pattern, "--json").json()] == expected
    lines = cli("list", what, pattern).out.split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in lines[1:]] == expected


def test_a_pattern_that_fits_nothing_names_the_nearest(cli):
    done = cli("list", "models", "resnet33x4")
    assert (done.code, done.out) == (2, "")
    assert "unknown model 'resnet33x4'; nearest: resnet32x4" in done.message


@pytest.mark.usefixtures("forget_plugins")
def test_plugins_are_listed(cli):
    rows = cli("list", "methods", "--plugin", PLUGIN, "--json").json()
    mine = next(row for row in rows if row["name"] == "my_cosine")
    assert (mine["reads"], mine["year"], mine["paper"]) == ("logits", 2026, "an example")
    names = [row["name"] for row in cli("list", "recipes", "--plugin", PLUGIN, "--json").json()]
    assert "cifar100.my_cosine.resnet32x4_resnet8x4" in names


# Cost: facts that classes declare, instead of methods that are built and run

BUILT_IN = [name for name in list_methods() if get_method(name).__module__.startswith("mdistiller.")]


def measure_example(method_class: type[Method]) -> Example:
    """Finds the facts of a method by building it, and with taps by one pass of both models and the losses."""
    student, teacher = create_model("resnet8x4"), create_model("resnet32x4")
    data = DataInfo((3, 32, 32), torch.arange(50_000) % 100, 64)
    method = build_method(method_config(method_class.Config.own_name), student, teacher, data)
    extended = method.extend_student(student)
    trained = sum(p.numel() for p in nn.ModuleList([extended, method]).parameters() if p.requires_grad)
    return Example(
        tuple(method.student_taps),
        tuple(method.teacher_taps),
        trained - sum(p.numel() for p in student.parameters()),
        reads_logits(method, extended, teacher),
    )


def reads_logits(method: Method, student: nn.Module, teacher: nn.Module) -> bool:
    """Whether the losses of a method with taps have a gradient for the logits."""
    if not method.student_taps and not method.teacher_taps:
        return False
    image, outputs = torch.randn(4 * method.needs.views, 3, 32, 32), []
    for model, taps in ((student, method.student_taps), (teacher, method.teacher_taps)):
        tapped = tap(model, taps)
        logits, features = tapped(image)
        tapped.untap()
        outputs.append(Outputs(logits.detach().requires_grad_(), features))
    position = torch.arange(len(image))
    losses = method(*outputs, Batch(image, position % 4, position % 4), torch.ones(()))
    total = torch.stack(list(losses.values())).sum()
    read = torch.autograd.grad(total, [logits for logits, _ in outputs], allow_unused=True)
    return any(gradient is not None for gradient in read)


@pytest.mark.parametrize("name", BUILT_IN)
def test_declared_facts_are_those_of_the_method_that_is_built_and_run(name):
    method = get_method(name)
    torch.manual_seed(0)
    if method.needs.teacher:
        assert measure_example(method) == (own_example(method) or Example())
    else:
        assert own_example(method) is None


COMMANDS = {
    "list methods": 0,
    "list models": 0,
    "list recipes": 0,
    "train cifar100.dkd.resnet32x4_resnet8x4 --help": 0,
    "train coco.dkd.fasterrcnn_resnet101_resnet18 --help": 0,
    "train unknown": 2,
    "bench --help": 0,
    "reproduce --help": 0,
}
NO_FORWARD = f"""
import sys
for name in ("torchvision", "timm", "sklearn"):
    sys.modules[name] = None  # an import of it raises ImportError
import torch
from mdistiller.cli.main import run
def refuse(self, *args, **kwargs):
    raise AssertionError(f"{{type(self).__name__}} ran")
torch.nn.Module.__call__ = torch.nn.Module._call_impl = refuse
for words, expected in {COMMANDS}.items():
    try:
        code = run(words.split())
    except SystemExit as end:  # --help
        code = end.code
    assert code == expected, words
    assert "plotly" not in sys.modules or words.split()[0] in ("bench", "reproduce"), words
"""


def test_a_command_that_only_prints_runs_no_model_and_loads_no_heavy_package():
    done = subprocess.run([sys.executable, "-c", NO_FORWARD], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "semckd     both" in done.stdout


@pytest.mark.parametrize("words", ["--version", "--help"])
def test_version_and_help_import_no_torch(words):
    code = "import sys; sys.modules['torch'] = None; from mdistiller.cli.main import run; run(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_method_that_declares_nothing_is_listed_without_its_cost(registries):

    class LayerConfig(MethodConfig):
        pass

    @registry.register_method("with_layer")
    class WithLayer(LogitMethod):
        Config = LayerConfig

        def __init__(self, *args):
            super().__init__(*args)
            self.layer = nn.Linear(4, 5)

    class ChildConfig(FitNet.Config):
        pass

    @registry.register_method("child_of_fitnet")
    class Child(FitNet):
        Config = ChildConfig

        def default_taps(self, student, teacher):
            return ("stage1",), ("stage1",)

    found = describe_method("with_layer")
    assert (found["reads"], found["student_taps"], found["extra_parameters"]) == (None, [], None)
    assert own_example(Child) is None
    found = describe_method("child_of_fitnet")
    assert (found["reads"], found["student_taps"], found["extra_parameters"]) == ("features", [], None)
