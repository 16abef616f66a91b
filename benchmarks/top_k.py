"""Error of the gradient where only a teacher's most likely classes are known.

    python benchmarks/top_k.py --data-root DIR --teacher FILE [--student FILE]

For the first images of CIFAR-100's test set, the gradient of KD and of DKD with respect to the student's
logits, with the teacher's K most likely classes completed by `StoredTeacher`, against the one with all.
Teacher and student are checkpoints of resnet56 and resnet20; without the latter the student is untrained.
"""

from pathlib import Path

import torch
from flags import read
from torch import Tensor, nn

import mdistiller
from mdistiller import StoredTeacher, functional
from mdistiller.data import Augment, AugmentConfig, DataConfig, load_data
from mdistiller.models import load_weights
from mdistiller.settings import Settings


class Command(Settings):
    """Print the error of the gradient by the number of known classes."""

    data_root: Path
    """Folder of CIFAR-100."""
    teacher: Path
    """Checkpoint of a resnet56."""
    student: Path | None = None
    """Checkpoint of a resnet20. None: random weights."""
    images: int = 2000
    """Number of images."""


def gradient(loss: str, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Returns the gradient of a loss with the paper's settings for CIFAR-100, [N, classes]."""
    leaf = student.clone().requires_grad_()
    if loss == "KD":
        value = functional.kd_loss(leaf, teacher, temperature=4.0)
    else:
        value = functional.dkd_loss(leaf, teacher, labels, alpha=1.0, beta=8.0, temperature=4.0)
    return torch.autograd.grad(value, leaf)[0]


def main(c: Command) -> None:
    """Prints a row for each K."""
    torch.manual_seed(0)
    data = DataConfig(kind="cifar100", root=c.data_root, train_limit=1, test_limit=c.images)
    splits = load_data(data)
    prepare = Augment(AugmentConfig(), splits.mean, splits.std, 100).eval()
    images, labels = prepare.normalize(splits.test.images), splits.test.labels
    outputs = []
    for name, file in (("resnet56", c.teacher), ("resnet20", c.student)):
        model: nn.Module = mdistiller.create_model(name, num_classes=100)
        if file is not None:
            load_weights(model, file)
        with torch.no_grad():
            outputs.append(torch.cat([model.eval()(part) for part in images.split(500)]))
    teacher, student = outputs
    print("| known classes | KD | DKD |\n| ---: | ---: | ---: |")
    for count in (1, 2, 5, 10, 20, 50):
        top = teacher.log_softmax(1).topk(count)
        stored = StoredTeacher({"top_log_probs": top.values, "top_ids": top.indices}, classes=100)
        errors = []
        for loss in ("KD", "DKD"):
            whole, part = (
                gradient(loss, student, logits, labels) for logits in (teacher, stored.stored.row_logits)
            )
            errors.append(f"{100 * (part - whole).norm() / whole.norm():.0f} %")
        print(f"| {count} | {' | '.join(errors)} |")


if __name__ == "__main__":
    main(read(Command))
