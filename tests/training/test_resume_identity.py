"""A resumed run knows its teacher, and may read the same data elsewhere."""

import pytest
import torch

from mdistiller.data import DataConfig
from mdistiller.errors import ConfigError
from mdistiller.models import ModelConfig, create_model
from mdistiller.runs.checkpoint import save_student
from mdistiller.runs.folder import RunFolder, check_resumable
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.training.launch import train


def settings(tmp_path, **data):
    data = {"kind": "synthetic", "synthetic_samples": 32, "synthetic_classes": 4, "image_size": 16} | data
    return ClassificationConfig(
        data=DataConfig(**data), student="resnet8", method="kd", device="cpu", epochs=1, batch_size=16,
        teacher=ModelConfig(name="resnet8", checkpoint=tmp_path / "t.safetensors"), out=tmp_path / "run",
        diagnostics=False,
    )  # fmt: skip


def save_teacher(tmp_path, seed):
    torch.manual_seed(seed)
    save_student(tmp_path / "t.safetensors", create_model("resnet8", 4), {})


def test_another_teacher_is_refused(tmp_path):
    save_teacher(tmp_path, 0)
    train(settings(tmp_path))
    train(settings(tmp_path), resume=True)
    save_teacher(tmp_path, 1)
    with pytest.raises(
        ConfigError, match="teacher: its weights are not those with which this run was started"
    ):
        train(settings(tmp_path), resume=True)


def test_the_data_may_have_moved(tmp_path):
    save_teacher(tmp_path, 0)
    RunFolder.create(settings(tmp_path, memory="stream")).close()
    check_resumable(settings(tmp_path, memory="stream", workers=1, root=tmp_path / "moved"))
    check_resumable(settings(tmp_path, memory="auto", memory_limit_gb=1.0))
    with pytest.raises(ConfigError, match="with another data"):
        check_resumable(settings(tmp_path, memory="resident"))
    with pytest.raises(ConfigError, match="with another data"):
        check_resumable(settings(tmp_path, memory="stream", train_limit=8))
