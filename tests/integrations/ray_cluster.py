"""Sweeps on a cluster of Ray with two nodes, one of which dies; `test_ray.py` runs them."""

import json

import pytest
import torch
from ray import cluster_utils
from safetensors.torch import load_file

import mdistiller
from mdistiller.cli.main import run as command
from mdistiller.errors import ConfigError, TrainingError
from mdistiller.integrations.ray import Resources, sweep
from mdistiller.runs.folder import read_metrics
from mdistiller.settings import unflatten

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
