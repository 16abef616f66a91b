"""Distillation in a module of Lightning, on scikit-learn's digits.

python examples/lightning_digits.py
"""

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import mdistiller
from mdistiller.integrations.lightning import DistillMixin


class Student(DistillMixin, lightning.LightningModule):
    """A student with its teacher and method; without a teacher it trains alone."""

    def __init__(self, student, teacher=None, method="none", **settings):
        super().__init__()
        self.distiller = mdistiller.Distiller(student, teacher, method, **settings)

    def configure_optimizers(self):
        """Returns the optimizer of student and method."""
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


def loaders(limit=None):
    """Returns loaders of training and test images [3, 16, 16] with labels."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).div(8).sub(1)[:, None].expand(-1, 3, -1, -1)
    images, labels = F.interpolate(images, 16), torch.tensor(digits.target)
    train, test = (
        TensorDataset(images[i][:limit], labels[i][:limit]) for i in (slice(1297), slice(1297, None))
    )
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(test, batch_size=256)


def main(epochs=4, limit=None):
    """Trains teacher and student; returns the student and its metrics on the test images."""
    lightning.seed_everything(0)
    train, test = loaders(limit)
    settings = {"accelerator": "auto", "logger": False, "enable_checkpointing": False}
    teacher = mdistiller.create_model("resnet20", num_classes=10)
    lightning.Trainer(max_epochs=epochs, **settings).fit(Student(teacher), train, test)

    student = Student(mdistiller.create_model("resnet8", num_classes=10), teacher, "dkd", beta=2.0)
    trainer = lightning.Trainer(max_epochs=epochs, **settings)
    trainer.fit(student, train, test)
    metrics = trainer.test(student, test)[0]
    return student, metrics


if __name__ == "__main__":
    main()
