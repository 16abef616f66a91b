"""Compares settings of methods on a few photographs: ten classes of CIFAR-100, 50 training images each.

    python benchmarks/settings_small.py --data DIR --teacher resnet56.pt [--seeds 0 1 2] >> LOG

DIR has cifar-100-python. The teacher, of all 100 classes, keeps the outputs of the ten; its outputs for eight
crops and flips of each image are computed once. The student, resnet8, sees the images at 16 pixels. Each line
of the output is a run: method, settings, weight, top-1 of the last epoch.
"""

import argparse
import json
import math
import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import mdistiller
from mdistiller import Batch, Outputs
from mdistiller.methods.features import classifier
from mdistiller.models import load_weights
from mdistiller.teacher import LiveTeacher

CLASSES, IMAGES, VIEWS, EPOCHS, BATCH, LR = 10, 50, 8, 20, 32, 0.05
WARM = 20 / 240
LOGITS = [
    ("kd", {"task_weight": 0.5, "weight": 0.5, "temperature": 1.0}),
    ("kd", {"task_weight": 0.5, "weight": 0.5, "temperature": 4.0}),
    ("kd", {}),
    ("dkd", {"temperature": 1.0, "beta": 1.0, "warmup": 0.01}),
    ("dkd", {"temperature": 1.0, "beta": "auto", "warmup": 0.01}),
    ("dkd", {"temperature": 4.0, "beta": 1.0, "warmup": WARM}),
    ("dkd", {"temperature": 4.0, "beta": 8.0, "warmup": WARM}),
]
RATIOS = {"fitnet": (1.0, 3.0, 10.0), "at": (1.0, 3.0, 10.0), "sp": (1.0, 3.0)}
Step = tuple[Batch, Outputs]


def read(folder: Path, split: str, classes: list[int], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads the first images of some classes, normalized [N, 3, 32, 32], and their labels."""
    raw = pickle.loads((folder / "cifar-100-python" / split).read_bytes(), encoding="bytes")
    images = torch.from_numpy(raw[b"data"]).view(-1, 3, 32, 32).float() / 255
    labels = torch.tensor(raw[b"fine_labels"])
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)))
    chosen = [(labels == c).nonzero()[:count, 0] for c in classes]
    target = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(c) for c in chosen]))
    return (images[torch.cat(chosen)] - mean) / std, target


def views(images: torch.Tensor, teacher: LiveTeacher) -> list[tuple[torch.Tensor, Outputs]]:
    """Returns crops and flips of all images with the teacher's outputs."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(VIEWS):
        padded = F.pad(images, (4, 4, 4, 4))
        corners = torch.randint(0, 9, (len(images), 2), generator=generator).tolist()
        flips = (torch.rand(len(images), generator=generator) < 0.5).tolist()
        crops = [padded[i, :, y : y + 32, x : x + 32] for i, (y, x) in enumerate(corners)]
        view = torch.stack([c.flip(-1) if flip else c for c, flip in zip(crops, flips, strict=True)])
        index = torch.arange(50)
        parts = [teacher(Batch(part, index, index)) for part in view.split(50)]
        features = {name: torch.cat([p.features[name] for p in parts]) for name in parts[0].features}
        found.append((view, Outputs(torch.cat([p.logits for p in parts]), features)))
    return found


def epoch(
    found: list[tuple[torch.Tensor, Outputs]], labels: torch.Tensor, number: int, seed: int
) -> list[Step]:
    """Returns the batches of an epoch; a last one of less than half the size is left out."""
    images, outputs = found[number % VIEWS]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1000 * seed + number))
    parts = [order[i : i + BATCH] for i in range(0, len(order) - BATCH // 2, BATCH)]
    return [
        (
            Batch(images[p], labels[p], p),
            Outputs(outputs.logits[p], {name: f[p] for name, f in outputs.features.items()}),
        )
        for p in parts
    ]


def make_student(seed: int) -> nn.Module:
    """Builds the student of a seed, which halves its images."""
    torch.manual_seed(seed)
    student = mdistiller.create_model("resnet8", CLASSES)
    student.register_forward_pre_hook(lambda model, given: (F.avg_pool2d(given[0], 2),))
    return student


def balanced(seed: int, teacher: nn.Module, method: str, batches: list[Step]) -> float:
    """Returns the weight with which the gradient of a method is as large as the task's."""
    student = make_student(seed)
    torch.manual_seed(seed + 50)
    distiller = mdistiller.Distiller(student, teacher, method, weight=1.0)
    logs = []
    for batch, outputs in batches[:8]:
        out = distiller(*batch[:3], 1.0, outputs)
        own = {name: loss for name, loss in out.losses.items() if name not in out.task}
        gradients = [
            torch.autograd.grad(
                sum(losses.values()), list(student.parameters()), retain_graph=True, allow_unused=True
            )
            for losses in (out.task, own)
        ]
        both = [(a, b) for a, b in zip(*gradients, strict=True) if a is not None and b is not None]
        task, distilled = (torch.cat([g.flatten() for g in side]).norm() for side in zip(*both, strict=True))
        logs.append(math.log(task / distilled))
    return math.exp(sum(logs) / len(logs))


def train(
    method: str | None, settings: dict, seed: int, teacher: nn.Module, found: list, labels: torch.Tensor
) -> nn.Module:
    """Trains a student, alone for no method."""
    student = make_student(seed)
    torch.manual_seed(seed + 50)
    distiller = mdistiller.Distiller(
        student, None if method is None else teacher, method or "none", **settings
    ).train()
    optimizer = torch.optim.SGD(distiller.parameters(), lr=LR, momentum=0.9, weight_decay=1e-4)
    total, step = EPOCHS * len(epoch(found, labels, 0, seed)), 0
    for number in range(EPOCHS):
        for batch, outputs in epoch(found, labels, number, seed):
            done = step / total
            factor = done / 0.05 if done < 0.05 else 0.5 * (1 + math.cos(math.pi * (done - 0.05) / 0.95))
            optimizer.param_groups[0]["lr"] = LR * factor
            out = distiller(*batch[:3], done, outputs)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            step += 1
    return student.eval()


def main() -> None:
    """Trains all students of all seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    torch.set_num_threads(1)
    classes = torch.randperm(100, generator=torch.Generator().manual_seed(7))[:CLASSES].tolist()
    images, labels = read(given.data, "train", classes, IMAGES)
    tests, targets = read(given.data, "test", classes, 100)
    model = mdistiller.create_model("resnet56", 100)
    load_weights(model, given.teacher, "resnet56")
    head = classifier(model)
    head.weight, head.bias = (nn.Parameter(p.detach()[classes]) for p in (head.weight, head.bias))
    head.out_features = CLASSES
    teacher = LiveTeacher(model, ("stage1", "stage2", "stage3"))
    found = views(images, teacher)
    runs: list = [(None, {}, None), *((m, s, None) for m, s in LOGITS)]
    runs += [(m, {}, ratio) for m, ratios in RATIOS.items() for ratio in (None, *ratios)]
    for seed in given.seeds:
        for method, settings, ratio in runs:
            weight = None
            if ratio is not None:
                weight = ratio * balanced(seed, model, method, epoch(found, labels, 0, seed))
                settings = {**settings, "weight": weight}
            student = train(method, settings, seed, model, found, labels)
            with torch.no_grad():
                top1 = 100 * (student(tests).argmax(1) == targets).float().mean().item()
            line = {"method": method or "none", "settings": settings, "ratio": ratio, "weight": weight}
            print(json.dumps({**line, "seed": seed, "top1": round(top1, 1)}), flush=True)


if __name__ == "__main__":
    main()
