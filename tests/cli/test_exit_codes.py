"""Exit codes 0, 1 and 2; every failure is one message that says what, got, and allowed or nearest."""

from __future__ import annotations

import subprocess
import sys
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from mdistiller.cli.main import COMMANDS, find_command, main
from mdistiller.cli.options import Command
from mdistiller.errors import DataError
from mdistiller.training import launch
from mdistiller.training.distributed import World

STUDENT = ("train", "digits.student.resnet8")
PAIR = ("train", "digits.dkd.resnet20_resnet8")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(cli, code: int, *argv: object) -> str:
    """The one message of a command that fails; nothing on stdout and no run folder."""
    done = cli(*argv)
    assert done.code == code, done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    assert done.err.startswith("mdistiller: ")
    assert done.err.count("\n") == 1, done.err
    return done.message


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        # command
        (("trian", "x"), ["unknown command 'trian'", "nearest: train"]),
        (("Train",), ["unknown command 'Train'", "nearest: train"]),
        (("--verbose",), ["unknown command '--verbose'", "--help"]),
        # recipe
        (("train",), ["needs a recipe"]),
        (("train", "--epochs", "3"), ["needs a recipe"]),
        (
            ("train", "cifar1000.dkd.resnet56_resnet20"),
            ["cifar1000.", "nearest: cifar100.dkd.resnet56_resnet20"],
        ),
        (("train", "cifar100.dkdd.resnet56_resnet20"), ["unknown method 'dkdd'", "nearest: dkd"]),
        (("train", "cifar100.dkd.resnet56_resnet21"), ["unknown student 'resnet21'", "resnet20"]),
        (("train", "digits.student.resnet7"), ["unknown model 'resnet7'", "resnet8"]),
        (("train", "digits.kd"), ["'digits.kd'", "digits.METHOD.TEACHER_STUDENT"]),
        (("train", "nowhere.json"), ["cannot read nowhere.json", "No such file"]),
        # method
        ((*STUDENT, "--method", "kdd"), ["unknown method 'kdd'", "nearest: kd"]),
        ((*STUDENT, "--method", "kd"), ["trains one model on the labels", "digits.kd.TEACHER_STUDENT"]),
        ((*PAIR, "--method", "none"), ["'none' takes no teacher", "digits.student.MODEL"]),
        (("train", "digits.dot-kd.resnet20_resnet8"), ["'dot-kd'", "--optim.name dot"]),
        ((*PAIR, "--method", "dot"), ["'dot'", "DOT is an optimizer", "--optim.name dot"]),
        ((*STUDENT, "--method"), ["--method: got no value"]),
        ((*STUDENT, "--plugin"), ["--plugin: got no value"]),
        # flag
        ((*STUDENT, "--epoch", "3"), ["--epoch", "Perhaps you meant", "--epochs INT"]),
        ((*STUDENT, "--optim.learning-rate", "3"), ["Perhaps you meant --optim.lr FLOAT"]),
        ((*STUDENT, "--lr", "3"), ["Perhaps you meant --optim.lr FLOAT"]),
        ((*PAIR, "--beta", "3"), ["Perhaps you meant --method.beta FLOAT"]),
        ((*STUDENT, "--halp"), ["Perhaps you meant --help"]),
        ((*STUDENT, "--precision", "fp16"), ["allowed: 'auto'", "Perhaps you meant 'float16'"]),
        ((*STUDENT, "--data.trainlimit", "3"), ["--data.trainlimit", "--data.train-limit INT|None"]),
        ((*STUDENT, "--method.beta", "3"), ["--method.beta"]),  # DKD's, not that of `none`
        ((*PAIR, "--method", "kd", "--method.beta", "3"), ["--method.beta"]),
        ((*STUDENT, "extra"), ["extra"]),
        ((*STUDENT, "--epochs"), ["--epochs: got no value; allowed: INT"]),
        # value
        ((*STUDENT, "--epochs", "many"), ["--epochs", "'many'", "INT"]),
        ((*STUDENT, "--optim.lr", "fast"), ["--optim.lr", "'fast'"]),
        ((*STUDENT, "--data.kind", "cifar"), ["--data.kind", "'cifar'", "nearest: cifar10"]),
        ((*STUDENT, "--optim.name", "adam"), ["--optim.name", "'adam'", "'adamw'"]),
        ((*STUDENT, "--optim.lr", "-1"), ["lr", "greater than 0", "-1.0"]),
        ((*STUDENT, "--data.label-noise", "2"), ["--data.label-noise: ", "less than or equal to 1", "2.0"]),
        ((*STUDENT, "--optim.milestones", "0.6", "0.3"), ["milestones", "rising fractions", "(0.6, 0.3)"]),
        ((*PAIR, "--method.temperature", "0"), ["temperature", "greater than 0", "0.0"]),
        ((*PAIR, "--method.temperature=inf"), ["--method.temperature: ", "finite number", "inf"]),
        ((*STUDENT, "--optim.lr=inf"), ["--optim.lr: ", "finite number", "inf"]),
        ((*STUDENT, "--data.label-noise=nan"), ["--data.label-noise: ", "finite number", "nan"]),
        ((*STUDENT, "--student.options", "width", "3"), ["'resnet8'", "width", "its options: none"]),
        (
            (*STUDENT, "--student.options", "num_classes", "1000"),
            ["--student.options: num_classes is no option", "as many classes as the data"],
        ),
        (
            ("eval", "resnet8", "--checkpoint", "x", "--options", "num_classes", "9"),
            ["--options: num_classes is no option"],
        ),
        (
            (*STUDENT, "--data.mean", "0.5", "0.5", "0.5", "--data.std", "1", "0", "1"),
            ["--data.std.1", "greater than 0"],
        ),
        ((*STUDENT, "--student.name", "resnet7"), ["unknown model 'resnet7'", "resnet8"]),
        # teacher and device
        (PAIR, ["teacher.checkpoint", "resnet20 has no weights", "--teacher.checkpoint FILE"]),
        ((*STUDENT, "--device", "gpu"), ["device: got 'gpu'", "allowed: auto, cpu, cuda, cuda:N, mps"]),
        ((*STUDENT, "--device", "mps"), ["device: got 'mps'", "no such GPU"]),
        ((*STUDENT, "--device", "cuda:99"), ["device: got 'cuda:99'", "GPUs are visible"]),
        ((*STUDENT, "--resume"), ["no run folder to resume"]),
        # other commands
        (("eval",), ["--checkpoint"]),
        (("eval", "resnet8"), ["--checkpoint"]),
        (("eval", "resnet7", "--checkpoint", "x", "--data.kind", "synthetic"), ["'resnet7'", "resnet8"]),
        (
            ("eval", "resnet8", "--checkpoint", "x", "--precision", "half"),
            ["--precision", "'half'", "float16"],
        ),
        (("eval", "resnet8", "--checkpoint", "x", "--device", "cuda:99"), ["device: got 'cuda:99'"]),
        (("list",), ["'methods', 'models', 'recipes'"]),
        (("list", "model"), ["'model'", "Perhaps you meant 'models'"]),
        (("report",), ["at least one run"]),
        (("quickstart", "--seeds", "0"), ["seeds: got 0", "allowed: 1 or more"]),
        (("quickstart", "--seeds", "few"), ["--seeds", "'few'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_usage_is_2(cli, tmp_path, argv, said):
    message = refused(cli, 2, *argv)
    for text in said:
        assert text in message, message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--epochs", "0", ["epochs", "greater than or equal to 1", "0"]),
        ("--batch-size", "0", ["--batch-size: ", "greater than or equal to 1"]),
        ("--max-steps", "-1", ["--max-steps: ", "greater than or equal to 1", "-1"]),
        ("--seed", "-1", ["seed", "greater than or equal to 0", "-1"]),
        ("--ema", "1", ["ema", "less than 1", "1"]),
        ("--optim.accumulate", "65", ["optim.accumulate", "65 parts", "64"]),
    ],
)
def test_a_field_of_the_run_out_of_range_is_2(cli, flag, value, said):
    message = refused(cli, 2, *STUDENT, flag, value)
    for text in said:
        assert text in message, message


@pytest.mark.parametrize(
    "words",
    [
        ("predict", "LONG", "image.png"),
        ("predict", "resnet8", "LONG"),
        ("export", "LONG"),
        ("report", "LONG"),
        ("sweep", "digits.student.resnet8", "--out", "LONG"),
    ],
    ids=" ".join,
)
def test_a_name_too_long_for_the_file_system_is_2(cli, words):
    done = cli(*(word.replace("LONG", "x" * 5000) for word in words))
    assert (done.code, done.out) == (2, ""), done.err
    assert "xxx' is too long a name for the file system" in done.message
    assert len(done.message) < 200


def test_no_command_is_2(cli):
    done = cli()
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("usage: mdistiller COMMAND")


def test_a_gpu_that_is_not_there_is_2(cli, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    message = refused(cli, 2, *STUDENT, *cli.FAST, "--device", "cuda")
    assert "device: got 'cuda', but 0 GPUs are visible here" in message


def test_a_batch_that_does_not_divide_is_2(cli, monkeypatch):
    two = World(torch.device("cpu"), 0, 2)
    monkeypatch.setattr(launch, "process_group", lambda device: nullcontext(two))
    message = refused(cli, 2, *STUDENT, *cli.FAST, "--batch-size", 33, "--out", "run")
    assert "batch_size: 33 does not divide among 2 processes" in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", ["mine.json", "Expecting"]),
        ("[]", ["mine.json"]),
        ('{"epochs": 3}', ["mine.json", "student", "required"]),
        (
            '{"student": {"name": "resnet8"}, "epoch": 3}',
            ["epoch:", "unknown field; nearest: epochs", "got 3"],
        ),
        ('{"student": {"name": "resnet8"}, "epochs": 0}', ["epochs:", "greater than or equal to 1", "got 0"]),
        ('{"student": {"name": "resnet8"}, "optim": {"lr": "x"}}', ["optim.lr:", "valid number", "got 'x'"]),
        ('{"student": {"name": "resnet8"}, "method": {"name": "kdd"}}', ["unknown method 'kdd'", "kd"]),
        (
            '{"student": {"name": "resnet8"}, "method": {"name": "kd", "beta": 1}}',
            ["beta: unknown field; known: task_weight"],
        ),
        (
            '{"student": {"name": "resnet8"}, "plugins": ["gone.py"]}',
            ["mine.json: plugins:", "give --plugin gone.py"],
        ),
    ],
)
def test_a_wrong_config_json_is_2(cli, tmp_path, text, said):
    (tmp_path / "mine.json").write_text(text)
    message = refused(cli, 2, "train", "mine.json")
    for part in said:
        assert part in message, message


def test_missing_data_is_1(cli, tmp_path):
    argv = ("--data.root", "nowhere", "--data.no-download", "--device", "cpu")
    (tmp_path / "x").touch()
    for command in (("train", "cifar100.student.resnet8"), ("eval", "resnet8", "--checkpoint", "x")):
        message = refused(cli, 1, *command, *argv)
        assert "CIFAR-100 not found" in message
        assert "nowhere/cifar-100-python" in message
        assert "--data.download" in message  # both ways to get it
        assert "cifar-100-python.tar.gz" in message
    message = refused(cli, 1, "train", "folder.student.resnet8", *argv)
    assert "nowhere" in message


def test_eval_looks_at_model_and_checkpoint_before_the_data(cli):
    argv = ("--data.root", "nowhere", "--data.no-download", "--device", "cpu")
    assert "nearest: resnet8" in refused(cli, 2, "eval", "resnett8", "--checkpoint", "x", *argv)
    assert "no such checkpoint: x" in refused(cli, 1, "eval", "resnet8", "--checkpoint", "x", *argv)


def test_a_folder_that_cannot_be_written_is_2(cli, tmp_path):
    (tmp_path / "file").touch()
    message = refused(cli, 2, "train", "digits.student.resnet8", "--out", tmp_path / "file" / "run")
    assert "out: cannot write to" in message


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "truncated", "other"])
def test_a_wrong_checkpoint_is_1(cli, teacher_run, tmp_path, kind):
    path = tmp_path / "t.safetensors"
    whole = (teacher_run / "student.safetensors").read_bytes()
    if kind == "other":
        path = teacher_run
    elif kind != "missing":
        path.write_bytes({"empty": b"", "text": b"hello", "truncated": whole[:5000]}[kind])
    argv = ("--teacher.checkpoint", path, "--out", tmp_path / "run")
    model = "resnet20" if kind == "other" else "resnet8"
    message = refused(cli, 1, "train", f"digits.kd.{model}_resnet8", *cli.FAST, *argv)
    assert str(path) in message
    assert ("no such checkpoint" in message) == (kind == "missing")
    assert (f"{path} holds a resnet8; you asked for resnet20: " in message) == (kind == "other")
    assert refused(cli, 1, "eval", model, *cli.DATA, "--checkpoint", path) == message


def test_a_loss_that_is_not_finite_is_1(cli, tmp_path):
    done = cli(*STUDENT, *cli.FAST, "--optim.lr", "1e30", "--epochs", "3", "--out", tmp_path / "run")
    assert (done.code, done.out) == (1, "")
    assert "mdistiller: a loss is not finite: first in step" in done.message
    assert "Traceback" not in done.err


def test_an_interrupt_is_1(cli, monkeypatch):
    def interrupted(command):
        raise KeyboardInterrupt

    monkeypatch.setattr("mdistiller.cli.list.ListCommand.execute", interrupted)
    assert refused(cli, 1, "list", "methods") == "mdistiller: interrupted"


def test_a_warning_is_one_line_and_shown_once(monkeypatch, capsys):
    monkeypatch.setattr("mdistiller.cli.main.COMMANDS", ("warn",))
    monkeypatch.setitem(sys.modules, "mdistiller.cli.warn", SimpleNamespace(WarnCommand=WarnCommand))
    monkeypatch.setattr(sys, "argv", ["mdistiller", "warn"])
    usual = []
    with warnings.catch_warnings():  # puts `showwarning` back, too
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *where: usual.append(str(message))
        with pytest.raises(SystemExit) as end:
            main()
    assert end.value.code == 0
    out = capsys.readouterr()
    assert out.err == "mdistiller: warning: one image\nmdistiller: warning: two images\n"
    assert (out.out, usual) == ("", ["of a library"])


class WarnCommand(Command):
    """Warns."""

    def execute(self):
        for message in ("one image", "two images", "one image"):
            warnings.warn(message, stacklevel=1)
        warnings.warn("of a library", DeprecationWarning, stacklevel=1)


def test_a_bug_is_not_hidden(cli, monkeypatch):
    """What is not raised on purpose keeps its traceback; what is, does not."""

    def fails(error):
        def run(command):
            raise error

        return run

    monkeypatch.setattr("mdistiller.cli.list.ListCommand.execute", fails(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli("list", "methods")
    monkeypatch.setattr("mdistiller.cli.list.ListCommand.execute", fails(DataError("no disk")))
    assert refused(cli, 1, "list", "methods") == "mdistiller: no disk"


@pytest.mark.parametrize("command", COMMANDS)
def test_one_switch_shows_the_traceback_of_an_error_in_every_command(cli, monkeypatch, command):
    def fails(argv):
        raise DataError("no disk")

    monkeypatch.setattr(find_command(command), "parse", fails)
    assert refused(cli, 1, command) == "mdistiller: no disk"
    monkeypatch.setenv("MDISTILLER_TRACEBACK", "1")
    done = cli(command)
    assert done.code == 1
    assert done.err.startswith("Traceback (most recent call last):")
    assert 'raise DataError("no disk")' in done.err
    assert done.err.endswith("\nmdistiller: no disk\n")
    monkeypatch.setenv("MDISTILLER_TRACEBACK", "0")
    assert refused(cli, 1, command) == "mdistiller: no disk"


def test_exit_code_of_a_real_process(tmp_path):
    argv = [sys.executable, "-m", "mdistiller", "train", "digits.kd.resnet20_resnet9"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "unknown student 'resnet9'; nearest: resnet8" in done.stderr
