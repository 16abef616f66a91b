"""Shared by all tests: threads, and paths to material that lies beside the checkout."""

import atexit
import gc
import os
from pathlib import Path

import pytest

# Before torch. Threads that wait do not spin. One process has two threads, each of pytest-xdist's two one.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")

import torch

from mdistiller.data import registry as datasets
from mdistiller.methods import registry as methods
from mdistiller.models import registry as models
from mdistiller.training import task as tasks

# Left out by `make test-fast`: processes, compilation, whole runs, commands, every method's contract.
SLOW = (
    "integrations/test_ray.py",
    "cli/",
    "data/test_policy.py",
    "deploy/",
    "integrations/",
    "methods/test_contract.py",
    "methods/test_crd.py",
    "report/",
    "runs/",
    "tasks/detection/",
    "tasks/segmentation/",
    "test_any_model.py",
    "test_api.py",
    "test_examples.py",
    "test_fuzz.py",
    "test_notebook.py",
    "test_own_models.py",
    "training/test_balance.py",
    "training/test_batches.py",
    "training/test_distributed.py",
    "training/test_dot.py",
    "training/test_row_formats.py",
    "training/test_signals.py",
    "training/test_teacher_cache.py",
    "training/test_trainer.py",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.relative_to(Path(__file__).parent).as_posix().startswith(SLOW):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish():
    """Spares the garbage collector the modules and tests, a million objects that stay to the end."""
    gc.freeze()
    atexit.register(gc.unfreeze)


SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def _threads():
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(scope="session", autouse=True)
def _user_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def registries():
    """Forgets the methods, models, data sets and tasks that a test registers: when called, and at its end."""
    for name in tasks._built_in():
        tasks.get_task(name)  # registers itself when it is first imported
    found = (methods._METHODS, models._MODELS, datasets._DATASETS, tasks._TASKS)
    before = [dict(registry) for registry in found]

    def forget() -> None:
        for registry, entries in zip(found, before, strict=True):
            registry.clear()
            registry.update(entries)

    yield forget
    forget()


@pytest.fixture(scope="session")
def shared():
    """The folder of data and teachers beside the checkout; tests that need a part of it skip without it."""
    return SHARED


@pytest.fixture(scope="session")
def teachers():
    """The folder of trained CIFAR-100 teachers; skips where it is absent."""
    folder = SHARED / "teachers" / "cifar100"
    if not folder.is_dir():
        pytest.skip("no trained teachers in ../shared/teachers/cifar100")
    return folder
