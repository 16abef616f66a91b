"""Distillation with models that are sharded over processes by PyTorch's FSDP2.

    torchrun --nproc-per-node 2 examples/fsdp2.py

Copy `shard` into your own script. Methods that read the weights of the student's classifier in each step,
such as CAT-KD, cannot train a sharded student.
"""

import re

import torch
from torch import distributed
from torch.distributed.fsdp import FSDPModule, fully_shard

import mdistiller
from mdistiller.models import tap_points


def shard(distiller, *, mesh=None, **options):
    """Shards a distiller in place: its student with the method's layers, and its teachers.

    Each stage of the models (their taps `stage1` …) is a unit, gathered while it runs, and so is the rest of
    each model. The optimizer is made afterwards, of `distiller.parameters()`. Models that are sharded already
    stay as they are. `mesh` is the device mesh, by default all processes; `options` are further arguments of
    `fully_shard`, such as `mp_policy`.
    """
    if distiller.method.needs.classifier:
        raise ValueError(
            "the method reads the weights of the student's classifier, which no process has whole"
        )
    if not isinstance(distiller.student, FSDPModule):
        shard_stages(distiller.student, mesh, options)
    fully_shard(distiller, mesh=mesh, **options)
    for teacher in distiller.teachers:
        if not isinstance(teacher, FSDPModule):
            shard_stages(teacher, mesh, options)
            fully_shard(teacher, mesh=mesh, **{"reshard_after_forward": True, **options})
    return distiller


def shard_stages(model, mesh, options):
    """Shards each stage of a model that has parameters."""
    for name, path in tap_points(model).items():
        if re.fullmatch(r"stage\d+", name) and ":" not in path:
            stage = model.get_submodule(path)
            if any(True for _ in stage.parameters()):
                fully_shard(stage, mesh=mesh, **options)


def main(steps=3):
    """Trains on random images; returns the losses."""
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = distributed.init_device_mesh(device, (distributed.get_world_size(),))
    teacher = mdistiller.create_model("resnet20", num_classes=10)
    student = mdistiller.create_model("resnet8", num_classes=10)
    distiller = shard(mdistiller.Distiller(student, teacher, "fitnet").to(device), mesh=mesh)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.02)
    losses = []
    for _ in range(steps):
        images, labels = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
        out = distiller(images.to(device), labels.to(device))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    distributed.destroy_process_group()
    return losses


if __name__ == "__main__":
    print(main())
