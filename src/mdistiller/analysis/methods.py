"""Properties of the methods: what each one reads, taps and trains besides the student."""

from typing import Any

import torch
from torch import nn

from mdistiller.distiller import build_method
from mdistiller.methods import Method, get_method
from mdistiller.taps import tap
from mdistiller.types import Batch, DataInfo, Outputs


def describe_method(name: str, student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    """Builds a method with its defaults for a pair on CIFAR-100, and returns its properties by name."""
    method_class = get_method(name)
    data = DataInfo((3, 32, 32), torch.arange(50_000) % 100, 64)
    method = build_method(method_class.Config(), student, teacher, data)
    extended = method.extend_student(student)
    trained = sum(p.numel() for p in nn.ModuleList([extended, method]).parameters() if p.requires_grad)
    return {
        "name": name,
        "reads": _reads(method, extended, teacher) if method.needs_teacher else None,
        "year": method.year,
        "student_taps": list(method.student_taps),
        "teacher_taps": list(method.teacher_taps),
        "extra_parameters": trained - sum(p.numel() for p in student.parameters()),
        "paper": method.paper,
    }


def _reads(method: Method, student: nn.Module, teacher: nn.Module) -> str:
    """Returns `logits`, `features` or `both`. With taps, the gradient of the losses shows a use of logits."""
    if not method.student_taps and not method.teacher_taps:
        return "logits"
    image, outputs = torch.randn(4 * method.num_views, 3, 32, 32), []
    for model, taps in ((student, method.student_taps), (teacher, method.teacher_taps)):
        tapped = tap(model, taps)
        logits, features = tapped(image)
        tapped.untap()
        outputs.append(Outputs(logits.detach().requires_grad_(), features))
    position = torch.arange(len(image))
    losses = method(*outputs, Batch(image, position % 4, position % 4), torch.ones(()))
    total = torch.stack(list(losses.values())).sum()
    read = torch.autograd.grad(total, [logits for logits, _ in outputs], allow_unused=True)
    return "both" if any(gradient is not None for gradient in read) else "features"
