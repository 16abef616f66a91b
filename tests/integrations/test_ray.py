"""Sweeps on a cluster of Ray with two nodes, one of which dies."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import mdistiller
from mdistiller.cli.main import run as command
from mdistiller.cli.sweep import read_space
from mdistiller.errors import ConfigError, TrainingError
from mdistiller.integrations.ray import Resources, check_space, sweep
from mdistiller.runs.folder import read_metrics
from mdistiller.runs.lock import FolderLock
from mdistiller.settings import unflatten

cluster_utils = pytest.importorskip("ray.cluster_utils")
CONFIG = mdistiller.get_recipe("digits.student.resnet8").replace(
    epochs=6,
    batch_size=16,
    device="cpu",
    layout="contiguous",
    precision="float32",
    diagnostics=False,
    data={"train_limit": 128, "test_limit": 64},
)
FLAGS = ["--batch-size", "16", "--device", "cpu", "--layout", "contiguous", "--precision", "float32"]
FLAGS += ["--no-diagnostics", "--data.test-limit", "64"]


@pytest.fixture(scope="module")
def cluster():
    """A cluster of two nodes with one core each."""
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.worker = cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


def weights(folder):
    return load_file(folder / "student.safetensors")


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


def test_a_sweep_loses_nothing_when_a_machine_dies(cluster, tmp_path):
    lines = []

    def show(line):
        lines.append(line)
        if len(lines) == 3:
            cluster.remove_node(cluster.worker, allow_graceful=False)
            cluster.worker = cluster.add_node(num_cpus=1)

    space = {"optim.lr": [0.02, 0.1], "seed": [0, 1]}
    resources = Resources(address=cluster.address)
    trials = sweep(CONFIG, space, tmp_path, trials=0, resources=resources, early_stopping=False, show=show)
    assert {(t.settings["optim.lr"], t.settings["seed"]) for t in trials} == {
        (lr, seed) for lr in space["optim.lr"] for seed in space["seed"]
    }
    assert [t.error for t in trials] == [None] * 4
    assert [t.epochs for t in trials] == [6] * 4
    assert [t.value for t in trials] == sorted((t.value for t in trials), reverse=True)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a trial of one core
    for number, trial in enumerate(trials):
        evaluations = [line for line in read_metrics(trial.out) if line["kind"] == "eval"]
        assert [line["epoch"] for line in evaluations] == [1, 2, 3, 4, 5, 6]
        assert trial.value == evaluations[-1]["top1"]
        plain = mdistiller.train(CONFIG.replace(**unflatten(trial.settings)), out=tmp_path / f"plain{number}")
        assert equal(weights(trial.out), weights(plain.folder))
    torch.set_num_threads(before)


def test_the_command_stops_trials_early_and_continues(cluster, tmp_path, capsys):
    words = [
        "sweep",
        "digits.student.resnet8",
        *FLAGS,
        "--epochs",
        "4",
        "--out",
        str(tmp_path / "s"),
        "--json",
    ]
    words += ["--data.train-limit", "1297"]
    # Two trials run at a time. Those of rate 0.1 set the mark, unless Ray starts all others before them.
    words += ["--space", "seed=[0, 1, 2]", "--space", "optim.lr=[0.1, 1.0e-7]", "--address", cluster.address]
    assert command(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["trials"]) == 6
    epochs = {(t["settings"]["optim.lr"], t["settings"]["seed"]): t["epochs"] for t in found["trials"]}
    assert max(epochs[0.1, seed] for seed in range(3)) == 4
    assert min(epochs[1e-7, seed] for seed in range(3)) == 1
    assert (tmp_path / "s" / "report.html").exists()
    assert command(words) == 0  # nothing is left to do
    again = json.loads(capsys.readouterr().out)
    assert again["trials"] == found["trials"]


def test_a_failure_is_one_error(cluster, tmp_path):
    resources = Resources(gpus=1, address=cluster.address)
    with pytest.raises(ConfigError, match="gpus: got 1, and no machine of the cluster has more than 0"):
        sweep(CONFIG, {"seed": [0]}, tmp_path / "g", trials=0, resources=resources)
    broken = CONFIG.replace(data={"kind": "folder", "root": tmp_path / "no_such"})
    resources = Resources(address=cluster.address)
    with pytest.raises(TrainingError, match=r"no trial came to an evaluation; the first .*no_such"):
        sweep(broken, {"seed": [0]}, tmp_path / "s", trials=0, resources=resources)


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
