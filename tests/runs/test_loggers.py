"""TensorBoard and Weights & Biases: what they get, and that none of it can end a run."""

import json
import os
import struct
import sys
from collections import defaultdict

import pytest
from processes import mdistiller, run_group
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from mdistiller.cli.main import run as run_command
from mdistiller.cli.train import parse
from mdistiller.config import OptimConfig
from mdistiller.data import AugmentConfig, DataConfig
from mdistiller.errors import TrainingError
from mdistiller.models import ModelConfig
from mdistiller.runs import loggers
from mdistiller.runs.folder import read_metrics
from mdistiller.runs.progress import Silent
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.training import metrics
from mdistiller.training.launch import train

CLOCK = ("seconds", "ms_per_step")


def config(**changes):
    settings = {
        "data": DataConfig(kind="synthetic", synthetic_samples=96, synthetic_classes=4, image_size=16),
        "augment": AugmentConfig(padding=2),
        "student": ModelConfig(name="resnet8"),
        "optim": OptimConfig(lr=0.05, schedule="cosine"),
        "epochs": 2,
        "ema": 0.9,
        "batch_size": 32,
        "log_every": 2,
        "device": "cpu",
    }
    return ClassificationConfig(**(settings | changes))


class StopError(Exception):
    pass


class StopAt(Silent):
    def __init__(self, step):
        self.at = step

    def step(self, done):
        if done == self.at:
            raise StopError


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run without loggers."""
    return train(config(out=tmp_path_factory.mktemp("plain") / "run"))


@pytest.fixture(scope="module", autouse=True)
def _wandb_offline(tmp_path_factory):
    """Nothing leaves the machine; the process that writes W&B's files ends with the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


def timeless(values):
    """Less what a clock measured."""
    return {k: timeless(v) if isinstance(v, dict) else v for k, v in values.items() if k not in CLOCK}


def assert_same_run(result, plain):
    """The same student bit by bit, the same figures."""
    assert timeless(result.summary) == timeless(plain.summary)
    assert [*map(timeless, read_metrics(result.path))] == [*map(timeless, read_metrics(plain.path))]
    for name in ("student.safetensors", "ema_student.safetensors"):
        assert (result.path / name).read_bytes() == (plain.path / name).read_bytes()


def series(folder):
    """All figures of metrics.jsonl: {name: [(step, value), …]}."""
    found = defaultdict(list)

    def add(name, step, value):
        if isinstance(value, dict):
            for key, inner in value.items():
                add(f"{name}/{key}", step, inner)
        else:
            found[name].append((step, pytest.approx(value, rel=1e-6)))

    for line in read_metrics(folder):
        for key in line.keys() - {"kind", "step"}:
            add(f"{line['kind']}/{key}", line["step"], line[key])
    assert {"train/loss", "train/lr", "eval/top1", "eval/ema/top1", "summary/best/epoch"} <= found.keys()
    return dict(found)


def tensorboard(folder):
    """The scalars that TensorBoard shows, and its hyper-parameters."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    stored = events.PluginTagToContent("hparams")
    parameters = HParamsPluginData.FromString(stored["_hparams_/session_start_info"])
    ended = "_hparams_/session_end_info" in stored
    return scalars, parameters.session_start_info.hparams, ended


def wandb_records(file):
    """The records of a .wandb file: blocks of 32 KiB, as LevelDB's log has them, after seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # all of a record, or its last part
            yield Record.FromString(whole)
            whole = b""


def wandb_run(folder):
    """Rows of the history, config and exit code in one folder of an offline run."""
    (file,) = folder.glob("*.wandb")
    found, settings, code = defaultdict(list), {}, None
    for record in wandb_records(file):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            step = row.pop("step")
            for name, value in row.items():
                if not name.startswith("_"):
                    found[name].append((step, value))
        elif kind == "run":
            settings |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
        elif kind == "exit":
            code = record.exit.exit_code
    return dict(found), settings, code


# What is written


def test_tensorboard_has_every_figure_and_the_config(tmp_path, plain):
    result = train(config(log=("tensorboard",), out=tmp_path / "run"))
    assert_same_run(result, plain)
    scalars, parameters, ended = tensorboard(result.path)
    assert scalars == series(result.path)
    assert parameters["optim.lr"].number_value == 0.05
    assert parameters["student.name"].string_value == "resnet8"
    assert parameters["log"].string_value == '["tensorboard"]'
    assert ended


def test_wandb_has_every_figure_and_the_config(tmp_path, plain):
    result = train(config(log=("wandb",), out=tmp_path / "run"))
    assert_same_run(result, plain)
    (folder,) = (result.path / "wandb").glob("offline-run-*")
    figures, settings, code = wandb_run(folder)
    assert figures == series(result.path)
    assert settings["optim"]["lr"] == 0.05
    assert settings["student"]["name"] == "resnet8"
    assert code == 0


def test_a_resumed_run_is_appended(tmp_path, plain, monkeypatch):
    monkeypatch.setattr(metrics, "FLUSH_SECONDS", 0.0)  # lines are written within an epoch
    c = config(log=("tensorboard", "wandb"), out=tmp_path / "run")
    with pytest.raises(StopError):
        train(c, reporter=StopAt(5))  # steps 4 and 5 are repeated below
    scalars, _, ended = tensorboard(c.out)
    assert [step for step, _ in scalars["train/loss"]] == [2, 3, 5]
    assert not ended
    (first,) = (c.out / "wandb").glob("offline-run-*")
    assert wandb_run(first)[2] == 1
    result = train(c, resume=True)
    assert_same_run(result, plain)
    scalars, _, ended = tensorboard(c.out)
    assert scalars == series(c.out)
    assert ended
    (second,) = set((c.out / "wandb").glob("offline-run-*")) - {first}
    assert second.name.split("-")[3] == first.name.split("-")[3]  # offline-run-TIME-ID
    before, after = wandb_run(first)[0], wandb_run(second)[0]
    assert before["train/loss"].pop()[0] == 5
    for name, values in series(c.out).items():
        kept = [(step, value) for step, value in before.get(name, []) if step <= 3]
        assert kept + after.get(name, []) == values


def test_a_logger_may_be_added_on_resume(tmp_path):
    c = config(out=tmp_path / "run")
    with pytest.raises(StopError):
        train(c, reporter=StopAt(4))
    train(c.model_copy(update={"log": ("tensorboard",)}), resume=True)
    assert [step for step, _ in tensorboard(c.out)[0]["eval/top1"]] == [6]


def test_a_run_that_fails_is_a_failed_one(tmp_path, capsys):
    c = config(
        log=("tensorboard", "wandb"), optim=OptimConfig(lr=1e30, schedule="constant"), out=tmp_path / "run"
    )
    with pytest.raises(TrainingError, match="not finite"):
        train(c)
    (folder,) = (c.out / "wandb").glob("offline-run-*")
    assert wandb_run(folder)[2] == 1
    assert not tensorboard(c.out)[2]
    assert "warning: log" not in capsys.readouterr().err


# Failures


def warnings_in(text):
    return [line for line in text.splitlines() if "warning: log" in line]


class Failing:
    """Raises where it is told to."""

    calls: list[str] = []  # noqa: RUF012
    where = ""

    def __init__(self, folder, config, resumed):
        self._do("start")

    def log(self, line):
        self._do(line["kind"])

    def close(self):
        self._do("close")

    def _do(self, what):
        self.calls.append(what)
        if what == self.where:
            raise RuntimeError("broken\npipe")


LINES = ["train", "train", "eval"] * 2


@pytest.mark.parametrize(
    ("where", "calls"),
    [
        ("start", ["start"]),
        ("train", ["start", "train", "close"]),
        ("eval", ["start", "train", "train", "eval", "close"]),
        ("summary", ["start", *LINES, "summary", "close"]),
        ("close", ["start", *LINES, "summary", "close"]),
    ],
)
def test_a_failing_logger_is_one_warning(tmp_path, plain, monkeypatch, capsys, where, calls):
    monkeypatch.setitem(loggers.LOGGERS, "wandb", Failing)
    monkeypatch.setattr(Failing, "calls", [])
    monkeypatch.setattr(Failing, "where", where)
    result = train(config(log=("wandb", "tensorboard"), out=tmp_path / "run"))
    assert_same_run(result, plain)
    assert Failing.calls == calls
    err = capsys.readouterr().err
    assert err == "mdistiller: warning: log: wandb is off, the run goes on; RuntimeError: broken pipe\n"
    assert tensorboard(result.path)[0] == series(result.path)  # the other one is still on


def test_what_fails_to_close_after_a_failure_is_no_second_warning(tmp_path, monkeypatch, capsys):
    class Broken(Failing):
        def _do(self, what):
            if what != "start":
                raise OSError(28, f"No space left at {what}")

    monkeypatch.setitem(loggers.LOGGERS, "wandb", Broken)
    train(config(log=("wandb",), epochs=1, out=tmp_path / "run"))
    assert warnings_in(capsys.readouterr().err) == [
        "mdistiller: warning: log: wandb is off, the run goes on; OSError: [Errno 28] No space left at train"
    ]


def test_a_place_that_cannot_be_written(tmp_path, plain, capsys):
    out = tmp_path / "run"
    out.mkdir()
    (out / "tensorboard").write_text("a file")
    (out / "wandb").write_text("a file")
    result = train(config(log=("tensorboard", "wandb"), out=out))
    assert_same_run(result, plain)
    first, second = warnings_in(capsys.readouterr().err)
    assert "log: tensorboard is off, the run goes on; FileExistsError" in first
    assert "log: wandb is off, the run goes on; FileExistsError" in second


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_disk_that_fills_up(tmp_path, plain, monkeypatch, capsys):
    write = loggers.TensorBoard.log

    def log(self, line):
        if line["kind"] == "eval":
            with open("/dev/full", "wb") as full:
                os.dup2(full.fileno(), self.records._writer.fileno())
        write(self, line)

    monkeypatch.setattr(loggers.TensorBoard, "log", log)
    result = train(config(log=("tensorboard",), out=tmp_path / "run"))
    assert_same_run(result, plain)
    (warning,) = capsys.readouterr().err.splitlines()
    assert "log: tensorboard is off, the run goes on; OSError: [Errno 28] No space left" in warning


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_package_that_is_not_installed(tmp_path, plain, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)
    result = train(config(log=(name,), out=tmp_path / "run"))
    assert_same_run(result, plain)
    assert capsys.readouterr().err == (
        f"mdistiller: warning: log: {name} is off, the run goes on; "
        f"it is not installed: pip install 'mdistiller[{name}]'\n"
    )
    assert not (result.path / name).exists()


# The command


def test_the_flag_may_be_given_again():
    assert parse(["digits.student.resnet8"]).config.log == ()
    argv = ["digits.student.resnet8", "--log", "tensorboard", "--log", "wandb"]
    assert parse(argv).config.log == ("tensorboard", "wandb")


def test_another_name_is_bad_usage(tmp_path, capsys):
    argv = ["train", "digits.student.resnet8", "--log", "tensorbord", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as end:
        run_command(argv)
    assert end.value.code == 2
    text = capsys.readouterr().err
    assert "tensorboard" in text
    assert "wandb" in text
    assert not (tmp_path / "run").exists()


def test_only_the_main_process_logs_and_stdout_is_the_summary_alone(tmp_path):
    out = tmp_path / "run"
    argv = ["train", "digits.student.resnet8", "--out", out, "--max-steps", "4", "--batch-size", "32"]
    argv += ["--data.train-limit", "64", "--data.test-limit", "50", "--json"]
    codes, (said, silence), errors = run_group(mdistiller, *argv, "--log", "tensorboard", "--log", "wandb")
    assert (codes, silence) == ([0, 0], ""), errors
    assert json.loads(said)["step"] == 4
    assert [warnings_in(err) for err in errors] == [[], []]
    assert len([*(out / "tensorboard").iterdir()]) == 1
    assert len([*(out / "wandb").glob("offline-run-*")]) == 1
    assert tensorboard(out)[0]["summary/last/top1"] == [(4, json.loads(said)["last"]["top1"])]
