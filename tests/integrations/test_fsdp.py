"""Distillation with FSDP2 and with Accelerate, in two processes on a CPU that see the same batches."""

import copy
import sys
from pathlib import Path

import processes
import pytest
import torch
from torch import distributed as dist

import mdistiller
from mdistiller.errors import ConfigError

EXAMPLES = Path(__file__).parents[2] / "examples"


def models(classes=3):
    torch.manual_seed(0)
    return mdistiller.create_model("resnet8", classes), mdistiller.create_model("resnet14", classes)


def batches(count=3):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(4, 3, 16, 16, generator=generator), torch.tensor([0, 1, 2, 0])) for _ in range(count)
    ]


def train(distiller, backward=torch.Tensor.backward):
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for images, labels in batches():
        loss = distiller(images, labels).loss
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses, sum(p.numel() for group in optimizer.param_groups for p in group["params"])


def build(student, teacher, method="fitnet"):
    torch.manual_seed(1)
    return mdistiller.Distiller(student, teacher, method, input_shape=(3, 16, 16))


def check(distiller, twin, before):
    """Losses, number of trained parameters and their values are those of one process; all have moved."""
    expected = train(twin)
    assert train(distiller) == (pytest.approx(expected[0], rel=1e-4), expected[1])
    for (name, own), other in zip(distiller.named_parameters(), twin.parameters(), strict=True):
        whole = own.full_tensor() if hasattr(own, "full_tensor") else own
        torch.testing.assert_close(whole, other, rtol=1e-3, atol=1e-5, msg=name)
        assert not torch.equal(other, before[name]), name


def sharded(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    sys.path.append(str(EXAMPLES))
    from fsdp2 import shard

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    # The distiller is sharded.
    twin = build(*models())
    before = {n: p.detach().clone() for n, p in twin.named_parameters()}
    assert any(name.startswith("method.") for name in before)
    distiller = shard(build(*models()), mesh=mesh)
    assert all(isinstance(m, FSDPModule) for m in (distiller, distiller.teacher))
    check(distiller, twin, before)
    assert all(hasattr(p, "full_tensor") for p in distiller.teacher.parameters())
    # Two teachers.
    teachers = [models()[1], models()[1]]
    both = build(models()[0], teachers, ["fitnet", "kd"])
    alone = copy.deepcopy(both)
    check(shard(both, mesh=mesh), alone, {n: p.detach().clone() for n, p in alone.named_parameters()})
    assert all(isinstance(one, FSDPModule) for one in teachers)
    # Models that are sharded before.
    student, teacher = models()
    for model in (student, teacher):
        fully_shard(model.layer2, mesh=mesh)
        fully_shard(model, mesh=mesh)
    with pytest.raises(ConfigError, match=r"ResNet is sharded, .*: build the Distiller before fully_shard"):
        build(student, teacher)
    with pytest.raises(ValueError, match="reads the weights of the student's classifier"):
        shard(build(*models(), "catkd"), mesh=mesh)
    dist.destroy_process_group()


def accelerated():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    twin = build(*models())
    before = {n: p.detach().clone() for n, p in twin.named_parameters()}
    distiller = build(*models())
    wrapped = accelerator.prepare(distiller)
    assert isinstance(wrapped, torch.nn.parallel.DistributedDataParallel)
    expected = train(twin)
    assert train(wrapped, accelerator.backward) == (pytest.approx(expected[0], rel=1e-4), expected[1])
    assert accelerator.unwrap_model(wrapped) is distiller
    for (name, own), other in zip(distiller.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-5, msg=name)
        assert not torch.equal(own, before[name]), name
    accelerator.end_training()


def test_fsdp2(tmp_path):
    processes.run_ranks(sharded, str(tmp_path))


def example():
    sys.path.append(str(EXAMPLES))
    import fsdp2

    assert len(fsdp2.main(steps=2)) == 2


def test_the_example_runs():
    codes, _, errors = processes.run_group(example)
    assert codes == [0, 0], errors


def test_accelerate():
    pytest.importorskip("accelerate", minversion="1.3")
    codes, _, errors = processes.run_group(accelerated, env={"ACCELERATE_USE_CPU": "true"})
    assert codes == [0, 0], errors
