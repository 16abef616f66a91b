"""Methods of two views whose student runs once on each, as in their authors' code."""

import copy

import pytest
import torch
from torch import nn

import mdistiller
from mdistiller.methods import method_config
from mdistiller.tasks.classification.config import ClassificationConfig

NAMES = ("mlkd", "lskd-mlkd", "mlkd+fitnet")


def settings(name, *, apart):
    if name.startswith("lskd"):
        return {"base": {"norm_per_view": apart}}
    return {"mlkd": {"norm_per_view": apart}} if "+" in name else {"norm_per_view": apart}


def pair():
    torch.manual_seed(0)
    return mdistiller.create_model("resnet8", 10), mdistiller.create_model("resnet14", 10)


def views(count=6):
    torch.manual_seed(1)
    weak, strong = torch.randn(count, 3, 16, 16), 2 * torch.randn(count, 3, 16, 16) + 1
    return weak, strong, torch.arange(count) % 10


def buffers(model):
    return dict(model.named_buffers())


@pytest.mark.parametrize("name", NAMES)
def test_batch_norm_has_the_statistics_of_one_view(name):
    student, teacher = pair()
    by_hand = copy.deepcopy(student).train()
    distiller = mdistiller.Distiller(
        student, teacher, name, input_shape=(3, 16, 16), **settings(name, apart=True)
    ).train()
    weak, strong, label = views()
    out = distiller(torch.cat([weak, strong]), torch.cat([label, label]))
    expected = torch.cat([by_hand(weak), by_hand(strong)])
    assert torch.equal(out.logits, expected)
    found = buffers(distiller.student)
    for key, value in buffers(by_hand).items():
        assert torch.equal(found[key], value), key
        if key.endswith("num_batches_tracked"):
            assert value == 2
    out.loss.backward()
    assert all(p.grad is not None for p in distiller.student.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_by_default_the_student_runs_once_on_all_images(name):
    student, teacher = pair()
    by_hand = copy.deepcopy(student).train()
    distiller = mdistiller.Distiller(student, teacher, name, input_shape=(3, 16, 16)).train()
    weak, strong, label = views()
    images = torch.cat([weak, strong])
    out = distiller(images, torch.cat([label, label]))
    assert torch.equal(out.logits, by_hand(images))
    for key, value in buffers(by_hand).items():
        assert torch.equal(buffers(distiller.student)[key], value), key


def test_features_are_of_both_views_too():
    student, teacher = pair()
    distiller = mdistiller.Distiller(
        student, teacher, "mlkd+fitnet", input_shape=(3, 16, 16), mlkd={"norm_per_view": True}
    ).train()
    names = distiller.method.student_taps
    by_hand = mdistiller.tap(pair()[0].train(), names)
    weak, strong, label = views()
    both = mdistiller.Batch(torch.cat([weak, strong]), torch.cat([label, label]), torch.arange(12))
    found = distiller._run_student(both).outputs.features
    assert list(found) == list(names)
    for name in names:
        expected = torch.cat([by_hand(view).features[name] for view in (weak, strong)])
        assert torch.equal(found[name], expected)


class Named(nn.Module):
    """A model of keyword arguments, as transformers' are."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, scale):
        return self.model(pixel_values * scale[:, None, None, None])


def test_inputs_by_name_are_split_into_views():
    student, teacher = (Named(model) for model in pair())
    by_hand = copy.deepcopy(student).train()
    distiller = mdistiller.Distiller(student, teacher, "mlkd", norm_per_view=True).train()
    weak, strong, label = views()
    scale = torch.arange(1.0, 13.0)
    out = distiller({"pixel_values": torch.cat([weak, strong]), "scale": scale}, torch.cat([label, label]))
    assert torch.equal(out.logits, torch.cat([by_hand(weak, scale[:6]), by_hand(strong, scale[6:])]))


def test_one_view_has_one_pass():
    student, teacher = pair()
    distiller = mdistiller.Distiller(student, teacher, "mlkd", num_views=1, norm_per_view=True).train()
    weak, _, label = views()
    distiller(weak, label)
    assert all(v == 1 for k, v in buffers(student).items() if k.endswith("num_batches_tracked"))


def test_a_config_of_before_runs_as_before():
    stored = ClassificationConfig(
        student={"name": "resnet8"}, teacher={"name": "resnet14"}, method=method_config("mlkd")
    ).model_dump(mode="json")
    del stored["method"]["norm_per_view"]
    stored["augment"]["strong_policy"] = "randaugment"
    config = ClassificationConfig.model_validate(stored)
    assert config.method.norm_per_view is False
    assert config.augment.strong_policy == "randaugment"


@pytest.mark.parametrize(
    "data", ["cifar100.{}.resnet32x4_resnet8x4", "imagenet.{}.resnet34_resnet18", "cifar100.{}.vgg13_vgg8"]
)
def test_recipes_run_the_student_as_the_authors_do(data):
    config = mdistiller.get_recipe(data.format("mlkd"))
    assert config.method.norm_per_view
    assert config.augment.strong_policy == "fixmatch"
    assert mdistiller.get_recipe(data.format("lskd-mlkd")).method.base.norm_per_view
