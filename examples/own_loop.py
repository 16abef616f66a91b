"""Distillation in a training loop of one's own: `Distiller` gives named losses, the rest is plain PyTorch.

    python examples/own_loop.py

The teacher here is trained for a moment on scikit-learn's digits; yours comes with weights.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import mdistiller
from mdistiller.methods import DKDConfig


def batches(images, labels, size=64):
    for index in torch.randperm(len(images)).split(size):
        yield images[index], labels[index]


def accuracy(model, images, labels):
    model.eval()
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


def main(epochs=5):
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).div(8).sub(1)[:, None].expand(-1, 3, -1, -1)
    images, labels = F.interpolate(images, 16), torch.tensor(digits.target)
    train, test = slice(0, 1297), slice(1297, None)

    teacher = mdistiller.create_model("resnet20", num_classes=10)
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.02, momentum=0.9)
    for _ in range(epochs):
        teacher.train()
        for image, label in batches(images[train], labels[train]):
            optimizer.zero_grad()
            F.cross_entropy(teacher(image), label).backward()
            optimizer.step()

    student = mdistiller.create_model("resnet8", num_classes=10)
    distiller = mdistiller.Distiller(student, teacher, DKDConfig(beta=2.0))
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.02, momentum=0.9)
    history = []
    for epoch in range(epochs):
        distiller.train()
        for image, label in batches(images[train], labels[train]):
            losses = distiller(image, label, progress=epoch / epochs)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            history.append({name: loss.item() for name, loss in losses.items()})
        print(f"epoch {epoch + 1}: {history[-1]}")
    result = {
        name: accuracy(m, images[test], labels[test])
        for name, m in [("teacher", teacher), ("student", student)]
    }
    print(result)
    return history, result


if __name__ == "__main__":
    main()
