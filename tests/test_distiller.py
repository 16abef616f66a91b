"""A Distiller in one's own loop: settings by name, and the mistakes that it refuses."""

import copy
import inspect
import re

import pytest
import torch
from torch import nn

import mdistiller
from mdistiller import Distiller, Method, MethodConfig
from mdistiller.errors import ConfigError, UnknownNameError
from mdistiller.functional import dkd_loss, kd_loss
from mdistiller.methods import DKDConfig, get_method, list_methods, method_config, register_method
from mdistiller.methods.base import declares_taps
from mdistiller.methods.compose import build_method
from mdistiller.settings import explain
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.teacher import LiveTeacher

LABELS = torch.arange(40) % 10
BUILT_IN = [name for name in list_methods() if get_method(name).__module__.startswith("mdistiller.")]


def pair(teacher_classes=10):
    torch.manual_seed(0)
    return mdistiller.create_model("resnet8", 10), mdistiller.create_model("resnet14", teacher_classes)


def batch(n=6, size=16):
    torch.manual_seed(1)
    return torch.randn(n, 3, size, size), LABELS[:n]


# Which images


@pytest.mark.parametrize(
    ("name", "settings"), [("crd", {"negatives": 8}), ("dkd+crd", {"crd": {"negatives": 8}})]
)
def test_a_memory_of_images_wants_to_know_which_they_are(name, settings):
    distiller = Distiller(*pair(), name, labels=LABELS, **settings)
    image, label = batch()
    before = copy.deepcopy(distiller.state_dict())
    with pytest.raises(
        ConfigError, match=rf"'{re.escape(name)}' keeps a memory.*distiller\(inputs, target, index"
    ):
        distiller(image, label)
    for first, wrong in ((35, 40), (-1, -1)):
        with pytest.raises(ConfigError, match=f"index must lie in 0 … 39.*got {wrong}"):
            distiller(image, label, torch.arange(first, first + 6))
    assert all(torch.equal(value, before[key]) for key, value in distiller.state_dict().items())
    assert "crd" in distiller(image, label, torch.arange(34, 40), progress=1.0).losses


@pytest.mark.parametrize("name", [*BUILT_IN, "dkd+crd", "lskd-dkd"])
def test_only_methods_that_say_so_read_the_index(name):
    settings = {"negatives": 8} if name == "crd" else {"crd": {"negatives": 8}} if "crd" in name else {}
    student, teacher = pair()
    method = Distiller(student, teacher, name, labels=LABELS, batch_size=6, **settings).method
    image, label = (torch.cat([x] * method.needs.views) for x in batch(size=32))
    batches = mdistiller.Batch(image, label, None)
    outputs = mdistiller.tap(method.extend_student(pair()[0]), method.student_taps)(image)
    frozen = LiveTeacher(teacher, method.teacher_taps)(batches)
    if method.needs.index:
        with pytest.raises((TypeError, AttributeError)):
            method(outputs, frozen, batches, torch.tensor(1.0))
    else:
        method(outputs, frozen, batches, torch.tensor(1.0))


# Two views


@pytest.mark.parametrize("name", ["mlkd", "crld", "lskd-mlkd", "kd+mlkd", "mlkd+crld"])
def test_one_view_is_not_taken_for_two(name):
    distiller = Distiller(*pair(), name)
    image, label = batch()
    hint = "num_views=1 of 'mlkd'" if "mlkd" in name and "crld" not in name else ""
    for count in (6, 5):
        with pytest.raises(
            ConfigError, match=r"compares two views.*torch\.cat\(\[target, target\]\)"
        ) as caught:
            distiller(image[:count], label[:count])
        assert ("num_views=1" in str(caught.value)) == bool(hint)
        assert hint in str(caught.value)
    both = torch.cat([image, image + 0.1])
    assert "task" in distiller(both, torch.cat([label, label]), progress=1.0).losses
    soft = nn.functional.one_hot(label, 10).float()
    assert "task" in Distiller(*pair(), name)(both, torch.cat([soft, soft]), progress=1.0).losses


def test_mlkd_takes_one_view_on_request():
    assert "class" in Distiller(*pair(), "mlkd", num_views=1)(*batch()).losses


# Classes and models

LOGITS_OR_CLASSIFIER = {"catkd", "simkd", "semckd", "ofa", "sdd", "ctkd", "lskd", "nd"}


@pytest.mark.parametrize("name", BUILT_IN)
def test_features_alone_may_come_from_a_teacher_of_other_classes(name):
    image, label = batch(size=32)
    needed = get_method(name).needs.teacher
    refused = needed and (not declares_taps(get_method(name)) or name in LOGITS_OR_CLASSIFIER)

    def losses():
        distiller = Distiller(*pair(12), name, labels=LABELS, batch_size=6)
        views = distiller.method.needs.views
        index = torch.arange(6 * views)
        return distiller(image.repeat(views, 1, 1, 1), label.repeat(views), index, progress=1.0).losses

    if refused:
        with pytest.raises(ConfigError, match="12"):
            losses()
    else:
        assert all(torch.isfinite(value) for value in losses().values())


def test_a_student_is_not_its_own_teacher():
    student, teacher = pair()
    with pytest.raises(ConfigError, match="share parameters"):
        Distiller(student, student, "dkd")
    student.conv1 = teacher.conv1
    with pytest.raises(ConfigError, match="share parameters"):
        Distiller(student, teacher, "dkd")
    assert all(p.requires_grad for p in student.parameters())
    teacher.conv1.requires_grad_(False)
    Distiller(student, teacher, "dkd")


# Settings


def test_settings_by_name_give_the_config_s_losses():
    student, teacher = pair()
    image, label = batch()
    losses = Distiller(student, teacher, "dkd", beta=2.0, warmup=0).eval()(image, label).losses
    with torch.no_grad():
        expected = dkd_loss(student(image), teacher.eval()(image), label, beta=2.0)
    torch.testing.assert_close(losses["dkd"], expected)
    config = Distiller(student, teacher, "lskd-dkd", base={"beta": 3.0}).method.config
    default = method_config("lskd-dkd")
    assert config == default.model_copy(update={"base": default.base.model_copy(update={"beta": 3.0})})
    whole = default.base.model_copy(update={"alpha": 0.0})
    assert Distiller(student, teacher, "lskd-dkd", base=whole).method.config.base == whole


def test_a_mapping_with_a_name_is_a_method_and_its_settings():
    mapping = {"name": "dkd", "beta": 2.0}
    method = Distiller(*pair(), mapping, warmup=0.25).method
    assert method.config == DKDConfig(beta=2.0, warmup=0.25)
    assert mapping == {"name": "dkd", "beta": 2.0}
    whole = Distiller(*pair(), {"name": "lskd-dkd", "base": {"beta": 3.0}}).method.config
    assert whole == Distiller(*pair(), "lskd-dkd", base={"beta": 3.0}).method.config


def test_a_built_method_has_its_models_checked_too():
    student, teacher = pair()
    method = build_method(DKDConfig(), student, teacher, mdistiller.DataInfo((3, 32, 32)))
    with pytest.raises(ConfigError, match="student and teacher share parameters"):
        Distiller(student, student, method)


@pytest.mark.parametrize("name", ["dkd", "fitnet", "simkd"])
def test_a_built_method_trains_as_its_name_does(name):
    image, label = batch(size=32)
    student, teacher = pair()
    torch.manual_seed(2)
    expected = Distiller(student, teacher, name)(image, label, progress=0.5)
    student, teacher = pair()
    torch.manual_seed(2)
    method = build_method(method_config(name), student, teacher, mdistiller.DataInfo((3, 32, 32)))
    extended = method.extend_student(student)
    distiller = Distiller(extended, teacher, method)
    assert distiller.method is method
    assert distiller.student is extended  # not extended once more
    out = distiller(image, label, progress=0.5)
    assert out.losses.keys() == expected.losses.keys()
    assert all(torch.equal(out.losses[key], value) for key, value in expected.losses.items())
    with pytest.raises(ConfigError, match="weight: settings go with a method's name; got a built method"):
        Distiller(extended, teacher, method, weight=2.0)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("dkd", {"betta": 2.0}, r"method 'dkd': betta: .*nearest: beta"),
        ("dkd", {"beta": -1.0}, r"method 'dkd': beta: .*greater than or equal to 0 \(got -1.0\)"),
        ("lskd-dkd", {"base": {"betta": 2.0}}, r"base\.betta: .*nearest: beta"),
        ("dkd+kd", {"kd": 1}, r"method 'dkd\+kd': kd: "),
        (DKDConfig(), {"beta": 2.0}, "beta: settings go with a method's name"),
        ({"name": "dkd", "beta": -1.0}, {}, r"method 'dkd': beta: .*greater than or equal to 0 \(got -1.0\)"),
        ({"beta": 2.0}, {}, "got a dict; allowed: a method's name, its config, a mapping with its name, or"),
    ],
)
def test_wrong_settings_are_named(method, settings, message):
    with pytest.raises(ConfigError, match=message):
        Distiller(*pair(), method, **settings)


@pytest.mark.parametrize("name", BUILT_IN)
def test_no_setting_is_hidden_by_an_argument(name):
    taken = {p for p in inspect.signature(Distiller).parameters if p != "settings"}
    assert not taken & (set(get_method(name).Config.model_fields) | set(list_methods())), name


def test_dot_is_no_method_and_a_flag_is_no_help_in_python():
    for name in ("dot", "dot-dkd", "kd+dot-dkd"):
        with pytest.raises(ConfigError, match="DOT is an optimizer"):
            Distiller(*pair(), name)
    with pytest.raises(UnknownNameError, match="nearest: dkd") as caught:
        Distiller(*pair(), "dkdd")
    assert "--" not in str(caught.value)
    assert caught.value.for_command().endswith(". A method of your own: --plugin FILE")
    with pytest.raises(ValueError, match="unknown method") as wrapped:
        ClassificationConfig.model_validate({"student": {"name": "resnet8"}, "method": {"name": "dkdd"}})
    assert "--plugin FILE" in str(explain(wrapped.value, "config.json"))


# Methods of one's own


@pytest.fixture
def own(registries):
    """Makes a registered method of a function of the student's and the teacher's outputs."""

    def make(function, **attributes):
        class MineConfig(MethodConfig):
            pass

        def forward(self, student, teacher, batch, progress):
            return function(student, teacher)

        return register_method("mine")(
            type("Mine", (Method,), {"Config": MineConfig, "forward": forward, **attributes})
        )

    return make


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda s, t: kd_loss(s.logits, t.logits), "got Tensor"),
        (lambda s, t: None, "got NoneType"),
        (lambda s, t: {"a": s.logits.mean(), "b": s.logits}, r"got 'b': a tensor \[6, 10\]"),
        (lambda s, t: {"a": 1.0}, "got 'a': float"),
        (lambda s, t: {}, "got an empty one"),
        (lambda s, t: {"task": s.logits.mean()}, "got 'task': the task's own loss is added"),
    ],
)
def test_what_a_method_returns_is_looked_at(own, function, message):
    own(function)
    with pytest.raises(ConfigError, match=rf"'mine' must return a dict of scalar tensors by name.*{message}"):
        Distiller(*pair(), "mine")(*batch())


def test_a_feature_that_is_read_has_to_be_tapped(own):
    own(lambda s, t: {"a": (s.features["stage1"] - t.features["stage1"]).mean()}, student_taps=("stage1",))
    with pytest.raises(ConfigError, match=r"the teacher's feature 'stage1'.*add it to teacher_taps"):
        Distiller(*pair(), "mine")(*batch())
    own(lambda s, t: {"a": s.features["stage2"].mean()}, student_taps=("stage1",))
    with pytest.raises(ConfigError, match=r"add it to student_taps; tapped are \['stage1'\]"):
        Distiller(*pair(), "mine")(*batch())
    own(lambda s, t: {"a": s.logits.mean() * {}["x"]})
    with pytest.raises(KeyError):  # its own mistake stays what it is
        Distiller(*pair(), "mine")(*batch())


@pytest.mark.parametrize("name", ["mine", "kd+mine"])
def test_one_name_is_no_list_of_taps(own, name):
    own(lambda s, t: {"a": s.logits.mean()}, student_taps="pooled")
    with pytest.raises(ConfigError, match=r"such as \['pooled'\]; got the text 'pooled'"):
        Distiller(*pair(), name)
    with pytest.raises(ConfigError, match="got the text 'pooled'"):
        mdistiller.tap(pair()[0], "pooled")
    with pytest.raises(ConfigError, match="got the text 'pooled'"):
        mdistiller.taps.probe(pair()[0], "pooled", (3, 16, 16))


class NoConfig:
    weight = 1.0


@pytest.mark.parametrize("config", [NoConfig, {"weight": 1.0}, DKDConfig()])
def test_a_method_s_config_is_a_method_config(own, config):
    with pytest.raises(
        ConfigError, match="'mine' needs a Config class of its own, which extends MethodConfig; got"
    ):
        own(lambda s, t: {}, Config=config)


# Contracts


SCHEDULED = ["dkd", "reviewkd", "gdkd", "rld", "ctkd", "eskd", "dkd+at", "lskd-dkd"]


@pytest.mark.parametrize("name", SCHEDULED)
def test_a_schedule_never_vanishes_silently(name):
    settings = {"stop": 0.5} if name == "eskd" else {}
    image, label = batch()
    with pytest.raises(ConfigError, match=r"total_steps=N.*progress=fraction_done"):
        Distiller(*pair(), name, input_shape=(3, 16, 16), **settings)(image, label)
    Distiller(*pair(), name, input_shape=(3, 16, 16), **settings)(image, label, progress=0.5)
    Distiller(*pair(), name, input_shape=(3, 16, 16), total_steps=4, **settings)(image, label)


def test_total_steps_count_training_calls_as_the_trainer_does():
    image, label = batch()
    distiller = Distiller(*pair(), "dkd", warmup=0.5, total_steps=8)
    twin = Distiller(*pair(), "dkd", warmup=0.5)
    for step in range(10):
        loss = distiller(image, label).losses["dkd"]
        assert torch.equal(loss, twin(image, label, progress=min(step / 8, 1.0)).losses["dkd"])
    assert int(distiller.state_dict()["step"]) == 10  # a loop that resumes goes on from there
    distiller.eval()(image, label)
    assert int(distiller.state_dict()["step"]) == 10
    with pytest.raises(ConfigError, match="total_steps: got 0"):
        Distiller(*pair(), "dkd", total_steps=0)


def test_an_early_stop_is_heard_in_one_s_own_loop():
    image, label = batch()
    distiller = Distiller(*pair(), "eskd", stop=0.5, total_steps=4)
    kd = [distiller(image, label).losses["kd"].item() for _ in range(4)]
    assert kd[0] > 0 < kd[1]
    assert kd[2:] == [0.0, 0.0]


def test_the_output_has_loss_losses_and_logits():
    student, teacher = pair()
    image, label = batch()
    out = Distiller(student, teacher, "kd").eval()(image, label)
    assert torch.equal(out.loss, out.losses["task"] + out.losses["kd"])
    torch.testing.assert_close(out.logits, student.eval()(image))
    assert out.loss.ndim == 0
    double = Distiller(student, teacher, "kd").double()(image.double(), label)
    assert double.loss.dtype == torch.float64


@pytest.mark.parametrize("method", ["simkd", "kd", "fitnet", "srrl", "ofd"])
def test_models_that_are_handed_over_stay_as_they_are(method):
    student, teacher = pair()
    teacher.train()
    image, label = batch(size=32)
    before = [copy.deepcopy(model.state_dict()) for model in (student, teacher)]
    classes = [[type(m) for m in model.modules()] for model in (student, teacher)]
    distiller = Distiller(student, teacher, method)
    assert student(image).shape == teacher(image).shape == (6, 10)
    for model, state in zip((student, teacher), before, strict=True):
        model.load_state_dict(state)  # the calls above moved batch norm's statistics
    distiller(image, label, progress=1.0).loss.backward()
    assert [[type(m) for m in model.modules()] for model in (student, teacher)] == classes
    assert all(m.training for m in teacher.modules())
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())
    assert all(torch.equal(v, before[1][k]) for k, v in teacher.state_dict().items())
    if method == "simkd":
        assert distiller.student is not student
        assert all(torch.equal(v, before[0][k]) for k, v in student.state_dict().items())
    else:
        assert distiller.student is student
        assert student.state_dict().keys() == before[0].keys()


def test_labels_of_several_classes_at_once_are_named():
    image, label = batch()
    several = nn.functional.one_hot(label, 10).float()
    several[:, 3] = 1.0
    with pytest.raises(
        ConfigError, match=r"each row must sum to one; got a row that sums to 2.*multi_label=True"
    ):
        Distiller(*pair(), "kd")(image, several)
    mixed = nn.functional.one_hot(label, 10).float() * 0.9 + 0.01
    Distiller(*pair(), "kd")(image, mixed)


class Named(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, scale):
        return {"logits": self.model(pixel_values) * scale}


def test_inputs_may_be_a_mapping():
    student, teacher = pair()
    image, label = batch()
    inputs = {"pixel_values": image, "scale": torch.tensor(1.0)}
    named = Distiller(Named(student), Named(teacher), "kd").eval()(inputs, label)
    torch.testing.assert_close(named.loss, Distiller(student, teacher, "kd").eval()(image, label).loss)
