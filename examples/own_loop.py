"""Distillation in a training loop of one's own, in plain PyTorch.

    python examples/own_loop.py

The teacher is trained here for a few epochs on scikit-learn's digits; a real one comes with its weights.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import mdistiller

BATCH = 64


def batches(images, labels):
    """Returns shuffled batches of one epoch."""
    return [(images[index], labels[index]) for index in torch.randperm(len(images)).split(BATCH)]


def accuracy(model, images, labels):
    """Computes the fraction of images whose likeliest class is the label."""
    model.eval()
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


def main(epochs=5):
    """Trains teacher and student; returns the losses of every step, and both accuracies."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).div(8).sub(1)[:, None].expand(-1, 3, -1, -1)
    images, labels = F.interpolate(images, 16), torch.tensor(digits.target)
    train, test = slice(0, 1297), slice(1297, None)

    teacher = mdistiller.create_model("resnet20", num_classes=10)
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.02, momentum=0.9)
    for _ in range(epochs):
        for inputs, target in batches(images[train], labels[train]):
            optimizer.zero_grad()
            F.cross_entropy(teacher(inputs), target).backward()
            optimizer.step()

    student = mdistiller.create_model("resnet8", num_classes=10)
    steps = -(-len(images[train]) // BATCH)
    distiller = mdistiller.Distiller(student, teacher, "dkd", beta=2.0, total_steps=epochs * steps)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.02, momentum=0.9)
    history = []
    for epoch in range(epochs):
        distiller.train()
        for inputs, target in batches(images[train], labels[train]):
            out = distiller(inputs, target)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            history.append({name: loss.item() for name, loss in out.losses.items()})
        top1 = accuracy(distiller.student, images[test], labels[test])
        print(f"epoch {epoch + 1}: loss {sum(history[-1].values()):.3f}, test accuracy {top1:.3f}")
    models = {"teacher": teacher, "student": distiller.student}
    result = {name: accuracy(model, images[test], labels[test]) for name, model in models.items()}
    print(result)
    return history, result


if __name__ == "__main__":
    main()
