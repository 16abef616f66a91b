"""Token losses against numpy, PHI-S against its definition, and heads between CNNs and transformers."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

import mdistiller
from mdistiller.errors import ConfigError
from mdistiller.functional import tokens_loss
from mdistiller.methods import get_method
from mdistiller.methods.tokens import PhiS, hadamard, phi_s
from mdistiller.models import create_model
from mdistiller.types import Batch, DataInfo, Outputs

CONTRACT = set()
DATA = DataInfo((3, 32, 32))
BATCH = Batch(torch.zeros(2, 3, 32, 32), torch.zeros(2), torch.arange(2))
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}


def vit(**options):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT, **options).eval()


def build(student, teacher, data=DATA, **settings):
    method_class = get_method("tokens")
    return method_class(method_class.Config(**settings), student, teacher, data)


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4)])
def test_values_are_the_formulas(shape):
    rng = np.random.default_rng(0)
    s, t = rng.normal(size=shape), 2 * rng.normal(size=shape)
    d = np.abs(s - t)
    expected = {
        "cosine": (1 - (s * t).sum(-1) / np.linalg.norm(s, axis=-1) / np.linalg.norm(t, axis=-1)).mean(),
        "l1": d.mean(),
        "smooth_l1": np.where(d < 1, d**2 / 2, d - 0.5).mean(),
        "l2": (d**2).mean(),
    }
    for name, value in expected.items():
        found = tokens_loss(torch.tensor(s), torch.tensor(t), distance=name)
        assert found.item() == pytest.approx(value, rel=1e-12)


def test_wrong_arguments():
    with pytest.raises(ConfigError, match=r"one shape \[B, D\] or \[B, N, D\]; got \[2, 3\] and \[2, 4\]"):
        tokens_loss(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ConfigError, match="allowed: cosine, l1, smooth_l1, l2"):
        tokens_loss(torch.ones(2, 3), torch.ones(2, 3), distance="cos")
    with pytest.raises(ConfigError, match="one must be above 0"):
        build(create_model("resnet8"), create_model("resnet8"), global_weight=0, patch_weight=0)
    taps = {"student_taps": ("stage3",), "teacher_taps": ("pooled",)}
    with pytest.raises(ConfigError, match="maps with maps and vectors with vectors"):
        build(create_model("resnet8"), create_model("resnet8"), **taps)
    with pytest.raises(ConfigError, match=r"standardize.*allowed otherwise: false"):
        build(create_model("resnet8"), create_model("resnet8"), standardize=True)


@pytest.mark.parametrize("width", [1, 2, 4, 12, 20, 44, 48, 72, 192, 384, 768, 1024, 1152, 1280, 1408])
def test_hadamard_matrices_have_orthogonal_rows_of_ones(width):
    found = hadamard(width)
    assert set(found.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(found @ found.T, width * torch.eye(width, dtype=torch.float64))


def test_widths_without_a_hadamard_matrix_are_refused():
    assert hadamard(7) is hadamard(6) is None
    with pytest.raises(ConfigError, match=r"6 dimensions.*allowed: false"):
        phi_s(torch.eye(6))
    with pytest.raises(ConfigError, match="constant"):
        phi_s(torch.zeros(4, 4))


def test_phi_s_gives_every_dimension_variance_one_by_a_rotation_and_one_scale():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(500, 12)) @ rng.normal(size=(12, 12)) * np.geomspace(1, 100, 12) + 5
    standard = PhiS(12).double()
    standard.fit(torch.tensor(x).split(100))
    y = standard(torch.tensor(x)).numpy()
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(y.var(0), 1, rtol=1e-9)
    matrix = standard.matrix.numpy()
    scale = 1 / np.trace(np.cov(x.T, bias=True)) * 12
    np.testing.assert_allclose(matrix @ matrix.T, scale * np.eye(12), atol=1e-12)


def test_the_student_meets_embedding_and_patches_on_the_teachers_grid():
    student, teacher = create_model("resnet8"), vit()
    method = build(student, teacher, patch_loss={"cosine": 0.9, "smooth_l1": 0.1}, patch_weight=2.0)
    assert (method.student_taps, method.teacher_taps) == (("stage3", "pooled"), ("norm", "pooled"))
    image = torch.randn(2, 3, 32, 32)
    found = [
        mdistiller.tap(model.eval(), taps)(image)
        for model, taps in ((student, method.student_taps), (teacher, method.teacher_taps))
    ]
    losses = method(*found, Batch(image, image, image), torch.ones(()))
    patches = found[1].features[method.teacher_taps[0]][:, 1:]  # timm's one class token comes first
    head = method.heads[0]
    small = torch.nn.functional.interpolate(
        found[0].features["stage3"], (4, 4), mode="bilinear", antialias=True
    )
    ours = head(small.permute(0, 2, 3, 1)).flatten(1, 2)
    expected = 0.9 * tokens_loss(ours, patches) + 0.1 * tokens_loss(ours, patches, distance="smooth_l1")
    torch.testing.assert_close(losses["tokens_patch"], 2 * expected)
    ours = method.heads[1](found[0].features["pooled"])
    expected = tokens_loss(ours, found[1].features["pooled"])
    torch.testing.assert_close(losses["tokens_global"], expected)


@pytest.mark.parametrize(("weight", "other"), [("global", "patch"), ("patch", "global")])
def test_a_weight_of_zero_leaves_its_taps_out(weight, other):
    method = build(create_model("resnet8"), vit(), **{f"{weight}_weight": 0.0})
    assert len(method.heads) == 1
    assert not method.needs.logits
    student, teacher = (torch.randn(2, 64, 8, 8), torch.randn(2, 17, 48))
    if other == "global":
        student, teacher = torch.randn(2, 64), torch.randn(2, 48)
    outputs = [
        Outputs(torch.empty(0), {taps[0]: x})
        for taps, x in ((method.student_taps, student), (method.teacher_taps, teacher))
    ]
    assert list(method(*outputs, BATCH, torch.ones(()))) == [f"tokens_{other}"]


def test_models_of_embeddings_are_compared_by_their_outputs():
    data = DATA._replace(are_embeddings=True)
    method = build(create_model("resnet8", 0), vit(), data, head="mlp")
    assert len(method.student_taps) == 1
    assert method.needs.logits
    assert [head[0].in_features for head in method.heads] == [64, 64]
    outputs = [
        Outputs(torch.randn(2, 64), {method.student_taps[0]: torch.randn(2, 64, 8, 8)}),
        Outputs(torch.randn(2, 48), {method.teacher_taps[0]: torch.randn(2, 17, 48)}),
    ]
    losses = method(*outputs, BATCH, torch.ones(()))
    torch.testing.assert_close(
        losses["tokens_global"], tokens_loss(method.heads[1](outputs[0].logits), outputs[1].logits)
    )


def test_standardized_targets_follow_from_the_training_images():
    teacher = vit()
    images = [Batch(torch.randn(8, 3, 32, 32), torch.zeros(8), torch.arange(8)) for _ in range(3)]
    data = DATA._replace(are_embeddings=True, images=lambda: iter(images))
    method = build(create_model("resnet8", 0), teacher, data, standardize=True, global_weight=0.0)
    tapped = mdistiller.tap(teacher, method.teacher_taps)
    with torch.no_grad():
        found = [tapped(batch.image) for batch in images]
    student = Outputs(torch.randn(8, 64), {method.student_taps[0]: torch.randn(8, 64, 8, 8)})
    method(student, found[0], images[0], torch.ones(()))
    x = torch.cat([outputs.features[method.teacher_taps[0]][:, 1:] for outputs in found])
    y = method.standards[0](x).flatten(0, 1)
    torch.testing.assert_close(y.mean(0), torch.zeros(48), atol=1e-4, rtol=0)
    torch.testing.assert_close(y.var(0, correction=0), torch.ones(48), atol=1e-3, rtol=0)
    other = build(create_model("resnet8", 0), teacher, data, standardize=True, global_weight=0.0)
    other.load_state_dict(method.state_dict())
    images[:] = [batch._replace(image=7 * batch.image) for batch in images]
    other(student, found[0], images[0], torch.ones(()))
    assert torch.equal(other.standards[0].matrix, method.standards[0].matrix)


def test_registers_and_grids_that_are_no_squares_follow_from_the_teacher():
    torch.manual_seed(0)
    options = {**VIT, "img_size": (32, 16), "reg_tokens": 4}
    teacher = timm.create_model("vit_tiny_patch16_224", num_classes=0, **options).eval()
    method = build(create_model("resnet8", 0), teacher, DataInfo((3, 32, 16)), global_weight=0.0)
    image = torch.randn(2, 3, 32, 16)
    with torch.no_grad():
        found = mdistiller.tap(teacher, ["norm"])(image)
    (patches,) = method.read(Outputs(torch.empty(0), {"stage3": torch.randn(2, 64, 8, 4)}), found, image)[1]
    assert torch.equal(patches, found.features["norm"][:, 5:].mT.unflatten(2, (4, 2)))


class Unknown(nn.Module):
    """Tokens of a module that nobody knows."""

    def __init__(self):
        super().__init__()
        self.vit = vit()
        self.act = nn.Identity()

    def forward(self, image):
        return self.act(self.vit.forward_features(image)[:, 1:])


def test_nobody_guesses_which_tokens_are_patches():
    taps = {"student_taps": ("stage3",), "teacher_taps": ("act",), "global_weight": 0.0}
    with pytest.raises(ConfigError, match=r"tap 'act' of Unknown.*unknown"):
        build(create_model("resnet8"), Unknown(), **taps)
    with pytest.raises(ConfigError, match="no tap named stageN"):
        build(create_model("resnet8"), Unknown())
