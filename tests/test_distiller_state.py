"""A Distiller in PyTorch's distributed checkpoints, in pickles, and with a teacher of another precision."""

import copy
import io
import pickle

import pytest
import torch
from torch import distributed
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_state_dict
from torch.nn.utils.parametrize import is_parametrized

import mdistiller
from mdistiller.methods import get_method
from mdistiller.methods.compose import Wrapper

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
METHODS = sorted({*mdistiller.list_methods()} - {"binary_kd"})
WRAPPED = [f"{name}-dkd+fitnet" for name in METHODS if issubclass(get_method(name), Wrapper)]


def distiller(method, seed=0):
    torch.manual_seed(seed)
    student, teacher = mdistiller.create_model("resnet8", 10), mdistiller.create_model("resnet14", 10)
    options = {"batch_size": 4, "labels": torch.arange(8), "total_steps": 4}
    return mdistiller.Distiller(student, teacher, method, **options)


def loss(made):
    torch.manual_seed(1)
    views = made.method.needs.views
    return made(IMAGES.repeat(views, 1, 1, 1), *[torch.arange(4).repeat(views)] * 2).loss


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("method", METHODS + WRAPPED)
def test_a_distributed_checkpoint_has_student_method_and_optimizer(tmp_path, method):
    made, other = distiller(method), distiller(method, seed=1)
    assert set(get_model_state_dict(made)) == set(made.state_dict())
    optimizers = [torch.optim.SGD(x.parameters(), lr=0.1, momentum=0.9) for x in (made, other)]
    loss(made).backward()
    optimizers[0].step()
    saved = dict(zip(("model", "optimizer"), get_state_dict(made, optimizers[0]), strict=True))
    distributed.checkpoint.save(saved, checkpoint_id=tmp_path, no_dist=True)
    read = dict(zip(("model", "optimizer"), get_state_dict(other, optimizers[1]), strict=True))
    distributed.checkpoint.load(read, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(other, optimizers[1], model_state_dict=read["model"], optim_state_dict=read["optimizer"])
    for (key, value), found in zip(made.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, found), key
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    assert states[0]
    for key, value in states[0].items():
        assert torch.equal(value["momentum_buffer"], states[1][key]["momentum_buffer"])


@pytest.mark.parametrize("method", METHODS + WRAPPED)
def test_a_distiller_is_pickled_with_its_teacher(method):
    made, file = distiller(method), io.BytesIO()
    if any(map(is_parametrized, made.modules())):  # a limit of PyTorch's
        with pytest.raises(RuntimeError, match="only supported through state_dict"):
            torch.save(made, file)
        return
    torch.save(made, file)
    file.seek(0)
    for again in (pickle.loads(pickle.dumps(made)), torch.load(file, weights_only=False)):
        assert torch.equal(loss(again), loss(distiller(method)))


@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"multi_label": True, "method": "fitnet"}])
def test_every_task_loss_is_pickled(options):
    student, teacher = mdistiller.create_model("resnet8", 10), mdistiller.create_model("resnet14", 10)
    made = mdistiller.Distiller(student, teacher, **options).eval()
    target = torch.eye(10)[:4] if "multi_label" in options else torch.arange(4)
    again = pickle.loads(pickle.dumps(made))
    assert torch.equal(again(IMAGES, target, progress=1.0).loss, made(IMAGES, target, progress=1.0).loss)


@pytest.mark.parametrize("method", METHODS)
def test_a_bfloat16_teacher_beside_a_float32_student(method):
    torch.manual_seed(0)
    teacher = mdistiller.create_model("resnet14", 10)
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(1)
        student = mdistiller.create_model("resnet8", 10)
        options = {"batch_size": 4, "labels": torch.arange(8), "total_steps": 4}
        made = mdistiller.Distiller(student, copy.deepcopy(teacher).to(dtype), method, **options).eval()
        views = made.method.needs.views
        torch.manual_seed(2)
        out = made(
            IMAGES.repeat(views, 1, 1, 1), torch.arange(4).repeat(views), torch.arange(4).repeat(views), 1.0
        )
        out.loss.backward()
        assert all(p.dtype == torch.float32 for p in made.parameters())
        losses.append(out.losses)
    for name, value in losses[0].items():
        assert losses[1][name].dtype == torch.float32
        torch.testing.assert_close(losses[1][name], value, rtol=0.05, atol=0.02, msg=name)
