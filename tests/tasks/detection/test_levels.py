"""Levels of two detectors are paired by stride, and the teacher's are sampled on the student's grids."""

import pytest
import torch
import torch.nn.functional as F
from tiny_detectors import batch, fcos, ssd, taught, training_pass, two_stage
from torchvision.models import detection
from torchvision.models.detection.image_list import ImageList

from mdistiller.errors import ConfigError
from mdistiller.functional import hcl_loss
from mdistiller.tasks.detection.adapter import Level
from mdistiller.tasks.detection.adapters import adapter_of
from mdistiller.tasks.detection.distiller import DetectionDistiller
from mdistiller.tasks.detection.levels import pair_levels, resample


def levels(**strides):
    return {name: Level(stride, 8) for name, stride in strides.items()}


def test_pairs_by_hand():
    faster, dense = levels(a=4, b=8, c=16, d=32, e=64), levels(A=8, B=16, C=32, D=64, E=128)
    assert pair_levels(dense, faster) == [("A", "b"), ("B", "c"), ("C", "d"), ("D", "e")]
    assert pair_levels(faster, dense) == [("b", "A"), ("c", "B"), ("d", "C"), ("e", "D")]
    mobile = levels(x=32, y=32, z=64)
    assert pair_levels(mobile, faster) == [("x", "d"), ("y", "d"), ("z", "e")]
    assert pair_levels(faster, mobile) == [("d", "y"), ("e", "z")]
    assert pair_levels(mobile, mobile) == [("x", "x"), ("y", "y"), ("z", "z")]
    # 300 pixels in 3 and in 1 cells: 128 and 256 are the nearest powers of two
    assert pair_levels(levels(p=60, q=100, r=300), dense) == [("p", "D"), ("q", "E")]
    with pytest.raises(ConfigError, match=r"the student's are a \(stride 4\), the teacher's b \(stride 8\)"):
        pair_levels(levels(a=4), levels(b=8))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fasterrcnn_resnet50_fpn", {"0": 4, "1": 8, "2": 16, "3": 32, "pool": 64}),
        ("fasterrcnn_mobilenet_v3_large_fpn", {"0": 32, "1": 32, "pool": 64}),
        ("retinanet_resnet50_fpn_v2", {"0": 8, "1": 16, "2": 32, "p6": 64, "p7": 128}),
        ("fcos_resnet50_fpn", {"0": 8, "1": 16, "2": 32, "p6": 64, "p7": 128}),
        ("ssd300_vgg16", {"0": 8, "1": 16, "2": 32, "3": 64, "4": 100, "5": 300}),
        ("ssdlite320_mobilenet_v3_large", {"0": 16, "1": 32, "2": 64, "3": 320 / 3, "4": 160, "5": 320}),
        ("keypointrcnn_resnet50_fpn", {"0": 4, "1": 8, "2": 16, "3": 32, "pool": 64}),
    ],
)
def test_strides_of_torchvisions_detectors(name, expected):
    with torch.device("meta"):
        model = getattr(detection, name)(weights=None, weights_backbone=None)
    assert {key: level.stride for key, level in adapter_of(model).levels.items()} == pytest.approx(expected)


def by_hand(model, images, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    """The levels of a model in evaluation, its images normalized and padded to multiples of 32 here."""
    canvas = torch.zeros(len(images), 3, *(-(-max(i.shape[d] for i in images) // 32) * 32 for d in (1, 2)))
    for place, image in zip(canvas, images, strict=True):
        mean_, std_ = (torch.tensor(v)[:, None, None] for v in (mean, std))
        place[:, : image.shape[1], : image.shape[2]] = (image - mean_) / std_
    with torch.no_grad():
        return dict(model.eval().backbone(canvas))


def losses_of(distiller, name):
    torch.manual_seed(0)
    return distiller.train()(*batch()).losses[name]


def features_of(student):
    torch.manual_seed(0)
    return training_pass(student)[1].features


def test_fcos_learns_from_faster_rcnn_at_equal_strides():
    """The teacher's strides are 4, 8 and 16, the student's 8, 16 and 32."""
    teacher = two_stage(seed=1, channels=16, stem=2)
    said = r"0 with 1 \(stride 8\), 1 with pool \(stride 16\); not compared: the student's pool \(stride 32\)"
    with pytest.warns(UserWarning, match=said + r" and the teacher's 0 \(stride 4\)"):
        distiller = DetectionDistiller(fcos(), teacher, "reviewkd")
    value = losses_of(distiller, "reviewkd")
    ours, theirs = features_of(fcos()), by_hand(teacher, batch()[0])
    first, second = distiller.method.fusions
    with torch.no_grad():
        deep, middle = second(ours["1"], None, theirs["pool"].shape[2:])
        fine, _ = first(ours["0"], middle, theirs["1"].shape[2:])
    assert fine.shape == theirs["1"].shape
    torch.testing.assert_close(value.detach(), hcl_loss([fine, deep], [theirs["1"], theirs["pool"]]))


def test_a_teacher_with_its_own_images():
    """At twice the size and with another normalization: two by two cells of its levels for each of ours."""
    options = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.2, 0.1]}
    teacher = two_stage(seed=1, channels=32, min_size=128, max_size=1000, _skip_resize=False, **options)
    distiller = DetectionDistiller(fcos(), teacher, "fitnet").train()
    assert distiller(*batch()).losses["fitnet"] > 0
    _, seen = training_pass(fcos())
    got = taught(teacher, batch()[0], seen, distiller.asked.taps, logits=False).features
    large = [F.interpolate(i[None], scale_factor=2, mode="bilinear")[0] for i in batch()[0]]
    # Normalization commutes with scaling.
    theirs = by_hand(teacher, large, options["image_mean"], options["image_std"])
    for name, size in (("0", (7, 7)), ("1", (3, 3))):  # cells that lie within both images
        assert got[name].shape[2:] == seen.features[name].shape[2:]
        want = F.avg_pool2d(theirs[name], 2)[:, :, : size[0], : size[1]]
        torch.testing.assert_close(got[name][:, :, : size[0], : size[1]], want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["reviewkd", "fitnet"])
def test_a_mobilenet_learns_from_a_resnet(method):
    """torchvision's own: three levels of strides 32, 32 and 64 against five of 4 to 64."""
    options = {"weights": None, "weights_backbone": None, "num_classes": 4, "min_size": 64, "max_size": 96}
    torch.manual_seed(0)
    student = detection.fasterrcnn_mobilenet_v3_large_fpn(**options, rpn_post_nms_top_n_train=20)
    teacher = detection.fasterrcnn_resnet50_fpn(**options)
    said = r"0 with 3 \(stride 32\), 1 with 3 \(stride 32\), pool with pool \(stride 64\); not compared: the"
    with pytest.warns(UserWarning, match=said):
        distiller = DetectionDistiller(student, teacher, method).train()
    seen = {}
    for name, model in (("ours", student), ("theirs", teacher)):
        keep = lambda module, args, levels, name=name: seen.update({name: dict(levels)})  # noqa: E731
        model.backbone.register_forward_hook(keep)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.005)
    history = []
    for _ in range(3):
        torch.manual_seed(0)
        out = distiller(*batch())
        optimizer.zero_grad()
        out.loss.backward()
        history.append(out.losses[method].item())
        if method == "fitnet":
            pairs = [("0", "3"), ("1", "3"), ("pool", "pool")]
            want = sum(
                F.mse_loss(regress(seen["ours"][s]), seen["theirs"][t])
                for regress, (s, t) in zip(distiller.method.regressors, pairs, strict=True)
            )
            assert history[-1] == pytest.approx(want.item(), rel=1e-4)
        optimizer.step()
    assert history[-1] < history[0]


def test_an_ssd_learns_from_faster_rcnn():
    distiller = DetectionDistiller(ssd(), two_stage(seed=1), "fitnet").train()
    assert distiller.method.student_taps == ("0", "1", "2")
    assert distiller.method.teacher_taps == ("0", "1", "pool")
    assert distiller(*batch()).losses["fitnet"] > 0
    assert DetectionDistiller(ssd(), ssd(seed=1), "dkd").train()(*batch()).losses["dkd"] > 0


def test_levels_that_are_named_are_resampled_to_the_students_grid():
    """The teacher's stride 8 on the student's grid of stride 16: the mean over two by two cells."""
    teacher = two_stage(seed=1)
    distiller = DetectionDistiller(fcos(), teacher, "fitnet", student_taps=("1",), teacher_taps=("0",))
    value = losses_of(distiller, "fitnet").detach()
    (regress,) = distiller.method.regressors
    target = F.avg_pool2d(by_hand(teacher, batch()[0])["0"], 2)
    with torch.no_grad():
        want = F.mse_loss(regress(features_of(fcos())["1"]), target)
    assert value.item() == pytest.approx(want.item(), rel=1e-4)
    two = {"student_taps": ("0", "1"), "teacher_taps": ("0", "0")}
    with pytest.raises(
        ConfigError, match="level '0' is compared with the student's '0' and '1', of strides 8 and 16"
    ):
        DetectionDistiller(fcos(), teacher, "fitnet", **two)


def test_resampling_to_a_coarser_and_to_the_same_grid():
    generator = torch.Generator().manual_seed(0)
    feature = torch.randn(1, 2, 8, 12, generator=generator)
    images = ImageList(torch.zeros(1, 3, 64, 96), [(64, 96)])
    assert resample(feature, 8.0, images, feature.shape[2:], 8.0, images) is feature
    quarter = resample(feature, 8.0, images, torch.Size((2, 3)), 32.0, images)
    torch.testing.assert_close(quarter, F.avg_pool2d(feature, 4))
    half = ImageList(torch.zeros(1, 3, 32, 48), [(32, 48)])  # the same images at half the size
    got = resample(feature, 8.0, images, torch.Size((4, 6)), 8.0, half)
    torch.testing.assert_close(got, F.avg_pool2d(feature, 2))
