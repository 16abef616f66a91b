"""Facts about the methods: what each taps, and what it trains besides the student."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from mdistiller.distiller import Learner, build_method
from mdistiller.methods import get_method
from mdistiller.types import DataInfo


def describe_method(name: str, student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    """A method's name, kind, year and paper; its taps and extra trainable parameters for a pair on CIFAR-100.

    Taps are those with the method's defaults. Neither model changes.
    """
    method = get_method(name)
    student = copy.deepcopy(student)  # a method may take its student over
    own = sum(p.numel() for p in student.parameters())
    data = DataInfo((3, 32, 32), torch.arange(50_000) % 100, 64)
    built = build_method(method.Config(), student, teacher, data)
    learner = Learner(built.deployed(student), built)
    trained = sum(p.numel() for p in learner.parameters() if p.requires_grad)
    return {
        "name": name,
        "kind": method.kind,
        "year": method.year,
        "student_taps": list(built.student_taps),
        "teacher_taps": list(built.teacher_taps),
        "extra_parameters": trained - own,
        "paper": method.paper,
    }
