"""TensorBoard, Weights & Biases and MLflow: what they get, and that none of it can end a run."""

import json
import os
import struct
import sys
import time
from collections import defaultdict

import pytest
from processes import mdistiller, run_group
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from mdistiller.cli.main import run as run_command
from mdistiller.cli.train import TrainCommand
from mdistiller.config import OptimConfig
from mdistiller.data import AugmentConfig, DataConfig
from mdistiller.errors import TrainingError
from mdistiller.models import ModelConfig
from mdistiller.recipes import get_recipe, recipe_of
from mdistiller.runs import loggers
from mdistiller.runs.folder import read_metrics
from mdistiller.runs.progress import Reporter
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


class StopAt(Reporter):
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
    """The charts of a run without a teacher, from metrics.jsonl: {name: [(step, value), …]}."""
    found = defaultdict(list)
    for line in read_metrics(folder):
        if line["kind"] == "train":
            values = {"metric/top1_train": "top1", "loss/total": "loss", "loss/learning_rate": "lr"}
        elif line["kind"] == "eval":
            values = {"metric/top1": "top1", "metric/best_top1": "best_top1"}
            values |= {"loss/test": "loss", "speed/ms_per_step": "ms_per_step"}
            found["metric/top1_ema"].append((line["step"], pytest.approx(line["ema"]["top1"])))
        else:
            break
        for name, key in values.items():
            found[name].append((line["step"], pytest.approx(line[key], rel=1e-6)))
    assert len(found) == 8
    return dict(found)


def mlflow_run(folder):
    """The charts of a run, its parameters and its status, in its files."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient((folder / "mlflow" / "store").as_uri())
    run = client.get_run((folder / "mlflow" / "run-id").read_text())
    charts = {
        name: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }
    return charts, run.data.params, run.info.status


# Fields of `config` that differ from the defaults; there is no recipe.
CHANGED = {
    "recipe": "",
    "data.kind": "synthetic",
    "data.synthetic_samples": 96,
    "data.synthetic_classes": 4,
    "data.image_size": 16,
    "augment.padding": 2,
    "optim.schedule": "cosine",
    "epochs": 2,
    "ema": 0.9,
    "batch_size": 32,
    "log_every": 2,
    "device": "cpu",
}


def tensorboard(folder):
    """The scalars that TensorBoard shows, and its hyperparameters."""
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
        if at + 7 + length > len(data):
            return  # half written
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # all of a record, or its last part
            yield Record.FromString(whole)
            whole = b""


def wandb_run(folder):
    """Rows of the history, config and exit code in one folder of an offline run that has ended.

    Another process writes them, the exit code last.
    """
    end = time.monotonic() + 60
    while (found := wandb_file(folder))[2] is None and time.monotonic() < end:
        time.sleep(0.05)
    return found


def wandb_file(folder):
    """What `wandb_run` returns, as far as it is written."""
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


def test_tensorboard_has_the_charts_and_what_differs_from_the_recipe(tmp_path, plain):
    result = train(config(log=("tensorboard",), out=tmp_path / "run"))
    assert_same_run(result, plain)
    scalars, parameters, ended = tensorboard(result.path)
    assert scalars == series(result.path)
    shown = {
        k: v.string_value if v.HasField("string_value") else v.number_value for k, v in parameters.items()
    }
    assert shown == CHANGED
    assert ended


def test_mlflow_has_the_charts_and_what_differs_from_the_recipe(tmp_path, plain):
    result = train(config(log=("mlflow",), out=tmp_path / "run"))
    assert_same_run(result, plain)
    charts, parameters, status = mlflow_run(result.path)
    assert charts == series(result.path)
    assert parameters == {name: str(value) for name, value in CHANGED.items()}
    assert status == "FINISHED"


def test_wandb_has_the_charts_and_what_differs_from_the_recipe(tmp_path, plain):
    result = train(config(log=("wandb",), out=tmp_path / "run"))
    assert_same_run(result, plain)
    (folder,) = (result.path / "wandb").glob("offline-run-*")
    figures, settings, code = wandb_run(folder)
    assert figures == series(result.path)
    assert {name: value for name, value in settings.items() if name != "_wandb"} == CHANGED
    assert code == 0


def test_hyper_parameters_are_those_that_differ_from_the_recipe(tmp_path):
    c = get_recipe("digits.dkd.resnet20_resnet8").replace(
        epochs=3, optim={"lr": 0.01}, method={"beta": 2.0}, log=("tensorboard",), out=tmp_path
    )
    changed = {"epochs": 3, "optim.lr": 0.01, "method.beta": 2.0}
    assert loggers.hyper_parameters(c, recipe_of(c)) == {"recipe": "digits.dkd.resnet20_resnet8", **changed}
    # The recipe of a pretrained student has the settings of fine-tuning.
    tuned = get_recipe("folder.kd.resnet20_resnet8", pretrained=True).replace(
        student={"checkpoint": tmp_path}
    )
    changed = {"student.checkpoint": str(tmp_path)}
    assert loggers.hyper_parameters(tuned, recipe_of(tuned)) == {"recipe": tuned.recipe, **changed}
    # Another method's fields, of another recipe or none.
    other = c.replace(method={"name": "kd", "temperature": 3.0}, recipe="")
    found = loggers.hyper_parameters(other, recipe_of(other))
    assert found.items() >= {"method.name": "kd", "method.temperature": 3.0}.items()


# Charts


def test_charts_of_a_distilled_run():
    """A train line and an eval line, with the values of a run that come in both."""
    train = {
        "kind": "train",
        "step": 5,
        "epoch": 1,
        "lr": 0.1,
        "task": 1.0,
        "dkd": 2.0,
        "loss": 3.0,
        "top1": 9.0,
    }
    test = {
        "p_t": 0.3,
        "gap": 0.1,
        "top1": 50.0,
        "teacher_top1": 72.0,
        "agreement": 48.0,
        "tckd": 2.4,
        "nckd": 3.0,
    }
    line = {"kind": "eval", "step": 6, "epoch": 1, "top1": 50.0, "top5": 90.0, "loss": 1.5, "macro_f1": 49.0}
    line |= {"classes": {"cat": 3.0}, "diagnostics": {"test": test, "train": test}, "train": {"loss": 3.0}}
    line |= {"ms_per_step": 7.0, "seconds": 8.0, "best_top1": 51.0}
    names = ("top1", "top5", "loss", "macro_f1")
    assert loggers.charted(train, names) == {
        "metric/top1_train": 9.0,
        "loss/total": 3.0,
        "loss/task": 1.0,
        "loss/dkd": 2.0,
        "loss/learning_rate": 0.1,
    }
    assert loggers.charted(line, names) == {
        "metric/top1": 50.0,
        "metric/best_top1": 51.0,
        "loss/test": 1.5,
        "transfer/agreement": 48.0,
        "transfer/tckd": 2.4,
        "transfer/nckd": 3.0,
        "speed/ms_per_step": 7.0,
    }
    detector = {
        "kind": "eval",
        "step": 6,
        "epoch": 1,
        "AP": 3.0,
        "AP50": 5.0,
        "best_AP": 3.0,
        "ms_per_step": 7.0,
    }
    shown = {"metric/AP": 3.0, "metric/best_AP": 3.0, "speed/ms_per_step": 7.0}
    assert loggers.charted(detector, ("AP", "AP50")) == shown


# Resuming and failing


def test_a_resumed_run_is_appended(tmp_path, plain, monkeypatch):
    monkeypatch.setattr(metrics, "FLUSH_SECONDS", 0.0)  # lines are written within an epoch
    c = config(log=("mlflow", "tensorboard", "wandb"), out=tmp_path / "run")
    with pytest.raises(StopError):
        train(c, reporter=StopAt(5))  # steps 4 and 5 are repeated below
    scalars, _, ended = tensorboard(c.out)
    assert [step for step, _ in scalars["loss/total"]] == [2, 3, 5]
    assert mlflow_run(c.out)[2] == "FAILED"
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
    assert before["loss/total"].pop()[0] == 5
    kept, _, status = mlflow_run(c.out)
    assert status == "FINISHED"
    assert [point[0] for point in kept["loss/total"]] == [2, 3, 5, 5, 6]  # the repeated step twice, as in W&B
    assert [point[0] for point in kept["loss/test"]] == [3, 6]
    for name, values in series(c.out).items():
        early = [(step, value) for step, value in before.get(name, []) if step <= 3]
        assert early + after.get(name, []) == values


def test_a_logger_may_be_added_on_resume(tmp_path):
    c = config(out=tmp_path / "run")
    with pytest.raises(StopError):
        train(c, reporter=StopAt(4))
    train(c.model_copy(update={"log": ("tensorboard",)}), resume=True)
    assert [step for step, _ in tensorboard(c.out)[0]["metric/top1"]] == [6]


def test_a_run_that_fails_is_a_failed_one(tmp_path, capsys):
    names = ("mlflow", "tensorboard", "wandb")
    c = config(log=names, optim=OptimConfig(lr=1e30, schedule="constant"), out=tmp_path / "run")
    with pytest.raises(TrainingError, match="not finite"):
        train(c)
    (folder,) = (c.out / "wandb").glob("offline-run-*")
    assert wandb_run(folder)[2] == 1
    assert not tensorboard(c.out)[2]
    assert mlflow_run(c.out)[2] == "FAILED"
    assert "warning: log" not in capsys.readouterr().err


# Failures


def warnings_in(text):
    return [line for line in text.splitlines() if "warning: log" in line]


class Failing:
    """Raises where it is told to."""

    calls: list[str] = []  # noqa: RUF012
    where = ""

    def __init__(self, folder, config, changed, resumed):
        self._do("start")

    def log(self, step, values):
        self._do(f"log {len(self.calls)}")

    def close(self, finished):
        self._do("close")

    def _do(self, what):
        self.calls.append(what)
        if what == self.where:
            raise RuntimeError("broken\npipe")


LINES = [f"log {i}" for i in range(1, 8)]  # two train lines and one of eval an epoch, and the summary


@pytest.mark.parametrize(
    ("where", "calls"),
    [
        ("start", ["start"]),
        ("log 1", ["start", *LINES[:1], "close"]),
        ("log 3", ["start", *LINES[:3], "close"]),
        ("log 7", ["start", *LINES, "close"]),
        ("close", ["start", *LINES, "close"]),
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
        "mdistiller: warning: log: wandb is off, the run goes on; OSError: [Errno 28] No space left at log 0"
    ]


def test_a_place_that_cannot_be_written(tmp_path, plain, capsys):
    out = tmp_path / "run"
    out.mkdir()
    (out / "tensorboard").write_text("a file")
    (out / "wandb").write_text("a file")
    (out / "mlflow").write_text("a file")
    result = train(config(log=("tensorboard", "wandb", "mlflow"), out=out))
    assert_same_run(result, plain)
    first, second, third = warnings_in(capsys.readouterr().err)
    assert "log: mlflow is off, the run goes on; " in third
    assert "log: tensorboard is off, the run goes on; FileExistsError" in first
    assert "log: wandb is off, the run goes on; FileExistsError" in second


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_disk_that_fills_up(tmp_path, plain, monkeypatch, capsys):
    write = loggers.TensorBoard.log

    def log(self, step, values):
        if "metric/top1" in values:
            with open("/dev/full", "wb") as full:
                os.dup2(full.fileno(), self.records._writer.fileno())
        write(self, step, values)

    monkeypatch.setattr(loggers.TensorBoard, "log", log)
    result = train(config(log=("tensorboard",), out=tmp_path / "run"))
    assert_same_run(result, plain)
    (warning,) = capsys.readouterr().err.splitlines()
    assert "log: tensorboard is off, the run goes on; OSError: [Errno 28] No space left" in warning


@pytest.mark.parametrize("name", ["mlflow", "tensorboard", "wandb"])
def test_a_package_that_is_not_installed(tmp_path, plain, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)
    result = train(config(log=(name,), out=tmp_path / "run"))
    assert_same_run(result, plain)
    package = {"mlflow": "mlflow-skinny"}.get(name, name)
    assert capsys.readouterr().err == (
        f"mdistiller: warning: log: {name} is off, the run goes on; "
        f"it is not installed: pip install {package}\n"
    )
    assert not (result.path / name).exists()


# The command


def test_the_flag_may_be_given_again():
    assert TrainCommand.parse(["digits.student.resnet8"]).config.log == ()
    argv = ["digits.student.resnet8", "--log", "tensorboard", "--log", "wandb"]
    assert TrainCommand.parse(argv).config.log == ("tensorboard", "wandb")


def test_another_name_is_bad_usage(tmp_path, capsys):
    argv = ["train", "digits.student.resnet8", "--log", "tensorbord", "--out", str(tmp_path / "run")]
    assert run_command(argv) == 2
    text = capsys.readouterr().err
    assert "tensorboard" in text
    assert "wandb" in text
    assert not (tmp_path / "run").exists()


def test_only_the_main_process_logs_and_stdout_is_the_summary_alone(tmp_path):
    out = tmp_path / "run"
    argv = ["train", "digits.student.resnet8", "--out", out, "--max-steps", "4", "--batch-size", "32"]
    argv += ["--data.train-limit", "64", "--data.test-limit", "50", "--json"]
    argv += ["--log", "tensorboard", "--log", "wandb"]
    # The server that forks may be older than these variables.
    env = {name: os.environ[name] for name in ("WANDB_MODE", "HOME")}
    codes, (said, silence), errors = run_group(mdistiller, *argv, env=env)
    assert (codes, silence) == ([0, 0], ""), errors
    assert json.loads(said)["step"] == 4
    assert [warnings_in(err) for err in errors] == [[], []]
    assert len([*(out / "tensorboard").iterdir()]) == 1
    assert len([*(out / "wandb").glob("offline-run-*")]) == 1
    assert tensorboard(out)[0]["metric/top1"][-1] == (4, pytest.approx(json.loads(said)["last"]["top1"]))
