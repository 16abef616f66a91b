"""Quickstart: one teacher, and a small student without a teacher, with KD and with DKD, over seeds.

Digits are easy, so the students' data is made harder to leave room for a teacher's help: 300 images, 40 % of
them with a wrong label, while the teacher has all 1,297 with the right ones.
"""

from pathlib import Path

from mdistiller.config import RunConfig
from mdistiller.recipes import get_recipe

TEACHER, STUDENT = "resnet20", "resnet8"
IMAGES, LABEL_NOISE = 300, 0.4
METHODS = ("none", "kd", "dkd")

SETTING = (
    f"scikit-learn's handwritten digits at 16 × 16 pixels, 500 test images. The teacher ({TEACHER}) trains "
    f"on all 1,297 training images. Every student ({STUDENT}) trains on {IMAGES} of them with "
    f"{LABEL_NOISE:.0%} wrong labels. This setting leaves room between student and teacher; it is not a "
    "benchmark. KD and DKD have their published hyperparameters for CIFAR-100."
)


def teacher(out: Path) -> RunConfig:
    """Returns the teacher's run, on all images with the right labels."""
    return get_recipe(f"digits.teacher.{TEACHER}").replace(epochs=8, out=out)


def student(method: str, seed: int, teacher_run: Path, out: Path) -> RunConfig:
    """Returns a student's run, on few images with noisy labels; method `none` has no teacher."""
    baseline = method == "none"
    config = get_recipe(f"digits.student.{STUDENT}" if baseline else f"digits.{method}.{TEACHER}_{STUDENT}")
    if not baseline:
        config = config.replace(teacher={"checkpoint": teacher_run})
    data = {"train_limit": IMAGES, "label_noise": LABEL_NOISE}
    return config.replace(data=data, epochs=15, seed=seed, out=out, log_every=5)
