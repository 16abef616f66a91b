"""Loss values against numpy, the methods that detectors take, and what is refused."""

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_detectors import LEVELS, batch, fcos, one_stage, ssd, taught, training_pass, two_stage
from torchvision.models.detection.anchor_utils import AnchorGenerator

from mdistiller.errors import ConfigError, UnknownNameError
from mdistiller.functional import dkd_loss, hcl_loss, kd_loss
from mdistiller.methods import DKDConfig, KDConfig
from mdistiller.tasks.detection.adapter import DetectorAdapter
from mdistiller.tasks.detection.adapters import DenseAdapter, adapter_of
from mdistiller.tasks.detection.dense_methods import BCKDConfig, bckd_box_loss, bckd_loss
from mdistiller.tasks.detection.distiller import DetectionDistiller, outputs_of, overlaps
from mdistiller.tasks.detection.level_methods import FGFIConfig, fgfi_loss
from mdistiller.tasks.detection.methods import (
    build_method,
    default_config,
    get_method,
    list_detection_methods,
    reads_logits,
)


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def kl(p, q):
    return (p * np.log(p / q)).sum(1)


def pair(method, make=two_stage, seed=0, **teacher):
    """Losses of one step, and the two sides' outputs of a repetition of it."""
    torch.manual_seed(9)
    distiller = DetectionDistiller(make(), make(seed=1, **teacher), method).train()
    torch.manual_seed(seed)
    losses = distiller(*batch()).losses
    student = make()
    torch.manual_seed(seed)
    _, seen = training_pass(student)
    theirs = taught(make(seed=1, **teacher), batch()[0], seen, {n: n for n in LEVELS}, logits=True)
    return losses, seen, theirs, distiller


def test_kd_is_the_divergence_on_the_sampled_proposals():
    losses, seen, theirs, _ = pair("kd")
    s, t = softmax(seen.logits.detach().double().numpy()), softmax(theirs.logits.double().numpy())
    assert losses["kd"].item() == pytest.approx(kl(t, s).mean(), rel=1e-5)
    assert torch.equal(losses["kd"], kd_loss(seen.logits, theirs.logits, temperature=1.0))


def test_dkd_with_the_background_as_a_class():
    losses, seen, theirs, _ = pair("dkd")
    s, t = softmax(seen.logits.detach().double().numpy()), softmax(theirs.logits.double().numpy())
    target = seen.labels.numpy()
    rows = np.arange(len(target))
    assert (target == 0).any()
    two = [np.stack([p[rows, target], 1 - p[rows, target]], 1) for p in (t, s)]
    rest = [np.stack([np.delete(r, k) for r, k in zip(p, target, strict=True)]) for p in (t, s)]
    rest = [r / r.sum(1, keepdims=True) for r in rest]
    want = (1.0 * kl(*two) + 0.25 * kl(*rest)).mean()
    assert losses["dkd"].item() == pytest.approx(want, rel=1e-4)
    again = dkd_loss(seen.logits, theirs.logits, seen.labels, alpha=1.0, beta=0.25, temperature=1.0)
    assert torch.equal(losses["dkd"], again)


def test_fitnet_over_the_levels():
    losses, seen, theirs, distiller = pair("fitnet")
    want = sum(
        F.mse_loss(regress(seen.features[name]), theirs.features[name])
        for name, regress in zip(LEVELS, distiller.method.regressors, strict=True)
    )
    torch.testing.assert_close(losses["fitnet"], want)
    assert losses["fitnet"] > 0


def test_reviewkd_over_the_levels():
    losses, seen, theirs, distiller = pair("reviewkd")
    reviewed, deeper = [], None
    for name, fusion in reversed(list(zip(LEVELS, distiller.method.fusions, strict=True))):
        out, deeper = fusion(seen.features[name], deeper, theirs.features[name].shape[2:])
        reviewed.insert(0, out)
    torch.testing.assert_close(losses["reviewkd"], hcl_loss(reviewed, [theirs.features[n] for n in LEVELS]))


def test_fgfi_loss_against_numpy():
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 5, 6, 7), (2, 5, 3, 4)]
    s, t = ([torch.randn(*shape, generator=generator) for shape in shapes] for _ in range(2))
    masks = [torch.rand(2, 1, *shape[2:], generator=generator) > 0.6 for shape in shapes]
    total = sum(
        ((a.double().numpy() - b.double().numpy()) ** 2)[np.broadcast_to(m.numpy(), a.shape)].sum()
        for a, b, m in zip(s, t, masks, strict=True)
    )
    count = sum(m.numpy().sum() for m in masks)
    assert fgfi_loss(s, t, masks).item() == pytest.approx(total / (2 * count), rel=1e-5)
    assert fgfi_loss(s, t, [m & False for m in masks]).item() == 0
    with pytest.raises(ConfigError, match="one shape"):
        fgfi_loss(s, t, masks[::-1])


def test_fgfi_counts_the_positions_near_objects_alone():
    losses, seen, theirs, distiller = pair(FGFIConfig(weight=1.0))
    method = distiller.method
    assert method.student_taps == (*LEVELS, *(f"{n}.overlap" for n in LEVELS))
    near = [value > 0.5 for value in overlaps(seen).values()]
    assert 0 < sum(int(m.sum()) for m in near) < sum(m.numel() for m in near) / 2
    adapted = [adapt(seen.features[n]) for adapt, n in zip(method.adapters, LEVELS, strict=True)]
    torch.testing.assert_close(losses["fgfi"], fgfi_loss(adapted, [theirs.features[n] for n in LEVELS], near))


def giou(a, b):
    """Generalised IoU of pairs of boxes."""
    area = lambda x: (x[:, 2] - x[:, 0]) * (x[:, 3] - x[:, 1])  # noqa: E731
    inner = np.concatenate([np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, 2:], b[:, 2:])], 1)
    outer = np.concatenate([np.minimum(a[:, :2], b[:, :2]), np.maximum(a[:, 2:], b[:, 2:])], 1)
    common = np.where((inner[:, 2:] > inner[:, :2]).all(1), area(inner), 0)
    union = area(a) + area(b) - common
    return common / union - (area(outer) - union) / area(outer)


def test_bckd_against_numpy_and_at_the_edges():
    generator = torch.Generator().manual_seed(0)
    s, t = torch.randn(20, 3, generator=generator), torch.randn(20, 3, generator=generator)
    p, q = (1 / (1 + np.exp(-z.double().numpy())) for z in (s, t))
    terms = np.abs(q - p) * -(q * np.log(p) + (1 - q) * np.log(1 - p))
    assert bckd_loss(s, t, 7).item() == pytest.approx(terms.sum() / 7, rel=1e-5)
    assert bckd_loss(s, t, 0).item() == pytest.approx(terms.sum(), rel=1e-5)
    assert bckd_loss(t, t, 1).item() == 0
    corners = 20 * torch.rand(2, 20, 2, generator=generator)
    a, b = (torch.cat([c, c + 5 + 10 * torch.rand(20, 2, generator=generator)], 1) for c in corners)
    want = (np.abs(q - p).max(1) * (1 - giou(a.double().numpy(), b.double().numpy()))).sum() / 7
    assert bckd_box_loss(a, b, s, t, 7).item() == pytest.approx(want, rel=1e-5)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        big = (1e4 * s).to(dtype).requires_grad_()
        loss = bckd_loss(big, (-1e4 * s).to(dtype), 1)
        loss.backward()
        assert loss.isfinite()
        assert big.grad.isfinite().all()
    with pytest.raises(ConfigError, match="one shape"):
        bckd_loss(s, t[:, :2], 1)


def test_bckd_on_all_anchors():
    """By the number of anchors that are objects; those that count as neither are left out."""
    losses, seen, theirs, _ = pair("bckd", one_stage)
    keep, count = seen.labels != -100, (seen.labels > 0).sum()
    logits = seen.logits[keep], theirs.logits[keep]
    torch.testing.assert_close(losses["bckd"], bckd_loss(*logits, count))
    boxes = outputs_of(adapter_of(one_stage()), seen, ["boxes"]).features["boxes"]
    own = taught(one_stage(seed=1), batch()[0], seen, {"boxes": "boxes"}, logits=False).features["boxes"]
    want = 4 * bckd_box_loss(boxes[keep], own[keep], *logits, count)
    torch.testing.assert_close(losses["bckd_boxes"], want)
    assert list(pair(BCKDConfig(box_weight=0.0), one_stage)[0])[-1] == "bckd"


def test_a_sum_has_the_parts_losses_and_the_detectors_once():
    losses, *_ = pair("dkd+reviewkd")
    dkd, *_ = pair("dkd")
    assert list(losses) == [
        "loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg", "dkd", "reviewkd",
    ]  # fmt: skip
    assert torch.equal(losses["dkd"], dkd["dkd"])
    assert all(torch.equal(losses[name], dkd[name]) for name in dkd)


def test_the_task_weight_is_of_the_detectors_losses():
    full, *_ = pair(KDConfig(task_weight=1.0))
    half, *_ = pair(KDConfig(task_weight=0.5))
    for name, value in full.items():
        torch.testing.assert_close(half[name], value if name == "kd" else value / 2)


def test_defaults_are_the_papers():
    dkd = default_config("dkd")
    assert (dkd.alpha, dkd.beta, dkd.temperature, dkd.warmup, dkd.task_weight) == (1.0, 0.25, 1.0, 0.0, 1.0)
    both = default_config("dkd+reviewkd")
    assert (both.dkd.beta, both.dkd.task_weight, both.reviewkd.warmup) == (0.25, 0.0, 0.0)
    kd = default_config("kd")
    assert (kd.task_weight, kd.weight, kd.temperature) == (1.0, 1.0, 1.0)
    assert default_config("fgfi").weight == 0.01
    assert DKDConfig().beta == 8.0  # classification's own stay


def test_the_list_of_methods():
    names = list_detection_methods()
    assert {"none", "kd", "dkd", "fitnet", "fgfi", "reviewkd", "bckd"} <= set(names)
    assert "crd" not in names
    assert names == sorted(names)
    assert get_method("dkd").Config is DKDConfig


def test_a_sum_is_pickled():
    config = default_config("dkd+fgfi+fitnet")
    method = build_method(config, two_stage(), two_stage(seed=1))
    again = pickle.loads(pickle.dumps(method))
    assert (again.name, again.config) == ("dkd+fgfi+fitnet", config)
    assert again.student_taps == method.student_taps
    assert all(map(torch.equal, again.state_dict().values(), method.state_dict().values()))


def test_which_methods_read_logits():
    for name, wanted in (("kd", True), ("fitnet", False), ("kd+fgfi", True), ("fgfi+fitnet", False)):
        method = build_method(default_config(name), two_stage(), two_stage(seed=1))
        assert reads_logits(method) == wanted
    assert not reads_logits(build_method(default_config("none"), two_stage(), None))


def test_levels_by_name_where_the_numbers_differ():
    """Detectors with another number of levels take a choice of them, and say so without one."""
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    teacher = two_stage(seed=1)
    body = teacher.backbone.body
    teacher.backbone = BackboneWithFPN(body, {"one": "0", "two": "1"}, [8, 8], 8)
    teacher.backbone.fpn.extra_blocks = None
    with pytest.warns(UserWarning, match=r"0 with 0 .*, 1 with 1 .*not compared: the student's pool"):
        DetectionDistiller(two_stage(), teacher, "fitnet")
    chosen = DetectionDistiller(
        two_stage(), teacher, "fitnet", student_taps=("0", "1"), teacher_taps=("0", "1")
    )
    assert chosen.train()(*batch()).losses["fitnet"] > 0


def test_what_is_refused():
    with pytest.raises(UnknownNameError, match=r"unknown method for detectors 'crd'.*it reads other taps"):
        get_method("crd")
    with pytest.raises(UnknownNameError, match="nearest: fgfi"):
        get_method("kd+fgfy")
    with pytest.raises(ConfigError, match="each part may appear once"):
        get_method("kd+kd")
    with pytest.raises(ConfigError, match="needs a teacher"):
        DetectionDistiller(two_stage(), None, "kd")
    with pytest.raises(ConfigError, match="use 'bckd'"):
        DetectionDistiller(one_stage(), one_stage(), "dkd")
    with pytest.raises(ConfigError, match=r"'bckd' compares a sigmoid for each class; .*use 'kd' or 'dkd'"):
        DetectionDistiller(two_stage(), two_stage(), "bckd")
    with pytest.raises(ConfigError, match="the student's are of a softmax, the teacher's of a sigmoid"):
        DetectionDistiller(ssd(), fcos(), "dkd")
    with pytest.raises(ConfigError, match="only one of the detectors has proposals"):
        DetectionDistiller(two_stage(), fcos(), "dkd")
    built = build_method(default_config("kd"), two_stage(), two_stage(seed=1))
    for method in ("kd", {"name": "kd"}, KDConfig(), built):
        with pytest.raises(ConfigError, match="label_smoothing"):
            DetectionDistiller(two_stage(), two_stage(), method, label_smoothing=0.1)
    with pytest.raises(ConfigError, match=r"one shape \[B, C\]"):
        DetectionDistiller(two_stage(), two_stage(classes=7), "kd").train()(*batch())
    with pytest.raises(ConfigError, match="call train"):
        DetectionDistiller(two_stage(), two_stage(), "kd").eval()(*batch())


def other_anchors(seed=0, sizes=((16,), (32,), (64,)), ratios=((0.5, 1.0, 2.0),) * 3):
    model = one_stage(seed)
    model.anchor_generator = AnchorGenerator(sizes, ratios)
    return model


@pytest.mark.parametrize("method", ["bckd", "crosskd"])
@pytest.mark.parametrize(
    ("student", "teacher", "difference"),
    [
        (
            one_stage,
            lambda: other_anchors(1, sizes=((24,), (48,), (96,))),
            "number 0 is .* in the student and",
        ),
        (
            one_stage,
            lambda: other_anchors(1, ratios=((1.0, 0.5, 2.0),) * 3),
            "number 0 is .* in the student and",
        ),
        (
            fcos,
            lambda: one_stage(1),
            "the student has 5376 in an image of 512 x 512, the teacher 16128; allowed: equal ones",
        ),
    ],
    ids=["sizes", "ratios", "fcos"],
)
def test_other_anchors_are_refused_when_the_method_is_built(method, student, teacher, difference):
    with pytest.raises(ConfigError, match=difference):
        DetectionDistiller(student(), teacher(), method)


def test_an_adapter_without_anchors_compares_no_logits():
    class Silent(DenseAdapter):
        anchors = DetectorAdapter.anchors

    model = one_stage(1)
    model.detector_adapter = Silent
    with pytest.raises(ConfigError, match="RetinaNet: Silent gives no anchors"):
        DetectionDistiller(one_stage(), model, "bckd")
