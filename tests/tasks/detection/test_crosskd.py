"""CrossKD: the teacher's head on the student's maps, layer by layer by hand."""

import pytest
import torch
from tiny_detectors import batch, fcos, one_stage, taught, training_pass, two_stage
from torch import nn

from mdistiller.errors import ConfigError
from mdistiller.tasks.detection.adapters import adapter_of
from mdistiller.tasks.detection.dense_methods import bckd_loss, crosskd_box_loss
from mdistiller.tasks.detection.distiller import DetectionDistiller


def in_order(head):
    """The layers of a head's convolutions, and the places of its activations."""
    layers = [m for m in head.conv.modules() if not list(m.children())]
    return layers, [i for i, m in enumerate(layers) if isinstance(m, nn.ReLU)]


def run(layers, x):
    for layer in layers:
        x = layer(x.clone())  # activations work in place
    return x


def predictions(branch, last, student, teacher, ours, theirs, hold):
    """Predictions [B · A, 4] of the teacher's head on the student's maps: as many classes as coordinates."""
    layers, places = in_order(getattr(student.head, branch))
    rest, _ = in_order(getattr(teacher.head, branch))
    cut, found = places[hold - 1], []
    for s, t in zip(ours.values(), theirs.values(), strict=True):
        held, target = run(layers[:cut], s), run(rest[:cut], t)
        for c in range(held.shape[1]):  # the teacher's mean and deviation for each channel
            channel, wanted = held[:, c].clone(), target[:, c]
            held[:, c] = (channel - channel.mean()) / channel.std() * wanted.std() + wanted.mean()
        out = getattr(getattr(teacher.head, branch), last)(run(rest[cut + 1 :], held.relu()))
        b, _, h, w = out.shape
        found.append(out.view(b, -1, 4, h, w).permute(0, 3, 4, 1, 2).reshape(b, -1, 4))
    return torch.cat(found, 1).flatten(0, 1)


@pytest.mark.parametrize("make", [one_stage, fcos])
@pytest.mark.parametrize("hold", [1, 3])
def test_against_the_layers_by_hand(make, hold):
    teacher = make(seed=1)
    settings = {"weight": 1, "box_weight": 1, "hold": hold}
    losses = DetectionDistiller(make(), teacher, "crosskd", **settings).train()(*batch()).losses
    _, seen = training_pass(make())
    own = taught(make(seed=1), batch()[0], seen, {"boxes": "boxes"}, logits=True)
    with torch.no_grad():
        levels = teacher.eval().backbone(adapter_of(teacher).prepare(batch()[0]).tensors)
        both = make(), teacher, seen.features, levels, hold
        logits = predictions("classification_head", "cls_logits", *both)
        offsets = predictions("regression_head", "bbox_reg", *both)
        offsets = offsets.relu() if make is fcos else offsets
        coder = teacher.box_coder
        decode = getattr(coder, "decode_single", coder.decode)
        boxes = decode(offsets, torch.cat(seen.anchors))
    keep, count = seen.labels != -100, (seen.labels > 0).sum()
    want = bckd_loss(logits[keep], own.logits[keep], count)
    torch.testing.assert_close(losses["crosskd"].detach(), want, rtol=1e-4, atol=1e-6)
    want = crosskd_box_loss(boxes[keep], own.features["boxes"][keep], own.logits[keep], count)
    torch.testing.assert_close(losses["crosskd_boxes"].detach(), want, rtol=1e-3, atol=1e-6)


def test_the_students_maps_learn_and_the_teacher_does_not():
    student, teacher = fcos(), fcos(seed=1)
    distiller = DetectionDistiller(student, teacher, "crosskd").train()
    out = distiller(*batch())
    (out.losses["crosskd"] + out.losses["crosskd_boxes"]).backward()
    assert all(p.grad is None for p in teacher.parameters())
    head = student.head.classification_head
    layers, places = in_order(head)
    assert all(p.grad.any() for layer in layers[: places[1]] for p in layer.parameters())
    assert head.cls_logits.weight.grad is None  # learns from the labels alone
    with torch.autocast("cpu", torch.bfloat16):
        losses = distiller(*batch()).losses
    assert losses["crosskd"].dtype == losses["crosskd_boxes"].dtype == torch.float32


def test_what_is_refused():
    with pytest.raises(ConfigError, match="a sigmoid for each class"):
        DetectionDistiller(two_stage(), two_stage(seed=1), "crosskd")
    with pytest.raises(ConfigError, match=r"method.hold: got 7; allowed in these detectors: 1 to 4"):
        DetectionDistiller(fcos(), fcos(seed=1), "crosskd", hold=7).train()(*batch())
    with pytest.raises(ConfigError, match="maps of one shape"):
        DetectionDistiller(fcos(), fcos(seed=1, channels=64), "crosskd").train()(*batch())
    assert DetectionDistiller(fcos(), fcos(seed=1), "crosskd+pkd").train()(*batch()).losses["crosskd"] > 0
