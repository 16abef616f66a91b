"""A pruned student: the weakest channels of a trained ResNet are cut, and the rest learns from a teacher.

    mdistiller train digits.student.resnet8 --out runs/alone
    python examples/pruned_student.py runs/alone pruned.pth 0.5
    mdistiller train digits.dkd.resnet20_pruned_resnet --plugin examples/pruned_student.py \
        --student.options base resnet8 keep 0.5 --student.checkpoint pruned.pth \
        --teacher.checkpoint runs/teacher --out runs/pruned
    mdistiller compare runs/alone runs/pruned --plugin examples/pruned_student.py

Channels between the two convolutions of a block are cut, those whose filters have the smallest sums of
magnitudes (Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017). The convolutions become smaller,
so file and time shrink with the channels; a mask of zeros would keep both. Every tap keeps its shape.
"""

import sys

import torch
from torch import nn

from mdistiller import create_model, load_student, register_model


def narrow(model, keep, *, trained=True):
    """Cuts the blocks of a CIFAR ResNet, in place, to a fraction of their inner channels.

    `trained` keeps the strongest filters with their weights; otherwise only the shapes matter.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep: got {keep}; allowed: above 0, up to 1")
    for block in model.modules():
        if not all(hasattr(block, name) for name in ("conv1", "bn1", "conv2")):
            continue
        first, norm, second = block.conv1, block.bn1, block.conv2
        count = max(1, round(keep * first.out_channels))
        strength = first.weight.detach().abs().sum((1, 2, 3))
        kept = strength.topk(count).indices.sort().values if trained else torch.arange(count)
        block.conv1 = smaller(first, first.weight[kept])
        block.conv2 = smaller(second, second.weight[:, kept])
        block.bn1 = nn.BatchNorm2d(count)
        state = {name: value[kept] if value.ndim else value for name, value in norm.state_dict().items()}
        block.bn1.load_state_dict(state)
    return model


def smaller(conv, weight):
    """Returns a convolution without bias that has a weight with fewer channels."""
    outputs, inputs = weight.shape[:2]
    new = nn.Conv2d(inputs, outputs, conv.kernel_size, conv.stride, conv.padding, bias=False)
    new.weight = nn.Parameter(weight.detach().clone())
    return new


@register_model
def pruned_resnet(num_classes, base="resnet8", keep=0.5):
    """Builds a CIFAR ResNet with the shapes of a pruned one."""
    return narrow(create_model(base, num_classes=num_classes), keep, trained=False)


def main(run, file, keep):
    """Writes the pruned weights of a run's student to a torch file; returns the numbers of parameters."""
    student = load_student(run)
    before = sum(p.numel() for p in student.parameters())
    torch.save({"model": narrow(student, keep).state_dict()}, file)
    after = sum(p.numel() for p in student.parameters())
    print(f"{before:,} parameters before, {after:,} after")
    return before, after


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
