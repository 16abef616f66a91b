"""Distillation in a module of Lightning: what trains, what is logged, saved and evaluated."""

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

import mdistiller
from mdistiller.errors import ConfigError
from mdistiller.integrations.lightning import DistillMixin

lightning = pytest.importorskip("lightning", minversion="2.5")

SETTINGS = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Student(DistillMixin, lightning.LightningModule):
    def __init__(self, distiller):
        super().__init__()
        self.distiller = distiller
        self.losses = []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss


def distiller(method="fitnet", **settings):
    torch.manual_seed(0)
    models = mdistiller.create_model("resnet8", 3), mdistiller.create_model("resnet14", 3)
    return mdistiller.Distiller(*models, method, input_shape=(3, 16, 16), **settings)


def loader(form=tuple):
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(16, 3, 16, 16, generator=generator), torch.arange(16) % 3
    rows = zip(images, labels, strict=True)
    data = [{"image": x, "labels": y} if form is dict else (x, y) for x, y in rows]
    return DataLoader(data, batch_size=4)


def fit(module, data, **options):
    options = {"max_epochs": 1, "enable_checkpointing": False} | options
    trainer = lightning.Trainer(**SETTINGS | options)
    trainer.fit(module, data, data)
    return trainer


def test_every_trainable_parameter_moves_and_the_teacher_stays():
    made = distiller()
    module = Student(made)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    teacher = copy.deepcopy(made.teacher.state_dict())
    assert any(".method." in name for name in before)
    trainer = fit(module, loader())
    assert not [n for n, p in module.named_parameters() if torch.equal(p, before[n])]
    assert all(torch.equal(value, teacher[key]) for key, value in made.teacher.state_dict().items())
    logged = trainer.logged_metrics
    total = logged["train_task"] + logged["train_fitnet"]
    assert logged["train_loss"].item() == pytest.approx(total.item(), rel=1e-5)


@pytest.mark.parametrize("form", [tuple, dict])
def test_the_losses_are_those_of_the_distiller_in_a_plain_loop(form):
    """Also DKD's warm-up, by the trainer's progress."""
    made = distiller("dkd", warmup=1.0)
    twin = copy.deepcopy(made).train()
    module = Student(made)
    trainer = fit(module, loader(form))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05)
    expected = []
    for step, (images, labels) in enumerate(loader()):
        out = twin(images, labels, progress=step / 4)
        expected.append(out.loss.item())
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    assert module.losses == pytest.approx(expected, rel=1e-4)
    logits, target = [], []
    with torch.no_grad():
        for images, labels in loader():
            logits.append(twin.eval().student(images))
            target.append(labels)
    logits, target = torch.cat(logits), torch.cat(target)
    metrics = trainer.callback_metrics
    assert metrics["val_loss"].item() == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-4)
    assert metrics["val_acc"].item() == pytest.approx((logits.argmax(1) == target).float().mean().item())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_epochs": 2}, [i / 8 for i in range(8)]),
        ({"max_epochs": -1, "max_steps": 6}, [0, 1 / 3, 2 / 3]),  # six steps of two optimizers
        ({"max_epochs": 2, "max_steps": 8}, [0, 1 / 4, 1 / 2, 3 / 4]),
    ],
)
def test_progress_with_two_optimizers_by_hand(options, expected):
    class TwoOptimizers(Student):
        automatic_optimization = False

        def configure_optimizers(self):
            parts = self.distiller.student, self.distiller.method
            return [torch.optim.SGD(part.parameters(), lr=0.05) for part in parts]

        def training_step(self, batch, batch_idx):
            loss = super(Student, self).training_step(batch, batch_idx)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

    made, seen = distiller(), []
    forward = made.method.forward
    made.method.forward = lambda *args: (seen.append(float(args[-1])), forward(*args))[1]
    fit(TwoOptimizers(made), loader(), **options)
    assert seen == pytest.approx(expected)


def test_a_checkpoint_resumes_student_and_adapters_without_the_teacher(tmp_path):
    whole = Student(distiller())
    trainer = fit(whole, loader(), default_root_dir=tmp_path)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    state = torch.load(tmp_path / "end.ckpt", weights_only=False)["state_dict"]
    assert {key.split(".")[1] for key in state} == {"student", "method"}
    again = Student(distiller())
    lightning.Trainer(max_epochs=2, **SETTINGS | {"enable_checkpointing": False}).fit(
        again, loader(), loader(), ckpt_path=tmp_path / "end.ckpt"
    )
    longer = Student(distiller())
    lightning.Trainer(max_epochs=2, **SETTINGS | {"enable_checkpointing": False}).fit(
        longer, loader(), loader()
    )
    for (name, value), other in zip(again.state_dict().items(), longer.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, msg=name)


def test_forward_gives_the_student_s_logits():
    module = Student(distiller()).eval()
    images = next(iter(loader()))[0]
    with torch.no_grad():
        torch.testing.assert_close(module(images), module.student(images))


def test_a_batch_of_another_form_is_refused():
    module = Student(distiller())
    for batch, got in (((1, 2, 3, 4), "a tuple of 4"), (torch.zeros(2), "a Tensor: override")):
        with pytest.raises(ConfigError, match=f"a batch is .*got {got}"):
            module.validation_step(batch, 0)
