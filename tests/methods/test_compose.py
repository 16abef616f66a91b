"""Methods made of methods: names, settings and what is added up."""

import copy
import pickle

import pytest
import torch
from pydantic import ValidationError

import mdistiller
from mdistiller.errors import ConfigError, UnknownNameError
from mdistiller.functional import dkd_loss, kd_loss
from mdistiller.methods import (
    AT,
    DKD,
    LSKD,
    ATConfig,
    DKDConfig,
    FeatureConfig,
    FeatureMethod,
    KDConfig,
    LSKDConfig,
    Method,
    MethodConfig,
    Sum,
    get_method,
    method_config,
    register_method,
    registry,
)
from mdistiller.methods.compose import SumConfig, build_method
from mdistiller.methods.several import Several
from mdistiller.recipes import get_recipe
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.types import DataInfo


def pair():
    torch.manual_seed(0)
    return mdistiller.create_model("resnet8", 10).eval(), mdistiller.create_model("resnet14", 10).eval()


def batch():
    torch.manual_seed(1)
    return torch.randn(4, 3, 16, 16), torch.tensor([0, 3, 3, 9])


def test_a_sum_is_its_parts_weighted_and_one_task():
    student, teacher = pair()
    image, label = batch()
    config = method_config(
        "dkd+kd", task_weight=0.5, dkd=DKDConfig(task_weight=0, beta=2.0), dkd_weight=3.0, kd_weight=0.25
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
    assert method.needs.teacher


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
        method_config("dkd+kd", kd=KDConfig()),
        method_config("lskd", base=KDConfig()),
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


def test_a_new_method_is_a_part_at_once(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    class OtherConfig(MethodConfig):
        pass

    class Other(Method):
        Config = OtherConfig

    with pytest.raises(ConfigError, match=r"allowed are letters, digits and _"):
        register_method("a+b")(Other)
    with pytest.raises(UnknownNameError, match="'other'"):
        get_method("kd+other")
    register_method("other")(Other)
    assert method_config("kd+other").other == OtherConfig(task_weight=0)


def test_config_is_the_attribute_and_not_the_annotation(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    class OwnConfig(MethodConfig):
        pass

    class Annotated(Method):
        config: OwnConfig

    class Own(Method):
        Config = OwnConfig

    class Shared(FeatureMethod):
        pass

    class Stolen(Method):
        Config = KDConfig

    assert register_method("own")(Own).Config is OwnConfig
    assert Shared.Config is FeatureConfig
    for cls in (Annotated, Shared):
        with pytest.raises(ConfigError, match=rf"a line such as `Config = {cls.__name__}Config`"):
            register_method("shared")(cls)
    with pytest.raises(ConfigError, match=r"a Config class of its own; KDConfig is of 'kd'"):
        register_method("stolen")(Stolen)


@pytest.mark.parametrize("name", ["dkd+reviewkd", "lskd-dkd", "nd-lskd-kd", "ctkd+fitnet"])
def test_configs_and_methods_are_pickled_and_copied(name):
    config = method_config(name)
    for again in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert again == config
        assert again.model_dump() == config.model_dump()
    student, teacher = pair()
    distiller = mdistiller.Distiller(student, teacher, config, input_shape=(3, 16, 16)).eval()
    method, losses = distiller.method, distiller(*batch(), progress=1.0).losses
    assert (method.name, method.config) == (name, config)
    for again in (pickle.loads(pickle.dumps(method)), copy.deepcopy(method)):
        distiller.method = again
        found = distiller(*batch(), progress=1.0).losses
        assert all(torch.equal(found[key], value) for key, value in losses.items())


def test_methods_of_several_teachers_are_pickled():
    student, teacher = pair()
    config = method_config("dkd+fitnet")
    data = DataInfo((3, 16, 16))
    whole = Several([build_method(config, student, teacher, data) for _ in range(2)], [0.5, 2.0], 0.1)
    again = pickle.loads(pickle.dumps(whole))
    assert (again.name, again.config, again.weights) == ("dkd+fitnet", config, [0.5, 2.0])
    assert again.teacher_taps == whole.teacher_taps
    assert all(map(torch.equal, again.state_dict().values(), whole.state_dict().values()))


def test_a_sum_and_a_wrapper_of_instances():
    student, teacher = pair()
    data = DataInfo((3, 16, 16))
    dkd = DKD(DKDConfig(task_weight=0), student, teacher, data)
    config = LSKDConfig(base=dkd.config)
    assert config.method_name == "lskd-dkd"
    lskd = LSKD(config.replace(task_weight=0), dkd, student, teacher, data)
    at = AT(ATConfig(task_weight=0), student, teacher, data)
    whole = Sum([lskd, at])
    assert whole.name == "lskd-dkd+at"
    assert whole.config == SumConfig(lskd_dkd=lskd.config, at=at.config)
    assert (whole.config.task_weight, whole.config.at_weight) == (1, 1)
    assert whole.parts["lskd_dkd"].base is dkd
