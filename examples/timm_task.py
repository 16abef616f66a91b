"""Distillation as a task of timm, in a loop in the style of its train.py, on scikit-learn's digits.

python examples/timm_task.py
"""

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import AverageMeter, accuracy

import mdistiller
from mdistiller.integrations.timm import DistillTask

BATCH = 64


def batches(images, labels):
    """Returns shuffled batches of one epoch, of one size."""
    parts = torch.randperm(len(images)).split(BATCH)
    return [(images[index], labels[index]) for index in parts if len(index) == BATCH]


def train(task, model, data, epochs, mixup=None):
    """Trains a task, as timm's script does."""
    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.02)
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=epochs)
    for epoch in range(epochs):
        task.train()
        meter = AverageMeter()
        for images, labels in batches(*data):
            if mixup is not None:
                images, labels = mixup(images, labels)
            result = task(images, labels)
            optimizer.zero_grad()
            result["loss"].backward()
            optimizer.step()
            meter.update(result["loss"].item(), len(images))
        scheduler.step(epoch + 1)
        print(f"epoch {epoch + 1}: loss {meter.avg:.3f}")


def main(epochs=4, limit=None):
    """Trains teacher and student; returns the task and the student's accuracy in percent."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).div(8).sub(1)[:, None].expand(-1, 3, -1, -1)
    images, labels = F.interpolate(images, 32), torch.tensor(digits.target)
    data, test = (images[:1297][:limit], labels[:1297][:limit]), (images[1297:], labels[1297:])

    teacher = timm.create_model("resnet10t", num_classes=10)
    train(ClassificationTask(teacher, torch.nn.CrossEntropyLoss(), verbose=False), teacher, data, epochs)

    student = timm.create_model("mobilenetv3_small_050", num_classes=10)
    steps = epochs * (len(data[0]) // BATCH)
    distiller = mdistiller.Distiller(student, teacher, "dkd", beta=2.0, total_steps=steps)
    task = DistillTask(distiller, verbose=False)
    mixup = Mixup(mixup_alpha=0.2, num_classes=10)
    train(task, task.get_trainable_module(), data, epochs, mixup)
    with torch.no_grad():
        top1 = accuracy(task.get_eval_model().eval()(test[0]), test[1])[0].item()
    print(f"student: accuracy {top1:.1f} %")
    return task, top1


if __name__ == "__main__":
    main()
