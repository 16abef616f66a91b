"""PKD, MGD, FGD and FGFI's options: values against numpy, and a step between detectors of two kinds."""

import numpy as np
import pytest
import torch
from tiny_detectors import batch, fcos, one_stage, two_stage

from mdistiller.errors import ConfigError
from mdistiller.recipes import get_recipe
from mdistiller.tasks.detection.detector import TappedDetector, object_masks
from mdistiller.tasks.detection.distiller import DetectionDistiller
from mdistiller.tasks.detection.fgd import ContextBlock, fgd_focal_losses
from mdistiller.tasks.detection.fgfi import FGFIConfig
from mdistiller.tasks.detection.mgd import mgd_loss
from mdistiller.tasks.detection.pkd import PKDConfig, pkd_loss

SHAPE = (2, 5, 3, 4)


def maps(seed=0, shape=SHAPE):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for _ in range(2)]


def test_pkd_is_one_minus_the_correlation_of_each_channel():
    s, t = maps()
    rows = [x.transpose(0, 1).flatten(1).double().numpy() for x in (s, t)]
    r = [np.corrcoef(a, b)[0, 1] for a, b in zip(*rows, strict=True)]
    assert pkd_loss(s, t).item() == pytest.approx(1 - np.mean(r), rel=1e-5)
    assert pkd_loss(t, t).item() == 0
    scaled = 100 * s - torch.arange(5.0)[:, None, None]  # scale and offset of a channel do not count
    torch.testing.assert_close(pkd_loss(scaled, t), pkd_loss(s, t))
    assert pkd_loss(-t, t).item() == pytest.approx(2)
    with pytest.raises(ConfigError, match="one shape"):
        pkd_loss(s, t[:, :2])


def test_pkd_of_a_constant_channel_has_a_finite_gradient():
    s, t = torch.zeros(SHAPE, requires_grad=True), maps()[1]
    loss = pkd_loss(s, t)
    loss.backward()
    assert loss.item() == pytest.approx(0.5)
    assert s.grad.isfinite().all()


def test_pkd_of_a_run_does_not_depend_on_the_number_of_levels():
    """A mean over levels: the same level twice has the loss of one."""
    losses = []
    for names in (("0",), ("0", "1")):
        taps = {"student_taps": names, "teacher_taps": names}
        distiller = DetectionDistiller(two_stage(), two_stage(seed=1), PKDConfig(**taps)).train()
        torch.manual_seed(0)
        losses.append(distiller(*batch()).losses["pkd"].item())
    assert all(0 < value < 2 for value in losses)


def test_mgd_is_the_sum_of_squares_of_an_image():
    s, t = maps()
    want = ((s - t).double().numpy() ** 2).sum() / 2
    assert mgd_loss(s, t).item() == pytest.approx(want, rel=1e-5)
    with pytest.raises(ConfigError, match="one shape"):
        mgd_loss(s, t[:1])


def test_mgd_masks_the_fraction_of_positions():
    distiller = DetectionDistiller(two_stage(), two_stage(seed=1), "mgd", masked=0.75).train()
    seen = []
    for generate in distiller.learner.method.generators:
        generate.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    for _ in range(8):
        distiller(*batch())
    zeros = torch.cat([(x == 0).all(1).flatten() for x in seen]).float()
    assert zeros.mean().item() == pytest.approx(0.75, abs=0.03)
    assert all(((x == 0).all(1) | (x != 0).all(1)).all() for x in seen)  # whole positions


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def test_fgd_against_loops():
    s, t = maps()
    objects = torch.zeros(2, 1, 3, 4)
    objects[0, 0, :2, 1:3] = 0.25
    objects[1, 0] = 1 / 12  # without background
    a, b, m = (x.double().numpy() for x in (s, t, objects[:, 0]))
    wanted = np.zeros(3)
    for i in range(2):
        places = [12 * softmax(np.abs(x[i]).mean(0).ravel() / 0.5).reshape(3, 4) for x in (a, b)]
        channels = [5 * softmax(np.abs(x[i]).mean((1, 2)) / 0.5) for x in (a, b)]
        empty = m[i] == 0
        for y in range(3):
            for x in range(4):
                error = sum(
                    places[1][y, x] * channels[1][c] * (a[i, c, y, x] - b[i, c, y, x]) ** 2 for c in range(5)
                )
                wanted[0] += m[i, y, x] * error / 2
                wanted[1] += error / empty.sum() / 2 if empty[y, x] else 0
        wanted[2] += (np.abs(places[0] - places[1]).sum() + np.abs(channels[0] - channels[1]).sum()) / 2
    got = fgd_focal_losses(s, t, objects, 0.5)
    assert [x.item() for x in got] == pytest.approx(wanted.tolist(), rel=1e-5)


def test_the_context_block():
    torch.manual_seed(0)
    block, x = ContextBlock(4), torch.randn(2, 4, 3, 3)
    assert torch.equal(block(x), x)  # its last layer begins with zeros
    torch.nn.init.normal_(block.change[-1].weight)
    w, bias = block.mask.weight[0, :, 0, 0].detach().numpy(), block.mask.bias.item()
    for image, out in zip(x.numpy(), block(x).detach().numpy(), strict=True):
        flat = image.reshape(4, 9)
        context = flat @ softmax(w @ flat + bias)
        change = block.change(torch.from_numpy(context)[None]).detach().numpy()[0]
        np.testing.assert_allclose(out, image + change[:, None, None], rtol=1e-4, atol=1e-5)


def test_where_objects_are():
    tapped = TappedDetector(two_stage()).train()
    _, seen = tapped(*batch())
    masks = object_masks(seen)
    # Boxes (8, 8, 40, 40) and (30, 20, 74, 60) in cells of 8 pixels: columns 1 to 5 and 3 to 10 inclusive.
    want = np.zeros(seen.features["0"].shape[2:])
    want[1:6, 1:6] = 1 / 25
    second = want[2:9, 3:11]
    want[2:9, 3:11] = np.maximum(second, 1 / (7 * 8))
    np.testing.assert_allclose(masks["0.objects"][0, 0].numpy(), want, rtol=1e-6)
    assert not masks["0.objects"][1].any()
    assert masks["pool.objects"].shape[2:] == seen.features["pool"].shape[2:]


@pytest.mark.parametrize("method", ["pkd", "mgd", "fgd"])
def test_a_step_between_two_kinds(method):
    distiller = DetectionDistiller(fcos(), two_stage(seed=1), method).train()
    out = distiller(*batch())
    names = [name for name in out.losses if name.startswith(method)]
    assert len(names) == (4 if method == "fgd" else 1)
    assert all(out.losses[name].isfinite() and out.losses[name] > 0 for name in names)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in distiller.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        losses = distiller(*batch()).losses
    assert all(losses[name].dtype == torch.float32 for name in names)


def test_fgd_of_images_without_objects():
    images, targets = batch()
    distiller = DetectionDistiller(one_stage(), one_stage(seed=1), "fgd").train()
    losses = distiller(images, [targets[1]] * 2).losses
    assert losses["fgd_objects"] == 0 < losses["fgd_background"]


def test_the_options_of_fgfi():
    config = FGFIConfig(weight=1.0, delay=2, relu=True)
    distiller = DetectionDistiller(two_stage(), two_stage(seed=1), config).train()
    values = []
    for step in range(4):
        torch.manual_seed(0)
        out = distiller(*batch())
        values.append(out.losses["fgfi"].item())
        out.loss.backward()
        assert all(p.grad is not None for p in distiller.parameters()), step
    assert values[:2] == [0, 0]
    assert values[2] > 0
    assert distiller.state_dict()["learner.method.passes"] == 4
    plain = DetectionDistiller(two_stage(), two_stage(seed=1), FGFIConfig(weight=1.0)).train()
    plain.learner.method.adapters.load_state_dict(distiller.learner.method.adapters.state_dict())
    torch.manual_seed(0)
    assert plain(*batch()).losses["fgfi"].item() != values[2]  # without the ReLU


def test_recipes_have_the_authors_weights_for_proposals():
    method = get_recipe("coco.mgd.fasterrcnn_resnet101_resnet50").method
    assert (method.weight, method.masked) == (5e-7, 0.45)
    method = get_recipe("coco.fgd.retinanet_resnet101_resnet50").method
    assert (method.object_weight, method.context_weight) == (1e-3, 5e-6)
    assert get_recipe("small.fgd.fasterrcnn_resnet50_resnet18").method.object_weight == 5e-5
    pair = get_recipe("small.pkd.fasterrcnn_resnet50_fcos_resnet18")
    assert (pair.teacher.name, pair.student.name) == ("fasterrcnn_resnet50", "fcos_resnet18")
