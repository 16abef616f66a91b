"""A Distiller of any models: what trains, what stays unchanged, and compilation."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import mdistiller
from mdistiller.distiller import Distiller
from mdistiller.errors import ConfigError, UnknownNameError
from mdistiller.functional import dkd_loss
from mdistiller.methods import DKDConfig, KDConfig, NoneConfig, get_method, load_plugin, method_config
from mdistiller.methods.compose import build_method
from mdistiller.taps import probe
from mdistiller.teacher import LiveTeacher
from mdistiller.types import Batch, DataInfo, Outputs

METHODS = {"none": NoneConfig, "kd": KDConfig, "dkd": DKDConfig}


# A feature method with an adapter, as a user would write it.
load_plugin(Path(__file__).parents[1] / "examples" / "my_feature_method.py")
HINT = get_method("my_hint")


def pair(classes=10):
    torch.manual_seed(0)
    return mdistiller.create_model("resnet8", classes), mdistiller.create_model("wrn_16_1", classes)


def batch(classes=10, n=6, size=16):
    torch.manual_seed(1)
    return torch.randn(n, 3, size, size), torch.randint(0, classes, (n,))


def losses_of(distiller, image, label, progress=1.0):
    return distiller(image, label, progress=progress).losses


def snapshot(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def assert_same(module, before):
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("method", [*METHODS, "my_hint"])
def test_three_steps_leave_the_teacher_bit_identical_and_move_all_else(method):
    student, teacher = pair()
    before_teacher, before_student = snapshot(teacher), snapshot(student)
    teacher.train()  # as a careless user leaves it
    distiller = mdistiller.Distiller(student, teacher, method, input_shape=(3, 16, 16)).train()
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    image, label = batch()
    for step in range(3):
        losses = losses_of(distiller, image, label)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        for name, p in distiller.named_parameters():
            assert p.grad is not None, name
        optimizer.step()
        for module in student.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.num_batches_tracked == step + 1
    assert_same(teacher, before_teacher)
    assert all(module.training for module in teacher.modules())  # its mode is the caller's
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())
    assert any(not torch.equal(v, before_student[k]) for k, v in student.state_dict().items())


def test_building_a_method_changes_neither_model():
    student, teacher = pair()
    before = snapshot(student), snapshot(teacher)
    student.train()
    teacher.train()
    state = torch.get_rng_state()
    config = HINT.Config(student_tap="stage3", teacher_tap="stage2.preact")
    build_method(config, student, teacher, DataInfo((3, 16, 16)))
    assert_same(student, before[0])
    assert_same(teacher, before[1])
    assert student.training
    assert teacher.training
    assert not torch.equal(torch.get_rng_state(), state)  # the adapter's weights were drawn, nothing else


def test_distiller_computes_the_written_out_losses():
    student, teacher = pair()
    image, label = batch()
    distiller = mdistiller.Distiller(student, teacher, DKDConfig(beta=2.0, warmup=0.5)).eval()
    losses = losses_of(distiller, image, label, 0.25)
    with torch.no_grad():
        s, t = student(image), teacher.eval()(image)
    assert list(losses) == ["task", "dkd"]
    torch.testing.assert_close(losses["task"], nn.functional.cross_entropy(s, label))
    torch.testing.assert_close(losses["dkd"], 0.5 * dkd_loss(s, t, label, beta=2.0))
    assert losses_of(distiller, image, label, 0.0)["dkd"] == 0
    full = [losses_of(distiller, image, label, p)["dkd"] for p in (0.5, 0.8, 1.0)]
    assert full[0] == full[1] == full[2] == losses_of(distiller, image, label)["dkd"]


def test_soft_labels_reach_task_and_method():
    student, teacher = pair()
    image, label = batch()
    soft = nn.functional.one_hot(label, 10).float() * 0.7 + 0.03
    losses = losses_of(mdistiller.Distiller(student, teacher, "dkd").eval(), image, soft)
    with torch.no_grad():
        expected = -(soft * student(image).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(losses["task"].detach(), expected)


def test_label_smoothing_touches_the_task_alone():
    student, teacher = pair()
    image, label = batch()
    plain = losses_of(mdistiller.Distiller(student, teacher, "dkd").eval(), image, label)
    smoothing = mdistiller.Distiller(student, teacher, "dkd", label_smoothing=0.1).eval()
    smooth = losses_of(smoothing, image, label)
    with torch.no_grad():
        expected = nn.functional.cross_entropy(student(image), label, label_smoothing=0.1)
    torch.testing.assert_close(smooth["task"].detach(), expected)
    assert torch.equal(smooth["dkd"], plain["dkd"])


def test_state_dict_parameters_and_moves_of_a_distiller():
    student, teacher = pair()
    distiller = mdistiller.Distiller(student, teacher, "my_hint", input_shape=(3, 16, 16))
    expected = [f"student.{k}" for k in student.state_dict()]
    expected += ["method.adapter.weight", "method.adapter.bias"]
    assert list(distiller.state_dict()) == expected
    assert len(list(distiller.parameters())) == len(list(student.parameters())) + 2
    assert distiller.student is student
    assert distiller.teacher is teacher
    twin = copy.deepcopy(distiller)
    twin.load_state_dict(distiller.state_dict())
    image, label = batch()
    for a, b in zip(*(losses_of(d.eval(), image, label).values() for d in (distiller, twin)), strict=True):
        assert torch.equal(a, b)
    distiller.double()
    assert next(teacher.parameters()).dtype == torch.float64
    distiller.to("meta")
    assert next(teacher.parameters()).is_meta


def test_no_teacher_needed_for_none():
    student, _ = pair()
    image, label = batch()
    losses = losses_of(mdistiller.Distiller(student, None, "none"), image, label)
    assert list(losses) == ["task"]


def test_misuse_is_refused():
    student, teacher = pair()
    with pytest.raises(ConfigError, match="'dkd' needs a teacher"):
        mdistiller.Distiller(student, None, "dkd")
    with pytest.raises(ConfigError, match=r"one shape.*\[6, 10\] and \[6, 100\]"):
        mdistiller.Distiller(student, mdistiller.create_model("resnet8", 100), "kd")(*batch())
    with pytest.raises(UnknownNameError, match="nearest: dkd"):
        mdistiller.Distiller(student, teacher, "dkdd")


EXTERNAL = [
    ("torchvision/mobilenet_v3_small", "torchvision/resnet18", {}, "stage4", "stage3", 64),
    ("timm/resnet10t", "timm/vit_tiny_patch16_224", {"img_size": 64}, "stage4", "stage6", 64),
    ("resnet8x4", "timm/mobilenetv3_small_050", {}, "stage2.preact", "pooled", 32),
]


@pytest.mark.parametrize(("student", "teacher", "options", "student_tap", "teacher_tap", "size"), EXTERNAL)
def test_any_pair_of_models_distils_with_features(student, teacher, options, student_tap, teacher_tap, size):
    torch.manual_seed(0)
    student = mdistiller.create_model(student, 5)
    teacher = mdistiller.create_model(teacher, 5, **options)
    before = snapshot(teacher)
    config = HINT.Config(student_tap=student_tap, teacher_tap=teacher_tap)
    distiller = mdistiller.Distiller(student, teacher, config, input_shape=(3, size, size)).train()
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-3)
    image, label = batch(classes=5, n=4, size=size)
    history = []
    for _ in range(8):
        losses = losses_of(distiller, image, label)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append(losses["hint"].item())
    assert history[-1] < history[0]
    assert_same(teacher, before)


@pytest.mark.parametrize("method", [*METHODS, "my_hint"])
def test_distiller_and_teacher_compile_whole(method):
    student, teacher_model = pair()
    built = build_method(method_config(method), student, teacher_model, DataInfo((3, 16, 16)))
    teacher = LiveTeacher(teacher_model, built.teacher_taps)
    distiller = Distiller(student, teacher, built).eval()
    image, label = batch()
    data = Batch(image, label, torch.arange(len(label)))
    progress = torch.tensor(0.5)
    expected_teacher = teacher(data)
    expected = distiller(*data[:3], progress, expected_teacher)
    # Whether it is one graph is the point, and not the kernels.
    compiled_teacher = torch.compile(teacher, fullgraph=True, backend="aot_eager")
    compiled = torch.compile(distiller, fullgraph=True, backend="aot_eager")
    outputs = compiled_teacher(data)
    assert isinstance(outputs, Outputs)
    torch.testing.assert_close(outputs.logits, expected_teacher.logits, rtol=1e-4, atol=1e-4)
    found = compiled(*data[:3], progress, outputs)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.task, expected.task, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-4, atol=1e-4)
    # Another value of progress must not compile again.
    torch.compiler.set_stance("fail_on_recompile")
    try:
        compiled(*data[:3], torch.tensor(0.7), outputs)
    finally:
        torch.compiler.set_stance("default")


class Awkward(nn.Module):
    """What cannot run on the meta device: it looks at values, and holds a plain tensor."""

    def __init__(self):
        super().__init__()
        self.scale = torch.ones(1)
        self.fc = nn.Linear(7, 3)

    def forward(self, x):
        x = x * self.scale if x.sum() > -1e9 else x
        return self.fc(x)


def test_a_distiller_takes_models_that_take_no_images():
    torch.manual_seed(0)
    distiller = mdistiller.Distiller(Awkward(), Awkward(), "dkd")
    losses = losses_of(distiller, torch.randn(4, 7), torch.tensor([0, 1, 2, 0]))
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_probe_falls_back_to_a_real_copy_and_names_a_wrong_shape():
    model = Awkward()
    state = torch.get_rng_state()
    logits, features = probe(model, ["fc:input"], (5, 7))
    assert logits.shape == (2, 5, 3)
    assert logits.is_meta
    assert features["fc:input"].shape == (2, 5, 7)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ConfigError, match=r"Awkward cannot run on images of shape \(5, 8\).*input_shape"):
        probe(model, [], (5, 8))
