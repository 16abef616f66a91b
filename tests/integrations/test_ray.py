"""Sweeps with Ray."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import mdistiller
from mdistiller.cli.main import run as command
from mdistiller.cli.sweep import read_space
from mdistiller.errors import ConfigError
from mdistiller.integrations.ray import check_space, sweep
from mdistiller.runs.lock import FolderLock
from mdistiller.settings import unflatten

pytest.importorskip("ray.cluster_utils")
CONFIG = mdistiller.get_recipe("digits.student.resnet8").replace(device="cpu")


def test_a_cluster_of_two_machines(tmp_path):
    """In a process of its own, and again if that hangs: Ray's scheduler has once waited without an end."""
    file = Path(__file__).with_name("ray_cluster.py")
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file), "--basetemp"]
    for name in ("first", "second"):
        with subprocess.Popen(
            [*words, str(tmp_path / name)], stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            try:
                written, _ = process.communicate(timeout=500)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                continue
        assert process.returncode == 0, written
        return
    pytest.fail("Ray hung twice")


WRONG = {
    "no field": ({}, "space: got no field"),
    "a number": ({"seed": 3}, r"space: seed: got 3; allowed: seed=\[1, 2\], or seed="),
    "a field of a group": ({"lr": [0.1]}, "unknown field 'lr'; nearest: optim.lr"),
    "unknown": ({"optim.lrr": [0.1]}, "optim.lrr.*nearest: lr"),
    "value": ({"optim.lr": [-1.0]}, "optim.lr"),
    "order": ({"optim.lr": {"min": 1.0, "max": 0.1}}, "need two numbers, min below max"),
    "log": ({"optim.lr": {"min": 0.0, "max": 0.1, "log": True}}, "with log it has to be above 0"),
}


def test_a_retried_trial_waits_for_its_dying_predecessor(tmp_path, monkeypatch):
    """Its lock outlives a lost machine for a while, and each refusal would cost a retry."""
    import mdistiller.integrations.ray as module

    monkeypatch.setattr(FolderLock, "patience", 0.0)
    seen = []
    context = SimpleNamespace(get_trial_id=lambda: "a")
    monkeypatch.setattr(module.tune, "get_context", lambda: context)
    monkeypatch.setattr(module, "train", lambda *args, **kwargs: seen.append(FolderLock.patience))
    values = CONFIG.model_dump(mode="json")
    module._run_trial({}, values=values, out=tmp_path, metric="accuracy", threads=1)
    assert seen == [600.0]


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_space_is_one_sentence(case, tmp_path):
    space, words = WRONG[case]
    with pytest.raises(ConfigError, match=words):
        check_space(CONFIG, space)
    if case == "no field":
        with pytest.raises(ConfigError, match="trials: got 0, all combinations"):
            sweep(CONFIG, {"optim.lr": {"min": 0.1, "max": 0.2}}, tmp_path, trials=0)


def test_a_space_from_words_and_files(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text("optim.lr: {min: 0.01, max: 0.1}\nseed: [0, 1]\n")
    assert read_space([str(file), "method.beta=[1, 2.5]"]) == {
        "optim.lr": {"min": 0.01, "max": 0.1},
        "seed": [0, 1],
        "method.beta": [1, 2.5],
    }
    with pytest.raises(ConfigError, match=r"space: 'nothing' is no FIELD=VALUES and no YAML file"):
        read_space(["nothing"])
    file.write_text("3")
    with pytest.raises(ConfigError, match="holds a int; need lines FIELD: VALUES"):
        read_space([str(file)])
    assert unflatten({"optim.lr": 1, "optim.betas": 2, "seed": 3}) == {
        "optim": {"lr": 1, "betas": 2},
        "seed": 3,
    }


def test_no_cluster_and_no_package(tmp_path, monkeypatch, capsys):
    words = ["sweep", "digits.student.resnet8", "--space", "seed=[0]", "--out", str(tmp_path / "s")]
    assert command([*words, "--address", "127.0.0.1:9"]) == 2
    assert "address: no cluster at 127.0.0.1:9" in capsys.readouterr().err
    assert command([*words, "--seeds", "2"]) == 2
    assert "allowed with sweep: --space 'seed=[0, 1, 2]'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "mdistiller.integrations.ray")
    assert command(words) == 2
    assert "training on a cluster needs ray[tune]: pip install 'ray[tune]'" in capsys.readouterr().err
