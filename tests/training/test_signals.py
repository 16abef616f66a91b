"""Kills, signals, locks and full disks: a run goes on bit for bit, or says why it cannot."""

import os
import random
import re
import resource
import signal
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Forked, mdistiller, run_group, torchrun
from safetensors.torch import load_file

from mdistiller.errors import Interrupted, TrainingError
from mdistiller.methods import get_method
from mdistiller.recipes import get_recipe
from mdistiller.runs.checkpoint import load_state, save_state
from mdistiller.runs.folder import RunFolder, read_metrics
from mdistiller.runs.lock import FolderLock
from mdistiller.runs.progress import Reporter
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.training import trainer
from mdistiller.training.distributed import World
from mdistiller.training.launch import train
from mdistiller.training.signals import stop_on_signals
from mdistiller.training.task import load_config
from mdistiller.training.trainer import Trainer

# Of its own data and random state it has everything: a memory bank, crops and flips, an average.
DATA = ["--data.kind", "synthetic", "--data.synthetic-samples", "96", "--data.image-size", "16"]
DATA += ["--data.synthetic-classes", "10", "--device", "cpu"]
RUN = [*DATA, "--batch-size", "16", "--epochs", "6", "--ema", "0.9", "--log-every", "2"]
RUN += ["--augment.mixup-alpha", "0.2"]
TIMINGS = ("seconds", "ms_per_step", "epoch_ms")


def start(*args, **options):
    return Forked(mdistiller, "train", *args, **options)


def finish(process, timeout=120):
    _, err = process.communicate(timeout=timeout)
    return process.returncode, err


def run(*args, **options):
    return finish(start(*args, **options))


def resume(out):
    return run(out / "config.json", "--resume")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher") / "run"
    code, err = run("digits.teacher.resnet14", "--out", out, "--epochs", "1", *DATA)
    assert code == 0, err
    return out


@pytest.fixture(scope="module")
def arguments(teacher):
    """A run with CRD, whose memory has to come back too."""
    recipe = ["digits.crd.resnet14_resnet8", *RUN, "--teacher.checkpoint", str(teacher)]
    return [*recipe, "--method.negatives", "32", "--method.feature-dim", "8"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, arguments):
    """The same run, never interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    code, err = run(*arguments, "--out", out)
    assert code == 0, err
    return out


def lines(out):
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in read_metrics(out)]


def assert_equal(a, b, where):
    """Bit for bit, in every part but the clock's."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - set(TIMINGS):
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{where}.{i}")
    else:
        assert a == b, where


def assert_same_end(out, whole):
    names = sorted(path.name for path in whole.glob("*.safetensors"))
    assert sorted(path.name for path in out.glob("*.safetensors")) == names
    for name in names:
        assert_equal(load_file(out / name), load_file(whole / name), name)
    assert_equal(load_state(out / "resume.pt"), load_state(whole / "resume.pt"), "resume.pt")
    assert lines(out) == lines(whole)
    assert not list(out.glob(".*"))  # no half-written file, no lock


def wait_for(condition, process, timeout=180):
    end = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)  # leaves the processor to the run


def writing(out):
    """Whether a state is being written this moment."""
    try:
        return any(name.startswith(".resume.pt.") for name in os.listdir(out))
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("moment", ["while a state is written", "early", "later", "late"])
def test_killed_at_any_moment_it_ends_as_if_never_interrupted(tmp_path, arguments, whole, moment):
    out = tmp_path / "run"
    process = start(*arguments, "--out", out)
    if moment == "while a state is written":
        wait_for(lambda: writing(out), process)
    else:
        steps = {"early": 1, "later": 9, "late": 25}[moment]
        wait_for(lambda: (lines(out) or [{"step": 0}])[-1]["step"] >= steps, process)
        time.sleep(random.random() * 0.05)
    process.send_signal(signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    code, err = resume(out)
    assert code == 0, err
    assert_same_end(out, whole)


def test_a_killed_run_resumes_within_the_epoch_from_the_last_save(tmp_path, arguments, whole):
    """The first evaluation is far away: without saves by time the run would begin again."""
    out, whole_out = tmp_path / "run", tmp_path / "whole"
    long = [*arguments, "--eval-every", "6", "--epochs", "6", "--out"]
    code, err = run(*long, whole_out)
    assert code == 0, err
    process = start(*long, out, "--save-minutes", "0.0001")
    wait_for(lambda: (lines(out) or [{"step": 0}])[-1]["step"] >= 9, process)
    process.send_signal(signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    state = load_state(out / "resume.pt")
    assert 0 < state["step"] < 36
    assert len(state["ranks"]) == 1
    code, err = run(out / "config.json", "--resume", "--save-minutes", "5")
    assert code == 0, err
    assert f"resumes after step {state['step']}" in " ".join(err.split())
    assert_same_end(out, whole_out)


def test_a_run_killed_before_any_save_says_so(tmp_path, arguments, whole):
    out = tmp_path / "run"
    process = start(*arguments, "--out", out)
    wait_for(lambda: (out / "config.json").exists(), process)
    process.send_signal(signal.SIGKILL)
    finish(process)
    for state in out.glob("resume*.pt"):
        state.unlink()
    code, err = resume(out)
    assert code == 0, err
    assert "no state was saved before its end, so it starts at step 0" in " ".join(err.split())
    assert_same_end(out, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_and_it_goes_on_within_the_epoch(
    tmp_path, arguments, whole, number
):
    out = tmp_path / "run"
    process = start(*arguments, "--out", out)
    wait_for(lambda: (lines(out) or [{"step": 0}])[-1]["step"] >= 7, process)
    process.send_signal(number)
    code, err = finish(process)
    assert code == 1
    assert "Traceback" not in err
    step = int(re.search(rf"stopped by {number.name} after step (\d+)", err)[1])
    assert f"To go on: mdistiller train {out}/config.json --resume" in " ".join(err.split())
    state = load_state(out / "resume.pt")
    assert state["step"] == step
    code, err = resume(out)
    assert code == 0, err
    assert_same_end(out, whole)


def runs_one_after_another(out):
    """A loop as users write it: one run that fails must not stop the others."""
    for seed in range(3):
        config = small(seed=seed, epochs=500, log_every=1, out=out / f"s{seed}")
        try:
            train(config)
        except Exception as error:
            print("caught", error, flush=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_loop_over_runs_and_the_run_resumes(tmp_path, number):
    process = Forked(runs_one_after_another, tmp_path)
    wait_for(lambda: len(lines(tmp_path / "s0")) > 3, process)
    process.send_signal(number)
    out, _ = process.communicate()
    assert out == ""
    assert process.returncode == 128 + number
    assert [path.name for path in tmp_path.iterdir()] == ["s0"]
    config = load_config(tmp_path / "s0" / "config.json")
    state = load_state(tmp_path / "s0" / "resume.pt")
    assert state["step"] > 3
    step = state["step"]
    with pytest.raises(Interrupted, match=rf"stopped by SIGTERM after step {step + 2}; the state is saved"):
        train(config, resume=True, reporter=SignalAt(step + 2))


def stopped_twice(moment):
    both = (signal.SIGINT, signal.SIGTERM)
    with stop_on_signals(World(torch.device("cpu"))) as stop:
        signal.pthread_sigmask(signal.SIG_BLOCK, both)
        for number in both:
            os.kill(os.getpid(), number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
        print(stop.signal, stop.requested(0, 1), flush=True)
        if moment == "later":
            time.sleep(1.1)
        # Delivered to this thread at once, unlike `os.kill`.
        signal.raise_signal(signal.SIGTERM if moment == "later" else signal.SIGINT)
        print("goes on", flush=True)


@pytest.mark.parametrize("moment", ["again", "later"])
def test_both_signals_at_once_are_one_wish_and_another_one_ends_the_process(moment):
    process = Forked(stopped_twice, moment)
    out, err = process.communicate()
    assert out == "SIGINT True\n"
    assert "race condition" not in err
    if moment == "later":
        assert (process.returncode, err) == (-signal.SIGTERM, "")
    else:
        assert err.endswith("KeyboardInterrupt\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_after_the_last_step_has_its_usual_effect_once_the_run_is_written(
    tmp_path, monkeypatch, number
):
    """It ends no run, but a loop over seeds must not start the next one."""
    heard = []
    out = tmp_path / "run"
    evaluate = Trainer.evaluate

    def signalled(trainer):
        signal.raise_signal(number)
        assert heard == []
        return evaluate(trainer)

    monkeypatch.setattr(Trainer, "evaluate", signalled)
    changes = {"epochs": 1, "device": "cpu", "out": out, "max_steps": 2}
    usual = signal.signal(number, lambda *_: heard.append((number, list(out.glob(".*")))))
    try:
        result = train(get_recipe("digits.student.resnet8").replace(**changes))
    finally:
        signal.signal(number, usual)
    assert heard == [(number, [])]  # no lock is left
    assert read_metrics(out)[-1] == result.summary


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_does_not_kill_the_readers(tmp_path, number):
    """As Ctrl-C in a terminal is, and as a scheduler's may be: to the processes that read images, too."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 4)):
        for name in ("a", "b"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    out = tmp_path / "run"
    data = ["--data.root", tmp_path / "data", "--data.memory", "stream", "--data.image-size", "16"]
    more = ["--epochs", "200", "--batch-size", "8", "--precision", "float32", "--log-every", "1"]
    process = start("folder.student.resnet8", *data, *more, "--device", "cpu", "--out", out, own_group=True)
    wait_for(lambda: len(lines(out)) > 8, process)
    os.killpg(process.pid, number)
    code, err = finish(process)
    assert code == 1
    assert "Traceback" not in err
    step = int(re.search(rf"stopped by {number.name} after step (\d+)", err)[1])
    assert load_state(out / "resume.pt")["step"] == step


def test_a_second_run_in_the_folder_is_refused_while_the_first_lives(tmp_path, arguments, whole):
    out = tmp_path / "run"
    process = start(*arguments, "--out", out)
    wait_for(lambda: (out / "metrics.jsonl").exists(), process)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        for second in ([out / "config.json", "--resume"], [*arguments, "--out", out]):
            code, err = run(*second)
            assert code == 2
            assert f"is in use by process {process.pid}" in " ".join(err.split())
    finally:
        os.kill(process.pid, signal.SIGKILL)
    finish(process)
    code, err = resume(out)  # the lock of a dead process is void
    assert code == 0, err
    assert_same_end(out, whole)


def test_locks_within_a_process(tmp_path, whole):
    lock = FolderLock(tmp_path)
    code, err = finish(Forked(FolderLock, tmp_path))
    assert code == 1
    assert f"{tmp_path} is in use by process {os.getpid()}" in err
    lock.release()
    assert not list(tmp_path.iterdir())
    assert finish(Forked(FolderLock, tmp_path))[0] == 0


@pytest.mark.parametrize("killed", [True, False])
def test_a_patient_process_waits_for_a_folder(tmp_path, killed):
    """The second holds the folder once the first has died or is done."""
    first = Forked(hold, tmp_path, tmp_path / "end", 0.0)
    wait_for((tmp_path / "held").exists, first)
    (tmp_path / "held").unlink()
    second = Forked(hold, tmp_path, tmp_path / "end", 600.0)
    wait_for((tmp_path / "asked").exists, second)
    if killed:
        os.kill(first.pid, signal.SIGKILL)
    else:
        (tmp_path / "end").touch()
    wait_for((tmp_path / "held").exists, second)
    (tmp_path / "end").touch()
    assert finish(second)[0] == 0
    finish(first)


def hold(folder, end, patience):
    """Holds a folder until a file appears; says what it does by files."""
    FolderLock.patience = patience
    sleep = time.sleep
    with mock.patch.object(time, "sleep", lambda seconds: ((folder / "asked").touch(), sleep(seconds))):
        lock = FolderLock(folder)
    (folder / "held").touch()
    while not end.exists():
        time.sleep(0.01)
    lock.release()


def test_a_full_disk_ends_the_run_clearly_and_keeps_what_is_whole(tmp_path, arguments, whole):
    out = tmp_path / "run"
    process = start(*arguments, "--out", out)
    wait_for(lambda: (out / "resume.pt").exists(), process)
    process.send_signal(signal.SIGTERM)
    finish(process)
    before = (out / "resume.pt").read_bytes()
    code, err = run(out / "config.json", "--resume", file_limit=50_000)
    assert code == 1
    assert "Traceback" not in err
    said = " ".join(err.split())
    assert f"cannot write to {out}" in said
    assert "File too large" in said
    assert (out / "resume.pt").read_bytes() == before
    assert not list(out.glob(".*.tmp"))
    code, err = resume(out)
    assert code == 0, err
    assert_same_end(out, whole)


@pytest.mark.parametrize("limit", [100, 5_000, 300_000, 400_000, 401_000])
def test_a_state_on_a_full_disk_is_an_error_of_the_system(tmp_path, limit):
    path = tmp_path / "resume.pt"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            save_state(path, {"a": torch.zeros(50_000), "b": torch.zeros(50_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_states_alternate_and_the_newest_whole_one_is_read(tmp_path):
    path = tmp_path / "resume.pt"
    assert load_state(path) is None
    for step in range(3):
        save_state(path, {"step": step, "x": torch.full((1000,), step)})
    assert load_state(path)["step"] == 2
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4  # inside of the tensor: only a checksum tells
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="wrong checksum.*going on from the state before"):
        assert load_state(path)["step"] == 1
    path.unlink()  # killed between the two renames
    assert load_state(path)["step"] == 1


def test_a_run_in_a_thread_of_its_own_sets_no_handlers(tmp_path, whole):
    config = load_config(whole / "config.json").model_copy(update={"out": tmp_path / "run", "max_steps": 2})
    results = []
    thread = threading.Thread(target=lambda: results.append(train(config)))
    thread.start()
    thread.join(60)
    assert results[0].summary["step"] == 2


# In this process: runs too small to be hit by chance, stopped at the very place


def small(**changes):
    settings = {
        "data": {"kind": "synthetic", "synthetic_samples": 64, "synthetic_classes": 4, "image_size": 8},
        "augment": {"padding": 1},
        "student": {"name": "resnet8"},
        "optim": {"schedule": "cosine"},
        "epochs": 2,
        "batch_size": 16,
        "log_every": 3,
        "device": "cpu",
    }
    return ClassificationConfig.model_validate(settings | changes)


@pytest.fixture(scope="module")
def small_teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp("small") / "teacher"
    return {"teacher": {"name": "resnet8", "checkpoint": str(train(small(epochs=1, out=out)).path)}}


class SignalAt(Reporter):
    def __init__(self, step, number=signal.SIGTERM):
        self.at, self.number = step, number

    def step(self, done):
        if done == self.at:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("at", [4, 6], ids=["at an epoch's end", "within an epoch"])
@pytest.mark.parametrize(
    "changes",
    [
        {"optim": {"name": "adamw", "lr": 1e-3, "clip_norm": 1.0, "accumulate": 2}},
        {"precision": "float16"},  # the first steps overflow, which lowers the scale of the loss
        {"method": {"name": "kd"}, "optim": {"name": "dot", "delta": 0.05}},
        {"method": {"name": "kd"}, "teacher_batch": 48},  # the teacher is three batches ahead
        {"method": {"name": "kd"}, "teacher_cache": "cache"},
        {"teacher": {"name": "self"}, "method": {"name": "kd"}, "ema": 0.9},
        {"augment": {"policy": "trivialaugment", "cutmix_alpha": 1.0}},
        {"data": {**small().data.model_dump(mode="json"), "memory": "stream", "workers": 0}},
        {"save_epochs": (1, 2), "eval_every": 2},
        {"save_minutes": 1e-9, "log_every": 3},  # after each step, which changes nothing
    ],
    ids=["adamw", "float16", "dot", "ahead", "cache", "self", "policy", "stream", "eval_every", "saves"],
)
def test_whatever_has_a_state_goes_on_after_a_signal(tmp_path, monkeypatch, small_teacher, changes, at):
    monkeypatch.chdir(tmp_path)
    settings = (small_teacher if "method" in changes else {}) | changes
    train(small(**settings, out=tmp_path / "whole"))
    config = small(**settings, out=tmp_path / "run")
    with pytest.raises(Interrupted, match="stopped by SIGTERM after step"):
        train(config, reporter=SignalAt(at))
    train(config, resume=True)
    assert_same_end(tmp_path / "run", tmp_path / "whole")


class Crash(BaseException):
    """In place of a kill; nothing catches it."""


def test_a_crash_before_any_write_loses_nothing(tmp_path, monkeypatch):
    """Every place that changes a file, one after another: each rename, each line, half of each state."""
    settings = {"ema": 0.9, "log_every": 2, "save_epochs": (1,), "augment": {"policy": "trivialaugment"}}
    settings["batch_size"] = 32
    train(small(**settings, out=tmp_path / "whole"))
    left = 0

    def crash_when_due(do):
        def changed(*args, **kw):
            nonlocal left
            left -= 1
            if left < 0:
                raise Crash
            return do(*args, **kw)

        return changed

    def half(do):
        def changed(state, path):
            nonlocal left
            left -= 1
            if left < 0:
                (path.write if hasattr(path, "write") else path.write_bytes)(b"PK half of it")
                raise Crash
            return do(state, path)

        return changed

    for number in range(100):
        out = tmp_path / f"run{number}"
        config = small(**settings, out=out)
        left = number
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda handle: None)  # slow, and no part of this
            patch.setattr(os, "replace", crash_when_due(os.replace))
            patch.setattr(RunFolder, "log", crash_when_due(RunFolder.log))
            patch.setattr(torch, "save", half(torch.save))
            try:
                train(config)
            except Crash:
                pass
            else:
                break
        train(config, resume=(out / "config.json").exists())
        assert_same_end(out, tmp_path / "whole")
    assert number > 15


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_no_state_is_saved_after_a_loss_or_weights_that_are_not_finite(tmp_path, monkeypatch, bad):
    def forward(self, student, teacher, batch, progress):
        zero = student.logits.sum() - student.logits.sum().detach()
        if progress * 8 > 4.5 and bad == "loss":  # of the sixth step, of eight
            return {"bad": zero * torch.nan}
        if progress * 8 > 6.5 and bad == "gradient":  # of the last step, whose loss is finite
            return {"bad": zero.sqrt()}
        return {"bad": zero * 0}

    monkeypatch.setattr(get_method("none"), "forward", forward)
    with pytest.raises(Interrupted if bad == "loss" else TrainingError, match="not finite"):
        train(small(out=tmp_path / "run"), reporter=SignalAt(6 if bad == "loss" else 0))
    state = load_state(tmp_path / "run" / "resume.pt")
    assert state["step"] == 4
    assert all(value.isfinite().all() for value in state["learner"].values())


def start_two(*args, options=()):
    return torchrun(options, "train", *args)


def run_two(*args):
    """Runs in two processes that nobody watches over."""
    codes, _, errors = run_group(mdistiller, "train", *args)
    assert codes == [0, 0], errors


@pytest.fixture(scope="module")
def whole_of_two(tmp_path_factory, arguments):
    """The run in two processes, never interrupted."""
    out = tmp_path_factory.mktemp("two") / "run"
    run_two(*arguments, "--out", out)
    return out


def workers(parent):
    """Process ids of a torchrun's workers."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text()
                command = (folder / "cmdline").read_text()
            except OSError:
                continue
            if stat.rpartition(")")[2].split()[1] == str(parent) and "mdistiller" in command:
                found.append(int(folder.name))
    return sorted(found)


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_lost_process_ends_the_run_or_is_replaced(tmp_path, arguments, whole_of_two, restarts):
    out = tmp_path / "run"
    process = start_two(*arguments, "--out", out, options=("--max-restarts", str(restarts)))
    wait_for(lambda: (lines(out) or [{"step": 0}])[-1]["step"] >= 9, process)
    os.kill(workers(process.pid)[-1], signal.SIGKILL)
    code, err = finish(process, 180)
    if restarts == 0:
        assert code == 1
        assert load_state(out / "resume.pt")["step"] >= 6
        return
    assert code == 0, err[-2000:]
    assert_same_end(out, whole_of_two)


def test_a_signal_to_torchrun_stops_all_processes_at_the_same_step(tmp_path, arguments, whole_of_two):
    out = tmp_path / "run"
    process = start_two(*arguments, "--out", out)
    wait_for(lambda: (out / "resume.pt").exists(), process)
    process.send_signal(signal.SIGTERM)
    code, err = finish(process, 180)
    assert code == 1
    step = int(re.search(r"stopped by SIGTERM after step (\d+)", err)[1])
    assert step % 6  # within an epoch
    state = load_state(out / "resume.pt")
    assert (state["step"], len(state["ranks"])) == (step, 2)
    code, err = run(out / "config.json", "--resume")
    assert code == 2
    assert "cannot resume with 1 processes within an epoch that 2 began" in " ".join(err.split())
    run_two(out / "config.json", "--resume")
    assert_same_end(out, whole_of_two)


def mdistiller_that_keeps_states(*argv):
    """Runs the command without its last act, the removal of the state before the last."""
    trainer.drop_previous = lambda path: None
    mdistiller(*argv)


def test_two_processes_save_within_an_epoch_and_end_the_same(tmp_path, arguments, whole_of_two):
    """They agree every twenty steps: the state before the last one is of step 20, in the fourth epoch."""
    out = tmp_path / "run"
    more = ("--out", out, "--save-minutes", "0.000001", "--eval-every", "6")
    codes, _, errors = run_group(mdistiller_that_keeps_states, "train", *arguments, *more)
    assert codes == [0, 0], errors
    before = load_state(out / "resume.previous.pt")
    assert (before["step"], before["batch"], len(before["ranks"])) == (20, 2, 2)
    for name in ("student.safetensors", "ema_student.safetensors"):
        assert_equal(load_file(out / name), load_file(whole_of_two / name), name)


def test_restarts_need_a_folder_with_a_name(arguments):
    codes, _, errors = run_group(mdistiller, "train", *arguments, env={"TORCHELASTIC_MAX_RESTARTS": "1"})
    assert codes == [2, 2]
    for err in errors:
        assert "with torchrun --max-restarts a run goes on in its folder" in err
