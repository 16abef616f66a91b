"""A Distiller of models with any inputs and outputs: mappings, dense logits, examples, in-place layers."""

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import mdistiller
from mdistiller import Distiller
from mdistiller.errors import ConfigError


class Dense(nn.Module):
    """Logits [B, 5, H, W] of images, or [B, T, 5] of words."""

    def __init__(self, width=8, tokens=False, stride=1, classes=5):
        super().__init__()
        first = nn.Embedding(20, width) if tokens else nn.Conv2d(3, width, 3, padding=1, stride=stride)
        last = nn.Linear(width, classes) if tokens else nn.Conv2d(width, classes, 1)
        self.layers = nn.Sequential(first, nn.ReLU(), last)

    def forward(self, x):
        return {"out": self.layers(x), "aux": None}


def numpy_kd(student, teacher, temperature):
    """Mean over rows [N, C] of T² KL(teacher ‖ student)."""

    def softmax(x):
        x = np.exp(x - x.max(1, keepdims=True))
        return x / x.sum(1, keepdims=True)

    p, q = softmax(teacher / temperature), softmax(student / temperature)
    return temperature**2 * (p * np.log(p / q)).sum(1).mean()


@pytest.mark.parametrize("tokens", [False, True])
def test_dense_logits_are_rows(tokens):
    torch.manual_seed(0)
    student, teacher = Dense(4, tokens), Dense(8, tokens)
    inputs = torch.randint(20, (2, 6)) if tokens else torch.randn(2, 3, 4, 6)
    target = torch.randint(5, (2, 6) if tokens else (2, 4, 6))
    out = Distiller(student, teacher, "kd", temperature=4.0)(inputs, target)
    logits, taught = (m(inputs)["out"].detach() for m in (student, teacher))
    assert torch.equal(out.logits, logits)
    axis = 2 if tokens else 1
    rows, taught = (x.movedim(axis, -1).reshape(-1, 5).double().numpy() for x in (logits, taught))
    scale = out.losses["kd"].item() / numpy_kd(rows, taught, 4.0)
    assert scale == pytest.approx(mdistiller.methods.method_config("kd").weight, rel=1e-4)
    z = rows - np.log(np.exp(rows).sum(1, keepdims=True))
    labels = target.flatten().numpy()
    task = -z[np.arange(len(z)), labels].mean()
    config = mdistiller.methods.method_config("kd")
    assert out.losses["task"].item() == pytest.approx(config.task_weight * task, rel=1e-4)


def test_positions_without_a_class_do_not_count():
    torch.manual_seed(0)
    student, teacher = Dense(4, True), Dense(8, True)
    words, target = torch.randint(20, (2, 6)), torch.randint(5, (2, 6))
    few = target.clone()
    few[:, 4:] = -100
    build = lambda: Distiller(student, teacher, "dkd", warmup=0)  # noqa: E731
    out, expected = build()(words, few), build()(words[:, :4], target[:, :4])
    for name, value in expected.losses.items():
        torch.testing.assert_close(out.losses[name], value)


ON_LOGITS = ["kd", "dkd", "lskd-kd"]


@pytest.mark.parametrize("method", ON_LOGITS)
@pytest.mark.parametrize("tokens", [False, True])
def test_no_method_reads_a_position_without_a_class(method, tokens):
    """The losses are those of the other positions alone, each a sentence or an image of its own."""
    torch.manual_seed(0)
    student, teacher = Dense(4, tokens), Dense(8, tokens)
    inputs = torch.randint(20, (2, 6)) if tokens else torch.randn(2, 3, 1, 1).expand(2, 3, 2, 3)
    target = torch.randint(5, (2, 6) if tokens else (2, 2, 3))
    target[0, 1:], target[1, 0] = -100, -100
    torch.manual_seed(1)
    made = Distiller(student, teacher, method, per_position=True)
    losses = made(inputs, target, progress=0.5).losses
    torch.manual_seed(1)
    kept = target != -100
    if not tokens:  # a convolution's rows depend on their neighbors: keep the logits
        cut = lambda model: nn.Sequential(model, Cut(kept))  # noqa: E731
        student, teacher = cut(student), cut(teacher)
    alone = Distiller(student, teacher, method)
    expected = alone(inputs[kept][:, None] if tokens else inputs, target[kept][:, None], progress=0.5)
    assert losses.keys() == expected.losses.keys()
    for name, value in expected.losses.items():
        torch.testing.assert_close(losses[name], value, msg=name)
    nothing = made(inputs, torch.full_like(target, -100), progress=0.5)
    assert {name: value.item() for name, value in nothing.losses.items()} == dict.fromkeys(losses, 0.0)
    nothing.loss.backward()
    grads = [p.grad for p in made.parameters() if p.grad is not None]
    assert grads
    assert all((grad == 0).all() for grad in grads)


class Cut(nn.Module):
    """Logits [N, 1, C] of some positions of images."""

    def __init__(self, kept):
        super().__init__()
        self.kept = kept

    def forward(self, result):
        return result["out"].movedim(1, -1)[self.kept][:, None]


class Last(nn.Module):
    def forward(self, x):
        return x


def test_the_axis_of_the_classes_is_not_guessed():
    """Logits [B, 6, 6] may have six positions before six classes, or behind them."""
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 6, 6), torch.randint(6, (4, 6))
    models = nn.Sequential(Last(), nn.Linear(6, 6)), nn.Sequential(Last(), nn.Linear(6, 6))
    with pytest.raises(ConfigError, match=r"\[4, 6, 6\] .*logits_of=lambda out: out\b.*out\.mT"):
        Distiller(*models, "kd")(logits, labels)
    with pytest.raises(ConfigError, match=r"\[4, 6, 6\] .*logits_of"):
        Distiller(models[0], None, "none").evaluate(logits, labels)
    expected = nn.functional.cross_entropy(models[0](logits).flatten(0, 1), labels.flatten())
    out = Distiller(*models, "kd", logits_of=lambda out: out, task_weight=1.0)(logits, labels)
    torch.testing.assert_close(out.losses["task"], expected)
    expected = nn.functional.cross_entropy(models[0](logits), labels)
    out = Distiller(*models, "kd", logits_of=lambda out: out.mT, task_weight=1.0)(logits, labels)
    torch.testing.assert_close(out.losses["task"], expected)
    images, labels = torch.randn(2, 3, 5, 5), torch.randint(5, (2, 5, 5))
    with pytest.raises(ConfigError, match=r"\[2, 5, 5, 5\] .*movedim\(-1, 1\)"):
        Distiller(Dense(), Dense(), "kd")(images, labels)


@pytest.mark.parametrize(
    ("student", "teacher", "target", "message"),
    [
        (
            Dense(),
            Dense(stride=2),
            (2, 4, 4),
            r"student \[2, 5, 4, 4\] and of the teacher \[2, 5, 2, 2\] are of o",
        ),
        (
            Dense(stride=2),
            Dense(stride=2),
            (2, 4, 4),
            r"target \[2, 4, 4\]: .* int64 \[2, 2, 2\].*logits_of=",
        ),
        (Dense(), Dense(), (2,), r"logits \[2, 5, 4, 4\] and target \[2\]: .*average them to \[B, classes\]"),
        (Dense(), Dense(classes=4), (2, 4, 4), "4"),
    ],
)
def test_dense_logits_that_do_not_fit(student, teacher, target, message):
    distiller = Distiller(student, teacher, "dkd", warmup=0)
    with pytest.raises(ConfigError, match=message) as caught:
        distiller(torch.randn(2, 3, 4, 4), torch.zeros(target, dtype=torch.int64))
    assert "\n" not in str(caught.value)


def test_logits_of_another_size_are_scaled_by_a_function():
    def full(result):
        return nn.functional.interpolate(result["out"], (4, 4))

    distiller = Distiller(Dense(), Dense(stride=2), "dkd", warmup=0, logits_of=full)
    assert distiller(torch.randn(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64)).loss.isfinite()


def test_labels_in_the_mapping():
    torch.manual_seed(0)
    student, teacher = (mdistiller.create_model("resnet8", 5).eval() for _ in range(2))
    distiller = Distiller(student, teacher, "kd").eval()
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    expected = distiller(images, labels)
    for name in ("labels", "label"):
        assert torch.equal(distiller({"pixel_values": images, name: labels}).loss, expected.loss)
    for inputs, got in (({"pixel_values": images}, r"\['pixel_values'\]"), (images, "a Tensor")):
        with pytest.raises(
            ConfigError, match=f"target: got none, with .*{got} as inputs; allowed: .*'labels'"
        ):
            distiller(inputs)


def test_an_example_of_a_batch_gives_the_shapes():
    torch.manual_seed(0)
    student, teacher = Dense(4, True), Dense(6, True)
    words = torch.randint(20, (3, 9))
    taps = {"student_taps": ["layers.1@sequence"], "teacher_taps": ["layers.1@sequence"]}
    for example in (words, {"x": words}):
        distiller = Distiller(student, teacher, "fitnet", input_shape=example, **taps)
        shapes = [p.shape for p in distiller.method.parameters()]
        assert shapes[0] == (6, 4, 1, 1)
        distiller(words, torch.zeros(3, 9, dtype=torch.int64)).loss.backward()
        assert all(p.grad is not None for p in distiller.parameters())
    with pytest.raises(ConfigError, match=r"Dense cannot run on images of shape \(3, 8, 8\)"):
        Distiller(student, teacher, "fitnet", input_shape=(3, 8, 8), **taps)


def test_layers_that_work_in_place_suit_every_tap():
    """The losses of torchvision's own models, whose ReLUs work in place, and of ordinary ones."""
    losses = []
    for changed in (False, True):
        torch.manual_seed(0)
        student, teacher = (torchvision.models.resnet18(num_classes=3).eval() for _ in range(2))
        for module in (*student.modules(), *teacher.modules()):
            if changed and isinstance(module, nn.ReLU):
                module.inplace = False
        distiller = Distiller(student, teacher, "reviewkd", input_shape=(3, 32, 32), warmup=0).eval()
        out = distiller(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
        out.loss.backward()
        losses.append([out.losses["reviewkd"].detach(), student.conv1.weight.grad])
    torch.testing.assert_close(*losses)


def test_models_that_cannot_be_compared_are_one_sentence():
    small, large = mdistiller.create_model("resnet8", 5), mdistiller.create_model("resnet14", 7)
    batch = torch.randn(2, 3, 16, 16), torch.tensor([0, 1])
    for method in ("kd", "dkd"):
        with pytest.raises(ConfigError, match=r"student has 5 classes and the teacher 7\. Give .*'fitnet'"):
            Distiller(small, large, method)(*batch, progress=1.0)
    for models, role in ((("resnet8", large), "student"), ((small, "resnet8"), "teacher")):
        with pytest.raises(
            ConfigError, match=f"{role}: got a str; allowed: a module, such as .*create_model"
        ):
            Distiller(*models, "kd")
    headless = mdistiller.create_model("resnet8", 5)
    headless.fc = nn.Identity()
    with pytest.raises(
        ConfigError, match=r"no linear classifier .* take a method of logits or of feature maps"
    ):
        mdistiller.methods.features.classifier(headless)
