"""CWD, PKD, MGD, FGD and FGFI's options: values against numpy, and a step between detectors of two kinds."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from tiny_detectors import LEVELS, batch, fcos, one_stage, training_pass, two_stage
from torch import nn

from mdistiller.errors import ConfigError
from mdistiller.recipes import get_recipe
from mdistiller.tasks.detection.adapter import Level
from mdistiller.tasks.detection.adapters import adapter_of
from mdistiller.tasks.detection.distiller import DetectionDistiller, object_masks
from mdistiller.tasks.detection.level_methods import (
    FGD,
    MGD,
    PKD,
    ContextBlock,
    CWDConfig,
    FGDConfig,
    FGFIConfig,
    MGDConfig,
    PKDConfig,
    fgd_focal_losses,
    mgd_loss,
    pkd_loss,
)
from mdistiller.tasks.detection.levels import Pyramid, match_channels, positions_in_papers
from mdistiller.tasks.detection.methods import DATA, build_method
from mdistiller.types import Outputs

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


@pytest.mark.parametrize("kind", [PKDConfig, CWDConfig])
def test_a_mean_over_levels_does_not_depend_on_their_number(kind):
    losses = []
    for names in (("0",), ("1",), ("0", "1")):
        taps = {"student_taps": names, "teacher_taps": names}
        distiller = DetectionDistiller(two_stage(), two_stage(seed=1), kind(**taps)).train()
        torch.manual_seed(0)
        losses.append(distiller(*batch()).losses[kind.own_name].item())
    assert losses[2] == pytest.approx((losses[0] + losses[1]) / 2, rel=1e-5)


def test_cwd_of_a_run_against_numpy():
    """Levels of other channels, through the layers of the method."""
    student, teacher = two_stage(), two_stage(seed=1, channels=12)
    distiller = DetectionDistiller(student, teacher, "cwd", temperature=2.0).train()
    torch.manual_seed(0)
    seen = {}
    adapters = distiller.method.adapters
    for adapt, name in zip(adapters, LEVELS, strict=True):
        adapt.register_forward_hook(lambda m, args, out, name=name: seen.update({name: out}))
    found = distiller(*batch()).losses["cwd"].item()
    torch.manual_seed(0)
    with torch.no_grad():
        theirs = teacher.eval().backbone(teacher.transform(batch()[0])[0].tensors)
    values = []
    for name in LEVELS:
        pair = (x.detach().flatten(2).double().numpy() for x in (seen[name], theirs[name]))
        q, p = (log_softmax(x / 2, 2) for x in pair)
        values.append(4 * (np.exp(p) * (p - q)).sum(2).mean())
    assert found == pytest.approx(50 * np.mean(values), rel=1e-4)
    assert (CWDConfig().weight, CWDConfig().temperature) == (50, 1)


def test_a_layer_matches_the_channels_where_they_differ():
    torch.manual_seed(0)
    layers = [match_channels(3, 3), match_channels(3, 5)]
    assert isinstance(layers[0], nn.Identity)
    torch.manual_seed(0)
    assert torch.equal(layers[1].weight, nn.Conv2d(3, 5, 1).weight)


def test_mgd_is_the_sum_of_squares_of_an_image():
    s, t = maps()
    want = ((s - t).double().numpy() ** 2).sum() / 2
    assert mgd_loss(s, t).item() == pytest.approx(want, rel=1e-5)
    with pytest.raises(ConfigError, match="one shape"):
        mgd_loss(s, t[:1])


def test_mgd_masks_the_fraction_of_positions():
    distiller = DetectionDistiller(two_stage(), two_stage(seed=1), "mgd", masked=0.75).train()
    seen = []
    for generate in distiller.method.generators:
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


# Sums over positions


def on_one_level(kind, config, stride, student, teacher, objects=None):
    """Losses of MGD or FGD on two maps of one stride, without layers that know neighbors."""
    torch.manual_seed(0)
    pyramid = Pyramid({"0": Level(stride, student.shape[1])})
    method = kind(config, pyramid, pyramid, DATA._replace(taps=(("0",), ("0",))))
    if kind is MGD:
        method.generators = nn.ModuleList([nn.Identity()])
    else:
        for context in (*method.student_contexts, *method.teacher_contexts):
            nn.init.normal_(context.change[-1].weight)
    ours = {"0": student, "0.objects": objects}
    losses = method(Outputs(torch.zeros(0), ours), Outputs(torch.zeros(0), {"0": teacher}), None, None)
    return {name: value.item() for name, value in losses.items()}


def doubled(x):
    """Each cell four times, as in an image of twice the height and width."""
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_the_size_of_the_image_does_not_change_the_losses():
    s, t = maps()
    objects = torch.zeros(2, 1, 3, 4)
    objects[0, 0, :2, 1:3] = 0.25
    small = on_one_level(MGD, MGDConfig(masked=0), 8.0, s, t)
    assert on_one_level(MGD, MGDConfig(masked=0), 8.0, doubled(s), doubled(t)) == pytest.approx(small)
    tiled = [x.tile(1, 1, 2, 3) for x in (s, t)]
    assert on_one_level(MGD, MGDConfig(masked=0), 8.0, *tiled) == pytest.approx(small)
    small = on_one_level(FGD, FGDConfig(), 8.0, s, t, objects)
    large = on_one_level(FGD, FGDConfig(), 8.0, doubled(s), doubled(t), doubled(objects) / 4)
    assert large == pytest.approx(small, rel=1e-5)
    assert all(value > 0 for value in small.values())
    # Of six times as many objects, each counts as before; the other terms do not see how many there are.
    found = on_one_level(FGD, FGDConfig(), 8.0, *tiled, objects.tile(1, 1, 2, 3))
    assert found.pop("fgd_objects") == pytest.approx(6 * small.pop("fgd_objects"), rel=1e-5)
    assert found == pytest.approx(small, rel=1e-5)


def test_the_sums_are_those_of_the_authors_images():
    """At 800 x 1333 pixels they are plain sums; elsewhere means times the number of positions there."""
    s, t = maps(shape=(1, 1, 800, 1333))
    found = on_one_level(MGD, MGDConfig(weight=3.0, masked=0), 1.0, s, t)["mgd"]
    assert found == pytest.approx(3 * ((s - t).double().numpy() ** 2).sum(), rel=1e-5)
    s, t = maps()
    found = on_one_level(MGD, MGDConfig(weight=1.0, masked=0), 16.0, s, t)["mgd"]
    mean = ((s - t).double().numpy() ** 2).sum(1).mean()
    assert found == pytest.approx(mean * (800 / 16) * (1333 / 16), rel=1e-5)
    a, b = (x.double().numpy() for x in (s, t))
    places = [12 * np.stack([softmax(np.abs(i).mean(0) / 0.5) for i in x]) for x in (a, b)]
    channels = [5 * np.stack([softmax(np.abs(i).mean((1, 2)) / 0.5) for i in x]) for x in (a, b)]
    # Channels are of one number whatever the image.
    apart = [np.abs(x[0] - x[1]).sum() / 2 for x in (places, channels)]
    want = 5e-4 * (apart[0] * (800 / 16) * (1333 / 16) / 12 + apart[1])
    found = on_one_level(FGD, FGDConfig(), 16.0, s, t, torch.zeros(2, 1, 3, 4))["fgd_attention"]
    assert found == pytest.approx(want, rel=1e-5)
    pyramid = Pyramid({"0": Level(8.0, 3), "1": Level(16.0, 3)})
    assert positions_in_papers(pyramid, ("1", "0")) == [800 * 1333 / 256, 800 * 1333 / 64]


def test_the_weight_of_fgd_is_of_all_terms():
    s, t = maps()
    objects = torch.full((2, 1, 3, 4), 1 / 12)
    objects[0, 0, 0] = 0
    one, three = (on_one_level(FGD, FGDConfig(weight=w), 8.0, s, t, objects) for w in (1.0, 3.0))
    assert three == pytest.approx({name: 3 * value for name, value in one.items()}, rel=1e-6)


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
    _, seen = training_pass(two_stage())
    masks = object_masks(seen)
    # Boxes (8, 8, 40, 40) and (30, 20, 74, 60) in cells of 8 pixels: columns 1 to 5 and 3 to 10 inclusive.
    want = np.zeros(seen.features["0"].shape[2:])
    want[1:6, 1:6] = 1 / 25
    second = want[2:9, 3:11]
    want[2:9, 3:11] = np.maximum(second, 1 / (7 * 8))
    np.testing.assert_allclose(masks["0.objects"][0, 0].numpy(), want, rtol=1e-6)
    assert not masks["0.objects"][1].any()
    assert masks["pool.objects"].shape[2:] == seen.features["pool"].shape[2:]


@pytest.mark.parametrize("method", ["cwd", "pkd", "mgd", "fgd"])
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


def test_the_relu_of_fgfi():
    distiller = DetectionDistiller(two_stage(), two_stage(seed=1), FGFIConfig(weight=1.0, relu=True)).train()
    torch.manual_seed(0)
    out = distiller(*batch())
    assert out.losses["fgfi"] > 0
    out.loss.backward()
    assert all(p.grad is not None for p in distiller.parameters())
    plain = DetectionDistiller(two_stage(), two_stage(seed=1), FGFIConfig(weight=1.0)).train()
    plain.method.adapters.load_state_dict(distiller.method.adapters.state_dict())
    torch.manual_seed(0)
    assert plain(*batch()).losses["fgfi"] != out.losses["fgfi"]


def own(make):
    """A detector with an adapter of its own."""
    model = make()
    model.detector_adapter = type("OwnAdapter", (type(adapter_of(model)),), {})
    return model


@pytest.mark.parametrize("wrap", [lambda make: make(), own], ids=["torchvision", "own"])
@pytest.mark.parametrize(
    ("make", "fgd", "mgd"),
    [
        (two_stage, (5e-5, 2.5e-5, 5e-5, 5e-7, 0.5), (5e-7, 0.45)),
        (one_stage, (1e-3, 5e-4, 5e-4, 5e-6, 0.5), (2e-5, 0.65)),
        (fcos, (1.6e-3, 8e-4, 8e-4, 8e-6, 0.8), (2e-5, 0.65)),
    ],
)
def test_weights_are_the_authors_for_the_kind_of_detector(make, wrap, fgd, mgd):
    student = wrap(make)
    built = [DetectionDistiller(student, make(1), name).method for name in ("fgd", "mgd")]
    assert (*built[0].weights, built[0].temperature) == fgd
    assert (built[1].weight, built[1].settled["masked"]) == mgd
    recipe = get_recipe("coco.fgd+mgd.fasterrcnn_resnet101_resnet50").method
    parts = build_method(recipe, student, make(1)).parts
    assert (parts["fgd"].weights[0], parts["mgd"].weight) == (fgd[0], mgd[0])
    given = DetectionDistiller(student, make(1), "fgd", object_weight=0.5, temperature=0.3).method
    assert (*given.weights, given.temperature) == (0.5, *fgd[1:4], 0.3)
    assert DetectionDistiller(student, make(1), "mgd", weight=0.5).method.weight == 0.5


def test_crosskd_has_the_authors_settings_for_fcos():
    for make, wanted in ((one_stage, (1, 1, 3)), (fcos, (0.4, 0.75, 2))):
        distiller = DetectionDistiller(make(), make(1), "crosskd")
        values = distiller.method.settled
        assert (values["weight"], values["box_weight"], distiller.adapter.hold) == wanted


def test_levels_are_those_that_the_authors_compare():
    for name, wanted in (("fgd", ("0", "1")), ("mgd", ("0", "1")), ("pkd", ("0", "1")), ("cwd", LEVELS)):
        assert DetectionDistiller(two_stage(), two_stage(1), name).method.levels == wanted
    assert DetectionDistiller(one_stage(), one_stage(1), "fgd").method.levels == LEVELS
    pyramid = [(str(i), str(i)) for i in range(5)]
    assert PKD.choose(pyramid, "anchors") == pyramid[:4]
    assert FGD.choose(pyramid, "anchors") == pyramid


def test_recipes_name_pairs_of_two_kinds():
    assert get_recipe("coco.cwd.fasterrcnn_resnet101_resnet50").method.weight == 50
    pair = get_recipe("small.pkd.fasterrcnn_resnet50_fcos_resnet18")
    assert (pair.teacher.name, pair.student.name) == ("fasterrcnn_resnet50", "fcos_resnet18")
