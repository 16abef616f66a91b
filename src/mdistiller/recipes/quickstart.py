"""The quickstart: one teacher, and the same small student alone, with KD and with DKD, over seeds.

Digits are easy, so the students get what leaves room for a teacher to help: 300 images, 40 % of them with a
wrong label, while the teacher saw all 1,297 with the right ones.
"""

from __future__ import annotations

from pathlib import Path

from mdistiller.recipes import get_recipe
from mdistiller.tasks.classification.config import ClassificationConfig

TEACHER, STUDENT = "resnet20", "resnet8"
IMAGES, LABEL_NOISE = 300, 0.4
METHODS = ("none", "kd", "dkd")

SETTING = (
    f"scikit-learn's handwritten digits at 16 × 16 pixels, 500 test images. The teacher ({TEACHER}) trains "
    f"on all 1,297 training images. Every student ({STUDENT}) gets {IMAGES} of them, and {LABEL_NOISE:.0%} "
    "of its labels are wrong: a setting made to leave room between student and teacher, not a benchmark. "
    "KD and DKD run with their published hyper-parameters for CIFAR-100."
)


def teacher(out: Path) -> ClassificationConfig:
    """The teacher, on all images and the right labels."""
    return get_recipe(f"digits.teacher.{TEACHER}").model_copy(update={"epochs": 8, "out": out})


def student(method: str, seed: int, teacher_run: Path, out: Path) -> ClassificationConfig:
    """One student: few images, noisy labels."""
    alone = method == "none"
    config = get_recipe(f"digits.student.{STUDENT}" if alone else f"digits.{method}.{TEACHER}_{STUDENT}")
    if config.teacher is not None:
        model = config.teacher.model_copy(update={"checkpoint": teacher_run})
        config = config.model_copy(update={"teacher": model})
    data = config.data.model_copy(update={"train_limit": IMAGES, "label_noise": LABEL_NOISE})
    return config.model_copy(update={"data": data, "epochs": 15, "seed": seed, "out": out, "log_every": 5})
