"""What is read from a detector in its training pass, and the teacher on the student's proposals."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from tiny_detectors import CLASSES, LEVELS, batch, fcos, one_stage, ssd, taught, training_pass, two_stage
from torch import nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import sigmoid_focal_loss

from mdistiller.errors import ConfigError, TapError
from mdistiller.tasks.detection.adapter import DetectorPass, Level, float32_coordinates
from mdistiller.tasks.detection.adapters import adapter_of
from mdistiller.tasks.detection.coco import DetectionBatch
from mdistiller.tasks.detection.distiller import DetectionDistiller, DetectionTeacher, outputs_of, overlaps
from mdistiller.tasks.detection.levels import Pyramid

SAME = {name: name for name in LEVELS}
"""Taps of a teacher, on the grids of the student's levels of the same names."""


def run(model, masks=False, seed=0):
    torch.manual_seed(seed)
    return training_pass(model, masks)


def test_the_detectors_own_losses():
    model = two_stage()
    torch.manual_seed(5)
    expected = model.train()(*batch())
    losses, _ = run(model, seed=5)
    assert losses.keys() == expected.keys()
    assert all(torch.equal(losses[name], expected[name]) for name in losses)


@pytest.mark.parametrize("masks", [False, True])
def test_logits_labels_and_proposals_are_those_of_the_box_loss(masks):
    model = two_stage(masks=masks)
    losses, seen = run(model, masks)
    assert seen.logits.shape == (sum(len(p) for p in seen.proposals), CLASSES)
    # torchvision's classification loss is the cross-entropy of exactly these.
    assert torch.equal(F.cross_entropy(seen.logits, seen.labels), losses["loss_classifier"])
    assert {1, 3, 0} == set(seen.labels.tolist())  # objects of both kinds and background
    counts = [len(p) for p in seen.proposals]
    assert not seen.labels[counts[0] :].any()  # the second image has no object
    assert list(seen.features) == list(LEVELS)


@pytest.mark.parametrize("make", [one_stage, fcos])
def test_one_stage(make):
    """The labels are the targets of the detector's own loss, which is computed from them here."""
    losses, seen = run(make())
    assert seen.proposals is None
    assert seen.logits.shape == (2 * len(seen.anchors[0]), CLASSES)
    kept = seen.labels != -100
    targets = F.one_hot(seen.labels.clamp(min=0), CLASSES).float()
    targets[:, 0] = 0  # the column of the background has no positive
    focal = sigmoid_focal_loss(seen.logits[kept], targets[kept], reduction="none").sum(1)
    first = focal[: int(kept[: len(seen.anchors[0])].sum())].sum()
    found = (seen.labels > 0).sum()
    # RetinaNet divides each image's sum by the image's own number of objects.
    expected = focal.sum() / found if make is fcos else (first / found + (focal.sum() - first)) / 2
    torch.testing.assert_close(losses["classification"], expected)
    assert {1, 3} == set(seen.labels[seen.labels > 0].tolist())


def test_the_rows_of_an_ssd_are_those_of_its_loss():
    """Objects and the hardest negatives, three for each: torchvision's loss is the sum over exactly these."""
    losses, seen = run(ssd())
    objects = int((seen.labels > 0).sum())
    assert len(seen.labels) == 4 * objects < 2 * len(seen.anchors[0])
    total = F.cross_entropy(seen.logits, seen.labels, reduction="sum")
    torch.testing.assert_close(total / objects, losses["classification"])
    got = taught(ssd(seed=1), batch()[0], seen, {}, logits=True)
    assert got.logits.shape == seen.logits.shape


@pytest.mark.parametrize("make", [one_stage, fcos, ssd])
def test_boxes_of_student_and_teacher(make):
    """Equal detectors have equal boxes; they are those that torchvision decodes at its best anchors."""
    adapter = adapter_of(make())
    for module in adapter.model.modules():
        module.training = not isinstance(module, nn.BatchNorm2d)
    _, seen = adapter.train(*batch())
    boxes = outputs_of(adapter, seen, ["boxes"]).features["boxes"]
    assert boxes.shape == (2 * len(seen.anchors[0]), 4)
    assert boxes.requires_grad
    got = taught(make(), batch()[0], seen, {"boxes": "boxes"}, logits=False).features["boxes"]
    torch.testing.assert_close(got, boxes)
    assert not got.requires_grad


def test_nothing_stays_after_a_pass():
    model = two_stage()
    training_pass(model)
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(AssertionError, match="boxes"):
        adapter_of(model).train(batch()[0], [{"boxes": torch.zeros(1, 3)}] * 2)
    assert not any(m._forward_hooks for m in model.modules())


def test_state_dict_is_the_detectors_own():
    model = two_stage()
    keys = list(model.state_dict())
    distiller = DetectionDistiller(model, None, "none")
    assert list(distiller.student.state_dict()) == keys
    assert list(distiller.state_dict()) == [f"student.{key}" for key in keys]
    distiller.student.load_state_dict(two_stage(seed=1).state_dict())
    assert torch.equal(model.roi_heads.box_head.fc6.weight, two_stage(seed=1).roi_heads.box_head.fc6.weight)


def test_copies_and_pickles_are_read_too():
    model = two_stage()
    run(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        losses, seen = run(other)
        assert torch.equal(F.cross_entropy(seen.logits, seen.labels), losses["loss_classifier"])


class Renamed(type(two_stage())):
    """A user's detector whose pass goes its own way."""

    def forward(self, images, targets=None):
        losses = super().forward(images, targets)
        return {name: 2 * value for name, value in losses.items()} if self.training else losses


class Lazy(type(two_stage())):
    def forward(self, images, targets=None):
        return {}


def test_a_users_own_detector():
    model = two_stage()
    model.__class__ = Renamed
    losses, seen = run(model)
    torch.testing.assert_close(2 * F.cross_entropy(seen.logits, seen.labels), losses["loss_classifier"])
    model.__class__ = Lazy
    with pytest.raises(TapError, match="'transform' did not run"):
        run(model)


def test_what_is_no_detector():
    kinds = [(a.has_proposals, a.activation) for a in map(adapter_of, (two_stage(), fcos(), ssd()))]
    assert kinds == [(True, "softmax"), (False, "sigmoid"), (False, "softmax")]
    with pytest.raises(ConfigError, match="Linear is no detector"):
        adapter_of(nn.Linear(1, 1))
    model = nn.Linear(1, 1)
    model.detector_adapter = nn.Linear
    with pytest.raises(ConfigError, match=r"Linear\.detector_adapter: got .*allowed: a subclass"):
        adapter_of(model)


def test_pyramid_names_its_levels():
    levels = adapter_of(two_stage()).levels
    assert levels == dict(zip(LEVELS, [Level(8, 8), Level(16, 8), Level(32, 8)], strict=True))
    pyramid = Pyramid(levels)
    assert pyramid.names == LEVELS
    assert pyramid(torch.zeros(2, 3, 64, 64)).shape == (2, 2)
    assert adapter_of(ssd()).levels == {"0": (8, 8), "1": (16, 8), "2": (32, 16)}


def snapshot(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


@pytest.mark.parametrize("make", [two_stage, one_stage])
def test_the_teacher_is_frozen_and_stays_bit_for_bit(make):
    _, seen = run(make())
    model = make(seed=1).train()
    before, modes = snapshot(model), [m.training for m in model.modules()]
    teacher = DetectionTeacher(model, SAME, logits=True).train()
    model.backbone.register_forward_hook(lambda module, args, output: assert_evaluates(model))
    images, targets = batch()
    outputs = teacher(DetectionBatch(images, targets, torch.arange(2)), seen)
    assert not outputs.logits.requires_grad
    assert not any(f.requires_grad for f in outputs.features.values())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    # The model itself stays as it was handed over.
    assert [m.training for m in model.modules()] == modes
    assert all(p.requires_grad for p in model.parameters())


def assert_evaluates(model):
    assert not any(m.training for m in model.modules())
    assert not torch.is_grad_enabled()


def test_a_teacher_equal_to_the_student_gives_the_students_outputs():
    student = two_stage()
    teacher = copy.deepcopy(student)
    for module in student.modules():  # the same statistics in training, for the comparison
        if isinstance(module, nn.BatchNorm2d):
            module.momentum, module.track_running_stats = 0.0, False
            module.forward = lambda x, m=module: F.batch_norm(
                x, m.running_mean, m.running_var, m.weight, m.bias
            )
    _, seen = run(student)
    outputs = taught(teacher, batch()[0], seen, SAME, logits=True)
    torch.testing.assert_close(outputs.logits, seen.logits)
    for name in LEVELS:
        torch.testing.assert_close(outputs.features[name], seen.features[name])


def test_the_teacher_normalizes_its_own_way():
    _, seen = run(two_stage())
    ordinary, other = (
        two_stage(seed=1),
        two_stage(seed=1, image_mean=[0.1, 0.2, 0.3], image_std=[2.0, 3.0, 4.0]),
    )
    images = batch()[0]
    got = taught(other, images, seen, SAME, logits=True)
    # Images changed such that the ordinary normalization gives what the other one gives.
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    mine, scale = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([2.0, 3.0, 4.0])
    changed = [
        (i - mine[:, None, None]) / scale[:, None, None] * std[:, None, None] + mean[:, None, None]
        for i in images
    ]
    want = taught(ordinary, changed, seen, SAME, logits=True)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-5)
    plain = taught(ordinary, images, seen, SAME, logits=True)
    assert not torch.allclose(got.logits, plain.logits, atol=1e-3)


def test_a_teacher_that_scales_images_gets_the_proposals_scaled():
    """Against the teacher run by hand at twice the size, with proposals twice as large."""
    _, seen = run(two_stage())
    model = two_stage(seed=1, min_size=128, max_size=1000, _skip_resize=False).eval()
    images = batch()[0]
    got = taught(model, images, seen, SAME, logits=True)
    with torch.no_grad():
        own, _ = model.transform(images)
        assert own.image_sizes == [(128, 160), (144, 128)]
        features = model.backbone(own.tensors)
        pooled = model.roi_heads.box_roi_pool(features, [2 * p for p in seen.proposals], own.image_sizes)
        want, _ = model.roi_heads.box_predictor(model.roi_heads.box_head(pooled))
    torch.testing.assert_close(got.logits, want)
    # Its levels come in the student's geometry: where it has twice the cells, two by two averaged.
    assert [f.shape[2:] for f in got.features.values()] == [f.shape[2:] for f in seen.features.values()]
    averaged = F.avg_pool2d(features["0"], 2)
    torch.testing.assert_close(got.features["0"][:, :, :10, :10], averaged, rtol=1e-4, atol=1e-5)


def test_levels_are_aligned_where_each_image_has_its_own_scale():
    """A teacher whose feature is the pixels: its level must show each image as the student's grid lies."""

    class Pixels(nn.Module):
        out_channels = 3

        def forward(self, x):
            return {"0": F.avg_pool2d(x, 8)}

    model = two_stage(min_size=96, max_size=96, _skip_resize=False, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    model.backbone = Pixels()

    def ramp(h, w):
        x, y = torch.arange(w).expand(h, w) / w, torch.arange(h)[:, None].expand(h, w) / h
        return torch.stack([x, y, torch.ones(h, w)])

    images = [ramp(64, 128), ramp(80, 64)]
    canvas = torch.zeros(2, 3, 96, 128)
    canvas[0, :, :64], canvas[1, :, :80, :64] = images
    want = F.avg_pool2d(canvas, 8)
    seen = DetectorPass(
        ImageList(canvas, [(64, 128), (80, 64)]),
        *({"0": want}, {"0": 8.0}, torch.zeros(0), torch.zeros(0), [], [], (1,)),
    )
    got = taught(model, images, seen, {"0": "0"}, logits=False).features["0"]
    inside = [(slice(1, 7), slice(1, 15)), (slice(1, 9), slice(1, 7))]
    for image, (rows, columns) in enumerate(inside):
        assert (got - want)[image, :, rows, columns].abs().max() < 0.02


def test_students_and_teachers_with_other_anchors():
    _, seen = run(fcos())
    with pytest.raises(ConfigError, match="anchor by anchor"):
        taught(one_stage(), batch()[0], seen, {}, logits=True)


def test_overlaps_against_a_loop():
    _, seen = run(two_stage())
    got = overlaps(seen)
    (grid0, grid1, grid2) = [f.shape[2:] for f in seen.features.values()]
    assert [v.shape for v in got.values()] == [(2, 1, *g) for g in (grid0, grid1, grid2)]

    def iou(a, b):
        w = min(a[2], b[2]) - max(a[0], b[0])
        h = min(a[3], b[3]) - max(a[1], b[1])
        inter = max(w, 0) * max(h, 0)
        return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)

    anchors, boxes = seen.anchors[0].tolist(), seen.objects[0].tolist()
    best = [max(iou(box, anchor) for anchor in anchors) for box in boxes]
    at = 0
    for name, (h, w) in zip(LEVELS, (grid0, grid1, grid2), strict=True):
        for y in range(h):
            for x in range(w):
                here = anchors[at : at + 3]
                want = max(
                    iou(box, anchor) / b for anchor in here for box, b in zip(boxes, best, strict=True)
                )
                assert got[f"{name}.overlap"][0, 0, y, x].item() == pytest.approx(want, abs=1e-5)
                at += 3
    assert at == len(anchors)
    assert not any(v[1].any() for v in got.values())  # no object there
    assert max(v.max().item() for v in got.values()) == 1


@pytest.mark.parametrize("make", [two_stage, one_stage, fcos])
def test_coordinates_stay_float32_under_autocast(make):
    """torchvision by itself would round anchors and boxes to bfloat16's eight bits."""
    _, plain = run(make())
    with torch.autocast("cpu", torch.bfloat16):
        _, seen = run(make())
        outputs = taught(make(seed=1), batch()[0], seen, {"0": "0"}, logits=True)
    assert seen.anchors[0].dtype == seen.logits.dtype == seen.features["0"].dtype == torch.float32
    assert torch.equal(seen.anchors[0], plain.anchors[0])
    assert outputs.logits.dtype == torch.float32
    boxes = torch.cat(seen.proposals) if seen.proposals is not None else None
    model = make().eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), float32_coordinates(model):
        found = torch.cat([f["boxes"] for f in model(batch()[0])])
    for values in (found, boxes):
        if values is not None:
            assert values.dtype == torch.float32
            assert not torch.equal(values, values.bfloat16().float())
    assert not any(m._forward_hooks for m in model.modules())


def test_levels_stay_as_they_are_whatever_their_shape():
    """8 channels, 8 rows, 12 columns: what tokens of a transformer may look like, and a level too."""
    image = torch.rand(3, 64, 96)
    distiller = DetectionDistiller(two_stage(), two_stage(seed=1), "fitnet+fgfi").train()
    target = {"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([1])}
    assert distiller([image], [target]).losses["fitnet"].isfinite()
