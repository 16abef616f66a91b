"""Distillation as a task of timm: what trains, what is saved, what is evaluated."""

import copy

import pytest
import torch

import mdistiller

timm = pytest.importorskip("timm", minversion="1.0.23")

from mdistiller.integrations.timm import DistillTask  # noqa: E402


def distiller(method="fitnet", **settings):
    torch.manual_seed(0)
    student = timm.create_model("resnet10t", num_classes=3)
    teacher = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32, depth=2)
    taps = {"student_taps": ["stage2"], "teacher_taps": ["stage1"]} if method == "fitnet" else {}
    return mdistiller.Distiller(student, teacher, method, **taps, **settings)


def batches(count=3):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(4, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 0])) for _ in range(count)
    ]


def train(task, optimizer, data):
    losses = []
    for images, labels in data:
        result = task(images, labels)
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
        losses.append(result["loss"].item())
    return losses


def sgd(module):
    from timm.optim import create_optimizer_v2

    return create_optimizer_v2(module, opt="sgd", lr=0.05, weight_decay=0.0)


def test_every_trainable_parameter_moves_and_the_teacher_stays():
    made = distiller()
    task = DistillTask(made, verbose=False)
    module = task.get_trainable_module()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    teacher = copy.deepcopy(made.teacher.state_dict())
    assert any(name.startswith("method.") for name in before)
    train(task, sgd(module), batches())
    assert not [n for n, p in module.named_parameters() if torch.equal(p, before[n])]
    assert all(torch.equal(value, teacher[key]) for key, value in made.teacher.state_dict().items())


def test_the_losses_are_those_of_the_distiller_in_a_plain_loop():
    made = distiller("dkd", total_steps=3)
    twin = copy.deepcopy(made)
    task = DistillTask(made, verbose=False).train()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    expected = []
    for images, labels in batches():
        out = twin(images, labels)
        expected.append(out.loss.item())
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    assert train(task, sgd(task.get_trainable_module()), batches()) == pytest.approx(expected, rel=1e-4)
    result, out = task(*batches()[0]), twin(*batches()[0])
    assert set(result) == {"loss", "output", "task_loss", "dkd_loss"}
    torch.testing.assert_close(result["output"], out.logits, rtol=1e-3, atol=1e-4)


def test_a_checkpoint_has_student_and_adapters():
    task, other = DistillTask(distiller(), verbose=False), DistillTask(distiller(), verbose=False)
    train(task, sgd(task.get_trainable_module()), batches(1))
    student, rest = task.get_eval_model(), task.get_task_state()
    assert student is task.trainable_module.student
    assert rest
    assert all(key.startswith("method.") for key in rest)
    if hasattr(task, "get_checkpoint_state"):  # of later versions
        saved = task.get_checkpoint_state()
        assert set(saved["state_dict"]) == set(student.state_dict())
        other.load_checkpoint_state(saved["state_dict"], saved["task_state"])
    else:
        other.get_eval_model().load_state_dict(student.state_dict())
        other.load_task_state(rest)
    for key, value in task.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_task_state({})


@pytest.mark.skipif(
    not hasattr(timm.task.TrainingTask, "setup_ema"), reason="a task of this timm has no average"
)
def test_the_moving_average_is_a_student_too():
    task = DistillTask(distiller(), verbose=False)
    assert task.get_eval_model(ema=True) is None
    task.setup_ema(decay=0.5)
    train(task, sgd(task.get_trainable_module()), batches(1))
    before = copy.deepcopy(task.get_eval_model(ema=True).state_dict())
    task.update_ema()
    weight, now = "conv1.0.weight", task.get_eval_model(ema=True).state_dict()
    expected = 0.5 * before[weight] + 0.5 * task.get_eval_model().state_dict()[weight]
    torch.testing.assert_close(now[weight], expected)


@pytest.mark.parametrize("options", [{"layer_decay": 0.5}, {}])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t", "resnet8"])
def test_the_optimizer_treats_the_student_as_timm_does(name, options):
    from timm.optim import create_optimizer_v2

    torch.manual_seed(0)
    size = {"img_size": 32, "depth": 3} if "vit" in name else {}
    make = mdistiller.create_model if name == "resnet8" else timm.create_model
    student, teacher = make(name, num_classes=3, **size), timm.create_model("resnet10t", num_classes=3)
    taps = {"student_taps": ["stage1"], "teacher_taps": ["stage2"]}
    made = mdistiller.Distiller(student, teacher, "fitnet", **taps)
    module = DistillTask(made, verbose=False).get_trainable_module()
    settings = {"opt": "adamw", "lr": 0.1, "weight_decay": 0.05, **options}
    alone, both = (
        {
            id(p): (group.get("lr_scale"), group["weight_decay"])
            for group in create_optimizer_v2(model, **settings).param_groups
            for p in group["params"]
        }
        for model in (student, module)
    )
    assert {key: both[key] for key in alone} == alone
    scales = {scale for scale, _ in alone.values()}
    assert len(scales) == (1 if name == "resnet8" or not options else 5 if "vit" in name else 6)
    rest = [both[id(p)][0] for p in made.method.parameters()]
    assert rest
    assert set(rest) == ({1.0} if options else {None})


def test_clipping_leaves_out_the_students_classifier():
    task = DistillTask(distiller(), verbose=False)
    head = {id(p) for p in task.get_eval_model().fc.parameters()}
    every = {id(p) for p in task.get_trainable_module().parameters()}
    assert {id(p) for p in task.get_clip_parameters()} == every
    assert {id(p) for p in task.get_clip_parameters(exclude_head=True)} == every - head
