"""Shared by all tests: two threads, and paths to material that lies beside the checkout."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that wait do not spin

import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def _threads():
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def teachers():
    """The folder of trained CIFAR-100 teachers; skips where it is absent."""
    folder = SHARED / "teachers" / "cifar100"
    if not folder.is_dir():
        pytest.skip("no trained teachers in ../shared/teachers/cifar100")
    return folder
