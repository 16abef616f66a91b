"""Two gloo processes against one: gradients, evaluation, and a run under torchrun."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from processes import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mdistiller.data import AugmentConfig, DataConfig, load_data
from mdistiller.data.loader import PlainBatches
from mdistiller.distiller import Distiller
from mdistiller.errors import ConfigError
from mdistiller.methods import DKDConfig, KDConfig
from mdistiller.methods.compose import build_method
from mdistiller.models import create_model
from mdistiller.seeding import seed_default
from mdistiller.tasks.classification import ClassificationConfig
from mdistiller.tasks.classification.evaluate import evaluate
from mdistiller.training.batches import steps_ahead
from mdistiller.training.distributed import World, pick_device, process_group
from mdistiller.training.precision import sum_dtype
from mdistiller.types import DataInfo

CONFIGS = [KDConfig(), DKDConfig()]


def small(width):
    # Without batch norm, whose statistics are those of a process.
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2), nn.GroupNorm(2, width), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)
    )


def setting():
    torch.manual_seed(0)
    student, teacher = small(4), small(8)
    image, label = torch.randn(8, 3, 8, 8), torch.randint(0, 5, (8,))
    for model in (student, teacher):
        model(image)
    return student, teacher, (image, label, torch.arange(8))


def gradients(config, rank=0, size=1):
    student, teacher, batch = setting()
    method = build_method(config, student, teacher, DataInfo((3, 8, 8)))
    distiller = Distiller(student, teacher, method)
    step = distiller if size == 1 else DistributedDataParallel(distiller)
    step(*(x[rank::size] for x in batch), torch.tensor(0.5)).loss.backward()
    return [p.grad for p in distiller.parameters()]


def evaluation(rank=0, size=1):
    splits = load_data(DataConfig(kind="synthetic", synthetic_samples=30, synthetic_classes=4, image_size=16))
    torch.manual_seed(0)
    model = create_model("resnet8", 4)
    batches = PlainBatches(splits.test, splits, 4, device="cpu", rank=rank, world_size=size)
    return evaluate(model, batches, World(torch.device("cpu"), rank, size))


def shared_buffers(rank):
    model = nn.BatchNorm1d(3)
    model.running_mean.fill_(rank + 1)
    World(torch.device("cpu"), rank, 2).share_buffers(model)
    return model.running_mean


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = {
        "gradients": [gradients(config, rank, 2) for config in CONFIGS],
        "evaluation": evaluation(rank, 2),
        "buffers": shared_buffers(rank),
    }
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_gradients_and_figures_of_one(tmp_path):
    run_ranks(work, str(tmp_path))
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for i, config in enumerate(CONFIGS):
        expected = gradients(config)
        for result in results:
            for got, want in zip(result["gradients"][i], expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for result in results:
        assert torch.equal(result["buffers"], torch.ones(3))
        expected = evaluation()
        assert result["evaluation"].pop("by_class") == expected.pop("by_class")
        assert result["evaluation"] == pytest.approx(expected, rel=1e-6)


def test_a_run_under_torchrun(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "mdistiller", "train", "digits.student.resnet8", "--out", str(out), "--max-steps", "4"]
    command += ["--data.train-limit", "64", "--data.test-limit", "50", "--batch-size", "32", "--json"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)  # one process prints
    assert summary["step"] == 4
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "env.json",
        "metrics.jsonl",
        "report.html",
        "resume.pt",
        "student.safetensors",
    ]


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "gpu", "meta"])
def test_devices_that_are_not_here(name):
    with pytest.raises(ConfigError, match="device: got"):
        pick_device(name)


@pytest.mark.parametrize(("name", "current"), [("cuda:1", ["cuda:1"]), ("cuda", []), ("cpu", [])])
def test_a_named_gpu_is_the_current_one(name, current, monkeypatch):
    """Streams and captures that name no device are then on it."""
    found = []
    monkeypatch.setattr("mdistiller.training.distributed.pick_device", torch.device)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: found.append(str(device)))
    with process_group(name) as here:
        assert here == World(torch.device(name))
    assert found == current


def probe_and_tuning(rank=0, size=1):
    """Weights after a probe and a tuning epoch, on batches of eight images over all processes."""
    from small_runs import make_trainer

    from mdistiller.config import OptimConfig
    from mdistiller.methods import NoneConfig
    from mdistiller.models import ModelConfig
    from mdistiller.runs.progress import Reporter
    from mdistiller.tasks.classification.config import ClassificationConfig
    from mdistiller.training.signals import Stop
    from mdistiller.training.trainer import fit

    config = ClassificationConfig(
        data=DataConfig(kind="synthetic", synthetic_samples=16, synthetic_classes=4, image_size=8),
        augment=AugmentConfig(flip=False, padding=0),
        student=ModelConfig(name="resnet8"),
        method=NoneConfig(),
        optim=OptimConfig(lr=0.1, momentum=0, weight_decay=0, schedule="constant", head_lr=2.0),
        epochs=2,
        probe_epochs=1,
        batch_size=8,
        device="cpu",
        diagnostics=False,
    )
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 4))
    before = [p.detach().clone() for p in student.parameters()]
    world = World(torch.device("cpu"), rank, size)
    t = make_trainer(config, load_data(config.data), student, None, world)
    end = fit(t, t.source, Stop(world), Reporter())
    assert end["probe"]["epoch"] == 1
    assert not any(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    return [p.detach() for p in student.parameters()]


def tune(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(probe_and_tuning(rank, 2), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_probe_and_tune_as_one(tmp_path):
    run_ranks(tune, str(tmp_path))
    expected = probe_and_tuning()
    for rank in range(2):
        for got, want in zip(torch.load(tmp_path / f"rank{rank}.pt"), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_mps_where_torch_has_it(monkeypatch):
    with pytest.raises(ConfigError, match="device: got 'mps', but torch finds no such GPU"):
        pick_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("mps") == torch.device("mps")
    assert pick_device("auto").type != "mps"
    with process_group("mps") as world:
        assert world.device.type == "mps"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="mps takes one process"), process_group("mps"):
        pass


def test_mps_sums_in_float32_and_seeds_its_generator(monkeypatch):
    mps, seeds = torch.device("mps"), []
    monkeypatch.setattr(torch.mps, "manual_seed", seeds.append)
    seed_default(mps, 5)
    assert (seeds, torch.initial_seed()) == ([5], 5)
    assert sum_dtype(mps) == torch.float32
    assert sum_dtype(torch.device("cpu")) == torch.float64
    one, other = (
        steps_ahead(ClassificationConfig(student="resnet8"), 32, World(torch.device(name)))
        for name in ("mps", "cuda")
    )
    assert one == other
