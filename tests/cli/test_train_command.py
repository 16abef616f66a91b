"""`mdistiller train`: the run folder, the output, repeating, resuming, plug-ins."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mdistiller.cli import train as train_command
from mdistiller.methods import list_methods
from mdistiller.models import create_model, load_weights
from mdistiller.runs.checkpoint import save_student
from mdistiller.runs.progress import Reporter
from mdistiller.training import metrics, task
from mdistiller.training.task import load_config

PLUGIN = Path(__file__).resolve().parents[2] / "examples" / "my_method.py"


def same_weights(one: Path, two: Path, name: str = "student.safetensors") -> bool:
    """Whether two runs' weights are the same to the bit."""
    first, second = load_file(one / name), load_file(two / name)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# The run folder and the output


def test_run_folder(cli, student_run, teacher_run):
    assert {path.name for path in student_run.iterdir()} == {
        *("config.json", "env.json", "metrics.jsonl", "student.safetensors", "resume.pt", "report.html"),
    }
    env = json.loads((student_run / "env.json").read_text())
    assert env["seed"] == 3
    assert env["versions"]["torch"] == torch.__version__
    assert {"time", "command", "python", "platform", "cpu", "gpus", "commit"} <= set(env)
    assert "DKD" in (student_run / "report.html").read_text()
    # Nothing of the teacher is in the state, which no code has to be run to read.
    state = torch.load(student_run / "resume.pt", weights_only=True)
    ours = sum(t.numel() for t in create_model("resnet8", 4).state_dict().values())
    assert sum(t.numel() for t in state["learner"].values()) == ours
    assert (state["step"], state["epoch"]) == (4, 2)


def test_config_json_is_fully_resolved(cli, student_run, teacher_run):
    config = cli.config(student_run)
    assert config == load_config(student_run / "config.json").model_dump(mode="json")
    assert config["recipe"] == "digits.dkd.resnet8_resnet8"
    assert config["out"] == str(student_run)
    assert config["teacher"] == {
        "name": "resnet8",
        "checkpoint": str(teacher_run),
        "options": {},
        "mean": None,
        "std": None,
        "image_size": None,
    }
    assert config["method"]["name"] == "dkd"
    assert config["method"]["beta"] == 8
    # Overridden, from the recipe, and the class's default, all written out.
    assert (config["epochs"], config["optim"]["schedule"], config["optim"]["gamma"]) == (2, "cosine", 0.1)


def test_metrics(cli, student_run):
    lines = cli.metrics(student_run)
    kinds = [line["kind"] for line in lines]
    assert kinds == ["train", "train", "eval", "train", "train", "eval", "summary"]
    train, evals, summary = lines[0:2] + lines[3:5], (lines[2], lines[5]), lines[6]
    for step, line in enumerate(train, 1):
        assert set(line) == {"kind", "step", "epoch", "lr", "loss", "task", "dkd", "top1"}
        assert (line["step"], line["epoch"]) == (step, (step + 1) // 2)
        assert line["loss"] == pytest.approx(line["task"] + line["dkd"], rel=1e-5)
        assert line["top1"] * 32 / 100 == pytest.approx(round(line["top1"] * 32 / 100))
    assert train[0]["dkd"] == 0  # the warm-up starts at nothing
    assert all(line["dkd"] > 0 for line in train[1:])
    for epoch, line in enumerate(evals, 1):
        assert (line["epoch"], line["step"]) == (epoch, 2 * epoch)
        windows = train[2 * epoch - 2 : 2 * epoch]
        for name in ("loss", "task", "dkd", "top1"):
            assert line["train"][name] == pytest.approx(sum(w[name] for w in windows) / 2, rel=1e-6)
        assert 0 <= line["top1"] <= line["top5"] == 100  # four classes
        assert line["ms_per_step"] > 0
    assert evals[1]["seconds"] > evals[0]["seconds"] > 0
    assert evals[1]["best_top1"] == max(line["top1"] for line in evals)
    figures = ("top1", "top5", "loss", "balanced_accuracy", "macro_f1", "epoch")
    assert summary["last"] == {name: evals[1][name] for name in figures}
    best = max(evals, key=lambda line: line["top1"])
    assert summary["best"] == {name: best[name] for name in figures}
    assert (summary["step"], summary["epochs"]) == (4, 2)
    model = create_model("resnet8", 4)
    assert summary["student_parameters"] == sum(p.numel() for p in model.parameters())
    assert summary["method_parameters"] == 0


def test_student_file_is_the_model(student_run):
    model = create_model("resnet8", 4)
    load_weights(model, student_run)
    path = student_run / "student.safetensors"
    assert set(load_file(path)) == set(model.state_dict())
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["mdistiller"])
    assert (about["model"], len(about["classes"]), about["image_size"]) == ("resnet8", 4, 16)


def test_json_is_all_of_stdout_and_progress_goes_to_stderr(cli, student):
    out, done = student
    assert done.code == 0
    found = done.json()
    assert found.pop("out") == str(out)
    assert found == cli.metrics(out)[-1]
    for text in ("digits.dkd.resnet8_resnet8", "64 training and 32 test images", "epoch 1", "epoch 2"):
        assert text in done.message


def test_without_json_stdout_is_empty(cli, tmp_path):
    out = tmp_path / "run"
    done = cli("train", "digits.student.resnet8", *cli.FAST, "--max-steps", 1, "--out", out)
    assert (done.code, done.out) == (0, "")
    last = cli.metrics(out)[-1]["last"]["top1"]
    assert f"last epoch {last:.2f} %" in done.message
    assert "student.safetensors" in done.message
    assert "report.html" in done.message


def test_max_steps_ends_the_run(cli, tmp_path):
    out = tmp_path / "run"
    done = cli("train", "digits.student.resnet8", *cli.FAST, "--max-steps", 3, "--out", out, "--json")
    assert done.json()["step"] == 3
    assert [line["step"] for line in cli.metrics(out) if line["kind"] == "eval"] == [2, 3]


def test_ema_is_evaluated_and_saved(cli, tmp_path):
    out = tmp_path / "run"
    argv = ("train", "digits.student.resnet8", *cli.FAST, "--max-steps", 2, "--ema", 0.5, "--json")
    done = cli(*argv, "--out", out)
    last = next(line for line in cli.metrics(out) if line["kind"] == "eval")
    assert done.json()["last"]["ema_top1"] == last["ema"]["top1"]
    assert last["ema"]["loss"] != last["loss"]
    average, student = load_file(out / "ema_student.safetensors"), load_file(out / "student.safetensors")
    assert average.keys() == student.keys()
    assert not torch.equal(average["conv1.weight"], student["conv1.weight"])


def test_a_real_process(cli, tmp_path):
    """As a user calls it: nothing but JSON on stdout, whatever libraries print; a default run folder."""
    argv = [sys.executable, "-m", "mdistiller", "train", "digits.student.resnet8", *cli.FAST]
    done = subprocess.run(
        [*argv, "--max-steps", "1", "--json"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["step"] == 1
    assert found["out"] == "runs/digits.student.resnet8-s0"
    assert (tmp_path / found["out"] / "report.html").is_file()
    assert "epoch" in done.stderr
    env = json.loads((tmp_path / found["out"] / "env.json").read_text())
    assert env["command"][1:3] == ["train", "digits.student.resnet8"]


# Run folders


def test_default_folders_are_numbered(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ("train", "digits.student.resnet8", *cli.FAST, "--max-steps", 1, "--json")
    names = [cli(*argv).json()["out"] for _ in range(3)]
    names.append(cli(*argv, "--seed", 7).json()["out"])
    first = "runs/digits.student.resnet8-s0"
    assert names == [first, f"{first}-2", f"{first}-3", "runs/digits.student.resnet8-s7"]
    assert all((tmp_path / name / "student.safetensors").is_file() for name in names)


def test_slash_in_a_models_name_makes_no_folder_of_its_own(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = cli("train", "digits.student.timm/test_resnet", *cli.FAST, "--max-steps", 1, "--json")
    assert done.json()["out"] == "runs/digits.student.timm-test_resnet-s0"


def test_a_folder_with_a_run_is_refused_and_stays(cli, student_run):
    before = cli.contents(student_run)
    done = cli("train", "digits.student.resnet8", *cli.FAST, "--max-steps", 1, "--out", student_run)
    assert (done.code, done.out) == (2, "")
    assert f"{student_run} holds a run already" in done.message
    assert f"mdistiller train {student_run / 'config.json'} --resume" in done.message
    assert cli.contents(student_run) == before


def test_a_failing_start_leaves_no_folder(cli, tmp_path):
    out = tmp_path / "run"
    argv = ("train", "digits.dkd.resnet8_resnet8", *cli.FAST, "--out", out, "--max-steps", 1)
    assert cli(*argv).code == 2
    assert cli(*argv, "--teacher.checkpoint", tmp_path / "nowhere.pt").code == 1
    assert not out.exists()


# Repeating


def test_the_same_student_gives_the_same_file(tmp_path):
    model = create_model("resnet8", 4)
    for i in range(5):
        save_student(tmp_path / f"{i}.safetensors", model, {"model": "resnet8", "a": "b", "c": "d", "e": "f"})
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_config_json_repeats_the_run(cli, student_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = cli.contents(student_run)
    done = cli("train", student_run / "config.json", "--json")
    found = done.json()
    again = tmp_path / found["out"]
    assert found["out"] == "runs/digits.dkd.resnet8_resnet8-s3"
    assert same_weights(again, student_run)
    assert cli.timeless(again) == cli.timeless(student_run)
    assert cli.contents(student_run) == before
    # Its own config differs in the folder alone.
    assert cli.config(again) | {"out": ""} == cli.config(student_run) | {"out": ""}


@pytest.mark.parametrize(
    "flags",
    [
        ("--seed", 4),
        ("--method.beta", 2),
        ("--data.seed", 1),
        ("--optim.lr", 0.01),
        ("--augment.padding", 1),
        ("--data.label-noise", 0.5),
        ("--student.name", "resnet14"),
    ],
    ids=str,
)
def test_a_changed_field_changes_the_run(cli, student_run, tmp_path, flags):
    """So the bit-identical repetition above says something."""
    out = tmp_path / "run"
    done = cli("train", student_run / "config.json", *flags, "--out", out)
    assert done.code == 0, done.err
    assert not same_weights(out, student_run)


def test_the_students_start_does_not_depend_on_the_method(cli, student_run, tmp_path):
    """With no learning rate to speak of, every method leaves the student where it started."""
    starts = []
    for method in ("none", "kd", "dkd"):
        out = tmp_path / method
        argv = ("--method", method, "--max-steps", 1, "--optim.lr", 1e-30, "--out", out)
        assert cli("train", student_run / "config.json", *argv).code == 0
        starts.append(load_file(out / "student.safetensors"))
    for other in starts[1:]:
        assert all(torch.allclose(value, other[key], rtol=0, atol=1e-20) for key, value in starts[0].items())


# Resuming


class Interrupt(Reporter):
    """A user who presses ^C: after some evaluation, or at some step."""

    def __init__(self, epoch: int | None = None, step: int | None = None) -> None:
        self.at_epoch, self.at_step = epoch, step

    def step(self, done: int) -> None:
        if done == self.at_step:
            raise KeyboardInterrupt

    def evaluated(self, line) -> None:
        if line["epoch"] == self.at_epoch:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("stop", "flags"),
    [
        (Interrupt(epoch=1), ()),
        (Interrupt(step=4), ()),  # within the second epoch, whose lines are there already
        (Interrupt(epoch=1), ("--ema", "0.9")),
        (
            Interrupt(epoch=1),
            ("--optim.name", "adamw", "--augment.mixup-alpha", "1", "--data.memory", "stream"),
        ),
    ],
    ids=["epoch", "step", "ema", "adamw"],
)
def test_a_resumed_run_equals_one_without_interruption(cli, teacher_run, tmp_path, monkeypatch, stop, flags):
    monkeypatch.setattr(metrics, "FLUSH_SECONDS", 0.0)
    argv = (
        *("train", "digits.dkd.resnet8_resnet8", *cli.FAST, "--epochs", 2, "--data.workers", 0, *flags),
        *("--teacher.checkpoint", teacher_run),
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli(*argv, "--out", whole).code == 0
    with monkeypatch.context() as patch:
        patch.setattr(train_command, "PlannedDisplay", lambda: stop)
        done = cli(*argv, "--out", parts)
    assert (done.code, done.out, done.message) == (1, "", "mdistiller: interrupted")
    lines = cli.metrics(parts)
    assert [line["kind"] for line in lines].count("eval") == 1
    if stop.at_step:
        assert lines[-1]["step"] == 4  # behind the saved state
    done = cli("train", parts / "config.json", "--resume", "--json")
    assert done.json()["out"] == str(parts)
    assert same_weights(parts, whole)
    if "--ema" in flags:
        assert same_weights(parts, whole, "ema_student.safetensors")
    assert cli.timeless(parts) == cli.timeless(whole)
    assert cli.config(parts) | {"out": ""} == cli.config(whole) | {"out": ""}


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_resuming_at_another_precision_warns(cli, tmp_path, monkeypatch, precision):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train_command, "PlannedDisplay", lambda: Interrupt(epoch=1))
        assert cli("train", "digits.student.resnet8", *cli.FAST, "--epochs", 2, "--out", out).code == 1
    refused = cli("train", out, "--resume", "--precision", precision, "--seed", 7)
    assert (refused.code, "cannot resume" in refused.message) == (2, True)
    with pytest.warns(UserWarning, match=f"precision: .* started with float32 and resumes with {precision}"):
        done = cli("train", out, "--resume", "--precision", precision, "--json")
    assert done.json()["epochs"] == 2


def test_resuming_a_finished_run_changes_nothing(cli, student_run, tmp_path):
    out = tmp_path / "run"
    done = cli("train", student_run / "config.json", "--out", out, "--json")
    before = cli.contents(out)
    again = cli("train", out / "config.json", "--resume", "--json")
    assert "finished before, so nothing is trained" not in done.message
    assert "finished before, so nothing is trained" in again.message
    assert again.json() == done.json()
    after = cli.contents(out)
    for name in ("student.safetensors", "metrics.jsonl", "config.json", "resume.pt"):
        assert after[name][0] == before[name][0], name


def test_a_run_folder_stands_for_its_config(cli, student_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = cli("train", student_run, "--json")
    again = Path(done.json()["out"])
    assert again.parent == Path("runs")  # a folder of its own
    assert same_weights(again, student_run)
    assert cli("train", again, "--resume", "--json").json() == done.json()


def test_a_file_or_folder_that_is_no_run_is_2(cli, tmp_path):
    (tmp_path / "foo.py").write_text("")
    for path, words in (
        (tmp_path / "foo.py", "is a file; allowed: a recipe, a run folder, its config.json or a .yaml file"),
        (tmp_path, "is no run folder: it has no config.json"),
    ):
        done = cli("train", path, "--resume")
        assert (done.code, done.err) == (2, f"mdistiller: {path} {words}\n")


def left_behind(cli, student_run, out):
    """The run of `student_run` in `out`, as if it had been killed before anything was saved."""
    out.mkdir()
    config = cli.config(student_run) | {"out": str(out)}
    (out / "config.json").write_text(json.dumps(config))
    shutil.copy(student_run / "env.json", out)
    return (student_run / "resume.pt").read_bytes()


@pytest.mark.parametrize("damage", ["truncated", "nothing", "flipped"])
def test_resuming_with_a_damaged_state_alone_fails(cli, student_run, tmp_path, damage):
    state = left_behind(cli, student_run, tmp_path / "run")
    middle = len(state) // 2
    damaged = {
        "truncated": state[:middle],
        "nothing": b"",
        "flipped": state[:middle] + bytes([state[middle] ^ 1]) + state[middle + 1 :],
    }
    path = tmp_path / "run" / "resume.pt"
    path.write_bytes(damaged[damage])
    done = cli("train", tmp_path / "run" / "config.json", "--resume")
    assert (done.code, done.out) == (1, "")
    assert f"cannot resume: {path} is damaged" in done.message
    assert path.read_bytes() == damaged[damage]


def test_resuming_before_anything_was_saved_starts_anew(cli, student_run, tmp_path):
    left_behind(cli, student_run, tmp_path / "run")
    done = cli("train", tmp_path / "run" / "config.json", "--resume")
    assert done.code == 0
    ended, expected = (cli.contents(p)["student.safetensors"][0] for p in (tmp_path / "run", student_run))
    assert ended == expected


def test_a_damaged_state_falls_back_to_the_one_before(cli, student_run, tmp_path):
    out = tmp_path / "run"
    state = left_behind(cli, student_run, out)
    shutil.copy(student_run / "metrics.jsonl", out)
    (out / "resume.previous.pt").write_bytes(state)
    (out / "resume.pt").write_bytes(state[:100])
    with pytest.warns(UserWarning, match=r"resume\.pt is damaged .*going on from the state before"):
        done = cli("train", out / "config.json", "--resume")
    assert done.code == 0


# Plug-ins


def test_the_example_of_a_plugin(cli, teacher_run, tmp_path, monkeypatch, forget_plugins):
    monkeypatch.chdir(PLUGIN.parents[1])
    one, two = tmp_path / "one", tmp_path / "two"
    done = cli(
        *("train", "digits.my_cosine.resnet8_resnet8", "--plugin", "examples/my_method.py", *cli.FAST),
        *("--max-steps", 2, "--method.weight", 2, "--teacher.checkpoint", teacher_run, "--out", one),
    )
    assert done.code == 0, done.err
    config = cli.config(one)
    assert config["method"] == {**{"name": "my_cosine", "task_weight": 1.0, "weight": 2.0}}
    assert config["plugins"] == [str(PLUGIN)]
    line = cli.metrics(one)[0]
    assert 0 < line["cosine"] <= 4
    assert line["loss"] == pytest.approx(line["task"] + line["cosine"], rel=1e-5)
    # The config names the plug-in, which runs only if the command names it too.
    monkeypatch.chdir(tmp_path)
    forget_plugins()
    assert "my_cosine" not in list_methods()
    without = cli("train", one / "config.json", "--out", two)
    assert (without.code, f"give --plugin {PLUGIN}" in without.message) == (2, True)
    assert cli("train", one / "config.json", "--plugin", PLUGIN, "--out", two).code == 0
    assert same_weights(one, two)


@pytest.mark.usefixtures("forget_plugins")
def test_two_plugins_with_a_method_and_a_model(cli, teacher_run, tmp_path):
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n"
        "from mdistiller.models import register_model\n"
        "def net_of_cli_test(num_classes, width=4):\n"
        "    body = [nn.Conv2d(3, width, 3, stride=4), nn.AdaptiveAvgPool2d(1), nn.Flatten()]\n"
        "    return nn.Sequential(*body, nn.Linear(width, num_classes))\n"
        "try:\n    register_model(net_of_cli_test)\nexcept ValueError:\n    pass\n"
    )
    out = tmp_path / "run"
    done = cli(
        *("train", "digits.my_cosine.resnet8_net_of_cli_test", *cli.FAST, "--max-steps", 1, "--out", out),
        *("--plugin", PLUGIN, "--plugin", tmp_path / "nets.py", "--student.options", "width", 6),
        *("--teacher.checkpoint", teacher_run),
    )
    assert done.code == 0, done.err
    assert cli.config(out)["student"]["options"] == {"width": 6}
    assert len(cli.config(out)["plugins"]) == 2
    assert math.prod(load_file(out / "student.safetensors")["0.weight"].shape) == 6 * 3 * 9


TASK = """
from typing import Literal
from mdistiller.tasks.classification import ClassificationConfig, ClassificationTask
from mdistiller.training.task import register_task
class Config(ClassificationConfig):
    task: Literal["task_of_cli_test"] = "task_of_cli_test"
class Toy(ClassificationTask):
    name = "task_of_cli_test"
register_task(Toy())
Toy.Config = Config
"""


def test_a_plugin_with_a_task(cli, tmp_path, forget_plugins):
    """The config of a run names its task and the plug-in that registers it."""
    (tmp_path / "plugin.py").write_text(TASK)
    values = {
        "task": "task_of_cli_test",
        "student": {"name": "resnet8"},
        "plugins": [str(tmp_path / "plugin.py")],
    }
    (tmp_path / "toy.json").write_text(json.dumps(values))
    out = tmp_path / "run"
    plugin = ("--plugin", tmp_path / "plugin.py")
    done = cli("train", tmp_path / "toy.json", *plugin, *cli.FAST, "--max-steps", 2, "--out", out, "--json")
    assert done.code == 0, done.err
    assert cli.config(out)["task"] == "task_of_cli_test"
    task._TASKS.pop("task_of_cli_test")
    forget_plugins()
    for command in ("eval", "export"):
        without = cli(command, out)
        assert (without.code, without.out) == (2, "")
        assert "unknown task 'task_of_cli_test'" in without.message
        assert f"give --plugin {tmp_path / 'plugin.py'}" in without.message
    again = cli("train", out, "--resume", "--json", *plugin)
    assert again.json() == done.json()
    found = cli("eval", out, "--device", "cpu", "--json").json()
    assert found["top1"] == done.json()["last"]["top1"]


@pytest.mark.usefixtures("forget_plugins")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no such Python file"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def broken(:", "SyntaxError"),
        ("import mdistiller.no_such_thing", "ModuleNotFoundError"),
    ],
)
def test_a_plugin_that_fails(cli, tmp_path, text, said):
    path = tmp_path / "bad.py"
    if text is not None:
        path.write_text(text)
    done = cli("train", "digits.student.resnet8", "--plugin", path)
    assert (done.code, done.out) == (2, "")
    assert str(path) in done.message
    assert said in done.message
    assert "Traceback" not in done.err
