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
from mdistiller.methods import DKDConfig, get_method, list_methods, register_method, registry
from mdistiller.settings import explain
from mdistiller.tasks.classification.config import ClassificationConfig

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
        ConfigError, match=rf"'{re.escape(name)}' keeps a memory.*distiller\(image, label, index"
    ):
        distiller(image, label)
    for first, wrong in ((35, 40), (-1, -1)):
        with pytest.raises(ConfigError, match=f"index must lie in 0 … 39.*got {wrong}"):
            distiller(image, label, torch.arange(first, first + 6))
    assert all(torch.equal(value, before[key]) for key, value in distiller.state_dict().items())
    assert "crd" in distiller(image, label, torch.arange(34, 40))


@pytest.mark.parametrize("name", [*BUILT_IN, "dkd+crd", "lskd-dkd"])
def test_only_methods_that_say_so_read_the_index(name):
    settings = {"negatives": 8} if name == "crd" else {"crd": {"negatives": 8}} if "crd" in name else {}
    student, teacher = pair()
    method = Distiller(student, teacher, name, labels=LABELS, batch_size=6, **settings).learner.method
    learner = mdistiller.distiller.Learner(method.extend_student(pair()[0]), method)
    image, label = (torch.cat([x] * method.views) for x in batch(size=32))
    frozen = mdistiller.distiller.FrozenTeacher(teacher, method.teacher_taps)
    batches = mdistiller.Batch(image, label, None)
    if method.needs_index:
        with pytest.raises((TypeError, AttributeError)):
            learner(batches, frozen(image), torch.tensor(1.0))
    else:
        learner(batches, frozen(image), torch.tensor(1.0))


# Two views


@pytest.mark.parametrize("name", ["mlkd", "crld", "lskd-mlkd", "kd+mlkd", "mlkd+crld"])
def test_one_view_is_not_taken_for_two(name):
    distiller = Distiller(*pair(), name)
    image, label = batch()
    hint = "views=1 of 'mlkd'" if "mlkd" in name and "crld" not in name else ""
    for count in (6, 5):
        with pytest.raises(
            ConfigError, match=r"compares two views.*torch\.cat\(\[label, label\]\)"
        ) as caught:
            distiller(image[:count], label[:count])
        assert ("views=1" in str(caught.value)) == bool(hint)
        assert hint in str(caught.value)
    both = torch.cat([image, image + 0.1])
    assert "task" in distiller(both, torch.cat([label, label]))
    soft = nn.functional.one_hot(label, 10).float()
    assert "task" in Distiller(*pair(), name)(both, torch.cat([soft, soft]))


def test_mlkd_takes_one_view_on_request():
    assert "class" in Distiller(*pair(), "mlkd", views=1)(*batch())


# Classes and models

LOGITS_OR_CLASSIFIER = {"catkd", "simkd", "semckd", "ofa", "sdd", "ctkd", "lskd"}


@pytest.mark.parametrize("name", BUILT_IN)
def test_features_alone_may_come_from_a_teacher_of_other_classes(name):
    image, label = batch(size=32)
    refused = get_method(name).kind == "logit" or name in LOGITS_OR_CLASSIFIER

    def losses():
        distiller = Distiller(*pair(12), name, labels=LABELS, batch_size=6)
        views = distiller.learner.method.views
        return distiller(image.repeat(views, 1, 1, 1), label.repeat(views), torch.arange(6 * views))

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
    losses = Distiller(student, teacher, "dkd", beta=2.0, warmup=0).eval()(image, label)
    with torch.no_grad():
        torch.testing.assert_close(losses["dkd"], dkd_loss(student(image), teacher(image), label, beta=2.0))
    config = Distiller(student, teacher, "lskd-dkd", base={"beta": 3.0}).learner.method.config
    default = get_method("lskd-dkd").Config()
    assert config == default.model_copy(update={"base": default.base.model_copy(update={"beta": 3.0})})
    whole = default.base.model_copy(update={"alpha": 0.0})
    assert Distiller(student, teacher, "lskd-dkd", base=whole).learner.method.config.base == whole


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("dkd", {"betta": 2.0}, r"method 'dkd': betta: .*nearest: beta"),
        ("dkd", {"beta": -1.0}, r"method 'dkd': beta: .*greater than or equal to 0 \(got -1.0\)"),
        ("lskd-dkd", {"base": {"betta": 2.0}}, r"base\.betta: .*nearest: beta"),
        ("dkd+kd", {"kd": 1}, r"method 'dkd\+kd': kd: "),
        (DKDConfig(), {"beta": 2.0}, "beta: settings go with a method's name"),
        ({"name": "dkd", "beta": 2.0}, {}, "a method's name or its config; got dict"),
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
def own(monkeypatch):
    """Makes a registered method of a function of the student's and the teacher's outputs."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

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
    ],
)
def test_what_a_method_returns_is_looked_at(own, function, message):
    own(function)
    with pytest.raises(ConfigError, match=rf"'mine' must return a dict of scalar tensors by name; {message}"):
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
        ConfigError, match="'mine' needs a Config class of its own, a child of MethodConfig; got"
    ):
        own(lambda s, t: {}, Config=config)
