"""Small real runs, and a browser."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.training.launch import train


@pytest.fixture(scope="session")
def real_runs(tmp_path_factory) -> list[Path]:
    """Run folders on the digits: the teacher, the student alone, and DKD with two seeds; one epoch each."""
    root = tmp_path_factory.mktemp("real")

    def run(name: str, student: str, **fields) -> Path:
        config = ClassificationConfig.model_validate(
            {
                "data": {"kind": "digits", "train_limit": 200},
                "student": {"name": student},
                "batch_size": 50,
                "epochs": 1,
                "device": "cpu",
                "out": root / name,
                **fields,
            }
        )
        train(config)
        return root / name

    teacher = run("teacher", "resnet14", epochs=3)
    taught = {"teacher": {"name": "resnet14", "checkpoint": teacher}, "method": {"name": "dkd"}}
    return [
        teacher,
        run("alone", "resnet8"),
        *(run(f"dkd-s{seed}", "resnet8", seed=seed, **taught) for seed in (0, 1)),
    ]


@pytest.fixture
def copies(real_runs, tmp_path) -> list[Path]:
    """Copies of `real_runs` that may be damaged; their teacher is still the original."""
    return [shutil.copytree(folder, tmp_path / "runs" / folder.name) for folder in real_runs]
