"""Promises of every method, over the whole registry.

A method's own test module has the facts about the method that these tests need, in a set `CONTRACT`:

- "zero at equal": the distillation losses are zero for a student that equals the teacher.
- "convolutional teacher": a transformer is refused as the teacher.
- "plain SGD": the loss falls under SGD, but not under Adam.
- "curriculum": there is a schedule beside the warm-up.
- "noise": noise is drawn in a step, by each process its own.
"""

import copy
import functools
import importlib
import io

import pytest
import torch
import torch.distributed as dist
from processes import run_ranks
from small_runs import ask_teacher, make_trainer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mdistiller
from mdistiller.data import DataConfig, load_data
from mdistiller.errors import ConfigError
from mdistiller.methods import (
    FeatureMethod,
    Method,
    MethodConfig,
    Wrapper,
    get_method,
    list_methods,
    method_config,
    register_method,
    registry,
)
from mdistiller.methods.compose import Sum, build_method, needs_teacher
from mdistiller.methods.features import classifier
from mdistiller.models import ModelConfig
from mdistiller.runs.checkpoint import save_student
from mdistiller.taps import TappedModel
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.teacher import LiveTeacher
from mdistiller.types import Batch, DataInfo, Outputs

BUILT_IN = [name for name in list_methods() if get_method(name).__module__.startswith("mdistiller.")]


def taken(wrapper, base):
    try:
        wrapper.check_base(base)
    except ConfigError:
        return False
    return True


WRAPPERS = [cls for cls in registry._METHODS.values() if issubclass(cls, Wrapper)]
REGISTERED = [registry._METHODS[name] for name in BUILT_IN]
# Each wrapper around DKD and around the bases for which it has settings of its own.
COMPOSED = [
    f"{w.name}-{base.name}"
    for w in WRAPPERS
    for base in REGISTERED
    if taken(w, base) and base.name != "kd" and (base.name == "dkd" or w.base_defaults(base.name))
]
# A feature method with a schedule, added to DKD.
SUM = next(m.name for m in REGISTERED if issubclass(m, FeatureMethod) and "warmup" in m.Config.model_fields)
METHODS = [*BUILT_IN, *COMPOSED, f"dkd+{SUM}"]
B, CLASSES = 8, 10
LABELS = torch.arange(40) % CLASSES
# Their losses are tested in the modules of other methods.
FACTS = {"kd": {"zero at equal"}, "none": set()}

PAIRS = {
    "same family": (("resnet20", {}), ("resnet8", {})),
    "different family": (("vgg13", {}), ("MobileNetV2", {})),
    "transformer": (
        (
            "timm/vit_tiny_patch16_224",
            {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3},
        ),
        ("resnet8", {}),
    ),
}


def facts(name):
    """The facts about a method's parts."""
    parts = name.replace("+", "-").split("-")
    return [
        FACTS[part] if part in FACTS else importlib.import_module(f"test_{part}").CONTRACT for part in parts
    ]


def any_has(name, fact):
    return any(fact in part for part in facts(name))


def models(pair="same family"):
    """The student and the teacher of a pair, the same at each call."""
    built, state = prototypes(pair)
    torch.set_rng_state(state)
    return copy.deepcopy(built)


@functools.cache
def prototypes(pair):
    built = []
    for i, (name, options) in enumerate(PAIRS[pair]):
        torch.manual_seed(i)
        built.append(mdistiller.create_model(name, CLASSES, **options))
    teacher, student = built
    taught(teacher)
    return (student, teacher), torch.get_rng_state()


def taught(teacher):
    """As after training: with statistics of images, and predictions that differ and are sure."""
    image = torch.randn(64, 3, 32, 32)
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a plain mean
    with torch.no_grad():
        teacher.train()(image)
        logits = teacher.eval()(image)
        layer = classifier(teacher)
        layer.bias -= logits.mean(0)
        scale = 4 / (logits - logits.mean(0)).std()
        layer.weight *= scale
        layer.bias *= scale
    teacher.train()


def distiller(name, pair="same family", **models_given):
    student, teacher = models_given.values() or models(pair)
    needed = teacher if needs_teacher(name) else None
    torch.manual_seed(2)
    return mdistiller.Distiller(student, needed, name, labels=LABELS, batch_size=B, total_steps=100)


def images(num_views=1):
    torch.manual_seed(3)
    index = torch.arange(B)
    image, label = torch.randn(B, 3, 32, 32), LABELS[index]
    more = [image + 0.1 * torch.randn_like(image) for _ in range(num_views - 1)]
    return torch.cat([image, *more]), label.repeat(num_views), index.repeat(num_views)


def batch_norms(model):
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.track_running_stats]


def state_of(model):
    """Everything of a model that a method could change."""
    return {
        "tensors": {key: (value.data_ptr(), value.clone()) for key, value in model.state_dict().items()},
        "classes": [(name, type(m), m.training, m.forward.__func__) for name, m in model.named_modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "attributes": {name: set(vars(m)) for name, m in model.named_modules()},
    }


def assert_same(model, before, trained=False):
    after = state_of(model)
    assert after["tensors"].keys() == before["tensors"].keys()
    for key, (pointer, value) in before["tensors"].items():
        assert after["tensors"][key][0] == pointer, key
        assert trained or torch.equal(after["tensors"][key][1], value), key
    for what in ("classes", "requires_grad", "attributes"):
        assert after[what] == before[what], what


def test_a_method_has_few_public_members():
    built = Method(MethodConfig())
    members = {*dir(built), *Method.__annotations__} - {*dir(nn.Module())}
    assert len({name for name in members if not name.startswith("_")}) <= 12


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", METHODS)
def test_three_steps(name, pair):
    """Every parameter gets a gradient; models stay the caller's own; batch norm counts once a step."""
    student, teacher = models(pair)
    if pair == "transformer" and any_has(name, "convolutional teacher"):
        with pytest.raises(ConfigError):
            distiller(name, student=student, teacher=teacher)
        return
    student_before, teacher_before = state_of(student), state_of(teacher)
    image = torch.randn(2, 3, 32, 32)
    logits = copy.deepcopy(student).eval()(image)
    d = distiller(name, student=student, teacher=teacher)
    assert_same(student, student_before)
    assert_same(teacher, teacher_before)
    assert torch.equal(copy.deepcopy(student).eval()(image), logits)
    # A method either trains the given student or leaves it alone and trains a copy.
    own = d.student is student
    composed = Wrapper | Sum
    parts = [m for m in d.method.modules() if isinstance(m, Method) and not isinstance(m, composed)]
    assert own == all(type(m).extend_student is Method.extend_student for m in parts)
    assert {id(p) for p in d.parameters()} >= {id(p) for p in d.student.parameters()}
    d.train()
    student_before = state_of(student)
    optimizer = torch.optim.SGD([p for p in d.parameters() if p.requires_grad], lr=1e-3)
    batch = images(d.method.needs.views)
    for step in range(3):
        out = d(*batch, progress=0.5 + 0.1 * step)
        assert all(value.shape == () and torch.isfinite(value) for value in out.losses.values())
        optimizer.zero_grad()
        out.loss.backward()
        for key, p in d.named_parameters():
            assert p.grad is not None or not p.requires_grad, key
        optimizer.step()
        assert all(m.num_batches_tracked == step + 1 for m in batch_norms(d.student))
    assert_same(student, student_before, trained=own)
    assert_same(teacher, teacher_before)
    teacher_tensors = {id(p) for p in teacher.parameters()}
    assert not teacher_tensors & {id(p) for p in d.parameters()}


def losses_and_gradients(name, progress, **settings):
    """Distillation losses by name, and the gradients of the student and the method."""
    student, teacher = models()
    torch.manual_seed(2)
    config = method_config(name).replace(**settings)
    data = DataInfo((3, 32, 32), LABELS, B)
    method = build_method(config, student, teacher if needs_teacher(name) else None, data)
    tapped = TappedModel(method.extend_student(student).train(), method.student_taps)
    batch = Batch(*images(method.needs.views))
    frozen = Outputs(torch.zeros(0), {})
    if needs_teacher(name):
        frozen = LiveTeacher(teacher, method.teacher_taps)(batch)
    torch.manual_seed(4)
    losses = method(tapped(batch.image), frozen, batch, torch.tensor(progress))
    trained = [p for module in (tapped, method) for p in module.parameters() if p.requires_grad]
    if losses:
        sum(losses.values()).backward()
    return method, losses, [torch.zeros(()) if p.grad is None else p.grad for p in trained]


@pytest.mark.parametrize("name", METHODS)
def test_losses_are_the_distillation_s_alone(name):
    _, losses, _ = losses_and_gradients(name, 0.5)
    assert isinstance(losses, dict)
    assert "task" not in losses
    assert all(value.shape == () for value in losses.values())
    assert bool(losses) == needs_teacher(name)


SCHEDULES = [(name, {}) for name in METHODS]
SCHEDULES += [(n, {"warmup": 0.0}) for n in BUILT_IN if "warmup" in get_method(n).Config.model_fields]


@pytest.mark.parametrize(("name", "settings"), SCHEDULES)
def test_progress_is_needed_where_it_matters_and_only_there(name, settings):
    method, *start = losses_and_gradients(name, 0.0, **settings)
    _, *end = losses_and_gradients(name, 1.0, **settings)
    same = all(torch.equal(start[0][key], end[0][key]) for key in start[0])
    same = same and all(torch.equal(a, b) for a, b in zip(start[1], end[1], strict=True))
    assert method.needs.progress == (not same)
    assert not (settings and method.needs.progress) or any_has(name, "curriculum")


@pytest.mark.parametrize("wrapper", [w.name for w in WRAPPERS])
@pytest.mark.parametrize("base", BUILT_IN)
def test_a_wrapper_refuses_what_taps_features(wrapper, base):
    student, teacher = models()
    data = DataInfo((3, 32, 32), LABELS, B)
    base_class = get_method(base)
    given = teacher if base_class.needs.teacher else None
    built = build_method(method_config(base), student, given, data)
    if built.student_taps or built.teacher_taps:
        with pytest.raises(ConfigError, match=f"method '{wrapper}' wraps"):
            get_method(f"{wrapper}-{base}")


def test_a_wrapper_refuses_a_base_that_taps_only_once_built(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    class LateConfig(MethodConfig):
        pass

    @register_method("late")
    class Late(Method):
        Config = LateConfig

        def __init__(self, config, student, teacher, data):
            super().__init__(config, student, teacher, data)
            self.student_taps = ("pooled",)

    for wrapper in WRAPPERS:
        if taken(wrapper, Late):
            with pytest.raises(ConfigError, match="read only logits; 'late' taps features"):
                mdistiller.Distiller(*models(), f"{wrapper.name}-late")


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_falls_over_20_steps(name):
    d = distiller(name).train()
    trained = [p for p in d.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-3)
    if any_has(name, "plain SGD"):
        optimizer = torch.optim.SGD(trained, lr=0.01)
    batch = images(d.method.needs.views)
    history = []
    for _ in range(20):
        out = d(*batch, progress=1.0)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        history.append(out.loss.item())
    assert min(history[-3:]) < history[0]
    assert sum(history[-5:]) < sum(history[:5])


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_stays_finite(name):
    d = distiller(name).train()
    batch = images(d.method.needs.views)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            out = d(*batch, progress=1.0)
        losses = out.losses
        assert all(torch.isfinite(value) and value.dtype == torch.float32 for value in losses.values())
        d.zero_grad()
        out.loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in d.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", METHODS)
def test_compiles_whole(name):
    """Without a graph break, forward and backward, and with the eager pass's losses."""
    torch.compiler.reset()
    d = distiller(name).train()
    batch = Batch(*images(d.method.needs.views))
    with torch.no_grad():
        (teacher,) = ask_teacher(d, [batch])
    twin = copy.deepcopy(d)
    torch.manual_seed(5)
    expected = d(*batch[:3], torch.tensor(0.5), teacher).losses
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    torch.manual_seed(5)
    got = compiled(*batch[:3], torch.tensor(0.5), teacher).losses
    sum(got.values()).backward()
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-3, atol=1e-4)


# Resuming


DATA = DataConfig(kind="synthetic", synthetic_samples=16, synthetic_classes=4, image_size=32)


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    torch.manual_seed(0)
    save_student(file, mdistiller.create_model("resnet14", 4), {})
    return file


def trainer(name, teacher_file):
    config = ClassificationConfig(
        data=DATA,
        student=ModelConfig(name="resnet8"),
        teacher=ModelConfig(name="resnet14", checkpoint=teacher_file),
        method=method_config(name),
        batch_size=8,
        epochs=2,
        device="cpu",
    )
    torch.manual_seed(0)
    student, teacher = (mdistiller.create_model(n, 4) for n in ("resnet8", "resnet14"))
    teacher = teacher if needs_teacher(name) else None
    return make_trainer(config, load_data(DATA), student, teacher)


def run_epoch(trainer):
    trainer.distiller.train()
    for _ in range(len(trainer.source.loader)):
        batches = trainer.source.next_batches(trainer.step, 1)
        trainer.train_step(*batches, *ask_teacher(trainer.distiller, batches))


@pytest.mark.parametrize("name", METHODS)
def test_state_goes_to_disk_and_back_and_training_goes_on_bit_for_bit(name, teacher_file):
    whole = trainer(name, teacher_file)
    run_epoch(whole)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    run_epoch(whole)
    resumed = trainer(name, teacher_file)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    run_epoch(resumed)
    expected = whole.distiller.state_dict()
    assert expected.keys() == resumed.distiller.state_dict().keys()
    for key, value in resumed.distiller.state_dict().items():
        assert torch.equal(value, expected[key]), key


# Two processes


class Small(nn.Module):
    """Three stages with all canonical taps.

    The student has no batch norm, whose statistics are those of one process; the teacher has: OFD reads it.
    """

    def __init__(self, width, norm):
        super().__init__()
        self.stage1, self.stage2, self.stage3 = (
            nn.Sequential(nn.Conv2d(3 if i == 1 else width * i // 2, width * i, 3, 2, 1), norm(width * i))
            for i in (1, 2, 4)
        )
        self.relu1, self.relu2, self.relu3 = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.fc = nn.Linear(4 * width, CLASSES)
        self.tap_points = {"last_map": "relu3", "pooled": "fc:input"}
        for i in (1, 2, 3):
            self.tap_points |= {f"stage{i}.preact": f"relu{i}:input", f"stage{i}": f"relu{i}"}

    def forward(self, x):
        for i in (1, 2, 3):
            x = getattr(self, f"relu{i}")(getattr(self, f"stage{i}")(x))
        return self.fc(x.mean((2, 3)))


def gradients(name, rank=0, size=1):
    torch.manual_seed(0)
    student, teacher = Small(8, lambda n: nn.GroupNorm(2, n)), Small(12, nn.BatchNorm2d)
    data = DataInfo((3, 32, 32), LABELS, B)
    torch.manual_seed(1)
    needed = teacher if needs_teacher(name) else None
    method = build_method(method_config(name), student, needed, data)
    d = mdistiller.Distiller(method.extend_student(student), needed, method).train()
    for module in d.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    n = method.needs.views
    views = [[x.chunk(n)[v] for x in images(n)] for v in range(n)]
    # Each process has consecutive samples, of every view.
    parts = [[x.chunk(size)[rank] for x in view] for view in views]
    mine = [torch.cat(xs) for xs in zip(*parts, strict=True)]
    step = d if size == 1 else DistributedDataParallel(d)
    torch.manual_seed(4)
    with pytest.MonkeyPatch.context() as patch:
        if any_has(name, "noise"):
            patch.setattr(torch, "randn_like", torch.zeros_like)
            patch.setattr(
                torch, "randint", lambda low, high, size, **more: torch.full(size, high // 2, **more)
            )
        out = step(*mine, torch.tensor(0.5))
    out.loss.backward()
    trained = {key: p.grad for key, p in d.named_parameters() if p.requires_grad}
    return trained, dict(d.named_buffers())


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save({name: gradients(name, rank, 2) for name in METHODS}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run_ranks(work, str(folder))
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_give_the_gradients_and_buffers_of_one(name, two_processes):
    expected, buffers = gradients(name)
    # Where terms cancel, as in a bias before a normalization, a sum has the rounding of its terms.
    rounding = 5e-7 * max(value.abs().max().item() for value in expected.values())
    for results in two_processes:
        got, got_buffers = results[name]
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            atol = max(1e-5 * value.abs().max().item(), 1e-8, rounding)
            torch.testing.assert_close(got[key], value, rtol=1e-3, atol=atol, msg=key)
        for key, value in buffers.items():
            torch.testing.assert_close(got_buffers[key], value, rtol=1e-4, atol=1e-5, msg=key)


# Where student equals teacher

# Not zero at equal models: methods with layers of their own, a bound of a likelihood, entropy terms, labels,
# or another temperature for each model.


@pytest.mark.parametrize("name", [n for n in METHODS if all("zero at equal" in f for f in facts(n))])
def test_nothing_is_left_to_learn_from_an_equal(name):
    _, teacher = models()
    student = copy.deepcopy(teacher)
    d = distiller(name, student=student, teacher=teacher).eval()
    batch = images(d.method.needs.views)
    different = distiller(name).eval()(*batch, progress=1.0).losses
    for key, value in d(*batch, progress=1.0).losses.items():
        if key != "task":
            assert abs(value.item()) < 1e-4 * max(abs(different[key].item()), 1e-2), key
