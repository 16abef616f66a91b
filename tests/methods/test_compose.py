"""Methods made of methods: names, settings and what is added up."""

import pytest
import torch
from pydantic import ValidationError

import mdistiller
from mdistiller.errors import ConfigError, UnknownNameError
from mdistiller.functional import dkd_loss, kd_loss
from mdistiller.methods import (
    DKDConfig,
    FeatureConfig,
    FeatureMethod,
    KDConfig,
    Method,
    MethodConfig,
    get_method,
    register_method,
    registry,
)
from mdistiller.recipes import get_recipe
from mdistiller.tasks.classification.config import ClassificationConfig


def pair():
    torch.manual_seed(0)
    return mdistiller.create_model("resnet8", 10).eval(), mdistiller.create_model("resnet14", 10).eval()


def batch():
    torch.manual_seed(1)
    return torch.randn(4, 3, 16, 16), torch.tensor([0, 3, 3, 9])


def test_a_sum_is_its_parts_weighted_and_one_task():
    student, teacher = pair()
    image, label = batch()
    config = get_method("dkd+kd").Config(
        task_weight=0.5, dkd=DKDConfig(task_weight=0, beta=2.0), dkd_weight=3.0, kd_weight=0.25
    )
    losses = mdistiller.Distiller(student, teacher, config).eval()(image, label, progress=1.0).losses
    with torch.no_grad():
        s, t = student(image), teacher(image)
    assert list(losses) == ["task", "dkd", "kd"]
    torch.testing.assert_close(losses["task"], 0.5 * torch.nn.functional.cross_entropy(s, label))
    torch.testing.assert_close(losses["dkd"], 3 * dkd_loss(s, t, label, beta=2.0))
    torch.testing.assert_close(losses["kd"], 0.25 * 0.9 * kd_loss(s, t))


def test_parts_that_share_a_loss_s_name_keep_both():
    student, teacher = pair()
    losses = mdistiller.Distiller(student, teacher, "kd+eskd").eval()(*batch()).losses
    assert list(losses) == ["task", "kd", "eskd.kd"]
    torch.testing.assert_close(losses["kd"], losses["eskd.kd"])


def test_taps_are_those_of_all_parts():
    student, teacher = pair()
    method = mdistiller.Distiller(student, teacher, "at+fitnet+kd", input_shape=(3, 16, 16)).method
    assert method.student_taps == ("stage1", "stage2", "stage3")
    assert "parts.fitnet" in {name for name, _ in method.named_modules()}
    assert type(method).needs_teacher
    assert type(method).declares_taps()


def test_settings_survive_json_and_wrong_ones_do_not():
    config = get_recipe("cifar100.lskd-dkd+reviewkd.resnet56_resnet20")
    assert config.method.lskd_dkd.base.beta == 36.0  # the pair's 2, 18 times as LSKD has it
    assert ClassificationConfig.model_validate_json(config.model_dump_json()) == config
    dumped = config.model_dump(mode="json")
    dumped["method"]["lskd_dkd"]["base"]["name"] = "kd"
    with pytest.raises(ValidationError, match="settings of 'kd', not of 'dkd'"):
        ClassificationConfig.model_validate(dumped)
    dumped["method"]["lskd_dkd"]["base"] = {"name": "dkd", "gamma": 1}
    with pytest.raises(ValidationError, match="gamma"):
        ClassificationConfig.model_validate(dumped)


def test_a_part_s_own_task_weight_is_refused():
    student, teacher = pair()
    for config in (
        get_method("dkd+kd").Config(kd=KDConfig()),
        get_method("lskd").Config(base=KDConfig()),
    ):
        with pytest.raises(ConfigError, match="task_weight of a part must be 0"):
            mdistiller.Distiller(student, teacher, config)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("kd+kd", ConfigError, "each part may appear once"),
        ("kd-dkd", ConfigError, "'kd' wraps no other method"),
        ("lskd-at", ConfigError, "'lskd' wraps methods that read only logits; 'at' taps features"),
        ("lskd-dkdd", UnknownNameError, "unknown method 'dkdd'; nearest: dkd"),
        ("dkd+", UnknownNameError, "unknown method ''"),
        ("-dkd", UnknownNameError, "unknown method ''"),
    ],
)
def test_names_that_make_no_method(name, error, message):
    with pytest.raises(error, match=message):
        get_method(name)


def test_a_composed_class_is_made_once_and_anew_when_a_part_changes(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    assert get_method("lskd-dkd") is get_method("lskd-dkd")
    first = get_method("kd+dkd")

    class OtherConfig(MethodConfig):
        pass

    class Other(Method):
        Config = OtherConfig

    with pytest.raises(ConfigError, match=r"allowed are letters, digits and _"):
        register_method("a+b")(Other)
    register_method("other")(Other)
    assert get_method("kd+dkd") is not first
    assert get_method("kd+other").Config().other == OtherConfig(task_weight=0)


def test_config_is_the_class_in_the_annotation(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    class OwnConfig(MethodConfig):
        pass

    class Own(Method):
        config: OwnConfig

    class Shared(FeatureMethod):
        pass

    assert register_method("own")(Own).Config is OwnConfig
    assert Shared.Config is FeatureConfig
    with pytest.raises(ConfigError, match="needs a Config class of its own"):
        register_method("shared")(Shared)
