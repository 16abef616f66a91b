"""DOT against its update rule written out, under accumulation, compilation and two processes."""

import copy

import pytest
import torch
import torch.distributed as dist
from processes import run_ranks
from pydantic import ValidationError
from small_runs import make_trainer, next_batch, step_on
from torch import nn

from mdistiller.config import OptimConfig
from mdistiller.data import DataConfig, load_data
from mdistiller.errors import ConfigError
from mdistiller.methods import NoneConfig, method_config
from mdistiller.models import ModelConfig, create_model
from mdistiller.recipes import get_recipe
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.training.distributed import World
from mdistiller.training.dot import DOT

SETTINGS = {"lr": 0.1, "momentum": 0.8, "deltas": {"task": -0.15, "distillation": 0.15}, "weight_decay": 0.01}


class Three(nn.Module):
    """One parameter that both losses reach, and one for each alone."""

    def __init__(self):
        super().__init__()
        self.both = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        self.task = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))
        self.distillation = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))

    def losses(self):
        task = {"task": (self.both**2).sum() * self.task.sum()}
        distillation = {
            "kd": (self.both.exp() * self.distillation).sum(),
            "more": self.distillation.sum() ** 3,
        }
        return task, distillation


def written_out(steps):
    """The rule in plain numbers, with the gradients of `Three.losses` by hand."""
    both, task, kd = torch.tensor([1.0, -2.0]).double(), 0.5, 3.0
    vt, vd, v_task, v_kd = torch.zeros(2).double(), torch.zeros(2).double(), 0.0, 0.0
    for _ in range(steps):
        g_t, g_d = 2 * both * task, both.exp() * kd
        g_task, g_kd = (both**2).sum().item(), both.exp().sum().item() + 3 * kd**2
        vt = 0.65 * vt + g_t + 0.01 * both
        vd = 0.95 * vd + g_d
        v_task = 0.8 * v_task + g_task + 0.01 * task
        v_kd = 0.8 * v_kd + g_kd + 0.01 * kd
        both, task, kd = both - 0.001 * (vt + vd), task - 0.001 * v_task, kd - 0.001 * v_kd
    return [both, *torch.tensor([[task], [kd]], dtype=torch.float64)]


@pytest.mark.parametrize("parts", [1, 3])
def test_updates_are_the_rule_s_whole_or_in_parts(parts):
    model = Three()
    optimizer = DOT(model.parameters(), **SETTINGS | {"lr": 0.001})
    for _ in range(3):
        for _ in range(parts):
            optimizer.backward(*model.losses(), 1 / parts)
        optimizer.step()
    for got, want in zip(model.parameters(), written_out(3), strict=True):
        torch.testing.assert_close(got.detach(), want, rtol=1e-12, atol=1e-12)


def test_without_a_difference_it_is_sgd():
    a = Three()
    b = copy.deepcopy(a)
    dot = DOT(a.parameters(), **SETTINGS | {"deltas": {"task": 0.0, "distillation": 0.0}, "lr": 1e-3})
    sgd = torch.optim.SGD(b.parameters(), lr=1e-3, momentum=0.8, weight_decay=0.01)
    for _ in range(4):
        dot.backward(*a.losses())
        dot.step()
        sgd.zero_grad()
        sum(value for part in b.losses() for value in part.values()).backward()
        sgd.step()
    for got, want in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_state_goes_on_where_it_stopped():
    a = Three()
    first = DOT(a.parameters(), **SETTINGS | {"lr": 1e-3})
    first.backward(*a.losses())
    first.step()
    b = copy.deepcopy(a)
    second = DOT(b.parameters(), **SETTINGS | {"lr": 1e-3})
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for model, optimizer in ((a, first), (b, second)):
        optimizer.backward(*model.losses())
        optimizer.step()
    for got, want in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(got, want)


def test_a_task_alone_has_nothing_to_set_apart():
    model = Three()
    with pytest.raises(ConfigError, match="needs a distillation loss"):
        DOT(model.parameters(), **SETTINGS).backward(model.losses()[0], {})


DATA = DataConfig(kind="synthetic", synthetic_samples=16, synthetic_classes=4, image_size=16)


def small(width):
    # Without batch norm, whose statistics are those of a process.
    torch.manual_seed(width)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2),
        nn.GroupNorm(2, width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(49 * width, 4),
    )


PAIRS = [("kd", "dot"), ("deepkd", "deepkd")]


def weights_after(steps, world, method="kd", optimizer="dot", **more):
    config = ClassificationConfig(
        data=DATA,
        student=ModelConfig(name="x"),
        teacher=ModelConfig(name="y"),
        method=method_config(method),
        optim=OptimConfig(lr=0.05, name=optimizer, delta=0.05, accumulate=more.pop("accumulate", 1)),
        batch_size=8,
        epochs=9,
        device="cpu",
        augment={"padding": 0, "flip": False},
        **more,
    )
    trainer = make_trainer(config, load_data(DATA), small(4), small(8), world)
    trainer.distiller.train()
    trainer.source.augment.train()
    batches = iter(trainer.source.loader.epoch(0))
    for _ in range(steps):
        step_on(trainer, next(batches))
    return [p.detach() for p in trainer.distiller.parameters()]


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    world = World(torch.device("cpu"), rank, 2)
    torch.save([weights_after(2, world, *names) for names in PAIRS], f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_accumulation_and_compilation_give_the_weights_of_one(tmp_path):
    here = World(torch.device("cpu"))
    run_ranks(work, str(tmp_path))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for i, names in enumerate(PAIRS):
        expected = weights_after(2, here, *names)
        others = [rank[i] for rank in ranks]
        others += [
            weights_after(2, here, *names, accumulate=4),
            weights_after(2, here, *names, compile="default"),
        ]
        for weights in others:
            for got, want in zip(weights, expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_dot_is_an_optimizer_of_any_recipe():
    config = get_recipe("cifar100.dkd.resnet56_resnet20").replace(optim={"name": "dot"})
    assert (config.optim.name, config.optim.delta, config.optim.lr) == ("dot", 0.075, 0.05)
    with pytest.raises(ConfigError, match=r"optim.name dot"):
        get_recipe("cifar100.dot.resnet56_resnet20")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nesterov": True}, "neither nesterov nor clip_norm"),
        ({"clip_norm": 1.0}, "neither nesterov nor clip_norm"),
        ({"delta": 0.2}, r"momentum minus and plus delta must lie in \[0, 1\)"),
        ({"momentum": 0.05}, r"momentum minus and plus delta must lie in \[0, 1\)"),
    ],
)
def test_settings_that_do_not_fit(fields, message):
    with pytest.raises(ValidationError, match=message):
        OptimConfig(**{"name": "dot"} | fields)


def test_float16_and_methods_without_distillation_are_refused():
    with pytest.raises(ValidationError, match="float32 or bfloat16; got float16"):
        ClassificationConfig(
            student=ModelConfig(name="x"), optim={"name": "dot", "delta": 0.05}, precision="float16"
        )
    config = ClassificationConfig(
        data=DATA,
        student=ModelConfig(name="resnet8"),
        method=NoneConfig(),
        optim={"name": "dot", "delta": 0.05},
        device="cpu",
    )
    trainer = make_trainer(
        config, load_data(DATA), create_model("resnet8", 4), None, World(torch.device("cpu"))
    )
    with pytest.raises(ConfigError, match="needs a distillation loss"):
        step_on(trainer, next(iter(trainer.source.loader.epoch(0))))


BUFFERS = "task", "target", "distillation"


def losses_of_three(model):
    """As `Three.losses`, with a part of the distillation for the target class."""
    task = {"task": (model.both**2).sum() * model.task.sum()}
    return task, {
        "tckd": (3 * model.both).exp().sum() / 9,
        "nckd": model.both.exp().sum() * model.distillation.sum(),
    }


@pytest.mark.parametrize("parts", [1, 2])
def test_deepkd_has_a_momentum_for_each_of_three_gradients(parts):
    model = Three()
    settings = SETTINGS | {"lr": 0.001, "deltas": {"task": 0.1, "target": -0.2, "distillation": 0.15}}
    optimizer = DOT(model.parameters(), **settings)
    both, task, kd = torch.tensor([1.0, -2.0]).double(), 0.5, 3.0
    v, v_task, v_kd = [torch.zeros(2).double() for _ in range(3)], 0.0, 0.0
    for _ in range(3):
        for _ in range(parts):
            optimizer.backward(*losses_of_three(model), 1 / parts)
        optimizer.step()
        gradients = 2 * both * task + 0.01 * both, (3 * both).exp() / 3, both.exp() * kd
        v = [m * x + g for m, x, g in zip((0.9, 0.6, 0.95), v, gradients, strict=True)]
        v_task = 0.8 * v_task + (both**2).sum().item() + 0.01 * task
        v_kd = 0.8 * v_kd + both.exp().sum().item() + 0.01 * kd
        both, task, kd = both - 0.001 * sum(v), task - 0.001 * v_task, kd - 0.001 * v_kd
    expected = [both, *torch.tensor([[task], [kd]], dtype=torch.float64)]
    for got, want in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(got.detach(), want, rtol=1e-12, atol=1e-12)


def test_deepkd_with_dot_s_deltas_is_dot():
    models = Three(), Three()
    dot = DOT(models[0].parameters(), **SETTINGS | {"lr": 0.001})
    deltas = dict(zip(BUFFERS, (-0.15, 0.15, 0.15), strict=True))
    deep = DOT(models[1].parameters(), lr=0.001, momentum=0.8, weight_decay=0.01, deltas=deltas)
    for _ in range(3):
        for model, optimizer in zip(models, (dot, deep), strict=True):
            optimizer.backward(*losses_of_three(model))
            optimizer.step()
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b)


def test_deepkd_needs_both_parts_and_momenta_below_one():
    model = Three()
    optimizer = DOT(model.parameters(), lr=0.1, momentum=0.8, deltas=dict.fromkeys(BUFFERS, 0.0))
    with pytest.raises(
        ConfigError, match=r"needs a distillation loss 'tckd' and another one.*\['kd', 'more'\]"
    ):
        optimizer.backward(*model.losses())
    with pytest.raises(ValidationError, match=r"deltas: got .* momentum plus each must lie in"):
        OptimConfig(name="deepkd", deltas=(0.1, 0.0, 0.0))
    with pytest.raises(ValidationError, match="'deepkd' takes neither nesterov nor clip_norm"):
        OptimConfig(name="deepkd", clip_norm=1.0)
    with pytest.raises(ConfigError, match="'deepkd' takes precision float32 or bfloat16"):
        get_recipe("digits.deepkd.resnet20_resnet8").replace(optim={"name": "deepkd"}, precision="float16")


def test_deepkd_trains_and_resumes_bit_for_bit():
    data = DataConfig(kind="synthetic", synthetic_samples=16, synthetic_classes=4, image_size=32)
    config = ClassificationConfig(
        data=data,
        student=ModelConfig(name="resnet8"),
        teacher=ModelConfig(name="resnet8"),
        method=method_config("deepkd"),
        optim=OptimConfig(name="deepkd"),
        batch_size=8,
        epochs=2,
        device="cpu",
    )

    def trainer():
        torch.manual_seed(0)
        models = create_model("resnet8", 4), create_model("resnet8", 4)
        return make_trainer(config, load_data(data), *models)

    def steps(made):
        made.distiller.train()
        for _ in range(2):
            made.train_step(*next_batch(made, made.step))

    whole = trainer()
    steps(whole)
    state = copy.deepcopy(whole.state_dict())
    steps(whole)
    resumed = trainer()
    resumed.load_state_dict(state)
    steps(resumed)
    for key, value in whole.distiller.state_dict().items():
        assert torch.equal(value, resumed.distiller.state_dict()[key]), key
