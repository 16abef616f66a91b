"""The same trainer on a GPU: equal metrics, all precisions, and no waiting for the device in a step."""

import copy

import pytest
import torch
from small_runs import make_trainer, step_on

import mdistiller
from mdistiller.config import OptimConfig
from mdistiller.data import Augment, AugmentConfig, DataConfig, load_data, make_loader
from mdistiller.data.draws import Draws
from mdistiller.data.policy import Policy
from mdistiller.methods import DKDConfig, KDConfig, NoneConfig, method_config
from mdistiller.models import ModelConfig
from mdistiller.runs.progress import Silent
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.classification.evaluate import evaluate
from mdistiller.training.distributed import World
from mdistiller.training.launch import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

DATA = DataConfig(kind="synthetic", synthetic_samples=512, synthetic_classes=10)
METHODS = [NoneConfig(), KDConfig(), DKDConfig(warmup=0.0, beta=1.0)]


@pytest.fixture(autouse=True)
def choose_kernels(monkeypatch):
    """Whatever a run before has set."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


def trainer(device="cuda", **changes):
    settings = {
        "data": DATA,
        "augment": AugmentConfig(),
        "student": ModelConfig(name="resnet8"),
        "method": DKDConfig(warmup=0.0, beta=1.0),
        "optim": OptimConfig(lr=0.02, schedule="constant"),
        "epochs": 10,
        "device": device,
    }
    config = ClassificationConfig(**(settings | changes))
    torch.manual_seed(0)
    student, teacher = (mdistiller.create_model(name, 10) for name in ("resnet8", "resnet14"))
    return make_trainer(config, load_data(config.data), student, teacher, World(torch.device(device)))


def losses(t, n):
    t.learner.train()
    sums = []
    for epoch in range(100):
        for raw in t.source.loader.epoch(epoch):
            sums.append(step_on(t, raw))
            if len(sums) == n:
                return [float(s["loss"] / s["n"]) for s in sums]
    raise AssertionError


def test_the_first_losses_equal_the_cpu_s():
    still = AugmentConfig(flip=False, padding=0)
    assert losses(trainer(augment=still), 3) == pytest.approx(
        losses(trainer("cpu", augment=still), 3), rel=1e-2
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_loss_falls(method, precision, compiled):
    found = losses(trainer(method=method, precision=precision, compile=compiled), 40)
    assert sum(found[-4:]) < 0.8 * sum(found[:4])


@pytest.mark.parametrize("graph", ["on", "off"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("policy", ["autoaugment", "randaugment", "trivialaugment", "fixmatch"])
def test_a_step_never_waits_for_the_device(precision, graph, policy):
    augment = AugmentConfig(policy=policy, mixup_alpha=0.2, cutmix_alpha=1.0)
    optim = OptimConfig(clip_norm=5.0, accumulate=2)
    t = trainer(precision=precision, augment=augment, optim=optim, ema=0.9, cuda_graph=graph)
    losses(t, 2 if graph == "off" else 6)
    assert (t.update.graph is not None and t.update.graph.replay is not None) == (graph == "on")
    raws = list(t.source.loader.epoch(1))[:3]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for raw in raws:
            step_on(t, raw)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["autoaugment", "randaugment", "trivialaugment", "fixmatch"])
def test_policies_change_images_as_on_the_cpu(name):
    images = load_data(DATA).train.images
    ours, reference = (Policy(name, 32, 32, torch.device(device)) for device in ("cuda", "cpu"))
    drawn = reference.draw(Draws(0, torch.arange(len(images))))
    found = ours.apply(images.cuda(), drawn.cuda()).cpu().int()
    # But for the rounding of places halfway between two pixels, and of levels close to the next one.
    assert (found != reference.apply(images, drawn).int()).float().mean() < 0.02


def test_the_teacher_runs_ahead_and_the_cache_says_the_same(tmp_path):
    live = trainer(data=DATA.model_copy(update={"synthetic_samples": 64}))
    assert live.source.lookahead == 16  # 1,024 of these images
    looked_up = trainer(data=live.config.data, teacher_cache=tmp_path, teacher_cache_format="fp16")
    looked_up.source.open(Silent())
    raws = list(live.source.loader.epoch(0))
    looked_up.source.prepare(raws[::2], 0)  # the others are computed, and these are read
    pairs = zip(live.source.prepare(raws, 0)[0], looked_up.source.prepare(raws, 0)[0], strict=True)
    for (batch, said), (same, read) in pairs:
        assert torch.equal(batch.image, same.image)
        torch.testing.assert_close(read.logits, said.logits.float(), rtol=1e-2, atol=1e-2)


def test_evaluation_equals_the_cpu_s():
    splits = load_data(DATA)
    torch.manual_seed(0)
    model = mdistiller.create_model("resnet8x4", 10)
    metrics = []
    for device in ("cpu", "cuda"):
        here = World(torch.device(device))
        prepare = Augment(AugmentConfig(), splits.mean, splits.std, 10).to(device).eval()
        loader = make_loader(splits.test, 100, device=device, shuffle=False)
        metrics.append(evaluate(model.to(device), loader.epoch(0), prepare, here))
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-3)


def test_a_whole_run(tmp_path):
    config = ClassificationConfig(
        data=DATA, student=ModelConfig(name="resnet8x4"), epochs=2, out=tmp_path / "run", precision="bfloat16"
    )
    summary = train(config).summary
    assert summary["step"] == 16


# The step as a graph

STILL = AugmentConfig(flip=False, padding=0)


def weights(t):
    return {k: v.double().cpu() for k, v in t.update.state_dict()["learner"].items()}


def assert_near(a, b, start):
    """Apart by far less than training has moved them, all tensors together.

    Single ones may not be: convolutions in TF32 let roundings grow from step to step.
    """

    def norm(x, y):
        return sum((x[name] - y[name]).square().sum() for name in x).sqrt()

    assert norm(a, b) <= 0.05 * norm(a, start)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bfloat16"},
        {"compile": True},
        {"optim": OptimConfig(name="adamw", lr=1e-3)},
        {"optim": OptimConfig(lr=0.02, nesterov=True, clip_norm=1.0, accumulate=2), "ema": 0.9},
        {"method": method_config("fitnet")},
        {"method": method_config("mlkd")},
        {"batch_size": 100},  # 512 images: the epoch's last batch has 12
    ],
)
def test_replays_equal_the_step_as_it_is(changes):
    found = {}
    for graph in ("on", "off"):
        t = trainer(cuda_graph=graph, **changes)
        start = weights(t)
        found[graph] = losses(t, 14), weights(t)
        if graph == "on":
            assert t.update.graph.replay is not None
            assert t.step == 14
    assert found["on"][0] == pytest.approx(found["off"][0], rel=2e-2, abs=1e-3)
    assert_near(found["on"][1], found["off"][1], start)


def test_replays_draw_new_numbers_each_time():
    options = {"dropout": 0.5}
    torch.manual_seed(0)
    student = mdistiller.create_model("wrn_16_1", 10, **options)
    config = trainer(augment=STILL, optim=OptimConfig(lr=1e-9, schedule="constant")).config
    config = config.model_copy(update={"student": ModelConfig(name="wrn_16_1", options=options)})
    teacher = mdistiller.create_model("resnet14", 10)
    t = make_trainer(config, load_data(DATA), student, teacher, World(torch.device("cuda")))
    t.learner.train()
    raw = next(t.source.loader.epoch(0))
    found = {float(step_on(t, raw)["task"]) for _ in range(12)}
    assert t.update.graph.replay is not None
    assert len(found) == 12


def test_evaluation_between_replays_changes_nothing():
    ends = []
    for evaluates in (True, False):
        t = trainer()
        losses(t, 8)
        if evaluates:
            metrics = t.evaluator(t.student, True)
            assert metrics["loss"] == pytest.approx(t.evaluator(copy.deepcopy(t.student), True)["loss"])
            t.source.augment.train()  # as an epoch's start does
        losses(t, 4)
        assert t.update.graph.replay is not None
        ends.append(weights(t))
    start = weights(trainer())
    assert_near(*ends, start)


def test_a_state_goes_on_with_and_without_a_graph():
    whole = trainer(augment=STILL, cuda_graph="off")
    start = weights(whole)
    losses(whole, 8)
    losses(whole, 8)
    for first, second in (("on", "off"), ("off", "on"), ("on", "on")):
        a, b = (trainer(augment=STILL, cuda_graph=graph) for graph in (first, second))
        losses(a, 8)
        b.load_state_dict(copy.deepcopy(a.state_dict()))
        losses(b, 8)
        assert_near(weights(b), weights(whole), start)


def test_a_step_that_waits_for_the_device_has_no_graph():
    t = trainer()
    forward = t.learner.method.forward

    def waiting(student, teacher, batch, progress):
        return forward(student, teacher, batch, progress) if float(progress) >= 0 else {}

    t.learner.method.forward = waiting
    with pytest.warns(UserWarning, match="a step waits for the device"):
        found = losses(t, 8)
    assert found == pytest.approx(losses(trainer(cuda_graph="off"), 8), rel=1e-2)
